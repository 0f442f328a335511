"""What a crawl knows and has, on disk, so that it can be killed at any moment and go on.

`state.sqlite` holds every address with its outcome; `pages-00000.jsonl.gz` and so on hold the fetched pages, each a
gzip member of its own, so that it can be read by its place alone. A page is appended to its file first and committed
with its place, its outcome and its links second: what a kill leaves behind the last commit is cut off at the next
start and fetched again.

Web archives use the WARC format (ISO 28500:2017), which has the same members and adds to each the request and
response exactly as sent, a digest, an identifier and the server's address, so that a page can be shown again decades
later. For making text, body, address and headers are enough.
"""

from __future__ import annotations

import base64
import gzip
import json
import sqlite3
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

SHARD_BYTES = 64 << 20
"""bytes after which another file of pages is begun"""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS pages (
    id INTEGER PRIMARY KEY, url TEXT NOT NULL UNIQUE, host TEXT NOT NULL, depth INTEGER NOT NULL,
    hops INTEGER NOT NULL DEFAULT 0, attempts INTEGER NOT NULL DEFAULT 0, ready REAL NOT NULL DEFAULT 0,
    outcome TEXT, status INTEGER, target TEXT, canonical TEXT, shard INTEGER, start INTEGER, length INTEGER);
CREATE INDEX IF NOT EXISTS waiting ON pages (host, ready, depth, id) WHERE outcome IS NULL;
CREATE TABLE IF NOT EXISTS folders (folder TEXT PRIMARY KEY, pages INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS hosts (host TEXT PRIMARY KEY, status INTEGER, robots TEXT, fetched REAL);
CREATE TABLE IF NOT EXISTS counts (name TEXT PRIMARY KEY, n INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
# A page whose named canonical address was fetched too, and calls itself canonical or names none.
_DUPLICATE = """outcome = 'fetched' AND coalesce(canonical, url) != url AND EXISTS (SELECT 1 FROM pages AS original
    WHERE original.url = pages.canonical AND original.outcome = 'fetched'
    AND coalesce(original.canonical, original.url) = original.url)"""


@dataclass(frozen=True)
class Entry:
    """An address that waits to be fetched.

    Attributes:
        id: its number, in the order in which addresses were found.
        url: canonical.
        host: with port.
        depth: links from a seed.
        hops: redirects in a row that led to it, 0 if it was found as a link.
        attempts: tries that failed.
        ready: seconds since 1970 before which it is not to be tried.
    """

    id: int
    url: str
    host: str
    depth: int
    hops: int
    attempts: int
    ready: float


@dataclass(frozen=True)
class Fetched:
    """A fetched page.

    Attributes:
        url: canonical address.
        status: of the HTTP response, 200.
        content_type: header, "" if none.
        body: as sent.
        time: seconds since 1970.
        canonical: the address that the page names as its own, or None.
    """

    url: str
    status: int
    content_type: str
    body: bytes
    time: float
    canonical: str | None


class CrawlStore:
    """A crawl's folder, held by one process at a time; a context manager.

    Raises:
        ValueError: another process holds the folder, or its state cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        """Open or create the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._lock = FileLock(folder / ".lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            raise ValueError(
                f"{folder}: another crawl is writing here; wait or take another folder"
            ) from None
        try:
            self.db = _connect(folder / "state.sqlite")
            self.db.executescript(_SCHEMA)
            self._cut()
        except sqlite3.DatabaseError as error:
            self._lock.release()
            raise ValueError(
                f"{folder / 'state.sqlite'} cannot be read ({error}); delete the folder"
            ) from None

    def __enter__(self) -> CrawlStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.db.close()
        self._lock.release()

    def _cut(self) -> None:
        """Cut off what was written but not committed, and find where to go on."""
        self._shard, self._end = self.db.execute(
            "SELECT shard, start + length FROM pages WHERE shard IS NOT NULL ORDER BY shard DESC, start DESC"
        ).fetchone() or (0, 0)
        for path in self.folder.glob("pages-*.jsonl.gz"):
            if path > _shard_path(self.folder, self._shard):
                path.unlink()
        path = _shard_path(self.folder, self._shard)
        if path.exists() and path.stat().st_size > self._end:
            with open(path, "r+b") as file:
                file.truncate(self._end)

    def check_same(self, about: dict[str, Any]) -> None:
        """Remember what this crawl is, or compare with what it was when it began.

        Raises:
            ValueError: it differs; the message names what.
        """
        for name, value in about.items():
            text = json.dumps(value, sort_keys=True)
            before = self.db.execute("SELECT value FROM about WHERE name = ?", (name,)).fetchone()
            if before and before[0] != text:
                raise ValueError(
                    f"{self.folder} holds a crawl with {name}={before[0]}, not {text}: take another folder"
                )
        with self.db:
            rows = [(name, json.dumps(value, sort_keys=True)) for name, value in about.items()]
            self.db.executemany("INSERT OR IGNORE INTO about VALUES (?, ?)", rows)

    def add(self, url: str, host: str, depth: int, hops: int = 0) -> None:
        """Put a new address in line (inside a transaction of the caller)."""
        self.db.execute(
            "INSERT INTO pages (url, host, depth, hops) VALUES (?, ?, ?, ?)", (url, host, depth, hops)
        )

    def knows(self, url: str) -> bool:
        """Whether the address was ever put in line."""
        return self.db.execute("SELECT 1 FROM pages WHERE url = ?", (url,)).fetchone() is not None

    def enter_folder(self, folder: str, limit: int) -> bool:
        """Count one more address in a folder of a site; False, and not counted, if it has `limit` already."""
        row = self.db.execute("SELECT pages FROM folders WHERE folder = ?", (folder,)).fetchone()
        if row and row[0] >= limit:
            return False
        self.db.execute(
            "INSERT INTO folders VALUES (?, 1) ON CONFLICT (folder) DO UPDATE SET pages = pages + 1",
            (folder,),
        )
        return True

    def waiting(self) -> list[Entry]:
        """The next address of each host: new ones by depth and in the order found, then those to be tried again."""
        hosts = self.db.execute("SELECT DISTINCT host FROM pages WHERE outcome IS NULL").fetchall()
        rows = (
            self.db.execute(
                "SELECT id, url, host, depth, hops, attempts, ready FROM pages "
                "WHERE outcome IS NULL AND host = ? ORDER BY ready, depth, id LIMIT 1",
                host,
            ).fetchone()
            for host in hosts
        )
        return [Entry(*row) for row in rows]

    def postpone(self, entry: Entry, ready: float) -> None:
        """Note one more failed try; the next one not before `ready`, in seconds since 1970."""
        self.db.execute("UPDATE pages SET attempts = attempts + 1, ready = ? WHERE id = ?", (ready, entry.id))

    def finish(self, entry: Entry, outcome: str, status: int = 0) -> None:
        """Note what came of an address."""
        self.db.execute("UPDATE pages SET outcome = ?, status = ? WHERE id = ?", (outcome, status, entry.id))

    def redirect(self, entry: Entry, target: str) -> bool:
        """Note where an address redirects to; whether that leads back to it, over however many others."""
        self.db.execute("UPDATE pages SET target = ? WHERE id = ?", (target, entry.id))
        seen, step = {entry.url}, target
        while step not in seen:
            seen.add(step)
            row = self.db.execute("SELECT target FROM pages WHERE url = ?", (step,)).fetchone()
            if row is None or row[0] is None:
                return False
            step = row[0]
        return True

    def keep(self, entry: Entry, content_type: str, body: bytes, canonical: str | None) -> None:
        """Write a fetched page to disk and note where it lies."""
        record = {
            "url": entry.url, "status": 200, "content_type": content_type, "time": time.time(),
            "canonical": canonical, "body": base64.b64encode(body).decode("ascii"),
        }  # fmt: skip
        member = gzip.compress(json.dumps(record).encode() + b"\n", compresslevel=6)
        if self._end + len(member) > SHARD_BYTES and self._end:
            self._shard, self._end = self._shard + 1, 0
        with open(_shard_path(self.folder, self._shard), "ab") as file:
            file.write(member)
        self.finish(entry, "fetched", 200)
        self.db.execute(
            "UPDATE pages SET canonical = ?, shard = ?, start = ?, length = ? WHERE id = ?",
            (canonical, self._shard, self._end, len(member), entry.id),
        )
        self._end += len(member)

    def count(self, name: str, by: int = 1) -> None:
        """Add to a named count."""
        self.db.execute(
            "INSERT INTO counts VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET n = n + excluded.n", (name, by)
        )

    def counts(self) -> dict[str, int]:
        """The named counts."""
        return dict(self.db.execute("SELECT name, n FROM counts ORDER BY name").fetchall())

    def outcomes(self) -> dict[str, int]:
        """Addresses by outcome; "waiting" those that have none."""
        rows = self.db.execute(
            f"SELECT CASE WHEN {_DUPLICATE} THEN 'duplicate' ELSE coalesce(outcome, 'waiting') END AS kind, "
            "count(*) FROM pages GROUP BY kind ORDER BY kind"
        )
        return dict(rows.fetchall())

    def fetched(self) -> int:
        """How many pages were fetched."""
        return self.db.execute("SELECT count(*) FROM pages WHERE outcome = 'fetched'").fetchone()[0]


def read_crawl(folder: str | Path, *, duplicates: bool = False) -> Iterator[Fetched]:
    """The pages of a crawl, finished or not, in the order in which their addresses were found.

    Args:
        folder: as given to `crawl`.
        duplicates: whether to give also those that name another fetched page as their canonical address.

    Raises:
        ValueError: there is no crawl, or a page's record is damaged.
    """
    state = Path(folder) / "state.sqlite"
    if not state.is_file():
        raise ValueError(f"{folder} holds no crawl: give the folder that crawl() wrote to")
    where = "outcome = 'fetched'" + ("" if duplicates else f" AND NOT ({_DUPLICATE})")
    db = _connect(state)
    try:
        for shard, start, length in db.execute(
            f"SELECT shard, start, length FROM pages WHERE {where} ORDER BY id"
        ):
            yield _read_record(_shard_path(Path(folder), shard), start, length)
    finally:
        db.close()


def address_outcomes(folder: str | Path) -> dict[str, str]:
    """What came of each address of a crawl: "fetched", "duplicate", "robots", ..., or "waiting"."""
    db = _connect(Path(folder) / "state.sqlite")
    try:
        return dict(
            db.execute(
                f"SELECT url, CASE WHEN {_DUPLICATE} THEN 'duplicate' ELSE coalesce(outcome, 'waiting') END "
                "FROM pages ORDER BY id"
            ).fetchall()
        )
    finally:
        db.close()


def _read_record(path: Path, start: int, length: int) -> Fetched:
    try:
        with open(path, "rb") as file:
            file.seek(start)
            record = json.loads(gzip.decompress(file.read(length)))
        record["body"] = base64.b64decode(record["body"], validate=True)
        return Fetched(**record)
    except (OSError, EOFError, zlib.error, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: the page at byte {start} is damaged ({error}); crawl again") from None


def _shard_path(folder: Path, shard: int) -> Path:
    return folder / f"pages-{shard:05d}.jsonl.gz"


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level="IMMEDIATE")
    # with a write-ahead log a commit costs one append; a kill of the process loses no commit
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = NORMAL")
    return db
