"""The engine: the results of one request alone, whatever else is going on; ends, cancellation, refusals, times."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcourse.inference import SamplingParams, generate
from llmcourse.inference.engine import Engine, EngineSettings
from llmcourse.inference.scheduler import SchedulerSettings
from llmcourse.inference.sequence import FinishReason, Status
from llmcourse.models.transformer import Transformer
from tests.inference.small import CONTEXT, V, lively_model, some_prompts

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=20)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return lively_model()


def engine(model: Transformer, *, max_sequences: int = 8, max_tokens: int = 64, **changes: object) -> Engine:
    limits = SchedulerSettings(max_sequences=max_sequences, max_tokens=max_tokens)
    return Engine(model, EngineSettings(scheduler=limits, **({"n_blocks": 200, "block_size": 4} | changes)))


def alone(model: Transformer, prompts: list[list[int]], params: SamplingParams = GREEDY) -> list[list[int]]:
    return [generate(model, [prompt], params)[0] for prompt in prompts]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_sequences": 2},
        {"max_tokens": 9},
        {"n_blocks": 24},
        {"share_prefixes": False},
        {"block_size": 1, "n_blocks": 600},
        {"fused": False},
    ],
    ids=str,
)
def test_greedy_results_are_those_of_each_prompt_alone(model, changes):
    prompts = some_prompts(20)
    one = engine(model, **changes)
    assert one.generate(prompts, GREEDY) == alone(model, prompts)
    assert one.manager.n_free == one.settings.n_blocks and not one.has_work
    one.manager.check([])


def test_a_tight_cache_preempts_and_changes_nothing(model):
    prompts = some_prompts(12, seed=5, shortest=5, longest=12)
    one = engine(model, n_blocks=17, block_size=4, share_prefixes=False)
    added = [one.add(prompt, GREEDY) for prompt in prompts]
    for _ in one.run():
        one.manager.check(one.scheduler.running)
    assert sum(sequence.n_preempted for sequence in added) > 3
    assert [sequence.new_ids for sequence in added] == alone(model, prompts)


def test_equal_beginnings_are_computed_once(model):
    start = some_prompts(1, seed=3, shortest=40)[0]
    prompts = [[*start, i, i + 1] for i in range(6)]
    counts = {}
    for share in (True, False):
        one = engine(model, max_sequences=1, share_prefixes=share)
        one.generate(prompts, GREEDY)
        counts[share] = one.computed_tokens
    assert counts[False] - counts[True] == 5 * 40, "ten full blocks of four tokens, five times"


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_random_arrivals_cancellations_and_limits(seed):
    """Whatever comes and goes, blocks add up, the others' results stay, and a cancelled one holds nothing."""
    rng = random.Random(seed)
    model = lively_model(n_layers=1, d_model=16)
    one = engine(
        model, max_sequences=rng.randint(1, 5), max_tokens=rng.randint(5, 40), n_blocks=rng.randint(18, 40),
        share_prefixes=rng.random() < 0.7,
    )  # fmt: skip
    prompts = some_prompts(8, seed=seed, longest=30)
    lengths = [rng.randint(1, 30) for _ in prompts]
    added, cancelled = {}, set()
    to_come = list(range(len(prompts)))
    while to_come or one.has_work:
        if to_come and rng.random() < 0.4:
            i = to_come.pop()
            params = SamplingParams(temperature=0.0, max_new_tokens=lengths[i])
            added[i] = one.add(prompts[i], params)
        if added and rng.random() < 0.1:
            i = rng.choice(list(added))
            if added[i].status is not Status.FINISHED:
                cancelled.add(i)
            one.cancel(added[i].number)
            assert not added[i].blocks
        one.step()
        one.manager.check(one.scheduler.running)
        assert all(not sequence.blocks for sequence in one.scheduler.waiting)
    assert one.manager.n_free == one.settings.n_blocks
    for i, sequence in added.items():
        expected = generate(model, [prompts[i]], SamplingParams(temperature=0.0, max_new_tokens=lengths[i]))[
            0
        ]
        if i in cancelled:
            assert (
                sequence.reason is FinishReason.CANCELLED
                and expected[: len(sequence.new_ids)] == sequence.new_ids
            )
        else:
            assert sequence.new_ids == expected


def test_a_seed_fixes_a_request_whatever_the_company(model):
    prompts = some_prompts(6, seed=2)
    seeded = SamplingParams(max_new_tokens=12, seed=5)
    single = engine(model).generate([prompts[0]], seeded)[0]
    mixed = [seeded, *[SamplingParams(max_new_tokens=9, top_k=5)] * 3, *[GREEDY] * 2]
    assert engine(model).generate(prompts, mixed)[0] == single
    assert generate(model, [prompts[0]], seeded)[0] == single
    other = engine(model).generate([prompts[0]], SamplingParams(max_new_tokens=12, seed=6))[0]
    assert other != single


def test_the_engines_seed_repeats_a_run(model):
    prompts, params = some_prompts(6, seed=2), SamplingParams(max_new_tokens=12)
    first, again, other = (engine(model, seed=seed).generate(prompts, params) for seed in (1, 1, 2))
    assert first == again != other


