"""Profiles of small steps whose operators, FLOPs and memory are known."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
import torch

from llmcourse.profiling import GROUPS, MemoryTimeline, group_of, profile_steps


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trace") / "new"
    weight = torch.randn(128, 128, requires_grad=True)
    optimizer = torch.optim.AdamW([weight], lr=1e-3)
    x = torch.randn(256, 128)
    calls = []

    def step():
        calls.append(1)
        (x @ weight).softmax(dim=-1).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return profile_steps(step, warmup=1, active=2, folder=folder), calls


def test_every_step_is_called(profiled):
    assert len(profiled[1]) == 3


def test_flops_and_calls_are_per_step(profiled):
    products = [o for o in profiled[0].operators if o.name == "aten::mm"]
    # forward, and the weight's gradient: x needs none
    assert sum(o.calls for o in products) == 2
    assert sum(o.flops for o in products) == 2 * 2 * 256 * 128 * 128


def test_shares_and_groups_add_up(profiled):
    found = profiled[0]
    assert sum(o.share for o in found.operators) == pytest.approx(1)
    assert tuple(found.groups()) == GROUPS
    assert sum(found.groups().values()) == pytest.approx(found.seconds)
    assert all(found.groups()[name] > 0 for name in ("matmul", "optimizer"))
    times = [o.seconds for o in found.top(5)]
    assert len(times) == 5 and times == sorted(times, reverse=True)


def test_the_trace_opens(profiled):
    with gzip.open(profiled[0].trace, "rt") as file:
        events = json.load(file)["traceEvents"]
    assert profiled[0].trace.name == "trace.json.gz"
    assert any(event.get("name") == "aten::mm" for event in events)
    assert [path.name for path in profiled[0].trace.parent.iterdir()] == ["trace.json.gz"]


def test_the_timeline_follows_what_is_held():
    def step():
        first = torch.empty(1_000_000)  # 4 MB
        second = torch.empty(500_000)  # 2 MB
        del first
        third = torch.empty(250_000)  # 1 MB
        del second, third

    found = profile_steps(step, warmup=0, active=1)
    assert found.timeline.peak == 6_000_000 and found.trace is None
    assert found.timeline.bytes.tolist() == [4_000_000, 6_000_000, 2_000_000, 3_000_000, 1_000_000, 0]
    assert (np.diff(found.timeline.seconds) >= 0).all() and found.timeline.seconds[0] >= 0


def test_sampling_keeps_the_peak():
    rng = np.random.default_rng(0)
    timeline = MemoryTimeline(seconds=np.arange(1000.0), bytes=rng.integers(0, 10**6, 1000))
    sampled = timeline.sampled(50)
    assert len(sampled.seconds) == len(sampled.bytes) == 50
    assert sampled.peak == timeline.peak
    assert timeline.sampled(2000) is timeline
    with pytest.raises(ValueError, match="points=0"):
        timeline.sampled(0)


@pytest.mark.parametrize(
    ("name", "parents", "group"),
    [
        ("aten::mm", (), "matmul"),
        ("aten::mm", ("aten::linear", "Optimizer.step#Muon.step"), "optimizer"),
        ("aten::_scaled_dot_product_flash_attention", (), "attention"),
        ("aten::copy_", ("aten::_to_copy",), "copy"),
        ("aten::_softmax", (), "normalization and element-wise"),
        ("aten::mul", (), "normalization and element-wise"),
        ("llmcourse.step", (), "outside operators"),
        ("cudaLaunchKernel", (), "outside operators"),
    ],
)
def test_groups_by_name_and_parents(name, parents, group):
    assert group_of(name, parents) == group


@pytest.mark.parametrize(("warmup", "active"), [(-1, 1), (0, 0)])
def test_bad_counts_are_refused(warmup, active):
    with pytest.raises(ValueError, match=f"warmup={warmup}, active={active}"):
        profile_steps(lambda: None, warmup, active)


def test_an_empty_step_has_an_empty_timeline():
    assert profile_steps(lambda: None, 0, 1).timeline.peak == 0
