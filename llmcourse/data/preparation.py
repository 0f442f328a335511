"""The whole funnel: from pages as fetched to documents fit for training, with an account of every step.

decode, extract, repair, language, rules, quality, privacy: one document at a time (`document_steps`). Then exact
duplicates, repeated lines, near-duplicates and contamination: over the corpus (`corpus_steps`). The order is by cost
and by need: language and rules judge extracted text, masking comes before deduplication so that two pages that differ
in a telephone number count as equal, and comparison with the evaluation set comes last, on the text that is trained on.

Nothing is lost silently: of every step, documents in = documents out + documents dropped, by reason.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from llmcourse.data.corpus_steps import (
    CorpusStep,
    Row,
    TextStore,
    contaminated_documents,
    exact_duplicates,
    near_duplicate_documents,
    repeated_lines,
)
from llmcourse.data.decontamination import ContaminationSettings
from llmcourse.data.deduplication import LineSettings
from llmcourse.data.detection import Detection
from llmcourse.data.document_steps import (
    CHUNK,
    DOCUMENT_STEPS,
    Flowing,
    Outcome,
    RawPage,
    as_page,
    document_steps,
    map_documents,
    prepare_batch,
    unreadable,
)
from llmcourse.data.extraction import ExtractionSettings
from llmcourse.data.filtering import FilterSettings, tinytown
from llmcourse.data.language import LanguageSettings
from llmcourse.data.minhash import MinHashSettings
from llmcourse.data.preparation_truth import Truth
from llmcourse.data.privacy import KINDS
from llmcourse.data.quality import QualityClassifier
from llmcourse.data.shards import ShardIndex, write_shards
from llmcourse.runtime import progress as progress_bar

__all__ = [
    "CORPUS_STEPS", "DOCUMENT_STEPS", "STEPS", "PreparationSettings", "Prepared", "RawPage", "StepReport",
    "map_documents", "prepare", "prepare_batch", "prepare_shards",
]  # fmt: skip

CORPUS_STEPS = ("exact", "lines", "near", "contamination")
STEPS = (*DOCUMENT_STEPS, *CORPUS_STEPS)


@dataclass(frozen=True, kw_only=True)
class PreparationSettings:
    """What is done to a corpus, and how.

    Raises:
        ValueError: an unknown step, or one that is named without what it needs: a classifier, or evaluation items.
    """

    steps: tuple[str, ...] | None = None
    """which of `STEPS`, always in that order; None: all, those without classifier or items left out"""
    extraction: ExtractionSettings = field(default_factory=ExtractionSettings)
    """how the main text is found"""
    language: str = "en"
    """what to keep, ISO 639-1"""
    language_threshold: float = 0.5
    """least probability of it"""
    language_settings: LanguageSettings = field(default_factory=LanguageSettings)
    """candidate languages and shortest text"""
    keep_without_language: bool = True
    """keep texts with too few letters to tell, such as sums"""
    rules: FilterSettings = field(default_factory=tinytown)
    """bounds of the quality rules"""
    quality: QualityClassifier | None = None
    """a fitted classifier, which brings its threshold"""
    kinds: tuple[str, ...] = KINDS
    """personal data to mask"""
    lines: LineSettings = field(default_factory=lambda: LineSettings(min_documents=10, min_characters=20))
    """which lines are boilerplate"""
    near: MinHashSettings = field(default_factory=MinHashSettings)
    """how near-duplicates are found"""
    items: tuple[str, ...] = ()
    """evaluation items, prompt and answer together"""
    contamination: ContaminationSettings = field(default_factory=ContaminationSettings)
    """what counts as repeating an item"""

    def __post_init__(self) -> None:
        for name in self.steps or ():
            if name not in STEPS:
                raise ValueError(f"step {name!r}: use some of {', '.join(STEPS)}")
            if name not in self.active:
                need = "a classifier in `quality`" if name == "quality" else "evaluation items in `items`"
                raise ValueError(f"step {name!r} needs {need}: give it, or leave the step out")

    @property
    def active(self) -> tuple[str, ...]:
        """The steps that run, in order."""
        missing = {"quality": self.quality is None, "contamination": not self.items}
        wanted = STEPS if self.steps is None else self.steps
        return tuple(name for name in STEPS if name in wanted and not missing.get(name, False))


@dataclass
class StepReport:
    """What one step did to a corpus.

    Attributes:
        name: of `STEPS`, or "input" for what never got to a step.
        documents_in: documents that came to it.
        documents_out: documents that it let through.
        words_in: words (between white space) that came; of markup, whatever stands between white space.
        words_out: words that it let through.
        bytes_in: UTF-8 bytes that came.
        bytes_out: UTF-8 bytes that it let through.
        dropped: documents dropped, by reason.
        changed: documents let through with another text.
        seconds: time in the step; of those over the corpus, with reading and writing its files.
        detection: against the labels, if the input has any; what is counted is documented at `Truth`.
    """

    name: str
    documents_in: int = 0
    documents_out: int = 0
    words_in: int = 0
    words_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    changed: int = 0
    seconds: float = 0.0
    detection: Detection | None = None

    def record(self, before: str, outcome: Outcome) -> None:
        """Count one document."""
        words, size = _size(before)
        self.documents_in += 1
        self.words_in += words
        self.bytes_in += size
        if outcome.dropped is not None:
            self.dropped[outcome.dropped] += 1
            return
        if outcome.text != before:
            self.changed += 1
            words, size = _size(outcome.text)
        self.documents_out += 1
        self.words_out += words
        self.bytes_out += size

    def check(self) -> None:
        """Raise `RuntimeError` unless every document that came was let through or dropped for a reason."""
        if self.documents_in != self.documents_out + self.dropped.total():
            raise RuntimeError(
                f"step {self.name}: {self.documents_in} documents in, {self.documents_out} out and "
                f"{self.dropped.total()} dropped: some are lost"
            )


def _size(text: str) -> tuple[int, int]:
    return len(text.split()), len(text.encode("utf-8", "surrogatepass"))


@dataclass(frozen=True)
class Prepared:
    """A prepared corpus.

    Attributes:
        texts: the documents that are left; of `prepare_shards` none, since they lie in its shards.
        numbers: (n,) int64 place of each of them in what came in.
        reports: of the steps, in order; first "input" if something came that no step could take.
        seconds: of the whole, reading the input included.
    """

    texts: list[str]
    numbers: np.ndarray
    reports: list[StepReport]
    seconds: float

    def report(self, name: str) -> StepReport:
        """The report of one step.

        Raises:
            ValueError: no such step ran.
        """
        for report in self.reports:
            if report.name == name:
                return report
        raise ValueError(f"step {name!r} did not run: use one of {', '.join(r.name for r in self.reports)}")

    def table(self) -> list[dict[str, Any]]:
        """The funnel, a row a step: plain data for a table, a plot or JSON."""
        rows = []
        for report in self.reports:
            row = {
                name: value for name, value in vars(report).items() if name not in ("detection", "dropped")
            }
            found = report.detection
            scores = {name: getattr(found, name) if found else None for name in ("precision", "recall", "f1")}
            rows.append(row | {"dropped": dict(report.dropped)} | scores)
        return rows


def prepare(
    pages: Iterable[Any], settings: PreparationSettings | None = None, *, progress: bool = False
) -> Prepared:
    """Prepare a corpus whose result fits into memory.

    Args:
        pages: what `as_page` understands: pages of the web dump (whose labels give each step's precision and recall),
            pages of a crawl, rows with "html" or "text", or texts. HTML goes through all steps; for plain text the
            first two change nothing. Read once.
        settings: which steps, and how.
        progress: show a bar.

    Raises:
        ValueError: an item is nothing that `as_page` understands.
    """
    with _working_folder(None) as work:
        began = time.perf_counter()
        store, reports = _funnel(pages, settings or PreparationSettings(), work, progress)
        rows = list(store.rows())
        numbers = np.array([row.number for row in rows], np.int64)
        return Prepared([row.text for row in rows], numbers, reports, time.perf_counter() - began)


def prepare_shards(
    pages: Iterable[Any],
    folder: str | Path,
    settings: PreparationSettings | None = None,
    *,
    n_shards: int = 8,
    progress: bool = False,
) -> tuple[ShardIndex, Prepared]:
    """Prepare a corpus of any size into shards; the same documents and reports as `prepare`.

    Memory does not hold the texts: up to some 50 bytes a document while duplicates are sorted out, beside what labels
    take, so leave these out at scale. The disk beside `folder` needs room for the text three times.

    Args:
        pages: as for `prepare`.
        folder: where the shards go; must not exist.
        settings: which steps, and how.
        n_shards: number of files.
        progress: show a bar.

    Returns:
        The shards' index, and a `Prepared` without texts.

    Raises:
        ValueError: an item is nothing that `as_page` understands, or the folder exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists: delete it or write to another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _working_folder(folder.parent) as work:
        began = time.perf_counter()
        store, reports = _funnel(pages, settings or PreparationSettings(), work, progress)
        index = write_shards(store, folder, n_shards=n_shards)
        numbers = np.fromiter((row.number for row in store.rows()), np.int64, len(store))
        return index, Prepared([], numbers, reports, time.perf_counter() - began)


@contextmanager
def _working_folder(beside: Path | None) -> Iterator[Path]:
    work = Path(tempfile.mkdtemp(prefix=".preparation-", dir=beside))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _funnel(
    pages: Iterable[Any], settings: PreparationSettings, work: Path, progress: bool
) -> tuple[TextStore, list[StepReport]]:
    truth = Truth()
    reports = {name: StepReport(name) for name in ("input", *settings.active)}
    with progress_bar(pages, description="documents", unit="doc", enabled=progress) as bar:
        store = TextStore.write(work / "documents", _document_stage(bar, settings, reports, truth))
    for name, step in _corpus_steps(settings).items():
        began = time.perf_counter()
        rows = _recorded(name, step(store, work), reports[name], truth)
        bar = progress_bar(rows, total=len(store), description=name, unit="doc", enabled=progress)
        following = TextStore.write(work / name, bar)
        store.path.unlink()
        store = following
        reports[name].seconds = time.perf_counter() - began
    for name, report in reports.items():
        report.check()
        report.detection = truth.detection(name)
    return store, [report for name, report in reports.items() if name != "input" or report.dropped]


def _corpus_steps(settings: PreparationSettings) -> dict[str, CorpusStep]:
    steps: dict[str, CorpusStep] = {}
    for name in settings.active:
        if name == "exact":
            steps[name] = exact_duplicates
        elif name == "lines":
            steps[name] = repeated_lines(settings.lines)
        elif name == "near":
            steps[name] = near_duplicate_documents(settings.near)
        elif name == "contamination":
            steps[name] = contaminated_documents(settings.items, settings.contamination)
    return steps


def _document_stage(
    pages: Iterable[Any], settings: PreparationSettings, reports: dict[str, StepReport], truth: Truth
) -> Iterator[Row]:
    """What is left of the input after the per-document steps, a chunk at a time."""
    steps = document_steps(settings)
    numbered = enumerate(pages)
    while chunk := list(islice(numbered, CHUNK)):
        alive = []
        for number, item in chunk:
            page = as_page(item)
            truth.add(number, item)
            document = Flowing(number, page, page.content if isinstance(page.content, str) else "")
            reason = "not UTF-8" if unreadable(document.text) else None
            reports["input"].record(document.text, Outcome(document.text, reason))
            if reason is None:
                alive.append(document)
        for name, step in steps.items():
            began = time.perf_counter()
            outcomes = step(alive)
            reports[name].seconds += time.perf_counter() - began
            alive = _advance(name, alive, outcomes, reports[name], truth)
        yield from (Row(document.number, document.text) for document in alive)


def _advance(
    name: str, documents: list[Flowing], outcomes: list[Outcome], report: StepReport, truth: Truth
) -> list[Flowing]:
    """Count what a step said of a chunk, give the documents their new text, and return those that stay."""
    staying = []
    for document, outcome in zip(documents, outcomes, strict=True):
        report.record(document.text, outcome)
        truth.observe(name, document.number, document.text, outcome)
        document.text = outcome.text
        if outcome.dropped is None:
            staying.append(document)
    return staying


def _recorded(
    name: str, decided: Iterable[tuple[Row, Outcome]], report: StepReport, truth: Truth
) -> Iterator[Row]:
    """Count what a step over the corpus decides, and pass on what stays."""
    for row, outcome in decided:
        report.record(row.text, outcome)
        truth.observe(name, row.number, row.text, outcome)
        if outcome.dropped is None:
            yield Row(row.number, outcome.text)
