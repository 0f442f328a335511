"""Blocks are never lost, never held wrongly, and shared exactly where texts begin alike."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcourse.inference.block_manager import BlockManager
from llmcourse.inference.sampling import SamplingParams
from llmcourse.inference.sequence import Sequence


def sequence(prompt: list[int], number: int = 0) -> Sequence:
    return Sequence(number, list(prompt), SamplingParams())


def compute(manager: BlockManager, one: Sequence) -> None:
    one.n_computed = one.n_tokens
    manager.publish(one)


def test_blocks_of_a_text_by_hand():
    manager = BlockManager(6, 4)
    first = sequence([1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert manager.admit(first) and first.blocks == [0, 1, 2] and first.n_shared == 0
    compute(manager, first)
    second = sequence([1, 2, 3, 4, 5, 6, 7, 8, 7])
    assert manager.admit(second)
    assert second.blocks == [0, 1, 3] and second.n_shared == second.n_computed == 8
    other = sequence([1, 2, 3, 4, 6, 6, 7, 8, 7])  # differs in its second block
    assert manager.admit(other)
    assert other.blocks == [0, 4, 5] and other.n_shared == 4
    assert manager.n_free == 0 and not manager.admit(sequence([5]))
    manager.check([first, second, other])
    manager.free(first)
    assert manager.n_free == 1, "only block 2 is held by nobody else"
    manager.check([second, other])


def test_the_last_token_is_always_computed():
    manager = BlockManager(8, 4)
    first = sequence([1, 2, 3, 4, 5, 6, 7, 8])
    manager.admit(first)
    compute(manager, first)
    again = sequence([1, 2, 3, 4, 5, 6, 7, 8])
    manager.admit(again)
    assert again.n_shared == 4, "with both blocks shared there would be no logits"


def test_a_block_means_its_whole_prefix():
    manager = BlockManager(8, 2)
    first = sequence([1, 2, 3, 4, 5])
    manager.admit(first)
    compute(manager, first)
    other = sequence([9, 9, 3, 4, 5])
    manager.admit(other)
    assert other.n_shared == 0, "the second block has the same tokens behind another beginning"


def test_freed_content_is_found_again_until_its_room_is_needed():
    manager = BlockManager(3, 2)
    first = sequence([1, 2, 3, 4, 5])
    manager.admit(first)
    compute(manager, first)
    manager.free(first)
    assert manager.n_free == 3
    again = sequence([1, 2, 3, 4, 6])
    manager.admit(again)
    assert again.n_shared == 4
    manager.free(again)
    taker = sequence([7, 7, 7])
    manager.admit(
        taker
    )  # takes the block without content and the one of [3, 4], which was freed before [1, 2]
    late = sequence([1, 2, 3, 4, 5])
    assert not manager.admit(late)
    manager.free(taker)
    assert manager.admit(late) and late.n_shared == 2
    manager.check([late])


def test_without_sharing_nothing_is_shared():
    manager = BlockManager(8, 2, share_prefixes=False)
    first = sequence([1, 2, 3, 4, 5])
    manager.admit(first)
    compute(manager, first)
    second = sequence([1, 2, 3, 4, 5])
    manager.admit(second)
    assert not set(first.blocks) & set(second.blocks)


def test_growth_and_its_end():
    manager = BlockManager(2, 2)
    one = sequence([1, 2, 3])
    assert manager.admit(one) and manager.grow(one) and len(one.blocks) == 2
    one.new_ids = [4, 5]
    assert not manager.grow(one)


@pytest.mark.parametrize(("n_blocks", "block_size"), [(0, 4), (4, 0)])
def test_sizes_are_positive(n_blocks, block_size):
    with pytest.raises(ValueError, match="give at least 1"):
        BlockManager(n_blocks, block_size)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_the_books_are_right_whatever_happens(data):
    """Random arrivals, growth and ends, with texts of two letters so that prefixes and contents meet often."""
    n_blocks, block_size = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 4))
    manager, holders, number = BlockManager(n_blocks, block_size), [], 0
    for _ in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["admit", "compute", "grow", "free"]))
        if action == "admit":
            one = sequence(data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=16)), number)
            number += 1
            before = manager.n_free
            if manager.admit(one):
                holders.append(one)
                assert one.n_shared < one.n_tokens
            else:
                assert manager.n_free == before and not one.blocks
        elif holders:
            one = data.draw(st.sampled_from(holders))
            if action == "compute":
                compute(manager, one)
            elif action == "grow":
                one.new_ids.append(data.draw(st.integers(0, 1)))
                if not manager.grow(one):
                    one.new_ids.pop()
            else:
                manager.free(one)
                holders.remove(one)
        manager.check(holders)
        for one in holders:  # a computed full block is held by others only if their texts agree up to its end
            for other in holders:
                for i in set(range(len(one.blocks))) & {
                    j for j, b in enumerate(other.blocks) if b in one.blocks
                }:
                    if one.blocks[i] == other.blocks[i] and one is not other:
                        end = (i + 1) * block_size
                        assert one.ids(0, end) == other.ids(0, end)
    for one in holders:
        manager.free(one)
    manager.check([])
    assert manager.n_free == n_blocks
