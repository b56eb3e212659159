"""The allocation of SVD-LLM V2: within each type of layer, those that lose more are compressed less."""

import math
import re
from collections.abc import Mapping

from ..structures import Budget, LayerPlan, LinearShape, RankPlan, SVDProfile
from .ladder import Ladder, climb, given_reduction
from .registry import ALLOCATIONS


# A layer that loses less than this counts as if it lost this much: one that loses nothing would take all of a share.
LEAST_LOSS = 1e-6


@ALLOCATIONS.register("svd_llm_v2", profile="outputs")
def svd_llm_v2(
    shapes: Mapping[str, LinearShape], profiles: Mapping[str, SVDProfile], budget: Budget, rank_multiple: int
) -> RankPlan:
    """Remove from each layer of a type a fraction in proportion to `1 / log L`, L being what it loses at equal ranks.

    Layers are of one type where their names differ in numbers only, as do the q projections of all blocks. With R the
    reduction, `L_i` is the least `‖(W − Ŵ) Xᵀ‖_F` at the rank that removes R of layer i, and its share of the type's
    N layers is `R_i = N R s_i / Σ s_j`, `s_i = 1 / log L_i`. The paper leaves open, and we chose:

    * `L ≤ 1`, whose logarithm is no divisor, and L a little above 1, which would take all: `s = 1 / log(1 + L)`, the
      same for large L. L is in the units of the outputs, summed over the calibration set, as there: more data brings
      the shares nearer to one another.
    * layers of one type with different shapes: shares are such that the type as a whole loses R.
    * `R_i` above what a layer can lose, and ranks that must be whole: of every layer `t R_i` is removed, as far as it
      goes, with one t for all that meets the budget as other allocations do. t is near 1.

    Shares depend on R, so that a larger budget may lower the rank of a layer.

    Args:
        shapes: by layer name, in model order.
        profiles: of the outputs, of `output_spectrum`.
        budget: a parameter reduction.
        rank_multiple: ranks are multiples of it.

    Returns:
        The plan.

    Raises:
        ConfigError: the budget is a tolerance, or cannot be met.

    Source:
        arXiv 2503.12340 (SVD-LLM V2), heterogeneous compression ratio allocation.
    """
    reduction = given_reduction(budget, "svd_llm_v2")
    ladders = {name: Ladder.of(shape, rank_multiple) for name, shape in shapes.items()}
    weights = relative_shares(shapes, {name: lost(ladders[name], profiles[name], reduction) for name in shapes})

    def share_removed(name: str, j: int) -> float:
        """As of uniform ranks, in units of what is to be removed of the layer."""
        shape = shapes[name]
        share = 1 - shape.parameters(ladders[name].ranks[j + 1]) / shape.dense_parameters
        return max(share, 1e-15) / weights[name]

    ranks, _ = climb(ladders, share_removed, reduction)
    return RankPlan({name: LayerPlan(shape, ranks[name]) for name, shape in shapes.items()})


def lost(ladder: Ladder, profile: SVDProfile, reduction: float) -> float:
    """What a layer's outputs lose, `‖·‖_F`, at the largest rank that removes a fraction of it, or the smallest."""
    limit = (1 - reduction) * ladder.shape.dense_parameters * (1 + 1e-12)
    rank = [rank for rank in ladder.ranks if ladder.shape.parameters(rank) <= limit or rank == ladder.ranks[0]][-1]
    return profile.relative_error(rank) * float(profile.values.double().norm())


def relative_shares(shapes: Mapping[str, LinearShape], losses: Mapping[str, float]) -> dict[str, float]:
    """The fraction to be removed of each layer, relative to that of its type as a whole."""
    inverse = {name: 1 / math.log1p(max(loss, LEAST_LOSS)) for name, loss in losses.items()}
    sizes: dict[str, float] = {}
    totals: dict[str, float] = {}
    for name, shape in shapes.items():
        kind = kind_of(name)
        sizes[kind] = sizes.get(kind, 0) + shape.dense_parameters
        totals[kind] = totals.get(kind, 0.0) + shape.dense_parameters * inverse[name]
    return {name: inverse[name] * sizes[kind_of(name)] / totals[kind_of(name)] for name in shapes}


def kind_of(name: str) -> str:
    """A layer's name with its numbers left out."""
    return re.sub(r"(^|(?<=\.))\d+(?=\.|$)", "*", name)
