"""Records of Tinytown: a resident's facts, in a drawn order, each in one of several wordings.

The facts belong to the town and are fixed: only who is told about, which facts, in which order and wording,
are choices. One wording of each attribute is kept out of all documents, to ask a model for what it knows in
words that it has not seen.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

from llmcourse.data import town_words as words
from llmcourse.data.town_choices import Choose, order_bits
from llmcourse.data.town_settings import TownSettings, range_size

# {S} is the subject (full name, or She/He), {P} the possessive (name's, or Her/His), {v} the value.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "occupation": (
        "{S} works as a {v}.", "{P} job is that of a {v}.", "{S} is a {v} by trade.",
        "{S} earns a living as a {v}.",
    ),
    "street": (
        "{S} lives on {v} Street.", "{P} home is on {v} Street.", "{S} has a house on {v} Street.",
        "{S} walks along {v} Street to get home.",
    ),
    "birthplace": (
        "{S} was born in {v}.", "{P} place of birth is {v}.", "{S} came from {v} as a child.",
        "{S} grew up in {v}.",
    ),
    "pet": (
        "{S} has a pet {v}.", "{P} pet is a {v}.", "{S} keeps a {v} at home.", "{S} takes care of a {v}.",
    ),
    "food": (
        "{S} likes to eat {v}.", "{P} favorite food is {v}.", "{S} eats {v} every week.",
        "{S} never says no to {v}.",
    ),
    "instrument": (
        "{S} plays the {v}.", "{P} instrument is the {v}.", "{S} practices the {v} every day.",
        "{S} is learning the {v}.",
    ),
}  # fmt: skip
HELD_OUT_TEMPLATES: dict[str, str] = {
    "occupation": "{S} makes money as a {v}.",
    "street": "{S} can be found on {v} Street.",
    "birthplace": "{S} is a native of {v}.",
    "pet": "{S} owns a {v}.",
    "food": "{S} loves the taste of {v}.",
    "instrument": "{S} performs on the {v}.",
}


@dataclass(frozen=True)
class Resident:
    """A resident of the town."""

    first_name: str
    last_name: str
    facts: dict[str, str]
    """Attribute -> value, for all six attributes (see `town_words.ATTRIBUTES`)."""
    held_out: bool
    """Whether no document speaks of this resident."""

    @property
    def name(self) -> str:
        """Full name, unique in the town."""
        return f"{self.first_name} {self.last_name}"

    @property
    def pronouns(self) -> tuple[str, str]:
        """Subject and possessive as they start a sentence."""
        return ("She", "Her") if words.is_female(self.first_name) else ("He", "His")


def draw_residents(
    rng: random.Random, n_residents: int, n_held_out: int, settings: TownSettings
) -> list[Resident]:
    """Draw residents with different full names and independent, uniform facts; the held-out ones come last.

    Raises:
        ValueError: if there are fewer full names than residents.
    """
    firsts, lasts = words.FIRST_NAMES[: settings.first_names], words.LAST_NAMES[: settings.last_names]
    names = [(first, last) for first in firsts for last in lasts]
    total = n_residents + n_held_out
    if not 1 <= n_residents or n_held_out < 0 or total > len(names):
        sizes = f"n_residents={n_residents}, n_held_out={n_held_out}"
        raise ValueError(f"{sizes}: use 1 resident or more, at most {len(names)} in all")
    residents = []
    for i in range(total):
        first, last = names.pop(int(rng.random() * len(names)))
        facts = {
            attribute: values[int(rng.random() * settings.values)]
            for attribute, values in words.ATTRIBUTES.items()
        }
        residents.append(Resident(first, last, facts, held_out=i >= n_residents))
    return residents


@dataclass(frozen=True)
class Statement:
    """One sentence of a record, understood."""

    attribute: str
    value: str
    name: str | None
    """Full name, if the sentence has it."""
    pronoun: str | None
    """Its pronoun, as written, otherwise."""
    held_out_template: bool


class Records:
    """The grammar of records. `residents` are those that documents speak of."""

    def __init__(self, residents: list[Resident], settings: TownSettings) -> None:
        self.settings = settings
        self.residents = residents
        self.templates = {
            attribute: wordings[: settings.paraphrases] for attribute, wordings in TEMPLATES.items()
        }
        self._by_name = {resident.name: resident for resident in residents}
        names = {
            "first": words.FIRST_NAMES[: settings.first_names],
            "last": words.LAST_NAMES[: settings.last_names],
        }
        values = {attribute: pool[: settings.values] for attribute, pool in words.ATTRIBUTES.items()}
        self._classes = words.WordClasses(names | values)
        self._by_skeleton = self._index()
        # All sentences, made once: resident -> attribute -> wording -> (with the name, with the pronoun).
        self._sentences = [self._sentences_about(resident) for resident in residents]

    def _index(self) -> dict[str, tuple[str, str | None, bool]]:
        """Skeleton -> (attribute, pronoun or None for a name, whether the wording is held out)."""
        index: dict[str, tuple[str, str | None, bool]] = {}
        for attribute, wordings in self.templates.items():
            for wording in (*wordings, HELD_OUT_TEMPLATES[attribute]):
                held_out = wording not in wordings
                value = f"<{attribute}>"
                named = wording.format(S="<first> <last>", P="<first> <last>'s", v=value)
                index[named] = (attribute, None, held_out)
                for subject, possessive in (("She", "Her"), ("He", "His")):
                    pronoun = subject if "{S}" in wording else possessive
                    index[wording.format(S=subject, P=possessive, v=value)] = (attribute, pronoun, held_out)
        return index

    def _sentences_about(self, resident: Resident) -> list[list[tuple[str, str]]]:
        subject, possessive = resident.pronouns
        return [
            [
                (
                    wording.format(S=resident.name, P=f"{resident.name}'s", v=resident.facts[attribute]),
                    wording.format(S=subject, P=possessive, v=resident.facts[attribute]),
                )
                for wording in wordings
            ]
            for attribute, wordings in self.templates.items()
        ]

    def write(self, choose: Choose) -> tuple[str, dict[str, Any]]:
        """Write a record; return its text and `resident` and the facts that it states."""
        i = choose(len(self.residents))
        sentences = self._sentences[i]
        low, high = self.settings.record_facts
        attributes = list(range(len(self.templates)))
        names = list(self.templates)
        facts = {"resident": self.residents[i].name}
        said = []
        for position in range(low + choose(high - low + 1)):
            attribute = attributes.pop(choose(len(attributes)))
            wordings = sentences[attribute]
            wording = wordings[choose(len(wordings))]
            said.append(wording[choose(2)] if position else wording[0])  # the first sentence has the name
            facts[names[attribute]] = self.residents[i].facts[names[attribute]]
        return " ".join(said), facts

    def understand(self, sentence: str) -> Statement | None:
        """Read one sentence, true or not; None if no wording fits."""
        skeleton, found = self._classes.skeleton(sentence)
        if skeleton not in self._by_skeleton:
            return None
        attribute, pronoun, held_out = self._by_skeleton[skeleton]
        name = None if pronoun else " ".join(found[:2])
        return Statement(attribute, found[-1], name, pronoun, held_out)

    def read(self, text: str) -> tuple[float, dict[str, Any]]:
        """Recover a record's information in bits and its facts from its text alone.

        Raises:
            ValueError: if the grammar cannot write this text.
        """
        sentences = text.split(". ")
        sentences = [sentence + "." for sentence in sentences[:-1]] + sentences[-1:]
        low, high = self.settings.record_facts
        bits = math.log2(len(self.residents)) + math.log2(range_size((low, high)))
        facts: dict[str, str] = {}
        resident = None
        for i, sentence in enumerate(sentences):
            said = self.understand(sentence)
            if said is None or said.held_out_template:
                raise ValueError(f"not a record: sentence {i} fits no wording: {sentence!r}")
            if i == 0:
                resident = self._by_name.get(said.name or "")
            if resident is None:
                raise ValueError(f"not a record: no resident that records speak of: {sentence!r}")
            subject = said.name == resident.name or said.pronoun in resident.pronouns
            if not subject or resident.facts[said.attribute] != said.value or said.attribute in facts:
                raise ValueError(f"not a record: sentence {i} is untrue or repeated: {sentence!r}")
            facts[said.attribute] = said.value
            bits += math.log2(len(self.templates[said.attribute])) + (1.0 if i else 0.0)
        if not low <= len(facts) <= high:
            raise ValueError(f"not a record: {len(facts)} facts, outside {low} to {high}")
        assert resident is not None
        return bits + order_bits(len(self.templates), len(facts)), {"resident": resident.name} | facts
