# %% [markdown]
# # Lab 01 · Sequence models and attention
#
# [Open in Colab]({{colab}}) · [Source of this lab]({{repository}}/blob/{{branch}}/labs/src/01_attention.py)
#
# | | |
# |---|---|
# | **Chapter** | [01 Sequence models and attention](../book/foundations/attention.md) |
# | **Hardware** | CPU, 2 cores, 2 GiB of memory; a GPU is used with `PRESET = "gpu"` |
# | **Minutes** | 2 to execute, 90 to 120 with the exercises |
# | **You will build** | scaled dot-product attention, the causal mask, rotary positions, grouped key heads, RMSNorm, SwiGLU and the block that joins them |
# | **What to inspect** | recall against distance; softmax saturation; loss beyond the training length; a loss *below* the entropy of the text |

# %% [markdown]
# ## Setup
#
# `PRESET = "gpu"` takes longer runs, more seeds and the GPU; `CORPUS` is the text of section 5 (`"tinytown"`, `"python-docs"`, `"files:*.txt"`, `"hub:<name>"`); every random number follows from `SEED`.

# %% tags=["parameters"]
PRESET = "cpu"
CORPUS = "tinytown"
SEED = 0

# %%
import math
import statistics
import tempfile
import time
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F

from llmcourse import plotting
from llmcourse.accounting import count_parameters, kv_cache_bytes
from llmcourse.checks import check, claim
from llmcourse.data.sources import load_corpus
from llmcourse.evaluation.statistics import seed_interval
from llmcourse.labs import store_results
from llmcourse.models import ModelConfig, Transformer
from llmcourse.models.attention import (
    apply_rope,
    causal_mask,
    repeat_kv,
    rope_frequencies,
    rope_tables,
    scaled_dot_product_attention,
)
from llmcourse.models.pretrained import save_pretrained
from llmcourse.runtime import pick_device, progress, set_seed

SIZES = {
    "cpu": {"pairs": (4, 8, 16), "recall_steps": 300, "n_seeds": 3, "text_steps": 200, "stored_tokens": 4096},
    "gpu": {
        "pairs": (4, 8, 16, 32),
        "recall_steps": 600,
        "n_seeds": 5,
        "text_steps": 400,
        "stored_tokens": 65_536,
    },
}
if PRESET not in SIZES:
    raise ValueError(f"PRESET={PRESET!r}: choose one of {', '.join(SIZES)}")
sizes = SIZES[PRESET]
seeds = range(SEED, SEED + sizes["n_seeds"])
device = pick_device("auto" if PRESET == "gpu" else "cpu")
results = {}
set_seed(SEED)

# %% [markdown]
# ## Objectives
#
# After this lab you can
#
# 1. say what a recurrent state and an attention layer each have to do to recall one item out of many, and measure it;
# 2. derive the factor $1/\sqrt{d_h}$ from two numbers, the variance of the scores and the gradient of the softmax;
# 3. write the causal mask, and test a model for leaks from the future in two lines;
# 4. rotate queries and keys so that scores depend on relative position only, and say where that stops helping;
# 5. size the key/value cache of a model from its configuration;
# 6. assemble a block of the Llama family that agrees with `transformers` in every logit.

# %% [markdown]
# ## 1. A state or a lookup
#
# **Why.** A recurrent network reads a sequence into a state of fixed size and answers from that state. Attention keeps every position and looks the answer up. The smallest task that separates the two is *associative recall*: read pairs of a key and a value, then give the value of a key that is asked for. It is also a task that language is full of: every name that comes back in a text asks for what was said about it.
#
# A pair arrives as one position (the sum of a key embedding and a value embedding), so that one attention layer is enough; with key and value on separate positions it takes two layers, the *induction head* of chapter 18. Keys do not repeat within a sequence, values do. Every key is asked for, and all models read the same sequences.

# %%
N_KEYS, N_VALUES, WIDTH = max(sizes["pairs"]), 4, 64


def draw_pairs(batch, n_pairs, generator):
    """Keys (B, N), different within a row, and values (B, N)."""
    keys = torch.rand(batch, N_KEYS, generator=generator).argsort(dim=1)[:, :n_pairs]
    values = torch.randint(N_VALUES, (batch, n_pairs), generator=generator)
    return keys.to(device), values.to(device)


class Recall(nn.Module):
    """Reads pairs, then answers every query on its own; `memory` is nn.RNN, nn.GRU or "attention"."""

    def __init__(self, memory):
        super().__init__()
        self.key, self.value = nn.Embedding(N_KEYS, WIDTH), nn.Embedding(N_VALUES, WIDTH)
        self.answer = nn.Linear(WIDTH, N_VALUES)
        self.memory = None if memory == "attention" else memory(WIDTH, WIDTH, batch_first=True)
        if memory == "attention":
            self.projections = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in "qkv")

    def forward(self, keys, values, queries):
        """keys, values (B, N), queries (B, Q) -> logits (B, Q, N_VALUES)."""
        pairs, asked = self.key(keys) + self.value(values), self.key(queries)  # (B, N, D), (B, Q, D)
        if self.memory is None:
            q, k, v = (
                layer(x)[:, None] for layer, x in zip(self.projections, (asked, pairs, pairs), strict=True)
            )
            return self.answer(scaled_dot_product_attention(q, k, v)[:, 0])
        _, state = self.memory(pairs)  # (1, B, D): all that is left of the sequence
        state = state.repeat_interleave(asked.shape[1], dim=1)  # (1, B * Q, D)
        out, _ = self.memory(asked.flatten(0, 1)[:, None], state)  # each query is one more step
        return self.answer(out[:, 0]).view(*queries.shape, N_VALUES)


