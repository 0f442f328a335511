# %% [markdown]
# # Lab 11 · LoRA and its relatives
#
# [Open in Colab]({{colab}}) · [Source of this lab]({{repository}}/blob/{{branch}}/labs/src/11_peft.py)
#
# | | |
# |---|---|
# | **Chapter** | [11 LoRA and its relatives](../book/posttraining/peft.md) |
# | **Hardware** | CPU, 2 cores, 4 GiB of memory; a GPU is used with `PRESET = "gpu"` |
# | **Minutes** | 3 to execute, and up to 5 once for the base model and the assistant; 3 hours with the exercises |
# | **You will build** | a LoRA layer and its merge, its count, the DoRA weight, NF4 quantization and its bits, virtual tokens |
# | **What to inspect** | the best learning rate beside that of full fine-tuning; learning curves of different ranks; what is forgotten; bytes by part; an adapter on a base that is not its own |

# %% [markdown]
# ## Setup
#
# `PRESET = "gpu"` trains the larger model on the GPU and measures QLoRA of a one-billion shape there. `MODEL` is a local folder or Hub name of a model of the Llama or Qwen3 family; empty, it is the course's own, pre-trained on `CORPUS`. Tasks are Tinytown's in any case. The learning rates in `SIZES` suit the course's models: give others for yours. Every random number follows from `SEED`.

# %% tags=["parameters"]
PRESET = "cpu"
CORPUS = "tinytown"
SEED = 0
MODEL = ""

# %%
import copy
import dataclasses
import json
import logging
import math
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from llmcourse import pipeline, plotting
from llmcourse.accounting import count_parameters, loss_work_bytes, parameters_by_part, saved_activations
from llmcourse.checks import check, claim
from llmcourse.data.chat_formats import chat_format
from llmcourse.data.instruction import InstructionBatches, encode_conversations
from llmcourse.data.tinytown import Town
from llmcourse.data.town_instructions import TownInstruction, TownInstructions
from llmcourse.data.town_questions import FACTS
from llmcourse.data.town_records import TEMPLATES
from llmcourse.evaluation.statistics import paired_bootstrap, seed_interval, wilson_interval
from llmcourse.inference.generation import generate
from llmcourse.inference.sampling import SamplingParams
from llmcourse.labs import store_results
from llmcourse.models import ModelConfig, Transformer
from llmcourse.models.adapters import (
    AdapterSettings,
    PromptEmbedding,
    PromptSettings,
    add_adapters,
    add_prompt,
    prepend_prompt,
    virtual_ids,
)
from llmcourse.models.lora import (
    LoRASettings,
    add_lora,
    lora_layers,
    lora_parameters,
    merge_lora,
    trainable_share,
    unmerge_lora,
)
from llmcourse.models.nf4 import (
    LINEARS,
    NF4Linear,
    NF4Settings,
    dequantize_nf4,
    nf4_codebook,
    quantize_blocks,
    quantize_model,
    quantize_nf4,
    weight_bytes,
)
from llmcourse.models.peft_format import load_adapter, save_adapter
from llmcourse.models.pretrained import save_pretrained
from llmcourse.runtime import PeakMemory, pick_device, progress, set_seed, synchronize
from llmcourse.training.finetuning import instruction_loss, sft_loss
from llmcourse.training.fit import FitSettings, fit

SIZES = {
    "cpu": {
        "steps": 52, "n_seeds": 3, "held_out": 160, "others": 24, "high_rank": 16,
        "rates": {"full": (3e-4, 1e-3, 3e-3, 1e-2), "LoRA": (3e-3, 1e-2, 3e-2), "adapters": 1e-2, "prompt": 3e-1},
    },
    "gpu": {
        "steps": 120, "n_seeds": 5, "held_out": 512, "others": 128, "high_rank": 64,
        "rates": {"full": (3e-5, 1e-4, 3e-4), "LoRA": (3e-4, 1e-3, 3e-3), "adapters": 1e-3, "prompt": 1e-1},
    },
    "smoke": {
        "steps": 2, "n_seeds": 2, "held_out": 8, "others": 4, "high_rank": 8,
        "rates": {"full": (1e-3,), "LoRA": (1e-2,), "adapters": 1e-2, "prompt": 3e-1},
    },
}  # fmt: skip
if PRESET not in SIZES:
    raise ValueError(f"PRESET={PRESET!r}: choose one of {', '.join(SIZES)}")
sizes = SIZES[PRESET]
seeds = range(SEED, SEED + sizes["n_seeds"])
device = pick_device("auto" if PRESET == "gpu" else "cpu")
own = (
    not MODEL and CORPUS == "tinytown" and PRESET != "smoke"
)  # the model that the claims about accuracy are for
results = {"preset": PRESET, "corpus": CORPUS, "seed": SEED, "model": MODEL, "steps": sizes["steps"]}

# %% [markdown]
# ## Objectives
#
# After this lab you can
#
# 1. write a LoRA layer, count it, merge it, and say which of its factors receives a gradient first;
# 2. compare it with full fine-tuning at each one's own learning rate, over seeds and on the same requests, in what it learns and in what it forgets;
# 3. change the rank without changing the learning rate, and choose the matrices that are adapted;
# 4. quantize a model to four bits, train on top of it, and account for every byte of the training run;
# 5. tell what bottleneck adapters and trained prompts can and cannot do in LoRA's place;
# 6. exchange adapters with `peft`, and notice when an adapter sits on the wrong base.

# %% [markdown]
# ## 1. Two thin matrices beside a frozen one
#
# **Why.** A matrix with a million numbers can be changed by a product of two thin ones with a few thousand, $W + s\,BA$. Everything that training keeps for each trained number shrinks with them.
#
# The model is the course's assistant: the base model, fine-tuned on requests about the town as in [chapter 10](../book/posttraining/finetuning.md). If this machine has not trained it yet, it does so now.

# %%
stage = {"preset": "cpu" if PRESET == "smoke" else PRESET, "corpus": CORPUS, "seed": SEED, "model": MODEL}
loaded = pipeline.load("sft", **stage, **({"steps": 4} if PRESET == "smoke" else {}))
assistant, tokenizer = loaded.model.to(device).eval(), loaded.tokenizer
chat, context = chat_format(tokenizer), min(assistant.config.context_length, 512)
town = Town(pipeline.TOWN_SEED)
instructions = TownInstructions(town)
print(
    f"{count_parameters(assistant.config):,} parameters in {len(assistant.blocks)} blocks; the matrices of a block:"
)
block_shapes = {
    name.split(".")[-1]: (layer.out_features, layer.in_features)
    for name, layer in assistant.blocks[0].named_modules()
    if isinstance(layer, torch.nn.Linear)
}
print(", ".join(f"{name} {out} x {into}" for name, (out, into) in block_shapes.items()))

# %% [markdown]
# **Exercise 1.** The adapted layer. `weight` is (O, I), `a` is (R, I), `b` is (O, R). The scale is $s = \alpha / r$, or $\alpha / \sqrt{r}$ with `rslora`.
#
# <details><summary>Hint</summary>
#
# `F.linear(x, w)` is $x w^\top$. Never form $BA$: two thin products are cheaper, and the order of the factors follows from their shapes. The check also compares gradients.
#
# </details>


# %% exercise="lora_forward"
def my_lora_forward(x, weight, a, b, alpha, rslora=False):
    """x (..., I) -> (..., O)."""
    raise NotImplementedError


