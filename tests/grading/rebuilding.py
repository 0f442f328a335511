"""Rebuilt notebooks, and the points that their answers would earn."""

from __future__ import annotations

import json

from llmcourse.checks import judge
from llmcourse.checks.exercise import find_exercise
from llmcourse.grading.skeleton import Rebuilt, rebuild
from tests.grading.conftest import Notebook, TinyRelease

GOOD = """\
def my_intensity(m, k, n, bytes_per_value):
    return 2 * m * k * n / (bytes_per_value * (m * k + k * n + m * n))"""
BAD = "def my_intensity(m, k, n, bytes_per_value):\n    return 1.0"
ALL = {"hardware/intensity": 1, "hardware/roofline": 1, "hardware/cache_rows": 2}


def hand_in(release: TinyRelease, notebook: Notebook | bytes) -> Rebuilt:
    """A notebook (or a file) on the released one."""
    data = notebook if isinstance(notebook, bytes) else json.dumps(notebook).encode()
    return rebuild(data, release.key)


def points(release: TinyRelease, rebuilt: Rebuilt) -> dict[str, int]:
    """What the exercises earn when the rebuilt cells run in order and each answer is asked for where it should be."""
    namespace, earned = {"__name__": "student"}, {}
    for cell in rebuilt.cells:
        try:
            exec(compile(cell.source, cell.id, "exec"), namespace)
        except Exception as error:
            namespace["__error__"] = error
        for exercise, name in release.key.answers.items():
            if rebuilt.after[exercise] == cell.id and name in namespace:
                earned[exercise] = judge(find_exercise(exercise), namespace[name]).points
    return {exercise: earned.get(exercise, 0) for exercise in release.key.answers}


def kinds(rebuilt: Rebuilt) -> list[str]:
    """What kinds of things were noticed."""
    return sorted({finding.kind for finding in rebuilt.findings})
