"""The folder that a jail's submissions write to where no namespace gives them one in memory."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
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
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


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
                shutil.rmtree(folder)
                removed.append(folder)
            finally:
                os.close(descriptor)
    return removed
