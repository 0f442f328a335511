"""Exercises of chapter 02, hardware and compute: parameters, FLOPs, intensity, roofline, memory, utilization, cost.

Symbols: D d_model, H query heads, K key/value heads, C d_head, F d_ff; N parameters, T tokens of a sequence.
"""

from __future__ import annotations

import random
from typing import Any

from llmcourse.accounting import ModelShape, Product, count_parameters, run_energy_kwh, run_hours, run_price
from llmcourse.accounting.memory import OPTIMIZER_BYTES
from llmcourse.checks.exercise import Case, Exercise, Mutant
from llmcourse.roofline import Roofline

# --- parameters of a block --------------------------------------------------------------------------------------


def block_parameters(d_model: int, n_heads: int, n_kv_heads: int, d_head: int, d_ff: int) -> int:
    """Parameters of one Llama block: grouped-query attention, SwiGLU, two RMSNorm gains, no biases."""
    sizes = {"n_heads": n_heads, "n_kv_heads": n_kv_heads, "d_head": d_head, "d_ff": d_ff}
    one, two = (
        count_parameters(
            ModelShape(vocab_size=7, context_length=11, d_model=d_model, n_layers=layers, **sizes)
        )
        for layers in (1, 2)
    )
    return two - one


def _block_cases(seed: int) -> list[Case]:
    numbers = random.Random(seed)
    cases = []
    for groups in (1, 2, 4):
        kv = numbers.randrange(2, 5)
        d_head = 2 * numbers.randrange(4, 20)
        sizes = {"d_model": numbers.randrange(40, 90), "n_heads": groups * kv, "n_kv_heads": kv}
        cases.append(Case(kwargs=sizes | {"d_head": d_head, "d_ff": numbers.randrange(100, 300)}))
    return cases


def _block(
    d_model: int, n_heads: int, key_heads: int, d_head: int, d_ff: int, matrices: int = 3, norms: int = 2
) -> int:
    attention = d_model * d_head * (2 * n_heads + 2 * key_heads)
    return attention + matrices * d_model * d_ff + norms * d_model


BLOCK_PARAMETERS = Exercise(
    id="block_parameters",
    title="Parameters of a block",
    points=1,
    reference=block_parameters,
    cases=_block_cases,
    mutants=[
        Mutant(
            "keys for every query head",
            lambda d_model, n_heads, n_kv_heads, d_head, d_ff: _block(
                d_model, n_heads, n_heads, d_head, d_ff
            ),
            "You seem to give keys and values n_heads heads. Under grouped-query attention they have n_kv_heads.",
        ),
        Mutant(
            "two matrices",
            lambda d_model, n_heads, n_kv_heads, d_head, d_ff: _block(
                d_model, n_heads, n_kv_heads, d_head, d_ff, matrices=2
            ),
            "You seem to count two feed-forward matrices. SwiGLU has three: gate, up and down.",
        ),
        Mutant(
            "no norms",
            lambda d_model, n_heads, n_kv_heads, d_head, d_ff: _block(
                d_model, n_heads, n_kv_heads, d_head, d_ff, norms=0
            ),
            "You seem to leave out the gains of the two RMSNorms, d_model parameters each.",
        ),
        Mutant(
            "no output projection",
            lambda d_model, n_heads, n_kv_heads, d_head, d_ff: (
                _block(d_model, n_heads, n_kv_heads, d_head, d_ff) - d_model * d_head * n_heads
            ),
            "You seem to leave out attention's output projection, from n_heads x d_head back to d_model.",
        ),
        Mutant(
            "width for heads",
            lambda d_model, n_heads, n_kv_heads, d_head, d_ff: (
                2 * d_model**2
                + 2 * d_model * d_model * n_kv_heads // n_heads
                + 3 * d_model * d_ff
                + 2 * d_model
            ),
            "You seem to take d_model for n_heads x d_head. They often agree, but d_head is free (Qwen3, Gemma).",
        ),
    ],
    hints=("Four projections, three feed-forward matrices, two gains; add up their entries.",),
)


