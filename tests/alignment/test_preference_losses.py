"""The DPO family: by hand, invariants that tie each loss to DPO, equality with TRL's losses and gradients."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from llmcourse.alignment.preference_losses import (
    dpo_loss,
    ipo_loss,
    kto_loss,
    kto_reference_point,
    log_odds,
    log_ratio_margin,
    odds_ratio_loss,
    orpo_loss,
    preference_metrics,
    simpo_loss,
)

B = 5
TOLERANCE = 1e-6


def four(seed: int = 0, requires_grad: bool = True) -> list[Tensor]:
    """Log-probabilities of B responses of about 10 tokens: chosen, rejected, and both under the reference."""
    generator = torch.Generator().manual_seed(seed)
    return [(-20 + 4 * torch.randn(B, generator=generator)).requires_grad_(requires_grad) for _ in range(4)]


def gradients(losses: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(losses.mean(), inputs))


# By hand ------------------------------------------------------------------------------------------------------


def test_dpo_by_hand_rafailov_2023_eq_7():
    # log-ratios -10 - (-11) = 1 and -9 - (-8) = -1, so h = 2; with beta 0.5 the logit is 1:
    # loss = ln(1 + e^-1) = 0.313262; its derivative in the chosen ln pi is -beta sigmoid(-1) = -0.5 x 0.268941
    logs = [torch.tensor([value], requires_grad=True) for value in (-10.0, -9.0, -11.0, -8.0)]
    assert log_ratio_margin(*logs).item() == 2
    loss = dpo_loss(*logs, beta=0.5)
    assert loss.item() == pytest.approx(0.313262, abs=1e-6)
    found = [gradient.item() for gradient in gradients(loss, logs)]
    assert found == pytest.approx([-0.134471, 0.134471, 0.134471, -0.134471], abs=1e-6)


def test_cdpo_by_hand_mitchell_2023_eq_3():
    # logit 1 again: 0.9 x 0.313262 + 0.1 x (0.313262 + 1) = 0.413262
    logs = [torch.tensor([value]) for value in (-10.0, -9.0, -11.0, -8.0)]
    assert dpo_loss(*logs, beta=0.5, label_smoothing=0.1).item() == pytest.approx(0.413262, abs=1e-6)


def test_ipo_by_hand_azar_2023_eq_17():
    # h = 2 and 1 / (2 x 0.1) = 5: (2 - 5)^2 = 9, derivative 2 (2 - 5) = -6
    logs = [torch.tensor([value], requires_grad=True) for value in (-10.0, -9.0, -11.0, -8.0)]
    loss = ipo_loss(*logs, beta=0.1)
    assert loss.item() == pytest.approx(9)
    assert [g.item() for g in gradients(loss, logs)] == pytest.approx([-6, 6, 6, -6])


def test_kto_by_hand_ethayarajh_2024_eq_7():
    # mismatched log-ratios 3 and 1: z = 2. Log-ratios 4 and 1 with beta 1 are 2 and -1 away from z:
    # desirable 1 x (1 - sigmoid(2)) = 0.119203, undesirable 3 x (1 - sigmoid(1)) = 3 x 0.268941
    z = kto_reference_point(torch.tensor([-1.0, -2.0]), torch.tensor([-4.0, -3.0]))
    assert z.item() == 2
    losses = kto_loss(
        torch.tensor([-6.0, -9.0]),
        torch.tensor([-10.0, -10.0]),
        torch.tensor([True, False]),
        z,
        beta=1.0,
        undesirable_weight=3.0,
    )
    assert losses.tolist() == pytest.approx([0.119203, 0.806824], abs=1e-6)


def test_simpo_by_hand_meng_2024_eq_6():
    # 2 (-0.5 + 1.5) - 1 = 1: ln(1 + e^-1)
    loss = simpo_loss(torch.tensor([-0.5]), torch.tensor([-1.5]), beta=2.0, gamma=1.0)
    assert loss.item() == pytest.approx(0.313262, abs=1e-6)


def test_orpo_by_hand_hong_2024_eq_3_to_7():
    # p = 3/4 has odds 3, p = 1/2 has odds 1: log-odds ratio ln 3, sigmoid(ln 3) = 3/4, loss -ln 3/4
    chosen, rejected = torch.tensor([math.log(0.75)]), torch.tensor([math.log(0.5)])
    assert log_odds(chosen).item() == pytest.approx(math.log(3), abs=1e-6)
    assert odds_ratio_loss(chosen, rejected).item() == pytest.approx(-math.log(0.75), abs=1e-6)
    expected = -math.log(0.75) - 0.2 * math.log(0.75)
    assert orpo_loss(chosen, rejected, beta=0.2).item() == pytest.approx(expected, abs=1e-6)


# Each is a difference from DPO --------------------------------------------------------------------------------


def test_policy_equal_to_the_reference_gives_ln_2():
    chosen, rejected, *_ = four()
    for beta in (0.01, 1.0, 30.0):
        losses = dpo_loss(chosen, rejected, chosen, rejected, beta=beta, label_smoothing=0.2)
        assert torch.allclose(losses, torch.full((B,), math.log(2)))


def test_cdpo_has_its_minimum_where_the_label_noise_says():
    h = torch.linspace(-40, 80, 12_001)
    zeros = torch.zeros_like(h)
    best = h[dpo_loss(h, zeros, zeros, zeros, beta=0.1, label_smoothing=0.1).argmin()]
    assert best.item() == pytest.approx(math.log(9) / 0.1, abs=0.02)
    plain = dpo_loss(h, zeros, zeros, zeros, beta=0.1)
    assert plain.argmin() == len(h) - 1  # DPO has none


def test_ipo_has_its_minimum_at_a_finite_margin():
    h = torch.linspace(-10, 20, 3001)
    zeros = torch.zeros_like(h)
    assert h[ipo_loss(h, zeros, zeros, zeros, beta=0.1).argmin()].item() == pytest.approx(5.0, abs=1e-3)


def test_simpo_without_margin_is_dpo_with_a_uniform_reference():
    chosen, rejected, *_ = four()
    same = torch.full((B,), -7.0)
    found = simpo_loss(chosen, rejected, beta=0.3, gamma=0.0)
    assert torch.allclose(found, dpo_loss(chosen, rejected, same, same, beta=0.3), atol=TOLERANCE)


def test_odds_ratio_loss_is_dpo_of_log_odds():
    chosen, rejected = -torch.rand(B) - 0.01, -torch.rand(B) - 0.01
    zeros = torch.zeros(B)
    expected = dpo_loss(log_odds(chosen), log_odds(rejected), zeros, zeros, beta=1.0)
    assert torch.allclose(odds_ratio_loss(chosen, rejected), expected)


def test_a_hopeless_example_moves_dpo_but_not_kto():
    log_probs = [torch.tensor([value], requires_grad=True) for value in (-200.0, 0.0)]
    zeros = torch.zeros(1)
    dpo = gradients(dpo_loss(*log_probs, zeros, zeros, beta=0.1), log_probs)[0]
    desirable = torch.tensor([True])
    kto = gradients(kto_loss(log_probs[0], zeros, desirable, torch.tensor(0.0), beta=0.1), log_probs[:1])[0]
    assert dpo.item() == pytest.approx(-0.1, abs=1e-6)
    assert abs(kto.item()) < 1e-9


def test_kto_reference_point_has_no_gradient_and_no_negative_value():
    log_probs = torch.tensor([-5.0, -7.0], requires_grad=True)
    point = kto_reference_point(log_probs, torch.tensor([-4.0, -4.0]))
    assert point.item() == 0 and not point.requires_grad
    assert not kto_reference_point(log_probs, torch.tensor([-9.0, -9.0])).requires_grad


def test_shifting_both_references_alike_changes_only_kto():
    chosen, rejected, chosen_ref, rejected_ref = four(requires_grad=False)
    moved = (chosen, rejected, chosen_ref + 3, rejected_ref + 3)
    for loss in (dpo_loss, ipo_loss):
        assert torch.allclose(loss(*moved), loss(chosen, rejected, chosen_ref, rejected_ref), atol=1e-3)
    desirable, point = torch.ones(B, dtype=torch.bool), torch.tensor(0.5)
    assert not torch.allclose(
        kto_loss(chosen, chosen_ref + 3, desirable, point), kto_loss(chosen, chosen_ref, desirable, point)
    )


def test_every_option_changes_the_loss():
    logs = four(requires_grad=False)
    means = [value / 10 for value in logs[:2]]
    desirable = torch.tensor([True, False, True, False, True])
    variants: list[tuple[Any, tuple[Any, ...], dict[str, float], dict[str, float]]] = [
        (dpo_loss, tuple(logs), {}, {"beta": 0.2}),
        (dpo_loss, tuple(logs), {}, {"label_smoothing": 0.1}),
        (ipo_loss, tuple(logs), {}, {"beta": 0.2}),
        (simpo_loss, tuple(means), {}, {"beta": 3.0}),
        (simpo_loss, tuple(means), {}, {"gamma": 0.5}),
        (orpo_loss, tuple(means), {}, {"beta": 0.3}),
    ]
    for name in ("beta", "desirable_weight", "undesirable_weight"):
        arguments = (logs[0], logs[2], desirable, torch.tensor(0.3))
        variants.append((kto_loss, arguments, {}, {name: 0.7}))
    for loss, arguments, before, after in variants:
        assert not torch.allclose(loss(*arguments, **before), loss(*arguments, **after)), (loss, after)


def test_certain_responses_have_finite_odds():
    certain = torch.tensor([0.0, -1e-12, -30.0], requires_grad=True)
    odds = log_odds(certain)
    assert odds.tolist() == pytest.approx([math.log(1e7)] * 2 + [-30.0], rel=1e-4)
    (gradient,) = torch.autograd.grad(odds.sum(), certain)
    assert gradient.isfinite().all() and gradient[0] == 0


def test_metrics_by_hand():
    found = preference_metrics(torch.tensor([2.0, 0.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 1.0, 0.0]))
    assert {name: value.item() for name, value in found.items()} == {
        "chosen_reward": 1.0,
        "rejected_reward": 0.75,
        "margin": 0.25,
        "accuracy": 0.625,  # right, wrong, a tie, right
    }


def test_errors():
    logs = four()
    point, desirable = torch.tensor(0.0), torch.ones(B, dtype=torch.bool)
    for beta in (0.0, -1.0, math.nan, math.inf):
        for call in (
            lambda b: dpo_loss(*logs, beta=b),
            lambda b: ipo_loss(*logs, beta=b),
            lambda b: kto_loss(logs[0], logs[2], desirable, point, beta=b),
            lambda b: simpo_loss(*logs[:2], beta=b),
        ):
            with pytest.raises(ValueError, match="beta="):
                call(beta)
    with pytest.raises(ValueError, match=r"beta=-0.1"):
        orpo_loss(*logs[:2], beta=-0.1)
    with pytest.raises(ValueError, match=r"gamma=-1"):
        simpo_loss(*logs[:2], gamma=-1.0)
    for share in (0.5, -0.1):
        with pytest.raises(ValueError, match="label_smoothing="):
            dpo_loss(*logs, label_smoothing=share)
    for name in ("desirable_weight", "undesirable_weight"):
        with pytest.raises(ValueError, match=f"^{name}="):
            kto_loss(logs[0], logs[2], desirable, point, **{name: -1.0})


# Equality with TRL --------------------------------------------------------------------------------------------
# The trainers' own loss methods run on a stand-in for `self` with the attributes that they read, and on a stand-in for
# the model that returns given log-probabilities: so TRL's code is what is compared, not a copy of its formula.

LENGTHS = torch.tensor([3, 4, 2, 4, 1, 2, 4, 3, 1, 4])  # of B chosen and B rejected responses
N_PROMPT, T = 2, 6


def per_token(seed: int) -> Tensor:
    """ln p of each response token (2B, T - 1), 0 outside the responses; the chosen rows first."""
    generator = torch.Generator().manual_seed(seed)
    values = -2 * torch.rand(2 * B, T - 1, generator=generator)
    return values * completion_mask()[:, 1:]


def completion_mask() -> Tensor:
    places = torch.arange(T)
    return ((places >= N_PROMPT) & (places < N_PROMPT + LENGTHS[:, None])).long()


def trl_accelerator() -> SimpleNamespace:
    def same(value: Tensor) -> Tensor:
        return value

    return SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same)


def trl_trainer(**attributes: Any) -> SimpleNamespace:
    from collections import defaultdict

    shared = {
        "accelerator": trl_accelerator(),
        "model": SimpleNamespace(training=True),
        "aux_loss_enabled": False,
        "precompute_ref_logps": True,
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    return SimpleNamespace(**(shared | attributes))


def trl_outputs(log_probs: Tensor) -> SimpleNamespace:
    filler = torch.zeros_like(log_probs).detach()
    return SimpleNamespace(log_probs=log_probs, entropy=filler, mean_logits=filler, is_top1=filler.bool())


def trl_dpo(log_probs: Tensor, ref_log_probs: Tensor, **attributes: Any) -> Tensor:
    """The loss of TRL's `DPOTrainer` on given per-token log-probabilities (2B, T - 1)."""
    from trl.trainer.dpo_trainer import DPOTrainer

    defaults = {
        "ld_alpha": None,
        "f_divergence_type": "reverse_kl",
        "loss_weights": [1.0],
        "label_smoothing": 0.0,
        "use_weighting": False,
    }
    chosen_ref, rejected_ref = ref_log_probs.sum(dim=1).chunk(2)
    inputs = {
        "input_ids": torch.zeros(len(log_probs), T, dtype=torch.long),
        "attention_mask": torch.ones(len(log_probs), T, dtype=torch.long),
        "completion_mask": completion_mask()[: len(log_probs)],
        "ref_chosen_logps": chosen_ref,
        "ref_rejected_logps": rejected_ref,
    }
    trainer = trl_trainer(**(defaults | attributes))
    return DPOTrainer._compute_loss(trainer, lambda **_: trl_outputs(log_probs), inputs, return_outputs=False)


