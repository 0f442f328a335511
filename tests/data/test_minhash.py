"""MinHash: equal to a plain reference and to datasketch, unbiased, and its S-curve is the one of the theory."""

from __future__ import annotations

import math
import random
from functools import cache

import numpy as np
import pytest
from datasets import Dataset
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from llmcourse.data import shingles
from llmcourse.data.lsh import band_keys, candidate_pairs, choose_bands, clusters, probability
from llmcourse.data.minhash import (
    MinHashSettings,
    add_signatures,
    estimate_jaccard,
    minhash,
    near_duplicates,
    permutations,
    shingle_keys,
    signatures,
    write_signatures,
)
from llmcourse.data.tinytown import Town
from llmcourse.data.web_dump import web_dump
from llmcourse.data.web_text import shingle_jaccard

TEXTS = [
    "The cat sat on the mat and the dog slept.",
    "the  CAT sat on the\nmat and the dog slept.",
    "The cat sat on the mat and the dog woke up.",
    "",
    "two words",
    "\u00dcber Ren\u00e9s und na\u00efve Leute im S\u00fcden wird viel geredet",
    "U\u0308ber Rene\u0301s und nai\u0308ve Leute im Su\u0308den wird viel geredet",
    " ".join(str(i) for i in range(200)),
]


@cache
def dump() -> tuple[list[str], list[dict]]:
    """Main texts and labels of a web dump."""
    pages = list(web_dump(Town(0), 2000, seed=0))
    labels = [page.labels | {"url": page.url} for page in pages]
    return [page.labels["text"] for page in pages], labels


def set_pair(shared: int, own: int, word: int) -> tuple[str, str]:
    """Two texts of distinct words whose 1-word shingles share `shared` of `shared + 2 * own`."""
    first = [f"w{word + i}" for i in range(shared + own)]
    second = first[:shared] + [f"w{word + shared + own + i}" for i in range(own)]
    return " ".join(first), " ".join(second)


# Shingles -----------------------------------------------------------------------------------------------------


def naive_shingles(text: str, size: int) -> list[tuple[str, ...]]:
    parts = shingles.words(text)
    return [tuple(parts[i : i + size]) for i in range(max(1, len(parts) - size + 1))]


def naive_hash(gram: tuple[str, ...], size: int) -> int:
    """The documented polynomial and mixer, one shingle at a time in Python's own integers."""
    value, wrap = 0, 2**64
    for word in (*gram, *[""] * (size - len(gram))):
        value = (value * 6364136223846793005 + shingles.word_hash(word)) % wrap
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        value = (value ^ (value >> 33)) * factor % wrap
    return value ^ (value >> 33)


@pytest.mark.parametrize("size", [1, 2, 5, 13])
def test_shingles_equal_a_plain_reference(size):
    hashes, offsets = shingles.shingle_hashes(TEXTS, size)
    for i, text in enumerate(TEXTS):
        expected = [naive_hash(gram, size) for gram in naive_shingles(text, size)]
        assert hashes[offsets[i] : offsets[i + 1]].tolist() == expected
    assert hashes.dtype == np.uint64 and offsets[-1] == len(hashes)


@pytest.mark.parametrize("texts", [[], [""], ["", ""], ["one"]])
def test_shingles_of_almost_nothing(texts):
    for size in (1, 5):
        hashes, offsets = shingles.shingle_hashes(texts, size)
        assert np.diff(offsets).tolist() == [1] * len(texts) and len(hashes) == len(texts)


def test_shingles_depend_on_order_and_on_every_word():
    base = "one two three four five"
    others = [
        "two one three four five",
        "one two three four six",
        "one two three four",
        "one two three five four",
    ]
    hashes, _ = shingles.shingle_hashes([base, *others])
    assert len(set(hashes.tolist())) == 5


def test_normalization_ignores_case_space_and_unicode_form_only():
    assert shingles.normalize(TEXTS[0]) == shingles.normalize(TEXTS[1])
    assert shingles.normalize(TEXTS[5]) == shingles.normalize(TEXTS[6])
    assert shingles.normalize("62 + 11 = 73") != shingles.normalize("62 - 11 = 73")


