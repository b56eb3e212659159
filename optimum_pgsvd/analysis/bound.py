"""Theorem 1 against the truth: how far the loss moves, how far its first order says, and how far it may."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from ..config import PGSVDConfig
from ..errors import ConfigError
from ..factoring import Clock, Ordered, calibration_of, check_nested, ordered_factors, plan_at, request_at
from ..linalg import inner_products_by_rank
from ..planning import check_budgets, dense_weight
from ..structures import RankPlan
from ..targets import find_targets
from .gradients import Gradients, measure_gradients
from .losses import Batch
from .results import origin
from .sensitivities import Allocated, Sensitivities, allocated, sensitivities_of
from .trials import Trials


@dataclass(frozen=True)
class LayerBound:
    """One layer at one rank, the others dense.

    Args:
        name: of the layer.
        rank: of its factors.
        relative_error: `e(rank)` of the plain weight.
        output_change: `‖ΔW Xᵀ‖_F`, over the outputs for every token.
        relative_output_change: the same relative to `‖W Xᵀ‖_F`.
        gradient: `α' = ‖∂L/∂Y‖_F`.
        first_order: `⟨∂L/∂Y, ΔY⟩`, with its sign.
        change: of the loss, the layer compressed alone; `None` where it was not measured.
    """

    name: str
    rank: int
    relative_error: float
    output_change: float
    relative_output_change: float
    gradient: float
    first_order: float
    change: float | None

    @property
    def bound(self) -> float:
        """`α' ‖ΔW Xᵀ‖`: by Cauchy and Schwarz, at least the size of the first order."""
        return self.gradient * self.output_change


@dataclass(frozen=True)
class Bound:
    """A plan, layer by layer and all together.

    Args:
        parameter_reduction: that was asked for.
        layers: those that are factored.
        change: of the loss, all of them compressed.
    """

    parameter_reduction: float
    layers: tuple[LayerBound, ...]
    change: float

    @property
    def first_order(self) -> float:
        """`Σ ⟨∂L/∂Y_l, ΔY_l⟩`."""
        return sum(layer.first_order for layer in self.layers)

    @property
    def bound(self) -> float:
        """`Σ α'_l ‖ΔW_l X_lᵀ‖`."""
        return sum(layer.bound for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it, with how loose it is."""
        layers = [
            {
                **asdict(layer),
                "bound": layer.bound,
                "bound_over_change": ratio(layer.bound, layer.change),
                "first_order_over_change": ratio(layer.first_order, layer.change, signed=True),
            }
            for layer in self.layers
        ]
        alone = [layer.change for layer in self.layers if layer.change is not None]
        total = {
            "change": self.change,
            "sum_of_changes_alone": sum(alone) if len(alone) == len(self.layers) else None,
            "first_order": self.first_order,
            "bound": self.bound,
            "bound_over_change": ratio(self.bound, self.change),
            "first_order_over_change": ratio(self.first_order, self.change, signed=True),
            "layers_where_the_bound_is_below_the_change": sum(
                layer.change is not None and layer.bound < abs(layer.change) for layer in self.layers
            ),
        }
        return {
            "parameter_reduction": self.parameter_reduction,
            "total": total,
            "rank_correlation_with_change": self.rank_correlations(),
            "layers": layers,
        }

    def rank_correlations(self) -> dict[str, float | None]:
        """Spearman's correlation over the layers of the size of each one's change alone with what might predict it.

        A bound may be loose and order the layers right all the same. Empty where the changes were not measured.
        """
        if any(layer.change is None for layer in self.layers):
            return {}
        changes = [abs(layer.change or 0.0) for layer in self.layers]
        predictors = {
            "bound": [layer.bound for layer in self.layers],
            "first_order": [abs(layer.first_order) for layer in self.layers],
            "relative_error": [layer.relative_error for layer in self.layers],
            "output_change": [layer.output_change for layer in self.layers],
            "relative_output_change": [layer.relative_output_change for layer in self.layers],
        }
        return {name: rank_correlation(values, changes) for name, values in predictors.items()}


def ratio(value: float, change: float | None, signed: bool = False) -> float | None:
    """A value relative to a change, or to its size; `None` where there is no change."""
    if not change:
        return None
    return value / (change if signed else abs(change))


def rank_correlation(values: Sequence[float], others: Sequence[float]) -> float | None:
    """Spearman's: the correlation of the places in order; `None` where all of one side are the same.

    Args:
        values: two or more.
        others: as many.
    """
    places = [np.unique(np.asarray(each), return_inverse=True, return_counts=True)[1:] for each in (values, others)]
    # Equal values share the mean of their places.
    means = [(counts.cumsum() - (counts - 1) / 2)[inverse] for inverse, counts in places]
    if len(values) < 2 or any(np.ptp(each) == 0 for each in means):
        return None
    return float(torch.corrcoef(torch.tensor(np.stack(means)))[0, 1])


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
    clock = Clock()
    targets = find_targets(model, config)
    check_nested(config)
    for reduction in reductions:
        check_budgets(targets, request_at(config, parameter_reduction=reduction))
    with clock("data"):
        calibration = calibration_of(model, targets, config, tokenizer)
    if not calibration.batches:
        raise ConfigError("the bound needs gradients, and measurements hold none: give the dataset itself")
    layers = {name: model.get_submodule(name) for name in targets.names}
    with clock("gradients"):
        gradients = measure_gradients(model, layers, calibration.batches)
    ordered = ordered_factors(model, targets, config, calibration, ["pareto_outputs"], clock)
    first_orders = {name: first_order(model, ordered, gradients, name) for name in ordered.factors}
    found = sensitivities_of(model, ordered, gradients)
    trials = Trials(model, ordered, calibration.batches, evaluation)
    bounds, others = [], []
    for reduction in reductions:
        plan = plan_at(model, ordered, request_at(config, parameter_reduction=reduction))
        with clock("losses"):
            bounds.append(bound_at(trials, gradients, first_orders, plan, reduction, alone))
            others.append(allocated(trials, found, reduction))
    return Bounds(trials.base, tuple(bounds), found, tuple(others), clock.seconds, origin(model, config))


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
