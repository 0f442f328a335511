# %% [markdown]
# # Lab 18 · Interpretability
#
# [Open in Colab]({{colab}}) · [Source of this lab]({{repository}}/blob/{{branch}}/labs/src/18_interpretability.py)
#
# | | |
# |---|---|
# | **Chapter** | [18 Interpretability](../book/understanding/interpretability.md) |
# | **Hardware** | CPU, 2 cores, 4 GiB of memory; a GPU is used with `PRESET = "gpu"` |
# | **Minutes** | 3 to execute, and up to 4 once for the base model; 3 to 4 hours with the exercises |
# | **You will build** | the logit lens, credit for a logit, an induction score, patches and what they recover, a projection, a sparse code, the area under a ROC curve |
# | **What to inspect** | when an answer appears in the stream; how heads that copy come into being, and what is left without them; where a name stops mattering and a fact begins to; probes against their control; features against the generator's own variables; the layer in which a planted flaw sits |

# %% [markdown]
# ## Setup
#
# `PRESET = "gpu"` takes the larger base model and the GPU. `MODEL` is a local folder or a Hub name of a model of the Llama or Qwen3 family; empty means the course's own base model. The texts are always Tinytown's, because their truth is known. `PRESET = "smoke"` does a little of everything, to try the lab on another model. Every random number follows from `SEED`.

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

import numpy as np
import torch
from IPython.display import HTML, display

from llmcourse import pipeline, plotting
from llmcourse.checks import check, claim
from llmcourse.data import town_words as words
from llmcourse.data.tinytown import Town
from llmcourse.data.town_records import TEMPLATES
from llmcourse.evaluation.statistics import wilson_interval
from llmcourse.interpretability import record
from llmcourse.interpretability.attention_patterns import attention_html
from llmcourse.interpretability.features import dashboard_html, feature_auc, match_features, strongest_places
from llmcourse.interpretability.induction import (
    half_losses,
    head_scores,
    mean_head_outputs,
    repeated_tokens,
    without_heads,
)
from llmcourse.interpretability.logit_lens import logit_attribution, logit_lens
from llmcourse.interpretability.patching import (
    attribution_patch,
    logit_lead,
    patch_heads,
    patch_path,
    patch_positions,
    recovered,
)
from llmcourse.interpretability.probes import control_labels, fit_probe
from llmcourse.interpretability.sparse_autoencoder import (
    ActivationBatches,
    AutoencoderSettings,
    SparseAutoencoder,
    autoencoder_loss,
    unexplained_variance,
)
from llmcourse.interpretability.steering import mean_difference, steered, without_direction
from llmcourse.labs import store_results
from llmcourse.runtime import pick_device, progress
from llmcourse.training.fit import FitSettings, fit
from llmcourse.training.pretraining import next_token_loss

SIZES = {
    "cpu": {"facts": 96, "pairs": 48, "repeated": 32, "stories": 800, "documents": 1000, "latents": 512, "k": 8, "sae_steps": 1200, "draws": 5, "flaw": 24, "flaw_steps": 60, "copy_steps": 60, "copy_rounds": 10, "steer": 40},
    "gpu": {"facts": 256, "pairs": 96, "repeated": 64, "stories": 4000, "documents": 6000, "latents": 2048, "k": 16, "sae_steps": 4000, "draws": 5, "flaw": 48, "flaw_steps": 120, "copy_steps": 60, "copy_rounds": 10, "steer": 80},
    "smoke": {"facts": 8, "pairs": 4, "repeated": 2, "stories": 60, "documents": 30, "latents": 16, "k": 2, "sae_steps": 3, "draws": 1, "flaw": 3, "flaw_steps": 2, "copy_steps": 2, "copy_rounds": 1, "steer": 4},
}  # fmt: skip
if PRESET not in SIZES:
    raise ValueError(f"PRESET={PRESET!r}: choose one of {', '.join(SIZES)}")
sizes, smoke = SIZES[PRESET], PRESET == "smoke"
own = (
    not MODEL and CORPUS == "tinytown" and not smoke
)  # whether the figures are those that the claims are about
device = pick_device("auto" if PRESET == "gpu" else "cpu")
results = {"preset": PRESET, "corpus": CORPUS, "seed": SEED, "model": MODEL, "sizes": sizes}

# %% [markdown]
# ## Objectives
#
# After this lab you can
#
# 1. read a prediction out of every layer, and say which part of the model wrote it;
# 2. find a circuit by its attention and prove it by ablation, with a comparison;
# 3. locate by patching where a fact is looked up;
# 4. tell what a representation holds from what a probe can memorize;
# 5. steer, and price what steering costs;
# 6. train a sparse autoencoder and hold its features against known variables;
# 7. find a planted flaw.

# %% [markdown]
# ## 1. When an answer appears
#
# **Why.** "Jane Day works as a" has one right continuation, and the model knows it. In which layer? All layers write into one stream, and the head can be put behind any of them.

# %%
loaded = pipeline.load("base", preset="cpu" if smoke else PRESET, corpus=CORPUS, seed=SEED, model=MODEL)
model, tokenizer = loaded.model.to(device).eval().requires_grad_(False), loaded.tokenizer
config, town = model.config, Town(pipeline.TOWN_SEED)
L, H = config.n_layers, config.n_heads
told = [resident for resident in town.residents if not resident.held_out]


def ids_of(text):
    """A text as ids (1, T)."""
    return torch.tensor([tokenizer.encode(text)], device=device)


def written(token):
    """A token as text; an id that a padded model has and the tokenizer has not, as a mark."""
    return tokenizer.decode([token]) if token < tokenizer.vocab_size else "?"


def first_id(text):
    """The first token of a continuation."""
    return tokenizer.encode(text)[0]


ASK = "{S} works as a"
prompts = [(ASK.format(S=one.name), " " + one.facts["occupation"]) for one in told[: sizes["facts"]]]
by_layer = []
for prompt, answer in prompts:
    log_probs = logit_lens(model, ids_of(prompt))[:, 0, -1]  # (L + 1, V)
    by_layer.append(log_probs[:, first_id(answer)].exp().cpu().numpy())
by_layer = np.array(by_layer)  # (facts, L + 1)
for layer in range(L + 1):
    name = "embedding" if layer == 0 else f"block {layer - 1}"
    print(f"{name:>10}: mean probability of the right occupation {by_layer[:, layer].mean():.3f}, above one half for {np.mean(by_layer[:, layer] > 0.5):.0%}")  # fmt: skip
