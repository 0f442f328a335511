# %% [markdown]
# # Lab 14 · Direct preference optimization and its family
#
# [Open in Colab]({{colab}}) · [Source of this lab]({{repository}}/blob/{{branch}}/labs/src/14_dpo.py)
#
# | | |
# |---|---|
# | **Chapter** | [14 Direct preference optimization and its family](../book/posttraining/dpo.md) |
# | **Hardware** | CPU, 2 cores, 4 GiB of memory; a GPU is used with `PRESET = "gpu"` |
# | **Minutes** | 3 to execute, and up to 5 once for the base model and the assistant; 3 hours with the exercises |
# | **You will build** | log-probabilities of responses, the losses of DPO, cDPO, IPO, KTO and SimPO, implicit rewards, the weight of a pair in the gradient |
# | **What to inspect** | what separates the two sides of your pairs before training; the true reward of what the policy writes, not the accuracy on pairs; the chosen log-probability; where the curve of true reward against KL turns down |

# %% [markdown]
# ## Setup
#
# `PRESET = "gpu"` takes the larger assistant and the GPU. `MODEL` is a local folder or a Hub name of a model of the Llama or Qwen3 family; empty means the course's own model. The requests are always Tinytown's, because their true reward is a known function. `PRESET = "smoke"` does two or three steps of everything, to try the lab on another model. Every random number follows from `SEED`.

# %% tags=["parameters"]
PRESET = "cpu"
CORPUS = "tinytown"
SEED = 0
MODEL = ""

# %%
import copy
import math
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from llmcourse import pipeline, plotting
from llmcourse.alignment import dpo
from llmcourse.alignment.over_optimization import fit_over_optimization, sampled_kl_and_reward
from llmcourse.alignment.reference import reference_log_probs
from llmcourse.checks import check, claim
from llmcourse.data.chat_formats import chat_format
from llmcourse.data.preference import PreferenceBatches, annotate, encode_pairs
from llmcourse.data.tinytown import Town
from llmcourse.data.town_instructions import TASKS, TownInstructions
from llmcourse.evaluation.instruction_following import answer_chats, share_right
from llmcourse.evaluation.statistics import bootstrap_interval, paired_bootstrap, seed_interval, wilson_interval
from llmcourse.inference.sampling import SamplingParams
from llmcourse.labs import store_results
from llmcourse.models.pretrained import save_pretrained
from llmcourse.runtime import pick_device, progress

SIZES = {
    "cpu": {"requests": 2000, "held_out": 200, "probes": 64, "n_seeds": 3, "steps": 70, "long": 120, "family": 50, "lr": 1e-4, "new_tokens": 128},
    "gpu": {"requests": 8000, "held_out": 200, "probes": 128, "n_seeds": 5, "steps": 200, "long": 600, "family": 200, "lr": 2e-5, "new_tokens": 160},
    "smoke": {"requests": 12, "held_out": 6, "probes": 3, "n_seeds": 2, "steps": 3, "long": 4, "family": 2, "lr": 1e-4, "new_tokens": 12},
}  # fmt: skip
if PRESET not in SIZES:
    raise ValueError(f"PRESET={PRESET!r}: choose one of {', '.join(SIZES)}")
sizes, smoke = SIZES[PRESET], PRESET == "smoke"
own = not MODEL and CORPUS == "tinytown" and not smoke  # whether the figures are those that the claims are about
seeds = range(SEED, SEED + sizes["n_seeds"])
device = pick_device("auto" if PRESET == "gpu" else "cpu")
results = {"preset": PRESET, "corpus": CORPUS, "seed": SEED, "model": MODEL}

# %% [markdown]
# ## Objectives
#
# After this lab you can
#
# 1. make preference pairs from a model's own answers, and find out before training what tells the two sides apart;
# 2. write the losses of the family and say what each does to a pair that is settled, and to one that is hopeless;
# 3. tell apart the three things that a run reports: the loss on pairs, the accuracy on pairs, and the quality of what the policy writes;
# 4. draw the over-optimization curve, and choose where to stop from a measurement instead of from the loss;
# 5. recognize an annotator with a bias from the data alone.

# %% [markdown]
# ## 1. Pairs, and what tells their sides apart
#
# **Why.** The assistant was trained on right answers. It has never been told what is wrong with its own. We let it answer each request twice at temperature 1, and an annotator says which answer is better. The annotator goes by the true reward (2 for a right answer, plus up to 3 for a well-formed, true text of the usual length) and errs like a Bradley–Terry judge with a noise of 0.5: a difference in reward of 0.5 is seen in 73 % of the cases.
#
# The requests are sums and texts with constraints. Questions about residents and stories are left out on purpose. What the model lacks there is knowledge, and pairs of two wrong guesses teach it nothing except to guess differently; with them in the data, the true reward fell from the first steps on.

