"""Near-duplicates by MinHash (Broder 1997): a short signature whose agreement estimates the overlap of two texts.

Legend: M documents, N shingles of a chunk, P permutations, Q pairs.

For a random order of all shingles, the chance that two sets have the same smallest element is their Jaccard similarity
s. A signature holds the smallest values under P such orders; the fraction of equal values has mean s and variance
s (1 - s) / P.

The orders are the maps x -> (a x + b) mod 2^32 with a odd, on 32 mixed bits of each shingle's hash. Each is a true
permutation of the 2^32 values (a has an inverse), computed by one multiplication that wraps around. The family is close
to min-wise independent rather than exactly so; on well-mixed keys the difference is below what the tests, or Broder's
formula for the variance, can see. `datasketch` 2 calls it "affine32"; given the same a, b and keys the signatures are
equal to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmcourse.data import shingles
from llmcourse.data.lsh import candidate_pairs, clusters

_CACHED = (
    1 << 15
)  # shingles of a block: two arrays of 128 KiB that stay in the processor's second-level cache
_CHUNK = 1 << 18  # characters per chunk of documents
_VERIFY = ("none", "estimate", "exact")
_KEEP = ("first", "longest")


@dataclass(frozen=True, kw_only=True)
class MinHashSettings:
    """How near-duplicates are found. The defaults are FineWeb's: 14 bands of 8 rows, 5-word shingles.

    Raises:
        ValueError: a number is below 1, the threshold is outside [0, 1], or a name is unknown.
    """

    shingle_words: int = 5
    """Words of a shingle."""
    bands: int = 14
    """Bands of a signature: more find less similar pairs."""
    rows: int = 8
    """Values of a band: more spare less similar pairs."""
    seed: int = 0
    """Which permutations."""
    verify: str = "none"
    """What a candidate must pass: "none", or the threshold by "estimate" (signatures) or "exact" (shingle sets)."""
    threshold: float = 0.7
    """Jaccard similarity that verification asks for."""
    keep: str = "first"
    """Which document of a cluster stays: the "first", or the "longest" (in characters; the first of equals)."""

    def __post_init__(self) -> None:
        """Check every field."""
        for name in ("shingle_words", "bands", "rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: use 1 or more")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: use 0 or more")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold}: use a similarity from 0 to 1")
        if self.verify not in _VERIFY:
            raise ValueError(f"verify={self.verify!r}: choose one of {', '.join(_VERIFY)}")
        if self.keep not in _KEEP:
            raise ValueError(f"keep={self.keep!r}: choose one of {', '.join(_KEEP)}")

    @property
    def n_permutations(self) -> int:
        """Values of a signature, P = bands x rows."""
        return self.bands * self.rows


@dataclass(frozen=True, eq=False)
class NearDuplicates:
    """What was found in a corpus.

    Attributes:
        kept: (M,) int64 index of the document that stays for each document; its own where it stays itself.
        pairs: (Q, 2) int64 pairs that count as near-duplicates, smaller index first.
        n_candidates: pairs before verification.
    """

    kept: np.ndarray
    pairs: np.ndarray
    n_candidates: int

    @property
    def keep(self) -> np.ndarray:
        """(M,) bool: which documents stay, one of each cluster."""
        return self.kept == np.arange(len(self.kept))


def permutations(n_permutations: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw the permutations x -> (a x + b) mod 2^32.

    Returns:
        a, odd, and b: (P,) uint32 each.
    """
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 2**31, n_permutations, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    return a, rng.integers(0, 2**32, n_permutations, dtype=np.uint32)


