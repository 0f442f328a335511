"""Byte-level byte-pair encoding, written out to be read.

Byte-pair encoding, a compression scheme of 1994 that Sennrich, Haddow and Birch (2016, algorithm 1) turned to
subwords, starts from single symbols and repeatedly gives the most frequent pair of neighbors a symbol of its
own. Taking the 256 bytes as the first symbols (Radford et al., 2019, section 2.2) leaves no text without an
encoding.

The file holds the method twice: `train_bpe_naive` recounts everything after each merge and is the definition;
`train_bpe` recounts only the words that changed, and returns the same rules. The course trains and encodes
with `llmcourse.tokenization.tokenizer`; the tests show that both agree, id by id.

Legend: a *word* is a piece of text that no token crosses; an *id* names a token; a *pair* is two neighboring
ids. Ids are given out in this order: special tokens, 256 bytes, then one for each new token as it is learned.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import regex

Pair = tuple[int, int]

# How text is cut into words, alternatives tried in this order: an English clitic; letters with at most one
# leading character that is neither letter, digit nor newline (mostly the space before the word); ONE digit;
# symbols with an optional leading space and the newlines after them; newlines with the white space before
# them; white space except the last character, which goes with the next word; white space.
# One token a digit keeps a number's length and place values visible to the model; merged digits do not.
PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)
_PATTERN = regex.compile(PATTERN)


def check_text(text: object) -> None:
    """Refuse what has no UTF-8 form.

    Raises:
        ValueError: `text` is no `str`, or holds a lone surrogate (U+D800 to U+DFFF).
    """
    if not isinstance(text, str):
        raise ValueError(f"a text must be a str, got {type(text).__name__} {repr(text)[:40]}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text holds the lone surrogate U+{ord(text[error.start]):04X}, which is no character;"
            " read the file with errors='replace'"
        ) from None


def pretokenize(text: str) -> list[bytes]:
    r"""Cut text into words, as UTF-8; joined, they are the text again.

    >>> pretokenize("It's 42 cats.")
    [b'It', b"'s", b' ', b'4', b'2', b' cats', b'.']

    Raises:
        ValueError: as in `check_text`.
    """
    check_text(text)
    return [word.encode() for word in _PATTERN.findall(text)]


def byte_symbols() -> dict[int, str]:
    """Give each byte one visible character: the way byte-level vocabularies are written in JSON files.

    Printable Latin-1 bytes stand for themselves, the other 68 for the code points from 256 on, in order. The
    order of the dictionary is the order of the ids, since `tokenizers` sorts its alphabet by code point.

    >>> symbols = byte_symbols()
    >>> symbols[ord("a")], symbols[ord(" ")], symbols[ord("\\n")], len(symbols)
    ('a', 'Ġ', 'Ċ', 256)
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(256)) - set(printable))
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}


_BYTES_IN_ID_ORDER = tuple(byte_symbols())


