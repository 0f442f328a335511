"""Sizes of Tinytown's grammars: words in each pool, lengths and frequencies of each kind of text."""

from __future__ import annotations

from dataclasses import dataclass

from llmcourse.data import town_words as words

KINDS: tuple[str, ...] = ("story", "record", "sum", "dialogue")
Range = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class TownSettings:
    """Every size of the grammars. The defaults are the corpus of the course; small values make it enumerable.

    Raises:
        ValueError: if a size is outside what the pools and the grammars allow.
    """

    story_weight: float = 0.34
    """Relative frequency of stories among documents (about 43 % of the tokens)."""
    record_weight: float = 0.33
    """Relative frequency of records (about 25 % of the tokens)."""
    sum_weight: float = 0.23
    """Relative frequency of documents of sums (about 23 % of the tokens)."""
    dialogue_weight: float = 0.10
    """Relative frequency of dialogues and notices (about 9 % of the tokens)."""
    first_names: int = len(words.FIRST_NAMES)
    """First names in use, 2 at least."""
    last_names: int = len(words.LAST_NAMES)
    """Last names in use."""
    values: int = 16
    """Values of each of the six attributes of a resident: a fact carries log2(values) bits."""
    objects: int = len(words.OBJECTS)
    """Objects that stories draw from."""
    places: int = len(words.PLACES)
    """Places that stories and dialogues draw from, 2 at least."""
    moods: int = len(words.MOODS)
    """Moods that characters can feel, 2 at least."""
    days: int = len(words.DAYS)
    """Days of the week in use, 2 at least."""
    hours: int = len(words.HOURS)
    """Hours of the day in use, 2 at least."""
    shops: int = len(words.SHOPS)
    """Shops of the notices, 2 at least."""
    paraphrases: int = 4
    """Most paraphrases in use of any one statement."""
    story_characters: Range = (2, 2)
    """Fewest and most characters of a story."""
    story_objects: Range = (1, 2)
    """Fewest and most objects of a story."""
    story_places: Range = (2, 3)
    """Fewest and most places of a story, 2 at least."""
    story_events: Range = (2, 5)
    """Fewest and most events between the opening and the closing sentence of a story."""
    record_facts: Range = (3, 6)
    """Fewest and most facts of a record."""
    sums: Range = (1, 4)
    """Fewest and most sums of a document of sums."""
    largest_operand: int = 99
    """Operands of sums are 0 to this number, 99 at most (the worked form has tens and units)."""
    held_out_sums: float = 0.1
    """Fraction of the pairs of operands that no training document shows."""

    def __post_init__(self) -> None:
        """Check every field."""
        pools = {
            "first_names": (2, len(words.FIRST_NAMES)), "last_names": (1, len(words.LAST_NAMES)),
            "values": (2, 16), "objects": (1, len(words.OBJECTS)), "places": (2, len(words.PLACES)),
            "moods": (2, len(words.MOODS)), "days": (2, len(words.DAYS)), "hours": (2, len(words.HOURS)),
            "shops": (2, len(words.SHOPS)), "paraphrases": (1, 4), "largest_operand": (1, 99),
        }  # fmt: skip
        for name, (low, high) in pools.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}={getattr(self, name)}: use {low} to {high}")
        ranges = {
            "story_characters": (1, self.first_names), "story_objects": (1, self.objects),
            "story_places": (2, self.places), "story_events": (1, 1000),
            "record_facts": (1, len(words.ATTRIBUTES)), "sums": (1, 1000),
        }  # fmt: skip
        for name, (low, high) in ranges.items():
            first, last = getattr(self, name)
            if not low <= first <= last <= high:
                raise ValueError(f"{name}={(first, last)}: use an increasing pair within {low} to {high}")
        if not 0.0 <= self.held_out_sums <= 0.9:
            raise ValueError(f"held_out_sums={self.held_out_sums}: use a fraction from 0 to 0.9")
        if any(weight < 0.0 for weight in self.weights.values()) or sum(self.weights.values()) <= 0.0:
            raise ValueError(f"document weights {self.weights}: use non-negative numbers, not all zero")

    @property
    def weights(self) -> dict[str, float]:
        """Relative frequency of each kind of document, as given."""
        return {kind: getattr(self, f"{kind}_weight") for kind in KINDS}


def range_size(limits: Range) -> int:
    """How many whole numbers the closed range holds."""
    return limits[1] - limits[0] + 1
