"""Exercises of chapter 11, parameter-efficient fine-tuning: LoRA, its count and merge, DoRA, NF4, virtual tokens.

Shapes: O outputs, I inputs, R rank; x (..., I), W (O, I), A (R, I), B (O, R), m (O,); of a batch of P virtual tokens
also B rows and T time.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmcourse.checks.exercise import Case, Exercise, Mutant
from llmcourse.models import adapters, lora, nf4
from llmcourse.models.lora import LoRALinear, LoRASettings
from llmcourse.models.transformer import Transformer

Batch = dict[str, Tensor]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _with_gradients_of(*positions: int) -> Callable[[Callable[..., Any], Case], Any]:
    """A `run` that also compares gradients, of half the squared result, for the arguments at these positions alone.

    The other arguments are frozen, as a base weight is: whether an answer detaches them makes no difference.
    """

    def run(answer: Callable[..., Any], case: Case) -> Any:
        args = [
            value.detach().requires_grad_() if i in positions else value for i, value in enumerate(case.args)
        ]
        value = answer(*args, **case.kwargs)
        if not isinstance(value, Tensor) or not value.requires_grad:
            return {"value": value, "gradients": "none: the result is cut off from the gradient"}
        wanted = [args[i] for i in positions]
        gradients = torch.autograd.grad(value.square().sum() / 2, wanted, allow_unused=True)
        return {
            "value": value.detach(),
            "gradients": ["no gradient" if gradient is None else gradient for gradient in gradients],
        }

    return run


def _scaling(rank: int, alpha: float, rslora: bool) -> float:
    return LoRASettings(rank=rank, alpha=alpha, rslora=rslora).scaling


def _layer(g: torch.Generator, outputs: int, inputs: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """W (O, I), A (R, I), B (O, R) as after some training, B not zero."""
    shapes = ((outputs, inputs), (rank, inputs), (outputs, rank))
    weight, a, b = (torch.randn(*shape, generator=g) for shape in shapes)
    return weight, a, b


# --- the forward pass -------------------------------------------------------------------------------------------


def lora_forward(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, alpha: float, rslora: bool = False
) -> Tensor:
    """Base and adapter beside it: x (..., I) -> (..., O); s = alpha / R, with rsLoRA alpha / sqrt(R)."""
    return F.linear(x, weight) + lora.lora_update(x, a, b, _scaling(len(a), alpha, rslora))


def _forward_cases(seed: int) -> list[Case]:
    g = _generator(seed)
    return [
        Case((torch.randn(2, 4, 5, generator=g), *_layer(g, 7, 5, 3), 6.0), name="R = 3, alpha = 6"),
        Case(
            (torch.randn(3, 8, generator=g), *_layer(g, 6, 8, 2), 5.0, True), name="R = 2, alpha = 5, rsLoRA"
        ),
        Case((torch.randn(1, 3, 4, generator=g), *_layer(g, 5, 4, 6), 2.0), name="a rank above the width"),
    ]


def _forward_with(
    *,
    scale: Callable[[Tensor, float, bool], float] = lambda a, alpha, rslora: _scaling(len(a), alpha, rslora),
    base: Callable[[Tensor], Tensor] = lambda out: out,
    into: Callable[[Tensor], Tensor] = lambda x: x,
) -> Callable[..., Tensor]:
    """The layer with its scale, the base's output, or the adapter's input changed."""

    def forward(
        x: Tensor, weight: Tensor, a: Tensor, b: Tensor, alpha: float, rslora: bool = False
    ) -> Tensor:
        s = scale(a, alpha, rslora)
        return base(F.linear(x, weight)) + s * F.linear(F.linear(into(x), a), b)

    return forward


def _everything_scaled(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, alpha: float, rslora: bool = False
) -> Tensor:
    return _scaling(len(a), alpha, rslora) * (F.linear(x, weight) + F.linear(F.linear(x, a), b))


def _not_transposed(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, alpha: float, rslora: bool = False
) -> Tensor:
    return x @ weight.T + _scaling(len(a), alpha, rslora) * (x @ a @ b)


FORWARD = Exercise(
    id="lora_forward",
    title="LoRA forward pass",
    points=2,
    reference=lora_forward,
    cases=_forward_cases,
    run=_with_gradients_of(0, 2, 3),
    rtol=1e-4,
    atol=1e-5,
    mutants=[
        Mutant(
            "no scale",
            _forward_with(scale=lambda a, alpha, rslora: 1.0),
            "You seem to leave out the scale: B A x is multiplied by alpha / R.",
        ),
        Mutant(
            "alpha alone",
            _forward_with(scale=lambda a, alpha, rslora: alpha),
            "You seem to multiply by alpha alone. Without the division by the rank, the sum over R directions grows "
            "with R, and each rank would need its own learning rate.",
        ),
        Mutant(
            "flag ignored",
            _forward_with(scale=lambda a, alpha, rslora: alpha / len(a)),
            "You seem to ignore `rslora`: with it the scale is alpha / sqrt(R).",
        ),
        Mutant(
            "always the root",
            _forward_with(scale=lambda a, alpha, rslora: alpha / len(a) ** 0.5),
            "You seem to divide by sqrt(R) always. That is rsLoRA; LoRA divides by R.",
        ),
        Mutant(
            "rank from the wrong axis",
            _forward_with(scale=lambda a, alpha, rslora: _scaling(a.shape[1], alpha, rslora)),
            "You seem to take the input width for the rank. A is (R, I): the rank is its number of rows.",
        ),
        Mutant(
            "inverted",
            _forward_with(scale=lambda a, alpha, rslora: 1 / _scaling(len(a), alpha, rslora)),
            "Your scale seems to be upside down: it is alpha over the rank.",
        ),
        Mutant(
            "update alone",
            _forward_with(base=lambda out: 0 * out),
            "You seem to return the update alone. The frozen matrix stays in the sum: x W^T + s x A^T B^T.",
        ),
        Mutant(
            "everything scaled",
            _everything_scaled,
            "You seem to scale the base's output too. Only the update is multiplied by s; with B = 0 the layer must be "
            "the base layer.",
        ),
        Mutant(
            "base without gradient",
            _forward_with(base=torch.Tensor.detach),
            "Your values are right, but the base's output is cut off from the gradient. W is frozen, yet the "
            "gradient must pass through it to x, or the layers below learn from the adapters' path alone.",
        ),
        Mutant(
            "update's input detached",
            _forward_with(into=torch.Tensor.detach),
            "Your values are right, but the adapter's input is detached: the layers below do not learn what their "
            "output does in this adapter.",
        ),
        Mutant(
            "not transposed",
            _not_transposed,
            "You seem to multiply by A and B as they are stored. A row vector is multiplied by A^T, then by B^T, as "
            "F.linear does it.",
        ),
    ],
    hints=(
        "F.linear(x, weight) + s * F.linear(F.linear(x, a), b), with the rank read off `a`; B A is never formed.",
    ),
)


# --- merging ----------------------------------------------------------------------------------------------------


def lora_merge(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """W + s B A, added in float32 and rounded once to the weight's dtype; the weight itself stays as it is."""
    return lora.lora_weight(weight, a, b, scaling).to(weight.dtype)


