"""Choices: the only source of randomness, and so the only source of information, of Tinytown's grammars.

A grammar is a function that asks `choose(n)` for a number below n, each equally likely, and turns the answers
into a text. What `choose` does decides what the grammar is used for: `Sampler` draws at random and adds up
log2(n), the information of each choice in bits (Shannon 1948); `every_outcome` runs through all sequences of
answers, which gives the whole language with its probabilities.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import TypeVar

Choose = Callable[[int], int]
T = TypeVar("T")


def stream(*numbers: int) -> random.Random:
    """A random stream of its own for each tuple of numbers, each in [0, 2**64).

    Only `random()` of it is used: this is the method whose sequence Python promises to keep between versions.

    Raises:
        ValueError: if a number is negative or too large (Python would silently take a seed's absolute value).
    """
    seed = 1
    for number in numbers:
        if not 0 <= number < 2**64:
            raise ValueError(f"seed {number} is outside [0, 2**64): use a non-negative integer")
        seed = (seed << 64) | number
    return random.Random(seed)


class Sampler:
    """Answers at random; `bits` is the sum of log2(n) over all choices since it was last set to zero."""

    __slots__ = ("_random", "bits")

    def __init__(self, rng: random.Random) -> None:
        self._random = rng.random
        self.bits = 0.0

    def __call__(self, n: int) -> int:
        """Draw a number below n."""
        self.bits += math.log2(n)
        return int(self._random() * n)


def draw_in_order(choose: Choose, pool: list[T], k: int) -> list[T]:
    """Draw k of the pool without replacement, removing them from it; the order is part of the outcome."""
    return [pool.pop(choose(len(pool))) for _ in range(k)]


def order_bits(n: int, k: int) -> float:
    """Information of `draw_in_order` of k out of n, in bits: log2 of n (n-1) ... (n-k+1)."""
    return sum(math.log2(n - i) for i in range(k))


def every_outcome(grammar: Callable[[Choose], T]) -> Iterator[tuple[T, float]]:
    """All outcomes of a grammar with their probabilities, by running it once for each sequence of choices.

    The sequence is counted up like an odometer whose digits have the sizes that the run itself asks for.
    """
    digits: list[int] = []
    while True:
        sizes: list[int] = []

        def choose(n: int, sizes: list[int] = sizes) -> int:
            sizes.append(n)
            if len(sizes) > len(digits):
                digits.append(0)
            return digits[len(sizes) - 1]

        outcome = grammar(choose)
        yield outcome, 1.0 / math.prod(sizes)
        while digits and digits[-1] == sizes[len(digits) - 1] - 1:
            digits.pop()
        if not digits:
            return
        digits[-1] += 1
