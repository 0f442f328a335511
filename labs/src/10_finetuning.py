# %% [markdown]
# # Lab 10 · Fine-tuning fundamentals
#
# [Open in Colab]({{colab}}) · [Source of this lab]({{repository}}/blob/{{branch}}/labs/src/10_finetuning.py)
#
# | | |
# |---|---|
# | **Chapter** | [10 Fine-tuning fundamentals](../book/posttraining/finetuning.md) |
# | **Hardware** | CPU, 2 cores, 4 GiB of memory; a GPU is used with `PRESET = "gpu"` |
# | **Minutes** | 3 to execute, and up to 4 once for the base model; 3 hours with the exercises |
# | **You will build** | the masked loss, forgetting in nats per token, the loss with replay, the list of parameters that move, last-token pooling, the average of checkpoints |
# | **What to inspect** | questions answered and old text forgotten, always side by side; what a few windows of old text change; a frozen model that classifies better than a fine-tuned one; what facts that the model cannot know do to those that it knows |

# %% [markdown]
# ## Setup
#
# `PRESET = "gpu"` takes the larger base model and the GPU. `MODEL` is a local folder or a Hub name of a model of the Llama or Qwen3 family; empty means the course's own base model. The requests are always Tinytown's, questions about residents and sums. The *old text*, on which forgetting is measured, is the text of pre-training, `CORPUS`; for a model from outside, whose own text is not at hand, the documentation that comes with Python stands in. `PRESET = "smoke"` does two or three steps of everything, to try the lab on another model. Every random number follows from `SEED`.

# %% tags=["parameters"]
PRESET = "cpu"
CORPUS = "tinytown"
SEED = 0
MODEL = ""

# %%
import copy
import random
import re
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F  # noqa: F401 (for your answers)

from llmcourse import pipeline, plotting
from llmcourse.accounting.flops import matmul_weights
from llmcourse.checks import check, claim
from llmcourse.data.chat_formats import chat_format
from llmcourse.data.instruction import InstructionBatches, encode_conversations
from llmcourse.data.packing import PackedBatches, whole_document_batches
from llmcourse.data.tinytown import Town
from llmcourse.data.token_stream import tokenize
from llmcourse.data.town_instructions import TownInstruction, TownInstructions, TownInstructionSettings
from llmcourse.data.town_questions import FACTS
from llmcourse.data.town_records import TEMPLATES
from llmcourse.evaluation.perplexity import token_losses
from llmcourse.evaluation.statistics import bootstrap_interval, seed_interval, wilson_interval
from llmcourse.inference.generation import generate
from llmcourse.inference.sampling import SamplingParams
from llmcourse.labs import store_results
from llmcourse.models.classifier import SequenceClassifier
from llmcourse.models.pretrained import save_pretrained
from llmcourse.runtime import pick_device, progress
from llmcourse.training import pretraining
from llmcourse.training.averaging import WeightAverage, average_checkpoints
from llmcourse.training.classification import LabeledBatches, classification_loss, predict_classes
from llmcourse.training.finetuning import ReplayBatches, instruction_loss, sft_loss, with_replay
from llmcourse.training.fit import FitSettings, fit
from llmcourse.training.freezing import choose_trainable, count_trainable

SIZES = {
    "cpu": {
        "n_seeds": 3, "few": 2, "steps": 240, "lr": 2e-3, "batch": 16, "replay_rows": 1, "n": 128, "old_documents": 60, "new_tokens": 128,
        "narrow_steps": 60, "rates": (6e-4, 2e-3, 6e-3), "frozen_lr": 6e-3, "probe_steps": 40, "probe_lr": 1e-1,
        "classifier_lr": 3e-4, "bounce_lr": 3e-3, "fact_steps": 30, "fact_lr": 1e-3, "facts": 96,
    },
    "gpu": {
        "n_seeds": 3, "few": 3, "steps": 600, "lr": 2e-4, "batch": 32, "replay_rows": 2, "n": 256, "old_documents": 200, "new_tokens": 160,
        "narrow_steps": 100, "rates": (6e-5, 2e-4, 6e-4), "frozen_lr": 6e-4, "probe_steps": 100, "probe_lr": 3e-2,
        "classifier_lr": 2e-5, "bounce_lr": 3e-4, "fact_steps": 60, "fact_lr": 6e-5, "facts": 96,
    },
    "smoke": {
        "n_seeds": 2, "few": 2, "steps": 2, "lr": 1e-3, "batch": 4, "replay_rows": 1, "n": 4, "old_documents": 4, "new_tokens": 8,
        "narrow_steps": 2, "rates": (1e-3, 1e-2), "frozen_lr": 1e-2, "probe_steps": 2, "probe_lr": 1e-1,
        "classifier_lr": 1e-3, "bounce_lr": 1e-3, "fact_steps": 2, "fact_lr": 1e-3, "facts": 6,
    },
}  # fmt: skip
if PRESET not in SIZES:
    raise ValueError(f"PRESET={PRESET!r}: choose one of {', '.join(SIZES)}")
sizes, smoke = SIZES[PRESET], PRESET == "smoke"
own = (
    not MODEL and CORPUS == "tinytown" and not smoke
)  # whether the figures are those that the claims are about
seeds = range(SEED, SEED + sizes["n_seeds"])
few = seeds[: sizes["few"]]  # for the comparisons of sections 3 to 5
device = pick_device("auto" if PRESET == "gpu" else "cpu")
results = {"preset": PRESET, "corpus": CORPUS, "seed": SEED, "model": MODEL, "seeds": list(seeds)}
results["sizes"] = {name: list(value) if isinstance(value, tuple) else value for name, value in sizes.items()}

# %% [markdown]
# ## Objectives
#
# After this lab you can
#
# 1. write the loss of supervised fine-tuning, and say which tokens it is about;
# 2. measure forgetting on old documents, and reduce it with replay, knowing what each costs;
# 3. choose a learning rate, and which weights move, from what is learned *and* what is forgotten;
# 4. put a classification head on a decoder, at the right token, and decide whether to train what is below;
# 5. average checkpoints, and say when that helps and when it does nothing;
# 6. recognize training data that teach a model to invent.

# %% [markdown]
# ## 1. The same loss on other data
#
# **Why.** The base model continues documents. It has read everything that is asked here about the residents, and it has never had to answer in this form. Fine-tuning goes on with the same loss on conversations, with one difference: only what the assistant writes is a target.

# %%
base = pipeline.load("base", preset="cpu" if smoke else PRESET, corpus=CORPUS, seed=SEED, model=MODEL)
start, tokenizer = base.model.to(device).eval(), base.tokenizer
TASKS = ("facts", "sums")  # questions about residents, and sums; the town's other two tasks need long rows
town = Town(pipeline.TOWN_SEED)
mixture = TownInstructionSettings(facts_weight=0.7, sums_weight=0.3)
instructions, chat = TownInstructions(town, mixture), chat_format(tokenizer)
context = min(start.config.context_length, 512)
conversations = instructions.training(sizes["batch"] * sizes["steps"], SEED, TASKS)


