"""Tinytown: a corpus whose truth is known, to the last bit.

A town is drawn from a seed: residents with six attributes each. Its documents are written by four grammars,
and every choice of a grammar is visible in the text. So a document has exactly one derivation, and its
information content is exact: `Document.bits` = -log2 of the probability that the town writes this very text
(Shannon 1948). The mean over documents is the entropy of the corpus, the floor that no model's loss can pass,
however large. `Town.parse` recovers the bits from the text alone.

Examples of the four kinds, from `Town(0)`:

Story:
    Jane and Max lived near the forest and the garden. Jane stood in the forest. Max stood in the garden. The
    rope lay in the forest. Max held the cup. Max put down the cup in the garden. Jane went from the forest to
    the garden. Jane picked up the cup in the garden. Jane handed Max the cup in the garden. Jane walked from
    the garden to the forest. In the end, the rope was in the forest.
Record:
    Susan Day's instrument is the cello. Susan Day is a baker by trade. Susan Day likes to eat eggs. She grew
    up in Bonn. She takes care of a snake.
Sum:
    83 - 26: 13-6=7, 7-2=5, 57
    62 + 11 = 73
Dialogue:
    "Shall we meet in the park on Thursday at 7?" Julia asked Ella. "I do not like the park, but the kitchen is
    nice," Ella said. "Fine, I will see you in the kitchen on Thursday at 7," Julia said.

Facts of residents cost no bits: they belong to the town, not to the document. A model that has not learned
them pays up to 4 bits for each. Held-out residents, wordings and sums are in no document.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from llmcourse.data import town_probes
from llmcourse.data.town_choices import Choose, Sampler, every_outcome, stream
from llmcourse.data.town_dialogues import Dialogues
from llmcourse.data.town_probes import Probe
from llmcourse.data.town_records import Records, Resident, draw_residents
from llmcourse.data.town_rewards import Judge, Judgement, Preference, prefer
from llmcourse.data.town_settings import KINDS, TownSettings
from llmcourse.data.town_stories import Stories
from llmcourse.data.town_story_reader import StoryScore
from llmcourse.data.town_sums import Sums

# Purposes of random streams: no two uses of one seed share their numbers.
_RESIDENTS, _SUMS, _DOCUMENTS, _ENTROPY, _PROBES = range(5)


@dataclass(frozen=True)
class Document:
    """A text of the town."""

    text: str
    kind: str
    """One of `KINDS`: "story", "record", "sum", "dialogue"."""
    bits: float
    """Information content: -log2 of the probability of this text under the town, choice of kind included."""
    facts: dict[str, Any]
    """What the text says, by kind; see the grammars' `write`."""


class Encoder(Protocol):
    """Anything that turns a text into tokens."""

    def encode(self, text: str) -> Sequence[int]:
        """Return the ids of the text's tokens."""
        ...


@dataclass(frozen=True)
class Entropy:
    """An estimated mean with its standard error, in bits per document."""

    bits: float
    standard_error: float
    documents: int


