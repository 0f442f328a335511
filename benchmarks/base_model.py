"""The base model of the `cpu` preset over three seeds: the band that lab 04 compares a learner's run with.

Writes benchmarks/results/base_*.json, and llmcourse/expected/base.json, which travels with the package.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

import llmcourse
from benchmarks.harness import result
from llmcourse import pipeline
from llmcourse.runtime import describe_machine

SEEDS = (0, 1, 2)
EVERY = 20


def run() -> list[dict[str, Any]]:
    """Train each seed, or take it from the cache, where its time and memory were measured when it was made."""
    metrics, curves = [], []
    for seed in SEEDS:
        loaded = pipeline.load("base", seed=seed)
        metrics.append(loaded.artifact.metrics | {"stage_seconds": loaded.artifact.seconds})
        losses = np.array([record["loss"] for record in loaded.history["records"]])
        curves.append([float(part.mean()) for part in np.array_split(losses, len(losses) // EVERY)])
        evaluations = loaded.history["evaluations"]
    expected = {
        "preset": "cpu",
        "corpus": "tinytown",
        "seeds": list(SEEDS),
        "machine": describe_machine(),
        "validation_loss": [m["validation_loss"] for m in metrics],
        "floor": [m["floor"] for m in metrics],
        "loss_over_floor": [m["loss_over_floor"] for m in metrics],
        "training_seconds": [m["training_seconds"] for m in metrics],
        "probes": {name: [m["probes"][name]["value"] for m in metrics] for name in metrics[0]["probes"]},
        "curve": {"steps": [EVERY * (i + 0.5) for i in range(len(curves[0]))], "loss": curves},
        "evaluation_steps": [e["step"] for e in evaluations],
    }
    path = Path(llmcourse.__file__).parent / "expected" / "base.json"
    path.write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")
    minutes = result(
        "base_minutes",
        what="training time of the cpu preset's base model, evaluations included, three seeds",
        unit="minutes",
        ours=[m["training_seconds"] / 60 for m in metrics],
        higher_is_better=False,
        limit=4.0,
        tokens_per_second=[m["tokens_per_second"] for m in metrics],
        mfu=[m["mfu"] for m in metrics],
    )
    memory = result(
        "base_memory",
        what="peak resident memory of the process that trains the cpu preset's base model",
        unit="GiB",
        ours=[m["peak_bytes"] / 2**30 for m in metrics],
        higher_is_better=False,
        limit=1.5,
    )
    quality = result(
        "base_loss",
        what="validation loss of the cpu preset's base model over the corpus entropy floor",
        unit="ratio",
        ours=[m["loss_over_floor"] for m in metrics],
        higher_is_better=False,
        limit=1.15,
        probes=[m["probes"] for m in metrics],
    )
    return [minutes, memory, quality]
