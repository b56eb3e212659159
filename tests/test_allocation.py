"""Laws of the allocations, against enumeration on a few tiny layers."""

import math
import random

import pytest
import reference
import torch
from cases import gaussian, orthonormal
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from optimum_pgsvd.allocation import ALLOCATIONS, least_surrogate
from optimum_pgsvd.allocation.asvd import SHARES
from optimum_pgsvd.allocation.ladder import Ladder, climb, parameter_budget
from optimum_pgsvd.allocation.loss import charges, hull_slopes
from optimum_pgsvd.allocation.svd_llm_v2 import kind_of
from optimum_pgsvd.errors import ConfigError
from optimum_pgsvd.linalg import singular_values
from optimum_pgsvd.structures import Budget, LinearShape, RankPlan, SVDProfile


many = settings(max_examples=150, deadline=None, derandomize=True)

sizes = st.tuples(st.integers(1, 12), st.integers(1, 12))
shapes_of_layers = st.lists(sizes, min_size=1, max_size=3).map(
    lambda found: {f"layer{i}": shape for i, shape in enumerate(found)}
)
# Written in decimals, as users do, so that the oracle can do exact arithmetic on it.
reductions = st.integers(0, 99).map(lambda percent: f"{percent / 100:.2f}")
multiples = st.integers(1, 3)
seeds = st.integers(0, 10_000)

each_allocation = pytest.mark.parametrize("allocation", ALLOCATIONS.names())


def spectrum(shape: tuple[int, int], seed: int) -> torch.Tensor:
    """Singular values without ties, falling at a rate of their own."""
    k = min(shape)
    decay = 0.3 + 0.7 * float(torch.rand((), generator=torch.Generator().manual_seed(seed)))
    values = (1 + gaussian(k, seed=seed).abs()) * decay ** torch.arange(k, dtype=torch.float64)
    return values.sort(descending=True)[0]


def storage_of(seed: int) -> str:
    return ("factors", "pivoted")[seed % 2]


def profiles_of(shapes: dict[str, tuple[int, int]], seed: int) -> dict[str, SVDProfile]:
    return {
        name: SVDProfile(LinearShape(*shape, storage_of(seed)), spectrum(shape, seed + i))
        for i, (name, shape) in enumerate(shapes.items())
    }


def options_of(profiles: dict[str, SVDProfile], rank_multiple: int) -> dict[str, list[reference.Option]]:
    return {
        name: reference.layer_options(
            p.shape.out_features, p.shape.in_features, p.errors.tolist(), rank_multiple, p.shape.storage
        )
        for name, p in profiles.items()
    }


def allocate(allocation: str, profiles: dict[str, SVDProfile], budget: Budget, rank_multiple: int = 1) -> RankPlan:
    shapes = {name: profile.shape for name, profile in profiles.items()}
    known = profiles
    if ALLOCATIONS.trait(allocation, "profile") == "losses":  # as if the loss were the error of the layer
        known = {name: dict(enumerate(profile.errors.tolist())) for name, profile in profiles.items()}
    return ALLOCATIONS[allocation](shapes, known, budget, rank_multiple)


def try_reduction(
    allocation: str, profiles: dict[str, SVDProfile], reduction: str, rank_multiple: int = 1
) -> RankPlan | None:
    """The plan, or `None` where the allocation says that the budget cannot be met."""
    try:
        return allocate(allocation, profiles, Budget(parameter_reduction=float(reduction)), rank_multiple)
    except ConfigError:
        return None


def choice(plan: RankPlan, options: dict[str, list[reference.Option]]) -> reference.Choice:
    """A plan in the words of the oracle; fails on a rank that is none of the layer's options."""
    return {
        name: next(option for option in options[name] if option.rank == layer.rank)
        for name, layer in plan.layers.items()
    }


def next_up(chosen: reference.Option, options: list[reference.Option]) -> reference.Option | None:
    return next((option for option in options if option.parameters > chosen.parameters), None)


# Ladders and budgets


@many
@given(sizes, multiples, st.sampled_from(["factors", "pivoted"]))
def test_a_ladder_holds_every_saving_multiple_and_dense(shape, rank_multiple, storage):
    ladder = Ladder.of(LinearShape(*shape, storage), rank_multiple)
    assert list(ladder.ranks) == [*reference.saving_ranks(*shape, rank_multiple, storage), None]


@many
@given(st.integers(1, 200), st.integers(1, 200), reductions)
def test_the_budget_is_exact(m, n, reduction):
    """In floating point (1 − 0.9) × 10 is 0.9999999999999998, which must still buy one parameter."""
    expected = reference.budget({"only": (m, n)}, reduction)
    assert parameter_budget({"only": LinearShape(m, n)}, float(reduction)) == expected


