"""The stage graph at a tiny size: one training per address, complete metrics, files as a corpus, refusals."""

from __future__ import annotations

import errno
import functools
import json
import lzma
import math
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmcourse import artifacts, pipeline
from llmcourse.accounting import count_parameters
from llmcourse.evaluation.generation import town_report
from llmcourse.evaluation.instruction_following import instruction_report
from llmcourse.training import pretraining
from tests.outside_models import write_smollm2

TINY = {
    "n_documents": 250,
    "vocab_size": 300,
    "context_length": 64,
    "d_model": 16,
    "n_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 1,
    "d_ff": 24,
    "batch_size": 2,
    "steps": 4,
    "warmup_steps": 1,
    "eval_every": 2,
    "compile": "off",
    "precision": "fp32",
}
PROBES = {"facts": 4, "facts_reworded": 4, "sums": 4, "sums_plain": 2, "sums_worked": 2, "story_facts": 4}
STORIES = {"stories_grammatical", "stories_consistent", "story_sentences_right"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory):
    """A cache for the tests of this file; few probes, since an untrained model's are not worth more."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("home")
        patch.setenv("LLMCOURSE_HOME", str(folder))
        patch.setattr(pipeline, "town_report", functools.partial(town_report, n=4))
        yield folder


@pytest.fixture(scope="module")
def base(home: Path) -> pipeline.Loaded:
    return pipeline.load("base", **TINY)


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Seeds of the trainings that took place."""
    seeds, pretrain = [], pretraining.pretrain

    def watched(settings, *args, **kwargs):
        seeds.append(settings.seed)
        return pretrain(settings, *args, **kwargs)

    monkeypatch.setattr(pretraining, "pretrain", watched)
    return seeds


def test_a_second_call_trains_nothing(base, trainings):
    again = pipeline.load("base", **TINY)
    assert trainings == [] and again.artifact.path == base.artifact.path
    for one, other in zip(base.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert again.tokenizer.fingerprint == base.tokenizer.fingerprint


def test_another_seed_or_setting_trains_anew_from_the_same_corpus(base, home, trainings):
    other = pipeline.load("base", **TINY, seed=1)
    assert trainings == [1] and other.artifact.key != base.artifact.key
    assert not torch.equal(other.model.embedding.weight, base.model.embedding.weight)
    assert other.artifact.inputs == base.artifact.inputs
    changed = pipeline.load("base", **(TINY | {"steps": 2}))
    assert trainings == [1, 0] and changed.artifact.inputs == base.artifact.inputs
    assert len(list(home.glob("corpus-*"))) == len(list(home.glob("tokens-*"))) == 1


def test_a_damaged_model_is_trained_anew(home, trainings):
    weights = pipeline.load("base", **TINY, seed=3).artifact.path / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    with pytest.warns(UserWarning, match="is damaged and is made anew"):
        pipeline.load("base", **TINY, seed=3)
    assert trainings == [3, 3] and weights.read_bytes() == content  # the same model to the last bit


def test_metrics_are_complete_and_right(base):
    metrics = base.artifact.metrics
    assert metrics["corpus"] == "tinytown"
    assert metrics["parameters"] == count_parameters(base.model.config)
    assert metrics["tokens"] == 4 * 2 * 64
    assert metrics["floor"] > 0
    assert metrics["loss_over_floor"] == pytest.approx(metrics["validation_loss"] / metrics["floor"])
    assert 0.5 * math.log(300) < metrics["validation_loss"] < 4 * math.log(300)
    assert set(metrics["probes"]) == set(PROBES) | STORIES
    assert {name: metrics["probes"][name]["n"] for name in PROBES} == PROBES
    for name in (
        "training_seconds",
        "tokens_per_second",
        "mfu",
        "peak_flops",
        "peak_bytes",
        "validation_error",
    ):
        assert metrics[name] > 0, name
    assert json.loads((base.artifact.path / "metrics.json").read_text()) == metrics


def test_bits_per_byte_by_another_way(base):
    source = pipeline.corpus("tinytown", TINY["n_documents"])
    text = source.validation["text"]
    nats = 0.0
    for document in text:  # one by one, without batches or padding; 64 tokens at a time where one is longer
        ids = [0, *base.tokenizer.encode(document), 0]
        for start in range(0, len(ids) - 1, 64):
            piece = torch.tensor(ids[start : start + 65])
            with torch.no_grad():
                nats -= float(
                    base.model(piece[None, :-1])[0].log_softmax(-1)[range(len(piece) - 1), piece[1:]].sum()
                )
    bits_per_byte = nats / math.log(2) / sum(len(document.encode()) for document in text)
    # rows hold several documents there, and a document sees those before it: slightly other numbers
    assert base.artifact.metrics["validation_bits_per_byte"] == pytest.approx(bits_per_byte, rel=0.05)


def test_the_floor_is_the_information_of_the_validation_text(base):
    source = pipeline.corpus("tinytown", TINY["n_documents"])
    assert source.town is not None and base.town is not None
    bits = sum(base.town.parse(text).bits for text in source.validation["text"])
    n_tokens = sum(len(base.tokenizer.encode(text)) + 1 for text in source.validation["text"])
    assert base.artifact.metrics["floor"] == pytest.approx(bits * math.log(2) / n_tokens)
    assert base.artifact.metrics["validation_tokens"] == n_tokens


def test_history_holds_every_step_and_samples(base):
    history = base.history
    assert [record["step"] for record in history["records"]] == [0, 1, 2, 3]
    assert [evaluation["step"] for evaluation in history["evaluations"]] == [2, 4]
    assert [sample["step"] for sample in history["samples"]] == [2, 4]
    prompts = pipeline.SAMPLE_PROMPTS["tinytown"]
    for sample in history["samples"]:
        assert all(text.startswith(prompt) for text, prompt in zip(sample["texts"], prompts, strict=True))


def test_the_folder_opens_in_transformers(base):
    theirs = AutoModelForCausalLM.from_pretrained(base.artifact.path).eval()
    codec = AutoTokenizer.from_pretrained(base.artifact.path)
    ids = codec("Anna and Tom", return_tensors="pt").input_ids
    assert ids[0].tolist() == base.tokenizer.encode("Anna and Tom")
    with torch.no_grad():
        assert (theirs(ids).logits - base.model(ids)).abs().max() < 1e-5


def test_lineage_names_every_stage(base, home):
    stages = [record["stage"] for record in artifacts.lineage(base.artifact)]
    assert sorted(stages) == ["base", "corpus", "tokenizer", "tokens"] and stages[-1] == "base"
    assert base.artifact.manifest["settings"]["model"]["d_model"] == 16
    assert not list(home.glob("*.partial"))  # no work folder is left


def test_a_killed_training_goes_on(home, monkeypatch, trainings):
    save = pipeline.save_pretrained

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "save_pretrained", stop)
    with pytest.raises(KeyboardInterrupt):
        pipeline.load("base", **TINY, seed=2)
    assert len(list(home.glob("*.partial"))) == 1
    monkeypatch.setattr(pipeline, "save_pretrained", save)
    loaded = pipeline.load("base", **TINY, seed=2)
    assert trainings == [2, 2] and loaded.artifact.metrics["resumed_from"] == 4
    assert not list(home.glob("*.partial"))


