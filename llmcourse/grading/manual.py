"""Marks that a person gives: a table to fill, and what is stored.

`marks.csv` in the report folder is the store, the local page (`marking_page`) and a filled sheet both write to it. A
mark carries a digest of the answer that it was given for, so that a later hand-in shows as not marked.

The question "automatic" stands for the points of a submission that the grader left to a person.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llmcourse.durable import text_digest
from llmcourse.grading.grades import Grade
from llmcourse.grading.reports.text import cell, number, one_line
from llmcourse.labs.results import write_atomically

if TYPE_CHECKING:
    from llmcourse.grading.manifest import AssignmentKey

MARKS = "marks.csv"
AUTOMATIC = "automatic"
COLUMNS = ("student", "question", "title", "max_points", "points", "comment", "answer")
MAX_SHEET = 20 << 20


@dataclass(frozen=True)
class Mark:
    """One question of one student.

    Attributes:
        student, question: ids; `title` is the question's.
        max_points: what it is worth.
        points: given, `None` while it is not marked.
        comment: for the student.
        answer: digest of the answer that is or was marked.
    """

    student: str
    question: str
    title: str
    max_points: float
    points: float | None = None
    comment: str = ""
    answer: str = ""


def open_marks(
    key: AssignmentKey, grades: Iterable[Grade], written: Mapping[str, Mapping[str, str]]
) -> list[Mark]:
    """All that a person has to mark, nothing marked yet.

    Args:
        key: the assignment, with its manual questions.
        grades: of all students; those whose points are not decided get the question "automatic".
        written: student -> grade_id -> text of the answer.
    """
    found = []
    for grade in grades:
        if not grade.decided:
            title = f"Points of the exercises ({grade.verdict}: {one_line(grade.note)})"
            digest = text_digest(f"{grade.verdict}{grade.note}{grade.points}")[:16]
            found.append(Mark(grade.student, AUTOMATIC, title, grade.max_points, answer=digest))
        for question in key.manifest.manual:
            text = written.get(grade.student, {}).get(question.grade_id, "")
            digest = text_digest(text)[:16]
            found.append(
                Mark(grade.student, question.grade_id, question.title, question.points, answer=digest)
            )
    return found


def load_marks(report: Path, expected: Iterable[Mark]) -> list[Mark]:
    """The expected marks with what `marks.csv` says about them; a mark of another answer does not count.

    Raises:
        ValueError: the file is damaged.
    """
    path = report / MARKS
    stored = {}
    if path.exists():
        stored = {(mark.student, mark.question): mark for mark in read_sheet(path)}
    found = []
    for mark in expected:
        old = stored.get((mark.student, mark.question))
        if old is not None and old.answer == mark.answer:
            mark = replace(mark, points=old.points, comment=old.comment)
        found.append(mark)
    return found


def write_sheet(path: Path, marks: Iterable[Mark]) -> None:
    """Write marks as a table that a spreadsheet opens and `merge` takes back."""
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(COLUMNS)
    for mark in sorted(marks, key=lambda mark: (mark.question, mark.student)):
        row = (mark.student, mark.question, mark.title, number(mark.max_points), number(mark.points))
        table.writerow([cell(value) for value in (*row, mark.comment, mark.answer)])
    write_atomically(path, out.getvalue())


def read_sheet(path: Path) -> list[Mark]:
    """The marks of a table.

    Raises:
        ValueError: it is no such table, or a line of it is wrong; the message names the line.
    """
    if not path.is_file():
        raise ValueError(f"no file {path}: `llmcourse mark --sheet {path}` writes one to fill")
    if path.stat().st_size > MAX_SHEET:
        raise ValueError(f"{path} is too large for a sheet of marks")
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets put a byte order mark in front
        dialect = csv.Sniffer().sniff(text.split("\n", 1)[0], delimiters=",;\t")
        rows = list(csv.DictReader(io.StringIO(text), dialect=dialect))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no table in UTF-8 ({error}): save the sheet as CSV") from None
    missing = {"student", "question", "max_points", "points", "answer"} - set(rows[0] if rows else COLUMNS)
    if missing:
        raise ValueError(f"{path} lacks the columns {', '.join(sorted(missing))}: keep the sheet's header")
    return [_mark(row, f"{path}, line {line}") for line, row in enumerate(rows, 2)]


def _mark(row: Mapping[str, str | None], where: str) -> Mark:
    values = {name: (row.get(name) or "").strip() for name in COLUMNS}
    texts = {name: _plain(values[name]) for name in ("student", "question", "title", "comment", "answer")}
    max_points = _number(values["max_points"], where, "max_points")
    points = _number(values["points"], where, "points") if values["points"] else None
    if points is not None and not 0 <= points <= max_points:
        raise ValueError(f"{where}: points {points:g} must lie between 0 and {max_points:g}")
    return Mark(**texts, max_points=max_points, points=points)


def _plain(text: str) -> str:
    """A cell's text without the mark that kept a spreadsheet from taking it for a formula."""
    return text[1:] if text[:1] == "'" and text[1:2] in ("=", "+", "-", "@") else text


def _number(text: str, where: str, what: str) -> float:
    try:
        value = float(text.replace(",", "."))
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{where}: {what} {one_line(text, 40)!r} is no number")
    return value


def merge(report: Path, marks: Iterable[Mark], filled: Iterable[Mark]) -> int:
    """Take over a filled sheet's points and comments, and store all marks.

    Args:
        report: the report folder.
        marks: all marks as they stand.
        filled: rows of the sheet; rows without points change nothing.

    Returns:
        The number of marks taken over.

    Raises:
        ValueError: a row is of an unknown student or question, or of an answer that has changed; nothing is stored.
    """
    known = {(mark.student, mark.question): mark for mark in marks}
    taken = 0
    for row in filled:
        place = (row.student, row.question)
        if place not in known:
            raise ValueError(
                f"the sheet has {one_line(row.question, 60)!r} of student {one_line(row.student, 60)!r}, which nobody "
                "has to mark: write a new sheet"
            )
        if row.points is None:
            continue
        mark = known[place]
        if row.answer != mark.answer:
            raise ValueError(
                f"student {mark.student} changed the answer to {mark.question} since the sheet was written: write a "
                "new sheet"
            )
        if row.points > mark.max_points:
            raise ValueError(
                f"{mark.question} of {mark.student}: points {row.points:g} are more than {mark.max_points:g}"
            )
        known[place] = replace(mark, points=row.points, comment=row.comment)
        taken += 1
    write_sheet(report / MARKS, known.values())
    return taken
