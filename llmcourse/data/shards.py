"""A corpus as a folder of Parquet files with an index of counts and checksums.

A corpus is cut into shards so that it need not fit into memory, so that many processes can read it at once, and
so that damage to one file is damage to that file. `index.json` beside the shards holds the count, the size and
the SHA-256 of each, and is itself sealed. Parquet is what `datasets`, `datatrove`, Spark and DuckDB read;
its row groups make every document reachable without reading what lies before it. The files are named as those of
the Hub, data/train-00000-of-00008.parquet, so `datasets.load_dataset(folder)` opens the folder as it is.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llmcourse import durable
from llmcourse.runtime import progress as progress_bar

INDEX = "index.json"
ROWS = 256  # documents of a row group: what must be decoded to reach one of them


@dataclass(frozen=True)
class Shard:
    """One file of a corpus, as its index records it."""

    path: Path
    documents: int
    text_bytes: int
    """UTF-8 bytes of the text column"""
    file_bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardIndex:
    """What a folder of shards holds.

    Attributes:
        folder: where they are.
        columns: names of the text columns.
        shards: in the order of their names, empty ones included.
    """

    folder: Path
    columns: tuple[str, ...]
    shards: tuple[Shard, ...]

    @property
    def n_documents(self) -> int:
        """Documents of all shards."""
        return sum(shard.documents for shard in self.shards)

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of all texts."""
        return sum(shard.text_bytes for shard in self.shards)

    @property
    def n_empty(self) -> int:
        """Shards without any document; streams skip them."""
        return sum(shard.documents == 0 for shard in self.shards)

    @property
    def digest(self) -> str:
        """SHA-256 over the shards' own: equal for equal corpora."""
        return durable.text_digest(durable.canonical_json([shard.sha256 for shard in self.shards]))


def write_shards(
    documents: Iterable[str | Mapping[str, str]],
    folder: str | Path,
    *,
    n_shards: int = 8,
    columns: tuple[str, ...] = ("text",),
    progress: bool = False,
) -> ShardIndex:
    """Write a corpus of any size into shards, reading it once.

    Documents are dealt out in turn, so every shard is a fair sample of the corpus and all have the same number of
    documents to within one. The folder appears at the end, whole, or not at all. Memory: at most
    `ROWS` documents for each shard.

    Args:
        documents: texts, or rows that have all the columns; other columns of a row are left out.
        folder: where to; must not exist.
        n_shards: number of files; at least the number of processes that will read at the same time.
        columns: the text columns; the first one's bytes are counted.
        progress: show a bar.

    Raises:
        ValueError: no shards or columns, a folder that exists, a document without one of the columns, or a value
            that is not text or cannot be written as UTF-8.
    """
    folder = Path(folder)
    if n_shards < 1:
        raise ValueError(f"n_shards={n_shards}: must be at least 1")
    if not columns:
        raise ValueError("columns is empty: name at least the column of the text")
    if folder.exists():
        raise ValueError(f"{folder} exists: delete it or write to another folder")
    work = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        sizes = _deal(documents, work, n_shards, columns, progress)
        records = durable.record_files(work)
        shards = [{"name": name} | sizes[name] | records[name] for name in sorted(sizes)]
        durable.write_sealed(work / INDEX, {"format": 1, "columns": list(columns), "shards": shards})
        durable.publish(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return open_shards(folder)


def _deal(
    documents: Iterable[Any], work: Path, n_shards: int, columns: tuple[str, ...], progress: bool
) -> dict[str, dict[str, int]]:
    """Write the files; how many documents and bytes of text each holds."""
    schema = pa.schema([(column, pa.string()) for column in columns])
    names = [f"data/train-{i:05d}-of-{n_shards:05d}.parquet" for i in range(n_shards)]
    (work / "data").mkdir()
    sizes = {name: {"documents": 0, "text_bytes": 0} for name in names}
    waiting: dict[str, list[dict[str, str]]] = {name: [] for name in names}
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(pq.ParquetWriter(work / name, schema, compression="zstd"))
            for name in names
        }

        def flush(name: str) -> None:
            writers[name].write_table(pa.Table.from_pylist(waiting[name], schema=schema))
            waiting[name].clear()

        with progress_bar(documents, description="write shards", unit="doc", enabled=progress) as bar:
            for number, document in enumerate(bar):
                name = names[number % n_shards]
                row, text_bytes = _row(document, columns, number)
                waiting[name].append(row)
                sizes[name]["documents"] += 1
                sizes[name]["text_bytes"] += text_bytes
                if len(waiting[name]) == ROWS:
                    flush(name)
        for name in names:
            if waiting[name]:
                flush(name)
    return sizes


def _row(document: Any, columns: tuple[str, ...], number: int) -> tuple[dict[str, str], int]:
    """A document's columns and the UTF-8 bytes of its first."""
    row = {columns[0]: document} if isinstance(document, str) and len(columns) == 1 else document
    try:
        chosen = {column: row[column] for column in columns}
        return chosen, [len(text.encode()) for text in chosen.values()][0]
    except (KeyError, IndexError, TypeError, AttributeError, UnicodeEncodeError) as error:
        raise ValueError(
            f"document {number} has no UTF-8 text in each of {', '.join(columns)} ({type(error).__name__}: {error})"
        ) from None


def open_shards(folder: str | Path) -> ShardIndex:
    """Read a folder's index and check that the files are there, with the sizes that were written.

    Raises:
        ValueError: the index is missing or was changed, or a shard is missing or has another size.
    """
    folder = Path(folder)
    try:
        data = durable.read_sealed(folder / INDEX)
    except ValueError as error:
        raise ValueError(f"{folder} holds no corpus of write_shards: {error}") from None
    records = {shard["name"]: shard for shard in data["shards"]}
    if damage := durable.find_damage(folder, records, digests=False):
        raise ValueError(f"{folder}: {damage}; write the corpus again")
    shards = tuple(
        Shard(folder / name, shard["documents"], shard["text_bytes"], shard["bytes"], shard["sha256"])
        for name, shard in records.items()
    )
    return ShardIndex(folder, tuple(data["columns"]), shards)


def verify_shard(shard: Shard) -> None:
    """Read a whole file and compare it with what was written.

    Raises:
        ValueError: it is missing or its bytes differ.
    """
    record = {shard.path.name: {"bytes": shard.file_bytes, "sha256": shard.sha256}}
    if damage := durable.find_damage(shard.path.parent, record):
        raise ValueError(f"{shard.path.parent}: {damage}; write the corpus again")