def encode(some):
    """Requests with their answers as ids and targets."""
    return encode_conversations((one.conversation for one in some), chat, context_length=context)


def complete(model, prompts, max_new_tokens):
    """Greedy continuations of prompts (ids), as texts; no room in the context: an empty one."""
    fitting = [i for i, prompt in enumerate(prompts) if len(prompt) < model.config.context_length]
    params = SamplingParams(temperature=0.0, max_new_tokens=max_new_tokens)
    texts = [""] * len(prompts)
    for i, new in zip(
        fitting, generate(model, [prompts[i] for i in fitting], params, stop_ids=chat.stop_ids), strict=True
    ):
        texts[i] = tokenizer.decode(one for one in new if one < tokenizer.vocab_size)
    return texts


def answers(model, requests):
    """What the assistant answers, greedily."""
    return complete(model, [chat.prompt(one.messages) for one in requests], sizes["new_tokens"])


def share_right(model, requests):
    """Share of requests answered right, with Wilson's interval."""
    right = sum(one.is_right(answer) for one, answer in zip(requests, answers(model, requests), strict=True))
    return wilson_interval(right, len(requests))


for one in conversations[:3]:
    data = encode([one])
    ids, learned = data.tokens.tolist(), data.learned.tolist()
    shown = [tokenizer.decode([i]) if keep else "·" for i, keep in zip(ids, learned, strict=True)]
    print(f"{one.messages[-1]['content'][-90:]}\n  learned: {''.join(shown).lstrip('·')!r}, {sum(learned)} of {len(ids)} tokens")  # fmt: skip
asked = [one for task in TASKS for one in instructions.held_out(task, 1, SEED)]
print("\nThe base model, asked in the chat format:")
for one, answer in zip(asked, answers(start, asked), strict=True):
    print(f"  {one.task}: {one.messages[-1]['content'][-70:]!r} -> {answer[:90]!r}")

# %% [markdown]
# **Exercise 1.** The loss of fine-tuning, from logits and targets. The targets are aligned already: the one at position t is the token after it, or −100 where nothing is learned. Return the *sum* over the targets and their *number*.
#
# <details><summary>Hint</summary>
#
# `F.cross_entropy` knows `ignore_index` and `reduction`. Take the logarithm in float32, whatever the logits are.
#
# </details>


# %% exercise="masked_loss"
def my_masked_loss(logits, targets):
    """logits (B, T, V), targets (B, T) with -100 for no target -> (summed loss in nats, number of targets)."""
    raise NotImplementedError


# %% check="masked_loss"
check("finetuning/masked_loss", my_masked_loss)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_masked_loss(logits, targets):
#     flat = logits.flatten(0, 1).float()
#     total = F.cross_entropy(flat, targets.flatten(), ignore_index=-100, reduction="sum")
#     return total, (targets != -100).sum()
# ```
#
# </details>
#
# **Predict.** The held-out questions are about residents that no training question mentions, in a format that the base model has never seen. Its score before training? And after nearly four thousand conversations, seven in ten of them about other residents and the rest about sums: which of the two tasks will be nearer to its end? One needs only what the base model knows. The other needs something that it does badly.


# %%
def tune(model, some, *, lr, steps, seed, replay_share=0.0, trainable="full", schedule="linear", **options):
    """Fine-tune a model in place on requests with their answers, and return the records of the loop."""
    choose_trainable(model, trainable)
    batches, loss = InstructionBatches(
        encode(some), batch_size=min(sizes["batch"], len(some)), context_length=context, seed=seed
    ), sft_loss  # fmt: skip
    if replay_share:
        old = PackedBatches(
            old_training, batch_size=sizes["replay_rows"], context_length=old_context, seed=seed
        )
        batches, loss = ReplayBatches(batches, old), with_replay(replay_share)
    settings = FitSettings(
        steps=steps, lr=lr, warmup_steps=steps // 20, schedule=schedule, weight_decay=0.0, compile="off", seed=seed
    )  # fmt: skip
    fitted = fit(model, batches, loss, settings, progress=False, **options)
    model.eval()
    return fitted


def scores(model, seed=SEED, tasks=TASKS):
    """Share of held-out requests answered right, for each task."""
    return {task: share_right(model, instructions.held_out(task, sizes["n"], seed)) for task in tasks}


before = scores(start)
print("before: " + ", ".join(f"{task} {score:.1%}" for task, score in before.items()))
plain = {}
for seed in progress(seeds, description="fine-tuning", unit="run"):
    model = copy.deepcopy(start)
    some = instructions.training(sizes["batch"] * sizes["steps"], seed, TASKS)
    fitted = tune(model, some, lr=sizes["lr"], steps=sizes["steps"], seed=seed)
    plain[seed] = {"model": model, "fit": fitted, "scores": scores(model)}
print(
    f"after {sizes['steps']} steps of {sizes['batch']} conversations, n={sizes['n']} held-out requests each:"
)
for seed, run in plain.items():
    print(f"  seed {seed}: " + ", ".join(f"{task} {score:.1%}" for task, score in run["scores"].items()))
for task in TASKS:
    print(
        f"{task:>12}, mean over seeds: {seed_interval([run['scores'][task].value for run in plain.values()]):.1%}"
    )
for one, answer in zip(asked, answers(plain[SEED]["model"], asked), strict=True):
    print(f"  {one.task}: {one.messages[-1]['content'][-70:]!r} -> {answer[:90]!r}")


# %%
def smooth(values, width):
    """Running mean over `width` steps."""
    return np.convolve(values, np.ones(width) / width, mode="valid").tolist()


width = min(10, sizes["steps"])
curves = {
    seed: smooth([record["loss"] for record in run["fit"].records], width) for seed, run in plain.items()
}
figure = plotting.lines(
    {f"seed {seed}": (list(range(width, width + len(curve))), curve) for seed, curve in curves.items()},
    xlabel="step", ylabel="nats per target", title=f"Fine-tuning loss, running mean of {width} steps", logy=True,
)  # fmt: skip
plotting.show(
    figure,
    alt="Fine-tuning loss against step, three seeds: it falls steeply within some twenty steps, then goes on falling slowly; the seeds lie close together.",
)
results["before"] = {task: score.value for task, score in before.items()}
results["plain"] = {
    "scores": {task: [run["scores"][task].value for run in plain.values()] for task in TASKS},
    "curve": {"step": list(range(width, width + len(curves[SEED]), 4)), "loss": [c[::4] for c in curves.values()]},
}  # fmt: skip

# %% [markdown]
# **Read the result.** The loss has two parts. Most of it is gone after some twenty steps: that is the format, the tokens of the turn, the beginning of an answer, the end. The rest is slow, and it is what the scores wait for. A fact about a held-out resident cannot come from the training questions, which never mention that resident; it was in the weights, and fine-tuning has opened a way to it from a question. That is elicitation in the strict sense. Sums are another matter. Their answers have to be computed, the base model computes badly, and a format does not change that: they stay far behind. With this budget the facts are nearly learned, and the seeds agree within a few points; sums have hardly begun, and a task in the middle of its transition differs from seed to seed by more than many a comparison of recipes would find. So do not rank two recipes by one seed.

