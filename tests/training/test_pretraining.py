"""Pre-training: the loss by hand, presets, changes by name, from streams to a model, the gpu preset dry."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from llmcourse.accounting import count_parameters
from llmcourse.data.packing import IGNORE
from llmcourse.data.token_stream import TokenStream
from llmcourse.models.config import ModelConfig
from llmcourse.models.transformer import Transformer
from llmcourse.training import pretraining
from llmcourse.training.fit import FitSettings
from llmcourse.training.pretraining import (
    PRESETS,
    PretrainSettings,
    new_model,
    next_token_loss,
    preset,
    pretrain,
    validation,
    with_changes,
)

V = 32


class Fixed(nn.Module):
    """Says the same probabilities at every position."""

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(probabilities).log())

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits.expand(*tokens.shape, -1)


def stream(n: int = 576, vocab_size: int = V, seed: int = 0) -> TokenStream:
    """Text with something to learn: each token follows the one before by a fixed step, with a little noise."""
    rng = np.random.default_rng(seed)
    ids = (np.cumsum(rng.choice([3, 3, 3, 5], n)) % (vocab_size - 1) + 1).astype(np.uint16)
    ids[n // 2 - 1] = ids[-1] = 0
    return TokenStream(ids, np.array([0, n // 2, n]), eos_id=0, vocab_size=vocab_size)


TINY = {
    "context_length": 16,
    "d_model": 16,
    "n_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 1,
    "d_ff": 24,
    "batch_size": 4,
}


def tiny(**changes: Any) -> PretrainSettings:
    return preset(
        "cpu", **(TINY | {"steps": 4, "warmup_steps": 1, "compile": "off", "precision": "fp32"} | changes)
    )


def run(settings: PretrainSettings, **options: Any) -> tuple[Transformer, Any]:
    cpu = torch.device("cpu")
    return pretrain(settings, stream(), stream(200, seed=1), device=cpu, progress=False, **options)


# The loss


def test_next_token_loss_by_hand():
    # targets 0, 2 and 1 cost ln 2, ln 4 and ln 4 nats; the two places without a target cost nothing
    model = Fixed([0.5, 0.25, 0.25])
    batch = {
        "tokens": torch.zeros(1, 5, dtype=torch.int64),
        "targets": torch.tensor([[0, IGNORE, 2, 1, IGNORE]]),
    }
    total, count, metrics = next_token_loss(model, batch)
    assert float(total.detach()) == pytest.approx(math.log(2 * 4 * 4)) and int(count) == 3 and metrics == {}
    # the gradient of a summed cross-entropy is n p minus the counts: 3 x (1/2, 1/4, 1/4) - (1, 1, 1)
    total.backward()
    torch.testing.assert_close(model.logits.grad, torch.tensor([0.5, -0.25, -0.25]))


def test_next_token_loss_is_the_one_of_transformers_and_takes_the_logarithm_in_float32():
    from transformers.loss.loss_utils import ForCausalLMLoss

    torch.manual_seed(0)
    model, tokens = new_model(tiny(), V, torch.device("cpu")), torch.randint(V, (3, 16))
    targets = tokens.roll(-1, dims=1)
    targets[:, -1] = IGNORE
    total, count, _ = next_token_loss(model, {"tokens": tokens, "targets": targets})
    expected = ForCausalLMLoss(model(tokens), tokens, vocab_size=V)
    assert float((total / count).detach()) == pytest.approx(float(expected.detach()), abs=1e-6)
    low = next_token_loss(model.bfloat16(), {"tokens": tokens, "targets": targets})[0]
    assert low.dtype == torch.float32


# Settings


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_take_changes(name):
    settings = preset(name)
    assert settings.fit.warmup_steps < settings.fit.steps
    assert settings.model.vocab_size == settings.vocab_size
    changed = preset(
        name, corpus="python-docs", seed=3, lr=0.5, d_ff=64, steps=7, batch_size=2, micro_steps=3
    )
    assert (changed.corpus, changed.batch_size, changed.model.d_ff) == ("python-docs", 2, 64)
    assert (changed.fit.lr, changed.fit.steps, changed.seed, changed.fit.seed) == (0.5, 7, 3, 3)
    assert changed.tokens == 2 * settings.model.context_length * 3 * 7
    assert changed.fit.schedule == settings.fit.schedule  # the rest stays


def test_the_cpu_preset_is_a_small_model():
    assert 0.5e6 < count_parameters(preset("cpu").model) < 1.5e6


def test_the_gpu_preset_is_of_the_124m_class():
    settings = preset("gpu")
    with torch.device("meta"):
        model = Transformer(settings.model)
    n = sum(parameter.numel() for parameter in model.parameters())
    assert n == count_parameters(settings.model)
    # GPT-2 small has 84.9 M in all but its embeddings
    gpt2 = settings.model.n_layers * 12 * settings.model.d_model**2
    assert count_parameters(settings.model, embeddings=False) == pytest.approx(gpt2, rel=0.01)
    assert 100e6 < n < 130e6


def test_changes_that_are_none_are_no_changes():
    assert with_changes(preset("cpu"), steps=None, d_model=None, corpus=None) == preset("cpu")


def test_the_width_of_a_head_follows_the_width_of_the_model():
    assert with_changes(preset("cpu"), d_model=64).model.d_head == 16
    assert with_changes(preset("cpu"), n_heads=2).model.d_head == 64
    assert with_changes(preset("cpu"), d_model=64, d_head=24).model.d_head == 24
    assert with_changes(preset("cpu"), d_head=24, n_layers=1).model.d_head == 24


def test_every_field_can_be_changed_by_name():
    values: dict[str, Any] = {}
    for owner in (PretrainSettings, ModelConfig, FitSettings):
        for field in dataclasses.fields(owner):
            if field.name not in ("model", "fit"):
                values[field.name] = {
                    "corpus": "python-docs", "schedule": "linear", "optimizer": "adamw", "precision": "fp32",
                    "compile": "off", "betas": (0.5, 0.6), "tie_embeddings": False, "qk_norm": True,
                    "decay_fraction": 0.3, "final_fraction": 0.3, "momentum": 0.3,
                }.get(field.name, 12)  # fmt: skip
    changed = with_changes(preset("cpu"), **values)
    flat = dataclasses.asdict(changed.fit) | dataclasses.asdict(changed.model) | dataclasses.asdict(changed)
    assert {name: flat[name] for name in values} == values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_stairs": 3}, "unknown setting 'n_stairs'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"vocab_size": -1}, "vocab_size=-1"),
        ({"steps": 0}, "steps=0"),
        ({"n_heads": 3}, "n_heads=3"),
        ({"schedule": "up"}, "schedule='up'"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError) as error:
        preset("cpu", **change)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match=r"preset='tpu': choose one of cpu, gpu"):
        preset("tpu")


# The function


def test_pretraining_is_a_function_of_its_settings():
    one, first = run(tiny())
    two, second = run(tiny())
    other, _ = run(tiny(seed=1))
    assert torch.equal(one.embedding.weight, two.embedding.weight)
    assert [r["loss"] for r in first.records] == [r["loss"] for r in second.records]
    assert not torch.equal(one.embedding.weight, other.embedding.weight)
    assert one.config.vocab_size == V  # the stream's, not the preset's
    assert all(record["units"] == 4 * 16 for record in first.records)


def test_a_fresh_model_depends_on_the_seed_alone():
    torch.rand(3)
    one = new_model(tiny(), V, torch.device("cpu"))
    two = new_model(tiny(lr=1.0), V, torch.device("cpu"))
    assert torch.equal(one.head.weight, two.head.weight)


def test_it_learns_and_is_measured_on_the_validation_stream():
    model, result = run(tiny(steps=60, eval_every=20, lr=2e-2))
    losses = [evaluation["validation_loss"] for evaluation in result.evaluations]
    assert len(losses) == 3 and losses[-1] < 0.8 * math.log(V) and losses[-1] < losses[0]
    evaluate = validation(stream(200, seed=1), 16)
    assert evaluate(model)["validation_loss"] == pytest.approx(losses[-1], rel=1e-6)
    assert 0 < result.evaluations[-1]["validation_error"] < 1


def test_it_goes_on_from_a_checkpoint(tmp_path):
    straight, _ = run(tiny(steps=6, schedule="constant"))
    run(tiny(steps=3, schedule="constant"), checkpoint_folder=tmp_path)
    resumed, result = run(tiny(steps=6, schedule="constant"), checkpoint_folder=tmp_path)
    assert result.resumed_from == 3
    assert torch.equal(straight.embedding.weight, resumed.embedding.weight)


def test_without_validation_nothing_is_evaluated():
    _, result = pretrain(tiny(steps=1), stream(), None, device=torch.device("cpu"), progress=False)
    assert result.evaluations == []


def test_streams_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"the stream has 10 tokens, one window needs 17"):
        pretrain(tiny(), stream(10), None, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"vocab_size 32, the validation stream 40"):
        pretrain(tiny(), stream(), stream(vocab_size=40), device=torch.device("cpu"))


def test_the_gpu_preset_runs_dry_on_the_cpu(tmp_path: Path):
    # same settings, same path through the loop, one step: only the sizes are smaller
    sizes = TINY | {"context_length": 32, "n_kv_heads": 2}
    settings = preset("gpu", **sizes, steps=1, warmup_steps=1, precision="bf16")
    full = preset("gpu")
    assert dataclasses.replace(settings.fit, steps=2000, warmup_steps=200, precision="auto") == full.fit
    model, result = run(settings, checkpoint_folder=tmp_path)
    (record,) = result.records
    assert record["units"] == 4 * 32 * full.fit.micro_steps and math.isfinite(record["loss"])
    assert len(result.evaluations) == 1 and (tmp_path / "step_00000001").is_dir()
    assert not torch.equal(
        model.embedding.weight, new_model(settings, V, torch.device("cpu")).embedding.weight
    )


def test_running_the_module_is_the_command(monkeypatch):
    import runpy
    import sys

    called = {}
    monkeypatch.setattr(sys, "argv", ["pretraining", "--steps", "5"])
    monkeypatch.setattr(
        runpy, "run_module", lambda name, run_name: called.update(name=name, argv=list(sys.argv))
    )
    runpy.run_path(pretraining.__file__, run_name="__main__")
    assert called["name"] == "llmcourse.cli" and called["argv"][1:] == ["pretrain", "--steps", "5"]
