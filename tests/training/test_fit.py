"""The one loop: accumulation, exact resume, kills, refusal of non-finite losses, clipping, records, every setting."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from llmcourse.data.packing import IGNORE, PackedBatches
from llmcourse.data.token_stream import TokenStream
from llmcourse.models.config import ModelConfig
from llmcourse.models.transformer import Transformer
from llmcourse.training import fit as module
from llmcourse.training.checkpoint import list_checkpoints
from llmcourse.training.fit import FitResult, FitSettings, TrainingError, fit, scale_and_clip
from llmcourse.training.pretraining import next_token_loss

V, T = 23, 12


def make_model(seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    sizes = {"context_length": T, "d_model": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "d_ff": 24}
    return Transformer(ModelConfig(vocab_size=V, **sizes))


def make_batches(batch_size: int = 4, seed: int = 0) -> PackedBatches:
    ids = np.random.default_rng(5).integers(0, V, 1000).astype(np.uint16)
    stream = TokenStream(ids, np.array([0, 400, 1000]), eos_id=0, vocab_size=V)
    return PackedBatches(stream, batch_size=batch_size, context_length=T, seed=seed)


def noisy_loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Next-token loss on a random choice of the targets, so that a run depends on torch's generator."""
    targets = batch["targets"]
    dropped = torch.rand(targets.shape) < 0.3
    total, count, _ = next_token_loss(model, batch | {"targets": targets.masked_fill(dropped, IGNORE)})
    return total, count, {"kept": count / targets.numel()}


def settings(**changes: Any) -> FitSettings:
    base = {"steps": 6, "lr": 1e-2, "warmup_steps": 2, "precision": "fp32", "compile": "off"}
    return FitSettings(**(base | changes))


