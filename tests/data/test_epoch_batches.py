"""Batches of ragged rows: each epoch without repetition, reproducible, shared by ranks, refused when of other data."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmcourse.data.epoch_batches import EpochBatches

LENGTHS = np.random.default_rng(0).integers(1, 50, 103)


class Numbers(EpochBatches):
    """Batches that hold the rows' own numbers."""

    def collate(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        return {"rows": torch.from_numpy(rows)}


def make(**changes: int) -> Numbers:
    return Numbers(LENGTHS, **({"batch_size": 8, "seed": 3} | changes))


def epoch(source: Numbers) -> list[int]:
    return [int(row) for _ in range(source.batches_per_epoch) for row in source.next()["rows"]]


def test_an_epoch_visits_no_row_twice_and_the_next_one_differs():
    source = make()
    first, second = epoch(source), epoch(source)
    assert len(first) == len(set(first)) == 96 == len(set(second)) and source.epoch == 2
    assert first != second and set(first) != set(second)  # other rows are left out


def test_rows_of_a_batch_are_alike_in_length():
    source = make()
    spread = np.mean([np.ptp(LENGTHS[source.rows(p)]) for p in range(source.batches_per_epoch)])
    assert spread < 0.2 * np.ptp(LENGTHS)


def test_the_batch_is_a_function_of_seed_and_position():
    source = make()
    at = [source.at(p)["rows"].tolist() for p in (14, 2, 30)]
    assert [make().at(p)["rows"].tolist() for p in (14, 2, 30)] == at and source.position == 0
    assert make(seed=4).at(2)["rows"].tolist() != at[1]
    assert [batch["rows"].tolist() for batch, _ in zip(make(), range(3), strict=False)][2] == at[1]


def test_ranks_share_the_global_batch():
    ranks = [make(batch_size=4, rank=rank, world_size=2) for rank in range(2)]
    together = torch.cat([source.at(5)["rows"] for source in ranks])
    assert together.tolist() == make().at(5)["rows"].tolist()
    assert ranks[0].state_dict() == ranks[1].state_dict() == make().state_dict()


def test_a_saved_position_goes_on_and_other_data_is_refused():
    source, other = make(), make()
    for _ in range(13):
        source.next()
    other.load_state_dict(source.state_dict())
    assert other.next()["rows"].tolist() == source.next()["rows"].tolist()
    with pytest.raises(ValueError, match="saved batches has seed=3, this one has seed=5"):
        make(seed=5).load_state_dict(source.state_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"rank": 1}, "rank=1"),
        ({"batch_size": 52, "world_size": 2}, "103 rows do not fill one batch of 104"),
    ],
)
def test_bad_arguments_are_refused(changes: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_a_source_without_collate_says_so():
    with pytest.raises(NotImplementedError, match="EpochBatches needs a collate method"):
        EpochBatches(LENGTHS, batch_size=8, seed=0).next()
