"""GRPO over the one loop: what a batch holds, one step against autograd by hand, resume, refusals, and that it
learns."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmcourse.alignment import grpo as module
from llmcourse.alignment.grpo import GRPOSettings, grpo_loss, train_grpo
from llmcourse.alignment.policy_losses import Objective, group_advantages
from llmcourse.alignment.rollouts import RolloutSettings, RolloutSource, sampled_log_probs
from llmcourse.models.config import ModelConfig
from llmcourse.models.transformer import Transformer
from llmcourse.training.fit import FitSettings

V, CONTEXT, STOP = 11, 16, 0
PROMPTS = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10], [2, 2], [3, 1]]


class Letters:
    """A codec of one character a token: id 0 ends a text, ids from 1 are "a", "b", ..."""

    eos_id = STOP

    def encode(self, text: str) -> list[int]:
        return [ord(character) - 96 for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(i + 96) for i in ids if i)


LETTERS = Letters()


def make(seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    sizes = {"vocab_size": V, "context_length": CONTEXT, "d_model": 16, "n_layers": 2, "n_heads": 2}
    return Transformer(ModelConfig(**sizes, n_kv_heads=1, d_ff=24, tie_embeddings=False))


def share_of_b(numbers: Sequence[int], texts: Sequence[str]) -> list[float]:
    """Reward: how much of the response is the letter b (token 2)."""
    return [text.count("b") / 4 for text in texts]


ROLLOUTS = RolloutSettings(prompts=3, group_size=4, max_new_tokens=4, micro_batch=6, seed=5)


def source(model: nn.Module | None = None, **changes: Any) -> RolloutSource:
    fields = {f.name for f in dataclasses.fields(RolloutSettings)}
    settings = dataclasses.replace(ROLLOUTS, **{k: v for k, v in changes.items() if k in fields})
    options = {"micro_steps": 2} | {k: v for k, v in changes.items() if k not in fields}
    scorer = options.pop("scorer", share_of_b)
    prompts = options.pop("list_of_prompts", PROMPTS)
    return RolloutSource(model or make(), LETTERS, prompts, scorer, settings, **options)


def settings(
    steps: int = 2, objective: Objective | None = None, *, micro_steps: int = 2, **changes: Any
) -> GRPOSettings:
    fit = FitSettings(
        steps=steps,
        lr=1e-2,
        schedule="constant",
        micro_steps=micro_steps,
        compile="off",
        weight_decay=0,
        precision="fp32",
    )
    rollouts = dataclasses.replace(ROLLOUTS, **changes)
    return GRPOSettings(rollouts=rollouts, objective=objective or Objective(), fit=fit)


def response(batch: dict[str, Tensor], row: int) -> list[int]:
    return [t for t in batch["targets"][row].tolist() if t != -100]


def test_a_batch_holds_prompts_and_what_was_scored():
    seen: dict[str, list[int]] = {}

    def scorer(numbers: Sequence[int], texts: Sequence[str]) -> list[float]:
        for number, text in zip(numbers, texts, strict=True):
            seen.setdefault(text, []).append(number)
        return share_of_b(numbers, texts)

    one = source(scorer=scorer)
    batches = [one.next(), one.next()]
    assert sum(map(len, seen.values())) == 12 and len(one.rounds) == 1
    stops = 0
    for batch in batches:
        assert batch["tokens"].shape == batch["targets"].shape and len(batch["tokens"]) == 6
        assert (batch["targets"] != -100).any(dim=0)[-1]  # no column without use at the end
        for row in range(6):
            written = (batch["targets"][row] != -100).nonzero()[:, 0].tolist()
            new = response(batch, row)
            start = written[0] + 1
            prompt = batch["tokens"][row, :start].tolist()
            text = LETTERS.decode(new)
            assert PROMPTS.index(prompt) in seen[text]
            assert written == list(range(written[0], written[0] + len(new)))  # one stretch
            assert batch["tokens"][row, start : start + len(new) - 1].tolist() == new[:-1]
            assert float(batch["rewards"][row]) == text.count("b") / 4
            assert STOP not in new[:-1] and (new[-1] == STOP or len(new) == 4)
            stops += new[-1] == STOP
    assert 0 < stops < 12
    record = one.rounds[0]
    lengths = [len(response(batch, row)) for batch in batches for row in range(6)]
    assert record["tokens"] == sum(lengths) and record["length"] == sum(lengths) / 12
    assert record["cut"] == pytest.approx(1 - stops / 12) and record["groups"] == 3
    widths = [b["tokens"].shape[1] for b in batches]
    assert widths[0] <= widths[1]  # the short rows are together


def test_advantages_compare_the_responses_to_one_prompt():
    rewards: list[float] = []

    def scorer(numbers: Sequence[int], texts: Sequence[str]) -> list[float]:
        assert all(len(set(numbers[i : i + 4])) == 1 for i in (0, 4, 8)) and len(set(numbers)) == 3
        rewards[:] = [float(i * i % 7) for i in range(12)]
        return rewards

    one = source(scorer=scorer, scale="none")
    batches = [one.next(), one.next()]
    pairs = torch.cat([torch.stack((b["rewards"], b["advantages"]), dim=1) for b in batches]).tolist()
    found = sorted((r, round(a, 4)) for r, a in pairs)
    expected = group_advantages(torch.tensor(rewards), 4, scale="none").tolist()
    assert found == sorted((r, round(a, 4)) for r, a in zip(rewards, expected, strict=True))


def test_every_row_is_used_once_an_epoch_and_old_log_probs_are_those_of_the_writer():
    model = make()
    writer = copy.deepcopy(model)
    one = source(model, epochs=2, micro_steps=1, temperature=0.8, reference=make(1))
    batches = []
    for _ in range(4):
        batches.append(one.next())
        with torch.no_grad():
            model.head.weight.mul_(1.1)  # as an optimizer step would
    assert len(one.rounds) == 1
    for epoch in (batches[:2], batches[2:]):
        rows = [(tuple(response(b, i)), float(b["advantages"][i])) for b in epoch for i in range(6)]
        assert len(rows) == 12
        epochs_rows = sorted(rows)
        assert epochs_rows == sorted(
            (tuple(response(b, i)), float(b["advantages"][i])) for b in batches[:2] for i in range(6)
        )
    order = [[tuple(response(b, i)) for b in epoch for i in range(6)] for epoch in (batches[:2], batches[2:])]
    assert order[0] != order[1]
    for batch in batches:
        for name, who in (("old_log_probs", writer), ("ref_log_probs", make(1))):
            with torch.no_grad():
                expected = sampled_log_probs(who, batch["tokens"], batch["targets"], 0.8)
            torch.testing.assert_close(batch[name], expected, rtol=1e-5, atol=1e-6)


def test_old_log_probs_are_left_out_where_they_would_be_the_policys_own():
    assert "old_log_probs" not in source().next()
    assert "old_log_probs" in source(micro_steps=1).next()
    assert "ref_log_probs" not in source().next()


def test_log_probs_at_a_temperature_by_hand_and_without_hidden_states():
    model = make().eval()
    tokens, targets = torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([[-100, 3, 4], [5, -100, -100]])
    expected = (model(tokens) / 0.5).log_softmax(-1)
    by_hand = torch.zeros(2, 3)
    for i, t in ((0, 1), (0, 2), (1, 0)):
        by_hand[i, t] = expected[i, t, targets[i, t]]
    for policy in (model, nn.Sequential(model)):
        for chunk in (None, 2):
            own = sampled_log_probs(policy, tokens, targets, 0.5, chunk_size=chunk)
            torch.testing.assert_close(own, by_hand, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(sampled_log_probs(model, tokens, targets), by_hand)


def test_a_step_off_policy_begins_with_the_gradient_on_policy():
    model = make()
    batch = source(model, micro_steps=1).next()
    gradients = []
    for used in (batch, {k: v for k, v in batch.items() if k != "old_log_probs"}):
        total, _, metrics = grpo_loss(Objective())(model, used)
        assert float(metrics["clipped"]) == 0 and 0 <= float(metrics["reward"]) <= 1
        gradients.append(torch.autograd.grad(total, model.head.weight)[0])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("average", ["sequence", "token", "constant"])
def test_micro_steps_give_the_step_of_the_whole_round(average: str):
    models = make(), make()
    objective = Objective(average=average, max_length=4)
    whole = settings(1, objective, micro_batch=12, micro_steps=1)
    parts = settings(1, objective)
    results = [
        train_grpo(m, LETTERS, PROMPTS, share_of_b, s, progress=False)
        for m, s in zip(models, (whole, parts), strict=True)
    ]
    first, second = (one.fit.records[0] for one in results)
    assert first["loss"] == pytest.approx(second["loss"], abs=1e-6) and first["units"] == second["units"]
    assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-4)


def test_it_raises_the_probability_of_a_rewarded_token():
    model = make()

    def chance() -> float:
        with torch.no_grad():
            return float(model(torch.tensor([PROMPTS[0]]))[0, -1].softmax(-1)[2])

    before = chance()
    result = train_grpo(
        model,
        LETTERS,
        PROMPTS,
        share_of_b,
        settings(25, prompts=6, group_size=8, micro_batch=24),
        progress=False,
    )
    assert before < 0.3 and chance() > 0.8
    rewards = [one["reward"] for one in result.rounds]
    assert len(rewards) == 25 and sum(rewards[-5:]) / 5 > 0.7 > 0.3 > sum(rewards[:3]) / 3
    assert result.tokens == sum(one["tokens"] for one in result.rounds)


def test_the_kl_term_keeps_the_policy_near_its_reference():
    divergences = {}
    for weight in (0.0, 3.0):
        objective = Objective(kl_weight=weight, kl_corrected=True)
        run = settings(8, objective, prompts=6, group_size=8, micro_batch=24)
        result = train_grpo(make(), LETTERS, PROMPTS, share_of_b, run, reference=make(), progress=False)
        divergences[weight] = result.fit.records[-1]["kl"]
    assert divergences[3.0] < 0.3 * divergences[0.0]


def test_the_reference_is_a_frozen_copy_of_the_model_as_it_came():
    objective = Objective(kl_weight=0.1)
    result = train_grpo(make(), LETTERS, PROMPTS, share_of_b, settings(2, objective), progress=False)
    first, second = (record["kl"] for record in result.fit.records)
    assert first == pytest.approx(0, abs=1e-6) and second > 1e-4
    assert (
        "kl"
        not in train_grpo(make(), LETTERS, PROMPTS, share_of_b, settings(1), progress=False).fit.records[0]
    )


def test_resume_within_a_round_is_bit_identical(tmp_path: Path):
    # a round lasts for two epochs of two steps; the stop comes in the middle of the second round
    objective = Objective(kl_weight=0.05)

    def run(model: Transformer, steps: int, folder: Path) -> Any:
        base = settings(7, objective, epochs=2)
        fit = dataclasses.replace(base.fit, steps=steps, micro_steps=1, checkpoint_every=steps)
        return train_grpo(
            model,
            LETTERS,
            PROMPTS,
            share_of_b,
            dataclasses.replace(base, fit=fit),
            reference=make(),
            checkpoint_folder=folder,
            progress=False,
        )

    whole, stopped, resumed = make(), make(), make(9)
    complete = run(whole, 9, tmp_path / "whole")
    run(stopped, 6, tmp_path / "parts")
    rest = run(resumed, 9, tmp_path / "parts")
    assert rest.fit.resumed_from == 6
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    timeless = [
        [{k: v for k, v in one.items() if k != "seconds"} for one in r.rounds] for r in (complete, rest)
    ]
    assert timeless[0] == timeless[1] and len(timeless[0]) == 3


def test_the_position_is_plain_data_and_holds_no_rows_between_rounds():
    one = source(micro_steps=1, reference=make(1))
    assert one.state_dict()["rows"] == {}
    one.next()
    state = json.loads(json.dumps(one.state_dict()))
    other = source(make(), micro_steps=1, reference=make(1))
    other.load_state_dict(state)
    expected, found = one.next(), other.next()
    assert expected.keys() == found.keys() >= {"old_log_probs", "ref_log_probs"}
    assert all(torch.equal(values, found[name]) for name, values in expected.items())
    assert one.state_dict()["rows"] == {}


def test_a_position_of_other_prompts_settings_or_processes_is_refused():
    one = source(micro_steps=1)
    state = json.loads(json.dumps(one.state_dict()))
    for other in (source(micro_steps=1, seed=6), source(micro_steps=1, list_of_prompts=PROMPTS[::-1])):
        with pytest.raises(ValueError, match="the saved rollouts has"):
            other.load_state_dict(state)
    two = {"micro_steps": 1, "rank": 0, "world_size": 2}
    several = source(**two)
    several.next()
    with pytest.raises(ValueError, match="in the middle of a round"):
        source(**two).load_state_dict(several.state_dict())


def test_processes_share_the_prompts_of_one_list():
    def asked(**place: int) -> list[list[int]]:
        rounds: list[list[int]] = []

        def scorer(numbers: Sequence[int], texts: Sequence[str]) -> list[float]:
            rounds.append(list(numbers[::4]))
            return share_of_b(numbers, texts)

        one = source(scorer=scorer, **place)
        for _ in range(8):
            one.next()
        return rounds

    alone = sum(asked(), [])
    assert sorted(alone[:6]) == sorted(alone[6:]) == list(range(6)) and alone[:6] != alone[6:]
    both = [asked(rank=rank, world_size=2) for rank in (0, 1)]
    together = sum((a + b for a, b in zip(*both, strict=True)), [])
    assert together[:12] == alone


def test_a_constant_group_gives_no_gradient_is_counted_and_said(capsys: pytest.CaptureFixture[str]):
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match="round 0: the rewards of each of the 3 groups are equal") as caught:
        result = train_grpo(model, LETTERS, PROMPTS, lambda numbers, texts: [0.3] * len(texts), settings(2))
    assert len([w for w in caught if "groups are equal" in str(w.message)]) == 1  # said once
    assert result.constant_share == 1 and "6 groups (100%) had equal rewards" in capsys.readouterr().out
    assert all(record["grad_norm"] == 0 for record in result.fit.records)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_some_constant_groups_are_counted():
    one = source(scorer=lambda numbers, texts: [1.0] * 4 + [float(i) for i in range(8)])
    batches = [one.next(), one.next()]
    assert one.rounds[0]["constant_groups"] == 1
    assert sum(float(a) == 0 for b in batches for a in b["advantages"]) == 4


def test_cut_responses_can_be_left_out():
    one = source(drop_cut=True)
    batches = [one.next(), one.next()]
    kept = [response(b, i) for b in batches for i in range(6)]
    assert sum(not new for new in kept) == round(12 * one.rounds[0]["cut"]) > 0
    assert all(new[-1] == STOP for new in kept if new)
    total, count, _ = grpo_loss(Objective())(make(), batches[0])
    assert math.isfinite(float(total.detach())) and int(count) == sum(bool(new) for new in kept[:6])


def test_the_seed_decides_what_is_written():
    same, again, other = (source(seed=seed).next()["tokens"] for seed in (5, 5, 6))
    assert torch.equal(same, again) and not torch.equal(same, other)
    assert not torch.equal(same, source(generation_batch=5).next()["tokens"])
    assert not torch.equal(same, source(temperature=0.3).next()["tokens"])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: RolloutSettings(prompts=0), "prompts=0"),
        (lambda: RolloutSettings(group_size=1), "group_size=1: give at least 2"),
        (lambda: RolloutSettings(max_new_tokens=0), "max_new_tokens=0"),
        (lambda: RolloutSettings(epochs=0), "epochs=0"),
        (lambda: RolloutSettings(micro_batch=0), "micro_batch=0"),
        (lambda: RolloutSettings(generation_batch=0), "generation_batch=0"),
        (lambda: RolloutSettings(chunk_size=0), "chunk_size=0"),
        (lambda: RolloutSettings(temperature=0), "temperature=0: greedy"),
        (lambda: RolloutSettings(temperature=math.nan), "temperature=nan"),
        (lambda: RolloutSettings(micro_batch=100), "does not divide the 128 rows"),
        (
            lambda: GRPOSettings(fit=FitSettings(steps=1, micro_steps=2)),
            "a round has 1 micro-batches, a step 2",
        ),
        (lambda: source(micro_steps=4), "a round has 2 micro-batches, a step 4"),
        (lambda: source(list_of_prompts=PROMPTS[:2]), "2 prompts for rounds of 3"),
        (lambda: source(world_size=3), "6 prompts for rounds of 9"),
        (lambda: source(list_of_prompts=[[1], [], [2]]), "prompt 1 has 0 tokens"),
        (lambda: source(list_of_prompts=[[1]] * 3 + [[1] * CONTEXT]), "prompt 3 has 16 tokens"),
        (lambda: (lambda m: source(m, reference=m))(make()), "the policy itself"),
        (lambda: source(scorer=lambda n, t: [math.nan] * 12).next(), "reward nan"),
        (lambda: source(scorer=lambda n, t: [1.0]).next(), "1 rewards for 12"),
    ],
)
def test_refusals(call: Any, words: str):
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_prompt_that_leaves_little_room_is_cut_at_the_context():
    one = source(list_of_prompts=[[1] * (CONTEXT - 2)] * 3)
    batch = one.next()
    assert batch["tokens"].shape[1] <= CONTEXT - 1
    assert all(1 <= len(response(batch, i)) <= 2 for i in range(6))


def test_the_model_keeps_its_mode_and_presets_are_whole():
    model = make().train()
    source(model).next()
    assert model.training
    for preset in (module.cpu, module.gpu):
        assert preset().rollouts.micro_batches % preset().fit.micro_steps == 0
    assert module.cpu(objective=Objective(clip_low=0.1)).objective.clip_low == 0.1