def test_a_climb_stops_at_the_first_step_over_budget_and_takes_ties_in_layer_order():
    """Three 4 × 4 layers, ranks 1 (8 parameters) and dense (16); 36 of 48 parameters buy one step."""
    ladders = {name: Ladder.of(LinearShape(4, 4), 1) for name in "abc"}
    assert climb(ladders, lambda name, j: 0.5, 0.25) == ({"a": None, "b": 1, "c": 1}, 0.5)
    assert climb(ladders, lambda name, j: {"a": 0.1, "b": 0.2, "c": 0.3}[name], 0.25) == (
        {"a": 1, "b": 1, "c": None},
        0.2,
    )
    assert climb(ladders, lambda name, j: 0.0, 0.0) == ({"a": 1, "b": 1, "c": 1}, 0.0)
    assert climb(ladders, lambda name, j: 0.5, 0.0) == ({"a": None, "b": None, "c": None}, 0.0)


# Every allocation


@many
@given(shapes_of_layers, seeds, reductions, multiples, st.sampled_from(ALLOCATIONS.names()))
def test_a_plan_is_within_its_budget_and_holds_legal_ranks_of_all_layers_in_order(
    shapes, seed, reduction, rank_multiple, allocation
):
    profiles = profiles_of(shapes, seed)
    options = options_of(profiles, rank_multiple)
    smallest = sum(layer[0].parameters for layer in options.values())
    plan = try_reduction(allocation, profiles, reduction, rank_multiple)
    assert (plan is None) == (smallest > reference.budget(shapes, reduction))
    if plan is not None:
        assert list(plan.layers) == list(shapes)
        assert plan.kept_parameters == reference.kept(choice(plan, options))
        assert plan.kept_parameters <= reference.budget(shapes, reduction)


@many
@given(shapes_of_layers, seeds, st.lists(reductions, min_size=2, max_size=2), multiples)
@each_allocation
def test_a_larger_budget_lowers_no_rank(allocation, shapes, seed, two_reductions, rank_multiple):
    profiles = profiles_of(shapes, seed)
    options = options_of(profiles, rank_multiple)
    light, heavy = (try_reduction(allocation, profiles, r, rank_multiple) for r in sorted(two_reductions))
    if heavy is not None:
        assert light is not None
        for name, option in choice(heavy, options).items():
            assert choice(light, options)[name].parameters >= option.parameters


@each_allocation
def test_a_budget_that_cannot_be_met_is_refused_with_what_can(allocation):
    profiles = profiles_of({"q": (8, 8), "k": (2, 6)}, seed=0)
    message = (
        r"parameter_reduction=0.9 cannot be met: the smallest ranks of these 2 layers keep 24 of 76 parameters, "
        r"a reduction of 0.6842; lower it, or lower rank_multiple"
    )
    with pytest.raises(ConfigError, match=message):
        allocate(allocation, profiles, Budget(parameter_reduction=0.9))
    assert allocate(allocation, profiles, Budget(parameter_reduction=0.68)).ranks == {"q": 1, "k": 1}


@each_allocation
def test_a_layer_that_factors_would_not_shrink_stays_dense(allocation):
    """2 × 2 has no saving rank, 5 × 5 none that is a multiple of 3; the other layer makes up for them."""
    profiles = profiles_of({"tiny": (2, 2), "small": (5, 5), "large": (12, 12)}, seed=0)
    plan = allocate(allocation, profiles, Budget(parameter_reduction=0.4), rank_multiple=3)
    assert plan.ranks == {"large": 3}
    assert plan.kept_parameters == 4 + 25 + 72


@each_allocation
def test_no_reduction_leaves_every_layer_dense(allocation):
    plan = allocate(allocation, profiles_of({"q": (8, 8), "k": (4, 6)}, seed=0), Budget(parameter_reduction=0.0))
    assert plan.ranks == {}
    assert plan.parameter_reduction == 0.0


# PGSVD: one tolerance


@many
@given(shapes_of_layers, seeds, reductions, multiples)
def test_pareto_is_the_largest_plan_of_one_tolerance(shapes, seed, reduction, rank_multiple):
    profiles = profiles_of(shapes, seed)
    options = options_of(profiles, rank_multiple)
    plan = try_reduction("pareto", profiles, reduction, rank_multiple)
    expected = reference.one_tolerance_for_all(options, reference.budget(shapes, reduction))
    assert (plan and choice(plan, options)) == expected


@many
@given(shapes_of_layers, seeds, reductions, multiples)
def test_pareto_has_the_least_worst_error_of_all_combinations(shapes, seed, reduction, rank_multiple):
    profiles = profiles_of(shapes, seed)
    options = options_of(profiles, rank_multiple)
    plan = try_reduction("pareto", profiles, reduction, rank_multiple)
    assume(plan is not None)
    worst = max(layer.relative_error for layer in plan.layers.values())
    assert worst == reference.least_worst_error(options, reference.budget(shapes, reduction))
    assert plan.kept_parameters <= reference.budget(shapes, reduction)