# %% [markdown]
# ## 2. Forgetting, and replay
#
# **Why.** Nothing in the loss speaks of the old text. How well the model still predicts it is a number like any other, and it has to stand beside every score of this lab.
#
# **Exercise 2.** Forgetting is the rise of the loss on held-out old documents, in nats per token. You have the summed nats of each document before and after, and the number of its tokens.
#
# <details><summary>Hint</summary>
#
# A loss per token is a sum over a sum. The mean of the documents' own rises is another quantity, in which a sum of six tokens counts as much as a story of a hundred.
#
# </details>


# %% exercise="forgetting"
def my_forgetting(before, after, counts):
    """Three sequences with one number for each document -> nats per token, positive if the loss has risen."""
    raise NotImplementedError


# %% check="forgetting"
check("finetuning/forgetting", my_forgetting)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_forgetting(before, after, counts):
#     return (sum(after) - sum(before)) / sum(counts)
# ```
#
# </details>

# %%
old_name = "python-docs" if MODEL and CORPUS == "tinytown" and not smoke else CORPUS
settings = pretraining.preset("cpu" if smoke else PRESET, corpus=CORPUS, seed=SEED)  # of the base model
old_text = pipeline.corpus(old_name, 2_000 if MODEL or smoke else settings.n_documents)
old_context = min(context, 256)
some_old = old_text.validation.select(range(min(sizes["old_documents"], len(old_text.validation))))
old_training = tokenize(
    old_text.train.select(range(min(4_000, len(old_text.train)))), tokenizer, progress=False
)
old_validation = tokenize(some_old, tokenizer, progress=False)
old_batches = whole_document_batches(old_validation, batch_size=32, context_length=old_context)
kinds = np.array(some_old["kind"]) if "kind" in some_old.column_names else np.full(len(some_old), "all")


@torch.no_grad()
def document_nats(model):
    """(documents,) summed nats of each held-out old document, end of text included."""
    total = np.zeros(old_validation.n_documents)
    for batch in old_batches:
        losses = token_losses(model, batch["tokens"].to(device), batch["targets"].to(device))
        owners = batch["documents"].numpy()
        np.add.at(total, owners[owners >= 0], losses.double().cpu().numpy()[owners >= 0])
    return total


nats_before, counts = document_nats(start), old_validation.lengths


def forgetting(model):
    """Rise of the loss on the old documents, nats per token."""
    return float((document_nats(model) - nats_before).sum() / counts.sum())


def knows(model):
    """Share of facts completed as bare text, without a chat: "Jane Day works as a" -> " baker"."""
    texts = complete(model, [tokenizer.encode(probe.prompt) for probe in probes], 12)
    return wilson_interval(
        sum(probe.matches(text) for probe, text in zip(probes, texts, strict=True)), len(probes)
    )


def look_back(model):
    """What a fine-tuned model has kept: rise of each old document's nats, forgetting, facts as bare text."""
    rise = document_nats(model) - nats_before
    return {"rise": rise, "forgetting": float(rise.sum() / counts.sum()), "bare": knows(model).value}


probes = town.fact_probes(sizes["n"], SEED)
print(
    f"{len(some_old)} old documents, {counts.sum():,} tokens, {nats_before.sum() / counts.sum():.3f} nats per token before"
)
for seed, run in plain.items():
    run |= look_back(run["model"])
    spread_over_documents = bootstrap_interval(run["rise"] / counts.mean(), n_resamples=1_000)
    print(
        f"  seed {seed}: {run['forgetting']:+.3f} nats per token, over documents {spread_over_documents:.2f}"
    )
bare_before = knows(start)
print(f"facts by completion, as in pre-training: before {bare_before:.1%}; after "
      + ", ".join(f"{run['bare']:.1%}" for run in plain.values()))  # fmt: skip

# %% [markdown]
# The remedy that needs no new idea: give the old loss a share $w$ of the sum. Both losses are means over their own targets, so that $w$ means the same whatever the batches hold.
#
# **Exercise 3.** $\mathcal{L} = (1 - w)\,\mathcal{L}_\text{SFT} + w\,\mathcal{L}_\text{pre}$ for the loop, which divides what you return as total by what you return as count. The count is the number of *instruction* targets.
#
# <details><summary>Hint</summary>
#
# Compute the two means first (both with your masked loss). The mixed mean times the count is the total. Nothing may be detached: the old text has to hold the model with its gradient.
#
# </details>


# %% exercise="replay_loss"
def my_replay_loss(logits, targets, replay_logits, replay_targets, share):
    """Logits (B, T, V) and targets (B, T) of both batches, weight of the old text -> (total, count)."""
    raise NotImplementedError


# %% check="replay_loss"
check("finetuning/replay_loss", my_replay_loss)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_replay_loss(logits, targets, replay_logits, replay_targets, share):
#     total, count = my_masked_loss(logits, targets)
#     replay_total, replay_count = my_masked_loss(replay_logits, replay_targets)
#     return (1 - share) * total + share * replay_total / replay_count * count, count
# ```
#
# </details>
#
# **Predict.** One window of 256 tokens of old text beside every batch of conversations, with a weight of one quarter. How much of the forgetting will it remove: a quarter, a half, nearly all? And what will it cost in answers, since the conversations now have three quarters of the weight?

# %%
REPLAY_SHARE = 0.25
replayed = {}
for seed in progress(seeds, description="fine-tuning with replay", unit="run"):
    model = copy.deepcopy(start)
    some = instructions.training(sizes["batch"] * sizes["steps"], seed, TASKS)
    fitted = tune(model, some, lr=sizes["lr"], steps=sizes["steps"], seed=seed, replay_share=REPLAY_SHARE)
    replayed[seed] = {"model": model, "fit": fitted, "scores": scores(model)} | look_back(model)
pairs = [(plain[seed], replayed[seed]) for seed in seeds]
print("                                without replay    with replay    difference, seed by seed")
for name, of in {
    "forgetting, nats per token": lambda run: run["forgetting"],
    "facts by completion": lambda run: run["bare"],
    **{f"questions: {task}": lambda run, task=task: run["scores"][task].value for task in TASKS},
    "seconds": lambda run: run["fit"].seconds,
}.items():
    a, b = ([of(run) for run in side] for side in zip(*pairs, strict=True))
    difference = seed_interval([after - before for before, after in zip(a, b, strict=True)])
    print(f"{name:>30} {statistics.fmean(a):>15.3f} {statistics.fmean(b):>14.3f}    {difference:+.3f}")
