"""Collecting from archives and folders that were made to do harm."""

from __future__ import annotations

import os
import stat
import struct
import zipfile

import pytest

from llmcourse.grading import collect as collecting
from llmcourse.grading import incoming
from llmcourse.grading.collect import collect
from tests.grading.archives import everything, incoming_folder, reasons, record, write, zipped

folder = incoming_folder


@pytest.fixture
def notebook(tiny_release) -> bytes:
    return tiny_release.solved_bytes()


# M10: made to do harm.


def test_m10_names_that_lead_out(tmp_path, notebook):
    evil = [
        "../../escape.ipynb",
        "/abs.ipynb",
        "a/../../b.ipynb",
        "c:\\x.ipynb",
        "s/..\\..\\y.ipynb",
        "s/\x1b[31m.ipynb",
    ]
    source = zipped(tmp_path / "a.zip", {"s001/lab.ipynb": notebook, **dict.fromkeys(evil, notebook)})
    before = everything(tmp_path)
    found = collect(source, tmp_path / "out")
    assert everything(tmp_path) - before == {"out/submissions.json", "out/s001/07_hardware.ipynb"}
    assert len(found.ignored) == len(evil) and all(line.isprintable() for line in found.lines())


def test_m10_links_and_devices_in_archives(tmp_path, notebook):
    kinds = {"s002/lab.ipynb": stat.S_IFLNK, "s003/lab.ipynb": stat.S_IFCHR, "s004/lab.ipynb": stat.S_IFIFO}
    modes = {name: kind | 0o777 for name, kind in kinds.items()}
    files = {"s001/lab.ipynb": notebook, **dict.fromkeys(kinds, b"../s001/lab.ipynb")}
    found = collect(zipped(tmp_path / "a.zip", files, modes), tmp_path / "out")
    assert [bool(student.notebook) for student in found.students] == [True, False, False, False]
    problems = [student["problem"] for student in record(tmp_path / "out")["students"].values()]
    assert ["it is a link" in one for one in problems] == [False, True, False, False]
    assert ["no regular file" in one for one in problems] == [False, False, True, True]


def test_m10_links_and_pipes_in_folders(tmp_path, folder, notebook):
    write(folder, {"s001/lab.ipynb": notebook})
    for student in ("s002", "s003"):
        (folder / student).mkdir()
    (folder / "s002/lab.ipynb").symlink_to(folder / "s001/lab.ipynb")
    (folder / "s002/more").symlink_to(folder / "s001")
    (folder / "s004").symlink_to(folder / "s001")
    os.mkfifo(folder / "s003/lab.ipynb")
    found = collect(folder, tmp_path / "out")
    assert [student.id for student in found.students if student.notebook] == ["s001"]
    assert "s002/lab.ipynb: it is a link" in found.students[1].problem
    assert "no regular file" in found.students[2].problem
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_m10_a_file_that_becomes_a_link_is_not_followed(tmp_path, folder, notebook):
    write(folder, {"s001/lab.ipynb": notebook, "secret": b"s"})
    source = incoming.Folder(folder)
    file = next(file for file in source.files if file.name == "lab.ipynb")
    (folder / "s001/lab.ipynb").unlink()
    (folder / "s001/lab.ipynb").symlink_to(folder / "secret")
    with pytest.raises(ValueError, match="cannot be read"):
        file.read()
    (folder / "s001").rename(folder / "moved")
    (folder / "s001").symlink_to(folder / "moved")
    with pytest.raises(ValueError, match="cannot be read"):
        file.read()


def test_m10_what_stands_in_the_output_is_not_written_through(tmp_path, folder, notebook):
    write(folder, {"s001/lab.ipynb": notebook})
    target = tmp_path / "target"
    target.write_bytes(b"mine")
    (tmp_path / "out/s001").mkdir(parents=True)
    (tmp_path / "out/s001/07_hardware.ipynb").symlink_to(target)
    collect(folder, tmp_path / "out")
    assert target.read_bytes() == b"mine" and not (tmp_path / "out/s001/07_hardware.ipynb").is_symlink()


