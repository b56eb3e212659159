"""One layer: its factors, from what was measured of it, and how good they are."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..calibration import GramRecorder
from ..config import PGSVDConfig
from ..errors import CalibrationError
from ..linalg import relative_errors, relative_weight_error
from ..measurements import StoredMoments
from ..planning import dense_weight
from ..report import LayerReport
from ..solvers import SOLVERS, eigh_of_loss, eigh_of_outputs
from ..storing import activation_error, constant_part, stored, with_bias
from ..structures import LinearShape, LowRankFactors, Moments, StoredFactors
from ..targets import Target
from .job import Job


Recorder = GramRecorder | StoredMoments


def factor_layer(job: Job, layer: LayerReport, recorder: Recorder | None) -> tuple[LayerReport, StoredFactors]:
    """Factor one layer; errors are those of the factors as stored, after rounding to the model's dtype."""
    start, config = time.perf_counter(), job.config
    weight = dense_weight(job.model, layer.name)
    if recorder is not None:
        check_reached(recorder, [layer.name])
    corrected = layer.name in job.corrected
    moments = recorder.moments(layer.name, corrected) if recorder else None
    goal = recorder.goal(layer.name, weight, corrected) if recorder else weight
    solved = solve_measured(job, layer.name, goal, moments, recorder, rank_to_solve(layer))
    factors = stored(solved, moments, config.storage, weight.dtype)
    constant, means = (0.0, 0.0), None if moments is None else moments.means
    if corrected:
        factors = with_bias(factors, weight, dense_bias(job, layer.name), means)
    if means is not None:
        constant = constant_part(weight, factors, dense_bias(job, layer.name), means)
    if layer.rank is not None:
        weight_error, activation_error = errors(weight, goal, solved, factors, moments, constant)
        layer = replace(layer, weight_error=weight_error, activation_error=activation_error)
        layer = replace(layer, bias_corrected=means is not None)
    tokens = recorder.tokens[layer.name] if recorder else 0
    return replace(layer, tokens=tokens, seconds=time.perf_counter() - start), factors


def rank_to_solve(layer: LayerReport) -> int:
    """The rank of a layer's factors; of one that stays dense, the largest that saves parameters."""
    return layer.rank or LinearShape(*layer.shape).largest_saving_rank


def solve_measured(
    job: Job, name: str, goal: Tensor, moments: Moments | None, recorder: Recorder | None, rank: int
) -> LowRankFactors:
    """The factors of one layer, by what was measured of it.

    Raises:
        CalibrationError: the solver inverts a Gram matrix that is singular.
    """
    config, inputs = job.config, goal.shape[1]
    tokens = recorder.tokens[name] if recorder else 0
    if SOLVERS.trait(config.solver, "inverts") and recorder and tokens < inputs:
        raise singular(name, tokens, inputs, config.solver)
    try:
        return solve(goal, moments, job.gradients.get(name), rank, config)
    except torch.linalg.LinAlgError as error:
        assert recorder is not None
        raise singular(name, tokens, inputs, config.solver) from error


def solve(
    goal: Tensor, moments: Moments | None, gradients: Tensor | None, rank: int, config: PGSVDConfig
) -> LowRankFactors:
    """The factors of one layer, by the config's solver and objective."""
    if moments is not None and gradients is not None and config.objective == "loss":
        return eigh_of_loss(goal, moments, gradients, rank)
    if moments is not None and moments.outputs is not None:
        return eigh_of_outputs(goal, moments.outputs, moments.energies, rank)
    known = {"gradients": gradients}
    if moments is not None:
        known |= {"gram": moments.gram, "magnitudes": moments.magnitudes}
    needed = known.get(SOLVERS.trait(config.solver, "needs"))
    return SOLVERS[config.solver](goal, needed, rank, config.num_iterations)  # type: ignore[arg-type]


def singular(name: str, tokens: int, inputs: int, solver: str) -> CalibrationError:
    """The error for a layer whose Gram matrix is to be inverted and is singular."""
    return CalibrationError(
        f"solver={solver!r} inverts the Gram matrix of the inputs of {name}, which is singular: it saw {tokens} "
        f"calibration tokens and has {inputs} input features, some of which are always zero or follow from others, as "
        "behind an embedding of which few rows were used; give more data (num_samples, sequence_length), or use "
        "solver='eigh', which finds the same factors without an inverse"
    )


def dense_bias(job: Job, name: str) -> Tensor:
    """The bias of a layer that is still dense."""
    bias: Any = job.model.get_submodule(name).bias
    return bias.detach()


def errors(
    weight: Tensor,
    goal: Tensor,
    solved: LowRankFactors,
    kept: StoredFactors,
    moments: Moments | None,
    constant: tuple[float, float] = (0.0, 0.0),
) -> tuple[float, float | None]:
    """The relative errors of a layer's weight, and of its outputs by whatever was measured of it."""
    if goal is weight and moments is not None and moments.gram is not None:
        return relative_errors(weight, kept.left, kept.right, moments.gram, constant)
    weight_error = relative_weight_error(weight, kept.left, kept.right)
    return weight_error, None if moments is None else activation_error(goal, solved, kept, moments, constant)


def coverage_notes(config: PGSVDConfig, targets: Iterable[Target], tokens: Mapping[str, int]) -> list[str]:
    """A note where the calibration set is thin, given the tokens that each layer saw."""
    thin = [target for target in targets if tokens.get(target.name, 0) < target.shape.in_features]
    if not thin or not config.needs_dataset:
        return []
    return [
        f"{len(thin)} layers saw fewer calibration tokens than they have input features "
        f"({min(tokens.get(target.name, 0) for target in thin)} tokens, "
        f"{max(target.shape.in_features for target in thin)} features): their factors fit only what they saw; raise "
        "num_samples or sequence_length, or give more data"
    ]


def check_reached(recorder: Recorder, names: Sequence[str]) -> None:
    """Raise `CalibrationError` for a layer that no token of the calibration set reached."""
    if unseen := [name for name in names if recorder.tokens[name] == 0]:
        raise unreached(unseen)


def unreached(names: Sequence[str]) -> CalibrationError:
    """The error for layers that the calibration set never reached."""
    return CalibrationError(
        f"the calibration set never reached {len(names)} layers, {', '.join(names[:3])} among them: give inputs "
        "that use them (images for a vision tower, say), or list them in modules_to_not_convert"
    )
