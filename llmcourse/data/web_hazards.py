"""What a crawler meets beside good pages, one small function for each, with what it should make of it.

`serve` of `web_server` puts these under `/hazards/` of the site; each is linked from the site's index.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

MAIN_TEXT = "This page was written with care, and it says what happened in the town on that day."
"""the main text of a hazard that has one"""


@dataclass(frozen=True, kw_only=True)
class Resource:
    """How the server answers one address.

    Attributes:
        kind: name of the hazard, or "page", "index", "variant".
        outcome: what a careful crawler should count the address as (an outcome of `crawling`); None where that
            depends on its limits.
        status: of the HTTP response.
        body: of the HTTP response.
        content_type: header; None sends none.
        location: header of a redirect: a path of this site.
        failures: requests that are answered with 503 before the first that succeeds.
        delay: seconds before the answer begins.
        endless: bytes that are sent again and again until the client hangs up.
        drip: seconds between single bytes of the body, sent for ever.
        text: the true main text, or None if there is none.
    """

    kind: str
    outcome: str | None = "fetched"
    status: int = 200
    body: bytes = b""
    content_type: str | None = "text/html; charset=utf-8"
    location: str | None = None
    failures: int = 0
    delay: float = 0.0
    endless: bytes = b""
    drip: float = 0.0
    text: str | None = None


Resources = dict[str, Resource]


def page(main: str = MAIN_TEXT, *, head: str = "", links: str = "") -> bytes:
    """A small page in UTF-8 around a main text."""
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>A hazard</title>{head}</head>\n'
        f"<body><nav><a href='/'>Home</a></nav>\n<main><p>{main}</p></main>\n{links}</body></html>\n"
    ).encode()


def _redirect() -> Resources:
    return {
        "/hazards/moved.html": Resource(
            kind="redirect", outcome="redirected", status=301, location="/hazards/target.html"
        ),
        "/hazards/target.html": Resource(kind="redirect", body=page(), text=MAIN_TEXT),
    }


def _redirect_loop() -> Resources:
    """Two addresses that send to each other, and one that sends to ever new ones (see `dynamic`)."""
    hop = {"status": 302, "kind": "redirect loop"}
    return {
        "/hazards/loop-a.html": Resource(outcome="redirected", location="/hazards/loop-b.html", **hop),
        "/hazards/loop-b.html": Resource(outcome="redirect loop", location="/hazards/loop-a.html", **hop),
        "/hazards/hops?n=0": Resource(outcome="redirected", location="/hazards/hops?n=1", **hop),
    }


def _missing() -> Resources:
    return {
        "/hazards/missing.html": Resource(kind="missing", outcome="missing", status=404, body=b"not here"),
        "/hazards/gone.html": Resource(kind="missing", outcome="missing", status=410, body=b"gone"),
    }


def _unavailable() -> Resources:
    """One address that succeeds after two failures, one that never does."""
    return {
        "/hazards/busy.html": Resource(kind="unavailable", failures=2, body=page(), text=MAIN_TEXT),
        "/hazards/error.html": Resource(kind="unavailable", outcome="failed", status=500, body=b"error"),
    }


def _slow() -> Resources:
    """A page that takes a while, and one that comes a byte at a time and never ends."""
    return {
        "/hazards/slow.html": Resource(kind="slow", delay=0.2, body=page(), text=MAIN_TEXT),
        "/hazards/drip.html": Resource(kind="slow", outcome="failed", drip=0.02, body=b"<p>slowly"),
    }


def _endless() -> Resources:
    chunk = b"<p>" + b"and so on " * 800
    return {"/hazards/endless.html": Resource(kind="endless", outcome="too large", endless=chunk)}


def _binary() -> Resources:
    image = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)) * 8
    return {
        "/hazards/archive.bin": Resource(
            kind="binary", outcome="not html", body=image, content_type="application/octet-stream"
        ),
        "/hazards/photo.html": Resource(
            kind="binary", outcome="not html", body=image, content_type="text/html"
        ),
    }


def _charset() -> Resources:
    """Pages whose headers are wrong, or that need a guess."""
    text = "The café’s menu is “new”, it starts at £4 – and the crêpes come after nine o’clock."
    undeclared = f"<html><body><main><p>{text}</p></main></body></html>".encode("cp1252")
    return {
        "/hazards/wrong-charset.html": Resource(
            kind="charset", body=page(text), content_type="text/html; charset=iso-8859-1", text=text
        ),
        "/hazards/no-charset.html": Resource(
            kind="charset", body=undeclared, content_type="text/html", text=text
        ),
        "/hazards/no-such-charset.html": Resource(
            kind="charset", body=page(text), content_type="text/html; charset=utf-99", text=text
        ),
        "/hazards/no-type.html": Resource(kind="charset", body=page(text), content_type=None, text=text),
    }


def _malformed() -> Resources:
    broken = f"<p><b>Unclosed <div <a href=/hazards/target.html'>x</a><table><p>{MAIN_TEXT}</i></ul>&#0;<"
    return {"/hazards/malformed.html": Resource(kind="malformed", body=broken.encode())}


def _empty() -> Resources:
    return {"/hazards/empty.html": Resource(kind="empty")}


def _canonical() -> Resources:
    """A copy of a page that names the original as its canonical address."""
    head = '<link rel="canonical" href="/hazards/original.html">'
    return {
        "/hazards/print.html": Resource(
            kind="canonical", outcome="duplicate", body=page(head=head), text=MAIN_TEXT
        ),
        "/hazards/original.html": Resource(kind="canonical", body=page(head=head), text=MAIN_TEXT),
    }


def _trap() -> Resources:
    """A calendar whose every month links to the next, and a folder that contains itself (see `dynamic`)."""
    return {
        "/hazards/calendar?month=0": Resource(kind="trap", body=_month(0)),
        "/hazards/deep/": Resource(kind="trap", body=_deeper()),
    }


def _month(n: int) -> bytes:
    return page(f"Nothing happens in month {n}.", links=f'<a href="/hazards/calendar?month={n + 1}">next</a>')


def _deeper() -> bytes:
    return page("The same page, one folder deeper.", links='<a href="deep/">deeper</a>')


def _robots() -> Resources:
    """Pages under /private/, which robots.txt disallows."""
    return {"/private/notes.html": Resource(kind="robots", outcome="robots", body=page())}


def _variants() -> Resources:
    """A page whose parameters the index gives in two orders; `variants` has more spellings of other pages."""
    return {"/hazards/search?a=1&b=2": Resource(kind="variants", body=page(), text=MAIN_TEXT)}


_MAKERS: dict[str, Callable[[], Resources]] = {
    "redirect": _redirect, "redirect loop": _redirect_loop, "missing": _missing, "unavailable": _unavailable,
    "slow": _slow, "endless": _endless, "binary": _binary, "charset": _charset, "malformed": _malformed,
    "empty": _empty, "canonical": _canonical, "trap": _trap, "robots": _robots, "variants": _variants,
}  # fmt: skip
HAZARDS: tuple[str, ...] = tuple(_MAKERS)
"""names of all hazards"""


def resources(kind: str) -> Resources:
    """The addresses of one kind of hazard, as paths, and how they are answered."""
    return _MAKERS[kind]()


def dynamic(path: str, kinds: frozenset[str]) -> Resource | None:
    """The answer to a path of which there are endlessly many, or None if it is no such path."""
    base, _, number = path.rpartition("=")
    if "redirect loop" in kinds and base == "/hazards/hops?n" and number.isdigit():
        target = f"/hazards/hops?n={int(number) + 1}"
        return Resource(kind="redirect loop", outcome=None, status=302, location=target)
    if "trap" in kinds and base == "/hazards/calendar?month" and number.isdigit():
        return Resource(kind="trap", outcome=None, body=_month(int(number)))
    if "trap" in kinds and path.startswith("/hazards/deep/"):
        return Resource(kind="trap", outcome=None, body=_deeper())
    return None


def variants(path: str) -> list[str]:
    """Other spellings of the address of a good page, all of them the same page to a careful crawler.

    The last one has "http://HOST", for the caller to replace by the site's address in upper case.
    """
    return [
        f"{path}#comments",
        f"{path}?utm_source=newsletter&utm_medium=mail",
        f"{path}?fbclid=abc123",
        path.replace("/", "/./", 1),
        f"/other/..{path}",
        f"{path[:-5]}%2Ehtml",
        f"http://HOST{path}",
    ]
