"""From what a learning platform gives out to one folder a student.

A notebook says itself which assignment it is; its file name and its time stamps are the student's and mean nothing.
Who handed it in, and when, is what the platform says. What is left out is listed with its reason.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmcourse.grading.incoming import Incoming, Refused, opened, printable
from llmcourse.grading.layouts import Handed, find_layout
from llmcourse.grading.manifest import Key
from llmcourse.grading.notebook_file import MAX_BYTES, Malformed, read_notebook
from llmcourse.labs.results import write_atomically, write_bytes_atomically

VERSION = 1
RECORD = "submissions.json"
SUPPORT = {".json", ".jsonl", ".csv", ".tsv", ".txt", ".md", ".png", ".svg", ".safetensors"}
"""kinds of files that are kept beside a notebook; code and pickles are not"""
MAX_SUPPORT_FILES, MAX_SUPPORT_BYTES, MAX_NOTEBOOKS = 100, 256_000_000, 20


@dataclass
class Student:
    """What was collected from a student.

    Attributes:
        id: the folder's name.
        name: as the platform says.
        ids: platform -> id, for the export of grades.
        submitted: as the platform says; "" where it says nothing.
        notebook: path of the notebook in the source; `None` when there is none.
        kept: the support files that were kept.
        ignored: what was left out.
        problem: why there is no notebook, in one line.
    """

    id: str
    name: str = ""
    ids: dict[str, str] = field(default_factory=dict)
    submitted: str = ""
    notebook: str | None = None
    kept: list[str] = field(default_factory=list)
    ignored: list[Refused] = field(default_factory=list)
    problem: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data for `submissions.json`."""
        ignored = [{"file": one.path, "reason": one.reason} for one in self.ignored]
        fields = {"name": self.name, "ids": self.ids, "submitted": self.submitted, "problem": self.problem}
        return {**fields, "ignored": ignored, "notebook": self.notebook or "", "files": self.kept}


@dataclass
class Collected:
    """What was collected: the assignment, the students, and what belongs to none of them."""

    assignment: str
    students: list[Student]
    ignored: list[Refused]
    layout: str = "flat"

    def lines(self) -> list[str]:
        """What to tell the instructor."""
        there = [student for student in self.students if student.notebook]
        counts = f"{len(there)} notebooks of {len(self.students)} students"
        lines = [f"{self.assignment}: {counts} (layout {self.layout})"]
        lines += [f"{one.id}: {one.problem}" for one in self.students if one.problem]
        for owner, items in [("", self.ignored), *((one.id, one.ignored) for one in self.students)]:
            lines += [
                f"left out: {owner + ': ' if owner else ''}{item.path}: {item.reason}" for item in items
            ]
        return lines


def collect(
    source: Path,
    submissions: Path,
    key: Path | None = None,
    *,
    assignment: str | None = None,
    layout: str = "auto",
) -> Collected:
    """Write `submissions/<student>/<assignment>.ipynb`, support files beside it, and `submissions.json`.

    Args:
        source: a folder or zip file: from Canvas, Moodle or Gradescope, or "flat": files named for the students, or a
            folder for each.
        submissions: folder to write to; students that are there already get their newer file.
        key: the key folder, to recognize notebooks whose metadata were lost.
        assignment: which one to take; needed where the source holds several.
        layout: "auto", "flat", "canvas", "moodle" or "gradescope".

    Raises:
        ValueError: the source is neither, holds too much, holds several assignments or none, or the folder holds
            another assignment's submissions; nothing is written then.
    """
    submissions = Path(submissions)
    known = _record(submissions)
    with opened(Path(source)) as incoming:
        handed, outside, layout = find_layout(incoming, layout)
        name = assignment or _only_assignment(handed, Path(source), key)
        grade_ids = _grade_ids(key, name)
        if known and known["assignment"] != name:
            raise ValueError(
                f"{submissions} holds submissions of {known['assignment']}: choose another folder for {name}"
            )
        _refuse_same_folders(handed)
        students = [_take(one, submissions, name, grade_ids) for one in handed]
        refused = [*outside, *incoming.refused]
    record = {**known.get("students", {}), **{one.id: one.to_json() for one in students}}
    content = {"version": VERSION, "assignment": name, "students": dict(sorted(record.items()))}
    write_atomically(submissions / RECORD, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return Collected(name, students, refused, layout)


def _refuse_same_folders(handed: Iterable[Handed]) -> None:
    """Two students must not share a folder, on file systems that do not tell capitals apart either."""
    seen: dict[str, str] = {}
    for one in handed:
        other = seen.setdefault(folder_name(one.student).casefold(), one.student)
        if other != one.student:
            raise ValueError(
                f"the ids {printable(other)!r} and {printable(one.student)!r} are too much alike: rename one"
            )


def _record(submissions: Path) -> dict[str, Any]:
    path = submissions / RECORD
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] == VERSION and isinstance(content["students"], dict) and content["assignment"]:
            return content
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f"{path} is damaged or of another version: collect into an empty folder")


def _grade_ids(key: Path | None, assignment: str) -> set[str]:
    """The grade_ids of an assignment, by which a notebook without the course's metadata is recognized."""
    if key is None:
        return set()
    return {cell.grade_id for cell in Key.load(key).assignment(assignment).manifest.cells if cell.grade_id}


