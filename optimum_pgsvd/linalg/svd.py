"""Truncated SVD and the balance of a pair of factors."""

import torch
from torch import Tensor

from .leading import leading_eigenvectors
from .precision import working_dtype
from .products import self_product


def truncated_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-r approximation of a weight on its own, `left = U_r Σ_r^½`, `right = Σ_r^½ V_rᵀ`.

    Read off the eigenvectors of the smaller of `W Wᵀ` and `Wᵀ W`, several times faster than an SVD. The error is the
    least that a rank-r matrix can have to rounding; singular values below 1e-8 of the largest are only found in sum.

    Args:
        weight: `(m, n)`, any floating dtype.
        rank: 1 … min(m, n).

    Returns:
        `left (m, rank)` and `right (rank, n)`, in the working dtype.

    Source:
        arXiv 2510.05544, initialisation of Algorithm 1.
    """
    dtype = working_dtype(weight.dtype)
    wide = weight.shape[0] < weight.shape[1]
    tall = weight.T if wide else weight
    vectors = leading_eigenvectors(lambda: self_product(tall, torch.float64), rank, dtype)
    images = tall.to(dtype) @ vectors
    outer, inner = balanced(images, vectors.T)
    return (inner.T, outer.T) if wide else (outer, inner)


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