# The assistant, and models from outside

SFT_TINY = {"steps": 4, "batch_size": 2}


@pytest.fixture
def few_probes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pipeline, "instruction_report", functools.partial(instruction_report, n=2))


def test_the_assistant_comes_from_the_base_and_is_made_once(base, home, few_probes, trainings):
    assistant = pipeline.load("sft", upstream=TINY, **SFT_TINY)
    again = pipeline.load("sft", upstream=TINY, **SFT_TINY)
    assert trainings == [] and again.artifact.path == assistant.artifact.path
    assert assistant.artifact.inputs == {"base": base.artifact.key} and assistant.town is not None
    assert assistant.artifact.metrics["conversations"] <= 4 * 2
    assert set(assistant.artifact.metrics["probes"]) == {"facts", "reading", "sums", "constraints"}
    assert not torch.equal(assistant.model.embedding.weight, base.model.embedding.weight)
    other = pipeline.load("sft", upstream=TINY, **(SFT_TINY | {"steps": 3}))
    assert other.artifact.key != assistant.artifact.key
    assert len(other.history["records"]) == 3


def test_a_model_from_outside_takes_the_place_of_the_base(home, tmp_path, few_probes, capsys):
    folder = write_smollm2(tmp_path / "smollm2")
    opened = pipeline.load("base", model=str(folder))
    assert opened.artifact is None and opened.town is None
    assert "does not mark what the assistant writes" in capsys.readouterr().out
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([opened.tokenizer.encode("Anna and Tom")])
    with torch.no_grad():
        assert (theirs(ids).logits - opened.model(ids)).abs().max() < 1e-5
    assistant = pipeline.load("sft", model=str(folder), **SFT_TINY)
    assert assistant.artifact.inputs == {} and assistant.town is None
    assert assistant.tokenizer.chat_template == opened.tokenizer.chat_template
    with torch.no_grad():
        theirs.model.norm.weight.mul_(2)
    theirs.save_pretrained(folder)  # another model in the same folder is another address
    assert pipeline.load("sft", model=str(folder), **SFT_TINY).artifact.key != assistant.artifact.key


