"""Biases that make up for the mean error: the best there are together with their factors; nothing else changes."""

from __future__ import annotations

import filecmp
import os
from typing import Any

import pytest
import reference
import torch
from cases import CASES, Case, each_case, gaussian
from models import FAMILIES
from streamed import assert_same_checkpoint, in_memory, on_disk, request
from torch import Tensor, nn
from toys import Toy
from watch import Inputs, plain_forward

from optimum_pgsvd import PGSVDCompressor, PGSVDConfig
from optimum_pgsvd.calibration import AnchoredRecorder
from optimum_pgsvd.errors import CalibrationError, ConfigError
from optimum_pgsvd.factoring import Clock, InPlace, Job, factor
from optimum_pgsvd.linalg.anchor import RIDGE
from optimum_pgsvd.linalg.weighted import metric_root
from optimum_pgsvd.modeling_pgsvd import LowRankLayer, low_rank_layers, take_experts_apart
from optimum_pgsvd.planning import dense_weight, given_ranks
from optimum_pgsvd.report import LayerReport
from optimum_pgsvd.streaming import spill, weights
from optimum_pgsvd.streaming.workspace import Workspace
from optimum_pgsvd.targets import find_targets


NAME = "layers.0.dense"
BIASED = ("bart", "bert", "gpt2", "opt", "whisper", "clip", "gpt_oss")
# Relative to the energy of the inputs before their mean is taken off, which is what was summed; TIE_BREAK lets errors
# grow by 1e-10 of what the mean leaves.
ROUNDING = 1e-9

each_storage = pytest.mark.parametrize("storage", ["factors", "pivoted"])


class Alone(nn.Module):
    """A block that is a linear layer."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.dense = nn.Linear(*weight.shape[::-1], dtype=weight.dtype)
        self.dense.weight = nn.Parameter(weight)
        self.dense.bias = nn.Parameter(gaussian(len(weight), seed=99).to(weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x)


def factored(weight: Tensor, inputs: Tensor, rank: int, curvature: Any = None, **fields: Any) -> tuple[Any, Any]:
    """A layer, factored on these inputs, and its report."""
    model = Toy(Alone(weight.clone()))
    batches = [{"x": part[None] / 2} for part in inputs.split(7)]  # the model doubles its inputs
    config = PGSVDConfig(dataset=batches, num_samples=10**6, ranks={"*": rank}, **{"correct_bias": True, **fields})
    targets = find_targets(model, config)
    plan = given_ranks(targets.shapes, config.ranks)
    job = Job(model, targets, plan, batches, config, Clock(), InPlace(), gradients=curvature or {})  # type: ignore[arg-type]
    report = factor(job)[0][0]
    return model.layers[0].dense, report


def shifted(case: Case, by: float = 1.0) -> Tensor:
    """The inputs of a case with another mean in each feature."""
    return case.inputs + by * gaussian(1, case.inputs.shape[1], seed=77)


def outputs_of(weight: Tensor, inputs: Tensor) -> Tensor:
    return inputs.double() @ weight.double().T + gaussian(len(weight), seed=99).to(weight.dtype).double()


def squared_error(layer: LowRankLayer, weight: Tensor, inputs: Tensor) -> float:
    """Of the layer's outputs, its bias counted; multiplied in float64."""
    matrix = layer.matrix(torch.float64)
    bias: Any = layer.bias
    found = inputs.double() @ matrix.T + bias.detach().double()
    return reference.norm(found - outputs_of(weight, inputs)) ** 2


def energy_of(weight: Tensor, inputs: Tensor) -> float:
    return reference.norm(inputs.double() @ weight.double().T) ** 2 or 1.0


# Optimal


@each_storage
@each_case
def test_factors_and_bias_are_the_best_there_are(case: Case, storage: str) -> None:
    inputs = shifted(case)
    for rank in case.ranks:
        layer, _ = factored(case.weight, inputs, rank, storage=storage)
        least = reference.least_error_with_bias(inputs, outputs_of(case.weight, inputs), rank)
        error = squared_error(layer, case.weight, inputs)
        assert error == pytest.approx(least, rel=0, abs=ROUNDING * energy_of(case.weight, inputs))


