"""PGSVD's allocation for models of several towers: one tolerance for each, under one budget."""

from collections.abc import Mapping

from ..structures import Budget, LayerPlan, LinearShape, RankPlan, SVDProfile
from .ladder import Ladder, climb
from .pareto import pareto
from .registry import ALLOCATIONS


@ALLOCATIONS.register("towers", profile="weights", takes_tolerance=True, searches="a tolerance for each tower")
def towers(
    shapes: Mapping[str, LinearShape], profiles: Mapping[str, SVDProfile], budget: Budget, rank_multiple: int
) -> RankPlan:
    """As `pareto`: of a group of layers that is no part of the search, or where it begins."""
    return pareto(shapes, profiles, budget, rank_multiple)


def scaled_tolerances(
    shapes: Mapping[str, LinearShape],
    profiles: Mapping[str, SVDProfile],
    parameter_reduction: float,
    rank_multiple: int,
    scales: Mapping[str, float],
) -> RankPlan:
    """Give every layer the smallest rank whose relative error is at most `ε s`, with s the scale of its tower.

    ε is the smallest that keeps all of them together within the budget. With one scale for all this is `pareto`.

    Args:
        shapes: by layer name, in model order.
        profiles: `e(r)` of every layer.
        parameter_reduction: fraction to remove, in [0, 1).
        rank_multiple: ranks are multiples of it.
        scales: s of every layer, above 0.

    Returns:
        The plan, with `ε s` of each layer and its planned error.

    Raises:
        ConfigError: the budget cannot be met.

    Source:
        arXiv 2510.05544 gives each tower of a vision-language model an ε of its own, and leaves open how they are
        chosen. That they share one budget by their ratios is ours.
    """
    ladders = {name: Ladder.of(shape, rank_multiple) for name, shape in shapes.items()}

    def scaled_error(name: str, j: int) -> float:
        return profiles[name].relative_error(ladders[name].ranks[j]) / scales[name]

    ranks, tolerance = climb(ladders, scaled_error, parameter_reduction)
    return RankPlan(
        {
            name: LayerPlan(
                shape,
                ranks[name],
                tolerance=min(1.0, tolerance * scales[name]),
                relative_error=profiles[name].relative_error(ranks[name]),
            )
            for name, shape in shapes.items()
        }
    )
