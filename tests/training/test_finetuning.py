"""Fine-tuning: the masked loss by hand and equal to TRL's, packing, replay, frozen parts, forgetting, resume."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from llmcourse.data.document_mask import DocumentMask
from llmcourse.data.instruction import CourseFormat, InstructionBatches, InstructionSet, encode_conversations
from llmcourse.data.packing import IGNORE, PackedBatches
from llmcourse.data.token_stream import TokenStream
from llmcourse.models.config import ModelConfig
from llmcourse.models.lora import LoRASettings, add_lora
from llmcourse.models.transformer import Transformer
from llmcourse.tokenization.tokenizer import Tokenizer
from llmcourse.training.finetuning import (
    PRESETS,
    ReplayBatches,
    SFTSettings,
    finetune,
    instruction_loss,
    masked_loss,
    preset,
    sft_loss,
    with_replay,
)
from llmcourse.training.pretraining import next_token_loss

CONTEXT = 48


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the cat sat on the mat now", "where is the cat in the hall"] * 20, 275)


def chats(n: int, seed: int = 0) -> list[list[dict[str, str]]]:
    """The assistant repeats the last word: something to learn."""
    rng = np.random.default_rng(seed)
    words = "the cat sat on mat in hall now where is".split()
    made = []
    for _ in range(n):
        question = [str(word) for word in rng.choice(words, rng.integers(2, 9))]
        made.append(
            [
                {"role": "user", "content": " ".join(question)},
                {"role": "assistant", "content": question[-1]},
            ]
        )
    return made


def test_the_base_of_an_adapter_is_not_trained_by_accident(tokenizer: Tokenizer, data: InstructionSet):
    model = add_lora(make(tokenizer), LoRASettings(rank=2))
    with pytest.raises(ValueError, match="the model has an adapter"):
        finetune(model, data, SFTSettings(), progress=False)


@pytest.fixture(scope="module")
def data(tokenizer: Tokenizer) -> InstructionSet:
    return encode_conversations(chats(96), CourseFormat(tokenizer), context_length=CONTEXT)


def make(tokenizer: Tokenizer, **changes: Any) -> Transformer:
    torch.manual_seed(0)
    sizes = {
        "context_length": CONTEXT,
        "d_model": 24,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "d_ff": 40,
    }
    return Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, **(sizes | changes)))


def stream(tokenizer: Tokenizer, n: int = 400, seed: int = 0) -> TokenStream:
    ids = (np.cumsum(np.random.default_rng(seed).choice([3, 3, 5], n)) % 200 + 10).astype(np.uint16)
    ids[-1] = tokenizer.eos_id
    return TokenStream(ids, np.array([0, n]), tokenizer.eos_id, tokenizer.vocab_size)


def batch_of(data: InstructionSet, **options: Any) -> dict[str, Tensor]:
    options = {"batch_size": 8, "context_length": CONTEXT, "seed": 0} | options
    return InstructionBatches(data, **options).next()


def mean(parts: tuple[Tensor, Tensor, Any]) -> Tensor:
    return parts[0] / parts[1]


# The loss


class Fixed(nn.Module):
    """Says the same probabilities at every position."""

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(probabilities).log())

    def forward(self, tokens: Tensor, cache: Any = None) -> Tensor:
        return self.logits.expand(*tokens.shape, -1)


def test_masked_loss_by_hand():
    # of five positions two count: -ln 1/2 - ln 1/4 = ln 8
    model, targets = Fixed([0.5, 0.25, 0.25]), torch.tensor([[IGNORE, 0, IGNORE, 2, IGNORE]])
    total, count = masked_loss(model(targets), targets)
    assert float(total.detach()) == pytest.approx(math.log(8)) and int(count) == 2
    total, count, metrics = sft_loss(model, {"tokens": targets, "targets": targets})
    assert float(total.detach()) == pytest.approx(math.log(8)) and int(count) == 2 and metrics == {}
    assert masked_loss(model(targets).bfloat16(), targets)[0].dtype == torch.float32


def test_logits_at_targets_only_give_the_same_loss_and_gradient(tokenizer: Tokenizer, data: InstructionSet):
    batch, gradients = batch_of(data), []
    for loss in (sft_loss, next_token_loss):  # the second computes all logits
        model = make(tokenizer).double()
        total, count, _ = loss(model, batch)
        total.backward()
        gradients.append([p.grad for p in model.parameters()])
        assert int(count) == int((batch["targets"] != IGNORE).sum()) < batch["targets"].numel() / 2
    for ours, full in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, full, rtol=1e-6, atol=1e-6)


def test_a_packed_batch_costs_what_its_conversations_cost_alone(tokenizer: Tokenizer, data: InstructionSet):
    model = make(tokenizer).double()
    source = InstructionBatches(data, batch_size=4, context_length=CONTEXT, seed=0, packed=True)
    batch = source.next()
    assert int(batch["documents"].max()) >= 1
    total, count, _ = sft_loss(model, batch)
    alone, n = 0.0, 0
    for index in [i for row in source.rows(0) for i in source.contents[row]]:
        inputs, targets = (torch.from_numpy(part)[None] for part in data.row(index))
        part, k, _ = sft_loss(model, {"tokens": inputs, "targets": targets})
        alone, n = alone + float(part.detach()), n + int(k)
    assert int(count) == n and float(total.detach()) == pytest.approx(alone, rel=1e-6)
    mixed = {name: batch[name] for name in ("tokens", "targets")}
    assert float(sft_loss(model, mixed)[0].detach()) != pytest.approx(alone, rel=1e-3)
    # the path through the whole forward pass, as for wrapped models, takes the mask too
    wrapped = nn.Sequential()
    wrapped.forward = lambda tokens, cache=None: model(tokens, cache)
    assert float(sft_loss(wrapped, batch)[0].detach()) == pytest.approx(alone, rel=1e-6)


def test_no_gradient_of_a_packed_loss_reaches_a_neighbor(tokenizer: Tokenizer, data: InstructionSet):
    model = make(tokenizer)
    batch = batch_of(data, batch_size=1, packed=True)
    first = batch["documents"] == 0
    only_first = batch | {"targets": batch["targets"].masked_fill(~first, IGNORE)}
    only_rest = batch | {"targets": batch["targets"].masked_fill(first, IGNORE)}
    for wanted, inside in ((only_first, first), (only_rest, ~first)):
        kept: list[Tensor] = []
        handle = model.embedding.register_forward_hook(
            lambda module, inputs, output, kept=kept: (output.retain_grad(), kept.append(output))[0]
        )
        sft_loss(model, wanted)[0].backward()
        handle.remove()
        gradient = kept[0].grad.norm(dim=-1)
        assert (gradient[~inside] == 0).all() and (gradient[inside] > 0).any()


def test_the_loss_equals_trls(tokenizer: Tokenizer, tmp_path: Path):
    """Same weights, same conversations, through `SFTTrainer` with `assistant_only_loss`: loss and gradients."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    from llmcourse.models.pretrained import save_pretrained

    ours = make(tokenizer)
    save_pretrained(ours, tmp_path / "model", tokenizer)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    talks = [*chats(3), [*chats(2)[0], *chats(2)[1]]]
    config = SFTConfig(
        output_dir=str(tmp_path), assistant_only_loss=True, per_device_train_batch_size=4, use_cpu=True, bf16=False,
        report_to=[], disable_tqdm=True, max_length=CONTEXT, gradient_checkpointing=False,
    )  # fmt: skip
    rows = Dataset.from_list([{"messages": messages} for messages in talks])
    trainer = SFTTrainer(theirs, config, train_dataset=rows, processing_class=tokenizer.to_transformers())
    inputs = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    data = encode_conversations(talks, CourseFormat(tokenizer), context_length=CONTEXT)
    assert int((inputs["labels"] != IGNORE).sum()) == data.n_targets
    mine = mean(sft_loss(ours, batch_of(data, batch_size=4)))
    mine.backward()
    assert float(mine.detach()) == pytest.approx(float(loss.detach()), abs=1e-6)
    torch.testing.assert_close(
        ours.embedding.weight.grad, theirs.get_input_embeddings().weight.grad, rtol=0, atol=1e-6
    )


