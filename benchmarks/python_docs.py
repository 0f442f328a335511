"""A real corpus: bits per byte on held-out documentation of this Python installation, against `xz -9` on the same text.

Writes llmcourse/expected/python_docs.json beside the result, for lab 04.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import llmcourse
from benchmarks.harness import result
from llmcourse import pipeline
from llmcourse.runtime import describe_machine

STEPS = 1000


def run() -> list[dict[str, Any]]:
    """The cpu preset on python-docs, `llmcourse pretrain --corpus python-docs --steps 1000` in one call."""
    loaded = pipeline.load("base", corpus="python-docs", steps=STEPS)
    metrics = loaded.artifact.metrics
    text = list(pipeline.corpus("python-docs", 120_000).validation["text"])
    baseline = pipeline.compression_baseline(text)
    figures = {
        "bits_per_byte": metrics["validation_bits_per_byte"],
        "xz_bits_per_byte": baseline,
        "seconds": metrics["training_seconds"],
        "steps": STEPS,
        "tokens": metrics["tokens"],
        "validation_bytes": sum(len(part.encode()) for part in text),
        "machine": describe_machine(),
    }
    path = Path(llmcourse.__file__).parent / "expected" / "python_docs.json"
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return [
        result(
            "python_docs",
            what=f"held-out documentation of this Python installation, cpu preset, {STEPS} steps",
            unit="bits/byte",
            ours=[metrics["validation_bits_per_byte"]],
            peers={"xz -9": [baseline]},
            bars={"xz -9": 1.0},
            higher_is_better=False,
            seconds=metrics["training_seconds"],
        )
    ]
