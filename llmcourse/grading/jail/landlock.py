"""Landlock: what this process and its children may open at all (Linux 5.13 and later, no privilege needed)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from collections.abc import Iterable
from pathlib import Path

from llmcourse.grading.jail.system_calls import raw_call

_VERSION_FLAG, _PATH_BENEATH = 1, 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_FOLDER, _TRUNCATE, _IOCTL = (
    1 << 0,
    1 << 1,
    1 << 2,
    1 << 3,
    1 << 14,
    1 << 15,
)
_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
"""rights that a version knows and that are therefore refused unless a rule grants them"""
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL
_READ = _EXECUTE | _READ_FILE | _READ_FOLDER
_NO_TCP = 3
_NO_SIGNALS_OR_ABSTRACT_SOCKETS = 3


def version() -> int:
    """Version of Landlock in this kernel; 0 where there is none."""
    with contextlib.suppress(OSError):
        return raw_call("landlock_create_ruleset", None, 0, _VERSION_FLAG)
    return 0


def restrict(readable: Iterable[Path], writable: Iterable[Path], tcp: bool) -> None:
    """From here on, and for all children: only these paths, and signals only to one another.

    Needs "no new privileges" to be set.

    Args:
        readable: paths to read and execute below.
        writable: paths to do anything below.
        tcp: whether TCP is allowed (a private network is there).

    Raises:
        OSError: the kernel has no Landlock, or refused.
    """
    found = version()
    if not found:
        raise OSError("this kernel has no Landlock")
    rights = _RIGHTS[min(found, 5)]
    network = 0 if tcp or found < 4 else _NO_TCP
    scope = _NO_SIGNALS_OR_ABSTRACT_SOCKETS if found >= 6 else 0
    size = 8 if found < 4 else 16 if found < 6 else 24
    structure = ctypes.create_string_buffer(struct.pack("QQQ", rights, network, scope), 24)
    ruleset = raw_call("landlock_create_ruleset", structure, size, 0)
    try:
        for paths, granted in ((readable, _READ), (writable, rights)):
            for path in paths:
                _allow(ruleset, path, granted & rights)
        raw_call("landlock_restrict_self", ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: Path, granted: int) -> None:
    try:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if not path.is_dir():
            granted &= _OF_FILES
        rule = ctypes.create_string_buffer(struct.pack("=Qi", granted, handle), 12)
        raw_call("landlock_add_rule", ruleset, _PATH_BENEATH, rule, 0)
    finally:
        os.close(handle)
