"""Shards hold what was written, damage is named, readers share documents, every position can be resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from llmcourse.data.mixing import ListSource, MixedStream, MixtureSettings
from llmcourse.data.shard_stream import ShardStream, StreamSettings
from llmcourse.data.shards import INDEX, ROWS, open_shards, write_shards
from llmcourse.data.streaming import CHUNK, StreamedBatches

TEXTS = [f"document {i} " + "é" * (i % 7) for i in range(1000)]
EOS = 0


class Bytes:
    """A tokenizer whose truth is plain: byte b is id b + 1."""

    vocab_size, eos_id = 257, EOS

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [[byte + 1 for byte in text.encode()] for text in texts]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1000 documents in 3 shards of 334, 333 and 333: two row groups each."""
    folder = tmp_path_factory.mktemp("shards") / "corpus"
    write_shards(TEXTS, folder, n_shards=3)
    return folder


def stream(folder: Path, **settings: object) -> ShardStream:
    return ShardStream(folder, StreamSettings(**{"buffer": 64, **settings}))


def take(source: ShardStream, n: int) -> list[str]:
    return [row["text"] for row in islice(source, n)]


# ---- the folder


def test_documents_are_dealt_out_in_turn_and_counted(corpus: Path) -> None:
    index = open_shards(corpus)
    assert [shard.documents for shard in index.shards] == [334, 333, 333] and 334 > ROWS
    assert index.n_documents == 1000 and index.n_empty == 0
    assert index.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert index.shards[0].text_bytes == sum(len(text.encode()) for text in TEXTS[::3])
    assert take(stream(corpus, shuffle=False), 1000) == TEXTS[::3] + TEXTS[1::3] + TEXTS[2::3]
    library = datasets.load_dataset(str(corpus), split="train", cache_dir=str(corpus.parent / "cache"))
    assert sorted(library["text"]) == sorted(TEXTS)


def test_columns_are_kept_and_others_left_out(tmp_path: Path) -> None:
    rows = [{"text": "a", "url": "u", "more": 1}, {"url": "v", "text": "b"}]
    write_shards(rows, tmp_path / "c", n_shards=1, columns=("text", "url"))
    assert list(islice(stream(tmp_path / "c", shuffle=False), 2)) == [
        {"text": "a", "url": "u"},
        {"text": "b", "url": "v"},
    ]


def test_equal_corpora_have_equal_digests_and_others_not(tmp_path: Path, corpus: Path) -> None:
    digests = [
        write_shards(texts, tmp_path / str(i), n_shards=n).digest
        for i, (texts, n) in enumerate([(TEXTS, 3), (TEXTS, 2), (TEXTS[::-1], 3)])
    ]
    assert digests[0] == open_shards(corpus).digest and len(set(digests)) == 3


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    for bad, message in [
        (["a", None], "document 1 has no UTF-8 text"),
        (["a", "\ud800"], "UnicodeEncodeError"),
        ([{"body": "a"}], "KeyError: 'text'"),
        ([{"text": 3}], "AttributeError"),
    ]:
        with pytest.raises(ValueError, match=message):
            write_shards(bad, tmp_path / "corpus")
    for arguments, message in [({"n_shards": 0}, "n_shards=0"), ({"columns": ()}, "columns is empty")]:
        with pytest.raises(ValueError, match=message):
            write_shards(["a"], tmp_path / "corpus", **arguments)
    assert list(tmp_path.iterdir()) == []
    write_shards(["a"], tmp_path / "corpus")
    with pytest.raises(ValueError, match="exists: delete it"):
        write_shards(["a"], tmp_path / "corpus")


# ---- damage


def damaged(tmp_path: Path) -> Path:
    write_shards(TEXTS, tmp_path / "corpus", n_shards=3)
    return tmp_path / "corpus"


