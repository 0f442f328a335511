"""Training a classification head, with or without the transformer below it: loss, batches, predictions.

Shapes: B rows, T slots of a row, M texts, Y classes.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmcourse.data.epoch_batches import Batch, EpochBatches
from llmcourse.data.instruction import padded_width
from llmcourse.models.classifier import SequenceClassifier


def classification_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Summed -ln p(label) in nats, number of texts, and the "accuracy" of the batch, for `fit`.

    batch: "tokens" (B, T), "lengths" (B,) and "labels" (B,), all int64. The unit of the loop is a text.
    """
    logits, labels = model(batch["tokens"], batch["lengths"]), batch["labels"]  # (B, Y), (B,)
    total = F.cross_entropy(logits.float(), labels, reduction="sum")
    accuracy = (logits.argmax(-1) == labels).float().mean()
    return total, torch.tensor(len(labels), device=labels.device), {"accuracy": accuracy}


class LabeledBatches(EpochBatches):
    """Batches of labeled texts: {"tokens" (B, T), "lengths" (B,), "labels" (B,)}, int64, padded on the right.

    T is the longest row's length rounded up to a multiple of 16, at most `context_length`.
    """

    def __init__(
        self,
        texts: Sequence[Sequence[int]],
        labels: Sequence[int],
        *,
        batch_size: int,
        context_length: int,
        pad_id: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Make the source, at position 0.

        Args:
            texts: ids of each of the M texts.
            labels: class of each, from 0.
            batch_size: rows that each process gets, B.
            context_length: largest width of a row, T.
            pad_id: fills rows.
            seed: at least 0; with the epoch's number it fixes that epoch's order.
            rank: this process, from 0.
            world_size: number of processes that share each global batch.

        Raises:
            ValueError: another number of labels than of texts, a negative label, an empty text or one longer than the
                context, or what `EpochBatches` refuses.
        """
        if len(texts) != len(labels):
            raise ValueError(f"{len(labels)} labels for {len(texts)} texts: give one for each")
        if len(labels) and min(labels) < 0:
            raise ValueError(f"label {min(labels)}: classes are numbered from 0")
        lengths = np.array([len(text) for text in texts], dtype=np.int64)
        if len(texts) and not (lengths.min() >= 1 and lengths.max() <= context_length):
            raise ValueError(
                f"texts of {lengths.min()} to {lengths.max()} tokens: must be 1 to context_length={context_length}"
            )
        self.texts = [np.asarray(text, dtype=np.int64) for text in texts]
        self.labels = np.asarray(labels, dtype=np.int64)
        self.context_length, self.pad_id = context_length, pad_id
        super().__init__(lengths, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size)

    def collate(self, rows: np.ndarray) -> Batch:
        """Tensors of the texts of these numbers."""
        width = padded_width(int(self.row_lengths[rows].max()), self.context_length)
        tokens = np.full((len(rows), width), self.pad_id, np.int64)
        for b, row in enumerate(rows):
            tokens[b, : self.row_lengths[row]] = self.texts[row]
        columns = {"tokens": tokens, "lengths": self.row_lengths[rows], "labels": self.labels[rows]}
        return {name: torch.from_numpy(column) for name, column in columns.items()}

    def identity(self) -> dict[str, Any]:
        """What a position is a position in."""
        checksum = zlib.crc32(self.labels)
        for text in self.texts:
            checksum = zlib.crc32(text, checksum)
        return super().identity() | {"checksum": zlib.crc32(self.row_lengths, checksum)}


@torch.no_grad()
def predict_classes(
    model: SequenceClassifier, texts: Sequence[Sequence[int]], *, pad_id: int = 0, batch_size: int = 64
) -> list[int]:
    """The most probable class of each text.

    Raises:
        ValueError: a batch size below 1, or what `LabeledBatches` refuses.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: give at least 1")
    if not texts:
        return []
    device, was_training = model.score.weight.device, model.training
    width = model.transformer.config.context_length
    source = LabeledBatches(
        texts, [0] * len(texts), batch_size=1, context_length=width, pad_id=pad_id, seed=0
    )
    order = np.argsort(source.row_lengths, kind="stable")  # like lengths together: less padding
    classes = np.zeros(len(texts), dtype=np.int64)
    model.eval()
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = source.collate(rows)
        logits = model(batch["tokens"].to(device), batch["lengths"].to(device))
        classes[rows] = logits.argmax(-1).cpu().numpy()
    model.train(was_training)
    return classes.tolist()
