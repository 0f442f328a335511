"""The stage graph: corpus -> tokenizer -> tokens -> base -> sft. Every result is an artifact, made when asked for.

`load("base")` gives the pre-trained model of the course, `load("sft")` the assistant made of it. A model from outside
takes the place of the base with `model=`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import lzma
import statistics
from collections.abc import Mapping
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
from llmcourse.data.chat_formats import chat_format, training_template
from llmcourse.data.instruction import encode_conversations
from llmcourse.data.tinytown import Town
from llmcourse.data.token_stream import TokenStream, tokenize
from llmcourse.data.town_instructions import ASSISTANT, TownInstructions
from llmcourse.evaluation.generation import town_report
from llmcourse.evaluation.instruction_following import instruction_report
from llmcourse.inference.generation import complete
from llmcourse.models.peft_format import base_fingerprint
from llmcourse.models.pretrained import from_pretrained, local_folder, save_pretrained
from llmcourse.models.transformer import Transformer
from llmcourse.tokenization.tokenizer import Tokenizer
from llmcourse.training import finetuning, pretraining
from llmcourse.training.finetuning import SFTSettings
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
    artifact: Artifact | None
    """`None` for a model from outside"""

    @property
    def town(self) -> Town | None:
        """The town of its corpus; `None` for real text and for a model from outside."""
        known = self.artifact is not None and self.artifact.metrics["corpus"] == "tinytown"
        return Town(TOWN_SEED) if known else None

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


def open_model(name: str) -> Loaded:
    """A model of the Llama or Qwen3 family from a folder or the Hub, with a chat template that training can use.

    Raises:
        ValueError: no such model, another family, no readable tokenizer, or one with more ids than the model has.
    """
    folder = local_folder(name)
    model, codec = from_pretrained(folder), Tokenizer.load(folder)
    if codec.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{name}: the tokenizer has {codec.vocab_size} ids, the model {model.config.vocab_size}: use its own one"
        )
    template = training_template(codec)
    if template != codec.chat_template:
        print(f"{name}: its chat template does not mark what the assistant writes; using one that does")
        codec.chat_template = template
    return Loaded(model, codec, None)


def sft(start: Loaded, settings: SFTSettings) -> Loaded:
    """The assistant: `start` fine-tuned on requests about the town, each conversation used once."""
    inputs = {} if start.artifact is None else {"base": start.artifact}
    outside = (
        {} if inputs else {"model": base_fingerprint(start.model), "template": start.tokenizer.chat_template}
    )

    def make(path: Path, work: Path) -> dict[str, Any]:
        return _train_sft(settings, start, path, work)

    artifact = build(
        "sft",
        settings=dataclasses.asdict(settings) | outside,
        inputs=inputs,
        make=make,
        code=(finetuning, "llmcourse.data.town_instructions", "llmcourse.evaluation.instruction_following"),
        resumable=True,
    )
    return Loaded(from_pretrained(artifact.path), Tokenizer.load(artifact.path), artifact)


STAGES = ("base", "sft")
LONGEST_CONVERSATION = 512
"""tokens; those of the town are shorter, whatever the tokenizer, and a model from outside may have a context of many
thousand"""


def load(
    stage: str,
    preset: str = "cpu",
    corpus: str = "tinytown",
    seed: int = 0,
    *,
    model: str = "",
    upstream: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Loaded:
    """Model and tokenizer of a stage, trained first (upstream stages too) when they are not in the cache.

    Args:
        stage: one of `STAGES`.
        preset: where settings come from, "cpu" or "gpu".
        corpus: text of pre-training.
        seed: of all stages.
        model: folder or Hub name of a model that takes the place of the base; preset and corpus of the base are then
            without effect.
        upstream: changes to settings of the base, for another stage.
        changes: settings of the stage by name, e.g. `steps=200`.

    Raises:
        ValueError: unknown stage, preset, corpus, model or setting.
    """
    if stage not in STAGES:
        raise ValueError(f"stage={stage!r}: choose one of {', '.join(STAGES)}")
    of_base = changes if stage == "base" else dict(upstream or {})
    if stage == "sft":  # before anything is trained
        settings = finetuning.preset(preset, seed=seed, **changes)
    start = (
        open_model(model) if model else base(pretraining.preset(preset, corpus=corpus, seed=seed, **of_base))
    )
    return start if stage == "base" else sft(start, settings)


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


def _train_sft(settings: SFTSettings, start: Loaded, path: Path, work: Path) -> dict[str, Any]:
    instructions = TownInstructions(Town(TOWN_SEED), ASSISTANT)
    context = min(start.model.config.context_length, LONGEST_CONVERSATION)
    n = settings.fit.steps * settings.fit.micro_steps * settings.batch_size
    if settings.packed:
        n *= max(1, context // 64)  # conversations of some 50 tokens share a row
    data = encode_conversations(
        (one.conversation for one in instructions.training(n, settings.seed)),
        chat_format(start.tokenizer),
        context_length=context,
        truncation=settings.truncation,
        loss_on=settings.loss_on,
    )
    model = start.model
    run = finetuning.finetune(
        model, data, settings, checkpoint_folder=work, description="fine-tuning the assistant"
    )
    save_pretrained(model, path, start.tokenizer)
    metrics = {
        "corpus": start.artifact.metrics["corpus"] if start.artifact else None,
        "conversations": len(data),
        "train_loss": run.fit.last_loss,
        "training_seconds": run.fit.seconds,
        "peak_bytes": run.fit.peak_bytes,
        "probes": instruction_report(model, start.tokenizer, instructions, seed=settings.seed),
    }
    write_records(path, run.fit, metrics)
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
