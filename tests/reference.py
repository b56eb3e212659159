"""Slow, obvious float64 oracles. Nothing of the package is imported here, and no formula is rearranged for speed.

A weight is `W (m, n)`, inputs are `X (T, n)` with one row a token, `G = Xᵀ X`, and an approximation of the weight is
written out in full, `Ŵ (m, n)`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor


# Linear algebra


def gram_matrix(inputs: Tensor) -> Tensor:
    """`Σ_t x_t x_tᵀ`, one token after the other."""
    gram = torch.zeros(inputs.shape[1], inputs.shape[1], dtype=torch.float64)
    for token in inputs.double():
        gram += torch.outer(token, token)
    return gram


def truncated(weight: Tensor, rank: int) -> Tensor:
    """`W_r`, a sum of r outer products of singular vectors."""
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    total = torch.zeros_like(weight, dtype=torch.float64)
    for i in range(rank):
        total += s[i] * torch.outer(u[:, i], vh[i])
    return total


def norm(matrix: Tensor) -> float:
    """`‖·‖_F`, entry by entry squared and summed exactly."""
    return math.sqrt(math.fsum(x * x for x in matrix.double().flatten().tolist()))


def outputs_error(weight: Tensor, approximation: Tensor, inputs: Tensor) -> float:
    """`‖(W − Ŵ) Xᵀ‖_F`."""
    return norm((weight.double() - approximation.double()) @ inputs.double().T)


def least_outputs_error(weight: Tensor, inputs: Tensor, rank: int) -> float:
    """The least `‖(W − Ŵ) Xᵀ‖_F` of any Ŵ of this rank: what an SVD of all outputs `W Xᵀ` leaves over."""
    values = torch.linalg.svd(weight.double() @ inputs.double().T)[1]
    return norm(values[rank:])


def relative_weight_error(weight: Tensor, approximation: Tensor) -> float:
    """`‖W − Ŵ‖_F / ‖W‖_F`, 0 for a zero weight."""
    size = norm(weight)
    return norm(weight.double() - approximation.double()) / size if size else 0.0


def relative_outputs_error(weight: Tensor, approximation: Tensor, inputs: Tensor) -> float:
    """`‖(W − Ŵ) Xᵀ‖_F / ‖W Xᵀ‖_F`, 0 where the outputs are zero."""
    size = norm(weight.double() @ inputs.double().T)
    return outputs_error(weight, approximation, inputs) / size if size else 0.0


def truncation_error(weight: Tensor, rank: int) -> float:
    """`e(r) = ‖W − W_r‖_F / ‖W‖_F`, with `W_r` written out."""
    return relative_weight_error(weight, truncated(weight, rank))


def smallest_rank(weight: Tensor, tolerance: float) -> int:
    """Definition 1 by trying every rank from 0 up."""
    return next(rank for rank in range(min(weight.shape) + 1) if truncation_error(weight, rank) <= tolerance)


def als_sweep(weight: Tensor, gram: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """One sweep of Algorithm 1, as the paper writes it."""
    left = weight @ gram @ right.T @ torch.linalg.pinv(right @ gram @ right.T)
    right = torch.linalg.pinv(left.T @ left) @ left.T @ weight
    return left, right


def als(weight: Tensor, gram: Tensor, rank: int, sweeps: int) -> Tensor:
    """Ŵ of Algorithm 1 after some sweeps from the truncated SVD."""
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    left = u[:, :rank] @ torch.diag(s[:rank].sqrt())
    right = torch.diag(s[:rank].sqrt()) @ vh[:rank]
    for _ in range(sweeps):
        left, right = als_sweep(weight.double(), gram.double(), right)
    return left @ right


# Baselines


def whitened(weight: Tensor, gram: Tensor, rank: int) -> Tensor:
    """Ŵ of SVD-LLM: the truncated SVD of `W L`, times the inverse of L, with `G = L Lᵀ`."""
    root = torch.linalg.cholesky(gram.double())
    return truncated(weight.double() @ root, rank) @ torch.linalg.inv(root)


def scaled(weight: Tensor, scales: Tensor, rank: int) -> Tensor:
    """Ŵ of ASVD and of FWSVD: each column times its scale, the truncated SVD, each column divided by its scale."""
    return truncated(weight.double() * scales.double(), rank) / scales.double()


def mean_magnitudes(inputs: Tensor) -> Tensor:
    """The mean of |x| of each feature, one token after the other."""
    total = torch.zeros(inputs.shape[1], dtype=torch.float64)
    for token in inputs.double():
        total += token.abs()
    return total / len(inputs)


def squared_gradients(losses: Sequence[Tensor], weight: Tensor) -> Tensor:
    """The squared gradients of some losses, each on its own, summed: of the shape of the weight, float64."""
    total = torch.zeros(weight.shape, dtype=torch.float64)
    for loss in losses:
        (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True, allow_unused=True)
        total += 0 if gradient is None else gradient.double() ** 2
    return total


# Pivoted storage


def row_by_row(basis: Tensor, coefficients: Tensor, order: Tensor) -> Tensor:
    """Ŵ of pivoted storage: each row is a row of the basis, or is made of all of them."""
    rows = []
    for place in order.tolist():
        if place < len(basis):
            rows.append(basis[place].double())
        else:
            terms = coefficients[place - len(basis)].double()
            rows.append(sum(c * b for c, b in zip(terms, basis.double(), strict=True)))
    return torch.stack(rows)


def best_rounding(row: Tensor, metric: Tensor, dtype: torch.dtype, steps: int = 3) -> float:
    """The least `(a − q) H (a − q)ᵀ` over q whose entries are at most some steps from the nearest; all are tried."""
    choices = []
    for entry in row.double():
        found = [entry.to(dtype)]
        for side in (-math.inf, math.inf):
            value = found[0]
            for _ in range(steps):
                value = torch.nextafter(value, torch.tensor(side, dtype=dtype))
                found.append(value)
        choices.append(torch.stack(found).double())
    errors = row.double() - torch.cartesian_prod(*choices)
    return float(((errors @ metric) * errors).sum(1).min())


# Allocation


class Option(NamedTuple):
    """One thing that can be done with a layer: its rank (`None` for dense), its parameters, its relative error."""

    rank: int | None
    parameters: int
    error: float


Choice = dict[str, Option]


def stored_parameters(m: int, n: int, rank: int, storage: str) -> int:
    """Entries of what is stored: two factors, or some rows and the coefficients of the others."""
    shapes = {"factors": [(m, rank), (rank, n)], "pivoted": [(rank, n), (m - rank, rank)]}[storage]
    return sum(rows * columns for rows, columns in shapes)


def saving_ranks(m: int, n: int, rank_multiple: int, storage: str = "factors") -> list[int]:
    """Every multiple of `rank_multiple` that is stored in less than the weight."""
    ranks = [rank for rank in range(1, min(m, n) + 1) if rank % rank_multiple == 0]
    return [rank for rank in ranks if stored_parameters(m, n, rank, storage) < m * n]


def layer_options(
    m: int, n: int, errors: Sequence[float], rank_multiple: int, storage: str = "factors"
) -> list[Option]:
    """Every rank that saves parameters, then dense; `errors[r]` is e(r)."""
    ranks = saving_ranks(m, n, rank_multiple, storage)
    factored = [Option(rank, stored_parameters(m, n, rank, storage), errors[rank]) for rank in ranks]
    return [*factored, Option(None, m * n, 0.0)]


def kept(choice: Choice) -> int:
    """Parameters of a choice for every layer."""
    return sum(option.parameters for option in choice.values())


def budget(shapes: Mapping[str, tuple[int, int]], reduction: str) -> int:
    """Parameters that a reduction, written as a decimal, leaves; in exact arithmetic."""
    return math.floor((1 - Fraction(reduction)) * sum(m * n for m, n in shapes.values()))


def at_tolerance(options: Mapping[str, list[Option]], tolerance: float) -> Choice:
    """The first option of each layer whose error is within a tolerance."""
    return {name: next(o for o in layer if o.error <= tolerance) for name, layer in options.items()}


def one_tolerance_for_all(options: Mapping[str, list[Option]], limit: int) -> Choice | None:
    """The largest plan within a budget that some one tolerance gives; every tolerance that matters is tried."""
    tolerances = {option.error for layer in options.values() for option in layer}
    plans = [at_tolerance(options, tolerance) for tolerance in tolerances]
    return max((plan for plan in plans if kept(plan) <= limit), key=kept, default=None)


def ranks_at_shares(m: int, n: int, rank_multiple: int, storage: str = "factors") -> list[int]:
    """The largest saving rank that keeps at most 1, 2, … 9 tenths of a layer, the smallest where none does."""
    ranks = saving_ranks(m, n, rank_multiple, storage)
    found = set()
    for tenths in range(1, 10) if ranks else ():
        within = [rank for rank in ranks if 10 * stored_parameters(m, n, rank, storage) <= tenths * m * n]
        found.add(max(within or ranks[:1]))
    return sorted(found)


def at_loss(options: Mapping[str, list[Option]], threshold: float) -> Choice:
    """The first option of each layer at which the loss, its `error`, is within a threshold; dense where none is."""
    return {name: next(o for o in layer if o.rank is None or o.error <= threshold) for name, layer in options.items()}


def one_loss_for_all(options: Mapping[str, list[Option]], limit: int) -> Choice | None:
    """The plan of the least threshold for losses that is within a budget; every threshold that matters is tried."""
    losses = {option.error for layer in options.values() for option in layer if option.rank is not None}
    plans = [at_loss(options, threshold) for threshold in sorted({-math.inf, *losses})]
    return next((plan for plan in plans if kept(plan) <= limit), None)


def in_units_of(options: Mapping[str, list[Option]], scales: Mapping[str, float]) -> dict[str, list[Option]]:
    """Options whose errors are in units of the scale of their layer."""
    return {
        name: [Option(o.rank, o.parameters, o.error / scales[name]) for o in layer] for name, layer in options.items()
    }


def every_choice(options: Mapping[str, list[Option]]) -> Iterator[Choice]:
    """All combinations of the layers' options."""
    for combination in itertools.product(*options.values()):
        yield dict(zip(options, combination, strict=True))