def _only_assignment(handed: Iterable[Handed], source: Path, key: Path | None) -> str:
    """The one assignment that the notebooks say they are; if none says anything, the one that the key has."""
    found: dict[str, int] = {}
    for one in handed:
        for file in one.files:
            name = _stated(file)
            if name:
                found[name] = found.get(name, 0) + 1
    released = Key.load(key).assignments if key is not None else ()
    if not found and len(released) == 1:
        return released[0]
    if not found:
        raise ValueError(
            f"{source} holds no notebook of a released assignment: name it with --assignment 11_peft"
        )
    if len(found) > 1:
        counts = ", ".join(f"{name} ({count})" for name, count in sorted(found.items()))
        raise ValueError(f"{source} holds several assignments: choose one with --assignment: {counts}")
    return next(iter(found))


def _stated(file: Incoming) -> str:
    """The assignment that a notebook says it is, "" if it says none."""
    if not file.name.lower().endswith(".ipynb"):
        return ""
    try:
        course = read_notebook(file.read(MAX_BYTES)).course
    except ValueError:
        return ""
    name = course.get("assignment") if isinstance(course, dict) else None
    return name if isinstance(name, str) and re.fullmatch(r"\d\d_[a-z][a-z0-9_]{0,60}", name) else ""


def _take(handed: Handed, submissions: Path, assignment: str, grade_ids: set[str]) -> Student:
    """Write one student's files."""
    student = Student(folder_name(handed.student), handed.name, dict(handed.ids), handed.submitted)
    candidates = [file for file in handed.files if file.name.lower().endswith(".ipynb")]
    student.ignored += [Refused(printable(f.path), "too many notebooks") for f in candidates[:-MAX_NOTEBOOKS]]
    ranked: list[tuple[int, Incoming, bytes]] = []
    for file in candidates[-MAX_NOTEBOOKS:]:
        try:
            data = file.read(MAX_BYTES)
        except ValueError as error:
            student.ignored.append(Refused(printable(file.path), str(error)))
            continue
        fit = _fit(data, assignment, grade_ids)
        if fit < 0:
            student.ignored.append(Refused(printable(file.path), "it is the notebook of another assignment"))
        else:
            ranked.append((fit, file, data))
    folder = submissions / student.id
    if ranked:
        best = max(fit for fit, _, _ in ranked)
        chosen = [one for one in ranked if one[0] == best][-1]  # the platform's order: the latest is the last
        for _, file, _ in ranked:
            if file is not chosen[1]:
                student.ignored.append(Refused(printable(file.path), f"{printable(chosen[1].path)} counts"))
        student.notebook = printable(chosen[1].path)
        write_bytes_atomically(folder / f"{assignment}.ipynb", chosen[2])
    else:
        reasons = [f"{one.path}: {one.reason}" for one in student.ignored]
        nothing = "no notebook is among the files that were handed in" if handed.files else ""
        student.problem = "; ".join(reasons)[:300] or nothing
        (folder / f"{assignment}.ipynb").unlink(missing_ok=True)
    _support(handed, student, folder / f"{assignment}.files")
    return student


def _fit(data: bytes, assignment: str, grade_ids: set[str]) -> int:
    """How sure a file is the assignment's: 3 it says so, 2 it has its cells, 1 a notebook, 0 damaged, -1 another's."""
    try:
        notebook = read_notebook(data)
    except Malformed:
        return 0  # it may be the assignment's: grading says what is wrong with it
    name = notebook.course.get("assignment") if isinstance(notebook.course, dict) else None
    if isinstance(name, str):
        return 3 if name == assignment else -1
    found = {cell.grade_id or cell.cell_id for cell in notebook.cells}
    return 2 if found & grade_ids else 1


def _support(handed: Handed, student: Student, folder: Path) -> None:
    """Keep the files that may be needed beside a notebook, by their kind; of an earlier hand-in nothing is left."""
    room = MAX_SUPPORT_BYTES
    latest: dict[
        str, Incoming
    ] = {}  # of several of one name the last counts, but none in a folder further down
    for file in handed.files:
        other = latest.setdefault(_support_name(handed, file), file)
        if len(file.parts) <= len(other.parts):
            latest[_support_name(handed, file)] = file
    for file in handed.files:
        suffix = Path(file.name).suffix.lower()
        if suffix == ".ipynb":
            continue
        name = _support_name(handed, file)
        reason = ""
        if name.lower() == "timestamp.txt":
            reason = "the time is what the platform says"
        elif suffix not in SUPPORT or not name:
            reason = "files of this kind are not used"
        elif latest[name] is not file:
            reason = "another file of that name is kept"
        elif len(student.kept) >= MAX_SUPPORT_FILES:
            reason = f"more than {MAX_SUPPORT_FILES} files"
        else:
            try:
                data = file.read()
                if len(data) > room:
                    raise ValueError(f"all files together have more than {MAX_SUPPORT_BYTES / 1e6:g} MB")
                room -= len(data)
                write_bytes_atomically(folder / name, data)
                student.kept.append(name)
            except ValueError as error:
                reason = str(error)
        if reason:
            student.ignored.append(Refused(printable(file.path), reason))
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name not in student.kept and not path.is_dir():
            path.unlink()


def _support_name(handed: Handed, file: Incoming) -> str:
    own = handed.names.get(file.path, file.name)
    return re.sub(r"[^A-Za-z0-9._-]", "_", own)[-100:].lstrip(".")


def folder_name(student: str) -> str:
    """A student's id as a folder's name; one that would not do as it is gets a few digits of its hash."""
    plain = re.sub(r"[^A-Za-z0-9._@+-]", "_", student)[:60].lstrip(".-") or "student"
    reserved = re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", plain)
    if plain == student and not reserved and not plain.endswith("."):
        return plain
    return f"{plain.rstrip('.')}-{hashlib.sha256(student.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"
