"""A lab's claims: statements about what it measured, which stop the lab when they do not hold."""

from __future__ import annotations

import re


class ClaimError(AssertionError):
    """A claim of a lab does not hold for what was just measured."""


def claim(identifier: str, held: object, text: str) -> None:
    """Print `[holds] identifier: text`, or stop the lab because the claim does not hold.

    The line is compared with the stored one when the labs are checked (mark the cell `# NBVAL_CHECK_OUTPUT`), so `text`
    names the bound that is claimed and not the number that was measured; print measurements in another cell.

    Args:
        identifier: name of the claim, unique in its lab; letters, digits, `_` and `-`.
        held: whether it holds; a bool, or a NumPy or torch bool without dimensions.

    Raises:
        ValueError: the identifier has other characters, or the text is not one line.
        ClaimError: it does not hold.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", identifier):
        raise ValueError(f"claim id {identifier!r}: use letters, digits, _ and - only")
    if not text.strip() or "\n" in text:
        raise ValueError(f"claim {identifier!r}: its text must be one line, not {text!r}")
    if not bool(held):
        raise ClaimError(f"[fails] {identifier}: {text}")
    print(f"[holds] {identifier}: {text}")
