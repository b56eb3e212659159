"""The mean loss of a model over a set of batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..calibration import loss_of, predictions_in
from ..calibration.forward import evaluating
from ..errors import CalibrationError


Batch = Mapping[str, Any]


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """The loss per prediction over all batches, each a forward pass.

    Raises:
        CalibrationError: see `loss_of`; or there is nothing to predict.
    """
    with evaluating(model):
        losses = [float(loss_of(model, batch, number)) for number, batch in enumerate(batches)]
    counts = [predictions_in(model, batch) for batch in batches]
    if not sum(counts):
        raise CalibrationError("there is nothing to predict in the batches: give longer texts, or other labels")
    return math.fsum(loss * count for loss, count in zip(losses, counts, strict=True) if count) / sum(counts)
