"""Checkpoints: a run's whole state in a folder that is either complete and unchanged, or refused.

`<folder>/step_00000120/` holds model.safetensors, optimizer.safetensors, state.json (data position, random
generators, optimizer numbers, the loop's own data) and manifest.json (step, metric, size and SHA-256 of each
file). It is written under a hidden name, flushed to the disk and renamed, so that a kill at any moment leaves
the previous checkpoints untouched. One process writes to a folder at a time (rank 0 of a distributed run).
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmcourse.durable import (
    discard,
    find_damage,
    plain,
    publish,
    read_sealed,
    record_files,
    require_space,
    write_sealed,
)
from llmcourse.training.state import (
    check_optimizers,
    check_tensors,
    model_tensors,
    optimizer_state,
    restore_model,
    restore_optimizers,
    restore_rng_state,
    rng_state,
    separate_shared,
    unwrap,
)

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "find_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "load_weights",
    "restore_rng_state",
    "rng_state",
    "save_checkpoint",
    "unwrap",
    "verify_checkpoint",
]

FORMAT = "llmcourse.checkpoint"
VERSION = 1
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
STEP_NAME = re.compile(r"^\.?step_(\d{8,})(\.replaced)?$")


class CheckpointError(ValueError):
    """A checkpoint that is damaged or foreign; the message names it and says what is wrong, in one line."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    step: int
    """optimizer steps done when it was saved"""
    path: Path
    """its folder"""
    metric: float | None
    """what the loop judged it by (validation loss, nats per token), lower is better; None if it did not"""


