"""The notebook that students get: a lab without outputs and solutions, with its own points, questions and release."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcourse.labs.nbgrader import SCHEMA_VERSION, metadata_problems

if TYPE_CHECKING:
    from nbformat import NotebookNode

    from llmcourse.labs.repository import Lab

SOLUTION = re.compile(r"[ \t]*<details>\s*<summary>Solution</summary>(.*?)</details>[ \t]*\n?", re.S)
FENCE = re.compile(r"```python\n(.*?)```", re.S)
REPLY = "*Write your answer in this cell, in place of this line.*"


@dataclass(frozen=True)
class Question:
    """A question that a person grades.

    Attributes:
        id: letters, digits, `_` and `-`; its reply's grade_id is "<slug>-<id>".
        after: the heading below which, or the grade_id of the cell behind which it stands.
        text: Markdown.
        points: above 0.
    """

    id: str
    after: str
    text: str
    points: float

    @property
    def title(self) -> str:
        """Its first line, in at most 80 characters."""
        return re.sub(r"[#*`]", "", self.text.strip().splitlines()[0]).strip()[:80]


def read_questions(path: Path) -> dict[str, list[Question]]:
    """The questions of a YAML file: {lab: [{id, after, text, points}]}.

    Raises:
        ValueError: it is no such file; the message says where.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())[:120]})") from None
    return make_questions(content, str(path))


def make_questions(content: Any, where: str) -> dict[str, list[Question]]:
    """The questions of such data.

    Raises:
        ValueError: it is something else, an id is used twice, or points are not above 0.
    """
    if not isinstance(content, Mapping) or not all(isinstance(items, Sequence) for items in content.values()):
        raise ValueError(f"{where}: write for each lab a list of questions with id, after, text and points")
    found: dict[str, list[Question]] = {}
    for lab, items in content.items():
        for number, item in enumerate(items, 1):
            place = f"{where}: question {number} of {lab}"
            if not isinstance(item, Mapping) or set(item) != {"id", "after", "text", "points"}:
                raise ValueError(f"{place}: give it id, after, text and points, and nothing else")
            if not re.fullmatch(r"[A-Za-z0-9_-]+", str(item["id"])):
                raise ValueError(f"{place}: id {item['id']!r} must be letters, digits, _ and -")
            points = item["points"]
            if (
                isinstance(points, bool)
                or not isinstance(points, int | float)
                or not 0 < points < float("inf")
            ):
                raise ValueError(f"{place}: points={points!r} must be a number above 0")
            if not str(item["text"]).strip():
                raise ValueError(f"{place}: it has no text")
            question = Question(str(item["id"]), str(item["after"]), str(item["text"]).strip(), points)
            if any(question.id == other.id for other in found.get(str(lab), [])):
                raise ValueError(f"{place}: the id {question.id!r} is used twice")
            found.setdefault(str(lab), []).append(question)
    return found


def model_solutions(notebook: NotebookNode, lab: Lab) -> dict[str, str]:
    """The model solution of each exercise, from the text between its check cell and the next exercise.

    Raises:
        ValueError: an exercise has none.
    """
    found: dict[str, str] = {}
    waiting = None
    for cell in notebook.cells:
        metadata = cell.metadata.get("nbgrader", {})
        if metadata.get("grade"):
            waiting = metadata["grade_id"].removesuffix("-check").replace("-", "/", 1)
        elif cell.cell_type == "markdown" and waiting:
            for block in SOLUTION.findall(cell.source):
                fence = FENCE.search(block)
                if fence and waiting:
                    found[waiting], waiting = fence[1].rstrip(), None
    missing = [name for name in answers(notebook, lab) if name not in found]
    if missing:
        raise ValueError(
            f"labs/src/{lab.source.name}: {missing[0]} has no model solution: write one in "
            "<details><summary>Solution</summary> below its check, as ```python"
        )
    return found


