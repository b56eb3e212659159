"""The solvers of other papers on whole models: what they are told is what autograd and plain forward passes say."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import transformers as hf
from models import FAMILIES, GROUPED, PAD, Batch, text_family
from streamed import assert_same_checkpoint, in_memory, on_disk, request
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from watch import Inputs, plain_forward

from optimum_pgsvd import (
    CalibrationError,
    CompressionReport,
    ConfigError,
    NonFiniteError,
    PGSVDCompressor,
    PGSVDConfig,
)
from optimum_pgsvd.calibration import measure_gradient_energies
from optimum_pgsvd.calibration.gradients import samples
from optimum_pgsvd.linalg.anchor import RIDGE
from optimum_pgsvd.modeling_pgsvd import low_rank_layers
from optimum_pgsvd.replace import experts_apart
from optimum_pgsvd.targets import find_targets


BASELINES = ("asvd", "fwsvd", "svd_llm")
each_baseline = pytest.mark.parametrize("solver", BASELINES)
# Those that need no gradients.
each_measured = pytest.mark.parametrize("solver", ["asvd", "svd_llm"])


def targets_of(model: PreTrainedModel) -> dict[str, nn.Module]:
    return {name: model.get_submodule(name) for name in find_targets(model, PGSVDConfig(tolerance=0.5)).names}


def weight_of(model: nn.Module, name: str) -> Tensor:
    """Outputs first, float64."""
    module: Any = model.get_submodule(name)
    return (module.weight.T if isinstance(module, Conv1D) else module.weight).detach().double()


def inputs_of(model: PreTrainedModel, names: list[str], batches: list[Batch]) -> dict[str, Tensor]:
    with Inputs(model, names) as seen:
        for batch in batches:
            plain_forward(model, batch)
    return {name: torch.cat(rows) for name, rows in seen.rows.items()}


def one_by_one(batch: Batch) -> list[Batch]:
    rows = len(next(iter(batch.values())))
    return [{key: value[row : row + 1] for key, value in batch.items()} for row in range(rows)]


def plain_energies(model: PreTrainedModel, batches: list[Batch]) -> dict[str, Tensor]:
    """Squared gradients of the loss of each sequence on its own, summed over the outputs of each layer."""
    found = {}
    losses = [model(**{"labels": one.get("input_ids"), **one}).loss for b in batches for one in one_by_one(b)]
    for name, layer in targets_of(model).items():
        squares = reference.squared_gradients(losses, layer.weight)  # type: ignore[arg-type]
        found[name] = squares.sum(1) if isinstance(layer, Conv1D) else squares.sum(0)
    return found


# Gradients of weights


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "qwen3_moe", "t5"])
def test_energies_are_those_of_each_sequence(name: str) -> None:
    model, batches = FAMILIES[name].build(), FAMILIES[name].batches(2)
    if name == "t5":
        batches = [{"input_ids": b["input_ids"], "labels": b["decoder_input_ids"]} for b in batches]
    with experts_apart(model):
        found = measure_gradient_energies(model, targets_of(model), batches)
        expected = plain_energies(model, batches)
    assert list(found) == list(expected)
    assert any(".experts.1." in layer for layer in found) == (name in ("mixtral", "qwen3_moe"))
    for layer, energies in found.items():
        torch.testing.assert_close(energies, expected[layer], rtol=1e-3, atol=1e-5 * float(expected[layer].max()))


def test_a_weight_that_is_used_twice_has_one_gradient() -> None:
    """ALBERT runs one block again and again."""
    family = FAMILIES["albert"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = hf.AlbertForMaskedLM(family.config()).eval()
    batches = [{**batch, "labels": batch["input_ids"]} for batch in family.batches(1)]
    found, expected = measure_gradient_energies(model, targets_of(model), batches), plain_energies(model, batches)
    for layer, energies in found.items():
        torch.testing.assert_close(energies, expected[layer], rtol=1e-3, atol=1e-5 * float(expected[layer].max()))


def test_how_sequences_are_batched_does_not_matter() -> None:
    """The square of a sum is not the sum of squares: a batch's own gradient would give others."""
    model, batches = FAMILIES["llama"].build(), FAMILIES["llama"].batches(2)
    layers = targets_of(model)
    together = measure_gradient_energies(model, layers, batches)
    apart = measure_gradient_energies(model, layers, [one for batch in batches for one in one_by_one(batch)])
    for name in layers:
        torch.testing.assert_close(together[name], apart[name], rtol=1e-6, atol=0)
    summed = reference.squared_gradients(
        [model(**batch, labels=batch["input_ids"]).loss for batch in batches], model.model.layers[0].mlp.up_proj.weight
    ).sum(0)
    assert not torch.allclose(summed, together["model.layers.0.mlp.up_proj"], rtol=0.2)


