"""Results that a lab measured, stored for the book's pages."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmcourse.labs.repository import REPOSITORY_VARIABLE, find_lab, require_repository


def store_results(lab: str, results: Mapping[str, Any]) -> Path | None:
    """Write a lab's results to `labs/results/NN_slug.json`, when the lab is being executed for the repository.

    Elsewhere (a learner's JupyterLab, Colab, a run with other parameters) nothing is written and one line says so:
    numbers in the book come from executions with the lab's own parameters only.

    Args:
        lab: slug or name: "attention", "01_attention".
        results: JSON-like data; tensors, NumPy arrays and numbers are stored as lists and numbers.

    Returns:
        The file written, or `None`.

    Raises:
        ValueError: no such lab, a value that JSON cannot hold, or a number that is not finite.
    """
    repository = os.environ.get(REPOSITORY_VARIABLE)
    if not repository:
        print("Results are stored only when the repository executes its labs: nothing written.")
        return None
    path = find_lab(lab, Path(repository)).results
    try:
        text = json.dumps(_plain(results), indent=1, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"results of lab {lab!r} cannot be stored: {error}") from error
    write_atomically(path, text + "\n")
    print(f"Stored labs/results/{path.name}.")
    return path


def load_results(lab: str, repository: Path | None = None) -> dict[str, Any]:
    """The results that a lab stored.

    Raises:
        ValueError: no such lab, or it has stored none yet.
    """
    found = find_lab(lab, repository)
    if not found.results.is_file():
        raise ValueError(f"no results of lab {found.name}: run `make labs LABS={found.number}` first")
    return json.loads(found.results.read_text(encoding="utf-8"))


def load_benchmarks(repository: Path | None = None) -> list[dict[str, Any]]:
    """All stored benchmark results, by name; see `benchmarks/harness.py` for their fields.

    Raises:
        ValueError: none are stored, or there is no checkout around.
    """
    folder = require_repository(repository) / "benchmarks" / "results"
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    if not results:
        raise ValueError(f"no results in {folder}: run `make bench` first")
    return results


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new, never a part."""
    write_bytes_atomically(path, text.encode())


def write_bytes_atomically(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; what stands there, a link too, is replaced and never written through."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return _plain(value.tolist()) if hasattr(value, "tolist") else value
