"""The paper's alternating least squares."""

from collections.abc import Callable

import torch
from torch import Tensor

from .svd import truncated_svd


def alternating_least_squares(
    weight: Tensor,
    gram: Tensor,
    rank: int,
    num_iterations: int,
    on_sweep: Callable[[Tensor, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Minimise `‖(W − left right) Xᵀ‖²` by alternating exact least-squares steps.

    `left ← W G rightᵀ (right G rightᵀ)†`, then `right ← (leftᵀ left)† leftᵀ W`. Only r × r matrices are inverted, by
    pseudo-inverse, so G may be singular. In float64 whatever the weight: pseudo-inverses amplify rounding.

    Args:
        weight: `(m, n)`.
        gram: `(n, n)`, `Xᵀ X`.
        rank: 1 … min(m, n).
        num_iterations: sweeps, at least 1; the paper uses 10.
        on_sweep: called with `left` and `right` after the start and after every sweep.

    Returns:
        `left (m, rank)` and `right (rank, n)`, float64.

    Source:
        arXiv 2510.05544, Algorithm 1.
    """
    weight, gram = weight.double(), gram.double()
    left, right = truncated_svd(weight, rank)
    for _ in range(num_iterations):
        if on_sweep:
            on_sweep(left, right)
        weighted = gram @ right.T
        left = (weight @ weighted) @ torch.linalg.pinv(right @ weighted, hermitian=True)
        right = torch.linalg.pinv(left.T @ left, hermitian=True) @ (left.T @ weight)
    if on_sweep:
        on_sweep(left, right)
    return left, right
