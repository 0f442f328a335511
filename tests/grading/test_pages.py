"""The pages: what students wrote is shown, and is nothing but text (X1 to X5 of the attack table)."""

from __future__ import annotations

import base64
import io
import re
import struct
import zlib

import pytest
from bs4 import BeautifulSoup
from PIL import Image, PngImagePlugin

from llmcourse.grading.reports.pages import class_page, histogram, reencoded, shown_outputs, student_page
from llmcourse.grading.reports.text import clean, one_line
from llmcourse.grading.verdicts import Finding, Verdict
from tests.grading.hand_ins import make_grade, make_results

SCRIPT = "<script>alert(1)</script>"
IMAGE = '<img src=x onerror="alert(1)">'
BREAKOUT = "</pre></details></style>\"'><script>alert(1)</script>{{ 7 * 7 }}"
ALLOWED = {
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "h1",
    "h2",
    "p",
    "strong",
    "table",
    "thead",
    "tbody",
    "tr",
}
ALLOWED |= {"th", "td", "ul", "li", "pre", "details", "summary", "img", "a", "svg", "rect", "text"}


def assert_harmless(page: str) -> BeautifulSoup:
    """No tag, attribute or address that the templates do not have."""
    soup = BeautifulSoup(page, "html.parser")
    assert {tag.name for tag in soup.find_all()} <= ALLOWED
    for tag in soup.find_all():
        assert not [name for name in tag.attrs if name.startswith("on") or name == "style"], tag
        assert tag.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
        assert re.fullmatch(r"students/[^/?#:]+\.html", tag.get("href", "students/x.html"))
    policy = soup.find("meta", attrs={"http-equiv": "Content-Security-Policy"})["content"]
    assert "default-src 'none'" in policy and "script" not in policy and "form-action 'none'" in policy
    return soup


def png(size=(4, 3), comment=""):
    out, info = io.BytesIO(), PngImagePlugin.PngInfo()
    info.add_text("Comment", comment)
    Image.new("RGB", size, (10, 20, 30)).save(out, "PNG", pnginfo=info)
    return out.getvalue()


def as_text(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.fixture(scope="module")
def key(tiny_release):
    return tiny_release.key


def page_of(key, outputs=None, answers=None, written=None, people=None, **grade):
    (result,) = make_results(key, [make_grade(key, "s001", **grade)], people, {"s001": written or {}})
    return student_page(key, result, answers or {}, written or {}, outputs)


def test_a_page_says_what_was_found_and_what_is_open(key):
    soup = assert_harmless(page_of(key))
    text = soup.get_text()
    assert "You seem to add." in text and "Correct." in text and "not final" in text
    assert "1 question not marked" in text
    assert "17" not in text, "the detail holds hidden inputs"


def test_X1_scripts_in_outputs_and_answers_are_text_or_gone(key):
    outputs = {
        "cell-1": [
            {
                "output_type": "display_data",
                "data": {"text/html": SCRIPT, "text/plain": "<Figure size 640x480>"},
            },
            {"output_type": "display_data", "data": {"application/javascript": "alert(1)"}},
            {"output_type": "stream", "name": "stdout", "text": [IMAGE, "\n", BREAKOUT]},
            {"output_type": "error", "ename": SCRIPT, "evalue": BREAKOUT, "traceback": [SCRIPT]},
        ],
        BREAKOUT: [{"output_type": "stream", "text": "x"}, {"data": {"image/png": as_text(png())}}],
    }
    page = page_of(key, outputs, answers={name: BREAKOUT for name in key.answers})
    soup = assert_harmless(page)
    assert "<Figure size 640x480>" in soup.get_text() and "alert(1)" in soup.get_text()
    assert "{{ 7 * 7 }}" in soup.get_text() and "49" not in soup.get_text()
    assert "application/javascript" not in page and page.count("alert(1)") == page.count(
        "&lt;script&gt;alert(1)&lt;/script&gt;"
    ) + page.count("onerror=&#34;alert(1)&#34;")


def test_X2_markdown_and_html_of_written_answers_are_text(key):
    question = key.manifest.manual[0].grade_id
    text = f"# Title\n[click](javascript:alert(1)) {IMAGE} <iframe srcdoc='x'></iframe> $\\href{{javascript:1}}{{x}}$"
    soup = assert_harmless(page_of(key, written={question: text}))
    assert text in [pre.get_text() for pre in soup.find_all("pre")]


def test_X3_terminal_codes_bidi_and_endless_lines(key):
    hostile = "\x1b[31mred\x1b[0m \x1b]0;title\x07 a\u202eb\u2066c\u200bd \x00\x08 \ud800" + "y" * 10**6
    outputs = {
        "c": [{"output_type": "stream", "text": hostile}, {"output_type": "stream", "text": "z\n" * 10**5}]
    }
    page = page_of(key, outputs, answers={next(iter(key.answers)): hostile})
    assert_harmless(page)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u200b\u202a-\u202e\u2066-\u2069\ud800-\udfff]", page)
    assert "red" in page and "more characters" in page and "more lines" in page and len(page) < 40_000


