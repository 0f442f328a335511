"""Documents streamed from shards in a shuffled order that can be resumed at any document.

The order is a pure function of (seed, position): each epoch permutes the shards, lays their documents end to
end, cuts them into blocks of `buffer` documents and permutes each block. Hence exact resume: a position is one
number, and to go there costs one block. A reservoir, as in `datasets`' `shuffle(buffer_size)`, mixes
somewhat farther, but its content is no function of the position: resumed, it is refilled with other documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llmcourse.data.shards import Shard, open_shards, verify_shard
from llmcourse.data.streaming import check_identity


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """How documents are streamed from shards.

    Raises:
        ValueError: a seed below 0, a size below 1, or a rank or worker outside its range.
    """

    shuffle: bool = True
    """a new order in every epoch; without it, shards and documents come as they were written"""
    seed: int = 0
    """of the order"""
    buffer: int = 1024
    """documents that are shuffled together, and held in memory"""
    rank: int = 0
    """this process"""
    world_size: int = 1
    """processes that share the corpus"""
    worker: int = 0
    """this loader within its process"""
    n_workers: int = 1
    """loaders of each process"""
    verify: bool = True
    """compare each shard's SHA-256 when it is first opened"""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: must be at least 0")
        for name in ("buffer", "world_size", "n_workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        for name, size in (("rank", self.world_size), ("worker", self.n_workers)):
            if not 0 <= getattr(self, name) < size:
                raise ValueError(f"{name}={getattr(self, name)}: must be from 0 to {size - 1}")

    @property
    def part(self) -> int:
        """Number of this reader among all."""
        return self.rank * self.n_workers + self.worker

    @property
    def n_parts(self) -> int:
        """All readers of all processes."""
        return self.world_size * self.n_workers


class ShardStream:
    """Endless documents, as rows of columns, from the shards that fall to this reader. A `DocumentSource`.

    In every epoch the readers (rank and worker) share the non-empty shards among them, each shard going to one,
    so together they give every document once. A reader's epoch ends with its own shards, so readers with fewer
    documents begin their next epoch earlier.
    """

    def __init__(self, folder: str | Path, settings: StreamSettings | None = None) -> None:
        """Open the folder and begin at its first document.

        Raises:
            ValueError: the folder holds no whole corpus, or fewer non-empty shards than there are readers.
        """
        self.index, self.settings = open_shards(folder), settings or StreamSettings()
        self._full = [shard for shard in self.index.shards if shard.documents]
        if len(self._full) < self.settings.n_parts:
            raise ValueError(
                f"{self.index.folder} has {len(self._full)} shards with documents for {self.settings.n_parts} readers:"
                " write more shards or use fewer workers"
            )
        self._epoch, self._position = 0, 0
        self._plan: tuple[int, list[Shard], np.ndarray] = (-1, [], np.empty(0, np.int64))
        self._block: tuple[int, int, list[dict[str, str]]] = (-1, -1, [])
        self._open: _OpenShard | None = None
        self._verified: set[Path] = set()

    @property
    def n_empty(self) -> int:
        """Shards that are skipped because they hold no document."""
        return self.index.n_empty

    @property
    def epoch(self) -> float:
        """This reader's passes over its documents, the fraction of the current one included."""
        return self._epoch + self._position / int(self._shards(self._epoch)[1][-1])

    def _shards(self, epoch: int) -> tuple[list[Shard], np.ndarray]:
        """This reader's shards of an epoch in their order, and the number of its documents before each and at
        the end."""
        if self._plan[0] != epoch:
            order = np.arange(len(self._full))
            if self.settings.shuffle:
                order = np.random.default_rng((self.settings.seed, epoch)).permutation(len(self._full))
            shards = [self._full[i] for i in order[self.settings.part :: self.settings.n_parts]]
            bounds = np.cumsum([0] + [shard.documents for shard in shards])
            self._plan = epoch, shards, bounds
        return self._plan[1], self._plan[2]

    def next(self) -> dict[str, str]:
        """The next document.

        Raises:
            ValueError: the shard that holds it is missing or damaged.
        """
        if self._position == self._shards(self._epoch)[1][-1]:
            self._epoch, self._position = self._epoch + 1, 0
        number, place = divmod(self._position, self.settings.buffer)
        if self._block[:2] != (self._epoch, number):
            self._block = self._epoch, number, self._read_block(number)
        self._position += 1
        return self._block[2][place]

    def __iter__(self) -> Iterator[dict[str, str]]:
        return self

    def __next__(self) -> dict[str, str]:
        return self.next()

    def _read_block(self, number: int) -> list[dict[str, str]]:
        shards, bounds = self._shards(self._epoch)
        first = number * self.settings.buffer
        last = min(first + self.settings.buffer, int(bounds[-1]))
        rows: list[dict[str, str]] = []
        at = int(np.searchsorted(bounds, first, side="right")) - 1
        while first + len(rows) < last:
            start = first + len(rows) - int(bounds[at])
            stop = min(shards[at].documents, last - int(bounds[at]))
            rows += self._shard(shards[at]).rows(start, stop)
            at += 1
        if not self.settings.shuffle:
            return rows
        generator = np.random.default_rng((self.settings.seed, self._epoch, 1 + number, self.settings.part))
        return [rows[i] for i in generator.permutation(len(rows))]

    def _shard(self, shard: Shard) -> _OpenShard:
        if self._open is None or self._open.shard is not shard:
            if self.settings.verify and shard.path not in self._verified:
                verify_shard(shard)
                self._verified.add(shard.path)
            self._open = _OpenShard(shard)
        return self._open

    def _identity(self) -> dict[str, Any]:
        names = ("shuffle", "seed", "buffer", "world_size", "n_workers", "part")
        return {"corpus": self.index.digest} | {name: getattr(self.settings, name) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """Epoch and position of this reader, and of what: plain data, a few hundred bytes."""
        return {"epoch": self._epoch, "position": self._position} | self._identity()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position, at the cost of reading one block.

        Raises:
            ValueError: the state belongs to another corpus, order or reader.
        """
        check_identity("stream", state, self._identity())
        self._epoch, self._position = int(state["epoch"]), int(state["position"])


class _OpenShard:
    """Rows of one shard by number; the row group used last is kept, decoded."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        try:
            self._file = pq.ParquetFile(shard.path)
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{shard.path} cannot be read as Parquet ({type(error).__name__})") from None
        meta = self._file.metadata
        self._starts = np.cumsum([0] + [meta.row_group(i).num_rows for i in range(meta.num_row_groups)])
        if self._starts[-1] != shard.documents:
            raise ValueError(
                f"{shard.path} holds {self._starts[-1]} documents, its index says {shard.documents}"
            )
        self._group: tuple[int, list[dict[str, str]]] = (-1, [])

    def rows(self, start: int, stop: int) -> list[dict[str, str]]:
        """Rows from start up to stop."""
        found: list[dict[str, str]] = []
        while start < stop:
            number = int(np.searchsorted(self._starts, start, side="right")) - 1
            begin, end = int(self._starts[number]), int(self._starts[number + 1])
            found += self._decoded(number)[start - begin : min(stop, end) - begin]
            start = end
        return found

    def _decoded(self, number: int) -> list[dict[str, str]]:
        if self._group[0] != number:
            try:
                self._group = number, self._file.read_row_group(number, use_threads=False).to_pylist()
            except (OSError, pa.ArrowException) as error:
                raise ValueError(f"{self.shard.path} is damaged ({type(error).__name__})") from None
        return self._group[1]