def train_recall(memory, n_pairs, seed):
    """Accuracy on fresh sequences by distance: entry i is for the pair read i pairs before the last one."""
    set_seed(seed)
    model = Recall(memory).to(device)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(sizes["recall_steps"]):
        keys, values = draw_pairs(64, n_pairs, generator)
        loss = F.cross_entropy(model(keys, values, keys).flatten(0, 1), values.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    keys, values = draw_pairs(1000, n_pairs, torch.Generator().manual_seed(10_000 + seed))
    with torch.no_grad():
        right = model(keys, values, keys).argmax(-1) == values
    return right.float().mean(0).flip(0).tolist()


# %% [markdown]
# **Predict.** The state has 64 numbers, and 8 pairs carry 8 × 2 bits of values. Will the tanh RNN recall the last pair? The first? Is a GRU, whose gates were made for long distances, enough? Write down three accuracies (chance is 1 in 4) before you run the cell.

# %%
memories = {"tanh RNN": nn.RNN, "GRU": nn.GRU, "attention": "attention"}
runs = [(name, n, seed) for name in memories for n in sizes["pairs"] for seed in seeds]
# for each memory and number of pairs: a list over seeds of accuracies by distance
recall = {name: {n: [] for n in sizes["pairs"]} for name in memories}
for name, n_pairs, seed in progress(runs, description="recall", unit="run"):
    recall[name][n_pairs].append(train_recall(memories[name], n_pairs, seed))


def mean_accuracy(name, n_pairs):
    """Mean over distances, one number for each seed."""
    return [statistics.fmean(by_distance) for by_distance in recall[name][n_pairs]]


def knows_values_only(n_pairs, draws=20_000):
    """Best accuracy of a guesser that knows which values occurred, and how often, but not with which key."""
    values = torch.randint(N_VALUES, (draws, n_pairs), generator=torch.Generator().manual_seed(SEED))
    return (F.one_hot(values).sum(1).max(1).values / n_pairs).mean().item()


unbound = {n: knows_values_only(n) for n in sizes["pairs"]}
print("accuracy, mean and 95 % interval over seeds")
print(" " * 10, *(f"{f'{n} pairs':>18}" for n in sizes["pairs"]))
for name in memories:
    means = [seed_interval(mean_accuracy(name, n)) for n in sizes["pairs"]]
    print(f"{name:>10}", *(f" {mean.value:.2f} [{mean.low:.2f}, {mean.high:.2f}]" for mean in means))
print(f"{'unbound':>10}", *(f"{unbound[n]:>18.2f}" for n in sizes["pairs"]))

# %%
middle = sizes["pairs"][1]


def over_seeds(name, n_pairs, statistic):
    """A statistic over seeds (mean, min, max) of the accuracy at each distance."""
    return [statistic(column) for column in zip(*recall[name][n_pairs], strict=True)]


distances = list(range(middle))
figure = plotting.lines(
    {name: (distances, over_seeds(name, middle, statistics.fmean)) for name in memories},
    bands={name: (over_seeds(name, middle, min), over_seeds(name, middle, max)) for name in memories},
    horizontal={"knows the values, not their keys": unbound[middle], "chance": 1 / N_VALUES},
    xlabel="pairs read since the one that is asked for",
    ylabel="accuracy",
    title=f"Associative recall of {middle} pairs: mean and range of {len(seeds)} seeds",
)
plotting.show(
    figure,
    alt="Accuracy against distance: attention is at 1 everywhere, the GRU somewhat below it, and the tanh RNN falls "
    "from its best at distance 0 to the level of a guesser that knows which values occurred but not their keys.",
)
results["recall"] = {
    "pairs": list(sizes["pairs"]),
    "steps": sizes["recall_steps"],
    "seeds": list(seeds),
    "accuracy": recall,
    "unbound": unbound,
}

# %% [markdown]
# **Read the result.** The dashed level is what a model reaches that remembers *which values occurred* and not *which key each belongs to*. The tanh RNN ends there, apart from the last pair or so: it has summed the values up, and it has not bound them to keys. Binding is a product of key and value, and a state that is updated by a sum and a squashing has to learn to imitate products; the GRU has products (its gates), so it does much better, and loses accuracy as more pairs compete for the same 64 numbers. Attention has no such competition: its memory grows with the sequence, and a product of query and key is its basic operation. Note what is *not* shown: 64 numbers could hold 32 bits. More steps raise the GRU's curve. The limit here is what gradient descent finds in a given budget, and that is the limit that matters in practice.
#
# **Run: where does the gradient go?** Distance hurts training before it hurts capacity. Here is how strongly the last output of an *untrained* layer depends on each earlier input.


# %%
def gradient_by_distance(memory, seed, length=64):
    """Mean norm over a batch of d(random projection of the last output) / d(input), by distance from the last input."""
    set_seed(seed)
    x = torch.randn(16, length, WIDTH, requires_grad=True)
    if memory == "attention":
        q, k, v = (F.linear(x, torch.randn(WIDTH, WIDTH) / math.sqrt(WIDTH))[:, None] for _ in "qkv")
        last = scaled_dot_product_attention(q, k, v)[:, 0, -1]
    else:
        last = memory(WIDTH, WIDTH, batch_first=True)(x)[0][:, -1]
    (last @ torch.randn(WIDTH)).sum().backward()
    return x.grad.norm(dim=-1).mean(0).flip(0)


gradients = {
    name: torch.stack([gradient_by_distance(memory, seed) for seed in seeds]).mean(0)
    for name, memory in memories.items()
}
figure = plotting.lines(
    {name: (list(range(64)), gradient.tolist()) for name, gradient in gradients.items()},
    xlabel="distance from the last input",
    ylabel="norm of the gradient",
    title="How the last output depends on earlier inputs, at initialization",
    logy=True,
)
plotting.show(
    figure,
    alt="On a logarithmic axis the gradients of the tanh RNN and of the GRU fall along straight lines by more than ten "
    "orders of magnitude over 64 positions, while that of attention is level.",
)
results["gradient"] = {name: gradient.tolist() for name, gradient in gradients.items()}
for name, gradient in gradients.items():
    print(f"{name:>10}: distance 1 {gradient[1]:.1e}, 16 {gradient[16]:.1e}, 63 {gradient[63]:.1e}")

# %% [markdown]
# Straight lines on a logarithmic axis: each recurrent step multiplies the gradient by a factor below 1. Attention reaches every position in one step, and its line is level; the price is that every pair of positions is computed.
#
# **Exercise 1.** Write the lookup itself: $\operatorname{softmax}\!\left(QK^\top/\sqrt{d_h}\right)V$. Take the factor $1/\sqrt{d_h}$ as given; section 2 shows why.
#
# <details><summary>Hint</summary>
#
# `k.mT` transposes the last two axes. The scores have shape (B, H, Tq, Tk), and each query's weights sum to 1 over the keys.
#
# </details>


# %% exercise="lookup"
def lookup(q, k, v):
    """q (B, H, Tq, C), k and v (B, H, Tk, C) -> (B, H, Tq, C)."""
    raise NotImplementedError


# %% check="lookup"
check("attention/lookup", lookup)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def lookup(q, k, v):
#     scores = q @ k.mT / math.sqrt(q.shape[-1])
#     return scores.softmax(dim=-1) @ v
# ```
#
# </details>

# %% [markdown]
# ## 2. The scale and the mask
#
# **Why.** Two details of equation 1 of the 2017 paper look like decoration and are not: the division by $\sqrt{d_h}$, and which scores are removed before the softmax.
#
# A score is a sum of $d_h$ products. If the components of $q$ and $k$ are independent with mean 0 and variance 1, each product has variance 1 and the sum has variance $d_h$. The softmax of scores that are spread over tens of units is nearly a hard maximum, and a hard maximum has no gradient: the Jacobian of $w = \operatorname{softmax}(s)$ is $\operatorname{diag}(w) - ww^\top$, which is zero when one weight is 1.
#
# **Predict.** With 64 keys and $d_h = 128$, unscaled: which share of its maximum, $\log 64$, is left of the weights' entropy? How much smaller is the Jacobian than with the scale, for the typical query?


# %%
def softmax_statistics(d_head, scaled, n_keys=64, n_queries=1000):
    """Deviation of the scores; entropy of the weights over its maximum; norm of the Jacobian: mean and median query."""
    generator = torch.Generator().manual_seed(SEED)
    q = torch.randn(n_queries, d_head, generator=generator)
    k = torch.randn(n_queries, n_keys, d_head, generator=generator)  # every query has keys of its own
    scores = torch.einsum("qc,qkc->qk", q, k) / (math.sqrt(d_head) if scaled else 1.0)
    weights = scores.softmax(-1)
    entropy = torch.special.entr(weights).sum(-1) / math.log(n_keys)
    jacobian = torch.diag_embed(weights) - weights[:, :, None] * weights[:, None, :]
    norms = jacobian.norm(dim=(1, 2))
    return scores.std().item(), entropy.mean().item(), norms.mean().item(), norms.median().item()


widths = [4, 8, 16, 32, 64, 128, 256, 512]
softmax = {
    name: [softmax_statistics(width, name == "scaled") for width in widths] for name in ("unscaled", "scaled")
}
print("         std of scores        entropy / log 64     Jacobian, mean       Jacobian, median")
print("d_head   unscaled  scaled     unscaled  scaled     unscaled  scaled     unscaled  scaled")
for width, bare, scaled in zip(widths, softmax["unscaled"], softmax["scaled"], strict=True):
    print(f"{width:>6} " + "".join(f"{a:>11.3f}{b:>8.3f}  " for a, b in zip(bare, scaled, strict=True)))
for column, what in ((1, "entropy of the weights / log 64"), (3, "norm of the Jacobian, median query")):
    figure = plotting.lines(
        {name: (widths, [row[column] for row in rows]) for name, rows in softmax.items()},
        xlabel="channels per head, $d_h$",
        ylabel=what,
        title=f"Softmax over 64 random keys: {what.split(' /')[0]}",
        logx=True,
    )
    plotting.show(
        figure,
        alt=f"The {what.split(' /')[0]} against head width: level with the scale, falling towards zero without it.",
    )
results["softmax"] = {
    "d_head": widths,
    **{
        name: dict(
            zip(
                ("std", "entropy", "jacobian_mean", "jacobian_median"),
                map(list, zip(*rows, strict=True)),
                strict=True,
            )
        )
        for name, rows in softmax.items()
    },
}

# %% [markdown]
# **Read the result.** Unscaled, the standard deviation is $\sqrt{d_h}$ and the entropy goes to zero: each query picks one key at random, at initialization, before anything was learned. The Jacobian first *rises*, because nearly uniform weights have a small Jacobian too, and then falls as the softmax saturates. Compare its mean with its median: at width 512 the typical query has next to no gradient left, while the mean is held up by the few queries whose two best keys happen to score alike. At the widths in use today, 64 to 128, it is the entropy that is lost first. Scaled, all these numbers stop depending on the width, and that is what the factor is for: a model can change its head width without changing the temperature of its attention. The argument is about initialization. Training can make the scores as large as it likes, and in large models it does; that is why newer models normalize queries and keys (`qk_norm`, Qwen3), which bounds every score by $\sqrt{d_h}$ times the gains.
#
# **Why a mask.** A language model is trained on all positions of a text at once. Position $t$ predicts token $t+1$, and token $t+1$ stands in the input one place to the right. Nothing but the mask keeps position $t$ from reading it.
#
# **Exercise 2.** Write the mask. The queries are the *last* `n_queries` of `n_keys` positions: with stored keys and values, a model computes only the new positions.
#
# <details><summary>Hint</summary>
#
# Compare a column of query positions with a row of key positions.
#
# </details>


# %% exercise="mask"
def my_causal_mask(n_queries, n_keys):
    """Boolean (n_queries, n_keys), True where the query may attend to the key."""
    raise NotImplementedError


# %% check="mask"
check("attention/mask", my_causal_mask)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_causal_mask(n_queries, n_keys):
#     query = torch.arange(n_keys - n_queries, n_keys)[:, None]
#     return torch.arange(n_keys)[None, :] <= query
# ```
#
# </details>
#
# **Exercise 3.** Now the attention that uses it. Where must a hidden score go so that the softmax gives it no weight *and* the other weights still sum to 1?


# %% exercise="masked"
def masked_attention(q, k, v, mask):
    """As `lookup`, with a boolean mask (Tq, Tk), True = may attend."""
    raise NotImplementedError


# %% check="masked"
check("attention/masked", masked_attention)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def masked_attention(q, k, v, mask):
#     scores = q @ k.mT / math.sqrt(q.shape[-1])
#     return scores.masked_fill(~mask, float("-inf")).softmax(dim=-1) @ v
# ```
#
# </details>
#
# **Run: the causality test.** Change the last input. With the mask, no earlier output may move, not by one bit.


# %%
def outputs_that_move(mask, length=12):
    """Positions whose output changes when the key and the value of the last position do."""
    generator = torch.Generator().manual_seed(SEED)
    q, k, v = (torch.randn(1, 1, length, 8, generator=generator) for _ in "qkv")
    before = scaled_dot_product_attention(q, k, v, mask)
    k[:, :, -1] += 1.0
    v[:, :, -1] += 1.0
    moved = (scaled_dot_product_attention(q, k, v, mask) != before).any(-1)[0, 0]
    return moved.nonzero().flatten().tolist()


print("with the mask:   ", outputs_that_move(causal_mask(12, 12)))
print("without the mask:", outputs_that_move(None))

# %% [markdown]
# ## 3. Rotary positions
#
# **Why.** Attention is a weighted sum, and a sum has no order: permute the keys with their values and nothing changes. Positions have to be put in. RoPE turns each pair of channels of $q$ and $k$ by an angle proportional to the position. The product of two rotated vectors depends on the *difference* of their angles, so scores depend on relative distance although each vector is rotated by its own position alone.
#
# **Predict.** A query at position 5 and a key at position 2 have some score. Move both by 10 000 positions. In exact arithmetic the score stays. In float32 with angles of 10 000 radians, how many digits are left?

# %%
d_head = 64
generator = torch.Generator().manual_seed(SEED)
q, k = torch.randn(2, 256, d_head, generator=generator)


def rotated(x, position):
    """Rows of x (N, C), all rotated as if they stood at `position`."""
    return apply_rope(x, *rope_tables(torch.tensor([position]), d_head))


base = (rotated(q, 5) * rotated(k, 2)).sum(-1)
shifts = [1, 10, 100, 1_000, 10_000, 100_000]
errors = [((rotated(q, 5 + s) * rotated(k, 2 + s)).sum(-1) - base).abs().max().item() for s in shifts]
moved = (rotated(q, 6) * rotated(k, 2) - rotated(q, 5) * rotated(k, 2)).sum(-1).abs().mean().item()
print(
    f"size of the scores: {base.std():.1f}; moving only the query by 1 changes them by {moved:.2f} on average"
)
for shift, error in zip(shifts, errors, strict=True):
    print(f"moving both by {shift:>7}: largest change {error:.1e}")
results["rope_shift"] = {"shifts": shifts, "errors": errors, "score_std": base.std().item()}

# %% [markdown]
# **Read the result.** The change grows in proportion to the position, because a float32 angle of 10 000 radians has an absolute error of about 0.0005. It is why implementations keep the tables in float32 whatever the model's precision; in bfloat16, which has 8 significant bits, positions above 256 cannot even be told apart.
#
# Each pair of channels has its own wavelength. The slowest pairs do not complete a turn within any context the model is trained on:

# %%
wavelengths = 2 * math.pi / rope_frequencies(d_head)
for context in (256, 4_096, 131_072):
    for theta in (10_000.0, 500_000.0):
        slow = (2 * math.pi / rope_frequencies(d_head, theta) > context).sum().item()
        print(
            f"context {context:>7}, theta {theta:>9,.0f}: {slow:>2} of {d_head // 2} pairs do not complete a turn"
        )
print(f"wavelengths at theta 10 000: {wavelengths[0]:.1f} to {wavelengths[-1]:,.0f} positions")

# %% [markdown]
# Beyond the trained length those pairs take angles that no training step has shown. Section 5 measures what that does to a model. It is also why models with long contexts raise the base `theta` (Llama 3: 500 000) or rescale the angles.
#
# **Exercise 4.** Write the rotation. Channel $i$ of the first half is paired with channel $i + d_h/2$: a pair $(a, b)$ becomes $(a\cos - b\sin,\; b\cos + a\sin)$.
#
# <details><summary>Hint</summary>
#
# `x.chunk(2, dim=-1)` gives the halves. The tables have all C columns, both halves alike, so `x * cos` is already right.
#
# </details>


# %% exercise="rope"
def my_rope(x, cos, sin):
    """x (B, H, T, C), tables (T, C) -> (B, H, T, C)."""
    raise NotImplementedError


# %% check="rope"
check("attention/rope", my_rope)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_rope(x, cos, sin):
#     first, second = x.chunk(2, dim=-1)
#     return x * cos + torch.cat((-second, first), dim=-1) * sin
# ```
#
# </details>
#
# The paper pairs neighbors $(0, 1), (2, 3), \dots$ instead. The two layouts are the same map up to a permutation of channels, and since $q$ and $k$ are permuted alike their product does not change. A checkpoint does change: reading one layout's weights with the other's rotation gives a model that runs and talks nonsense.


# %%
def interleaved_rope(x, cos, sin):
    """The paper's layout: pairs (2i, 2i + 1); its tables are the first half of ours."""
    half = x.shape[-1] // 2
    even, odd, cos, sin = x[..., 0::2], x[..., 1::2], cos[..., :half], sin[..., :half]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


tables = rope_tables(torch.arange(16), d_head)
q, k = torch.randn(2, 1, 1, 16, d_head, generator=generator)
to_halves = torch.cat(
    (torch.arange(0, d_head, 2), torch.arange(1, d_head, 2))
)  # even channels first, then odd
ours = apply_rope(q[..., to_halves], *tables) @ apply_rope(k[..., to_halves], *tables).mT
papers = interleaved_rope(q, *tables) @ interleaved_rope(k, *tables).mT
mixed_up = apply_rope(q, *tables) @ apply_rope(k, *tables).mT
layout_error = (ours - papers).abs().max().item()
print(
    f"permuted weights: largest difference {layout_error:.1e}; same weights, other layout: {(mixed_up - papers).abs().max():.1f}"
)

# %% [markdown]
# ## 4. Heads, groups, and the memory of keys
#
# **Why.** One softmax gives one average for each query. Several heads give several, of narrower vectors, at the same cost. When a model generates, the keys and values of all past tokens are kept; at each new token all of them are read. That memory, and the time to read it, is in proportion to the number of *key* heads, not of query heads. Grouped-query attention lets several query heads share a key head.
#
# **Predict.** Llama 2 7B has 32 layers, 32 key heads of 128 channels. How many GiB do keys and values of 8 192 tokens take in bfloat16? And Llama 3.1 8B, with 8 key heads?

# %%
published = {
    "Llama 2 7B": ModelConfig(vocab_size=32_000, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, d_ff=11_008, tie_embeddings=False),
    "Llama 3.1 8B": ModelConfig(vocab_size=128_256, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, d_ff=14_336, tie_embeddings=False),
    "Llama 3.1 70B": ModelConfig(vocab_size=128_256, d_model=8192, n_layers=80, n_heads=64, n_kv_heads=8, d_ff=28_672, tie_embeddings=False),
    "Qwen3 0.6B": ModelConfig(vocab_size=151_936, d_model=1024, n_layers=28, n_heads=16, n_kv_heads=8, d_head=128, d_ff=3072, qk_norm=True),
}  # fmt: skip
print("                 parameters   weights, bf16   KV of 8 192 tokens, bf16   with K = H")
for name, config in published.items():
    everyone = ModelConfig(
        vocab_size=2,
        n_layers=config.n_layers,
        n_heads=config.n_heads,
        n_kv_heads=config.n_heads,
        d_head=config.d_head,
    )
    n, kv, full = count_parameters(config), kv_cache_bytes(config, 8192), kv_cache_bytes(everyone, 8192)
    print(f"{name:>14} {n:>14,} {2 * n / 2**30:>11.1f} GiB {kv / 2**30:>20.2f} GiB {full / 2**30:>9.2f} GiB")
results["published"] = {
    name: {"parameters": count_parameters(config), "kv_bytes_8192": kv_cache_bytes(config, 8192)}
    for name, config in published.items()
}

# %% [markdown]
# **Run: what reading costs.** One new token for 4 sequences, each with thousands of stored tokens, and 16 query heads. Queries that share a key head become rows of one matrix, so each stored number is read once.


# %%
def attend_to_stored(n_kv_heads, n_heads=16, batch=4, channels=64, repeats=15):
    """Seconds of one decoding step's attention (best of some), and the bytes of keys and values that it reads."""
    tokens = sizes["stored_tokens"]
    q = torch.randn(batch, n_kv_heads, n_heads // n_kv_heads, channels, device=device)
    k, v = torch.randn(2, batch, n_kv_heads, tokens, channels, device=device)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        scaled_dot_product_attention(q, k, v).sum().item()  # item() waits for the device
        times.append(time.perf_counter() - start)
    return min(times), 2 * k.numel() * k.element_size()


print("key heads   stored      time of a step")
reading = {}
for n_kv_heads in (16, 8, 4, 2, 1):
    seconds, stored = attend_to_stored(n_kv_heads)
    reading[n_kv_heads] = {"seconds": seconds, "bytes": stored}
    print(f"{n_kv_heads:>9} {stored / 2**20:>6.0f} MiB {1e3 * seconds:>13.2f} ms")
results["reading"] = reading

# %% [markdown]
# **Read the result.** The arithmetic is the same in every row: 16 query heads, the same stored positions. Time falls nevertheless, because it was never the arithmetic that took the time: each stored number is used for one multiplication and one addition per query that shares it. Chapter 02 gives this a name (arithmetic intensity) and chapter 19 builds on it.
#
# **Exercise 5.** For the written-out attention, every query head needs a key head. Give head $k$ to the $G$ query heads $kG, \dots, kG + G - 1$.


# %% exercise="repeat_kv"
def my_repeat_kv(x, groups):
    """x (B, K, T, C) -> (B, K * groups, T, C)."""
    raise NotImplementedError


# %% check="repeat_kv"
check("attention/repeat_kv", my_repeat_kv)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_repeat_kv(x, groups):
#     return x.repeat_interleave(groups, dim=1)
# ```
#
# </details>
#
# **Exercise 6.** The size of the cache, as one product.


# %% exercise="kv_bytes"
def kv_bytes(n_layers, n_kv_heads, d_head, tokens, batch, bytes_per_number):
    """Bytes of the keys and values of `batch` sequences of `tokens` tokens: an int."""
    raise NotImplementedError


# %% check="kv_bytes"
check("attention/kv_bytes", kv_bytes)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def kv_bytes(n_layers, n_kv_heads, d_head, tokens, batch, bytes_per_number):
#     return 2 * n_layers * n_kv_heads * d_head * tokens * batch * bytes_per_number
# ```
#
# </details>

# %% [markdown]
# ## 5. The block, and a model
#
# **Why.** Attention moves information between positions; the feed-forward layer transforms it at each position; both *add* to a residual stream, and each reads the stream through a norm. That is a block of the Llama family, and a model is an embedding, a stack of blocks, a norm and an output matrix.
#
# **Exercise 7.** RMSNorm: divide by the root mean square over the last axis, times a gain. The mean square is taken in float32, whatever the input's precision.


# %% exercise="rms_norm"
def my_rms_norm(x, weight, eps):
    """x (..., D), weight (D,) -> (..., D) in x's dtype."""
    raise NotImplementedError


# %% check="rms_norm"
check("attention/rms_norm", my_rms_norm)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_rms_norm(x, weight, eps):
#     x32 = x.float()
#     return weight * (x32 * torch.rsqrt(x32.pow(2).mean(dim=-1, keepdim=True) + eps)).to(x.dtype)
# ```
#
# </details>
#
# **Exercise 8.** SwiGLU: two projections to $d_{ff}$, $\mathrm{SiLU}(z) = z\,\sigma(z)$ on one of them, their product, and back. The matrices are stored as `nn.Linear` stores them, (out, in).


# %% exercise="swiglu"
def my_swiglu(x, gate, up, down):
    """x (..., D), gate and up (F, D), down (D, F) -> (..., D)."""
    raise NotImplementedError


# %% check="swiglu"
check("attention/swiglu", my_swiglu)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_swiglu(x, gate, up, down):
#     return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
# ```
#
# </details>
#
# **Exercise 9.** The block. Arguments 2 to 5 are functions of one tensor.


# %% exercise="block"
def my_block(x, attention_norm, attention, mlp_norm, mlp):
    """x (B, T, D) -> (B, T, D): the pre-norm block."""
    raise NotImplementedError


# %% check="block"
check("attention/block", my_block)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_block(x, attention_norm, attention, mlp_norm, mlp):
#     x = x + attention(attention_norm(x))
#     return x + mlp(mlp_norm(x))
# ```
#
# </details>
#
# **Run: a model.** A small one, over bytes (so that it needs no tokenizer), trained for some seconds on windows of 64 bytes of the course's corpus, and then read on windows of 256. The corpus is generated, so its entropy is known: no model that predicts a byte from the bytes before it can have a mean loss below that floor.

# %%
TRAINED_LENGTH, READ_LENGTH = 64, 256
corpus = load_corpus(CORPUS, seed=SEED, n_documents=6000)


def as_bytes(dataset):
    """All documents of a dataset as one tensor of bytes, a newline after each."""
    joined = "".join(text + "\n" for text in dataset["text"]).encode()
    return torch.frombuffer(bytearray(joined), dtype=torch.uint8).long()


text = {"train": as_bytes(corpus.train), "validation": as_bytes(corpus.validation)}
floor = None
if "bits" in corpus.train.column_names:
    floor = math.log(2) * sum(corpus.train["bits"]) / len(text["train"])  # nats per byte
    print(f"entropy of the corpus: {floor:.3f} nats per byte")
config = ModelConfig(
    vocab_size=256, context_length=READ_LENGTH, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=128
)
print(f"{len(text['train']):,} bytes of training text, {count_parameters(config):,} parameters")


def windows(split, rows, length, generator):
    """Random windows (rows, length + 1) of a split: inputs and, one byte later, targets."""
    starts = torch.randint(len(text[split]) - length, (rows, 1), generator=generator)
    return text[split][starts + torch.arange(length + 1)].to(device)


def train_on_text(seed):
    """A trained model and its losses."""
    set_seed(seed)
    model = Transformer(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in progress(range(sizes["text_steps"]), description=f"text, seed {seed}", unit="step"):
        batch = windows("train", 32, TRAINED_LENGTH, generator)
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return model, losses


@torch.no_grad()
def loss_by_position(model, length, rows=192):
    """Mean loss in nats per byte at each position of held-out windows: (length,)."""
    batch = windows("validation", rows, length, torch.Generator().manual_seed(SEED))
    losses = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
    return losses.view(rows, length).mean(0).cpu()


# %% [markdown]
# **Predict.** The model has seen positions 0 to 63. At position 200 it has more context than ever in training. Is the loss there lower, equal, or higher than at position 60?

# %%
trained = [train_on_text(seed) for seed in seeds]
by_position = torch.stack([loss_by_position(model, READ_LENGTH) for model, _ in trained])  # (seeds, T)
BIN = 8
binned = by_position.view(len(seeds), -1, BIN).mean(-1)  # (seeds, T / BIN)
centers = [BIN * (i + 0.5) for i in range(binned.shape[1])]
figure = plotting.lines(
    {f"seed {seed}": (centers, row.tolist()) for seed, row in zip(seeds, binned, strict=True)},
    xlabel="position in the window",
    ylabel="loss, nats per byte",
    title=f"Trained on {TRAINED_LENGTH} positions, read on {READ_LENGTH}",
)
plotting.show(
    figure,
    alt="Held-out loss against position for each seed: it falls over the first positions, is level through the trained "
    "length of 64 and somewhat beyond, and then climbs by several nats.",
)
within = by_position[:, TRAINED_LENGTH // 2 : TRAINED_LENGTH].mean(1).tolist()
beyond = by_position[:, READ_LENGTH - TRAINED_LENGTH :].mean(1).tolist()
print(f"positions {TRAINED_LENGTH // 2} to {TRAINED_LENGTH - 1}: {seed_interval(within):.2f} nats per byte")
print(f"positions {READ_LENGTH - TRAINED_LENGTH} to {READ_LENGTH - 1}: {seed_interval(beyond):.2f}")
results["length"] = {
    "trained": TRAINED_LENGTH, "centers": centers, "loss": binned.tolist(), "within": within, "beyond": beyond,
    "floor": floor, "uniform": math.log(256), "parameters": count_parameters(config), "steps": sizes["text_steps"],
}  # fmt: skip

# %% [markdown]
# **Read the result.** Relative positions do not extrapolate by themselves. Scores depend on the distance between query and key only, as section 3 showed, but distances above 63 never occurred in training. Some of them come free, as long as the angles are not too unlike those of training; then heads that put their weight well at all distances they know put it anywhere, and each seed breaks in its own way. A context length is trained, or extended on purpose, never had for nothing.


# %%
def continuation(model, prompt, n_bytes=90):
    """The most probable bytes after a prompt, one at a time."""
    tokens = torch.tensor([list(prompt.encode())], device=device)
    with torch.no_grad():
        for _ in range(n_bytes):
            context = tokens[:, -TRAINED_LENGTH:]
            tokens = torch.cat((tokens, model(context)[:, -1:].argmax(-1)), dim=1)
    return bytes(tokens[0].tolist()).decode(errors="replace")


prompt = max(corpus.validation["text"][:50], key=len)[:40]
print(repr(continuation(trained[0][0], prompt)))

# %% [markdown]
# ## The same with the library
#
# `torch` has attention as one fused function, which never stores the (Tq, Tk) weights, and takes grouped heads as they are. `transformers` has the model. Written out, fused, and grouped:


# %%
def largest_difference(a, b):
    """Largest absolute difference of two tensors, a float."""
    return (a - b).abs().max().item()


generator = torch.Generator().manual_seed(SEED)
q = torch.randn(2, 8, 256, 32, generator=generator)
k, v = torch.randn(2, 2, 2, 256, 32, generator=generator)
written = scaled_dot_product_attention(q, repeat_kv(k, 4), repeat_kv(v, 4), causal_mask(256, 256))
fused = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
fused_error = largest_difference(written, fused)
print(f"largest difference to torch's kernel: {fused_error:.1e}")


def milliseconds(function, repeats=5):
    """Best time of some calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function().sum().item()
        times.append(1e3 * (time.perf_counter() - start))
    return min(times)


print("tokens   written out   fused   weights that only the first stores")
kernel_times = {}
for length in (256, 1024, 2048):
    q, k, v = torch.randn(3, 1, 8, length, 64, device=device)
    mask = causal_mask(length, length, device)
    slow = milliseconds(lambda q=q, k=k, v=v, mask=mask: scaled_dot_product_attention(q, k, v, mask))
    fast = milliseconds(lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    kernel_times[length] = {"written": slow, "fused": fast}
    print(f"{length:>6} {slow:>10.1f} ms {fast:>5.1f} ms {4 * 8 * length**2 / 2**20:>10.0f} MiB")
results["kernel_ms"] = kernel_times

# %% [markdown]
# The model that was just trained, written to a folder and opened by `transformers`; and the parameter counts of published models, from `transformers`' own code, without downloading a weight (on torch's `meta` device a tensor has a shape and no storage).

# %%
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from llmcourse.models.pretrained import config_to_hub

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
model = trained[0][0].cpu().eval()
with tempfile.TemporaryDirectory() as folder:
    save_pretrained(model, folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
tokens = windows("validation", 4, 128, torch.Generator().manual_seed(SEED)).cpu()
with torch.no_grad():
    logits = model(tokens)
    parity = largest_difference(logits, theirs(tokens).logits) / logits.abs().max().item()
print(
    f"{type(theirs).__name__}: {logits.numel():,} logits, largest difference {parity:.1e} of the largest logit"
)

counts_agree = {}
for name, published_config in published.items():
    settings = {
        key: value
        for key, value in config_to_hub(published_config).items()
        if key not in ("architectures", "model_type")
    }
    kind, settings_kind = (
        (Qwen3ForCausalLM, Qwen3Config) if published_config.qk_norm else (LlamaForCausalLM, LlamaConfig)
    )
    with torch.device("meta"):
        n = sum(p.numel() for p in kind(settings_kind(**settings)).parameters())
    counts_agree[name] = n == count_parameters(published_config)
    print(
        f"{name:>14}: {n:>14,} parameters in transformers, {count_parameters(published_config):>14,} by our count"
    )

# %% [markdown]
# ## Measured results
#
# What this lab claims. Each line is computed from the runs above, for every seed, and the lab stops if one does not hold.

# %%
# NBVAL_CHECK_OUTPUT
smallest, largest = min(sizes["pairs"]), max(sizes["pairs"])
recent = [
    by_distance[0] - statistics.fmean(by_distance[middle // 2 :])
    for by_distance in recall["tanh RNN"][middle]
]
gru_loss = [
    few - many
    for few, many in zip(mean_accuracy("GRU", smallest), mean_accuracy("GRU", largest), strict=True)
]
claim(
    "recall-attention",
    all(min(mean_accuracy("attention", n)) >= 0.99 for n in sizes["pairs"]),
    "one attention layer recalls at least 99 % at every number of pairs, in every seed",
)
claim(
    "recall-recency",
    min(recent) > 0.02,
    "the tanh RNN recalls the last pair better than the older half, in every seed",
)
claim(
    "recall-capacity",
    min(gru_loss) > 0.05,
    "the GRU loses over 5 points from the fewest to the most pairs, in every seed",
)
claim(
    "gradient",
    all(gradients[name][63] < 1e-6 * gradients[name][0] for name in ("tanh RNN", "GRU"))
    and gradients["attention"][1:].min() > 0.3 * gradients["attention"][1:].max(),
    "over 63 steps the recurrent gradients fall by a factor of a million or more; attention's stays within a factor of 3",
)
claim(
    "scale",
    all(abs(row[0] - 1) < 0.05 for row in softmax["scaled"])
    and softmax["unscaled"][-1][1] < 0.2 < softmax["scaled"][-1][1],
    "scaled scores have standard deviation 1 within 5 % at every width; unscaled ones lose 80 % of the entropy at width 512",
)
claim(
    "rope-relative",
    errors[2] < 1e-3 and layout_error < 1e-4,
    "rotary scores depend on the distance only, in both layouts",
)
claim(
    "mask",
    outputs_that_move(causal_mask(12, 12)) == [11],
    "with the mask, only the last output depends on the last key",
)
claim("kernel", fused_error < 1e-5, "written-out grouped attention equals torch's fused kernel to 1e-5")
claim(
    "parity",
    parity < 1e-5,
    "transformers opens the trained model and gives the same logits, to 1e-5 of the largest",
)
claim(
    "counts",
    all(counts_agree.values()),
    "parameter counts of four published models equal those of transformers",
)
claim(
    "kv-time",
    reading[1]["seconds"] < 0.5 * reading[16]["seconds"],
    "a step that reads one key head takes less than half the time of one that reads sixteen",
)
claim(
    "length",
    all(far > near + 0.3 for near, far in zip(within, beyond, strict=True)),
    "beyond the trained length the loss is higher by 0.3 nats per byte or more, in every seed",
)

# %% [markdown]
# ## Break it
#
# Forget the mask. It takes one missing argument: here, `Attention` calls the written-out attention without its `mask` in the place of `causal_attention`. The shapes are right, nothing warns, and the loss looks like a triumph.


# %%
def unmasked_attention(q, k, v):
    """`causal_attention` with its mask forgotten."""
    groups = q.shape[1] // k.shape[1]
    return scaled_dot_product_attention(q, repeat_kv(k, groups), repeat_kv(v, groups))


forgotten_mask = mock.patch("llmcourse.models.attention.causal_attention", unmasked_attention)
with forgotten_mask:
    leaking = [train_on_text(seed) for seed in seeds]
steps = list(range(sizes["text_steps"]))
curves = {"with the mask": trained, "without the mask": leaking}
losses = {
    name: list(zip(*[one for _, one in models], strict=True)) for name, models in curves.items()
}  # by step
figure = plotting.lines(
    {name: (steps, [statistics.fmean(row) for row in rows]) for name, rows in losses.items()},
    bands={name: ([min(row) for row in rows], [max(row) for row in rows]) for name, rows in losses.items()},
    horizontal={} if floor is None else {"entropy of the corpus": floor},
    xlabel="step",
    ylabel="training loss, nats per byte",
    title=f"The forgotten mask: mean and range of {len(seeds)} seeds",
    logy=True,
)
plotting.show(
    figure,
    alt="Training loss against step on a logarithmic axis: with the mask it levels off above the entropy of the corpus; "
    "without the mask it falls far below that line.",
)
last = slice(-20, None)
final = {
    "masked": [statistics.fmean(losses[last]) for _, losses in trained],
    "unmasked": [statistics.fmean(losses[last]) for _, losses in leaking],
}
used_honestly = [loss_by_position(model.to(device), TRAINED_LENGTH).mean().item() for model, _ in leaking]
print(f"training loss, last 20 steps, with the mask:    {seed_interval(final['masked']):.3f}")
print(f"                              without the mask: {seed_interval(final['unmasked']):.3f}")
if floor is not None:
    print(f"entropy of the corpus:                          {floor:.3f}")
print(f"the leaking models, read with the mask:         {seed_interval(used_honestly):.3f}")
with forgotten_mask:
    print("what it writes:", repr(continuation(leaking[0][0], prompt)))
results["leak"] = {
    "masked": [one for _, one in trained], "unmasked": [one for _, one in leaking],
    "final": final, "read_with_mask": used_honestly, "floor": floor, "uniform": math.log(256),
}  # fmt: skip

# %% [markdown]
# **Diagnosis.** Three signs, in the order in which you would meet them.
#
# 1. *The loss is too good.* Position $t$ reads token $t+1$ from its own input, so the model learns to copy, and the loss goes to zero. Here the floor is known, and a loss below it is proof; on real text, a loss far below that of larger models on the same data should make you suspicious before it makes you happy.
# 2. *Generation is nonsense.* At generation time there is no token $t+1$ to copy, so what was learned is of no use. With the mask put back, the loss is nats above that of the honest model; compare it with $\log 256 = 5.55$, the loss of a model that knows nothing.
# 3. *The causality test fails.* This is the test to keep in a test suite: change the last token, and compare all earlier logits.


# %%
@torch.no_grad()
def earlier_logits_move(model):
    """Whether logits before the last position depend on the last token."""
    tokens = windows("validation", 4, 31, torch.Generator().manual_seed(SEED))
    other = tokens.clone()
    other[:, -1] = (other[:, -1] + 1) % 256
    return largest_difference(model(tokens)[:, :-1], model(other)[:, :-1]) > 0


leaks = {"with the mask": [earlier_logits_move(model.to(device)) for model, _ in trained]}
with forgotten_mask:
    leaks["without the mask"] = [earlier_logits_move(model.to(device)) for model, _ in leaking]
print(leaks)

# %%
# NBVAL_CHECK_OUTPUT
claim(
    "leak",
    max(final["unmasked"]) < (floor or 0.5 * min(final["masked"]))
    and min(used_honestly) > max(final["masked"]) + 1,
    "without the mask the loss falls below what any causal model can reach, and is useless once the mask is back",
)
claim(
    "causality-test",
    all(leaks["without the mask"]) and not any(leaks["with the mask"]),
    "the causality test passes every masked model and catches every unmasked one",
)

# %%
_ = store_results("attention", results)

# %% [markdown]
# ## Takeaways
#
# * A recurrent state compresses, attention keeps: attention pays in memory (the KV cache) and in pairs of positions for recall that does not depend on distance.
# * $1/\sqrt{d_h}$ keeps the variance of the scores at 1, so that the softmax starts soft and has a gradient at any head width.
# * The mask acts on scores, before the softmax. Its absence does not raise an error; it lowers the loss. Test causality by changing the last token.
# * Rotary scores depend on distance only, and still do not extrapolate to distances that training has not shown.
# * Cache bytes = 2 × layers × key heads × head width × tokens × batch × bytes per number. Query heads are not in it.
# * A Llama block is two lines: $x \mathrel{+}= \mathrm{attention}(\mathrm{norm}(x))$, $x \mathrel{+}= \mathrm{SwiGLU}(\mathrm{norm}(x))$.

# %% [markdown]
# ## Next
#
# The chapter, [Sequence models and attention](../book/foundations/attention.md), derives what was measured here and has further exercises with solutions. Lab 04 trains the same architecture on tokens instead of bytes, for minutes instead of seconds, and compares its loss with the entropy floor.
