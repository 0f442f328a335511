"""Execute a lab on a fresh kernel in an empty folder, and record what it cost and what it showed."""

from __future__ import annotations

import contextlib
import copy
import datetime
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcourse.labs.cleaning import clean
from llmcourse.labs.kernel import KernelMemory, engine
from llmcourse.labs.repository import REPOSITORY_VARIABLE, Lab
from llmcourse.labs.results import write_atomically
from llmcourse.labs.source import build, parameters_of, source_hash
from llmcourse.labs.staleness import package_hash

if TYPE_CHECKING:
    from nbformat import NotebookNode

CLAIM = re.compile(r"^\[holds\] ([A-Za-z0-9_-]+): (.*)$", re.M)
VERSIONS = ("torch", "transformers", "tokenizers", "datasets", "numpy", "llmcourse")


class LabError(RuntimeError):
    """A cell of a lab failed; the notebook up to that cell is kept for inspection."""


def execute(
    lab: Lab,
    parameters: Mapping[str, Any] | None = None,
    *,
    destination: Path | None = None,
    cell_timeout: int = 900,
    progress: bool = True,
) -> NotebookNode:
    """Execute a lab and store the notebook with its outputs and its provenance (`metadata.llmcourse`).

    The kernel works in an empty temporary folder: a lab may rely on nothing but the installed package. The notebook
    replaces the stored one only when every cell ran; a failed one goes to `labs/runs/`.

    Args:
        parameters: values for the parameters cell, instead of the lab's own.
        destination: file to write. By default the lab's notebook, or `labs/runs/NN_slug.ipynb` when `parameters` are
            given: what the repository stores is always measured with the lab's own parameters, and only then may the
            lab store results.
        cell_timeout: seconds that one cell may take.
        progress: whether to show cells done, time and the lab's own progress.

    Raises:
        ValueError: a parameter that the lab does not have, or a source that `build` refuses.
        LabError: a cell failed, a claim among them, or took too long.
    """
    notebook = build(lab)
    own = parameters_of(notebook)
    unknown = sorted(set(parameters or {}) - set(own))
    if unknown:
        raise ValueError(f"lab {lab.name} has no parameter {unknown[0]!r}: it has {', '.join(own)}")
    scratch_folder = lab.repository / "labs" / "runs"
    official = not parameters and destination is None
    destination = destination or (lab.notebook if official else scratch_folder / lab.notebook.name)
    with tempfile.TemporaryDirectory(prefix="lab-") as folder:
        partial, workplace = Path(folder) / lab.notebook.name, Path(folder) / "work"
        workplace.mkdir()
        before, start = _artifacts(), time.perf_counter()
        with (
            _environment(REPOSITORY_VARIABLE, str(lab.repository) if official else None),
            KernelMemory() as memory,
        ):
            try:
                ran = _run(notebook, parameters, partial, workplace, cell_timeout, progress, lab.name)
            except Exception as error:
                raise LabError(_failure(lab, error, partial, scratch_folder)) from error
        seconds = time.perf_counter() - start
        upstream = sum(cost for key, cost in _artifacts().items() if key not in before)
        clean(ran, {str(workplace.resolve()): ".", str(workplace): ".", str(lab.repository): "."})
    ran.metadata["llmcourse"] = {
        **{name.lower(): value for name, value in {**own, **(parameters or {})}.items()},
        "seconds": round(max(seconds - upstream, 0.0), 1),
        "upstream_seconds": round(upstream, 1),
        "peak_bytes": memory.bytes,
        "claims": claims_of(ran),
        "package_hash": package_hash(notebook, lab.slug),
        "source_hash": source_hash(notebook),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        **_machine(),
    }
    if destination.parent == scratch_folder:
        _make_ignored(scratch_folder)
    save(ran, destination)
    return ran


def save(notebook: NotebookNode, path: Path) -> None:
    """Validate and write a notebook atomically."""
    import nbformat

    nbformat.validate(notebook)
    write_atomically(path, nbformat.writes(notebook) + "\n")


def claims_of(notebook: NotebookNode) -> list[dict[str, Any]]:
    """The claims that an executed notebook printed: `{"id", "text", "held"}` each."""
    texts = [
        out.text for cell in notebook.cells for out in cell.get("outputs", []) if out.output_type == "stream"
    ]
    found = [match.groups() for text in texts for match in CLAIM.finditer(text)]
    return [{"id": identifier, "text": text, "held": True} for identifier, text in found]


def _run(
    notebook: NotebookNode,
    parameters: Mapping[str, Any] | None,
    partial: Path,
    workplace: Path,
    cell_timeout: int,
    progress: bool,
    name: str,
) -> NotebookNode:
    import papermill

    interactive = sys.stderr.isatty()
    bar = {
        "desc": name,
        "mininterval": 0.2 if interactive else 15,
        "dynamic_ncols": interactive,
        "leave": interactive,
    }
    return papermill.execute_notebook(
        copy.deepcopy(notebook),
        str(partial),
        dict(parameters or {}),
        engine_name=engine(),
        kernel_name="python3",
        progress_bar=bar if progress else False,
        cwd=str(workplace),
        execution_timeout=cell_timeout,
        # A kernel that waits for its shutdown request to be answered costs three seconds in one run of five.
        shutdown_kernel="immediate",
        extra_arguments=["--log-level=ERROR"],
    )


def _failure(lab: Lab, error: Exception, partial: Path, folder: Path) -> str:
    kept = ""
    if partial.is_file():
        _make_ignored(folder)
        shutil.copy(partial, folder / partial.name)
        kept = f"; see labs/runs/{partial.name}"
    if hasattr(error, "ename"):
        value = " ".join(str(error.evalue).split())
        return f"lab {lab.name}, cell {error.cell_index + 1}: {error.ename}: {value}{kept}"
    return f"lab {lab.name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}{kept}"


def _make_ignored(folder: Path) -> None:
    """A folder that git leaves alone: these notebooks are for whoever ran them."""
    write_atomically(folder / ".gitignore", "*\n")


@contextlib.contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    before = os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


def _artifacts() -> dict[str, float]:
    """Seconds that each artifact in the cache took to build: what a lab adds to them is not the lab's own time."""
    from llmcourse.artifacts import list_artifacts

    return {artifact.key: float(artifact.seconds) for artifact in list_artifacts()}


def _machine() -> dict[str, Any]:
    import importlib.metadata

    import torch

    from llmcourse.runtime import describe_machine, matmul_flops, pick_device

    device, versions = pick_device(), {}
    for name in VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "device": device.type,
        "matmul_gflops": round(matmul_flops(device, torch.float32) / 1e9, 1),
        "machine": describe_machine(),
        "versions": versions,
    }
