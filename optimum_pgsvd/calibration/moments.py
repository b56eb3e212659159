"""Second moments, summed while rows arrive."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..distributed import Peers
from ..linalg import add_product, add_self_product, mirror_upper, working_dtype


# Rows squared at a time: the squares of all at once would be the largest tensor of a forward pass.
ROWS = 512


class SecondMoment:
    """Accumulates `M = Σ aᵀ b` over pairs of rows, and `Σ a`; `a` and `b` may be the same.

    Products and sums of rows in half precision are made in float32, which is exact to far more than the rows are; of
    float32 rows the products in float32 and the sum in float64; of float64 rows everything in float64.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._rows: Tensor | None = None
        self._symmetric = True

    def add(self, rows: Tensor) -> None:
        """Add `rowsᵀ rows` of rows `(T, n)`, the upper triangle only."""
        with lossless_products(rows):
            add_self_product(self._total(rows, rows), precise(rows))
        self._add_rows(rows)

    def add_pairs(self, left: Tensor, right: Tensor) -> None:
        """Add `leftᵀ right` of rows `(T, m)` and `(T, n)`."""
        self._symmetric = False
        add_product(self._total(left, right), precise(left), precise(right))
        self._add_rows(left)

    def value(self) -> Tensor:
        """The sum so far, `(m, n)`, in `working_dtype` of the rows; not a copy."""
        if self._sum is None:
            raise ValueError("no rows were added")
        if self._symmetric:
            mirror_upper(self._sum)
        return self._sum

    def row_sum(self) -> Tensor:
        """The sum of the rows so far, of the left ones of pairs: `(m,)` float64."""
        if self._rows is None:
            raise ValueError("no rows were added")
        return self._rows

    def sum_over(self, peers: Peers, nothing: Tensor) -> None:
        """Make it the sum over all processes.

        Args:
            peers: the processes, each with such a sum of its own.
            nothing: `(0, n)`, no rows, in their dtype and on their device, for a process that has seen none.
        """
        self._total(nothing, nothing)
        self._add_rows(nothing)
        peers.sum(self.value())
        peers.sum(self.row_sum())

    def _total(self, left: Tensor, right: Tensor) -> Tensor:
        if self._sum is None:
            shape = left.shape[1], right.shape[1]
            self._sum = torch.zeros(shape, dtype=working_dtype(left.dtype), device=left.device)
        return self._sum

    def _add_rows(self, rows: Tensor) -> None:
        if self._rows is None:
            self._rows = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
        for part in rows.split(ROWS):
            self._rows += part.sum(0, dtype=torch.float64)


def precise(rows: Tensor) -> Tensor:
    """In float32 or better, as products are summed within a batch."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def energies(rows: Tensor) -> Tensor:
    """The sum of the squares of each column of rows `(T, n)`: `(n,)` in `working_dtype` of the rows."""
    total = torch.zeros(rows.shape[1], dtype=working_dtype(rows.dtype), device=rows.device)
    for part in rows.split(ROWS):
        total += precise(part).square().sum(0, dtype=total.dtype)
    return total


def magnitudes(rows: Tensor) -> Tensor:
    """The sum of the absolute values of each column of rows `(T, n)`: `(n,)` float64."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    for part in rows.split(ROWS):
        total += part.abs().sum(0, dtype=torch.float64)
    return total


@contextmanager
def lossless_products(rows: Tensor) -> Iterator[None]:
    """Let a CPU multiply rows that came in bfloat16 by its bfloat16 units, summing in float32: nothing is rounded."""
    settings = getattr(torch.backends.mkldnn, "matmul", None)  # not before torch 2.9
    if settings is None or rows.dtype != torch.bfloat16 or rows.device.type != "cpu":
        yield
        return
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
