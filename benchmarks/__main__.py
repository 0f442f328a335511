"""`python -m benchmarks [NAME ...] [--gpu]`: run, write the results, print the table, exit 1 if a bar is missed."""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.harness import missed, write

CPU = (
    "training_throughput",
    "generation_speed",
    "base_model",
    "python_docs",
    "deduplication",
    "tokenization",
    "data_preparation",
    "sft_speed",
    "dpo_speed",
    "grpo_speed",
    "stages",
    "serving_speed",
    "grading_speed",
)
GPU = ("gpu_pretraining",)


def main() -> int:
    """Run the benchmarks named on the command line, or all of one kind."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names", nargs="*", help=f"of {', '.join(CPU + GPU)}; default: all for this kind of machine"
    )
    parser.add_argument("--gpu", action="store_true", help="the benchmarks that need a CUDA device")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(CPU + GPU)
    if unknown:
        parser.error(f"no benchmark {sorted(unknown)[0]!r}: choose of {', '.join(CPU + GPU)}")
    if arguments.gpu and not torch.cuda.is_available():
        print(
            "these benchmarks need a CUDA GPU and torch sees none; `make bench` runs those for a CPU",
            file=sys.stderr,
        )
        return 2
    outcomes = []
    for name in arguments.names or (GPU if arguments.gpu else CPU):
        for outcome in importlib.import_module(f"benchmarks.{name}").run():
            write(outcome)
            outcomes.append(outcome)
    return report(outcomes)


def report(outcomes: list[dict]) -> int:
    """Print one row a result; the number of results that miss a bar is the exit code's reason."""
    table = Table("benchmark", "ours", "unit", "against", "ratio", "bar", "verdict")
    failures = 0
    for outcome in outcomes:
        problems = missed(outcome)
        failures += bool(problems)
        own = f"{statistics.median(outcome['ours']):.4g}"
        bound = (
            "limit" in outcome
            and f"<= {outcome['limit']:.4g}"
            or "least" in outcome
            and f">= {outcome['least']:.4g}"
        )
        rows = [
            (peer, f"{ratio:.2f} x", f"{outcome['bars'].get(peer, '')}")
            for peer, ratio in outcome["ratios"].items()
        ]
        for peer, ratio, bar in rows or [("", "", bound or "")]:
            table.add_row(
                outcome["name"], own, outcome["unit"], peer, ratio, bar, "missed" if problems else "holds"
            )
    Console().print(table)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
