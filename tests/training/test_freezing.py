"""Which weights move: counted by hand, seen after a step, tied heads untied without changing the model."""

from __future__ import annotations

import pytest
import torch

from llmcourse.accounting import count_parameters
from llmcourse.models.config import ModelConfig
from llmcourse.models.transformer import Transformer
from llmcourse.training.freezing import (
    choose_trainable,
    count_trainable,
    train_all,
    train_head,
    train_last_blocks,
)

V, D = 31, 24


def make(tied: bool = True) -> Transformer:
    torch.manual_seed(0)
    sizes = {"d_model": D, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "d_ff": 40}
    return Transformer(ModelConfig(vocab_size=V, context_length=16, tie_embeddings=tied, **sizes))


def moved(model: Transformer) -> set[str]:
    """Names of the parameters that a step of gradient descent changes."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.arange(12)[None]).logsumexp(-1).sum().backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= p.grad
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("tied", [True, False])
def test_full(tied: bool):
    model = make(tied)
    model.requires_grad_(False)
    trainable = train_all(model)
    assert trainable.parameters == trainable.total == count_parameters(model.config)
    assert moved(model) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("tied", [True, False])
def test_head(tied: bool):
    model, tokens = make(tied), torch.arange(12)[None]
    logits = model(tokens)
    trainable = train_head(model)
    assert (trainable.parameters, trainable.total) == (V * D, count_parameters(make(False).config))
    torch.testing.assert_close(model(tokens), logits, rtol=0, atol=0)
    assert moved(model) == {"head.weight"} and not model.config.tie_embeddings
    assert str(trainable) == f"{V * D:,} of {trainable.total:,} parameters ({trainable.share:.1%})"


def test_last_blocks():
    model = make()
    block = sum(p.numel() for p in model.blocks[0].parameters())
    trainable = train_last_blocks(model, 2)
    assert trainable.parameters == 2 * block + D + V * D
    names = moved(model)
    assert {name.split(".")[0] for name in names} == {"blocks", "final_norm", "head"}
    assert {name.split(".")[1] for name in names if name.startswith("blocks")} == {"1", "2"}
    assert model.embedding.weight.grad is None


def test_by_name():
    for name, same in (("full", train_all), ("head", train_head)):
        assert choose_trainable(make(), name) == same(make())
    assert choose_trainable(make(), "last:1") == train_last_blocks(make(), 1)
    assert count_trainable(make()) == train_all(make())
    for name in ("all", "last", "last:-1", "last:1x"):
        with pytest.raises(ValueError, match="choose full, head or last:K"):
            choose_trainable(make(), name)
    for name in ("last:0", "last:4"):
        with pytest.raises(ValueError, match="the model has 3, give 1 to that many"):
            choose_trainable(make(), name)
