"""Collecting from what learning platforms give out."""

from __future__ import annotations

import json
import os

import pytest

from llmcourse.grading.collect import collect, folder_name
from llmcourse.grading.manifest import Key
from tests.grading.archives import everything, incoming_folder, reasons, record, write, zipped

NAME = "07_hardware"


folder = incoming_folder


@pytest.fixture
def notebook(tiny_release) -> bytes:
    return tiny_release.solved_bytes()


def test_canvas(tmp_path, notebook):
    old, broken = notebook.replace(b"math.prod", b"math.prod "), b"{"
    source = zipped(
        tmp_path / "submissions.zip",
        {
            "dayjane_1001_5002_lab-2.ipynb": notebook,
            "dayjane_1001_5002_lab-1.ipynb": old,
            "dayjane_1001_5002_lab-10x.csv": b"a,b",
            "leesam_LATE_1002_5003_Problem 1 (1).ipynb": notebook,
            "poejo_1003_5004_lab.ipynb": broken,
            "roeal_1004_5005_report.pdf": b"%PDF",
            "readme.txt": b"",
        },
    )
    found = collect(source, tmp_path / "out")
    assert [student.id for student in found.students] == ["1001", "1002", "1003", "1004"]
    assert (tmp_path / "out/1001/07_hardware.ipynb").read_bytes() == notebook
    assert (
        tmp_path / "out/1003/07_hardware.ipynb"
    ).read_bytes() == broken  # grading says what is wrong with it
    assert not (tmp_path / "out/1004/07_hardware.ipynb").exists()
    students = record(tmp_path / "out")["students"]
    assert record(tmp_path / "out")["assignment"] == NAME and record(tmp_path / "out")["version"] == 1
    assert students["1001"]["name"] == "dayjane" and students["1001"]["ids"] == {"canvas": "1001"}
    assert students["1001"]["files"] == ["lab-10x.csv"]
    assert [student["submitted"] for student in students.values()] == ["", "late", "", ""]
    assert students["1004"]["problem"] == "no notebook is among the files that were handed in"
    assert students["1004"]["ignored"][0]["reason"] == "files of this kind are not used"
    assert found.lines()[0] == "07_hardware: 3 notebooks of 4 students (layout canvas)"
    assert [item.path for item in found.ignored] == ["readme.txt"]


@pytest.mark.parametrize("top", ["", "Lab 7/"])
def test_moodle(tmp_path, folder, notebook, top):
    names = {
        "Day, Jane_201_assignsubmission_file_/my lab.ipynb": notebook,
        "Day, Jane_201_assignsubmission_file_/sub/run.jsonl": b"{}",
        "Day, Jane_201_assignsubmission_onlinetext_/onlinetext.html": b"<p>",
        "Sam Lee_202_assignsubmission_file/lab.ipynb": notebook,
        "Jo Poe_203_assignsubmission_file_lab.ipynb": notebook,
    }
    source = write(folder, {top + name: data for name, data in names.items()})
    if top:  # it could be the folder of one student
        with pytest.raises(ValueError, match="everything lies in the folder Lab 7/.*--layout moodle"):
            collect(source, tmp_path / "out")
    found = collect(source, tmp_path / "out", layout="moodle" if top else "auto")
    assert [student.id for student in found.students] == ["201", "202", "203"]
    assert everything(tmp_path / "out") == {
        "submissions.json",
        *(f"{student}/07_hardware.ipynb" for student in ("201", "202", "203")),
        "201/07_hardware.files/run.jsonl",
    }
    assert record(tmp_path / "out")["students"]["201"]["name"] == "Day, Jane"
    assert record(tmp_path / "out")["students"]["201"]["ids"] == {"moodle": "201"}


GRADESCOPE = """\
submission_11:
  :submitters:
  - :name: Jane Day
    :sid: s001
    :email: s001@example.org
  - :name: Sam Lee
    :sid: s002
    :email: s002@example.org
  :created_at: 2026-05-04 10:12:13.000000000 Z
submission_12:
  :submitters:
  - :name: "=HYPERLINK(1),\\nx"
    :sid:
    :email: s003@example.org
  :created_at: 2026-05-05 10:12:13.000000000 Z
submission_13:
  :submitters:
  - :name: Jane Day
    :sid: s001
  :created_at: 2026-05-06 10:12:13.000000000 Z
"""


