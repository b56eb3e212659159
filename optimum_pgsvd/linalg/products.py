"""Symmetric products, panel by panel: about half the work, and few temporaries."""

from collections.abc import Iterator

import torch
from torch import Tensor


# Columns of a panel. Of a symmetric product only the panels on and above the diagonal are multiplied: 9/16 of the work
# at 4096 columns, and still wide enough for a matrix product to run at full speed.
PANEL = 512

# Rows converted to the dtype of a product at a time.
ROWS = 2048


def panels(size: int) -> Iterator[slice]:
    """Slices that cover `size` rows or columns."""
    for start in range(0, size, PANEL):
        yield slice(start, min(start + PANEL, size))


def self_product(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """`Aᵀ A`.

    Args:
        matrix: `(m, n)`, any floating dtype.
        dtype: of the products and of their sum.

    Returns:
        `(n, n)` of this dtype, symmetric to the last bit.
    """
    product = matrix.new_zeros(matrix.shape[1], matrix.shape[1], dtype=dtype)
    for rows in matrix.split(ROWS):
        add_self_product(product, rows.to(dtype))
    mirror_upper(product)
    return product


def add_self_product(total: Tensor, rows: Tensor) -> None:
    """`total += rowsᵀ rows`, the panels on and above the diagonal only.

    Args:
        total: `(n, n)`, changed in place.
        rows: `(T, n)`, multiplied in their own dtype.
    """
    for part in panels(len(total)):
        add_product(total[part, part.start :], rows[:, part], rows[:, part.start :])


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += leftᵀ right`, without a copy where the dtypes agree."""
    if total.dtype == left.dtype:
        total.addmm_(left.T, right)
    else:
        total += left.T @ right


def mirror_upper(matrix: Tensor) -> None:
    """Copy what is above the diagonal of a square matrix to below it, in place and without a copy of the whole."""
    for part in panels(len(matrix)):
        corner = matrix[part, part]
        corner.copy_(corner.triu() + corner.triu(1).T)
        matrix[part.stop :, part] = matrix[part, part.stop :].T


def output_moment(weight: Tensor, gram: Tensor, ridge: float = 0.0, triangular: bool = False) -> Tensor:
    """`W (G + ridge I) Wᵀ`.

    In float64: in the rounding of float32, outlier features would drown the others.

    Args:
        weight: `(m, n)`, any floating dtype.
        gram: `(n, n)`, symmetric.
        ridge: 0 or more.
        triangular: take the upper triangle of a square weight only, with a third of the work.

    Returns:
        `(m, m)` float64, symmetric to rounding.
    """
    m, n = weight.shape
    images = gram.new_zeros(m, n, dtype=torch.float64)
    for part in panels(n):
        columns = weight[: part.stop if triangular else m, part].double()
        columns = columns.triu(-part.start) if triangular else columns
        images[: len(columns)].addmm_(columns, gram[part].double())
        images[: len(columns), part] += ridge * columns
    moment = gram.new_empty(m, m, dtype=torch.float64)
    for part in panels(m):
        first = part.start if triangular else 0
        rows = weight[part, first:].double()
        rows = rows.triu() if triangular else rows
        moment[: part.stop, part] = images[: part.stop, first:] @ rows.T
        moment[part, : part.start] = moment[: part.start, part].T
    return moment
