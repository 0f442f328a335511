"""Compare an answer with the reference on awkward inputs, and say what is probably wrong with it."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import linecache
import random
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmcourse.checks.comparison import difference, short
from llmcourse.checks.exercise import Case, Exercise, Mutant, build_case, exercises, find_exercise

CORRECT, WRONG, ERROR, UNANSWERED = "correct", "wrong", "error", "not answered"
MAX_FAILURE_TEXT = 2000


@dataclass(frozen=True)
class CheckResult:
    """The outcome of a check.

    Attributes:
        exercise_id: the exercise.
        status: "correct", "wrong", "error" (the answer raised) or "not answered".
        points, max_points: all or nothing.
        message: the line that was printed.
        case: number of the first case that failed, from 1; `None` if none did.
        mutant: name of the known wrong answer that this one behaves like, if any.
        problem: what is different in that case, without the advice; `None` if nothing is.
    """

    exercise_id: str
    status: str
    points: int
    max_points: int
    message: str
    case: int | None = None
    mutant: str | None = None
    problem: str | None = None

    @property
    def correct(self) -> bool:
        """Whether every case agreed with the reference."""
        return self.status == CORRECT

    def __repr__(self) -> str:
        return f"<{self.exercise_id}: {self.status}, {self.points} of {self.max_points} points>"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        # A stock nbgrader reads a check cell's text/plain as the score; a reader sees the HTML.
        unit = "point" if self.max_points == 1 else "points"
        return {
            "text/plain": str(self.points),
            "text/html": f"<small>{self.points} of {self.max_points} {unit}</small>",
        }


@dataclass(frozen=True)
class Failure:
    """An exception that an answer raised, as plain text, so that it can leave the process in which it was raised.

    Attributes:
        kind: name of the exception's class.
        text: what the exception says, cut to `MAX_FAILURE_TEXT` characters.
        described: kind, text and the learner's own line in one line, for the message.
        unwritten: whether the answer itself says that it is not written yet.
    """

    kind: str
    text: str
    described: str
    unwritten: bool = False


@dataclass(frozen=True)
class Outcome:
    """What one call did: the value it returned or how it failed, and which of its inputs it wrote into."""

    value: Any = None
    failure: Failure | None = None
    changed: str | None = None


def check(exercise: Exercise | str, answer: Any, *, seed: int | None = None) -> CheckResult:
    """Check an answer against the reference; print one line about it and return the result.

    Nothing the answer does raises here: an unwritten one (`raise NotImplementedError`) is "not answered yet", an
    exception is reported with its line. The global random state is left as it was, and each call sees the same one.

    Args:
        exercise: the record, or its name: "attention/scores", or "scores" where that is unique.
        answer: the learner's function, class or value.
        seed: seed of the input cases; other seeds give other inputs. Default 0.

    Raises:
        ValueError: there is no such exercise.
    """
    exercise = find_exercise(exercise) if isinstance(exercise, str) else exercise
    result = judge(exercise, answer, seed=0 if seed is None else seed, quiet=False)
    print(result.message)
    return result


def judge(exercise: Exercise, answer: Any, *, seed: int = 0, quiet: bool = True) -> CheckResult:
    """`check` without printing its line; `quiet` also swallows what the answer prints."""
    with one_thread():
        return Trial(exercise, seed).judge(answer, quiet=quiet)


def run_cases(exercise: Exercise, answer: Any, seed: int, quiet: bool = True) -> list[Outcome]:
    """What an answer does on each case of a seed: the half of a check that runs the learner's code.

    Nothing the answer does raises here, but for `KeyboardInterrupt`. The global random state is left as it was.

    Args:
        exercise: the record.
        answer: the learner's function, class or value.
        seed: seed of the input cases.
        quiet: swallow what the answer prints.

    Returns:
        One outcome a case, in order; fewer when the answer is unwritten, since it is not called again then.
    """
    with one_thread():
        return _run_cases(exercise, answer, list(exercise.cases(seed)), seed, quiet)


class Trial:
    """An exercise on the cases of one seed; what the reference and the mutants do there is computed once.

    Attributes:
        exercise, seed: what is tried.
        cases: the inputs of this seed.
        expected: what the reference does on them.
    """

    def __init__(self, exercise: Exercise, seed: int, translate: Callable[[Any], Any] | None = None) -> None:
        """Run the reference on the cases of a seed.

        Args:
            exercise: the record.
            seed: seed of the input cases.
            translate: applied to each value of the reference and the mutants, for outcomes to be graded that were
                themselves translated on their way from another process.

        Raises:
            ValueError: the reference fails on a case.
        """
        self.exercise, self.seed, self.cases = exercise, seed, list(exercise.cases(seed))
        self._translate = translate
        self.expected = self._known(exercise.reference)
        for number, outcome in enumerate(self.expected, 1):
            if outcome.failure:
                raise ValueError(
                    f"exercise {exercise.id!r}: the reference fails on case {number}: {outcome.failure.described}"
                )

    def outcomes(self, answer: Any, quiet: bool = True) -> list[Outcome]:
        """`run_cases` on the cases of this trial."""
        return _run_cases(self.exercise, answer, self.cases, self.seed, quiet)

    def _known(self, answer: Any) -> list[Outcome]:
        found = self.outcomes(answer)
        if self._translate is None:
            return found
        return [
            outcome if outcome.failure else Outcome(self._translate(outcome.value), changed=outcome.changed)
            for outcome in found
        ]

    @functools.cached_property
    def mutants(self) -> list[tuple[Mutant, list[Outcome]]]:
        """The known wrong answers and what they do."""
        return [(mutant, self._known(mutant.function)) for mutant in self.exercise.mutants]

    def judge(self, answer: Any, quiet: bool = True) -> CheckResult:
        """Run an answer and grade what it did."""
        return self.grade(self.outcomes(answer, quiet))

    def grade(self, got: list[Outcome]) -> CheckResult:
        """Compare outcomes with the reference's, then look for the mutant that does the same.

        Args:
            got: one outcome a case, in order; it may end early with one that is unwritten.

        Raises:
            ValueError: there are more or fewer outcomes than cases.
        """
        exercise = self.exercise
        if got and got[-1].failure is not None and got[-1].failure.unwritten:
            return _result(exercise, UNANSWERED, "not answered yet.")
        if len(got) != len(self.expected):
            raise ValueError(f"exercise {exercise.id!r}: {len(got)} outcomes for {len(self.expected)} cases")
        problems = [_problem(exercise, *pair) for pair in zip(self.expected, got, strict=True)]
        failed = next((i for i, problem in enumerate(problems) if problem), None)
        if failed is None:
            return _result(exercise, CORRECT, f"correct on all {len(got)} cases.")
        mutant = self.match(got)
        advice = mutant.diagnosis if mutant else f"Hint: {exercise.hints[0]}" if exercise.hints else ""
        where = f"Case {failed + 1} of {len(got)} ({_describe(self.cases[failed])})"
        return _result(
            exercise,
            ERROR if got[failed].failure else WRONG,
            f"not yet. {where}: {problems[failed]}. {advice}".strip(),
            case=failed + 1,
            mutant=mutant.name if mutant else None,
            problem=problems[failed],
        )

    def match(self, got: list[Outcome]) -> Mutant | None:
        """The first mutant that did on every case what the answer did."""
        for mutant, wrong in self.mutants:
            if len(wrong) == len(got) and all(
                _alike(self.exercise, *pair) for pair in zip(wrong, got, strict=True)
            ):
                return mutant
        return None


def verify(exercise: Exercise, seeds: tuple[int, ...] = (0, 1, 2)) -> list[str]:
    """What is wrong with the exercise itself: empty when its check is worth trusting.

    For each seed the reference must get full points, the unwritten stub none, and every mutant must be rejected with
    its own diagnosis.
    """
    with one_thread():
        return [problem for seed in seeds for problem in _verify(exercise, seed)]


def _verify(exercise: Exercise, seed: int) -> list[str]:
    trial, place = Trial(exercise, seed), f"{exercise.id}, seed {seed}"
    reference, stub, problems = trial.judge(exercise.reference), trial.judge(_stub), []
    if not reference.correct:
        problems.append(f"{place}: the reference is rejected: {reference.message}")
    if stub.status != UNANSWERED or stub.points:
        problems.append(f"{place}: the stub is not seen as unanswered: {stub.message}")
    for mutant in exercise.mutants:
        result = trial.judge(mutant.function)
        if result.correct:
            problems.append(f"{place}: the mutant {mutant.name!r} is accepted")
        elif result.mutant != mutant.name or mutant.diagnosis not in result.message:
            problems.append(f"{place}: {mutant.name!r} is taken for {result.mutant!r}")
    return problems


def verify_chapter(slug: str, seeds: tuple[int, ...] = (0, 1, 2)) -> list[str]:
    """`verify` for every exercise of a chapter."""
    return [problem for exercise in exercises(slug) for problem in verify(exercise, seeds)]


def with_gradients(answer: Callable[..., Any], case: Case) -> dict[str, Any]:
    """A `run` that also compares gradients: the answer's tensor, and d(sum of it)/d(input) for each float argument.

    A detached answer is told from a correct one even when their values agree.
    """
    args = [_leaf(value) for value in case.args]
    value = answer(*args, **case.kwargs)
    if not isinstance(value, torch.Tensor) or not value.requires_grad:
        return {"value": value, "gradients": "none: the result is cut off from the gradient"}
    inputs = [value for value in args if isinstance(value, torch.Tensor) and value.requires_grad]
    gradients = torch.autograd.grad(value.sum(), inputs, allow_unused=True)
    plain = ["unused" if gradient is None else gradient for gradient in gradients]
    return {"value": value.detach(), "gradients": plain}


def _leaf(value: Any) -> Any:
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.detach().requires_grad_() if floating else value


def _stub(*_: Any, **__: Any) -> Any:
    raise NotImplementedError


def _result(exercise: Exercise, status: str, text: str, **more: Any) -> CheckResult:
    points = exercise.points if status == CORRECT else 0
    return CheckResult(exercise.id, status, points, exercise.points, f"{exercise.title}: {text}", **more)


def _run_cases(exercise: Exercise, answer: Any, cases: list[Any], seed: int, quiet: bool) -> list[Outcome]:
    found: list[Outcome] = []
    for case in cases:
        found.append(_outcome(exercise, answer, case, seed, quiet))
        if found[-1].failure is not None and found[-1].failure.unwritten:
            break
    return found


def _outcome(exercise: Exercise, answer: Any, case: Any, seed: int, quiet: bool = True) -> Outcome:
    built = build_case(case)
    # One deep copy of all inputs together keeps what they share: a model and its parameters.
    args, kwargs = copy.deepcopy((built.args, built.kwargs))
    inputs = Case(args, kwargs, built.name)
    # Warnings and progress bars go to stdout: a stock nbgrader gives no points to a cell that writes to stderr.
    sink = io.StringIO() if quiet else sys.stdout
    with _same_randomness(seed), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        try:
            value = exercise.run(answer, inputs)
        except (Exception, SystemExit) as error:
            return Outcome(failure=_failure(error))
    return Outcome(value, changed=None if exercise.may_change_inputs else _changed(built, inputs))


def _changed(before: Case, after: Case) -> str | None:
    """Name of the first input that is no longer what it was."""
    names = [f"argument {number}" for number in range(1, len(before.args) + 1)] + [
        f"{name}=" for name in before.kwargs
    ]
    pairs = zip([*before.args, *before.kwargs.values()], [*after.args, *after.kwargs.values()], strict=True)
    for name, (old, new) in zip(names, pairs, strict=True):
        try:
            if difference(old, new, rtol=0, atol=0):
                return name
        except ValueError:  # an object without plain content, such as a function: nothing to compare
            continue
    return None


@contextlib.contextmanager
def _same_randomness(seed: int) -> Iterator[None]:
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed also queues a call for each absent device
    try:
        with torch.enable_grad():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """On tensors this small, threads cost more than they give: a hundred times more on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _problem(exercise: Exercise, expected: Outcome, got: Outcome) -> str | None:
    if got.failure is not None:
        return got.failure.described
    if got.changed:
        return f"the answer writes into its input ({got.changed}); work on a new tensor"
    return _compare(exercise, expected.value, got.value)