@many
@given(shapes_of_layers, seeds, reductions, multiples)
def test_the_first_step_that_pareto_does_not_take_would_exceed_the_budget(shapes, seed, reduction, rank_multiple):
    profiles = profiles_of(shapes, seed)
    options = options_of(profiles, rank_multiple)
    plan = try_reduction("pareto", profiles, reduction, rank_multiple)
    assume(plan is not None)
    chosen = choice(plan, options)
    worst = max(chosen, key=lambda name: chosen[name].error)
    step = next_up(chosen[worst], options[worst])
    if step is None:
        assert plan.ranks == {}
    else:
        assert reference.kept(chosen | {worst: step}) > reference.budget(shapes, reduction)
    for name, layer in plan.layers.items():
        assert layer.tolerance == chosen[worst].error
        assert layer.relative_error == chosen[name].error


@many
@given(shapes_of_layers, seeds, st.floats(0, 1), multiples)
def test_a_tolerance_holds_in_every_layer_and_one_step_less_violates_it(shapes, seed, tolerance, rank_multiple):
    profiles = profiles_of(shapes, seed)
    options = options_of(profiles, rank_multiple)
    plan = allocate("pareto", profiles, Budget(tolerance=tolerance), rank_multiple)
    assert choice(plan, options) == reference.at_tolerance(options, tolerance)
    for name, layer in plan.layers.items():
        assert layer.tolerance == tolerance
        assert layer.relative_error <= tolerance
        below = [o for o in options[name] if o.parameters < layer.parameters]
        assert not below or below[-1].error > tolerance


@many
@given(shapes_of_layers, seeds, reductions)
def test_the_tolerance_that_met_a_budget_gives_the_same_plan_back(shapes, seed, reduction):
    profiles = profiles_of(shapes, seed)
    plan = try_reduction("pareto", profiles, reduction)
    assume(plan is not None)
    reached = max(layer.tolerance for layer in plan.layers.values())
    assert allocate("pareto", profiles, Budget(tolerance=reached)).ranks == plan.ranks


def test_a_planned_error_is_that_of_the_truncated_weight():
    """From real weights: each within the tolerance, and one rank less not, up to the 1e-8 noise of the profile."""
    weights = {"q": gaussian(20, 20, seed=1), "up": gaussian(30, 12, seed=2), "down": gaussian(12, 30, seed=3)}
    profiles = {name: SVDProfile(LinearShape(*w.shape), singular_values(w)) for name, w in weights.items()}
    plan = allocate("pareto", profiles, Budget(tolerance=0.6))
    for name, rank in plan.ranks.items():
        assert reference.truncation_error(weights[name], rank) <= 0.6 + 3e-8
        assert reference.truncation_error(weights[name], rank - 1) > 0.6 - 3e-8
    assert len(plan.ranks) == 3


def test_the_plan_depends_on_nothing_but_relative_spectra():
    """Scale and rotations, which is all that inputs could do to a plan, change nothing; another spectrum does."""
    weights = {"q": gaussian(12, 12, seed=4), "v": gaussian(12, 12, seed=5) * torch.logspace(0, -1.5, 12)}
    turned = {
        "q": 100.0 * weights["q"] @ orthonormal(12, 12, seed=6),
        "v": 0.01 * orthonormal(12, 12, seed=7) @ weights["v"],
    }
    plain, moved, swapped = (
        allocate(
            "pareto",
            {name: SVDProfile(LinearShape(12, 12), singular_values(w)) for name, w in found.items()},
            Budget(parameter_reduction=0.4),
        ).ranks
        for found in (weights, turned, {"q": weights["v"], "v": weights["q"]})
    )
    assert plain == moved
    assert swapped == {"q": plain["v"], "v": plain["q"]} != plain


def twelves(**ratios: float) -> dict[str, SVDProfile]:
    """12 × 12 layers with geometric spectra."""
    values = {name: ratio ** torch.arange(12, dtype=torch.float64) for name, ratio in ratios.items()}
    return {name: SVDProfile(LinearShape(12, 12), found) for name, found in values.items()}


def test_pareto_has_a_smaller_worst_error_than_uniform_where_spectra_differ():
    profiles = twelves(flat=0.95, steep=0.4)
    options = options_of(profiles, 1)
    pareto, uniform = (
        max(o.error for o in choice(allocate(name, profiles, Budget(parameter_reduction=0.4)), options).values())
        for name in ("pareto", "uniform")
    )
    assert uniform > 1.8 * pareto


