"""Bottleneck adapters and prompt tuning: by hand, against peft, invariants, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from llmcourse.inference.fused import can_fuse
from llmcourse.inference.generation import generate
from llmcourse.inference.sampling import SamplingParams
from llmcourse.models.adapters import (
    AdapterSettings,
    BottleneckAdapter,
    PromptEmbedding,
    PromptSettings,
    add_adapters,
    add_prompt,
    prepend_prompt,
    remove_adapters,
    remove_prompt,
    virtual_ids,
)
from llmcourse.models.config import ModelConfig
from llmcourse.models.lora import trainable_share
from llmcourse.models.nf4 import quantize_model
from llmcourse.models.pretrained import save_pretrained
from llmcourse.models.transformer import Transformer

CONFIG = ModelConfig(
    vocab_size=61, context_length=48, d_model=24, n_layers=2, n_heads=3, n_kv_heads=1, d_head=6, d_ff=20
)
GREEDY = SamplingParams(max_new_tokens=10, temperature=0)


def small_model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(CONFIG).eval()


def some_tokens(n_tokens: int = 35) -> torch.Tensor:
    return torch.randint(61, (2, n_tokens), generator=torch.Generator().manual_seed(5))


def test_an_adapter_by_hand():
    adapter = BottleneckAdapter(torch.nn.Linear(2, 2, bias=False), d_model=2, width=1)
    with torch.no_grad():
        adapter.sublayer.weight.copy_(torch.tensor([[0.0, 1], [1, 0]]))
        adapter.reduce.weight.copy_(torch.tensor([[1.0, 2]]))
        adapter.expand.weight.copy_(torch.tensor([[3.0], [-1]]))
        out = adapter(torch.tensor([5.0, -1]))  # h = (-1, 5); W_reduce h = 9
    g = F.gelu(torch.tensor(9.0))
    assert torch.allclose(out, torch.stack((-1 + 3 * g, 5 - g)))


@pytest.mark.parametrize("sublayers", [("attention", "mlp"), ("mlp",)], ids=["houlsby", "pfeiffer"])
def test_new_adapters_change_nothing_train_alone_and_come_off(sublayers):
    base, model = small_model(), small_model()
    add_adapters(model, AdapterSettings(width=5, sublayers=sublayers))
    with torch.no_grad():
        before = base(some_tokens())
        assert torch.equal(model(some_tokens()), before)
    assert trainable_share(model).trainable == 2 * len(sublayers) * 2 * 5 * 24
    # as after some training
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert name.split(".")[-2] in ("reduce", "expand")
                parameter.normal_(std=0.2)
    out = model.train()(some_tokens())
    assert (out - before).abs().max() > 0.1
    out.logsumexp(-1).sum().backward()
    for parameter in model.parameters():
        assert parameter.requires_grad == (parameter.grad is not None and bool(parameter.grad.any()))
    model.eval()
    assert not can_fuse(model)
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6]]
    assert generate(model, prompts, GREEDY) == generate(model, prompts, GREEDY, use_cache=False)
    remove_adapters(model)
    with torch.no_grad():
        assert torch.equal(model(some_tokens()), before)
    assert all(p.requires_grad for p in model.parameters()) and can_fuse(model)


def test_adapters_stand_on_quantized_blocks():
    model = quantize_model(small_model())
    with torch.no_grad():
        before = model(some_tokens())
        assert torch.equal(add_adapters(model)(some_tokens()), before)


def test_virtual_tokens_equal_embeddings_put_in_front():
    model = add_prompt(small_model(), PromptSettings(length=6))
    tokens = some_tokens(30)
    batch = prepend_prompt(model, {"tokens": tokens, "targets": tokens.roll(-1, 1), "rows": torch.arange(2)})
    assert batch["tokens"].shape == (2, 36) and batch["rows"].tolist() == [0, 1]
    assert batch["tokens"][:, :6].tolist() == [virtual_ids(model)] * 2 == [list(range(61, 67))] * 2
    assert (batch["targets"][:, :6] == -100).all() and torch.equal(
        batch["targets"][:, 6:], tokens.roll(-1, 1)
    )
    embedded = model.embedding(batch["tokens"])
    assert torch.equal(embedded[1, :6], model.embedding.prompt)
    assert torch.equal(embedded[:, 6:], F.embedding(tokens, model.head.weight))  # still tied
    with torch.no_grad():
        assert torch.equal(model(tokens), small_model()(tokens))  # without the virtual ids, the base


def test_only_the_prompt_is_trained():
    model = add_prompt(small_model(), PromptSettings(length=6)).train()
    batch = prepend_prompt(model, {"tokens": some_tokens(9), "targets": some_tokens(9)})
    F.cross_entropy(model(batch["tokens"]).flatten(0, 1), batch["targets"].flatten()).backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert trained == ["embedding.prompt"] == [n for n, p in model.named_parameters() if p.requires_grad]
    assert model.embedding.prompt.grad.abs().amax(dim=1).min() > 0  # every virtual token
    assert trainable_share(model).trainable == 6 * 24


def test_generation_takes_virtual_tokens_with_cache_and_padding():
    model = add_prompt(small_model(), PromptSettings(length=6, init="gaussian"))
    with torch.no_grad():
        model.embedding.prompt.mul_(4)
    ids = virtual_ids(model)
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6]]
    together = generate(model, [ids + prompt for prompt in prompts], GREEDY)
    assert together == generate(model, [ids + prompt for prompt in prompts], GREEDY, use_cache=False)
    assert together == [generate(model, [ids + prompt], GREEDY)[0] for prompt in prompts]
    assert together != generate(model, prompts, GREEDY)
    assert generate(remove_prompt(model), prompts, GREEDY) == generate(small_model(), prompts, GREEDY)


def test_inits():
    torch.manual_seed(0)
    base = small_model()
    table = base.embedding.weight
    rows = PromptEmbedding(base.embedding, PromptSettings(length=7)).prompt
    assert all((table == row).all(dim=1).any() for row in rows)
    noise = PromptEmbedding(base.embedding, PromptSettings(length=400, init="gaussian")).prompt
    assert noise.std().item() == pytest.approx(table.std().item(), rel=0.03)
    assert not any((table == row).all(dim=1).any() for row in noise)


def test_logits_equal_those_of_peft(tmp_path: Path):
    """Lester et al. (2021), section 2: the prompt is prepended to the embedded input."""
    from peft import PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = small_model()
    save_pretrained(model, tmp_path)
    theirs = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6),
    ).eval()
    add_prompt(model, PromptSettings(length=6))
    with torch.no_grad():
        theirs.prompt_encoder["default"].embedding.weight.copy_(model.embedding.prompt)
        tokens = some_tokens(30)
        ours = model(prepend_prompt(model, {"tokens": tokens, "targets": tokens})["tokens"])
        expected = theirs(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    assert (ours - expected).abs().max() < 1e-5


def test_refusals():
    for settings, change in (
        (AdapterSettings, {"width": 0}),
        (AdapterSettings, {"sublayers": ()}),
        (AdapterSettings, {"sublayers": ("head",)}),
        (PromptSettings, {"length": 0}),
        (PromptSettings, {"init": "zeros"}),
    ):
        with pytest.raises(ValueError, match=next(iter(change))):
            settings(**change)
    for function, message in (
        (remove_adapters, "no bottleneck adapters"),
        (remove_prompt, "no virtual tokens"),
        (virtual_ids, "no virtual tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            function(small_model())
    with pytest.raises(ValueError, match="no virtual tokens"):
        prepend_prompt(small_model(), {"tokens": some_tokens(), "targets": some_tokens()})
    with pytest.raises(ValueError, match="already"):
        add_adapters(add_adapters(small_model()))
    with pytest.raises(ValueError, match="already"):
        add_prompt(add_prompt(small_model(), PromptSettings(length=3)))
    with pytest.raises(ValueError, match="no room in a context of 48"):
        add_prompt(small_model(), PromptSettings(length=48))
