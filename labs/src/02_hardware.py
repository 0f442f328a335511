# %% [markdown]
# # Lab 02 · Hardware and compute
#
# [Open in Colab]({{colab}}) · [Source of this lab]({{repository}}/blob/{{branch}}/labs/src/02_hardware.py)
#
# | | |
# |---|---|
# | **Chapter** | [02 Hardware and compute](../book/foundations/hardware.md) |
# | **Hardware** | CPU, 2 cores, 4 GiB of memory; a GPU is used with `PRESET = "gpu"` |
# | **Minutes** | 3 to execute, of which half a minute is `torch.compile`; 2 to 3 hours with the exercises |
# | **You will build** | the counts of parameters, FLOPs and bytes of any decoder; the roofline of the machine you are on; a prediction of memory and of step time, checked against measurements; the bill of a run |
# | **What to inspect** | which layers lie left of the ridge; predicted against measured peak memory; the profiler's top operators before and after each change; a bandwidth that cannot be |

# %% [markdown]
# ## Setup
#
# `PRESET = "gpu"` takes the larger base model of the course and the GPU. The weights are random and nothing is learned: time and memory depend on shapes, not on values. `CORPUS` gives the text whose bytes serve as tokens (`"tinytown"`, `"python-docs"`, `"files:*.txt"`, `"hub:<name>"`); every random number follows from `SEED`.
#
# On a CPU this lab uses one core, and its results are those of one core: other programs then disturb its timings little.

# %% tags=["parameters"]
PRESET = "cpu"
CORPUS = "tinytown"
SEED = 0

# %%
import gzip
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch.profiler's own notes; read when torch is imported

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from llmcourse import accounting, plotting, profiling, roofline
from llmcourse.checks import check, claim
from llmcourse.data.sources import load_corpus
from llmcourse.labs import store_results
from llmcourse.models import Transformer
from llmcourse.models.attention import causal_mask, repeat_kv, scaled_dot_product_attention
from llmcourse.runtime import describe_machine, has_fast_bf16, pick_device, progress, set_seed, synchronize
from llmcourse.training.optimizers import build_optimizers
from llmcourse.training.pretraining import next_token_loss, preset

SIZES = {
    "cpu": {"batch": 8, "memory_batches": (4, 8, 16, 32), "rounds": 6, "matmul": (32, 64, 128, 256, 512, 1024)},
    "gpu": {"batch": 16, "memory_batches": (4, 8, 16), "rounds": 10, "matmul": (128, 256, 512, 1024, 2048, 4096, 8192)},
}  # fmt: skip
if PRESET not in SIZES:
    raise ValueError(f"PRESET={PRESET!r}: choose one of {', '.join(SIZES)}")
sizes = SIZES[PRESET]
device = pick_device("auto" if PRESET == "gpu" else "cpu")
config, BATCH = preset(PRESET).model, sizes["batch"]  # the shape of the course's base model
T = config.context_length
fast_bf16 = has_fast_bf16(device)
if device.type == "cpu":
    torch.set_num_threads(1)
set_seed(SEED)
text = "\n".join(load_corpus(CORPUS, seed=SEED, n_documents=2000).train["text"]).encode()
print(json.dumps(describe_machine()))
results = {"preset": PRESET, "machine": describe_machine(), "batch": BATCH, "context": T}


def draw_batch(batch):
    """Rows of the corpus' bytes as tokens (B, T) with their targets, the same for every caller."""
    starts = np.random.default_rng(SEED).integers(len(text) - T - 1, size=batch)
    rows = torch.tensor([list(text[start : start + T + 1]) for start in starts])
    pair = {"tokens": rows[:, :-1], "targets": rows[:, 1:]}
    return {name: value.contiguous().to(device) for name, value in pair.items()}


# %% [markdown]
# ## Objectives
#
# After this lab you can
#
# 1. count the parameters and FLOPs of any decoder from its configuration, and say when $6ND$ is good enough;
# 2. measure a machine's two ceilings and say of any layer which one it meets;
# 3. predict the peak memory of a training run within a tenth before it starts;
# 4. choose a number format by what it must hold, and show what goes wrong with the other;
# 5. take the utilization of a training step apart, predict what a change will bring, and check the prediction;
# 6. write the bill of a run: device hours, energy, money.

# %% [markdown]
# ## 1. Counting
#
# **Why.** Everything that a run costs follows from two counts, and both come from a dozen numbers in a configuration. Counting is free and exact, so it comes before any measurement.
#
# **Exercise 1.** Parameters of one block of a Llama: attention with grouped key heads, SwiGLU, two RMSNorms, no biases.
#
# <details><summary>Hint</summary>
#
# Queries and the output projection have `n_heads` heads, keys and values `n_kv_heads`. `n_heads * d_head` need not be `d_model`.
#
# </details>


# %% exercise="block_parameters"
def my_block_parameters(d_model, n_heads, n_kv_heads, d_head, d_ff):
    """Parameters of one block."""
    raise NotImplementedError


# %% check="block_parameters"
check("hardware/block_parameters", my_block_parameters)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_block_parameters(d_model, n_heads, n_kv_heads, d_head, d_ff):
#     attention = d_model * d_head * (2 * n_heads + 2 * n_kv_heads)
#     return attention + 3 * d_model * d_ff + 2 * d_model
# ```
#
# </details>
#
# **Exercise 2.** FLOPs of a forward pass. Each weight that multiplies a token costs two; attention adds two products that have no weights.
#
# <details><summary>Hint</summary>
#
# A pair of positions costs $2 d_h$ for its score and $2 d_h$ for its share of the weighted values, in each head of each layer. How many pairs does the causal mask leave?
#
# </details>


# %% exercise="forward_flops"
def my_forward_flops(weights, n_layers, n_heads, d_head, n_tokens, causal):
    """weights: matrix entries that multiply each token, head included. causal=False counts all T x T pairs."""
    raise NotImplementedError


# %% check="forward_flops"
check("hardware/forward_flops", my_forward_flops)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_forward_flops(weights, n_layers, n_heads, d_head, n_tokens, causal):
#     pairs = n_tokens * (n_tokens + 1) // 2 if causal else n_tokens**2
#     return 2 * weights * n_tokens + n_layers * 4 * n_heads * d_head * pairs
# ```
#
# </details>
#
# **Exercise 3.** The rule of thumb for training, $C \approx 6ND$. The question is what belongs to $N$.
#
# <details><summary>Hint</summary>
#
# Does a tied head multiply? Does looking up an embedding?
#
# </details>


# %% exercise="six_nd"
def my_six_nd(blocks, embedding, tied, n_tokens):
    """blocks: parameters of all blocks; embedding: entries of the embedding matrix, the head has as many."""
    raise NotImplementedError


