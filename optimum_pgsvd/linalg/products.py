"""Symmetric products, panel by panel: about half the work, and few temporaries."""

from collections.abc import Iterator

import torch
from torch import Tensor


# Columns of a panel: wide enough for a matrix product to run at full speed.
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
        rows = rows.to(dtype)
        for part in panels(len(product)):
            product[part.start :, part].addmm_(rows[:, part.start :].T, rows[:, part])
    for part in panels(len(product)):
        corner = product[part, part]
        corner.copy_(corner.tril() + corner.tril(-1).T)
        product[: part.start, part] = product[part, : part.start].T
    return product


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
