"""Submissions that look for what is not theirs, or write where they must not: there is nothing to find or to change."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmcourse.grading.jail.client import Cell, Jail, Job, Question
from llmcourse.grading.verdicts import Verdict
from tests.grading.jails import ASK_COUNT, COUNT, WRITABLE, full, jail, limits, linux, points, run

pytestmark = linux


@pytest.fixture
def course():
    """A course's folder with what an attacker would want, readable by all as careless courses are."""
    with tempfile.TemporaryDirectory() as folder:
        yield from filled(Path(folder))


def filled(folder: Path) -> Iterator[Path]:
    for name in ("submissions/s002/01_lab.ipynb", "key/secret.json", "report/journal.jsonl", "grades.db"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("MARKER", encoding="utf-8")
    folder.chmod(0o755)
    yield folder


def state(folder: Path) -> list[tuple[str, bytes, int, int]]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(str(p), p.read_bytes(), p.stat().st_mode, p.stat().st_mtime_ns) for p in paths]


def test_c1_c2_c3_c7_files_of_the_course_and_of_others(course):
    names = [str(path) for path in course.rglob("*") if path.is_file()]
    result = run(
        f"for name in {names!r}:\n    try: print('OUT', open(name).read())\n    except OSError as e: print(e)"
    )
    lines = result.cells[0].output.splitlines()
    assert len(lines) == 4 and all("No such file" in line for line in lines)
    other = run(f"import os\nprint(sorted(os.listdir({WRITABLE!r})), os.listdir('.'))")
    assert other.cells[0].output == "['home', 'shm', 'work'] []\n"


def test_c2_no_notebook_test_or_lab_is_visible():
    source = (
        "import os\nfound, folders = [], 0\nfor folder, below, names in os.walk('/'):\n"
        "    below[:] = [b for b in below if folder != '/' or b not in ('proc', 'usr')]\n"
        "    below[:] = [b for b in below if b not in ('site-packages', 'lib')]\n    folders += 1\n"
        "    found += [n for n in names if n.endswith('.ipynb') or n in ('test_jail.py', 'Makefile')]\n"
        "print(found, folders > 10)"
    )
    assert run(source).cells[0].output == "[] True\n"


def test_c4_the_package_is_the_open_answer_key_and_its_use_is_reported():
    watched = {ASK_COUNT.exercise: ("llmcourse.checks.hardware:block_parameters",)}
    used = Cell("a", "from llmcourse.checks.hardware import block_parameters\ncount = block_parameters")
    result = jail().run(Job((used,), (ASK_COUNT,), watched=watched))
    assert points(result) == full() and result.answers[0].called == watched[ASK_COUNT.exercise]


def test_c5_c8_environment_home_and_system_files(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "MARKER")
    monkeypatch.setenv("LLMCOURSE_HOME", "MARKER")
    source = (
        "import os\nprint('MARKER' in repr(os.environ), os.path.expanduser('~'))\n"
        "for name in ('/etc/passwd', '/etc/shadow', '/etc/hostname', '/home', '/var', '/run', '/sys', "
        f"{str(Path.home() / '.ssh')!r}):\n"
        "    print(os.path.exists(name))"
    )
    with Jail(["llmcourse.checks.hardware"]) as one:
        output = one.run(Job((Cell("a", source),), limits=limits())).cells[0].output.splitlines()
    assert output[0] == f"False {WRITABLE}/home" and output[1:] == ["False"] * 8


def test_c6_processes_of_the_machine():
    source = (
        "import os\nprint([n for n in os.listdir('/proc') if n.isdigit()], os.getppid())\n"
        "print(open('/proc/1/cmdline', 'rb').read().count(b'MARKER'))\n"
        "try: print(os.listdir('/proc/1/root/'))\nexcept OSError: pass"
    )
    output = run(source).cells[0].output.splitlines()
    assert output[:2] == ["['1'] 0", "0"] and "submissions" not in output[2]


