"""Text that others wrote, made harmless: for a page, a terminal, a spreadsheet."""

from __future__ import annotations

import re
import unicodedata

ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-_])")
FORMULA = ("=", "+", "-", "@", "\t", "\r")
KEPT_CONTROLS = "\n\t"
MAX_LINE, MAX_LINES = 400, 400
MAX_CELL = 4000


def clean(text: str, *, max_line: int = MAX_LINE, max_lines: int = MAX_LINES) -> str:
    """Text as it can be shown: no terminal codes, no characters that hide or reorder others, no endless lines.

    Args:
        text: of any origin.
        max_line: characters of a line; what is cut is counted.
        max_lines: lines; what is cut is counted.
    """
    text = ANSI.sub("", text[: 4 * max_line * max_lines]).replace("\r\n", "\n").replace("\r", "\n")
    lines = "".join(character for character in text if _shown(character)).split("\n")
    cut = [
        line if len(line) <= max_line else f"{line[:max_line]} … ({len(line) - max_line} more characters)"
        for line in lines[:max_lines]
    ]
    if len(lines) > max_lines:
        cut.append(f"… ({len(lines) - max_lines} more lines)")
    return "\n".join(cut)


def one_line(text: str, limit: int = MAX_LINE) -> str:
    """`clean` text in one line."""
    text = " ".join(clean(text, max_line=4 * limit).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _shown(character: str) -> bool:
    # Cc: control codes, Cf: bidi and zero-width characters, Cs: lone surrogates, Co/Cn: nothing anyone can read
    return character in KEPT_CONTROLS or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Cn")


def cell(value: object, *, lines: bool = False) -> object:
    """A value as a cell of a spreadsheet: text that no program takes for a formula, in one line unless `lines`."""
    if not isinstance(value, str):
        return value
    text = clean(value, max_line=MAX_CELL).strip() if lines else one_line(value, MAX_CELL)
    return f"'{text}" if text.startswith(FORMULA) else text


def number(value: float | None) -> str:
    """Points without needless decimals; nothing for none."""
    return "" if value is None else f"{value:.6g}"