def test_gradescope(tmp_path, notebook):
    newer = notebook + b"\n"
    forged = GRADESCOPE.replace("s001", "s999").encode()
    files = {
        "submission_11/lab.ipynb": notebook,
        "submission_11/submission_metadata.yml": forged,
        "submission_12/lab.ipynb": notebook,
        "submission_13/lab.ipynb": newer,
        "submission_metadata.yml": GRADESCOPE.encode(),
    }
    source = zipped(tmp_path / "a.zip", {f"assignment_5_export/{name}": data for name, data in files.items()})
    found = collect(source, tmp_path / "out")
    assert [student.id for student in found.students] == ["s001", "s002", "s003@example.org"]
    assert (tmp_path / "out/s001/07_hardware.ipynb").read_bytes() == newer
    assert (tmp_path / "out/s002/07_hardware.ipynb").read_bytes() == notebook
    students = record(tmp_path / "out")["students"]
    assert students["s001"]["submitted"].startswith("2026-05-06T10:12:13")
    assert students["s001"]["ids"] == {"gradescope": "13"}
    assert students["s003@example.org"]["name"] == "=HYPERLINK(1),\nx"  # as it is: exports escape it


@pytest.mark.parametrize("text", ["[1]", "a: [", "&a [*a]", "- !!python/object/apply:os.system [id]"])
def test_gradescope_with_a_damaged_record(folder, tmp_path, text):
    write(folder, {"submission_metadata.yml": text.encode(), "submission_1/lab.ipynb": b"{}"})
    with pytest.raises(ValueError, match="export again"):
        collect(folder, tmp_path / "out")


def test_flat_folders_and_files(tmp_path, folder, notebook):
    write(
        folder,
        {
            "s001.ipynb": notebook,
            "s002_07_hardware.ipynb": notebook + b"\n",
            "s002_07_hardware (1).ipynb": notebook,
            "s003/deep/er/lab.ipynb": notebook,
            "s003/.ipynb_checkpoints/lab-checkpoint.ipynb": b"{}",
            "s003/numpy.py": b"raise SystemExit",
            "s003/model.pt": b"\x80",
            "notes.md": b"",
        },
    )
    found = collect(folder, tmp_path / "out")
    assert [student.id for student in found.students] == ["s001", "s002", "s003"]
    assert (tmp_path / "out/s002/07_hardware.ipynb").read_bytes() == notebook
    ignored = reasons(found.students[2])
    assert ignored == dict.fromkeys(["s003/numpy.py", "s003/model.pt"], "files of this kind are not used")
    assert reasons(found.students[1]) == {"s002_07_hardware.ipynb": "s002_07_hardware (1).ipynb counts"}


def test_h11_the_name_of_the_file_does_not_matter(tmp_path, folder, notebook):
    names = ["Problem 1 (1).ipynb", "11_peft.ipynb", "UPPER.IPYNB", "\u202etxt.ipynb"]
    write(folder, {f"s{number}/{name}": notebook for number, name in enumerate(names)})
    found = collect(folder, tmp_path / "out")
    assert [bool(student.notebook) for student in found.students] == [True] * 4
    assert all((tmp_path / f"out/s{n}/07_hardware.ipynb").read_bytes() == notebook for n in range(4))
    assert all(line.isprintable() for line in found.lines())


