"""What layers give, rank by rank: profiles of outputs against an SVD of all outputs, and the plans made of them."""

from __future__ import annotations

import pytest
import reference
import torch
from cases import each_case, gaussian
from models import FAMILIES
from transformers.pytorch_utils import Conv1D
from watch import Inputs, plain_forward

from optimum_pgsvd import PGSVDCompressor, PGSVDConfig
from optimum_pgsvd.errors import ConfigError
from optimum_pgsvd.factoring import Calibration, output_profiles
from optimum_pgsvd.linalg import output_spectrum
from optimum_pgsvd.replace import experts_apart
from optimum_pgsvd.targets import find_targets


several = pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "mixtral"])


def config(name="llama", **settings):
    settings = {"parameter_reduction": 0.3, "allocation": "pareto_outputs", "num_samples": 1000} | settings
    return PGSVDConfig(**{"dataset": FAMILIES[name].batches(3)} | settings)


def matrix(model, name):
    module = model.get_submodule(name)
    return (module.weight.T if isinstance(module, Conv1D) else module.weight).detach().double()


def inputs_of(model, names, batches):
    """All inputs of each layer, as rows."""
    with Inputs(model, names) as seen:
        for batch in batches:
            plain_forward(model, batch)
    return {name: torch.cat(rows) for name, rows in seen.rows.items()}


def spectrum_of_outputs(weight, inputs):
    values = torch.linalg.svdvals(weight @ inputs.T)
    return torch.cat([values, values.new_zeros(max(min(weight.shape) - len(values), 0))])[: min(weight.shape)]


# The spectrum


@each_case
def test_it_is_the_spectrum_of_the_outputs(case):
    expected = spectrum_of_outputs(case.weight, case.inputs)
    moments = [case.gram]
    if case.weight.shape[0] < case.weight.shape[1]:
        moments.append(case.weight @ case.gram @ case.weight.T)
    for moment in moments:
        found = output_spectrum(case.weight, moment)
        assert found.dtype == torch.float64
        # squares carry the rounding of sums, relative to the largest
        torch.testing.assert_close(found.square(), expected.square(), rtol=0, atol=case.rounding)


def test_a_moment_in_single_precision_keeps_small_values_beside_an_outlier():
    weight, inputs = gaussian(12, 20, seed=0), gaussian(200, 20, seed=1)
    inputs[0] *= 1e3
    found = output_spectrum(weight.bfloat16(), reference.gram_matrix(inputs).float())
    expected = spectrum_of_outputs(weight.bfloat16().double(), inputs)
    assert float(expected[0] / expected[-1]) > 300
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)


# Of a model


@several
def test_profiles_are_those_of_all_outputs(name):
    model, request = FAMILIES[name].build(), config(name)
    targets = find_targets(model, request)
    inputs = inputs_of(model, targets.names, request.dataset)
    profiles = output_profiles(model, targets, request, Calibration(request.dataset, None))
    assert tuple(profiles) == targets.names
    for layer, profile in profiles.items():
        expected = spectrum_of_outputs(matrix(model, layer), inputs[layer])
        torch.testing.assert_close(profile.values, expected, rtol=1e-4, atol=1e-4 * float(expected[0]))


@pytest.mark.parametrize("solver", ["eigh", "als"])
def test_measurements_give_the_same_profiles(solver, tmp_path):
    request, model = config(solver=solver), FAMILIES["llama"].build()
    model.save_pretrained(tmp_path / "dense")
    PGSVDCompressor(request).measure_checkpoint(tmp_path / "dense", tmp_path / "stats")
    measured = config(solver=solver, dataset=str(tmp_path / "stats"))
    compress = PGSVDCompressor(measured)
    plan = compress.plan_checkpoint(tmp_path / "dense")
    assert [layer.rank for layer in compress.plan(model).layers] == [layer.rank for layer in plan.layers]
    compress.compress_checkpoint(tmp_path / "dense", tmp_path / "mine")
    report = PGSVDCompressor(request).compress(model)
    assert [layer.rank for layer in report.layers] == [layer.rank for layer in plan.layers]
    model.save_pretrained(tmp_path / "expected")
    mine, expected = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("mine", "expected"))
    assert mine == expected


