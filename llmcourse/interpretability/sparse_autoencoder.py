"""A sparse autoencoder: activations as sums of few out of many directions.

The k largest of M latents describe an activation, the others are zero (Makhzani and Frey, 2014; Gao et al., 2024).
With a fixed k there is no sparsity penalty to tune. What must be watched is latents that never win: they get no
gradient and stay dead. So an auxiliary loss lets the dead ones explain what the living ones leave over (Gao et al.,
2024, section 2.4).

Shapes: B activations of a batch, N of a set, D their width, M latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class AutoencoderSettings:
    """Size and losses of a sparse autoencoder.

    Raises:
        ValueError: a size that is not positive, or more active latents than there are.
    """

    n_latents: int = 512
    """M, directions to choose from"""
    k: int = 8
    """latents that are active at a time"""
    dead_after: int = 50_000
    """activations without being active after which a latent counts as dead"""
    k_auxiliary: int = 32
    """dead latents that are active in the auxiliary loss"""
    auxiliary_weight: float = 1 / 32
    """weight of the auxiliary loss"""

    def __post_init__(self) -> None:
        for name in ("n_latents", "k", "dead_after", "k_auxiliary"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give at least 1")
        if self.k > self.n_latents:
            raise ValueError(f"k={self.k} exceeds the {self.n_latents} latents: give at most all of them")
        if self.auxiliary_weight < 0:
            raise ValueError(f"auxiliary_weight={self.auxiliary_weight}: give 0 or more")


class SparseAutoencoder(nn.Module):
    """x = sum of k latents times their directions, plus a bias.

    Directions have length 1, so that a latent's value is a length in the stream. The encoder starts as the decoder's
    transpose.
    """

    def __init__(self, d_model: int, settings: AutoencoderSettings, *, seed: int = 0) -> None:
        super().__init__()
        self.settings = settings
        generator = torch.Generator().manual_seed(seed)
        directions = F.normalize(torch.randn(settings.n_latents, d_model, generator=generator), dim=1)
        self.decoder = nn.Parameter(directions)  # (M, D)
        self.encoder = nn.Parameter(directions.clone())  # (M, D)
        self.threshold = nn.Parameter(torch.zeros(settings.n_latents))  # (M,), added before the choice
        self.bias = nn.Parameter(torch.zeros(d_model))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("center", torch.zeros(d_model))
        self.register_buffer("silent", torch.zeros(settings.n_latents, dtype=torch.int64))
        """activations since each latent was active"""

    @property
    def directions(self) -> Tensor:
        """(M, D), each of length 1."""
        return F.normalize(self.decoder, dim=1)

    @torch.no_grad()
    def fit_scale(self, activations: Tensor) -> None:
        """Take center and scale from activations (N, D): their mean, and what gives the rest a mean square of 1 an
        entry.

        Raises:
            ValueError: activations that do not vary.
        """
        mean = activations.float().mean(dim=0)
        scale = (activations.float() - mean).pow(2).mean().sqrt()
        if not scale > 0:
            raise ValueError("the activations do not vary: there is nothing to describe")
        self.scale.copy_(scale)
        self.center.copy_(mean)

    def normalized(self, x: Tensor) -> Tensor:
        """Activations (.., D) in the units that the autoencoder works in."""
        return (x.float() - self.center) / self.scale

    def scores(self, z: Tensor) -> Tensor:
        """Normalized activations (.., D) -> what each latent would be, (.., M), before the choice."""
        return F.relu((z - self.bias) @ self.encoder.T + self.threshold)

    def choose(self, scores: Tensor, k: int) -> Tensor:
        """Scores (.., M) with all but the k largest at 0."""
        values, indices = scores.topk(k, dim=-1)
        return torch.zeros_like(scores).scatter(-1, indices, values)

    def encode(self, x: Tensor) -> Tensor:
        """Activations (.., D) -> latents (.., M), at most k of them not 0, in the units of the activations."""
        return self.choose(self.scores(self.normalized(x)), self.settings.k) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (.., M), in the units of the activations -> activations (.., D)."""
        return latents @ self.directions + self.bias * self.scale + self.center

    def forward(self, x: Tensor) -> Tensor:
        """Activations (.., D) -> their descriptions (.., D)."""
        return self.decode(self.encode(x))

    @property
    def dead(self) -> Tensor:
        """(M,) bool: latents that have not been active for `dead_after` activations."""
        return self.silent >= self.settings.dead_after