# %%
assistant = pipeline.load(
    "sft", preset="cpu" if smoke else PRESET, corpus=CORPUS, seed=SEED, model=MODEL, **({"steps": 4} if smoke else {})
)  # fmt: skip
reference, tokenizer = assistant.model.to(device).eval(), assistant.tokenizer
instructions, chat = TownInstructions(Town(pipeline.TOWN_SEED)), chat_format(tokenizer)
context = min(reference.config.context_length, 512)
PAIRED = ("sums", "constraints")


def two_answers(requests, seed):
    """Two answers of the reference to each request, drawn at temperature 1."""
    chats = [request.messages for request in requests]
    for part in (1, 2):
        params = SamplingParams(temperature=1.0, max_new_tokens=sizes["new_tokens"], seed=1000 * seed + part)
        yield answer_chats(reference, tokenizer, chats, params, batch_size=256)


requests = instructions.training(sizes["requests"], 21 + SEED, tasks=PAIRED)
first, second = two_answers(requests, SEED)
pairs = annotate(requests, first, second, instructions.reward, noise=0.5, seed=SEED)
for request, pair in [(r, p) for r, p in zip(requests, pairs, strict=True) if p.chosen != p.rejected][:4]:
    print(f"{request.messages[-1]['content']}\n  chosen:   {pair.chosen}\n  rejected: {pair.rejected}\n  true reward of the chosen one is larger by {pair.margin:+.2f}\n")  # fmt: skip

# %% [markdown]
# **Encode.** A pair becomes the ids of its prompt and of both answers, end of turn included. Pairs whose answers are identical hold no preference; they are dropped and counted. A second set is kept apart for measuring: held-out requests, an annotator without noise, and only pairs whose true rewards differ.


# %%
def encoded(some_pairs):
    """Pairs as ids, those that do not fit or hold no preference left out."""
    return encode_pairs(some_pairs, chat, context_length=context)


def batches_of(data, batch_size=32, seed=SEED):
    """Batches of encoded pairs; the width of a batch is that of its longest row."""
    return PreferenceBatches(data, batch_size=min(batch_size, len(data)), context_length=context, seed=seed)


training = encoded(pairs)
held_out = [one for task in PAIRED for one in instructions.held_out(task, sizes["held_out"], SEED + 1)]
judged = annotate(held_out, *two_answers(held_out, SEED + 1), instructions.reward, noise=0.0, seed=SEED)
test = encoded([pair for pair in judged if pair.margin > 0])
clear = test.margins > 0.5
print({name: int(count) for name, count in training.counts.items()}, "to train on")
print(f"{len(test)} held-out pairs without noise, {int(clear.sum())} of them clear: true rewards more than 0.5 apart")
results["pairs"] = dict(training.counts) | {"held_out": len(test), "clear": int(clear.sum())}

# %% [markdown]
# **Exercise 1.** The log-probability of a response is the sum over its tokens, and some losses divide it by their number. Return both.
#
# <details><summary>Hint</summary>
#
# `targets[:, t]` is the token that position t predicts, or −100 where that token belongs to the prompt or to the padding. `log_softmax` over the vocabulary, then `gather`; −100 is no index, so clamp first and mask afterwards.
#
# </details>


# %% exercise="response_log_probs"
def my_response_log_probs(logits, targets):
    """logits (B, T, V), targets (B, T) -> (summed ln p (B,), number of targets (B,))."""
    raise NotImplementedError


# %% check="response_log_probs"
check("dpo/response_log_probs", my_response_log_probs)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_response_log_probs(logits, targets):
#     is_target = targets != -100
#     log_probs = logits.log_softmax(dim=-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
#     return (log_probs * is_target).sum(dim=-1), is_target.sum(dim=-1)
# ```
#
# </details>
#
# **Predict.** Three rules that know nothing about the request choose between the answers of a pair: the longer one, the one that the reference finds likelier, the one that it finds likelier per token. How often does each agree with a perfect annotator?


# %%
def log_probs_of(model, data):
    """Summed ln p of chosen and rejected answers under a model: two arrays (pairs,)."""
    found = reference_log_probs(model, batches_of(data, 64), progress=False)
    return tuple(found[f"{side}_ref_log_probs"].double().numpy() for side in ("chosen", "rejected"))


def share(right):
    """Share of True, ties counted by half, with Wilson's interval."""
    return wilson_interval(float(np.sum(right)), len(right))


def agrees(a, b):
    """1 where the chosen answer's number is larger, 0.5 for a tie."""
    return (np.sign(np.asarray(a) - np.asarray(b)) + 1) / 2


n_chosen, n_rejected = (np.array([len(ids) for ids in side]) for side in (test.chosen, test.rejected))
chosen_ref, rejected_ref = log_probs_of(reference, test)
rules = {
    "the longer one": agrees(n_chosen, n_rejected),
    "the likelier one": agrees(chosen_ref, rejected_ref),
    "the likelier one per token": agrees(chosen_ref / n_chosen, rejected_ref / n_rejected),
}
for name, right in rules.items():
    print(f"{name:>26}: all pairs {share(right):.1%}; clear pairs {share(right[clear]):.1%}")
