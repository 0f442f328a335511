"""Marks that a person gives: a table to fill, and what is stored.

`marks.csv` in the report folder is the store, the local page (`marking_page`) and a filled sheet both write to it. A
mark carries a digest of the answer that it was given for, so that a later hand-in shows as not marked.

The question "automatic" stands for the points of a submission that the grader left to a person.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from llmcourse.durable import text_digest
from llmcourse.grading.grades import Grade
from llmcourse.grading.locking import locked
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
    key: AssignmentKey,
    grades: Iterable[Grade],
    written: Mapping[str, Mapping[str, str]],
    notebooks: Mapping[str, str] = MappingProxyType({}),
) -> list[Mark]:
    """All that a person has to mark, nothing marked yet.

    Args:
        key: the assignment, with its manual questions.
        grades: of all students; those whose points are not decided get the question "automatic".
        written: student -> grade_id -> text of the answer.
        notebooks: student -> digest of the file, for those whose points are not decided: a decision is about this file.
    """
    found = []
    for grade in grades:
        if not grade.decided:
            title = f"Points of the exercises ({grade.verdict}: {one_line(grade.note)})"
            file = notebooks.get(grade.student, "")
            digest = _digest(f"{grade.verdict}{grade.note}{grade.points}{file}")
            found.append(Mark(grade.student, AUTOMATIC, title, grade.max_points, answer=digest))
        for question in key.manifest.manual:
            text = written.get(grade.student, {}).get(question.grade_id, "")
            digest = _digest(text)
            found.append(
                Mark(grade.student, question.grade_id, question.title, question.points, answer=digest)
            )
    return found


def files_to_decide(submissions: Path, assignment: str, grades: Iterable[Grade]) -> dict[str, str]:
    """Digest of the notebook of each student whose points are not decided, as far as it can be read."""
    from llmcourse.grading.station import read_notebook

    found = {}
    for grade in grades:
        if not grade.decided:
            with contextlib.suppress(OSError, ValueError):
                data = read_notebook(submissions / grade.student / f"{assignment}.ipynb")
                found[grade.student] = hashlib.sha256(data).hexdigest()
    return found


def _digest(text: str) -> str:
    """A short digest that no spreadsheet takes for a number."""
    return f"a-{text_digest(text)[:16]}"


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
        table.writerow([*map(cell, row), cell(mark.comment, lines=True), mark.answer])
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
        # only the delimiter: what else the sniffer thinks of a header is wrong for texts with quotation marks
        delimiter = csv.Sniffer().sniff(text.split("\n", 1)[0], delimiters=",;\t").delimiter
        rows = list(csv.DictReader(io.StringIO(text), delimiter=delimiter))
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


def _locked(report: Path) -> AbstractContextManager[None]:
    """The marks for this process alone: the page, a second page and `--merge` may all write them."""
    report.mkdir(parents=True, exist_ok=True)
    busy = f"another program writes the marks of {report}: try again when it is done"
    return locked(report / ".marks.lock", 10, busy)


def store(report: Path, marks: Iterable[Mark], changed: Mark) -> list[Mark]:
    """Store one mark, given or taken back, beside what others have stored meanwhile; returns all marks.

    Args:
        report: the report folder.
        marks: all marks as they stood.
        changed: the mark as it shall be.
    """
    place = (changed.student, changed.question)
    with _locked(report):
        current = [
            changed if (mark.student, mark.question) == place else mark for mark in load_marks(report, marks)
        ]
        write_sheet(report / MARKS, current)
    return current


def merge(report: Path, marks: Iterable[Mark], filled: Iterable[Mark]) -> int:
    """Take over a filled sheet's points and comments, and store all marks.

    Args:
        report: the report folder.
        marks: all marks as they stood; what others have stored meanwhile is kept.
        filled: rows of the sheet; rows without points change nothing.

    Returns:
        The number of marks taken over.

    Raises:
        ValueError: a row is of an unknown student or question, or of an answer that has changed; nothing is stored.
    """
    with _locked(report):
        known = {(mark.student, mark.question): mark for mark in load_marks(report, marks)}
        taken = _take_over(known, filled)
        write_sheet(report / MARKS, known.values())
    return taken


def _take_over(known: dict[tuple[str, str], Mark], filled: Iterable[Mark]) -> int:
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
    return taken
