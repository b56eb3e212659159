"""Truncated SVD and the balance of a pair of factors."""

import torch
from torch import Tensor


def truncated_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-r approximation of a weight on its own, `left = U_r Σ_r^½`, `right = Σ_r^½ V_rᵀ`.

    Args:
        weight: `(m, n)`, any floating dtype.
        rank: 1 … min(m, n).

    Returns:
        `left (m, rank)` and `right (rank, n)`, float64.

    Source:
        arXiv 2510.05544, initialisation of Algorithm 1.
    """
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]


def balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Scale each component so that its column in `left` and its row in `right` have the same norm.

    The product does not change. Equal norms keep both factors in the range of half precision and give training a
    balanced start.

    Args:
        left: `(m, r)`.
        right: `(r, n)`.

    Returns:
        The scaled pair; a component that is zero on one side is left as it is.
    """
    a, b = left.norm(dim=0), right.norm(dim=1)
    scale = torch.where((a > 0) & (b > 0), (b / a).sqrt(), torch.ones_like(a))
    return left * scale, right / scale[:, None]
