"""A polite crawler: addresses from links, one request at a time, everything counted, able to go on after a kill.

It does what RFC 9309 and good manners ask: says who it is, obeys robots.txt, waits between requests to a host, backs
off when a host is in trouble. It protects itself too: it stays on the hosts it was given, spells each address in one
way, and bounds the size, the time, the redirects and the depth of what it takes. Sites need no ill will to need that:
a calendar that links to its next month is an endless site.

    with serve(web_dump(town, 300)) as site:
        report = crawl([site.url], folder, CrawlSettings(delay=0.01))
    texts = [extract(page.body, url=page.url, content_type=page.content_type).text for page in read_crawl(folder)]
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from llmcourse.data.canonical_urls import canonical_url
from llmcourse.data.crawl_fetch import REDIRECTS, Answer, Fetcher
from llmcourse.data.crawl_store import CrawlStore, Entry, Fetched, address_outcomes, read_crawl
from llmcourse.data.encoding import decode_html
from llmcourse.data.html_tree import PageLinks, find_links, parse_html
from llmcourse.data.robots import FORBIDDEN, MAX_BYTES, Robots, parse_robots
from llmcourse.runtime import progress

__all__ = [
    "OUTCOMES", "CrawlReport", "CrawlSettings", "Fetched", "address_outcomes", "canonical_url", "crawl", "read_crawl",
]  # fmt: skip

OUTCOMES: dict[str, str] = {
    "fetched": "an HTML page, stored",
    "duplicate": "stored, but it names another fetched page as its canonical address",
    "redirected": "it sent to another address, which was put in line or was known",
    "redirect loop": "it sent back to where it was reached from, or was one redirect too many",
    "robots": "robots.txt disallows it, or could not be had",
    "missing": "a 4xx status that does not pass by itself, or another that is not 200",
    "failed": "5xx, 429, time-outs or broken connections on every try",
    "too large": "more bytes than allowed",
    "not html": "another type by its header, or binary by its content",
    "outside": "a redirect that led off the allowed hosts, or nowhere",
    "waiting": "in line when the crawl ended at its page limit, or was stopped",
}
"""what can come of an address, and what that means"""
_ROBOTS_SECONDS = 24 * 3600  # a robots.txt is not to be used for longer (RFC 9309, section 2.4)
_ROBOTS_REDIRECTS = 5  # to be followed at least (section 2.3.1.2)


@dataclass(frozen=True, kw_only=True)
class CrawlSettings:
    """How politely and how far to crawl.

    Raises:
        ValueError: an empty user_agent, a negative number, or 0 where at least something is needed.
    """

    user_agent: str = "llmcourse-crawler/1.0 (teaching; one request at a time)"
    """who asks: the name that robots.txt is searched for, a version, and how to reach you when it is not localhost"""
    delay: float = 1.0
    """seconds between the end of one request to a host and the next; more if robots.txt asks for more"""
    obey_robots: bool = True
    """whether to keep to robots.txt; switch off on your own sites only"""
    timeout: float = 10.0
    """seconds to wait for a connection and for each further piece of an answer"""
    max_seconds: float = 60.0
    """seconds for a whole page"""
    max_bytes: int = 2_000_000
    """bytes of a page's body"""
    max_redirects: int = 5
    """redirects in a row"""
    retries: int = 3
    """further tries after one that failed in a way that may pass"""
    backoff: float = 1.0
    """seconds before the first retry, doubled for each further one; more if Retry-After asks for more"""
    max_wait: float = 300.0
    """seconds that the crawler lets a site make it wait: a Crawl-delay counts as at most this, a Retry-After beyond
    makes the address fail"""
    max_pages: int = 10_000
    """pages to fetch in all; a later call with more goes on"""
    max_depth: int = 50
    """links between a seed and a page"""
    max_path_depth: int = 8
    """slashes in an address's path"""
    max_pages_per_folder: int = 1_000
    """addresses taken from one folder of a site; those with a query count for their path: it bounds endless traps"""

    def __post_init__(self) -> None:
        """Check every field."""
        if not self.user_agent.strip():
            raise ValueError("user_agent='': say who is asking")
        for name, value in vars(self).items():
            least = 1 if name in ("max_bytes", "max_pages", "max_path_depth", "max_pages_per_folder") else 0
            if isinstance(value, int | float) and value < least:
                raise ValueError(f"{name}={value}: use {least} or more")
        if self.timeout == 0 or self.max_seconds == 0:
            raise ValueError(f"timeout={self.timeout}, max_seconds={self.max_seconds}: use more than 0")


@dataclass(frozen=True, kw_only=True)
class CrawlReport:
    """What came of a crawl, over all its calls.

    Attributes:
        outcomes: addresses by outcome (a key of `OUTCOMES`); each address has one, so they sum to the addresses known.
        links: what became of the links and redirects found: "new" (put in line), "known" (in line before),
            "respelled" (known, but written in another way), "outside" (another host), "limit" (too deep, or one too
            many of a folder), "invalid" (no http address).
        requests: sent in this call, retries and robots.txt included.
        bytes: of the bodies stored in this call.
        seconds: that this call took.
    """

    outcomes: dict[str, int]
    links: dict[str, int]
    requests: int
    bytes: int
    seconds: float


