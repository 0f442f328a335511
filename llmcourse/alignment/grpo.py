"""GRPO and its descendants: reinforcement learning on verifiable rewards, over the one training loop."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from llmcourse.alignment.policy_losses import Objective, policy_loss
from llmcourse.alignment.rewards import Scorer
from llmcourse.alignment.rollouts import RolloutSettings, RolloutSource, sampled_log_probs
from llmcourse.data.packing import IGNORE
from llmcourse.inference.generation import TextCodec
from llmcourse.training import distributed
from llmcourse.training.fit import Evaluate, FitResult, FitSettings, Loss, fit
from llmcourse.training.state import unwrap


@dataclass(frozen=True, kw_only=True)
class GRPOSettings:
    """A whole run: how rollouts are made, what is maximized, and the loop.

    Raises:
        ValueError: a round that does not divide into optimizer steps, or whatever the parts refuse.
    """

    rollouts: RolloutSettings = field(default_factory=RolloutSettings)
    """how rollouts are written and used"""
    objective: Objective = field(default_factory=Objective)
    """what is maximized: `policy_losses.grpo()`, `dapo()`, `dr_grpo()`, `gspo()`"""
    fit: FitSettings = field(default_factory=lambda: FitSettings(steps=100, lr=1e-4, compile="off"))
    """the loop; its steps are optimizer steps, and lengths change too often for `compile` to pay"""

    def __post_init__(self) -> None:
        if self.rollouts.micro_batches % self.fit.micro_steps:
            raise ValueError(
                f"a round has {self.rollouts.micro_batches} micro-batches, a step {self.fit.micro_steps}: "
                "make rounds of whole steps"
            )


def cpu(**changes: Any) -> GRPOSettings:
    """For the course's base model on two cores. `changes` are fields of `GRPOSettings`."""
    settings = GRPOSettings(
        rollouts=RolloutSettings(prompts=16, group_size=8, max_new_tokens=40, micro_batch=128),
        objective=Objective(clip_high=0.28, average="token"),
        fit=FitSettings(
            steps=150, lr=3e-4, warmup_steps=5, schedule="constant", weight_decay=0.0, compile="off"
        ),
    )
    return dataclasses.replace(settings, **changes)


def gpu(**changes: Any) -> GRPOSettings:
    """For a model of a billion parameters on one GPU. `changes` are fields of `GRPOSettings`."""
    settings = GRPOSettings(
        rollouts=RolloutSettings(
            prompts=32, group_size=16, max_new_tokens=1024, micro_batch=16, chunk_size=2048
        ),
        objective=Objective(clip_high=0.28, average="token"),
        fit=FitSettings(
            steps=500,
            lr=1e-6,
            warmup_steps=10,
            schedule="constant",
            weight_decay=0.0,
            micro_steps=16,
            precision="bf16",
            compile="off",
        ),
    )
    return dataclasses.replace(settings, **changes)


@dataclass
class GRPOResult:
    """What a run leaves: the loop's records and a record of each round of rollouts."""

    fit: FitResult
    """of the loop"""
    rounds: list[dict[str, float]]
    """per round of this process: reward, constant_groups, groups, length, cut, tokens, seconds"""

    @property
    def constant_share(self) -> float:
        """Share of all groups whose rewards were all equal: generated for nothing."""
        return sum(one["constant_groups"] for one in self.rounds) / sum(one["groups"] for one in self.rounds)

    @property
    def tokens(self) -> int:
        """Tokens generated."""
        return int(sum(one["tokens"] for one in self.rounds))


def grpo_loss(
    objective: Objective, temperature: float = 1.0, *, chunk_size: int | None = None, group_size: int = 1
) -> Loss:
    """The loss of a batch from `RolloutSource`, for `fit`: (model, batch) -> (sum, count, metrics).

    The sum over the count is the negative of Shao et al. (2024), eq. 3, or of what `objective` makes of it. Metrics are
    those of `policy_loss`, and the mean reward and response length of the (last) micro-batch. A `group_size` above 1
    says that the rows come in groups that read their prompt together.
    """

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Any]]:
        tokens, targets = batch["tokens"], batch["targets"]
        log_probs = sampled_log_probs(
            model, tokens, targets, temperature, chunk_size=chunk_size, group_size=group_size
        )  # (B, T)
        mask = targets != IGNORE
        total, count, metrics = policy_loss(
            log_probs,
            batch["advantages"],
            mask,
            objective,
            old_log_probs=batch.get("old_log_probs"),
            ref_log_probs=batch.get("ref_log_probs"),
        )
        metrics["reward"] = batch["rewards"].mean()
        metrics["length"] = mask.sum() / len(mask)
        return total, count, metrics

    return loss


def train_grpo(
    model: nn.Module,
    tokenizer: TextCodec,
    prompts: Sequence[Sequence[int]],
    scorer: Scorer,
    settings: GRPOSettings,
    *,
    stop_id: int | None = None,
    reference: nn.Module | None = None,
    evaluate: Evaluate | None = None,
    checkpoint_folder: Path | str | None = None,
    progress: bool = True,
    **fit_options: Any,
) -> GRPOResult:
    """Train `model` in place on what it writes itself; `prompts` are token ids, `scorer` rewards the responses.

    `reference` is the policy that the KL divergence is measured from. Without one, a KL weight above 0 takes a frozen
    copy of the model as it comes; a weight of 0 measures none, which saves a forward pass a round. A model with an
    adapter needs no copy: pass the model without it. With a checkpoint folder, a run that was stopped needs the same
    reference again: pass it, since the copy is made before the checkpoint is read.

    Raises:
        ValueError: what `RolloutSource` or `fit` refuse; a reward that is not finite.
        TrainingError: as in `fit`.
    """
    if reference is None and settings.objective.kl_weight:
        reference = copy.deepcopy(unwrap(model)).requires_grad_(False)
    world = distributed.world()
    source = RolloutSource(
        model,
        tokenizer,
        prompts,
        scorer,
        settings.rollouts,
        stop_id=stop_id,
        scale=settings.objective.scale,
        reference=reference,
        micro_steps=settings.fit.micro_steps,
        precision=settings.fit.precision,
        rank=world.rank,
        world_size=world.size,
    )
    rollouts = settings.rollouts
    loss = grpo_loss(
        settings.objective,
        rollouts.temperature,
        chunk_size=rollouts.chunk_size,
        group_size=rollouts.shared,
    )
    result = fit(
        model,
        source,
        loss,
        settings.fit,
        evaluate=evaluate,
        checkpoint_folder=checkpoint_folder,
        progress=progress,
        description=fit_options.pop("description", "GRPO"),
        **fit_options,
    )
    done = GRPOResult(result, source.rounds)
    if progress and world.is_main and done.constant_share:
        groups = sum(int(one["constant_groups"]) for one in done.rounds)
        print(f"{groups} groups ({done.constant_share:.0%}) had equal rewards: generated, but no gradient")
    return done
