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
from llmcourse.alignment.log_probs import response_log_probs
from llmcourse.alignment.over_optimization import fit_over_optimization, sampled_kl_and_reward
from llmcourse.alignment.preference_losses import log_ratio_margin
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


some = [pair for pair in pairs if pair.chosen != pair.rejected][: 4 if smoke else 32]
few = encoded(some)
policy, run = train(few, steps=2 if smoke else 16, schedule="constant", warmup_steps=0)
print("step    loss  margin h  chosen ln p  rejected ln p")
for record in run.records[:: 1 if smoke else 3]:
    print(f"{record['step']:>4} {record['loss']:>7.4f} {record['margin'] / BETA:>9.2f} "
          f"{record['chosen_log_prob']:>12.2f} {record['rejected_log_prob']:>14.2f}")  # fmt: skip
results["one_batch"] = {key: [r[key] for r in run.records] for key in ("loss", "chosen_log_prob", "rejected_log_prob")}

# %% [markdown]
# **Read the result.** The first loss is $\ln 2$, because a policy that equals its reference has no margin anywhere. If a run of yours starts elsewhere, its policy and its reference differ in something that you did not intend. Then look at the last two columns. The margin is a difference, and the loss does not say which side should pay for it.
#
# **Run: the gradient, assembled by hand.** Two ways to the same numbers. One is the loss as it is trained: a row per pair, its prompt read once for both answers, the reference's numbers from a table. The other takes chosen and rejected answers through the model in rows of their own, and puts the two gradients together with the weights of exercise 3.

# %%
settings = dpo.cpu(beta=BETA, share_prompt=True)
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
print(f"weights after {len(run.records)} steps: {weight.min():.4f} to {weight.max():.4f}; before the first: {BETA / 2:.4f}")
n_slots = [int((batch["shared_segments"] >= 0).sum()), sum(int((batch[f"{s}_targets"] != -100).sum()) for s in ("chosen", "rejected"))]  # fmt: skip
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
    labels = annotate(requests, first, second, instructions.reward, noise=0.5, seed=seed)
    watches.append(Watch())
    trained.append(train(encoded(labels), seed=seed, evaluate=watches[-1], eval_every=sizes["steps"] // 2))
print(f"{'seed':>4}  {'accuracy, clear held-out pairs':<33}{'true reward minus the reference, same probes':<46}{'KL':>5}{'chosen ln p':>13}")
accuracy, gain = [], []
for seed, (policy, _), watch in zip(seeds, trained, watches, strict=True):
    margins, moved = held_out_margins(policy)
    kl, rewards, _ = watch.points[-1]
    accuracy.append(share(agrees(margins, 0)[clear]))
    gain.append(paired_bootstrap(rewards, start_rewards))
    print(f"{seed:>4}  {accuracy[-1]:<33.1%}{gain[-1]:<46.2f}{kl.mean():>5.2f}{moved:>+13.2f}")
print(f"over seeds: true reward {seed_interval([g.value for g in gain]):+.2f}")

# %% [markdown]
# **What was learned, and what it cost.** The same policies on all four tasks of the assistant, answered greedily. The pairs were about two of them.

# %%
greedy = SamplingParams(temperature=0.0, max_new_tokens=sizes["new_tokens"])


def right_share(model, task):
    """Share of right answers to held-out requests of a task, answered greedily."""
    return share_right(model, tokenizer, instructions.held_out(task, sizes["probes"], SEED + 3), params=greedy)


by_task = {}
for task in TASKS:
    before, *after = (right_share(model, task) for model in (reference, *(policy for policy, _ in trained)))
    by_task[task] = {"before": before.value, "after": [one.value for one in after], "n": before.n}
    print(f"{task:>12}: {before:.1%} before; by seed afterwards " + ", ".join(f"{a.value:.1%}" for a in after))
results["main"] = {
    "steps": sizes["steps"], "beta": BETA, "lr": sizes["lr"], "seeds": list(seeds), "by_task": by_task,
    "start": start_rewards.mean(), "accuracy": [a.value for a in accuracy], "accuracy_low": [a.low for a in accuracy],
    "gain": [g.value for g in gain], "gain_low": [g.low for g in gain], "gain_high": [g.high for g in gain],
    "kl": [watch.points[-1][0].mean() for watch in watches],
    "length": [watch.points[-1][2].mean() for watch in watches], "start_length": start_lengths.mean(),
    "chosen_moved": [held_out_margins(policy)[1] for policy, _ in trained],
}  # fmt: skip

# %% [markdown]
# **Which pairs are still pulling?** The weight of a pair at the end of training, on average over those that the annotator judged rightly and those with a mistake.

# %%
policy, labels = trained[0][0], encoded(annotate(requests, first, second, instructions.reward, noise=0.5, seed=SEED))
now, before = log_probs_of(policy, labels), log_probs_of(reference, labels)
h = torch.from_numpy((now[0] - before[0]) - (now[1] - before[1]))
weight, mistaken = (BETA * torch.sigmoid(-BETA * h)).numpy(), labels.margins < 0
print(f"{mistaken.mean():.1%} of the pairs are mistakes")
for name, chosen in (("right", ~mistaken), ("mistaken", mistaken)):
    if chosen.any():
        print(f"{name:>9}: mean margin h {h.numpy()[chosen].mean():+.2f} nats, mean weight {weight[chosen].mean():.4f}")
results["weights"] = {
    "mistakes": float(mistaken.mean()), "right": float(weight[~mistaken].mean()),
    "mistaken": float(weight[mistaken].mean()) if mistaken.any() else None,
}  # fmt: skip

# %% [markdown]
# **Read the result.** READ-3

# %% [markdown]
# ## 4. Over-optimization
#
# **Why.** Two knobs decide how far a run goes from its reference: how soon pairs count as settled ($\beta$), and how long and how fast it trains. Turn both the wrong way, and the same pairs that improved the answers ruin them, while the numbers computed from pairs look better than before.
#
# **Predict.** The same pairs, $\beta = 0.01$ in place of 0.1, a constant rate twice as high. Sketch the true reward against the step. What will the training accuracy do meanwhile?

# %%
over = {"beta": 0.01, "lr": 2 * sizes["lr"], "schedule": "constant", "steps": sizes["long"], "eval_every": max(1, sizes["long"] // 5)}  # fmt: skip
far, far_watches = [], []
for seed in progress(seeds, description="too far", unit="run"):
    far_watches.append(Watch())
    labels = annotate(requests, first, second, instructions.reward, noise=0.5, seed=seed)
    far.append(train(encoded(labels), seed=seed, evaluate=far_watches[-1], **over))
print(f"{'step':>5}{'KL':>8}{'true reward':>13}{'length':>8}   mean over seeds")
far_steps = [0] + [evaluation["step"] for evaluation in far[0][1].evaluations]
origin = (np.zeros_like(start_rewards), start_rewards, start_lengths)
curves = np.array([[[values.mean() for values in point] for point in (origin, *w.points)] for w in far_watches])
for step, (kl, reward, length) in zip(far_steps, curves.mean(axis=0), strict=True):
    print(f"{step:>5}{kl:>8.2f}{reward:>13.2f}{length:>8.1f}")
