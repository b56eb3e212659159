"""Measured once, for all plans: the moments of a model's layers, or their factors in order of importance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..calibration import GramRecorder, Step
from ..config import BUDGETS, PGSVDConfig
from ..distributed import Peers
from ..errors import ConfigError, DistributedError
from ..linalg import output_errors_by_rank
from ..planning import dense_weight, measure_profiles, refuse_without_search
from ..solvers import SOLVERS
from ..structures import LayerPlan, LowRankFactors, RankPlan, SVDProfile
from ..targets import Target, Targets
from .job import Clock, InPlace, Job, MomentsMade, everything
from .layer import Recorder, check_reached, coverage_notes, solve_measured
from .measuring import measured, read
from .profiles import loss_profile, output_profile
from .request import Calibration, refuse_absent_weights
from .sensitivity import curvature_of, gradient_energies_of


@dataclass(frozen=True, eq=False)
class Once:
    """What a model can be planned by as often as one likes, without data.

    Args:
        config: of the request that it was measured for.
        targets: of which.
        profiles: by what they are of, `"weights"` and where allocations want them `"outputs"` and `"loss"`, and by
            layer.
        notes: of a calibration set that is thin; whoever makes use of the rest is to be told.
    """

    config: PGSVDConfig
    targets: Targets
    profiles: Mapping[str, Mapping[str, SVDProfile]]
    notes: Sequence[str] = field(default=(), kw_only=True)

    def profiles_for(self, request: PGSVDConfig) -> Mapping[str, SVDProfile]:
        """The profiles that a request chooses ranks by.

        Raises:
            ConfigError: they were not measured, or are to be found by a search.
        """
        refuse_without_search(request)
        if request.profile is None:
            return {}
        if request.profile not in self.profiles:
            raise ConfigError(
                f"allocation={request.allocation!r} chooses ranks by profiles of {request.profile}, which were not "
                f"measured: give allocations=[{request.allocation!r}] beforehand"
            )
        return self.profiles[request.profile]


@dataclass(frozen=True, eq=False)
class Kept(Once):
    """Moments of all layers, in memory: the model is solved anew at each plan, by any solver.

    Args:
        moments: take the place of a calibration set in a `Job`; `None` for a solver that uses no data.
        gradients: as in a `Job`.
    """

    moments: MomentsMade | None = None
    gradients: Mapping[str, Tensor] = field(default_factory=dict)


class KeptMoments:
    """The recorders of a walk that is over, as `Measurements` has them on disk."""

    def __init__(self) -> None:
        self.recorders: list[GramRecorder] = []

    def of_block(self, targets: Sequence[Target]) -> GramRecorder | None:
        """The recorder of some layers of one block."""
        return next((each for each in self.recorders if all(target.name in each.tokens for target in targets)), None)


@dataclass(frozen=True, eq=False)
class Activations:
    """What the calibration set says of one layer and its factors, in numbers.

    Args:
        tokens: that the layer saw.
        input_norm: `‖X‖_F`.
        output_norm: `‖W Xᵀ‖_F`.
        errors: `‖(W − left_r right_r) Xᵀ‖_F / ‖W Xᵀ‖_F` of the r leading components, for r = 0 … the rank of the
            factors, float64; before the factors are rounded.
    """

    tokens: int
    input_norm: float
    output_norm: float
    errors: Tensor


@dataclass(frozen=True, eq=False)
class Ordered(Once):
    """Factors that can be cut at any plan: nothing is decomposed again.

    Args:
        factors: of every target that factors can make smaller, in the model's dtype, at the largest rank that does,
            most important component first.
        activations: of each of them; empty for a solver that uses no data.
    """

    factors: Mapping[str, LowRankFactors] = field(default_factory=dict)
    activations: Mapping[str, Activations] = field(default_factory=dict)


def ordered_factors(
    model: PreTrainedModel,
    targets: Targets,
    config: PGSVDConfig,
    calibration: Calibration,
    allocations: Sequence[str] = (),
    clock: Clock | None = None,
) -> Ordered:
    """Measure and solve every target once, for all plans: one walk over the calibration set.

    Args:
        model: dense, in memory; not changed.
        targets: of `find_targets`.
        config: the request; its budget has no effect.
        calibration: of `calibration_of`.
        allocations: that plans will be made by, besides the config's.
        clock: takes the seconds of each step.

    Returns:
        The factors, and what ranks are chosen by.

    Raises:
        ConfigError: factors of one rank are not the leading components of those of a higher one; or an allocation
            cannot be used with this config.
        DistributedError: there are several processes.
        CalibrationError: the calibration set leaves a layer without a token, or does not fit the model.
        NonFiniteError: a weight, an activation or a gradient holds NaN or infinity.
    """
    check_nested(config)
    factors: dict[str, LowRankFactors] = {}
    activations: dict[str, Activations] = {}

    def visit(job: Job, target: Target, recorder: Recorder | None) -> None:
        if target.shape.largest_saving_rank:
            factors[target.name], seen = leading_factors(job, target, recorder)
            activations.update({target.name: seen} if seen else {})

    _, profiles, notes = walk_once(model, targets, config, calibration, allocations, clock, visit)
    held = {name: factors[name] for name in targets.names if name in factors}
    return Ordered(config, targets, profiles, held, activations, notes=notes)


def keep_moments(
    model: PreTrainedModel,
    targets: Targets,
    config: PGSVDConfig,
    calibration: Calibration,
    allocations: Sequence[str] = (),
    clock: Clock | None = None,
) -> Kept:
    """Measure every target once, for all plans: for solvers and options whose factors cannot be cut.

    Args:
        model: as for `ordered_factors`.
        targets: as for `ordered_factors`.
        config: as for `ordered_factors`; its solver decides what is measured.
        calibration: as for `ordered_factors`.
        allocations: as for `ordered_factors`.
        clock: as for `ordered_factors`.

    Returns:
        The moments, in memory: up to n² numbers for every distinct input of a layer.

    Raises:
        ConfigError: what is measured of a layer depends on the ranks of those before it.
        PGSVDError: as `ordered_factors`.
    """
    check_parallel(config)
    moments = KeptMoments()

    def visit(job: Job, target: Target, recorder: Recorder | None) -> None:
        if isinstance(recorder, GramRecorder) and recorder not in moments.recorders:
            moments.recorders.append(recorder)

    job, profiles, notes = walk_once(model, targets, config, calibration, allocations, clock, visit)
    found: MomentsMade | None = moments if calibration.batches else calibration.measurements
    return Kept(config, targets, profiles, found, job.gradients, notes=notes)


def walk_once(
    model: PreTrainedModel,
    targets: Targets,
    config: PGSVDConfig,
    calibration: Calibration,
    allocations: Sequence[str],
    clock: Clock | None,
    visit: Callable[[Job, Target, Recorder | None], None],
) -> tuple[Job, dict[str, dict[str, SVDProfile]], list[str]]:
    """Measure what allocations want of every target, and let each be visited with what was measured of it.

    Returns:
        What was done, the profiles by kind and layer, and `coverage_notes`.
    """
    refuse_absent_weights(model)
    clock = clock or Clock()
    kinds = wanted(config, allocations)
    curvature: Mapping[str, Tensor] = {}
    energies: Mapping[str, Tensor] = {}
    if "loss" in kinds or config.objective == "loss":
        with clock("gradients"):
            curvature = curvature_of(model, targets, kinds.get("loss", config), calibration)
    if config.needs_gradient_energies:
        with clock("gradients"):
            energies = gradient_energies_of(model, targets, config, calibration)
    with clock("profiles"):
        profiles: dict[str, dict[str, SVDProfile]] = {kind: {} for kind in kinds}
        held = calibration.measurements
        profiles["weights"] = held.profiles(targets) if held else measure_profiles(model, targets)
    job = Job(
        model, targets, largest(targets) if len(profiles) == 1 else everything(targets), calibration.batches, config,
        clock, InPlace(), measurements=calibration.measurements,
        gradients=curvature if config.objective == "loss" else energies,
    )  # fmt: skip
    tokens: dict[str, int] = {}
    for step in measured(job) if job.batches else read(job):
        with clock("factors"):
            for target in of_step(job, step):
                tokens[target.name] = step.recorder.tokens[target.name] if step.recorder else 0
                if "outputs" in kinds:
                    profiles["outputs"][target.name] = output_profile(job, step, target)
                if "loss" in kinds:
                    profiles["loss"][target.name] = loss_profile(job, step, target, curvature)
                visit(job, target, step.recorder)
        step.release()
    in_order = {kind: {name: found[name] for name in targets.names} for kind, found in profiles.items()}
    return job, in_order, coverage_notes(config, job.factored, tokens)


def wanted(config: PGSVDConfig, allocations: Sequence[str]) -> dict[str, PGSVDConfig]:
    """What profiles are to be measured on the calibration set, each with a request that wants it.

    Raises:
        ConfigError: an allocation cannot be used with this config.
    """
    names = dict.fromkeys((*([] if config.profile is None else [config.allocation]), *allocations))
    requests = [request_at(config, parameter_reduction=0.0, allocation=name) for name in names]
    return {each.profile: each for each in requests if each.profile in ("outputs", "loss")}


def check_nested(config: PGSVDConfig) -> None:
    """Refuse a request whose factors cannot be cut.

    Raises:
        ConfigError: factors of one rank are not the leading components of those of a higher one.
        DistributedError: there are several processes.
    """
    if not SOLVERS.trait(config.solver, "nested"):
        nested = " or ".join(f"solver={name!r}" for name in SOLVERS.names() if SOLVERS.trait(name, "nested"))
        raise ConfigError(
            f"solver={config.solver!r} is not nested: its factors of one rank are not the leading components of those "
            f"of a higher rank, so each plan needs factors of its own; use {nested}, or keep moments instead"
        )
    if config.correct_bias:
        raise ConfigError(
            "one set of factors for all plans needs correct_bias=False: a corrected bias fits one rank; keep moments "
            "instead"
        )
    check_parallel(config)


def check_parallel(config: PGSVDConfig) -> None:
    """Refuse a request that cannot be measured once for all plans.

    Raises:
        ConfigError: what is measured of a layer depends on the ranks of those before it.
        DistributedError: there are several processes.
    """
    if config.calibration == "anchored":
        raise ConfigError(
            "measuring once for all plans needs calibration='parallel': anchored calibration measures each block "
            "behind the compressed ones before it; compress once a plan"
        )
    if Peers().size > 1:
        raise DistributedError("measuring once for all plans works in one process only; start one")


def largest(targets: Targets) -> RankPlan:
    """Every target at the largest rank that saves parameters, dense where none does."""
    return RankPlan({t.name: LayerPlan(t.shape, t.shape.largest_saving_rank or None) for t in targets.found})


def of_step(job: Job, step: Step) -> Iterator[Target]:
    """The layers that a step says all of, those outside the blocks among them in its last."""
    for target in job.in_block(step.block):
        if step.recorder is None or target.name in step.recorder.tokens:
            if step.recorder is not None:
                check_reached(step.recorder, [target.name])
            yield target


def leading_factors(job: Job, target: Target, recorder: Recorder | None) -> tuple[LowRankFactors, Activations | None]:
    """The factors of one layer at the largest rank that saves parameters, and what is left of its outputs by rank."""
    weight = dense_weight(job.model, target.name)
    moments = recorder.moments(target.name) if recorder else None
    goal = recorder.goal(target.name, weight) if recorder else weight
    solved = solve_measured(job, target.name, goal, moments, recorder, target.shape.largest_saving_rank)
    if recorder is None or moments is None:
        return solved.to(weight.dtype), None
    errors, norm = output_errors_by_rank(weight, solved.left, solved.right, moments.measured)
    energy = float(moments.energies.sum(dtype=torch.float64))
    return solved.to(weight.dtype), Activations(recorder.tokens[target.name], energy**0.5, norm, errors.cpu())


def request_at(config: PGSVDConfig, **changes: Any) -> PGSVDConfig:
    """A request with another budget, checked as any is.

    Args:
        config: of another request.
        changes: the budget, `groups` where there are any, and other fields that are to differ.

    Raises:
        ConfigError: see `PGSVDConfig`.
    """
    fields = {name: getattr(config, name) for name in signature(PGSVDConfig).parameters if name != "record"}
    return PGSVDConfig(**{**fields, **dict.fromkeys(BUDGETS), "groups": None, **changes})
