"""Exercises of chapter 18, interpretability: lenses, credit, induction, patches, directions, sparse codes, detectors.

Shapes: B rows, T tokens, D d_model, V vocab_size, P parts, H heads, N places, M latents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmcourse.checks.exercise import Case, Exercise, Mutant
from llmcourse.interpretability.features import feature_auc
from llmcourse.interpretability.patching import recovered as share_recovered
from llmcourse.models.attention import rms_norm


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- the logit lens ---------------------------------------------------------------------------------------------


def lens(residual: Tensor, gain: Tensor, head: Tensor, eps: float = 1e-5) -> Tensor:
    """Log-probabilities that a residual stream stands for, read with the model's own final norm and head.

    Args:
        residual: (B, T, D), from any layer.
        gain: (D,), of the final RMSNorm.
        head: (V, D).
        eps: of the norm.

    Returns:
        (B, T, V) in nats.
    """
    return (rms_norm(residual, gain, eps) @ head.T).log_softmax(dim=-1)


def _lens_with(
    *, norm: str = "rms", log: bool = True, dim: int = -1, with_gain: bool = True
) -> Callable[..., Tensor]:
    def found(residual: Tensor, gain: Tensor, head: Tensor, eps: float = 1e-5) -> Tensor:
        if norm == "rms":
            x = rms_norm(residual, gain if with_gain else torch.ones_like(gain), eps)
        elif norm == "layer":
            x = torch.nn.functional.layer_norm(residual, residual.shape[-1:], gain, None, eps)
        else:
            x = residual * gain
        logits = x @ head.T
        return logits.log_softmax(dim=dim) if log else logits.softmax(dim=dim)

    return found


def _stream(seed: int, b: int, t: int, d: int, v: int) -> Case:
    g = _generator(seed)
    residual = 3 * torch.randn(b, t, d, generator=g) + 1
    return Case(
        (residual, 0.5 + torch.rand(d, generator=g), torch.randn(v, d, generator=g)), name=f"{b} rows of {t}"
    )


LENS = Exercise(
    id="lens",
    title="Logit lens",
    points=1,
    reference=lens,
    cases=lambda seed: [_stream(seed, 2, 3, 6, 5), _stream(seed + 1, 1, 4, 8, 11)],
    mutants=[
        Mutant(
            "no norm",
            _lens_with(norm="none"),
            "You leave out the final norm. The head was trained on what comes out of it; early streams are shorter.",
        ),
        Mutant(
            "layer norm",
            _lens_with(norm="layer"),
            "You subtract the mean. RMSNorm divides by the root mean square and subtracts nothing.",
        ),
        Mutant("no gain", _lens_with(with_gain=False), "The gain of the norm is missing."),
        Mutant(
            "probabilities",
            _lens_with(log=False),
            "You return probabilities. Asked for are their logarithms.",
        ),
        Mutant(
            "over positions",
            _lens_with(dim=1),
            "You normalize over positions. The vocabulary is the last axis.",
        ),
    ],
    hints=("Norm, head, log_softmax over the vocabulary.",),
)

# --- credit for a logit -----------------------------------------------------------------------------------------


def credit(parts: Tensor, gain: Tensor, direction: Tensor, eps: float = 1e-5) -> Tensor:
    """What each part of the stream adds to a logit (or to a difference of logits).

    Args:
        parts: (P, D); their sum is the stream behind the last block.
        gain: (D,), of the final RMSNorm.
        direction: (D,), a row of the head, or the difference of two.
        eps: of the norm.

    Returns:
        (P,), whose sum is the logit.
    """
    whole = parts.sum(dim=0)
    scale = (whole.pow(2).mean() + eps).rsqrt()
    return parts @ (direction * gain) * scale


def _credit_with(*, scale: str = "whole", with_gain: bool = True) -> Callable[..., Tensor]:
    def found(parts: Tensor, gain: Tensor, direction: Tensor, eps: float = 1e-5) -> Tensor:
        weighted = direction * gain if with_gain else direction
        whole = parts.sum(dim=0)
        by = {
            "whole": (whole.pow(2).mean() + eps).rsqrt(),
            "own": (parts.pow(2).mean(dim=-1) + eps).rsqrt(),
            "none": torch.ones(()),
            "length": 1 / whole.norm(),
        }[scale]
        values = parts @ weighted * by
        return values

    return found


def _credit_share(parts: Tensor, gain: Tensor, direction: Tensor, eps: float = 1e-5) -> Tensor:
    values = credit(parts, gain, direction, eps)
    return values / values.sum()


def _parts(seed: int, p: int, d: int) -> Case:
    g = _generator(seed)
    return Case(
        (2 * torch.randn(p, d, generator=g), 0.5 + torch.rand(d, generator=g), torch.randn(d, generator=g)),
        name=f"{p} parts",
    )


CREDIT = Exercise(
    id="credit",
    title="Credit for a logit",
    points=2,
    reference=credit,
    cases=lambda seed: [_parts(seed, 4, 6), _parts(seed + 1, 9, 5)],
    mutants=[
        Mutant(
            "each part normalized",
            _credit_with(scale="own"),
            "You normalize each part by its own size. Then they do not add up: the scale is that of the whole stream.",
        ),
        Mutant(
            "no scale",
            _credit_with(scale="none"),
            "The norm's scale is missing: your terms add up to the logit of an unnormalized stream.",
        ),
        Mutant(
            "divided by the length",
            _credit_with(scale="length"),
            "You divide by the length of the stream. RMSNorm divides by the root of the *mean* square.",
        ),
        Mutant("no gain", _credit_with(with_gain=False), "The gain of the norm is missing."),
        Mutant(
            "shares",
            _credit_share,
            "You return shares of the logit. Asked for are the terms themselves, which may have either sign.",
        ),
    ],
    hints=("One scale for all parts, from their sum; then a dot product with gain times direction.",),
)

# --- induction --------------------------------------------------------------------------------------------------


def induction_score(pattern: Tensor, length: int) -> Tensor:
    """Mean attention from the second copy of a repeated text to the token behind its first occurrence.

    Args:
        pattern: (H, T, T), query by key, of a text whose last 2 length tokens are a part and its repetition.
        length: tokens of the part.

    Returns:
        (H,). The last token, behind which nothing has to be predicted from the repetition, does not count.
    """
    T = pattern.shape[-1]
    queries = torch.arange(T - length, T - 1)
    return pattern[:, queries, queries - length + 1].mean(dim=-1)


def _score_with(
    *, offset: int = 1, first: int = 0, last: int = 1, transpose: bool = False
) -> Callable[..., Tensor]:
    def found(pattern: Tensor, length: int) -> Tensor:
        p = pattern.transpose(-1, -2) if transpose else pattern
        T = p.shape[-1]
        queries = torch.arange(T - length - first, T - last)
        keys = (queries - length + offset).clamp(min=0)
        return p[:, queries, keys].mean(dim=-1)

    return found


def _pattern_case(seed: int, h: int, length: int, more: int) -> Case:
    T = 2 * length + more
    scores = 2 * torch.randn(h, T, T, generator=_generator(seed))
    pattern = scores.masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf")).softmax(dim=-1)
    return Case(
        (pattern, length), name=f"{h} heads, a part of {length}" + (" behind one token" if more else "")
    )


INDUCTION_SCORE = Exercise(
    id="induction_score",
    title="Induction score",
    points=2,
    reference=induction_score,
    cases=lambda seed: [_pattern_case(seed, 3, 5, 0), _pattern_case(seed + 1, 2, 7, 1)],
    mutants=[
        Mutant(
            "same token",
            _score_with(offset=0),
            "You look at the token's earlier occurrence. Induction looks at the token *behind* it, which comes next.",
        ),
        Mutant(
            "token before", _score_with(offset=-1), "You look at the token before the earlier occurrence."
        ),
        Mutant(
            "query and key exchanged",
            _score_with(transpose=True),
            "You seem to have exchanged queries and keys: rows of the pattern are queries.",
        ),
        Mutant("first half too", _score_with(first=1), "Your queries begin before the second copy."),
        Mutant(
            "last token too",
            _score_with(last=0),
            "You count the last token. Behind it the repetition has ended.",
        ),
    ],
    hints=("Queries are the tokens of the second copy but the last; the key of query t is t - length + 1.",),
)

# --- patches ----------------------------------------------------------------------------------------------------


def patch(corrupted: Tensor, clean: Tensor, positions: list[int]) -> Tensor:
    """The corrupted run's activation with that of the clean run at some positions.

    Args:
        corrupted: (B, T, D).
        clean: (B, T, D).
        positions: which of the T.

    Returns:
        (B, T, D), a new tensor.
    """
    found = corrupted.clone()
    found[:, positions] = clean[:, positions]
    return found


def _patch_in_place(corrupted: Tensor, clean: Tensor, positions: list[int]) -> Tensor:
    corrupted[:, positions] = clean[:, positions]
    return corrupted


def _patch_with(index: Callable[[Tensor, Tensor, list[int]], Tensor]) -> Callable[..., Tensor]:
    return lambda corrupted, clean, positions: index(corrupted.clone(), clean, positions)


def _set(target: Tensor, key: Any, value: Tensor) -> Tensor:
    target[key] = value
    return target


PATCH = Exercise(
    id="patch",
    title="Patch an activation",
    points=1,
    reference=patch,
    cases=lambda seed: [
        Case((*torch.randn(2, 3, 5, 4, generator=_generator(seed)), [2]), name="one position"),
        Case((*torch.randn(2, 4, 6, 3, generator=_generator(seed + 1)), [0, 3]), name="two positions"),
    ],
    mutants=[
        Mutant(
            "the other way",
            lambda corrupted, clean, positions: patch(clean, corrupted, positions),
            "You put the corrupted activation into the clean run. Here the clean one is to bring the answer back.",
        ),
        Mutant(
            "written into the input",
            _patch_in_place,
            "You write into the recorded activation. The next patch would start from it: clone first.",
        ),
        Mutant(
            "rows",
            _patch_with(lambda c, k, p: _set(c, p, k[p])),
            "You patch rows of the batch. Positions are the second axis.",
        ),
        Mutant(
            "channels",
            _patch_with(lambda c, k, p: _set(c, (slice(None), slice(None), p), k[:, :, p])),
            "You patch channels. Positions are the second axis.",
        ),
        Mutant(
            "mean of both",
            _patch_with(lambda c, k, p: _set(c, (slice(None), p), (c[:, p] + k[:, p]) / 2)),
            "You mix the two activations. A patch replaces.",
        ),
    ],
    hints=("Clone, then assign at [:, positions].",),
)


def recovered(patched: Tensor, clean: Tensor, corrupted: Tensor) -> Tensor:
    """The share of the difference that patches bring back, by the package's function: 0 as corrupted, 1 as clean.

    Args:
        patched: (L, T, B), a metric of each patched run.
        clean: (B,).
        corrupted: (B,).

    Returns:
        (L, T): means over the pairs B first, then the ratio.
    """
    return share_recovered(patched, clean, corrupted)


RECOVERED = Exercise(
    id="recovered",
    title="Share of the effect recovered",
    points=1,
    reference=recovered,
    cases=lambda seed: [
        Case(
            (
                torch.randn(3, 4, 5, generator=_generator(seed)),
                2 + torch.rand(5, generator=_generator(seed + 1)),
                -torch.rand(5, generator=_generator(seed + 2)),
            ),
            name="5 pairs",
        ),
        Case(
            (
                torch.randn(2, 3, 7, generator=_generator(seed + 3)),
                3 * torch.rand(7, generator=_generator(seed + 4)) + 1,
                torch.rand(7, generator=_generator(seed + 5)) - 0.3,
            ),
            name="7 pairs",
        ),
    ],
    mutants=[
        Mutant(
            "mean of ratios",
            lambda p, k, c: ((p - c) / (k - c)).mean(dim=-1),
            "You average ratios of pairs. A pair with hardly any difference then outweighs all others: means first.",
        ),
        Mutant(
            "from clean",
            lambda p, k, c: (k.mean() - p.mean(dim=-1)) / (k.mean() - c.mean()),
            "Yours is 1 for the corrupted run and 0 for the clean one.",
        ),
        Mutant(
            "no baseline",
            lambda p, k, c: p.mean(dim=-1) / k.mean(),
            "You divide by the clean value alone. What the corrupted run has anyway is not recovered.",
        ),
        Mutant(
            "difference",
            lambda p, k, c: p.mean(dim=-1) - c.mean(),
            "You give the difference. Divide by that between clean and corrupted.",
        ),
        Mutant(
            "clipped",
            lambda p, k, c: ((p.mean(dim=-1) - c.mean()) / (k.mean() - c.mean())).clamp(0, 1),
            "You clip. A patch can do harm, or more than the clean run: both are worth seeing.",
        ),
    ],
    hints=("(mean patched - mean corrupted) / (mean clean - mean corrupted).",),
)

# --- directions -------------------------------------------------------------------------------------------------


def project_out(x: Tensor, vector: Tensor) -> Tensor:
    """x without its component along a vector.

    Args:
        x: (B, T, D).
        vector: (D,), of any length but 0.
    """
    unit = vector / vector.norm()
    return x - (x @ unit)[..., None] * unit


PROJECT_OUT = Exercise(
    id="project_out",
    title="Take a direction out",
    points=1,
    reference=project_out,
    cases=lambda seed: [
        Case(
            (
                torch.randn(2, 3, 5, generator=_generator(seed)),
                4 * torch.randn(5, generator=_generator(seed + 1)),
            )
        ),
        Case(
            (
                torch.randn(1, 4, 7, generator=_generator(seed + 2)),
                0.2 * torch.randn(7, generator=_generator(seed + 3)),
            )
        ),
    ],
    mutants=[
        Mutant(
            "vector not normalized",
            lambda x, v: x - (x @ v)[..., None] * v,
            "You do not divide by the vector's length: what you subtract grows with its square.",
        ),
        Mutant(
            "normalized once",
            lambda x, v: x - (x @ (v / v.norm()))[..., None] * v,
            "You normalize once. Both places want the unit vector.",
        ),
        Mutant(
            "subtracted whole",
            lambda x, v: x - v / v.norm(),
            "You subtract the unit vector itself, whatever x has along it.",
        ),
        Mutant(
            "reflected",
            lambda x, v: x - 2 * (x @ (v / v.norm()))[..., None] * (v / v.norm()),
            "You subtract twice: that turns the component around instead of removing it.",
        ),
        Mutant(
            "kept",
            lambda x, v: (x @ (v / v.norm()))[..., None] * (v / v.norm()),
            "You keep the component and drop the rest.",
        ),
    ],
    hints=("x - (x . u) u with u = v / |v|.",),
)

# --- sparse codes -----------------------------------------------------------------------------------------------


def top_k_code(x: Tensor, encoder: Tensor, directions: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Latents and reconstruction of a TopK autoencoder without biases.

    Args:
        x: (N, D).
        encoder: (M, D).
        directions: (M, D), of length 1.
        k: latents that stay.

    Returns:
        Latents (N, M): relu(x encoder^T), of which the k largest of each row stay and the others are 0; their sum of
        directions (N, D).
    """
    scores = (x @ encoder.T).relu()
    values, indices = scores.topk(k, dim=-1)
    latents = torch.zeros_like(scores).scatter(-1, indices, values)
    return latents, latents @ directions


