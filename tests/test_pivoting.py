"""Pivoted storage: exact before rounding, and rounded with a small error of the outputs."""

import pytest
import reference
import torch
from cases import CASES, Case, conditioned, each_case, gaussian
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_pgsvd.linalg import balanced, output_projection, pivoted
from optimum_pgsvd.linalg.pivoting import LARGEST_COEFFICIENT, pivot_rows
from optimum_pgsvd.linalg.rounding import round_in_metric
from optimum_pgsvd.solvers import eigh_of_outputs
from optimum_pgsvd.storing import activation_error, stored
from optimum_pgsvd.structures import LowRankFactors, Moments


DTYPES = (torch.bfloat16, torch.float16, torch.float32)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
few = settings(max_examples=40, deadline=None, derandomize=True)


def factors_of(case: Case, rank: int) -> LowRankFactors:
    return LowRankFactors(*balanced(*output_projection(case.weight, case.gram, rank)))


def all_moments(case: Case) -> dict[str, Moments | None]:
    outputs = case.weight @ case.gram @ case.weight.T
    energies = case.gram.diagonal()
    return {"gram": Moments(case.gram, None, energies), "outputs": Moments(None, outputs, energies), "nothing": None}


@each_case
@pytest.mark.parametrize("measured", ["gram", "outputs", "nothing"])
def test_without_rounding_the_storage_is_exact(measured, case):
    """Of `left right`, to the rounding of float64 times how much larger than the product its factors may be."""
    for rank in case.ranks:
        factors = factors_of(case, rank)
        kept = stored(factors, all_moments(case)[measured], "pivoted", torch.float64)
        assert kept.order.dtype == torch.int32
        assert sorted(kept.order.tolist()) == list(range(len(case.weight)))
        rebuilt = reference.row_by_row(kept.basis, kept.coefficients, kept.order)
        assert reference.norm(rebuilt - factors.left @ factors.right) <= 1e-11 * reference.norm(case.weight)


@each_case
def test_rows_are_made_of_pivots_with_small_coefficients(case):
    left = factors_of(case, case.full_rank // 2 or 1).left
    order, coefficients = pivot_rows(left, torch.ones(len(left), dtype=left.dtype))
    assert all(largest <= LARGEST_COEFFICIENT + 1e-12 for largest in coefficients.abs().flatten().tolist())
    pivots = left[order.argsort()[: left.shape[1]]]
    torch.testing.assert_close(reference.row_by_row(pivots, coefficients, order), left, rtol=0, atol=1e-12)


@few
@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 6), st.integers(0, 8))
def test_factors_of_less_rank_than_they_have_columns(seed, rank, true_rank, extra):
    """Dependent rows among the pivots do no harm: coefficients come from elimination, and nothing is inverted."""
    left = gaussian(rank + extra, true_rank, seed=seed) @ gaussian(true_rank, rank, seed=seed + 1)
    right = gaussian(rank, 9, seed=seed + 2)
    basis, coefficients, order = pivoted(left, right, right @ right.T, None, torch.float64)
    torch.testing.assert_close(reference.row_by_row(basis, coefficients, order), left @ right, rtol=0, atol=1e-9)


def test_zero_rows_and_zero_factors():
    left = torch.cat([torch.zeros(4, 3), gaussian(5, 3, seed=0)]).double()
    right = gaussian(3, 7, seed=1)
    for a in (left, torch.zeros_like(left)):
        basis, coefficients, order = pivoted(a, right, right @ right.T, torch.eye(7).double(), torch.float64)
        torch.testing.assert_close(reference.row_by_row(basis, coefficients, order), a @ right, rtol=0, atol=1e-14)


def test_two_runs_give_the_same_bytes():
    case = CASES[0]
    once, again = (stored(factors_of(case, 9), all_moments(case)["gram"], "pivoted", torch.bfloat16) for _ in "ab")
    for name, tensor in once.tensors.items():
        assert torch.equal(again.tensors[name], tensor)


# Rounding


def weighted(errors: torch.Tensor, metric: torch.Tensor) -> float:
    """`tr(E H Eᵀ)`."""
    return float(((errors @ metric) * errors).sum())


