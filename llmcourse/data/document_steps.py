"""The steps of data preparation that look at one document at a time, so that they run in any number of processes.

decode (bytes to text), extract (main text of HTML), repair (mojibake), language, rules, quality (a classifier) and
privacy (masking). Each gets a chunk of documents and says of each what its text becomes, or why it is dropped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from llmcourse.data import encoding, extraction, language, privacy
from llmcourse.data.filtering import RuleFilter
from llmcourse.data.web_dump import WebPage

if TYPE_CHECKING:
    from datasets import Dataset

    from llmcourse.data.preparation import PreparationSettings

DOCUMENT_STEPS = ("decode", "extract", "repair", "language", "rules", "quality", "privacy")
CHUNK = 256  # documents that go through a step together


class RawPage(NamedTuple):
    """A document as it comes in."""

    content: str | bytes
    """HTML, or plain text; bytes are HTML as fetched"""
    url: str = ""
    content_type: str | None = None
    """the HTTP header of that name, for bytes"""
    is_html: bool = True


class Outcome(NamedTuple):
    """What a step makes of a document."""

    text: str
    dropped: str | None = None
    """why it goes; None if it stays"""


@dataclass
class Flowing:
    """A document on its way through the steps."""

    number: int
    page: RawPage
    text: str


DocumentStep = Callable[[Sequence[Flowing]], list[Outcome]]


def as_page(item: Any) -> RawPage:
    """Understand what comes in: a `RawPage`, a page of the web dump, a page of a crawl, a row, or plain text.

    Args:
        item: `WebPage`; anything with `body` (bytes), `url` and `content_type`, as `read_crawl` gives; a mapping with
            "html" (and perhaps "url" and "content_type") or else "text"; or a text.

    Raises:
        ValueError: none of these.
    """
    if isinstance(item, RawPage):
        return item
    if isinstance(item, str):
        return RawPage(item, is_html=False)
    if isinstance(item, WebPage):
        return RawPage(item.html, item.url)
    if isinstance(item, Mapping) and isinstance(item.get("html"), str | bytes):
        return RawPage(item["html"], item.get("url") or "", item.get("content_type"))
    if isinstance(item, Mapping) and isinstance(item.get("text"), str):
        return RawPage(item["text"], item.get("url") or "", is_html=False)
    if isinstance(getattr(item, "body", None), bytes):
        return RawPage(item.body, item.url, item.content_type)
    raise ValueError(
        f"a document is {type(item).__name__}: give texts, rows with 'text' or 'html', web pages or pages of a crawl"
    )


def document_steps(settings: PreparationSettings) -> dict[str, DocumentStep]:
    """The per-document steps that the settings ask for, in their order."""
    rules = RuleFilter(settings.rules)
    every: dict[str, DocumentStep] = {
        "decode": lambda documents: [_decode(d, settings) for d in documents],
        "extract": lambda documents: [_extract(d, settings) for d in documents],
        "repair": lambda documents: [Outcome(encoding.repair(d.text).text) for d in documents],
        "language": lambda documents: _language(documents, settings),
        "rules": lambda documents: [_rules(d, rules) for d in documents],
        "quality": lambda documents: _quality(documents, settings),
        "privacy": lambda documents: [Outcome(privacy.mask(d.text, settings.kinds)[0]) for d in documents],
    }
    return {name: every[name] for name in DOCUMENT_STEPS if name in settings.active}


def _decode(document: Flowing, settings: PreparationSettings) -> Outcome:
    content = document.page.content
    if isinstance(content, str):
        return Outcome(content)
    if len(content) > settings.extraction.max_bytes:
        return Outcome("", "too large")
    return Outcome(encoding.decode_html(content, document.page.content_type).text)


def _extract(document: Flowing, settings: PreparationSettings) -> Outcome:
    if not document.page.is_html:
        return Outcome(document.text)
    found = extraction.extract(document.text, url=document.page.url, settings=settings.extraction)
    return Outcome(found.text, found.dropped)


def _language(documents: Sequence[Flowing], settings: PreparationSettings) -> list[Outcome]:
    report = language.keep_language(
        (d.text for d in documents),
        settings.language,
        settings.language_threshold,
        settings=settings.language_settings,
        keep_without_language=settings.keep_without_language,
    )
    return [
        Outcome(d.text, None if kept else f"unsure {name}" if name == settings.language else name)
        for d, kept, name in zip(documents, report.kept, report.languages, strict=True)
    ]


def _rules(document: Flowing, rules: RuleFilter) -> Outcome:
    """The first violated rule is the reason, so that reasons add up."""
    result = rules(document.text)
    return Outcome(result.text, result.violations[0] if result.violations else None)


def _quality(documents: Sequence[Flowing], settings: PreparationSettings) -> list[Outcome]:
    assert settings.quality is not None  # or the step were not active
    kept = settings.quality.keep([d.text for d in documents])
    return [Outcome(d.text, None if good else "low quality") for d, good in zip(documents, kept, strict=True)]


def unreadable(text: str) -> bool:
    """Whether a text cannot be written as UTF-8: half of a surrogate pair, from a bad escape somewhere."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def prepare_batch(batch: Mapping[str, list[Any]], settings: PreparationSettings) -> dict[str, list[str]]:
    """The per-document steps for `datasets.Dataset.map(prepare_batch, batched=True, fn_kwargs={"settings": ...})`.

    Args:
        batch: columns "text", or "html" and perhaps "url" and "content_type".
        settings: which steps, and how; steps that look at the whole corpus are left out.

    Returns:
        A row for each row: "text", the step that dropped it in "dropped_by" ("" if none) and its "reason". A text that
        cannot be written as UTF-8 is dropped by "input".
    """
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    flowing = []
    for number, row in enumerate(rows):
        page = as_page(row)
        flowing.append(Flowing(number, page, page.content if isinstance(page.content, str) else ""))
    fate = [("input", "not UTF-8") if unreadable(d.text) else ("", "") for d in flowing]
    alive = [d for d in flowing if not fate[d.number][0]]
    for name, step in document_steps(settings).items():
        for document, outcome in zip(alive, step(alive), strict=True):
            document.text = outcome.text
            if outcome.dropped is not None:
                fate[document.number] = (name, outcome.dropped)
        alive = [d for d in alive if not fate[d.number][0]]
    return {
        "text": ["" if fate[d.number][0] else d.text for d in flowing],
        "dropped_by": [step for step, _ in fate],
        "reason": [reason for _, reason in fate],
    }


