# %% [markdown]
# # Lab 15 · Reasoning models and test-time compute
#
# [Open in Colab]({{colab}}) · [Source of this lab]({{repository}}/blob/{{branch}}/labs/src/15_reasoning.py)
#
# | | |
# |---|---|
# | **Chapter** | [15 Reasoning models and test-time compute](../book/posttraining/reasoning.md) |
# | **Hardware** | CPU, 2 cores, 4 GiB of memory; a GPU is used with `PRESET = "gpu"` |
# | **Minutes** | 3 to execute, and up to 5 once for the base model and the assistant; 4 hours with the exercises |
# | **You will build** | a verifier, pass@k, the majority vote, group advantages, the clipped surrogate, three estimates of the KL divergence and their gradients, averages over tokens and responses |
# | **What to inspect** | what one forced token does to the accuracy; where votes help and where they only agree on an error; the noise of the gradient with and without a baseline; when the policy begins to think; the same rule as a good chooser and as a ruinous reward |

# %% [markdown]
# ## Setup
#
# `PRESET = "gpu"` takes the larger assistant and the GPU. `MODEL` is a local folder or a Hub name of a model of the Llama or Qwen3 family; empty means the course's own model. The problems are always Tinytown's sums, because a program can tell whether an answer is right. `PRESET = "smoke"` does two steps of everything, to try the lab on another model. Every random number follows from `SEED`.

# %% tags=["parameters"]
PRESET = "cpu"
CORPUS = "tinytown"
SEED = 0
MODEL = ""

# %%
import copy
import dataclasses
import re
import statistics
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from llmcourse import pipeline, plotting
from llmcourse.alignment import grpo, policy_losses, rewards
from llmcourse.alignment.rollouts import RolloutSettings, RolloutSource, sampled_log_probs
from llmcourse.checks import check, claim
from llmcourse.data.chat_formats import chat_format
from llmcourse.data.packing import IGNORE
from llmcourse.data.tinytown import Town
from llmcourse.data.town_instructions import TownInstructions, final_number
from llmcourse.evaluation.instruction_following import answer_chats, instruction_report
from llmcourse.evaluation.statistics import bootstrap_interval, seed_interval, wilson_interval
from llmcourse.inference.generation import generate
from llmcourse.inference.sampling import SamplingParams
from llmcourse.inference.test_time import accuracy_against_tokens, budget_forced, sample_many
from llmcourse.labs import store_results
from llmcourse.models import Transformer
from llmcourse.models.pretrained import save_pretrained, state_to_hub
from llmcourse.runtime import pick_device
from llmcourse.training.fit import FitSettings

SIZES = {
    "cpu": {"tasks": 2000, "held_out": 200, "problems": 64, "samples": 64, "budgets": range(4, 35, 3), "probes": 64, "n_seeds": 3, "steps": 20, "every": 4, "hack": 36, "noise": 8, "prompts": 16, "group": 8, "lr": 3e-4},
    "gpu": {"tasks": 8000, "held_out": 500, "problems": 200, "samples": 256, "budgets": range(4, 35, 1), "probes": 128, "n_seeds": 5, "steps": 60, "every": 5, "hack": 60, "noise": 32, "prompts": 32, "group": 16, "lr": 1e-4},
    "smoke": {"tasks": 12, "held_out": 8, "problems": 4, "samples": 4, "budgets": (4, 8), "probes": 2, "n_seeds": 2, "steps": 2, "every": 1, "hack": 2, "noise": 2, "prompts": 2, "group": 4, "lr": 3e-4},
}  # fmt: skip
if PRESET not in SIZES:
    raise ValueError(f"PRESET={PRESET!r}: choose one of {', '.join(SIZES)}")
sizes, smoke = SIZES[PRESET], PRESET == "smoke"
own = not MODEL and CORPUS == "tinytown" and not smoke  # what the claims are about
seeds = range(SEED, SEED + sizes["n_seeds"])
lr = 1e-5 if MODEL else sizes["lr"]  # a million weights need larger steps than a hundred million
device = pick_device("auto" if PRESET == "gpu" else "cpu")
results = {"preset": PRESET, "corpus": CORPUS, "seed": SEED, "model": MODEL}
warnings.filterwarnings("ignore", message="round .* the rewards of each")  # constant groups are counted below
warnings.filterwarnings(
    "ignore", message=".*gradient_checkpointing"
)  # the new name is unknown to older versions

# %% [markdown]
# ## Objectives
#
# After this lab you can
#
# 1. tell a missing ability from a missing habit, by beginning the answer for the model;
# 2. estimate pass@k, draw the curves of a vote and of a verifier, and say which limit each runs into;
# 3. write the parts of GRPO, and measure what each choice does to the gradient;
# 4. train a model with rewards that a program gives, and read the records: reward, length, constant groups, clipped tokens;
# 5. say what training added and what it only made likelier, and what it cost elsewhere;
# 6. recognize a hacked reward, and tell a good way to choose among answers from a good reward.

# %% [markdown]
# ## 1. What the steps are worth
#
# **Why.** In the corpus a sum stands in one of two forms, `37 + 48 = 85` or `37 + 48: 7+8=15, 3+4+1=8, 85`. The assistant of the fine-tuning stage was taught to answer "What is 37 + 48?" in the first form and "Calculate 37 + 48 step by step." in the second. So it knows two ways to a sum, and it has been told when to use which: nine times in ten, for one plain question in ten was answered with its steps all the same. Demonstrations of several hands are like that. All sums below are held out: no document and no request of the training data holds them, in either order.

# %%
stage = {"preset": "cpu" if smoke else PRESET, "corpus": CORPUS, "seed": SEED, "model": MODEL}
loaded = pipeline.load("sft", **stage, **({"steps": 4} if smoke else {}))
tokenizer = loaded.tokenizer


def without_spare_ids(model, n):
    """The same model with the first n ids only: many have rows for ids that no token uses, and sampling may draw one."""
    kept = {name: weight[:n] if name in ("embedding.weight", "head.weight") else weight for name, weight in model.state_dict().items()}  # fmt: skip
    smaller = Transformer(dataclasses.replace(model.config, vocab_size=n))
    smaller.load_state_dict(kept)
    return smaller


start = without_spare_ids(loaded.model, tokenizer.vocab_size).to(device).eval()
chat = chat_format(tokenizer)
instructions = TownInstructions(Town(pipeline.TOWN_SEED))
held_out = instructions.held_out("sums", sizes["held_out"], SEED)
asked_plainly = np.array(["steps" not in one.variety for one in held_out])
TOKENS = 40  # a sum with its steps takes fewer than thirty
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=TOKENS)
for one in held_out[:4]:
    print(f"{one.messages[-1]['content']:<42} {one.answer}")

# %% [markdown]
# **Exercise 1.** Before any of it, a verifier: a text and the right number, to 1 or 0. The number must stand at the end; an optional full stop and white space may follow, nothing else.
#
# <details><summary>Hint</summary>
#
# `185` ends with the characters of 85, and `-7` is not 7. A regular expression with a lookbehind finds the whole number.
#
# </details>


