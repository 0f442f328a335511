"""The stage graph: corpus -> tokenizer -> tokens -> base. Every result is an artifact, made when first asked for.

`load("base")` gives the pre-trained model of the course; stages of later chapters take it as their input.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import lzma
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

from llmcourse import runtime
from llmcourse.accounting import count_parameters
from llmcourse.artifacts import Artifact, build
from llmcourse.data import sources
from llmcourse.data.tinytown import Town
from llmcourse.data.token_stream import TokenStream, tokenize
from llmcourse.evaluation.generation import town_report
from llmcourse.inference.generation import complete
from llmcourse.models.pretrained import from_pretrained, save_pretrained
from llmcourse.models.transformer import Transformer
from llmcourse.tokenization.tokenizer import Tokenizer
from llmcourse.training import pretraining
from llmcourse.training.fit import FitResult
from llmcourse.training.pretraining import PretrainSettings

TOWN_SEED = 0
TOKENIZER_DOCUMENTS = 20_000
SAMPLE_PROMPTS = {"tinytown": ("Anna and Tom lived near", "Lost:", "37 + 48"), "text": ("Return", "The")}


@dataclass(frozen=True)
class Corpus:
    """A corpus artifact, opened."""

    artifact: Artifact
    train: datasets.Dataset
    validation: datasets.Dataset

    @property
    def town(self) -> Town | None:
        """Who wrote it; `None` for real text."""
        return Town(TOWN_SEED) if self.artifact.manifest["settings"]["corpus"] == "tinytown" else None


@dataclass(frozen=True)
class Loaded:
    """A trained stage: model, tokenizer, and the artifact they come from, whose metrics hold the measurements."""

    model: Transformer
    tokenizer: Tokenizer
    artifact: Artifact

    @property
    def town(self) -> Town | None:
        """The town of its corpus; `None` for real text."""
        return Town(TOWN_SEED) if self.artifact.metrics["corpus"] == "tinytown" else None

    @functools.cached_property
    def history(self) -> dict[str, list[dict[str, Any]]]:
        """The run's "records" (one per step), "evaluations", and "samples" written along the way."""
        return json.loads((self.artifact.path / "records.json").read_text(encoding="utf-8"))


def corpus(name: str = "tinytown", n_documents: int | None = None) -> Corpus:
    """The corpus as data sets on disk. Real text is addressed by its content, so changed files give a new artifact."""
    settings: dict[str, Any] = {"corpus": name, "n_documents": n_documents, "seed": TOWN_SEED}
    read = None
    if name != "tinytown":
        read = sources.load_corpus(name, n_documents=n_documents)
        settings["content"] = _fingerprint(read)

    def make(path: Path) -> dict[str, Any]:
        made = read or sources.load_corpus(name, seed=TOWN_SEED, n_documents=n_documents)
        made.train.save_to_disk(path / "train")
        made.validation.save_to_disk(path / "validation")
        return {"train_documents": len(made.train), "validation_documents": len(made.validation)}

    artifact = build("corpus", settings=settings, make=make, code=(sources,))
    parts = [datasets.load_from_disk(artifact.path / part) for part in ("train", "validation")]
    return Corpus(artifact, *parts)


def tokenizer(source: Corpus, vocab_size: int) -> tuple[Tokenizer, Artifact]:
    """A byte-pair encoding trained on the first documents of the corpus."""

    def make(path: Path) -> dict[str, Any]:
        some = source.train.select(range(min(TOKENIZER_DOCUMENTS, len(source.train))))
        trained = Tokenizer.train(some["text"], vocab_size)
        trained.save(path)
        return {"vocab_size": trained.vocab_size}

    artifact = build(
        "tokenizer",
        settings={"vocab_size": vocab_size},
        inputs={"corpus": source.artifact},
        make=make,
        code=("llmcourse.tokenization.tokenizer",),
    )
    return Tokenizer.load(artifact.path), artifact


def tokens(
    source: Corpus, codec: Tokenizer, codec_artifact: Artifact
) -> tuple[TokenStream, TokenStream, Artifact]:
    """Training and validation text as token streams, memory-mapped."""

    def make(path: Path) -> dict[str, Any]:
        counts = {}
        for part in ("train", "validation"):
            stream = tokenize(getattr(source, part), codec)
            stream.save(path / part)
            counts[f"{part}_tokens"] = len(stream)
        return counts

    artifact = build(
        "tokens",
        settings={},
        inputs={"corpus": source.artifact, "tokenizer": codec_artifact},
        make=make,
        code=("llmcourse.data.token_stream",),
    )
    return TokenStream.load(artifact.path / "train"), TokenStream.load(artifact.path / "validation"), artifact


def floor_nats_per_token(source: Corpus, validation: TokenStream) -> float | None:
    """Information content of the validation documents per token, in nats; `None` for real text."""
    if "bits" not in source.validation.column_names:
        return None
    return float(np.sum(source.validation["bits"]) * np.log(2) / len(validation))


