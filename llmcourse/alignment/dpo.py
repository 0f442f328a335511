"""Direct preference optimization: settings, the losses of the DPO family for the one loop, and training on pairs.

A batch of pairs holds "chosen_tokens", "chosen_targets", "rejected_tokens", "rejected_targets", each (B, T) int64 with
the target -100 outside the response, and, for the losses with a reference, the numbers that `reference.py` stores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmcourse import runtime
from llmcourse.alignment import preference_losses as losses
from llmcourse.alignment.log_probs import response_lengths, response_log_probs
from llmcourse.alignment.reference import (
    MISMATCHED,
    PAIR,
    MismatchedBatches,
    ReferenceBatches,
    joined,
    reference_log_probs,
)
from llmcourse.alignment.shared_prompt import (
    CHOSEN,
    REJECTED,
    SharedPrompt,
    SharedPromptBatches,
    sharing_pays,
)
from llmcourse.data.epoch_batches import EpochBatches
from llmcourse.data.packing import IGNORE
from llmcourse.training import distributed
from llmcourse.training.fit import Batch, Evaluate, FitResult, FitSettings, Loss, fit

# The options of each loss beside beta, and the beta that it starts from: that of its paper or of TRL.
OPTIONS: dict[str, tuple[str, ...]] = {
    "dpo": ("label_smoothing",),
    "ipo": ("length_normalized",),
    "kto": ("desirable_weight", "undesirable_weight"),
    "orpo": (),
    "simpo": ("gamma",),
}
BETAS = {"dpo": 0.1, "ipo": 0.1, "kto": 0.1, "orpo": 0.1, "simpo": 2.0}
WITHOUT_REFERENCE = ("orpo", "simpo")


@dataclass(frozen=True, kw_only=True)
class DPOSettings:
    """Which loss of the family, and how to train with it.

    Raises:
        ValueError: an unknown loss, a value outside its range, or an option that the loss does not have.
    """

    loss: str = "dpo"
    """dpo, ipo, kto, orpo or simpo; cDPO is dpo with label smoothing"""
    beta: float | None = None
    """strength of the pull to the reference (dpo, ipo, kto), weight of the odds-ratio term (orpo), scale of the mean
    log-probability (simpo); `None` takes 0.1, for simpo 2"""
    label_smoothing: float = 0.0
    """dpo: assumed share of wrong labels, from 0 to below 0.5"""
    length_normalized: bool = True
    """ipo: log-ratios per token, as in TRL; False: of whole responses, as eq. 17 is written"""
    desirable_weight: float = 1.0
    """kto: weight of chosen responses"""
    undesirable_weight: float = 1.0
    """kto: weight of rejected responses"""
    gamma: float = 1.0
    """simpo: margin that the chosen response must win by"""
    chunk_size: int | None = None
    """positions that go through the output head at a time, see `response_log_probs`; `None`: all together"""
    share_prompt: bool | None = None
    """send each prompt through the model once for both responses, see `shared_prompt.py`; the same numbers, fewer
    positions; `None`: where that is faster, see `sharing_pays`"""
    fit: FitSettings = field(
        default_factory=lambda: FitSettings(steps=100, lr=3e-4, weight_decay=0.0, compile="off")
    )
    """the loop"""

    def __post_init__(self) -> None:
        if self.loss not in OPTIONS:
            raise ValueError(f"loss={self.loss!r}: choose one of {', '.join(OPTIONS)}")
        if self.beta is None:
            object.__setattr__(self, "beta", BETAS[self.loss])
        others = [name for options in OPTIONS.values() for name in options if name not in OPTIONS[self.loss]]
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for name in others:
            if getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"{name}={getattr(self, name)}: loss={self.loss!r} does not use it, leave it out"
                )
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"chunk_size={self.chunk_size}: give at least 1, or None")
        pair = torch.zeros(1)
        self.pair_losses(pair - 1, pair - 1, pair, pair, *[pair + 1] * 2, pair)  # refuses values out of range

    @property
    def has_reference(self) -> bool:
        """Whether the loss needs log-probabilities under a reference."""
        return self.loss not in WITHOUT_REFERENCE

    def pair_losses(
        self,
        chosen: Tensor,
        rejected: Tensor,
        chosen_ref: Tensor,
        rejected_ref: Tensor,
        chosen_lengths: Tensor,
        rejected_lengths: Tensor,
        reference_point: Tensor,
    ) -> Tensor:
        """The loss of each pair, (B,), from summed log-probabilities and lengths (B,); for kto, the sum of its two
        halves.

        What the loss does not use is ignored.
        """
        beta = self.beta
        if self.loss == "dpo":
            return losses.dpo_loss(
                chosen, rejected, chosen_ref, rejected_ref, beta=beta, label_smoothing=self.label_smoothing
            )
        if self.loss == "kto":
            weights = {
                "desirable_weight": self.desirable_weight,
                "undesirable_weight": self.undesirable_weight,
            }
            wanted = torch.ones_like(chosen, dtype=torch.bool)
            return losses.kto_loss(
                chosen, chosen_ref, wanted, reference_point, beta=beta, **weights
            ) + losses.kto_loss(rejected, rejected_ref, ~wanted, reference_point, beta=beta, **weights)
        if self.loss == "ipo":
            n, m = (chosen_lengths, rejected_lengths) if self.length_normalized else (1, 1)
            return losses.ipo_loss(chosen / n, rejected / m, chosen_ref / n, rejected_ref / m, beta=beta)
        means = chosen / chosen_lengths, rejected / rejected_lengths
        if self.loss == "orpo":
            return losses.orpo_loss(*means, beta=beta)
        return losses.simpo_loss(*means, beta=beta, gamma=self.gamma)


def cpu(**changes: Any) -> DPOSettings:
    """For a model of about a million parameters on two cores: some hundred steps of 32 pairs take a minute or so."""
    fit_settings = FitSettings(
        steps=150, lr=3e-4, warmup_steps=10, schedule="linear", weight_decay=0.0, compile="off"
    )
    return with_changes(DPOSettings(fit=fit_settings), **changes)


def gpu(**changes: Any) -> DPOSettings:
    """For a model of some hundred million parameters or more on one GPU: the small learning rates of the papers."""
    fit_settings = FitSettings(
        steps=1000,
        lr=5e-6,
        warmup_steps=100,
        schedule="linear",
        weight_decay=0.0,
        micro_steps=2,
        compile="off",
    )
    return with_changes(DPOSettings(chunk_size=4096, fit=fit_settings), **changes)


PRESETS = {"cpu": cpu, "gpu": gpu}


def preset(name: str, **changes: Any) -> DPOSettings:
    """The preset of that name.

    Raises:
        ValueError: an unknown name.
    """
    if name not in PRESETS:
        raise ValueError(f"preset={name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name](**changes)


def with_changes(settings: DPOSettings, **changes: Any) -> DPOSettings:
    """`settings` with fields replaced by name, those of `fit` included. Another loss brings its own beta.

    Raises:
        ValueError: no field of that name.
    """
    own = {f.name for f in dataclasses.fields(DPOSettings)}
    of_fit = {f.name for f in dataclasses.fields(FitSettings)}
    unknown = [name for name in changes if name not in own | of_fit]
    if unknown:
        raise ValueError(f"unknown setting {unknown[0]!r}: DPOSettings and FitSettings have all of them")
    chosen = {name: changes.pop(name) for name in list(changes) if name not in own}
    if changes.get("loss", settings.loss) != settings.loss:
        changes.setdefault("beta", None)
    return dataclasses.replace(
        settings, fit=dataclasses.replace(changes.pop("fit", settings.fit), **chosen), **changes
    )


def preference_loss(settings: DPOSettings) -> Loss:
    """The loss for `fit`: (model, batch) -> summed loss, number of pairs (of responses for kto), metrics.

    Chosen and rejected responses go through the model in one forward pass. Metrics: those of `preference_metrics`,
    chosen_log_prob and rejected_log_prob (mean over responses of summed ln pi), and for kto reference_point. The
    rewards are beta times the log-ratio to the reference; without one, beta times the mean log-probability per token.
    """

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int, dict[str, Any]]:
        (chosen, rejected), lengths = _pair_log_probs(model, batch, settings)
        references = [torch.zeros_like(chosen)] * 2
        if settings.has_reference:
            references = [_column(batch, f"{name}_ref_log_probs") for name in PAIR]
        metrics: dict[str, Any] = {
            "chosen_log_prob": chosen.detach().mean(),
            "rejected_log_prob": rejected.detach().mean(),
        }
        point = torch.zeros((), device=chosen.device)
        if settings.loss == "kto":
            point = metrics["reference_point"] = _reference_point(model, batch)
        total = settings.pair_losses(chosen, rejected, *references, *lengths, point).sum()
        scales = (1, 1) if settings.has_reference else lengths
        rewards = [
            settings.beta * (one - reference) / scale
            for one, reference, scale in zip((chosen, rejected), references, scales, strict=True)
        ]
        count = len(chosen) * (2 if settings.loss == "kto" else 1)
        return total, count, metrics | losses.preference_metrics(*rewards)

    return loss


def _pair_log_probs(
    model: nn.Module, batch: Batch, settings: DPOSettings
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Summed ln pi and lengths of the chosen and of the rejected responses, (B,) each."""
    if settings.share_prompt is False or (settings.share_prompt is None and "shared_tokens" not in batch):
        tokens, targets = joined(batch, PAIR)
        log_probs = response_log_probs(model, tokens, targets, chunk_size=settings.chunk_size).sum(dim=-1)
        return log_probs.chunk(2), response_lengths(targets).chunk(2)
    segments, targets = _column(batch, "shared_segments"), batch["shared_targets"]
    cache = SharedPrompt(segments, batch["shared_places"])
    log_probs = response_log_probs(
        model, batch["shared_tokens"], targets, chunk_size=settings.chunk_size, cache=cache
    )
    sides = [segments == segment for segment in (CHOSEN, REJECTED)]
    return (
        tuple((log_probs * side).sum(dim=-1) for side in sides),
        tuple(response_lengths(targets.masked_fill(~side, IGNORE)) for side in sides),
    )


