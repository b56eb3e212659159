"""One contract for every solver, over every case; then what each promises beyond it."""

import itertools
from collections.abc import Callable

import pytest
import reference
import torch
from cases import (
    ALS_NOISE_NEAR_FULL_RANK,
    CASES,
    DEAD_FEATURE,
    ROUNDING,
    Case,
    conditioned,
    each_case,
    gaussian,
    orthonormal,
)
from torch import Tensor

from optimum_pgsvd.errors import ConfigError
from optimum_pgsvd.registry import Registry
from optimum_pgsvd.solvers import SOLVERS
from optimum_pgsvd.structures import LowRankFactors


each_solver = pytest.mark.parametrize("solver", SOLVERS.names())
# In float64; the squares of a condition of 1e9 are one of 1e18.
SINGULAR = {
    "fewer tokens than features", "fewer tokens than features, tall", "dead feature", "condition 1e9",
    "condition 1e9, tall",
}  # fmt: skip


def can_solve(solver: str, case: Case) -> bool:
    """Whether the solver need not invert the case's Gram matrix, or can."""
    return not (SOLVERS.trait(solver, "inverts") and case.name in SINGULAR)


def solvable_by(wanted: Callable[[str], bool]) -> pytest.MarkDecorator:
    """Each of some solvers on each case that it can solve."""
    pairs = [(solver, case) for solver in SOLVERS.names() if wanted(solver) for case in CASES]
    kept = [pytest.param(*pair, id=f"{pair[0]}-{pair[1].name}") for pair in pairs if can_solve(*pair)]
    return pytest.mark.parametrize(("solver", "case"), kept)


each_solvable = solvable_by(lambda solver: True)


ANISOTROPIC = Case("anisotropic", gaussian(24, 32, seed=30), conditioned(128, 32, 1e3, seed=31))


def known(solver: str, case: Case) -> Tensor | None:
    """What the solver needs to know of a case; every token is a sample, with a gradient at the outputs of its own."""
    gradients = gaussian(*case.inputs.shape[:1], len(case.weight), seed=90)
    return {
        None: lambda: None,
        "gram": lambda: case.gram,
        "magnitudes": lambda: reference.mean_magnitudes(case.inputs),
        "gradients": lambda: (gradients.square().sum(1, keepdim=True) * case.inputs.square()).sum(0),
    }[SOLVERS.trait(solver, "needs")]()


def solve(solver: str, case: Case, rank: int, num_iterations: int = 10) -> LowRankFactors:
    return SOLVERS[solver](case.weight, known(solver, case), rank, num_iterations)


def squared_error(case: Case, factors: LowRankFactors) -> float:
    return case.squared_error(factors.left, factors.right)


def relative_error(case: Case, factors: LowRankFactors) -> float:
    return reference.relative_outputs_error(case.weight, factors.left @ factors.right, case.inputs)


def noise(solver: str, case: Case) -> float:
    """What rounding may add to a squared error, up to half the full rank."""
    return case.als_rounding if solver == "als" else case.rounding


# The contract


@each_solvable
def test_no_solver_goes_below_the_optimum(solver, case):
    for rank in case.ranks:
        factors = solve(solver, case, rank)
        least = case.least_squared_error(rank)
        assert squared_error(case, factors) >= least - case.rounding
        assert factors.rank == rank


@each_solvable
def test_full_rank_reproduces_the_outputs(solver, case):
    error = squared_error(case, solve(solver, case, case.full_rank))
    noisy = solver == "als" and case.ill_conditioned
    assert error <= (ALS_NOISE_NEAR_FULL_RANK if noisy else ROUNDING) * case.energy


@each_solvable
def test_two_runs_give_the_same_bytes_in_float64(solver, case):
    rank = case.light_ranks[-1]
    once, again = solve(solver, case, rank), solve(solver, case, rank)
    for a, b in ((once.left, again.left), (once.right, again.right)):
        assert a.dtype == torch.float64
        assert a.isfinite().all()
        assert torch.equal(a, b)


