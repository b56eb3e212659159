"""PGSVD's allocation: one uniform error tolerance for every layer of a group."""

from collections.abc import Mapping

from ..structures import Budget, LayerPlan, LinearShape, RankPlan, SVDProfile
from .ladder import Ladder, climb
from .registry import ALLOCATIONS


@ALLOCATIONS.register("pareto", profile="weights", takes_tolerance=True)
@ALLOCATIONS.register("pareto_outputs", profile="outputs", takes_tolerance=True)
def pareto(
    shapes: Mapping[str, LinearShape], profiles: Mapping[str, SVDProfile], budget: Budget, rank_multiple: int
) -> RankPlan:
    """Give every layer the smallest rank whose relative error is at most ε.

    With a `tolerance`, ε is given. With a `parameter_reduction`, ε is the smallest that keeps the parameters within
    the budget. A layer that factors would not make smaller stays dense, with error 0.

    As `"pareto"`, errors are those of the plain weights, as in the paper; as `"pareto_outputs"`, of the outputs on the
    calibration set.

    Args:
        shapes: by layer name, in model order.
        profiles: `e(r)` of every layer.
        budget: tolerance or parameter reduction.
        rank_multiple: ranks are multiples of it.

    Returns:
        The plan, with the ε of each layer and its planned error.

    Raises:
        ConfigError: the budget cannot be met.

    Source:
        arXiv 2510.05544, Theorem 2: with equal sensitivities, one ε for all layers is Pareto-optimal for the
        surrogate. The paper does not say how ε meets a target; the exact search over its breakpoints is ours.
    """
    ladders = {name: Ladder.of(shape, rank_multiple) for name, shape in shapes.items()}
    errors = {
        name: [0.0 if rank is None else float(profiles[name].errors[rank]) for rank in ladder.ranks]
        for name, ladder in ladders.items()
    }
    if budget.parameter_reduction is not None:
        ranks, tolerance = climb(ladders, lambda name, j: errors[name][j], budget.parameter_reduction)
    else:
        tolerance = budget.tolerance or 0.0
        ranks = {
            name: next(rank for rank, error in zip(ladder.ranks, errors[name], strict=True) if error <= tolerance)
            for name, ladder in ladders.items()
        }
    return RankPlan(
        {
            name: LayerPlan(
                shape, ranks[name], tolerance=tolerance, relative_error=profiles[name].relative_error(ranks[name])
            )
            for name, shape in shapes.items()
        }
    )