def surrogate(profiles: dict[str, SVDProfile], percent: int) -> tuple[float, float]:
    """Σ e_l of PGSVD's plan, and the least of all combinations."""
    options = options_of(profiles, 1)
    plan = allocate("pareto", profiles, Budget(parameter_reduction=percent / 100))
    limit = reference.budget(dict.fromkeys(profiles, (12, 12)), f"0.{percent:02d}")
    total = math.fsum(option.error for option in choice(plan, options).values())
    return total, reference.least_total_error(options, limit)


@pytest.mark.parametrize("percent", range(0, 80, 4))
def test_one_tolerance_is_optimal_for_the_surrogate_of_theorem_2(percent):
    """Equal convex profiles."""
    total, least = surrogate(twelves(q=0.4, k=0.4, v=0.4), percent)
    assert total == pytest.approx(least, rel=1e-12, abs=0)


def test_one_tolerance_is_not_optimal_outside_theorem_2():
    """The control: spectra so flat that the step to dense breaks the convexity; some layers dense would be better."""
    total, least = surrogate(twelves(q=0.8, k=0.8, v=0.8), 20)
    assert total > 1.3 * least


# The baseline: one fraction


@many
@given(shapes_of_layers, seeds, reductions, multiples)
def test_uniform_is_the_largest_plan_of_one_fraction(shapes, seed, reduction, rank_multiple):
    """Among layers no two of which tie; those of equal fractions are stepped in order and tested below."""
    fractions = [m * n / (m + n) for m, n in shapes.values()]
    assume(len(set(fractions)) == len(fractions))
    profiles = profiles_of(shapes, seed)
    options = options_of(profiles, rank_multiple)
    steps = [o.parameters / layer[-1].parameters for layer in options.values() for o in layer[1:]]
    assume(len({round(step, 12) for step in steps}) == len(steps) or len(shapes) == 1)
    plan = try_reduction("uniform", profiles, reduction, rank_multiple)
    limit = reference.budget(shapes, reduction)
    expected = reference.one_fraction_for_all(shapes, rank_multiple, limit, storage_of(seed))
    assert (plan and plan.ranks) == (expected and {n: o.rank for n, o in expected.items() if o.rank is not None})


@many
@given(shapes_of_layers, seeds, reductions, multiples)
def test_uniform_keeps_fractions_equal_within_one_rank_step(shapes, seed, reduction, rank_multiple):
    profiles = profiles_of(shapes, seed)
    options = options_of(profiles, rank_multiple)
    plan = try_reduction("uniform", profiles, reduction, rank_multiple)
    assume(plan is not None)
    chosen = choice(plan, options)
    for name, option in chosen.items():
        step = next_up(option, options[name])
        for other, reached in chosen.items():
            climbed = reached is not options[other][0]
            if step is not None and climbed:
                fraction = reached.parameters / options[other][-1].parameters
                assert fraction <= step.parameters / options[name][-1].parameters + 1e-12


def test_uniform_ignores_profiles_and_takes_no_tolerance():
    shapes = {"q": LinearShape(8, 8), "k": LinearShape(4, 8)}
    assert ALLOCATIONS["uniform"](shapes, {}, Budget(parameter_reduction=0.5), 1).ranks == {"q": 2, "k": 1}
    with pytest.raises(ConfigError, match="takes parameter_reduction, not tolerance; use allocation='pareto'"):
        ALLOCATIONS["uniform"](shapes, {}, Budget(tolerance=0.1), 1)


# By what it costs the loss


def loss_options(profiles: dict[str, SVDProfile], rank_multiple: int) -> dict[str, list[reference.Option]]:
    """With what is charged for an option in the place of its error."""
    return {
        name: reference.charged_options(
            p.shape.out_features, p.shape.in_features, p.values.tolist(), rank_multiple, p.shape.storage
        )
        for name, p in profiles.items()
    }


def price_of(options: dict[str, list[reference.Option]], chosen: reference.Choice) -> float | None:
    """A price of a parameter at which all layers but at most one have their best option, if there is one."""
    return next(
        (
            price
            for price in reference.prices(options)
            if sum(not reference.is_best_at(price, chosen[name], layer) for name, layer in options.items()) <= 1
        ),
        None,
    )


@many
@given(shapes_of_layers, seeds, reductions, multiples)
def test_loss_is_the_optimum_of_its_lagrangian_but_for_one_layer(shapes, seed, reduction, rank_multiple):
    profiles = profiles_of(shapes, seed)
    plan = try_reduction("loss", profiles, reduction, rank_multiple)
    assume(plan is not None)
    options = loss_options(profiles, rank_multiple)
    assert price_of(options, choice(plan, options)) is not None


