"""The site on this machine: what it serves, and that its log says so."""

from __future__ import annotations

import time

import pytest
import requests

from llmcourse.data.tinytown import Town
from llmcourse.data.web_dump import web_dump
from llmcourse.data.web_hazards import HAZARDS
from llmcourse.data.web_server import SiteSettings, serve


@pytest.fixture(scope="module")
def pages():
    return list(web_dump(Town(seed=3), 12, seed=2))


@pytest.fixture(scope="module")
def site(pages):
    with serve(
        pages, settings=SiteSettings(crawl_delay=1.5, retry_after=4, disallow=("/private/", "/board/"))
    ) as site:
        yield site


@pytest.fixture(scope="module")
def session():
    with requests.Session() as session:
        session.trust_env = False
        yield session


def test_pages_are_served_with_links_to_each_other(site, pages, session):
    assert len(site.pages) == 12
    for url, page in site.pages.items():
        answer = session.get(url)
        assert answer.status_code == 200 and answer.headers["Content-Type"] == "text/html; charset=utf-8"
        assert ".example/" not in answer.text
        assert answer.text == page.html.replace("https://", "/").replace(".example/", "/")
        assert site.truth[url].text == page.labels["text"]
        assert url.endswith(page.url.split("example")[1])


def test_the_index_and_the_site_map_name_everything(site, session):
    index, sitemap = session.get(site.url).text, session.get(site.url + "sitemap.xml").text
    for url in site.truth:
        path = "/" + url.removeprefix(site.url)
        assert f'href="{path.replace("&", "&amp;")}"' in index or path == "/"
        assert f"<loc>{url.replace('&', '&amp;')}</loc>" in sitemap
    assert "utm_source" in index and "HTTP://127.0.0.1" in index and "b=2&amp;a=1" in index


def test_robots_txt(site, session):
    text = session.get(site.url + "robots.txt").text
    assert text.splitlines() == [
        "User-agent: *", "Disallow: /private/", "Disallow: /board/", "Crawl-delay: 1.5",
        f"Sitemap: {site.url}sitemap.xml",
    ]  # fmt: skip
    boards = {url for url in site.pages if "/board/" in url}
    assert site.addresses("robots") == boards | {site.url + "private/notes.html"}


def test_failures_pass_and_say_when(site, session):
    answers = [session.get(site.url + "hazards/busy.html") for _ in range(4)]
    assert [a.status_code for a in answers] == [503, 503, 200, 200]
    assert answers[0].headers["Retry-After"] == "4" and "Retry-After" not in answers[2].headers
    assert [session.get(site.url + "hazards/error.html").status_code for _ in range(3)] == [500] * 3


def test_redirects(site, session):
    answer = session.get(site.url + "hazards/moved.html", allow_redirects=False)
    assert answer.status_code == 301 and answer.headers["Location"] == "/hazards/target.html"
    with pytest.raises(requests.TooManyRedirects):
        session.get(site.url + "hazards/loop-a.html")
    with pytest.raises(requests.TooManyRedirects):
        session.get(site.url + "hazards/hops?n=0")


def test_endless_pages_end_when_the_client_hangs_up(site, session):
    with session.get(site.url + "hazards/endless.html", stream=True) as answer:
        got = sum(len(chunk) for chunk, _ in zip(answer.iter_content(65536), range(20), strict=False))
    assert got == 20 * 65536
    with pytest.raises(requests.RequestException):
        session.get(site.url + "hazards/slow.html", timeout=0.05)
    start = time.monotonic()
    with session.get(site.url + "hazards/drip.html", stream=True) as answer:
        assert answer.raw.read(12) == b"<p>slowly..."
    assert time.monotonic() - start >= 3 * 0.02


def test_traps_go_on(site, session):
    assert 'href="/hazards/calendar?month=8"' in session.get(site.url + "hazards/calendar?month=7").text
    assert session.get(site.url + "hazards/deep/deep/deep/").status_code == 200
    assert session.get(site.url + "hazards/calendar?month=x").status_code == 404


def test_types_and_charsets(site, session):
    kinds = {name: session.get(site.url + "hazards/" + name).headers.get("Content-Type")
             for name in ("archive.bin", "photo.html", "wrong-charset.html", "no-type.html")}  # fmt: skip
    assert kinds == {
        "archive.bin": "application/octet-stream", "photo.html": "text/html",
        "wrong-charset.html": "text/html; charset=iso-8859-1", "no-type.html": None,
    }  # fmt: skip


def test_the_log_holds_every_request_in_order(pages, session):
    with serve(pages[:1], settings=SiteSettings(hazards=())) as site:
        before = time.monotonic()
        session.get(site.url, headers={"User-Agent": "me/1"})
        session.get(site.url + "nowhere?x=1")
    assert [(r.path, r.status) for r in site.log] == [("/", 200), ("/nowhere?x=1", 404)]
    assert site.log[0].user_agent == "me/1" and before <= site.log[0].time <= site.log[1].time
    with pytest.raises(requests.ConnectionError):
        session.get(site.url)


@pytest.mark.parametrize("hazard", HAZARDS)
def test_each_hazard_can_be_switched(hazard):
    with serve([], settings=SiteSettings(hazards=(hazard,))) as site:
        kinds = {resource.kind for resource in site.truth.values()} - {"index"}
    assert kinds == {hazard, "missing"}  # the dump's menus lead nowhere
    with serve([], settings=SiteSettings(hazards=())) as site:
        assert all("hazards" not in url for url in site.truth)


@pytest.mark.parametrize(
    "wrong", [{"hazards": ("fire",)}, {"disallow": ("board",)}, {"crawl_delay": -1.0}, {"retry_after": -1}]
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SiteSettings(**wrong)
