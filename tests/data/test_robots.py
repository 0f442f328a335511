"""robots.txt by RFC 9309, compared with the standard library where both mean the same."""

from __future__ import annotations

import urllib.robotparser

import pytest

from llmcourse.data.robots import FORBIDDEN, parse_robots

FILE = """\ufeff# our rules
user-agent: Other
Disallow: /
User-Agent: Llmcourse-Crawler/2.0
User-agent: friend
Crawl-delay: 0.5
Disallow: /private/
Allow: /private/ok
Disallow: /*?session=
Disallow: /*.gif$
Disallow:
nonsense
Disallow: relative

User-agent: *
Disallow: /stars/
Sitemap: http://h.example/map.xml
User-agent: LLMCOURSE-crawler
Disallow: /second
Crawl-delay: fast
"""


def allowed(text, path, agent="llmcourse-crawler/1.0 (x)"):
    return parse_robots(text, agent).allows("http://h.example" + path)


@pytest.mark.parametrize(
    ("path", "allows"),
    [
        ("/", True),
        ("/private/x", False),
        ("/private", True),
        ("/private/ok.html", True),
        ("/a?session=1", False),
        ("/a/b?a=1&session=2", True),
        # rules see an address in its canonical spelling, parameters sorted: that is what would be asked for
        ("/a/b?x=1&session=2", False),
        ("/pic.gif", False),
        ("/pic.gif?large", True),
        ("/stars/x", True),
        ("/second/x", False),
        ("/robots.txt", True),
        ("/relative", True),
    ],
)
def test_rules_of_our_groups_and_the_longest_one(path, allows):
    assert allowed(FILE, path) is allows


def test_groups_delays_and_site_maps():
    rules = parse_robots(FILE, "llmcourse-crawler/1.0")
    assert rules.crawl_delay == 0.5 and rules.sitemaps == ("http://h.example/map.xml",)
    assert allowed(FILE, "/stars/x", "somebody") is False and allowed(FILE, "/private/x", "somebody")
    assert allowed(FILE, "/x", "other/3") is False
    assert parse_robots(FILE, "somebody").crawl_delay is None
    assert parse_robots("", "a").allows("http://h/x") and not FORBIDDEN.allows("http://h/x")


def test_allow_wins_a_tie_and_escapes_are_one_path():
    assert allowed("User-agent: *\nDisallow: /a\nAllow: /a", "/a")
    text = "User-agent: *\nDisallow: /%7Ea%c3%a9"
    assert not allowed(text, "/~aé") and not allowed(text, "/%7ea%C3%A9/b")


def test_patterns_of_many_stars_are_quick():
    text = "User-agent: *\nDisallow: /" + "*a" * 200 + "$"
    assert allowed(text, "/" + "a" * 1500 + "b")
    assert not allowed(text, "/" + "a" * 1500)


@pytest.mark.parametrize("agent", ["alpha", "beta", "gamma"])
def test_agrees_with_the_standard_library_on_plain_files(agent):
    text = (
        "User-agent: alpha\nDisallow: /a/\nDisallow: /b\nCrawl-delay: 3\n\nUser-agent: beta\nDisallow: /\n\n"
        "User-agent: *\nDisallow: /c/d.html\nCrawl-delay: 7\n"
    )
    theirs = urllib.robotparser.RobotFileParser()
    theirs.parse(text.splitlines())
    ours = parse_robots(text, agent)
    for path in ("/", "/a", "/a/", "/a/x", "/b", "/bb", "/c/d.html", "/c/d", "/c/d.html?x", "/x/a/"):
        assert ours.allows(f"http://h{path}") == theirs.can_fetch(agent, f"http://h{path}"), path
    assert ours.crawl_delay == theirs.crawl_delay(agent)