def test_padding_is_no_label() -> None:
    model, (batch,) = FAMILIES["llama"].build(), FAMILIES["llama"].batches(1)
    ids, layers = batch["input_ids"], targets_of(model)
    padding = torch.full((len(ids), 7), PAD)
    mask = torch.cat([torch.ones_like(ids), torch.zeros_like(padding)], dim=1)
    padded = {"input_ids": torch.cat([ids, padding], dim=1), "attention_mask": mask}
    found, expected = (measure_gradient_energies(model, layers, [b]) for b in (padded, batch))
    for name in layers:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-12)


def test_what_a_sample_is() -> None:
    ids = torch.arange(6).reshape(3, 2)
    apart = samples({"input_ids": ids, "attention_mask": ids, "output_attentions": False})
    assert [sample["input_ids"].tolist() for sample in apart] == [[[0, 1]], [[2, 3]], [[4, 5]]]
    assert all(sample["output_attentions"] is False for sample in apart)
    patches = {"input_ids": ids, "pixel_values": torch.zeros(12, 4)}
    assert len(samples(patches)) == 1
    assert len(samples({"input_ids": ids, "pixel_values": ids, "return_loss": True})) == 1


def test_the_model_is_left_as_it_was() -> None:
    model, batches = FAMILIES["llama"].build().train(), FAMILIES["llama"].batches(1)
    model.model.norm.weight.requires_grad_(False)
    model(**batches[0], labels=batches[0]["input_ids"]).loss.backward()
    before = {
        n: (p.requires_grad, None if p.grad is None else p.grad.clone(), p.detach().clone())
        for n, p in model.named_parameters()
    }
    measure_gradient_energies(model, targets_of(model), batches)
    for failing in ([{"input_ids": torch.tensor([[10**6]])}], [{"nothing": torch.zeros(1)}]):
        with pytest.raises((CalibrationError, IndexError)):
            measure_gradient_energies(model, targets_of(model), failing)
    assert all(module.training for module in model.modules())
    for name, parameter in model.named_parameters():
        requires, gradient, value = before[name]
        assert parameter.requires_grad == requires
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)
        assert torch.equal(parameter, value)
        assert not parameter._post_accumulate_grad_hooks


def test_a_model_without_a_loss_is_refused() -> None:
    config = PGSVDConfig(parameter_reduction=0.3, solver="fwsvd", dataset=FAMILIES["bert"].batches(2))
    with pytest.raises(
        CalibrationError, match="BertForMaskedLM gives no loss for calibration batch 0, which has no labels"
    ):
        PGSVDCompressor(config).compress(FAMILIES["bert"].build())


def test_a_contrastive_loss_is_of_the_whole_batch() -> None:
    clip, batches = FAMILIES["clip"], FAMILIES["clip"].batches(2)
    dataset = [{**batch, "return_loss": True} for batch in batches]
    model = clip.build()
    found = measure_gradient_energies(model, targets_of(model), dataset)
    losses = [model(**batch).loss for batch in dataset]
    for name, layer in targets_of(model).items():
        plain = reference.squared_gradients(losses, layer.weight).sum(0)  # type: ignore[arg-type]
        torch.testing.assert_close(found[name], plain, rtol=1e-3, atol=1e-5 * float(plain.max()))
    unasked = measure_gradient_energies(model, targets_of(model), batches)
    assert all(torch.equal(unasked[name], energies) for name, energies in found.items())


def test_layers_that_the_loss_does_not_depend_on_are_refused() -> None:
    model, batches = FAMILIES["llama"].build(), FAMILIES["llama"].batches(1)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.zero_()
    with pytest.raises(
        CalibrationError, match=r"does not depend on model.layers.1.mlp.gate_proj: list it in modules_"
    ):
        measure_gradient_energies(model, targets_of(model), batches)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("inf"))
    with pytest.raises(NonFiniteError, match="the gradients of the weight of .* hold NaN or infinity"):
        measure_gradient_energies(model, targets_of(model), batches)


# Factors


def expected_weight(solver: str, goal: Tensor, inputs: Tensor, energies: Tensor, rank: int) -> Tensor:
    if solver == "svd_llm":
        return reference.whitened(goal, inputs.T @ inputs, rank)
    scales = {"asvd": lambda: reference.mean_magnitudes(inputs), "fwsvd": lambda: energies}[solver]()
    return reference.scaled(goal, scales.sqrt(), rank)


