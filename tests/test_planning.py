"""The plan of a whole model: its budget, its groups, and what is refused before anything is touched."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import reference
import torch
from models import FAMILIES, Batch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from optimum_pgsvd import PGSVDCompressor, PGSVDConfig
from optimum_pgsvd.errors import ConfigError, NonFiniteError
from optimum_pgsvd.factoring import Calibration, planning_profiles
from optimum_pgsvd.modeling_pgsvd import LowRankLinear
from optimum_pgsvd.planning import plan_ranks
from optimum_pgsvd.structures import RankPlan
from optimum_pgsvd.targets import find_targets


Ranks = dict[str, int | None]

several = pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "clip", "mixtral"])
each_reduction = pytest.mark.parametrize("reduction", ["0.1", "0.2", "0.4", "0.6", "0.8"])


def plan(model: PreTrainedModel, **fields: Any) -> RankPlan:
    config = PGSVDConfig(**fields)
    targets = find_targets(model, config)
    return plan_ranks(targets, config, planning_profiles(model, targets, config, Calibration([], None)))


def ranks(planned: RankPlan) -> Ranks:
    return {name: layer.rank for name, layer in planned.layers.items()}


def matrix(model: nn.Module, name: str) -> torch.Tensor:
    """A target's weight, outputs first."""
    module = model.get_submodule(name)
    return (module.weight.T if isinstance(module, Conv1D) else module.weight).detach().double()


