"""How much the model's predictions depend on the outputs of each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..distributed import Peers
from ..errors import CalibrationError, NonFiniteError
from ..targets import weight_shape
from .forward import evaluating, forward
from .moments import SecondMoment


# Predictions are softened to this temperature. What the model is sure of costs nothing to the second order, yet it is
# lost where a layer is compressed much; softened, it counts. At 2, models of every entropy measured did well: one that
# is nearly certain of each token much better than at 1, the others as well or better; at 4 nothing more was gained.
TEMPERATURE = 2.0


# What configs call the tokens that keep the places of images and sounds in a text.
PLACES = ("image_token_id", "image_token_index", "video_token_id", "video_token_index", "audio_token_id")


class CurvatureRecorder:
    """Accumulates, over backward passes, the second moment of the gradients at each layer's outputs.

    With g the gradient of the loss of one sequence at the outputs of one token, it is `B = Σ g gᵀ (m, m)`, or for a
    tall layer `Wᵀ B W (n, n)`: the smaller of the two, and all that `weighted_projection` needs.

    Args:
        layers: linear layers by name.
    """

    def __init__(self, layers: Mapping[str, Any]):
        self.layers = layers
        self._moments = {name: SecondMoment() for name in layers}
        self._hooks = ExitStack()

    def __enter__(self) -> CurvatureRecorder:
        for name, layer in self.layers.items():

            def hook(module: nn.Module, args: tuple, outputs: Tensor, name: str = name) -> Tensor:
                return self.watch(name, outputs)

            self._hooks.callback(layer.register_forward_hook(hook).remove)
        return self

    def __exit__(self, *exception) -> None:
        self._hooks.close()

    def watch(self, name: str, outputs: Tensor) -> Tensor:
        """The outputs of a layer, with their gradient added to its moment once there is one."""
        if not outputs.requires_grad:  # nothing before it does: the model's weights are frozen
            outputs = outputs.detach().requires_grad_() * 1
        outputs.register_hook(lambda gradient: self.add(name, gradient))
        return outputs

    def add(self, name: str, gradient: Tensor) -> None:
        """Add the gradient at a layer's outputs `(..., m)`."""
        layer = self.layers[name]
        rows = gradient.detach().reshape(-1, gradient.shape[-1])
        shape = weight_shape(layer)
        if shape.out_features > shape.in_features:
            rows = rows @ (layer.weight.T if isinstance(layer, Conv1D) else layer.weight).detach()
        self._moments[name].add(rows)

    def metrics(self, peers: Peers) -> dict[str, Tensor]:
        """What was measured in all processes: `B (m, m)`, or `Wᵀ B W (n, n)` for m > n, by layer.

        Raises:
            CalibrationError: the predictions do not depend on a layer.
            NonFiniteError: a gradient was NaN or infinite.
        """
        return {name: self._metric(name, layer, peers) for name, layer in self.layers.items()}

    def _metric(self, name: str, layer: Any, peers: Peers) -> Tensor:
        moment = self._moments[name]
        moment.sum_over(peers, layer.weight.new_empty(0, weight_shape(layer).full_rank))
        energy = moment.value().diagonal().sum()
        if not torch.isfinite(energy):
            raise NonFiniteError(
                f"the gradients at the outputs of {name} hold NaN or infinity; run the model in float32 or bfloat16"
            )
        if energy == 0:
            raise CalibrationError(
                f"what the model predicts on the calibration set does not depend on {name}: list it in "
                "modules_to_not_convert, give inputs that use it, or use objective='outputs'"
            )
        return moment.value()


