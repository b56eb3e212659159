"""How the factors of a layer are stored: as they are, or as some rows of their product and what makes the others."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .linalg import (
    INDEX,
    corrected_bias,
    pivoted,
    pseudo_inverse,
    relative_activation_error,
    relative_output_error,
)
from .structures import LowRankFactors, Means, Moments, PivotedFactors, StoredFactors


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
    gram = None if moments is None else moments.gram
    return PivotedFactors(*pivoted(factors.left, factors.right, inner_moment(factors, moments), gram, dtype))


def inner_moment(factors: LowRankFactors, moments: Moments | None) -> Tensor:
    """`right G rightᵀ (r, r)`, the second moment between two factors; with G = I where none was measured."""
    right = factors.right
    if moments is None:
        return right @ right.T
    if moments.gram is not None:
        return right @ (moments.gram.to(right.dtype) @ right.T)
    assert moments.outputs is not None
    inverse = pseudo_inverse(factors.left)
    return inverse @ moments.outputs.to(right.dtype) @ inverse.T


def with_bias(factors: StoredFactors, weight: Tensor, bias: Tensor, means: Means | None) -> StoredFactors:
    """Stored factors with the bias that fits them, rounded once.

    Args:
        factors: as stored.
        weight: `(m, n)`, the layer's own.
        bias: `(m,)`, the layer's own, whose dtype the new one gets.
        means: of the layer; without them the bias stays.
    """
    if means is None:
        return replace(factors, bias=bias)
    outputs = weight.double() @ means.anchors
    return replace(factors, bias=corrected_bias(bias, outputs, factors.left, factors.right, means.inputs).to(bias))


def constant_part(weight: Tensor, kept: StoredFactors, bias: Tensor, means: Means) -> tuple[float, float]:
    """What the means add to the energies of a layer's error, as rounding its bias leaves it, and of its outputs.

    Args:
        weight: `(m, n)`, the layer's own.
        kept: with their bias.
        bias: `(m,)`, the layer's own.
        means: of the layer.
    """
    assert kept.bias is not None
    outputs = weight.double() @ means.anchors
    missing = corrected_bias(bias, outputs, kept.left, kept.right, means.inputs) - kept.bias.double()
    return means.tokens * float(missing.square().sum()), means.tokens * float(outputs.square().sum())


def empty_factors(weight: Tensor, rank: int, storage: str, bias: Tensor | None = None) -> StoredFactors:
    """Room for what `stored` keeps of a weight `(m, n)` at a rank, and for a bias if one is given."""
    m, n = weight.shape
    room = None if bias is None else torch.empty_like(bias)
    if storage == "factors":
        return LowRankFactors(weight.new_empty(m, rank), weight.new_empty(rank, n), room)
    order = torch.empty(m, dtype=INDEX, device=weight.device)
    return PivotedFactors(weight.new_empty(rank, n), weight.new_empty(m - rank, rank), order, room)


def activation_error(
    goal: Tensor,
    factors: LowRankFactors,
    kept: StoredFactors,
    moments: Moments,
    constant: tuple[float, float] = (0.0, 0.0),
) -> float:
    """The relative error of a layer's outputs, by whatever was measured of it.

    Args:
        goal: the weight that was approximated.
        factors: of the solver.
        kept: what is stored of them.
        moments: of the layer.
        constant: where they are about the mean, of `constant_part`.
    """
    if moments.gram is not None:
        return relative_activation_error(goal, kept.left, kept.right, moments.gram, constant)
    assert moments.outputs is not None
    outputs = None if isinstance(kept, LowRankFactors) else basis_outputs(factors, kept)
    return relative_output_error(goal, kept.left, kept.right, moments.outputs, moments.energies, outputs)


def basis_outputs(factors: LowRankFactors, kept: PivotedFactors) -> Tensor:
    """`C (r, m)` that makes the basis, as it was before rounding, of the weight whose closed form the factors are."""
    left = kept.left.to(factors.left.dtype)
    return torch.linalg.solve(left.T @ left, left.T @ factors.left) @ pseudo_inverse(factors.left)
