"""Grades, results and hand-ins made up for the tests of what comes after the jail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmcourse.grading.grades import Grade, Item
from llmcourse.grading.manifest import AssignmentKey, Key
from llmcourse.grading.manual import open_marks
from llmcourse.grading.reports.results import Result, assemble
from llmcourse.grading.verdicts import Finding, Verdict


def make_grade(
    key: AssignmentKey,
    student: str,
    right: int = 1,
    verdict: Verdict = Verdict.GRADED,
    findings: tuple[Finding, ...] = (),
    note: str = "",
) -> Grade:
    """A grade with the first `right` exercises correct, the next wrong with a known mistake, the others missing."""
    items = []
    for number, (name, points) in enumerate(key.manifest.points.items()):
        status = "correct" if number < right else "wrong" if number == right else "not answered"
        message = {"correct": "Correct.", "wrong": "You seem to add.", "not answered": "Not answered."}[
            status
        ]
        earned = points if status == "correct" else 0
        mutant = "sum" if status == "wrong" else None
        items.append(
            Item(name, key.manifest.titles[name], earned, points, status, message, mutant, "inputs: 17")
        )
    total, most = sum(item.points for item in items), sum(item.max_points for item in items)
    return Grade(student, key.name, verdict, total, most, tuple(items), findings, note)


def make_results(
    key: AssignmentKey, grades: list[Grade], people: dict[str, Any] | None = None, written: Any = None
) -> list[Result]:
    """The results of grades, nothing marked."""
    marks = open_marks(key, grades, written or {})
    return assemble(grades, {"students": people or {}}, marks)


def write_hand_ins(
    folder: Path, key: AssignmentKey, notebooks: dict[str, Any], people: dict[str, Any] | None = None
) -> Path:
    """A folder as `collect` writes it; notebooks are bytes or JSON data."""
    for student, notebook in notebooks.items():
        path = folder / student / f"{key.name}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(notebook if isinstance(notebook, bytes) else json.dumps(notebook).encode())
    students = {student: {"name": f"name of {student}", "ids": {}} for student in notebooks} | (people or {})
    index = {"version": 1, "assignment": key.name, "students": students}
    (folder / "submissions.json").write_text(json.dumps(index))
    return folder


def write_key(folder: Path, key: AssignmentKey) -> Path:
    """A key folder that holds one assignment's key."""
    Key.create(folder, key.secret).save(key)
    return folder
