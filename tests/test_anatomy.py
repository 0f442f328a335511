"""Every chapter has its page, lab, checks and code in the fixed anatomy; the rules notice what is missing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from llmcourse.checks import exercises, slugs
from llmcourse.labs import Lab, build, list_labs
from llmcourse.labs.anatomy import budget_problems, code_shown, lab_problems, page_problems, prose_of
from llmcourse.labs.nbgrader import check_metadata, metadata_problems, solution_metadata
from llmcourse.labs.staleness import changed_cells, read_notebook

ROOT = Path(__file__).resolve().parents[1]


def chapters() -> list[tuple[str, str]]:
    """(page, lab) of each chapter in the table of contents: the pages that have a lab below them."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    listed = [chapter for part in toc["parts"] for chapter in part["chapters"]]
    return [(one["file"], section["file"]) for one in listed for section in one.get("sections", [])]


CHAPTERS = chapters()
LABS = {lab.name: lab for lab in (list_labs(ROOT) if (ROOT / "labs" / "src").is_dir() else [])}
PAGES = pytest.mark.parametrize(("page", "lab"), CHAPTERS, ids=[Path(page).name for page, _ in CHAPTERS])
EACH_LAB = pytest.mark.parametrize("lab", LABS.values(), ids=LABS)


def test_the_table_of_contents_has_chapters():
    assert CHAPTERS and LABS


@PAGES
def test_one_slug_names_four_places(page, lab):
    slug = Path(page).name
    assert re.fullmatch(rf"labs/\d\d_{slug}", lab), f"{page} and {lab} do not share a slug"
    assert Path(lab).name in LABS, f"{lab}: no labs/src/{Path(lab).name}.py"
    assert slug in slugs(), f"no llmcourse/checks/{slug}.py with EXERCISES"
    assert len(exercises(slug)) >= 5
    shown = code_shown((ROOT / f"{page}.md").read_text(encoding="utf-8"))
    assert shown and all((ROOT / path).is_file() for path in shown), (
        f"{page} walks through no code of the package"
    )


def test_nothing_lies_outside_the_table_of_contents():
    known = {Path(lab).name for _, lab in CHAPTERS}
    assert set(LABS) == known, "labs and table of contents differ"
    assert set(slugs()) == {Path(page).name for page, _ in CHAPTERS}, "checks and table of contents differ"
    stored = {path.stem for path in (ROOT / "labs").glob("*.ipynb")}
    results = {path.stem for path in (ROOT / "labs" / "results").glob("*.json")}
    assert stored <= known and results <= known, "a stored notebook or result belongs to no chapter"


@PAGES
def test_page_has_the_fixed_anatomy(page, lab):
    assert page_problems((ROOT / f"{page}.md").read_text(encoding="utf-8")) == []


@EACH_LAB
def test_lab_has_the_fixed_anatomy(lab):
    notebook = build(lab)
    assert lab_problems(notebook) == []
    assert metadata_problems(notebook.cells) == []


@EACH_LAB
def test_lab_asks_for_each_exercise_of_its_checks_once(lab):
    asked = [cell.metadata.get("nbgrader", {}) for cell in build(lab).cells]
    ids = [one["grade_id"].removeprefix(f"{lab.slug}-") for one in asked if one.get("solution")]
    assert ids == [exercise.id for exercise in exercises(lab.slug)]


@EACH_LAB
def test_stored_notebook_is_its_source_executed_within_budget(lab):
    assert lab.notebook.is_file(), f"{lab.name} was never executed: make labs LABS={lab.number}"
    notebook = read_notebook(lab)
    assert changed_cells(lab) is None, f"stale: make labs LABS={lab.number}"
    assert budget_problems(notebook) == []
    assert lab_problems(notebook) == []
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not any(output.output_type == "error" for output in outputs)


# --- The rules notice what is missing: a complete lab and page, and one defect at a time -----------------------------

