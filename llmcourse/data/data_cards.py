"""Data cards: what a data set is, where it comes from and what it must not be used for, in the format of the Hub.

A card is a README.md whose head is YAML that programs read (license, language, size, which file is which split) and
whose body answers the questions a user has before training on it (Gebru et al., 2021, section 3).
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCardData

from llmcourse.durable import discard, publish

Row = Mapping[str, Any]
Splits = Mapping[str, Sequence[Row]]

QUESTIONS: dict[str, str] = {
    "summary": "Summary",
    "source": "Where it comes from",
    "processing": "How it was made",
    "uses": "What it is for",
    "limits": "Limits and what it is not for",
    "personal_data": "Personal data",
}


@dataclass(frozen=True, kw_only=True)
class DataCard:
    """What a person says about a data set; what can be counted is counted by `describe`.

    Raises:
        ValueError: an answer is empty.
    """

    name: str
    """title, as people say it"""
    license: str
    """identifier as on the Hub, for example cc-by-4.0"""
    summary: str
    """what a row is, in a sentence or two"""
    source: str
    """who or what wrote the texts, and when"""
    processing: str
    """how they became this data set: filters, annotators and their noise, splits"""
    uses: str
    """what it was made for"""
    limits: str
    """known gaps and errors, and uses to refrain from"""
    personal_data: str
    """whether real people can be recognized, and what was done about it"""
    language: tuple[str, ...] = ("en",)
    """ISO 639 codes"""
    tasks: tuple[str, ...] = ("text-generation",)
    """task categories of the Hub"""
    tags: tuple[str, ...] = field(default=())
    """free words to find it by"""

    def __post_init__(self) -> None:
        for name in ("name", "license", *QUESTIONS):
            if not getattr(self, name).strip():
                raise ValueError(
                    f"{name} is empty: a card that leaves it open helps nobody, write a sentence"
                )


def size_category(n_rows: int) -> str:
    """The Hub's name for a number of rows: "n<1K", "1K<n<10K" and so on.

    >>> size_category(999), size_category(1000), size_category(2_500_000)
    ('n<1K', '1K<n<10K', '1M<n<10M')
    """
    names = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
    for power, name in enumerate(names, start=3):
        if n_rows < 10**power:
            return f"n<{name}" if power == 3 else f"{names[power - 4]}<n<{name}"
    return "n>1T"


def describe(rows: Sequence[Row]) -> dict[str, float]:
    """Counts of a split, as a card shows them: rows, bytes as JSON lines, and for rows with messages their turns.

    Returns:
        "rows" and "bytes"; where rows have "messages" also "messages_per_row", "assistant_characters" (median over
        assistant turns) and "rows_without_answer".
    """
    counts: dict[str, float] = {"rows": len(rows), "bytes": sum(len(_line(row)) for row in rows)}
    chats = [row["messages"] for row in rows if "messages" in row]
    if chats:
        answers = [[len(m["content"]) for m in chat if m["role"] == "assistant"] for chat in chats]
        every = [length for lengths in answers for length in lengths]
        counts["messages_per_row"] = statistics.fmean(len(chat) for chat in chats)
        counts["assistant_characters"] = statistics.median(every) if every else 0
        counts["rows_without_answer"] = sum(not lengths for lengths in answers)
    return counts


def render_card(card: DataCard, splits: Splits) -> str:
    """The whole README.md of a data set with these splits.

    Raises:
        ValueError: there is no split, or one has no rows.
    """
    _check(splits)
    files = [{"split": name, "path": f"{name}.jsonl"} for name in splits]
    head = DatasetCardData(
        pretty_name=card.name,
        license=card.license,
        language=list(card.language),
        task_categories=list(card.tasks),
        tags=list(card.tags) or None,
        size_categories=[size_category(sum(len(rows) for rows in splits.values()))],
        configs=[{"config_name": "default", "data_files": files}],
    )
    answers = "\n".join(
        f"## {heading}\n\n{getattr(card, name).strip()}\n" for name, heading in QUESTIONS.items()
    )
    example = json.dumps(next(iter(splits.values()))[0], indent=2, ensure_ascii=False)
    contents = (
        f"## Contents\n\n{_table(splits)}\n\nA row of `{next(iter(splits))}`:\n\n```json\n{example}\n```\n"
    )
    return f"---\n{head.to_yaml().strip()}\n---\n\n# {card.name}\n\n{answers}\n{contents}"


def write_dataset(folder: Path | str, card: DataCard, splits: Splits) -> Path:
    """Write README.md and one JSON-lines file a split; `datasets.load_dataset(folder)` opens it.

    The folder appears whole or not at all; one that holds nothing but a README.md and JSON lines is replaced.

    Raises:
        ValueError: there is no split, one has no rows, or the folder holds other files.
    """
    folder = Path(folder)
    readme = render_card(card, splits)
    strangers = [p.name for p in folder.glob("*") if p.name != "README.md" and p.suffix != ".jsonl"]
    if strangers:
        raise ValueError(
            f"{folder} holds {strangers[0]}: give a new folder or one that holds a data set only"
        )
    work = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    work.mkdir(parents=True)
    for name, rows in splits.items():
        (work / f"{name}.jsonl").write_bytes(b"".join(_line(row) for row in rows))
    (work / "README.md").write_text(readme, encoding="utf-8")
    if folder.exists():
        discard(folder)
    publish(work, folder)
    return folder


def _check(splits: Splits) -> None:
    empty = [name for name, rows in splits.items() if not len(rows)]
    if empty or not splits:
        raise ValueError(
            f"{f'split {empty[0]!r} has no rows' if empty else 'no splits'}: a card needs examples"
        )


def _line(row: Row) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def _table(splits: Splits) -> str:
    """The counts of each split as a Markdown table."""
    counts = {name: describe(rows) for name, rows in splits.items()}
    columns = list(dict.fromkeys(column for split in counts.values() for column in split))
    lines = [["split", *(column.replace("_", " ") for column in columns)], ["---"] * (len(columns) + 1)]
    for name, split in counts.items():
        values = [split.get(column, 0) for column in columns]
        lines.append(
            [name, *(f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" for value in values)]
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
