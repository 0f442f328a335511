# %% [markdown]
# # Lab 19 · Inference optimization
#
# [Open in Colab]({{colab}}) · [Source of this lab]({{repository}}/blob/{{branch}}/labs/src/19_inference.py)
#
# | | |
# |---|---|
# | **Chapter** | [19 Inference optimization](../book/inference/inference.md) |
# | **Hardware** | CPU, 2 cores, 4 GiB of memory; a GPU is used with `PRESET = "gpu"` |
# | **Minutes** | 3 to execute, and up to 4 once for the base model; 3 hours with the exercises |
# | **You will build** | the address of a token in a paged cache, the length of a shared prefix, the plan of a step, goodput, the rule of speculative sampling, integers with a scale a row |
# | **What to inspect** | the time of a step against the number of rows; what static batching computes for nobody; latencies near and beyond the capacity; tokens of a pass; where a 4-bit weight hurts |

# %% [markdown]
# ## Setup
#
# `PRESET = "gpu"` takes the larger base model and the GPU. `MODEL` is a local folder or a Hub name of a model of the Llama or Qwen3 family; empty means the course's own base model. Prompts are beginnings of the town's documents. `PRESET = "smoke"` does little of everything, to try the lab on another model. Times are those of the machine that you are on, so the lab compares by ratio and in turns.

# %% tags=["parameters"]
PRESET = "cpu"
CORPUS = "tinytown"
SEED = 0
MODEL = ""

# %%
import copy
import random
import re
import shutil
import statistics
import tempfile
import time

import numpy as np
import torch

from llmcourse import pipeline, plotting
from llmcourse.accounting import count_parameters, kv_cache_bytes, matmul_weights
from llmcourse.checks import check, claim
from llmcourse.evaluation.perplexity import token_losses
from llmcourse.evaluation.statistics import paired_bootstrap
from llmcourse.inference import KVCache, SamplingParams, generate
from llmcourse.inference.block_manager import BlockManager
from llmcourse.inference.compiled import CompiledDecoder
from llmcourse.inference.constraint import json_constraint, regex_constraint
from llmcourse.inference.engine import Engine, EngineSettings
from llmcourse.inference.load import poisson_requests, serve
from llmcourse.inference.model_runner import ModelRunner
from llmcourse.inference.quantization import (
    QuantizationSettings,
    input_moments,
    layer_errors,
    quantize_weights,
    weight_bytes,
)
from llmcourse.inference.scheduler import SchedulerSettings
from llmcourse.inference.sequence import FinishReason
from llmcourse.inference.speculative import (
    NGramDrafter,
    PromptLookup,
    expected_tokens,
    speculative_generate,
    target_distribution,
    verify,
)
from llmcourse.inference.static_batching import static_batches
from llmcourse.labs import store_results
from llmcourse.models.pretrained import save_pretrained
from llmcourse.runtime import pick_device, progress, synchronize

SIZES = {
    "cpu": {"requests": 160, "rows": 32, "seats": 96, "longest": 160, "batches": (1, 2, 4, 8, 16, 32, 64), "steps": 24, "repeats": 3, "loads": (0.3, 0.8, 1.5, 3.0), "load_requests": 480, "texts": 200, "drawn": 4000, "written": 100, "compile": True},
    "gpu": {"requests": 512, "rows": 64, "seats": 256, "longest": 400, "batches": (1, 4, 16, 64, 256), "steps": 50, "repeats": 5, "loads": (0.3, 0.8, 1.5, 3.0), "load_requests": 2000, "texts": 400, "drawn": 20000, "written": 200, "compile": True},
    "smoke": {"requests": 4, "rows": 2, "seats": 4, "longest": 8, "batches": (1, 2), "steps": 2, "repeats": 1, "loads": (0.5,), "load_requests": 3, "texts": 4, "drawn": 20, "written": 6, "compile": False},
}  # fmt: skip
if PRESET not in SIZES:
    raise ValueError(f"PRESET={PRESET!r}: choose one of {', '.join(SIZES)}")
sizes, smoke = SIZES[PRESET], PRESET == "smoke"
own = (
    not MODEL and CORPUS == "tinytown" and not smoke
)  # whether the figures are those that the claims are about
device = pick_device("auto" if PRESET == "gpu" else "cpu")
results = {"preset": PRESET, "corpus": CORPUS, "seed": SEED, "model": MODEL}
results["sizes"] = {name: list(value) if isinstance(value, tuple) else value for name, value in sizes.items()}

# %% [markdown]
# ## Objectives
#
# After this lab you can
#
# 1. say what a step of decoding costs, and why more rows cost little;
# 2. keep keys and values in blocks, share equal beginnings, and say what each saves;
# 3. explain where static batching loses its time, and draw latency and goodput against the load;
# 4. let a cheap drafter speed up a model without changing its distribution, and predict the gain;
# 5. measure what fewer bits cost: in outputs of layers and in perplexity, with an interval.

# %% [markdown]
# ## 1. Where the time goes
#
# **Why.** A prompt is computed at once, all its tokens side by side. An answer is computed token by token, since each depends on the one before. Both go through the same weights, so an answer reads all weights for every token, a prompt once.

# %%
loaded = pipeline.load("base", preset="cpu" if smoke else PRESET, corpus=CORPUS, seed=SEED, model=MODEL)
model, tokenizer = loaded.model.to(device).eval(), loaded.tokenizer
config, runner = model.config, ModelRunner(model)
context = config.context_length
corpus = pipeline.corpus("tinytown", 2_000 if smoke else None)
validation = [
    row["text"] for row in corpus.validation.select(range(min(6 * sizes["texts"], len(corpus.validation))))
]
texts = [ids for ids in (tokenizer.encode(text) for text in validation) if len(ids) > 24][: sizes["texts"]]
prompts_of = random.Random(SEED)
prompts = [ids[: prompts_of.randint(4, 24)] for ids in (texts * 4)[: sizes["requests"]]]
lengths = [min(sizes["longest"], max(3, round(prompts_of.lognormvariate(2.9, 1.0)))) for _ in prompts]
N = matmul_weights(config)
print(f"{count_parameters(config):,} parameters, {N:,} of them in matrix products; a token's keys and values: {kv_cache_bytes(config, 1, 1, 4):,} bytes")  # fmt: skip
print(f"{len(prompts)} requests for {min(lengths)} to {max(lengths)} tokens, mean {statistics.fmean(lengths):.0f}, median {statistics.median(lengths):.0f}")  # fmt: skip

