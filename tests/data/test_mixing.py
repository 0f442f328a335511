"""Shares by temperature, worth of repetition, realized mixtures against their weights, exact resume."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import islice

import datasets
import numpy as np
import pytest

from llmcourse.data.mixing import (
    ListSource,
    MixedStream,
    MixtureSettings,
    effective_epochs,
    plan_mixture,
    temperature_weights,
)

SIZES = {"web": 900.0, "books": 90.0, "sums": 10.0}


def texts(name: str, n: int, length: int = 10) -> list[str]:
    return [f"{name}{i:04d}".ljust(length, ".") for i in range(n)]


def mixture(unit: str = "tokens", seed: int = 0) -> MixedStream:
    """Three sources whose documents differ in length by a factor of ten."""
    lists = {"web": texts("w", 50, 100), "books": texts("b", 20, 40), "sums": texts("s", 7, 10)}
    sources = {name: ListSource(documents, seed=3) for name, documents in lists.items()}
    weights = {"web": 5, "books": 3, "sums": 2}
    return MixedStream(sources, MixtureSettings(weights=weights, unit=unit, seed=seed))


# ---- shares


def test_temperatures_by_hand() -> None:
    assert temperature_weights({"a": 4, "b": 1}) == pytest.approx({"a": 0.8, "b": 0.2}, rel=1e-12)
    # sqrt(4) : sqrt(1) = 2 : 1
    assert temperature_weights({"a": 4, "b": 1}, 2.0) == pytest.approx({"a": 2 / 3, "b": 1 / 3}, rel=1e-12)
    assert temperature_weights({"a": 4, "b": 1}, math.inf) == {"a": 0.5, "b": 0.5}
    assert temperature_weights({"a": 4e30, "b": 1}, 0.01)["a"] == 1.0  # a power of 100 would overflow


def test_worth_of_repetition_follows_the_published_law() -> None:
    assert [effective_epochs(e) for e in (0, 0.5, 1)] == [0, 0.5, 1]
    # R = 3, R* = 15.39: 1 + 15.39 (1 - exp(-3 / 15.39)) = 3.7257
    assert effective_epochs(4) == pytest.approx(3.7257, abs=1e-4)
    assert effective_epochs(1e6) == pytest.approx(16.39)
    assert effective_epochs(4, decay=1.0) == pytest.approx(1 + (1 - math.exp(-3)))
    worth = [effective_epochs(e) for e in np.linspace(0, 60, 200)]
    gains = np.diff(worth)
    assert (gains > 0).all() and (
        np.diff(gains) < 1e-12
    ).all()  # each further epoch is worth less, never nothing


def test_plan_counts_epochs_and_warns_of_what_repeats_too_often() -> None:
    plan = plan_mixture(SIZES, 1000, weights={"web": 6, "books": 3, "sums": 1})
    assert plan.weights == pytest.approx({"web": 0.6, "books": 0.3, "sums": 0.1})
    assert [plan.parts[name].epochs for name in SIZES] == pytest.approx([600 / 900, 300 / 90, 100 / 10])
    assert plan.parts["sums"].effective_tokens == pytest.approx(10 * effective_epochs(10))
    assert plan.effective_tokens == pytest.approx(sum(p.effective_tokens for p in plan.parts.values()))
    assert len(plan.warnings) == 1 and plan.warnings[0].startswith("sums: 10.0 epochs")
    natural = plan_mixture(SIZES, 1000)
    assert [part.epochs for part in natural.parts.values()] == pytest.approx([1, 1, 1])
    assert natural.warnings == () and natural.effective_tokens == pytest.approx(1000)
    assert plan_mixture(SIZES, 1000, temperature=math.inf).weights == pytest.approx(
        dict.fromkeys(SIZES, 1 / 3)
    )


def test_a_capped_source_hands_its_share_to_the_others_in_proportion() -> None:
    # sums may give 4 x 10 = 40 of 1000; 960 are left for web and books at 6 : 3, but books may give 360 only
    plan = plan_mixture(SIZES, 1000, weights={"web": 6, "books": 3, "sums": 1}, max_epochs=4)
    assert [part.tokens for part in plan.parts.values()] == pytest.approx([640, 320, 40])
    tight = plan_mixture(SIZES, 1000, weights={"web": 4, "books": 5, "sums": 1}, max_epochs=4)
    assert [part.tokens for part in tight.parts.values()] == pytest.approx(
        [600, 360, 40]
    )  # capping one caps another
    assert tight.warnings == ()
    with pytest.raises(ValueError, match="at most 1500 within max_epochs"):
        plan_mixture(SIZES, 1600, max_epochs=1.5)
    assert plan_mixture(SIZES, 1500, max_epochs=1.5).effective_tokens < 1500  # exactly full


# ---- the stream


def test_shares_of_tokens_are_right_at_every_moment() -> None:
    stream = mixture()
    for number in range(1, 400):
        next(stream)
        total = sum(share.length for share in stream.shares.values())
        for name, weight in {"web": 0.5, "books": 0.3, "sums": 0.2}.items():
            assert abs(stream.shares[name].length - weight * total) <= 200, (number, name)
    shares = stream.shares
    assert [shares[name].share for name in shares] == pytest.approx([0.5, 0.3, 0.2], abs=0.01)
    assert shares["sums"].epochs == shares["sums"].documents / 7 and stream.epoch == shares["sums"].epochs
    assert sum(share.documents for share in shares.values()) == 399


def test_every_document_once_an_epoch_in_an_order_of_its_own() -> None:
    source = ListSource(texts("d", 10), seed=1)
    epochs = [[source.next() for _ in range(10)] for _ in range(3)]
    assert all(sorted(epoch) == texts("d", 10) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and source.epoch == 3
    assert [ListSource(texts("d", 10), seed=2).next() for _ in range(10)] != epochs[0]


def test_documents_are_drawn_as_interleave_datasets_draws_them() -> None:
    n, probabilities = 6_000, [0.5, 0.3, 0.2]
    ours = Counter(name for name, _ in (stream.next_named() for stream in [mixture("documents")] * n))
    parts = [datasets.Dataset.from_dict({"name": [name] * 9_000}) for name in ("web", "books", "sums")]
    library = datasets.interleave_datasets(parts, probabilities=probabilities, seed=0)
    theirs = Counter(library["name"][:n])
    for name, p in zip(("web", "books", "sums"), probabilities, strict=True):
        error = math.sqrt(n * p * (1 - p))
        assert abs(ours[name] - n * p) < 4 * error and abs(theirs[name] - n * p) < 4 * error
        assert abs(ours[name] - theirs[name]) < 4 * math.sqrt(2) * error
    # two of the same distribution: chi-square of a 2 x 3 table, 2 degrees of freedom, p = 0.0001 at 18.4
    total = ours + theirs
    assert sum((c[k] - total[k] / 2) ** 2 / (total[k] / 2) for c in (ours, theirs) for k in total) < 18.4


def test_unit_and_seed_change_the_stream() -> None:
    def first(stream: MixedStream) -> list[str]:
        return list(islice(stream, 100))

    assert first(mixture()) == first(mixture())
    assert first(mixture()) != first(mixture("documents"))
    assert first(mixture("documents", 0)) != first(mixture("documents", 1))
    characters = MixedStream(
        {"a": ListSource(["xxxx"]), "b": ListSource(["y"])},
        MixtureSettings(weights={"a": 1, "b": 1}),
        length=lambda _: 1,
    )
    assert Counter(islice(characters, 10)) == {"xxxx": 5, "y": 5}


@pytest.mark.parametrize("unit", ["tokens", "documents"])
@pytest.mark.parametrize("stop", [0, 1, 76, 1024, 1500])
def test_a_resumed_stream_goes_on_with_the_same_documents(unit: str, stop: int) -> None:
    stream = mixture(unit)
    for _ in range(stop):
        next(stream)
    saved = json.loads(json.dumps(stream.state_dict()))
    expected = [stream.next_named() for _ in range(600)]
    resumed = mixture(unit)
    next(resumed)  # must not matter
    resumed.load_state_dict(saved)
    assert [resumed.next_named() for _ in range(600)] == expected
    assert resumed.state_dict() == stream.state_dict() and resumed.shares == stream.shares


def test_streams_nest() -> None:
    inner = mixture()
    outer = MixedStream(
        {"mix": inner, "more": ListSource(texts("m", 5))}, MixtureSettings(weights={"mix": 1, "more": 1})
    )
    list(islice(outer, 30))
    state = outer.state_dict()
    expected = list(islice(outer, 30))
    outer.load_state_dict(state)
    assert list(islice(outer, 30)) == expected


# ---- refusals


def test_wrong_numbers_are_refused() -> None:
    for bad, message in [
        (lambda: temperature_weights({}), "tokens is empty"),
        (lambda: temperature_weights({"a": 0}), r"tokens\['a'\]=0"),
        (lambda: temperature_weights({"a": math.nan}), r"tokens\['a'\]=nan"),
        (lambda: temperature_weights({"a": 1}, 0), "temperature=0"),
        (lambda: effective_epochs(-1), "epochs=-1"),
        (lambda: effective_epochs(math.nan), "epochs=nan"),
        (lambda: effective_epochs(2, decay=0), "decay=0"),
        (lambda: plan_mixture(SIZES, 0), "budget=0"),
        (lambda: plan_mixture(SIZES, 10, max_epochs=0), "max_epochs=0"),
        (lambda: plan_mixture(SIZES, 10, weights={"web": 1}), "name the same"),
        (lambda: plan_mixture({"a": 1}, 10, weights={"a": -1}), r"weights\['a'\]=-1"),
        (lambda: MixtureSettings(weights={}), "weights is empty"),
        (lambda: MixtureSettings(weights={"a": 0}), r"weights\['a'\]=0"),
        (lambda: MixtureSettings(weights={"a": 1}, unit="words"), "unit='words'"),
        (lambda: MixtureSettings(weights={"a": 1}, seed=-1), "seed=-1"),
        (lambda: ListSource([]), "no documents"),
        (lambda: ListSource(["a"], seed=-1), "seed=-1"),
        (lambda: MixedStream({"b": ListSource(["x"])}, MixtureSettings(weights={"a": 1})), "name the same"),
    ]:
        with pytest.raises(ValueError, match=message):
            bad()


def test_a_state_of_another_mixture_is_refused() -> None:
    state = mixture().state_dict()
    with pytest.raises(ValueError, match="unit=tokens, this one has unit=documents"):
        mixture("documents").load_state_dict(state)
    other = mixture()
    other.sources["sums"] = ListSource(["just one"], seed=3)
    with pytest.raises(ValueError, match="n_documents=7, this one has n_documents=1"):
        other.load_state_dict(state)
