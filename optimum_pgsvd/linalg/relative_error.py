"""How far a pair of factors is from the weight it replaces."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .precision import layer_dtype, working_dtype
from .products import panels


# Rows of the weight at a time.
ROWS = 1024


def relative_weight_error(weight: Tensor, left: Tensor, right: Tensor) -> float:
    """`‖W − left right‖_F / ‖W‖_F`, 0 for a zero weight.

    Args:
        weight: `(m, n)`.
        left: `(m, r)`.
        right: `(r, n)`.

    Returns:
        A number from 0 up; computed in the weight's working dtype.
    """
    error = energy = 0.0
    for rows, difference in differences(weight, left, right, working_dtype(weight.dtype)):
        error += total(difference.square_())
        energy += total(rows.square_())
    return relative(error, energy)


def relative_activation_error(
    weight: Tensor, left: Tensor, right: Tensor, gram: Tensor, constant: tuple[float, float] = (0.0, 0.0)
) -> float:
    """`‖(W − left right) Xᵀ‖_F / ‖W Xᵀ‖_F`, 0 where the outputs are all zero.

    Args:
        weight: `(m, n)`.
        left: `(m, r)`.
        right: `(r, n)`.
        gram: `(n, n)`, `Xᵀ X`, float32 or float64.
        constant: as for `relative_errors`.

    Returns:
        A number from 0 up; computed in the layer's dtype.
    """
    return relative_errors(weight, left, right, gram, constant)[1]


def relative_errors(
    weight: Tensor, left: Tensor, right: Tensor, gram: Tensor, constant: tuple[float, float] = (0.0, 0.0)
) -> tuple[float, float]:
    """`relative_weight_error` and `relative_activation_error` at once: `W − left right` is multiplied out once.

    Args:
        weight: `(m, n)`.
        left: `(m, r)`.
        right: `(r, n)`.
        gram: `(n, n)`, `Xᵀ X`, float32 or float64.
        constant: where G is about a mean, what the mean adds to the energies of the error and of the outputs.

    Returns:
        Both; computed in the layer's dtype.
    """
    dtype = layer_dtype(weight, gram)
    folded = gram.to(dtype, copy=True).tril_()
    folded.diagonal().mul_(0.5)
    plain_error = plain_energy = 0.0
    error, energy = constant
    for rows, difference in differences(weight, left, right, dtype):
        error += quadratic(difference, folded)
        energy += quadratic(rows, folded)
        plain_error += total(difference.square_())
        plain_energy += total(rows.square_())
    return relative(plain_error, plain_energy), relative(error, energy)


def relative_output_error(
    weight: Tensor, left: Tensor, right: Tensor, moment: Tensor, energies: Tensor, outputs: Tensor | None = None
) -> float:
    """`relative_activation_error` of rounded closed-form factors, from the second moment of the outputs.

    Before rounding, `right = C W`; where `left` has orthogonal columns, `C = (leftᵀ left)⁻¹ leftᵀ`. With E what
    rounding adds to that, `(W − left right) Xᵀ = (I − left C) W Xᵀ − left E Xᵀ`. The first part is exact. The second
    is an estimate: E is taken for noise that is independent from column to column, so that the diagonal of G suffices.

    Args:
        weight: `(m, n)`.
        left: `(m, r)`, as stored.
        right: `(r, n)`, as stored.
        moment: `(m, m)`, `W G Wᵀ`, float32 or float64.
        energies: `(n,)`, the diagonal of G.
        outputs: `C (r, m)`, where `left` has other columns.

    Returns:
        A number from 0 up, 0 where the outputs are all zero; computed in the layer's dtype.
    """
    dtype = layer_dtype(weight, moment)
    left = left.to(dtype)
    sizes = left.T @ left
    inverse = pseudo_inverse(left) if outputs is None else outputs.to(dtype)
    seen = inverse @ moment.to(dtype)
    kept = 2 * total(seen * left.T) - total(sizes * (seen @ inverse.T))
    energy, rounding = total(moment.diagonal()), 0.0
    for part in panels(weight.shape[1]):
        noise = right[:, part].to(dtype) - inverse @ weight[:, part].to(dtype)
        rounding += total(((sizes @ noise) * noise) @ energies[part].to(dtype))
    return relative(energy - kept + rounding, energy)


def pseudo_inverse(left: Tensor) -> Tensor:
    """`(leftᵀ left)⁻¹ leftᵀ` of `(m, r)` with orthogonal columns; a column that is zero stays so."""
    return (left / left.square().sum(dim=0).clamp(min=torch.finfo(left.dtype).tiny)).T


def differences(weight: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Copies of some rows of the weight and of `W − left right` at a time, in a dtype."""
    right = right.to(dtype)
    for rows, coefficients in zip(weight.split(ROWS), left.split(ROWS), strict=True):
        rows = rows.to(dtype, copy=True)
        yield rows, torch.addmm(rows, coefficients.to(dtype), right, alpha=-1)


def quadratic(rows: Tensor, folded: Tensor) -> float:
    """`Σ dᵀ G d` over rows d, with G given as its lower triangle, diagonal halved: half the work."""
    parts = panels(len(folded))
    return 2 * sum(total((rows[:, p.start :] @ folded[p.start :, p]).mul_(rows[:, p])) for p in parts)


def total(terms: Tensor) -> float:
    """Their sum, in float64."""
    return float(terms.sum(dtype=torch.float64))


def relative(error: float, energy: float) -> float:
    """`sqrt(error / energy)`, rounding below zero cut off; 0 where there is no energy."""
    return (max(error, 0.0) / energy) ** 0.5 if energy > 0 else 0.0
