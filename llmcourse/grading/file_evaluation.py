"""The course's own evaluation of submitted files, in a process of its own, on held-out data.

An evaluation is a function of `Artifacts` and a seed, which chooses the held-out data, the same for a whole class:

    def evaluate(artifacts: Artifacts, seed: int) -> FileScore

It is trusted; what it is given is not, so it has a time limit and a memory limit.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmcourse.durable import text_digest
from llmcourse.grading.grades import Item
from llmcourse.grading.limits import Limits
from llmcourse.grading.submitted_files import read_artifacts
from llmcourse.grading.verdicts import Finding, Verdict

FILES = "files"
"""the exercise under which a grade lists the points of submitted files"""
MAX_REPLY = 1 << 20
START_SECONDS = 120.0
"""for the process to load torch on a busy machine; the limit of the submission counts from there"""
MARK = "\n--- file score ---\n"
NOT_NOW = "Your files could not be evaluated yet."


@dataclass(frozen=True)
class FileScore:
    """What an evaluation found.

    Attributes:
        share: of the points, from 0 to 1.
        message: one line for the student; it must not tell about the held-out data.
        detail: one line for the instructor.
    """

    share: float
    message: str
    detail: str = ""


@dataclass(frozen=True)
class Evaluation:
    """How submitted files are graded.

    Attributes:
        evaluator: "module:function" or "file.py:function", see `find_evaluator`.
        points: what the files are worth.
    """

    evaluator: str
    points: float

    def digest(self) -> str:
        """Digest of the evaluation's name, points and source.

        Raises:
            ValueError: there is no such function.
        """
        path = Path(self.evaluator.rpartition(":")[0])
        stamp = path.stat().st_mtime_ns if path.is_file() else 0
        return text_digest(f"{self.evaluator}\n{self.points}\n{_source_of(self.evaluator, stamp)}")


@functools.cache
def _source_of(evaluator: str, stamp: int) -> str:
    """Source of an evaluation, read once for a batch and again when the file has changed."""
    source = inspect.getsourcefile(find_evaluator(evaluator))
    return Path(source).read_text(encoding="utf-8") if source else ""


@dataclass(frozen=True)
class Evaluated:
    """What became of a submission's files: the item of its grade, how it ended, and what was noticed."""

    item: Item
    ended: Verdict
    findings: tuple[Finding, ...] = ()


def find_evaluator(name: str) -> Any:
    """The function of "module:function", or of "path/to/file.py:function" for an instructor's own.

    Raises:
        ValueError: there is none.
    """
    place, _, function = name.rpartition(":")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location("submitted_files_evaluator", place)
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module  # dataclasses look their module up
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        found = getattr(module, function)
    except Exception as error:  # an instructor's file: anything may be wrong with it
        found = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"no evaluation {name!r} ({found}): write module:function or file.py:function"
        ) from None
    if not callable(found):
        raise ValueError(f"{name!r} is no function: write module:function or file.py:function")
    return found


def evaluate_files(folder: Path | None, evaluation: Evaluation, seed: int, limits: Limits) -> Evaluated:
    """Evaluate a student's files; whatever they are, it comes to an item.

    Args:
        folder: of the files; it may be absent.
        evaluation: how.
        seed: of the held-out data.
        limits: seconds and memory.
    """
    max_points = evaluation.points
    if folder is None or not folder.is_dir():
        item = Item(FILES, "Submitted files", 0, max_points, "not answered", "No files were handed in.")
        return Evaluated(item, Verdict.GRADED)
    request = {
        "folder": str(folder),
        "evaluator": evaluation.evaluator,
        "seed": seed,
        "memory_mb": limits.memory_mb,
        "seconds": limits.wall_seconds,
    }
    call = [sys.executable, "-P", "-m", "llmcourse.grading.file_evaluation"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    process = subprocess.Popen(
        call,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
    try:
        out, _ = process.communicate(
            json.dumps(request).encode(), timeout=START_SECONDS + limits.wall_seconds
        )
    except subprocess.TimeoutExpired:
        return _too_long(max_points)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode == -signal.SIGALRM:
        return _too_long(max_points)
    return _reply(out, process.returncode, max_points)


def _too_long(max_points: float) -> Evaluated:
    return _ended(Verdict.TIMEOUT, "The evaluation of your files took too long.", max_points)


def _reply(out: bytes, code: int, max_points: float) -> Evaluated:
    if code == -signal.SIGKILL:  # nobody but the system does that
        return _ended(Verdict.INFRASTRUCTURE, NOT_NOW, max_points, "the system killed the evaluation")
    _, mark, text = out[-MAX_REPLY:].decode("utf-8", "replace").rpartition(MARK)
    try:
        reply = json.loads(text) if mark else None
    except ValueError:
        reply = None
    if not isinstance(reply, dict):
        return _ended(
            Verdict.CRASH, "The evaluation of your files ended early.", max_points, f"exit code {code}"
        )
    findings = tuple(Finding(**finding) for finding in reply["findings"])
    if "error" in reply:
        memory = any(
            word in reply["error"] for word in ("MemoryError", "allocate memory", "not enough memory")
        )
        ended = Verdict.MEMORY if memory else Verdict.REVIEW
        return _ended(ended, "Your files could not be evaluated.", max_points, reply["error"], findings)
    score = FileScore(**reply["score"])
    status = "correct" if score.share == 1 else "wrong" if score.share == 0 else "partly"
    points = round(score.share * max_points, 2)
    item = Item(FILES, "Submitted files", points, max_points, status, score.message, detail=score.detail)
    return Evaluated(item, Verdict.GRADED, findings)


def not_evaluated(evaluation: Evaluation, why: str) -> Evaluated:
    """What becomes of files that this machine could not evaluate; they are tried again."""
    return _ended(Verdict.INFRASTRUCTURE, NOT_NOW, evaluation.points, " ".join(why.split()))


def _ended(
    verdict: Verdict, message: str, max_points: float, detail: str = "", findings: tuple[Finding, ...] = ()
) -> Evaluated:
    item = Item(FILES, "Submitted files", 0, max_points, "error", message, detail=detail[:2000])
    return Evaluated(item, verdict, findings)


def _limit_memory(megabytes: int) -> None:
    if sys.platform == "linux":
        import resource

        with open("/proc/self/status", encoding="ascii") as file:
            held = next(int(line.split()[1]) for line in file if line.startswith("VmData"))
        ceiling = (held << 10) + (megabytes << 20)
        resource.setrlimit(resource.RLIMIT_DATA, (ceiling, ceiling))


def main() -> None:
    """Answer the one request on standard input."""
    request = json.loads(sys.stdin.buffer.read())
    import torch

    torch.set_num_threads(1)
    evaluator = find_evaluator(request["evaluator"])
    _limit_memory(request["memory_mb"])
    signal.setitimer(signal.ITIMER_REAL, request["seconds"])  # nothing catches it: the process ends
    findings: tuple[Finding, ...] = ()
    try:
        artifacts = read_artifacts(Path(request["folder"]))
        findings = artifacts.findings
        score = evaluator(artifacts, request["seed"])
        if not 0 <= score.share <= 1:
            raise ValueError(f"the evaluation gave the share {score.share}, which is not from 0 to 1")
        reply: dict[str, Any] = {"score": asdict(score)}
    except Exception as error:  # of files that the evaluation did not expect
        reply = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
    reply["findings"] = [asdict(finding) for finding in findings]
    sys.stdout.write(MARK + json.dumps(reply))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
