"""Probes and stories judged: writers that are always right, always wrong, or partly right get the scores they earn."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from llmcourse.data.tinytown import Town
from llmcourse.data.town_probes import Probe
from llmcourse.evaluation import generation as module
from llmcourse.evaluation.generation import exact_match, story_quality, town_report


@pytest.fixture(scope="module")
def town() -> Town:
    return Town(seed=0)


class Scripted:
    """Stands for `complete` with a model: texts come from a function of the prompt, calls are kept."""

    def __init__(self, write: Callable[[str], str]) -> None:
        self.write, self.calls = write, []

    def __call__(
        self, model: Any, tokenizer: Any, prompts: Sequence[str], params: Any = None, **changes: Any
    ):
        self.calls.append(dataclasses.asdict(params) if params else changes)
        return [self.write(prompt) for prompt in prompts]


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str], str]], Scripted]:
    def install(write: Callable[[str], str]) -> Scripted:
        scripted = Scripted(write)
        monkeypatch.setattr(module, "complete", scripted)
        return scripted

    return install


class Reader:
    """A model with a context of 400 tokens, and a codec of one character a token."""

    class config:
        context_length = 400

    eos_id = 0

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]


READER = Reader()
PROBES = [Probe(f"{a} + 1 =", f" {a + 1}.", "sum", "plain") for a in range(10)]


def test_exact_match_counts_right_answers(writer):
    answers = {probe.prompt: probe.answer for probe in PROBES}
    scripted = writer(lambda prompt: answers[prompt] + " More text.")
    perfect = exact_match(READER, READER, PROBES, max_new_tokens=5)
    assert (perfect.value, perfect.n, perfect.high) == (1.0, 10, 1.0)
    assert scripted.calls == [{"temperature": 0.0, "max_new_tokens": 5}]
    writer(lambda prompt: answers[prompt] if int(prompt.split()[0]) < 3 else " 0.")
    some = exact_match(READER, READER, PROBES)
    assert some.value == 0.3 and some.low < 0.3 < some.high
    writer(lambda prompt: "")
    assert exact_match(READER, READER, PROBES).value == 0.0


def test_a_prompt_that_fills_the_context_is_missed_not_an_error(writer):
    probes = [Probe("x" * n, " 2", "sum", "plain") for n in (5, 399, 400, 900)]
    scripted = writer(lambda prompt: " 2.")
    found = exact_match(READER, READER, probes)
    assert (found.value, found.n) == (0.5, 4) and len(scripted.calls) == 1


def test_an_answer_that_goes_on_as_a_longer_number_is_wrong():
    probe = Probe("1 + 1 =", " 2", "sum", "plain")
    assert (
        probe.matches(" 2.") and probe.matches(" 2") and not probe.matches(" 23") and not probe.matches("2")
    )


def rest_of_its_story(town: Town, n: int, seed: int) -> Callable[[str], str]:
    """A writer that knows how the town's own stories go on."""
    stories = [document.text for document in town.documents(n, seed=seed + 10_000_019, kinds=["story"])]
    return lambda opening: next(s for s in stories if s.startswith(opening)).removeprefix(opening)


def test_the_towns_own_stories_are_perfect(town, writer):
    scripted = writer(rest_of_its_story(town, 20, seed=3))
    quality = story_quality(None, None, town, 20, temperature=0.5, seed=3)
    assert quality.grammatical.value == quality.consistent.value == quality.sentences_right.value == 1.0
    assert quality.grammatical.n == 20 and quality.sentences_right.n > 60
    (call,) = scripted.calls
    assert (call["temperature"], call["seed"], call["max_new_tokens"]) == (0.5, 3, 192)


def test_broken_stories_are_seen(town, writer):
    right = rest_of_its_story(town, 20, seed=0)
    writer(lambda opening: "")  # no closing sentence
    assert story_quality(None, None, town, 20).grammatical.value == 0.0
    writer(lambda opening: " Colorless ideas sleep." * 3)
    nonsense = story_quality(None, None, town, 20)
    assert nonsense.grammatical.value == 0.0 and nonsense.sentences_right.value <= 0.5

    def contradicts(opening: str) -> str:
        before, end, after = right(opening).rpartition("In the end, ")
        other = random.Random(0).choice(["the moon", "nobody"])
        return before + end + after.replace(" was ", f" was with {other} and ")

    writer(contradicts)
    assert story_quality(None, None, town, 20).consistent.value < 0.7
    first = iter(range(20))
    writer(lambda opening: right(opening) if next(first) % 2 else "")
    assert story_quality(None, None, town, 20).grammatical.value == 0.5


def test_the_openings_are_not_those_of_training(town, writer):
    seen = []
    writer(lambda opening: seen.append(opening) or "")
    story_quality(None, None, town, 10, seed=0)
    story_quality(None, None, town, 10, seed=1)
    assert all(text.endswith(".") for text in seen) and seen[:10] != seen[10:]


def test_the_report_of_a_perfect_model(town, writer):
    n, seed = 12, 4
    kinds = {
        "facts": town.fact_probes(n, seed),
        "facts_reworded": town.fact_probes(n, seed, held_out_template=True),
        "sums_plain": town.sum_probes(n, seed)[: n // 2],
        "sums_worked": town.sum_probes(n, seed + 1, worked=True)[: n // 2],
        "story_facts": town.story_probes(n, seed),
    }
    answers = {probe.prompt: probe.answer for probes in kinds.values() for probe in probes}
    story = rest_of_its_story(town, n, seed)
    writer(lambda prompt: answers.get(prompt) or story(prompt))
    report = town_report(READER, READER, town, n=n, seed=seed)
    stories = {"stories_grammatical", "stories_consistent", "story_sentences_right"}
    assert set(report) == set(kinds) | stories | {"sums"}
    assert all(numbers["value"] == 1.0 for numbers in report.values())
    assert all(report[kind]["n"] == len(probes) and report[kind]["low"] < 1 for kind, probes in kinds.items())
    assert report["sums"]["n"] == n  # both forms together
    writer(lambda prompt: " wrong")
    assert all(town_report(READER, READER, town, n=n, seed=seed)[kind]["value"] == 0.0 for kind in kinds)
