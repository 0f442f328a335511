"""The process that loads the libraries once and forks for each submission: `python -P -s -m ... '<settings>'`.

It gets two requests from the grader, over a socket: "fork", with the two ends that the fork talks and prints to, and
"end", which kills the fork with all that it started. It never reads a submission, and no secret.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import pwd
import random
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from llmcourse.grading.jail import landlock, namespaces, seccomp, usage
from llmcourse.grading.jail.home import remove_tree
from llmcourse.grading.jail.system_calls import (
    PR_SET_CHILD_SUBREAPER,
    PR_SET_DUMPABLE,
    prctl,
)
from llmcourse.grading.jail.visibility import visible_paths

QUIET_LOOKS = 5
PRELOADED = ("torch", "torch._dynamo", "llmcourse.checks.checking", "llmcourse.grading.jail.child")
"""always loaded: the first optimizer imports `torch._dynamo`, which takes a second"""


def main() -> None:
    """Enter the jail, load, and serve the grader until it hangs up."""
    settings = json.loads(sys.argv[1])
    control = socket.socket(fileno=settings["control"])
    try:
        zygote = Zygote(settings)
    except Exception as error:
        text = f"{error}" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        _send(control, {"error": " ".join(text.split()), "final": isinstance(error, Unloadable)})
        return
    memory = {"shared_kb": _kb("RssAnon"), "resident_kb": _kb("VmRSS")}
    _send(control, {"layers": zygote.layers, **memory})
    zygote.serve(control)


VIEWS = frozenset({"namespaces", "bubblewrap"})
"""walls in which files outside cannot be written; without them Landlock must know truncation, its third version"""


class Unloadable(ValueError):
    """A module is missing: other walls would not help."""


class Zygote:
    """The loaded process.

    Attributes:
        layers: which walls its forks have.
        walls: these walls, as a fork needs to know them.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        wanted = set(settings["layers"])
        visible = visible_paths(settings["site"], settings["home"])
        as_root = os.geteuid() == 0 if hasattr(os, "geteuid") else False
        user = _free_user(settings["number"]) if as_root and sys.platform == "linux" else None
        self.layers = {
            "namespaces": "namespaces" in wanted,
            "bubblewrap": "bubblewrap" in wanted,
            "landlock": "landlock" in wanted and landlock.version() >= (3 if wanted.isdisjoint(VIEWS) else 1),
            "seccomp": "seccomp" in wanted and seccomp.supported(),
            "user": user is not None,
        }
        if self.layers["namespaces"]:
            namespaces.enter(visible, settings["folder"], as_root)
            self._own_pids = os.open("/proc/self/ns/pid", os.O_RDONLY)
        elif sys.platform == "linux":
            if user is not None:
                _require_open(visible)
            prctl(PR_SET_CHILD_SUBREAPER, 1)
        sys.path += [path for path in settings["site"] if path not in sys.path]
        try:
            self._shell = _load([*PRELOADED, *settings["preload"]])
        except ImportError as error:
            raise Unloadable(f"a module cannot be loaded: {error}") from None
        self._fork, self._base = 0, settings["folder"]
        if sys.platform == "linux":
            prctl(PR_SET_DUMPABLE, 0)  # no fork can read or write this process's memory
        from llmcourse.grading.jail.child import Walls

        self.walls = Walls(
            namespaces=self.layers["namespaces"],
            landlock=self.layers["landlock"],
            filter=seccomp.build(self.layers["namespaces"]) if self.layers["seccomp"] else None,
            user=user,
            readable=(Path("/"),) if self.layers["namespaces"] else tuple(visible),
            data_bytes=_kb("VmData") << 10,
        )

    def serve(self, control: socket.socket) -> None:
        """Fork and end forks as asked; ends with the process, and all that it started, when the grader hangs up."""
        try:
            while data := self._receive(control):
                _send(control, self._obey(control, *data))
        except OSError:  # the grader died with a message unread
            pass
        finally:
            self._end(0)
            if not self.layers["namespaces"] and not self.layers["bubblewrap"]:
                remove_tree(self._base)
            os._exit(0)

    def _receive(self, control: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
        data, descriptors, _, _ = socket.recv_fds(control, 4096, 2)
        return (json.loads(data), descriptors) if data else None

    def _obey(
        self, control: socket.socket, request: dict[str, Any], descriptors: list[int]
    ) -> dict[str, Any]:
        if "fork" not in request:
            return self._end(request["end"])
        try:
            self._start(control, *descriptors)
        except OSError as error:
            return {"error": f"cannot fork: {error}"}
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return {"forked": self._fork}

    def _start(self, control: socket.socket, connection: int, pipe: int) -> None:
        from llmcourse.grading.jail import child

        inside = self.layers["namespaces"]
        self._folder = Path(self._base if inside else tempfile.mkdtemp(prefix="submission-", dir=self._base))
        if not inside and self.walls.user is not None:
            os.chown(self._folder, self.walls.user, self.walls.user)
        if inside:
            namespaces.unshare(namespaces.NEW_PIDS)  # for the next fork, which is process 1 there
        self._fork = os.fork()
        if self._fork:
            if inside:
                namespaces.call("setns", self._own_pids, namespaces.NEW_PIDS)
            return
        try:
            os.setsid()
            control.detach()
            other = socket.socket(fileno=connection)
            child.forked(lambda: child.live(other, self._folder, self.walls, self._shell), connection, pipe)
        finally:
            os._exit(70)

    def _end(self, patience: float) -> dict[str, Any]:
        """Kill the fork and all that it started, after waiting `patience` seconds for it to end by itself."""
        if not self._fork:
            return {"status": 0, "cpu": 0.0, "peak_kb": 0}
        until = time.monotonic() + patience
        found = os.wait4(self._fork, os.WNOHANG)
        while not found[0] and time.monotonic() < until:
            time.sleep(0.002)
            found = os.wait4(self._fork, os.WNOHANG)
        if not found[0]:
            os.kill(self._fork, signal.SIGKILL)
            _, _, usage = os.wait4(self._fork, 0)
            status: int | None = None
        else:
            _, status, usage = found
        if not self.layers["namespaces"]:  # there the kernel killed all with process 1
            _kill_descendants()
            remove_tree(self._folder)
        self._fork = 0
        return {
            "status": None if status is None else os.waitstatus_to_exitcode(status),
            "cpu": usage.ru_utime + usage.ru_stime,
            "peak_kb": usage.ru_maxrss,
        }


def _free_user(number: int) -> int:
    """A user number that nobody has, for root to become: another one for each jail of this machine."""
    for step in range(4000):
        user = 61184 + (number + step) % 4000
        try:
            pwd.getpwuid(user)
        except KeyError:
            return user
    return 65534


def _require_open(visible: list[Path]) -> None:
    """Refuse folders that are closed to the other user that root's forks become, where no view can be made for it."""
    for path in visible:
        closed = next((folder for folder in path.parents if not folder.stat().st_mode & 0o001), None)
        if closed is not None:
            raise ValueError(f"Python lies in {closed}, which is closed to others: grade as an ordinary user")


def _load(modules: list[str]) -> Any:
    """Import all, make IPython's shell, and take the first steps that are slow; only one thread may remain."""
    for name in dict.fromkeys(modules):
        importlib.import_module(name)
    import numpy as np
    import torch
    from IPython import version_info
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    torch.set_num_threads(1)
    config = Config()
    config.HistoryManager.enabled = False
    config.InteractiveShell.xmode = "Minimal"
    config.InteractiveShell.colors = "nocolor" if version_info >= (9,) else "NoColor"
    shell = InteractiveShell.instance(config=config)
    for source in ("1", "1/0", "%time 1"):
        shell.run_cell(source, store_history=False)
    model = torch.nn.Linear(2, 2)
    torch.nn.functional.mse_loss(model(torch.ones(1, 2)), torch.zeros(1, 2)).backward()
    torch.optim.AdamW(model.parameters()).step()
    for name in _needed_by_exercises([name for name in modules if name.startswith("llmcourse.checks.")]):
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    shell.reset(new_session=True)
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)
    if os.path.isdir("/proc/self/task") and (threads := len(os.listdir("/proc/self/task"))) > 1:
        raise RuntimeError(f"a preloaded module started {threads - 1} threads, which a fork would not have")
    sys.stdout.flush()  # what a fork finds in the buffer it would print
    sys.stderr.flush()
    gc.collect()
    gc.freeze()
    return shell


