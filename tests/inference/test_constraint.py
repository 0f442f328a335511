"""Constrained decoding: only matches come out, every match can come out, equal to a library's table of tokens."""

from __future__ import annotations

import json
import re

import pytest
import torch

from llmcourse.inference.constraint import TokenConstraint, json_constraint, regex_constraint, token_texts
from llmcourse.inference.engine import Engine, EngineSettings
from llmcourse.inference.sampling import SamplingParams
from llmcourse.inference.sequence import FinishReason
from llmcourse.tokenization.tokenizer import Tokenizer
from tests.inference.small import lively_model

TEXTS = [None, "a", "b", "ab", "ba", "1", "12", "é", "{", '"']
PATTERNS = ["a(b|ba)*", "[ab]{2,4}1?", "(ab)+12", "[^1]+é", "a?b?1"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_allowed_tokens_are_those_that_can_still_become_a_match(pattern):
    constraint = TokenConstraint(pattern, TEXTS, [0])
    frontier, seen = [("", constraint.start)], 0
    for _ in range(3):
        grown = []
        for text, state in frontier:
            assert constraint.may_end(state) == bool(re.fullmatch(pattern, text))
            mask = constraint.mask(state, len(TEXTS))
            assert (mask[0] == 0) == constraint.may_end(state)
            for token, piece in enumerate(TEXTS[1:], 1):
                possible = can_match(pattern, text + piece)
                assert (mask[token] == 0) == possible == (token in constraint.allowed(state)), (text, piece)
                if possible:
                    grown.append((text + piece, constraint.advance(state, token)))
                    seen += 1
        frontier = grown
    assert seen > 3


def can_match(pattern: str, beginning: str) -> bool:
    """Whether up to 4 more tokens make a match (enough for these patterns). "2" alone is no token here."""
    endings = [""]
    for _ in range(5):
        if any(re.fullmatch(pattern, beginning + ending) for ending in endings):
            return True
        endings = [ending + text for ending in endings for text in ("a", "b", "1", "12", "é")]
    return False


def test_a_dead_end_is_not_entered():
    constraint = TokenConstraint("ab|b", ["a", "b", "c", None], [3])
    assert set(constraint.allowed(constraint.start)) == {0, 1}
    state = constraint.advance(constraint.start, 0)
    assert set(constraint.allowed(state)) == {1} and not constraint.may_end(state)
    assert constraint.must_end(constraint.advance(state, 1))
    with pytest.raises(ValueError, match=r"token 2 \('c'\) may not come"):
        constraint.advance(state, 2)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    text = ['{"name": "Ann", "age": 12}', "the cat sat on the mat 1 2 3 4 5 6 7 8 9 0 true false, é"]
    return Tokenizer.train(text * 20, 296)


def model_for(tokenizer: Tokenizer):
    return lively_model(vocab_size=tokenizer.vocab_size)


def sampled(tokenizer: Tokenizer, constraint: TokenConstraint, n: int = 12, max_new_tokens: int = 80):
    engine = Engine(model_for(tokenizer), EngineSettings(seed=0))
    params = SamplingParams(max_new_tokens=max_new_tokens)
    added = [engine.add(tokenizer.encode("the"), params, constraint=constraint) for _ in range(n)]
    list(engine.run())
    return [(tokenizer.decode(sequence.new_ids), sequence.reason) for sequence in added]


def test_every_finished_text_matches(tokenizer):
    pattern = r"(cat|mat)( [0-9]{1,2}){2,3}"
    found = sampled(tokenizer, regex_constraint(pattern, tokenizer))
    assert all(reason is FinishReason.STOP for _, reason in found)
    assert all(re.fullmatch(pattern, text) for text, _ in found) and len({text for text, _ in found}) > 3


def test_json_of_a_schema(tokenizer):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 99},
            "ok": {"type": "boolean"}},
        "required": ["name", "age", "ok"],
    }  # fmt: skip
    found = sampled(tokenizer, json_constraint(schema, tokenizer))
    ended = [json.loads(text) for text, reason in found if reason is FinishReason.STOP]
    assert len(ended) >= 6
    assert all(set(one) == {"name", "age", "ok"} and isinstance(one["ok"], bool) for one in ended)


@pytest.mark.parametrize(
    "pattern",
    [
        r"(cat|mat)( [0-9]{1,2}){2}",
        r"[a-z]{3}[0-9]+",
        r'\{"name": "[^"]{1,8}", "age": [0-9]{1,2}\}',
        r"-?[0-9]+(\.[0-9]+)?",
        r"(true|false|[0-9]{1,3})(, (true|false|[0-9]{1,3})){0,4}",
    ],
)
def test_the_masks_equal_those_of_outlines(tokenizer, pattern):
    """Its version 0.2.14 forbids, where a text may end, tokens after which it may not: after 88 no point, here."""
    from outlines_core import Index, Vocabulary

    ours = regex_constraint(pattern, tokenizer)
    by_text: dict[str, list[int]] = {}
    for token, text in enumerate(token_texts(tokenizer)):
        if text:
            by_text.setdefault(text, []).append(token)
    theirs = Index(pattern, Vocabulary(tokenizer.eos_id, by_text))
    states, checked = [(ours.start, theirs.get_initial_state())], set()
    while states:
        mine, other = states.pop()
        if (mine, other) in checked:
            continue
        checked.add((mine, other))
        expected = set(theirs.get_allowed_tokens(other) or ()) - {tokenizer.eos_id}
        more = set(ours.allowed(mine)) - expected
        assert expected <= set(ours.allowed(mine))
        assert (
            not more
            or ours.may_end(mine)
            and not any(ours.may_end(ours.advance(mine, token)) for token in more)
        )
        assert ours.may_end(mine) == theirs.is_final_state(other)
        states += [(ours.advance(mine, token), theirs.get_next_state(other, token)) for token in expected]
    assert len(checked) > 3


def test_special_tokens_and_pieces_of_a_character_stay_out(tokenizer):
    texts = token_texts(tokenizer)
    assert all(texts[token] is None for token in tokenizer.special_ids.values())
    assert all(text is None or "\ufffd" not in text for text in texts)
    free = regex_constraint(".*", tokenizer)
    assert not set(free.allowed(free.start)) & set(tokenizer.special_ids.values())


def test_masks_are_made_once(tokenizer):
    constraint = regex_constraint("[a-z]+", tokenizer)
    first = constraint.mask(constraint.start, tokenizer.vocab_size)
    assert constraint.mask(constraint.start, tokenizer.vocab_size) is first
    assert torch.isinf(first).any() and (first == 0).any()


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "not a regular expression"),
        ("zzz", "no token of this vocabulary"),
        ("a(?=b)c", "matches no text"),
    ],
)
def test_patterns_that_cannot_be_used(pattern, message):
    with pytest.raises(ValueError, match=message):
        TokenConstraint(pattern, TEXTS, [0])


def test_a_schema_that_cannot_be_used(tokenizer):
    with pytest.raises(ValueError, match="schema"):
        json_constraint({"type": "nonsense"}, tokenizer)