# %% exercise="right_answer"
def my_right_answer(text, answer):
    """1.0 if the text ends with the integer `answer`, else 0.0."""
    raise NotImplementedError


# %% check="right_answer"
check("reasoning/right_answer", my_right_answer)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_right_answer(text, answer):
#     match = re.search(r"(?<![0-9])-?[0-9]+(?=\.?\s*$)", text)
#     return float(match is not None and match.group() == str(answer))
# ```
#
# </details>
#
# **Predict.** How many of the sums that are asked plainly are right? Of those asked for with steps? And if you put the question of the plain kind, but write `37 + 48:` at the beginning of the answer, with the colon of the long form, and let the model go on?


# %%
def writes_steps(text):
    """Whether a response holds an equation of column arithmetic, such as 7+8=15."""
    return bool(rewards.steps(text))


def opening_of(one):
    """The first words of the long form: the sum and a colon."""
    return re.split(r" =|:", one.answer)[0] + ":"


def begun(policy, requests):
    """Answers whose first words are written for the model."""
    openings = [opening_of(one) for one in requests]
    prompts = [
        chat.prompt(one.messages) + tokenizer.encode(o) for one, o in zip(requests, openings, strict=True)
    ]
    new = generate(policy, prompts, GREEDY, stop_ids=chat.stop_ids)
    return [opening + tokenizer.decode(ids) for opening, ids in zip(openings, new, strict=True)]


def describe(name, requests, texts):
    """Print and return accuracy, share with steps and length of some answers."""
    right = wilson_interval(sum(o.is_right(t) for o, t in zip(requests, texts, strict=True)), len(texts))
    row = {
        "right": right.value, "low": right.low, "high": right.high, "n": right.n,
        "steps": float(np.mean([writes_steps(text) for text in texts])),
        "tokens": statistics.fmean(len(tokenizer.encode(text)) + 1 for text in texts),
    }  # fmt: skip
    print(f"{name:<26} right {right:.2f}; {row['steps']:4.0%} write steps; {row['tokens']:.0f} tokens")
    return row


parts = {"asked plainly": asked_plainly, "asked for steps": ~asked_plainly}
requests = {name: [one for one, keep in zip(held_out, chosen, strict=True) if keep] for name, chosen in parts.items()}  # fmt: skip
first = {
    name: answer_chats(start, tokenizer, [one.messages for one in some], GREEDY, batch_size=256)
    for name, some in requests.items()
}
first["asked plainly, begun"] = begun(start, requests["asked plainly"])
results["start"] = {
    name: describe(name, requests[name.removesuffix(", begun")], texts) for name, texts in first.items()
}
print(f"\n{first['asked plainly'][0]}   but begun:   {first['asked plainly, begun'][0]}")

# %% [markdown]
# **Read the result.** Asked plainly, the model guesses: one forward pass does not carry a two-digit sum in a model of this size. Asked for steps, it writes them and is right, because each step is a sum of digits, which the corpus shows in every document of sums. Its most probable answer to a plain question has no steps. But when that answer is *begun* with the colon of the long form, the steps come, and they are right. Nothing about the question makes it hard; the model lacks the habit and not the ability. "Let's think step by step" is the same intervention for a model that was trained on the web.
#
# **Budget forcing.** How much of the chain is needed? Stop it after a number of tokens, write ", " for the model, as before the result, and let it answer. For comparison, the same responses simply cut.


# %%
def forced(policy, some, budget):
    """Greedy responses, begun for the model, with a budget of thinking tokens, closed by a comma."""
    prompts = [chat.prompt(one.messages) + tokenizer.encode(opening_of(one)) for one in some]
    params = SamplingParams(temperature=0.0, max_new_tokens=8)
    samples = budget_forced(policy, tokenizer, prompts, params, budget=budget, closing=tokenizer.encode(", "), stop_ids=chat.stop_ids)  # fmt: skip
    return [opening_of(one) + sample.text for one, sample in zip(some, samples, strict=True)]


def cut_off(one, text, budget):
    """A response that was begun for the model, after so many tokens of its own."""
    opening = opening_of(one)
    return opening + tokenizer.decode(tokenizer.encode(text.removeprefix(opening))[:budget])


with_steps = requests["asked plainly"]
budgets = list(sizes["budgets"])
curve = {"closed and answered": [], "cut": []}
for budget in budgets:
    closed = forced(start, with_steps, budget)
    cut = [
        cut_off(one, text, budget)
        for one, text in zip(with_steps, first["asked plainly, begun"], strict=True)
    ]
    for name, texts in zip(curve, (closed, cut), strict=True):
        right = [one.is_right(text) for one, text in zip(with_steps, texts, strict=True)]
        curve[name].append(float(np.mean(right)))
    if budget in budgets[::3]:
        print(f"{budget:>3} tokens: {closed[0]}")
results["budget"] = {"tokens": budgets} | curve
figure = plotting.lines(
    {name: (budgets, values) for name, values in curve.items()},
    xlabel="budget of thinking tokens", ylabel="share right", title="Budget forcing, answers begun with a colon",
    markers=True, horizontal={"answered without steps": results["start"]["asked plainly"]["right"]},
)  # fmt: skip
plotting.show(
    figure,
    alt="Share of right sums against the budget of thinking tokens: near zero until the second step can be complete, then up and down "
    "and finally to all; answers that are merely cut rise later but reach all of them sooner.",
)

# %% [markdown]
# **Read the result.** Half of the chain is worth nothing. The answer's digits are *copied* from the two steps, so accuracy stays below that of answering at once until the second step stands there. Where the budget ends with the second step, forcing an answer is right for many that would have been cut. A few tokens later it does harm, since the comma comes in the middle of the result or right behind it: closing words must fit the place where they are put. In models with long chains the curve is smoother, because a chain holds several attempts; its shape is the same: a budget below what the problem needs buys little.

# %% [markdown]
# ## 2. Many samples
#
# **Why.** The other way to spend tokens is in parallel. Each problem gets many samples at temperature 1, and something chooses: a vote, or a verifier. One table of samples gives the curves of all choosers for every $k$.
#
# **Exercise 2.** pass@k from $n$ samples of which some are right, without bias.
#
# <details><summary>Hint</summary>
#
# Of the sets of $k$ samples among the $n$, how many hold no right one? `math.comb`.
#
# </details>


# %% exercise="pass_at_k"
def my_pass_at_k(n, n_right, k):
    """Chance that a set of k of the n samples holds a right one."""
    raise NotImplementedError


