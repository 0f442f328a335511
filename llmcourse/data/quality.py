"""A small classifier of text quality: TF-IDF of words, logistic regression, calibrated probabilities.

GPT-3's corpus was filtered by such a classifier (Brown et al., 2020, appendix A), FineWeb-Edu by a regression on
embeddings (Penedo et al., 2024); DataComp-LM found a linear one on words, fastText, the best of those it tried
(Li et al., 2024). The parts come from scikit-learn. What is done here is what decides whether to trust it: the
probabilities are calibrated on texts that were not fitted (Platt, 1999), the threshold is chosen on yet others for
a wanted precision, and the stored file is numbers and text, which a reader can open and which runs no code.

A classifier learns the rubbish that it was shown. Measure it on rubbish of another make before it filters anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmcourse.data.calibration import choose_threshold
from llmcourse.durable import read_sealed, sync, write_sealed

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer

_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class QualitySettings:
    """How the classifier is fitted.

    Raises:
        ValueError: a number is out of its range.
    """

    max_ngram: int = 2
    """words of the longest n-gram; all shorter ones are features too"""
    max_features: int = 20_000
    """most frequent n-grams that get a weight. At web scale these would be hashed (fastText, 2 million buckets);
    a vocabulary of this size is kept instead because its weights can be read"""
    min_documents: int = 2
    """texts that an n-gram must occur in"""
    regularization: float = 10.0
    """C of the logistic regression: inverse strength of the L2 penalty"""
    calibration_part: float = 0.25
    """part of the texts held back for calibration and threshold, half for each"""
    seed: int = 0
    """of the split"""

    def __post_init__(self) -> None:
        for name in ("max_ngram", "max_features", "min_documents"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: use 1 or more")
        if not self.regularization > 0:
            raise ValueError(f"regularization={self.regularization}: use more than 0; smaller is stronger")
        if not 0 < self.calibration_part < 1:
            raise ValueError(f"calibration_part={self.calibration_part}: use a fraction between 0 and 1")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: use 0 or more")


@dataclass(frozen=True, eq=False)
class QualityClassifier:
    """A fitted classifier: P(good) = sigmoid(a s + b) with the score s = w . tfidf(text) + c.

    Legend: V n-grams of the vocabulary.

    Attributes:
        ngrams: the V n-grams, words separated by a space.
        idf: (V,) float64 inverse document frequencies.
        weights: (V,) float64 weights w; positive speaks for good text.
        intercept: c.
        slope: a of Platt's sigmoid.
        offset: b of Platt's sigmoid.
        threshold: texts with a smaller probability of being good are dropped.
        settings: how it was fitted.
    """

    ngrams: tuple[str, ...]
    idf: np.ndarray
    weights: np.ndarray
    intercept: float
    slope: float
    offset: float
    threshold: float
    settings: QualitySettings

    def __post_init__(self) -> None:
        for name in ("idf", "weights"):
            array = getattr(self, name)
            if array.shape != (len(self.ngrams),) or not np.isfinite(array).all():
                raise ValueError(f"{name}: needs {len(self.ngrams)} finite numbers, has shape {array.shape}")
        if not np.isfinite([self.intercept, self.slope, self.offset, self.threshold]).all():
            raise ValueError(
                "intercept, slope, offset and threshold must be finite: fit the classifier again"
            )
        object.__setattr__(self, "_vectorizer", _rebuild(self.ngrams, self.idf, self.settings))

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """(M,) float64 scores s of M texts: log-odds of being good as the regression has them, not calibrated."""
        if not len(texts):
            return np.zeros(0)
        return self._vectorizer.transform(texts) @ self.weights + self.intercept  # type: ignore[attr-defined]

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """(M,) float64 calibrated probabilities that M texts are good.

        A text without an n-gram of the vocabulary, such as a page of sums, gets what the intercept alone gives:
        nothing is known against it.
        """
        return _sigmoid(self.slope * self.scores(texts) + self.offset)

    def keep(self, texts: Sequence[str]) -> list[bool]:
        """For each text, whether its probability reaches the threshold."""
        return [bool(flag) for flag in self.probabilities(texts) >= self.threshold]

    def strongest(self, n: int = 10) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
        """The n n-grams that speak most for and most against a text, with their weights."""
        order = np.argsort(self.weights)
        pairs = [(self.ngrams[i], float(self.weights[i])) for i in order]
        return pairs[::-1][:n], pairs[:n]

    def save(self, path: str | Path) -> None:
        """Write the classifier as JSON that carries its own checksum. An older file is replaced at once or not at
        all."""
        path = Path(path)
        work = path.with_name(f".{path.name}.part")
        data: dict[str, Any] = {
            "what": "quality classifier",
            "format": _FORMAT,
            "settings": asdict(self.settings),
            "ngrams": list(self.ngrams),
            "idf": self.idf.tolist(),
            "weights": self.weights.tolist(),
        }
        data |= {name: getattr(self, name) for name in ("intercept", "slope", "offset", "threshold")}
        write_sealed(work, data)
        sync(work)
        work.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> QualityClassifier:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is missing, was changed or cut, or holds something else.
        """
        data = read_sealed(Path(path))
        if (data.pop("what", None), data.pop("format", None)) != ("quality classifier", _FORMAT):
            raise ValueError(
                f"{Path(path).name} holds no quality classifier of format {_FORMAT}: fit and save it again"
            )
        arrays = {name: np.array(data.pop(name), dtype=np.float64) for name in ("idf", "weights")}
        settings, ngrams = QualitySettings(**data.pop("settings")), tuple(data.pop("ngrams"))
        return cls(ngrams=ngrams, settings=settings, **arrays, **data)


