"""One request of a crawler, bounded in time and size: pages may be endless, and arrive a byte at a time."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from urllib.parse import urljoin, urlsplit

import requests
import urllib3

RETRIED = frozenset((429, 500, 502, 503, 504))
"""statuses that may pass by themselves; 501 and the other 4xx will not"""
REDIRECTS = frozenset((301, 302, 303, 307, 308))
HTML_TYPES = ("text/html", "application/xhtml+xml")
_CHUNK_BYTES = 1 << 16
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came of a request.

    Attributes:
        status: HTTP status, or 0 if there was no answer.
        problem: None, or "too large", "not html", "timeout", "connection" (refused, broken off, no HTTP).
        content_type: header, "" if none.
        body: of a good page; b"" for all else.
        location: absolute address that a redirect names, or None.
        retry_after: seconds that the server asks to wait, or None.
    """

    status: int = 0
    problem: str | None = None
    content_type: str = ""
    body: bytes = b""
    location: str | None = None
    retry_after: float | None = None

    @property
    def may_pass(self) -> bool:
        """Whether another try later makes sense."""
        return self.status in RETRIED or self.problem in ("timeout", "connection")


class _Session(requests.Session):
    """Leaves redirects alone; the plain one looks at where they lead, and fails if that is no address."""

    def get_redirect_target(self, resp: requests.Response) -> None:
        return None


class Fetcher:
    """Sends requests over connections that stay open; a context manager.

    It sends no cookies and no passwords (not those of a .netrc either), and uses the system's proxies, except for
    addresses of this machine.
    """

    def __init__(self, user_agent: str, *, timeout: float, max_seconds: float) -> None:
        """Prepare, without any request.

        Args:
            user_agent: header by which sites recognize the crawler.
            timeout: seconds to wait for a connection, and for each further piece of an answer.
            max_seconds: seconds for a whole page.
        """
        self.timeout, self.max_seconds, self.requests = timeout, max_seconds, 0
        self._session = _Session()
        self._session.trust_env = False
        self._session.headers.update(
            {"User-Agent": user_agent, "Accept": "text/html,*/*;q=0.1", "Accept-Encoding": "identity"}
        )

    def __enter__(self) -> Fetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()

    def get(self, url: str, *, max_bytes: int, html_only: bool = True) -> Answer:
        """Fetch one address, without following redirects. Never raises for what the other side does.

        Args:
            url: http(s) address.
            max_bytes: size above which a body is "too large" and the connection is closed.
            html_only: whether a body that is not HTML, by its header or its first bytes, is left unread.
        """
        self.requests += 1
        self._session.cookies.clear()
        deadline = time.monotonic() + self.max_seconds
        try:
            with self._session.get(
                url, stream=True, allow_redirects=False, timeout=self.timeout, proxies=_proxies(url)
            ) as response:
                return _read(response, deadline, max_bytes, html_only)
        except (requests.Timeout, urllib3.exceptions.TimeoutError):
            return Answer(problem="timeout")
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError):
            return Answer(problem="connection")


def _read(response: requests.Response, deadline: float, max_bytes: int, html_only: bool) -> Answer:
    """Read an answer whose head is there."""
    head = Answer(
        status=response.status_code,
        content_type=response.headers.get("Content-Type", ""),
        retry_after=_seconds(response.headers.get("Retry-After")),
    )
    if head.status in REDIRECTS:
        return _with(head, location=_location(response))
    if head.status != 200:
        return head
    declared = head.content_type.split(";", 1)[0].strip().lower()
    if html_only and declared and declared not in HTML_TYPES:
        return _with(head, problem="not html")
    promised = _length(response.headers)
    if promised is not None and promised > max_bytes:
        return _with(head, problem="too large")
    body, problem = _read_body(response.raw, deadline, max_bytes)
    if problem is None and html_only and _looks_binary(body):
        problem = "not html"
    return _with(head, problem=problem) if problem else _with(head, body=body)


def _read_body(
    raw: urllib3.response.BaseHTTPResponse, deadline: float, max_bytes: int
) -> tuple[bytes, str | None]:
    body = bytearray()
    # read1 gives what has arrived, so that a server that sends a byte a second cannot hold the crawler
    while chunk := raw.read1(_CHUNK_BYTES, decode_content=True):
        if body and time.monotonic() > deadline:  # a page that came in one piece is complete, however late
            return b"", "timeout"
        body += chunk
        if len(body) > max_bytes:
            return b"", "too large"
    return bytes(body), None


def _length(headers: Mapping[str, str]) -> int | None:
    """Bytes of the body as announced, or None if they are not, or are those of its compressed form."""
    value = headers.get("Content-Length", "")
    return int(value) if value.isascii() and value.isdigit() and "Content-Encoding" not in headers else None


def _with(answer: Answer, **changes: object) -> Answer:
    return Answer(**{**vars(answer), **changes})


def _location(response: requests.Response) -> str | None:
    location = response.headers.get("Location")
    if not location:
        return None
    try:
        return urljoin(response.url, location.encode("latin-1").decode("utf-8", "replace").strip())
    except ValueError:
        return None


def _seconds(retry_after: str | None) -> float | None:
    """The Retry-After header, which is a number of seconds or a date (RFC 9110, section 10.2.3)."""
    if not retry_after:
        return None
    if retry_after.strip().isascii() and retry_after.strip().isdigit():
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def _looks_binary(body: bytes) -> bool:
    """Whether the first 512 bytes hold a NUL, as no text does outside UTF-16."""
    head = body[:512]
    return b"\0" in head and not head.startswith((b"\xff\xfe", b"\xfe\xff"))


def _proxies(url: str) -> dict[str, str | None]:
    if urlsplit(url).hostname in _LOOPBACK:
        return {"http": None, "https": None}
    return requests.utils.get_environ_proxies(url)
