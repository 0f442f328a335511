"""robots.txt: what a site asks crawlers to leave alone (RFC 9309, 2022).

The standard library's `urllib.robotparser` follows the draft of 1996: the first rule that matches wins, `*` and `$`
are plain characters, delays are whole numbers. Today's files are written for RFC 9309, where the longest
rule wins, so that `Disallow: /*?session=` and an `Allow` inside a disallowed folder are understood here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from llmcourse.data.canonical_urls import canonical_escapes, canonical_url

MAX_BYTES = 500 * 1024
"""bytes of a robots.txt that are read; RFC 9309, section 2.5, asks for at least this many"""


@dataclass(frozen=True)
class Robots:
    """What one site asks of one crawler.

    Attributes:
        rules: (pattern, allowed) in the order of the file.
        crawl_delay: seconds between requests that the site asks for (no part of the RFC, but widely used); or None.
        sitemaps: addresses of its site maps.
    """

    rules: tuple[tuple[str, bool], ...] = ()
    crawl_delay: float | None = None
    sitemaps: tuple[str, ...] = ()

    def allows(self, url: str) -> bool:
        """Whether the crawler may fetch the address; of the rules that match, the longest one decides.

        Allow wins over Disallow of the same length (section 2.2.2). Its own file is always allowed.
        """
        parts = urlsplit(canonical_url(url))
        if parts.path == "/robots.txt":
            return True
        target = parts.path + (f"?{parts.query}" if parts.query else "")
        matching = [(len(pattern), allowed) for pattern, allowed in self.rules if _matches(pattern, target)]
        return max(matching)[1] if matching else True


FORBIDDEN = Robots(rules=(("/", False),))
"""a site whose robots.txt cannot be had because of its own fault (5xx, no answer): nothing may be fetched"""


@dataclass
class _Group:
    agents: list[str] = field(default_factory=list)
    rules: list[tuple[str, bool]] = field(default_factory=list)
    delay: float | None = None
    closed: bool = False  # a rule was read: the next User-agent line begins another group


def parse_robots(text: str, user_agent: str) -> Robots:
    """Read the rules of a robots.txt that concern `user_agent`.

    Args:
        text: the file; lines that make no sense are ignored, as section 2.2 asks.
        user_agent: the crawler's name; a version or comment after it ("name/1.0 (+https://...)") is left out.

    Returns:
        The rules of all groups that name the crawler; if none does, those of the groups for `*`.
    """
    groups: list[_Group] = []
    sitemaps: list[str] = []
    for line in text.lstrip("\ufeff").splitlines():
        key, colon, value = line.split("#", 1)[0].partition(":")
        key, value = key.strip().lower(), value.strip()
        if key == "sitemap" and value:
            sitemaps.append(value)
        elif colon:
            _read_line(groups, key, value)
    name = re.split(r"[/\s(]", user_agent.strip(), maxsplit=1)[0].lower()
    ours = [g for g in groups if name in g.agents] or [g for g in groups if "*" in g.agents]
    delays = [group.delay for group in ours if group.delay is not None]
    return Robots(
        rules=tuple(rule for group in ours for rule in group.rules),
        crawl_delay=max(delays, default=None),
        sitemaps=tuple(sitemaps),
    )


def _read_line(groups: list[_Group], key: str, value: str) -> None:
    """Add one line of the file to the last group, or begin a group."""
    if key == "user-agent":
        if not groups or groups[-1].closed:
            groups.append(_Group())
        groups[-1].agents.append(re.split(r"[/\s]", value, maxsplit=1)[0].lower())
    elif not groups:
        return  # a rule before any User-agent concerns nobody
    elif key in ("allow", "disallow"):
        groups[-1].closed = True
        if value.startswith(("/", "*")):  # an empty Disallow forbids nothing
            groups[-1].rules.append((value, key == "allow"))
    elif key == "crawl-delay":
        groups[-1].closed = True
        if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", value):
            groups[-1].delay = float(value)


def _matches(pattern: str, target: str) -> bool:
    """Whether a rule's pattern, where * is any run of characters and a last $ the end, begins the target.

    Taken part by part, leftmost first, which no pattern can make slow, unlike a regular expression.
    """
    anchored = pattern.endswith("$")
    # escapes as in canonical addresses: "/%7Ea", "/%7ea" and "/~a" are one path
    parts = [canonical_escapes(part) for part in pattern.removesuffix("$").split("*")]
    if not target.startswith(parts[0]):
        return False
    position = len(parts[0])
    for part in parts[1:-1]:
        found = target.find(part, position)
        if found < 0:
            return False
        position = found + len(part)
    if len(parts) == 1:
        return not anchored or position == len(target)
    if anchored:
        return target.endswith(parts[-1]) and len(target) - len(parts[-1]) >= position
    return target.find(parts[-1], position) >= 0
