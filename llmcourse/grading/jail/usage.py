"""How much memory the processes of a fork hold together (Linux)."""

from __future__ import annotations

import os
from pathlib import Path

_PROC = Path("/proc")


def descendants(process: int) -> list[int]:
    """Numbers of all processes below a process, the nearest first."""
    if not (_PROC / f"{process}/task/{process}/children").exists():
        return _descendants_by_psutil(process)
    found, level = [], [process]
    while level:
        level = [child for parent in level for child in _children(parent)]
        found += level
    return found


def _children(process: int) -> list[int]:
    found: list[int] = []
    try:
        for thread in os.listdir(_PROC / f"{process}/task"):
            found += map(int, (_PROC / f"{process}/task/{thread}/children").read_text().split())
    except OSError:  # it ended meanwhile
        pass
    return found


def _descendants_by_psutil(process: int) -> list[int]:
    import psutil

    try:
        return [child.pid for child in psutil.Process(process).children(recursive=True)]
    except psutil.Error:
        return []


def held_kb(processes: list[int], shared_kb: int, ceiling_kb: int) -> int:
    """KiB of memory of their own that processes hold, files not counted.

    A page that several of them share is counted for each, unless that makes a difference to the ceiling.

    Args:
        processes: their numbers.
        shared_kb: what the first of them had from the start.
        ceiling_kb: the limit that the sum will be compared with.
    """
    rough = sum(_sum(process, "status", ("RssAnon", "RssShmem", "VmSwap")) or 0 for process in processes)
    rough = max(0, rough - shared_kb)
    if rough <= ceiling_kb or len(processes) < 2:
        return rough
    fair = [_sum(process, "smaps_rollup", ("Pss_Anon", "Pss_Shmem", "SwapPss")) for process in processes]
    return rough if None in fair else max(0, sum(filter(None, fair)) - shared_kb)


def oom_kills() -> int:
    """How many processes this system has killed for want of memory since it started; 0 where it does not say."""
    try:
        lines = (_PROC / "vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def _sum(process: int, name: str, fields: tuple[str, ...]) -> int | None:
    try:
        text = (_PROC / f"{process}/{name}").read_text()
    except OSError:
        return None
    lines = (line.split() for line in text.splitlines())
    return sum(int(words[1]) for words in lines if words and words[0].rstrip(":") in fields)
