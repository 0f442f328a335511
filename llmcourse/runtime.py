"""The machine at hand: seeds, devices, precision, time, memory, progress."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import random
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import psutil
import torch
from tqdm.auto import tqdm

PRECISIONS = ("auto", "bf16", "fp32")


def set_seed(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators, CUDA's included."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def pick_device(name: str | None = None) -> torch.device:
    """The device of that name; `None` or "auto" takes CUDA, then Apple's MPS, then the CPU.

    Raises:
        ValueError: an unknown name, or a GPU is asked for and not there.
    """
    if name in (None, "auto"):
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if str(name).startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"device {name!r}: torch sees no CUDA GPU here; use device='cpu' or the preset 'cpu'"
        )
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device 'mps': torch sees no Apple GPU here; use device='cpu'")
    try:
        return torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r}: choose cpu, cuda, cuda:1, ... or mps") from None


def has_fast_bf16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 run in hardware: CUDA from Ampere on, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        cpu = torch.backends.cpu
        flags = _cpu_flags()
        return "avx512_bf16" in flags or "amx_bf16" in flags or getattr(cpu, "_has_bf16", False)
    return False


def _cpu_flags() -> frozenset[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            line = next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        return frozenset()
    return frozenset(line.split(":", 1)[-1].split())


def precision_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The autocast dtype for "fp32" (None), "bf16", or "auto": bfloat16 where the hardware multiplies it.

    Raises:
        ValueError: an unknown name.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r}: choose one of {', '.join(PRECISIONS)}")
    if precision == "fp32" or (precision == "auto" and not has_fast_bf16(device)):
        return None
    return torch.bfloat16


@contextlib.contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """On a CPU: sums in a fixed order, so that a run can be repeated bit for bit on a machine of the same kind.

    Compiled code would otherwise add up the gradient of the embedding in the order in which threads arrive.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    filled = torch.utils.deterministic.fill_uninitialized_memory
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # costs time and decides nothing here
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled


def progress(
    iterable: Iterable[Any] | None = None,
    *,
    total: int | None = None,
    description: str = "",
    unit: str = "it",
    enabled: bool = True,
) -> tqdm:
    """A tqdm bar with the time left; one line every 15 s instead where output is a log, not a terminal or notebook."""
    interactive = sys.stderr.isatty() or "ipykernel" in sys.modules
    return tqdm(
        iterable,
        total=total,
        desc=description,
        unit=unit,
        disable=not enabled,
        mininterval=0.2 if interactive else 15,
        dynamic_ncols=interactive,
        leave=interactive,
    )


class PeakMemory:
    """Context manager that measures peak memory: `.bytes` after (or during) the block.

    On CUDA it is the allocator's peak on that device. On the CPU it is the peak resident set of this process, sampled
    every `interval` seconds from the system, so a shorter spike can be missed.
    """

    def __init__(self, device: torch.device | None = None, interval: float = 0.02) -> None:
        self.device, self.interval, self.bytes = device or torch.device("cpu"), interval, 0
        self._stop = threading.Event()

    def _sample(self) -> None:
        process = psutil.Process()
        while not self._stop.is_set():
            self.bytes = max(self.bytes, process.memory_info().rss)
            self._stop.wait(self.interval)

    def read(self) -> int:
        """The peak so far, in bytes."""
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        return self.bytes

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self.bytes = psutil.Process().memory_info().rss
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.read()
        if self.device.type != "cuda":
            self._stop.set()
            self._thread.join()


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished what was queued, so that a clock read now means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def matmul_flops(
    device: torch.device, dtype: torch.dtype, size: int | None = None, seconds: float = 0.5
) -> float:
    """Measured rate of a large square matrix product in FLOP/s: the practical peak that MFU is a fraction of."""
    size = size or (8192 if device.type == "cuda" else 1536)
    generator = torch.Generator(device).manual_seed(
        0
    )  # a run's own random numbers must not depend on measuring
    a = torch.randn(size, size, device=device, dtype=dtype, generator=generator)
    b = torch.randn(size, size, device=device, dtype=dtype, generator=generator)
    best, end = 0.0, time.perf_counter() + seconds
    while best == 0.0 or time.perf_counter() < end:
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """`matmul_flops` of this process's device, measured once (about half a second)."""
    return matmul_flops(device, dtype)


def cpu_name() -> str:
    """The processor's marketing name, or what the platform calls it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def describe_machine() -> dict[str, Any]:
    """What a measurement was made on: processor, cores, memory, GPU, versions. Plain data, for JSON."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": gpu,
        "bf16_hardware": has_fast_bf16(torch.device("cuda" if gpu else "cpu")),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
