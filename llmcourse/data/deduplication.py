"""Exact duplicates: whole documents, and lines or paragraphs that many documents share, by hashes of their text.

Texts are compared after `shingles.normalize` (NFC, lower case, white space), as BLAKE2b hashes of 128 bits: among n
texts two different ones share a hash with probability below n^2 / 2^129, 1.5e-21 for a billion. A set keeps 16 bytes of
hash a text and Python's bookkeeping around them, some 90 bytes together, whatever the text's length; documents pass by
one at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from llmcourse.data.shingles import check_text, normalize

_UNITS = {"line": "\n", "paragraph": "\n\n"}


def text_key(text: str) -> bytes:
    """16 bytes that are equal for texts equal up to Unicode form, case and white space, and else different.

    Raises:
        ValueError: `text` is no string.
    """
    return _key(normalize(text))


def _key(normalized: str) -> bytes:
    return hashlib.blake2b(normalized.encode("utf-8", "surrogatepass"), digest_size=16).digest()


class SeenTexts:
    """Remembers the texts that passed, as hashes: a filter for streams that keeps the first of equal documents.

    Attributes:
        n_seen: documents that passed.
        n_duplicates: those that repeat an earlier one.
    """

    def __init__(self) -> None:
        """Start with nothing seen."""
        self._keys: set[bytes] = set()
        self.n_seen = self.n_duplicates = 0

    def is_new(self, text: str) -> bool:
        """Whether the text is the first of its kind; it counts as seen from now on.

        Raises:
            ValueError: `text` is no string.
        """
        key = text_key(text)
        new = key not in self._keys
        self._keys.add(key)
        self.n_seen += 1
        self.n_duplicates += not new
        return new


def first_occurrences(texts: Iterable[str]) -> np.ndarray:
    """For each text the index of the first that equals it after normalization; its own index if it is the first.

    Returns:
        (M,) int64; `result == np.arange(M)` says which documents to keep.

    Raises:
        ValueError: a text is no string.
    """
    firsts: dict[bytes, int] = {}
    return np.fromiter((firsts.setdefault(text_key(text), i) for i, text in enumerate(texts)), np.int64)


@dataclass(frozen=True, kw_only=True)
class LineSettings:
    """Which lines are boilerplate.

    Raises:
        ValueError: a number is below 1 or the unit is unknown.
    """

    min_documents: int = 3
    """A line goes when it stands in at least this many documents; its first occurrence stays."""
    min_characters: int = 1
    """Shorter lines (normalized) always stay: closing braces and headings repeat for good reasons."""
    unit: str = "line"
    """What is compared: a "line", or a "paragraph" (what blank lines separate)."""

    def __post_init__(self) -> None:
        """Check every field."""
        for name in ("min_documents", "min_characters"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: use 1 or more")
        if self.unit not in _UNITS:
            raise ValueError(f"unit={self.unit!r}: choose one of {', '.join(_UNITS)}")


@dataclass
class LineDeduplicator:
    """Drops lines that many documents share, in two passes over the corpus: `count` every text, then `clean` every
    text.

    Both passes see one document at a time. Blank lines are neither counted nor dropped.

    Attributes:
        settings: which lines go.
        n_lines: lines that `clean` has looked at.
        n_dropped: lines that it has dropped.
    """

    settings: LineSettings = field(default_factory=LineSettings)
    n_lines: int = 0
    n_dropped: int = 0
    _documents: dict[bytes, int] = field(default_factory=dict, repr=False)
    _kept: set[bytes] = field(default_factory=set, repr=False)

    def count(self, text: str) -> None:
        """First pass: count each distinct line of a document once."""
        for key in {key for _, key in self._parts(text) if key}:
            self._documents[key] = self._documents.get(key, 0) + 1

    def clean(self, text: str) -> tuple[str, list[str]]:
        """Second pass: the document without its repeated lines, and the lines that went.

        A line that `min_documents` documents share stays where it comes first and goes everywhere after, in the
        same document too.

        Raises:
            ValueError: the document holds a line that was not counted.
        """
        kept, dropped = [], []
        for part, key in self._parts(text):
            if not key:
                kept.append(part)
                continue
            self.n_lines += 1
            if self._repeats(key, part):
                dropped.append(part)
            else:
                kept.append(part)
        self.n_dropped += len(dropped)
        return (_UNITS[self.settings.unit].join(kept) if dropped else text), dropped

    def _repeats(self, key: bytes, part: str) -> bool:
        """Whether this frequent line came before; from now on it has."""
        if key not in self._documents:
            raise ValueError(f"line {part[:40]!r} was not counted: pass every document to count() first")
        if self._documents[key] < self.settings.min_documents:
            return False
        came = key in self._kept
        self._kept.add(key)
        return came

    def _parts(self, text: str) -> Iterator[tuple[str, bytes]]:
        """Lines and their keys; no key for what is blank or too short to judge."""
        check_text(text)
        for part in text.split(_UNITS[self.settings.unit]):
            plain = normalize(part)
            yield part, _key(plain) if len(plain) >= self.settings.min_characters else b""


def deduplicate_lines(
    texts: Sequence[str], settings: LineSettings | None = None
) -> tuple[list[str], LineDeduplicator]:
    """Both passes over a corpus in memory: the cleaned texts in order, and the deduplicator with its counts.

    Raises:
        ValueError: a text is no string.
    """
    deduplicator = LineDeduplicator(settings or LineSettings())
    for text in texts:
        deduplicator.count(text)
    return [deduplicator.clean(text)[0] for text in texts], deduplicator