def test_X4_svg_is_not_shown_and_png_is_encoded_anew(key):
    svg = f"<svg xmlns='http://www.w3.org/2000/svg'>{SCRIPT}</svg>"
    polyglot = png(comment=SCRIPT) + SCRIPT.encode()
    outputs = {
        "c": [
            {"output_type": "display_data", "data": {"image/svg+xml": svg}},
            {"output_type": "display_data", "data": {"image/png": as_text(svg.encode())}},
            {"output_type": "display_data", "data": {"image/png": as_text(polyglot)}},
            {"output_type": "display_data", "data": {"image/png": 'x" onerror="alert(1)'}},
        ]
    }
    soup = assert_harmless(page_of(key, outputs))
    images = soup.find_all("img")
    assert len(images) == 1 and not soup.find("svg")
    data = base64.b64decode(images[0]["src"].partition(",")[2])
    assert b"script" not in data and Image.open(io.BytesIO(data)).getpixel((1, 1)) == (10, 20, 30)


def test_X5_names_are_text(key):
    people = {"s001": {"name": f'=HYPERLINK("http://x"),\n{BREAKOUT}', "ids": {}}}
    soup = assert_harmless(page_of(key, people=people))
    assert "=HYPERLINK" in soup.get_text()
    results = make_results(key, [make_grade(key, "s001"), make_grade(key, "s 2'\"<b>")], people)
    assert_harmless(class_page(key, results))


def test_a_png_bomb_is_dropped():
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\x00" * 10**6))
    assert reencoded(as_text(bomb + chunk(b"IEND", b""))) == ""
    assert reencoded("not base64!") == "" and reencoded("") == "" and reencoded("A" * 10**7) == ""
    assert reencoded(as_text(png())) != ""
    assert shown_outputs({"c": ["no output", {"data": 3}, {"text": 5}, {"text": [1, "a"]}]}) == [
        {"cell": "c", "image": "", "text": "a"}
    ]


def test_a_student_sees_remarks_about_the_notebook_and_none_about_others(key):
    findings = (
        Finding("DUPLICATE", "the cell is there twice", "hardware-intensity"),
        Finding("SIMILAR_TO", "alike: s001, s002", "hardware/intensity"),
        Finding("REFERENCE_CALLED", "the answer calls llmcourse.x:y of the package", "hardware/intensity"),
    )
    text = page_of(key, findings=findings)
    assert "the cell is there twice" in text and "s002" not in text and "calls llmcourse" not in text


def test_an_undecided_submission_shows_no_points(key):
    page = page_of(key, verdict=Verdict.MALFORMED, note="this is no JSON")
    assert "this is no JSON" in page and "Exercises</h2>" not in page and "a person decides" in page


def test_the_class_page_counts(key):
    alike = (Finding("SIMILAR_TO", "alike: s001, s002", "hardware/roofline"),)
    grades = [
        make_grade(key, "s001", right=0, findings=alike),
        make_grade(key, "s002", right=2, findings=alike),
        make_grade(key, "s003", right=3, findings=(Finding("LOCKED_EDITED", "a check was edited", "x"),)),
        make_grade(key, "s004", verdict=Verdict.REVIEW, note="it answered early"),
    ]
    soup = assert_harmless(class_page(key, make_results(key, grades)))
    text = " ".join(soup.get_text().split())
    assert "4 students: 3 graded, 1 review" in text
    tables = [
        [[cell.get_text() for cell in row.find_all(["th", "td"])] for row in table.find_all("tr")]
        for table in soup.find_all("table")
    ]
    assert tables[0][1][1:] == ["1 of 3", "1", "sum (1)"] and tables[0][3][1] == "2 of 3"
    assert [row[:2] for row in tables[1][1:]] == [["s003", "LOCKED_EDITED"], ["s004", "review"]]
    assert text.count("alike: s001, s002") == 1
    assert [row[0] for row in tables[2][1:]] == ["s001", "s002", "s003", "s004"]


def test_the_histogram_counts_everyone_once():
    bars = histogram([0, 0.5, 5, 9.99, 10, 10], 10)
    assert [bar["count"] for bar in bars] == [2, 0, 0, 0, 0, 1, 0, 0, 0, 1, 2]
    assert bars[0]["label"] == "0" and bars[-1]["label"] == "10" and max(bar["height"] for bar in bars) == 140
    assert histogram([], 10) == [] and histogram([0.0], 0) == []


def test_text_is_cleaned_by_hand():
    assert clean("a\tb\r\nc\x1b[1;31md\x1b[0m\u202e") == "a\tb\ncd"
    assert clean("x" * 12, max_line=10) == "x" * 10 + " … (2 more characters)"
    assert clean("1\n2\n3", max_lines=2) == "1\n2\n… (1 more lines)"
    assert one_line(" a\n b\x00 ", 10) == "a b" and one_line("abcdef", 4) == "abc…"
