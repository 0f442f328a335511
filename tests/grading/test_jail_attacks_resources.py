"""Submissions that use too much or fall over: the verdict says so, the grader stays small, the next one runs."""

from __future__ import annotations

import resource
from collections.abc import Iterator

import psutil
import pytest

from llmcourse.grading.jail.client import Question
from llmcourse.grading.verdicts import Verdict
from tests.grading.jails import ASK_COUNT, COUNT, MASK, SEED, WRITABLE, full, linux, points, run

pytestmark = linux
FIRST = Question("hardware/block_parameters", "count", SEED, after="0")


@pytest.fixture(autouse=True)
def the_grader_stays_small_and_the_next_job_is_unaffected() -> Iterator[None]:
    """Every attack costs the grader less than 50 MiB of its greatest memory; a right answer afterwards counts."""
    run(COUNT)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10
    after = run(COUNT)
    assert after.ended is Verdict.GRADED and points(after) == full() and after.seconds < 1.5


LOOPS = {
    "r1_inf_loop": "while True: pass",
    "r2_inf_loop_catch": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "r4_c_hang": "import time\ntime.sleep(1000)",
    "r4_c_hang_of_regex": "import re\nre.match(r'(a+)+$', 'a' * 40 + 'b')",
    "r5_all_signals_ignored": (
        "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass"
    ),
}


@pytest.mark.parametrize("source", LOOPS.values(), ids=LOOPS)
def test_r1_r2_r4_r5_loops(source):
    result = run(COUNT, source, ask=(FIRST, ASK_COUNT), wall_seconds=1)
    assert result.ended is Verdict.TIMEOUT and 1 <= result.seconds < 2
    assert points(result) == full() and len(result.answers) == 1


def test_r3_inf_in_function():
    result = run("def count(**sizes):\n    while True: pass", wall_seconds=1)
    assert result.ended is Verdict.TIMEOUT and result.seconds < 2 and result.answers == ()


def test_r6_alloc8g():
    result = run(COUNT, "b = bytearray(8 << 30)", "import torch\nt = torch.ones(2 << 30)")
    assert [cell.status for cell in result.cells] == ["ok", "error", "error"]
    assert result.cells[1].error == "MemoryError" and "memory" in result.cells[2].error
    assert points(result) == full()


def test_r6_shared_memory_that_no_limit_counts_is_refused():
    """Pages of such memory can be given back by its process and still be there."""
    source = "import mmap\nm = mmap.mmap(-1, 1 << 20{})\nm[0] = 1\nprint('written')"
    result = run(source.format(""), wall_seconds=8)
    assert "Operation not permitted" in result.cells[0].error
    zero = "import mmap, os\nmmap.mmap(os.open('/dev/zero', os.O_RDWR), 1 << 20)"
    assert run(zero, wall_seconds=8).cells[0].status == "error"
    private = run(source.format(", mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS"), wall_seconds=8)
    assert private.cells[0].output == "written\n"


def test_r7_many_processes_with_memory():
    source = (
        "import os, time\nfor n in range(20):\n    if os.fork() == 0:\n        b = b'x' * (100 << 20)\n"
        "        time.sleep(60)\ntime.sleep(60)"
    )
    result = run(source, wall_seconds=8)
    assert result.ended is Verdict.MEMORY and result.seconds < 4


def test_r8_recursion():
    deep = "import sys\nsys.setrecursionlimit(10**9)\ndef f(n): return f(n + 1)\nf(0)"
    result = run(COUNT, "def g(n): return g(n + 1)\ng(0)", deep, ask=(FIRST,), wall_seconds=3)
    assert result.cells[1].error.startswith("RecursionError")
    assert points(result) == full() and result.seconds < 4
    assert result.ended in (Verdict.GRADED, Verdict.CRASH, Verdict.MEMORY, Verdict.TIMEOUT)
    assert result.cells[2].status != "ok"


PRINTING = {
    "r9_print_forever": "while True: print('x' * 1000)",
    "r9_bytes_forever": "import os\nwhile True: os.write(1, bytes(1 << 16))",
    "r10_print_1gb": "print('x' * (400 << 20))",
    "r11_many_outputs": "from IPython.display import display\nfor n in range(10**7): display(n)",
    "r12_repr_of_1e9": "'x' * (300 << 20)",
}


@pytest.mark.parametrize("source", PRINTING.values(), ids=PRINTING)
def test_r9_r10_r11_r12_printing(source):
    before = psutil.Process().memory_info().rss
    result = run(COUNT, source, ask=(FIRST,), memory_mb=2048, output_kb=64, wall_seconds=6)
    assert result.ended is Verdict.OUTPUT_LIMIT and points(result) == full()
    assert sum(len(cell.output.encode()) for cell in result.cells) <= 64 << 10
    assert psutil.Process().memory_info().rss - before < 20 << 20


