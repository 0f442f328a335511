"""The machine's roofline, measured: memory bandwidth, matrix-product rate by dtype and size, and what follows from
them.

The model (Williams, Waterman and Patterson, 2009): a kernel of `flops` operations that moves `bytes` takes at least
max(flops / peak, bytes / bandwidth) seconds, so its rate is at most min(peak, intensity x bandwidth).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmcourse.accounting import (
    Product,
    count_parameters,
    element_wise_bytes,
    matrix_products,
    newton_schulz_bytes,
    newton_schulz_products,
    shape_of,
)
from llmcourse.runtime import has_fast_bf16, matmul_flops, synchronize

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
COLD_BYTES = (
    2**26
)  # operands together exceed a CPU's cache, so that a measured product finds them as a step does
CLIP_BYTES = 12  # a parameter's gradient: read for the norm, read and written for the scale
ADAMW_BYTES = 28  # read weight, gradient, two moments; write weight and moments, float32
MUON_BYTES = (
    64  # momentum and Nesterov 28, stack 8, cast down and back 12, decay 8, update 8, rounded to whole values
)


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """A device's two ceilings.

    Raises:
        ValueError: a rate that is not positive, or no peak.
    """

    bandwidth: float
    """bytes per second to and from main memory"""
    peak: dict[str, float]
    """dtype name -> FLOP/s of a large matrix product"""

    def __post_init__(self) -> None:
        if not self.peak:
            raise ValueError("peak={}: give at least one dtype's FLOP/s")
        for name, value in {"bandwidth": self.bandwidth, **self.peak}.items():
            if not value > 0:
                raise ValueError(f"{name}={value}: give a positive rate")

    def ridge(self, dtype: str) -> float:
        """Intensity in FLOPs per byte at which a kernel of that dtype stops being bound by memory."""
        return self._peak(dtype) / self.bandwidth

    def attainable(self, intensity: float, dtype: str) -> float:
        """Highest FLOP/s of a kernel with that many FLOPs per byte.

        Raises:
            ValueError: an intensity below 0, or a dtype that was not measured.
        """
        if intensity < 0:
            raise ValueError(f"intensity={intensity}: give FLOPs per byte, at least 0")
        return min(self._peak(dtype), intensity * self.bandwidth)

    def seconds(self, flops: float, bytes: float, dtype: str) -> float:
        """Least time of a kernel: the larger of its arithmetic's and its memory traffic's."""
        return max(flops / self._peak(dtype), bytes / self.bandwidth)

    def _peak(self, dtype: str) -> float:
        if dtype not in self.peak:
            raise ValueError(f"dtype={dtype!r} was not measured: choose one of {', '.join(self.peak)}")
        return self.peak[dtype]


@dataclass(frozen=True, kw_only=True)
class StepPrediction:
    """Predicted seconds of one optimizer step, by what they are spent on."""

    parts: dict[str, float]
    """forward products, backward products, element-wise, optimizer, orthogonalization (Muon) -> seconds"""
    products: dict[str, float]
    """name of a product -> seconds of its forward and backward calls"""

    @property
    def seconds(self) -> float:
        """The sum."""
        return sum(self.parts.values())


def measure_bandwidth(
    device: torch.device | None = None, n_bytes: int | None = None, seconds: float = 0.4
) -> dict[str, float]:
    """Bytes per second of a copy (read and write) and of a triad a = b + s c (two reads and a write), the best of many.

    `n_bytes` is the size of one array: by default 256 MB (1 GB on CUDA), beyond any cache. Smaller arrays measure a
    cache. Computed as STREAM does (McCalpin, 1995): traffic that a write-allocate cache adds is not counted.

    Raises:
        ValueError: arrays of less than 4 KiB.
    """
    device = device or torch.device("cpu")
    n_bytes = n_bytes or (2**30 if device.type == "cuda" else 2**28)
    if n_bytes < 4096:
        raise ValueError(f"n_bytes={n_bytes}: give at least 4096, or the call itself is all one measures")
    a, b, c = (torch.ones(n_bytes // 4, device=device) for _ in range(3))
    kernels: dict[str, tuple[Callable[[], Any], int]] = {
        "copy": (lambda: a.copy_(b), 2),
        "triad": (lambda: torch.add(b, c, alpha=3.0, out=a), 3),
    }
    size = 4 * a.numel()
    return {
        name: arrays * size / min(_timed(kernel, device, seconds / 2))
        for name, (kernel, arrays) in kernels.items()
    }


def matmul_rates(
    device: torch.device | None = None,
    dtypes: Sequence[str] = ("fp32", "bf16"),
    sizes: Sequence[int] = (64, 128, 256, 512, 1024),
    seconds: float = 0.1,
) -> dict[str, dict[int, float]]:
    """Measured FLOP/s of square matrix products: dtype name -> size -> rate.

    Raises:
        ValueError: an unknown dtype name.
    """
    device = device or torch.device("cpu")
    return {
        name: {size: matmul_flops(device, _dtype(name), size, seconds) for size in sizes} for name in dtypes
    }


def measure_roofline(
    device: torch.device | None = None, dtypes: Sequence[str] = ("fp32", "bf16"), seconds: float = 0.5
) -> Roofline:
    """Measure both ceilings: the triad's bandwidth, and a large product's rate in each dtype.

    Raises:
        ValueError: an unknown dtype name.
    """
    device = device or torch.device("cpu")
    peaks = {name: matmul_flops(device, _dtype(name), seconds=seconds) for name in dtypes}
    return Roofline(bandwidth=measure_bandwidth(device, seconds=seconds)["triad"], peak=peaks)


def product_seconds(
    product: Product, dtype: str = "bf16", device: torch.device | None = None, seconds: float = 0.03
) -> dict[str, float]:
    """Measured seconds of one call of a product: forward, and the backward pass's two.

    For Y = X W^T with W (n, k): dX = dY W and dW = dY^T X. For two activations, Y = A B: dA = dY B^T and dB = A^T dY.
    The operands take turns, so that a call does not find them in the cache where the call before left them.

    Returns:
        forward, input_gradient, weight_gradient -> median seconds.
    """
    device = device or torch.device("cpu")
    kind = _dtype(dtype)
    size = product.values // product.count * kind.itemsize
    copies = max(1, min(8, COLD_BYTES // size))
    sets = [_operands(product, kind, device) for _ in range(copies)]
    if product.weight:
        calls = {
            "forward": lambda x, w, y: x @ w.mT,
            "input_gradient": lambda x, w, y: y @ w,
            "weight_gradient": lambda x, w, y: y.mT @ x,
        }
    else:
        calls = {
            "forward": lambda x, w, y: x @ w.mT,  # as keys are laid out: rows are positions
            "input_gradient": lambda x, w, y: y @ w,
            "weight_gradient": lambda x, w, y: x.mT @ y,
        }
    return {
        name: statistics.median(_timed(_in_turn(call, sets), device, seconds)) for name, call in calls.items()
    }


def exponential_bandwidth(
    dtype: str = "bf16", device: torch.device | None = None, seconds: float = 0.03
) -> float:
    """Bytes read and written per second by a softmax over rows of 256: bound by its exponentials on a CPU.

    Raises:
        ValueError: an unknown dtype name.
    """
    device = device or torch.device("cpu")
    x = torch.randn(2**13, 256, device=device).to(_dtype(dtype))
    median = statistics.median(_timed(lambda: x.softmax(dim=-1), device, seconds))
    return 2 * x.nbytes / median


def predict_step(
    config: Any,
    batch: int,
    context: int | None = None,
    *,
    device: torch.device | None = None,
    precision: str = "bf16",
    optimizer: str = "muon",
    bandwidth: float | None = None,
    seconds: float = 0.03,
) -> StepPrediction:
    """Seconds of one compiled training step of this course's model, from rates measured at the sizes that it has.

    Each distinct product is timed alone, forward and backward; exponentials run at a softmax's measured rate, all other
    element-wise work and the optimizer at memory bandwidth; nothing overlaps.
    Calls between kernels cost nothing here: small models on fast GPUs take longer.

    Args:
        config: a `ModelConfig` or shape of our family.
        batch: rows of the batch.
        context: tokens of a row; `None` is the model's context length.
        device: where to measure.
        precision: "bf16" or "fp32", what the products are computed in.
        optimizer: "adamw" or "muon".
        bandwidth: bytes per second; `None` measures the triad's.
        seconds: how long each product is timed.

    Raises:
        ValueError: an unknown precision or optimizer, or a mixture of experts.
    """
    if precision not in ("bf16", "fp32"):
        raise ValueError(f"precision={precision!r}: choose bf16 or fp32")
    if optimizer not in ("adamw", "muon"):
        raise ValueError(f"optimizer={optimizer!r}: choose adamw or muon")
    device = device or torch.device("cpu")
    shape = shape_of(config)
    context = context or shape.context_length
    bandwidth = bandwidth or measure_bandwidth(device, seconds=0.3)["triad"]
    width = _dtype(precision).itemsize
    forward, backward, by_name = 0.0, 0.0, {}
    for product in matrix_products(shape, batch, context):
        call = product_seconds(product, precision, device, seconds)
        there, back = (
            product.count * call["forward"],
            product.count * (call["input_gradient"] + call["weight_gradient"]),
        )
        forward, backward = forward + there, backward + back
        by_name[product.name] = by_name.get(product.name, 0.0) + there + back
    moved = element_wise_bytes(shape, batch, context, bytes_per_value=width)
    exponentials = moved.pop("exponentials") / exponential_bandwidth(precision, device, seconds)
    casts = (4 + width) * count_parameters(shape) if width < 4 else 0
    parts = {
        "forward products": forward,
        "backward products": backward,
        "element-wise": (sum(moved.values()) + casts) / bandwidth + exponentials,
        "optimizer": optimizer_bytes(shape, optimizer) / bandwidth,
    }
    if optimizer == "muon":
        low = "bf16" if has_fast_bf16(device) else "fp32"
        parts["optimizer"] += newton_schulz_bytes(shape, bytes_per_value=_dtype(low).itemsize) / bandwidth
        parts["orthogonalization"] = sum(
            product.count * product_seconds(product, low, device, seconds)["forward"]
            for product in newton_schulz_products(shape)
        )
    return StepPrediction(parts=parts, products=by_name)


def optimizer_bytes(config: Any, optimizer: str) -> int:
    """Bytes that clipping and the update move: Muon for hidden matrices, AdamW for the rest or for everything."""
    shape = shape_of(config)
    ends = count_parameters(shape) - count_parameters(shape, embeddings=False)
    hidden = count_parameters(shape, embeddings=False) if optimizer == "muon" else 0
    rest = count_parameters(shape) - hidden if optimizer == "adamw" else ends
    return CLIP_BYTES * count_parameters(shape) + MUON_BYTES * hidden + ADAMW_BYTES * rest


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"dtype={name!r}: choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _operands(product: Product, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """X (batch, m, k), W (batch, n, k), Y (batch, m, n); without the batch axis for one product."""
    stack = () if product.weight else (product.batch,)
    shapes = ((product.m, product.k), (product.n, product.k), (product.m, product.n))
    x, w, y = (torch.randn(*stack, *shape, device=device).to(dtype) for shape in shapes)
    return x, w, y


def _in_turn(call: Callable[..., Tensor], sets: Sequence[tuple[Tensor, ...]]) -> Callable[[], Tensor]:
    """A function that calls with the next operands each time."""
    turn = -1

    def run() -> Tensor:
        nonlocal turn
        turn = (turn + 1) % len(sets)
        return call(*sets[turn])

    return run


def _timed(kernel: Callable[[], Any], device: torch.device, seconds: float) -> list[float]:
    """Seconds of single calls, at least three, for about `seconds` after a warm-up call."""
    kernel()
    times: list[float] = []
    synchronize(device)
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        kernel()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return times
