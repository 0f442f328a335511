"""Low-rank adaptation: a frozen matrix plus a trained product of two thin ones, and its two refinements.

    LoRA    W x + s B A x                          s = alpha / r         (Hu et al., 2021, section 4.1)
    rsLoRA  the same, with                         s = alpha / sqrt(r)   (Kalajdzievski, 2023, eq. 7)
    DoRA    m (W + s B A) x / |W + s B A|_row      m trained             (Liu et al., 2024, eq. 5)

B starts at zero, so the adapted model starts as the base model.

Shapes: O outputs, I inputs, R rank; x (..., I), W (O, I), A (R, I), B (O, R), m (O,).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmcourse.models.nf4 import LINEARS, NF4Linear, frozen_weight, is_quantized

INITS = ("kaiming", "gaussian")
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class LoRASettings:
    """What is adapted, and how.

    Raises:
        ValueError: a rank below 1, an alpha that is not positive, a dropout outside [0, 1), no target or an unknown
            one, or an unknown init.
    """

    rank: int = 8
    """r, the inner width of B A"""
    alpha: float = 16.0
    """numerator of the scale s; with it fixed, the learning rate need not be tuned anew for each rank"""
    dropout: float = 0.0
    """share of the adapter's inputs set to zero in training"""
    targets: tuple[str, ...] = LINEARS
    """names of the adapted matrices of each block; all of them matter more than a high rank (Dettmers et al., 2023)"""
    init: str = "kaiming"
    """of A: kaiming, uniform within +-1/sqrt(I) as in the authors' code, or gaussian, N(0, 1/r^2)"""
    rslora: bool = False
    """s = alpha / sqrt(r), which keeps the size of the update from shrinking as the rank grows"""
    dora: bool = False
    """train the length of each row of the matrix apart from its direction"""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank}: give at least 1")
        if not self.alpha > 0:
            raise ValueError(f"alpha={self.alpha}: give a positive number, such as twice the rank")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: give a share from 0 up to, but not including, 1")
        unknown = [name for name in self.targets if name not in LINEARS]
        if unknown or not self.targets:
            raise ValueError(f"targets={self.targets}: give one or more of {', '.join(LINEARS)}")
        if self.init not in INITS:
            raise ValueError(f"init={self.init!r}: choose {' or '.join(INITS)}")

    @property
    def scaling(self) -> float:
        """s, what B A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def lora_update(x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """s B A x without forming B A: x (..., I), a (R, I), b (O, R) -> (..., O).

    The scale is applied in the middle, where the activations are R wide and not O.
    """
    return F.linear(F.linear(x, a) * scaling, b)


def lora_weight(
    weight: Tensor, a: Tensor, b: Tensor, scaling: float, magnitude: Tensor | None = None
) -> Tensor:
    """The one matrix (O, I) that does what base and adapter do together, in float32; with a `magnitude`, DoRA's."""
    updated = weight.float() + (b.float() @ a.float()) * scaling
    if magnitude is None:
        return updated
    return updated * (magnitude.float() / _row_lengths(updated))[:, None]


def dora_gain(weight: Tensor, a: Tensor, b: Tensor, scaling: float, magnitude: Tensor) -> Tensor:
    """m / |W + s B A|, a factor (O,) for each output.

    The norm is over a row of W, the weights of one output (in the paper, which writes W transposed, a column). No
    gradient flows through it: section 4.3, which saves memory at no measured loss.
    """
    with torch.no_grad():
        lengths = _row_lengths(lora_weight(weight, a, b, scaling))
    return magnitude / lengths


def _row_lengths(matrix: Tensor) -> Tensor:
    """|row| of each row, (O,); a row of zeros has no direction, and a length of 0 would make it NaN."""
    return torch.linalg.vector_norm(matrix, dim=1).clamp(min=torch.finfo(torch.float32).tiny)


