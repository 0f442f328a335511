"""The command line: help without torch, every setting a flag, a whole run, and one line for every bad input."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmcourse import cli, pipeline
from llmcourse.models.config import ModelConfig
from llmcourse.models.pretrained import from_pretrained, save_pretrained
from llmcourse.models.transformer import Transformer
from llmcourse.tokenization.tokenizer import Tokenizer
from llmcourse.training import pretraining
from llmcourse.training.fit import FitSettings
from llmcourse.training.pretraining import PretrainSettings
from tests.commands import Output, runner

TINY = (
    "--context-length 64 --d-model 16 --n-layers 1 --n-heads 2 --n-kv-heads 1 --d-ff 24 --batch-size 2 "
    "--warmup-steps 1 --compile off --precision fp32 --vocab-size 300"
).split()


@pytest.fixture
def command(capsys, monkeypatch, tmp_path_factory):
    """Run `llmcourse ARGUMENTS` in this process, as the program does, with a cache of its own."""
    monkeypatch.setenv("LLMCOURSE_HOME", str(tmp_path_factory.getbasetemp() / "cli-home"))
    return runner(capsys, monkeypatch)


def assert_refused(output: Output, *words: str) -> None:
    """Exit code 2 and one line that begins with the program's name."""
    assert output.code == 2
    lines = [line for line in output.err.splitlines() if line.startswith("llmcourse: ")]
    assert len(lines) == 1 and "Traceback" not in output.err
    assert output.err.rstrip().endswith(lines[0])
    assert all(word in lines[0] for word in words), lines[0]


@pytest.fixture(scope="module")
def town(tmp_path_factory) -> Path:
    """A folder of text files, small enough to train on in a moment."""
    folder = tmp_path_factory.mktemp("notes")
    for i in range(12):
        (folder / f"note{i}.txt").write_text(f"Note {i}. " + "The barn is by the old park. " * (9 + i))
    return folder


@pytest.fixture(scope="module")
def trained(town, tmp_path_factory) -> Path:
    """A model from `llmcourse pretrain`, in a process of its own."""
    out = tmp_path_factory.mktemp("runs") / "model"
    call = ["pretrain", "--corpus", f"files:{town}", "--out", str(out), "--steps", "3", *TINY]
    home = tmp_path_factory.getbasetemp() / "cli-home"
    environment = os.environ | {"LLMCOURSE_HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-m", "llmcourse.cli", *call], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert f"model: {out}" in done.stdout and "validation_bits_per_byte" in done.stdout
    return out


# Help


