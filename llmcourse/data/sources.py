"""Where text comes from: the generated town, the documentation on this machine, local files, the Hub.

Every source gives a `datasets.Dataset` (or `IterableDataset`, when streamed) with the columns text, source
and license. `load_corpus` turns a name, as typed at the command line, into a training and a validation part.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from llmcourse.data.hub import hub
from llmcourse.data.python_docs import python_docs
from llmcourse.data.text_files import files
from llmcourse.data.tinytown import Town

__all__ = ["CORPORA", "Corpus", "files", "hub", "load_corpus", "python_docs", "tinytown"]

CORPORA = "tinytown, python-docs, files:PATH_OR_GLOB, hub:OWNER/NAME, hub:OWNER/NAME:CONFIG"
TOWN_DOCUMENTS = 60_000  # of tinytown, unless told otherwise


@dataclass(frozen=True)
class Corpus:
    """A corpus split into training and validation text.

    Attributes:
        name: as given to `load_corpus`.
        train: columns text, source, license, and for tinytown kind and bits.
        validation: the same columns; no document of it, white space at its ends aside, is in `train`, except
            that tinytown's two parts are independent draws, which is what makes its entropy the floor of the
            loss.
        town: who wrote it; None for real text.
    """

    name: str
    train: Dataset
    validation: Dataset
    town: Town | None = None

    @property
    def entropy_bits(self) -> np.ndarray | None:
        """(n,) float64 information content of each validation document in bits; None for real text.

        Its sum over the number of validation tokens, end of text included, is the floor of the loss in bits
        per token; times ln 2, in nats.
        """
        return None if self.town is None else np.asarray(self.validation["bits"], dtype=np.float64)


def tinytown(n_documents: int = TOWN_DOCUMENTS, *, seed: int = 0, town: Town | None = None) -> Dataset:
    """Documents of a Tinytown, independent draws.

    Args:
        n_documents: how many.
        seed: of the draws; another seed gives other documents about the same town.
        town: who writes; None: `Town(seed=0)`.

    Returns:
        Columns text, source ("tinytown:" and the town's seed), license, kind ("story", "record", "sum",
        "dialogue")
        and bits, the information content of the document: -log2 of its probability.

    Raises:
        ValueError: fewer than 1 document.
    """
    if n_documents < 1:
        raise ValueError(f"n_documents={n_documents}: must be at least 1")
    town = town or Town(seed=0)
    documents = list(town.documents(n_documents, seed))
    columns = {name: [getattr(document, name) for document in documents] for name in ("text", "kind", "bits")}
    labels = {"source": [f"tinytown:{town.seed}"] * n_documents, "license": ["CC0-1.0"] * n_documents}
    return Dataset.from_dict(columns | labels)


def load_corpus(
    name: str, *, seed: int = 0, n_documents: int | None = None, validation_fraction: float = 0.02
) -> Corpus:
    """Open a corpus by name and set text for validation aside.

    Args:
        name: "tinytown", "python-docs", "files:PATH_OR_GLOB" or "hub:OWNER/NAME", with ":CONFIG" where the
            data set has several configurations.
        seed: which town. Real text is split by its content alone, so that runs with different seeds are
            measured on the same text.
        n_documents: for tinytown the number of documents to write, by default 60 000; for other names the
            most to
            use: of the Hub the first ones (no more are downloaded), of local text a fixed sample.
        validation_fraction: share of the documents for validation, at least one. In real text, documents with
            equal text always fall on the same side; those with the smallest hashes go to validation, so the
            split stays much the same when documents are added.

    Raises:
        ValueError: an unknown name, a corpus without text or with a single distinct document, a number of
            documents below 2, a fraction not between 0 and 1, or whatever the source itself refuses.
    """
    if n_documents is not None and n_documents < 2:
        raise ValueError(
            f"n_documents={n_documents}: must be at least 2, one to train on and one to validate"
        )
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction={validation_fraction}: must lie between 0 and 1, such as 0.02")
    kind, _, rest = name.partition(":")
    if name == "tinytown":
        return _town_corpus(seed, n_documents or TOWN_DOCUMENTS, validation_fraction)
    if name == "python-docs":
        data = python_docs()
    elif kind == "files" and rest:
        data = files(rest)
    elif kind == "hub" and rest:
        data = _from_hub(rest, n_documents)
    else:
        raise ValueError(f"unknown corpus {name!r}: choose one of {CORPORA}")
    return Corpus(name, *_split(name, data, n_documents, validation_fraction))


def _town_corpus(seed: int, n_documents: int, fraction: float) -> Corpus:
    town = Town(seed=seed)
    n_validation = min(n_documents - 1, max(1, round(fraction * n_documents)))
    train = tinytown(n_documents - n_validation, seed=0, town=town)
    return Corpus("tinytown", train, tinytown(n_validation, seed=1, town=town), town)


def _from_hub(address: str, n_documents: int | None) -> Dataset:
    name, _, config = address.partition(":")
    if n_documents is None:
        return hub(name, config=config or None)
    rows = list(hub(name, config=config or None, streaming=True).take(n_documents))
    return Dataset.from_dict(
        {column: [row[column] for row in rows] for column in ("text", "source", "license")}
    )


def _split(name: str, data: Dataset, n_documents: int | None, fraction: float) -> tuple[Dataset, Dataset]:
    hashes = np.fromiter((_hash(text) for batch in data.iter(1_000) for text in batch["text"]), np.uint64)
    kept = np.sort(np.argsort(hashes, kind="stable")[:n_documents])
    distinct = np.unique(hashes[kept])
    if len(distinct) < 2:
        raise ValueError(
            f"{name} has {len(distinct)} distinct documents: give at least 2, such as a file per chapter"
        )
    n_validation = min(len(distinct) - 1, max(1, round(fraction * len(distinct))))
    validation = hashes[kept] <= distinct[n_validation - 1]
    return data.select(kept[~validation]), data.select(kept[validation])


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.strip().encode(), digest_size=8).digest(), "big")
