"""Averages of weights: by hand, equal to torch's, unbiased from the first update, swapped in and out bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from llmcourse.models.config import ModelConfig
from llmcourse.models.transformer import Transformer
from llmcourse.training.averaging import WeightAverage, average_checkpoints
from llmcourse.training.fit import FitSettings, fit


def make(seed: int = 0, tied: bool = True) -> Transformer:
    torch.manual_seed(seed)
    sizes = {"d_model": 12, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "d_ff": 20, "context_length": 8}
    return Transformer(ModelConfig(vocab_size=17, tie_embeddings=tied, **sizes))


class Counting(nn.Module):
    """One weight, one counter."""

    def __init__(self, weight: float, count: int = 3, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([weight], dtype=dtype))
        self.register_buffer("count", torch.tensor(count))


def state(*values: float, dtype: torch.dtype = torch.float32, count: int = 3) -> dict[str, torch.Tensor]:
    return {"w": torch.tensor(values, dtype=dtype), "count": torch.tensor(count)}


# Checkpoints


def test_mean_by_hand():
    # (1*1 + 3*5)/4 = 4 and (1*2 + 3*(-2))/4 = -1
    one, two = state(1.0, 2.0), state(5.0, -2.0)
    mean = average_checkpoints([one, two], [1, 3])
    assert mean["w"].tolist() == [4.0, -1.0] and mean["w"].dtype == torch.float32
    assert int(mean["count"]) == 3 and mean["count"].dtype == torch.int64
    assert average_checkpoints([one, two])["w"].tolist() == [3.0, 0.0]
    assert average_checkpoints([one, two], [0.1, 0.3])["w"].tolist() == pytest.approx([4.0, -1.0])
    assert one["w"].tolist() == [1.0, 2.0], "inputs stay as they are"
    # a negative weight extrapolates: 2 * (1, 2) - (5, -2)
    assert average_checkpoints([one, two], [2, -1])["w"].tolist() == [-3.0, 6.0]


def test_sums_are_wide():
    # in bfloat16 a running sum of ones stops at 256; a mean of 1 000 of them must not
    many = average_checkpoints([state(1.0, dtype=torch.bfloat16) for _ in range(1000)])
    assert many["w"].item() == 1.0 and many["w"].dtype == torch.bfloat16
    # in float32 each 1 / 8 would be lost beside 2^21
    large = average_checkpoints([state(2.0**24), *(state(1.0) for _ in range(6)), state(0.0)])
    assert large["w"].item() == 2.0**21 + 0.75


def test_the_result_is_a_copy_and_loads_into_a_tied_model():
    first, second, target = make(1), make(2), make(3)
    mean = average_checkpoints([first.state_dict(), second.state_dict()])
    target.load_state_dict(mean)
    assert target.head.weight is target.embedding.weight
    torch.testing.assert_close(
        target.embedding.weight, (first.embedding.weight + second.embedding.weight) / 2
    )
    alone = average_checkpoints([first.state_dict()])
    alone["embedding.weight"].zero_()
    assert first.embedding.weight.abs().sum() > 0


def test_agrees_with_torchs_swa():
    models = [make(seed) for seed in range(4)]
    theirs, ours = AveragedModel(models[0]), WeightAverage()
    for model in models:
        theirs.update_parameters(model)
        ours.update(model)
    mean = average_checkpoints([model.state_dict() for model in models])
    copied = make(9)
    ours.copy_to(copied)
    for name, parameter in theirs.module.named_parameters():
        torch.testing.assert_close(copied.get_parameter(name), parameter, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(mean[name], parameter.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("states", "weights", "message"),
    [
        ([], None, "no checkpoints"),
        ([state(1.0)], [1, 2], "2 weights for 1 checkpoints"),
        ([state(1.0), state(2.0)], [1, -1], "weights sum to 0.0"),
        ([state(1.0), state(2.0)], [1, float("nan")], "weights sum to nan"),
        ([state(1.0), {"w": torch.ones(1)}], None, "count is in only one of checkpoints 0 and 1"),
        ([state(1.0), state(1.0, 2.0)], None, r"w is \(1,\) torch.float32 in checkpoint 0 and \(2,\)"),
        ([state(1.0), state(1.0, dtype=torch.float64)], None, "w is .* torch.float64 in 1"),
        ([state(1.0), state(1.0), state(1.0, count=4)], None, r"count \(torch.int64\) differs .* 0 and 2"),
    ],
)
def test_checkpoints_are_refused(states, weights, message):
    with pytest.raises(ValueError, match=message):
        average_checkpoints(states, weights)


# Running averages


def test_exponential_average_by_hand():
    # decay 1/2 on 1, 2, 4: weights 1/4, 1/2, 1 over their sum 7/4, that is (1 + 4 + 16) / 7 = 3
    average, model = WeightAverage(decay=0.5), Counting(0.0)
    for weight, expected in ((1.0, 1.0), (2.0, (1 + 2 * 2) / 3), (4.0, 3.0)):
        with torch.no_grad():
            model.weight.fill_(weight)
        average.update(model)
        with average.swapped(model):
            assert model.weight.item() == pytest.approx(expected)
        assert model.weight.item() == weight
    assert average.n_updates == 3


def test_corrected_ema_is_torchs_ema_without_its_first_model():
    """torch starts at theta_1 with weight decay^(k-1); take that surplus off and both agree."""
    decay, models = 0.9, [make(seed) for seed in range(5)]
    theirs = AveragedModel(models[0], multi_avg_fn=get_ema_multi_avg_fn(decay))
    ours, copied = WeightAverage(decay=decay), make(9)
    for model in models:
        theirs.update_parameters(model)
        ours.update(model)
    ours.copy_to(copied)
    k = len(models)
    surplus = decay ** (k - 1) - (1 - decay) * decay ** (k - 1)  # of the first model
    for name, parameter in theirs.module.named_parameters():
        expected = (parameter - surplus * models[0].get_parameter(name)) / (1 - decay**k)
        torch.testing.assert_close(copied.get_parameter(name), expected, rtol=1e-4, atol=1e-5)


def test_constant_weights_are_their_own_average_at_once():
    for decay in (0.0, 0.5, 0.999, 1.0):
        model, average = Counting(7.0), WeightAverage(decay=decay)
        for _ in range(3):
            average.update(model)
            with average.swapped(model):
                assert model.weight.item() == pytest.approx(7.0, rel=1e-6)


def test_uniform_is_the_limit_of_exponential():
    means = []
    for decay in (1.0, 1 - 1e-9):
        average, model = WeightAverage(decay=decay), Counting(0.0)
        for weight in (3.0, 9.0, -1.0, 5.0):
            with torch.no_grad():
                model.weight.fill_(weight)
            average.update(model)
        average.copy_to(model)
        means.append(model.weight.item())
    assert means[0] == pytest.approx(4.0) and means[1] == pytest.approx(4.0, rel=1e-6)


def test_bfloat16_weights_are_averaged_in_float32():
    average = WeightAverage()
    for _ in range(300):  # a step of 1 / 300 toward a new value would be lost in bfloat16
        average.update(Counting(1.0, dtype=torch.bfloat16))
    for _ in range(300):
        average.update(Counting(2.0, dtype=torch.bfloat16))
    wide, narrow = Counting(0.0), Counting(0.0, dtype=torch.bfloat16)
    average.copy_to(wide)
    average.copy_to(narrow)
    assert wide.weight.item() == pytest.approx(1.5, abs=1e-4) and narrow.weight.item() == 1.5


class OnesSource:
    """The same batch for ever."""

    def next(self) -> dict[str, torch.Tensor]:
        return {"x": torch.ones(1)}

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


@pytest.mark.parametrize(
    ("start", "every", "steps"), [(0, 1, range(6)), (3, 1, (3, 4, 5)), (1, 2, (1, 3, 5))]
)
def test_from_fit(start: int, every: int, steps, tmp_path: Path):
    model, average, seen = Counting(0.0), WeightAverage(start=start, every=every), []

    def on_step(step: int, current: nn.Module) -> None:
        seen.append(current.weight.item())
        average(step, current)

    def loss(current: nn.Module, batch: dict[str, torch.Tensor]):
        return ((current.weight - batch["x"]) ** 2).sum(), 1, {}

    fit(
        model, OnesSource(), loss,
        FitSettings(steps=6, lr=0.1, schedule="constant", weight_decay=0.0, compile="off", precision="fp32"),
        on_step=on_step, progress=False,
    )  # fmt: skip
    expected = sum(seen[step] for step in steps) / len(steps)
    assert average.n_updates == len(steps)
    with average.swapped(model) as averaged:
        assert averaged is model and model.weight.item() == pytest.approx(expected, rel=1e-6)
    assert model.weight.item() == seen[-1]


def test_swapped_gives_the_weights_back_bit_for_bit_even_after_an_error():
    model, average = make(0), WeightAverage()
    average.update(make(1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(KeyError), average.swapped(model):
        assert not torch.equal(model.embedding.weight, before["embedding.weight"])
        assert model.head.weight is model.embedding.weight
        raise KeyError
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_average_of_a_valley_is_lower_than_its_points():
    # f(w) = w^2 at points that alternate about its minimum
    points = [1.0, -0.9, 1.1, -1.0]
    mean = average_checkpoints([state(point) for point in points])["w"].item()
    assert mean**2 < min(point**2 for point in points)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.1}, "decay=1.1"),
        ({"decay": -0.1}, "decay=-0.1"),
        ({"start": -1}, "start=-1"),
        ({"every": 0}, "every=0"),
    ],
)
def test_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        WeightAverage(**options)


def test_other_models_and_empty_averages_are_refused():
    average, model = WeightAverage(start=5), make()
    average(4, model)
    with pytest.raises(ValueError, match="no step from start=5 on"):
        average.copy_to(model)
    with pytest.raises(ValueError, match="nothing to copy"), average.swapped(model):
        pass
    average(5, model)
    with pytest.raises(ValueError, match=r"head.weight is \(17, 12\) in this model and None in the average"):
        average.update(make(tied=False))
    with pytest.raises(ValueError, match="use one average for each model"):
        average.copy_to(Counting(1.0))
