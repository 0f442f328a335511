"""Who takes part in a step: order, budgets, chunks, admission, preemption."""

from __future__ import annotations

import pytest

from llmcourse.inference.block_manager import BlockManager
from llmcourse.inference.sampling import SamplingParams
from llmcourse.inference.scheduler import Scheduler, SchedulerSettings
from llmcourse.inference.sequence import Sequence, Status


def make(n_blocks: int = 64, block_size: int = 4, **settings: object) -> Scheduler:
    return Scheduler(BlockManager(n_blocks, block_size, share_prefixes=False), SchedulerSettings(**settings))


def sequence(number: int, n_prompt: int) -> Sequence:
    return Sequence(number, [1] * n_prompt, SamplingParams())


def carry_out(found) -> None:
    """What the engine does with a schedule."""
    for one, n in found.prefills:
        one.n_computed += n
    for one in found.decodes:
        one.n_computed += 1
    for one in [*(one for one, _ in found.prefills), *found.decodes]:
        if one.n_pending == 0:
            one.new_ids.append(7)


def described(found) -> tuple[list[int], list[tuple[int, int]]]:
    return [one.number for one in found.decodes], [(one.number, n) for one, n in found.prefills]


def test_a_long_prompt_is_cut_and_does_not_hold_up_those_who_write():
    scheduler = make(max_sequences=4, max_tokens=8)
    scheduler.add(sequence(0, 3))
    scheduler.add(sequence(1, 12))
    found = scheduler.schedule()
    assert described(found) == ([], [(0, 3), (1, 5)])
    carry_out(found)
    found = scheduler.schedule()
    assert described(found) == ([0], [(1, 7)])
    carry_out(found)
    found = scheduler.schedule()
    assert described(found) == ([0, 1], [])


def test_no_more_than_allowed_run_together_and_in_order():
    scheduler = make(max_sequences=2, max_tokens=100)
    for number in range(4):
        scheduler.add(sequence(number, 2))
    found = scheduler.schedule()
    assert described(found) == ([], [(0, 2), (1, 2)])
    carry_out(found)
    scheduler.remove(scheduler.running[0])
    assert described(scheduler.schedule()) == ([1], [(2, 2)])


def test_static_batching_waits_for_the_whole_batch():
    scheduler = make(max_sequences=2, max_tokens=100, continuous=False)
    for number in range(3):
        scheduler.add(sequence(number, 2))
    carry_out(scheduler.schedule())
    scheduler.remove(scheduler.running[0])
    assert described(scheduler.schedule()) == ([1], [])
    scheduler.remove(scheduler.running[0])
    assert described(scheduler.schedule()) == ([], [(2, 2)])


def test_the_last_one_loses_its_blocks_and_comes_back_first():
    scheduler = make(n_blocks=3, block_size=4, max_sequences=3, max_tokens=100)
    for number in range(3):
        scheduler.add(sequence(number, 4))
    carry_out(scheduler.schedule())  # three blocks, all full; each has one new token that needs a slot
    found = scheduler.schedule()
    assert [one.number for one in found.preempted] == [2, 1] and described(found) == ([0], [])
    first, second = scheduler.waiting
    assert (first.number, second.number) == (1, 2) and first.status is Status.WAITING
    assert first.n_computed == 0 and first.blocks == [] and first.n_preempted == 1
    scheduler.manager.check(scheduler.running)
    carry_out(found)
    scheduler.remove(scheduler.running[0])
    assert described(scheduler.schedule()) == ([], [(1, 5)]), "prompt and new token are computed again"


def test_nobody_is_admitted_in_a_step_that_preempts():
    scheduler = make(n_blocks=3, block_size=4, max_sequences=3, max_tokens=100)
    scheduler.add(sequence(0, 4))
    scheduler.add(sequence(1, 8))
    carry_out(scheduler.schedule())
    scheduler.add(sequence(2, 1))
    found = scheduler.schedule()
    assert [one.number for one in found.preempted] == [1] and described(found) == ([0], [])


def test_removing_is_right_in_every_state():
    scheduler = make(max_sequences=1, max_tokens=10)
    first, second = sequence(0, 2), sequence(1, 2)
    scheduler.add(first)
    scheduler.add(second)
    scheduler.schedule()
    scheduler.remove(second)
    scheduler.remove(first)
    scheduler.remove(first)
    assert not scheduler.schedule() and scheduler.manager.n_free == 64
    assert first.status is second.status is Status.FINISHED


@pytest.mark.parametrize("bad", [{"max_sequences": 0}, {"max_sequences": 8, "max_tokens": 7}])
def test_limits_make_sense(bad):
    with pytest.raises(ValueError, match="give at least"):
        SchedulerSettings(**bad)