def _column(batch: Batch, name: str) -> Tensor:
    if name not in batch:
        raise ValueError(
            f"the batch has no {name!r}: make the batches with with_reference, or let train_dpo do it"
        )
    return batch[name]


@torch.no_grad()
def _reference_point(model: nn.Module, batch: Batch) -> Tensor:
    """KTO's scalar z, of the micro-batches of all processes together."""
    log_probs = response_log_probs(model, *joined(batch, (MISMATCHED,))).sum(dim=-1)
    mean = (log_probs - _column(batch, f"{MISMATCHED}_ref_log_probs")).mean()
    mean = distributed.sum_over_processes(mean) / distributed.world().size
    return losses.kto_reference_point(mean, torch.zeros_like(mean))


def with_reference(
    reference: nn.Module,
    batches: EpochBatches,
    settings: DPOSettings,
    *,
    batch_size: int = 64,
    progress: bool = True,
) -> EpochBatches:
    """Batches of pairs with all that the loss needs of the reference; `batches` itself where it needs nothing.

    For kto the pairs also get their "mismatched" rows, see `MismatchedBatches`; with a shared prompt, shared
    rows.

    Raises:
        ValueError: what `reference_log_probs` refuses.
    """
    if settings.has_reference and not isinstance(batches, ReferenceBatches | SharedPromptBatches):
        batches = _with_reference(reference, batches, settings, batch_size, progress)
    shares = settings.share_prompt
    if shares is None:
        shares = sharing_pays(settings.fit.precision, next(reference.parameters()).device)
    if shares and not isinstance(batches, SharedPromptBatches):
        batches = SharedPromptBatches(batches)
    return batches