def test_m10_zip_bomb_costs_only_its_student(tmp_path, notebook):
    source = zipped(tmp_path / "a.zip", {"s001/lab.ipynb": notebook, "s002/lab.ipynb": bytes(15_000_000)})
    assert source.stat().st_size < 100_000
    found = collect(source, tmp_path / "out")
    assert [bool(student.notebook) for student in found.students] == [True, False]
    assert "compressed by more than" in found.students[1].problem


def test_m10_sizes_are_counted_and_not_believed(tmp_path, notebook):
    source = zipped(
        tmp_path / "a.zip", {"s001/lab.ipynb": notebook, "s002/lab.ipynb": os.urandom(5000) * 5000}
    )
    data = bytearray(source.read_bytes())
    at = data.rindex(b"PK\x01\x02")
    data[at + 24 : at + 28] = struct.pack("<I", 10)  # the size that the list of members states
    source.write_bytes(data)
    found = collect(source, tmp_path / "out")
    assert [bool(student.notebook) for student in found.students] == [True, False]


@pytest.mark.parametrize("kind", ["zip", "folder"])
def test_m10_too_many_files(tmp_path, folder, monkeypatch, kind):
    monkeypatch.setattr(incoming, "MAX_MEMBERS", 50)
    files = {f"s001/{number}.txt": b"" for number in range(51)}
    source = zipped(tmp_path / "a.zip", files) if kind == "zip" else write(folder, files)
    with pytest.raises(ValueError, match="more than 50: collect|more than 50 files"):
        collect(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_m10_a_hundred_thousand_files(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for number in range(100_000):
            archive.writestr(zipfile.ZipInfo(f"s/{number}"), b"")
    with pytest.raises(ValueError, match="100000 files, more than 50000"):
        collect(tmp_path / "a.zip", tmp_path / "out")


def test_m10_too_large_in_all(tmp_path, monkeypatch, notebook):
    monkeypatch.setattr(incoming, "MAX_TOTAL_BYTES", 1000)
    with pytest.raises(ValueError, match="unpacks to"):
        collect(zipped(tmp_path / "a.zip", {"s001/lab.ipynb": notebook}), tmp_path / "out")


def test_limits_of_one_student(tmp_path, folder, monkeypatch, notebook):
    monkeypatch.setattr(collecting, "MAX_SUPPORT_FILES", 2)
    monkeypatch.setattr(collecting, "MAX_SUPPORT_BYTES", 10)
    monkeypatch.setattr(collecting, "MAX_NOTEBOOKS", 1)
    files = {
        "a.csv": b"1",
        "b.csv": bytes(20),
        "c.csv": b"2",
        "d.csv": b"3",
        "x/a.csv": b"",
        "y.ipynb": b"{}",
    }
    write(folder, {"s001/z.ipynb": notebook, **{f"s001/{name}": data for name, data in files.items()}})
    (student,) = collect(folder, tmp_path / "out", layout="flat").students
    assert student.kept == ["a.csv", "c.csv"] and student.notebook == "s001/z.ipynb"
    assert {path.removeprefix("s001/") for path in reasons(student)} == {
        "b.csv",
        "d.csv",
        "x/a.csv",
        "y.ipynb",
    }


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"PK\x05\x06" + b"\xff" * 18, b"no zip", bytes(10_000)])
def test_what_is_no_archive(tmp_path, data):
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(ValueError, match="cannot be opened as a zip file"):
        collect(tmp_path / "a.zip", tmp_path / "out")


def test_an_encrypted_member_and_a_name_that_occurs_twice(tmp_path, notebook):
    with (
        pytest.warns(UserWarning, match="Duplicate name"),
        zipfile.ZipFile(tmp_path / "a.zip", "w") as archive,
    ):
        for name in ("s001/lab.ipynb", "s001/lab.ipynb", "s002/lab.ipynb"):
            archive.writestr(name, notebook)
    data = bytearray((tmp_path / "a.zip").read_bytes())
    at = data.rindex(b"PK\x01\x02")
    data[at + 8] |= 1
    (tmp_path / "a.zip").write_bytes(data)
    found = collect(tmp_path / "a.zip", tmp_path / "out")
    assert reasons(found.students[0]) == {"s001/lab.ipynb": "the archive holds another file of that name"}
    assert "encrypted" in found.students[1].problem
