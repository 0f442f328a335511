"""The cache of results: hits, what changes the key, concurrency, damage, kills, lineage, errors."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from llmcourse import artifacts
from llmcourse.artifacts import (
    Artifact,
    artifact_key,
    artifact_root,
    build,
    find_artifact,
    lineage,
    list_artifacts,
    remove_stale,
)

CODE = ["llmcourse.models.config"]


class Maker:
    """A stage's function that counts its calls."""

    def __init__(self, text: str = "result") -> None:
        self.calls, self.text = 0, text

    def __call__(self, path: Path) -> dict[str, object]:
        self.calls += 1
        (path / "sub").mkdir()
        (path / "sub" / "data.txt").write_text(self.text)
        (path / "more.bin").write_bytes(bytes(range(256)))
        return {"loss": 1.5, "curve": [3, 2.5]}


def make_one(
    root: Path, stage: str = "base", make: Callable[..., object] | None = None, **options: object
) -> Artifact:
    given = {"settings": {"lr": 0.1}, "code": CODE, "root": root, **options}
    return build(stage, make=make or Maker(), **given)


def forget() -> None:
    """As a new process: nothing has been compared yet."""
    artifacts._checked.clear()


def test_same_settings_are_made_once(tmp_path: Path) -> None:
    make = Maker()
    first = make_one(tmp_path, make=make, settings={"lr": 0.1, "betas": (0.9, 0.95)})
    again = make_one(tmp_path, make=make, settings={"betas": [0.9, 0.95], "lr": 0.1})
    assert make.calls == 1 and again.path == first.path and dict(again.manifest) == first.manifest
    assert (again.path / "sub" / "data.txt").read_text() == "result"
    assert again.metrics == {"loss": 1.5, "curve": [3, 2.5]} and again.stage == "base" and again.inputs == {}
    assert again.path.name == f"base-{again.key[:16]}" and again.seconds >= 0
    assert set(again.manifest["files"]) == {"sub/data.txt", "more.bin"}
    assert {"python", "torch", "llmcourse"} == set(again.manifest["versions"])
    assert again.manifest["device"] and again.manifest["created"].endswith("+00:00")
    assert find_artifact(first.key, tmp_path) == again and find_artifact("0" * 64, tmp_path) is None


def test_settings_inputs_stage_and_code_each_change_the_key(tmp_path: Path) -> None:
    town, other_town = (make_one(tmp_path, "town", settings={"seed": seed}) for seed in (0, 1))
    base = artifact_key("base", {"lr": 0.1}, {"data": town}, "code")
    assert base == artifact_key("base", {"lr": 0.1}, {"data": town}, "code")
    keys = {
        base,
        artifact_key("base", {"lr": 0.2}, {"data": town}, "code"),
        artifact_key("base", {"lr": 0.1, "steps": 3}, {"data": town}, "code"),
        artifact_key("base", {"lr": 0.1}, {"data": other_town}, "code"),
        artifact_key("base", {"lr": 0.1}, {"tokens": town}, "code"),
        artifact_key("base", {"lr": 0.1}, {}, "code"),
        artifact_key("sft", {"lr": 0.1}, {"data": town}, "code"),
        artifact_key("base", {"lr": 0.1}, {"data": town}, "other code"),
    }
    assert len(keys) == 8
    first = make_one(tmp_path, code=CODE)
    second = make_one(tmp_path, code=["llmcourse.durable"])
    assert first.key != second.key and first.manifest["code"] != second.manifest["code"]
    third = make_one(tmp_path, code=["llmcourse.artifacts"], ignore=["llmcourse.runtime"])
    fourth = make_one(tmp_path, code=["llmcourse.artifacts"])
    assert third.key != fourth.key


def test_without_code_the_module_of_make_counts(tmp_path: Path) -> None:
    from llmcourse.durable import record_files

    found = build("x", settings={}, make=record_files, root=tmp_path)
    assert found.manifest["code"] == artifacts.code_hash("llmcourse.durable")