# %% [markdown]
# **Predict.** A step decodes one token of each of B rows. At B = 1 it takes some time. How long does it take at B = 32: the same, 4 times, 32 times as long? And how many tokens per second does the model read as a prompt of 128 tokens, compared with writing at B = 1?


# %%
class NothingToPropose:
    """A drafter that proposes nothing: one token a pass."""

    def propose(self, ids, n):
        """No tokens."""
        return [], None


def seconds_of(function):
    """Median seconds of a call, after one that does not count."""
    times = []
    for _ in range(sizes["repeats"] + 1):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


@torch.inference_mode()
def decode(n_rows, n_steps=sizes["steps"], n_prompt=16):
    """Steps of one token for rows of equal length."""
    cache = KVCache(config, n_rows, n_prompt + n_steps, device=device, dtype=runner.dtype)
    tokens = torch.randint(8, 100, (n_rows, n_prompt), device=device)
    last = torch.full((n_rows,), n_prompt - 1, device=device)
    runner.logits(tokens, cache, last)
    synchronize(device)
    start = time.perf_counter()
    for _ in range(n_steps):
        runner.logits(tokens[:, :1], cache, 0 * last)
    synchronize(device)
    return (time.perf_counter() - start) / n_steps


@torch.inference_mode()
def prefill(n_tokens):
    """A prompt of n tokens."""
    cache = KVCache(config, 1, n_tokens, device=device, dtype=runner.dtype)
    runner.logits(torch.ones(1, n_tokens, dtype=torch.int64, device=device), cache, torch.tensor([n_tokens - 1], device=device))  # fmt: skip


decode(2), prefill(8)
step_seconds = {B: statistics.median(decode(B) for _ in range(sizes["repeats"])) for B in progress(sizes["batches"], description="rows")}  # fmt: skip
read_lengths = [n for n in (8, 32, 128, 250) if n < context][: 2 if smoke else None]
prefill_seconds = {n: seconds_of(lambda n=n: prefill(n)) for n in read_lengths}
rows = np.array(list(step_seconds), dtype=float)
slope, fixed = np.polyfit(rows, np.array(list(step_seconds.values())), 1)
print("   rows   ms a step   tokens/s   FLOPs per byte of weights")
for B, seconds in step_seconds.items():
    print(f"{B:>7} {1e3 * seconds:>11.2f} {B / seconds:>10,.0f} {2 * N * B / (4 * N):>14.1f}")
print(f"fitted: {1e3 * fixed:.2f} ms a step and {1e6 * slope:.0f} us a row")
for n, seconds in prefill_seconds.items():
    print(f"prompt of {n:>4} tokens: {1e3 * seconds:.2f} ms, {n / seconds:,.0f} tokens/s")
figure = plotting.lines(
    {"decoding": (list(step_seconds), [B / s for B, s in step_seconds.items()]), "reading a prompt": (list(prefill_seconds), [n / s for n, s in prefill_seconds.items()])},
    xlabel="tokens computed together", ylabel="tokens per second", title="The more at once, the cheaper each", logx=True, logy=True, markers=True,
)  # fmt: skip
plotting.show(
    figure,
    alt="Tokens per second against the number of tokens computed together, both axes logarithmic: decoding and reading a prompt rise almost in proportion at first, then more slowly.",
)
results["steps"] = {"seconds": {str(B): s for B, s in step_seconds.items()}, "fixed": fixed, "slope": slope}
results["prefill"] = {str(n): s for n, s in prefill_seconds.items()}

# %% [markdown]
# **Fewer launches.** If launches are the fixed part, the same arithmetic in fewer operations is faster. The model's own modules; `FusedTransformer`, which joins products that read the same input; and a step of fixed shapes, compiled.

# %%
launches = {}
modules = ModelRunner(model, fused=False)
ids, one = texts[0][:8], SamplingParams(temperature=0.0, max_new_tokens=min(48, context - 8))
for name, which in {"modules": modules, "fused": runner}.items():
    launches[name] = seconds_of(lambda which=which: speculative_generate(which, ids, one, NothingToPropose()))
written_by = {"modules": speculative_generate(modules, ids, one, NothingToPropose()).new_ids}
if sizes["compile"] and (device.type == "cuda" or shutil.which("g++")):
    decoder = CompiledDecoder(model, 1, 8 + one.max_new_tokens, mode="reduce-overhead" if device.type == "cuda" else "default")  # fmt: skip
    start = time.perf_counter()
    decoder.generate([ids], one)
    compile_seconds = time.perf_counter() - start
    launches["compiled"] = seconds_of(lambda: decoder.generate([ids], one))
    written_by["compiled"] = decoder.generate([ids], one)[0]
    print(f"compiling took {compile_seconds:.0f} s")
for name, seconds in launches.items():
    print(f"{name:>9}: {1e3 * seconds / one.max_new_tokens:.2f} ms a token, {launches['modules'] / seconds:.2f} times the modules")  # fmt: skip
print("the same tokens: " + str(len({tuple(ids) for ids in written_by.values()}) == 1))
results["launches"] = {name: seconds / one.max_new_tokens for name, seconds in launches.items()}

# %% [markdown]
# A compiler joins the operations between products and removes Python from the step; what it cannot do is to make shapes that change as cheap as shapes that do not. It is worth its time where the same step runs many thousand times.

