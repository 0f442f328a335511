"""The quality classifier: calibrated, stored as data, good on another dump, and honest about other spam."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

from llmcourse.data.calibration import choose_threshold, reliability
from llmcourse.data.detection import score
from llmcourse.data.quality import QualityClassifier, QualitySettings, train_quality
from llmcourse.data.spam_shift import quiet_spam, without_offers
from llmcourse.data.tinytown import Town
from llmcourse.data.web_dump import web_dump

Labelled = tuple[list[str], list[bool]]


def english(town: int, seed: int, n: int = 1000) -> Labelled:
    pages = {p.labels["text"]: p for p in web_dump(Town(town), n, seed) if p.labels["language"] == "en"}
    return list(pages), [page.labels["kind"] != "spam" for page in pages.values()]


@pytest.fixture(scope="module")
def seen() -> Labelled:
    return english(0, 1)


@pytest.fixture(scope="module")
def classifier(seen: Labelled) -> QualityClassifier:
    return train_quality(*seen)


def test_another_town_and_dump(classifier: QualityClassifier) -> None:
    texts, good = english(1, 2)
    found = score([not keep for keep in classifier.keep(texts)], [not label for label in good])
    assert found.n_positive > 50 and found.precision > 0.98 and found.recall > 0.98
    assert reliability(classifier.probabilities(texts), np.array(good)).error < 0.05


def test_unseen_offers_are_found_and_quiet_spam_is_not(seen: Labelled) -> None:
    offers = ("casino bonus", "luxury bags")
    reduced = [(without_offers(text, offers), good) for text, good in zip(*seen, strict=True)]
    narrow = train_quality(*zip(*[pair for pair in reduced if pair[0]], strict=True))
    assert not any("casino" in ngram or "luxury" in ngram for ngram in narrow.ngrams)
    texts, good = english(0, 3)
    unseen = [text for text, keep in zip(texts, good, strict=True) if not keep and text.startswith(offers)]
    assert len(unseen) > 10 and np.mean(narrow.keep(unseen)) < 0.1
    rng = random.Random(0)
    assert (
        np.mean(narrow.keep([quiet_spam(rng) for _ in range(100)])) > 0.5
    )  # the caveat of the module, measured


def test_probabilities_follow_the_written_formula(classifier: QualityClassifier, seen: Labelled) -> None:
    text = seen[0][1]
    vectorizer = TfidfVectorizer(
        token_pattern=r"(?u)[^\W\d_]+",
        ngram_range=(1, 2),
        vocabulary=list(classifier.ngrams),
        use_idf=False,
        norm=None,
    )
    counts = vectorizer.fit_transform([text]).toarray()[0]
    tfidf = np.where(counts > 0, 1 + np.log(np.maximum(counts, 1)), 0.0) * classifier.idf
    s = classifier.weights @ (tfidf / np.linalg.norm(tfidf)) + classifier.intercept
    assert classifier.scores([text])[0] == pytest.approx(s, rel=1e-12)
    expected = 1 / (1 + np.exp(-(classifier.slope * s + classifier.offset)))
    assert classifier.probabilities([text])[0] == pytest.approx(expected, rel=1e-12)
    assert classifier.slope > 0


def test_no_known_word_and_no_texts(classifier: QualityClassifier) -> None:
    assert classifier.scores(["12 + 7 = 19", ""]).tolist() == [classifier.intercept] * 2
    assert classifier.keep(["12 + 7 = 19"]) == [True]
    assert classifier.probabilities([]).shape == (0,) and classifier.keep([]) == []


def test_strongest_ngrams(classifier: QualityClassifier) -> None:
    good, bad = classifier.strongest(5)
    assert len(good) == len(bad) == 5
    assert good[0][1] == classifier.weights.max() and bad[0][1] == classifier.weights.min() < 0 < good[-1][1]


def test_same_settings_same_classifier_and_every_option_matters(seen: Labelled) -> None:
    texts, good = seen

    def probabilities(**options: float) -> np.ndarray:
        return train_quality(texts, good, settings=QualitySettings(**options)).probabilities(texts)  # type: ignore[arg-type]

    base = probabilities()
    assert (probabilities() == base).all()
    for options in (
        {"max_ngram": 1}, {"max_features": 100}, {"min_documents": 5}, {"regularization": 0.1},
        {"calibration_part": 0.5}, {"seed": 1},
    ):  # fmt: skip
        assert not np.allclose(probabilities(**options), base), options


def test_noisy_labels_are_calibrated() -> None:
    """Texts whose class is a coin of known bias: the classifier should say the bias."""
    rng = random.Random(0)
    bias = {"alpha": 0.9, "beta": 0.6, "gamma": 0.2}
    words = [rng.choice(list(bias)) for _ in range(4000)]
    classifier = train_quality(words, [rng.random() < bias[word] for word in words])
    said = classifier.probabilities(list(bias))
    assert np.abs(said - list(bias.values())).max() < 0.1


def test_saved_and_loaded_is_equal(classifier: QualityClassifier, seen: Labelled, tmp_path: Path) -> None:
    path = tmp_path / "quality.json"
    classifier.save(path)
    loaded = QualityClassifier.load(path)
    assert (loaded.probabilities(seen[0]) == classifier.probabilities(seen[0])).all()
    assert loaded.threshold == classifier.threshold and loaded.settings == classifier.settings
    loaded.save(path)  # replaces
    assert [file.name for file in tmp_path.iterdir()] == ["quality.json"]


def test_damaged_files_are_refused(classifier: QualityClassifier, tmp_path: Path) -> None:
    path = tmp_path / "quality.json"
    with pytest.raises(ValueError, match="missing"):
        QualityClassifier.load(path)
    classifier.save(path)
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole[: len(whole) // 2], encoding="utf-8")
    with pytest.raises(ValueError, match="JSON"):
        QualityClassifier.load(path)
    data = json.loads(whole)
    data["weights"][3] += 1e-9
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="seal"):
        QualityClassifier.load(path)
    path.write_bytes(b"\x80\x04\x95pickle")
    with pytest.raises(ValueError, match="JSON"):
        QualityClassifier.load(path)


def test_another_sealed_file_is_refused(tmp_path: Path) -> None:
    from llmcourse.durable import write_sealed

    write_sealed(tmp_path / "other.json", {"what": "something else", "format": 1})
    with pytest.raises(ValueError, match="no quality classifier"):
        QualityClassifier.load(tmp_path / "other.json")


# Threshold and reliability ------------------------------------------------------------------------------------


def test_threshold_by_hand() -> None:
    probabilities = np.array([0.1, 0.2, 0.3, 0.4, 0.9])
    good = np.array([False, False, True, False, True])
    assert choose_threshold(probabilities, good, 1.0) == pytest.approx(0.25)  # drops two, both bad
    assert choose_threshold(probabilities, good, 0.75) == pytest.approx(0.65)  # drops four, three bad
    assert (
        choose_threshold(probabilities, ~good, 1.0) == 0.0
    )  # the least likely is good: nothing can be dropped
    assert (
        choose_threshold(np.array([0.2, 0.2]), np.array([False, True]), 0.9) == 0.0
    )  # equal ones cannot be parted


def test_threshold_is_the_best_of_all() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        probabilities = rng.random(60).round(2)  # with equal ones
        good = rng.random(60) < probabilities
        candidates = []
        for cut in [0.0, *np.unique(probabilities) + 1e-6]:
            dropped = probabilities < cut
            if dropped.any() and cut < 1 and (~good[dropped]).sum() >= 0.8 * dropped.sum():
                candidates.append((int((~good[dropped]).sum()), -int(dropped.sum())))
        dropped = probabilities < choose_threshold(probabilities, good, 0.8)
        assert (int((~good[dropped]).sum()), -int(dropped.sum())) == max(candidates, default=(0, 0))


def test_reliability_by_hand() -> None:
    curve = reliability(np.array([0.1, 0.2, 0.8, 1.0]), np.array([False, True, True, True]), n_bins=2)
    assert curve.predicted == pytest.approx([0.15, 0.9]) and curve.observed == [0.5, 1.0]
    assert curve.counts == [2, 2] and curve.error == pytest.approx((2 * 0.35 + 2 * 0.1) / 4)


def test_reliability_of_true_probabilities_is_small() -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.random(20_000)
    good = rng.random(20_000) < probabilities
    assert reliability(probabilities, good).error < 0.02
    assert reliability(probabilities**3, good).error > 0.1


def test_bad_input(seen: Labelled) -> None:
    for name, wrong in {
        "max_ngram": 0, "max_features": 0, "min_documents": 0, "regularization": 0.0,
        "calibration_part": 1.0, "seed": -1,
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}={wrong}"):
            QualitySettings(**{name: wrong})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 texts with 1 labels"):
        train_quality(["a", "b"], [True])
    with pytest.raises(ValueError, match="15 bad texts"):
        train_quality(["a"] * 40, [True] * 25 + [False] * 15)
    with pytest.raises(ValueError, match="precision=0"):
        train_quality(*seen, precision=0)
    one, yes = np.array([0.5]), np.array([True])
    with pytest.raises(ValueError, match="2 probabilities for 1"):
        choose_threshold(np.array([0.5, 0.6]), yes, 0.9)
    with pytest.raises(ValueError, match="0 probabilities for 0"):
        reliability(np.array([]), np.array([]))
    with pytest.raises(ValueError, match="n_bins=0"):
        reliability(one, yes, 0)
    with pytest.raises(ValueError, match="from 0 to 1"):
        reliability(one + 1, yes)


def test_broken_parts_are_refused(classifier: QualityClassifier) -> None:
    from dataclasses import replace

    with pytest.raises(ValueError, match="weights"):
        replace(classifier, weights=classifier.weights[1:])
    with pytest.raises(ValueError, match="finite"):
        replace(classifier, slope=float("nan"))


# The other spam -----------------------------------------------------------------------------------------------


def test_quiet_spam() -> None:
    text = quiet_spam(random.Random(0), 8)
    assert text == quiet_spam(random.Random(0), 8) != quiet_spam(random.Random(1), 8)
    assert len(set(text.split(". "))) == 8 and "!" not in text and "{" not in text
    for wrong in (0, 9):
        with pytest.raises(ValueError, match=f"sentences={wrong}"):
            quiet_spam(random.Random(0), wrong)


def test_offers_are_removed_by_line() -> None:
    assert without_offers("A casino\nb\nc CASINO", ["Casino"]) == "b"
    assert without_offers("A casino", ["casino"]) == "" and without_offers("a\nb", []) == "a\nb"