def test_word_hash_is_the_same_everywhere():
    assert shingles.word_hash("town") == int.from_bytes(
        __import__("hashlib").blake2b(b"town", digest_size=8).digest(), "little"
    )
    assert shingles.word_hash("") == 0 and shingles.word_hash("\ud800") != 0


def test_chunks_hold_every_text_once():
    assert list(shingles.chunked(["a" * 5, "b" * 5, "c" * 30, "d"], 10)) == [
        ["a" * 5, "b" * 5],
        ["c" * 30],
        ["d"],
    ]
    assert list(shingles.chunked([], 10)) == []


@pytest.mark.parametrize("block", [3, 4096])
def test_jaccard_equals_sets(block):
    texts = dump()[0][:60]
    rng = random.Random(0)
    pairs = np.array(
        [[rng.randrange(60), rng.randrange(60)] for _ in range(100)] + [[i, i + 1] for i in range(59)]
    )
    expected = [shingle_jaccard(texts[i].lower(), texts[j].lower()) for i, j in pairs]
    np.testing.assert_allclose(shingles.jaccard(texts, pairs, block=block), expected, rtol=1e-12)
    assert shingles.jaccard(texts, np.empty((0, 2), int)).shape == (0,)


def test_jaccard_by_hand():
    # shingles of two words: {a b, b c, c d} and {a b, b c, c e}: 2 of 4
    assert shingles.jaccard(["a b c d", "a b c e"], [[0, 1]], size=2).tolist() == [0.5]
    assert shingles.jaccard(["a a a", "a"], [[0, 1]], size=1).tolist() == [1.0]


def test_shingle_errors():
    with pytest.raises(ValueError, match="size=0"):
        shingles.shingle_hashes(["a"], 0)
    with pytest.raises(ValueError, match="NoneType"):
        shingles.shingle_hashes(["a", None])
    with pytest.raises(ValueError, match="indices from 0 to 1"):
        shingles.jaccard(["a", "b"], [[0, 2]])
    with pytest.raises(ValueError, match="shape"):
        shingles.jaccard(["a", "b"], [0, 1])


# Signatures ---------------------------------------------------------------------------------------------------


def test_signatures_equal_a_plain_reference():
    settings = MinHashSettings(bands=4, rows=3, shingle_words=2, seed=5)
    a, b = permutations(12, 5)
    assert a.dtype == b.dtype == np.uint32 and (a % 2 == 1).all()
    for text, signature in zip(TEXTS, signatures(TEXTS, settings), strict=True):
        keys = {naive_hash(gram, 2) >> 32 for gram in naive_shingles(text, 2)}
        expected = [min((int(x) * key + int(y)) % 2**32 for key in keys) for x, y in zip(a, b, strict=True)]
        assert signature.tolist() == expected


def test_signatures_equal_datasketch():
    """Same a, b and keys; datasketch first mixes its hashes by a bijection, which is undone here."""
    datasketch = pytest.importorskip("datasketch")

    def unmix(value: int) -> int:
        for shift, factor in ((16, 0xC2B2AE35), (13, 0x85EBCA6B), (16, None)):
            step = value
            for _ in range(3):  # inverts an xor with its own shift
                step = value ^ (step >> shift)
            value = step * pow(factor, -1, 2**32) % 2**32 if factor else step
        return value

    texts = dump()[0][:50]
    settings = MinHashSettings()
    a, b = permutations(settings.n_permutations)
    keys, offsets = shingle_keys(texts)
    ours = signatures(texts, settings)
    for i in range(len(texts)):
        theirs = datasketch.MinHash(num_perm=len(a), permutations=(a, b), scheme="affine32", hashfunc=unmix)
        theirs.update_batch(keys[offsets[i] : offsets[i + 1]].tolist())
        assert theirs.hashvalues.tolist() == ours[i].tolist()


def test_each_map_is_a_permutation():
    """Odd factors are invertible mod 2^32; shown exhaustively on the low 16 bits, which form a ring of their own."""
    a, b = permutations(20)
    for factor, addend in zip(a.tolist(), b.tolist(), strict=True):
        assert pow(factor, -1, 2**32) * factor % 2**32 == 1
        assert len({(factor * x + addend) % 2**16 for x in range(2**16)}) == 2**16


