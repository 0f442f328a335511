"""Fair timing: contenders take turns in one run after a warm-up; the result is a ratio of medians, with its machine."""

from __future__ import annotations

import datetime
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmcourse.runtime import describe_machine, progress

RESULTS = Path(__file__).parent / "results"
Contender = Callable[[], float]
"""runs once and returns its figure, for instance tokens per second"""


def alternate(contenders: dict[str, Contender], rounds: int, description: str) -> dict[str, list[float]]:
    """Figures of `rounds` rounds, name -> list; each round runs everyone once, after one round that does not count."""
    figures: dict[str, list[float]] = {name: [] for name in contenders}
    bar = progress(total=(rounds + 1) * len(contenders), description=description, unit="run")
    with bar:
        for number in range(rounds + 1):
            for name, run in contenders.items():
                figure = run()
                if number:
                    figures[name].append(figure)
                bar.update()
    return figures


def result(
    name: str,
    *,
    what: str,
    unit: str,
    ours: list[float],
    peers: dict[str, list[float]] | None = None,
    bars: dict[str, float] | None = None,
    higher_is_better: bool = True,
    **details: Any,
) -> dict[str, Any]:
    """One benchmark's result. A ratio above 1 means that ours is better; `bars` are the ratios to reach."""
    peers = peers or {}
    own = statistics.median(ours)
    ratios = {}
    for peer, figures in peers.items():
        other = statistics.median(figures)
        ratios[peer] = own / other if higher_is_better else other / own
    return {
        "name": name,
        "what": what,
        "unit": unit,
        "higher_is_better": higher_is_better,
        "ours": ours,
        "peers": peers,
        "ratios": ratios,
        "bars": bars or {},
        "machine": describe_machine(),
        "date": datetime.date.today().isoformat(),
        **details,
    }


def missed(outcome: dict[str, Any]) -> list[str]:
    """The bars that a result does not reach, in words; `limit` and `least` are bounds on our own median."""
    own = statistics.median(outcome["ours"])
    problems = [
        f"{peer}: ratio {outcome['ratios'][peer]:.2f}, bar {bar}"
        for peer, bar in outcome["bars"].items()
        if outcome["ratios"][peer] < bar
    ]
    if "limit" in outcome and own > outcome["limit"]:
        problems.append(f"{own:.4g} {outcome['unit']}, at most {outcome['limit']:.4g}")
    if "least" in outcome and own < outcome["least"]:
        problems.append(f"{own:.4g} {outcome['unit']}, at least {outcome['least']:.4g}")
    return problems


def write(outcome: dict[str, Any]) -> Path:
    """Write a result to benchmarks/results/<name>.json, whole or not at all."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{outcome['name']}.json"
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(outcome, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path
