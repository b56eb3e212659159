"""How a model is run to be measured."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError, PGSVDError


# What inputs made of images and sounds are called.
MEDIA = ("pixel_values", "input_features", "input_values")


def forward(model: nn.Module, batch: Mapping[str, Any], number: int, whole: bool) -> Any:
    """Run a model on a batch.

    Args:
        model: of which not all weights need be in memory.
        batch: keyword arguments of its `forward`.
        number: of the batch, for the error.
        whole: whether the logits of every token are needed.

    Returns:
        What the model does.

    Raises:
        CalibrationError: the model does not accept the batch.
    """
    inputs = on_device(batch, model)
    spared = not whole and inputs.get("labels") is None  # labels ask for a loss, and may be inputs besides
    if spared and "logits_to_keep" in inspect.signature(model.forward).parameters:
        inputs.setdefault("logits_to_keep", 1)
    try:
        return model(**inputs)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, (PGSVDError, torch.OutOfMemoryError)):
            raise
        given = ", ".join(f"{key} {tuple(getattr(value, 'shape', ()))}" for key, value in batch.items())
        raise CalibrationError(
            f"{type(model).__name__} does not accept calibration batch {number} with the inputs {given}: {error}"
            f"{absent_media(model, batch)}"
        ) from error


def absent_media(model: nn.Module, batch: Mapping[str, Any]) -> str:
    """What to do where a model of images or sounds was given a batch without any; nothing for others."""
    taken = inspect.signature(model.forward).parameters
    absent = [name for name in MEDIA if name in taken and name not in batch]
    return f"; it takes {' and '.join(absent)} too: give images or sounds with the texts" if absent else ""


def on_device(batch: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """A batch where the model takes its inputs."""
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No gradients, no dropout, no key-value cache; afterwards everything is as it was.

    A module that takes the place of another meanwhile trains where the module around it does.
    """
    training = {name: module.training for name, module in model.named_modules()}
    configs = {id(c): c for module in model.modules() if (c := getattr(module, "config", None)) is not None}
    caching = [config for config in configs.values() if getattr(config, "use_cache", False)]
    model.eval()
    for config in caching:
        config.use_cache = False
    try:
        with torch.no_grad():
            yield
    finally:
        for config in caching:
            config.use_cache = True
        for name, module in model.named_modules():
            module.training = training.setdefault(name, training.get(name.rpartition(".")[0], False))


def kind(batch: Mapping[str, Any]) -> frozenset[str]:
    """Which inputs a batch holds."""
    return frozenset(key for key, value in batch.items() if value is not None)
