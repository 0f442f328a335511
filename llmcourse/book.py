"""Render the book: Jupyter Book over `_config.yml` and `_toc.yml`, with warnings as errors, into `_build/html`.

`python -m llmcourse.book build` does nothing when no page, lab, listing or stored result changed since the last
build. A build always starts from an empty folder: Sphinx does not re-read a page whose own text is the same, so a
page that quotes a changed result would go stale, and after a failed strict build the next incremental one fails
for its debris.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llmcourse.labs.repository import require_repository
from llmcourse.runtime import progress

COMMAND = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()"]
# What a rendered page is made of, apart from the versions of the tools.
SOURCES = (
    "_config.yml",
    "_toc.yml",
    "requirements.txt",
    "book/**/*",
    "labs/*.ipynb",
    "labs/results/*.json",
    "llmcourse/**/*.py",
    "llmcourse/**/*.json",
    "benchmarks/results/*.json",
)
CACHE, CONFIG = "_build/executed", "_build/_config.yml"
PHASE = re.compile(r"^(reading sources|writing output)\.\.\. \[\s*(\d+)%\]\s*(\S*)")
PROBLEM = re.compile(r"(WARNING|ERROR|CRITICAL|Exception|Error):")
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


class BookError(ValueError):
    """The book could not be built; the message names the first problems and the log."""


@dataclass(frozen=True, kw_only=True)
class Built:
    """A rendered book.

    Attributes:
        index: the page to open first.
        seconds: how long the build took; that of the stored build if nothing was to be done.
        fresh: whether this call built it.
    """

    index: Path
    seconds: float
    fresh: bool


def toc_pages(root: Path) -> list[str]:
    """Pages and labs that `_toc.yml` lists, as paths without suffix, in reading order."""

    def files(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            for key, value in node.items():
                if key in ("root", "file"):
                    yield value
                else:
                    yield from files(value)
        elif isinstance(node, list):
            for value in node:
                yield from files(value)

    return list(files(yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))))


def fingerprint(root: Path) -> str:
    """SHA-256 over the paths and contents of everything that the rendered book depends on."""
    digest = hashlib.sha256(importlib.metadata.version("jupyter-book").encode())
    paths = {path for pattern in SOURCES for path in root.glob(pattern) if path.is_file()}
    for path in sorted(paths):
        name = path.relative_to(root).as_posix()
        if "__pycache__" in name or ".ipynb_checkpoints" in name:
            continue
        digest.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def build(root: Path | None = None, *, force: bool = False) -> Built:
    """Render the book, unless a build of exactly these sources is there.

    Args:
        root: the repository; found from the working directory by default.
        force: build even if nothing changed.

    Raises:
        ValueError: this is no checkout of the course.
        BookError: a page of the table of contents is missing, Jupyter Book is not 1.x, or there was any warning.
    """
    root = require_repository(root)
    index, stamp = root / "_build/html/book/index.html", root / "_build/built.json"
    _check_ready(root)
    now = fingerprint(root)
    if not force and index.is_file() and stamp.is_file():
        stored = json.loads(stamp.read_text(encoding="utf-8"))
        if stored["fingerprint"] == now:
            return Built(index=index, seconds=stored["seconds"], fresh=False)
    started = time.monotonic()
    _empty(root / "_build")
    _execute(root)
    _render(root, pages=len(toc_pages(root)))
    if not index.is_file() or index.stat().st_size < 5000:
        raise BookError(
            f"{index.relative_to(root)} is missing or nearly empty after the build; see _build/build.log"
        )
    seconds = time.monotonic() - started
    stamp.write_text(json.dumps({"fingerprint": now, "seconds": round(seconds, 1)}), encoding="utf-8")
    return Built(index=index, seconds=seconds, fresh=True)


def _check_ready(root: Path) -> None:
    version = importlib.metadata.version("jupyter-book")
    if not version.startswith("1."):
        raise BookError(f"jupyter-book {version}: this book needs 1.x; run pip install -r requirements.txt")
    for page in toc_pages(root):
        if not any((root / f"{page}{suffix}").is_file() for suffix in (".md", ".ipynb")):
            what = (
                f"run make labs LABS={page[5:7]}" if page.startswith("labs/") else "write it or take it out"
            )
            raise BookError(f"_toc.yml lists {page}, which does not exist; {what}")


def _empty(folder: Path) -> None:
    """Remove what earlier builds left, but not `labs`: runs of labs with other parameters are kept there."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.name != "labs":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _execute(root: Path) -> None:
    """Run the cells of all pages, several pages at a time, into a cache that `_render` reads.

    Sphinx executes page after page, which takes most of a build. A page that fails is left to it, and to its messages.
    """
    from jupyter_cache import get_cache
    from jupyter_cache.executors.utils import ExecutionResult, create_cache_bundle, single_nb_execution

    settings = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))
    timeout = settings["execute"]["timeout"]
    own = settings["sphinx"].get("local_extensions", {})
    settings["sphinx"]["local_extensions"] = {name: str(root / folder) for name, folder in own.items()}
    settings["execute"] |= {"execute_notebooks": "cache", "cache": str(root / CACHE)}
    (root / CONFIG).write_text(yaml.safe_dump(settings, allow_unicode=True), encoding="utf-8")
    cache = get_cache(root / CACHE)
    paths = [root / f"{page}.md" for page in toc_pages(root) if (root / f"{page}.md").is_file()]
    with_cells = [path for path in paths if "```{code-cell}" in path.read_text(encoding="utf-8")]
    with_cells.sort(key=lambda path: path.parent.name != "appendix")  # the longest runs first

    def run(page: Any) -> ExecutionResult:
        folder = str(Path(page.uri).parent)
        quiet = ["--log-level=ERROR"]
        return single_nb_execution(page.nb, folder, timeout, allow_errors=False, extra_arguments=quiet)

    with (
        _one_thread_each(),
        ThreadPoolExecutor(os.cpu_count()) as pool,
        progress(total=len(with_cells), description="running the pages' cells", unit="page") as bar,
    ):
        records = [
            cache.add_nb_to_project(str(path), read_data={"name": "myst_nb_md", "type": "plugin"})
            for path in with_cells
        ]
        pages = [cache.get_project_notebook(record.pk) for record in records]
        runs = {pool.submit(run, page): page for page in pages}
        for done in as_completed(runs):
            result = done.result()
            if result.err is None:
                bundle = create_cache_bundle(runs[done], result.cwd, None, result.time, None)
                cache.cache_notebook_bundle(bundle, check_validity=False, overwrite=True)
            bar.update(1)


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Kernels that are started inside compute with one thread: several that take all cores wait for one another."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        os.environ.pop("OMP_NUM_THREADS")
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


