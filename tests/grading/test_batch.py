"""A class at once: a verdict for everyone, the same tables after a kill, one grader at a time."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from llmcourse.grading import station
from llmcourse.grading.batch import grade_batch, read_submissions, record_key
from llmcourse.grading.jail import selftest
from llmcourse.grading.jail.client import Jail
from llmcourse.grading.journal import Journal
from llmcourse.grading.locking import locked
from llmcourse.grading.reports.exports import read_answers, read_grades
from llmcourse.grading.station import Submission
from llmcourse.grading.verdicts import Verdict
from tests.grading.hand_ins import write_hand_ins, write_key

WRONG = "def my_intensity(m, k, n, bytes_per_value):\n    return 2 * m * k * n / (bytes_per_value * (m * k + k * n))"

CRASH = "import os\n\ndef my_roofline(**inputs):\n    os._exit(3)"


@pytest.fixture(scope="module")
def jails():
    """Jails that wait for the next test, since each takes seconds to start."""
    waiting: list[Jail] = []
    yield waiting
    for jail in waiting:
        jail.close()


@pytest.fixture(autouse=True)
def quick(jails, monkeypatch):
    """Stations that borrow their jails, and a self-test that passes; one test does without."""

    class Borrowed:
        def __init__(self, preload, layers="auto", trust=False):
            self.jail = jails.pop() if jails else Jail(preload=preload, trust=trust)
            self.layers = self.jail.layers

        def run(self, job):
            return self.jail.run(job)

        def close(self):
            jails.append(self.jail)

    monkeypatch.setattr(station, "Jail", Borrowed)
    monkeypatch.setattr(selftest, "self_test", lambda jail: [])


@pytest.fixture
def key(tiny_release, tmp_path):
    return write_key(tmp_path / "key", tiny_release.key)


def with_cell(tiny_release, exercise, source):
    notebook = tiny_release.solved()
    tiny_release.cell(notebook, exercise)["source"] = source
    return notebook


def a_class(tiny_release, count=12):
    """Honest work of several kinds, and some that is not."""
    kinds = [
        lambda: tiny_release.solved(),
        lambda: tiny_release.untouched(),
        lambda: with_cell(tiny_release, "intensity", WRONG),
        lambda: with_cell(tiny_release, "roofline", CRASH),
        lambda: b"{broken",
        lambda: with_cell(tiny_release, "roofline", "def my_roofline(:"),
    ]
    return {f"s{i:03}": kinds[i % len(kinds)]() for i in range(count)}


def rows(report):
    with open(report / "grades.csv", newline="") as file:
        return {row["student"]: row for row in csv.DictReader(file)}


def run(folder, key, report, **options):
    return grade_batch(folder, key, report, workers=2, progress=False, **options)


def test_everyone_gets_a_verdict_and_the_right_points(tiny_release, key, tmp_path):
    people = {"s900": {"name": "never came"}, "s901": {"problem": "the archive holds no notebook"}}
    folder = write_hand_ins(tmp_path / "in", tiny_release.key, a_class(tiny_release), people)
    summary = run(folder, key, tmp_path / "report")
    found = rows(tmp_path / "report")
    assert list(found) == [f"s{i:03}" for i in range(12)] + ["s900", "s901"]
    assert [(found[f"s{i:03}"]["points"], found[f"s{i:03}"]["verdict"]) for i in range(6)] == [
        ("4", "graded"),
        ("0", "graded"),
        ("3", "graded"),
        ("1", "partial"),
        ("", "malformed"),
        ("3", "graded"),
    ]
    assert found["s003"]["note"].startswith("the Python process ended after 1 of 3 exercises")
    assert [found[name]["verdict"] for name in ("s900", "s901")] == ["not submitted", "malformed"]
    assert found["s901"]["note"] == "the archive holds no notebook" and found["s900"]["points"] == ""
    assert summary.counts == {"graded": 8, "partial": 2, "malformed": 3, "not submitted": 1}
    assert (summary.graded, summary.resumed, summary.unfinished) == (14, 0, 0) and summary.layers
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        ".lock",
        "answers.json",
        "grades.csv",
        "grades.json",
        "journal.jsonl",
    }
    assert read_answers(tmp_path / "report")["s002"]["answers"]["hardware/intensity"] == WRONG


def test_a_second_run_grades_only_what_changed(tiny_release, key, tmp_path):
    folder = write_hand_ins(tmp_path / "in", tiny_release.key, a_class(tiny_release, 4))
    run(folder, key, tmp_path / "report")
    before = (tmp_path / "report" / "grades.csv").read_bytes()
    again = run(folder, key, tmp_path / "report")
    assert (again.graded, again.resumed) == (0, 4) and again.counts == {"graded": 3, "partial": 1}
    assert (tmp_path / "report" / "grades.csv").read_bytes() == before
    write_hand_ins(folder, tiny_release.key, {"s001": tiny_release.solved()} | a_class(tiny_release, 1))
    changed = run(folder, key, tmp_path / "report")
    assert (changed.graded, changed.resumed) == (1, 3) and rows(tmp_path / "report")["s001"]["points"] == "4"
    fresh = run(folder, key, tmp_path / "report", resume=False)
    assert (fresh.graded, fresh.resumed) == (4, 0)


def test_the_key_of_a_record_is_everything_the_grade_depends_on(tiny_release, tmp_path):
    path = tmp_path / "a.ipynb"
    path.write_bytes(b"1")
    one, key = Submission("s1", path), tiny_release.key
    other = dataclasses.replace(key.manifest, release="other")
    tight = dataclasses.replace(key.manifest, limits=dataclasses.replace(key.manifest.limits, wall_seconds=1))
    keys = [record_key(one, key), record_key(dataclasses.replace(one, student="s2"), key)]
    keys += [record_key(one, dataclasses.replace(key, manifest=manifest)) for manifest in (other, tight)]
    keys.append(record_key(dataclasses.replace(one, problem="x"), key))
    path.write_bytes(b"2")
    keys.append(record_key(one, key))
    assert len(set(keys)) == 6


def test_B1_the_same_tables_after_a_kill(tiny_release, key, tmp_path):
    folder = write_hand_ins(tmp_path / "in", tiny_release.key, a_class(tiny_release, 60))
    run(folder, key, tmp_path / "whole")
    journal = tmp_path / "killed" / "journal.jsonl"
    code = (
        "import sys; from pathlib import Path; from llmcourse.grading.batch import grade_batch\n"
        "grade_batch(*map(Path, sys.argv[1:]), workers=2, progress=False)"
    )
    call = [sys.executable, "-c", code, str(folder), str(key), str(tmp_path / "killed")]
    process = subprocess.Popen(call, start_new_session=True)
    while process.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < 30):
        time.sleep(0.02)
    below = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "grades.csv").exists() and below
    _, alive = psutil.wait_procs(below, timeout=10)
    assert not alive, "the jails end with their grader"
    resumed = run(folder, key, tmp_path / "killed")
    assert resumed.resumed >= 30 and resumed.graded + resumed.resumed == 60 and resumed.graded > 0
    for name in ("grades.csv", "grades.json", "answers.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_B2_one_grader_at_a_time(tiny_release, key, tmp_path):
    folder = write_hand_ins(tmp_path / "in", tiny_release.key, a_class(tiny_release, 1))
    (tmp_path / "report").mkdir()
    with locked(tmp_path / "report" / ".lock", 0, "held"):
        with pytest.raises(ValueError, match="another grader is at work"):
            run(folder, key, tmp_path / "report")
    assert run(folder, key, tmp_path / "report").graded == 1


def test_B3_controls_stop_a_batch_with_one_line(tiny_release, tmp_path):
    broken = dataclasses.replace(
        tiny_release.key, solutions={**tiny_release.key.solutions, "hardware/intensity": WRONG}
    )
    key = write_key(tmp_path / "key", broken)
    folder = write_hand_ins(tmp_path / "in", tiny_release.key, a_class(tiny_release, 2))
    with pytest.raises(ValueError, match="the model solutions of 07_hardware score 3 of 4") as error:
        run(folder, key, tmp_path / "report")
    assert "\n" not in str(error.value) and not (tmp_path / "report" / "grades.csv").exists()
    assert (tmp_path / "report" / "journal.jsonl").read_bytes() == b""


def test_I28_files_beside_the_notebook_are_listed_and_never_read(tiny_release, key, tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'owned'}",))

    import pickle

    folder = write_hand_ins(tmp_path / "in", tiny_release.key, a_class(tiny_release, 1))
    files = folder / "s000" / "07_hardware.files"
    files.mkdir()
    for name in (".OTTER_LOG", "model.pt", "numpy.py", "conftest.py"):
        (files / name).write_bytes(pickle.dumps(Evil()))
    run(folder, key, tmp_path / "report")
    _, (grade,) = read_grades(tmp_path / "report")
    assert grade.points == 4 and not (tmp_path / "owned").exists()
    assert [one.text for one in grade.findings if one.kind == "FILE_IGNORED"] == [
        f"{name}: not needed" for name in (".OTTER_LOG", "conftest.py", "model.pt", "numpy.py")
    ]


def test_one_notebook_that_cannot_be_read_does_not_stop_the_others(tiny_release, key, tmp_path, monkeypatch):
    folder = write_hand_ins(tmp_path / "in", tiny_release.key, a_class(tiny_release, 2))
    read = station.read_notebook

    def refuse(path):
        if path.parent.name == "s001":
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(station, "read_notebook", refuse)
    run(folder, key, tmp_path / "report")
    found = rows(tmp_path / "report")
    assert found["s000"]["points"] == "4" and found["s001"]["verdict"] == "infrastructure"


@pytest.mark.parametrize("where", ["key", "submissions", "report"])
def test_folders_that_a_jail_would_show_are_refused(tiny_release, key, tmp_path, monkeypatch, where):
    folder = write_hand_ins(tmp_path / "in", tiny_release.key, a_class(tiny_release, 1))
    shown = {"key": key, "submissions": folder, "report": tmp_path / "report"}[where]
    monkeypatch.setattr("llmcourse.grading.jail.client.visible_to_jails", lambda: [shown.parent / shown.name])
    with pytest.raises(
        ValueError, match=f"the {where} would be visible to the submissions.*move it elsewhere"
    ):
        run(folder, key, tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_M10_links_and_devices_in_place_of_notebooks(tiny_release, key, tmp_path):
    folder = write_hand_ins(tmp_path / "in", tiny_release.key, a_class(tiny_release, 1))
    for student, target in (("s001", folder / "s000" / "07_hardware.ipynb"), ("s002", "/dev/zero")):
        (folder / student).mkdir()
        os.symlink(target, folder / student / "07_hardware.ipynb")
    os.mkfifo(folder / "s003")
    (folder / "s004").mkdir()
    os.mkfifo(folder / "s004" / "07_hardware.ipynb")
    (folder / "s005").symlink_to(folder / "s000")
    run(folder, key, tmp_path / "report")
    found = rows(tmp_path / "report")
    assert list(found) == ["s000", "s001", "s002", "s004"] and found["s000"]["points"] == "4"
    assert {found[name]["verdict"] for name in ("s001", "s002", "s004")} == {"malformed"}


def test_a_failing_jail_is_tried_again_and_never_costs_a_student_points(
    tiny_release, key, tmp_path, monkeypatch
):
    folder = write_hand_ins(
        tmp_path / "in", tiny_release.key, {f"s{i:03}": tiny_release.solved() for i in range(3)}
    )
    real, calls = Jail.run, []

    def failing(self, job):
        calls.append(job)
        if len(calls) == 4:  # after the two controls and one submission
            raise OSError("no memory for another process")
        return real(self, job)

    monkeypatch.setattr(Jail, "run", failing)
    summary = grade_batch(folder, key, tmp_path / "report", workers=1, progress=False)
    assert summary.counts == {"graded": 3} and len(calls) == 6

    def broken(self, job):
        if job.questions and len(calls) > 6:
            raise OSError("no memory for another process")
        return failing(self, job)

    calls.clear()
    monkeypatch.setattr(Jail, "run", broken)
    calls += [None] * 4
    summary = grade_batch(folder, key, tmp_path / "other", workers=1, progress=False)
    assert summary.unfinished > 0 and summary.counts.get("graded", 0) < 3
    waiting = [row for row in rows(tmp_path / "other").values() if row["verdict"] == "infrastructure"]
    assert {(row["points"], row["total"]) for row in waiting} == {("", "")}
    monkeypatch.setattr(Jail, "run", real)
    assert run(folder, key, tmp_path / "other").counts == {"graded": 3}


def test_a_broken_machine_stops_the_batch_and_the_next_run_goes_on(tiny_release, key, tmp_path, monkeypatch):
    folder = write_hand_ins(
        tmp_path / "in", tiny_release.key, {f"s{i:03}": tiny_release.solved() for i in range(12)}
    )
    real, calls = Jail.run, []

    def failing(self, job):
        calls.append(job)
        if len(calls) > 4:
            raise OSError("the disk is gone")
        return real(self, job)

    with monkeypatch.context() as patch:
        patch.setattr(Jail, "run", failing)
        patch.setattr(station.Station, "_restart", lambda self: None)
        with pytest.raises(ValueError, match="8 submissions in a row could not be run .*the disk is gone"):
            grade_batch(folder, key, tmp_path / "report", workers=1, progress=False)
    summary = run(folder, key, tmp_path / "report")
    assert summary.counts == {"graded": 12} and summary.resumed == 2


def test_a_notebook_that_trips_the_program_over_is_for_review(tiny_release, key, tmp_path, monkeypatch):
    folder = write_hand_ins(tmp_path / "in", tiny_release.key, a_class(tiny_release, 2))
    real = station.rebuild

    def tripping(data, assignment):
        if b"my_intensity" in data and b"raise NotImplementedError" in data and tripping.armed:
            raise KeyError("a case nobody thought of")
        return real(data, assignment)

    tripping.armed = False
    monkeypatch.setattr(station, "rebuild", tripping)
    monkeypatch.setattr(station.Station, "check_controls", lambda self: setattr(tripping, "armed", True))
    assert run(folder, key, tmp_path / "report").counts == {"graded": 1, "review": 1}
    assert "a case nobody thought of" in rows(tmp_path / "report")["s001"]["note"]


def test_bad_folders_are_one_line(tiny_release, key, tmp_path):
    folder = write_hand_ins(tmp_path / "in", tiny_release.key, a_class(tiny_release, 1))
    with pytest.raises(ValueError, match="run `llmcourse collect` first"):
        run(tmp_path / "nowhere", key, tmp_path / "report")
    with pytest.raises(ValueError, match="no assignment '08_other'"):
        run(folder, key, tmp_path / "report", assignment="08_other")
    with pytest.raises(ValueError, match="is no key folder"):
        run(folder, tmp_path / "in", tmp_path / "report")
    (folder / "submissions.json").write_text('{"students": {"../etc": {}}}')
    with pytest.raises(ValueError, match="no student id"):
        read_submissions(folder, "07_hardware")
    (folder / "submissions.json").write_text("[")
    with pytest.raises(ValueError, match="is damaged"):
        run(folder, key, tmp_path / "report")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no submissions in"):
        read_submissions(tmp_path / "empty", "07_hardware")
    assert not (tmp_path / "report").exists()


def test_a_folder_without_an_index_is_read_by_its_folders(tiny_release, key, tmp_path):
    folder = write_hand_ins(tmp_path / "in", tiny_release.key, a_class(tiny_release, 2))
    (folder / "submissions.json").unlink()
    (folder / ".hidden").mkdir()
    assert [one.student for one in read_submissions(folder, "07_hardware")] == ["s000", "s001"]
    assert run(folder, key, tmp_path / "report").counts == {"graded": 2}


def test_a_journal_of_other_results_is_not_used(tiny_release, key, tmp_path):
    folder = write_hand_ins(tmp_path / "in", tiny_release.key, a_class(tiny_release, 1))
    run(folder, key, tmp_path / "report")
    with Journal(tmp_path / "report" / "journal.jsonl") as journal:
        (name,) = journal.records
        journal.add(name, journal.records[name] | {"grade": {"verdict": "graded"}})
    with pytest.raises(ValueError, match="not a stored grade .*: grade again into an empty report folder"):
        run(folder, key, tmp_path / "report")
    assert json.loads((tmp_path / "report" / "grades.json").read_text())["grades"][0]["points"] == 4
    assert Verdict.GRADED == "graded"