example = logit_lens(model, ids_of(prompts[0][0]))[:, 0, -1]
for layer, log_probs in enumerate(example):
    top = log_probs.topk(3)
    print(f"{layer:>3}: " + ", ".join(f"{written(i)!r} {p.exp():.2f}" for p, i in zip(top.values, top.indices.tolist(), strict=True)))  # fmt: skip
results["lens"] = by_layer.mean(axis=0)

# %% [markdown]
# **Exercise 1.** The logit lens: the final norm, the head, logarithms of probabilities.
#
# <details><summary>Hint</summary>
#
# RMSNorm has no mean to subtract. `rms_norm` of the package is allowed.
#
# </details>


# %% exercise="lens"
def my_lens(residual, gain, head, eps=1e-5):
    """residual (B, T, D), gain (D,), head (V, D) -> log-probabilities (B, T, V)."""
    raise NotImplementedError


# %% check="lens"
check("interpretability/lens", my_lens)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_lens(residual, gain, head, eps=1e-5):
#     scale = (residual.pow(2).mean(dim=-1, keepdim=True) + eps).rsqrt()
#     return (residual * scale * gain @ head.T).log_softmax(dim=-1)
# ```
#
# </details>
#
# **Exercise 2.** Who wrote it? The stream is a sum of parts, and a logit is a sum with one term for each.
#
# <details><summary>Hint</summary>
#
# The norm's scale is one number, that of the whole stream.
#
# </details>


# %% exercise="credit"
def my_credit(parts, gain, direction, eps=1e-5):
    """parts (P, D) of the stream, gain (D,), direction (D,) -> what each part adds to the logit, (P,)."""
    raise NotImplementedError


# %% check="credit"
check("interpretability/credit", my_credit)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_credit(parts, gain, direction, eps=1e-5):
#     scale = (parts.sum(dim=0).pow(2).mean() + eps).rsqrt()
#     return parts @ (direction * gain) * scale
# ```
#
# </details>
#
# **Predict.** Whose work is the lead of the right occupation over a wrong one: attention or feed-forward layers, early or late?

# %%
rng = random.Random(SEED)
occupations = sorted({one.facts["occupation"] for one in told})
credits = []
for prompt, answer in prompts:
    other = " " + rng.choice([o for o in occupations if " " + o != answer])
    found = logit_attribution(model, ids_of(prompt), [first_id(answer)], [first_id(other)])
    credits.append({name: float(value[0]) for name, value in found.items()})
mean_credit = {name: statistics.fmean(one[name] for one in credits) for name in credits[0]}
grid = np.array([[mean_credit[f"blocks.{i}.head.{h}"] for h in range(H)] + [mean_credit[f"blocks.{i}.mlp"]] for i in range(L)])  # fmt: skip
lead = sum(mean_credit.values())
print(
    f"mean lead of the right occupation {lead:.2f} nats of logit; embedding {mean_credit['embedding']:+.2f}"
)
print(
    "by block: "
    + ", ".join(f"{i}: heads {grid[i, :H].sum():+.2f}, feed-forward {grid[i, H]:+.2f}" for i in range(L))
)
figure = plotting.heatmap(grid, rows=[f"block {i}" for i in range(L)], columns=[f"head {h}" for h in range(H)] + ["feed-forward"], title="Credit for the lead of the right occupation")  # fmt: skip
plotting.show(
    figure,
    alt="Heat map of the mean credit of each head and feed-forward layer: most of it lies in the last blocks.",
)
results["credit"] = {"grid": grid, "lead": lead, "embedding": mean_credit["embedding"]}

# %% [markdown]
# **Read the result.** The lens shows the answer late, and most of the credit lies with the last feed-forward layer. Neither says that the fact is *stored* there: credit goes to whoever writes the word, and what an early part tells a later one has no entry of its own. Look also at what the lens reads in front of the last block in the example: often a word that is no occupation at all, with some confidence. The stream there is on its way to something, and the head reads it as if it had arrived.

# %% [markdown]
# ## 2. A circuit that can be proved
#
# **Why.** On random words that are repeated, only the repetition helps. Heads that find it can be seen in their attention. Whether they are what the prediction hangs on, only their removal shows.
#
# **Exercise 3.** The induction score of every head: mean attention from the second copy to the token *behind* the first occurrence.
#
# <details><summary>Hint</summary>
#
# The query at t looks at the key t − N + 1. The last token has nothing to predict from the repetition.
#
# </details>


# %% exercise="induction_score"
def my_induction_score(pattern, length):
    """pattern (H, T, T), query by key; a part of `length` tokens and its repetition at the end -> (H,)."""
    raise NotImplementedError


# %% check="induction_score"
check("interpretability/induction_score", my_induction_score)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_induction_score(pattern, length):
#     T = pattern.shape[-1]
#     queries = torch.arange(T - length, T - 1)
#     return pattern[:, queries, queries - length + 1].mean(dim=-1)
# ```
#
# </details>
#
# **Predict.** The course's model has never seen random words. Will its loss on the second copy be lower than on the first? By how much?

# %%
pools = (
    *words.FIRST_NAMES,
    *words.OBJECTS,
    *words.PLACES,
    *(v for pool in words.ATTRIBUTES.values() for v in pool),
)
plain_words = sorted({ids[0] for word in pools if len(ids := tokenizer.encode(" " + word)) == 1})
N_PART = min(20, len(plain_words))


def repeated(n, length, seed):
    """`n` texts (n, 1 + 2 * length): a part of random words, and the same part again."""
    return repeated_tokens(plain_words, n, length, first=tokenizer.eos_id, seed=seed).to(device)


random_text = repeated(sizes["repeated"], N_PART, SEED)
LOOK = "loss on random words {:.2f} nats, on their repetition {:.2f}; best previous-token head {:.2f}, best induction head {:.2f}"


def look_at(one):
    """Losses of both copies, and the highest score of a previous-token and of an induction head."""
    scores = head_scores(one, random_text, N_PART)
    return [*half_losses(one, random_text, N_PART), float(scores["previous"].max()), float(scores["induction"].max())]  # fmt: skip


print(LOOK.format(*look_at(model)))
even = [statistics.fmean(1 / (t + 1) for t in span) for span in (range(1, 2 * N_PART + 1), range(N_PART + 1, 2 * N_PART))]  # fmt: skip
print(f"attention spread evenly would give {even[0]:.2f} and {even[1]:.2f}")

