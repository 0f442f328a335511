"""LoRA, rsLoRA and DoRA: by hand, against peft, invariants, and refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from llmcourse.inference.fused import can_fuse
from llmcourse.inference.generation import generate
from llmcourse.inference.sampling import SamplingParams
from llmcourse.models.config import ModelConfig
from llmcourse.models.lora import (
    LoRALinear,
    LoRASettings,
    add_lora,
    dora_gain,
    fold_lora,
    lora_disabled,
    lora_layers,
    lora_parameters,
    lora_update,
    lora_weight,
    merge_lora,
    remove_lora,
    trainable_share,
    unmerge_lora,
)
from llmcourse.models.nf4 import NF4Settings, quantize_model
from llmcourse.models.transformer import Transformer

CONFIG = ModelConfig(
    vocab_size=61, context_length=40, d_model=24, n_layers=2, n_heads=3, n_kv_heads=1, d_head=6, d_ff=20
)
KINDS = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "both": {"rslora": True, "dora": True},
}


def small_model(seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(CONFIG).eval()


def tokens() -> torch.Tensor:
    return torch.randint(61, (2, 35), generator=torch.Generator().manual_seed(5))


def shake(model: nn.Module, seed: int = 1) -> None:
    """Adapters as after training: every part moved."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in lora_parameters(model).items():
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.mul_(1 + noise) if name.endswith("magnitude") else parameter.add_(noise)


def adapted(kind: str = "lora", **changes: object) -> Transformer:
    model = add_lora(small_model(), LoRASettings(**({"rank": 3, "alpha": 5.0} | KINDS[kind] | changes)))
    shake(model)
    return model


def test_a_hand_computed_update():
    # W = [[3, 4], [0, 2]], A = [1, -1], B = [[1], [2]], s = 2: W + s B A = [[5, 2], [4, -2]]
    weight, a, b = torch.tensor([[3.0, 4], [0, 2]]), torch.tensor([[1.0, -1]]), torch.tensor([[1.0], [2]])
    assert torch.equal(lora_weight(weight, a, b, 2.0), torch.tensor([[5.0, 2], [4, -2]]))
    # x = (1, 3): A x = -2, s B A x = (-4, -8)
    assert torch.equal(lora_update(torch.tensor([1.0, 3]), a, b, 2.0), torch.tensor([-4.0, -8]))
    # rows of length sqrt(29) and sqrt(20)
    gain = dora_gain(weight, a, b, 2.0, torch.tensor([5.0, 2.0]))
    assert torch.allclose(gain, torch.tensor([5 / math.sqrt(29), 2 / math.sqrt(20)]))
    lengths = lora_weight(weight, a, b, 2.0, torch.tensor([5.0, 2.0])).norm(dim=1)
    assert torch.allclose(lengths, torch.tensor([5.0, 2.0]))  # the magnitude is the row's length


def test_scaling_is_alpha_over_r_or_its_root():
    assert LoRASettings(rank=16, alpha=8.0).scaling == 0.5
    assert LoRASettings(rank=16, alpha=8.0, rslora=True).scaling == 2.0


@pytest.mark.parametrize("kind", KINDS)
def test_an_untrained_adapter_changes_nothing(kind):
    base = small_model()
    with torch.no_grad():
        before = base(tokens())
        after = add_lora(base, LoRASettings(rank=3, **KINDS[kind]))(tokens())
    assert torch.allclose(before, after, atol=2e-6, rtol=0)


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_initial_a_and_b(init):
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(400, 30, bias=False), LoRASettings(rank=20, init=init))
    assert not layer.b.any()
    bound = 1 / math.sqrt(400)
    if init == "kaiming":
        assert layer.a.abs().max() <= bound
        assert layer.a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    else:
        assert layer.a.std().item() == pytest.approx(1 / 20, rel=0.03)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_forward_gradients_and_merge_equal_peft(kind, init):
    """Hu et al. (2021) section 4.1; Kalajdzievski (2023) eq. 7; Liu et al. (2024) eq. 5 with section 4.3."""
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    torch.manual_seed(0)
    linear = nn.Linear(14, 9, bias=False)
    options = KINDS[kind]
    ours = LoRALinear(linear, LoRASettings(rank=4, alpha=6.0, init=init, **options))
    settings = LoraConfig(
        r=4, lora_alpha=6, use_rslora="rslora" in options, use_dora="dora" in options, init_lora_weights=True
    )
    theirs = Linear(nn.Linear(14, 9, bias=False), "default", settings, r=4, lora_alpha=6)
    with torch.no_grad():
        theirs.base_layer.weight.copy_(linear.weight)
        if ours.magnitude is not None:
            ours.magnitude.mul_(torch.linspace(0.5, 1.5, 9))
            theirs.lora_magnitude_vector["default"].weight.copy_(ours.magnitude)
        ours.b.normal_(std=0.3)  # outputs of about 1, for which 1e-6 is a few roundings
        theirs.lora_A["default"].weight.copy_(ours.a)
        theirs.lora_B["default"].weight.copy_(ours.b)
    x, y = torch.randn(2, 5, 14).requires_grad_(), torch.randn(2, 5, 9)
    x_theirs = x.detach().clone().requires_grad_()
    out, expected = ours(x), theirs(x_theirs)
    assert (out - expected).abs().max() < 1e-6
    ((out - y) ** 2).mean().backward()
    ((expected - y) ** 2).mean().backward()
    pairs = [
        (x, x_theirs),
        (ours.a, theirs.lora_A["default"].weight),
        (ours.b, theirs.lora_B["default"].weight),
    ]
    if ours.magnitude is not None:
        pairs.append((ours.magnitude, theirs.lora_magnitude_vector["default"].weight))
    for own, other in pairs:
        assert own.grad.abs().max() > 1e-3
        assert (own.grad - other.grad).abs().max() < 1e-6
    ours.merge()
    theirs.merge()
    assert (ours.merged_weight - theirs.base_layer.weight).abs().max() < 1e-6
    assert (ours.fold().weight - ours.merged_weight).abs().max() == 0