# --- forward FLOPs ----------------------------------------------------------------------------------------------


def forward_flops(weights: int, n_layers: int, n_heads: int, d_head: int, n_tokens: int, causal: bool) -> int:
    """FLOPs of a forward pass over `n_tokens` tokens, as `accounting.forward_flops` counts them.

    Args:
        weights: matrix entries that multiply each token, output head included.
        n_layers, n_heads, d_head: of attention.
        n_tokens: length T of the sequence.
        causal: count the pairs under the mask only (each token sees itself and those before), or all T x T.
    """
    pairs = n_tokens * (n_tokens + 1) // 2 if causal else n_tokens**2
    return 2 * weights * n_tokens + n_layers * 4 * n_heads * d_head * pairs


def _flops_cases(seed: int) -> list[Case]:
    numbers = random.Random(seed)
    cases = []
    for causal, n_tokens in (
        (True, numbers.randrange(12, 30)),
        (False, numbers.randrange(31, 50)),
        (True, 1),
    ):
        sizes = {"weights": numbers.randrange(5_000, 9_000), "n_layers": numbers.randrange(2, 5)}
        sizes |= {"n_heads": numbers.randrange(5, 8), "d_head": 2 * numbers.randrange(5, 12)}
        cases.append(Case(kwargs=sizes | {"n_tokens": n_tokens, "causal": causal}))
    return cases


FORWARD_FLOPS = Exercise(
    id="forward_flops",
    title="FLOPs of a forward pass",
    points=2,
    reference=forward_flops,
    cases=_flops_cases,
    mutants=[
        Mutant(
            "one operation a weight",
            lambda weights, n_layers, n_heads, d_head, n_tokens, causal: (
                forward_flops(weights, n_layers, n_heads, d_head, n_tokens, causal) // 2
            ),
            "You seem to count a multiplication and its addition as one operation. They are two FLOPs.",
        ),
        Mutant(
            "no attention",
            lambda weights, n_layers, n_heads, d_head, n_tokens, causal: 2 * weights * n_tokens,
            "You seem to leave out attention's own products: scores and weighted values have no weights, but FLOPs.",
        ),
        Mutant(
            "scores only",
            lambda weights, n_layers, n_heads, d_head, n_tokens, causal: (
                forward_flops(weights, n_layers, n_heads, d_head, n_tokens, causal) // 2 + weights * n_tokens
            ),
            "You seem to count one of attention's two products. Queries times keys and weights times values cost "
            "alike.",
        ),
        Mutant(
            "always full",
            lambda weights, n_layers, n_heads, d_head, n_tokens, causal: forward_flops(
                weights, n_layers, n_heads, d_head, n_tokens, False
            ),
            "You seem to count all T x T pairs although causal=True. Token t sees t positions: T (T + 1) / 2 pairs.",
        ),
        Mutant(
            "half of the square",
            lambda weights, n_layers, n_heads, d_head, n_tokens, causal: (
                2 * weights * n_tokens + n_layers * 2 * n_heads * d_head * n_tokens**2 * (1 if causal else 2)
            ),
            "You seem to halve T x T. The diagonal belongs to what a token sees, so it is T (T + 1) / 2 pairs.",
        ),
        Mutant(
            "one layer's attention",
            lambda weights, n_layers, n_heads, d_head, n_tokens, causal: forward_flops(
                weights, 1, n_heads, d_head, n_tokens, causal
            ),
            "You seem to count attention's products for one layer. Every layer has them.",
        ),
    ],
    hints=(
        "Two FLOPs for each weight and token; in each layer 2 x 2 x n_heads x d_head for each visible pair.",
    ),
)


# --- 6 N D ------------------------------------------------------------------------------------------------------


