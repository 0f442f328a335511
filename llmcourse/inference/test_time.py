"""Test-time compute: more tokens for one question, in parallel (votes, best of n) or in sequence (budget forcing).

Shapes: P problems, N samples of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from llmcourse.inference.generation import TextCodec, generate
from llmcourse.inference.sampling import SamplingParams
from llmcourse.models.transformer import Transformer

Answer = TypeVar("Answer", bound=Hashable)
Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Sample:
    """One response to a prompt."""

    ids: tuple[int, ...]
    """its token ids, without the stop token"""
    text: str
    """the same as text"""
    n_tokens: int
    """tokens that were generated for it, those thrown away and the stop token included (but where a stop string ends
    it)"""


def sample_many(
    model: Transformer,
    tokenizer: TextCodec,
    prompts: Prompts,
    n: int,
    params: SamplingParams,
    *,
    stop_ids: Sequence[int] | None = None,
    batch_size: int = 256,
) -> list[list[Sample]]:
    """`n` independent responses to each prompt (token ids): P lists of n.

    `stop_ids` end a response; by default the tokenizer's end of text.

    Raises:
        ValueError: fewer than 1 sample or row, several samples of greedy decoding, or whatever `generate` refuses.
    """
    if n < 1 or batch_size < 1:
        raise ValueError(f"n={n}, batch_size={batch_size}: give at least 1 of each")
    if n > 1 and params.greedy:
        raise ValueError(f"n={n} greedy samples are all the same: set temperature above 0")
    rows = [(p, prompt) for p, prompt in enumerate(prompts) for _ in range(n)]
    rows.sort(key=lambda row: len(row[1]))  # like lengths together: less padding
    stops = (tokenizer.eos_id,) if stop_ids is None else tuple(stop_ids)
    samples: list[list[Sample]] = [[] for _ in prompts]
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        batch, own = [prompt for _, prompt in part], params.with_seed_plus(start)
        new = generate(model, batch, own, stop_ids=stops, tokenizer=tokenizer)
        for (p, prompt), ids in zip(part, new, strict=True):
            stopped = len(ids) < room_for(model, prompt, params) and not params.stop
            samples[p].append(Sample(tuple(ids), tokenizer.decode(ids), len(ids) + stopped))
    return samples


def room_for(model: Transformer, prompt: Sequence[int], params: SamplingParams) -> int:
    """The most tokens that `generate` can add to a prompt; a response that is shorter was ended by a stop."""
    return min(params.max_new_tokens, model.config.context_length - len(prompt))


def budget_forced(
    model: Transformer,
    tokenizer: TextCodec,
    prompts: Prompts,
    params: SamplingParams,
    *,
    budget: int,
    closing: Sequence[int],
    waiting: Sequence[int] = (),
    extensions: int = 0,
    stop_ids: Sequence[int] | None = None,
) -> list[Sample]:
    """Let each response think for `budget` tokens or longer, then make it answer (Muennighoff et al., 2025, section
    3.1).

    Too long: after `budget` tokens without a stop, `closing` is written for the model, such as the words that open the
    answer, and it goes on from there. Too short: a stop is replaced by `waiting`, such as "Wait", at most `extensions`
    times, while the budget lasts. What is written for the model counts towards the budget's tokens but not towards
    `n_tokens`: those are the model's own. `params.max_new_tokens` bounds the answer after the closing words. A response
    that would outgrow the context ends there.

    Raises:
        ValueError: a budget below 1, extensions without waiting tokens, stop strings (they would hide the stop), or
            whatever `generate` refuses.
    """
    if budget < 1:
        raise ValueError(f"budget={budget}: give at least 1 token")
    if extensions and not waiting:
        raise ValueError(f"extensions={extensions} need waiting tokens: pass waiting=")
    if params.stop:
        raise ValueError(f"stop={params.stop!r}: budget forcing needs stop ids, not strings")
    stops = (tokenizer.eos_id,) if stop_ids is None else tuple(stop_ids)
    runs = [_Run(list(prompt), budget) for prompt in prompts]
    for phase in range(extensions + 1):
        _think(model, runs, params, stops, phase)
        if phase < extensions:
            for run in runs:
                run.prolong(waiting)
    _answer(model, runs, params, stops, closing)
    return [Sample(tuple(run.new), tokenizer.decode(run.new), run.generated) for run in runs]


ANSWER_SEED = 1_000_003


class _Run:
    """A response while its budget is spent."""

    def __init__(self, prompt: list[int], budget: int) -> None:
        self.prompt, self.left = prompt, budget
        self.new: list[int] = []
        self.generated, self.stopped = 0, False

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.new

    def prolong(self, waiting: Sequence[int]) -> None:
        if self.stopped and self.left > len(waiting):
            self.new += waiting
            self.left -= len(waiting)
            self.stopped = False


def _continue(model: Transformer, runs: list[_Run], params: SamplingParams, stops: tuple[int, ...]) -> None:
    """Generate for each run that has room in the context; note whether it stopped by itself."""
    runs = [run for run in runs if len(run.ids) < model.config.context_length]
    for run, ids in zip(runs, generate(model, [r.ids for r in runs], params, stop_ids=stops), strict=True):
        run.stopped = len(ids) < room_for(model, run.ids, params)
        run.new += ids
        run.left -= len(ids)
        run.generated += len(ids) + run.stopped


def _think(
    model: Transformer, runs: list[_Run], params: SamplingParams, stops: tuple[int, ...], phase: int
) -> None:
    """One stretch of thinking; runs with the same budget left share a batch."""
    active = [run for run in runs if not run.stopped and run.left > 0]
    for number, left in enumerate(sorted({run.left for run in active})):
        group = [run for run in active if run.left == left]
        own = replace(params.with_seed_plus(1009 * phase + number), max_new_tokens=left)
        _continue(model, group, own, stops)


def _answer(
    model: Transformer,
    runs: list[_Run],
    params: SamplingParams,
    stops: tuple[int, ...],
    closing: Sequence[int],
) -> None:
    """Runs that are still thinking get the closing words and answer."""
    room = model.config.context_length - len(closing)
    cut = [run for run in runs if not run.stopped and len(run.ids) < room]
    for run in cut:
        run.new += closing
    _continue(
        model, cut, params.with_seed_plus(ANSWER_SEED), stops
    )  # not the numbers that thinking drew with


def majority_vote(answers: Sequence[Answer | None]) -> Answer | None:
    """The most frequent answer; of several, the one that came first. `None`, no answer, is no vote.

    Self-consistency (Wang et al., 2022): reasoning that goes wrong goes wrong in many ways, so that right answers
    agree more often than wrong ones.
    """
    return weighted_vote(answers, [1.0] * len(answers))


def weighted_vote(answers: Sequence[Answer | None], weights: Sequence[float]) -> Answer | None:
    """The answer with the largest sum of weights, such as scores of a reward model; of several, the first.

    Raises:
        ValueError: another number of weights than of answers, or a weight that is not finite.
    """
    _check_scores(weights, len(answers))
    totals: dict[Answer, float] = {}
    for answer, weight in zip(answers, weights, strict=True):
        if answer is not None:
            totals[answer] = totals.get(answer, 0.0) + weight
    return max(totals, key=totals.__getitem__) if totals else None


def best_of_n(scores: Sequence[float]) -> int:
    """Index of the sample with the highest score, the first of several (Stiennon et al., 2020).

    Raises:
        ValueError: no score, or one that is not finite.
    """
    _check_scores(scores, len(scores))
    if not len(scores):
        raise ValueError("best of no sample: give at least one score")
    return max(range(len(scores)), key=scores.__getitem__)


def pass_at_k(n: int, n_right: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right, from n samples (Chen et al., 2021, eq. 1).

    1 - C(n - n_right, k) / C(n, k): the share of sets of k among the n that hold a right one.

    Raises:
        ValueError: n_right outside 0 to n, or k outside 1 to n.
    """
    if not 0 <= n_right <= n:
        raise ValueError(f"n_right={n_right}: must be from 0 to n={n}")
    if not 1 <= k <= n:
        raise ValueError(f"k={k}: must be from 1 to n={n}, draw more samples")
    return 1.0 - math.comb(n - n_right, k) / math.comb(n, k)