def _with_reference(
    reference: nn.Module, batches: EpochBatches, settings: DPOSettings, batch_size: int, progress: bool
) -> ReferenceBatches:
    names = PAIR
    if settings.loss == "kto":
        config = getattr(reference, "config", None)
        batches = MismatchedBatches(batches, limit=getattr(config, "context_length", None))
        names = (*PAIR, MISMATCHED)
    precision = settings.fit.precision
    return ReferenceBatches(
        batches,
        reference_log_probs(
            reference, batches, names, batch_size=batch_size, precision=precision, progress=progress
        ),
    )


def preference_evaluation(batches: EpochBatches, settings: DPOSettings) -> Evaluate:
    """An `evaluate` for `fit` over all pairs of `batches`: validation_loss, and the loss's metrics as
    validation_<name>.

    batches are of held-out pairs, made by `with_reference`; they run in order of length, `batch_size` at a time.
    """
    loss = preference_loss(settings)
    order = batches.row_lengths.argsort(kind="stable")

    def evaluate(model: nn.Module) -> dict[str, float]:
        device = next(model.parameters()).device
        dtype = runtime.precision_dtype(settings.fit.precision, device)
        sums: dict[str, float] = {}
        units = 0
        for start in range(0, len(order), batches.batch_size):
            rows = order[start : start + batches.batch_size]
            batch = {name: value.to(device) for name, value in batches.collate(rows).items()}
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                total, count, metrics = loss(model, batch)  # in the precision of the reference's numbers
            units += int(count)
            weighted = {name: float(value) * len(rows) / len(order) for name, value in metrics.items()}
            for name, value in (weighted | {"loss": float(total.detach())}).items():
                sums[name] = sums.get(name, 0.0) + value
        return {
            f"validation_{name}": value / (units if name == "loss" else 1) for name, value in sums.items()
        }

    return evaluate