# %% check="pass_at_k"
check("reasoning/pass_at_k", my_pass_at_k)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# import math
#
# def my_pass_at_k(n, n_right, k):
#     return 1 - math.comb(n - n_right, k) / math.comb(n, k)
# ```
#
# </details>
#
# **Exercise 3.** The majority vote. A sample without an answer (`None`) casts no vote, ties go to the answer that came first, and without a vote there is no answer.
#
# <details><summary>Hint</summary>
#
# A dict keeps the order in which keys were first seen, and `max` returns the first of several maxima.
#
# </details>


# %% exercise="majority_vote"
def my_majority_vote(answers):
    """The most frequent answer, or None."""
    raise NotImplementedError


# %% check="majority_vote"
check("reasoning/majority_vote", my_majority_vote)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_majority_vote(answers):
#     counts = {}
#     for answer in answers:
#         if answer is not None:
#             counts[answer] = counts.get(answer, 0) + 1
#     return max(counts, key=counts.get) if counts else None
# ```
#
# </details>
#
# **Predict.** A verifier in the world does not know the answer. Ours counts the *true equations* of a response, whatever was asked: `7+8=15` counts, `7+8=14` does not, and a response in the short form has none. Which gains more from 64 samples of a plain question, the vote or this count? And of a question that asks for steps?


# %%
def sample_table(policy, some, seed):
    """Samples of each problem: the texts, their answers, their lengths."""
    params = SamplingParams(temperature=1.0, max_new_tokens=TOKENS, seed=seed)
    prompts = [chat.prompt(one.messages) for one in some]
    table = sample_many(
        policy, tokenizer, prompts, sizes["samples"], params, stop_ids=chat.stop_ids, batch_size=512
    )
    return {
        "texts": [[s.text for s in row] for row in table],
        "answers": [[final_number(s.text) for s in row] for row in table],
        "tokens": [[s.n_tokens for s in row] for row in table],
    }


def choosers(some, table, ks):
    """Share right for each k by vote, by the count of true equations, and by a perfect chooser, with the tokens."""
    truths = [final_number(one.answer) for one in some]
    scores = [[rewards.true_steps_anywhere(text, None) for text in row] for row in table["texts"]]
    points = accuracy_against_tokens(table["answers"], truths, table["tokens"], ks, scores=scores, seed=SEED)
    return {
        "k": list(ks),
        "tokens": [float(p.tokens.mean()) for p in points],
        "majority vote": [float(p.majority.mean()) for p in points],
        "true equations": [float(p.best.mean()) for p in points],
        "perfect chooser": [float(p.any_right.mean()) for p in points],
        "pass@1 by problem": points[0].any_right.tolist(),
    }


def draw_choosers(found, title):
    """Accuracy of the three choosers against tokens."""
    names = ("majority vote", "true equations", "perfect chooser")
    figure = plotting.lines(
        {name: (found["tokens"], found[name]) for name in names}, logx=True, markers=True,
        xlabel="tokens a problem", ylabel="share right", title=title,
    )  # fmt: skip
    plotting.show(figure, alt=f"{title}: share right against tokens on a logarithmic axis for a vote, the count of true equations, and a perfect chooser.")  # fmt: skip


