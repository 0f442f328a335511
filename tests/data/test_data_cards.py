"""Data cards: read back by the Hub's own library, opened by `datasets`, counted, refused when empty."""

from __future__ import annotations

import dataclasses
import doctest
from pathlib import Path

import pytest
from huggingface_hub import DatasetCard

from llmcourse.data import data_cards
from llmcourse.data.data_cards import QUESTIONS, DataCard, describe, render_card, write_dataset

CARD = DataCard(
    name="Questions about a town",
    license="cc-by-4.0",
    summary="Questions and answers: conversations of one exchange.",
    source="Written by a program.",
    processing="Held-out residents are apart.",
    uses="To learn fine-tuning.",
    limits="The town does not exist.",
    personal_data="None: all names are drawn at random.",
    tags=("course",),
)
ROW = {"messages": [{"role": "user", "content": "hä?"}, {"role": "assistant", "content": "yes"}]}
SPLITS = {"train": [ROW] * 1200, "test": [ROW, {"messages": ROW["messages"][:1]}]}


def test_docstring_examples_hold():
    assert doctest.testmod(data_cards).failed == 0


def test_the_hub_library_reads_the_card():
    card = DatasetCard(render_card(CARD, SPLITS))
    data = card.data.to_dict()
    assert data["license"] == "cc-by-4.0" and data["size_categories"] == ["1K<n<10K"]
    assert data["language"] == ["en"] and data["tags"] == ["course"] and data["pretty_name"] == CARD.name
    files = data["configs"][0]["data_files"]
    assert files == [{"split": name, "path": f"{name}.jsonl"} for name in ("train", "test")]
    for name, heading in QUESTIONS.items():
        assert f"## {heading}\n\n{getattr(CARD, name)}\n" in card.text
    assert "| test | 2 |" in card.text and '"content": "hä?"' in card.text


def test_counts_by_hand():
    counts = describe(SPLITS["test"])
    assert counts["rows"] == 2 and counts["messages_per_row"] == 1.5
    assert counts["assistant_characters"] == 3 and counts["rows_without_answer"] == 1
    assert describe([{"text": "ab"}]) == {"rows": 1, "bytes": len('{"text": "ab"}\n')}


def test_the_folder_is_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import datasets

    folder = write_dataset(tmp_path / "town", CARD, SPLITS)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "test.jsonl", "train.jsonl"]
    loaded = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert {name: len(split) for name, split in loaded.items()} == {"train": 1200, "test": 2}
    assert loaded["train"][0] == ROW
    write_dataset(folder, CARD, {"train": [ROW]})  # replaced as a whole
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "train.jsonl"]
    (folder / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"holds thesis.tex: give a new folder"):
        write_dataset(folder, CARD, SPLITS)


@pytest.mark.parametrize("name", ["name", "license", *QUESTIONS])
def test_an_open_question_is_refused(name: str):
    with pytest.raises(ValueError, match=f"{name} is empty"):
        dataclasses.replace(CARD, **{name: " "})


def test_a_card_needs_rows():
    with pytest.raises(ValueError, match="no splits"):
        render_card(CARD, {})
    with pytest.raises(ValueError, match="split 'test' has no rows"):
        render_card(CARD, {"train": [ROW], "test": []})