# %% [markdown]
# **Read the result.** A step has a fixed part, which one row has to pay alone and many rows share, and a part for each row. On an accelerator the fixed part is the time to read the weights; for a model this small on a CPU it is the time to launch some hundred small operations. The consequence is the same, and this whole lab follows from it: *whatever brings more tokens into one pass is nearly free*, be they prompts of others, or guesses at what comes next.

# %% [markdown]
# ## 2. Blocks
#
# **Why.** A contiguous cache sets aside, for each row, the longest text that may come. In a paged cache a sequence owns blocks of a fixed number of tokens, and a table says which.
#
# **Exercise 1.** Tokens `start` to `end - 1` of a sequence have to be written. Which slots of the pool do they go to? Slot $s$ is place $s \bmod P$ of block $\lfloor s / P \rfloor$.
#
# <details><summary>Hint</summary>
#
# The index into the table is the quotient of t and the block size, the place in the block is the remainder.
#
# </details>


# %% exercise="slots"
def my_slots(table, block_size, start, end):
    """Block numbers in order, P, first token, the one behind the last -> list of slots."""
    raise NotImplementedError


# %% check="slots"
check("inference/slots", my_slots)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_slots(table, block_size, start, end):
#     return [table[t // block_size] * block_size + t % block_size for t in range(start, end)]
# ```
#
# </details>
#
# **Exercise 2.** A new prompt comes. The cache holds the full blocks of some earlier texts. How many of its leading tokens need not be computed?
#
# <details><summary>Hint</summary>
#
# Keys and values of a token depend on everything before it. And something has to be computed, or there are no logits.
#
# </details>


# %% exercise="shared_tokens"
def my_shared_tokens(ids, stored, block_size):
    """Prompt, list of stored texts (lists of ids), P -> number of tokens."""
    raise NotImplementedError


# %% check="shared_tokens"
check("inference/shared_tokens", my_shared_tokens)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_shared_tokens(ids, stored, block_size):
#     best = 0
#     for text in stored:
#         n = 0
#         while n + block_size < len(ids) and n + block_size <= len(text) and ids[: n + block_size] == text[: n + block_size]:
#             n += block_size
#         best = max(best, n)
#     return best
# ```
#
# </details>
#
# **Predict.** What share of a contiguous cache would these requests leave unused, if each row sets aside prompt and answer at their longest? And of blocks of 16 tokens?

