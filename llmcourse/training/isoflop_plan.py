"""The plan of an IsoFLOP sweep: which models are trained on how many tokens for each budget of training compute.

At a fixed budget C a larger model sees fewer tokens: tokens = C / (FLOPs per token). Compute is counted exactly
(`accounting.training_flops_per_token`: head and attention products included, the embedding look-up costs nothing),
since 6 N is far off for models whose head is as large as their blocks. N is reported without and with embeddings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from llmcourse import accounting, durable
from llmcourse.data.token_stream import TokenStream
from llmcourse.models.config import ModelConfig
from llmcourse.training.fit import FitSettings
from llmcourse.training.width_scaling import width_multiplier


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """What all runs of a sweep share.

    Raises:
        ValueError: a value outside its range, an unknown rule, or Muon with a width rule.
    """

    batch_size: int = 32
    """rows of a step; fewer where a run would otherwise have less than `min_steps`"""
    min_steps: int = 60
    """steps below which the batch is made smaller"""
    lr: float = 1e-2
    """peak learning rate at the base width"""
    base_width: int = 32
    """d_model that `lr` was tuned on"""
    rule: str = "mup"
    """how the learning rate follows the width: standard (not at all), simple or mup, see `width_scaling`"""
    warmup_fraction: float = 0.1
    """share of the steps with rising learning rate"""
    schedule: str = "cosine"
    """decays to the end of each run, whatever its length"""
    final_fraction: float = 0.0
    """learning rate at the end as a fraction of the peak"""
    optimizer: str = "adamw"
    """adamw, or muon with rule="standard" """
    weight_decay: float = 0.1
    """at the base width"""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's moment decays"""
    precision: str = "fp32"
    """fp32, bf16 or auto; casting costs small models more than it saves"""
    compile: str = "off"
    """off, on or auto: compiling takes longer than a small run"""
    seed: int = 0
    """of weights and data order"""

    def __post_init__(self) -> None:
        for name in ("batch_size", "min_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give at least 1")
        if not 0 <= self.warmup_fraction <= 1:
            raise ValueError(f"warmup_fraction={self.warmup_fraction}: give a fraction between 0 and 1")
        width_multiplier(self.base_width, self.base_width, self.rule)
        if self.optimizer == "muon" and self.rule != "standard":
            raise ValueError(f"rule={self.rule!r} is AdamW's: use rule='standard' with optimizer='muon'")
        self.fit(steps=10)

    def fit(self, steps: int) -> FitSettings:
        """The loop's settings for a run of that many steps."""
        shared = ("lr", "schedule", "final_fraction", "optimizer", "weight_decay", "betas", "precision")
        values = {name: getattr(self, name) for name in (*shared, "compile", "seed")}
        return FitSettings(steps=steps, warmup_steps=round(self.warmup_fraction * steps), **values)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One model trained on one budget."""

    budget: float
    """C in FLOPs, as planned"""
    model: ModelConfig
    """shape"""
    batch_size: int
    """rows of a step"""
    steps: int
    """optimizer steps"""
    settings: SweepSettings
    """the rest"""

    @property
    def tokens(self) -> int:
        """Training tokens, D."""
        return self.steps * self.batch_size * self.model.context_length

    @property
    def flops(self) -> float:
        """FLOPs of the whole run, within half a step of the budget."""
        return self.tokens * accounting.training_flops_per_token(self.model)

    @property
    def parameters(self) -> int:
        """N without embeddings."""
        return accounting.count_parameters(self.model, embeddings=False)

    @property
    def parameters_with_embeddings(self) -> int:
        """N, embeddings (and an untied head) included."""
        return accounting.count_parameters(self.model)

    @property
    def hidden_lr(self) -> float:
        """Peak learning rate of the hidden matrices."""
        settings = self.settings
        return settings.lr / width_multiplier(self.model.d_model, settings.base_width, settings.rule)

    def key(self, train: TokenStream, valid: TokenStream) -> str:
        """Name of the result: equal settings and equal data give equal names."""
        values = dataclasses.asdict(self) | {"data": [train.checksum, valid.checksum]}
        return durable.text_digest(durable.canonical_json(values))[:16]


def small_model(d_model: int, n_layers: int, vocab_size: int, *, context_length: int = 64) -> ModelConfig:
    """A shape of the sweep's family: heads of 16 channels (8 below 32), as many key heads, d_ff = 3 d_model.

    Raises:
        ValueError: d_model is not a multiple of its head size.
    """
    d_head = 16 if d_model >= 32 else 8
    if d_model % d_head:
        raise ValueError(f"d_model={d_model}: give a multiple of {d_head}")
    heads = d_model // d_head
    return ModelConfig(
        vocab_size=vocab_size,
        context_length=context_length,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=heads,
        n_kv_heads=heads,
        d_ff=3 * d_model,
    )


def plan(budgets: Sequence[float], models: Sequence[ModelConfig], settings: SweepSettings) -> list[Run]:
    """A run for every budget and model, tokens = budget / FLOPs per token, rounded to whole steps.

    Raises:
        ValueError: no budgets or models, or a budget that gives a model less than 10 steps of one row.
    """
    if not budgets or not models:
        raise ValueError(f"{len(budgets)} budgets and {len(models)} models: give at least one of each")
    runs = []
    for budget in budgets:
        for model in models:
            tokens = budget / accounting.training_flops_per_token(model)
            rows = min(settings.batch_size, int(tokens / (settings.min_steps * model.context_length)))
            rows = max(rows, 1)
            steps = round(tokens / (rows * model.context_length))
            if steps < 10:
                raise ValueError(
                    f"{budget:.3g} FLOPs give d_model={model.d_model}, n_layers={model.n_layers} only {steps} steps: "
                    "raise the budget or leave out that model"
                )
            runs.append(
                Run(budget=float(budget), model=model, batch_size=rows, steps=steps, settings=settings)
            )
    return runs
