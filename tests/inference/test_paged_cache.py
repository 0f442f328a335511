"""The paged cache: the logits of the contiguous one however rows, chunks and blocks lie; int8 within its rounding."""

from __future__ import annotations

import pytest
import torch

from llmcourse.inference.model_runner import ModelRunner
from llmcourse.inference.paged_cache import PagedCache, Row
from tests.inference.small import V, lively_model


@pytest.fixture(scope="module", params=["fused", "plain", "qk_norm", "many key heads"])
def runner(request) -> ModelRunner:
    changes = {"qk_norm": {"qk_norm": True}, "many key heads": {"n_kv_heads": 4}}.get(request.param, {})
    return ModelRunner(lively_model(**changes), fused=request.param != "plain")


def some_rows(lengths: list[int], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(V, (n,), generator=generator) for n in lengths]


def run(runner, cache, rows, tables, chunks) -> list[torch.Tensor]:
    """Feed rows in chunks (stored before, new) of each; logits of all positions of each row."""
    found = [[] for _ in rows]
    for chunk in chunks:
        view = cache.view([Row(tables[b], stored, new) for b, stored, new in chunk])
        tokens = torch.zeros(len(chunk), view.n_new, dtype=torch.int64)
        for i, (b, stored, new) in enumerate(chunk):
            tokens[i, :new] = rows[b][stored : stored + new]
        logits = runner.all_logits(tokens, view)
        for i, (b, _, new) in enumerate(chunk):
            found[b].append(logits[i, :new])
    return [torch.cat(parts) for parts in found if parts]


@torch.no_grad()
def test_scattered_blocks_and_ragged_chunks_give_the_logits_of_the_whole(runner):
    rows = some_rows([11, 6, 1])
    cache = PagedCache(runner.config, 12, 4)
    for layer in cache.layers:
        layer.fill_(50.0)  # what a block held before must not matter
    tables = [[7, 2, 9], [0, 11], [5]]
    chunks = [
        [(0, 0, 5), (1, 0, 2)],
        [(0, 5, 3), (1, 2, 3), (2, 0, 1)],
        [(0, 8, 1), (1, 5, 1)],
        [(0, 9, 2)],
    ]
    for row, logits in zip(rows, run(runner, cache, rows, tables, chunks), strict=True):
        torch.testing.assert_close(logits, runner.model(row[None])[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_flat_rows_give_the_logits_of_the_whole():
    """Single tokens, short and long chunks of prompts in one pass, in two steps each."""
    runner = ModelRunner(lively_model())
    rows = some_rows([3, 11, 50, 40])
    cache = PagedCache(runner.config, 60, 4)
    tables = [list(range(14 * b, 14 * b + 14)) for b in range(4)]
    steps = [[(0, 0, 2), (1, 0, 1), (2, 0, 35), (3, 0, 40)], [(0, 2, 1), (1, 1, 10), (2, 35, 15)]]
    for step in steps:
        flat = torch.cat([rows[b][stored : stored + new] for b, stored, new in step])
        view = cache.flat_view([Row(tables[b], stored, new) for b, stored, new in step])
        logits = runner.flat_logits(flat, view)
        for found, (b, stored, new) in zip(logits, step, strict=True):
            whole = runner.model(rows[b][None])[0, stored + new - 1]
            torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="come last"):
        cache.flat_view([Row(tables[0], 0, 40), Row(tables[1], 0, 1)])


@torch.no_grad()
def test_rows_can_share_blocks(runner):
    first, second = some_rows([10, 10])
    second[:8] = first[:8]
    cache = PagedCache(runner.config, 4, 4)
    tables = [[0, 1, 2], [0, 1, 3]]
    run(runner, cache, [first, second], tables, [[(0, 0, 10)]])
    (logits,) = run(runner, cache, [second], [tables[1]], [[(0, 8, 2)]])
    torch.testing.assert_close(logits, runner.model(second[None])[0, 8:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_row_may_fill_its_context_beside_a_longer_chunk(runner):
    full = runner.config.context_length
    rows = some_rows([full, 30])
    cache = PagedCache(runner.config, 2 * full // 8, 8)
    tables = [list(range(full // 8)), list(range(full // 8, full // 8 + 4))]
    chunks = [[(0, 0, full - 2)], [(0, full - 2, 2), (1, 0, 30)]]
    found = run(runner, cache, rows, tables, chunks)
    torch.testing.assert_close(found[0], runner.model(rows[0][None])[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1], runner.model(rows[1][None])[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_int8_is_a_quarter_and_close():
    runner = ModelRunner(lively_model(d_head=32))
    rows, tables, chunks = some_rows([20]), [[3, 1, 0]], [[(0, 0, 19)], [(0, 19, 1)]]
    plain, small = PagedCache(runner.config, 4, 8), PagedCache(runner.config, 4, 8, quantized=True)
    assert small.bytes / plain.bytes == pytest.approx((32 + 4) / (4 * 32))
    exact, found = (run(runner, cache, rows, tables, chunks)[0] for cache in (plain, small))
    error = (found - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.05


def test_int8_rounds_each_head_to_half_a_step():
    config = lively_model().config
    cache = PagedCache(config, 2, 4, quantized=True)
    values = torch.randn(3, 2 * config.n_kv_heads, config.d_head)
    values[1] *= 100
    values[2] = 0
    cache.write(0, torch.tensor([6, 1, 2]), values)
    read = cache.read(0, torch.tensor([[0, 1]]))[0]
    step = values.abs().amax(dim=-1, keepdim=True) / 127
    for slot, expected, half in zip((6, 1, 2), values, step / 2, strict=True):
        assert ((read[slot] - expected).abs() <= half * 1.001 + 1e-12).all()
    assert not read[0].any() and not read[7].any()
