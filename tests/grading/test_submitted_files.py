"""Artifact mode: claims are checked before memory is taken, code is never opened, and our own evaluation decides."""

from __future__ import annotations

import json
import os
import pickle
import struct
import textwrap
import time

import psutil
import pytest
import torch
from safetensors.torch import save

from llmcourse.grading import submitted_files
from llmcourse.grading.batch import grade_batch, record_key
from llmcourse.grading.file_evaluation import Evaluation, evaluate_files, find_evaluator
from llmcourse.grading.grades import Grade, Item
from llmcourse.grading.limits import Limits
from llmcourse.grading.reports.exports import read_grades
from llmcourse.grading.station import Submission
from llmcourse.grading.submitted_files import (
    FileRefused,
    check_safetensors,
    read_artifacts,
    read_json,
    read_json_lines,
    read_safetensors,
)
from llmcourse.grading.verdicts import Verdict
from tests.grading.hand_ins import write_hand_ins, write_key

WEIGHTS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.ones(2, dtype=torch.bfloat16),
    "c": torch.zeros(0, 4),
}


def tensors_file(header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_an_honest_file_is_read():
    data = save(WEIGHTS, {"format": "pt"})
    assert check_safetensors(data) == {"a": ("F32", (2, 3)), "b": ("BF16", (2,)), "c": ("F32", (0, 4))}
    assert all(torch.equal(value, WEIGHTS[name]) for name, value in read_safetensors(data).items())


HEADERS = {
    "a trillion elements": tensors_file({"a": entry(shape=[10**12], offsets=[0, 4 * 10**12])}),
    "shape of more than its bytes": tensors_file({"a": entry(shape=[10**12])}, bytes(8)),
    "length of the header": struct.pack("<Q", 2**63) + b"{}",
    "length beyond the file": struct.pack("<Q", 100) + b"{}",
    "no header": b"1234",
    "no JSON": tensors_file(b"{nonsense"),
    "NaN": tensors_file(b'{"a": NaN}'),
    "nested": tensors_file(b"[" * 10**6),
    "a list": tensors_file([1]),
    "an unknown dtype": tensors_file({"a": entry(dtype="F1")}, bytes(8)),
    "a dtype that is no text": tensors_file({"a": entry(dtype=["F32"])}, bytes(8)),
    "negative sizes": tensors_file({"a": entry(shape=[-2], offsets=[8, 0])}, bytes(8)),
    "numbers that are true": tensors_file({"a": entry(shape=[True], offsets=[0, 4])}, bytes(4)),
    "floats": tensors_file({"a": entry(shape=[2.0])}, bytes(8)),
    "an endless integer": tensors_file(b'{"a": {"dtype": "F32", "shape": [1' + b"0" * 10**5 + b"]}}"),
    "overlapping": tensors_file({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)),
    "a gap": tensors_file({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)),
    "bytes left over": tensors_file({"a": entry()}, bytes(9)),
    "nine dimensions": tensors_file({"a": entry(shape=[1] * 8 + [2])}, bytes(8)),
    "missing offsets": tensors_file({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "an entry that is text": tensors_file({"a": "F32"}),
}


@pytest.mark.parametrize("name", HEADERS)
def test_I29_a_lying_header_is_refused_before_memory_is_taken(name):
    before, started = psutil.Process().memory_info().rss, time.monotonic()
    with pytest.raises(FileRefused) as error:
        read_safetensors(HEADERS[name])
    assert "\n" not in str(error.value)
    assert psutil.Process().memory_info().rss - before < 20 << 20 and time.monotonic() - started < 2


def test_too_many_tensors_are_refused(monkeypatch):
    monkeypatch.setattr(submitted_files, "MAX_TENSORS", 2)
    with pytest.raises(FileRefused, match="too many"):
        check_safetensors(save(WEIGHTS))


def test_json_has_limits():
    assert read_json(b'{"a": [1, 2.5, null, "x"]}') == {"a": [1, 2.5, None, "x"]}
    for text in (b"[" * 50 + b"]" * 50, b"[Infinity]", b"\xff", b"1" * 10**6, b"{", b'"\xed\xa0\x80"'):
        with pytest.raises(FileRefused):
            read_json(text)
    assert read_json_lines(b'{"a": 1}\n\n[2]\n') == [{"a": 1}, [2]]
    with pytest.raises(FileRefused, match="line 2 is no JSON"):
        read_json_lines(b"1\nx\n")
    with pytest.raises(FileRefused, match="line 1 has more than"):
        read_json_lines(b'"' + b"x" * (2 << 20) + b'"')
    with pytest.raises(FileRefused, match="more than 1000000 lines"):
        read_json_lines(b"\n" * 1_000_001)


class Evil:
    """Leaves a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


@pytest.fixture
def folder(tmp_path):
    """A hand-in with what is wanted, and with what may run code."""
    found = tmp_path / "files"
    (found / "adapter").mkdir(parents=True)
    (found / "adapter" / "model.safetensors").write_bytes(save(WEIGHTS))
    config = {
        "r": 8,
        "auto_map": {"AutoModel": "evil.Model"},
        "inner": [{"chat_template": "{% for x in y %}"}],
    }
    (found / "adapter" / "config.json").write_text(json.dumps(config))
    (found / "predictions.jsonl").write_text('{"id": 1, "answer": "7"}\n')
    for name in ("model.pt", "pytorch_model.bin", "x.pkl", ".OTTER_LOG", "array.npy"):
        (found / name).write_bytes(pickle.dumps(Evil(tmp_path / "owned")))
    (found / "modeling.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')")
    (found / "chat_template.jinja").write_text("{% for a in range(100000) %}{% endfor %}")
    (found / "link.json").symlink_to("/etc/passwd")
    os.mkfifo(found / "pipe.json")
    return found


def test_I28_only_plain_files_are_opened(folder, tmp_path):
    found = read_artifacts(folder)
    assert list(found.tensors) == ["adapter/model.safetensors"]
    assert found.data["adapter/config.json"] == {"r": 8, "inner": [{}]}
    assert found.data["predictions.jsonl"] == [{"id": 1, "answer": "7"}] and len(found.data) == 2
    reasons = dict(one.text.split(": ", 1) for one in found.findings if not one.text.startswith("adapter"))
    assert set(reasons) == {
        *("model.pt", "pytorch_model.bin", "x.pkl", ".OTTER_LOG", "array.npy"),
        *("modeling.py", "chat_template.jinja", "link.json", "pipe.json"),
    }
    assert "pickle" in reasons["model.pt"] and "is code" in reasons["modeling.py"]
    config = [one.text for one in found.findings if one.text.startswith("adapter")]
    assert config == [f"adapter/config.json: its {key} is not used" for key in ("auto_map", "chat_template")]
    assert not (tmp_path / "owned").exists()


def test_too_many_and_too_large_files(folder, monkeypatch):
    monkeypatch.setattr(submitted_files, "MAX_FILES", 3)
    monkeypatch.setattr(submitted_files, "MAX_TENSOR_FILE", 10)
    found = read_artifacts(folder)
    assert not found.tensors and any("more than 10" in one.text for one in found.findings)
    assert found.findings[-1].text == "9 files beyond the first 3"


@pytest.fixture
def evaluator(tmp_path):
    """An instructor's own evaluation: the share of held-out sums that the weight's mean answers."""
    path = tmp_path / "own.py"
    path.write_text(
        textwrap.dedent(
            """
            import time
            import torch
            from llmcourse.grading.file_evaluation import FileScore

            def evaluate(artifacts, seed):
                weights = artifacts.tensors["adapter/model.safetensors"]["a"]
                held_out = torch.randn(10, 3, generator=torch.Generator().manual_seed(seed))
                right = float(((held_out @ weights.T).argmax(1) == (held_out.sum(1) > 0).long()).float().mean())
                return FileScore(right, "measured on held-out data", f"seed {seed}")

            def slow(artifacts, seed):
                time.sleep(60)

            def quick(artifacts, seed):
                return FileScore(1.0, "")

            def large(artifacts, seed):
                return torch.ones(4 << 30)

            def dying(artifacts, seed):
                import os
                os._exit(3)

            def printing(artifacts, seed):
                import os
                print(3, flush=True)
                os._exit(0)

            def killed(artifacts, seed):
                import os, signal
                os.kill(os.getpid(), signal.SIGKILL)

            def generous(artifacts, seed):
                return FileScore(7.0, "")
            """
        )
    )
    return path


LIMITS = Limits(wall_seconds=30, memory_mb=512)


def test_the_evaluation_decides(folder, evaluator):
    found = evaluate_files(folder, Evaluation(f"{evaluator}:evaluate", 5), 3, LIMITS)
    assert found.ended == Verdict.GRADED and found.item.detail == "seed 3" and len(found.findings) == 11
    assert 0 < found.item.points <= 5 and (found.item.max_points, found.item.exercise) == (5, "files")
    again = evaluate_files(folder, Evaluation(f"{evaluator}:evaluate", 5), 3, LIMITS)
    assert again == found
    missing = evaluate_files(folder / "nowhere", Evaluation(f"{evaluator}:evaluate", 5), 3, LIMITS)
    assert (missing.item.points, missing.item.status, missing.ended) == (0, "not answered", Verdict.GRADED)


@pytest.mark.parametrize(
    ("function", "ended"),
    [
        ("slow", Verdict.TIMEOUT),
        ("dying", Verdict.CRASH),
        ("printing", Verdict.CRASH),
        ("killed", Verdict.INFRASTRUCTURE),
        ("generous", Verdict.REVIEW),
        ("large", Verdict.MEMORY),
    ],
)
def test_an_evaluation_that_fails_is_said_to_have_failed(folder, evaluator, function, ended):
    limits = Limits(wall_seconds=0.5 if function == "slow" else 30, memory_mb=512)
    found = evaluate_files(folder, Evaluation(f"{evaluator}:{function}", 5), 3, limits)
    assert (found.ended, found.item.points, found.item.status) == (ended, 0, "error")


def test_the_limit_does_not_count_the_loading_of_torch(folder, evaluator):
    found = evaluate_files(
        folder, Evaluation(f"{evaluator}:quick", 5), 3, Limits(wall_seconds=1, memory_mb=512)
    )
    assert (found.ended, found.item.points) == (Verdict.GRADED, 5)


@pytest.mark.parametrize(
    ("before", "ended", "after"),
    [
        (Verdict.GRADED, Verdict.GRADED, Verdict.GRADED),
        (Verdict.GRADED, Verdict.TIMEOUT, Verdict.PARTIAL),
        (Verdict.GRADED, Verdict.REVIEW, Verdict.REVIEW),
        (Verdict.PARTIAL, Verdict.REVIEW, Verdict.REVIEW),
        (Verdict.PARTIAL, Verdict.TIMEOUT, Verdict.PARTIAL),
        (Verdict.GRADED, Verdict.INFRASTRUCTURE, Verdict.INFRASTRUCTURE),
        (Verdict.MALFORMED, Verdict.REVIEW, Verdict.MALFORMED),
    ],
)
def test_what_the_files_come_to_changes_the_verdict(before, ended, after):
    grade = Grade("ada", "lab", before, 3, 4, note="before")
    item = Item("files", "Submitted files", 1, 2, "partly", "")
    changed = grade.with_item(item, ended, ())
    assert (changed.verdict, changed.points, changed.max_points) == (after, 4, 6)
    assert changed.note == ("before" if before == after else f"files: {ended}")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass A:\n    x: int\n",
            "",
        ),
        ("def evaluate(:", "SyntaxError"),
        ("import no_such_module", "no_such_module"),
    ],
)
def test_evaluators_in_files_of_their_own(tmp_path, source, message):
    path = tmp_path / "mine.py"
    path.write_text(source + ("\ndef evaluate(artifacts, seed): pass\n" if not message else ""))
    if not message:
        assert find_evaluator(f"{path}:evaluate").__name__ == "evaluate"
    else:
        with pytest.raises(ValueError, match=message) as error:
            find_evaluator(f"{path}:evaluate")
        assert "\n" not in str(error.value)


def test_a_file_that_the_evaluation_lacks_is_for_review(folder, evaluator):
    (folder / "adapter" / "model.safetensors").unlink()
    found = evaluate_files(folder, Evaluation(f"{evaluator}:evaluate", 5), 3, LIMITS)
    assert found.ended == Verdict.REVIEW and "KeyError" in found.item.detail


def test_unknown_evaluations_are_one_line(evaluator):
    for name in ("evaluate", "nowhere.module:f", f"{evaluator}:nothing", "/nowhere.py:f", "json:decoder"):
        with pytest.raises(ValueError, match="write module:function or file.py:function"):
            find_evaluator(name)
    assert find_evaluator("json:loads") is json.loads


def test_points_of_files_are_in_the_grade_and_the_table(tiny_release, folder, evaluator, tmp_path):
    hand_ins = write_hand_ins(tmp_path / "in", tiny_release.key, {"s001": tiny_release.solved()})
    key, report = write_key(tmp_path / "key", tiny_release.key), tmp_path / "report"
    folder.rename(hand_ins / "s001" / "07_hardware.files")
    evaluation = Evaluation(f"{evaluator}:evaluate", 5)
    grade_batch(hand_ins, key, report, evaluation=evaluation, workers=1, progress=False)
    _, (grade,) = read_grades(report)
    assert grade.max_points == 9 and 4 < grade.points <= 9 and grade.items[-1].exercise == "files"
    assert "hardware/cache_rows,files," in (report / "grades.csv").read_text().splitlines()[0]
    with pytest.raises(ValueError, match="leave out --scheduler"):
        grade_batch(hand_ins, key, report, evaluation=evaluation, scheduler="tcp://127.0.0.1:1")


def test_changed_files_and_evaluations_are_graded_again(tiny_release, folder, evaluator, tmp_path):
    one = Submission("s001", None, ("predictions.jsonl",), folder=folder)
    keys = [
        record_key(one, tiny_release.key),
        record_key(one, tiny_release.key, Evaluation(f"{evaluator}:slow", 5)),
    ]
    (folder / "predictions.jsonl").write_text("{}")
    keys.append(record_key(one, tiny_release.key, Evaluation(f"{evaluator}:slow", 5)))
    evaluator.write_text(evaluator.read_text() + "# changed\n")
    keys.append(record_key(one, tiny_release.key, Evaluation(f"{evaluator}:slow", 5)))
    assert len(set(keys)) == 4
