"""Measurements of a text that quality filters put thresholds on, one function each.

Every function takes a `ParsedText`, which splits the text once, and returns a number; none of them decides. The
thresholds, with their presets, are in `llmcourse.data.filtering`. Sources: Gopher (Rae et al., 2021, section A.1.1
and table A1), C4 (Raffel et al., 2020, section 2.2), FineWeb (Penedo et al., 2024, section 3.6).

A word is what stands between white space. The published pipelines use a tokenizer of words that also separates
punctuation, so that their counts of words are somewhat higher; Gopher does not say how it counts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
"""the eight words that Gopher looks for"""
TERMINAL_PUNCTUATION = (".", "?", "!", '"', "'", "”", "’", "…", "。", "？", "！")
"""how a sentence may end, closing quotation marks included"""
_BULLETS = ("•", "-")
_ELLIPSES = ("...", "…")
_PARAGRAPH_BREAK = re.compile(r"\n\s*\n")
_SENTENCE_ENDS = (".", "?", "!", "…")
_CLOSING = "\"'”’)]"


class ParsedText:
    """A text with its words, lines and paragraphs, each split when first asked for.

    Attributes:
        text: the text.
    """

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def words(self) -> list[str]:
        """What stands between white space."""
        return self.text.split()

    @cached_property
    def lines(self) -> list[str]:
        """Lines that hold something, without the white space around them."""
        return [stripped for line in self.text.split("\n") if (stripped := line.strip())]

    @cached_property
    def paragraphs(self) -> list[str]:
        """Parts between blank lines."""
        return [stripped for part in _PARAGRAPH_BREAK.split(self.text) if (stripped := part.strip())]

    @cached_property
    def n_sentences(self) -> int:
        """Sentences of all lines; see `count_sentences`."""
        return sum(map(count_sentences, self.lines))

    @cached_property
    def duplicate_ngram_characters(self) -> dict[int, float]:
        """For n from 5 to 10, the fraction of the text's characters in repeated n-grams of words.

        A repetition counts from its second occurrence on, and no character twice: after a repeated n-gram the
        search goes on behind it. A repeated n-gram holds a repeated (n-1)-gram, so the first n without any ends
        the work: for most good texts that is n = 5.
        """
        fractions = dict.fromkeys(range(5, 11), 0.0)
        for n in fractions:
            fractions[n] = _ratio(_repeated_characters(self.words, n), len(self.text))
            if not fractions[n]:
                break
        return fractions


def _ratio(part: float, whole: float) -> float:
    """part / whole, or 0 for an empty text, which holds nothing of what is counted."""
    return part / whole if whole else 0.0


# Size and words: Gopher ---------------------------------------------------------------------------------------


def word_count(parsed: ParsedText) -> float:
    """Number of words that are not mere punctuation."""
    return float(sum(map(_is_word, parsed.words)))


def mean_word_length(parsed: ParsedText) -> float:
    """Mean number of characters of the words that are not mere punctuation."""
    lengths = [len(word) for word in parsed.words if _is_word(word)]
    return _ratio(sum(lengths), len(lengths))


def hash_ratio(parsed: ParsedText) -> float:
    """Number signs (#) per word."""
    return _ratio(parsed.text.count("#"), len(parsed.words))


def ellipsis_ratio(parsed: ParsedText) -> float:
    """Ellipses, written as three dots or as one character, per word."""
    return _ratio(sum(map(parsed.text.count, _ELLIPSES)), len(parsed.words))


def bullet_lines(parsed: ParsedText) -> float:
    """Fraction of lines that start with a bullet or a hyphen."""
    return _ratio(sum(line.startswith(_BULLETS) for line in parsed.lines), len(parsed.lines))


def ellipsis_lines(parsed: ParsedText) -> float:
    """Fraction of lines that end with an ellipsis."""
    return _ratio(sum(line.endswith(_ELLIPSES) for line in parsed.lines), len(parsed.lines))


def alphabetic_words(parsed: ParsedText) -> float:
    """Fraction of words with at least one letter."""
    return _ratio(sum(any(map(str.isalpha, word)) for word in parsed.words), len(parsed.words))


def stop_words(parsed: ParsedText) -> float:
    """How many different ones of the eight `STOP_WORDS` occur, in lower case, as Gopher's rule has it."""
    return float(len(STOP_WORDS.intersection(parsed.words)))


# Repetition: Gopher, table A1 ---------------------------------------------------------------------------------


def duplicate_lines(parsed: ParsedText) -> float:
    """Fraction of lines that repeat an earlier one."""
    return _ratio(_duplicates(parsed.lines)[0], len(parsed.lines))


def duplicate_paragraphs(parsed: ParsedText) -> float:
    """Fraction of paragraphs that repeat an earlier one."""
    return _ratio(_duplicates(parsed.paragraphs)[0], len(parsed.paragraphs))


def duplicate_line_characters(parsed: ParsedText) -> float:
    """Fraction of the text's characters in lines that repeat an earlier one."""
    return _ratio(_duplicates(parsed.lines)[1], len(parsed.text))


def duplicate_paragraph_characters(parsed: ParsedText) -> float:
    """Fraction of the text's characters in paragraphs that repeat an earlier one."""
    return _ratio(_duplicates(parsed.paragraphs)[1], len(parsed.text))


def top_ngram_characters(parsed: ParsedText, n: int) -> float:
    """Fraction of the text's characters in the most frequent n-gram of words, all its occurrences together.

    0 if no n-gram occurs twice: otherwise a text of five words would be reproached with "repeating" two of them.
    Among equally frequent n-grams the first counts. Overlapping occurrences count in full.
    """
    counts = Counter(_ngrams(parsed.words, n))
    if not counts:
        return 0.0
    ngram = max(counts, key=counts.__getitem__)
    if counts[ngram] < 2:
        return 0.0
    return _ratio(counts[ngram] * (sum(map(len, ngram)) + n - 1), len(parsed.text))


def duplicate_ngram_characters(parsed: ParsedText, n: int) -> float:
    """Fraction of the text's characters in n-grams of words that occurred before; n from 5 to 10."""
    return parsed.duplicate_ngram_characters[n]


# Lines and sentences: C4, FineWeb -----------------------------------------------------------------------------


def sentence_count(parsed: ParsedText) -> float:
    """Number of sentences, see `count_sentences`."""
    return float(parsed.n_sentences)


def lorem_ipsum(parsed: ParsedText) -> float:
    """How often the printers' filler text "lorem ipsum" occurs, in any case."""
    return float(parsed.text.lower().count("lorem ipsum"))


def curly_brackets(parsed: ParsedText) -> float:
    """Number of opening curly brackets: common in code, rare in prose."""
    return float(parsed.text.count("{"))


def punctuated_lines(parsed: ParsedText) -> float:
    """Fraction of lines that end like a sentence."""
    return _ratio(sum(line.endswith(TERMINAL_PUNCTUATION) for line in parsed.lines), len(parsed.lines))


def short_lines(parsed: ParsedText, characters: int = 30) -> float:
    """Fraction of lines with at most that many characters."""
    return _ratio(sum(len(line) <= characters for line in parsed.lines), len(parsed.lines))


def line_breaks(parsed: ParsedText) -> float:
    """Line breaks per word: high for lists."""
    return _ratio(parsed.text.count("\n"), len(parsed.words))


# Counting -----------------------------------------------------------------------------------------------------


def count_sentences(line: str) -> int:
    """Number of sentences in a line: words up to one that ends in . ? ! or …, or up to the end of the line.

    Closing quotation marks may follow the sign, and a stretch without a letter or digit is no sentence. A plain
    splitter: "e.g. this" is taken for an end. C4 used NLTK's trained one.
    """
    sentences, said = 0, False
    for word in line.split():
        said = said or _is_word(word)
        if said and word.rstrip(_CLOSING).endswith(_SENTENCE_ENDS):
            sentences, said = sentences + 1, False
    return sentences + said


def _is_word(word: str) -> bool:
    """Whether anything in it is a letter or a digit."""
    return word.isalnum() or any(map(str.isalnum, word))


def _duplicates(parts: Iterable[str]) -> tuple[int, int]:
    """How many parts repeat an earlier one, and their characters."""
    seen: set[str] = set()
    number = characters = 0
    for part in parts:
        if part in seen:
            number += 1
            characters += len(part)
        else:
            seen.add(part)
    return number, characters


def _ngrams(words: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[i:] for i in range(n)), strict=False)


def _repeated_characters(words: Sequence[str], n: int) -> int:
    """Characters, spaces not counted, of non-overlapping n-grams that occurred before."""
    ngrams = list(_ngrams(words, n))
    if len(set(ngrams)) == len(ngrams):
        return 0
    seen: set[tuple[str, ...]] = set()
    position = characters = 0
    while position < len(ngrams):
        ngram = ngrams[position]
        if ngram in seen:
            characters += sum(map(len, ngram))
            position += n
        else:
            seen.add(ngram)
            position += 1
    return characters