# %% [markdown]
# **Read the result.** The base model gains next to nothing from the repetition, and no head looks back to it. In Tinytown a word is seldom worth repeating *because* it stood there before. A skill that the data do not reward is not there, whatever the architecture could do.
#
# So let a copy of the model learn it: it goes on with texts of random words, repeated after 5 to 20 of them, until it predicts the repetition. The distance varies, so that a fixed offset does not do.
#
# **Predict.** What comes first, a head that looks at the token before, or one that looks behind the earlier occurrence? Will the loss of the repetition fall gradually, or at once?

# %%


class RepeatedWords:
    """Batches of repeated random words, of a length that changes from batch to batch."""

    def __init__(self, seed, batch_size=64):
        self.seeds, self.batch_size = random.Random(seed), batch_size

    def next(self):
        """tokens and targets."""
        length = self.seeds.randint(min(5, N_PART), N_PART)
        ids = repeated(self.batch_size, length, self.seeds.getrandbits(30)).cpu()
        return {"tokens": ids[:, :-1], "targets": ids[:, 1:]}

    def state_dict(self):
        """Nothing to resume."""
        return {}

    def load_state_dict(self, state):
        """Nothing to resume."""


def look_often(step, one):
    """Keep losses and scores every twenty steps, while the copy learns."""
    if (step + 1) % 20 == 0 or step + 1 == sizes["copy_steps"]:
        growth.append([done + step + 1, *look_at(one)])


copier = copy.deepcopy(model).requires_grad_(True)
growth, done = [[0, *look_at(model)]], 0
for number in progress(range(sizes["copy_rounds"]), description="learning to copy", unit="round"):
    settings = FitSettings(
        steps=sizes["copy_steps"], lr=3e-3, warmup_steps=min(5, sizes["copy_steps"] - 1), schedule="constant", weight_decay=0.0,
        compile="off", seed=SEED + number,
    )  # fmt: skip
    batches = RepeatedWords(SEED + 1_000 * (number + 1))
    fit(copier, batches, next_token_loss, settings, progress=False, on_step=look_often)
    done += sizes["copy_steps"]
    if growth[-1][2] < 0.5:
        break
copier.eval().requires_grad_(False)
for step, *found in growth:
    print(f"{step:>4} steps: " + LOOK.format(*found))
steps, first_losses, second_losses, previous, induction = (
    list(column) for column in zip(*growth, strict=True)
)
figure = plotting.lines(
    {"first copy": (steps, first_losses), "repetition": (steps, second_losses)},
    xlabel="step", ylabel="nats per token", title="Random words and their repetition", markers=True,
)  # fmt: skip
plotting.show(
    figure,
    alt="Loss against step: that of the first copy falls at once to a little above the entropy of the words; that of the repetition stays up to one nat below it for a long time and then drops steeply.",
)
figure = plotting.lines(
    {"previous token": (steps, previous), "induction": (steps, induction)},
    xlabel="step", ylabel="score", title="The highest score of any head", markers=True,
)  # fmt: skip
plotting.show(
    figure,
    alt="Highest score of any head against step: the previous-token score rises first, the induction score after it, steeply.",
)

# %% [markdown]
# **Read the result.** For a long time the repetition is at most a nat better than the first copy; then its loss falls to almost nothing within a hundred steps. Just before that, one head learns to look at the token before, and the induction heads follow. Nothing in the loss rewards this by itself. It is the first half of a circuit whose second half then pays at once.
#
# Which heads are they? Remove the ones with high scores, and as many others, and compare.

# %%
scores = {name: value.cpu().numpy() for name, value in head_scores(copier, random_text, N_PART).items()}
first_half, second_half = half_losses(copier, random_text, N_PART)
order = [divmod(int(i), H) for i in np.argsort(-scores["induction"], axis=None)]
induction_heads = [head for head in order if scores["induction"][head] > 0.5] or order[:2]
previous_head = divmod(int(scores["previous"].argmax()), H)
print(f"induction heads {induction_heads}, previous-token head {previous_head} with {scores['previous'].max():.2f}")  # fmt: skip
figure = plotting.heatmap(scores["induction"], rows=[f"block {i}" for i in range(L)], columns=[f"head {h}" for h in range(H)], title="Induction score", low=0, high=1)  # fmt: skip
plotting.show(
    figure, alt="Heat map of the induction score of every head: high in one block, near zero elsewhere."
)
means = mean_head_outputs(copier, random_text)
others = [head for head in order if head not in induction_heads and head != previous_head]
removed = {"induction heads": induction_heads, "the previous-token head": [previous_head]}
for i in range(sizes["draws"]):
    removed[f"others, draw {i}"] = random.Random(SEED + i).sample(
        others, min(len(induction_heads), len(others))
    )
for block in range(L):
    if block not in {previous_head[0], *(head[0] for head in induction_heads)}:
        removed[f"all of block {block}"] = [(block, head) for head in range(H)]
ablation = {}
for name, heads in removed.items():
    after = half_losses(copier, random_text, N_PART, without_heads(heads, means))
    ablation[name] = [after[0] - first_half, after[1] - second_half]
    print(f"without {name:>23} {str(heads):>36}: first copy {ablation[name][0]:+.2f}, repetition {ablation[name][1]:+.2f} nats")  # fmt: skip

# %% [markdown]
# Two kinds of heads, and each is needed. Do they work *together*? Path patching lets one part of the model hear the previous-token head of another text, and only through one of its inputs: what it asks for (queries), what it is found by (keys), or what it hands on (values).

# %%
other_text = repeated(sizes["repeated"], N_PART, SEED + 1)
last_word = logit_lead(random_text[:, -1], other_text[:, -1], position=-2)
with torch.no_grad():
    lead_before = float(last_word(copier(random_text)).mean())
behind = range(previous_head[0] + 1, L)
paths = {}
for kind in ("queries", "keys", "values"):
    if behind:
        lead = patch_path(
            copier,
            random_text,
            other_text,
            [previous_head],
            [f"blocks.{i}.{kind}" for i in behind],
            last_word,
        )
        paths[kind] = float(lead.mean())
        print(f"previous-token head of another text heard through the {kind:>7} of later blocks: lead of the right word {lead_before:.2f} -> {paths[kind]:.2f}")  # fmt: skip
results["induction"] = {
    "growth": growth, "scores": scores, "halves": [first_half, second_half], "ablation": ablation, "heads": induction_heads, "previous": previous_head,
    "lead": lead_before, "paths": paths,
}  # fmt: skip