def autoencoder_loss(model: SparseAutoencoder, batch: Batch) -> tuple[Tensor, int, dict[str, Any]]:
    """For `fit`: summed squared error of a batch's "activations" (B, D) per entry, number of activations, metrics.

    Metrics: unexplained (share of the variance that is not described), dead (share of latents), auxiliary (loss).
    """
    settings = model.settings
    z = model.normalized(batch["activations"])  # (B, D)
    scores = model.scores(z)
    latents = model.choose(scores, settings.k)
    rest = z - (latents @ model.directions + model.bias)
    squared = rest.pow(2).mean(dim=-1).sum()
    with torch.no_grad():
        active = (latents > 0).any(dim=0)
        model.silent.add_(len(z)).masked_fill_(active, 0)
        dead = model.dead
    auxiliary = torch.zeros((), device=z.device)
    if settings.auxiliary_weight and bool(dead.any()):
        k = min(settings.k_auxiliary, int(dead.sum()))
        # without the relu, which would keep a dead latent's gradient at 0
        raw = (z - model.bias) @ model.encoder.T + model.threshold
        chosen = model.choose(raw.masked_fill(~dead, float("-inf")), k)
        missed = rest.detach() - chosen @ model.directions
        auxiliary = missed.pow(2).mean(dim=-1).sum()
    unexplained = squared.detach() / (z - z.mean(dim=0)).pow(2).mean(dim=-1).sum()
    metrics = {
        "unexplained": unexplained,
        "dead": dead.float().mean(),
        "auxiliary": auxiliary.detach() / len(z),
    }
    return squared + settings.auxiliary_weight * auxiliary, len(z), metrics


class ActivationBatches:
    """Endless batches of activations (N, D) in a new order each epoch; a `BatchSource` for `fit`.

    Raises:
        ValueError: a batch larger than the set, or a negative seed.
    """

    def __init__(self, activations: Tensor, *, batch_size: int, seed: int) -> None:
        if not 1 <= batch_size <= len(activations):
            raise ValueError(
                f"batch_size={batch_size}: give 1 to {len(activations)}, the number of activations"
            )
        if seed < 0:
            raise ValueError(f"seed={seed}: give at least 0")
        self.activations, self.batch_size, self.seed, self.position = activations, batch_size, seed, 0
        self._epoch, self._order = -1, torch.empty(0)

    def next(self) -> dict[str, Tensor]:
        """{"activations": (B, D)}."""
        per_epoch = len(self.activations) // self.batch_size
        epoch, place = divmod(self.position, per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self.activations), generator=generator)
        self.position += 1
        rows = self._order[place * self.batch_size : (place + 1) * self.batch_size]
        return {"activations": self.activations[rows]}

    def state_dict(self) -> dict[str, Any]:
        """The position, as plain data."""
        return {"position": self.position, "rows": len(self.activations), "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position.

        Raises:
            ValueError: it is one in other data.
        """
        if (state["rows"], state["seed"]) != (len(self.activations), self.seed):
            raise ValueError("the position is one in other activations, or of another seed: start anew")
        self.position = state["position"]


@torch.no_grad()
def unexplained_variance(model: SparseAutoencoder, activations: Tensor) -> float:
    """Share of the variance of activations (N, D) around their mean that the descriptions miss."""
    error = (activations.float() - model(activations)).pow(2).sum()
    return float(error / (activations.float() - activations.float().mean(dim=0)).pow(2).sum())
