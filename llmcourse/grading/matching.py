"""Which handed-in cell is which cell of the released notebook.

By nbgrader's id, then by the notebook's cell id, then by equal text; and what is left of answers and written replies by
similar text, since some editors drop ids and metadata.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmcourse.grading.manifest import CellRecord, source_digest
from llmcourse.grading.notebook_file import StudentCell
from llmcourse.grading.statements import unsplit
from llmcourse.grading.verdicts import Finding

SIMILAR = 0.5
"""least share of common words by which a cell is taken for an answer that has lost its ids"""
COMPARED_CHARACTERS, COMPARED_CELLS = 5000, 500
GRADED = ("solution", "check", "manual")
NBGRADER_KEYS = ("schema_version", "grade", "grade_id", "locked", "solution", "task", "points")


@dataclass
class Match:
    """The matched cells.

    Attributes:
        cells: for each position of the released notebook, positions of the handed-in cells: none when it is missing,
            several when it was copied or split.
        extras: positions of the handed-in cells that are none of the released ones.
        findings: what was odd.
    """

    cells: list[list[int]]
    extras: list[int]
    findings: list[Finding] = field(default_factory=list)


def match(
    submitted: Sequence[StudentCell],
    records: Sequence[CellRecord],
    released: Sequence[str],
    names: Mapping[str, str],
) -> Match:
    """Match a handed-in notebook's cells with the released ones.

    Args:
        submitted: the handed-in cells.
        records: the released cells.
        released: their sources.
        names: of each solution cell's grade_id, the name that the answer has.
    """
    found: list[list[int]] = [[] for _ in records]
    free = dict.fromkeys(range(len(submitted)))
    _by_grade_id(submitted, records, found, free)
    _by_cell_id(submitted, records, found, free)
    _by_text(submitted, records, found, free)
    by_similarity = _by_similarity(submitted, records, released, names, found, free)
    result = Match(found, list(free))
    result.findings = [
        *_copies(records, found),
        *[
            Finding(
                "MATCHED_BY_SIMILARITY",
                "its ids are lost; it was recognized by its text",
                _label(records[at]),
            )
            for at in by_similarity
        ],
        *_changes(submitted, records, found),
        *_order(records, found),
    ]
    return result


def _by_grade_id(
    submitted: Sequence[StudentCell],
    records: Sequence[CellRecord],
    found: list[list[int]],
    free: dict[int, None],
) -> None:
    """All cells of one grade_id: who splits a cell in JupyterLab gets two."""
    positions = {record.grade_id: at for at, record in enumerate(records) if record.grade_id}
    for number in list(free):
        at = positions.get(submitted[number].grade_id)
        if at is not None:
            found[at].append(number)
            del free[number]


def _by_cell_id(
    submitted: Sequence[StudentCell],
    records: Sequence[CellRecord],
    found: list[list[int]],
    free: dict[int, None],
) -> None:
    positions = {record.cell_id: at for at, record in enumerate(records)}
    for number in list(free):
        at = positions.get(submitted[number].cell_id)
        if at is not None and not found[at]:
            found[at].append(number)
            del free[number]


def _by_text(
    submitted: Sequence[StudentCell],
    records: Sequence[CellRecord],
    found: list[list[int]],
    free: dict[int, None],
) -> None:
    waiting: dict[str, list[int]] = {}
    for at, record in enumerate(records):
        if not found[at]:
            waiting.setdefault(record.sha256, []).append(at)
    for number in list(free):
        places = waiting.get(source_digest(submitted[number].source))
        if places:
            found[places.pop(0)].append(number)
            del free[number]


def _by_similarity(
    submitted: Sequence[StudentCell],
    records: Sequence[CellRecord],
    released: Sequence[str],
    names: Mapping[str, str],
    found: list[list[int]],
    free: dict[int, None],
) -> list[int]:
    """Answers that bind the expected name, and written replies and checks whose words are mostly the released ones."""
    matched = []
    lost = [at for at, record in enumerate(records) if not found[at] and record.role in GRADED]
    candidates = list(free)[:COMPARED_CELLS] if lost else []
    words = {number: _words(submitted[number].source) for number in candidates}
    for at in lost:
        record, left = records[at], [number for number in candidates if number in free]
        if not left:
            break
        name = names.get(record.grade_id or "")
        if name:
            fits = [number for number in left if _binds(submitted[number], name)]
            chosen = fits[-1] if fits else None  # as when all cells are run: the last definition counts
        else:
            wanted = _words(released[at])
            ratios = {number: _similarity(wanted, words[number]) for number in left}
            best = max(ratios, key=ratios.__getitem__)
            chosen = best if ratios[best] >= SIMILAR else None
        if chosen is not None:
            found[at].append(chosen)
            del free[chosen]
            matched.append(at)
    return matched


def _binds(cell: StudentCell, name: str) -> bool:
    """Whether a cell seems to define a name; it is not parsed for it: there may be thousands."""
    return any(name in statement.binds for statement in unsplit(cell.source))


def _words(text: str) -> Counter[str]:
    return Counter(re.findall(r"\w+", text[:COMPARED_CHARACTERS]))


def _similarity(one: Counter[str], other: Counter[str]) -> float:
    """Share of common words: 2 |A and B| / (|A| + |B|), each word as often as it occurs."""
    total = one.total() + other.total()
    return 2 * (one & other).total() / total if total else 0.0


def _copies(records: Sequence[CellRecord], found: list[list[int]]) -> list[Finding]:
    return [
        Finding("DUPLICATE", f"the cell occurs {len(numbers)} times (copied or split)", _label(record))
        for record, numbers in zip(records, found, strict=True)
        if len(numbers) > 1
    ]


def _changes(
    submitted: Sequence[StudentCell], records: Sequence[CellRecord], found: list[list[int]]
) -> list[Finding]:
    findings, stripped = [], 0
    for record, numbers in zip(records, found, strict=True):
        if record.role not in GRADED:
            continue
        if not numbers:
            findings.append(Finding("CELL_MISSING", f"the {record.role} cell is missing", _label(record)))
        for number in numbers:
            cell = submitted[number]
            if cell.type != record.type:
                text = f"it is a {cell.type} cell and was a {record.type} cell"
                findings.append(Finding("TYPE_CHANGED", text, _label(record)))
            if record.role == "check" and source_digest(cell.source) != record.sha256:
                text = "the text of a locked cell was changed; the released one counts"
                findings.append(Finding("LOCKED_EDITED", text, _label(record)))
            if cell.nbgrader is None:
                stripped += 1
            elif problem := _metadata_change(cell.nbgrader, record):
                findings.append(Finding("META_CHANGED", problem, _label(record)))
    if stripped:
        text = f"nbgrader's metadata are gone from {stripped} cells; the released ones count"
        findings.append(Finding("META_CHANGED", text))
    return findings


def _metadata_change(metadata: Any, record: CellRecord) -> str | None:
    """What differs in nbgrader's metadata from what was released; keys that nbgrader adds later do not count."""
    if not isinstance(metadata, dict):
        return "nbgrader's metadata are no longer what they were; the released ones count"
    expected = {
        "schema_version": 3,
        "grade": record.role in ("check", "manual"),
        "grade_id": record.grade_id,
        "locked": record.role == "check",
        "solution": record.role in ("solution", "manual"),
        "task": False,
        "points": record.points if record.role in ("check", "manual") else None,
    }
    changed = [key for key in NBGRADER_KEYS if not _same(metadata.get(key), expected[key])]
    if changed in ([], ["task"]) and not metadata.get("task"):
        return None
    return f"nbgrader's metadata differ in {', '.join(changed)}; the released ones count"


def _same(value: Any, expected: Any) -> bool:
    numbers = isinstance(expected, int | float) and not isinstance(expected, bool)
    right = (int, float) if numbers else type(expected)
    return (
        isinstance(value, right)
        and isinstance(value, bool) == isinstance(expected, bool)
        and value == expected
    )


def _order(records: Sequence[CellRecord], found: list[list[int]]) -> list[Finding]:
    """Graded cells that stand in another order than released; the released order counts."""
    firsts = [
        (numbers[0], record)
        for record, numbers in zip(records, found, strict=True)
        if numbers and record.role in GRADED
    ]
    moved = [after for before, after in zip(firsts, firsts[1:], strict=False) if after[0] < before[0]]
    if not moved:
        return []
    text = f"{len(moved)} cells stand above what they stood below; the released order counts"
    return [Finding("ORDER_CHANGED", text, _label(moved[0][1]))]


def _label(record: CellRecord) -> str:
    return record.grade_id or record.cell_id
