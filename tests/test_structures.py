"""The nouns: what they compute, and what they refuse."""

import itertools
from dataclasses import FrozenInstanceError

import pytest
import reference
import torch
from cases import each_case, gaussian
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_pgsvd.errors import ConfigError, PGSVDError
from optimum_pgsvd.linalg import singular_values
from optimum_pgsvd.structures import (
    Budget,
    LayerPlan,
    LinearShape,
    LowRankFactors,
    PivotedFactors,
    RankPlan,
    SVDProfile,
)


many = settings(max_examples=100, deadline=None, derandomize=True)
sizes = st.integers(1, 40)

# e(r) is read off squared singular values, which keep 1e-8 of the largest.
PROFILE = 3e-8


def profile_of(weight: torch.Tensor) -> SVDProfile:
    return SVDProfile(LinearShape(*weight.shape), singular_values(weight))


# LinearShape


@many
@given(sizes, sizes, st.sampled_from(["factors", "pivoted"]))
def test_largest_saving_rank_is_the_last_that_is_stored_in_less(m, n, storage):
    shape = LinearShape(m, n, storage)
    assert shape.largest_saving_rank == max(reference.saving_ranks(m, n, 1, storage), default=0)
    for rank in range(1, min(m, n) + 1):
        assert shape.parameters(rank) == reference.stored_parameters(m, n, rank, storage)
    assert shape.parameters(None) == torch.empty(m, n).numel()


def test_pivoted_storage_saves_at_every_rank_below_full_and_never_costs_more_than_dense():
    factors, pivoted = LinearShape(6, 4), LinearShape(6, 4, "pivoted")
    assert [factors.parameters(r) for r in (1, 2, 3, 4)] == [10, 20, 30, 40]
    assert [pivoted.parameters(r) for r in (1, 2, 3, 4)] == [9, 16, 21, 24]
    assert (factors.largest_saving_rank, pivoted.largest_saving_rank) == (2, 3)
    assert LinearShape(1, 8, "pivoted").largest_saving_rank == 0
    assert (pivoted.index_bytes(2), pivoted.index_bytes(None), factors.index_bytes(2)) == (24, 0, 0)


# Budget


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of parameter_reduction and tolerance"),
        ({"parameter_reduction": 0.2, "tolerance": 0.1}, "exactly one of parameter_reduction and tolerance"),
        ({"parameter_reduction": 1.0}, r"parameter_reduction=1.0 is outside \[0, 1\): .*0.2 for 20 %"),
        ({"parameter_reduction": -0.1}, r"parameter_reduction=-0.1 is outside \[0, 1\)"),
        ({"parameter_reduction": 20}, r"parameter_reduction=20 is outside \[0, 1\)"),
        ({"parameter_reduction": float("nan")}, r"parameter_reduction=nan is outside \[0, 1\)"),
        ({"tolerance": 1.01}, r"tolerance=1.01 is outside \[0, 1\]: it is the relative error allowed in each layer"),
        ({"tolerance": -1e-9}, r"tolerance=-1e-09 is outside \[0, 1\]"),
        ({"tolerance": float("nan")}, r"tolerance=nan is outside \[0, 1\]"),
        ({"parameter_reduction": "0.2"}, "a budget is a number, not '0.2'"),
        ({"tolerance": True}, "a budget is a number, not True"),
    ],
)
def test_a_budget_is_one_number_in_its_range(fields, message):
    with pytest.raises(ConfigError, match=message):
        Budget(**fields)


@pytest.mark.parametrize("fields", [{"parameter_reduction": 0}, {"tolerance": 0.0}, {"tolerance": 1}])
def test_the_ends_of_a_budget_are_in_its_range(fields):
    assert vars(Budget(**fields)) == {"parameter_reduction": None, "tolerance": None} | fields


def test_a_config_error_can_be_caught_as_a_value_error():
    with pytest.raises(ValueError, match="exactly one"):
        Budget()
    assert issubclass(ConfigError, PGSVDError)


# SVDProfile


@each_case
def test_a_profile_is_the_error_of_the_truncated_svd(case):
    profile = profile_of(case.weight)
    for rank in range(case.full_rank + 1):
        assert profile.relative_error(rank) == pytest.approx(
            reference.truncation_error(case.weight, rank), rel=0, abs=PROFILE
        )
    assert profile.relative_error(None) == 0.0
    assert profile.relative_error(case.full_rank) == 0.0


@each_case
def test_rank_for_is_the_smallest_rank_within_a_tolerance(case):
    """Tolerances halfway between two breakpoints, where rounding cannot tip the answer, and the two ends."""
    profile = profile_of(case.weight)
    errors = [reference.truncation_error(case.weight, rank) for rank in range(case.full_rank + 1)]
    halfway = [(a + b) / 2 for a, b in itertools.pairwise(errors) if a - b > 4 * PROFILE]
    for tolerance in [*halfway, 1.0]:
        assert profile.rank_for(tolerance) == reference.smallest_rank(case.weight, tolerance)


@many
@given(st.integers(0, 10_000), st.integers(1, 12), st.floats(0, 1))
def test_rank_for_is_within_the_tolerance_and_one_rank_less_is_not(seed, k, tolerance):
    profile = SVDProfile(LinearShape(k, k), gaussian(k, seed=seed).abs().sort(descending=True)[0])
    rank = profile.rank_for(tolerance)
    assert profile.relative_error(rank) <= tolerance
    assert rank == 0 or profile.relative_error(rank - 1) > tolerance


