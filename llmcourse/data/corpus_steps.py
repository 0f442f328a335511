"""The steps of data preparation that compare documents with each other, for corpora that do not fit into memory.

Texts lie on disk and are read in passes. In memory is only a number or a few for each document or line, as arrays:
8 bytes a document for exact duplicates, 1 a line for lines, some 40 a document while near-duplicates are sorted out.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llmcourse.data.decontamination import ContaminationSettings, Decontaminator
from llmcourse.data.deduplication import LineSettings, text_key
from llmcourse.data.document_steps import Outcome
from llmcourse.data.minhash import MinHashSettings, near_duplicates, write_signatures
from llmcourse.data.shingles import normalize

ROWS = 1024  # texts of a row group: what is decoded at once
BUCKET_LINES = 1 << 20  # lines that are sorted at once
_SCHEMA = pa.schema([("number", pa.int64()), ("text", pa.string())])


class Row(NamedTuple):
    """A document and its number in the corpus that came in."""

    number: int
    text: str


class TextStore(Sequence[str]):
    """Texts with their numbers in a file, read from beginning to end, or anywhere at the price of a row group."""

    def __init__(self, path: Path) -> None:
        """Open a file that `write` wrote."""
        self.path = path
        self._length = pq.read_metadata(path).num_rows
        self._group: tuple[int, list[str]] = (-1, [])

    @classmethod
    def write(cls, path: Path, rows: Iterable[Row]) -> TextStore:
        """Write rows as they come; memory: one row group."""
        waiting: list[Row] = []
        with pq.ParquetWriter(path, _SCHEMA, compression="lz4") as writer:
            for row in rows:
                waiting.append(row)
                if len(waiting) == ROWS:
                    writer.write_table(_table(waiting))
                    waiting.clear()
            if waiting:
                writer.write_table(_table(waiting))
        return cls(path)

    def rows(self) -> Iterator[Row]:
        """All rows in order."""
        with pq.ParquetFile(self.path) as file:
            for number in range(file.metadata.num_row_groups):
                group = file.read_row_group(number, use_threads=False)
                yield from map(Row, group["number"].to_pylist(), group["text"].to_pylist())

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[str]:
        return (row.text for row in self.rows())

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"text {index} of {len(self)}")
        number, place = divmod(int(index), ROWS)
        if self._group[0] != number:
            with pq.ParquetFile(self.path) as file:
                self._group = (
                    number,
                    file.read_row_group(number, ["text"], use_threads=False)["text"].to_pylist(),
                )
        return self._group[1][place]


def _table(rows: list[Row]) -> pa.Table:
    return pa.Table.from_arrays(
        [
            pa.array([row.number for row in rows], pa.int64()),
            pa.array([row.text for row in rows], pa.string()),
        ],
        schema=_SCHEMA,
    )


CorpusStep = Callable[[TextStore, Path], Iterator[tuple[Row, Outcome]]]


def short_key(text: str) -> int:
    """64 bits of `deduplication.text_key`: among n texts two different ones agree with probability below n^2 / 2^65,
    3e-8 for a million."""
    return int.from_bytes(text_key(text)[:8], "little")


def exact_duplicates(store: TextStore, work: Path) -> Iterator[tuple[Row, Outcome]]:
    """Drop documents that equal an earlier one after normalization; the same as `deduplication.SeenTexts`."""
    keys = np.frombuffer(array("Q", map(short_key, store)), np.uint64)
    order = np.argsort(keys, kind="stable")
    keep = np.ones(len(keys), bool)
    keep[order[1:][keys[order[1:]] == keys[order[:-1]]]] = False
    for row, kept in zip(store.rows(), keep, strict=True):
        yield row, Outcome(row.text, None if kept else "exact duplicate")


def repeated_lines(settings: LineSettings) -> CorpusStep:
    """Drop lines that many documents share, all but the first of each; the same as `deduplication.LineDeduplicator`.

    The keys of all lines go to a file, which is then read once for each bucket of keys; a bucket fits into memory.
    A document of which nothing is left is dropped.
    """
    separator = "\n" if settings.unit == "line" else "\n\n"

    def keyed(text: str) -> Iterator[tuple[str, int | None]]:
        for part in text.split(separator):
            short = len(normalize(part)) < settings.min_characters
            yield part, None if short else short_key(part)

    def step(store: TextStore, work: Path) -> Iterator[tuple[Row, Outcome]]:
        path = work / "lines.u64"
        ends = array("q")
        with open(path, "wb") as file:
            total = 0
            for text in store:
                keys = array("Q", (key for _, key in keyed(text) if key is not None))
                keys.tofile(file)
                total += len(keys)
                ends.append(total)
        drop = lines_to_drop(path, np.frombuffer(ends, np.int64), settings.min_documents)
        path.unlink()
        at = 0
        for row in store.rows():
            kept, changed = [], False
            for part, key in keyed(row.text):
                if key is not None:
                    at += 1
                if key is not None and drop[at - 1]:
                    changed = True
                else:
                    kept.append(part)
            text = separator.join(kept) if changed else row.text
            yield row, Outcome(text, None if text.strip() else "only repeated lines")

    return step


def lines_to_drop(path: Path, ends: np.ndarray, min_documents: int) -> np.ndarray:
    """Which lines repeat, out of a file of their keys.

    Args:
        path: uint64 keys of L lines, document after document.
        ends: (M,) int64 number of lines up to the end of each document.
        min_documents: a key in at least so many documents is dropped wherever it is not the first of its kind.

    Returns:
        (L,) bool.
    """
    n_lines = int(ends[-1]) if len(ends) else 0
    drop = np.zeros(n_lines, bool)
    n_buckets = -(-n_lines // BUCKET_LINES)
    for bucket in range(n_buckets):
        places, keys = _bucket(path, bucket, n_buckets)
        order = np.argsort(keys, kind="stable")  # of equal keys, the earlier line first
        places, keys = places[order], keys[order]
        first = np.ones(len(keys), bool)
        first[1:] = keys[1:] != keys[:-1]
        documents = np.searchsorted(ends, places, side="right")
        new = first.copy()
        new[1:] |= documents[1:] != documents[:-1]
        groups = np.cumsum(first) - 1
        spread = np.bincount(groups, new)[groups]  # documents that hold this line's key
        drop[places[(spread >= min_documents) & ~first]] = True
    return drop


def _bucket(path: Path, bucket: int, n_buckets: int) -> tuple[np.ndarray, np.ndarray]:
    """Places and keys of the lines whose key falls into a bucket."""
    places, keys, start = [], [], 0
    with open(path, "rb") as file:
        while len(block := np.fromfile(file, np.uint64, BUCKET_LINES)):
            inside = np.flatnonzero(block % np.uint64(n_buckets) == bucket)
            places.append(inside + start)
            keys.append(block[inside])
            start += len(block)
    return np.concatenate(places), np.concatenate(keys)


def near_duplicate_documents(settings: MinHashSettings) -> CorpusStep:
    """Drop near-duplicates by MinHash and LSH, all but one of each cluster; signatures lie on disk."""

    def step(store: TextStore, work: Path) -> Iterator[tuple[Row, Outcome]]:
        if not len(store):
            return
        path = work / "signatures.u32"
        keep = near_duplicates(store, settings, write_signatures(store, path, settings)).keep
        path.unlink()
        for row, kept in zip(store.rows(), keep, strict=True):
            yield row, Outcome(row.text, None if kept else "near-duplicate")

    return step


def contaminated_documents(items: Sequence[str], settings: ContaminationSettings) -> CorpusStep:
    """Drop documents that repeat an n-gram of an evaluation item."""
    detector = Decontaminator(items, settings)

    def step(store: TextStore, work: Path) -> Iterator[tuple[Row, Outcome]]:
        hit = np.zeros(len(store), bool)
        hit[[found.document for found in detector.find(store)]] = True
        for row, found in zip(store.rows(), hit, strict=True):
            yield row, Outcome(row.text, "contaminated" if found else None)

    return step
