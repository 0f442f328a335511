"""Whose file is whose: the naming of Canvas, Moodle, Gradescope, and of folders made by hand."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmcourse.grading.incoming import Archive, Folder, Incoming, Refused, printable

CANVAS = re.compile(r"(?P<name>[^_/]*)_(?P<late>LATE_)?(?P<user>\d+)_(?P<submission>\d+)_(?P<file>[^/]+)")
MOODLE_FOLDER = re.compile(r"(?P<name>.*)_(?P<user>\d+)_assignsubmission_(?:file|onlinetext)_?")
MOODLE_FILE = re.compile(r"(?P<name>.*)_(?P<user>\d+)_assignsubmission_(?:file|onlinetext)_(?P<file>[^/]+)")
METADATA = "submission_metadata.yml"
AGAIN = re.compile(r"^(?P<stem>.*?)(?:-(?P<canvas>[1-9]\d?)| \((?P<browser>\d+)\))?$")
ASSIGNMENT = re.compile(r"^(?P<student>.+?)[ _-]+\d\d_[a-z][a-z0-9_]*$")
UNKNOWN = "its name says no student"


@dataclass
class Handed:
    """The files of one student, the latest last.

    Attributes:
        student: id.
        name: as the platform says, or "".
        ids: platform -> id.
        submitted: time or remark of the platform, or "".
        files: all files.
        names: path -> the name that the student gave the file, where the platform has added to it.
    """

    student: str
    name: str = ""
    ids: dict[str, str] = field(default_factory=dict)
    submitted: str = ""
    files: list[Incoming] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)


def find_layout(incoming: Archive | Folder, layout: str = "auto") -> tuple[list[Handed], list[Refused], str]:
    """The students' files, those that are no student's, and the layout.

    Args:
        incoming: the source.
        layout: "auto", "flat", "canvas", "moodle" or "gradescope".

    Raises:
        ValueError: there is no such layout, or the source is not of it.
    """
    if layout not in ("auto", *LAYOUTS):
        raise ValueError(f"layout {layout!r}: choose auto, {', '.join(LAYOUTS)}")
    files = incoming.files
    if layout == "auto":
        layout = _guess(files)
        if layout == "flat":
            _refuse_class_in_folder(files)
        if layout != "flat" and _top(files) and isinstance(incoming, Folder):
            # it may be the folder of a single student, whose names could be meant to mislead
            raise ValueError(
                f"everything lies in the folder {printable(_top(files))}: collect from that folder itself, or say "
                f"--layout {layout}"
            )
    handed, outside = LAYOUTS[layout](files)
    if not handed:
        raise ValueError(f"no student's file was found in the layout {layout!r}: choose {', '.join(LAYOUTS)}")
    return sorted(handed, key=lambda one: one.student), outside, layout


def _guess(files: list[Incoming]) -> str:
    """The layout by what stands at the top: names further down are the students' own, and could be meant to mislead."""
    top = _top(files)
    if any(file.path == f"{top}{METADATA}" for file in files):
        return "gradescope"
    entries = {file.path.removeprefix(top).split("/")[0] for file in files}
    canvas = sum(CANVAS.fullmatch(entry) is not None for entry in entries)
    moodle = sum(_moodle_match(entry) is not None for entry in entries)
    if 2 * max(canvas, moodle) <= len(entries):
        return "flat"
    return "canvas" if canvas >= moodle else "moodle"


def _top(files: list[Incoming]) -> str:
    """The folder around everything, as the beginning of a path, or ""."""
    tops = {file.parts[0] if len(file.parts) > 1 else "" for file in files}
    return f"{tops.pop()}/" if len(tops) == 1 and tops != {""} else ""


def _moodle_match(entry: str) -> re.Match[str] | None:
    return MOODLE_FOLDER.fullmatch(entry) or MOODLE_FILE.fullmatch(entry)


def _canvas(files: list[Incoming]) -> tuple[list[Handed], list[Refused]]:
    """`name_[LATE_]user_submission_file-1.ipynb`: the highest submission, then the highest number, is the latest."""
    found: dict[str, list[tuple[tuple[int, int, str], Incoming, re.Match[str]]]] = {}
    outside, top = [], _top(files)
    for file in files:
        match = CANVAS.fullmatch(file.path.removeprefix(top))
        if match is None or len(match["user"]) > 20 or len(match["submission"]) > 20:
            outside.append(Refused(printable(file.path), UNKNOWN))
            continue
        rank = (int(match["submission"]), _again(match["file"]), file.name)
        found.setdefault(match["user"], []).append((rank, file, match))
    handed = []
    for user, items in found.items():
        items.sort(key=lambda item: item[0])
        match = items[-1][2]
        late = "late" if match["late"] else ""
        files_of = [file for _, file, _ in items]
        names = {file.path: _without_number(match["file"]) for _, file, match in items}
        handed.append(Handed(user, match["name"], {"canvas": user}, late, files_of, names))
    return handed, outside


def _moodle(files: list[Incoming]) -> tuple[list[Handed], list[Refused]]:
    """A folder `Name_123_assignsubmission_file` for each student, or such a beginning of each file's name."""
    found: dict[str, Handed] = {}
    outside, top = [], _top(files)
    for file in files:
        match = _moodle_match(file.path.removeprefix(top).split("/")[0])
        if match is None:
            outside.append(Refused(printable(file.path), UNKNOWN))
            continue
        user = match["user"]
        one = found.setdefault(user, Handed(user, match["name"], {"moodle": user}))
        one.files.append(file)
        if "file" in match.groupdict():
            one.names[file.path] = match["file"]
    for one in found.values():
        one.files.sort(key=_in_order)
    return list(found.values()), outside


