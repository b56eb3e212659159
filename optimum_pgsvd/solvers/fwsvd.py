"""The solver of FWSVD."""

from torch import Tensor

from ..linalg import balanced, scaled_projection
from ..structures import LowRankFactors
from .registry import SOLVERS


@SOLVERS.register("fwsvd", needs="gradients", nested=True)
def fwsvd(weight: Tensor, energies: Tensor, rank: int, num_iterations: int) -> LowRankFactors:
    """Truncated SVD of the weight with each input feature scaled by how much the loss depends on its weights.

    The paper has `Z = X W` with W (inputs, outputs), and one importance for each row of W: the sum over the row of the
    empirical Fisher information, the mean square of the gradient. A row there is an input feature, a column of
    `W (m, n)` here. With `D = diag(√importance)` and `W D = U Σ Vᵀ`, the result is `U_r Σ_r V_rᵀ D⁻¹`; that equals
    `U_r U_rᵀ W`, with U_r the leading eigenvectors of `W D² Wᵀ`, so that nothing is divided by D.

    Args:
        weight: `(m, n)`.
        energies: `(n,)`, for each input feature the squared gradients of its weights, summed over outputs and samples.
        rank: 1 … min(m, n).
        num_iterations: not used.

    Returns:
        Balanced factors in the working dtype, most important component first.

    Source:
        arXiv 2207.00112 (FWSVD).
    """
    return LowRankFactors(*balanced(*scaled_projection(weight, energies, rank)))
