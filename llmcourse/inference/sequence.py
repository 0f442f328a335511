"""One request on its way through the engine: its tokens, its blocks, its times."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import torch

from llmcourse.inference.constraint import TokenConstraint
from llmcourse.inference.sampling import SamplingParams


class Status(Enum):
    """Where a sequence is."""

    WAITING = "waiting"
    """has no blocks: not begun yet, or preempted"""
    RUNNING = "running"
    """has blocks and takes part in steps"""
    FINISHED = "finished"
    """has ended and holds nothing"""


class FinishReason(Enum):
    """Why a sequence ended."""

    STOP = "stop"
    """a stop token, a stop string, or the end of what its constraint allows"""
    LENGTH = "length"
    """`max_new_tokens` or a full context"""
    CANCELLED = "cancelled"
    """the caller no longer wants it"""


@dataclass(eq=False)
class Sequence:
    """A prompt, what has been written so far, and what of it is stored in the cache.

    Every token but the last written one has keys and values to be computed before the next token can be chosen. So a
    sequence with one token that is not computed is decoding, one with more is (again) in its prefill.
    """

    number: int
    """names the request"""
    prompt: list[int]
    params: SamplingParams
    stop_ids: frozenset[int] = frozenset()
    """tokens that end it; they are not part of the result"""
    constraint: TokenConstraint | None = None
    """which tokens may come next"""
    state: int = 0
    """of the constraint"""
    generator: torch.Generator | None = None
    """its own random numbers, if `params.seed` is set"""
    new_ids: list[int] = field(default_factory=list)
    """what has been written"""
    status: Status = Status.WAITING
    reason: FinishReason | None = None
    blocks: list[int] = field(default_factory=list)
    """numbers of its blocks, in order: token t lies in block t // block_size"""
    contents: list[int] = field(default_factory=list)
    """identities of its full blocks as far as they are published, see `BlockManager`"""
    n_computed: int = 0
    """tokens whose keys and values are stored"""
    n_shared: int = 0
    """tokens that its latest prefill found in the cache"""
    n_preempted: int = 0
    """times that it lost its blocks"""
    arrival: float = 0.0
    """seconds on the engine's clock"""
    token_times: list[float] = field(default_factory=list)
    """when each new token was there; the first one less `arrival` is the time to first token"""

    @property
    def n_tokens(self) -> int:
        """Prompt and new tokens."""
        return len(self.prompt) + len(self.new_ids)

    @property
    def n_pending(self) -> int:
        """Tokens still to be computed before the next one can be chosen."""
        return self.n_tokens - self.n_computed

    @property
    def is_decoding(self) -> bool:
        """Whether only the latest token is to be computed."""
        return self.n_pending == 1 and bool(self.new_ids)

    def ids(self, start: int, end: int) -> list[int]:
        """Tokens start .. end - 1 of prompt and new ids together."""
        n = len(self.prompt)
        if start >= n:
            return self.new_ids[start - n : end - n]
        return self.prompt[start:end] + self.new_ids[: max(0, end - n)]
