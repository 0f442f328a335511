"""Folders of graders that were killed are removed by the next one, those of living graders never."""

import os
import signal
import subprocess
import sys

import pytest

from llmcourse.grading.jail import home

HOLD = "from llmcourse.grading.jail.home import Home\nheld = Home()\nprint(held.path, flush=True)\ninput()"


@pytest.fixture
def grader(tmp_path):
    """Another process with a folder of its own: the process, and the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    yield process, process.stdout.readline().strip()
    process.kill()
    process.communicate()


def test_a_folder_goes_when_its_grader_was_killed_and_not_before(grader, tmp_path, monkeypatch):
    process, folder = grader
    (tmp_path / "llmcourse-jail-no-folder").write_text("")
    monkeypatch.setattr(home, "GRACE_SECONDS", 0.0)
    assert home.remove_left_behind(tmp_path) == [] and os.path.isdir(folder)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [str(path) for path in home.remove_left_behind(tmp_path)] == [folder]
    assert not os.path.exists(folder) and (tmp_path / "llmcourse-jail-no-folder").exists()


def test_trees_that_resist_are_removed(tmp_path):
    folder = tmp_path / "made to resist"
    (folder / "closed").mkdir(parents=True)
    (folder / "closed" / "file").write_text("x")
    (folder / "closed").chmod(0o300)
    here = os.getcwd()
    try:
        os.chdir(folder)
        for _ in range(1500):
            os.mkdir("d")
            os.chdir("d")
    finally:
        os.chdir(here)
    home.remove_tree(folder)
    assert not folder.exists()
    home.remove_tree(folder)


def test_a_young_folder_stays(tmp_path):
    (tmp_path / "llmcourse-jail-young").mkdir()
    assert home.remove_left_behind(tmp_path) == [] and (tmp_path / "llmcourse-jail-young").is_dir()


def test_a_new_home_removes_what_was_left(tmp_path, monkeypatch):
    monkeypatch.setattr(home.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(home.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(home, "GRACE_SECONDS", 0.0)
    (tmp_path / "llmcourse-jail-old" / "submission-1").mkdir(parents=True)
    made = home.Home()
    assert os.listdir(tmp_path) == [os.path.basename(made.path)]
    assert os.stat(made.path).st_mode & 0o777 == 0o711
    made.remove()
    made.remove()
    assert os.listdir(tmp_path) == []