def least_worst_error(options: Mapping[str, list[Option]], limit: int) -> float | None:
    """The least that the largest error over the layers can be within a budget, over all combinations."""
    worst = [
        max(option.error for option in choice.values()) for choice in every_choice(options) if kept(choice) <= limit
    ]
    return min(worst, default=None)


def least_total_error(options: Mapping[str, list[Option]], limit: int) -> float | None:
    """The least sum of errors within a budget, the paper's surrogate with equal weights, over all combinations."""
    totals = [math.fsum(o.error for o in choice.values()) for choice in every_choice(options) if kept(choice) <= limit]
    return min(totals, default=None)


def one_fraction_for_all(
    shapes: Mapping[str, tuple[int, int]], rank_multiple: int, limit: int, storage: str = "factors"
) -> Choice | None:
    """The largest plan within a budget that keeps at most a fraction κ of every layer; every κ that matters is tried.

    A layer keeps its smallest option where κ is smaller still.
    """
    options = {
        name: layer_options(m, n, [0.0] * (min(m, n) + 1), rank_multiple, storage) for name, (m, n) in shapes.items()
    }

    def at_fraction(fraction: Fraction) -> Choice:
        within = {
            name: [o for o in layer if Fraction(o.parameters, layer[-1].parameters) <= fraction]
            for name, layer in options.items()
        }
        return {name: (within[name] or layer[:1])[-1] for name, layer in options.items()}

    fractions = {Fraction(o.parameters, layer[-1].parameters) for layer in options.values() for o in layer}
    plans = [at_fraction(fraction) for fraction in fractions]
    return max((plan for plan in plans if kept(plan) <= limit), key=kept, default=None)


