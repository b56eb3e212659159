"""Laws of the linear algebra, against the oracles of `reference`.

Squared errors are compared in units of the outputs' energy `‖W Xᵀ‖²`; `cases` says how closely.
"""

import itertools

import pytest
import reference
import torch
from cases import ALS_NOISE_NEAR_FULL_RANK, CASES, ROUNDING, Case, conditioned, each_case, gaussian, orthonormal
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_pgsvd.linalg import (
    alternating_least_squares,
    balanced,
    output_projection,
    relative_activation_error,
    relative_tails,
    relative_weight_error,
    singular_values,
    symmetric_eigen,
    truncated_svd,
)
from optimum_pgsvd.linalg.projection import TIE_BREAK


# `(W G Wᵀ)` squares the data: a singular value below sqrt(1.1e-16) ≈ 1e-8 of the largest drowns in rounding.
SQUARED = 3e-8

few = settings(max_examples=40, deadline=None, derandomize=True)


# The closed form


def tie_break_bound(case):
    """The minimum of f + δ‖·‖² is at most δ‖W‖² above the minimum of f; δ is the tie break's weight."""
    return TIE_BREAK * float(case.gram.diagonal().mean()) * reference.norm(case.weight) ** 2


@each_case
def test_output_projection_attains_the_optimum_of_every_rank(case):
    for rank in range(1, case.full_rank + 1):
        error = case.squared_error(*output_projection(case.weight, case.gram, rank))
        allowed = case.rounding + tie_break_bound(case)
        assert error == pytest.approx(case.least_squared_error(rank), rel=0, abs=allowed)


def test_what_the_calibration_set_leaves_open_is_decided_by_the_weight():
    """With more ranks than tokens the optimum is not unique: the surplus must not be wasted on noise."""
    weight, inputs = gaussian(24, 32, seed=0), gaussian(8, 32, seed=1)
    left, right = output_projection(weight, inputs.T @ inputs, 16)
    kept = torch.linalg.qr(left)[0]
    rest = weight - kept[:, :8] @ (kept[:, :8].T @ weight)
    best = float(torch.linalg.svdvals(rest)[8:].norm())
    assert float((weight - left @ right).norm()) == pytest.approx(best, rel=1e-6)


@each_case
def test_the_optimum_is_the_sum_of_the_eigenvalues_left_over(case):
    values, _ = symmetric_eigen(case.weight @ case.gram @ case.weight.T)
    for rank in range(1, case.full_rank + 1):
        tail = float(values[rank:].sum())
        assert tail == pytest.approx(case.least_squared_error(rank), rel=0, abs=case.rounding)


@each_case
def test_output_projection_is_an_orthogonal_projection_of_the_weight(case):
    for rank in case.ranks:
        left, right = output_projection(case.weight, case.gram, rank)
        torch.testing.assert_close(left.T @ left, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-13)
        torch.testing.assert_close(right, left.T @ case.weight, rtol=0, atol=1e-13)


def test_a_nudge_in_any_direction_leaves_the_optimum():
    """Stationarity, and the control of the optimum's test: it does tell 1e-3 apart."""
    case = CASES[0]
    left, right = output_projection(case.weight, case.gram, 8)
    best = case.squared_error(left, right)
    for seed in range(10):
        nudge = gaussian(*left.shape, seed=seed)
        assert case.squared_error(left + 1e-3 * nudge / nudge.norm(), right) > best + 10 * case.rounding


def test_a_wrong_gram_misses_the_optimum():
    case = CASES[0]
    wrong = gaussian(24, 24, seed=99)
    factors = output_projection(case.weight, wrong @ wrong.T, 8)
    assert case.squared_error(*factors) > 1.1 * case.least_squared_error(8)


# Alternating least squares


def als_trace(case: Case, rank: int, sweeps: int) -> list[float]:
    """Squared error at the start and after each sweep."""
    trace: list[float] = []
    alternating_least_squares(
        case.weight, case.gram, rank, sweeps, lambda left, right: trace.append(case.squared_error(left, right))
    )
    return trace


@each_case
def test_als_never_rises_and_never_passes_the_bound(case):
    for rank in case.light_ranks:
        trace = als_trace(case, rank, 10)
        assert len(trace) == 11
        start = reference.outputs_error(case.weight, reference.truncated(case.weight, rank), case.inputs) ** 2
        assert trace[0] == pytest.approx(start, rel=0, abs=case.rounding)
        assert all(after <= before + case.als_rounding for before, after in itertools.pairwise(trace))
        assert min(trace) >= case.least_squared_error(rank) - case.rounding


