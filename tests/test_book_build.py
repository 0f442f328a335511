"""`llmcourse.book`: what makes a book stale, how a failure shows, and a whole build of a tiny book."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
import yaml

from llmcourse import book, course

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def tiny(tmp_path) -> Path:
    """A checkout with this course's configuration, two pages, and one lab below the second."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    (tmp_path / "_config.yml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    toc = {
        "format": "jb-book",
        "root": "book/index",
        "parts": [
            {
                "caption": "Part",
                "chapters": [{"file": "book/part/topic", "sections": [{"file": "labs/07_topic"}]}],
            }
        ],
    }
    (tmp_path / "_toc.yml").write_text(yaml.safe_dump(toc, sort_keys=False), encoding="utf-8")
    (tmp_path / "labs/src").mkdir(parents=True)
    (tmp_path / "book/part").mkdir(parents=True)
    for name in ("_extensions", "_static"):
        shutil.copytree(ROOT / "book" / name, tmp_path / "book" / name)
    (tmp_path / "book/references.bib").write_text("", encoding="utf-8")
    (tmp_path / "book/index.md").write_text("# Index\n\nSee {ref}`theory`.\n", encoding="utf-8")
    (tmp_path / "book/part/topic.md").write_text(
        "# Topic\n\n## Intuition\n\n(theory)=\n## Theory\n\n```{math}\n:label: e\n\\KL(p, q)\n```\n\nSee {eq}`e`.\n",
        encoding="utf-8",
    )
    (tmp_path / "labs/07_topic.ipynb").write_text(
        '{"cells": [{"cell_type": "markdown", "id": "a", "metadata": {}, "source": "# Lab 07\\n\\n## Setup"}],'
        ' "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3"}},'
        ' "nbformat": 4, "nbformat_minor": 5}',
        encoding="utf-8",
    )
    return tmp_path


def test_toc_pages_in_reading_order(tiny):
    assert book.toc_pages(tiny) == ["book/index", "book/part/topic", "labs/07_topic"]


@pytest.mark.parametrize(
    "name", ["_toc.yml", "book/part/topic.md", "labs/07_topic.ipynb", "labs/results/07_topic.json"]
)
def test_fingerprint_follows_each_source(tiny, name):
    before = book.fingerprint(tiny)
    assert book.fingerprint(tiny) == before
    path = tiny / name
    path.parent.mkdir(exist_ok=True)
    path.write_text((path.read_text() if path.exists() else "") + " ", encoding="utf-8")
    assert book.fingerprint(tiny) != before


def test_fingerprint_ignores_caches(tiny):
    before = book.fingerprint(tiny)
    cache = tiny / "book/_extensions/__pycache__"
    cache.mkdir(exist_ok=True)
    (cache / "chapter_numbers.cpython-311.pyc").write_bytes(b"new")
    assert book.fingerprint(tiny) == before


def test_missing_lab_says_how_to_make_it(tiny):
    (tiny / "labs/07_topic.ipynb").unlink()
    with pytest.raises(
        book.BookError, match="lists labs/07_topic, which does not exist; run make labs LABS=07"
    ):
        book.build(tiny)


def test_missing_page(tiny):
    (tiny / "book/part/topic.md").unlink()
    with pytest.raises(book.BookError, match="lists book/part/topic, which does not exist"):
        book.build(tiny)


def test_jupyter_book_2_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(book.importlib.metadata, "version", lambda name: "2.1.7")
    with pytest.raises(book.BookError, match="jupyter-book 2.1.7: this book needs 1.x"):
        book.build(tiny)


def test_outside_a_checkout(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        book, "require_repository", lambda root: (_ for _ in ()).throw(ValueError("no checkout here"))
    )
    assert book.main(["build"]) == 1
    assert capsys.readouterr().err == "error: no checkout here\n"


@pytest.mark.slow
def test_build_numbers_chapters_by_their_labs_and_skips_when_current(tiny):
    kept = tiny / "_build/labs/07_topic.ipynb"
    kept.parent.mkdir(parents=True)
    kept.write_text("{}", encoding="utf-8")
    (tiny / "_build/html").mkdir()
    (tiny / "_build/html/old.html").write_text("left over", encoding="utf-8")
    first = book.build(tiny)
    page = (tiny / "_build/html/book/part/topic.html").read_text(encoding="utf-8")
    headings = re.findall(r'section-number">([\d.]+) </span>(\w+)', page)
    assert headings[:3] == [("7.", "Topic"), ("7.1.", "Intuition"), ("7.2.", "Theory")]
    assert 'class="eqno">(7.1)' in page
    assert first.fresh and first.index == tiny / "_build/html/book/index.html"
    assert kept.exists() and not (tiny / "_build/html/old.html").exists()
    second = book.build(tiny)
    assert not second.fresh and second.seconds == pytest.approx(first.seconds, abs=0.1)
    # One more word, with a reference to nothing: the book is stale, and the failure names page, line and target.
    topic = tiny / "book/part/topic.md"
    topic.write_text(topic.read_text(encoding="utf-8") + "\nSee {ref}`nowhere`.\n", encoding="utf-8")
    with pytest.raises(book.BookError, match=r"topic\.md:\d+: WARNING: undefined label: 'nowhere'"):
        book.build(tiny)
    assert "nowhere" in (tiny / "_build/build.log").read_text(encoding="utf-8")
    assert not (tiny / "_build/built.json").exists(), "a failed build must not count as current"


HEAD = """---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---

# Index

See {ref}`theory`.

"""


def index_with(tiny, code):
    """Give the first page a cell."""
    (tiny / "book/index.md").write_text(f"{HEAD}```{{code-cell}} python\n{code}\n```\n", encoding="utf-8")


@pytest.mark.slow
def test_cells_run_once_in_the_folder_of_their_page(tiny):
    index_with(
        tiny,
        "import pathlib\nwith open('runs', 'a') as file: file.write('x')\nprint(pathlib.Path.cwd().name, 6 * 7)",
    )
    before = os.environ.get("OMP_NUM_THREADS")
    book.build(tiny)
    assert "book 42" in (tiny / "_build/html/book/index.html").read_text(encoding="utf-8")
    assert (tiny / "book/runs").read_text() == "x" and os.environ.get("OMP_NUM_THREADS") == before


@pytest.mark.slow
def test_a_cell_that_fails_stops_the_build(tiny):
    index_with(tiny, "raise KeyError('no such result')")
    with pytest.raises(book.BookError, match=r"(?s)index.*no such result"):
        book.build(tiny)


def test_course_stops_at_a_failing_lab(monkeypatch, capsys):
    class Failed:
        returncode = 3

    monkeypatch.setattr(course.subprocess, "run", lambda command, check: Failed())
    monkeypatch.setattr(course.book, "main", lambda arguments: pytest.fail("must not build the book"))
    assert course.main(["--labs", "01"]) == 3
    assert "a lab failed" in capsys.readouterr().err


def test_course_passes_labs_on_and_counts_the_set_up(monkeypatch, capsys):
    seen = []

    class Done:
        returncode = 0

    monkeypatch.setattr(course.subprocess, "run", lambda command, check: seen.append(command) or Done())
    monkeypatch.setattr(course.book, "main", lambda arguments: 0)
    monkeypatch.setattr(course.time, "time", lambda: 1125.0)
    assert course.main(["--labs", "01 04", "--started", "1000"]) == 0
    assert seen[0][1:] == ["-m", "llmcourse.labs", "execute", "--labs", "01 04"]
    assert "total: 2 min 5 s" in capsys.readouterr().out
