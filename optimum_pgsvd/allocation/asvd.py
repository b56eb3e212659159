"""ASVD's allocation: one threshold for the loss that a model has with one layer compressed alone."""

from collections.abc import Mapping, Sequence

from ..structures import Budget, LayerPlan, LinearShape, RankPlan
from .ladder import Ladder, climb, given_reduction
from .registry import ALLOCATIONS


# Of a layer's parameters, those that the paper tries to keep.
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@ALLOCATIONS.register("asvd", profile="losses", searches="ranks", shares=SHARES)
def asvd(
    shapes: Mapping[str, LinearShape],
    profiles: Mapping[str, Mapping[int, float]],
    budget: Budget,
    rank_multiple: int,
) -> RankPlan:
    """Give every layer the smallest rank at which the model's loss is within one threshold for all.

    The ranks are those that keep 0.1 … 0.9 of a layer's parameters, and the loss is the model's with this layer alone
    compressed. A layer without such a rank stays dense. The threshold is the least that keeps the parameters within
    the budget. A rank at which the loss is no lower than at a smaller one is never chosen.

    Args:
        shapes: by layer name, in model order.
        profiles: by layer, the loss at each rank of `Ladder.of(shape, rank_multiple, SHARES)`; finite.
        budget: a parameter reduction.
        rank_multiple: ranks are multiples of it.

    Returns:
        The plan, within the budget and one step of one layer of it.

    Raises:
        ConfigError: the budget is a tolerance, or cannot be met.

    Source:
        arXiv 2312.05821 (ASVD), sensitivity-based truncation rank searching. Its binary search ends within one step of
        the target, on either side of it; that it ends within the budget is ours. The loss is the logarithm of its
        perplexity, which has the same order.
    """
    reduction = given_reduction(budget, "asvd")
    ladders = {
        name: Ladder(shape, worthwhile(Ladder.of(shape, rank_multiple, SHARES).ranks, profiles[name]))
        for name, shape in shapes.items()
    }
    # Only their order counts, and a loss may be of any sign.
    ordered = sorted({loss for name in shapes for loss in profiles[name].values()})
    places = {loss: place for place, loss in enumerate(ordered, start=1)}

    def place_of_loss(name: str, j: int) -> int:
        rank = ladders[name].ranks[j]
        assert rank is not None, "dense is the last rung, which is never left"
        return places[profiles[name][rank]]

    ranks, _ = climb(ladders, place_of_loss, reduction)
    return RankPlan({name: LayerPlan(shape, ranks[name]) for name, shape in shapes.items()})


def worthwhile(ranks: Sequence[int | None], losses: Mapping[int, float]) -> tuple[int | None, ...]:
    """The ranks at which the loss is lower than at every smaller one, and dense."""
    kept: list[int] = []
    for rank in ranks:
        if rank is not None and (not kept or losses[rank] < losses[kept[-1]]):
            kept.append(rank)
    return (*kept, None)
