"""Generation: with a cache, without one, and by `transformers.generate`: the same tokens; stops; batches; refusals."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmcourse.inference import KVCache, SamplingParams, complete, generate
from llmcourse.inference import generation as module
from llmcourse.models.pretrained import save_pretrained
from llmcourse.models.transformer import Transformer
from tests.inference.small import CONTEXT, V
from tests.inference.small import lively_model as make


@pytest.fixture(scope="module")
def model() -> Transformer:
    return make()


class Letters:
    """A codec of one character a token: id 0 ends a text, ids from 1 are "a", "b", ... and beyond."""

    eos_id = 0

    def encode(self, text: str) -> list[int]:
        return [ord(character) - 96 for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(i + 96) for i in ids if i)


GREEDY = SamplingParams(temperature=0.0, max_new_tokens=20)
LENGTHS = (5, 1, 17, 5, 33)


def prompts_of(lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, V, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="module")
def reference(model: Transformer, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """`transformers.generate`, one prompt at a time, greedy, never ended."""
    folder = save_pretrained(model, tmp_path_factory.mktemp("hub"))
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    continuations = []
    for prompt in prompts_of():
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = theirs.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=20,
                eos_token_id=None,
                pad_token_id=1,
            )
        continuations.append(out[0, len(prompt) :].tolist())
    return continuations


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_is_that_of_transformers_token_for_token(model, reference, use_cache):
    assert all(len(ids) == 20 and len(set(ids)) > 3 for ids in reference)  # no trivial repetition
    one_by_one = [generate(model, [prompt], GREEDY, use_cache=use_cache)[0] for prompt in prompts_of()]
    assert one_by_one == reference
    assert generate(model, prompts_of(), GREEDY, use_cache=use_cache) == reference  # and as an unequal batch


@pytest.mark.parametrize("change", [{"n_kv_heads": 4}, {"n_kv_heads": 1}, {"qk_norm": True}], ids=str)
def test_cached_is_uncached_for_other_shapes(change):
    model = make(**change)
    assert generate(model, prompts_of(), GREEDY) == generate(model, prompts_of(), GREEDY, use_cache=False)


def test_cached_is_uncached_when_sampling(model):
    params = SamplingParams(temperature=1.3, top_k=30, top_p=0.95, min_p=0.01, max_new_tokens=15, seed=4)
    cached, plain = (generate(model, prompts_of(), params, use_cache=use) for use in (True, False))
    assert cached == plain


def test_a_seed_repeats_and_no_seed_follows_the_global_generator(model):
    def run(seed: int | None) -> list[list[int]]:
        return generate(model, prompts_of(), SamplingParams(max_new_tokens=12, seed=seed))

    state = torch.get_rng_state()
    assert run(5) == run(5) != run(6)
    assert torch.equal(torch.get_rng_state(), state)  # a seeded call leaves the global generator alone
    torch.manual_seed(0)
    first, second = run(None), run(None)
    torch.manual_seed(0)
    assert run(None) == first != second


@pytest.mark.parametrize(("use_cache", "fused"), [(True, True), (True, False), (False, False)])
def test_finished_rows_leave_and_the_others_do_not_notice(model, reference, use_cache, fused, monkeypatch):
    stop = reference[0][3]  # ends row 0 after three tokens, and whichever other rows meet it
    expected = [ids[: ids.index(stop)] if stop in ids else ids for ids in reference]
    assert len({len(ids) for ids in expected}) > 1
    sizes = []
    sample = module.sample

    def watch(logits, params, generator):
        sizes.append(len(logits))
        return sample(logits, params, generator)

    monkeypatch.setattr(module, "sample", watch)
    assert (
        generate(model, prompts_of(), GREEDY, stop_ids=[stop], use_cache=use_cache, fused=fused) == expected
    )
    # at step i the batch holds the rows that have not met the stop id in their first i tokens
    running = [sum(stop not in ids[:i] for ids in reference) for i in range(20)]
    assert sizes == running and running[-1] < 5


def test_a_first_token_that_stops_gives_nothing(model, reference):
    assert generate(model, prompts_of()[:1], GREEDY, stop_ids=[reference[0][0]]) == [[]]


def test_several_stop_ids(model, reference):
    first, second = reference[2][4], reference[2][2]
    found = generate(model, prompts_of()[2:3], GREEDY, stop_ids=[first, second])[0]
    ends = min(reference[2].index(first), reference[2].index(second))
    assert found == reference[2][:ends]


def test_max_new_tokens_and_the_end_of_the_context(model, reference):
    few = dataclasses.replace(GREEDY, max_new_tokens=7)
    assert generate(model, prompts_of(), few) == [ids[:7] for ids in reference]
    many = dataclasses.replace(GREEDY, max_new_tokens=500)
    (found,) = generate(model, prompts_of()[4:], many)
    assert len(found) == CONTEXT - 33 and found[:20] == reference[4]
    longest = prompts_of((CONTEXT - 1,))
    assert len(generate(model, longest, many)[0]) == 1


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_long_prompt_takes_no_room_from_the_others(model, use_cache):
    prompts = prompts_of((CONTEXT - 2, 3, CONTEXT - 10, 40))
    params = dataclasses.replace(GREEDY, max_new_tokens=30)
    together = generate(model, prompts, params, use_cache=use_cache)
    assert [len(ids) for ids in together] == [2, 30, 10, 30]
    assert together == [generate(model, [prompt], params)[0] for prompt in prompts]


def test_no_prompts_no_texts(model):
    assert generate(model, [], GREEDY) == []
    assert complete(model, Letters(), [], GREEDY) == []


def test_the_cache_holds_no_more_than_is_needed(model, monkeypatch):
    made = []

    class Watched(KVCache):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self.keys.shape)

    monkeypatch.setattr(module, "KVCache", Watched)
    generate(model, prompts_of((3, 9)), dataclasses.replace(GREEDY, max_new_tokens=4))
    assert made == [(2, 2, 2, 13, 6)]  # layers, rows, key heads, 9 + 4 slots, channels


# Text


def text_of(ids: Sequence[int]) -> str:
    return Letters().decode(ids)


def test_complete_cuts_before_the_first_stop_string(model, reference):
    prompts = [text_of(prompt) for prompt in prompts_of()]
    whole = complete(model, Letters(), prompts, GREEDY)
    ended = [ids[: ids.index(0)] if 0 in ids else ids for ids in reference]
    assert whole == [text_of(ids) for ids in ended]
    stop = (whole[0][4:6], whole[2][1:3])  # of two letters, so that it spans tokens
    cut = complete(model, Letters(), prompts, temperature=0.0, max_new_tokens=20, stop=stop)
    expected = [min((text.split(s)[0] for s in stop), key=len) for text in whole]
    assert cut == expected and len(cut[0]) <= 4 and len(cut[2]) <= 1


def test_a_stop_string_ends_the_work(model, reference):
    new = text_of(reference[2])
    params = dataclasses.replace(GREEDY, stop=(new[3:5],))
    (ids,) = generate(model, prompts_of()[2:3], params, tokenizer=Letters())
    assert text_of(ids) == new[: new.index(new[3:5]) + 2]


class Bytes:
    """A codec of one byte a token, id 0 for the end: most characters are several tokens."""

    eos_id = 0

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i).decode(errors="replace")


def test_a_long_stop_string_of_characters_with_several_bytes_is_seen(monkeypatch):
    stop = "日本語の文章をここで終わりにします。"  # 18 characters, 54 tokens
    script = list(("ここから" + stop + "その後").encode())
    ids = iter(script)
    monkeypatch.setattr(module, "sample", lambda logits, params, generator: torch.tensor([next(ids)]))
    model = make(vocab_size=256)
    params = SamplingParams(max_new_tokens=90, stop=(stop,))
    (found,) = generate(model, [[5]], params, tokenizer=Bytes())
    assert bytes(found).decode() == "ここから" + stop


def test_complete_keeps_the_order_whatever_the_batches(model):
    prompts = [text_of(prompt) for prompt in prompts_of((9, 2, 30, 2, 11, 4, 1))]
    alone = [complete(model, Letters(), [prompt], GREEDY)[0] for prompt in prompts]
    for batch_size in (1, 2, 3, 64):
        assert complete(model, Letters(), prompts, GREEDY, batch_size=batch_size) == alone


def test_an_empty_prompt_begins_after_the_end_of_text(model):
    (from_nothing,) = complete(model, Letters(), [""], GREEDY)
    (ids,) = generate(model, [[0]], GREEDY, stop_ids=[0])
    assert from_nothing == text_of(ids)


def test_changes_are_sampling_parameters(model):
    assert complete(model, Letters(), ["abc"], temperature=0.0, max_new_tokens=20) == complete(
        model, Letters(), ["abc"], GREEDY
    )
    with pytest.raises(ValueError, match=r"max_new_tokens=0"):
        complete(model, Letters(), ["abc"], max_new_tokens=0)
    with pytest.raises(ValueError, match=r"params or"):
        complete(model, Letters(), ["abc"], GREEDY, max_new_tokens=3)


def test_no_gradients_and_no_change_of_mode(model):
    model.train()
    try:
        generate(model, [[1, 2]], dataclasses.replace(GREEDY, max_new_tokens=2))
        assert model.training and all(p.grad is None for p in model.parameters())
    finally:
        model.eval()


def test_unusable_prompts_are_refused(model):
    with pytest.raises(ValueError, match=r"prompt 1 is empty"):
        generate(model, [[1], []], GREEDY)
    with pytest.raises(ValueError, match=rf"prompt 0 has {CONTEXT} tokens and the context holds {CONTEXT}"):
        generate(model, [[1] * CONTEXT], GREEDY)
    with pytest.raises(ValueError, match=r"needs a tokenizer"):
        generate(model, [[1]], SamplingParams(stop=("x",)))
    with pytest.raises(ValueError, match=r"batch_size=0"):
        complete(model, Letters(), ["a"], GREEDY, batch_size=0)


def test_a_saved_model_generates_the_same(model, reference, tmp_path: Path):
    from llmcourse.models.pretrained import from_pretrained

    assert generate(from_pretrained(save_pretrained(model, tmp_path)), prompts_of(), GREEDY) == reference


def test_batches_of_one_call_draw_different_numbers(model):
    texts = complete(model, Letters(), ["ab"] * 8, temperature=1.0, max_new_tokens=20, seed=0, batch_size=4)
    assert texts[:4] != texts[4:]
    again = complete(model, Letters(), ["ab"] * 8, temperature=1.0, max_new_tokens=20, seed=0, batch_size=4)
    assert texts == again
