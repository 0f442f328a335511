"""Windows cover every token once, ranks share a global batch, resume is exact, whole documents stay whole."""

from __future__ import annotations

import time

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcourse.data.packing import IGNORE, PackedBatches, whole_document_batches
from llmcourse.data.token_stream import CHUNK, TokenStream, tokenize

EOS = 0


class Bytes:
    """A tokenizer whose truth is plain: byte b is id b + 1."""

    vocab_size, eos_id = 257, EOS

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [[byte + 1 for byte in text.encode()] for text in texts]


def numbered(lengths: list[int]) -> TokenStream:
    """Documents of these lengths (end of text included) whose other tokens are all different."""
    tokens = np.arange(1, sum(lengths) + 1, dtype=np.uint32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens[offsets[1:] - 1] = EOS
    return TokenStream(tokens, offsets, EOS, len(tokens) + 1)


def ring(n: int) -> TokenStream:
    """One stream whose token at place i is i, so that a batch shows which places it took."""
    return TokenStream(np.arange(n, dtype=np.uint16), np.array([0, n]), EOS, n)


lengths_of_documents = st.lists(st.integers(1, 40), min_size=1, max_size=30)


# ---- tokenize


def test_stream_of_two_documents_by_hand() -> None:
    stream = tokenize(["ab", "", "c"], Bytes(), progress=False)
    assert stream.tokens.tolist() == [98, 99, EOS, EOS, 100, EOS]
    assert stream.offsets.tolist() == [0, 3, 4, 6]
    assert stream.tokens.dtype == np.uint16 and stream.offsets.dtype == np.int64
    assert stream.document(2).tolist() == [100, EOS]
    assert (len(stream), stream.n_documents, stream.eos_id, stream.vocab_size) == (6, 3, EOS, 257)


@pytest.mark.parametrize("vocab_size, dtype", [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_ids_are_stored_in_the_narrowest_type_that_holds_them(vocab_size: int, dtype: type) -> None:
    class Last(Bytes):
        def encode_batch(self, texts: list[str]) -> list[list[int]]:
            return [[vocab_size - 1] for _ in texts]

    Last.vocab_size = vocab_size
    stream = tokenize(["x"], Last(), progress=False)
    assert stream.tokens.dtype == dtype
    assert stream.tokens.tolist() == [vocab_size - 1, EOS]


def test_lists_generators_and_data_sets_give_the_same_stream() -> None:
    texts = [f"document {i}" for i in range(CHUNK + 3)]  # more than one chunk
    data = datasets.Dataset.from_dict({"body": texts, "other": texts[::-1]})
    streams = [
        tokenize(texts, Bytes(), progress=False),
        tokenize((text for text in texts), Bytes(), progress=False),
        tokenize(data, Bytes(), column="body", progress=False),
        tokenize(data.to_iterable_dataset(), Bytes(), column="body", progress=False),
    ]
    expected = [i for text in texts for i in [*(b + 1 for b in text.encode()), EOS]]
    for stream in streams:
        assert stream.tokens.tolist() == expected
        assert stream.n_documents == len(texts)
        assert stream.checksum == streams[0].checksum
    assert tokenize(data, Bytes(), column="other", progress=False).checksum != streams[0].checksum


def test_workers_change_nothing() -> None:
    class Uneven(Bytes):
        def encode_batch(self, texts: list[str]) -> list[list[int]]:
            time.sleep(0.02 * (texts[0] == "document 0"))  # the first chunk is ready last
            return super().encode_batch(texts)

    texts = [f"document {i}" for i in range(9 * CHUNK + 1)]
    alone, shared = (tokenize(texts, Uneven(), workers=n, progress=False) for n in (1, 3))
    np.testing.assert_array_equal(alone.tokens, shared.tokens)
    np.testing.assert_array_equal(alone.offsets, shared.offsets)


def test_tokenize_refuses_what_is_no_corpus() -> None:
    for nothing in ([], datasets.Dataset.from_dict({"text": []})):
        with pytest.raises(ValueError, match="no documents"):
            tokenize(nothing, Bytes(), progress=False)
    with pytest.raises(ValueError, match="single text"):
        tokenize("one text", Bytes(), progress=False)
    with pytest.raises(ValueError, match="no column 'text'"):
        tokenize(datasets.Dataset.from_dict({"body": ["a"]}), Bytes(), progress=False)
    with pytest.raises(ValueError, match="NoneType, not text"):
        tokenize(["a", None], Bytes(), progress=False)
    with pytest.raises(ValueError, match="workers=0"):
        tokenize(["a"], Bytes(), workers=0, progress=False)


# ---- saving


def test_saved_stream_comes_back_memory_mapped(tmp_path) -> None:
    stream = numbered([3, 1, 7])
    loaded = TokenStream.load(stream.save(tmp_path / "stream"))
    assert isinstance(loaded.tokens, np.memmap)
    np.testing.assert_array_equal(loaded.tokens, stream.tokens)
    np.testing.assert_array_equal(loaded.offsets, stream.offsets)
    assert (loaded.eos_id, loaded.vocab_size, loaded.checksum) == (EOS, stream.vocab_size, stream.checksum)
    batches = [PackedBatches(s, batch_size=2, context_length=4, seed=1).next() for s in (stream, loaded)]
    assert torch.equal(batches[0]["tokens"], batches[1]["tokens"])


@pytest.mark.parametrize("name", ["tokens.npy", "offsets.npy", "stream.json"])
def test_incomplete_folder_is_refused(tmp_path, name: str) -> None:
    for spoil in (lambda f: f.unlink(), lambda f: f.write_bytes(f.read_bytes()[:-5])):
        folder = numbered([30, 10]).save(tmp_path / "stream")
        spoil(folder / name)
        with pytest.raises(ValueError, match="no complete token stream"):
            TokenStream.load(folder)


def test_arrays_of_different_corpora_are_refused(tmp_path) -> None:
    numbered([5, 5]).save(tmp_path / "a")
    numbered([5, 6]).save(tmp_path / "b")
    (tmp_path / "a" / "offsets.npy").write_bytes((tmp_path / "b" / "offsets.npy").read_bytes())
    with pytest.raises(ValueError, match="offsets end at 11, but the stream has 10"):
        TokenStream.load(tmp_path / "a")
    with pytest.raises(ValueError, match="starts with 0"):
        TokenStream(np.arange(4), np.array([1, 4]), EOS, 5)


@given(lengths_of_documents, st.integers(1, 40))
def test_long_documents_are_counted(lengths: list[int], context: int) -> None:
    assert numbered(lengths).n_longer_than(context) == len([n for n in lengths if n > context])


# ---- windows for training


@settings(deadline=None)
@given(
    n=st.integers(2, 200), context=st.integers(1, 50), batch_size=st.integers(1, 7), seed=st.integers(0, 9)
)
def test_every_token_is_a_target_once_per_epoch(n: int, context: int, batch_size: int, seed: int) -> None:
    if n <= context:
        with pytest.raises(ValueError, match="more documents or a smaller context_length"):
            PackedBatches(ring(n), batch_size=batch_size, context_length=context, seed=seed)
        return
    batches = PackedBatches(ring(n), batch_size=batch_size, context_length=context, seed=seed)
    epochs, rows = 3, []
    while len(rows) < epochs * batches.windows_per_epoch:
        batch = next(batches)
        assert batch["tokens"].shape == batch["targets"].shape == (batch_size, context)
        assert batch["tokens"].dtype == batch["targets"].dtype == torch.int64
        real = batch["targets"] != IGNORE
        # on the ring 0, 1, ..., n - 1 the successor of every token is known
        assert torch.equal(batch["targets"][real], ((batch["tokens"] + 1) % n)[real])
        rows += batch["targets"].tolist()
    for epoch in range(epochs):
        seen = rows[epoch * batches.windows_per_epoch : (epoch + 1) * batches.windows_per_epoch]
        assert sorted(t for row in seen for t in row if t != IGNORE) == list(range(n))


def test_epochs_differ_in_order_and_in_where_windows_begin() -> None:
    batches = PackedBatches(ring(1000), batch_size=10, context_length=10, seed=0)
    epochs = [torch.cat([next(batches)["tokens"] for _ in range(10)]) for _ in range(3)]
    phases = [set((epoch[:, 0] % 10).tolist()) for epoch in epochs]
    assert all(len(phase) == 1 for phase in phases)  # windows of an epoch lie end to end ...
    assert len({min(phase) for phase in phases}) > 1  # ... from another place in another epoch
    orders = [(epoch[:, 0] // 10).tolist() for epoch in epochs]
    assert orders[0] != sorted(orders[0]) and orders[0] != orders[1]
    assert batches.epoch == 3.0


def test_the_seed_decides_the_batches() -> None:
    def first(seed: int) -> torch.Tensor:
        return PackedBatches(ring(500), batch_size=4, context_length=8, seed=seed).next()["tokens"]

    assert torch.equal(first(3), first(3))
    assert not torch.equal(first(3), first(4))


@settings(deadline=None, max_examples=40)
@given(n=st.integers(20, 300), world=st.integers(1, 4), batch_size=st.integers(1, 5), seed=st.integers(0, 9))
def test_ranks_together_are_one_process(n: int, world: int, batch_size: int, seed: int) -> None:
    shape = {"context_length": 16, "seed": seed}
    alone = PackedBatches(ring(n), batch_size=world * batch_size, **shape)
    ranks = [
        PackedBatches(ring(n), batch_size=batch_size, rank=rank, world_size=world, **shape)
        for rank in range(world)
    ]
    for _ in range(6):
        whole, parts = next(alone), [next(rank) for rank in ranks]
        for name, expected in whole.items():
            assert torch.equal(torch.cat([part[name] for part in parts]), expected)
    assert all(rank.state_dict() == alone.state_dict() for rank in ranks)


@settings(deadline=None, max_examples=40)
@given(taken=st.integers(0, 60), later=st.integers(1, 5))
def test_resume_continues_exactly(taken: int, later: int) -> None:
    shape = {"batch_size": 3, "context_length": 7, "seed": 5}
    unbroken, resumed = (PackedBatches(ring(100), **shape) for _ in range(2))
    for _ in range(taken):
        next(unbroken)
    resumed.load_state_dict(unbroken.state_dict())
    for _ in range(later):
        a, b = next(unbroken), next(resumed)
        assert torch.equal(a["tokens"], b["tokens"]) and torch.equal(a["targets"], b["targets"])


def test_a_batch_depends_on_nothing_but_its_position() -> None:
    shape = {"batch_size": 3, "context_length": 7, "seed": 5}
    batches = PackedBatches(ring(100), **shape)
    later = batches.at(40)["tokens"]
    assert batches.position == 0
    for _ in range(40):
        next(batches)
    assert torch.equal(batches.at(40)["tokens"], later)
    assert torch.equal(next(batches)["tokens"], later)
    assert torch.equal(batches.at(2)["tokens"], PackedBatches(ring(100), **shape).at(2)["tokens"])  # and back


def test_two_ranks_resume_what_one_process_saved() -> None:
    alone = PackedBatches(ring(100), batch_size=4, context_length=7, seed=5)
    next(alone)
    second = PackedBatches(ring(100), batch_size=2, context_length=7, seed=5, rank=1, world_size=2)
    second.load_state_dict(alone.state_dict())
    assert torch.equal(next(second)["tokens"], next(alone)["tokens"][2:])


@pytest.mark.parametrize(
    "change, name",
    [
        ({"seed": 6}, "seed"),
        ({"batch_size": 4}, "global_batch_size"),
        ({"world_size": 2}, "global_batch_size"),
        ({"context_length": 8}, "context_length"),
        ({"stream": ring(101)}, "n_tokens"),
        ({"stream": TokenStream(np.arange(100)[::-1].copy(), np.array([0, 100]), EOS, 100)}, "checksum"),
    ],
)
def test_state_of_another_run_is_refused(change: dict, name: str) -> None:
    shape = {"stream": ring(100), "batch_size": 3, "context_length": 7, "seed": 5}
    state = PackedBatches(**shape).state_dict() | {"position": 9}
    other = PackedBatches(**(shape | change))
    with pytest.raises(ValueError, match=f"saved batches have {name}="):
        other.load_state_dict(state)
    assert other.position == 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"context_length": 0}, "context_length=0"),
        ({"rank": 1}, "rank=1"),
        ({"rank": -1, "world_size": 2}, "rank=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"context_length": 100}, "100 tokens, one window needs 101"),
    ],
)
def test_bad_sizes_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackedBatches(**({"stream": ring(100), "batch_size": 3, "context_length": 7, "seed": 5} | change))


# ---- whole documents for evaluation


def test_two_short_documents_and_a_long_one_by_hand() -> None:
    """T = 5: [1 2 0] fills a row with the two tokens of [4 0]; six tokens 6..10, 0 are cut after five."""
    (batch,) = whole_document_batches(numbered([3, 2, 6]), batch_size=9, context_length=5)
    tokens, targets = ([tuple(row) for row in batch[name].tolist()] for name in ("tokens", "targets"))
    rows = dict(zip(tokens, targets, strict=True))
    assert rows == {
        (0, 6, 7, 8, 9): (6, 7, 8, 9, 10),
        (10, 0, 1, 2, 0): (
            0,
            1,
            2,
            0,
            IGNORE,
        ),  # the rest of the long document, then a whole one, then padding
        (0, 4, 0, 0, 0): (4, 0, IGNORE, IGNORE, IGNORE),
    }
    assert batch["documents"].tolist() == [[2] * 5, [2, 0, 0, 0, -1], [1, 1, -1, -1, -1]]


@settings(deadline=None)
@given(lengths=lengths_of_documents, context=st.integers(1, 40), batch_size=st.integers(1, 5))
def test_every_token_is_predicted_once_from_its_predecessor(
    lengths: list[int], context: int, batch_size: int
) -> None:
    stream = numbered(lengths)
    batches = whole_document_batches(stream, batch_size=batch_size, context_length=context)
    assert all(len(batch["tokens"]) == batch_size for batch in batches[:-1])
    tokens, targets, documents = (
        torch.cat([b[name] for b in batches]) for name in ("tokens", "targets", "documents")
    )
    assert tokens.dtype == targets.dtype == torch.int64 and tokens.shape[1] == context
    real = targets != IGNORE
    assert real.sum() == len(stream)
    assert torch.equal(real, documents >= 0)
    order = documents[real].argsort(stable=True)  # rows hold a document's pieces in order
    assert torch.equal(targets[real][order], torch.from_numpy(stream.tokens.astype(np.int64)))
    before = np.concatenate([[EOS], stream.tokens[:-1]]).astype(np.int64)
    assert torch.equal(tokens[real][order], torch.from_numpy(before))
    for index, length in enumerate(lengths):  # no document is cut that fits
        n_rows = (documents == index).any(dim=1).sum()
        assert n_rows == -(-length // context)
    assert all(tokens[r, 0] == EOS for r in range(len(tokens)) if lengths[documents[r, 0]] <= context)


@settings(deadline=None)
@given(lengths=lengths_of_documents, context=st.integers(10, 40))
def test_rows_are_filled_well(lengths: list[int], context: int) -> None:
    """Best fit leaves no two rows of whole documents that would fit into one."""
    short = [n for n in lengths if n <= context] or [1]
    batches = whole_document_batches(numbered(short), batch_size=1, context_length=context)
    used = sorted(int((batch["targets"] != IGNORE).sum()) for batch in batches)
    assert len(used) < 2 or used[0] + used[1] > context


def test_whole_documents_refuse_bad_sizes() -> None:
    for sizes in ({"batch_size": 0, "context_length": 4}, {"batch_size": 1, "context_length": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            whole_document_batches(numbered([3]), **sizes)
