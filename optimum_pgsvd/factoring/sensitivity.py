"""Gradients: how much the model's predictions depend on each layer, measured before ranks are chosen."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from ..calibration import measure_curvature, measure_gradient_energies
from ..config import PGSVDConfig
from ..errors import ConfigError
from ..targets import Targets
from .request import Calibration


def refuse_without_gradients(config: PGSVDConfig, because: str) -> None:
    """Raise `ConfigError` for a request that needs gradients where none can be measured."""
    if config.needs_curvature:
        raise ConfigError(
            f"objective={config.objective!r} with allocation={config.allocation!r} measures gradients, {because}; "
            "compress the model in memory with a dataset, or use objective='outputs' and allocation='pareto'"
        )
    if config.needs_gradients:
        raise ConfigError(
            f"solver={config.solver!r} measures gradients, {because}; compress the model in memory with a dataset, or "
            "use solver='eigh'"
        )


def curvature_of(
    model: PreTrainedModel, targets: Targets, config: PGSVDConfig, calibration: Calibration
) -> dict[str, Tensor]:
    """What the loss depends on, of every target.

    Raises:
        ConfigError: the dataset is a folder of measurements, which holds no gradients.
        CalibrationError: see `measure_curvature`.
        NonFiniteError: see `measure_curvature`.
    """
    if calibration.measurements is not None:
        refuse_without_gradients(config, "and the measurements that are the dataset hold none")
    layers = {name: model.get_submodule(name) for name in targets.names}
    return measure_curvature(model, layers, calibration.batches, config.seed)


def gradient_energies_of(
    model: PreTrainedModel, targets: Targets, config: PGSVDConfig, calibration: Calibration
) -> dict[str, Tensor]:
    """How much the loss of the data depends on the weights of each input feature, of every target.

    Raises:
        ConfigError: the dataset is a folder of measurements, which holds no gradients.
        CalibrationError: see `measure_gradient_energies`.
        NonFiniteError: see `measure_gradient_energies`.
    """
    if calibration.measurements is not None:
        refuse_without_gradients(config, "and the measurements that are the dataset hold none")
    layers = {name: model.get_submodule(name) for name in targets.names}
    return measure_gradient_energies(model, layers, calibration.batches)
