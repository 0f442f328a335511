"""The sweep: budgets kept, results stored and resumed, failures counted, processes, errors."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from llmcourse import accounting
from llmcourse.data.token_stream import TokenStream
from llmcourse.training import isoflop
from llmcourse.training.isoflop import (
    CURVE_POINTS,
    Run,
    RunResult,
    SweepSettings,
    as_curves,
    as_runs,
    first_documents,
    plan,
    run_sweep,
    small_model,
    train_run,
)

V, T = 24, 16
CPU = torch.device("cpu")
MODELS = [small_model(width, 1, V, context_length=T) for width in (8, 16, 24)]
SETTINGS = SweepSettings(batch_size=8, min_steps=12, base_width=8, lr=3e-2)


def stream(n: int = 3000, seed: int = 0, vocab_size: int = V) -> TokenStream:
    """Documents of 20 tokens that count upwards from a random start, 0 at the end."""
    starts = np.random.default_rng(seed).integers(1, V, n // 20)
    tokens = (starts[:, None] + np.arange(20)) % (V - 1) + 1
    tokens[:, -1] = 0
    offsets = np.arange(0, n + 1, 20)
    return TokenStream(tokens.ravel().astype(np.uint16), offsets, 0, vocab_size)


TRAIN, VALID = stream(), stream(200, seed=1)


def small_plan(**changes) -> list[Run]:
    return plan([2e7], MODELS[:2], dataclasses.replace(SETTINGS, **changes))


def test_the_plan_keeps_the_budgets():
    runs = plan([1e8, 4e8], MODELS, SETTINGS)
    assert [(r.budget, r.model.d_model) for r in runs] == [(b, w) for b in (1e8, 4e8) for w in (8, 16, 24)]
    for run in runs:
        per_token = accounting.training_flops_per_token(run.model)
        assert run.flops == run.tokens * per_token
        assert abs(run.flops - run.budget) <= per_token * run.batch_size * T / 2
        assert run.tokens == run.steps * run.batch_size * T
        assert run.parameters == accounting.count_parameters(run.model, embeddings=False)
        assert run.parameters_with_embeddings == run.parameters + V * run.model.d_model


def test_short_runs_get_smaller_batches():
    long, short = plan([4e8], MODELS[:1], SETTINGS)[0], plan([3e7], MODELS[1:2], SETTINGS)[0]
    assert long.batch_size == 8 and short.batch_size < 8
    assert short.steps >= SETTINGS.min_steps
    whole = plan([3e7], MODELS[1:2], dataclasses.replace(SETTINGS, min_steps=1))[0]
    assert whole.batch_size == 8 and whole.steps < short.steps


def test_the_learning_rate_follows_the_width():
    def rates(rule: str) -> list[float]:
        return [run.hidden_lr for run in plan([1e8], MODELS, dataclasses.replace(SETTINGS, rule=rule))]

    assert rates("mup") == pytest.approx([3e-2, 1.5e-2, 1e-2]) == rates("simple")
    assert rates("standard") == [3e-2] * 3


def test_shapes_of_the_family():
    config = small_model(48, 3, 300)
    assert (config.d_head, config.n_heads, config.n_kv_heads, config.d_ff) == (16, 3, 3, 144)
    assert small_model(24, 1, 300).d_head == 8
    with pytest.raises(ValueError, match="d_model=40: give a multiple of 16"):
        small_model(40, 1, 300)


def test_a_sweep_learns_and_is_stored(tmp_path: Path):
    runs = small_plan()
    results = run_sweep(runs, TRAIN, VALID, tmp_path, device=CPU, progress=False)
    assert [result.run for result in results] == runs
    for result in results:
        assert 0 < result.loss < math.log(V) and result.failure is None and result.error > 0
        assert len(result.curve["loss"]) == min(CURVE_POINTS, result.run.steps)
        assert result.curve["loss"][-1] < result.curve["loss"][0]
    assert len(list(tmp_path.glob("*.json"))) == 2 and not list(tmp_path.glob("*.partial"))


def test_a_sweep_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch):
    runs = small_plan()
    first = run_sweep(runs[:1], TRAIN, VALID, tmp_path, device=CPU, progress=False)
    trained = []
    real = isoflop.train_run

    def counted(run: Run, *args, **kwargs) -> RunResult:
        trained.append(run)
        return real(run, *args, **kwargs)

    monkeypatch.setattr(isoflop, "train_run", counted)
    both = run_sweep(runs, TRAIN, VALID, tmp_path, device=CPU, progress=False)
    assert trained == runs[1:] and both[0] == first[0]
    assert run_sweep(runs, TRAIN, VALID, tmp_path, device=CPU, progress=False) == both
    # other data or other settings are other runs
    run_sweep(runs[:1], stream(seed=5), VALID, tmp_path, device=CPU, progress=False)
    run_sweep(small_plan(lr=2e-3)[:1], TRAIN, VALID, tmp_path, device=CPU, progress=False)
    assert len(trained) == 3


def test_a_damaged_result_is_trained_again(tmp_path: Path, capsys):
    runs = small_plan()[:1]
    (before,) = run_sweep(runs, TRAIN, VALID, tmp_path, device=CPU, progress=False)
    (path,) = tmp_path.glob("*.json")
    path.write_text(path.read_text()[:40])
    (after,) = run_sweep(runs, TRAIN, VALID, tmp_path, device=CPU, progress=False)
    assert after.loss == before.loss and "training that run again" in capsys.readouterr().out


def test_the_same_run_gives_the_same_loss_and_the_seed_another():
    run = small_plan()[0]
    other = dataclasses.replace(run, settings=dataclasses.replace(SETTINGS, seed=1))
    first, again, third = (train_run(one, TRAIN, VALID, device=CPU) for one in (run, run, other))
    assert first.curve == again.curve and first.loss == again.loss != third.loss


def test_every_setting_of_the_loop_changes_the_run():
    base = train_run(small_plan()[1], TRAIN, VALID, device=CPU).loss
    changes = [
        {"lr": 2e-3},
        {"warmup_fraction": 0.5},
        {"schedule": "constant"},
        {"final_fraction": 0.5},
        {"weight_decay": 1.0},
        {"betas": (0.8, 0.9)},
        {"rule": "standard"},
        {"rule": "simple"},
        {"base_width": 4},
        {"rule": "standard", "optimizer": "muon"},
    ]
    losses = {train_run(small_plan(**change)[1], TRAIN, VALID, device=CPU).loss for change in changes}
    assert len(losses | {base}) == len(changes) + 1


def test_a_run_that_diverges_is_a_result_without_a_loss(tmp_path: Path):
    runs = small_plan()[:1] + small_plan(lr=1e30)[:1]
    results = run_sweep(runs, TRAIN, VALID, tmp_path, device=CPU, progress=False)
    assert results[0].failure is None and math.isnan(results[1].loss)
    assert "nothing was updated" in results[1].failure
    assert len(as_runs(results)) == 1 and len(as_curves(results)) == 1
    again = run_sweep(runs, TRAIN, VALID, tmp_path, device=CPU, progress=False)
    assert again[1].failure == results[1].failure and math.isnan(again[1].loss)
    with pytest.raises(ValueError, match="none of 1 runs finished"):
        as_runs(results[1:])


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path: Path):
    runs, threads = plan([4e7, 8e7], MODELS[:2], SETTINGS), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = run_sweep(runs, TRAIN, VALID, tmp_path / "one", device=CPU, progress=False)
    finally:
        torch.set_num_threads(threads)
    both = run_sweep(runs, TRAIN, VALID, tmp_path / "two", device=CPU, progress=False, workers=2)
    assert [result.run for result in both] == runs
    assert [result.loss for result in both] == [result.loss for result in alone]


def test_columns_for_the_fits(tmp_path: Path):
    runs = small_plan()
    results = [
        RunResult(run=run, loss=2.0 + i, error=0.1, curve={"tokens": [100.0, 300.0], "loss": [3.0, 2.5]})
        for i, run in enumerate(runs)
    ]
    columns = as_runs(results)
    np.testing.assert_array_equal(columns.parameters, [run.parameters for run in runs])
    np.testing.assert_array_equal(columns.tokens, [run.tokens for run in runs])
    np.testing.assert_array_equal(columns.flops, [2e7, 2e7])
    np.testing.assert_array_equal(columns.loss, [2.0, 3.0])
    exact = as_runs(results, embeddings=True, budgets=False)
    np.testing.assert_array_equal(exact.flops, [run.flops for run in runs])
    np.testing.assert_array_equal(exact.parameters, [run.parameters_with_embeddings for run in runs])
    curve = as_curves(results, embeddings=True)[1]
    assert curve.parameters == runs[1].parameters_with_embeddings
    np.testing.assert_array_equal(
        curve.flops, np.array([100, 300]) * accounting.training_flops_per_token(runs[1].model)
    )


def test_first_documents():
    some = first_documents(VALID, 3)
    assert some.n_documents == 3 and len(some) == 60
    np.testing.assert_array_equal(some.document(2), VALID.document(2))
    for n in (0, 11):
        with pytest.raises(ValueError, match=f"n={n}: the stream has 10 documents"):
            first_documents(VALID, n)


def test_errors(tmp_path: Path):
    for change, message in (
        ({"batch_size": 0}, "batch_size=0"),
        ({"min_steps": 0}, "min_steps=0"),
        ({"warmup_fraction": 1.5}, r"warmup_fraction=1\.5"),
        ({"rule": "half"}, "rule='half'"),
        ({"optimizer": "muon"}, "rule='mup' is AdamW's"),
        ({"lr": -1.0}, "lr=-1"),
    ):
        with pytest.raises(ValueError, match=message):
            SweepSettings(**change)
    with pytest.raises(ValueError, match="0 budgets and 3 models"):
        plan([], MODELS, SETTINGS)
    with pytest.raises(ValueError, match=r"1e\+06 FLOPs give d_model=24, n_layers=1 only \d steps"):
        plan([1e6], MODELS[2:], SETTINGS)
    with pytest.raises(ValueError, match="0 runs, workers=1"):
        run_sweep([], TRAIN, VALID, tmp_path)
    with pytest.raises(ValueError, match="workers=0"):
        run_sweep(small_plan(), TRAIN, VALID, tmp_path, workers=0)
    with pytest.raises(ValueError, match=r"vocabularies of \[24, 30\] entries"):
        run_sweep(small_plan(), stream(vocab_size=30), VALID, tmp_path)
    with pytest.raises(ValueError, match="times, more than max_epochs=0.5: use more documents"):
        run_sweep(small_plan(), TRAIN, VALID, tmp_path, max_epochs=0.5)
