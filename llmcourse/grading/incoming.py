"""The files of a hand-in, read from a zip or a folder that strangers have filled.

Links are not followed and not copied, nothing is written here, names cannot lead anywhere, and sizes are counted while
bytes are read, whatever the archive says about them.
"""

from __future__ import annotations

import os
import re
import stat
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

MAX_MEMBERS = 50_000
MAX_FILE_BYTES = 64_000_000
MAX_TOTAL_BYTES = 20_000_000_000
MAX_RATIO, RATIO_FROM_BYTES = 200, 1_000_000
MAX_DEPTH, MAX_NAME = 12, 1000
BLOCK = 1 << 20
# What operating systems add by themselves: not worth a line.
LITTER = re.compile(r"(^|/)(__MACOSX/|\.DS_Store$|Thumbs\.db$|desktop\.ini$|\.ipynb_checkpoints/)")


@dataclass(frozen=True)
class Refused:
    """A file that was left out, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Incoming:
    """A file of a hand-in: its path in it, and where its bytes are read from."""

    path: str
    source: Archive | Folder | Broken

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of its path."""
        return PurePosixPath(self.path).parts

    @property
    def name(self) -> str:
        """Its own name."""
        return self.parts[-1]

    def read(self, limit: int = MAX_FILE_BYTES) -> bytes:
        """Its bytes.

        Raises:
            ValueError: it has more than `limit`, is damaged, or is compressed beyond reason; the message is a reason.
        """
        return self.source.read(self.path, limit)


@dataclass(frozen=True)
class Broken:
    """Where a file comes from that is not read: a link, a device, an encrypted member."""

    reason: str

    def read(self, path: str, limit: int) -> bytes:
        """Raises the reason as a `ValueError`."""
        raise ValueError(self.reason)


class Archive:
    """A zip file.

    Attributes:
        files: its files with harmless names, by name.
        refused: the others.
    """

    def __init__(self, path: Path) -> None:
        """Look at the list of members.

        Raises:
            ValueError: it is no zip file, or has too many members or bytes.
        """
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise ValueError(f"{path} cannot be opened as a zip file: {error}") from None
        try:
            self._look(path)
        except ValueError:
            self._zip.close()
            raise

    def _look(self, path: Path) -> None:
        members = self._zip.infolist()
        if len(members) > MAX_MEMBERS:
            raise ValueError(
                f"{path} holds {len(members)} files, more than {MAX_MEMBERS}: collect it in parts"
            )
        total = sum(member.file_size for member in members)
        if total > MAX_TOTAL_BYTES:
            raise ValueError(
                f"{path} unpacks to {total / 1e9:.0f} GB, more than {MAX_TOTAL_BYTES / 1e9:.0f}: not opened"
            )
        self._members: dict[str, zipfile.ZipInfo] = {}
        self.refused: list[Refused] = []
        files: list[Incoming] = []
        for member in members:
            name = member.filename
            if member.is_dir() or LITTER.search(name):
                continue
            if reason := unsafe_name(name):
                self.refused.append(Refused(printable(name), reason))
                continue
            reason = _odd_kind(member.external_attr >> 16) or (
                "it is encrypted" if member.flag_bits & 1 else ""
            )
            if name in self._members:
                reason = "the archive holds another file of that name"
            files.append(Incoming(name, Broken(reason) if reason else self))
            self._members.setdefault(name, member)
        self.files = sorted(files, key=lambda file: file.path)

    def read(self, path: str, limit: int) -> bytes:
        """See `Incoming.read`."""
        member = self._members[path]
        parts, size = [], 0
        try:
            with self._zip.open(member) as file:
                while block := file.read(BLOCK):
                    size += len(block)
                    if size > limit:
                        raise ValueError(f"it has more than {limit / 1e6:g} MB")
                    if size > max(RATIO_FROM_BYTES, MAX_RATIO * member.compress_size):
                        raise ValueError(f"it is compressed by more than 1 to {MAX_RATIO}")
                    parts.append(block)
        except (
            zipfile.BadZipFile,
            zlib.error,
            EOFError,
            OSError,
            NotImplementedError,
            RuntimeError,
        ) as error:
            raise ValueError(f"it is damaged ({type(error).__name__})") from None
        return b"".join(parts)

    def close(self) -> None:
        """Close the file."""
        self._zip.close()


