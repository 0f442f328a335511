"""Reading what a fork said: every field is checked, since the submission's code may have written it."""

from __future__ import annotations

import re
import signal
from typing import Any

from llmcourse.grading.jail.conversation import EndedEarly
from llmcourse.grading.jail.jobs import Answer, CellOutcome, Job, JobResult
from llmcourse.grading.limits import Limits
from llmcourse.grading.verdicts import Verdict

MAX_TEXT, MAX_CASES, MAX_CALLED = 2000, 1000, 20
_FAILURE = {"kind": str, "text": str, "described": str, "unwritten": bool}


def cell_outcome(cell: str, reply: dict[str, Any], output: str) -> CellOutcome:
    """The outcome of a cell.

    Raises:
        EndedEarly: the reply is not one that the harness writes.
    """
    status = reply.get("status")
    if status not in ("ok", "error"):
        raise _forged()
    return CellOutcome(cell, status, output, _text(reply.get("error")))


def answer(exercise: str, reply: dict[str, Any], values: bytes) -> Answer:
    """The answer to a question.

    Raises:
        EndedEarly: the reply is not one that the harness writes.
    """
    called = reply.get("called")
    if not isinstance(called, list) or len(called) > MAX_CALLED:
        raise _forged()
    names = tuple(_text(name) for name in called)
    if not all(re.fullmatch(r"llmcourse[\w.]*:[\w.<>]{1,100}", name, re.ASCII) for name in names):
        raise _forged()
    problem, fields = _text(reply.get("problem")), reply.get("outcomes")
    if fields is None:
        return Answer(exercise, None, problem or "no answer", names)
    if not isinstance(fields, list) or len(fields) > MAX_CASES:
        raise _forged()
    outcomes, start = [], 0
    for one in fields:
        size = one.get("size") if isinstance(one, dict) else None
        if type(size) is int and 0 <= size <= len(values) - start:
            changed = one.get("changed")
            changed = None if changed is None else _text(changed)
            outcomes.append({"value": values[start : start + size], "changed": changed})
            start += size
        else:
            outcomes.append({"failure": _failure(one)})
    if start != len(values):
        raise _forged()
    return Answer(exercise, outcomes, "", names)


def explain_death(end: dict[str, Any], limits: Limits, peak_kb: int, oom: bool) -> tuple[Verdict, str]:
    """The verdict on a fork that ended by itself.

    Args:
        end: how it ended.
        limits: of the job.
        peak_kb: the most memory that it held.
        oom: whether the system killed any process for want of memory meanwhile.
    """
    status, cpu = end["status"], end["cpu"]
    if status is None:
        return Verdict.CRASH, "it closed its connection to the grader"
    # The kernel counts in ticks for its limit, and more finely for what it reports here.
    if cpu >= 0.9 * limits.cpu_seconds - 0.3 and status in (-signal.SIGKILL, -signal.SIGXCPU):
        return Verdict.TIMEOUT, f"it used {limits.cpu_seconds} s of processor time"
    little = peak_kb < limits.memory_mb << 9  # half of the limit
    if status == -signal.SIGKILL and oom and little:
        return (
            Verdict.INFRASTRUCTURE,
            "the system killed it, though it held little memory: the machine is short of it",
        )
    if status == -signal.SIGKILL and (oom or not little):
        return Verdict.MEMORY, "the system killed it, most likely for its memory"
    if status < 0:
        return Verdict.CRASH, f"its process was ended by {_signal_name(-status)}"
    return Verdict.CRASH, f"its process ended with exit code {status}"


def unstarted(job: Job, note: str) -> JobResult:
    """The result of a job of which nothing ran, through no fault of its own."""
    cells = tuple(CellOutcome(cell.id, "not run") for cell in job.cells)
    return JobResult(cells, (), Verdict.INFRASTRUCTURE, 0.0, 0.0, note)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _failure(one: Any) -> dict[str, Any]:
    found = one.get("failure") if isinstance(one, dict) else None
    if not isinstance(found, dict) or set(found) != set(_FAILURE):
        raise _forged()
    if not all(type(found[name]) is kind for name, kind in _FAILURE.items()):
        raise _forged()
    return {name: _text(value) if type(value) is str else value for name, value in found.items()}


def _text(value: Any) -> str:
    """A text in one line, cut, of characters that can be written in UTF-8."""
    if not isinstance(value, str):
        raise _forged()
    return " ".join(value[:MAX_TEXT].encode("utf-8", "replace").decode("utf-8").split())


def _forged() -> EndedEarly:
    return EndedEarly(Verdict.REVIEW, "a reply that the harness does not write")
