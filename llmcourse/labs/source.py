"""From a lab's py:percent source to a notebook that is ready to run: ids, metadata, set-up cell, links."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from llmcourse.checks.exercise import exercises
from llmcourse.labs.nbgrader import check_metadata, solution_metadata
from llmcourse.labs.repository import Lab, repository_address

if TYPE_CHECKING:
    from nbformat import NotebookNode

# Inserted below the heading "Setup" of every lab; {address} is filled in when the notebook is built.
SETUP = '''\
# Installs the course's package where it is missing (Colab); does nothing where it is installed.
import importlib.util

if importlib.util.find_spec("llmcourse") is None:
    %pip install -q "llmcourse @ git+{address}"'''

KERNEL = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {
        "codemirror_mode": {"name": "ipython", "version": 3},
        "file_extension": ".py",
        "mimetype": "text/x-python",
        "name": "python",
        "nbconvert_exporter": "python",
        "pygments_lexer": "ipython3",
    },
}


def build(lab: Lab) -> NotebookNode:
    """The notebook of a lab's source, not executed; equal sources give equal notebooks, cell ids included.

    Cell headers in the source: `# %% tags=["parameters"]` once; `# %% exercise="id"` for the cell that the learner
    writes and `# %% check="id"` for the one that checks it. In the text, `{{repository}}`, `{{branch}}` and `{{colab}}`
    become the published repository's URL, its branch, and the link that opens this lab in Colab.

    Raises:
        ValueError: the source has no heading "Setup" or not one parameters cell, names an unknown exercise, or holds an
            unknown placeholder.
    """
    import jupytext
    from nbformat.v4 import new_code_cell, new_notebook

    cells = jupytext.read(lab.source, fmt="py:percent").cells
    _fill_placeholders(cells, lab)
    heading = next((i for i, cell in enumerate(cells) if re.search(r"^## Setup\b", cell.source, re.M)), None)
    if heading is None:
        raise ValueError(f"labs/src/{lab.source.name}: it has no heading '## Setup'")
    address = "@".join(repository_address(lab.repository))
    cells.insert(
        heading + 1, new_code_cell(SETUP.replace("{address}", address), metadata={"tags": ["setup"]})
    )
    tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1 or tagged[0].cell_type != "code":
        raise ValueError(f'labs/src/{lab.source.name}: it needs one code cell `# %% tags=["parameters"]`')
    _mark_exercises(cells, lab)
    _identify(cells)
    return new_notebook(cells=cells, metadata=json.loads(json.dumps(KERNEL)))


def source_hash(notebook: NotebookNode) -> str:
    """SHA-256 over what was written: ids, kinds, texts and metadata of the cells, without outputs."""
    content = [[cell.id, cell.cell_type, cell.source, written_metadata(cell)] for cell in notebook.cells]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def written_metadata(cell: NotebookNode) -> dict[str, Any]:
    """The cell's metadata that come from its source."""
    return {key: cell.metadata[key] for key in ("nbgrader", "tags") if key in cell.metadata}


def parameters_of(notebook: NotebookNode) -> dict[str, Any]:
    """Names and values of the parameters cell (constants only)."""
    import ast

    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    values = {}
    for statement in ast.parse(cell.source).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant):
            values.update(
                {
                    target.id: statement.value.value
                    for target in statement.targets
                    if isinstance(target, ast.Name)
                }
            )
    return values


def _fill_placeholders(cells: list[Any], lab: Lab) -> None:
    url, branch = repository_address(lab.repository)
    path = "/".join(url.split("/")[3:])
    colab = f"https://colab.research.google.com/github/{path}/blob/{branch}/labs/{lab.name}.ipynb"
    values = {"repository": url, "branch": branch, "colab": colab}
    for cell in cells:
        # LaTeX doubles braces too, around a letter or two: a placeholder is a whole word.
        for name in re.findall(r"\{\{(\w{4,})\}\}", cell.source) if cell.cell_type == "markdown" else []:
            if name not in values:
                raise ValueError(
                    f"labs/src/{lab.source.name}: unknown placeholder {{{{{name}}}}}; use {sorted(values)}"
                )
            cell.source = cell.source.replace(f"{{{{{name}}}}}", values[name])


def _mark_exercises(cells: list[Any], lab: Lab) -> None:
    marked = [cell for cell in cells if {"exercise", "check"} & set(cell.metadata)]
    records = {record.id: record for record in exercises(lab.slug)} if marked else {}
    for cell in marked:
        kind = "exercise" if "exercise" in cell.metadata else "check"
        identifier = cell.metadata.pop(kind)
        if identifier not in records or cell.cell_type != "code":
            known = ", ".join(records)
            raise ValueError(
                f"labs/src/{lab.source.name}: {kind}={identifier!r} must be a code cell and one of {known}"
            )
        grade_id = f"{lab.slug}-{identifier}"
        if kind == "exercise":
            cell.metadata["nbgrader"] = solution_metadata(grade_id)
        else:
            cell.metadata["nbgrader"] = check_metadata(f"{grade_id}-check", records[identifier].points)


def _identify(cells: list[Any]) -> None:
    """Ids that survive edits elsewhere: an exercise cell's from its name, any other cell's from its text."""
    counts: Counter[str] = Counter()
    for cell in cells:
        if "nbgrader" in cell.metadata:
            base = cell.metadata["nbgrader"]["grade_id"][:60]
        else:
            base = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:12]
        counts[base] += 1
        cell["id"] = base if counts[base] == 1 else f"{base}-{counts[base]}"
        for key in set(cell.metadata) - {"nbgrader", "tags"}:
            del cell.metadata[key]
