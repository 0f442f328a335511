"""Averages of weights: over checkpoints after training, and along a run as it goes.

The average of points on a trajectory that bounces across a valley lies nearer to its floor than they do. Points of one
run are averaged alike (Polyak and Juditsky, 1992; Izmailov et al., 2018), with exponential weights, or over the latest
checkpoints (Kaddour, 2022); the ends of several runs from one pre-trained model make a model soup (Wortsman et al.,
2022). Models that were trained apart from the start lie in different valleys, and their average is in none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llmcourse.training.state import model_tensors, separate_shared

StateDict = Mapping[str, Tensor]


def average_checkpoints(
    state_dicts: Sequence[StateDict], weights: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """The weighted mean sum_i w_i theta_i / sum_i w_i of models of one shape.

    Sums are taken in float64 (float32 where the device has no float64), since in bfloat16 a sum of many checkpoints
    stops growing; the result has the inputs' types. Tensors that are not floating, such as counters, must agree.

    Args:
        state_dicts: from models of one shape, such as the last checkpoints of a run; not changed.
        weights: one number for each; by default all count the same. Only their ratios matter, and a negative one
            extrapolates away from its checkpoint.

    Raises:
        ValueError: no checkpoints, another number of weights, weights that are not finite or do not sum to more than 0,
            or checkpoints that differ in names, shapes, types, or a tensor that is not floating.
    """
    shares = _shares(len(state_dicts), weights)
    first = state_dicts[0]
    for number, other in enumerate(state_dicts[1:], start=1):
        _require_alike(first, other, number)
    return {
        name: _mean([state[name] for state in state_dicts], shares)
        if tensor.is_floating_point()
        else tensor.detach().clone()
        for name, tensor in first.items()
    }


def _shares(n: int, weights: Sequence[float] | None) -> list[float]:
    """Weights that sum to 1."""
    if n == 0:
        raise ValueError("no checkpoints to average: give at least one")
    weights = [1.0] * n if weights is None else [float(weight) for weight in weights]
    if len(weights) != n:
        raise ValueError(f"{len(weights)} weights for {n} checkpoints: give one for each")
    total = math.fsum(weights)
    if not (math.isfinite(total) and total > 0):
        raise ValueError(f"weights sum to {total}: give finite numbers with a sum above 0")
    return [weight / total for weight in weights]


def _require_alike(first: StateDict, other: StateDict, number: int) -> None:
    if first.keys() != other.keys():
        name = min(first.keys() ^ other.keys())
        raise ValueError(f"{name} is in only one of checkpoints 0 and {number}: average models of one shape")
    for name, tensor in first.items():
        there = other[name]
        if tensor.shape != there.shape or tensor.dtype != there.dtype:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} {tensor.dtype} in checkpoint 0 and {tuple(there.shape)} "
                f"{there.dtype} in {number}: average models of one shape and type"
            )
        if not tensor.is_floating_point() and not torch.equal(tensor, there):
            raise ValueError(
                f"{name} ({tensor.dtype}) differs between checkpoints 0 and {number}: it has no mean, drop it first"
            )


def _mean(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    wide = torch.float32 if tensors[0].device.type == "mps" else torch.float64
    total = torch.zeros_like(tensors[0], dtype=wide)
    for tensor, share in zip(tensors, shares, strict=True):
        total.add_(tensor.detach().to(wide), alpha=share)
    return total.to(tensors[0].dtype)


class WeightAverage:
    """A running average of a model's weights: `fit(..., on_step=average)`, then `average.copy_to(model)`.

    With theta_k the weights of the k-th update, the average is

        bar theta_k = bar theta_{k-1} + (1 - decay) / (1 - decay^k) (theta_k - bar theta_{k-1}),

    which is the exponential moving average divided by the sum 1 - decay^k of its weights, as Adam's moments are: it
    starts at theta_1 and is never pulled toward the initial weights or toward 0. `decay` = 1 is its limit, the step
    1 / k: every update counts the same, as in stochastic weight averaging (Izmailov et al., 2018, algorithm 1).

    It is kept in float32 at least, one copy of the model. `fit` does not save it: after a resume it covers only the
    steps since.
    """

    def __init__(self, *, decay: float = 1.0, start: int = 0, every: int = 1) -> None:
        """Make an empty average.

        Args:
            decay: 1 for the uniform mean; below, the average reaches back about 1 / (1 - decay) updates.
            start: first step of `fit`, from 0, that counts.
            every: steps from one update to the next.

        Raises:
            ValueError: a value outside its range.
        """
        if not 0 <= decay <= 1:
            raise ValueError(f"decay={decay}: give a number from 0 to 1; 1 is the uniform mean")
        if start < 0:
            raise ValueError(f"start={start}: give the number of a step, from 0")
        if every < 1:
            raise ValueError(f"every={every}: give at least 1 step")
        self.decay, self.start, self.every = decay, start, every
        self.n_updates = 0
        self._mean: dict[str, Tensor] = {}

    def __call__(self, step: int, model: nn.Module) -> None:
        """`on_step` of `fit`: update at steps `start`, `start` + `every`, and so on."""
        if step >= self.start and (step - self.start) % self.every == 0:
            self.update(model)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the model's present weights into the average.

        Raises:
            ValueError: a tensor's name or shape is not that of the updates before.
        """
        current = _floating(model)
        if not self._mean:
            self._mean = {name: torch.zeros_like(t, dtype=_wide(t)) for name, t in current.items()}
        self._require_same(current)
        self.n_updates += 1
        for name, mean in self._mean.items():
            mean.lerp_(current[name].to(mean.dtype), self._newest_share)

    @property
    def _newest_share(self) -> float:
        if self.decay == 1:
            return 1 / self.n_updates
        return (1 - self.decay) / (1 - self.decay**self.n_updates)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Write the average into a model of the same shape, in the model's types.

        Raises:
            ValueError: there is no update yet, or the model has other tensors.
        """
        if not self._mean:
            raise ValueError(f"nothing to copy: no step from start={self.start} on was averaged yet")
        current = _floating(model)
        self._require_same(current)
        for name, mean in self._mean.items():
            current[name].copy_(mean)

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[nn.Module]:
        """Within `with average.swapped(model):` the model has the average; then its own weights again, bit for bit.

        Raises:
            ValueError: what `copy_to` refuses.
        """
        own = {name: tensor.clone() for name, tensor in _floating(model).items()}
        try:
            self.copy_to(model)
            yield model
        finally:
            with torch.no_grad():
                for name, tensor in _floating(model).items():
                    tensor.copy_(own[name])

    def _require_same(self, current: Mapping[str, Tensor]) -> None:
        here = {name: tuple(tensor.shape) for name, tensor in current.items()}
        kept = {name: tuple(tensor.shape) for name, tensor in self._mean.items()}
        if here != kept:
            name = min(name for name in here.keys() | kept.keys() if here.get(name) != kept.get(name))
            raise ValueError(
                f"{name} is {here.get(name)} in this model and {kept.get(name)} in the average: "
                "use one average for each model"
            )


def _floating(model: nn.Module) -> dict[str, Tensor]:
    """The model's own floating tensors by name, tied ones once."""
    tensors = model_tensors(model)
    ties = separate_shared(tensors)[1]
    return {name: t for name, t in tensors.items() if name not in ties and t.is_floating_point()}


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
