"""The rendered book in a real browser, at desktop and phone width, without any network but this machine."""

from __future__ import annotations

import functools
import os
import shutil
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from llmcourse.book import toc_pages

ROOT = Path(__file__).resolve().parents[1]
HTML = ROOT / "_build/html"
PAGES = toc_pages(ROOT)
LABS = [page for page in PAGES if page.startswith("labs/")]
CHAPTERS = [PAGES[PAGES.index(lab) - 1] for lab in LABS]
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
FLAGS = [
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
]

pytestmark = pytest.mark.book


def find_browser() -> str | None:
    """`$CHROMIUM`, else the first Chromium or Chrome on the path."""
    names = [
        os.environ.get("CHROMIUM"),
        "chromium",
        "chromium-browser",
        "google-chrome",
        "google-chrome-stable",
    ]
    return next((found for name in names if name and (found := shutil.which(name))), None)


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nothing: a log of requests would hide the test report."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(QuietHandler, directory=str(HTML)))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture(scope="module")
def browser():
    executable = find_browser()
    if executable is None:
        pytest.skip("no Chromium or Chrome on this machine; install one, or name it in CHROMIUM")
    playwright_api = pytest.importorskip("playwright.sync_api")
    # Chromium's sandbox cannot start as root, which is what containers run as.
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    with playwright_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=executable, args=[*FLAGS, *(["--no-sandbox"] if root else [])]
        )
        yield chromium
        chromium.close()


class Visit:
    """A tab of a given size that notes everything that goes wrong in it."""

    def __init__(self, browser, server: str, size: str) -> None:
        width, height = SIZES[size]
        self.server, self.problems, self.outside = server, [], []
        self.context = browser.new_context(
            viewport={"width": width, "height": height}, has_touch=size == "phone"
        )
        self.page = self.context.new_page()
        self.page.set_default_timeout(15_000)
        self.page.on(
            "console", lambda m: self.problems.append(m.text) if m.type in ("error", "warning") else None
        )
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on(
            "response", lambda r: self.problems.append(f"{r.status} {r.url}") if r.status >= 400 else None
        )
        self.page.route("**/*", self.only_here)

    def only_here(self, route) -> None:
        if route.request.url.startswith((self.server, "data:", "blob:")):
            route.continue_()
        else:
            self.outside.append(route.request.url)
            route.abort()

    def open(self, name: str):
        self.page.goto(f"{self.server}/{name}.html", wait_until="load")
        # MathJax resolves its promise when every formula of the page is typeset.
        self.page.evaluate("() => window.MathJax && MathJax.startup ? MathJax.startup.promise : null")
        return self.page


@pytest.fixture(params=SIZES)
def visit(request, browser, server) -> Iterator[Visit]:
    tab = Visit(browser, server, request.param)
    yield tab
    tab.context.close()


LOOK = """async () => {
    const article = document.querySelector('article'), wide = e => e.getBoundingClientRect().right > innerWidth + 1;
    const formulas = [...article.querySelectorAll('mjx-container')].map(e => [e, e.getBoundingClientRect()]);
    const seen = { fits: document.documentElement.scrollWidth <= innerWidth + 1,
        wide: [...article.querySelectorAll('*')].filter(wide).slice(0, 5).map(e => e.outerHTML.slice(0, 120)),
        written: article.querySelectorAll('.math').length,
        typeset: formulas.length,
        visible: formulas.filter(([e]) => !e.closest('details')).map(([e, box]) => [box.width, box.height]),
        errors: [...article.querySelectorAll('mjx-merror, [data-mjx-error]')].map(e => e.textContent) };
    document.querySelectorAll('details').forEach(d => d.open = true);
    seen.images = await Promise.all([...article.querySelectorAll('img')].map(async img => {
        img.loading = 'eager'; await img.decode().catch(() => null);
        return [img.src.slice(0, 80), img.naturalWidth, img.getBoundingClientRect().width, img.alt.length]; }));
    return seen; }"""


