"""Elastic checkpoints: cut while they are loaded, they are what compressing at that budget gives."""

from __future__ import annotations

import copy
import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from models import FAMILIES, each_family
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    core_model_loading,
    pipeline,
)
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import logging as hf_logging

from optimum_pgsvd import CheckpointError, CompressionReport, ConfigError, PGSVDCompressor, PGSVDConfig
from optimum_pgsvd.checkpoint import ELASTIC_NAME, read_contents
from optimum_pgsvd.elastic import Elastic
from optimum_pgsvd.modeling_pgsvd import checkpoint_names, low_rank_layers
from optimum_pgsvd.planning import measure_profiles
from optimum_pgsvd.quantizer import register, take_requests
from optimum_pgsvd.structures import LowRankFactors
from optimum_pgsvd.targets import find_targets


# How far the elastic checkpoints are compressed: not at all, so that all factors lie in the side file; so little that
# some targets stay dense; and so far that none does.
STARTS = (0.0, 0.05, 0.3)
IDS = torch.arange(3, 20)[None]
LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(autouse=True)
def silence() -> Iterator[None]:
    """Python's warnings are errors; nothing here gives one."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def logged(caplog) -> Iterator[pytest.LogCaptureFixture]:
    """What transformers and this package log, which they do not hand on by themselves."""
    hf_logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        yield caplog
    hf_logging.disable_propagation()


def compressed(name: str = "llama", dtype: torch.dtype = torch.float32, **fields: Any) -> PreTrainedModel:
    """A model compressed in memory, by its weights alone where no other solver is given."""
    model = FAMILIES[name].build().to(dtype)
    PGSVDCompressor(PGSVDConfig(**{"solver": "svd"} | fields)).compress(model)
    return model


def calibrated(name: str, **fields: Any) -> PreTrainedModel:
    return compressed(name, solver="eigh", dataset=FAMILIES[name].batches(4), **fields)


def cut(folder: Path, model_class: Any = AutoModelForCausalLM, **fields: Any) -> PreTrainedModel:
    """A checkpoint cut while it is loaded."""
    return model_class.from_pretrained(folder, quantization_config=PGSVDConfig(**fields))


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def elastic(tmp_path_factory) -> dict[float, Path]:
    """Elastic Llamas by how far they were compressed."""
    folders = {start: tmp_path_factory.mktemp("elastic") for start in STARTS}
    for start, folder in folders.items():
        compressed(parameter_reduction=start, elastic=True).save_pretrained(folder)
    return folders


def assert_same(found: PreTrainedModel, expected: PreTrainedModel) -> None:
    """The same ranks and weights; a matrix product may round otherwise where it has other rows beside it."""
    assert found.config.quantization_config.ranks == expected.config.quantization_config.ranks
    state, other = found.state_dict(), expected.state_dict()
    assert list(state) == list(other)
    torch.testing.assert_close(dict(state), dict(other), rtol=1e-6, atol=1e-7)


# The request


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"solver": "als"}, "elastic=True needs factors .*: use .*solver='eigh' or .*solver='svd'.*, not 'als'"),
        ({"calibration": "anchored"}, "elastic=True needs calibration='parallel'"),
        ({"elastic": 1}, "elastic=1 must be True or False"),
    ],
)
def test_what_cannot_be_elastic_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PGSVDConfig(**{"parameter_reduction": 0.2, "elastic": True} | fields)


# The checkpoint


def test_an_elastic_checkpoint_is_an_ordinary_one_with_a_side_file(elastic, tmp_path) -> None:
    for start, folder in elastic.items():
        compressed(parameter_reduction=start).save_pretrained(tmp_path)
        assert {path.name for path in folder.iterdir()} == {path.name for path in tmp_path.iterdir()} | {ELASTIC_NAME}
        assert (folder / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
        ours, other = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path))
        assert ours["quantization_config"].pop("elastic")
        assert not other["quantization_config"].pop("elastic")
        assert ours == other
        loaded, ordinary = (AutoModelForCausalLM.from_pretrained(f) for f in (folder, tmp_path))
        assert torch.equal(logits(loaded), logits(ordinary))
        assert read_contents(folder).dtypes == read_contents(tmp_path).dtypes


def test_a_calibrated_elastic_checkpoint_has_the_weights_of_an_ordinary_one(tmp_path) -> None:
    folders = {flag: tmp_path / str(flag) for flag in (True, False)}
    for flag, folder in folders.items():
        calibrated("llama", parameter_reduction=0.05, elastic=flag).save_pretrained(folder)
    assert len({(folder / "model.safetensors").read_bytes() for folder in folders.values()}) == 1
    assert (folders[True] / ELASTIC_NAME).exists()


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "llava"])
def test_the_side_file_holds_the_spectra_of_all_and_the_factors_of_dense_targets(name: str, tmp_path) -> None:
    dense, model = FAMILIES[name].build(), compressed(name, parameter_reduction=0.05, elastic=True)
    model.save_pretrained(tmp_path)
    side, layers = load_file(tmp_path / ELASTIC_NAME), model.pgsvd_report.layers
    names = checkpoint_names(model, [layer.name for layer in layers])
    assert 0 < sum(layer.rank is None for layer in layers) < len(layers)
    for layer in layers:
        module: Any = dense.get_submodule(layer.name)
        weight = (module.weight.T if isinstance(module, Conv1D) else module.weight).detach()
        values = side.pop(f"{names[layer.name]}.values")
        torch.testing.assert_close(values, torch.linalg.svdvals(weight.double()), check_dtype=False)
        if layer.rank is None:
            left, right = (side.pop(f"{names[layer.name]}.{factor}.weight") for factor in ("left", "right"))
            m, n = weight.shape
            assert left.shape[1] == right.shape[0] == (m * n - 1) // (m + n)
            for rank in (1, left.shape[1] // 2, left.shape[1]):
                product = left[:, :rank].double() @ right[:rank].double()
                torch.testing.assert_close(product, reference.truncated(weight, rank), rtol=0, atol=1e-6)
            if module.bias is not None:
                assert torch.equal(side.pop(f"{names[layer.name]}.left.bias"), module.bias)
    assert not side


# Cutting equals compressing


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "clip", "llava", "mixtral", "albert"])
def test_a_cut_is_what_compressing_gives(name: str, start: float, tmp_path) -> None:
    kept = {"modules_to_not_convert": FAMILIES[name].uncut}
    calibrated(name, parameter_reduction=start, elastic=True, **kept).save_pretrained(tmp_path)
    for reduction in (start, start + 0.03, 0.4, 0.7):
        expected = calibrated(name, parameter_reduction=reduction, **kept)
        assert_same(cut(tmp_path, FAMILIES[name].model_class, parameter_reduction=reduction, **kept), expected)


@each_family
def test_a_cut_of_any_architecture_is_what_compressing_gives(family, tmp_path) -> None:
    kept = {"modules_to_not_convert": family.uncut}
    compressed(family.name, parameter_reduction=0.05, elastic=True, **kept).save_pretrained(tmp_path)
    expected = compressed(family.name, parameter_reduction=0.4, **kept)
    found = cut(tmp_path, family.model_class, parameter_reduction=0.4, **kept)
    assert_same(found, expected)
    sizes = ("skipped", "model_before", "model_after", "parameters_before", "parameters_after")
    for field in sizes:
        assert getattr(found.pgsvd_report, field) == getattr(expected.pgsvd_report, field), field


REQUESTS = (
    {"parameter_reduction": 0.4, "allocation": "uniform"},
    {"parameter_reduction": 0.4, "rank_multiple": 4},
    {"parameter_reduction": 0.4, "modules_to_not_convert": ["layers.0.mlp", "q_proj"]},
    {"parameter_reduction": 0.4, "groups": {"mlp": {"tolerance": 0.3}, "layers.1": {"parameter_reduction": 0.1}}},
    {"tolerance": 0.5},
    {"tolerance": 0.0},
    {"ranks": {"q_proj": 3, "*.mlp.*": 7}},
)


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda fields: " ".join(fields))
def test_any_budget_can_be_asked_of_what_holds_all(request_: dict, elastic) -> None:
    found, expected = cut(elastic[0.0], **request_), compressed(**request_)
    assert_same(found, expected)
    result, direct = found.config.quantization_config, expected.config.quantization_config
    assert result.to_dict() == direct.to_dict()
    for layer, other in zip(found.pgsvd_report.layers, expected.pgsvd_report.layers, strict=True):
        assert (layer.name, layer.rank, layer.group, layer.tolerance) == (
            other.name,
            other.rank,
            other.group,
            other.tolerance,
        )
        assert layer.weight_error == pytest.approx(other.weight_error, abs=1e-6)


def test_layers_outside_the_blocks_are_cut_where_they_are_named(tmp_path) -> None:
    groups = {"multi_modal_projector": {"parameter_reduction": 0.1}}
    compressed("llava", parameter_reduction=0.05, groups=groups, elastic=True).save_pretrained(tmp_path)
    further = {"parameter_reduction": 0.4, "groups": {"multi_modal_projector": {"tolerance": 0.6}}}
    model_class = FAMILIES["llava"].model_class
    assert_same(cut(tmp_path, model_class, **further), compressed("llava", **further))
    with pytest.raises(
        ConfigError, match=r"gives model.multi_modal_projector.* at rank \d+ or less, and .* it dense;"
    ):
        cut(tmp_path, model_class, parameter_reduction=0.4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, tmp_path) -> None:
    """Ranks are equal, and products to the rounding of the factors; components of one size may come in other signs."""
    compressed(dtype=dtype, parameter_reduction=0.05, elastic=True).save_pretrained(tmp_path)
    found, expected = cut(tmp_path, parameter_reduction=0.4), compressed(dtype=dtype, parameter_reduction=0.4)
    assert found.config.quantization_config.ranks == expected.config.quantization_config.ranks
    layers = low_rank_layers(expected)
    for name, layer in low_rank_layers(found).items():
        assert layer.left.weight.dtype == dtype
        product, other = layer.to_dense(torch.float32).weight, layers[name].to_dense(torch.float32).weight
        torch.testing.assert_close(product, other, rtol=0, atol=2 * torch.finfo(dtype).eps)


# Loading


@pytest.mark.parametrize("field", ["allocation", "objective"])
def test_a_cut_by_gradients_is_refused(field: str, elastic) -> None:
    """There are none, and the singular values of the weights are not what the loss counts."""
    message = f"{field}='loss'.* measures gradients, and a checkpoint is cut without data; cut it with"
    for folder in elastic.values():
        with pytest.raises(ConfigError, match=message):
            cut(folder, **{"parameter_reduction": 0.5, field: "loss"})


def test_cutting_says_nothing(elastic, logged) -> None:
    for folder in elastic.values():
        cut(folder, parameter_reduction=0.4)
    assert not logged.records


def test_dtypes_devices_and_shards(tmp_path, logged) -> None:
    compressed(parameter_reduction=0.05, elastic=True).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    request = PGSVDConfig(parameter_reduction=0.4)
    expected = compressed(parameter_reduction=0.4)
    for options in ({}, {"device_map": "auto"}, {"device_map": "cpu", "dtype": torch.float32}):
        assert_same(AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=request, **options), expected)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=request, dtype=torch.bfloat16)
    assert_same(half, expected.to(torch.bfloat16))
    assert not logged.records


def test_parts_on_disk(elastic, tmp_path) -> None:
    placement = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    placement |= {"model.layers.0": "disk", "model.layers.1": "cpu"}
    for start, folder in elastic.items():
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config=PGSVDConfig(parameter_reduction=0.4),
            device_map=placement,
            offload_folder=tmp_path / str(start),
        )
        torch.testing.assert_close(logits(model), logits(compressed(parameter_reduction=0.4)))


def test_nothing_of_the_larger_factors_is_kept(elastic) -> None:
    for folder in elastic.values():
        model = cut(folder, parameter_reduction=0.6)
        for layer in low_rank_layers(model).values():
            for weight in (layer.left.weight, layer.right.weight):
                assert weight.is_contiguous()
                assert weight.untyped_storage().nbytes() == 4 * weight.numel()
        assert model.hf_quantizer.pre_quantized
        assert model.hf_quantizer.request is None
        assert model._weight_conversions == AutoModelForCausalLM.from_pretrained(folder)._weight_conversions


def test_what_is_read_is_cut_before_more_is_read(elastic, monkeypatch) -> None:
    """The loader's threads would have read, cast and moved most of a checkpoint before the first factor is cut."""

    def no_threads(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("factors are read ahead")

    monkeypatch.setattr(core_model_loading, "ThreadPoolExecutor", no_threads)
    cut(elastic[0.05], parameter_reduction=0.4)
    with pytest.raises(AssertionError, match="read ahead"):
        AutoModelForCausalLM.from_pretrained(elastic[0.05])


def test_the_request_is_not_changed_and_can_be_used_again(elastic) -> None:
    request = PGSVDConfig(parameter_reduction=0.4, groups={"mlp": {"tolerance": 0.6}})
    before = copy.deepcopy(request.to_dict())
    first, second = (
        AutoModelForCausalLM.from_pretrained(elastic[0.05], quantization_config=request) for _ in range(2)
    )
    assert request.to_dict() == before
    assert_same(first, second)
    assert first.config.quantization_config.groups is not request.groups


def test_a_pipeline_and_the_base_model(elastic, logged, tokenizer) -> None:
    request = PGSVDConfig(parameter_reduction=0.4)
    expected = compressed(parameter_reduction=0.4)
    generator = pipeline(
        "text-generation",
        model=str(elastic[0.05]),
        tokenizer=tokenizer,
        model_kwargs={"quantization_config": request},
    )
    assert_same(generator.model, expected)
    base = AutoModel.from_pretrained(elastic[0.05], quantization_config=request)
    assert [layer.rank for layer in low_rank_layers(base).values()] == [
        layer.rank for layer in low_rank_layers(expected).values()
    ]
    assert torch.equal(base.layers[1].mlp.up_proj.left.weight, expected.model.layers[1].mlp.up_proj.left.weight)


# What comes of it


def test_the_report_of_a_cut(tmp_path) -> None:
    made = calibrated("llama", parameter_reduction=0.05, elastic=True)
    made.save_pretrained(tmp_path)
    report = cut(tmp_path, parameter_reduction=0.4).pgsvd_report
    dense = FAMILIES["llama"].build()
    for layer in report.layers:
        error = reference.truncation_error(dense.get_submodule(layer.name).weight.detach(), layer.rank)
        assert layer.weight_error == pytest.approx(error, abs=1e-7)
        assert (layer.activation_error, layer.tokens) == (None, 0)
    assert "cut from an elastic checkpoint" in report.notes[-1]
    assert report.calibration == made.pgsvd_report.calibration
    assert (report.config["parameter_reduction"], report.config["solver"]) == (0.4, "eigh")
    assert (report.config["ranks"], report.config["format_version"], report.config["elastic"]) == (None, None, False)


def test_a_cut_without_the_checkpoint_s_report(elastic, tmp_path) -> None:
    shutil.copytree(elastic[0.05], tmp_path / "copy")
    (tmp_path / "copy" / "pgsvd_report.json").unlink()
    report = cut(tmp_path / "copy", parameter_reduction=0.4).pgsvd_report
    assert report.layers == cut(elastic[0.05], parameter_reduction=0.4).pgsvd_report.layers


def test_a_cut_model_is_saved_as_an_ordinary_checkpoint(elastic, tmp_path, logged) -> None:
    for start, folder in elastic.items():
        model = cut(folder, parameter_reduction=0.4)
        out = tmp_path / str(start)
        shutil.copytree(folder, out)  # a side file that is there already must not stay
        model.save_pretrained(out)
        assert not (out / ELASTIC_NAME).exists()
        assert CompressionReport.load(out) == model.pgsvd_report
        again = AutoModelForCausalLM.from_pretrained(out)
        assert again.config.quantization_config.elastic is False
        assert torch.equal(logits(again), logits(model))
        direct = tmp_path / "direct"
        compressed(parameter_reduction=0.4).save_pretrained(direct)
        ours, other = (load_file(f / "model.safetensors") for f in (out, direct))
        torch.testing.assert_close(ours, other, rtol=1e-6, atol=1e-7)
        assert (out / "config.json").read_bytes() == (direct / "config.json").read_bytes()
    assert not logged.records


def test_a_cut_model_can_be_dequantized(elastic) -> None:
    model = cut(elastic[0.05], parameter_reduction=0.4)
    before = logits(model)
    torch.testing.assert_close(logits(model.dequantize()), before, rtol=1e-4, atol=1e-4)
    assert not hasattr(model, "pgsvd_elastic")


# What is saved as elastic, and what is no more


def test_a_model_just_compressed_can_be_saved_as_often_as_one_likes(tmp_path, logged) -> None:
    model = compressed(parameter_reduction=0.05, elastic=True)
    for name in ("first", "second"):
        model.save_pretrained(tmp_path / name)
    assert (tmp_path / "first" / ELASTIC_NAME).read_bytes() == (tmp_path / "second" / ELASTIC_NAME).read_bytes()
    copy.deepcopy(model).save_pretrained(tmp_path / "copy")
    expected = cut(tmp_path / "first", parameter_reduction=0.4)
    assert_same(cut(tmp_path / "copy", parameter_reduction=0.4), expected)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    assert_same(cut(tmp_path / "half", parameter_reduction=0.4), expected.to(torch.bfloat16))
    assert not logged.records


@pytest.mark.parametrize("kind", ["dense", "low-rank"])
def test_a_model_trained_since_is_saved_as_an_ordinary_one(kind: str, tmp_path, logged) -> None:
    model = compressed(parameter_reduction=0.05, elastic=True)
    model.save_pretrained(tmp_path)
    layer = next(layer for layer in model.pgsvd_report.layers if (layer.rank is None) == (kind == "dense"))
    module: Any = model.get_submodule(layer.name)
    with torch.no_grad():
        next(module.parameters()).add_(1e-3)
    model.save_pretrained(tmp_path)
    assert ["saved as an ordinary checkpoint" in record.message for record in logged.records] == [True]
    assert not (tmp_path / ELASTIC_NAME).exists()
    assert not AutoModelForCausalLM.from_pretrained(tmp_path).config.quantization_config.elastic
    model.save_pretrained(tmp_path)
    assert len(logged.records) == 1


def test_training_what_is_no_target_leaves_it_elastic(tmp_path) -> None:
    model = compressed(parameter_reduction=0.05, elastic=True)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.save_pretrained(tmp_path)
    assert torch.equal(cut(tmp_path, parameter_reduction=0.4).lm_head.weight, model.lm_head.weight)


def test_a_reloaded_model_is_saved_as_an_ordinary_one(elastic, tmp_path, logged) -> None:
    model = AutoModelForCausalLM.from_pretrained(elastic[0.05])
    assert not logged.records
    model.save_pretrained(tmp_path)
    assert ["saved as an ordinary checkpoint" in record.message for record in logged.records] == [True]
    assert not (tmp_path / ELASTIC_NAME).exists()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    with pytest.raises(ConfigError, match="is not elastic"):
        cut(tmp_path, parameter_reduction=0.4)


# By hand: what a model needs to be elastic


def by_hand(model: PreTrainedModel) -> Elastic:
    """Profiles of a dense model's targets, and factors of no worth for one of them."""
    found = Elastic(measure_profiles(model, find_targets(model, PGSVDConfig(parameter_reduction=0))))
    found.add(LAYER, LowRankFactors(torch.zeros(64, 21), torch.zeros(21, 32)))
    return found


def test_what_is_collected_is_written_by_the_checkpoint_s_names(tmp_path) -> None:
    model = FAMILIES["llama"].build()
    by_hand(model).write(model, tmp_path / ELASTIC_NAME)
    tensors = load_file(tmp_path / ELASTIC_NAME)
    assert {key.removesuffix(".values") for key in tensors if key.endswith(".values")} == {
        f"model.layers.{i}.{layer}"
        for i in range(2)
        for layer in (*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down")))
    }
    assert {key for key in tensors if "values" not in key} == {f"{LAYER}.left.weight", f"{LAYER}.right.weight"}


def test_weights_are_known_again_in_any_dtype() -> None:
    model = FAMILIES["llama"].build()
    found = by_hand(model)
    found.seal(model)
    assert found.fits(model)
    assert copy.deepcopy(found).fits(copy.deepcopy(model))
    assert found.fits(model.to(torch.float16))
    assert not found.fits(model.to("meta"))
    assert not found.fits(FAMILIES["llama"].build(seed=1))
    assert not found.fits(FAMILIES["bert"].build())


# Refusals


def test_more_than_the_checkpoint_holds_is_refused(elastic) -> None:
    for fields, asked, layers in (
        ({"parameter_reduction": 0.2}, r"at rank \d+", r"\d+"),
        ({"parameter_reduction": 0.0}, "dense", "14"),
        ({"tolerance": 0.1}, "dense", "14"),
        ({"parameter_reduction": 0.5, "modules_to_not_convert": ["k_proj"]}, "dense", r"\d"),
        ({"ranks": {"q_proj": 2}}, "dense", "12"),
        ({"ranks": {"*_proj": 16}}, "at rank 16", r"\d+"),
    ):
        message = rf"gives model.layers\S* at rank \d+ or less, and .* for it {asked}; it asks too much of {layers} "
        with pytest.raises(ConfigError, match=message):
            cut(elastic[0.3], **fields)
    with pytest.raises(ConfigError, match=r"up_proj at rank 21 or less, or dense, and .* for it at rank 22;"):
        cut(elastic[0.0], ranks={"up_proj": 22})


def test_what_is_said_to_be_possible_is(elastic) -> None:
    for start, folder in elastic.items():
        if start:
            with pytest.raises(ConfigError) as error:
                cut(folder, parameter_reduction=0.0)
            least = float(str(error.value).partition("parameter_reduction=")[2].split()[0])
            assert 0 <= least - CompressionReport.load(folder).parameter_reduction < 1e-4
            cut(folder, parameter_reduction=least)


def test_only_how_far_to_cut_can_be_asked(elastic) -> None:
    fields = {"dataset": "self", "solver": "svd", "num_samples": 8, "self_contained": True, "elastic": True}
    for field, value in fields.items():
        with pytest.raises(
            ConfigError, match=f"^{field} cannot be given to cut a checkpoint.*: give only parameter_red"
        ):
            cut(elastic[0.3], parameter_reduction=0.4, **{field: value})


def test_patterns_and_budgets_are_checked_as_ever(elastic) -> None:
    for fields, message in (
        ({"groups": {"vision": {"tolerance": 0.5}}}, "groups: 'vision' matches no linear layer"),
        ({"groups": {"lm_head": {"tolerance": 0.5}}}, "lm_head stays dense: output head"),
        ({"modules_to_not_convert": ["vision"]}, "modules_to_not_convert: 'vision' matches no linear layer"),
        ({"parameter_reduction": 0.99}, "parameter_reduction=0.99 cannot be met"),
    ):
        with pytest.raises(ConfigError, match=message):
            cut(elastic[0.3], **{"parameter_reduction": 0.4} | fields)


def test_layers_left_out_when_it_was_made_stay_dense(tmp_path) -> None:
    compressed(parameter_reduction=0.0, modules_to_not_convert=["k_proj"], elastic=True).save_pretrained(tmp_path)
    model = cut(tmp_path, parameter_reduction=0.4, modules_to_not_convert=["layers.0.mlp.up_proj"])
    both = ["k_proj", "layers.0.mlp.up_proj"]
    assert_same(model, compressed(parameter_reduction=0.4, modules_to_not_convert=both))
    assert model.config.quantization_config.modules_to_not_convert == both
    with pytest.raises(ConfigError, match="k_proj stays dense: no target when the checkpoint was made"):
        cut(tmp_path, parameter_reduction=0.4, groups={"k_proj": {"tolerance": 0.5}})


@pytest.mark.parametrize("kind", ["ordinary", "result"])
def test_a_request_to_an_ordinary_checkpoint_is_refused(kind: str, tmp_path) -> None:
    model = compressed(parameter_reduction=0.3)
    model.save_pretrained(tmp_path)
    request = model.config.quantization_config if kind == "result" else PGSVDConfig(parameter_reduction=0.4)
    with pytest.raises(
        ConfigError, match="compressed already and is not elastic: load it without quantization_config"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=request)


def test_side_files_that_are_missing_foreign_or_damaged(elastic, tmp_path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(elastic[0.05], folder)
    side = folder / ELASTIC_NAME
    shutil.copyfile(elastic[0.0] / ELASTIC_NAME, side)
    with pytest.raises(CheckpointError, match=r"disagree on \d+ layers, model.layers.* not of one checkpoint"):
        cut(folder, parameter_reduction=0.4)
    side.write_bytes(side.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=f"{ELASTIC_NAME} is damaged; save or download it again"):
        cut(folder, parameter_reduction=0.4)
    side.unlink()
    with pytest.raises(CheckpointError, match=f"cannot be cut without its {ELASTIC_NAME}"):
        cut(folder, parameter_reduction=0.4)
    assert AutoModelForCausalLM.from_pretrained(folder).config.quantization_config.elastic


@pytest.mark.parametrize(
    ("file", "key", "message"),
    [
        ("model.safetensors", "right.weight", "missing factor"),
        ("model.safetensors", "left.weight", "misshapen factor"),
        (ELASTIC_NAME, "left.weight", "missing factor"),
    ],
)
def test_damaged_factors_are_named(elastic, tmp_path, file: str, key: str, message: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(elastic[0.05], folder)
    tensors = load_file(folder / file)
    name = next(name for name in tensors if name.endswith(key))
    factor = tensors.pop(name)
    if message == "misshapen factor":
        tensors[name] = torch.cat([factor, factor], dim=1)
    save_file(tensors, folder / file, metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=f"{message}: {name}"):
        cut(folder, parameter_reduction=0.4)


# transformers' own merging of configs


def test_configs_of_others_are_merged_as_ever(elastic) -> None:
    with pytest.raises(ValueError, match="The model is quantized with PGSVDConfig but you are passing a BitsAndBytes"):
        AutoModelForCausalLM.from_pretrained(elastic[0.3], quantization_config=BitsAndBytesConfig())
    theirs = BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(ValueError, match="The model is quantized with BitsAndBytesConfig but you are passing a PGSVD"):
        AutoHfQuantizer.merge_quantization_configs(theirs.to_dict(), PGSVDConfig(parameter_reduction=0.1))
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        assert AutoHfQuantizer.merge_quantization_configs(theirs.to_dict(), theirs).to_dict() == theirs.to_dict()
    result = PGSVDConfig(parameter_reduction=0.1).with_ranks({LAYER: 2})
    assert AutoHfQuantizer.merge_quantization_configs(result.to_dict(), None) == result


def test_requests_are_taken_once_and_only_where_transformers_merges(monkeypatch) -> None:
    before = AutoHfQuantizer.merge_quantization_configs
    register()
    assert AutoHfQuantizer.merge_quantization_configs is before
    monkeypatch.delattr(AutoHfQuantizer, "merge_quantization_configs")
    take_requests()
    assert not hasattr(AutoHfQuantizer, "merge_quantization_configs")