def test_a_corrected_bias_makes_up_for_the_mean():
    name, layer = "gpt2", "transformer.h.0.mlp.c_fc"
    model, request = FAMILIES[name].build(), config(name, correct_bias=True)
    targets = find_targets(model, request)
    rows = inputs_of(model, [layer], request.dataset)[layer]
    values = output_profiles(model, targets, request, Calibration(request.dataset, None))[layer].values
    expected = spectrum_of_outputs(matrix(model, layer), rows - rows.mean(0))
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-4 * float(expected[0]))
    assert float(values.norm()) < 0.999 * float(spectrum_of_outputs(matrix(model, layer), rows).norm())


# The plan


@several
@pytest.mark.parametrize("reduction", ["0.2", "0.5"])
def test_one_tolerance_of_outputs_for_all(name, reduction):
    model, request = FAMILIES[name].build(), config(name, parameter_reduction=float(reduction))
    options, shapes = {}, {}
    with experts_apart(model):
        names = find_targets(model, request).names
        inputs = inputs_of(model, names, request.dataset)
        for layer in names:
            weight = matrix(model, layer)
            values = spectrum_of_outputs(weight, inputs[layer])
            errors = [float(values[rank:].norm() / values.norm()) for rank in range(len(values) + 1)]
            options[layer], shapes[layer] = reference.layer_options(*weight.shape, errors, 1), tuple(weight.shape)
    expected = reference.one_tolerance_for_all(options, reference.budget(shapes, reduction))
    report = PGSVDCompressor(request).compress(model)
    assert {layer.name: layer.rank for layer in report.layers} == {n: o.rank for n, o in expected.items()}
    worst = max(layer.activation_error for layer in report.layers if layer.rank is not None)
    # the closed form reaches what the plan allows, in every layer
    assert worst <= max(option.error for option in expected.values()) * 1.001


def test_the_plan_moves_with_the_inputs():
    """Positive control: the paper's plan does not."""
    batches = FAMILIES["llama"].batches(3)
    few = [{"input_ids": batch["input_ids"][:, :1].repeat(1, 20)} for batch in batches]
    ranks = {
        (allocation, kind): [
            layer.rank
            for layer in PGSVDCompressor(config(allocation=allocation, dataset=data))
            .compress(FAMILIES["llama"].build())
            .layers
        ]
        for allocation in ("pareto", "pareto_outputs")
        for kind, data in (("many", batches), ("few", few))
    }
    assert ranks["pareto", "many"] == ranks["pareto", "few"]
    assert ranks["pareto_outputs", "many"] != ranks["pareto_outputs", "few"]


def test_a_tolerance_of_outputs():
    model = FAMILIES["llama"].build()
    report = PGSVDCompressor(config(parameter_reduction=None, tolerance=0.3)).compress(model)
    errors = [layer.activation_error for layer in report.layers if layer.rank is not None]
    assert errors
    assert max(errors) <= 0.3 * 1.001


# What it needs


def test_there_is_no_plan_without_data(tmp_path):
    compressor = PGSVDCompressor(config())
    with pytest.raises(ConfigError, match="by outputs on a calibration set, .* give a folder of .*pgsvd measure"):
        compressor.plan(FAMILIES["llama"].build())
    FAMILIES["llama"].build().save_pretrained(tmp_path / "dense")
    with pytest.raises(ConfigError, match="only those of one block are known; measure it first"):
        compressor.compress_checkpoint(tmp_path / "dense", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_refused_requests():
    with pytest.raises(ConfigError, match="'pareto_outputs' measures outputs on a calibration set, and solver='svd'"):
        config(solver="svd")
    with pytest.raises(ConfigError, match="elastic=True needs .* measures no more than weights"):
        config(elastic=True)


def test_given_ranks_are_chosen_by_nothing():
    assert config(parameter_reduction=None, ranks={"*": 2}).profile is None
    assert config().profile == "outputs"