def test_models_from_outside_that_cannot_serve_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        pipeline.load("base", model=str(tmp_path / "missing"))
    folder = write_smollm2(tmp_path / "short", padding=-8)
    with pytest.raises(ValueError, match=r"the tokenizer has \d+ ids, the model \d+: use its own"):
        pipeline.load("base", model=str(folder))


# Other corpora


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    for i in range(12):
        (tmp_path / f"note{i}.txt").write_text(f"Note {i}. " + "The barn is by the park. " * (3 + i))
    return tmp_path


def test_files_are_a_corpus_and_long_documents_are_split(home, notes):
    (notes / "long.txt").write_text("A word, and a word, and one more. " * 400)
    loaded = pipeline.load("base", corpus=f"files:{notes}", **(TINY | {"n_documents": None}))
    metrics = loaded.artifact.metrics
    assert metrics["floor"] is None and metrics["loss_over_floor"] is None and "probes" not in metrics
    assert metrics["validation_bits_per_byte"] > 0 and loaded.town is None
    train, _, _ = pipeline.tokens(
        source := pipeline.corpus(f"files:{notes}"), *pipeline.tokenizer(source, TINY["vocab_size"])
    )
    assert train.n_longer_than(64) >= 1  # trained on all the same: no document is dropped
    assert len(source.train) + len(source.validation) == 13


def test_changed_files_are_another_corpus(home, notes):
    one = pipeline.corpus(f"files:{notes}")
    assert pipeline.corpus(f"files:{notes}").artifact.path == one.artifact.path
    (notes / "note0.txt").write_text("Something else.")
    assert pipeline.corpus(f"files:{notes}").artifact.path != one.artifact.path


def test_the_compression_baseline_is_that_of_xz():
    text = ["The barn is by the park. " * 50, "é" * 7]
    data = "\n\n".join(text).encode()
    found = pipeline.compression_baseline(text)
    assert found == pytest.approx(8 * len(lzma.compress(data, preset=9)) / len(data)) and found < 1
    rng = np.random.default_rng(0)
    noise = "".join(map(chr, rng.integers(32, 96, 20_000)))
    assert 6 <= pipeline.compression_baseline([noise]) < 6.7  # 64 letters at random hold 6 bits each


# Refusals


def assert_refused(message: str, kind: type[Exception] = ValueError, **changes: object) -> None:
    with pytest.raises(kind) as error:
        pipeline.load(**({"stage": "base"} | TINY | changes))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage": "bass"}, "stage='bass': choose one of base"),
        ({"preset": "tpu"}, "preset='tpu': choose one of cpu, gpu"),
        ({"corpus": "tinytwon"}, "unknown corpus 'tinytwon': choose one of tinytown"),
        ({"corpus": "files:/nowhere/*.txt"}, "matches no file"),
        ({"n_stairs": 2}, "unknown setting 'n_stairs'"),
        ({"vocab_size": 100}, "vocab_size 100"),
        ({"n_documents": 1}, "n_documents=1"),
    ],
    ids=str,
)
def test_bad_requests_are_refused_and_leave_nothing(tmp_path, monkeypatch, change, message):
    monkeypatch.setenv("LLMCOURSE_HOME", str(tmp_path))
    assert_refused(message, **change)
    assert not [path for path in tmp_path.iterdir() if path.is_dir() and not path.name.startswith("corpus-")]


def test_an_empty_corpus_is_refused(home, tmp_path):
    (tmp_path / "blank.txt").write_text(" \n")
    assert_refused("holds no text", corpus=f"files:{tmp_path}")
    (tmp_path / "one.txt").write_text("Only one document.")
    assert_refused("has 1 distinct documents", corpus=f"files:{tmp_path}")


def test_a_corpus_shorter_than_one_window_is_refused(home, tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"Short {i}.")
    with pytest.warns(UserWarning, match="fills only"):
        assert_refused("one window needs 65", corpus=f"files:{tmp_path}", n_documents=None)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMCOURSE_HOME", str(tmp_path))

    def full(self, path, **options):
        Path(path).mkdir(parents=True)
        (Path(path) / "half.arrow").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(datasets.Dataset, "save_to_disk", full)
    assert_refused("no space left in", OSError)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_full_disk_at_a_checkpoint_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMCOURSE_HOME", str(tmp_path))
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000})())
    assert_refused("no space left in", OSError)
    assert not list(tmp_path.glob("base-????????????????")) and not list(tmp_path.rglob("step_*"))
