"""The solver that ignores activations."""

from torch import Tensor

from ..linalg import truncated_svd
from ..structures import LowRankFactors
from .registry import SOLVERS


@SOLVERS.register("svd", nested=True)
def svd(weight: Tensor, gram: Tensor | None, rank: int, num_iterations: int) -> LowRankFactors:
    """Truncated SVD of the weight alone.

    Args:
        weight: `(m, n)`.
        gram: not used.
        rank: 1 … min(m, n).
        num_iterations: not used.

    Returns:
        Balanced factors in the working dtype, most important component first.
    """
    return LowRankFactors(*truncated_svd(weight, rank))
