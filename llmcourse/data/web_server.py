"""A web site on this machine, made of a web dump, for crawlers to be tried on without bothering anybody.

The dump's hosts become folders: `https://gazette.example/news/3.html` is served as
`http://localhost:PORT/gazette/news/3.html`, with links to match. Beside the dump's pages there are hazards, each with
the outcome that a careful crawler should have, and a log of all requests with their times, from which politeness can be
proven: no request inside what robots.txt disallows, none too soon after the last.
"""

from __future__ import annotations

import html
import re
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from llmcourse.data import web_hazards
from llmcourse.data.web_dump import WebPage
from llmcourse.data.web_hazards import HAZARDS, Resource

_DUMP_HOST = re.compile(r"https://([a-z]+)\.example/")


@dataclass(frozen=True, kw_only=True)
class SiteSettings:
    """What the site serves beside the pages, and what its robots.txt says.

    Raises:
        ValueError: an unknown hazard, a disallowed prefix that does not begin with "/", or a negative number.
    """

    hazards: tuple[str, ...] = HAZARDS
    """names out of `HAZARDS`"""
    disallow: tuple[str, ...] = ("/private/",)
    """beginnings of paths that robots.txt forbids to everybody, such as "/board/" for one of the dump's sites"""
    crawl_delay: float = 0.0
    """seconds between requests that robots.txt asks for; 0 asks for nothing"""
    retry_after: int = 0
    """seconds that the Retry-After header of a 503 asks for"""

    def __post_init__(self) -> None:
        """Check every field."""
        if unknown := set(self.hazards) - set(HAZARDS):
            raise ValueError(f"hazards={sorted(unknown)}: choose from {', '.join(HAZARDS)}")
        if wrong := [prefix for prefix in self.disallow if not prefix.startswith("/")]:
            raise ValueError(f"disallow={wrong}: begin each with '/'")
        if self.crawl_delay < 0 or self.retry_after < 0:
            raise ValueError(f"crawl_delay={self.crawl_delay}, retry_after={self.retry_after}: use 0 or more")

    def robots_txt(self, sitemap: str) -> str:
        """The text of robots.txt."""
        lines = ["User-agent: *", *(f"Disallow: {prefix}" for prefix in self.disallow)]
        if self.crawl_delay:
            lines.append(f"Crawl-delay: {self.crawl_delay:g}")
        return "\n".join([*lines, f"Sitemap: {sitemap}", ""])


@dataclass(frozen=True)
class Request:
    """One request as the server saw it.

    Attributes:
        time: seconds on `time.monotonic`, when it arrived.
        path: with its query.
        status: of the response.
        user_agent: header, "" if none.
    """

    time: float
    path: str
    status: int
    user_agent: str


@dataclass(frozen=True)
class Site:
    """A running site.

    Attributes:
        url: its index page, which links to everything: the place to begin a crawl.
        truth: for each address that the index links to, canonical, how it is answered and what a careful crawler
            should count it as. Traps lead to addresses that are not in it.
        pages: the dump's pages by their addresses here.
        log: requests in the order of their arrival, growing.
    """

    url: str
    truth: dict[str, Resource]
    pages: dict[str, WebPage]
    log: list[Request] = field(default_factory=list)

    def addresses(self, outcome: str) -> set[str]:
        """Addresses that should have this outcome."""
        return {url for url, resource in self.truth.items() if resource.outcome == outcome}


@contextmanager
def serve(pages: Iterable[WebPage], *, settings: SiteSettings | None = None, port: int = 0) -> Iterator[Site]:
    """Serve pages of a web dump on this machine only, for as long as the `with` block runs.

    Args:
        pages: of `web_dump`.
        settings: hazards and robots.txt; None is `SiteSettings()`, all hazards.
        port: 0 takes a free one.
    """
    settings = settings or SiteSettings()
    server = _Server(("127.0.0.1", port), _Handler)
    site = _build(list(pages), settings, f"http://127.0.0.1:{server.server_port}")
    server.open_site(site, settings)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