TOP = "# Lab\n\n|Chapter|Hardware|Minutes|You will build|What to inspect|\n|-|-|-|-|-|\n|a|b|c|d|e|"
STUB = "def f():\n    raise NotImplementedError"


def complete_lab():
    cells = [new_markdown_cell(TOP), new_markdown_cell("## Setup")]
    cells += [
        new_code_cell("%pip install x", metadata={"tags": ["setup"]}),
        new_code_cell("PRESET = 'cpu'\nCORPUS = 'tinytown'\nSEED = 0", metadata={"tags": ["parameters"]}),
    ]
    cells += [new_markdown_cell("## Objectives")]
    for number in range(1, 6):
        title = f"## {number}. Part" if number < 5 else "### More"
        cells += [
            new_markdown_cell(f"{title}\n\n<details><summary>Hint</summary>\n\nThink.\n\n</details>"),
            new_code_cell(
                "def f():\n    raise NotImplementedError",
                metadata={"nbgrader": solution_metadata(f"s-{number}")},
            ),
            new_code_cell("check('s/1', f)", metadata={"nbgrader": check_metadata(f"s-{number}-check", 1)}),
            new_code_cell("plotting.show(fig, alt='A line that falls')"),
        ]
    cells += [new_markdown_cell("## The same with the library"), new_markdown_cell("## Measured results")]
    cells += [new_code_cell("# NBVAL_CHECK_OUTPUT\nclaim('a', True, 'text')")]
    cells += [new_markdown_cell(f"## {title}") for title in ("Break it", "Takeaways", "Next")]
    return new_notebook(cells=cells)


LAB_DEFECTS = [
    ("## Objectives", "## Goals", "headings are"),
    ("## Break it", "## Break", "headings are"),
    ("## 2. Part", "## Second", "must begin with '2. '"),
    ("## 2. Part", "### 2. Part", "section '3. Part'"),
    ("|Minutes|", "|Time|", "no row or column 'Minutes'"),
    ("# Lab", "Lab", "must begin with the title"),
    ("## 1. Part", "## 1. Part {cite}`x`", "is MyST"),
    ("## 1. Part", "## 1. Part\n```{note}\nx\n```", "is MyST"),
    ("## 1. Part", "## 1. Part\n![](a.png)", "image without alt text"),
    ("## 1. Part", "## 1. Part\n<img src='a.png'>", "image without alt text"),
    ("SEED = 0", "seed = 0", "does not set SEED"),
    ("raise NotImplementedError", "return 1", "stub must raise"),
    ("check('s/1', f)", "f()", "must call check"),
    ("<details>", "<p>", "hints in <details>"),
    ("# NBVAL_CHECK_OUTPUT", "#", "must begin with '# NBVAL_CHECK_OUTPUT'"),
    ("claim('a'", "print('a'", "claims nothing"),
    (", alt='A line that falls'", "", "without alt text"),
    ("'A line that falls'", "' '", "without alt text"),
]


def test_complete_lab_passes():
    assert lab_problems(complete_lab()) == []


@pytest.mark.parametrize(("old", "new", "problem"), LAB_DEFECTS)
def test_lab_rules_notice(old, new, problem):
    notebook = complete_lab()
    assert any(old in cell.source for cell in notebook.cells)
    for cell in notebook.cells:
        cell.source = cell.source.replace(old, new)
    assert any(problem in found for found in lab_problems(notebook)), lab_problems(notebook)


def test_lab_rules_notice_displaced_and_missing_cells():
    notebook = complete_lab()
    notebook.cells.insert(7, new_code_cell("1 + 1"))
    assert any("its check cell must follow directly" in problem for problem in lab_problems(notebook))
    notebook = complete_lab()
    del notebook.cells[6:8]
    assert any("4 exercises, expected at least 5" in problem for problem in lab_problems(notebook))
    notebook = complete_lab()
    notebook.cells[-4].outputs = [new_output("display_data", data={"image/png": "abc"})]
    assert any("stored figure has no alt text" in problem for problem in lab_problems(notebook))
    notebook.cells[-4].outputs = [new_output("display_data", data={"text/html": "<img src='x'>"})]
    assert any("stored image has no alt text" in problem for problem in lab_problems(notebook))


