"""How much the loss of the data depends on the weights of each input feature."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..distributed import Peers
from ..errors import CalibrationError, NonFiniteError
from .forward import evaluating
from .losses import asking_for_loss, loss_of


class GradientRecorder:
    """Accumulates, over backward passes, the squared gradients of each weight, summed over its outputs.

    Each weight's gradient exists only until it is squared.

    Args:
        layers: linear layers by name.
    """

    def __init__(self, layers: Mapping[str, Any]):
        self.layers = layers
        self.energies = {
            name: torch.zeros(inputs_first(layer, layer.weight).shape[0], dtype=torch.float64)
            for name, layer in layers.items()
        }

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """A context in which backward passes give the gradients of these weights, and no others.

        Afterwards the model's parameters have the gradients that they had before.
        """
        before = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
        hooks = []
        try:
            for parameter in before:
                parameter.grad = None
                parameter.requires_grad_(False)
            for name, layer in self.layers.items():
                layer.weight.requires_grad_(True)
                hooks.append(layer.weight.register_post_accumulate_grad_hook(lambda _, name=name: self.add(name)))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for parameter, (requires, gradient) in before.items():
                parameter.requires_grad_(requires)
                parameter.grad = gradient

    def add(self, name: str) -> None:
        """Take the gradient of a layer's weight, which is that of one sample."""
        weight = self.layers[name].weight
        gradient = inputs_first(self.layers[name], weight.grad)
        self.energies[name] += gradient.double().square().sum(1).cpu()
        weight.grad = None


def inputs_first(layer: nn.Module, matrix: Tensor) -> Tensor:
    """A matrix of the shape of a layer's weight, as `(inputs, outputs)`."""
    return matrix if isinstance(layer, Conv1D) else matrix.T


def measure_gradient_energies(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """For each input feature of each layer, `Σ_d Σ_i (∂ℓ_d / ∂W_ij)²` over samples d and outputs i.

    The empirical Fisher information: labels are those of the data, of a causal language model its next tokens, and a
    sample is one sequence of a batch. A forward and a backward pass of the whole model for each sample, which gives
    one weight's gradient at a time; each of several processes takes its share of the batches.

    Args:
        model: with all weights in memory; not changed.
        layers: linear layers of it by name.
        batches: model inputs.

    Returns:
        `(n,)` float64 by layer, where the weight is.

    Raises:
        CalibrationError: the model does not accept a batch, gives no loss for it, or the loss does not depend on a
            layer.
        NonFiniteError: a gradient is NaN or infinite.

    Source:
        arXiv 2207.00112 (FWSVD), up to the number of samples.
    """
    peers, recorder = Peers(), GradientRecorder(layers)
    with recorder.watching(model), evaluating(model), torch.enable_grad():
        for number in logging.tqdm(peers.mine(len(batches)), desc="Measuring gradients", unit="batch", disable=None):
            for sample in samples(asking_for_loss(model, batches[number])):
                loss_of(model, sample, number).backward()
    found = {name: peers.sum(energies) for name, energies in recorder.energies.items()}
    for name, energies in found.items():
        check_energies(name, energies)
    return {name: energies.to(layers[name].weight.device) for name, energies in found.items()}  # type: ignore[arg-type]


def samples(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The sequences of a batch one by one; all of it where not all of its tensors have one row for each.

    A loss that contrasts the examples of a batch with one another is of all of them, too.
    """
    sizes = {len(value) if value.dim() else 0 for value in batch.values() if isinstance(value, Tensor)}
    if len(sizes) != 1 or batch.get("return_loss"):
        return [dict(batch)]
    return [
        {key: value[i : i + 1] if isinstance(value, Tensor) else value for key, value in batch.items()}
        for i in range(sizes.pop())
    ]


def check_energies(name: str, energies: Tensor) -> None:
    """Find what makes the gradients of a layer's weight useless.

    Raises:
        CalibrationError: they are all zero.
        NonFiniteError: one is NaN or infinite.
    """
    if not energies.isfinite().all():
        raise NonFiniteError(
            f"the gradients of the weight of {name} hold NaN or infinity; run the model in float32 or bfloat16"
        )
    if not energies.any():
        raise CalibrationError(
            f"the loss on the calibration set does not depend on {name}: list it in modules_to_not_convert, give "
            "inputs that use it, or use a solver that needs no gradients, such as solver='eigh'"
        )
