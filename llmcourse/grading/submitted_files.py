"""Artifact mode: what a long training left behind is graded, since the training itself cannot be repeated.

Only three kinds of files are opened: safetensors, JSON and JSON lines. Their claims about themselves are checked before
memory is taken for them. Anything that can carry code is listed and never opened: pickles in all their forms, Python
files, and of a configuration its `auto_map` and chat template. The course's own evaluation then runs on held-out data,
in a process of its own with limits.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcourse.grading.verdicts import Finding

if TYPE_CHECKING:
    from torch import Tensor

ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}
BRACKETS = re.compile(rb"[\[\]{}]")
MAX_HEADER, MAX_TENSORS, MAX_DIMENSIONS = 4 << 20, 20_000, 8
MAX_TENSOR_FILE, MAX_JSON_FILE = 2 << 30, 64 << 20
MAX_FILES, MAX_DEPTH, MAX_LINES, MAX_LINE = 64, 32, 1_000_000, 1 << 20
# Keys of configurations that make a library run code or a template of the submitter's.
ACTIVE_KEYS = ("auto_map", "chat_template", "custom_pipelines", "trust_remote_code")
REASONS = {
    **dict.fromkeys(
        (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz"), "may hold a pickle"
    ),
    **dict.fromkeys((".py", ".so", ".ipynb", ".sh", ".pth"), "is code"),
    **dict.fromkeys((".jinja", ".jinja2", ".j2"), "is a template"),
    **dict.fromkeys((".zip", ".tar", ".gz", ".7z"), "is an archive"),
}


class FileRefused(ValueError):
    """A file that is not what its name says, or too large; the message is one line."""


@dataclass(frozen=True)
class Artifacts:
    """The files of a submission that an evaluation may use.

    Attributes:
        tensors: file name -> tensors by name.
        data: file name -> content of a JSON file, or the list of a JSON-lines file.
        findings: what was left out, and why.
    """

    tensors: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()


def read_artifacts(folder: Path) -> Artifacts:
    """Read what may be read of a folder of submitted files.

    Args:
        folder: `<assignment>.files` of a student; links in it are not followed.

    Returns:
        The files by their path relative to the folder.
    """
    tensors: dict[str, Mapping[str, Tensor]] = {}
    data: dict[str, Any] = {}
    findings: list[Finding] = []
    paths = sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    for path in paths[:MAX_FILES]:
        name = path.relative_to(folder).as_posix()
        try:
            content = _read_one(path)
        except FileRefused as error:
            findings.append(Finding("FILE_IGNORED", f"{name[:200]}: {error}"))
            continue
        if path.suffix == ".safetensors":
            tensors[name] = content
            continue
        removed = _without_active_keys(content) if path.suffix == ".json" else []
        findings += [Finding("FILE_IGNORED", f"{name[:200]}: its {key} is not used") for key in removed]
        data[name] = content
    if len(paths) > MAX_FILES:
        findings.append(
            Finding("FILE_IGNORED", f"{len(paths) - MAX_FILES} files beyond the first {MAX_FILES}")
        )
    return Artifacts(tensors, data, tuple(findings))


def _read_one(path: Path) -> Any:
    suffix = path.suffix.lower()
    if suffix in REASONS:
        raise FileRefused(f"{REASONS[suffix]}, and is never opened")
    if suffix == ".safetensors":
        return read_safetensors(_bytes(path, MAX_TENSOR_FILE))
    if suffix == ".json":
        return read_json(_bytes(path, MAX_JSON_FILE))
    if suffix == ".jsonl":
        return read_json_lines(_bytes(path, MAX_JSON_FILE))
    raise FileRefused("is neither safetensors nor JSON nor JSON lines")


def _bytes(path: Path, limit: int) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        with open(descriptor, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise FileRefused("is no regular file")
            if status.st_size > limit:
                raise FileRefused(f"has {status.st_size} bytes, more than {limit}")
            return file.read(status.st_size)  # a read of the limit would take memory for all of it
    except OSError as error:
        raise FileRefused(f"cannot be read ({error.strerror or error})") from None


def check_safetensors(data: bytes) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What a safetensors file says that it holds, after every claim was checked against its length.

    Args:
        data: the file.

    Returns:
        Tensor name -> (dtype as the format names it, shape).

    Raises:
        FileRefused: the header is damaged, too large, or claims other bytes than there are.
    """
    if len(data) < 8:
        raise FileRefused("has no safetensors header")
    (length,) = struct.unpack("<Q", data[:8])
    if length > min(MAX_HEADER, len(data) - 8):
        raise FileRefused(f"claims a header of {length} bytes")
    header = read_json(data[8 : 8 + length])
    if not isinstance(header, dict) or len(header) > MAX_TENSORS:
        raise FileRefused("has a header that is no list of tensors, or one of too many")
    header.pop("__metadata__", None)
    spans, found = [], {}
    for name, entry in header.items():
        dtype, shape, span = _claim(name, entry)
        size = math.prod(shape) * ITEM_BYTES[dtype]
        if span[1] - span[0] != size:
            raise FileRefused(f"tensor {name[:60]!r} of {size} bytes has {span[1] - span[0]}")
        spans.append(span)
        found[name] = (dtype, shape)
    end = 0
    for first, last in sorted(spans):
        if first != end:
            raise FileRefused("has tensors that overlap, or bytes that belong to none")
        end = last
    if end != len(data) - 8 - length:
        raise FileRefused(f"claims {end} bytes of tensors and has {len(data) - 8 - length}")
    return found