def test_budget_rules_notice():
    notebook = complete_lab()
    assert budget_problems(notebook) == ["it was never executed"]
    cost = {"seconds": 180, "peak_bytes": 4 * 2**30, "claims": [{"id": "a", "held": True}]}
    notebook.metadata["llmcourse"] = cost
    assert budget_problems(notebook) == []
    notebook.metadata["llmcourse"] = {
        "seconds": 181,
        "peak_bytes": 2**33,
        "claims": [{"id": "a", "held": False}],
    }
    notebook.cells[-4].outputs = [new_output("stream", text="x" * 1_000_001)]
    found = " ".join(budget_problems(notebook))
    assert all(
        part in found for part in ("seconds: 181", "peak_bytes", "bytes of outputs", "'a' does not hold")
    )
    notebook.metadata["llmcourse"] = {**cost, "claims": []}
    assert "it states no claim" in budget_problems(notebook)


HIDDEN = "```{solution} x\n:class: dropdown\nBecause.\n```\n"
PAGE = f"""---
jupytext: {{}}
---
# A chapter

## At a glance
objectives prerequisites difficulty hours lab hardware
## Intuition
{"word " * 2000}
## Theory
$$
a = b
$$ (eq-one)
## In code
```{{literalinclude}} ../../llmcourse/models/attention.py
:pyobject: rms_norm
## not a heading
```
## Worked example with numbers
## Evidence
## Failure modes
## In practice
## Check yourself
{HIDDEN}
## Exercises
{HIDDEN * 3}
## Key takeaways
## Further reading
{{cite}}`someone2020`
"""
PAGE_DEFECTS = [
    ("## Evidence\n", "", "headings are"),
    ("## Intuition", "## Ideas", "headings are"),
    ("word " * 2000, "word " * 1500, "words of prose"),
    ("word " * 2000, "word " * 4100, "words of prose"),
    ("# A chapter\n", "", "needs one title"),
    ("prerequisites ", "", "does not say: prerequisites"),
    (" (eq-one)", "", "no numbered equation"),
    ("{literalinclude} ../../llmcourse/", "{literalinclude} ../../tests/", "shows no code of the package"),
    (HIDDEN * 3, HIDDEN * 2, "2 hidden solutions"),
    (":class: dropdown", ":class: tip", "no hidden answer"),
    ("{cite}`someone2020`", "someone", "cites nothing"),
]


def test_complete_page_passes():
    assert page_problems(PAGE) == []


@pytest.mark.parametrize(("old", "new", "problem"), PAGE_DEFECTS)
def test_page_rules_notice(old, new, problem):
    assert old in PAGE
    assert any(problem in found for found in page_problems(PAGE.replace(old, new))), page_problems(
        PAGE.replace(old, new)
    )


def test_prose_is_counted_without_code_formulas_and_options():
    text = "---\na: b\n---\nOne two.\n```{math}\n:label: x\na b c\n```\n```python\nd e\n```\n````{exercise}\n"
    text += ":label: y\nThree\n```python\ni\n```\n````\n<!-- k l -->\n"
    text += "$$\nf g\n$$\nfour\n```{code-cell}\nh i\n```\n:::{tip}\nfive\n:::\n"
    assert prose_of(text).split() == ["One", "two.", "Three", "four", "five"]
    assert code_shown(PAGE) == ["llmcourse/models/attention.py"]


def test_a_lab_knows_its_files(tmp_path):
    lab = Lab(tmp_path, "01", "attention")
    assert [path.relative_to(tmp_path).as_posix() for path in (lab.source, lab.notebook, lab.results)] == [
        "labs/src/01_attention.py",
        "labs/01_attention.ipynb",
        "labs/results/01_attention.json",
    ]