def check_equal(ours: Tensor, theirs: Tensor, inputs: Tensor | list[Tensor]) -> None:
    inputs = [inputs] if isinstance(inputs, Tensor) else inputs
    assert ours.item() == pytest.approx(theirs.item(), abs=TOLERANCE)
    pairs = zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True)
    for found, expected in pairs:
        assert expected.abs().max() > 1e-4
        assert torch.allclose(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_dpo_equals_trl_rafailov_2023_eq_7(beta):
    log_probs, ref = per_token(1).requires_grad_(), per_token(2)
    ours = dpo_loss(*log_probs.sum(1).chunk(2), *ref.sum(1).chunk(2), beta=beta).mean()
    check_equal(ours, trl_dpo(log_probs, ref, loss_types=["sigmoid"], beta=beta), log_probs)


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_ipo_per_token_equals_trl_azar_2023_eq_17(beta):
    log_probs, ref = per_token(3).requires_grad_(), per_token(4)
    means = [(value.sum(1) / LENGTHS).chunk(2) for value in (log_probs, ref)]
    ours = ipo_loss(*means[0], *means[1], beta=beta).mean()
    check_equal(ours, trl_dpo(log_probs, ref, loss_types=["ipo"], beta=beta), log_probs)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_cdpo_equals_trl_mitchell_2023_eq_3(label_smoothing):
    # TRL 1.16 has cDPO's formula in its AOT loss, which sorts log-ratios over the batch: with one pair it sorts nothing
    log_probs, ref = per_token(5)[[0, B]].requires_grad_(), per_token(6)[[0, B]]
    ours = dpo_loss(
        *log_probs.sum(1).chunk(2), *ref.sum(1).chunk(2), beta=0.3, label_smoothing=label_smoothing
    ).mean()
    theirs = trl_dpo(log_probs, ref, loss_types=["aot"], beta=0.3, label_smoothing=label_smoothing)
    check_equal(ours, theirs, log_probs)


def test_kto_equals_trl_ethayarajh_2024_eq_7():
    from trl.trainer.kto_trainer import KTOTrainer

    log_probs, ref = per_token(7).requires_grad_(), per_token(8)
    kl_log_probs, kl_ref = per_token(9) / 2, per_token(10)
    desirable = torch.tensor([True, False] * B)
    trainer = trl_trainer(
        calculate_KL=True, loss_type="kto", beta=0.3, desirable_weight=1.3, undesirable_weight=0.8
    )
    trainer._compute_kl_logps = lambda *_: kl_log_probs.sum(1)
    inputs = {
        "input_ids": torch.zeros(2 * B, T, dtype=torch.long),
        "attention_mask": torch.ones(2 * B, T, dtype=torch.long),
        "completion_mask": completion_mask(),
        "label": desirable,
        "ref_logps": ref.sum(1),
        "ref_KL_logps": kl_ref.sum(1),
    }
    theirs = KTOTrainer._compute_loss(trainer, lambda **_: trl_outputs(log_probs), inputs, False)
    point = kto_reference_point(kl_log_probs.sum(1), kl_ref.sum(1))
    assert point > 0 and trainer._metrics["train"]["kl"] == [pytest.approx(point.item(), abs=TOLERANCE)]
    ours = kto_loss(
        log_probs.sum(1),
        ref.sum(1),
        desirable,
        point,
        beta=0.3,
        desirable_weight=1.3,
        undesirable_weight=0.8,
    ).mean()
    check_equal(ours, theirs, log_probs)


def test_simpo_equals_trl_meng_2024_eq_6():
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    means = [value.detach().div(10).requires_grad_() for value in four(11)[:2]]
    trainer = trl_trainer(alpha=0.0, loss_type="simpo", simpo_gamma=0.8, beta=2.5, label_smoothing=0.0)
    theirs, chosen_rewards, rejected_rewards = CPOTrainer.cpo_loss(trainer, *means)
    check_equal(simpo_loss(*means, beta=2.5, gamma=0.8).mean(), theirs.mean(), means)
    metrics = preference_metrics(2.5 * means[0], 2.5 * means[1])
    assert metrics["margin"].item() == pytest.approx((chosen_rewards - rejected_rewards).mean().item())


def test_orpo_equals_trl_hong_2024_eq_6():
    # TRL's SFT term covers the prompt too, and averages over all tokens of the batch; ours covers the response and
    # averages over responses. With one pair and a prompt of one token, which nothing predicts, the two agree.
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    logits = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(12)).requires_grad_()
    ids = torch.tensor([[1, 5, 3, 2, 0], [1, 7, 4, 9, 2]])
    lengths = torch.tensor([4, 5])
    labels = torch.where(torch.arange(5) < lengths[:, None], ids, -100)
    labels[:, 0] = -100
    batch: dict[str, Tensor] = {}
    for row, name in enumerate(("chosen", "rejected")):
        batch |= {
            f"{name}_input_ids": ids[row : row + 1],
            f"{name}_attention_mask": (torch.arange(5) < lengths[row]).long()[None],
            f"{name}_labels": labels[row : row + 1],
        }
    trainer = trl_trainer(is_encoder_decoder=False, padding_value=0, beta=0.4)
    for name in ("concatenated_inputs", "get_batch_logps"):
        setattr(trainer, name, getattr(ORPOTrainer, name))
    trainer.concatenated_forward = lambda *a: ORPOTrainer.concatenated_forward(trainer, *a)
    trainer.odds_ratio_loss = lambda *a: ORPOTrainer.odds_ratio_loss(trainer, *a)
    theirs, metrics = ORPOTrainer.get_batch_loss_metrics(
        trainer, lambda *_, **__: SimpleNamespace(logits=logits), batch
    )
    token = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0] * (labels[:, 1:] != -100)
    means = (token.sum(1) / (lengths - 1)).chunk(2)
    check_equal(orpo_loss(*means, beta=0.4).mean(), theirs, logits)
    assert metrics["log_odds_chosen"] == pytest.approx(
        (log_odds(means[0]) - log_odds(means[1])).item(), abs=TOLERANCE
    )