def test_a_profile_has_nothing_to_do_with_scale_or_rotation():
    weight = gaussian(12, 20, seed=1)
    rotation = torch.linalg.qr(gaussian(20, 20, seed=2))[0]
    errors = profile_of(weight).errors
    torch.testing.assert_close(profile_of(1e-3 * weight @ rotation).errors, errors, rtol=0, atol=PROFILE)
    stretched = profile_of(weight * torch.logspace(0, -1, 20, dtype=torch.float64)).errors
    assert float((stretched - errors).abs().max()) > 0.05


def test_a_zero_weight_is_within_every_tolerance_at_rank_zero():
    profile = profile_of(torch.zeros(4, 6))
    assert profile.rank_for(0.0) == 0
    assert profile.errors.tolist() == [0.0] * 5


# LowRankFactors


def test_factors_must_share_their_rank():
    with pytest.raises(ValueError, match=r"left \(4, 2\) and right \(3, 5\) share no rank"):
        LowRankFactors(torch.zeros(4, 2), torch.zeros(3, 5))


def test_coefficients_must_fit_basis_and_order():
    with pytest.raises(ValueError, match=r"6 rows of rank 2 need coefficients \(4, 2\), not \(3, 2\)"):
        PivotedFactors(torch.zeros(2, 5), torch.zeros(3, 2), torch.arange(6))


def test_pivoted_factors_are_rows_of_the_identity_and_coefficients_times_the_basis():
    basis, coefficients = gaussian(2, 5, seed=5), gaussian(3, 2, seed=6)
    factors = PivotedFactors(basis, coefficients, torch.tensor([3, 0, 4, 1, 2], dtype=torch.int32))
    assert factors.rank == 2
    expected = reference.row_by_row(factors.basis, factors.coefficients, factors.order)
    torch.testing.assert_close(factors.left @ factors.right, expected, rtol=0, atol=1e-15)
    again = PivotedFactors.of_tensors(factors.tensors)
    assert all(torch.equal(again.tensors[key], value) for key, value in factors.tensors.items())
    whole = PivotedFactors(basis, coefficients[:0], torch.tensor([1, 0], dtype=torch.int32))
    assert whole.tensors.keys() == {"basis.weight", "order"}
    assert PivotedFactors.of_tensors(whole.tensors).coefficients.shape == (0, 2)


def test_factors_are_rounded_once_and_contiguous():
    left, right = gaussian(2, 4, seed=3).T, gaussian(5, 2, seed=4).T
    assert not left.is_contiguous()
    factors = LowRankFactors(left, right).to(torch.bfloat16)
    assert factors.rank == 2
    assert torch.equal(factors.left, left.bfloat16())
    assert torch.equal(factors.right, right.bfloat16())
    assert factors.left.is_contiguous()
    assert factors.right.is_contiguous()


# RankPlan


def plan(**ranks: int | None) -> RankPlan:
    """A plan over 6 × 4 layers."""
    return RankPlan({name: LayerPlan(LinearShape(6, 4), rank) for name, rank in ranks.items()})


@pytest.mark.parametrize("rank", [0, -1, 5])
def test_a_plan_refuses_a_rank_that_its_layer_cannot_have(rank):
    with pytest.raises(ConfigError, match=rf"rank {rank} of q is outside 1 … 4, the full rank of its 6 × 4 weight"):
        plan(k=1, q=rank)


def test_a_plan_counts_factored_and_dense_layers():
    mixed = plan(q=1, k=None, v=2)
    assert mixed.ranks == {"q": 1, "v": 2}
    assert mixed.dense_parameters == 72
    assert mixed.kept_parameters == 10 + 24 + 20
    assert mixed.parameter_reduction == pytest.approx(1 - 54 / 72)
    # A rank that saves nothing is a user's right, and counted as what it costs.
    assert plan(q=4).parameter_reduction == pytest.approx(1 - 40 / 24)


def test_an_empty_plan_removes_nothing():
    assert RankPlan().parameter_reduction == 0.0
    assert RankPlan().ranks == {}


def test_plans_merge_in_the_order_of_the_model():
    merged = RankPlan.merge([plan(b=1, d=None), plan(a=2, c=3)], order=["a", "b", "c", "d"])
    assert list(merged.layers) == ["a", "b", "c", "d"]
    assert merged.ranks == {"a": 2, "b": 1, "c": 3}
    with pytest.raises(AssertionError, match="without a place in the order"):
        RankPlan.merge([plan(a=1, b=2)], order=["a"])


def test_profiles_are_checked_when_built_and_when_asked():
    for values in ([3.0, 2.0], [1.0, 2.0, 1.0, 1.0]):
        with pytest.raises(ValueError, match="4 singular values, largest first"):
            SVDProfile(LinearShape(4, 4), torch.tensor(values))
    profile = profile_of(torch.eye(4))
    for ask in (lambda: profile.rank_for(-0.1), lambda: profile.relative_error(-1), lambda: profile.relative_error(5)):
        with pytest.raises(ValueError, match=r"negative|outside 0 … 4"):
            ask()


def test_nouns_are_frozen():
    layer = LayerPlan(LinearShape(6, 4), 2)
    nouns = {
        "rank": layer,
        "in_features": layer.shape,
        "layers": plan(q=1),
        "tolerance": Budget(tolerance=0.1),
        "values": profile_of(torch.eye(2)),
        "left": LowRankFactors(torch.zeros(1, 1), torch.zeros(1, 1)),
    }
    for field, noun in nouns.items():
        with pytest.raises(FrozenInstanceError):
            setattr(noun, field, None)
