"""Bytes of training and generation: weights, gradients, optimizer states, activations, logits, key/value cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmcourse.accounting.activations import (
    evaluation_bytes,
    loss_work_bytes,
    saved_activations,
)
from llmcourse.accounting.parameters import attention_weights, count_parameters
from llmcourse.accounting.shapes import shape_of

# bytes an optimizer keeps for each parameter that it updates
OPTIMIZER_BYTES = {"sgd": 0, "momentum": 4, "adamw": 8, "adamw-8bit": 2, "muon": 4}
ADAMW_8BIT_SCALES = 2 * 4 / 256  # one float32 scale for each block of 256 values, in each of the two moments


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes by part at the moment of the peak."""

    parts: dict[str, int]
    """name of the part -> bytes"""

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.parts.values())

    @property
    def gib(self) -> float:
        """The total in GiB, 2^30 bytes."""
        return self.total / 2**30


def kv_cache_bytes(config: Any, n_tokens: int, batch_size: int = 1, bytes_per_value: float = 2) -> int:
    """Bytes of keys and values of `n_tokens` tokens a row: 2 x layers x K x C values a token."""
    shape = shape_of(config)
    values = 2 * shape.n_layers * shape.n_kv_heads * shape.d_head
    return round(values * n_tokens * batch_size * bytes_per_value)


def state_bytes(
    config: Any,
    *,
    optimizer: str = "adamw",
    weight_bytes: int = 4,
    gradient_bytes: int | None = None,
    master_weights: bool = False,
) -> dict[str, int]:
    """Bytes of what training keeps for each parameter: weights, gradients, optimizer, master.

    bfloat16 weights with float32 master copies and AdamW come to 2 + 2 + 4 + 8 = 16 bytes a parameter, as in ZeRO's
    accounting (Rajbhandari et al., 2020, section 3.1). Autocast over float32 weights: 4 + 4 + 8.

    Args:
        config: anything that `shape_of` accepts.
        optimizer: sgd, momentum, adamw, adamw-8bit (Dettmers et al., 2022, blocks of 256), or muon (momentum for hidden
            matrices, AdamW for the rest).
        weight_bytes: bytes of one weight.
        gradient_bytes: bytes of one gradient; `None` is the weights'.
        master_weights: whether float32 copies of the weights are kept.

    Raises:
        ValueError: an unknown optimizer.
    """
    if optimizer not in OPTIMIZER_BYTES:
        raise ValueError(f"optimizer={optimizer!r}: choose one of {', '.join(OPTIMIZER_BYTES)}")
    n = count_parameters(config)
    states = OPTIMIZER_BYTES[optimizer] * n
    if optimizer == "adamw-8bit":
        states += round(ADAMW_8BIT_SCALES * n)
    if optimizer == "muon":
        states += (OPTIMIZER_BYTES["adamw"] - OPTIMIZER_BYTES["muon"]) * (n - _hidden_matrices(config))
    return {
        "weights": weight_bytes * n,
        "gradients": (weight_bytes if gradient_bytes is None else gradient_bytes) * n,
        "optimizer": states,
        "master": 4 * n if master_weights else 0,
    }


def peak_memory(
    config: Any,
    batch: int,
    context: int | None = None,
    *,
    optimizer: str = "muon",
    precision: str = "bf16",
    compiled: bool = False,
    attention: str = "blocked",
    checkpointing: str = "none",
    accumulation: bool = False,
    evaluation_batch: int = 0,
    baseline: int = 0,
) -> MemoryEstimate:
    """Peak bytes of training this course's model with `training.fit`, float32 weights.

    Activations are largest when the backward pass begins, before it has made gradients; gradients are largest when it
    ends, when the activations are gone: so the larger of the two moments counts, not their sum. With gradient
    accumulation the earlier micro-batches' gradients are there at the first moment too. An evaluation is a third
    moment.

    Args:
        config: a `ModelConfig` or shape of our family.
        batch: rows of a micro-batch.
        context: tokens of a row; `None` is the model's context length.
        optimizer: see `state_bytes`.
        precision: see `saved_activations`, as for `compiled`, `attention` and `checkpointing`.
        compiled: whether the loss runs under torch.compile.
        attention: "blocked" or "fused".
        checkpointing: "none" or "full".
        accumulation: whether a step has several micro-batches.
        evaluation_batch: rows of an evaluation's batch, 0 for no evaluation during the run.
        baseline: bytes of the process before the model exists: interpreter, libraries, compiler, data. Measure it.

    Raises:
        ValueError: what `state_bytes` and `saved_activations` refuse.
    """
    states = state_bytes(config, optimizer=optimizer)
    gradients = states.pop("gradients")
    saved = saved_activations(
        config,
        batch,
        context,
        precision=precision,
        compiled=compiled,
        attention=attention,
        checkpointing=checkpointing,
    )
    loss = loss_work_bytes(config, batch, context, compiled=compiled)
    moments = [
        {
            "activations": sum(saved.values()),
            "loss": loss,
            **({"gradients": gradients} if accumulation else {}),
        },
        {"gradients": gradients, "update": update_bytes(config, optimizer)},
    ]
    if evaluation_batch:
        moments.append({"evaluation": evaluation_bytes(config, evaluation_batch, context)})
    largest = max(moments, key=lambda moment: sum(moment.values()))
    parts = {"baseline": baseline, **states, **largest}
    return MemoryEstimate(parts={name: size for name, size in parts.items() if size})


def update_bytes(config: Any, optimizer: str) -> int:
    """Temporary bytes of an optimizer step: nothing for fused AdamW, stacks of the largest group of matrices for Muon.

    Muon holds, for all matrices of one shape, the float32 directions twice (single and stacked) and about three
    bfloat16 or float32 copies inside Newton-Schulz: 16 bytes a value.
    """
    if optimizer != "muon":
        return 0
    shape = shape_of(config)
    width = shape.d_model
    groups = {
        "mlp": shape.n_layers * (shape.mlp_matrices - 1) * width * shape.d_ff,
        "square": shape.n_layers * 2 * width * shape.n_heads * shape.d_head,
    }
    return 16 * max(groups.values())


def _hidden_matrices(config: Any) -> int:
    """Entries of the matrices that Muon updates: all but embedding, head and vectors."""
    shape = shape_of(config)
    mlp = shape.mlp_matrices * shape.d_model * shape.d_ff
    experts = shape.n_experts * shape.mlp_matrices * shape.d_model * shape.d_expert
    router = shape.d_model * (shape.n_experts + bool(shape.d_shared_expert))
    shared = shape.mlp_matrices * shape.d_model * shape.d_shared_expert
    dense = shape.n_layers * attention_weights(shape) + shape.n_dense_layers * mlp
    return dense + shape.n_mixture_layers * (experts + shared + router)