class Town:
    """A town and everything that can be said in it.

    Args:
        seed: which town; the residents, their facts and the held-out sums follow from it.
        n_residents: residents that documents speak of.
        n_held_out: further residents of whom no document speaks.
        settings: sizes of the grammars.

    Raises:
        ValueError: if the seed is negative or there are fewer names than residents.
    """

    def __init__(
        self,
        seed: int = 0,
        n_residents: int = 256,
        n_held_out: int = 32,
        settings: TownSettings | None = None,
    ) -> None:
        self.seed = seed
        self.settings = settings = settings or TownSettings()
        self.residents = draw_residents(stream(seed, _RESIDENTS), n_residents, n_held_out, settings)
        told_of = self.residents[:n_residents]
        self.stories = Stories(settings)
        self.records = Records(told_of, settings)
        self.sums = Sums(settings, stream(seed, _SUMS))
        self.dialogues = Dialogues(told_of, settings)
        self._grammars = {
            "story": self.stories, "record": self.records, "sum": self.sums, "dialogue": self.dialogues,
        }  # fmt: skip
        self._judge = Judge(self.residents, self.stories, self.records, self.dialogues)
        total = sum(settings.weights.values())
        self._kind_bits = {kind: -math.log2(w / total) for kind, w in settings.weights.items() if w > 0.0}

    # Documents ----------------------------------------------------------------------------------------------

    def sample(self, rng: random.Random, kinds: Sequence[str] | None = None) -> Document:
        """Draw one document. See `documents`."""
        return next(self._draw(rng, kinds))

    def documents(
        self, n: int | None, seed: int = 0, kinds: Sequence[str] | None = None
    ) -> Iterator[Document]:
        """Draw n independent documents (None: without end); the same ones for the same town and seed.

        Args:
            n: how many documents.
            seed: which stream of documents.
            kinds: draw only these kinds, at their relative weights. The bits stay those of the whole town.

        Raises:
            ValueError: if a kind is unknown or has weight zero, or n or the seed is negative.
        """
        if n is not None and n < 0:
            raise ValueError(f"n={n} documents: use 0 or more, or None for no end")
        return itertools.islice(self._draw(stream(self.seed, _DOCUMENTS, seed), kinds), n)

    def _draw(self, rng: random.Random, kinds: Sequence[str] | None) -> Iterator[Document]:
        wanted = list(self._kind_bits) if kinds is None else list(kinds)
        if not wanted:
            raise ValueError(f"kinds is empty: use some of {', '.join(self._kind_bits)}, or None for all")
        for kind in wanted:
            if kind not in self._kind_bits:
                raise ValueError(f"kind {kind!r}: use some of {', '.join(self._kind_bits)}")
        return self._endless(rng, wanted)

    def _endless(self, rng: random.Random, kinds: list[str]) -> Iterator[Document]:
        shares = list(itertools.accumulate(self.settings.weights[kind] for kind in kinds))
        choose = Sampler(rng)
        while True:
            point = rng.random() * shares[-1]
            kind = next(kind for kind, share in zip(kinds, shares, strict=True) if point < share)
            choose.bits = self._kind_bits[kind]
            text, facts = self._grammars[kind].write(choose)
            yield Document(text, kind, choose.bits, facts)

    def parse(self, text: str) -> Document:
        """Recover a document from its text alone, its bits included.

        Raises:
            ValueError: if the town cannot write this text.
        """
        kind = guess_kind(text)
        if kind not in self._kind_bits:
            raise ValueError(f"the town writes no documents of kind {kind!r}")
        bits, facts = self._grammars[kind].read(text)
        return Document(text, kind, bits + self._kind_bits[kind], facts)

    def every_document(self, kinds: Sequence[str] | None = None) -> Iterator[tuple[Document, float]]:
        """All documents with their probabilities. Only for small settings: the numbers grow exponentially."""
        for kind in self._kind_bits if kinds is None else kinds:
            grammar, share = self._grammars[kind], 2.0 ** -self._kind_bits[kind]

            def write(choose: Choose, grammar: Any = grammar) -> tuple[str, dict[str, Any]]:
                return grammar.write(choose)

            for (text, facts), probability in every_outcome(write):
                yield Document(text, kind, -math.log2(share * probability), facts), share * probability

    # Truth --------------------------------------------------------------------------------------------------

    def entropy(self, n: int = 20_000, seed: int = 0) -> Entropy:
        """Entropy of a document, in bits: the mean information of n fresh documents, with its standard error.

        Raises:
            ValueError: if n is below 2.
        """
        if n < 2:
            raise ValueError(f"n={n}: a standard error needs 2 documents or more")
        draws = self._draw(stream(self.seed, _ENTROPY, seed), None)
        bits = [document.bits for document in itertools.islice(draws, n)]
        return Entropy(statistics.fmean(bits), statistics.stdev(bits) / math.sqrt(n), n)

    def score_story(self, text: str, prompt: str = "") -> StoryScore:
        """Judge a story, or a model's continuation of `prompt`. Sentences count from the prompt's first."""
        return self.stories.score(prompt + text)

    def fact_probes(
        self,
        n: int | None = None,
        seed: int = 0,
        held_out_template: bool = False,
        held_out_residents: bool = False,
    ) -> list[Probe]:
        """Facts of residents by completion: "Anna Miller works as a" -> " baker".

        Args:
            n: how many, drawn without repetition; None for all.
            seed: which draw.
            held_out_template: ask in the wording that no document uses.
            held_out_residents: ask about residents of whom no document speaks: a model can only guess.

        Raises:
            ValueError: if there are fewer than n probes.
        """
        residents = [resident for resident in self.residents if resident.held_out == held_out_residents]
        rng = stream(self.seed, _PROBES, seed, 0)
        return town_probes.fact_probes(self.records, residents, n, rng, held_out_template)

    def sum_probes(
        self, n: int | None = None, seed: int = 0, held_out: bool = True, worked: bool = False
    ) -> list[Probe]:
        """Sums by completion: "37 + 48 =" -> " 85", or with `worked` "37 + 48:" -> " 7+8=15, 3+4+1=8, 85".

        Args:
            n: how many, drawn without repetition; None for all.
            seed: which draw.
            held_out: pairs of operands that no document shows, or else pairs that documents may show.
            worked: ask for the steps as well.

        Raises:
            ValueError: if there are fewer than n probes.
        """
        return town_probes.sum_probes(self.sums, n, stream(self.seed, _PROBES, seed, 1), held_out, worked)

    def story_probes(self, n: int, seed: int = 0) -> list[Probe]:
        """Closing sentences of fresh stories: "... In the end, the ball was" -> " with Ben"."""
        return town_probes.story_probes(self.stories, n, stream(self.seed, _PROBES, seed, 2))

    def judge(self, text: str, prompt: str = "") -> Judgement:
        """Judge any text, or a model's continuation of `prompt`, by the town's facts and rules."""
        whole = (prompt + text).strip()
        return self._judge.judge(whole, guess_kind(whole))

    def true_reward(self, text: str, prompt: str = "") -> float:
        """The true reward of a text, or of a model's continuation of `prompt`. See `Judgement.reward`."""
        return self.judge(text, prompt).reward

    def preference(self, prompt: str, a: str, b: str, noise: float, rng: random.Random) -> Preference:
        """Choose between two continuations of a prompt by their true reward, with mistakes. See `prefer`.

        Raises:
            ValueError: if the noise is negative.
        """
        return prefer(a, b, self.true_reward(a, prompt), self.true_reward(b, prompt), noise, rng)


def guess_kind(text: str) -> str:
    """The kind of document that a text, right or wrong, is an attempt at, by how it begins."""
    if text[:1].isdigit():
        return "sum"
    if text.startswith(('"', "Notice:", "Lost:")) or " asked " in text.partition(".")[0]:
        return "dialogue"
    return "story" if " lived near " in text.partition(".")[0] else "record"


def entropy_per_token(documents: Iterable[Document], tokenizer: Encoder) -> float:
    """Entropy of documents in bits per token of a tokenizer: their bits over their tokens.

    One end-of-text token per document is counted, since a document's end is among its choices. Times ln 2
    this is the floor of the next-token loss in nats per token.

    Raises:
        ValueError: if there are no documents.
    """
    bits, tokens = 0.0, 0
    for document in documents:
        bits += document.bits
        tokens += len(tokenizer.encode(document.text)) + 1
    if tokens == 0:
        raise ValueError("no documents: entropy_per_token needs one at least")
    return bits / tokens


__all__ = [
    "KINDS", "Document", "Encoder", "Entropy", "Judgement", "Preference", "Probe", "Resident", "StoryScore", "Town",
    "TownSettings", "entropy_per_token", "guess_kind",
]  # fmt: skip
