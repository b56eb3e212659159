"""The leading eigenvectors of a second moment, in as little precision as does no harm."""

from collections.abc import Callable

import torch
from torch import Tensor

from .products import panels
from .spectra import symmetric_eigen


# Vectors iterated on to find the dominant eigenvectors, and sweeps. An eigenvalue is dominant at `CONTRAST` times the
# least that is found; each sweep brings its vector nearer by that factor.
BLOCK = 64
SWEEPS = 6
CONTRAST = 3.0

# Float32 blurs eigenvectors into one another where their eigenvalues are far below the largest. At this part of it,
# the objective was seen to rise by 1e-4 of its optimum, at a tenth of this part by 1e-2.
RESOLUTION = 2e-5


def leading_eigenvectors(moment: Callable[[], Tensor], count: int, dtype: torch.dtype) -> Tensor:
    """The leading eigenvectors of a second moment.

    Args:
        moment: makes the `(k, k)` float64 matrix, symmetric positive semi-definite. Made here, it is gone before the
            decomposition in float32 takes its memory.
        count: 1 … k.
        dtype: float64 or float32; where float32 cannot tell the eigenvectors apart, as with more ranks than tokens,
            float64 is used after all.

    Returns:
        `(k, count)` of this dtype, orthonormal to its rounding, most important first.
    """
    vectors = None if dtype == torch.float64 else float32_eigenvectors(moment, count)
    if vectors is None:
        vectors = symmetric_eigen(moment())[1][:, :count].to(dtype)
    return vectors


def float32_eigenvectors(moment: Callable[[], Tensor], count: int) -> Tensor | None:
    """The same in float32; `None` where it cannot tell them apart.

    Its rounding is relative to the largest eigenvalue, and a few outlier features or tokens can make that a million
    times most others. So the dominant eigenvectors are split off in float64 first.
    """
    matrix = moment()
    dominant = dominant_eigenvectors(matrix)[:, :count]
    rest = count - dominant.shape[1]
    if rest == 0:
        return dominant.float()
    remainder = deflated(matrix, dominant, torch.float32)
    del matrix
    values, vectors = torch.linalg.eigh(remainder)
    if values[-rest] <= RESOLUTION * values[-1]:
        return None
    dominant, others = dominant.float(), vectors[:, -rest:].flip(1)
    return torch.cat([dominant, others - dominant @ (dominant.T @ others)], dim=1)


def dominant_eigenvectors(matrix: Tensor) -> Tensor:
    """Eigenvectors whose eigenvalues stand out, by subspace iteration from a fixed random start.

    Args:
        matrix: `(k, k)` float64, symmetric positive semi-definite.

    Returns:
        `(k, j)` float64 with 0 ≤ j < 64, largest eigenvalue first.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(len(matrix), min(BLOCK, len(matrix)), generator=generator, dtype=matrix.dtype)
    block = start.to(matrix.device)
    for _ in range(SWEEPS):
        block = matrix @ torch.linalg.qr(block)[0]
    block = torch.linalg.qr(block)[0]
    values, turn = symmetric_eigen(block.T @ (matrix @ block))
    return block @ turn[:, values > CONTRAST * values[-1]]


def deflated(matrix: Tensor, vectors: Tensor, dtype: torch.dtype) -> Tensor:
    """`P M P` with P the projection onto what is orthogonal to some vectors, rounded once.

    Args:
        matrix: `(k, k)` M, symmetric.
        vectors: `(k, j)`, orthonormal, of the matrix's dtype.
        dtype: of the result.

    Returns:
        `(k, k)`.
    """
    image = matrix @ vectors
    half = image - vectors @ (vectors.T @ image) / 2
    result = torch.empty_like(matrix, dtype=dtype)
    for rows in panels(len(matrix)):
        result[rows] = matrix[rows] - vectors[rows] @ half.T - half[rows] @ vectors.T
    return result
