"""The journal of a batch: a line a submission, on the disk before the next one starts.

A grader that is killed loses at most the submissions it was at; the same command goes on with the others. A line that
the kill cut is dropped when the journal is opened.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from llmcourse.durable import canonical_json, sync, text_digest


class Journal:
    """Records by key in a file of JSON lines, each with its own digest.

    Attributes:
        path: the file.
        records: key -> what was recorded last under it.
        dropped: lines that were cut or changed, and do not count.
    """

    def __init__(self, path: Path) -> None:
        """Open a journal, or start one.

        Args:
            path: the file; its folder must exist.

        Raises:
            OSError: it cannot be read or written.
        """
        self.path, self.records, self.dropped = path, {}, 0
        self._lock = threading.Lock()
        whole = self._read()
        self._file = open(path, "ab")
        if self._file.tell() > whole:
            self._file.truncate(whole)  # the next line must not be glued to a cut one
        sync(path.parent)

    def _read(self) -> int:
        """Read what is there; return the number of bytes up to the end of the last whole line."""
        if not self.path.exists():
            return 0
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        self.dropped += whole < len(data)
        for line in data[:whole].splitlines():
            record = _parse(line)
            if record is None:
                self.dropped += 1
            else:
                self.records[record[0]] = record[1]
        return whole

    def add(self, key: str, record: dict[str, Any]) -> None:
        """Record something under a key, and return when the disk has it."""
        body = canonical_json({"key": key, "record": record})
        line = json.dumps({"seal": text_digest(body), "body": body}, ensure_ascii=True) + "\n"
        with self._lock:
            self._file.write(line.encode())
            self._file.flush()
            os.fsync(self._file.fileno())
            self.records[key] = record

    def close(self) -> None:
        """Close the file; what was added is on the disk already."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _parse(line: bytes) -> tuple[str, dict[str, Any]] | None:
    try:
        sealed = json.loads(line)
        if sealed["seal"] != text_digest(sealed["body"]):
            return None
        body = json.loads(sealed["body"])
        return body["key"], body["record"]
    except (ValueError, KeyError, TypeError):
        return None
