"""Sweeps: parameters against error, and against the measured loss, from one calibration."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from ..allocation import ALLOCATIONS
from ..calibration import Batch, load_calibration_set, mean_loss
from ..config import PGSVDConfig
from ..errors import ConfigError
from ..factoring import (
    Calibration,
    Clock,
    Kept,
    Once,
    Ordered,
    calibration_of,
    compressed_at,
    cut,
    found_targets,
    keep_moments,
    ordered_factors,
    plan_at,
    request_at,
)
from ..planning import check_budgets, refuse_without_search
from ..report import ModelSize
from ..solvers import SOLVERS
from ..structures import Budget, LayerPlan, RankPlan
from ..targets import Targets
from .results import origin, warn_of


@dataclass(frozen=True)
class Point:
    """A model at one plan.

    Args:
        allocation: that chose its ranks; `"dense"` for the dense model.
        asked: the budget, `parameter_reduction` or `tolerance`.
        parameters: of the targets.
        model_parameters: of the whole model.
        parameter_reduction: fraction of the targets' parameters removed.
        tolerance: ε, the largest relative error that the allocation let pass; `None` where it does not go by one.
        surrogate: `Σ e_l(r_l)` over the targets, the paper's objective with all `α_l = 1`; e(r) is that of the plain
            weight (Definition 1), whatever chose the ranks and whatever solved for the factors.
        largest_error: the largest `e_l(r_l)`.
        activation_error: mean of `‖ΔW_l X_lᵀ‖ / ‖W_l X_lᵀ‖` over the targets; `None` for a solver that uses no data.
        largest_activation_error: the largest of them.
        loss: on the evaluation set, per prediction; `None` where there is none.
        ranks: of the layers that are factored.
    """

    allocation: str
    asked: Mapping[str, float]
    parameters: int
    model_parameters: int
    parameter_reduction: float
    tolerance: float | None
    surrogate: float
    largest_error: float
    activation_error: float | None
    largest_activation_error: float | None
    loss: float | None
    ranks: Mapping[str, int]

    @property
    def perplexity(self) -> float | None:
        """`exp(loss)`, of a language model per token."""
        return None if self.loss is None else math.exp(min(self.loss, 700.0))


@dataclass(frozen=True)
class Sweep:
    """A model at many plans.

    Args:
        dense: the model as it is.
        points: in the order in which they were asked for.
        targets: how many layers can be compressed.
        seconds: by step, wall-clock.
        origin: see `results.origin`.
    """

    dense: Point
    points: tuple[Point, ...]
    targets: int
    seconds: Mapping[str, float]
    origin: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        dense, *points = ({**asdict(point), "perplexity": point.perplexity} for point in (self.dense, *self.points))
        return {
            **self.origin,
            "targets": self.targets,
            "seconds": dict(self.seconds),
            "dense": dense,
            "points": points,
        }


def sweep_model(
    model: PreTrainedModel,
    config: PGSVDConfig,
    *,
    reductions: Sequence[float] = (),
    tolerances: Sequence[float] = (),
    allocations: Sequence[str] = ("pareto", "uniform"),
    evaluation: Sequence[Batch] = (),
    tokenizer: Any = None,
) -> Sweep:
    """The model at many budgets and by several allocations, from one calibration.

    With a solver whose factors are nested, `eigh` or `svd`, each layer is decomposed once for all points; with others,
    such as `als`, it is solved anew at each point, from moments that are kept in memory.

    Args:
        model: dense, in memory; as it was afterwards.
        config: solver, storage, calibration set and layers; its budget has no effect.
        reductions: fractions of the targets' parameters to remove.
        tolerances: ε of the first allocation that goes by one; the others get the reduction that it comes to.
        allocations: by name, the same budgets for each.
        evaluation: batches to measure the loss on; none to leave it out.
        tokenizer: as for `PGSVDCompressor.compress`.

    Returns:
        A point for every allocation and budget.

    Raises:
        ConfigError: a budget cannot be met, or the config does not allow one calibration for all.
        PGSVDError: see `PGSVDCompressor.compress`.

    Source:
        arXiv 2510.05544, Theorem 2: sweeping ε traces the surrogate's Pareto front.
    """
    if config.groups:
        raise ConfigError("a sweep has one budget for all layers; leave groups out, or compress once a budget")
    if not reductions and not tolerances:
        raise ConfigError("a sweep needs budgets: give reductions or tolerances")
    clock, points = Clock(), []
    with found_targets(model, config) as targets:
        check_budgets_of(targets, config, allocations, reductions, tolerances)
        if evaluation:
            mean_loss(model, evaluation[:1])  # where there is no loss, that is told before hours of work
        with clock("data"):
            calibration = calibration_of(model, targets, config, tokenizer)
        once = measured_once(model, targets, config, calibration, allocations, clock)
        warn_of(once)
        plans = [dense_plan(once), *planned(model, once, allocations, reductions, tolerances)]
        for name, asked, plan in logging.tqdm(plans, desc="Sweeping", unit="point", disable=None):
            with clock("points"), at_plan(model, once, plan) as errors:
                loss = mean_loss(model, evaluation) if evaluation else None
            points.append(point_of(model, once, plan, name, asked, errors, loss))
    return Sweep(points[0], tuple(points[1:]), len(targets.found), clock.seconds, origin(model, config, once.notes))


def check_budgets_of(
    targets: Targets,
    config: PGSVDConfig,
    allocations: Sequence[str],
    reductions: Sequence[float],
    tolerances: Sequence[float] = (),
) -> None:
    """Find what is wrong with the budgets of a sweep before any work is done.

    Raises:
        ConfigError: one of them cannot be met, an allocation runs the model to find ranks, or tolerances are given and
            no allocation goes by one.
    """
    if tolerances and not any(ALLOCATIONS.trait(name, "takes_tolerance") for name in allocations):
        raise ConfigError(f"none of the allocations {', '.join(allocations)} takes a tolerance: add 'pareto'")
    for tolerance in tolerances:
        Budget(tolerance=tolerance)
    for name in allocations:
        for reduction in reductions or [0.0]:
            request = request_at(config, allocation=name, parameter_reduction=reduction)
            check_budgets(targets, request)
            refuse_without_search(request)


def measured_once(
    model: PreTrainedModel,
    targets: Targets,
    config: PGSVDConfig,
    calibration: Calibration,
    allocations: Sequence[str],
    clock: Clock,
) -> Once:
    """Ordered factors where the config allows them, else moments."""
    nested = SOLVERS.trait(config.solver, "nested") and not config.correct_bias
    return (ordered_factors if nested else keep_moments)(model, targets, config, calibration, allocations, clock)


def planned(
    model: PreTrainedModel,
    once: Once,
    allocations: Sequence[str],
    reductions: Sequence[float],
    tolerances: Sequence[float],
) -> Iterator[tuple[str, dict[str, float], RankPlan]]:
    """Every plan of a sweep, with its allocation and what was asked for."""
    asked: list[dict[str, float]] = [{"parameter_reduction": reduction} for reduction in reductions]
    leading = next((name for name in allocations if ALLOCATIONS.trait(name, "takes_tolerance")), None)
    for tolerance in tolerances:
        request = request_at(once.config, allocation=leading, tolerance=tolerance)
        reduction = plan_at(model, once, request).parameter_reduction
        asked.append({"tolerance": tolerance, "parameter_reduction": reduction})
    for name in allocations:
        for budget in asked:
            given = [field for field in ("tolerance", "parameter_reduction") if field in budget]
            field = given[0] if name == leading else given[-1]
            request = request_at(once.config, allocation=name, **{field: budget[field]})
            yield name, budget, plan_at(model, once, request)


def dense_plan(once: Once) -> tuple[str, dict[str, float], RankPlan]:
    """The plan that leaves every layer as it is."""
    return "dense", {}, RankPlan({name: LayerPlan(shape, None) for name, shape in once.targets.shapes.items()})


@contextmanager
def at_plan(model: PreTrainedModel, once: Once, plan: RankPlan) -> Iterator[dict[str, float | None]]:
    """A context in which a model is compressed by a plan; gives the activation error of every factored layer."""
    if isinstance(once, Ordered):
        with cut(model, once, plan):
            seen = once.activations
            yield {name: float(seen[name].errors[rank]) if seen else None for name, rank in plan.ranks.items()}
    else:
        assert isinstance(once, Kept)
        with compressed_at(model, once, plan) as layers:
            yield {layer.name: layer.activation_error for layer in layers}


def point_of(
    model: PreTrainedModel,
    once: Once,
    plan: RankPlan,
    allocation: str,
    asked: Mapping[str, float],
    activation_errors: Mapping[str, float | None],
    loss: float | None,
) -> Point:
    """What is known of a plan."""
    layers = plan.layers
    errors = [once.profiles["weights"][name].relative_error(layer.rank) for name, layer in layers.items()]
    seen = [error for error in activation_errors.values() if error is not None]
    known = len(seen) == len(activation_errors)
    return Point(
        allocation, asked, plan.kept_parameters,
        ModelSize.of(model).parameters - plan.dense_parameters + plan.kept_parameters,
        plan.parameter_reduction,
        next((layer.tolerance for layer in layers.values()), None),
        math.fsum(errors), max(errors),
        math.fsum(seen) / len(layers) if known else None,
        max(seen, default=0.0) if known else None,
        loss, plan.ranks,
    )  # fmt: skip


def evaluation_set(
    model: PreTrainedModel, config: PGSVDConfig, dataset: Any, num_samples: int = 128, tokenizer: Any = None
) -> Sequence[Batch]:
    """Batches to measure the loss on, made as the calibration set is.

    Args:
        model: the dense model.
        config: tokenizer, sequence length, batch size and seed.
        dataset: as in `PGSVDConfig`; to be another text than the calibration set's.
        num_samples: sequences, at most.
        tokenizer: overrides the config's.

    Raises:
        CalibrationError: see `load_calibration_set`.
    """
    request = request_at(config, parameter_reduction=0.0, dataset=dataset, num_samples=num_samples, solver="eigh")
    return load_calibration_set(model, request, tokenizer)
