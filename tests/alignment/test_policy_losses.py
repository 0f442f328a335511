"""Policy losses: by hand, by exact expectation, by invariance, and against TRL's GRPOTrainer on the same rollouts."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmcourse.alignment import policy_losses as module
from llmcourse.alignment.policy_losses import (
    Objective,
    clipped_surrogate,
    constant_groups,
    group_advantages,
    is_clipped,
    kl_estimate,
    log_ratios,
    policy_loss,
    sum_and_count,
)

B, T = 6, 7


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Rollouts of unequal lengths, with ratios on both sides of every clip."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([7, 1, 4, 3, 6, 2])
    noise = [0.3 * torch.randn(B, T, generator=generator) for _ in range(3)]
    base = -2 - torch.rand(B, T, generator=generator)
    return {
        "log_probs": base + noise[0],
        "old_log_probs": base + noise[1],
        "ref_log_probs": base + noise[2],
        "advantages": torch.tensor([1.2, -0.7, 0.4, -1.5, 0.9, -0.3]),
        "mask": torch.arange(T)[None] < lengths[:, None],
    }


def mean_loss(batch: dict[str, Tensor], objective: Objective) -> Tensor:
    total, count, _ = policy_loss(**batch, objective=objective)
    return total / count


def test_advantages_by_hand_shao_2024_section_4_1_2():
    # groups (1, 0, 0, 1): mean 1/2, sample deviation sqrt(4 (1/4) / 3) = 1/sqrt 3; (3, 1): mean 2, deviation sqrt 2
    rewards = torch.tensor([1.0, 0, 0, 1])
    one = 0.5 / (1 / math.sqrt(3) + 1e-4)
    assert group_advantages(rewards, 4).tolist() == pytest.approx([one, -one, -one, one], abs=1e-6)
    assert group_advantages(torch.tensor([3.0, 1]), 2, epsilon=0).tolist() == pytest.approx(
        [2**-0.5, -(2**-0.5)]
    )
    assert group_advantages(rewards, 4, scale="none").tolist() == [0.5, -0.5, -0.5, 0.5]
    assert group_advantages(rewards, 2, scale="none").tolist() == [0.5, -0.5, -0.5, 0.5]
    batch = group_advantages(torch.tensor([1.0, 0, 5, 1]), 2, scale="batch")
    assert batch.tolist() == pytest.approx([x / (2.217356 + 1e-4) for x in (0.5, -0.5, 2, -2)], rel=1e-5)


def test_advantages_without_scale_are_rloo_up_to_a_factor():
    rewards = torch.rand(12, generator=torch.Generator().manual_seed(0))
    groups = rewards.view(3, 4)
    leave_one_out = groups - (groups.sum(1, keepdim=True) - groups) / 3
    own = group_advantages(rewards, 4, scale="none").view(3, 4)
    torch.testing.assert_close(own, leave_one_out * 3 / 4)


@pytest.mark.parametrize("scale", module.SCALES)
def test_a_constant_group_has_advantage_exactly_zero(scale: str):
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.1, 0.7])
    advantages = group_advantages(rewards, 3, scale=scale)
    assert advantages[:3].tolist() == [0, 0, 0] and advantages[3:].abs().min() > 0.01
    assert constant_groups(rewards.view(2, 3)).tolist() == [True, False]


def test_advantages_do_not_change_with_shift_and_scale_of_the_rewards():
    rewards = torch.rand(8, generator=torch.Generator().manual_seed(1))
    own = group_advantages(rewards, 4, epsilon=0)
    torch.testing.assert_close(own, group_advantages(100 + 50 * rewards, 4, epsilon=0), rtol=1e-4, atol=1e-5)


def test_clipped_surrogate_by_hand_schulman_2017_eq_7():
    ratios = torch.tensor([0.5, 0.5, 0.9, 1.5, 1.5])
    advantages = torch.tensor([2.0, -2, 2, 2, -2])
    # min(r A, clip(r) A): a gain is bounded (0.8 and 1.2), a loss is not
    expected = torch.tensor([-1.0, 1.6, -1.8, -2.4, 3.0])
    log_ratio = ratios.log().requires_grad_()
    loss = clipped_surrogate(log_ratio, advantages)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss.sum(), log_ratio)
    # d(-r A) / d ln r = -r A where not clipped
    torch.testing.assert_close(gradient, torch.tensor([-1.0, 0, -1.8, 0, 3.0]))
    assert is_clipped(log_ratio, advantages).tolist() == [False, True, False, True, False]


def test_clip_higher_yu_2025_eq_8_moves_the_upper_bound_alone():
    log_ratio = torch.tensor([1.25, 0.75]).log()
    up, down = torch.tensor([1.0, 1.0]), torch.tensor([-1.0, -1.0])
    assert clipped_surrogate(log_ratio, up, clip_high=0.28).tolist() == pytest.approx([-1.25, -0.75])
    assert clipped_surrogate(log_ratio, up, clip_high=0.2).tolist() == pytest.approx([-1.2, -0.75])
    assert clipped_surrogate(log_ratio, down, clip_high=0.28).tolist() == pytest.approx([1.25, 0.8])
    assert clipped_surrogate(log_ratio, down, clip_low=0.3).tolist() == pytest.approx([1.25, 0.75])


def test_ppo_is_the_case_with_an_advantage_for_each_token(batch: dict[str, Tensor]):
    per_token = torch.randn(B, T, generator=torch.Generator().manual_seed(5))
    objective = Objective(average="token")
    ratio = (batch["log_probs"] - batch["old_log_probs"]).exp()
    values = -torch.min(ratio * per_token, ratio.clamp(0.8, 1.2) * per_token)
    own = mean_loss(batch | {"advantages": per_token}, objective)
    torch.testing.assert_close(own, values[batch["mask"]].mean())
    # and the same number at every token is GRPO's
    spread = batch["advantages"][:, None].expand(B, T)
    torch.testing.assert_close(
        mean_loss(batch | {"advantages": spread}, objective), mean_loss(batch, objective)
    )


def test_sequence_ratio_zheng_2025_eq_7_is_the_geometric_mean(batch: dict[str, Tensor]):
    own = log_ratios(batch["log_probs"], batch["old_log_probs"], batch["mask"].float(), "sequence").exp()
    for i in range(B):
        length = int(batch["mask"][i].sum())
        ratios = (batch["log_probs"] - batch["old_log_probs"])[i, :length].exp()
        assert float(own[i, 0]) == pytest.approx(float(ratios.prod()) ** (1 / length), rel=1e-5)


def test_k_estimators_by_hand_schulman_2020():
    p, q = torch.tensor(0.5).log(), torch.tensor(0.25).log()
    assert float(kl_estimate(p, q, "k1")) == pytest.approx(math.log(2))
    assert float(kl_estimate(p, q, "k2")) == pytest.approx(math.log(2) ** 2 / 2)
    assert float(kl_estimate(p, q, "k3")) == pytest.approx(0.5 - 1 + math.log(2))  # Shao et al. (2024), eq. 4


def exact(estimator: str, corrected: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Expected value and expected gradient of an estimator under the policy, with its logits and the reference."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, generator=generator, dtype=torch.float64).requires_grad_()
    reference = torch.randn(9, generator=generator, dtype=torch.float64).log_softmax(0)
    log_probs = logits.log_softmax(0)
    values = kl_estimate(log_probs, reference, estimator)
    weights = log_probs.exp()
    if not corrected:
        weights = weights.detach()  # the samples do not move when the loss is differentiated
    (gradient,) = torch.autograd.grad((weights * values).sum(), logits)
    return (weights * values).sum().detach(), gradient, logits, reference


def test_expected_values_of_the_kl_estimators():
    k1, _, logits, reference = exact("k1")
    log_probs = logits.log_softmax(0)
    truth = (log_probs.exp() * (log_probs - reference)).sum().detach()
    torch.testing.assert_close(k1, truth)
    torch.testing.assert_close(exact("k3")[0], truth)
    assert abs(float(exact("k2")[0] - truth)) > 0.01  # biased


def test_expected_gradients_of_the_kl_estimators_tang_munos_2025():
    _, _, logits, reference = exact("k1")
    log_probs = logits.log_softmax(0)
    reverse = (log_probs.exp() * (log_probs - reference)).sum()
    forward = (reference.exp() * (reference - log_probs)).sum()
    torch.testing.assert_close(exact("k1")[1], torch.zeros(9, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(exact("k2")[1], torch.autograd.grad(reverse, logits, retain_graph=True)[0])
    torch.testing.assert_close(exact("k3")[1], torch.autograd.grad(forward, logits, retain_graph=True)[0])
    for estimator in ("k1", "k3"):  # old policy times ratio is the policy, now with its gradient
        corrected = exact(estimator, corrected=True)[1]
        torch.testing.assert_close(corrected, torch.autograd.grad(reverse, logits, retain_graph=True)[0])


def test_averages_by_hand():
    values = torch.tensor([[1.0, 2, 3], [5, 100, 100]])
    mask = torch.tensor([[1.0, 1, 1], [1, 0, 0]])
    assert [float(x) for x in sum_and_count(values, mask, "sequence")] == [2 + 5, 2]
    assert [float(x) for x in sum_and_count(values, mask, "token")] == [6 + 5, 4]
    assert [float(x) for x in sum_and_count(values, mask, "constant", 10)] == [6 + 5, 20]
    # one value a sequence stands for each of its tokens
    single = torch.tensor([[2.0], [5.0]])
    assert [float(x) for x in sum_and_count(single, mask, "token")] == [3 * 2 + 5, 4]


@pytest.mark.parametrize("average", module.AVERAGES)
def test_micro_batches_add_up_to_the_whole_batch(batch: dict[str, Tensor], average: str):
    objective = Objective(average=average, max_length=9, kl_weight=0.1)
    whole = policy_loss(**batch, objective=objective)
    parts = [
        policy_loss(**{k: v[rows] for k, v in batch.items()}, objective=objective)
        for rows in (slice(0, 2), slice(2, 6))
    ]
    torch.testing.assert_close(whole[0], parts[0][0] + parts[1][0])
    assert float(whole[1]) == float(parts[0][1] + parts[1][1])


@pytest.mark.parametrize("name", ["log_probs", "old_log_probs", "ref_log_probs"])
def test_what_stands_outside_the_mask_changes_nothing(batch: dict[str, Tensor], name: str):
    objective = Objective(kl_weight=0.1)
    other = batch | {name: batch[name].masked_fill(~batch["mask"], -90.0)}
    for a, b in zip(
        policy_loss(**batch, objective=objective), policy_loss(**other, objective=objective), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_without_old_log_probs_the_gradient_is_the_policy_gradient(batch: dict[str, Tensor]):
    del batch["old_log_probs"], batch["ref_log_probs"]
    batch["log_probs"].requires_grad_()
    total, count, _ = policy_loss(**batch, objective=Objective(average="token"))
    (gradient,) = torch.autograd.grad(total / count, batch["log_probs"])
    expected = -batch["advantages"][:, None] * batch["mask"] / batch["mask"].sum()
    torch.testing.assert_close(gradient, expected)


def test_on_policy_the_sequence_ratio_weighs_every_sequence_alike(batch: dict[str, Tensor]):
    """GSPO's gradient at ratio 1 is GRPO's with the mean by sequence (Zheng et al., 2025, section 4.2)."""
    batch["old_log_probs"] = batch["log_probs"].clone()
    batch["log_probs"].requires_grad_()
    gradients = [
        torch.autograd.grad(mean_loss(batch, objective), batch["log_probs"])[0]
        for objective in (module.gspo(), module.grpo(kl_weight=0))
    ]
    torch.testing.assert_close(*gradients)


def test_every_option_changes_the_loss(batch: dict[str, Tensor]):
    base = Objective(kl_weight=0.1)
    changes: list[dict[str, Any]] = [
        {"ratio": "sequence"},
        {"clip_low": 0.05},
        {"clip_high": 0.05},
        {"average": "token"},
        {"average": "constant"},
        {"average": "constant", "max_length": 4},
        {"kl_weight": 0.2},
        {"kl_estimator": "k1"},
        {"kl_estimator": "k2"},
        {"kl_corrected": True},
    ]
    losses = [float(mean_loss(batch, dataclasses.replace(base, **change))) for change in [{}, *changes]]
    assert len({round(loss, 6) for loss in losses}) == len(losses)


def test_named_objectives():
    assert module.grpo() == Objective(kl_weight=0.04)
    assert module.dapo() == Objective(clip_high=0.28, average="token")
    assert module.dr_grpo(max_length=5) == Objective(scale="none", average="constant", max_length=5)
    assert module.gspo() == Objective(ratio="sequence", clip_low=3e-4, clip_high=4e-4)


def test_metrics_by_hand():
    log_probs = torch.tensor([[math.log(0.5), math.log(0.25)], [math.log(0.5), 0.0]])
    old = torch.tensor([[math.log(0.25), math.log(0.25)], [math.log(0.5), 0.0]])
    mask = torch.tensor([[True, True], [True, False]])
    _, _, metrics = policy_loss(
        log_probs, torch.tensor([1.0, 1]), mask, Objective(), old_log_probs=old, ref_log_probs=old
    )
    assert float(metrics["clipped"]) == pytest.approx(1 / 3)  # one of three tokens has ratio 2
    assert float(metrics["surprisal"]) == pytest.approx(math.log(2 * 4 * 2) / 3)
    assert float(metrics["kl"]) == pytest.approx((0.5 - 1 + math.log(2)) / 3)


def test_a_response_without_tokens_counts_for_nothing():
    total, count = sum_and_count(torch.ones(2, 3), torch.tensor([[1.0, 1, 0], [0, 0, 0]]))
    assert (float(total), float(count)) == (1, 1)
    empty = policy_loss(torch.zeros(2, 3), torch.ones(2), torch.zeros(2, 3), Objective(average="token"))
    assert (float(empty[0]), float(empty[1])) == (0, 0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Objective(scale="std"), "scale='std': choose one of group"),
        (lambda: Objective(ratio="word"), "ratio='word'"),
        (lambda: Objective(average="mean"), "average='mean'"),
        (lambda: Objective(kl_estimator="k4"), "kl_estimator='k4'"),
        (lambda: Objective(clip_low=1.5), "clip_low=1.5"),
        (lambda: Objective(clip_high=-0.1), "clip_high=-0.1"),
        (lambda: Objective(kl_weight=math.nan), "kl_weight=nan"),
        (lambda: Objective(max_length=0), "max_length=0"),
        (lambda: group_advantages(torch.ones(4), 4, scale="std"), "scale='std'"),
        (lambda: group_advantages(torch.ones(4), 1), "group_size=1"),
        (lambda: group_advantages(torch.ones(5), 2), r"shape \(5,\)"),
        (lambda: group_advantages(torch.ones(0), 2), r"shape \(0,\)"),
        (lambda: group_advantages(torch.tensor([1.0, math.nan]), 2), "reward 1 is not finite"),
        (lambda: kl_estimate(torch.ones(1), torch.ones(1), "k4"), "estimator='k4'"),
        (lambda: sum_and_count(torch.ones(1, 1), torch.ones(1, 1), "mean"), "average='mean'"),
        (
            lambda: policy_loss(torch.ones(1, 1), torch.ones(1), torch.ones(1, 1), Objective(kl_weight=1)),
            "needs ref_log_probs",
        ),
    ],
)
def test_refusals(call: Any, words: str):
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


VOCAB, TEMPERATURE = 32, 0.7
# TRL's loss_type and importance_sampling_level, with the objective that is the same
SAME_AS_TRL = [
    ("grpo", "token", Objective()),
    ("grpo", "token", Objective(clip_high=0.28, kl_weight=0.3)),
    ("bnpo", "token", Objective(average="token", kl_weight=0.04)),
    ("dapo", "token", Objective(average="token", clip_high=0.28)),
    ("dr_grpo", "token", Objective(average="constant", max_length=8)),
    ("dr_grpo", "token", Objective(average="constant", max_length=8, kl_weight=0.04)),
    ("luspo", "sequence", Objective(ratio="sequence", average="constant", max_length=1)),
    ("grpo", "sequence", Objective(ratio="sequence", clip_low=3e-4, clip_high=4e-4)),
    ("grpo", "sequence", Objective(ratio="sequence", clip_low=0.02, clip_high=0.03, kl_weight=0.04)),
    ("dapo", "token", Objective(average="token", kl_weight=0.3, kl_corrected=True)),
    ("grpo", "sequence", Objective(ratio="sequence", kl_weight=0.3, kl_corrected=True)),
]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """TRL's own trainer over our tiny model, saved and opened by `transformers`."""
    pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    from llmcourse.models.pretrained import save_pretrained

    folder: Path = tmp_path_factory.mktemp("grpo")
    save_pretrained(tiny_model(), folder / "model")
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t1"))
    return GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model"),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(
            output_dir=str(folder / "out"),
            use_cpu=True,
            bf16=False,
            report_to=[],
            num_generations=2,
            per_device_train_batch_size=2,
            temperature=TEMPERATURE,
            max_completion_length=8,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list([{"prompt": "t3"}] * 2),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t0", pad_token="t0"),
    )


