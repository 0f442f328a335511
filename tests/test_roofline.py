"""The roofline's arithmetic by hand, and measurements that must come out in order."""

from __future__ import annotations

import pytest
import torch

from llmcourse import roofline
from llmcourse.accounting import Product, count_parameters
from llmcourse.models.config import ModelConfig
from llmcourse.roofline import Roofline, measure_bandwidth, predict_step, product_seconds

ROOF = Roofline(bandwidth=10.0, peak={"fp32": 40.0, "bf16": 100.0})
TINY = ModelConfig(vocab_size=40, context_length=64, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=32)


def test_the_roof_by_hand():
    assert ROOF.ridge("fp32") == 4.0 and ROOF.ridge("bf16") == 10.0
    assert ROOF.attainable(2.0, "fp32") == 20.0  # on the slope
    assert ROOF.attainable(4.0, "fp32") == ROOF.attainable(9.0, "fp32") == 40.0  # on the flat
    assert ROOF.seconds(80, 10, "fp32") == 2.0 and ROOF.seconds(80, 50, "fp32") == 5.0


def test_time_and_rate_are_one_statement():
    for intensity in (0.5, 4.0, 30.0):
        assert intensity / ROOF.seconds(intensity, 1, "bf16") == pytest.approx(
            ROOF.attainable(intensity, "bf16")
        )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Roofline(bandwidth=0.0, peak={"fp32": 1.0}), "bandwidth=0.0"),
        (lambda: Roofline(bandwidth=1.0, peak={"fp32": -1.0}), "fp32=-1.0"),
        (lambda: Roofline(bandwidth=1.0, peak={}), "at least one"),
        (lambda: ROOF.ridge("fp8"), "dtype='fp8' was not measured"),
        (lambda: ROOF.attainable(-1.0, "fp32"), "intensity=-1.0"),
        (lambda: measure_bandwidth(n_bytes=100), "n_bytes=100"),
        (lambda: roofline.matmul_rates(dtypes=("int3",)), "dtype='int3'"),
        (lambda: predict_step(TINY, 1, precision="fp16"), "precision='fp16'"),
        (lambda: predict_step(TINY, 1, optimizer="sgd"), "optimizer='sgd'"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bandwidth_is_a_machines():
    rates = measure_bandwidth(n_bytes=2**22, seconds=0.05)
    assert set(rates) == {"copy", "triad"}
    assert all(1e8 < rate < 1e14 for rate in rates.values())


def test_large_products_run_at_a_higher_rate():
    rates = roofline.matmul_rates(dtypes=("fp32",), sizes=(8, 256), seconds=0.05)
    assert rates["fp32"][256] > 3 * rates["fp32"][8]


def test_a_measured_roof_holds_together():
    roof = roofline.measure_roofline(dtypes=("fp32",), seconds=0.05)
    assert roof.ridge("fp32") > 0.1 and set(roof.peak) == {"fp32"}


def test_a_larger_product_takes_longer():
    small = product_seconds(Product(name="a", m=64, k=32, n=32), "fp32", seconds=0.01)
    large = product_seconds(Product(name="b", m=2048, k=256, n=256), "fp32", seconds=0.01)
    assert set(small) == {"forward", "input_gradient", "weight_gradient"}
    assert all(large[name] > small[name] > 0 for name in small)


@pytest.mark.parametrize("weight", [True, False])
def test_operands_have_the_products_shapes(weight):
    product = Product(name="a", m=5, k=3, n=7, batch=1 if weight else 4, weight=weight)
    x, w, y = roofline._operands(product, torch.float32, torch.device("cpu"))
    stack = () if weight else (4,)
    assert x.shape == (*stack, 5, 3) and w.shape == (*stack, 7, 3) and y.shape == (*stack, 5, 7)
    assert (x @ w.mT).shape == y.shape


def test_a_prediction_sums_its_parts():
    found = predict_step(TINY, 2, bandwidth=1e9, precision="fp32", seconds=0.001)
    assert found.seconds == pytest.approx(sum(found.parts.values()))
    assert sum(found.products.values()) == pytest.approx(
        found.parts["forward products"] + found.parts["backward products"]
    )
    assert found.parts["orthogonalization"] > 0
    slow = predict_step(TINY, 2, bandwidth=1e8, precision="fp32", optimizer="adamw", seconds=0.001)
    assert slow.parts["element-wise"] > 2 * found.parts["element-wise"]
    assert "orthogonalization" not in slow.parts


def test_exponentials_are_slower_than_copies():
    rate = roofline.exponential_bandwidth("fp32", seconds=0.02)
    assert 1e7 < rate < 10 * measure_bandwidth(n_bytes=2**22, seconds=0.05)["copy"]


def test_optimizer_traffic_by_hand():
    n, inside = count_parameters(TINY), count_parameters(TINY, embeddings=False)
    assert roofline.optimizer_bytes(TINY, "adamw") == 40 * n
    assert roofline.optimizer_bytes(TINY, "muon") == 12 * n + 64 * inside + 28 * (n - inside)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpus_roof():
    roof = roofline.measure_roofline(torch.device("cuda"), seconds=0.2)
    assert roof.peak["bf16"] > roof.peak["fp32"] and roof.bandwidth > 1e11