def measure_curvature(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Mapping[str, Any]], seed: int = 0
) -> dict[str, Tensor]:
    """The Fisher information of the model's predictions about each layer's outputs, summed over the calibration set.

    The expected second derivative of the divergence between what the dense model predicts and what a compressed one
    does. A forward and a backward pass of the whole model for each batch, without gradients of weights; each of
    several processes takes its share of the batches.

    Args:
        model: with all weights in memory; not changed.
        layers: linear layers of it by name.
        batches: model inputs.
        seed: of the labels that are drawn.

    Returns:
        See `CurvatureRecorder.metrics`.

    Raises:
        CalibrationError: the model does not accept a batch, or the predictions do not depend on a layer.
        NonFiniteError: a gradient is NaN or infinite.

    Source:
        The factor of K-FAC on the side of the outputs (arXiv 1503.05671), with labels from the model as there.
    """
    peers = Peers()
    numbers = peers.mine(len(batches))
    # Each batch draws from a generator of its own, so that it does not matter which process has which. A generator
    # takes 32 bits of its seed.
    seeds = torch.randint(2**32, (len(batches),), generator=torch.Generator().manual_seed(seed))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        with CurvatureRecorder(layers) as recorder, evaluating(model), torch.enable_grad():
            for number in logging.tqdm(numbers, desc="Measuring gradients", unit="batch", disable=None):
                draws = torch.Generator().manual_seed(int(seeds[number]))
                outputs = forward(model, batches[number], number, True)
                surprise(outputs, predicted(model, batches[number]), draws).backward()
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
    return recorder.metrics(peers)


def predicted(model: Any, batch: Mapping[str, Any]) -> Tensor | None:
    """Which tokens of a batch the model's predictions are about: those of the decoder, where there are two.

    Not about what keeps the places of images and sounds in a text: nobody asks for these, and no model learns them.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        return batch.get("decoder_attention_mask")
    mask, ids = batch.get("attention_mask"), batch.get("input_ids")
    places = [getattr(model.config, name, None) for name in PLACES]
    held = [place for place in places if isinstance(place, int)]
    if ids is None or not held:
        return mask
    before = torch.isin(ids, torch.tensor(held, device=ids.device)).roll(-1, 1)
    before[:, -1] = False
    return (torch.ones_like(ids) if mask is None else mask) * ~before if bool(before.any()) else mask


def surprise(outputs: Any, mask: Tensor | None, draws: torch.Generator) -> Tensor:
    """The negative log-likelihood, summed, of labels drawn from what the model itself predicts.

    Predictions are the softened softmax of every output that is named logits; of a model without any, its first output
    is the mean of a normal distribution of unit variance. Padding is left out.

    Args:
        outputs: of the model, a `ModelOutput`.
        mask: `(batch, tokens)`, 0 for padding; `None` where there is none.
        draws: on the CPU, whatever the model is on.
    """
    logits = [value for key, value in outputs.items() if "logits" in key and isinstance(value, Tensor)]
    if not logits:
        return normal_surprise(real(first_states(outputs), mask), draws)
    return sum((categorical_surprise(real(value, mask), draws) for value in logits), logits[0].new_zeros(()))


def first_states(outputs: Any) -> Tensor:
    """The first of a model's outputs that is not its loss."""
    return next(value for key, value in outputs.items() if key != "loss" and isinstance(value, Tensor))


def categorical_surprise(logits: Tensor, draws: torch.Generator) -> Tensor:
    """Of labels drawn from the softened softmax of logits `(N, V)`; a single logit is a regression."""
    if logits.shape[-1] == 1:
        return normal_surprise(logits, draws)
    log_probabilities = (logits.float() / TEMPERATURE).log_softmax(-1)
    chance = torch.rand(len(logits), 1, generator=draws).to(logits.device)
    labels = (log_probabilities.detach().exp().cumsum(-1) < chance).sum(-1).clamp(max=logits.shape[-1] - 1)
    return -log_probabilities.gather(-1, labels[:, None]).sum()


def normal_surprise(mean: Tensor, draws: torch.Generator) -> Tensor:
    """Of labels drawn from a normal distribution of unit variance, up to a constant."""
    noise = torch.randn(mean.shape, generator=draws).to(mean.device)
    return (mean.float() * noise).sum()


def real(values: Tensor, mask: Tensor | None) -> Tensor:
    """An output `(..., V)` as rows `(N, V)`, those of padding left out where it has one for each token."""
    rows = values.reshape(-1, values.shape[-1])
    if mask is None or mask.shape != values.shape[:-1]:
        return rows
    return rows[mask.to(rows.device).reshape(-1).bool()]