def _merge_cases(seed: int) -> list[Case]:
    g = _generator(seed)
    low, a, b = _layer(g, 24, 40, 4)
    return [
        Case((*_layer(g, 7, 5, 3), 0.5), name="float32"),
        Case((*_layer(g, 4, 9, 2), 3.0), name="a wide matrix"),
        Case((low.bfloat16(), a, b, 0.25), name="a bfloat16 weight with float32 adapters"),
    ]


def _added_in_place(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    return weight.copy_(lora_merge(weight, a, b, scaling))


MERGE = Exercise(
    id="lora_merge",
    title="Merged weight",
    points=2,
    reference=lora_merge,
    cases=_merge_cases,
    mutants=[
        Mutant(
            "unscaled",
            lambda weight, a, b, scaling: lora_merge(weight, a, b, 1.0),
            "You seem to leave out the scale: the merged layer must compute what base and adapter compute.",
        ),
        Mutant(
            "subtracted",
            lambda weight, a, b, scaling: lora_merge(weight, a, b, -scaling),
            "You seem to subtract the update. That undoes a merge.",
        ),
        Mutant(
            "everything scaled",
            lambda weight, a, b, scaling: (scaling * lora.lora_weight(weight, a, b, 1.0)).to(weight.dtype),
            "You seem to scale the base weight too: only B A is multiplied by s.",
        ),
        Mutant(
            "update alone",
            lambda weight, a, b, scaling: (scaling * (b.float() @ a.float())).to(weight.dtype),
            "You return the update alone: the base weight belongs to the sum.",
        ),
        Mutant(
            "factors transposed",
            lambda weight, a, b, scaling: (weight.float() + scaling * (a.T @ b.T)).to(weight.dtype),
            "You seem to multiply A^T by B^T, which is the transpose (I, O) of the update. B (O, R) times A (R, I) "
            "has the shape of W.",
        ),
        Mutant(
            "in place",
            _added_in_place,
            "Your numbers are right, but you overwrite the base weight. What was rounded away cannot be subtracted "
            "again, and a second merge would add the update twice: return a new tensor.",
        ),
        Mutant(
            "rounded twice",
            lambda weight, a, b, scaling: weight + (scaling * (b @ a)).to(weight.dtype),
            "You seem to round the update to the weight's dtype before it is added, so that it is rounded twice. Add "
            "in float32 and round the sum.",
        ),
        Mutant(
            "factors rounded",
            lambda weight, a, b, scaling: weight + scaling * (b.to(weight.dtype) @ a.to(weight.dtype)),
            "You seem to cast A and B to the weight's dtype and multiply there. Multiply and add in float32, and "
            "round the sum once.",
        ),
        Mutant(
            "left in float32",
            lambda weight, a, b, scaling: lora.lora_weight(weight, a, b, scaling),
            "Your sum stays in float32: the merged matrix replaces the base's and has its dtype.",
        ),
    ],
    hints=("(weight.float() + scaling * (b @ a)).to(weight.dtype), as a new tensor.",),
)


# --- counting ---------------------------------------------------------------------------------------------------


def lora_parameters(shapes: list[tuple[int, int]], rank: int) -> tuple[int, float]:
    """Numbers that a LoRA on matrices of these (out, in) shapes trains, and their share of all numbers, 0 to 1.

    All numbers are those of the matrices and of the adapters. The layers are counted as the package builds them, on the
    meta device, without memory.
    """
    settings = LoRASettings(rank=rank)
    layers = [LoRALinear(nn.Linear(into, out, bias=False, device="meta"), settings) for out, into in shapes]
    counted = lora.trainable_share(nn.ModuleList(layers))
    return counted.trainable, counted.share


def _count_cases(seed: int) -> list[Case]:
    numbers = random.Random(seed)
    some = [(numbers.randrange(20, 90), numbers.randrange(100, 300)) for _ in range(5)]
    return [
        Case(([(48, 20)], 3), name="one matrix (48, 20), R = 3"),
        Case((some, numbers.choice((5, 6, 7))), name="five matrices"),
        Case(
            ([(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)], 16),
            name="four matrices of a Llama 3.1 8B",
        ),
    ]


def _count_with(
    count: Callable[[int, int, int], int], share: Callable[[int, int], float] = lambda n, base: n / (base + n)
) -> Callable[..., tuple[int, float]]:
    def counted(shapes: list[tuple[int, int]], rank: int) -> tuple[int, float]:
        n = sum(count(out, into, rank) for out, into in shapes)
        return n, share(n, sum(out * into for out, into in shapes))

    return counted


def _both(out: int, into: int, rank: int) -> int:
    return rank * (out + into)


COUNT = Exercise(
    id="lora_parameters",
    title="Trainable parameters of a LoRA",
    points=1,
    reference=lora_parameters,
    cases=_count_cases,
    rtol=1e-7,
    atol=0,
    mutants=[
        Mutant(
            "product instead of sum",
            _count_with(lambda out, into, rank: rank * out * into),
            "You seem to multiply outputs by inputs. A has R x in numbers and B has out x R: together R (out + in).",
        ),
        Mutant(
            "A alone",
            _count_with(lambda out, into, rank: rank * into),
            "You seem to count A alone. B, out x R, is trained as well.",
        ),
        Mutant(
            "B alone",
            _count_with(lambda out, into, rank: rank * out),
            "You seem to count B alone. A, R x in, is trained as well.",
        ),
        Mutant(
            "square",
            _count_with(lambda out, into, rank: 2 * rank * into),
            "You seem to take every matrix for a square one. Those of the feed-forward layer and of grouped keys and "
            "values are not.",
        ),
        Mutant(
            "core matrix",
            _count_with(lambda out, into, rank: rank * (out + into) + rank * rank),
            "You seem to count an R x R matrix between A and B. The scale there is a fixed number.",
        ),
        Mutant(
            "share of the base",
            _count_with(_both, lambda n, base: n / base),
            "Your count is right; your share is relative to the base alone. Asked for is the share of all numbers, the "
            "adapters' own included.",
        ),
        Mutant(
            "percent",
            _count_with(_both, lambda n, base: 100 * n / (base + n)),
            "Your count is right; your share is in percent. Give a fraction from 0 to 1.",
        ),
    ],
    hints=("A is (R, in) and B is (out, R); the share is trainable / (base + trainable).",),
)


# --- DoRA -------------------------------------------------------------------------------------------------------


def dora_weight(weight: Tensor, a: Tensor, b: Tensor, scaling: float, magnitude: Tensor) -> Tensor:
    """m V / |V| with V = W + s B A (O, I) and |V| the length of each row, through which no gradient flows."""
    gain = lora.dora_gain(weight, a, b, scaling, magnitude)
    return gain[:, None] * lora.lora_weight(weight, a, b, scaling)


def _dora_cases(seed: int) -> list[Case]:
    g = _generator(seed)

    def case(outputs: int, inputs: int, rank: int, scaling: float, name: str) -> Case:
        layer = _layer(g, outputs, inputs, rank)
        return Case((*layer, scaling, 0.5 + 2 * torch.rand(outputs, generator=g)), name=name)

    return [
        case(7, 5, 3, 0.5, "a tall matrix"),
        case(4, 9, 2, 2.0, "a wide matrix"),
        case(6, 6, 1, 1.5, "a square one"),
    ]


def _dora_with(
    *,
    direction: Callable[[Tensor], Tensor] = lambda v: v / v.norm(dim=1, keepdim=True).detach(),
    scale: Callable[[float], float] = lambda s: s,
    magnitude_of: Callable[[Tensor], Tensor] = lambda m: m,
) -> Callable[..., Tensor]:
    def updated(weight: Tensor, a: Tensor, b: Tensor, scaling: float, magnitude: Tensor) -> Tensor:
        return magnitude_of(magnitude)[:, None] * direction(weight + scale(scaling) * (b @ a))

    return updated


def _base_lengths(weight: Tensor, a: Tensor, b: Tensor, scaling: float, magnitude: Tensor) -> Tensor:
    return magnitude[:, None] * (weight + scaling * (b @ a)) / weight.norm(dim=1, keepdim=True)


def _update_after(weight: Tensor, a: Tensor, b: Tensor, scaling: float, magnitude: Tensor) -> Tensor:
    return magnitude[:, None] * weight / weight.norm(dim=1, keepdim=True) + scaling * (b @ a)


DORA = Exercise(
    id="dora_weight",
    title="DoRA weight",
    points=3,
    reference=dora_weight,
    cases=_dora_cases,
    run=_with_gradients_of(1, 2, 4),
    rtol=1e-4,
    atol=1e-5,
    mutants=[
        Mutant(
            "columns",
            _dora_with(direction=lambda v: v / v.norm(dim=0, keepdim=True).detach()),
            "You seem to divide by the lengths of the columns. The paper writes W transposed; here a row holds the "
            "weights of one output, and m has one number per row.",
        ),
        Mutant(
            "whole matrix",
            _dora_with(direction=lambda v: v / v.norm().detach()),
            "You seem to divide by the norm of the whole matrix. Each row has its own length.",
        ),
        Mutant(
            "lengths of the base",
            _base_lengths,
            "You seem to divide by the row lengths of W. They are those of W + s B A, so that m alone sets the length.",
        ),
        Mutant(
            "update outside",
            _update_after,
            "You seem to normalize W and then add the update. The update belongs to the direction: add first, "
            "normalize then.",
        ),
        Mutant(
            "not normalized",
            _dora_with(direction=lambda v: v),
            "You seem to multiply by m without dividing by the row lengths: at the start the layer would not be the "
            "base.",
        ),
        Mutant(
            "squared lengths",
            _dora_with(direction=lambda v: v / v.square().sum(dim=1, keepdim=True).detach()),
            "You seem to divide by the squared lengths: the root is missing.",
        ),
        Mutant(
            "no magnitude",
            _dora_with(magnitude_of=torch.ones_like),
            "Your rows have length 1: multiply them by the trained magnitude.",
        ),
        Mutant(
            "unscaled",
            _dora_with(scale=lambda s: 1.0),
            "You seem to leave out the scale s of the update.",
        ),
        Mutant(
            "gradient through the length",
            _dora_with(direction=lambda v: v / v.norm(dim=1, keepdim=True)),
            "Your values are right, but gradient flows through the row lengths. The method treats them as constants "
            "(detach them), which saves memory in the backward pass.",
        ),
        Mutant(
            "direction detached",
            _dora_with(direction=lambda v: (v / v.norm(dim=1, keepdim=True)).detach()),
            "Your values are right, but A and B get no gradient: only the lengths are constants, not the matrix above "
            "them.",
        ),
        Mutant(
            "magnitude detached",
            _dora_with(magnitude_of=torch.Tensor.detach),
            "Your values are right, but m gets no gradient: compute the lengths alone without gradient.",
        ),
    ],
    hints=(
        "v = weight + scaling * (b @ a); lengths = v.detach().norm(dim=1); then m / lengths times v, row by row.",
    ),
)


# --- NF4 --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Levels:
    """A code book as the package takes it, a function; equal books are one key of its caches."""

    values: tuple[float, ...]

    def __call__(self) -> Tensor:
        return torch.tensor(self.values)


def nf4_quantize(values: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Nearest codes (n,) uint8 and scales (blocks,) float32, the largest magnitude of each block of `values` (n,)."""
    return nf4.quantize_blocks(values, _Levels(tuple(codebook.tolist())), block_size)


def _nf4_cases(seed: int) -> list[Case]:
    g, book = _generator(seed), nf4.nf4_codebook()
    zeros = torch.cat((torch.zeros(6), torch.randn(6, generator=g)))
    skewed = -torch.rand(20, generator=g) * torch.tensor([1.0] * 8 + [30.0] * 12)
    return [
        Case((torch.randn(48, generator=g), book, 16), name="three whole blocks"),
        Case((0.02 * torch.randn(45, generator=g), book, 8), name="a last block of 5"),
        Case((skewed, book, 8), name="blocks without a positive value"),
        Case((zeros, book, 6), name="a block of zeros"),
        Case((torch.randn(27, generator=g), torch.linspace(-1, 1, 16), 9), name="evenly spaced levels"),
    ]


def _blocks(values: Tensor, block_size: int) -> Tensor:
    return F.pad(values, (0, -len(values) % block_size)).view(-1, block_size)


def _nearest(relative: Tensor, codebook: Tensor) -> Tensor:
    return (relative[..., None] - codebook).abs().argmin(dim=-1).to(torch.uint8)


def _quantize_with(
    *,
    scales_of: Callable[[Tensor], Tensor] = lambda blocks: blocks.abs().amax(dim=1),
    code: Callable[[Tensor, Tensor], Tensor] = _nearest,
    guarded: bool = True,
    keep_padding: bool = False,
) -> Callable[..., tuple[Tensor, Tensor]]:
    def quantize(values: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        blocks = _blocks(values, block_size)
        scales = scales_of(blocks)
        divisors = torch.where(scales == 0, 1.0, scales) if guarded else scales
        codes = code(blocks / divisors[:, None], codebook).view(-1)
        return (codes if keep_padding else codes[: len(values)]), scales

    return quantize


def _last_block_dropped(values: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    return nf4_quantize(values[: len(values) // block_size * block_size], codebook, block_size)


def _strided(values: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    blocks = F.pad(values, (0, -len(values) % block_size)).view(block_size, -1).T
    scales = blocks.abs().amax(dim=1)
    codes = _nearest(blocks / torch.where(scales == 0, 1.0, scales)[:, None], codebook)
    return codes.T.reshape(-1)[: len(values)], scales


def _not_divided(values: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    return _nearest(values, codebook), _blocks(values, block_size).abs().amax(dim=1)


def _rounded_down(relative: Tensor, codebook: Tensor) -> Tensor:
    return (torch.bucketize(relative, codebook, right=True) - 1).clamp(min=0).to(torch.uint8)


NF4 = Exercise(
    id="nf4_quantize",
    title="NF4 quantization",
    points=3,
    reference=nf4_quantize,
    cases=_nf4_cases,
    mutants=[
        Mutant(
            "one scale",
            _quantize_with(scales_of=lambda blocks: blocks.abs().amax().expand(len(blocks)).clone()),
            "You seem to use one scale for all blocks: an outlier anywhere then coarsens every block.",
        ),
        Mutant(
            "largest value",
            _quantize_with(scales_of=lambda blocks: blocks.amax(dim=1)),
            "You seem to take the largest value as the scale. It is the largest magnitude, of negative weights as "
            "well.",
        ),
        Mutant(
            "standard deviation",
            _quantize_with(scales_of=lambda blocks: blocks.std(dim=1, unbiased=False)),
            "You seem to scale by the standard deviation. The code book ends at -1 and 1, so divide by the largest "
            "magnitude.",
        ),
        Mutant(
            "rounded down",
            _quantize_with(code=_rounded_down),
            "You seem to take the next lower level. Take the nearest: the borders lie midway between the levels.",
        ),
        Mutant(
            "evenly spaced",
            _quantize_with(code=lambda relative, book: ((relative + 1) * 7.5).round().to(torch.uint8)),
            "You seem to round to evenly spaced levels, as with 4-bit integers. The levels are those of `codebook`.",
        ),
        Mutant(
            "sign lost",
            _quantize_with(code=lambda relative, book: _nearest(relative.abs(), book)),
            "You seem to code the magnitudes: the levels have signs, 0 to 6 are the negative ones.",
        ),
        Mutant(
            "not divided",
            _not_divided,
            "You seem to code the values without dividing them by their block's scale.",
        ),
        Mutant(
            "strided blocks",
            _strided,
            "Your blocks seem to gather values from all over the matrix. A block is `block_size` consecutive values.",
        ),
        Mutant(
            "last block dropped",
            _last_block_dropped,
            "You seem to drop the last, partial block. It has a scale of its own.",
        ),
        Mutant(
            "padding coded",
            _quantize_with(keep_padding=True),
            "Your codes include those of the padding: cut them to the number of values.",
        ),
        Mutant(
            "division by zero",
            _quantize_with(guarded=False),
            "A block of zeros has scale 0, and 0 / 0 is NaN, whose code is arbitrary. Guard the division, so that its "
            "codes are those of 0.",
        ),
    ],
    hints=(
        "Pad to whole blocks, divide each by its largest magnitude (guarded against 0), take the nearest level, cut.",
    ),
)


# --- bits -------------------------------------------------------------------------------------------------------


def bits_per_parameter(block_size: int, double_quantization: bool) -> float:
    """Bits of one number in a large NF4 matrix: its code and its part of the scales, of both levels.

    Counted on one group of 256 whole blocks as the package stores it; the mean of all scales, one float32 for the whole
    matrix, is left out.
    """
    n = block_size * nf4.SCALE_BLOCK
    settings = nf4.NF4Settings(block_size=block_size, double_quantization=double_quantization)
    stored = nf4.quantize_nf4(torch.zeros(n), settings)
    mean = 0 if stored.offset is None else stored.offset.element_size()
    return 8 * (stored.n_bytes - mean) / n


BITS = Exercise(
    id="bits_per_parameter",
    title="Bits per parameter",
    points=1,
    reference=bits_per_parameter,
    cases=lambda seed: [(64, False), (64, True), (32, True), (512, True), (128, False)],
    rtol=1e-9,
    atol=0,
    mutants=[
        Mutant(
            "codes alone",
            lambda block_size, double_quantization: 4.0,
            "You seem to count the codes alone. Each block also stores its scale.",
        ),
        Mutant(
            "scales alone",
            lambda block_size, double_quantization: bits_per_parameter(block_size, double_quantization) - 4,
            "You seem to count the scales alone: the codes take 4 bits.",
        ),
        Mutant(
            "flag ignored",
            lambda block_size, double_quantization: bits_per_parameter(block_size, False),
            "You seem to ignore double quantization: with it a scale takes 8 bits instead of 32.",
        ),
        Mutant(
            "second level forgotten",
            lambda block_size, double_quantization: 4 + (8 if double_quantization else 32) / block_size,
            "You seem to forget the second level: 256 scales share one float32 of their own.",
        ),
        Mutant(
            "second level per 256 numbers",
            lambda block_size, double_quantization: (
                4 + (8 / block_size + 32 / 256 if double_quantization else 32 / block_size)
            ),
            "You seem to share the second-level scale among 256 numbers. It is shared by 256 scales, each of a whole "
            "block.",
        ),
        Mutant(
            "scales kept",
            lambda block_size, double_quantization: (
                4 + 32 / block_size + (8 / block_size + 32 / (256 * block_size) if double_quantization else 0)
            ),
            "You seem to store the float32 scales beside their 8-bit codes. The codes replace them.",
        ),
        Mutant(
            "bytes",
            lambda block_size, double_quantization: bits_per_parameter(block_size, double_quantization) / 8,
            "Your result is in bytes. Give bits.",
        ),
    ],
    hints=("4 + 32 / block, or with double quantization 4 + 8 / block + 32 / (256 block).",),
)


# --- virtual tokens ---------------------------------------------------------------------------------------------


def prepend_prompt(batch: Batch, vocab_size: int, length: int) -> Batch:
    """A batch whose rows begin with the virtual ids V .. V + P - 1, which are no targets: (B, T) -> (B, P + T)."""
    table = nn.Embedding(vocab_size, 1, device="meta")
    prompt = adapters.PromptEmbedding(table, adapters.PromptSettings(length=length))
    return adapters.prepend_prompt(cast(Transformer, SimpleNamespace(embedding=prompt)), batch)


def _prompt_cases(seed: int) -> list[Case]:
    g = _generator(seed)

    def case(rows: int, width: int, vocab_size: int, length: int) -> Case:
        stream = torch.randint(1, vocab_size, (rows, width + 1), generator=g)
        batch = {"tokens": stream[:, :-1].clone(), "targets": stream[:, 1:].clone()}
        batch["targets"][:, : width // 2] = -100  # an instruction, which is no target
        return Case((batch, vocab_size, length), name=f"B = {rows}, T = {width}, P = {length}")

    return [case(2, 7, 31, 3), case(3, 5, 19, 4), case(1, 6, 23, 1)]


def _prompt_with(
    *,
    first: Callable[[int], int] = lambda vocab_size: vocab_size,
    tokens: Callable[[Tensor, Tensor], Tensor] = lambda ids, tokens: torch.cat((ids, tokens), dim=1),
    targets: Callable[[Tensor, Tensor], Tensor] = lambda ids, targets: torch.cat(
        (torch.full_like(ids, -100), targets), dim=1
    ),
) -> Callable[..., Batch]:
    def prepend(batch: Batch, vocab_size: int, length: int) -> Batch:
        ids = (first(vocab_size) + torch.arange(length)).expand(len(batch["tokens"]), -1)
        return {
            "tokens": tokens(ids, batch["tokens"]),
            "targets": targets(ids, batch["targets"]),
        }

    return prepend


def _first_token_as_target(batch: Batch, vocab_size: int, length: int) -> Batch:
    out = prepend_prompt(batch, vocab_size, length)
    out["targets"][:, length - 1] = batch["tokens"][:, 0]
    return out


PROMPT = Exercise(
    id="prepend_prompt",
    title="Virtual tokens in front",
    points=2,
    reference=prepend_prompt,
    cases=_prompt_cases,
    mutants=[
        Mutant(
            "targets not moved",
            _prompt_with(targets=lambda ids, targets: targets),
            "Your targets have no place for the virtual tokens: every target would stand P positions too early.",
        ),
        Mutant(
            "virtual targets",
            _prompt_with(targets=lambda ids, targets: torch.cat((ids, targets), dim=1)),
            "You seem to make the virtual ids targets. The head has V rows, so they have no logits; nothing predicts "
            "them.",
        ),
        Mutant(
            "zero targets",
            _prompt_with(targets=lambda ids, targets: torch.cat((torch.zeros_like(ids), targets), dim=1)),
            "You seem to fill the targets with 0, which is a token. What is no target is -100.",
        ),
        Mutant(
            "targets filled at the end",
            _prompt_with(
                targets=lambda ids, targets: torch.cat((targets, torch.full_like(ids, -100)), dim=1)
            ),
            "You seem to fill the targets at their end: they no longer stand under their tokens.",
        ),
        Mutant(
            "appended",
            _prompt_with(
                tokens=lambda ids, tokens: torch.cat((tokens, ids), dim=1),
                targets=lambda ids, targets: torch.cat((targets, torch.full_like(ids, -100)), dim=1),
            ),
            "You seem to append the virtual tokens. Under the causal mask only what stands in front is seen.",
        ),
        Mutant(
            "cut to T",
            _prompt_with(
                tokens=lambda ids, tokens: torch.cat((ids, tokens), dim=1)[:, : tokens.shape[1]],
                targets=lambda ids, targets: torch.cat((torch.full_like(ids, -100), targets), dim=1)[
                    :, : targets.shape[1]
                ],
            ),
            "You seem to cut the rows back to their old length: the last P tokens and targets are lost.",
        ),
        Mutant(
            "ids from 0",
            _prompt_with(first=lambda vocab_size: 0),
            "Your virtual ids begin at 0, which are the vocabulary's own tokens. They follow it: V, V + 1, ...",
        ),
        Mutant(
            "ids from V + 1",
            _prompt_with(first=lambda vocab_size: vocab_size + 1),
            "Your virtual ids begin at V + 1. The vocabulary's ids end at V - 1, so the first virtual one is V.",
        ),
        Mutant(
            "first token as target",
            _first_token_as_target,
            "You seem to make the first token a target of the last virtual one. It is the instruction's, which the "
            "loss leaves out.",
        ),
    ],
    hints=(
        "ids = V .. V + P - 1 for each row, in front of the tokens; -100 P times in front of the targets.",
    ),
)

EXERCISES = [FORWARD, COUNT, MERGE, DORA, NF4, BITS, PROMPT]
