"""The rendered book in `_build/html`: every page is there, whole, and needs no other host."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from bs4 import BeautifulSoup

from llmcourse.book import toc_pages

ROOT = Path(__file__).resolve().parents[1]
HTML = ROOT / "_build/html"
PAGES = toc_pages(ROOT)
LABS = [page for page in PAGES if page.startswith("labs/")]
CHAPTERS = [PAGES[PAGES.index(lab) - 1] for lab in LABS]
APPENDICES = [page for page in PAGES if page.startswith("book/appendix/")]
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))

pytestmark = pytest.mark.book


@cache
def page(name: str) -> BeautifulSoup:
    """The parsed page of a table-of-contents entry."""
    return BeautifulSoup((HTML / f"{name}.html").read_text(encoding="utf-8"), "html.parser")


def article(name: str) -> BeautifulSoup:
    """A page without navigation."""
    return page(name).select_one("article.bd-article")


def source_headings(name: str) -> list[str]:
    """Second-level headings of a page's Markdown."""
    lines = (ROOT / f"{name}.md").read_text(encoding="utf-8").splitlines()
    return [line.removeprefix("## ").strip() for line in lines if line.startswith("## ")]


@pytest.mark.parametrize("name", PAGES)
def test_page_is_there_and_not_empty(name):
    assert len(article(name).get_text(" ", strip=True)) > (60 if name.endswith("bibliography") else 400)
    assert len(article(name).select("h1")) == 1


@pytest.mark.parametrize("name", PAGES)
def test_page_has_a_title_of_its_own(name):
    title = page(name).title.get_text()
    assert title.endswith(CONFIG["title"])
    assert [other for other in PAGES if other != name and page(other).title.get_text() == title] == []


def test_root_leads_to_the_index():
    assert "book/index.html" in (HTML / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PAGES)
def test_page_is_reached_from_the_index(name):
    links = {
        a["href"].split("#")[0]
        for a in page("book/index").select("nav.bd-links a[href], .sidebar-primary-items__start a[href]")
    }
    targets = {(HTML / "book" / href).resolve() for href in links if href}
    assert name == "book/index" or (HTML / f"{name}.html").resolve() in targets


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    here, broken = HTML / f"{name}.html", []
    for element in page(name).select("a[href], img[src], link[rel=stylesheet][href], script[src]"):
        target = urlsplit(element.get("href") or element.get("src"))
        if target.scheme or target.netloc:
            continue
        path = (here.parent / unquote(target.path)).resolve() if target.path else here
        if not path.exists():
            broken.append(target.geturl())
        elif target.fragment and path.suffix == ".html":
            other = page(path.relative_to(HTML).with_suffix("").as_posix())
            if not other.find(id=unquote(target.fragment)):
                broken.append(target.geturl())
    assert broken == []


@pytest.mark.parametrize("name", PAGES)
def test_page_needs_no_other_host(name):
    elements = page(name).select(
        "script[src], link[rel=stylesheet][href], img[src], iframe[src], object[data]"
    )
    sources = [e.get("src") or e.get("href") or e.get("data") for e in elements]
    assert [source for source in sources if source.startswith(("http:", "https:", "//"))] == []
    inline = [script.get_text() for script in page(name).select("script:not([src])")]
    assert not any("unpkg.com" in text or "jsdelivr" in text for text in inline)


@pytest.mark.parametrize("name", PAGES)
def test_figures_have_a_text_alternative(name):
    assert [
        img["src"][:80] for img in article(name).select("img") if len(img.get("alt", "").strip()) < 15
    ] == []


@pytest.mark.parametrize("name", PAGES)
def test_no_markup_is_left_in_the_text(name):
    for code in (body := BeautifulSoup(str(article(name)), "html.parser")).select("pre, code, .math"):
        code.decompose()
    text = body.get_text(" ")
    for leftover in (
        "{cite",
        "{ref}",
        "{eq}",
        "{term}",
        "{numref}",
        ":::",
        "```",
        "{{",
        "Traceback (most recent",
    ):
        assert leftover not in text, f"{leftover} is shown as it was written"
    assert body.select(".problematic, .system-message, .error") == []


@pytest.mark.parametrize("name", CHAPTERS)
def test_chapter_carries_the_number_of_its_lab(name):
    number = int(LABS[CHAPTERS.index(name)].removeprefix("labs/")[:2])
    shown = [
        span.get_text(strip=True)
        for span in article(name).select("h1 > .section-number, h2 > .section-number")
    ]
    assert shown == [f"{number}.", *(f"{number}.{i + 1}." for i in range(len(source_headings(name))))]
    equations = [span.get_text() for span in article(name).select(".eqno")]
    assert equations and all(text.startswith(f"({number}.") for text in equations)
    captions = [span.get_text() for span in article(name).select(".caption-number")]
    assert all(f" {number}." in text for text in captions)


@pytest.mark.parametrize("name", CHAPTERS)
def test_chapter_shows_headings_formulas_listings_figures_and_sources(name):
    body = article(name)
    headings = [h2.get_text().split("#")[0] for h2 in body.select("h2")]
    assert [h.split(". ", 1)[-1].strip() for h in headings] == [
        h.replace("`", "") for h in source_headings(name)
    ]
    assert len(body.select("div.math")) >= 5
    assert len(body.select("figure img, .cell_output img")) >= 1
    assert len(body.select("details")) >= 3, "hidden answers"
    assert len(body.select('a.reference.internal[href*="bibliography.html#"]')) >= 5, "citations"


@pytest.mark.parametrize("name", CHAPTERS)
def test_listings_are_the_code_of_the_package(name):
    package = [path.read_text(encoding="utf-8") for path in (ROOT / "llmcourse").rglob("*.py")]
    listings = [pre.get_text().rstrip() for pre in article(name).select("div[class*=highlight-] pre")]
    from_package = [text for text in listings if any(text in source for source in package)]
    assert len(from_package) >= 2


@pytest.mark.parametrize("name", LABS)
def test_lab_shows_its_outputs_and_opens_in_colab(name):
    notebook = json.loads((ROOT / f"{name}.ipynb").read_text(encoding="utf-8"))
    figures = sum(
        any(
            mime.startswith("image/") or "<img" in "".join(data)
            for mime, data in output.get("data", {}).items()
        )
        for cell in notebook["cells"]
        for output in cell.get("outputs", [])
    )
    assert len(article(name).select(".cell_output img")) >= figures > 0
    assert "[holds]" in article(name).get_text()
    address, branch = (
        CONFIG["repository"]["url"].removeprefix("https://github.com/"),
        CONFIG["repository"]["branch"],
    )
    links = {a["href"] for a in page(name).select("a[href*='colab.research.google.com']")}
    assert links == {f"https://colab.research.google.com/github/{address}/blob/{branch}/{name}.ipynb"}


def test_bibliography_lists_what_is_cited():
    entries = page("book/bibliography").select("div.citation")
    cited = {
        a["href"].split("#")[1]
        for name in (*CHAPTERS, *APPENDICES)
        for a in page(name).select('a[href*="bibliography.html#"]')
    }
    assert len(entries) >= 10 and len(entries) == len(cited)


def test_time_table_lists_each_lab():
    rows = [row.get_text(" ") for row in page("book/how_to_use").select(".cell_output table tbody tr")]
    assert [row.split()[0] for row in rows] == [lab.removeprefix("labs/")[:2] for lab in LABS]


def test_search_index_knows_the_chapters():
    index = (HTML / "searchindex.js").read_text(encoding="utf-8")
    assert all(f'"{name}"' in index for name in PAGES)
