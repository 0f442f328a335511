"""The jail as the grader uses it: a job goes in, plain data comes out, nothing stays behind."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import shutil
import site
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

from llmcourse.grading.jail import replies, usage
from llmcourse.grading.jail.conversation import Conversation, EndedEarly, HungUp
from llmcourse.grading.jail.home import Home
from llmcourse.grading.jail.jobs import Answer, Cell, CellOutcome, Job, JobResult, Question
from llmcourse.grading.jail.messages import pack
from llmcourse.grading.jail.visibility import visible_paths, writable_folder
from llmcourse.grading.verdicts import Verdict

__all__ = ["Answer", "Cell", "CellOutcome", "Jail", "Job", "JobResult", "Question"]

START_SECONDS, SETUP_SECONDS, DEATH_SECONDS = 120.0, 20.0, 0.5
LAYERS = ("namespaces", "bubblewrap", "landlock", "seccomp")
_numbers = itertools.count()


class Jail:
    """A process with the libraries loaded, and a walled fork of it for each job; a context manager.

    One job at a time: several jails run several. Start it before any secret is read, and never from a fork.

    Attributes:
        layers: which walls stand: "namespaces", "bubblewrap" (around all forks, not each), "landlock", "seccomp",
            "user" (root's forks become another user).
    """

    def __init__(
        self, preload: Sequence[str], layers: str | Sequence[str] = "auto", trust: bool = False
    ) -> None:
        """Start it, with the strongest walls that this machine allows.

        Args:
            preload: modules to load, such as "llmcourse.checks.attention".
            layers: "auto", or exactly those of "namespaces", "bubblewrap", "landlock", "seccomp" to use.
            trust: go on where no wall can be put up, for submissions that may do as they like.

        Raises:
            ValueError: the walls cannot be put up, or a module cannot be loaded.
        """
        self._preload, self._trust, self._lock = tuple(preload), trust, threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._plans = _plans(layers, trust)
        self._start()

    def run(self, job: Job) -> JobResult:
        """Run a job; whatever its code does is in the result, and nothing of it is alive afterwards.

        Raises:
            ValueError: a support file has a path that leads out of its folder or that no file can have.
        """
        _check_files(list(job.files))
        with self._lock:
            try:
                if self._process is None:
                    self._start()
                return _Run(self, job).finish()
            except (_ZygoteGone, ValueError) as error:
                self.close()
                return replies.unstarted(job, f"the jail failed: {error}")

    def close(self) -> None:
        """End the process and with it everything inside."""
        if self._process is not None:
            self._control.close()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
            self._remove_home()

    def _remove_home(self) -> None:
        if self._home:
            self._home.remove()

    def __enter__(self) -> Jail:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()

    def _start(self) -> None:
        refusals = []
        for plan in self._plans:
            try:
                reply = self._start_zygote(plan)
            except _ZygoteGone as error:
                refusals.append(f"{'+'.join(plan) or 'no walls'}: {error}")
                if error.final:
                    break
                continue
            self.layers: dict[str, bool] = reply["layers"]
            self._shared_kb, self._resident_kb = reply["shared_kb"], reply["resident_kb"]
            self._plans = [plan]  # a restart must not be weaker
            return
        raise ValueError(f"the jail cannot be started ({'; '.join(refusals)})")

    def _start_zygote(self, plan: tuple[str, ...]) -> dict[str, Any]:
        self._control, other = socket.socketpair()
        inside = not {"namespaces", "bubblewrap"}.isdisjoint(plan)  # they come with a folder in memory
        self._home = None if inside else Home()
        site_folders, home = _site_folders(), os.path.expanduser("~")
        visible = visible_to_jails()
        folder = self._home.path if self._home else writable_folder(visible)
        settings = {
            "control": other.fileno(),
            "layers": plan,
            "preload": self._preload,
            "site": site_folders,
            "home": home,
            "folder": folder,
            "number": os.getpid() * 31 + next(_numbers),
        }
        command = [sys.executable, "-P", "-s", "-m", "llmcourse.grading.jail.zygote", json.dumps(settings)]
        if "bubblewrap" in plan:
            command = [*_bubblewrap(visible, folder), *command]
        try:
            with other:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=[other.fileno()],
                    env=_environment(folder),
                    cwd="/",
                    start_new_session=True,
                )
        except OSError as error:
            self._control.close()
            self._remove_home()
            raise _ZygoteGone(f"cannot run {command[0]}: {error.strerror}") from None
        try:
            reply = self.request(None, seconds=START_SECONDS)
            if not self._trust and not _enough({name for name, stands in reply["layers"].items() if stands}):
                raise _ZygoteGone("this kernel has no Landlock, or the filter does not know this processor")
            return reply
        except _ZygoteGone:
            self.close()
            raise

    def request(
        self, message: dict[str, Any] | None, descriptors: Sequence[int] = (), seconds: float = 30.0
    ) -> dict[str, Any]:
        """Send the zygote a request, with open files, and wait for its reply; for this package alone."""
        self._control.settimeout(seconds)
        try:
            if message is not None:
                socket.send_fds(self._control, [json.dumps(message).encode()], list(descriptors))
            line = b""
            while not line.endswith(b"\n"):
                part = self._control.recv(1 << 16)
                if not part:
                    raise _ZygoteGone("its process ended")
                line += part
        except OSError as error:
            raise _ZygoteGone(f"its process does not answer ({type(error).__name__})") from None
        reply = json.loads(line)
        if "error" in reply:
            raise _ZygoteGone(reply["error"], reply.get("final", False))
        return reply


class _ZygoteGone(Exception):
    """The trusted process failed, which is never a submission's doing; `final`: no other walls need be tried."""

    def __init__(self, text: str, final: bool = False) -> None:
        super().__init__(text)
        self.final = final


class _Run:
    """One job in one fork."""

    def __init__(self, jail: Jail, job: Job) -> None:
        self.jail, self.job, self.started, self.peak_kb = jail, job, time.monotonic(), 0
        self.oom_kills = usage.oom_kills()
        self.cells: dict[str, CellOutcome] = {}
        self.answers: dict[int, Answer] = {}

    def finish(self) -> JobResult:
        """Run it to whatever end, and make sure that all of it is gone."""
        ours, theirs = socket.socketpair()
        pipe_out, pipe_in = os.pipe()
        ended, note, hung_up = Verdict.GRADED, "", False
        try:
            try:
                self.jail.request({"fork": True}, [theirs.fileno(), pipe_in])
            finally:
                theirs.close()
                os.close(pipe_in)
            limit = self.job.limits.output_kb << 10
            self.conversation = Conversation(ours, pipe_out, limit, self._look)
            try:
                self._talk()
            except EndedEarly as error:
                ended, note = error.verdict, error.note
            except HungUp:
                hung_up = True
            end = self.jail.request({"end": DEATH_SECONDS if hung_up else 0.0})
            peak = max(self.peak_kb, end["peak_kb"] - self.jail._resident_kb, 0)
            if hung_up:
                ended, note = replies.explain_death(
                    end, self.job.limits, peak, usage.oom_kills() != self.oom_kills
                )
            self._keep_last_output()
        finally:
            ours.close()
            os.close(pipe_out)
        cells = tuple(self.cells.get(cell.id, CellOutcome(cell.id, "not run")) for cell in self.job.cells)
        answers = tuple(self.answers[number] for number in sorted(self.answers))
        one = self.running
        during = one.id if isinstance(one, Cell) else one.exercise if isinstance(one, Question) else ""
        return JobResult(cells, answers, ended, time.monotonic() - self.started, peak / 1024, note, during)

    def _talk(self) -> None:
        job, talk = self.job, self.conversation
        talk.set_deadline(SETUP_SECONDS)
        head = {
            "limits": asdict(job.limits),
            "files": [[name, len(data)] for name, data in job.files.items()],
            "watched": {name: list(functions) for name, functions in job.watched.items()},
        }
        try:
            talk.send(pack(head, b"".join(job.files.values())))
            message, _ = talk.receive(1 << 16)
        except (EndedEarly, HungUp) as error:
            raise EndedEarly(Verdict.INFRASTRUCTURE, f"the walls could not be put up ({error})") from None
        if "ready" not in message:
            raise EndedEarly(
                Verdict.INFRASTRUCTURE, f"the walls could not be put up ({message.get('failed', '?')})"
            )
        talk.set_deadline(job.limits.wall_seconds)
        self.values_left = job.limits.answer_mb << 20
        questions = list(enumerate(job.questions))
        known = {cell.id for cell in job.cells}
        for cell in job.cells:
            self._run_cell(cell)
            self._ask([(number, one) for number, one in questions if one.after == cell.id])
        self._ask([(number, one) for number, one in questions if one.after not in known])

    def _run_cell(self, cell: Cell) -> None:
        self.running = cell
        reply, _ = self.conversation.ask({"source": cell.source})
        output = self.conversation.take_output().decode("utf-8", "replace")
        self.cells[cell.id] = replies.cell_outcome(cell.id, reply, output)
        self.running = None
        self._look()

    def _ask(self, questions: list[tuple[int, Question]]) -> None:
        for number, question in questions:
            request = {
                "exercise": question.exercise,
                "expression": question.expression,
                "seed": question.seed,
                "limit": self.values_left,
            }
            self.running = question
            reply, values = self.conversation.ask(request, self.values_left)
            self.conversation.take_output()  # may hold hidden inputs: shown to nobody
            self.values_left -= len(values)
            self.answers[number] = replies.answer(question.exercise, reply, values)
            self.running = None

    running: Cell | Question | None = None
    values_left = 0

    def _keep_last_output(self) -> None:
        if isinstance(self.running, Cell):
            with contextlib.suppress(EndedEarly):
                self.conversation.drain()
            output = bytes(self.conversation.output).decode("utf-8", "replace")
            self.cells[self.running.id] = CellOutcome(self.running.id, "not run", output)

    def _look(self) -> None:
        """End the run when its processes hold more memory together than one may."""
        if platform.system() != "Linux" or self.jail._process is None:
            return
        ceiling = self.job.limits.memory_mb << 10
        outer = 2 if self.jail.layers["namespaces"] or self.jail.layers["bubblewrap"] else 1
        processes = usage.descendants(self.jail._process.pid)[outer - 1 :]
        held = usage.held_kb(processes, self.jail._shared_kb, ceiling)
        self.peak_kb = max(self.peak_kb, held)
        if held > ceiling:
            raise EndedEarly(Verdict.MEMORY, f"it held more than {self.job.limits.memory_mb} MiB")


def _check_files(names: list[str]) -> None:
    folders = {str(parent) for name in names for parent in PurePosixPath(name).parents}
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or not path.parts or ".." in path.parts or "\0" in name:
            raise ValueError(f"support file {name!r}: use a relative path without ..")
        sizes = [len(part.encode("utf-8", "surrogatepass")) for part in path.parts]
        if max(sizes) > 255 or sum(sizes) > 1000 or name in folders or not name.isprintable():
            raise ValueError(f"support file {name[:60]!r}: no file can have this path beside the others")


def _site_folders() -> list[str]:
    return [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]


def visible_to_jails() -> list[Path]:
    """What the inside of every jail sees of this machine's files.

    Raises:
        ValueError: the home folder would be visible.
    """
    return visible_paths(_site_folders(), os.path.expanduser("~"))


def _plans(layers: str | Sequence[str], trust: bool) -> list[tuple[str, ...]]:
    """The combinations of walls to try, the strongest first."""
    if isinstance(layers, str):
        if layers != "auto":
            raise ValueError(f'layers={layers!r}: write "auto" or a list of {", ".join(LAYERS)}')
        if platform.system() != "Linux":
            if not trust or not hasattr(os, "fork"):
                raise ValueError(
                    f"no jail on {platform.system()}: grade on Linux (WSL2, Docker) or trust all submissions"
                )
            return [()]
        plans = [("namespaces", "landlock", "seccomp"), ("landlock", "seccomp"), *([()] if trust else [])]
        if shutil.which("bwrap") and os.geteuid() != 0:
            plans.insert(1, ("bubblewrap", "landlock", "seccomp"))
        return plans
    unknown = sorted(set(layers) - set(LAYERS))
    if unknown:
        raise ValueError(f"unknown layers {unknown}: choose from {', '.join(LAYERS)}")
    if not _enough(set(layers)) and not trust:
        raise ValueError(
            "a jail needs namespaces, or two of bubblewrap, Landlock and seccomp, unless you trust all"
        )
    return [tuple(layers)]


def _enough(layers: set[str]) -> bool:
    return "namespaces" in layers or len(layers & {"bubblewrap", "landlock", "seccomp"}) >= 2


def _bubblewrap(visible: list[Path], folder: str) -> list[str]:
    """The command that runs another one in namespaces, for machines that allow these to `bwrap` alone."""
    command = [
        shutil.which("bwrap") or "bwrap",
        *"--unshare-all --as-pid-1 --die-with-parent --new-session".split(),
    ]
    command += [word for path in map(str, visible) for word in ("--ro-bind", path, path)]
    return [*command, *f"--proc /proc --dev /dev --size 268435456 --tmpfs {folder} --chdir /".split(), "--"]


def _environment(folder: str) -> dict[str, str]:
    """What the zygote and all forks see: nothing of the grader's own environment."""
    package_parent = str(Path(__file__).resolve().parents[3])
    variables = {
        "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
        "HOME": folder,
        "TMPDIR": folder,
        "IPYTHONDIR": f"{folder}/ipython",
        "MPLCONFIGDIR": f"{folder}/matplotlib",
        "MPLBACKEND": "Agg",
        "USER": "student",
        "LOGNAME": "student",
        "LANG": "C.UTF-8",
        "TZ": "UTC",
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
    }
    variables |= {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "RAYON")}
    if package_parent not in site.getsitepackages():
        variables["PYTHONPATH"] = package_parent  # the same package as the grader's, wherever it runs from
    return variables
