"""What the leading components of factors leave over, for every number of them."""

import torch
from torch import Tensor

from .relative_error import pseudo_inverse


def output_errors_by_rank(weight: Tensor, left: Tensor, right: Tensor, moment: Tensor) -> tuple[Tensor, float]:
    """`‖(W − left_r right_r) Xᵀ‖_F / ‖W Xᵀ‖_F` of the r leading components, for every r; and `‖W Xᵀ‖_F`.

    With `E = ‖W Xᵀ‖²`, `C = W G rightᵀ` and `H = right G rightᵀ`, the square of the error is
    `E − 2 Σ_{i≤r} (leftᵀ C)_ii + Σ_{i,j≤r} (leftᵀ left)_ij H_ij`: sums over the components, added up once.

    Args:
        weight: `(m, n)`.
        left: `(m, R)`, not rounded to half precision.
        right: `(R, n)`, likewise.
        moment: `G (n, n)`; or, for factors of the closed form and m < n, `W G Wᵀ (m, m)`.

    Returns:
        Errors `(R + 1,)` float64 for r = 0 … R, of which those below 1e-8 are rounding noise, all zero where the
        outputs are; and the norm.
    """
    left, right, moment = left.double(), right.double(), moment.double()
    if len(moment) == weight.shape[1]:
        weighted = moment @ right.T
        cross, inner = weight.double() @ weighted, right @ weighted
        energy = float((weight.double() @ moment).mul_(weight).sum())
    else:
        inverse = pseudo_inverse(left)
        cross = moment @ inverse.T
        inner, energy = inverse @ cross, float(moment.diagonal().sum())
    gained = (left * cross).sum(0).cumsum(0)
    spent = ((left.T @ left) * inner).cumsum(0).cumsum(1).diagonal()
    squares = torch.cat([left.new_zeros(1), spent - 2 * gained]) + energy
    if energy <= 0:
        return torch.zeros_like(squares), 0.0
    return (squares / energy).clamp_(min=0).sqrt_(), energy**0.5


def inner_products_by_rank(weight: Tensor, left: Tensor, right: Tensor, gradient: Tensor) -> Tensor:
    """`⟨B, left_r right_r − W⟩` of the r leading components, for every r: how a loss with the gradient B changes.

    Args:
        weight: `(m, n)`.
        left: `(m, R)`.
        right: `(R, n)`.
        gradient: `B (m, n)`, of the loss at the weight.

    Returns:
        `(R + 1,)` float64 for r = 0 … R.
    """
    left, right, gradient = left.double(), right.double(), gradient.double()
    terms = ((left.T @ gradient) * right).sum(1)
    return torch.cat([terms.new_zeros(1), terms.cumsum(0)]) - (gradient * weight).sum()
