"""The lab machinery on a miniature lab: built, executed on a real kernel, stored, found stale, checked by nbval."""

from __future__ import annotations

import json
import math
import os
import re
import sys

import numpy as np
import pytest
import torch

from llmcourse.checks import exercises, slugs
from llmcourse.labs import (
    Lab,
    LabError,
    build,
    execute,
    find_lab,
    find_repository,
    list_labs,
    load_benchmarks,
    load_results,
    refresh,
    select_labs,
    stale,
    store_results,
)
from llmcourse.labs.__main__ import main, run_nbval
from llmcourse.labs.anatomy import budget_problems
from llmcourse.labs.cleaning import clean
from llmcourse.labs.execution import claims_of
from llmcourse.labs.kernel import BAR, ProgressRelay
from llmcourse.labs.nbgrader import check_metadata, metadata_problems, solution_metadata
from llmcourse.labs.source import parameters_of, source_hash
from llmcourse.labs.staleness import changed_cells, imported_modules, read_notebook

# The miniature lab borrows a real chapter's first exercise: its kernel sees only the installed package.
SLUG = slugs()[0]
EXERCISE = exercises(SLUG)[0]
CONFIG = "repository:\n  url: https://github.com/someone/course\n  branch: trunk\n"
SOURCE = """\
# ---
# jupyter:
#   kernelspec:
#     display_name: Other
#     language: python
#     name: other
# ---

# %% [markdown]
# # 07 A miniature lab
# [Open in Colab]({{colab}}), [source]({{repository}}/tree/{{branch}}), $\\\\frac{{a}}{b}$

# %% [markdown]
# ## Setup

# %% tags=["parameters"]
PRESET = "cpu"
CORPUS = "tinytown"
SEED = 3

# %%
import os
import sys
import time
from pathlib import Path

from llmcourse.checks import check, claim
from llmcourse.labs import store_results

here = os.listdir(".")
print("files here:", here)
print(Path.cwd() / "file.txt", sys.prefix, Path.home() / "x")

# %% exercise="EXERCISE"
def answer(*inputs):
    raise NotImplementedError

# %% check="EXERCISE"
check("SLUG/EXERCISE", answer)

# %%
ballast = bytearray(300 * 2**20)
ballast[::4096] = b"x" * len(ballast[::4096])
del ballast
bar = "\\\\rtraining: {}%|##  | {}/2 [00:01<00:05, 1.0s/it]"
for step in range(3):
    print(bar.format(step * 50, step), end="", file=sys.stderr, flush=True)
print("", file=sys.stderr)
measured = SEED * 2

# %%
print(measured)

# %%
# NBVAL_CHECK_OUTPUT
claim("seed", measured >= 2, "twice the seed is at least 2")

# %%
# NBVAL_CHECK_OUTPUT
claim("preset", PRESET == "cpu", "the preset is its own")

# %%
store_results("SLUG", {"measured": measured, "preset": PRESET})
""".replace("EXERCISE", EXERCISE.id).replace("SLUG", SLUG)


def make_lab(folder, source=SOURCE):
    (folder / "labs" / "src").mkdir(parents=True)
    (folder / "_config.yml").write_text(CONFIG)
    lab = Lab(folder, "07", SLUG)
    lab.source.write_text(source.replace("\\\\", "\\"))
    return lab


def edit(lab, old, new):
    text = lab.source.read_text()
    assert old in text
    lab.source.write_text(text.replace(old, new))


