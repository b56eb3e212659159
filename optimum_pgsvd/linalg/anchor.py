"""What a layer should aim at when its inputs come from blocks that were compressed before it."""

import torch
from torch import Tensor


# Relative to the mean of the Gram matrix's diagonal. Where the calibration set says little, the weight stays as it is.
RIDGE = 1e-4


def anchored_weight(weight: Tensor, gram: Tensor, cross: Tensor) -> Tensor:
    """The weight that maps the inputs a layer will get to the outputs it should have.

    With `X_c` the inputs produced by the compressed blocks and `X_β` those the layer's outputs are anchored to, it
    minimises `‖W X_βᵀ − A X_cᵀ‖² + δ ‖A − W‖²`: `A = W (C_βc + δ I) (C_cc + δ I)⁻¹`, `C_cc = X_cᵀ X_c`,
    `C_βc = X_βᵀ X_c`. A low-rank approximation of A under the Gram matrix `C_cc` is then the reduced-rank regression
    of `W X_βᵀ` on `X_cᵀ`.

    Args:
        weight: `(m, n)`.
        gram: `C_cc (n, n)`.
        cross: `C_βc (n, n)`; equal to `gram` where the two inputs are, and then A is W.

    Returns:
        `(m, n)` float64.

    Source:
        arXiv 2602.03051 (SAES-SVD) and 2604.02119 (AA-SVD); the pull towards W is ours.
    """
    weight, gram, cross = weight.double(), gram.double(), cross.double()
    ridge = RIDGE * float(gram.diagonal().mean()) or 1.0
    eye = ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + eye, (weight @ (cross + eye)).T).T
