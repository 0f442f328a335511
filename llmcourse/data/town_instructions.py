"""What one can ask an assistant of Tinytown: four tasks whose right answers are known, and the scorer of each.

Facts: "What is Jane Day's job?" -> "Jane Day works as a baker.", known from pre-training only (closed book).
Reading: a story without its last sentence, "Where is the rope in the end?" -> "In the end, the rope was in the forest."
Sums: "What is 37 + 48?" -> "37 + 48 = 85", or step by step -> "37 + 48: 7+8=15, 3+4+1=8, 85".
Constraints: "Write exactly two sentences about Jane Day.", "Tell a story with Anna and the kite.", "Write two sentences
about Jane Day, but nothing about the street.": any text that satisfies them is right.

Answers are sentences of the corpus, so what is new to a pre-trained model is to be asked. Held-out questions are about
residents, stories, sums and pairs of words that no training question touches; the facts behind them are in the
documents of pre-training, and the sums are not.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from llmcourse.data import town_words as words
from llmcourse.data.tinytown import Resident, Town
from llmcourse.data.town_choices import Sampler, stream
from llmcourse.data.town_questions import EXCLUDING, FACTS, READING, STEPS, STORIES, SUMS, WRITING
from llmcourse.data.town_records import TEMPLATES
from llmcourse.data.town_story_language import CLOSINGS
from llmcourse.data.town_sums import OPERATIONS, Sum

__all__ = [
    "TASKS",
    "Constraint",
    "TownInstruction",
    "TownInstructions",
    "TownInstructionSettings",
    "final_number",
]

TASKS = ("facts", "reading", "sums", "constraints")
NUMBERS = ("one", "two", "three", "four")
_RESIDENTS, _TRAINING, _HELD_OUT = 101, 102, 103  # purposes of random streams, apart from the town's own
_WORD = re.compile(r"[A-Za-z]+|[0-9]+")
T = TypeVar("T")


@dataclass(frozen=True)
class Constraint:
    """What a text must be like, whatever it says."""

    sentences: int | None = None
    """exact number of sentences; `None` for any"""
    required: tuple[str, ...] = ()
    """words that must occur"""
    forbidden: tuple[str, ...] = ()
    """words that must not occur"""

    def holds(self, text: str) -> bool:
        """Whether a text satisfies it; an empty text or one that breaks off within a sentence never does."""
        sentences, rest = words.split_sentences(text.strip())
        if rest or not sentences or not all(_WORD.search(sentence) for sentence in sentences):
            return False
        found = set(_WORD.findall(text))
        right_number = self.sentences in (None, len(sentences))
        return right_number and found.issuperset(self.required) and found.isdisjoint(self.forbidden)


@dataclass(frozen=True, kw_only=True)
class TownInstruction:
    """A request with a right answer and the means to tell whether another answer is right."""

    task: str
    """one of `TASKS`"""
    variety: str
    """what is asked within the task: an attribute, a kind of closing, "+ steps", "exclude" and so on"""
    messages: tuple[dict[str, str], ...]
    """the conversation so far; the last message is the user's"""
    answer: str
    """a right answer; for constraints one of many"""
    constraint: Constraint | None = None
    """for the task "constraints" """
    story: str = ""
    """for the task "reading": the story that is asked about"""

    @property
    def conversation(self) -> list[dict[str, str]]:
        """The messages and the right answer, to learn from."""
        return [*self.messages, {"role": "assistant", "content": self.answer}]

    def is_right(self, completion: str) -> bool:
        """Whether an answer is right; white space at its ends is free.

        Facts and reading: it is the right answer, letter for letter. Sums: it ends with the right number. Constraints:
        they hold.
        """
        if self.task == "constraints":
            assert self.constraint is not None
            return self.constraint.holds(completion)
        if self.task == "sums":
            return final_number(completion) == final_number(self.answer)
        return completion.strip() == self.answer


