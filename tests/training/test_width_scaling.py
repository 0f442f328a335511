"""muP and the simple rule: groups by hand, the base width unchanged, activations flat over width, folding, errors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from llmcourse.models.config import ModelConfig
from llmcourse.models.transformer import Transformer
from llmcourse.training.fit import FitSettings, fit
from llmcourse.training.pretraining import next_token_loss
from llmcourse.training.width_scaling import (
    RULES,
    coordinate_check,
    fold_multiplier,
    parameter_groups,
    prepare,
    width_exponent,
    width_multiplier,
    width_scaled_adamw,
)

V, T, BASE = 48, 16, 32


def model(width: int, tie: bool = True, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    config = ModelConfig(
        vocab_size=V,
        context_length=T,
        d_model=width,
        n_layers=2,
        n_heads=width // 16,
        n_kv_heads=width // 16,
        d_ff=2 * width,
        tie_embeddings=tie,
    )
    return Transformer(config)


def batch(seed: int = 0) -> dict[str, Tensor]:
    rows = torch.randint(V, (8, T + 1), generator=torch.Generator().manual_seed(seed))
    return {"tokens": rows[:, :-1].contiguous(), "targets": rows[:, 1:].contiguous()}


class Batches:
    """A few batches, round and round."""

    def __init__(self) -> None:
        self.position = 0

    def next(self) -> dict[str, Tensor]:
        self.position += 1
        return batch(self.position % 3)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def test_groups_by_hand():
    wide = model(128)
    hidden, embeddings, vectors = parameter_groups(wide, BASE, "mup", weight_decay=0.1)
    assert len(hidden["params"]) == 2 * 7 and hidden["lr_scale"] == 0.25
    assert hidden["weight_decay"] == pytest.approx(0.4)  # lr x decay stays
    assert [p.shape for p in embeddings["params"]] == [(V, 128)]
    assert embeddings["lr_scale"] == 1 and embeddings["weight_decay"] == 0.1
    assert len(vectors["params"]) == 5 and vectors["lr_scale"] == 1 and vectors["weight_decay"] == 0
    assert [g["lr_scale"] for g in parameter_groups(wide, BASE, "simple")] == [0.25, 1, 1]
    assert [g["lr_scale"] for g in parameter_groups(wide, BASE, "standard")] == [1, 1, 1]
    (optimizer,) = width_scaled_adamw(wide, BASE, "mup", lr=0.02)
    assert [g["lr"] for g in optimizer.param_groups] == [0.005, 0.02, 0.02]
    assert width_multiplier(128, BASE, "standard") == 1 and width_multiplier(16, BASE, "mup") == 0.5


def test_mup_initialization():
    plain, mup = model(128), prepare(model(128), BASE)
    # 9 / 32 instead of 9 / 128: the base model's variance
    assert float(mup.embedding.weight.detach().std()) == pytest.approx(3 * BASE**-0.5, rel=0.03)
    torch.testing.assert_close(mup.embedding.weight, 2 * plain.embedding.weight)
    torch.testing.assert_close(mup.blocks[1].mlp.up.weight, plain.blocks[1].mlp.up.weight)
    tokens = batch()["tokens"]
    torch.testing.assert_close(mup(tokens), mup.hidden_states(tokens) @ mup.embedding.weight.T / 4)
    untied = prepare(model(128, tie=False), BASE)
    torch.testing.assert_close(untied.head.weight, 2 * model(128, tie=False).head.weight)


@pytest.mark.parametrize("rule", RULES)
def test_the_base_width_is_left_as_it_is(rule: str):
    plain, prepared = model(BASE), prepare(model(BASE), BASE, rule)
    tokens = batch()["tokens"]
    assert torch.equal(plain(tokens), prepared(tokens))
    assert all(group["lr_scale"] == 1 for group in parameter_groups(prepared, BASE, rule))
    settings = FitSettings(steps=3, lr=1e-2)
    fit(plain, Batches(), next_token_loss, settings, progress=False)
    fit(
        prepared,
        Batches(),
        next_token_loss,
        settings,
        optimizers=width_scaled_adamw(prepared, BASE, rule),
        progress=False,
    )
    for (name, ours), theirs in zip(prepared.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")


def test_standard_and_simple_leave_the_model_as_it_is():
    tokens = batch()["tokens"]
    for rule in ("standard", "simple"):
        assert torch.equal(prepare(model(128), BASE, rule)(tokens), model(128)(tokens))


def test_fit_scales_the_rate_of_each_group():
    # one step of Adam moves every weight by lr x lr_scale (betas cancel at step 1), whatever the gradient
    wide = prepare(model(128), BASE)
    before = copy.deepcopy(wide.state_dict())
    optimizers = width_scaled_adamw(wide, BASE, weight_decay=0.0, eps=0.0)
    settings = FitSettings(steps=1, lr=0.01, schedule="constant")
    result = fit(wide, Batches(), next_token_loss, settings, optimizers=optimizers, progress=False)
    assert result.records[0]["lr"] == 0.01
    after = wide.state_dict()

    def moved(name: str) -> float:
        change = (after[name] - before[name]).abs()
        return float(change[change > 0].median())

    assert moved("blocks.0.mlp.up.weight") == pytest.approx(0.0025, rel=1e-3)
    assert moved("embedding.weight") == pytest.approx(0.01, rel=1e-3)
    assert moved("final_norm.weight") == pytest.approx(0.01, rel=1e-3)


def test_activations_move_alike_at_all_widths_under_mup_only():
    def exponents(rule: str) -> dict[str, float]:
        records = coordinate_check(
            model, [32, 64, 128], [batch()], next_token_loss, base_width=BASE, rule=rule, lr=3e-2, steps=3
        )
        return {layer: width_exponent(records, layer) for layer in ("embedding", "block 0", "block 1")}

    standard, simple, mup = (exponents(rule) for rule in RULES)
    for layer in ("block 0", "block 1"):
        assert standard[layer] > 0.8 and abs(simple[layer]) < 0.35 and abs(mup[layer]) < 0.35, layer
    assert abs(mup["embedding"]) < 0.1


def test_records_of_the_coordinate_check():
    records = coordinate_check(model, [32, 64], [batch()], next_token_loss, base_width=BASE, steps=2)
    layers = ["embedding", "block 0", "block 1", "logits"]
    assert len(records) == 2 * 3 * 4 and [r["layer"] for r in records[:4]] == layers
    assert all(r["change"] == 0 for r in records if r["step"] == 0)
    assert all(r["change"] > 0 for r in records if r["step"] > 0)
    # embeddings keep the base model's size at every width
    sizes = [r["size"] for r in records if r["step"] == 0 and r["layer"] == "embedding"]
    assert sizes == pytest.approx([3 * BASE**-0.5] * 2, rel=0.1)
    assert width_exponent(records, "embedding", "size") == pytest.approx(0, abs=0.15)


def test_folding_keeps_the_function():
    for tie in (True, False):
        wide = prepare(model(128, tie=tie), BASE)
        tokens = batch()["tokens"]
        expected = wide(tokens)
        torch.testing.assert_close(fold_multiplier(wide)(tokens), expected)
        torch.testing.assert_close(fold_multiplier(wide)(tokens), expected)  # a second time changes nothing
        fresh = Transformer(wide.config)
        fresh.load_state_dict(wide.state_dict())
        torch.testing.assert_close(fresh(tokens), expected)


def test_errors():
    with pytest.raises(ValueError, match="rule='half': choose one of standard, simple, mup"):
        parameter_groups(model(32), BASE, "half")
    with pytest.raises(ValueError, match="base_width=0"):
        prepare(model(32), 0)
    with pytest.raises(ValueError, match="has an output multiplier already"):
        prepare(prepare(model(64), BASE), BASE)
    with pytest.raises(ValueError, match="0 batches, steps=4"):
        coordinate_check(model, [32], [], next_token_loss, base_width=BASE)
    with pytest.raises(ValueError, match="1 batches, steps=0"):
        coordinate_check(model, [32], [batch()], next_token_loss, base_width=BASE, steps=0)
    records = coordinate_check(model, [32], [batch()], next_token_loss, base_width=BASE, steps=1)
    with pytest.raises(ValueError, match="fewer than 2 widths"):
        width_exponent(records, "logits")
