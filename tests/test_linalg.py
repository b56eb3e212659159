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
from torch import Tensor

from optimum_pgsvd.linalg import (
    alternating_least_squares,
    balanced,
    output_projection,
    projection_of_outputs,
    relative_activation_error,
    relative_errors,
    relative_output_error,
    relative_tails,
    relative_weight_error,
    singular_values,
    symmetric_eigen,
    truncated_svd,
    working_dtype,
)
from optimum_pgsvd.linalg.leading import float32_eigenvectors
from optimum_pgsvd.linalg.products import output_moment, self_product
from optimum_pgsvd.linalg.projection import TIE_BREAK


# `(W G Wᵀ)` squares the data: a singular value below sqrt(1.1e-16) ≈ 1e-8 of the largest drowns in rounding.
SQUARED = 3e-8

few = settings(max_examples=40, deadline=None, derandomize=True)


# The closed form


def tie_break_bound(case):
    """The minimum of f + δ‖·‖² is at most δ‖W‖² above the minimum of f; δ is the tie break's weight."""
    return TIE_BREAK[torch.float64] * float(case.gram.diagonal().mean()) * reference.norm(case.weight) ** 2


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


def moments(case: Case) -> tuple[Tensor, Tensor]:
    """`W G Wᵀ` and the diagonal of G."""
    return reference.gram_matrix(case.inputs @ case.weight.double().T), case.gram.diagonal()


@each_case
def test_the_moment_of_the_outputs_gives_the_same_optimum(case):
    """For m ≤ n; a tall weight's outputs would do too, but are more."""
    for rank in case.ranks:
        error = case.squared_error(*projection_of_outputs(case.weight, *moments(case), rank))
        allowed = case.rounding + tie_break_bound(case)
        assert error == pytest.approx(case.least_squared_error(rank), rel=0, abs=allowed)


def test_ties_are_broken_by_the_weight_from_the_moment_of_the_outputs_too():
    weight, inputs = gaussian(24, 32, seed=0), gaussian(8, 32, seed=1)
    case = Case("surplus", weight, inputs)
    expected = output_projection(weight, case.gram, 16)
    left, right = projection_of_outputs(weight, *moments(case), 16)
    torch.testing.assert_close(left @ right, expected[0] @ expected[1], rtol=0, atol=1e-4)
    assert float((weight - left @ right).norm()) == pytest.approx(
        float((weight - torch.mm(*expected)).norm()), rel=1e-6
    )


# Half precision: float32


HALF = (torch.bfloat16, torch.float16)


def decaying(m: int, n: int, seed: int) -> Tensor:
    """A weight whose singular values fall like those of a trained layer."""
    k = min(m, n)
    spectrum = torch.arange(1, k + 1, dtype=torch.float64) ** -0.7
    return orthonormal(m, k, seed) * spectrum @ orthonormal(n, k, seed + 1).T


def anisotropic(tokens: int, features: int, condition: float, seed: int) -> Tensor:
    spectrum = torch.logspace(0, -torch.tensor(condition).log10().item(), features, dtype=torch.float64)
    return gaussian(tokens, features, seed=seed) * spectrum @ orthonormal(features, features, seed + 1).T


def louder(inputs: Tensor, rows: list[int] | slice, columns: list[int] | slice, factor: float) -> Tensor:
    inputs = inputs.clone()
    inputs[rows, columns] *= factor
    return inputs


