"""Batches of examples of unequal length, epoch after epoch, each a pure function of (seed, position).

Legend: B rows of this process's batch, G = B times the number of processes, M rows in all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from llmcourse.data.streaming import check_identity

Batch = dict[str, torch.Tensor]

GROUP = 32  # global batches that are sorted by length together: enough for little padding, few enough to stay random


class EpochBatches:
    """Endless batches over M rows, of which a subclass makes tensors; a `BatchSource` for `fit`.

    Each epoch draws a new order, sorts stretches of `GROUP` global batches by length, so that rows of a batch need
    little padding, cuts them into batches and shuffles these. An epoch has floor(M / G) batches: up to G - 1 rows,
    others in every epoch, are left out. Rank r of n processes gets rows r B to (r + 1) B of each global batch.
    """

    def __init__(
        self, lengths: np.ndarray, *, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        """Make the source, at position 0.

        Args:
            lengths: (M,) int, length of each row in tokens.
            batch_size: rows that each process gets, B.
            seed: at least 0; with the epoch's number it fixes that epoch's order.
            rank: this process, from 0.
            world_size: number of processes that share each global batch.

        Raises:
            ValueError: a batch size below 1, a negative seed, a rank outside the world, or fewer rows than a global
                batch takes.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: must be at least 1")
        if seed < 0:
            raise ValueError(f"seed={seed}: must be at least 0")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank}: must be from 0 to world_size - 1 = {world_size - 1}")
        if len(lengths) < batch_size * world_size:
            raise ValueError(
                f"{len(lengths)} rows do not fill one batch of {batch_size * world_size}: lower batch_size or add data"
            )
        self.row_lengths, self.batch_size, self.seed = np.asarray(lengths), batch_size, seed
        self.rank, self.world_size, self.position = rank, world_size, 0
        self._plans: dict[int, np.ndarray] = {}

    @property
    def global_batch_size(self) -> int:
        """Rows of all processes together at one position, G."""
        return self.batch_size * self.world_size

    @property
    def batches_per_epoch(self) -> int:
        """floor(M / G)."""
        return len(self.row_lengths) // self.global_batch_size

    @property
    def epoch(self) -> float:
        """Passes over the rows so far, the fraction of the current one included."""
        return self.position / self.batches_per_epoch

    def rows(self, position: int) -> np.ndarray:
        """Numbers (B,) of the rows that this rank's batch at `position` holds."""
        epoch, index = divmod(position, self.batches_per_epoch)
        first = self.rank * self.batch_size
        return self._plan(epoch)[index, first : first + self.batch_size]

    def _plan(self, epoch: int) -> np.ndarray:
        """The epoch's batches as row numbers (batches, G); only the present epoch's are kept."""
        if epoch not in self._plans:
            generator = np.random.default_rng((self.seed, epoch))
            size = self.global_batch_size
            order = generator.permutation(len(self.row_lengths))[: self.batches_per_epoch * size]
            for start in range(0, len(order), GROUP * size):
                part = order[start : start + GROUP * size]
                order[start : start + GROUP * size] = part[np.argsort(self.row_lengths[part], kind="stable")]
            self._plans = {epoch: order.reshape(-1, size)[generator.permutation(self.batches_per_epoch)]}
        return self._plans[epoch]

    def at(self, position: int) -> Batch:
        """This rank's batch at an integer position; does not move the source."""
        return self.collate(self.rows(position))

    def collate(self, rows: np.ndarray) -> Batch:
        """Tensors of the rows of these numbers; every subclass says how."""
        raise NotImplementedError(f"{type(self).__name__} needs a collate method")

    def next(self) -> Batch:
        """This rank's batch at the current position; moves one position on."""
        batch = self.at(self.position)
        self.position += 1
        return batch

    def __next__(self) -> Batch:
        return self.next()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def identity(self) -> dict[str, Any]:
        """What a position is a position in; subclasses add the checksum of their data."""
        return {
            "seed": self.seed,
            "global_batch_size": self.global_batch_size,
            "n_rows": len(self.row_lengths),
        }

    def state_dict(self) -> dict[str, Any]:
        """The position and what it is a position in: plain data, the same on every rank."""
        return {"position": self.position} | self.identity()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position.

        Raises:
            ValueError: the state belongs to other data, another seed or another global batch size.
        """
        check_identity("batches", state, self.identity())
        self.position = int(state["position"])
