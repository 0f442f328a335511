"""Grading a class: submissions a minute beside nbgrader, and what a submission that never ends or prints forever costs.

Ours is a whole batch (`grade_batch`, two workers, journal on the disk) without its start and its self-test, which the
result gives apart. nbgrader autogrades the same files in one process, as it does, without its start; it runs in the
Python that `$NBGRADER_PYTHON` names, or in this one, and is left out where neither has it. Both must come to the same
points, or the comparison is void. The labs are small: nbgrader runs all of a notebook, ours what the answers need.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from benchmarks.grading_labs import NBGRADER, WITH_TORCH, WITHOUT_TORCH, SmallLab
from benchmarks.harness import alternate, result
from llmcourse.grading.batch import grade_batch
from llmcourse.grading.limits import Limits
from llmcourse.grading.manifest import AssignmentKey
from llmcourse.grading.reports.exports import read_grades
from llmcourse.grading.station import Station

ROUNDS = 3
WORKERS = 2
SUBMISSIONS, NBGRADER_SUBMISSIONS = 400, 8
WALL_SECONDS = 3.0
LEAST = {"grading_speed": 2000, "grading_speed_torch": 800}
PYTHON_VARIABLE = "NBGRADER_PYTHON"


def run() -> list[dict[str, Any]]:
    """Two labs at full speed, then an endless loop and endless printing."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        outcomes = [
            *_throughput("grading_speed", "answers without torch", WITHOUT_TORCH, base / "plain"),
            *_throughput(
                "grading_speed_torch", "answers in torch, with 50 training steps", WITH_TORCH, base / "torch"
            ),
        ]
        limits = Limits(wall_seconds=WALL_SECONDS)
        key = WITHOUT_TORCH.released(base / "hostile", limits)
        return [*outcomes, _over_the_limit(key), _memory_while_printing(key)]


def _throughput(name: str, what: str, lab: SmallLab, base: Path) -> list[dict[str, Any]]:
    key = lab.released(base, Limits())
    hand_ins = {f"s{number:04}": lab.hand_in(key, number) for number in range(SUBMISSIONS)}
    submissions = base / "submissions"
    for student, data in hand_ins.items():
        _write(submissions / student / f"{key.name}.ipynb", data)
    points: dict[str, dict[str, float]] = {}
    starts: list[float] = []

    def ours() -> float:
        began = time.perf_counter()
        summary = grade_batch(
            submissions, base / "out" / "key", base / "report", workers=WORKERS, resume=False, progress=False
        )
        starts.append(time.perf_counter() - began - summary.seconds)
        points["ours"] = {grade.student: grade.points for grade in read_grades(base / "report")[1]}
        return 60 * summary.graded / summary.seconds

    contenders: dict[str, Callable[[], float]] = {"ours": ours}
    peer = _nbgrader()
    if peer:
        few = dict(list(hand_ins.items())[:NBGRADER_SUBMISSIONS])
        contenders[peer] = lambda: _autograde(base / "course", key, few, points)
    figures = alternate(contenders, ROUNDS, name.replace("_", " "))
    if peer and any(points["ours"][student] != value for student, value in points[peer].items()):
        raise RuntimeError("nbgrader comes to other points, so the comparison is void")
    what = f"grading {SUBMISSIONS} submissions of a small lab ({what}) with {WORKERS} workers"
    common = {"unit": "submissions/min", "ours": figures["ours"], "start_seconds": starts[1:]}
    found = [result(name, what=what, least=LEAST[name], **common)]
    if peer:
        what = f"{what}; nbgrader: the first {NBGRADER_SUBMISSIONS} in its one process"
        found.append(result(f"{name}_nbgrader", what=what, peers={peer: figures[peer]}, **common))
    return found