N = 192
LIKE_LLM = anisotropic(768, N, 30, seed=80)
EVERY = slice(None)
HARD_INPUTS = {
    "anisotropic": LIKE_LLM,
    "outlier features": louder(LIKE_LLM, EVERY, [3, 50, 120], 1000),
    "massive tokens": louder(LIKE_LLM, [5, 9], EVERY, 1000),
    "condition 1e9 of the Gram matrix": anisotropic(768, N, 10**4.5, seed=82),
    "condition 1e9": anisotropic(768, N, 1e9, seed=84),
    "fewer tokens than features": LIKE_LLM[: N // 3],
    "dead features": louder(LIKE_LLM, EVERY, slice(N // 2, None), 0),
}
each_hard = pytest.mark.parametrize("inputs", HARD_INPUTS.values(), ids=HARD_INPUTS)


def half_case(m: int, inputs: Tensor, dtype: torch.dtype = torch.bfloat16) -> Case:
    return Case("half", decaying(m, inputs.shape[1], seed=90).to(dtype), inputs)


def saving_ranks(m: int, n: int) -> list[int]:
    """From small to the largest that saves parameters."""
    largest = (m * n - 1) // (m + n)
    return sorted({1, 8, largest // 4, largest // 2, 3 * largest // 4, largest})


def exact_squared_error(case: Case, left: Tensor, right: Tensor) -> float:
    return case.squared_error(left.double(), right.double())


@pytest.mark.parametrize("m", [N, 2 * N, N // 2])
@pytest.mark.parametrize("dtype", HALF)
@each_hard
def test_half_precision_weights_lose_nothing_to_float32(inputs, dtype, m):
    """At most 3e-4 of the optimum over all Gram matrices tried, where float32 starts to blur; 1e-6 on most."""
    case = half_case(m, inputs, dtype)
    for rank in saving_ranks(m, N):
        left, right = output_projection(case.weight, case.gram, rank)
        assert left.dtype == right.dtype == torch.float32
        # 1e-12 of the energy is what float32 keeps of the largest output; storing in bf16 costs a million times that.
        allowed = 5e-4 * case.least_squared_error(rank) + 1e-12 * half_energy(case)
        assert exact_squared_error(case, left, right) <= case.least_squared_error(rank) + allowed


def half_energy(case: Case) -> float:
    return reference.norm(case.weight.double() @ case.inputs.T) ** 2


@each_hard
def test_moments_summed_in_float32_cost_less_than_storing_the_factors(inputs):
    case = half_case(N, inputs)
    for rank in saving_ranks(N, N):
        left, right = output_projection(case.weight, case.gram.float(), rank)
        best, energy = case.least_squared_error(rank), half_energy(case)
        excess = exact_squared_error(case, left, right) - best
        assert excess <= 1e-4 * best + 1e-7 * energy
        assert exact_squared_error(case, left.bfloat16(), right.bfloat16()) - best > 1e-6 * energy


def test_without_care_float32_is_lost_on_outliers():
    """The control: eigenvectors of the whole matrix in float32."""
    case = half_case(N, HARD_INPUTS["outlier features"])
    moment, _ = moments(case)
    left = torch.linalg.eigh(moment.float())[1][:, -64:].double()
    careless = exact_squared_error(case, left, left.T @ case.weight.double())
    assert careless > 1.02 * case.least_squared_error(64)


def test_float64_is_used_only_where_float32_cannot_tell():
    for name, refused in {
        "outlier features": False,
        "massive tokens": False,
        "fewer tokens than features": True,
    }.items():
        case = half_case(N, HARD_INPUTS[name])
        moment, _ = moments(case)
        assert (float32_eigenvectors(lambda moment=moment: moment, N // 2) is None) == refused


@pytest.mark.parametrize("shape", [(N, N), (2 * N, N), (N // 2, N)])
def test_a_zero_weight_in_half_precision(shape):
    weight = torch.zeros(*shape, dtype=torch.bfloat16)
    gram = reference.gram_matrix(LIKE_LLM)
    left, right = output_projection(weight, gram, 5)
    assert left.isfinite().all()
    assert not right.any()
    assert relative_weight_error(weight, left, right) == relative_activation_error(weight, left, right, gram) == 0
    assert relative_tails(singular_values(weight)).tolist() == [0.0] * (min(shape) + 1)


def test_surplus_ranks_go_to_the_weight_in_float32_too():
    """Sums in float32 leave noise where the tokens say nothing, and the tie break must be heard over it."""
    case = half_case(N, LIKE_LLM[: N // 4])
    weight, known = case.weight.double(), N // 4
    left, _ = output_projection(weight, case.gram, known)
    rest = weight - left @ (left.T @ weight)
    best = float(torch.linalg.svdvals(rest)[N // 2 - known :].norm())
    for gram in (case.gram, case.gram.float()):
        left, right = (factor.double() for factor in output_projection(case.weight, gram, N // 2))
        assert float((weight - left @ right).norm()) <= 1.01 * best
        assert exact_squared_error(case, left, right) <= 1e-10 * half_energy(case)


@pytest.mark.parametrize("dtype", HALF)
def test_the_anchored_goal_of_a_half_precision_layer_is_decomposed_in_float32(dtype):
    """It comes in float64, but its Gram matrix was summed in float32."""
    case = half_case(N, LIKE_LLM, dtype)
    assert output_projection(case.weight.double(), case.gram.float(), 8)[0].dtype == torch.float32
    assert output_projection(case.weight.double(), case.gram, 8)[0].dtype == torch.float64
    assert [working_dtype(d) for d in (*HALF, torch.float32, torch.float64)] == [torch.float32] * 2 + [
        torch.float64
    ] * 2


def steep(n: int, seed: int) -> Tensor:
    spectrum = torch.logspace(0, -4, n, dtype=torch.float64)
    return orthonormal(n, n, seed) * spectrum @ orthonormal(n, n, seed + 1).T


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("weight", [decaying(N, 3 * N, seed=92), decaying(3 * N, N, seed=94), steep(N, seed=96)])
def test_planned_errors_of_half_precision_weights_are_exact_to_2e_5(weight, dtype):
    weight = weight.to(dtype)
    planned = relative_tails(singular_values(weight))
    exact = relative_tails(torch.linalg.svdvals(weight.double()))
    for floor, allowed in ((0.1, 2e-6), (0.01, 2e-5)):
        assert (planned - exact)[exact >= floor].abs().max() <= allowed


@pytest.mark.parametrize("reduction", [0.2, 0.4, 0.6])
def test_outputs_as_a_bf16_model_rounds_them_will_do(reduction):
    """The objective rises by a few millionths of the energy at most: 1e-4 of the optimum here."""
    m, n = N, 2 * N
    case = half_case(m, anisotropic(1024, n, 30, seed=86).bfloat16().double())
    rank = int((1 - reduction) * m * n / (m + n))
    outputs = (case.inputs.float() @ case.weight.float().T).bfloat16().float()
    left, right = projection_of_outputs(case.weight, outputs.T @ outputs, case.gram.diagonal().float(), rank)
    assert left.dtype == torch.float32
    assert exact_squared_error(case, left, right) <= 1.001 * case.least_squared_error(rank)


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


def test_singular_values_are_exact_above_the_noise_of_their_dtype():
    spectrum = torch.logspace(0, -5, 16, dtype=torch.float64)
    weight = orthonormal(24, 16, seed=40) * spectrum @ orthonormal(16, 16, seed=41).T
    torch.testing.assert_close(singular_values(weight), spectrum, rtol=1e-5, atol=0)
    half = weight.bfloat16()
    # Squared, float32 resolves 3e-4 of the largest.
    torch.testing.assert_close(
        singular_values(half).double(), torch.linalg.svd(half.double())[1], rtol=0, atol=3e-4 * float(spectrum[0])
    )


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


@each_case
def test_both_relative_errors_are_those_of_each_alone(case):
    for rank in case.ranks:
        factors = truncated_svd(case.weight, rank)
        plain, outputs = relative_errors(case.weight, *factors, case.gram)
        product = factors[0] @ factors[1]
        expected = reference.relative_weight_error(case.weight, product)
        assert plain == pytest.approx(expected, rel=1e-12, abs=1e-13)
        assert plain == relative_weight_error(case.weight, *factors)
        expected = reference.relative_outputs_error(case.weight, product, case.inputs)
        assert outputs == pytest.approx(expected, rel=1e-9, abs=3e-7)


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


def test_relative_errors_do_not_depend_on_how_the_weight_is_cut():
    """More rows and columns than are worked on at a time."""
    weight, inputs = gaussian(1500, 600, seed=55), gaussian(40, 600, seed=56)
    left, right = truncated_svd(weight, 5)
    product = left @ right
    assert relative_weight_error(weight, left, right) == pytest.approx(
        float((weight - product).norm() / weight.norm()), rel=1e-12
    )
    expected = float(((weight - product) @ inputs.T).norm() / (weight @ inputs.T).norm())
    assert relative_activation_error(weight, left, right, inputs.T @ inputs) == pytest.approx(expected, rel=1e-9)


@each_hard
def test_relative_errors_of_a_half_precision_layer(inputs):
    """In float32: to 1e-6, and to 1e-3 of an error that outliers push below the rounding of the factors."""
    case = half_case(N, inputs)
    for rank in saving_ranks(N, N):
        left, right = (factor.bfloat16() for factor in balanced(*output_projection(case.weight, case.gram, rank)))
        product = left.double() @ right.double()
        assert relative_weight_error(case.weight, left, right) == pytest.approx(
            reference.relative_weight_error(case.weight, product), rel=1e-6
        )
        exact = reference.relative_outputs_error(case.weight, product, inputs)
        for gram in (case.gram, case.gram.float()):
            found = relative_activation_error(case.weight, left, right, gram)
            assert found == pytest.approx(exact, rel=1e-6 if exact > 0.02 else 1e-3)


@each_case
def test_the_error_from_the_outputs_is_exact_before_rounding(case):
    for rank in case.ranks:
        left, right = balanced(*projection_of_outputs(case.weight, *moments(case), rank))
        exact = reference.relative_outputs_error(case.weight, left @ right, case.inputs)
        assert relative_output_error(case.weight, left, right, *moments(case)) == pytest.approx(
            exact, rel=1e-7, abs=1e-6
        )


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("reduction", [0.2, 0.4, 0.6])
@pytest.mark.parametrize("name", ["anisotropic", "dead features", "outlier features"])
def test_the_error_from_the_outputs_estimates_what_rounding_adds(name, reduction, dtype):
    """Within 1 %; where outliers leave an error below 0.01, rounding is most of it, and within 10 %."""
    case = half_case(N, HARD_INPUTS[name], dtype)
    rank = int((1 - reduction) * N / 2)
    factors = balanced(*projection_of_outputs(case.weight, *moments(case), rank))
    left, right = (factor.to(dtype) for factor in factors)
    exact = reference.relative_outputs_error(case.weight, left.double() @ right.double(), case.inputs)
    found = relative_output_error(case.weight, left, right, *moments(case))
    assert found == pytest.approx(exact, rel=0.01 if exact > 0.01 else 0.1)


# Symmetric products


@pytest.mark.parametrize("shape", [(7, 5), (600, 1100), (2100, 520)])
def test_self_product_is_exactly_symmetric(shape):
    matrix = gaussian(*shape, seed=57)
    product = self_product(matrix, torch.float64)
    assert torch.equal(product, product.T)
    torch.testing.assert_close(product, matrix.T @ matrix, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(5, 7), (600, 30), (30, 1100), (1100, 600)])
def test_output_moment_is_the_product_written_out(shape):
    weight, ridge = gaussian(*shape, seed=58), 0.25
    gram = reference.gram_matrix(gaussian(9, shape[1], seed=59))
    expected = weight @ gram @ weight.T + ridge * weight @ weight.T
    torch.testing.assert_close(output_moment(weight, gram, ridge), expected, rtol=1e-12, atol=1e-8)


@pytest.mark.parametrize("size", [6, 700])
def test_output_moment_of_a_triangle(size):
    weight, gram = gaussian(size, size, seed=64), reference.gram_matrix(gaussian(9, size, seed=65))
    triangle = weight.triu()
    torch.testing.assert_close(
        output_moment(weight, gram, triangular=True), triangle @ gram @ triangle.T, rtol=1e-12, atol=1e-8
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
