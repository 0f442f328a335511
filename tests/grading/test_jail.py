"""The jail runs cells as a notebook does, answers with plain data, and says truly how a run ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmcourse.grading.jail import usage
from llmcourse.grading.jail.client import Cell, Jail, Job, Question
from llmcourse.grading.jail.replies import explain_death
from llmcourse.grading.jail.selftest import self_test
from llmcourse.grading.jail.visibility import visible_paths, writable_folder
from llmcourse.grading.limits import Limits
from llmcourse.grading.plain import decode
from llmcourse.grading.verdicts import Verdict
from tests.grading.jails import (
    ASK_COUNT,
    ASK_MASK,
    COUNT,
    MASK,
    SEED,
    full,
    graded,
    jail,
    limits,
    linux,
    points,
    require_empty,
    run,
)

pytestmark = linux


def test_cells_run_like_a_notebooks_and_answers_come_back_as_plain_data():
    result = run("print('one')\nx = 3", "x + y", "y = 4\nx + y", COUNT, MASK, ask=(ASK_COUNT, ASK_MASK))
    assert [cell.status for cell in result.cells] == ["ok", "error", "ok", "ok", "ok"]
    assert result.cells[0].output == "one\n"
    assert result.cells[1].error == "NameError: name 'y' is not defined"
    assert "7" in result.cells[2].output
    assert (result.ended, result.note) == (Verdict.GRADED, "")
    assert [
        graded(answer, ask).correct for answer, ask in zip(result.answers, (ASK_COUNT, ASK_MASK), strict=True)
    ]
    assert points(result) == full() and points(result, ASK_MASK) == full(ASK_MASK)
    assert 0 < result.seconds < 5


def test_a_wrong_answer_is_told_by_its_values():
    result = run("def count(d_model, n_heads, n_kv_heads, d_head, d_ff):\n    return 7")
    assert points(result) == 0 and graded(result.answers[0], ASK_COUNT).status == "wrong"


def test_an_unwritten_answer_and_one_that_fails_come_back_as_text():
    unwritten = run("def count(**sizes):\n    raise NotImplementedError")
    assert graded(unwritten.answers[0], ASK_COUNT).status == "not answered"
    failing = run("def count(**sizes):\n    return 1 / 0")
    assert failing.answers[0].outcomes[0]["failure"]["kind"] == "ZeroDivisionError"
    assert "return 1 / 0" in graded(failing.answers[0], ASK_COUNT).message


def test_a_missing_name_and_a_value_that_is_no_data_say_so():
    assert run("x = 1").answers[0].problem == "missing name: count"
    answer = run("def count(**sizes):\n    return lambda: 3").answers[0]
    assert answer.outcomes is None and answer.problem.startswith("not plain: in case 1, the value")
    assert run("count = 1 / 0").answers[0].problem == "missing name: count"


def test_a_question_is_asked_after_its_cell():
    first = Question("hardware/block_parameters", "count", SEED, after="0")
    last = Question("hardware/block_parameters", "count", SEED)
    result = run(COUNT, "count = None", ask=(last, first))
    assert [answer.exercise for answer in result.answers] == ["hardware/block_parameters"] * 2
    assert graded(result.answers[1], first).correct and not graded(result.answers[0], last).correct


def test_answers_before_a_crash_are_kept():
    first = Question("hardware/block_parameters", "count", SEED, after="0")
    result = run(COUNT, "import os; os._exit(3)", MASK, ask=(first, ASK_MASK))
    assert (result.ended, result.note) == (Verdict.CRASH, "its process ended with exit code 3")
    assert points(result) == full() and len(result.answers) == 1
    assert [cell.status for cell in result.cells] == ["ok", "not run", "not run"]


def test_output_is_kept_by_cell_even_of_the_cell_that_ended_the_run():
    result = run("print('first')", "print('second', flush=True)\nwhile True: pass", wall_seconds=0.5)
    assert result.ended is Verdict.TIMEOUT
    assert [cell.output for cell in result.cells] == ["first\n", "second\n"]


def test_jobs_know_nothing_of_one_another():
    run("import builtins, torch, random\nbuiltins.trace = 1\ntorch.trace_ = 2\nopen('left', 'w').write('x')")
    seen = run(
        "import builtins, torch, os\n"
        "print(hasattr(builtins, 'trace'), hasattr(torch, 'trace_'), os.listdir('.'), 'Out' in dir())"
    )
    assert seen.cells[0].output == "False False [] True\n"


def test_random_numbers_are_the_same_in_each_job():
    source = "import random, numpy, torch\nprint(random.random(), numpy.random.rand(), torch.rand(1).item(), hash('a'))"
    assert len({run(source).cells[0].output for _ in range(3)}) == 1


def test_support_files_lie_in_the_work_folder_and_their_paths_are_checked():
    files = {"data/words.txt": b"three small words", "empty": b""}
    cell = Cell("a", "import os\nprint(open('data/words.txt').read(), os.path.getsize('empty'))")
    assert jail().run(Job((cell,), files=files)).cells[0].output == "three small words 0\n"
    for name in ("../up", "/etc/x", "", "a/../../b"):
        with pytest.raises(ValueError, match="use a relative path"):
            jail().run(Job((cell,), files={name: b""}))
    for names in (["x" * 300], ["a", "a/b"], ["/".join("x" * 200 for _ in range(9))], ["\ud800"]):
        with pytest.raises(ValueError, match="no file can have this path"):
            jail().run(Job((cell,), files=dict.fromkeys(names, b"")))


@pytest.mark.parametrize(
    "source", ["x = 1\0", "x = '\ud800'", "%%nothing\nx", "def f(:", "!ls", "%cd /", "await x", ""]
)
def test_cells_that_cannot_run_are_errors_of_their_own(source):
    result = run(COUNT, source)
    assert result.ended is Verdict.GRADED and points(result) == full()


def test_calls_of_the_package_below_the_submission_are_reported():
    own, package = (
        "llmcourse.accounting.parameters:count_parameters",
        "llmcourse.checks.hardware:block_parameters",
    )
    watched = {"hardware/block_parameters": (own, package)}
    sources = {
        "calls it": "from llmcourse.checks.hardware import block_parameters as b\ndef count(**k):\n    return b(**k)",
        "is it": "from llmcourse.checks.hardware import block_parameters as count",
        "partial": "import functools, llmcourse.checks.hardware as h\ncount = functools.partial(h.block_parameters)",
        "own code": COUNT,
    }
    found = {}
    for name, source in sources.items():
        result = jail().run(Job((Cell("a", source),), (ASK_COUNT,), watched=watched))
        assert points(result) == full(), name
        found[name] = result.answers[0].called
    assert package in found["calls it"] and package in found["is it"] and package in found["partial"]
    assert own in found["calls it"]  # by way of the other
    assert found["own code"] == ()


def test_memory_of_all_processes_together_is_limited():
    source = (
        "import os, time\nfor n in range(4):\n    if os.fork() == 0:\n        b = bytearray(200 << 20)\n"
        "        b[::4096] = b'x' * len(b[::4096])\n        time.sleep(60)\ntime.sleep(60)"
    )
    result = run(source, wall_seconds=8)
    assert result.ended is Verdict.MEMORY and result.peak_mb > 512


def test_peak_memory_is_that_of_the_submission():
    small = run("x = 1")
    big = run("b = bytearray(300 << 20)\nb[::4096] = b'x' * len(b[::4096])")
    assert small.peak_mb < 60 and 280 < big.peak_mb < 400


def test_the_cpu_limit_ends_a_run():
    result = run("import threading\nwhile True: pass", cpu_seconds=1, wall_seconds=8)
    assert result.ended is Verdict.TIMEOUT and "processor" in result.note and result.seconds < 4


def test_loopback_works_inside_and_leads_nowhere_else():
    source = (
        "import socket\ns = socket.create_server(('127.0.0.1', 29500))\n"
        "c = socket.create_connection(('127.0.0.1', 29500))\nc.sendall(b'x')\nprint(s.accept()[0].recv(9))"
    )
    assert {run(source).cells[0].output for _ in range(2)} == {"b'x'\n"}


def test_a_process_group_of_torch_works_inside():
    source = (
        "import torch\nimport torch.distributed as d\n"
        "d.init_process_group('gloo', init_method='tcp://127.0.0.1:29501', rank=0, world_size=1)\n"
        "x = torch.ones(3)\nd.all_reduce(x)\nd.destroy_process_group()\nprint(x.sum().item())"
    )
    result = run(source, wall_seconds=20)
    assert result.cells[0].output.splitlines()[-1] == "3.0"


def test_what_ran_when_a_run_ended_is_named():
    hanging = "def count(**sizes):\n    while True: pass"
    assert run(hanging, wall_seconds=0.5).during == ASK_COUNT.exercise
    assert run(COUNT, "while True: pass", wall_seconds=0.5).during == "1"
    assert run(COUNT).during == ""


def test_training_works_inside():
    source = (
        "import torch\nmodel = torch.nn.Linear(4, 1)\noptimizer = torch.optim.AdamW(model.parameters(), lr=0.1)\n"
        "x = torch.randn(64, 4)\nfor step in range(50):\n"
        "    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()\n"
        "    optimizer.zero_grad(); loss.backward(); optimizer.step()\nprint(loss.item() < 0.5)"
    )
    assert run(source, wall_seconds=10).cells[0].output == "True\n"


def test_the_self_test_finds_every_wall():
    walls = self_test(jail())
    assert [wall for wall in walls if not wall.stands] == [] and len(walls) >= 18
    require_empty(jail())


def test_a_zygote_that_died_is_an_infrastructure_verdict_and_the_next_job_runs():
    with Jail(["llmcourse.checks.hardware"]) as one:
        os.kill(one._process.pid, signal.SIGKILL)
        one._process.wait()
        time.sleep(0.1)
        assert one.run(Job((Cell("a", "x = 1"),))).ended is Verdict.INFRASTRUCTURE
        assert one.run(Job((Cell("a", "x = 1"),))).ended is Verdict.GRADED


@pytest.mark.parametrize(
    ("status", "cpu", "peak_mb", "oom", "verdict"),
    [
        (-signal.SIGKILL, 1.0, 100, True, Verdict.INFRASTRUCTURE),
        (-signal.SIGKILL, 1.0, 400, True, Verdict.MEMORY),
        (-signal.SIGKILL, 1.0, 400, False, Verdict.MEMORY),
        (-signal.SIGKILL, 1.0, 100, False, Verdict.CRASH),  # as by a limit that it set itself
        (-signal.SIGKILL, 60.0, 100, True, Verdict.TIMEOUT),
        (-signal.SIGSEGV, 1.0, 100, True, Verdict.CRASH),
        (3, 1.0, 100, True, Verdict.CRASH),
    ],
)
def test_who_is_blamed_for_a_death(status, cpu, peak_mb, oom, verdict):
    end = {"status": status, "cpu": cpu, "peak_kb": 0}
    assert explain_death(end, Limits(memory_mb=512), peak_mb << 10, oom)[0] is verdict


def test_a_limit_that_a_submission_sets_itself_is_its_own_fault():
    source = "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (1, 1))\nwhile True: pass"
    assert run(source, wall_seconds=8).ended in (Verdict.CRASH, Verdict.TIMEOUT)


def test_a_killed_grader_leaves_nothing():
    script = (
        "from llmcourse.grading.jail.client import *\nimport sys\njail = Jail(['llmcourse.checks.hardware'])\n"
        "print(jail._process.pid, flush=True)\njail.run(Job((Cell('a', 'while True: pass'),)))"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as grader:
        zygote = int(grader.stdout.readline())
        time.sleep(0.5)
        all_of_it = [zygote, *usage.descendants(zygote)]
        grader.kill()
    until = time.monotonic() + 5
    while any(os.path.exists(f"/proc/{one}") for one in all_of_it) and time.monotonic() < until:
        time.sleep(0.05)
    assert len(all_of_it) == 3 and not [one for one in all_of_it if os.path.exists(f"/proc/{one}")]


def test_walls_are_chosen_by_name_and_too_few_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="unknown layers"):
        Jail([], layers=["moat"])
    with pytest.raises(ValueError, match="needs namespaces, or two of"):
        Jail([], layers=["seccomp"])
    with pytest.raises(ValueError, match='write "auto"'):
        Jail([], layers="all")
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    with pytest.raises(ValueError, match="no jail on Darwin"):
        Jail([])


def test_a_module_that_cannot_be_loaded_is_said():
    with pytest.raises(ValueError, match="No module named 'llmcourse.checks.nowhere'"):
        Jail(["llmcourse.checks.nowhere"])


def test_limits_are_positive_numbers():
    for wrong in ({"wall_seconds": 0}, {"memory_mb": -1}, {"processes": 2.5}, {"cpu_seconds": True}):
        with pytest.raises(ValueError, match="must be"):
            Limits(**wrong)
    assert decode(run(COUNT, wall_seconds=2).answers[0].outcomes[0]["value"]) > 0 and limits().file_mb == 16


def test_the_home_is_never_shown_and_python_may_lie_in_the_temporary_folder(monkeypatch):
    found = visible_paths([], "/nowhere/home")
    assert Path(sys.prefix) in found and Path.home() not in found and Path("/") not in found
    with pytest.raises(ValueError, match="grade with a virtual environment"):
        visible_paths([], str(Path(sys.prefix, "inside")))
    assert writable_folder([Path("/usr"), Path("/opt/.venv")]) == "/tmp"
    assert writable_folder([Path("/usr"), Path("/tmp/x/.venv")]) == "/scratch"
    monkeypatch.setattr("llmcourse.grading.jail.client.writable_folder", lambda visible: "/scratch")
    with Jail([]) as one:
        result = one.run(Job((Cell("a", "import os, tempfile\nprint(os.getcwd(), tempfile.gettempdir())"),)))
        assert [wall for wall in self_test(one) if not wall.stands] == []
    assert result.cells[0].output == "/scratch/work /scratch\n"