@each_case
def test_als_stays_above_the_best_and_below_what_it_finds_without(case: Case) -> None:
    inputs = shifted(case)
    for rank in case.light_ranks:
        with_it, without = (
            squared_error(factored(case.weight, inputs, rank, solver="als", correct_bias=on)[0], case.weight, inputs)
            for on in (True, False)
        )
        least = reference.least_error_with_bias(inputs, outputs_of(case.weight, inputs), rank)
        rounding = ROUNDING * energy_of(case.weight, inputs)
        assert least - rounding <= with_it <= without + rounding


@each_case
def test_they_are_the_best_in_the_metric_of_the_loss(case: Case) -> None:
    m, n = case.weight.shape
    inputs, root = shifted(case), gaussian(m, m, seed=5)
    metric = root @ root.T
    for rank in case.light_ranks:
        if m <= n:
            curvature = metric
            floored = metric_root(metric)
        else:  # the metric is of the outputs that the weight can make
            curvature = case.weight.T @ metric @ case.weight
            inner = torch.linalg.pinv(case.weight)
            floored = inner.T @ metric_root(curvature)
        layer, _ = factored(case.weight, inputs, rank, {NAME: curvature}, objective="loss")
        goal = outputs_of(case.weight, inputs)
        bias: Any = layer.bias
        rest = goal - inputs @ layer.matrix(torch.float64).T - bias.detach()
        least = reference.least_error_with_bias(inputs, goal, rank, floored)
        scale = reference.norm(inputs @ case.weight.T @ floored) ** 2 or 1.0
        assert reference.norm(rest @ floored) ** 2 == pytest.approx(least, rel=0, abs=ROUNDING * scale)


@each_case
def test_the_error_never_exceeds_that_without(case: Case) -> None:
    """And the report has it as it is, in the same measure."""
    for inputs in (case.inputs, shifted(case, 0.1), shifted(case, 10.0)):
        for rank in case.ranks:
            layers = [factored(case.weight, inputs, rank, correct_bias=on) for on in (True, False)]
            energy = energy_of(case.weight, inputs)
            corrected, plain = (squared_error(layer, case.weight, inputs) for layer, _ in layers)
            assert corrected <= plain + ROUNDING * energy
            for (_, report), error in zip(layers, (corrected, plain), strict=True):
                assert report.activation_error**2 == pytest.approx(error / energy, rel=1e-6, abs=ROUNDING)


def test_where_inputs_have_a_large_mean_it_matters() -> None:
    """The control: a rank is spent on the mean without it, and outputs are off by what is left of that."""
    case = CASES[0]
    inputs = shifted(case, 10.0)
    corrected, plain = (
        squared_error(factored(case.weight, inputs, 2, correct_bias=on)[0], case.weight, inputs)
        for on in (True, False)
    )
    assert corrected < 0.95 * plain
    matrix = factored(case.weight, inputs, 2)[0].matrix(torch.float64)
    old_bias = reference.outputs_error(case.weight, matrix, inputs) ** 2
    assert corrected < 0.05 * old_bias  # the bias is what makes these factors good


