"""System calls that Python has no function for (Linux)."""

from __future__ import annotations

import ctypes
import os
import platform

X86_64, AARCH64 = "x86_64", "aarch64"
MACHINE = platform.machine()
_NUMBERS = {
    X86_64: {"pivot_root": 155, "seccomp": 317},
    AARCH64: {"pivot_root": 41, "seccomp": 277},
}
_SAME_EVERYWHERE = {
    "mount_setattr": 442,
    "landlock_create_ruleset": 444,
    "landlock_add_rule": 445,
    "landlock_restrict_self": 446,
}
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38

_libc: ctypes.CDLL | None = None


def libc() -> ctypes.CDLL:
    """The C library."""
    global _libc
    if _libc is None:
        _libc = ctypes.CDLL(None, use_errno=True)
    return _libc


def call(name: str, *arguments: int | bytes | ctypes.Array[ctypes.c_char] | None) -> int:
    """A function of the C library.

    Raises:
        OSError: it failed; the message names it.
    """
    return _checked(name, getattr(libc(), name)(*map(_argument, arguments)))


def raw_call(name: str, *arguments: int | bytes | ctypes.Array[ctypes.c_char] | None) -> int:
    """A system call by its name, one of those known here.

    Raises:
        OSError: it failed, or has no number on this machine.
    """
    number = _SAME_EVERYWHERE.get(name) or _NUMBERS.get(MACHINE, {}).get(name)
    if number is None:
        raise OSError(0, f"{name} is not known on {MACHINE}")
    return _checked(name, libc().syscall(ctypes.c_long(number), *map(_argument, arguments)))


def prctl(option: int, value: int) -> None:
    """Set a property of this process.

    Raises:
        OSError: the kernel refused.
    """
    call("prctl", option, value, 0, 0, 0)


def _argument(value: int | bytes | ctypes.Array[ctypes.c_char] | None) -> object:
    return ctypes.c_long(value) if isinstance(value, int) else value


def _checked(name: str, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result