# %% check="six_nd"
check("hardware/six_nd", my_six_nd)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_six_nd(blocks, embedding, tied, n_tokens):
#     return 6.0 * (blocks + embedding) * n_tokens  # the head multiplies, tied or not; the look-up never does
# ```
#
# </details>
#
# **Predict.** The base model of this course has about a million parameters and a context of 256, Llama-3.1-8B eight billion and up to 131 072. For which of these is $6ND$ off by more than a tenth, and in which direction?

# %%
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
}
LLAMA_8B = {"model_type": "llama", "vocab_size": 128_256, "max_position_embeddings": 131_072, "hidden_size": 4096, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14_336, "tie_word_embeddings": False}  # fmt: skip
QWEN_06B = {"model_type": "qwen3", "vocab_size": 151_936, "max_position_embeddings": 40_960, "hidden_size": 1024, "num_hidden_layers": 28,
            "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072, "tie_word_embeddings": True}  # fmt: skip
MIXTRAL = {"model_type": "mixtral", "vocab_size": 32_000, "max_position_embeddings": 32_768, "hidden_size": 4096, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14_336, "num_local_experts": 8,
           "num_experts_per_tok": 2, "tie_word_embeddings": False}  # fmt: skip
MODELS = {
    "course base": config,
    "GPT-2 124M": GPT2,
    "Qwen3-0.6B": QWEN_06B,
    "Llama-3.1-8B": LLAMA_8B,
    "Mixtral-8x7B": MIXTRAL,
}
results["models"] = {}
print(f"{'model':>14} {'parameters':>15} {'active':>15}   error of 6ND at context  " + "".join(f"{c:>9,}" for c in (256, 1024, 8192, 131_072)))  # fmt: skip
for name, description in MODELS.items():
    errors = [accounting.six_nd_error(description, context) for context in (256, 1024, 8192, 131_072)]
    row = {"parameters": accounting.count_parameters(description), "active": accounting.active_parameters(description), "six_nd_errors": errors}  # fmt: skip
    results["models"][name] = row
    print(f"{name:>14} {row['parameters']:>15,} {row['active']:>15,}   {'':>24} " + "".join(f"{error:>9.0%}" for error in errors))  # fmt: skip
parts = {name: count for name, count in accounting.parameters_by_part(config).items() if count}
base_flops = accounting.training_flops_per_token(config, T)
print(f"\ncourse base: {parts}; {base_flops / 1e6:.2f} MFLOPs to train on one token")
results["base"] = {
    "parts": parts,
    "training_flops_per_token": base_flops,
    "six_nd_error": accounting.six_nd_error(config, T),
}

# %% [markdown]
# **Read the result.** A negative error means that $6ND$ is too small. Attention's own products grow with the context and are not in $N$; under the causal mask, as here, they are small only while $T \ll 12d$ ($6d$ if all $T^2$ pairs are counted). In the other direction, an untied embedding counts in $N$ and costs nothing (Llama-3.1-8B at short contexts). For the small model of this course neither is negligible, which is why the course counts exactly.

# %% [markdown]
# ## 2. The roofline of this machine
#
# **Why.** A kernel has to do arithmetic and to move bytes, and a machine does both at once, each at its own rate. The slower of the two decides. Two measurements (bytes per second, FLOP/s) and one number a layer (FLOPs per byte) then say what any layer can reach at best.
#
# **Exercise 4.** FLOPs per byte of a matrix product.
#
# <details><summary>Hint</summary>
#
# Each operand is read once, the result is written once.
#
# </details>


# %% exercise="intensity"
def my_intensity(m, k, n, bytes_per_value):
    """FLOPs per byte of an (m, k) x (k, n) product."""
    raise NotImplementedError


# %% check="intensity"
check("hardware/intensity", my_intensity)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_intensity(m, k, n, bytes_per_value):
#     return 2 * m * k * n / (bytes_per_value * (m * k + k * n + m * n))
# ```
#
# </details>
#
# **Exercise 5.** The least time of a kernel.
#
# <details><summary>Hint</summary>
#
# It is done when both its arithmetic and its transfers are.
#
# </details>


# %% exercise="roofline"
def my_roofline_seconds(flops, n_bytes, peak_flops, bandwidth):
    """Least seconds of a kernel of `flops` FLOPs that moves `n_bytes` bytes."""
    raise NotImplementedError


# %% check="roofline"
check("hardware/roofline", my_roofline_seconds)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_roofline_seconds(flops, n_bytes, peak_flops, bandwidth):
#     return max(flops / peak_flops, n_bytes / bandwidth)
# ```
#
# </details>
#
# **Predict.** How much faster than in fp32 does this machine multiply matrices in bfloat16? And does a product of 64 × 64 matrices reach the rate of a large one?

# %%
DTYPES = ("fp32", "bf16")
bandwidth = roofline.measure_bandwidth(device, seconds=0.5)
rates = roofline.matmul_rates(device, DTYPES, sizes["matmul"], seconds=0.1)
large = roofline.measure_roofline(device, DTYPES, seconds=0.5)
peak = {name: max(large.peak[name], *rates[name].values()) for name in DTYPES}  # a ceiling is the best seen
roof = roofline.Roofline(bandwidth=bandwidth["triad"], peak=peak)
print(f"bandwidth: copy {bandwidth['copy'] / 1e9:.1f}, triad {bandwidth['triad'] / 1e9:.1f} GB/s")
print("matrix products, GFLOP/s:")
print(f"{'size':>6}" + "".join(f"{size:>9,}" for size in sizes["matmul"]) + f"{'largest':>9}")
for name in DTYPES:
    print(f"{name:>6}" + "".join(f"{rates[name][size] / 1e9:>9.0f}" for size in sizes["matmul"])
          + f"{large.peak[name] / 1e9:>9.0f}   ridge at {roof.ridge(name):.0f} FLOPs per byte")  # fmt: skip
results["roofline"] = {
    "bandwidth": bandwidth,
    "matmul": {name: {str(size): rate for size, rate in rates[name].items()} for name in DTYPES},
    "peak": peak,
    "ridge": {name: roof.ridge(name) for name in DTYPES},
}

# %% [markdown]
# **Run: the layers on it.** The same model in three phases. In training and prefill a weight that was read serves all tokens of the batch; in decoding it serves one token a row.

# %%
PHASES = {"training": BATCH, "prefill": BATCH, "decode": 1}
placed = {
    phase: accounting.layer_costs(config, rows, T, 2, phase, fused_attention=device.type == "cuda")
    for phase, rows in PHASES.items()
}
for phase, layers in placed.items():
    least = {cost.name: roof.seconds(cost.flops, cost.bytes, "bf16") for cost in layers}
    print(f"{phase}, batch {PHASES[phase]} x {T}: at least {1e3 * sum(least.values()):.3f} ms")
    for cost in layers:
        bound = "arithmetic" if cost.intensity > roof.ridge("bf16") else "memory"
        print(f"{cost.name:>18} {cost.flops / 1e9:>9.4f} GFLOPs {cost.bytes / 1e6:>9.3f} MB {cost.intensity:>8.1f} FLOPs/byte"
              f" {least[cost.name] / sum(least.values()):>6.0%} of the time, bound by {bound}")  # fmt: skip
results["layers"] = {
    phase: [{"name": c.name, "flops": c.flops, "bytes": c.bytes, "intensity": c.intensity} for c in layers]
    for phase, layers in placed.items()
}

# %%
products = {p.name: p for p in accounting.matrix_products(config, BATCH, T)}  # the last of each name
measured = []
for product in products.values():
    seconds = roofline.product_seconds(product, "bf16", device)["forward"] * product.count
    measured.append(
        {
            "name": product.name,
            "intensity": product.flops / (2 * product.values),
            "rate": product.flops / seconds,
        }
    )
measured.sort(key=lambda row: row["intensity"])
series = {}
for name in DTYPES:
    corners = [0.1, roof.ridge(name), 30 * roof.ridge("bf16")]
    series[f"roof {name}"] = (corners, [roof.attainable(x, name) / 1e9 for x in corners])
for phase in ("training", "decode"):
    points = sorted(cost.intensity for cost in placed[phase] if cost.flops)  # a look-up does no arithmetic
    series[f"{phase}: best possible"] = (points, [roof.attainable(x, "bf16") / 1e9 for x in points])
series["products, measured"] = (
    [row["intensity"] for row in measured],
    [row["rate"] / 1e9 for row in measured],
)
figure = plotting.lines(
    series, xlabel="FLOPs per byte", ylabel="GFLOP/s", title="Layers of the base model on this machine's roofline",
    logx=True, logy=True, markers=True,
)  # fmt: skip
for line in figure.axes[0].lines[len(DTYPES) :]:
    line.set_linestyle("none")
plotting.show(
    figure,
    alt="Log-log roofline: two roofs, bfloat16 above fp32, rising to a ridge and flat behind it. Layers in decoding lie far left on the "
    "slope, those of training near and right of the ridge; measured products lie below the roof.",
)
for row in measured:
    print(f"{row['name']:>16}: {row['intensity']:>6.1f} FLOPs/byte, {row['rate'] / 1e9:>6.0f} GFLOP/s measured, "
          f"{row['rate'] / roof.attainable(row['intensity'], 'bf16'):.0%} of what the roof allows")  # fmt: skip
results["products"] = measured

# %% [markdown]
# **Read the result.** Decoding lies at about one FLOP per byte: each weight is read for a single multiplication and addition. No faster arithmetic helps it; a larger batch does, because it moves every weight's point to the right. Training's products lie beyond the ridge; what is left of a step (norms, loss, optimizer) lies far before it and costs time without doing counted arithmetic. The measured products lie below the roof, those of attention farthest: with one side of only 32 they are too small to fill the machine, which the roofline does not know. On many cores or a GPU that gap is far wider. The model has two ceilings, a real machine has more.

# %% [markdown]
# ## 3. Memory
#
# **Why.** Whether a run fits is known before it starts, from the same configuration. There are things that are there all the time (weights, gradients, optimizer) and things that grow with the batch (activations).
#
# **Exercise 6.** Bytes that are there all the time, in the classic mixed precision: 16-bit weights and gradients, 32-bit master weights and optimizer states.
#
# <details><summary>Hint</summary>
#
# AdamW keeps two numbers a parameter, momentum one, plain SGD none.
#
# </details>


# %% exercise="state_bytes"
def my_state_bytes(n_parameters, optimizer):
    """optimizer: "sgd", "momentum" or "adamw"."""
    raise NotImplementedError


# %% check="state_bytes"
check("hardware/state_bytes", my_state_bytes)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_state_bytes(n_parameters, optimizer):
#     moments = {"sgd": 0, "momentum": 1, "adamw": 2}[optimizer]
#     return (2 + 2 + 4 + 4 * moments) * n_parameters
# ```
#
# </details>
#
# **Exercise 7.** In generation the cache of keys and values takes the place of the activations. How many sequences fit beside the weights?
#
# <details><summary>Hint</summary>
#
# Keys and values, of each layer, of each key head: 2 bytes a channel and token. A row fits or it does not.
#
# </details>


# %% exercise="cache_rows"
def my_cache_rows(memory, weight_bytes, n_layers, n_heads, n_kv_heads, d_head, n_tokens):
    """Rows of n_tokens tokens whose 16-bit cache fits into `memory` bytes beside the weights."""
    raise NotImplementedError


# %% check="cache_rows"
check("hardware/cache_rows", my_cache_rows)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_cache_rows(memory, weight_bytes, n_layers, n_heads, n_kv_heads, d_head, n_tokens):
#     row = 2 * n_layers * n_kv_heads * d_head * n_tokens * 2
#     return max(0, memory - weight_bytes) // row
# ```
#
# </details>
#
# **Predict.** The base model has a million parameters, 4 MB. What will its training with 32 rows of 256 tokens need: 20 MB, 100 MB, 400 MB?
#
# Each batch size runs in a fresh process. What it holds before (interpreter, libraries, their buffers) is measured there after a warm-up with one row, and added to the prediction. On the CPU, the C library's allocator is told to hand large blocks back when they are freed; left alone it keeps many of them, as the last column shows.

# %%
PROGRAM = """
import gc, json, sys
import psutil, torch
from torch.utils.checkpoint import checkpoint
from llmcourse.models import ModelConfig, Transformer
from llmcourse.runtime import PeakMemory
from llmcourse.training.optimizers import build_optimizers
from llmcourse.training.pretraining import next_token_loss

config, options = ModelConfig(**json.loads(sys.argv[1])), json.loads(sys.argv[2])
device = torch.device(options["device"])
torch.set_num_threads(1)


def train(batch, steps):
    torch.manual_seed(options["seed"])
    model = Transformer(config).to(device)
    if options["checkpointing"] == "full":
        for block in model.blocks:
            block.forward = (lambda inner: lambda *a: checkpoint(inner, *a, use_reentrant=False))(block.forward)
    optimizers = build_optimizers(model, "muon", lr=1e-3)
    with PeakMemory(device, interval=0.001) as memory:
        for _ in range(steps):
            tokens = torch.randint(config.vocab_size, (batch, config.context_length), device=device)
            with torch.autocast(device.type, dtype=torch.bfloat16):
                total, _, _ = next_token_loss(model, {"tokens": tokens, "targets": tokens})
            total.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    return memory.bytes


train(1, 2)
gc.collect()
baseline = torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
print(json.dumps({"baseline": baseline, "peak": train(options["batch"], 3)}))
"""


def measured_peak(batch, checkpointing="none", hand_back=True):
    """Baseline and peak bytes of a few training steps in a process of their own."""
    names = ("vocab_size", "context_length", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff")
    arguments = (
        {name: getattr(config, name) for name in names},
        {"batch": batch, "checkpointing": checkpointing, "device": device.type, "seed": SEED},
    )
    environment = os.environ | ({"MALLOC_MMAP_THRESHOLD_": "65536"} if hand_back else {})
    command = [sys.executable, "-c", PROGRAM, *(json.dumps(part) for part in arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the process with batch {batch} failed: {done.stderr[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


attention = "fused" if device.type == "cuda" else "blocked"
runs = [(batch, "none", True) for batch in sizes["memory_batches"]]
runs += [(max(sizes["memory_batches"]), "full", True), (max(sizes["memory_batches"]), "none", False)]
workers = 1 if device.type == "cuda" else 2
with ThreadPoolExecutor(workers) as pool, progress(total=len(runs), description="memory", unit="run") as bar:
    found = []
    for run in pool.map(lambda run: measured_peak(*run), runs):
        found.append(run)
        bar.update()

# %%
MiB = 2**20
results["memory"] = []
print("batch  checkpointing    baseline   predicted    measured   ratio   parts above the baseline, MiB")
for (batch, checkpointing, hand_back), run in zip(runs, found, strict=True):
    estimate = accounting.peak_memory(
        config,
        batch,
        T,
        optimizer="muon",
        precision="bf16",
        attention=attention,
        checkpointing=checkpointing,
        baseline=run["baseline"],
    )
    row = {"batch": batch, "checkpointing": checkpointing, "hand_back": hand_back, "predicted": estimate.total, "measured": run["peak"]}  # fmt: skip
    row |= {"baseline": run["baseline"], "parts": estimate.parts, "ratio": estimate.total / run["peak"]}
    results["memory"].append(row)
    inside = {
        name: round(size / MiB, 1) for name, size in row["parts"].items() if name != "baseline" and size > 0
    }
    note = "" if hand_back else "   (allocator left alone)"
    print(f"{batch:>5} {checkpointing:>14} {run['baseline'] / MiB:>8.0f} MiB {row['predicted'] / MiB:>8.0f} MiB"
          f" {row['measured'] / MiB:>8.0f} MiB {row['ratio']:>7.2f}   {inside}{note}")  # fmt: skip
plain = [row for row in results["memory"] if row["checkpointing"] == "none" and row["hand_back"]]
figure = plotting.lines(
    {
        kind: ([row["batch"] for row in plain], [row[kind] / MiB for row in plain])
        for kind in ("predicted", "measured")
    },
    xlabel="rows of the batch", ylabel="peak, MiB", title="Peak memory of training the base model", markers=True,
    horizontal={"before training": plain[0]["baseline"] / MiB},
)  # fmt: skip
plotting.show(
    figure,
    alt="Peak memory against batch size: predicted and measured lines nearly coincide and rise linearly.",
)

# %% [markdown]
# **Read the result.** The states of the million parameters are a rounding error; the activations of the batch are everything, and they are linear in its rows. Checkpointing keeps only the inputs of the blocks and computes the rest a second time. Its prediction errs upwards: it lets the inside of a block and the gradients of the logits live at the same moment, and they miss each other. The last row of the table is the same run with the allocator left to itself: freed blocks are kept for later, in pieces that do not always fit. On a GPU the same thing is called *reserved* memory, and it is why a run can fail for lack of memory with gigabytes free.
#
# **Run: the timeline of a step.** The profiler reports each allocation.


# %%
def make_step(
    precision="fp32", kernel="ours", compiled=False, checkpointing=False, batch=BATCH, optimizer="muon"
):
    """One training step of a fresh model as a function without arguments: loss, backward, clipping, update."""
    set_seed(SEED)
    with torch.device(device):
        model = Transformer(config)
    if checkpointing:
        for block in model.blocks:
            block.forward = (lambda inner: lambda *args: checkpoint(inner, *args, use_reentrant=False))(
                block.forward
            )
    optimizers, parameters = build_optimizers(model, optimizer, lr=1e-3), list(model.parameters())
    rows = draw_batch(batch)
    loss = torch.compile(next_token_loss) if compiled else next_token_loss

    def step():
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            total, count, _ = loss(model, rows)
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for one in optimizers:
            one.step()
            one.zero_grad(set_to_none=True)
        return total

    def with_written_out_attention():
        with mock.patch("llmcourse.models.attention.causal_attention", written_out_attention):
            return step()

    return with_written_out_attention if kernel == "written out" else step


def written_out_attention(q, k, v):
    """All T x T scores as one tensor, keys repeated for their query heads: the formula, line by line."""
    groups, n = q.shape[1] // k.shape[1], q.shape[2]
    return scaled_dot_product_attention(
        q, repeat_kv(k, groups), repeat_kv(v, groups), causal_mask(n, n, q.device)
    )


timelines = {}
for name, checkpointing in (("plain", False), ("checkpointed", True)):
    record = profiling.profile_steps(
        make_step("bf16", checkpointing=checkpointing), warmup=1, active=1, device=device
    )
    line = record.timeline.sampled(200)
    start = line.bytes[0] if device.type == "cuda" else 0  # on CUDA what was there before is counted
    timelines[name] = profiling.MemoryTimeline(seconds=line.seconds, bytes=line.bytes - start)
figure = plotting.lines(
    {name: (1e3 * line.seconds, line.bytes / MiB) for name, line in timelines.items()},
    xlabel="milliseconds since the step began", ylabel="MiB above the start", title=f"Tensor memory during one step, batch {BATCH}",
)  # fmt: skip
plotting.show(
    figure,
    alt="Tensor memory over a training step: without checkpointing it climbs during the forward pass to a peak at the loss and falls "
    "during the backward pass; with checkpointing it climbs far less and shows one bump for each block computed again.",
)
results["timeline"] = {
    name: {"seconds": line.seconds.tolist(), "bytes": line.bytes.tolist()} for name, line in timelines.items()
}
saved = accounting.saved_activations(config, BATCH, T, precision="bf16", attention=attention)
tensors = sum(saved.values()) + accounting.loss_work_bytes(config, BATCH, T)
print({name: f"{line.peak / MiB:.0f} MiB at the peak" for name, line in timelines.items()}, f"predicted without checkpointing: {tensors / MiB:.0f} MiB")  # fmt: skip
print({name: f"{size / MiB:.1f} MiB" for name, size in saved.items()})
results["timeline"] |= {"predicted": tensors, "saved": saved}

# %% [markdown]
# ## 4. A training step, taken apart
#
# **Why.** A step of the base model, written as the formulas are, uses a fraction of the machine. The question is never "is it slow" but "which part is it, and what would it cost at best". First the formats, because the largest step comes from them.

# %%
FORMATS = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8 e4m3": torch.float8_e4m3fn,
    "fp8 e5m2": torch.float8_e5m2,
}
results["formats"] = {}
print(
    f"{'format':>9} {'bits':>5} {'largest':>9} {'smallest':>9} {'epsilon':>9} {'10 000 x 0.001, one by one':>28}"
)
for name, dtype in FORMATS.items():
    info = torch.finfo(dtype)
    total = None
    if info.bits >= 16:
        small, total = torch.tensor(1e-3, dtype=dtype), torch.zeros((), dtype=dtype)
        for _ in range(10_000):
            total = total + small
        total = total.item()
    results["formats"][name] = {
        "bits": info.bits,
        "max": info.max,
        "tiny": info.smallest_normal,
        "eps": info.eps,
        "sum": total,
    }
    shown = "" if total is None else f"{total:.4f}"
    print(
        f"{name:>9} {info.bits:>5} {info.max:>9.2g} {info.smallest_normal:>9.2g} {info.eps:>9.2g} {shown:>28}"
    )
ones = torch.ones(1, 16_384, dtype=torch.bfloat16, device=device)
inside_product = (ones @ ones.T).item()
print(f"16 384 ones in bfloat16, summed by a matrix product: {inside_product:,.0f}")
results["formats"]["product_of_ones"] = inside_product

# %% [markdown]
# **Read the result.** Added one by one, the sum stops growing as soon as the next summand is less than half a step of the format: in bfloat16 at 0.5, in fp16 at 4. The product gets it right: hardware multiplies in 16 bits and adds in 32. Hence mixed precision: 16 bits for what is multiplied, 32 for what is summed over time (weights, optimizer states, losses).
#
# **Exercise 8.** Utilization of a step, in the definition that everybody reports.
#
# <details><summary>Hint</summary>
#
# What the model needs, over what the device could have done. A forward pass that is computed twice to save memory is not needed.
#
# </details>


# %% exercise="mfu"
def my_mfu(forward_flops_per_token, n_tokens, seconds, peak_flops, recomputed):
    """MFU of one training step; `recomputed` says whether checkpointing ran the forward pass twice."""
    raise NotImplementedError


# %% check="mfu"
check("hardware/mfu", my_mfu)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_mfu(forward_flops_per_token, n_tokens, seconds, peak_flops, recomputed):
#     return 3 * forward_flops_per_token * n_tokens / seconds / peak_flops
# ```
#
# </details>
#
# **A prediction for any program.** Run the step on *fake* tensors, which have shapes and no values, and write down every operation: for products their shapes, for the rest the bytes in and out. Each distinct product is timed alone, in its own size. Everything else takes its bytes at the rate of an element-wise operation of that size (a tensor that fits in the cache is faster than one that does not), exponentials theirs, and each call a fixed overhead. Nothing of this runs the step. ("Blocked" is the course's own kernel on the CPU, and PyTorch's fused one, which works in blocks too, on a GPU.)


# %%
class Ledger(TorchDispatchMode):
    """Writes down each operation: shapes of matrix products, bytes of all others."""

    FREE = {
        "_unsafe_view",
        "detach",
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
    }
    EXPONENTIALS = {"_softmax", "_log_softmax", "silu", "silu_backward", "_log_softmax_backward_data"}

    def __init__(self):
        super().__init__()
        self.products, self.moved, self.calls = Counter(), defaultdict(list), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if not (function.is_view or name in self.FREE):
            inputs, outputs = (
                [x for x in tree_leaves(part) if isinstance(x, torch.Tensor)]
                for part in ((args, kwargs), out)
            )
            self.calls += 1
            if name in ("mm", "bmm"):
                self.products[tuple((tuple(x.shape), x.stride(), x.dtype) for x in inputs)] += 1
            else:
                kind = "exponentials" if name in self.EXPONENTIALS else "element-wise"
                self.moved[kind].append(sum(x.nbytes for x in inputs + outputs))
        return out


def seconds_of(function):
    """Seconds of one call. On the CPU those that this process computed, so that a busy machine does not lengthen them."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    synchronize(device)
    start = clock()
    function()
    synchronize(device)
    return clock() - start


def median_seconds(function, at_least=0.02):
    """Median time of single calls after a warm-up."""
    function()
    calls = 1 if device.type == "cpu" else 20  # a GPU works off a queue, which one call would leave empty
    times, end = [], time.perf_counter() + at_least
    while len(times) < 3 or time.perf_counter() < end:
        times.append(seconds_of(lambda: [function() for _ in range(calls)]) / calls)
    return statistics.median(times)


def element_wise_curve():
    """Bytes per second of a multiplication into a new tensor, by the size of one tensor in bytes."""
    sizes_of_one = [2**power for power in range(12, 25 if device.type == "cpu" else 31, 2)]
    rates_of_one = []
    for size in sizes_of_one:
        a, b = (torch.randn(size // 4, device=device) for _ in range(2))
        rates_of_one.append(3 * size / median_seconds(lambda a=a, b=b: a * b))
    return sizes_of_one, rates_of_one


def product_seconds(operands):
    """Time of one product of these shapes, strides and dtypes; operands take turns, to come from memory as in a step."""
    sets = [
        [torch.empty_strided(shape, stride, dtype=dtype, device=device).normal_() for shape, stride, dtype in operands]
        for _ in range(4)
    ]  # fmt: skip
    multiply, turn = (torch.bmm if len(operands[0][0]) == 3 else torch.mm), iter(range(10**9))
    return median_seconds(lambda: multiply(*sets[next(turn) % len(sets)]), 0.01)


def predict(**choices):
    """Seconds of a step that never runs, by what they are spent on."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        step = make_step(**choices)
        with Ledger() as ledger:
            step()
    rate = lambda moved: math.exp(np.interp(math.log(max(moved, 3) / 3), np.log(CURVE[0]), np.log(CURVE[1])))  # noqa: E731
    exponential = roofline.exponential_bandwidth(
        "bf16" if choices.get("precision") == "bf16" else "fp32", device
    )
    scalar = torch.ones(4, device=device)
    return {
        "products": sum(count * product_seconds(operands) for operands, count in ledger.products.items()),
        "element-wise": sum(moved / rate(moved) for moved in ledger.moved["element-wise"] if moved),
        "exponentials": sum(ledger.moved["exponentials"]) / exponential,
        # on a GPU the times above are the longer of call and kernel already
        "calls": ledger.calls * median_seconds(lambda: scalar * 2) if device.type == "cpu" else 0.0,
    }


VARIANTS = {
    "written out, fp32": {"precision": "fp32", "kernel": "written out"},
    "blocked, fp32": {"precision": "fp32"},
    "blocked, bf16": {"precision": "bf16"},
    "compiled, bf16": {"precision": "bf16", "compiled": True},
}
CURVE = element_wise_curve()
print("element-wise, GB/s by MiB of a tensor:", {size / MiB: round(rate / 1e9, 1) for size, rate in zip(*CURVE, strict=True)})  # fmt: skip
eager = [name for name in VARIANTS if not VARIANTS[name].get("compiled")]
predicted = {name: predict(**VARIANTS[name]) for name in eager}
predicted["compiled, bf16"] = roofline.predict_step(
    config, BATCH, T, device=device, precision="bf16", optimizer="muon", bandwidth=roof.bandwidth
).parts
for name, parts in predicted.items():
    inside = ", ".join(f"{part} {1e3 * seconds:.1f}" for part, seconds in parts.items())
    print(f"{name:>27}: predicted {1e3 * sum(parts.values()):>7.1f} ms   ({inside})")

# %% [markdown]
# The compiled step is predicted by `roofline.predict_step`, from the same product times and from the bytes that remain when everything between two products is one kernel.
#
# **Predict.** Write your own guesses beside these. Which change will bring most? Which prediction do you trust least?
#
# Then measure. The variants take turns, so that a busy moment of the machine meets all of them alike; the compiled step's prediction is measured anew in each round for the same reason.

# %%
steps = {name: make_step(**choices) for name, choices in VARIANTS.items()}
times, ratios, calm_predictions = {name: [] for name in VARIANTS}, [], []
started = time.perf_counter()
steps["compiled, bf16"]()
synchronize(device)
compile_seconds = time.perf_counter() - started
for step in steps.values():
    step()  # warm-up: optimizer states, first allocations
print(f"compiling took {compile_seconds:.0f} s (half a minute the first time on a machine; later runs find the kernels in a cache)")  # fmt: skip
for number in progress(range(3 * sizes["rounds"]), description="rounds", unit="round"):
    compiled = times["compiled, bf16"]
    if number >= sizes["rounds"] and statistics.median(compiled) < 1.15 * min(compiled):
        break  # a busy machine gets up to three times the rounds
    for name, step in steps.items():
        times[name].append(statistics.fmean(seconds_of(step) for _ in range(2)))
    again = roofline.predict_step(
        config, BATCH, T, device=device, optimizer="muon", bandwidth=roof.bandwidth, seconds=0.02
    )
    calm_predictions.append(again.seconds)
    ratios.append(again.seconds / compiled[-1])
# Whatever else runs on the machine only adds time, so the fastest of many rounds is the one to predict.
calm_ratio = min(calm_predictions) / min(times["compiled, bf16"])

# %%
step_flops = BATCH * T * base_flops
results["steps"], previous = {}, None
print(
    "                              predicted    measured [range]               of the measured step   tokens/s    MFU"
)
for name, rounds in times.items():
    seconds, guess = statistics.median(rounds), sum(predicted[name].values())
    mfu = accounting.model_flops_utilization(config, BATCH * T / seconds, roof.peak["bf16"], T)
    results["steps"][name] = {
        "predicted": guess,
        "predicted_parts": predicted[name],
        "measured": seconds,
        "rounds": rounds,
        "mfu": mfu,
    }
    print(f"{name:>27}: {1e3 * guess:>8.1f} ms {1e3 * seconds:>8.1f} ms [{1e3 * min(rounds):.1f}, {1e3 * max(rounds):.1f}]"
          f" {guess / seconds:>20.2f} {BATCH * T / seconds:>18,.0f} {mfu:>6.1%}")  # fmt: skip
results["compile_seconds"] = compile_seconds
results["compiled_prediction_ratios"], results["compiled_prediction_fastest"] = ratios, calm_ratio
print(
    f"compiled step, predicted / measured round by round: {[round(ratio, 2) for ratio in ratios]}, fastest of each {calm_ratio:.2f}"
)
saved = statistics.median(times["blocked, bf16"]) - statistics.median(times["compiled, bf16"])
print(f"half a minute of compiling repays itself after {30 / saved:,.0f} steps" if saved > 0 else "compiling does not repay itself here")  # fmt: skip
figure = plotting.bars(
    list(times),
    [1e3 * statistics.median(rounds) for rounds in times.values()],
    np.array([[1e3 * (statistics.median(r) - min(r)) for r in times.values()], [1e3 * (max(r) - statistics.median(r)) for r in times.values()]]),
    ylabel="milliseconds a step", title="One training step, range over rounds; dashed: its FLOPs at the bf16 peak",
    horizontal={"": 1e3 * step_flops / roof.peak["bf16"]},
)  # fmt: skip
plotting.show(
    figure,
    alt="Bars of milliseconds per step: falling from written-out attention in fp32 over blocked attention and bfloat16 to the compiled "
    "step, which is still some times above the line of pure arithmetic at the peak.",
)

# %% [markdown]
# **Run: the profiler.** Where the time goes before and after. Recording slows a step down, so read the shares. The trace is a file for [ui.perfetto.dev](https://ui.perfetto.dev): each row is a thread, each bar an operation, a child below its caller. Look for three things: gaps between bars (nothing runs, Python or a transfer is waited for), many short bars (calls dominate), and one operation whose bars fill the row (that is the one to work on).

# %%
results["profile"] = {}
with tempfile.TemporaryDirectory() as folder:
    for name in ("written out, fp32", "compiled, bf16"):
        record = profiling.profile_steps(steps[name], warmup=1, active=2, folder=folder, device=device)
        groups = record.groups()
        results["profile"][name] = {
            "groups": {group: seconds / record.seconds for group, seconds in groups.items()},
            "seconds": record.seconds,
            "top": [
                {"name": op.name, "group": op.group, "share": op.share, "calls": op.calls}
                for op in record.top(6)
            ],
        }
        print(
            f"{name}: "
            + ", ".join(
                f"{group} {seconds / record.seconds:.0%}"
                for group, seconds in groups.items()
                if seconds > 0.005 * record.seconds
            )
        )
        for op in record.top(6):
            print(f"{op.share:>8.1%} {op.calls:>7.0f} calls  {op.name[:70]} ({op.group})")
    with gzip.open(record.trace) as file:
        events = json.load(file)["traceEvents"]
    print(f"trace: {len(events):,} events, {record.trace.stat().st_size / 1e6:.2f} MB")

# %% [markdown]
# **Read the result.** Written out, a good part of the time belongs to operations that do no counted arithmetic: scaling, masking, exponentials and copies of tensors of T × T numbers. Blocks of queries skip most of the masked half; bfloat16 shortens the products and halves the bytes; the compiler makes one pass over memory out of many. What is left above the line is the optimizer's own products, passes over memory between products, and products that run below the peak. The predictions err in both directions. The gain from blocks was underrated: the curve of element-wise rates was measured on memory that is used again and again, and the written-out scores are large tensors that have to be allocated anew. The eager bf16 step was overrated: whether an operand is still in the cache when the next operation wants it depends on what ran in between, which no sum over operations knows. A prediction that was wrong is as useful as one that was right: it names the part of the machine that you had not thought of.

# %% [markdown]
# ## 5. The bill
#
# **Why.** FLOPs become hours by the rate that is reached, hours become energy and money by two numbers that you look up.
#
# **Exercise 9.** Hours, kilowatt hours and rent of a run.
#
# <details><summary>Hint</summary>
#
# Energy and rent are proportional to device hours; the wall clock is not.
#
# </details>


# %% exercise="run_cost"
def my_run_cost(flops, *, peak_flops, mfu, n_devices, watts, overhead, price_per_device_hour):
    """Returns {"hours": wall clock, "kwh": energy, "price": rent}; overhead is the building's power over the devices'."""
    raise NotImplementedError


# %% check="run_cost"
check("hardware/run_cost", my_run_cost)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_run_cost(flops, *, peak_flops, mfu, n_devices, watts, overhead, price_per_device_hour):
#     hours = flops / (peak_flops * mfu * n_devices) / 3600
#     device_hours = hours * n_devices
#     return {"hours": hours, "kwh": device_hours * watts * overhead / 1000, "price": device_hours * price_per_device_hour}
# ```
#
# </details>
#
# The devices below are described by their data sheets: dense bfloat16 rate and power. `PRICE` is what you pay; the value here is a round number for arithmetic, not an offer.

# %%
PRICE = 2.5  # per device and hour, in your currency
DEVICES = {
    "A100": (312e12, 400),
    "H100": (989e12, 700),
    "B200": (2250e12, 1000),
}  # FLOP/s dense bf16, watts
JOBS = {
    "GPT-2 124M, 10 billion tokens": (GPT2, 10e9, 1024, 8),
    "Llama-3.1-8B, 15 trillion tokens": (LLAMA_8B, 15e12, 8192, 1024),
}
results["bill"] = {}
for job, (description, n_tokens, context, n_devices) in JOBS.items():
    flops = n_tokens * accounting.training_flops_per_token(description, context)
    print(f"{job}: {flops:.2e} FLOPs, on {n_devices} devices at 40 % MFU")
    for name, (rate, watts) in DEVICES.items():
        hours = accounting.run_hours(flops, peak_flops=rate, mfu=0.4, n_devices=n_devices)
        energy = accounting.run_energy_kwh(hours, watts=watts, n_devices=n_devices)
        price = accounting.run_price(hours, price_per_device_hour=PRICE, n_devices=n_devices)
        results["bill"][f"{job}, {name}"] = {
            "flops": flops,
            "hours": hours,
            "device_hours": hours * n_devices,
            "kwh": energy,
            "price": price,
        }
        print(f"{name:>8}: {hours:>10,.1f} h = {hours * n_devices:>12,.0f} device hours {energy:>10,.0f} kWh {price:>14,.0f} at {PRICE} an hour")  # fmt: skip
base_hours = preset(PRESET).fit.steps * statistics.median(times["compiled, bf16"]) / 3600
print(
    f"\nthe base model of this course, on {'one core of ' if device.type == 'cpu' else ''}this machine: {preset(PRESET).fit.steps:,} steps in {60 * base_hours:.1f} minutes"
)
results["bill"]["base_minutes"] = 60 * base_hours

# %% [markdown]
# **Read the result.** Doubling the devices halves the wall clock and changes neither energy nor rent, as long as utilization holds; it does not for ever, which is the subject of the distributed chapters. A price per device hour means nothing without the utilization beside it.

# %% [markdown]
# ## The same with the library
#
# `transformers` counts parameters of models on the *meta* device, which have shapes and no memory; `accelerate` sizes them; `torch.utils.flop_counter` counts the FLOPs of the operations that run; `torch.profiler` is what `llmcourse.profiling` reads.

# %%
import transformers
from accelerate.utils import calculate_maximum_sizes
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

agree = {}
for name, description in MODELS.items():
    if name == "course base":
        continue
    options = {key: value for key, value in description.items() if key != "model_type"}
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(description["model_type"], **options), dtype=torch.float32
        )
    theirs.tie_weights()
    agree[name] = (theirs.num_parameters(), accounting.count_parameters(description))
    total_size, _ = calculate_maximum_sizes(theirs)
    print(f"{name:>14}: num_parameters {agree[name][0]:>15,}, ours {agree[name][1]:>15,}, accelerate {total_size / 2**30:>7.2f} GiB in fp32")  # fmt: skip

with torch.device(device):
    model = Transformer(config)
rows = draw_batch(BATCH)
with FlopCounterMode(display=False) as counter:
    total, _, _ = next_token_loss(model, rows)
    forward_counted = counter.get_total_flops()
    total.backward()
counted = counter.get_total_flops()
block = None if device.type == "cuda" else 128
forward_ours = sum(product.flops for product in accounting.matrix_products(config, BATCH, T, block=block))
causal = BATCH * accounting.forward_flops(config, T)
print(
    f"forward pass: flop_counter {forward_counted:,}, ours for blocks of queries {forward_ours:,}, needed under the mask {causal:,}"
)
print(f"forward and backward: {counted:,}, {counted / forward_counted:.3f} times the forward pass")
results["library"] = {
    "parameters_agree": all(a == b for a, b in agree.values()),
    "counted": counted,
    "forward": forward_counted,
    "ours": forward_ours,
    "causal": causal,
}

# %%
activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
with profile(activities=activities) as recording:
    steps["blocked, bf16"]()
    synchronize(device)
sort_by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
print(recording.key_averages().table(sort_by=sort_by, row_limit=5, max_name_column_width=40))

# %% [markdown]
# ## Measured results
#
# What this lab claims. Each line is computed from the runs above, and the lab stops if one does not hold.

# %%
# NBVAL_CHECK_OUTPUT
claim(
    "gpt2",
    accounting.forward_flops(GPT2, 1024, causal=False) == 291_648_307_200,
    "GPT-2 124M needs 291 648 307 200 FLOPs forward for 1 024 tokens, counted over all pairs",
)
claim(
    "parameters",
    results["library"]["parameters_agree"],
    "our parameter counts equal transformers' on the meta device",
)
claim(
    "flop-counter",
    forward_counted == forward_ours,
    "our count of the forward pass equals torch's flop counter to the last FLOP",
)
claim(
    "decode",
    all(cost.intensity < roof.ridge("bf16") for cost in placed["decode"]),
    "in decoding one row every layer is bound by memory",
)
claim(
    "feed-forward",
    next(c.intensity for c in placed["training"] if c.name == "feed-forward")
    > 20 * next(c.intensity for c in placed["decode"] if c.name == "feed-forward"),
    "training has at least 20 times the FLOPs per byte of decoding in the feed-forward layers",
)
claim(
    "memory",
    all(abs(row["ratio"] - 1) < 0.1 for row in plain),
    "predicted peak memory is within 10 % of the measured peak at every batch size",
)
full = next(row for row in results["memory"] if row["checkpointing"] == "full")
claim(
    "checkpointing",
    full["measured"] < plain[-1]["measured"] and abs(full["ratio"] - 1) < 0.15,
    "full checkpointing lowers the peak, to what was predicted within 15 %",
)
claim(
    "timeline",
    abs(timelines["plain"].peak / tensors - 1) < 0.1,
    "the tensors that the profiler saw allocated at the peak are those predicted, within 10 %",
)
claim(
    "sums",
    abs(results["formats"]["fp32"]["sum"] - 10) < 0.01 and results["formats"]["bf16"]["sum"] < 5,
    "ten thousand small numbers add up in fp32 and stall in bf16",
)
claim("accumulator", inside_product == 16_384, "a bf16 matrix product adds in more than bf16")
middle = {name: statistics.median(rounds) for name, rounds in times.items()}
claim(
    "attention",
    middle["blocked, fp32"] < middle["written out, fp32"],
    "attention that leaves out the masked half is faster than written-out attention",
)
if fast_bf16:
    claim(
        "bf16",
        middle["blocked, bf16"] < middle["blocked, fp32"],
        "bfloat16 products make the step faster on hardware that multiplies them",
    )
claim(
    "compiled",
    middle["compiled, bf16"] < middle["blocked, fp32"],
    "the compiled bf16 step is faster than the eager fp32 step",
)
claim(
    "prediction",
    abs(calm_ratio - 1) < 0.3,
    "the predicted time of the compiled step is within 30 % of the measured one, fastest rounds of both",
)

# %% [markdown]
# ## Break it
#
# Three ways to measure a number that is not there. The first is to time too little: arrays that fit into the cache never come from memory. The second is to skip the warm-up: the first touch of new memory is the operating system's work. The third exists on GPUs only: a call returns when the kernel is *queued*.

# %%
small = 2**18
honest, cached = (
    roofline.measure_bandwidth(device, n_bytes=size, seconds=0.3)["triad"] for size in (None, small)
)
first, later = [], []
for _ in range(8):
    fresh = torch.empty(2**24, device=device)
    for kept in (first, later):
        kept.append(fresh.nbytes / seconds_of(lambda: fresh.fill_(1.0)))  # noqa: B023
first, later = max(first), max(later)  # the best of many, as for the bandwidth: disturbances only slow down
print(
    f"triad over large arrays {honest / 1e9:.1f} GB/s, over {small / 1024:,.0f} KiB arrays {cached / 1e9:.1f} GB/s"
)
print(f"filling 64 MiB for the first time {first / 1e9:.1f} GB/s, the second time {later / 1e9:.1f} GB/s")
results["broken"] = {"honest": honest, "cached": cached, "first_touch": first, "later": later}
if device.type == "cuda":
    a = torch.randn(8192, 8192, device=device)
    torch.cuda.synchronize()
    start = time.perf_counter()
    b = a @ a
    unsynchronized = time.perf_counter() - start
    torch.cuda.synchronize()
    waited = time.perf_counter() - start
    print(f"a product without waiting: {2 * 8192**3 / unsynchronized / 1e12:,.0f} TFLOP/s; with waiting: {2 * 8192**3 / waited / 1e12:,.0f}")  # fmt: skip
    results["broken"] |= {"unsynchronized": unsynchronized, "waited": waited}

# %% [markdown]
# **Diagnosis.** A bandwidth above the machine's specification, or an MFU above 1, is a mistake in the measurement. Ask three questions: is the working set several times the last cache? Was everything run once before the clock started? Does the clock stop after the device has finished? `torch.utils.benchmark.Timer` answers the last two for you.
#
# And one that is wrong on paper already: $6ND$ for a small model with a large vocabulary, with $N$ counted in the wrong way.

# %%
wrong = accounting.ModelShape(
    vocab_size=128_256, context_length=256, d_model=128, n_layers=4, n_heads=4, n_kv_heads=2, d_head=32, d_ff=384, tie_embeddings=False,
)  # fmt: skip
errors = {
    "with both embeddings": accounting.six_nd_error(wrong),
    "without embeddings": accounting.six_nd_error(wrong, embeddings=False),
}
print({name: f"{error:+.0%}" for name, error in errors.items()})
results["broken"]["six_nd"] = errors

# %%
# NBVAL_CHECK_OUTPUT
if device.type == "cpu":
    claim(
        "cache", cached > 1.5 * honest, "small arrays show at least 1.5 times the bandwidth that memory has"
    )
    claim("first-touch", later > 1.3 * first, "the first touch of new memory is slower than the second")
else:
    claim("queue", waited > 2 * unsynchronized, "without waiting a product seems more than twice as fast")
claim(
    "six-nd",
    errors["with both embeddings"] > 0.8 and errors["without embeddings"] < -0.8,
    "for a small model with a large vocabulary 6ND is off by more than 80 %, upwards or downwards",
)

# %%
_ = store_results("hardware", results)

# %% [markdown]
# ## Takeaways
#
# * Parameters, FLOPs and bytes follow from the configuration. Count first, exactly; use $6ND$ where attention and embeddings are small.
# * A layer's FLOPs per byte against the machine's ridge says whether faster arithmetic can help it. Decoding lies far left of the ridge, training around it.
# * Peak memory is a baseline, states, and activations. The first two are fixed, the last is linear in the batch, and checkpointing trades it for a second forward pass.
# * Multiply in 16 bits, add in 32.
# * Predict, then measure, then explain the difference. MFU is the summary; the profiler names the part.
# * A number above the ceiling is a mistake in the measurement: cache, warm-up, synchronization.
#
# ## Next
#
# The chapter, [Hardware and compute](../book/foundations/hardware.md), derives the formulas used here and compares current accelerators. Lab 04 spends these FLOPs on a model, and lab 05 asks how to spend a given number of them best.
