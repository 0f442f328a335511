"""Arithmetic against what torch counts: parameters, FLOPs of real forward and backward passes, bytes, MFU."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llmcourse.accounting import (
    count_parameters,
    forward_flops_per_token,
    kv_cache_bytes,
    model_flops_utilization,
    training_flops_per_token,
)
from llmcourse.models.config import ModelConfig
from llmcourse.models.transformer import Transformer

SHAPES = [
    {},
    {"n_kv_heads": 4},
    {"n_kv_heads": 1, "qk_norm": True},
    {"tie_embeddings": False},
    {"d_head": 6, "tie_embeddings": False, "qk_norm": True},
]


def config_of(**changes: object) -> ModelConfig:
    sizes = {
        "vocab_size": 37,
        "context_length": 24,
        "d_model": 16,
        "n_layers": 3,
        "n_heads": 4,
        "n_kv_heads": 2,
    }
    return ModelConfig(**(sizes | {"d_ff": 20} | changes))


@pytest.mark.parametrize("change", SHAPES, ids=str)
def test_parameters_are_those_of_the_model(change):
    config = config_of(**change)
    model = Transformer(config)
    assert count_parameters(config) == sum(p.numel() for p in model.parameters())
    ends = {id(model.embedding.weight), id(model.head.weight)}
    inside = sum(p.numel() for p in model.parameters() if id(p) not in ends)
    assert count_parameters(config, embeddings=False) == inside


def test_parameters_by_hand():
    # D = 16, C = 4, H = 4, K = 2, F = 20: attention 16 x 4 x (4 + 2 + 2 + 4) = 768, SwiGLU 3 x 16 x 20 = 960,
    # norms 2 x 16 = 32: 1760 a block, 3 blocks; final norm 16; embedding 37 x 16 = 592
    assert count_parameters(config_of()) == 3 * 1760 + 16 + 592


def counted(config: ModelConfig, T: int, backward: bool) -> int:
    """FLOPs that torch counts in one pass over T tokens, with attention as plain matrix products over all T x T."""
    model, tokens = Transformer(config), torch.zeros(1, T, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        logits = model(tokens)
        if backward:
            logits.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("change", SHAPES, ids=str)
@pytest.mark.parametrize("T", [1, 5, 24])
def test_forward_flops_are_those_that_torch_counts(change, T):
    config = config_of(**change)
    # torch computes all T positions for each query, the formula counts the (T + 1) / 2 that are visible on average
    masked = config.n_layers * 4 * config.n_heads * config.d_head * (T - (T + 1) / 2)
    assert counted(config, T, False) == T * (forward_flops_per_token(config, T) + masked)


def test_training_flops_are_those_that_torch_counts():
    config, T = config_of(), 5
    masked = config.n_layers * 4 * config.n_heads * config.d_head * (T - (T + 1) / 2)
    # each product of the forward pass has two in the backward pass
    assert counted(config, T, True) == T * (training_flops_per_token(config, T) + 3 * masked)


def test_the_default_context_is_the_models():
    assert forward_flops_per_token(config_of()) == forward_flops_per_token(config_of(), 24)
    assert forward_flops_per_token(config_of(), 24) > forward_flops_per_token(config_of(), 12)


def test_a_large_model_needs_six_flops_per_parameter():
    config = config_of(d_model=2048, n_heads=16, n_kv_heads=16, d_ff=5504, n_layers=24, vocab_size=50_000)
    assert training_flops_per_token(config, 1) == pytest.approx(6 * count_parameters(config), rel=0.01)


def test_cache_bytes_by_hand():
    # 2 x 3 layers x 2 heads x 4 channels = 48 values a token: 10 tokens, 5 rows, 2 bytes
    assert kv_cache_bytes(config_of(), 10, 5) == 48 * 10 * 5 * 2
    assert kv_cache_bytes(config_of(), 10, 5, bytes_per_value=4) == 48 * 10 * 5 * 4
    assert kv_cache_bytes(config_of(n_kv_heads=4), 10) == 2 * kv_cache_bytes(config_of(), 10)


def test_utilization_is_the_share_of_the_peak():
    config = config_of()
    needed = training_flops_per_token(config)
    assert model_flops_utilization(config, 100.0, 400 * needed) == pytest.approx(0.25)
    assert model_flops_utilization(config, 100.0, 400 * needed, context=12) < 0.25


def test_it_imports_no_torch():
    import subprocess
    import sys

    code = "import sys, llmcourse.accounting; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