@each_case
def test_inputs_without_a_mean_change_nothing(case: Case) -> None:
    inputs = torch.cat([case.inputs, -case.inputs])
    rank = case.light_ranks[-1]
    corrected, plain = (factored(case.weight, inputs, rank, correct_bias=on)[0] for on in (True, False))
    found, expected = (inputs @ layer.matrix(torch.float64).T + layer.bias for layer in (corrected, plain))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(corrected.bias, plain.bias, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_storage
def test_the_bias_fits_the_factors_as_stored_and_is_rounded_once(storage: str, dtype: torch.dtype) -> None:
    weight, inputs = CASES[1].weight.to(dtype), shifted(CASES[1]).to(dtype)
    layer, report = factored(weight, inputs, 6, storage=storage)
    mean = inputs.double().mean(0)
    exact = gaussian(len(weight), seed=99).to(dtype).double()
    exact += (weight.double() - layer.matrix(torch.float64)) @ mean
    assert layer.bias.dtype == dtype
    assert torch.equal(layer.bias, exact.to(dtype))
    error = squared_error(layer, weight, inputs) / energy_of(weight, inputs)
    assert report.activation_error == pytest.approx(error**0.5, rel=1e-3)


@pytest.mark.parametrize("inputs", [gaussian(1, 24, seed=4), gaussian(1, 24, seed=4).expand(40, 24)], ids=["1", "40"])
def test_one_input_over_and_over_says_nothing_of_a_bias(inputs: Tensor) -> None:
    corrected, plain = (factored(CASES[0].weight, inputs, 4, correct_bias=on) for on in (True, False))
    assert not corrected[1].bias_corrected
    assert torch.equal(corrected[0].matrix(torch.float64), plain[0].matrix(torch.float64))
    assert torch.equal(corrected[0].bias, plain[0].bias)


# Anchored


def recorded(weight: Tensor, dense: Tensor, compressed: Tensor, blend: float) -> AnchoredRecorder:
    layer = nn.Linear(*weight.shape[::-1], dtype=torch.float64)
    recorder = AnchoredRecorder({"layer": layer}, lambda x, values: values, None, blend)
    for rows, pairing in ((dense, "dense"), (compressed, "compressed")):
        recorder.pairing = pairing
        with recorder:
            for part in rows.split(7):
                layer(part)
    return recorder


@pytest.mark.parametrize("blend", [0.0, 0.5, 1.0])
@each_case
def test_anchored_calibration_aims_at_the_outputs_with_a_free_bias(case: Case, blend: float) -> None:
    dense = shifted(case)
    compressed = dense + 0.1 * gaussian(*dense.shape, seed=3) + 0.3
    recorder = recorded(case.weight, dense, compressed, blend)
    deviations = compressed - compressed.mean(0)
    ridge = RIDGE * float(deviations.square().sum(0).mean())
    goal, bias = reference.anchored_weight_and_bias(case.weight, dense, compressed, blend, ridge)
    found, means = recorder.goal("layer", case.weight, True), recorder.means("layer")
    torch.testing.assert_close(found, goal, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(case.weight @ means.anchors - goal @ means.inputs, bias, rtol=1e-7, atol=1e-7)


def test_anchored_to_its_own_inputs_a_layer_aims_at_its_own_weight() -> None:
    for case in CASES:
        inputs = shifted(case)
        recorder = recorded(case.weight, inputs, inputs, 1.0)
        torch.testing.assert_close(recorder.goal("layer", case.weight, True), case.weight, rtol=0, atol=1e-9)
        assert torch.equal(recorder.means("layer").anchors, recorder.means("layer").inputs)


# Whole models


def compressed(name: str, **fields: Any) -> tuple[Any, dict[str, LayerReport]]:
    model = FAMILIES[name].build()
    config = PGSVDConfig(**{"parameter_reduction": 0.4, "dataset": FAMILIES[name].batches(3), **fields})
    report = PGSVDCompressor(config).compress(model)
    return model, {layer.name: layer for layer in report.layers if layer.rank is not None}


@each_storage
@pytest.mark.parametrize("name", BIASED)
def test_errors_are_smaller_and_outputs_have_their_mean(name: str, storage: str) -> None:
    model, corrected = compressed(name, correct_bias=True, storage=storage)
    _, plain = compressed(name, storage=storage)
    dense = FAMILIES[name].build()
    take_experts_apart(dense)
    layers = low_rank_layers(model)
    chosen = [each for each in corrected if corrected[each].bias_corrected]
    assert chosen == [each for each in corrected if layers[each].bias is not None]
    assert len(chosen) > 5
    with Inputs(dense, chosen) as inputs:
        for batch in FAMILIES[name].batches(3):
            plain_forward(dense, batch)
    for each in chosen:
        assert corrected[each].activation_error < plain[each].activation_error * (1 + 1e-6)
        x, before, after = torch.cat(inputs.rows[each]), dense.get_submodule(each), layers[each]
        if len(x) != corrected[each].tokens:
            continue  # with padding, which counts elsewhere
        wanted = x.mean(0) @ dense_weight(dense, each).double().T + before.bias.detach().double()
        bias: Any = after.bias
        found = x.mean(0) @ after.matrix(torch.float64).T + bias.detach().double()
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("calibration", ["parallel", "anchored"])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_model_without_biases_stays_as_it_is(name: str, calibration: str) -> None:
    found, expected = (compressed(name, correct_bias=on, calibration=calibration)[0] for on in (True, False))
    assert found.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in found.state_dict().items())


def test_layers_without_a_bias_stay_as_they_are_beside_others() -> None:
    """Whisper's keys have none, though they share their inputs with queries and values."""
    corrected, plain = (compressed("whisper", correct_bias=on)[0].state_dict() for on in (True, False))
    keys = [key for key in plain if ".k_proj." in key]
    assert len(keys) > 4
    assert all(torch.equal(corrected[key], plain[key]) for key in keys)
    assert not torch.equal(*(state["model.encoder.layers.0.fc1.left.bias"] for state in (corrected, plain)))


def test_a_bias_that_two_modules_share_stays() -> None:
    model = FAMILIES["bert"].build()
    first, second = (model.bert.encoder.layer[i].intermediate.dense for i in (0, 1))
    second.bias = first.bias
    config = PGSVDConfig(0.4, dataset=FAMILIES["bert"].batches(2), correct_bias=True)
    before = first.bias.detach().clone()
    report = PGSVDCompressor(config).compress(model)
    assert {layer.name for layer in report.layers if layer.rank and not layer.bias_corrected} == {
        f"bert.encoder.layer.{i}.intermediate.dense" for i in (0, 1)
    }
    assert torch.equal(model.bert.encoder.layer[1].intermediate.dense.bias, before)


def test_the_dense_bias_is_not_touched_and_training_goes_on() -> None:
    model = FAMILIES["gpt2"].build()
    dense = model.transformer.h[0].mlp.c_fc
    before, trained = dense.bias.detach().clone(), dense.bias.requires_grad
    config = PGSVDConfig(0.4, dataset=FAMILIES["gpt2"].batches(2), correct_bias=True)
    PGSVDCompressor(config).compress(model)
    after = model.transformer.h[0].mlp.c_fc.bias
    assert torch.equal(dense.bias, before)
    assert not torch.equal(after, before)
    assert isinstance(after, nn.Parameter)
    assert after.requires_grad == trained


@each_storage
@pytest.mark.parametrize("name", ["gpt2", "whisper", "bert"])
def test_saved_it_loads_as_it_was(name: str, storage: str, tmp_path) -> None:
    model, _ = compressed(name, correct_bias=True, storage=storage, calibration="anchored")
    model.save_pretrained(tmp_path)
    loaded = FAMILIES[name].model_class.from_pretrained(tmp_path)
    assert loaded.config.quantization_config.correct_bias is True
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_an_adapter_begins_where_the_compressed_model_is() -> None:
    peft = pytest.importorskip("peft")
    model, _ = compressed("gpt2", correct_bias=True)
    batch = FAMILIES["gpt2"].batches(1)[0]
    before = model(**batch).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert torch.equal(adapted.eval()(**batch).logits, before)


def test_ranks_and_factors_by_the_loss() -> None:
    """All that is measured for ranks is about the mean too; refinement starts from what is corrected."""
    best = {"allocation": "loss", "objective": "loss", "calibration": "anchored", "storage": "pivoted"}
    _, layers = compressed("bart", correct_bias=True, refine_steps=3, **best)
    assert all(layer.bias_corrected for layer in layers.values())
    assert all(0 < layer.activation_error < 1 for layer in layers.values())


# On disk


@pytest.fixture
def all_is_large(monkeypatch):
    monkeypatch.setattr(weights, "LARGE", 0)
    monkeypatch.setattr(spill, "SMALLEST", 1)
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.mark.usefixtures("all_is_large")
@pytest.mark.parametrize("calibration", ["parallel", "anchored"])
@pytest.mark.parametrize(("name", "storage"), [("gpt2", "factors"), ("whisper", "pivoted"), ("bert", "factors")])
def test_the_same_bytes_from_a_checkpoint_on_disk(name: str, storage: str, calibration: str, tmp_path) -> None:
    FAMILIES[name].build().save_pretrained(tmp_path / "dense")
    config = request(FAMILIES[name], calibration=calibration, storage=storage, correct_bias=True)
    expected = in_memory(tmp_path / "dense", tmp_path / "expected", config)
    assert_same_checkpoint(on_disk(tmp_path / "dense", tmp_path / "mine", config), expected)


@pytest.mark.usefixtures("all_is_large")
@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize(
    ("calibration", "storage"), [("parallel", "factors"), ("anchored", "factors"), ("anchored", "pivoted")]
)
def test_a_run_that_was_killed_goes_on(number: int, calibration: str, storage: str, tmp_path, monkeypatch) -> None:
    FAMILIES["gpt2"].build(n_layer=3).save_pretrained(tmp_path / "dense")
    config = request(FAMILIES["gpt2"], calibration=calibration, storage=storage, correct_bias=True)
    expected = in_memory(tmp_path / "dense", tmp_path / "expected", config)
    keep, calls = Workspace.keep_block, []

    def killed(*args: Any) -> None:
        keep(*args)
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "keep_block", killed)
        with pytest.raises(KeyboardInterrupt):
            on_disk(tmp_path / "dense", tmp_path / "mine", config)
    assert_same_checkpoint(on_disk(tmp_path / "dense", tmp_path / "mine", config), expected)


