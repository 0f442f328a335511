"""Supervised fine-tuning: the loss on what the assistant writes, which weights move, and replay against forgetting.

Shapes: B rows, T slots of a row, D d_model, V vocab_size, n targets of a batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmcourse.data.document_mask import DocumentMask
from llmcourse.data.instruction import LOSSES_ON, TRUNCATIONS, InstructionBatches, InstructionSet
from llmcourse.data.packing import IGNORE, PackedBatches
from llmcourse.data.token_stream import TokenStream
from llmcourse.models.adapters import PromptEmbedding
from llmcourse.models.lora import lora_layers
from llmcourse.models.transformer import Transformer
from llmcourse.training import distributed
from llmcourse.training.fit import Batch, BatchSource, Evaluate, FitResult, FitSettings, Loss, fit
from llmcourse.training.freezing import TRAINABLE, Trainable, choose_trainable
from llmcourse.training.pretraining import next_token_loss, validation

# The loss -------------------------------------------------------------------------------------------------


def masked_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed -ln p(target) in nats over the targets, and their number; the mean is equation (1) of the chapter.

    logits (..., V), targets (...) int64, -100 where there is none. The logarithm is taken in float32.
    """
    total = F.cross_entropy(
        logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    return total, (targets != IGNORE).sum()


def sft_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """`masked_loss` of a batch of `InstructionBatches`, padded or packed, for `fit`.

    batch: "tokens" and "targets", both (B, T) int64, and for packed rows "documents" (B, T) int64. With every token a
    target this is `next_token_loss`. A `Transformer` computes logits at targets only: an instruction batch has few,
    and logits are by far its largest tensor.
    """
    targets = batch["targets"]
    cache = DocumentMask(batch["documents"]) if "documents" in batch else None
    if isinstance(model, Transformer) and not torch.compiler.is_compiling():
        has_target = targets != IGNORE  # (B, T)
        hidden = model.hidden_states(batch["tokens"], cache)[has_target]  # (n, D)
        return *masked_loss(model.head(hidden), targets[has_target]), {}
    logits = model(batch["tokens"]) if cache is None else model(batch["tokens"], cache)
    return *masked_loss(logits, targets), {}


def with_replay(share: float) -> Loss:
    """A loss (1 - share) L_instructions + share L_pretraining, each a mean over its own targets.

    Its batches are those of `ReplayBatches`. The number of units is that of the instruction targets.

    Raises:
        ValueError: the share is not a fraction from 0 to below 1.
    """
    if not 0 <= share < 1:
        raise ValueError(f"share={share}: give a fraction from 0 to below 1")

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Any]]:
        total, count, _ = sft_loss(model, batch)
        replay = {"tokens": batch["replay_tokens"], "targets": batch["replay_targets"]}
        replay_total, replay_count, _ = next_token_loss(model, replay)
        mean = replay_total / replay_count
        metrics = {"instruction_loss": (total / count).detach(), "replay_loss": mean.detach()}
        return (1 - share) * total + share * mean * count, count, metrics

    return loss