def test_rows_are_drawn_from_the_distribution(model):
    prompt = [3, 1, 4]
    logits = model(torch.tensor([prompt]))[0, -1].detach()
    expected = (logits / 0.7).softmax(-1)
    params = SamplingParams(temperature=0.7, max_new_tokens=1)
    drawn = engine(model, max_sequences=50, seed=0, n_blocks=400).generate([prompt] * 4000, params)
    counts = torch.bincount(torch.tensor([new[0] for new in drawn]), minlength=V)
    likely = expected > 0.005
    chi_square = ((counts - 4000 * expected) ** 2 / (4000 * expected))[likely].sum()
    n = int(likely.sum())
    assert chi_square < n + 4 * (2 * n) ** 0.5


def test_stop_tokens_stop_strings_lengths_and_a_full_context(model):
    class Letters:
        eos_id = 0

        def encode(self, text):
            return [ord(c) - 65 for c in text]

        def decode(self, ids):
            return "".join(chr(65 + i) for i in ids)

    prompt = some_prompts(1, seed=8)[0]
    (plain,) = alone(model, [prompt])
    one = engine(model)
    stopped = one.add(prompt, GREEDY, stop_ids=[plain[3]])
    list(one.run())
    at = plain.index(plain[3])
    assert stopped.new_ids == plain[:at] and stopped.reason is FinishReason.STOP
    with_text = Engine(model, tokenizer=Letters())
    text = Letters().decode(plain[2:4])
    ended = with_text.add(prompt, SamplingParams(temperature=0.0, max_new_tokens=20, stop=(text,)))
    list(with_text.run())
    assert ended.reason is FinishReason.STOP and Letters().decode(ended.new_ids).endswith(text)
    long = one.add([1] * (CONTEXT - 3), SamplingParams(temperature=0.0, max_new_tokens=20))
    short = one.add(prompt, SamplingParams(temperature=0.0, max_new_tokens=2))
    list(one.run())
    assert len(long.new_ids) == 3 and long.reason is FinishReason.LENGTH
    assert len(short.new_ids) == 2 and short.reason is FinishReason.LENGTH


def test_what_is_refused_harms_nobody(model):
    one = engine(model, n_blocks=10)
    first = one.add([1, 2, 3], GREEDY)
    one.step()
    for bad, message in {
        (): "prompt is empty",
        tuple([1] * CONTEXT): "the context holds",
        (1, V): "ids outside",
        (-1, 2): "ids outside",
        tuple([1] * 40): "whole cache holds 40",
    }.items():
        with pytest.raises(ValueError, match=message):
            one.add(bad, GREEDY)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        one.add([1], SamplingParams(stop=("a",), max_new_tokens=5))
    with pytest.raises(ValueError, match="the last one that was added is 0"):
        one.cancel(5)
    with pytest.raises(ValueError, match="2 prompts and 3 params"):
        one.generate([[1], [2]], [GREEDY] * 3)
    with pytest.raises(ValueError, match="prompt is empty"):
        one.generate([[1], []], GREEDY)
    assert len(one.sequences) == 1, "the prompt that was in order is not left behind"
    list(one.run())
    assert first.new_ids == alone(model, [[1, 2, 3]])[0]


def test_times_and_outputs(model):
    ticks = itertools.count()
    one = Engine(model, clock=lambda: float(next(ticks)))
    sequence = one.add([1, 2, 3], SamplingParams(temperature=0.0, max_new_tokens=3))
    outputs = list(one.run())
    assert [output.token for output in outputs] == sequence.new_ids
    assert [output.reason for output in outputs] == [None, None, FinishReason.LENGTH]
    assert sequence.arrival == 0.0 and sequence.token_times == [1.0, 2.0, 3.0]
    found = one.statistics()
    assert found["steps"] == 3 and found["computed_tokens"] == 5 and found["running"] == 0
    one.cancel(sequence.number)
    assert sequence.reason is FinishReason.LENGTH, "what has ended is left alone"


def test_an_int8_cache_writes_nearly_the_same():
    model = lively_model(d_head=32)
    prompts = some_prompts(10, seed=4)
    exact = engine(model).generate(prompts, GREEDY)
    small = engine(model, cache_dtype="int8").generate(prompts, GREEDY)
    firsts = sum(a[0] == b[0] for a, b in zip(exact, small, strict=True))
    assert firsts >= 8


@pytest.mark.parametrize(
    ("bad", "message"), [({"n_blocks": 0}, "at least 1"), ({"cache_dtype": "int4"}, "choose model or int8")]
)
def test_settings_make_sense(bad, message):
    with pytest.raises(ValueError, match=message):
        EngineSettings(**bad)


def test_after_an_error_in_a_step_the_others_go_on_with_their_own_logits(model, monkeypatch):
    prompts = some_prompts(3, seed=7)
    one = engine(model)
    added = [one.add(prompt, GREEDY) for prompt in prompts]
    for _ in range(4):
        one.step()
    accept = one._accept

    def refuse(sequence, token, now):
        if sequence is added[1]:
            raise RuntimeError("no such id")
        return accept(sequence, token, now)

    monkeypatch.setattr(one, "_accept", refuse)
    with pytest.raises(RuntimeError, match="no such id"):
        one.step()
    one.cancel(added[1].number)
    later = one.add(some_prompts(1, seed=8)[0], GREEDY)
    for _ in one.run():
        one.manager.check(one.scheduler.running)
    expected = alone(model, [*prompts, some_prompts(1, seed=8)[0]])
    found = [added[0].new_ids, added[2].new_ids, later.new_ids]
    assert found == [expected[0], expected[2], expected[3]]