print(f"mean length: {n_chosen.mean():.1f} tokens chosen, {n_rejected.mean():.1f} rejected")
results["rules"] = {name: float(share(right).value) for name, right in rules.items()}

# %% [markdown]
# **Read the result.** These are the accuracies that training has to beat before it has learned anything about content. A rule that is far above one half is a giveaway: DPO will find it first, since it is the cheapest way to a margin. In this town the annotator has a taste for a certain length rather than for long or short answers, and longer sums are those with their steps written out, which are more often right. Whether that makes length a cause or a symptom is nothing that the pairs can say.

# %% [markdown]
# ## 2. The loss, and which pairs move the policy
#
# **Why.** The implicit reward of a response is $\beta$ times its log-ratio to the reference, so the margin $h$ of a pair needs four numbers, two of them known before training. The loss is that of a classifier with the logit $\beta h$.
#
# **Exercise 2.** DPO, with cDPO's label smoothing $\varepsilon$: the label is wrong with that probability. One loss per pair.
#
# <details><summary>Hint</summary>
#
# $-(1-\varepsilon)\ln\sigma(\beta h) - \varepsilon\ln\sigma(-\beta h)$. The logarithm of a sigmoid is infinite for the pairs that matter most: use `F.logsigmoid`.
#
# </details>


# %% exercise="dpo_loss"
def my_dpo_loss(
    chosen_log_probs, rejected_log_probs, chosen_ref_log_probs, rejected_ref_log_probs, *, beta=0.1, label_smoothing=0.0
):  # fmt: skip
    """Four tensors (B,) -> (B,)."""
    raise NotImplementedError


# %% check="dpo_loss"
check("dpo/dpo_loss", my_dpo_loss)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_dpo_loss(
#     chosen_log_probs, rejected_log_probs, chosen_ref_log_probs, rejected_ref_log_probs, *, beta=0.1, label_smoothing=0.0
# ):
#     h = (chosen_log_probs - chosen_ref_log_probs) - (rejected_log_probs - rejected_ref_log_probs)
#     right, wrong = -F.logsigmoid(beta * h), -F.logsigmoid(-beta * h)
#     return (1 - label_smoothing) * right + label_smoothing * wrong
# ```
#
# </details>
#
# **Exercise 3.** The gradient of the loss of a pair is $-w\,(\nabla \ln \pi(y_w) - \nabla \ln \pi(y_l))$. Give the weight $w$.
#
# <details><summary>Hint</summary>
#
# Differentiate $-\ln\sigma(\beta h)$ with respect to $h$. $w$ is positive, and $\beta/2$ before the first step.
#
# </details>


# %% exercise="dpo_gradient_weight"
def my_dpo_gradient_weight(
    chosen_log_probs, rejected_log_probs, chosen_ref_log_probs, rejected_ref_log_probs, *, beta=0.1
):  # fmt: skip
    """Four tensors (B,) -> (B,)."""
    raise NotImplementedError


# %% check="dpo_gradient_weight"
check("dpo/dpo_gradient_weight", my_dpo_gradient_weight)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_dpo_gradient_weight(
#     chosen_log_probs, rejected_log_probs, chosen_ref_log_probs, rejected_ref_log_probs, *, beta=0.1
# ):
#     h = (chosen_log_probs - chosen_ref_log_probs) - (rejected_log_probs - rejected_ref_log_probs)
#     return beta * torch.sigmoid(-beta * h)
# ```
#
# </details>
#
# **Predict.** Before any long run, overfit one batch: 32 pairs, the same ones at every step. What is the first loss, to four digits? Will the log-probabilities of the *chosen* answers rise?

# %%
BETA = 0.1


def train(data, *, seed=SEED, valid=None, evaluate=None, **changes):
    """A copy of the reference trained on encoded pairs, and the run's records."""
    policy = copy.deepcopy(reference)
    options = {"beta": BETA, "lr": sizes["lr"], "steps": sizes["steps"], "share_prompt": True, "seed": seed} | changes
    settings = dpo.preset("cpu" if smoke else PRESET, **options)
    run = dpo.train_dpo(
        policy, batches_of(data, seed=seed), settings, reference=reference, valid=valid, evaluate=evaluate, progress=False
    )  # fmt: skip
    return policy.eval(), run


few = encoded(pairs[: 40 if not smoke else 6])
policy, run = train(few, steps=2 if smoke else 15, schedule="constant", warmup_steps=0)
print("step    loss  margin h  chosen ln p  rejected ln p")
for record in run.records[:: 1 if smoke else 2]:
    print(f"{record['step']:>4} {record['loss']:>7.4f} {record['margin'] / BETA:>9.2f} "
          f"{record['chosen_log_prob']:>12.2f} {record['rejected_log_prob']:>14.2f}")  # fmt: skip
first_loss = run.records[0]["loss"]