def _code_with(
    *,
    relu: bool = True,
    of: str = "rows",
    size: bool = False,
    least: bool = False,
    values: str = "kept",
    binary: bool = False,
) -> Callable[..., tuple[Tensor, Tensor]]:
    def found(x: Tensor, encoder: Tensor, directions: Tensor, k: int) -> tuple[Tensor, Tensor]:
        scores = x @ encoder.T
        raw = scores
        scores = scores.relu() if relu else scores
        rank = raw.abs() if size else scores
        if of == "columns":
            indices = rank.topk(k, dim=0).indices
            mask = torch.zeros_like(scores).scatter(0, indices, 1.0)
        else:
            indices = rank.topk(k, dim=-1, largest=not least).indices
            mask = torch.zeros_like(scores).scatter(-1, indices, 1.0)
        latents = mask if binary else mask * scores
        return latents, latents @ directions

    return found


def _code_case(seed: int, n: int, d: int, m: int, k: int) -> Case:
    g = _generator(seed)
    directions = torch.nn.functional.normalize(torch.randn(m, d, generator=g), dim=1)
    x = torch.randn(n, d, generator=g)
    x[0] = -3 * directions.sum(dim=0)  # few or no positive scores
    return Case((x, directions + 0.1 * torch.randn(m, d, generator=g), directions, k), name=f"{k} of {m}")