def train(
    options: FitSettings, *, model: nn.Module | None = None, loss: Callable = noisy_loss, **others: Any
) -> tuple[nn.Module, FitResult]:
    model = model or make_model()
    batches = others.pop("batches", None) or make_batches()
    return model, fit(model, batches, loss, options, progress=False, **others)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        if tolerance:
            torch.testing.assert_close(
                tensor, other[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )
        else:
            assert torch.equal(tensor, other[name]), name


# What a step is


class Listed:
    """Batches from a list, in order."""

    def __init__(self, batches: list[dict[str, Tensor]]) -> None:
        self.batches, self.position = batches, 0

    def next(self) -> dict[str, Tensor]:
        self.position += 1
        return self.batches[self.position - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def uneven_micro_batches(steps: int) -> list[dict[str, Tensor]]:
    """Per step three micro-batches of 2 rows with 24, 7 and 1 targets."""
    generator = torch.Generator().manual_seed(2)
    batches = []
    for i in range(3 * steps):
        tokens, targets = (torch.randint(V, (2, T), generator=generator) for _ in range(2))
        targets.view(-1)[(24, 7, 1)[i % 3] :] = IGNORE
        batches.append({"tokens": tokens, "targets": targets})
    return batches


def joined(batches: list[dict[str, Tensor]], n: int) -> list[dict[str, Tensor]]:
    groups = [batches[i : i + n] for i in range(0, len(batches), n)]
    return [{name: torch.cat([b[name] for b in group]) for name in ("tokens", "targets")} for group in groups]


def test_accumulated_micro_steps_are_the_big_batch():
    # AdamW divides by the root of the second moment, which for gradients near 0 magnifies rounding: eps tames that
    options, micro = {"steps": 3, "eps": 1e-4, "lr": 1e-3}, uneven_micro_batches(3)
    apart, result = train(settings(micro_steps=3, **options), batches=Listed(micro), loss=next_token_loss)
    whole, expected = train(settings(**options), batches=Listed(joined(micro, 3)), loss=next_token_loss)
    assert_same(weights(apart), weights(whole), 1e-6)
    for one, other in zip(result.records, expected.records, strict=True):
        assert one["units"] == other["units"] == 32
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
    # the mean of the micro-batches' means, a common mistake, is another number
    with torch.no_grad():
        parts = [next_token_loss(make_model(), batch) for batch in micro[:3]]
    means = sum(float(total / count) for total, count, _ in parts) / 3
    assert abs(means - result.records[0]["loss"]) > 1e-2


def test_one_step_by_hand():
    # loss = sum of w x over the units: with x = 1, 2, 3 the mean is 2 w and the gradient 2. AdamW's first step is
    # lr x g / (|g| + eps), so w goes from 5 to 5 (1 - 0.1 x 0.5) - 0.1 for weight decay 0.5 if w is a matrix
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 5.0)

    def loss(model, batch):
        return (model.weight * batch["x"]).sum(), 3, {"biggest": batch["x"].max()}

    options = settings(steps=1, lr=0.1, warmup_steps=0, weight_decay=0.5, eps=0.0, grad_clip=0.0)
    _, result = train(options, model=model, loss=loss, batches=Listed([{"x": torch.tensor([1.0, 2.0, 3.0])}]))
    assert model.weight.item() == pytest.approx(5 * 0.95 - 0.1)
    (record,) = result.records
    assert (record["loss"], record["grad_norm"], record["units"], record["lr"]) == pytest.approx(
        (10.0, 2.0, 3, 0.1)
    )
    assert record["biggest"] == 3.0 and math.isnan(record["mfu"])  # no FLOPs are known for this model


def test_scale_and_clip_by_hand():
    def gradients(scale: float, largest: float) -> tuple[float, list[float]]:
        parameters = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
        for parameter, value in zip(parameters[:2], (3.0, 4.0), strict=True):  # the third has no gradient
            parameter.grad = torch.tensor([value])
        norm = scale_and_clip(parameters, scale, largest)
        return norm, [p.grad.item() for p in parameters[:2]]

    assert gradients(1.0, 0.0) == (5.0, [3.0, 4.0])
    assert gradients(0.5, 0.0) == (2.5, [1.5, 2.0])
    assert gradients(0.5, 2.5) == (2.5, [1.5, 2.0])  # at the limit nothing is cut
    norm, cut = gradients(2.0, 1.0)
    assert norm == 10.0 and cut == pytest.approx([0.6, 0.8], rel=1e-6)


def test_clipping_is_that_of_torch():
    parameters = [nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(7))]
    for i, parameter in enumerate(parameters):
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    copies = [nn.Parameter(p.detach().clone()) for p in parameters]
    for parameter, copy in zip(parameters, copies, strict=True):
        copy.grad = parameter.grad * 0.25
    assert scale_and_clip(parameters, 0.25, 0.3) == pytest.approx(
        float(nn.utils.clip_grad_norm_(copies, 0.3))
    )
    for parameter, copy in zip(parameters, copies, strict=True):
        torch.testing.assert_close(parameter.grad, copy.grad)


def test_a_loss_that_ignores_the_model_is_refused():
    def constant(model, batch):
        return torch.ones((), requires_grad=True) * 2, 1, {}

    with pytest.raises(TrainingError, match="no parameter has a gradient"):
        train(settings(), loss=constant)


def test_frozen_parameters_stay():
    model = make_model()
    model.embedding.weight.requires_grad_(False)
    before = weights(model)
    train(settings(steps=2), model=model)
    after = weights(model)
    assert torch.equal(before["embedding.weight"], after["embedding.weight"])
    assert not torch.equal(before["blocks.0.mlp.up.weight"], after["blocks.0.mlp.up.weight"])


# Records


