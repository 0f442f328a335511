"""Learning-rate schedules: values by hand, continuity, warm-up, the end, dispatch by name."""

from __future__ import annotations

import pytest

from llmcourse.training.schedules import (
    SCHEDULES,
    cosine,
    factor,
    linear,
    progress_after_warmup,
    warm_up,
    warmup_stable_decay,
)


def curve(name: str, steps: int = 100, warmup_steps: int = 10, **options: float) -> list[float]:
    return [
        factor(name, step, steps=steps, warmup_steps=warmup_steps, **options) for step in range(steps + 1)
    ]


def test_warm_up_by_hand():
    assert [warm_up(step, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert warm_up(0, 0) == warm_up(0, 1) == 1.0


def test_progress_by_hand():
    # 8 steps, 2 of them warm-up: steps 2 to 7 are 0/6 to 5/6 of the way
    assert [progress_after_warmup(step, 8, 2) for step in (0, 2, 5, 7, 8, 20)] == [0, 0, 3 / 6, 5 / 6, 1, 1]
    assert progress_after_warmup(3, 3, 3) == 0  # all warm-up: nothing to divide by


def test_cosine_by_hand():
    # after warm-up of 2 in 8 steps: step 4 is a third of the way, cos(pi / 3) = 1/2, so (1 + 1/2) / 2 = 3/4
    def at(step, final=0.0):
        return cosine(step, steps=8, warmup_steps=2, final_fraction=final)

    assert [at(step) for step in (0, 1, 2, 4, 5, 6, 8)] == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.25, 0])
    assert at(5, 0.2) == pytest.approx(0.2 + 0.8 * 0.5)
    assert at(8, 0.2) == pytest.approx(0.2)


def test_linear_by_hand():
    def at(step, final=0.0):
        return linear(step, steps=8, warmup_steps=2, final_fraction=final)

    assert [at(step) for step in (0, 2, 4, 5, 8)] == pytest.approx([0.5, 1, 2 / 3, 0.5, 0])
    assert at(5, 0.4) == pytest.approx(1 - 0.6 * 0.5)


def test_wsd_by_hand():
    # the last 0.4 of 10 steps are steps 6 to 9: 1, 3/4, 1/2, 1/4, and 0 at step 10
    def at(step, final=0.0):
        return warmup_stable_decay(step, steps=10, warmup_steps=2, decay_fraction=0.4, final_fraction=final)

    assert [at(step) for step in (0, 1, 3, 6, 7, 8, 9, 10)] == pytest.approx(
        [0.5, 1, 1, 1, 0.75, 0.5, 0.25, 0]
    )
    assert at(8, 0.2) == pytest.approx(1 - 0.8 * 0.5)


def test_the_plateau_of_wsd_serves_every_length():
    short, long = (
        [warmup_stable_decay(s, steps=n, warmup_steps=5, decay_fraction=0.2) for s in range(80)]
        for n in (100, 400)
    )
    assert short == long


def test_wsd_without_decay_keeps_one_step_to_come_down():
    assert warmup_stable_decay(9, steps=10, warmup_steps=0, decay_fraction=0.0) == 1.0
    assert warmup_stable_decay(10, steps=10, warmup_steps=0, decay_fraction=0.0) == 0.0


def test_constant_stays():
    assert set(curve("constant")[9:]) == {1.0}


@pytest.mark.parametrize("name", SCHEDULES)
def test_shape_of_every_schedule(name):
    values = curve(name, final_fraction=0.1)
    assert all(0 < value <= 1 for value in values)
    assert values[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])  # all warm up alike
    after = values[9:]
    assert after[0] == 1.0
    assert after == sorted(after, reverse=True)  # and never rise again
    # no jump: the steepest is wsd's line, 0.9 over 20 steps
    assert max(a - b for a, b in zip(after, after[1:], strict=False)) <= 0.9 / 20 + 1e-9
    assert after[-1] == pytest.approx(1.0 if name == "constant" else 0.1)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_factor_is_continuous_in_the_length_of_the_run(name):
    # doubling the number of steps at the same fraction of the run gives the same factor
    short = curve(name, steps=100, warmup_steps=10, final_fraction=0.1)
    long = curve(name, steps=200, warmup_steps=20, final_fraction=0.1)
    assert [long[2 * step] for step in range(20, 101)] == pytest.approx(short[20:])


def test_dispatch_passes_every_option_on():
    options = {"steps": 50, "warmup_steps": 5, "final_fraction": 0.3}
    assert factor("cosine", 30, **options) == cosine(30, **options)
    assert factor("linear", 30, **options) == linear(30, **options)
    assert factor("constant", 2, **options) == warm_up(2, 5)
    wsd = options | {"decay_fraction": 0.5}
    assert factor("wsd", 30, **wsd) == warmup_stable_decay(30, **wsd) != factor("wsd", 30, **options)
    assert len({factor(name, 45, **options) for name in SCHEDULES}) == 4


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"schedule='cosin': choose one of constant, cosine, linear, wsd"):
        factor("cosin", 0, steps=1, warmup_steps=0)
