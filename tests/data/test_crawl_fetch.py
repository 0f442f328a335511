"""Single requests to servers that misbehave below the level of a web server."""

from __future__ import annotations

import gzip
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate

import pytest

from llmcourse.data.crawl_fetch import Answer, Fetcher

OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n"
# Without `mtime` the time of import stands in the header, and two test processes name their cases differently.
SMALL_GZIP = gzip.compress(b"zipped", mtime=0)
LARGE_GZIP = gzip.compress(bytes(10**6), mtime=0)


@contextmanager
def answering(raw: bytes) -> Iterator[str]:
    """A server that answers every connection with these bytes and closes it."""
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client:
                client.recv(65536)
                client.sendall(raw)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def get(raw: bytes, max_bytes: int = 1000, html_only: bool = True) -> Answer:
    with answering(raw) as url, Fetcher("me/1", timeout=5.0, max_seconds=5.0) as fetcher:
        answer = fetcher.get(url, max_bytes=max_bytes, html_only=html_only)
        assert fetcher.requests == 1
    return answer


@pytest.mark.parametrize(
    ("raw", "status", "problem", "body"),
    [
        (OK + b"Content-Length: 5\r\n\r\nwhole", 200, None, b"whole"),
        (OK + b"\r\nuntil the end", 200, None, b"until the end"),
        (OK + b"Content-Length: 50\r\n\r\nbroken off", 0, "connection", b""),
        (OK + b"Content-Length: 1001\r\n\r\n", 200, "too large", b""),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", 200, None, b"abc"),
        (OK + b"Content-Encoding: gzip\r\n\r\n" + SMALL_GZIP, 200, None, b"zipped"),
        (OK + b"Content-Encoding: gzip\r\n\r\n" + LARGE_GZIP, 200, "too large", b""),
        (OK + b"\r\na\0b", 200, "not html", b""),
        (OK + b"\r\n\xff\xfea\0b\0", 200, None, b"\xff\xfea\0b\0"),
        (b"HTTP/1.1 200 OK\r\nContent-Type: Application/PDF; x=1\r\n\r\n%PDF", 200, "not html", b""),
        (b"HTTP/1.1 200 OK\r\nContent-Type: application/xhtml+xml\r\n\r\nx", 200, None, b"x"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204, None, b""),
        (b"no HTTP at all\r\n\r\n", 0, "connection", b""),
        (b"", 0, "connection", b""),
    ],
)
def test_bodies(raw, status, problem, body):
    answer = get(raw)
    assert (answer.status, answer.problem, answer.body) == (status, problem, body)
    assert answer.may_pass is (problem == "connection")


def test_any_type_is_read_if_asked_for():
    assert get(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\nx\0", html_only=False).body == b"x\0"


@pytest.mark.parametrize(
    ("location", "target"),
    [(b"/a b", "/a b"), (b"?q=1", "/?q=1"), ("/é".encode(), "/é"), (b"http://[oops/", None), (b"", None)],
)
def test_redirects_are_told_not_followed(location, target):
    answer = get(b"HTTP/1.1 302 Found\r\nLocation: " + location + b"\r\nContent-Length: 0\r\n\r\n")
    assert answer.status == 302 and not answer.may_pass
    assert answer.location == target or answer.location.endswith(target)


def test_retry_after_is_seconds_or_a_date():
    head = b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\nRetry-After: "
    assert get(head + b"120\r\n\r\n").retry_after == 120.0
    date = formatdate(time.time() + 600, usegmt=True).encode()
    assert 500 < get(head + date + b"\r\n\r\n").retry_after <= 600
    assert get(head + b"soon\r\n\r\n").retry_after is None
    assert get(head + b"120\r\n\r\n").may_pass


def test_time_limits():
    listener = socket.create_server(("127.0.0.1", 0))  # accepts, and never answers
    with listener, Fetcher("me/1", timeout=0.1, max_seconds=5.0) as fetcher:
        answer = fetcher.get(f"http://127.0.0.1:{listener.getsockname()[1]}/", max_bytes=10)
    assert answer.problem == "timeout" and answer.may_pass and answer.status == 0
