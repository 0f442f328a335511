"""THE training loop. Every method of the course is a loss and a source of batches that run through `fit`.

A loss is a pure function `(model, batch) -> (total, count, metrics)`: `total` is summed over its units (target tokens,
preference pairs), `count` is how many there are, `metrics` are numbers to record. The loop divides by the count over
all micro-steps and processes, so that every unit weighs the same however a batch is cut up.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llmcourse import accounting, runtime
from llmcourse.training import checkpoint as checkpoints
from llmcourse.training import distributed, schedules
from llmcourse.training.optimizers import build_optimizers

Batch = dict[str, Tensor]
Loss = Callable[[nn.Module, Batch], tuple[Tensor, Tensor | int, dict[str, Any]]]
Evaluate = Callable[[nn.Module], dict[str, float]]


class BatchSource(Protocol):
    """Where batches come from; its state is the data position of a checkpoint."""

    def next(self) -> Batch:
        """The next micro-batch of this process."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position as JSON-able data."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position."""
        ...


class TrainingError(RuntimeError):
    """Training cannot go on; the message names the step and what to do."""


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How to train, whatever the loss.

    Raises:
        ValueError: a value outside its range, or an unknown name.
    """

    steps: int
    """optimizer steps"""
    lr: float = 3e-3
    """peak learning rate"""
    warmup_steps: int = 0
    """steps of linear warm-up"""
    schedule: str = "cosine"
    """cosine, linear, wsd or constant"""
    decay_fraction: float = 0.2
    """share of all steps that the wsd schedule decays over"""
    final_fraction: float = 0.0
    """learning rate at the end as a fraction of the peak"""
    optimizer: str = "adamw"
    """adamw, or muon (Muon on hidden matrices, AdamW on the rest)"""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's moment decays"""
    eps: float = 1e-8
    """AdamW's epsilon"""
    weight_decay: float = 0.1
    """decoupled weight decay, not applied to vectors"""
    momentum: float = 0.95
    """Muon's momentum"""
    grad_clip: float = 1.0
    """largest global gradient norm; 0 switches clipping off"""
    micro_steps: int = 1
    """micro-batches whose gradients are accumulated into one step"""
    precision: str = "auto"
    """fp32, bf16 (autocast), or auto: bf16 where the hardware multiplies it"""
    compile: str = "auto"
    """on, off, or auto: torch.compile when a compiler is there and the run is long enough to repay it"""
    eval_every: int = 0
    """steps between evaluations; 0 evaluates only at the end"""
    checkpoint_every: int = 0
    """steps between checkpoints; 0 writes one at the end, if there is a folder"""
    keep_last: int = 2
    """newest checkpoints kept beside the best"""
    seed: int = 0
    """of torch's generators"""

    def __post_init__(self) -> None:
        for name in ("steps", "micro_steps", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give at least 1")
        for name in (
            "lr",
            "warmup_steps",
            "grad_clip",
            "eval_every",
            "checkpoint_every",
            "weight_decay",
            "eps",
        ):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name}={value}: give a number of at least 0")
        for name in ("decay_fraction", "final_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: give a fraction between 0 and 1")
        if not all(0 <= value < 1 for value in (*self.betas, self.momentum)):
            raise ValueError(f"betas={self.betas}, momentum={self.momentum}: give numbers from 0 to below 1")
        if self.precision not in runtime.PRECISIONS:
            raise ValueError(f"precision={self.precision!r}: choose one of {', '.join(runtime.PRECISIONS)}")
        if self.compile not in ("auto", "on", "off"):
            raise ValueError(f"compile={self.compile!r}: choose auto, on or off")
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"optimizer={self.optimizer!r}: choose adamw or muon")
        schedules.factor(self.schedule, 0, steps=self.steps, warmup_steps=self.warmup_steps)

    def factor(self, step: int) -> float:
        """Learning rate at `step` as a fraction of the peak."""
        return schedules.factor(
            self.schedule,
            step,
            steps=self.steps,
            warmup_steps=self.warmup_steps,
            decay_fraction=self.decay_fraction,
            final_fraction=self.final_fraction,
        )


@dataclass
class FitResult:
    """What a run leaves: one record a step, one a evaluation, and totals."""

    records: list[dict[str, Any]] = field(default_factory=list)
    """per step: step, loss, lr, grad_norm, units, units_per_second, mfu, peak_bytes, seconds, and the loss's metrics"""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """per evaluation: step, seconds and what `evaluate` returned"""
    peak_bytes: int = 0
    """peak memory of the process (CPU) or of the allocator (CUDA)"""
    seconds: float = 0.0
    """training time, evaluations and checkpoints included"""
    resumed_from: int = 0
    """step of the checkpoint that this run began at, 0 for none"""

    @property
    def last_loss(self) -> float:
        """Loss of the last step."""
        return self.records[-1]["loss"]


