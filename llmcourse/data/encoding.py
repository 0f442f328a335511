"""Bytes of a web page to text, and the repair of text that somebody decoded wrongly before.

Decoding follows the order that browsers follow (WHATWG HTML standard, section 13.2.3, and Encoding standard,
as of 2026): a byte order mark, the charset of the Content-Type header, a `<meta>` near the page's beginning,
and only then a guess. A label is a promise that pages break: a page of UTF-8 bytes that is sent as ISO-8859-1
decodes without any error into text such as "cafÃ©". That is mojibake, and it is also what a site shows that
stored such text long ago, so no decoder can avoid it; `repair` undoes it afterwards.
"""

from __future__ import annotations

import codecs
import functools
import re
from typing import NamedTuple

import ftfy
import webencodings

__all__ = ["Decoded", "Repaired", "decode_html", "repair"]

PRESCAN_BYTES = 1024
"""bytes of a page in which a `<meta>` may declare its encoding (WHATWG HTML, section 13.2.3.2)"""
_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16le"), (codecs.BOM_UTF16_BE, "utf-16be"))
_COMMENT = re.compile(rb"<!--.*?-->", re.DOTALL)
_META = re.compile(rb"<meta[\s/][^>]*>", re.IGNORECASE)
_ATTRIBUTE = re.compile(rb"""([^\s"'>/=]+)\s*=\s*("[^"]*"|'[^']*'|[^\s"'>]+)""")
_HEADER = re.compile(r"charset\s*=\s*[\"']?\s*([\w.:-]+)", re.IGNORECASE)
# Mojibake only. What ftfy can also do would change text that is right: straighten curly quotes, take ligatures
# apart, normalize Unicode, unescape "&lt;" in a lesson about HTML.
_MOJIBAKE_ONLY = ftfy.TextFixerConfig(
    unescape_html=False,
    remove_terminal_escapes=False,
    fix_latin_ligatures=False,
    fix_character_width=False,
    uncurl_quotes=False,
    fix_line_breaks=False,
    fix_surrogates=False,
    remove_control_chars=False,
    normalization=None,
    explain=False,
)


class Decoded(NamedTuple):
    """A page's text and the encoding that it was read as, by its name on the web ("utf-8", "windows-1252")."""

    text: str
    encoding: str


class Repaired(NamedTuple):
    """A text, and whether something in it was mojibake and is now undone."""

    text: str
    repaired: bool


def decode_html(body: bytes, content_type: str | None = None) -> Decoded:
    """Decode a page as a browser would.

    Args:
        body: the bytes as fetched.
        content_type: value of the HTTP header of that name, for example "text/html; charset=utf-8".

    Returns:
        The text, without byte order mark. Bytes that the encoding does not have become U+FFFD, never an error.
        An undeclared page is UTF-8 if its bytes are valid as such, otherwise Windows-1252; text that is not
        UTF-8 is valid as UTF-8 only by a rare accident, because each lead byte asks for its continuation bytes.
    """
    for mark, name in _MARKS:
        if body.startswith(mark):
            return Decoded(_decode(body[len(mark) :], name), name)
    name = _declared(body, content_type)
    if name is None:
        try:
            return Decoded(body.decode("utf-8"), "utf-8")
        except UnicodeDecodeError:
            name = "windows-1252"
    return Decoded(_decode(body, name), name)


def repair(text: str) -> Repaired:
    """Undo mojibake with ftfy (Speer, version 6), line by line, and touch nothing else.

    ftfy changes a line only if its letters are improbable as they stand and less so after the characters are
    written in a one-byte encoding and read as UTF-8; curly quotes, dashes, accents and "Ã" in good Portuguese
    stay. Text that was garbled twice is undone twice.

    Returns:
        The text and whether it changed; good text comes back equal.
    """
    if text.isascii():
        return Repaired(text, False)
    fixed = ftfy.fix_text(text, _MOJIBAKE_ONLY)
    return Repaired(fixed, fixed != text)


def _declared(body: bytes, content_type: str | None) -> str | None:
    """The encoding that the header or else the page itself names; None if neither names one that exists."""
    if content_type and (found := _HEADER.search(content_type)):
        if encoding := webencodings.lookup(found[1]):
            return encoding.name
    for tag in _META.findall(_COMMENT.sub(b"", body[:PRESCAN_BYTES])):
        pairs = _ATTRIBUTE.findall(tag)
        said = {
            name.lower().decode("latin-1"): value.strip(b"\"' ").decode("latin-1") for name, value in pairs
        }
        label = said.get("charset")
        if label is None and said.get("http-equiv", "").lower() == "content-type":
            found = _HEADER.search(said.get("content", ""))
            label = found[1] if found else None
        if label and (encoding := webencodings.lookup(label)):
            # a meta that could be read as ASCII is not written in UTF-16, whatever it says
            return "utf-8" if encoding.name.startswith("utf-16") else encoding.name
    return None


def _decode(body: bytes, name: str) -> str:
    if name.startswith("windows-"):
        return codecs.charmap_decode(body, "replace", _windows_table(name))[0]
    return webencodings.lookup(name).codec_info.decode(body, "replace")[0]


@functools.cache
def _windows_table(name: str) -> str:
    """The 256 characters of a Windows encoding, as browsers have them.

    Python leaves some bytes from 0x80 to 0x9F undefined; on the web they are the C1 controls of that number, without
    which "â€\x9d" could not be repaired to a closing quote.
    """
    decoder = webencodings.lookup(name).codec_info
    table = [decoder.decode(bytes([byte]), "ignore")[0] for byte in range(256)]
    return "".join(c or (chr(byte) if byte < 0xA0 else "\ufffd") for byte, c in enumerate(table))