def shares_of_types(
    shapes: Mapping[str, tuple[int, int]], losses: Mapping[str, float], reduction: float
) -> dict[str, float]:
    """The fraction of each layer that SVD-LLM V2 removes: `N R s_i / Σ s_j` over the N layers of its type.

    Layers of a type have one shape here; `s = 1 / log(1 + L)`.
    """
    shares = {}
    for name in shapes:
        kind = [part for part in name.split(".") if not part.isdigit()]
        alike = [other for other in shapes if [part for part in other.split(".") if not part.isdigit()] == kind]
        scores = {other: 1 / math.log(1 + losses[other]) for other in alike}
        shares[name] = len(alike) * reduction * scores[name] / math.fsum(scores.values())
    return shares


def charged_options(
    m: int, n: int, values: Sequence[float], rank_multiple: int, storage: str = "factors"
) -> list[Option]:
    """Options with `−w log(1 − t)` for an error: w the sum of all squares, t the share that a rank leaves out."""
    squares = [value * value for value in values]
    whole = math.fsum(squares)

    def charge(rank: int) -> float:
        share = math.fsum(squares[rank:]) / whole if whole else 0.0
        return -whole * math.log(1 - min(share, 1 - 1e-12))

    return layer_options(m, n, [charge(rank) for rank in range(min(m, n) + 1)], rank_multiple, storage)


