"""Shapes read from configurations of today's models: parameters equal those of the models that transformers builds."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmcourse.accounting import (
    ModelShape,
    active_parameters,
    count_parameters,
    parameters_by_part,
    shape_of,
)
from llmcourse.models.config import ModelConfig

GPT2 = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024}
LLAMA = {"max_position_embeddings": 8192}


def llama_like(kind: str, V: int, D: int, L: int, H: int, K: int, F: int, **more: object) -> dict:
    """A configuration with the sizes in the order of the tables below."""
    sizes = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": L, "num_attention_heads": H}
    sizes |= {"num_key_value_heads": K, "intermediate_size": F, "model_type": kind}
    return LLAMA | sizes | more


MODELS = {
    "Llama-3.1-8B": llama_like("llama", 128256, 4096, 32, 32, 8, 14336, tie_word_embeddings=False),
    "Llama-3.2-1B": llama_like("llama", 128256, 2048, 16, 32, 8, 8192, head_dim=64, tie_word_embeddings=True),
    "SmolLM2-135M": llama_like("llama", 49152, 576, 30, 9, 3, 1536, tie_word_embeddings=True),
    "SmolLM3-3B": llama_like("smollm3", 128256, 2048, 36, 16, 4, 11008, tie_word_embeddings=True),
    "Mistral-7B": llama_like("mistral", 32000, 4096, 32, 32, 8, 14336, tie_word_embeddings=False),
    "Qwen2.5-7B": llama_like("qwen2", 152064, 3584, 28, 28, 4, 18944, tie_word_embeddings=False),
    "Qwen3-0.6B": llama_like("qwen3", 151936, 1024, 28, 16, 8, 3072, head_dim=128, tie_word_embeddings=True),
    "Qwen3-8B": llama_like("qwen3", 151936, 4096, 36, 32, 8, 12288, head_dim=128, tie_word_embeddings=False),
    "OLMo-2-7B": llama_like("olmo2", 100352, 4096, 32, 32, 32, 11008, tie_word_embeddings=False),
    "Phi-3-mini": llama_like("phi3", 32064, 3072, 32, 32, 32, 8192, tie_word_embeddings=False),
    "Gemma-2B": llama_like("gemma", 256000, 2048, 18, 8, 1, 16384, head_dim=256, tie_word_embeddings=True),
    "Gemma-2-2B": llama_like("gemma2", 256000, 2304, 26, 8, 4, 9216, head_dim=256, tie_word_embeddings=True),
    "Gemma-3-1B": llama_like(
        "gemma3_text", 262144, 1152, 26, 4, 1, 6912, head_dim=256, tie_word_embeddings=True
    ),
    "Mixtral-8x7B": llama_like(
        "mixtral",
        32000,
        4096,
        32,
        32,
        8,
        14336,
        num_local_experts=8,
        num_experts_per_tok=2,
        tie_word_embeddings=False,
    ),
    "Qwen3-30B-A3B": llama_like(
        "qwen3_moe",
        151936,
        2048,
        48,
        32,
        4,
        6144,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        tie_word_embeddings=False,
    ),
    "Qwen1.5-MoE-A2.7B": llama_like(
        "qwen2_moe",
        151936,
        2048,
        24,
        16,
        16,
        5632,
        num_experts=60,
        num_experts_per_tok=4,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
        tie_word_embeddings=False,
    ),
    "mixed dense and sparse": llama_like(
        "qwen3_moe",
        500,
        64,
        6,
        4,
        2,
        96,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        decoder_sparse_step=2,
        mlp_only_layers=[3],
        attention_bias=True,
        tie_word_embeddings=True,
    ),
    "llama with biases": llama_like(
        "llama", 500, 64, 3, 4, 2, 96, attention_bias=True, mlp_bias=True, tie_word_embeddings=False
    ),
    "GPT-2 XL": GPT2 | {"n_embd": 1600, "n_layer": 48, "n_head": 25},
}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_transformers(name):
    config = AutoConfig.for_model(**MODELS[name])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = sum(p.numel() for p in model.parameters())
    assert count_parameters(MODELS[name]) == expected
    assert count_parameters(config) == expected
    assert sum(parameters_by_part(config).values()) == expected


@pytest.mark.parametrize(
    ("d_model", "n_layers", "n_heads", "published"),
    [
        (768, 12, 12, 124_439_808),
        (1024, 24, 16, 354_823_168),
        (1280, 36, 20, 774_030_080),
        (1600, 48, 25, 1_557_611_200),
    ],
)
def test_gpt2_small_to_xl(d_model, n_layers, n_heads, published):
    config = GPT2 | {"n_embd": d_model, "n_layer": n_layers, "n_head": n_heads}
    assert count_parameters(config) == published


def test_published_totals():
    # as the models' own cards state them, in billions
    assert count_parameters(MODELS["Llama-3.1-8B"]) == 8_030_261_248
    assert count_parameters(MODELS["Mistral-7B"]) == 7_241_732_096
    assert count_parameters(MODELS["Mixtral-8x7B"]) == 46_702_792_704
    assert round(active_parameters(MODELS["Mixtral-8x7B"]) / 1e9, 1) == 12.9
    assert active_parameters(MODELS["Qwen3-30B-A3B"]) / 1e9 == pytest.approx(3.3, rel=0.02)


def test_active_parameters_by_hand():
    # D = 4, one mixture layer of 3 experts 2 wide: 3 x 4 x 2 = 24 each, of which 1 is used
    shape = ModelShape(
        vocab_size=5,
        context_length=8,
        d_model=4,
        n_layers=1,
        n_heads=2,
        n_kv_heads=1,
        d_head=2,
        d_ff=0,
        n_experts=3,
        n_active_experts=1,
        d_expert=2,
    )
    parts = parameters_by_part(shape)
    assert parts["experts"] == 72 and parts["router"] == 12 and parts["mlp"] == 0
    assert parts["attention"] == 4 * 2 * (2 * 2 + 2 * 1)
    assert count_parameters(shape) - active_parameters(shape) == 48
    assert active_parameters(shape, embeddings=False) == active_parameters(shape) - 20


def test_positions_count_as_embeddings():
    config = GPT2 | {"n_embd": 768, "n_layer": 12, "n_head": 12}
    assert count_parameters(config, embeddings=False) == 124_439_808 - (50257 + 1024) * 768


def test_a_shape_is_read_from_every_kind_of_description(tmp_path):
    config = MODELS["Qwen3-0.6B"]
    expected = shape_of(config)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    assert shape_of(expected) is expected
    assert shape_of(AutoConfig.for_model(**config)) == expected
    assert shape_of(path) == shape_of(str(path)) == shape_of(tmp_path) == expected
    ours = ModelConfig(
        vocab_size=151936,
        context_length=8192,
        d_model=1024,
        n_layers=28,
        n_heads=16,
        n_kv_heads=8,
        d_head=128,
        d_ff=3072,
        qk_norm=True,
    )
    assert shape_of(ours) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert"}, "model_type='bert' is not supported: choose one of gemma"),
        ({}, "model_type=None"),
        ({"model_type": "llama", "hidden_size": 8}, "no num_attention_heads"),
        (object(), "a object has no vocab_size"),
    ],
)
def test_an_unknown_description_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        shape_of(config)


def test_a_bad_file_is_refused(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(ValueError, match="no such file"):
        shape_of(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="no JSON file"):
        shape_of(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="holds a list"):
        shape_of(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": 0}, "d_model=0"),
        ({"d_ff": 0}, "d_ff=0"),
        ({"n_kv_heads": 3}, "n_heads=4 is not a multiple of n_kv_heads=3"),
        ({"n_experts": 2}, "n_experts=2 with n_active_experts=0"),
        ({"n_experts": 2, "n_active_experts": 3, "d_expert": 4}, "n_active_experts=3"),
        ({"n_mixture_layers": 1}, "n_mixture_layers=1"),
    ],
)
def test_a_bad_shape_is_refused(change, message):
    sizes = {"vocab_size": 9, "context_length": 8, "d_model": 8, "n_layers": 2, "n_heads": 4}
    with pytest.raises(ValueError, match=message):
        ModelShape(**(sizes | {"n_kv_heads": 2, "d_head": 2, "d_ff": 8} | change))
