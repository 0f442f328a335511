"""Results in nbgrader's own database, for those who go on in its formgrader; needs nbgrader itself."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcourse.durable import sync
from llmcourse.grading.manual import AUTOMATIC
from llmcourse.grading.reports.results import Result
from llmcourse.grading.reports.text import one_line

if TYPE_CHECKING:
    from llmcourse.grading.manifest import AssignmentKey


def write_gradebook(path: Path, key: AssignmentKey, results: Sequence[Result]) -> Path:
    """Write a new `gradebook.db` with the class's points; an older file is replaced when the new one is whole.

    Submissions that wait for a person's decision are left out, which nbgrader shows as not submitted.

    Args:
        path: the database.
        key: the assignment.
        results: of the class.

    Raises:
        ValueError: nbgrader is not installed.
    """
    try:
        from nbgrader.api import Gradebook
    except ImportError:
        raise ValueError(
            "the format nbgrader needs nbgrader, which is not installed: `pip install nbgrader`, or choose csv"
        ) from None
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        with _own_programs(), Gradebook(f"sqlite:///{temporary}") as gradebook:
            _add_assignment(gradebook, key, results)
            for result in results:
                if result.automatic is not None:
                    _add_submission(gradebook, key, result)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
    return path


@contextlib.contextmanager
def _own_programs() -> Iterator[None]:
    """The programs beside this Python can be found: nbgrader calls `alembic`, also where nobody activated them."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{before}"
    try:
        yield
    finally:
        os.environ["PATH"] = before


def check_id(exercise: str) -> str:
    """nbgrader's id of the check cell of an exercise: "peft/merge" -> "peft-merge-check"."""
    return f"{exercise.replace('/', '-')}-check"


def _add_assignment(gradebook: Any, key: AssignmentKey, results: Sequence[Result]) -> None:
    gradebook.update_or_create_assignment(key.name)
    notebook = (key.name, key.name)
    gradebook.update_or_create_notebook(*notebook)
    # submitted files are no exercise of the release
    worth = {item.exercise: item.max_points for result in results for item in result.grade.items}
    for exercise, points in (worth | dict(key.manifest.points)).items():
        gradebook.update_or_create_grade_cell(
            check_id(exercise), *notebook, max_score=points, cell_type="code"
        )
    for question in key.manifest.manual:
        gradebook.update_or_create_grade_cell(
            question.grade_id, *notebook, max_score=question.points, cell_type="markdown"
        )


def _add_submission(gradebook: Any, key: AssignmentKey, result: Result) -> None:
    gradebook.update_or_create_student(result.student, last_name=one_line(result.name) or None)
    gradebook.update_or_create_submission(key.name, result.student)
    earned = {check_id(item.exercise): item.points for item in result.grade.items}
    decided = next((mark for mark in result.marks if mark.question == AUTOMATIC), None)
    for name, points in earned.items():
        grade = gradebook.find_grade(name, key.name, key.name, result.student)
        grade.auto_score = points
    if decided is not None and earned:
        # a person's total has no cells of its own: the difference goes to the first exercise as extra credit
        first = gradebook.find_grade(next(iter(earned)), key.name, key.name, result.student)
        first.extra_credit = (decided.points or 0.0) - sum(earned.values())
    for mark in result.marks:
        if mark.question != AUTOMATIC:
            grade = gradebook.find_grade(mark.question, key.name, key.name, result.student)
            grade.manual_score = mark.points
            grade.needs_manual_grade = mark.points is None
    gradebook.db.commit()
