"""Gradients of the loss at each layer: what Theorem 1 is made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..calibration import Batch, exact_loss, predictions_in
from ..calibration.forward import evaluating
from ..errors import CalibrationError, NonFiniteError


@dataclass(frozen=True, eq=False)
class Gradients:
    """The loss of a model over a set of batches, and its gradients at some layers.

    Args:
        loss: L, per prediction.
        outputs: `α'_l = ‖∂L/∂Y_l‖_F` of each layer, over the outputs for every token.
        weights: `∂L/∂W_l (m, n)` of each layer, in the dtype of its weight or better.
    """

    loss: float
    outputs: Mapping[str, float]
    weights: Mapping[str, Tensor]


def measure_gradients(model: nn.Module, layers: Mapping[str, Any], batches: Sequence[Batch]) -> Gradients:
    """Gradients of the mean loss: a forward and a backward pass of the whole model for each batch.

    Args:
        model: with all weights in memory; not changed.
        layers: linear layers of it by name.
        batches: model inputs.

    Returns:
        The gradients.

    Raises:
        CalibrationError: see `exact_loss`; or the loss does not depend on a layer.
        NonFiniteError: a gradient is NaN or infinite.

    Source:
        arXiv 2510.05544, Theorem 1.
    """
    counts = [predictions_in(model, batch) for batch in batches]
    total, squares = 0.0, dict.fromkeys(layers, 0.0)
    with only_trained(model, layers), evaluating(model), torch.enable_grad(), watched(layers, squares):
        for number in logging.tqdm(range(len(batches)), desc="Measuring gradients", unit="batch", disable=None):
            loss = exact_loss(model, batches[number], number) * (counts[number] / sum(counts))
            loss.backward()
            total += float(loss.detach())
        weights = {name: taken_gradient(name, layer) for name, layer in layers.items()}
    check_gradients(squares)
    return Gradients(total, {name: square**0.5 for name, square in squares.items()}, weights)


@contextmanager
def only_trained(model: nn.Module, layers: Mapping[str, Any]) -> Iterator[None]:
    """A context in which gradients are kept of these layers' weights only; those that there were are back after it."""
    before = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    try:
        for parameter in before:
            parameter.requires_grad_(False)
            parameter.grad = None
        for layer in layers.values():
            layer.weight.requires_grad_(True)
        yield
    finally:
        for parameter, (trained, gradient) in before.items():
            parameter.requires_grad_(trained)
            parameter.grad = gradient


@contextmanager
def watched(layers: Mapping[str, Any], squares: dict[str, float]) -> Iterator[None]:
    """A context in which the squared norms of gradients at the layers' outputs are added up."""

    def add(name: str, gradient: Tensor) -> None:
        squares[name] += float(gradient.detach().double().square().sum())

    def watch(name: str, outputs: Tensor) -> None:
        outputs.register_hook(lambda gradient: add(name, gradient))

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hook = layer.register_forward_hook(lambda module, args, outputs, name=name: watch(name, outputs))
            hooks.callback(hook.remove)
        yield


def taken_gradient(name: str, layer: Any) -> Tensor:
    """The gradient at a layer's weight, outputs first."""
    gradient = layer.weight.grad
    if gradient is None:
        raise unmoved(name)
    return gradient.T if isinstance(layer, Conv1D) else gradient


def check_gradients(squares: Mapping[str, float]) -> None:
    """Raise an error for a layer whose gradients cannot be used."""
    for name, square in squares.items():
        if not square < float("inf"):
            raise NonFiniteError(
                f"the gradients at the outputs of {name} hold NaN or infinity; run the model in float32 or bfloat16"
            )
        if square == 0:
            raise unmoved(name)


def unmoved(name: str) -> CalibrationError:
    """The error for a layer that the loss does not depend on."""
    return CalibrationError(
        f"the loss on the calibration set does not depend on {name}: list it in modules_to_not_convert, or give "
        "inputs that use it"
    )
