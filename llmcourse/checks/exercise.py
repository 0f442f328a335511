"""What an exercise is: a reference, input cases, and plausible wrong answers with their diagnoses."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Case:
    """The inputs of one call of an answer.

    Attributes:
        args, kwargs: what the answer is called with. Each call gets its own deep copy; what the inputs share
            (a model and its parameters) is still shared in the copy.
        name: what the message to the learner calls the case, for example `"T = 1"`; by default its number.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    name: str = ""


@dataclass(frozen=True)
class Mutant:
    """A plausible wrong answer: its name, the function (or class), and what a learner who wrote it is told."""

    name: str
    function: Any
    diagnosis: str


def call(answer: Callable[..., Any], case: Case) -> Any:
    """How an answer is exercised when an exercise says nothing else: called with the case's inputs."""
    return answer(*case.args, **case.kwargs)


@dataclass(frozen=True, kw_only=True)
class Exercise:
    """One exercise of a lab, with all that its check needs.

    Attributes:
        id: short name, unique in its chapter; letters, digits, `_` and `-`.
        title: what the learner is asked for, in a few words.
        points: points in the chapter's score, at least 1.
        reference: the package's own function or class: the right answer.
        cases: from a seed to the input cases; each is a `Case`, a tuple of positional arguments, or a function without
            arguments that builds one of these (for inputs that cannot be deep-copied). Equal seeds must give equal
            cases. Give every dimension a different size, so that a swapped axis cannot go unnoticed.
        mutants: wrong answers, each of which the cases must tell from the reference and from the other mutants.
        run: how an answer is exercised, as a function of the answer and a `Case` that returns plain data; for classes,
            training loops, gradients (`with_gradients`), and answers that are values.
        rtol, atol: tolerances of the default comparison (see `comparison.difference`).
        compare: replaces the default comparison: (expected, got) -> `None`, or the difference in one line.
        may_change_inputs: whether an answer may write into its inputs (an optimizer step does).
        hints: shown, the first of them, when an answer is wrong in a way that no mutant is.
    """

    id: str
    title: str
    points: int
    reference: Any
    cases: Callable[[int], Sequence[Case | tuple[Any, ...] | Callable[[], Case | tuple[Any, ...]]]]
    mutants: Sequence[Mutant]
    run: Callable[[Any, Case], Any] = call
    rtol: float = 1e-5
    atol: float = 1e-6
    compare: Callable[[Any, Any], str | None] | None = None
    may_change_inputs: bool = False
    hints: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.id):
            raise ValueError(f"exercise id {self.id!r}: use letters, digits, _ and - only")
        if self.points < 1:
            raise ValueError(f"exercise {self.id!r}: points={self.points} must be at least 1")
        if not self.mutants:
            raise ValueError(f"exercise {self.id!r}: give at least one mutant with its diagnosis")
        for what in ("name", "diagnosis"):
            values = [getattr(mutant, what) for mutant in self.mutants]
            if len(set(values)) < len(values):
                raise ValueError(
                    f"exercise {self.id!r}: two mutants share the {what} {max(values, key=values.count)!r}"
                )


def build_case(case: Case | tuple[Any, ...] | Callable[[], Case | tuple[Any, ...]]) -> Case:
    """The `Case` that an entry of `Exercise.cases` stands for."""
    if callable(case):
        case = case()
    return case if isinstance(case, Case) else Case(args=tuple(case))


def slugs() -> list[str]:
    """The chapters that have checks: the modules of `llmcourse.checks` that define `EXERCISES`; none is imported."""
    package = importlib.import_module("llmcourse.checks")
    sources = (path for folder in package.__path__ for path in Path(folder).glob("*.py"))
    return sorted(path.stem for path in sources if re.search(r"^EXERCISES\b", path.read_text("utf-8"), re.M))


def exercises(slug: str) -> list[Exercise]:
    """The exercises of a chapter, in the order of its lab.

    Raises:
        ValueError: the chapter has no checks, or two exercises share an id.
    """
    # Only this chapter's module is imported: a check in lab 01 must not pay for what chapter 13 imports.
    exists = slug.isidentifier() and importlib.util.find_spec(f"llmcourse.checks.{slug}") is not None
    module = importlib.import_module(f"llmcourse.checks.{slug}") if exists else None
    if not hasattr(module, "EXERCISES"):
        raise ValueError(
            f"no checks for {slug!r}: the chapters with checks are {', '.join(slugs()) or 'none'}"
        )
    found = list(module.EXERCISES)
    ids = [exercise.id for exercise in found]
    if len(set(ids)) < len(ids):
        raise ValueError(f"checks of {slug!r}: the id {max(ids, key=ids.count)!r} is used twice")
    return found


def find_exercise(name: str) -> Exercise:
    """The exercise called "slug/id", or "id" alone where only one chapter has that id.

    Raises:
        ValueError: there is none of that name, or several.
    """
    slug, _, identifier = name.rpartition("/")
    chapters = [slug] if slug else slugs()
    found = {chapter: one for chapter in chapters for one in exercises(chapter) if one.id == identifier}
    if len(found) > 1:
        raise ValueError(
            f"exercise {name!r} is in several chapters: write one of {[f'{c}/{name}' for c in found]}"
        )
    if not found:
        known = [f"{chapter}/{one.id}" for chapter in chapters for one in exercises(chapter)]
        raise ValueError(f"no exercise {name!r}: choose one of {', '.join(known) or 'none'}")
    return next(iter(found.values()))