def test_blocks_chunks_files_and_processes_change_nothing(tmp_path, monkeypatch):
    texts = dump()[0][:100] + [" ".join(f"long{i}" for i in range(50_000))]
    expected = signatures(texts)
    monkeypatch.setattr("llmcourse.data.minhash._CACHED", 7)
    monkeypatch.setattr("llmcourse.data.minhash._CHUNK", 500)
    np.testing.assert_array_equal(signatures(iter(texts)), expected)
    stored = write_signatures(iter(texts), tmp_path / "s.bin")
    assert isinstance(stored, np.memmap) and [p.name for p in tmp_path.iterdir()] == ["s.bin"]
    np.testing.assert_array_equal(stored, expected)
    mapped = Dataset.from_dict({"text": texts}).map(add_signatures, batched=True, batch_size=40)
    np.testing.assert_array_equal(np.array(mapped["signature"][:], np.uint32), expected)
    assert signatures([]).shape == (0, 112)


def test_writing_fails_whole(tmp_path):
    with pytest.raises(ValueError, match="no documents"):
        write_signatures([], tmp_path / "s.bin")
    with pytest.raises(ValueError, match="int, not text"):
        write_signatures(["good", 3], tmp_path / "s.bin")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("similarity", [0.2, 0.5, 0.8])
def test_estimate_is_unbiased_with_the_variance_of_the_theory(similarity):
    """400 pairs of sets of 150 elements, P = 128: mean s and variance s (1 - s) / P."""
    union, pairs, count = 150, 400, 128
    shared = round(similarity * union)
    s = shared / (shared + 2 * ((union - shared) // 2))
    texts = [text for n in range(pairs) for text in set_pair(shared, (union - shared) // 2, 1000 * n)]
    a, b = permutations(count, 1)
    signed = minhash(*shingle_keys(texts, 1), a, b)
    estimates = estimate_jaccard(signed, np.arange(2 * pairs).reshape(-1, 2), block=64)
    deviation = math.sqrt(s * (1 - s) / count)
    # one set of permutations for all pairs, so their errors share a part: 4 standard errors and a little more
    assert abs(estimates.mean() - s) < 6 * deviation / math.sqrt(pairs)
    assert 0.85 < estimates.std() / deviation < 1.15
    assert np.abs(estimates - s).mean() < 1 / math.sqrt(count)


def test_minimum_is_equally_often_anywhere():
    """Min-wise independence on real keys: over 4000 maps each of 8 shingles is smallest about 500 times."""
    keys, offsets = shingle_keys(["a b c d e f g h"], 1)
    a, b = permutations(4000, 2)
    winners = np.bincount(((a[:, None] * keys) + b[:, None]).argmin(axis=1), minlength=8)
    chi_square = ((winners - 500) ** 2 / 500).sum()
    assert chi_square < 24.3  # 99.9 % quantile with 7 degrees of freedom
    assert minhash(keys, offsets, a, b).tolist() == [((a[:, None] * keys) + b[:, None]).min(axis=1).tolist()]


# Bands --------------------------------------------------------------------------------------------------------


def test_probability_by_hand():
    # one row: 1 - (1 - 0.5)^2 = 0.75; FineWeb's 14 x 8 at 0.8: 1 - (1 - 0.16777)^14 = 0.9235
    assert probability(0.5, 2, 1) == 0.75
    assert probability(0.8, 14, 8) == pytest.approx(0.92355, abs=1e-5)
    np.testing.assert_array_equal(probability(np.array([0.0, 1.0]), 14, 8), [0.0, 1.0])


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.9, 0.1), (0.1, 0.9)])
def test_choice_of_bands_equals_datasketch(threshold, weights):
    lsh = pytest.importorskip("datasketch").lsh
    assert choose_bands(64, threshold, *weights) == lsh._optimal_param(threshold, 64, *weights)


def test_weights_move_the_curve():
    careful, eager = choose_bands(128, 0.6, 0.95, 0.05), choose_bands(128, 0.6, 0.05, 0.95)
    assert probability(0.6, *careful) < probability(0.6, *choose_bands(128, 0.6)) < probability(0.6, *eager)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((1, 0.5), "n_permutations=1"),
        ((64, 0.0), "threshold=0.0"),
        ((64, 1.0), "threshold=1.0"),
        ((64, 0.5, -1.0, 1.0), "fp_weight=-1.0"),
        ((64, 0.5, 0.0, 0.0), "one above 0"),
    ],
)
def test_choice_of_bands_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        choose_bands(*arguments)


