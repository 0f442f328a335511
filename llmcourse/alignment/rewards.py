"""Verifiable rewards: programs that score a response, from the answer that the asker knows.

A rule scores one text. `by_rule` and `by_parts` turn rules into a scorer, which is what training asks for: the rewards
of a whole batch at once, so that a reward model may stand in the same place. The last two rules are wrong on purpose:
a policy can raise them without answering.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

from llmcourse.data.town_instructions import Constraint, final_number
from llmcourse.data.town_sums import Sum

Task = TypeVar("Task")
Rule = Callable[[str, Task], float]
"""reward of a response to a task"""
Scorer = Callable[[Sequence[int], Sequence[str]], Sequence[float]]
"""rewards of responses, the i-th to the prompt whose number is the i-th integer"""

# "15-8" holds 15 and 8: a minus after a digit is an operation, not a sign
_NUMBER = re.compile(r"(?<!\d)(?<!\d\.)(?:(?<!\d)-)?\d+")
_STEP = re.compile(r"(?<![\d+-])(\d+(?:[+-]\d+)+)=(\d+)(?!\d)")


class Checkable(Protocol):
    """A task that knows its right answers, such as `TownInstruction`."""

    def is_right(self, completion: str) -> bool:
        """Whether a response is right."""
        ...


def numbers(text: str) -> list[int]:
    """All whole numbers of a text, in order: "15-8=7" holds 15, 8 and 7, "-7" holds -7."""
    return [int(found) for found in _NUMBER.findall(text)]


def steps(text: str) -> list[tuple[str, bool]]:
    """The equations of a text, such as "7+8=15" or "3+4+1=8", each with whether it is true."""
    return [(f"{left}={right}", _value(left) == int(right)) for left, right in _STEP.findall(text)]


def right_answer(text: str, answer: int) -> float:
    """1 if the text ends with the answer, a full stop after it allowed, else 0."""
    return float(final_number(text) == str(answer))


def right_steps(text: str, task: Sum) -> float:
    """Share of the two column steps of `task` that the text begins with, in order: 0, 1/2 or 1.

    The steps are those of `Sum.worked`. Unlike `true_steps_anywhere`, this knows the sum that was asked for.
    """
    expected = [equation for equation, _ in steps(task.worked)]
    found = [equation for equation, _ in steps(text)]
    right = 0
    while right < min(len(expected), len(found)) and expected[right] == found[right]:
        right += 1
    return right / len(expected)


def well_formed(text: str, task: Sum) -> float:
    """1 if the text has the form of `Sum.worked`, the question before the colon optional, whatever it says; else 0."""
    form = r"(?:\d+ [+-] \d+: )?\d+(?:[+-]\d+)+=\d+, \d+(?:[+-]\d+)+=\d+, \d+"
    return float(re.fullmatch(form, text.strip()) is not None)


def constraint_parts(text: str, constraint: Constraint) -> dict[str, bool]:
    """Which demands of a constraint a text meets: "complete" (whole sentences) and those fields that ask for
    something."""
    asked = {
        "sentences": constraint.sentences is not None,
        "required": bool(constraint.required),
        "forbidden": bool(constraint.forbidden),
    }
    alone = {
        name: Constraint(**{name: getattr(constraint, name)}) for name, is_asked in asked.items() if is_asked
    }
    return {"complete": Constraint().holds(text)} | {name: one.holds(text) for name, one in alone.items()}


def keeps_constraint(text: str, constraint: Constraint) -> float:
    """Share of the demands that the text meets, 1 only if the constraint holds (Zhou et al., 2023).

    A share gives a group something to compare while no response meets every demand. A text that breaks off within a
    sentence meets none.
    """
    parts = constraint_parts(text, constraint)
    return sum(parts.values()) / len(parts)


def solved(text: str, task: Checkable) -> float:
    """1 if the task itself calls the text right, else 0: the reward that an evaluation counts."""
    return float(task.is_right(text))


def true_steps_anywhere(text: str, task: object) -> float:
    """A reward to break: 0.25 for each true equation, whatever was asked.

    "1+1=2" written ten times earns more than any right answer.
    """
    return 0.25 * sum(is_true for _, is_true in steps(text))


def mentions_answer(text: str, answer: int) -> float:
    """A reward to break: 1 if the answer is any of the numbers of the text, so that listing numbers pays."""
    return float(answer in numbers(text))


def by_rule(rule: Rule[Task], tasks: Sequence[Task]) -> Scorer:
    """A scorer that applies one rule; `tasks[i]` is what the rule needs to know about prompt i."""
    return by_parts({"reward": (1.0, rule)}, tasks)


def by_parts(parts: Mapping[str, tuple[float, Rule[Task]]], tasks: Sequence[Task]) -> Scorer:
    """A scorer that sums rules with weights: {"answer": (1.0, right), "format": (0.1, well_formed)}.

    Raises:
        ValueError: no part, or a weight that is not finite. The scorer itself: as in `checked`.
    """
    if not parts:
        raise ValueError("a reward needs at least one part")
    for name, (weight, _) in parts.items():
        if not math.isfinite(weight):
            raise ValueError(f"weight of {name!r} is {weight}: give a finite number")

    def score(prompt_numbers: Sequence[int], texts: Sequence[str]) -> list[float]:
        pairs = zip(prompt_numbers, texts, strict=True)
        values = [sum(w * rule(text, tasks[i]) for w, rule in parts.values()) for i, text in pairs]
        return checked(values, texts)

    return score


def checked(rewards: Sequence[float], texts: Sequence[str]) -> list[float]:
    """The rewards as floats, refused where one is missing or not finite: one NaN would spoil its group's advantages.

    Raises:
        ValueError: another number of rewards than of texts; the first reward that is NaN or infinite, with its text.
    """
    if len(rewards) != len(texts):
        raise ValueError(f"{len(rewards)} rewards for {len(texts)} responses: give one each")
    values = [float(value) for value in rewards]
    for value, text in zip(values, texts, strict=True):
        if not math.isfinite(value):
            raise ValueError(f"reward {value} for the response {text[:60]!r}: give a finite number")
    return values


def _value(expression: str) -> int:
    return sum(int(term) for term in re.findall(r"[+-]?\d+", expression))
