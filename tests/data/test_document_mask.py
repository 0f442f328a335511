"""No document of a row sees another: positions and mask by hand, logits as alone, gradients exactly zero."""

from __future__ import annotations

import pytest
import torch

from llmcourse.data.document_mask import DocumentMask
from llmcourse.models.config import ModelConfig
from llmcourse.models.transformer import Transformer

DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, -1, -1], [0, 1, 1, 1, 1, 1, 1, 1]])


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=31, context_length=64, d_model=24, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=40
    )
    return Transformer(config).double()


def test_positions_and_mask_by_hand():
    mask = DocumentMask(DOCUMENTS)
    assert mask.positions(8).tolist() == [[0, 1, 2, 0, 1, 0, 0, 1], [0, 0, 1, 2, 3, 4, 5, 6]]
    seen = mask.mask(8)
    assert seen.shape == (2, 1, 8, 8)
    assert seen[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 0, 0, 0, 0],
        [0, 0, 0, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 1, 1],
    ]


def test_logits_are_those_of_each_document_alone(model: Transformer):
    tokens = torch.randint(31, (2, 8))
    together = model(tokens, DocumentMask(DOCUMENTS))
    for row, documents in enumerate(DOCUMENTS):
        for document in documents.unique():
            slots = documents == document
            alone = model(tokens[row][slots][None])
            torch.testing.assert_close(together[row][slots][None], alone, rtol=0, atol=1e-12)
    assert not torch.allclose(together, model(tokens))  # the mask matters


def gradient_at_inputs(model: Transformer, cache: DocumentMask | None) -> torch.Tensor:
    """Norm (T,) of d loss(last document) / d embedding of each input slot."""
    tokens = torch.arange(40)[None] % 31
    kept = {}

    def keep(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        output.retain_grad()
        kept["x"] = output

    handle = model.embedding.register_forward_hook(keep)
    logits = model(tokens, cache)
    handle.remove()
    logits[0, 25:].logsumexp(-1).sum().backward()
    model.zero_grad()
    return kept["x"].grad[0].norm(dim=-1)


def test_no_gradient_reaches_a_neighbor(model: Transformer):
    documents = torch.tensor([[0] * 15 + [1] * 10 + [2] * 15])
    apart = gradient_at_inputs(model, DocumentMask(documents))
    assert (apart[:25] == 0).all() and (apart[25:] > 0).all()
    assert (gradient_at_inputs(model, None)[:25] > 0).all()  # without the mask it does


def test_bad_shapes_are_refused(model: Transformer):
    with pytest.raises(ValueError, match="documents has shape \\(8,\\)"):
        DocumentMask(DOCUMENTS[0])
    with pytest.raises(ValueError, match="the rows have 5 tokens, documents describes 8"):
        model(torch.zeros(2, 5, dtype=torch.int64), DocumentMask(DOCUMENTS))