def shapes(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    return {name: tuple(matrix(model, name).shape) for name in names}


def options(model: nn.Module, names: Iterable[str], multiple: int = 1) -> dict[str, list[reference.Option]]:
    """What could be done with each layer, with errors from its singular values."""
    return {name: reference.layer_options(*matrix(model, name).shape, errors(model, name), multiple) for name in names}


def errors(model: nn.Module, name: str) -> list[float]:
    values = torch.linalg.svdvals(matrix(model, name))
    return [float(values[rank:].norm() / values.norm()) for rank in range(len(values) + 1)]


def ranks_of(choice: reference.Choice | None) -> Ranks:
    assert choice is not None
    return {name: option.rank for name, option in choice.items()}


def kept(model: nn.Module, chosen: Ranks) -> int:
    sizes = shapes(model, chosen)
    return sum(m * n if chosen[name] is None else chosen[name] * (m + n) for name, (m, n) in sizes.items())


# Budgets


@each_reduction
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_pivoted_storage_buys_higher_ranks(name: str, reduction: str) -> None:
    """The largest plan of one tolerance by its own count; no layer has a larger error than as factors."""
    model = FAMILIES[name].build()
    plain = plan(model, parameter_reduction=float(reduction))
    planned = plan(model, parameter_reduction=float(reduction), storage="pivoted")
    choices = {
        layer: reference.layer_options(*matrix(model, layer).shape, errors(model, layer), 1, "pivoted")
        for layer in planned.layers
    }
    limit = reference.budget(shapes(model, planned.layers), reduction)
    expected = reference.one_tolerance_for_all(choices, limit)
    assert ranks(planned) == ranks_of(expected)
    assert planned.kept_parameters == reference.kept(expected) <= limit
    assert all(found.relative_error <= plain.layers[layer].relative_error for layer, found in planned.layers.items())


@several
@each_reduction
def test_pareto_is_the_largest_plan_of_one_tolerance(name: str, reduction: str) -> None:
    model = FAMILIES[name].build()
    found = ranks(plan(model, parameter_reduction=float(reduction)))
    limit = reference.budget(shapes(model, found), reduction)
    assert found == ranks_of(reference.one_tolerance_for_all(options(model, found), limit))
    assert limit - max_step(model, found) < kept(model, found) <= limit


@several
@each_reduction
def test_uniform_is_the_largest_plan_of_one_fraction(name: str, reduction: str) -> None:
    """Layers of one shape are raised one after the other, so that the plan may go beyond the reference's by some."""
    model = FAMILIES[name].build()
    found = ranks(plan(model, parameter_reduction=float(reduction), allocation="uniform"))
    sizes = shapes(model, found)
    limit = reference.budget(sizes, reduction)
    least = ranks_of(reference.one_fraction_for_all(sizes, 1, limit))
    assert all(found[layer] in (rank, next_rank(sizes[layer], rank)) for layer, rank in least.items())
    assert limit - max_step(model, found) < kept(model, found) <= limit


def next_rank(size: tuple[int, int], rank: int | None) -> int | None:
    """The next larger option of a layer, `None` for dense."""
    m, n = size
    return None if rank is None or (rank + 1) * (m + n) >= m * n else rank + 1


def max_step(model: nn.Module, chosen: Ranks) -> int:
    """The most that one more rank costs in any layer."""
    sizes = shapes(model, chosen)
    raised = ({name: next_rank(size, chosen[name])} for name, size in sizes.items())
    return max(kept(model, step) - kept(model, {name: chosen[name] for name in step}) for step in raised)


@several
@pytest.mark.parametrize("tolerance", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_a_tolerance(name: str, tolerance: float) -> None:
    """Every layer has the first option within the tolerance; at 1 that is rank 1, which fits any layer here."""
    model = FAMILIES[name].build()
    planned = plan(model, tolerance=tolerance)
    expected = reference.at_tolerance(options(model, planned.layers), tolerance)
    assert ranks(planned) == ranks_of(expected)
    assert {layer.tolerance for layer in planned.layers.values()} == {tolerance}
    for layer, option in expected.items():
        assert planned.layers[layer].relative_error == pytest.approx(option.error, abs=1e-12)


@pytest.mark.parametrize("allocation", ["pareto", "uniform"])
@pytest.mark.parametrize("multiple", [2, 4])
def test_rank_multiple(allocation: str, multiple: int) -> None:
    model = FAMILIES["llama"].build()
    found = ranks(plan(model, parameter_reduction=0.4, allocation=allocation, rank_multiple=multiple))
    assert all(rank is None or rank % multiple == 0 for rank in found.values())
    limit = reference.budget(shapes(model, found), "0.4")
    assert limit - multiple * 96 < kept(model, found) <= limit
    if allocation == "pareto":
        assert found == ranks_of(reference.one_tolerance_for_all(options(model, found, multiple), limit))


def test_the_plan_is_in_model_order() -> None:
    model = FAMILIES["opt"].build()
    order = [name for name, _ in model.named_modules()]
    found = list(plan(model, tolerance=0.5, groups={"fc2": {"tolerance": 0.1}, "q_proj": {"tolerance": 0.2}}).layers)
    assert found == sorted(found, key=order.index)


@pytest.mark.parametrize("allocation", ["pareto", "uniform"])
def test_a_budget_that_cannot_be_met(allocation: str) -> None:
    with pytest.raises(ConfigError, match=r"parameter_reduction=0\.99 cannot be met: the smallest ranks of these 14"):
        plan(FAMILIES["llama"].build(), parameter_reduction=0.99, allocation=allocation)


def test_the_group_that_cannot_meet_its_budget() -> None:
    with pytest.raises(ConfigError, match=r"parameter_reduction=0\.99 cannot be met: the smallest ranks of these 2 "):
        plan(FAMILIES["llama"].build(), tolerance=0.5, groups={"down_proj": {"parameter_reduction": 0.99}})


# Groups

GROUPS = {"q_proj": {"parameter_reduction": 0.6}, "self_attn": {"tolerance": 0.3}}


def members(names: Iterable[str], part: str, without: str = "nothing") -> set[str]:
    return {name for name in names if part in name and without not in name}


def test_each_group_has_its_own_budget() -> None:
    """A group's plan is that of a model with nothing else in it."""
    model = FAMILIES["llama"].build()
    planned = plan(model, parameter_reduction=0.2, groups=GROUPS)
    found = ranks(planned)
    alone = {
        "q_proj": plan(model, parameter_reduction=0.6, modules_to_not_convert=["[!q]_proj", "mlp"]),
        "self_attn": plan(model, tolerance=0.3, modules_to_not_convert=["q_proj", "mlp"]),
        "": plan(model, parameter_reduction=0.2, modules_to_not_convert=["self_attn"]),
    }
    assert {group: len(part.layers) for group, part in alone.items()} == {"q_proj": 2, "self_attn": 6, "": 6}
    for group, part in alone.items():
        assert {name: found[name] for name in part.layers} == ranks(part)
        assert {planned.layers[name].group for name in part.layers} == {group}
        assert {planned.layers[name].tolerance for name in part.layers} == {
            layer.tolerance for layer in part.layers.values()
        }


def test_the_budget_of_every_group_is_met() -> None:
    model = FAMILIES["clip"].build()
    groups = {"text_model": {"parameter_reduction": 0.6}, "vision_model": {"parameter_reduction": 0.1}}
    found = ranks(plan(model, parameter_reduction=0.9, groups=groups))
    for part, reduction in (("text_model", "0.6"), ("vision_model", "0.1")):
        chosen = {name: found[name] for name in members(found, part)}
        limit = reference.budget(shapes(model, chosen), reduction)
        assert limit - max_step(model, chosen) < kept(model, chosen) <= limit


def test_the_first_matching_glob_wins() -> None:
    model = FAMILIES["llama"].build()
    turned = plan(model, parameter_reduction=0.2, groups=dict(reversed(GROUPS.items())))
    groups = {name: layer.group for name, layer in turned.layers.items()}
    assert groups == {name: "self_attn" if "self_attn" in name else "" for name in groups}


def test_layers_outside_the_blocks_in_a_group_of_their_own() -> None:
    model = FAMILIES["llava"].build()
    planned = plan(model, parameter_reduction=0.2, groups={"multi_modal_projector": {"parameter_reduction": 0.5}})
    chosen = {name: rank for name, rank in ranks(planned).items() if "projector" in name}
    limit = reference.budget(shapes(model, chosen), "0.5")
    assert len(chosen) == 2
    assert limit - max_step(model, chosen) < kept(model, chosen) <= limit
    rest = plan(model, parameter_reduction=0.2)
    assert {name: rank for name, rank in ranks(planned).items() if name not in chosen} == ranks(rest)


# Ranks given


def test_ranks_by_glob() -> None:
    """The first glob wins; what none names stays dense."""
    given = {"model.layers.0.self_attn.q_proj": 3, "q_proj": 5, "*.mlp.*": 7, "layers.1": 9}
    found = ranks(plan(FAMILIES["llama"].build(), ranks=given))
    assert found == {
        **{f"model.layers.0.self_attn.{part}_proj": {"q": 3}.get(part) for part in "qkvo"},
        **{f"model.layers.1.self_attn.{part}_proj": {"q": 5}.get(part, 9) for part in "qkvo"},
        **{f"model.layers.{i}.mlp.{part}_proj": 7 for i in (0, 1) for part in ("gate", "up", "down")},
    }


def test_the_largest_rank() -> None:
    model = FAMILIES["llama"].build()
    assert ranks(plan(model, ranks={"k_proj": 16}))["model.layers.0.self_attn.k_proj"] == 16
    message = r"rank 17 of model\.layers\.0\.self_attn\.k_proj is outside 1 … 16, the full rank of its 16 × 32 weight"
    with pytest.raises(ConfigError, match=message):
        plan(model, ranks={"k_proj": 17})


def test_ranks_given_are_carried_out() -> None:
    model = FAMILIES["gpt2"].build()
    PGSVDCompressor(PGSVDConfig(ranks={"c_attn": 5, "h.1.mlp.c_fc": 6}, solver="svd")).compress(model)
    found = {name: module.rank for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    assert found == {"transformer.h.0.attn.c_attn": 5, "transformer.h.1.attn.c_attn": 5, "transformer.h.1.mlp.c_fc": 6}


# What the plan depends on


@pytest.mark.parametrize("fields", [{"parameter_reduction": 0.3}, {"tolerance": 0.4}], ids=str)
def test_the_paper_s_plan_does_not_depend_on_the_dataset(fields: dict) -> None:
    found = []
    for seed in range(3):
        model = FAMILIES["llama"].build()
        config = PGSVDConfig(**fields, dataset=FAMILIES["llama"].batches(1, seed=seed))
        found.append([(layer.name, layer.rank) for layer in PGSVDCompressor(config).compress(model).layers])
    planned = plan(FAMILIES["llama"].build(), **fields)
    assert found == [list(ranks(planned).items())] * 3


@pytest.mark.parametrize("solver", ["als", "eigh", "svd"])
def test_the_plan_does_not_depend_on_the_solver(solver: str) -> None:
    assert plan(FAMILIES["bert"].build(), tolerance=0.4, solver=solver) == plan(
        FAMILIES["bert"].build(), tolerance=0.4
    )


@torch.no_grad()
def test_the_plan_does_not_depend_on_the_scale_of_a_layer() -> None:
    model, scaled = FAMILIES["llama"].build(), FAMILIES["llama"].build()
    for i, module in enumerate(scaled.modules()):
        if type(module) is nn.Linear:
            module.weight *= 2.0 ** (i % 7 - 3)
    for fields in ({"tolerance": 0.4}, {"parameter_reduction": 0.4}):
        assert ranks(plan(scaled, **fields)) == ranks(plan(model, **fields))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_planning_in_half_precision(dtype: torch.dtype) -> None:
    """Spectra are those of the weights as they are, computed in float32."""
    model = FAMILIES["llama"].build().to(dtype)
    planned = plan(model, tolerance=0.4)
    expected = reference.at_tolerance(options(model, planned.layers), 0.4)
    assert ranks(planned) == ranks_of(expected)
    for layer, option in expected.items():
        assert planned.layers[layer].relative_error == pytest.approx(option.error, abs=1e-6)


# Refused before anything is touched


def never_read() -> Iterable[Batch]:
    raise AssertionError("the dataset was read")
    yield


REQUESTS = {
    "pareto": {"parameter_reduction": 0.2},
    "uniform": {"parameter_reduction": 0.2, "allocation": "uniform"},
    "tolerance": {"tolerance": 0.2},
    "ranks": {"ranks": {"*": 2}},
}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_weights_that_are_not_finite(request_: dict, value: float) -> None:
    model = FAMILIES["gpt2"].build()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight[3, 2] = value
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    message = r"the weight of transformer\.h\.1\.mlp\.c_proj holds NaN or infinity"
    with pytest.raises(NonFiniteError, match=message):
        PGSVDCompressor(PGSVDConfig(**request_, dataset=never_read())).compress(model)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0, equal_nan=True)
    assert not any(isinstance(module, LowRankLinear) for module in model.modules())


def test_a_damaged_layer_that_is_left_alone() -> None:
    model = FAMILIES["gpt2"].build()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight[3, 2] = float("nan")
    excluded = ["h.1.mlp.c_proj"]
    found = ranks(plan(model, tolerance=0.5, modules_to_not_convert=excluded))
    assert found == ranks(plan(FAMILIES["gpt2"].build(), tolerance=0.5, modules_to_not_convert=excluded))


BAD_REQUESTS = {
    "budget": ({"parameter_reduction": 0.999}, "cannot be met"),
    "rank": ({"ranks": {"q_proj": 99}}, "rank 99 of model.layers.0.self_attn.q_proj is outside 1"),
    "glob": ({"tolerance": 0.1, "modules_to_not_convert": ["q_prij"]}, "modules_to_not_convert: 'q_prij' matches no"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_requests_that_do_not_fit_are_refused_before_data_is_read(case: str) -> None:
    fields, message = BAD_REQUESTS[case]
    model = FAMILIES["llama"].build()
    with pytest.raises(ConfigError, match=message):
        PGSVDCompressor(PGSVDConfig(**fields, dataset=never_read())).compress(model)
    assert not any(isinstance(module, LowRankLinear) for module in model.modules())