@many
@given(shapes_of_layers, seeds, reductions, multiples)
def test_loss_is_brute_force_but_for_one_step_of_one_layer(shapes, seed, reduction, rank_multiple):
    """The gap to the best of all combinations is no more than one layer's step along its convex hull would save."""
    profiles = profiles_of(shapes, seed)
    plan = try_reduction("loss", profiles, reduction, rank_multiple)
    options = loss_options(profiles, rank_multiple)
    limit = reference.budget(shapes, reduction)
    least = reference.least_total_error(options, limit)
    assert (plan is None) == (least is None)
    assume(plan is not None)
    chosen = choice(plan, options)
    assert reference.kept(chosen) <= limit
    total = math.fsum(option.error for option in chosen.values())
    gap = max(reference.saving_of_next_vertex(chosen[name], layer) for name, layer in options.items())
    assert least - 1e-9 * (1 + least) <= total <= least + gap + 1e-9 * (1 + least)


def test_loss_keeps_layers_dense_that_are_worth_it():
    """One that counts for a thousand others is not touched; one that counts for nothing takes its smallest rank."""
    profiles = {
        name: SVDProfile(LinearShape(8, 8), scale * torch.ones(8, dtype=torch.float64))
        for name, scale in (("heavy", 30.0), ("light", 1.0), ("nothing", 0.0))
    }
    plan = allocate("loss", profiles, Budget(parameter_reduction=0.4))
    assert {name: layer.rank for name, layer in plan.layers.items()} == {"heavy": None, "light": 2, "nothing": 1}


def test_scales_of_layers_matter_and_of_all_together_do_not():
    """What the paper's profile is blind to."""
    values = spectrum((12, 12), 0)
    shape = LinearShape(12, 12)

    def ranks(*scales: float) -> list[int | None]:
        profiles = {f"layer{i}": SVDProfile(shape, scale * values) for i, scale in enumerate(scales)}
        return [layer.rank for layer in allocate("loss", profiles, Budget(parameter_reduction=0.5)).layers.values()]

    assert ranks(1, 1, 1) == ranks(100, 100, 100)
    first, second, third = (rank or 12 for rank in ranks(10, 1, 0.1))
    assert first > second > third


def test_loss_beats_one_tolerance_for_all_where_layers_differ_in_weight():
    """The control, in what is charged."""
    shape = LinearShape(24, 24)
    profiles = {f"layer{i}": SVDProfile(shape, 4.0**-i * spectrum((24, 24), i)) for i in range(3)}
    options = loss_options(profiles, 1)
    totals = {
        name: sum(o.error for o in choice(allocate(name, profiles, Budget(0.5)), options).values())
        for name in ("loss", "pareto", "uniform")
    }
    assert totals["loss"] < 0.5 * totals["pareto"]
    assert totals["loss"] < 0.5 * totals["uniform"]


def test_pivoted_storage_buys_higher_ranks_for_the_same_budget():
    values = spectrum((16, 16), 3)
    plans = {
        storage: allocate(
            "loss",
            {n: SVDProfile(LinearShape(16, 16, storage), values) for n in "ab"},
            Budget(parameter_reduction=0.4),
        )
        for storage in ("factors", "pivoted")
    }
    assert all(plan.parameter_reduction >= 0.4 for plan in plans.values())
    costs = {"factors": lambda r: 32 * r, "pivoted": lambda r: r * (32 - r)}
    for storage, plan in plans.items():
        assert plan.kept_parameters == sum(costs[storage](rank) for rank in plan.ranks.values())
        # Two equal layers share a budget of 307: the first has one rank more where it fits.
        first, second = plan.ranks.values()
        assert second <= first <= second + 1
        assert plan.kept_parameters + costs[storage](second + 1) - costs[storage](second) > 307
    assert (list(plans["factors"].ranks.values()), list(plans["pivoted"].ranks.values())) == ([5, 4], [6, 5])


def test_a_spectrum_that_is_cut_to_nothing_is_charged_without_bound_but_not_infinitely():
    shape = LinearShape(4, 4)
    values = torch.tensor([1.0, 1e-9, 1e-9, 1e-9], dtype=torch.float64)
    small = charges(Ladder.of(shape, 1), SVDProfile(shape, values))
    assert small[0] == [8, 16]
    assert small[1] == pytest.approx([3e-18, 0.0], abs=1e-15)
    flat = SVDProfile(LinearShape(100, 100), torch.ones(100, dtype=torch.float64))
    costs, losses = charges(Ladder.of(flat.shape, 1), flat)
    assert losses[0] == pytest.approx(100 * math.log(100))
    assert losses == sorted(losses, reverse=True)
    assert costs[-1] == 10000
    assert losses[-1] == 0


def test_slopes_of_a_hull():
    """A rung above the line between its neighbours is passed over; slopes never rise."""
    assert hull_slopes([1, 2, 3, 5], [10.0, 9.0, 2.0, 0.0]) == [4.0, 4.0, 1.0]
    assert hull_slopes([1, 2, 4], [4.0, 2.0, 0.0]) == [2.0, 1.0]
    assert hull_slopes([7], [3.0]) == []


