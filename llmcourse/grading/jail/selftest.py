"""Try to get out of the jail, before each batch and in `llmcourse doctor`: a wall stands if the attempt fails."""

from __future__ import annotations

import secrets
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llmcourse.grading.jail.client import Cell, Jail, Job, JobResult
from llmcourse.grading.limits import Limits

LIMITS = Limits(
    wall_seconds=10, cpu_seconds=8, memory_mb=256, output_kb=16, processes=16, file_mb=8, answer_mb=1
)
# Each attempt prints OUT if it got out; what it raises means that a wall stands.
_ATTEMPTS = {
    "network": "import socket\nsocket.create_connection(({host!r}, {port}), 1)\nprint('OUT')",
    "names": "import socket\nsocket.getaddrinfo('example.org', 80)\nprint('OUT')",
    "abstract socket": "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect({abstract!r})\nprint('OUT')",
    "password file": "print('OUT', len(open('/etc/passwd').read()))",
    "home folder": "import os\nif any(map(os.path.exists, {hidden!r})): print('OUT')",
    "course folder": "print('OUT', len(open({secret!r}).read()))",
    "writing outside": "open({written!r}, 'w').write('x')\nprint('OUT')",
    "rights outside": "import os\nos.chmod({secret!r}, 0o777)\nprint('OUT')",
    "libraries": "import os, torch\nopen(os.path.join(os.path.dirname(torch.__file__), 'x.py'), 'w')\nprint('OUT')",
    "other processes": (
        "import os\nothers = [int(n) for n in os.listdir('/proc') if n.isdigit() and int(n) != os.getpid()]\n"
        "if [n for n in others if os.access(f'/proc/{{n}}/environ', os.R_OK)]: print('OUT')"
    ),
    "tracing": "import ctypes\nif ctypes.CDLL(None).ptrace(0, 0, 0, 0) == 0: print('OUT')",
    "new namespaces": "import ctypes\nif ctypes.CDLL(None).unshare(0x10000000) == 0: print('OUT')",
    "number of processes": (
        "import os, time\nfor n in range({processes}):\n"
        "    if os.fork() == 0:\n        time.sleep(60)\n        os._exit(0)\nprint('OUT')"
    ),
    "memory": "b = bytearray({memory})\nprint('OUT')",
    "size of files": (
        "for n in range({files}):\n    with open(f'f{{n}}', 'wb') as f: f.write(bytes(1 << 20))\nprint('OUT')"
    ),
    "input": "input()\nprint('OUT')",
}
_STAY = (
    "import os\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
    "        import ctypes, time\n        ctypes.CDLL(None).prctl(15, {marker!r})\n        time.sleep(600)\n"
    "    os._exit(0)\nos.wait()"
)
_NEEDS = {"size of files": "namespaces", "new namespaces": "seccomp", "tracing": "seccomp"}
"""walls of which only this layer is the ground: without it they are reported as absent, with that reason"""
BEARABLE = frozenset({"size of files"})
"""walls that a machine may lack: a submission could fill the disk of temporary files until it is killed"""


@dataclass(frozen=True)
class Wall:
    """One attempt.

    Attributes:
        name: what was tried.
        stands: whether it failed, as it must.
        detail: one line about it.
    """

    name: str
    stands: bool
    detail: str = ""


def self_test(jail: Jail) -> list[Wall]:
    """Try every way out that can be tried without harm.

    Raises:
        ValueError: the attempts could not be run at all.
    """
    marker = f"stay{secrets.token_hex(4)}"
    walls: list[Wall] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        socket.socket() as server,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        secret = Path(folder, "secret")
        secret.write_text("x", encoding="utf-8")
        for path, rights in ((Path(folder), 0o755), (secret, 0o644)):
            path.chmod(rights)
        server.bind(("127.0.0.1", 0))
        server.listen()
        # Only Linux has socket names that are no files.
        names = {"abstract": f"\0{marker}" if sys.platform == "linux" else str(Path(folder, "socket"))}
        abstract.bind(names["abstract"])
        abstract.listen()
        names |= {"host": "127.0.0.1", "port": server.getsockname()[1], "hidden": _hidden()}
        names |= {
            "secret": str(secret),
            "written": str(secret.with_name("written")),
            "files": LIMITS.file_mb + 4,
        }
        names |= {"memory": 2 * LIMITS.memory_mb << 20, "processes": 2 * LIMITS.processes}
        cells = [Cell(name, source.format(**names)) for name, source in _ATTEMPTS.items()]
        # One after the other in one fork; what stays is tried last, beside all that the attempts left.
        result = jail.run(Job((*cells, Cell("stay", _STAY.format(marker=marker.encode()))), limits=LIMITS))
        if result.cells[0].status == "not run":
            raise ValueError(f"the jail's self-test did not run: {result.note or result.ended}")
        walls += [_wall(jail, result, cell.id) for cell in cells]
        left = secret.with_name("written").exists() or secret.stat().st_mode & 0o777 != 0o644
        walls.append(Wall("files outside are unchanged", not left))
    walls.append(Wall("nothing stays alive", not _alive(marker)))
    walls.append(_output_wall(jail))
    return walls


def _wall(jail: Jail, result: JobResult, name: str) -> Wall:
    outcome = next(cell for cell in result.cells if cell.id == name)
    stands = outcome.status != "not run" and "OUT" not in outcome.output
    detail = outcome.error[:100] or ("" if stands else result.note or outcome.output.strip()[:100])
    layer = _NEEDS.get(name)
    if not stands and layer and not jail.layers[layer]:
        detail = f"needs {layer}, which this machine does not allow"
    return Wall(name, stands, detail)


def _output_wall(jail: Jail) -> Wall:
    result = jail.run(Job((Cell("print", "while True: print('x' * 1000)"),), limits=LIMITS))
    return Wall("printed output", result.ended == "output limit", result.note)


def _hidden() -> list[str]:
    """What lies in the home folder, but for what leads to the interpreter."""
    shown = [Path(path).resolve() for path in (sys.prefix, sys.base_prefix, Path(__file__).parents[2])]
    try:
        found = sorted(Path.home().iterdir())[:100]
    except OSError:
        return []
    return [str(path) for path in found if not any(one.is_relative_to(path) for one in shown)]


def _alive(marker: str) -> bool:
    """Whether a process of that name is left anywhere."""
    return any(name == marker[:15] for name in _process_names())


def _process_names() -> list[str]:
    found: list[str] = []
    read: Callable[[Path], str] = Path.read_text
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            found.append(read(path).strip())
        except OSError:
            continue
    return found
