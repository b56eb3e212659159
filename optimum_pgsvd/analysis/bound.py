"""Theorem 1 against the truth: how far the loss moves, how far its first order says, and how far it may."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from ..calibration import Batch
from ..config import PGSVDConfig
from ..errors import ConfigError
from ..factoring import (
    Clock,
    Ordered,
    calibration_of,
    check_nested,
    found_targets,
    ordered_factors,
    plan_at,
    request_at,
)
from ..linalg import inner_products_by_rank
from ..planning import check_budgets, dense_weight
from ..structures import RankPlan
from .gradients import Gradients, measure_gradients
from .results import origin, warn_of
from .sensitivities import Allocated, Sensitivities, allocated, sensitivities_of
from .theorem import Bound, LayerBound
from .trials import Trials


@dataclass(frozen=True, eq=False)
class Bounds:
    """Theorem 1 on a model.

    Args:
        loss: of the dense model on the calibration set.
        bounds: one a reduction.
        sensitivities: measured α of every target.
        allocated: ranks by these and by equal ones, and what they come to, one a reduction.
        seconds: by step, wall-clock.
        origin: see `results.origin`.
    """

    loss: float
    bounds: tuple[Bound, ...]
    sensitivities: Sensitivities
    allocated: tuple[Allocated, ...]
    seconds: Mapping[str, float]
    origin: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        return {
            **self.origin,
            "seconds": dict(self.seconds),
            "loss": self.loss,
            "bounds": [bound.to_dict() for bound in self.bounds],
            "sensitivities": self.sensitivities.to_dict(),
            "allocations": [each.to_dict() for each in self.allocated],
        }


def bound_model(
    model: PreTrainedModel,
    config: PGSVDConfig,
    reductions: Sequence[float] = (0.1, 0.2, 0.4),
    *,
    alone: bool = True,
    evaluation: Sequence[Batch] = (),
    tokenizer: Any = None,
) -> Bounds:
    """Theorem 1 and the sensitivities it is made of, against the true change of the loss on the same data.

    `α'_l` here is the norm of the measured gradient at the outputs of layer l, which holds every downstream Jacobian.
    The paper's is a product of norms, of the gradient, of all downstream Jacobians and of the activations' Lipschitz
    constants: an upper bound of ours, layer by layer, so that what is found loose here is looser there.

    Args:
        model: dense, in memory; as it was afterwards.
        config: layers, calibration set, allocation and a solver whose factors are nested; its budget has no effect.
        reductions: fractions of the targets' parameters to remove.
        alone: measure every layer's own change too: a pass over the calibration set for each.
        evaluation: batches to measure the loss of the allocations on, besides the calibration set.
        tokenizer: as for `PGSVDCompressor.compress`.

    Returns:
        Bounds, sensitivities, and the ranks that these would give.

    Raises:
        ConfigError: the solver uses no data or its factors cannot be cut, or a budget cannot be met.
        CalibrationError: the model has no loss on the calibration set, or it does not depend on a layer.
        PGSVDError: see `PGSVDCompressor.compress`.

    Source:
        arXiv 2510.05544, Theorem 1.
    """
    if not config.needs_dataset:
        raise ConfigError(f"the bound is about outputs, and solver={config.solver!r} sees none; use solver='eigh'")
    check_nested(config)
    with found_targets(model, config) as targets:
        for reduction in reductions:
            check_budgets(targets, request_at(config, parameter_reduction=reduction))
        calibration = calibration_of(model, targets, config, tokenizer)
        if not calibration.batches:
            raise ConfigError("the bound needs gradients, and measurements hold none: give the dataset itself")
        clock = Clock()
        with clock("gradients"):
            layers = {name: model.get_submodule(name) for name in targets.names}
            gradients = measure_gradients(model, layers, calibration.batches)
        ordered = ordered_factors(model, targets, config, calibration, ["pareto_outputs"], clock)
        warn_of(ordered)
        trials = Trials(model, ordered, calibration.batches, evaluation)
        found = sensitivities_of(model, ordered, gradients)
        with clock("losses"):
            bounds = bounds_at(trials, gradients, reductions, alone)
            others = [allocated(trials, found, reduction) for reduction in reductions]
    source = origin(model, config, ordered.notes)
    return Bounds(trials.base, bounds, found, tuple(others), clock.seconds, source)


def bounds_at(trials: Trials, gradients: Gradients, reductions: Sequence[float], alone: bool) -> tuple[Bound, ...]:
    """The bound at each budget, by the config's allocation."""
    model, ordered = trials.model, trials.ordered
    first_orders = {name: first_order(model, ordered, gradients, name) for name in ordered.factors}
    plans = {r: plan_at(model, ordered, request_at(ordered.config, parameter_reduction=r)) for r in reductions}
    return tuple(bound_at(trials, gradients, first_orders, plan, r, alone) for r, plan in plans.items())


def first_order(model: PreTrainedModel, ordered: Ordered, gradients: Gradients, name: str) -> Tensor:
    """`⟨∂L/∂Y, ΔY⟩ = ⟨∂L/∂W, ΔW⟩` of a layer at every rank."""
    factors = ordered.factors[name]
    return inner_products_by_rank(dense_weight(model, name), factors.left, factors.right, gradients.weights[name])


def bound_at(
    trials: Trials,
    gradients: Gradients,
    first_orders: Mapping[str, Tensor],
    plan: RankPlan,
    reduction: float,
    alone: bool,
) -> Bound:
    """One plan, layer by layer and all together."""
    layers = []
    for name, rank in logging.tqdm(plan.ranks.items(), desc="One by one", unit="layer", disable=None):
        seen = trials.ordered.activations[name]
        layers.append(
            LayerBound(
                name, rank, trials.ordered.profiles["weights"][name].relative_error(rank),
                float(seen.errors[rank]) * seen.output_norm, float(seen.errors[rank]), gradients.outputs[name],
                float(first_orders[name][rank]), trials.change(RankPlan({name: plan.layers[name]})) if alone else None,
            )
        )  # fmt: skip
    return Bound(reduction, tuple(layers), trials.change(plan))