def _claim(name: str, entry: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """One tensor's entry: its dtype, shape and place."""
    try:
        dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, first, last]
    except (TypeError, KeyError, ValueError):
        raise FileRefused(f"tensor {name[:60]!r} has no dtype, shape and offsets") from None
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise FileRefused(f"tensor {name[:60]!r} has an unknown dtype")
    if len(shape) > MAX_DIMENSIONS or not all(type(one) is int and 0 <= one < 2**48 for one in numbers):
        raise FileRefused(f"tensor {name[:60]!r} has an impossible shape or place")
    return dtype, tuple(shape), (first, last)


def read_safetensors(data: bytes) -> dict[str, Tensor]:
    """The tensors of a checked file.

    Raises:
        FileRefused: see `check_safetensors`.
    """
    check_safetensors(data)
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError, AttributeError) as error:
        raise FileRefused(f"cannot be read as safetensors ({' '.join(str(error).split())[:100]})") from None


def read_json(data: bytes) -> Any:
    """The content of a JSON text; NaN and infinity are no JSON.

    Raises:
        FileRefused: it is no JSON in UTF-8, or nested too deeply.
    """
    depth = 0
    # Brackets inside of texts count as well: a bound that is too strict only for texts that nobody needs.
    for bracket in BRACKETS.finditer(data):
        depth += 1 if bracket[0] in b"[{" else -1
        if depth > MAX_DEPTH:
            raise FileRefused("is nested too deeply")
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_no_constant, parse_int=_integer)
    except (ValueError, RecursionError) as error:
        raise FileRefused(f"is no JSON ({' '.join(str(error).split())[:100]})") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _integer(digits: str) -> int:
    if len(digits) > 40:
        raise ValueError("an integer of more than 40 digits")
    return int(digits)


def read_json_lines(data: bytes) -> list[Any]:
    """The records of JSON lines; empty lines are skipped.

    Raises:
        FileRefused: a line is too long or no JSON, or there are too many.
    """
    lines = data.split(b"\n")
    if len(lines) > MAX_LINES:
        raise FileRefused(f"has more than {MAX_LINES} lines")
    found = []
    for number, line in enumerate(lines, 1):
        if len(line) > MAX_LINE:
            raise FileRefused(f"line {number} has more than {MAX_LINE} bytes")
        if line.strip():
            try:
                found.append(read_json(line))
            except FileRefused as error:
                raise FileRefused(f"line {number} {error}") from None
    return found


def _without_active_keys(content: Any) -> list[str]:
    """Take the keys that would make a library run something out of a configuration; return their names."""
    removed = []
    if isinstance(content, dict):
        for key in ACTIVE_KEYS:
            if content.pop(key, None) is not None:
                removed.append(key)
        for value in content.values():
            removed += _without_active_keys(value)
    elif isinstance(content, list):
        for value in content:
            removed += _without_active_keys(value)
    return sorted(set(removed))
