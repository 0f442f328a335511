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
AGAIN = re.compile(r"^(?P<stem>.*?)(?:-(?P<canvas>\d+)| \((?P<browser>\d+)\))?$")
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
    """

    student: str
    name: str = ""
    ids: dict[str, str] = field(default_factory=dict)
    submitted: str = ""
    files: list[Incoming] = field(default_factory=list)


def find_layout(incoming: Archive | Folder, layout: str = "auto") -> tuple[list[Handed], list[Refused]]:
    """The students' files, and those that are no student's.

    Args:
        incoming: the source.
        layout: "auto", "flat", "canvas", "moodle" or "gradescope".

    Raises:
        ValueError: there is no such layout, or the source is not of it.
    """
    if layout not in ("auto", *LAYOUTS):
        raise ValueError(f"layout {layout!r}: choose auto, {', '.join(LAYOUTS)}")
    files = incoming.files
    handed, outside = LAYOUTS[_guess(files) if layout == "auto" else layout](files)
    if not handed:
        raise ValueError(f"no student's file was found in the layout {layout!r}: choose {', '.join(LAYOUTS)}")
    return sorted(handed, key=lambda one: one.student), outside


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
        handed.append(Handed(user, match["name"], {"canvas": user}, late, files_of))
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
        found.setdefault(user, Handed(user, match["name"], {"moodle": user})).files.append(file)
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
            one.files = [*one.files, *folders.get(folder, [])]
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
            stem = AGAIN.fullmatch(file.name[: -len(".ipynb")])["stem"]  # type: ignore[index]
            named = ASSIGNMENT.fullmatch(stem)
            student = named["student"] if named else stem
        else:
            outside.append(Refused(printable(file.path), UNKNOWN))
            continue
        found.setdefault(student, Handed(student)).files.append(file)
    return list(found.values()), outside


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