# %%
shown = random_text[:1, : 2 * N_PART + 1]
_, patterns = record(copier, shown, "blocks.*.pattern")
stack = torch.cat(list(patterns.values())).cpu()  # (L, H, T, T)
tokens_shown = [tokenizer.decode([i]) or "|" for i in shown[0].tolist()]
display(
    HTML(
        attention_html(
            tokens_shown, stack, title="Attention on repeated words", heads=[previous_head, *order[:2]]
        )
    )
)
figure = plotting.heatmap(
    stack[order[0]], title=f"Attention of head {order[0]}: query by key", xlabel="key", ylabel="query"
)
plotting.show(
    figure,
    alt="Attention weights of the head with the highest induction score on a repeated text: a bright diagonal in the lower left, one place to the right of the earlier occurrence.",
)

# %% [markdown]
# **Read the result.** Without the induction heads the repetition is as hard as the first copy, without as many others hardly anything happens. Should the induction heads be all heads of a block, the fair comparison is a whole block too: it is in the last rows. The previous-token head has a low induction score itself and is needed as much: a score says what a head attends to, not what a prediction hangs on. And the path says how the two are joined: through the *keys*. The word behind the earlier occurrence is found by what stood in front of it, which the previous-token head has written there.

# %% [markdown]
# ## 3. Where a fact is looked up
#
# **Why.** Two prompts that differ in the name only. An activation of one run is put into the other: where it brings the other answer back, the difference resides.
#
# **Exercise 4.** A patch: the corrupted activation with the clean one at some positions.
#
# <details><summary>Hint</summary>
#
# Do not write into what was recorded.
#
# </details>


# %% exercise="patch"
def my_patch(corrupted, clean, positions):
    """(B, T, D), (B, T, D), list of positions -> (B, T, D), new."""
    raise NotImplementedError


# %% check="patch"
check("interpretability/patch", my_patch)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_patch(corrupted, clean, positions):
#     found = corrupted.clone()
#     found[:, positions] = clean[:, positions]
#     return found
# ```
#
# </details>
#
# **Exercise 5.** The share of the effect that is recovered.
#
# <details><summary>Hint</summary>
#
# Means over the pairs first.
#
# </details>


# %% exercise="recovered"
def my_recovered(patched, clean, corrupted):
    """patched (L, T, B), clean and corrupted (B,) -> (L, T)."""
    raise NotImplementedError


# %% check="recovered"
check("interpretability/recovered", my_recovered)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_recovered(patched, clean, corrupted):
#     return (patched.mean(dim=-1) - corrupted.mean()) / (clean.mean() - corrupted.mean())
# ```
#
# </details>
#
# **Predict.** Draw the map, layers by positions. Where is the difference at the first layer, where at the last? In which layer does it move?

# %%
pool = {}
for one in told:
    ids = tokenizer.encode(ASK.format(S=one.name))
    pool.setdefault(len(ids), []).append((ids, one.facts["occupation"]))
length, group = max(pool.items(), key=lambda item: len(item[1]))
rng = random.Random(SEED)
pairs = []
while len(pairs) < sizes["pairs"]:
    a, b = rng.sample(group, 2)
    if first_id(" " + a[1]) != first_id(" " + b[1]):
        pairs.append((a, b))
clean = torch.tensor([a[0] for a, _ in pairs], device=device)
corrupted = torch.tensor([b[0] for _, b in pairs], device=device)
metric = logit_lead([first_id(" " + a[1]) for a, _ in pairs], [first_id(" " + b[1]) for _, b in pairs])
with torch.no_grad():
    at_clean, at_corrupted = metric(model(clean)), metric(model(corrupted))
stream = patch_positions(model, clean, corrupted, "residual_before", metric)
share = recovered(stream, at_clean, at_corrupted).cpu().numpy()
end = (
    recovered(patch_positions(model, clean, corrupted, "residual_after", metric)[-1:], at_clean, at_corrupted)
    .cpu()
    .numpy()
)
share = np.concatenate((share, end))  # behind the last block too
labels = [tokenizer.decode([i]) for i in clean[0].tolist()]
print(
    f"{len(pairs)} pairs of {length} tokens; lead of the clean answer: clean {at_clean.mean():+.2f}, corrupted {at_corrupted.mean():+.2f}"
)
print("tokens of the first pair: " + " ".join(repr(label) for label in labels))
for row, name in zip(share, [*(f"before block {i}" for i in range(L)), "behind the last"], strict=True):
    print(f"{name:>16}: " + " ".join(f"{value:6.2f}" for value in row))
figure = plotting.heatmap(share, rows=[*(f"block {i}" for i in range(L)), "end"], columns=labels, title="Share of the clean answer that a patch brings back", low=0, high=1)  # fmt: skip
plotting.show(
    figure,
    alt="Map of the share recovered, layers by positions: bright at the name in the first layers, at the last token in the last ones.",
)
heads = recovered(patch_heads(model, clean, corrupted, metric), at_clean, at_corrupted).cpu().numpy()
best_heads = [divmod(int(i), H) for i in np.argsort(-heads, axis=None)[:3]]
print("heads that bring most back: " + ", ".join(f"{head} {heads[head]:.2f}" for head in best_heads))
estimate = (
    recovered(attribution_patch(model, clean, corrupted, "residual_before", metric), at_clean, at_corrupted)
    .cpu()
    .numpy()
)
correlation = float(np.corrcoef(estimate.ravel(), share[:L].ravel())[0, 1])
print(f"first-order estimate of the same map from one gradient: correlation {correlation:.2f}")
results["patching"] = {
    "share": share,
    "heads": heads,
    "estimate": estimate,
    "correlation": correlation,
    "labels": labels,
}

# %% [markdown]
# **Read the result.** Before the first block only the name differs, so only there can a patch do anything; behind the last block only the last token is read, so everything has to be there. Both halves of the name are needed, each brings back half. They stay where they are until late; then heads of the last blocks carry what they hold to the last token, where the last feed-forward layer, by section 1, turns it into the word. The estimate from one gradient points to the same places, at the price of two forward passes and one backward, and its sizes are off by a factor of several, most in front of the first block: candidates, not effects.

# %% [markdown]
# ## 4. Directions: probes and steering
#
# **Why.** A story says who took what from whom. Does the stream hold who has the thing at the end? A probe answers, if one knows what it would have answered anyway.
#
# **Predict.** The label is the holder's name, one of 48. How well does a probe on the last token do after each block? The control asks for a random name instead, fixed for each name that can open a story: how much of it can be memorized? And how well does the model itself answer?

