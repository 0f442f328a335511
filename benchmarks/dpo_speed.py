"""DPO against TRL's DPOTrainer: same model, pairs, precision, optimizer, over three epochs; in fp32 and bf16.

A speed is steps over the seconds of the whole run. Where log-probabilities under the reference are computed once, that
pass counts; where they are not, each step holds a forward pass of the reference.

Ours is `train_dpo` in two ways that give the same numbers: with two rows a pair, and with one, in which both answers
share their prompt. The bar is for the one that `DPOSettings` takes when nothing is said: see `sharing_pays`.
"""

from __future__ import annotations

import itertools
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
from llmcourse.alignment import dpo
from llmcourse.data.chat_formats import CourseFormat
from llmcourse.data.preference import PreferenceBatches, PreferencePair, encode_pairs, town_pairs
from llmcourse.data.tinytown import Town
from llmcourse.data.town_instructions import TownInstructions
from llmcourse.models.pretrained import from_pretrained, save_pretrained
from llmcourse.tokenization.tokenizer import Tokenizer

EPOCHS = 3  # TRL's default
BATCH = 32
BATCHES = 6
STEPS = EPOCHS * BATCHES
ROUNDS = 3
CONTEXT = 256
LR = 3e-4


def batches(tokenizer: Tokenizer) -> tuple[list[PreferencePair], PreferenceBatches]:
    """The pairs and our batches of them: pairs that fit the context and differ, as many as fill the batches."""
    chat = CourseFormat(tokenizer)
    drawn = town_pairs(TownInstructions(Town(0)), 2 * BATCHES * BATCH)
    pairs = [pair for pair in drawn if pair.chosen != pair.rejected and _fits(pair, chat)][: BATCHES * BATCH]
    data = encode_pairs(pairs, chat, context_length=CONTEXT)
    return pairs, PreferenceBatches(data, batch_size=BATCH, context_length=CONTEXT, seed=0)


def _fits(pair: PreferencePair, chat: CourseFormat) -> bool:
    answers = ({"role": "assistant", "content": answer} for answer in (pair.chosen, pair.rejected))
    return max(len(chat.encode([*pair.messages, answer])[0]) for answer in answers) <= CONTEXT + 1


def two_rows(folder: Path, precision: str, share_prompt: bool = False) -> Callable[[], Run]:
    """`train_dpo`, which computes the reference's log-probabilities before the first step."""
    tokenizer = Tokenizer.load(folder)
    settings = dpo.cpu(
        steps=STEPS,
        lr=LR,
        warmup_steps=0,
        schedule="constant",
        precision=precision,
        share_prompt=share_prompt,
    )

    def train() -> Run:
        model, source = from_pretrained(folder), batches(tokenizer)[1]
        start = time.perf_counter()
        done = dpo.train_dpo(model, source, settings, progress=False)
        seconds = time.perf_counter() - start
        notes = {"reference_seconds": seconds - done.seconds}
        return Run(seconds, statistics.mean(record["loss"] for record in done.records), notes)

    return train


def shared(folder: Path, precision: str) -> Callable[[], Run]:
    """The same with each prompt read once for both answers."""
    return two_rows(folder, precision, share_prompt=True)


def theirs(folder: Path, precision: str) -> Callable[[], Run]:
    """`DPOTrainer` as it comes, with the reference model beside the policy, on the batches of our run."""
    pairs, source = batches(Tokenizer.load(folder))
    order = [row for position in range(STEPS) for row in source.rows(position)]
    make = _trainers(folder, precision, [pairs[row].row for row in order])

    def train() -> Run:
        trainer = make()
        start = time.perf_counter()
        done = trainer.train()
        return Run(time.perf_counter() - start, done.training_loss)

    return train


def theirs_once(folder: Path, precision: str) -> Callable[[], Run]:
    """`DPOTrainer` with `precompute_ref_log_probs`; the batches of our first epoch, three times."""
    pairs, source = batches(Tokenizer.load(folder))
    order = [row for position in range(BATCHES) for row in source.rows(position)]
    make = _trainers(folder, precision, [pairs[row].row for row in order], precompute_ref_log_probs=True)

    def train() -> Run:
        trainer = make()
        start = time.perf_counter()
        done = trainer.train()
        seconds = trainer.reference_seconds + time.perf_counter() - start
        return Run(seconds, done.training_loss, {"reference_seconds": trainer.reference_seconds})

    return train


def _trainers(folder: Path, precision: str, rows: list[dict[str, Any]], **options: Any) -> Callable[[], Any]:
    """A function that makes a new trainer, of the same weights, on rows that are tokenized once."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    class Timed(tokenized(DPOTrainer)):
        """Notes how long the reference took, which the constructor runs."""

        def _precompute_ref_logps(self, *arguments: Any) -> Any:
            start = time.perf_counter()
            dataset = super()._precompute_ref_logps(*arguments)
            self.reference_seconds = time.perf_counter() - start
            return dataset

    tokenizer = AutoTokenizer.from_pretrained(folder)
    common = trainer_options(folder, precision, batch_size=BATCH, steps=STEPS, lr=LR)
    config = DPOConfig(**common, max_length=CONTEXT + 1, train_sampling_strategy="sequential", **options)
    plain = DPOConfig(**common, max_length=CONTEXT + 1)
    data = Dataset.from_list(rows)
    first = DPOTrainer(open_peer(folder), args=plain, train_dataset=data, processing_class=tokenizer)
    numbers = itertools.count()

    def make() -> Any:
        # another column each time: TRL would find the log-probabilities of the last run in its cache
        prepared = first.train_dataset.add_column("run", [next(numbers)] * len(rows))
        return quiet(
            Timed(open_peer(folder), args=config, train_dataset=prepared, processing_class=tokenizer)
        )

    return make


SIDES = {
    "two rows a pair": two_rows,
    "shared prompt": shared,
    "trl.DPOTrainer": theirs,
    "trl.DPOTrainer precompute_ref_log_probs": theirs_once,
}
COMPARISON = Comparison(
    module="benchmarks.dpo_speed",
    stage="dpo",
    what=f"DPO of the course's base model, {STEPS} steps of {BATCH} pairs, {EPOCHS} epochs, reference included",
    sides=SIDES,
    ours={"fp32": "shared prompt", "bf16": "two rows a pair"},
    bars={"trl.DPOTrainer": 2.0},
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