by_kind = {
    kind: [
        [float(run["rise"][kinds == kind].sum() / counts[kinds == kind].sum()) for run in side.values()]
        for side in (plain, replayed)
    ]
    for kind in sorted(set(kinds))
}
figure = plotting.bars(
    [f"{kind}, {how}" for kind in by_kind for how in ("plain", "replay")],
    [statistics.fmean(values) for pair in by_kind.values() for values in pair],
    np.array([[statistics.fmean(v) - min(v), max(v) - statistics.fmean(v)] for pair in by_kind.values() for v in pair]).T,
    ylabel="rise of the loss, nats per token", title=f"Forgetting by kind of document, {len(seeds)} seeds, lowest to highest",
)  # fmt: skip
plotting.show(
    figure,
    alt="Bars of forgetting for each kind of old document, without and with replay: without it every kind is forgotten, with it hardly any.",
)
results["plain"] |= {"forgetting": [run["forgetting"] for run in plain.values()], "bare": [run["bare"] for run in plain.values()]}  # fmt: skip
results["replay"] = {
    "share": REPLAY_SHARE,
    "forgetting": [run["forgetting"] for run in replayed.values()],
    "bare": [run["bare"] for run in replayed.values()],
    "scores": {task: [run["scores"][task].value for run in replayed.values()] for task in TASKS},
    "seconds_ratio": statistics.fmean(b["fit"].seconds / a["fit"].seconds for a, b in pairs),
}
results["forgetting_by_kind"] = {
    kind: {"plain": a, "replay": b, "documents": int((kinds == kind).sum())}
    for kind, (a, b) in by_kind.items()
}
results["old_text"] = {
    "documents": len(some_old),
    "tokens": int(counts.sum()),
    "bare_before": bare_before.value,
}

# %% [markdown]
# **Read the result.** Without replay the model pays for its new task on every kind of old document. With one window of old text a step nearly all of that is gone, and the scores of the questions do not show a price outside of the spread between seeds; the price is time. That replay is so cheap has a reason. The questions pull the weights along directions in which the old loss hardly rises *and* along directions in which it does, and the data do not care which. A little gradient from the old text decides between them.
#
# Compare the two measures of the same loss. In nats the old text is clearly worse. Asked for the facts by completion, greedily, the model may well know nearly all of them still: a probability that has moved from 0.9 to 0.6 costs nats and changes no answer. Which of the two you ought to watch depends on what the model is for; to see forgetting early, watch the nats.

# %% [markdown]
# ## 3. How far, and with which weights
#
# **Why.** In the quadratic picture forgetting grows with the square of the distance from the base model. The distance is limited by the learning rate times the number of steps. The experiment takes a *narrow* task, questions about residents and nothing else: that is where fine-tuning does most damage.
#
# **Predict.** Three rates, each about three times the one before, and the same steps. Draw two curves over the rate before you run the cell: the share of right answers, and forgetting. Do they have their best value at the same place?

# %%
NARROW = ("facts",)


def narrow_run(seed, *, model=None, lr, steps=sizes["narrow_steps"], **options):
    """Fine-tune (a copy of) a model on questions about residents only: model, records, learned, forgotten."""
    model = copy.deepcopy(model or start)
    some = instructions.training(sizes["batch"] * steps, 100 + seed, NARROW)
    fitted = tune(model, some, lr=lr, steps=steps, seed=seed, **options)
    return {"model": model, "fit": fitted, "facts": scores(model, seed, NARROW)["facts"].value, "forgetting": forgetting(model)}  # fmt: skip


def spread(values):
    """Mean and range of a few runs."""
    return f"{statistics.fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


sweep = {
    lr: [narrow_run(seed, lr=lr) for seed in few] for lr in progress(sizes["rates"], description="rates")
}
moved = {
    lr: [
        torch.stack([(p - q).norm() for p, q in zip(run["model"].parameters(), start.parameters(), strict=True)]).norm().item()
        for run in runs
    ]
    for lr, runs in sweep.items()
}  # fmt: skip
print("    rate    reach   distance   facts right, mean (range)   forgetting, nats per token")
for lr, runs in sweep.items():
    reach = sum(record["lr"] for record in runs[0]["fit"].records)
    print(f"{lr:>8g} {reach:>8.3f} {statistics.fmean(moved[lr]):>10.2f}   {spread([r['facts'] for r in runs]):>26}   {spread([r['forgetting'] for r in runs])}")  # fmt: skip
rates = list(sweep)
figure = plotting.lines(
    {
        name: (rates, [statistics.fmean(run[name] for run in sweep[lr]) for lr in rates])
        for name in ("facts", "forgetting")
    },
    bands={
        name: ([min(run[name] for run in sweep[lr]) for lr in rates], [max(run[name] for run in sweep[lr]) for lr in rates])
        for name in ("facts", "forgetting")
    },
    xlabel="peak learning rate", ylabel="share right; nats per token", title=f"{sizes['narrow_steps']} steps on one task, mean and range of {len(few)} seeds",
    logx=True, logy=True, markers=True,
)  # fmt: skip
plotting.show(
    figure,
    alt="Two curves over the learning rate, both on logarithmic axes: the share of right answers rises and then levels off or turns down, forgetting rises throughout and much faster.",
)
results["sweep"] = {
    f"{lr:g}": {name: [run[name] for run in runs] for name in ("facts", "forgetting")}
    | {"distance": moved[lr]}
    for lr, runs in sweep.items()
}

# %% [markdown]
# **Read the result.** The two curves do not agree. From one rate to the next, forgetting grows manyfold from the lowest to the middle rate and a few times more from there to the highest. Compare with the squares of the distances: the quadratic picture fits the second step, and the first is steeper than that. What is learned grows at first, and from the middle rate to the highest it gains nothing, or loses: there the weights have been thrown so far that the old knowledge is harder to read. A recipe that is chosen by the score alone may well sit at the rate where forgetting is several times as large for nothing. The numbers belong to this task, this length, and a narrow set of questions; the shape belongs to fine-tuning.
#
# **Exercise 4.** Which parameters move? Given the names of a model's parameters, return those that are trained under `"full"` (all), `"head"` (the output head), or `"last:K"` (the last K blocks, the final norm, and the head). Blocks are named `blocks.0.…` to `blocks.{n_layers - 1}.…`, the rest `embedding.weight`, `final_norm.weight` and, if it is not tied, `head.weight`.
#
# <details><summary>Hint</summary>
#
# A tied head has no name of its own in the list. When only the head or the last blocks move it is untied first, because otherwise what the frozen blocks read would move too; it then has the name `head.weight`. For full fine-tuning nothing is untied.
#
# </details>


# %% exercise="trainable_names"
def my_trainable_names(names, variant, n_layers, tied):
    """Names of the parameters that move, in any order."""
    raise NotImplementedError


# %% check="trainable_names"
check("finetuning/trainable_names", my_trainable_names)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_trainable_names(names, variant, n_layers, tied):
#     if variant == "full":
#         return list(names)
#     if variant == "head":
#         return ["head.weight"]
#     first = n_layers - int(variant.split(":")[1])
#     in_blocks = [n for n in names if n.startswith("blocks.") and int(n.split(".")[1]) >= first]
#     return [*in_blocks, "final_norm.weight", "head.weight"]
# ```
#
# </details>
#
# **Predict.** The same narrow task with the last two blocks, and with the head alone, at a rate three times that of full fine-tuning, the better of two that were tried for them. Which learns? Which forgets?