@each_baseline
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_factors_are_what_the_paper_says_of_the_dense_models_inputs(solver: str, name: str) -> None:
    dense, batches = FAMILIES[name].build(), FAMILIES[name].batches(8)
    model = FAMILIES[name].build()
    config = PGSVDConfig(ranks={"*": 3}, solver=solver, dataset=batches, num_samples=1000)
    report = PGSVDCompressor(config).compress(model)
    with experts_apart(dense):
        assert any(".experts." in layer for layer in low_rank_layers(model)) == (name == "mixtral")
        assert_as_expected(solver, dense, model, report, batches)


def assert_as_expected(
    solver: str, dense: PreTrainedModel, model: PreTrainedModel, report: CompressionReport, batches: list[Batch]
) -> None:
    names = list(low_rank_layers(model))
    inputs, energies = inputs_of(dense, names, batches), plain_energies(dense, batches)
    for layer in report.layers:
        if layer.rank is not None:
            weight, rows = weight_of(dense, layer.name), inputs[layer.name]
            expected = expected_weight(solver, weight, rows, energies[layer.name], 3)
            found = low_rank_layers(model)[layer.name].matrix(torch.float64)
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-3 * float(weight.abs().max()))
            error = reference.relative_outputs_error(weight, expected, rows)
            assert layer.activation_error == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("solver", ["asvd", "fwsvd"])
def test_anchored_factors_are_what_the_paper_says_of_the_compressed_inputs(solver: str) -> None:
    """Of the first layer of the second block, whose inputs the first block alone decides on; A takes W's place."""
    name = "model.layers.1.self_attn.v_proj"
    dense, batches = FAMILIES["llama"].build(), FAMILIES["llama"].batches(8)
    model = copy.deepcopy(dense)
    config = PGSVDConfig(
        ranks={"*": 4}, solver=solver, dataset=batches, num_samples=1000, calibration="anchored", blend=0.7
    )
    PGSVDCompressor(config).compress(model)
    weight, energies = weight_of(dense, name), plain_energies(dense, batches)[name]
    wanted, given = (inputs_of(source, [name], batches)[name] for source in (dense, model))
    ridge = RIDGE * float((given.T @ given).diagonal().mean())
    goal = reference.anchored_weight(weight, wanted, given, 0.7, ridge)
    expected = expected_weight(solver, goal, given, energies, 4)
    found = low_rank_layers(model)[name].matrix(torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3 * float(weight.abs().max()))
    assert not torch.allclose(goal, weight, rtol=0, atol=1e-2 * float(weight.abs().max()))


@pytest.mark.parametrize("solver", ["asvd", "fwsvd"])
def test_a_corrected_bias_makes_up_for_the_mean_error(solver: str) -> None:
    """Factors are those without: what they are found from has no mean to leave out."""
    name = "transformer.h.1.attn.c_attn"
    dense, batches = FAMILIES["gpt2"].build(), FAMILIES["gpt2"].batches(4)
    inputs, found = inputs_of(dense, [name], batches)[name], {}
    for correct in (True, False):
        model = copy.deepcopy(dense)
        config = PGSVDConfig(ranks={"*": 4}, solver=solver, dataset=batches, num_samples=1000, correct_bias=correct)
        PGSVDCompressor(config).compress(model)
        found[correct] = low_rank_layers(model)[name]
    product, other = (found[correct].matrix(torch.float64) for correct in (True, False))
    assert torch.equal(product, other)
    missing = (weight_of(dense, name) - product) @ inputs.mean(0)
    before, after = (found[correct].bias.detach().double() for correct in (False, True))
    torch.testing.assert_close(after - before, missing, rtol=1e-3, atol=1e-5)


def test_svd_llm_is_the_closed_form_where_there_is_an_inverse() -> None:
    batches, products = FAMILIES["llama"].batches(8), {}
    for solver in ("svd_llm", "eigh"):
        for storage in ("factors", "pivoted"):
            model = FAMILIES["llama"].build()
            config = PGSVDConfig(0.5, solver=solver, storage=storage, dataset=batches, num_samples=1000)
            PGSVDCompressor(config).compress(model)
            layers = low_rank_layers(model)
            products[solver, storage] = {name: layer.matrix(torch.float64) for name, layer in layers.items()}
    for storage in ("factors", "pivoted"):
        for name, expected in products["eigh", storage].items():
            size = float(expected.detach().abs().max())
            torch.testing.assert_close(products["svd_llm", storage][name], expected, rtol=0, atol=2e-4 * size)


