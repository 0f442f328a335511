"""A student's result: the grade of the program, the marks of a person, and what the learning platform calls them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmcourse.grading.grades import Grade
from llmcourse.grading.manual import AUTOMATIC, Mark


@dataclass(frozen=True)
class Result:
    """Everything about one student's submission that a table or a page shows.

    Attributes:
        grade: what the program found.
        marks: what a person has to give, given or not.
        name: the student's, as the learning platform has it.
        ids: the platform's own ids, by platform: "canvas", "moodle", "gradescope".
        submitted: when, as the platform says.
    """

    grade: Grade
    marks: tuple[Mark, ...] = ()
    name: str = ""
    ids: Mapping[str, str] = field(default_factory=dict)
    submitted: str = ""

    @property
    def student(self) -> str:
        """The student's id."""
        return self.grade.student

    @property
    def automatic(self) -> float | None:
        """Points of the exercises; `None` while a person has to decide."""
        if self.grade.decided:
            return self.grade.points
        decisions = [mark.points for mark in self.marks if mark.question == AUTOMATIC]
        return decisions[0] if decisions else None

    @property
    def manual(self) -> float | None:
        """Points of the manual questions; `None` while one is not marked."""
        points = [mark.points for mark in self.marks if mark.question != AUTOMATIC]
        return None if any(value is None for value in points) else sum(points)

    @property
    def max_points(self) -> float:
        """Points of all exercises and manual questions."""
        return self.grade.max_points + sum(m.max_points for m in self.marks if m.question != AUTOMATIC)

    @property
    def total(self) -> float | None:
        """All points; `None` while anything is open, never a 0 in its place."""
        if self.automatic is None or self.manual is None:
            return None
        return self.automatic + self.manual

    @property
    def open(self) -> str:
        """Why there is no total yet, in a few words; nothing when there is one."""
        waiting = [f"{self.grade.verdict}: a person decides"] if self.automatic is None else []
        unmarked = sum(m.points is None for m in self.marks if m.question != AUTOMATIC)
        waiting += (
            [f"{unmarked} {'question' if unmarked == 1 else 'questions'} not marked"] if unmarked else []
        )
        return "; ".join(waiting)


def assemble(grades: Iterable[Grade], index: Mapping[str, Any], marks: Iterable[Mark]) -> list[Result]:
    """The results of a class, sorted by student.

    Args:
        grades: of all students.
        index: `submissions.json`.
        marks: see `manual.load_marks`.
    """
    by_student: dict[str, list[Mark]] = {}
    for mark in marks:
        by_student.setdefault(mark.student, []).append(mark)
    found = []
    for grade in sorted(grades, key=lambda grade: grade.student):
        record = index.get("students", {}).get(grade.student, {})
        ids = {str(name): str(value) for name, value in dict(record.get("ids", {})).items()}
        marked = tuple(by_student.get(grade.student, ()))
        texts = (str(record.get("name", "")), ids, str(record.get("submitted", "")))
        found.append(Result(grade, marked, *texts))
    return found