def test_loss_takes_no_tolerance():
    profiles = profiles_of({"a": (4, 4)}, 0)
    with pytest.raises(ConfigError, match="allocation='loss' takes parameter_reduction, not tolerance; use alloc"):
        allocate("loss", profiles, Budget(tolerance=0.1))


# SVD-LLM V2: by type, those that lose more are compressed less


SIZES = {"q": (40, 40), "k": (20, 40), "up": (60, 40)}


def by_type(seed: int, scale: float = 1.0) -> dict[str, SVDProfile]:
    """Profiles of outputs, in three types of four layers each, of which later ones are larger."""
    profiles = {}
    for i in range(4):
        for j, (kind, shape) in enumerate(SIZES.items()):
            values = 0.2 + torch.rand(min(shape), generator=torch.Generator().manual_seed(seed + 10 * i + j)).double()
            size = scale * 10.0 ** (i / 2)
            profiles[f"blocks.{i}.{kind}"] = SVDProfile(LinearShape(*shape), size * values.sort(descending=True)[0])
    return profiles


def lost_at(profile: SVDProfile, reduction: float) -> float:
    """What is left out at the largest rank that removes a fraction."""
    m, n = profile.shape.out_features, profile.shape.in_features
    return reference.norm(profile.values[int((1 - reduction) * m * n / (m + n) + 1e-9) :][None])


@many
@given(seeds, st.sampled_from([0.2, 0.4, 0.6]), st.sampled_from([30.0, 1000.0, 0.01]))
def test_svd_llm_v2_removes_what_its_paper_says(seed, reduction, scale):
    """Of every layer, t times its share, or as much of it as can be, within one rank; one t for all."""
    profiles = by_type(seed, scale)
    shapes = {name: (p.shape.out_features, p.shape.in_features) for name, p in profiles.items()}
    plan = allocate("svd_llm_v2", profiles, Budget(parameter_reduction=reduction))
    losses = {name: lost_at(profile, reduction) for name, profile in profiles.items()}
    shares = reference.shares_of_types(shapes, losses, reduction)
    low, high = 0.0, math.inf
    for name, layer in plan.layers.items():
        options = options_of({name: profiles[name]}, 1)[name]
        chosen = next(option for option in options if option.rank == layer.rank)
        above = next_up(chosen, options)
        removed = 1 - chosen.parameters / options[-1].parameters
        if chosen is not options[0] and layer.rank is not None:  # it left the rung below at a larger t
            high = min(high, removed / shares[name])
        if above is not None:  # it would leave this one at a smaller t
            low = max(low, (1 - above.parameters / options[-1].parameters) / shares[name])
    assert low <= high * (1 + 1e-9)
    if all(share <= 0.9 for share in shares.values()):  # else the others make up for what cannot be removed
        step = max((m + n) / (m * n) for m, n in shapes.values())
        assert (low - 1) * reduction <= step
        assert (1 - high) * reduction <= step


def test_svd_llm_v2_compresses_those_less_that_lose_more_of_each_type_as_much():
    profiles = by_type(0, 100.0)
    plan = allocate("svd_llm_v2", profiles, Budget(parameter_reduction=0.4))
    for kind, (m, n) in SIZES.items():
        ranks = [plan.layers[f"blocks.{i}.{kind}"].rank for i in range(4)]
        assert ranks == sorted(ranks)
        assert ranks[0] < ranks[-1]
        kept = sum(plan.layers[f"blocks.{i}.{kind}"].parameters for i in range(4))
        assert kept / (4 * m * n) == pytest.approx(0.6, abs=0.03)


def test_svd_llm_v2_is_uniform_where_all_lose_the_same():
    profiles = {
        f"blocks.{i}.{kind}": SVDProfile(LinearShape(*shape), spectrum(shape, 3))
        for i in range(3)
        for kind, shape in SIZES.items()
    }
    budget = Budget(parameter_reduction=0.3)
    assert allocate("svd_llm_v2", profiles, budget).ranks == allocate("uniform", profiles, budget).ranks


def test_svd_llm_v2_takes_a_layer_that_loses_nothing_down_to_its_smallest_rank():
    nothing = torch.zeros(12, dtype=torch.float64)
    profiles = {
        f"blocks.{i}.q": SVDProfile(LinearShape(12, 12), nothing if i == 0 else 10 * spectrum((12, 12), i))
        for i in range(3)
    }
    plan = allocate("svd_llm_v2", profiles, Budget(parameter_reduction=0.5))
    assert plan.layers["blocks.0.q"].rank == 1
    assert min(plan.layers[f"blocks.{i}.q"].rank for i in (1, 2)) > 3