def tiny_model() -> Any:
    from llmcourse.models.config import ModelConfig
    from llmcourse.models.transformer import Transformer

    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=VOCAB, context_length=16, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=24
    )
    return Transformer(config).eval()


@pytest.mark.slow  # the import of trl alone
@pytest.mark.parametrize(("loss_type", "level", "objective"), SAME_AS_TRL)
def test_loss_and_gradient_equal_those_of_trl(trainer: Any, loss_type: str, level: str, objective: Objective):
    """Same weights, rollouts, log-probs and advantages: TRL's compute_loss and ours, in evaluation mode's scale."""
    from llmcourse.alignment.grpo import grpo_loss
    from llmcourse.models.pretrained import state_to_hub

    generator = torch.Generator().manual_seed(2)
    prompts = torch.randint(1, VOCAB, (B, 3), generator=generator)
    responses = torch.randint(1, VOCAB, (B, T), generator=generator)
    mask = torch.arange(T)[None] < torch.tensor([7, 1, 4, 3, 6, 2])[:, None]
    advantages = torch.randn(B, generator=generator)
    tokens = torch.cat((prompts, responses), dim=1)[:, :-1]
    targets = torch.full(tokens.shape, -100)
    targets[:, 2:] = responses.masked_fill(~mask, -100)
    model = tiny_model()
    with torch.no_grad():
        from llmcourse.alignment.rollouts import sampled_log_probs

        here = sampled_log_probs(model, tokens, targets, TEMPERATURE)[:, 2:]  # (B, T)
    old, ref = (here + 0.3 * torch.randn(B, T, generator=generator) for _ in range(2))

    trainer.loss_type, trainer.importance_sampling_level = loss_type, level
    trainer.epsilon_low, trainer.epsilon_high = objective.clip_low, objective.clip_high
    trainer.beta, trainer.args.use_bias_correction_kl = objective.kl_weight, objective.kl_corrected
    trainer.model.eval().zero_grad()
    theirs = trainer.compute_loss(
        trainer.model,
        {
            "prompt_ids": prompts,
            "prompt_mask": torch.ones_like(prompts),
            "completion_ids": responses,
            "completion_mask": mask.long(),
            "advantages": advantages,
            "old_per_token_logps": old,
            "ref_per_token_logps": ref,
            "num_items_in_batch": mask.sum(),
        },
    )
    theirs.backward()

    before = torch.zeros(B, 2)
    batch = {
        "tokens": tokens,
        "targets": targets,
        "advantages": advantages,
        "rewards": advantages,
        "old_log_probs": torch.cat((before, old), dim=1),
        "ref_log_probs": torch.cat((before, ref), dim=1),
    }
    total, count, _ = grpo_loss(objective, TEMPERATURE)(model, batch)
    ours = total / count
    ours.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    for p in model.parameters():
        p.data, p.grad = p.grad, None  # to give the gradients the hub's names
    for name, value in state_to_hub(model).items():
        torch.testing.assert_close(value, trainer.model.get_parameter(name).grad, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("scale", module.SCALES)
def test_advantages_equal_the_formula_of_trl(scale: str):
    """TRL computes them amid generation, so its lines are repeated here with its own `nanstd`."""
    pytest.importorskip("trl")
    from trl.trainer.utils import nanstd

    rewards = torch.rand(12, generator=torch.Generator().manual_seed(0))
    mean = rewards.view(-1, 4).nanmean(dim=1).repeat_interleave(4)
    spread = nanstd(rewards.view(-1, 4), dim=1).repeat_interleave(4)
    theirs = rewards - mean
    if scale != "none":
        # TRL's "batch" takes the deviation of the rewards, group means included
        theirs = theirs / ((spread if scale == "group" else nanstd(rewards)) + 1e-4)
    torch.testing.assert_close(group_advantages(rewards, 4, scale=scale), theirs, rtol=1e-6, atol=1e-6)