def test_missing_and_cut_shards_are_named(tmp_path: Path) -> None:
    folder = damaged(tmp_path)
    second = folder / "data" / "train-00001-of-00003.parquet"
    content = second.read_bytes()
    second.write_bytes(content[:-1])
    with pytest.raises(
        ValueError,
        match=f"data/train-00001-of-00003.parquet has {len(content) - 1} bytes, {len(content)} were written",
    ):
        open_shards(folder)
    second.write_bytes(b"")
    with pytest.raises(ValueError, match="data/train-00001-of-00003.parquet has 0 bytes"):
        ShardStream(folder)
    second.unlink()
    with pytest.raises(ValueError, match="data/train-00001-of-00003.parquet is missing"):
        open_shards(folder)
    (folder / INDEX).write_text("{}")
    with pytest.raises(ValueError, match="holds no corpus of write_shards: index.json is not one"):
        open_shards(folder)
    with pytest.raises(ValueError, match="index.json is missing"):
        open_shards(tmp_path)


@pytest.mark.parametrize("verify", [True, False])
def test_changed_bytes_are_found_when_the_shard_is_reached(tmp_path: Path, verify: bool) -> None:
    folder = damaged(tmp_path)
    path = folder / "data" / "train-00001-of-00003.parquet"
    content = bytearray(path.read_bytes())
    content[4:400] = bytes(396)  # the first row group's pages
    path.write_bytes(content)
    source = stream(folder, shuffle=False, verify=verify)
    assert take(source, 320) == TEXTS[::3][:320]
    with pytest.raises(
        ValueError, match=r"train-00001-of-00003.parquet.*(its SHA-256 differs|is damaged)"
    ) as caught:
        take(source, 1000)
    assert ("SHA-256" in str(caught.value)) == verify and "\n" not in str(caught.value)


def test_a_shard_that_vanishes_while_it_is_read_is_named(tmp_path: Path) -> None:
    source = stream(damaged(tmp_path), shuffle=False, verify=False)
    take(source, 10)
    (tmp_path / "corpus" / "data" / "train-00002-of-00003.parquet").unlink()
    with pytest.raises(ValueError, match="train-00002-of-00003.parquet cannot be read as Parquet"):
        take(source, 1000)


def test_empty_shards_are_counted_and_skipped(tmp_path: Path) -> None:
    write_shards(["a", "b"], tmp_path / "few", n_shards=5)
    source = stream(tmp_path / "few")
    assert source.n_empty == 3 and sorted(take(source, 2)) == ["a", "b"] and source.epoch == 1
    write_shards([], tmp_path / "none", n_shards=2)
    with pytest.raises(ValueError, match="0 shards with documents for 1 readers"):
        ShardStream(tmp_path / "none")


# ---- order


