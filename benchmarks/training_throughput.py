"""Pre-training throughput against Hugging Face's Trainer: same architecture, weights, batches, precision, optimizer."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from typing import Any

import torch
import transformers
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from benchmarks.harness import alternate, result
from llmcourse import pipeline, runtime
from llmcourse.accounting import model_flops_utilization
from llmcourse.data.packing import PackedBatches
from llmcourse.models.pretrained import save_pretrained
from llmcourse.training import pretraining
from llmcourse.training.fit import fit

STEPS = 40
ROUNDS = 3


class Rows(Dataset):
    """The same windows as ours, one row an item."""

    def __init__(self, batches: PackedBatches, n_rows: int) -> None:
        self.rows = torch.cat([batches.next()["tokens"] for _ in range(-(-n_rows // batches.batch_size))])

    def __len__(self) -> int:
        """Rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def run() -> list[dict[str, Any]]:
    """Both in fp32 and in bf16 autocast; AdamW for both, since the Trainer has no Muon."""
    preset = pretraining.cpu(optimizer="adamw")
    source = pipeline.corpus(preset.corpus)
    codec, artifact = pipeline.tokenizer(source, preset.vocab_size)
    train, _, _ = pipeline.tokens(source, codec, artifact)
    return [_compare(precision, preset, train) for precision in ("fp32", "bf16")]


def _compare(precision: str, preset: pretraining.PretrainSettings, train: Any) -> dict[str, Any]:
    T, B = preset.model.context_length, preset.batch_size
    tokens = B * T * STEPS
    model = pretraining.new_model(preset, train.vocab_size, torch.device("cpu"))
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32

    def batches() -> PackedBatches:
        return PackedBatches(train, batch_size=B, context_length=T, seed=0)

    def ours(compiled: str) -> float:
        settings = dataclasses.replace(
            preset.fit, steps=STEPS, precision=precision, compile=compiled, schedule="constant", eval_every=0
        )
        start = time.perf_counter()
        fit(model, batches(), pretraining.next_token_loss, settings, progress=False)
        return tokens / (time.perf_counter() - start)

    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        peer = AutoModelForCausalLM.from_pretrained(folder)
        rows = Rows(batches(), B * STEPS)

        def trainer() -> float:
            arguments = TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=B,
                max_steps=STEPS,
                learning_rate=preset.fit.lr,
                bf16=precision == "bf16",
                use_cpu=True,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
            )
            run = Trainer(peer, arguments, train_dataset=rows)
            start = time.perf_counter()
            run.train()
            return tokens / (time.perf_counter() - start)

        name = f"transformers.Trainer {transformers.__version__}"
        contenders = {
            "compiled": lambda: ours("on"),
            "eager": lambda: ours("off"),
            name: trainer,
        }
        figures = alternate(contenders, ROUNDS, f"training, {precision}")
    peak = runtime.matmul_flops(torch.device("cpu"), dtype)
    best = sorted(figures["compiled"])[ROUNDS // 2]
    return result(
        f"training_throughput_{precision}",
        what=f"pre-training of the cpu preset's model, {B} x {T} tokens a step, {precision}, AdamW, compiled",
        unit="tokens/s",
        ours=figures["compiled"],
        peers={name: figures[name]},
        bars={name: 1.5},
        eager=figures["eager"],
        matmul_flops=peak,
        mfu=model_flops_utilization(model.config, best, peak),
    )
