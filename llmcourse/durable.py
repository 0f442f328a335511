"""Folders that are either whole or absent: checksums, fsync, one rename.

Checkpoints and artifacts are both written in the same four steps: fill a hidden folder beside the final one,
record each file's size and SHA-256 in a sealed JSON file, flush everything to the disk, rename. A rename
within one file system is atomic, so a reader, or a process that starts after a kill, sees the old state or
the new one, never half.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

SPACE_MARGIN = 1 << 20
"""bytes that must stay free beside what is about to be written"""
OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT)


def plain(value: Any, where: str) -> Any:
    """`value` as JSON gives it back (tuples become lists): dict with str keys, list, str, number, bool, None.

    Raises:
        ValueError: something inside is none of these; the message says where.
    """
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{where}: key {key!r} is not text, and JSON would make it so; use str keys")
        return {key: plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):  # a subclass, such as numpy.float64, is written as what it is at heart
        if isinstance(value, kind):
            return kind(value)
    raise ValueError(
        f"{where}: {type(value).__name__} is not plain data; convert it to numbers, text or lists"
    )


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no spaces; equal values give equal text, so it can be hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def text_digest(text: str) -> str:
    """SHA-256 of the UTF-8 bytes of `text`, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size in bytes and SHA-256 of every file below `folder`, by its path relative to it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        for path in files
    }


def find_damage(folder: Path, records: dict[str, dict[str, Any]], *, digests: bool = True) -> str | None:
    """What is wrong with the recorded files of `folder`, or None; looks at sizes only if not `digests`."""
    for name, record in records.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if (size := path.stat().st_size) != record["bytes"]:
            return f"{name} has {size} bytes, {record['bytes']} were written"
        if digests and file_digest(path) != record["sha256"]:
            return f"{name} does not hold the bytes that were written (its SHA-256 differs)"
    return None


def write_sealed(path: Path, data: dict[str, Any]) -> None:
    """Write plain `data` as JSON that carries its own SHA-256, so that `read_sealed` notices any change."""
    path.write_text(_sealed_text(data), encoding="utf-8")


def _sealed_text(data: dict[str, Any]) -> str:
    return json.dumps({**data, "seal": text_digest(canonical_json(data))}, indent=1) + "\n"


def read_sealed(path: Path) -> dict[str, Any]:
    """The data that `write_sealed` wrote.

    Raises:
        ValueError: the file is missing, is no JSON, or is not byte for byte what was written.
    """
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text)
    except FileNotFoundError:
        raise ValueError(f"{path.name} is missing") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.name} cannot be read as JSON ({type(error).__name__})") from None
    if not isinstance(data, dict) or "seal" not in data:
        raise ValueError(f"{path.name} is not one of this program's (it has no seal)")
    del data["seal"]
    if _sealed_text(data) != text:
        raise ValueError(f"{path.name} was changed after it was written (its seal differs)")
    return data


def require_space(folder: Path, needed: int, what: str) -> None:
    """Refuse to start writing what will not fit.

    Raises:
        OSError: fewer than `needed` bytes plus a margin are free where the existing `folder` lies.
    """
    free = shutil.disk_usage(folder).free
    if free < needed + SPACE_MARGIN:
        raise OSError(
            errno.ENOSPC,
            f"{what} needs {needed / 2**20:.1f} MiB but only {free / 2**20:.1f} MiB are free in {folder}: "
            "delete what you no longer need or choose a folder on another disk",
        )


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk (Windows cannot open folders: skipped)."""
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(work: Path, final: Path) -> None:
    """Make the filled folder `work` appear as `final`, a free name on the same disk, durably and at once."""
    for path in sorted(work.rglob("*"), reverse=True):  # children before the folders that name them
        sync(path)
    sync(work)
    os.rename(work, final)
    sync(final.parent)


def discard(folder: Path) -> None:
    """Delete a folder so that a kill half-way leaves a hidden remnant, never half of the folder."""
    if not folder.name.startswith("."):
        hidden = folder.with_name(f".{folder.name}.{os.getpid()}.deleted")
        shutil.rmtree(hidden, ignore_errors=True)
        os.rename(folder, hidden)
        folder = hidden
    shutil.rmtree(folder)