TOP_K_CODE = Exercise(
    id="top_k_code",
    title="Sparse code",
    points=2,
    reference=top_k_code,
    cases=lambda seed: [_code_case(seed, 5, 4, 7, 2), _code_case(seed + 1, 6, 5, 9, 3)],
    mutants=[
        Mutant(
            "negative latents",
            _code_with(relu=False),
            "Latents may become negative in your code where fewer than k scores are positive: apply the relu.",
        ),
        Mutant(
            "largest magnitudes",
            _code_with(size=True),
            "You choose by magnitude. A strongly negative score then takes a place and is cut to 0.",
        ),
        Mutant(
            "k of each latent",
            _code_with(of="columns"),
            "You keep k places for each latent. It is k latents for each place.",
        ),
        Mutant("smallest", _code_with(least=True), "You keep the smallest."),
        Mutant(
            "ones", _code_with(binary=True), "Your latents are 0 or 1. The chosen ones keep their values."
        ),
    ],
    hints=("relu, topk along the last axis, scatter the values into zeros.",),
)

# --- detectors --------------------------------------------------------------------------------------------------


def auc(values: Tensor, truth: Tensor) -> Tensor:
    """Area under the ROC curve of one feature, by the package's `feature_auc`: the probability that a place with the
    property has the larger value than one without, ties counted by half.

    Args:
        values: (N,).
        truth: (N,) bool.

    Returns:
        A number, () float64.
    """
    return feature_auc(values[:, None], truth)[0]


