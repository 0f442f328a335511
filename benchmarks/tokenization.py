"""Tokenizing a corpus against the library alone: same documents, same vocabulary, the same ids.

Ours, `tokenize`, goes from texts to one array with an end-of-text token after each document, through
`encode_batch_fast` in chunks. The library's way is one `Tokenizer.encode_batch` over all documents and its ids as
lists; `transformers` is the call of a fast tokenizer. All start from a list of texts, in one process, with the threads
that the library chooses.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from benchmarks.harness import alternate, result
from llmcourse.data.python_docs import python_docs
from llmcourse.data.tinytown import Town
from llmcourse.data.token_stream import TokenStream, tokenize
from llmcourse.tokenization.bpe import train_bpe
from llmcourse.tokenization.tokenizer import Tokenizer

DOCUMENTS = 20_000
VOCABULARY = 1024
BPE_BYTES = 300_000
ROUNDS = 5


def run() -> list[dict[str, Any]]:
    """Short documents of the town, longer ones of real text, and the training of a vocabulary from scratch."""
    town = [document.text for document in Town(0).documents(DOCUMENTS)]
    documentation = python_docs()["text"][:]
    return [
        _compare("tokenization", "Tinytown", town),
        _compare("tokenization_python_docs", "documentation of this Python", documentation),
        _train_bpe(documentation),
    ]


def _compare(name: str, what: str, texts: list[str]) -> dict[str, Any]:
    tokenizer = Tokenizer.train(texts[: DOCUMENTS // 10], VOCABULARY)
    backend, fast = tokenizer.backend, tokenizer.to_transformers()
    ids: dict[str, Any] = {}
    megabytes = sum(len(text.encode()) for text in texts) / 1e6

    def timed(contender: str, encode: Callable[[], Any]) -> Callable[[], float]:
        def measure() -> float:
            start = time.perf_counter()
            ids[contender] = encode()
            return megabytes / (time.perf_counter() - start)

        return measure

    library, wrapper = f"tokenizers {version('tokenizers')}", f"transformers {version('transformers')}"
    contenders = {
        "ours": timed("ours", lambda: tokenize(texts, tokenizer, workers=2, progress=False)),
        library: timed(
            library, lambda: [one.ids for one in backend.encode_batch(texts, add_special_tokens=False)]
        ),
        wrapper: timed(wrapper, lambda: fast(texts, add_special_tokens=False)["input_ids"]),
    }
    figures = alternate(contenders, ROUNDS, name.replace("_", " "))
    for peer in (library, wrapper):
        _check_same(ids["ours"], ids[peer], peer)
    return result(
        name,
        what=f"tokenizing {len(texts)} documents ({what}), vocabulary {tokenizer.vocab_size}, the same ids",
        unit="MB/s",
        ours=figures["ours"],
        peers={library: figures[library], wrapper: figures[wrapper]},
        bars={library: 1.0},
        tokens=len(ids["ours"]),
    )


def _check_same(stream: TokenStream, ids: list[list[int]], peer: str) -> None:
    same = stream.n_documents == len(ids) and all(
        stream.document(number)[:-1].tolist() == list(expected) for number, expected in enumerate(ids)
    )
    if not same:
        raise RuntimeError(f"{peer} gives other ids, so the comparison is void")


def _train_bpe(texts: list[str]) -> dict[str, Any]:
    """Byte-pair encoding from scratch, in Python, with incremental pair counts: seconds, not minutes."""
    part, size = [], 0
    for text in texts:
        if size > BPE_BYTES:
            break
        part.append(text)
        size += len(text.encode())

    def measure() -> float:
        start = time.perf_counter()
        train_bpe(part, VOCABULARY)
        return time.perf_counter() - start

    figures = alternate({"ours": measure}, 3, "BPE from scratch")
    return result(
        "bpe_training",
        what=f"training a vocabulary of {VOCABULARY} on {size / 1e3:.0f} kB of documentation, from scratch in Python",
        unit="s",
        ours=figures["ours"],
        higher_is_better=False,
        limit=10.0,
        bytes=size,
    )
