"""How far what a compressed model predicts is from what the dense one does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .curvature import first_states, predicted, real
from .forward import forward


# Predictions whose divergence is taken at a time.
ROWS = 256


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a model predicts of a batch.

    Args:
        logits: of each output that is named logits, `(N, V)` float32, padding left out.
        mean: of a model without any, its first output `(N, V)` but for a loss: mean of a normal distribution of unit
            variance.
    """

    logits: tuple[Tensor, ...] = ()
    mean: Tensor | None = None


@torch.no_grad()
def predict(model: Any, batch: Mapping[str, Any], number: int) -> Predictions:
    """Run a model on a batch.

    Args:
        model: in evaluation mode.
        batch: model inputs.
        number: of the batch, for errors.

    Raises:
        CalibrationError: the model does not accept the batch.
    """
    outputs, mask = forward(model, batch, number, True), predicted(model, batch)
    logits = [value for key, value in outputs.items() if "logits" in key and isinstance(value, Tensor)]
    if not logits:
        return Predictions(mean=real(first_states(outputs), mask).float())
    return Predictions(tuple(real(value, mask).float() for value in logits))


def divergence(dense: Predictions, compressed: Predictions) -> tuple[float, int]:
    """The Kullback–Leibler divergence of what a compressed model predicts from what the dense one does, in nats.

    Of a language model it is the language loss, and of CLIP the contrastive loss of the pairs of a batch in both
    directions, with the dense model's predictions in the place of labels, less what these would cost the dense model
    itself.

    Args:
        dense: predictions.
        compressed: of the same batch.

    Returns:
        The sum over predictions, and how many there were.
    """
    if dense.mean is not None and compressed.mean is not None:
        return squared(dense.mean, compressed.mean)
    pairs = list(zip(dense.logits, compressed.logits, strict=True))
    parts = [squared(d, c) if d.shape[-1] == 1 else categorical(d, c) for d, c in pairs]
    return sum(part[0] for part in parts), sum(part[1] for part in parts)


def categorical(dense: Tensor, compressed: Tensor) -> tuple[float, int]:
    """Of the softmax of logits `(N, V)`, in float64: where the two are close, float32 would leave rounding errors."""
    total = 0.0
    for d, c in zip(dense.split(ROWS), compressed.split(ROWS), strict=True):
        p, q = d.double().log_softmax(-1), c.double().log_softmax(-1)
        total += float((p.exp() * (p - q)).sum())
    return total, len(dense)


def squared(dense: Tensor, compressed: Tensor) -> tuple[float, int]:
    """Of normal distributions of unit variance with these means `(N, V)`."""
    return float((dense - compressed).double().square().sum()) / 2, len(dense)


def spread(batches: Sequence[Mapping[str, Any]], sequences: int) -> list[int]:
    """Numbers of batches, evenly spread, that hold about as many sequences as asked for, and at least one."""
    sizes = [rows(batch) for batch in batches]
    count = min(len(batches), max(1, round(sequences * len(batches) / max(1, sum(sizes)))))
    return [i * len(batches) // count for i in range(count)]


def rows(batch: Mapping[str, Any]) -> int:
    """Sequences in a batch."""
    inputs = batch.get("input_ids", next((v for v in batch.values() if isinstance(v, Tensor) and v.dim()), None))
    return 1 if inputs is None else len(inputs)