def test_help_imports_no_torch():
    code = (
        "import sys; sys.argv = ['llmcourse', '--help']\n"
        "from llmcourse.cli import main\n"
        "try:\n    main()\nexcept SystemExit as ended:\n    assert not ended.code\n"
        "heavy = {'torch', 'numpy', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("doctor", "build", "pretrain", "generate", "artifacts"):
        assert re.search(rf"^\s+{name}\b", done.stdout, re.MULTILINE)


def test_pretrain_help_lists_every_setting_with_its_text(command):
    output = command("pretrain", "--help")
    assert output.code == 0
    for owner in (PretrainSettings, ModelConfig, FitSettings):
        documented = cli._field_docs(owner)
        for field in dataclasses.fields(owner):
            if field.name not in ("model", "fit"):
                assert f"--{field.name.replace('_', '-')} " in output.out, field.name
                assert documented[field.name].split()[0] in output.out
    assert "--no-tie-embeddings" in output.out and "--out" in output.out and "--device" in output.out


def test_flags_reach_the_settings(command, monkeypatch, tmp_path):
    seen = {}

    def run(out, preset, device, changes):
        seen["settings"] = pretraining.preset(preset, **changes)
        seen.update(out=out, device=device)

    monkeypatch.setattr(cli, "run_pretraining", run)
    flags = (
        "--steps 7 --lr 0.5 --betas 0.5 0.75 --no-tie-embeddings --qk-norm --schedule linear --n-documents 9"
    )
    output = command(
        "pretrain", "--preset", "gpu", "--out", tmp_path / "x", "--device", "cpu", *flags.split()
    )
    assert output.code == 0, output.err
    settings, preset = seen["settings"], pretraining.preset("gpu")
    assert (settings.fit.steps, settings.fit.lr, settings.fit.betas) == (7, 0.5, (0.5, 0.75))
    assert (settings.model.tie_embeddings, settings.model.qk_norm) == (False, True)
    assert (settings.fit.schedule, settings.n_documents) == ("linear", 9)
    assert (
        settings.model.d_model == preset.model.d_model and settings.fit.micro_steps == preset.fit.micro_steps
    )
    assert (seen["out"], seen["device"]) == (tmp_path / "x", "cpu")


# A run


def test_pretrain_leaves_a_whole_model(trained):
    names = {path.name for path in trained.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "metrics.json",
        "records.json",
        "checkpoints",
    } <= names
    assert not [name for name in names if name.startswith(".")]
    metrics = json.loads((trained / "metrics.json").read_text())
    assert (
        metrics["floor"] is None
        and metrics["validation_bits_per_byte"] > 0
        and metrics["tokens"] == 3 * 2 * 64
    )
    assert len(json.loads((trained / "records.json").read_text())["records"]) == 3
    assert from_pretrained(trained).config.vocab_size == Tokenizer.load(trained).vocab_size


def test_the_same_command_with_more_steps_goes_on(command, town, trained, tmp_path):
    out = tmp_path / "longer"
    shutil.copytree(trained, out)
    output = command("pretrain", "--corpus", f"files:{town}", "--out", out, "--steps", 5, *TINY)
    assert output.code == 0, output.err
    assert re.search(r"^resumed_from +3$", output.out, re.MULTILINE)
    assert len(json.loads((out / "records.json").read_text())["records"]) == 5
    fewer = command("pretrain", "--corpus", f"files:{town}", "--out", out, "--steps", 4, *TINY)
    assert_refused(fewer, "is at step 5, beyond steps=4")


def test_generate_continues_prompts(command, trained):
    call = ("generate", "--model", trained, "--temperature", 0, "--max-new-tokens", 5, "The barn", "Note")
    first, second = command(*call), command(*call)
    assert first.code == 0 and first.out == second.out
    assert first.out.startswith("The barn") and "\nNote" in first.out
    seeded = [command("generate", "--model", trained, "--seed", seed, "The").out for seed in (1, 1, 2)]
    assert seeded[0] == seeded[1] != seeded[2]


def test_generate_takes_a_hub_name(command, trained, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(trained))
    output = command("generate", "--model", "org/model", "--temperature", 0, "The barn")
    assert output.code == 0 and output.out.startswith("The barn")


def test_generate_stops_at_a_text(command, trained):
    call = ("generate", "--model", trained, "--temperature", 0, "--max-new-tokens", 20, "The barn")
    new = command(*call).out.removeprefix("The barn").rstrip("\n")
    assert len(new) > 3
    cut = command(*call, "--stop", new[2:4]).out.rstrip("\n")
    assert cut == ("The barn" + new[: new.index(new[2:4])]).rstrip("\n")


def test_build_makes_a_stage_and_artifacts_lists_it(command, monkeypatch, trained):
    # the real preset takes minutes; what `build` adds to `pipeline.load` is what is printed
    asked = []

    def load(stage, **options):
        asked.append((stage, options))
        artifact = type(
            "Artifact", (), {"path": trained, "metrics": {"validation_loss": 1.5, "corpus": "tinytown"}}
        )
        return pipeline.Loaded(None, None, artifact)

    monkeypatch.setattr(pipeline, "load", load)
    output = command("build", "base", "--preset", "gpu", "--seed", 3)
    assert output.code == 0
    assert asked == [("base", {"preset": "gpu", "corpus": "tinytown", "seed": 3, "model": ""})]
    assert (
        re.search(r"^validation_loss +1\.5$", output.out, re.MULTILINE) and f"base: {trained}" in output.out
    )
    listed = command("artifacts")
    assert listed.code == 0 and {line.split()[0] for line in listed.out.splitlines()} >= {
        "corpus",
        "tokenizer",
        "tokens",
    }


# Bad input


def pretrain_of(town: Path, out: Path, *more: object) -> tuple[object, ...]:
    return ("pretrain", "--corpus", f"files:{town}", "--out", out, "--steps", 2, *TINY, *more)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("build bass", "stage='bass'"),
        ("build base --preset tpu", "preset='tpu'"),
        ("build base --corpus tinytwon", "unknown corpus 'tinytwon'"),
        ("pretrain --preset tpu", "preset='tpu'"),
        ("pretrain --corpus tinytwon", "unknown corpus"),
        ("pretrain --corpus files:/nowhere/*.md", "matches no file"),
        ("pretrain --steps 0", "steps=0"),
        ("pretrain --device gpu", "device 'gpu'"),
        ("pretrain --n-heads 3", "n_heads=3"),
        ("pretrain --betas 0.9 1.5", "betas=(0.9, 1.5)"),
        ("generate --top-p 2 Once", "top_p=2.0"),
        ("generate --model /nowhere Once", "no such folder"),
    ],
)
def test_bad_values_are_one_line(command, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert_refused(command(*arguments.split()), words)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_an_empty_corpus_is_one_line(command, tmp_path):
    (tmp_path / "blank.txt").write_text("\n")
    assert_refused(command(*pretrain_of(tmp_path / "blank.txt", tmp_path / "out")), "holds no text")
    assert not list((tmp_path / "out").rglob("*"))


def test_a_document_longer_than_the_context_is_split(command, tmp_path):
    for i in range(3):
        (tmp_path / f"long{i}.txt").write_text(f"Part {i}. " + "One word and another. " * 300)
    output = command(*pretrain_of(tmp_path, tmp_path / "out"))
    assert output.code == 0, output.err
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["validation_tokens"] > 64  # one document, evaluated whole, in pieces of the context


def test_a_tokenizer_of_another_model_is_one_line(command, trained, tmp_path):
    save_pretrained(Transformer(ModelConfig(vocab_size=270, d_model=16, n_layers=1, d_ff=8)), tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(trained / name, tmp_path)
    size = Tokenizer.load(trained).vocab_size
    assert_refused(
        command("generate", "--model", tmp_path, "Once"), "vocab_size 270", f"the tokenizer {size}"
    )


def test_a_model_folder_without_a_tokenizer_is_one_line(command, tmp_path):
    save_pretrained(Transformer(ModelConfig(vocab_size=270, d_model=16, n_layers=1, d_ff=8)), tmp_path)
    assert_refused(command("generate", "--model", tmp_path, "Once"), "lacks tokenizer.json")


def test_a_full_disk_is_one_line_and_leaves_nothing(command, town, tmp_path, monkeypatch):
    command(*pretrain_of(town, tmp_path / "warm"))  # the corpus and its tokens are in the cache
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000})())
    output = command(*pretrain_of(town, tmp_path / "out"))
    assert_refused(output, "needs", "MiB are free")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_wrong_folders_for_the_result_are_one_line(command, town, trained, tmp_path):
    (tmp_path / "file").write_text("text")
    assert_refused(command(*pretrain_of(town, tmp_path / "file")), "is a file: give a folder")
    (tmp_path / "other" / "checkpoints").mkdir(parents=True)
    (tmp_path / "other" / "checkpoints" / "diary.txt").write_text("mine")
    assert_refused(command(*pretrain_of(town, tmp_path / "other")), "diary.txt", "give another folder")
    assert [path.name for path in (tmp_path / "other").rglob("*") if path.is_file()] == ["diary.txt"]
    shutil.copytree(trained, tmp_path / "narrow")
    output = command(*pretrain_of(town, tmp_path / "narrow", "--steps", 9, "--d-model", 32))
    assert_refused(output, "in the checkpoint", "in this model")
    before, after = (from_pretrained(folder).embedding.weight for folder in (trained, tmp_path / "narrow"))
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    "arguments",
    ["pretrain --corpus hub:org/data --out out", "generate --model org/model Once"],
    ids=["corpus", "model"],
)
def test_no_network_is_one_line(arguments, tmp_path):
    # port 9 of this machine answers nobody; proxies of the environment must not help
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")}
    environment |= {"LLMCOURSE_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-m", "llmcourse.cli", *arguments.split()],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=120,
    )
    assert_refused(Output(done.returncode, done.stdout, done.stderr), "org/", "the Hub")
    assert not list((tmp_path / "out").rglob("*")) and not list((tmp_path / "home").glob("[!.]*"))


