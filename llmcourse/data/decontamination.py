"""Decontamination: training documents that hold what the evaluation asks, found by shared word n-grams.

GPT-3 (Brown et al. 2020, appendix C) compares n-grams of normalized words with n = 13, or less for a test set of short
items. Here the length follows each item: n = min(13, words of the item). A short item is therefore found only as a
whole, prompt with answer, and an item of fewer than `min_words` words is refused: anything would match it. An n-gram
sees copies. It does not see the same fact in other words, a translation, or other names for the same numbers.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from llmcourse.data.shingles import check_text, hash_words, windows

# Words and numbers, and the signs that change what a sum says; other punctuation and white space is ignored.
_WORD = re.compile(r"\w+|[+\-*/=<>%]")
_BATCH = 256  # documents hashed at once
_PADDING = 1  # a zero between two documents: no window that crosses it can be an item's


@dataclass(frozen=True, kw_only=True)
class ContaminationSettings:
    """What counts as contamination.

    Raises:
        ValueError: a number is out of range.
    """

    n: int = 13
    """Words of an n-gram; an item with fewer is matched as a whole."""
    min_words: int = 4
    """Shortest item that can be looked for, in words and signs."""
    max_documents: int | None = None
    """Ignore n-grams found in more documents than this, as common phrases (GPT-3: 10); None ignores none."""

    def __post_init__(self) -> None:
        """Check every field."""
        if self.min_words < 1:
            raise ValueError(f"min_words={self.min_words}: use 1 or more")
        if self.n < self.min_words:
            raise ValueError(f"n={self.n}: use at least min_words, {self.min_words}")
        if self.max_documents is not None and self.max_documents < 1:
            raise ValueError(f"max_documents={self.max_documents}: use 1 or more, or None for no limit")


@dataclass(frozen=True)
class Contamination:
    """A place in a document that repeats a part of an evaluation item."""

    document: int
    """Index of the document."""
    item: int
    """Index of the item; if several share the n-gram, the first."""
    ngram: str
    """What they share: normalized words, separated by spaces."""
    start: int
    """First character of it in the document."""
    end: int
    """Character after its last."""


def ngram_words(text: str) -> list[str]:
    """Words as n-grams compare them: lower case, digits kept, punctuation dropped but for the signs of a sum.

    Raises:
        ValueError: `text` is no string.
    """
    check_text(text)
    return _WORD.findall(text.lower())


class Decontaminator:
    """Looks for the n-grams of evaluation items in documents.

    Args:
        items: evaluation items as they would stand in a document, prompt and answer together.
        settings: what counts.

    Raises:
        ValueError: there are no items, or an item is shorter than `settings.min_words`.
    """

    def __init__(self, items: Sequence[str], settings: ContaminationSettings | None = None) -> None:
        self.settings = settings or ContaminationSettings()
        if not items:
            raise ValueError("items is empty: give the evaluation items to look for")
        self._grams: dict[tuple[str, ...], int] = {}
        for index, item in enumerate(items):
            words = ngram_words(item)
            if len(words) < self.settings.min_words:
                raise ValueError(
                    f"item {index}, {item[:40]!r}, has {len(words)} words; a match would mean nothing below"
                    f" min_words={self.settings.min_words}: join prompt and answer, or leave it out"
                )
            for gram in _grams(words, min(self.settings.n, len(words))):
                self._grams.setdefault(gram, index)
        self._hashes = _hash_by_length(self._grams)

    def find(self, texts: Iterable[str]) -> list[Contamination]:
        """Every place where a document repeats an n-gram of an item, by document and then by place.

        Documents are read once, in batches; n-grams in more than `max_documents` documents are left out at the end.

        Raises:
            ValueError: a document is no string.
        """
        stream, found, offset = iter(texts), [], 0
        while batch := list(islice(stream, _BATCH)):
            split = [ngram_words(text) for text in batch]
            for index in self._suspects(split):
                found.extend(self._places(offset + index, batch[index], split[index]))
            offset += len(batch)
        return self._without_common(found)

    def _suspects(self, split: list[list[str]]) -> list[int]:
        """Documents of a batch that hold a hash of an item's n-gram; all lengths at once, in arrays."""
        hashes, counts = hash_words(split, _PADDING)
        document = np.repeat(np.arange(len(split)), counts + _PADDING)
        hit = [
            document[: max(0, len(hashes) - n + 1)][np.isin(windows(hashes, n), wanted)]
            for n, wanted in self._hashes.items()
        ]
        return np.unique(np.concatenate(hit)).tolist()

    def _places(self, document: int, text: str, words: list[str]) -> Iterator[Contamination]:
        """Compare the words themselves, so that two n-grams with one hash make no false alarm."""
        spans = [match.span() for match in _WORD.finditer(text.lower())]
        if len(text.lower()) != len(text):  # a few letters, such as the Turkish dotted I, grow in lower case
            spans = _original_spans(text)
        found = [
            Contamination(document, self._grams[gram], " ".join(gram), spans[i][0], spans[i + n - 1][1])
            for n in self._hashes
            for i, gram in enumerate(_grams(words, n))
            if gram in self._grams
        ]
        yield from sorted(found, key=lambda one: (one.start, one.end))

    def _without_common(self, found: list[Contamination]) -> list[Contamination]:
        if self.settings.max_documents is None:
            return found
        documents: dict[str, set[int]] = defaultdict(set)
        for one in found:
            documents[one.ngram].add(one.document)
        return [one for one in found if len(documents[one.ngram]) <= self.settings.max_documents]


