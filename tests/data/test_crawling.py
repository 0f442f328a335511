"""A crawler against a site with every hazard: polite, bounded, complete, and able to go on after a kill."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import time
from itertools import pairwise

import pytest

from llmcourse.data import crawl_store, crawling
from llmcourse.data.crawling import (
    OUTCOMES,
    CrawlSettings,
    address_outcomes,
    canonical_url,
    crawl,
    read_crawl,
)
from llmcourse.data.extraction import extract
from llmcourse.data.tinytown import Town
from llmcourse.data.web_dump import web_dump
from llmcourse.data.web_server import SiteSettings, serve

# Patient with a busy machine: nothing but the hazards may come to its limits.
FAST = {"delay": 0.0, "backoff": 0.02, "retries": 2, "max_pages_per_folder": 40}
QUIET = {"show_progress": False}
NO_HAZARDS = SiteSettings(hazards=())


@pytest.fixture(scope="module")
def pages():
    return list(web_dump(Town(seed=3), 60, seed=2))


@pytest.fixture(scope="module")
def crawled(pages, tmp_path_factory):
    """One crawl of a site with all hazards: (site, folder, report)."""
    folder = tmp_path_factory.mktemp("crawl")
    with serve(pages) as site:
        report = crawl([site.url], folder, CrawlSettings(**FAST, max_seconds=0.6), **QUIET)
    return site, folder, report


# --- addresses


@pytest.mark.parametrize(
    ("url", "canonical"),
    [
        ("HTTP://Example.ORG:80", "http://example.org/"),
        ("https://example.org:443/a", "https://example.org/a"),
        ("https://example.org:80/a", "https://example.org:80/a"),
        ("http://user:secret@h.example./", "http://h.example/"),
        ("http://bücher.example/", "http://xn--bcher-kva.example/"),
        ("http://[::1]:80/", "http://[::1]/"),
        ("http://h/a/./b/../c", "http://h/a/c"),
        ("http://h/a/b/..", "http://h/a/"),
        ("http://h/../../a", "http://h/a"),
        ("http://h/%2e%2E/a%2fb%7e%c3%a9", "http://h/a%2Fb~%C3%A9"),
        ("http://h/a b/é?q=%zz", "http://h/a%20b/%C3%A9?q=%25zz"),
        ("http://h/a//b/", "http://h/a//b/"),
        ("http://h/a#part", "http://h/a"),
        ("http://h/a?", "http://h/a"),
        ("http://h/a?b=2&a=1&b=1&c", "http://h/a?a=1&b=2&b=1&c"),
        ("http://h/a?utm_source=x&UTM_medium=y&gclid=1&q=5", "http://h/a?q=5"),
        ("http://h/a?q=1+2&r=%26", "http://h/a?q=1+2&r=%26"),
    ],
)
def test_canonical_addresses(url, canonical):
    assert canonical_url(url) == canonical
    assert canonical_url(canonical) == canonical


@pytest.mark.parametrize(
    "url", ["ftp://h/", "/path", "//h/", "http://", "http://h:99999/", "http://a b/", "http://[oops", "mailto:a@h",
            "http://h/" + "a" * 2048, "http://" + "ü" * 80 + "/"],
)  # fmt: skip
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ValueError, match="url "):
        canonical_url(url)


# --- what came of each address


def test_every_address_has_the_outcome_it_should(crawled):
    site, folder, report = crawled
    outcomes = address_outcomes(folder)
    wrong = {
        url: outcomes.get(url) for url, truth in site.truth.items() if outcomes.get(url) != truth.outcome
    }
    assert not wrong
    assert set(report.outcomes) <= set(OUTCOMES) and "waiting" not in report.outcomes
    assert sum(report.outcomes.values()) == len(outcomes) == report.links["new"]
    assert report.requests == len(site.log)


def test_all_good_pages_are_there_as_they_were_sent(crawled, pages):
    site, folder, report = crawled
    fetched = {page.url: page for page in read_crawl(folder)}
    assert len(fetched) == report.outcomes["fetched"]
    assert set(site.pages) <= set(fetched)
    for url in site.pages:
        assert fetched[url].body == site.truth[url].body
        assert fetched[url].content_type == "text/html; charset=utf-8" and fetched[url].status == 200
        assert abs(fetched[url].time - time.time()) < 600
    assert report.bytes == sum(len(page.body) for page in read_crawl(folder, duplicates=True))


def test_texts_of_hazards_come_out_or_are_dropped_for_a_reason(crawled):
    site, folder, _ = crawled
    for page in read_crawl(folder):
        truth = site.truth.get(page.url)
        if truth is None or truth.kind in ("page", "index"):
            continue
        found = extract(page.body, url=page.url, content_type=page.content_type)
        if truth.kind == "empty":
            assert found.dropped == "empty"
        elif truth.text is not None and not page.url.endswith("wrong-charset.html"):
            assert found.text == truth.text


def test_spellings_of_one_address_are_fetched_once(crawled):
    site, folder, report = crawled
    # of each of three pages: a fragment, two sets of tracking parameters, an escape; and one order of parameters.
    # What only resolving a link tells (dots in a path, the case of the scheme) is not counted
    assert report.links["respelled"] == 3 * 4 + 1
    per_path = {}
    for request in site.log:
        per_path[request.path] = per_path.get(request.path, 0) + 1
    tries = {path: n for path, n in per_path.items() if n > 1}
    again = {"/hazards/busy.html": 3, "/hazards/error.html": 3, "/hazards/drip.html": 3}
    assert tries == again
    assert not any("utm_" in path or "#" in path or ".." in path for path in per_path)


def test_a_copy_that_names_its_original_is_told_apart(crawled):
    site, folder, report = crawled
    copy, original = site.url + "hazards/print.html", site.url + "hazards/original.html"
    assert report.outcomes["duplicate"] == 1
    assert original in {p.url for p in read_crawl(folder)} and copy not in {p.url for p in read_crawl(folder)}
    both = {page.url: page for page in read_crawl(folder, duplicates=True)}
    assert both[copy].canonical == original == both[original].canonical


def test_traps_are_bounded(crawled):
    site, folder, report = crawled
    outcomes = address_outcomes(folder)
    assert sum("calendar" in url for url in outcomes) == FAST["max_pages_per_folder"]
    assert (
        max(url.removeprefix(site.url).count("/") + 1 for url in outcomes) == CrawlSettings().max_path_depth
    )
    assert report.links["limit"] == 2


# --- manners


def test_robots_txt_is_obeyed_and_asked_first(crawled):
    site, _, _ = crawled
    assert site.log[0].path == "/robots.txt"
    assert not any(request.path.startswith("/private/") for request in site.log)
    assert {request.user_agent for request in site.log} == {CrawlSettings().user_agent}


def test_robots_txt_can_be_ignored_where_one_may(pages, tmp_path):
    with serve(pages[:3], settings=SiteSettings(hazards=("robots",))) as site:
        crawl([site.url], tmp_path, CrawlSettings(**FAST, obey_robots=False), **QUIET)
    assert any(request.path.startswith("/private/") for request in site.log)
    assert not any(request.path == "/robots.txt" for request in site.log)


def test_whole_sections_can_be_disallowed(pages, tmp_path):
    with serve(pages, settings=SiteSettings(hazards=(), disallow=("/gazette/", "/notes/"))) as site:
        report = crawl([site.url], tmp_path, CrawlSettings(**FAST), **QUIET)
    blocked = {url for url in site.pages if "/gazette/" in url or "/notes/" in url}
    assert blocked and {url for url, o in address_outcomes(tmp_path).items() if o == "robots"} == blocked
    assert report.outcomes["robots"] == len(blocked)


@pytest.mark.parametrize(("ours", "theirs"), [(0.03, 0.0), (0.0, 0.05)])
def test_requests_keep_their_distance(pages, tmp_path, ours, theirs):
    site_settings = SiteSettings(hazards=(), crawl_delay=theirs)
    with serve(pages[:8], settings=site_settings) as site:
        crawl([site.url], tmp_path, CrawlSettings(**FAST | {"delay": ours}), **QUIET)
    gaps = [b.time - a.time for a, b in pairwise(site.log)]
    assert len(gaps) > 8 and min(gaps) >= max(ours, theirs)


def test_retries_back_off_and_honor_retry_after(pages, tmp_path):
    with serve([], settings=SiteSettings(hazards=("unavailable",))) as site:
        crawl([site.url], tmp_path / "a", CrawlSettings(**FAST | {"backoff": 0.1, "retries": 3}), **QUIET)
    times = [request.time for request in site.log if request.path == "/hazards/error.html"]
    gaps = [b - a for a, b in pairwise(times)]
    assert len(gaps) == 3 and gaps[0] >= 0.1 and gaps[1] >= 0.2 and gaps[2] >= 0.4
    with serve([], settings=SiteSettings(hazards=("unavailable",), retry_after=1)) as site:
        report = crawl([site.url], tmp_path / "b", CrawlSettings(**FAST | {"max_wait": 0.5}), **QUIET)
    assert report.outcomes["failed"] == 2  # the page that is busy asks for more patience than we have


def test_other_hosts_are_left_alone(pages, tmp_path):
    with serve(pages[:3], settings=NO_HAZARDS) as here, serve(pages[3:6], settings=NO_HAZARDS) as there:
        report = crawl([here.url], tmp_path / "a", CrawlSettings(**FAST), **QUIET)
        assert not there.log
        hosts = [site.url.split("/")[2] for site in (here, there)]
        both = crawl(
            [here.url, there.url], tmp_path / "b", CrawlSettings(**FAST), allowed_hosts=hosts, **QUIET
        )
    assert both.outcomes["fetched"] == 8 and report.outcomes["fetched"] == 4


# --- stopping and going on


def test_a_crawl_goes_on_where_its_limit_stopped_it(pages, tmp_path):
    with serve(pages, settings=NO_HAZARDS) as site:
        first = crawl([site.url], tmp_path, CrawlSettings(**FAST, max_pages=10), **QUIET)
        assert first.outcomes["fetched"] == 10 and first.outcomes["waiting"] > 0
        assert len(list(read_crawl(tmp_path))) == 10
        last = crawl([site.url], tmp_path, CrawlSettings(**FAST), **QUIET)
    assert last.outcomes == {"fetched": 61, "missing": 8}
    assert len(site.log) == 61 + 8 + 1  # nothing asked twice, robots.txt neither


def _crawl_quietly(url, folder):
    crawl([url], folder, CrawlSettings(**FAST | {"delay": 0.01}), show_progress=False)


def test_a_crawl_that_is_killed_again_and_again_ends_with_the_same_pages(pages, tmp_path):
    fork = multiprocessing.get_context("fork")
    with serve(pages, settings=SiteSettings(hazards=("redirect", "canonical", "variants"))) as site:
        whole = tmp_path / "whole"
        crawl([site.url], whole, CrawlSettings(**FAST), **QUIET)
        asked, kills, folder = len(site.log), 0, tmp_path / "killed"
        for more in (1, 7, 15, 4, 30):
            seen = len(site.log)
            child = fork.Process(target=_crawl_quietly, args=(site.url, folder))
            child.start()
            deadline = time.monotonic() + 20
            while len(site.log) < seen + more and child.is_alive() and time.monotonic() < deadline:
                time.sleep(0.001)
            if child.is_alive():
                os.kill(child.pid, signal.SIGKILL)
                kills += 1
            child.join()
        report = crawl([site.url], folder, CrawlSettings(**FAST), **QUIET)
    assert kills >= 3
    assert address_outcomes(folder) == address_outcomes(whole)
    assert [(p.url, p.body) for p in read_crawl(folder)] == [(p.url, p.body) for p in read_crawl(whole)]
    assert sum(report.outcomes.values()) == report.links["new"]
    # a kill costs at most the page under way, twice for the answer that was never read and one robots.txt
    assert len(site.log) - asked <= asked + 3 * kills


def test_a_page_that_was_written_but_not_committed_is_cut_off(pages, tmp_path, monkeypatch):
    with serve(pages[:6], settings=NO_HAZARDS) as site:
        finish, calls = crawl_store.CrawlStore.finish, []

        def fail_at_third(self, *args):
            calls.append(args)
            if len(calls) == 3:
                raise RuntimeError("power cut")
            finish(self, *args)

        monkeypatch.setattr(crawl_store.CrawlStore, "finish", fail_at_third)
        with pytest.raises(RuntimeError, match="power cut"):
            crawl([site.url], tmp_path, CrawlSettings(**FAST), **QUIET)
        monkeypatch.undo()
        shard = tmp_path / "pages-00000.jsonl.gz"
        committed, written = len(list(read_crawl(tmp_path))), shard.stat().st_size
        crawl([site.url], tmp_path, CrawlSettings(**FAST, max_pages=committed), **QUIET)
        assert shard.stat().st_size < written
        report = crawl([site.url], tmp_path, CrawlSettings(**FAST), **QUIET)
    assert report.outcomes["fetched"] == 7
    assert {p.url for p in read_crawl(tmp_path)} == {site.url, *site.pages}


def test_pages_are_spread_over_files(pages, tmp_path, monkeypatch):
    monkeypatch.setattr(crawl_store, "SHARD_BYTES", 4000)
    with serve(pages[:20], settings=NO_HAZARDS) as site:
        crawl([site.url], tmp_path, CrawlSettings(**FAST, max_pages=15), **QUIET)
        crawl([site.url], tmp_path, CrawlSettings(**FAST), **QUIET)
    files = sorted(tmp_path.glob("pages-*.jsonl.gz"))
    assert len(files) > 2 and all(path.stat().st_size <= 4000 for path in files)
    assert {p.url for p in read_crawl(tmp_path)} == {site.url, *site.pages}


# --- errors


@pytest.mark.parametrize(
    ("status", "may"),
    [(200, False), (404, True), (403, True), (429, False), (500, False), (0, False), (301, False)],
)
def test_what_the_status_of_robots_txt_means(status, may):
    rules = crawling._rules_of(status, "User-agent: *\nDisallow: /x", "me")
    assert rules.allows("http://h/x") is may and rules.allows("http://h/y") is (may or status == 200)


def test_a_host_that_does_not_answer_is_not_crawled(pages, tmp_path):
    with serve(pages[:2], settings=NO_HAZARDS) as site:
        dead = site.url
    report = crawl([dead], tmp_path / "dead", CrawlSettings(**FAST), **QUIET)
    assert report.outcomes == {"robots": 1} and report.requests == 3


def test_damage_and_misuse_give_one_line(pages, tmp_path):
    with serve(pages[:3], settings=NO_HAZARDS) as site:
        crawl([site.url], tmp_path, CrawlSettings(**FAST), **QUIET)
        with pytest.raises(ValueError, match="max_depth"):
            crawl([site.url], tmp_path, CrawlSettings(**FAST, max_depth=1), **QUIET)
        with pytest.raises(ValueError, match="seeds"):
            crawl([site.url + "x"], tmp_path, CrawlSettings(**FAST), **QUIET)
        with crawl_store.CrawlStore(tmp_path), pytest.raises(ValueError, match="another crawl"):
            crawl([site.url], tmp_path, CrawlSettings(**FAST), **QUIET)
    shard = tmp_path / "pages-00000.jsonl.gz"
    content = bytearray(shard.read_bytes())
    content[40] ^= 255
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="at byte 0 is damaged"):
        list(read_crawl(tmp_path))
    with pytest.raises(ValueError, match="holds no crawl"):
        list(read_crawl(tmp_path / "nowhere"))
    (tmp_path / "state.sqlite").write_bytes(b"no database" * 100)
    (tmp_path / "state.sqlite-wal").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="cannot be read"):
        crawl([site.url], tmp_path, CrawlSettings(**FAST), **QUIET)


def test_wrong_seeds_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        crawl([], tmp_path)
    with pytest.raises(ValueError, match="absolute address"):
        crawl(["example.org"], tmp_path)
    with pytest.raises(ValueError, match="allowed hosts"):
        crawl(["http://a.example/"], tmp_path, allowed_hosts=["b.example"])
    assert not (tmp_path / "state.sqlite").exists()


@pytest.mark.parametrize(
    "wrong",
    [{"user_agent": " "}, {"delay": -1.0}, {"timeout": 0.0}, {"max_seconds": 0.0}, {"max_bytes": 0}, {"max_pages": 0},
     {"retries": -1}, {"backoff": -0.1}, {"max_redirects": -1}, {"max_path_depth": 0}, {"max_pages_per_folder": 0}],
)  # fmt: skip
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CrawlSettings(**wrong)


def test_the_state_is_an_ordinary_database(crawled):
    _, folder, report = crawled
    db = sqlite3.connect(folder / "state.sqlite")
    n = db.execute("SELECT count(*) FROM pages WHERE outcome = 'failed'").fetchone()[0]
    db.close()
    assert n == report.outcomes["failed"] == 2
