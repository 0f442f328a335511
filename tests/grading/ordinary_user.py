"""Run a command as an ordinary user from tests that run as root: `python ordinary_user.py command...`."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from llmcourse.grading.jail.namespaces import NEW_MOUNTS, mount, unshare

NOBODY = 65534
_BIND, _MOVE, _RECURSIVE, _PRIVATE = 4096, 8192, 16384, 1 << 18


def show(prefix: Path) -> None:
    """Let everyone reach the interpreter, in this process's own view, if it lies in a folder closed to others."""
    closed = next((p for p in reversed(prefix.parents) if not p.stat().st_mode & 0o001), None)
    if closed is None:
        return
    aside = tempfile.mkdtemp()
    mount(str(prefix), aside, None, _BIND | _RECURSIVE)
    mount("tmpfs", str(closed), "tmpfs", 0, "mode=755")
    prefix.mkdir(parents=True)
    mount(aside, str(prefix), None, _MOVE)
    os.rmdir(aside)


def main() -> None:
    """Become nobody and run the command."""
    unshare(NEW_MOUNTS)
    mount(None, "/", None, _RECURSIVE | _PRIVATE)
    show(Path(sys.base_prefix))
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    home = tempfile.mkdtemp()
    environment = {"PATH": os.environ["PATH"], "HOME": home, "OMP_NUM_THREADS": "1"}
    os.execve(sys.argv[1], sys.argv[1:], environment)


if __name__ == "__main__":
    main()
