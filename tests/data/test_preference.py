"""Preference pairs: ids and targets by hand, counted skips, batches, the annotator with known reward."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from llmcourse.data.chat_formats import CourseFormat
from llmcourse.data.packing import IGNORE
from llmcourse.data.preference import (
    PreferenceBatches,
    PreferencePair,
    annotate,
    annotate_rankings,
    encode_pairs,
    mistake,
    town_pairs,
)
from llmcourse.data.tinytown import Town
from llmcourse.data.town_instructions import TownInstructions
from llmcourse.tokenization.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def chat() -> CourseFormat:
    return CourseFormat(Tokenizer.train(["the cat sat on the mat", "where is the cat now"] * 20, 275))


@pytest.fixture(scope="module")
def instructions() -> TownInstructions:
    return TownInstructions(Town(0))


ASK = ({"role": "user", "content": "where is the cat"},)
MULTI = (*ASK, {"role": "assistant", "content": "on the mat"}, {"role": "user", "content": "now"})


def pair(chosen: str, rejected: str, messages: tuple = ASK, margin: float | None = None) -> PreferencePair:
    return PreferencePair(messages=messages, chosen=chosen, rejected=rejected, margin=margin)


def test_only_the_last_answer_is_a_target(chat: CourseFormat):
    data = encode_pairs([pair("the cat sat", "mat", MULTI)], chat, context_length=64)
    batch = PreferenceBatches(data, batch_size=1, context_length=64, seed=0).next()
    assert batch["chosen_tokens"].shape == batch["rejected_targets"].shape
    for side, answer in (("chosen", "the cat sat"), ("rejected", "mat")):
        ids = chat.encode([*MULTI, {"role": "assistant", "content": answer}])[0]
        prompt = len(chat.prompt(MULTI))
        tokens, targets = batch[f"{side}_tokens"][0].tolist(), batch[f"{side}_targets"][0].tolist()
        assert tokens[: len(ids) - 1] == ids[:-1] and set(tokens[len(ids) - 1 :]) <= {chat.pad_id}
        expected = [IGNORE] * (prompt - 1) + ids[prompt:]
        assert targets == expected + [IGNORE] * (len(targets) - len(expected))


def test_pairs_without_preference_and_too_long_ones_are_counted(chat: CourseFormat):
    pairs = [pair("cat", "cat"), pair("cat", "mat", margin=-1.0), pair("cat", "the cat sat on " * 20)]
    data = encode_pairs(pairs, chat, context_length=64)
    assert data.counts == {"read": 3, "kept": 1, "identical": 1, "too_long": 1, "mistakes": 1}
    exact = len(chat.encode([*ASK, {"role": "assistant", "content": "cat"}])[0]) - 1
    assert len(encode_pairs([pair("cat", "mat")], chat, context_length=exact)) == 1
    with pytest.raises(ValueError, match="no pair is left of 1"):
        encode_pairs([pair("cat", "mat")], chat, context_length=exact - 1)


def test_batches_name_their_pairs_and_margins(chat: CourseFormat):
    words = ["cat", "mat", "the", "sat", "on", "is", "where", "now"]
    pairs = [pair(w, f"{w} now", margin=None if i == 3 else float(i)) for i, w in enumerate(words)]
    data = encode_pairs(pairs, chat, context_length=64)
    source = PreferenceBatches(data, batch_size=4, context_length=64, seed=0)
    seen = []
    for _ in range(2):
        batch = source.next()
        for b, number in enumerate(batch["pairs"].tolist()):
            seen.append(number)
            written = batch["chosen_targets"][b][batch["chosen_targets"][b] != IGNORE]
            assert written.tolist() == data.chosen[number].tolist()
            margin = float(batch["margins"][b])
            assert np.isnan(margin) if number == 3 else margin == number
    assert sorted(seen) == list(range(8))
    state = source.state_dict()
    other = encode_pairs(pairs[::-1], chat, context_length=64)
    with pytest.raises(ValueError, match="the saved batches has checksum"):
        PreferenceBatches(other, batch_size=4, context_length=64, seed=0).load_state_dict(state)


def test_one_concatenated_forward_is_both_sides(chat: CourseFormat):
    from llmcourse.models.config import ModelConfig
    from llmcourse.models.transformer import Transformer

    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=275, context_length=64, d_model=16, n_layers=1, d_ff=24))
    data = encode_pairs([pair("cat", "the cat sat"), pair("mat", "now")], chat, context_length=64)
    batch = PreferenceBatches(data, batch_size=2, context_length=64, seed=0).next()
    both = model(torch.cat((batch["chosen_tokens"], batch["rejected_tokens"])))
    torch.testing.assert_close(both[2:], model(batch["rejected_tokens"]))


def test_bad_pairs_are_refused(chat: CourseFormat):
    class Greeting:
        """A format that begins otherwise once there is an answer."""

        pad_id, stop_ids = 0, (0,)

        def prompt(self, messages: Any) -> list[int]:
            return [1, 2]

        def encode(self, messages: Any) -> tuple[list[int], list[bool]]:
            return [1, 3, 4], [False, False, True]

    with pytest.raises(ValueError, match="pair 0: the chat template writes the prompt differently"):
        encode_pairs([pair("a", "b")], Greeting(), context_length=64)
    with pytest.raises(ValueError, match="pair 1: unknown role 'tool'"):
        bad = pair("a", "b", ({"role": "tool", "content": "x"},))
        encode_pairs([pair("a", "b"), bad], chat, context_length=64)
    with pytest.raises(ValueError, match="context_length=0"):
        encode_pairs([pair("a", "b")], chat, context_length=0)
    data = encode_pairs([pair("cat", "mat")], chat, context_length=64)
    with pytest.raises(ValueError, match="slots of context_length=4"):
        PreferenceBatches(data, batch_size=1, context_length=4, seed=0)


def test_rows_are_what_trl_takes():
    from datasets import Dataset

    row = Dataset.from_list([pair("cat", "mat", MULTI).row])[0]
    assert row["chosen"] == [{"role": "assistant", "content": "cat"}]
    assert [message["role"] for message in row["prompt"]] == ["user", "assistant", "user"]


def test_a_perfect_annotator_takes_the_better_answer_and_a_noisy_one_errs(instructions: TownInstructions):
    perfect = town_pairs(instructions, 300)
    assert all(one.margin is not None and one.margin >= 0 for one in perfect)
    assert perfect == town_pairs(instructions, 300) != town_pairs(instructions, 300, seed=1)
    noisy = town_pairs(instructions, 300, noise=4.0)
    errors = sum(one.margin < 0 for one in noisy)
    # Bradley-Terry: the expected number of errors is the sum of sigmoid(-|margin| / noise)
    chances = [1 / (1 + np.exp(abs(one.margin) / 4.0)) for one in noisy]
    assert abs(errors - sum(chances)) < 4 * np.sqrt(sum(p * (1 - p) for p in chances))
    for one in perfect[:50]:
        assert one.messages and one.chosen != one.rejected


def test_margins_are_differences_of_the_given_reward(instructions: TownInstructions):
    requests = instructions.training(3)
    pairs = annotate(requests, ["aa", "b", ""], ["a", "bbb", "c"], lambda _, text: len(text), noise=0.0)
    assert [(p.chosen, p.margin) for p in pairs] == [("aa", 1), ("bbb", 2), ("c", 1)]
    with pytest.raises(ValueError, match="3 requests, 1 and 3 answers"):
        annotate(requests, ["a"], ["a", "b", "c"], lambda *_: 0.0, noise=0.0)
    with pytest.raises(ValueError, match="noise=-1"):
        annotate(requests, ["a"] * 3, ["b"] * 3, lambda *_: 0.0, noise=-1.0)


def test_a_ranking_gives_its_first_and_its_last(instructions: TownInstructions):
    requests = instructions.training(2)
    answers = [["aa", "x"], ["a", "yyyy"], ["aaa", "zz"]]
    pairs = annotate_rankings(requests, answers, lambda _, text: len(text), noise=0.0)
    assert [(p.chosen, p.rejected, p.margin) for p in pairs] == [("aaa", "a", 2), ("yyyy", "x", 3)]
    ties = {
        (p.chosen, p.rejected)
        for seed in range(20)
        for p in annotate_rankings(requests, answers, lambda *_: 1.0, noise=0.0, seed=seed)
    }
    assert len(ties) > 6 and all(chosen != rejected for chosen, rejected in ties)
    with pytest.raises(ValueError, match=r"2 requests, lists of \[2, 1\] answers"):
        annotate_rankings(requests, [["a", "b"], ["a"]], lambda *_: 0.0, noise=0.0)
    with pytest.raises(ValueError, match="at least two lists"):
        annotate_rankings(requests, [["a", "b"]], lambda *_: 0.0, noise=0.0)
    with pytest.raises(ValueError, match="noise=-1"):
        annotate_rankings(requests, answers, lambda *_: 0.0, noise=-1.0)


def test_two_answers_are_ranked_as_bradley_and_terry_say(instructions: TownInstructions):
    requests = instructions.training(1) * 4000
    answers = [["aa"] * 4000, ["a"] * 4000]
    pairs = annotate_rankings(requests, answers, lambda _, text: float(len(text)), noise=0.8, seed=3)
    right = np.mean([one.margin > 0 for one in pairs])
    assert abs(right - 1 / (1 + np.exp(-1 / 0.8))) < 4 * 0.5 / np.sqrt(4000)


def test_the_best_of_three_is_chosen_with_a_softmax(instructions: TownInstructions):
    requests = instructions.training(1) * 4000
    answers = [[text] * 4000 for text in ("a", "aa", "aaaa")]
    pairs = annotate_rankings(requests, answers, lambda _, text: float(len(text)), noise=1.5, seed=4)
    weights = np.exp(np.array([1, 2, 4]) / 1.5)
    for text, share in zip(("a", "aa", "aaaa"), weights / weights.sum(), strict=True):
        assert abs(np.mean([one.chosen == text for one in pairs]) - share) < 4 * 0.5 / np.sqrt(4000)


def test_a_mistake_changes_one_word_for_another_of_its_kind():
    rng = random.Random(0)
    found = {mistake("Ann Day works as a baker.", rng) for _ in range(60)}
    assert "Ann Day works as a baker." not in found and len(found) > 8
    assert all(text.startswith("Ann Day works as a ") for text in found)
    assert {mistake("1 + 2 = 3", rng) for _ in range(60)} >= {"1 + 2 = 2", "1 + 2 = 13", "0 + 2 = 3"}
    assert mistake("Nothing to see.", rng) == "Nothing to see."
