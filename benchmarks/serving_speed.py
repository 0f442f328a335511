"""The engine on requests of mixed lengths, against static batching and `transformers`; speculative decoding; int8.

All sides write the same greedy tokens of the course's base model, as many for each request as it asks for; a round in
which they differ by more than rounding can explain is void.
"""

from __future__ import annotations

import copy
import random
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from benchmarks.harness import alternate, result
from llmcourse import pipeline
from llmcourse.data.token_stream import tokenize
from llmcourse.evaluation.perplexity import token_losses
from llmcourse.inference import SamplingParams
from llmcourse.inference.engine import Engine, EngineSettings
from llmcourse.inference.model_runner import ModelRunner
from llmcourse.inference.quantization import QuantizationSettings, quantize_weights
from llmcourse.inference.scheduler import SchedulerSettings
from llmcourse.inference.speculative import NGramDrafter, speculative_generate
from llmcourse.inference.static_batching import static_batches
from llmcourse.models.pretrained import save_pretrained

REQUESTS = 256
BATCH = 32  # rows of static batching
SEATS = 128  # sequences that may run together in the memory that these rows set aside
BLOCK = 16
ROUNDS = 3
Written = list[list[int]]


def requests(texts: list[list[int]], seed: int = 0) -> tuple[list[list[int]], list[int]]:
    """Beginnings of documents, and how many tokens each asks for: a few long answers among many short ones.

    There are many more requests than run together, so that the end, where seats stay empty, weighs little.
    """
    rng = random.Random(seed)
    prompts = [ids[: rng.randint(4, 32)] for ids in texts[:REQUESTS]]
    return prompts, [min(200, max(4, round(rng.lognormvariate(3.0, 1.0)))) for _ in prompts]


def run() -> list[dict[str, Any]]:
    """Throughput on mixed lengths, tokens per second of one sequence with and without drafts, perplexity of int8."""
    base = pipeline.load("base")
    corpus = pipeline.corpus("tinytown")
    texts = [
        ids for ids in _documents(corpus.validation.select(range(1200)), base.tokenizer) if len(ids) > 40
    ]
    documents = _documents(corpus.train.select(range(4000)), base.tokenizer)
    return [
        *_throughput(base.model, *requests(texts)),
        _speculative(base.model, documents, texts),
        _int8(base.model, texts),
    ]


