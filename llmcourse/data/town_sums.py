"""Sums of Tinytown: additions and subtractions, plain or with the steps of column arithmetic written out.

Plain: `37 + 48 = 85`. Worked: `37 + 48: 7+8=15, 3+4+1=8, 85` (units, then tens with the carry, then the
result) and `85 - 48: 15-8=7, 7-4=3, 37` (a borrow makes 15 of the units 5 and 7 of the tens 8). A tenth of
the pairs of operands is in no document, in either form, nor in the other order: 37 + 48 and 48 + 37 are held
out together.
"""

from __future__ import annotations

import math
import random
import re
from typing import Any, NamedTuple

from llmcourse.data.town_choices import Choose
from llmcourse.data.town_settings import TownSettings, range_size

OPERATIONS = ("+", "-")
_START = re.compile(r"([0-9]{1,2}) ([+-]) ([0-9]{1,2})(?: =|:) ")


class Sum(NamedTuple):
    """An operation on two operands, each 0 to 99; the first is at least the second if the operation is
    "-"."""

    operation: str
    a: int
    b: int

    @property
    def result(self) -> int:
        """Its true value."""
        return self.a + self.b if self.operation == "+" else self.a - self.b

    @property
    def plain(self) -> str:
        """The sum in one step."""
        return f"{self.a} {self.operation} {self.b} = {self.result}"

    @property
    def worked(self) -> str:
        """The sum with its units and tens written out."""
        (tens_a, units_a), (tens_b, units_b) = divmod(self.a, 10), divmod(self.b, 10)
        if self.operation == "+":
            carry = units_a + units_b >= 10
            tens = tens_a + tens_b + carry
            steps = (
                f"{units_a}+{units_b}={units_a + units_b}, {tens_a}+{tens_b}{'+1' if carry else ''}={tens}"
            )
        else:
            borrow = units_a < units_b
            units_a, tens_a = units_a + 10 * borrow, tens_a - borrow
            steps = f"{units_a}-{units_b}={units_a - units_b}, {tens_a}-{tens_b}={tens_a - tens_b}"
        return f"{self.a} {self.operation} {self.b}: {steps}, {self.result}"


class Sums:
    """The grammar of sums; `held_out` and `trained` map an operation to its pairs of operands."""

    def __init__(self, settings: TownSettings, rng: random.Random) -> None:
        self.settings = settings
        largest = settings.largest_operand
        self.trained: dict[str, list[Sum]] = {}
        self.held_out: dict[str, list[Sum]] = {}
        for operation in OPERATIONS:
            unordered = [(a, b) for a in range(largest + 1) for b in range(a + 1)]
            ranked = sorted(unordered, key=lambda pair: (rng.random(), pair))
            # At least one pair of each operation stays in training, however small the grammar.
            apart = set(ranked[: min(int(settings.held_out_sums * len(ranked)), len(ranked) - 1)])
            pairs = [
                (a, b) for a in range(largest + 1) for b in range(largest + 1) if operation == "+" or a >= b
            ]
            sides: tuple[list[Sum], list[Sum]] = ([], [])
            for a, b in pairs:
                sides[(max(a, b), min(a, b)) in apart].append(Sum(operation, a, b))
            self.trained[operation], self.held_out[operation] = sides
        self._trained = {one for sums in self.trained.values() for one in sums}

    def write(self, choose: Choose) -> tuple[str, dict[str, Any]]:
        """Write lines of sums; return their text and `sums`, a list of (operation, a, b, result)."""
        low, high = self.settings.sums
        lines, facts = [], []
        for _ in range(low + choose(high - low + 1)):
            pool = self.trained[OPERATIONS[choose(2)]]
            one = pool[choose(len(pool))]
            lines.append(one.worked if choose(2) else one.plain)
            facts.append((*one, one.result))
        return "\n".join(lines), {"sums": facts}

    @staticmethod
    def understand(line: str) -> Sum | None:
        """The sum that a line begins with, whatever it goes on with; None if it begins with none."""
        match = _START.match(line)
        if match is None:
            return None
        one = Sum(match[2], int(match[1]), int(match[3]))
        canonical = str(one.a) == match[1] and str(one.b) == match[3]
        return one if canonical and one.result >= 0 else None

    def read(self, text: str) -> tuple[float, dict[str, Any]]:
        """Recover the information in bits and the facts of a document of sums from its text alone.

        Raises:
            ValueError: if the grammar cannot write this text.
        """
        lines = text.split("\n")
        low, high = self.settings.sums
        if not low <= len(lines) <= high:
            raise ValueError(f"not a document of sums: {len(lines)} lines, outside {low} to {high}")
        bits = math.log2(range_size((low, high)))
        facts = []
        for line in lines:
            one = self.understand(line)
            if one is None or one not in self._trained or line not in (one.plain, one.worked):
                raise ValueError(f"not a document of sums: wrong or held-out line {line!r}")
            bits += 2.0 + math.log2(len(self.trained[one.operation]))
            facts.append((*one, one.result))
        return bits, {"sums": facts}
