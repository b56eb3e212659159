"""Laws of the optimum where errors of some outputs cost more than errors of others, against oracles of `reference`.

What `weighted_projection` minimises is `tr(B E G Eᵀ)` with a floor under B, for a tall weight under `Wᵀ B W`, and a
small multiple of the identity added to G: both are bounded here by what they can add to the optimum at most.
"""

from __future__ import annotations

import pytest
import reference
import torch
from cases import CASES, ROUNDING, Case, conditioned, each_case, gaussian, orthonormal
from torch import Tensor

from optimum_pgsvd.linalg import output_projection, weighted_projection, weighted_spectrum
from optimum_pgsvd.linalg.projection import TIE_BREAK
from optimum_pgsvd.linalg.weighted import FLOOR, metric_root
from optimum_pgsvd.solvers import eigh_of_loss
from optimum_pgsvd.structures import Moments


def full(k: int) -> Tensor:
    return reference.gram_matrix(gaussian(3 * k, k, seed=50))


def singular(k: int) -> Tensor:
    """Of a third of the full rank: most directions cost nothing."""
    return reference.gram_matrix(gaussian(max(k // 3, 1), k, seed=51))


def ill_conditioned(k: int) -> Tensor:
    rows = conditioned(3 * k, k, 1e9, seed=52)
    return reference.gram_matrix(rows)


METRICS = {
    "full": full,
    "singular": singular,
    "condition 1e18": ill_conditioned,
    "identity": lambda k: torch.eye(k, dtype=torch.float64),
    "zero": lambda k: torch.zeros(k, k, dtype=torch.float64),
}
each_metric = pytest.mark.parametrize("kind", METRICS)


class Weighted:
    """A case with a metric; of a tall weight, the problem is stated on its inputs, `E = W D` and `tr(M D G Dᵀ)`."""

    def __init__(self, case: Case, kind: str):
        self.case, self.weight, self.inputs, self.gram = case, case.weight, case.inputs, case.gram
        m, n = case.weight.shape
        self.tall = m > n
        self.metric = METRICS[kind](m)
        if self.tall:
            self.metric = case.weight.T @ self.metric @ case.weight
        self.side = torch.eye(n, dtype=torch.float64) if self.tall else self.weight
        self.floored = reference.floored(self.metric, FLOOR)
        self.values = reference.weighted_singular_values(self.side, self.inputs, self.floored)

    def solve(self, rank: int, moment: Tensor | None = None) -> tuple[Tensor, Tensor]:
        energies = self.gram.diagonal()
        return weighted_projection(self.weight, self.gram if moment is None else moment, energies, self.metric, rank)

    def error(self, left: Tensor, right: Tensor) -> float:
        """The squared error, under the metric with its floor."""
        if not self.tall:
            return reference.weighted_error(self.weight, left @ right, self.gram, self.floored)
        # Ŵ = W P with P found from Ŵ: these weights have full column rank, or are zero.
        projection = torch.linalg.pinv(self.weight) @ left.double() @ right.double()
        return reference.weighted_error(self.side, projection, self.gram, self.floored)

    def least(self, rank: int) -> float:
        return float(self.values[rank:].square().sum())

    @property
    def energy(self) -> float:
        return reference.weighted_error(self.side, torch.zeros_like(self.side), self.gram, self.floored) or 1.0

    @property
    def allowed(self) -> float:
        """Rounding, and the tie break under G: at most its weight times the whole of `tr(B W Wᵀ)`."""
        ridge = TIE_BREAK[torch.float64] * float(self.gram.diagonal().mean())
        identity = torch.eye(len(self.gram), dtype=torch.float64)
        whole = reference.weighted_error(self.side, torch.zeros_like(self.side), identity, self.floored)
        return ROUNDING * self.energy + ridge * whole


# The optimum


@each_metric
@each_case
def test_the_optimum_of_every_rank_is_attained(case: Case, kind: str):
    problem = Weighted(case, kind)
    for rank in case.ranks:
        left, right = problem.solve(rank)
        assert (left.shape[1], right.shape[0]) == (rank, rank)
        assert problem.error(left, right) == pytest.approx(problem.least(rank), rel=0, abs=problem.allowed)


SHAPES = {"wide": CASES[1], "tall": CASES[2], "square": CASES[0]}


@each_metric
@pytest.mark.parametrize("shape", SHAPES)
def test_no_other_factors_go_below_it(shape: str, kind: str):
    """Alternating least squares from random starts comes close, and near the optimum every way leads up."""
    case = SHAPES[shape]
    problem = Weighted(case, kind)
    rank = case.full_rank // 3
    left, right = problem.solve(rank)
    own = problem.error(left, right)
    found = []
    for seed in range(12):
        start = gaussian(rank, case.weight.shape[1], seed=100 + seed)
        product = reference.weighted_als(problem.side, case.gram, problem.floored, start, 60)
        found.append(reference.weighted_error(problem.side, product, case.gram, problem.floored))
    assert min(found) >= own - problem.allowed
    assert min(found) <= own * (1 + 1e-3)
    for seed in range(20):
        towards = gaussian(*left.shape, seed=200 + seed), gaussian(*right.shape, seed=300 + seed)
        if problem.tall:
            towards = case.weight @ torch.linalg.pinv(case.weight) @ towards[0], towards[1]
        for size in (1e-3, 1e-1):
            moved = problem.error(left + size * left.norm() * towards[0], right + size * right.norm() * towards[1])
            assert moved > own + 1e-9 * problem.energy


@each_case
def test_components_come_most_important_first_and_may_be_cut(case: Case):
    """Those of a larger rank hold the solution of every smaller one."""
    problem = Weighted(case, "full")
    left, right = problem.solve(case.full_rank)
    for rank in case.ranks:
        error = problem.error(left[:, :rank], right[:rank])
        assert error == pytest.approx(problem.least(rank), rel=0, abs=problem.allowed)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("name", ["square", "wide", "dead feature"])
def test_where_all_outputs_cost_the_same_it_is_the_projection_of_outputs(name: str, scale: float):
    case = next(case for case in CASES if case.name == name)
    m = len(case.weight)
    for rank in case.light_ranks:
        left, right = weighted_projection(
            case.weight, case.gram, case.gram.diagonal(), scale * torch.eye(m).double(), rank
        )
        plain = output_projection(case.weight, case.gram, rank)
        torch.testing.assert_close(left @ right, plain[0] @ plain[1], rtol=0, atol=1e-8)


def test_of_a_tall_weight_whose_outputs_cost_the_same():
    """There the floor lies under `Wᵀ W`: it adds to the optimum what it weighs, at most."""
    case = SHAPES["tall"]
    metric = case.weight.T @ case.weight
    floor = FLOOR * float(metric.diagonal().mean())
    for rank in case.light_ranks:
        left, right = weighted_projection(case.weight, case.gram, case.gram.diagonal(), metric, rank)
        plain = output_projection(case.weight, case.gram, rank)
        left_out = torch.eye(12).double() - torch.linalg.pinv(case.weight) @ plain[0] @ plain[1]
        bound = floor * float(torch.trace(left_out @ case.gram @ left_out.T))
        least, error = case.least_squared_error(rank), case.squared_error(left, right)
        assert least - case.rounding <= error <= least + bound
        assert bound < 0.02 * least


def test_it_does_better_than_the_projection_where_outputs_differ_in_cost():
    """The control: one output in three costs a hundred times what the others do."""
    case = SHAPES["square"]
    metric = torch.diag(torch.tensor([1e4 if i % 3 == 0 else 1.0 for i in range(24)], dtype=torch.float64))
    left, right = weighted_projection(case.weight, case.gram, case.gram.diagonal(), metric, 8)
    plain = output_projection(case.weight, case.gram, 8)
    weighted, unweighted = (
        reference.weighted_error(case.weight, product, case.gram, metric)
        for product in (left @ right, plain[0] @ plain[1])
    )
    assert weighted < 0.02 * unweighted
    assert case.squared_error(left, right) > 1.2 * case.squared_error(*plain)


# What is measured


@each_metric
def test_outputs_moment_will_do_for_a_wide_weight(kind: str):
    problem = Weighted(SHAPES["wide"], kind)
    moment = problem.weight @ problem.gram @ problem.weight.T
    for rank in problem.case.ranks:
        by_inputs, by_outputs = problem.solve(rank), problem.solve(rank, moment)
        for one, other in zip(by_inputs, by_outputs, strict=True):
            # a component may come with its sign turned
            turn = (one * other).sum(0 if one is by_inputs[0] else 1).sign()
            torch.testing.assert_close(
                one * (turn if one is by_inputs[0] else turn[:, None]), other, rtol=0, atol=1e-6
            )


def test_a_zero_weight_gives_zero_factors():
    case = next(case for case in CASES if case.name == "zero weight")
    left, right = Weighted(case, "full").solve(3)
    assert float((left @ right).abs().max()) == 0
    assert bool(torch.isfinite(left).all())


def test_inputs_that_are_all_zero():
    weight = gaussian(6, 9, seed=0)
    nothing = torch.zeros(9, 9, dtype=torch.float64)
    left, right = weighted_projection(weight, nothing, nothing.diagonal(), full(6), 2)
    assert bool(torch.isfinite(left).all() and torch.isfinite(right).all())
    assert float((left @ right).norm()) <= 10 * float(weight.norm())


def test_a_component_that_costs_nothing_is_still_fitted():
    """In the directions that a singular metric says nothing of, the regression decides: outputs stay close."""
    case = SHAPES["square"]
    blind = torch.zeros(24, 24, dtype=torch.float64)
    blind[:4, :4] = torch.eye(4)
    left, right = weighted_projection(case.weight, case.gram, case.gram.diagonal(), blind, 12)
    error = reference.relative_outputs_error(case.weight, left @ right, case.inputs)
    exact = reference.relative_outputs_error(case.weight[:4], (left @ right)[:4], case.inputs)
    best = reference.least_outputs_error(case.weight[4:], case.inputs, 8)
    assert exact < 0.05
    assert error * reference.norm(case.weight @ case.inputs.T) < 1.5 * best


# The precision


@pytest.mark.parametrize("name", ["square", "wide", "tall", "condition 1e9", "condition 1e9, tall"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_factored_in_float32(name: str, dtype: torch.dtype):
    """From moments summed in float32: the objective rises by what the tie break of float32 adds, and rounding."""
    case = next(case for case in CASES if case.name == name)
    case = Case(name, case.weight.to(dtype).double(), case.inputs)
    problem = Weighted(case, "full")
    gram, metric = case.gram.float(), problem.metric.float()
    for rank in case.light_ranks:
        left, right = weighted_projection(case.weight.to(dtype), gram, gram.diagonal(), metric, rank)
        assert left.dtype == right.dtype == torch.float32
        assert problem.error(left, right) <= problem.least(rank) * (1 + 1e-3) + 1e-6 * problem.energy
    spectrum = weighted_spectrum(case.weight.to(dtype), gram, gram.diagonal(), metric)
    assert spectrum.dtype == torch.float32
    torch.testing.assert_close(spectrum.double(), problem.values, rtol=0, atol=2e-3 * float(problem.values[0]))


# The spectrum


@each_metric
@each_case
def test_the_spectrum_is_what_each_rank_leaves(case: Case, kind: str):
    problem = Weighted(case, kind)
    spectrum = weighted_spectrum(problem.weight, problem.gram, problem.gram.diagonal(), problem.metric)
    assert spectrum.shape == (case.full_rank,)
    assert not bool((spectrum.diff() > 0).any())
    for rank in case.ranks:
        left_out = float(spectrum[rank:].square().sum())
        assert left_out == pytest.approx(problem.error(*problem.solve(rank)), rel=0, abs=problem.allowed)
    torch.testing.assert_close(spectrum.square(), problem.values.square(), rtol=0, atol=problem.allowed)


def test_what_a_metric_root_is():
    for kind, metric_of in METRICS.items():
        metric = metric_of(9)
        root = metric_root(metric)
        assert torch.equal(root, root.tril()), kind
        scale = float(metric.diagonal().mean()) or 1.0
        torch.testing.assert_close(root @ root.T, reference.floored(metric, FLOOR), rtol=0, atol=1e-12 * scale)


def test_a_metric_with_the_rounding_of_float32_has_a_root():
    """An eigenvalue that should be zero is somewhat below it."""
    metric = reference.gram_matrix(gaussian(3, 64, seed=0)).float()
    assert float(torch.linalg.eigvalsh(metric.double())[0]) < 0
    assert bool(torch.isfinite(metric_root(metric)).all())


# The solver


def test_the_solver_balances_its_factors():
    case = SHAPES["wide"]
    problem = Weighted(case, "full")
    factors = eigh_of_loss(case.weight, Moments(case.gram, None, case.gram.diagonal()), problem.metric, 4)
    assert problem.error(factors.left, factors.right) == pytest.approx(problem.least(4), rel=1e-9)
    torch.testing.assert_close(factors.left.norm(dim=0), factors.right.norm(dim=1), rtol=1e-9, atol=0)


def test_turning_the_outputs_turns_the_solution():
    """`y → Q y` with `B → Q B Qᵀ` is the same problem."""
    case = SHAPES["square"]
    turn, metric = orthonormal(24, 24, seed=60), full(24)
    left, right = weighted_projection(case.weight, case.gram, case.gram.diagonal(), metric, 6)
    turned = weighted_projection(turn @ case.weight, case.gram, case.gram.diagonal(), turn @ metric @ turn.T, 6)
    torch.testing.assert_close(turned[0] @ turned[1], turn @ left @ right, rtol=0, atol=1e-8)