def train_dpo(
    model: nn.Module,
    batches: EpochBatches,
    settings: DPOSettings,
    *,
    valid: EpochBatches | None = None,
    reference: nn.Module | None = None,
    evaluate: Evaluate | None = None,
    checkpoint_folder: Path | str | None = None,
    progress: bool = True,
    **fit_options: Any,
) -> FitResult:
    """Train `model` in place on preference pairs and return its records.

    Args:
        model: the policy, usually after SFT. To resume, give that same model: `fit` then loads the checkpoint into it.
        batches: training pairs.
        settings: loss and loop.
        valid: held-out pairs, evaluated whole: see `preference_evaluation`.
        reference: the model whose log-probabilities are stored before the first step; `None`: `model` as it comes in.
        evaluate: further numbers, such as those of `policy_probe`.
        checkpoint_folder: as in `fit`.
        progress: show bars.
        fit_options: go to `fit`.

    Raises:
        ValueError: a response without a token, or what `fit` refuses.
    """
    reference = reference if reference is not None else model
    batches = with_reference(reference, batches, settings, progress=progress)
    evaluations = [] if evaluate is None else [evaluate]
    if valid is not None:
        valid = with_reference(reference, valid, settings, progress=progress)
        evaluations.insert(0, preference_evaluation(valid, settings))
    return fit(
        model,
        batches,
        preference_loss(settings),
        settings.fit,
        evaluate=_together(evaluations),
        checkpoint_folder=checkpoint_folder,
        progress=progress,
        **fit_options,
    )


def _together(evaluations: list[Callable[[nn.Module], dict[str, float]]]) -> Evaluate | None:
    if not evaluations:
        return None

    def evaluate(model: nn.Module) -> dict[str, float]:
        numbers: dict[str, float] = {}
        for one in evaluations:
            numbers |= one(model)
        return numbers

    return evaluate
