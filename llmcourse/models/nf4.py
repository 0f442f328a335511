"""4-bit weights: the NormalFloat code book, block-wise scales, scales that are quantized too, and layers on them.

A block of 64 weights is divided by its largest magnitude and each quotient replaced by the number of the nearest of 16
code values, which lie at quantiles of the normal distribution, so that for normal weights all codes are used about
alike (Dettmers et al., 2023, "QLoRA", section 3). The stored format is that of bitsandbytes, to the last bit.

Shapes: O outputs, I inputs, n = O I numbers, S = n / 64 scales.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LINEARS = ("query", "key", "value", "output", "gate", "up", "down")
"""names of the weight matrices of a block"""
OUTERMOST = 0.9677083
"""probability of the outermost quantile, the mean of 1 - 1/30 and 1 - 1/32: half a step inside of 15 and 16 values"""
SCALE_BLOCK = 256
"""scales that share one second-level scale (section 3, "double quantization")"""
BACKENDS = ("llmcourse", "bitsandbytes")


@dataclass(frozen=True, kw_only=True)
class NF4Settings:
    """How weights are stored.

    Raises:
        ValueError: the block is not an even positive number, or the backend is unknown.
    """

    block_size: int = 64
    """numbers that share one scale"""
    double_quantization: bool = True
    """scales as 8-bit codes instead of float32: 8/64 + 32/(64 256) = 0.127 instead of 0.5 bits per number"""
    backend: str = "llmcourse"
    """llmcourse: the code of this file; bitsandbytes: the library's kernels (save the adapters: its packed state does
    not fit into another model's checkpoint)"""

    def __post_init__(self) -> None:
        if self.block_size < 2 or self.block_size % 2:
            raise ValueError(f"block_size={self.block_size}: give an even number such as 64")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend={self.backend!r}: choose {' or '.join(BACKENDS)}")


@dataclass(frozen=True, kw_only=True, eq=False)
class NF4Tensor:
    """A quantized matrix; `dequantize_nf4` gives the numbers back."""

    packed: Tensor
    """two codes a byte, the earlier one in the high half: (n / 2,) uint8"""
    scales: Tensor
    """largest magnitude of each block: (S,) float32, or uint8 codes with double quantization"""
    scale_scales: Tensor | None
    """largest magnitude of each 256 centered scales, (S / 256,) float32, rounded up"""
    offset: Tensor | None
    """mean of the scales, a float32 scalar"""
    shape: tuple[int, ...]
    """of the matrix"""
    block_size: int
    """numbers that share one scale"""

    @property
    def n_bytes(self) -> int:
        """Bytes that are stored: codes, scales and the scales' scales."""
        parts = (self.packed, self.scales, self.scale_scales, self.offset)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    @property
    def bits_per_parameter(self) -> float:
        """8 `n_bytes` / n: 4 + 0.127 with double quantization, 4.5 without, plus what partial blocks cost."""
        return 8 * self.n_bytes / torch.Size(self.shape).numel()


@functools.cache
@torch.inference_mode(False)
def nf4_codebook() -> Tensor:
    """The 16 code values in ascending order, from -1 to 1 with an exact 0: (16,) float32 (section 3, eq. 4).

    Eight quantiles of N(0, 1) above zero and seven below, at probabilities evenly spaced from `OUTERMOST` to 1/2, then
    divided by the largest. One more above than below, because 16 values that hold 0 cannot be symmetric. Spacing and
    division are in float32, which gives bitsandbytes' table to the last bit.
    """
    above = torch.special.ndtri(torch.linspace(OUTERMOST, 0.5, 9)[:-1].double())
    below = -torch.special.ndtri(torch.linspace(OUTERMOST, 0.5, 8)[:-1].double())
    values = torch.cat((below, torch.zeros(1, dtype=torch.float64), above)).sort().values.float()
    return values / values.max()


@functools.cache
@torch.inference_mode(False)
def dynamic_codebook() -> Tensor:
    """The 256 values of the signed 8-bit dynamic type, ascending: (256,) float32 (Dettmers et al., 2022, section 1.3).

    Decade i = 0 .. 6, from 10^(i - 7) to 10^(i - 6), holds 2^i values of each sign, in the middles of equal intervals:
    the larger the magnitude, the finer the steps. Zero and one complete them.
    """
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        middles = 10 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [middles, -middles]
    return torch.cat(values).sort().values


@functools.cache
@torch.inference_mode(False)
def _midpoints(codebook: Callable[[], Tensor], device: torch.device) -> Tensor:
    values = codebook()
    return ((values[:-1] + values[1:]) / 2).to(device)


@functools.cache
@torch.inference_mode(False)
def _table(codebook: Callable[[], Tensor], device: torch.device) -> Tensor:
    return codebook().to(device)