def _build(pages: list[WebPage], settings: SiteSettings, root: str) -> Site:
    """Lay out the site: addresses, answers, index."""
    found: dict[str, Resource] = {}
    by_url: dict[str, WebPage] = {}
    for page in pages:
        path = _DUMP_HOST.sub(r"/\1/", page.url)
        body = _DUMP_HOST.sub(r"/\1/", page.html).encode()
        found[path] = Resource(kind="page", body=body, text=page.labels.get("text"))
        by_url[root + path] = page
    for menu in range(8):  # where the menus of the dump's pages lead
        found[f"/{menu}"] = Resource(kind="missing", outcome="missing", status=404, body=b"not here")
    for kind in settings.hazards:
        found |= web_hazards.resources(kind)
    allowed = {
        path: replace(resource, outcome="robots") if path.startswith(settings.disallow) else resource
        for path, resource in found.items()
    }
    links = [*found, *(_variants(pages, root) if "variants" in settings.hazards else ())]
    index = Resource(kind="index", body=_index(links))
    truth = {root + path: resource for path, resource in {"/": index, **allowed}.items()}
    return Site(url=f"{root}/", truth=truth, pages=by_url)


def _variants(pages: list[WebPage], root: str) -> list[str]:
    """Other spellings of the first three pages' addresses and of the search page's."""
    paths = [_DUMP_HOST.sub(r"/\1/", page.url) for page in pages[:3]]
    return [
        "/hazards/search?b=2&a=1",
        *(link.replace("http://HOST", root.upper()) for path in paths for link in web_hazards.variants(path)),
    ]


def _index(links: Iterable[str]) -> bytes:
    items = "\n".join(f'<li><a href="{html.escape(link)}">{html.escape(link)}</a></li>' for link in links)
    return f"<!DOCTYPE html>\n<html><head><title>Index</title></head><body><ul>\n{items}\n</ul></body></html>".encode()


class _Server(ThreadingHTTPServer):
    """Holds what its handlers need."""

    daemon_threads = True

    def open_site(self, site: Site, settings: SiteSettings) -> None:
        self.site, self.settings, self.closing = site, settings, threading.Event()
        self.root = site.url.removesuffix("/")
        self.lock, self.failed = threading.Lock(), Counter[str]()
        plain = "text/plain; charset=utf-8"
        entries = "".join(f"<url><loc>{html.escape(url)}</loc></url>" for url in site.truth)
        sitemap = f'<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">{entries}</urlset>'.encode()
        robots = settings.robots_txt(f"{self.root}/sitemap.xml").encode()
        self.extra = {
            "/robots.txt": Resource(kind="robots.txt", body=robots, content_type=plain),
            "/sitemap.xml": Resource(kind="sitemap", body=sitemap, content_type="application/xml"),
        }

    def answer(self, path: str) -> Resource:
        """What the address gives this time."""
        resource = self.extra.get(path) or self.site.truth.get(self.root + path)
        resource = resource or web_hazards.dynamic(path, frozenset(self.settings.hazards))
        if resource is None:
            return Resource(kind="missing", status=404, body=b"no such page", content_type="text/plain")
        with self.lock:
            self.failed[path] += 1
            if self.failed[path] <= resource.failures:
                return replace(resource, status=503, body=b"busy", content_type="text/plain")
        return resource

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing when a client hangs up, which is what it should do to endless pages."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits 40 ms for the acknowledgment of its head
    server: _Server

    def do_GET(self) -> None:
        if self.server.closing.is_set():  # a connection that was kept open outlives the site
            self.close_connection = True
            return
        arrived = time.monotonic()
        resource = self.server.answer(self.path)
        agent = self.headers.get("User-Agent", "")
        with self.server.lock:
            self.server.site.log.append(Request(arrived, self.path, resource.status, agent))
        self.server.closing.wait(resource.delay)
        self._head(resource)
        if resource.endless or resource.drip:
            self._stream(resource)
        else:
            self.wfile.write(resource.body)

    def _head(self, resource: Resource) -> None:
        self.send_response(resource.status)
        if resource.content_type:
            self.send_header("Content-Type", resource.content_type)
        if resource.location:
            self.send_header("Location", resource.location)
        if resource.status == 503:
            self.send_header("Retry-After", str(self.server.settings.retry_after))
        if resource.endless or resource.drip:
            self.send_header(
                "Connection", "close"
            )  # no length: the end of the connection is the end of the page
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(len(resource.body)))
        self.end_headers()

    def _stream(self, resource: Resource) -> None:
        """Send for ever: until the client hangs up or the site closes."""
        self.wfile.write(resource.body)
        while not self.server.closing.wait(resource.drip):
            self.wfile.write(resource.endless or b".")

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the screen: requests are in `Site.log`."""
