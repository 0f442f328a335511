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
import dataclasses
import logging
import math
import statistics
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F  # noqa: F401, for the exercises

from llmcourse import pipeline, plotting
from llmcourse.alignment import dpo
from llmcourse.alignment.log_probs import response_log_probs
from llmcourse.alignment.over_optimization import fit_over_optimization, sampled_kl_and_reward
from llmcourse.alignment.preference_losses import log_ratio_margin
from llmcourse.alignment.reference import ReferenceBatches, reference_log_probs
from llmcourse.checks import check, claim
from llmcourse.data.chat_formats import chat_format
from llmcourse.data.preference import PreferenceBatches, annotate, annotate_rankings, encode_pairs
from llmcourse.data.tinytown import Town
from llmcourse.data.town_instructions import TASKS, TownInstructions
from llmcourse.evaluation.instruction_following import answer_chats, share_right
from llmcourse.evaluation.statistics import (
    bootstrap_interval,
    paired_bootstrap,
    seed_interval,
    wilson_interval,
)
from llmcourse.inference.sampling import SamplingParams
from llmcourse.labs import store_results
from llmcourse.models import Transformer
from llmcourse.models.pretrained import save_pretrained
from llmcourse.runtime import pick_device, progress

SIZES = {
    "cpu": {"requests": 1300, "answers": 4, "held_out": 200, "probes": 80, "n_seeds": 3, "steps": 52, "far": 30, "family": 12, "lr": 5e-4, "new_tokens": 96},
    "gpu": {"requests": 8000, "answers": 4, "held_out": 300, "probes": 128, "n_seeds": 5, "steps": 240, "far": 300, "family": 120, "lr": 5e-5, "new_tokens": 160},
    "smoke": {"requests": 12, "answers": 3, "held_out": 6, "probes": 3, "n_seeds": 2, "steps": 2, "far": 3, "family": 2, "lr": 1e-4, "new_tokens": 12},
}  # fmt: skip
if PRESET not in SIZES:
    raise ValueError(f"PRESET={PRESET!r}: choose one of {', '.join(SIZES)}")
sizes, smoke = SIZES[PRESET], PRESET == "smoke"
own = (
    not MODEL and CORPUS == "tinytown" and not smoke
)  # whether the figures are those that the claims are about
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
# **Why.** The assistant was trained on right answers. It has never been told what is wrong with its own. We let it answer each request four times at temperature 1, and an annotator ranks the answers; the first and the last of the ranking become a pair. The annotator goes by the true reward (2 for a right answer, plus up to 3 for a well-formed, true text of the usual length) and errs like a Bradley–Terry judge with a noise of 0.5: between two answers, a difference in reward of 0.5 is seen in 73 % of the cases. Two answers would do as well, only that most of their pairs say little: where both are right, or both wrong, the label is nearly a coin flip. The ends of a ranking of four lie farther apart.
#
# The requests are sums and texts with constraints. Questions about residents and stories are left out on purpose. Where the model is wrong there, a pair is mostly two wrong guesses, which teach it nothing except to guess differently.

# %%
assistant = pipeline.load(
    "sft", preset="cpu" if smoke else PRESET, corpus=CORPUS, seed=SEED, model=MODEL, **({"steps": 4} if smoke else {})
)  # fmt: skip
tokenizer = assistant.tokenizer


def without_spare_ids(model, n):
    """The same model with the first n ids only: many have rows for ids that no token uses, and sampling may draw one."""
    kept = {
        name: weight[:n] if name in ("embedding.weight", "head.weight") else weight
        for name, weight in model.state_dict().items()
    }
    smaller = Transformer(dataclasses.replace(model.config, vocab_size=n))
    smaller.load_state_dict(kept)
    return smaller


reference = without_spare_ids(assistant.model, tokenizer.vocab_size).to(device).eval()
instructions, chat = TownInstructions(Town(pipeline.TOWN_SEED)), chat_format(tokenizer)
context = min(reference.config.context_length, 512)
PAIRED = ("sums", "constraints")


def sampled_answers(requests, n, seed):
    """n lists, each with an answer of the reference to every request, drawn at temperature 1."""
    chats = [request.messages for request in requests]
    for part in range(1, n + 1):
        params = SamplingParams(temperature=1.0, max_new_tokens=sizes["new_tokens"], seed=1000 * seed + part)
        yield answer_chats(reference, tokenizer, chats, params, batch_size=256)


def ranked(seed, reward=None):
    """The annotator's pairs: the first and the last of its ranking of the answers to each request."""
    return annotate_rankings(requests, candidates, reward or instructions.reward, noise=0.5, seed=seed)


requests = instructions.training(sizes["requests"], 21 + SEED, tasks=PAIRED)
candidates = list(sampled_answers(requests, sizes["answers"], SEED))
pairs = ranked(SEED)
for request, pair in [(r, p) for r, p in zip(requests, pairs, strict=True) if p.chosen != p.rejected][:4]:
    print(f"{request.messages[-1]['content']}\n  chosen:   {pair.chosen}\n  rejected: {pair.rejected}\n  true reward of the chosen one is larger by {pair.margin:+.2f}\n")  # fmt: skip