def fit(
    model: nn.Module,
    batches: BatchSource,
    loss: Loss,
    settings: FitSettings,
    *,
    evaluate: Evaluate | None = None,
    checkpoint_folder: Path | str | None = None,
    on_step: Callable[[int, nn.Module], None] | None = None,
    optimizers: list[torch.optim.Optimizer] | None = None,
    progress: bool = True,
    description: str = "training",
) -> FitResult:
    """Train `model` in place and return its records.

    A run with a `checkpoint_folder` saves itself there and goes on from the newest valid checkpoint in it, bit for bit
    as an uninterrupted run on the same machine. `evaluate(model)` returns numbers; "validation_loss" among them decides
    which checkpoint is the best. `on_step(step, model)` is called after each step. `optimizers` replace those that the
    settings name; a parameter group's rate is the settings' times its "lr_scale", 1 where there is none.

    Raises:
        TrainingError: the loss or the gradient norm is not finite; the step is not taken.
        ValueError: the checkpoint found is of another model, other optimizers, other data, or a later step.
    """
    device = next(model.parameters()).device
    world = distributed.world()
    runtime.set_seed(settings.seed)
    optimizers = optimizers or _optimizers(model, settings)
    result, first = _resume(model, optimizers, batches, checkpoint_folder, settings.steps)
    dtype = runtime.precision_dtype(settings.precision, device)
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
    replica = distributed.wrap(model)
    run_loss = _maybe_compile(loss, settings, device, first)
    parameters = [p for p in model.parameters() if p.requires_grad]
    speed = _speed_meter(model, device, dtype or torch.float32, world.size)
    began = time.perf_counter() - result.seconds
    model.train()
    bar = _bar(settings, first, progress, description)
    with runtime.reproducible(device), runtime.PeakMemory(device) as memory, bar:
        for step in range(first, settings.steps):
            step_began = time.perf_counter()
            totals = torch.zeros(2, dtype=torch.float64, device=device)  # summed loss, number of units
            for micro in range(settings.micro_steps):
                batch = {name: value.to(device, non_blocking=True) for name, value in batches.next().items()}
                with distributed.without_gradient_sync(replica, skip=micro + 1 < settings.micro_steps):
                    with autocast:
                        total, count, metrics = run_loss(replica, batch)
                    total.backward()
                totals[0] += total.detach()
                totals[1] += count
            mean_loss, units = _mean(distributed.sum_over_processes(totals))
            grad_norm = scale_and_clip(parameters, world.size / max(units, 1), settings.grad_clip)
            _require_finite(step, mean_loss, grad_norm, batches, checkpoint_folder)
            lr = settings.lr * settings.factor(step)
            _step(optimizers, lr)
            record = {"step": step, "loss": mean_loss, "lr": lr, "grad_norm": grad_norm, "units": int(units)}
            record |= {name: float(value) for name, value in metrics.items()} | speed(units, step_began)
            result.seconds = time.perf_counter() - began
            result.records.append(record | {"seconds": result.seconds, "peak_bytes": memory.read()})
            bar.set_postfix(loss=f"{mean_loss:.3f}", lr=f"{lr:.1e}", refresh=False)
            bar.update()
            if on_step is not None:
                on_step(step, model)
            if evaluate is not None and _due(step, settings.eval_every, settings.steps):
                _evaluate(model, evaluate, step, began, result)
            if checkpoint_folder is not None and _due(step, settings.checkpoint_every, settings.steps):
                result.seconds = time.perf_counter() - began
                _save(checkpoint_folder, step + 1, model, optimizers, batches, result, settings)
    result.peak_bytes = max(result.peak_bytes, memory.bytes)
    result.seconds = time.perf_counter() - began
    return result


