"""Sensitivities: the α that the paper takes as equal, measured, and the ranks that they would give."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel

from ..allocation import least_surrogate
from ..factoring import Ordered, plan_at, request_at
from ..planning import dense_weight
from ..structures import RankPlan
from .gradients import Gradients
from .trials import Trials


@dataclass(frozen=True)
class Sensitivity:
    """One layer.

    Args:
        gradient: `α' = ‖∂L/∂Y‖_F`.
        input_norm: `‖X‖_F`.
        weight_norm: `‖W‖_F`.
        output_norm: `‖W Xᵀ‖_F`.
    """

    gradient: float
    input_norm: float
    weight_norm: float
    output_norm: float

    @property
    def alpha(self) -> float:
        """`α = α' ‖X‖ ‖W‖`: `α e(r)` is at least `α' ‖ΔW Xᵀ‖`, for the truncated SVD and for what is better."""
        return self.gradient * self.input_norm * self.weight_norm


@dataclass(frozen=True, eq=False)
class Sensitivities:
    """All targets that factors can make smaller.

    Args:
        layers: by name, in model order.

    Source:
        arXiv 2510.05544: the α_l of the rank problem, before they are taken as equal.
    """

    layers: Mapping[str, Sensitivity]

    @property
    def alphas(self) -> dict[str, float]:
        """α by layer."""
        return {name: layer.alpha for name, layer in self.layers.items()}

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it, with how unequal they are."""
        alphas = sorted(self.alphas.values())
        spread = {
            "max_over_min": alphas[-1] / alphas[0],
            "max_over_median": alphas[-1] / statistics.median(alphas),
            "coefficient_of_variation": statistics.pstdev(alphas) / statistics.mean(alphas),
        }
        layers = {name: {**asdict(layer), "alpha": layer.alpha} for name, layer in self.layers.items()}
        return {"spread": spread, "layers": layers}


def sensitivities_of(model: PreTrainedModel, ordered: Ordered, gradients: Gradients) -> Sensitivities:
    """The measured sensitivity of every target that factors can make smaller.

    Args:
        model: dense.
        ordered: with activations.
        gradients: of the same layers.
    """
    return Sensitivities(
        {
            name: Sensitivity(
                gradients.outputs[name],
                seen.input_norm,
                float(dense_weight(model, name).double().norm()),
                seen.output_norm,
            )
            for name, seen in ordered.activations.items()
        }
    )


@dataclass(frozen=True)
class AllocatedPlan:
    """One allocation at one budget.

    Args:
        parameters: of the targets.
        equal: `Σ e_l(r_l)`, the surrogate with equal sensitivities.
        measured: `Σ α_l e_l(r_l)`.
        change: of the loss on the calibration set.
        evaluation_loss: on the evaluation set, if there is one.
        ranks: of the layers that are factored.
    """

    parameters: int
    equal: float
    measured: float
    change: float
    evaluation_loss: float | None
    ranks: Mapping[str, int]


@dataclass(frozen=True, eq=False)
class Allocated:
    """Several allocations at one budget.

    Args:
        parameter_reduction: that was asked for.
        plans: by allocation: `"uniform"` ranks; `"pareto"` (one ε); the least surrogate `Σ α_l e_l(r_l)` with
            `"equal α"` and with `"measured α"`; the least `"bound"` of Theorem 1, `Σ α'_l ‖ΔW_l X_lᵀ‖`, which the
            surrogate is above. In these three layers may stay dense, and none may with `", all factored"`.
    """

    parameter_reduction: float
    plans: Mapping[str, AllocatedPlan]

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        plans = {name: asdict(plan) for name, plan in self.plans.items()}
        return {"parameter_reduction": self.parameter_reduction, "plans": plans}


def allocated(trials: Trials, sensitivities: Sensitivities, reduction: float) -> Allocated:
    """What measured sensitivities would give, beside the allocations that take them as equal.

    Args:
        trials: of the model.
        sensitivities: of `sensitivities_of`.
        reduction: fraction of the targets' parameters to remove.

    Returns:
        The plans and what they come to.

    Raises:
        ConfigError: the budget cannot be met.
    """
    ordered, profiles = trials.ordered, trials.ordered.profiles["weights"]
    # A layer that factors cannot make smaller stays dense, whatever its sensitivity.
    measured = {name: sensitivities.alphas.get(name, 0.0) for name in profiles}
    plans = {
        name: plan_at(
            trials.model, ordered, request_at(ordered.config, parameter_reduction=reduction, allocation=name)
        )
        for name in ("uniform", "pareto")
    }
    bounds = {name: layer.gradient * layer.output_norm for name, layer in sensitivities.layers.items()}
    for name, kind, weights in (
        ("equal α", "weights", dict.fromkeys(profiles, 1.0)),
        ("measured α", "weights", measured),
        ("bound", "outputs", {name: bounds.get(name, 0.0) for name in profiles}),
    ):
        request = ordered.targets.shapes, ordered.profiles[kind], weights, reduction, ordered.config.rank_multiple
        plans[name], plans[f"{name}, all factored"] = least_surrogate(*request), least_surrogate(*request, dense=False)

    def outcome(plan: RankPlan) -> AllocatedPlan:
        errors = {name: profiles[name].relative_error(layer.rank) for name, layer in plan.layers.items()}
        weighted = sum(measured[name] * error for name, error in errors.items())
        change, held_out = trials.change(plan), trials.evaluation_loss(plan)
        return AllocatedPlan(plan.kept_parameters, sum(errors.values()), weighted, change, held_out, plan.ranks)

    return Allocated(reduction, {name: outcome(plan) for name, plan in plans.items()})
