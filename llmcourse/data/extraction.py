"""The main text of a web page, without its menus, banners and footers.

Two ways: `strip_tags` keeps all that a page shows, `extract` asks trafilatura (Barbaresi 2021, ACL
demonstrations), which scores the page's blocks by place, length and density of links. Both give the same form
of text: paragraphs separated by a blank line, line breaks (`<br>`) kept, so that a dialogue stays a dialogue.

trafilatura's defaults suit news articles. On the short pages of the town two things go wrong, and are set right here:

* Below 250 characters it no longer trusts its result and returns the whole page, menus included: `min_chars`.
* Its plain text does not tell a line break from a paragraph's end, and writes the text of a one-cell table, the
  layout of the early web, as one table row with all paragraphs run together. So the text is written here, from the
  tree that it returns.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from lxml import etree

from llmcourse.data.encoding import decode_html
from llmcourse.data.html_tree import find_links, parse_html, render_text

FOCUSES = ("balanced", "precision", "recall")
_HTML_PARAGRAPHS = frozenset(
    "address article aside blockquote body dd div dl dt fieldset figcaption figure footer form h1 h2 h3 h4 h5 h6 "
    "header "
    "hr main nav ol p pre section table ul".split()
)
_HTML_LINES = frozenset(("br", "li", "tr", "option"))
_INVISIBLE = ("script", "style", "template", "head", "noscript", "svg", "iframe", "object")
# What trafilatura calls these things in the tree that it returns (a subset of TEI).
_TEI_PARAGRAPHS = frozenset(("p", "head", "quote", "list", "table", "ab", "code", "div"))
_TEI_LINES = frozenset(("lb", "item", "row"))


@dataclass(frozen=True, kw_only=True)
class ExtractionSettings:
    """How `extract` reads a page.

    Raises:
        ValueError: an unknown focus, a negative min_chars, or max_bytes below 1.
    """

    focus: str = "balanced"
    """what to prefer when in doubt: "precision" (less text), "recall" (more) or "balanced" """
    fast: bool = False
    """whether to leave out the second opinions (readability, jusText) that trafilatura compares itself with"""
    tables: bool = True
    """whether tables are part of the page's text: their rows as lines, their cells separated by " | " """
    comments: bool = False
    """whether readers' comments below an article are part of its text"""
    min_chars: int = 25
    """characters below which trafilatura's own result is distrusted for the whole page's text; its default is 250"""
    max_bytes: int = 2_000_000
    """bytes of HTML (of its UTF-8, for decoded text) above which a page is dropped unread"""

    def __post_init__(self) -> None:
        """Check every field."""
        if self.focus not in FOCUSES:
            raise ValueError(f"focus={self.focus!r}: choose one of {', '.join(FOCUSES)}")
        if self.min_chars < 0:
            raise ValueError(f"min_chars={self.min_chars}: use 0 or more")
        if self.max_bytes < 1:
            raise ValueError(f"max_bytes={self.max_bytes}: use 1 or more")


@dataclass(frozen=True, kw_only=True)
class Extracted:
    """What a page says, or why it says nothing.

    Attributes:
        text: main text, paragraphs separated by a blank line; "" if dropped.
        dropped: None, or why there is no text: "empty" (no bytes, or white space), "too large", "binary" (NUL bytes or
            mostly control characters), "no element" (nothing that parses), "no text" (no main text found).
        title: content of `<title>`, or None.
        language: the `lang` that the page declares, lower case ("en", "de-at"), or None; a hint, often wrong.
        canonical: absolute address that the page names as its own, or None.
        links: absolute addresses it links to, in order, each once.
        encoding: what the bytes were decoded as; None if the page came as text.
    """

    text: str = ""
    dropped: str | None = None
    title: str | None = None
    language: str | None = None
    canonical: str | None = None
    links: tuple[str, ...] = ()
    encoding: str | None = None


def extract(
    html: bytes | str,
    *,
    url: str = "",
    content_type: str | None = None,
    settings: ExtractionSettings | None = None,
) -> Extracted:
    """Take the main text out of a page. Never raises on bad input: what cannot be read is dropped with its reason.

    Args:
        html: the page, as fetched (bytes, decoded by `decode_html`) or decoded.
        url: where it was fetched from, to make its links absolute.
        content_type: the HTTP header of that name, for bytes.
        settings: how; None is `ExtractionSettings()`.
    """
    settings = settings or ExtractionSettings()
    if reason := _unreadable(html, settings.max_bytes):
        return Extracted(dropped=reason)
    text, encoding = decode_html(html, content_type) if isinstance(html, bytes) else (html, None)
    if _is_binary(text):
        return Extracted(dropped="binary", encoding=encoding)
    root = parse_html(text)
    if root is None:
        return Extracted(dropped="no element", encoding=encoding)
    about = _about(root, url) | {"encoding": encoding}
    main = _main_text(root, settings)
    return Extracted(text=main, **about) if main else Extracted(dropped="no text", **about)


