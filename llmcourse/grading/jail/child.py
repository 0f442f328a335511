"""What runs in the fork: put up the walls, then run cells and answer questions, one request at a time.

Everything here after the walls shares a process with the submission's code, which can read and change all of it. So it
holds nothing to protect: requests come one by one, and what is sent back is taken for what it is, plain data.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import random
import resource
import signal
import socket
import struct
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmcourse.checks.checking import run_cases
from llmcourse.checks.exercise import find_exercise
from llmcourse.grading.jail import landlock, namespaces, seccomp
from llmcourse.grading.jail.messages import pack, receive
from llmcourse.grading.jail.system_calls import (
    PR_SET_DUMPABLE,
    PR_SET_NO_NEW_PRIVS,
    PR_SET_PDEATHSIG,
    call,
    prctl,
)
from llmcourse.grading.jail.watching import Watch
from llmcourse.grading.limits import Limits
from llmcourse.grading.plain import PlainError, encode

MAX_TEXT = 2000
"""characters of an error that are kept"""
SMALL_FILES_PER_MB = 64
"""number of files for each MiB of files"""
MAX_OPEN_FILES = 256


@dataclass(frozen=True)
class Walls:
    """What a fork puts around itself.

    Attributes:
        namespaces: whether the zygote lives in namespaces, so that the fork enters its own.
        landlock: whether to use Landlock.
        filter: the filter of system calls, if there is one.
        user: user and group to become: of nobody, when the zygote is root's.
        readable: what Landlock allows to read.
        data_bytes: bytes of data that the zygote had, which do not count.
    """

    namespaces: bool
    landlock: bool
    filter: bytes | None
    user: int | None
    readable: tuple[Path, ...]
    data_bytes: int


def live(connection: socket.socket, folder: Path, walls: Walls, shell: Any) -> None:
    """Serve one submission until the other side hangs up; the caller then ends the process.

    Args:
        connection: to the grader.
        folder: the one folder to write in.
        walls: what to put up first.
        shell: IPython's, in which nothing has run.
    """
    received = receive(connection)
    if received is None:
        return
    job, contents = received
    limits = Limits(**job["limits"])
    try:
        _limit(limits, walls, len(contents))
        _wall_in(limits, folder, walls, len(contents))
        _furnish(folder, job["files"], contents)
        watches = {name: Watch(watched, shell.user_ns) for name, watched in job["watched"].items()}
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        connection.sendall(pack({"failed": text[:MAX_TEXT]}))
        return
    random.seed(0)  # Python's generator seeds itself anew in a fork
    connection.sendall(pack({"ready": True}))
    while (received := receive(connection)) is not None:
        request, body = received
        if "source" in request:
            reply = pack({"nonce": request["nonce"], **_run_cell(shell, request["source"])})
        else:
            watch = watches.get(request["exercise"]) or Watch((), shell.user_ns)
            fields, answer = _answer(request, shell.user_ns, watch)
            reply = pack({"nonce": request["nonce"], **fields}, answer)
        connection.sendall(reply)


def _limit(limits: Limits, walls: Walls, file_bytes: int) -> None:
    """Set the limits that the kernel keeps for each process."""
    file_bytes += limits.file_mb << 20
    ceilings = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_DATA: walls.data_bytes + (limits.memory_mb << 20),
        resource.RLIMIT_CPU: limits.cpu_seconds,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NOFILE: MAX_OPEN_FILES,
        resource.RLIMIT_NPROC: limits.processes,
        resource.RLIMIT_STACK: 8 << 20,
    }
    if not walls.namespaces and walls.user is None:
        # Without namespaces the kernel counts what else this user runs.
        ceilings[resource.RLIMIT_NPROC] += _processes_of_user()
    for what, ceiling in ceilings.items():
        most = resource.getrlimit(what)[1]
        ceiling = ceiling if most == resource.RLIM_INFINITY else min(ceiling, most)
        resource.setrlimit(what, (ceiling, ceiling))


def _processes_of_user() -> int:
    user, found = os.getuid(), 0
    if not os.path.isdir("/proc/self"):
        return 512
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                found += len(os.listdir(f"{entry.path}/task")) if entry.stat().st_uid == user else 0
            except OSError:
                continue
    return found


def _wall_in(limits: Limits, folder: Path, walls: Walls, file_bytes: int) -> None:
    """Leave for a world that holds nothing but the libraries and the submission."""
    if walls.namespaces:
        # Inside a user namespace the fork stays who it is; its number there is not the one outside.
        owner, group = (os.getuid(), os.getgid()) if walls.user is None else (walls.user, walls.user)
        files = SMALL_FILES_PER_MB * (limits.file_mb + (file_bytes >> 20) + 1) + 256
        namespaces.enter_job(
            str(folder), (limits.file_mb << 20) + file_bytes + (1 << 20), files, owner, group
        )
    if walls.user is not None:
        os.setgroups([])
        os.setresgid(walls.user, walls.user, walls.user)
        os.setresuid(walls.user, walls.user, walls.user)
    if sys.platform != "linux":
        return
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    if not walls.namespaces:  # there it dies with process 1 of the zygote's own
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if walls.namespaces:
        _drop_capabilities()
    prctl(PR_SET_DUMPABLE, 1)  # its files in /proc would otherwise be root's; its memory is measured there
    with contextlib.suppress(OSError):  # when the machine runs out of memory, this is the process to end
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    if walls.landlock:
        devices = [Path("/dev", name) for name in ("null", "full", "random", "urandom")]
        own = [Path("/proc")] if walls.namespaces else []
        landlock.restrict(walls.readable, [folder, *devices, *own], tcp=walls.namespaces)
    if walls.filter is not None:
        seccomp.install(walls.filter)


def _drop_capabilities() -> None:
    """Give up what the fork holds as its namespaces' owner."""
    header = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0), 8)
    nothing = ctypes.create_string_buffer(24)
    call("capset", header, nothing)


