"""A matrix of rank r by r of its rows, the basis, and the coefficients that make the other rows of them."""

import torch
from torch import Tensor

from .rounding import round_in_metric


# Of the index that says where each row is: enough for any layer, and half the bytes of PyTorch's own.
INDEX = torch.int32

# A row takes the place of a pivot if that has a coefficient above this in it. Each swap makes the volume that the
# pivots span this much larger, so that there is an end; nearer to 1 there are more swaps, for the same error.
LARGEST_COEFFICIENT = 1.05

# Passes of swaps; five were enough for every matrix seen.
PASSES = 20

# Relative to the mean of a moment's diagonal: coefficients stay as they are in directions far below it.
HOLD = 1e-3

# Energy of a row, relative to the largest, below which rows count alike.
SMALLEST_ROW = 1e-6


def pivoted(
    left: Tensor, right: Tensor, inner: Tensor, gram: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Pivoted storage of `left right`, rounded with a small error of the layer's outputs.

    Rows are rounded so that their errors make up for one another: the coefficients; then the basis, fitted to them;
    and, where G is known, the coefficients again, fitted to that.

    Args:
        left: `(m, r)`.
        right: `(r, n)`, in the same dtype.
        inner: `(r, r)`, `right G rightᵀ`.
        gram: `G (n, n)`, where it is known.
        dtype: to round to.

    Returns:
        `basis (r, n)` and `coefficients (m − r, r)` in this dtype, and `order (m,)` int32: row i of the product is row
        `order[i]` of `[basis; coefficients @ basis]`.

    Source:
        arXiv 2501.19090 (PIFA) for the storage; the choice of rows and the rounding are ours.
    """
    rank = left.shape[1]
    order, coefficients = pivot_rows(left, row_scales(left, inner))
    rows = left[order.argsort()]
    stored = round_in_metric(coefficients, rows[:rank] @ inner @ rows[:rank].T, dtype)
    fitted, metric = fitted_basis(rows, stored.to(left.dtype))
    basis = round_in_metric((fitted @ right).T.contiguous(), metric, dtype).T.contiguous()
    if gram is not None and len(stored):
        weighted = gram.to(left.dtype) @ basis.to(left.dtype).T
        moment = basis.to(left.dtype) @ weighted
        missing = rows[rank:] @ (right @ weighted) - coefficients @ moment
        stored = round_in_metric(coefficients + made_up(missing, moment), moment, dtype)
    return basis, stored, order


def row_scales(left: Tensor, inner: Tensor) -> Tensor:
    """What rows are divided by before pivots are chosen: the square root of their outputs' size.

    Undivided, rows with small outputs would never be pivots, and have coefficients as rough as the others'; divided by
    their size, they would be pivots as often as those that matter. Half way, rounding was seen to do least harm.

    Args:
        left: `(m, r)`.
        inner: `(r, r)`.

    Returns:
        `(m,)`, above 0.
    """
    energies = ((left @ inner) * left).sum(dim=1)
    least = SMALLEST_ROW * float(energies.max()) + torch.finfo(left.dtype).tiny
    return energies.clamp(min=least) ** 0.25


def fitted_basis(rows: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """The basis that fits given coefficients best, whatever the inputs are.

    Args:
        rows: `(m, r)`, pivots first.
        coefficients: `C (m − r, r)`.

    Returns:
        `(r, r)` to be multiplied by `right`, and the metric `I + CᵀC (r, r)` of its rows' errors.
    """
    rank = rows.shape[1]
    metric = coefficients.T @ coefficients
    metric.diagonal().add_(1)
    return torch.linalg.solve(metric, rows[:rank] + coefficients.T @ rows[rank:]), metric


def made_up(missing: Tensor, moment: Tensor) -> Tensor:
    """The change of coefficients that makes up for what is missing of their products with the moment.

    Args:
        missing: `(m − r, r)`.
        moment: `(r, r)`, symmetric positive semi-definite.

    Returns:
        `(m − r, r)`, near 0 where the moment is.
    """
    moment = moment.double()
    moment.diagonal().add_(HOLD * moment.diagonal().mean() + torch.finfo(moment.dtype).tiny)
    return torch.cholesky_solve(missing.T.double(), torch.linalg.cholesky(moment)).T.to(missing.dtype)


def pivot_rows(left: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Choose r rows of which all others are made, with small coefficients between rows that are divided by scales.

    Row by row elimination picks them; then rows change places with pivots that have a large coefficient in them, many
    in one pass of elimination, until none is above `LARGEST_COEFFICIENT`.

    Args:
        left: `(m, r)`, m ≥ r, of any rank.
        scales: `(m,)`.

    Returns:
        `order (m,)` int32 and `coefficients (m − r, r)` in the dtype of `left`: row i of `left` is row `order[i]` of
        `[P; coefficients @ P]`, P its r pivot rows.
    """
    rank = left.shape[1]
    rows, coefficients = eliminated(left / scales[:, None])
    for _ in range(PASSES):
        largest = coefficients.abs().amax(dim=0) if len(coefficients) else coefficients.new_zeros(rank)
        if not bool((largest > LARGEST_COEFFICIENT).any()):
            break
        first = largest.argsort(descending=True)
        favour = torch.ones_like(scales)
        favour[:rank] = LARGEST_COEFFICIENT
        pivots = torch.eye(rank, dtype=left.dtype, device=left.device) * LARGEST_COEFFICIENT
        moved, coefficients = eliminated(torch.cat([pivots, coefficients[:, first]]))
        coefficients *= favour[moved[:rank]] / favour[moved[rank:], None]
        rows = torch.cat([rows[:rank][first], rows[rank:]])[moved]
    order = torch.empty(len(left), dtype=INDEX, device=left.device)
    order[rows] = torch.arange(len(left), dtype=INDEX, device=left.device)
    return order, coefficients * (scales[rows[rank:], None] / scales[rows[:rank]])


def eliminated(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Gaussian elimination with row pivoting.

    Args:
        matrix: `(m, r)`, m ≥ r, of any rank.

    Returns:
        The rows `(m,)`, pivots first, and the coefficients `(m − r, r)` of the others.
    """
    rank = matrix.shape[1]
    packed, swaps, _ = torch.linalg.lu_factor_ex(matrix)
    rows = list(range(len(matrix)))
    for k, swap in enumerate(swaps.tolist()):
        rows[k], rows[swap - 1] = rows[swap - 1], rows[k]
    coefficients = torch.linalg.solve_triangular(
        packed[:rank], packed[rank:], upper=False, left=False, unitriangular=True
    )
    return torch.tensor(rows, device=matrix.device), coefficients
