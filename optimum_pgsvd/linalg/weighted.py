"""The closed-form optimum where errors of some outputs cost more than errors of others."""

import torch
from torch import Tensor

from .leading import leading_eigenvectors
from .precision import layer_dtype
from .products import output_moment, self_product
from .projection import TIE_BREAK


# Relative to the mean of the metric's diagonal: what an error counts in a direction that the loss never depended on.
FLOOR = 1e-3


def metric_root(metric: Tensor) -> Tensor:
    """The Cholesky factor of a metric, with a floor under its eigenvalues.

    Args:
        metric: `(k, k)`, symmetric positive semi-definite up to the rounding of its dtype.

    Returns:
        `R (k, k)` float64, lower triangular, `R Rᵀ = metric + FLOOR mean(diag) I`; the identity for a zero metric.
    """
    floored = metric.double().clone()
    floored.diagonal().add_(FLOOR * float(floored.diagonal().mean()) or 1.0)
    return torch.linalg.cholesky(floored)


def weighted_spectrum(weight: Tensor, moment: Tensor, energies: Tensor, metric: Tensor) -> Tensor:
    """What each feature of a layer's outputs counts, `σ_i`: `Σ_{i>r} σ_i²` is the least `tr(B E G Eᵀ)` of rank r.

    Args:
        weight: `(m, n)`.
        moment: as for `weighted_projection`.
        energies: `(n,)`, the diagonal of G.
        metric: as for `weighted_projection`.

    Returns:
        `(min(m, n),)` in the layer's dtype, descending.
    """
    root = metric_root(metric)
    second = root.T @ (side_moment(weight, moment, energies) @ root)
    values = torch.linalg.eigvalsh(second.to(layer_dtype(weight, moment)))
    return values.flip(0).clamp_(min=0).sqrt_()


def side_moment(weight: Tensor, moment: Tensor, energies: Tensor) -> Tensor:
    """The second moment of a layer's smaller side, `W G Wᵀ (m, m)` for m ≤ n, else `G (n, n)`.

    Where the calibration set leaves several factors equally good, a small multiple of the identity under G decides.

    Args:
        weight: `(m, n)`.
        moment: `G (n, n)`, or for m < n `W G Wᵀ (m, m)`.
        energies: `(n,)`, the diagonal of G.

    Returns:
        `(k, k)` float64 with k = min(m, n).
    """
    m, n = weight.shape
    ridge = TIE_BREAK[moment.dtype] * float(energies.mean())
    if m > n:
        return moment.double() + ridge * torch.eye(n, dtype=torch.float64, device=moment.device)
    if len(moment) == n:
        return output_moment(weight, moment, ridge)
    return moment.double() + ridge * self_product(weight.T, torch.float64)


def weighted_projection(
    weight: Tensor, moment: Tensor, energies: Tensor, metric: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    """Global minimum of `tr(B E G Eᵀ)`, `E = W − left right`, over all rank-r factors.

    Of a layer's outputs `y = W x`, `right` keeps the r features `z = Uᵀ Rᵀ y` that the metric `B = R Rᵀ` makes most
    of, with U the leading eigenvectors of `Rᵀ W G Wᵀ R`, and `left` is the regression of y on z. Where the metric is
    singular, that regression is what decides. Of a tall weight, all this is done on its inputs, with `Wᵀ B W = R Rᵀ`
    and G for `W G Wᵀ`.

    Args:
        weight: `(m, n)`.
        moment: `G (n, n)`, or for m < n `W G Wᵀ (m, m)`.
        energies: `(n,)`, the diagonal of G.
        metric: `B (m, m)` for m ≤ n, else `Wᵀ B W (n, n)`.
        rank: 1 … min(m, n).

    Returns:
        `left (m, rank)` and `right (rank, n)`, most important first, in the layer's dtype.

    Source:
        Weighted reduced-rank regression (Izenman 1975).
    """
    dtype = layer_dtype(weight, moment)
    root = metric_root(metric)
    second = side_moment(weight, moment, energies)
    basis = leading_eigenvectors(lambda: root.T @ (second @ root), rank, dtype).double()
    directions = root @ basis
    images = second @ directions
    energies = (directions * images).sum(0)
    regression = images / torch.where(energies > 0, energies, torch.ones_like(energies))
    if weight.shape[0] <= weight.shape[1]:
        left, right = regression, directions.T @ weight.double()
    else:
        left, right = weight.double() @ regression, directions.T
    return left.to(dtype), right.to(dtype)
