"""The true reward of a text, and an annotator who prefers the better of two texts, with a known noise.

Reward models and policies of later chapters see only the annotator's choices; the reward behind them is this
function, so what they learn can be compared with what is true.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from llmcourse.data.town_dialogues import Dialogues
from llmcourse.data.town_records import Records, Resident
from llmcourse.data.town_stories import Stories
from llmcourse.data.town_sums import Sums
from llmcourse.data.town_words import split_sentences

# About the mean lengths of the corpus, in words between white space: no text is rewarded for going on.
TARGET_WORDS: dict[str, int] = {"story": 57, "record": 28, "sum": 14, "dialogue": 34}


@dataclass(frozen=True)
class Judgement:
    """What is right in a text."""

    kind: str
    """The kind of document that the text attempts."""
    statements: int
    """Statements that can be right or wrong: sentences of a story or record, sums, one for a dialogue."""
    right: int
    """Those that are possible or true, by the town's own facts and rules."""
    grammatical: bool
    """Whether every sentence is one that the grammars can say."""
    words: int
    """Words between white space."""

    @property
    def reward(self) -> float:
        """The true reward, at most 3.

        1 for grammar, plus 2 times the fraction of right statements, minus |ln(words / target words)|, that
        is 0.69 for a text half or twice as long as its kind should be. An empty text has -3.
        """
        if self.words == 0:
            return -3.0
        length = abs(math.log(self.words / TARGET_WORDS[self.kind]))
        return float(self.grammatical) + 2.0 * self.right / self.statements - length


@dataclass(frozen=True)
class Preference:
    """An annotator's choice between two texts."""

    chosen: str
    rejected: str
    margin: float
    """True reward of the chosen minus that of the rejected text."""

    @property
    def is_mistake(self) -> bool:
        """Whether the annotator took the worse text."""
        return self.margin < 0.0


class Judge:
    """Judges texts by the facts of `residents` (held-out ones included) and the rules of the grammars."""

    def __init__(
        self, residents: list[Resident], stories: Stories, records: Records, dialogues: Dialogues
    ) -> None:
        self._by_name = {resident.name: resident for resident in residents}
        self._stories, self._records, self._dialogues = stories, records, dialogues

    def judge(self, text: str, kind: str) -> Judgement:
        """Judge a text as a document of a kind. White space at its ends is free."""
        text = text.strip()
        count = {"story": self._story, "record": self._record, "sum": self._sums, "dialogue": self._dialogue}
        statements, right, grammatical = count[kind](text)
        return Judgement(kind, statements, right, grammatical, len(text.split()))

    def _story(self, text: str) -> tuple[int, int, bool]:
        score = self._stories.score(text)
        missing = score.sentence == score.sentences  # the closing sentence, or the rest of a sentence
        statements = max(1, score.sentences + missing)
        return statements, max(0, statements - score.wrong), score.grammatical

    def _record(self, text: str) -> tuple[int, int, bool]:
        sentences, rest = split_sentences(text)
        resident: Resident | None = None
        said: set[str] = set()
        right, grammatical = 0, text == " ".join(sentences)
        for sentence in sentences:
            statement = self._records.understand(sentence)
            if statement is None or (statement.name is None and not said):
                grammatical = False  # nobody can tell who "she" is before a name
                continue
            if statement.name is not None:
                resident = self._by_name.get(statement.name)
            known = resident is not None and statement.pronoun in (None, *resident.pronouns)
            true = known and resident is not None and resident.facts[statement.attribute] == statement.value
            right += true and statement.attribute not in said
            said.add(statement.attribute)
        return max(1, len(sentences) + bool(rest)), right, grammatical

    @staticmethod
    def _sums(text: str) -> tuple[int, int, bool]:
        lines = text.split("\n")
        read = [(Sums.understand(line), line) for line in lines]
        right = sum(one is not None and line in (one.plain, one.worked) for one, line in read)
        return len(lines), right, all(one is not None for one, _ in read)

    def _dialogue(self, text: str) -> tuple[int, int, bool]:
        try:
            self._dialogues.read(text)
        except ValueError:
            return 1, 0, self._dialogues.is_grammatical(text)
        return 1, 1, True


def prefer(a: str, b: str, reward_a: float, reward_b: float, noise: float, rng: random.Random) -> Preference:
    """Choose between two texts as a Bradley-Terry annotator (Bradley and Terry 1952).

    Args:
        a: a text.
        b: another.
        reward_a: the true reward of a.
        reward_b: the true reward of b.
        noise: a is chosen with probability sigmoid((reward_a - reward_b) / noise); 0 always chooses the better
            one, and any of the two with equal chance if they are equally good.
        rng: source of the annotator's mistakes.

    Raises:
        ValueError: if the noise is negative.
    """
    if noise < 0.0:
        raise ValueError(f"noise={noise}: use 0 for a perfect annotator or a positive number")
    difference = reward_a - reward_b
    if noise == 0.0 or abs(difference) / noise > 500.0:
        chance = 0.5 if difference == 0.0 else float(difference > 0.0)
    else:
        chance = 1.0 / (1.0 + math.exp(-difference / noise))
    return Preference(a, b, difference) if rng.random() < chance else Preference(b, a, -difference)
