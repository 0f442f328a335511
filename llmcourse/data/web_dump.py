"""A dump of web pages around Tinytown's documents, with the truth about each page.

Pages wrap documents into HTML with menus, scripts, cookie notices and footers. Some are exact or near duplicates,
some hold personal data, some are in another language, are spam, or were decoded wrongly. Every page is
labelled with what was done to it, so that extraction, filters, redaction and deduplication have a known
precision and recall.
"""

from __future__ import annotations

import html
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llmcourse.data import web_text
from llmcourse.data.tinytown import Town
from llmcourse.data.town_choices import stream
from llmcourse.data.web_text import pick

_SITES = ("gazette", "notes", "corner", "board", "archive", "family")
_SECTIONS = ("news", "post", "page", "thread", "item")
_MENU = ("Home", "News", "About us", "Archive", "Contact", "Sign in", "Subscribe", "Help")
_BANNERS = (
    "We use cookies to improve your visit. Accept all or read our policy.",
    "Sign up for our newsletter and never miss a story!",
    "You have 2 free articles left this month.",
)
_FOOTERS = (
    "© 2024 All rights reserved. Terms of use. Privacy policy.",
    "Powered by a simple site engine. Back to top.",
    "Follow us. Share this page. Report a problem.",
)
_PURPOSE = 101  # of the random stream: no other use of a town's seed has this number


@dataclass(frozen=True, kw_only=True)
class WebSettings:
    """How dirty the dump is. All numbers are fractions of the pages.

    Raises:
        ValueError: if a fraction is negative or above 1, or the first four exceed 1 together.
    """

    exact_duplicates: float = 0.10
    """Pages whose main text repeats an earlier page's; their menus and address differ."""
    near_duplicates: float = 0.10
    """Pages whose main text is an earlier page's, edited in one to three places."""
    foreign: float = 0.08
    """Pages in German, French or Spanish."""
    spam: float = 0.08
    """Pages of advertisements."""
    personal_data: float = 0.15
    """Part of the fresh pages that holds one or two pieces of personal data."""
    non_ascii: float = 0.20
    """Part of the fresh pages that has a sentence with letters outside ASCII."""
    broken: float = 0.30
    """Part of those with letters outside ASCII, fresh or foreign, that was decoded wrongly."""

    def __post_init__(self) -> None:
        """Check every field."""
        for name, value in vars(self).items():
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name}={value}: use a fraction from 0 to 1")
        total = self.exact_duplicates + self.near_duplicates + self.foreign + self.spam
        if total > 1.0:
            raise ValueError(f"exact_duplicates + near_duplicates + foreign + spam = {total}: use 1 at most")


@dataclass(frozen=True)
class WebPage:
    """A page as it would be fetched, and the truth about it.

    Labels:
        text: the main text, paragraphs separated by a blank line; as its author wrote it, not as garbled.
        kind: kind of its first document ("story", ...), "foreign" or "spam".
        language: "en", "de", "fr" or "es".
        duplicate: None, "exact" or "near".
        duplicate_of: address of the page that it copies, or None.
        edits: names of the edits of a near duplicate ("drop", "add", "swap").
        jaccard: similarity of 5-word shingles to the copied page's text; None if it copies none.
        personal_data: list of (type, value); types "email", "phone", "ipv4".
        encoding: "utf-8", or "mojibake" if the page shows UTF-8 read as Windows-1252.
    """

    url: str
    html: str
    labels: dict[str, Any]


def web_dump(
    town: Town, n_pages: int, seed: int = 0, settings: WebSettings | None = None
) -> Iterator[WebPage]:
    """Write n pages; the same ones for the same town, seed and settings.

    Raises:
        ValueError: if n_pages or the seed is negative.
    """
    if n_pages < 0:
        raise ValueError(f"n_pages={n_pages}: use 0 or more")
    return _pages(town, n_pages, stream(town.seed, _PURPOSE, seed), settings or WebSettings())


def _pages(town: Town, n_pages: int, rng: random.Random, settings: WebSettings) -> Iterator[WebPage]:
    urls = [f"https://{pick(rng, _SITES)}.example/{pick(rng, _SECTIONS)}/{i}.html" for i in range(n_pages)]
    originals: list[
        tuple[str, dict[str, Any]]
    ] = []  # address and labels of the pages that copies can be made of
    for i, url in enumerate(urls):
        labels = _labels(town, rng, settings, originals)
        if labels["duplicate"] is None and labels["language"] == "en" and labels["kind"] != "spam":
            originals.append((url, labels))
        shown = web_text.mojibake(labels["text"]) if labels["encoding"] == "mojibake" else labels["text"]
        links = [urls[i - 1], urls[(i + 1) % n_pages], pick(rng, urls)]
        yield WebPage(url, _render(rng, shown, links), labels)