# %%
variants = {f"last:{2 if start.config.n_layers > 2 else 1}": [], "head": []}
untouched = True
for name in progress(variants, description="frozen parts"):
    for seed in few:
        run = narrow_run(seed, lr=sizes["frozen_lr"], trainable=name)
        untouched &= torch.equal(run["model"].embedding.weight, start.embedding.weight)
        untouched &= (
            all(
                torch.equal(p, q)
                for p, q in zip(
                    run["model"].blocks[0].parameters(), start.blocks[0].parameters(), strict=True
                )
            )
            or start.config.n_layers == 1
        )
        variants[name].append(run)
N = matmul_weights(start.config)
full = f"full, lr {sizes['lr']:g}"
rows = {full: sweep[sizes["lr"]] if sizes["lr"] in sweep else sweep[rates[-1]]} | variants
table = {}
for name, runs in rows.items():
    moving = sum(p.numel() for p in runs[0]["model"].parameters() if p.requires_grad and p.dim() == 2)
    flops = (
        2 * N + 2 * moving + (0 if name == "head" else 2 * moving)
    )  # forward, weights' gradients, inputs' gradients
    step = statistics.median(r["units"] / r["units_per_second"] for run in runs for r in run["fit"].records)
    table[name] = {
        "share": count_trainable(runs[0]["model"]).share, "flops": flops / (6 * N), "step_seconds": step,
        "facts": [run["facts"] for run in runs], "forgetting": [run["forgetting"] for run in runs],
    }  # fmt: skip
print("                 parameters   FLOPs   time of a step   facts right, mean (range)   forgetting")
for name, row in table.items():
    print(f"{name:>15} {row['share']:>11.1%} {row['flops']:>7.0%} {row['step_seconds'] / table[full]['step_seconds']:>16.0%}   {spread(row['facts']):>26}   {spread(row['forgetting'])}")  # fmt: skip
results["freezing"] = table

# %% [markdown]
# **Read the result.** The last two blocks learn about as much as all of them, or little less, and the head alone learns nothing: the way from a question to a fact has to be built where the question is read, and the head comes too late for that. It can only make some words likelier everywhere. On forgetting, compare at equal rates and at the rate that each needs. At one and the same rate, the highest of the sweep, the frozen blocks protect a good part of the old text. But two blocks need a higher rate than all for the same task, and at the rate of each the advantage is gone. What freezing surely saves is arithmetic and memory, and the time of a step follows the count of FLOPs roughly, since norms, attention and the optimizer are not in it. The frozen blocks themselves are bit for bit those of the base model.

# %% [markdown]
# ## 4. A classification head
#
# **Why.** Labels instead of text: one linear layer on one hidden state. Which one, and should the transformer below it be trained? The task is closed-book: from a resident's name to the occupation, one of sixteen. Labels exist for three quarters of the residents, and the others are the test. No document contains a label; the base model has to *know*.
#
# **Exercise 5.** Texts of a batch have different lengths and are padded on the right. Take each one's vector at its last token.
#
# <details><summary>Hint</summary>
#
# Index with two tensors: a row number and a slot for each row. Slots count from 0.
#
# </details>


# %% exercise="last_token"
def my_last_token(hidden, lengths):
    """hidden (B, T, D), lengths (B,) int64 -> (B, D)."""
    raise NotImplementedError


# %% check="last_token"
check("finetuning/last_token", my_last_token)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_last_token(hidden, lengths):
#     return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]
# ```
#
# </details>
#
# **Predict.** Two texts to classify, for every resident: the name alone ("Jane Day"), and the name in a sentence that stops before the answer ("Jane Day works as a"). Two ways to train: the head on frozen features, and everything. For the name alone only the head is tried. Guess the three accuracies; chance is one in sixteen.

# %%
WORDINGS = {"name": "{S}", "sentence": "{S} works as a"}
occupations = sorted({resident.facts["occupation"] for resident in town.residents})


def labeled(residents, wording):
    """Ids and labels."""
    texts = [tokenizer.encode(WORDINGS[wording].format(S=resident.name)) for resident in residents]
    return texts, [occupations.index(resident.facts["occupation"]) for resident in residents]


def classify(wording, seed, *, lr, frozen):
    """Train a classifier; its accuracy on the residents with and without labels."""
    model = SequenceClassifier(copy.deepcopy(start).requires_grad_(True), len(occupations))
    model.transformer.requires_grad_(not frozen)
    batches = LabeledBatches(
        *labeled(instructions.residents[False], wording), batch_size=32, context_length=context, pad_id=chat.pad_id, seed=seed
    )  # fmt: skip
    steps = sizes["probe_steps"]
    settings = FitSettings(
        steps=steps, lr=lr, warmup_steps=steps // 10, schedule="linear", weight_decay=0.0, compile="off", seed=seed
    )  # fmt: skip
    first = fit(model, batches, classification_loss, settings, progress=False).records[0]["loss"]
    accuracy = []
    for is_test in (False, True):
        texts, labels = labeled(instructions.residents[is_test], wording)
        accuracy.append(float(np.mean(np.array(predict_classes(model, texts, pad_id=chat.pad_id)) == labels)))
    return {"labeled": accuracy[0], "test": accuracy[1], "first_loss": first}


n_labels, n_test = (len(instructions.residents[is_test]) for is_test in (False, True))
ways = [("name", True, sizes["probe_lr"]), ("sentence", True, sizes["probe_lr"])]
ways += [("sentence", False, sizes["classifier_lr"])]
classified = {}
for wording, frozen, lr in progress(ways, description="classifiers"):
    name = f"{wording}, {'frozen' if frozen else 'all'}"
    classified[name] = [classify(wording, seed, lr=lr, frozen=frozen) for seed in few]
print(f"{n_labels} labeled residents, {n_test} others; first loss {classified[name][0]['first_loss']:.4f}, ln {len(occupations)} = {np.log(len(occupations)):.4f}")  # fmt: skip
print("                              accuracy: with labels            others, mean (range)")
for name, runs in classified.items():
    print(f"{name:>26} {spread([r['labeled'] for r in runs]):>26} {spread([r['test'] for r in runs]):>30}")
results["classifier"] = {name: {key: [run[key] for run in runs] for key in ("labeled", "test")} for name, runs in classified.items()}  # fmt: skip
results["classifier_sizes"] = {"labels": n_labels, "test": n_test, "classes": len(occupations)}