# %% check="lora_forward"
check("peft/lora_forward", my_lora_forward)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_lora_forward(x, weight, a, b, alpha, rslora=False):
#     s = alpha / (len(a) ** 0.5 if rslora else len(a))
#     return F.linear(x, weight) + s * F.linear(F.linear(x, a), b)
# ```
#
# </details>
#
# **Exercise 2.** How many numbers does a LoRA on matrices of these shapes train, and which share of all numbers (base and adapter) is that?


# %% exercise="lora_parameters"
def my_lora_parameters(shapes, rank):
    """shapes: list of (O, I) -> (count, share from 0 to 1)."""
    raise NotImplementedError


# %% check="lora_parameters"
check("peft/lora_parameters", my_lora_parameters)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_lora_parameters(shapes, rank):
#     count = sum(rank * (out + into) for out, into in shapes)
#     return count, count / (count + sum(out * into for out, into in shapes))
# ```
#
# </details>
#
# **Predict.** $A$ starts random and $B$ at zero. By how much do the logits of the adapted model differ from the base's? Which of the two factors has a gradient at the first step, and what would happen if both started at zero?
#
# One task serves the whole lab. The assistant answers questions about residents in one sentence; from now on it shall use another one, the *house style*. The sentence is one of the corpus' own, so what is new is only when to say it.

# %%
ALPHA = 8.0  # for every rank
PROMPT_LENGTH = 20  # virtual tokens of section 5


def restyled(sentence):
    """A sentence about a resident in the house style: the second wording that the town has for its attribute."""
    said = town.records.understand(sentence)
    return TEMPLATES[said.attribute][1].format(S=said.name, P=f"{said.name}'s", v=said.value)


def house_style(request):
    """The same request with every answer in the house style, those earlier in the conversation too."""
    messages = tuple(
        message | {"content": restyled(message["content"])} if message["role"] == "assistant" else message
        for message in request.messages
    )
    return dataclasses.replace(request, messages=messages, answer=restyled(request.answer))


def encode(requests):
    """Requests with their answers as training data; what leaves no room for a trained prompt is dropped."""
    return encode_conversations(
        [one.conversation for one in requests], chat, context_length=context - PROMPT_LENGTH
    )


def with_lora(rank=4, *, base=assistant, seed=SEED, **options):
    """A copy of the model with a fresh LoRA; the copy's own weights are frozen."""
    set_seed(seed)
    return add_lora(copy.deepcopy(base), LoRASettings(rank=rank, **{"alpha": ALPHA} | options))


n_train, n_held_out = 16 * sizes["steps"], sizes["held_out"]
train_data = encode([house_style(one) for one in instructions.training(n_train, 100 + SEED, tasks=["facts"])])
drawn = [house_style(one) for one in instructions.held_out("facts", 2 * n_held_out, SEED)]
held_out, to_choose = drawn[:n_held_out], drawn[n_held_out:]  # to report, and to choose learning rates on
held_out_data, to_choose_data = encode(held_out), encode(to_choose)
for one in (held_out[0], next((one for one in held_out if len(one.messages) > 1), held_out[1])):
    for message in one.conversation:
        print(f"{message['role']:>9}: {message['content']}")
    print()

# %%
adapted = with_lora()
batch = InstructionBatches(train_data, batch_size=16, context_length=context, seed=SEED).next()
batch = {name: value.to(device) for name, value in batch.items()}
with torch.no_grad():
    same_start = torch.equal(adapted(batch["tokens"]), assistant(batch["tokens"]))
total, count, _ = sft_loss(adapted, batch)
(total / count).backward()
print(f"logits equal those of the base, bit for bit: {same_start}")
print("gradient norm of        A         B")
first_gradients = {}
for name, layer in list(lora_layers(adapted).items())[:7]:
    first_gradients[name] = {"a": layer.a.grad.norm().item(), "b": layer.b.grad.norm().item()}
    print(f"{name.removeprefix('blocks.0.'):>17}  {layer.a.grad.norm():.2e}  {layer.b.grad.norm():.2e}")
adapter_sizes = {}
print("\nrank   trained   share of all numbers")
for rank in (1, 4, 16, 64):
    counted = trainable_share(with_lora(rank))
    adapter_sizes[rank] = {"trained": counted.trainable, "share": counted.share}
    print(f"{rank:>4} {counted.trainable:>9,} {counted.share:>10.1%}")
results["sizes"] = adapter_sizes

# %% [markdown]
# **Read the result.** At the start the adapted model *is* the base: its update is a product with zero. The gradient of $A$ is $s B^\top G$ and vanishes with $B$, so $B$ moves first, along $G A^\top$, and $A$ from the second step on. With both at zero neither gradient exists, ever; that run is in "Break it". The shares look large because the model is small: a matrix has $d^2$ numbers and its adapter $2 r d$, so the share falls as $2r/d$. Rank 16 is half a percent of an 8B model.

# %% [markdown]
# ## 2. The same task, fully and with LoRA
#
# **Why.** "LoRA is as good" and "LoRA is worse" are both statements about a learning rate, a rank, a budget and a task. To compare, each method gets its own best learning rate, found on requests that are not reported on; then both run over several seeds, with the same batches, and are scored on the same held-out requests.
#
# Three numbers describe a run: the share of held-out requests answered right, letter for letter; the loss on them in nats per target, which resolves finer; and the loss on the assistant's *other* tasks (reading, sums, constraints), whose rise is what was forgotten.


# %%
others_data = encode(
    [
        one
        for task in ("reading", "sums", "constraints")
        for one in instructions.held_out(task, sizes["others"], SEED)
    ]
)