def test_every_epoch_gives_every_document_once_in_another_order(corpus: Path) -> None:
    source = stream(corpus)
    epochs = [take(source, 1000) for _ in range(3)]
    assert source.epoch == 3.0
    assert all(sorted(epoch) == sorted(TEXTS) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, TEXTS]}) == 4
    number = {text: i for i, text in enumerate(TEXTS)}
    order = np.array([number[text] // 3 for text in epochs[0]])  # place within the shard
    assert (
        abs(np.corrcoef(order[:320], np.arange(320))[0, 1]) > 0.9
    )  # a small buffer mixes nearby documents only
    far = [number[text] // 3 for text in take(stream(corpus, buffer=1000), 320)]
    assert abs(np.corrcoef(far, np.arange(320))[0, 1]) < 0.3


def test_seed_and_buffer_change_the_order(corpus: Path) -> None:
    assert take(stream(corpus), 100) == take(stream(corpus), 100)
    assert take(stream(corpus), 100) != take(stream(corpus, seed=1), 100)
    assert take(stream(corpus), 100) != take(stream(corpus, buffer=65), 100)
    unshuffled = take(stream(corpus, shuffle=False), 100)
    assert unshuffled == take(stream(corpus, shuffle=False, buffer=7, seed=5), 100) == TEXTS[::3][:100]


@pytest.mark.parametrize("world_size, n_workers", [(2, 1), (1, 3), (2, 3)])
def test_readers_share_every_epoch_without_overlap(tmp_path: Path, world_size: int, n_workers: int) -> None:
    write_shards(TEXTS[:996], tmp_path / "corpus", n_shards=12)
    parts = [(r, w) for r in range(world_size) for w in range(n_workers)]
    readers = [
        stream(tmp_path / "corpus", rank=r, worker=w, world_size=world_size, n_workers=n_workers)
        for r, w in parts
    ]
    each = 996 // len(readers)
    for _ in range(2):
        read = [take(reader, each) for reader in readers]
        assert sorted(text for part in read for text in part) == sorted(TEXTS[:996])
        assert [reader.epoch % 1 for reader in readers] == [0] * len(readers)
    with pytest.raises(ValueError, match="12 shards with documents for 13 readers"):
        stream(tmp_path / "corpus", world_size=13)


# ---- resume


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("stop", [0, 1, 63, 64, 333, 334, 999, 1000, 1001, 2500])
def test_a_resumed_stream_goes_on_with_the_next_document(corpus: Path, stop: int, shuffle: bool) -> None:
    source = stream(corpus, shuffle=shuffle)
    take(source, stop)
    saved = json.loads(json.dumps(source.state_dict()))
    expected = take(source, 700)
    resumed = stream(corpus, shuffle=shuffle)
    resumed.load_state_dict(saved)
    assert take(resumed, 700) == expected and resumed.state_dict() == source.state_dict()


CHILD = """
import json, os, sys
from llmcourse.data.shard_stream import ShardStream, StreamSettings
source = ShardStream(sys.argv[1], StreamSettings(buffer=64))
with open(sys.argv[2], "w") as out:
    while True:
        text = source.next()["text"]
        print(json.dumps([text, source.state_dict()]), file=out, flush=True)
"""


def test_the_stream_of_a_killed_process_goes_on_in_another(corpus: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with subprocess.Popen([sys.executable, "-c", CHILD, str(corpus), str(log)]) as child:
        while not log.exists() or log.stat().st_size < 100_000:
            assert child.poll() is None
            time.sleep(0.02)
        os.kill(child.pid, signal.SIGKILL)
    lines = log.read_text().split("\n")[:-1]  # the last may be cut
    read = [json.loads(line)[0] for line in lines]
    assert len(read) > 100
    resumed = stream(corpus)
    resumed.load_state_dict(json.loads(lines[-1])[1])
    assert read + take(resumed, 500) == take(stream(corpus), len(read) + 500)


def test_states_of_other_corpora_orders_and_readers_are_refused(tmp_path: Path, corpus: Path) -> None:
    state = stream(corpus).state_dict()
    write_shards(TEXTS[:-1], tmp_path / "other", n_shards=3)
    with pytest.raises(ValueError, match="saved stream has corpus="):
        stream(tmp_path / "other").load_state_dict(state)
    for change in ({"seed": 1}, {"buffer": 8}, {"world_size": 2}, {"n_workers": 2}, {"shuffle": False}):
        with pytest.raises(ValueError, match=f"saved stream has {next(iter(change))}="):
            stream(corpus, **change).load_state_dict(state)
    with pytest.raises(ValueError, match="part=0, this one has part=1"):
        stream(corpus, rank=1, world_size=2).load_state_dict(
            stream(corpus, rank=0, world_size=2).state_dict()
        )


@pytest.mark.parametrize(
    "bad", [{"seed": -1}, {"buffer": 0}, {"world_size": 0}, {"n_workers": 0}, {"rank": 1}, {"worker": -1}]
)
def test_settings_out_of_range_are_refused(bad: dict[str, int]) -> None:
    name, value = next(iter(bad.items()))
    with pytest.raises(ValueError, match=f"{name}={value}: must be"):
        StreamSettings(**bad)


# ---- tokenized batches


def batches(folder: Path, *, batch_size: int = 4, context_length: int = 32, **world: int) -> StreamedBatches:
    return StreamedBatches(
        stream(folder), Bytes(), batch_size=batch_size, context_length=context_length, **world
    )


def flat(parts: list[dict[str, torch.Tensor]], name: str) -> list[int]:
    return torch.cat([part[name].flatten() for part in parts]).tolist()


def test_targets_are_all_tokens_of_all_documents_in_order(corpus: Path) -> None:
    source = batches(corpus)
    parts = [source.next() for _ in range(40)]
    assert all(
        part[name].shape == (4, 32) and part[name].dtype == torch.int64 for part in parts for name in part
    )
    texts = take(stream(corpus), 600)
    expected = [i for text in texts for i in (*(b + 1 for b in text.encode()), EOS)][: 40 * 4 * 32]
    owners = [n for n, text in enumerate(texts) for _ in range(len(text.encode()) + 1)][: 40 * 4 * 32]
    assert flat(parts, "targets") == expected
    assert flat(parts, "tokens") == [EOS, *expected[:-1]]
    assert flat(parts, "documents") == owners
    assert source.epoch > 0


def test_ranks_batches_together_are_the_batch_of_one_process(corpus: Path) -> None:
    ranks = [batches(corpus, batch_size=2, rank=r, world_size=2) for r in range(2)]
    alone = batches(corpus, batch_size=4)
    for _ in range(5):
        together, whole = [rank.next() for rank in ranks], alone.next()
        for name in whole:
            assert torch.equal(torch.cat([part[name] for part in together]), whole[name])
    assert ranks[0].state_dict() == ranks[1].state_dict() == alone.state_dict()


@pytest.mark.parametrize("stop", [0, 1, 2, 7, 30])
@pytest.mark.parametrize("size", [(4, 32), (3, 500), (1, 1)])
def test_batches_resume_bit_for_bit(corpus: Path, stop: int, size: tuple[int, int]) -> None:
    shape = {"batch_size": size[0], "context_length": size[1]}
    source = batches(corpus, **shape)
    for _ in range(stop):
        source.next()
    saved = json.loads(json.dumps(source.state_dict()))
    expected = [source.next() for _ in range(10)]
    resumed = batches(corpus, **shape)
    resumed.next()
    resumed.load_state_dict(saved)
    for batch in expected:
        again = resumed.next()
        assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert resumed.state_dict() == source.state_dict()


def test_batches_of_a_mixture_resume(corpus: Path) -> None:
    def make() -> StreamedBatches:
        sources = {"shards": stream(corpus), "list": ListSource(["one", "two", "three"])}
        mixed = MixedStream(sources, MixtureSettings(weights={"shards": 3, "list": 1}))
        return StreamedBatches(mixed, Bytes(), batch_size=2, context_length=50)

    source = make()
    for _ in range(2 * CHUNK):
        source.next()
    saved, expected = source.state_dict(), None
    expected = source.next()
    resumed = make()
    resumed.load_state_dict(saved)
    assert torch.equal(resumed.next()["targets"], expected["targets"])


def test_batches_refuse_wrong_sizes_states_and_documents(corpus: Path) -> None:
    for bad in ({"batch_size": 0}, {"context_length": 0}):
        with pytest.raises(ValueError, match="both must be at least 1"):
            batches(corpus, **bad)
    with pytest.raises(ValueError, match="rank=2: must be from 0"):
        batches(corpus, rank=2, world_size=2)
    with pytest.raises(ValueError, match="saved batches has context_length=32"):
        batches(corpus, context_length=16).load_state_dict(batches(corpus).state_dict())
    with pytest.raises(ValueError, match="'text' is int, not text"):
        StreamedBatches(ListSource([{"text": 1}]), Bytes(), batch_size=1, context_length=4).next()
