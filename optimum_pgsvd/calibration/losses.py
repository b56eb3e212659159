"""The loss that a model itself computes on batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from .data import is_causal
from .forward import evaluating, forward
from .processing import IGNORED


Batch = Mapping[str, Any]


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


def loss_of(model: nn.Module, batch: Batch, number: int = 0) -> Tensor:
    """The model's own loss on a batch, the mean over what it predicts.

    The batch's labels are used where it has any. A causal language model is asked for the next token otherwise,
    padding left out, and a model that compares images with texts for its contrastive loss.

    Args:
        model: run as it is, with gradients where they are enabled.
        batch: keyword arguments of its `forward`.
        number: of the batch, for errors.

    Returns:
        A scalar.

    Raises:
        CalibrationError: the model has no loss on such a batch, or does not accept it.
    """
    outputs = forward(model, asking_for_loss(model, batch), number, True)
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if not isinstance(loss, Tensor):
        raise CalibrationError(
            f"{type(model).__name__} gives no loss for calibration batch {number}, which has no labels but "
            f"{', '.join(batch)}: give batches with 'labels', and a model with a head that predicts them"
        )
    return loss


def asking_for_loss(model: Any, batch: Batch) -> dict[str, Any]:
    """A batch with what makes the model return a loss, as far as that is known."""
    if "labels" in batch or "input_ids" not in batch:
        return dict(batch)
    if is_causal(model):
        mask = batch.get("attention_mask")
        padding = batch["input_ids"].new_zeros(()).bool() if mask is None else mask == 0
        return {**batch, "labels": batch["input_ids"].masked_fill(padding, IGNORED)}
    return {**batch, "return_loss": True} if hasattr(model, "logit_scale") else dict(batch)


def predictions_in(model: Any, batch: Batch) -> int:
    """How many predictions the mean of `loss_of` is over: tokens with a label, or examples."""
    labels = asking_for_loss(model, batch).get("labels")
    if labels is None:
        return max((len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim()), default=1)
    counted = labels[..., 1:] if is_causal(model) and labels.dim() > 1 else labels
    return int((counted != IGNORED).sum())