def _needed_by_exercises(modules: list[str]) -> list[str]:
    """Names of the modules that the exercises import only when they are exercised (a second, for scikit-learn).

    A fork finds out, so that nothing that they do, such as starting threads, happens to this process.
    """
    reading, writing = os.pipe()
    if not (fork := os.fork()):
        try:
            signal.alarm(60)
            before = set(sys.modules)
            for name in modules:
                _exercise_all(sys.modules[name])
            with open(writing, "w", encoding="utf-8") as file:
                file.write("\n".join(name for name in sys.modules if name not in before))
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, encoding="utf-8") as file:
        names = file.read().split()
    os.waitpid(fork, 0)
    return names


def _exercise_all(module: Any) -> None:
    from llmcourse.checks.checking import run_cases

    for exercise in getattr(module, "EXERCISES", ()):
        with contextlib.suppress(Exception):
            run_cases(exercise, exercise.reference, 0)


def _kb(field: str) -> int:
    """A field of this process's status, in KiB; 1 GiB where there is no such file."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return 1 << 20
    return int(status.split(f"{field}:")[1].split()[0])


def _kill_descendants() -> None:
    """Kill what a fork left behind; as this process adopts orphans, all of it is below.

    A process that always lives on as its own child may be missed by a look at the list, so it is looked at until it
    has been empty for some time.
    """
    quiet = 0
    while quiet < QUIET_LOOKS:
        left = usage.descendants(os.getpid())
        for process in left:
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        quiet = 0 if left else quiet + 1
        if not left:
            time.sleep(0.001)


def _send(control: socket.socket, message: dict[str, Any]) -> None:
    control.sendall(json.dumps(message).encode() + b"\n")


if __name__ == "__main__":
    main()
