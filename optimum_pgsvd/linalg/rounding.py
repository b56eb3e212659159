"""Rounding a matrix so that the errors of its columns make up for one another."""

import torch
from torch import Tensor


# Columns whose errors are fed back one by one; those of other blocks come in one matrix product.
BLOCK = 64

# Rounds of corrections after the first: the first two take off a tenth to a third of the error, later ones little.
CORRECTIONS = 2

# Relative to the mean of the metric's diagonal. Columns that hardly matter must not take over the errors of others:
# they would grow, and their rounding with them. Far above the rounding of a metric in float32.
RIDGE = 1e-3


def round_in_metric(matrix: Tensor, metric: Tensor, dtype: torch.dtype) -> Tensor:
    """Round `A` to `Q` in a dtype with a small `tr((A − Q) H (A − Q)ᵀ)`.

    The errors of the columns rounded so far are made up for by the next, which is Babai's nearest plane; then each
    column is rounded again with the errors of all others known, which can only make the error smaller.

    Args:
        matrix: `A (k, r)`.
        metric: `H (r, r)`, symmetric positive semi-definite.
        dtype: of the result.

    Returns:
        `Q (k, r)`.

    Source:
        L. Babai, "On Lovász' lattice reduction and the nearest lattice point problem", 1986; for weights with one
        step for all, GPTQ, arXiv 2210.17323.
    """
    ranked = metric.diagonal().argsort()  # what matters most is rounded first, so that the rest can make up for it
    damped = metric[ranked][:, ranked].double()
    damped.diagonal().add_(RIDGE * damped.diagonal().mean() + torch.finfo(damped.dtype).tiny)
    factor = torch.linalg.cholesky(damped)
    target = matrix.T[ranked]
    errors = torch.zeros_like(target)
    feed_back(target, errors, (factor / factor.diagonal()).T.to(target.dtype), dtype)
    coupling = (damped / damped.diagonal()[:, None]).to(target.dtype)
    for _ in range(CORRECTIONS):
        feed_back(target, errors, coupling, dtype)
    rounded = torch.empty_like(matrix, dtype=dtype)
    rounded.T[ranked] = (target - errors).to(dtype)
    return rounded


def feed_back(target: Tensor, errors: Tensor, coupling: Tensor, dtype: torch.dtype) -> None:
    """Round every row from the last to the first, the errors of the others added as a matrix says.

    Args:
        target: `(r, k)`, what is to be rounded.
        errors: `(r, k)`, target less what it was rounded to; changed in place.
        coupling: `(r, r)`, how much of each error a row takes over; the diagonal is not used.
        dtype: to round to.
    """
    for stop in range(len(target), 0, -BLOCK):
        block = slice(max(stop - BLOCK, 0), stop)
        within = coupling[block, block] - torch.diag(coupling[block, block].diagonal())
        inside = errors[block]
        wanted = target[block] + coupling[block] @ errors - coupling[block, block] @ inside
        for i in reversed(range(len(inside))):
            inside[i] = target[block][i] - (wanted[i] + within[i] @ inside).to(dtype)
