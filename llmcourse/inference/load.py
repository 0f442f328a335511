"""What users of a server see: a Poisson load, the latencies of every request, percentiles and goodput.

Requests arrive at random and independently of how busy the server is (an open loop): the times between them are
exponential with mean 1 / rate. Closed loops, where the next request waits for an answer, hide overload.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from llmcourse.inference.engine import Engine
from llmcourse.inference.sampling import SamplingParams
from llmcourse.inference.sequence import FinishReason

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Request:
    """A prompt that comes at a time."""

    arrival: float
    """seconds after the start"""
    prompt: list[int]
    params: SamplingParams


@dataclass(frozen=True)
class Latency:
    """What one request saw, in seconds."""

    first_token: float
    """from arrival to the first token (TTFT)"""
    between_tokens: tuple[float, ...]
    """gaps between successive tokens (ITL)"""
    total: float
    """from arrival to the last token"""
    n_tokens: int

    def meets(self, first_token: float, between_tokens: float) -> bool:
        """Whether the first token came in time and the mean gap was short enough."""
        gap = float(np.mean(self.between_tokens)) if self.between_tokens else 0.0
        return self.first_token <= first_token and gap <= between_tokens


@dataclass(frozen=True)
class LoadReport:
    """What came out of a load."""

    latencies: list[Latency]
    seconds: float
    """from the start to the last token"""

    @property
    def throughput(self) -> float:
        """Tokens per second."""
        return sum(one.n_tokens for one in self.latencies) / self.seconds

    def percentiles(self, what: str) -> dict[int, float]:
        """p50, p95 and p99 in seconds of "first_token", "between_tokens" (all gaps of all requests) or "total".

        Raises:
            ValueError: another name.
        """
        if what == "between_tokens":
            values = [gap for one in self.latencies for gap in one.between_tokens]
        elif what in ("first_token", "total"):
            values = [getattr(one, what) for one in self.latencies]
        else:
            raise ValueError(f"{what!r}: choose first_token, between_tokens or total")
        found = np.percentile(values, PERCENTILES) if values else [float("nan")] * len(PERCENTILES)
        return dict(zip(PERCENTILES, map(float, found), strict=True))

    def goodput(self, first_token: float, between_tokens: float) -> float:
        """Requests per second that met both limits, in seconds (Zhong et al., 2024, "DistServe")."""
        return sum(one.meets(first_token, between_tokens) for one in self.latencies) / self.seconds


def poisson_requests(
    prompts: Sequence[Sequence[int]], new_tokens: Sequence[int], rate: float, *, seed: int = 0
) -> list[Request]:
    """Requests of the given prompts and greedy answers of the given lengths, `rate` a second on average.

    Raises:
        ValueError: a rate that is not positive, or lists of different lengths.
    """
    if not rate > 0:
        raise ValueError(f"rate={rate}: give requests per second, more than 0")
    gaps = np.random.default_rng(seed).exponential(1 / rate, len(prompts))
    return [
        Request(float(arrival), list(prompt), SamplingParams(temperature=0.0, max_new_tokens=n))
        for arrival, prompt, n in zip(np.cumsum(gaps), prompts, new_tokens, strict=True)
    ]


def serve(
    engine: Engine, requests: Sequence[Request], *, sleep: Callable[[float], None] = time.sleep
) -> LoadReport:
    """Let requests arrive at their times, in real time, and report what each saw. Their order does not matter.

    Raises:
        ValueError: a request that the engine refuses.
    """
    waiting = sorted(requests, key=lambda one: one.arrival)[::-1]  # the next one last
    start, sequences = engine.clock(), []
    while waiting or engine.has_work:
        now = engine.clock() - start
        while waiting and waiting[-1].arrival <= now:
            request = waiting.pop()
            sequences.append(engine.add(request.prompt, request.params, arrival=start + request.arrival))
        if engine.has_work:
            engine.step()
        elif waiting:
            sleep(max(0.0, waiting[-1].arrival - now))
    end = max((sequence.token_times[-1] for sequence in sequences), default=start)
    found = []
    for sequence in sequences:
        times = sequence.token_times
        if sequence.reason is FinishReason.CANCELLED or not times:
            continue
        gaps = tuple(b - a for a, b in zip(times[:-1], times[1:], strict=True))
        found.append(
            Latency(times[0] - sequence.arrival, gaps, times[-1] - sequence.arrival, len(sequence.new_ids))
        )
    return LoadReport(found, end - start)
