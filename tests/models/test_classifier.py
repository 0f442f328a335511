"""The classification head: the last token by hand, padding without effect, equal to transformers'."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaForSequenceClassification

from llmcourse.models.classifier import SequenceClassifier, last_token
from llmcourse.models.config import ModelConfig
from llmcourse.models.pretrained import save_pretrained
from llmcourse.models.transformer import Transformer

V, D, PAD = 31, 24, 1


def make(tied: bool = True) -> Transformer:
    torch.manual_seed(0)
    sizes = {"d_model": D, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 40, "context_length": 16}
    return Transformer(ModelConfig(vocab_size=V, tie_embeddings=tied, **sizes)).eval()


def classifier(tied: bool = True, n_classes: int = 3, **options: bool) -> SequenceClassifier:
    model = SequenceClassifier(make(tied), n_classes, **options)
    with torch.no_grad():
        for parameter in model.score.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    return model


def padded(lengths: list[int], width: int, pad: int = PAD) -> tuple[torch.Tensor, torch.Tensor]:
    """Random rows without pad ids among them."""
    g = torch.Generator().manual_seed(2)
    tokens = torch.randint(2, V, (len(lengths), width), generator=g)
    for row, length in zip(tokens, lengths, strict=True):
        row[length:] = pad
    return tokens, torch.tensor(lengths)


def test_last_token_by_hand():
    hidden = torch.arange(12.0).view(2, 3, 2)
    assert last_token(hidden, torch.tensor([1, 3])).tolist() == [[0.0, 1.0], [10.0, 11.0]]
    assert last_token(hidden[:1], torch.tensor([2])).tolist() == [[2.0, 3.0]]


def test_last_token_passes_gradients_to_the_last_tokens_only():
    hidden = torch.randn(3, 5, 2, requires_grad=True)
    last_token(hidden, torch.tensor([5, 1, 3])).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.any(-1).nonzero().tolist() == [[0, 4], [1, 0], [2, 2]]


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([1, 2, 3], r"lengths of shape \(3,\) for 2 rows"),
        ([0, 2], "lengths from 0 to 2"),
        ([1, 4], "from 1 to T=3"),
    ],
)
def test_wrong_lengths_are_refused(lengths, message):
    with pytest.raises(ValueError, match=message):
        last_token(torch.zeros(2, 3, 2), torch.tensor(lengths))


def test_each_row_is_scored_as_if_alone():
    model, (tokens, lengths) = classifier(), padded([9, 4, 1, 7], 9)
    logits = model(tokens, lengths)
    assert logits.shape == (4, 3) and logits.std() > 0.1
    for row, length, expected in zip(tokens, lengths, logits, strict=True):
        alone = model(row[None, :length], length[None])[0]
        torch.testing.assert_close(alone, expected, rtol=1e-5, atol=1e-5)
    changed = tokens.clone()
    changed[1, 4:] = 5
    torch.testing.assert_close(model(changed, lengths), logits, rtol=0, atol=0)
    changed[1, 0] = 7  # the first token counts, through attention
    assert (model(changed, lengths)[1] - logits[1]).abs().max() > 1e-3


def test_the_first_hidden_state_has_read_nothing():
    tokens, _ = padded([9, 9], 9)
    tokens[1, 0] = tokens[0, 0]
    hidden = make().hidden_states(tokens)
    torch.testing.assert_close(hidden[0, 0], hidden[1, 0])
    assert (hidden[0, -1] - hidden[1, -1]).abs().max() > 0.1


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_logits_equal_transformers(tied: bool, tmp_path):
    model = classifier(tied)
    save_pretrained(model.transformer, tmp_path)
    theirs = LlamaForSequenceClassification.from_pretrained(tmp_path, num_labels=3, pad_token_id=PAD).eval()
    with torch.no_grad():
        theirs.score.weight.copy_(model.score.weight)
    tokens, lengths = padded([9, 4, 1, 7], 9)
    labels = torch.tensor([0, 2, 1, 1])
    with torch.no_grad():
        ours = model(tokens, lengths)
        output = theirs(input_ids=tokens, attention_mask=(tokens != PAD).long(), labels=labels)
    assert (ours - output.logits).abs().max() < 1e-5
    assert float(F.cross_entropy(ours, labels)) == pytest.approx(float(output.loss), abs=1e-5)


def test_starts_at_ln_of_the_classes_without_a_gradient_below():
    model = SequenceClassifier(make(), 5, bias=True)
    tokens, lengths = padded([9, 4], 9)
    loss = F.cross_entropy(model(tokens, lengths), torch.tensor([0, 4]))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(math.log(5))
    assert model.score.weight.grad.abs().sum() > 0
    assert all(p.grad is None or not p.grad.any() for p in model.transformer.parameters())


def test_options():
    assert classifier().score.bias is None and classifier(bias=True).score.bias is not None
    assert classifier(n_classes=7).n_classes == 7
    tied, untied = classifier(tied=True), classifier(tied=False)
    assert (
        tied.transformer.embedding.weight.requires_grad and untied.transformer.embedding.weight.requires_grad
    )
    assert not untied.transformer.head.weight.requires_grad
    narrow = SequenceClassifier(make().bfloat16(), 2)
    assert narrow.score.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="n_classes=1: give at least 2"):
        SequenceClassifier(make(), 1)


def test_a_frozen_transformer_leaves_a_linear_probe():
    model = classifier()
    model.transformer.requires_grad_(False)
    tokens, lengths = padded([9, 4], 9)
    F.cross_entropy(model(tokens, lengths), torch.tensor([0, 2])).backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["score.weight"]
