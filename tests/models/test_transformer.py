"""The decoder as a whole: causality, shapes, initialization, refusals. `test_pretrained` compares its logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llmcourse.models.config import ModelConfig
from llmcourse.models.transformer import Block, Transformer


def tiny(**changes: object) -> ModelConfig:
    sizes = {
        "vocab_size": 19,
        "context_length": 160,
        "d_model": 16,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
    }
    return ModelConfig(**(sizes | {"d_ff": 24} | changes))


def model_of(config: ModelConfig, seed: int = 0) -> Transformer:
    """A model with weights large enough that every token of the past matters to the logits."""
    torch.manual_seed(seed)
    model = Transformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)
    return model


def random_tokens(B: int, T: int, V: int = 19, seed: int = 0) -> Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("T", "t"), [(6, 3), (32, 31), (33, 1), (150, 127), (150, 128), (150, 149)])
@pytest.mark.parametrize("qk_norm", [False, True])
@torch.no_grad()
def test_a_token_changes_no_logit_before_it_and_each_after_it(T, t, qk_norm):
    model, tokens = model_of(tiny(qk_norm=qk_norm)), random_tokens(2, T)
    other = tokens.clone()
    other[0, t] = (other[0, t] + 1) % 19
    before, after = model(tokens), model(other)
    assert torch.equal(before[0, :t], after[0, :t])
    assert torch.equal(before[1], after[1])  # nor any of another row
    assert (before[0, t:] != after[0, t:]).any(dim=-1).all()


@torch.no_grad()
def test_a_prefix_has_the_logits_of_the_whole():
    model, tokens = model_of(tiny()), random_tokens(2, 140)
    whole = model(tokens)
    for n in (1, 20, 40, 139):  # both attention kernels
        torch.testing.assert_close(model(tokens[:, :n]), whole[:, :n], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_forward_is_embedding_blocks_norm_head():
    model, tokens = model_of(tiny(tie_embeddings=False)), random_tokens(2, 7)
    x = model.embedding.weight[tokens]
    for block in model.blocks:
        x = x + block.attention(block.attention_norm(x), model.cos[:7], model.sin[:7])
        x = x + block.mlp(block.mlp_norm(x))
    hidden = F.rms_norm(x, (16,), model.final_norm.weight, 1e-5)
    torch.testing.assert_close(model.hidden_states(tokens), hidden, rtol=1e-5, atol=1e-5)
    logits = model(tokens)
    assert logits.shape == (2, 7, 19) and logits.dtype == torch.float32
    torch.testing.assert_close(logits, hidden @ model.head.weight.T, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_positions_matter():
    model = model_of(tiny())
    one, other = (model(torch.tensor([ids]))[0, -1] for ids in ([3, 5, 7], [5, 3, 7]))
    assert not torch.allclose(one, other, atol=1e-3)


@pytest.mark.parametrize(
    "change",
    [
        {"n_kv_heads": 4},
        {"d_head": 6},
        {"n_layers": 1},
        {"d_ff": 20},
        {"rope_theta": 100.0},
        {"norm_eps": 0.1},
        {"tie_embeddings": False},
        {"qk_norm": True},
    ],
    ids=str,
)
@torch.no_grad()
def test_every_option_changes_the_logits(change):
    tokens = random_tokens(1, 9)
    assert not torch.allclose(model_of(tiny())(tokens), model_of(tiny(**change))(tokens), atol=1e-4)


def test_a_tied_head_is_the_embedding_and_gets_gradients_from_both_ends():
    model = Transformer(tiny())
    assert model.head.weight is model.embedding.weight
    tokens = torch.tensor([[1, 2]])
    model(tokens)[0, -1, 7].backward()
    gradient = model.embedding.weight.grad
    assert gradient[1].any() and gradient[2].any() and gradient[7].any() and not gradient[9].any()
    untied = Transformer(tiny(tie_embeddings=False))
    assert untied.head.weight is not untied.embedding.weight


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_initialization_has_the_documented_spread(tied):
    D, n_layers = 128, 8
    config = tiny(vocab_size=500, d_model=D, n_layers=n_layers, d_ff=256, tie_embeddings=tied)
    torch.manual_seed(0)
    for name, parameter in Transformer(config).named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
            continue
        expected = 1 / math.sqrt(D)
        if name.endswith(("attention.output.weight", "mlp.down.weight")):
            expected /= math.sqrt(2 * n_layers)
        elif name == "embedding.weight":
            expected *= 3
        # the standard deviation of n normal numbers has a relative error of about 1 / sqrt(2 n), n >= 8192: 0.8 %
        assert float(parameter.detach().std()) == pytest.approx(expected, rel=0.04), name
        assert abs(float(parameter.detach().mean())) < 0.05 * expected, name


def test_weights_follow_the_seed():
    def embedding(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return Transformer(tiny()).embedding.weight

    assert torch.equal(embedding(1), embedding(1)) and not torch.equal(embedding(1), embedding(2))


def test_rotary_tables_are_not_saved():
    assert not {"cos", "sin"} & Transformer(tiny()).state_dict().keys()


def test_the_context_must_not_overflow():
    model = Transformer(tiny(context_length=8))
    assert model(random_tokens(1, 8)).shape == (1, 8, 19)
    with pytest.raises(ValueError, match=r"9 tokens exceed the context of 8: shorten"):
        model(random_tokens(1, 9))


def test_block_adds_to_the_residual_stream():
    torch.manual_seed(0)
    block, x = Block(tiny()), torch.randn(1, 3, 16)
    torch.nn.init.zeros_(block.attention.output.weight)
    torch.nn.init.zeros_(block.mlp.down.weight)
    assert torch.equal(block(x, torch.ones(3, 4), torch.zeros(3, 4)), x)


def test_d_head_follows_the_width_unless_given():
    assert tiny().d_head == 4
    assert tiny(d_head=10).d_head == 10
    assert tiny(d_model=18, d_head=2).d_head == 2  # 18 is no multiple of 4 heads: no matter then


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "vocab_size=0: give a positive number"),
        ({"context_length": -1}, "context_length=-1"),
        ({"d_model": 0}, "d_model=0"),
        ({"n_layers": 0}, "n_layers=0"),
        ({"n_heads": 0}, "n_heads=0"),
        ({"n_kv_heads": 0}, "n_kv_heads=0"),
        ({"d_ff": 0}, "d_ff=0"),
        ({"d_head": 0}, "d_head=0"),
        ({"d_head": -2}, "d_head=-2"),
        ({"d_head": 3}, "d_head=3 is odd"),
        ({"n_kv_heads": 3}, "n_heads=4 is not a multiple of n_kv_heads=3"),
        ({"d_model": 18}, "d_model=18 is not a multiple of n_heads=4"),
        ({"d_model": 12}, "d_head=3 is odd"),
        ({"rope_theta": 0.0}, "rope_theta=0.0"),
        ({"norm_eps": -1e-5}, "norm_eps=-1e-05"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_impossible_shapes_are_refused(change, message):
    with pytest.raises(ValueError) as error:
        tiny(**change)
    assert message in str(error.value) and "\n" not in str(error.value)