def test_band_keys_tell_bands_apart():
    signed = np.array([[1, 2, 3, 4], [1, 2, 9, 9], [2, 1, 3, 4]], np.uint32)
    first, second = (band_keys(signed, 2, 2, band, block=2) for band in (0, 1))
    assert first[0] == first[1] != first[2] and second[0] == second[2] != second[1]
    with pytest.raises(ValueError, match="4 values to share"):
        band_keys(signed, 2, 3, 0)
    with pytest.raises(ValueError, match="bands=0"):
        band_keys(signed, 0, 1, 0)


@pytest.mark.parametrize("bands, rows", [(6, 2), (3, 4), (12, 1)])
def test_candidates_equal_a_loop_over_all_pairs(bands, rows):
    signed = np.random.default_rng(0).integers(0, 4, (60, 12), dtype=np.uint32)
    cut = signed[:, : bands * rows].reshape(60, bands, rows)
    expected = [[i, j] for i in range(60) for j in range(i + 1, 60) if (cut[i] == cut[j]).all(axis=1).any()]
    assert candidate_pairs(signed, bands, rows, neighbors=60).tolist() == expected and expected
    few = candidate_pairs(signed, bands, rows, neighbors=1)
    assert {tuple(pair) for pair in few.tolist()} < {tuple(pair) for pair in expected}
    np.testing.assert_array_equal(clusters(few, 60), clusters(np.array(expected), 60))


def test_candidates_of_one_large_bucket_stay_few():
    signed = np.zeros((5000, 4), np.uint32)
    assert len(candidate_pairs(signed, 2, 2)) < 16 * 5000
    assert not clusters(candidate_pairs(signed, 2, 2, neighbors=1), 5000).any()
    with pytest.raises(ValueError, match="neighbors=0"):
        candidate_pairs(signed, 2, 2, neighbors=0)
    for count in (0, 1):
        assert candidate_pairs(signed[:count], 2, 2).shape == (0, 2)


@pytest.mark.parametrize("edges", [0, 30, 80, 300])
def test_clusters_equal_connected_components(edges):
    rng = np.random.default_rng(edges)
    pairs = rng.integers(0, 100, (edges, 2))
    _, labels = connected_components(coo_array((np.ones(edges), pairs.T), shape=(100, 100)), directed=False)
    smallest = [int(np.flatnonzero(labels == label)[0]) for label in labels]
    assert clusters(pairs, 100).tolist() == smallest


def test_clusters_of_a_long_chain():
    order = np.random.default_rng(0).permutation(5000)
    assert not clusters(np.stack([order[:-1], order[1:]], axis=1), 5000).any()


# The whole ----------------------------------------------------------------------------------------------------


def test_detection_follows_the_s_curve():
    """1200 pairs at each of five similarities: the share that becomes a candidate is the S-curve's, within 4 sigma."""
    count, bands, rows = 1200, 14, 8
    for shared, own in ((60, 20), (70, 15), (76, 12), (80, 10), (90, 5)):
        texts = [text for n in range(count) for text in set_pair(shared, own, 1000 * n)]
        s = shared / (shared + 2 * own)
        signed = signatures(texts, MinHashSettings(shingle_words=1, bands=bands, rows=rows))
        found = (signed[::2] == signed[1::2]).reshape(count, bands, rows).all(axis=2).any(axis=1).mean()
        expected = probability(s, bands, rows)
        assert abs(found - expected) < 4 * math.sqrt(expected * (1 - expected) / count) + 0.02