def test_merging_again_takes_the_weights_as_they_are_now():
    torch.manual_seed(0)
    layer, x = LoRALinear(nn.Linear(14, 9, bias=False), LoRASettings(rank=4)).eval(), torch.randn(3, 14)
    layer.merge()
    with torch.no_grad():
        layer.b.normal_()  # as when the weights of another adapter are loaded
    layer.merge()
    merged = layer(x)
    layer.unmerge()
    assert torch.allclose(merged, layer(x), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_acts_in_training_only_and_as_in_peft(kind):
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    torch.manual_seed(0)
    options = KINDS[kind]
    ours = LoRALinear(nn.Linear(14, 9, bias=False), LoRASettings(rank=4, alpha=6.0, dropout=0.4, **options))
    settings = LoraConfig(
        r=4, lora_alpha=6, lora_dropout=0.4, use_rslora="rslora" in options, use_dora="dora" in options
    )
    theirs = Linear(nn.Linear(14, 9, bias=False), "default", settings, r=4, lora_alpha=6)
    with torch.no_grad():
        ours.b.normal_()
        theirs.base_layer.weight.copy_(ours.base.weight)
        theirs.lora_A["default"].weight.copy_(ours.a)
        theirs.lora_B["default"].weight.copy_(ours.b)
        if ours.magnitude is not None:
            theirs.lora_magnitude_vector["default"].weight.copy_(ours.magnitude)
        x = torch.randn(3, 14)
        results = []
        for layer in (ours.train(), theirs.train()):
            torch.manual_seed(7)
            results.append(layer(x))
        assert (results[0] - results[1]).abs().max() < 1e-6
        assert (ours(x) - results[0]).abs().max() > 1e-2  # another mask
        assert torch.equal(ours.eval()(x), ours(x))
        assert (ours(x) - theirs.eval()(x)).abs().max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_merge_and_unmerge_are_idempotent_and_lose_nothing(kind):
    model = adapted(kind)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        plain = model(tokens())
        for _ in range(2):
            merge_lora(model)
            assert all(layer.is_merged for layer in lora_layers(model).values())
            assert (model(tokens()) - plain).abs().max() < 1e-5
        assert model.state_dict().keys() == state.keys()  # a merged model saves as an unmerged one
        for _ in range(2):
            unmerge_lora(model)
            assert torch.equal(model(tokens()), plain)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_fold_gives_a_plain_model_and_generation_agrees(kind):
    model = adapted(kind)
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6, 5], [35]]
    params = SamplingParams(max_new_tokens=12, temperature=0)
    assert not can_fuse(model)
    through_modules = generate(model, prompts, params)
    with lora_disabled(model):
        assert generate(model, prompts, params) != through_modules
    merge_lora(model)
    assert generate(model, prompts, params) == through_modules
    with torch.no_grad():
        logits = model(tokens())
    fold_lora(model)
    assert can_fuse(model) and not lora_layers(model)
    assert model.state_dict().keys() == small_model().state_dict().keys()
    assert all(p.requires_grad for p in model.parameters())
    assert generate(model, prompts, params) == through_modules
    with torch.no_grad():
        assert (model(tokens()) - logits).abs().max() < 1e-5


