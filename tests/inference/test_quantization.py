"""Weight-only quantization: rounding by hand, packing, GPTQ against a search, calibration errors, whole models."""

from __future__ import annotations

import copy

import pytest
import torch

from llmcourse.inference import SamplingParams, generate
from llmcourse.inference.quantization import (
    QuantizationSettings,
    QuantizedLinear,
    block_linears,
    dequantize,
    gptq,
    input_moments,
    layer_errors,
    pack,
    quantize_weights,
    round_to_scale,
    scales_of,
    unpack,
    weight_bytes,
)
from tests.inference.small import V, lively_model


def test_rounding_by_hand():
    weight = torch.tensor([[1.27, -0.635, 0.0, 0.004], [0.7, 0.1, -0.35, 0.049]])
    scales = scales_of(weight, QuantizationSettings(bits=8))
    torch.testing.assert_close(scales, torch.tensor([[0.01], [0.7 / 127]]))
    assert round_to_scale(weight, scales, 8)[0].tolist() == [127, -64, 0, 0]
    grouped = scales_of(weight, QuantizationSettings(bits=4, group_size=2))
    torch.testing.assert_close(grouped[1], torch.tensor([0.1, 0.05]))
    integers = round_to_scale(weight, grouped, 4)
    assert integers[1].tolist() == [7, 1, -7, 1]
    torch.testing.assert_close(dequantize(integers, grouped)[1], torch.tensor([0.7, 0.1, -0.35, 0.05]))


