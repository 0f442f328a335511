"""DPO through the one loop: the loss on batches, equality with TRL on a model, training, resuming, settings."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmcourse.alignment import preference_losses as losses
from llmcourse.alignment.dpo import (
    BETAS,
    OPTIONS,
    PRESETS,
    DPOSettings,
    preference_evaluation,
    preference_loss,
    preset,
    train_dpo,
    with_changes,
    with_reference,
)
from llmcourse.alignment.reference import PAIR, ReferenceBatches
from llmcourse.alignment.shared_prompt import SharedPromptBatches
from llmcourse.data.packing import IGNORE
from llmcourse.data.preference import PreferenceBatches, PreferenceSet
from llmcourse.models.config import ModelConfig
from llmcourse.models.transformer import Transformer
from llmcourse.training.fit import FitSettings

V = 23
CONFIG = ModelConfig(
    vocab_size=V, context_length=16, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=24
)
END = 1


def pairs(n: int = 24, seed: int = 0) -> PreferenceSet:
    """The chosen answer begins with a token below 12, the rejected one with a token from 12 upwards."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(2, V, rng.integers(2, 6)) for _ in range(n)]

    def answers(low: int, high: int) -> list[np.ndarray]:
        return [
            np.array([rng.integers(low, high), *rng.integers(2, V, rng.integers(3)), END]) for _ in range(n)
        ]

    return PreferenceSet(prompts, answers(2, 12), answers(12, V), np.full(n, np.nan, np.float32), END, {})


def batches(n: int = 24, batch_size: int = 8, seed: int = 0) -> PreferenceBatches:
    return PreferenceBatches(pairs(n, seed), batch_size=batch_size, context_length=16, seed=0)


def settings(loss: str = "dpo", steps: int = 20, **options: Any) -> DPOSettings:
    fit = FitSettings(steps=steps, lr=1e-2, weight_decay=0.0, precision="fp32", compile="off")
    return DPOSettings(loss=loss, fit=fit, **options)


