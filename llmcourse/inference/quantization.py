"""Weight-only quantization for inference: integers of few bits with a scale a row or a group, by rounding or by GPTQ.

A row of weights, or a group of `group_size` of them, is divided by a scale and rounded. What that costs is not the
error of the weights but that of the outputs on the inputs that really come, so `layer_errors` measures it on a
calibration set, and GPTQ (Frantar et al., 2023) minimizes it: it rounds one input column at a time and moves what it
lost into the columns that are not rounded yet, as the correlations of the inputs say.

Shapes: O outputs, I inputs, G = I / group_size groups, M calibration tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmcourse.models.transformer import Transformer

BITS = (4, 8)
METHODS = ("round", "gptq")


@dataclass(frozen=True, kw_only=True)
class QuantizationSettings:
    """How weights are stored.

    Raises:
        ValueError: a number of bits or a method that is not there, or a group that is not positive.
    """

    bits: int = 8
    """8 or 4"""
    group_size: int | None = None
    """weights of a row that share a scale; `None`: the whole row"""
    method: str = "round"
    """round: to the nearest; gptq: with calibration inputs"""
    damping: float = 0.01
    """gptq: share of the mean diagonal that is added to the inputs' second moments"""

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits={self.bits}: choose {' or '.join(map(str, BITS))}")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size={self.group_size}: give at least 1, or None for the whole row")
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r}: choose {' or '.join(METHODS)}")
        if not self.damping > 0:
            raise ValueError(f"damping={self.damping}: give a positive share")

    def groups(self, n_inputs: int) -> int:
        """Groups of a row.

        Raises:
            ValueError: the row does not divide into groups.
        """
        size = self.group_size or n_inputs
        if n_inputs % size:
            raise ValueError(
                f"group_size={size} does not divide the {n_inputs} inputs of a layer: choose a divisor"
            )
        return n_inputs // size

    def bits_per_weight(self, n_inputs: int) -> float:
        """Stored bits of a weight, its share of a 16-bit scale included."""
        return self.bits + 16 * self.groups(n_inputs) / n_inputs


def scales_of(weight: Tensor, settings: QuantizationSettings) -> Tensor:
    """weight (O, I) -> scales (O, G) in float32: the largest magnitude of a group over the largest integer."""
    groups = weight.float().reshape(weight.shape[0], settings.groups(weight.shape[1]), -1)
    largest = 2 ** (settings.bits - 1) - 1
    return (groups.abs().amax(dim=-1) / largest).clamp(min=1e-12)


