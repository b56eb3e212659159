"""The allocation that measures what the paper assumes equal: how much the loss depends on each layer."""

import math
from collections.abc import Mapping, Sequence

from ..structures import Budget, LayerPlan, LinearShape, RankPlan, SVDProfile
from .ladder import Ladder, climb, given_reduction
from .registry import ALLOCATIONS


# The largest share of a layer that counts as lost: the charge for all of it would be infinite.
MOST = 1 - 1e-12


@ALLOCATIONS.register("loss", profile="loss")
def loss(
    shapes: Mapping[str, LinearShape], profiles: Mapping[str, SVDProfile], budget: Budget, rank_multiple: int
) -> RankPlan:
    """Spend each parameter where it lowers the predicted loss most; a layer kept dense is one of its options.

    Let `w = Σ σ_i²` be what a layer counts for the loss, and `t = Σ_{i>r} σ_i² / w` the share of it that a rank r
    leaves out. To second order the loss rises by `w t`; what is charged is `−w log(1 − t)`, the same for small t, and
    without bound for large ones, where the second order says too little. The sum of the charges is minimised by its
    Lagrangian: rank by rank, along the lower convex hull of what each layer's ranks cost and save.

    Args:
        shapes: by layer name, in model order.
        profiles: of σ, of `weighted_spectrum`, comparable between layers.
        budget: a parameter reduction.
        rank_multiple: ranks are multiples of it.

    Returns:
        The plan.

    Raises:
        ConfigError: the budget is a tolerance, or cannot be met.

    Source:
        arXiv 2510.05544, Proposition 1, with α_l measured and to second order; the logarithm is ours.
    """
    reduction = given_reduction(budget, "loss")
    ladders = {name: Ladder.of(shape, rank_multiple) for name, shape in shapes.items()}
    slopes = {name: hull_slopes(*charges(ladder, profiles[name])) for name, ladder in ladders.items()}
    ranks, _ = climb(ladders, lambda name, j: slopes[name][j], reduction)
    return RankPlan({name: LayerPlan(shape, ranks[name]) for name, shape in shapes.items()})


def charges(ladder: Ladder, profile: SVDProfile) -> tuple[list[int], list[float]]:
    """Parameters, and what is charged for the share of the layer that is left out, on each rung."""
    weight = float(profile.values.double().square().sum())
    lost = (min(profile.relative_error(rank) ** 2, MOST) for rank in ladder.ranks)
    return [ladder.shape.parameters(rank) for rank in ladder.ranks], [-weight * math.log1p(-share) for share in lost]


def hull_slopes(costs: Sequence[float], losses: Sequence[float]) -> list[float]:
    """What a parameter saves between each rung and the next, on the lower convex hull of the rungs.

    Args:
        costs: rising.
        losses: never rising.

    Returns:
        One slope for each step, none above the one before it.
    """

    def slope(here: int, there: int) -> float:
        return (losses[here] - losses[there]) / (costs[there] - costs[here])

    hull = [0]
    for j in range(1, len(costs)):
        while len(hull) > 1 and slope(hull[-1], j) >= slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(j)
    slopes: list[float] = []
    for here, there in zip(hull, hull[1:], strict=False):
        slopes += [slope(here, there)] * (there - here)
    return slopes