def new_model(seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(CONFIG)
    with torch.no_grad():
        model.embedding.weight.mul_(0.3)  # tied to the head: no token is hopeless
    return model


def stored(
    options: DPOSettings, reference: Transformer, n: int = 24, batch_size: int = 8
) -> ReferenceBatches:
    return with_reference(reference, batches(n, batch_size), options, progress=False)


def plain_log_probs(model: Transformer, batch: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Summed log-probabilities and lengths, from all logits."""
    targets = batch[f"{name}_targets"]
    log_p = model(batch[f"{name}_tokens"]).log_softmax(-1)
    mask = targets != IGNORE
    token = log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * mask
    return token.sum(-1), mask.sum(-1)


# The loss -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", OPTIONS)
def test_the_loss_is_the_pure_loss_of_the_batch(loss):
    policy, reference = new_model(0), new_model(1)
    options = settings(loss)
    batch = stored(options, reference).next()
    total, count, metrics = preference_loss(options)(policy, batch)
    (chosen, n), (rejected, m) = (plain_log_probs(policy, batch, name) for name in PAIR)
    beta = BETAS[loss]
    if loss in ("orpo", "simpo"):
        expected = getattr(losses, f"{loss}_loss")(chosen / n, rejected / m, beta=beta)
        rewards = beta * chosen / n, beta * rejected / m
    else:
        refs = [plain_log_probs(reference, batch, name)[0] for name in PAIR]
        rewards = beta * (chosen - refs[0]), beta * (rejected - refs[1])
        if loss == "dpo":
            expected = losses.dpo_loss(chosen, rejected, *refs, beta=beta)
        if loss == "ipo":
            expected = losses.ipo_loss(chosen / n, rejected / m, refs[0] / n, refs[1] / m, beta=beta)
        if loss == "kto":
            other = [plain_log_probs(model, batch, "mismatched")[0] for model in (policy, reference)]
            point = losses.kto_reference_point(*other)
            assert metrics["reference_point"].item() == pytest.approx(point.item(), abs=1e-5)
            desirable = torch.tensor([True] * 8 + [False] * 8)
            expected = losses.kto_loss(
                torch.cat((chosen, rejected)), torch.cat(refs), desirable, point, beta=beta
            )
    assert total.item() == pytest.approx(expected.sum().item(), rel=1e-5)
    assert int(count) == len(expected)
    margin = (rewards[0] - rewards[1]).mean().item()
    assert metrics["margin"].item() == pytest.approx(margin, abs=1e-5)
    assert metrics["chosen_log_prob"].item() == pytest.approx(chosen.mean().item(), abs=1e-4)


def test_the_first_step_is_at_ln_2():
    model = new_model()
    options = settings()
    total, count, metrics = preference_loss(options)(model, stored(options, model).next())
    assert total.item() / count == pytest.approx(math.log(2), abs=1e-5)
    assert metrics["margin"].item() == pytest.approx(0, abs=1e-5)


def test_a_batch_cut_in_two_has_the_same_sum():
    policy, options = new_model(0), settings()
    batch = stored(options, new_model(1)).next()
    whole, count, _ = preference_loss(options)(policy, batch)
    halves = [{name: value[part] for name, value in batch.items()} for part in (slice(3), slice(3, None))]
    parts = [preference_loss(options)(policy, half) for half in halves]
    assert sum(part[0] for part in parts).item() == pytest.approx(whole.item(), rel=1e-6)
    assert sum(part[1] for part in parts) == count


def test_chunks_change_nothing_but_memory():
    policy, options = new_model(0), settings()
    batch = stored(options, new_model(1)).next()
    found = []
    for chunk_size in (None, 5):
        total, _, _ = preference_loss(dataclasses.replace(options, chunk_size=chunk_size))(policy, batch)
        found.append([total, *torch.autograd.grad(total, list(policy.parameters()))])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("loss", OPTIONS)
def test_a_shared_prompt_gives_the_same_loss_and_gradients(loss):
    policy, found = new_model(0), []
    for share in (False, True):
        options = settings(loss, share_prompt=share)
        total, count, metrics = preference_loss(options)(policy, stored(options, new_model(1)).next())
        found.append([total, torch.tensor(count), *torch.autograd.grad(total, list(policy.parameters()))])
        found[-1] += metrics.values()
    assert all(torch.allclose(a, b, atol=2e-5) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(("precision", "shared"), [("fp32", True), ("bf16", False)])
def test_left_open_the_prompt_is_shared_in_float32(precision, shared):
    options = with_changes(settings(), precision=precision)
    assert options.share_prompt is None
    batch = stored(options, new_model(1)).next()
    assert ("shared_tokens" in batch) is shared
    assert torch.isfinite(preference_loss(options)(new_model(), batch)[0])


def test_shared_rows_by_hand():
    data = pairs(1)
    data.prompts[0], data.chosen[0], data.rejected[0] = (
        np.array([3, 4]),
        np.array([5, 6, 1]),
        np.array([7, 1]),
    )
    source = PreferenceBatches(data, batch_size=1, context_length=16, seed=0)
    batch = SharedPromptBatches(source).next()
    assert batch["shared_tokens"].tolist() == [[3, 4, 5, 6, 4, 7]]
    assert batch["shared_targets"].tolist() == [[IGNORE, 5, 6, 1, 7, 1]]
    assert batch["shared_segments"].tolist() == [[0, 1, 1, 1, 2, 2]]
    assert batch["shared_places"].tolist() == [[0, 1, 2, 3, 1, 2]]

    class TwoPrompts(PreferenceBatches):
        def collate(self, rows: np.ndarray) -> dict[str, Tensor]:
            batch = super().collate(rows)
            batch["rejected_tokens"][0, 0] += 1
            return batch

    with pytest.raises(ValueError, match="pair 0 has two prompts"):
        SharedPromptBatches(TwoPrompts(data, batch_size=1, context_length=16, seed=0)).next()


@pytest.mark.parametrize(
    ("loss", "option"),
    [
        ("dpo", {"label_smoothing": 0.2}),
        ("ipo", {"length_normalized": False}),
        ("kto", {"desirable_weight": 2.0}),
        ("kto", {"undesirable_weight": 2.0}),
        ("simpo", {"gamma": 0.2}),
        *((loss, {"beta": 0.7}) for loss in OPTIONS),
    ],
)
def test_every_option_changes_the_loss(loss, option):
    policy, reference = new_model(0), new_model(1)
    plain, changed = settings(loss), settings(loss, **option)
    batch = stored(plain, reference).next()
    values = [preference_loss(variant)(policy, batch)[0].item() for variant in (plain, changed)]
    assert values[0] != pytest.approx(values[1], rel=1e-3)


@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_loss_and_gradients_of_a_model_equal_trl(loss):
    """TRL's `DPOTrainer._compute_loss` runs a transformers Llama with our weights through its own output head."""
    from collections import defaultdict
    from types import SimpleNamespace

    from transformers import LlamaConfig, LlamaForCausalLM
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.utils import add_fused_lm_head

    from llmcourse.models.pretrained import config_to_hub, state_to_hub

    policy = new_model(0)
    options = settings(loss)
    batch = stored(options, new_model(1)).next()
    theirs = LlamaForCausalLM(LlamaConfig(**config_to_hub(CONFIG)))
    theirs.load_state_dict(state_to_hub(policy), strict=False)
    theirs.tie_weights()
    add_fused_lm_head(theirs, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    # TRL takes whole rows and a mask of the completion; ours are inputs and targets, one place apart
    tokens = torch.cat([batch[f"{name}_tokens"] for name in PAIR])
    targets = torch.cat([batch[f"{name}_targets"] for name in PAIR])
    ids = torch.cat((tokens, torch.full((len(tokens), 1), END)), dim=1)
    mask = torch.cat((torch.zeros(len(tokens), 1, dtype=torch.long), (targets != IGNORE).long()), dim=1)
    ids = torch.where(mask == 1, torch.cat((targets[:, :1], targets), dim=1), ids)
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
        model=theirs,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=["sigmoid" if loss == "dpo" else loss],
        loss_weights=[1.0],
        beta=options.beta,
        use_weighting=False,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "completion_mask": mask,
        "ref_chosen_logps": batch["chosen_ref_log_probs"],
        "ref_rejected_logps": batch["rejected_ref_log_probs"],
    }
    theirs.train()
    expected = DPOTrainer._compute_loss(trainer, theirs, inputs, return_outputs=False)
    expected.backward()
    total, count, metrics = preference_loss(options)(policy, batch)
    (total / count).backward()
    assert (total / count).item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-6)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for parameter in policy.parameters():  # the same numbers under the library's names
        parameter.data = parameter.grad
    largest = max(value.abs().max().item() for value in gradients.values())
    assert largest > 1e-2
    for name, found in state_to_hub(policy).items():
        if name in gradients:
            assert torch.allclose(found, gradients[name], atol=1e-6 * max(1.0, largest), rtol=1e-5), name
    recorded = trainer._metrics["train"]
    assert metrics["margin"].item() == pytest.approx(recorded["rewards/margins"][0], abs=1e-5)
    assert metrics["accuracy"].item() == pytest.approx(recorded["rewards/accuracies"][0])
    assert metrics["chosen_log_prob"].item() == pytest.approx(recorded["logps/chosen"][0], abs=1e-4)


# Training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("dpo", {}),
        ("dpo", {"label_smoothing": 0.1}),
        *((loss, {}) for loss in ("ipo", "kto", "orpo", "simpo")),
    ],
)
def test_training_learns_what_is_preferred(loss, options):
    model = new_model()
    before = copy.deepcopy(model)
    chosen = settings(loss, steps=60, **options)
    held_out = with_reference(before, batches(16, seed=1), chosen, progress=False)
    start = preference_evaluation(held_out, chosen)(before)
    result = train_dpo(model, batches(128), chosen, valid=held_out, progress=False)
    last = result.evaluations[-1]
    assert last["validation_accuracy"] >= (0.8 if loss in ("orpo", "simpo") else 0.9)
    assert last["validation_accuracy"] > start["validation_accuracy"] + 0.2
    assert last["validation_loss"] < start["validation_loss"]
    assert last["validation_margin"] > start["validation_margin"]
    assert {"margin", "accuracy", "chosen_reward", "rejected_reward"} <= result.records[-1].keys()