# %% [markdown]
# **Encode.** A pair becomes the ids of its prompt and of both answers, end of turn included. Pairs whose answers are identical hold no preference; they are dropped and counted. A second set is kept apart for measuring: held-out requests with two answers each, an annotator without noise, and only pairs whose true rewards differ.


# %%
def encoded(some_pairs):
    """Pairs as ids, those that do not fit or hold no preference left out."""
    return encode_pairs(some_pairs, chat, context_length=context)


def batches_of(data, batch_size=32, seed=SEED):
    """Batches of encoded pairs; the width of a batch is that of its longest row."""
    return PreferenceBatches(data, batch_size=min(batch_size, len(data)), context_length=context, seed=seed)


training = encoded(pairs)
held_out = [one for task in PAIRED for one in instructions.held_out(task, sizes["held_out"], SEED + 1)]
judged = annotate(
    held_out, *sampled_answers(held_out, 2, SEED + 1), instructions.reward, noise=0.0, seed=SEED
)
test = encoded([pair for pair in judged if pair.margin > 0])
clear = test.margins > 0.5
if not clear.any():  # a model from outside may write no such pair
    clear[:] = True
print({name: int(count) for name, count in training.counts.items()}, "to train on")
print(
    f"{len(test)} held-out pairs without noise, {int(clear.sum())} of them clear: true rewards more than 0.5 apart"
)
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
# **Predict.** Three rules that know nothing about what is right choose between the answers of a pair: the longer one, the one that the reference finds likelier, the one that it finds likelier per token. How often does each agree with a perfect annotator?


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
BETA = 0.3


STORED = {}  # log-probabilities under the reference, by the checksum of the pairs: one pass each


def with_stored(data, seed, batch_size):
    """Batches of pairs that carry the reference's two numbers of each pair."""
    if data.checksum not in STORED:
        STORED[data.checksum] = reference_log_probs(reference, batches_of(data), progress=False)
    return ReferenceBatches(batches_of(data, batch_size, seed), STORED[data.checksum])


def train(data, *, seed=SEED, batch_size=32, evaluate=None, **changes):
    """A copy of the reference trained on encoded pairs, and the run's records."""
    policy = copy.deepcopy(reference)
    options = {"beta": BETA, "lr": sizes["lr"], "steps": sizes["steps"], "seed": seed} | changes
    settings = dpo.preset("cpu" if smoke else PRESET, **options)
    # KTO's reference point needs a third row a pair, which train_dpo adds and computes itself
    source = (
        batches_of(data, batch_size, seed) if settings.loss == "kto" else with_stored(data, seed, batch_size)
    )
    run = dpo.train_dpo(policy, source, settings, reference=reference, evaluate=evaluate, progress=False)
    return policy.eval(), run


some = [pair for pair in pairs if pair.chosen != pair.rejected][: 4 if smoke else 32]
few = encoded(some)
policy, run = train(few, steps=2 if smoke else 16, schedule="constant", warmup_steps=0)
print("step    loss  margin h  chosen ln p  rejected ln p")
for record in run.records[:: 1 if smoke else 3]:
    print(f"{record['step']:>4} {record['loss']:>7.4f} {record['margin'] / BETA:>9.2f} "
          f"{record['chosen_log_prob']:>12.2f} {record['rejected_log_prob']:>14.2f}")  # fmt: skip
results["one_batch"] = {
    key: [r[key] for r in run.records] for key in ("loss", "chosen_log_prob", "rejected_log_prob")
}

# %% [markdown]
# **Read the result.** The first loss is $\ln 2$, because a policy that equals its reference has no margin anywhere. If a run of yours starts elsewhere, its policy and its reference differ in something that you did not intend. Then look at the last two columns. The margin is a difference, and the loss does not say which side should pay for it.
#
# **Run: the gradient, assembled by hand.** Two ways to the same numbers. One is the loss as it is trained: a row per pair, its prompt read once for both answers, the reference's numbers from a table. The other takes chosen and rejected answers through the model in rows of their own, and puts the two gradients together with the weights of exercise 3.