def crawl(
    seeds: Sequence[str],
    folder: str | Path,
    settings: CrawlSettings | None = None,
    *,
    allowed_hosts: Collection[str] | None = None,
    show_progress: bool = True,
) -> CrawlReport:
    """Fetch the seeds and what they link to, breadth first, into a folder; go on if the folder has begun.

    A crawl that was killed and is called again fetches what a crawl in one go would have. With several hosts, whose
    turns depend on their speed, that holds as long as no limit binds.

    Args:
        seeds: where to begin.
        folder: for the pages and the state, created if absent; `read_crawl` reads it.
        settings: None is `CrawlSettings()`.
        allowed_hosts: hosts with their port unless it is the default one, such as "127.0.0.1:8000"; None allows the
            seeds' own.
        show_progress: whether to draw a bar.

    Raises:
        ValueError: no seed, one that is no http address or on no allowed host, or a folder that holds a crawl from
            other seeds or with other limits, or is in use.
    """
    settings = settings or CrawlSettings()
    urls = [canonical_url(seed) for seed in seeds]
    hosts = frozenset(map(str.lower, allowed_hosts)) if allowed_hosts else frozenset(map(_host_of, urls))
    if not urls:
        raise ValueError("seeds=[]: give at least one address to begin with")
    if wrong := [url for url in urls if _host_of(url) not in hosts]:
        raise ValueError(f"seeds: {wrong[0]} is on none of the allowed hosts {sorted(hosts)}")
    fetcher = Fetcher(settings.user_agent, timeout=settings.timeout, max_seconds=settings.max_seconds)
    with CrawlStore(Path(folder)) as store, fetcher:
        run = _Crawl(store, fetcher, settings, hosts)
        return run.go(urls, show_progress)


