"""Calibrate once, decompose once, evaluate at any plan: factors in order of importance, cut as asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..allocation import ALLOCATIONS
from ..calibration import Step
from ..config import BUDGETS, PGSVDConfig
from ..distributed import Peers
from ..errors import ConfigError, DistributedError
from ..linalg import output_errors_by_rank
from ..modeling_pgsvd import set_submodule
from ..planning import dense_weight, measure_profiles, plan_ranks
from ..replace import replace_linear
from ..solvers import SOLVERS
from ..structures import LayerPlan, LowRankFactors, RankPlan, SVDProfile
from ..targets import Target, Targets, find_targets
from .job import Clock, InPlace, Job, everything
from .layer import Recorder, check_reached, solve
from .measuring import measured, read
from .request import Calibration, refuse_absent_weights
from .sensitivity import curvature_of, loss_profile


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
class Ordered:
    """What it takes to plan and cut a calibrated model as often as one likes, without data or decompositions.

    Args:
        config: of the request that it was made for.
        factors: of every target that factors can make smaller, in the model's dtype, at the largest rank that does,
            most important component first.
        profiles: of every target's weight, the paper's.
        loss_profiles: of every target as the loss sees it, where an allocation needs gradients.
        activations: of every target with factors; empty for a solver that uses no data.
    """

    config: PGSVDConfig
    factors: Mapping[str, LowRankFactors]
    profiles: Mapping[str, SVDProfile]
    loss_profiles: Mapping[str, SVDProfile] = field(default_factory=dict)
    activations: Mapping[str, Activations] = field(default_factory=dict)

    def profiles_for(self, allocation: str) -> Mapping[str, SVDProfile]:
        """The profiles that an allocation chooses ranks by.

        Raises:
            ConfigError: it needs gradients, which were not measured.
        """
        if not ALLOCATIONS.trait(allocation, "needs_curvature"):
            return self.profiles
        if not self.loss_profiles:
            raise ConfigError(
                f"allocation={allocation!r} chooses ranks by gradients, which were not measured: give "
                f"allocations=[{allocation!r}] when the factors are made"
            )
        return self.loss_profiles


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
    refuse_absent_weights(model)
    clock = clock or Clock()
    requests = [
        request_at(config, parameter_reduction=0.0, allocation=name) for name in (config.allocation, *allocations)
    ]
    by_loss = [request for request in requests if ALLOCATIONS.trait(request.allocation, "needs_curvature")]
    curvature = {}
    if by_loss or config.objective == "loss":
        with clock("gradients"):
            curvature = curvature_of(model, targets, [config, *by_loss][-1], calibration)
    with clock("profiles"):
        profiles = measure_profiles(model, targets)
    job = Job(
        model, targets, everything(targets) if by_loss else largest(targets), calibration.batches, config, clock,
        InPlace(), measurements=calibration.measurements, curvature=curvature if config.objective == "loss" else {},
    )  # fmt: skip
    factors: dict[str, LowRankFactors] = {}
    loss_profiles: dict[str, SVDProfile] = {}
    activations: dict[str, Activations] = {}
    for step in measured(job) if job.batches else read(job):
        with clock("factors"):
            for target in of_step(job, step):
                if by_loss:
                    loss_profiles[target.name] = loss_profile(job, step, curvature, target)
                if target.shape.largest_saving_rank:
                    factors[target.name], seen = leading_factors(job, target, step.recorder)
                    activations |= {target.name: seen} if seen else {}
        step.release()
    held = {name: factors[name] for name in targets.names if name in factors}
    return Ordered(config, held, profiles, loss_profiles, activations)


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
            f"of a higher rank, so each plan needs factors of its own; use {nested}, or compress once a plan"
        )
    if config.calibration == "anchored":
        raise ConfigError(
            "one set of factors for all plans needs calibration='parallel': anchored factors fit the ranks of the "
            "blocks before them; compress once a plan"
        )
    if config.correct_bias:
        raise ConfigError(
            "one set of factors for all plans needs correct_bias=False: a corrected bias fits one rank; compress once "
            "a plan"
        )
    if Peers().size > 1:
        raise DistributedError("one set of factors for all plans is made in one process only; start one")


def largest(targets: Targets) -> RankPlan:
    """Every target at the largest rank that saves parameters, dense where none does."""
    return RankPlan({t.name: LayerPlan(t.shape, t.shape.largest_saving_rank or None) for t in targets.found})


def of_step(job: Job, step: Step) -> list[Target]:
    """The layers that a step says all of, those outside the blocks among them in its last."""
    return [t for t in job.in_block(step.block) if step.recorder is None or t.name in step.recorder.tokens]


def leading_factors(job: Job, target: Target, recorder: Recorder | None) -> tuple[LowRankFactors, Activations | None]:
    """The factors of one layer at the largest rank that saves parameters, and what is left of its outputs by rank."""
    weight = dense_weight(job.model, target.name)
    if recorder is not None:
        check_reached(recorder, [target.name])
    moments = recorder.moments(target.name) if recorder else None
    goal = recorder.goal(target.name, weight) if recorder else weight
    solved = solve(goal, moments, job.curvature.get(target.name), target.shape.largest_saving_rank, job.config)
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


def plan_at(model: PreTrainedModel, ordered: Ordered, request: PGSVDConfig) -> RankPlan:
    """The plan of a request, from what was measured.

    Args:
        model: dense, of which the factors are.
        ordered: of `ordered_factors`.
        request: with a budget, as of `request_at`.

    Returns:
        What `PGSVDCompressor.compress` would plan.

    Raises:
        ConfigError: the request does not fit the model, or cannot be met.
    """
    targets = find_targets(model, request)
    if unknown := [name for name in targets.names if name not in ordered.profiles]:
        raise ConfigError(
            f"the request compresses {unknown[0]}, which was no target when the factors were made; name it in the "
            "groups or ranks of that request too"
        )
    return plan_ranks(model, targets, request, profiles=ordered.profiles_for(request.allocation))


@contextmanager
def cut(model: nn.Module, ordered: Ordered, plan: RankPlan) -> Iterator[None]:
    """A context in which a model computes as if it had been compressed by a plan; its dense layers are back after it.

    Nothing is measured or decomposed: every factored layer keeps the leading components of its factors. In float32 and
    float64 the layers are those that `PGSVDCompressor.compress` makes, but for the rounding of matrix products; in
    half precision, to the rounding of the factors. With pivoted storage, thin layers of the same ranks stand in for
    the pivoted ones. The model's config is not touched, and the layers may share memory with `ordered`: they are there
    to be evaluated, not to be trained or saved.

    Args:
        model: dense, of which the factors are.
        ordered: of `ordered_factors`.
        plan: of `plan_at`, or any other.

    Raises:
        ConfigError: the plan asks a layer for more than there is.
    """
    check_held(ordered, plan)
    dense = {name: model.get_submodule(name) for name in plan.ranks}
    try:
        for name, rank in plan.ranks.items():
            replace_linear(model, name, leading(ordered.factors[name], rank))
        yield
    finally:
        for name, module in dense.items():
            set_submodule(model, name, module.train(model.get_submodule(name).training))


def check_held(ordered: Ordered, plan: RankPlan) -> None:
    """Raise `ConfigError` where a plan asks for more than was decomposed."""
    for name, rank in plan.ranks.items():
        held = ordered.factors[name].rank if name in ordered.factors else 0
        if rank > held:
            raise ConfigError(
                f"the plan gives {name} rank {rank}, and its factors have rank {held}, the largest that saves "
                "parameters: lower it, or leave the layer dense"
            )


def leading(factors: LowRankFactors, rank: int) -> LowRankFactors:
    """The factors of a lower rank."""
    return LowRankFactors(factors.left[:, :rank], factors.right[:rank])
