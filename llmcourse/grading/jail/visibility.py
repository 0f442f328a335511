"""What the inside of the jail may see of this machine's files."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

_SYSTEM = "/usr /bin /sbin /lib /lib32 /lib64 /etc/ld.so.cache /etc/localtime /etc/alternatives /nix/store"


def visible_paths(site: Iterable[str], home: str) -> list[Path]:
    """Interpreter, environment, installed packages, this package and the system's libraries; nothing else.

    Args:
        site: folders of installed packages.
        home: the home folder.

    Raises:
        ValueError: one of these folders is the home or holds it.
    """
    package = Path(__file__).resolve().parents[2]
    prefixes = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix, *site}
    system = [Path(name) for name in _SYSTEM.split() if os.path.lexists(name)]
    paths = {*system, package, *map(Path, prefixes)}
    for path in paths:
        if path in (Path(path.anchor), *Path(home).parents, Path(home)):
            raise ValueError(
                f"Python lies in {path}, which holds more than Python: grade with a virtual environment"
            )
    return sorted(path for path in paths if path.exists())


def writable_folder(visible: Iterable[Path]) -> str:
    """Where the inside has its one writable folder: `/tmp`, unless something that must be visible lies in there."""
    return "/scratch" if any(path.is_relative_to("/tmp") for path in visible) else "/tmp"
