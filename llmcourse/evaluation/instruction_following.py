"""The harness that follows a model through every stage of post-training: each task of the town, held out and scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from llmcourse.data.chat_formats import chat_format
from llmcourse.data.town_instructions import TASKS, TownInstruction, TownInstructions
from llmcourse.evaluation.statistics import Estimate, wilson_interval
from llmcourse.inference.generation import generate
from llmcourse.inference.sampling import SamplingParams
from llmcourse.models.transformer import Transformer


def answer_chats(
    model: Transformer,
    tokenizer: Any,
    chats: Sequence[Sequence[Mapping[str, str]]],
    params: SamplingParams | None = None,
    *,
    batch_size: int = 64,
) -> list[str]:
    """What the assistant answers to each conversation, greedily unless `params` say otherwise.

    A conversation that leaves no room in the model's context gets the empty answer.

    Args:
        model: answers.
        tokenizer: ours, or one of `transformers` with a chat template.
        chats: lists of messages; the last one is the user's.
        params: of sampling; by default greedy, at most 128 new tokens.
        batch_size: conversations that are answered together.

    Raises:
        ValueError: a batch size below 1, or what the chat format refuses.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: give at least 1")
    chat = chat_format(tokenizer)
    params = params or SamplingParams(temperature=0.0, max_new_tokens=128)
    prompts = [chat.prompt(messages) for messages in chats]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # like lengths together: less padding
    order = [i for i in order if len(prompts[i]) < model.config.context_length]
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        own = params.with_seed_plus(start)
        ids = generate(model, [prompts[i] for i in part], own, stop_ids=chat.stop_ids, tokenizer=tokenizer)
        for i, new in zip(part, ids, strict=True):
            answers[i] = tokenizer.decode(new)
    return answers


def share_right(
    model: Transformer, tokenizer: Any, instructions: Sequence[TownInstruction], **options: Any
) -> Estimate:
    """Share of requests that the model answers right, with Wilson's 95 % interval; options as in `answer_chats`.

    Raises:
        ValueError: no requests, or what `answer_chats` refuses.
    """
    if not instructions:
        raise ValueError("no requests to answer: give at least one")
    answers = answer_chats(model, tokenizer, [one.messages for one in instructions], **options)
    right = sum(one.is_right(answer) for one, answer in zip(instructions, answers, strict=True))
    return wilson_interval(right, len(instructions))


def instruction_report(
    model: Transformer,
    tokenizer: Any,
    instructions: TownInstructions,
    *,
    n: int = 128,
    seed: int = 0,
    tasks: Sequence[str] = TASKS,
    reworded: bool = False,
) -> dict[str, dict[str, Any]]:
    """Greedy exact match on `n` held-out requests of each task, as plain data: task -> {"value", "low", "high", "n"}.

    Raises:
        ValueError: what `TownInstructions.held_out` refuses.
    """
    return {
        task: asdict(share_right(model, tokenizer, instructions.held_out(task, n, seed, reworded=reworded)))
        for task in tasks
    }