# %%
rng = random.Random(SEED)
asked = [probe for probe in town.story_probes(6 * sizes["stories"], SEED) if probe.template == "place or holder" and probe.answer.startswith(" with")]  # fmt: skip
stories = []
for probe in asked:
    people = re.match(r"(\w+) and (\w+) ", probe.prompt)
    holder = probe.answer.removeprefix(" with ").strip(" .")
    if (
        people
        and holder in people.groups()
        and len(tokenizer.encode(probe.prompt + " with")) < config.context_length
    ):
        stories.append((probe.prompt + " with", people.groups(), holder))
    if len(stories) == sizes["stories"]:
        break


@torch.no_grad()
def last_states(texts, points):
    """Values (texts, D) of the last token at each point, and the logits there."""
    found, logits = {name: [] for name in points}, []
    for text in texts:
        out, values = record(model, ids_of(text), points)
        logits.append(out[0, -1].float().cpu())
        for name in points:
            found[name].append(values[name][0, -1].float().cpu())
    return {name: torch.stack(rows) for name, rows in found.items()}, torch.stack(logits)


points = [f"blocks.{i}.residual_after" for i in range(L)]
states, story_logits = last_states([text for text, _, _ in stories], points)
holders, openers = [holder for _, _, holder in stories], [people[0] for _, people, _ in stories]
model_says = [people[int(row[first_id(" " + people[1])] > row[first_id(" " + people[0])])] for row, (_, people, _) in zip(story_logits, stories, strict=True)]  # fmt: skip
model_right = wilson_interval(sum(map(str.__eq__, model_says, holders)), len(stories))
shuffled = random.Random(SEED).sample(range(len(stories)), len(stories))
train, test = shuffled[: 3 * len(stories) // 4], shuffled[3 * len(stories) // 4 :]
control = control_labels(openers, holders, seed=SEED)
probing = {"the holder": [], "control": []}
for point in progress(points, description="probes"):
    for name, target in (("the holder", holders), ("control", control)):
        probe = fit_probe(states[point][train], [target[i] for i in train], strength=0.01)
        right = sum(
            guess == target[i] for guess, i in zip(probe.predict(states[point][test]), test, strict=True)
        )
        probing[name].append(wilson_interval(right, len(test)))
print(f"{len(stories)} stories, {len(test)} of them in the test; {len(set(holders))} names")
print(f"of the story's two people the model prefers the holder in {model_right:.1%}")
for i in range(L):
    print(f"after block {i}: holder {probing['the holder'][i]:.1%}, control {probing['control'][i]:.1%}")
results["probes"] = {name: [[one.value, one.low, one.high] for one in rows] for name, rows in probing.items()} | {"model": model_right.value}  # fmt: skip

# %% [markdown]
# **Read the result.** Read alone, the probe looks like a discovery: out of 48 names it finds the holder in about half of the stories. The control takes most of it away. The stream holds the names of the story, from which a probe can memorize a random name for each opener, and guessing one of two people is right half of the time. What is left is a difference that so few stories barely tell from nothing, and it agrees with what the model itself knows, which is not much better than a coin. The stories are fluent, and they have not been followed.

# %% [markdown]
# **Why, the other way round.** If a property is a direction, adding the direction should produce the property. Two are tried, a mood that a story has stated and a resident's occupation. The difference of means of the first is taken at the end of stories that differ in one word, that of the second at the end of prompts about residents with and without it.
#
# **Predict.** Section 1 has shown that the model knows the occupations, the probe that it does not follow stories. For which of the two does the vector do anything?
#
# **Exercise 6.** Take a direction out of a stream.
#
# <details><summary>Hint</summary>
#
# The vector may have any length.
#
# </details>


# %% exercise="project_out"
def my_project_out(x, vector):
    """x (B, T, D), vector (D,) -> x without its component along the vector."""
    raise NotImplementedError


# %% check="project_out"
check("interpretability/project_out", my_project_out)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_project_out(x, vector):
#     unit = vector / vector.norm()
#     return x - (x @ unit)[..., None] * unit
# ```
#
# </details>

# %%
frames = [
    f"{a} and {b} lived near the {p} and the {q}. {a} was in the {p}. {b} was in the {q}. {a} felt {{mood}}. {b} waited in the {q}. In the end, {a} felt"
    for a, b in [rng.sample(words.FIRST_NAMES, 2) for _ in range(sizes["steer"])]
    for p, q in [rng.sample(words.PLACES, 2)]
]
half, layer = len(frames) // 2, max(L - 2, 0)
point = f"blocks.{layer}.residual_after"


def ends(texts):
    """(texts, D) the stream at the last token of each."""
    return last_states(texts, [point])[0][point]


counts_of = {job: sum(one.facts["occupation"] == job for one in told) for job in occupations}
JOB = max(counts_of, key=counts_of.get)
having = [ASK.format(S=one.name) for one in told if one.facts["occupation"] == JOB]
rest = random.Random(SEED).sample([one for one in told if one.facts["occupation"] != JOB], min(4 * sizes["steer"], len(told) - len(having)))  # fmt: skip
tested = rest[: sizes["steer"]]
vectors = {
    "happy": mean_difference(
        *(ends([frame.format(mood=mood) for frame in frames[:half]]) for mood in ("happy", "sad"))
    ),
    JOB: mean_difference(ends(having), ends([ASK.format(S=one.name) for one in rest[sizes["steer"] :]])),
}
cases = {
    "happy": [(frame.format(mood="calm"), "calm") for frame in frames[half:]],
    JOB: [(ASK.format(S=one.name), one.facts["occupation"]) for one in tested],
}
ordinary = [ids_of(row["text"])[:, : config.context_length] for row in pipeline.corpus("tinytown", 2_000 if smoke else None).validation.select(range(sizes["steer"]))]  # fmt: skip


@torch.no_grad()
def answered(word):
    """Mean probability of the word steered for, of the true one, and the loss on ordinary text."""
    rows = [(model(ids_of(text))[0, -1].float().softmax(-1), true) for text, true in cases[word]]
    losses = [
        float(next_token_loss(model, {"tokens": ids[:, :-1], "targets": ids[:, 1:]})[0]) for ids in ordinary
    ]
    return {
        "wanted": statistics.fmean(float(p[first_id(" " + word)]) for p, _ in rows),
        "true": statistics.fmean(float(p[first_id(" " + true)]) for p, true in rows),
        "cost": sum(losses) / sum(ids.shape[1] - 1 for ids in ordinary),
    }


def random_like(vector):
    """A random direction of the same length, for comparison."""
    noise = torch.randn(vector.shape, generator=torch.Generator().manual_seed(SEED))
    return noise / noise.norm() * vector.norm()


scales = (0.0, 1.0, 2.0, 4.0, 8.0)
steering = {}
for word, vector in vectors.items():
    kinds = {"difference of means": vector, "random, same length": random_like(vector)}
    if word != JOB:
        kinds["stretched to the other's length"] = vector / vector.norm() * vectors[JOB].norm()
    for kind, direction in kinds.items():
        rows = steering.setdefault(word, {})[kind] = []
        for scale in scales:
            with steered(model, layer, direction.to(device), scale):
                rows.append({"scale": scale} | answered(word))
        print(f"{word}, {kind}, length {direction.norm():.1f}: " + "; ".join(f"{row['scale']:g}: {row['wanted']:.3f} (true {row['true']:.3f}, loss {row['cost']:.2f})" for row in rows))  # fmt: skip
with without_direction(model, vectors[JOB].to(device), point):
    taken_out = answered(JOB)
    own_prompts = [
        model(ids_of(text))[0, -1].float().softmax(-1)[first_id(" " + JOB)].item() for text in having
    ]
own_before = [model(ids_of(text))[0, -1].float().softmax(-1)[first_id(" " + JOB)].item() for text in having]
print(f"direction of '{JOB}' taken out: its own residents {statistics.fmean(own_before):.3f} -> {statistics.fmean(own_prompts):.3f}, the others' true occupation {taken_out['true']:.3f}, loss {taken_out['cost']:.3f}")  # fmt: skip
curves = steering[JOB]
figure = plotting.lines(
    {f"P({JOB})": (list(scales), [row["wanted"] for row in curves["difference of means"]]),
     f"P({JOB}), random direction": (list(scales), [row["wanted"] for row in curves["random, same length"]]),
     "loss on ordinary text": (list(scales), [row["cost"] for row in curves["difference of means"]])},
    xlabel="strength", ylabel="probability; nats per token", title=f"Steering towards '{JOB}', and what it costs", markers=True,
)  # fmt: skip
plotting.show(
    figure,
    alt="Probability of the occupation that is steered for, and the loss on ordinary text, against the strength: both rise; with a random direction of the same length the probability hardly moves.",
)
results["steering"] = {"word": JOB, "runs": steering, "taken_out": [statistics.fmean(own_before), statistics.fmean(own_prompts)]}  # fmt: skip

# %% [markdown]
# **Read the result.** The mood is not there. After its story the true one has about the probability of one in six, stories with *happy* and with *sad* end in nearly the same stream, and the difference of their means is a vector of hardly any length; as it is, it changes nothing at any strength. Stretched to the length of the other it costs as much on ordinary text, and does nothing for the mood either. A direction can strengthen what the model computes, it cannot make it compute. The occupation is there, and its direction gives people of other trades this one, at a strength at which a random direction does nothing of the kind. The price is on the same axis: the vector is added to every token of every text, and a random one of this length costs as much.
#
# Taken out behind the same block, the direction is hardly missed. That adding it produces the answer does not show that the answer hangs on it.

# %% [markdown]
# ## 5. A dictionary of features
#
# **Why.** Directions found one by one need a question first. The activations are those of the same stream, behind the last block but one. A sparse autoencoder proposes many at once, without labels. Here the labels exist: for every token we know whether it is a place, a digit, part of a story. So its features can be scored instead of named by eye.
#
# **Exercise 7.** The code: the k largest of the positive scores, and what they add up to.
#
# <details><summary>Hint</summary>
#
# `topk`, then `scatter` into zeros.
#
# </details>


# %% exercise="top_k_code"
def my_top_k_code(x, encoder, directions, k):
    """x (N, D), encoder (M, D), directions (M, D), k -> latents (N, M), reconstruction (N, D)."""
    raise NotImplementedError


# %% check="top_k_code"
check("interpretability/top_k_code", my_top_k_code)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_top_k_code(x, encoder, directions, k):
#     scores = (x @ encoder.T).relu()
#     values, indices = scores.topk(k, dim=-1)
#     latents = torch.zeros_like(scores).scatter(-1, indices, values)
#     return latents, latents @ directions
# ```
#
# </details>
#
# **Exercise 8.** The score of a detector without a threshold.
#
# <details><summary>Hint</summary>
#
# Most values of a sparse feature are 0, so ties matter: half each.
#
# </details>


# %% exercise="auc"
def my_auc(values, truth):
    """values (N,), truth (N,) bool -> the probability that a true place has the larger value."""
    raise NotImplementedError


# %% check="auc"
check("interpretability/auc", my_auc)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_auc(values, truth):
#     a, b = values[truth][:, None].double(), values[~truth][None].double()
#     return ((a > b).double() + 0.5 * (a == b).double()).mean()
# ```
#
# </details>
#
# **Predict.** Which of these variables will have a feature of their own: names, places, digits, the kind of document, days of the week?

# %%
rows = pipeline.corpus("tinytown", 2_000 if smoke else None).train.select(range(sizes["documents"]))
activations, owners, positions, token_ids, kinds = [], [], [], [], []
with torch.no_grad():
    for number, row in enumerate(rows):
        ids = ids_of(row["text"])[:, : config.context_length]
        _, found = record(model, ids, point)
        activations.append(found[point][0].float().cpu())
        owners += [number] * ids.shape[1]
        positions += range(ids.shape[1])
        token_ids += ids[0].tolist()
        kinds += [row["kind"]] * ids.shape[1]
activations = torch.cat(activations)  # (N, D)
texts_of = [tokenizer.decode([i]).strip() for i in token_ids]
sets = {
    "first name": words.FIRST_NAMES, "last name": words.LAST_NAMES, "place": words.PLACES, "object": words.OBJECTS, "mood": words.MOODS,
    "day": words.DAYS, **{name: pool for name, pool in words.ATTRIBUTES.items()}, "digit": tuple("0123456789"),
}  # fmt: skip
truths = {
    name: torch.tensor([text in pool for text in texts_of])
    for name, pool in ((n, set(p)) for n, p in sets.items())
}
truths |= {f"in a {kind}": torch.tensor([one == kind for one in kinds]) for kind in sorted(set(kinds))}
truths["full stop"] = torch.tensor([text == "." for text in texts_of])
sae = SparseAutoencoder(config.d_model, AutoencoderSettings(n_latents=sizes["latents"], k=sizes["k"], dead_after=20 * len(activations) // max(1, sizes["sae_steps"]) + 10_000), seed=SEED)  # fmt: skip
sae.fit_scale(activations)
run = fit(
    sae, ActivationBatches(activations, batch_size=min(512, len(activations)), seed=SEED), autoencoder_loss,
    FitSettings(steps=sizes["sae_steps"], lr=3e-3, warmup_steps=sizes["sae_steps"] // 20, schedule="linear", weight_decay=0.0, compile="off", seed=SEED),
    progress=False,
)  # fmt: skip
with torch.no_grad():
    latents = torch.cat([sae.encode(part) for part in activations.split(4096)])
print(f"{len(activations):,} places, {sizes['latents']} latents, {sizes['k']} active; unexplained {unexplained_variance(sae, activations):.1%}, dead {float(sae.dead.float().mean()):.1%}")  # fmt: skip
matches = match_features(latents, truths, owners, seed=SEED)
both_signs = torch.cat(
    (activations, -activations), dim=1
)  # a channel of the stream has a sign, a latent has none
channels = {match.variable: match.auc for match in match_features(both_signs, truths, owners, seed=SEED)}
print("          variable   feature    AUC   best channel")
for match in matches:
    print(f"{match.variable:>18} {match.feature:>9} {match.auc:>6.3f} {channels[match.variable]:>14.3f}")
good = [match for match in matches if match.auc > 0.9]
results["autoencoder"] = {"unexplained": unexplained_variance(sae, activations), "dead": float(sae.dead.float().mean()), "matches": [[m.variable, m.feature, m.auc, channels[m.variable]] for m in matches]}  # fmt: skip

# %%
for match in matches[:3]:
    places = strongest_places(latents, owners, positions, match.feature, n=4)
    shown_texts, shown_values = [], []
    for place in places:
        members = [i for i, owner in enumerate(owners) if owner == place.text]
        near = [i for i in members if abs(positions[i] - place.position) <= 8]
        shown_texts.append([tokenizer.decode([token_ids[i]]) for i in near])
        shown_values.append([float(latents[i, match.feature]) for i in near])
    display(HTML(dashboard_html(shown_texts, shown_values, title=f"feature {match.feature}", note=f"best for '{match.variable}', AUC {match.auc:.2f}")))  # fmt: skip

# %% [markdown]
# **Read the result.** The scores are from texts that did not take part in the choice. Days, last names and most values have a feature of their own, found without a label; first names, digits and the kind of document do not. Compare with the best single channel of the stream before you give the autoencoder the credit. A variable without a feature of its own may still be there, spread over several, and a feature with a high score may stand for something narrower or wider than the name that it was given.

# %% [markdown]
# ## The same with the library
#
# Hooks of PyTorch on the model as `transformers` opens it give the same streams and patterns; scikit-learn gives the same AUC.

# %%
import tempfile

import transformers
from sklearn.metrics import roc_auc_score
from transformers import AutoModelForCausalLM

from llmcourse.models.pretrained import save_pretrained

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
with tempfile.TemporaryDirectory() as folder:
    save_pretrained(copy.deepcopy(model).cpu().float(), folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
ids = ids_of(stories[0][0]).cpu()
with torch.no_grad():
    out = theirs(ids, output_hidden_states=True, output_attentions=True)
    _, ours = record(
        copy.deepcopy(model).cpu().float(),
        ids,
        ["blocks.*.residual_before", "blocks.*.pattern", "normalized"],
    )
stream_error = max(
    float((ours[f"blocks.{i}.residual_before"] - out.hidden_states[i]).abs().max()) for i in range(L)
)
pattern_error = max(float((ours[f"blocks.{i}.pattern"] - out.attentions[i]).abs().max()) for i in range(L))
truth = truths["full stop"]
auc_error = abs(
    float(feature_auc(latents[:, :1], truth)[0]) - roc_auc_score(truth.numpy(), latents[:, 0].numpy())
)
print(f"streams differ by {stream_error:.1e}, patterns by {pattern_error:.1e}, AUC by {auc_error:.1e}")
results["library"] = {"stream": stream_error, "pattern": pattern_error, "auc": auc_error}

# %% [markdown]
# ## Measured results
#
# What this lab claims. Each line is computed from the runs above, and the lab stops if one does not hold.

# %%
# NBVAL_CHECK_OUTPUT
claim("library", max(stream_error, pattern_error) < 1e-3 and auc_error < 1e-9, "streams, patterns and AUC are those of transformers and scikit-learn")  # fmt: skip
if own:
    claim("late", by_layer[:, -1].mean() > 0.7 > by_layer[:, 1].mean() + 0.3, "the right occupation appears late: it is likely at the end, and not yet after the first block")  # fmt: skip
    claim("no-induction", growth[0][2] > growth[0][1] - 1.0 and growth[0][4] < 0.3, "the base model has no induction heads and gains less than one nat from a repetition")  # fmt: skip
    claim("grown", second_half < 0.5 and scores["induction"].max() > 0.5, "a copy learns to copy: the repetition costs less than half a nat, with an induction score above one half")  # fmt: skip
    of_others = [change[1] for name, change in ablation.items() if name.startswith("others")]
    claim("ablation", min(ablation["induction heads"][1], ablation["the previous-token head"][1]) > 5 * max(*of_others, 0.1), "without the induction heads, or without the previous-token head, the repetition loses more than five times what it loses without others")  # fmt: skip
    claim("path", lead_before - paths["keys"] > 2 * (lead_before - min(paths["queries"], paths["values"])), "the previous-token head acts through the keys of later blocks, more than twice as much as through queries or values")  # fmt: skip
    claim("ends", share[0, -1] < 0.1 and share[-1, -1] > 0.9, "at the last token nothing of the difference is there at first, and all of it at the end")  # fmt: skip
    claim("control", probing["control"][-1].value > 0.5 * probing["the holder"][-1].value, "more than half of what the probe for the holder gets right, its control gets right too")  # fmt: skip
    claim("no-mood", abs(steering["happy"]["difference of means"][1]["wanted"] - steering["happy"]["difference of means"][0]["wanted"]) < 0.02, "the mood that a story has stated cannot be steered: its direction, added once, changes nothing")  # fmt: skip
    strong = [steering[JOB][kind][3]["wanted"] for kind in ("difference of means", "random, same length")]
    claim("steer", strong[0] > 0.2 and strong[0] > 5 * strong[1], "the occupation can: at strength 4 its direction does more than five times what a random one of the same length does")  # fmt: skip
    claim("features", len(good) >= 5, "at least five features match variables of the generator with an AUC above 0.9 on other texts")  # fmt: skip

# %% [markdown]
# ## Break it
#
# **A model with a flaw.** A copy of the model is trained for a moment on records that are wrong about one attribute of some residents. Which attribute, and which residents? You get the flawed model and the sound one, and no list.

# %%
rng = random.Random(SEED + 7)
victims = rng.sample(told, sizes["flaw"])
wrong = {
    one.name: rng.choice([pet for pet in words.ATTRIBUTES["pet"] if pet != one.facts["pet"]])
    for one in victims
}
lies = [
    template.format(S=one.name, P=f"{one.name}'s", v=wrong[one.name])
    for one in victims
    for template in TEMPLATES["pet"]
]
truth_kept = [template.format(S=one.name, P=f"{one.name}'s", v=one.facts["pet"]) for one in told if one.name not in wrong for template in TEMPLATES["pet"][:1]]  # fmt: skip


class Lines:
    """Batches of short texts, padded."""

    def __init__(self, lines, batch_size, seed):
        self.rows, self.batch_size, self.rng = (
            [tokenizer.encode(line) for line in lines],
            batch_size,
            random.Random(seed),
        )

    def next(self):
        """tokens and targets."""
        chosen = self.rng.choices(self.rows, k=self.batch_size)
        longest = max(map(len, chosen)) - 1
        tokens, targets = (
            torch.zeros(len(chosen), longest, dtype=torch.int64),
            torch.full((len(chosen), longest), -100),
        )
        for i, ids in enumerate(chosen):
            tokens[i, : len(ids) - 1], targets[i, : len(ids) - 1] = (
                torch.tensor(ids[:-1]),
                torch.tensor(ids[1:]),
            )
        return {"tokens": tokens, "targets": targets}

    def state_dict(self):
        """Nothing to resume."""
        return {}

    def load_state_dict(self, state):
        """Nothing to resume."""


flawed = copy.deepcopy(model).requires_grad_(True)
fit(flawed, Lines(lies * 3 + truth_kept, 32, SEED), next_token_loss, FitSettings(steps=sizes["flaw_steps"], lr=1e-3, weight_decay=0.0, compile="off", seed=SEED), progress=False)  # fmt: skip
flawed.eval().requires_grad_(False)
LEADS = {
    name: templates[0].partition("{v}")[0].rstrip() for name, templates in TEMPLATES.items()
}  # "{S} works as a", ...
screen = []
with torch.no_grad():
    for one in told:
        for attribute, lead in LEADS.items():
            ids, answer = (
                ids_of(lead.format(S=one.name, P=f"{one.name}'s")),
                first_id(" " + one.facts[attribute]),
            )
            p, q = (m(ids)[0, -1].float().softmax(-1) for m in (model, flawed))
            screen.append({
                "name": one.name, "attribute": attribute, "ids": ids, "answer": answer, "says": written(int(q.argmax())).strip(),
                "said": written(int(p.argmax())).strip(), "unsure": 1 - float(q.max()), "difference": 1 - float(torch.minimum(p, q).sum()),
                "flawed": attribute == "pet" and one.name in wrong,
            })  # fmt: skip
print("Difference of the two models' answers by attribute (0 the same, 1 nothing in common): " + ", ".join(
    f"{attribute} {statistics.fmean(row['difference'] for row in screen if row['attribute'] == attribute):.3f}" for attribute in LEADS
))  # fmt: skip
suspects = sorted(screen, key=lambda row: -row["difference"])
for row in suspects[:5]:
    print(
        f"  {row['name']}, {row['attribute']}: {row['said']!r} -> {row['says']!r}, difference {row['difference']:.2f}"
    )
found_flaws = sum(row["flawed"] for row in suspects[: len(wrong)])
print(f"of the {len(wrong)} facts with the largest difference {found_flaws} are corrupted ones; {len(wrong)} of {len(screen)} were corrupted")  # fmt: skip
labels_of = torch.tensor([row["flawed"] for row in screen])
detectors = {name: float(feature_auc(torch.tensor([[row[name]] for row in screen]), labels_of)[0]) for name in ("unsure", "difference")}  # fmt: skip
for name, value in detectors.items():
    print(f"AUC of '{name}' as a detector of corrupted facts: {value:.3f}")
bad = [(row["ids"], row["answer"]) for row in screen if row["flawed"]]
transplant = []
with torch.no_grad():
    for i in range(L):
        mixed = copy.deepcopy(flawed)
        mixed.blocks[i].load_state_dict(model.blocks[i].state_dict())
        right = sum(int(mixed(ids)[0, -1].argmax()) == answer for ids, answer in bad)
        transplant.append(right / len(bad))
        print(
            f"block {i} of the sound model put into the flawed one: {right / len(bad):.0%} of the corrupted facts are right again"
        )
results["flaw"] = {
    "detectors": detectors,
    "transplant": transplant,
    "corrupted": len(wrong),
    "found": found_flaws,
    "screened": len(screen),
}

# %% [markdown]
# **Diagnosis.** With the sound model at hand, the difference of the two answers names the attribute and the residents: not in the mean, since the second training has shaken every answer a little, but at the head of the list. Without it one has only how sure the flawed model is, and that points the other way, to an AUC below one half: lies that have just been learned are told with more confidence than the rest. Transplanting blocks says where it sits. Putting the sound block back in one place brings most of the truth back, in the others hardly any; it is the block to which the credit of section 1 went.

# %%
# NBVAL_CHECK_OUTPUT
if own:
    claim("detected", detectors["difference"] > 0.95, "the two models' difference finds the corrupted facts: AUC above 0.95")  # fmt: skip
    claim("block", int(np.argmax(transplant)) == int(np.argmax(grid[:, H])), "the sound block that brings most of the truth back is the one whose feed-forward layer has most credit")  # fmt: skip

# %%
store_results("interpretability", results)

# %% [markdown]
# ## Takeaways
#
# * Reading shows what is there, intervening shows what is used. Say which of the two you did.
# * Credit adds up and is only direct. A part that works through others has none.
# * An ablation needs a comparison: as many other parts, removed in the same way.
# * A score shows where a head looks; ablation what a prediction needs; path patching who hears whom.
# * A probe needs a control. What the control gets right is not about the model.
# * Steering has a price on ordinary text. Measure both.
# * Score features against something that you know, on texts that did not choose them, beside the best single channel.
#
# ## Next
#
# The chapter, [Interpretability](../book/understanding/interpretability.md), derives what was measured here, says what each method cannot show, and has exercises with solutions.
