"""The datatrove pipeline runs from pages to clean texts, and agrees with the funnel where both do the same."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from llmcourse.data import datatrove_pipeline
from llmcourse.data.datatrove_pipeline import DatatroveSettings, require_datatrove, run_locally, stages
from llmcourse.data.filtering import FilterSettings, tinytown
from llmcourse.data.minhash import MinHashSettings
from llmcourse.data.preparation import PreparationSettings, prepare
from llmcourse.data.shards import write_shards
from llmcourse.data.tinytown import Town
from llmcourse.data.web_dump import WebPage, web_dump

pytest.importorskip("datatrove")
NEAR = MinHashSettings(bands=4, rows=2)  # each band is a task


@pytest.fixture(scope="module")
def dump() -> list[WebPage]:
    return list(web_dump(Town(seed=0), 200, seed=4))


def texts_of(folder: Path) -> list[str]:
    return [
        text for path in sorted(folder.glob("*.parquet")) for text in pq.read_table(path)["text"].to_pylist()
    ]


def test_pages_become_clean_texts_and_counts_add_up(tmp_path: Path, dump: list[WebPage]) -> None:
    rows = ({"html": page.html, "url": page.url} for page in dump)
    write_shards(rows, tmp_path / "pages", n_shards=2, columns=("html", "url"))
    settings = DatatroveSettings(rules=tinytown(), near=NEAR)
    counts = run_locally(tmp_path / "pages", tmp_path / "out", settings)
    assert list(counts) == ["documents", "signatures", "buckets", "clusters", "filter"]
    filtered = [block for block in counts["documents"] if "total" in block]
    for block in filtered:
        assert block["total"] == block.get("forwarded", block["total"]) + block.get("dropped", 0), block
    documents, clean = texts_of(tmp_path / "out" / "documents"), texts_of(tmp_path / "out" / "clean")
    last = next(block for block in counts["filter"] if "dropped" in block)
    assert len(documents) == last["total"] and len(clean) == last["forwarded"] and last["dropped"] > 10
    steps = ("decode", "extract", "repair", "language", "rules")
    ours = prepare(dump, PreparationSettings(steps=steps))
    assert abs(len(ours.texts) - len(documents)) <= 0.03 * len(dump)
    words = Counter(" ".join(ours.texts).split())
    theirs = Counter(" ".join(documents).split())
    assert (words & theirs).total() > 0.97 * max(words.total(), theirs.total())
    assert (
        run_locally(tmp_path / "pages", tmp_path / "out", settings).keys() == counts.keys()
    )  # complete: skipped
    assert texts_of(tmp_path / "out" / "clean") == clean


def test_published_filters_judge_plain_texts(tmp_path: Path, dump: list[WebPage]) -> None:
    texts = [page.labels["text"] for page in dump]
    write_shards(texts, tmp_path / "texts", n_shards=2)
    settings = DatatroveSettings(text_key="text", extract=False, near=NEAR)
    counts = run_locally(tmp_path / "texts", tmp_path / "out", settings)
    names = [block["name"] for block in counts["documents"]]
    assert [name.split()[-1] for name in names if "Gopher" in name] == ["Repetition", "Quality"]
    clean = texts_of(tmp_path / "out" / "clean")
    assert 0 < len(clean) < len(texts)
    assert all(len(text.split()) >= 30 for text in clean)  # Gopher: 50 words, before C4 takes lines away


@pytest.mark.parametrize("rules", [None, tinytown()])
def test_stages_can_be_pickled_as_executors_do(tmp_path: Path, rules: FilterSettings | None) -> None:
    for stage in stages(tmp_path, tmp_path / "out", DatatroveSettings(tasks=3, near=NEAR, rules=rules)):
        again = pickle.loads(pickle.dumps(stage))
        assert [type(block).__name__ for block in again.blocks] == [
            type(block).__name__ for block in stage.blocks
        ]
        assert stage.tasks == {"buckets": 4, "clusters": 1}.get(stage.name, 3)


def test_words_are_split_at_white_space_and_sentences_at_their_ends() -> None:
    tokenizer = datatrove_pipeline._tokenizer()
    text = 'He said: "Go." She went! Did she?\nYes'
    assert tokenizer.word_tokenize(text)[:2] == ["He", "said:"]
    assert tokenizer.sent_tokenize(text) == ['He said: "Go."', "She went!", "Did she?", "Yes"]


def test_wrong_use_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="holds no Parquet file"):
        run_locally(tmp_path, tmp_path / "out")
    for name in ("tasks", "workers"):
        with pytest.raises(ValueError, match=f"{name}=0: must be at least 1"):
            DatatroveSettings(**{name: 0})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install datatrove"):
        require_datatrove()
