"""The solver of SVD-LLM."""

from torch import Tensor

from ..linalg import balanced, whitened_svd
from ..structures import LowRankFactors
from .registry import SOLVERS


@SOLVERS.register("svd_llm", needs="gram", inverts=True, nested=True)
def svd_llm(weight: Tensor, gram: Tensor, rank: int, num_iterations: int) -> LowRankFactors:
    """Truncated SVD of the weight behind whitened inputs: what `eigh` finds, where the Gram matrix has an inverse.

    With `G = L Lᵀ` and `W L = U Σ Vᵀ`, `left = U_r Σ_r^½` and `right = Σ_r^½ V_rᵀ L⁻¹`. Where G is singular, as with
    fewer tokens than features or a feature that is always zero, L has no inverse. The authors' code then adds to G's
    diagonal until it has; here that is an error.

    Args:
        weight: `(m, n)`.
        gram: `(n, n)`, positive definite.
        rank: 1 … min(m, n).
        num_iterations: not used.

    Returns:
        Balanced float64 factors, most important component first.

    Raises:
        torch.linalg.LinAlgError: G is singular.

    Source:
        arXiv 2403.07378 (SVD-LLM), truncation-aware data whitening; without the fine-tuning that follows it there.
    """
    return LowRankFactors(*balanced(*whitened_svd(weight, gram, rank)))
