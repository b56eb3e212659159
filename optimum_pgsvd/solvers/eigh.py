"""The closed-form solver."""

from torch import Tensor

from ..linalg import balanced, output_projection, projection_of_outputs, weighted_projection
from ..structures import LowRankFactors, Moments
from .registry import SOLVERS


@SOLVERS.register("eigh", needs="gram", takes_outputs=True, nested=True, takes_curvature=True)
def eigh(weight: Tensor, gram: Tensor, rank: int, num_iterations: int) -> LowRankFactors:
    """Global optimum of the objective that ALS iterates on, from one eigendecomposition.

    Args:
        weight: `(m, n)`.
        gram: `(n, n)`.
        rank: 1 … min(m, n).
        num_iterations: not used.

    Returns:
        Balanced factors in the working dtype, most important component first.

    Source:
        Closed form of arXiv 2510.05544, Eq. 2; also arXiv 2604.01609.
    """
    return LowRankFactors(*balanced(*output_projection(weight, gram, rank)))


def eigh_of_outputs(weight: Tensor, moment: Tensor, energies: Tensor, rank: int) -> LowRankFactors:
    """The same optimum, from the second moment of a layer's outputs; for m ≤ n.

    Args:
        weight: `(m, n)`.
        moment: `(m, m)`, `W G Wᵀ`.
        energies: `(n,)`, the diagonal of G.
        rank: 1 … min(m, n).

    Returns:
        As `eigh`.
    """
    return LowRankFactors(*balanced(*projection_of_outputs(weight, moment, energies, rank)))


def eigh_of_loss(weight: Tensor, moments: Moments, curvature: Tensor, rank: int) -> LowRankFactors:
    """The optimum where errors of outputs are measured by what they cost the loss.

    Args:
        weight: `(m, n)`.
        moments: of the layer.
        curvature: of `measure_curvature`, `(k, k)` with k = min(m, n).
        rank: 1 … min(m, n).

    Returns:
        As `eigh`.
    """
    return LowRankFactors(*balanced(*weighted_projection(weight, moments.measured, moments.energies, curvature, rank)))