def base(settings: PretrainSettings) -> Loaded:
    """The pre-trained model of these settings: from the cache, resumed where a run was killed, or trained now."""
    source = corpus(settings.corpus, settings.n_documents)
    codec, codec_artifact = tokenizer(source, settings.vocab_size)
    train, valid, tokens_artifact = tokens(source, codec, codec_artifact)

    def make(path: Path, work: Path) -> dict[str, Any]:
        return _train_base(settings, source, codec, train, valid, path, work)

    artifact = build(
        "base",
        settings=dataclasses.asdict(settings),
        inputs={"tokens": tokens_artifact, "tokenizer": codec_artifact},
        make=make,
        code=(pretraining, "llmcourse.evaluation.generation"),
        resumable=True,
    )
    return Loaded(from_pretrained(artifact.path), Tokenizer.load(artifact.path), artifact)


STAGES: dict[str, Callable[[PretrainSettings], Loaded]] = {"base": base}


def load(stage: str, preset: str = "cpu", corpus: str = "tinytown", seed: int = 0, **changes: Any) -> Loaded:
    """Model and tokenizer of a stage, trained first (upstream stages too) when they are not in the cache.

    `changes` replace settings of the preset by name, e.g. `steps=200`.

    Raises:
        ValueError: unknown stage, preset, corpus or setting.
    """
    if stage not in STAGES:
        raise ValueError(f"stage={stage!r}: choose one of {', '.join(STAGES)}")
    return STAGES[stage](pretraining.preset(preset, corpus=corpus, seed=seed, **changes))


def _fingerprint(read: sources.Corpus) -> str:
    digest = hashlib.sha256()
    for part in (read.train, read.validation):
        for text in part["text"]:
            digest.update(text.encode() + b"\0")
    return digest.hexdigest()


def _train_base(
    settings: PretrainSettings,
    source: Corpus,
    codec: Tokenizer,
    train: TokenStream,
    valid: TokenStream,
    path: Path,
    work: Path,
) -> dict[str, Any]:
    town = source.town
    prompts = SAMPLE_PROMPTS["tinytown" if town else "text"]
    samples: list[dict[str, Any]] = []

    def sample(step: int, model: Transformer) -> None:
        every = settings.fit.eval_every
        if every and (step + 1) % every == 0:
            model.eval()
            texts = complete(model, codec, prompts, temperature=0.7, max_new_tokens=64, seed=settings.seed)
            model.train()
            samples.append({"step": step + 1, "texts": [p + t for p, t in zip(prompts, texts, strict=True)]})

    model, result = pretraining.pretrain(
        settings,
        train,
        valid,
        checkpoint_folder=work,
        on_step=sample,
        description="pre-training the base model",
    )
    model.eval()
    save_pretrained(model, path, codec)
    metrics = summarize(settings, source, valid, model, result)
    if town is not None:
        metrics["probes"] = town_report(model, codec, town, seed=settings.seed)
    write_records(path, result, metrics, samples)
    return metrics


def summarize(
    settings: PretrainSettings, source: Corpus, validation: TokenStream, model: Transformer, result: FitResult
) -> dict[str, Any]:
    """What a run came to, as plain data: losses in nats per token, floor, bits per byte, throughput, memory."""
    last = result.evaluations[-1]
    floor = floor_nats_per_token(source, validation)
    steady = result.records[len(result.records) // 10 :]  # the first steps compile and warm up
    text_bytes = sum(len(text.encode()) for text in source.validation["text"])
    device = next(model.parameters()).device
    dtype = runtime.precision_dtype(settings.fit.precision, device) or torch.float32
    return {
        "corpus": settings.corpus,
        "parameters": count_parameters(model.config),
        "tokens": sum(record["units"] for record in result.records),
        "train_loss": result.last_loss,
        "validation_loss": last["validation_loss"],
        "validation_error": last["validation_error"],
        "validation_tokens": len(validation),
        "validation_bits_per_byte": float(last["validation_loss"] * len(validation) / np.log(2) / text_bytes),
        "floor": floor,
        "loss_over_floor": None if floor is None else last["validation_loss"] / floor,
        "training_seconds": result.seconds,
        "tokens_per_second": statistics.median(record["units_per_second"] for record in steady),
        "mfu": statistics.median(record["mfu"] for record in steady),
        "peak_flops": runtime.peak_flops(device, dtype),
        "peak_bytes": result.peak_bytes,
        "resumed_from": result.resumed_from,
    }


def write_records(
    folder: Path, result: FitResult, metrics: dict[str, Any], samples: list[dict[str, Any]] | None = None
) -> None:
    """Write records.json (every step, every evaluation, samples) and metrics.json into a model's folder."""
    stored = {"records": result.records, "evaluations": result.evaluations, "samples": samples or []}
    (folder / "records.json").write_text(json.dumps(stored), encoding="utf-8")
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1), encoding="utf-8")


def compression_baseline(texts: list[str]) -> float:
    """Bits per byte of `xz -9` on the texts, one after another: what a general compressor makes of the same bytes."""
    data = "\n\n".join(texts).encode()
    return 8 * len(lzma.compress(data, preset=9)) / len(data)
