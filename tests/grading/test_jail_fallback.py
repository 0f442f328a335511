"""Where namespaces are refused: Landlock and the filter of system calls; and all attacks again as an ordinary user."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmcourse.grading.jail import landlock, seccomp, usage
from llmcourse.grading.jail.client import Cell, Jail, Job
from llmcourse.grading.jail.selftest import self_test
from llmcourse.grading.verdicts import Verdict
from tests.grading.jails import ASK_COUNT, COUNT, full, limits, linux, points, require_empty

HERE = Path(__file__).parent
CLOSED = (
    os.name == "posix"
    and os.geteuid() == 0
    and not all(p.stat().st_mode & 1 for p in Path(sys.base_prefix).parents)
)
pytestmark = linux
needs_open_python = pytest.mark.skipif(
    CLOSED, reason="Python lies in root's folder: runs as an ordinary user below"
)
needs_landlock = pytest.mark.skipif(
    not (sys.platform == "linux" and landlock.version() and seccomp.supported()), reason="no Landlock here"
)


WEAKER = (("landlock", "seccomp"), ("bubblewrap", "landlock", "seccomp"), ("bubblewrap", "seccomp"))


@pytest.fixture(scope="module", params=WEAKER, ids="+".join)
def weaker(request) -> Iterator[Jail]:
    if "bubblewrap" in request.param and (shutil.which("bwrap") is None or os.geteuid() == 0):
        pytest.skip("needs bubblewrap, as an ordinary user")
    with Jail(["llmcourse.checks.hardware"], layers=request.param) as one:
        yield one


@needs_open_python
@needs_landlock
def test_without_namespaces_the_other_walls_stand_but_for_the_total_of_files(weaker):
    fallen = {wall.name: wall.detail for wall in self_test(weaker) if not wall.stands}
    assert list(fallen) == ["size of files"] and "needs namespaces" in fallen["size of files"]
    require_empty(weaker)


@needs_open_python
@needs_landlock
@pytest.mark.parametrize(
    "source",
    [
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(600)\n    os._exit(0)",
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "import os, signal\nfor n in range(2, 70000):\n    try: os.kill(n, 9); print('OUT')\n    except OSError: pass",
        "import os\nfor n in (os.getppid(), 1):\n    try: os.setpriority(os.PRIO_PROCESS, n, 19); print('OUT')\n"
        "    except OSError: pass\nimport resource\n"
        "try: resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1)); print('OUT')\nexcept OSError: pass",
        "import os\nfor n in range(1, 70000):\n    for name in ('mem', 'environ', 'maps'):\n"
        "        try:\n            if n != os.getpid(): open(f'/proc/{n}/{name}', 'rb'); print('OUT', n, name)\n"
        "        except OSError: pass",
        "import fcntl, os, signal\nr, w = os.pipe()\n"
        "for number in (fcntl.F_SETOWN, 10):\n    try: fcntl.fcntl(r, number, os.getppid()); print('OUT', number)\n"
        "    except OSError: pass",
        "import socket\ntry: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM); print('OUT')\n"
        "except OSError: pass\nsocket.socketpair()",
        "import os\nif os.fork() == 0:\n    os.setsid()\n    while True:\n        if os.fork(): os._exit(0)",
        "import os\nos.umask(0o477)\nos.mkdir('e')\nopen('e/f', 'w').write('x')",
        "import os\nfor n in range(1500):\n    os.mkdir('d')\n    os.chdir('d')",
    ],
    ids=[
        *("stays", "fork bomb", "kills", "limits of others", "memory of others", "signals by files"),
        *("datagrams", "always another process", "folder that nobody may read", "folders in folders"),
    ],
)
def test_without_namespaces_nothing_stays_and_nobody_is_hit(weaker, source):
    result = weaker.run(Job((Cell("a", COUNT), Cell("b", source)), (ASK_COUNT,), limits()))
    require_empty(weaker)
    assert result.ended in (Verdict.GRADED, Verdict.TIMEOUT) and "OUT" not in result.cells[1].output
    home = weaker._home.path if weaker._home else None
    assert home is None or not [name for name in os.listdir(home) if name.startswith("submission-")]
    again = weaker.run(
        Job((Cell("a", COUNT), Cell("b", "import os\nprint(os.listdir('.'))")), (ASK_COUNT,), limits())
    )
    assert points(again) == full() and again.cells[1].output == "[]\n"


@needs_open_python
def test_the_self_test_notices_missing_walls():
    with Jail([], layers=(), trust=True) as open_jail:
        fallen = {wall.name for wall in self_test(open_jail) if not wall.stands}
    assert {
        "network",
        "course folder",
        "rights outside",
        "files outside are unchanged",
        "size of files",
    } <= fallen
    assert not fallen & {"nothing stays alive", "memory", "input", "printed output"}


@pytest.mark.skipif(not CLOSED, reason="Python is open to all here")
def test_without_namespaces_a_python_of_roots_is_refused_in_one_line():
    with pytest.raises(ValueError, match="closed to others: grade as an ordinary user$|\\)$") as caught:
        Jail([], layers=("landlock", "seccomp"))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.skipif(
    os.name != "posix" or os.geteuid() != 0, reason="the tests run as an ordinary user already"
)
def test_all_attacks_fail_as_an_ordinary_user_too():
    names = ["test_jail_attacks_resources.py", "test_jail_attacks_secrets.py", "test_jail_attacks_forging.py"]
    command = [sys.executable, str(HERE / "ordinary_user.py"), sys.executable, "-m", "pytest", "-q", "-p"]
    command += ["no:cacheprovider"]
    paths = [str(HERE / name) for name in (*names, Path(__file__).name)]
    done = subprocess.run(
        [*command, "-m", "not slow", *paths], cwd=HERE.parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "passed" in done.stdout and "failed" not in done.stdout


def test_a_grader_that_is_killed_takes_a_weaker_jail_with_it(tmp_path):
    if CLOSED or not landlock.version():
        pytest.skip("needs Landlock and a Python that is open to all")
    script = (
        "from llmcourse.grading.jail.client import *\njail = Jail([], layers=('landlock', 'seccomp'))\n"
        "print(jail._process.pid, flush=True)\njail.run(Job((Cell('a', 'while True: pass'),)))"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as grader:
        zygote = int(grader.stdout.readline())
        time.sleep(0.5)
        all_of_it = [zygote, *usage.descendants(zygote)]
        grader.send_signal(signal.SIGKILL)
    until = time.monotonic() + 5
    while any(os.path.exists(f"/proc/{one}") for one in all_of_it) and time.monotonic() < until:
        time.sleep(0.05)
    assert len(all_of_it) == 2 and not [one for one in all_of_it if os.path.exists(f"/proc/{one}")]
    assert list(tmp_path.iterdir()) == []