def test_c9_c10_c13_network_names_and_the_hosts_loopback():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        source = (
            f"import socket\nfor host, port in (('127.0.0.1', {port}), ('1.1.1.1', 53), ('10.0.0.1', 80)):\n"
            "    try: socket.create_connection((host, port), 1); print('OUT')\n    except OSError: print('walled')\n"
            "try: socket.getaddrinfo('example.org', 80); print('OUT')\nexcept OSError: print('walled')\n"
            "for family, kind, protocol in ((16, 3, 9), (17, 3, 0), (40, 1, 0), (38, 5, 0)):\n"
            "    try: socket.socket(family, kind, protocol); print('OUT')\n    except OSError: print('walled')"
        )
        assert run(source).cells[0].output == "walled\n" * 8


def test_c11_abstract_sockets_of_the_host():
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("\0llmcourse-test")
        server.listen()
        result = run("import socket\nsocket.socket(socket.AF_UNIX).connect('\\0llmcourse-test')")
        assert result.cells[0].error.startswith("ConnectionRefusedError")


def test_c12_shared_memory_does_not_outlive_the_job():
    write = f"open('/dev/shm/left', 'w').write('x')\nopen('{WRITABLE}/left', 'w').write('x')"
    assert run(write).cells[0].status == "ok"
    look = f"import os\nprint(os.listdir('/dev/shm'), os.path.exists('{WRITABLE}/left'))"
    assert run(look).cells[0].output == "[] False\n" and not os.path.exists("/dev/shm/left")
    shmget = "import ctypes\nprint(ctypes.CDLL(None).shmget(7, 4096, 0o1666))"
    assert run(shmget).cells[0].output == "-1\n"


def test_c14_no_seed_and_no_expected_value_is_in_memory_before_the_question():
    scan = (
        "import gc, sys\ndef scan():\n"
        "    seed, name = int('7990' + '271'), '/'.join(('hardware', 'block_parameters'))\n"
        "    kept = 0\n    for one in gc.get_objects():\n        if type(one) in (dict, list, tuple):\n"
        "            parts = list(one.values()) if type(one) is dict else list(one)\n"
        "            kept += sum(type(part) in (int, str) and part in (seed, name) for part in parts)\n"
        "    return kept\n"
        "frame, names = sys._getframe(), set()\nwhile frame: names |= set(frame.f_locals); frame = frame.f_back\n"
        "print(scan(), 'expected' in names, 'secret' in names)"
    )
    question = Question(ASK_COUNT.exercise, "count", 7990271)
    result = jail().run(Job((Cell("a", COUNT), Cell("b", scan)), (question,), limits(wall_seconds=8)))
    assert result.cells[1].output == "0 False False\n"
    assert points(result, question) == full()


def test_c15_inputs_that_an_answer_prints_are_shown_to_nobody():
    source = COUNT + (
        "\nold = count\nimport os\n"
        "def count(**sizes):\n    os.write(1, b'MARKER' + repr(sizes).encode()); print('MARKER')\n"
        "    return old(**sizes)"
    )
    result = run(source, "x = 1")
    assert points(result) == full() and "MARKER" not in repr(result.cells)


def test_i1_i2_i3_i4_i5_nothing_of_the_course_can_be_changed(course):
    before = state(course)
    source = (
        f"import os, shutil, sqlite3, subprocess, time\nroot = {str(course)!r}\n"
        "for attempt in (lambda: open(root + '/grades.db', 'w'), lambda: shutil.rmtree(root),\n"
        "    lambda: sqlite3.connect(root + '/grades.db').execute('create table t (x)'),\n"
        "    lambda: os.rename(root + '/key', root + '/other'), lambda: os.chmod(root, 0),\n"
        "    lambda: os.link(root + '/grades.db', 'mine'), lambda: os.truncate(root + '/grades.db', 0)):\n"
        "    try: attempt(); print('OUT')\n    except Exception as error: print(type(error).__name__)\n"
        "if os.fork() == 0:\n    os.setsid(); time.sleep(1)\n    open(root + '/late', 'w')"
    )
    result = run(source)
    assert "OUT" not in result.cells[0].output and len(result.cells[0].output.split()) == 7
    time.sleep(1.2)
    assert state(course) == before


