"""The fixed anatomy of labs and pages, as functions from a text to what it lacks.

Readers find the same things in the same places in every chapter; an author finds here what a new one must have.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nbformat import NotebookNode

LAB_TABLE = ("Chapter", "Hardware", "Minutes", "You will build", "What to inspect")
LAB_START = ("Setup", "Objectives")
LAB_END = ("The same with the library", "Measured results", "Break it", "Takeaways", "Next")
PAGE = (
    "At a glance",
    "Intuition",
    "Theory",
    "In code",
    "Worked example",
    "Evidence",
    "Failure modes",
    "In practice",
    "Check yourself",
    "Exercises",
    "Key takeaways",
    "Further reading",
)
GLANCE = ("objectives", "prerequisites", "difficulty", "hours", "lab", "hardware")
PROSE_DIRECTIVES = {
    "exercise",
    "solution",
    "admonition",
    "dropdown",
    "note",
    "tip",
    "warning",
    "important",
    "figure",
}
PARAMETERS = {"PRESET", "CORPUS", "SEED"}
SECTIONS, EXERCISES, WORDS = (3, 5), 5, (2000, 4000)
MAX_SECONDS, MAX_PEAK_BYTES, MAX_OUTPUT_BYTES = 180, 4 * 2**30, 1_000_000
ROLE = re.compile(r"\{[a-z][a-z:_-]*\}`|^\s*(?:```+|:::+|~~~+)\s*\{[a-z]", re.M)
CLAIM_MARK = "# NBVAL_CHECK_OUTPUT"


def lab_problems(notebook: NotebookNode) -> list[str]:
    """What a lab's notebook (executed or not) lacks of the fixed anatomy; empty when it is complete."""
    text = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [
        *_lab_headings(text),
        *_plain_markdown(text),
        *_top(notebook.cells[0].source if notebook.cells else ""),
        *_parameters(code),
        *_exercises(notebook.cells),
        *_claims(notebook.cells),
        *_figures(code),
    ]


def budget_problems(notebook: NotebookNode) -> list[str]:
    """Where an executed lab exceeds what a lab may cost on two cores, or lacks the record of it."""
    cost = notebook.metadata.get("llmcourse")
    if cost is None:
        return ["it was never executed"]
    size = len(json.dumps([cell.get("outputs", []) for cell in notebook.cells]).encode())
    return [
        *_above("seconds", cost["seconds"], MAX_SECONDS),
        *_above("peak_bytes", cost["peak_bytes"], MAX_PEAK_BYTES),
        *_above("bytes of outputs", size, MAX_OUTPUT_BYTES),
        *([] if cost["claims"] else ["it states no claim"]),
        *[f"claim {claim['id']!r} does not hold" for claim in cost["claims"] if not claim["held"]],
    ]


def page_problems(text: str) -> list[str]:
    """What a chapter's page lacks of the fixed anatomy; empty when it is complete."""
    prose = prose_of(text)
    sections = _sections(text)
    titles = [next((name for name in PAGE if title.startswith(name)), title) for title in sections]
    problems = [] if titles == list(PAGE) else [f"headings are {titles}, expected {list(PAGE)}"]
    words = len(prose.split())
    if not WORDS[0] <= words <= WORDS[1]:
        problems.append(f"{words} words of prose, expected {WORDS[0]} to {WORDS[1]}")
    if len(re.findall(r"^# ", prose, re.M)) != 1:
        problems.append("it needs one title '# ...'")
    by_name = dict(zip(titles, sections.values(), strict=True))
    glance = by_name.get("At a glance", "").lower()
    problems += [f"'At a glance' does not say: {item}" for item in GLANCE if item not in glance]
    theory = by_name.get("Theory", "")
    if not re.search(r"\{math\}.*\n:label:|^\$\$\s*\(\S+\)$", theory, re.M):
        problems.append("'Theory' has no numbered equation")
    if "{literalinclude} ../../llmcourse/" not in by_name.get("In code", ""):
        problems.append("'In code' shows no code of the package ({literalinclude} ../../llmcourse/...)")
    if _hidden(by_name.get("Check yourself", "")) < 1:
        problems.append("'Check yourself' has no hidden answer")
    if (hidden := _hidden(by_name.get("Exercises", ""))) < 3:
        problems.append(f"'Exercises' has {hidden} hidden solutions, expected at least 3")
    if not re.search(r"\{cite", by_name.get("Further reading", "")):
        problems.append("'Further reading' cites nothing")
    return problems


def prose_of(text: str) -> str:
    """A page's text without front matter, code, formulas, comments and directives' options."""
    text = re.sub(r"\A---\n.*?\n---\n|\$\$.*?\$\$|<!--.*?-->", "", text, flags=re.S)
    kept, open_fences = [], []
    for line in text.splitlines():
        fence = re.match(r"\s*(`{3,}|:{3,})\s*(?:\{([\w-]+)\})?", line)
        if fence and open_fences and line.strip() == open_fences[-1][0]:
            open_fences.pop()
        elif fence:
            open_fences.append((fence[1], fence[2] in PROSE_DIRECTIVES))
        elif all(is_prose for _, is_prose in open_fences) and not re.match(r"\s*:[\w-]+:", line):
            kept.append(line)
    return "\n".join(kept)


def code_shown(text: str) -> list[str]:
    """The files of the package that a page shows, relative to the repository."""
    return re.findall(r"\{literalinclude\} \.\./\.\./(llmcourse/\S+)", text)


