"""Generation against `transformers.generate`: same weights, greedy, the same tokens, at batch 1 and 16."""

from __future__ import annotations

import tempfile
import time
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from benchmarks.harness import alternate, result
from llmcourse.inference import SamplingParams, generate
from llmcourse.models import ModelConfig, Transformer
from llmcourse.models.pretrained import save_pretrained
from llmcourse.runtime import set_seed
from llmcourse.training import pretraining

NEW_TOKENS = 96
PROMPT = 32
ROUNDS = 5


def run() -> list[dict[str, Any]]:
    """Random weights of the cpu preset's shape: speed does not depend on what the model says."""
    set_seed(0)
    model = Transformer(ModelConfig(**vars(pretraining.cpu().model))).eval()
    with torch.no_grad():  # sharper logits than at initialization, so that greedy has no near ties
        model.embedding.weight.mul_(20)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        peer = AutoModelForCausalLM.from_pretrained(folder).eval()
    return [_compare(model, peer, batch) for batch in (1, 16)]


def _compare(model: Transformer, peer: Any, batch: int) -> dict[str, Any]:
    prompts = torch.randint(
        8, model.config.vocab_size, (batch, PROMPT), generator=torch.Generator().manual_seed(batch)
    )
    params = SamplingParams(temperature=0, max_new_tokens=NEW_TOKENS)
    written: dict[str, list[list[int]]] = {}

    def ours() -> float:
        start = time.perf_counter()
        written["ours"] = generate(model, prompts.tolist(), params)
        return batch * NEW_TOKENS / (time.perf_counter() - start)

    def theirs() -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            ids = peer.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                eos_token_id=None,
                pad_token_id=1,
            )
        seconds = time.perf_counter() - start
        written["theirs"] = ids[:, PROMPT:].tolist()
        return batch * NEW_TOKENS / seconds

    name = f"transformers.generate {transformers.__version__}"
    figures = alternate({"ours": ours, name: theirs}, ROUNDS, f"generation, batch {batch}")
    if written["ours"] != written["theirs"]:
        raise RuntimeError(f"batch {batch}: the two wrote different tokens, so the comparison is void")
    return result(
        f"generation_batch_{batch}",
        what=f"greedy generation of {NEW_TOKENS} tokens after {PROMPT}, batch {batch}, fp32, the same tokens",
        unit="tokens/s",
        ours=figures["ours"],
        peers={name: figures[name]},
        bars={name: 3.0},
    )
