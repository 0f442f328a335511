"""One model through its stages: the same held-out requests asked of base, SFT, LoRA, DPO and GRPO, over three seeds.

Not a race: there is no peer and no bar. The base is one (seed 0); what follows it is trained three times, and each run
is scored by `instruction_report` on the same requests, so that methods can be compared at their cost in seconds.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable
from typing import Any

from benchmarks.harness import result
from llmcourse import pipeline
from llmcourse.alignment import dpo, grpo, rewards
from llmcourse.data.chat_formats import chat_format
from llmcourse.data.instruction import InstructionBatches, encode_conversations
from llmcourse.data.preference import PreferenceBatches, annotate_rankings, encode_pairs
from llmcourse.data.tinytown import Town
from llmcourse.data.town_instructions import TASKS, TownInstructions
from llmcourse.evaluation.instruction_following import answer_chats, instruction_report
from llmcourse.inference.sampling import SamplingParams
from llmcourse.models.lora import LoRASettings, add_lora, fold_lora
from llmcourse.models.transformer import Transformer
from llmcourse.runtime import set_seed
from llmcourse.training.finetuning import preset, sft_loss
from llmcourse.training.fit import fit

SEEDS = (0, 1, 2)
PROBES = 128
ALIGNED = ("sums", "constraints")


def run() -> list[dict[str, Any]]:
    """Shares of right answers by stage, task and seed, and the seconds of each training."""
    base = pipeline.load("base")
    town, codec = Town(pipeline.TOWN_SEED), base.tokenizer
    instructions = TownInstructions(town)
    stages: dict[str, Callable[[Transformer, int], Transformer]] = {
        "SFT": lambda model, seed: _sft(model, codec, instructions, seed),
        "SFT by LoRA": lambda model, seed: _sft(model, codec, instructions, seed, rank=8),
        "SFT, DPO": lambda model, seed: _dpo(model, codec, instructions, seed),
        "SFT, GRPO": lambda model, seed: _grpo(model, codec, instructions, seed),
    }
    scores: dict[str, dict[str, list[float]]] = {"base": _score(base.model, codec, instructions)}
    seconds: dict[str, list[float]] = {name: [] for name in stages}
    for seed in SEEDS:
        assistant = copy.deepcopy(base.model)
        for name, train in stages.items():
            model = copy.deepcopy(assistant if "," in name else base.model)
            began = time.perf_counter()
            model = train(model, seed).eval()
            seconds[name].append(time.perf_counter() - began)
            if name == "SFT":
                assistant = model
            for task, values in _score(model, codec, instructions).items():
                scores.setdefault(name, {}).setdefault(task, []).extend(values)
    mean = [sum(scores["SFT, GRPO"][task][i] for task in TASKS) / len(TASKS) for i in range(len(SEEDS))]
    return [
        result(
            "stages",
            what="right answers of the model after GRPO, mean of the four tasks",
            unit="share",
            ours=mean,
            stages=scores,
            seconds=seconds,
            probes=PROBES,
        )
    ]


def _score(model: Transformer, codec: Any, instructions: TownInstructions) -> dict[str, list[float]]:
    report = instruction_report(model, codec, instructions, n=PROBES)
    return {task: [found["value"]] for task, found in report.items()}


def _sft(
    model: Transformer, codec: Any, instructions: TownInstructions, seed: int, rank: int = 0
) -> Transformer:
    settings = preset("cpu", seed=seed, **({"lr": 1e-2} if rank else {}))
    requests = instructions.training(settings.fit.steps * settings.batch_size, seed)
    context = model.config.context_length
    data = encode_conversations(
        [one.conversation for one in requests], chat_format(codec), context_length=context
    )
    batches = InstructionBatches(data, batch_size=settings.batch_size, context_length=context, seed=seed)
    set_seed(seed)
    if rank:
        add_lora(model, LoRASettings(rank=rank, alpha=2 * rank))
    fit(model, batches, sft_loss, settings.fit, description="SFT")
    return fold_lora(model) if rank else model


def _dpo(model: Transformer, codec: Any, instructions: TownInstructions, seed: int) -> Transformer:
    """As in lab 14: four answers to each request, ranked; the ends of a ranking are a pair."""
    requests = instructions.training(1300, 21 + seed, tasks=ALIGNED)
    chats = [one.messages for one in requests]
    answers = [
        answer_chats(
            model, codec, chats, SamplingParams(max_new_tokens=96, seed=4 * seed + part), batch_size=256
        )
        for part in range(4)
    ]
    pairs = annotate_rankings(requests, answers, instructions.reward, noise=0.5, seed=seed)
    context = model.config.context_length
    encoded = encode_pairs(pairs, chat_format(codec), context_length=context)
    batches = PreferenceBatches(encoded, batch_size=32, context_length=context, seed=seed)
    dpo.train_dpo(model, batches, dpo.cpu(steps=52, lr=5e-4, beta=0.3, seed=seed), description="DPO")
    return model


def _grpo(model: Transformer, codec: Any, instructions: TownInstructions, seed: int) -> Transformer:
    chat = chat_format(codec)
    tasks = instructions.training(2000, 9 + seed, tasks=["sums"])
    settings = grpo.cpu()
    fewer = dataclasses.replace(settings.fit, steps=20, warmup_steps=3, seed=seed)
    settings = dataclasses.replace(settings, fit=fewer)
    prompts = [chat.prompt(one.messages) for one in tasks]
    scorer = rewards.by_rule(rewards.solved, tasks)
    grpo.train_grpo(model, codec, prompts, scorer, settings, stop_id=chat.stop_ids[0])
    return model