def _labels(
    town: Town, rng: random.Random, settings: WebSettings, originals: list[tuple[str, dict[str, Any]]]
) -> dict[str, Any]:
    """Decide what a page is and write its main text."""
    labels: dict[str, Any] = {
        "text": "", "kind": "", "language": "en", "duplicate": None, "duplicate_of": None, "edits": [],
        "jaccard": None, "personal_data": [], "encoding": "utf-8",
    }  # fmt: skip
    origin = _origin(rng.random(), settings)
    if origin == "spam":
        return labels | {"kind": "spam", "text": web_text.spam_text(rng, 4 + int(rng.random() * 8))}
    if origin == "foreign":
        language = pick(rng, web_text.FOREIGN_LANGUAGES)
        text = web_text.foreign_text(rng, language, 4 + int(rng.random() * 5))
        return labels | {
            "kind": "foreign",
            "language": language,
            "text": text,
            "encoding": _encoding(rng, settings),
        }
    if origin in ("exact", "near") and originals:
        return labels | _copy(rng, origin, *pick(rng, originals))
    return labels | _fresh(town, rng, settings)


def _origin(point: float, settings: WebSettings) -> str:
    """What kind of page a uniform number in [0, 1) asks for."""
    shares = {
        "spam": settings.spam, "foreign": settings.foreign,
        "exact": settings.exact_duplicates, "near": settings.near_duplicates,
    }  # fmt: skip
    for origin, share in shares.items():
        if point < share:
            return origin
        point -= share
    return "fresh"


def _encoding(rng: random.Random, settings: WebSettings) -> str:
    return "mojibake" if rng.random() < settings.broken else "utf-8"


def _copy(rng: random.Random, origin: str, url: str, original: dict[str, Any]) -> dict[str, Any]:
    text, edits = (original["text"], []) if origin == "exact" else web_text.near_copy(rng, original["text"])
    kept = [(kind, value) for kind, value in original["personal_data"] if value in text]
    return original | {
        "text": text, "duplicate": origin, "duplicate_of": url, "edits": edits, "personal_data": kept,
        "jaccard": web_text.shingle_jaccard(text, original["text"]),
    }  # fmt: skip


def _fresh(town: Town, rng: random.Random, settings: WebSettings) -> dict[str, Any]:
    documents = [town.sample(rng) for _ in range(1 + int(rng.random() * 4))]
    paragraphs = [document.text for document in documents]
    found = []
    if rng.random() < settings.personal_data:
        known = [resident for resident in town.residents if not resident.held_out]
        for _ in range(1 + int(rng.random() * 2)):
            kind, value, sentence = web_text.personal_data(rng, pick(rng, known).name)
            found.append((kind, value))
            paragraphs.insert(1 + int(rng.random() * len(paragraphs)), sentence)
    encoding = "utf-8"
    if rng.random() < settings.non_ascii:
        paragraphs.append(pick(rng, web_text.TYPOGRAPHIC_SENTENCES))
        encoding = _encoding(rng, settings)
    return {
        "kind": documents[0].kind, "text": "\n\n".join(paragraphs), "personal_data": found, "encoding": encoding,
    }  # fmt: skip


def _render(rng: random.Random, text: str, links: list[str]) -> str:
    """Wrap the main text into one of three page layouts."""
    paragraphs = [html.escape(part).replace("\n", "<br>\n") for part in text.split("\n\n")]
    body = "\n".join(f"<p>{part}</p>" for part in paragraphs)
    layout = pick(rng, ("article", "forum", "table"))
    if layout == "article":
        main = f"<main><article>\n{body}\n</article></main>"
    elif layout == "forum":
        posts = "\n".join(f'<div class="post"><p>{part}</p></div>' for part in paragraphs)
        main = f'<div id="content" class="thread">\n{posts}\n</div>'
    else:
        main = f'<table class="layout"><tr><td class="text">\n{body}\n</td></tr></table>'
    start = int(rng.random() * 4)
    menu = "".join(f'<li><a href="/{i}">{item}</a></li>' for i, item in enumerate(_MENU[start : start + 5]))
    related = "".join(
        f'<li><a href="{link}">{html.escape(link.rsplit("/", 1)[1])}</a></li>' for link in links
    )
    return (
        '<!DOCTYPE html>\n<html>\n<head><meta charset="utf-8"><title>A page of the town</title>\n'
        f"<style>.post {{ margin: {start}em; }}</style>\n"
        f"<script>window.visits = {int(rng.random() * 10_000)};</script></head>\n<body>\n"
        f'<nav><ul>{menu}</ul></nav>\n<div class="banner">{pick(rng, _BANNERS)}</div>\n{main}\n'
        f'<aside><h3>Related pages</h3><ul class="related">{related}</ul></aside>\n'
        f"<footer>{pick(rng, _FOOTERS)}</footer>\n</body>\n</html>\n"
    )
