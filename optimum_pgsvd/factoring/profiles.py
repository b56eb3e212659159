"""The profiles that ranks are chosen by: of the weights, of what layers give, or of what the loss depends on."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor
from transformers import PreTrainedModel

from ..calibration import Step, Weights
from ..config import PGSVDConfig
from ..errors import ConfigError
from ..linalg import output_spectrum, weighted_spectrum
from ..planning import dense_weight, measure_profiles
from ..structures import SVDProfile
from ..targets import Target, Targets
from .job import Clock, InPlace, Job, everything
from .measuring import measured, profiles_of, read
from .request import Calibration


def planning_profiles(
    model: PreTrainedModel,
    targets: Targets,
    config: PGSVDConfig,
    calibration: Calibration,
    weights: Weights | None = None,
    curvature: Mapping[str, Tensor] | None = None,
) -> dict[str, SVDProfile]:
    """The profiles that a request chooses ranks by, and those that an elastic checkpoint is to be cut by.

    Args:
        model: not changed.
        targets: of `find_targets`.
        config: the request.
        calibration: what it is calibrated on; a plan alone has no batches.
        weights: asked for the weights of one block at a time; by default all are in memory.
        curvature: of `curvature_of`, for profiles of the loss.

    Returns:
        By layer, in model order; none where nothing is chosen by them.

    Raises:
        ConfigError: they are to be measured on a calibration set, and there is none.
        CalibrationError: the calibration set leaves a layer without a token.
        NonFiniteError: a weight or an activation holds NaN or infinity.
    """
    if config.profile == "loss":
        refuse_plan_without_data(config, calibration)
        return loss_profiles(model, targets, config, calibration, curvature or {})
    if config.profile == "outputs":
        refuse_plan_without_data(config, calibration)
        return output_profiles(model, targets, config, calibration, weights)
    if (config.profile is None or config.searched) and not config.elastic:
        return {}
    if calibration.measurements is not None:
        return calibration.measurements.profiles(targets)
    return measure_profiles(model, targets, weights)


def refuse_plan_without_data(config: PGSVDConfig, calibration: Calibration) -> None:
    """Raise `ConfigError` where there is nothing that profiles of outputs or of the loss could be measured on."""
    measured, remedy = "gradients", ""
    if config.profile == "outputs":
        if calibration.measurements is not None:
            return
        measured, remedy = "outputs", "give a folder of `optimum-cli pgsvd measure` as dataset, "
    if not calibration.batches:
        raise ConfigError(
            f"allocation={config.allocation!r} chooses ranks by {measured} on a calibration set, so there is no plan "
            f"without one; {remedy}compress the model, whose report has the ranks, or plan with allocation='pareto'"
        )


def output_profiles(
    model: PreTrainedModel,
    targets: Targets,
    config: PGSVDConfig,
    calibration: Calibration,
    weights: Weights | None = None,
) -> dict[str, SVDProfile]:
    """What each rank of each target counts for its outputs: the singular values of `W G^½`.

    `Σ_{i>r} σ_i²` is the least error that rank r leaves in the outputs, summed over the calibration set. From
    measurements, or by a forward pass of the dense model over all batches. Where a bias is to be corrected, of what
    the outputs differ by from their mean.

    Args:
        model: not changed.
        targets: of `find_targets`.
        config: of the request.
        calibration: with batches, or measurements.
        weights: for measurements, as for `planning_profiles`.

    Returns:
        By layer, in model order.

    Raises:
        CalibrationError: the calibration set leaves a layer without a token.
        NonFiniteError: an activation holds NaN or infinity.
    """
    return walked(model, targets, config, calibration, weights, output_profile)


def output_profile(job: Job, step: Step, target: Target) -> SVDProfile:
    """What each rank of one layer counts for its outputs."""
    moments = step.recorder.moments(target.name, target.name in job.corrected)
    spectrum = output_spectrum(dense_weight(job.model, target.name), moments.measured)
    return SVDProfile(target.shape, spectrum.cpu())


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
    return walked(model, targets, config, calibration, None, partial(loss_profile, curvature=curvature))


def loss_profile(job: Job, step: Step, target: Target, curvature: Mapping[str, Tensor]) -> SVDProfile:
    """What each rank of one layer counts for the loss."""
    moments = step.recorder.moments(target.name, target.name in job.corrected)
    weight = dense_weight(job.model, target.name)
    spectrum = weighted_spectrum(weight, moments.measured, moments.energies, curvature[target.name])
    # Both moments are sums over tokens, and what the layer counts is one such sum.
    return SVDProfile(target.shape, spectrum.cpu() / math.sqrt(step.recorder.tokens[target.name]))


def walked(
    model: PreTrainedModel,
    targets: Targets,
    config: PGSVDConfig,
    calibration: Calibration,
    weights: Weights | None,
    measure: Callable[[Job, Step, Target], SVDProfile],
) -> dict[str, SVDProfile]:
    """What is measured of every target of the dense model, block by block."""
    parallel = copy.deepcopy(config)
    parallel.calibration, parallel.refine_steps = "parallel", 0
    job = Job(
        model, targets, everything(targets), calibration.batches, parallel, Clock(), InPlace(weights),
        measurements=calibration.measurements,
    )  # fmt: skip
    profiles: dict[str, SVDProfile] = {}
    for step in measured(job) if job.batches else read(job):
        profiles |= profiles_of(job, step, lambda target, step=step: measure(job, step, target))  # type: ignore[misc]
    return {name: profiles[name] for name in targets.names}
