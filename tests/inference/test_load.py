"""A load: arrivals, latencies and goodput by hand on a clock that the test moves; a real engine under load."""

from __future__ import annotations

import numpy as np
import pytest

from llmcourse.inference.engine import Engine
from llmcourse.inference.load import Latency, LoadReport, Request, poisson_requests, serve
from llmcourse.inference.sampling import SamplingParams
from tests.inference.small import lively_model, some_prompts


class Clock:
    """Every look at it takes a hundredth of a second; sleeping moves it on."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        self.now += 0.01
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_arrivals_are_poisson():
    requests = poisson_requests([[1]] * 4000, [1] * 4000, rate=20.0, seed=1)
    gaps = np.diff([0.0, *(one.arrival for one in requests)])
    assert abs(gaps.mean() - 0.05) < 4 * 0.05 / 4000**0.5
    assert abs((gaps > 0.05).mean() - np.exp(-1)) < 4 * 0.5 / 4000**0.5
    assert poisson_requests([[1]], [1], 2.0, seed=1) == poisson_requests([[1]], [1], 2.0, seed=1)
    with pytest.raises(ValueError, match="rate=0"):
        poisson_requests([[1]], [1], 0.0)


def test_a_load_is_served_in_time_order_and_measured():
    model, clock = lively_model(), Clock()
    engine = Engine(model, clock=clock)
    params = SamplingParams(temperature=0.0, max_new_tokens=3)
    requests = [Request(2.0, [1, 2], params), Request(0.5, [3], params)]
    report = serve(engine, requests, sleep=clock.sleep)
    assert [one.n_tokens for one in report.latencies] == [3, 3]
    for one in report.latencies:
        assert 0 < one.first_token < 0.1 and len(one.between_tokens) == 2
        assert one.total == pytest.approx(one.first_token + sum(one.between_tokens))
    assert 2.0 < report.seconds < 2.3
    assert report.throughput == pytest.approx(6 / report.seconds)


def test_waiting_counts_as_latency():
    model, clock = lively_model(), Clock()
    engine = Engine(model, clock=clock)
    params = SamplingParams(temperature=0.0, max_new_tokens=10)
    report = serve(
        engine, [Request(0.0, prompt, params) for prompt in some_prompts(60, seed=1)], sleep=clock.sleep
    )
    first = [one.first_token for one in report.latencies]
    assert max(first) > 3 * min(first), "only 32 run together, the others wait"


def test_percentiles_and_goodput_by_hand():
    latencies = [Latency(0.1 * i, (0.01, 0.03), 1.0 + i, 3) for i in range(1, 11)]
    report = LoadReport(latencies, seconds=5.0)
    assert report.percentiles("first_token")[50] == pytest.approx(0.55)
    assert report.percentiles("total")[95] == pytest.approx(np.percentile(range(2, 12), 95))
    assert report.percentiles("between_tokens") == {50: 0.02, 95: 0.03, 99: 0.03}
    assert report.goodput(first_token=0.45, between_tokens=0.02) == pytest.approx(4 / 5)
    assert report.goodput(first_token=0.45, between_tokens=0.019) == 0
    with pytest.raises(ValueError, match="choose first_token"):
        report.percentiles("latency")