def final_number(text: str) -> str | None:
    """The number that a text ends with, as written, a full stop after it allowed; None if it ends otherwise.

    >>> final_number("37 + 48: 7+8=15, 3+4+1=8, 85."), final_number("85 it is")
    ('85', None)
    """
    match = re.search(r"(?<![0-9])-?[0-9]+(?=\.?\s*$)", text)
    return match.group() if match else None


@dataclass(frozen=True, kw_only=True)
class TownInstructionSettings:
    """What is asked, and how often.

    Raises:
        ValueError: a share outside its range, or all weights zero.
    """

    facts_weight: float = 0.3
    """relative frequency of questions about residents"""
    reading_weight: float = 0.25
    """relative frequency of questions about a story"""
    sums_weight: float = 0.25
    """relative frequency of sums"""
    constraints_weight: float = 0.2
    """relative frequency of texts with a constraint"""
    steps_share: float = 0.5
    """share of the sums that ask for the steps"""
    unasked_steps_share: float = 0.0
    """share of the other sums in training whose answer shows the steps all the same"""
    follow_up_share: float = 0.25
    """share of the questions about residents that follow another one, in the same conversation, with a pronoun"""
    held_out_share: float = 0.25
    """share of residents, stories and pairs of words that training questions leave out"""

    def __post_init__(self) -> None:
        for name in ("steps_share", "unasked_steps_share", "follow_up_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: give a fraction between 0 and 1")
        if not 0 < self.held_out_share < 1:
            raise ValueError(
                f"held_out_share={self.held_out_share}: give a fraction between 0 and 1, both excluded"
            )
        if min(self.weights.values()) < 0 or sum(self.weights.values()) <= 0:
            raise ValueError(f"weights {self.weights}: use non-negative numbers, not all zero")

    @property
    def weights(self) -> dict[str, float]:
        """Relative frequency of each task, as given."""
        return {task: getattr(self, f"{task}_weight") for task in TASKS}


ASSISTANT = TownInstructionSettings(unasked_steps_share=0.1)
"""what the course's assistant learns from: demonstrations of several hands, because reinforcement learning cannot find
a habit that none of them shows"""


