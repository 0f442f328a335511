"""A lock between programs that write the same files; the system frees that of a killed one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(path: Path, seconds: float, busy: str) -> Iterator[None]:
    """Hold a lock file, after waiting so long for another holder.

    Raises:
        ValueError: it is still held; `busy` is the message.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path, timeout=seconds)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(busy) from None
    try:
        yield
    finally:
        lock.release()
