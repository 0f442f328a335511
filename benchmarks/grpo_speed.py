"""GRPO against TRL's GRPOTrainer, end to end: writing, scoring and the step; same model, prompts and settings.

The base model has first learned, in a short fine-tuning, to answer sums in the chat format and to stop. Ours is
`train_grpo` in two ways that give the same numbers: a row for each response, and a row for each group, in which all
responses share their prompt. Sharing is a setting of `RolloutSettings`, good for answers about as short as their
prompts; the bars are for it in fp32 and for separate rows in bf16, where either reaches them.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.trl_peers import PRECISIONS, Comparison, Run, compare, open_peer, quiet, trainer_options
from llmcourse.alignment.grpo import GRPOSettings, train_grpo
from llmcourse.alignment.policy_losses import Objective
from llmcourse.alignment.rewards import by_rule, solved
from llmcourse.alignment.rollouts import RolloutSettings
from llmcourse.data.chat_formats import CourseFormat
from llmcourse.data.instruction import encode_conversations
from llmcourse.data.tinytown import Town
from llmcourse.data.town_instructions import TownInstruction, TownInstructions
from llmcourse.models.pretrained import from_pretrained, save_pretrained
from llmcourse.tokenization.tokenizer import Tokenizer
from llmcourse.training import finetuning
from llmcourse.training.fit import FitSettings

PROMPTS = 16
GROUP = 8
NEW_TOKENS = 40
STEPS = 8
ROUNDS = 3
LR = 3e-4
WARM_UP_STEPS = 100


def tasks() -> list[TownInstruction]:
    """Sums to ask, each once in a run, so that both sides ask the same whatever their order."""
    return TownInstructions(Town(0)).training(STEPS * PROMPTS, seed=1, tasks=("sums",))


def apart(folder: Path, precision: str, share_prompt: bool = False) -> Callable[[], Run]:
    """`train_grpo`, a round of rollouts a step."""
    tokenizer, asked = Tokenizer.load(folder), tasks()
    prompts = [CourseFormat(tokenizer).prompt(one.messages) for one in asked]
    settings = GRPOSettings(
        rollouts=RolloutSettings(
            prompts=PROMPTS,
            group_size=GROUP,
            max_new_tokens=NEW_TOKENS,
            micro_batch=PROMPTS * GROUP,
            share_prompt=share_prompt,
        ),
        objective=Objective(clip_high=0.28, average="token"),
        fit=FitSettings(
            steps=STEPS, lr=LR, schedule="constant", weight_decay=0.0, precision=precision, compile="off"
        ),
    )
    stop_id = tokenizer.special_id("<|end|>")

    def train() -> Run:
        model = from_pretrained(folder)
        start = time.perf_counter()
        done = train_grpo(
            model, tokenizer, prompts, by_rule(solved, asked), settings, stop_id=stop_id, progress=False
        )
        seconds = time.perf_counter() - start
        notes = {name: statistics.mean(one[name] for one in done.rounds) for name in ("reward", "seconds")}
        return Run(seconds, statistics.mean(one["length"] for one in done.rounds), notes)

    return train


def shared(folder: Path, precision: str) -> Callable[[], Run]:
    """The same with the prompt read once for all responses of a group."""
    return apart(folder, precision, share_prompt=True)


def theirs(folder: Path, precision: str) -> Callable[[], Run]:
    """`GRPOTrainer` with `transformers.generate`, which it uses on a CPU."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    asked = tasks()
    score = by_rule(solved, asked)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    stop_id = tokenizer.convert_tokens_to_ids("<|end|>")
    rows = Dataset.from_list([{"prompt": list(one.messages), "number": i} for i, one in enumerate(asked)])
    options = trainer_options(folder, precision, batch_size=PROMPTS * GROUP, steps=STEPS, lr=LR)
    config = GRPOConfig(
        **options,
        num_generations=GROUP,
        max_completion_length=NEW_TOKENS,
        loss_type="dapo",
        epsilon_high=0.28,
        beta=0.0,
    )

    def rewards(completions: list[Any], number: Sequence[int], **_: Any) -> list[float]:
        return score(number, [messages[0]["content"] for messages in completions])

    def train() -> Run:
        model = open_peer(folder)
        model.generation_config.eos_token_id = stop_id
        trainer = quiet(
            GRPOTrainer(model, rewards, args=config, train_dataset=rows, processing_class=tokenizer)
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        logged = trainer.state.log_history[-1]  # means over the run
        return Run(seconds, logged["completions/mean_length"], {"reward": logged["reward"]})

    return train


SIDES = {"a row for each response": apart, "shared prompt": shared, "trl.GRPOTrainer": theirs}
COMPARISON = Comparison(
    module="benchmarks.grpo_speed",
    stage="grpo",
    what=f"GRPO on sums, {STEPS} steps of {PROMPTS} prompts x {GROUP} responses of at most {NEW_TOKENS} tokens",
    sides=SIDES,
    ours={"fp32": "shared prompt", "bf16": "a row for each response"},
    bars={"trl.GRPOTrainer": 2.0},
    steps=STEPS,
    rounds=ROUNDS,
    tolerance=0.1,  # mean length of what was written, which is a matter of chance
)


def prepare(folder: str) -> None:
    """Save the base model after a fine-tuning on sums."""
    from llmcourse import pipeline

    base = pipeline.load("base")
    settings = finetuning.cpu(steps=WARM_UP_STEPS, warmup_steps=10)
    asked = TownInstructions(Town(0)).training(WARM_UP_STEPS * settings.batch_size, seed=0, tasks=("sums",))
    chat = CourseFormat(base.tokenizer)
    data = encode_conversations(
        (one.conversation for one in asked), chat, context_length=base.model.config.context_length
    )
    finetuning.finetune(base.model, data, settings, progress=False)
    save_pretrained(base.model, folder, base.tokenizer)


def run() -> list[dict[str, Any]]:
    """Both in fp32 and in bf16 autocast, which is our default where the hardware multiplies it."""
    with tempfile.TemporaryDirectory() as folder:
        prepare(folder)
        return [one for precision in PRECISIONS for one in compare(COMPARISON, Path(folder), precision)]
