"""A world of its own for the jail: a small read-only root, no network, process numbers from 1.

The zygote enters once (`enter`), so that it never sees the course's folders or the home; each fork then gets process
numbers, files and a loopback network of its own (`enter_job`). Works as root and, through user namespaces, as anyone.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import socket
import stat
import struct
from collections.abc import Iterable
from pathlib import Path

from llmcourse.grading.jail.system_calls import PR_SET_PDEATHSIG, call, prctl, raw_call

NEW_MOUNTS, NEW_NAME, NEW_IPC, NEW_USER, NEW_PIDS, NEW_NETWORK = (
    0x00020000,
    0x04000000,
    0x08000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
_READ_ONLY, _NO_SUID, _NO_DEVICES, _NO_EXEC, _REMOUNT, _BIND, _RECURSIVE, _PRIVATE = (
    1,
    2,
    4,
    8,
    32,
    4096,
    16384,
    1 << 18,
)
_DETACH = 2
_AT_RECURSIVE = 0x8000
_DEVICES = ("null", "full", "random", "urandom")
"""not "zero": a shared mapping of it is memory that no limit counts"""
HOST_NAME = "jail"
INSIDE_ID = 1000
"""number of the user inside a user namespace: an ordinary one"""


def unshare(flags: int) -> None:
    """Leave the namespaces that are named by the flags for new ones.

    Raises:
        OSError: not allowed.
    """
    call("unshare", flags)


def enter(visible: Iterable[Path], folder: str, as_root: bool) -> None:
    """Fork into new namespaces whose root shows, read-only, the visible paths alone; the caller goes on in the fork.

    The parent waits and ends as the fork ends. The fork is process 1: when it dies, all inside die.

    Args:
        visible: folders and files; where they lie inside is where they lie outside.
        folder: where files in memory can be written, none of the visible ones below it.
        as_root: whether to do so with root's rights, or through a user namespace.

    Raises:
        OSError: the kernel does not allow it.
    """
    user, group = os.geteuid(), os.getegid()
    others = NEW_MOUNTS | NEW_IPC | NEW_NAME | NEW_PIDS | NEW_NETWORK
    unshare(others if as_root else others | NEW_USER)
    if not as_root:
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{INSIDE_ID} {user} 1")
        _write("/proc/self/gid_map", f"{INSIDE_ID} {group} 1")
    fork = os.fork()
    if fork:
        _wait_for(fork)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    _build_root(list(visible), folder)


def enter_job(folder: str, size: int, files: int, owner: int, group: int) -> None:
    """Give this fork, process 1 of new process numbers already, its own files and network.

    Args:
        folder: the one writable folder.
        size, files: its bytes and number of files.
        owner, group: who may write there.

    Raises:
        OSError: the kernel refused.
    """
    unshare(NEW_MOUNTS | NEW_NETWORK)
    mount(
        "tmpfs",
        folder,
        "tmpfs",
        _NO_SUID | _NO_DEVICES,
        f"size={size},nr_inodes={files},mode=700,uid={owner},gid={group}",
    )
    mount("proc", "/proc", "proc", _NO_SUID | _NO_DEVICES | _NO_EXEC)
    loopback_up()


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str = "") -> None:
    """Mount a file system.

    Raises:
        OSError: the kernel refused.
    """
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    try:
        call("mount", *texts, flags, options.encode() or None)
    except OSError as error:
        raise OSError(error.errno, f"mount {target}: {os.strerror(error.errno)}") from None


def loopback_up() -> None:
    """Switch on 127.0.0.1 of a new network, which connects nothing else.

    Raises:
        OSError: the kernel refused.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        request = struct.pack("16sh14x", b"lo", 0x41)  # IFF_UP | IFF_RUNNING
        fcntl.ioctl(handle, 0x8914, request)  # SIOCSIFFLAGS


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def _wait_for(fork: int) -> None:
    """End as the fork ends; the interpreter's own clean-up is for the fork to do, if anyone."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.closerange(3, 4096)
    _, status = os.waitpid(fork, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 127)


def _build_root(visible: list[Path], folder: str) -> None:
    """Make a new root in memory, bind the visible paths into it, and let go of the old one."""
    mount(None, "/", None, _RECURSIVE | _PRIVATE)
    mount("tmpfs", "/tmp", "tmpfs", _NO_SUID | _NO_DEVICES, "size=1m,mode=755")
    os.mkdir("/tmp/old")
    os.chdir("/tmp")
    raw_call("pivot_root", b"/tmp", b"/tmp/old")
    os.chdir("/")
    for path in sorted(visible):  # a folder before those inside it
        _bind(path)
    for name in _DEVICES:
        _bind(Path("/dev", name), devices=True)
    for name, target in {"fd": "/proc/self/fd", "shm": f"{folder}/shm"}.items():
        os.symlink(target, f"/dev/{name}")
    os.makedirs("/etc", exist_ok=True)
    Path("/etc/hosts").write_text(f"127.0.0.1 localhost {HOST_NAME}\n", encoding="ascii")
    call("sethostname", HOST_NAME.encode(), len(HOST_NAME))
    for name in ("/proc", "/tmp", folder):
        os.makedirs(name, exist_ok=True)
    mount("proc", "/proc", "proc", _NO_SUID | _NO_DEVICES | _NO_EXEC)
    mount("tmpfs", folder, "tmpfs", _NO_SUID | _NO_DEVICES, "size=64m,mode=1777")
    call("umount2", b"/old", _DETACH)
    os.rmdir("/old")
    mount(None, "/", None, _BIND | _REMOUNT | _READ_ONLY | _NO_SUID | _NO_DEVICES)


def _bind(path: Path, devices: bool = False) -> None:
    """Show a path of the old root, read-only, at the same place of the new one."""
    source = Path("/old") / path.relative_to("/")
    if os.path.lexists(path):  # shown with a folder above it
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if source.is_symlink() and not devices and not os.path.isabs(os.readlink(source)):
        path.symlink_to(os.readlink(source))
        return
    source = _resolved(source)
    if stat.S_ISDIR(os.stat(source).st_mode):
        path.mkdir(exist_ok=True)
    else:
        path.touch()
    mount(str(source), str(path), None, _BIND | _RECURSIVE)
    with contextlib.suppress(OSError):  # older kernels than 5.12: below, for the topmost alone
        _make_read_only(path, devices)
        return
    held = os.statvfs(path).f_flag & (_NO_SUID | _NO_DEVICES | _NO_EXEC)  # what is set may not be taken away
    flags = _BIND | _REMOUNT | _READ_ONLY | _NO_SUID | held | (0 if devices else _NO_DEVICES)
    mount(None, str(path), None, flags)


def _resolved(source: Path) -> Path:
    """Follow links as they were meant, from the old root."""
    for _ in range(40):
        if not source.is_symlink():
            return source
        target = os.readlink(source)
        source = Path("/old" + target) if os.path.isabs(target) else source.parent / target
    raise OSError(f"{source} is a circle of links")


def _make_read_only(path: Path, devices: bool) -> None:
    attributes = _READ_ONLY | _NO_SUID | (0 if devices else _NO_DEVICES)
    structure = ctypes.create_string_buffer(struct.pack("QQQQ", attributes, 0, 0, 0), 32)
    raw_call("mount_setattr", -100, os.fsencode(path), _AT_RECURSIVE, structure, 32)
