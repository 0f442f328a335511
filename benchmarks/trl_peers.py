"""What the benchmarks beside TRL share: settings that both sides have, taking turns, and memory in fresh processes.

A side opens a saved model and its data, which is not timed, and returns a function that trains once from these weights.
Sides import what they need by themselves, so that a process that measures one side's memory holds nothing of another.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness import alternate, result

PRECISIONS = ("fp32", "bf16")


@dataclass
class Run:
    """What one training run came to."""

    seconds: float
    """of training alone: no loading, no tokenizing, no checkpoint"""
    check: float
    """a number that must come out alike on all sides, such as the mean loss of the run"""
    notes: dict[str, float] = field(default_factory=dict)
    """further numbers to store"""


Side = Callable[[Path, str], Callable[[], Run]]
"""(folder of the saved model, precision) -> a function that trains once"""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Ours and TRL's, and which bars are to be reached."""

    module: str
    """where `SIDES` stands, for the processes that measure memory"""
    stage: str
    """sft, dpo or grpo: begins the names of the results"""
    what: str
    """the run, in words"""
    sides: dict[str, Side]
    """by name; names that begin with "trl." are TRL's"""
    ours: dict[str, str]
    """precision -> the side of ours that the bars are for; others of ours are measured beside it"""
    bars: dict[str, float]
    """ratio of speeds to reach against some of TRL's sides"""
    steps: int
    """optimizer steps of a run"""
    rounds: int = 3
    """rounds that count"""
    tolerance: float = 0.01
    """relative difference of `Run.check` between sides beyond which the comparison is void"""


def titled(name: str) -> str:
    """A side's name with the version of TRL: "trl.SFTTrainer" -> "trl.SFTTrainer 1.16.0"."""
    head, *options = name.split(" ")
    return " ".join((head, version("trl"), *options))


def compare(comparison: Comparison, folder: Path, precision: str) -> list[dict[str, Any]]:
    """Speed of all sides in turns, then the memory of each in a process of its own."""
    names = list(comparison.sides)
    runs: dict[str, list[Run]] = {name: [] for name in names}
    functions = {name: make(folder, precision) for name, make in comparison.sides.items()}

    def contender(name: str) -> Callable[[], float]:
        def once() -> float:
            runs[name].append(functions[name]())
            _require_alike(runs, comparison.tolerance)
            return comparison.steps / runs[name][-1].seconds

        return once

    description = f"{comparison.stage}, {precision}"
    figures = alternate({name: contender(name) for name in names}, comparison.rounds, description)
    notes = {name: runs[name][-1].notes | {"check": runs[name][-1].check} for name in names}
    return [
        *_speeds(comparison, precision, figures, notes),
        _memory(comparison, folder, precision),
    ]


def _require_alike(runs: dict[str, list[Run]], tolerance: float) -> None:
    """The same weights, data and optimizer give the same loss; otherwise the sides do different things."""
    latest = {name: done[-1].check for name, done in runs.items() if done}
    middle = statistics.median(latest.values())
    for name, value in latest.items():
        if abs(value - middle) > tolerance * abs(middle):
            raise RuntimeError(
                f"{name}: {value:.5g} where the median is {middle:.5g}, the comparison is void"
            )


def _speeds(
    comparison: Comparison, precision: str, figures: dict[str, list[float]], notes: dict[str, Any]
) -> list[dict[str, Any]]:
    """One result for each of our sides, against all of TRL's; the bars are for the chosen one."""
    peers = {titled(name): values for name, values in figures.items() if name.startswith("trl.")}
    results = []
    for name in (name for name in figures if not name.startswith("trl.")):
        chosen = name == comparison.ours[precision]
        results.append(
            result(
                f"{comparison.stage}_speed_{precision}{'' if chosen else '_' + name.replace(' ', '_')}",
                what=_described(comparison, name, precision),
                unit="steps/s",
                ours=figures[name],
                peers=peers,
                bars={titled(peer): bar for peer, bar in comparison.bars.items()} if chosen else {},
                notes=notes,
            )
        )
    return results


def _described(comparison: Comparison, name: str, precision: str) -> str:
    return f"{comparison.what}, {precision}" + ("" if name == "ours" else f", {name}")


# Memory ---------------------------------------------------------------------------------------------------


def _memory(comparison: Comparison, folder: Path, precision: str) -> dict[str, Any]:
    measured = {name: _in_own_process(comparison, name, folder, precision) for name in comparison.sides}
    peaks = {name: [one["peak_bytes"] / 2**30] for name, one in measured.items()}
    own = comparison.ours[precision]
    return result(
        f"{comparison.stage}_memory_{precision}",
        what=f"peak memory of the process: {_described(comparison, own, precision)}",
        unit="GiB",
        ours=peaks[own],
        peers={titled(name): peak for name, peak in peaks.items() if name.startswith("trl.")},
        bars={titled(name): 1.0 for name in comparison.bars},
        higher_is_better=False,
        runs=measured,
    )


def _in_own_process(comparison: Comparison, side: str, folder: Path, precision: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.trl_peers", comparison.module, side, str(folder), precision]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _high_water_mark() -> int:
    """Largest resident size of this process in bytes, from Linux."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def main() -> None:
    """Run one side once and print what its process occupied before and, at most, during training."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trl_peers", description=__doc__)
    for name in ("module", "side", "folder", "precision"):
        parser.add_argument(name)
    arguments = parser.parse_args()
    sides = importlib.import_module(arguments.module).SIDES
    train = sides[arguments.side](Path(arguments.folder), arguments.precision)
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the mark begins anew at this moment
    done = train()
    print(json.dumps({"before_bytes": before, "peak_bytes": _high_water_mark()} | asdict(done)))


# TRL's side -----------------------------------------------------------------------------------------------


def trainer_options(
    folder: Path, precision: str, *, batch_size: int, steps: int, lr: float
) -> dict[str, Any]:
    """The settings that every TRL trainer gets: our loop's optimizer and schedule, and nothing beside training.

    Activations are kept rather than computed again, as on our side: TRL would by default trade a fifth of its speed
    for memory.
    """
    return {
        "output_dir": str(folder / "trl"),
        "per_device_train_batch_size": batch_size,
        "max_steps": steps,
        "learning_rate": lr,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.95,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": precision == "bf16",
        "use_cpu": True,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }


def tokenized(trainer: type) -> type:
    """The trainer for rows that a trainer of that class has tokenized before."""

    class Tokenized(trainer):
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    return Tokenized


def quiet(trainer: Any) -> Any:
    """The trainer without the callback that prints its metrics."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    return trainer


def open_peer(folder: Path) -> Any:
    """The saved model as `transformers` opens it, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


if __name__ == "__main__":
    main()
