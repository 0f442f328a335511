"""One address for one page: URLs that differ only in spelling become equal."""

from __future__ import annotations

import re
from urllib.parse import quote, urlsplit

MAX_LENGTH = 2048
"""characters; longer addresses are nearly always the product of a trap"""
TRACKING_PARAMETERS = frozenset(
    "gclid dclid gbraid wbraid fbclid msclkid yclid twclid igshid mc_cid mc_eid _ga _gl _hsenc _hsmi vero_id "
    "phpsessid jsessionid sessionid sid".split()
)
"""names of query parameters, in lower case, that say who follows a link and not where it leads; as are all utm_*"""
_DEFAULT_PORTS = {"http": 80, "https": 443}
_ESCAPE = re.compile(r"%([0-9A-Fa-f]{2})")
_LONE_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
_UNRESERVED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
_LEGAL = "%:/?@!$&'()*+,;="  # what may stand in a path or query as it is, beside the unreserved (RFC 3986, appendix A)


def canonical_url(url: str) -> str:
    """The one spelling of an http(s) address.

    As RFC 3986 (2005), section 6.2.2 and 6.2.3: scheme and host in lower case, a host with other letters in its
    ASCII form, no default port, no user, escapes of unreserved characters undone and the others in upper case, `.` and
    `..` resolved, an empty path is "/". Those keep the meaning. Beyond it, as crawlers do, three that nearly always
    keep it: no fragment, no tracking parameters, the other parameters sorted by name.

    Returns:
        The address; that of a canonical address is itself.

    Raises:
        ValueError: the scheme is not http or https, there is no host, the port is no number up to 65535, or the
            address is longer than 2 048 characters.
    """
    if len(url) > MAX_LENGTH:
        raise ValueError(f"url {url[:40]!r}... has {len(url)} characters: {MAX_LENGTH} are the limit")
    try:
        parts = urlsplit(url.strip())
        host, port = _host(parts.hostname or ""), parts.port
    except ValueError as error:  # also UnicodeError, of a host that has no ASCII form
        raise ValueError(f"url {url!r}: {error}") from None
    if parts.scheme not in _DEFAULT_PORTS or not host:
        raise ValueError(f"url {url!r}: give an absolute address, such as 'https://example.org/page'")
    netloc = host if port in (None, _DEFAULT_PORTS[parts.scheme]) else f"{host}:{port}"
    query = _canonical_query(parts.query)
    return f"{parts.scheme}://{netloc}{_canonical_path(parts.path)}{'?' if query else ''}{query}"


def _host(host: str) -> str:
    if ":" in host:  # an IPv6 address, whose brackets urlsplit took off
        return f"[{host.lower()}]"
    ascii_host = host if host.isascii() else host.encode("idna").decode("ascii")
    if re.search(r"[^a-z0-9._-]", ascii_host.lower()):
        raise ValueError(f"{host!r} is no host name")
    return ascii_host.lower().rstrip(".")


def _canonical_path(path: str) -> str:
    """Resolve dot segments (RFC 3986, section 5.2.4) after the escapes, in which dots may hide."""
    segments: list[str] = []
    parts = canonical_escapes(path).split("/")[1:]
    for segment in parts:
        if segment == "..":
            segments = segments[:-1]
        elif segment != ".":
            segments.append(segment)
    if parts and parts[-1] in (".", ".."):  # "/a/b/.." is the folder "/a/"
        segments.append("")
    return "/" + "/".join(segments)


def _canonical_query(query: str) -> str:
    parameters = [canonical_escapes(part) for part in query.split("&") if part]
    kept = [part for part in parameters if not _is_tracking(part.split("=", 1)[0].lower())]
    return "&".join(
        sorted(kept, key=lambda part: part.split("=", 1)[0])
    )  # stable: repeated names keep their order


def _is_tracking(name: str) -> bool:
    return name.startswith("utm_") or name in TRACKING_PARAMETERS


def canonical_escapes(text: str) -> str:
    """Percent-escapes of a path or query in their one spelling: none that is not needed, none missing."""

    def one(match: re.Match[str]) -> str:
        character = chr(int(match[1], 16))
        return character if character in _UNRESERVED else match[0].upper()

    escaped = quote(_LONE_PERCENT.sub("%25", text), safe=_LEGAL, errors="replace")
    return _ESCAPE.sub(one, escaped)