@each_dtype
def test_rounding_comes_near_the_best_that_there_is(dtype):
    """Of four coupled columns; what is tried ends three steps away, so that a little less is possible."""
    matrix, root = gaussian(40, 4, seed=0), gaussian(4, 4, seed=1) + 0.5
    metric = root @ root.T
    rounded = round_in_metric(matrix, metric, dtype)
    assert rounded.dtype == dtype
    best = sum(reference.best_rounding(row, metric, dtype) for row in matrix)
    assert 0.85 * best < weighted(matrix - rounded.double(), metric) < 1.1 * best
    assert weighted(matrix - matrix.to(dtype).double(), metric) > 3.5 * best


@each_dtype
def test_without_coupling_rounding_is_rounding(dtype):
    matrix = gaussian(20, 70, seed=2)
    assert torch.equal(round_in_metric(matrix, torch.diag(gaussian(70, seed=3).square()), dtype), matrix.to(dtype))


def test_blocks_of_columns_make_up_for_one_another(monkeypatch):
    from optimum_pgsvd.linalg import rounding

    matrix, root = gaussian(30, 40, seed=4), gaussian(40, 20, seed=5)
    metric = root @ root.T + 1e-2 * torch.eye(40, dtype=torch.float64)
    whole = round_in_metric(matrix, metric, torch.bfloat16)
    monkeypatch.setattr(rounding, "BLOCK", 7)
    assert torch.equal(round_in_metric(matrix, metric, torch.bfloat16), whole)


def correlated(m: int, n: int, seed: int) -> Case:
    """A weight and inputs whose singular values fall by a hundred, as trained ones do."""
    inputs = conditioned(2 * n, n, 1e2, seed)
    return Case("correlated", conditioned(m, n, 1e2, seed + 3) if m >= n else conditioned(n, m, 1e2, seed).T, inputs)


def added(case: Case, factors: LowRankFactors, kept) -> float:
    exact, found = factors.left @ factors.right, kept.left.double() @ kept.right.double()
    return reference.norm((found - exact) @ case.inputs.T)


@each_dtype
@pytest.mark.parametrize("measured", ["gram", "outputs"])
@pytest.mark.parametrize(("m", "n"), [(96, 96), (160, 96), (96, 160)])
def test_what_rounding_adds_is_about_what_it_adds_to_factors(m, n, measured, dtype):
    """At most a tenth more at any rank, and less in the mean; rounding each entry by itself adds twice as much."""
    case, ratios, plain = correlated(m, n, seed=7), [], []
    for rank in (10, 30, 50, 70, 86):
        factors = factors_of(case, rank)
        of_factors = added(case, factors, factors.to(dtype))
        kept = stored(factors, all_moments(case)[measured], "pivoted", dtype)
        exact = stored(factors, all_moments(case)[measured], "pivoted", torch.float64)
        entries = type(exact)(exact.basis.to(dtype), exact.coefficients.to(dtype), exact.order)
        ratios.append(added(case, factors, kept) / of_factors)
        plain.append(added(case, factors, entries) / of_factors)
    assert max(ratios) < 1.2
    assert sum(ratios) / len(ratios) < 1.05
    assert sum(plain) / len(plain) > 1.4 * sum(ratios) / len(ratios)


@each_dtype
@pytest.mark.parametrize("rank", [10, 40, 80])
def test_the_reported_error_is_that_of_what_is_stored(rank, dtype):
    """Exact from G; from the second moment of the outputs, an estimate of the part that rounding adds."""
    case = correlated(96, 160, seed=11)
    weight = case.weight.to(dtype)
    exact_case = Case("", weight.double(), case.inputs)
    by = all_moments(exact_case)
    factors = eigh_of_outputs(weight, by["outputs"].outputs, by["outputs"].energies, rank)
    kept = stored(factors, by["outputs"], "pivoted", dtype)
    product = kept.left.double() @ kept.right.double()
    exact = reference.relative_outputs_error(weight, product, case.inputs)
    assert activation_error(weight, factors, kept, by["gram"]) == pytest.approx(exact, rel=1e-3)
    assert activation_error(weight, factors, kept, by["outputs"]) == pytest.approx(exact, rel=0.05)