@pytest.mark.parametrize("name", ["gpt2", "whisper"])
def test_measurements_serve_it(name: str, tmp_path) -> None:
    FAMILIES[name].build().save_pretrained(tmp_path / "dense")
    config = request(FAMILIES[name], correct_bias=True)
    PGSVDCompressor(config).measure_checkpoint(tmp_path / "dense", tmp_path / "stats")
    for dataset, folder in ((config.dataset, "data"), (tmp_path / "stats", "measured")):
        PGSVDCompressor(request(FAMILIES[name], correct_bias=True, dataset=dataset)).compress_checkpoint(
            tmp_path / "dense", tmp_path / folder
        )
    assert filecmp.cmp(*(tmp_path / each / "model.safetensors" for each in ("data", "measured")), shallow=False)


def test_measurements_of_inputs_serve_both(tmp_path) -> None:
    """Those that solver='als' needs."""
    FAMILIES["gpt2"].build().save_pretrained(tmp_path / "dense")
    PGSVDCompressor(request(FAMILIES["gpt2"], solver="als")).measure_checkpoint(tmp_path / "dense", tmp_path / "stats")
    for on in (True, False):
        found, expected = (
            compressed("gpt2", correct_bias=on, solver="als", dataset=data)[0].state_dict()
            for data in (tmp_path / "stats", FAMILIES["gpt2"].batches(3))
        )
        assert all(torch.equal(value, expected[key]) for key, value in found.items())


def test_measurements_of_outputs_cannot_serve_it(tmp_path) -> None:
    FAMILIES["gpt2"].build().save_pretrained(tmp_path / "dense")
    PGSVDCompressor(request(FAMILIES["gpt2"])).measure_checkpoint(tmp_path / "dense", tmp_path / "stats")
    with pytest.raises(
        CalibrationError, match=r"no mean of the inputs of transformer\.h\.0\.mlp\.c_proj.*correct_bias"
    ):
        compressed("gpt2", correct_bias=True, dataset=tmp_path / "stats")


# Refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"solver": "svd"}, "correct_bias=True needs the mean.*solver='svd' uses no data; use solver='eigh'"),
        ({"elastic": True}, "elastic=True needs correct_bias=False: a corrected bias fits one rank"),
        ({"correct_bias": "yes"}, "correct_bias='yes' must be True or False"),
    ],
)
def test_what_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PGSVDConfig(0.3, **{"correct_bias": True, **fields})