@pytest.fixture(scope="module")
def look(browser, server):
    """`look(name, size)`: what there is to see on a page, loaded once for all tests that ask."""

    @functools.cache
    def see(name: str, size: str) -> dict:
        tab = Visit(browser, server, size)
        seen = tab.open(name).evaluate(LOOK)
        tab.context.close()
        return {**seen, "problems": tab.problems, "outside": tab.outside}

    return see


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PAGES)
def test_page_loads_cleanly_and_fits(look, name, size):
    seen = look(name, size)
    assert seen["problems"] == []
    assert seen["outside"] == [], "a page must not need another host"
    assert seen["fits"], f"wider than the window: {seen['wide']}"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PAGES)
def test_formulas_are_typeset(look, name, size):
    seen = look(name, size)
    assert seen["errors"] == [] and seen["typeset"] >= seen["written"]
    assert all(width > 0 and height > 0 for width, height in seen["visible"])
    assert len(seen["visible"]) >= 10 or name not in CHAPTERS


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PAGES)
def test_figures_are_loaded(look, name, size):
    images = look(name, size)["images"]
    assert [image for image in images if image[1] == 0 or image[2] < 10 or image[3] == 0] == []
    assert images or name not in [*CHAPTERS, *LABS, "book/index"]


def test_one_can_walk_from_the_index_to_every_page(visit):
    page = visit.open("book/index")
    seen = [page.url]
    for _ in PAGES[1:]:
        page.locator("a.right-next").click()
        page.wait_for_load_state("load")
        seen.append(page.url)
    assert seen == [f"{visit.server}/{name}.html" for name in PAGES]
    assert visit.problems == []


@pytest.mark.parametrize("name", CHAPTERS)
def test_sidebar_leads_to_the_chapter(visit, name):
    page = visit.open("book/index")
    link = page.locator(f'.bd-sidebar-primary a[href$="{name.removeprefix("book/")}.html"]').first
    if not link.is_visible():  # a phone has the contents behind a button
        page.locator("button.primary-toggle").first.click()
    link.click()
    page.wait_for_url(f"**/{name}.html")
    assert page.locator("article h1").is_visible()


@pytest.mark.parametrize("name", CHAPTERS)
def test_hidden_answers_open(visit, name):
    page = visit.open(name)
    details = page.locator("article details").first
    inside = details.locator(":scope > :not(summary)").first
    assert not inside.is_visible()
    details.locator("summary").click()
    assert inside.is_visible() and inside.inner_text().strip()


def test_pointing_at_a_term_shows_its_definition(browser, server):
    tab = Visit(browser, server, "desktop")
    page = tab.open("book/glossary")
    # One whose definition has a formula, which is typeset in the tooltip.
    selectors = page.evaluate(
        """() => Object.keys(selector_to_html).filter(s => selector_to_html[s].includes('class="math') &&
            document.querySelector(`article.bd-article ${s}:not(.headerlink)`))"""
    )
    page.locator(f"article.bd-article {selectors[0]}:not(.headerlink)").first.hover()
    page.locator(".tippy-box mjx-container svg").first.wait_for(state="visible")
    assert len(page.locator(".tippy-box").inner_text()) > 40
    assert tab.problems == [] and tab.outside == []
    tab.context.close()


def test_search_finds_a_chapter(browser, server):
    tab = Visit(browser, server, "desktop")
    page = tab.page
    page.goto(f"{server}/search.html?q=attention")
    page.wait_for_selector("#search-results li a")
    found = page.locator("#search-results li a").evaluate_all("links => links.map(a => a.href)")
    assert any("attention" in url for url in found)
    assert tab.problems == [] and tab.outside == []
    tab.context.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_contrasts_with_its_page(browser, server, theme):
    tab = Visit(browser, server, "desktop")
    page = tab.open("book/index")
    page.evaluate("theme => document.documentElement.dataset.theme = theme", theme)
    page.wait_for_timeout(300)
    text, ground = page.evaluate(
        """() => { const luminance = color => { const c = color.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
            .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2]; };
        return [luminance(getComputedStyle(document.querySelector('article p')).color),
                luminance(getComputedStyle(document.body).backgroundColor)]; }"""
    )
    # WCAG 2.1, success criterion 1.4.3 asks for 4.5; the bar here is that of its level AAA.
    assert (max(text, ground) + 0.05) / (min(text, ground) + 0.05) >= 7
    tab.context.close()