def test_same_pairs_as_datasketch_where_the_curve_is_flat():
    datasketch = pytest.importorskip("datasketch")
    texts = dump()[0][:250]
    settings = MinHashSettings(bands=16, rows=4)
    index = datasketch.MinHashLSH(num_perm=64, params=(16, 4))
    grams = [[" ".join(gram).encode() for gram in naive_shingles(text, 5)] for text in texts]
    theirs = set()
    for i, one in enumerate(datasketch.MinHash.generator(grams, num_perm=64)):
        theirs |= {(j, i) for j in index.query(one)}
        index.insert(i, one)
    ours = set(map(tuple, candidate_pairs(signatures(texts, settings), 16, 4, neighbors=250).tolist()))
    every = np.stack(np.triu_indices(250, 1), axis=1)
    similarity = shingles.jaccard(texts, every)
    sure = {tuple(pair) for pair in every[similarity >= 0.85].tolist()}  # missed with probability 1e-5
    never = {tuple(pair) for pair in every[similarity < 0.02].tolist()}  # found with probability 3e-6 at most
    assert len(sure) > 8 and sure <= ours & theirs and len(never) > 25_000 and not never & (ours | theirs)
    # either of the two alone finds a pair with probability 2 p (1 - p)
    differing = (2 * probability(similarity, 16, 4) * (1 - probability(similarity, 16, 4))).sum()
    assert abs(len(ours ^ theirs) - differing) < 4 * math.sqrt(differing)


def test_detection_on_the_dump():
    """All exact copies are found; near copies by similarity; what is removed beyond the labels is as similar."""
    texts, labels = dump()
    found = near_duplicates(texts, MinHashSettings(verify="exact", threshold=0.5, bands=25, rows=5))
    removed = ~found.keep
    exact = np.array([one["duplicate"] == "exact" for one in labels])
    near = np.array([one["duplicate"] == "near" for one in labels])
    similarity = np.array([one["jaccard"] or 0.0 for one in labels])
    assert removed[exact].all()
    assert removed[near & (similarity > 0.8)].mean() > 0.98
    assert removed[near & (similarity < 0.45)].mean() < 0.3
    assert (shingles.jaccard(texts, found.pairs) >= 0.5).all()
    beyond = removed & ~exact & ~near
    # spam and foreign pages are written from few templates, so independent ones overlap: true positives by content
    kinds = {labels[i]["kind"] for i in np.flatnonzero(beyond)}
    assert kinds <= {"spam", "foreign", "sum"}


def test_verification_and_what_stays():
    long = " ".join(f"w{i}" for i in range(60))
    texts = [long, long + " one more", "something else entirely, of six words", long + " and a little more"]
    first = near_duplicates(texts)
    assert first.kept.tolist() == [0, 0, 2, 0] and first.keep.tolist() == [True, False, True, False]
    assert near_duplicates(texts, MinHashSettings(keep="longest")).kept.tolist() == [3, 3, 2, 3]
    for verify in ("estimate", "exact"):
        strict = near_duplicates(texts, MinHashSettings(verify=verify, threshold=1.0))
        assert strict.keep.all() and len(strict.pairs) == 0 and strict.n_candidates == 3
    assert len(near_duplicates(texts, MinHashSettings(verify="exact", threshold=0.9)).pairs) == 3
    assert near_duplicates([]).keep.shape == (0,)


def test_every_setting_changes_the_result():
    texts = dump()[0][:400]
    base = signatures(texts, MinHashSettings(seed=0))
    assert (base != signatures(texts, MinHashSettings(seed=1))).mean() > 0.9
    assert (base != signatures(texts, MinHashSettings(shingle_words=4))).mean() > 0.9
    removed = [
        int((~near_duplicates(texts, MinHashSettings(bands=b, rows=r)).keep).sum())
        for b, r in ((7, 8), (14, 8), (14, 4))
    ]
    assert removed[0] < removed[1] < removed[2]


def test_signatures_made_before_are_used_and_checked():
    texts = dump()[0][:300]
    signed = signatures(texts)
    np.testing.assert_array_equal(near_duplicates(texts, signed=signed).kept, near_duplicates(texts).kept)
    with pytest.raises(ValueError, match="same settings"):
        near_duplicates(texts, MinHashSettings(bands=7), signed=signed)
    with pytest.raises(ValueError, match="same texts"):
        near_duplicates(texts[:10], signed=signed)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"bands": 0}, "bands=0"),
        ({"rows": 0}, "rows=0"),
        ({"shingle_words": 0}, "shingle_words=0"),
        ({"seed": -1}, "seed=-1"),
        ({"threshold": 1.5}, "threshold=1.5"),
        ({"verify": "yes"}, "verify='yes'"),
        ({"keep": "last"}, "keep='last'"),
    ],
)
def test_settings_errors(wrong, message):
    with pytest.raises(ValueError, match=message):
        MinHashSettings(**wrong)
