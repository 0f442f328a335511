"""A small lab of three exercises, released: its key, and its notebook to hand in honestly, carelessly or otherwise."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llmcourse.grading.handout import make_questions
from llmcourse.grading.limits import Limits
from llmcourse.grading.manifest import AssignmentKey
from llmcourse.grading.release import prepare
from llmcourse.labs.repository import Lab, find_lab

CONFIG = "repository:\n  url: https://github.com/someone/course\n  branch: trunk\n"
# The lab borrows three exercises of a real chapter: the jail sees only the installed package.
SOURCE = '''\
# %% [markdown]
# # 07 A small lab

# %% [markdown]
# ## Setup

# %% tags=["parameters"]
PRESET = "cpu"
SEED = 0

# %%
import math
import time

from llmcourse.checks import check

WIDTH = 2
results = {"preset": PRESET}

# %% [markdown]
# ## 1. Products
#
# **Exercise 1.** How many operations for each byte?
#
# <details><summary>Hint</summary>
#
# Count the entries of three matrices.
#
# </details>


# %% exercise="intensity"
def my_intensity(m, k, n, bytes_per_value):
    """FLOPs per byte of an (m, k) x (k, n) product."""
    raise NotImplementedError


# %% check="intensity"
check("hardware/intensity", my_intensity)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_intensity(m, k, n, bytes_per_value):
#     return 2 * math.prod((m, k, n)) / (bytes_per_value * (m * k + k * n + m * n))
# ```
#
# </details>
#
# **Exercise 2.** The least time.


# %% exercise="roofline"
def my_roofline(flops, n_bytes, peak_flops, bandwidth):
    """Least seconds of a kernel."""
    raise NotImplementedError


# %% check="roofline"
check("hardware/roofline", my_roofline)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_roofline(flops, n_bytes, peak_flops, bandwidth):
#     return max(flops / peak_flops, n_bytes / bandwidth)
# ```
#
# </details>


# %%
def train(steps):
    """Minutes of training, which grading must not run."""
    time.sleep(100 * steps)
    return steps


model = train(6)
print(model, my_roofline(1, 2, 3, 4))

# %%
def bytes_of(numbers):
    """Bytes of that many 16-bit numbers."""
    return WIDTH * numbers


# %% [markdown]
# **Exercise 3.** How many rows fit?


# %% exercise="cache_rows"
def my_rows(memory, weight_bytes, n_layers, n_heads, n_kv_heads, d_head, n_tokens):
    """Rows of n_tokens tokens that fit."""
    raise NotImplementedError


# %% check="cache_rows"
check("hardware/cache_rows", my_rows)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_rows(memory, weight_bytes, n_layers, n_heads, n_kv_heads, d_head, n_tokens):
#     row = bytes_of(2 * n_layers * n_kv_heads * d_head * n_tokens)
#     return max(0, memory - weight_bytes) // row
# ```
#
# </details>

# %% [markdown]
# ## Takeaways
#
# Bytes are slower than operations.
'''
QUESTIONS = {
    "07": [
        {"id": "why", "after": "Takeaways", "text": "Why are bytes slower?\n\nTwo sentences.", "points": 2.5}
    ]
}
SLUG = "hardware"
NAMES = {
    f"{SLUG}/intensity": "my_intensity",
    f"{SLUG}/roofline": "my_roofline",
    f"{SLUG}/cache_rows": "my_rows",
}
SECRET = bytes(range(32))
VARIANTS = 3
Notebook = dict[str, Any]


@dataclass(frozen=True)
class TinyRelease:
    """A released small lab.

    Attributes:
        repository: the checkout with its source.
        lab: the lab in it.
        key: of its release.
    """

    repository: Path
    lab: Lab
    key: AssignmentKey

    def untouched(self) -> Notebook:
        """The released notebook; a new copy at each call."""
        return json.loads(self.key.untouched())

    def solved(self) -> Notebook:
        """The released notebook with the model solutions; a new copy at each call."""
        return json.loads(self.key.solved())

    def solved_bytes(self) -> bytes:
        """The file of the notebook with the model solutions."""
        return self.key.solved()

    def cell(self, notebook: Notebook, exercise: str, check: bool = False) -> dict[str, Any]:
        """The solution cell of an exercise ("intensity"), or its check cell."""
        return notebook["cells"][self.position(notebook, exercise, check)]

    def position(self, notebook: Notebook, exercise: str, check: bool = False) -> int:
        """Where that cell stands."""
        grade_id = f"{SLUG}-{exercise}" + ("-check" if check else "")
        ids = [cell["metadata"].get("nbgrader", {}).get("grade_id") for cell in notebook["cells"]]
        return ids.index(grade_id)


def make_repository(folder: Path, source: str = SOURCE, name: str = "07_hardware") -> Path:
    """A checkout with one lab."""
    (folder / "labs" / "src").mkdir(parents=True)
    (folder / "_config.yml").write_text(CONFIG, encoding="utf-8")
    (folder / "labs" / "src" / f"{name}.py").write_text(source, encoding="utf-8")
    return folder


def prepare_lab(lab: Lab, **options: Any) -> AssignmentKey:
    """The key of a lab's release, with few variants and always the same."""
    questions = make_questions(QUESTIONS, "questions")["07"]
    defaults = {"points": {}, "questions": questions, "limits": Limits(wall_seconds=20), "solutions": False}
    return prepare(lab, SECRET, **{**defaults, "variants": VARIANTS, "seed": 1, "trust": False, **options})


@pytest.fixture(scope="session")
def tiny_release(tmp_path_factory: pytest.TempPathFactory) -> TinyRelease:
    """The small lab, released."""
    repository = make_repository(tmp_path_factory.mktemp("tiny"))
    lab = find_lab("07", repository)
    return TinyRelease(repository, lab, prepare_lab(lab))


@pytest.fixture
def code_cell() -> Callable[..., dict[str, Any]]:
    """A code cell as a student adds it."""

    def make(source: str, **fields: Any) -> dict[str, Any]:
        cell = {"cell_type": "code", "id": "0123abcd", "metadata": {}, "source": source}
        return copy.deepcopy({**cell, "outputs": [], "execution_count": None, **fields})

    return make
