"""Main text out of pages, compared with the truth of the dump."""

from __future__ import annotations

import functools
import math
import operator

import pytest

from llmcourse.data.extraction import (
    ExtractionSettings,
    Overlap,
    extract,
    score_extraction,
    strip_tags,
)
from llmcourse.data.tinytown import Town
from llmcourse.data.web_dump import web_dump
from llmcourse.data.web_text import mojibake

PAGE = """<html LANG="EN-gb"><head><title> A &amp;
 B </title><link rel="Canonical" href="/own"></head><body><nav><ul><li><a href="/">menu item</a></li></ul></nav><main>
<h1>Heading</h1><p>One <b>bold</b> <a href="q?x=1">link</a> in a text that is long
enough to count.<br>Second line</p><ul><li>first item here</li><li>second <i>item</i></li></ul>
<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table>
</main><script>var x = "<p>never shown</p>";</script><footer>Footer text</footer></body></html>"""
PLAIN = "<html><body><main><p>A text of one paragraph, long enough to be taken.</p></main></body></html>"


@pytest.fixture(scope="module")
def pages():
    return list(web_dump(Town(seed=2), 100, seed=7))


def shown(page):
    """The main text as the page shows it: garbled if the page is."""
    text = page.labels["text"]
    return mojibake(text) if page.labels["encoding"] == "mojibake" else text


def total(pages, read):
    return functools.reduce(operator.add, (score_extraction(read(page.html), shown(page)) for page in pages))


def test_borders_of_lines_and_paragraphs_survive():
    found = extract(PAGE, url="http://site.example/folder/page.html")
    assert found.dropped is None and found.encoding is None
    assert found.text == (
        "Heading\n\nOne bold link in a text that is long enough to count.\nSecond line\n\n"
        "first item here\nsecond item\n\na | b\n1 | 2"
    )
    assert found.title == "A & B" and found.language == "en-gb"
    assert found.canonical == "http://site.example/own"
    assert found.links == ("http://site.example/", "http://site.example/folder/q?x=1")


def test_the_baseline_keeps_all_that_is_shown():
    text = strip_tags(PAGE)
    assert text.startswith("menu item\n\nHeading\n\nOne bold link") and text.endswith("Footer text")
    assert "never shown" not in text and "A & B" not in text
    assert strip_tags(PAGE.encode()) == text


def test_the_dump_is_extracted_exactly_and_the_baseline_is_not(pages):
    ours = total(pages, lambda html: extract(html).text)
    baseline = total(pages, strip_tags)
    assert ours.pages == baseline.pages == 100
    assert ours.words.f1 == 1.0 and ours.lines.f1 == 1.0
    # trafilatura takes no-break spaces at words' ends, which only garbled pages have, for spaces
    odd = sum("\u00a0" in shown(page) for page in pages)
    assert 100 - odd <= ours.exact <= 100 and odd < 10
    assert baseline.words.recall == 1.0 and baseline.words.precision < 0.9 and baseline.exact == 0


def test_the_defaults_of_the_library_return_menus_on_short_pages(pages):
    default = total(pages, lambda html: extract(html, settings=ExtractionSettings(min_chars=250)).text)
    assert (
        default.words.precision < 0.995 < 1.0 == total(pages, lambda html: extract(html).text).words.precision
    )


def test_layout_tables_keep_their_paragraphs_and_data_tables_their_rows():
    cell = "<p>A text in a cell, as pages once were.<br>With a line.</p><p>Another paragraph.</p>"
    layout = f"<table><tr><td>{cell}</td></tr></table>"
    data = "<table><tr><td>name</td><td>age</td></tr><tr><td>oak</td><td>two hundred years</td></tr></table>"
    middle = "<p>A paragraph between the two of them, long enough to be taken for text by anybody.</p>" * 2
    page = f"<html><body>{layout}{middle}{data}</body></html>"
    text = extract(page).text
    assert text.startswith("A text in a cell, as pages once were.\nWith a line.\n\nAnother paragraph.\n\n")
    assert text.endswith("name | age\noak | two hundred years")
    without = extract(page, settings=ExtractionSettings(tables=False)).text
    assert "cell" not in without and "oak" not in without and "between the two" in without


def test_comments_are_part_of_the_text_if_asked_for():
    comments = "".join(
        f"<div class='comment'><p>Reader {i} wrote this remark about it.</p></div>" for i in range(4)
    )
    article = "<article>" + "<p>A sentence of the article that is long enough.</p>" + "</article>"
    page = f"<html><body>{article}<section id='comments'>{comments}</section></body></html>"
    without, with_comments = (
        extract(page, settings=ExtractionSettings(comments=comments)).text for comments in (False, True)
    )
    assert "Reader" not in without and "Reader 3" in with_comments