@functools.cache
@torch.inference_mode(False)
def _pairs(device: torch.device) -> Tensor:
    """Both values of every byte, (256, 2): one look-up decodes two weights."""
    codes = torch.arange(256)
    return torch.stack((nf4_codebook()[codes >> 4], nf4_codebook()[codes & 15]), dim=1).to(device)


def quantize_blocks(values: Tensor, codebook: Callable[[], Tensor], block_size: int) -> tuple[Tensor, Tensor]:
    """Nearest codes of `values` after each block is divided by its largest magnitude.

    values (n,) float -> codes (n,) uint8, scales (n / block_size, rounded up) float32. `codebook` is a function that
    returns the ascending values, such as `nf4_codebook`. A block of zeros gets scale 0 and codes that decode to 0.
    """
    n = values.numel()
    blocks = F.pad(values.float(), (0, -n % block_size)).view(-1, block_size)
    scales = blocks.abs().amax(dim=1)  # (S,)
    relative = (blocks * (1.0 / scales.clamp(min=1e-38))[:, None]).clamp(-1, 1)
    codes = torch.bucketize(relative, _midpoints(codebook, values.device))
    return codes.to(torch.uint8).view(-1)[:n], scales


def quantize_nf4(weight: Tensor, settings: NF4Settings | None = None) -> NF4Tensor:
    """Store a matrix in about 4.13 bits per number: weight (O, I) float -> `NF4Tensor`.

    Raises:
        ValueError: the weights are not floating-point, empty, or not finite.
    """
    settings = settings or NF4Settings()
    if not weight.is_floating_point() or not weight.numel():
        raise ValueError(
            f"a {weight.dtype} tensor of shape {tuple(weight.shape)}: give non-empty float weights"
        )
    if not bool(weight.isfinite().all()):
        raise ValueError("the weights hold NaN or infinity: check the checkpoint before it is quantized")
    codes, scales = quantize_blocks(weight.detach().reshape(-1), nf4_codebook, settings.block_size)
    if codes.numel() % 2:  # the last byte's second half is filled with the code of zero
        codes = F.pad(codes, (0, 1), value=7)
    second = offset = None
    if settings.double_quantization:
        offset = scales.mean()
        scales, second = quantize_blocks(scales - offset, dynamic_codebook, SCALE_BLOCK)
    return NF4Tensor(
        packed=codes[::2] << 4 | codes[1::2],
        scales=scales,
        scale_scales=second,
        offset=offset,
        shape=tuple(weight.shape),
        block_size=settings.block_size,
    )


def dequantize_scales(quantized: NF4Tensor) -> Tensor:
    """The blocks' scales, (S,) float32, with the second level undone: code value x second scale + mean."""
    return _decode_scales(quantized, _table(dynamic_codebook, quantized.scales.device))


