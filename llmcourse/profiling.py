"""Where a step's time and memory go: torch.profiler's record as tables, a trace file, and a memory timeline."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from llmcourse.runtime import synchronize

STEP = "llmcourse.step"  # the range that wraps each profiled step
GROUPS = ("matmul", "attention", "normalization and element-wise", "optimizer", "copy", "outside operators")
# Fragments of operator names, looked for in this order.
FRAGMENTS = {
    "attention": ("scaled_dot_product", "flash_attn", "efficient_attention", "_attention"),
    "matmul": ("::mm", "addmm", "bmm", "::matmul", "::linear", "gemm", "_linear", "einsum", "mkldnn_rnn"),
    "copy": ("copy", "::to", "clone", "contiguous", "::cat", "::stack", "memcpy", "::fill_", "::zero"),
}


@dataclass(frozen=True, kw_only=True)
class Operator:
    """One operator of a step, all its calls together."""

    name: str
    """as the profiler calls it: aten::mm, a fused kernel, a range"""
    group: str
    """one of `GROUPS`"""
    seconds: float
    """time in the operator itself, without the operators that it called, per step"""
    share: float
    """part of all operators' time, 0 to 1"""
    calls: float
    """calls per step"""
    flops: float
    """FLOPs per step that torch counts from the shapes (products and convolutions), else 0"""


@dataclass(frozen=True, kw_only=True)
class MemoryTimeline:
    """Bytes that tensors hold over time, relative to where the timeline begins; draw it with `plotting.lines`."""

    seconds: np.ndarray
    """times of allocations and frees since the first step began, (n,) float64"""
    bytes: np.ndarray
    """bytes held right after each, (n,) int64; what was there before is 0 on the CPU, and counted on CUDA"""

    @property
    def peak(self) -> int:
        """Most bytes held at once."""
        return int(self.bytes.max(initial=0))

    def sampled(self, points: int = 400) -> MemoryTimeline:
        """At most `points` places: the highest of each stretch of equally many, so that no peak is lost.

        Raises:
            ValueError: `points` below 1.
        """
        if points < 1:
            raise ValueError(f"points={points}: give at least 1")
        if len(self.seconds) <= points:
            return self
        parts = np.array_split(np.arange(len(self.seconds)), points)
        chosen = np.array([part[np.argmax(self.bytes[part])] for part in parts])
        return MemoryTimeline(seconds=self.seconds[chosen], bytes=self.bytes[chosen])


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What `profile_steps` found, per step."""

    operators: list[Operator]
    """by own time, longest first"""
    seconds: float
    """time of all operators together, per step: on CUDA of the kernels, on the CPU of the calling thread"""
    timeline: MemoryTimeline
    """tensor memory over all profiled steps"""
    trace: Path | None
    """Chrome trace (.json.gz), for https://ui.perfetto.dev or chrome://tracing; `None` if no folder was given"""

    def top(self, n: int = 10) -> list[Operator]:
        """The n operators that take longest."""
        return self.operators[:n]

    def groups(self) -> dict[str, float]:
        """Seconds per step of each group, in the order of `GROUPS`; they sum to `seconds`."""
        totals = dict.fromkeys(GROUPS, 0.0)
        for operator in self.operators:
            totals[operator.group] += operator.seconds
        return totals


def profile_steps(
    step: Callable[[], Any],
    warmup: int = 2,
    active: int = 3,
    folder: Path | str | None = None,
    *,
    device: torch.device | None = None,
) -> Profile:
    """Profile `active` calls of `step` after `warmup` calls that are not recorded.

    Recording costs time itself (shapes and memory are recorded), so read shares from it and take seconds from a clock.

    Args:
        step: one training step; called without arguments.
        warmup: calls before recording, in which compilation and first allocations happen.
        active: calls recorded.
        folder: where to write trace.json.gz; made if missing.
        device: whose time counts; on CUDA kernels are timed and the allocator's events give the timeline.

    Raises:
        ValueError: `warmup` below 0 or `active` below 1.
    """
    if warmup < 0 or active < 1:
        raise ValueError(f"warmup={warmup}, active={active}: give at least 0 and at least 1")
    device = device or torch.device("cpu")
    for _ in range(warmup):
        step()
    synchronize(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(
        activities=activities, record_shapes=True, profile_memory=True, with_flops=True
    ) as recording:
        for _ in range(active):
            with record_function(STEP):
                step()
                synchronize(device)
    operators, seconds = _operators(recording, device, active)
    return Profile(
        operators=operators,
        seconds=seconds,
        timeline=_timeline(recording, device, before),
        trace=_export(recording, folder),
    )


def group_of(name: str, parents: tuple[str, ...] = ()) -> str:
    """The group of an operator by its name and the ranges it ran in, innermost first.

    What an optimizer calls is the optimizer's, whatever it is; the step's own range is time outside operators.
    """
    lineage = (name, *parents)
    if any(part.startswith("Optimizer.") for part in lineage) or "_fused_adam" in name:
        return "optimizer"
    if name == STEP or name.startswith(("cuda", "cu", "ProfilerStep")):
        return "outside operators"
    if any(fragment in part for part in lineage for fragment in FRAGMENTS["attention"]):
        return "attention"
    for group in ("matmul", "copy"):
        if any(fragment in name for fragment in FRAGMENTS[group]):
            return group
    return "normalization and element-wise"


def _operators(recording: profile, device: torch.device, active: int) -> tuple[list[Operator], float]:
    """Operators' own time summed over events of one name and group."""
    times: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])  # seconds, calls, flops
    for event in recording.events():
        if event.device_type != torch.autograd.DeviceType.CPU or event.name == "[memory]":
            continue
        on_device = device.type == "cuda"
        micros = event.self_device_time_total if on_device else event.self_cpu_time_total
        entry = times[event.name, group_of(event.name, _parents(event))]
        entry[0] += micros / 1e6 / active
        entry[1] += 1 / active
        entry[2] += (event.flops or 0) / active
    total = sum(entry[0] for entry in times.values())
    operators = [
        Operator(
            name=name,
            group=group,
            seconds=entry[0],
            share=entry[0] / total if total else 0.0,
            calls=entry[1],
            flops=entry[2],
        )
        for (name, group), entry in times.items()
    ]
    return sorted(operators, key=lambda operator: -operator.seconds), total


def _parents(event: Any) -> tuple[str, ...]:
    names = []
    while (event := event.cpu_parent) is not None:
        names.append(event.name)
    return tuple(names)


def _timeline(recording: profile, device: torch.device, before: int) -> MemoryTimeline:
    """Allocations and frees on `device`, in order of time, summed up from `before` bytes."""
    wanted = torch.autograd.DeviceType.CUDA if device.type == "cuda" else torch.autograd.DeviceType.CPU
    events = recording.profiler.kineto_results.events()
    found = sorted(
        (event.start_ns(), event.nbytes())
        for event in events
        if event.name() == "[memory]" and event.device_type() == wanted
    )
    began = min((event.start_ns() for event in events if event.name() == STEP), default=0)
    times = np.array([time - began for time, _ in found], dtype=np.float64) / 1e9
    changes = np.array([change for _, change in found], dtype=np.int64)
    return MemoryTimeline(seconds=times, bytes=before + np.cumsum(changes, dtype=np.int64))


def _export(recording: profile, folder: Path | str | None) -> Path | None:
    if folder is None:
        return None
    path = Path(folder) / "trace.json.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name("unfinished.json.gz")
    recording.export_chrome_trace(str(unfinished))
    unfinished.replace(path)
    return path