class ReplayBatches:
    """Each batch of instructions together with one of pre-training text, under "replay_tokens" and "replay_targets"."""

    def __init__(self, instructions: BatchSource, pretraining: BatchSource) -> None:
        self.instructions, self.pretraining = instructions, pretraining

    def next(self) -> Batch:
        """The next of both."""
        replay = self.pretraining.next()
        return self.instructions.next() | {f"replay_{name}": replay[name] for name in ("tokens", "targets")}

    def state_dict(self) -> dict[str, Any]:
        """Both positions."""
        return {"instructions": self.instructions.state_dict(), "pretraining": self.pretraining.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position.

        Raises:
            ValueError: the state is of a run without replay, or one of the two belongs to other data.
        """
        if set(state) != {"instructions", "pretraining"}:
            raise ValueError(
                "the saved batches have no replay, these have: resume with the replay_share of the saved run"
            )
        self.instructions.load_state_dict(state["instructions"])
        self.pretraining.load_state_dict(state["pretraining"])


# Settings -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SFTSettings:
    """A fine-tuning run: rows, which weights move, replay, loop.

    Raises:
        ValueError: a value outside its range, an unknown name, or `apart=False` without `packed`.
    """

    batch_size: int = 16
    """rows of one micro-batch on one process"""
    packed: bool = False
    """several conversations a row instead of padding"""
    apart: bool = True
    """with `packed`: conversations of a row do not see one another"""
    loss_on: str = "assistant"
    """targets: assistant (all its turns), last (its last turn), all (every token)"""
    truncation: str = "drop"
    """of conversations longer than the context: drop, turns (leave out the oldest), end"""
    trainable: str = "full"
    """weights that move: full, head, or last:K for the last K blocks with final norm and head"""
    replay_share: float = 0.0
    """weight of the pre-training loss in the sum, from 0 (none) to below 1"""
    replay_batch_size: int = 4
    """rows of pre-training text in one micro-batch, if there is replay"""
    fit: FitSettings = field(default_factory=lambda: FitSettings(steps=100))
    """the loop"""
    seed: int = 0
    """of the order of the data"""

    def __post_init__(self) -> None:
        for name in ("batch_size", "replay_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give at least 1")
        for name, choices in (("loss_on", LOSSES_ON), ("truncation", TRUNCATIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(choices)}")
        if not 0 <= self.replay_share < 1:
            raise ValueError(f"replay_share={self.replay_share}: give a fraction from 0 to below 1")
        if not (self.apart or self.packed):
            raise ValueError("apart=False needs packed=True: rows that are not packed hold one conversation")
        if not TRAINABLE.fullmatch(self.trainable):
            raise ValueError(f"trainable={self.trainable!r}: choose full, head or last:K, such as last:2")
        if self.fit.seed != self.seed:
            object.__setattr__(self, "fit", dataclasses.replace(self.fit, seed=self.seed))


def cpu(**changes: Any) -> SFTSettings:
    """The course's model on two cores, in about a minute; after half of it some runs cannot add in steps yet."""
    loop = FitSettings(
        steps=600, lr=2e-3, warmup_steps=20, schedule="linear", weight_decay=0.0, compile="off"
    )
    return _with_changes(SFTSettings(batch_size=32, fit=loop), changes)


def gpu(**changes: Any) -> SFTSettings:
    """A model of 100 million parameters on one GPU, with packed rows."""
    loop = FitSettings(steps=1000, lr=1e-4, warmup_steps=50, schedule="linear", weight_decay=0.0)
    return _with_changes(SFTSettings(batch_size=16, packed=True, fit=loop), changes)


PRESETS: dict[str, Callable[..., SFTSettings]] = {"cpu": cpu, "gpu": gpu}


def preset(name: str, **changes: Any) -> SFTSettings:
    """The preset of that name; `changes` replace fields by name, those of `fit` included, `None` means unchanged.

    Raises:
        ValueError: an unknown name, or no field of that name.
    """
    if name not in PRESETS:
        raise ValueError(f"preset={name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name](**changes)


def _with_changes(settings: SFTSettings, changes: dict[str, Any]) -> SFTSettings:
    changes = {name: value for name, value in changes.items() if value is not None}
    own = {f.name for f in dataclasses.fields(SFTSettings)}
    of_fit = {f.name for f in dataclasses.fields(FitSettings)} - own
    unknown = changes.keys() - own - of_fit
    if unknown:
        raise ValueError(f"unknown setting {min(unknown)!r}: choose one of {', '.join(sorted(own | of_fit))}")
    loop = dataclasses.replace(
        changes.get("fit", settings.fit), **{n: v for n, v in changes.items() if n in of_fit}
    )
    return dataclasses.replace(settings, **{n: v for n, v in changes.items() if n in own} | {"fit": loop})


# The run --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """What a fine-tuning run came to."""

    fit: FitResult
    """records of the loop"""
    trainable: Trainable
    """how many parameters moved"""
    before: dict[str, float]
    """what `evaluate` said of the model before: see `finetune`"""
    after: dict[str, float]
    """and afterwards"""

    @property
    def forgetting(self) -> float:
        """Rise of the loss on held-out pre-training text, in nats per token.

        Raises:
            ValueError: the run was given no such text.
        """
        if "pretraining_loss" not in self.before:
            raise ValueError("forgetting was not measured: give finetune pretraining_validation=")
        return self.after["pretraining_loss"] - self.before["pretraining_loss"]


def finetune(
    model: Transformer,
    train: InstructionSet,
    settings: SFTSettings,
    *,
    valid: InstructionSet | None = None,
    replay: TokenStream | None = None,
    pretraining_validation: TokenStream | None = None,
    evaluate: Evaluate | None = None,
    checkpoint_folder: Path | str | None = None,
    progress: bool = True,
    **fit_options: Any,
) -> FineTuning:
    """Fine-tune `model` in place on conversations; with a checkpoint folder, go on where an earlier run stopped.

    Evaluations, before training and whenever `fit` evaluates, hold: "validation_loss", nats per target of `valid`;
    "pretraining_loss", nats per token of `pretraining_validation`, whose rise is forgetting; and what `evaluate`
    returns. With a checkpoint folder the numbers from before are those that the model given here has.

    Args:
        model: trained in place; which of its parameters move, `settings.trainable` says.
        train: conversations, encoded with the settings' `loss_on` and `truncation`.
        settings: the run.
        valid: held-out conversations.
        replay: pre-training text for `settings.replay_share`.
        pretraining_validation: held-out pre-training text.
        evaluate: further measurements of the model, numbers by name.
        checkpoint_folder: see `fit`.
        progress: show a bar.
        fit_options: passed on to `fit`.

    Raises:
        ValueError: a replay share without pre-training text or the other way round, a model with an adapter, or what
            the parts refuse.
    """
    if (settings.replay_share > 0) != (replay is not None):
        raise ValueError(
            f"replay_share={settings.replay_share} and {'no ' * (replay is None)}replay text: give both or neither"
        )
    if lora_layers(model) or isinstance(model.embedding, PromptEmbedding):
        raise ValueError(
            "the model has an adapter, and finetune would move its base: train the adapter with fit and sft_loss"
        )
    trainable = choose_trainable(model, settings.trainable)
    batches, loss = _batches(model, train, settings, replay)
    measure = _measure(model, valid, pretraining_validation, evaluate, settings.batch_size)
    before = _measured(model, measure)
    fit_options.setdefault("description", "fine-tuning")
    result = fit(
        model, batches, loss, settings.fit,
        evaluate=measure, checkpoint_folder=checkpoint_folder, progress=progress, **fit_options,
    )  # fmt: skip
    model.eval()
    last = {name: value for name, value in result.evaluations[-1].items() if name not in ("step", "seconds")}
    return FineTuning(fit=result, trainable=trainable, before=before, after=last)


def _batches(
    model: Transformer, train: InstructionSet, settings: SFTSettings, replay: TokenStream | None
) -> tuple[BatchSource, Loss]:
    world = distributed.world()
    common = {"context_length": model.config.context_length, "seed": settings.seed}
    common |= {"rank": world.rank, "world_size": world.size}
    instructions = InstructionBatches(
        train, batch_size=settings.batch_size, packed=settings.packed, apart=settings.apart, **common
    )
    if replay is None:
        return instructions, sft_loss
    pretraining = PackedBatches(replay, batch_size=settings.replay_batch_size, **common)
    return ReplayBatches(instructions, pretraining), with_replay(settings.replay_share)


def instruction_loss(model: nn.Module, data: InstructionSet, batch_size: int = 32) -> float:
    """Nats per target of conversations, each in a row of its own, in the weights' own precision."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    order = data.lengths.argsort(kind="stable")
    width = int(data.lengths.max()) - 1
    source = InstructionBatches(data, batch_size=1, context_length=width, seed=0)
    with torch.no_grad():
        for start in range(0, len(data), batch_size):
            batch = source.collate(order[start : start + batch_size])
            part, n, _ = sft_loss(model, {name: value.to(device) for name, value in batch.items()})
            total, count = total + float(part), count + int(n)
    model.train(was_training)
    return total / count


def _measure(
    model: Transformer,
    valid: InstructionSet | None,
    pretraining: TokenStream | None,
    evaluate: Evaluate | None,
    batch_size: int,
) -> Evaluate:
    """All measurements as one function for `fit`."""
    text_loss = None if pretraining is None else validation(pretraining, model.config.context_length)

    def measure(current: nn.Module) -> dict[str, float]:
        numbers: dict[str, float] = {}
        if valid is not None:
            numbers["validation_loss"] = instruction_loss(current, valid, batch_size)
        if text_loss is not None:
            measured = text_loss(current)
            numbers["pretraining_loss"] = measured["validation_loss"]
            numbers["pretraining_error"] = measured["validation_error"]
        return numbers | (evaluate(current) if evaluate is not None else {})

    return measure


@torch.no_grad()
def _measured(model: nn.Module, measure: Evaluate) -> dict[str, float]:
    """Measure as `fit` does: in evaluation mode."""
    was_training = model.training
    model.eval()
    numbers = measure(model)
    model.train(was_training)
    return numbers
