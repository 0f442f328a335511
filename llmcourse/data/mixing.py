"""Several sources interleaved into one endless stream of documents, by weights, with exact resume.

How the weights are chosen, and what repetition a mixture costs, is in `mixture_plan`, whose functions can be
imported from here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from llmcourse.data.mixture_plan import (
    HARMLESS_EPOCHS,
    MixturePart,
    MixturePlan,
    check_weights,
    effective_epochs,
    normalized,
    plan_mixture,
    temperature_weights,
)
from llmcourse.data.streaming import DocumentSource, ListSource, check_identity

__all__ = [
    "HARMLESS_EPOCHS", "DocumentSource", "ListSource", "MixedStream", "MixturePart", "MixturePlan", "MixtureSettings",
    "Share", "effective_epochs", "plan_mixture", "temperature_weights", "text_bytes",
]  # fmt: skip

DRAWS = 1024  # random choices of a source made at once


@dataclass(frozen=True, kw_only=True)
class MixtureSettings:
    """How sources are interleaved.

    Raises:
        ValueError: no weights, one that is not above 0, an unknown unit or a negative seed.
    """

    weights: Mapping[str, float]
    """share of each source, by its name; any unit, only proportions count"""
    unit: str = "tokens"
    """"tokens": weights are shares of length, and the next document comes from the source that is furthest behind
    its share, so after any number of documents every share is right to within a document or so. "documents":
    each document's source is drawn at random with these probabilities, as
    `datasets.interleave_datasets(probabilities=...)` does; sources with long documents then get more tokens."""
    seed: int = 0
    """of the random draws (unit "documents")"""

    def __post_init__(self) -> None:
        if not self.weights:
            raise ValueError("weights is empty: name at least one source")
        check_weights(self.weights, self.weights)
        if self.unit not in ("tokens", "documents"):
            raise ValueError(f"unit={self.unit!r}: choose tokens or documents")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: must be at least 0")


def text_bytes(document: Any) -> int:
    """Length of a text, or of a row's text, in bytes of UTF-8: proportional to tokens, near enough."""
    return len((document if isinstance(document, str) else document["text"]).encode())


class Share(NamedTuple):
    """What one source gave so far."""

    documents: int
    length: int
    """in the mixture's unit of length, by default bytes"""
    share: float
    """of the length given by all"""
    epochs: float
    """passes over the source"""


class MixedStream:
    """An endless stream of documents from several sources; itself a `DocumentSource`.

    The sequence is a pure function of the settings and the sources, and its state is a few numbers, so a run that
    stops goes on with the very document that would have come next.
    """

    def __init__(
        self,
        sources: Mapping[str, DocumentSource],
        settings: MixtureSettings,
        *,
        length: Callable[[Any], int] = text_bytes,
    ) -> None:
        """Begin where the sources stand.

        Args:
            sources: by name; a source must not be in two streams.
            settings: weights for exactly these names.
            length: of a document, for weights by tokens; for exact shares of tokens pass a tokenizer's count.

        Raises:
            ValueError: the weights name other sources.
        """
        check_weights(settings.weights, sources)
        self.sources, self.settings, self.length = dict(sources), settings, length
        weights = normalized(settings.weights)
        self._names = list(self.sources)
        self._weights = np.array([weights[name] for name in self._names])
        self._documents = np.zeros(len(self._names), np.int64)
        self._lengths = np.zeros(len(self._names), np.int64)
        self._draws: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    @property
    def epoch(self) -> float:
        """Passes over the source that was repeated most."""
        return max(source.epoch for source in self.sources.values())

    @property
    def shares(self) -> dict[str, Share]:
        """What each source gave so far, by name."""
        total = max(1, int(self._lengths.sum()))
        return {
            name: Share(int(n), int(length), int(length) / total, self.sources[name].epoch)
            for name, n, length in zip(self._names, self._documents, self._lengths, strict=True)
        }

    def next(self) -> Any:
        """The next document."""
        return self.next_named()[1]

    def next_named(self) -> tuple[str, Any]:
        """The name of the next document's source, and the document."""
        index = self._furthest_behind() if self.settings.unit == "tokens" else self._drawn()
        document = self.sources[self._names[index]].next()
        self._documents[index] += 1
        self._lengths[index] += self.length(document)
        return self._names[index], document

    def _furthest_behind(self) -> int:
        return int(np.argmax(self._weights * self._lengths.sum() - self._lengths))

    def _drawn(self) -> int:
        """The source of document number k, by the k-th of random numbers made in blocks of their own seeds."""
        block, place = divmod(int(self._documents.sum()), DRAWS)
        if self._draws[0] != block:
            generator = np.random.default_rng((self.settings.seed, block))
            self._draws = block, generator.choice(len(self._names), size=DRAWS, p=self._weights)
        return int(self._draws[1][place])

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self.next()

    def _identity(self) -> dict[str, Any]:
        return {
            "names": self._names,
            "weights": [float(weight) for weight in self._weights],
            "unit": self.settings.unit,
            "seed": self.settings.seed,
        }

    def state_dict(self) -> dict[str, Any]:
        """Counts so far and the state of every source, as plain data."""
        return self._identity() | {
            "documents": self._documents.tolist(),
            "lengths": self._lengths.tolist(),
            "sources": {name: source.state_dict() for name, source in self.sources.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position.

        Raises:
            ValueError: the state belongs to another mixture, or to another source under the same name.
        """
        check_identity("mixture", state, self._identity())
        for name, source in self.sources.items():
            source.load_state_dict(state["sources"][name])
        self._documents = np.array(state["documents"], np.int64)
        self._lengths = np.array(state["lengths"], np.int64)