@each_solvable
def test_factors_are_balanced(solver, case):
    """Component by component, unless one side of it is zero."""
    for rank in case.light_ranks:
        factors = solve(solver, case, rank)
        a, b = factors.left.norm(dim=0), factors.right.norm(dim=1)
        both = (a > 0) & (b > 0)
        torch.testing.assert_close(a[both], b[both], rtol=1e-9, atol=0)
        assert both.all() or case.name == "zero weight"


@each_solver
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_weight_is_solved_as_well_as_in_float64(solver, dtype):
    """In float32, where products of factors are exact to 1e-6; ALS and SVD-LLM, which invert, in float64."""
    for case in [case for case in CASES if can_solve(solver, case)]:
        half = Case(case.name, case.weight.to(dtype).double(), case.inputs)
        needed = known(solver, case)
        for rank in case.light_ranks:
            factors, exact = (SOLVERS[solver](w, needed, rank, 10) for w in (case.weight.to(dtype), half.weight))
            assert factors.left.dtype == (torch.float64 if solver in ("als", "svd_llm") else torch.float32)
            wide = LowRankFactors(factors.left.double(), factors.right.double())
            assert squared_error(half, wide) == pytest.approx(
                squared_error(half, exact), rel=1e-4, abs=max(noise(solver, half), 1e-11 * half.energy)
            )


@solvable_by(lambda solver: SOLVERS.trait(solver, "needs") in (None, "gram"))  # not what is summed token by token
def test_turning_the_tokens_changes_nothing(solver, case):
    """X → QX, Q orthogonal: as good for the old inputs as what was found from them."""
    turned = Case(case.name, case.weight, orthonormal(len(case.inputs), len(case.inputs), seed=70) @ case.inputs)
    for rank in case.light_ranks:
        factors, expected = solve(solver, turned, rank), solve(solver, case, rank)
        assert squared_error(case, factors) == pytest.approx(
            squared_error(case, expected), rel=1e-6, abs=noise(solver, case)
        )


@each_solvable
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_scaling_the_inputs_changes_nothing(solver, case, scale):
    scaled = Case(case.name, case.weight, scale * case.inputs)
    for rank in case.light_ranks:
        assert squared_error(case, solve(solver, scaled, rank)) == pytest.approx(
            squared_error(case, solve(solver, case, rank)), rel=1e-6, abs=noise(solver, case)
        )


@each_solver
def test_scaling_the_weight_scales_the_product(solver):
    case = CASES[0]
    scaled = solve(solver, Case("scaled", 1e-3 * case.weight, case.inputs), 6)
    expected = solve(solver, case, 6)
    torch.testing.assert_close(
        scaled.left @ scaled.right,
        1e-3 * expected.left @ expected.right,
        rtol=0,
        atol=1e-12 * float(case.weight.norm()),
    )


# What a solver promises beyond it


@each_case
def test_eigh_attains_the_optimum(case):
    for rank in case.ranks:
        least = case.least_squared_error(rank)
        assert squared_error(case, solve("eigh", case, rank)) <= least + case.rounding


@each_case
def test_als_lies_between_eigh_and_svd(case):
    for rank in case.light_ranks:
        eigh, als, svd = (squared_error(case, solve(solver, case, rank)) for solver in ("eigh", "als", "svd"))
        assert eigh - case.rounding <= als <= svd + noise("als", case)
        # Ten sweeps end near the optimum: 2.6 % above its square in the slowest case seen.
        assert als <= 1.05 * eigh + noise("als", case)


@each_case
def test_svd_is_the_best_for_the_weight_alone(case):
    for rank in case.ranks:
        factors = solve("svd", case, rank)
        error = reference.relative_weight_error(case.weight, factors.left @ factors.right)
        assert error == pytest.approx(reference.truncation_error(case.weight, rank), rel=0, abs=1e-13)


@solvable_by(lambda solver: SOLVERS.trait(solver, "nested"))
def test_leading_components_are_the_solution_of_a_smaller_rank(solver, case):
    """The most important component comes first, so factors may be cut."""
    rank = case.light_ranks[-1]
    factors = solve(solver, case, rank)
    for fewer in range(1, rank):
        cut = LowRankFactors(factors.left[:, :fewer], factors.right[:fewer])
        assert squared_error(case, cut) == pytest.approx(
            squared_error(case, solve(solver, case, fewer)), rel=0, abs=case.rounding
        )