@each_case
def test_als_rises_by_no_more_than_its_noise_near_full_rank(case):
    for rank in case.ranks:
        noise = ALS_NOISE_NEAR_FULL_RANK * case.energy
        assert all(after <= before + noise for before, after in itertools.pairwise(als_trace(case, rank, 10)))


@each_case
def test_ten_sweeps_come_near_the_optimum_and_many_reach_it(case):
    """Ten end at most 2.6 % above the square of the optimum here; 200 end within 1e-14 of the energy."""
    for rank in case.light_ranks:
        best = case.least_squared_error(rank)
        trace = als_trace(case, rank, 200)
        assert trace[10] <= 1.05 * best + case.als_rounding
        assert trace[200] <= best + max(case.als_rounding, 1e-11 * case.energy)


def test_als_falls_strictly_on_anisotropic_inputs():
    """The control of the two above: the start, plain SVD, is far from the optimum here."""
    case = Case("anisotropic", gaussian(24, 32, seed=30), conditioned(128, 32, 1e3, seed=31))
    trace = als_trace(case, 8, 10)
    assert trace[0] > 5 * case.least_squared_error(8)
    assert all(after < before for before, after in itertools.pairwise(trace))
    assert trace[10] < 1.01 * case.least_squared_error(8)


@each_case
def test_als_is_the_algorithm_of_the_paper(case):
    """The outputs of a plain transcription, whose own rounding differs."""
    for rank, sweeps in itertools.product(case.light_ranks, (1, 3)):
        left, right = alternating_least_squares(case.weight, case.gram, rank, sweeps)
        expected = reference.als(case.weight, case.gram, rank, sweeps)
        assert reference.outputs_error(expected, left @ right, case.inputs) ** 2 <= case.als_rounding


# Spectra and truncated SVD


@each_case
def test_singular_values_agree_with_a_full_svd(case):
    expected = torch.linalg.svd(case.weight)[1]
    torch.testing.assert_close(singular_values(case.weight), expected, rtol=1e-12, atol=SQUARED * float(expected[0]))


def test_singular_values_are_exact_above_the_noise_and_take_any_dtype():
    spectrum = torch.logspace(0, -5, 16, dtype=torch.float64)
    weight = orthonormal(24, 16, seed=40) * spectrum @ orthonormal(16, 16, seed=41).T
    torch.testing.assert_close(singular_values(weight), spectrum, rtol=1e-5, atol=0)
    half = weight.bfloat16()
    torch.testing.assert_close(singular_values(half), torch.linalg.svd(half.double())[1], rtol=1e-5, atol=0)


@each_case
def test_eigenpairs_rebuild_the_matrix(case):
    matrix = case.gram
    values, vectors = symmetric_eigen(matrix)
    scale = float(values[0]) or 1.0
    torch.testing.assert_close(vectors * values @ vectors.T, matrix, rtol=0, atol=ROUNDING * scale)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(len(values), dtype=torch.float64), rtol=0, atol=1e-13)
    assert torch.equal(values, values.sort(descending=True)[0])


def test_eigenvalues_below_zero_are_rounding_noise():
    basis = orthonormal(6, 6, seed=42)
    values = torch.tensor([3.0, 2.0, 1.0, 1e-17, -1e-17, -1e-3], dtype=torch.float64)
    found, _ = symmetric_eigen(basis * values @ basis.T)
    assert found[-1] == 0.0
    torch.testing.assert_close(found[:3], values[:3], rtol=1e-13, atol=0)


@each_case
def test_truncated_svd_is_the_best_approximation_of_the_weight_alone(case):
    size = reference.norm(case.weight) or 1.0
    for rank in case.ranks:
        left, right = truncated_svd(case.weight, rank)
        error = reference.norm(case.weight - left @ right)
        expected = reference.norm(torch.linalg.svd(case.weight)[1][rank:])
        assert error == pytest.approx(expected, rel=0, abs=1e-13 * size)


def test_truncated_svd_shares_the_singular_values_between_the_factors():
    left, right = truncated_svd(CASES[0].weight, 5)
    values = torch.diag(torch.linalg.svd(CASES[0].weight)[1][:5])
    torch.testing.assert_close(left.T @ left, values, rtol=0, atol=1e-12)
    torch.testing.assert_close(right @ right.T, values, rtol=0, atol=1e-12)


