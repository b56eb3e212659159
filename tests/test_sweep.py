"""A sweep's points are what compressing at each of them gives, from one calibration."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import FAMILIES, Batch
from transformers import PreTrainedModel

from optimum_pgsvd import CalibrationError, CompressionReport, ConfigError, PGSVDCompressor, PGSVDConfig
from optimum_pgsvd.analysis import Point, evaluation_set, mean_loss, sweep_model
from optimum_pgsvd.factoring import request_at
from optimum_pgsvd.modeling_pgsvd import low_rank_layers


REDUCTIONS = (0.1, 0.4)


def config_for(name: str = "llama", **fields: Any) -> PGSVDConfig:
    batches = FAMILIES[name].batches(4)
    return PGSVDConfig(**{"parameter_reduction": 0.0, "dataset": batches, "num_samples": 10**6} | fields)


def held_out(name: str = "llama") -> list[Batch]:
    return FAMILIES[name].batches(2, seed=1)


def compressed(model: PreTrainedModel, request: PGSVDConfig) -> tuple[PreTrainedModel, CompressionReport]:
    model = copy.deepcopy(model)
    return model, PGSVDCompressor(request).compress(model)


def assert_is(point: Point, model: PreTrainedModel, report: CompressionReport) -> None:
    assert point.ranks == {layer.name: layer.rank for layer in report.layers if layer.rank is not None}
    assert point.parameters == report.parameters_after
    assert point.model_parameters == sum(p.numel() for p in model.parameters())
    assert point.parameter_reduction == pytest.approx(report.parameter_reduction)
    assert point.loss == mean_loss(model, held_out())
    errors = [layer.activation_error for layer in report.layers]
    if None in errors:
        assert point.activation_error is None
    else:
        assert point.activation_error == pytest.approx(sum(errors) / len(errors), abs=1e-6)
        assert point.largest_activation_error == pytest.approx(max(errors), abs=1e-6)


@pytest.mark.parametrize("solver", ["svd", "als", "eigh"])
def test_every_cell_of_the_ablation_is_what_compressing_there_gives(solver: str) -> None:
    """{svd, als, eigh} × {uniform, pareto}, to the last bit of the loss."""
    model, config = FAMILIES["llama"].build(), config_for(solver=solver, num_iterations=3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = sweep_model(model, config, reductions=REDUCTIONS, evaluation=held_out())
    assert [(point.allocation, point.asked) for point in found.points] == [
        (name, {"parameter_reduction": reduction}) for name in ("pareto", "uniform") for reduction in REDUCTIONS
    ]
    for point in found.points:
        assert_is(point, *compressed(model, request_at(config, allocation=point.allocation, **point.asked)))
    assert found.dense.loss == mean_loss(model, held_out())
    assert (found.dense.surrogate, found.dense.parameter_reduction, found.dense.ranks) == (0.0, 0.0, {})
    assert not low_rank_layers(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_surrogate_is_the_sum_of_errors_of_plain_weights() -> None:
    """Whatever chose the ranks: by one tolerance, its errors are the plan's own."""
    model, config = FAMILIES["llama"].build(), config_for()
    found = sweep_model(model, config, tolerances=[0.5, 0.7], allocations=["uniform", "pareto"])
    tolerances = [point.tolerance for point in found.points if point.allocation == "pareto"]
    assert tolerances == [0.5, 0.7]
    for point in found.points:
        errors = [
            float(torch.linalg.svdvals(model.get_submodule(n).weight.detach().double())[rank:].norm())
            / float(model.get_submodule(n).weight.detach().double().norm())
            for n, rank in point.ranks.items()
        ]
        assert point.surrogate == pytest.approx(sum(errors), rel=1e-5)
        assert point.largest_error == pytest.approx(max(errors), rel=1e-5)
        if point.allocation == "pareto":
            assert point.largest_error <= point.tolerance