def map_documents(
    data: Dataset, settings: PreparationSettings, *, num_proc: int | None = None
) -> tuple[Dataset, Counter[tuple[str, str]]]:
    """The per-document steps over a `datasets.Dataset`, in several processes, memory-mapped on both sides.

    Args:
        data: columns "text", or "html" and perhaps "url" and "content_type"; other columns are kept.
        settings: see `prepare_batch`. Give what is left to `prepare` with the corpus steps alone.
        num_proc: processes; None computes in this one.

    Returns:
        The rows that stay, with their new text, and how many went by (step, reason).

    Raises:
        ValueError: a row is neither HTML nor text.
    """
    used = [name for name in ("html", "text", "url", "content_type") if name in data.column_names]
    done = data.map(
        _map_batch,
        batched=True,
        batch_size=CHUNK,
        input_columns=used,
        fn_kwargs={"names": used, "settings": settings},
        remove_columns=[name for name in used if name in ("html", "text", "content_type")],
        num_proc=num_proc,
    )
    dropped: Counter[tuple[str, str]] = Counter()
    for part in done.select_columns(["dropped_by", "reason"]).iter(1_000):
        dropped.update(
            (step, why) for step, why in zip(part["dropped_by"], part["reason"], strict=True) if step
        )
    kept = done.filter(_stay, batched=True, input_columns=["dropped_by"])
    if len(kept) + dropped.total() != len(data):
        raise RuntimeError(
            f"{len(data)} documents in, {len(kept)} out, {dropped.total()} dropped: some are lost"
        )
    return kept.remove_columns(["dropped_by", "reason"]), dropped


def _map_batch(*columns: list[Any], names: list[str], settings: PreparationSettings) -> dict[str, list[str]]:
    return prepare_batch(dict(zip(names, columns, strict=True)), settings)


def _stay(dropped_by: list[str]) -> list[bool]:
    return [not step for step in dropped_by]