def six_nd(blocks: int, embedding: int, tied: bool, n_tokens: int) -> float:
    """Training FLOPs by 6 N D, with N the parameters that multiply a token.

    Args:
        blocks: parameters of all blocks.
        embedding: entries of the embedding matrix; the output head has as many.
        tied: whether embedding and head are one matrix; it changes the parameters, not the FLOPs.
        n_tokens: training tokens D.
    """
    return 6.0 * (blocks + embedding) * n_tokens


def _six_cases(seed: int) -> list[Case]:
    numbers = random.Random(seed)
    return [
        Case(
            kwargs={
                "blocks": numbers.randrange(10**6, 10**7),
                "embedding": numbers.randrange(10**5, 10**6),
                "tied": tied,
                "n_tokens": numbers.randrange(10**8, 10**9),
            }
        )
        for tied in (True, False)
    ]


SIX_ND = Exercise(
    id="six_nd",
    title="6 N D",
    points=1,
    reference=six_nd,
    cases=_six_cases,
    rtol=1e-6,
    mutants=[
        Mutant(
            "forward only",
            lambda blocks, embedding, tied, n_tokens: 2.0 * (blocks + embedding) * n_tokens,
            "You seem to count the forward pass, 2 N D. The backward pass has two products for each of its products.",
        ),
        Mutant(
            "backward like forward",
            lambda blocks, embedding, tied, n_tokens: 4.0 * (blocks + embedding) * n_tokens,
            "You seem to make the backward pass as dear as the forward pass. It has two products for each one: the "
            "gradient of the input and the gradient of the weight.",
        ),
        Mutant(
            "all parameters",
            lambda blocks, embedding, tied, n_tokens: (
                6.0 * (blocks + embedding * (1 if tied else 2)) * n_tokens
            ),
            "You seem to count an untied embedding as a product. Looking a row up multiplies nothing; only the head "
            "does.",
        ),
        Mutant(
            "no head",
            lambda blocks, embedding, tied, n_tokens: 6.0 * blocks * n_tokens,
            "You seem to leave out the output head. It is a product over the whole vocabulary for each token.",
        ),
        Mutant(
            "tied is free",
            lambda blocks, embedding, tied, n_tokens: 6.0 * (blocks + (0 if tied else embedding)) * n_tokens,
            "You seem to take a tied head for free. Sharing its entries saves memory; the product is still computed.",
        ),
    ],
    hints=(
        "Which matrices multiply every token? The head does, tied or not; the look-up of a row does not.",
    ),
)


# --- arithmetic intensity ---------------------------------------------------------------------------------------


def product_intensity(m: int, k: int, n: int, bytes_per_value: int) -> float:
    """FLOPs per byte of an (m, k) x (k, n) product that reads both operands and writes the result once."""
    product = Product(name="any", m=m, k=k, n=n)
    return product.flops / (bytes_per_value * product.values)


def _product_cases(seed: int) -> list[Case]:
    numbers = random.Random(seed)
    shapes = [(1, 257, 129), (64, 96, 33), tuple(numbers.randrange(3, 900) for _ in range(3))]
    return [
        Case(kwargs={"m": m, "k": k, "n": n, "bytes_per_value": width})
        for (m, k, n), width in zip(shapes, (2, 4, 1), strict=True)
    ]