def minhash(keys: np.ndarray, offsets: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Smallest value of (a x + b) mod 2^32 over the keys x of each document, for every a, b.

    Args:
        keys: (N,) uint32 keys of shingles, document after document.
        offsets: (M + 1,) int64; document i has `keys[offsets[i]:offsets[i + 1]]`, at least one.
        a: (P,) uint32, odd.
        b: (P,) uint32.

    Returns:
        (M, P) uint32 signatures.
    """
    signatures = np.empty((len(offsets) - 1, len(a)), np.uint32)
    first = 0
    while first < len(signatures):  # as many whole documents as stay in the cache, one at least
        last = max(first + 1, int(np.searchsorted(offsets, offsets[first] + _CACHED, "right")) - 1)
        block = keys[offsets[first] : offsets[last]]
        starts = offsets[first:last] - offsets[first]
        values = np.empty_like(block)
        smallest = np.empty((len(a), len(starts)), np.uint32)
        for row, factor, addend in zip(smallest, a, b, strict=True):
            np.multiply(block, factor, out=values)
            np.add(values, addend, out=values)
            np.minimum.reduceat(values, starts, out=row)
        signatures[first:last] = smallest.T
        first = last
    return signatures


def shingle_keys(texts: Sequence[str], size: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """32-bit keys of the shingles of texts, (N,) uint32, and their offsets, (M + 1,); see `shingle_hashes`."""
    hashes, offsets = shingles.shingle_hashes(texts, size)
    return (hashes >> np.uint64(32)).astype(np.uint32), offsets


def signatures(texts: Iterable[str], settings: MinHashSettings | None = None) -> np.ndarray:
    """Signatures of texts, read once and in chunks: memory beside the result does not grow with the corpus.

    Returns:
        (M, P) uint32.

    Raises:
        ValueError: a document is no string.
    """
    settings = settings or MinHashSettings()
    parts = list(_signature_chunks(texts, settings))
    return np.concatenate(parts) if parts else np.empty((0, settings.n_permutations), np.uint32)


def _signature_chunks(texts: Iterable[str], settings: MinHashSettings) -> Iterable[np.ndarray]:
    a, b = permutations(settings.n_permutations, settings.seed)
    for chunk in shingles.chunked(texts, _CHUNK):
        yield minhash(*shingle_keys(chunk, settings.shingle_words), a, b)


def write_signatures(
    texts: Iterable[str], path: str | Path, settings: MinHashSettings | None = None
) -> np.ndarray:
    """`signatures` on disk, for corpora whose signatures (448 bytes a document by default) do not fit in memory.

    The file appears under its name once it is complete.

    Returns:
        (M, P) uint32, memory-mapped for reading.

    Raises:
        ValueError: there are no documents, or one is no string.
    """
    settings, path = settings or MinHashSettings(), Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            for part in _signature_chunks(texts, settings):
                part.tofile(file)
        if not partial.stat().st_size:
            raise ValueError("the corpus holds no documents: there is nothing to write")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return np.memmap(path, np.uint32, "r").reshape(-1, settings.n_permutations)


def add_signatures(
    batch: dict[str, list[Any]], settings: MinHashSettings | None = None, column: str = "text"
) -> dict[str, Any]:
    """A column "signature" for `datasets.Dataset.map(add_signatures, batched=True)`, in any number of processes."""
    return {"signature": signatures(batch[column], settings)}


def estimate_jaccard(signatures: np.ndarray, pairs: np.ndarray, block: int = 8192) -> np.ndarray:
    """Fraction of equal values of two signatures: unbiased for s, with standard error sqrt(s (1 - s) / P).

    Args:
        signatures: (M, P) uint32.
        pairs: (Q, 2) int64.
        block: pairs compared at once: bounds the memory, changes nothing else.

    Returns:
        (Q,) float64 in [0, 1].
    """
    estimates = np.empty(len(pairs))
    for start in range(0, len(pairs), block):
        first, second = pairs[start : start + block].T
        estimates[start : start + block] = (signatures[first] == signatures[second]).mean(axis=1)
    return estimates


def near_duplicates(
    texts: Sequence[str], settings: MinHashSettings | None = None, signed: np.ndarray | None = None
) -> NearDuplicates:
    """Find the near-duplicates of a corpus: signatures, candidates, verification, clusters, one document kept of each.

    A cluster is a connected component: A stays with C if both are near B, however far they are from each other.

    Args:
        texts: M documents; if `signed` is given, read only for exact verification and to keep the longest.
        settings: see there.
        signed: (M, P) signatures made before with the same settings, in memory or memory-mapped.

    Raises:
        ValueError: a document is no string, or `signed` has another number of documents or permutations.
    """
    settings = settings or MinHashSettings()
    signed = signatures(texts, settings) if signed is None else signed
    if signed.shape != (len(texts), settings.n_permutations):
        raise ValueError(
            f"signatures of shape {signed.shape} for {len(texts)} documents and {settings.n_permutations}"
            " permutations: make them from the same texts with the same settings"
        )
    pairs = candidate_pairs(signed, settings.bands, settings.rows)
    n_candidates = len(pairs)
    if settings.verify == "estimate":
        pairs = pairs[estimate_jaccard(signed, pairs) >= settings.threshold]
    elif settings.verify == "exact":
        pairs = pairs[shingles.jaccard(texts, pairs, settings.shingle_words) >= settings.threshold]
    kept = clusters(pairs, len(texts))
    return NearDuplicates(_longest(texts, kept) if settings.keep == "longest" else kept, pairs, n_candidates)


def _longest(texts: Sequence[str], component: np.ndarray) -> np.ndarray:
    """Name each cluster by its longest document instead of its first."""
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    order = np.lexsort(
        (np.arange(len(texts)), -lengths, component)
    )  # by cluster, longest first, then earliest
    lead = np.ones(len(order), bool)
    lead[1:] = component[order][1:] != component[order][:-1]
    chosen = np.empty(len(texts), np.int64)
    chosen[component[order][lead]] = order[lead]
    return chosen[component]
