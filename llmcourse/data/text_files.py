"""Text files of one's own as a corpus."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path

from datasets import Dataset

SUFFIXES = (".txt", ".md", ".jsonl", ".html")


def files(paths: str | Path | Sequence[str | Path], license: str = "unknown") -> Dataset:
    """Read files into a data set: one document per file, or per line of a .jsonl file.

    Args:
        paths: files, folders (searched through for .txt, .md, .jsonl and .html) or globs such as
            "notes/**/*.md"; one or several. Matches of one path are read in alphabetical order, a file that
            several match only once.
        license: what to write into the license column.

    Returns:
        Columns text, source and license. The source is the file's path below the folder or the fixed part of
        the glob, with the line's number for .jsonl. HTML is kept as it is. Blank documents are left out.

    Raises:
        ValueError: a path matches no file, a file is of another type or not UTF-8, a line of a .jsonl file is
            not an object with a text under "text", or no document has any text.
    """
    rows: dict[str, list[str]] = {"text": [], "source": []}
    seen: set[Path] = set()
    for pattern in [paths] if isinstance(paths, str | Path) else paths:
        for path, name in _matches(str(pattern)):
            if path.resolve() in seen:
                continue
            seen.add(path.resolve())
            for source, text in _read(path, name):
                if text.strip():
                    rows["text"].append(text)
                    rows["source"].append(source)
    if not rows["text"]:
        raise ValueError(f"files:{paths} holds no text: every document is blank")
    return Dataset.from_dict(rows | {"license": [license] * len(rows["text"])})


def _matches(pattern: str) -> list[tuple[Path, str]]:
    """Files that a path, folder or glob stands for, each with its name for the source column."""
    path = Path(pattern).expanduser()
    if path.is_file():
        found, root = [path], path.parent
    elif path.is_dir():
        found, root = [p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file()], path
    else:
        found = [Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file()]
        root = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
    if not found:
        raise ValueError(
            f"files:{pattern} matches no file: give a file, a folder with {', '.join(SUFFIXES)} files,"
            " or a glob such as 'notes/**/*.md'"
        )
    return [(path, path.relative_to(root).as_posix()) for path in sorted(found)]


def _read(path: Path, name: str) -> Iterator[tuple[str, str]]:
    """(source, text) of each document of a file."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{name}: files ending in {path.suffix!r} are not read, only {', '.join(SUFFIXES)}")
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: byte {error.start} is not UTF-8; convert the file first") from error
    if path.suffix != ".jsonl":
        yield name, content
        return
    for number, line in enumerate(content.split("\n"), start=1):  # splitlines would also split at U+2028
        if line.strip():
            yield f"{name}:{number}", _text_of_line(line, f"{name}:{number}")


def _text_of_line(line: str, where: str) -> str:
    try:
        text = json.loads(line)["text"]
        text.encode()  # refuses numbers and lone surrogates, which no file of text can hold
    except (json.JSONDecodeError, LookupError, TypeError, AttributeError, UnicodeEncodeError) as error:
        raise ValueError(f'{where}: not a line like {{"text": "..."}} ({type(error).__name__})') from error
    return text
