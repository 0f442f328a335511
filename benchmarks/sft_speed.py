"""Supervised fine-tuning against TRL's SFTTrainer: same model, batches, precision, optimizer; in fp32 and bf16."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.trl_peers import (
    PRECISIONS,
    Comparison,
    Run,
    compare,
    open_peer,
    quiet,
    tokenized,
    trainer_options,
)
from llmcourse.data.instruction import CourseFormat, InstructionBatches, InstructionSet, encode_conversations
from llmcourse.data.tinytown import Town
from llmcourse.data.town_instructions import TownInstructions
from llmcourse.models.pretrained import from_pretrained, save_pretrained
from llmcourse.tokenization.tokenizer import Tokenizer
from llmcourse.training import finetuning

STEPS = 40
ROUNDS = 3
BATCH = 32
CONTEXT = 256
LR = 2e-3


def conversations(tokenizer: Tokenizer) -> list[Any]:
    """One epoch of conversations, those left out that do not fit the context."""
    chat = CourseFormat(tokenizer)
    drawn = (one.conversation for one in TownInstructions(Town(0)).training(2 * STEPS * BATCH, seed=0))
    fitting = [talk for talk in drawn if len(chat.encode(talk)[0]) <= CONTEXT + 1]
    return fitting[: STEPS * BATCH]


def encoded(tokenizer: Tokenizer) -> tuple[list[Any], InstructionSet]:
    """The conversations as messages and as ids."""
    talks = conversations(tokenizer)
    return talks, encode_conversations(talks, CourseFormat(tokenizer), context_length=CONTEXT)


def ours(folder: Path, precision: str) -> Callable[[], Run]:
    """`finetuning.finetune` with the cpu preset's settings."""
    _, data = encoded(Tokenizer.load(folder))
    settings = finetuning.cpu(
        steps=STEPS, batch_size=BATCH, lr=LR, warmup_steps=0, schedule="constant", precision=precision
    )

    def train() -> Run:
        model = from_pretrained(folder)
        start = time.perf_counter()
        done = finetuning.finetune(model, data, settings, progress=False)
        seconds = time.perf_counter() - start
        return Run(seconds, statistics.mean(record["loss"] for record in done.fit.records))

    return train


def theirs(folder: Path, precision: str) -> Callable[[], Run]:
    """`SFTTrainer` on the same conversations, in the order of our batches."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    talks, data = encoded(Tokenizer.load(folder))
    batches = InstructionBatches(data, batch_size=BATCH, context_length=CONTEXT, seed=0)
    order = [row for position in range(STEPS) for row in batches.rows(position)]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    options = trainer_options(folder, precision, batch_size=BATCH, steps=STEPS, lr=LR)
    config = SFTConfig(
        **options, assistant_only_loss=True, max_length=CONTEXT + 1, train_sampling_strategy="sequential"
    )
    rows = Dataset.from_list([{"messages": talks[row]} for row in order])
    first = SFTTrainer(open_peer(folder), config, train_dataset=rows, processing_class=tokenizer)
    prepared = first.train_dataset

    def train() -> Run:
        trainer = quiet(
            tokenized(SFTTrainer)(
                open_peer(folder), config, train_dataset=prepared, processing_class=tokenizer
            )
        )
        start = time.perf_counter()
        done = trainer.train()
        return Run(time.perf_counter() - start, done.training_loss)

    return train


SIDES = {"ours": ours, "trl.SFTTrainer": theirs}
COMPARISON = Comparison(
    module="benchmarks.sft_speed",
    stage="sft",
    what=f"fine-tuning of the course's base model, {STEPS} steps of the same {BATCH} conversations",
    sides=SIDES,
    ours={precision: "ours" for precision in PRECISIONS},
    bars={"trl.SFTTrainer": 1.5},
    steps=STEPS,
    rounds=ROUNDS,
)


def run() -> list[dict[str, Any]]:
    """Both in fp32 and in bf16 autocast, which is our default where the hardware multiplies it."""
    from llmcourse import pipeline

    base = pipeline.load("base")
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(base.model, folder, base.tokenizer)
        return [one for precision in PRECISIONS for one in compare(COMPARISON, Path(folder), precision)]