class _Crawl:
    """One call of `crawl`: who may be asked, and when."""

    def __init__(
        self, store: CrawlStore, fetcher: Fetcher, settings: CrawlSettings, hosts: frozenset[str]
    ) -> None:
        self.store, self.fetcher, self.settings, self.hosts = store, fetcher, settings, hosts
        self.robots: dict[str, Robots] = {}
        # seconds since 1970; a crawl that goes on cannot know when its last request was, so it waits first
        self.free: dict[str, float] = dict.fromkeys(
            hosts, time.time() + settings.delay if store.counts() else 0.0
        )
        self.bytes = 0

    def go(self, seeds: Sequence[str], show_progress: bool) -> CrawlReport:
        start = time.perf_counter()
        limits = ("max_depth", "max_path_depth", "max_pages_per_folder", "max_redirects", "obey_robots")
        self.store.check_same(
            {"seeds": list(seeds), "hosts": sorted(self.hosts)}
            | {k: getattr(self.settings, k) for k in limits}
        )
        if not self.store.counts():
            with self.store.db:
                for seed in seeds:
                    self._offer(seed, depth=0)
        fetched = self.store.fetched()
        with progress(total=None, description="crawling", unit="page", enabled=show_progress) as bar:
            while fetched < self.settings.max_pages and (entry := self._next()):
                kept = self._visit(entry)
                fetched += kept
                bar.update(kept)
        links = {name.removeprefix("link "): n for name, n in self.store.counts().items()}
        return CrawlReport(
            outcomes=self.store.outcomes(),
            links=links,
            requests=self.fetcher.requests,
            bytes=self.bytes,
            seconds=time.perf_counter() - start,
        )

    def _next(self) -> Entry | None:
        """The address whose turn comes first."""
        waiting = self.store.waiting()
        return min(waiting, key=lambda e: (max(e.ready, self.free[e.host]), e.depth, e.id), default=None)

    def _visit(self, entry: Entry) -> bool:
        """Ask for one address and commit what came of it; whether a page was stored."""
        if not self._rules(entry.host, entry.url).allows(entry.url):
            with self.store.db:
                self.store.finish(entry, "robots")
            return False
        self._wait(max(entry.ready, self.free[entry.host]))
        answer = self.fetcher.get(entry.url, max_bytes=self.settings.max_bytes)
        self._release(entry.host, answer)
        with self.store.db:
            return self._record(entry, answer)

    def _record(self, entry: Entry, answer: Answer) -> bool:
        """Note what an answer means, inside a transaction."""
        if answer.status == 200 and answer.problem is None:
            self._keep(entry, answer)
            return True
        if answer.status in REDIRECTS:
            self._redirect(entry, answer.location)
        elif answer.may_pass:
            self._retry(entry, answer)
        else:
            self.store.finish(entry, answer.problem or "missing", answer.status)
        return False

    def _keep(self, entry: Entry, answer: Answer) -> None:
        found = _links_of(entry.url, answer)
        canonical = _canonical_or_none(found.canonical)
        self.store.keep(entry, answer.content_type, answer.body, canonical)
        self.bytes += len(answer.body)
        for link in (*found.links, *filter(None, [found.canonical])):
            self._offer(link, depth=entry.depth + 1)

    def _redirect(self, entry: Entry, location: str | None) -> None:
        target = _canonical_or_none(location)
        if target is None or _host_of(target) not in self.hosts:
            outcome = "outside"
            self.store.count("link invalid" if target is None else "link outside")
        elif self.store.redirect(entry, target) or entry.hops >= self.settings.max_redirects:
            outcome = "redirect loop"
        else:
            outcome = "redirected"
            self._offer(location or "", depth=entry.depth, hops=entry.hops + 1)
        self.store.finish(entry, outcome)

    def _retry(self, entry: Entry, answer: Answer) -> None:
        """Put an address off, each time for twice as long, or give it up."""
        wait = max(self.settings.backoff * 2**entry.attempts, answer.retry_after or 0.0)
        if entry.attempts >= self.settings.retries or wait > self.settings.max_wait:
            self.store.finish(entry, "failed", answer.status)
        else:
            self.store.postpone(entry, time.time() + wait)

    def _offer(self, link: str, *, depth: int, hops: int = 0) -> None:
        """Put an address in line, or count why not."""
        url = _canonical_or_none(link)
        if url is None:
            verdict = "invalid"
        elif (host := _host_of(url)) not in self.hosts:
            verdict = "outside"
        elif self.store.knows(url):
            verdict = "known" if link == url else "respelled"
        elif not self._within_limits(url, depth):
            verdict = "limit"
        else:
            verdict = "new"
            self.store.add(url, host, depth, hops)
        self.store.count(f"link {verdict}")

    def _within_limits(self, url: str, depth: int) -> bool:
        parts = urlsplit(url)
        if depth > self.settings.max_depth or parts.path.count("/") > self.settings.max_path_depth:
            return False
        inside = parts.path + "?" if parts.query else parts.path.rpartition("/")[0] + "/"
        return self.store.enter_folder(parts.netloc + inside, self.settings.max_pages_per_folder)

    def _wait(self, until: float) -> None:
        time.sleep(max(0.0, until - time.time()))

    def _release(self, host: str, answer: Answer) -> None:
        """After a request: the host is left alone for as long as we, its robots.txt or its answer ask for."""
        rules = self.robots.get(host, Robots())
        trouble = answer.retry_after if answer.may_pass else None
        pause = max(self.settings.delay, rules.crawl_delay or 0.0, trouble or 0.0)
        self.free[host] = time.time() + min(pause, max(self.settings.delay, self.settings.max_wait))

    def _rules(self, host: str, url: str) -> Robots:
        """A host's rules: from memory, from an earlier call if not too old, or asked for."""
        if not self.settings.obey_robots:
            return Robots()
        if host not in self.robots:
            row = self.store.db.execute(
                "SELECT status, robots, fetched FROM hosts WHERE host = ?", (host,)
            ).fetchone()
            if row is None or time.time() - row[2] > _ROBOTS_SECONDS:
                status, text = self._ask_rules(host, f"{urlsplit(url).scheme}://{host}/robots.txt")
                row = (status, text, time.time())
                with self.store.db:
                    self.store.db.execute("INSERT OR REPLACE INTO hosts VALUES (?, ?, ?, ?)", (host, *row))
            self.robots[host] = _rules_of(row[0], row[1], self.settings.user_agent)
            self._release(host, Answer())
        return self.robots[host]

    def _ask_rules(self, host: str, url: str) -> tuple[int, str]:
        """Status and text of robots.txt, after retries and redirects; status 0 if there was no answer."""
        tries, hops = 0, 0
        while True:
            self._wait(self.free[host])
            answer = self.fetcher.get(url, max_bytes=MAX_BYTES, html_only=False)
            self._release(host, answer)
            target = _canonical_or_none(answer.location)
            if answer.may_pass and tries < self.settings.retries:
                self._wait(time.time() + min(self.settings.max_wait, self.settings.backoff * 2**tries))
                tries += 1
            elif target and hops < _ROBOTS_REDIRECTS and _host_of(target) in self.hosts:
                url, host, hops = target, _host_of(target), hops + 1
            else:
                return answer.status, answer.body.decode("utf-8", "replace")


def _rules_of(status: int, text: str, user_agent: str) -> Robots:
    """RFC 9309, section 2.3.1: no file (4xx) allows everything, no answer and 5xx forbid everything."""
    if status == 200:
        return parse_robots(text, user_agent)
    return Robots() if 400 <= status < 500 and status != 429 else FORBIDDEN


def _links_of(url: str, answer: Answer) -> PageLinks:
    root = parse_html(decode_html(answer.body, answer.content_type).text)
    return PageLinks(links=(), canonical=None) if root is None else find_links(root, url)


def _canonical_or_none(url: str | None) -> str | None:
    try:
        return canonical_url(url) if url else None
    except ValueError:
        return None


def _host_of(url: str) -> str:
    return urlsplit(url).netloc