@pytest.mark.parametrize("solver", ["eigh", "svd"])
@each_case
def test_the_error_falls_with_the_rank(solver, case):
    """Each in its own norm: outputs for eigh, weight for svd."""
    inputs = case.inputs if solver == "eigh" else torch.eye(case.weight.shape[1], dtype=torch.float64)
    measured = Case(case.name, case.weight, inputs)
    errors = [squared_error(measured, solve(solver, case, rank)) for rank in range(1, case.full_rank + 1)]
    assert all(after <= before + measured.rounding for before, after in itertools.pairwise(errors))


@solvable_by(lambda solver: solver == "svd_llm")
def test_svd_llm_finds_what_its_paper_says_and_that_is_the_optimum(solver, case):
    for rank in case.ranks:
        factors = solve("svd_llm", case, rank)
        product, size = factors.left @ factors.right, float(case.weight.norm())
        expected = reference.whitened(case.weight, case.gram, rank)
        torch.testing.assert_close(product, expected, rtol=0, atol=1e-10 * size)
        assert squared_error(case, factors) == pytest.approx(case.least_squared_error(rank), rel=0, abs=case.rounding)


@pytest.mark.parametrize("case", [case for case in CASES if case.name in SINGULAR], ids=repr)
def test_svd_llm_fails_where_the_gram_matrix_is_singular(case):
    """As its authors' users report; the closed form does not."""
    with pytest.raises(torch.linalg.LinAlgError, match="not positive definite"):
        solve("svd_llm", case, 2)
    assert squared_error(case, solve("eigh", case, 2)) <= case.least_squared_error(2) + case.rounding


def test_svd_llm_tells_rounding_from_a_feature_of_its_own():
    """One that is the sum of others is left over as rounding, which may be of either sign; a small one is not."""
    inputs = gaussian(96, 24, seed=91)
    for scale in (1.0, 1e3):
        for feature in range(4, 24):
            dependent = inputs.clone() * scale
            dependent[:, feature] = dependent[:, 0] + dependent[:, 1]
            with pytest.raises(torch.linalg.LinAlgError):
                solve("svd_llm", Case("dependent", CASES[0].weight, dependent), 3)
            dependent[:, feature] += 1e-4 * scale * inputs[:, feature]
            nearly = Case("nearly dependent", CASES[0].weight, dependent)
            factors = solve("svd_llm", nearly, 3)
            assert squared_error(nearly, factors) == pytest.approx(nearly.least_squared_error(3), rel=1e-9)


def assert_scaled(solver: str, case: Case, scales: Tensor) -> None:
    """A solver finds the SVD of the scaled weight, up to the 1e-10 by which it minds the weight itself."""
    alive = scales.clamp(min=1e-6 * float(scales.max()))
    for rank in case.ranks:
        factors = solve(solver, case, rank)
        expected = reference.scaled(case.weight, alive, rank)
        size = float(case.weight.norm())
        torch.testing.assert_close(factors.left @ factors.right, expected, rtol=0, atol=1e-9 * size)


@each_case
def test_asvd_finds_what_its_paper_says(case):
    """α = 0.5; of a feature that is always zero, which the paper divides by, its limit."""
    assert_scaled("asvd", case, reference.mean_magnitudes(case.inputs) ** 0.5)


@each_case
def test_fwsvd_finds_what_its_paper_says(case):
    """A row of the paper's weight is a column of ours: importances are of input features."""
    assert_scaled("fwsvd", case, known("fwsvd", case) ** 0.5)


def test_scaled_inputs_are_all_that_asvd_and_fwsvd_can_know():
    """Uncorrelated inputs whose energies are what they scale by: the optimum. Any others: not."""
    inputs = orthonormal(96, 24, seed=92) * torch.logspace(0, 2, 24, dtype=torch.float64)
    case = Case("uncorrelated", gaussian(24, 24, seed=93), inputs)
    energies = inputs.square().sum(0)
    for solver in ("asvd", "fwsvd"):
        factors = SOLVERS[solver](case.weight, energies, 6, 10)
        assert squared_error(case, factors) == pytest.approx(case.least_squared_error(6), rel=1e-6)
        correlated = SOLVERS[solver](ANISOTROPIC.weight, ANISOTROPIC.inputs.square().sum(0), 6, 10)
        assert squared_error(ANISOTROPIC, correlated) > 1.5 * ANISOTROPIC.least_squared_error(6)


