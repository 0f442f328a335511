"""Folders and zip files as learning platforms, and attackers, make them."""

from __future__ import annotations

import json
import stat
import zipfile
from pathlib import Path

import pytest

from llmcourse.grading.collect import Student


def write(root: Path, files: dict[str, bytes]) -> Path:
    """Write files below a folder."""
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def zipped(path: Path, files: dict[str, bytes], modes: dict[str, int] | None = None) -> Path:
    """A zip file; `modes` are the Unix modes of members."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = (modes or {}).get(name, stat.S_IFREG | 0o644) << 16
            archive.writestr(info, data)
    return path


def reasons(student: Student) -> dict[str, str]:
    """What was left out of a student's files, and why."""
    return {one.path: one.reason for one in student.ignored}


def everything(root: Path) -> set[str]:
    """All files below a folder."""
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_dir()}


@pytest.fixture(name="folder")
def incoming_folder(tmp_path: Path) -> Path:
    """An empty folder for what a platform gives out."""
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def record(submissions: Path) -> dict:
    """What collecting noted about everybody."""
    return json.loads((submissions / "submissions.json").read_text(encoding="utf-8"))