def strip_tags(html: bytes | str, content_type: str | None = None) -> str:
    """All text that a page shows, menus and footers included: the baseline that extraction must beat.

    Returns:
        Paragraphs separated by a blank line; "" for a page without any element.
    """
    text = decode_html(html, content_type).text if isinstance(html, bytes) else html
    root = parse_html(text)
    if root is None:
        return ""
    etree.strip_elements(root, *_INVISIBLE, with_tail=False)
    return render_text(root, _HTML_PARAGRAPHS, _HTML_LINES, ("td", "th"))


def _unreadable(html: bytes | str, max_bytes: int) -> str | None:
    size = len(html) if isinstance(html, bytes) else len(html.encode("utf-8", "replace"))
    if size > max_bytes:
        return "too large"
    return None if html.strip() else "empty"


def _is_binary(text: str) -> bool:
    """Whether the first 4 096 characters hold a NUL or are for a tenth control characters or undecodable."""
    head = text[:4096]
    odd = sum(1 for c in head if (c < " " and c not in "\t\n\r\f") or c == "\ufffd")
    return "\0" in head or odd > len(head) / 10


def _about(root: etree._Element, url: str) -> dict[str, Any]:
    found = find_links(root, url)
    title = next((" ".join(e.text_content().split()) for e in root.iter("title")), "")
    return {
        "title": title or None,
        "language": (root.get("lang") or "").strip().lower() or None,
        "canonical": found.canonical,
        "links": found.links,
    }


def _main_text(root: etree._Element, settings: ExtractionSettings) -> str:
    """trafilatura's result as text; `root` is changed."""
    bare_extraction, options = _trafilatura(settings)
    document = bare_extraction(root, options=copy.copy(options))
    if document is None:
        return ""
    bodies = [document.body, document.commentsbody] if settings.comments else [document.body]
    texts = [render_text(body, _TEI_PARAGRAPHS, _TEI_LINES, ("cell",)) for body in bodies if body is not None]
    return "\n\n".join(filter(None, texts))


@functools.cache
def _trafilatura(settings: ExtractionSettings) -> tuple[Any, Any]:
    """trafilatura's function and its options; imported here because it takes most of a second."""
    from trafilatura import bare_extraction
    from trafilatura.settings import Extractor, use_config

    # it logs every page without text as a warning; here such a page is counted by whoever called
    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)
    config = use_config()
    config.set("DEFAULT", "MIN_EXTRACTED_SIZE", str(settings.min_chars))
    options = Extractor(
        config=config,
        fast=settings.fast,
        precision=settings.focus == "precision",
        recall=settings.focus == "recall",
        comments=settings.comments,
        tables=settings.tables,
    )
    return bare_extraction, options


@dataclass(frozen=True)
class Overlap:
    """How much of what was found is true, as counts, so that the scores of pages can be added.

    Attributes:
        matched: items that are in both, each as often as in the one that has fewer of it.
        found: items in the extracted text.
        true: items in the true text.
    """

    matched: int
    found: int
    true: int

    @property
    def precision(self) -> float:
        """Part of what was found that is true; nan if nothing was found."""
        return self.matched / self.found if self.found else math.nan

    @property
    def recall(self) -> float:
        """Part of what is true that was found; nan if nothing is true."""
        return self.matched / self.true if self.true else math.nan

    @property
    def f1(self) -> float:
        """Harmonic mean of both, 2 matched / (found + true); nan if there is nothing in either."""
        return 2 * self.matched / (self.found + self.true) if self.found + self.true else math.nan

    def __add__(self, other: Overlap) -> Overlap:
        """The overlap of two pages taken together."""
        return Overlap(self.matched + other.matched, self.found + other.found, self.true + other.true)


@dataclass(frozen=True)
class ExtractionScore:
    """How well text was extracted; scores of pages can be added with `+`.

    Attributes:
        words: over the multisets of words (between white space), blind to their order and to line breaks.
        lines: over the multisets of lines that are not blank, white space inside taken as one space.
        exact: pages whose text, borders of lines and paragraphs included, is the true one; 0 or 1 of a page.
        pages: 1, or how many were added.
    """

    words: Overlap
    lines: Overlap
    exact: int
    pages: int = 1

    def __add__(self, other: ExtractionScore) -> ExtractionScore:
        """The score of two sets of pages together: a micro average, in which long pages weigh more."""
        return ExtractionScore(
            self.words + other.words,
            self.lines + other.lines,
            self.exact + other.exact,
            self.pages + other.pages,
        )


def score_extraction(extracted: str, truth: str) -> ExtractionScore:
    """Compare extracted text with the true main text; a dropped page is scored as ""."""
    return ExtractionScore(
        _overlap(extracted.split(), truth.split()),
        _overlap(_lines(extracted), _lines(truth)),
        int(extracted.strip() == truth.strip()),
    )


def _lines(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.split("\n") if line.strip()]


def _overlap(found: list[str], true: list[str]) -> Overlap:
    return Overlap((Counter(found) & Counter(true)).total(), len(found), len(true))
