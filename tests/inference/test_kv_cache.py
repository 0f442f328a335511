"""The key/value cache: equal to no cache however the text is cut up, padded rows, dropped rows, size, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmcourse.accounting import kv_cache_bytes
from llmcourse.inference.kv_cache import KVCache
from llmcourse.models.config import ModelConfig
from llmcourse.models.transformer import Transformer

CONFIG = ModelConfig(
    vocab_size=23, context_length=64, d_model=16, n_layers=3, n_heads=4, n_kv_heads=2, d_head=6, d_ff=20
)


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(0)
    made = Transformer(CONFIG).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)
    return made


def some_tokens(B: int, T: int, seed: int = 0) -> Tensor:
    return torch.randint(23, (B, T), generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cuts", [[1] * 12, [12], [5, 7], [3, 1, 1, 4, 3], [40, 1, 9]], ids=str)
@torch.no_grad()
def test_any_cut_gives_the_logits_of_the_whole(model, cuts):
    tokens = some_tokens(2, sum(cuts))
    cache, parts, start = KVCache(CONFIG, 2, sum(cuts)), [], 0
    for n in cuts:
        parts.append(model(tokens[:, start : start + n], cache))
        start += n
    assert cache.length == sum(cuts)
    close(torch.cat(parts, dim=1), model(tokens))


@torch.no_grad()
def test_padded_rows_equal_rows_alone(model):
    lengths, longest = (3, 7, 7, 1), 7
    rows = [some_tokens(1, n + 4, seed=n)[0] for n in lengths]
    padding = torch.tensor([longest - n for n in lengths])
    prompt = torch.zeros(4, longest, dtype=torch.int64)
    for i, n in enumerate(lengths):
        prompt[i, longest - n :] = rows[i][:n]
    cache = KVCache(CONFIG, 4, longest + 4, padding=padding)
    logits = [model(prompt, cache)]
    for step in range(4):
        new = torch.stack([row[n + step] for n, row in zip(lengths, rows, strict=True)])[:, None]
        logits.append(model(new, cache))
    together = torch.cat(logits, dim=1)
    assert together.isfinite().all()
    for i, row in enumerate(rows):
        close(together[i : i + 1, padding[i] :], model(row[None]))


@torch.no_grad()
def test_the_padding_token_does_not_matter(model):
    padding, prompt = torch.tensor([2, 0]), some_tokens(2, 6)
    other = prompt.clone()
    other[0, :2] = 17
    one, two = (model(p, KVCache(CONFIG, 2, 6, padding=padding))[0, 2:] for p in (prompt, other))
    assert torch.equal(one, two)


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_kept_rows_go_on_as_before_in_the_order_given(model, padded):
    padding = torch.tensor([0, 4, 1, 0]) if padded else None
    prompt, new = some_tokens(4, 6), some_tokens(4, 3, seed=1)
    whole, part = (KVCache(CONFIG, 4, 9, padding=padding) for _ in range(2))
    for cache in (whole, part):
        model(prompt, cache)
    rows = torch.tensor([2, 1])
    part.keep_rows(rows)
    assert part.bytes == whole.bytes // 2
    close(model(new[rows], part), model(new, whole)[rows])


def test_positions_and_masks_by_hand():
    plain = KVCache(CONFIG, 2, 8)
    assert plain.positions(2) is None and plain.mask(1) is None
    plain.advance(2)
    assert plain.mask(2)[0, 0].tolist() == [[True, True, True, False], [True, True, True, True]]

    padded = KVCache(CONFIG, 2, 8, padding=torch.tensor([0, 2]))
    assert padded.positions(4).tolist() == [[0, 1, 2, 3], [0, 0, 0, 1]]
    # row 1: slots 0 and 1 are padding; a padded query sees only itself, real ones see the real before them
    assert padded.mask(4)[1, 0].int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert torch.equal(padded.mask(4)[0, 0], torch.ones(4, 4).tril().bool())
    padded.advance(4)
    assert padded.positions(1).tolist() == [[4], [2]]
    assert padded.mask(1)[:, 0, 0].int().tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
    assert KVCache(CONFIG, 2, 8, padding=torch.zeros(2, dtype=torch.int64)).padding is None


def test_padding_does_not_count_towards_the_context():
    cache = KVCache(CONFIG, 2, 73, padding=torch.tensor([9, 6]))
    cache.advance(10)
    assert (cache.length, cache.longest) == (10, 4)
    cache.keep_rows(torch.tensor([0]))
    assert cache.longest == 1
    with pytest.raises(
        ValueError, match=r"capacity=74 exceeds the model's context of 64 tokens plus padding"
    ):
        KVCache(CONFIG, 2, 74, padding=torch.tensor([9, 6]))


def test_update_stores_behind_what_is_there_without_counting_it():
    cache = KVCache(CONFIG, 1, 5)
    one, two = torch.randn(2, 1, 2, 3, 6), torch.randn(2, 1, 2, 2, 6)
    keys, values = cache.update(1, *one)
    assert torch.equal(keys, one[0]) and torch.equal(values, one[1])
    cache.advance(3)
    keys, values = cache.update(1, *two)
    assert torch.equal(keys, torch.cat((one[0], two[0]), dim=2))
    assert torch.equal(values, torch.cat((one[1], two[1]), dim=2))
    assert cache.length == 3 and not cache.keys[0].any()  # other layers are untouched


def test_bytes_are_those_of_the_formula():
    assert KVCache(CONFIG, 5, 33).bytes == kv_cache_bytes(CONFIG, 33, 5, bytes_per_value=4)
    low = KVCache(CONFIG, 5, 33, dtype=torch.bfloat16)
    assert low.bytes == kv_cache_bytes(CONFIG, 33, 5) and low.keys.dtype == torch.bfloat16


@torch.no_grad()
def test_overflow_is_refused(model):
    with pytest.raises(ValueError, match=r"capacity=65 exceeds the model's context of 64"):
        KVCache(CONFIG, 1, 65)
    cache = KVCache(CONFIG, 1, 5)
    model(some_tokens(1, 5), cache)
    with pytest.raises(ValueError, match=r"6 tokens do not fit the cache of 5"):
        model(some_tokens(1, 1), cache)
    full = KVCache(CONFIG, 1, 64)
    model(some_tokens(1, 60), full)
    with pytest.raises(ValueError, match=r"65 tokens exceed the context of 64"):
        model(some_tokens(1, 5), full)
    assert full.length == 60