def _compare(exercise: Exercise, expected: Any, got: Any) -> str | None:
    if exercise.compare is not None and (got is not None or expected is None):
        return exercise.compare(expected, got)
    return difference(expected, got, rtol=exercise.rtol, atol=exercise.atol)


def _alike(exercise: Exercise, mutant: Outcome, got: Outcome) -> bool:
    """Whether an answer did what a mutant does: the same values, or the same exception with the same text."""
    if mutant.failure or got.failure:
        both = mutant.failure is not None and got.failure is not None
        return both and (mutant.failure.kind, mutant.failure.text) == (got.failure.kind, got.failure.text)
    if bool(mutant.changed) != bool(got.changed):
        return False
    if mutant.value is None or got.value is None:
        return mutant.value is got.value
    try:
        return _compare(exercise, mutant.value, got.value) is None
    except Exception:  # a comparison written for right answers may trip over a wrong one's value
        return False


def _describe(case: Any) -> str:
    built = build_case(case)
    if built.name:
        return built.name
    parts = [short(value, 24) for value in built.args] + [
        f"{k}={short(v, 24)}" for k, v in built.kwargs.items()
    ]
    text = ", ".join(part.removeprefix("tensor ") for part in parts)
    return text if len(text) <= 120 else text[:117] + "..."