# Replay


def test_replay_weighs_the_two_means(tokenizer: Tokenizer, data: InstructionSet):
    model = make(tokenizer).double()
    source = PackedBatches(stream(tokenizer), batch_size=3, context_length=CONTEXT, seed=1)
    both = ReplayBatches(InstructionBatches(data, batch_size=8, context_length=CONTEXT, seed=0), source)
    state = both.state_dict()
    batch = both.next()
    text = {name: batch[f"replay_{name}"] for name in ("tokens", "targets")}
    sft, pre = (
        float(mean(sft_loss(model, batch)).detach()),
        float(mean(next_token_loss(model, text)).detach()),
    )
    for share in (0.0, 0.3):
        total, count, metrics = with_replay(share)(model, batch)
        assert float((total / count).detach()) == pytest.approx((1 - share) * sft + share * pre)
        assert float(metrics["instruction_loss"]) == pytest.approx(sft)
        assert float(metrics["replay_loss"]) == pytest.approx(pre)
    both.next()
    both.load_state_dict(state)
    torch.testing.assert_close(both.next()["replay_tokens"], batch["replay_tokens"])
    with pytest.raises(ValueError, match="the saved batches have no replay"):
        both.load_state_dict(state["instructions"])
    with pytest.raises(ValueError, match="share=1"):
        with_replay(1.0)