@dataclass(frozen=True)
class TestTimePoint:
    """What k samples a problem buy. The arrays have a number per problem (P,), ready for a bootstrap."""

    __test__ = False  # not a test class, whatever pytest makes of the name

    k: int
    """samples of a problem"""
    tokens: np.ndarray
    """mean generated tokens of a problem's k samples"""
    majority: np.ndarray
    """share of sets of k whose majority vote is right"""
    best: np.ndarray | None
    """share of sets of k whose sample of the highest score is right; `None` without scores"""
    any_right: np.ndarray
    """pass@k: what a perfect chooser would reach"""


def accuracy_against_tokens(
    answers: Sequence[Sequence[Answer | None]],
    truths: Sequence[Answer],
    n_tokens: Sequence[Sequence[int]],
    ks: Sequence[int],
    *,
    scores: Sequence[Sequence[float]] | None = None,
    draws: int = 64,
    seed: int = 0,
) -> list[TestTimePoint]:
    """Accuracy of votes, of best-of-k and of a perfect chooser for each k, from N samples of each of P problems.

    Votes and best-of-k average over `draws` random sets of k of the N samples, the same sets for both, in random order,
    so that ties are broken at random; pass@k is exact. One set of N samples thus gives the whole curve; points of
    different k share samples, so their errors are correlated.

    Args:
        answers: P lists of N answers, `None` where a sample has none.
        truths: P right answers.
        n_tokens: P lists of N token counts.
        ks: numbers of samples, each from 1 to N.
        scores: P lists of N scores of a verifier.
        draws: sets for each problem and k.
        seed: of the sets.

    Raises:
        ValueError: lists of different lengths, a k outside 1 to N, a score that is not finite, or no draws.
    """
    _check_table(answers, truths, n_tokens, scores)
    if draws < 1:
        raise ValueError(f"draws={draws}: give at least 1")
    n = len(answers[0])
    rng = np.random.default_rng(seed)
    right = np.array([[a == t for a in row] for row, t in zip(answers, truths, strict=True)])  # (P, N)
    mean_tokens = np.asarray(n_tokens, dtype=float).mean(axis=1)
    points = []
    for k in ks:
        any_right = np.array([pass_at_k(n, int(c), k) for c in right.sum(axis=1)])
        sets = rng.permuted(np.tile(np.arange(n), (draws, 1)), axis=1)[:, :k]  # (draws, k)
        votes = _share(
            sets, answers, truths, lambda p, chosen: majority_vote([answers[p][i] for i in chosen])
        )
        best = None
        if scores is not None:
            best = _share(sets, answers, truths, _best_answer(answers, scores))
        points.append(TestTimePoint(k, k * mean_tokens, votes, best, any_right))
    return points