def test_records_are_complete_and_right():
    model, result = train(settings(steps=5, schedule="linear", warmup_steps=2, final_fraction=0.5))
    assert [record["step"] for record in result.records] == list(range(5))
    for record in result.records:
        assert record.keys() == {
            "step", "loss", "lr", "grad_norm", "units", "units_per_second", "mfu", "peak_bytes", "seconds", "kept"
        }  # fmt: skip
        assert record["units"] == round(record["kept"] * 4 * T)
        assert record["units_per_second"] > 0 and record["mfu"] > 0 and record["peak_bytes"] > 1e7
    assert [r["lr"] for r in result.records] == pytest.approx(
        [5e-3, 1e-2, 1e-2, 1e-2 * (1 - 0.5 / 3), 1e-2 * (2 / 3)]
    )
    seconds = [record["seconds"] for record in result.records]
    assert seconds == sorted(seconds) and 0 < seconds[0] and seconds[-1] <= result.seconds
    assert result.last_loss == result.records[-1]["loss"] and result.resumed_from == 0
    assert result.peak_bytes >= result.records[0]["peak_bytes"]
    json.dumps(result.records)  # plain numbers


def test_the_first_loss_is_that_of_the_fresh_model_and_it_falls():
    with torch.no_grad():
        total, count, _ = next_token_loss(make_model(), make_batches().next())
    batch = make_batches().next()
    _, result = train(settings(steps=25), loss=next_token_loss, batches=Listed([batch] * 25))
    assert result.records[0]["loss"] == pytest.approx(float(total / count), abs=1e-6)
    assert result.last_loss < 0.7 * result.records[0]["loss"]  # one batch again and again is learned by heart


def test_units_that_do_not_count_change_nothing():
    batch = make_batches().next()
    nothing = batch | {"targets": torch.full_like(batch["targets"], IGNORE)}
    model, result = train(
        settings(steps=1, weight_decay=0.0), loss=next_token_loss, batches=Listed([nothing])
    )
    assert (result.records[0]["loss"], result.records[0]["grad_norm"]) == (0.0, 0.0)
    assert_same(weights(model), weights(make_model()))


# Evaluation and callbacks


def test_evaluation_comes_when_due_and_at_the_end_with_the_model_in_eval_mode():
    seen = []

    def evaluate(model):
        seen.append((model.training, torch.is_grad_enabled()))
        return {"validation_loss": 5.0 - len(seen), "other": 1.0}

    model, result = train(settings(steps=7, eval_every=3), evaluate=evaluate)
    assert [e["step"] for e in result.evaluations] == [3, 6, 7]
    assert seen == [(False, False)] * 3 and model.training
    assert [e["validation_loss"] for e in result.evaluations] == [4.0, 3.0, 2.0]
    assert all(e["other"] == 1.0 and e["seconds"] > 0 for e in result.evaluations)
    _, only_end = train(settings(steps=7), evaluate=evaluate)
    assert [e["step"] for e in only_end.evaluations] == [7]


def test_evaluation_and_callback_do_not_disturb_training():
    plain, _ = train(settings())
    steps = []
    watched, _ = train(
        settings(eval_every=1),
        evaluate=lambda model: {"validation_loss": float(model(torch.zeros(1, 3, dtype=torch.int64)).sum())},
        on_step=lambda step, model: steps.append((step, model.training)),
    )
    assert_same(weights(plain), weights(watched))
    assert steps == [(step, True) for step in range(6)]


def test_the_best_checkpoint_by_validation_loss_is_kept(tmp_path):
    losses = iter([3.0, 1.0, 2.0, 4.0])
    train(
        settings(steps=8, eval_every=2, checkpoint_every=2, keep_last=1),
        evaluate=lambda model: {"validation_loss": next(losses)},
        checkpoint_folder=tmp_path,
    )
    assert [(c.step, c.metric) for c in list_checkpoints(tmp_path)] == [(4, 1.0), (8, 4.0)]


# Stop and resume


class Interrupted(Exception):
    """Stands for whatever stops a run between two steps."""


def interrupt_at(wanted: int) -> Callable[[int, nn.Module], None]:
    def on_step(step: int, model: nn.Module) -> None:
        if step == wanted:
            raise Interrupted

    return on_step


