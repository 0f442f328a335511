"""The fused forward pass: the model's own logits, in every shape of the family; refused where weights do not tell."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llmcourse.inference import KVCache, SamplingParams, generate
from llmcourse.inference import fused as module
from llmcourse.inference.fused import FusedTransformer, can_fuse
from llmcourse.models.config import ModelConfig
from llmcourse.models.transformer import Transformer

SHAPES = {
    "grouped": {"n_heads": 4, "n_kv_heads": 2},
    "multi-head": {"n_heads": 4, "n_kv_heads": 4},
    "normed heads": {"n_heads": 4, "n_kv_heads": 1, "qk_norm": True, "d_head": 10},
    "tied": {"n_heads": 2, "n_kv_heads": 1, "tie_embeddings": True},
    "large floor": {"n_heads": 2, "n_kv_heads": 2, "norm_eps": 0.3, "qk_norm": True},
}


def make(**changes: object) -> Transformer:
    torch.manual_seed(3)
    sizes = {
        "vocab_size": 37,
        "context_length": 24,
        "d_model": 24,
        "n_layers": 3,
        "d_ff": 28,
        "tie_embeddings": False,
    }
    model = Transformer(ModelConfig(**(sizes | changes))).eval()
    with torch.no_grad():  # gains that are not 1
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.3, 1.7)
    return model


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("padding", [None, (0, 2, 5)])
def test_logits_are_the_models_at_prefill_and_at_every_step(shape, padding):
    model = make(**SHAPES[shape]).double()
    fused = FusedTransformer(model)
    tokens = torch.randint(37, (3, 15), generator=torch.Generator().manual_seed(0))
    left = None if padding is None else torch.tensor(padding)
    caches = [KVCache(model.config, 3, 15, padding=left, dtype=torch.float64) for _ in range(2)]
    with torch.inference_mode():
        for start, end in ((0, 6), (6, 7), (7, 8), (8, 12), (12, 15)):
            part = tokens[:, start:end]
            expected = model(part, caches[0])[:, -1]
            # the norms keep a float32 length in both, so float64 weights agree to float32's rounding only
            assert torch.allclose(fused.logits(part, caches[1]), expected, rtol=0, atol=3e-6)
            assert caches[0].length == caches[1].length == end


def test_low_precision_stays_near_the_model():
    model = make().to(torch.bfloat16)
    tokens = torch.randint(37, (2, 9), generator=torch.Generator().manual_seed(0))
    caches = [KVCache(model.config, 2, 9, dtype=torch.bfloat16) for _ in range(2)]
    with torch.inference_mode():
        ours, theirs = FusedTransformer(model).logits(tokens, caches[0]), model(tokens, caches[1])[:, -1]
    assert ours.dtype == torch.bfloat16
    exact = make()(tokens)[:, -1]
    assert (ours - exact).abs().max() < 2 * (theirs - exact).abs().max() + 1e-3


def test_an_altered_model_is_not_fused_and_generation_follows_it():
    model, prompts = make(), [[1, 2, 3], [4]]
    greedy = SamplingParams(temperature=0, max_new_tokens=6)
    plain = generate(model, prompts, greedy)
    assert can_fuse(model) and generate(model, prompts, greedy, fused=False) == plain

    handle = model.blocks[1].register_forward_hook(lambda module, inputs, output: output * 0)
    assert not can_fuse(model)
    with pytest.raises(ValueError, match="replaced or hooked"):
        FusedTransformer(model)
    hooked = generate(model, prompts, greedy)
    assert hooked == generate(model, prompts, greedy, fused=False) != plain
    handle.remove()
    assert can_fuse(model) and generate(model, prompts, greedy) == plain

    class Adapted(nn.Linear):
        """A layer that adds something to its product, as adapters do."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    model.blocks[0].mlp.down = Adapted(28, 24, bias=False)
    assert not can_fuse(model)
    model = make()
    model.forward = lambda *_: None
    assert not can_fuse(model) and not can_fuse(nn.Linear(2, 2))


def test_a_large_model_is_not_copied(monkeypatch):
    monkeypatch.setattr(module, "LARGEST", 1000)
    assert not can_fuse(make())


def test_the_copy_does_not_follow_the_model():
    model = make()
    fused = FusedTransformer(model)
    tokens = torch.tensor([[1, 2, 3]])

    def logits() -> torch.Tensor:
        return fused.logits(tokens, KVCache(model.config, 1, 3))

    with torch.inference_mode():
        before = logits()
        model.blocks[0].mlp.down.weight.add_(1)
        assert torch.equal(logits(), before)
