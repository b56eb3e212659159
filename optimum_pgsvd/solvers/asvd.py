"""The solver of ASVD."""

from torch import Tensor

from ..linalg import balanced, scaled_projection
from ..structures import LowRankFactors
from .registry import SOLVERS


# The exponent of the paper's experiments.
ALPHA = 0.5


@SOLVERS.register("asvd", needs="magnitudes", nested=True)
def asvd(weight: Tensor, magnitudes: Tensor, rank: int, num_iterations: int) -> LowRankFactors:
    """Truncated SVD of the weight with each input feature scaled by how large it is.

    With `S = diag(mean |x|)^α` and `W S = U Σ Vᵀ`, the result is `U_r Σ_r V_rᵀ S⁻¹`. That equals `U_r U_rᵀ W`, with
    U_r the leading eigenvectors of `W S² Wᵀ`: so nothing is divided by S, and a feature that is always zero needs no
    exception. The optimum for inputs that are not correlated and have S² for their energies.

    Args:
        weight: `(m, n)`.
        magnitudes: `(n,)`, the mean of |x| of each input feature.
        rank: 1 … min(m, n).
        num_iterations: not used.

    Returns:
        Balanced factors in the working dtype, most important component first.

    Source:
        arXiv 2312.05821 (ASVD), the scaling by means of absolute values with α = 0.5. Its search for ranks is
        `allocation="asvd"`.
    """
    return LowRankFactors(*balanced(*scaled_projection(weight, magnitudes.pow(2 * ALPHA), rank)))