def _furnish(folder: Path, names: list[list[Any]], contents: bytes) -> None:
    """Make the folders that programs look for, write the support files, and go to the work folder."""
    for name in ("work", "home", "shm"):
        (folder / name).mkdir(exist_ok=True)
    variables = {
        "HOME": "home",
        "TMPDIR": ".",
        "IPYTHONDIR": "home",
        "MPLCONFIGDIR": "home",
        "HF_HOME": "home",
    }
    variables |= {"TORCHINDUCTOR_CACHE_DIR": "home", "XDG_CACHE_HOME": "home", "LLMCOURSE_CACHE": "home"}
    os.environ.update({name: str((folder / where).resolve()) for name, where in variables.items()})
    os.chdir(folder / "work")
    start = 0
    for name, size in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(contents[start : start + size])
        start += size


def _run_cell(shell: Any, source: str) -> dict[str, Any]:
    """Run a cell as a notebook does: what it raises is noted and the next one runs."""
    output = sys.stdout
    try:
        result = shell.run_cell(source, store_history=False)
        error = result.error_before_exec or result.error_in_exec
        fields = {"status": "error" if error else "ok", "error": _text(error) if error else ""}
    except BaseException as error:
        fields = {"status": "error", "error": _text(error)}
    sys.stdout = sys.stderr = output
    _flush(output)
    return fields


def _flush(stream: io.TextIOBase) -> None:
    try:
        stream.flush()
    except (OSError, ValueError, AttributeError):  # the submission closed it
        return


def _text(error: BaseException) -> str:
    try:
        text = " ".join(str(error).split())
    except BaseException:
        text = "(its text cannot be read)"
    return f"{type(error).__name__}: {text}"[:MAX_TEXT] if text else type(error).__name__[:MAX_TEXT]


def _answer(request: dict[str, Any], namespace: dict[str, Any], watch: Watch) -> tuple[dict[str, Any], bytes]:
    """The outcomes of one question as fields, and their values one after the other."""

    def refuse(problem: str) -> tuple[dict[str, Any], bytes]:
        return {"problem": problem[:MAX_TEXT], "outcomes": None, "called": sorted(watch.found)}, b""

    try:
        answer = eval(compile(request["expression"], "<question>", "eval"), namespace)
    except NameError as error:
        return refuse(f"missing name: {getattr(error, 'name', None) or _text(error)}")
    except BaseException as error:
        return refuse(f"no answer: {_text(error)}")
    try:
        watch.found |= watch.names_of(answer)
        exercise = find_exercise(request["exercise"])
        with watch:
            outcomes = run_cases(exercise, answer, request["seed"], True)
        fields, values, left = [], [], request["limit"]
        for number, outcome in enumerate(outcomes, 1):
            if outcome.failure is not None:
                fields.append({"failure": asdict(outcome.failure)})
                continue
            value = _encoded(outcome.value, left, number)
            left -= len(value)
            values.append(value)
            fields.append({"size": len(value), "changed": outcome.changed})
    except PlainError as error:
        return refuse(str(error))
    except BaseException as error:
        return refuse(f"no answer: {_text(error)}")
    return {"problem": "", "outcomes": fields, "called": sorted(watch.found)}, b"".join(values)


def _encoded(value: Any, limit: int, number: int) -> bytes:
    try:
        return encode(value, limit_bytes=limit)
    except PlainError as error:
        raise PlainError(f"not plain: in case {number}, {error}") from None


def forked(live_in: Callable[[], None], connection: int, pipe: int) -> None:
    """Run in the fork with nothing open but the connection and the pipe for its output; never returns."""
    try:
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (pipe, 1), (pipe, 2)):
            os.dup2(source, target)
        os.closerange(3, connection)
        os.closerange(connection + 1, 65536)
        sys.stdout.reconfigure(line_buffering=True)
        sys.stderr = sys.stdout
        live_in()
        _flush(sys.stdout)
    finally:
        os._exit(0)
