"""The funnel: nothing lost, each step against its own function, in memory as on disk, alone as in processes."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest

from llmcourse.data import corpus_steps
from llmcourse.data.corpus_steps import Row, TextStore, lines_to_drop
from llmcourse.data.decontamination import ContaminationSettings, Decontaminator
from llmcourse.data.deduplication import LineSettings, SeenTexts, deduplicate_lines
from llmcourse.data.document_steps import CHUNK
from llmcourse.data.minhash import MinHashSettings, near_duplicates
from llmcourse.data.preparation import (
    CORPUS_STEPS,
    STEPS,
    PreparationSettings,
    RawPage,
    map_documents,
    prepare,
    prepare_batch,
    prepare_shards,
)
from llmcourse.data.shards import open_shards
from llmcourse.data.tinytown import Town
from llmcourse.data.web_dump import WebPage, web_dump

TOWN = Town(seed=0)
LINES = LineSettings(min_documents=3, min_characters=10)


def good_texts() -> list[str]:
    """Repaired English texts of a dump, duplicates and repeated lines included."""
    pages = [page.labels for page in web_dump(TOWN, 500, seed=5)]
    return [page["text"] for page in pages if page["kind"] not in ("foreign", "spam")]


TEXTS = good_texts()


def only(*steps: str, **settings: object) -> PreparationSettings:
    return PreparationSettings(steps=steps, **settings)


@pytest.fixture(scope="module")
def dump() -> list[WebPage]:
    return list(web_dump(TOWN, 120, seed=2))


# ---- the whole


def test_the_funnel_loses_nothing_and_finds_what_the_labels_say(dump: list[WebPage]) -> None:
    prepared = prepare(dump)
    assert [report.name for report in prepared.reports] == [
        s for s in STEPS if s not in ("quality", "contamination")
    ]
    documents = len(dump)
    for report in prepared.reports:
        assert report.documents_in == documents == report.documents_out + report.dropped.total()
        documents = report.documents_out
        assert report.words_in >= report.words_out and report.bytes_in > 0 and report.seconds > 0
    assert documents == len(prepared.texts) == len(prepared.numbers)
    assert prepared.reports[-1].words_out == sum(len(text.split()) for text in prepared.texts)
    assert prepared.reports[-1].bytes_out == sum(len(text.encode()) for text in prepared.texts)
    assert (np.diff(prepared.numbers) > 0).all()
    expected = {
        "extract": 0.97,
        "repair": 0.99,
        "language": 0.85,
        "rules": 0.9,
        "privacy": 0.95,
        "exact": 0.9,
    }
    for name, least in expected.items():
        found = prepared.report(name).detection
        assert found is not None and found.f1 >= least, (name, str(found))
    assert prepared.report("near").detection is not None and prepared.report("lines").detection is None
    kinds = Counter(dump[number].labels["kind"] for number in prepared.numbers)
    assert kinds["spam"] == kinds["foreign"] == 0
    for number, text in zip(prepared.numbers, prepared.texts, strict=True):
        assert all(value not in text for _, value in dump[number].labels["personal_data"])
    with pytest.raises(ValueError, match="step 'quality' did not run"):
        prepared.report("quality")
    rows = prepared.table()
    assert (
        rows[0]["name"] == "decode"
        and rows[0]["f1"] is None
        and rows[1]["f1"] == prepared.reports[1].detection.f1
    )


def test_counts_by_hand() -> None:
    texts = ["one two", "One  two", "three ä", "\ud800", "one two three"]
    prepared = prepare(texts, only("exact"))
    skipped, exact = prepared.reports
    assert (skipped.name, skipped.documents_in, skipped.documents_out) == ("input", 5, 4)
    assert skipped.dropped == {"not UTF-8": 1}
    assert (exact.documents_in, exact.documents_out, exact.dropped) == (4, 3, {"exact duplicate": 1})
    assert (exact.words_in, exact.words_out, exact.bytes_in, exact.bytes_out) == (9, 7, 36, 28)
    assert exact.changed == 0 and exact.detection is None
    assert prepared.texts == ["one two", "three ä", "one two three"] and prepared.numbers.tolist() == [
        0,
        2,
        4,
    ]


def test_shards_hold_what_memory_holds(tmp_path: Path) -> None:
    settings = PreparationSettings(lines=LINES)
    inside = prepare(TEXTS, settings)
    index, outside = prepare_shards(TEXTS, tmp_path / "clean", settings, n_shards=3)
    rows = datasets.load_dataset(str(tmp_path / "clean"), split="train", cache_dir=str(tmp_path / "cache"))[
        "text"
    ]
    assert Counter(rows) == Counter(inside.texts) and index == open_shards(tmp_path / "clean")
    assert [vars(r) | {"seconds": 0} for r in outside.reports] == [
        vars(r) | {"seconds": 0} for r in inside.reports
    ]
    assert outside.texts == [] and outside.numbers.tolist() == inside.numbers.tolist()
    assert {path.name for path in tmp_path.iterdir()} == {"clean", "cache"}  # nothing left behind
    with pytest.raises(ValueError, match="exists: delete it"):
        prepare_shards(TEXTS, tmp_path / "clean")


def test_an_empty_corpus_and_one_that_vanishes_pass(tmp_path: Path) -> None:
    for texts in ([], ["", "   "]):
        prepared = prepare(texts, PreparationSettings(items=("a b c d e",)))
        assert prepared.texts == [] and sum(report.dropped.total() for report in prepared.reports) == len(
            texts
        )


# ---- what comes in


def test_every_kind_of_input_is_understood() -> None:
    html = "<html><body><article><p>The café is open on Monday and serves three soups.</p></article></body></html>"
    fetched = SimpleNamespace(
        body=html.encode("latin-1"), url="http://a.example/", content_type="text/html; charset=iso-8859-1"
    )
    row = {"html": html, "url": "http://a.example/", "content_type": None}
    items = [
        fetched, row, {"html": html.encode()}, RawPage(html), RawPage(html.encode()),
        WebPage("http://a.example/", html, {"text": "", "encoding": "utf-8", "duplicate_of": None}),
    ]  # fmt: skip
    prepared = prepare(items, only("decode", "extract"))
    assert prepared.texts == ["The café is open on Monday and serves three soups."] * len(items)
    assert prepare(["<p>plain", {"text": "<p>plain"}], only("decode", "extract")).texts == ["<p>plain"] * 2
    for bad in (3, {"body": "x"}, None):
        with pytest.raises(ValueError, match="give texts, rows with 'text' or 'html'"):
            prepare([bad])


def test_bad_pages_are_dropped_with_their_reason() -> None:
    pages = [
        RawPage(b""), RawPage(b"\0\1\2" * 50), RawPage("<html><body></body></html>"), RawPage(b"<p>x</p>" * 300_000),
        RawPage("<html>\ud800"),
    ]  # fmt: skip
    prepared = prepare(pages)
    reasons = {report.name: dict(report.dropped) for report in prepared.reports if report.dropped}
    assert reasons == {
        "input": {"not UTF-8": 1},
        "decode": {"too large": 1},
        "extract": {"empty": 1, "binary": 1, "no text": 1},
    }


# ---- settings


def test_steps_run_in_their_order_and_only_if_asked_for() -> None:
    settings = only("near", "repair")
    assert settings.active == ("repair", "near")
    assert [report.name for report in prepare(TEXTS[:20], settings).reports] == ["repair", "near"]
    assert "contamination" in PreparationSettings(items=("a b c d",)).active
    for bad, message in [
        ({"steps": ("dedup",)}, "step 'dedup': use some of decode"),
        ({"steps": ("quality",)}, "step 'quality' needs a classifier"),
        ({"steps": ("contamination",)}, "step 'contamination' needs evaluation items"),
    ]:
        with pytest.raises(ValueError, match=message):
            PreparationSettings(**bad)


@pytest.mark.parametrize(
    "change",
    [
        {"language": "de"}, {"language_threshold": 1.0}, {"keep_without_language": False}, {"kinds": ("ipv4",)},
        {"lines": LineSettings(min_documents=2)}, {"near": MinHashSettings(bands=40, rows=3)},
        {"items": tuple(TEXTS[:1])},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_every_option_changes_the_result(change: dict[str, object]) -> None:
    texts = [
        *TEXTS[:150],
        "12 + 7 = 19",
        "Der Markt am Montag war geöffnet, und viele Leute kauften dort Äpfel.",
    ]
    plain = prepare(texts, PreparationSettings())
    assert prepare(texts, PreparationSettings(**change)).texts != plain.texts


def test_a_classifier_drops_what_it_finds_bad() -> None:
    class Judge:  # what the step asks of a QualityClassifier
        def keep(self, texts: list[str]) -> list[bool]:
            return ["bad" not in text for text in texts]

    prepared = prepare(["good one", "bad one"], only("quality", quality=Judge()))
    assert prepared.texts == ["good one"] and prepared.reports[0].dropped == {"low quality": 1}


# ---- steps over the corpus, each against its function for corpora in memory


def test_exact_duplicates_are_those_of_the_set_in_memory() -> None:
    seen = SeenTexts()
    expected = [text for text in TEXTS if seen.is_new(text)]
    assert prepare(TEXTS, only("exact")).texts == expected and len(expected) < len(TEXTS)


@pytest.mark.parametrize("bucket", [1 << 20, 50])
@pytest.mark.parametrize("unit", ["line", "paragraph"])
def test_repeated_lines_are_those_of_the_deduplicator_in_memory(
    monkeypatch: pytest.MonkeyPatch, bucket: int, unit: str
) -> None:
    monkeypatch.setattr(corpus_steps, "BUCKET_LINES", bucket)
    settings = LineSettings(min_documents=3, min_characters=10, unit=unit)
    texts = [*TEXTS, "twice here\ntwice here\n\n\nand more", *["only this line"] * 4]
    expected, counted = deduplicate_lines(texts, settings)
    prepared = prepare(texts, only("lines", lines=settings))
    assert prepared.texts == [text for text in expected if text.strip()] and counted.n_dropped > 10
    assert prepared.reports[0].dropped == {"only repeated lines": sum(not text.strip() for text in expected)}
    assert prepared.reports[0].changed == sum(
        a != b and b.strip() != "" for a, b in zip(texts, expected, strict=True)
    )


def test_lines_to_drop_by_hand(tmp_path: Path) -> None:
    # documents [5 5 7] [5] [] [7 5]: key 5 is in three documents, key 7 in two
    np.array([5, 5, 7, 5, 7, 5], np.uint64).tofile(tmp_path / "keys")
    ends = np.array([3, 4, 4, 6])
    assert lines_to_drop(tmp_path / "keys", ends, 3).tolist() == [False, True, False, True, False, True]
    assert lines_to_drop(tmp_path / "keys", ends, 2).tolist() == [False, True, False, True, True, True]
    assert lines_to_drop(tmp_path / "keys", ends, 4).tolist() == [False] * 6
    (tmp_path / "none").touch()
    assert lines_to_drop(tmp_path / "none", np.array([0, 0]), 1).tolist() == []


@pytest.mark.parametrize(
    "near", [MinHashSettings(), MinHashSettings(verify="exact", threshold=0.6, keep="longest")]
)
def test_near_duplicates_are_those_of_texts_in_memory(near: MinHashSettings) -> None:
    texts = TEXTS * 4  # more than one row group on disk
    assert len(texts) > corpus_steps.ROWS
    keep = near_duplicates(texts, near).keep
    prepared = prepare(texts, only("near", near=near))
    assert prepared.numbers.tolist() == np.flatnonzero(keep).tolist() and len(prepared.texts) < len(TEXTS)


def test_contaminated_documents_are_those_that_the_detector_finds() -> None:
    items = tuple(probe.prompt + probe.answer for probe in TOWN.fact_probes(300, seed=1))
    settings = ContaminationSettings(min_words=3)
    found = {one.document for one in Decontaminator(items, settings).find(TEXTS)}
    prepared = prepare(TEXTS, only("contamination", items=items, contamination=settings))
    assert 0 < len(found) and set(range(len(TEXTS))) - set(prepared.numbers.tolist()) == found


def test_planted_items_are_scored_by_their_label() -> None:
    item = "The evaluation asks for the color of the third door on the left."
    pages = list(web_dump(TOWN, 20, seed=3))
    planted = [
        WebPage(page.url, f"<article><p>{page.labels['text']}</p><p>{item if i % 4 == 0 else ''}</p></article>",
                page.labels | {"contaminated": i % 4 == 0})
        for i, page in enumerate(pages)
    ]  # fmt: skip
    report = prepare(planted, only("extract", "contamination", items=(item,))).report("contamination")
    assert (report.detection.true_positives, report.detection.false_positives) == (5, 0)
    assert report.detection.recall == 1.0


def test_a_store_gives_its_texts_in_order_and_by_number(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(2 * corpus_steps.ROWS + 5)]
    store = TextStore.write(tmp_path / "store", (Row(3 * i, text) for i, text in enumerate(texts)))
    assert list(store) == texts and len(store) == len(texts)
    assert [row.number for row in store.rows()] == [3 * i for i in range(len(texts))]
    order = list(range(len(texts)))
    random.Random(0).shuffle(order)
    assert [store[i] for i in order[:30]] == [texts[i] for i in order[:30]] and store[2:5] == texts[2:5]
    with pytest.raises(IndexError, match=f"text {len(texts)} of"):
        store[len(texts)]


# ---- in several processes


def test_mapped_documents_are_the_prepared_ones(dump: list[WebPage]) -> None:
    data = datasets.Dataset.from_list(
        [{"html": page.html, "url": page.url, "site": page.url[8:12]} for page in dump]
    )
    steps = tuple(step for step in STEPS if step not in ("quality", *CORPUS_STEPS))
    expected = prepare(dump, only(*steps))
    kept, dropped = map_documents(data, only(*steps), num_proc=2)
    assert kept["text"][:] == expected.texts and kept["site"][0] == dump[expected.numbers[0]].url[8:12]
    assert dropped == {(r.name, why): n for r in expected.reports for why, n in r.dropped.items()}
    again, counts = map_documents(data.select_columns(["html"]), only(*steps))
    assert again["text"][:] == expected.texts and counts == dropped


def test_a_batch_of_texts_keeps_its_rows() -> None:
    texts = [
        "A good line of plain English text about the market.",
        "\ud800",
        "Der Markt war am Montag geöffnet, und viele Leute kauften dort Brot.",
    ] * 100
    assert len(texts) > CHUNK
    done = prepare_batch({"text": texts}, only("language"))
    assert done["dropped_by"][:3] == ["", "input", "language"] and done["text"][0] == texts[0]
    assert done["reason"][:3] == ["", "not UTF-8", "de"] and len(done["text"]) == 300
    kept, dropped = map_documents(
        datasets.Dataset.from_dict({"text": [texts[0], texts[2]]}), only("language")
    )
    assert kept["text"][:] == [texts[0]] and dropped == {("language", "de"): 1}
