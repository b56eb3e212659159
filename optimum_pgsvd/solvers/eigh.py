"""The closed-form solver."""

from torch import Tensor

from ..linalg import balanced, output_projection
from ..structures import LowRankFactors
from .registry import SOLVERS


@SOLVERS.register("eigh", needs_gram=True)
def eigh(weight: Tensor, gram: Tensor, rank: int, num_iterations: int) -> LowRankFactors:
    """Global optimum of the objective that ALS iterates on, from one eigendecomposition.

    Args:
        weight: `(m, n)`.
        gram: `(n, n)`.
        rank: 1 … min(m, n).
        num_iterations: not used.

    Returns:
        Balanced float64 factors, most important component first.

    Source:
        Closed form of arXiv 2510.05544, Eq. 2; also arXiv 2604.01609.
    """
    return LowRankFactors(*balanced(*output_projection(weight, gram, rank)))