def test_i6_i7_files_handed_in_are_never_code_that_runs():
    bad = b"open('../ran', 'w').write('x')\nprint('RAN')\n"
    names = [
        "numpy.py",
        "json.py",
        "conftest.py",
        "sitecustomize.py",
        "usercustomize.py",
        "ipykernel_launcher.py",
    ]
    names += ["x.pth", "ipython_config.py", ".ipython/profile_default/startup/00.py", "llmcourse/__init__.py"]
    names += ["nbgrader_config.py", ".OTTER_LOG"]
    source = (
        "import sys, os, importlib\nimport numpy, json, statistics, llmcourse\n"
        "for name in ('conftest', 'sitecustomize', 'colorsys', 'ipykernel_launcher'):\n"
        "    try: importlib.import_module(name)\n    except ImportError: pass\n"
        "ran = os.path.exists('ran') or os.path.exists('../ran')\n"
        "print(ran, '' in sys.path, os.getcwd() in sys.path, len(numpy.__file__) > 20)"
    )
    files = dict.fromkeys(names, bad)
    result = jail().run(Job((Cell("a", source),), files=files))
    assert result.cells[0].output == "False False False True\n"
    assert run(COUNT).ended is Verdict.GRADED


def test_i8_rights_and_times_outside(course):
    target, before = str(course / "grades.db"), state(course)
    library = os.path.abspath(subprocess.__file__)
    source = (
        f"import os\nfor path in ({target!r}, {library!r}, '/usr', '/'):\n"
        "    for attempt in (lambda: os.chmod(path, 0o777), lambda: os.utime(path, (1, 1)),\n"
        "        lambda: os.setxattr(path, 'user.x', b'1'), lambda: os.unlink(path),\n"
        "        lambda: os.rename(path, '/tmp/x')):\n"
        "        try: attempt(); print('OUT')\n        except OSError: print('walled')"
    )
    stat = os.stat(library)
    assert run(source).cells[0].output == "walled\n" * 20
    assert state(course) == before and os.stat(library).st_mtime_ns == stat.st_mtime_ns


@pytest.mark.parametrize(
    "attempt",
    [
        "libc.ptrace(16, 1, 0, 0)",
        "libc.unshare(0x10000000)",
        "libc.unshare(0x20000)",
        "libc.mount(b'none', b'/tmp', b'tmpfs', 0, None)",
        "libc.umount2(b'/tmp', 2)",
        "libc.chroot(b'/tmp')",
        "libc.syscall(435, None, 0)",
        "libc.syscall(425, 8, None)",
        "libc.syscall(321 if platform.machine() == 'x86_64' else 280, 0, None, 0)",
        "libc.memfd_create(b'x', 0)",
        "libc.setuid(0)",
        "libc.sethostname(b'x', 1)",
        "libc.swapon(b'/tmp/x', 0)",
        "libc.syscall(56 if platform.machine() == 'x86_64' else 220, 0x10000000 | 17, None, 0, 0, 0)",
        "libc.syscall(470)",
    ],
)
def test_system_calls_that_open_jails_are_refused(attempt):
    result = run(f"import ctypes, platform\nlibc = ctypes.CDLL(None, use_errno=True)\nprint({attempt})")
    assert result.cells[0].output == "-1\n"


def test_the_zygote_is_started_with_no_path_of_the_course_and_no_variable_of_the_graders(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_TOKEN", str(tmp_path))
    with Jail([]) as one:
        texts = [Path(f"/proc/{one._process.pid}/{name}").read_bytes() for name in ("environ", "cmdline")]
    assert all(texts) and not [
        text for text in texts if str(tmp_path).encode() in text or b"HF_TOKEN" in text
    ]
