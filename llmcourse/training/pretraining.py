"""Pre-training: the next-token loss, its settings and presets, and one function that turns a corpus into a model.

Also a program, on one process or several:
`torchrun --nproc-per-node 2 -m llmcourse.training.pretraining --corpus tinytown --steps 100 --out runs/base`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmcourse import runtime
from llmcourse.data.packing import IGNORE, PackedBatches, whole_document_batches
from llmcourse.data.token_stream import TokenStream
from llmcourse.evaluation.perplexity import token_loss
from llmcourse.models.config import ModelConfig
from llmcourse.models.transformer import Transformer
from llmcourse.training import distributed
from llmcourse.training.fit import Evaluate, FitResult, FitSettings, fit


def next_token_loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Summed -ln p(target) in nats over all positions that have a target, their number, and no further metrics.

    batch: "tokens" and "targets", both (B, T) int64; targets are the tokens one place later, -100 where there is none.
    """
    logits = model(batch["tokens"])  # (B, T, V)
    targets = batch["targets"].flatten()
    total = F.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=IGNORE, reduction="sum")
    return total, (targets != IGNORE).sum(), {}


@dataclass(frozen=True, kw_only=True)
class PretrainSettings:
    """A whole pre-training run: corpus, tokenizer, model, loop.

    Raises:
        ValueError: a size that is not positive, or whatever the parts refuse.
    """

    corpus: str = "tinytown"
    """tinytown, python-docs, files:GLOB or hub:NAME"""
    n_documents: int | None = None
    """documents of the corpus to use; `None` takes the corpus's own default"""
    vocab_size: int = 1152
    """entries that the tokenizer is trained to"""
    batch_size: int = 8
    """rows of one micro-batch on one process"""
    model: ModelConfig = field(default_factory=lambda: ModelConfig(vocab_size=1152))
    """shape; its vocab_size is replaced by the trained tokenizer's"""
    fit: FitSettings = field(default_factory=lambda: FitSettings(steps=100))
    """the loop"""
    seed: int = 0
    """of initial weights and the order of the data"""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give at least 1")
        if self.fit.seed != self.seed:
            object.__setattr__(self, "fit", dataclasses.replace(self.fit, seed=self.seed))

    @property
    def tokens(self) -> int:
        """Target tokens of the whole run on one process, B T micro_steps steps."""
        return self.batch_size * self.model.context_length * self.fit.micro_steps * self.fit.steps


def cpu(**changes: Any) -> PretrainSettings:
    """The base model of the course: a million parameters, under four minutes on two cores."""
    settings = PretrainSettings(
        n_documents=120_000,
        vocab_size=1152,
        batch_size=8,
        model=ModelConfig(vocab_size=1152, context_length=256),
        fit=FitSettings(
            steps=2500,
            lr=6e-3,
            warmup_steps=60,
            optimizer="muon",
            schedule="wsd",
            decay_fraction=0.5,
            eval_every=500,
            checkpoint_every=500,
        ),
    )
    return with_changes(settings, **changes)


def gpu(**changes: Any) -> PretrainSettings:
    """A 124M-class model with GPT-2's depth and width in the Llama architecture, for one modern GPU."""
    settings = PretrainSettings(
        n_documents=2_000_000,
        vocab_size=32_768,
        batch_size=64,
        model=ModelConfig(
            vocab_size=32_768,
            context_length=1024,
            d_model=768,
            n_layers=12,
            n_heads=12,
            n_kv_heads=12,
            d_ff=2048,
        ),
        fit=FitSettings(
            steps=2000,
            lr=2e-3,
            warmup_steps=200,
            optimizer="muon",
            schedule="wsd",
            micro_steps=4,
            eval_every=250,
            checkpoint_every=500,
        ),
    )
    return with_changes(settings, **changes)


PRESETS = {"cpu": cpu, "gpu": gpu}


def preset(name: str, **changes: Any) -> PretrainSettings:
    """The preset of that name.

    Raises:
        ValueError: an unknown name.
    """
    if name not in PRESETS:
        raise ValueError(f"preset={name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name](**changes)


def with_changes(settings: PretrainSettings, **changes: Any) -> PretrainSettings:
    """`settings` with fields replaced by name, those of `model` and `fit` included; `None` means unchanged.

    Raises:
        ValueError: no field of that name.
    """
    changes = {name: value for name, value in changes.items() if value is not None}
    parts: dict[str, Any] = {}
    own = {f.name for f in dataclasses.fields(PretrainSettings)}
    for part in ("model", "fit"):
        names = {f.name for f in dataclasses.fields(getattr(settings, part))} - own
        chosen = {name: changes.pop(name) for name in list(changes) if name in names}
        if {"d_model", "n_heads"} & chosen.keys():
            chosen.setdefault("d_head", None)  # follows the new width, as it followed the old one
        parts[part] = dataclasses.replace(getattr(settings, part), **chosen)
    unknown = [name for name in changes if name not in own]
    if unknown:
        raise ValueError(f"unknown setting {unknown[0]!r}: see llmcourse pretrain --help for all of them")
    return dataclasses.replace(settings, **(parts | changes))


def new_model(settings: PretrainSettings, vocab_size: int, device: torch.device | None = None) -> Transformer:
    """A model with fresh weights, which depend on `settings.seed` alone."""
    runtime.set_seed(settings.seed)
    model = Transformer(dataclasses.replace(settings.model, vocab_size=vocab_size))
    return model.to(device or runtime.pick_device())


def validation(stream: TokenStream, context_length: int, batch_size: int = 32) -> Evaluate:
    """An `evaluate` for `fit`: nats per token of whole documents, with its standard error."""
    batches = whole_document_batches(stream, batch_size=batch_size, context_length=context_length)

    def evaluate(model: nn.Module) -> dict[str, float]:
        measured = token_loss(model, batches)
        return {"validation_loss": measured.nats_per_token, "validation_error": measured.standard_error}

    return evaluate


def pretrain(
    settings: PretrainSettings,
    train: TokenStream,
    valid: TokenStream | None,
    *,
    checkpoint_folder: Path | str | None = None,
    device: torch.device | None = None,
    progress: bool = True,
    **fit_options: Any,
) -> tuple[Transformer, FitResult]:
    """Train a fresh model on a token stream; with a checkpoint folder, go on where an earlier run stopped.

    Raises:
        ValueError: the streams are of two tokenizers, `train` is shorter than one window, or what `fit` refuses.
    """
    if valid is not None and valid.vocab_size != train.vocab_size:
        raise ValueError(
            f"the training stream has vocab_size {train.vocab_size}, the validation stream {valid.vocab_size}: "
            "tokenize both with one tokenizer"
        )
    world = distributed.world()
    model = new_model(settings, train.vocab_size, device)
    batches = PackedBatches(
        train,
        batch_size=settings.batch_size,
        context_length=settings.model.context_length,
        seed=settings.seed,
        rank=world.rank,
        world_size=world.size,
    )
    evaluate = validation(valid, settings.model.context_length) if valid is not None else None
    result = fit(
        model,
        batches,
        next_token_loss,
        settings.fit,
        evaluate=evaluate,
        checkpoint_folder=checkpoint_folder,
        progress=progress,
        **fit_options,
    )
    return model, result


if __name__ == "__main__":  # only the program reaches up to the command line, the module does not
    import runpy
    import sys

    sys.argv.insert(1, "pretrain")
    runpy.run_module("llmcourse.cli", run_name="__main__")