def round_to_scale(weight: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The integers (O, I) int8 of weight (O, I) for scales (O, G)."""
    largest = 2 ** (bits - 1) - 1
    wide = scales.repeat_interleave(weight.shape[1] // scales.shape[1], dim=1)
    return (weight.float() / wide).round().clamp(-largest, largest).to(torch.int8)


def dequantize(integers: Tensor, scales: Tensor) -> Tensor:
    """Integers (O, I) and scales (O, G) -> weights (O, I) float32."""
    return integers * scales.repeat_interleave(integers.shape[1] // scales.shape[1], dim=1)


def gptq(weight: Tensor, second_moment: Tensor, settings: QuantizationSettings) -> tuple[Tensor, Tensor]:
    """Integers (O, I) and scales (O, G) that keep the outputs on the calibration inputs close (Frantar et al., 2023,
    algorithm 1, columns in the given order).

    Args:
        weight: (O, I).
        second_moment: (I, I), mean of x x^T over the inputs.
        settings: bits, groups, damping.
    """
    work = weight.double().clone()
    n_inputs = work.shape[1]
    size = settings.group_size or n_inputs
    settings.groups(n_inputs)
    H = second_moment.double()
    H = H + settings.damping * H.diagonal().mean().clamp(min=1e-12) * torch.eye(
        n_inputs, dtype=H.dtype, device=H.device
    )
    # rows of the upper Cholesky factor of H^-1: how the columns behind take over the error of one
    spread = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    integers = torch.zeros(weight.shape, dtype=torch.int8, device=weight.device)
    scales = []
    for column in range(n_inputs):
        if column % size == 0:
            scales.append(
                scales_of(work[:, column : column + size].float(), QuantizationSettings(bits=settings.bits))
            )
        q = round_to_scale(work[:, column : column + 1], scales[-1], settings.bits)
        error = (work[:, column] - dequantize(q, scales[-1])[:, 0]) / spread[column, column]
        work[:, column + 1 :] -= error[:, None] * spread[column, column + 1 :]
        integers[:, column] = q[:, 0]
    return integers, torch.cat(scales, dim=1)


class QuantizedLinear(nn.Module):
    """A linear layer without bias whose weights are stored as integers; they are multiplied out when it runs."""

    def __init__(
        self, integers: Tensor, scales: Tensor, bits: int, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.bits, self.dtype = bits, dtype
        self.in_features, self.out_features = integers.shape[1], integers.shape[0]
        self.register_buffer("stored", pack(integers) if bits == 4 else integers)
        self.register_buffer("scales", scales.half() if _fits_half(scales) else scales)

    @property
    def weight(self) -> Tensor:
        """The weights that it stands for, (O, I)."""
        integers = unpack(self.stored, self.in_features) if self.bits == 4 else self.stored
        return dequantize(integers, self.scales.float()).to(self.dtype)

    @property
    def bytes(self) -> int:
        """Size of what is stored."""
        return self.stored.nbytes + self.scales.nbytes

    def forward(self, x: Tensor) -> Tensor:
        """x (.., I) -> (.., O)."""
        return F.linear(x, self.weight.to(x.dtype))


def pack(integers: Tensor) -> Tensor:
    """Two 4-bit integers a byte: (O, I) int8 in -8 .. 7 -> (O, ceil(I / 2)) uint8, the earlier one in the low half."""
    if integers.shape[1] % 2:
        integers = F.pad(integers, (0, 1))
    low, high = (integers + 8).to(torch.uint8).view(integers.shape[0], -1, 2).unbind(dim=-1)
    return low | (high << 4)


def unpack(packed: Tensor, n_inputs: int) -> Tensor:
    """The inverse of `pack`."""
    pairs = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)
    return (pairs.to(torch.int8) - 8)[:, :n_inputs]


def block_linears(model: Transformer) -> dict[str, nn.Module]:
    """The linear layers of the blocks by name; embedding and head stay as they are."""
    return {
        name: module
        for name, module in model.blocks.named_modules(prefix="blocks")
        if isinstance(module, nn.Linear | QuantizedLinear)
    }


@torch.no_grad()
def input_moments(model: Transformer, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Mean of x x^T (I, I) over the tokens of batches (B, T) int64, for the input of every linear layer of the blocks.

    Raises:
        ValueError: no batches.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str):  # noqa: ANN202
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2).double()  # (M, I)
            sums[name] = sums.get(name, 0) + x.T @ x
            counts[name] = counts.get(name, 0) + len(x)

        return hook

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in block_linears(model).items()]
    try:
        for tokens in batches:
            model.hidden_states(tokens)
    finally:
        for handle in handles:
            handle.remove()
    if not sums:
        raise ValueError("no calibration batches: give some text of the kind that the model will see")
    return {name: total / counts[name] for name, total in sums.items()}


@torch.no_grad()
def quantize_weights(
    model: Transformer, settings: QuantizationSettings, moments: dict[str, Tensor] | None = None
) -> Transformer:
    """Replace the linear layers of a model's blocks, in place, by quantized ones.

    Raises:
        ValueError: gptq without `input_moments`, or a layer that does not divide into groups; nothing is replaced then.
    """
    layers = block_linears(model)
    if settings.method == "gptq" and moments is None:
        raise ValueError("gptq needs to know the inputs: pass moments=input_moments(model, batches)")
    for layer in layers.values():
        settings.groups(layer.in_features)
    for name, layer in layers.items():
        if settings.method == "gptq":
            integers, scales = gptq(layer.weight, moments[name], settings)
        else:
            scales = scales_of(layer.weight, settings)
            integers = round_to_scale(layer.weight, scales, settings.bits)
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(
            parent,
            name.rpartition(".")[2],
            QuantizedLinear(integers, scales, settings.bits, layer.weight.dtype),
        )
    return model


@torch.no_grad()
def layer_errors(
    original: Transformer, quantized: Transformer, moments: dict[str, Tensor]
) -> dict[str, float]:
    """Relative squared error of every layer's outputs on the calibration inputs: E|x dW|^2 / E|x W|^2."""
    theirs = block_linears(quantized)
    errors = {}
    for name, layer in block_linears(original).items():
        weight, moment = layer.weight.double(), moments[name]
        change = theirs[name].weight.double() - weight
        power = torch.einsum("oi,ij,oj->", weight, moment, weight)
        errors[name] = float(torch.einsum("oi,ij,oj->", change, moment, change) / power)
    return errors


def weight_bytes(model: Transformer) -> int:
    """Bytes of a model's weights as they are stored, a tied matrix once."""
    tensors = [*model.parameters()]
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            tensors += [module.stored, module.scales]
    return sum(tensor.nbytes for tensor in tensors)


def _fits_half(scales: Tensor) -> bool:
    return bool((scales > 1e-4).all() and (scales < 6e4).all())
