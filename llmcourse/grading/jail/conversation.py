"""The grader's side of one run: what it sends, waits for, and refuses to read."""

from __future__ import annotations

import os
import secrets
import select
import socket
import time
from collections.abc import Callable
from typing import Any

from llmcourse.grading.jail.messages import LENGTH, pack, unpack
from llmcourse.grading.verdicts import Verdict

MAX_HEAD = 256 << 10
"""bytes of a reply beside its values"""
_CHUNK = 1 << 16
_LOOK_EVERY = 0.1


class EndedEarly(Exception):
    """The run is over before everything was asked: the verdict and why, in a few words."""

    def __init__(self, verdict: Verdict, note: str) -> None:
        super().__init__(note)
        self.verdict, self.note = verdict, note


class HungUp(Exception):
    """The fork closed its connection, which it does by dying."""


class Conversation:
    """One request at a time, a deadline, a cap on the output; what arrives unasked ends the run.

    The fork decides nothing here: it says neither how many replies there are nor which request one belongs to, and no
    number of its makes this side allocate more than the cap.

    Attributes:
        output: what the fork printed since it was last taken.
        printed: bytes that it printed at all.
    """

    def __init__(
        self, connection: socket.socket, pipe: int, output_bytes: int, look: Callable[[], None]
    ) -> None:
        """Take over two open ends, which the caller closes.

        Args:
            connection: a Unix stream socket.
            pipe: the end to read the output from.
            output_bytes: greatest number of bytes printed.
            look: called every tenth of a second; raises `EndedEarly` when the fork uses too much.
        """
        self._connection, self._pipe, self._output_bytes, self._look = connection, pipe, output_bytes, look
        self._received, self._deadline, self._looked = bytearray(), 0.0, time.monotonic()
        self._poll = select.poll()
        self._pipe_open = True
        self.output, self.printed = bytearray(), 0
        connection.setblocking(False)
        os.set_blocking(pipe, False)
        self._poll.register(connection, select.POLLIN)
        self._poll.register(pipe, select.POLLIN)

    def set_deadline(self, seconds: float) -> None:
        """End the run with TIMEOUT so many seconds from now."""
        self._deadline = time.monotonic() + seconds

    def ask(self, request: dict[str, Any], values: int = 0) -> tuple[dict[str, Any], bytes]:
        """Send a request and wait for its reply.

        Args:
            request: JSON; it gets a fresh number that only a reply to it can carry.
            values: bytes that the reply may have after its JSON.

        Raises:
            EndedEarly: a limit was reached, or the fork spoke out of turn.
            HungUp: the fork is gone.
        """
        self._receive_now()
        if self._received:
            raise EndedEarly(Verdict.REVIEW, "it answered before it was asked")
        nonce = secrets.token_hex(16)
        self.send(pack({**request, "nonce": nonce}))
        message, body = self.receive(MAX_HEAD + values)
        if message.get("nonce") != nonce:
            raise EndedEarly(Verdict.REVIEW, "its reply is to no question that was asked")
        return message, body

    def send(self, data: bytes) -> None:
        """Send bytes, for as long as the deadline allows."""
        view = memoryview(data)
        while view:
            try:
                view = view[self._connection.send(view) :]
            except BlockingIOError:
                self._poll.modify(self._connection, select.POLLIN | select.POLLOUT)
                try:
                    self._wait()
                finally:
                    self._poll.modify(self._connection, select.POLLIN)
            except OSError:
                raise HungUp from None

    def receive(self, cap: int) -> tuple[dict[str, Any], bytes]:
        """The next message of at most so many bytes."""
        while True:
            if len(self._received) >= LENGTH.size:
                (length,) = LENGTH.unpack_from(self._received)
                if length > cap:
                    raise EndedEarly(Verdict.REVIEW, f"a reply of {length} bytes where {cap} are allowed")
                if len(self._received) >= LENGTH.size + length:
                    break
            self._wait()
            self._receive_now()
        payload = memoryview(self._received)[LENGTH.size : LENGTH.size + length]
        try:
            message, body = unpack(payload, MAX_HEAD)
        except ValueError:
            raise EndedEarly(Verdict.REVIEW, "a reply that is no message") from None
        finally:
            payload.release()
        del self._received[: LENGTH.size + length]
        self.drain()
        return message, body

    def take_output(self) -> bytes:
        """What was printed since the last time."""
        self.drain()
        taken, self.output = bytes(self.output), bytearray()
        return taken

    def drain(self) -> None:
        """Read what waits in the pipe.

        Raises:
            EndedEarly: it is more than allowed.
        """
        while self._pipe_open:
            try:
                part = os.read(self._pipe, _CHUNK)
            except BlockingIOError:
                return
            if not part:
                self._pipe_open = False
                self._poll.unregister(self._pipe)
                return
            room = self._output_bytes - self.printed
            self.printed += len(part)
            self.output += part[: max(0, room)]
            if len(part) > room:
                raise EndedEarly(Verdict.OUTPUT_LIMIT, f"it printed more than {self._output_bytes >> 10} KiB")

    def _wait(self) -> None:
        """Sleep until something arrives, at most until the next look at the fork's memory."""
        now = time.monotonic()
        if now >= self._deadline:
            raise EndedEarly(Verdict.TIMEOUT, "it took too long")
        if now - self._looked >= _LOOK_EVERY:
            self._look()
            self._looked = now
        events = self._poll.poll(1 + 1000 * min(_LOOK_EVERY, self._deadline - now))
        if any(descriptor == self._pipe for descriptor, _ in events):
            self.drain()

    def _receive_now(self) -> None:
        try:
            part = self._connection.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            raise HungUp from None
        if not part:
            raise HungUp
        self._received += part