@pytest.mark.parametrize("n_inputs", [6, 7])
def test_packing_is_undone(n_inputs):
    integers = torch.randint(-7, 8, (5, n_inputs), dtype=torch.int8)
    packed = pack(integers)
    assert packed.shape == (5, (n_inputs + 1) // 2) and torch.equal(unpack(packed, n_inputs), integers)


@pytest.mark.parametrize("bits", [4, 8])
def test_an_error_is_at_most_half_a_step(bits):
    weight = torch.randn(9, 24)
    settings = QuantizationSettings(bits=bits, group_size=8)
    scales = scales_of(weight, settings)
    error = (dequantize(round_to_scale(weight, scales, bits), scales) - weight).abs()
    assert (error <= scales.repeat_interleave(8, dim=1) / 2 * 1.0001).all()


def output_error(weight, found, moment) -> float:
    change = dequantize(*found).double() - weight.double()
    return float(torch.einsum("oi,ij,oj->", change, moment, change))


def correlated_moment(n: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(500, n, generator=torch.Generator().manual_seed(seed)).double()
    x = x.cumsum(dim=1)  # neighboring inputs go together
    return x.T @ x / len(x)


def test_gptq_beats_rounding_where_inputs_go_together():
    weight, moment = torch.randn(16, 24, generator=torch.Generator().manual_seed(1)), correlated_moment(24)
    for settings in (QuantizationSettings(bits=4), QuantizationSettings(bits=4, group_size=8)):
        scales = scales_of(weight, settings)
        rounded = output_error(weight, (round_to_scale(weight, scales, 4), scales), moment)
        assert output_error(weight, gptq(weight, moment, settings), moment) < 0.5 * rounded


def test_gptq_is_rounding_where_inputs_are_independent():
    weight = torch.randn(6, 10)
    settings = QuantizationSettings(bits=4)
    integers, scales = gptq(weight, torch.eye(10).double(), settings)
    torch.testing.assert_close(scales, scales_of(weight, settings))
    assert torch.equal(integers, round_to_scale(weight, scales, 4))


def test_gptq_moves_the_error_where_least_squares_says():
    """After one column is rounded, the others must be what minimizes the error: delta = -e H_01 / H_11 for two."""
    moment = torch.tensor([[1.0, 0.8], [0.8, 1.0]]).double()
    weight = torch.tensor([[0.34, 1.0]])
    settings = QuantizationSettings(bits=4, damping=1e-9)
    integers, scales = gptq(weight, moment, settings)
    step = 1 / 7
    first = round(0.34 / step)
    moved = 1.0 + (0.34 - first * step) * 0.8
    assert integers.tolist() == [[first, min(7, round(moved / step))]] and scales.item() == pytest.approx(
        step
    )


def some_text(seed: int = 0) -> torch.Tensor:
    return torch.randint(V, (8, 40), generator=torch.Generator().manual_seed(seed))


def test_moments_are_those_of_the_inputs():
    model = lively_model()
    moments = input_moments(model, [some_text(0), some_text(1)])
    assert set(moments) == set(block_linears(model)) and len(moments) == 2 * 7
    normed = model.blocks[0].attention_norm(model.embedding(torch.cat((some_text(0), some_text(1))))).detach()
    x = normed.flatten(0, 1).double()
    torch.testing.assert_close(moments["blocks.0.attention.query"], x.T @ x / len(x))
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match="no calibration batches"):
        input_moments(model, [])


@pytest.mark.parametrize(
    ("settings", "low", "high"),
    [
        (QuantizationSettings(bits=8), 1e-6, 1e-4),
        (QuantizationSettings(bits=4), 1e-3, 5e-2),
        (QuantizationSettings(bits=4, group_size=8), 1e-4, 2e-2),
    ],
    ids=["int8", "int4", "int4 in groups"],
)
def test_calibration_errors_are_those_of_the_outputs(settings, low, high):
    model = lively_model()
    moments = input_moments(model, [some_text()])
    quantized = quantize_weights(copy.deepcopy(model), settings)
    errors = layer_errors(model, quantized, moments)
    assert all(low < error < high for error in errors.values())
    x = model.blocks[0].attention_norm(model.embedding(some_text())).detach()
    a, b = (one.blocks[0].attention.key for one in (model, quantized))
    expected = (a(x) - b(x)).square().sum() / a(x).square().sum()
    assert errors["blocks.0.attention.key"] == pytest.approx(float(expected), rel=1e-3)


def test_gptq_lowers_every_layers_error():
    model = lively_model()
    moments = input_moments(model, [some_text()])
    rounded = quantize_weights(copy.deepcopy(model), QuantizationSettings(bits=4))
    better = quantize_weights(copy.deepcopy(model), QuantizationSettings(bits=4, method="gptq"), moments)
    before, after = (layer_errors(model, one, moments) for one in (rounded, better))
    assert all(after[name] < before[name] for name in before)


def test_sizes_and_generation():
    model = lively_model(d_model=32, d_ff=64)
    plain = weight_bytes(model)
    outside = 4 * (2 * V * 32 + 5 * 32)  # embedding, head, norms
    int8 = quantize_weights(copy.deepcopy(model), QuantizationSettings(bits=8))
    weights = (plain - outside) // 4
    rows = sum(layer.out_features for layer in block_linears(int8).values())
    assert weight_bytes(int8) == outside + weights + 2 * rows
    assert all(isinstance(layer, QuantizedLinear) for layer in block_linears(int8).values())
    assert sum(layer.bytes for layer in block_linears(int8).values()) == weights + 2 * rows
    params = SamplingParams(temperature=0.0, max_new_tokens=5)
    assert len(generate(int8, [[1, 2, 3]], params)[0]) == 5
    state = int8.state_dict()
    assert "blocks.0.mlp.down.stored" in state and state["blocks.0.mlp.down.stored"].dtype == torch.int8


def test_bits_of_a_weight():
    assert QuantizationSettings(bits=4, group_size=64).bits_per_weight(128) == 4.25
    assert QuantizationSettings(bits=8).bits_per_weight(128) == 8.125


def test_refusals():
    model = lively_model()
    with pytest.raises(ValueError, match="pass moments"):
        quantize_weights(model, QuantizationSettings(bits=4, method="gptq"))
    with pytest.raises(ValueError, match="does not divide the 24 inputs"):
        quantize_weights(model, QuantizationSettings(bits=4, group_size=7))
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
    for bad in ({"bits": 3}, {"group_size": 0}, {"method": "awq"}, {"damping": 0.0}):
        with pytest.raises(ValueError, match="choose|give"):
            QuantizationSettings(**bad)