def _documents(rows: Any, tokenizer: Any) -> list[list[int]]:
    stream = tokenize(rows, tokenizer, progress=False)
    bounds = stream.offsets.tolist()
    return [stream.tokens[a:b].tolist() for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


def _throughput(model: Any, prompts: list[list[int]], lengths: list[int]) -> list[dict[str, Any]]:
    """With as many sequences together as static batching has rows, and with as much memory for keys and values."""
    params = [SamplingParams(temperature=0.0, max_new_tokens=n) for n in lengths]
    runner = ModelRunner(model)
    slots = BATCH * (max(map(len, prompts)) + max(lengths))  # what a contiguous cache sets aside for a batch
    few = EngineSettings(
        scheduler=SchedulerSettings(max_sequences=BATCH), n_blocks=slots // BLOCK, block_size=BLOCK
    )
    many = EngineSettings(
        scheduler=SchedulerSettings(max_sequences=SEATS), n_blocks=slots // BLOCK, block_size=BLOCK
    )
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        peer = AutoModelForCausalLM.from_pretrained(folder).eval()
        batched = AutoModelForCausalLM.from_pretrained(folder).eval()
    written: dict[str, Written] = {}

    def ours(settings: EngineSettings) -> Callable[[], Written]:
        return lambda: Engine(model, settings).generate(prompts, params)

    def static() -> Written:
        return static_batches(runner, prompts, lengths, batch_size=BATCH)

    def loop() -> Written:
        found = []
        for prompt, n in zip(prompts, lengths, strict=True):
            ids = torch.tensor([prompt])
            options = {
                "do_sample": False,
                "max_new_tokens": n,
                "min_new_tokens": n,
                "eos_token_id": None,
                "pad_token_id": 1,
            }
            with torch.inference_mode():
                found.append(
                    peer.generate(ids, attention_mask=torch.ones_like(ids), **options)[
                        0, len(prompt) :
                    ].tolist()
                )
        return found

    def continuous() -> Written:
        config = GenerationConfig(do_sample=False, max_new_tokens=256, eos_token_id=-1, pad_token_id=1)
        # left to itself it takes most of the memory for its cache and is a third as fast
        limits = ContinuousBatchingConfig(page_size=BLOCK, num_blocks=slots // BLOCK, max_batch_tokens=256)
        found: dict[str, list[int]] = {}
        with batched.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=limits, warmup=False
        ) as manager:
            for i, (prompt, n) in enumerate(zip(prompts, lengths, strict=True)):
                manager.add_request(prompt, request_id=str(i), max_new_tokens=n, eos_token_id=-1)
            while len(found) < len(prompts):
                output = manager.get_result(timeout=60)
                if output is None or output.error:
                    raise RuntimeError(
                        f"continuous batching of transformers failed: {output and output.error}"
                    )
                if output.is_finished():
                    found[output.request_id] = output.generated_tokens
        return [found[str(i)] for i in range(len(prompts))]

    sides: dict[str, Callable[[], Written]] = {
        "ours": ours(many),
        "ours, as many rows": ours(few),
        "static batching": static,
        f"transformers.generate {transformers.__version__}, one by one": loop,
    }
    name = f"transformers {transformers.__version__} continuous batching"
    try:
        continuous()
        sides[name] = continuous
    except Exception as error:  # noqa: BLE001 - whatever it needs that this machine has not
        print(f"{name} does not run here: {error}")

    def contender(side: str) -> Callable[[], float]:
        def once() -> float:
            start = time.perf_counter()
            written[side] = sides[side]()
            seconds = time.perf_counter() - start
            _require_alike(written)
            return sum(lengths) / seconds

        return once

    figures = alternate({side: contender(side) for side in sides}, ROUNDS, "serving")
    bars = {"static batching": 3.0, list(sides)[3]: 4.0, name: 1.5}
    memory, rows = figures.pop("ours"), figures.pop("ours, as many rows")
    asked = f"{REQUESTS} requests for {min(lengths)} to {max(lengths)} tokens (mean {sum(lengths) / REQUESTS:.0f})"
    same = f"static batching with {BATCH} rows, fp32, the same greedy tokens"
    return [
        result(
            "serving_throughput",
            what=f"{asked}: engine with the cache memory of {same}",
            unit="tokens/s",
            ours=memory,
            peers=figures,
            bars={side: bar for side, bar in bars.items() if side in figures},
            lengths=lengths,
        ),
        result(
            "serving_throughput_same_rows",
            what=f"{asked}: engine with at most {BATCH} sequences together, {same}",
            unit="tokens/s",
            ours=rows,
            peers=figures,
        ),
    ]


def _require_alike(written: dict[str, Written]) -> None:
    """Near ties are decided by rounding, and a text goes its own way from there; most texts must be equal."""
    first = written["ours"]
    for side, texts in written.items():
        if [len(one) for one in texts] != [len(one) for one in first]:
            raise RuntimeError(f"{side} wrote other lengths, the comparison is void")
        equal = sum(a == b for a, b in zip(texts, first, strict=True)) / len(first)
        if equal < 0.9:
            raise RuntimeError(
                f"{side} wrote other tokens in {1 - equal:.0%} of the texts, the comparison is void"
            )


def _speculative(model: Any, documents: list[list[int]], texts: list[list[int]]) -> dict[str, Any]:
    runner, drafter = ModelRunner(model), NGramDrafter(documents, order=5)
    params = SamplingParams(temperature=0.0, max_new_tokens=100)
    prompts = [ids[:12] for ids in texts[:12]]
    counts: dict[str, float] = {}

    class Nothing:
        def propose(self, ids: Any, n: int) -> tuple[list[int], None]:
            return [], None

    def contender(which: Any, n_draft: int) -> Callable[[], float]:
        def once() -> float:
            start = time.perf_counter()
            found = [
                speculative_generate(runner, prompt, params, which, n_draft=n_draft) for prompt in prompts
            ]
            seconds = time.perf_counter() - start
            if which is drafter:
                counts["acceptance"] = sum(one.accepted for one in found) / sum(one.proposed for one in found)
                counts["tokens_per_pass"] = sum(len(one.new_ids) for one in found) / sum(
                    one.passes for one in found
                )
            return sum(len(one.new_ids) for one in found) / seconds

        return once

    sides = {"ours": contender(drafter, 6), "one token a pass": contender(Nothing(), 1)}
    figures = alternate(sides, ROUNDS, "speculative decoding")
    return result(
        "speculative_decoding",
        what="greedy generation of 100 tokens at batch 1, drafts of at most 6 tokens from 5-grams of training text",
        unit="tokens/s",
        ours=figures["ours"],
        peers={"one token a pass": figures["one token a pass"]},
        bars={"one token a pass": 1.3},
        **counts,
    )


@torch.no_grad()
def _int8(model: Any, texts: list[list[int]]) -> dict[str, Any]:
    quantized = quantize_weights(copy.deepcopy(model), QuantizationSettings(bits=8))
    nats = []
    for one in (model, quantized):
        total = count = 0
        for ids in texts:
            row = torch.tensor([ids[:256]])
            losses = token_losses(one, row[:, :-1], row[:, 1:])
            total, count = total + float(losses.sum()), count + losses.numel()
        nats.append(total / count)
    change = float(torch.tensor(nats[1] - nats[0]).exp() - 1)
    return result(
        "int8_perplexity",
        what="relative rise of the perplexity on held-out text, weights of the blocks as int8 with a scale a row",
        unit="of the perplexity",
        ours=[change],
        higher_is_better=False,
        limit=0.01,
        nats=nats,
    )
