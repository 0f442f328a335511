"""What the tests of the jail share: one started jail, a right answer, and a run after which nothing may be alive."""

from __future__ import annotations

import functools
import sys

import pytest

from llmcourse.checks.checking import CheckResult, Failure, Outcome, Trial
from llmcourse.checks.exercise import find_exercise
from llmcourse.grading.jail import usage
from llmcourse.grading.jail.client import Answer, Cell, Jail, Job, JobResult, Question
from llmcourse.grading.jail.visibility import visible_paths, writable_folder
from llmcourse.grading.limits import Limits
from llmcourse.grading.plain import decode, encode

SEED = 11
WRITABLE = writable_folder(visible_paths([], "/nowhere/home"))
"""where a submission may write: not `/tmp` when the course's clone lies in there"""
linux = pytest.mark.skipif(sys.platform != "linux", reason="the jail is made of walls that only Linux has")
COUNT = """
def count(d_model, n_heads, n_kv_heads, d_head, d_ff):
    return d_model * d_head * (2 * n_heads + 2 * n_kv_heads) + 3 * d_model * d_ff + 2 * d_model
"""
"""the right answer to `hardware/block_parameters`"""
MASK = """
import torch
def mask(n_queries, n_keys):
    return torch.ones(n_queries, n_keys, dtype=torch.bool).tril(n_keys - n_queries)
"""
"""the right answer to `attention/mask`"""
ASK_COUNT = Question("hardware/block_parameters", "count", SEED)
ASK_MASK = Question("attention/mask", "mask", SEED)


@functools.cache
def jail() -> Jail:
    """The jail of all tests, with every wall."""
    return Jail(["llmcourse.checks.hardware", "llmcourse.checks.attention"])


def limits(**changed: float) -> Limits:
    """Short limits."""
    return Limits(**{"wall_seconds": 1.5, "memory_mb": 512, "file_mb": 16, "processes": 32, **changed})


def run(*sources: str, ask: tuple[Question, ...] = (ASK_COUNT,), **changed: float) -> JobResult:
    """Run cells named "0", "1", ... and ask; then nothing but the zygote is alive."""
    cells = tuple(Cell(str(number), source) for number, source in enumerate(sources))
    result = jail().run(Job(cells, ask, limits(**changed)))
    require_empty(jail())
    return result


def require_empty(one: Jail) -> None:
    """Fail if anything but the zygote lives in the jail."""
    assert one._process is not None, "the zygote died"
    below = usage.descendants(one._process.pid)
    inner = one.layers["namespaces"] or one.layers["bubblewrap"]  # the process started is not the zygote then
    assert len(below) == int(inner), f"processes left: {below}"


def graded(answer: Answer, question: Question) -> CheckResult:
    """What an answer is worth, compared outside."""
    trial = Trial(find_exercise(question.exercise), question.seed, _through_codec)
    assert answer.outcomes is not None, answer.problem
    got = []
    for one, expected in zip(answer.outcomes, trial.expected, strict=False):
        if "failure" in one:
            got.append(Outcome(failure=Failure(**one["failure"])))
        else:
            got.append(Outcome(decode(one["value"], like=expected.value), changed=one["changed"]))
    return trial.grade(got)


def points(result: JobResult, question: Question = ASK_COUNT) -> int:
    """Points of a question's answer; 0 when there is no answer that can be compared."""
    for answer in result.answers:
        if answer.exercise == question.exercise and answer.outcomes is not None:
            return graded(answer, question).points
    return 0


def full(question: Question = ASK_COUNT) -> int:
    """Points of a right answer."""
    return find_exercise(question.exercise).points


def _through_codec(value: object) -> object:
    return decode(encode(value, limit_bytes=1 << 26), like=value)