def _render(root: Path, pages: int) -> None:
    """Run Jupyter Book; keep its output in `_build/build.log`, show progress, raise with the problems it printed."""
    command = [*COMMAND, "build", str(root), "--config", str(root / CONFIG), "-W", "-n", "--keep-going"]
    lines: list[str] = []
    with (
        progress(total=2 * pages, description="building the book", unit="page") as bar,
        subprocess.Popen(
            command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process,
    ):
        for line in process.stdout or ():
            lines.append(ESCAPES.sub("", line))
            if match := PHASE.match(lines[-1]):
                half = 0 if match[1].startswith("reading") else 1
                bar.set_postfix_str(match[3], refresh=False)
                bar.update(round(pages * (half + int(match[2]) / 100)) - bar.n)
    (root / "_build/build.log").write_text("".join(lines), encoding="utf-8")
    if process.returncode:
        problems = [line.strip().replace(f"{root}/", "") for line in lines if PROBLEM.search(line)]
        shown = "\n  ".join(dict.fromkeys(problems[:20])) or lines[-1].strip()
        raise BookError(f"the book was not built (whole output in _build/build.log):\n  {shown}")


def main(arguments: list[str] | None = None) -> int:
    """Command line: `python -m llmcourse.book build [--force]`. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m llmcourse.book", description="Render the book.")
    parser.add_argument("command", choices=["build"])
    parser.add_argument("--force", action="store_true", help="build even if nothing changed")
    options = parser.parse_args(arguments)
    try:
        built = build(force=options.force)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    state = f"built in {built.seconds:.0f} s" if built.fresh else "up to date"
    print(f"book: {state}; open {built.index}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