def test_disabled_is_the_base_and_remove_restores_it():
    base = small_model()
    model = adapted()
    with torch.no_grad():
        expected, changed = base(tokens()), model(tokens())
        assert (expected - changed).abs().max() > 0.1
        with pytest.raises(KeyError), lora_disabled(model):
            assert torch.equal(model(tokens()), expected)
            raise KeyError
        assert torch.equal(model(tokens()), changed)  # on again, whatever happened inside
        remove_lora(model)
        assert torch.equal(model(tokens()), expected)
    assert all(p.requires_grad for p in model.parameters())


def test_only_adapters_train_and_are_counted_by_hand():
    model = adapted("dora", targets=("query", "down"))
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == set(lora_parameters(model)) and len(names) == 2 * 2 * 3
    model.train()(tokens()).logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in lora_parameters(model).values())
    assert all(p.grad is None for name, p in model.named_parameters() if name not in names)
    share = trainable_share(model)
    # query 24 -> 18 and down 20 -> 24 in each of 2 blocks: r (in + out) + out
    expected = 2 * (3 * (24 + 18) + 18 + 3 * (20 + 24) + 24)
    base = sum(p.numel() for p in small_model().parameters())
    assert (share.trainable, share.total, share.share) == (
        expected,
        base + expected,
        expected / (base + expected),
    )
    quantized = add_lora(
        quantize_model(small_model()), LoRASettings(rank=3, dora=True, targets=("query", "down"))
    )
    assert trainable_share(quantized) == share


def test_every_setting_changes_the_result():
    def result(**changes: object) -> torch.Tensor:
        torch.manual_seed(3)
        layer = LoRALinear(
            nn.Linear(14, 9, bias=False), LoRASettings(**({"rank": 4, "alpha": 2.0} | changes))
        )
        torch.manual_seed(4)
        with torch.no_grad():
            layer.b.normal_()
            return layer(torch.ones(1, 14))

    plain = result()
    for change in (
        {"rank": 3},
        {"alpha": 3.0},
        {"dropout": 0.5},
        {"init": "gaussian"},
        {"rslora": True},
        {"dora": True},
    ):
        assert not torch.allclose(result(**change), plain), change
    assert set(lora_layers(adapted(targets=("up",)))) == {"blocks.0.mlp.up", "blocks.1.mlp.up"}


def test_dora_survives_a_row_of_zeros():
    linear = nn.Linear(14, 9, bias=False)
    with torch.no_grad():
        linear.weight[4] = 0
        layer = LoRALinear(linear, LoRASettings(rank=2, dora=True))
        assert not layer(torch.randn(3, 14))[:, 4].any() and not layer.fold().weight[4].any()


def test_a_bfloat16_base_keeps_float32_adapters():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(14, 9, bias=False).bfloat16(), LoRASettings(rank=4, dora=True))
    assert {p.dtype for p in (layer.a, layer.b, layer.magnitude)} == {torch.float32}
    out = layer(torch.randn(2, 14).bfloat16())
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert layer.b.grad.dtype == torch.float32 and layer.b.grad.any()
    layer.eval().merge()
    assert layer.merged_weight.dtype == torch.bfloat16


def test_qlora_folds_into_float_layers():
    model = add_lora(quantize_model(small_model(), NF4Settings()), LoRASettings(rank=3))
    shake(model)
    with torch.no_grad():
        expected = model(tokens())
        with pytest.raises(ValueError, match="quantized and cannot be merged"):
            merge_lora(model)
        fold_lora(model)
        assert can_fuse(model)
        torch.testing.assert_close(model(tokens()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantized", [False, True], ids=["lora", "qlora"])
def test_training_lowers_the_loss_and_moves_the_adapters_only(quantized):
    model = small_model()
    add_lora(quantize_model(model) if quantized else model, LoRASettings(rank=3, dora=True)).train()
    parameters = lora_parameters(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.02)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(tokens()[:, :-1]).flatten(0, 1), tokens()[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1.0
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != (name in parameters), name


def test_refusals():
    for change in (
        {"rank": 0},
        {"alpha": 0.0},
        {"alpha": math.nan},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"targets": ()},
        {"targets": ("head",)},
        {"init": "zeros"},
    ):
        with pytest.raises(ValueError, match=next(iter(change))):
            LoRASettings(**change)
    with pytest.raises(ValueError, match="has a bias"):
        LoRALinear(nn.Linear(3, 2), LoRASettings())
    with pytest.raises(ValueError, match="already"):
        add_lora(adapted())
    with pytest.raises(ValueError, match="no linear layer named"):
        add_lora(nn.Sequential(nn.Linear(2, 2)))
    for function in (merge_lora, unmerge_lora, fold_lora, remove_lora):
        with pytest.raises(ValueError, match="no LoRA layers"):
            function(small_model())
    with pytest.raises(ValueError, match="no LoRA layers"), lora_disabled(small_model()):
        pass
    model = adapted()
    merge_lora(model)
    with pytest.raises(ValueError, match="unmerge_lora"):
        model.train()(tokens())