def test_the_reference_is_the_model_from_before_training():
    model = new_model()
    before = copy.deepcopy(model)
    given = new_model()
    train_dpo(model, batches(), settings(steps=3), progress=False)
    train_dpo(given, batches(), settings(steps=3), reference=before, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), given.parameters(), strict=True))
    other = new_model()
    train_dpo(other, batches(), settings(steps=3), reference=new_model(5), progress=False)
    assert not torch.equal(other.embedding.weight, model.embedding.weight)


def test_resuming_is_bit_identical(tmp_path):
    whole, first, second = new_model(), new_model(), new_model()
    options = settings("kto", steps=4)
    train_dpo(whole, batches(), options, progress=False)

    class Stopped(RuntimeError):
        pass

    def stop(step: int, _: torch.nn.Module) -> None:
        if step == 2:
            raise Stopped

    checkpointed = with_changes(options, checkpoint_every=1)
    with pytest.raises(Stopped):
        train_dpo(first, batches(), checkpointed, checkpoint_folder=tmp_path, on_step=stop, progress=False)
    result = train_dpo(second, batches(), checkpointed, checkpoint_folder=tmp_path, progress=False)
    assert result.resumed_from == 2
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


def test_evaluation_is_the_mean_over_all_pairs():
    policy, options = new_model(0), settings()
    source = stored(options, new_model(1), n=21, batch_size=8)  # the last batch has 5 pairs
    found = preference_evaluation(source, options)(policy)
    total, count, metrics = preference_loss(options)(policy, source.collate(np.arange(21)))
    assert found["validation_loss"] == pytest.approx(total.item() / count, rel=1e-5)
    for name, value in metrics.items():
        assert found[f"validation_{name}"] == pytest.approx(value.item(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_policy_that_is_its_reference_starts_at_ln_2_in_validation_too(precision):
    model, options = new_model(), settings()
    options = dataclasses.replace(options, fit=dataclasses.replace(options.fit, precision=precision))
    held_out = with_reference(model, batches(16, seed=1), options, progress=False)
    found = preference_evaluation(held_out, options)(model)
    assert found["validation_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(found["validation_margin"]) < 1e-6


def test_further_evaluations_are_recorded_too():
    result = train_dpo(
        new_model(),
        batches(),
        settings(steps=2),
        valid=batches(8, seed=1),
        evaluate=lambda _: {"mine": 3.0},
        progress=False,
    )
    assert {"mine", "validation_loss"} <= result.evaluations[-1].keys()
    assert train_dpo(new_model(), batches(), settings(steps=1), progress=False).evaluations == []


def test_losses_without_a_reference_run_none():
    source = batches()
    for loss in ("orpo", "simpo"):
        assert (
            with_reference(new_model(), source, settings(loss, share_prompt=False), progress=False) is source
        )
    with pytest.raises(ValueError, match="no 'chosen_ref_log_probs'"):
        preference_loss(settings())(new_model(), source.next())


# Settings -----------------------------------------------------------------------------------------------------


def test_presets_and_changes():
    assert set(PRESETS) == {"cpu", "gpu"}
    changed = preset("cpu", loss="simpo", gamma=0.5, steps=7, lr=1e-5)
    assert (changed.loss, changed.beta, changed.gamma) == ("simpo", 2.0, 0.5)
    assert (changed.fit.steps, changed.fit.lr) == (7, 1e-5)
    assert preset("gpu", beta=0.3).beta == 0.3
    assert with_changes(changed, loss="simpo", beta=3.0).beta == 3.0
    for name in PRESETS:
        preset(name)
    with pytest.raises(ValueError, match="preset='tpu'"):
        preset("tpu")
    with pytest.raises(ValueError, match="unknown setting 'bta'"):
        preset("cpu", bta=1)


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "ppo"},
        {"beta": 0.0},
        {"label_smoothing": 0.5},
        {"loss": "ipo", "label_smoothing": 0.1},
        {"gamma": 0.5},
        {"loss": "simpo", "length_normalized": False},
        {"loss": "simpo", "gamma": -1.0},
        {"loss": "kto", "desirable_weight": -1.0},
        {"loss": "kto", "undesirable_weight": math.nan},
        {"loss": "orpo", "beta": -1.0},
        {"chunk_size": 0},
    ],
)
def test_settings_refuse(options):
    with pytest.raises(ValueError, match=list(options)[-1]):
        DPOSettings(**options)
