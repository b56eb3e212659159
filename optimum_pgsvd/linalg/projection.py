"""The closed-form optimum of the activation-aware objective: a projection of the layer's outputs."""

from collections.abc import Callable

import torch
from torch import Tensor

from .leading import leading_eigenvectors
from .precision import layer_dtype
from .products import output_moment, self_product


# Relative to the mean of G's diagonal. Where the calibration set leaves several factors equally good, as with a rank
# above the number of tokens, this weight on `‖W − left right‖²` decides between them. It is far above the rounding of
# sums in that dtype. The objective of hard Gram matrices rises by at most 1e-3 of an optimum that is itself below the
# rounding of half-precision factors.
TIE_BREAK = {torch.float64: 1e-10, torch.float32: 1e-6}


def output_projection(weight: Tensor, gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Global minimum of `‖(W − left right) Xᵀ‖²` over all rank-r factors.

    `left = U_r`, `right = U_rᵀ W`, with `U_r` the r leading eigenvectors of `W G Wᵀ`. Nothing is inverted, so G may
    be singular; among equally good factors those closest to W are taken. The outputs of a tall weight (m > n) lie in
    its column space: with `W = Q R`, `U_r = Q Z_r` and `right = Z_rᵀ R`, `Z_r` the leading eigenvectors of the n × n
    matrix `R G Rᵀ`.

    Args:
        weight: `(m, n)`.
        gram: `(n, n)`, `Xᵀ X`, float32 or float64.
        rank: 1 … min(m, n).

    Returns:
        `left (m, rank)` with orthonormal columns, most important first, and `right (rank, n)`, in the layer's dtype.

    Source:
        Closed form of arXiv 2510.05544, Eq. 2; also arXiv 2604.01609.
    """
    ridge = TIE_BREAK[gram.dtype] * float(gram.diagonal().mean())

    def moment(rows: Tensor, triangular: bool) -> Tensor:
        return output_moment(rows, gram, ridge, triangular)

    return projected(weight, moment, rank, layer_dtype(weight, gram))


def scaled_projection(weight: Tensor, energies: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """What `output_projection` finds where G is diagonal: the truncated SVD of `W S`, times `S⁻¹`, without dividing.

    Args:
        weight: `(m, n)`.
        energies: `(n,)`, the squares of the scales S, 0 or more; float32 or float64.
        rank: 1 … min(m, n).

    Returns:
        As `output_projection`.
    """
    scales = (energies.double() + TIE_BREAK[energies.dtype] * float(energies.mean())).sqrt()

    def moment(rows: Tensor, triangular: bool) -> Tensor:
        scaled = rows.double() * scales
        return self_product((scaled.triu() if triangular else scaled).T, torch.float64)

    return projected(weight, moment, rank, layer_dtype(weight, energies))


def projected(
    weight: Tensor, moment: Callable[[Tensor, bool], Tensor], rank: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A weight, projected on the leading eigenvectors of the second moment of its outputs.

    Args:
        weight: `(m, n)`.
        moment: gives `A G Aᵀ` of a matrix A with n columns, or of the upper triangle of a square one.
        rank: 1 … min(m, n).
        dtype: of the result.
    """
    m, n = weight.shape
    if m <= n:
        basis = leading_eigenvectors(lambda: moment(weight, False), rank, dtype)
        return basis, basis.T @ weight.to(dtype)
    packed, scales = torch.geqrf(weight.to(dtype))
    basis = leading_eigenvectors(lambda: moment(packed[:n], True), rank, dtype)
    left = torch.ormqr(packed, scales, torch.cat([basis, basis.new_zeros(m - n, rank)]))
    return left, basis.T @ packed[:n].triu()


def projection_of_outputs(weight: Tensor, moment: Tensor, energies: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """What `output_projection` finds, from the second moment of the layer's outputs instead of that of its inputs.

    For a layer with m < n this is the smaller of the two. Outputs as a half-precision model rounds them will do.

    Args:
        weight: `(m, n)`.
        moment: `(m, m)`, `Yᵀ Y = W G Wᵀ` of the outputs `Y = X Wᵀ (T, m)`, bias removed, float32 or float64.
        energies: `(n,)`, the diagonal of G.
        rank: 1 … min(m, n).

    Returns:
        As `output_projection`.

    Source:
        arXiv 2604.01609.
    """
    dtype = layer_dtype(weight, moment)
    ridge = TIE_BREAK[moment.dtype] * float(energies.mean())
    basis = leading_eigenvectors(lambda: ridge * self_product(weight.T, dtype) + moment.double(), rank, dtype)
    return basis, basis.T @ weight.to(dtype)