def _grams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def _hash_by_length(grams: Iterable[tuple[str, ...]]) -> dict[int, np.ndarray]:
    """Sorted hashes of n-grams, by n."""
    lengths: dict[int, list[list[str]]] = defaultdict(list)
    for gram in grams:
        lengths[len(gram)].append(list(gram))
    return {n: np.unique(windows(hash_words(some)[0], n)[::n]) for n, some in sorted(lengths.items())}


def _original_spans(text: str) -> list[tuple[int, int]]:
    """Places of the lower-case text's words in the text itself, by the character that each came from."""
    origin = [i for i, letter in enumerate(text) for _ in letter.lower()]
    return [(origin[match.start()], origin[match.end() - 1] + 1) for match in _WORD.finditer(text.lower())]


def cut(text: str, found: Iterable[Contamination], margin: int = 0, min_characters: int = 1) -> list[str]:
    """What is left of a document without its contaminated places, as GPT-3 cut its training text.

    Args:
        text: the document.
        found: its contaminations; those of other documents must be left out.
        margin: characters to remove on either side as well (GPT-3: 200), widened to whole words.
        min_characters: drop pieces shorter than this (GPT-3: 200).

    Returns:
        The pieces in order, stripped of white space; none if nothing is left.

    Raises:
        ValueError: `margin` is negative, or a place lies outside the text.
    """
    if margin < 0:
        raise ValueError(f"margin={margin}: use 0 or more")
    pieces, position = [], 0
    for one in sorted(found, key=lambda one: one.start):
        if one.end > len(text):
            raise ValueError(
                f"a place ends at {one.end}, the text at {len(text)}: pass this document's own places"
            )
        start, end = _whole_words(text, one.start - margin, one.end + margin)
        if start > position:
            pieces.append(text[position:start].strip())
        position = max(position, end)
    pieces.append(text[position:].strip())
    return [piece for piece in pieces if len(piece) >= max(1, min_characters)]


def _whole_words(text: str, start: int, end: int) -> tuple[int, int]:
    start, end = max(0, start), min(len(text), end)
    while start > 0 and not text[start - 1].isspace() and not text[start].isspace():
        start -= 1
    while end < len(text) and not text[end].isspace() and not text[end - 1].isspace():
        end += 1
    return start, end
