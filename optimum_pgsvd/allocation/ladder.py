"""Ranks as ladders: the options of a layer from its smallest rank up to dense, climbed under one budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import ConfigError
from ..structures import Budget, LinearShape


@dataclass(frozen=True)
class Ladder:
    """The options of one layer.

    Args:
        shape: of the weight.
        ranks: ascending multiples of the rank multiple that save parameters, then `None` for dense.
    """

    shape: LinearShape
    ranks: tuple[int | None, ...]

    @classmethod
    def of(cls, shape: LinearShape, rank_multiple: int, shares: Sequence[float] | None = None) -> Ladder:
        """Every rank that saves parameters, then dense.

        With `shares` of the layer's parameters, ascending, only the largest rank within each of them; the smallest of
        all where none is.
        """
        ranks = range(rank_multiple, shape.largest_saving_rank + 1, rank_multiple)
        if shares is None or not ranks:
            return cls(shape, (*ranks, None))
        limits = [share * shape.dense_parameters * (1 + 1e-12) for share in shares]
        within = (max((r for r in ranks if shape.parameters(r) <= limit), default=ranks[0]) for limit in limits)
        return cls(shape, (*dict.fromkeys(within), None))


def given_reduction(budget: Budget, allocation: str) -> float:
    """The reduction of a budget, for an allocation that takes no other; raises `ConfigError` for a tolerance."""
    if budget.parameter_reduction is None:
        raise ConfigError(
            f"allocation={allocation!r} takes parameter_reduction, not tolerance; use allocation='pareto'"
        )
    return budget.parameter_reduction


def parameter_budget(shapes: Mapping[str, LinearShape], parameter_reduction: float) -> int:
    """Parameters that may be kept: `⌊(1 − parameter_reduction) Σ m n⌋`."""
    dense = sum(shape.dense_parameters for shape in shapes.values())
    # A rounding error of the product must not cost a parameter: 0.8 × 10 is 8, not 7.999….
    return math.floor((1 - parameter_reduction) * dense * (1 + 1e-12))


def smallest(ladders: Mapping[str, Ladder], parameter_reduction: float) -> int:
    """Parameters kept on the lowest rungs.

    Raises:
        ConfigError: they are more than the budget allows.
    """
    shapes = {name: ladder.shape for name, ladder in ladders.items()}
    kept = sum(ladder.shape.parameters(ladder.ranks[0]) for ladder in ladders.values())
    if kept > parameter_budget(shapes, parameter_reduction):
        dense = sum(shape.dense_parameters for shape in shapes.values())
        raise ConfigError(
            f"parameter_reduction={parameter_reduction} cannot be met: the smallest ranks of these {len(ladders)} "
            f"layers keep {kept} of {dense} parameters, a reduction of {1 - kept / dense:.4f}; lower it, or lower "
            "rank_multiple"
        )
    return kept


def climb(
    ladders: Mapping[str, Ladder], threshold: Callable[[str, int], float], parameter_reduction: float
) -> tuple[dict[str, int | None], float]:
    """Lower one threshold for all layers until the next step would exceed the budget.

    Every layer starts on its lowest rung and leaves rung j once the threshold falls below `threshold(name, j)`, which
    must not rise with j. This is the exact end of a bisection on the threshold: the plan kept is within the budget and
    one rank step of it. Equal thresholds are taken in layer order; a rung with threshold 0 is never left.

    Args:
        ladders: by layer name, in model order.
        threshold: of leaving rung j of a layer.
        parameter_reduction: fraction to remove.

    Returns:
        The rank of each layer, `None` for dense, and the threshold reached: no layer on it or below it was left.

    Raises:
        ConfigError: even the lowest rungs cost more than the budget.
    """
    budget = parameter_budget({name: ladder.shape for name, ladder in ladders.items()}, parameter_reduction)
    kept = smallest(ladders, parameter_reduction)
    rung = dict.fromkeys(ladders, 0)
    steps = [
        (-threshold(name, j), order, j, name)
        for order, (name, ladder) in enumerate(ladders.items())
        for j in range(len(ladder.ranks) - 1)
    ]
    reached = 0.0
    for negative, _, j, name in sorted(step for step in steps if step[0] < 0):
        shape, ranks = ladders[name].shape, ladders[name].ranks
        kept += shape.parameters(ranks[j + 1]) - shape.parameters(ranks[j])
        if kept > budget:
            reached = -negative
            break
        rung[name] = j + 1
    return {name: ladder.ranks[rung[name]] for name, ladder in ladders.items()}, reached
