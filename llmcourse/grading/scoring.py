"""Points for what the jail handed back: expected values are known here alone, and compared here alone.

The jail returns plain data. The reference's values pass the same codec, so that both sides are of the same kinds, and
the exercise's own comparison decides, as in the learner's `check`. What a student is told names no hidden input.
"""

from __future__ import annotations

import builtins
import threading
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from llmcourse.checks.checking import CORRECT, ERROR, UNANSWERED, WRONG, CheckResult, Failure, Outcome, Trial
from llmcourse.checks.exercise import Exercise, find_exercise
from llmcourse.grading.grades import Grade, Item
from llmcourse.grading.jail.client import Answer, JobResult, Question
from llmcourse.grading.plain import PlainError, decode, encode
from llmcourse.grading.verdicts import Finding, Verdict

if TYPE_CHECKING:
    from llmcourse.grading.manifest import AssignmentKey
    from llmcourse.grading.skeleton import Rebuilt

NOT_REACHED = "not reached"
MAX_DETAIL, MAX_FINDINGS = 2000, 100
# What a difference says, without its numbers: those would tell about the hidden inputs.
DIFFERENCES = (
    ("is None: is a return", "the result is None: is a return statement missing?"),
    ("cut off from the gradient", "the result is cut off from the gradient"),
    ("writes into its input", "the answer writes into its inputs: work on new tensors"),
    ("has shape", "the result has another shape than expected"),
    ("has dtype", "the result has another dtype than expected"),
    ("NaN", "the result holds NaN"),
    ("has the keys", "the result has other keys than expected"),
    (" elements, expected", "the result has another number of elements than expected"),
    (" is a ", "the result is of another type than expected"),
)
NOT_PLAIN = "Your answer returned something that is no plain data (tensors, numbers, text, lists)."
ENDS = {
    Verdict.TIMEOUT: "the time limit was reached",
    Verdict.MEMORY: "the memory limit was reached",
    Verdict.OUTPUT_LIMIT: "more was printed than the limit allows",
    Verdict.CRASH: "the Python process ended",
}


class Scorer:
    """The questions of an assignment, and the points for their answers.

    It may be shared by threads: the reference runs under one lock, since it needs the global random state.

    Attributes:
        key: the assignment with its solutions and seeds.
    """

    def __init__(self, key: AssignmentKey) -> None:
        """Find the exercises of an assignment.

        Raises:
            ValueError: the course has an exercise of that name no more.
        """
        self.key = key
        self._exercises = {name: find_exercise(name) for name in key.manifest.points}
        self._trials: dict[tuple[str, int], Trial] = {}
        self._lock = threading.Lock()

    @property
    def max_points(self) -> float:
        """Points of all exercises."""
        return sum(self.key.manifest.points.values())

    def questions(self, student: str, rebuilt: Rebuilt | None = None) -> tuple[Question, ...]:
        """What to ask a student's notebook: each exercise on the student's own inputs.

        Args:
            student: id.
            rebuilt: the notebook that will run, which says after which cell each answer is there.
        """
        after = rebuilt.after if rebuilt is not None else {}
        return tuple(
            Question(
                exercise=name,
                expression=self.key.answers[name],
                seed=self.key.seed(student, name),
                after=after.get(name, ""),
            )
            for name in self._exercises
        )

    def grade(self, student: str, result: JobResult, rebuilt: Rebuilt) -> Grade:
        """Points for what came back from the jail.

        Args:
            student: id, which decides on the inputs.
            result: the job with this student's questions.
            rebuilt: the notebook that ran.

        Returns:
            The grade; the run's end is its verdict, or "partial" when some exercises were answered before it.
        """
        answers = {answer.exercise: answer for answer in result.answers}
        errors = {cell.id: cell.error for cell in result.cells if cell.error}
        items, findings = [], list(rebuilt.findings)
        for name in self._exercises:
            error = errors.get(rebuilt.after.get(name, ""), "")
            item, more = self._item(student, name, answers.get(name), result.ended, error)
            items.append(item)
            findings += more
        reached = sum(item.status != NOT_REACHED for item in items)
        verdict, note = result.ended, result.note
        if verdict in ENDS:
            note = f"{ENDS[verdict]} after {reached} of {len(items)} exercises" + (
                f"; {note}" if note else ""
            )
            verdict = Verdict.PARTIAL if reached else verdict
        return self._total(student, verdict, items, findings, note)

    def ungraded(self, student: str, verdict: Verdict, note: str, findings: Iterable[Finding] = ()) -> Grade:
        """The grade of a submission that was not run: malformed, not there, or not for want of a machine."""
        items = [self._blank(name, NOT_REACHED, "This exercise was not graded.") for name in self._exercises]
        return self._total(student, verdict, items, findings, note)

    def _total(
        self, student: str, verdict: Verdict, items: list[Item], findings: Iterable[Finding], note: str
    ) -> Grade:
        kept = list(findings)
        if len(kept) > MAX_FINDINGS:
            more = Finding("MORE", f"{len(kept) - MAX_FINDINGS} findings more")
            kept = [*kept[:MAX_FINDINGS], more]
        return Grade(
            student=student,
            assignment=self.key.name,
            verdict=verdict,
            points=sum(item.points for item in items),
            max_points=self.max_points,
            items=tuple(items),
            findings=tuple(kept),
            note=note[:MAX_DETAIL],
        )

    def _blank(self, name: str, status: str, message: str, detail: str = "") -> Item:
        title, points = self.key.manifest.titles[name], self.key.manifest.points[name]
        return Item(name, title, 0, points, status, message, detail=detail[:MAX_DETAIL])

    def _item(
        self, student: str, name: str, answer: Answer | None, ended: Verdict, cell_error: str
    ) -> tuple[Item, list[Finding]]:
        """One exercise: its item, and what it adds to the findings."""
        if answer is None:
            why = ENDS.get(ended, "the run ended")
            return self._blank(name, NOT_REACHED, f"Not reached: {why} before this exercise."), []
        called = [
            Finding("REFERENCE_CALLED", f"the answer calls {function} of the package", name)
            for function in answer.called
        ]
        if answer.outcomes is None:
            return self._without_answer(name, answer.problem, cell_error), called
        trial = self._trial(name, self.key.seed(student, name))
        try:
            got = outcomes_of(answer.outcomes, trial.expected)
        except PlainError as error:
            return self._blank(name, WRONG, NOT_PLAIN, str(error)), called
        except (
            Exception
        ) as error:  # bytes of a process that ran hostile code: whatever is wrong with them is its doing
            text = f"{type(error).__name__}: {error}"[:MAX_DETAIL]
            finding = Finding(
                "ANSWER_MALFORMED", f"the reply is not what an honest process sends: {text}", name
            )
            return self._blank(name, WRONG, "Your answer could not be compared.", text), [*called, finding]
        return self._compared(name, trial, got), called

    def _without_answer(self, name: str, problem: str, cell_error: str) -> Item:
        expression = self.key.answers[name]
        if problem.startswith("missing"):
            text = f"Not answered: `{expression}` is not there when your notebook has run."
            if kind := known_kind(cell_error.split(":")[0]):
                text += f" The cell that should define it raised {kind}."
            return self._blank(name, UNANSWERED, text, f"{problem}; {cell_error}" if cell_error else problem)
        text = NOT_PLAIN if problem.startswith("not plain") else "Your answer could not be evaluated."
        return self._blank(name, ERROR, text, problem)

    def _compared(self, name: str, trial: Trial, got: list[Outcome]) -> Item:
        exercise, points = trial.exercise, self.key.manifest.points[name]
        try:
            with self._lock:  # a wrong answer makes the mutants run
                result = trial.grade(got)
        except Exception as error:  # a comparison written for honest values may trip over others
            detail = f"{type(error).__name__}: {error}"
            return self._blank(name, WRONG, "Not correct: the result cannot be compared.", detail)
        message = student_message(exercise, result, got)
        detail = "" if result.correct else result.message[:MAX_DETAIL]
        earned = points if result.correct else 0
        title = self.key.manifest.titles[name]
        return Item(name, title, earned, points, result.status, message, result.mutant, detail)

    def _trial(self, name: str, seed: int) -> Trial:
        with self._lock:
            if (name, seed) not in self._trials:
                self._trials[name, seed] = Trial(self._exercises[name], seed, translate=through_codec)
            return self._trials[name, seed]