def answers(notebook: NotebookNode, lab: Lab) -> dict[str, str]:
    """The name of each exercise's answer in the notebook, from its check cell `check("slug/id", name)`.

    Raises:
        ValueError: a check cell is something else, or there is none.
    """
    found = {}
    for cell in notebook.cells:
        metadata = cell.metadata.get("nbgrader", {})
        if not metadata.get("grade") or metadata.get("solution"):
            continue
        statements = ast.parse(cell.source).body
        call = statements[0].value if len(statements) == 1 and isinstance(statements[0], ast.Expr) else None
        arguments = call.args if isinstance(call, ast.Call) and ast.unparse(call.func) == "check" else []
        name = metadata["grade_id"].removesuffix("-check").replace("-", "/", 1)
        if (
            len(arguments) != 2
            or not isinstance(arguments[1], ast.Name)
            or getattr(arguments[0], "value", None) != name
        ):
            raise ValueError(
                f'labs/src/{lab.source.name}: the check of {name} must be `check("{name}", my_answer)` and no more'
            )
        found[name] = arguments[1].id
    if not found:
        raise ValueError(f"labs/src/{lab.source.name}: it has no exercise to grade")
    return found


def hand_out(
    notebook: NotebookNode,
    lab: Lab,
    *,
    points: Mapping[str, float],
    questions: Iterable[Question] = (),
    solutions: bool = False,
) -> None:
    """Turn a built lab, in place, into what students get.

    Args:
        notebook: the lab as built from its source, not executed.
        lab: which lab.
        points: of each exercise.
        questions: to insert; each gets a locked cell and a cell for the reply, which a person grades.
        solutions: leave the model solutions in the text.

    Raises:
        ValueError: a stub is no stub, or a question has no place.
    """
    from nbformat import validate

    for cell in notebook.cells:
        metadata = cell.metadata.get("nbgrader", {})
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        if metadata.get("solution") and "raise NotImplementedError" not in cell.source:
            raise ValueError(
                f"labs/src/{lab.source.name}: {metadata['grade_id']} would give its answer away: "
                "its cell must `raise NotImplementedError`"
            )
        if metadata.get("grade"):
            name = metadata["grade_id"].removesuffix("-check").replace("-", "/", 1)
            metadata["points"] = points[name]
        if metadata:
            _protect(cell, locked=bool(metadata["locked"]))
        if cell.cell_type == "markdown" and not solutions:
            cell.source = SOLUTION.sub("", cell.source).strip("\n")
    notebook.cells = [cell for cell in notebook.cells if cell.source.strip()]
    for question in reversed(list(questions)):  # each goes directly behind its place
        _insert(notebook, lab, question)
    problems = metadata_problems(notebook.cells)
    if problems:
        raise ValueError(f"labs/src/{lab.source.name}: {problems[0]}")
    validate(notebook)


def _protect(cell: Any, locked: bool) -> None:
    """What an editor may do with a cell, in Jupyter's own words: none is deleted, a locked one is not edited."""
    cell.metadata["deletable"] = False
    cell.metadata["editable"] = not locked


def _insert(notebook: NotebookNode, lab: Lab, question: Question) -> None:
    from nbformat.v4 import new_markdown_cell

    grade_id = f"{lab.slug}-{question.id}"
    common = {"schema_version": SCHEMA_VERSION, "task": False}
    asked = new_markdown_cell(
        f"**Question** ({question.points:g} points). {question.text}",
        id=f"{grade_id}-text"[:64],
        metadata={
            "nbgrader": {
                **common,
                "grade": False,
                "grade_id": f"{grade_id}-text",
                "locked": True,
                "solution": False,
            }
        },
    )
    reply = new_markdown_cell(
        REPLY,
        id=grade_id[:64],
        metadata={
            "nbgrader": {
                **common,
                "grade": True,
                "grade_id": grade_id,
                "locked": False,
                "points": question.points,
                "solution": True,
            }
        },
    )
    _protect(asked, locked=True)
    _protect(reply, locked=False)
    at = _place(notebook, lab, question)
    notebook.cells[at:at] = [asked, reply]


def _place(notebook: NotebookNode, lab: Lab, question: Question) -> int:
    """The position at which a question goes in: behind its exercise's check, its cell, or its heading."""
    by_id = {cell.metadata.get("nbgrader", {}).get("grade_id"): at for at, cell in enumerate(notebook.cells)}
    for grade_id in (f"{question.after}-check", question.after):
        if grade_id in by_id:
            return by_id[grade_id] + 1
    heading = re.compile(rf"^#+ +{re.escape(question.after.strip('# '))}\s*$", re.M)
    for at, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown" and heading.search(cell.source):
            return at + 1
    raise ValueError(
        f"question {question.id!r} of {lab.name}: no heading and no grade_id {question.after!r}; "
        "write a heading as it stands in the lab, or a grade_id such as "
        f"{next(name for name in by_id if name)!r}"
    )