@dataclass(frozen=True)
class BytePairEncoding:
    """A trained encoding: the merge rules in the order they were learned, and all that follows from them.

    Args:
        merges: pairs of ids; rule r joins its pair wherever no earlier rule applies.
        special_tokens: names of the ids 0, 1, ...; `encode` never produces them, `decode` writes their names.

    Raises:
        ValueError: a special token or a rule is given twice, or a rule uses an id that does not exist yet.

    The rules "a"+"b" and "ab"+"c" (the byte b has id `byte_ids[b]`):

    >>> a, b, c = (BytePairEncoding(()).byte_ids[byte] for byte in b"abc")
    >>> encoding = BytePairEncoding(((a, b), (256, c)))
    >>> encoding.encode("abcab"), encoding.vocabulary[256:]
    ([257, 256], (b'ab', b'abc'))
    """

    merges: tuple[Pair, ...]
    special_tokens: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(set(self.special_tokens)) < len(self.special_tokens):
            raise ValueError(f"special_tokens {self.special_tokens} names a token twice; give each once")
        if len(set(self.merges)) < len(self.merges):
            raise ValueError("merges holds a rule twice; keep the first of each")
        _ = self._tables  # building the tables checks that every rule refers to known ids

    @cached_property
    def byte_ids(self) -> dict[int, int]:
        """The id of each single byte."""
        return {byte: len(self.special_tokens) + n for n, byte in enumerate(_BYTES_IN_ID_ORDER)}

    @cached_property
    def _tables(self) -> tuple[tuple[bytes, ...], dict[Pair, tuple[int, int]]]:
        """Vocabulary (id to bytes) and rules (pair to rank, id of the joined token)."""
        vocabulary = [name.encode() for name in self.special_tokens]
        vocabulary += [bytes([byte]) for byte in _BYTES_IN_ID_ORDER]
        id_of = {vocabulary[i]: i for i in self.byte_ids.values()}
        rules: dict[Pair, tuple[int, int]] = {}
        for rank, (left, right) in enumerate(self.merges):
            if not len(self.special_tokens) <= min(left, right) <= max(left, right) < len(vocabulary):
                raise ValueError(f"merge {rank} joins {left} and {right}, not both byte tokens by then")
            joined = vocabulary[left] + vocabulary[right]
            if joined not in id_of:  # "abc" may be learned as "ab"+"c" and as "a"+"bc": one token, two rules
                id_of[joined] = len(vocabulary)
                vocabulary.append(joined)
            rules[left, right] = rank, id_of[joined]
        return tuple(vocabulary), rules

    @property
    def vocabulary(self) -> tuple[bytes, ...]:
        """The bytes of every token, by id; a special token has those of its name."""
        return self._tables[0]

    @property
    def vocab_size(self) -> int:
        """The number of ids: special tokens, 256 bytes, learned tokens."""
        return len(self.vocabulary)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; quadratic in the length of a word, linear in the number of words."""
        return [i for word in pretokenize(text) for i in self.encode_word(word)]

    def encode_word(self, word: bytes) -> list[int]:
        """Join pairs inside one word: always the earliest rule that applies, at its leftmost place."""
        rules, never = self._tables[1], (len(self.merges), -1)
        ids = [self.byte_ids[byte] for byte in word]
        while len(ids) > 1:
            (rank, joined), at = min((rules.get(pair, never), at) for at, pair in enumerate(pairwise(ids)))
            if rank == len(self.merges):
                break
            ids[at : at + 2] = [joined]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; bytes that are not valid UTF-8 (a cut character) become U+FFFD.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        ids, size = list(ids), self.vocab_size
        for i in ids:
            if not 0 <= i < size:
                raise ValueError(f"id {i} is not in 0 to {size - 1}; check the tokenizer")
        return b"".join(self.vocabulary[i] for i in ids).decode(errors="replace")


def count_pairs(words: dict[tuple[int, ...], int]) -> Counter[Pair]:
    """Count neighboring ids over words with their frequencies; overlapping pairs count each time they occur.

    >>> dict(count_pairs({(1, 2, 1, 2): 3, (1, 1, 1): 1}))
    {(1, 2): 6, (2, 1): 3, (1, 1): 2}
    """
    pairs: Counter[Pair] = Counter()
    for word, frequency in words.items():
        for pair in pairwise(word):
            pairs[pair] += frequency
    return pairs


def merge_pair(word: Sequence[int], pair: Pair, joined: int) -> tuple[int, ...]:
    """Replace a pair by its joined id, from left to right.

    >>> merge_pair((1, 2, 1, 1, 1), (1, 1), 9)
    (1, 2, 9, 1)
    """
    merged: list[int] = []
    at = 0
    while at < len(word):
        found = tuple(word[at : at + 2]) == pair
        merged.append(joined if found else word[at])
        at += 2 if found else 1
    return tuple(merged)


def train_bpe_naive(
    texts: Iterable[str], vocab_size: int, *, special_tokens: Sequence[str] = (), min_frequency: int = 2
) -> BytePairEncoding:
    """Learn an encoding the plain way: count all pairs, join the most frequent, start again.

    A tie goes to the smaller pair of ids, left id first, so that the result does not depend on the order of
    the texts. Learning ends at `vocab_size`, or earlier when no pair occurs `min_frequency` times.

    Args:
        texts: the corpus; each text is cut by `pretokenize`.
        vocab_size: number of ids wanted, special tokens and the 256 bytes included.
        special_tokens: names of the first ids.
        min_frequency: a pair seen less often is not worth an id.

    Raises:
        ValueError: `vocab_size` has no room for the bytes, `min_frequency` is not positive, or the corpus is
            empty.

    >>> encoding = train_bpe_naive(["low lower lowest"], 260)
    >>> encoding.vocabulary[256:], encoding.encode("slow")
    ((b'lo', b'low', b' low', b' lowe'), [82, 257])
    """
    words = _initial_words(texts, vocab_size, special_tokens, min_frequency)
    merges: dict[Pair, None] = {}  # ordered; a rule that is needed again is in force already
    encoding = BytePairEncoding((), tuple(special_tokens))
    while encoding.vocab_size < vocab_size:
        pairs = count_pairs(words)
        if not pairs or max(pairs.values()) < min_frequency:
            break
        pair = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges[pair] = None
        encoding = BytePairEncoding(tuple(merges), tuple(special_tokens))
        joined = encoding._tables[1][pair][1]
        words = {merge_pair(word, pair, joined): frequency for word, frequency in words.items()}
    return encoding


def train_bpe(
    texts: Iterable[str], vocab_size: int, *, special_tokens: Sequence[str] = (), min_frequency: int = 2
) -> BytePairEncoding:
    """Learn the encoding of `train_bpe_naive`, recounting only the words that a merge touches.

    An index from pairs to the words that may hold them says which words to rewrite; a heap holds (-count,
    pair), so its top is the most frequent pair and the smallest among equals. Counts change while their old
    entries are still in the heap: an entry is believed only if its count is the present one, any other is
    dropped, and each change pushes a fresh entry. Arguments and errors are those of `train_bpe_naive`.
    """
    corpus = _initial_words(texts, vocab_size, special_tokens, min_frequency)
    words, frequencies = list(corpus), list(corpus.values())
    counts = count_pairs(corpus)
    places: defaultdict[Pair, set[int]] = defaultdict(set)
    for n, word in enumerate(words):
        for pair in pairwise(word):
            places[pair].add(n)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)

    base = BytePairEncoding((), tuple(special_tokens))
    vocabulary = list(base.vocabulary)
    id_of = {vocabulary[i]: i for i in base.byte_ids.values()}
    merges: dict[Pair, None] = {}
    while heap and len(vocabulary) < vocab_size:
        count, pair = heapq.heappop(heap)
        if -count != counts[pair]:
            continue
        if -count < min_frequency:
            break
        merges[pair] = None
        token = vocabulary[pair[0]] + vocabulary[pair[1]]
        if token not in id_of:
            id_of[token] = len(vocabulary)
            vocabulary.append(token)
        changed: Counter[Pair] = Counter()
        for n in places.pop(pair):
            before, words[n] = words[n], merge_pair(words[n], pair, id_of[token])
            for old in pairwise(before):
                changed[old] -= frequencies[n]
            for new in pairwise(words[n]):
                changed[new] += frequencies[n]
                places[new].add(n)
        for other, change in changed.items():
            if change:
                counts[other] += change
                heapq.heappush(heap, (-counts[other], other))
    return BytePairEncoding(tuple(merges), tuple(special_tokens))


def _initial_words(
    texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str], min_frequency: int
) -> dict[tuple[int, ...], int]:
    """Count the words of a corpus, each as a tuple of byte ids."""
    base = BytePairEncoding((), tuple(special_tokens))
    if vocab_size < base.vocab_size:
        raise ValueError(
            f"vocab_size {vocab_size} has no room for {len(special_tokens)} special tokens and 256 bytes;"
            f" ask for at least {base.vocab_size}"
        )
    if min_frequency < 1:
        raise ValueError(f"min_frequency is {min_frequency}; it must be at least 1")
    frequencies = Counter(word for text in texts for word in pretokenize(text))
    if not frequencies:
        raise ValueError("the corpus holds no text; give at least one text that is not empty")
    return {tuple(base.byte_ids[byte] for byte in word): count for word, count in frequencies.items()}