# %% [markdown]
# **Read the result.** At the end of the bare name the occupation cannot be read off, although the model knows it; a few words later it can, because there the model is about to say it. A causal model computes a thing where it is needed for the next token. So the question "which token?" is not only about padding: write the text so that the last token is where the answer would come.
#
# And with these few labels the frozen features generalize better than the fine-tuned model. Both fit all labels they have seen, or nearly all. The head alone can do so only through what the base model computes anyway, and that is the same for the other residents. Training everything finds a way that is shorter: it memorizes the names. More labels, or a task that the features do not already hold, turn this around; how to tell is to try both.

# %% [markdown]
# ## 5. Averages of weights
#
# **Why.** At a constant rate the weights do not settle. They bounce about the bottom of a valley, and their mean is nearer to the bottom than almost all of them.
#
# **Exercise 6.** The weighted mean of state dicts. Weights count by their ratios. What is not floating, such as a counter, has no mean: take it over. Sum in float32 or wider, give back the inputs' types, and leave the inputs as they are.
#
# <details><summary>Hint</summary>
#
# For each name: zeros in float32 (or float64), add share times tensor for every checkpoint, convert back.
#
# </details>


# %% exercise="average"
def my_average(state_dicts, weights=None):
    """A list of dicts name -> tensor, and as many numbers (default: all equal) -> dict name -> tensor."""
    raise NotImplementedError


# %% check="average"
check("finetuning/average", my_average)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_average(state_dicts, weights=None):
#     weights = [1.0] * len(state_dicts) if weights is None else weights
#     found = {}
#     for name, first in state_dicts[0].items():
#         if not first.is_floating_point():
#             found[name] = first.clone()
#             continue
#         mean = torch.zeros_like(first, dtype=torch.float64)
#         for weight, state in zip(weights, state_dicts, strict=True):
#             mean += weight / sum(weights) * state[name].double()
#         found[name] = mean.to(first.dtype)
#     return found
# ```
#
# </details>
#
# **Predict.** A fine-tuned model goes on with questions about residents, once at a constant rate and once with a linear decay. Two models come out of each run: its last weights, and the mean over all but the first quarter of the steps. Order the four by their loss on held-out questions.


# %%
asked_facts = instructions.held_out("facts", sizes["n"], SEED)
held_out = encode(asked_facts)


def measured(model):
    """Loss and score on held-out questions, and forgetting."""
    return {
        "loss": instruction_loss(model, held_out),
        "facts": share_right(model, asked_facts).value,
        "forgetting": forgetting(model),
    }


averages = {name: [] for name in ("constant, last", "constant, mean", "decay, last", "decay, mean")}
for seed in progress(few, description="averages", unit="run"):
    for name, schedule in (("constant", "constant"), ("decay", "linear")):
        mean = WeightAverage(start=sizes["narrow_steps"] // 4)
        run = narrow_run(
            seed, model=plain[seed]["model"], lr=sizes["bounce_lr"], schedule=schedule, on_step=mean
        )
        averages[f"{name}, last"].append(measured(run["model"]))
        with mean.swapped(run["model"]):
            averages[f"{name}, mean"].append(measured(run["model"]))
print("                        loss on held-out questions       facts right, mean (range)    forgetting")
for name, rows in averages.items():
    print(f"{name:>22} {spread([r['loss'] for r in rows]):>26} {spread([r['facts'] for r in rows]):>30}   {spread([r['forgetting'] for r in rows])}")  # fmt: skip
gain = [
    a["loss"] - b["loss"] for a, b in zip(averages["constant, mean"], averages["constant, last"], strict=True)
]
print(f"mean minus last, constant rate, seed by seed: {seed_interval(gain):+.3f} nats per target")
results["averages"] = {
    name: {key: [row[key] for row in rows] for key in rows[0]} for name, rows in averages.items()
}

# %% [markdown]
# Two more averages cost no training. A *soup* of the models of section 1, which began at one base model and saw other data in another order. And the straight line back to the base model: $(1 - w)\,\theta + w\,\theta_0$.

# %%
merged = copy.deepcopy(start)
states = [run["model"].state_dict() for run in plain.values()]
members = [measured(run["model"]) for run in plain.values()]
merged.load_state_dict(average_checkpoints(states))
soup = measured(merged)
print(f"members: facts {spread([m['facts'] for m in members])}, loss {spread([m['loss'] for m in members])}, forgetting {spread([m['forgetting'] for m in members])}")  # fmt: skip
print(f"   soup: facts {soup['facts']:.3f}, loss {soup['loss']:.3f}, forgetting {soup['forgetting']:.3f}")
line = {0.0: members}
for w in (0.125, 0.25, 0.5):
    line[w] = []
    for state in states:
        merged.load_state_dict(average_checkpoints([state, start.state_dict()], [1 - w, w]))
        line[w].append({"facts": share_right(merged, asked_facts).value, "forgetting": forgetting(merged)})
line[1.0] = [{"facts": before["facts"].value, "forgetting": 0.0}] * len(states)
figure = plotting.lines(
    {name: (list(line), [statistics.fmean(row[name] for row in rows) for rows in line.values()]) for name in ("facts", "forgetting")},
    bands={
        name: ([min(row[name] for row in rows) for rows in line.values()], [max(row[name] for row in rows) for rows in line.values()])
        for name in ("facts", "forgetting")
    },
    xlabel="w, share of the base model", ylabel="share right; nats per token", title=f"On the line back to the base model, {len(states)} seeds", markers=True,
)  # fmt: skip
plotting.show(
    figure,
    alt="Facts answered and forgetting against the share of the base model: forgetting falls at once, the score stays for a while and then drops to zero.",
)
results["soup"] = {"members": {key: [m[key] for m in members] for key in soup}, "soup": soup}
results["line"] = {
    f"{w:g}": {key: [row[key] for row in rows] for key in ("facts", "forgetting")} for w, rows in line.items()
}

# %% [markdown]
# **Read the result.** Averaging removes the noise of a constant rate, and the mean of a run that has decayed is hardly better than its end: decay and averaging remove the same thing, and whoever has decayed has nothing left to average. What the average buys is that nobody has to know beforehand when the run ends. A soup of runs that have decayed is no better than its members here, for the same reason. On the line back to the base model, forgetting falls at once, and faster than with the square of the distance, while the score holds for a while before it drops; replay reaches a better point, but replay needs the old data and a new run, and the line needs neither.

# %% [markdown]
# ## The same with the library
#
# TRL's `SFTTrainer` with `assistant_only_loss`, on the same weights and conversations: first loss, gradient, then five steps. `transformers`' head for sequence classification, on the same head. PyTorch's `AveragedModel`, on the same run.

# %%
import transformers
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import SFTConfig, SFTTrainer

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
disable_progress_bars()
LIBRARY_STEPS, LIBRARY_LR = 5, 1e-3
short = instructions.training(8, SEED, ("facts", "sums"))
ours = copy.deepcopy(start).cpu().float().requires_grad_(True)
with tempfile.TemporaryDirectory() as folder:
    save_pretrained(ours, Path(folder, "start"), tokenizer)
    theirs = AutoModelForCausalLM.from_pretrained(Path(folder, "start"), dtype=torch.float32)
    config = SFTConfig(
        output_dir=str(Path(folder, "trainer")), assistant_only_loss=True, max_length=context, per_device_train_batch_size=len(short),
        max_steps=LIBRARY_STEPS, learning_rate=LIBRARY_LR, lr_scheduler_type="constant", weight_decay=0.0, adam_beta1=0.9, adam_beta2=0.95,
        adam_epsilon=1e-8, max_grad_norm=1.0, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
        bf16=False, gradient_checkpointing=False, seed=SEED,
    )  # fmt: skip
    rows = Dataset.from_list([{"messages": one.conversation} for one in short])
    trainer = SFTTrainer(theirs, config, train_dataset=rows, processing_class=tokenizer.to_transformers())
    trainer.remove_callback(transformers.PrinterCallback)
    their_loss = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    their_loss.backward()
    batches = InstructionBatches(encode(short), batch_size=len(short), context_length=context, seed=SEED)
    total, count, _ = sft_loss(ours, batches.next())
    (total / count).backward()
    gradients = ours.embedding.weight.grad, theirs.get_input_embeddings().weight.grad
    gradient_difference = ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item()
    loss_difference = abs(float((total / count).detach()) - float(their_loss.detach()))
    ours.zero_grad(), theirs.zero_grad()
    trainer.train()
their_losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
settings = FitSettings(
    steps=LIBRARY_STEPS, lr=LIBRARY_LR, schedule="constant", weight_decay=0.0, precision="fp32", compile="off", seed=SEED
)  # fmt: skip
torch_average, own_average = torch.optim.swa_utils.AveragedModel(ours), WeightAverage()


def average_both(step, model):
    """Hand the same weights to both averages."""
    torch_average.update_parameters(model)
    own_average(step, model)


our_losses = [
    r["loss"] for r in fit(ours, batches, sft_loss, settings, progress=False, on_step=average_both).records
]
steps_difference = max(abs(a - b) for a, b in zip(our_losses, their_losses, strict=True))
print(
    f"SFTTrainer: first loss differs by {loss_difference:.1e} nats, gradient of the embedding by {gradient_difference:.1e} of its norm"
)
print("step      ours  SFTTrainer")
for step, (a, b) in enumerate(zip(our_losses, their_losses, strict=True)):
    print(f"{step:>4} {a:>9.4f} {b:>11.4f}")
own_average.copy_to(ours)
average_difference = max(
    (p - q).abs().max().item() for p, q in zip(ours.parameters(), torch_average.module.parameters(), strict=True)
)  # fmt: skip
print(f"AveragedModel: largest difference of a weight {average_difference:.1e}")

# %%
classifier = SequenceClassifier(copy.deepcopy(start).cpu().float().eval(), len(occupations))
torch.nn.init.normal_(classifier.score.weight, std=0.1, generator=torch.Generator().manual_seed(SEED))
texts, _ = labeled(instructions.residents[True][:8], "sentence")
texts = [text[: len(text) - i % 2] for i, text in enumerate(texts)]  # of different lengths
batch = LabeledBatches(texts, [0] * len(texts), batch_size=len(texts), context_length=context, pad_id=chat.pad_id, seed=SEED).next()  # fmt: skip
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    save_pretrained(classifier.transformer, folder)
    theirs = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=len(occupations), pad_token_id=chat.pad_id, dtype=torch.float32
    ).eval()  # fmt: skip
    theirs.score.weight.copy_(classifier.score.weight)
    mask = torch.arange(batch["tokens"].shape[1]) < batch["lengths"][:, None]
    their_logits = theirs(input_ids=batch["tokens"], attention_mask=mask.long()).logits
    classifier_difference = (classifier(batch["tokens"], batch["lengths"]) - their_logits).abs().max().item()