# Settings


@pytest.mark.parametrize("name", PRESETS)
def test_presets_take_changes(name: str):
    settings = preset(name)
    assert settings.fit.warmup_steps < settings.fit.steps
    changed = preset(name, lr=0.5, seed=3, trainable="last:2", batch_size=2, steps=None, replay_share=0.25)
    assert (changed.fit.lr, changed.fit.seed, changed.seed, changed.fit.steps) == (
        0.5,
        3,
        3,
        settings.fit.steps,
    )
    assert (changed.trainable, changed.batch_size, changed.replay_share) == ("last:2", 2, 0.25)
    with pytest.raises(ValueError, match="unknown setting 'd_model'"):
        preset(name, d_model=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"replay_batch_size": 0}, "replay_batch_size=0"),
        ({"loss_on": "user"}, "loss_on='user'"),
        ({"truncation": "left"}, "truncation='left'"),
        ({"replay_share": 1.0}, "replay_share=1.0"),
        ({"apart": False}, "apart=False needs packed=True"),
        ({"trainable": "last"}, "trainable='last'"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        SFTSettings(**changes)
    with pytest.raises(ValueError, match="preset='tpu'"):
        preset("tpu")


# The run


def settings(**changes: Any) -> SFTSettings:
    quick = {
        "steps": 60,
        "batch_size": 16,
        "warmup_steps": 2,
        "lr": 1e-2,
        "precision": "fp32",
        "compile": "off",
    }
    return preset("cpu", **(quick | changes))


def run(tokenizer: Tokenizer, data: InstructionSet, model: Transformer | None = None, **options: Any) -> Any:
    changes = {name: options.pop(name) for name in list(options) if name in SETTINGS}
    return finetune(model or make(tokenizer), data, settings(**changes), progress=False, **options)


SETTINGS = {"steps", "replay_share", "trainable", "packed", "seed", "eval_every", "checkpoint_every", "lr"}


def test_fine_tuning_learns_and_measures_forgetting(tokenizer: Tokenizer, data: InstructionSet):
    valid = encode_conversations(chats(64, 1), CourseFormat(tokenizer), context_length=CONTEXT)
    text = stream(tokenizer)
    options = {"valid": valid, "pretraining_validation": text}
    model = make(tokenizer)
    done = run(tokenizer, data, model, evaluate=lambda m: {"answer": 42.0}, eval_every=30, **options)
    assert done.after["validation_loss"] < 0.6 * done.before["validation_loss"]
    assert done.before["answer"] == done.after["answer"] == 42 and len(done.fit.evaluations) == 2
    assert done.after["validation_loss"] == pytest.approx(instruction_loss(model, valid), rel=1e-5)
    assert not model.training and "seconds" not in done.after
    assert done.forgetting == done.after["pretraining_loss"] - done.before["pretraining_loss"]
    replayed = run(tokenizer, data, replay=text, replay_share=0.5, **options)
    assert replayed.before["pretraining_loss"] == done.before["pretraining_loss"]
    assert replayed.forgetting < done.forgetting - 0.5
    assert {"instruction_loss", "replay_loss"} <= replayed.fit.records[0].keys()
    with pytest.raises(ValueError, match="forgetting was not measured"):
        _ = run(tokenizer, data, steps=3).forgetting


def test_instruction_loss_does_not_depend_on_the_batch(tokenizer: Tokenizer, data: InstructionSet):
    model = make(tokenizer).train()
    losses = [instruction_loss(model, data, size) for size in (1, 7, 96)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5) and model.training
    assert losses[0] == pytest.approx(
        float(mean(sft_loss(model, batch_of(data, batch_size=96))).detach()), rel=1e-5
    )


@pytest.mark.parametrize("trainable", ["full", "head", "last:1"])
def test_only_what_is_trainable_moves(tokenizer: Tokenizer, data: InstructionSet, trainable: str):
    model = make(tokenizer)
    start = make(tokenizer)
    done = run(tokenizer, data, model, trainable=trainable, steps=3)
    moved = {
        name.split(".")[0] + name.split(".")[1]
        for (name, p), q in zip(model.named_parameters(), start.parameters(), strict=False)
        if p.shape == q.shape and not torch.equal(p, q)
    }
    assert ("embeddingweight" in moved) == (trainable == "full")
    assert ("blocks0" in moved) == (trainable == "full") and ("blocks1" in moved) == (trainable != "head")
    assert (done.trainable.share == 1) == (trainable == "full")


def test_a_killed_run_goes_on_bit_for_bit(tokenizer: Tokenizer, data: InstructionSet, tmp_path: Path):
    options = {"replay": stream(tokenizer), "replay_share": 0.2, "packed": True}
    whole, parts = make(tokenizer), make(tokenizer)
    run(tokenizer, data, whole, steps=6, **options)

    def die(step: int, model: nn.Module) -> None:
        if step == 3:
            raise KeyboardInterrupt

    folder = {"checkpoint_folder": tmp_path, "checkpoint_every": 2, "steps": 6}
    with pytest.raises(KeyboardInterrupt):
        run(tokenizer, data, parts, on_step=die, **folder, **options)
    parts = make(tokenizer)
    done = run(tokenizer, data, parts, **folder, **options)
    assert done.fit.resumed_from == 2
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(a, b)


def test_replay_needs_text_and_share(tokenizer: Tokenizer, data: InstructionSet):
    with pytest.raises(ValueError, match="replay_share=0.5 and no replay text"):
        run(tokenizer, data, replay_share=0.5)
    with pytest.raises(ValueError, match="replay_share=0.0 and replay text"):
        run(tokenizer, data, replay=stream(tokenizer))


def test_packed_runs_see_the_mask(
    tokenizer: Tokenizer, data: InstructionSet, monkeypatch: pytest.MonkeyPatch
):
    seen: list[int] = []
    positions = DocumentMask.positions
    monkeypatch.setattr(DocumentMask, "positions", lambda self, n: (seen.append(n), positions(self, n))[1])
    run(tokenizer, data, packed=True, steps=2)
    assert seen == [CONTEXT, CONTEXT]
    apart = dataclasses.replace(settings(packed=True, steps=2), apart=False)
    finetune(make(tokenizer), data, apart, progress=False)
    assert len(seen) == 2