def prices(options: Mapping[str, list[Option]]) -> list[float]:
    """Prices of a parameter at which some layer's best option changes, those between them, and beyond."""
    slopes = {
        (one.error - other.error) / (other.parameters - one.parameters)
        for layer in options.values()
        for one, other in itertools.combinations(layer, 2)
    }
    ordered = sorted({0.0, *slopes})
    between = [(a + b) / 2 for a, b in itertools.pairwise(ordered)]
    return [*ordered, *between, 2 * ordered[-1] + 1]


def is_best_at(price: float, option: Option, layer: Sequence[Option]) -> bool:
    """Whether no other option of a layer costs less, errors and parameters at their price together."""
    least = min(other.error + price * other.parameters for other in layer)
    return option.error + price * option.parameters <= least + 1e-9 * (1 + abs(least))


def saving_of_next_vertex(option: Option, layer: Sequence[Option]) -> float:
    """What an option's error is above that of the next larger option that is best at some price."""
    larger = [other for other in layer if other.parameters > option.parameters]
    candidates = prices({"": list(layer)})
    vertices = [other for other in larger if any(is_best_at(price, other, layer) for price in candidates)]
    return option.error - min(vertices, key=lambda other: other.parameters).error if vertices else 0.0


def anchored_weight(weight: Tensor, dense: Tensor, compressed: Tensor, blend: float, ridge: float) -> Tensor:
    """`argmin_A ‖W X_βᵀ − A X_cᵀ‖² + ridge ‖A − W‖²` by one plain least-squares problem with rows for both terms."""
    anchor = blend * dense + (1 - blend) * compressed
    identity = math.sqrt(ridge) * torch.eye(weight.shape[1], dtype=torch.float64)
    rows, goals = torch.cat([compressed, identity]), torch.cat([anchor @ weight.T, identity @ weight.T])
    return torch.linalg.lstsq(rows, goals, driver="gelsd").solution.T


def reduced_rank_regression_error(inputs: Tensor, outputs: Tensor, rank: int) -> float:
    """`min ‖Y − X Bᵀ‖²` over B of a rank: what no B explains, and what the best rank-r fit of the rest leaves."""
    fitted = inputs @ torch.linalg.lstsq(inputs, outputs, driver="gelsd").solution
    return float((outputs - fitted).square().sum() + torch.linalg.svdvals(fitted)[rank:].square().sum())


# Errors weighed by what they cost


def weighted_error(weight: Tensor, approximation: Tensor, gram: Tensor, metric: Tensor) -> float:
    """`tr(B E G Eᵀ)` with `E = W − Ŵ`, B the metric `(m, m)`."""
    error = weight.double() - approximation.double()
    return float(torch.trace(metric.double() @ error @ gram.double() @ error.T))