def test_only_als_iterates():
    once, ten = (solve("als", ANISOTROPIC, 8, sweeps) for sweeps in (1, 10))
    assert squared_error(ANISOTROPIC, ten) < squared_error(ANISOTROPIC, once)
    expected = reference.als(ANISOTROPIC.weight, ANISOTROPIC.gram, 8, 10)
    torch.testing.assert_close(ten.left @ ten.right, expected, rtol=0, atol=1e-8)
    for solver in {*SOLVERS.names()} - {"als"}:
        assert torch.equal(solve(solver, ANISOTROPIC, 8, 1).left, solve(solver, ANISOTROPIC, 8, 10).left)


# Positive controls: what activations are worth


@pytest.mark.parametrize("solver", ["als", "eigh"])
def test_on_anisotropic_inputs_activations_more_than_halve_the_error(solver):
    svd, aware = (relative_error(ANISOTROPIC, solve(name, ANISOTROPIC, 8)) for name in ("svd", solver))
    assert svd > 2.5 * aware


@pytest.mark.parametrize("solver", ["als", "eigh"])
def test_on_isotropic_inputs_activations_are_worth_nothing(solver):
    case = Case("isotropic", gaussian(24, 16, seed=32), orthonormal(64, 16, seed=33))
    assert relative_error(case, solve(solver, case, 5)) == pytest.approx(
        relative_error(case, solve("svd", case, 5)), rel=1e-9
    )


@pytest.mark.parametrize("solver", ["als", "eigh"])
def test_the_wrong_activations_are_worse_than_none(solver):
    gram = ANISOTROPIC.gram
    wrong = SOLVERS[solver](ANISOTROPIC.weight, torch.linalg.inv(gram), 8, 10)
    assert relative_error(ANISOTROPIC, wrong) > 1.1 * relative_error(ANISOTROPIC, solve("svd", ANISOTROPIC, 8))


@pytest.mark.parametrize("solver", ["als", "eigh"])
def test_what_a_dead_feature_feeds_does_not_matter(solver):
    """A column of the weight that no input reaches may be anything; plain SVD spends a rank on it."""
    case = next(case for case in CASES if case.name == "dead feature")
    weight = case.weight.clone()
    weight[:, DEAD_FEATURE] *= 1e3
    loud = Case("loud dead feature", weight, case.inputs)
    best = relative_error(case, solve("eigh", case, 2))
    # Ten sweeps end 0.1 % above the optimum here.
    assert relative_error(loud, solve(solver, loud, 2)) < best * (1.005 if solver == "als" else 1 + 1e-9)
    assert relative_error(loud, solve("svd", loud, 2)) > 1.1 * relative_error(case, solve("svd", case, 2)) > 1.1 * best


# Names


def test_an_unknown_solver_lists_the_known_ones():
    with pytest.raises(ConfigError, match="solver='qr' is not known; known are .*als.*eigh.*svd"):
        SOLVERS["qr"]
    with pytest.raises(ConfigError, match="solver='qr' is not known"):
        SOLVERS.trait("qr", "needs")
    assert {name: SOLVERS.trait(name, "needs") for name in SOLVERS.names()} == {
        "als": "gram",
        "asvd": "magnitudes",
        "eigh": "gram",
        "fwsvd": "gradients",
        "svd": None,
        "svd_llm": "gram",
    }


def test_a_registry_holds_each_name_once():
    colours: Registry = Registry("colour", warm=False, loud=False)

    @colours.register("red", warm=True)
    def red() -> str:
        return "red"

    assert colours["red"]() == "red"
    assert colours.trait("red", "warm") is True
    assert colours.trait("red", "loud") is False
    assert colours.check("red") == "red"
    with pytest.raises(ValueError, match="colour 'red' is already registered"):
        colours.register("red")(lambda: "other")
    with pytest.raises(ValueError, match="colour 'blue' has no trait cold; known are warm, loud"):
        colours.register("blue", cold=True)
    assert colours["red"]() == "red"
    assert colours.names() == ["red"]
