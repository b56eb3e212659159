"""The mean loss of a model over a set of batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration import loss_of, predictions_in
from ..calibration.forward import evaluating
from ..errors import CalibrationError


Batch = Mapping[str, Any]


def exact_loss(model: nn.Module, batch: Batch, number: int) -> Tensor:
    """`loss_of`, in a precision in which changes of it can be seen.

    Raises:
        CalibrationError: see `loss_of`; or the model computes its loss in half precision.
    """
    loss = loss_of(model, batch, number)
    if loss.dtype in (torch.float16, torch.bfloat16):
        step = torch.finfo(loss.dtype).eps
        raise CalibrationError(
            f"{type(model).__name__} computes its loss in {loss.dtype}, in steps of {step:.1g} of it, which hides "
            "what compressing it changes; load the model in float32 (--dtype float32)"
        )
    return loss


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """The loss per prediction over all batches, each a forward pass.

    Raises:
        CalibrationError: see `exact_loss`; or there is nothing to predict.
    """
    with evaluating(model):
        losses = [float(exact_loss(model, batch, number)) for number, batch in enumerate(batches)]
    counts = [predictions_in(model, batch) for batch in batches]
    if not sum(counts):
        raise CalibrationError("there is nothing to predict in the batches: give longer texts, or other labels")
    return math.fsum(loss * count for loss, count in zip(losses, counts, strict=True) if count) / sum(counts)