def through_codec(value: Any) -> Any:
    """A value of the reference as it would come back from the jail."""
    return decode(encode(value, limit_bytes=1 << 30), like=value)


def outcomes_of(replies: list[Mapping[str, Any]], expected: list[Outcome]) -> list[Outcome]:
    """The replies of a jail as outcomes; nothing about them is taken for granted.

    Args:
        replies: one a case: {"value": bytes} or {"failure": {...}}, and "changed".
        expected: what the reference did, for the classes that may be rebuilt.

    Raises:
        PlainError: the bytes hold no plain data.
        ValueError: there are too many replies, or one has other fields.
    """
    if not isinstance(replies, list) or not replies or len(replies) > len(expected):
        raise ValueError(f"there are other replies than {len(expected)} cases")
    found = [_outcome_of(reply, like.value) for reply, like in zip(replies, expected, strict=False)]
    last = found[-1].failure
    if len(found) < len(expected) and not (last and last.unwritten):
        raise ValueError(f"there are {len(found)} replies for {len(expected)} cases")
    return found


def _outcome_of(reply: Mapping[str, Any], like: Any) -> Outcome:
    changed = reply.get("changed")
    if not (changed is None or isinstance(changed, str)):
        raise ValueError("`changed` is no text")
    if reply.get("failure") is not None:
        parts = reply["failure"]
        texts = [parts.get(field) for field in ("kind", "text", "described")]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("a failure is told by texts")
        return Outcome(
            failure=Failure(*(text[:MAX_DETAIL] for text in texts), parts.get("unwritten") is True)
        )
    if not isinstance(reply.get("value"), bytes):
        raise ValueError("there is neither a value nor a failure")
    return Outcome(decode(reply["value"], like=like), changed=changed and changed[:80])


def known_kind(name: str) -> str:
    """The name of a built-in exception, or nothing: a student's own class could be named after a hidden input."""
    kind = getattr(builtins, name, None) if isinstance(name, str) else None
    return name if isinstance(kind, type) and issubclass(kind, BaseException) else ""


def student_message(exercise: Exercise, result: CheckResult, got: list[Outcome]) -> str:
    """What a student is told about an answer: what kind of difference, and what is probably wrong.

    Args:
        exercise: the record, with its diagnoses and hints.
        result: what the comparison found.
        got: what the answer did.
    """
    if result.status == CORRECT:
        return "Correct."
    if result.status == UNANSWERED:
        return "Not answered."
    failure = got[result.case - 1].failure
    if failure is not None:
        what = f"the answer raised {known_kind(failure.kind) or 'an exception'}"
    else:
        what = difference_kind(result.problem or "")
    mutant = next((one for one in exercise.mutants if one.name == result.mutant), None)
    advice = mutant.diagnosis if mutant else f"Hint: {exercise.hints[0]}" if exercise.hints else ""
    return f"Not correct on inputs like those of the check cell, with other numbers: {what}. {advice}".strip()


def difference_kind(problem: str) -> str:
    """The line of a comparison without its numbers."""
    for mark, text in DIFFERENCES:
        if mark in problem:
            return text
    return "the result has other values than expected"