def test_types_of_layers():
    assert kind_of("model.layers.10.self_attn.q_proj") == kind_of("model.layers.3.self_attn.q_proj")
    assert kind_of("layers.0.experts.1.w1") == kind_of("layers.4.experts.7.w1") == "layers.*.experts.*.w1"
    assert kind_of("encoder.0.fc1") != kind_of("decoder.0.fc1") != kind_of("encoder.0.fc2")


def test_svd_llm_v2_takes_no_tolerance():
    with pytest.raises(
        ConfigError, match="allocation='svd_llm_v2' takes parameter_reduction, not tolerance; use allo"
    ):
        allocate("svd_llm_v2", by_type(0), Budget(tolerance=0.1))


# ASVD

# Large enough that the shares of a layer are ranks of their own.
wide = st.tuples(st.integers(1, 60), st.integers(1, 60))
layers_of_asvd = st.lists(wide, min_size=1, max_size=5).map(
    lambda found: {f"layer{i}": shape for i, shape in enumerate(found)}
)


def tried(
    shapes: dict[str, tuple[int, int]], seed: int, rank_multiple: int, values: int | None = None
) -> dict[str, list[reference.Option]]:
    """Losses that need not fall with the rank, of either sign; with few `values`, many of them the same."""
    source, storage = random.Random(seed), storage_of(seed)
    options = {}
    for name, (m, n) in shapes.items():
        ranks = reference.ranks_at_shares(m, n, rank_multiple, storage)
        found = [source.uniform(-1, 3) if values is None else float(source.randrange(values)) for _ in ranks]
        factored = [
            reference.Option(rank, reference.stored_parameters(m, n, rank, storage), loss)
            for rank, loss in zip(ranks, found, strict=True)
        ]
        options[name] = [*factored, reference.Option(None, m * n, -math.inf)]
    return options


def by_losses(
    shapes: dict[str, tuple[int, int]],
    options: dict[str, list[reference.Option]],
    reduction: str,
    rank_multiple: int,
    storage: str,
) -> reference.Choice | None:
    """The plan in the words of the oracle, `None` where the budget cannot be met."""
    losses = {name: {o.rank: o.error for o in layer if o.rank is not None} for name, layer in options.items()}
    linear = {name: LinearShape(*shape, storage) for name, shape in shapes.items()}
    try:
        return choice(ALLOCATIONS["asvd"](linear, losses, Budget(float(reduction)), rank_multiple), options)
    except ConfigError:
        return None


@many
@given(wide, multiples, st.sampled_from(["factors", "pivoted"]))
def test_a_ladder_of_shares_holds_the_largest_rank_of_each(shape, rank_multiple, storage):
    ladder = Ladder.of(LinearShape(*shape, storage), rank_multiple, SHARES)
    assert list(ladder.ranks) == [*reference.ranks_at_shares(*shape, rank_multiple, storage), None]


@many
@given(layers_of_asvd, seeds, reductions, multiples)
def test_asvd_is_the_least_threshold_that_meets_the_budget(shapes, seed, reduction, rank_multiple):
    options = tried(shapes, seed, rank_multiple)
    expected = reference.one_loss_for_all(options, reference.budget(shapes, reduction))
    assert by_losses(shapes, options, reduction, rank_multiple, storage_of(seed)) == expected


@many
@given(layers_of_asvd, seeds, st.lists(reductions, min_size=2, max_size=2), multiples, st.sampled_from([None, 3]))
def test_asvd_is_monotone_in_the_budget_and_within_one_step_of_it(shapes, seed, two, rank_multiple, values):
    """Among equal losses too, which a budget may take some only of, first layers first."""
    options = tried(shapes, seed, rank_multiple, values)
    light, heavy = (by_losses(shapes, options, r, rank_multiple, storage_of(seed)) for r in sorted(two))
    assume(light is not None)
    for name, option in (heavy or light).items():
        assert light[name].parameters >= option.parameters
    limit = reference.budget(shapes, sorted(two)[0])
    assert reference.kept(light) <= limit
    threshold = max(option.error for option in light.values())
    if threshold > -math.inf:
        name = next(name for name, option in light.items() if option.error == threshold)
        above = next(option for option in options[name] if option.error < threshold and option is not light[name])
        assert reference.kept(light | {name: above}) > limit
        for other, option in light.items():
            assert all(o.error >= threshold for o in options[other] if o.parameters < option.parameters)


@many
@given(layers_of_asvd, seeds, reductions)
def test_asvd_takes_a_layer_that_costs_nothing_first(shapes, seed, reduction):
    options = tried(shapes, seed, 1)
    first = next(iter(options))
    assume(len(options[first]) > 1)
    options[first][0] = options[first][0]._replace(error=-2.0)
    plan = by_losses(shapes, options, reduction, 1, storage_of(seed))
    assume(plan is not None)
    if any(option.rank is not None for name, option in plan.items() if name != first):
        assert plan[first] == options[first][0]


