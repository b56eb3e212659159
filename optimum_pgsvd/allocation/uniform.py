"""The baseline's allocation: the same fraction of every layer."""

from collections.abc import Mapping

from ..structures import Budget, LayerPlan, LinearShape, RankPlan, SVDProfile
from .ladder import Ladder, climb, given_reduction
from .registry import ALLOCATIONS


@ALLOCATIONS.register("uniform")
def uniform(
    shapes: Mapping[str, LinearShape], profiles: Mapping[str, SVDProfile], budget: Budget, rank_multiple: int
) -> RankPlan:
    """Keep the same fraction of parameters in every layer, `r = ⌊κ m n / (m + n)⌋`, with the largest κ that fits.

    Args:
        shapes: by layer name, in model order.
        profiles: not needed.
        budget: a parameter reduction.
        rank_multiple: ranks are multiples of it.

    Returns:
        The plan.

    Raises:
        ConfigError: the budget is a tolerance, or cannot be met.

    Source:
        The "SVD-ALS" rows of arXiv 2510.05544, and SVD-LLM.
    """
    reduction = given_reduction(budget, "uniform")
    ladders = {name: Ladder.of(shape, rank_multiple) for name, shape in shapes.items()}

    def share_removed(name: str, j: int) -> float:
        """Fraction of the layer that is removed on the rung above j; 1e-15 for dense, which is reached last."""
        shape = shapes[name]
        return max(1 - shape.parameters(ladders[name].ranks[j + 1]) / shape.dense_parameters, 1e-15)

    ranks, _ = climb(ladders, share_removed, reduction)
    return RankPlan({name: LayerPlan(shape, ranks[name]) for name, shape in shapes.items()})
