"""Bytes by arithmetic against what autograd saves, what optimizers keep, and hand-computed cases."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from llmcourse import accounting
from llmcourse.accounting import count_parameters, peak_memory, saved_activations, state_bytes
from llmcourse.models.config import ModelConfig
from llmcourse.models.transformer import Transformer
from llmcourse.training.optimizers import build_optimizers
from llmcourse.training.pretraining import next_token_loss


def config_of(**changes: object) -> ModelConfig:
    sizes = {"vocab_size": 90, "context_length": 300, "d_model": 24, "n_layers": 3, "n_heads": 6}
    return ModelConfig(**(sizes | {"n_kv_heads": 2, "d_head": 10, "d_ff": 44} | changes))


def bytes_saved(model: Transformer, batch: int, T: int, precision: str) -> int:
    """Bytes of all storages that autograd keeps of one loss, without the model's own parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    sizes, kept = {}, []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)  # an address must not be used again while we count
        return tensor

    tokens = {name: torch.zeros(batch, T, dtype=torch.int64) for name in ("tokens", "targets")}
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"),
    ):
        next_token_loss(model, tokens)
    return sum(size for pointer, size in sizes.items() if pointer not in own)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(
    "change",
    [{}, {"qk_norm": True}, {"n_kv_heads": 6}, {"n_kv_heads": 1}, {"tie_embeddings": False}],
    ids=str,
)
@pytest.mark.parametrize(("batch", "T"), [(3, 300), (2, 128), (1, 200)])
def test_saved_activations_are_what_autograd_saves(precision, change, batch, T):
    config = config_of(**change)
    found = bytes_saved(Transformer(config), batch, T, precision)
    expected = sum(saved_activations(config, batch, T, precision=precision).values())
    assert found - expected == 4  # the count of targets, one float32


def test_full_checkpointing_keeps_each_blocks_input(monkeypatch):
    config = config_of()
    model = Transformer(config)
    for block in model.blocks:
        forward = block.forward
        monkeypatch.setattr(
            block,
            "forward",
            lambda *args, forward=forward: checkpoint(forward, *args, use_reentrant=False),
        )
    found = bytes_saved(model, 2, 256, "fp32")
    kept = saved_activations(config, 2, 256, precision="fp32", checkpointing="full")
    # before the backward pass no block's inside exists: one block less than at the peak
    one = saved_activations(config_of(n_layers=1), 2, 256, precision="fp32")
    two = saved_activations(config_of(n_layers=2), 2, 256, precision="fp32")
    inside = sum(two.values()) - sum(one.values()) - 4 * 2 * 256 * 24
    assert found == pytest.approx(sum(kept.values()) - inside, abs=64)


def test_a_compiled_loss_keeps_what_the_partitioner_chooses():
    torch._dynamo.reset()
    config, model = config_of(), Transformer(config_of())
    compiled = torch.compile(next_token_loss, backend="aot_eager_decomp_partition")
    sizes, kept = {}, []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        kept.append(tensor)
        return tensor

    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    tokens = {name: torch.zeros(3, 256, dtype=torch.int64) for name in ("tokens", "targets")}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            compiled(model, tokens)
    found = sum(size for pointer, size in sizes.items() if pointer not in own)
    expected = sum(saved_activations(config, 3, 256, compiled=True).values())
    assert found == pytest.approx(expected, rel=0.1)


def test_fused_attention_keeps_no_weights():
    config = config_of()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        fused = saved_activations(config, 2, 256, attention="fused")
    blocked = saved_activations(config, 2, 256)
    # 2 blocks: 128 x 128 + 128 x 256 weights, 1.5 T keys and values; against T of both and a number a head and position
    weights = 2 * 2 * 6 * 128 * (128 + 256)
    extra = 2 * 2 * 2 * 10 * 2 * 128
    saved = weights + extra - 2 * 256 * 6 * 4
    assert blocked["attention"] - fused["attention"] == 3 * saved


