"""Personal data in running text: e-mail addresses, telephone numbers and IPv4 addresses, found and masked.

Patterns are read off the standards, then narrowed until sums, dates, prices and version numbers pass: a wrong
mask destroys good text on every page that matches, and nobody notices. What a pattern deliberately misses is
said beside it. Names, postal addresses and account numbers need a model, not a pattern, and are out of scope.

Markers. `mask` writes `<EMAIL>`, `<PHONE>` and `<IPV4>`, the tags of the BigCode corpora (Li et al., 2023,
"StarCoder"). FineWeb instead writes an address that looks real, such as email@example.com, which keeps the shape
of the text; but then a second pass finds its own marker, a model learns to emit that address, and nobody can tell
afterwards what was replaced. A tag is found by none of the patterns, so masking is idempotent; it is plain text,
not a control token of the tokenizer, so a page cannot smuggle one in; and it can be counted in the training data.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from llmcourse.data.detection import Detection

MARKERS: dict[str, str] = {"email": "<EMAIL>", "phone": "<PHONE>", "ipv4": "<IPV4>"}
"""what `mask` writes in the place of each kind"""
KINDS: tuple[str, ...] = tuple(MARKERS)

# The unquoted form of RFC 5321 (2008), local part at most 64 characters, letters of any script (RFC 6531); the last
# label is letters only. The bounded repetitions keep the time linear in the text. Not found: quoted local parts,
# domains in brackets, and disguises such as "anna at example dot org".
_EMAIL = re.compile(
    r"(?<![\w.+%-])\w(?:[\w.+%'-]{0,62}[\w+-])?"
    r"@(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.){1,8}[^\W\d_]{2,63}(?!\w)"
)
# Four octets of 0 to 255 without leading zeros (RFC 6943, 2013, section 3.1.1). A letter, digit, dot or hyphen on
# either side makes it something else: v1.2.3.4, 10.0.0.1.2, 1.2.3.4-rc1. A full stop that ends a sentence is fine.
_OCTET = r"(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_IPV4 = re.compile(rf"(?<![\w.-])(?:{_OCTET}\.){{3}}{_OCTET}(?![\w-]|\.\w)")
# Four numbers after one of these words are a version or a section of a document.
_NUMBERED = re.compile(r"(?:version|release|section|chapter|build)s?[ :=]{0,2}$", re.IGNORECASE)
# North American numbers: area code and exchange begin with 2 to 9; groups of 3, 3 and 4 must be set apart by a
# space, hyphen or dot, or the area code by parentheses. Not found: ten digits in a row (an order number looks the
# same) and numbers without area code (555-0123 is a difference of two numbers as well).
_GAP = r"[ .\u00a0-]"
_ALONE = r"(?<![\w.+-])"
_COUNTRY = rf"(?:\+1{_GAP}?|1{_GAP})"
_AREA = r"[2-9][0-9]{2}"
_NORTH_AMERICAN = (
    rf"(?:{_ALONE}{_COUNTRY}?{_AREA}{_GAP}|(?:{_ALONE}{_COUNTRY})?\({_AREA}\){_GAP}?){_AREA}{_GAP}[0-9]{{4}}"
)
# International form (ITU-T E.123, 2001, and E.164, 2010): plus, country code, at most 15 digits in all; at least 8,
# since "+123 456" is more often a difference than a number.
_INTERNATIONAL = rf"{_ALONE}\+[1-9](?:{_GAP}?(?:\(0\){_GAP}?)?[0-9]){{7,14}}"
_PHONE = re.compile(rf"(?:{_NORTH_AMERICAN}|{_INTERNATIONAL})(?![\w+-]|\.\w)")

_PATTERNS = {"email": _EMAIL, "ipv4": _IPV4, "phone": _PHONE}  # where two overlap, the earlier kind wins
# What one kind found is overwritten with ">" before the next kind looks: the sign with which a marker ends, so that
# whatever stands beside it sees the same neighbor now as in the masked text. (That keeps masking idempotent.)


@dataclass(frozen=True, order=True)
class Found:
    """A piece of personal data in a text: `text[start:end] == value`."""

    start: int
    end: int
    kind: str
    """one of `KINDS`"""
    value: str


def find_personal_data(text: str, kinds: Collection[str] = KINDS) -> list[Found]:
    """All e-mail addresses, telephone numbers and IPv4 addresses of a text, from left to right, none overlapping.

    Args:
        text: a text.
        kinds: what to look for; some of `KINDS`.

    Raises:
        ValueError: a kind is unknown.
    """
    unknown = set(kinds) - set(KINDS)
    if unknown:
        raise ValueError(f"kinds {sorted(unknown)}: use some of {', '.join(KINDS)}")
    found: list[Found] = []
    rest = text
    for kind, pattern in _PATTERNS.items():
        if kind not in kinds or (kind == "email" and "@" not in text):
            continue
        new = [Found(*match.span(), kind, match.group()) for match in pattern.finditer(rest)]
        if kind == "ipv4":
            new = [
                piece for piece in new if not _NUMBERED.search(rest, max(0, piece.start - 12), piece.start)
            ]
        rest = _replace(rest, new, [">" * len(piece.value) for piece in new])
        found += new
    return sorted(found)


def mask(text: str, kinds: Collection[str] = KINDS) -> tuple[str, list[Found]]:
    """Replace every piece of personal data by its marker of `MARKERS`.

    Masking a masked text changes nothing. Nothing else of the text changes.

    Args:
        text: a text.
        kinds: what to mask; some of `KINDS`.

    Returns:
        The masked text, and what was replaced, with positions in the text as given.

    Raises:
        ValueError: a kind is unknown.
    """
    found = find_personal_data(text, kinds)
    return _replace(text, found, [MARKERS[piece.kind] for piece in found]), found


def _replace(text: str, pieces: Sequence[Found], markers: Sequence[str]) -> str:
    """Put a marker in the place of each piece."""
    parts, end = [], 0
    for piece, marker in zip(pieces, markers, strict=True):
        parts += [text[end : piece.start], marker]
        end = piece.end
    return "".join([*parts, text[end:]])


def score_personal_data(
    found: Iterable[Sequence[Found]], truth: Iterable[Iterable[tuple[str, str]]]
) -> dict[str, Detection]:
    """Precision and recall of each kind, over many texts.

    A piece counts as found only if kind and value are equal to the letter: a number found without its country code
    is one miss and one false alarm. A value that stands in a text twice must be found twice.

    Args:
        found: for each text, what was found.
        truth: for each text, (kind, value) of what it holds.

    Raises:
        ValueError: there are more texts in one than in the other.
    """
    counts: dict[str, Detection] = {kind: Detection(0, 0, 0) for kind in KINDS}
    for ours, labels in zip(found, truth, strict=True):
        mine, theirs = Counter((piece.kind, piece.value) for piece in ours), Counter(map(tuple, labels))
        for kind, part in counts.items():
            right, wrong, missed = (
                sum(count for key, count in pieces.items() if key[0] == kind)
                for pieces in (mine & theirs, mine - theirs, theirs - mine)
            )
            counts[kind] = part + Detection(right, wrong, missed)
    return counts