@pytest.mark.parametrize(
    ("html", "reason"),
    [
        (b"", "empty"),
        (" \n", "empty"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)), "binary"),
        (bytes(range(1, 32)) * 20, "binary"),
        ("<!-- nothing else -->", "no element"),
        ("<html><body></body></html>", "no text"),
        ("<div>" * 20_000 + "deep", "no text"),
        ("<p>long</p>" * 200_000, "too large"),
    ],
)
def test_what_cannot_be_read_is_dropped_with_its_reason(html, reason):
    found = extract(html)
    assert found.dropped == reason and found.text == ""


@pytest.mark.parametrize(
    "html",
    [
        "<p>Unclosed <b>text <i> of a page that is long enough <div> second </p></b> of all",
        "Plain text of a page without any tag at all, of some length.",
        '<?xml version="1.0" encoding="latin-1"?><html><body><p>Some good words, long enough to be text.</p></body>',
        "<p>A lone surrogate \ud800 in a line that is long enough to be text.</p>",
        "<p>A reference &#0; &#xD800; &#99999999; &nosuch; in a line that is long enough.</p",
        "<html><body><a href='http://[oops'>x</a><p>A link that nobody can read, and text after it.</p></body></html>",
    ],
)
def test_malformed_pages_give_what_they_have(html):
    found = extract(html, url="http://h.example/")
    assert found.dropped is None and len(found.text) > 30


def test_bytes_are_decoded_by_their_header():
    text = "The café of the town, with its crêpes, opens at nine."
    body = f"<html><body><main><p>{text}</p></main></body></html>".encode("cp1252")
    found = extract(body, content_type="text/html; charset=iso-8859-1")
    assert found.text == text and found.encoding == "windows-1252"
    assert extract(PLAIN.encode()).encoding == "utf-8"


def test_max_bytes_counts_bytes():
    settings = ExtractionSettings(max_bytes=len(PLAIN))
    assert extract(PLAIN, settings=settings).dropped is None
    assert extract(PLAIN.replace("text", "té"), settings=settings).dropped is None
    assert extract(PLAIN.replace("text", "tüxt"), settings=settings).dropped == "too large"


def test_links_obey_nofollow_and_base():
    page = (
        '<base href="http://other.example/x/"><a href="a">1</a><a href="a">1</a><a rel="NOFOLLOW x" href="b">2</a>'
        '<a href="mailto:a@example.org">3</a><a href="javascript:go()">4</a><a>5</a><a href="  /c#f ">6</a>'
    )
    assert extract(page, url="http://h.example/").links == (
        "http://other.example/x/a",
        "http://other.example/c#f",
    )
    closed = f'<meta name="robots" content="noindex, nofollow">{page}'
    assert extract(closed, url="http://h.example/").links == ()


def test_score_by_hand():
    score = score_extraction("menu\na b b\nc", "a b  c\n\nb\nc")
    # words: found {menu, a, b, b, c}, true {a, b, c, b, c}, in both {a, b, b, c}
    assert score.words == Overlap(4, 5, 5)
    assert score.words.precision == 0.8 and score.words.recall == 0.8 and score.words.f1 == pytest.approx(0.8)
    # lines: found {menu, "a b b", c}, true {"a b c", b, c}, in both {c}
    assert score.lines == Overlap(1, 3, 3) and score.exact == 0
    both = score + score_extraction("x y", "x y ")
    assert both.words == Overlap(6, 7, 7) and both.exact == 1 and both.pages == 2


def test_scores_of_nothing_are_undefined():
    nothing = score_extraction("", "")
    assert (
        math.isnan(nothing.words.precision)
        and math.isnan(nothing.words.recall)
        and math.isnan(nothing.words.f1)
    )
    missed = score_extraction("", "a b").words
    assert math.isnan(missed.precision) and missed.recall == 0.0 and missed.f1 == 0.0


@pytest.mark.parametrize("wrong", [{"focus": "both"}, {"min_chars": -1}, {"max_bytes": 0}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ExtractionSettings(**wrong)


def test_focus_and_second_opinions_change_the_result():
    page = (
        "<html><body><div><p>Short intro text of a page here.</p><div class='teaser'><p>A teaser <a href=x>with a "
        "link</a></p></div><p><a href=/a>All of this is a link and nothing else</a></p></div>"
        "<div class=sidebar><p>Side remark with some words.</p></div></body></html>"
    )
    texts = {
        (focus, fast): extract(page, settings=ExtractionSettings(focus=focus, fast=fast)).text
        for focus in ("balanced", "precision", "recall")
        for fast in (False, True)
    }
    assert texts["balanced", False] == "Short intro text of a page here."
    assert texts["precision", False] == ""
    assert "Side remark" in texts["recall", False] and "Side remark" in texts["balanced", True]