def test_a_tolerance_is_for_those_that_take_one_and_a_size_for_the_others() -> None:
    """Uniform ranks remove as much as one tolerance does, to one rank step."""
    model, config = FAMILIES["llama"].build(), config_for(solver="svd")
    found = sweep_model(model, config, tolerances=[0.5, 0.7])
    pareto, uniform = (
        {point.asked["tolerance"]: point for point in found.points if point.allocation == name}
        for name in ("pareto", "uniform")
    )
    step = max(sum(layer.weight.shape) for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    for tolerance, point in pareto.items():
        expected = compressed(model, request_at(config, tolerance=tolerance))[1]
        assert point.parameters == expected.parameters_after
        assert 0 <= point.parameters - uniform[tolerance].parameters <= step
    with pytest.raises(ConfigError, match="none of the allocations uniform takes a tolerance: add 'pareto'"):
        sweep_model(model, config, tolerances=[0.3], allocations=["uniform"])


@pytest.mark.parametrize("solver", ["eigh", "als"])
def test_calibration_runs_once_however_many_points_there_are(solver: str) -> None:
    """Each batch passes the model once, and one more surveys it; each point costs its evaluation only."""
    model, config = FAMILIES["llama"].build(), config_for(solver=solver, num_iterations=1)
    passes: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda *_: passes.append(1))
    batches, evaluation = len(config.dataset), held_out()
    sweep_model(model, config, reductions=[0.2])
    assert len(passes) == batches + 1
    passes.clear()
    sweep_model(model, config, reductions=[0.1, 0.2, 0.3, 0.4], allocations=["pareto", "uniform", "pareto_outputs"])
    assert len(passes) == batches + 1
    passes.clear()
    sweep_model(model, config, reductions=[0.1, 0.2, 0.3], evaluation=evaluation)
    assert len(passes) == batches + 1 + 1 + (1 + 2 * 3) * len(evaluation)  # of which one asks whether there is a loss


def test_allocations_by_gradients_and_pivoted_storage_take_part() -> None:
    model, config = FAMILIES["llama"].build(), config_for(storage="pivoted")
    found = sweep_model(model, config, reductions=[0.3], allocations=["loss", "pareto"], evaluation=held_out())
    for point in found.points:
        request = request_at(config, allocation=point.allocation, **point.asked)
        other, report = compressed(model, request)
        assert point.ranks == {layer.name: layer.rank for layer in report.layers if layer.rank is not None}
        assert point.parameters == report.parameters_after
        assert point.loss == pytest.approx(mean_loss(other, held_out()), rel=1e-4)


@pytest.mark.parametrize("solver", ["eigh", "als"])
def test_experts_are_swept_one_by_one_and_fused_again(solver: str) -> None:
    model, config = FAMILIES["mixtral"].build(), config_for("mixtral", solver=solver, num_iterations=2)
    before = {name: type(module) for name, module in model.named_modules()}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = sweep_model(model, config, reductions=[0.4], allocations=["pareto"], evaluation=held_out("mixtral"))
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    other, report = compressed(model, request_at(config, parameter_reduction=0.4))
    assert any(".experts." in name for name in found.points[0].ranks)
    assert found.points[0].ranks == {layer.name: layer.rank for layer in report.layers if layer.rank is not None}
    assert found.points[0].loss == pytest.approx(mean_loss(other, held_out("mixtral")), rel=1e-6)


@pytest.mark.parametrize(
    ("fields", "budgets", "message"),
    [
        ({}, {}, "give reductions or tolerances"),
        ({"groups": {"*.mlp.*": {"tolerance": 0.3}}}, {"reductions": [0.2]}, "leave groups out"),
        ({"calibration": "anchored"}, {"reductions": [0.2]}, "needs calibration='parallel'"),
        ({}, {"reductions": [0.2, 0.999]}, "parameter_reduction=0.999 cannot be met"),
        ({}, {"reductions": [0.2], "allocations": ["greedy"]}, "allocation='greedy' is not known"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_a_point_is_made(
    fields: dict[str, Any], budgets: dict[str, Any], message: str, monkeypatch
) -> None:
    monkeypatch.setattr(FAMILIES["llama"].model_class, "forward", None)
    with pytest.raises(ConfigError, match=message):
        sweep_model(FAMILIES["llama"].build(), config_for(**fields), **budgets)


def test_a_model_without_a_loss_is_told_before_it_is_calibrated(monkeypatch) -> None:
    model, config = FAMILIES["bert"].build(), config_for("bert")
    monkeypatch.setattr("optimum_pgsvd.analysis.sweep.measured_once", None)
    with pytest.raises(CalibrationError, match="BertForMaskedLM gives no loss"):
        sweep_model(model, config, reductions=[0.3], evaluation=held_out("bert"))


def test_an_evaluation_set_is_made_as_a_calibration_set_is(dense, texts) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(dense)
    config = PGSVDConfig(tolerance=0.1, solver="svd", sequence_length=16, batch_size=4)
    batches = evaluation_set(model, config, texts, num_samples=6)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(4, 16), (2, 16)]
    assert mean_loss(model, batches) > 0.5