@pytest.fixture
def lab(tmp_path):
    return make_lab(tmp_path)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The miniature lab, executed once; tests that change it work on a copy."""
    lab = make_lab(tmp_path_factory.mktemp("executed"))
    execute(lab, progress=False)
    return lab


@pytest.fixture
def stored(executed, lab):
    lab.notebook.write_text(executed.notebook.read_text())
    lab.results.parent.mkdir()
    lab.results.write_text(executed.results.read_text())
    return lab


def test_build_is_deterministic_and_ids_survive_edits_elsewhere(lab):
    one, two = build(lab), build(lab)
    assert one == two and source_hash(one) == source_hash(two)
    ids = [cell.id for cell in one.cells]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in ids)
    edit(lab, "print(measured)", "print(measured, 'inserted')\n\n# %%\n1 + 1")
    after = [cell.id for cell in build(lab).cells]
    assert len(after) == len(ids) + 1 and len(set(ids) - set(after)) == 1
    assert f"{SLUG}-{EXERCISE.id}" in after and f"{SLUG}-{EXERCISE.id}-check" in after


def test_build_fills_links_kernel_and_setup_from_one_setting(lab):
    notebook = build(lab)
    top = notebook.cells[0].source
    assert f"https://colab.research.google.com/github/someone/course/blob/trunk/labs/07_{SLUG}.ipynb" in top
    assert "https://github.com/someone/course/tree/trunk" in top and "\\frac{{a}}{b}" in top
    setup = notebook.cells[2].source
    assert '%pip install -q "llmcourse @ git+https://github.com/someone/course@trunk"' in setup
    assert notebook.metadata.kernelspec.name == "python3" and notebook.metadata.language_info.name == "python"
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert parameters_of(notebook) == {"PRESET": "cpu", "CORPUS": "tinytown", "SEED": 3}


def test_build_writes_nbgrader_metadata(lab):
    by_id = {cell.id: cell for cell in build(lab).cells}
    name = f"{SLUG}-{EXERCISE.id}"
    expected = {
        "schema_version": 3,
        "grade": False,
        "locked": False,
        "solution": True,
        "task": False,
        "grade_id": name,
    }
    assert by_id[name].metadata == {"nbgrader": expected}
    expected = {**expected, "grade": True, "locked": True, "solution": False, "grade_id": f"{name}-check"}
    assert by_id[f"{name}-check"].metadata == {"nbgrader": {**expected, "points": EXERCISE.points}}
    assert metadata_problems(build(lab).cells) == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("## Setup", "## Start", "no heading '## Setup'"),
        (' tags=["parameters"]', "", "needs one code cell"),
        (
            f'exercise="{EXERCISE.id}"',
            'exercise="nonsense"',
            "exercise='nonsense' must be a code cell and one of",
        ),
        ("{{branch}}", "{{commit}}", r"unknown placeholder \{\{commit\}\}"),
    ],
)
def test_build_refuses_a_bad_source_in_one_line(lab, old, new, message):
    edit(lab, old, new)
    with pytest.raises(ValueError, match=message) as caught:
        build(lab)
    assert f"labs/src/07_{SLUG}.py" in str(caught.value) and "\n" not in str(caught.value)


def test_build_needs_the_address_setting(lab):
    (lab.repository / "_config.yml").write_text("title: x\n")
    with pytest.raises(ValueError, match="set repository.url"):
        build(lab)


def test_executed_notebook_holds_outputs_provenance_and_nothing_of_this_machine(executed):
    notebook, text = read_notebook(executed), executed.notebook.read_text()
    record = notebook.metadata["llmcourse"]
    assert record["preset"] == "cpu" and record["corpus"] == "tinytown" and record["seed"] == 3
    assert record["claims"] == [
        {"id": "seed", "text": "twice the seed is at least 2", "held": True},
        {"id": "preset", "text": "the preset is its own", "held": True},
    ]
    assert 0 < record["seconds"] < 120 and record["upstream_seconds"] == 0
    assert 300 * 2**20 < record["peak_bytes"] < 4 * 2**30, (
        "the ballast of 300 MiB was freed at once and still counts"
    )
    assert record["matmul_gflops"] > 0 and record["device"] in ("cpu", "cuda", "mps")
    assert (
        record["versions"]["torch"] == torch.__version__ or record["versions"]["torch"] in torch.__version__
    )
    assert re.fullmatch(r"[0-9a-f]{64}", record["package_hash"]) and record["source_hash"] == source_hash(
        build(executed)
    )
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", record["date"])
    assert str(executed.repository) not in text and sys.prefix not in text and "papermill" not in text
    assert not any("execution" in cell.metadata for cell in notebook.cells)
    printed = notebook.cells[4].outputs[0].text
    assert "files here: []" in printed and "./file.txt [python] ~/x" in printed
    assert [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"] == list(range(1, 11))
    streams = [
        output.name for cell in notebook.cells for output in cell.get("outputs", []) if "name" in output
    ]
    assert "stdout" in streams and "stderr" not in streams, "finished progress bars are not stored"
    assert metadata_problems(notebook.cells) == [] and budget_problems(notebook) == []


def test_unanswered_exercise_lets_the_lab_run_on_and_scores_zero(executed):
    cell = next(cell for cell in read_notebook(executed).cells if cell.id == f"{SLUG}-{EXERCISE.id}-check")
    assert "not answered yet" in cell.outputs[0].text
    assert float(cell.outputs[1].data["text/plain"]) == 0
    assert not any(output.get("name") == "stderr" for output in cell.outputs)


def test_results_are_stored_and_read_back(executed):
    assert load_results(SLUG, executed.repository) == {"measured": 6, "preset": "cpu"}
    assert load_results(f"07_{SLUG}", executed.repository) == load_results("07", executed.repository)


@pytest.mark.slow
def test_nbval_runs_every_cell_and_refuses_the_one_changed_claim(stored, capfd):
    cells = sum(cell.cell_type == "code" for cell in read_notebook(stored).cells)
    stored.notebook.write_text(
        stored.notebook.read_text().replace("[holds] seed: twice", "[holds] seed: thrice")
    )
    stored.results.unlink()
    assert run_nbval([stored], cell_timeout=60) == 1
    printed = capfd.readouterr().out
    assert f"1 failed, {cells - 1} passed" in printed and f"FAILED 07_{SLUG}.ipynb::Cell 7" in printed
    assert not stored.results.exists(), "a check must not store results"


def test_current_after_execution_and_stale_for_each_reason(stored, monkeypatch):
    assert stale(stored) is None and changed_cells(stored) is None
    monkeypatch.setattr("llmcourse.labs.staleness.package_hash", lambda notebook, slug: "0" * 64)
    assert stale(stored) == "the package's code changed"
    monkeypatch.undo()
    stored.results.unlink()
    assert stale(stored) == "its stored results are missing"
    edit(stored, "SEED * 2", "SEED * 3")
    assert stale(stored) == "code cells changed" and "source differs" in changed_cells(stored)
    notebook = json.loads(stored.notebook.read_text())
    del notebook["metadata"]["llmcourse"]
    stored.notebook.write_text(json.dumps(notebook))
    assert stale(stored) == "never executed"
    stored.notebook.write_text(json.dumps(notebook)[:-9])
    assert stale(stored) == "its notebook is damaged"
    stored.notebook.unlink()
    assert stale(stored) == "never executed"


def test_changed_text_alone_keeps_the_outputs(stored):
    before = read_notebook(stored)
    edit(stored, "# # 07 A miniature lab", "# # 07 A tiny lab")
    assert stale(stored) is None and changed_cells(stored) == "cell 1: its source differs from the source"
    main_status(["execute", "--repository", str(stored.repository)])
    after = read_notebook(stored)
    assert changed_cells(stored) is None and "A tiny lab" in after.cells[0].source
    assert [cell.get("outputs") for cell in after.cells] == [cell.get("outputs") for cell in before.cells]
    assert after.metadata == before.metadata
    edit(stored, "SEED * 2", "SEED * 3")
    assert refresh(stored) is None


def test_package_hash_covers_imports_and_the_lab_s_checks(lab):
    assert imported_modules(build(lab)) == {"llmcourse.checks", "llmcourse.labs"}
    edit(
        lab,
        "import os\n",
        "import os\nimport llmcourse.accounting as a\nfrom llmcourse.models import attention, Attention\n",
    )
    found = imported_modules(build(lab))
    assert found >= {"llmcourse.accounting", "llmcourse.models", "llmcourse.models.attention"}
    assert "llmcourse.models.Attention" not in found


# Without this package's imports a kernel is up in a second.
TINY = """\
# %% [markdown]
# ## Setup

