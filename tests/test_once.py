"""Calibrated once and decomposed once, a model is at any plan what compressing it there gives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import reference
import torch
from models import FAMILIES, Batch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_pgsvd import ConfigError, PGSVDCompressor, PGSVDConfig, UnsupportedModelError, linalg
from optimum_pgsvd.factoring import (
    Ordered,
    calibration_of,
    compressed_at,
    cut,
    keep_moments,
    ordered_factors,
    plan_at,
    request_at,
)
from optimum_pgsvd.modeling_pgsvd import low_rank_layers
from optimum_pgsvd.planning import given_ranks
from optimum_pgsvd.targets import find_targets


BUDGETS: tuple[dict[str, Any], ...] = (
    {"parameter_reduction": 0.05},
    {"parameter_reduction": 0.3},
    {"tolerance": 0.4},
    {"parameter_reduction": 0.2, "groups": {"*.mlp.*": {"tolerance": 0.5}}},
    {"ranks": {"*.0.*": 5}},
    {"parameter_reduction": 0.3, "allocation": "uniform"},
)


def config_for(name: str, **fields: Any) -> PGSVDConfig:
    return PGSVDConfig(
        **{"parameter_reduction": 0.0, "dataset": FAMILIES[name].batches(4), "num_samples": 10**6} | fields
    )


def ordered_of(model: PreTrainedModel, config: PGSVDConfig, allocations: tuple[str, ...] = ()) -> Ordered:
    targets = find_targets(model, config)
    return ordered_factors(model, targets, config, calibration_of(model, targets, config), allocations)


def compressed(model: PreTrainedModel, request: PGSVDConfig) -> PreTrainedModel:
    model = copy.deepcopy(model)
    PGSVDCompressor(request).compress(model)
    return model


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def product_of(layer: Any) -> Tensor:
    left, right = (weight.detach().double() for weight in (layer.left.weight, layer.right.weight))
    return left @ right


@torch.no_grad()
def outputs(model: PreTrainedModel, batch: Batch) -> Tensor:
    return model(**batch)[0]


def inputs_of(model: PreTrainedModel, name: str, batches: list[Batch]) -> list[Tensor]:
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_hook(lambda module, args, result: seen.append(args[0].detach()))
    for batch in batches:
        outputs(model, batch)
    hook.remove()
    return seen


def assert_bit_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def each_solver_and_family() -> list[tuple[str, str]]:
    """Both closed forms on many families, the solvers of other papers on one."""
    many = [(solver, name) for solver in ("eigh", "svd") for name in ("llama", "gpt2", "t5", "clip", "albert")]
    return [*many, *((solver, "llama") for solver in ("svd_llm", "asvd", "fwsvd"))]


@pytest.mark.parametrize(("solver", "name"), each_solver_and_family())
def test_a_cut_is_what_compressing_gives(solver: str, name: str) -> None:
    """To the last bit of every weight, at every budget, from one walk."""
    model, config = FAMILIES[name].build(), config_for(name, solver=solver)
    ordered = ordered_of(model, config)
    budgets = [budget for budget in BUDGETS if "groups" not in budget or name == "llama"]
    for budget in budgets:
        request = request_at(config, **budget)
        expected = compressed(model, request)
        with cut(model, ordered, plan_at(model, ordered, request)):
            assert_bit_equal(weights(model), weights(expected))
            batch = FAMILIES[name].batches(1, seed=1)[0]
            assert torch.equal(outputs(model, batch), outputs(expected, batch))
            assert {n: layer.rank for n, layer in low_rank_layers(model).items()} == {
                n: layer.rank for n, layer in low_rank_layers(expected).items()
            }


@pytest.mark.parametrize("objective", ["outputs", "loss"])
def test_what_is_left_of_the_outputs_is_what_compressing_reports(objective: str) -> None:
    model, config = FAMILIES["llama"].build(), config_for("llama", objective=objective)
    ordered = ordered_of(model, config)
    for reduction in (0.1, 0.4):
        request = request_at(config, parameter_reduction=reduction)
        report = PGSVDCompressor(request).compress(copy.deepcopy(model))
        for layer in report.layers:
            if layer.rank is not None:
                seen = ordered.activations[layer.name]
                assert float(seen.errors[layer.rank]) == pytest.approx(layer.activation_error, abs=1e-6)
                assert seen.tokens == layer.tokens


def test_norms_of_inputs_and_outputs_are_those_of_a_plain_pass() -> None:
    model, config = FAMILIES["gpt2"].build(), config_for("gpt2")
    ordered = ordered_of(model, config)
    for name, seen in ordered.activations.items():
        inputs = [x.reshape(-1, x.shape[-1]).double() for x in inputs_of(model, name, config.dataset)]
        weight = model.get_submodule(name).weight.detach().double()
        assert seen.input_norm == pytest.approx(reference.norm(torch.cat(inputs)), rel=1e-5)
        assert seen.output_norm == pytest.approx(reference.norm(torch.cat(inputs) @ weight), rel=1e-5)


@pytest.mark.parametrize("fields", [{"objective": "loss"}, {"allocation": "loss"}, {"storage": "pivoted"}])
def test_a_cut_with_gradients_and_by_other_storage(fields: dict[str, Any]) -> None:
    """Thin layers take the place of pivoted ones, which are the same function of the inputs but for rounding."""
    model, config = FAMILIES["llama"].build(), config_for("llama", **fields)
    ordered = ordered_of(model, config)
    batch = FAMILIES["llama"].batches(1, seed=1)[0]
    for reduction in (0.1, 0.4):
        request = request_at(config, parameter_reduction=reduction)
        expected = compressed(model, request)
        with cut(model, ordered, plan_at(model, ordered, request)):
            ranks = {n: layer.rank for n, layer in low_rank_layers(expected).items()}
            assert {n: layer.rank for n, layer in low_rank_layers(model).items()} == ranks
            torch.testing.assert_close(outputs(model, batch), outputs(expected, batch), rtol=1e-4, atol=1e-4)
            if "storage" not in fields:
                assert_bit_equal(weights(model), weights(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_to_the_rounding_of_the_factors(dtype: torch.dtype) -> None:
    model = FAMILIES["llama"].build().to(dtype)
    config = config_for("llama")
    ordered, request = ordered_of(model, config), request_at(config, parameter_reduction=0.3)
    expected = low_rank_layers(compressed(model, request))
    with cut(model, ordered, plan_at(model, ordered, request)):
        found = low_rank_layers(model)
        assert list(found) == list(expected)
        for name, layer in found.items():
            product, other = product_of(layer), product_of(expected[name])
            bound = 4 * torch.finfo(dtype).eps * float(other.norm()) / layer.rank**0.5
            assert float((product - other).norm()) < bound


def test_the_model_runs_once_and_nothing_is_decomposed_again(monkeypatch) -> None:
    """However many plans there are: the batches pass the model, and each target is decomposed twice."""
    model, config = FAMILIES["llama"].build(), config_for("llama")
    passes, decompositions = [], []
    layer = model.model.layers[0].self_attn.q_proj
    hook = layer.register_forward_hook(lambda *_: passes.append(1))
    for owner, name in ((torch.linalg, "eigh"), (torch.linalg, "eigvalsh"), (torch.linalg, "svd")):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, f=function, **kw: (decompositions.append(1), f(*a, **kw))[1])
    ordered = ordered_of(model, config, ("uniform",))
    # one batch more: the survey, which finds the order of the blocks
    assert len(passes) == len(config.dataset) + 1
    assert len(decompositions) == 2 * len(ordered.factors)
    hook.remove()
    monkeypatch.setattr(type(model), "forward", None)
    for budget in BUDGETS:
        with cut(model, ordered, plan_at(model, ordered, request_at(config, **budget))):
            pass
    assert len(decompositions) == 2 * len(ordered.factors)


def test_the_dense_layers_are_back_whatever_happens() -> None:
    model, config = FAMILIES["llama"].build(), config_for("llama", solver="svd")
    model.train()
    model.model.layers[1].eval()
    before, tensors = dict(model.named_modules()), weights(model)
    training = {name: module.training for name, module in before.items()}
    ordered = ordered_of(model, config)
    plan = plan_at(model, ordered, request_at(config, parameter_reduction=0.3))
    for error in (None, KeyboardInterrupt):
        try:
            with cut(model, ordered, plan):
                assert low_rank_layers(model)
                assert {
                    name: module.training for name, module in model.named_modules() if name in training
                } == training
                if error:
                    raise error
        except KeyboardInterrupt:
            pass
        assert dict(model.named_modules()) == before
        assert_bit_equal(weights(model), tensors)
        assert {name: module.training for name, module in model.named_modules()} == training


def test_measurements_take_the_place_of_a_walk(dense, texts, tmp_path) -> None:
    config = PGSVDConfig(parameter_reduction=0.0, dataset=texts, sequence_length=16)
    PGSVDCompressor(config).measure_checkpoint(dense, tmp_path / "stats")
    model = AutoModelForCausalLM.from_pretrained(dense)
    walked = ordered_of(model, config)
    read = ordered_of(model, request_at(config, parameter_reduction=0.0, dataset=str(tmp_path / "stats")))
    for name, factors in walked.factors.items():
        assert torch.equal(factors.left, read.factors[name].left)
        assert torch.equal(factors.right, read.factors[name].right)
    for name, seen in walked.activations.items():
        again = read.activations[name]
        assert (seen.tokens, seen.input_norm, seen.output_norm) == (again.tokens, again.input_norm, again.output_norm)
        assert torch.equal(seen.errors, again.errors)
    with pytest.raises(ConfigError, match="measures gradients, and the measurements that are the dataset hold none"):
        ordered_of(model, request_at(config, parameter_reduction=0.0, dataset=str(tmp_path / "stats")), ("loss",))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"solver": "als"}, "solver='als' is not nested"),
        ({"calibration": "anchored"}, "needs calibration='parallel'"),
        ({"correct_bias": True}, "needs correct_bias=False"),
    ],
)
def test_what_cannot_be_cut_is_refused_before_any_work(fields: dict[str, Any], message: str, monkeypatch) -> None:
    model, config = FAMILIES["llama"].build(), config_for("llama", **fields)
    targets = find_targets(model, config)
    monkeypatch.setattr(linalg, "singular_values", None)
    with pytest.raises(ConfigError, match=message):
        ordered_factors(model, targets, config, calibration_of(model, targets, config))


def test_more_than_there_is_is_refused() -> None:
    model, config = FAMILIES["llama"].build(), config_for("llama", solver="svd")
    ordered = ordered_of(model, config)
    targets = find_targets(model, config)
    with (
        pytest.raises(ConfigError, match=r"q_proj rank 32, and its factors have rank 15"),
        cut(model, ordered, given_ranks(targets.shapes, {"*.q_proj": 32})),
    ):
        pass
    assert not low_rank_layers(model)
    with pytest.raises(ConfigError, match=r"of loss, which were not measured: give allocations=\['loss'\] beforehand"):
        plan_at(model, ordered, request_at(config_for("llama"), parameter_reduction=0.3, allocation="loss"))
    plan = plan_at(model, ordered, request_at(config, parameter_reduction=0.3))
    with cut(model, ordered, plan), pytest.raises(UnsupportedModelError, match="compressed already"):
        plan_at(model, ordered, request_at(config, parameter_reduction=0.3))


def test_a_layer_that_was_not_decomposed_is_refused() -> None:
    model, config = FAMILIES["clip"].build(), config_for("clip", solver="svd")
    request = request_at(config, parameter_reduction=0.3, groups={"visual_projection": {"parameter_reduction": 0.5}})
    with pytest.raises(ConfigError, match="compresses visual_projection, which was no target when the model"):
        plan_at(model, ordered_of(model, config), request)
    ordered = ordered_of(model, request)
    with cut(model, ordered, plan_at(model, ordered, request)):
        assert "visual_projection" in low_rank_layers(model)


# Solved anew at each plan, from moments that are kept


@pytest.mark.parametrize(
    "fields",
    [
        {"solver": "als", "num_iterations": 3},
        {"solver": "eigh"},
        {"solver": "svd"},
        {"solver": "fwsvd"},
        {"storage": "pivoted"},
        {"correct_bias": True},
        {"objective": "loss"},
        {"allocation": "pareto_outputs"},
    ],
    ids=str,
)
def test_from_kept_moments_any_request_is_what_compressing_gives(fields: dict[str, Any]) -> None:
    """To the last bit of every weight, with the same report, while the model runs no more."""
    model, config = FAMILIES["gpt2"].build(), config_for("gpt2", **fields)
    targets = find_targets(model, config)
    kept = keep_moments(model, targets, config, calibration_of(model, targets, config))
    for reduction in (0.1, 0.4):
        request = request_at(config, parameter_reduction=reduction)
        expected = copy.deepcopy(model)
        report = PGSVDCompressor(request).compress(expected)
        before = dict(model.named_modules())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(model), "forward", None)
            with compressed_at(model, kept, plan_at(model, kept, request)) as layers:
                assert_bit_equal(weights(model), weights(expected))
                errors = {layer.name: layer.activation_error for layer in layers}
        assert errors == {layer.name: layer.activation_error for layer in report.layers if layer.rank is not None}
        assert dict(model.named_modules()) == before


def test_kept_moments_may_come_from_disk(dense, texts, tmp_path) -> None:
    config = PGSVDConfig(parameter_reduction=0.3, dataset=texts, sequence_length=16, solver="als", num_iterations=2)
    PGSVDCompressor(config).measure_checkpoint(dense, tmp_path / "stats")
    model = AutoModelForCausalLM.from_pretrained(dense)
    request = request_at(config, parameter_reduction=0.3, dataset=str(tmp_path / "stats"))
    targets = find_targets(model, request)
    kept = keep_moments(model, targets, request, calibration_of(model, targets, request))
    expected = compressed(model, config)
    with compressed_at(model, kept, plan_at(model, kept, request)):
        assert_bit_equal(weights(model), weights(expected))


def test_what_depends_on_the_ranks_before_it_cannot_be_kept() -> None:
    model, config = FAMILIES["llama"].build(), config_for("llama", calibration="anchored")
    targets = find_targets(model, config)
    with pytest.raises(ConfigError, match="needs calibration='parallel'"):
        keep_moments(model, targets, config, calibration_of(model, targets, config))