def floored(metric: Tensor, floor: float) -> Tensor:
    """A metric with `floor` times the mean of its diagonal added to all eigenvalues; the identity for a zero one."""
    if not bool(metric.any()):
        return torch.eye(len(metric), dtype=torch.float64)
    mean = math.fsum(metric.double().diagonal().tolist()) / len(metric)
    return metric.double() + floor * mean * torch.eye(len(metric), dtype=torch.float64)


def symmetric_root(matrix: Tensor) -> Tensor:
    """`M^{1/2}`, symmetric, of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix.double())
    return vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T


def weighted_singular_values(weight: Tensor, inputs: Tensor, metric: Tensor) -> Tensor:
    """Those of `B^{1/2} W Xᵀ`, as many as W has; the squares of the last ones are the least `tr(B E G Eᵀ)`."""
    values = torch.linalg.svdvals(symmetric_root(metric) @ weight.double() @ inputs.double().T)
    missing = min(weight.shape) - len(values)
    return torch.cat([values, values.new_zeros(max(missing, 0))])[: min(weight.shape)]


def weighted_als(weight: Tensor, gram: Tensor, metric: Tensor, right: Tensor, sweeps: int) -> Tensor:
    """Ŵ after some sweeps of alternating least squares on `tr(B E G Eᵀ)`, each factor the best for the other."""
    left = weight
    for _ in range(sweeps):
        left = weight @ gram @ right.T @ torch.linalg.pinv(right @ gram @ right.T)
        right = torch.linalg.pinv(left.T @ metric @ left) @ left.T @ metric @ weight
    return left @ right


def outer_sum(gradients: Tensor) -> Tensor:
    """`Σ_t g_t g_tᵀ` of gradients `(..., m)`."""
    return gram_matrix(gradients.reshape(-1, gradients.shape[-1]))


def fisher_of_softmax(logits: Tensor, outputs: Sequence[Tensor]) -> list[Tensor]:
    """`Σ_t E[g_t g_tᵀ]` at each of some outputs `(..., m)`, every label of every position enumerated.

    Labels of different positions are independent, and the mean of a gradient over the labels is zero: so the
    expectation is a sum over positions, of `Σ_v p(v) g g'` with g the gradient of `−log p(v)` at one position.

    Args:
        logits: `(S, V)`.
        outputs: that the logits depend on.
    """
    totals = [torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float64) for x in outputs]
    log_probabilities = logits.log_softmax(-1)
    for row in log_probabilities:
        for value in row:
            for total, gradient in zip(totals, torch.autograd.grad(-value, outputs, retain_graph=True), strict=True):
                total += float(value.detach().exp()) * outer_sum(gradient)
    return totals


def fisher_of_normal(mean: Tensor, outputs: Sequence[Tensor]) -> list[Tensor]:
    """The same where the model predicts the mean `(S, V)` of a normal distribution of unit variance."""
    totals = [torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float64) for x in outputs]
    for value in mean.flatten():
        for total, gradient in zip(totals, torch.autograd.grad(value, outputs, retain_graph=True), strict=True):
            total += outer_sum(gradient)
    return totals


# Biases


def with_ones(inputs: Tensor) -> Tensor:
    """`[X, 1]`: a weight of these is a weight and a bias."""
    return torch.cat([inputs.double(), torch.ones(len(inputs), 1, dtype=torch.float64)], dim=1)


def explained(inputs: Tensor, outputs: Tensor) -> Tensor:
    """What least squares makes of outputs by inputs."""
    return inputs @ torch.linalg.lstsq(inputs, outputs, driver="gelsd").solution


def least_error_with_bias(inputs: Tensor, outputs: Tensor, rank: int, root: Tensor | None = None) -> float:
    """`min ‖(Y − X Bᵀ − 1 bᵀ) R‖²` over B of a rank and any b; R is the identity unless given.

    What no weight of `[X, 1]` explains, and what the best rank-r fit leaves of that which a bias alone does not.
    """
    outputs = outputs.double() if root is None else outputs.double() @ root
    fitted = explained(with_ones(inputs), outputs)
    beyond = fitted - explained(torch.ones(len(inputs), 1, dtype=torch.float64), fitted)
    return float((outputs - fitted).square().sum() + torch.linalg.svdvals(beyond)[rank:].square().sum())


def anchored_weight_and_bias(
    weight: Tensor, dense: Tensor, compressed: Tensor, blend: float, ridge: float
) -> tuple[Tensor, Tensor]:
    """As `anchored_weight`, over A and a bias on which there is no pull: `(m, n)` and `(m,)`."""
    anchor = blend * dense + (1 - blend) * compressed
    pull = math.sqrt(ridge) * torch.eye(weight.shape[1], dtype=torch.float64)
    rows = torch.cat([with_ones(compressed), torch.cat([pull, torch.zeros(len(pull), 1)], dim=1)])
    goals = torch.cat([anchor @ weight.T, pull @ weight.T])
    both = torch.linalg.lstsq(rows, goals, driver="gelsd").solution
    return both[:-1].T, both[-1]


# Theory


def lower_convex_envelope(places: Sequence[float], values: Sequence[float], at: float) -> float:
    """The greatest convex function below some points, at one of their places: the lowest of all chords over it."""
    points = list(zip(places, values, strict=True))
    exact = [value for place, value in points if place == at]
    chords = [
        y + (z - y) * (at - left) / (right - left)
        for (left, y), (right, z) in itertools.combinations(points, 2)
        if left <= at <= right
    ]
    return min(exact + chords)


def next_token_loss(logits: Tensor, tokens: Tensor, mask: Tensor | None = None) -> float:
    """Mean negative log-likelihood of every token that follows another one, padding left out, one after the other."""
    terms = []
    for row in range(len(tokens)):
        for place in range(1, tokens.shape[1]):
            if mask is None or mask[row, place]:
                scores = logits[row, place - 1].double()
                terms.append(float(scores.logsumexp(0) - scores[tokens[row, place]]))
    return math.fsum(terms) / len(terms)


def contrastive_loss(similarities: Tensor) -> float:
    """CLIP's: of square similarities of texts and images, the mean over both ways of choosing."""
    values = similarities.double()
    rows = [float(values[i].logsumexp(0) - values[i, i]) for i in range(len(values))]
    columns = [float(values[:, i].logsumexp(0) - values[i, i]) for i in range(len(values))]
    return (math.fsum(rows) / len(rows) + math.fsum(columns) / len(columns)) / 2