@few
@given(st.lists(st.floats(1e-100, 1e6) | st.just(0.0), min_size=1, max_size=12))
def test_relative_tails_are_definition_1(values):
    values = sorted(values, reverse=True)
    tails = relative_tails(torch.tensor(values, dtype=torch.float64)).tolist()
    total = sum(value * value for value in values)
    if total == 0:
        assert tails == [0.0] * (len(values) + 1)
        return
    assert tails[0] == 1.0
    assert tails[-1] == 0.0
    assert all(after <= before for before, after in itertools.pairwise(tails))
    for rank, tail in enumerate(tails):
        # 12 terms, each rounded at 1.1e-16, halved by the root; squares below 1e-308 are lost altogether.
        expected = (sum(value * value for value in values[rank:]) / total) ** 0.5
        assert tail == pytest.approx(expected, rel=1e-14, abs=1e-150)


# Relative errors


@each_case
def test_relative_errors_are_those_of_the_matrices_written_out(case):
    """The activation error is read off G, so an error below 1e-8 of the outputs drowns in rounding."""
    for rank in case.ranks:
        left, right = gaussian(case.weight.shape[0], rank, seed=50), gaussian(rank, case.weight.shape[1], seed=51)
        for factors in ((left, right), truncated_svd(case.weight, rank)):
            product = factors[0] @ factors[1]
            assert relative_weight_error(case.weight, *factors) == pytest.approx(
                reference.relative_weight_error(case.weight, product), rel=1e-12, abs=1e-13
            )
            assert relative_activation_error(case.weight, *factors, case.gram) == pytest.approx(
                reference.relative_outputs_error(case.weight, product, case.inputs), rel=1e-9, abs=3e-7
            )


def test_relative_activation_error_is_zero_where_the_outputs_are():
    weight, zeros = gaussian(4, 6, seed=52), torch.zeros(6, 6, dtype=torch.float64)
    left, right = truncated_svd(weight, 2)
    assert relative_activation_error(weight, left, right, zeros) == 0.0
    assert relative_weight_error(weight, left, right) > 0.1


def test_relative_errors_measure_half_precision_factors_in_float64():
    weight, inputs = gaussian(16, 16, seed=53), gaussian(64, 16, seed=54)
    left, right = (factor.bfloat16() for factor in truncated_svd(weight, 16))
    product = left.double() @ right.double()
    assert relative_weight_error(weight, left, right) == pytest.approx(
        reference.relative_weight_error(weight, product), rel=1e-12
    )
    assert relative_activation_error(weight, left, right, inputs.T @ inputs) == pytest.approx(
        reference.relative_outputs_error(weight, product, inputs), rel=1e-9
    )


# Balance


@few
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(-12, 12))
def test_balanced_factors_have_equal_norms_and_the_same_product(seed, rank, exponent):
    left, right = gaussian(7, rank, seed=seed) * 10.0**exponent, gaussian(rank, 5, seed=seed + 1)
    a, b = balanced(left, right)
    torch.testing.assert_close(a.norm(dim=0), b.norm(dim=1), rtol=1e-13, atol=0)
    torch.testing.assert_close(a @ b, left @ right, rtol=0, atol=1e-14 * float((left.abs() @ right.abs()).max()))


def test_balance_brings_lopsided_factors_into_the_range_of_half_precision():
    left, right = gaussian(7, 3, seed=60) * 1e6, gaussian(3, 5, seed=61) * 1e-9
    assert left.half().isinf().any()
    assert (right.half() == 0).any()
    a, b = balanced(left, right)
    # fp16 keeps 11 bits: each factor is off by 2⁻¹¹, their product by twice that, for every summand.
    bound = 2**-10 * (a.abs() @ b.abs())
    assert ((a.half().double() @ b.half().double() - left @ right).abs() <= bound).all()


def test_a_component_that_is_zero_on_one_side_is_left_as_it_is():
    left, right = gaussian(4, 2, seed=62), gaussian(2, 3, seed=63)
    left[:, 0] = 0
    a, b = balanced(left, right)
    assert torch.equal(a[:, 0], left[:, 0])
    assert torch.equal(b[0], right[0])
    assert a[:, 1].norm() == pytest.approx(float(b[1].norm()))