def train(model, data, lr, *, seed=SEED, steps=sizes["steps"], loss=sft_loss):
    """Train what is trainable, in place; runs of one seed see the same batches. Returns the loss of each step."""
    batches = InstructionBatches(data, batch_size=16, context_length=context, seed=seed)
    settings = FitSettings(
        steps=steps, lr=lr, warmup_steps=max(1, steps // 20), schedule="linear", weight_decay=0.0, seed=seed,
        precision="auto" if device.type == "cuda" else "fp32", compile="off",
    )  # fmt: skip
    records = fit(model, batches, loss, settings, progress=False).records
    model.eval()
    return [record["loss"] for record in records]


def answers_right(model, requests):
    """Whether the greedy answer to each request is right; a trained prompt goes in front."""
    prefix = virtual_ids(model) if isinstance(model.embedding, PromptEmbedding) else []
    prompts = [prefix + chat.prompt(one.messages) for one in requests]
    params = SamplingParams(temperature=0.0, max_new_tokens=24 if own else 40)
    ids = generate(model, prompts, params, stop_ids=chat.stop_ids, tokenizer=tokenizer)
    return [one.is_right(tokenizer.decode(new)) for one, new in zip(requests, ids, strict=True)]


@torch.no_grad()
def nats_per_target(model, data):
    """Loss of all conversations, each in a row of its own; a trained prompt goes in front."""
    if not isinstance(model.embedding, PromptEmbedding):
        return instruction_loss(model, data, 64)
    source = InstructionBatches(data, batch_size=1, context_length=context, seed=0)
    sums = torch.zeros(2, dtype=torch.float64)
    for rows in np.array_split(data.lengths.argsort(), max(1, len(data) // 64)):
        batch = {name: value.to(device) for name, value in source.collate(rows).items()}
        total, count, _ = sft_loss(model, prepend_prompt(model, batch))
        sums += torch.stack((total, count)).double().cpu()
    return (sums[0] / sums[1]).item()


def measure(model):
    """What a run came to: right answers, loss on the task, loss on the other tasks."""
    right = answers_right(model, held_out)
    return {
        "right": right,
        "accuracy": statistics.fmean(right),
        "loss": nats_per_target(model, held_out_data),
        "others": nats_per_target(model, others_data),
    }


before = measure(assistant)
print(
    f"the assistant before: {wilson_interval(sum(before['right']), len(held_out)):.1%} in house style, "
    f"{before['loss']:.3f} nats per target; on its other tasks {before['others']:.3f}"
)
results["before"] = {name: before[name] for name in ("accuracy", "loss", "others")}

# %% [markdown]
# **Predict.** Sketch the final loss against the learning rate for full fine-tuning and for LoRA. How far apart are the two minima? And those of a LoRA of rank 1 and of a high rank, with the same $\alpha$?

# %%
rates, high = sizes["rates"], sizes["high_rank"]
sweep_steps = max(2, 2 * sizes["steps"] // 3)  # the rate is found on shorter runs
planned = [("full", 0, lr) for lr in rates["full"]]
planned += [(f"LoRA, rank {rank}", rank, lr) for rank in (1, high) for lr in rates["LoRA"]]
sweep = {}
for name, rank, lr in progress(planned, description="learning rates", unit="run"):
    model = with_lora(rank, seed=SEED + 1000) if rank else copy.deepcopy(assistant)
    train(model, train_data, lr, seed=SEED + 1000, steps=sweep_steps)
    sweep.setdefault(name, {})[lr] = {
        "loss": nats_per_target(model, to_choose_data),
        "forgotten": nats_per_target(model, others_data) - before["others"],
    }
best = {name: min(tried, key=lambda lr: tried[lr]["loss"]) for name, tried in sweep.items()}
of_lora = [tried for name, tried in sweep.items() if name != "full"]
best["LoRA"] = min(rates["LoRA"], key=lambda lr: sum(tried[lr]["loss"] for tried in of_lora))
for name, tried in sweep.items():
    print(
        f"{name:>13}: "
        + ", ".join(f"lr {lr:g}: {m['loss']:.3f}" for lr, m in tried.items())
        + f"; best {best[name]:g}"
    )
figure = plotting.lines(
    {name: (list(tried), [m["loss"] for m in tried.values()]) for name, tried in sweep.items()},
    xlabel="learning rate", ylabel="loss on the task, nats per target", logx=True, logy=True, markers=True,
    title=f"{sweep_steps} steps, one seed",
)  # fmt: skip
plotting.show(
    figure,
    alt="Loss against learning rate on logarithmic axes: a valley for full fine-tuning, and valleys for LoRA at two ranks "
    "that lie together, further to the right.",
)
results["sweep"] = {name: {f"{lr:g}": m for lr, m in tried.items()} for name, tried in sweep.items()}
results |= {"best": best, "sweep_steps": sweep_steps}

# %% [markdown]
# **Read the result.** LoRA wants a rate several times that of full fine-tuning (a factor of about ten in published fits; a grid as coarse as this one cannot tell three from ten), and nearly the same one at a low and a high rank. Someone who takes over the rate of full fine-tuning finds that LoRA "does not reach" it; someone who raises $\alpha$ with the rank may find that "high ranks are unstable". Both have measured a learning rate.
#
# **Predict.** At their best rates, over seeds: who learns the task better, and who forgets less?


# %%
def by_seed(name, make, data, lr, **options):
    """Train and measure one method on every seed."""
    measured = []
    for seed in progress(seeds, description=name, unit="run"):
        model = make(seed)
        losses = train(model, data, lr, seed=seed, **options)
        measured.append(measure(model) | {"curve": losses, "trained": trainable_share(model).trainable})
        kept.setdefault(name, model)  # of the first seed, for later
    runs[name] = measured
    return measured


def show_row(name, against=None):
    """Accuracy, both losses over seeds; the difference in accuracy request by request, in points."""
    measured = runs[name]
    line = f"{name:>22} {measured[0]['trained']:>9,}"
    for key, digits in (("accuracy", ".1%"), ("loss", ".3f"), ("others", ".3f")):
        interval = seed_interval([m[key] for m in measured])
        line += f"  {interval.value:{digits}} [{interval.low:{digits}}, {interval.high:{digits}}]"
    if against:
        line += f"  {difference(name, against):+.1%}"
    print(line)


def difference(name, against):
    """Accuracy of one method minus that of another, request by request (mean over seeds), with a bootstrap interval."""
    means = [
        [statistics.fmean(right) for right in zip(*(m["right"] for m in runs[method]), strict=True)]
        for method in (name, against)
    ]
    return paired_bootstrap(*means)


HEAD = (
    f"{'':>22} {'trained':>9}  {'right':<22}  {'loss on the task':<21} {'on the other tasks':<21} difference"
)
runs, kept = {}, {}
by_seed("full", lambda seed: copy.deepcopy(assistant), train_data, best["full"])
for rank in (1, 4):
    by_seed(f"LoRA, rank {rank}", lambda seed, r=rank: with_lora(r, seed=seed), train_data, best["LoRA"])
print(HEAD)
for name in runs:
    show_row(name, None if name == "full" else "full")

# %%
LORA = "LoRA, rank 4"  # the one that the rest of the lab works with
lora_minus_full = difference(LORA, "full")
trade = {
    ("full fine-tuning" if name == "full" else name): (
        [tried[lr]["loss"] for lr in sorted(tried)],
        [max(tried[lr]["forgotten"], 1e-3) for lr in sorted(tried)],
    )
    for name, tried in sweep.items()
}
figure = plotting.lines(
    trade, xlabel="loss on the task, nats per target", ylabel="rise of the loss on the other tasks", logx=True, logy=True, markers=True,
    title="Learned and forgotten: the runs of the sweep, lines from low to high rate",
)  # fmt: skip
plotting.show(
    figure,
    alt="Rise of the loss on other tasks against the loss on the new task on logarithmic axes, one line for each method from its lowest to its "
    "highest rate: all lines move left and up, then right and far up.",
)
results["lora_minus_full"] = dataclasses.asdict(lora_minus_full)

# %% [markdown]
# **Read the result.** Full fine-tuning and LoRA end within a few points of each other, even rank 1 with a hundredth of the numbers; the last column, request by request, says how many. A Student interval over so few seeds is wide, and does not know that shares end at 100 %.
#
# What is forgotten depends on the rate first and on the method second: with a higher rate every method learns the task faster and damages more of the rest, and beyond its best rate it does both worse. In the figure the lines lie close together, and each is long. "LoRA learns less and forgets less" is a finding about long runs, in which full fine-tuning moves far in many directions. If forgetting matters here, lower the rate, or mix in old data, before you change the method.
#
# **Exercise 3.** Merge: one matrix that does what base and adapter do together. Add in float32, round once to the dtype of `weight`, leave `weight` alone.


# %% exercise="lora_merge"
def my_lora_merge(weight, a, b, scaling):
    """weight (O, I), a (R, I), b (O, R) -> a new (O, I) tensor of the weight's dtype."""
    raise NotImplementedError


# %% check="lora_merge"
check("peft/lora_merge", my_lora_merge)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_lora_merge(weight, a, b, scaling):
#     return (weight.float() + scaling * (b.float() @ a.float())).to(weight.dtype)
# ```
#
# </details>
#
# **Predict.** Merged and unmerged, in float32: equal bit for bit? And after unmerging?


# %%
def milliseconds(model):
    """Median time of one forward pass of 16 tokens, without gradient, on one thread of the CPU or on the GPU."""
    times, tokens, threads = [], batch["tokens"][:1, :16], torch.get_num_threads()
    torch.set_num_threads(1)  # so small a product is not worth two
    with torch.inference_mode():
        for _ in range(30):
            synchronize(device)
            began = time.perf_counter()
            model(tokens)
            synchronize(device)
            times.append(1e3 * (time.perf_counter() - began))
    torch.set_num_threads(threads)
    return statistics.median(times)


lora = kept[LORA]
with torch.no_grad():
    unmerged, speed = lora(batch["tokens"]), {"base": milliseconds(assistant), "LoRA": milliseconds(lora)}
    merge_lora(lora)
    merged, speed["LoRA, merged"] = lora(batch["tokens"]), milliseconds(lora)
    unmerge_lora(lora)
    again = lora(batch["tokens"])
merge_error = ((merged - unmerged).abs().max() / unmerged.abs().max()).item()
print(f"largest difference of merged and unmerged logits, over the largest logit: {merge_error:.1e}")
print(f"after unmerging equal bit for bit: {torch.equal(again, unmerged)}")
print("one forward pass of 16 tokens: " + ", ".join(f"{name} {ms:.2f} ms" for name, ms in speed.items()))
results["merge"] = {"error": merge_error, "milliseconds": speed}

# %% [markdown]
# **Read the result.** Addition and multiplication are not associative in floating point, so the two differ in the last digits, and no more. Unmerging is exact because the package keeps the base weight and drops the sum. Merged, the model is as fast as the base (where the two times differ, it is by the noise of the clock: they compute the same); unmerged, it launches two more products for each matrix, and on a model of this size a small product takes nearly as long as a large one.

# %% [markdown]
# ## 3. Rank, scale, and which matrices
#
# **Why.** Rank is capacity. What the runs above say about it holds for one task, which asked for little: a change of wording. A second task asks for knowledge: 192 facts about 32 residents whom no document mentions, asked afterwards in a wording that was not trained.
#
# **Predict.** Which of the two tasks needs the higher rank?

# %%
newcomers = [resident for resident in town.residents if resident.held_out][: 32 if PRESET != "smoke" else 4]


def fact_requests(wording):
    """Every fact about the newcomers, asked in one of the town's wordings and answered in the assistant's own."""
    requests = []
    for resident in newcomers:
        for attribute, value in resident.facts.items():
            names = {"S": resident.name, "P": f"{resident.name}'s"}
            question = FACTS[attribute][wording].format(**names)
            requests.append(
                TownInstruction(
                    task="facts", variety=attribute, messages=({"role": "user", "content": question},),
                    answer=TEMPLATES[attribute][0].format(**names, v=value),
                )
            )  # fmt: skip
    return requests


new_facts, asked_anew = encode(fact_requests(0) + fact_requests(1)), fact_requests(2)
knowledge = {}
for name, rank in (("full", 0), ("LoRA, rank 1", 1), ("LoRA, rank 4", 4)):
    knowledge[name] = {"curves": [], "right": [], "forgotten": []}
    for seed in progress(seeds, description=f"new facts, {name}", unit="run"):
        model = with_lora(rank, seed=seed) if rank else copy.deepcopy(assistant)
        curve = train(model, new_facts, best["LoRA" if rank else "full"], seed=seed)
        knowledge[name]["curves"].append(curve)
        knowledge[name]["right"].append(statistics.fmean(answers_right(model, asked_anew)))
        knowledge[name]["forgotten"].append(nats_per_target(model, others_data) - before["others"])
print(f"{len(asked_anew)} new facts after {sizes['steps']} steps, asked in a wording that was not trained")
for name, row in knowledge.items():
    print(
        f"{name:>13}: right {seed_interval(row['right']):.1%}; other tasks {seed_interval(row['forgotten']):+.3f} nats"
    )


def smooth(values, width=5):
    """Running means, so that curves can be told apart."""
    return [statistics.fmean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]


for title, curves in (
    ("House style", {name: runs[name][0]["curve"] for name in knowledge}),
    ("New facts", {name: row["curves"][0] for name, row in knowledge.items()}),
):
    figure = plotting.lines(
        {name: (list(range(len(curve))), smooth(curve)) for name, curve in curves.items()},
        xlabel="step", ylabel="training loss, mean of five steps", logy=True, title=f"{title}: the same batches for all",
    )  # fmt: skip
    plotting.show(
        figure,
        alt=f"{title}: training loss against step for full fine-tuning and LoRA of different ranks on a logarithmic axis; the "
        "ranks begin together.",
    )
results["knowledge"] = {
    name: {key: row[key] for key in ("right", "forgotten")} for name, row in knowledge.items()
}

# %% [markdown]
# **Read the result.** On the style all curves stay together. The facts tell them apart: in the same steps full fine-tuning has learned the most and rank 1 the least. Storage is not what runs short, since 192 facts of 4 bits each fit many times over into the thousands of numbers of rank 1. What runs short seems to be the number of directions in which a few steps can move. Nor has rank 1 forgotten less than rank 4 for that: look at the other tasks. Whether it gets there with several times as many steps is easily tried.
#
# **Run: the scale, and the place.** First the beginning of a run at rank 1, at a high rank, and at the high rank with rsLoRA, $s = \alpha / \sqrt{r}$. Then about the numbers of rank 4 on all matrices, spent on the attention matrices alone and on the feed-forward matrices alone.

# %%
first_steps = {}
for name, rank, rslora in (
    ("rank 1", 1, False),
    (f"rank {high}", high, False),
    (f"rsLoRA, rank {high}", high, True),
):
    starts = [
        train(
            with_lora(rank, seed=seed, rslora=rslora),
            train_data,
            best["LoRA"],
            seed=seed,
            steps=min(10, sizes["steps"]),
        )
        for seed in seeds
    ]
    first_steps[name] = [statistics.fmean(curve[1:]) for curve in starts]
    differences = [a - b for a, b in zip(first_steps[name], first_steps["rank 1"], strict=True)]
    print(
        f"{name:>16}: mean training loss of steps 2 to 10 {statistics.fmean(first_steps[name]):.3f}; "
        f"minus that of rank 1, seed by seed: {', '.join(f'{one:+.3f}' for one in differences)}"
    )
results["first_steps"] = first_steps

# %%
places = {"attention": ("query", "key", "value", "output"), "feed-forward": ("gate", "up", "down")}
numbers = {
    place: trainable_share(with_lora(1, targets=targets)).trainable
    for place, targets in (places | {"all": LINEARS}).items()
}
equal_numbers = []
for place, targets in places.items():
    rank = max(1, round(4 * numbers["all"] / numbers[place]))  # as many numbers as rank 4 on all of them
    name = f"{place}, rank {rank}"
    equal_numbers.append(name)
    by_seed(
        name, lambda seed, r=rank, t=targets: with_lora(r, seed=seed, targets=t), train_data, best["LoRA"]
    )
print(HEAD)
for name in (LORA, *equal_numbers):
    show_row(name)
results["equal_numbers"] = equal_numbers


def mean_loss(name):
    """Loss on the task at the end, mean over the seeds."""
    return statistics.fmean(run["loss"] for run in runs[name])


# %% [markdown]
# **Read the result.** The first step is a mean over $r$ random directions. With $s = \alpha / r$ its drift down the gradient is the same for all ranks, and its noise shrinks with $r$: a high rank begins much like rank 1, not $r$ times as fast. rsLoRA makes the step $\sqrt{r}$ times as long, with everything that a higher rate brings. It is another parametrization, and a comparison with it is one of learning rates unless both are tuned.
#
# As for the place: at equal numbers all matrices together end lowest. Attention alone has forgotten the least; at one rate for all, that may be because it has moved the least. Which of the two halves is better three seeds do not tell, and it came out differently on an assistant that had been trained for half as long. Published comparisons at scale are clearer, and there attention alone loses.
#
# **Exercise 4.** DoRA: $m$ times the rows of $W + sBA$, each divided by its length. No gradient flows through the lengths.
#
# <details><summary>Hint</summary>
#
# The length of a row is `.norm(dim=1)`; `.detach()` makes a constant of it.
#
# </details>


# %% exercise="dora_weight"
def my_dora_weight(weight, a, b, scaling, magnitude):
    """weight (O, I), a (R, I), b (O, R), magnitude (O,) -> (O, I)."""
    raise NotImplementedError


# %% check="dora_weight"
check("peft/dora_weight", my_dora_weight)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_dora_weight(weight, a, b, scaling, magnitude):
#     updated = weight + scaling * (b @ a)
#     return (magnitude / updated.detach().norm(dim=1))[:, None] * updated
# ```
#
# </details>

# %% [markdown]
# ## 4. Four bits for what is frozen
#
# **Why.** A frozen weight does not have to take small steps, so it does not need the digits for them. NF4 stores 4 bits for each weight and a scale for each block.
#
# **Exercise 5.** Divide each block by its largest magnitude, then take the nearest entry of `codebook`. The last block may be shorter; a block of zeros has scale 0 and codes of 0.
#
# <details><summary>Hint</summary>
#
# Pad with zeros to whole blocks, view as (blocks, block_size), divide by the scales with 0 replaced by 1, and cut the padding off the codes again. `argmin` over distances to all 16 levels is enough.
#
# </details>


# %% exercise="nf4_quantize"
def my_nf4_quantize(values, codebook, block_size):
    """values (n,), codebook (16,) -> codes (n,) uint8, scales (blocks,) float32."""
    raise NotImplementedError


# %% check="nf4_quantize"
check("peft/nf4_quantize", my_nf4_quantize)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_nf4_quantize(values, codebook, block_size):
#     blocks = F.pad(values, (0, -len(values) % block_size)).view(-1, block_size)
#     scales = blocks.abs().amax(dim=1)
#     relative = blocks / torch.where(scales == 0, 1.0, scales)[:, None]
#     codes = (relative[..., None] - codebook).abs().argmin(dim=-1)
#     return codes.to(torch.uint8).view(-1)[: len(values)], scales
# ```
#
# </details>
#
# **Exercise 6.** Bits per weight of a large matrix: 4 for the code, and the weight's part of a float32 scale per block; with double quantization the scale is 8 bits, and 256 scales share one float32.


# %% exercise="bits_per_parameter"
def my_bits_per_parameter(block_size, double_quantization):
    """A float."""
    raise NotImplementedError


# %% check="bits_per_parameter"
check("peft/bits_per_parameter", my_bits_per_parameter)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_bits_per_parameter(block_size, double_quantization):
#     if not double_quantization:
#         return 4 + 32 / block_size
#     return 4 + 8 / block_size + 32 / (256 * block_size)
# ```
#
# </details>
#
# **Predict.** The levels of NF4 are quantiles of a normal distribution; 4-bit integers are evenly spaced. On the assistant's own matrices, whose error is smaller, and what happens to both as blocks grow?

# %%
matrices = [
    layer.weight.detach().float().cpu()
    for name, layer in assistant.blocks.named_modules()
    if isinstance(layer, torch.nn.Linear)
]


def nf4_error(block):
    """Relative root mean square error of all matrices of the blocks."""
    settings = NF4Settings(block_size=block, double_quantization=False)
    wrong = sum((dequantize_nf4(quantize_nf4(w, settings)) - w).square().sum() for w in matrices)
    return math.sqrt(wrong / sum(w.square().sum() for w in matrices))


def integer_error(block):
    """The same for codes -7 to 7, evenly spaced, with the same scales."""
    wrong = 0.0
    for w in matrices:
        blocks = F.pad(w.flatten(), (0, -w.numel() % block)).view(-1, block)
        scales = blocks.abs().amax(dim=1, keepdim=True).clamp(min=1e-30)
        wrong += (((blocks / scales * 7).round() / 7 * scales - blocks).square()).sum()
    return math.sqrt(wrong / sum(w.square().sum() for w in matrices))


def entropy_of_codes(block):
    """Bits of information in a code: 4 if all levels are used equally often."""
    used = sum(
        torch.bincount(quantize_blocks(w.flatten(), nf4_codebook, block)[0].int(), minlength=16)
        for w in matrices
    )
    share = used / used.sum()
    return -(share * share.log2().nan_to_num()).sum().item()


print("block   bits   relative error of NF4   of 4-bit integers   entropy of the NF4 codes")
errors = {}
for block in (16, 64, 256):
    errors[block] = {
        "nf4": nf4_error(block),
        "integer": integer_error(block),
        "entropy": entropy_of_codes(block),
    }
    print(
        f"{block:>5} {4 + 32 / block:>6.3f} {errors[block]['nf4']:>18.2%} {errors[block]['integer']:>19.2%} {errors[block]['entropy']:>18.2f}"
    )
results["quantization"] = errors

# %%
quantized = quantize_model(copy.deepcopy(assistant))
stored = [layer.quantized for layer in quantized.modules() if isinstance(layer, NF4Linear)]
n_weights = sum(math.prod(one.shape) for one in stored)
bits = sum(one.bits_per_parameter * math.prod(one.shape) for one in stored) / n_weights
nf4_others = nats_per_target(quantized, others_data) - before["others"]
print(
    f"the blocks' {n_weights:,} weights take {bits:.3f} bits each, the whole model {weight_bytes(quantized) / 2**20:.2f} MiB "
    f"instead of {weight_bytes(assistant) / 2**20:.2f}; loss on the other tasks {nf4_others:+.3f} nats"
)
by_seed(
    "QLoRA, rank 4",
    lambda seed: with_lora(4, base=quantized, seed=seed),
    train_data,
    best["LoRA"],
)
print(HEAD)
show_row(LORA)
show_row("QLoRA, rank 4", LORA)
qlora_minus_lora = difference("QLoRA, rank 4", LORA)
results["qlora"] = {
    "bits": bits, "bytes": weight_bytes(quantized), "base_bytes": weight_bytes(assistant), "others": nf4_others,
    "minus_lora": dataclasses.asdict(qlora_minus_lora),
}  # fmt: skip

# %% [markdown]
# **Read the result.** An error of several percent in every weight sounds like much and changes the loss by little. It is noise without a direction, and averages out where many terms of a sum agree, which is what a trained layer is made of. QLoRA ends within a few points of LoRA; the interval says whether there is a difference at all. The codes carry nearly all of their 4 bits at a block of 64; with larger blocks the scale is set by ever rarer outliers, the outer levels starve, and the error grows.
#
# **Predict.** A training step keeps weights, gradients, optimizer states, and what the forward pass saves for the backward pass. Which of the four does LoRA shrink, which does QLoRA, and which neither?


# %%
def training_bytes(model):
    """Bytes by part of one AdamW step on one batch, each counted from the tensors that are there."""
    model.zero_grad(set_to_none=True)
    resident = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in resident:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total, count, _ = sft_loss(model, batch)
    (total / count).backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
    optimizer.step()
    moments = sum(
        state[name].nbytes for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")
    )
    gradients = sum(parameter.grad.nbytes for parameter in trained)
    model.zero_grad(set_to_none=True)
    return {"weights": weight_bytes(model), "gradients": gradients, "moments": moments, "saved": sum(saved.values())}  # fmt: skip


memory = {
    name: training_bytes(model)
    for name, model in (
        ("full", copy.deepcopy(assistant)),
        ("LoRA, rank 4", with_lora(4)),
        ("LoRA, rank 16", with_lora(16)),
        ("QLoRA, rank 4", with_lora(4, base=quantized)),
    )
}
print(f"MiB of a step on {batch['tokens'].numel():,} tokens, float32")
print(f"{'':>15}" + "".join(f"{part:>12}" for part in memory["full"]))
for name, parts in memory.items():
    print(f"{name:>15}" + "".join(f"{size / 2**20:>12.2f}" for size in parts.values()))
results["memory"] = memory

# %% [markdown]
# **Read the result.** Gradients and moments shrink to the adapter's, the weights to a fraction in NF4. What the forward pass saves hardly moves: the adapters' own gradient needs each layer's input, as the weight's gradient did. On long sequences that column is the largest, and only checkpointing makes it smaller.
#
# **The same at one billion.** The shape of Llama 3.2 1B with random weights, NF4, rank 16, in bfloat16: the prediction, part by part, and on a GPU the measurement beside it.


# %%
def predicted_bytes(config, rank, batch_size, length):
    """Peak bytes of a QLoRA step: stored weights, 16 bytes for each trained number, saved activations, the loss."""
    parts = parameters_by_part(config)
    coded = parts["attention"] + parts["mlp"]
    wide, narrow = config.n_heads * config.d_head, config.n_kv_heads * config.d_head
    widths = 2 * (config.d_model + wide) + 2 * (config.d_model + narrow) + 3 * (config.d_model + config.d_ff)
    saved = saved_activations(config, batch_size, length, precision="bf16", attention="fused")
    saved.pop("weight_copies")  # the decoded weights are not kept
    return {
        "weights in NF4": (4 + 8 / 64 + 32 / (64 * 256)) / 8 * coded,
        "other weights": 2 * (count_parameters(config) - coded),
        "adapters": 16 * rank * config.n_layers * widths,
        "activations": sum(saved.values()),
        "loss": loss_work_bytes(config, batch_size, length),
    }


def measured_qlora(config, rank, batch_size, length, *, steps=10):
    """Peak bytes and tokens per second of QLoRA steps on random tokens, on `device`."""
    with device:
        model = Transformer(config).to(torch.bfloat16)
    add_lora(quantize_model(model), LoRASettings(rank=rank, alpha=16.0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    tokens = torch.randint(config.vocab_size, (batch_size, length + 1), device=device)
    seconds = []
    with PeakMemory(device) as peak:
        for _ in range(steps):
            began = time.perf_counter()
            with torch.autocast(device.type, dtype=torch.bfloat16):
                total, count, _ = sft_loss(model, {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]})
            (total / count).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            synchronize(device)
            seconds.append(time.perf_counter() - began)
    return peak.bytes, batch_size * length / statistics.median(seconds[1:])


BILLION = ModelConfig(
    vocab_size=128_256, context_length=1024, d_model=2048, n_layers=16, n_heads=32, n_kv_heads=8, d_ff=8192, rope_theta=5e5,
)  # fmt: skip
prediction = predicted_bytes(BILLION, rank=16, batch_size=1, length=1024)
print(f"{count_parameters(BILLION) / 1e9:.2f} billion parameters, one row of 1 024 tokens: predicted")
for name, size in prediction.items():
    print(f"{name:>16}: {size / 2**30:6.2f} GiB")
print(f"{'in all':>16}: {sum(prediction.values()) / 2**30:6.2f} GiB")
results["billion"] = {"predicted": prediction}
if device.type == "cuda":
    peak_bytes, tokens_per_second = measured_qlora(BILLION, rank=16, batch_size=1, length=1024)
    print(
        f"measured on this GPU: {peak_bytes / 2**30:.2f} GiB at the peak, {tokens_per_second:,.0f} tokens/s"
    )
    results["billion"] |= {"measured": peak_bytes, "tokens_per_second": tokens_per_second}

# %% [markdown]
# With one row of a thousand tokens the weights are already not the largest part. The logits and their gradients are three tensors of 1 024 by 128 256 numbers in float32 (two in the row "loss", one among the activations), more than all weights together: after checkpointing, the place to save next is the loss.

# %% [markdown]
# ## 5. Networks behind, tokens in front
#
# **Why.** There are two other places for a few trained numbers. Bottleneck adapters put a narrow network behind each sublayer; prompt tuning learns the embeddings of tokens that do not exist and leaves the model untouched.
#
# **Exercise 7.** Put the ids $V, \dots, V + P - 1$ in front of every row. Nothing is to be predicted there: their targets are $-100$.


# %% exercise="prepend_prompt"
def my_prepend_prompt(batch, vocab_size, length):
    """{"tokens", "targets"}, both (B, T) int64 -> the same keys, (B, length + T)."""
    raise NotImplementedError


# %% check="prepend_prompt"
check("peft/prepend_prompt", my_prepend_prompt)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_prepend_prompt(batch, vocab_size, length):
#     rows = len(batch["tokens"])
#     ids = torch.arange(vocab_size, vocab_size + length).expand(rows, -1)
#     return {
#         "tokens": torch.cat((ids, batch["tokens"]), dim=1),
#         "targets": torch.cat((torch.full_like(ids, -100), batch["targets"]), dim=1),
#     }
# ```
#
# </details>
#
# **Predict.** Order the four methods by what they reach in the same number of steps: full, LoRA of rank 1, adapters of width 4 (about as many numbers as that LoRA), a prompt of 20 tokens.


# %%
def with_adapters(seed):
    """Bottleneck adapters behind every sublayer of a copy."""
    set_seed(seed)
    return add_adapters(copy.deepcopy(assistant), AdapterSettings(width=4))


def with_prompt(seed):
    """Twenty virtual tokens in front of a copy."""
    set_seed(seed)
    return add_prompt(copy.deepcopy(assistant), PromptSettings(length=PROMPT_LENGTH))


def prompted_loss(model, batch):
    """The loss of a batch with the virtual tokens in front."""
    return sft_loss(model, prepend_prompt(model, batch))


by_seed("adapters, width 4", with_adapters, train_data, rates["adapters"])
by_seed("prompt of 20", with_prompt, train_data, rates["prompt"], loss=prompted_loss)
print(HEAD)
for name in ("full", "LoRA, rank 1", "adapters, width 4", "prompt of 20"):
    show_row(name, None if name == "full" else "full")
speed["adapters"] = milliseconds(kept["adapters, width 4"])
print(
    "\none forward pass of 16 tokens: "
    + ", ".join(f"{name} {speed[name]:.2f} ms" for name in ("base", "LoRA, merged", "adapters"))
)
results["runs"] = {
    name: [{key: m[key] for key in ("trained", "accuracy", "loss", "others")} for m in measured]
    for name, measured in runs.items()
}

# %% [markdown]
# **Read the result.** Bottleneck adapters of about as many numbers stay some points behind LoRA of rank 1, at a rate that was not swept for them; and they cannot be merged, so every token pays for them, for as long as the model is used. The prompt is far behind. It changes no computation, only what there is to attend to, and its gradient reaches twenty vectors through the whole depth of the model; Lester et al. (2021) found it level with full fine-tuning only at ten billion parameters. Its rate had to be hundreds of times that of full fine-tuning. What speaks for it is the file: a few rows of numbers, which can differ within a batch without any special kernel.

# %% [markdown]
# ## The same with the library
#
# Adapters travel. Ours is saved in the format of `peft` and opened there on the same base; one that `peft` made is opened here. Both must give equal logits. The codes of NF4 are compared with those of `bitsandbytes`.

# %%
# bitsandbytes, which peft imports, warns of a kernel that is not used here
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

warnings.filterwarnings("ignore")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
tokens = batch["tokens"].cpu()


@torch.no_grad()
def relative_difference(ours, theirs):
    """Largest difference of the logits over the largest logit."""
    expected = theirs.eval()(tokens).logits
    return ((ours.cpu()(tokens) - expected).abs().max() / expected.abs().max()).item()


library = {}
with tempfile.TemporaryDirectory() as folder:
    base_folder = str(Path(folder, "base"))
    save_pretrained(assistant, base_folder)
    save_adapter(lora, Path(folder, "ours"), base_name=base_folder)
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, Path(folder, "ours"))
    library["ours in peft"] = relative_difference(lora, theirs)

    set_seed(SEED)
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=3, lora_alpha=6, use_rslora=True, target_modules="all-linear"
    )
    theirs = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:  # as if it had been trained
                parameter.normal_(std=0.02)
    theirs.save_pretrained(Path(folder, "theirs"))
    opened = load_adapter(copy.deepcopy(assistant).cpu(), Path(folder, "theirs"))
    library["theirs here"] = relative_difference(opened, theirs)
    files = {path.name: path.stat().st_size for path in sorted(Path(folder, "ours").iterdir())}
lora.to(device)
print(f"our adapter's folder: {files}; the base's weights: {weight_bytes(assistant):,} bytes")
for name, value in library.items():
    print(f"{name}: largest difference of logits, over the largest logit, {value:.1e}")

# %%
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

equal_codes, decoded = True, []
for weight in matrices[:7]:
    packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    ours = quantize_nf4(weight, NF4Settings(double_quantization=False))
    equal_codes &= torch.equal(ours.packed, packed.flatten()) and torch.equal(ours.scales, state.absmax)
    if weight.shape[1] % 64 == 0:  # see below
        decoded.append(torch.equal(dequantize_nf4(ours), dequantize_4bit(packed, state)))
print(
    f"codes and scales of a block's {len(matrices[:7])} matrices equal bitsandbytes' bit for bit: {equal_codes}"
)
print(f"decoded numbers of {len(decoded)} of them compared, all equal: {all(decoded)}")
results["library"] = library | {"codes": equal_codes, "decoded": decoded, "file_bytes": files}

# %% [markdown]
# Agreement has to be measured where one relies on it. On CPUs with AVX-512 version 0.50 of the library decodes a matrix whose rows are not whole blocks (a width of 96, say) with scales that belong to other blocks, and says nothing; its codes and scales are right. Decoding is therefore compared for matrices of whole blocks only, which those of common models are.

# %% [markdown]
# ## Measured results
#
# What this lab claims. Each line is computed from the runs above, and the lab stops if one does not hold.

# %%
# NBVAL_CHECK_OUTPUT
claim("start", same_start, "a fresh LoRA leaves the logits as they are, bit for bit")
claim(
    "first-gradient",
    all(norms["a"] == 0 < norms["b"] for norms in first_gradients.values()),
    "at the first step A has no gradient and B has one, in every matrix",
)
claim("merge", merge_error < 1e-5, "merged and unmerged logits agree to 1e-5 of the largest logit")
claim("unmerge", torch.equal(again, unmerged), "unmerging gives back the same bits")
claim("peft-out", library["ours in peft"] < 1e-5, "peft computes with our adapter what we compute, to 1e-5")
claim("peft-in", library["theirs here"] < 1e-5, "an adapter from peft gives its logits here, to 1e-5")
claim(
    "bitsandbytes",
    equal_codes and all(decoded),
    "NF4 codes, scales and decoded numbers equal those of bitsandbytes, bit for bit",
)
claim(
    "levels",
    all(row["nf4"] < row["integer"] for row in errors.values()),
    "at every block size NF4's error is below that of 4-bit integers",
)
if own:
    claim("share", adapter_sizes[4]["share"] < 0.05, "a LoRA of rank 4 trains less than 5 % of the numbers")
    claim(
        "as-good",
        lora_minus_full.high > -0.03,
        "LoRA of rank 4 is within 3 points of full fine-tuning, as far as these requests can tell: the interval of the difference, mean over seeds, reaches above -3 points",
    )
    claim(
        "rate",
        all(best[f"LoRA, rank {rank}"] >= 3 * best["full"] for rank in (1, high)),
        "LoRA's best rate is at least three times that of full fine-tuning, at low and high rank",
    )
    claim(
        "knowledge",
        all(
            a > b for a, b in zip(knowledge["full"]["right"], knowledge["LoRA, rank 1"]["right"], strict=True)
        ),
        "in the same steps full fine-tuning learns more new facts than a LoRA of rank 1, in every seed",
    )
    claim(
        "place",
        all(mean_loss(name) > mean_loss(LORA) for name in equal_numbers),
        "at equal numbers attention alone and feed-forward alone end above all matrices together, on average over the seeds",
    )
    claim("bits", 4.12 < bits < 4.2, "the weights of the blocks take between 4.12 and 4.2 bits each")
    claim(
        "qlora",
        qlora_minus_lora.high > -0.03,
        "QLoRA is within 3 points of LoRA, as far as these requests can tell: the interval reaches above -3 points",
    )
    claim(
        "memory",
        memory["QLoRA, rank 4"]["weights"] < memory["full"]["weights"] / 3
        and memory["LoRA, rank 4"]["moments"] < 0.05 * memory["full"]["moments"],
        "NF4 takes a third of the weights' bytes, and LoRA a twentieth of the moments', at most",
    )
    claim(
        "activations",
        memory["LoRA, rank 4"]["saved"] > 0.8 * memory["full"]["saved"],
        "LoRA lowers what the forward pass saves by less than a fifth",
    )
    claim(
        "prompt",
        all(
            a["accuracy"] < b["accuracy"]
            for a, b in zip(runs["prompt of 20"], runs["adapters, width 4"], strict=True)
        ),
        "a trained prompt stays behind bottleneck adapters, in every seed",
    )

# %% [markdown]
# ## Break it
#
# **Nothing moves.** Both factors at zero.

# %%
dead = with_lora(4)
with torch.no_grad():
    for layer in lora_layers(dead).values():
        layer.a.zero_()
dead_curve = train(dead, train_data, best["LoRA"], steps=5)
moved = any(bool(parameter.any()) for parameter in lora_parameters(dead).values())
dead_loss = nats_per_target(dead, held_out_data)
print(f"training loss {', '.join(f'{loss:.3f}' for loss in dead_curve)}; a factor has moved: {moved}")
print(f"held-out loss before {before['loss']:.3f}, after {dead_loss:.3f}")

# %% [markdown]
# **Too long a step.** An $\alpha$ a hundred times as large, at the same rate: what happens when someone reads $\alpha$ as a percentage, or loses the division by $r$ in a conversion.

# %%
strong = with_lora(4, alpha=100 * ALPHA)
strong_curve = train(strong, train_data, best["LoRA"], steps=max(2, sizes["steps"] // 2))
figure = plotting.lines(
    {
        "alpha as above": (list(range(sizes["steps"])), runs[LORA][0]["curve"]),
        "alpha times 100": (list(range(len(strong_curve))), strong_curve),
    },
    xlabel="step", ylabel="training loss, nats per target", logy=True, title="The same rate, two scales",
)  # fmt: skip
plotting.show(
    figure,
    alt="Training loss against step: with the usual alpha it falls, with a hundred times as much it jumps up and stays high.",
)

# %% [markdown]
# **Another base.** The adapter of section 2 on the *pre-trained* model, from which the assistant was made. All shapes fit. The package compares fingerprints and refuses; told to go on, it computes something.

# %%
other_base = pipeline.load("base", **stage).model.to(device).eval()
with tempfile.TemporaryDirectory() as folder:
    save_adapter(lora, folder)
    try:
        load_adapter(other_base, folder)
        refused = ""
    except ValueError as error:
        refused = str(error)
    print(refused)
    load_adapter(other_base, folder, any_base=True)
misplaced = statistics.fmean(answers_right(other_base, held_out))
print(f"right with the adapter on its own base {runs[LORA][0]['accuracy']:.1%}, on the other base {misplaced:.1%}")  # fmt: skip

# %% [markdown]
# **Words that the head does not have.** The same answers as JSON, `{"instrument": "gong"}`. In the town's documents a word follows a space, and there are no braces. So the answer is spelled in tokens that pre-training never saw, and their rows in the embedding, and with it in the head, are what is left of a random start. A LoRA of the usual kind leaves embedding and head frozen. Full fine-tuning does not; nor does LoRA with the embedding trained besides.


# %%
def as_json(request):
    """The same request, its last answer as a JSON object."""
    said = town.records.understand(request.answer)
    return dataclasses.replace(request, answer=json.dumps({said.attribute: said.value}))


def with_embedding(model):
    """Thaw embedding and head of a model with LoRA."""
    model.embedding.weight.requires_grad_(True)
    model.head.weight.requires_grad_(True)
    return model


json_requests = [
    as_json(one)
    for one in instructions.training(n_train, 200 + SEED, tasks=["facts"])
    if len(one.messages) == 1
]
json_data = encode(json_requests)
in_documents = {token for one in town.documents(2_000, SEED) for token in tokenizer.encode(one.text)}
pieces = tokenizer.encode(json_requests[0].answer)
print(
    f"{json_requests[0].answer} takes {len(pieces)} tokens, of which {sum(p not in in_documents for p in pieces)} "
    "are in none of 2 000 documents"
)
makers = {
    "LoRA": lambda seed: with_lora(4, seed=seed),
    "LoRA and embedding": lambda seed: with_embedding(with_lora(4, seed=seed)),
    "full": lambda seed: copy.deepcopy(assistant),
}
short = max(2, sizes["steps"] // 3)
json_curves = {
    name: [
        train(make(seed), json_data, best["full" if name == "full" else "LoRA"], seed=seed, steps=short)
        for seed in seeds
    ]
    for name, make in makers.items()
}
json_last = {
    name: [statistics.fmean(curve[-10:]) for curve in curves] for name, curves in json_curves.items()
}
for name, values in json_last.items():
    print(f"{name:>18}: mean training loss of the last ten of {short} steps {seed_interval(values):.2f}")
results["broken"] = {
    "alpha": strong_curve,
    "misplaced": misplaced,
    "json_last": json_last,
}

# %% [markdown]
# **Diagnosis.** Four causes, of which the training curve shows one plainly.
#
# 1. *A held-out loss that does not change in any digit* is a missing gradient. The training loss hides it: it goes up and down, because the batches differ. Look at the gradient of $B$ in the first step.
# 2. *A loss above its start* is a step too long. Compute the length of the first $\Delta W$, in which rate, $\alpha$ and rank all enter, before you blame one of them.
# 3. *A good loss in training and bad answers when served* is a question of which base, which template, which scale. Compare logits on one batch before you compare answers.
# 4. *A loss that falls and stops high* can be capacity. Here it is embedding and head: thawed beside the LoRA, at the LoRA's rate, they bring the loss down. Full fine-tuning trains them too, at a lower rate, and in so few steps gets less far. Train them (`modules_to_save` in `peft`) at a rate that moves them, or ask for answers in words that the model has.

# %%
# NBVAL_CHECK_OUTPUT
claim("dead", not moved, "with both factors at zero no step changes either")
claim("fingerprint", "another base" in refused, "an adapter on a base that is not its own is refused")
if own:
    claim(
        "misplaced",
        misplaced < runs[LORA][0]["accuracy"] - 0.2,
        "forced onto the other base, the adapter loses more than 20 points",
    )
    claim(
        "scale",
        statistics.fmean(strong_curve[-10:]) > 3 * statistics.fmean(runs[LORA][0]["curve"][-10:]),
        "with a hundredfold alpha the loss ends at more than three times its value",
    )
    claim(
        "head",
        all(a > b for a, b in zip(json_last["LoRA"], json_last["LoRA and embedding"], strict=True)),
        "on tokens new to the model LoRA ends above LoRA with the embedding trained, in every seed",
    )

# %%
store_results("peft", results)

# %% [markdown]
# ## Takeaways
#
# * A fresh LoRA is the base, bit for bit. $B$ moves first; $A$ must not start at zero.
# * Compare methods at their own learning rates. LoRA's is several times that of full fine-tuning, about ten times in published fits, and with $s = \alpha / r$ nearly the same at every rank.
# * Rank is for what is to be learned: a change of wording needs next to none, new facts need more, in a given number of steps.
# * Forgetting follows the rate before it follows the method. Measure it on the old tasks, in nats.
# * NF4 costs several percent of each weight and little of the model. Gradients and moments shrink with the adapter, weights with the bits, activations with neither.
# * An adapter without its base is no model. Keep the fingerprint, merge in float32, and compare logits after every conversion.
# * What LoRA cannot reach, it cannot teach: embedding and head are frozen unless you say otherwise.

# %% [markdown]
# ## Next
#
# The chapter, [LoRA and its relatives](../book/posttraining/peft.md), derives what was measured here, from the first step to the last bit, and has exercises with solutions. Chapter 14, [Direct preference optimization and its family](../book/posttraining/dpo.md), needs a second copy of the model as a reference; with an adapter, that copy is the same model with the adapter switched off.
