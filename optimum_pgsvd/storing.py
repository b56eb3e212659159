"""How the factors of a layer are stored: rounded as they are, or as some rows of their product and the others'."""

from __future__ import annotations

import torch
from torch import Tensor

from .linalg import INDEX, pivot_rows, relative_activation_error, relative_output_error
from .structures import LowRankFactors, Moments, PivotedFactors, StoredFactors


STORED: dict[str, type[LowRankFactors] | type[PivotedFactors]] = {
    kind.storage: kind for kind in (LowRankFactors, PivotedFactors)
}


def stored(factors: LowRankFactors, moments: Moments | None, storage: str, dtype: torch.dtype) -> StoredFactors:
    """What is kept of a layer's factors, rounded once.

    Args:
        factors: of a solver, in the working dtype.
        moments: of the layer, where they were measured.
        storage: `"factors"` or `"pivoted"`.
        dtype: of the layer.

    Returns:
        The factors, or their product in pivoted storage.
    """
    if storage == "factors":
        return factors.to(dtype)
    order, coefficients = pivot_rows(factors.left.double())
    pivots = factors.left.double()[order.argsort()[: factors.rank]]
    basis = pivots @ factors.right.double()
    return PivotedFactors(basis.to(dtype), coefficients.to(dtype), order)


def empty_factors(weight: Tensor, rank: int, storage: str) -> StoredFactors:
    """Room for what `stored` keeps of a weight `(m, n)` at a rank."""
    m, n = weight.shape
    if storage == "factors":
        return LowRankFactors(weight.new_empty(m, rank), weight.new_empty(rank, n))
    order = torch.empty(m, dtype=INDEX, device=weight.device)
    return PivotedFactors(weight.new_empty(rank, n), weight.new_empty(m - rank, rank), order)


def activation_error(goal: Tensor, factors: StoredFactors, moments: Moments) -> float:
    """The relative error of a layer's outputs, by whatever was measured of it."""
    if moments.gram is not None:
        return relative_activation_error(goal, factors.left, factors.right, moments.gram)
    assert moments.outputs is not None
    return relative_output_error(goal, factors.left, factors.right, moments.outputs, moments.energies)
