"""Decoding as browsers do it, and repair that leaves good text alone."""

from __future__ import annotations

import pytest

from llmcourse.data.encoding import decode_html, repair
from llmcourse.data.tinytown import Town
from llmcourse.data.web_dump import web_dump
from llmcourse.data.web_text import TYPOGRAPHIC_SENTENCES, mojibake

TEXT = "“Café” – 5 €"


@pytest.mark.parametrize(
    ("body", "content_type", "encoding"),
    [
        # one rule of the order beats the next
        (b"\xef\xbb\xbf" + TEXT.encode(), "text/html; charset=windows-1252", "utf-8"),
        (b"\xff\xfe" + TEXT.encode("utf-16-le"), "text/html; charset=utf-8", "utf-16le"),
        (b"\xfe\xff" + TEXT.encode("utf-16-be"), None, "utf-16be"),
        (b'<meta charset="utf-8">' + TEXT.encode("cp1252"), 'text/html;charset="cp1252"', "windows-1252"),
        (b"<meta charset=cp1252>" + TEXT.encode("cp1252"), "text/html", "windows-1252"),
        (b"<meta charset=cp1252>" + TEXT.encode("cp1252"), "text/html; charset=utf-99", "windows-1252"),
        (TEXT.encode(), None, "utf-8"),
        (TEXT.encode("cp1252"), None, "windows-1252"),
        # labels mean what the web means by them
        (TEXT.encode("cp1252"), "text/html; charset=ISO-8859-1", "windows-1252"),
        (TEXT.encode("cp1252"), "text/html; charset=US-ASCII", "windows-1252"),
        (TEXT.encode("cp1252"), "text/html; charset=utf-7", "windows-1252"),
        # a meta: where it may stand and what it may say
        (
            b"<META Http-Equiv='Content-Type' content='text/html; charset=windows-1252'>"
            + TEXT.encode("cp1252"),
            None,
            "windows-1252",
        ),
        (b"<meta charset=utf-16>" + TEXT.encode(), None, "utf-8"),
        (b"<!-- <meta charset=cp1252> -->" + TEXT.encode(), None, "utf-8"),
        (b"<meta name=description content='the charset=koi8-r of old'>" + TEXT.encode(), None, "utf-8"),
        (b" " * 1024 + b"<meta charset=koi8-r>" + TEXT.encode(), None, "utf-8"),
    ],
)
def test_the_order_of_browsers(body, content_type, encoding):
    decoded = decode_html(body, content_type)
    assert decoded.encoding == encoding
    assert decoded.text.endswith(TEXT) and "\ufeff" not in decoded.text


def test_every_byte_of_windows_1252_is_a_character():
    text = decode_html(bytes(range(256)), "text/html; charset=latin1").text
    assert len(text) == 256 and "\ufffd" not in text
    assert text[0x80] == "€" and text[0x81] == "\x81" and text[0x9D] == "\x9d"
    # 0xAA is not defined in windows-1253, and lies outside the controls
    assert decode_html(b"\xaa\x81\xe1", "text/html; charset=windows-1253").text == "\ufffd\x81α"


def test_bytes_that_the_encoding_lacks_are_replaced():
    assert decode_html(b"a\xffb\xe2\x80", "text/html; charset=utf-8").text == "a\ufffdb\ufffd"
    assert decode_html(b"", None) == ("", "utf-8")


def test_japanese_and_cyrillic():
    for text, label, name in [("日本語", "Shift_JIS", "shift_jis"), ("Привет", "koi8", "koi8-r")]:
        body = text.encode("cp932" if name == "shift_jis" else "koi8-r")
        assert decode_html(body, f"text/html; charset={label}") == (text, name)


@pytest.mark.parametrize("sentence", TYPOGRAPHIC_SENTENCES)
def test_good_text_stays_and_broken_text_comes_back(sentence):
    assert repair(sentence) == (sentence, False)
    assert repair(mojibake(sentence)) == (sentence, True)
    assert repair(mojibake(mojibake(sentence))) == (sentence, True)


@pytest.mark.parametrize(
    "good",
    [
        "", "12 + 7 = 19", "“curly” ‘quotes’ … ﬁne ligatures", "ＡＢＣ full width", "&lt;p&gt; stays &amp; so",
        "SÃO PAULO É GRANDE", "e\u0301 is not composed", "line\u2028separator\r\nand carriage return", "Ünïcödé ½ ° ©",
        "日本語のテキスト", "naïve\u00a0façade", "\x1b[31mred\x1b[0m",
    ],
)  # fmt: skip
def test_nothing_but_mojibake_is_touched(good):
    assert repair(good) == (good, False)


def test_only_the_broken_line_changes():
    text = "“good” line\n" + mojibake("“broken” café") + "\nÄrger"
    assert repair(text) == ("“good” line\n“broken” café\nÄrger", True)


def test_a_wrong_header_is_repaired_after_decoding():
    wrong = decode_html(TEXT.encode(), "text/html; charset=iso-8859-1").text
    assert wrong == mojibake(TEXT) != TEXT
    assert repair(wrong) == (TEXT, True)


def test_the_dump_is_repaired_exactly():
    broken = good = 0
    for page in web_dump(Town(seed=1), 400, seed=3):
        text = page.labels["text"]
        if page.labels["encoding"] == "mojibake":
            assert repair(mojibake(text)) == (text, True)
            broken += 1
        else:
            assert repair(text) == (text, False)
            good += not text.isascii()
    assert broken > 15 and good > 40
