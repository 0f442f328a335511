"""Exact duplicates of documents and lines: found all, nothing else, the first stays, everything counted."""

from __future__ import annotations

import numpy as np
import pytest

from llmcourse.data.deduplication import (
    LineDeduplicator,
    LineSettings,
    SeenTexts,
    deduplicate_lines,
    first_occurrences,
    text_key,
)
from llmcourse.data.shingles import normalize
from llmcourse.data.tinytown import Town
from llmcourse.data.web_dump import web_dump

TEXTS = [
    "One town.",
    "Two towns.",
    "one  TOWN.",
    "Ren\u00e9",
    "Rene\u0301",
    "one\ntown.",
    "",
    " \n",
    "Two towns",
]


def test_first_occurrences_by_hand():
    assert first_occurrences(TEXTS).tolist() == [0, 1, 0, 3, 3, 0, 6, 6, 8]
    assert first_occurrences(iter([])).tolist() == []


def test_keys_are_128_bits_and_equal_only_for_equal_texts():
    words = [f"document {i}" for i in range(5000)]
    assert len({text_key(word) for word in words}) == 5000
    assert len(text_key("a")) == 16 and text_key("\ud800") != text_key("a")
    assert text_key("A  b") == text_key("a b") != text_key("ab")


def test_a_stream_gives_the_same_as_the_whole():
    seen = SeenTexts()
    new = [seen.is_new(text) for text in TEXTS]
    assert new == (first_occurrences(TEXTS) == np.arange(len(TEXTS))).tolist()
    assert (seen.n_seen, seen.n_duplicates) == (9, 4)


def test_agrees_with_comparing_the_texts_themselves():
    texts = [document.text for document in Town(0).documents(2000)] * 2
    firsts: dict[str, int] = {}
    assert first_occurrences(texts).tolist() == [
        firsts.setdefault(normalize(t), i) for i, t in enumerate(texts)
    ]


def test_every_exact_copy_of_the_dump_is_found():
    pages = list(web_dump(Town(0), 2000, seed=0))
    removed = first_occurrences(page.labels["text"] for page in pages) != np.arange(len(pages))
    exact = np.array([page.labels["duplicate"] == "exact" for page in pages])
    assert exact.sum() > 150 and removed[exact].all()
    # what else equals an earlier page: short texts written twice, copies of copies with the same edits, templates
    others = {pages[i].labels["kind"] for i in np.flatnonzero(removed & ~exact)}
    assert (removed & ~exact).sum() <= 0.02 * len(pages) and "story" not in others


@pytest.mark.parametrize("wrong", [None, 3, b"bytes"])
def test_what_is_no_text_is_refused(wrong):
    for call in (
        lambda: first_occurrences(["a", wrong]),
        lambda: SeenTexts().is_new(wrong),
        lambda: LineDeduplicator().count(wrong),
        lambda: LineDeduplicator().clean(wrong),
        lambda: deduplicate_lines([wrong]),
    ):
        with pytest.raises(ValueError, match=f"{type(wrong).__name__}, not text"):
            call()


# Lines --------------------------------------------------------------------------------------------------------


def test_lines_by_hand():
    texts = ["Menu\nfirst story\n\nMenu", "menu\nsecond story", "third\nMENU ", "second story\nfourth"]
    cleaned, counts = deduplicate_lines(texts, LineSettings(min_documents=3))
    # "menu" stands in three documents: its first occurrence stays, the second in the same document goes too
    assert cleaned == ["Menu\nfirst story\n", "second story", "third", "second story\nfourth"]
    assert (counts.n_lines, counts.n_dropped) == (9, 3)
    two, _ = deduplicate_lines(texts, LineSettings(min_documents=2))
    assert two == ["Menu\nfirst story\n", "second story", "third", "fourth"]
    one, _ = deduplicate_lines(["a\nb\na", "c"], LineSettings(min_documents=1))
    assert one == ["a\nb", "c"]


def test_a_line_twice_in_one_document_counts_once():
    cleaned, _ = deduplicate_lines(["a\na\na", "a", "b"], LineSettings(min_documents=3))
    assert cleaned == ["a\na\na", "a", "b"]


def test_documents_without_repeats_pass_unchanged():
    texts = ["  spaced \n\n\n line\n", "", "\n", "other"]
    cleaned, counts = deduplicate_lines(texts)
    assert cleaned == texts and counts.n_dropped == 0


def test_every_option_changes_the_result():
    texts = ["}\nshared line\nx", "}\nshared line\ny", "}\nshared line\nz"]
    assert deduplicate_lines(texts)[0] == ["}\nshared line\nx", "y", "z"]
    assert deduplicate_lines(texts, LineSettings(min_characters=2))[0][1] == "}\ny"
    assert deduplicate_lines(texts, LineSettings(min_documents=4))[0] == texts
    assert deduplicate_lines(texts, LineSettings(unit="paragraph"))[0] == texts
    blocks = ["shared\nblock\n\nx", "y\n\nshared\nblock", "shared\nblock"]
    assert deduplicate_lines(blocks, LineSettings(unit="paragraph"))[0] == ["shared\nblock\n\nx", "y", ""]


def test_kept_and_dropped_lines_add_up():
    texts = [page.labels["text"] for page in web_dump(Town(0), 300, seed=1)]
    deduplicator = LineDeduplicator(LineSettings(min_documents=2))
    for text in texts:
        deduplicator.count(text)
    lines = kept_lines = dropped_lines = 0
    for text in texts:
        kept, dropped = deduplicator.clean(text)
        lines += sum(bool(line.strip()) for line in text.split("\n"))
        kept_lines += sum(bool(line.strip()) for line in kept.split("\n"))
        dropped_lines += len(dropped)
    assert lines == kept_lines + dropped_lines == deduplicator.n_lines
    assert dropped_lines == deduplicator.n_dropped > 0


def test_uncounted_lines_are_an_error():
    with pytest.raises(ValueError, match="was not counted"):
        LineDeduplicator().clean("never seen")


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"min_documents": 0}, "min_documents=0"),
        ({"min_characters": 0}, "min_characters=0"),
        ({"unit": "word"}, "'word'"),
    ],
)
def test_settings_errors(wrong, message):
    with pytest.raises(ValueError, match=message):
        LineSettings(**wrong)
