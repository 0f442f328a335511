"""Texts as sets of hashed word n-grams ("shingles", Broder 1997), and the exact similarity of such sets.

Legend: M documents, N shingles of all of them, Q pairs, K words of a shingle.

A word becomes a 64-bit hash (BLAKE2b), computed once for each distinct word; a shingle's hash is a polynomial in the
hashes of its words, evaluated for all windows of many documents at once in NumPy, so that Python touches words only.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain

import numpy as np

# Knuth's MMIX multiplier (TAOCP vol. 2, table 3.3.4-1) is odd, so no word's hash loses bits by its place.
_MULTIPLIER = np.uint64(6364136223846793005)
# 64-bit finalizer of MurmurHash3 (Appleby 2011): each input bit changes about half of the output bits.
_MIX = (np.uint64(33), np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53))
_VOCABULARY = 1 << 18  # distinct words whose hashes are remembered: some 50 MB at most


def check_text(text: object) -> None:
    """Refuse what is no text.

    Raises:
        ValueError: `text` is no string.
    """
    if not isinstance(text, str):
        kind = type(text).__name__
        raise ValueError(f"a document is {kind}, not text: filter the corpus or name its text column")


def normalize(text: str) -> str:
    """The text as deduplication compares it: Unicode NFC, lower case, runs of white space as one space.

    Punctuation and digits stay. FineWeb (Penedo et al. 2024) also strips punctuation and accents and turns every number
    into 0, which would make "62 + 11 = 73" and "62 - 11 = 51" the same document.
    """
    return " ".join(words(text))


def words(text: str) -> list[str]:
    """Words of the normalized text: what stands between white space, lower case, in NFC.

    Raises:
        ValueError: `text` is no string.
    """
    check_text(text)
    if not text.isascii():  # ASCII is in NFC already
        text = unicodedata.normalize("NFC", text)
    return text.lower().split()


@lru_cache(_VOCABULARY)
def word_hash(word: str) -> int:
    """64 bits of BLAKE2b of a word: the same on every machine and in every process, unlike Python's `hash`.

    The empty word, which pads short documents, is 0.
    """
    digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") if word else 0


def hash_words(split: Sequence[list[str]], padding: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Hash the words of many texts.

    Args:
        split: words of M documents.
        padding: zeros that follow each document, so that windows of words can look past its end.

    Returns:
        (L,) uint64 hashes of all words, document after document with its padding, and (M,) int64 words of each
        document without padding.
    """
    counts = np.fromiter(map(len, split), np.int64, len(split))
    pad = [""] * padding
    flat = chain.from_iterable(chain.from_iterable((part, pad) for part in split))
    total = int(counts.sum()) + padding * len(split)
    return np.fromiter(map(word_hash, flat), np.uint64, total), counts


def windows(hashes: np.ndarray, size: int) -> np.ndarray:
    """Hash every run of `size` neighbors: the polynomial sum of w_i m^(size-1-i) mod 2^64, then a bit mixer.

    Args:
        hashes: (L,) uint64 hashes of words.
        size: words of a window.

    Returns:
        (L - size + 1,) uint64. Two different windows collide with a probability of about 2^-62.
    """
    length = max(0, len(hashes) - size + 1)
    return combine([hashes[place : place + length] for place in range(size)])


def combine(columns: Sequence[np.ndarray]) -> np.ndarray:
    """One well-mixed hash for each row of the columns: (L,) uint64 from any number of (L,) unsigned columns."""
    mixed = columns[0].astype(np.uint64)
    for column in columns[1:]:
        mixed *= _MULTIPLIER
        mixed += column
    shift, first, second = _MIX
    for factor in (first, second):
        mixed ^= mixed >> shift
        mixed *= factor
    mixed ^= mixed >> shift
    return mixed


def shingle_hashes(texts: Sequence[str], size: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Hash the shingles of many texts.

    Args:
        texts: M documents.
        size: words of a shingle, K; a document with fewer is one shingle by itself, an empty one too.

    Returns:
        (N,) uint64 hashes in order of the text, repetitions kept, and (M + 1,) int64 offsets: document i is
        `hashes[offsets[i]:offsets[i + 1]]`, never empty.

    Raises:
        ValueError: `size` is below 1, or a document is no string.
    """
    if size < 1:
        raise ValueError(f"size={size}: a shingle has 1 word or more")
    hashes, counts = hash_words([words(text) or [""] for text in texts], padding=size - 1)
    numbers = np.maximum(counts - size + 1, 1)
    padded = counts + size - 1
    # window starts that lie in the padding belong to no shingle
    place = np.arange(len(hashes)) - np.repeat(np.cumsum(padded) - padded, padded)
    valid = (place < np.repeat(numbers, padded))[: max(0, len(hashes) - size + 1)]
    return windows(hashes, size)[valid], np.concatenate([[0], np.cumsum(numbers)])


def chunked(texts: Iterable[str], characters: int) -> Iterator[list[str]]:
    """Lists of texts, each the shortest that has so many characters, so that memory does not grow with the corpus.

    Raises:
        ValueError: a text is no string.
    """
    chunk: list[str] = []
    size = 0
    for text in texts:
        check_text(text)
        chunk.append(text)
        size += len(text)
        if size >= characters:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def jaccard(texts: Sequence[str], pairs: np.ndarray, size: int = 5, block: int = 4096) -> np.ndarray:
    """Exact Jaccard similarity |A and B| / |A or B| of the shingle sets of pairs of documents (Broder 1997).

    Args:
        texts: M documents.
        pairs: (Q, 2) int64 indices into `texts`.
        size: words of a shingle.
        block: pairs compared at once: bounds the memory, changes nothing else.

    Returns:
        (Q,) float64 in [0, 1].

    Raises:
        ValueError: `pairs` is not (Q, 2), or names a document that is not there.
    """
    pairs = np.asarray(pairs, np.int64)
    if (
        pairs.ndim != 2
        or pairs.shape[1] != 2
        or (pairs.size and not 0 <= pairs.min() <= pairs.max() < len(texts))
    ):
        raise ValueError(f"pairs of shape {pairs.shape}: give (Q, 2) indices from 0 to {len(texts) - 1}")
    parts = [_jaccard_block(texts, pairs[i : i + block], size) for i in range(0, len(pairs), block)]
    return np.concatenate(parts) if parts else np.empty(0)


def _jaccard_block(texts: Sequence[str], pairs: np.ndarray, size: int) -> np.ndarray:
    """Similarity of a few pairs: mark each document's distinct shingles with the pair, sort, count the neighbors."""
    used, local = np.unique(pairs, return_inverse=True)
    hashes, offsets = shingle_hashes([texts[i] for i in used], size)
    names, identity = np.unique(hashes, return_inverse=True)
    document = np.repeat(np.arange(len(used)), np.diff(offsets))
    distinct = np.unique(document * len(names) + identity)  # sorted by document
    sizes = np.bincount(distinct // len(names), minlength=len(used))
    starts = np.cumsum(sizes) - sizes
    members = local.reshape(-1)  # documents of the pairs: first, second, first, ...
    counts = sizes[members]
    places = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    taken = distinct[np.repeat(starts[members], counts) + places] % len(names)
    marked = np.sort(np.repeat(np.arange(len(members)) // 2, counts) * len(names) + taken)
    shared = np.bincount(marked[1:][marked[1:] == marked[:-1]] // len(names), minlength=len(pairs))
    return shared / (sizes[local.reshape(-1, 2)].sum(axis=1) - shared)