@torch.no_grad()
def scale_and_clip(parameters: Sequence[Tensor], scale: float, largest: float) -> float:
    """Multiply gradients by `scale`, then down to a global L2 norm of `largest` (0: no limit); return the norm before.

    One pass for both, since the second factor follows from the first (Pascanu et al., 2013, algorithm 1).
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        raise TrainingError(
            "no parameter has a gradient: does the loss depend on the model, outside no_grad?"
        )
    norm = float(torch.nn.utils.get_total_norm(gradients)) * scale
    if largest and norm > largest:
        scale *= largest / (norm + 1e-6)
    torch._foreach_mul_(gradients, scale)
    return norm


def _bar(settings: FitSettings, first: int, progress: bool, description: str) -> Any:
    show = progress and distributed.world().is_main
    bar = runtime.progress(total=settings.steps, description=description, unit="step", enabled=show)
    bar.update(first)
    return bar


def _mean(totals: Tensor) -> tuple[float, float]:
    total, count = totals.tolist()
    return (total / count if count else 0.0), count


def _due(step: int, every: int, steps: int) -> bool:
    """Whether something that comes `every` so many steps (0: never) and after the last one comes after this step."""
    return step + 1 == steps or (bool(every) and (step + 1) % every == 0)


def _optimizers(model: nn.Module, settings: FitSettings) -> list[torch.optim.Optimizer]:
    return build_optimizers(
        model,
        settings.optimizer,
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
    )


def _step(optimizers: list[torch.optim.Optimizer], lr: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _maybe_compile(loss: Loss, settings: FitSettings, device: torch.device, first: int) -> Loss:
    """Compile loss and model as one graph. "auto" asks for a compiler and at least 300 steps to repay its minute."""
    has_compiler = device.type == "cuda" or any(shutil.which(name) for name in ("g++", "clang++", "cl"))
    worthwhile = settings.steps - first >= 300
    if settings.compile == "on" or (settings.compile == "auto" and worthwhile and has_compiler):
        return torch.compile(loss)
    if settings.compile == "auto" and worthwhile:
        print(
            "no C++ compiler found: training without torch.compile, which is slower but gives the same model"
        )
    return loss


def _speed_meter(
    model: nn.Module, device: torch.device, dtype: torch.dtype, n_processes: int
) -> Callable[[float, float], dict[str, float]]:
    """A function from a step's units (over all processes) and its begin to units a second and MFU.

    The MFU is NaN for models whose FLOPs are not known.
    """
    config = getattr(model, "config", None)
    is_known = hasattr(config, "context_length")
    peak = (
        runtime.peak_flops(device, dtype) * (n_processes if device.type == "cuda" else 1) if is_known else 0.0
    )

    def speed(units: float, began: float) -> dict[str, float]:
        rate = units / (time.perf_counter() - began)
        mfu = accounting.model_flops_utilization(config, rate, peak) if is_known else math.nan
        return {"units_per_second": rate, "mfu": mfu}

    return speed


def _evaluate(model: nn.Module, evaluate: Evaluate, step: int, began: float, result: FitResult) -> None:
    model.eval()
    with torch.no_grad():
        numbers = evaluate(model)
    model.train()
    result.evaluations.append({"step": step + 1, "seconds": time.perf_counter() - began, **numbers})


def _save(
    folder: Path | str,
    step: int,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    batches: BatchSource,
    result: FitResult,
    settings: FitSettings,
) -> None:
    if distributed.world().is_main:
        latest = result.evaluations[-1] if result.evaluations else {}
        checkpoints.save_checkpoint(
            folder,
            step,
            model=model,
            optimizers=optimizers,
            data_state=batches.state_dict(),
            extra={"records": result.records, "evaluations": result.evaluations, "seconds": result.seconds},
            metric=latest.get("validation_loss") if latest.get("step") == step else None,
            keep_last=settings.keep_last,
        )
    distributed.barrier()


def _resume(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    batches: BatchSource,
    folder: Path | str | None,
    steps: int,
) -> tuple[FitResult, int]:
    found = checkpoints.find_checkpoint(folder) if folder is not None else None
    if found is None:
        return FitResult(), 0
    if found.step > steps:
        raise ValueError(
            f"{folder} is at step {found.step}, beyond steps={steps}: give more steps or another folder"
        )
    data_state, extra = checkpoints.load_checkpoint(found, model=model, optimizers=optimizers)
    batches.load_state_dict(data_state)
    result = FitResult(
        records=extra["records"],
        evaluations=extra["evaluations"],
        seconds=extra["seconds"],
        resumed_from=found.step,
    )
    return result, found.step


def _require_finite(
    step: int, loss: float, grad_norm: float, batches: BatchSource, folder: Path | str | None
) -> None:
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    where = f"; the last checkpoint in {folder} is from before it" if folder is not None else ""
    raise TrainingError(
        f"step {step}: loss {loss}, gradient norm {grad_norm}, on the batch before data position "
        f"{batches.state_dict()}: nothing was updated{where}. Lower lr, lengthen the warm-up, or look at that batch"
    )