def test_svd_llm_is_the_closed_form_about_the_mean_too() -> None:
    qwen2, products = text_family("qwen2", hf.Qwen2ForCausalLM, hf.Qwen2Config, **GROUPED), {}
    for solver in ("svd_llm", "eigh"):
        model, batches = qwen2.build(), qwen2.batches(8)
        config = PGSVDConfig(ranks={"*": 4}, solver=solver, dataset=batches, num_samples=1000, correct_bias=True)
        PGSVDCompressor(config).compress(model)
        corrected = {n: m for n, m in low_rank_layers(model).items() if m.bias is not None}
        products[solver] = {n: (m.matrix(torch.float64), m.bias.detach()) for n, m in corrected.items()}
    assert len(products["eigh"]) == 6
    for name, (expected, bias) in products["eigh"].items():
        found, other = products["svd_llm"][name]
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-4 * float(expected.detach().abs().max()))
        torch.testing.assert_close(other, bias, rtol=0, atol=1e-4 * float(bias.abs().max()))


# Where SVD-LLM fails


def assert_svd_llm_fails(model: PreTrainedModel, batches: list[Batch], message: str) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = PGSVDConfig(0.3, solver="svd_llm", dataset=batches, num_samples=1000)
    with pytest.raises(CalibrationError, match=message):
        PGSVDCompressor(config).compress(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    config.solver = "eigh"
    PGSVDCompressor(config).compress(model)


def test_svd_llm_fails_on_fewer_tokens_than_features(caplog) -> None:
    batches = [{"input_ids": torch.arange(3, 28)[None]}]
    message = (
        r"solver='svd_llm' inverts the Gram matrix of the inputs of model.layers.0.self_attn.q_proj, which is "
        r"singular: it saw 25 calibration tokens and has 32 input features, .* give more data .* or use solver='eigh'"
    )
    assert_svd_llm_fails(FAMILIES["llama"].build(), batches, message)


def test_svd_llm_fails_on_a_dead_feature() -> None:
    model = FAMILIES["llama"].build()
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[3] = 0
    message = (
        r"inputs of model.layers.1.mlp.(gate|up)_proj, .* it saw 640 calibration tokens and has 32 input features"
    )
    assert_svd_llm_fails(model, FAMILIES["llama"].batches(8), message)


def test_svd_llm_fails_about_the_mean_of_a_layer_norm() -> None:
    """Its outputs sum to a constant, each divided by its scale."""
    model, batches = FAMILIES["gpt2"].build(), FAMILIES["gpt2"].batches(8)
    config = PGSVDConfig(ranks={"*": 4}, solver="svd_llm", dataset=batches, num_samples=1000, correct_bias=True)
    with pytest.raises(
        CalibrationError, match=r"inputs of transformer.h.0.attn.c_attn, which is singular: it saw 640"
    ):
        PGSVDCompressor(config).compress(model)
    config.correct_bias = False
    PGSVDCompressor(config).compress(model)


def test_svd_llm_is_not_anchored() -> None:
    """Behind a compressed layer, features follow from others: there is no inverse, however many tokens there are."""
    with pytest.raises(
        ConfigError, match="calibration='anchored' gives .* solver='svd_llm' cannot invert; use solver"
    ):
        PGSVDConfig(0.2, solver="svd_llm", calibration="anchored")
    dense, batches = FAMILIES["llama"].build(), FAMILIES["llama"].batches(16)
    config = PGSVDConfig(ranks={"v_proj": 4}, dataset=batches, num_samples=1000)
    name = "model.layers.0.self_attn.o_proj"
    before = inputs_of(dense, [name], batches)[name]
    PGSVDCompressor(config).compress(dense)
    after = inputs_of(dense, [name], batches)[name]
    assert len(before) > 1000
    assert torch.linalg.matrix_rank(before, rtol=1e-4) == 32
    assert torch.linalg.matrix_rank(after, rtol=1e-4) < 32


# On disk, from measurements, elastic


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    FAMILIES["llama"].build().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("solver", "calibration"), [("asvd", "parallel"), ("asvd", "anchored"), ("svd_llm", "parallel")]
)
def test_compressed_on_disk_as_in_memory(solver: str, calibration: str, dense: Path, tmp_path: Path) -> None:
    config = request(FAMILIES["llama"], solver=solver, calibration=calibration)
    assert_same_checkpoint(on_disk(dense, tmp_path / "mine", config), in_memory(dense, tmp_path / "expected", config))