def test_students_who_would_share_a_folder(tmp_path, folder, notebook):
    write(folder, {"s001/a.ipynb": notebook, "S001/a.ipynb": notebook})
    with pytest.raises(ValueError, match="'S001' and 's001' are too much alike"):
        collect(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_student_cannot_choose_the_layout(tmp_path, folder, notebook):
    write(
        folder,
        {
            "s001/lab.ipynb": notebook,
            "s002/submission_metadata.yml": GRADESCOPE.encode(),
            "s002/x_1_assignsubmission_file_/lab.ipynb": notebook,
            "s002/submission_11/a_1_2_lab.ipynb": notebook,
            "s003/lab.ipynb": notebook,
        },
    )
    assert [student.id for student in collect(folder, tmp_path / "out").students] == ["s001", "s002", "s003"]


def test_the_notebook_says_which_assignment_it_is(tmp_path, folder, tiny_release, notebook):
    other = tiny_release.solved()
    other["metadata"]["llmcourse"]["assignment"] = "11_peft"
    write(folder, {"s001/11_peft.ipynb": notebook, "s002/07_hardware.ipynb": json.dumps(other).encode()})
    with pytest.raises(ValueError, match=r"several assignments.*07_hardware \(1\), 11_peft \(1\)"):
        collect(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    found = collect(folder, tmp_path / "out", assignment=NAME)
    assert [bool(student.notebook) for student in found.students] == [True, False]
    assert "another assignment" in found.students[1].problem


def test_a_notebook_that_lost_its_metadata_is_known_by_its_cells(tmp_path, folder, tiny_release, notebook):
    lost, other = tiny_release.solved(), {"nbformat": 4, "cells": [], "metadata": {}}
    lost["metadata"] = {}
    data = json.dumps(lost).encode()
    write(folder, {"s001/a.ipynb": data, "s001/b.ipynb": json.dumps(other).encode()})
    key = Key.create(tmp_path / "key", tiny_release.key.secret)
    key.save(tiny_release.key)
    found = collect(folder, tmp_path / "out", tmp_path / "key", layout="flat")
    assert found.students[0].notebook == "s001/a.ipynb"
    with pytest.raises(ValueError, match="--assignment"):
        collect(folder, tmp_path / "other", layout="flat")


def test_x5_names_become_harmless_folders(tmp_path, folder):
    for name in ("s001", "a.b@c.org", "a+b"):
        assert folder_name(name) == name
    names = [
        "../x",
        "=HYPERLINK(1)",
        "a,b\nc",
        ".hidden",
        "-rf",
        "",
        "CON",
        "x" * 300,
        "\u202egnp",
        "dots..",
        "\ud800",
    ]
    made = [folder_name(name) for name in names]
    assert len(set(made)) == len(names)
    assert all(len(one) < 80 and one[0] not in ".-" and set(one) <= collecting_characters() for one in made)


def collecting_characters() -> set[str]:
    return set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._@+-")


def test_x6_x7_time_stamps_of_students_mean_nothing(tmp_path, folder, notebook):
    write(folder, {"s001/lab.ipynb": notebook, "s001/timestamp.txt": b"1999-01-01 00:00:00 UTC"})
    os.utime(folder / "s001/lab.ipynb", (0, 0))
    found = collect(folder, tmp_path / "out")
    assert found.students[0].submitted == "" and found.students[0].kept == []
    assert reasons(found.students[0]) == {"s001/timestamp.txt": "the time is what the platform says"}
    assert "1999" not in (tmp_path / "out/submissions.json").read_text()


def test_collecting_again_keeps_the_others_and_takes_the_newer(tmp_path, folder, notebook):
    write(folder, {"s001/lab.ipynb": b"{", "s002/lab.ipynb": notebook})
    collect(folder, tmp_path / "out")
    again = write(tmp_path / "again", {"s001/lab.ipynb": notebook})
    collect(again, tmp_path / "out")
    assert (tmp_path / "out/s001/07_hardware.ipynb").read_bytes() == notebook
    assert sorted(record(tmp_path / "out")["students"]) == ["s001", "s002"]
    with pytest.raises(ValueError, match="holds submissions of 07_hardware"):
        collect(again, tmp_path / "out", assignment="11_peft")
    (tmp_path / "out/submissions.json").write_text("[]")
    with pytest.raises(ValueError, match="damaged"):
        collect(again, tmp_path / "out")


def test_files_keep_the_names_that_the_students_gave_them(tmp_path, notebook):
    shard = "model-00001-of-00002.safetensors"
    source = zipped(
        tmp_path / "canvas.zip",
        {
            "dayjane_1001_5001_lab.ipynb": notebook,
            "dayjane_1001_5001_config.json": b"old",
            "dayjane_1001_5002_config-2.json": b"newest",
            "dayjane_1001_5002_config-1.json": b"newer",
            f"dayjane_1001_5001_{shard}": b"shard",
        },
    )
    assert sorted(collect(source, tmp_path / "out").students[0].kept) == ["config.json", shard]
    files = tmp_path / "out/1001/07_hardware.files"
    assert (files / "config.json").read_bytes() == b"newest"
    names = {f"Jo Poe_203_assignsubmission_file_{name}": notebook for name in ("lab.ipynb", "config.json")}
    source = zipped(tmp_path / "moodle.zip", names | {"Li_204_assignsubmission_file_/lab.ipynb": notebook})
    assert collect(source, tmp_path / "moodle").students[0].kept == ["config.json"]


def test_files_of_an_earlier_hand_in_are_gone(tmp_path, folder, notebook):
    files = {"s001/lab.ipynb": notebook, "s001/predictions.jsonl": b"{}", "s001/data.json": b"1"}
    write(folder, files | {"s002/lab.ipynb": notebook})
    collect(folder, tmp_path / "out")
    again = write(tmp_path / "again", {"s001/lab.ipynb": notebook, "s001/data.json": b"2"})
    collect(again, tmp_path / "out")
    assert everything(tmp_path / "out/s001") == {"07_hardware.ipynb", "07_hardware.files/data.json"}
    assert (tmp_path / "out/s001/07_hardware.files/data.json").read_bytes() == b"2"


@pytest.mark.parametrize("layout", ["moodle", "gradescope"])
def test_of_two_notebooks_of_a_submission_the_later_counts(tmp_path, notebook, layout):
    folders = {"moodle": "Jo_203_assignsubmission_file_", "gradescope": "submission_12"}
    names = {f"{folders[layout]}/lab.ipynb": b"{", f"{folders[layout]}/lab (1).ipynb": notebook}
    names |= {"Li_204_assignsubmission_file_/lab.ipynb": notebook} if layout == "moodle" else {}
    names |= {"submission_metadata.yml": GRADESCOPE.encode()} if layout == "gradescope" else {}
    found = collect(zipped(tmp_path / "a.zip", names), tmp_path / "out", layout=layout)
    student = next(one for one in found.students if one.notebook)
    assert student.notebook == f"{folders[layout]}/lab (1).ipynb"


def test_numbers_in_the_names_of_students_are_theirs(tmp_path, folder, notebook):
    names = ["student-01.ipynb", "student-02.ipynb", "2024-001.ipynb", "ada-2_07_hardware-3.ipynb"]
    write(folder, dict.fromkeys([*names, "student-01 (2).ipynb"], notebook))
    found = [student.id for student in collect(folder, tmp_path / "out").students]
    assert found == ["2024-001", "ada-2", "student-01", "student-02"]


@pytest.mark.parametrize("inside", ["{}.ipynb", "{}/lab.ipynb"])
def test_a_folder_around_the_class_is_no_student(tmp_path, folder, notebook, inside):
    write(folder, {f"incoming/{inside.format(name)}": notebook for name in ("s001", "s002")})
    with pytest.raises(ValueError, match="everything lies in the folder incoming/.*one student's"):
        collect(folder, tmp_path / "out")
    assert len(collect(folder / "incoming", tmp_path / "out").students) == 2


@pytest.mark.parametrize("layout", ["gradescope", "canvas"])
def test_a_lone_student_cannot_choose_the_layout(tmp_path, folder, notebook, layout):
    names = {
        "gradescope": ["submission_metadata.yml", "submission_11/lab.ipynb"],
        "canvas": ["x_1001_1_lab.ipynb"],
    }
    content = {"submission_metadata.yml": GRADESCOPE.encode()}
    write(folder, {f"s009/{name}": content.get(name, notebook) for name in names[layout]})
    with pytest.raises(ValueError, match=f"everything lies in the folder s009/.*--layout {layout}"):
        collect(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_arguments(tmp_path, folder):
    with pytest.raises(ValueError, match="does not exist"):
        collect(tmp_path / "none", tmp_path / "out")
    with pytest.raises(ValueError, match="no student's file"):
        collect(folder, tmp_path / "out")
    with pytest.raises(ValueError, match="choose auto, flat, canvas"):
        collect(folder, tmp_path / "out", layout="blackboard")
