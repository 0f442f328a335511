"""What goes into the jail and what comes out of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmcourse.grading.limits import Limits
from llmcourse.grading.verdicts import Verdict


@dataclass(frozen=True)
class Cell:
    """A code cell to run.

    Attributes:
        id: its id, unique in its job.
        source: its source.
    """

    id: str
    source: str


@dataclass(frozen=True)
class Question:
    """Something to ask of what the cells defined.

    Attributes:
        exercise: "slug/id".
        expression: the answer, as its check cell names it: `"my_function"`.
        seed: seed of the inputs.
        after: id of the cell after which it is asked; "" for after all cells.
    """

    exercise: str
    expression: str
    seed: int
    after: str = ""


@dataclass(frozen=True)
class Job:
    """One submission to run.

    Attributes:
        cells: to run in this order.
        questions: to ask in this order.
        limits: what it may use.
        files: support files for its work folder, by relative path.
        watched: for an exercise, the package's functions ("module:qualname") whose call by the submission is reported.
    """

    cells: tuple[Cell, ...]
    questions: tuple[Question, ...] = ()
    limits: Limits = field(default_factory=Limits)
    files: Mapping[str, bytes] = field(default_factory=dict)
    watched: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class CellOutcome:
    """What became of a cell.

    Attributes:
        id: of the cell.
        status: "ok", "error" or "not run" (which the cell during which a run ended early is too).
        output: what was printed while it ran; for instructors only, since a cell that runs after a question can print
            the inputs that the answer was given.
        error: what it raised, in one line.
    """

    id: str
    status: str
    output: str = ""
    error: str = ""


@dataclass(frozen=True)
class Answer:
    """The answer to a question. All in it was said by a process that the submission controls.

    Attributes:
        exercise: of the question.
        outcomes: for each case `{"value": bytes for plain.decode, "changed": str or None}` or
            `{"failure": {"kind", "text", "described", "unwritten"}}`; `None` when there are none.
        problem: why there are none: "missing name: f", "not plain: ...", "no answer: ...".
        called: watched functions that ran below the submission's code, or that the answer is.
    """

    exercise: str
    outcomes: list[dict[str, Any]] | None
    problem: str = ""
    called: tuple[str, ...] = ()


@dataclass(frozen=True)
class JobResult:
    """What a run gave.

    Attributes:
        cells: one outcome for each cell.
        answers: of the questions that were answered, in the job's order of questions.
        ended: GRADED when everything was asked and answered; else what ended the run.
        seconds: wall time.
        peak_mb: greatest memory in MiB beside what the jail had loaded, as far as looking ten times a second shows.
        note: about the end, in a few words; "" when GRADED.
        during: what ran when it ended early: the id of a cell, or the exercise that was being answered.
    """

    cells: tuple[CellOutcome, ...]
    answers: tuple[Answer, ...]
    ended: Verdict
    seconds: float
    peak_mb: float
    note: str = ""
    during: str = ""