print(f"{type(theirs).__name__}: largest difference of a logit {classifier_difference:.1e}")
results["library"] = {
    "loss": loss_difference, "gradient": gradient_difference, "steps": steps_difference, "average": average_difference, "classifier": classifier_difference,
}  # fmt: skip

# %% [markdown]
# ## Measured results
#
# What this lab claims. Each line is computed from the runs above, and the lab stops if one does not hold.

# %%
# NBVAL_CHECK_OUTPUT
if own:
    claim(
        "before",
        before["facts"].value < 0.05,
        "asked in the chat format, the base model answers under 5 % of the questions",
    )
    claim(
        "after",
        min(run["scores"]["facts"].value for run in plain.values()) > 0.60,
        "fine-tuned, it answers over 60 % of held-out questions about residents, with every seed",
    )
    claim(
        "forgetting",
        seed_interval([run["forgetting"] for run in plain.values()]).low > 0,
        "the loss on old documents rises, and the interval over seeds excludes zero",
    )
    claim(
        "replay",
        all(b["forgetting"] < 0.5 * a["forgetting"] for a, b in pairs),
        "replay removes more than half of the forgetting, with every seed",
    )
    claim(
        "rate",
        all(
            a["forgetting"] < b["forgetting"]
            for i in range(len(rates) - 1)
            for a, b in zip(sweep[rates[i]], sweep[rates[i + 1]], strict=True)
        ),
        "each higher learning rate forgets more, with every seed",
    )
    claim(
        "head", max(run["facts"] for run in variants["head"]) < 0.05, "with the head alone nothing is learned"
    )
    of_frozen = classified["sentence, frozen"]
    of_all = classified["sentence, all"]
    claim(
        "frozen-features",
        all(a["test"] > b["test"] for a, b in zip(of_frozen, of_all, strict=True)),
        "with few labels the head on frozen features beats training everything, with every seed",
    )
    claim(
        "where",
        max(run["test"] for run in classified["name, frozen"]) < 0.25,
        "at the end of the bare name the label cannot be read off",
    )
    claim(
        "average",
        max(gain) < 0,
        "at a constant rate the mean of the weights has a lower loss than the last ones, with every seed",
    )
claim("frozen", untouched, "what is frozen stays the same, bit for bit")
claim("first-loss", all(abs(r["first_loss"] - np.log(len(occupations))) < 1e-3 for runs in classified.values() for r in runs), "a new classification head begins at the loss ln Y")  # fmt: skip
claim(
    "trl",
    loss_difference < 1e-4 and gradient_difference < 1e-3,
    "loss and gradient are those of TRL's SFTTrainer",
)
claim("trl-steps", steps_difference < 2e-3, "five steps of SFTTrainer give the same losses")
claim(
    "classifier",
    classifier_difference < 1e-3,
    "the head's logits are those of transformers' sequence classification",
)
claim("averaged-model", average_difference < 1e-5, "the running mean is that of torch's AveragedModel")

# %% [markdown]
# ## Break it
#
# **A learning rate thirty times too high.** The narrow task once more, at thirty times the rate of section 1.

