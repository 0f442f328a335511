"""nbgrader's cell metadata, version 3, so that the labs open in nbgrader as they are.

The format is nbgrader's `nbgraderformat/v3.json`; it is small enough to write and check here, without nbgrader.
"""

from __future__ import annotations

import re
from typing import Any

SCHEMA_VERSION = 3
FLAGS = ("grade", "locked", "solution", "task")
OPTIONAL = {"grade_id", "points", "checksum", "cell_type", "task"}


def solution_metadata(grade_id: str) -> dict[str, Any]:
    """Metadata of a cell that the learner writes ("autograded answer")."""
    return _metadata(grade_id, solution=True)


def check_metadata(grade_id: str, points: int) -> dict[str, Any]:
    """Metadata of a cell that grades ("autograder tests"): locked, and worth `points`."""
    return {**_metadata(grade_id, grade=True, locked=True), "points": points}


def _metadata(
    grade_id: str, grade: bool = False, locked: bool = False, solution: bool = False
) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "grade": grade,
        "grade_id": grade_id,
        "locked": locked,
        "solution": solution,
        "task": False,
    }


def metadata_problems(cells: list[Any]) -> list[str]:
    """What nbgrader would refuse in a notebook's cells: keys, types, ids used twice, points without a grade."""
    problems, seen = [], set()
    for number, cell in enumerate(cells, 1):
        metadata = cell.metadata.get("nbgrader")
        if metadata is None:
            continue
        problems += [f"cell {number}: {problem}" for problem in _problems(metadata)]
        if metadata.get("grade_id") in seen:
            problems.append(f"cell {number}: grade_id {metadata['grade_id']!r} is used twice")
        seen.add(metadata.get("grade_id"))
    return problems


def _problems(metadata: dict[str, Any]) -> list[str]:
    required = {"schema_version", "grade", "locked", "solution"}
    problems = [f"{key} is missing" for key in sorted(required - set(metadata))]
    problems += [f"unknown key {key!r}" for key in sorted(set(metadata) - required - OPTIONAL)]
    problems += [
        f"{key}={metadata[key]!r} is no boolean"
        for key in FLAGS
        if not isinstance(metadata.get(key, False), bool)
    ]
    if metadata.get("schema_version") != SCHEMA_VERSION:
        problems.append(f"schema_version={metadata.get('schema_version')!r} is not {SCHEMA_VERSION}")
    if any(metadata.get(key) for key in FLAGS) and not re.fullmatch(
        r"[a-zA-Z0-9_-]+", str(metadata.get("grade_id", ""))
    ):
        problems.append(f"grade_id={metadata.get('grade_id')!r} must be letters, digits, _ and -")
    points = metadata.get("points")
    if bool(metadata.get("grade")) != (points is not None):
        problems.append("points belong to graded cells, and only to them")
    if points is not None and (
        isinstance(points, bool) or not isinstance(points, (int, float)) or points < 0
    ):
        problems.append(f"points={points!r} must be a number of at least 0")
    return problems