# %%
BLOCK = 16
needed = [len(prompt) + n for prompt, n in zip(prompts, lengths, strict=True)]
set_aside = max(map(len, prompts)) + max(lengths)
waste = {"contiguous": 1 - sum(needed) / (len(needed) * set_aside)}
for size in (4, BLOCK, 64):
    waste[f"blocks of {size}"] = 1 - sum(needed) / sum(-(-n // size) * size for n in needed)
for name, share in waste.items():
    print(f"{name:>14}: {share:.0%} of the slots stay empty")
system = texts[0][:20] + texts[1][: max(0, min(44, context // 3 - 20))]
asked = [system + ids[:8] for ids in texts[2 : 2 + min(24, sizes["requests"])]]
few = SamplingParams(temperature=0.0, max_new_tokens=4)
computed = {}
for share in (True, False):
    engine = Engine(model, EngineSettings(share_prefixes=share, block_size=BLOCK))
    engine.generate(asked[:1], few)
    written = engine.generate(asked[1:], few)
    computed[share] = (engine.computed_tokens, written)
same_text = computed[True][1] == computed[False][1]
saved = computed[False][0] - computed[True][0]
expected_saving = (len(asked) - 1) * (len(system) // BLOCK) * BLOCK
print(f"\n{len(asked)} prompts with a common beginning of {len(system)} tokens: {computed[False][0]:,} tokens computed, with shared blocks {computed[True][0]:,}; the same answers: {same_text}")  # fmt: skip
results["memory"] = {"waste": waste, "saved": saved, "computed": computed[False][0]}

# %% [markdown]
# **Read the result.** Only the last block of a sequence can be partly empty, on average by half, so small blocks waste little; very small ones make tables long and reads scattered. The saving by sharing is exact: as many full blocks as the common beginning has, for every prompt but the first. That is why a long system prompt costs little in a server that shares.

# %% [markdown]
# ## 3. Batches that never stand still
#
# **Why.** Static batching waits for the longest answer of a batch, and computes finished rows on until then. Scheduling at every step lets a waiting request take the seat in the next step.
#
# **Exercise 3.** The plan of a step: one token for each sequence that decodes, and what is left of the budget for prompts, in the order of arrival, the last in part.
#
# <details><summary>Hint</summary>
#
# Two passes over the sequences.
#
# </details>


# %% exercise="next_tokens"
def my_next_tokens(pending, decoding, budget):
    """Tokens not yet computed, and whether it decodes, of each sequence; budget -> tokens of each in this step."""
    raise NotImplementedError


# %% check="next_tokens"
check("inference/next_tokens", my_next_tokens)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_next_tokens(pending, decoding, budget):
#     found = [int(decodes) for decodes in decoding]
#     left = budget - sum(found)
#     for i, n in enumerate(pending):
#         if not decoding[i]:
#             found[i] = min(n, left)
#             left -= found[i]
#     return found
# ```
#
# </details>
#
# **Predict.** The requests of section 1, in batches of so many rows: what share of the tokens that static batching computes will somebody read? From that, how much faster can the other way be, if a step costs the same?

# %%
params = [SamplingParams(temperature=0.0, max_new_tokens=n) for n in lengths]
slots_of_batch = sizes["rows"] * set_aside


def settings_of(seats, **changes):
    """An engine with the cache memory of a static batch."""
    limits = {"max_sequences": seats, "max_tokens": max(256, seats)} | changes
    blocks = max(slots_of_batch // BLOCK, context // BLOCK + 1)
    return EngineSettings(n_blocks=blocks, block_size=BLOCK, scheduler=SchedulerSettings(**limits))


ways = {
    "static": lambda: static_batches(runner, prompts, lengths, batch_size=sizes["rows"]),
    "continuous, same rows": lambda: Engine(model, settings_of(sizes["rows"])).generate(prompts, params),
    "continuous, same memory": lambda: Engine(model, settings_of(sizes["seats"])).generate(prompts, params),
}
throughput, answers = {name: [] for name in ways}, {}
for round_number in range(sizes["repeats"] + 1):  # in turns; the first round does not count
    for name, run in ways.items():
        start = time.perf_counter()
        answers[name] = run()
        if round_number:
            throughput[name].append(sum(lengths) / (time.perf_counter() - start))
alone = [generate(model, [p], one)[0] for p, one in zip(prompts[:40], params[:40], strict=True)]
agreement = {name: float(np.mean([a == b for a, b in zip(found, alone, strict=False)])) for name, found in answers.items()}  # fmt: skip
wanted = [
    sum(lengths[i : i + sizes["rows"]])
    / (max(lengths[i : i + sizes["rows"]]) * len(lengths[i : i + sizes["rows"]]))
    for i in range(0, len(lengths), sizes["rows"])
]
print(f"static batching: {statistics.fmean(wanted):.0%} of the computed tokens are wanted")
for name, values in throughput.items():
    ratio = statistics.median(values) / statistics.median(throughput["static"])
    print(f"{name:>24}: {statistics.median(values):>8,.0f} tokens/s, {ratio:.2f} times static; {agreement[name]:.0%} of the texts as one by one")  # fmt: skip
results["batching"] = {"wanted": statistics.fmean(wanted), "throughput": throughput, "agreement": agreement}

# %% [markdown]
# **Read the result.** The engine pays something for each step that static batching does not: tables, gathering blocks, choosing. What it wins is that every seat is taken. With the same number of rows it gains less than the share of wanted tokens promises. With the same *memory* it gains more, because blocks are given out as they fill: in the room that static batching sets aside for a few long answers, many typical ones fit. Texts may differ where two tokens are so close that the order of additions decides.
#
# ### Under load
#
# A server does not have its requests beforehand. They come at random, and what users see is the time to the first token and the gaps after it.
#
# **Exercise 4.** Goodput: requests per second that met both limits, that on the first token and that on the mean gap.
#
# <details><summary>Hint</summary>
#
# An answer of one token has no gaps.
#
# </details>


# %% exercise="goodput"
def my_goodput(arrivals, token_times, seconds, limits):
    """Arrival of each request, times of its tokens, length of the measurement, (first token, mean gap) -> requests/s."""
    raise NotImplementedError


# %% check="goodput"
check("inference/goodput", my_goodput)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_goodput(arrivals, token_times, seconds, limits):
#     good = 0
#     for arrival, times in zip(arrivals, token_times, strict=True):
#         gaps = len(times) - 1
#         gap = (times[-1] - times[0]) / gaps if gaps else 0.0
#         good += times[0] - arrival <= limits[0] and gap <= limits[1]
#     return good / seconds
# ```
#
# </details>
#
# **Predict.** Requests come at 30, 80, 150 and 300 % of what the engine did above, where the end of the queue left seats empty. Draw the 95th percentile of the time to the first token over these rates, for static and for continuous batching.

# %%
capacity = statistics.median(throughput["continuous, same memory"]) / statistics.fmean(lengths)  # requests/s
more = random.Random(SEED + 1).choices(range(len(prompts)), k=sizes["load_requests"])
LIMITS = (0.25, 0.02)
load = {"static": [], "continuous": []}
for share in progress(sizes["loads"], description="loads"):
    requests = poisson_requests(
        [prompts[i] for i in more], [lengths[i] for i in more], share * capacity, seed=SEED
    )
    for name, rows_ in (("static", sizes["rows"]), ("continuous", sizes["seats"])):
        report = serve(Engine(model, settings_of(rows_, continuous=name == "continuous")), requests)
        load[name].append({
            "share": share, "rate": share * capacity, "throughput": report.throughput, "goodput": report.goodput(*LIMITS),
            **{what: list(report.percentiles(what).values()) for what in ("first_token", "between_tokens", "total")},
        })  # fmt: skip
print(f"capacity {capacity:.0f} requests/s; limits: first token {LIMITS[0]} s, mean gap {LIMITS[1]} s")
print(
    "                load   first token, ms: p50   p95   p99   gaps, ms: p50   p95   p99   goodput, requests/s (came)"
)
for name, reports in load.items():
    for one in reports:
        first, gaps = ([1e3 * value for value in one[what]] for what in ("first_token", "between_tokens"))
        print(f"{name:>12} {one['share']:>7.0%} {first[0]:>22.0f} {first[1]:>5.0f} {first[2]:>5.0f} {gaps[0]:>15.1f} {gaps[1]:>5.1f} {gaps[2]:>5.1f} {one['goodput']:>10.0f} ({one['rate']:.0f})")  # fmt: skip
figure = plotting.lines(
    {name: ([one["throughput"] for one in reports], [1e3 * one["first_token"][1] for one in reports]) for name, reports in load.items()},
    xlabel="tokens per second served", ylabel="ms to the first token, 95th percentile", title="Latency against throughput, as the load grows", logy=True, markers=True,
)  # fmt: skip
plotting.show(
    figure,
    alt="95th percentile of the time to the first token against tokens per second served, one curve for static and one for continuous batching: the curve of continuous batching lies lower and reaches farther before it turns up.",
)
results["load"] = load | {"capacity": capacity, "limits": list(LIMITS)}

# %% [markdown]
# **Read the result.** While there are seats, continuous batching answers within a few steps. Static batching lets a request wait until the present batch is through, even where most seats are empty, so its first tokens are late at any load. Beyond its capacity, which for static batching is passed early, no scheduler helps: the queue grows as long as the load lasts, and with it the time to the first token. More load than that still raises the throughput a little, since more seats are taken, and lowers the goodput, once first tokens come too late. So the useful number of a server is not its largest throughput but its goodput, and the load at which that turns down. (Rates are over the whole measurement, the end included, in which the last answers are written.)

# %% [markdown]
# ## 4. Guess, then check
#
# **Why.** One row leaves most of a pass unused. If something cheap proposes the next tokens, one pass checks all of them, and each that the model would have written itself is a pass saved.
#
# **Exercise 5.** A drafter proposes a token drawn from $q$; the model's distribution is $p$. With which probability is each token accepted, and from what distribution is a rejected one replaced, so that the result is distributed as $p$?
#
# <details><summary>Hint</summary>
#
# Accepted tokens come with $q \cdot \min(1, p/q) = \min(p, q)$. What is missing from $p$?
#
# </details>


# %% exercise="accept"
def my_accept(p, q):
    """Two distributions (V,) -> acceptance probability of each token (V,), 0 where q is 0; replacement distribution (V,)."""
    raise NotImplementedError


# %% check="accept"
check("inference/accept", my_accept)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_accept(p, q):
#     chance = torch.where(q > 0, (p / q).clamp(max=1), torch.zeros_like(p))
#     rest = (p - q).clamp(min=0)
#     return chance, rest / rest.sum()
# ```
#
# </details>
#
# **Exercise 6.** If each of $n$ proposed tokens is accepted with probability $a$, independently, as long as all before it were: how many tokens does a pass give on average?
#
# <details><summary>Hint</summary>
#
# A pass always gives one token more than it accepts.
#
# </details>


# %% exercise="expected_tokens"
def my_expected_tokens(acceptance, n_draft):
    """Probability from 0 to 1, number of drafts -> tokens of a pass."""
    raise NotImplementedError


# %% check="expected_tokens"
check("inference/expected_tokens", my_expected_tokens)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_expected_tokens(acceptance, n_draft):
#     return sum(acceptance**k for k in range(n_draft + 1))
# ```
#
# </details>
#
# **Predict.** Two drafters without any neural network: one repeats what followed the last words when they occurred in the same text before; one takes the most frequent continuation of the last four tokens in training documents. How many tokens a pass will each reach, with 6 drafts, on the town's documents?

# %%
training_texts = [
    tokenizer.encode(row["text"]) for row in corpus.train.select(range(min(4_000, len(corpus.train))))
]
drafters = {"the text itself": PromptLookup(), "5-grams of the corpus": NGramDrafter(training_texts, order=5)}


one_row = SamplingParams(temperature=0.0, max_new_tokens=min(sizes["written"], context - 14))
starts = [ids[:12] for ids in texts[:10]]
plain = [generate(model, [start], one_row)[0] for start in starts]
speculation, tokens_per_second = [], {"no drafts": []}
plans = [("no drafts", NothingToPropose(), 1)] + [
    (name, drafter, n) for name, drafter in drafters.items() for n in (2, 4, 8)
]
same_tokens = []
for name, drafter, n_draft in progress(plans, description="drafters"):
    rates = []
    for _ in range(sizes["repeats"]):
        start = time.perf_counter()
        found = [speculative_generate(runner, ids, one_row, drafter, n_draft=n_draft) for ids in starts]
        rates.append(sum(len(one.new_ids) for one in found) / (time.perf_counter() - start))
    proposed, accepted = sum(one.proposed for one in found), sum(one.accepted for one in found)
    same_tokens += [one.new_ids == ids for one, ids in zip(found, plain, strict=True)]
    speculation.append({
        "drafter": name, "n_draft": n_draft, "rate": statistics.median(rates), "acceptance": accepted / max(1, proposed),
        "per_pass": sum(len(one.new_ids) for one in found) / sum(one.passes for one in found), "proposed": proposed,
    })  # fmt: skip
base_rate = speculation[0]["rate"]
print("               drafter   drafts   accepted   tokens a pass   as if independent   tokens/s   speed-up")
for one in speculation:
    predicted = expected_tokens(one["acceptance"], one["n_draft"]) if one["proposed"] else 1.0
    print(f"{one['drafter']:>22} {one['n_draft']:>8} {one['acceptance']:>10.0%} {one['per_pass']:>15.2f} {predicted:>19.2f} {one['rate']:>10,.0f} {one['rate'] / base_rate:>9.2f}x")  # fmt: skip
print(f"the tokens of greedy decoding without drafts: {np.mean(same_tokens):.0%} of the texts")
best_speedup = max(one["rate"] for one in speculation) / base_rate
results["speculation"] = speculation

# %% [markdown]
# **Is it the same distribution?** Sampled text has no right answer to compare with, so count. The next token at one place of a text, the one where the model is least sure, drawn many times with drafts from a distribution that is nothing like the model's, against the model's own probabilities.

# %%
with torch.no_grad():  # the place in a text where the model is least sure
    found = model(torch.tensor([texts[0][:context]], device=device))[0].float().cpu()
entropies = torch.distributions.Categorical(logits=found).entropy()
logits = found[entropies.argmax()][None]
sampling = SamplingParams(temperature=1.0, top_k=12)
p = target_distribution(logits, sampling)[0]
q = (p > 0).float() / (p > 0).sum()  # a drafter that knows nothing but which tokens are possible
generator = torch.Generator().manual_seed(SEED)
counts, accepted = torch.zeros_like(p), 0
both = torch.cat((logits, logits))
for draft in torch.multinomial(q, sizes["drawn"], replacement=True, generator=generator).tolist():
    kept, last = verify(both, [draft], q[None], sampling, generator)
    accepted += kept
    counts[draft if kept else last] += 1
possible = (p * sizes["drawn"]) > 1
chi_square = float(((counts - p * sizes["drawn"]) ** 2 / (p * sizes["drawn"]))[possible].sum())
degrees = int(possible.sum()) - 1
limit = degrees + 4 * (2 * max(degrees, 1)) ** 0.5
print(
    f"chi-square {chi_square:.1f} with {degrees} degrees of freedom (above {limit:.1f} it would be suspicious)"
)
print(f"accepted {accepted / sizes['drawn']:.1%}; sum of min(p, q): {torch.minimum(p, q).sum():.1%}")
results["chi_square"] = {"value": chi_square, "degrees": degrees, "accepted": accepted / sizes["drawn"]}

# %% [markdown]
# **Read the result.** The tokens are those of the model alone, greedily and in distribution; only their number per pass changes. The counts of the corpus are a good drafter here, since the town's sentences follow patterns, and a poor one where text is new. More drafts help less and less: the *n*-th counts only if all before it were right. The formula with independent drafts is only a guide, because acceptance comes in runs: inside of a stock phrase everything is accepted, at a name nothing.

# %% [markdown]
# ## 5. Fewer bits
#
# **Why.** Decoding at small batches is bound by reading weights, on any hardware where it matters. Half the bits, half the bytes. What is lost has to be measured on the outputs, not on the weights.
#
# **Exercise 7.** Integers with one scale a row: the largest magnitude of the row over the largest integer, $2^{b-1} - 1$; round to the nearest.
#
# <details><summary>Hint</summary>
#
# `amax(dim=1, keepdim=True)` of the magnitudes.
#
# </details>


# %% exercise="quantize_rows"
def my_quantize_rows(weight, bits):
    """weight (O, I), 4 or 8 -> integers (O, I) int8, scales (O, 1)."""
    raise NotImplementedError


# %% check="quantize_rows"
check("inference/quantize_rows", my_quantize_rows)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_quantize_rows(weight, bits):
#     largest = 2 ** (bits - 1) - 1
#     scales = weight.abs().amax(dim=1, keepdim=True) / largest
#     return (weight / scales).round().to(torch.int8), scales
# ```
#
# </details>
#
# **Predict.** Order these by their loss of perplexity: 8 bits; 4 bits with a scale a row; 4 bits with a scale for every 32 weights; 4 bits by GPTQ, which knows the inputs. By how much does each raise it: 0.1, 1, 10 %?

# %%
held_out = texts[len(texts) // 2 :]
calibration = [torch.tensor([ids[:context]], device=device) for ids in texts[: len(texts) // 2]]
moments = input_moments(model, calibration)


@torch.no_grad()
def nats_of(some):
    """Summed loss of each held-out text."""
    found = []
    for ids in held_out:
        row = torch.tensor([ids[:context]], device=device)
        found.append(float(token_losses(some, row[:, :-1], row[:, 1:]).sum()))
    return np.array(found)


counts_of = np.array([min(len(ids), context) - 1 for ids in held_out])
before = nats_of(model)
group = 32 if config.d_model % 32 == 0 and config.d_ff % 32 == 0 else None
variants = {
    "8 bits": QuantizationSettings(bits=8),
    "4 bits": QuantizationSettings(bits=4),
    "4 bits, groups": QuantizationSettings(bits=4, group_size=group),
    "4 bits, GPTQ": QuantizationSettings(bits=4, method="gptq"),
    "4 bits, groups, GPTQ": QuantizationSettings(bits=4, group_size=group, method="gptq"),
}
quantized, table = {}, {}
for name, settings in progress(variants.items(), description="bits"):
    quantized[name] = quantize_weights(copy.deepcopy(model), settings, moments)
    change = paired_bootstrap(nats_of(quantized[name]) / counts_of.mean(), before / counts_of.mean())
    errors = layer_errors(model, quantized[name], moments)
    table[name] = {
        "bytes": weight_bytes(quantized[name]), "bits": settings.bits_per_weight(config.d_model), "errors": errors,
        "perplexity": [float(np.expm1(value)) for value in (change.value, change.low, change.high)],
    }  # fmt: skip
print(f"perplexity {np.exp(before.sum() / counts_of.sum()):.3f} on {len(held_out)} texts; weights {weight_bytes(model) / 2**20:.2f} MiB")  # fmt: skip
print(
    "                        bits a weight    MiB   output error, median layer (worst)   rise of the perplexity, 95 %"
)
for name, row in table.items():
    errors, rise = sorted(row["errors"].values()), row["perplexity"]
    print(f"{name:>22} {row['bits']:>14.2f} {row['bytes'] / 2**20:>7.2f} {statistics.median(errors):>20.5f} ({errors[-1]:.5f}) {rise[0]:>17.2%} [{rise[1]:+.2%}, {rise[2]:+.2%}]")  # fmt: skip
names = list(table["4 bits"]["errors"])
figure = plotting.lines(
    {name: (list(range(len(names))), [table[name]["errors"][layer] for layer in names]) for name in table},
    xlabel="layer, in the order of computation", ylabel="relative squared error of the outputs", title="Where fewer bits hurt", logy=True, markers=True,
)  # fmt: skip
plotting.show(
    figure,
    alt="Relative squared error of every layer's outputs for each way to quantize, logarithmic: that of 8 bits lies two orders of magnitude below that of 4 bits; groups and GPTQ lower it everywhere.",
)
small_cache = Engine(model, EngineSettings(cache_dtype="int8"))
usual_cache = Engine(model, EngineSettings())
some_params = SamplingParams(temperature=0.0, max_new_tokens=min(40, sizes["longest"]))
equal_cache = np.mean([a == b for a, b in zip(small_cache.generate(starts, some_params), usual_cache.generate(starts, some_params), strict=True)])  # fmt: skip
print(f"keys and values as int8: {small_cache.cache.bytes / usual_cache.cache.bytes:.0%} of the bytes, {equal_cache:.0%} of the greedy texts unchanged")  # fmt: skip
results["bits"] = {name: row | {"errors": list(row["errors"].values())} for name, row in table.items()}
results["cache_int8"] = {
    "bytes": small_cache.cache.bytes / usual_cache.cache.bytes,
    "equal": float(equal_cache),
}

# %% [markdown]
# **Read the result.** Each bit less doubles the step, so four bits less are 16 times the step and some 256 times the squared error. What helps is not to give all weights of a row the same scale, and to let the columns that are not rounded yet make up for those that are. The two go together. An error of a few percent in a layer's outputs is not an error of a few percent in perplexity: most of it lies in directions that nobody reads.
#
# On this CPU the integers save memory and no time, because they are multiplied out before each product. Kernels that multiply them directly exist for GPUs and phones.

# %% [markdown]
# ## The same with the library
#
# `transformers` with its own loop, with its continuous batching, and the masks of constrained decoding from `outlines-core`.

# %%
import transformers
from outlines_core import Index, Vocabulary
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from llmcourse.inference.constraint import token_texts

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
some = prompts[: 3 if smoke else 12]
some_lengths = lengths[: len(some)]
with tempfile.TemporaryDirectory() as folder:
    save_pretrained(copy.deepcopy(model).cpu().float(), folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
    batched = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
start = time.perf_counter()
by_loop = []
for prompt, n in zip(some, some_lengths, strict=True):
    ids = torch.tensor([prompt], device=device)
    with torch.inference_mode():
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=n, min_new_tokens=n, eos_token_id=None, pad_token_id=1)  # fmt: skip
    by_loop.append(out[0, len(prompt) :].tolist())
loop_rate = sum(some_lengths) / (time.perf_counter() - start)
start = time.perf_counter()
ours = Engine(model, settings_of(sizes["rows"])).generate(some, params[: len(some)])
our_rate = sum(some_lengths) / (time.perf_counter() - start)
settings = GenerationConfig(do_sample=False, max_new_tokens=context, eos_token_id=-1, pad_token_id=1)
limits = ContinuousBatchingConfig(page_size=BLOCK, num_blocks=settings_of(1).n_blocks, max_batch_tokens=256)
found = {}
start = time.perf_counter()
with batched.continuous_batching_context_manager(
    generation_config=settings, continuous_batching_config=limits, warmup=False
) as manager:
    for i, (prompt, n) in enumerate(zip(some, some_lengths, strict=True)):
        manager.add_request(prompt, request_id=str(i), max_new_tokens=n, eos_token_id=-1)
    while len(found) < len(some):
        output = manager.get_result(timeout=60)
        if output is None:
            raise RuntimeError("the continuous batching of transformers gave no answer within a minute")
        if output.is_finished():
            found[output.request_id] = output.generated_tokens
their_rate = sum(some_lengths) / (time.perf_counter() - start)
by_manager = [found[str(i)] for i in range(len(some))]
equal_texts = {name: float(np.mean([a == b for a, b in zip(other, ours, strict=True)])) for name, other in (("generate", by_loop), ("continuous batching", by_manager))}  # fmt: skip
print(f"{len(some)} requests: ours {our_rate:,.0f} tokens/s, transformers one by one {loop_rate:,.0f}, its continuous batching {their_rate:,.0f}")  # fmt: skip
print("equal texts: " + ", ".join(f"{name} {share:.0%}" for name, share in equal_texts.items()))

# %% [markdown]
# **Constrained.** A regular expression becomes a machine over characters, and that a table over tokens. In each state, tokens that cannot lead to a match get the logit −∞.

# %%
PATTERN = r'\{"name": "[A-Z][a-z]{2,8} [A-Z][a-z]{2,8}", "age": [1-9][0-9]?\}'
constraint = regex_constraint(PATTERN, tokenizer)
by_text = {}
for token, text in enumerate(token_texts(tokenizer)):
    if text:
        by_text.setdefault(text, []).append(token)
theirs_index = Index(PATTERN, Vocabulary(tokenizer.eos_id, by_text))
states, seen, equal_masks = [(constraint.start, theirs_index.get_initial_state())], set(), True
while states:
    mine, other = states.pop()
    if (mine, other) in seen or len(seen) > 200:
        continue
    seen.add((mine, other))
    allowed = set(theirs_index.get_allowed_tokens(other) or ()) - {tokenizer.eos_id}
    equal_masks &= set(constraint.allowed(mine)) == allowed
    states += [
        (constraint.advance(mine, token), theirs_index.get_next_state(other, token))
        for token in list(allowed)[:40]
    ]
engine = Engine(model, EngineSettings(seed=SEED))
free = SamplingParams(temperature=1.0, max_new_tokens=min(60, context - 20))
asked_for = [
    engine.add(starts[i % len(starts)], free, constraint=constraint) for i in range(4 if smoke else 24)
]
for _ in engine.run():
    pass
ended = [one for one in asked_for if one.reason is FinishReason.STOP]
matched = [bool(re.fullmatch(PATTERN, tokenizer.decode(one.new_ids))) for one in ended]
for one in ended[:3]:
    print("  " + tokenizer.decode(one.new_ids))
print(f"{len(ended)} of {len(asked_for)} came to an end within the limit, {sum(matched)} of them match; {len(seen)} states with the masks of outlines-core: {equal_masks}")  # fmt: skip
schema = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["n"],
}
from_schema = json_constraint(schema, tokenizer)
print(f"a JSON schema as a regular expression: {from_schema.pattern}")
results["library"] = {"equal": equal_texts, "rates": {"ours": our_rate, "loop": loop_rate, "continuous": their_rate}, "ended": len(ended), "matched": sum(matched)}  # fmt: skip

# %% [markdown]
# A model that never saw JSON writes it, character by character: the constraint makes the form, the model only chooses among what is left. Whether the content makes sense is another question, and a model that is forced into a form it does not know answers worse.

# %% [markdown]
# ## Measured results
#
# What this lab claims. Each line is computed from the runs above, and the lab stops if one does not hold.

# %%
# NBVAL_CHECK_OUTPUT
claim("sharing", same_text and saved == expected_saving, "shared blocks save exactly the common full blocks, and change no answer")  # fmt: skip
claim(
    "same-texts",
    min(agreement.values()) > 0.9,
    "batched in whatever way, more than nine texts in ten are those of one by one",
)
claim("chi-square", chi_square < limit, "speculative samples are distributed as the model says")
claim(
    "formats",
    all(matched) and equal_masks,
    "what is constrained matches; the masks are those of outlines-core",
)
if own:
    claim(
        "rows",
        step_seconds[32] < 8 * step_seconds[1],
        "a step of 32 rows takes less than 8 times as long as one of a single row",
    )
    faster = {name: statistics.median(values) / statistics.median(throughput["static"]) for name, values in throughput.items()}  # fmt: skip
    claim(
        "batching",
        faster["continuous, same rows"] > 1.2,
        "continuous batching is faster than static batching with as many rows",
    )
    claim(
        "memory",
        faster["continuous, same memory"] > faster["continuous, same rows"],
        "and faster still with as much memory",
    )
    claim(
        "first-token",
        all(
            a["first_token"][1] > b["first_token"][1]
            for a, b in zip(load["static"], load["continuous"], strict=True)
        ),
        "at every load, static batching's 95th percentile of the time to the first token is longer",
    )
    claim("drafts", best_speedup > 1.3, "drafts make a single row more than 1.3 times as fast")
    claim("same-tokens", np.mean(same_tokens) > 0.9, "and greedy decoding with drafts writes the same tokens")
    claim(
        "int8", table["8 bits"]["perplexity"][2] < 0.01, "8-bit weights cost less than 1 % of the perplexity"
    )
    claim(
        "gptq",
        all(table["4 bits, GPTQ"]["errors"][layer] < table["4 bits"]["errors"][layer] for layer in names),
        "GPTQ lowers the output error of every layer",
    )
    claim(
        "order",
        table["8 bits"]["perplexity"][0]
        < table["4 bits, groups, GPTQ"]["perplexity"][0]
        < table["4 bits"]["perplexity"][0],
        "groups and GPTQ lie between 8 bits and plain 4 bits",
    )
    claim("library", min(equal_texts.values()) > 0.9, "transformers writes the same texts")

# %% [markdown]
# ## Break it
#
# A cache that finds blocks by their own tokens, whatever came before them. It shares more, and it is wrong: keys and values of a token depend on its whole beginning. Here the prompts have equal *middles* at block borders behind different beginnings.


# %%
class ForgetfulManager(BlockManager):
    """Finds stored blocks without looking at what came before them."""

    def find_prefix(self, sequence):
        """Stored blocks with the same tokens, whatever their beginning."""
        by_tokens = {key[1]: content for key, content in self._content_of.items()}
        found = []
        for start in range(0, sequence.n_tokens - self.block_size, self.block_size):
            content = by_tokens.get(tuple(sequence.ids(start, start + self.block_size)))
            if content is None:
                break
            found.append((self._block_of[content], content))
        return found


middle = texts[0][:BLOCK]
first, second = (ids[:BLOCK] for ids in texts[1:3])
victims = [middle + ids[:6] for ids in texts[3 : 3 + (2 if smoke else 16)]]
few = SamplingParams(temperature=0.0, max_new_tokens=12)
right = [generate(model, [ids], few)[0] for ids in victims]
broken_shares = {}
for name, manager in (("as it should be", BlockManager), ("forgetful", ForgetfulManager)):
    engine = Engine(model, EngineSettings(block_size=BLOCK))
    engine.manager = engine.scheduler.manager = manager(engine.settings.n_blocks, BLOCK)
    engine.generate([first + middle + second[:4]], few)  # stores `middle` behind another beginning
    found = engine.generate(victims, few)
    broken_shares[name] = float(np.mean([a == b for a, b in zip(found, right, strict=True)]))
    print(
        f"{name:>16}: {broken_shares[name]:.0%} of the answers are right; {engine.computed_tokens} tokens computed"
    )
print("  e.g. " + repr(tokenizer.decode(found[0])) + " instead of " + repr(tokenizer.decode(right[0])))
results["forgetful"] = broken_shares

# %% [markdown]
# **Diagnosis.** No error, no warning, a better hit rate, and texts that read well. The blocks hold keys that were rotated for other positions and values that have read another beginning. The only test that sees this compares the answers with those of an engine that shares nothing, on prompts that are made to collide. Put such a test beside every cache.

# %%
# NBVAL_CHECK_OUTPUT
claim(
    "right-sharing",
    broken_shares["as it should be"] > 0.9,
    "with whole beginnings compared, the answers stay",
)
if own:
    claim(
        "forgetful",
        broken_shares["forgetful"] < 0.7,
        "with blocks compared by their own tokens, many answers are wrong",
    )

# %%
store_results("inference", results)

# %% [markdown]
# ## Takeaways
#
# * A step has a fixed cost that all rows share. Batching, chunks and drafts all bring more tokens into a step.
# * Keys and values in blocks waste half a block a sequence, not half of the memory, and equal beginnings are held once.
# * Schedule at every step. Compare at equal memory, and look at percentiles under random arrivals, not at a full queue.
# * Speculation changes the speed and nothing else. Test that, greedily by equality and in samples by counting.
# * Measure quantization on outputs and on held-out text, with an interval. 8 bits are nearly free; at 4 bits scales and calibration matter.
# * A cache that shares too much is wrong without a sign. Compare with one that shares nothing.

# %% [markdown]
# ## Next
#
# The chapter, [Inference optimization](../book/inference/inference.md), derives what was measured here, from the roofline to the rule of speculative sampling, and has exercises with solutions.
