"""Whether a stored notebook still is what its source and the package's code would give."""

from __future__ import annotations

import ast
import importlib.util
from typing import TYPE_CHECKING

from llmcourse.labs.repository import Lab
from llmcourse.labs.source import build, written_metadata

if TYPE_CHECKING:
    from nbformat import NotebookNode

MACHINERY = "llmcourse.labs"


def stale(lab: Lab) -> str | None:
    """Why a lab has to be executed again, in a few words; `None` when its stored notebook is current.

    It has to be when it never was, when a code cell of its source changed, or when code of this package that it imports
    changed (as parsed: comments and docstrings do not count). Changed text alone is taken over by `refresh`.
    """
    if not lab.notebook.is_file():
        return "never executed"
    built = build(lab)
    try:
        stored = read_notebook(lab)
    except ValueError:
        return "its notebook is damaged"
    provenance = stored.metadata.get("llmcourse")
    if not provenance:
        return "never executed"
    if _code(stored) != _code(built):
        return "code cells changed"
    if provenance.get("package_hash") != package_hash(built, lab.slug):
        return "the package's code changed"
    if any("store_results(" in cell.source for cell in built.cells) and not lab.results.is_file():
        return "its stored results are missing"
    return None


def changed_cells(lab: Lab) -> str | None:
    """The first difference between the cells of source and stored notebook: text, code, id or metadata; or `None`."""
    stored, built = read_notebook(lab), build(lab)
    for number, (old, new) in enumerate(zip(stored.cells, built.cells, strict=False), 1):
        for what in ("cell_type", "source", "id"):
            if old.get(what) != new[what]:
                return f"cell {number}: its {what} differs from the source"
        if written_metadata(old) != written_metadata(new):
            return f"cell {number}: its metadata differ from the source"
    if len(stored.cells) != len(built.cells):
        return f"{len(stored.cells)} cells are stored and the source has {len(built.cells)}"
    return None


def refresh(lab: Lab) -> NotebookNode | None:
    """The source's notebook with the stored outputs, when only text changed; `None` when code did."""
    stored, built = read_notebook(lab), build(lab)
    if _code(stored) != _code(built) or "llmcourse" not in stored.metadata:
        return None
    outputs = iter([cell for cell in stored.cells if cell.cell_type == "code"])
    for cell in built.cells:
        if cell.cell_type == "code":
            old = next(outputs)
            cell.outputs, cell.execution_count = old.outputs, old.execution_count
    built.metadata = stored.metadata
    return built


def read_notebook(lab: Lab) -> NotebookNode:
    """The stored notebook.

    Raises:
        ValueError: it is damaged.
    """
    import nbformat

    try:
        notebook = nbformat.reads(lab.notebook.read_text(encoding="utf-8"), as_version=4)
        nbformat.validate(notebook)
    except Exception as error:
        raise ValueError(
            f"labs/{lab.notebook.name} is damaged ({type(error).__name__}): execute it again"
        ) from error
    return notebook


def package_hash(notebook: NotebookNode, slug: str) -> str:
    """Hash of the package's code that a lab uses: what its cells import, what that imports, and its checks."""
    from llmcourse.provenance import code_hash

    modules = imported_modules(notebook)
    if any("nbgrader" in cell.metadata for cell in notebook.cells):
        modules.add(f"llmcourse.checks.{slug}")
    # How labs are executed is no part of what they show.
    return code_hash(*sorted(modules), ignore={MACHINERY})


def imported_modules(notebook: NotebookNode) -> set[str]:
    """The modules of this package that a notebook's code cells import."""
    found = set()
    for cell in notebook.cells:
        if cell.cell_type != "code" or "setup" in cell.metadata.get("tags", []):
            continue
        plain = [line for line in cell.source.splitlines() if not line.lstrip().startswith(("%", "!"))]
        for node in ast.walk(ast.parse("\n".join(plain))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "llmcourse"}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "llmcourse":
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                found |= {name if _is_module(name) else node.module for name in names}
    return found


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is a module and not a package
        return False


def _code(notebook: NotebookNode) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]