class LoRALinear(nn.Module):
    """A frozen linear layer, plain or quantized, with an adapter beside it.

    A, B and m are float32 whatever the base's dtype, since steps of 1e-4 of their size vanish in bfloat16.

    Raises:
        ValueError: the base layer has a bias.
    """

    def __init__(self, base: nn.Module, settings: LoRASettings) -> None:
        super().__init__()
        if getattr(base, "bias", None) is not None:
            raise ValueError("the linear layer has a bias: the models here have none, so add it outside")
        self.base = base.requires_grad_(False)
        self.settings = settings
        self.in_features, self.out_features = base.in_features, base.out_features
        device = next(chain(base.parameters(), base.buffers())).device
        self.a = nn.Parameter(torch.empty(settings.rank, self.in_features, device=device))
        self.b = nn.Parameter(torch.zeros(self.out_features, settings.rank, device=device))
        if settings.init == "kaiming":
            nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        else:
            nn.init.normal_(self.a, std=1 / settings.rank)
        self.magnitude: nn.Parameter | None = None
        if settings.dora:  # the rows' own lengths, so that the gain starts at 1
            self.magnitude = nn.Parameter(torch.linalg.vector_norm(frozen_weight(base).float(), dim=1))
        self.dropout = nn.Dropout(settings.dropout)
        self.enabled = True
        self.register_buffer("merged_weight", None, persistent=False)

    @property
    def is_merged(self) -> bool:
        """Whether one product with the merged matrix replaces base and adapter."""
        return self.merged_weight is not None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) -> (..., O).

        Raises:
            ValueError: the adapter is merged and the layer in training mode: nothing would be trained.
        """
        if not self.enabled:
            return self.base(x)
        if self.is_merged:
            if self.training:
                raise ValueError("the adapter is merged: call unmerge_lora(model) before training")
            return F.linear(x, self.merged_weight)
        out = self.base(x)
        dropped = self.dropout(x)
        update = lora_update(dropped.to(self.a.dtype), self.a, self.b, self.settings.scaling)
        if self.magnitude is None:
            return out + update.to(out.dtype)
        gain = dora_gain(frozen_weight(self.base), self.a, self.b, self.settings.scaling, self.magnitude)
        kept = self.base(dropped) if self.training and self.settings.dropout else out
        return out + ((gain - 1) * kept + gain * update).to(out.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """Compute with one matrix from now on; the base weight stays as it is, so nothing is lost.

        Merging a merged layer takes its weights as they are now. Costs another O I numbers of memory while it lasts.

        Raises:
            ValueError: the base is quantized: the sum would have to be rounded to 4 bits again.
        """
        if is_quantized(self.base):
            raise ValueError(
                "the base layer is quantized and cannot be merged into: use fold_lora for a plain model"
            )
        self.merged_weight = self._sum(self.base.weight.dtype)

    def unmerge(self) -> None:
        """Back to base and adapter, bit for bit; on an unmerged layer nothing happens."""
        self.merged_weight = None

    @torch.no_grad()
    def fold(self) -> nn.Linear:
        """A plain linear layer with base and adapter in one matrix; a quantized base comes out in float32."""
        base = self.base
        dtype = torch.float32 if is_quantized(base) else base.weight.dtype
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self._sum(dtype))
        return linear

    def _sum(self, dtype: torch.dtype) -> Tensor:
        weight = frozen_weight(self.base)
        return lora_weight(weight, self.a, self.b, self.settings.scaling, self.magnitude).to(dtype)

    def extra_repr(self) -> str:
        """Sizes and scale, for printing the model."""
        return f"rank={self.settings.rank}, scaling={self.settings.scaling:g}, merged={self.is_merged}"


def add_lora(model: Model, settings: LoRASettings | None = None) -> Model:
    """Freeze the model and put an adapter beside each target layer, in place; returns the model.

    Only the adapters are trainable afterwards. The A matrices are drawn from torch's global generator.

    Raises:
        ValueError: the model has adapters already, or no layer of a target's name.
    """
    settings = settings or LoRASettings()
    if lora_layers(model):
        raise ValueError("the model has LoRA layers already: fold_lora or remove_lora first")
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | NF4Linear) and name.split(".")[-1] in settings.targets
    }
    missing = set(settings.targets) - {name.split(".")[-1] for name in linears}
    if missing:
        raise ValueError(f"the model has no linear layer named {', '.join(sorted(missing))}: change targets")
    model.requires_grad_(False)
    for name, linear in linears.items():
        model.set_submodule(name, LoRALinear(linear, settings).train(linear.training))
    return model


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers by the name that the plain layer had, "blocks.0.attention.query"."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' own parameters by name, "blocks.0.attention.query.a": what training changes and files hold."""
    parts = ("a", "b", "magnitude")
    return {
        f"{name}.{part}": getattr(layer, part)
        for name, layer in lora_layers(model).items()
        for part in parts
        if getattr(layer, part) is not None
    }


def merge_lora(model: nn.Module) -> None:
    """Merge every adapter: inference at the base model's speed; see `LoRALinear.merge`."""
    for layer in _adapted(model).values():
        layer.merge()


def unmerge_lora(model: nn.Module) -> None:
    """Undo `merge_lora`, bit for bit."""
    for layer in _adapted(model).values():
        layer.unmerge()


def fold_lora(model: Model) -> Model:
    """Make the adapters part of the weights for good, in place: plain layers again, trainable, which save as a
    model."""
    for name, layer in _adapted(model).items():
        model.set_submodule(name, layer.fold().train(layer.training))
    return _thaw(model)


def remove_lora(model: Model) -> Model:
    """Take the adapters off, in place: the base model as it was, trainable but for quantized layers."""
    for name, layer in _adapted(model).items():
        model.set_submodule(name, layer.base)
    return _thaw(model)


def _thaw(model: Model) -> Model:
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return model


@contextmanager
def lora_disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model is its base: a reference policy without a second copy of the weights."""
    layers = list(_adapted(model).values())
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def _adapted(model: nn.Module) -> dict[str, LoRALinear]:
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model has no LoRA layers: call add_lora first")
    return layers


@dataclass(frozen=True)
class ParameterShare:
    """How much of a model is trained."""

    trainable: int
    """numbers that an optimizer would change"""
    total: int
    """all numbers of base and adapters, a quantized one counted as one"""

    @property
    def share(self) -> float:
        """trainable / total, 0 to 1."""
        return self.trainable / self.total


def trainable_share(model: nn.Module) -> ParameterShare:
    """Count trainable and all parameters, shared ones once; 4-bit weights count as the numbers that they stand for."""
    parameters = [p for p in model.parameters() if getattr(p, "quant_state", None) is None]
    quantized = sum(m.in_features * m.out_features for m in model.modules() if is_quantized(m))
    return ParameterShare(
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        total=sum(p.numel() for p in parameters) + quantized,
    )
