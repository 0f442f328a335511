"""The `gpu` preset on one CUDA device: MFU with torch.compile against the measured bf16 matmul rate, and a profile."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import result
from llmcourse import accounting, runtime
from llmcourse.data.packing import PackedBatches
from llmcourse.data.token_stream import TokenStream
from llmcourse.training import pretraining
from llmcourse.training.fit import fit

STEPS = 60
SKIPPED = 20


def random_stream(vocab_size: int, n_tokens: int) -> TokenStream:
    """Tokens without meaning: speed does not depend on the text."""
    ids = np.random.default_rng(0).integers(8, vocab_size, n_tokens).astype(np.uint16)
    offsets = np.arange(0, n_tokens + 1, 512, dtype=np.int64)
    return TokenStream(ids[: offsets[-1]], offsets, 0, vocab_size)


def measure(device: torch.device, steps: int = STEPS, **changes: Any) -> dict[str, Any]:
    """Train the preset for `steps` and return its median tokens/s, MFU, peak bytes and the profiler's top operators.

    On a CPU, with small sizes in `changes`, this is the dry run that tests the path without a GPU.
    """
    settings = pretraining.gpu(steps=steps, warmup_steps=1, eval_every=0, checkpoint_every=0, **changes)
    stream = random_stream(settings.vocab_size, max(200_000, 2 * settings.tokens // steps))
    model = pretraining.new_model(settings, settings.vocab_size, device)
    batches = PackedBatches(
        stream,
        batch_size=settings.batch_size,
        context_length=settings.model.context_length,
        seed=0,
    )
    skipped = min(SKIPPED, steps // 2)
    done = fit(model, batches, pretraining.next_token_loss, settings.fit)
    rates = [record["units_per_second"] for record in done.records[skipped:]]
    dtype = runtime.precision_dtype(settings.fit.precision, device) or torch.float32
    peak = runtime.matmul_flops(device, dtype, size=None if device.type == "cuda" else 256)
    rate = statistics.median(rates)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as profiled:
        fit(
            model, batches, pretraining.next_token_loss, pretraining.gpu(steps=3, eval_every=0, **changes).fit
        )
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = sorted(profiled.key_averages(), key=lambda event: -getattr(event, key))[:15]
    return {
        "tokens_per_second": rates,
        "mfu": accounting.model_flops_utilization(model.config, rate, peak),
        "matmul_flops": peak,
        "peak_bytes": done.peak_bytes,
        "parameters": accounting.count_parameters(model.config),
        "profile": [
            {"operator": e.key[:80], "microseconds": getattr(e, key), "calls": e.count} for e in events
        ],
        "loss": [done.records[0]["loss"], done.records[-1]["loss"]],
    }


def run() -> list[dict[str, Any]]:
    """MFU of at least half the device's own bf16 matrix-product rate."""
    measured = measure(torch.device("cuda"), compile="on", precision="bf16")
    return [
        result(
            "gpu_pretraining",
            what="pre-training of the gpu preset, bf16, torch.compile: share of the measured bf16 matmul rate",
            unit="MFU",
            ours=[measured.pop("mfu")],
            least=0.5,
            **measured,
        )
    ]
