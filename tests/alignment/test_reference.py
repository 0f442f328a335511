"""Stored reference log-probabilities: equal to direct ones, in the right rows; mismatched rows by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmcourse.alignment.log_probs import response_log_probs
from llmcourse.alignment.reference import (
    PAIR,
    MismatchedBatches,
    ReferenceBatches,
    joined,
    mismatched_rows,
    reference_log_probs,
)
from llmcourse.data.packing import IGNORE
from llmcourse.data.preference import PreferenceBatches, PreferenceSet
from llmcourse.models.config import ModelConfig
from llmcourse.models.transformer import Transformer

N, V = 7, 23
CONFIG = ModelConfig(
    vocab_size=V, context_length=24, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=24
)


def pairs(n: int = N, seed: int = 0) -> PreferenceSet:
    """Random pairs of unequal lengths."""
    rng = np.random.default_rng(seed)

    def ids(low: int, high: int) -> list[np.ndarray]:
        return [rng.integers(2, V, rng.integers(low, high)) for _ in range(n)]

    return PreferenceSet(ids(2, 9), ids(1, 9), ids(1, 9), np.full(n, np.nan, np.float32), 1, {})


def batches(data: PreferenceSet | None = None, batch_size: int = 3) -> PreferenceBatches:
    return PreferenceBatches(data or pairs(), batch_size=batch_size, context_length=24, seed=0)


class WithoutAnswer(PreferenceBatches):
    """Pair 4 has lost its rejected answer."""

    def collate(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        batch = super().collate(rows)
        batch["rejected_targets"][torch.from_numpy(rows == 4)] = IGNORE
        return batch


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(CONFIG)


def test_joined_pads_and_cuts():
    batch = {
        "chosen_tokens": torch.tensor([[5, 6, 0, 0]]),
        "chosen_targets": torch.tensor([[6, 7, IGNORE, IGNORE]]),
        "rejected_tokens": torch.tensor([[5]]),
        "rejected_targets": torch.tensor([[9]]),
    }
    tokens, targets = joined(batch, PAIR)
    assert tokens.tolist() == [[5, 6], [5, 0]]
    assert targets.tolist() == [[6, 7], [9, IGNORE]]
    with pytest.raises(ValueError, match=r"no 'mismatched_tokens'"):
        joined(batch, (*PAIR, "mismatched"))


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_stored_numbers_equal_direct_ones(model, batch_size):
    data = pairs()
    found = reference_log_probs(model, batches(data), batch_size=batch_size, precision="fp32", progress=False)
    assert set(found) == {"chosen_ref_log_probs", "rejected_ref_log_probs"}
    for name in PAIR:
        for i, answer in enumerate(getattr(data, name)):
            ids = torch.from_numpy(np.concatenate([data.prompts[i], answer]))
            log_p = model(ids[None, :-1])[0].log_softmax(-1)
            expected = sum(
                log_p[len(data.prompts[i]) - 1 + t, token].item() for t, token in enumerate(answer)
            )
            assert found[f"{name}_ref_log_probs"][i].item() == pytest.approx(expected, abs=2e-5)


def test_the_model_stays_as_it_was(model):
    model.train()
    found = reference_log_probs(model, batches(), precision="fp32", progress=False)
    assert model.training
    assert all(not column.requires_grad for column in found.values())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_each_batch_gets_the_numbers_of_its_own_pairs(model):
    source = batches()
    columns = reference_log_probs(model, source, precision="fp32", progress=False)
    stored = ReferenceBatches(batches(), columns)
    for _ in range(4):  # two epochs
        expected, batch = source.next(), stored.next()
        assert torch.equal(batch["pairs"], expected["pairs"])
        direct = response_log_probs(model, *joined(batch, PAIR)).sum(-1).chunk(2)
        for name, log_probs in zip(PAIR, direct, strict=True):
            assert torch.allclose(batch[f"{name}_ref_log_probs"], log_probs, atol=2e-5)


def test_the_position_belongs_to_data_and_reference(model):
    columns = reference_log_probs(model, batches(), precision="fp32", progress=False)
    first = ReferenceBatches(batches(), columns)
    first.next()
    again = ReferenceBatches(batches(), columns)
    again.load_state_dict(first.state_dict())
    assert torch.equal(again.next()["pairs"], first.next()["pairs"])
    for other in (
        ReferenceBatches(batches(pairs(seed=1)), columns),
        ReferenceBatches(batches(), {name: column + 1 for name, column in columns.items()}),
    ):
        with pytest.raises(ValueError, match="saved"):
            other.load_state_dict(first.state_dict())


def test_mismatched_rows_by_hand():
    # row 0: prompt 3 4, response 5 6; row 1: prompt 7, response 8; each gets the other's response
    tokens = torch.tensor([[3, 4, 5, 0], [7, 0, 0, 0]])
    targets = torch.tensor([[IGNORE, 5, 6, IGNORE], [8, IGNORE, IGNORE, IGNORE]])
    new_tokens, new_targets = mismatched_rows(tokens, targets, targets.flip(0))
    assert new_tokens.tolist() == [[3, 4], [7, 5]]
    assert new_targets.tolist() == [[IGNORE, 8], [5, 6]]
    cut_tokens, cut_targets = mismatched_rows(tokens, targets, targets.flip(0), limit=1)
    assert cut_tokens.tolist() == [[3], [7]]
    assert cut_targets.tolist() == [[IGNORE], [5]]


def test_mismatched_batches_take_the_next_pairs_response():
    data = pairs()
    batch = MismatchedBatches(batches(data)).collate(np.array([2, 5, 6]))
    answers = [
        data.chosen[3],
        data.rejected[6],
        data.chosen[0],
    ]  # even pairs: the chosen; the last wraps around
    for row, (prompt, answer) in enumerate(zip((2, 5, 6), answers, strict=True)):
        targets = batch["mismatched_targets"][row]
        assert targets[targets != IGNORE].tolist() == answer.tolist()
        expected = [*data.prompts[prompt], *answer[:-1]]
        assert batch["mismatched_tokens"][row, : len(expected)].tolist() == expected


def test_errors(model):
    with pytest.raises(ValueError, match="batch_size=0"):
        reference_log_probs(model, batches(), batch_size=0, progress=False)
    with pytest.raises(ValueError, match="at least 2"):
        MismatchedBatches(batches(pairs(1), batch_size=1))
    with pytest.raises(ValueError, match="chosen_ref_log_probs has 3 values for 7 pairs"):
        ReferenceBatches(batches(), {"chosen_ref_log_probs": torch.zeros(3)})
    with pytest.raises(ValueError, match="pair 4 has a response without a token"):
        reference_log_probs(
            model, WithoutAnswer(pairs(), batch_size=3, context_length=24, seed=0), progress=False
        )
    torch.nn.init.constant_(model.final_norm.weight, float("nan"))
    with pytest.raises(ValueError, match="pair 0 has a log-probability of"):
        reference_log_probs(model, batches(), progress=False)
