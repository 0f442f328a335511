"""The labs that `grading_speed` grades: three exercises each, borrowed from the chapters, and no experiments."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcourse.grading.limits import Limits
from llmcourse.grading.manifest import AssignmentKey, Key
from llmcourse.grading.release import release

CONFIG = "repository:\n  url: https://example.org/small/labs\n  branch: main\n"
HEAD = """\
# %% [markdown]
# # A small lab

# %% [markdown]
# ## Setup

# %% tags=["parameters"]
SEED = 0

# %%
{imports}

from llmcourse.checks import check

# %% [markdown]
# ## Exercises
"""
EXERCISE = '''

# %% exercise="{id}"
def {name}({arguments}):
    """Write it."""
    raise NotImplementedError


# %% check="{id}"
check("{slug}/{id}", {name})

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def {name}({arguments}):
#     {body}
# ```
#
# </details>
'''
TRAINING = """\
torch.manual_seed(0)
layer = torch.nn.Linear(16, 16)
optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
inputs = torch.randn(64, 16)
for step in range(50):
    loss = (layer(inputs) - inputs.flip(-1)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"{float(loss):.3f}")
"""
# What the Python that has nbgrader runs, in the course's folder.
NBGRADER = """
import json, logging, time
import nbgrader
from nbgrader.api import Gradebook
from nbgrader.converters import Autograde, GenerateAssignment
from nbgrader.coursedir import CourseDirectory

logging.basicConfig(level=logging.ERROR)
common = {"coursedir": CourseDirectory(assignment_id="lab"), "log": logging.getLogger(), "force": True}
GenerateAssignment(create_assignment=True, **common).start()
converter = Autograde(create_student=True, **common)
began = time.perf_counter()
converter.start()
seconds = time.perf_counter() - began
with Gradebook("sqlite:///gradebook.db") as gradebook:
    points = {one.student.id: one.score for one in gradebook.assignment_submissions("lab")}
print(json.dumps({"version": nbgrader.__version__, "seconds": seconds, "points": points}))
"""


@dataclass(frozen=True)
class SmallLab:
    """A lab made for this measurement.

    Attributes:
        slug: of the chapter whose exercises it borrows.
        imports: its own.
        exercises: id -> (name of the answer, arguments, body).
        wrong: a mistake in the first exercise, as a body.
        extra: code that every student adds to the second answer.
    """

    slug: str
    imports: str
    exercises: Mapping[str, tuple[str, str, str]]
    wrong: str
    extra: str = ""

    def released(self, base: Path, limits: Limits) -> AssignmentKey:
        """Write it as a checkout below `base`, release it to `base/out`, and return its key."""
        source = HEAD.format(imports=self.imports) + "".join(
            EXERCISE.format(id=id, slug=self.slug, name=name, arguments=arguments, body=body)
            for id, (name, arguments, body) in self.exercises.items()
        )
        sources = base / "checkout" / "labs" / "src"
        sources.mkdir(parents=True)
        (base / "checkout" / "_config.yml").write_text(CONFIG, encoding="utf-8")
        (sources / f"07_{self.slug}.py").write_text(source, encoding="utf-8")
        release("07", base / "out", limits=limits, repository=base / "checkout")
        return Key.load(base / "out" / "key").assignment(f"07_{self.slug}")

    def hand_in(self, key: AssignmentKey, number: int) -> bytes:
        """Of five students three have it all right, one makes a known mistake, and one leaves an exercise out."""
        notebook = json.loads(key.solved())
        first, second, third = (f"{self.slug}-{id}" for id in self.exercises)
        cell(notebook, second)["source"] += f"\n\n\n# student {number}\n{self.extra}"
        name, arguments, _ = next(iter(self.exercises.values()))
        if number % 5 == 3:
            cell(notebook, first)["source"] = f"def {name}({arguments}):\n    {self.wrong}"
        if number % 5 == 4:
            cell(notebook, third)["source"] = cell(json.loads(key.untouched()), third)["source"]
        return json.dumps(notebook).encode()

    def with_answer(self, key: AssignmentKey, source: str) -> bytes:
        """The solved notebook with other code in place of the second answer."""
        notebook = json.loads(key.solved())
        cell(notebook, f"{self.slug}-{list(self.exercises)[1]}")["source"] = source
        return json.dumps(notebook).encode()


def cell(notebook: dict[str, Any], grade_id: str) -> dict[str, Any]:
    """The cell of a grade_id."""
    return next(
        one for one in notebook["cells"] if one["metadata"].get("nbgrader", {}).get("grade_id") == grade_id
    )


WITHOUT_TORCH = SmallLab(
    slug="hardware",
    imports="import math",
    exercises={
        "intensity": (
            "my_intensity",
            "m, k, n, bytes_per_value",
            "return 2 * math.prod((m, k, n)) / (bytes_per_value * (m * k + k * n + m * n))",
        ),
        "roofline": (
            "my_roofline",
            "flops, n_bytes, peak_flops, bandwidth",
            "return max(flops / peak_flops, n_bytes / bandwidth)",
        ),
        "cache_rows": (
            "my_rows",
            "memory, weight_bytes, n_layers, n_heads, n_kv_heads, d_head, n_tokens",
            "return max(0, memory - weight_bytes) // (4 * n_layers * n_kv_heads * d_head * n_tokens)",
        ),
    },
    wrong="return math.prod((m, k, n)) / (bytes_per_value * (m * k + k * n + m * n))",
)
WITH_TORCH = SmallLab(
    slug="attention",
    imports="import torch\nfrom torch.nn import functional as F",
    exercises={
        "lookup": (
            "my_lookup",
            "q, k, v",
            "return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1) @ v",
        ),
        "mask": (
            "my_mask",
            "n_queries, n_keys",
            "return torch.ones(n_queries, n_keys, dtype=torch.bool).tril(n_keys - n_queries)",
        ),
        "swiglu": (
            "my_swiglu",
            "x, w_gate, w_up, w_down",
            "return (F.silu(x @ w_gate.T) * (x @ w_up.T)) @ w_down.T",
        ),
    },
    wrong="return torch.softmax(q @ k.mT, dim=-1) @ v",
    extra=TRAINING,
)
