"""Theorem 1 at one plan, layer by layer: what it says, what is true, and how loose it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch


# Relative error of a layer's outputs below which it is rounding noise, and nothing can be relative to it.
NOISE = 1e-6


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
            "layers_where_the_bound_is_below_the_change": self.layers_below(),
        }
        return {
            "parameter_reduction": self.parameter_reduction,
            "total": total,
            "rank_correlation_with_change": self.rank_correlations(),
            "layers": layers,
        }

    def layers_below(self) -> int | None:
        """How many layers change the loss by more than their bound; `None` where the changes were not measured.

        Where a rank leaves nothing of a layer's outputs but rounding, so are the bound and the change.
        """
        if any(layer.change is None for layer in self.layers):
            return None
        seen = [layer for layer in self.layers if layer.relative_output_change > NOISE]
        return sum(layer.bound < abs(layer.change or 0.0) for layer in seen)

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