def _sections(text: str) -> dict[str, str]:
    """Text below each second-level heading, code blocks' own '##' lines aside."""
    sections: dict[str, str] = {}
    title, fence = None, None
    for line in text.splitlines():
        mark = re.match(r"(`{3,})", line)
        if mark:
            fence = mark[1] if fence is None else (None if line.strip() == fence else fence)
        if fence is None and (match := re.match(r"## +(.*)", line)):
            title = match[1].strip()
            sections[title] = ""
        elif title is not None:
            sections[title] += line + "\n"
    return sections


def _hidden(text: str) -> int:
    dropdowns = re.findall(r"\{dropdown\}|:class:.*\bdropdown\b|<details>", text)
    return len(dropdowns)


def _lab_headings(text: Sequence[str]) -> list[str]:
    found = re.findall(r"^## +(.*?)\s*$", "\n".join(text), re.M)
    middle = found[len(LAB_START) : len(found) - len(LAB_END)]
    problems = []
    if tuple(found[: len(LAB_START)]) != LAB_START or tuple(found[-len(LAB_END) :]) != LAB_END:
        problems.append(
            f"headings are {found}, expected {list(LAB_START)}, numbered sections, {list(LAB_END)}"
        )
    elif not SECTIONS[0] <= len(middle) <= SECTIONS[1]:
        problems.append(f"{len(middle)} numbered sections, expected {SECTIONS[0]} to {SECTIONS[1]}")
    problems += [
        f"section {title!r}: its heading must begin with '{number}. '"
        for number, title in enumerate(middle, 1)
        if not title.startswith(f"{number}. ")
    ]
    return problems


def _plain_markdown(text: Sequence[str]) -> list[str]:
    roles = [match[0].strip() for part in text for match in ROLE.finditer(part)]
    problems = [f"{role!r} is MyST and does not render in Colab" for role in roles]
    images = [match[0] for part in text for match in re.finditer(r"!\[\s*\]\(", part)]
    images += [
        match[0] for part in text for match in re.finditer(r"<img(?![^>]*\balt=\"[^\"]+\")[^>]*>", part)
    ]
    return problems + [f"image without alt text: {image}" for image in images]


def _top(first: str) -> list[str]:
    problems = [] if first.startswith("# ") else ["the first cell must begin with the title '# ...'"]
    problems += [
        f"the table at the top has no row or column {item!r}" for item in LAB_TABLE if f"{item}" not in first
    ]
    return problems if "|" in first else [*problems, "the first cell has no table"]


def _parameters(code: Sequence[Any]) -> list[str]:
    cell = next((cell for cell in code if "parameters" in cell.metadata.get("tags", [])), None)
    names = set(re.findall(r"^(\w+) *(?::[^=]*)?=", cell.source, re.M)) if cell else set()
    return [f"the parameters cell does not set {name}" for name in sorted(PARAMETERS - names)]


def _exercises(cells: Sequence[Any]) -> list[str]:
    problems, stubs = [], 0
    for i, cell in enumerate(cells):
        metadata = cell.metadata.get("nbgrader", {})
        following = cells[i + 1] if i + 1 < len(cells) else None
        if metadata.get("solution"):
            stubs += 1
            expected = f"{metadata['grade_id']}-check"
            if following is None or following.metadata.get("nbgrader", {}).get("grade_id") != expected:
                problems.append(f"exercise {metadata['grade_id']!r}: its check cell must follow directly")
            if "raise NotImplementedError" not in cell.source:
                problems.append(f"exercise {metadata['grade_id']!r}: its stub must raise NotImplementedError")
        elif metadata.get("grade") and "check(" not in cell.source:
            problems.append(f"{metadata['grade_id']!r}: a check cell must call check(...)")
    if stubs < EXERCISES:
        problems.append(f"{stubs} exercises, expected at least {EXERCISES}")
    hints = sum(cell.source.count("<details>") for cell in cells if cell.cell_type == "markdown")
    if hints < stubs:
        problems.append(f"{hints} hints in <details> for {stubs} exercises")
    return problems


def _claims(cells: Sequence[Any]) -> list[str]:
    heading, problems, found = "", [], 0
    for cell in cells:
        if cell.cell_type == "markdown":
            heading = (re.findall(r"^## +(.*?)\s*$", cell.source, re.M) or [heading])[-1]
        elif re.search(r"^\s*claim\(", cell.source, re.M):
            found += heading == "Measured results"
            if CLAIM_MARK not in cell.source:
                problems.append(f"a cell that claims must begin with {CLAIM_MARK!r}: {cell.source[:60]!r}")
    return problems if found else [*problems, "'Measured results' claims nothing"]


def _figures(code: Sequence[Any]) -> list[str]:
    problems = []
    for cell in code:
        plain = "\n".join(
            line for line in cell.source.splitlines() if not line.lstrip().startswith(("%", "!"))
        )
        tree = ast.parse(plain) if "setup" not in cell.metadata.get("tags", []) else ast.Module([], [])
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "show":
                alt = [keyword for keyword in node.keywords if keyword.arg == "alt"]
                if not alt or (
                    isinstance(alt[0].value, ast.Constant) and not str(alt[0].value.value).strip()
                ):
                    problems.append(f"show(...) without alt text: {ast.unparse(node)[:60]}")
        problems += _stored_figures(cell)
    return problems


def _stored_figures(cell: Any) -> list[str]:
    problems = []
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        html = "".join(data.get("text/html", "")) + "".join(data.get("text/markdown", ""))
        if any(kind.startswith("image/") for kind in data) and "text/html" not in data:
            problems.append("a stored figure has no alt text: show it with plotting.show(fig, alt=...)")
        if re.search(r"<img(?![^>]*\balt=\"[^\"]+\")", html):
            problems.append("a stored image has no alt text")
    return problems


def _above(what: str, value: float, limit: float) -> list[str]:
    return [f"{what}: {value} is above {limit}"] if value > limit else []
