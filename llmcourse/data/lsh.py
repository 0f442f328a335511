"""Locality-sensitive hashing: the few pairs of signatures worth comparing, out of all, and the clusters they form.

Legend: M documents, P permutations, b bands, r rows of a band (b r <= P), Q pairs.

A signature is cut into b bands of r values. Two documents are candidates if some band agrees in all its rows, which for
similarity s happens with probability 1 - (1 - s^r)^b, an S-shaped curve that is steepest near (1/b)^(1/r) (Leskovec,
Rajaraman and Ullman 2014, section 3.4).
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np

from llmcourse.data.shingles import combine

T = TypeVar("T", float, np.ndarray)


def probability(similarity: T, bands: int, rows: int) -> T:
    """Chance that two documents of this Jaccard similarity become candidates: 1 - (1 - s^r)^b."""
    return 1 - (1 - similarity**rows) ** bands


def choose_bands(
    n_permutations: int, threshold: float, fp_weight: float = 0.5, fn_weight: float = 0.5
) -> tuple[int, int]:
    """Bands and rows whose S-curve comes nearest to a step at the threshold.

    The cost is fp_weight times the area under the curve below the threshold (pairs found that should not be) plus
    fn_weight times the area above the curve beyond it (pairs missed), as in `datasketch`; the integrals are sums over
    1000 midpoints on each side.

    Args:
        n_permutations: P; bands times rows is at most this.
        threshold: similarity from which a pair should be found, between 0 and 1.
        fp_weight: price of a false positive: more rows, a curve further right.
        fn_weight: price of a false negative: more bands, a curve further left.

    Returns:
        (bands, rows).

    Raises:
        ValueError: P is below 2, the threshold is not between 0 and 1, a weight is negative, or both are 0.
    """
    if n_permutations < 2:
        raise ValueError(f"n_permutations={n_permutations}: use 2 or more")
    if not 0 < threshold < 1:
        raise ValueError(f"threshold={threshold}: use a similarity between 0 and 1")
    if fp_weight < 0 or fn_weight < 0 or fp_weight + fn_weight == 0:
        raise ValueError(
            f"fp_weight={fp_weight}, fn_weight={fn_weight}: use weights of 0 or more, one above 0"
        )
    middle = (np.arange(1000) + 0.5) / 1000
    below, above = middle * threshold, threshold + middle * (1 - threshold)

    def cost(choice: tuple[int, int]) -> float:
        found, missed = probability(below, *choice).mean(), 1 - probability(above, *choice).mean()
        return float(fp_weight * threshold * found + fn_weight * (1 - threshold) * missed)

    choices = [(b, r) for b in range(1, n_permutations + 1) for r in range(1, n_permutations // b + 1)]
    return min(choices, key=cost)


def band_keys(signatures: np.ndarray, bands: int, rows: int, band: int, block: int = 1 << 16) -> np.ndarray:
    """One 64-bit key a document for one band: equal bands have equal keys, others about never (2^-62 a pair).

    Args:
        signatures: (M, P) uint32, in memory or memory-mapped: `block` rows are read at a time.
        bands: b, of which `band` is one, counted from 0.
        rows: r.
        band: which.
        block: documents at once.

    Returns:
        (M,) uint64.

    Raises:
        ValueError: the bands need more values than a signature has, or there are none.
    """
    if bands < 1 or rows < 1 or bands * rows > signatures.shape[1]:
        raise ValueError(
            f"bands={bands} x rows={rows}: a signature has {signatures.shape[1]} values to share out"
        )
    keys = np.empty(len(signatures), np.uint64)
    for start in range(0, len(signatures), block):
        part = signatures[start : start + block, band * rows : (band + 1) * rows]
        keys[start : start + block] = combine(list(part.T))
    return keys


def candidate_pairs(signatures: np.ndarray, bands: int, rows: int, neighbors: int = 16) -> np.ndarray:
    """Pairs of documents that agree in a band at least, found by sorting, without a loop over pairs.

    Within a bucket (documents with one key) each document is paired with its next `neighbors`. One neighbor is enough
    to connect the bucket; more give verification, which may reject some pairs, other ways to connect it; and no number
    makes the pairs grow with the square of the bucket, as pairing all with all would.

    Args:
        signatures: (M, P) uint32.
        bands: b.
        rows: r.
        neighbors: following documents of the same bucket to pair each document with.

    Returns:
        (Q, 2) int64, each pair once, smaller index first, sorted.

    Raises:
        ValueError: the bands need more values than a signature has, or `neighbors` is below 1.
    """
    if neighbors < 1:
        raise ValueError(f"neighbors={neighbors}: use 1 or more")
    count = len(signatures)
    found = np.empty(0, np.int64)
    for band in range(bands):
        keys = band_keys(signatures, bands, rows, band)
        order = np.argsort(keys, kind="stable")  # of equal keys, the earlier document first
        keys = keys[order]
        fresh = []
        for distance in range(1, min(neighbors, count - 1) + 1):
            same = np.flatnonzero(keys[distance:] == keys[:-distance])
            if not len(same):
                break
            fresh.append(order[same] * count + order[same + distance])
        if fresh:
            found = np.union1d(found, np.concatenate(fresh))
    return np.stack([found // max(1, count), found % max(1, count)], axis=1)


def clusters(pairs: np.ndarray, count: int) -> np.ndarray:
    """Connected components of the pairs: a union-find over arrays that hooks the higher root to the lower.

    Args:
        pairs: (Q, 2) int64 indices of documents that belong together.
        count: M.

    Returns:
        (M,) int64: the smallest index in each document's component; its own where it is alone.
    """
    root = np.arange(count)
    first, second = np.asarray(pairs, np.int64).reshape(-1, 2).T
    while True:
        ours, theirs = root[first], root[second]
        open_pairs = ours != theirs
        if not open_pairs.any():
            return root
        first, second = first[open_pairs], second[open_pairs]
        ours, theirs = ours[open_pairs], theirs[open_pairs]
        np.minimum.at(root, np.maximum(ours, theirs), np.minimum(ours, theirs))
        while (above := root[root]).tobytes() != root.tobytes():  # path compression, for all at once
            root = above