def test_published_activations_by_hand():
    # GPT-3 (Brown et al., 2020): 96 layers, D 12288, 96 heads, T 2048: 34 + 5 x 96 x 2048 / 12288 = 114
    gpt3 = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 2048, "n_embd": 12288}
    gpt3 |= {"n_layer": 96, "n_head": 96}
    sbh = 2048 * 12288
    for kind, factor in (("none", 114), ("selective", 34), ("full", 2)):
        found = accounting.published_activation_bytes(gpt3, 1, 2048, checkpointing=kind)
        assert found == 96 * sbh * factor


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_states_are_what_the_optimizer_keeps(name):
    config = config_of()
    model = Transformer(config)
    next_token_loss(model, {n: torch.zeros(1, 40, dtype=torch.int64) for n in ("tokens", "targets")})[
        0
    ].backward()
    kept = 0
    for optimizer in build_optimizers(model, name, lr=1e-3):
        optimizer.step()
        states = [value for state in optimizer.state.values() for value in state.values()]
        kept += sum(v.nbytes for v in states if torch.is_tensor(v) and v.ndim)
    assert state_bytes(config, optimizer=name)["optimizer"] == kept
    assert state_bytes(config)["weights"] == sum(p.nbytes for p in model.parameters())
    assert state_bytes(config)["gradients"] == sum(p.grad.nbytes for p in model.parameters())


def test_sixteen_bytes_a_parameter():
    config = config_of()
    states = state_bytes(config, weight_bytes=2, master_weights=True)
    assert sum(states.values()) == 16 * count_parameters(config)
    mixed = state_bytes(config, weight_bytes=2, gradient_bytes=4)
    assert mixed["gradients"] == 4 * count_parameters(config)
    sizes = [
        state_bytes(config, optimizer=name)["optimizer"]
        for name in ("sgd", "adamw-8bit", "momentum", "adamw")
    ]
    assert sizes == sorted(sizes) and sizes[0] == 0


def test_cache_of_a_present_day_model():
    # Llama-3.1-8B: 2 x 32 layers x 8 heads x 128 channels x 2 bytes = 128 KiB a token
    config = {"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "num_hidden_layers": 32}
    config |= {"num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336}
    config |= {"max_position_embeddings": 131072}
    assert accounting.kv_cache_bytes(config, 1) == 128 * 1024
    assert accounting.kv_cache_bytes(config, 8, 3, bytes_per_value=0.5) == 24 * 32 * 1024


def test_the_peak_is_the_largest_moment():
    config = config_of()
    many = peak_memory(config, 8, 256, baseline=1000)
    assert many.parts["baseline"] == 1000 and many.total == sum(many.parts.values())
    assert many.gib == many.total / 2**30
    assert "activations" in many.parts and "gradients" not in many.parts
    few = peak_memory(config_of(d_ff=4000), 1, 4)  # hardly any tokens: the update is the peak
    assert "gradients" in few.parts and "activations" not in few.parts
    evaluated = peak_memory(config, 1, 256, evaluation_batch=64)
    assert evaluated.parts["evaluation"] == accounting.evaluation_bytes(config, 64, 256)


def test_every_option_changes_the_peak():
    config, base = config_of(), peak_memory(config_of(), 8, 256).total
    changes = [{"optimizer": "adamw"}, {"precision": "fp32"}, {"compiled": True}, {"attention": "fused"}]
    changes += [{"checkpointing": "full"}, {"accumulation": True}, {"evaluation_batch": 500}]
    totals = [peak_memory(config, 8, 256, **change).total for change in changes]
    assert base not in totals and len(set(totals)) == len(totals)
    assert peak_memory(config, 8).total > base  # the context length, 300, is the default


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: state_bytes(config_of(), optimizer="lion"), "optimizer='lion'"),
        (lambda: saved_activations(config_of(), 1, precision="int4"), "precision='int4'"),
        (lambda: saved_activations(config_of(), 1, attention="ring"), "attention='ring'"),
        (lambda: saved_activations(config_of(), 1, checkpointing="some"), "checkpointing='some'"),
        (lambda: saved_activations(config_of(), 1, checkpointing="selective"), "none and full"),
        (
            lambda: accounting.published_activation_bytes(config_of(), 1, 8, checkpointing="x"),
            "checkpointing='x'",
        ),
        (
            lambda: saved_activations(
                {"model_type": "gpt2", "vocab_size": 9, "n_positions": 8, "n_embd": 8}
                | {"n_layer": 1, "n_head": 2},
                1,
            ),
            "this course's model alone",
        ),
    ],
)
def test_bad_choices_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
