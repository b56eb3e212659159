"""The paper's surrogate, minimised for sensitivities that are not all equal; no registered allocation, but a study."""

from collections.abc import Mapping

from ..structures import LayerPlan, LinearShape, RankPlan, SVDProfile
from .ladder import Ladder, climb
from .loss import hull_slopes


def least_surrogate(
    shapes: Mapping[str, LinearShape],
    profiles: Mapping[str, SVDProfile],
    sensitivities: Mapping[str, float],
    parameter_reduction: float,
    rank_multiple: int = 1,
    dense: bool = True,
) -> RankPlan:
    """The ranks with the least `Σ α_l e_l(r_l)` within a budget, by the Lagrangian along each layer's convex hull.

    Args:
        shapes: by layer name, in model order.
        profiles: `e_l(r)` of every layer.
        sensitivities: `α_l` of every layer, 0 or more.
        parameter_reduction: fraction to remove.
        rank_multiple: ranks are multiples of it.
        dense: whether a layer that factors can make smaller may stay dense, at no error. The paper does not say; all
            its layers are factored.

    Returns:
        The plan: of all that keep as many parameters, one with the least surrogate where it ends on the hulls, and
        within one rank step of that elsewhere.

    Raises:
        ConfigError: the budget cannot be met.

    Source:
        arXiv 2510.05544, the rank problem before sensitivities are taken as equal; the Lagrangian is ours.
    """
    ladders = {name: Ladder.of(shape, rank_multiple) for name, shape in shapes.items()}
    if not dense:
        ladders = {name: Ladder(each.shape, each.ranks[:-1] or each.ranks) for name, each in ladders.items()}
    slopes = {}
    for name, ladder in ladders.items():
        errors = [sensitivities[name] * profiles[name].relative_error(rank) for rank in ladder.ranks]
        slopes[name] = hull_slopes([ladder.shape.parameters(rank) for rank in ladder.ranks], errors)
    ranks, _ = climb(ladders, lambda name, j: slopes[name][j], parameter_reduction)
    return RankPlan(
        {
            name: LayerPlan(shape, ranks[name], relative_error=profiles[name].relative_error(ranks[name]))
            for name, shape in shapes.items()
        }
    )
