"""What a release learns from the model solutions: seeds on which the checks can be trusted, functions to watch."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmcourse.checks.checking import Outcome, Trial, run_cases, verify
from llmcourse.checks.exercise import Exercise, Mutant
from llmcourse.grading.manifest import derive

PACKAGE = Path(__file__).resolve().parents[1]
SPARE = 4
"""a quarter as many seeds as wanted may be unsuited"""
MARGIN = 4
"""how much closer than an answer the model solution must be"""


def run_solutions(cells: Sequence[tuple[str, str]], answers: Mapping[str, str]) -> dict[str, Any]:
    """The model solutions as functions (or classes, or values), by exercise.

    Args:
        cells: (id, source) of what has to run; it is the course's own code.
        answers: the name of each exercise's answer.

    Raises:
        ValueError: a cell fails, or an answer is not there afterwards.
    """
    namespace: dict[str, Any] = {"__name__": "model_solutions"}
    for identifier, source in cells:
        try:
            exec(compile(source, f"<{identifier}>", "exec", dont_inherit=True), namespace)
        except Exception as error:
            raise ValueError(
                f"the model solutions do not run: cell {identifier!r}: {type(error).__name__}: {error}"
            ) from None
    missing = [name for name, answer in answers.items() if answer not in namespace]
    if missing:
        raise ValueError(f"the model solution of {missing[0]} does not define {answers[missing[0]]!r}")
    return {name: namespace[answer] for name, answer in answers.items()}


def choose_seeds(exercise: Exercise, name: str, solution: Any, secret: bytes, count: int) -> tuple[int, ...]:
    """Seeds for the input variants of an exercise, on each of which the check is worth trusting.

    On every one no known wrong answer gets points, and the model solution agrees with the reference to a quarter of the
    tolerance: on some inputs sums nearly cancel, and there an answer could be refused for the order of its additions.

    Args:
        exercise: the record.
        name: "slug/id".
        solution: its model solution.
        secret: from which the seeds follow.
        count: how many.

    Raises:
        ValueError: the model solution is refused, or a wrong answer passes, on too many seeds.
    """
    for problem in verify(exercise, seeds=(0,)):
        raise ValueError(f"{name}: its check is not worth trusting: {problem}")
    strict = dataclasses.replace(exercise, rtol=exercise.rtol / MARGIN, atol=exercise.atol / MARGIN)
    found: list[int] = []
    refused: list[str] = []
    number = 0
    while len(found) < count:
        seed = derive(secret, "seed", name, str(number))
        number += 1
        if reason := _unsuited(exercise, strict, solution, seed):
            refused.append(reason)
        elif seed not in found:
            found.append(seed)
        if len(refused) > max(1, count // SPARE):
            raise ValueError(f"{name}: on {len(refused)} of {number} seeds {refused[0]}")
    return tuple(found)


class _Unmatched(Trial):
    """A trial that does not look for the wrong answer that another one behaves like."""

    def match(self, got: list[Outcome]) -> Mutant | None:
        return None


def _unsuited(exercise: Exercise, strict: Exercise, solution: Any, seed: int) -> str:
    """Why a seed is not used, or ""."""
    trial, outcomes = _Unmatched(exercise, seed), run_cases(exercise, solution, seed)
    trial.exercise = strict
    result = trial.grade(outcomes)
    if not result.correct:
        return f"its model solution does not score the maximum, such as {seed}: {result.message}"
    trial.exercise = exercise
    accepted = [mutant.name for mutant, wrong in trial.mutants if trial.grade(wrong).correct]
    return f"the wrong answer {accepted[0]!r} passes, such as {seed}" if accepted else ""


def watched_functions(exercise: Exercise, solution: Any, seed: int = 0) -> tuple[str, ...]:
    """Package functions that the reference calls (or is) and the model solution does not: "module:qualname".

    An answer that runs one of these uses the package's own implementation instead of its own.
    """
    reference = _called(lambda: run_cases(exercise, exercise.reference, seed))
    own = _called(lambda: run_cases(exercise, solution, seed))
    return tuple(sorted(name for code, name in reference.items() if code not in own and _tells(name, code)))


def _called(action: Callable[[], Any]) -> dict[types.CodeType, str]:
    """The package's functions that run during an action."""
    found: dict[types.CodeType, str] = {}

    def note(frame: types.FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code not in found and code.co_filename.startswith(str(PACKAGE)):
            found[code] = f"{frame.f_globals.get('__name__')}:{code.co_qualname}"

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(before)
    return found


def _tells(name: str, code: types.CodeType) -> bool:
    """Whether a call says something, and the name leads back to the function: an inner function has no address."""
    if name.endswith(".__post_init__"):  # who only builds a model's configuration has not used the answer
        return False
    module, _, path = name.partition(":")
    try:
        value = importlib.import_module(module)
        for part in path.split("."):
            value = inspect.getattr_static(value, part)
    except (ImportError, AttributeError):
        return False
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    if isinstance(value, property):
        value = value.fget
    return getattr(inspect.unwrap(value), "__code__", None) is code if callable(value) else False