def _pairs(values: Tensor, truth: Tensor, tie: float = 0.5) -> Tensor:
    a, b = values[truth][:, None].double(), values[~truth][None].double()
    return ((a > b).double() + tie * (a == b).double()).mean()


AUC = Exercise(
    id="auc",
    title="Area under the ROC curve",
    points=2,
    reference=auc,
    cases=lambda seed: [
        Case(
            (_sparse(seed, 30), torch.rand(30, generator=_generator(seed + 1)) < 0.3), name="a sparse feature"
        ),
        Case(
            (torch.tensor([0.0, 0.0, 2.0, 1.0, 0.0]), torch.tensor([True, False, True, False, False])),
            name="ties",
        ),
    ],
    mutants=[
        Mutant(
            "ties lost",
            lambda v, t: _pairs(v, t, 0.0),
            "Ties count nothing in your result. Most values of a sparse feature are 0, so ties decide: half each.",
        ),
        Mutant(
            "ties won",
            lambda v, t: _pairs(v, t, 1.0),
            "Ties count as won. They say nothing either way: half each.",
        ),
        Mutant(
            "the other way",
            lambda v, t: 1 - _pairs(v, t),
            "Yours is 1 for a feature that is large where the property is *not*.",
        ),
        Mutant(
            "accuracy",
            lambda v, t: ((v > 0) == t).double().mean(),
            "You give the accuracy of the rule value > 0. AUC has no threshold.",
        ),
        Mutant(
            "difference of means",
            lambda v, t: (v[t].mean() - v[~t].mean()).double(),
            "You give a difference of means, which depends on the scale of the feature.",
        ),
    ],
    hints=("Compare every place with the property with every place without.",),
)


def _sparse(seed: int, n: int) -> Tensor:
    g = _generator(seed)
    return torch.rand(n, generator=g) * (torch.rand(n, generator=g) < 0.4)


EXERCISES = [LENS, CREDIT, INDUCTION_SCORE, PATCH, RECOVERED, PROJECT_OUT, TOP_K_CODE, AUC]