def test_an_interrupted_run_says_how_to_go_on(command, town, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(pretraining, "pretrain", interrupt)
    output = command(*pretrain_of(town, tmp_path / "out"))
    assert output.code == 130 and "the same command goes on" in output.err


def test_a_diverged_run_is_one_line(command, town, tmp_path):
    output = command(*pretrain_of(town, tmp_path / "out", "--lr", "1e30", "--warmup-steps", 0, "--steps", 8))
    assert_refused(output, "step ", "Lower lr")


# A real corpus


@pytest.mark.slow
def test_documentation_of_this_machine_is_a_corpus(command, tmp_path):
    flags = "--corpus python-docs --n-documents 1500 --vocab-size 512 --steps 60 --batch-size 4 --compile off"
    shape = "--context-length 128 --d-model 64 --n-layers 2 --d-ff 128 --warmup-steps 5"
    output = command("pretrain", "--out", tmp_path, *flags.split(), *shape.split())
    assert output.code == 0, output.err
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["floor"] is None
    assert 1 < metrics["validation_bits_per_byte"] < 6  # letters alone hold between 4 and 5, a byte 8
    first = json.loads((tmp_path / "records.json").read_text())["records"][0]["loss"]
    assert metrics["validation_loss"] < 0.9 * first
    text = pipeline.corpus("python-docs", 1500).validation["text"]
    assert 1 < pipeline.compression_baseline(text) < 6
