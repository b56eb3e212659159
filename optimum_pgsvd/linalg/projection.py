"""The closed-form optimum of the activation-aware objective: a projection of the layer's outputs."""

import torch
from torch import Tensor

from .spectra import symmetric_eigen


# Relative to the mean of G's diagonal. Where the calibration set leaves several factors equally good, as with a rank
# above the number of tokens, this weight on `‖W − left right‖²` decides between them; it is far above float64 rounding
# and far below any effect on the objective.
TIE_BREAK = 1e-10


def output_projection(weight: Tensor, gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Global minimum of `‖(W − left right) Xᵀ‖²` over all rank-r factors.

    `left = U_r`, `right = U_rᵀ W`, with `U_r` the r leading eigenvectors of `W G Wᵀ`. Nothing is inverted, so G may
    be singular; among equally good factors those closest to W are taken. A tall weight (m > n) takes the n × n side:
    with `G = V D Vᵀ` and `B = W V D^½`, the leading right singular vectors `Z_r` of B give `U_r` as an orthonormal
    basis of `B Z_r`.

    Args:
        weight: `(m, n)`.
        gram: `(n, n)`, `Xᵀ X`.
        rank: 1 … min(m, n).

    Returns:
        `left (m, rank)` with orthonormal columns, most important first, and `right (rank, n)`, float64.

    Source:
        Closed form of arXiv 2510.05544, Eq. 2; also arXiv 2604.01609.
    """
    weight, gram = weight.double(), gram.double()
    m, n = weight.shape
    gram = gram + TIE_BREAK * gram.diagonal().mean() * torch.eye(n, dtype=gram.dtype, device=gram.device)
    if m <= n:
        basis = symmetric_eigen(weight @ gram @ weight.T)[1][:, :rank]
    else:
        values, vectors = symmetric_eigen(gram)
        outputs = weight @ (vectors * values.sqrt())
        leading = symmetric_eigen(outputs.T @ outputs)[1][:, :rank]
        basis = torch.linalg.qr(outputs @ leading)[0]
    return basis, basis.T @ weight