def train_quality(
    texts: Sequence[str],
    good: Sequence[bool],
    precision: float = 0.99,
    settings: QualitySettings | None = None,
) -> QualityClassifier:
    """Fit a classifier on labelled texts, calibrate it, and choose its threshold.

    The texts are split three ways, classes in equal shares: to fit the weights, to fit Platt's sigmoid, to choose
    the threshold. Both classes count the same in the fit, however rare one is; Platt's sigmoid then brings the
    probabilities back to the frequencies of the texts.

    Args:
        texts: M texts. Equal texts should be given once: copies on both sides of a split flatter the result.
        good: for each text, whether it is good.
        precision: wanted share of truly bad texts among the dropped ones, on the part for the threshold.
        settings: of the fit; the defaults if None.

    Raises:
        ValueError: texts and labels differ in number, the precision is not above 0 and at most 1, or a class has
            fewer than 16 texts, too few to split three ways.
    """
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.frozen import FrozenEstimator
    from sklearn.linear_model import LogisticRegression

    settings = settings or QualitySettings()
    labels = _checked_labels(texts, good)
    fitted, calibrated, chosen = _split(labels, settings)
    vectorizer = _vectorizer(settings)
    model = LogisticRegression(C=settings.regularization, class_weight="balanced", max_iter=1000)
    model.fit(vectorizer.fit_transform([texts[i] for i in fitted]), labels[fitted])
    wrapped = CalibratedClassifierCV(FrozenEstimator(model), method="sigmoid")
    wrapped.fit(vectorizer.transform([texts[i] for i in calibrated]), labels[calibrated])
    platt = wrapped.calibrated_classifiers_[0].calibrators[0]  # P(good) = 1 / (1 + exp(a_ s + b_))
    parts: dict[str, Any] = {
        "ngrams": tuple(map(str, vectorizer.get_feature_names_out())),
        "idf": np.asarray(vectorizer.idf_, dtype=np.float64),
        "weights": np.asarray(model.coef_[0], dtype=np.float64),
        "intercept": float(model.intercept_[0]),
        "slope": -float(platt.a_),
        "offset": -float(platt.b_),
        "settings": settings,
    }
    draft = QualityClassifier(**parts, threshold=0.5)
    probabilities = draft.probabilities([texts[i] for i in chosen])
    return QualityClassifier(**parts, threshold=choose_threshold(probabilities, labels[chosen], precision))


def _vectorizer(settings: QualitySettings) -> TfidfVectorizer:
    """Counts of lower-case words and of their n-grams, as 1 + log(count), weighed by rarity, rows of length 1."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(
        token_pattern=r"(?u)[^\W\d_]+",
        ngram_range=(1, settings.max_ngram),
        max_features=settings.max_features,
        min_df=settings.min_documents,
        sublinear_tf=True,
    )


def _rebuild(ngrams: tuple[str, ...], idf: np.ndarray, settings: QualitySettings) -> TfidfVectorizer:
    vectorizer = _vectorizer(settings).set_params(vocabulary={ngram: i for i, ngram in enumerate(ngrams)})
    vectorizer.idf_ = idf
    return vectorizer


def _sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) without overflow."""
    return np.exp(-np.logaddexp(0.0, -x))


def _checked_labels(texts: Sequence[str], good: Sequence[bool]) -> np.ndarray:
    """(M,) bool labels."""
    if len(texts) != len(good):
        raise ValueError(f"{len(texts)} texts with {len(good)} labels: give each text one")
    labels = np.asarray(good, dtype=bool)
    for name, count in (("good", int(labels.sum())), ("bad", int((~labels).sum()))):
        if count < 16:
            raise ValueError(
                f"{count} {name} texts: 16 of each class are the least that can be split three ways"
            )
    return labels


def _split(labels: np.ndarray, settings: QualitySettings) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices to fit, to calibrate, to choose the threshold: disjoint, all classes in each at the same rate."""
    generator = np.random.default_rng(settings.seed)
    parts: tuple[list[np.ndarray], ...] = ([], [], [])
    for value in (False, True):
        indices = generator.permutation(np.flatnonzero(labels == value))
        held = max(2, round(settings.calibration_part * len(indices)))
        for part, piece in zip(
            parts, (indices[held:], indices[: held // 2], indices[held // 2 : held]), strict=True
        ):
            part.append(piece)
    fitted, calibrated, chosen = (np.concatenate(part) for part in parts)
    return fitted, calibrated, chosen
