"""The study of byte-pair encoding: against hand computation, its naive form, the `tokenizers` library."""

from __future__ import annotations

import doctest
import inspect
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcourse.tokenization import bpe
from llmcourse.tokenization.bpe import BytePairEncoding, byte_symbols, pretokenize, train_bpe, train_bpe_naive
from llmcourse.tokenization.tokenizer import SPECIAL_TOKENS, Tokenizer

CORPUS = [inspect.getsource(module) for module in (doctest, random, inspect)]
AWKWARD = [
    "",
    " ",
    "It's 42 cats, isn't it?",
    "a  b   c\t\td \n\n e\r\n\r\n   ",
    "3.14159 + 2,718 = 5e+10 ½ ٣ ²",
    "naïve Ünïcödé — Ελληνικά, 中文字符, עברית, हिन्दी",
    "👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u200b\ufeff\x00\x07",
    "<|endoftext|><|user|>not special",
    "!!!???...\n\n---===",
]
# `regex` knows the letters of newer Unicode versions than the library, whose tables were fixed when it was
# compiled. Equality is claimed for the characters that this Python knows too (nothing unassigned).
KNOWN_TEXT = st.text(st.characters(exclude_categories=("Cs", "Cn")))
SMALL_ALPHABET = st.lists(st.text("ab c", min_size=1, max_size=40), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def encoding() -> BytePairEncoding:
    return train_bpe(CORPUS, 700, special_tokens=SPECIAL_TOKENS)


def test_docstring_examples_hold() -> None:
    result = doctest.testmod(bpe)
    assert result.attempted >= 8
    assert result.failed == 0


def test_three_merges_by_hand() -> None:
    """The words are "abab" (twice) and "abc" (once): (a,b) occurs 2*2+1 = 5 times, (b,a) 2, (b,c) 1.

    Rule 1 joins a,b. Then "abab" is [ab, ab] and "abc" is [ab, c]: counts 2 and 1, so rule 2 joins (ab, ab).
    Then (ab, c) is left with count 1, below the least frequency of 2.
    """
    learned = train_bpe_naive(["abab", "abab", "abc"], 1000)
    assert learned.vocabulary[256:] == (b"ab", b"abab")
    a, b = learned.byte_ids[ord("a")], learned.byte_ids[ord("b")]
    assert learned.merges == ((a, b), (256, 256))
    assert train_bpe_naive(["abab", "abab", "abc"], 1000, min_frequency=1).vocabulary[258:] == (b"abc",)


def test_tie_goes_to_the_smaller_pair_whatever_the_order_of_texts() -> None:
    """ "xy" and "ab" occur twice each; a comes before x in the alphabet, so (a, b) is learned first."""
    for texts in (["xy", "xy", "ab", "ab"], ["ab", "ab", "xy", "xy"]):
        assert train_bpe(texts, 1000).vocabulary[256:] == (b"ab", b"xy")


def test_earlier_rule_wins_over_longer_match() -> None:
    """With "bc" learned before "ab", "abc" is a + bc, though "ab" would match first from the left."""
    a, b, c = (BytePairEncoding(()).byte_ids[byte] for byte in b"abc")
    assert BytePairEncoding(((b, c), (a, b))).encode("abc") == [a, 256]
    assert BytePairEncoding(((a, b), (b, c))).encode("abc") == [256, c]


def test_one_token_two_rules_agrees_with_the_library() -> None:
    """ "abc" as "ab"+"c" and as "a"+"bc" is one id with two rules."""
    first = BytePairEncoding((), SPECIAL_TOKENS)
    a, b, c = (first.byte_ids[byte] for byte in b"abc")
    n = first.vocab_size
    both = BytePairEncoding(((a, b), (b, c), (n, c), (a, n + 1)), SPECIAL_TOKENS)
    assert both.vocabulary[n:] == (b"ab", b"bc", b"abc")
    production = Tokenizer.from_bpe(both)
    for text in ("abc", "aabc", "abcbc", "bcabcab", "ababcc"):
        assert both.encode(text) == production.encode(text)


@settings(max_examples=60, deadline=None)
@given(texts=SMALL_ALPHABET, learned=st.integers(0, 25), min_frequency=st.integers(1, 3))
def test_incremental_counts_give_the_plain_result(texts: list[str], learned: int, min_frequency: int) -> None:
    plain = train_bpe_naive(texts, 256 + learned, min_frequency=min_frequency)
    assert train_bpe(texts, 256 + learned, min_frequency=min_frequency) == plain


@settings(max_examples=60, deadline=None)
@given(texts=SMALL_ALPHABET, learned=st.integers(0, 25))
@pytest.mark.filterwarnings("ignore:the corpus fills only")
def test_library_trainer_learns_the_same_rules(texts: list[str], learned: int) -> None:
    size = len(SPECIAL_TOKENS) + 256 + learned
    ours = Tokenizer.from_bpe(train_bpe(texts, size, special_tokens=SPECIAL_TOKENS))
    assert ours.fingerprint == Tokenizer.train(texts, size).fingerprint


def test_library_trainer_learns_the_same_rules_on_real_text(encoding: BytePairEncoding) -> None:
    assert encoding.vocab_size == 700
    theirs = Tokenizer.train(CORPUS, 700)
    assert Tokenizer.from_bpe(encoding).backend.to_str() == theirs.backend.to_str()


@pytest.mark.parametrize("text", AWKWARD + CORPUS[:1])
def test_encodes_as_the_library_does(encoding: BytePairEncoding, text: str) -> None:
    assert encoding.encode(text) == Tokenizer.from_bpe(encoding).encode(text)


@settings(max_examples=150, deadline=None)
@given(text=KNOWN_TEXT)
def test_encodes_random_unicode_as_the_library_does(encoding: BytePairEncoding, text: str) -> None:
    production = Tokenizer.from_bpe(encoding)
    assert encoding.encode(text) == production.encode(text)


@settings(max_examples=150, deadline=None)
@given(text=st.text())
def test_round_trip_and_words_join_to_the_text(encoding: BytePairEncoding, text: str) -> None:
    assert b"".join(pretokenize(text)) == text.encode()
    assert encoding.decode(encoding.encode(text)) == text


def test_digits_stand_alone_and_spaces_go_with_words() -> None:
    assert pretokenize("37 + 48 =") == [b"3", b"7", b" +", b" ", b"4", b"8", b" ="]
    assert pretokenize("  two  words") == [b" ", b" two", b" ", b" words"]
    assert pretokenize("end.\n\nNew\n") == [b"end", b".\n\n", b"New", b"\n"]


def test_byte_symbols_are_those_of_the_library() -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    symbols = byte_symbols()
    assert sorted(symbols) == list(range(256))
    assert list(symbols.values()) == sorted(symbols.values())
    assert set(symbols.values()) == set(ByteLevel.alphabet())


def test_cut_character_decodes_to_the_replacement_character(encoding: BytePairEncoding) -> None:
    first_byte_of_a_three_byte_character = "中".encode()[0]
    assert encoding.decode([encoding.byte_ids[first_byte_of_a_three_byte_character]]) == "\ufffd"


def test_bad_input_is_refused_with_the_value() -> None:
    with pytest.raises(ValueError, match="vocab_size 255 .* at least 256"):
        train_bpe(["a"], 255)
    with pytest.raises(ValueError, match="min_frequency is 0"):
        train_bpe(["a"], 300, min_frequency=0)
    for empty in ([], [""]):
        with pytest.raises(ValueError, match="holds no text"):
            train_bpe(empty, 300)
    with pytest.raises(ValueError, match="U\\+D800"):
        pretokenize("bad \ud800 text")
    with pytest.raises(ValueError, match="must be a str, got bytes"):
        pretokenize(b"bytes")
    with pytest.raises(ValueError, match="id 256 is not in 0 to 255"):
        BytePairEncoding(()).decode([256])
    with pytest.raises(ValueError, match="names a token twice"):
        BytePairEncoding((), ("<|end|>", "<|end|>"))
    with pytest.raises(ValueError, match="holds a rule twice"):
        BytePairEncoding(((0, 1), (0, 1)))
    with pytest.raises(ValueError, match="merge 0 joins 0 and 256"):
        BytePairEncoding(((0, 256),))