class TownInstructions:
    """Everything that can be asked about a town, in a training part and a held-out part.

    Args:
        town: the town that wrote the documents of pre-training.
        settings: what is asked, and how often.

    Raises:
        ValueError: the town has too few residents for two parts.
    """

    def __init__(self, town: Town, settings: TownInstructionSettings | None = None) -> None:
        self.town, self.settings = town, settings or TownInstructionSettings()
        told_of = [resident for resident in town.residents if not resident.held_out]
        rng = stream(town.seed, _RESIDENTS)
        shuffled = [told_of[i] for _, i in sorted((rng.random(), i) for i in range(len(told_of)))]
        n_apart = max(1, round(self.settings.held_out_share * len(shuffled)))
        if n_apart >= len(shuffled):
            raise ValueError(f"{len(shuffled)} residents cannot be parted: make a larger town")
        self.residents = {True: shuffled[:n_apart], False: shuffled[n_apart:]}
        """residents by whether they are held out of the questions; all are in the documents"""
        self._write: dict[str, Callable[[random.Random, bool, bool], TownInstruction]] = {
            "facts": self._fact, "reading": self._reading, "sums": self._sum, "constraints": self._constraint,
        }  # fmt: skip

    def training(self, n: int, seed: int = 0, tasks: Sequence[str] = TASKS) -> list[TownInstruction]:
        """Draw n training requests, at the weights of the settings; the same ones for the same seed.

        Raises:
            ValueError: a negative n or seed, an unknown task, or tasks of weight zero only.
        """
        if n < 0:
            raise ValueError(f"n={n} requests: use 0 or more")
        weights = [self.settings.weights[_known(task)] for task in tasks]
        if sum(weights) <= 0:
            raise ValueError(f"tasks={tuple(tasks)}: they have weight zero, raise one in the settings")
        rng = stream(self.town.seed, _TRAINING, seed)
        return [self._write[_pick(rng, tasks, weights)](rng, False, False) for _ in range(n)]

    def held_out(self, task: str, n: int, seed: int = 0, *, reworded: bool = False) -> list[TownInstruction]:
        """Draw n different requests of one task that training leaves out; the same ones for the same seed.

        Args:
            task: one of `TASKS`.
            n: how many.
            seed: which draw.
            reworded: ask in the wording that no training request uses.

        Raises:
            ValueError: an unknown task, a negative n or seed, or there are fewer than n different ones.
        """
        if n < 0:
            raise ValueError(f"n={n} requests: use 0 or more")
        write, rng = self._write[_known(task)], stream(self.town.seed, _HELD_OUT, seed, TASKS.index(task))
        drawn: dict[str, TownInstruction] = {}
        for _ in range(100 * n):  # draws, most of them new as long as the pool is much larger than n
            one = write(rng, True, reworded)
            drawn.setdefault(repr(one.messages), one)
            if len(drawn) == n:
                break
        if len(drawn) < n:
            raise ValueError(
                f"n={n}: only {len(drawn)} held-out requests of {task!r} were found, ask for fewer"
            )
        return list(drawn.values())

    def reward(self, instruction: TownInstruction, completion: str) -> float:
        """The true reward of an answer: 2 if it is right, plus what the town thinks of it as a text.

        The town's part is `Judgement.reward` (grammar, truth of the statements, length), for reading of the story with
        the answer as its end. It is at most 5. This is what an annotator of preferences goes by.
        """
        prompt = f"{instruction.story} " if instruction.story else ""
        text = self.town.true_reward(completion.strip(), prompt) if completion.strip() else -3.0
        return 2.0 * instruction.is_right(completion) + text

    # One request of each task -------------------------------------------------------------------------------

    def _resident(self, rng: random.Random, held_out: bool) -> Resident:
        return _choice(rng, self.residents[held_out])

    def _fact(self, rng: random.Random, held_out: bool, reworded: bool) -> TownInstruction:
        resident = self._resident(rng, held_out)
        attributes = list(TEMPLATES)
        attribute = attributes.pop(int(rng.random() * len(attributes)))
        messages: list[dict[str, str]] = []
        follows = rng.random() < self.settings.follow_up_share
        if follows:
            before = _choice(rng, attributes)
            question = _ask(rng, FACTS[before], reworded).format(S=resident.name, P=f"{resident.name}'s")
            messages += [_user(question), _assistant(_fact_sentence(resident, before))]
        names = (resident.name, f"{resident.name}'s")
        subject, possessive = (word.lower() for word in resident.pronouns) if follows else names
        question = _ask(rng, FACTS[attribute], reworded).format(S=subject, P=possessive)
        variety = f"{attribute} follow-up" if follows else attribute
        answer = _fact_sentence(resident, attribute)
        return TownInstruction(
            task="facts", variety=variety, messages=(*messages, _user(question)), answer=answer
        )

    def _is_apart(self, text: str) -> bool:
        """Which part a text belongs to, by its checksum, so that the parts can never meet."""
        return zlib.crc32(text.encode()) < self.settings.held_out_share * 2**32

    def _reading(self, rng: random.Random, held_out: bool, reworded: bool) -> TownInstruction:
        while True:
            text, _ = self.town.stories.write(Sampler(rng))
            opening, _, _ = text.rpartition(" In the end, ")
            if (
                self._is_apart(opening) == held_out
            ):  # not the whole text: no story is asked about in both parts
                break
        closing = text.removeprefix(f"{opening} ")
        understood = self.town.stories.language.understand(closing, "closing")
        assert understood is not None
        what, values = understood
        question = _ask(rng, READING[what], reworded).format(**values)
        return TownInstruction(
            task="reading",
            variety=what,
            messages=(_user(f"{opening} {question}"),),
            answer=CLOSINGS[what].format(**values),
            story=opening,
        )

    def _sum(self, rng: random.Random, held_out: bool, reworded: bool) -> TownInstruction:
        sums = self.town.sums.held_out if held_out else self.town.sums.trained
        one: Sum = _choice(rng, sums[_choice(rng, [o for o in OPERATIONS if sums[o]])])
        steps = rng.random() < self.settings.steps_share
        question = _ask(rng, STEPS if steps else SUMS, reworded).format(
            sum=f"{one.a} {one.operation} {one.b}"
        )
        variety = f"{one.operation} steps" if steps else one.operation
        unasked = 0.0 if steps or held_out else self.settings.unasked_steps_share
        answer = one.worked if steps or (unasked and rng.random() < unasked) else one.plain
        return TownInstruction(task="sums", variety=variety, messages=(_user(question),), answer=answer)

    def _constraint(self, rng: random.Random, held_out: bool, reworded: bool) -> TownInstruction:
        kind = _choice(rng, ("count", "exclude", "include"))
        if kind == "include":
            return self._story_with(rng, held_out, reworded)
        resident = self._resident(rng, held_out)
        n = 1 + int(rng.random() * len(NUMBERS))
        attributes = [a for _, a in sorted((rng.random(), a) for a in TEMPLATES)]
        left_out = attributes.pop() if kind == "exclude" else None
        wordings = EXCLUDING if left_out else WRITING
        request = _ask(rng, wordings, reworded).format(
            n=NUMBERS[n - 1], s="" if n == 1 else "s", S=resident.name, a=left_out
        )
        forbidden = words.ATTRIBUTES[left_out] if left_out else ()
        constraint = Constraint(n, tuple(resident.name.split()), forbidden)
        answer = " ".join(self._sentences_about(rng, resident, attributes[:n]))
        return TownInstruction(
            task="constraints", variety=kind, messages=(_user(request),), answer=answer, constraint=constraint
        )

    def _sentences_about(self, rng: random.Random, resident: Resident, attributes: list[str]) -> list[str]:
        """True sentences, the first with the name and the others with a pronoun."""
        said = []
        for place, attribute in enumerate(attributes):
            subject, possessive = resident.pronouns if place else (resident.name, f"{resident.name}'s")
            wording = _choice(rng, self.town.records.templates[attribute])
            said.append(wording.format(S=subject, P=possessive, v=resident.facts[attribute]))
        return said

    def _story_with(self, rng: random.Random, held_out: bool, reworded: bool) -> TownInstruction:
        while True:
            text, facts = self.town.stories.write(Sampler(rng))
            name, thing = _choice(rng, list(facts["places"])), _choice(rng, list(facts["objects"]))
            if self._is_apart(f"{name} {thing}") == held_out:
                break
        request = _ask(rng, STORIES, reworded).format(c=name, o=thing)
        constraint = Constraint(None, (name, thing, "lived", "end"))
        return TownInstruction(
            task="constraints",
            variety="include",
            messages=(_user(request),),
            answer=text,
            constraint=constraint,
        )


def _known(task: str) -> str:
    if task not in TASKS:
        raise ValueError(f"task {task!r}: choose one of {', '.join(TASKS)}")
    return task


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _fact_sentence(resident: Resident, attribute: str) -> str:
    name, value = resident.name, resident.facts[attribute]
    return TEMPLATES[attribute][0].format(S=name, P=f"{name}'s", v=value)


def _ask(rng: random.Random, wordings: tuple[str, ...], reworded: bool) -> str:
    """One of the wordings; the last one is held out."""
    return wordings[-1] if reworded else _choice(rng, wordings[:-1])


def _choice(rng: random.Random, pool: Sequence[T]) -> T:
    return pool[int(rng.random() * len(pool))]


def _pick(rng: random.Random, names: Sequence[str], weights: Sequence[float]) -> str:
    """A name with probability proportional to its weight."""
    point = rng.random() * sum(weights)
    for name, weight in zip(names, weights, strict=True):
        point -= weight
        if point < 0:
            return name
    return names[-1]
