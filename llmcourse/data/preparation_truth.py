"""Each step's decisions against the labels of the web dump, counted while the documents pass."""

from __future__ import annotations

from collections import Counter
from typing import Any

from llmcourse.data import privacy
from llmcourse.data.deduplication import text_key
from llmcourse.data.detection import Detection, score
from llmcourse.data.document_steps import Outcome
from llmcourse.data.web_dump import WebPage


class Truth:
    """What should have happened at each step, for the documents that carry labels.

    What counts as positive, and as flagged, among the labelled documents that reach the step:

    * extract: words. Flagged are the extracted ones, positive those of the main text, as multisets.
    * repair: pages with the label "mojibake"; flagged if the text changed.
    * language: pages whose label is not English; flagged if dropped. (rules and quality likewise: kind "spam".)
    * privacy: pieces of personal data, equal in kind and to the letter; there are no true negatives.
    * exact: pages whose true text came before; flagged if dropped.
    * near: pages of whose cluster (a page and its copies) another one came before; flagged if dropped.
    * contamination: pages with a true label "contaminated", which whoever plants evaluation items sets.
    """

    def __init__(self) -> None:
        """Know nothing."""
        self._labels: dict[int, dict[str, Any]] = {}
        self._detections: dict[str, Detection] = {}
        self._seen: dict[str, set[Any]] = {"exact": set(), "near": set()}

    def add(self, number: int, item: Any) -> None:
        """Keep the labels of a page of the web dump; other items have none."""
        if isinstance(item, WebPage):
            self._labels[number] = item.labels | {"cluster": item.labels["duplicate_of"] or item.url}

    def detection(self, step: str) -> Detection | None:
        """The counts of a step; None if nothing labelled reached it, or if it has no truth."""
        return self._detections.get(step)

    def observe(self, step: str, number: int, before: str, outcome: Outcome) -> None:
        """Count what a step decided about a document."""
        labels = self._labels.get(number)
        if labels is None:
            return
        if step == "extract":
            self._count(step, _words(labels["text"], outcome.text))
        elif step == "privacy":
            self._count(step, _pieces(labels["personal_data"], before))
        elif (truth := self._is_positive(step, labels)) is not None:
            flagged = outcome.text != before if step == "repair" else outcome.dropped is not None
            self._count(step, score([flagged], [truth]))

    def _count(self, step: str, more: Detection) -> None:
        self._detections[step] = self._detections.get(step, Detection(0, 0, 0, 0)) + more

    def _is_positive(self, step: str, labels: dict[str, Any]) -> bool | None:
        if step == "repair":
            return labels["encoding"] == "mojibake"
        if step == "language":
            return labels["language"] != "en"
        if step in ("rules", "quality"):
            return labels["kind"] == "spam"
        if step == "contamination":
            return bool(labels["contaminated"]) if "contaminated" in labels else None
        if step in self._seen:
            mark = text_key(labels["text"]) if step == "exact" else labels["cluster"]
            came = mark in self._seen[step]
            self._seen[step].add(mark)
            return came
        return None


def _words(true: str, found: str) -> Detection:
    ours, theirs = Counter(found.split()), Counter(true.split())
    right = (ours & theirs).total()
    return Detection(right, ours.total() - right, theirs.total() - right)


def _pieces(true: list[tuple[str, str]], text: str) -> Detection:
    kinds = privacy.score_personal_data([privacy.find_personal_data(text)], [true])
    total = Detection(0, 0, 0)
    for part in kinds.values():
        total = total + part
    return total
