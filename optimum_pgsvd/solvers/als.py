"""The paper's solver."""

from torch import Tensor

from ..linalg import alternating_least_squares, balanced
from ..structures import LowRankFactors
from .registry import SOLVERS


@SOLVERS.register("als", needs="gram")
def als(weight: Tensor, gram: Tensor, rank: int, num_iterations: int) -> LowRankFactors:
    """Alternating least squares from the truncated SVD.

    Args:
        weight: `(m, n)`.
        gram: `(n, n)`.
        rank: 1 … min(m, n).
        num_iterations: sweeps; the paper uses 10.

    Returns:
        Balanced float64 factors.

    Source:
        arXiv 2510.05544, Algorithm 1.
    """
    return LowRankFactors(*balanced(*alternating_least_squares(weight, gram, rank, num_iterations)))
