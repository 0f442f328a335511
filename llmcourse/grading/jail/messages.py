"""Messages of the jail: a length of four bytes, then as many bytes, of JSON."""

from __future__ import annotations

import json
import socket
import struct
from typing import Any

LENGTH = struct.Struct("!I")


def pack(message: dict[str, Any], body: bytes = b"") -> bytes:
    """A message, which may carry bytes after its JSON, as it is sent."""
    head = json.dumps(message).encode("ascii")
    return LENGTH.pack(len(head) + 1 + len(body)) + head + b"\n" + body


def unpack(payload: bytes | memoryview, max_head: int | None = None) -> tuple[dict[str, Any], bytes]:
    """The JSON of a message, of at most `max_head` bytes, and the bytes after it.

    Raises:
        ValueError: it is no message.
    """
    start = bytes(payload[: None if max_head is None else max_head + 1])
    mark = start.find(b"\n")
    if mark < 0:
        raise ValueError("a message has its JSON on a line of its own")
    try:
        message = json.loads(start[:mark])
    except RecursionError:
        raise ValueError("a message is nested too deeply") from None
    if not isinstance(message, dict):
        raise ValueError("a message is a JSON object")
    return message, bytes(payload[mark + 1 :])


def receive(connection: socket.socket) -> tuple[dict[str, Any], bytes] | None:
    """The next message from a side that is trusted, or `None` when it hung up."""
    length = _exactly(connection, LENGTH.size)
    payload = _exactly(connection, LENGTH.unpack(length)[0]) if length else None
    return unpack(payload) if payload else None


def _exactly(connection: socket.socket, size: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < size:
        part = connection.recv(min(size - len(parts), 1 << 20))
        if not part:
            return None
        parts += part
    return bytes(parts)
