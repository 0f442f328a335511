"""Which sequences take part in the next step: iteration-level scheduling (Yu et al., 2022, "Orca").

A step decodes every running sequence that can be decoded and spends what is left of its token budget on prompts, cut
into chunks where they are long (Agrawal et al., 2024, "Sarathi-Serve"): so a long prompt does not hold up those who are
writing. Where blocks run out, the sequence that came last loses its own and is computed again later.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from llmcourse.inference.block_manager import BlockManager
from llmcourse.inference.sequence import Sequence, Status


@dataclass(frozen=True, kw_only=True)
class SchedulerSettings:
    """Limits of a step.

    Raises:
        ValueError: a limit is not positive, or there are fewer tokens than sequences.
    """

    max_sequences: int = 32
    """sequences that run together"""
    max_tokens: int = 256
    """tokens of a step, those being decoded and those of prompts together"""
    continuous: bool = True
    """admit sequences at any step; False: only when none is running, as with static batching"""

    def __post_init__(self) -> None:
        if self.max_sequences < 1:
            raise ValueError(f"max_sequences={self.max_sequences}: give at least 1")
        if self.max_tokens < self.max_sequences:
            raise ValueError(
                f"max_tokens={self.max_tokens}: give at least one for each of {self.max_sequences} sequences"
            )


@dataclass
class Schedule:
    """What a step computes."""

    decodes: list[Sequence] = field(default_factory=list)
    """sequences of which one token is computed, and one chosen"""
    prefills: list[tuple[Sequence, int]] = field(default_factory=list)
    """sequences with the number of their next tokens to compute"""
    preempted: list[Sequence] = field(default_factory=list)
    """sequences that lost their blocks"""

    def __bool__(self) -> bool:
        return bool(self.decodes or self.prefills)


class Scheduler:
    """The queue: first come, first served."""

    def __init__(self, manager: BlockManager, settings: SchedulerSettings) -> None:
        self.manager, self.settings = manager, settings
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """in the order of their arrival"""

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free its blocks."""
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
            self.manager.free(sequence)
        elif sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        sequence.status = Status.FINISHED

    def schedule(self) -> Schedule:
        """Choose the next step, allocate its blocks, and preempt where that is needed."""
        found = Schedule()
        can_admit = self.settings.continuous or not self.running
        for sequence in list(self.running):
            while sequence.status is Status.RUNNING and not self.manager.grow(sequence):
                found.preempted.append(self._preempt())
        budget = self.settings.max_tokens
        found.decodes = [sequence for sequence in self.running if sequence.is_decoding]
        budget -= len(found.decodes)
        for sequence in self.running:
            if not sequence.is_decoding and budget:
                budget = self._prefill(sequence, budget, found)
        while (
            can_admit
            and self.waiting
            and budget
            and not found.preempted
            and len(self.running) < self.settings.max_sequences
            and self.manager.admit(self.waiting[0])
        ):
            sequence = self.waiting.popleft()
            sequence.status = Status.RUNNING
            self.running.append(sequence)
            budget = self._prefill(sequence, budget, found)
        return found

    def _prefill(self, sequence: Sequence, budget: int, found: Schedule) -> int:
        n_tokens = min(sequence.n_pending, budget)
        found.prefills.append((sequence, n_tokens))
        return budget - n_tokens

    def _preempt(self) -> Sequence:
        """Take the blocks of the sequence that came last; it goes to the head of the queue."""
        victim = self.running.pop()
        self.manager.free(victim)
        victim.status = Status.WAITING
        victim.n_preempted += 1
        self.waiting.appendleft(victim)
        return victim
