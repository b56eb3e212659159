"""A matrix of rank r by r of its rows and the coefficients of the others."""

import torch
from torch import Tensor


# Of the index that says where each row is: enough for any layer, and half the bytes of PyTorch's own.
INDEX = torch.int32


def pivot_rows(left: Tensor) -> tuple[Tensor, Tensor]:
    """Choose r rows of which all others are made, with small coefficients.

    Args:
        left: `(m, r)`, m ≥ r, of any rank.

    Returns:
        `order (m,)` int32 and `coefficients (m − r, r)` in the dtype of `left`: row i of `left` is row `order[i]` of
        `[P; coefficients @ P]`, P its r pivot rows.
    """
    m, r = left.shape
    packed, swaps, _ = torch.linalg.lu_factor_ex(left)
    rows = list(range(m))
    for k, swap in enumerate(swaps.tolist()):
        rows[k], rows[swap - 1] = rows[swap - 1], rows[k]
    coefficients = torch.linalg.solve_triangular(packed[:r], packed[r:], upper=False, left=False, unitriangular=True)
    order = torch.empty(m, dtype=INDEX, device=left.device)
    order[torch.tensor(rows, device=left.device)] = torch.arange(m, dtype=INDEX, device=left.device)
    return order, coefficients
