"""Hook points: the numbers of a plain recomputation, changes that act where they are made, nothing left behind."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from llmcourse.inference import SamplingParams, generate
from llmcourse.inference.fused import can_fuse
from llmcourse.interpretability import hook_points, hooked, record
from llmcourse.interpretability.hooks import BLOCK_POINTS, add, matching, set_heads, set_to
from llmcourse.models.attention import apply_rope, repeat_kv, rms_norm, rope_tables
from llmcourse.models.transformer import Transformer
from tests.inference.small import V, lively_model

SHAPES = [{}, {"qk_norm": True}, {"n_kv_heads": 4, "tie_embeddings": True}]


def some_tokens(n_rows: int = 3, length: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(V, (n_rows, length), generator=torch.Generator().manual_seed(seed))


def plain(model: Transformer, tokens: Tensor) -> dict[str, Tensor]:
    """All points, computed from the weights alone."""
    config, found = model.config, {}
    B, T = tokens.shape
    cos, sin = rope_tables(torch.arange(T), config.d_head, config.rope_theta)
    x = found["embedding"] = model.embedding.weight[tokens]
    for i, block in enumerate(model.blocks):
        a, eps = block.attention, config.norm_eps
        values = {"residual_before": x}
        read = rms_norm(x, block.attention_norm.weight, eps)
        for point, module, heads in (
            ("queries", a.query, a.n_heads),
            ("keys", a.key, a.n_kv_heads),
            ("values", a.value, a.n_kv_heads),
        ):
            values[point] = (read @ module.weight.T).view(B, T, heads, -1)
        q, k = values["queries"], values["keys"]
        if config.qk_norm:
            q, k = rms_norm(q, a.query_norm.weight, eps), rms_norm(k, a.key_norm.weight, eps)
        q, k = apply_rope(q.transpose(1, 2), cos, sin), apply_rope(k.transpose(1, 2), cos, sin)
        groups = a.n_heads // a.n_kv_heads
        scores = q @ repeat_kv(k, groups).transpose(-1, -2) / math.sqrt(config.d_head)
        scores = scores + torch.full((T, T), float("-inf")).triu(1)
        values["pattern"] = scores.softmax(-1)
        mixed = values["pattern"] @ repeat_kv(values["values"].transpose(1, 2), groups)
        values["head_outputs"] = mixed.transpose(1, 2)
        values["attention_output"] = values["head_outputs"].flatten(2) @ a.output.weight.T
        x = values["residual_middle"] = x + values["attention_output"]
        read = rms_norm(x, block.mlp_norm.weight, eps)
        gate = read @ block.mlp.gate.weight.T
        values["mlp_hidden"] = gate * gate.sigmoid() * (read @ block.mlp.up.weight.T)
        values["mlp_output"] = values["mlp_hidden"] @ block.mlp.down.weight.T
        x = values["residual_after"] = x + values["mlp_output"]
        found |= {f"blocks.{i}.{point}": values[point] for point in BLOCK_POINTS}
    found["normalized"] = rms_norm(x, model.final_norm.weight, config.norm_eps)
    found["logits"] = found["normalized"] @ model.head.weight.T
    return found


@pytest.mark.parametrize("changes", SHAPES, ids=str)
@torch.no_grad()
def test_every_point_holds_what_a_plain_recomputation_gives(changes):
    model, tokens = lively_model(**changes), some_tokens()
    logits, found = record(model, tokens, "*")
    expected = plain(model, tokens)
    assert list(expected) == hook_points(model) and set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )
    torch.testing.assert_close(logits, model(tokens), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_what_is_set_to_its_own_value_changes_nothing():
    model, tokens = lively_model(), some_tokens()
    logits, found = record(model, tokens, "*")
    for name in hook_points(model):
        again, _ = record(model, tokens, "logits", {name: set_to(found[name])})
        torch.testing.assert_close(again, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("point", BLOCK_POINTS)
@torch.no_grad()
def test_a_change_acts_where_it_is_made_and_later(point):
    """From other tokens, the last block's value at one place: later points follow it, earlier ones do not."""
    model, tokens = lively_model(), some_tokens()
    _, other = record(model, some_tokens(seed=1), "*")
    _, before = record(model, tokens, "*")
    name = f"blocks.1.{point}"
    _, after = record(model, tokens, "*", {name: set_to(other[name])})
    torch.testing.assert_close(after[name], other[name], rtol=1e-5, atol=1e-5)
    order = hook_points(model)
    for earlier in order[: order.index("blocks.1.residual_before")]:
        assert torch.equal(after[earlier], before[earlier])
    assert not torch.allclose(after["logits"], before["logits"])
    if point in ("residual_before", "residual_middle", "residual_after"):
        _, whole = record(model, some_tokens(seed=1), "logits")
        torch.testing.assert_close(after["logits"], whole["logits"], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_changes_equal_changes_of_the_weights():
    model, tokens = lively_model(), some_tokens()
    without = copy.deepcopy(model)
    without.blocks[0].mlp.down.weight.zero_()
    C = model.config.d_head
    without.blocks[1].attention.output.weight[:, C : 3 * C] = 0
    hooks = {"blocks.0.mlp_output": lambda value, name: 0 * value, "blocks.1.head_outputs": set_heads([1, 2])}
    with hooked(model, hooks):
        torch.testing.assert_close(model(tokens), without(tokens), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_hooks_at_one_point_run_in_order_and_at_patterns():
    model, tokens, seen = lively_model(), some_tokens(), []
    one = torch.ones(model.config.d_model)

    def look(value: Tensor, name: str) -> None:
        seen.append((name, value.sum().item()))

    _, plainly = record(model, tokens, "blocks.*.mlp_output")
    with hooked(model, {"blocks.*.mlp_output": [look, add(one), look], "blocks.1.*_output": look}):
        model(tokens)
    names = [name for name, _ in seen]
    assert names == ["blocks.0.mlp_output"] * 2 + ["blocks.1.attention_output"] + ["blocks.1.mlp_output"] * 3
    assert seen[0][1] == pytest.approx(plainly["blocks.0.mlp_output"].sum().item(), rel=1e-4)
    assert seen[1][1] - seen[0][1] == pytest.approx(tokens.numel() * model.config.d_model, rel=1e-4)


def test_add_and_set_at_positions():
    value = torch.zeros(2, 4, 3)
    found = add(torch.tensor([1.0, 2.0, 3.0]), [1, 3])(value, "x")
    assert found[:, [0, 2]].sum() == 0 and found[0, 3].tolist() == [1, 2, 3] and value.sum() == 0
    found = set_to(torch.ones(2, 4, 3), [2])(value, "x")
    assert found[:, 2].sum() == 6 and found.sum() == 6


@pytest.mark.parametrize(
    "point", [*(f"blocks.1.{point}" for point in BLOCK_POINTS), "embedding", "normalized", "logits"]
)
def test_nothing_is_left_behind_after_an_exception(point):
    model, tokens = lively_model(), some_tokens()
    expected = model(tokens)

    def fail(value: Tensor, name: str) -> None:
        raise RuntimeError("on purpose")

    with (
        pytest.raises(RuntimeError, match="on purpose"),
        hooked(model, {point: fail, "blocks.0.pattern": set_heads([])}),
    ):
        model(tokens)
    assert all(
        not m._forward_hooks and not m._forward_pre_hooks and "forward" not in vars(m)
        for m in model.modules()
    )
    assert can_fuse(model) and torch.equal(model(tokens), expected)


def test_nested_hooks_come_off_one_by_one():
    model, tokens, calls = lively_model(), some_tokens(), []
    with hooked(model, {"blocks.0.pattern": lambda value, name: calls.append("outer")}):
        with hooked(model, {"blocks.0.pattern": lambda value, name: calls.append("inner")}):
            model(tokens)
        model(tokens)
    assert calls == ["inner", "outer"]
    assert "forward" not in vars(model.blocks[0].attention)


def test_hooks_act_during_generation():
    model = lively_model()
    prompts, params = [[1, 2, 3], [4, 5]], SamplingParams(temperature=0.0, max_new_tokens=6)
    expected = generate(model, prompts, params)
    with hooked(model, {"blocks.*.pattern": lambda value, name: value}):
        assert generate(model, prompts, params) == expected
    with hooked(model, {"blocks.*.mlp_output": lambda value, name: -value}):
        assert generate(model, prompts, params) != expected
    assert generate(model, prompts, params) == expected


def test_gradients_reach_recorded_values():
    model, tokens = lively_model(), some_tokens()
    logits, found = record(model, tokens, "blocks.0.residual_after")
    (gradient,) = torch.autograd.grad(logits.sum(), list(found.values()))
    assert gradient.shape == found["blocks.0.residual_after"].shape and gradient.abs().sum() > 0


def test_refusals():
    model, tokens = lively_model(), some_tokens()
    with pytest.raises(ValueError, match="no point 'blocks.7.pattern'"):
        matching(model, "blocks.7.pattern")
    with pytest.raises(ValueError, match=r"returned \(3, 9\) in place of \(3, 9, 24\)"):
        with hooked(model, {"embedding": lambda value, name: value[..., 0]}):
            model(tokens)


@pytest.mark.parametrize("order", [1, -1])
@torch.no_grad()
def test_hooks_of_one_module_run_in_the_order_of_computation(order):
    model, tokens = lively_model(), some_tokens()
    points = ["blocks.0.attention_output", "blocks.0.residual_middle"][::order]
    seen: dict[str, Tensor] = {}
    hooks = {
        name: (lambda value, at: seen.__setitem__(at, value)) if "output" in name else add(torch.ones(1))
        for name in points
    }
    with hooked(model, hooks):
        model(tokens)
    expected = plain(model, tokens)["blocks.0.attention_output"]
    assert torch.allclose(seen["blocks.0.attention_output"], expected, atol=1e-5)


@pytest.mark.parametrize("point", BLOCK_POINTS)
def test_a_gradient_can_be_taken_at_every_point(point):
    model = lively_model()
    logits, seen = record(model, some_tokens(), f"blocks.0.{point}")
    (gradient,) = torch.autograd.grad(logits.square().sum(), [seen[f"blocks.0.{point}"]])
    assert gradient.abs().max() > 0
