"""Two other ways to train a few numbers beside a frozen model: bottleneck adapters and prompt tuning.

Bottleneck adapters (Houlsby et al., 2019, section 2.1) insert a narrow two-layer network behind each sublayer: more
computation for every token, which cannot be merged away. Prompt tuning (Lester et al., 2021, section 2) learns the
embeddings of a few virtual tokens in front of the text: the model is untouched, the context that much shorter.

Shapes: B batch, T time, D d_model, V vocab_size, P virtual tokens, M bottleneck width.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmcourse.models.transformer import Transformer

SUBLAYERS = ("attention", "mlp")
PROMPT_INITS = ("vocabulary", "gaussian")


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """Bottleneck adapters.

    Raises:
        ValueError: a width below 1, or sublayers other than attention and mlp.
    """

    width: int = 16
    """M, the inner width; 2 M D numbers for each adapter"""
    sublayers: tuple[str, ...] = SUBLAYERS
    """behind which an adapter stands: both as in Houlsby et al. (2019), mlp alone as in Pfeiffer et al. (2021)"""

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width={self.width}: give at least 1")
        if not self.sublayers or set(self.sublayers) - set(SUBLAYERS):
            raise ValueError(f"sublayers={self.sublayers}: give attention, mlp or both")


class BottleneckAdapter(nn.Module):
    """A sublayer f followed by h + W_expand gelu(W_reduce h), where h = f(x); W_expand starts at zero."""

    def __init__(self, sublayer: nn.Module, d_model: int, width: int) -> None:
        super().__init__()
        device = next(chain(sublayer.parameters(), sublayer.buffers())).device
        self.sublayer = sublayer.requires_grad_(False)
        self.reduce = nn.Linear(d_model, width, bias=False, device=device)
        self.expand = nn.Linear(width, d_model, bias=False, device=device)
        nn.init.zeros_(self.expand.weight)

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """x (B, T, D) and whatever else the sublayer takes -> (B, T, D)."""
        h = self.sublayer(x, *args)
        return h + self.expand(F.gelu(self.reduce(h.to(self.reduce.weight.dtype)))).to(h.dtype)


def add_adapters(model: Transformer, settings: AdapterSettings | None = None) -> Transformer:
    """Freeze the model and put an adapter behind its sublayers, in place; returns the model, which computes as before.

    Raises:
        ValueError: the model has adapters already.
    """
    settings = settings or AdapterSettings()
    if any(isinstance(module, BottleneckAdapter) for module in model.modules()):
        raise ValueError("the model has bottleneck adapters already: call remove_adapters first")
    model.requires_grad_(False)
    for block in model.blocks:
        for name in settings.sublayers:
            inner = getattr(block, name)
            adapter = BottleneckAdapter(inner, model.config.d_model, settings.width)
            setattr(block, name, adapter.train(inner.training))
    return model


def remove_adapters(model: Transformer) -> Transformer:
    """Take the bottleneck adapters off, in place; floating-point weights are trainable again.

    Raises:
        ValueError: the model has none.
    """
    found = {name: m for name, m in model.named_modules() if isinstance(m, BottleneckAdapter)}
    if not found:
        raise ValueError("the model has no bottleneck adapters: call add_adapters first")
    for name, adapter in found.items():
        model.set_submodule(name, adapter.sublayer)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return model


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """Prompt tuning.

    Raises:
        ValueError: a length below 1 or an unknown init.
    """

    length: int = 20
    """P, virtual tokens; P D numbers are trained"""
    init: str = "vocabulary"
    """vocabulary: embeddings of random tokens, which the model knows how to read; gaussian: noise of their spread"""

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"length={self.length}: give at least 1")
        if self.init not in PROMPT_INITS:
            raise ValueError(f"init={self.init!r}: choose {' or '.join(PROMPT_INITS)}")


class PromptEmbedding(nn.Module):
    """A frozen token embedding that also knows the ids V .. V + P - 1, whose rows are trained."""

    def __init__(self, base: nn.Embedding, settings: PromptSettings) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        table = base.weight.detach().float()
        if settings.init == "vocabulary":
            rows = table[torch.randint(len(table), (settings.length,), device=table.device)]
        else:
            rows = table.std() * torch.randn(settings.length, table.shape[1], device=table.device)
        self.prompt = nn.Parameter(rows)  # (P, D)

    @property
    def weight(self) -> Tensor:
        """The frozen table (V, D), shared with a tied head."""
        return self.base.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) int64, below V + P -> (B, T, D)."""
        V = self.base.num_embeddings
        own = self.base(tokens.clamp(max=V - 1))
        virtual = F.embedding((tokens - V).clamp(min=0), self.prompt).to(own.dtype)
        return torch.where((tokens >= V)[..., None], virtual, own)


def add_prompt(model: Transformer, settings: PromptSettings | None = None) -> Transformer:
    """Freeze the model and extend its vocabulary by trained virtual tokens, in place; returns the model.

    The virtual tokens are ordinary ids to everything else: put `virtual_ids(model)` in front of a prompt and `generate`
    works with its cache and padding, `prepend_prompt` does it for training batches.

    Raises:
        ValueError: there is a prompt already, or it would fill the context.
    """
    settings = settings or PromptSettings()
    if isinstance(model.embedding, PromptEmbedding):
        raise ValueError("the model has a trained prompt already: call remove_prompt first")
    if settings.length >= model.config.context_length:
        raise ValueError(
            f"length={settings.length} leaves no room in a context of {model.config.context_length}: give less"
        )
    model.requires_grad_(False)
    model.embedding = PromptEmbedding(model.embedding, settings).train(model.training)
    return model


def remove_prompt(model: Transformer) -> Transformer:
    """Take the virtual tokens away, in place; floating-point weights are trainable again.

    Raises:
        ValueError: the model has none.
    """
    model.embedding = _prompt_of(model).base
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return model


def virtual_ids(model: Transformer) -> list[int]:
    """The ids of the virtual tokens, V .. V + P - 1.

    Raises:
        ValueError: the model has none.
    """
    embedding = _prompt_of(model)
    V = embedding.base.num_embeddings
    return list(range(V, V + len(embedding.prompt)))


def prepend_prompt(
    model: Transformer, batch: dict[str, Tensor], *, ignore_index: int = -100
) -> dict[str, Tensor]:
    """A batch whose rows begin with the virtual tokens, which are no targets.

    batch: "tokens" and "targets", both (B, T) int64 -> both (B, P + T); other entries stay. The last virtual token's
    output is that of the position before the first token, for which the batch has no target.

    Raises:
        ValueError: the model has no virtual tokens.
    """
    tokens, targets = batch["tokens"], batch["targets"]
    ids = torch.tensor(virtual_ids(model), device=tokens.device).expand(len(tokens), -1)  # (B, P)
    return batch | {
        "tokens": torch.cat((ids, tokens), dim=1),
        "targets": torch.cat((torch.full_like(ids, ignore_index), targets), dim=1),
    }


def _prompt_of(model: Transformer) -> PromptEmbedding:
    if not isinstance(model.embedding, PromptEmbedding):
        raise ValueError("the model has no virtual tokens: call add_prompt first")
    return model.embedding