# %% tags=["parameters"]
SEED = 3

# %%
import os, time

assert SEED != 4, "no fours"
time.sleep(60 if SEED == 5 else 0)
print(os.environ.get("LLMCOURSE_REPOSITORY"))
"""


def test_failing_cell_is_named_keeps_the_old_notebook_and_exits_with_1(tmp_path, capfd):
    lab = make_lab(tmp_path, TINY.replace("SEED = 3", "SEED = 4"))
    lab.notebook.write_text("{}")
    assert main_status(["execute", "--force", "--repository", str(tmp_path)]) == 1
    captured = capfd.readouterr()
    assert "0 of 1 labs are in order" in captured.out and "failed" in captured.out
    expected = f"lab 07_{SLUG}, cell 4: AssertionError: no fours; see labs/runs/07_{SLUG}.ipynb"
    assert expected in captured.err and lab.notebook.read_text() == "{}"
    kept = tmp_path / "labs" / "runs"
    assert "no fours" in (kept / lab.notebook.name).read_text() and (kept / ".gitignore").read_text() == "*\n"


def test_slow_cell_is_stopped(tmp_path):
    lab = make_lab(tmp_path, TINY.replace("SEED = 3", "SEED = 5"))
    with pytest.raises(LabError, match=f"lab 07_{SLUG}.*[Tt]ime"):
        execute(lab, cell_timeout=2, progress=False)
    assert not lab.notebook.exists()


def test_other_parameters_touch_nothing_stored(tmp_path):
    lab = make_lab(tmp_path, TINY)
    ran = execute(lab, {"SEED": 6}, progress=False)
    assert ran.metadata["llmcourse"]["seed"] == 6 and ran.cells[-1].outputs[0].text == "None\n"
    assert (tmp_path / "labs" / "runs" / lab.notebook.name).is_file() and not lab.notebook.exists()
    with pytest.raises(ValueError, match="no parameter 'SPEED': it has SEED"):
        execute(lab, {"SPEED": 5})


def main_status(arguments):
    try:
        main(arguments)
    except SystemExit as stop:
        return stop.code or 0
    return 0


def test_command_line_builds_shows_and_refuses(lab, capfd):
    where = ["--repository", str(lab.repository)]
    assert main_status(["build", *where]) == 0
    assert lab.notebook.is_file() and "built, not executed" in capfd.readouterr().out
    assert main_status(["status", *where]) == 0
    table = capfd.readouterr().out
    assert f"07_{SLUG}" in table and "never" in table
    assert main_status(["status", "--labs", "99", *where]) == 2
    assert capfd.readouterr().err == f"error: no lab '99': choose from 07_{SLUG}\n"
    lab.notebook.unlink()
    assert (
        main_status(["check", *where]) == 2
        and "has no notebook: run `make labs LABS=07`" in capfd.readouterr().err
    )
    assert (
        main_status(["execute", "--set", "SEED", *where]) == 2
        and "write NAME=VALUE" in capfd.readouterr().err
    )


def test_labs_are_found_by_number_slug_and_name(lab, monkeypatch):
    second = Lab(lab.repository, "11", "other_topic")
    second.source.write_text("")
    assert list_labs(lab.repository) == [lab, second]
    assert select_labs("", lab.repository) == [lab, second]
    assert select_labs(f"11, {SLUG}", lab.repository) == [lab, second]
    assert find_lab("11_other_topic", lab.repository) == second
    assert find_repository(lab.repository / "labs" / "src") == lab.repository
    assert find_repository(lab.repository.parent) != lab.repository
    monkeypatch.setenv("LLMCOURSE_REPOSITORY", str(lab.repository))
    assert find_repository() == lab.repository and find_lab("11") == second
    (lab.repository / "labs" / "src" / "notes.py").write_text("")
    with pytest.raises(ValueError, match="labs/src/notes.py: call it NN_slug.py"):
        list_labs(lab.repository)


def test_store_results_writes_only_for_the_repository(lab, monkeypatch, capsys):
    monkeypatch.delenv("LLMCOURSE_REPOSITORY", raising=False)
    assert store_results(SLUG, {"a": 1}) is None
    assert capsys.readouterr().out.count("\n") == 1
    monkeypatch.setenv("LLMCOURSE_REPOSITORY", str(lab.repository))
    with pytest.raises(ValueError, match=f"no results of lab 07_{SLUG}: run `make labs LABS=07` first"):
        load_results(SLUG)
    data = {
        "tensor": torch.ones(2, 3),
        "number": np.float32(0.5),
        "list": (1, torch.tensor(2)),
        3: None,
        "text": "µ",
    }
    assert store_results(f"07_{SLUG}", data) == lab.results
    assert load_results(SLUG) == {
        "tensor": [[1.0] * 3] * 2,
        "number": 0.5,
        "list": [1, 2],
        "3": None,
        "text": "µ",
    }
    for bad in ({"a": math.nan}, {"a": object()}):
        with pytest.raises(ValueError, match="cannot be stored"):
            store_results(SLUG, bad)
    assert load_results(SLUG)["number"] == 0.5 and os.listdir(lab.results.parent) == [lab.results.name]
    with pytest.raises(ValueError, match="no lab 'nothing'"):
        store_results("nothing", {})


def test_cleaning_a_large_figure_takes_no_time():
    from nbformat.v4 import new_code_cell, new_notebook, new_output

    picture = "x" * 2_000_000  # a figure as a data address: one word
    text = f"<img src={picture}> at /tmp/ipykernel_12/345.py"
    cell = new_code_cell(
        "1", outputs=[new_output("display_data", {"text/html": picture}), new_output("stream", text=text)]
    )
    clean(new_notebook(cells=[cell]), {})
    assert cell.outputs[0].data["text/html"] == picture
    assert cell.outputs[1].text == f"<img src={picture}> at cell.py"


def test_benchmarks_are_read_by_name_or_refused(tmp_path):
    with pytest.raises(ValueError, match="make bench"):
        load_benchmarks(tmp_path)
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    for name in ("b", "a"):
        (folder / f"{name}.json").write_text(json.dumps({"name": name}), encoding="utf-8")
    assert [one["name"] for one in load_benchmarks(tmp_path)] == ["a", "b"]


GOOD = [solution_metadata("a-x"), check_metadata("a-x-check", 2)]
BAD = [
    ({**GOOD[0], "extra": 1}, "unknown key 'extra'"),
    ({**GOOD[0], "schema_version": 2}, "schema_version=2 is not 3"),
    ({**GOOD[0], "solution": "true"}, "solution='true' is no boolean"),
    ({**GOOD[0], "grade_id": "a x"}, "grade_id='a x'"),
    ({**GOOD[0], "points": 1}, "points belong to graded cells"),
    ({**GOOD[1], "points": -1}, "points=-1"),
    ({key: value for key, value in GOOD[1].items() if key != "points"}, "points belong to graded cells"),
    ({key: value for key, value in GOOD[0].items() if key != "locked"}, "locked is missing"),
    (GOOD[1], "used twice"),
]


class _Cell:
    def __init__(self, metadata):
        self.metadata = {"nbgrader": metadata}


@pytest.mark.parametrize(("metadata", "problem"), BAD)
def test_nbgrader_rules_refuse_what_nbgrader_refuses(metadata, problem):
    assert metadata_problems([_Cell(one) for one in GOOD]) == []
    assert any(problem in found for found in metadata_problems([_Cell(GOOD[1]), _Cell(metadata)]))


def test_cleaning_shows_streams_as_a_terminal_does():
    from nbformat.v4 import new_code_cell, new_notebook, new_output

    outputs = [
        new_output(
            "stream", name="stderr", text="a: 10%|#  | 1/10 [00:01<00:09]\ra: 100%|###| 10/10 [00:10<00:00]\n"
        ),
        new_output("stream", name="stdout", text="one "),
        new_output("stream", name="stdout", text="two\rOne\nC:\n"),
        new_output("display_data", data={"application/vnd.jupyter.widget-view+json": {"model_id": "1"}}),
        new_output(
            "display_data", data={"text/plain": f"{sys.prefix}/lib {sys.prefix}x /tmp/ipykernel_12/345.py:3"}
        ),
    ]
    notebook = new_notebook(
        cells=[new_code_cell("", outputs=outputs)], metadata={"widgets": {}, "papermill": {}}
    )
    clean(notebook, {})
    kept = notebook.cells[0].outputs
    assert [output.output_type for output in kept] == ["stream", "display_data"]
    assert kept[0].text == "One\nC:\n" and dict(notebook.metadata) == {}
    assert kept[1].data["text/plain"].startswith("[python]/lib ") and kept[1].data["text/plain"].endswith(
        " cell.py:3"
    )
    assert f"{sys.prefix}x".replace(os.path.expanduser("~") + "/", "~/") in kept[1].data["text/plain"]


def test_progress_of_the_kernel_is_passed_on():
    class Bar:
        note, mininterval, refreshed = None, 1000, 0

        def set_postfix_str(self, note, refresh):
            self.note = note

        def refresh(self):
            self.refreshed += 1

    relay = ProgressRelay(Bar())
    relay.write("\rpretraining:  12%|#    | 12/100 [00:05<00:40, 2.3step/s, loss=2.1]")
    assert relay.bar.note == "pretraining 12%, 00:40 left"
    relay.write("no bar")
    assert relay.bar.note == "pretraining 12%, 00:40 left"
    relay.write("\rpretraining: 100%|#####| 100/100 [00:45<00:00, 2.3step/s]\n")
    assert relay.bar.refreshed == 1, "not more often than the bar's own interval"
    assert relay.bar.note == "" and BAR.search("50% of it") is None


def test_claims_are_read_from_what_was_printed():
    from nbformat.v4 import new_code_cell, new_notebook, new_output

    text = "[holds] a-1: first: claim\nnoise [holds] b: no\n[holds] c: third\n"
    cell = new_code_cell("", outputs=[new_output("stream", name="stdout", text=text)])
    assert [one["id"] for one in claims_of(new_notebook(cells=[cell]))] == ["a-1", "c"]
