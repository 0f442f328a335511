"""AdamW and Muon, and which parameters get which.

AdamW treats every number on its own; Muon treats a weight matrix as a matrix: it replaces the momentum by the nearest
orthogonal matrix, so that all directions of the update have the same size.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from llmcourse.runtime import has_fast_bf16

NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def adamw_step(
    parameter: Tensor,
    gradient: Tensor,
    first_moment: Tensor,
    second_moment: Tensor,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
) -> None:
    """One AdamW update in place, written out; `step` counts from 1.

    Loshchilov and Hutter (2019, algorithm 2) but for one thing, as in torch: the decay is scaled by the whole learning
    rate, in the paper only by the schedule.

    All tensors have one shape. The study version: training uses torch's fused kernel, a test shows them equal.
    """
    beta1, beta2 = betas
    parameter.mul_(1 - lr * weight_decay)  # decoupled: the decay does not pass through the moments
    first_moment.lerp_(gradient, 1 - beta1)
    second_moment.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    corrected_first = first_moment / (1 - beta1**step)  # the moments start at 0 and are biased towards it
    corrected_second = second_moment / (1 - beta2**step)
    parameter.sub_(lr * corrected_first / (corrected_second.sqrt() + eps))


def newton_schulz(matrix: Tensor, iterations: int = 5, eps: float = 1e-7) -> Tensor:
    """Approximate the orthogonal factor U V^T of `matrix` = U S V^T, for one (m, n) or a stack (..., m, n).

    Each iteration maps every singular value s to 3.4445 s - 4.7750 s^3 + 2.0315 s^5 without computing an SVD. Five of
    them bring all but tiny singular values into about [0.7, 1.2], which is near enough to 1 for an update (Jordan et
    al., 2024). Runs in the input's dtype; bfloat16 is enough.
    """
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    # The Gram matrix below is then the small one, and Frobenius norm 1 bounds all singular values by 1.
    x = matrix.mT if matrix.shape[-2] > matrix.shape[-1] else matrix
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if matrix.shape[-2] > matrix.shape[-1] else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized by `newton_schulz` (Jordan et al., 2024), for 2-D hidden weights.

    The update of an (m, n) matrix is scaled by 0.2 sqrt(max(m, n)), which gives it the root mean square of a typical
    AdamW update, so that both share one learning rate and weight decay (Liu et al., 2025, section 2.2, eq. 4).

    Raises:
        ValueError: a parameter is not a matrix.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        iterations: int = 5,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "iterations": iterations}
        )
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(
                        f"Muon got a parameter of shape {tuple(parameter.shape)}: it takes matrices, "
                        "give vectors and embeddings to AdamW"
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all parameters; matrices of one shape are orthogonalized in one batch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                directions = torch.stack([self._nesterov(p, group["momentum"]) for p in parameters])
                low = torch.bfloat16 if has_fast_bf16(directions.device) else directions.dtype
                updates = newton_schulz(directions.to(low), group["iterations"]).to(directions.dtype)
                scale = 0.2 * math.sqrt(max(shape))
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, list(updates.unbind()), alpha=-group["lr"] * scale)
        return loss

    def _nesterov(self, parameter: Tensor, momentum: float) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(buffer, momentum)


def split_parameters(model: nn.Module) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Trainable parameters as (hidden matrices, embeddings and head, vectors).

    Vectors (norm gains) get no weight decay; embeddings and head never get Muon: their rows are tokens, each used by
    a few positions of a batch, not directions of one linear map.
    """
    ends = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    ends |= {id(m.weight) for name, m in model.named_modules() if name.split(".")[-1] in ("head", "lm_head")}
    parameters = [p for p in model.parameters() if p.requires_grad]
    hidden = [p for p in parameters if p.ndim == 2 and id(p) not in ends]
    embeddings = [p for p in parameters if id(p) in ends]
    vectors = [p for p in parameters if p.ndim != 2 and id(p) not in ends]
    return hidden, embeddings, vectors


def build_optimizers(
    model: nn.Module,
    name: str,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
) -> list[torch.optim.Optimizer]:
    """The optimizers of one run: ["adamw"] for everything, or Muon for hidden matrices and AdamW for the rest.

    Raises:
        ValueError: an unknown name, or nothing to train.
    """
    hidden, embeddings, vectors = split_parameters(model)
    if not (hidden or embeddings or vectors):
        raise ValueError("the model has no trainable parameter: set requires_grad on some")
    if name not in ("adamw", "muon"):
        raise ValueError(f"optimizer={name!r}: choose adamw or muon")
    decayed = embeddings if name == "muon" else hidden + embeddings
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    optimizers: list[torch.optim.Optimizer] = []
    if groups:
        optimizers.append(torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True))
    if name == "muon" and hidden:
        optimizers.insert(0, Muon(hidden, lr=lr, momentum=momentum, weight_decay=weight_decay))
    return optimizers