@pytest.mark.parametrize("name", ["sub/data.txt", "more.bin", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_damage_is_noticed_and_made_good(tmp_path: Path, name: str, damage: str) -> None:
    make = Maker()
    first = make_one(tmp_path, make=make)
    path, whole = first.path / name, (first.path / name).read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(whole[:-1] if damage == "truncated" else bytes([whole[0] ^ 1]) + whole[1:])
    forget()
    assert find_artifact(first.key, tmp_path) is None
    with pytest.warns(UserWarning, match=f"is damaged and is made anew: .*{Path(name).name}") as caught:
        again = make_one(tmp_path, make=make)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert make.calls == 2 and again.key == first.key
    if name != "manifest.json":
        assert path.read_bytes() == whole
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make_one(tmp_path, make=make).path == first.path
    assert make.calls == 2


def test_bytes_are_compared_once_per_process_and_sizes_always(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Maker()
    first = make_one(tmp_path, make=make)
    make_one(tmp_path, make=make)
    read = []
    monkeypatch.setattr("llmcourse.durable.file_digest", lambda path: read.append(path))
    make_one(tmp_path, make=make)
    assert read == [] and make.calls == 1
    (first.path / "more.bin").write_bytes(b"short")
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="more.bin has 5 bytes, 256 were written"):
        make_one(tmp_path, make=make)


def test_a_make_that_raises_leaves_nothing(tmp_path: Path) -> None:
    def fail(path: Path) -> dict[str, object]:
        (path / "half.txt").write_text("half")
        raise RuntimeError("loss is not finite")

    with pytest.raises(RuntimeError, match="loss is not finite"):
        make_one(tmp_path, make=fail)
    with pytest.raises(KeyboardInterrupt):
        make_one(tmp_path, make=raise_interrupt)
    with pytest.raises(ValueError, match=r"metrics of stage 'base'\['x'\]: .*Path is not plain data"):
        make_one(tmp_path, make=lambda path: {"x": path})
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
    assert list_artifacts(tmp_path) == []
    assert make_one(tmp_path).metrics["loss"] == 1.5


def raise_interrupt(path: Path) -> dict[str, object]:
    raise KeyboardInterrupt


def test_resumable_work_survives_a_failure_and_goes_on_success(tmp_path: Path) -> None:
    seen = []

    def train(path: Path, work: Path) -> dict[str, object]:
        seen.append(sorted(entry.name for entry in work.iterdir()))
        (work / f"step{len(seen)}").write_text("state")
        assert list(path.iterdir()) == []
        (path / "half").write_text("x")
        if len(seen) < 3:
            raise RuntimeError("power cut")
        return {"tries": len(seen)}

    for _ in range(2):
        with pytest.raises(RuntimeError):
            make_one(tmp_path, make=train, resumable=True)
    found = make_one(tmp_path, make=train, resumable=True)
    assert seen == [[], ["step1"], ["step1", "step2"]]
    assert found.metrics == {"tries": 3} and set(found.manifest["files"]) == {"half"}
    assert not list(tmp_path.glob("*.partial"))


STAGE = """
import os, sys, time
from llmcourse import artifacts
from llmcourse.artifacts import build

artifacts.QUIET_WAIT = 0.3
root, seconds, log = sys.argv[1], float(sys.argv[2]), sys.argv[3]


def make(path, work):
    with open(log, "a") as file:
        file.write(f"{os.getpid()} {sorted(entry.name for entry in work.iterdir())}\\n")
    (work / "checkpoint").write_text("x")
    (path / "file").write_text(str(os.getpid()))
    print("making", flush=True)
    time.sleep(seconds)
    return {"pid": os.getpid()}


made = build("slow", settings={}, make=make, code=["llmcourse.models.config"], root=root, resumable=True)
print(made.metrics["pid"], (made.path / "file").read_text(), flush=True)
"""


def start(tmp_path: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", STAGE, str(tmp_path / "root"), str(seconds), str(tmp_path / "log")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_processes_at_once_build_once_and_a_killed_one_is_replaced(tmp_path: Path) -> None:
    victim = start(tmp_path, 60)
    assert victim.stdout.readline() == "making\n"
    one, two = start(tmp_path, 1), start(tmp_path, 1)
    assert one.stderr.readline().startswith(f"waiting for process {victim.pid} (since ")
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    victim.stdout.close()
    victim.stderr.close()
    outputs = [process.communicate(timeout=60)[0].split() for process in (one, two)]
    assert one.returncode == two.returncode == 0
    results = [output[-2:] for output in outputs]
    assert results[0] == results[1] and results[0][0] == results[0][1] in (str(one.pid), str(two.pid))
    assert sorted(len(output) for output in outputs) == [2, 3]  # "making" was printed by one of them only
    log = (tmp_path / "log").read_text().splitlines()
    assert log == [f"{victim.pid} []", f"{results[0][0]} ['checkpoint']"]
    names = sorted(path.name for path in (tmp_path / "root").iterdir())
    assert len(names) == 2 and names[0].endswith(".lock") and names[1].startswith("slow-")


def test_lineage_is_complete_even_without_the_ancestors(tmp_path: Path) -> None:
    town = make_one(tmp_path, "town")
    tokens = make_one(tmp_path, "tokens", inputs={"town": town})
    base = make_one(tmp_path, "base", inputs={"town": town, "tokens": tokens}, settings={"lr": 3})
    chat = make_one(tmp_path, "chat", inputs={"base": base, "town": town})
    assert [record["stage"] for record in lineage(chat)] == ["town", "tokens", "base", "chat"]
    assert lineage(chat)[2]["settings"] == {"lr": 3} and lineage(chat)[2]["metrics"]["loss"] == 1.5
    assert chat.inputs == {"base": base.key, "town": town.key}
    before = json.dumps(lineage(chat))
    removed = remove_stale([town], tmp_path)
    assert removed == [tokens.path, base.path, chat.path]
    assert json.dumps(lineage(chat)) == before


def test_listing_and_removing(tmp_path: Path) -> None:
    town = make_one(tmp_path, "town")
    base = make_one(tmp_path, "base", inputs={"town": town})
    old = make_one(tmp_path, "base", settings={"lr": 9})
    assert {found.key for found in list_artifacts(tmp_path)} == {town.key, base.key, old.key}
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "manifest.json").write_text("{}")
    (tmp_path / "base-123.partial").mkdir()
    lock = artifacts.FileLock(tmp_path / f".{old.path.name}.lock")
    with lock:
        assert remove_stale([base], tmp_path) == [tmp_path / "base-123.partial"]  # `old` is in use
    assert remove_stale([base], tmp_path) == [old.path]
    assert {found.key for found in list_artifacts(tmp_path)} == {town.key, base.key}
    assert (tmp_path / "notes" / "manifest.json").exists() and list_artifacts(tmp_path / "none") == []


def test_root_is_set_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMCOURSE_HOME", str(tmp_path / "here"))
    assert artifact_root() == tmp_path / "here"
    assert make_one(None).path.parent == tmp_path / "here"
    monkeypatch.delenv("LLMCOURSE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert artifact_root() == tmp_path / ".cache" / "llmcourse" / "artifacts"


def test_errors_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="cannot write artifacts to .*file.*: set LLMCOURSE_HOME") as error:
        make_one(tmp_path / "file" / "below")
    assert "\n" not in str(error.value)

    def full(path: Path) -> dict[str, object]:
        (path / "half").write_text("x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path / "half"))

    with pytest.raises(OSError, match="no space left in .* to make base-.*: set LLMCOURSE_HOME") as error:
        make_one(tmp_path, make=full)
    assert "\n" not in str(error.value) and not list(tmp_path.glob("**/half"))

    def unreadable(path: Path) -> dict[str, object]:
        raise FileNotFoundError(errno.ENOENT, "No such file", "corpus.txt")

    with pytest.raises(FileNotFoundError, match="corpus.txt"):  # not about the cache: passed on as it is
        make_one(tmp_path, make=unreadable)
    for stage in ("", "a/b", "a.b"):
        with pytest.raises(ValueError, match="use letters, digits"):
            make_one(tmp_path, stage)
    with pytest.raises(ValueError, match=r"settings\['path'\]: .*Path is not plain data"):
        make_one(tmp_path, settings={"path": tmp_path})


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a folder that nobody may write: /sys")
def test_a_root_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="cannot write artifacts to /sys/llmcourse .*: set LLMCOURSE_HOME"):
        make_one(Path("/sys/llmcourse"))