def test_asvd_passes_over_ranks_that_are_no_better_than_smaller_ones():
    """Two 20 × 20 layers, ranks 1 to 9 and dense; of `a` only the ranks 1, 3 and 7 are worth their parameters."""
    shapes = {name: LinearShape(20, 20) for name in "ab"}
    a = {1: 5.0, 2: 6.0, 3: 4.0, 4: 4.0, 5: 4.5, 6: 9.0, 7: 1.0, 8: 1.0, 9: 2.0}
    losses = {"a": a, "b": {rank: 0.1 * rank for rank in range(9, 0, -1)}}
    found = {ALLOCATIONS["asvd"](shapes, losses, Budget(tenths / 20), 1).ranks.get("a") for tenths in range(19)}
    assert found == {1, 3, 7, None}


def test_asvd_takes_no_tolerance():
    with pytest.raises(ConfigError, match="allocation='asvd' takes parameter_reduction, not tolerance; use allo"):
        allocate("asvd", by_type(0), Budget(tolerance=0.1))


def test_asvd_cannot_go_below_a_tenth_of_a_layer():
    shapes = {"q": LinearShape(40, 40)}
    message = "parameter_reduction=0.95 cannot be met: .* keep 160 of 1600 parameters, a reduction of 0.9000; lower it"
    with pytest.raises(ConfigError, match=message):
        ALLOCATIONS["asvd"](shapes, {"q": dict.fromkeys(range(1, 20), 1.0)}, Budget(0.95), 1)


# Names


def test_an_unknown_allocation_lists_the_known_ones():
    with pytest.raises(ConfigError, match="allocation='greedy' is not known; known are .*pareto.*uniform"):
        ALLOCATIONS["greedy"]
    traits = ("profile", "takes_tolerance", "searches", "shares")
    assert {name: tuple(ALLOCATIONS.trait(name, trait) for trait in traits) for name in ALLOCATIONS.names()} == {
        "asvd": ("losses", False, "ranks", tuple(tenths / 10 for tenths in range(1, 10))),
        "loss": ("loss", False, None, None),
        "pareto": ("weights", True, None, None),
        "pareto_outputs": ("outputs", True, None, None),
        "svd_llm_v2": ("outputs", False, None, None),
        "towers": ("weights", True, "a tolerance for each tower", None),
        "uniform": (None, False, None, None),
    }


# The surrogate with sensitivities of their own


def weighted(options: dict[str, list[reference.Option]], weights: dict[str, float], dense: bool):
    """Options with α e for e, and without dense where a layer has others and none may stay dense."""
    return {
        name: [
            o._replace(error=weights[name] * o.error) for o in layer if dense or o.rank is not None or len(layer) == 1
        ]
        for name, layer in options.items()
    }


@many
@given(shapes_of_layers, seeds, reductions, multiples, st.booleans())
def test_the_least_surrogate_is_brute_force_but_for_one_step_of_one_layer(
    shapes, seed, reduction, rank_multiple, dense
):
    profiles = profiles_of(shapes, seed)
    weights = {name: 10.0 ** ((seed + 7 * i) % 5 - 2) for i, name in enumerate(profiles)}
    options = weighted(options_of(profiles, rank_multiple), weights, dense)
    limit = reference.budget(shapes, reduction)
    least = reference.least_total_error(options, limit)
    plain = {name: profile.shape for name, profile in profiles.items()}
    try:
        plan = least_surrogate(plain, profiles, weights, float(reduction), rank_multiple, dense)
    except ConfigError:
        plan = None
    assert (plan is None) == (least is None)
    assume(plan is not None)
    chosen = choice(plan, options)
    assert reference.kept(chosen) <= limit
    total = math.fsum(option.error for option in chosen.values())
    gap = max(reference.saving_of_next_vertex(chosen[name], layer) for name, layer in options.items())
    assert least - 1e-9 * (1 + least) <= total <= least + gap + 1e-9 * (1 + least)


def test_a_sensitive_layer_gets_more_ranks_and_equal_ones_the_same():
    profiles = {name: SVDProfile(LinearShape(12, 12), spectrum((12, 12), 1)) for name in ("first", "second")}
    shapes = {name: profile.shape for name, profile in profiles.items()}
    equal = least_surrogate(shapes, profiles, {"first": 3.0, "second": 3.0}, 0.5, dense=False)
    assert equal.layers["first"].rank == equal.layers["second"].rank == 3
    unequal = least_surrogate(shapes, profiles, {"first": 1.0, "second": 30.0}, 0.5, dense=False)
    assert unequal.layers["first"].rank < 3 < unequal.layers["second"].rank