def test_r9_print_forever_in_the_answer():
    source = "import os\ndef count(**sizes):\n    while True: os.write(2, b'x' * 1000)"
    assert run(source).ended is Verdict.OUTPUT_LIMIT
    quiet = "def count(**sizes):\n    while True: print('x' * 1000)"
    assert run(quiet, wall_seconds=1).ended in (Verdict.TIMEOUT, Verdict.MEMORY, Verdict.GRADED)


def test_r13_disk():
    one = run(COUNT, "open('big', 'wb').write(bytes(200 << 20))")
    many = run("for n in range(100):\n    open(f'f{n}', 'wb').write(bytes(4 << 20))")
    shm = run("open('/dev/shm/big', 'wb').write(bytes(15 << 20))\nopen('big', 'wb').write(bytes(15 << 20))")
    assert "File too large" in one.cells[1].error and points(one) == full()
    assert "No space left" in many.cells[0].error and "No space left" in shm.cells[0].error


def test_r14_small_files():
    result = run(COUNT, f"for n in range(10**6): open('{WRITABLE}/' + str(n), 'w').close()")
    assert "No space left" in result.cells[1].error and points(result) == full()


def test_r15_fork_bomb():
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    result = run(COUNT, bomb, ask=(FIRST,), wall_seconds=1)
    assert result.ended in (Verdict.TIMEOUT, Verdict.MEMORY) and result.seconds < 3
    assert points(result) == full()


def test_r16_thread_bomb():
    source = "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,), daemon=True).start()"
    result = run(COUNT, source)
    assert "can't start new thread" in result.cells[1].error and points(result) == full()


DEATHS = {
    "r17_os_exit": ("import os\nos._exit(0)", "exit code 0"),
    "r18_segv": ("import ctypes\nctypes.string_at(0)", "SIGSEGV"),
    "r18_abort": ("import os\nos.abort()", ""),
    "r20_closerange": ("import os\nos.closerange(0, 1000)", ""),
}


@pytest.mark.parametrize(("source", "note"), DEATHS.values(), ids=DEATHS)
def test_r17_r18_r20_deaths(source, note):
    result = run(COUNT, source, MASK, ask=(FIRST, ASK_COUNT))
    assert result.ended is Verdict.CRASH and note in result.note
    assert points(result) == full() and result.cells[2].status == "not run"


def test_r19_exit():
    for source in ("exit()", "quit()", "raise SystemExit(3)", "import sys\nsys.exit()"):
        result = run(COUNT, source)
        assert result.ended is Verdict.GRADED and points(result) == full()


def test_r21_r22_kill_everyone_and_the_parent():
    source = (
        "import os, signal\nfor target in (-1, 0, os.getppid(), 1, os.getpid()):\n"
        "    try: os.kill(target, signal.SIGKILL)\n    except OSError as error: print(error)"
    )
    result = run(COUNT, source, ask=(FIRST, ASK_COUNT))
    assert result.ended in (Verdict.GRADED, Verdict.CRASH) and points(result) == full()


STAYING = {
    "r23_fork_stay": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(600)",
    "r23_double_fork": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(600)\n    os._exit(0)"
    ),
    "r24_fork_hold_pipes": "import subprocess\np = subprocess.Popen(['sleep', '600'], close_fds=False)",
    "r25_child_that_writes_later": (
        "import os, time\nif os.fork() == 0:\n    time.sleep(0.3)\n    while True: os.write(1, b'late')"
    ),
}


@pytest.mark.parametrize("source", STAYING.values(), ids=STAYING)
def test_r23_r24_r25_staying(source):
    result = run(COUNT, source)  # `run` looks for what is left
    assert result.ended is Verdict.GRADED and points(result) == full()


def test_r25_a_child_that_answers_later_is_not_taken_for_the_harness():
    source = (
        "import os, socket, time\nif os.fork() == 0:\n    time.sleep(0.2)\n    for n in range(3, 20):\n"
        "        try: os.write(n, b'\\0\\0\\0\\3{}\\n')\n        except OSError: pass\n    os._exit(0)\ntime.sleep(0.5)"
    )
    assert run(COUNT, source).ended is Verdict.REVIEW


def test_r26_input():
    result = run(COUNT, "name = input()", "import sys\nprint(repr(sys.stdin.read()))")
    assert result.cells[1].error.startswith("EOFError") and result.cells[2].output == "''\n"
    assert result.ended is Verdict.GRADED and points(result) == full()
