"""The folder that a jail's submissions write to where no namespace gives them one in memory."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

PREFIX = "llmcourse-jail-"
GRACE_SECONDS = 60.0
"""age before a folder counts as left behind: between making and locking one lies a moment"""


class Home:
    """A folder that is locked as long as its grader lives; making one removes those of graders that were killed.

    Attributes:
        path: the folder; others can enter it, none can list it.
    """

    def __init__(self) -> None:
        remove_left_behind(Path(tempfile.gettempdir()))
        self.path = tempfile.mkdtemp(prefix=PREFIX)
        self._lock = os.open(self.path, os.O_RDONLY)  # not inherited: the lock ends with this process
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        os.chmod(self.path, 0o711)

    def remove(self) -> None:
        """Delete it with what is inside."""
        remove_tree(self.path)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def remove_tree(folder: str | Path) -> None:
    """Delete a folder whose content may be made to resist: without rights, or nested a thousand times."""
    with contextlib.suppress(OSError, RecursionError):
        shutil.rmtree(folder)
    if os.path.lexists(folder):
        quiet = {name: subprocess.DEVNULL for name in ("stdin", "stdout", "stderr")}
        for command in (["chmod", "-R", "u+rwX"], ["rm", "-rf"]):
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                subprocess.run([*command, "--", str(folder)], check=False, timeout=60, **quiet)


def remove_left_behind(parent: Path) -> list[Path]:
    """Delete this user's folders in `parent` that no living grader holds; returns which."""
    removed = []
    for folder in sorted(parent.glob(f"{PREFIX}*")):
        with contextlib.suppress(OSError):  # held, another's, or gone meanwhile
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                status = os.fstat(descriptor)
                if status.st_uid != os.geteuid() or time.time() - status.st_ctime < GRACE_SECONDS:
                    continue
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove_tree(folder)
                removed.append(folder)
            finally:
                os.close(descriptor)
    return removed