INTENSITY = Exercise(
    id="intensity",
    title="Arithmetic intensity",
    points=1,
    reference=product_intensity,
    cases=_product_cases,
    mutants=[
        Mutant(
            "half of the FLOPs",
            lambda m, k, n, bytes_per_value: product_intensity(m, k, n, bytes_per_value) / 2,
            "You seem to count m k n operations. Each is a multiplication and an addition: 2 m k n FLOPs.",
        ),
        Mutant(
            "result not written",
            lambda m, k, n, bytes_per_value: 2 * m * k * n / (bytes_per_value * (m * k + k * n)),
            "You seem to leave out the result: its m n values cross the bus too.",
        ),
        Mutant(
            "per value",
            lambda m, k, n, bytes_per_value: 2 * m * k * n / (m * k + k * n + m * n),
            "You seem to divide by values. The bus carries bytes: bytes_per_value for each.",
        ),
        Mutant(
            "no reuse",
            lambda m, k, n, bytes_per_value: 2 * m * k * n / (bytes_per_value * (2 * m * k * n + m * n)),
            "You seem to fetch an operand again for every multiplication. The intensity of a kernel counts each "
            "operand once: reuse is what caches and registers are for.",
        ),
        Mutant(
            "inverted",
            lambda m, k, n, bytes_per_value: 1 / product_intensity(m, k, n, bytes_per_value),
            "You seem to give bytes per FLOP. Intensity is FLOPs per byte.",
        ),
    ],
    hints=("2 m k n FLOPs; m k + k n + m n values.",),
)


# --- the roofline -----------------------------------------------------------------------------------------------


def roofline_seconds(flops: float, n_bytes: float, peak_flops: float, bandwidth: float) -> float:
    """Least seconds of a kernel on a device of `peak_flops` FLOP/s and `bandwidth` bytes/s."""
    return Roofline(bandwidth=bandwidth, peak={"bf16": peak_flops}).seconds(flops, n_bytes, "bf16")


def _roof_cases(seed: int) -> list[Case]:
    numbers = random.Random(seed)
    cases = []
    for intensity in (numbers.uniform(2, 40), numbers.uniform(900, 3000)):  # below and above the ridge
        n_bytes = numbers.uniform(1e9, 9e9)
        rates = {"peak_flops": numbers.uniform(0.6e15, 1e15), "bandwidth": numbers.uniform(2e12, 3e12)}
        cases.append(Case(kwargs={"flops": intensity * n_bytes, "n_bytes": n_bytes, **rates}))
    return cases


ROOFLINE = Exercise(
    id="roofline",
    title="Roofline",
    points=1,
    reference=roofline_seconds,
    cases=_roof_cases,
    atol=1e-12,
    mutants=[
        Mutant(
            "sum",
            lambda flops, n_bytes, peak_flops, bandwidth: flops / peak_flops + n_bytes / bandwidth,
            "You seem to add the two times. Arithmetic and transfers overlap, so the bound is the longer one.",
        ),
        Mutant(
            "minimum",
            lambda flops, n_bytes, peak_flops, bandwidth: min(flops / peak_flops, n_bytes / bandwidth),
            "You seem to take the shorter time. The kernel is done when both are: it takes the longer one.",
        ),
        Mutant(
            "arithmetic only",
            lambda flops, n_bytes, peak_flops, bandwidth: flops / peak_flops,
            "You seem to ignore the memory. Below the ridge it is what one waits for.",
        ),
        Mutant(
            "memory only",
            lambda flops, n_bytes, peak_flops, bandwidth: n_bytes / bandwidth,
            "You seem to ignore the arithmetic. Above the ridge it is what one waits for.",
        ),
        Mutant(
            "rate",
            lambda flops, n_bytes, peak_flops, bandwidth: min(peak_flops, bandwidth * flops / n_bytes),
            "You seem to give the attainable FLOP/s. Seconds are the FLOPs divided by it.",
        ),
    ],
    hints=("Two times, of which the kernel takes the longer.",),
)


# --- states of training -----------------------------------------------------------------------------------------


def training_state_bytes(n_parameters: int, optimizer: str) -> int:
    """Bytes of weights, gradients, master weights and optimizer states in mixed precision (Rajbhandari et al., 2020).

    Weights and gradients are 16-bit, the master copy of the weights and all optimizer states 32-bit.

    Args:
        n_parameters: parameters N.
        optimizer: "sgd" (no state), "momentum" (one number a parameter) or "adamw" (two).
    """
    return (2 + 2 + 4 + OPTIMIZER_BYTES[optimizer]) * n_parameters