# %%
settings = dpo.cpu(beta=BETA, share_prompt=True, precision="fp32")
batch = dpo.with_reference(reference, batches_of(few), settings, progress=False).next()
batch = {name: value.to(device) for name, value in batch.items()}
loss, count, _ = dpo.preference_loss(settings)(policy, batch)
sides = [response_log_probs(policy, batch[f"{s}_tokens"], batch[f"{s}_targets"]).sum(dim=-1) for s in ("chosen", "rejected")]  # fmt: skip
h = log_ratio_margin(*sides, batch["chosen_ref_log_probs"], batch["rejected_ref_log_probs"])
weight = (BETA * torch.sigmoid(-BETA * h)).detach()
by_hand = -(weight * (sides[0] - sides[1])).sum()
flat = [
    torch.cat([g.flatten() for g in torch.autograd.grad(value, list(policy.parameters()))]).double()
    for value in (loss, by_hand)
]
gradient_error = float((flat[0] - flat[1]).norm() / flat[0].norm())
print(f"relative difference of the two gradients: {gradient_error:.1e}")
print(
    f"weights after {len(run.records)} steps: {weight.min():.4f} to {weight.max():.4f}; before the first: {BETA / 2:.4f}"
)
results["gradient_error"] = gradient_error

# %% [markdown]
# ## 3. What accuracy says, and what the policy writes
#
# **Why.** A run reports the loss and the accuracy of its implicit rewards. Neither is what we want, which is better answers. Here the true reward is a function, so both can be measured: the accuracy on held-out pairs, and the true reward of what the policy writes to held-out requests, each with its interval.
#
# **Exercise 4.** Implicit rewards of a batch, their margin, and the accuracy. A tie counts one half.
#
# <details><summary>Hint</summary>
#
# The reward of a response is $\beta$ times its log-ratio to the reference. The sign of the margin is −1, 0 or 1.
#
# </details>


# %% exercise="implicit_rewards"
def my_implicit_rewards(
    chosen_log_probs, rejected_log_probs, chosen_ref_log_probs, rejected_ref_log_probs, *, beta
):  # fmt: skip
    """Four tensors (B,) -> {"chosen_reward", "rejected_reward", "margin", "accuracy"}, scalars."""
    raise NotImplementedError


