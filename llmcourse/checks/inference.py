"""Exercises of chapter 19, inference: slots, prefixes, chunks, latencies, acceptance, drafts, integers.

Shapes: P block_size, T tokens, V vocab_size, O outputs, I inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmcourse.checks.exercise import Case, Exercise, Mutant
from llmcourse.inference import speculative
from llmcourse.inference.block_manager import BlockManager
from llmcourse.inference.load import Latency, LoadReport
from llmcourse.inference.quantization import QuantizationSettings, round_to_scale, scales_of
from llmcourse.inference.sampling import SamplingParams
from llmcourse.inference.scheduler import Scheduler, SchedulerSettings
from llmcourse.inference.sequence import Sequence as Request

# --- where a token lies -----------------------------------------------------------------------------------------


def slots(table: Sequence[int], block_size: int, start: int, end: int) -> list[int]:
    """The slots of tokens start .. end - 1 of a sequence in the pool: block table[t // P], place t % P.

    Args:
        table: numbers of the sequence's blocks, in order.
        block_size: P.
        start, end: first token, and the one behind the last.
    """
    return [table[t // block_size] * block_size + t % block_size for t in range(start, end)]


SLOTS = Exercise(
    id="slots",
    title="Slots of a sequence's tokens",
    points=1,
    reference=slots,
    cases=lambda seed: [
        Case(([7, 2, 9, 4], 4, 3, 11), name="from the middle of a block to that of another"),
        Case(([5, 0, 3], 3, 0, 9), name="three full blocks"),
        Case(([6, 1], 16, 16, 17), name="the first token of a block"),
    ],
    mutants=[
        Mutant(
            "as if contiguous",
            lambda table, block_size, start, end: list(range(start, end)),
            "Your slots are the tokens' own numbers. That is a contiguous cache; here the block table says which block "
            "holds token t.",
        ),
        Mutant(
            "first block only",
            lambda table, block_size, start, end: [table[0] * block_size + t for t in range(start, end)],
            "You seem to count on from the first block. The sequence's next block may lie anywhere: look it up for "
            "each token.",
        ),
        Mutant(
            "block number without its size",
            lambda table, block_size, start, end: [
                table[t // block_size] + t % block_size for t in range(start, end)
            ],
            "You add the number of the block. Its slots begin at that number times the block size.",
        ),
        Mutant(
            "place within the call",
            lambda table, block_size, start, end: [
                table[i // block_size] * block_size + i % block_size for i in range(end - start)
            ],
            "You count from the first token of the call. Places count from the first token of the sequence.",
        ),
        Mutant(
            "quotient and remainder swapped",
            lambda table, block_size, start, end: [
                table[min(t % block_size, len(table) - 1)] * block_size + t // block_size
                for t in range(start, end)
            ],
            "You seem to have exchanged quotient and remainder: t // P is the number of the block in the table, t % P "
            "the place in it.",
        ),
    ],
    hints=("Token t is in the block with index t // block_size of the table, at place t % block_size.",),
)

# --- shared prefixes --------------------------------------------------------------------------------------------


def shared_tokens(ids: Sequence[int], stored: Sequence[Sequence[int]], block_size: int) -> int:
    """How many leading tokens of a prompt need not be computed: full blocks whose whole beginning is stored.

    At least one token is left to compute, since its logits choose the next one. By the package's `BlockManager`.

    Args:
        ids: the prompt.
        stored: texts (token ids) whose full blocks are in the cache.
        block_size: P.
    """
    manager = BlockManager(sum(len(one) for one in stored) + len(ids) + 1, block_size)
    for number, text in enumerate(stored):
        request = Request(number, list(text), SamplingParams())
        manager.admit(request)
        request.n_computed = request.n_tokens
        manager.publish(request)
    return manager.block_size * len(manager.find_prefix(Request(-1, list(ids), SamplingParams())))


def _shared_with(
    *, whole: bool = True, last: bool = True, full: bool = True, first_only: bool = False
) -> Callable[..., int]:
    def shared(ids: Sequence[int], stored: Sequence[Sequence[int]], block_size: int) -> int:
        best = 0
        for text in stored[:1] if first_only else stored:
            if not whole:  # blocks compared one by one, wherever they stand in the stored texts
                blocks = {
                    tuple(one[i : i + block_size])
                    for one in stored
                    for i in range(0, len(one) - block_size + 1, block_size)
                }
                n = 0
                while tuple(ids[n : n + block_size]) in blocks:
                    n += block_size
            else:
                n = next(
                    (i for i, (a, b) in enumerate(zip(ids, text, strict=False)) if a != b),
                    min(len(ids), len(text)),
                )
            if full:
                n -= n % block_size
            if last and n >= len(ids):
                n = len(ids) - (block_size if full else 1)
            best = max(best, n)
        return best

    return shared


SHARED_TOKENS = Exercise(
    id="shared_tokens",
    title="Tokens found in the cache",
    points=2,
    reference=shared_tokens,
    cases=lambda seed: [
        Case(
            ([1, 2, 3, 4, 5, 6, 7, 8], [[9, 9, 9, 9], [1, 2, 3, 4, 5, 6, 9]], 3),
            name="the second text begins alike",
        ),
        Case(([1, 2, 3, 4, 5, 6], [[1, 2, 3, 4, 5, 6, 7]], 3), name="all of the prompt is stored"),
        Case(([4, 5, 6, 7, 8], [[1, 2, 4, 5, 6, 7]], 2), name="equal blocks behind another beginning"),
        Case(([1, 2, 3, 4, 5, 6, 7], [[1, 2, 3, 4, 5, 6, 7, 8]], 2), name="three blocks and a token"),
        Case(([3, 1], [[2, 2, 2]], 2), name="nothing in common"),
    ],
    mutants=[
        Mutant(
            "blocks without their beginning",
            _shared_with(whole=False),
            "You compare blocks by their own tokens. Keys and values depend on all tokens before; a block counts only "
            "if everything before it is equal too.",
        ),
        Mutant(
            "nothing left to compute",
            _shared_with(last=False),
            "You share the whole prompt in one case. Then nothing is computed and there are no logits: leave at least "
            "the last token, and with it its block.",
        ),
        Mutant(
            "parts of blocks",
            _shared_with(full=False),
            "You count tokens of a block that is not equal as a whole. Only full blocks can be held by two sequences; "
            "the next token would be written into the other's block.",
        ),
        Mutant(
            "first text only",
            _shared_with(first_only=True),
            "You look at the first stored text only. Any text in the cache will do.",
        ),
    ],
    hints=(
        "Walk block by block; stop at the first one that no stored text has in this place behind the same beginning.",
    ),
)

# --- who computes what ------------------------------------------------------------------------------------------


def next_tokens(pending: Sequence[int], decoding: Sequence[bool], budget: int) -> list[int]:
    """How many tokens of each running sequence a step computes, in the order of arrival, by the package's `Scheduler`.

    Those that decode get their one token first; what is left of the budget goes to prompts, first come, first served,
    the last of them in part.

    Args:
        pending: tokens of each sequence that are not computed yet; 1 for one that decodes.
        decoding: whether it does.
        budget: most tokens of a step; at least the number of sequences that decode.
    """
    manager = BlockManager(1000, 16, share_prefixes=False)
    scheduler = Scheduler(manager, SchedulerSettings(max_sequences=1, max_tokens=budget))
    requests = []
    for number, (n, decodes) in enumerate(zip(pending, decoding, strict=True)):
        request = Request(number, [0] * (5 if decodes else n), SamplingParams())
        manager.admit(request)
        if decodes:
            request.new_ids, request.n_computed = [0], 5
        requests.append(request)
    scheduler.running = requests
    found = scheduler.schedule()
    chunks = {request.number: n for request, n in found.prefills} | {
        request.number: 1 for request in found.decodes
    }
    return [chunks.get(number, 0) for number in range(len(requests))]


def _next_with(order: str = "decodes first", cut: bool = True) -> Callable[..., list[int]]:
    def chosen(pending: Sequence[int], decoding: Sequence[bool], budget: int) -> list[int]:
        numbers = list(range(len(pending)))
        if order == "decodes first":
            numbers.sort(key=lambda i: not decoding[i])
        elif order == "prompts first":
            numbers.sort(key=lambda i: decoding[i])
        elif order == "shortest first":
            numbers.sort(key=lambda i: pending[i])
        found, left = [0] * len(pending), budget
        if order == "equal shares":
            prompts = [i for i in numbers if not decoding[i]]
            left -= len(numbers) - len(prompts)
            return [
                1 if decoding[i] else min(pending[i], left // max(1, len(prompts)))
                for i in range(len(pending))
            ]
        for i in numbers:
            n = min(pending[i], left) if cut else pending[i] if pending[i] <= left else 0
            found[i], left = n, left - n
        return found

    return chosen


NEXT_TOKENS = Exercise(
    id="next_tokens",
    title="Tokens of a step",
    points=2,
    reference=next_tokens,
    cases=lambda seed: [
        Case(
            ([40, 1, 7, 1, 12], [False, True, False, True, False], 32), name="a long prompt before the others"
        ),
        Case(([3, 1, 30, 5], [False, True, False, False], 20), name="a prompt that is cut"),
        Case(([1, 1, 9], [True, True, False], 2), name="nothing left for the prompt"),
        Case(([9, 4], [False, False], 64), name="room for all"),
    ],
    mutants=[
        Mutant(
            "prompts first",
            _next_with("prompts first"),
            "Your prompts take the budget before those that write have their token, so these stall.",
        ),
        Mutant(
            "order of arrival alone",
            _next_with("arrival"),
            "You go by arrival alone: a long prompt in front takes the whole budget and holds up those who write.",
        ),
        Mutant(
            "prompts whole or not at all",
            _next_with(cut=False),
            "You leave out a prompt that does not fit whole. Give it what is left: that is what chunks are for.",
        ),
        Mutant(
            "shortest prompt first",
            _next_with("shortest first"),
            "You serve the shortest prompt first. First come, first served: otherwise a long one may wait for ever.",
        ),
        Mutant(
            "equal shares",
            _next_with("equal shares"),
            "You divide the budget between prompts. Then all first tokens come late; finish one prompt after another.",
        ),
    ],
    hints=("One token for each that decodes; then min(pending, what is left) for each prompt in turn.",),
)

# --- what a user sees -------------------------------------------------------------------------------------------


def goodput(
    arrivals: Sequence[float],
    token_times: Sequence[Sequence[float]],
    seconds: float,
    limits: tuple[float, float],
) -> float:
    """Requests per second whose first token came in time and whose mean gap between tokens was short enough.

    Args:
        arrivals: when each request came, in seconds.
        token_times: when each of its tokens was there.
        seconds: length of the measurement.
        limits: longest time to the first token, longest mean gap.
    """
    latencies = [
        Latency(
            times[0] - arrival,
            tuple(b - a for a, b in zip(times[:-1], times[1:], strict=True)),
            times[-1] - arrival,
            len(times),
        )
        for arrival, times in zip(arrivals, token_times, strict=True)
    ]
    return LoadReport(latencies, seconds).goodput(*limits)


def _goodput_with(
    *,
    from_zero: bool = False,
    either: bool = False,
    largest: bool = False,
    share: bool = False,
    over_all: bool = False,
) -> Callable[..., float]:
    def found(arrivals: Any, token_times: Any, seconds: float, limits: tuple[float, float]) -> float:
        n = 0
        for arrival, times in zip(arrivals, token_times, strict=True):
            first = times[0] - (0.0 if from_zero else arrival)
            gaps = [b - a for a, b in zip(times[:-1], times[1:], strict=True)] or [0.0]
            gap = max(gaps) if largest else sum(gaps) / len(gaps)
            if over_all:
                gap = (times[-1] - arrival) / len(times)
            good = (first <= limits[0], gap <= limits[1])
            n += any(good) if either else all(good)
        return n / (len(arrivals) if share else seconds)

    return found


def _load_cases(seed: int) -> list[Case]:
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(0.5, 40))
    times = []
    for arrival in arrivals:
        first = arrival + rng.exponential(0.2)
        times.append(
            (
                first + np.concatenate(([0.0], np.cumsum(rng.exponential(0.05, int(rng.integers(0, 20))))))
            ).tolist()
        )
    return [
        Case((arrivals.tolist(), times, 25.0, (0.3, 0.05)), name="40 requests"),
        Case(([10.0, 11.0], [[10.1, 10.2, 10.6], [11.25]], 4.0, (0.3, 0.3)), name="one with a single token"),
    ]


GOODPUT = Exercise(
    id="goodput",
    title="Goodput",
    points=1,
    reference=goodput,
    cases=_load_cases,
    mutants=[
        Mutant(
            "from the start of the measurement",
            _goodput_with(from_zero=True),
            "You measure the first token from the start of the measurement. A user waits from the request's arrival.",
        ),
        Mutant(
            "one limit is enough",
            _goodput_with(either=True),
            "You count requests that meet one of the limits. A good one meets both.",
        ),
        Mutant(
            "largest gap",
            _goodput_with(largest=True),
            "You seem to hold the largest gap against the limit. Here it is the mean over a request's gaps.",
        ),
        Mutant(
            "share of requests",
            _goodput_with(share=True),
            "You give a share of the requests. Goodput is a rate: good requests per second.",
        ),
        Mutant(
            "waiting counted as a gap",
            _goodput_with(over_all=True),
            "Your mean gap begins at the arrival. The time to the first token has a limit of its own; gaps are between "
            "tokens.",
        ),
    ],
    hints=("A single token has no gaps, so only the first limit applies to it.",),
)

# --- speculative decoding ---------------------------------------------------------------------------------------


def accept(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """For each token the probability that it is accepted if it is proposed, and the distribution that replaces a
    rejected one (Leviathan et al., 2023, section 2.3).

    Args:
        p: (V,) of the model.
        q: (V,) of the drafter.

    Returns:
        min(1, p / q) where q > 0, else 0, (V,); max(0, p - q), normalized, (V,).
    """
    chance = torch.where(q > 0, (p / q).clamp(max=1), torch.zeros_like(p))
    rest = (p - q).clamp(min=0)
    return chance, rest / rest.sum()


def _accept_with(*, chance: str = "ratio", rest: str = "difference") -> Callable[..., tuple[Tensor, Tensor]]:
    def found(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        ratio = {"ratio": p / q, "inverse": q / p, "p": p, "unclamped": p / q}[chance]
        accepted = ratio if chance == "unclamped" else ratio.clamp(max=1)
        accepted = torch.where(q > 0, accepted, torch.zeros_like(p))
        left = {
            "difference": (p - q).clamp(min=0),
            "p": p,
            "absolute": (p - q).abs(),
            "unnormalized": (p - q).clamp(min=0),
            "swapped": (q - p).clamp(min=0),
        }[rest]
        return accepted, left if rest == "unnormalized" else left / left.sum()

    return found


def _two_distributions(seed: int) -> list[Case]:
    g = torch.Generator().manual_seed(seed)
    cases = []
    for v in (5, 11):
        p, q = ((2 * torch.randn(v, generator=g)).softmax(-1) for _ in range(2))
        cases.append(Case((p, q), name=f"{v} tokens"))
    q = torch.tensor([0.5, 0.5, 0.0, 0.0])
    cases.append(
        Case((torch.tensor([0.1, 0.6, 0.25, 0.05]), q), name="tokens that the drafter never proposes")
    )
    return cases


ACCEPT = Exercise(
    id="accept",
    title="Accept or replace a draft",
    points=2,
    reference=accept,
    cases=_two_distributions,
    mutants=[
        Mutant(
            "ratio upside down",
            _accept_with(chance="inverse"),
            "You seem to accept with q / p. A token that the drafter likes too much must be rejected sometimes: p / q.",
        ),
        Mutant(
            "accepted with p",
            _accept_with(chance="p"),
            "You accept with the probability p alone. That it was proposed with q must be divided out.",
        ),
        Mutant(
            "more than 1",
            _accept_with(chance="unclamped"),
            "Your probabilities exceed 1 where the model likes a token more than the drafter. Such a token is always "
            "accepted.",
        ),
        Mutant(
            "replaced from p",
            _accept_with(rest="p"),
            "You draw the replacement from p. Tokens often accepted would then come too often: what is missing "
            "is p - q, where that is positive.",
        ),
        Mutant(
            "absolute difference",
            _accept_with(rest="absolute"),
            "You take |p - q|. Where the drafter has too much, nothing is missing: max(0, p - q).",
        ),
        Mutant(
            "not normalized",
            _accept_with(rest="unnormalized"),
            "Your second result does not sum to 1.",
        ),
        Mutant(
            "difference the wrong way",
            _accept_with(rest="swapped"),
            "You replace from max(0, q - p), the tokens of which there were too many already.",
        ),
    ],
    hints=("Together: q min(1, p / q) + (1 - sum of min(p, q)) times the replacement must give p.",),
)

EXPECTED_TOKENS = Exercise(
    id="expected_tokens",
    title="Tokens of a pass",
    points=1,
    reference=speculative.expected_tokens,
    cases=lambda seed: [(0.5, 3), (0.9, 6), (1.0, 4), (0.0, 2), (0.73, 1)],
    mutants=[
        Mutant(
            "accepted drafts only",
            lambda a, n: float(n) if a == 1 else a * (1 - a**n) / (1 - a),
            "You count the accepted drafts. A pass always gives one more token: the replacement, or the one behind the "
            "last draft.",
        ),
        Mutant(
            "independent of order",
            lambda a, n: 1.0 + a * n,
            "You seem to count every draft with probability a. A draft counts only if all before it were accepted.",
        ),
        Mutant(
            "without an end",
            lambda a, n: math.inf if a == 1 else 1 / (1 - a),
            "Your sum has no end. There are n drafts.",
        ),
        Mutant(
            "one draft too few",
            lambda a, n: float(n) if a == 1 else (1 - a**n) / (1 - a),
            "Your sum ends one term early: n drafts give up to n + 1 tokens.",
        ),
        Mutant(
            "all or nothing",
            lambda a, n: 1.0 + n * a**n,
            "You count the drafts only if all are accepted. The accepted ones before the first rejection count too.",
        ),
    ],
    hints=("1 + a + a^2 + ... + a^n: the k-th draft counts if it and all before it are accepted.",),
)

# --- integers ---------------------------------------------------------------------------------------------------


def quantize_rows(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Integers with one scale a row, by the package's `scales_of` and `round_to_scale`.

    Args:
        weight: (O, I) float.
        bits: 4 or 8; the integers go from -(2^(bits-1) - 1) to 2^(bits-1) - 1.

    Returns:
        Integers (O, I) int8, scales (O, 1) float32: the largest magnitude of the row over the largest integer.
    """
    scales = scales_of(weight, QuantizationSettings(bits=bits))
    return round_to_scale(weight, scales, bits), scales


def _rows_with(
    *,
    dim: int | None = 1,
    largest: str = "symmetric",
    magnitude: bool = True,
    rounding: str = "round",
    inverse: bool = False,
) -> Callable[..., tuple[Tensor, Tensor]]:
    def found(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        top = {"symmetric": 2 ** (bits - 1) - 1, "unsigned": 2**bits - 1, "power": 2 ** (bits - 1)}[largest]
        size = weight.abs() if magnitude else weight
        extent = size.amax().expand(len(weight), 1) if dim is None else size.amax(dim=dim, keepdim=True)
        scales = extent.float() / top
        quotient = weight / scales
        integers = {"round": quotient.round, "floor": quotient.floor, "truncate": quotient.trunc}[rounding]()
        return integers.clamp(-128, 127).to(torch.int8), 1 / scales if inverse else scales

    return found


QUANTIZE_ROWS = Exercise(
    id="quantize_rows",
    title="Integers with a scale a row",
    points=2,
    reference=quantize_rows,
    cases=lambda seed: [
        Case((_weights(seed, 3, 7), 8), name="8 bits"),
        Case((_weights(seed + 1, 5, 6), 4), name="4 bits"),
        Case((-_weights(seed + 2, 4, 4).abs(), 8), name="negative weights only"),
    ],
    mutants=[
        Mutant(
            "scale a column",
            lambda weight, bits: (lambda r: (r[0].T.contiguous(), r[1].T))(
                _rows_with()(weight.T.contiguous(), bits)
            ),
            "Your scales are those of the columns. A row holds the weights of one output; its scale comes out of "
            "the sum.",
        ),
        Mutant(
            "one scale for all",
            _rows_with(dim=None),
            "You use one scale for the whole matrix: rows of small weights lose most of their digits.",
        ),
        Mutant(
            "range of unsigned integers",
            _rows_with(largest="unsigned"),
            "Your integers go up to 2^bits - 1. One bit is the sign.",
        ),
        Mutant(
            "range up to the power of two",
            _rows_with(largest="power"),
            "You divide by 2^(bits-1). The largest integer is one less, and the largest weight would be cut off.",
        ),
        Mutant(
            "largest instead of largest magnitude",
            _rows_with(magnitude=False),
            "You take the largest weight. A negative one may be larger in magnitude.",
        ),
        Mutant(
            "rounded down",
            _rows_with(rounding="floor"),
            "You round down, which shifts all weights. Round to the nearest.",
        ),
        Mutant(
            "truncated",
            _rows_with(rounding="truncate"),
            "You cut the fraction off, which shrinks all weights. Round to the nearest.",
        ),
        Mutant(
            "inverse scales",
            _rows_with(inverse=True),
            "Your scales are upside down: integer times scale must give the weight.",
        ),
    ],
    hints=("scale = largest magnitude of the row / (2^(bits-1) - 1), then round weight / scale.",),
)


def _weights(seed: int, n_outputs: int, n_inputs: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    size = torch.logspace(-1, 1, n_outputs)[:, None]
    weight = torch.randn(n_outputs, n_inputs, generator=g) * size
    weight[0, 1] = -3 * weight[0].abs().max()  # the largest magnitude is that of a negative weight
    return weight


EXERCISES = [SLOTS, SHARED_TOKENS, NEXT_TOKENS, GOODPUT, ACCEPT, EXPECTED_TOKENS, QUANTIZE_ROWS]
