"""Theorem 1 on models: inequalities that must hold, and the true changes of the loss."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES

from optimum_pgsvd import ConfigError, PGSVDCompressor, PGSVDConfig
from optimum_pgsvd.analysis import Bounds, bound_model, mean_loss
from optimum_pgsvd.analysis.theorem import Bound, LayerBound, rank_correlation
from optimum_pgsvd.factoring import request_at
from optimum_pgsvd.modeling_pgsvd import low_rank_layers


REDUCTIONS = (0.1, 0.4)


def config_for(name: str = "llama", **fields: Any) -> PGSVDConfig:
    batches = FAMILIES[name].batches(3)
    return PGSVDConfig(**{"parameter_reduction": 0.0, "dataset": batches, "num_samples": 10**6} | fields)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def measured(request) -> tuple[Any, PGSVDConfig, Bounds]:
    model, config = FAMILIES[request.param].build(), config_for(request.param)
    evaluation = FAMILIES[request.param].batches(1, seed=1)
    return model, config, bound_model(model, config, REDUCTIONS, evaluation=evaluation)


def weight_of(model: Any, name: str) -> torch.Tensor:
    module = model.get_submodule(name)
    weight = module.weight.detach().double()
    return weight if isinstance(module, torch.nn.Linear) else weight.T


def test_the_chain_of_inequalities_holds_for_every_layer(measured) -> None:
    """`|⟨∂L/∂Y, ΔY⟩| ≤ α' ‖ΔW Xᵀ‖ ≤ α' ‖X‖ ‖W‖ e(r)`."""
    _, _, found = measured
    for bound in found.bounds:
        assert bound.layers
        for layer in bound.layers:
            alpha = found.sensitivities.alphas[layer.name]
            assert abs(layer.first_order) <= layer.bound * (1 + 1e-6)
            assert layer.bound <= alpha * layer.relative_error * (1 + 1e-6)
        assert abs(bound.first_order) <= bound.bound


def test_changes_are_those_of_compressing(measured) -> None:
    """All together, and one layer alone at the rank it has in the plan."""
    model, config, found = measured
    base = mean_loss(model, config.dataset)
    assert found.loss == base
    assert not low_rank_layers(model)
    for reduction, bound in zip(REDUCTIONS, found.bounds, strict=True):
        whole = copy.deepcopy(model)
        report = PGSVDCompressor(request_at(config, parameter_reduction=reduction)).compress(whole)
        assert bound.change == mean_loss(whole, config.dataset) - base
        assert {layer.name: layer.rank for layer in bound.layers} == {
            layer.name: layer.rank for layer in report.layers if layer.rank is not None
        }
        layer = bound.layers[-1]
        alone = copy.deepcopy(model)
        PGSVDCompressor(request_at(config, ranks={layer.name: layer.rank})).compress(alone)
        assert layer.change == mean_loss(alone, config.dataset) - base


def test_the_first_order_is_the_slope_of_the_loss_on_the_way_to_the_factors(measured) -> None:
    """A central difference of the loss along ΔW."""
    model, config, found = measured
    compressed = copy.deepcopy(model)
    PGSVDCompressor(request_at(config, parameter_reduction=REDUCTIONS[1])).compress(compressed)
    for layer in found.bounds[1].layers[::4]:
        factored = compressed.get_submodule(layer.name)
        product = factored.left.weight.detach().double() @ factored.right.weight.detach().double()
        change = product - weight_of(model, layer.name)
        moved = copy.deepcopy(model).double()
        module = moved.get_submodule(layer.name)
        change = change if isinstance(module, torch.nn.Linear) else change.T
        step, losses = 0.02, []
        for place in (step, -step):
            with torch.no_grad():
                module.weight += place * change
            losses.append(mean_loss(moved, config.dataset))
            with torch.no_grad():
                module.weight -= place * change
        slope = (losses[0] - losses[1]) / (2 * step)
        # transformers computes losses in float32; the third derivative adds step² / 6 of itself
        assert layer.first_order == pytest.approx(slope, rel=0.03, abs=2e-4)


def test_sensitivities_are_products_of_norms_that_a_plain_pass_gives(measured) -> None:
    model, config, found = measured
    names = list(found.sensitivities.layers)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: seen[name].append(args[0].detach().reshape(-1, args[0].shape[-1]))
        )
        for name in names
    ]
    mean_loss(model, config.dataset)
    for hook in hooks:
        hook.remove()
    for name, layer in found.sensitivities.layers.items():
        inputs, weight = torch.cat(seen[name]).double(), weight_of(model, name)
        assert layer.input_norm == pytest.approx(reference.norm(inputs), rel=1e-5)
        assert layer.weight_norm == pytest.approx(reference.norm(weight), rel=1e-6)
        assert layer.output_norm == pytest.approx(reference.norm(inputs @ weight.T), rel=1e-5)
        assert layer.alpha == pytest.approx(layer.gradient * layer.input_norm * layer.weight_norm)


def test_each_allocation_has_the_least_of_what_it_minimises(measured) -> None:
    """To the last step of one layer, so by a margin that is a small part of it; all keep the same parameters."""
    _, _, found = measured
    for each in found.allocated:
        plans = each.plans
        assert set(plans) == {
            "uniform", "pareto", "equal α", "measured α", "bound",
            "equal α, all factored", "measured α, all factored", "bound, all factored",
        }  # fmt: skip
        dense = sum(layer.weight_norm > 0 for layer in found.sensitivities.layers.values())
        for name, plan in plans.items():
            assert plans["equal α"].equal <= 1.1 * plan.equal
            assert plans["measured α"].measured <= 1.1 * plan.measured
            assert not name.endswith("all factored") or len(plan.ranks) == dense
            assert plan.evaluation_loss is not None
        sizes = [plan.parameters for plan in plans.values()]
        assert max(sizes) - min(sizes) <= 0.03 * max(sizes)


def test_looseness_and_totals_are_ratios_of_what_is_listed(measured) -> None:
    _, _, found = measured
    values = found.to_dict()
    for bound, each in zip(found.bounds, values["bounds"], strict=True):
        layers, total = each["layers"], each["total"]
        assert total["bound"] == pytest.approx(sum(layer["gradient"] * layer["output_change"] for layer in layers))
        assert total["bound_over_change"] == pytest.approx(total["bound"] / abs(bound.change))
        assert total["sum_of_changes_alone"] == pytest.approx(sum(layer["change"] for layer in layers))
        below = [layer for layer in layers if layer["bound"] < abs(layer["change"])]
        assert total["layers_where_the_bound_is_below_the_change"] == len(below)
        assert set(each["rank_correlation_with_change"]) >= {"bound", "first_order", "relative_error"}
    alphas = [layer["alpha"] for layer in values["sensitivities"]["layers"].values()]
    assert values["sensitivities"]["spread"]["max_over_min"] == pytest.approx(max(alphas) / min(alphas))


def test_layers_below_their_bound_are_counted_but_for_rounding() -> None:
    """One below, one not, and one whose rank leaves nothing of its outputs: there bound and change are rounding."""
    layers = [
        LayerBound(name, 3, 0.5, relative * 10, relative, 1.0, 0.0, change)
        for name, relative, change in (("below", 0.1, -1.5), ("above", 0.1, 0.5), ("exact", 0.0, 3e-6))
    ]
    assert Bound(0.2, tuple(layers), -1.0).to_dict()["total"]["layers_where_the_bound_is_below_the_change"] == 1


def test_without_layers_alone_only_totals_are_measured(monkeypatch) -> None:
    model, config = FAMILIES["llama"].build(), config_for()
    passes: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda *_: passes.append(1))
    found = bound_model(model, config, [0.3], alone=False)
    assert all(layer.change is None for layer in found.bounds[0].layers)
    values = found.to_dict()["bounds"][0]
    assert values["rank_correlation_with_change"] == {}
    assert values["total"]["sum_of_changes_alone"] is None
    assert values["total"]["layers_where_the_bound_is_below_the_change"] is None
    # gradients, the walk with its survey, the dense loss, the plan, and eight allocations
    assert len(passes) == 3 + 4 + 3 + 3 + 8 * 3


def test_experts_are_taken_apart_meanwhile() -> None:
    model, config = FAMILIES["mixtral"].build(), config_for("mixtral")
    before = {name: type(module) for name, module in model.named_modules()}
    found = bound_model(model, config, [0.3], alone=False)
    experts = [layer for layer in found.bounds[0].layers if ".experts." in layer.name]
    assert len(experts) == 2 * 4 * 2
    assert all(abs(layer.first_order) <= layer.bound * (1 + 1e-6) for layer in experts)
    assert {name: type(module) for name, module in model.named_modules()} == before


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"solver": "svd"}, "the bound is about outputs"), ({"solver": "als"}, "solver='als' is not nested")],
)
def test_solvers_that_cannot_be_bounded_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bound_model(FAMILIES["llama"].build(), config_for(**fields))


def test_measurements_hold_no_gradients(dense, texts, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    config = PGSVDConfig(tolerance=0.0, dataset=texts, sequence_length=16)
    PGSVDCompressor(config).measure_checkpoint(dense, tmp_path / "stats")
    with pytest.raises(ConfigError, match="measurements hold none: give the dataset itself"):
        bound_model(AutoModelForCausalLM.from_pretrained(dense), PGSVDConfig(0.0, dataset=tmp_path / "stats"))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=9))
def test_rank_correlation_is_spearman_s(pairs: list[tuple[int, int]]) -> None:
    values, others = ([float(pair[side]) for pair in pairs] for side in (0, 1))
    found = rank_correlation(values, others)
    if len(set(values)) == 1 or len(set(others)) == 1:
        assert found is None
    else:
        assert found == pytest.approx(reference.spearman(values, others), abs=1e-9)
