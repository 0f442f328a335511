"""The machine: seeds, devices, precision, progress, memory, matrix rate, description."""

from __future__ import annotations

import json
import os
import random
import time

import numpy as np
import pytest
import torch

from llmcourse import runtime

CPU = torch.device("cpu")


def test_a_seed_fixes_all_three_generators():
    def draw(seed: int) -> tuple[float, float, float]:
        runtime.set_seed(seed)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    assert draw(3) == draw(3)
    assert all(a != b for a, b in zip(draw(3), draw(4), strict=True))
    runtime.set_seed(2**32 + 5)  # NumPy takes 32 bits only


def test_devices_are_picked_by_what_is_there(monkeypatch):
    def available(cuda: bool, mps: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        available(cuda, mps)
        assert runtime.pick_device().type == runtime.pick_device("auto").type == expected
        assert runtime.pick_device("cpu") == CPU
    available(True, False)
    assert runtime.pick_device("cuda:1") == torch.device("cuda", 1)


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps", "tpu-like", "gpu"])
def test_devices_that_are_not_there_are_refused(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError) as error:
        runtime.pick_device(name)
    assert repr(name) in str(error.value) and "cpu" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("precision", "fast", "expected"),
    [
        ("fp32", True, None),
        ("bf16", False, torch.bfloat16),
        ("auto", True, torch.bfloat16),
        ("auto", False, None),
    ],
)
def test_precision(precision, fast, expected, monkeypatch):
    monkeypatch.setattr(runtime, "has_fast_bf16", lambda device: fast)
    assert runtime.precision_dtype(precision, CPU) == expected


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match=r"precision='fp8': choose one of auto, bf16, fp32"):
        runtime.precision_dtype("fp8", CPU)


@pytest.mark.parametrize(
    ("flags", "expected"), [({"avx512_bf16"}, True), ({"amx_bf16"}, True), ({"avx2"}, False)]
)
def test_bf16_hardware_is_read_from_the_flags(flags, expected, monkeypatch):
    monkeypatch.setattr(runtime, "_cpu_flags", lambda: frozenset(flags))
    monkeypatch.setattr(torch.backends.cpu, "_has_bf16", False, raising=False)
    assert runtime.has_fast_bf16(CPU) == expected
    assert runtime.has_fast_bf16(torch.device("meta")) is False


def test_peak_memory_sees_a_large_allocation_that_is_gone_again():
    with runtime.PeakMemory(interval=0.002) as nothing:
        time.sleep(0.05)
    with runtime.PeakMemory(interval=0.002) as memory:
        block = np.ones(25_000_000)  # 200 MB, touched
        time.sleep(0.1)
        del block
        during = memory.read()
        time.sleep(0.02)
    assert nothing.bytes > 0
    assert memory.bytes >= during > nothing.bytes + 150e6
    assert runtime.PeakMemory(CPU).bytes == 0


def test_progress_counts_and_can_be_switched_off(capsys):
    assert list(runtime.progress(range(3), description="steps", unit="step")) == [0, 1, 2]
    shown = capsys.readouterr().err
    assert "steps" in shown and "3/3" in shown
    assert list(runtime.progress(range(3), enabled=False)) == [0, 1, 2]
    with runtime.progress(total=10, enabled=False) as bar:
        bar.update(4)
        bar.set_postfix(loss="1.0")
    assert capsys.readouterr().err == ""


def test_the_matrix_rate_is_measured_without_touching_the_random_numbers():
    state = torch.get_rng_state()
    rate = runtime.matmul_flops(CPU, torch.float32, size=128, seconds=0.02)
    assert 1e7 < rate < 1e14
    assert torch.equal(torch.get_rng_state(), state)
    assert runtime.matmul_flops(CPU, torch.float32, size=64, seconds=0.0) > 0  # measures once at least


def test_the_rate_of_a_known_clock(monkeypatch):
    # 2 n^3 FLOPs in a quarter of a second
    ticks = iter(0.25 * i for i in range(1000))
    monkeypatch.setattr(runtime.time, "perf_counter", lambda: next(ticks))
    assert runtime.matmul_flops(CPU, torch.float32, size=10, seconds=0.0) == pytest.approx(2 * 10**3 / 0.25)


def test_the_peak_is_measured_once(monkeypatch):
    calls = []
    monkeypatch.setattr(runtime, "matmul_flops", lambda device, dtype: calls.append(dtype) or 5.0)
    runtime.peak_flops.cache_clear()
    try:
        assert runtime.peak_flops(CPU, torch.float32) == runtime.peak_flops(CPU, torch.float32) == 5.0
        assert calls == [torch.float32]
    finally:
        runtime.peak_flops.cache_clear()


def test_the_machine_is_described_in_plain_data():
    machine = runtime.describe_machine()
    json.dumps(machine)
    assert machine["torch"] == torch.__version__ and 1 <= machine["cores"] <= os.cpu_count()
    assert machine["memory_gib"] > 0.5 and machine["cpu"] and machine["threads"] == torch.get_num_threads()
    assert isinstance(machine["bf16_hardware"], bool)


def test_waiting_for_a_cpu_is_nothing():
    runtime.synchronize(CPU)