def spearman(values: Sequence[float], others: Sequence[float]) -> float:
    """The correlation of places in order, equal values at the mean of theirs."""

    def place(value: float, among: Sequence[float]) -> float:
        return sum(other < value for other in among) + (sum(other == value for other in among) + 1) / 2

    x, y = ([place(value, each) for value in each] for each in (values, others))
    mean = (len(x) + 1) / 2
    products = math.fsum((a - mean) * (b - mean) for a, b in zip(x, y, strict=True))
    return products / math.sqrt(math.fsum((a - mean) ** 2 for a in x) * math.fsum((b - mean) ** 2 for b in y))


# Predictions


def softmax(logits: Sequence[float]) -> list[float]:
    """Of one row."""
    largest = max(logits)
    powers = [math.exp(value - largest) for value in logits]
    return [power / math.fsum(powers) for power in powers]


def kl_of_softmax(dense: Tensor, compressed: Tensor) -> float:
    """The Kullback–Leibler divergence of the softmax of logits `(N, V)`, in nats, summed over the rows."""
    total = 0.0
    for row, other in zip(dense.double().tolist(), compressed.double().tolist(), strict=True):
        total += math.fsum(p * math.log(p / q) for p, q in zip(softmax(row), softmax(other), strict=True))
    return total


def kl_of_normal(dense: Tensor, compressed: Tensor) -> float:
    """That of normal distributions of unit variance with these means."""
    pairs = zip(dense.double().flatten().tolist(), compressed.double().flatten().tolist(), strict=True)
    return math.fsum((a - b) ** 2 / 2 for a, b in pairs)