def deterministic(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    timed = {"seconds", "units_per_second", "mfu", "peak_bytes"}
    return [{name: value for name, value in record.items() if name not in timed} for record in records]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_resume_is_bit_identical(optimizer, schedule, tmp_path):
    options = settings(
        steps=9, optimizer=optimizer, schedule=schedule, micro_steps=2, checkpoint_every=2, eval_every=3
    )

    def evaluate(model):
        return {"validation_loss": float(model(torch.arange(T)[None]).square().mean())}

    straight, expected = train(options, evaluate=evaluate, checkpoint_folder=tmp_path / "straight")
    for at in (0, 4, 6):  # before any checkpoint, after one at step 4, on from there past one at 6
        with pytest.raises(Interrupted):
            train(options, evaluate=evaluate, checkpoint_folder=tmp_path / "cut", on_step=interrupt_at(at))
    torch.rand(7)  # whatever happened to the generators meanwhile
    resumed, result = train(
        options, model=make_model(seed=99), evaluate=evaluate, checkpoint_folder=tmp_path / "cut"
    )
    assert result.resumed_from == 6
    assert_same(weights(straight), weights(resumed))
    assert deterministic(result.records) == deterministic(expected.records)
    assert deterministic(result.evaluations) == deterministic(expected.evaluations)
    for name in ("model.safetensors", "optimizer.safetensors"):
        one, other = (load_file(tmp_path / run / "step_00000009" / name) for run in ("straight", "cut"))
        assert_same(one, other)
    seconds = [record["seconds"] for record in result.records]
    assert seconds == sorted(seconds)  # the clock goes on, too


def test_a_finished_run_is_opened_not_repeated(tmp_path):
    model, first = train(
        settings(), checkpoint_folder=tmp_path, evaluate=lambda model: {"validation_loss": 1.0}
    )
    again, second = train(settings(), checkpoint_folder=tmp_path, loss=pytest.fail)
    assert (
        second.resumed_from == 6
        and second.records == first.records
        and second.evaluations == first.evaluations
    )
    assert_same(weights(model), weights(again))


def test_checkpoints_come_when_due_and_at_the_end(tmp_path):
    train(settings(steps=7, checkpoint_every=3, keep_last=5), checkpoint_folder=tmp_path / "some")
    assert [c.step for c in list_checkpoints(tmp_path / "some")] == [3, 6, 7]
    train(settings(steps=7), checkpoint_folder=tmp_path / "end")
    assert [c.step for c in list_checkpoints(tmp_path / "end")] == [7]


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_used(tmp_path):
    straight, _ = train(settings(steps=8, checkpoint_every=2), checkpoint_folder=tmp_path / "straight")
    with pytest.raises(Interrupted):
        train(
            settings(steps=8, checkpoint_every=2), checkpoint_folder=tmp_path / "cut", on_step=interrupt_at(4)
        )
    newest = tmp_path / "cut" / "step_00000004" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-5])
    with pytest.warns(UserWarning, match="model.safetensors"):
        resumed, result = train(settings(steps=8, checkpoint_every=2), checkpoint_folder=tmp_path / "cut")
    assert result.resumed_from == 2
    assert_same(weights(straight), weights(resumed))


def test_checkpoints_of_another_run_are_refused(tmp_path):
    train(settings(), checkpoint_folder=tmp_path)
    with pytest.raises(ValueError, match=r"is at step 6, beyond steps=3"):
        train(settings(steps=3), checkpoint_folder=tmp_path)
    with pytest.raises(ValueError, match=r"global_batch_size=4"):
        train(settings(steps=8), checkpoint_folder=tmp_path, batches=make_batches(batch_size=5))
    with pytest.raises(ValueError, match=r"optimizers \['AdamW'\], this run has \['Muon', 'AdamW'\]"):
        train(settings(steps=8, optimizer="muon"), checkpoint_folder=tmp_path)
    with pytest.raises(ValueError, match=r"is a single checkpoint"):
        train(settings(steps=8), checkpoint_folder=tmp_path / "step_00000006")