# %% check="implicit_rewards"
check("dpo/implicit_rewards", my_implicit_rewards)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_implicit_rewards(
#     chosen_log_probs, rejected_log_probs, chosen_ref_log_probs, rejected_ref_log_probs, *, beta
# ):
#     chosen = beta * (chosen_log_probs - chosen_ref_log_probs)
#     rejected = beta * (rejected_log_probs - rejected_ref_log_probs)
#     margin = chosen - rejected
#     return {
#         "chosen_reward": chosen.mean(),
#         "rejected_reward": rejected.mean(),
#         "margin": margin.mean(),
#         "accuracy": ((margin.sign() + 1) / 2).mean(),
#     }
# ```
#
# </details>
#
# **Predict.** The accuracy on held-out pairs starts at one half. Where will it end: near 60 %, 80 % or 95 %? And if it ends low, can the answers have become better all the same?


# %%
probes = [one for task in PAIRED for one in instructions.held_out(task, sizes["probes"], SEED + 2)]
prompts = [chat.prompt(one.messages) for one in probes]


def true_reward(number, ids):
    """What the answer to a probe is worth."""
    return instructions.reward(probes[number], tokenizer.decode(ids))


def written(policy):
    """One answer to each probe at temperature 1: KL (nats), true reward, length in tokens, three arrays (probes,)."""
    return sampled_kl_and_reward(
        policy, reference, prompts, true_reward, stop_id=chat.stop_ids[0], max_new_tokens=sizes["new_tokens"], seed=SEED
    )  # fmt: skip


def held_out_margins(policy):
    """Implicit margins h (test pairs,) in nats, and by how much the chosen answers' ln p moved on average."""
    chosen, rejected = log_probs_of(policy, test)
    return (chosen - chosen_ref) - (rejected - rejected_ref), float((chosen - chosen_ref).mean())


class Watch:
    """An `evaluate` for the loop that keeps KL, true reward and length of every probe."""

    def __init__(self):
        self.points = []

    def __call__(self, policy):
        """Measure, and give the loop the means."""
        self.points.append(written(policy))
        kl, rewards, lengths = (float(values.mean()) for values in self.points[-1])
        return {"kl": kl, "true_reward": rewards, "length": lengths}


_, start_rewards, start_lengths = written(reference)
print(f"true reward of the reference: {bootstrap_interval(start_rewards):.2f}")
trained, watches = [], []
for seed in progress(seeds, description="DPO", unit="run"):
    watches.append(Watch())
    trained.append(train(encoded(ranked(seed)), seed=seed, evaluate=watches[-1], eval_every=sizes["steps"]))
print(
    f"{'seed':>4}  {'accuracy, clear held-out pairs':<33}{'true reward minus the reference, same probes':<46}{'KL':>5}{'chosen ln p':>13}"
)
accuracy, gain, chosen_moved = [], [], []
for seed, (policy, _), watch in zip(seeds, trained, watches, strict=True):
    margins, moved = held_out_margins(policy)
    kl, rewards, _ = watch.points[-1]
    accuracy.append(share(agrees(margins, 0)[clear]))
    gain.append(paired_bootstrap(rewards, start_rewards))
    chosen_moved.append(moved)
    print(f"{seed:>4}  {f'{accuracy[-1]:.1%}':<33}{f'{gain[-1]:+.2f}':<46}{kl.mean():>5.2f}{moved:>+13.2f}")
print(f"over seeds: true reward {seed_interval([g.value for g in gain]):+.2f}")

# %% [markdown]
# **What was learned, and what it cost.** The same policies on all four tasks of the assistant, answered greedily. The pairs were about two of them.

# %%
greedy = SamplingParams(temperature=0.0, max_new_tokens=sizes["new_tokens"])


def right_share(model, task):
    """Share of right answers to held-out requests of a task, answered greedily."""
    return share_right(
        model, tokenizer, instructions.held_out(task, sizes["probes"], SEED + 3), params=greedy
    )


by_task = {}
for task in TASKS:
    before, *after = (right_share(model, task) for model in (reference, *(policy for policy, _ in trained)))
    by_task[task] = {"before": before.value, "after": [one.value for one in after], "n": before.n}
    print(
        f"{task:>12}: {before:.1%} before; by seed afterwards " + ", ".join(f"{a.value:.1%}" for a in after)
    )
plain = [
    one for one in instructions.held_out("sums", sizes["probes"], SEED + 3) if "steps" not in one.variety
]


def shows_steps(model):
    """Share of plainly asked sums that are answered with their steps."""
    answers = answer_chats(model, tokenizer, [one.messages for one in plain], greedy)
    return sum(":" in answer for answer in answers) / max(1, len(plain))


steps_before, *steps_after = (shows_steps(model) for model in (reference, *(policy for policy, _ in trained)))
print(
    f"steps shown where nobody asked for them (n={len(plain)}): {steps_before:.1%} before; afterwards "
    + ", ".join(f"{value:.1%}" for value in steps_after)
)
results["main"] = {
    "steps_shown": {"before": steps_before, "after": steps_after, "n": len(plain)},
    "steps": sizes["steps"], "beta": BETA, "lr": sizes["lr"], "seeds": list(seeds), "by_task": by_task,
    "start": start_rewards.mean(), "accuracy": [a.value for a in accuracy], "accuracy_low": [a.low for a in accuracy],
    "gain": [g.value for g in gain], "gain_low": [g.low for g in gain], "gain_high": [g.high for g in gain],
    "kl": [watch.points[-1][0].mean() for watch in watches],
    "length": [watch.points[-1][2].mean() for watch in watches], "start_length": start_lengths.mean(),
    "chosen_moved": chosen_moved,
}  # fmt: skip

# %% [markdown]
# **Which pairs are still pulling?** The weight of a pair at the end of training, on average over those that the annotator judged rightly and those with a mistake.

# %%
policy, labels = trained[0][0], training
now = log_probs_of(policy, labels)
before = [STORED[labels.checksum][f"{side}_ref_log_probs"].double().numpy() for side in ("chosen", "rejected")]  # fmt: skip
h = torch.from_numpy((now[0] - before[0]) - (now[1] - before[1]))
weight, mistaken = (BETA * torch.sigmoid(-BETA * h)).numpy(), labels.margins < 0
print(f"{mistaken.mean():.1%} of the pairs are mistakes")
for name, chosen in (("right", ~mistaken), ("mistaken", mistaken)):
    if chosen.any():
        print(
            f"{name:>9}: mean margin h {h.numpy()[chosen].mean():+.2f} nats, mean weight {weight[chosen].mean():.4f}"
        )
results["weights"] = {
    "mistakes": float(mistaken.mean()), "right": float(weight[~mistaken].mean()),
    "mistaken": float(weight[mistaken].mean()) if mistaken.any() else None,
}  # fmt: skip

# %% [markdown]
# **Read the result.** The accuracy on held-out pairs is modest, below that of both likelihood rules of section 1, and still the answers earn more on average. The two measure different things. Accuracy asks the policy to judge two given answers, and to tell a right sum from a wrong one it would have to compute. The true reward asks what it writes. Where did the gain come from? Bare results of sums are mostly wrong in this model, sums with their steps mostly right, and now and then an answer shows its steps although nobody asked for them. Such an answer usually wins its pair. The last line of the table by task says whether the policy has picked that up. The rows of the tasks without pairs say what it cost elsewhere. With so few requests a row, a difference of a few points is noise; tens of points are the price of a policy that has gone far, and the KL divergence says how far.
#
# Compare also the chosen log-probability of section 3's policies: where it has fallen, the margin was earned on the rejected side. And the weights: the pairs that were judged rightly have lost more than a third of their pull, the mistaken ones about an eighth, so the share of the mistakes in the gradient has grown.

# %% [markdown]
# ## 4. Over-optimization
#
# **Why.** Two knobs decide how far a run goes from its reference: how soon pairs count as settled ($\beta$), and how long and how fast it trains. Turn both the wrong way, and the pairs that improved the answers ruin them, while loss and accuracy on pairs give no alarm.
#
# **Predict.** The same pairs and labels, $\beta = 0.01$ in place of 0.3, and a constant rate twice as high. Sketch the true reward against the step. What will the accuracy on held-out pairs be at the end, compared with section 3?

# %%
over = {"beta": 0.01, "lr": 2 * sizes["lr"], "schedule": "constant", "steps": sizes["far"], "eval_every": max(1, sizes["far"] // 3)}  # fmt: skip
far, far_watches = [], []
for seed in progress(seeds, description="too far", unit="run"):
    far_watches.append(Watch())
    far.append(train(encoded(ranked(seed)), seed=seed, batch_size=16, evaluate=far_watches[-1], **over))
origin = (np.zeros_like(start_rewards), start_rewards, start_lengths)
far_steps = [0, *(evaluation["step"] for evaluation in far[0][1].evaluations)]
far_curves = np.array(
    [[[v.mean() for v in point] for point in (origin, *watch.points)] for watch in far_watches]
)


def recent(run, name, step, window=15):
    """Mean of a record over the steps before `step`."""
    return statistics.fmean(record[name] for record in run.records[max(0, step - window) : step])


print("  step    loss  accuracy  margin h     KL  true reward  length    (means over seeds)")
for step, (kl, reward, length) in zip(far_steps, far_curves.mean(axis=0), strict=True):
    loss, right, margin = (
        statistics.fmean(recent(run, name, step) for _, run in far) if step else start
        for name, start in (("loss", math.log(2)), ("accuracy", 0.5), ("margin", 0.0))
    )
    print(
        f"{step:>6}{loss:>8.3f}{right:>10.1%}{margin / over['beta']:>10.1f}{kl:>7.2f}{reward:>13.2f}{length:>8.1f}"
    )

# %%
main_curves = np.array(
    [[[v.mean() for v in point] for point in (origin, *watch.points)] for watch in watches]
)
points = np.concatenate([main_curves.reshape(-1, 3), far_curves.reshape(-1, 3)])
points = points[points[:, 0] > 0]
curve = fit_over_optimization(points[:, 0], points[:, 1], start_rewards.mean())
grid = np.linspace(0, 1.05 * points[:, 0].max(), 200)[1:]
series = {f"far, seed {seed}": (one[:, 0], one[:, 1]) for seed, one in zip(seeds, far_curves, strict=True)}
series |= {
    f"section 3, seed {seed}": (one[:, 0], one[:, 1]) for seed, one in zip(seeds, main_curves, strict=True)
}
figure = plotting.lines(
    series, xlabel="KL(policy || reference), nats", ylabel="true reward", markers=True,
    title="Over-optimization: what the policy writes", horizontal={"reference": start_rewards.mean()},
)  # fmt: skip
plotting.show(
    figure,
    alt="True reward against KL divergence, one line per run: those of section 3 stay near the reference and rise, "
    "the runs that go too far reach large divergences and fall.",
)
print(f"fit of R0 + d (a - b ln d) to all points: a = {curve.alpha:.2f}, b = {curve.beta:.2f}, peak at {curve.peak_kl:.1f} nats")  # fmt: skip
lost = [
    paired_bootstrap(bad.points[-1][1], good.points[-1][1])
    for bad, good in zip(far_watches, watches, strict=True)
]
far_margins = [held_out_margins(policy) for policy, _ in far]
far_accuracy = [share(agrees(margins, 0)[clear]) for margins, _ in far_margins]
for seed, one, right, (_, moved) in zip(seeds, lost, far_accuracy, far_margins, strict=True):
    print(
        f"seed {seed}: true reward minus that of section 3's policy, same probes: {one:+.2f}; "
        f"accuracy on clear held-out pairs {right.value:.1%}, chosen ln p {moved:+.1f}"
    )
results["far"] = over | {
    "at": far_steps, "curves": far_curves, "main_curves": main_curves, "batch_size": 16,
    "fit": {"alpha": curve.alpha, "beta": curve.beta}, "lost": [one.value for one in lost],
    "lost_high": [one.high for one in lost], "accuracy": [one.value for one in far_accuracy],
    "chosen_moved": [moved for _, moved in far_margins],
    "loss": [recent(run, "loss", sizes["far"]) for _, run in far],
}  # fmt: skip

# %% [markdown]
# **Read the result.** The divergence keeps growing, the answers become longer, and the true reward falls below that of the reference, although the pairs are those that improved the answers in section 3. Now look for an alarm in what the pairs say. The loss on the training pairs is below $\ln 2$, so by its own account the policy is better than the reference. The accuracy on held-out pairs is that of section 3, about 60 %: it would pass for a run as good as those. Only one record looks odd, and it is not one that the loss contains: the log-probability of the chosen answers has dropped by many nats. The policy has become unlikely to write either answer of a pair; what it writes instead is in no pair, so no pair can object.
#
# The fitted curve is Gao's form, drawn for reinforcement learning. Read it as a summary: runs that went along different roads do not lie on one curve, and where its peak is depends on which points one has. Here it passes below the gain of section 3.

# %% [markdown]
# ## 5. The family
#
# **Why.** Each descendant changes one thing: what a settled pair is, what a response is compared with, or whether there is a reference. Write three of them.
#
# **Exercise 5.** IPO: the square of the distance between the margin and its target $1/(2\beta)$.
#
# <details><summary>Hint</summary>
#
# A pair beyond the target is pulled back. There is no hinge.
#
# </details>


# %% exercise="ipo_loss"
def my_ipo_loss(
    chosen_log_probs, rejected_log_probs, chosen_ref_log_probs, rejected_ref_log_probs, *, beta=0.1
):
    """Four tensors (B,) -> (B,)."""
    raise NotImplementedError


# %% check="ipo_loss"
check("dpo/ipo_loss", my_ipo_loss)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_ipo_loss(chosen_log_probs, rejected_log_probs, chosen_ref_log_probs, rejected_ref_log_probs, *, beta=0.1):
#     h = (chosen_log_probs - chosen_ref_log_probs) - (rejected_log_probs - rejected_ref_log_probs)
#     return (h - 1 / (2 * beta)) ** 2
# ```
#
# </details>
#
# **Exercise 6.** KTO: single responses, each compared with the reference point $z = \max(0, \text{mean of the mismatched log-ratios})$. The loss is $w\,(1 - \sigma(\pm\beta(\ell - z)))$, with + for desirable responses.
#
# <details><summary>Hint</summary>
#
# $z$ says where the loss saturates and is not trained: detach it.
#
# </details>


# %% exercise="kto_loss"
def my_kto_loss(
    log_probs, ref_log_probs, desirable, mismatched_log_probs, mismatched_ref_log_probs,
    *, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0,
):  # fmt: skip
    """Responses (B,), desirable (B,) bool, mismatched ones (M,) -> (B,)."""
    raise NotImplementedError


# %% check="kto_loss"
check("dpo/kto_loss", my_kto_loss)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_kto_loss(
#     log_probs, ref_log_probs, desirable, mismatched_log_probs, mismatched_ref_log_probs,
#     *, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0,
# ):
#     z = (mismatched_log_probs - mismatched_ref_log_probs).mean().detach().clamp(min=0)
#     away = log_probs - ref_log_probs - z
#     gained = torch.where(desirable, away, -away)
#     weight = torch.where(desirable, desirable_weight, undesirable_weight)
#     return weight * (1 - torch.sigmoid(beta * gained))
# ```
#
# </details>
#
# **Exercise 7.** SimPO: means per token in place of log-ratios, and a margin $\gamma$ of rewards to win by.
#
# <details><summary>Hint</summary>
#
# Each side is divided by its own length. $\gamma$ is not multiplied by $\beta$.
#
# </details>


# %% exercise="simpo_loss"
def my_simpo_loss(
    chosen_log_probs, rejected_log_probs, chosen_lengths, rejected_lengths, *, beta=2.0, gamma=1.0
):
    """Summed log-probabilities and lengths, all (B,) -> (B,)."""
    raise NotImplementedError


# %% check="simpo_loss"
check("dpo/simpo_loss", my_simpo_loss)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_simpo_loss(chosen_log_probs, rejected_log_probs, chosen_lengths, rejected_lengths, *, beta=2.0, gamma=1.0):
#     chosen, rejected = chosen_log_probs / chosen_lengths, rejected_log_probs / rejected_lengths
#     return -F.logsigmoid(beta * (chosen - rejected) - gamma)
# ```
#
# </details>
#
# **Predict.** The same pairs in the same order, the same rate, fewer and smaller steps than in section 3, each loss with the β that its paper or TRL starts from. Which one goes farthest from the reference? Which one hardly moves?

# %%
FAMILY = {
    "DPO": {},
    "IPO": {"loss": "ipo", "length_normalized": False},
    "KTO": {"loss": "kto"},
    "ORPO": {"loss": "orpo"},
    "SimPO": {"loss": "simpo"},
}
family = {}
print(
    f"{'':>6}{'KL':>7}  {'true reward minus the reference':<34}{'clear pairs':>12}{'chosen ln p':>13}{'length':>8}"
)
for name, options in FAMILY.items():
    options = {
        "beta": dpo.BETAS[options.get("loss", "dpo")],
        "steps": sizes["family"],
        "warmup_steps": 2,
        "batch_size": 16,
    } | options
    policy, _ = train(training, **options)
    kl, rewards, lengths = written(policy)
    margins, moved = held_out_margins(policy)
    difference, right = paired_bootstrap(rewards, start_rewards), share(agrees(margins, 0)[clear])
    print(
        f"{name:>6}{kl.mean():>7.2f}  {f'{difference:+.2f}':<34}{right.value:>12.1%}{moved:>+13.2f}{lengths.mean():>8.1f}"
    )
    family[name] = {
        "kl": kl.mean(), "gain": difference.value, "low": difference.low, "high": difference.high,
        "accuracy": right.value, "chosen_moved": moved, "length": lengths.mean(),
    }  # fmt: skip
results["family"] = family | {"steps": sizes["family"]}

# %% [markdown]
# **Read the result.** Equal steps are not an equal distance. ORPO has moved least: with its weight of 0.1 on the odds ratio it is mostly fine-tuning on answers that the model already gives. SimPO, which has nothing that holds it, has moved farthest, though not far in a dozen steps. What sets the others apart comes later too, when pairs begin to be settled: DPO's gradient fades there, IPO's turns around at 5 nats, KTO's has its peak at the reference point. With one seed and overlapping intervals the table ranks nothing. To compare methods, give each its own best rate and β, and plot reward against KL as in section 4.

# %% [markdown]
# ## The same with the library
#
# TRL's `DPOTrainer` on the same pairs in the same order, from the same weights, with the same optimizer. Loss and gradient norm of every step are compared; the gradient norm is that of all weights together before clipping.

# %%
# bitsandbytes, which peft imports, warns of a kernel that is not used here, and TRL of an option of its own
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning)

import transformers
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl import DPOConfig, DPOTrainer

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
disable_progress_bars()
LIBRARY_STEPS, LIBRARY_PAIRS = 2 if smoke else 5, 4 if smoke else 16
small = [pair for pair in pairs if pair.chosen != pair.rejected][: LIBRARY_STEPS * LIBRARY_PAIRS]
source = batches_of(encoded(small), LIBRARY_PAIRS)
order = [row for position in range(LIBRARY_STEPS) for row in source.rows(position)]
options = {"steps": LIBRARY_STEPS, "lr": 1e-4, "warmup_steps": 0, "schedule": "constant", "precision": "fp32"}
ours = copy.deepcopy(reference).cpu()
ours_run = dpo.train_dpo(ours, source, dpo.cpu(beta=BETA, **options), progress=False)
with tempfile.TemporaryDirectory() as folder:
    save_pretrained(reference.cpu(), folder, tokenizer)
    reference.to(device)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    arguments = DPOConfig(
        output_dir=str(Path(folder, "trl")), max_steps=LIBRARY_STEPS, per_device_train_batch_size=LIBRARY_PAIRS,
        learning_rate=1e-4, lr_scheduler_type="constant", adam_beta2=0.95, weight_decay=0.0, max_grad_norm=1.0,
        beta=BETA, max_length=context + 1, train_sampling_strategy="sequential", precompute_ref_log_probs=True,
        bf16=False, use_cpu=True, gradient_checkpointing=False, dataloader_pin_memory=False, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = DPOTrainer(
        theirs, args=arguments, train_dataset=Dataset.from_list([small[row].row for row in order]),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
theirs_log = [row for row in trainer.state.log_history if "loss" in row]
print("step   loss: ours      TRL   gradient norm: ours      TRL")
for a, b in zip(ours_run.records, theirs_log, strict=True):
    print(
        f"{a['step']:>4} {a['loss']:>12.5f} {b['loss']:>8.5f} {a['grad_norm']:>21.4f} {b['grad_norm']:>8.4f}"
    )
loss_error = max(abs(a["loss"] - b["loss"]) for a, b in zip(ours_run.records, theirs_log, strict=True))
norm_error = max(
    abs(a["grad_norm"] / b["grad_norm"] - 1) for a, b in zip(ours_run.records, theirs_log, strict=True)
)
results["library"] = {"steps": LIBRARY_STEPS, "loss_error": loss_error, "norm_error": norm_error}

# %% [markdown]
# The formulas agree, and so does everything around them: which tokens count, where the reference's numbers come from, the mean over pairs. What differs is the work. TRL reads the prompt of a pair twice, here it is read once. `label_smoothing` deserves care: in TRL 1.16 it has no effect on the loss called `sigmoid`.

# %% [markdown]
# ## Measured results
#
# What this lab claims. Each line is computed from the runs above, and the lab stops if one does not hold.

# %%
# NBVAL_CHECK_OUTPUT
claim(
    "ln2",
    abs(results["one_batch"]["loss"][0] - math.log(2)) < 1e-3,
    "a policy that equals its reference has the loss ln 2",
)
claim(
    "gradient",
    gradient_error < 1e-3,
    "a shared prompt and stored numbers give the gradient that is put together by hand",
)
claim("trl", loss_error < 1e-3 and norm_error < 1e-2, "losses and gradient norms of training equal TRL's")
if own:
    claim(
        "accuracy",
        all(a.low > 0.5 for a in accuracy),
        "on clear held-out pairs the implicit reward is right more often than not, for every seed",
    )
    claim(
        "reward",
        paired_bootstrap(np.mean([watch.points[-1][1] for watch in watches], axis=0), start_rewards).low > 0,
        "the true reward of what the policies write rises, on average over the seeds",
    )
    claim(
        "too-far",
        statistics.fmean(one.high for one in lost) < 0,
        "trained too far the policies write worse than those of section 3, on average over the seeds",
    )
    claim(
        "displacement",
        max(moved for _, moved in far_margins) < min(results["main"]["chosen_moved"]),
        "and the chosen answers have become less likely than in any run of section 3",
    )
    claim(
        "no-alarm",
        max(results["far"]["loss"]) < math.log(2),
        "yet on the training pairs its loss is below that of the reference",
    )

# %% [markdown]
# ## Break it
#
# An annotator who likes long answers. The requests and the answers are those of before, and on a laptop the run has half the steps of section 3; the rankings differ: the reward is a fifth of the number of words, whatever they say.


# %%
def likes_words(request, answer):
    """A reward of 1 for every five words."""
    return len(answer.split()) / 5


def longer_wins(some_pairs):
    """For texts under a constraint whose lengths differ by three words or more: whether the longer one was chosen."""
    words = [
        (len(pair.chosen.split()), len(pair.rejected.split()))
        for request, pair in zip(requests, some_pairs, strict=True)
        if request.task == "constraints"
    ]
    return np.array([a > b for a, b in words if abs(a - b) >= 3] or [0.5])


biased_pairs = ranked(SEED, likes_words)
biased = encoded(biased_pairs)
longer, longer_before = longer_wins(biased_pairs), longer_wins(pairs)
policy, run = train(biased, steps=2 * sizes["family"])
_, rewards, lengths = written(policy)
print(f"of two texts of different length, the longer one is chosen in {share(longer):.1%}; by the honest annotator in {share(longer_before):.1%}")  # fmt: skip
print(f"length minus the reference's, same probes: {paired_bootstrap(lengths, start_lengths):+.1f} tokens")
print(f"true reward minus the reference's:         {paired_bootstrap(rewards, start_rewards):+.2f}")
print(
    f"true reward minus that of section 3:       {paired_bootstrap(rewards, watches[0].points[-1][1]):+.2f}"
)
example = max(range(len(probes)), key=lambda i: lengths[i] - start_lengths[i])
print(
    f"\n{probes[example].messages[-1]['content']}\n  {answer_chats(policy, tokenizer, [probes[example].messages], greedy)[0][:400]}"
)
results["biased"] = {
    "longer": float(share(longer).value), "honest_longer": float(share(longer_before).value),
    "length": lengths.mean(), "reward": rewards.mean(), "start_length": start_lengths.mean(),
}  # fmt: skip

# %% [markdown]
# **Diagnosis.** The records of this run look as healthy as those of any other: the loss has no opinion about why an answer was chosen. What gives the annotator away is there before training. Take texts with a constraint, leave out pairs of about equal length, and ask how often the longer one was chosen: nearly always, where the honest annotator, who wants so many sentences and no more, is far from that. Among sums the rule would have said little, since a sum with its steps is both longer and more often right. Afterwards, the length of the answers is the record to watch. The remedies are in the data (pairs of like length, or a judge who is told the lengths) or in the loss: a price per token in the logit, or log-ratios divided by their lengths.

# %%
# NBVAL_CHECK_OUTPUT
told_apart = share(longer).low > share(longer_before).high
if own:
    claim(
        "giveaway",
        told_apart,
        "the labels alone show it: the longer text wins more often than with an honest annotator",
    )
    claim("longer", paired_bootstrap(lengths, start_lengths).low > 0, "answers become longer")
    claim(
        "not-better",
        paired_bootstrap(rewards, watches[0].points[-1][1]).high < 0,
        "and their true reward stays below that of section 3",
    )

# %%
store_results("dpo", results)

# %% [markdown]
# ## Takeaways
#
# * Before training on pairs, ask what tells the two sides apart without reading them. Length and likelihood are the first suspects.
# * The loss of the first step is $\ln 2$. Overfit one batch before anything else, and watch both log-probabilities while it happens.
# * Accuracy on pairs and quality of what is written are two measurements. A modest accuracy can go with a gain, and the same accuracy with a large loss.
# * The weight of a pair is largest where the implicit reward disagrees with the label, and a wrong label looks like a hard pair. That is what label smoothing, IPO's target and KTO's saturation are for.
# * Distance from the reference is spent, not earned. Measure what you want at several distances and stop there; no number from the training pairs knows where that is.
# * Compare losses of the family at the distance they reached, and not only after equal steps.

# %% [markdown]
# ## Next
#
# The chapter, [Direct preference optimization and its family](../book/posttraining/dpo.md), derives the loss from the objective that it solves, says what it does not constrain, and compares published recipes. The next lab, [15 Reasoning](15_reasoning.ipynb), gives up pairs: the policy samples groups of answers, and a verifier pays for the right ones.
