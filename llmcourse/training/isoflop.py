"""An IsoFLOP sweep, run: every planned model trained, one file a result, so that an interrupted sweep goes on."""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmcourse import accounting, durable, runtime
from llmcourse.data.packing import PackedBatches
from llmcourse.data.token_stream import TokenStream
from llmcourse.models.transformer import Transformer
from llmcourse.training.fit import FitResult, TrainingError, fit
from llmcourse.training.isoflop_plan import Run, SweepSettings, plan, small_model
from llmcourse.training.pretraining import next_token_loss, validation
from llmcourse.training.scaling_fits import Runs
from llmcourse.training.scaling_frontiers import TrainingCurve
from llmcourse.training.width_scaling import prepare, width_scaled_adamw

__all__ = [
    "CURVE_POINTS",
    "Run",
    "RunResult",
    "SweepSettings",
    "as_curves",
    "as_runs",
    "first_documents",
    "plan",
    "run_sweep",
    "small_model",
    "train_run",
]

CURVE_POINTS = 24
"""points of a stored training curve, each the mean loss of as many steps"""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run came to."""

    run: Run
    """what was run"""
    loss: float = math.nan
    """validation loss at the end, nats per token; NaN for a run that failed"""
    error: float = math.nan
    """its standard error, from the validation text alone"""
    seconds: float = 0.0
    """training time"""
    curve: dict[str, list[float]] = field(default_factory=dict)
    """"tokens" and "loss": training loss along the run, averaged over stretches of steps"""
    failure: str | None = None
    """why there is no loss: what the loop said"""


def run_sweep(
    runs: Sequence[Run],
    train: TokenStream,
    valid: TokenStream,
    folder: Path | str,
    *,
    max_epochs: float = 4.0,
    workers: int = 1,
    device: torch.device | None = None,
    progress: bool = True,
) -> list[RunResult]:
    """Train every run that `folder` holds no result of yet; results in the order of `runs`.

    Each result is one file, written when its run ends, so an interrupted sweep goes on with the run it was in. A run
    whose loss stops being finite is a result too, with its `failure`, and is not tried again.

    Args:
        runs: from `plan`.
        train: training text.
        valid: validation text, the same for all runs; keep it short beside the runs (`first_documents`).
        folder: of the results.
        max_epochs: refuse a run that would see its text more often: repeated text is worth less than new text, and
            beyond about four times little (Muennighoff et al., 2023).
        workers: processes of one thread each. Products this small gain nothing from a second thread, so two processes
            on two cores take little more than half the time. Programs (not notebooks) that set this above 1 need the
            usual `if __name__ == "__main__"`.
        device: where to train; by default as for all training.
        progress: show a bar in GFLOPs with the time left.

    Raises:
        ValueError: no runs, fewer than 1 worker, more than `max_epochs`, or streams of other vocabularies.
    """
    _check(runs, train, valid, max_epochs, workers)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {run: folder / f"{run.key(train, valid)}.json" for run in runs}
    results = {run: found for run, path in paths.items() if (found := _read(path, run)) is not None}
    missing = [run for run in paths if run not in results]
    total = round(sum(run.flops for run in runs) / 1e9)
    with runtime.progress(
        total=total, description="IsoFLOP sweep", unit="GFLOP", enabled=progress and bool(missing)
    ) as bar:
        bar.update(sum(run.flops for run in results) / 1e9)
        make = _in_processes if workers > 1 else _in_turn
        for result in make(missing, train, valid, workers, device, bar.update):
            _write(paths[result.run], result)
            results[result.run] = result
    return [results[run] for run in runs]


def train_run(
    run: Run,
    train: TokenStream,
    valid: TokenStream,
    *,
    device: torch.device | None = None,
    on_step: Callable[[int, Any], None] | None = None,
) -> RunResult:
    """One run from fresh weights to its validation loss."""
    settings = run.settings
    runtime.set_seed(settings.seed)
    model = Transformer(run.model).to(device or runtime.pick_device())
    prepare(model, settings.base_width, settings.rule)
    optimizers = None
    if settings.optimizer == "adamw":
        options = {"lr": settings.lr, "betas": settings.betas, "weight_decay": settings.weight_decay}
        optimizers = width_scaled_adamw(model, settings.base_width, settings.rule, **options)
    context_length = run.model.context_length
    batches = PackedBatches(
        train, batch_size=run.batch_size, context_length=context_length, seed=settings.seed
    )
    try:
        result = fit(
            model,
            batches,
            next_token_loss,
            settings.fit(run.steps),
            evaluate=validation(valid, context_length, batch_size=128),
            optimizers=optimizers,
            on_step=on_step,
            progress=False,
        )
    except TrainingError as error:
        return RunResult(run=run, failure=str(error))
    last = result.evaluations[-1]
    return RunResult(
        run=run,
        loss=last["validation_loss"],
        error=last["validation_error"],
        seconds=result.seconds,
        curve=_curve(result),
    )


def first_documents(stream: TokenStream, n: int) -> TokenStream:
    """The first n documents of a stream.

    Raises:
        ValueError: the stream has fewer, or n is below 1.
    """
    if not 1 <= n <= stream.n_documents:
        raise ValueError(f"n={n}: the stream has {stream.n_documents} documents")
    offsets = stream.offsets[: n + 1]
    return TokenStream(stream.tokens[: offsets[-1]], offsets, stream.eos_id, stream.vocab_size)


def as_runs(results: Sequence[RunResult], *, embeddings: bool = False, budgets: bool = True) -> Runs:
    """The finished results as columns for the fits; failed runs are left out (count those with a `failure`).

    Args:
        results: of a sweep.
        embeddings: count embeddings into N.
        budgets: take C as planned; otherwise the exact FLOPs of each run, which differ by up to half a step.

    Raises:
        ValueError: no run finished.
    """
    done = [result for result in results if result.failure is None]
    if not done:
        raise ValueError(f"none of {len(results)} runs finished: lower the learning rate")
    size = "parameters_with_embeddings" if embeddings else "parameters"
    return Runs(
        parameters=np.array([getattr(result.run, size) for result in done]),
        tokens=np.array([result.run.tokens for result in done]),
        loss=np.array([result.loss for result in done]),
        flops=np.array([result.run.budget if budgets else result.run.flops for result in done]),
    )


def as_curves(results: Sequence[RunResult], *, embeddings: bool = False) -> list[TrainingCurve]:
    """The training curves of the finished results, for approach 1. The loss is that of fresh training text."""
    curves = []
    for result in results:
        if result.failure is None:
            run, tokens = result.run, np.array(result.curve["tokens"])
            curves.append(
                TrainingCurve(
                    parameters=run.parameters_with_embeddings if embeddings else run.parameters,
                    flops=tokens * accounting.training_flops_per_token(run.model),
                    tokens=tokens,
                    loss=np.array(result.curve["loss"]),
                )
            )
    return curves


def _check(
    runs: Sequence[Run], train: TokenStream, valid: TokenStream, max_epochs: float, workers: int
) -> None:
    if not runs or workers < 1:
        raise ValueError(f"{len(runs)} runs, workers={workers}: give at least one of each")
    for run in runs:
        sizes = {run.model.vocab_size, train.vocab_size, valid.vocab_size}
        if len(sizes) > 1:
            raise ValueError(
                f"vocabularies of {sorted(sizes)} entries: plan and tokenize with one vocab_size"
            )
        if run.tokens > max_epochs * len(train):
            raise ValueError(
                f"a run of {run.tokens} tokens sees the {len(train)} tokens of text {run.tokens / len(train):.1f} "
                "times, "
                f"more than max_epochs={max_epochs}: use more documents"
            )


def _curve(result: FitResult) -> dict[str, list[float]]:
    """Mean loss of `CURVE_POINTS` stretches of steps, and the tokens seen by the middle of each."""
    losses = np.array([record["loss"] for record in result.records])
    seen = np.cumsum([record["units"] for record in result.records])
    parts = np.array_split(np.arange(len(losses)), min(CURVE_POINTS, len(losses)))
    return {
        "tokens": [float(seen[part].mean()) for part in parts],
        "loss": [float(losses[part].mean()) for part in parts],
    }


def _in_turn(
    runs: Sequence[Run],
    train: TokenStream,
    valid: TokenStream,
    workers: int,
    device: torch.device | None,
    update: Callable[[float], Any],
) -> Iterator[RunResult]:
    for run in runs:
        per_step = run.flops / run.steps / 1e9
        yield train_run(run, train, valid, device=device, on_step=lambda _step, _model, n=per_step: update(n))


def _in_processes(
    runs: Sequence[Run],
    train: TokenStream,
    valid: TokenStream,
    workers: int,
    device: torch.device | None,
    update: Callable[[float], Any],
) -> Iterator[RunResult]:
    """The largest runs first, so that no process is left alone with one at the end."""
    context = multiprocessing.get_context("spawn")
    order = sorted(runs, key=lambda run: run.flops, reverse=True)
    with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        pending = [pool.submit(train_run, run, train, valid, device=device) for run in order]
        try:
            for future in as_completed(pending):
                result = future.result()
                update(result.run.flops / 1e9)
                yield result
        finally:
            pool.shutdown(cancel_futures=True)


def _write(path: Path, result: RunResult) -> None:
    values = {name: getattr(result, name) for name in ("loss", "error", "seconds", "curve", "failure")}
    if result.failure is not None:
        values |= {"loss": None, "error": None}  # JSON has no NaN
    work = path.with_suffix(".partial")
    durable.write_sealed(work, durable.plain(values, path.name))
    os.replace(work, path)


def _read(path: Path, run: Run) -> RunResult | None:
    """The stored result; none if the run has not ended, or if its file was changed, which is said."""
    if not path.exists():
        return None
    try:
        values = durable.read_sealed(path)
    except ValueError as problem:
        print(f"training that run again: {problem}")
        return None
    nan = {"loss": math.nan, "error": math.nan} if values["failure"] is not None else {}
    return RunResult(run=run, **(values | nan))
