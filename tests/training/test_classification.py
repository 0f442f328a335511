"""Classification: the loss by hand, batches that cover the texts, and a head that learns with and without its body."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from llmcourse.models.classifier import SequenceClassifier
from llmcourse.models.config import ModelConfig
from llmcourse.models.transformer import Transformer
from llmcourse.training.classification import LabeledBatches, classification_loss, predict_classes
from llmcourse.training.fit import FitSettings, fit

V, PAD, CONTEXT = 23, 1, 24


def make(n_classes: int = 2) -> SequenceClassifier:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "d_ff": 24}
    return SequenceClassifier(
        Transformer(ModelConfig(vocab_size=V, context_length=CONTEXT, **sizes)), n_classes
    )


def texts_of(n: int, seed: int = 0) -> tuple[list[list[int]], list[int]]:
    """Label 1 if the id 5 occurs: the last token must have read the others."""
    rng = np.random.default_rng(seed)
    texts = [rng.integers(6, V, rng.integers(2, 20)).tolist() for _ in range(n)]
    labels = rng.integers(0, 2, n).tolist()
    for text, label in zip(texts, labels, strict=True):
        if label:
            text[int(rng.integers(len(text)))] = 5
    return texts, labels


def batches(n: int = 50, **options: Any) -> LabeledBatches:
    options = {"batch_size": 8, "context_length": CONTEXT, "pad_id": PAD, "seed": 0} | options
    return LabeledBatches(*texts_of(n), **options)


class Fixed(nn.Module):
    """Gives these logits."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        return self.logits


def test_loss_by_hand():
    # p(label) = 1/2 and 3/4; the first is a tie that argmax gives to class 0
    model = Fixed(torch.tensor([[1.0, 1.0], [0.0, math.log(3)]]))
    batch = {"tokens": torch.zeros(2, 3), "lengths": torch.ones(2), "labels": torch.tensor([1, 1])}
    total, count, metrics = classification_loss(model, batch)
    assert float(total.detach()) == pytest.approx(math.log(2) + math.log(4 / 3)) and int(count) == 2
    assert float(metrics["accuracy"]) == 0.5
    total.backward()  # softmax minus one-hot
    assert model.logits.grad.flatten().tolist() == pytest.approx([0.5, -0.5, 0.25, -0.25])
    assert classification_loss(model.bfloat16(), batch)[0].dtype == torch.float32


def test_batches_hold_the_texts_and_their_labels():
    texts, labels = texts_of(50)
    source, seen = batches(), []
    for position in range(source.batches_per_epoch):
        batch, rows = source.next(), source.rows(position)
        assert {name: value.dtype for name, value in batch.items()} == dict.fromkeys(batch, torch.int64)
        longest = int(batch["lengths"].max())
        assert batch["tokens"].shape == (8, min(-(-longest // 16) * 16, CONTEXT))
        for b, row in enumerate(rows):
            length = int(batch["lengths"][b])
            assert (
                batch["tokens"][b, :length].tolist() == texts[row] and int(batch["labels"][b]) == labels[row]
            )
            assert (batch["tokens"][b, length:] == PAD).all()
        seen += rows.tolist()
    assert len(seen) == len(set(seen)) == 48


def test_position_is_saved_and_belongs_to_its_data():
    source, again = batches(), batches()
    source.next()
    again.load_state_dict(source.state_dict())
    assert torch.equal(source.next()["tokens"], again.next()["tokens"])
    texts, labels = texts_of(50)
    for changed in ((texts, labels[::-1]), ([[7], *texts[1:]], labels)):
        options = {"batch_size": 8, "context_length": CONTEXT, "pad_id": PAD, "seed": 0}
        with pytest.raises(ValueError, match="checksum"):
            LabeledBatches(*changed, **options).load_state_dict(source.state_dict())


def test_the_loss_of_a_batch_is_that_of_its_texts_alone():
    model = make()
    with torch.no_grad():
        model.score.weight.normal_()
    batch = batches().next()
    total, count, _ = classification_loss(model, batch)
    alone = 0.0
    for tokens, length, label in zip(batch["tokens"], batch["lengths"], batch["labels"], strict=True):
        one = {"tokens": tokens[None, :length], "lengths": length[None], "labels": label[None]}
        alone += float(classification_loss(model, one)[0].detach())
    assert float(total.detach()) == pytest.approx(alone, rel=1e-5) and int(count) == 8


@pytest.mark.parametrize("frozen", [False, True], ids=["full", "probe"])
def test_learns_through_fit(frozen: bool):
    model, (texts, labels) = make(), texts_of(200)
    model.transformer.requires_grad_(not frozen)
    body = model.transformer.embedding.weight.detach().clone()
    source = LabeledBatches(texts, labels, batch_size=32, context_length=CONTEXT, pad_id=PAD, seed=0)
    settings = FitSettings(
        steps=120, lr=1e-2, warmup_steps=5, weight_decay=0.0, compile="off", precision="fp32"
    )
    result = fit(model, source, classification_loss, settings, progress=False)
    assert result.records[0]["loss"] == pytest.approx(math.log(2)) and "accuracy" in result.records[0]
    assert result.records[0]["units"] == 32
    right = np.mean(np.array(predict_classes(model, texts, pad_id=PAD)) == np.array(labels))
    assert torch.equal(model.transformer.embedding.weight, body) == frozen
    assert right > (0.6 if frozen else 0.95), right


def test_predictions_do_not_depend_on_the_batch_and_leave_the_mode():
    model, (texts, _) = make(3), texts_of(21)
    with torch.no_grad():
        model.score.weight.normal_()
    model.train()
    one = predict_classes(model, texts, batch_size=1)
    assert one == predict_classes(model, texts, batch_size=8, pad_id=9) and model.training
    assert len(set(one)) > 1 and predict_classes(model, []) == []
    with torch.no_grad():
        logits = model(torch.tensor([texts[4]]), torch.tensor([len(texts[4])]))
    assert one[4] == int(logits.argmax())


@pytest.mark.parametrize(
    ("texts", "labels", "message"),
    [
        ([[3], [4]], [0], "1 labels for 2 texts"),
        ([[3], [4]], [0, -1], "label -1"),
        ([[3], []], [0, 1], "texts of 0 to 1 tokens"),
        ([[3], [4] * 25], [0, 1], "texts of 1 to 25 tokens: must be 1 to context_length=24"),
        ([[3]], [0], "1 rows do not fill one batch of 2"),
    ],
)
def test_data_are_refused(texts, labels, message):
    with pytest.raises(ValueError, match=message):
        LabeledBatches(texts, labels, batch_size=2, context_length=CONTEXT, pad_id=PAD, seed=0)


def test_a_batch_size_below_one_is_refused():
    with pytest.raises(ValueError, match="batch_size=0"):
        predict_classes(make(), [[3]], batch_size=0)
