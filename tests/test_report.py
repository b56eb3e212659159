"""The report: what it says is what was done, counted and computed anew from the model itself."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from models import FAMILIES, Batch, Family, each_family
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from watch import Inputs, plain_forward

from optimum_pgsvd import CompressionReport, PGSVDCompressor, PGSVDConfig
from optimum_pgsvd.modeling_pgsvd import LowRankLayer, LowRankLinear, take_experts_apart
from optimum_pgsvd.report import REPORT_NAME
from optimum_pgsvd.targets import find_targets


several = pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "clip", "gemma3", "albert", "mixtral"])
# Every linear of a model, inside the blocks and outside.
EVERYTHING = {"*": {"parameter_reduction": 0.3}}


def compress(model: PreTrainedModel, batches: list[Batch], **fields: Any) -> CompressionReport:
    return PGSVDCompressor(PGSVDConfig(**{"parameter_reduction": 0.3, "dataset": batches} | fields)).compress(model)


def compressed(name: str, **fields: Any) -> tuple[PreTrainedModel, PreTrainedModel, CompressionReport]:
    """The dense model, the compressed model and the report."""
    dense = FAMILIES[name].build()
    model = copy.deepcopy(dense)
    take_experts_apart(dense)
    return dense, model, compress(model, FAMILIES[name].batches(2), **fields)


def matrix(module: nn.Module) -> Tensor:
    """The weight of a linear or Conv1D, outputs first."""
    return (module.weight.T if isinstance(module, Conv1D) else module.weight).detach()


def product(layer: LowRankLayer) -> Tensor:
    return layer.matrix(torch.float64).detach()


# Sizes


def weights_in(module: nn.Module) -> int:
    """Parameters of a layer but for its bias."""
    return sum(p.numel() for name, p in module.named_parameters() if not name.endswith("bias"))


@several
def test_sizes_are_those_of_the_models(name: str) -> None:
    dense, model, report = compressed(name)
    for layer in report.layers:
        assert layer.parameters_before == weights_in(dense.get_submodule(layer.name))
        assert layer.parameters_after == weights_in(model.get_submodule(layer.name))
        assert layer.shape == tuple(matrix(dense.get_submodule(layer.name)).shape)
    for size, of in ((report.model_before, dense), (report.model_after, model)):
        assert size.parameters == sum(p.numel() for p in of.parameters())
        assert size.bytes == 4 * size.parameters
    assert report.parameters_before == sum(layer.parameters_before for layer in report.layers)
    removed = sum(layer.parameters_before - layer.parameters_after for layer in report.layers)
    assert report.parameter_reduction == pytest.approx(removed / report.parameters_before, rel=1e-12)
    assert report.model_before.parameters - report.model_after.parameters == removed > 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_sizes_in_pivoted_storage(name: str) -> None:
    """Four bytes more for each output: where its row is. They are no parameters."""
    dense, model, report = compressed(name, storage="pivoted")
    planned = PGSVDCompressor(PGSVDConfig(parameter_reduction=0.3, storage="pivoted")).plan(dense)
    for layer in report.layers:
        assert layer.parameters_after == weights_in(model.get_submodule(layer.name))
    after = report.model_after
    assert after.parameters == sum(p.numel() for p in model.parameters())
    rows = sum(layer.shape[0] for layer in report.layers if layer.rank is not None)
    assert after.bytes == 4 * after.parameters + 4 * rows
    assert planned.model_after == after
    assert [layer.rank for layer in planned.layers] == [layer.rank for layer in report.layers]


@several
def test_ranks_are_those_of_the_model(name: str) -> None:
    _, model, report = compressed(name)
    found = {name: module.rank for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    assert {layer.name: layer.rank for layer in report.layers if layer.rank is not None} == found
    for layer in report.layers:
        assert layer.rank is not None or isinstance(model.get_submodule(layer.name), (nn.Linear, Conv1D))


def test_tied_tensors_are_counted_once() -> None:
    model = FAMILIES["llama"].build()
    untied = sum(p.numel() for p in model.parameters())
    model.lm_head.weight = model.model.embed_tokens.weight
    report = PGSVDCompressor(PGSVDConfig(tolerance=0.5)).plan(model)
    assert report.model_before.parameters == untied - model.lm_head.weight.numel()


def test_bytes_of_a_model_in_two_dtypes() -> None:
    model = FAMILIES["llama"].build()
    model.model.layers.to(torch.bfloat16)
    planned = PGSVDCompressor(PGSVDConfig(parameter_reduction=0.3)).plan(model)
    report = compress(model, [], solver="svd", dataset=None)
    for size in (planned.model_after, report.model_after):
        assert size.bytes == sum(p.numel() * p.element_size() for p in model.parameters())
    assert planned.model_before == report.model_before


# Errors


def own_errors(dense: PreTrainedModel, model: PreTrainedModel, inputs: Inputs, name: str) -> tuple[float, float]:
    """Relative errors on weights and on outputs, from the factors as the model holds them."""
    weight, approximation = matrix(dense.get_submodule(name)), product(model.get_submodule(name))
    x = torch.cat(inputs.rows[name])
    outputs, difference = x @ weight.double().T, x @ (weight.double() - approximation).T
    return reference.relative_weight_error(weight, approximation), float(difference.norm() / outputs.norm())


@several
@pytest.mark.parametrize(
    ("solver", "storage"), [("eigh", "factors"), ("als", "factors"), ("svd", "factors"), ("eigh", "pivoted")]
)
def test_errors_are_those_of_the_factors(name: str, solver: str, storage: str) -> None:
    """Activation errors come from float32 products: a square of less than 1e-9 of the whole cannot be told from 0."""
    batches = FAMILIES[name].batches(2)
    dense, model, report = compressed(name, solver=solver, storage=storage, groups=EVERYTHING)
    factored = {layer.name: layer for layer in report.layers if layer.rank is not None}
    with Inputs(dense, factored) as inputs:
        for batch in batches:
            plain_forward(dense, batch)
    for layer in factored.values():
        weight_error, activation_error = own_errors(dense, model, inputs, layer.name)
        assert layer.weight_error == pytest.approx(weight_error, rel=1e-9)
        if solver == "svd":
            assert (layer.activation_error, layer.tokens) == (None, 0)
        else:
            assert layer.activation_error == pytest.approx(activation_error, rel=1e-4, abs=5e-5)
            assert layer.tokens == len(torch.cat(inputs.rows[layer.name]))


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "llava"])
def test_the_closed_form_has_the_least_error(name: str) -> None:
    """So every layer was solved with the inputs that are its own; plain SVD, on these, is not that good."""
    batches = FAMILIES[name].batches(3)
    dense = FAMILIES[name].build()
    report = compress(copy.deepcopy(dense), batches)
    with Inputs(dense, [layer.name for layer in report.layers]) as inputs:
        for batch in batches:
            plain_forward(dense, batch)
    for layer in report.layers:
        x, weight = torch.cat(inputs.rows[layer.name]), matrix(dense.get_submodule(layer.name))
        size = reference.norm(x @ weight.double().T)
        least = reference.least_outputs_error(weight, x, layer.rank) / size
        assert layer.activation_error == pytest.approx(least, rel=1e-4)
        assert reference.outputs_error(weight, reference.truncated(weight, layer.rank), x) / size > 1.02 * least


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_errors_in_half_precision_are_those_of_the_rounded_factors(dtype: torch.dtype) -> None:
    dense = FAMILIES["llama"].build().to(dtype)
    model = copy.deepcopy(dense)
    report = compress(model, FAMILIES["llama"].batches(2))
    layers = [layer for layer in report.layers if layer.rank is not None]
    assert len(layers) > 5
    for layer in layers:
        weight, approximation = matrix(dense.get_submodule(layer.name)), product(model.get_submodule(layer.name))
        # Summed in float32.
        assert layer.weight_error == pytest.approx(reference.relative_weight_error(weight, approximation), rel=1e-6)


def test_dense_layers_have_no_error() -> None:
    _, _, report = compressed("llama", parameter_reduction=None, ranks={"q_proj": 4})
    dense = [layer for layer in report.layers if layer.rank is None]
    assert len(dense) == 12
    for layer in dense:
        assert (layer.weight_error, layer.activation_error) == (0.0, 0.0)
        assert layer.parameters_after == layer.parameters_before


def test_a_layer_with_nothing_left_out_has_no_error() -> None:
    """Factors of full rank, rounded to float32."""
    _, _, report = compressed("llama", parameter_reduction=None, ranks={"q_proj": 32})
    for layer in report.layers:
        assert layer.weight_error == pytest.approx(0, abs=1e-6)
        assert layer.activation_error == pytest.approx(0, abs=1e-6)


# A plan and what came of it


@each_family
def test_plan_and_compress_agree(family: Family) -> None:
    model, batches = family.build(), family.batches(2)
    config = PGSVDConfig(parameter_reduction=0.3, dataset=batches)
    planned = PGSVDCompressor(config).plan(model)
    report = PGSVDCompressor(config).compress(model)
    assert [in_plan(layer) for layer in planned.layers] == [in_plan(layer) for layer in report.layers]
    for field in ("skipped", "model_before", "model_after", "parameter_reduction", "environment", "config"):
        assert getattr(planned, field) == getattr(report, field), field


def in_plan(layer: Any) -> Any:
    return replace(layer, weight_error=None, activation_error=None, tokens=0, seconds=0.0)


@several
def test_a_plan_touches_nothing(name: str) -> None:
    model = FAMILIES[name].build()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    PGSVDCompressor(PGSVDConfig(parameter_reduction=0.3)).plan(model)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert model.config.to_dict() == config
    assert not any(isinstance(module, LowRankLinear) for module in model.modules())


def test_planned_errors() -> None:
    model = FAMILIES["llama"].build()
    report = PGSVDCompressor(PGSVDConfig(parameter_reduction=0.3)).plan(model)
    for layer in report.layers:
        assert layer.rank is not None
        expected = reference.truncation_error(matrix(model.get_submodule(layer.name)), layer.rank)
        assert layer.weight_error == pytest.approx(expected, abs=1e-9)
        assert (layer.activation_error, layer.tokens, layer.seconds) == (None, 0, 0.0)


def test_the_svd_solver_has_the_planned_errors() -> None:
    planned = PGSVDCompressor(PGSVDConfig(parameter_reduction=0.3)).plan(FAMILIES["llama"].build())
    report = compress(FAMILIES["llama"].build(), [], solver="svd", dataset=None)
    for layer, plan in zip(report.layers, planned.layers, strict=True):
        assert layer.weight_error == pytest.approx(plan.weight_error, rel=1e-5)


def test_tolerance_and_group_of_each_layer() -> None:
    report = PGSVDCompressor(
        PGSVDConfig(tolerance=0.4, groups={"mlp": {"tolerance": 0.2}, "q_proj": {"parameter_reduction": 0.5}})
    ).plan(FAMILIES["llama"].build())
    for layer in report.layers:
        group = "mlp" if "mlp" in layer.name else "q_proj" if "q_proj" in layer.name else ""
        assert layer.group == group
        assert layer.weight_error <= layer.tolerance
        assert group == "q_proj" or layer.tolerance == {"": 0.4, "mlp": 0.2}[group]


# What is written down


def test_provenance() -> None:
    """The config is the request, not the result; what cannot be stored is described."""
    batches = FAMILIES["llama"].batches(3)
    _, model, report = compressed("llama", dataset=batches, num_samples=8)
    assert report.config["ranks"] is None
    assert report.config["format_version"] is None
    assert report.config["parameter_reduction"] == 0.3
    assert report.config["dataset"] == "list of 3 dict"
    assert report.calibration == {"batches": 2, "tokens": 160}
    assert set(report.seconds) >= {"data", "plan", "survey", "grams", "factors"}
    assert report.environment["torch"] == torch.__version__
    assert model.config.quantization_config.ranks == {
        layer.name: layer.rank for layer in report.layers if layer.rank is not None
    }


def reports() -> dict[str, CompressionReport]:
    """Of every kind: compressed, planned, with notes, with ranks, groups and dense layers."""
    return {
        "compressed": compressed("llama")[2],
        "few tokens": compress(FAMILIES["llama"].build(), [FAMILIES["llama"].batches(1)[0]["input_ids"][:1]]),
        "ranks": compressed("t5", parameter_reduction=None, ranks={"q": 4})[2],
        "groups": compressed("llava", groups={"multi_modal_projector": {"tolerance": 0.5}})[2],
        "planned": PGSVDCompressor(PGSVDConfig(tolerance=0.5)).plan(FAMILIES["bert"].build()),
        "no data": compress(FAMILIES["gpt2"].build(), [], solver="svd", dataset=None),
    }


def test_round_trips(tmp_path) -> None:
    for name, report in reports().items():
        values = json.loads(json.dumps(report.to_dict()))
        assert CompressionReport.from_dict(values) == report, name
        path = report.save(tmp_path)
        assert path == str(tmp_path / REPORT_NAME)
        assert CompressionReport.load(tmp_path) == report, name


def test_the_file_holds_the_totals(tmp_path) -> None:
    _, _, report = compressed("llama")
    values = json.loads(Path(report.save(tmp_path)).read_text(encoding="utf-8"))
    assert values["targets"] == {
        "parameters_before": report.parameters_before,
        "parameters_after": report.parameters_after,
        "parameter_reduction": report.parameter_reduction,
    }
    assert values["model_after"]["bytes"] == report.model_after.bytes
    assert [layer["name"] for layer in values["layers"]] == [layer.name for layer in report.layers]


def test_the_report_beside_the_checkpoint(tmp_path) -> None:
    dense, model, report = compressed("llama")
    model.save_pretrained(tmp_path)
    loaded, tensors = CompressionReport.load(tmp_path), load_file(tmp_path / "model.safetensors")
    assert loaded == report
    for layer in loaded.layers:
        left, right = (tensors[f"{layer.name}.{factor}.weight"].double() for factor in ("left", "right"))
        assert left.shape[1] == right.shape[0] == layer.rank
        assert left.numel() + right.numel() == layer.parameters_after
        weight_error = reference.relative_weight_error(matrix(dense.get_submodule(layer.name)), left @ right)
        assert layer.weight_error == pytest.approx(weight_error, rel=1e-9)


# What is printed


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_every_layer_and_every_reason_is_printed(family: Family) -> None:
    report = PGSVDCompressor(PGSVDConfig(parameter_reduction=0.3)).plan(family.build())
    lines = str(report).splitlines()
    for layer in report.layers:
        (line,) = (line for line in lines if layer.name in line.split())
        cells = [cell.strip() for cell in line.split("│")]
        assert f"{layer.shape[0]} × {layer.shape[1]}" in cells
        assert (str(layer.rank) if layer.rank else "dense") in cells
        assert f"{layer.parameters_before:,}" in cells
        assert f"{layer.parameters_after:,}" in cells
    for name, reason in report.skipped.items():
        assert f"skipped {name}: {reason}" in lines


def test_errors_notes_and_totals_are_printed() -> None:
    report = reports()["few tokens"]
    text = str(report)
    for layer in report.layers:
        assert f"{layer.weight_error:.4f}" in text
        assert f"{layer.activation_error:.4f}" in text
    assert f"note: {report.notes[0]}" in text.splitlines()
    before, after = report.model_before, report.model_after
    share = 1 - after.parameters / before.parameters
    for total in (
        f"targets: {report.parameters_before:,} → {report.parameters_after:,} parameters, "
        f"{report.parameter_reduction:.2%} removed",
        f"model:   {before.parameters:,} → {after.parameters:,} parameters, {share:.2%} removed",
        f"bytes:   {before.bytes:,} → {after.bytes:,}, {share:.2%} removed",
    ):
        assert total in report.summary().splitlines()
        assert total in text.splitlines()


def test_the_report_of_nothing_but_dense_layers() -> None:
    dense, model, report = compressed("llama", parameter_reduction=None, tolerance=0.0)
    assert {layer.rank for layer in report.layers} == {None}
    assert report.parameter_reduction == 0
    assert report.model_before == report.model_after
    torch.testing.assert_close(dict(model.state_dict()), dict(dense.state_dict()), rtol=0, atol=0)


def test_targets_are_the_layers() -> None:
    dense, _, report = compressed("bert")
    assert tuple(layer.name for layer in report.layers) == find_targets(dense, PGSVDConfig(tolerance=0.5)).names
