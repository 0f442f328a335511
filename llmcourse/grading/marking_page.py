"""The page on which a person marks: served on this machine alone, at an address that only its user knows.

Standard library only. The address holds a random token, other host names are refused (a page of another site cannot
reach it by a name of its own), and everything that students wrote is escaped under a policy without scripts.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
import urllib.parse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

from llmcourse.grading import manual
from llmcourse.grading.manual import Mark
from llmcourse.grading.reports.pages import environment, shown_outputs
from llmcourse.grading.reports.text import one_line

HOST = "127.0.0.1"
MAX_BODY, MAX_COMMENT = 64 << 10, 4000
SECONDS = 30
"""a connection that says nothing is closed after this time"""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'",
    "Content-Type": "text/html; charset=utf-8",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Refused(Exception):
    """A request that gets an error page: its status, and one line."""

    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.status = status


class MarkingServer:
    """Serves the marks of a report folder, and stores each as it is given.

    Attributes:
        address: of the first page, token included.
        marks: as they stand, by (student, question).
    """

    def __init__(
        self,
        title: str,
        report: Path,
        marks: Iterable[Mark],
        written: Mapping[str, Mapping[str, str]],
        outputs: Callable[[Mark], Mapping[str, Any]],
        *,
        port: int = 0,
    ) -> None:
        """Open the port; `serve` answers.

        Args:
            title: of the assignment.
            report: folder that holds `marks.csv`.
            marks: all that is to be marked, with the marks given so far.
            written: student -> question -> what the student wrote.
            outputs: what a student's notebook has stored, by cell.
            port: 0 takes a free one.

        Raises:
            OSError: the port is taken.
        """
        self.title, self.report, self.written, self.outputs = title, report, written, outputs
        self.marks = {(mark.student, mark.question): mark for mark in marks}
        self.token = secrets.token_urlsafe(24)
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer((HOST, port), _handler(self))
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.address = f"http://{HOST}:{self.port}/{self.token}/"

    def serve(self) -> None:
        """Answer until `close` or Ctrl-C."""
        try:
            self._server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            return

    def close(self) -> None:
        """Stop, and free the port."""
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> MarkingServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.server_close()

    def page(self, path: str, query: Mapping[str, str]) -> str:
        """The page at a path below the token.

        Raises:
            Refused: there is none.
        """
        if path == "":
            return self.overview()
        if path == "question" and "name" in query:
            return self.question(query["name"])
        if path == "outputs" and "student" in query:
            return self.stored(query["student"])
        raise Refused(HTTPStatus.NOT_FOUND, "there is no such page")

    def overview(self) -> str:
        """All questions, with how many answers are marked."""
        names = dict.fromkeys(mark.question for mark in self.marks.values())
        questions = []
        for name in names:
            marks = [mark for mark in self.marks.values() if mark.question == name]
            title = "Submissions to decide about" if name == "automatic" else marks[0].title
            marked = sum(mark.points is not None for mark in marks)
            address = f"question?name={urllib.parse.quote(name, safe='')}"
            questions.append({"title": title, "marked": marked, "all": len(marks), "address": address})
        return self._render(heading="questions", questions=questions)

    def question(self, name: str, error: str = "") -> str:
        """All answers to a question, in the order of the student ids.

        Raises:
            Refused: nobody has to mark it.
        """
        entries = [
            {
                "mark": mark,
                "text": self.written.get(mark.student, {}).get(mark.question, ""),
                "anchor": _anchor(mark.student),
                "outputs": f"outputs?student={urllib.parse.quote(mark.student, safe='')}",
            }
            for mark in self.marks.values()
            if mark.question == name
        ]
        if not entries:
            raise Refused(HTTPStatus.NOT_FOUND, "there is no such question")
        heading = "to decide" if name == "automatic" else entries[0]["mark"].title
        return self._render(heading=heading, entries=entries, error=error)

    def stored(self, student: str) -> str:
        """The outputs stored in a student's notebook.

        Raises:
            Refused: there is no such student.
        """
        mark = next((mark for mark in self.marks.values() if mark.student == student), None)
        if mark is None:
            raise Refused(HTTPStatus.NOT_FOUND, "there is no such student")
        shown = shown_outputs(self.outputs(mark))
        return self._render(heading=f"outputs stored by {student}, as handed in", outputs=shown)

    def store(self, form: Mapping[str, str]) -> str:
        """Store the mark of a form.

        Returns:
            The address to show next.

        Raises:
            ValueError: the points are no number in range, or the answer has changed.
            Refused: there is no such question.
        """
        place = (form.get("student", ""), form.get("question", ""))
        text = form.get("points", "").strip().replace(",", ".")
        with self._lock:
            mark = self.marks.get(place)
            if mark is None:
                raise Refused(HTTPStatus.NOT_FOUND, "there is no such question")
            if form.get("answer") != mark.answer:
                raise ValueError("the answer has changed: load the page again")
            try:
                points = float(text) if text else None
            except ValueError:
                raise ValueError(f"points {one_line(text, 40)!r} are no number") from None
            if points is not None and not 0 <= points <= mark.max_points:
                raise ValueError(f"points {points:g} must lie between 0 and {mark.max_points:g}")
            comment = form.get("comment", "")[:MAX_COMMENT]
            changed = replace(mark, points=points, comment=comment)
            current = manual.store(self.report, self.marks.values(), changed)
            self.marks = {(one.student, one.question): one for one in current}
        return f"question?name={urllib.parse.quote(mark.question, safe='')}#{_anchor(mark.student)}"

    def _render(self, **more: Any) -> str:
        values = {"error": "", "questions": [], "entries": [], "outputs": []} | more
        home = "" if values["questions"] else f"/{self.token}/"
        values |= {"title": self.title, "action": f"/{self.token}/mark", "home": home, "forms": "'self'"}
        return environment().get_template("marking.html.jinja").render(**values)


def _anchor(student: str) -> str:
    return f"s-{hashlib.sha256(student.encode()).hexdigest()[:12]}"


def _handler(server: MarkingServer) -> type[BaseHTTPRequestHandler]:
    """The class that answers requests for a server."""

    class Handler(BaseHTTPRequestHandler):
        timeout = SECONDS
        server_version, sys_version = "llmcourse", ""

        def do_GET(self) -> None:
            self.answer(lambda path, query: (HTTPStatus.OK, server.page(path, query), {}))

        def do_POST(self) -> None:
            self.answer(self.post)

        def post(self, path: str, query: Mapping[str, str]) -> tuple[HTTPStatus, str, dict[str, str]]:
            length = self.headers.get("Content-Length", "")
            if path != "mark" or not length.isdecimal() or int(length) > MAX_BODY:
                raise Refused(HTTPStatus.BAD_REQUEST, "this is no mark")
            if self.headers.get("Origin", f"http://{self.headers.get('Host')}") not in self.origins():
                raise Refused(HTTPStatus.FORBIDDEN, "another page sent this")
            form = _fields(self.rfile.read(int(length)).decode("utf-8", "replace"))
            try:
                place = server.store(form)
            except ValueError as error:
                return HTTPStatus.BAD_REQUEST, server.question(form.get("question", ""), str(error)), {}
            return HTTPStatus.SEE_OTHER, "", {"Location": f"/{server.token}/{place}"}

        def origins(self) -> set[str]:
            # browsers send "null" for a form of a page whose policy sends no referrer
            return {f"http://{host}" for host in self.hosts()} | {"null"}

        def hosts(self) -> set[str]:
            return {f"{HOST}:{server.port}", f"localhost:{server.port}"}

        def answer(self, respond: Callable[..., tuple[HTTPStatus, str, dict[str, str]]]) -> None:
            try:
                if self.headers.get("Host") not in self.hosts():
                    raise Refused(HTTPStatus.FORBIDDEN, "this page is for this machine alone")
                parts = urllib.parse.urlsplit(self.path)
                token, _, path = parts.path.removeprefix("/").partition("/")
                if not hmac.compare_digest(token.encode(), server.token.encode()):
                    raise Refused(HTTPStatus.FORBIDDEN, "the address is not the one that was printed")
                status, text, more = respond(path, _fields(parts.query))
            except Refused as error:
                status, text, more = (
                    error.status,
                    f"<!DOCTYPE html><title>llmcourse</title><p>{error}</p>",
                    {},
                )
            body = text.encode("utf-8", "replace")
            self.send_response(status)
            for name, value in (HEADERS | {"Content-Length": str(len(body))} | more).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: the address, with its token, does not belong into a log."""

    return Handler


def _fields(text: str) -> dict[str, str]:
    return dict(urllib.parse.parse_qsl(text, keep_blank_values=True, max_num_fields=20))
