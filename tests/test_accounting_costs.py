"""FLOPs of whole sequences, costs of layers, and costs of runs, by hand and against torch's counter."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from llmcourse import accounting
from llmcourse.accounting import ModelShape, layer_costs, matrix_products, newton_schulz_products
from llmcourse.models.config import ModelConfig
from llmcourse.models.transformer import Transformer

GPT2 = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, "n_embd": 768}
GPT2 |= {"n_layer": 12, "n_head": 12}
CONFIG = ModelConfig(
    vocab_size=37,
    context_length=300,
    d_model=16,
    n_layers=3,
    n_heads=6,
    n_kv_heads=2,
    d_head=4,
    d_ff=20,
)


def test_gpt2_forward_flops_as_published():
    assert accounting.forward_flops(GPT2, 1024, causal=False) == 291_648_307_200
    # the causal half: 12 layers x 4 x 768 x (T (T + 1) / 2 instead of T T)
    hidden = 12 * 4 * 768 * (1024 * 1024 - 1024 * 1025 // 2)
    assert accounting.forward_flops(GPT2) == 291_648_307_200 - hidden


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
def test_flops_are_those_that_torch_counts_on_transformers_models(kind):
    sizes = {"vocab_size": 101, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6}
    sizes |= {"num_key_value_heads": 3, "intermediate_size": 80, "max_position_embeddings": 64}
    if kind == "gpt2":
        sizes = {"vocab_size": 101, "n_positions": 64, "n_embd": 48, "n_layer": 2, "n_head": 6}
    config = AutoConfig.for_model(kind, **sizes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 24, dtype=torch.int64), use_cache=False)
    expected = accounting.forward_flops(config, 24, causal=False)
    assert counter.get_total_flops() == expected


@pytest.mark.parametrize("T", [24, 300])
def test_the_products_add_up_to_the_flops_that_torch_counts(T):
    model, tokens = Transformer(CONFIG), torch.zeros(2, T, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens)
    block = 128 if T > 32 else None  # shorter sequences take torch's kernel, which computes all pairs
    assert sum(product.flops for product in matrix_products(CONFIG, 2, T, block=block)) == (
        counter.get_total_flops()
    )


def test_decode_flops_are_the_last_tokens():
    whole, shorter = accounting.forward_flops(CONFIG, 9), accounting.forward_flops(CONFIG, 8)
    assert accounting.decode_flops(CONFIG, 9) == whole - shorter


def test_training_is_three_forward_passes_and_checkpointing_nearly_four():
    forward = accounting.forward_flops(CONFIG, 10)
    assert accounting.training_flops(CONFIG, 10) == 3 * forward
    head = 2 * 10 * 37 * 16
    assert accounting.training_flops(CONFIG, 10, checkpointing=True) == 4 * forward - head
    assert accounting.training_flops(CONFIG, 10, causal=False) > 3 * forward


def test_six_nd_is_off_by_the_attention():
    # with tied embeddings N is what multiplies, but for the norms, so that attention is all that is missing
    missing = accounting.six_nd_error(GPT2 | {"n_positions": 1}, 1)
    assert missing == pytest.approx(0, abs=0.002)
    long = accounting.six_nd_error(GPT2, 8192)
    attention = 12 * 4 * 768 * (8192 + 1) / 2
    exact = accounting.forward_flops_per_token(GPT2, 8192)
    assert long == pytest.approx(-attention / exact, abs=0.006)
    assert accounting.six_nd(GPT2, 10, embeddings=False) < accounting.six_nd(GPT2, 10)


@pytest.mark.parametrize("call", [accounting.forward_flops, accounting.decode_flops])
def test_a_sequence_has_a_token(call):
    with pytest.raises(ValueError, match="0 tokens"):
        call(CONFIG, 0)


def cost(name: str, **options: object) -> accounting.LayerCost:
    return next(row for row in layer_costs(CONFIG, 5, 7, **options) if row.name == name)


def test_a_layers_cost_by_hand():
    # head: (35, 16) x (16, 37), each operand once, 2 bytes; training has three such products
    values = 35 * 16 + 16 * 37 + 35 * 37
    assert cost("head", phase="prefill").flops == 2 * 35 * 16 * 37
    assert cost("head", phase="prefill").bytes == 2 * values
    assert cost("head").bytes == 6 * values and cost("head").flops == 6 * 35 * 16 * 37
    assert cost("head").intensity == pytest.approx(35 * 16 * 37 / values)
    assert cost("head", bytes_per_value=4).intensity == pytest.approx(cost("head").intensity / 2)


def test_decoding_has_one_flop_per_byte():
    big = layer_costs({**GPT2}, 1, 512, phase="decode")
    matrices = [row for row in big if row.name in ("query, key, value", "feed-forward", "head")]
    assert all(row.intensity == pytest.approx(1, rel=0.01) for row in matrices)
    assert {row.name for row in big}.isdisjoint({"loss", "optimizer"})


def test_layer_costs_cover_the_forward_pass():
    names = ("query, key, value", "attention", "output", "feed-forward", "head")
    rows = [row for row in layer_costs(CONFIG, 2, 30, phase="prefill") if row.name in names]
    softmax = CONFIG.n_layers * 5 * 2 * 30 * 31 / 2 * CONFIG.n_heads
    assert sum(row.flops for row in rows) - softmax == 2 * accounting.forward_flops(CONFIG, 30)


def test_fused_attention_moves_less():
    assert cost("attention", fused_attention=True).bytes < cost("attention").bytes
    assert cost("attention", fused_attention=True).flops == cost("attention").flops


def mixture() -> ModelShape:
    return ModelShape(
        vocab_size=37,
        context_length=30,
        d_model=16,
        n_layers=3,
        n_heads=4,
        n_kv_heads=2,
        d_head=4,
        d_ff=20,
        n_experts=8,
        n_active_experts=2,
        d_expert=12,
        d_shared_expert=6,
        n_mixture_layers=2,
    )


def test_a_mixture_reads_the_experts_it_touches():
    one = next(r for r in layer_costs(mixture(), 1, 9, phase="decode") if r.name == "feed-forward")
    many = next(r for r in layer_costs(mixture(), 64, 9, phase="decode") if r.name == "feed-forward")
    assert many.flops == 64 * one.flops
    assert many.bytes < 64 * one.bytes / 4  # the weights are shared by all rows
    # one token, 2 layers x 2 bytes: 2 of 8 experts (3 x 16 x 12 and 3 x 28 activations each), shared expert, router
    shared = 3 * (16 + 16 * 6 + 6)
    router = 16 + 16 * 8 + 8
    assert one.bytes == pytest.approx(
        2 * (2 * 2 * 3 * (16 * 12 + 16 + 12) + 2 * (shared + router) + mlp_values())
    )
    router_and_shared_gate = 2 * 2 * 16  # the shared expert's gate is no row of its own
    weights = accounting.matmul_weights(mixture())
    attention = accounting.forward_flops(mixture(), 1) - 2 * weights
    rows = layer_costs(mixture(), 1, 1, phase="prefill")
    names = ("query, key, value", "output", "feed-forward", "head", "attention")
    total = sum(r.flops for r in rows if r.name in names)
    assert total == 2 * weights + attention + 3 * 5 * 4 - router_and_shared_gate


def mlp_values() -> int:
    """Values of the one dense layer for one token."""
    return 3 * (16 + 16 * 20 + 20)


def test_products_of_newton_schulz_are_those_that_torch_counts():
    from llmcourse.training.optimizers import build_optimizers

    model = Transformer(CONFIG)
    model(torch.zeros(1, 4, dtype=torch.int64)).sum().backward()
    muon = build_optimizers(model, "muon", lr=1e-3)[0]
    with FlopCounterMode(display=False) as counter:
        muon.step()
    assert counter.get_total_flops() == sum(p.flops for p in newton_schulz_products(CONFIG))


def test_element_wise_traffic_grows_with_each_size():
    base = accounting.element_wise_bytes(CONFIG, 2, 256)
    assert set(base) == {
        "norms and residual",
        "softmax gradient",
        "activation",
        "rotation and layout",
        "exponentials",
    }
    double = accounting.element_wise_bytes(CONFIG, 4, 256)
    assert all(double[name] == 2 * size for name, size in base.items())
    # two blocks of 128 queries see 128 and 256 keys: 3 passes of 2 bytes, 3 layers, 6 heads, 2 rows
    weights = 3 * 6 * 2 * 128 * (128 + 256)
    assert base["softmax gradient"] == 3 * 2 * weights
    # 3 layers x 512 tokens x 20 hidden values twice, 512 x 37 logits twice
    assert base["exponentials"] == 4 * (weights + 2 * 3 * 512 * 20 + 2 * 512 * 37)
    wide = accounting.element_wise_bytes(CONFIG, 2, 256, bytes_per_value=4)
    assert wide["activation"] == 2 * base["activation"]
    whole = accounting.element_wise_bytes(CONFIG, 2, 256, block=256)
    assert whole["softmax gradient"] > base["softmax gradient"]


def test_newton_schulz_bytes_by_hand():
    # D = 16: q (24, 16) x 3, k and v (8, 16) x 6, gate and up (20, 16) x 6, output (16, 24) x 3, down (16, 20) x 3
    groups = [(16, 24, 3), (8, 16, 6), (16, 20, 6), (16, 24, 3), (16, 20, 3)]
    values = sum(number * (5 * r * c + 7 * r * r) for r, c, number in groups)
    assert accounting.newton_schulz_bytes(CONFIG) == 2 * 5 * values
    square = ModelConfig(vocab_size=9, d_model=8, n_layers=1, n_heads=2, n_kv_heads=2, d_ff=8)
    # all seven matrices are (8, 8)
    assert accounting.newton_schulz_bytes(square) == 2 * 5 * 7 * 12 * 64


def test_costs_of_a_run_by_hand():
    # 3.6e18 FLOPs at 1e15 x 0.5 x 2 FLOP/s are 3600 s
    hours = accounting.run_hours(3.6e18, peak_flops=1e15, mfu=0.5, n_devices=2)
    assert hours == pytest.approx(1.0)
    assert accounting.run_energy_kwh(hours, watts=700, n_devices=2, overhead=1.5) == pytest.approx(2.1)
    assert accounting.run_price(hours, price_per_device_hour=2.5, n_devices=2) == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: accounting.run_hours(1, peak_flops=0, mfu=0.5), "peak_flops=0"),
        (lambda: accounting.run_hours(1, peak_flops=1, mfu=1.5), "mfu=1.5"),
        (lambda: accounting.run_energy_kwh(1, watts=-1), "watts=-1"),
        (lambda: accounting.run_energy_kwh(1, watts=1, overhead=0.5), "overhead=0.5"),
        (lambda: accounting.run_price(1, price_per_device_hour=float("nan")), "price_per_device_hour"),
        (lambda: layer_costs(CONFIG, 1, 8, phase="serving"), "phase='serving'"),
        (lambda: layer_costs(CONFIG, 0, 8), "batch=0"),
        (lambda: matrix_products(CONFIG, 1, 0), "context=0"),
        (lambda: matrix_products(mixture(), 1, 8), "dense models"),
    ],
)
def test_bad_numbers_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
