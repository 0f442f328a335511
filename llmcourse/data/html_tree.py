"""A page as a tree: parsing that never fails, plain text with its line and paragraph borders, links."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

from lxml import etree
from lxml import html as lxml_html

_SPACES = re.compile(r"[ \t\r\n\f]+")  # HTML's white space; a no-break space is a letter here
_LINE_BORDER = re.compile(r"[ \t]*\n[ \t]*")
_MANY_SPACES = re.compile(r" {2,}")
_MANY_LINES = re.compile(r"\n{3,}")


@dataclass(frozen=True, kw_only=True)
class PageLinks:
    """Where a page points to.

    Attributes:
        links: absolute http(s) addresses of its anchors in order, each once; none that it asks not to follow
            (`rel=nofollow`, `<meta name=robots content=nofollow>`).
        canonical: the absolute address that it names as its own (RFC 6596, 2012), or None.
    """

    links: tuple[str, ...]
    canonical: str | None


def parse_html(text: str) -> lxml_html.HtmlElement | None:
    """Parse a page, however malformed.

    Returns:
        Its root element, or None if there is no element to be had: an empty page, or nothing but comments.
    """
    parser = lxml_html.HTMLParser(encoding="utf-8", remove_comments=True, remove_pis=True)
    # libxml2 ends a page at a NUL, browsers do not; lone surrogates cannot be written as UTF-8
    source = text.replace("\0", "").encode("utf-8", "replace")
    try:
        return lxml_html.document_fromstring(source, parser=parser) if source.strip() else None
    except etree.ParserError:
        return None


def render_text(
    root: etree._Element, paragraphs: Collection[str], lines: Collection[str], cells: Collection[str]
) -> str:
    """Text of a tree with the borders that a reader sees.

    Args:
        root: the element to read.
        paragraphs: tags set apart by a blank line.
        lines: tags that begin on a new line; an empty one, such as `br`, is a line break.
        cells: tags separated from the one before them by " | ".

    Returns:
        Paragraphs separated by one blank line, without white space at the ends of lines. Line breaks in the source are
        spaces, as HTML has it.
    """
    parts: list[str] = []
    for event, element in etree.iterwalk(root, events=("start", "end")):
        if element.tag in paragraphs:
            parts.append("\n\n")
        elif element.tag in lines and event == "start":
            parts.append("\n")
        elif element.tag in cells and event == "start" and element.getprevious() is not None:
            parts.append(" | ")
        inside = element.text if event == "start" else element.tail
        if inside and (event == "start" or element is not root):
            parts.append(_SPACES.sub(" ", inside))
    text = _LINE_BORDER.sub("\n", _MANY_SPACES.sub(" ", "".join(parts)))
    return _MANY_LINES.sub("\n\n", text).strip(" \n")


def find_links(root: etree._Element, url: str) -> PageLinks:
    """Links of a page that was fetched from `url`; addresses that no parser understands are left out."""
    base = _absolute(next(iter(root.xpath("//base/@href")), ""), url) or url
    canonical = next(
        (e.get("href") for e in root.iter("link") if "canonical" in _words(e.get("rel")) and e.get("href")),
        None,
    )
    meta = (e.get("content") for e in root.iter("meta") if (e.get("name") or "").lower() == "robots")
    anchors = (
        [] if any({"nofollow", "none"} & _words(content) for content in meta) else root.iter("a", "area")
    )
    found = (_absolute(e.get("href"), base) for e in anchors if "nofollow" not in _words(e.get("rel")))
    return PageLinks(
        links=tuple(dict.fromkeys(link for link in found if link)),
        canonical=_absolute(canonical, base),
    )


def _words(attribute: str | None) -> set[str]:
    return set((attribute or "").lower().replace(",", " ").split())


def _absolute(href: str | None, base: str) -> str | None:
    """The http(s) address that `href` means on a page at `base`, or None."""
    if href is None or not href.strip():
        return None
    try:
        url = urljoin(base, href.strip())
        parts = urlsplit(url)
        return url if parts.scheme in ("http", "https") and parts.hostname else None
    except ValueError:  # such as an unclosed IPv6 bracket
        return None