def _best_answer(
    answers: Sequence[Sequence[Answer | None]], scores: Sequence[Sequence[float]]
) -> Callable[[int, np.ndarray], Answer | None]:
    return lambda p, chosen: answers[p][chosen[best_of_n([scores[p][i] for i in chosen])]]


def _share(
    sets: np.ndarray,
    answers: Sequence[Sequence[Answer | None]],
    truths: Sequence[Answer],
    choose: Callable[[int, np.ndarray], Answer | None],
) -> np.ndarray:
    """For each problem, the share of sets from which `choose(problem, set)` picks the truth, (P,)."""
    return np.array(
        [np.mean([choose(p, chosen) == truths[p] for chosen in sets]) for p in range(len(answers))]
    )


def _check_scores(scores: Sequence[float], n: int) -> None:
    if len(scores) != n:
        raise ValueError(f"{len(scores)} weights for {n} answers: give one each")
    for i, score in enumerate(scores):
        if not math.isfinite(score):
            raise ValueError(f"score {i} is {score}: give finite numbers")


def _check_table(
    answers: Sequence[Sequence[object]],
    truths: Sequence[object],
    n_tokens: Sequence[Sequence[int]],
    scores: Sequence[Sequence[float]] | None,
) -> None:
    tables = {"truths": truths, "n_tokens": n_tokens} | ({} if scores is None else {"scores": scores})
    for name, table in tables.items():
        if len(table) != len(answers) or not len(answers):
            raise ValueError(
                f"{len(table)} {name} for {len(answers)} problems: give one for each of at least 1"
            )
    widths = {len(row) for table in (answers, n_tokens, *([scores] if scores else [])) for row in table}
    if len(widths) != 1:
        raise ValueError(f"rows of {sorted(widths)} samples: every problem needs as many")
