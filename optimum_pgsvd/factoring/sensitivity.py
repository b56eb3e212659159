"""How much the model's predictions depend on each layer: measured before ranks are chosen."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from functools import partial

from torch import Tensor
from transformers import PreTrainedModel

from ..calibration import Step, measure_curvature
from ..config import PGSVDConfig
from ..errors import ConfigError
from ..linalg import weighted_spectrum
from ..planning import dense_weight
from ..structures import SVDProfile
from ..targets import Target, Targets
from .job import Clock, InPlace, Measuring, everything
from .measuring import measured, profiles_of
from .request import Calibration


def refuse_without_gradients(config: PGSVDConfig, because: str) -> None:
    """Raise `ConfigError` for a request that needs gradients where none can be measured."""
    if config.needs_curvature:
        raise ConfigError(
            f"objective={config.objective!r} with allocation={config.allocation!r} measures gradients, {because}; "
            "compress the model in memory with a dataset, or use objective='outputs' and allocation='pareto'"
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


def loss_profiles(
    model: PreTrainedModel,
    targets: Targets,
    config: PGSVDConfig,
    calibration: Calibration,
    curvature: Mapping[str, Tensor],
) -> dict[str, SVDProfile]:
    """What each rank of each target counts for the loss, by a forward pass of the dense model over all batches.

    Args:
        model: not changed.
        targets: of `find_targets`.
        config: of the request.
        calibration: with batches.
        curvature: of `curvature_of`.

    Raises:
        CalibrationError: the calibration set leaves a layer without a token.
        NonFiniteError: an activation holds NaN or infinity.
    """
    parallel = copy.deepcopy(config)
    parallel.calibration, parallel.refine_steps = "parallel", 0
    job = Measuring(model, targets, everything(targets), calibration.batches, parallel, Clock(), InPlace())
    profiles: dict[str, SVDProfile] = {}
    for step in measured(job):
        profiles |= profiles_of(job, step, partial(loss_profile, job, step, curvature))
    return {name: profiles[name] for name in targets.names}


def loss_profile(job: Measuring, step: Step, curvature: Mapping[str, Tensor], target: Target) -> SVDProfile:
    """What each rank of one layer counts for the loss."""
    moments = step.recorder.moments(target.name, target.name in job.corrected)
    weight = dense_weight(job.model, target.name)
    spectrum = weighted_spectrum(weight, moments.measured, moments.energies, curvature[target.name])
    # Both moments are sums over tokens, and what the layer counts is one such sum.
    return SVDProfile(target.shape, spectrum.cpu() / math.sqrt(step.recorder.tokens[target.name]))
