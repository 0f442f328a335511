"""Strip from an executed notebook what says nothing about the lab: clocks, machine paths, finished progress bars."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nbformat import NotebookNode

PROGRESS = re.compile(r"^.*\d+%\|.*\|.*\[.*\]\s*$|^\s*\d+it \[.*\]\s*$")
# Tried at the beginnings of words only: a figure is one word of some 100 kB, and trying everywhere is quadratic.
CELL_FILE = re.compile(r"(?<![^\s\"'(])[^\s\"'(]*ipykernel_\d+/\d+\.py")
WIDGET = "application/vnd.jupyter.widget-view+json"


def clean(notebook: NotebookNode, paths: Mapping[str, str]) -> None:
    """Remove, in place, timings per cell, what the executing tools noted, widgets' state, progress bars and paths.

    Args:
        paths: absolute paths and what to write instead; the Python environment and the home folder are added.
    """
    known = {
        **paths,
        str(Path(sys.prefix)): "[python]",
        str(Path(sys.base_prefix)): "[python]",
        str(Path.home()): "~",
    }
    # The longest first: an environment may lie inside the repository, and that in the home folder.
    ordered = sorted(
        ((path, new) for path, new in known.items() if len(path) > 1), key=lambda pair: -len(pair[0])
    )
    rules = [(re.compile(re.escape(path) + r"(?![\w.-])"), new) for path, new in ordered]
    for key in ("papermill", "widgets"):
        notebook.metadata.pop(key, None)
    notebook.metadata.get("language_info", {}).pop("version", None)  # provenance says it
    for cell in notebook.cells:
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        if not cell.metadata.get("tags", True):  # papermill adds an empty list
            del cell.metadata["tags"]
        if cell.cell_type == "code":
            outputs = [
                _without_paths(output, rules)
                for output in cell.outputs
                if WIDGET not in output.get("data", {})
            ]
            cell.outputs = [output for output in _merged(outputs) if output.get("text", "x").strip("\n")]


def _without_paths(value: Any, rules: list[tuple[re.Pattern[str], str]]) -> Any:
    """The same structure with the paths in its strings replaced."""
    if isinstance(value, str):
        value = CELL_FILE.sub("cell.py", value)
        for pattern, new in rules:
            value = pattern.sub(new, value)
    elif isinstance(value, dict):
        for key in value:
            value[key] = value[key] if key.startswith("image/png") else _without_paths(value[key], rules)
    elif isinstance(value, list):
        value = [_without_paths(item, rules) for item in value]
    return value


def _merged(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Outputs with each stream's neighboring pieces joined and printed as a terminal would show them."""
    merged: list[NotebookNode] = []
    for output in outputs:
        last = merged[-1] if merged else None
        if output.output_type == "stream" and last and last.get("name") == output.name:
            last.text += output.text
        else:
            merged.append(output)
    for output in merged:
        if output.output_type == "stream":
            output.text = _as_shown(output.text)
    return merged


def _as_shown(text: str) -> str:
    """Text after carriage returns have overwritten their lines; finished progress bars are dropped."""
    lines = []
    for line in text.split("\n"):
        parts = [part for part in line.split("\r") if part]
        shown = parts[-1] if parts else ""
        if not parts or not PROGRESS.match(shown):
            lines.append(shown)
    return "\n".join(lines)
