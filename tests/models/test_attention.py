"""The layers of a block: hand-computed cases, torch's own kernels as the independent implementation, invariants.

Shapes: B batch, T time, D d_model, H query heads, K key/value heads, C d_head, F d_ff.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmcourse.models import attention as layers
from llmcourse.models.attention import (
    Attention,
    RMSNorm,
    SwiGLU,
    apply_rope,
    blocked_causal_attention,
    causal_attention,
    causal_mask,
    repeat_kv,
    rms_norm,
    rope_frequencies,
    rope_tables,
    scaled_dot_product_attention,
    swiglu,
)
from llmcourse.models.config import ModelConfig


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# RMSNorm


def test_rms_norm_by_hand():
    # mean square of (3, 4) is (9 + 16) / 2 = 12.5, so each is divided by sqrt(12.5) and multiplied by its gain
    found = rms_norm(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0]), eps=0.0)
    torch.testing.assert_close(found, torch.tensor([3 / math.sqrt(12.5), 8 / math.sqrt(12.5)]))


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_rms_norm_is_torchs(eps):
    x, weight = randn(2, 5, 7) * 0.1, randn(7, seed=1)
    torch.testing.assert_close(
        rms_norm(x, weight, eps), F.rms_norm(x, (7,), weight, eps), rtol=1e-6, atol=1e-6
    )


def test_rms_norm_ignores_scale_and_has_unit_mean_square():
    x, ones = randn(3, 64), torch.ones(64)
    torch.testing.assert_close(rms_norm(x, ones, 0.0).pow(2).mean(-1), torch.ones(3))
    torch.testing.assert_close(rms_norm(1000 * x, ones, 0.0), rms_norm(x, ones, 0.0))
    shifted = rms_norm(x + 5, ones, 0.0)  # unlike LayerNorm it keeps the mean
    assert (shifted.mean(-1) > 0.9).all()


def test_rms_norm_takes_its_mean_square_in_float32():
    x = torch.full((4096,), 300.0, dtype=torch.float16)  # 300 squared overflows float16
    found = rms_norm(x, torch.ones(4096, dtype=torch.float16), 1e-5)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found, torch.ones_like(x))


def test_rms_norm_module_starts_as_gain_one_and_uses_its_eps():
    x = randn(2, 6) * 1e-3
    module = RMSNorm(6, eps=1e-3)
    assert torch.equal(module.weight, torch.ones(6))
    assert torch.equal(module(x), rms_norm(x, torch.ones(6), 1e-3))
    assert not torch.allclose(module(x), rms_norm(x, torch.ones(6), 1e-6))


# Rotary positions


def test_rope_frequencies_by_hand():
    # theta^(-2i/C) for C = 4, theta = 10000: 10000^0 = 1 and 10000^(-1/2) = 0.01
    torch.testing.assert_close(rope_frequencies(4, 10_000.0), torch.tensor([1.0, 0.01]))
    torch.testing.assert_close(rope_frequencies(4, 16.0), torch.tensor([1.0, 0.25]))


def test_rope_turns_the_pair_i_and_i_plus_half():
    # position 1, C = 4, theta = 16: channels (0, 2) turn by 1 rad, channels (1, 3) by 1/4 rad
    cos, sin = rope_tables(torch.tensor([1]), 4, 16.0)
    x = torch.tensor([1.0, 0.0, 0.0, 1.0]).view(1, 1, 1, 4)
    expected = [math.cos(1), -math.sin(0.25), math.sin(1), math.cos(0.25)]
    torch.testing.assert_close(apply_rope(x, cos, sin).flatten(), torch.tensor(expected))


def test_rope_is_multiplication_by_a_complex_number():
    x, positions, C = randn(2, 3, 9, 8), torch.arange(9) * 7, 8
    cos, sin = rope_tables(positions, C, 500.0)
    assert cos.shape == sin.shape == (9, C)
    z = torch.complex(*x.double().chunk(2, dim=-1))
    angle = positions.double()[:, None] * 500.0 ** (-torch.arange(0, C, 2, dtype=torch.float64) / C)
    turned = z * torch.polar(torch.ones_like(angle), angle)
    expected = torch.cat((turned.real, turned.imag), dim=-1).float()
    torch.testing.assert_close(apply_rope(x, cos, sin), expected, rtol=1e-5, atol=1e-5)


def test_rope_keeps_norms_and_position_zero():
    x = randn(1, 2, 6, 16)
    turned = apply_rope(x, *rope_tables(torch.arange(6), 16))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, :, 0], x[:, :, 0])


def test_rope_scores_depend_on_the_distance_alone():
    q, k = randn(16), randn(16, seed=1)

    def score(i: int, j: int) -> float:
        cos, sin = rope_tables(torch.tensor([i, j]), 16, 1000.0)
        turned = apply_rope(torch.stack((q, k)).view(1, 1, 2, 16), cos, sin)[0, 0]
        return float(turned[0] @ turned[1])

    assert score(5, 2) == pytest.approx(score(105, 102), abs=1e-4)
    assert score(5, 2) == pytest.approx(score(3, 0), abs=1e-4)
    assert abs(score(5, 2) - score(5, 3)) > 1e-3


def test_rope_theta_changes_the_result():
    x, positions = randn(1, 1, 4, 8), torch.arange(4)
    assert not torch.allclose(
        apply_rope(x, *rope_tables(positions, 8, 1e4)), apply_rope(x, *rope_tables(positions, 8, 1e6))
    )


# Masks and heads


def test_causal_mask_by_hand():
    assert causal_mask(3, 3).tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    # the queries are the last two of four positions, 2 and 3
    assert causal_mask(2, 4).tolist() == [[True, True, True, False], [True, True, True, True]]
    assert causal_mask(1, 5).all()


def test_repeat_kv_gives_neighbors_the_same_head():
    x = torch.arange(3.0).view(1, 3, 1, 1)
    assert repeat_kv(x, 2).flatten().tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.equal(repeat_kv(x, 1), x)


# Attention


def test_attention_by_hand():
    # one query of width 1 and score 0 against key 0, ln 3 against key ln 3: weights 1/4 and 3/4
    q, k = torch.ones(1, 1, 1, 1), torch.tensor([0.0, math.log(3)]).view(1, 1, 2, 1)
    v = torch.tensor([8.0, 4.0]).view(1, 1, 2, 1)
    assert scaled_dot_product_attention(q, k, v).item() == pytest.approx(8 / 4 + 4 * 3 / 4)
    # width 4 with equal entries: the dot product 4 ln 3 is divided by sqrt(4), so the weights are as for 2 ln 3
    wide = scaled_dot_product_attention(q.expand(1, 1, 1, 4), k.expand(1, 1, 2, 4), v.expand(1, 1, 2, 4))
    torch.testing.assert_close(wide[0, 0, 0], torch.full((4,), 8 / 10 + 4 * 9 / 10))


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_torchs(masked):
    q, k, v = randn(2, 3, 5, 4), randn(2, 3, 7, 4, seed=1), randn(2, 3, 7, 4, seed=2)
    mask = causal_mask(5, 7) if masked else None
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, mask), expected, rtol=1e-5, atol=1e-6)


def test_attention_without_positions_treats_keys_as_a_set():
    q, k, v = randn(1, 2, 3, 4), randn(1, 2, 6, 4, seed=1), randn(1, 2, 6, 4, seed=2)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    torch.testing.assert_close(
        scaled_dot_product_attention(q, k, v), scaled_dot_product_attention(q, k[:, :, order], v[:, :, order])
    )


def study(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    groups, T = q.shape[1] // k.shape[1], q.shape[2]
    return scaled_dot_product_attention(q, repeat_kv(k, groups), repeat_kv(v, groups), causal_mask(T, T))


@pytest.mark.parametrize(("H", "K"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize(("T", "block"), [(1, 4), (4, 4), (13, 4), (8, 128), (150, 128)])
def test_blocked_attention_is_the_written_out_one_with_its_gradients(H, K, T, block):
    shapes = ((2, H, T, 6), (2, K, T, 6), (2, K, T, 6))
    inputs = [randn(*shape, seed=i, dtype=torch.float64).requires_grad_() for i, shape in enumerate(shapes)]
    copies = [x.detach().clone().requires_grad_() for x in inputs]
    found, expected = blocked_causal_attention(*inputs, block=block), study(*copies)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = randn(2, H, T, 6, seed=9, dtype=torch.float64)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for one, other in zip(inputs, copies, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-11, atol=1e-12)


def test_blocked_attention_in_bfloat16_rounds_no_worse_than_torchs_kernel():
    q, k, v = randn(2, 4, 70, 16), randn(2, 2, 70, 16, seed=1), randn(2, 2, 70, 16, seed=2)
    exact = study(q, k, v)
    low = [x.bfloat16() for x in (q, k, v)]
    found = blocked_causal_attention(*low, block=32)
    assert found.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits: relative steps of 2^-8, and scores of size 3 shift a weight by about 3 x 2^-8
    assert (found.float() - exact).abs().max() < 0.05
    kernel = F.scaled_dot_product_attention(*low, is_causal=True, enable_gqa=True)
    assert (found.float() - exact).pow(2).mean() < 4 * (kernel.float() - exact).pow(2).mean()


@pytest.mark.parametrize(
    "T", [1, 32, 33, 140]
)  # up to 32 tokens torch's kernel runs, beyond it the blocked one
def test_causal_attention_is_the_same_by_every_path(T):
    q, k, v = randn(1, 4, T, 8), randn(1, 2, T, 8, seed=1), randn(1, 2, T, 8, seed=2)
    torch.testing.assert_close(causal_attention(q, k, v), study(q, k, v), rtol=1e-5, atol=1e-6)


def test_short_and_long_sequences_take_different_kernels(monkeypatch):
    monkeypatch.setattr(layers, "blocked_causal_attention", lambda q, k, v: "blocked")
    q, k = randn(1, 2, 33, 4), randn(1, 2, 33, 4)
    assert causal_attention(q, k, k) == "blocked"
    assert causal_attention(q[:, :, :32], k[:, :, :32], k[:, :, :32]).shape == (1, 2, 32, 4)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_module_written_out_head_by_head(qk_norm):
    D, H, K, C, T = 10, 6, 3, 4, 5
    config = ModelConfig(vocab_size=7, d_model=D, n_heads=H, n_kv_heads=K, d_head=C, qk_norm=qk_norm)
    torch.manual_seed(0)
    module, x = Attention(config), randn(2, T, D)
    if qk_norm:
        nn.init.uniform_(module.query_norm.weight, 0.5, 2)
        nn.init.uniform_(module.key_norm.weight, 0.5, 2)
    cos, sin = rope_tables(torch.arange(T), C)
    heads = []
    for h in range(H):
        rows, shared = slice(h * C, (h + 1) * C), slice(h // 2 * C, (h // 2 + 1) * C)
        q, k, v = (
            x @ module.query.weight[rows].T,
            x @ module.key.weight[shared].T,
            x @ module.value.weight[shared].T,
        )
        if qk_norm:
            q = F.rms_norm(q, (C,), module.query_norm.weight, 1e-5)
            k = F.rms_norm(k, (C,), module.key_norm.weight, 1e-5)
        q, k = (apply_rope(y[:, None], cos, sin)[:, 0] for y in (q, k))
        scores = (q @ k.mT / math.sqrt(C)).masked_fill(~causal_mask(T, T), -math.inf)
        heads.append(scores.softmax(-1) @ v)
    expected = torch.cat(heads, dim=-1) @ module.output.weight.T
    torch.testing.assert_close(module(x, cos, sin), expected, rtol=1e-4, atol=1e-6)


def test_projections_have_no_bias():
    config = ModelConfig(vocab_size=7, d_model=8, n_heads=2, n_kv_heads=1, d_ff=12)
    names = dict(Attention(config).named_parameters()) | dict(SwiGLU(8, 12).named_parameters())
    assert {n.split(".")[-1] for n in names} == {"weight"}
    assert {n: tuple(p.shape) for n, p in names.items()} == {
        "query.weight": (8, 8),
        "key.weight": (4, 8),
        "value.weight": (4, 8),
        "output.weight": (8, 8),
        "gate.weight": (12, 8),
        "up.weight": (12, 8),
        "down.weight": (8, 12),
    }


# Feed-forward


def test_swiglu_by_hand():
    # gate ln 3: SiLU = ln 3 x sigmoid(ln 3) = ln 3 x 3/4; up 2; down 10
    found = swiglu(
        torch.ones(1), torch.tensor([[math.log(3)]]), torch.tensor([[2.0]]), torch.tensor([[10.0]])
    )
    assert found.item() == pytest.approx(0.75 * math.log(3) * 2 * 10)


def test_swiglu_module_is_the_function():
    module, x = SwiGLU(5, 9), randn(2, 3, 5)
    expected = swiglu(x, module.gate.weight, module.up.weight, module.down.weight)
    torch.testing.assert_close(module(x), expected)
    assert not torch.allclose(expected, swiglu(x, module.up.weight, module.gate.weight, module.down.weight))