def _gradescope(files: list[Incoming]) -> tuple[list[Handed], list[Refused]]:
    """Folders `submission_456`; whose they are is in `submission_metadata.yml`."""
    top = _top(files)
    metadata = next((file for file in files if file.path == f"{top}{METADATA}"), None)
    if metadata is None:
        raise ValueError(f"the source has no {METADATA}: export all submissions from Gradescope again")
    records = _gradescope_records(metadata)
    folders: dict[str, list[Incoming]] = {}
    outside = []
    for file in files:
        parts = file.path.removeprefix(top).split("/")
        if len(parts) > 1 and parts[0] in records and file.path.startswith(top):
            folders.setdefault(parts[0], []).append(file)
        elif file is not metadata:
            outside.append(Refused(printable(file.path), UNKNOWN))
    found: dict[str, Handed] = {}
    for folder, record in sorted(records.items(), key=lambda item: _time(item[1])):
        for person in _people(record):
            text = {key: str(person.get(f":{key}") or "").strip() for key in ("name", "sid", "email")}
            student = text["sid"] or text["email"] or folder
            ids = {"gradescope": folder.removeprefix("submission_"), "email": text["email"]}
            one = found.setdefault(student, Handed(student))
            one.name, one.submitted = text["name"], _time(record)
            one.ids = {platform: value for platform, value in ids.items() if value}
            one.files = [*one.files, *sorted(folders.get(folder, []), key=_in_order)]
    return list(found.values()), outside


def _gradescope_records(metadata: Incoming) -> dict[str, Mapping[str, Any]]:
    import yaml

    try:
        content = yaml.safe_load(metadata.read().decode("utf-8", errors="replace"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{METADATA} cannot be read ({type(error).__name__}): export again") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{METADATA} is not what Gradescope writes: export again")
    return {str(folder): record for folder, record in content.items() if isinstance(record, Mapping)}


def _people(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    people = record.get(":submitters")
    found = [one for one in people if isinstance(one, Mapping)] if isinstance(people, list) else []
    return found or [{}]


def _time(record: Mapping[str, Any]) -> str:
    value = record.get(":created_at")
    if isinstance(value, datetime.datetime):
        return value.isoformat()
    return printable(value, 40) if isinstance(value, str) else ""


def _flat(files: list[Incoming]) -> tuple[list[Handed], list[Refused]]:
    """A folder for each student, or a notebook named for the student: `s001.ipynb`, `s001_11_peft.ipynb`."""
    outside = []
    found: dict[str, Handed] = {}
    for file in sorted(files, key=lambda one: (len(one.parts), _again(one.name), one.path)):
        if len(file.parts) > 1:
            student = file.parts[0]
        elif file.name.lower().endswith(".ipynb"):
            student = _named_student(file.name)
        else:
            outside.append(Refused(printable(file.path), UNKNOWN))
            continue
        found.setdefault(student, Handed(student)).files.append(file)
    return list(found.values()), outside


def _named_student(name: str) -> str:
    """The student that a notebook is named for: "s001 (1).ipynb" and "s001_11_peft-2.ipynb" are of s001, but
    "student-01.ipynb" is of student-01."""
    stem = name[: -len(".ipynb")]
    match = AGAIN.fullmatch(stem)
    if match and (match["browser"] or ASSIGNMENT.fullmatch(match["stem"])):
        stem = match["stem"]
    named = ASSIGNMENT.fullmatch(stem)
    return named["student"] if named else stem


def _refuse_class_in_folder(files: list[Incoming]) -> None:
    """A folder around a whole class would be taken for one student.

    Raises:
        ValueError: everything lies in one folder, and more than one entry of it holds a notebook.
    """
    top = _top(files)
    inside = [file.path.removeprefix(top) for file in files if file.name.lower().endswith(".ipynb")]
    owners = {path.split("/")[0] if "/" in path else f"{_named_student(path)}.ipynb" for path in inside}
    if top and len(owners) > 1:
        raise ValueError(
            f"everything lies in the folder {printable(top)}: collect from that folder itself, or say --layout flat "
            "if it is one student's"
        )


def _without_number(name: str) -> str:
    """A file's name without the number that a platform adds when it is handed in again."""
    stem, dot, suffix = name.rpartition(".")
    match = AGAIN.fullmatch(stem or name)
    return f"{match['stem']}{dot}{suffix}" if match and stem and match["canvas"] else name


def _in_order(file: Incoming) -> tuple[int, str]:
    """Files of one submission, the latest last."""
    return _again(file.name), file.path


def _again(name: str) -> int:
    """The number that a platform or browser adds to a file that is handed in again: `lab-2.ipynb`, `lab (1).ipynb`."""
    match = AGAIN.fullmatch(name.rpartition(".")[0] or name)
    number = (match["canvas"] or match["browser"] or "0") if match else "0"
    return int(number[:9])


LAYOUTS: dict[str, Callable[[list[Incoming]], tuple[list[Handed], list[Refused]]]] = {
    "flat": _flat,
    "canvas": _canvas,
    "moodle": _moodle,
    "gradescope": _gradescope,
}