def dequantize_nf4(quantized: NF4Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers that the codes stand for, code value x scale in float32, then in `dtype`: (O, I)."""
    device = quantized.packed.device
    return _decode(quantized, _pairs(device), _table(dynamic_codebook, device), dtype)


def _decode_scales(quantized: NF4Tensor, steps: Tensor) -> Tensor:
    if quantized.scale_scales is None:
        return quantized.scales
    values = steps[quantized.scales.int()]  # (S,)
    spread = quantized.scale_scales.repeat_interleave(SCALE_BLOCK)[: len(values)]
    return values * spread + quantized.offset


def _decode(quantized: NF4Tensor, pairs: Tensor, steps: Tensor, dtype: torch.dtype) -> Tensor:
    """`dequantize_nf4` with the tables given, the look-ups that a compiler can see through."""
    n = torch.Size(quantized.shape).numel()
    size = quantized.block_size
    values = F.embedding(quantized.packed.int(), pairs).view(-1)[:n]
    blocks = F.pad(values, (0, -n % size)).view(-1, size) * _decode_scales(quantized, steps)[:, None]
    return blocks.view(-1)[:n].view(quantized.shape).to(dtype)


class _FrozenProduct(torch.autograd.Function):
    """x W^T whose backward decodes W again: autograd would keep every decoded matrix until then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: NF4Linear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.decoded_weight(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.decoded_weight(gradient.dtype), None


class NF4Linear(nn.Module):
    """A linear layer without bias whose weight is stored in NF4 and never trained.

    Each use decodes the matrix into the input's dtype, forward and backward; only the codes stay in memory.
    `.to(dtype)` leaves the stored numbers as they are.

    Raises:
        ValueError: the layer has a bias, or its weights cannot be quantized.
    """

    def __init__(self, linear: nn.Linear, settings: NF4Settings | None = None) -> None:
        super().__init__()
        if linear.bias is not None:
            raise ValueError("the linear layer has a bias: the models here have none, so add it outside")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        quantized = quantize_nf4(linear.weight, settings)
        self.block_size = quantized.block_size
        for name in ("packed", "scales", "scale_scales", "offset"):
            self.register_buffer(name, getattr(quantized, name))
        device = linear.weight.device
        self.register_buffer("pairs", _pairs(device), persistent=False)  # of all layers one tensor
        self.register_buffer("steps", _table(dynamic_codebook, device), persistent=False)

    @property
    def quantized(self) -> NF4Tensor:
        """The stored matrix."""
        return NF4Tensor(
            packed=self.packed,
            scales=self.scales,
            scale_scales=self.scale_scales,
            offset=self.offset,
            shape=(self.out_features, self.in_features),
            block_size=self.block_size,
        )

    def decoded_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The decoded matrix (O, I)."""
        return _decode(self.quantized, self.pairs, self.steps, dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> NF4Linear:
        kept = {name: part for name, part in self._buffers.items() if part is not None}
        super()._apply(fn, recurse)
        for name, part in kept.items():  # a change of dtype is for activations: scales stay float32
            self._buffers[name] = part.to(self._buffers[name].device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) -> (..., O) in x's or autocast's dtype; gradients reach x, not the weight."""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        return _FrozenProduct.apply(x, self)

    def extra_repr(self) -> str:
        """The sizes, for printing the model."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, block_size={self.block_size}"
        )


def bitsandbytes_linear(linear: nn.Linear, settings: NF4Settings) -> nn.Module:
    """The same layer as bitsandbytes' `Linear4bit`, quantized where its weights lie, on CPU or GPU.

    On CPUs with AVX512-BF16 instructions version 0.50 would repack the weights at the first evaluation, compute in
    bfloat16 and refuse widths that are not multiples of 32; that is switched off, so that both backends agree.

    Raises:
        ValueError: bitsandbytes is not installed or does not support the device.
    """
    # of the kernel that is switched off below
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError(
            f"backend='bitsandbytes' cannot be imported ({error}): pip install bitsandbytes"
        ) from None
    options = {
        "compress_statistics": settings.double_quantization,
        "quant_type": "nf4",
        "blocksize": settings.block_size,
    }
    weight = linear.weight.detach()
    layer = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, quant_type="nf4", device="meta"
    )
    layer.weight = bitsandbytes.nn.Params4bit(weight.clone(), requires_grad=False, module=layer, **options)
    layer.support_avx512bf16_for_cpu = False
    try:
        return layer.to(weight.device)
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        raise ValueError(
            f"bitsandbytes cannot quantize on {weight.device} ({error}): use backend='llmcourse'"
        ) from error


def frozen_weight(layer: nn.Module) -> Tensor:
    """The weight (O, I) that a plain, an NF4 or a bitsandbytes layer multiplies with, decoded if need be."""
    if isinstance(layer, NF4Linear):
        return layer.decoded_weight()
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return layer.weight
    import bitsandbytes.functional

    return bitsandbytes.functional.dequantize_4bit(layer.weight.data, state)


def is_quantized(layer: nn.Module) -> bool:
    """Whether the layer stores codes instead of numbers, ours or bitsandbytes'."""
    return (
        isinstance(layer, NF4Linear)
        or getattr(getattr(layer, "weight", None), "quant_state", None) is not None
    )


def quantize_model(
    model: nn.Module, settings: NF4Settings | None = None, *, targets: Sequence[str] = LINEARS
) -> nn.Module:
    """Replace the named linear layers of all blocks, in place; returns the model, with nothing left trainable.

    Embeddings, head and norms keep their dtype. QLoRA is `add_lora(quantize_model(model), ...)`.

    Raises:
        ValueError: no layer has such a name (adapters must be added after, not before).
    """
    settings = settings or NF4Settings()
    found = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and name.split(".")[-1] in targets
    }
    if not found:
        raise ValueError(
            f"no plain linear layer is named {', '.join(targets)}: quantize before adapters are added"
        )
    make = NF4Linear if settings.backend == "llmcourse" else bitsandbytes_linear
    for name, module in found.items():
        model.set_submodule(name, make(module, settings))
    return model.requires_grad_(False)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights as they are stored, shared tensors once; code books, the same for all layers, not
    counted."""
    seen: dict[tuple[int, int], int] = {}
    for layer in model.modules():
        parts = [*layer.parameters(recurse=False)]
        kept = set(layer._buffers) - layer._non_persistent_buffers_set
        parts += [part for name, part in layer.named_buffers(recurse=False) if name in kept]
        for part in parts:
            for piece in _pieces(part):
                seen[piece.data_ptr(), piece.numel()] = piece.numel() * piece.element_size()
    return sum(seen.values())


def _pieces(part: Tensor) -> list[Tensor]:
    """The tensor, and with bitsandbytes its scales, which hang on it as an attribute."""
    state = getattr(part, "quant_state", None)
    if state is None:
        return [part]
    second = [state.state2.absmax, state.offset] if state.nested else []
    return [part, state.absmax, *second]