def _over_the_limit(key: AssignmentKey) -> dict[str, Any]:
    """Seconds beyond the limit until the next submission can start."""
    data = WITHOUT_TORCH.with_answer(key, ENDLESS)
    with _Grading(key) as station:
        station.grade_bytes("warm", key.solved())
        seconds = []
        for number in range(5):
            began = time.perf_counter()
            grade = station.grade_bytes(f"s{number}", data).grade
            seconds.append(time.perf_counter() - began - WALL_SECONDS)
            if grade.verdict not in ("timeout", "partial"):
                raise RuntimeError(f"an endless loop came to {grade.verdict}: {grade.note}")
    return result(
        "grading_endless_loop",
        what=f"time over a limit of {WALL_SECONDS:g} s that an endless loop costs, all signals ignored",
        unit="s",
        ours=seconds,
        higher_is_better=False,
        limit=1.0,
    )


def _memory_while_printing(key: AssignmentKey) -> dict[str, Any]:
    """What the grader grows by and what the submission's processes hold, while one prints forever."""
    data = WITHOUT_TORCH.with_answer(key, PRINTING)
    grown, held = [], []
    with _Grading(key) as station:
        station.grade_bytes("warm", key.solved())
        job_result = station.jail.run

        def note_peak(job: Any) -> Any:
            found = job_result(job)
            held.append(found.peak_mb)
            return found

        station.jail.run = note_peak  # type: ignore[method-assign]
        for number in range(5):
            with _PeakMemory() as memory:
                grade = station.grade_bytes(f"s{number}", data).grade
            grown.append(memory.grown_mb)
            if "printed" not in grade.note and grade.verdict != "output limit":
                raise RuntimeError(f"endless printing came to {grade.verdict}: {grade.note}")
    return result(
        "grading_printing_memory",
        what="memory that endless printing takes: the grader's growth and what the jail holds over its zygote",
        unit="MB",
        ours=[1.048576 * (one + other) for one, other in zip(grown, held, strict=True)],
        higher_is_better=False,
        limit=100.0,
        grader_mib=grown,
        jail_mib=held,
    )


ENDLESS = """\
import signal
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True:
    try:
        while True:
            pass
    except BaseException:
        pass
"""
PRINTING = "while True:\n    print('x' * 10_000)\n"


class _Grading:
    """A station as a context manager."""

    def __init__(self, key: AssignmentKey) -> None:
        self.station = Station(key)

    def __enter__(self) -> Station:
        return self.station

    def __exit__(self, *_: object) -> None:
        self.station.close()


class _PeakMemory:
    """Growth of this process's resident memory, in MiB, looked at every two milliseconds."""

    def __enter__(self) -> _PeakMemory:
        self._process, self._over = psutil.Process(), threading.Event()
        self._before = self._peak = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._over.wait(0.002):
            self._peak = max(self._peak, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def grown_mb(self) -> float:
        return (self._peak - self._before) / 2**20


def _nbgrader() -> str | None:
    """Name and version of nbgrader, where a Python has it."""
    python = os.environ.get(PYTHON_VARIABLE)
    if python is None and importlib.util.find_spec("nbgrader") is None:
        return None
    command = [python or sys.executable, "-c", "import nbgrader; print(nbgrader.__version__)"]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        raise RuntimeError(f"${PYTHON_VARIABLE}={python}: this Python cannot import nbgrader")
    return f"nbgrader {found.stdout.strip()}"


def _autograde(
    course: Path, key: AssignmentKey, hand_ins: dict[str, bytes], points: dict[str, dict[str, float]]
) -> float:
    """Submissions a minute of `nbgrader autograde`, in a course of its own."""
    if not course.exists():
        _write(course / "source" / "lab" / "lab.ipynb", key.untouched())
        for student, data in hand_ins.items():
            _write(course / "submitted" / student / "lab" / "lab.ipynb", data)
    python = Path(os.environ.get(PYTHON_VARIABLE, sys.executable))
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"  # nbgrader calls its database's program by name
    found = subprocess.run(
        [str(python), "-c", NBGRADER],
        cwd=course,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
        capture_output=True,
        text=True,
    )
    if found.returncode:
        raise RuntimeError(f"nbgrader failed: {found.stderr[-2000:]}")
    report = json.loads(found.stdout.splitlines()[-1])
    points[f"nbgrader {report['version']}"] = report["points"]
    return 60 * len(hand_ins) / report["seconds"]


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
