"""Truncated SVD of a weight whose inputs were whitened: the optimum of the outputs again, where G has an inverse."""

import torch
from torch import Tensor


def whitened_svd(weight: Tensor, gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Minimise `‖(W − left right) Xᵀ‖²` by an SVD of `W L`, `G = L Lᵀ`, truncated and multiplied by `L⁻¹`.

    The same product as `output_projection` finds, which needs no inverse. In float64 whatever the weight: inverses
    amplify rounding.

    Args:
        weight: `(m, n)`.
        gram: `(n, n)`, `Xᵀ X`, positive definite.
        rank: 1 … min(m, n).

    Returns:
        `left (m, rank)` and `right (rank, n)`, float64, most important component first.

    Raises:
        torch.linalg.LinAlgError: G is singular, as far as its rounding lets one tell.

    Source:
        arXiv 2403.07378 (SVD-LLM), truncation-aware data whitening.
    """
    root = cholesky_factor(gram)
    u, values, vh = torch.linalg.svd(weight.double() @ root, full_matrices=False)
    right = torch.linalg.solve_triangular(root, vh[:rank], upper=False, left=False)
    return u[:, :rank] * values[:rank], right


def cholesky_factor(gram: Tensor) -> Tensor:
    """L, lower triangular with `L Lᵀ = G (n, n)`, in float64.

    Raises:
        torch.linalg.LinAlgError: of a feature nothing but rounding is left that those before it do not give.
    """
    root, failed = torch.linalg.cholesky_ex(gram.double())
    left_over, rounding = root.diagonal().square(), len(gram) * torch.finfo(gram.dtype).eps * gram.diagonal()
    if int(failed) or bool((left_over <= rounding).any()):
        raise torch.linalg.LinAlgError("the Gram matrix is not positive definite")
    return root
