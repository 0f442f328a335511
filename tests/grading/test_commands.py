"""The grading commands: quick help, a whole course from release to marks, one line for every bad input."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from llmcourse.grading.grades import Summary
from tests.commands import Output, runner
from tests.grading.hand_ins import write_hand_ins, write_key

COMMANDS = ("release", "collect", "grade", "report", "mark")


@pytest.fixture
def command(capsys, monkeypatch):
    """Run `llmcourse ARGUMENTS` in this process, as the program does."""
    return runner(capsys, monkeypatch)


def assert_refused(output: Output, *words: str) -> None:
    assert output.code == 2, output
    lines = [line for line in output.err.splitlines() if line.startswith("llmcourse: ")]
    assert len(lines) == 1 and "Traceback" not in output.err
    assert all(word in lines[0] for word in words), lines[0]


def test_help_imports_nothing_heavy_and_is_quick():
    code = (
        "import sys, time; started = time.perf_counter(); sys.argv = ['llmcourse', 'grade', '--help']\n"
        "from llmcourse.cli import main\n"
        "try:\n    main()\nexcept SystemExit as ended:\n    assert not ended.code\n"
        "heavy = {'torch', 'numpy', 'IPython', 'jinja2', 'nbformat', 'distributed', 'datasketch'} & set(sys.modules)\n"
        "assert not heavy, heavy\nprint(time.perf_counter() - started)"
    )
    seconds = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        seconds.append(float(done.stdout.splitlines()[-1]))
    assert min(seconds) < 0.5


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_help_text(command, name):
    output = command(name, "--help")
    assert output.code == 0
    lines = output.out.partition("Options:")[2].splitlines()
    options = [line.split("  ") for line in lines if line.startswith("  --") and "--help" not in line]
    assert options and all(len([part for part in parts if part.strip()]) >= 2 for parts in options)
    assert "folder" in output.out


@pytest.fixture
def course(tiny_release, tmp_path, monkeypatch):
    """A folder with a key and three hand-ins, graded."""
    key = tiny_release.key
    write_key(tmp_path / "release" / "key", key)
    written = tiny_release.solved()
    for cell in written["cells"]:
        if cell["metadata"].get("nbgrader", {}).get("grade_id") == key.manifest.manual[0].grade_id:
            cell["source"] = "Because <script>alert(1)</script> of memory."
    hand_ins = {"s001": written, "s002": tiny_release.untouched(), "s003": b"{"}
    write_hand_ins(tmp_path / "submissions", key, hand_ins)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_from_hand_ins_to_marks(command, course):
    graded = command("grade", "--workers", 1)
    assert graded.code == 0 and "2 graded, 1 malformed" in graded.out, graded
    assert "jail: " in graded.out and "results: report" in graded.out
    again = command("grade")
    assert "graded 0 in" in again.out and "3 were graded before" in again.out
    reported = command("report", "--format", "canvas", "--format", "gradescope")
    assert reported.code == 0 and "3 of 3 results are open" in reported.out
    assert (course / "report" / "canvas.csv").is_file()
    assert (course / "report" / "gradescope" / "s001" / "results.json").is_file()
    page = (course / "report" / "pages" / "students" / "s001.html").read_text()
    assert "Because &lt;script&gt;" in page and "<script" not in page
    assert "class.html" in {path.name for path in (course / "report" / "pages").iterdir()}
    sheet = command("mark", "--sheet", "sheet.csv")
    assert "4 rows" in sheet.out
    lines = (course / "sheet.csv").read_text().splitlines()
    filled = [line.replace(",2.5,,", ",2.5,2,").replace(",4,,", ",4,1,") for line in lines]
    (course / "sheet.csv").write_text("\n".join(filled))
    assert "4 marks taken over" in command("mark", "--merge", "sheet.csv").out
    done = command("report", "--no-pages")
    assert "open" not in done.out
    rows = (course / "report" / "grades.csv").read_text().splitlines()
    assert rows[1].startswith("s001,name of s001,graded,4,4,2,6,6.5,")
    assert rows[3].startswith("s003,name of s003,malformed,1,4,2,3,6.5,")


def test_pages_of_students_who_are_gone_are_removed(command, course):
    command("grade", "--workers", 1)
    command("report")
    stale = course / "report" / "pages" / "students" / "s009.html"
    stale.write_text("old")
    command("report")
    assert not stale.exists() and (stale.parent / "s001.html").is_file()


def test_the_marking_page_opens_and_ends(command, course, monkeypatch):
    from llmcourse.grading import marking_page

    command("grade", "--workers", 1)
    asked = []
    monkeypatch.setattr(marking_page.MarkingServer, "serve", lambda self: asked.append(self.overview()))
    output = command("mark", "--no-browser")
    assert output.code == 0 and "marking page: http://127.0.0.1:" in output.out and "0 of 3" in asked[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("grade --workers 0", "--workers 0"),
        ("grade --files-points 0", "--files-points 0"),
        ("grade nowhere", "run `llmcourse collect` first"),
        ("grade --key nowhere", "is no key folder"),
        ("grade --assignment 99_x", "no assignment '99_x'"),
        ("grade --evaluate nothing", "write module:function"),
        ("report", "run `llmcourse grade` first"),
        ("report --format excel", "choose one of csv"),
        ("mark", "run `llmcourse grade` first"),
        ("release 07 --points 3", "write it as peft/merge=3"),
        ("collect nowhere", "nowhere"),
    ],
)
def test_bad_input_is_one_line(command, course, arguments, words):
    assert_refused(command(*arguments.split()), words)
    assert not (course / "report" / "grades.csv").exists()


def test_what_was_not_graded_for_want_of_a_machine_is_said(command, course, monkeypatch):
    from llmcourse.grading import batch

    summary = Summary("07_hardware", {"graded": 2, "infrastructure": 1}, 3, 0, 1.0, ("seccomp",), "report")
    monkeypatch.setattr(batch, "grade_batch", lambda *arguments, **options: summary)
    output = command("grade")
    assert output.code == 1 and "1 were not graded for want of a machine" in output.out


def test_an_interrupt_is_one_line_and_the_next_run_goes_on(course):
    call = [sys.executable, "-m", "llmcourse.cli", "grade", "--workers", "1", "--no-progress"]
    process = subprocess.Popen(call, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while process.poll() is None and not (course / "report" / "journal.jsonl").exists():
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(2)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on" in err and "Traceback" not in err
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 0 and "2 graded, 1 malformed" in done.stdout, done.stderr
    assert json.loads((course / "report" / "grades.json").read_text())["assignment"] == "07_hardware"