def save_checkpoint(
    folder: str | Path,
    step: int,
    *,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    data_state: dict[str, Any],
    extra: dict[str, Any] | None = None,
    metric: float | None = None,
    keep_last: int = 2,
) -> Path:
    """Write everything that a run needs to go on exactly, atomically; then delete what is no longer kept.

    Kept are the newest `keep_last` checkpoints and the one with the lowest metric. `data_state` (where the
    batches stand) and `extra` (the loop's records, the schedule's state, ...) are plain data: dicts with text
    keys, lists, numbers, text. Remnants of a killed writer are removed. Returns the checkpoint's folder.

    Raises:
        ValueError: `step` < 0, `keep_last` < 1, a metric that is not finite, data that are not plain, or a
            folder that holds something else or checkpoints of a later step.
        OSError: not enough space, or the folder cannot be written.
    """
    if step < 0 or keep_last < 1:
        raise ValueError(f"step={step}, keep_last={keep_last}: give step >= 0 and keep_last >= 1")
    if metric is not None and not math.isfinite(metric):
        raise ValueError(
            f"metric={metric} at step {step} is not finite and cannot rank checkpoints; pass None"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _clean(folder, step)
    weights, ties = separate_shared(model_tensors(model))
    moments, entries = optimizer_state(optimizers)
    moments, moment_ties = separate_shared(moments)
    state = {
        "step": step,
        "data": plain(data_state, "data_state"),
        "extra": plain(extra or {}, "extra"),
        "rng": rng_state(),
        "optimizers": entries,
        "ties": {"model": ties, "optimizer": moment_ties},
    }
    work = folder / f".step_{step:08d}.{os.getpid()}.partial"
    final, replaced = folder / f"step_{step:08d}", folder / f".step_{step:08d}.replaced"
    text = json.dumps(state)
    needed = sum(tensor.nbytes for tensor in (*weights.values(), *moments.values())) + len(text)
    require_space(folder, needed, f"the checkpoint of step {step}")
    work.mkdir()
    try:
        _write_tensors(work / FILES[0], weights)
        _write_tensors(work / FILES[1], moments)
        (work / FILES[2]).write_text(text, encoding="utf-8")
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "step": step,
            "metric": metric,
            "files": record_files(work),
        }
        write_sealed(work / "manifest.json", manifest)
        if final.exists():  # a run resumed from before it: keep the old until the new one is there
            os.rename(final, replaced)
        publish(work, final)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    _prune(folder, keep_last)
    return final


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file({name: tensor.cpu() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        raise OSError(errno.EIO, f"{path} cannot be written ({error}): is the disk full?") from error


def _candidates(folder: Path) -> list[tuple[int, Path]]:
    """Step folders, newest first; one that a killed writer had moved aside comes after its successor."""
    found = [
        (int(match[1]), path)
        for path in folder.iterdir()
        if (match := STEP_NAME.match(path.name))
        and path.name.startswith(".") == bool(match[2])
        and path.is_dir()
    ]
    return sorted(found, key=lambda item: (-item[0], item[1].name.startswith(".")))


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file, not a folder of checkpoints: give another path")
    if (folder / "manifest.json").exists() and (folder / FILES[2]).exists():
        raise CheckpointError(f"{folder} is a single checkpoint: give the folder above it, {folder.parent}")
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if names and not _candidates(folder):
        raise CheckpointError(f"{folder} holds {names[0]}, ... and no checkpoint: give another folder")


def _is_ours(path: Path) -> bool:
    return {entry.name for entry in path.iterdir()} <= {*FILES, "manifest.json"}


def _clean(folder: Path, step: int) -> None:
    """Remove what killed writers left, and see that writing `step` here destroys nobody's work."""
    _check_folder(folder)
    for path in list(folder.iterdir()):
        if re.fullmatch(r"\.step_\d+\.\d+\.(partial|deleted)", path.name):
            shutil.rmtree(path)
        elif path.name.endswith(".replaced") and (match := STEP_NAME.match(path.name)):
            successor = folder / f"step_{match[1]}"
            shutil.rmtree(path) if successor.exists() else os.rename(path, successor)
    for other, path in _candidates(folder):
        if other > step and _quick(path):
            raise CheckpointError(
                f"{folder} has the later step {other}: resume from it, or give another folder"
            )
        if other == step and not _is_ours(path):
            raise CheckpointError(f"{path} holds files that are no checkpoint's: move it away")


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the step folder `path`; CheckpointError unless it is whole and belongs there."""
    try:
        manifest = read_sealed(path / "manifest.json")
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: manifest.json is of format {manifest.get('format')!r}, not {FORMAT!r}"
        )
    if manifest["version"] != VERSION:
        raise CheckpointError(f"{path}: format version {manifest['version']}, this program reads {VERSION}")
    if set(manifest["files"]) != set(FILES):
        raise CheckpointError(f"{path}: the manifest lists {sorted(manifest['files'])}, not {list(FILES)}")
    match = STEP_NAME.match(path.name)
    if match and int(match[1]) != manifest["step"]:
        raise CheckpointError(f"{path}: manifest.json is of step {manifest['step']}")
    return manifest


def verify_checkpoint(path: str | Path, *, digests: bool = True) -> Checkpoint:
    """The checkpoint in the folder `path`, if every byte agrees with its manifest (sizes, if not `digests`).

    Raises:
        CheckpointError: a file is missing, truncated, changed, or of another program; one line that names it.
    """
    path = Path(path)
    manifest = _read_manifest(path)
    if damage := find_damage(path, manifest["files"], digests=digests):
        raise CheckpointError(f"{path}: {damage}")
    return Checkpoint(manifest["step"], path, manifest["metric"])


def _quick(path: Path) -> Checkpoint | None:
    try:
        return verify_checkpoint(path, digests=False)
    except CheckpointError:
        return None


def _prune(folder: Path, keep_last: int) -> None:
    """Delete all but the last `keep_last` and the best. Damaged ones neither count nor are touched."""
    whole = [checkpoint for _, path in _candidates(folder) if (checkpoint := _quick(path))]
    kept = {checkpoint.path for checkpoint in whole[:keep_last]}
    judged = [checkpoint for checkpoint in whole if checkpoint.metric is not None]
    if judged:
        kept.add(min(judged, key=lambda checkpoint: (checkpoint.metric, checkpoint.step)).path)
    for checkpoint in whole:
        if checkpoint.path not in kept:
            discard(checkpoint.path)


def list_checkpoints(folder: str | Path) -> list[Checkpoint]:
    """The checkpoints of `folder`, oldest first, judged by manifests and file sizes alone."""
    folder = Path(folder)
    if not folder.exists():
        return []
    return [found for _, path in reversed(_candidates(folder)) if (found := _quick(path))]


def find_checkpoint(folder: str | Path) -> Checkpoint | None:
    """The newest checkpoint of `folder` of which every byte is right, or None if there is none yet.

    A damaged or foreign one is refused with a warning that names the file, and the one before it is tried.

    Raises:
        CheckpointError: `folder` is a file, a single checkpoint, or holds only other things.
    """
    folder = Path(folder)
    if not folder.exists():
        return None
    _check_folder(folder)
    for _, path in _candidates(folder):
        try:
            return verify_checkpoint(path)
        except CheckpointError as error:
            warnings.warn(f"checkpoint refused, trying the one before it: {error}", stacklevel=2)
    return None


def _read_tensors(checkpoint: Checkpoint, name: str) -> dict[str, Tensor]:
    try:
        return load_file(checkpoint.path / name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{checkpoint.path}: {name} cannot be read ({error})") from None


def _read_state(checkpoint: Checkpoint) -> dict[str, Any]:
    try:
        return json.loads((checkpoint.path / FILES[2]).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.path}: {FILES[2]} cannot be read ({error})") from None


def load_weights(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Copy the weights alone into `model`, for instance to sample from an early checkpoint.

    Raises:
        ValueError: the first tensor that this model lacks, has too much, or has in another shape or type.
        CheckpointError: a file cannot be read.
    """
    ties = _read_state(checkpoint)["ties"]["model"]
    weights = _read_tensors(checkpoint, FILES[0])
    check_tensors(weights, ties, model)
    restore_model(model, weights, ties)


def load_checkpoint(
    checkpoint: Checkpoint, *, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Put model, optimizers and random generators back to where they were; returns (data_state, extra).

    All is checked before anything is changed. A model under `torch.compile` or DDP may be given as it is.

    Raises:
        ValueError: model or optimizers are not the checkpoint's; the message names the first difference.
        CheckpointError: a file cannot be read.
    """
    state = _read_state(checkpoint)
    weights, moments = (_read_tensors(checkpoint, name) for name in FILES[:2])
    ties = state["ties"]
    check_tensors(weights, ties["model"], model)
    check_optimizers(optimizers, state["optimizers"])
    restore_model(model, weights, ties["model"])
    restore_optimizers(optimizers, state["optimizers"], moments, ties["optimizer"])
    restore_rng_state(state["rng"])
    return state["data"], state["extra"]