WORKER = """
import sys, time
sys.path.insert(0, {folder!r})
from test_fit import KILLED, fit, make_batches, make_model, noisy_loss

def announce(step, model):
    print(step, flush=True)
    time.sleep(0.02)

fit(make_model(), make_batches(), noisy_loss, KILLED, checkpoint_folder={out!r}, on_step=announce, progress=False)
"""
KILLED = settings(steps=30, checkpoint_every=1, optimizer="muon")


def test_a_killed_process_resumes_exactly(tmp_path):
    straight, expected = train(dataclasses.replace(KILLED, checkpoint_every=0))
    code = WORKER.format(folder=str(Path(__file__).parent), out=str(tmp_path))
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ.copy()
    )
    try:
        reached = next(int(line) for line in child.stdout if int(line) >= 5)
    finally:
        child.send_signal(signal.SIGKILL)  # wherever it is: in a step, or in the middle of a checkpoint
        child.wait()
    assert child.returncode == -signal.SIGKILL
    resumed, result = train(KILLED, checkpoint_folder=tmp_path)
    assert reached <= result.resumed_from < 30
    assert_same(weights(straight), weights(resumed))
    assert deterministic(result.records) == deterministic(expected.records)
    # and no remnant of the killed writer
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


# What must not happen


def spoiled(at: int, how: Callable[[Tensor, nn.Module], Tensor]) -> Callable:
    calls = iter(range(1000))

    def loss(model, batch):
        total, count, metrics = next_token_loss(model, batch)
        return (how(total, model) if next(calls) == at else total), count, metrics

    return loss


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("nan", lambda total, model: total * math.nan),
        ("inf", lambda total, model: total * math.inf),
        # the loss is finite and its gradient is not: the slope of the root at 0
        ("gradient norm (inf|nan)", lambda total, model: total + (model.final_norm.weight * 0).sum().sqrt()),
    ],
    ids=["nan", "inf", "gradient"],
)
def test_a_loss_that_is_not_finite_stops_before_the_step(optimizer, name, how, tmp_path):
    model, snapshots = make_model(), []
    with pytest.raises(TrainingError, match=name) as error:
        train(
            settings(optimizer=optimizer, micro_steps=2, checkpoint_every=1),
            model=model,
            loss=spoiled(5, how),  # the second micro-step of step 2
            on_step=lambda step, model: snapshots.append(weights(model)),
            checkpoint_folder=tmp_path,
        )
    message = str(error.value)
    assert message.startswith("step 2: ") and "'position': 6" in message and str(tmp_path) in message
    assert "Lower lr" in message and "\n" not in message
    assert len(snapshots) == 2
    assert_same(weights(model), snapshots[1])
    assert [c.step for c in list_checkpoints(tmp_path)][-1] == 2  # and the checkpoint is from before it


# Every setting

BASE = {"steps": 6, "lr": 1e-2, "warmup_steps": 2}
CHANGES = [
    ({}, {"steps": 5}),
    ({}, {"lr": 5e-3}),
    ({}, {"warmup_steps": 4}),
    ({}, {"schedule": "linear"}),
    ({}, {"schedule": "wsd"}),
    ({"schedule": "wsd"}, {"decay_fraction": 0.6}),
    ({}, {"final_fraction": 0.5}),
    ({}, {"optimizer": "muon"}),
    ({}, {"betas": (0.5, 0.95)}),
    ({}, {"eps": 1e-2}),
    ({}, {"weight_decay": 0.5}),
    ({"optimizer": "muon"}, {"momentum": 0.5}),
    ({}, {"grad_clip": 0.1}),
    ({}, {"grad_clip": 0.0}),
    ({}, {"micro_steps": 2}),
    ({}, {"precision": "bf16"}),
    ({}, {"seed": 1}),
]
ELSEWHERE = {"compile", "eval_every", "checkpoint_every", "keep_last"}  # these must not change the weights


def test_every_setting_has_a_test():
    tested = {name for _, change in CHANGES for name in change} | ELSEWHERE
    assert tested == {field.name for field in dataclasses.fields(FitSettings)}


