"""Near-duplicate removal against `datasketch` and `datatrove`: same documents, words, shingles, bands and rows.

Every contender starts from the list of texts and ends with the documents that stay. `datasketch` runs as its manual
says for many sets (`MinHash.bulk`, an insertion into `MinHashLSH` for each document that no earlier one matches), with
xxHash, faster than its default SHA-1. `datatrove` runs its four MinHash steps in this process, without an executor
around them, on a temporary folder; its word tokenizer for English needs a download, so it gets one that splits at white
space, through the parameter meant for that, and the text normalization is lower case for all three.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import alternate, result
from llmcourse.data.deduplication import first_occurrences
from llmcourse.data.minhash import MinHashSettings, near_duplicates
from llmcourse.data.python_docs import python_docs
from llmcourse.data.shingles import word_hash
from llmcourse.data.tinytown import Town
from llmcourse.data.web_dump import web_dump

DOCUMENTS = 3000
ROUNDS = 5
SETTINGS = MinHashSettings()


def run() -> list[dict[str, Any]]:
    """The main texts of a web dump, and real documentation."""
    dump = [page.labels["text"] for page in web_dump(Town(0), DOCUMENTS, seed=3)]
    documentation = python_docs()["text"][:]
    step = max(1, len(documentation) // DOCUMENTS)  # from all of its sources
    return [
        _compare("deduplication", "main texts of a web dump", dump),
        _compare(
            "deduplication_python_docs", "documentation of this Python", documentation[::step][:DOCUMENTS]
        ),
    ]


def _compare(name: str, what: str, texts: list[str]) -> dict[str, Any]:
    kept: dict[str, np.ndarray] = {}

    def timed(contender: str, keep: Callable[[list[str]], np.ndarray]) -> Callable[[], float]:
        def measure() -> float:
            word_hash.cache_clear()  # ours must not profit from the round before
            start = time.perf_counter()
            kept[contender] = keep(texts)
            return len(texts) / (time.perf_counter() - start)

        return measure

    peers = {
        f"datasketch {version('datasketch')}": _datasketch,
        f"datatrove {version('datatrove')}": _datatrove,
    }
    contenders = {"ours": timed("ours", _ours)} | {peer: timed(peer, keep) for peer, keep in peers.items()}
    figures = alternate(contenders, ROUNDS, name.replace("_", " "))
    for peer in peers:
        _check_agreement(texts, kept["ours"], kept[peer], peer)
    return result(
        name,
        what=f"near-duplicate removal, {len(texts)} documents ({what}), 5-word shingles, 14 bands x 8 rows",
        unit="documents/s",
        ours=figures["ours"],
        peers={peer: figures[peer] for peer in peers},
        bars=dict(zip(peers, (3.0, 1.0), strict=True)),
        documents=len(texts),
        characters=sum(map(len, texts)),
        removed={contender: int((~keep).sum()) for contender, keep in kept.items()},
    )


def _check_agreement(texts: list[str], ours: np.ndarray, theirs: np.ndarray, peer: str) -> None:
    """All remove the same exact duplicates, and nearly the same near ones: each draws its own permutations."""
    repeats = first_occurrences(texts) != np.arange(len(texts))
    long = np.array(
        [len(text.split()) >= SETTINGS.shingle_words for text in texts]
    )  # datatrove skips shorter ones
    if (ours & repeats & long).sum() > (theirs & repeats & long).sum():
        raise RuntimeError(f"{peer} removes exact duplicates that ours keeps, so the comparison is void")
    removed = [int((~keep).sum()) for keep in (ours, theirs)]
    if min(removed) < 0.9 * max(removed):
        raise RuntimeError(
            f"ours removes {removed[0]} documents, {peer} {removed[1]}: the comparison is void"
        )


def _ours(texts: list[str]) -> np.ndarray:
    return near_duplicates(texts, SETTINGS).keep


def _datasketch(texts: list[str]) -> np.ndarray:
    import xxhash
    from datasketch import MinHash, MinHashLSH

    size = SETTINGS.shingle_words

    def shingles(text: str) -> set[bytes]:
        words = text.lower().encode().split()
        return {b" ".join(words[i : i + size]) for i in range(max(1, len(words) - size + 1))}

    hashes = MinHash.generator(
        map(shingles, texts), num_perm=SETTINGS.n_permutations, hashfunc=xxhash.xxh32_intdigest
    )
    index = MinHashLSH(num_perm=SETTINGS.n_permutations, params=(SETTINGS.bands, SETTINGS.rows))
    keep = np.ones(len(texts), bool)
    for number, one in enumerate(hashes):
        if index.query(one):
            keep[number] = False
        else:
            index.insert(number, one, check_duplication=False)
    return keep


def _datatrove(texts: list[str]) -> np.ndarray:
    import xxhash
    from datatrove.data import Document
    from datatrove.pipeline.dedup.minhash import (
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )  # fmt: skip
    from datatrove.utils.logging import logger
    from datatrove.utils.text import TextNormConfig

    logger.remove()
    norm = TextNormConfig(norm_whitespace=False, remove_punctuation=False, norm_unicode_diacritics=False,
                          norm_numbers=False)  # fmt: skip
    config = MinhashConfig(
        n_grams=SETTINGS.shingle_words,
        num_buckets=SETTINGS.bands,
        hashes_per_bucket=SETTINGS.rows,
        norm_config=norm,
    )
    documents = [Document(text=text, id=str(number)) for number, text in enumerate(texts)]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        signed, paired, removed = (str(Path(folder) / name) for name in ("signatures", "pairs", "removed"))
        signing = MinhashDedupSignature(signed, config, language=_white_space())
        # datatrove 0.10 gives xxHash a str, which xxhash 4 refuses; its SHA-1 works but would be slower
        signing._hash_func = lambda shingle: xxhash.xxh64_intdigest(shingle.encode())
        signing.run(iter(documents))
        matching = MinhashDedupBuckets(signed, paired, config=config, lines_to_buffer=-1)
        for bucket in range(SETTINGS.bands):
            matching.run(None, bucket, SETTINGS.bands)
        MinhashDedupCluster(paired, removed, config=config, lines_to_buffer=-1).run()
        kept = [int(document.id) for document in MinhashDedupFilter(removed).run(iter(documents))]
    keep = np.zeros(len(texts), bool)
    keep[kept] = True
    return keep


def _white_space() -> Any:
    from datatrove.utils.word_tokenizers import WordTokenizer

    class WhiteSpace(WordTokenizer):
        """Words between white space: no model, no download."""

        def word_tokenize(self, text: str) -> list[str]:
            return text.split()

        def sent_tokenize(self, text: str) -> list[str]:
            return [text]

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return [(0, len(text))]

    return WhiteSpace()