class Folder:
    """A folder.

    Attributes:
        files: its files, those in folders below too, by name; links are not followed.
        refused: what has no harmless name, or lies too deep.
    """

    def __init__(self, path: Path) -> None:
        """Look at the names.

        Raises:
            ValueError: it is no folder, or holds too many files.
        """
        self._root = path
        self.refused: list[Refused] = []
        found: list[Incoming] = []
        self._entries = 0
        try:
            self._look(path, "", found)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from None
        self.files = sorted(found, key=lambda file: file.path)

    def _look(self, folder: Path, prefix: str, found: list[Incoming]) -> None:
        with os.scandir(folder) as entries:
            for entry in entries:
                self._entries += 1
                if self._entries > MAX_MEMBERS:
                    raise ValueError(f"{self._root} holds more than {MAX_MEMBERS} files: collect it in parts")
                path = prefix + entry.name
                if LITTER.search(path + ("/" if entry.is_dir(follow_symlinks=False) else "")):
                    continue
                mode = entry.stat(follow_symlinks=False).st_mode
                if reason := unsafe_name(path):
                    self.refused.append(Refused(printable(path), reason))
                elif stat.S_ISDIR(mode):
                    self._look(folder / entry.name, f"{path}/", found)
                else:
                    reason = _odd_kind(mode)
                    found.append(Incoming(path, Broken(reason) if reason else self))

    def read(self, path: str, limit: int) -> bytes:
        """See `Incoming.read`; no link is followed on the way, whatever stood there when it was looked at."""
        handle = -1
        try:
            handle = os.open(self._root, os.O_RDONLY)
            for part in PurePosixPath(path).parts:
                inner = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=handle)
                os.close(handle)
                handle = inner
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise ValueError("it is no regular file")
            with open(handle, "rb", closefd=False) as file:
                data = file.read(limit + 1)
        except OSError as error:
            raise ValueError(f"it cannot be read ({error.strerror})") from None
        finally:
            if handle >= 0:
                os.close(handle)
        if len(data) > limit:
            raise ValueError(f"it has more than {limit / 1e6:g} MB")
        return data

    def close(self) -> None:
        """Nothing to close."""


@contextmanager
def opened(path: Path) -> Iterator[Archive | Folder]:
    """A folder, or a zip file.

    Raises:
        ValueError: it is neither.
    """
    if path.is_dir():
        source: Archive | Folder = Folder(path)
    elif path.is_file():
        source = Archive(path)
    else:
        raise ValueError(f"{path} does not exist: give a folder, or the zip file of a learning platform")
    try:
        yield source
    finally:
        source.close()


def unsafe_name(path: str) -> str:
    """Why a path is not used, or ""."""
    parts = path.split("/")
    if path.startswith("/") or "\\" in path or re.match(r"[A-Za-z]:", path):
        return "its name is not a path inside the archive"
    if ".." in parts or "." in parts:
        return "its name leads out of the archive"
    if len(path) > MAX_NAME or len(parts) > MAX_DEPTH:
        return "its name is too long, or it lies too deep"
    if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", path):
        return "its name holds control characters"
    return ""


def printable(text: str, limit: int = 200) -> str:
    """A name as one line that a terminal shows as it is."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text[:limit])


def _odd_kind(mode: int) -> str:
    kind = stat.S_IFMT(mode)
    if kind == stat.S_IFLNK:
        return "it is a link"
    return "" if kind in (0, stat.S_IFREG) else "it is no regular file"
