"""What a chapter says of its method's speed: the stored benchmarks of it, a line each."""

from __future__ import annotations

import statistics
from pathlib import Path

from llmcourse.labs.results import load_benchmarks


def benchmark_lines(prefix: str, repository: Path | None = None) -> list[str]:
    """One line for each peer in each benchmark whose name begins with `prefix`, such as "sft": figures, ratio, verdict.

    Raises:
        ValueError: no stored benchmark has such a name.
    """
    found = [one for one in load_benchmarks(repository) if one["name"].startswith(prefix)]
    if not found:
        raise ValueError(f"no benchmark begins with {prefix!r}: run `python -m benchmarks` first")
    lines = []
    for one in found:
        own = statistics.median(one["ours"])
        lines.append(f"{one['what']}: {_figure(own)} {one['unit']}")
        for peer, ratio in one["ratios"].items():
            bar = one["bars"].get(peer)
            verdict = "" if bar is None else f" (bar {bar:g}: {'holds' if ratio >= bar else 'missed'})"
            other = statistics.median(one["peers"][peer])
            lines.append(f"    {peer}: {_figure(other)}, ratio {ratio:.2f}{verdict}")
    return lines


def _figure(value: float) -> str:
    """Three digits, and whole numbers from 100 on instead of powers of ten."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