def _state_cases(seed: int) -> list[tuple[int, str]]:
    numbers = random.Random(seed)
    return [(numbers.randrange(10**6, 10**9), name) for name in ("adamw", "momentum", "sgd")]


STATE_BYTES = Exercise(
    id="state_bytes",
    title="Bytes of training states",
    points=1,
    reference=training_state_bytes,
    cases=_state_cases,
    mutants=[
        Mutant(
            "no master",
            lambda n_parameters, optimizer: (2 + 2 + OPTIMIZER_BYTES[optimizer]) * n_parameters,
            "You seem to leave out the 32-bit master weights. Small updates would round to nothing in 16 bits.",
        ),
        Mutant(
            "no gradients",
            lambda n_parameters, optimizer: (2 + 4 + OPTIMIZER_BYTES[optimizer]) * n_parameters,
            "You seem to leave out the gradients, 2 bytes a parameter.",
        ),
        Mutant(
            "states in 16 bits",
            lambda n_parameters, optimizer: (2 + 2 + 4 + OPTIMIZER_BYTES[optimizer] // 2) * n_parameters,
            "You seem to keep the optimizer's states in 16 bits. They are sums over many steps, so they have 32.",
        ),
        Mutant(
            "one moment",
            lambda n_parameters, optimizer: (8 + min(4, OPTIMIZER_BYTES[optimizer])) * n_parameters,
            "You seem to give AdamW one state. It has two moments: of the gradient and of its square.",
        ),
        Mutant(
            "everything in 32 bits",
            lambda n_parameters, optimizer: (
                (4 + 4 + OPTIMIZER_BYTES[optimizer]) * n_parameters + (4 * n_parameters)
            ),
            "You seem to keep weights and gradients in 32 bits beside the master copy. They have 16 here.",
        ),
    ],
    hints=("Weights 2, gradients 2, master 4, and 4 for each number that the optimizer keeps.",),
)


# --- rows of a key/value cache ----------------------------------------------------------------------------------


def largest_batch(
    memory: int, weight_bytes: int, n_layers: int, n_heads: int, n_kv_heads: int, d_head: int, n_tokens: int
) -> int:
    """Rows whose 16-bit key/value cache of `n_tokens` tokens fits beside the weights; 0 if none does."""
    row = 2 * n_layers * n_kv_heads * d_head * n_tokens * 2
    return max(0, memory - weight_bytes) // row


def _cache_cases(seed: int) -> list[Case]:
    numbers = random.Random(seed)
    cases = []
    for memory in (24 * 2**30, 80 * 2**30):
        kv = numbers.choice((2, 4, 8))
        heads = {"n_layers": numbers.randrange(16, 30), "n_heads": 3 * kv, "n_kv_heads": kv, "d_head": 64}
        sizes = {"memory": memory, "weight_bytes": numbers.randrange(6 * 2**30, 14 * 2**30)}
        cases.append(Case(kwargs=sizes | heads | {"n_tokens": numbers.randrange(900, 2100)}))
    small = {"memory": 2**30, "weight_bytes": 2**31, "n_layers": 3, "n_heads": 6, "n_kv_heads": 2}
    return [*cases, Case(kwargs=small | {"d_head": 16, "n_tokens": 100})]


def _rows(memory: int, weight_bytes: int, per_token: int, n_tokens: int) -> int:
    return max(0, memory - weight_bytes) // (per_token * n_tokens)


CACHE_ROWS = Exercise(
    id="cache_rows",
    title="Rows that fit",
    points=2,
    reference=largest_batch,
    cases=_cache_cases,
    mutants=[
        Mutant(
            "keys only",
            lambda memory, weight_bytes, n_layers, n_heads, n_kv_heads, d_head, n_tokens: _rows(
                memory, weight_bytes, 2 * n_layers * n_kv_heads * d_head, n_tokens
            ),
            "Your cache is half as large as it is. It holds keys and values, 2 bytes each.",
        ),
        Mutant(
            "query heads",
            lambda memory, weight_bytes, n_layers, n_heads, n_kv_heads, d_head, n_tokens: _rows(
                memory, weight_bytes, 4 * n_layers * n_heads * d_head, n_tokens
            ),
            "You seem to store a key for each query head. Grouped heads share one: n_kv_heads of them.",
        ),
        Mutant(
            "one layer",
            lambda memory, weight_bytes, n_layers, n_heads, n_kv_heads, d_head, n_tokens: _rows(
                memory, weight_bytes, 4 * n_kv_heads * d_head, n_tokens
            ),
            "You seem to store one layer's keys and values. Every layer has its own.",
        ),
        Mutant(
            "no weights",
            lambda memory, weight_bytes, n_layers, n_heads, n_kv_heads, d_head, n_tokens: _rows(
                memory, 0, 4 * n_layers * n_kv_heads * d_head, n_tokens
            ),
            "You seem to give the cache the whole memory. The weights are there too.",
        ),
        Mutant(
            "negative",
            lambda memory, weight_bytes, n_layers, n_heads, n_kv_heads, d_head, n_tokens: (
                (memory - weight_bytes) // (4 * n_layers * n_kv_heads * d_head * n_tokens)
            ),
            "Your number of rows is negative where the weights alone do not fit. Then it is 0.",
        ),
    ],
    hints=("Bytes of a row: 2 (keys and values) x layers x key heads x channels x tokens x 2 bytes.",),
)


# --- model FLOPs utilization ------------------------------------------------------------------------------------


def utilization(
    forward_flops_per_token: float, n_tokens: int, seconds: float, peak_flops: float, recomputed: bool
) -> float:
    """MFU of a training step (Chowdhery et al., 2022, appendix B): needed FLOP/s over the device's peak.

    Args:
        forward_flops_per_token: of the model, exact or 2 N.
        n_tokens: tokens of the step.
        seconds: wall-clock time of the step.
        peak_flops: FLOP/s that the device could reach.
        recomputed: whether activation checkpointing ran the forward pass a second time.
    """
    return 3 * forward_flops_per_token * n_tokens / seconds / peak_flops


def _utilization_cases(seed: int) -> list[Case]:
    numbers = random.Random(seed)
    return [
        Case(
            kwargs={
                "forward_flops_per_token": numbers.uniform(1e9, 2e9),
                "n_tokens": numbers.randrange(400_000, 600_000),
                "seconds": numbers.uniform(5.0, 9.0),
                "peak_flops": numbers.uniform(0.9e15, 1.1e15),
                "recomputed": recomputed,
            }
        )
        for recomputed in (False, True)
    ]


MFU = Exercise(
    id="mfu",
    title="Model FLOPs utilization",
    points=1,
    reference=utilization,
    cases=_utilization_cases,
    mutants=[
        Mutant(
            "forward only",
            lambda forward_flops_per_token, n_tokens, seconds, peak_flops, recomputed: (
                forward_flops_per_token * n_tokens / seconds / peak_flops
            ),
            "You seem to count the forward pass. A training step needs three times its FLOPs.",
        ),
        Mutant(
            "hardware FLOPs",
            lambda forward_flops_per_token, n_tokens, seconds, peak_flops, recomputed: (
                (4 if recomputed else 3) * forward_flops_per_token * n_tokens / seconds / peak_flops
            ),
            "You seem to count the recomputed forward pass: that is HFU. MFU counts what the model needs, so that "
            "recomputing does not look like progress.",
        ),
        Mutant(
            "six times",
            lambda forward_flops_per_token, n_tokens, seconds, peak_flops, recomputed: (
                6 * forward_flops_per_token * n_tokens / seconds / peak_flops
            ),
            "You seem to take the 6 of 6 N D. It multiplies parameters; the forward FLOPs contain its factor 2 "
            "already.",
        ),
        Mutant(
            "FLOP/s",
            lambda forward_flops_per_token, n_tokens, seconds, peak_flops, recomputed: (
                3 * forward_flops_per_token * n_tokens / seconds
            ),
            "You seem to give FLOP/s. Utilization divides them by the peak.",
        ),
        Mutant(
            "inverted",
            lambda forward_flops_per_token, n_tokens, seconds, peak_flops, recomputed: (
                seconds * peak_flops / (3 * forward_flops_per_token * n_tokens)
            ),
            "Your utilization is above 1: it seems to be the peak over what is used.",
        ),
    ],
    hints=(
        "FLOPs that the model needs for these tokens, over what the device could have done in that time.",
    ),
)


# --- cost of a run ----------------------------------------------------------------------------------------------


def run_cost(
    flops: float,
    *,
    peak_flops: float,
    mfu: float,
    n_devices: int,
    watts: float,
    overhead: float,
    price_per_device_hour: float,
) -> dict[str, float]:
    """Wall-clock hours, energy in kWh and rent of a run; see `accounting.costs` for the parameters."""
    hours = run_hours(flops, peak_flops=peak_flops, mfu=mfu, n_devices=n_devices)
    return {
        "hours": hours,
        "kwh": run_energy_kwh(hours, watts=watts, n_devices=n_devices, overhead=overhead),
        "price": run_price(hours, price_per_device_hour=price_per_device_hour, n_devices=n_devices),
    }


def _cost_cases(seed: int) -> list[Case]:
    numbers = random.Random(seed)
    return [
        Case(
            (numbers.uniform(1e21, 9e21),),
            {
                "peak_flops": numbers.uniform(0.3e15, 1e15),
                "mfu": numbers.uniform(0.3, 0.5),
                "n_devices": n_devices,
                "watts": numbers.uniform(400, 1000),
                "overhead": numbers.uniform(1.1, 1.4),
                "price_per_device_hour": numbers.uniform(1.5, 4.0),
            },
        )
        for n_devices in (8, 256)
    ]


def _cost_but(**factors: Any) -> Any:
    """The cost with some of its entries multiplied by what a function of the arguments returns."""

    def wrong(flops: float, **sizes: float) -> dict[str, float]:
        found = run_cost(flops, **sizes)
        return {name: value * factors.get(name, lambda **_: 1)(**sizes) for name, value in found.items()}

    return wrong


RUN_COST = Exercise(
    id="run_cost",
    title="Cost of a run",
    points=2,
    reference=run_cost,
    cases=_cost_cases,
    mutants=[
        Mutant(
            "full peak",
            _cost_but(**{name: lambda **sizes: sizes["mfu"] for name in ("hours", "kwh", "price")}),
            "You seem to run at the device's peak. A run reaches the fraction `mfu` of it, so it takes longer.",
        ),
        Mutant(
            "seconds",
            _cost_but(**{name: lambda **sizes: 3600 for name in ("hours", "kwh", "price")}),
            "Your hours seem to be seconds, and what follows from them is 3 600 times too much.",
        ),
        Mutant(
            "one device is paid",
            _cost_but(price=lambda **sizes: 1 / sizes["n_devices"]),
            "You seem to pay for one device. The price is for each of them and each hour.",
        ),
        Mutant(
            "no overhead",
            _cost_but(kwh=lambda **sizes: 1 / sizes["overhead"]),
            "You seem to count the devices' energy only. Cooling and conversion add the factor `overhead`.",
        ),
        Mutant(
            "watt hours",
            _cost_but(kwh=lambda **sizes: 1000),
            "Your energy seems to be in watt hours. A kilowatt hour is a thousand of them.",
        ),
    ],
    hints=("FLOPs over what all devices do in an hour; energy and rent are proportional to device hours.",),
)


EXERCISES = [
    BLOCK_PARAMETERS,
    FORWARD_FLOPS,
    SIX_ND,
    INTENSITY,
    ROOFLINE,
    STATE_BYTES,
    CACHE_ROWS,
    MFU,
    RUN_COST,
]