def test_an_elastic_checkpoint_on_disk(dense: Path, tmp_path: Path) -> None:
    config = request(FAMILIES["llama"], solver="asvd", elastic=True)
    assert_same_checkpoint(on_disk(dense, tmp_path / "mine", config), in_memory(dense, tmp_path / "expected", config))


@each_measured
def test_compressed_from_measurements(solver: str, dense: Path, tmp_path: Path) -> None:
    config = request(FAMILIES["llama"], solver=solver)
    PGSVDCompressor(config).measure_checkpoint(dense, tmp_path / "stats")
    measured = request(FAMILIES["llama"], solver=solver, dataset=str(tmp_path / "stats"))
    found, expected = (
        in_memory(dense, tmp_path / name, each) / "model-00001-of-00005.safetensors"
        for name, each in (("mine", measured), ("expected", config))
    )
    names = sorted(path.name for path in expected.parent.glob("*.safetensors"))
    assert len(names) > 2
    assert all((found.parent / name).read_bytes() == (expected.parent / name).read_bytes() for name in names)


def test_measurements_for_another_solver(dense: Path, tmp_path: Path) -> None:
    for solver in ("eigh", "als"):
        PGSVDCompressor(request(FAMILIES["llama"], solver=solver)).measure_checkpoint(dense, tmp_path / solver)
    for solver, stats, message in (
        (
            "svd_llm",
            "eigh",
            r"solver='svd_llm' needs the Gram matrices of the inputs of .*down_proj too; measure with",
        ),
        (
            "asvd",
            "als",
            r"holds no absolute values of the inputs of .*q_proj, which solver='asvd' needs; measure with",
        ),
    ):
        config = request(FAMILIES["llama"], solver=solver, dataset=str(tmp_path / stats))
        with pytest.raises(CalibrationError, match=message):
            PGSVDCompressor(config).compress(FAMILIES["llama"].build())
    config = request(FAMILIES["llama"], solver="svd_llm", dataset=str(tmp_path / "als"))
    PGSVDCompressor(config).compress(FAMILIES["llama"].build())


def test_gradients_need_the_model_in_memory(dense: Path, tmp_path: Path) -> None:
    config = request(FAMILIES["llama"], solver="fwsvd")
    with pytest.raises(ConfigError, match="solver='fwsvd' measures gradients, which needs the whole model in memory"):
        PGSVDCompressor(config).compress_checkpoint(dense, tmp_path / "out")
    with pytest.raises(ConfigError, match="solver='fwsvd' measures gradients, which are not measured beforehand"):
        PGSVDCompressor(config).measure_checkpoint(dense, tmp_path / "out")
    PGSVDCompressor(request(FAMILIES["llama"], solver="als")).measure_checkpoint(dense, tmp_path / "stats")
    config.dataset = str(tmp_path / "stats")
    with pytest.raises(ConfigError, match="solver='fwsvd' measures gradients, and the measurements that are the data"):
        PGSVDCompressor(config).compress(FAMILIES["llama"].build())


@each_baseline
def test_an_elastic_checkpoint_is_cut_as_one_compressed_anew(solver: str, tmp_path: Path) -> None:
    model = FAMILIES["llama"].build()
    PGSVDCompressor(request(FAMILIES["llama"], solver=solver, parameter_reduction=0.1, elastic=True)).compress(model)
    model.save_pretrained(tmp_path)
    cut = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=PGSVDConfig(0.5))
    anew = FAMILIES["llama"].build()
    PGSVDCompressor(request(FAMILIES["llama"], solver=solver, parameter_reduction=0.5)).compress(anew)
    assert cut.config.quantization_config.ranks == anew.config.quantization_config.ranks
    torch.testing.assert_close(dict(cut.state_dict()), dict(anew.state_dict()), rtol=1e-5, atol=1e-6)


@each_baseline
def test_errors_are_weighed_by_the_loss_with_the_closed_form_only(solver: str) -> None:
    with pytest.raises(ConfigError, match=f"objective='loss' needs solver='eigh', not '{solver}'"):
        PGSVDConfig(0.2, solver=solver, objective="loss")
    assert PGSVDConfig(0.2, solver=solver, allocation="loss").needs_curvature
    with pytest.raises(CalibrationError, match=f"solver='{solver}' needs calibration data"):
        PGSVDCompressor(PGSVDConfig(0.2, solver=solver)).compress(FAMILIES["llama"].build())