def _failure(error: BaseException) -> Failure:
    try:
        text = str(error)
    except Exception:  # an exception class of the learner's whose own text fails
        text = ""
    unwritten = isinstance(error, NotImplementedError) and _is_stub(error)
    return Failure(type(error).__name__, text[:MAX_FAILURE_TEXT], _describe_error(error, text), unwritten)


def _describe_error(error: BaseException, text: str) -> str:
    """The exception and the learner's own line that led to it."""
    text = " ".join(text.split())
    text = text if len(text) <= 160 else text[:157] + "..."
    what = f"{type(error).__name__}: {text}" if text else type(error).__name__
    for filename, number in reversed(_frames(error)):
        if _is_own(filename):
            line = linecache.getline(filename, number).strip()
            return f"{what} (line {number}: {line})" if line else f"{what} (line {number})"
    if isinstance(error, TypeError) and "not callable" in text:
        return f"{what} (pass the function itself, not a result of it)"
    return what


def _frames(error: BaseException) -> list[tuple[str, int]]:
    frames, trace = [], error.__traceback__
    while trace is not None:
        frames.append((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
        trace = trace.tb_next
    return frames


def _is_own(filename: str) -> bool:
    """Whether code of that file is the learner's: neither this package's nor an installed library's."""
    package, standard = str(Path(__file__).resolve().parents[1]), sysconfig.get_paths()["stdlib"]
    return not filename.startswith((package, standard, "<frozen")) and "site-packages" not in filename


def _is_stub(error: NotImplementedError) -> bool:
    """Whether the answer itself says that it is unwritten; torch raises this type too, for kernels it lacks."""
    frames = _frames(error)
    filename, number = frames[-1]
    line = linecache.getline(filename, number)
    if filename == __file__:
        return True
    return "site-packages" not in filename and ("raise NotImplementedError" in line or not error.args)