ks = [2**i for i in range(sizes["samples"].bit_length())]
problems = {name: some[: sizes["problems"] // 2] for name, some in requests.items()}
before = {name: sample_table(start, some, SEED) for name, some in problems.items()}
results["choosers"] = {name: choosers(some, before[name], ks) for name, some in problems.items()}
for name, found in results["choosers"].items():
    draw_choosers(found, f"The assistant's samples, {name}")
    one = bootstrap_interval(found["pass@1 by problem"], seed=SEED)
    print(f"{name}: one sample is right in {one:.2f} problems; with {ks[-1]} samples vote {found['majority vote'][-1]:.2f}, "
          f"true equations {found['true equations'][-1]:.2f}, perfect chooser {found['perfect chooser'][-1]:.2f}")  # fmt: skip

# %% [markdown]
# And what tells right samples from wrong ones? Not what was asked, but whether the response wrote steps.

# %%
cross = {}
for name, some in problems.items():
    pairs = [(writes_steps(text), one.is_right(text)) for one, row in zip(some, before[name]["texts"], strict=True) for text in row]  # fmt: skip
    for kind in (False, True):
        right = [is_right for has_steps, is_right in pairs if has_steps == kind]
        share = float(np.mean(right)) if right else None
        cross[f"{name}, {'steps' if kind else 'no steps'}"] = {"n": len(right), "right": share}
        told = f"{share:.2f} right" if right else "none"
        print(f"{name:>16}, response {'with' if kind else 'without'} steps: {len(right):>5} samples, {told}")
results["cross"] = cross

# %% [markdown]
# **Read the result.** Responses with steps are mostly right, whatever was asked, so they agree; responses without are mostly wrong and scatter. Where steps are asked for, a vote therefore removes the errors that single samples make. On plain questions few samples have steps. There more votes find the right answer of more problems, those whose wrong answers do not agree among themselves; of the others they find the most frequent wrong guess, and the vote stays far below the perfect chooser. The perfect chooser climbs to all problems on plain questions too, because among many samples one is right: by a lucky guess, or because it has steps, as one demonstration in ten had. The count of true equations finds such responses without knowing the answer. It is an imperfect verifier, and useful as long as it chooses among responses that were written for another purpose. Remember it; it comes back in *Break it*.

# %% [markdown]
# ## 3. From rewards to a gradient
#
# **Why.** A rare habit that is rewarded becomes frequent if the right gradient reaches the weights. Its parts: what a reward is compared with, how far a reused sample may push, how tokens are averaged, what pulls back.
#
# **Exercise 4.** Group advantages: rewards minus the mean of their group, over its sample standard deviation plus $10^{-4}$; with `scale="none"` only centered. The responses to a prompt stand side by side.
#
# <details><summary>Hint</summary>
#
# `rewards.view(-1, group_size)` has one group a row. `std` of torch divides by $N - 1$ by itself.
#
# </details>


# %% exercise="group_advantages"
def my_group_advantages(rewards, group_size, *, scale="group"):
    """rewards (B,) -> advantages (B,)."""
    raise NotImplementedError


# %% check="group_advantages"
check("reasoning/group_advantages", my_group_advantages)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_group_advantages(rewards, group_size, *, scale="group"):
#     grouped = rewards.view(-1, group_size)
#     centered = grouped - grouped.mean(dim=1, keepdim=True)
#     if scale == "group":
#         centered = centered / (grouped.std(dim=1, keepdim=True) + 1e-4)
#     return centered.flatten()
# ```
#
# </details>
#
# **Run: what the baseline buys.** A baseline that does not depend on the response leaves the mean gradient alone, so compare noise. Some independent rounds of rollouts at the same weights, and the gradients of each with several advantages. The mean product of two different rounds estimates the squared length of the mean gradient; what a round's own square has on top of that is noise. The group's mean contains the response itself, so its advantages are multiplied by $N/(N-1)$ to have the same mean gradient as the others.
#
# **Predict.** Some prompts of the batch are solved much more often than others: those that ask for steps. Order by noise: the reward as it is (1 or 0), the same reward plus 1 (2 or 1), minus the mean of the whole batch, minus the mean of the group.


# %%
tasks = instructions.training(sizes["tasks"], SEED + 9, tasks=["sums"])
prompts = [chat.prompt(task.messages) for task in tasks]
GROUP, ROWS = sizes["group"], sizes["prompts"] * sizes["group"]
SCORERS = {
    "right answer": rewards.by_rule(rewards.solved, tasks),
    "true equations": rewards.by_rule(rewards.true_steps_anywhere, tasks),
}


def rollout_settings(**changes):
    """Settings of a round: some prompts with a group of responses each, one update."""
    return RolloutSettings(**({"prompts": sizes["prompts"], "group_size": GROUP, "max_new_tokens": TOKENS, "micro_batch": ROWS} | changes))  # fmt: skip


def rollouts_of(policy, **changes):
    """A source of rollouts for the right answer; groups stay side by side."""
    settings = rollout_settings(share_prompt=True, **changes)
    return RolloutSource(policy, tokenizer, prompts, SCORERS["right answer"], settings, stop_id=chat.stop_ids[0])  # fmt: skip


def flat_gradient(loss, policy):
    """Gradient of a loss with respect to all weights, as one vector."""
    gradients = torch.autograd.grad(loss, list(policy.parameters()), retain_graph=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


def per_response(batch, log_probs):
    """For right and for wrong responses, the mean surprise of a whole response in nats."""
    surprise = -(log_probs.detach() * (batch["targets"] != IGNORE)).sum(dim=1)
    right = batch["rewards"] > 0
    return surprise[right], surprise[~right]


others = GROUP / (GROUP - 1)
ADVANTAGES = {
    "the reward itself": lambda r: r,
    "the reward plus 1": lambda r: r + 1,
    "minus the batch's mean": lambda r: r - r.mean(),
    "minus the group's mean": lambda r: policy_losses.group_advantages(r, GROUP, scale="none") * others,
}
policy = copy.deepcopy(start)
source = rollouts_of(policy, seed=SEED)
found = {name: [] for name in ADVANTAGES}
surprises = []
for _ in range(sizes["noise"]):
    batch = source.next()
    log_probs = sampled_log_probs(policy, batch["tokens"], batch["targets"])  # (B, T)
    surprises.append(per_response(batch, log_probs))
    for name, advantage in ADVANTAGES.items():
        loss = -(advantage(batch["rewards"])[:, None] * log_probs).sum() / ROWS
        found[name].append(flat_gradient(loss, policy))
power = {}
for name, gradients in found.items():
    products = torch.stack(gradients) @ torch.stack(gradients).T  # (rounds, rounds)
    signal = (products.sum() - products.diagonal().sum()) / (products.numel() - len(products))
    power[name] = float(products.diagonal().mean() - signal)
results["noise"] = {name: value / max(power["minus the group's mean"], 1e-12) for name, value in power.items()}  # fmt: skip
for name, value in results["noise"].items():
    print(f"{name:<24} noise power {value:.2f} of that with the group's mean")
right, wrong = (torch.cat(part) for part in zip(*surprises, strict=True))
print(f"surprise of a response: {wrong.mean():.2f} nats if wrong" + (f", {right.mean():.2f} if right" if len(right) else ""))  # fmt: skip
del found, log_probs, loss, gradients

# %% [markdown]
# **Read the result.** Adding 1 to all rewards changes nothing about what is wanted, and the noise becomes many times as large: every response is pushed up, the guesses most of all, and only the average over many rounds takes that back. With a mean subtracted, the constant is gone, whatever it was. That is what a baseline buys. It is *not* the smallest noise for every reward: a reward of 0 happens to silence the wrong responses, and these are the surprising ones, whose gradients are largest. The baseline of least variance is a mean of rewards weighted by the squared length of these gradients, which the plain mean only approximates. Nor is the mean of the group ahead of that of the batch in this measure: the one gives errors on easy questions a large weight, the other guesses at hard ones. What the group adds is meaning: its advantage says how good a response is for *this* question, and with a division by the deviation, a rare success at a hard question weighs more.
#
# **Exercise 5.** The clipped surrogate as a loss, from the *logarithm* of the ratio, elementwise.
#
# <details><summary>Hint</summary>
#
# The ratio times the advantage, the clamped ratio times the advantage, and minus the smaller of the two.
#
# </details>


# %% exercise="clipped_surrogate"
def my_clipped_surrogate(log_ratio, advantages, *, clip_low=0.2, clip_high=0.2):
    """log_ratio (B, T) or (B, 1), advantages (B, T) or (B, 1) -> losses of the broadcast shape."""
    raise NotImplementedError


# %% check="clipped_surrogate"
check("reasoning/clipped_surrogate", my_clipped_surrogate)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_clipped_surrogate(log_ratio, advantages, *, clip_low=0.2, clip_high=0.2):
#     ratio = log_ratio.exp()
#     clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
#     return -torch.minimum(ratio * advantages, clipped * advantages)
# ```
#
# </details>
#
# **Exercise 6.** Three estimates of the KL divergence from tokens that the policy drew: $k_1 = d$, $k_2 = d^2/2$, $k_3 = e^{-d} - 1 + d$, with $d$ the difference of log-probs. The check looks at the gradient too.
#
# <details><summary>Hint</summary>
#
# $d$ is the policy's log-prob minus the reference's. Nothing is detached.
#
# </details>


# %% exercise="kl_k3"
def my_kl_estimate(log_probs, ref_log_probs, estimator="k3"):
    """Estimates in nats, elementwise; estimator is "k1", "k2" or "k3"."""
    raise NotImplementedError


# %% check="kl_k3"
check("reasoning/kl_k3", my_kl_estimate)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_kl_estimate(log_probs, ref_log_probs, estimator="k3"):
#     d = log_probs - ref_log_probs
#     return {"k1": d, "k2": d.square() / 2, "k3": torch.exp(-d) - 1 + d}[estimator]
# ```
#
# </details>
#
# **Exercise 7.** The average: over all tokens (`"token"`), over the responses' own means (`"sequence"`), or the sum over `B * max_length` (`"constant"`). Outside the mask anything may stand, even infinity, and a response without a token has no mean.
#
# <details><summary>Hint</summary>
#
# Zero times infinity is no number: `torch.where(mask.bool(), values, 0.0)` first.
#
# </details>


# %% exercise="aggregate"
def my_aggregate(values, mask, average, max_length):
    """values (B, T), mask (B, T) of 0 and 1 -> a scalar."""
    raise NotImplementedError


# %% check="aggregate"
check("reasoning/aggregate", my_aggregate)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_aggregate(values, mask, average, max_length):
#     kept = torch.where(mask.bool(), values, 0.0)
#     if average == "token":
#         return kept.sum() / mask.sum()
#     if average == "constant":
#         return kept.sum() / (len(mask) * max_length)
#     lengths = mask.sum(dim=1)
#     return (kept.sum(dim=1) / lengths.clamp(min=1)).sum() / (lengths > 0).sum()
# ```
#
# </details>

# %% [markdown]
# ## 4. The model begins to think
#
# **Why.** Now the parts together: rounds of rollouts on *training* sums, a reward of 1 for a right number at the end and 0 otherwise, one update a round. No response is shown to the model, nothing says that steps are welcome, and half of the prompts are the plain questions that it was taught, nine times in ten, to answer in one go.
#
# **Predict.** Does it find the steps? Sketch the share of plain questions that are answered with steps, against the number of rounds. How long do responses become?


# %%
def look(policy):
    """Greedy accuracy and share with steps on held-out sums, by how they are asked."""
    policy.eval()
    texts = answer_chats(policy, tokenizer, [one.messages for one in held_out], GREEDY, batch_size=256)
    right = np.array([one.is_right(text) for one, text in zip(held_out, texts, strict=True)])
    steps = np.array([writes_steps(text) for text in texts])
    policy.train()
    return {
        "right": float(right.mean()),
        "plain": float(right[asked_plainly].mean()),
        "worked": float(right[~asked_plainly].mean()),
        "plain with steps": float(steps[asked_plainly].mean()),
        "length": statistics.fmean(len(tokenizer.encode(text)) + 1 for text in texts),
    }


def reinforce(seed, scorer="right answer", *, steps, every, objective=None, rate=lr):
    """A run of GRPO from the assistant; returns the policy, its result, and what `look` saw, by round."""
    policy = copy.deepcopy(start).train()
    loop = FitSettings(
        steps=steps, lr=rate, warmup_steps=min(3, steps), schedule="constant", weight_decay=0.0,
        compile="off", eval_every=every, seed=seed,
    )  # fmt: skip
    settings = grpo.GRPOSettings(
        rollouts=rollout_settings(seed=seed),
        objective=objective or policy_losses.dapo(),
        fit=loop,
    )
    run = grpo.train_grpo(
        policy, tokenizer, prompts, SCORERS[scorer], settings, stop_id=chat.stop_ids[0], evaluate=look, progress=False
    )  # fmt: skip
    seen = {"round": [0, *(row["step"] for row in run.fit.evaluations)]}
    for name, value in at_start.items():
        seen[name] = [value] + [row[name] for row in run.fit.evaluations]
    return policy.eval(), run, seen


at_start = look(start)
start.eval()
runs = [reinforce(seed, steps=sizes["steps"], every=sizes["every"]) for seed in seeds]
for seed, (_, run, seen) in zip(seeds, runs, strict=True):
    print(f"seed {seed}: right {at_start['right']:.2f} -> {seen['right'][-1]:.3f} (plain {seen['plain'][-1]:.2f}, with steps {seen['worked'][-1]:.2f}); "
          f"plain questions answered with steps {at_start['plain with steps']:.0%} -> {seen['plain with steps'][-1]:.0%}; "
          f"{run.constant_share:.0%} of the groups were constant")  # fmt: skip
gains = [seen["right"][-1] - at_start["right"] for _, _, seen in runs]
print(f"gain in accuracy over {len(gains)} runs: {seed_interval(gains):.2f}")
results["grpo"] = {
    "seen": [seen for _, _, seen in runs],
    "reward": [[one["reward"] for one in run.rounds] for _, run, _ in runs],
    "length": [[one["length"] for one in run.rounds] for _, run, _ in runs],
    "surprisal": [[row["surprisal"] for row in run.fit.records] for _, run, _ in runs],
    "constant": [run.constant_share for _, run, _ in runs],
    "tokens": [run.tokens for _, run, _ in runs],
    "gains": gains,
}


# %%
def mean_and_range(rows):
    """Mean, and minimum with maximum, over runs, for each point of their curves."""
    columns = list(zip(*rows, strict=True))
    return [statistics.fmean(c) for c in columns], ([min(c) for c in columns], [max(c) for c in columns])


def draw_runs(curves, x, ylabel, title, alt):
    """Mean over the seeds with the range shaded."""
    drawn = {name: mean_and_range(rows) for name, rows in curves.items()}
    figure = plotting.lines(
        {name: (x, mean) for name, (mean, _) in drawn.items()}, bands={name: band for name, (_, band) in drawn.items()},
        xlabel="round of rollouts", ylabel=ylabel, title=title,
    )  # fmt: skip
    plotting.show(figure, alt=alt)


NAMES = {
    "plain with steps": "plain question, answer has steps",
    "plain": "plain question, right",
    "worked": "asked for steps, right",
}
draw_runs(
    {label: [seen[name] for _, _, seen in runs] for name, label in NAMES.items()}, runs[0][2]["round"],
    "share of held-out sums", "GRPO with a reward for the right number",
    "Shares of held-out sums against rounds of rollouts: plain questions answered with steps and plain questions right rise together "
    "from a low start to near one within the run; questions that ask for steps begin at one and stay near it.",
)  # fmt: skip
draw_runs(
    {"mean length": results["grpo"]["length"]}, list(range(1, sizes["steps"] + 1)), "tokens a response",
    "Length of the rollouts", "Mean tokens of the rollouts against rounds: near 20 for about ten rounds, since half of the prompts ask for steps, then a rise towards the length of a sum with steps.",
)  # fmt: skip
for request, text in zip(held_out[:60:10], answer_chats(runs[0][0], tokenizer, [one.messages for one in held_out[:60:10]], GREEDY), strict=True):  # fmt: skip
    print(f"{request.messages[-1]['content']:<42} {text}")

# %% [markdown]
# **Read the result.** Apart from some right guesses at the start, two curves are almost one: a plain question becomes right when it is answered with steps. Nobody asked for longer responses. They are what is right more often, and the rare sample that began with a colon had a larger advantage than most guesses of its group. The rise has the shape of growth that feeds itself: at the start about half of the groups of plain questions hold such a sample, mostly a single one, and the more they hold, the faster the habit spreads. It ends when all responses have steps, so length does not grow without bound; a longer chain has nothing more to compute here. Constant groups are the price: those that all solve and those that none solves cost tokens and teach nothing. And the habit has to be there: an assistant whose demonstrations never showed steps unasked (`unasked_steps_share=0`) wrote them in 4 of 2 048 samples, and twenty rounds left its accuracy where it was. What is never sampled is never rewarded, which is why long chains are often taught by a few demonstrations, a *cold start*, before they are reinforced.
#
# **Run: the family.** With one update a round the ratio is 1, and the clip does nothing. The members of the family differ when a batch is used again. Here are some rollouts of the assistant, seen by a policy that is two updates further: what share of the tokens does each objective clip, and how does its gradient compare with GRPO's policy gradient alone, without the KL term?

# %%
FAMILY = {
    "GRPO without KL": policy_losses.grpo(kl_weight=0.0),
    "GRPO": policy_losses.grpo(),
    "DAPO": policy_losses.dapo(),
    "Dr. GRPO": policy_losses.dr_grpo(max_length=TOKENS),
    "GSPO": policy_losses.gspo(),
}
moved = reinforce(SEED, steps=2, every=2)[0]
batch = rollouts_of(start, seed=SEED + 100, epochs=2).next()  # two epochs: it comes with old log-probs
batch["ref_log_probs"] = batch["old_log_probs"]
family, vectors = {}, {}
for name, objective in FAMILY.items():
    batch["advantages"] = policy_losses.group_advantages(batch["rewards"], GROUP, scale=objective.scale)
    total, count, metrics = grpo.grpo_loss(objective)(moved, batch)
    vectors[name] = flat_gradient(total / count, moved)
    cosine = torch.cosine_similarity(vectors[name], vectors["GRPO without KL"], dim=0)
    family[name] = {"clipped": float(metrics["clipped"]), "norm": float(vectors[name].norm()), "cosine": float(cosine)}  # fmt: skip
    print(f"{name:>16}: {family[name]['clipped']:6.1%} clipped, gradient norm {family[name]['norm']:.3f}, cosine with the first {cosine:.2f}")  # fmt: skip
results["family"] = family
del vectors

# %% [markdown]
# **Read the result.** With a clip per token the objectives lose few tokens after two updates, and what distinguishes their gradients is mainly the length: Dr. GRPO divides by a constant that is longer than the responses and does not scale advantages up, and AdamW forgives a constant factor. The KL term may turn the direction or not, although its weight is small and the policy has hardly left: $k_3$ is large where a token that the reference likes has lost most of its probability, so it depends on whether the first updates did that. GSPO's range is three orders of magnitude narrower than the others', and what it clips are whole responses that have already moved the right way. What remains are those that have not, so on reused data its gradient is another one, not only a smaller one. A single batch says what an objective *does*. Which is best is a question for several seeds, and for a learning rate tuned for each.

# %% [markdown]
# ## 5. Added or sharpened, and at what cost
#
# **Why.** A higher pass@1 can mean that the model solves new problems, or that it solves at the first attempt what it solved at the fiftieth. The measurement that tells them apart is pass@k of both policies.
#
# **Predict.** Where does the curve of the assistant meet that of the trained policy? What has become of the other three tasks, which no reward mentions?

# %%
after = {name: sample_table(runs[0][0], some, SEED) for name, some in problems.items()}
results["choosers after"] = {name: choosers(some, after[name], ks) for name, some in problems.items()}
for name in problems:
    old, new = results["choosers"][name], results["choosers after"][name]
    figure = plotting.lines(
        {
            "assistant, pass@k": (ks, old["perfect chooser"]),
            "after GRPO, pass@k": (ks, new["perfect chooser"]),
            "assistant, vote": (ks, old["majority vote"]),
            "after GRPO, vote": (ks, new["majority vote"]),
        },
        xlabel="samples k", ylabel="share right", title=f"Before and after, {name}", logx=True, markers=True,
    )  # fmt: skip
    plotting.show(
        figure,
        alt=f"pass@k and majority vote against the number of samples before and after GRPO, sums {name}.",
    )
    distinct = [statistics.fmean(len(set(row)) for row in table[name]["texts"]) for table in (before, after)]
    print(f"{name}: pass@1 {old['perfect chooser'][0]:.2f} -> {new['perfect chooser'][0]:.2f}, pass@{ks[-1]} {old['perfect chooser'][-1]:.2f} -> "
          f"{new['perfect chooser'][-1]:.2f}; different texts among {ks[-1]} samples {distinct[0]:.1f} -> {distinct[1]:.1f}")  # fmt: skip
    results["choosers after"][name]["distinct"] = distinct

# %%
OTHERS = ("facts", "reading", "constraints")
other = {"assistant": instruction_report(start, tokenizer, instructions, n=sizes["probes"], seed=SEED, tasks=OTHERS)}  # fmt: skip
for seed, (policy, _, _) in zip(seeds, runs, strict=True):
    other[f"seed {seed}"] = instruction_report(
        policy, tokenizer, instructions, n=sizes["probes"], seed=SEED, tasks=OTHERS
    )
print(f"{'':>12}" + "".join(f"{task:>14}" for task in OTHERS))
for name, row in other.items():
    print(f"{name:>12}" + "".join(f"{row[task]['value']:>14.2f}" for task in OTHERS))
half = max((row["high"] - row["low"]) / 2 for row in other["assistant"].values())
print(f"each from {sizes['probes']} requests: half an interval is up to {half:.2f}")
results["other"] = other

# %% [markdown]
# **How far did it go?** The divergence from the assistant per token, on the trained policy's own rollouts. Exactly, by summing over the vocabulary, and by the three estimates from the tokens that were drawn.

# %%
policy = runs[0][0]
source = RolloutSource(policy, tokenizer, prompts, SCORERS["right answer"], rollout_settings(seed=SEED + 50), stop_id=chat.stop_ids[0])  # fmt: skip
batch = source.next()
drawn = batch["targets"] != IGNORE
with torch.no_grad():
    p, q = (m(batch["tokens"])[drawn].log_softmax(-1) for m in (policy, start))  # (tokens, V)
exact = (p.exp() * (p - q)).sum(-1)
tokens = batch["targets"][drawn][:, None]
estimates = {name: policy_losses.kl_estimate(p.gather(1, tokens), q.gather(1, tokens), name).flatten() for name in policy_losses.KL_ESTIMATORS}  # fmt: skip
by_token = {}
for index, nats in zip(tokens.flatten().tolist(), exact.tolist(), strict=True):
    by_token[index] = by_token.get(index, 0.0) + nats
largest = sorted(by_token, key=by_token.get, reverse=True)[:3]
print("most of it where these were written:", ", ".join(f"{tokenizer.decode([i])!r} {by_token[i] / max(sum(by_token.values()), 1e-9):.0%}" for i in largest))  # fmt: skip
results["kl"] = {"exact": float(exact.mean()), "tokens": len(exact)}
print(f"exact: {exact.mean():.4f} nats per token, {len(exact)} tokens; {(exact > 0.1).float().mean():.1%} of them carry {float(exact[exact > 0.1].sum() / exact.sum().clamp(min=1e-9)):.0%} of it")  # fmt: skip
for name, values in estimates.items():
    results["kl"][name] = {"mean": float(values.mean()), "std": float(values.std())}
    print(f"   {name}: mean {values.mean():.4f}, standard deviation {values.std():.3f}, {(values < 0).float().mean():.0%} negative")  # fmt: skip
del p, q, exact, estimates

# %% [markdown]
# **Read the result.** On plain questions the trained policy does at the first attempt what took the assistant many: pass@1 rises by far more than pass@k at the right end of the figure. What was rare became the rule, in the words of the debate it was *sharpened*; the ability was there, as section 1 showed by one forced token. Samples of plain questions became more alike and mostly agree on the right answer, so that now a vote of a few is enough. The divergence sits in few tokens, above all in the one after the sum, where `=` or `:` decides what comes next; all others are nearly untouched. So are the other tasks: their differences are within what so few requests can tell, at this length of training. $k_1$ and $k_3$ scatter about the exact mean, and $k_1$ is negative at many tokens. $k_2$ does not agree where the policies are far apart: as a value it is biased, as a loss it has the right gradient.

# %% [markdown]
# ## The same with the library
#
# TRL's `GRPOTrainer` on the same rollouts: written by the assistant, with its log-probs as those of the old policy and of the reference; the policy in training is the trained one, so that ratios are far from 1 and clips act. The loss of four objectives, and the gradient of every weight.

# %%
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
CORRECTED = dataclasses.replace(policy_losses.grpo(), kl_corrected=True)
PAIRS = {  # TRL's loss_type and importance_sampling_level, our objective
    "GRPO": ("grpo", "token", policy_losses.grpo()),
    "GRPO, KL times ratio": ("grpo", "token", CORRECTED),
    "DAPO": ("dapo", "token", policy_losses.dapo()),
    "Dr. GRPO": ("dr_grpo", "token", policy_losses.dr_grpo(max_length=TOKENS)),
    "GSPO": ("grpo", "sequence", policy_losses.gspo()),
}


def as_trl(batch):
    """The rollouts as TRL keeps them: prompts padded on the left, completions on the right."""
    mask = batch["targets"] != IGNORE
    rows = list(zip(batch["tokens"], batch["targets"], batch["old_log_probs"], mask, strict=True))
    prompts = [tokens[: int(m.float().argmax()) + 1] for tokens, _, _, m in rows]
    pad = {"batch_first": True, "padding_value": 0}
    left = pad | {"padding_side": "left"}
    old = pad_sequence([log_probs[m] for _, _, log_probs, m in rows], **pad)
    return {
        "prompt_ids": pad_sequence(prompts, **left),
        "prompt_mask": pad_sequence([torch.ones_like(prompt) for prompt in prompts], **left),
        "completion_ids": pad_sequence([targets[m] for _, targets, _, m in rows], **pad),
        "completion_mask": pad_sequence([m[m].long() for *_, m in rows], **pad),
        "advantages": batch["advantages"], "old_per_token_logps": old, "ref_per_token_logps": old,
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip


def trl_trainer(folder):
    """TRL's trainer over the model of a folder; it will only be asked for losses."""
    codec = AutoTokenizer.from_pretrained(folder)
    codec.pad_token = codec.pad_token or codec.eos_token
    arguments = GRPOConfig(
        output_dir=str(folder / "trl"), use_cpu=True, bf16=False, report_to=[], num_generations=4, per_device_train_batch_size=8,
        max_completion_length=TOKENS, gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return GRPOTrainer(
        model=model, args=arguments, processing_class=codec, reward_funcs=lambda completions, **_: [0.0] * len(completions),
        train_dataset=Dataset.from_list([{"prompt": "1 + 1"}] * 8),
    )  # fmt: skip


written = RolloutSource(
    start, tokenizer, prompts, SCORERS["right answer"],
    RolloutSettings(prompts=2, group_size=4, max_new_tokens=TOKENS, micro_batch=8, epochs=2, seed=SEED + 1), stop_id=chat.stop_ids[0],
)  # fmt: skip
batch = {name: values.cpu() for name, values in written.next().items()}
batch |= {"ref_log_probs": batch["old_log_probs"], "advantages": torch.linspace(-1.5, 1.5, 8)}
ours = copy.deepcopy(runs[0][0]).cpu().eval()
agreement = {}
with tempfile.TemporaryDirectory() as folder:
    save_pretrained(ours, folder, tokenizer)
    trainer = trl_trainer(Path(folder))
    theirs = trainer.model.eval()
    for name, (loss_type, level, objective) in PAIRS.items():
        trainer.loss_type, trainer.importance_sampling_level = loss_type, level
        trainer.epsilon_low, trainer.epsilon_high, trainer.beta = objective.clip_low, objective.clip_high, objective.kl_weight  # fmt: skip
        trainer.args.use_bias_correction_kl = objective.kl_corrected
        theirs.zero_grad()
        their_loss = trainer.compute_loss(theirs, as_trl(batch))
        their_loss.backward()
        model = copy.deepcopy(ours)
        total, count, _ = grpo.grpo_loss(objective)(model, batch)
        (total / count).backward()
        for weight in model.parameters():
            weight.data, weight.grad = weight.grad, None  # to give the gradients the hub's names
        pairs = [(value, theirs.get_parameter(key).grad) for key, value in state_to_hub(model).items()]
        largest = max(float(theirs_grad.abs().max()) for _, theirs_grad in pairs)
        agreement[name] = {
            "loss": float(total.detach() / count), "trl": float(their_loss.detach()),
            "gradient_error": max(float((a - b).abs().max()) for a, b in pairs) / largest,
        }  # fmt: skip
for name, row in agreement.items():
    print(f"{name:>20}: loss {row['loss']:+.6f}, TRL's {row['trl']:+.6f}; gradients differ by at most {row['gradient_error']:.0e} of the largest")  # fmt: skip
results["library"] = agreement

# %% [markdown]
# TRL (1.16) multiplies its KL term by the ratio unless told otherwise. Here the two lines of GRPO differ little. But the rollouts may hold tokens that the trained policy has almost given up, as it would the `=` of the short form after longer training. There $k_3$ is about the inverse of the new probability, without bound; times the ratio it is bounded.

# %% [markdown]
# ## Measured results
#
# What this lab claims. Each line is computed from the runs above, and the lab stops if one does not hold.

# %%
# NBVAL_CHECK_OUTPUT
claim(
    "trl-loss",
    all(abs(row["loss"] - row["trl"]) < 1e-4 * max(1, abs(row["trl"])) for row in agreement.values()),
    "GRPO, DAPO, Dr. GRPO and GSPO give the losses of TRL's GRPOTrainer on the same rollouts",
)
claim(
    "trl-gradient",
    all(row["gradient_error"] < 1e-3 for row in agreement.values()),
    "and the same gradients of all weights",
)
if own:
    plain, worked = (results["choosers"][name] for name in ("asked plainly", "asked for steps"))
    begun_right = results["start"]["asked plainly, begun"]["right"]
    claim(
        "habit",
        begun_right - results["start"]["asked plainly"]["right"] >= 0.5,
        "beginning the answer with the colon of the long form adds at least 50 points on plain questions",
    )
    claim(
        "vote",
        worked["majority vote"][-1] > worked["majority vote"][0]
        and plain["majority vote"][-1] < plain["perfect chooser"][-1] - 0.15,
        "a vote gains where steps are asked for, and stays at least 15 points below pass@k on plain questions",
    )
    claim(
        "verifier",
        plain["true equations"][-1] - plain["majority vote"][-1] >= 0.1,
        "on plain questions choosing by true equations is at least 10 points above the vote",
    )
    noise = results["noise"]
    claim(
        "baseline",
        noise["the reward plus 1"] > 2,
        "rewards of 2 and 1 without a baseline have at least twice the gradient noise of those with the group's mean",
    )
    claim(
        "grpo",
        min(gains) >= 0.25,
        "GRPO adds at least 25 points to the greedy accuracy on held-out sums, in every seed",
    )
    claim(
        "thinking",
        at_start["plain with steps"] < 0.15
        and all(seen["plain with steps"][-1] > 0.8 for _, _, seen in runs),
        "plain questions answered with steps go from below 15 % to above 80 %, in every seed",
    )
    sharper = results["choosers after"]["asked plainly"]
    claim(
        "sharpened",
        sharper["perfect chooser"][0] - plain["perfect chooser"][0]
        > 2 * (sharper["perfect chooser"][-1] - plain["perfect chooser"][-1]),
        "on plain questions pass@1 rises by more than twice as much as pass@k for the largest k",
    )

# %% [markdown]
# ## Break it
#
# **A reward that can be fooled.** The count of true equations was a good chooser in section 2. It rises with right steps, it needs no answer key, it is graded instead of all or nothing: a tempting reward. The same training with this reward, at three times the rate so that its course fits into the lab, once as it is and once with a pull to the assistant ($\beta = 0.1$, $k_3$).
#
# **Predict.** What happens to the reward, and what to the accuracy? In which order?

# %%
hacked = {}
for name, weight in (("no KL term", 0.0), ("β = 0.1", 0.1)):
    objective = policy_losses.Objective(clip_high=0.28, average="token", kl_weight=weight)
    policy, run, seen = reinforce(SEED, "true equations", steps=sizes["hack"], every=4 if not smoke else 1, objective=objective, rate=3 * lr)  # fmt: skip
    text = answer_chats(policy, tokenizer, [requests["asked plainly"][0].messages], GREEDY)[0]
    hacked[name] = {
        "seen": seen,
        "reward": [one["reward"] for one in run.rounds],
        "cut": [one["cut"] for one in run.rounds],
        "text": text,
    }
    print(f"{name:>10}: reward {hacked[name]['reward'][0]:.2f} -> {hacked[name]['reward'][-1]:.2f}; accuracy {seen['right'][0]:.2f} -> "
          f"{max(seen['right']):.2f} at best -> {seen['right'][-1]:.2f}; now: {text}")  # fmt: skip
results["hacked"] = hacked
curves = {}
for name, one in hacked.items():
    curves[f"right, {name}"] = (one["seen"]["round"], one["seen"]["right"])
    curves[f"reward, {name}"] = (list(range(1, sizes["hack"] + 1)), one["reward"])
figure = plotting.lines(
    curves, xlabel="round of rollouts", ylabel="share right; reward", title="Rewarded for true equations"
)
plotting.show(
    figure,
    alt="Reward and held-out accuracy against rounds when every true equation is rewarded: without a KL term the reward keeps rising and "
    "accuracy rises at first, then falls to zero; with one the reward levels off, and accuracy rises, dips and recovers.",
)

# %% [markdown]
# **Diagnosis.** Four phases. First the proxy and the truth rise together, since the quickest way to true equations is the long form: whoever stops here believes in the reward. Then accuracy falls while reward and length hardly move: true equations earn the same when they belong to another sum, or when the result does not follow from them. Then the policy repeats true equations before it answers, and last it does not answer at all, since the limit of tokens comes first and equations pay more than results. Only these last phases show in the records: responses grow up to the limit, the share cut rises, the reward exceeds what any right response can earn. The second shows in held-out accuracy alone. With the pull to the reference accuracy dips too, but then recovers, and responses do not grow; it changes the price of distance and not the direction in which the reward points. A chooser only meets texts that exist. A reward meets texts that are written for it.
#
# **Too large a step.** The right reward again, with ten times the learning rate.

# %%
_, run, seen = reinforce(SEED, steps=max(2, sizes["hack"] // 3), every=4 if not smoke else 1, rate=10 * lr)
results["too fast"] = {"seen": seen, "reward": [one["reward"] for one in run.rounds], "constant": [one["constant_groups"] / one["groups"] for one in run.rounds]}  # fmt: skip
for r, right, length in zip(seen["round"], seen["right"], seen["length"], strict=True):
    print(f"round {r:>2}: right {right:.2f}, {length:.0f} tokens")
print("reward by round", [round(one["reward"], 2) for one in run.rounds])
print("share of constant groups", [round(share, 2) for share in results["too fast"]["constant"]])

# %% [markdown]
# **Diagnosis.** Accuracy rises at first, then falls with the reward, although the reward is what is maximized. Policy gradients are right for small steps from the policy that wrote the samples; a large one lands where nothing was sampled. What can make it lasting is that the data come from the policy: the fewer responses are right, the more groups are constant, more than half at the end here, and when none is right, no gradient leads back. In supervised training a bad step is mended by the next batch, which does not depend on the model.

# %%
# NBVAL_CHECK_OUTPUT
if own:
    free = hacked["no KL term"]
    claim(
        "hacked",
        free["reward"][-1] > 2 * free["reward"][0]
        and free["seen"]["right"][-1] < max(free["seen"]["right"]) - 0.1,
        "with true equations as the reward, the reward more than doubles and the accuracy falls at least 10 points from its best",
    )
    claim(
        "too-fast",
        min(results["too fast"]["seen"]["right"][1:]) < min(seen["right"][-1] for _, _, seen in runs) - 0.25,
        "with ten times the learning rate the same reward leads to an accuracy at least 25 points lower",
    )
else:
    claim("hack-records", len(hacked) == 2, "two runs on a reward that can be fooled were recorded")

# %%
store_results("reasoning", results)

# %% [markdown]
# ## Takeaways
#
# * Find out whether an ability or a habit is missing before you train: begin the answer for the model, and look at pass@k.
# * A vote needs the truth to be the mode. A verifier needs it to be sampled, and to be recognized.
# * The group's mean is the baseline because prompts differ in difficulty. Its price is the constant group.
# * A reward for right answers makes chains longer only as far as longer is righter.
# * Compare objectives on one batch for what they do, and over seeds for what they are worth.
# * Read the best-paid responses, their lengths and the share that was cut. A reward above what a right answer can earn is an alarm.
# * What chooses well among given texts may be ruinous as a reward.
# * The policy writes its own data: a step too far is not repaired by the next batch.

# %% [markdown]
# ## Next
#
# The chapter, [Reasoning models and test-time compute](../book/posttraining/reasoning.md), derives the estimators and the objectives, says what is known about sharpening, and compares the recipes of 2024 to 2026. Where no program can tell right from wrong, people or models judge, and what was seen in *Break it* returns: [Direct preference optimization](../book/posttraining/dpo.md) has a lab on that.