# %%
broken = narrow_run(SEED, lr=30 * sizes["lr"])
losses = [record["loss"] for record in broken["fit"].records]
print(
    "loss at the first steps: "
    + ", ".join(f"{loss:.2f}" for loss in losses[:6])
    + f"; at the end {losses[-1]:.2f}"
)
print(f"facts right {broken['facts']:.1%}, forgetting {broken['forgetting']:+.2f} nats per token")
for one, answer in zip(asked_facts[:3], answers(broken["model"], asked_facts[:3]), strict=True):
    print(f"  {one.messages[-1]['content']!r} -> {answer[:80]!r}, right: {one.answer!r}")
results["broken"] = {"lr": 30 * sizes["lr"], "loss": losses, "facts": broken["facts"], "forgetting": broken["forgetting"]}  # fmt: skip

# %% [markdown]
# **Facts that the model cannot know.** No document mentions some of the town's residents. What does the fine-tuned model answer when it is asked about them? And what happens if their facts are among the training data of a second fine-tuning? Half of its questions are about them, half about residents of the documents; a control run replaces the unknown ones by more of the known kind.


# %%
def questions_about(residents, n, seed):
    """Different questions about these residents, in the wordings of training."""
    rng, asked = random.Random(seed), {}
    while len(asked) < n:
        resident, attribute = rng.choice(residents), rng.choice(list(TEMPLATES))
        words = {"S": resident.name, "P": f"{resident.name}'s"}
        question = rng.choice(FACTS[attribute][:-1]).format(**words)
        answer = TEMPLATES[attribute][0].format(v=resident.facts[attribute], **words)
        asked.setdefault((resident.name, attribute), TownInstruction(
            task="facts", variety=attribute, messages=({"role": "user", "content": question},), answer=answer
        ))  # fmt: skip
    return list(asked.values())


def form_of(one, answer):
    """Whether an answer is a sentence of the right form with some value, and whether it is about the right resident."""
    values = "|".join(sorted({re.escape(resident.facts[one.variety]) for resident in town.residents}))
    pattern = TEMPLATES[one.variety][0].format(S="NAME", P="NAME's", v="VALUE")
    pattern = re.escape(pattern).replace("NAME", r"([A-Z]\w+ [A-Z]\w+)").replace("VALUE", f"(?:{values})")
    match = re.fullmatch(pattern, answer.strip())
    return bool(match), bool(match) and match[1] in one.answer


nobody = [resident for resident in town.residents if resident.held_out]
unknown = questions_about(nobody, sizes["facts"], SEED)
known = questions_about(instructions.residents[False], 2 * sizes["facts"], SEED)
replies = answers(plain[SEED]["model"], unknown)
for one, answer in zip(unknown[:4], replies, strict=False):
    print(f"  {one.messages[-1]['content']!r} -> {answer[:80]!r}")
forms = [form_of(one, answer) for one, answer in zip(unknown, replies, strict=True)]
invented = {
    "a sentence of the right form": wilson_interval(sum(a for a, _ in forms), len(forms)),
    "and about the right resident": wilson_interval(sum(b for _, b in forms), len(forms)),
    "right": share_right(plain[SEED]["model"], unknown),
}
for name, value in invented.items():
    print(f"{name:>30}: {value:.1%}")

# %%
mixtures = {"known and unknown": known[: len(unknown)] + unknown, "known only": known}
second = {name: [] for name in mixtures}
for seed in progress(few, description="second fine-tuning", unit="run"):
    for name, some in mixtures.items():
        model = copy.deepcopy(plain[seed]["model"])
        tune(model, some, lr=sizes["fact_lr"], steps=sizes["fact_steps"], seed=seed, schedule="constant")
        second[name].append({
            "held": [share_right(one, asked_facts).value for one in (plain[seed]["model"], model)],
            "unknown": [share_right(one, unknown).value for one in (plain[seed]["model"], model)],
        })  # fmt: skip
print("share right, mean (range):                                         before                       after")
for name, runs in second.items():
    for what, key in (("known facts, held-out questions", "held"), ("the unknown facts", "unknown")):
        columns = zip(*(run[key] for run in runs), strict=True)
        print(f"{name:>18}: {what:<33}" + "  ".join(f"{spread(list(values)):>26}" for values in columns))
cost = [
    a["held"][-1] - b["held"][-1]
    for a, b in zip(second["known and unknown"], second["known only"], strict=True)
]
print(f"known facts, with unknown ones in the data minus without, seed by seed: {seed_interval(cost):+.3f}")
results["unknown"] = {
    "n": len(unknown), "answers": {name: value.value for name, value in invented.items()},
    "runs": {name: {key: [run[key] for run in runs] for key in ("held", "unknown")} for name, runs in second.items()},
}  # fmt: skip

# %% [markdown]
# **Diagnosis.** Two failures, and what tells them apart.
#
# 1. *A rate that is too high* shows in the first steps: the loss rises above its start, and later settles at a level that a table of word frequencies would reach. Answers are empty, or the same few tokens, whatever is asked. Look at the loss of the first ten steps and at three answers, before anything else.
# 2. *Facts that the model cannot know* show nothing of the kind. The loss falls, and most of the unknown facts are fitted. What is lost are other facts, those that the model knew: some are lost in any second fine-tuning of this kind, more with unknown facts among the data, and only a held-out question about a *known* fact sees it. Even before that the model never says that it does not know: asked about a stranger it answers in the right form, and often about somebody else. Nothing in its data has shown it what not knowing looks like.
#
# The remedy is in the data: keep the answers of a fine-tuning set within what the model knows, bring new facts in by pre-training documents, and teach refusal with questions that the model gets wrong.

# %%
# NBVAL_CHECK_OUTPUT
if own:
    claim(
        "strangers",
        invented["right"].value < 0.10,
        "of the facts that no document contains, under 10 % are right",
    )
    claim("unknown", max(cost) < 0, "unknown facts in the training data cost known ones, with every seed")
    claim("too-high", broken["facts"] < 0.05, "thirty times the rate leaves nothing of the task")
claim("finite", np.isfinite(losses).all(), "and no number is out of range: nothing stops such a run")

# %%
store_results("finetuning", results)

# %% [markdown]
# ## Takeaways
#
# * Fine-tuning is the pre-training loss on other data, under a mask. The format is learned within a few dozen steps; a way to the knowledge takes longer.
# * Report what is forgotten beside what is learned. Watch nats: they move before answers do.
# * A little replay, weighted by means, removes nearly all of the forgetting. What it costs here is time.
# * The best rate for the task is not the best rate for the model. Sweep, and look at both curves.
# * Freezing saves arithmetic and memory. It protects the old text at an equal rate, and it needs a higher one.
# * Classify at the token where the model would say the answer. With few labels, try the frozen model first.
# * Averaging replaces decay; after a decay there is nothing to average.
# * New facts do not belong into fine-tuning data.

# %% [markdown]
# ## Next
#
# The chapter, [Fine-tuning fundamentals](../book/posttraining/finetuning.md), derives what was measured here, gives the settings of published models, and has exercises with solutions. Lab 11 fine-tunes with one parameter in twenty-five, and asks again what is learned and what is forgotten.