@pytest.mark.parametrize(("with_it", "change"), CHANGES, ids=str)
def test_every_setting_changes_the_result(with_it, change):
    # a large loss, so that gradients are long enough to be clipped by the default of 1
    def loss(model, batch):
        total, count, metrics = noisy_loss(model, batch)
        return 3 * total, count, metrics

    one, first = train(settings(**with_it), loss=loss)
    other, _ = train(settings(**(with_it | change)), loss=loss)
    assert any(record["grad_norm"] > 1 for record in first.records)
    assert any(
        not torch.allclose(a, b, atol=1e-6) for a, b in zip(one.parameters(), other.parameters(), strict=True)
    )


def test_bf16_is_autocast_and_leaves_float32_weights():
    seen = []

    def loss(model, batch):
        seen.append(model.blocks[0].mlp.up(torch.zeros(1, 16)).dtype)
        return next_token_loss(model, batch)

    model, result = train(settings(steps=2, precision="bf16"), loss=loss)
    assert seen == [torch.bfloat16] * 2 and model.embedding.weight.dtype == torch.float32
    _, exact = train(settings(steps=2), loss=next_token_loss)
    assert result.last_loss == pytest.approx(exact.last_loss, rel=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps=0: give at least 1"),
        ({"micro_steps": 0}, "micro_steps=0"),
        ({"keep_last": 0}, "keep_last=0"),
        ({"lr": -1.0}, "lr=-1.0: give a number of at least 0"),
        ({"lr": math.nan}, "lr=nan"),
        ({"lr": math.inf}, "lr=inf"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"grad_clip": -1.0}, "grad_clip=-1.0"),
        ({"eval_every": -1}, "eval_every=-1"),
        ({"checkpoint_every": -1}, "checkpoint_every=-1"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"eps": -1e-8}, "eps=-1e-08"),
        ({"decay_fraction": 1.5}, "decay_fraction=1.5: give a fraction"),
        ({"final_fraction": -0.5}, "final_fraction=-0.5"),
        ({"betas": (0.9, 1.0)}, "betas=(0.9, 1.0)"),
        ({"betas": (-0.1, 0.9)}, "betas=(-0.1, 0.9)"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"precision": "fp16"}, "precision='fp16': choose one of auto, bf16, fp32"),
        ({"compile": "maybe"}, "compile='maybe'"),
        ({"optimizer": "sgd"}, "optimizer='sgd'"),
        ({"schedule": "step"}, "schedule='step'"),
    ],
    ids=lambda value: str(value)[:32],
)
def test_values_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError) as error:
        settings(**change)
    assert message in str(error.value) and "\n" not in str(error.value)


# Compilation


@pytest.mark.parametrize(
    ("mode", "steps", "compiler", "expected"),
    [
        ("on", 2, None, True),
        ("off", 10_000, "/usr/bin/g++", False),
        ("auto", 299, "/usr/bin/g++", False),
        ("auto", 300, "/usr/bin/g++", True),
        ("auto", 300, None, False),
    ],
)
def test_when_the_loss_is_compiled(mode, steps, compiler, expected, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda function: "compiled")
    monkeypatch.setattr(shutil, "which", lambda name: compiler)
    found = module._maybe_compile(
        next_token_loss, settings(steps=steps, compile=mode), torch.device("cpu"), 0
    )
    assert (found == "compiled") == expected
    assert ("without torch.compile" in capsys.readouterr().out) == (mode == "auto" and compiler is None)
    # what counts is the number of steps still to do
    rest = module._maybe_compile(
        next_token_loss, settings(steps=steps, compile=mode), torch.device("cpu"), steps - 1
    )
    assert (rest == "compiled") == (mode == "on")


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler for torch.compile"
)
def test_a_compiled_run_has_the_same_losses():
    eager, expected = train(settings(steps=4), loss=next_token_loss)
    compiled, result = train(settings(steps=4, compile="on"), loss=next_token_loss)
    for one, other in zip(result.records, expected.records, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    assert_same(weights(compiled), weights(eager), 1e-3)
