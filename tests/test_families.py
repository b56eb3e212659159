"""Every architecture: compress, save, reload bit-equal, and back to dense."""

import json
import os

import pytest
import torch
import transformers as hf
from models import FAMILIES, SEQUENCES

from optimum_pgsvd import CompressionReport, PGSVDCompressor, PGSVDConfig
from optimum_pgsvd.modeling_pgsvd import low_rank_layers


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def compressed(family, model=None, **settings):
    model = model or family.build()
    batches = family.batches(4)
    if model.dtype != torch.float32:
        batches = [{k: v.to(model.dtype) if v.is_floating_point() else v for k, v in b.items()} for b in batches]
    settings = {"parameter_reduction": 0.3, "dataset": batches, **settings}
    report = PGSVDCompressor(PGSVDConfig(**settings)).compress(model)
    return model, report, batches[0]


def outputs(model, batch):
    with torch.no_grad():
        return [value for value in model(**batch).to_tuple() if isinstance(value, torch.Tensor) and value.dim()]


def assert_same(model, other, batch):
    for a, b in zip(outputs(model, batch), outputs(other, batch), strict=True):
        assert torch.equal(a, b)


PIVOTED = ("llama", "gpt2", "t5", "clip", "mixtral")
each_family_and_storage = pytest.mark.parametrize(
    ("name", "storage"), [*((name, "factors") for name in FAMILIES), *((name, "pivoted") for name in PIVOTED)]
)


@pytest.mark.filterwarnings("ignore:.*offloaded")
@each_family_and_storage
def test_saved_and_reloaded_model_is_bit_equal(name, storage, tmp_path):
    family = FAMILIES[name]
    model, report, batch = compressed(family, storage=storage)
    assert len(low_rank_layers(model)) == sum(layer.rank is not None for layer in report.layers) > 0
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == [family.model_class.__name__]
    assert config["quantization_config"]["quant_method"] == "pgsvd"
    assert CompressionReport.load(tmp_path).layers == report.layers
    for options in ({}, {"device_map": "auto"}):
        reloaded, info = family.model_class.from_pretrained(tmp_path, output_loading_info=True, **options)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert_same(model, reloaded, batch)
    again = tmp_path / "again"
    reloaded.save_pretrained(again)
    assert_same(model, family.model_class.from_pretrained(again), batch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "storage"),
    [("llama", "factors"), ("gpt2", "factors"), ("t5", "factors"), ("clip", "factors"), ("gpt2", "pivoted"),
     ("t5", "pivoted")],
)  # fmt: skip
def test_every_dtype_and_sharding_is_bit_equal(name, storage, dtype, tmp_path):
    family = FAMILIES[name]
    family.build().save_pretrained(tmp_path / "dense")
    # Loaded, not cast: casting a built model would round buffers, rotary frequencies, that loading keeps in float32.
    dense = family.model_class.from_pretrained(tmp_path / "dense", dtype=dtype)
    model, _, batch = compressed(family, dense, storage=storage)
    for folder, size in (("single", "5GB"), ("sharded", "20KB")):
        model.save_pretrained(tmp_path / folder, max_shard_size=size)
        assert os.path.exists(tmp_path / folder / "model.safetensors") == (folder == "single")
        reloaded = family.model_class.from_pretrained(tmp_path / folder)
        assert {p.dtype for p in reloaded.parameters()} == {p.dtype for p in model.parameters()}
        assert_same(model, reloaded, batch)
    widened = family.model_class.from_pretrained(tmp_path / "single", dtype=torch.float32)
    for key, value in model.state_dict().items():
        wide = value.float() if value.is_floating_point() else value
        assert torch.equal(widened.state_dict()[key], wide)
        assert widened.state_dict()[key].dtype == wide.dtype


@each_family_and_storage
def test_dequantized_model_is_an_ordinary_dense_one(name, storage, tmp_path):
    family = FAMILIES[name]
    model, _, batch = compressed(family, storage=storage)
    before = outputs(model, batch)
    dense = model.dequantize()
    assert not low_rank_layers(dense)
    assert {n for n, _ in dense.named_parameters()} == {n for n, _ in family.build().named_parameters()}
    for a, b in zip(outputs(dense, batch), before, strict=True):
        # One float32 product instead of two, at most some hundred roundings deep.
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    dense.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert sorted(os.listdir(tmp_path)) == sorted({"config.json", "model.safetensors"} | generation_files(dense))
    assert_same(dense, family.model_class.from_pretrained(tmp_path), batch)


def generation_files(model):
    return {"generation_config.json"} if model.can_generate() else set()


@pytest.mark.parametrize(
    ("name", "storage"),
    [("llama", "factors"), ("bert", "factors"), ("llava", "factors"), ("gpt2", "factors"), ("llava", "pivoted")],
)
def test_base_model_and_other_heads_load_from_the_same_checkpoint(name, storage, tmp_path):
    model, _, _ = compressed(FAMILIES[name], storage=storage)
    model.save_pretrained(tmp_path)
    base = hf.AutoModel.from_pretrained(tmp_path)
    theirs = {n.removeprefix(f"{model.base_model_prefix}."): layer for n, layer in low_rank_layers(model).items()}
    assert low_rank_layers(base).keys() == theirs.keys()
    for layer_name, layer in low_rank_layers(base).items():
        assert torch.equal(layer.product(), theirs[layer_name].product())


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_generation_with_and_without_cache_agrees(name):
    family = FAMILIES[name]
    model, _, batch = compressed(family)
    if not model.can_generate():
        pytest.skip(f"{name} does not generate")
    # of the first sequence, and of the patches of its image
    inputs = {k: v[: len(v) // SEQUENCES] for k, v in batch.items() if k not in ("labels", "decoder_input_ids")}
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with_cache = model.generate(**inputs, **options)
    assert torch.equal(with_cache, model.generate(**inputs, **options, use_cache=False))


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_tolerance_zero_and_full_ranks_change_nothing(storage):
    family = FAMILIES["llama"]
    batch, dense = family.batches(1)[0], family.build()
    unchanged, report, _ = compressed(family, parameter_reduction=None, tolerance=0.0, storage=storage)
    assert report.parameter_reduction == 0
    assert_same(dense, unchanged, batch)
    shapes = {layer.name: min(layer.shape) for layer in report.layers}
    full, report, _ = compressed(family, parameter_reduction=None, ranks=shapes, storage=storage)
    assert (report.parameter_reduction == 0) == (storage == "pivoted")
    for a, b in zip(outputs(full, batch), outputs(dense, batch), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_compressing_leaves_a_shared_config_alone():
    family = FAMILIES["llama"]
    config = family.config()
    dense, other = family.model_class(config), family.model_class(config)
    before = config.to_dict()
    PGSVDCompressor(PGSVDConfig(parameter_reduction=0.3, solver="svd")).compress(dense)
    assert other.config is config
    assert config.to_dict() == before
    assert not hasattr(config, "_is_quantized")
    assert dense.config is not config
    assert dense.model.config is dense.config
    assert dense.model.layers[0].self_attn.config is dense.config


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_two_runs_give_the_same_bytes(storage, tmp_path):
    for run in ("a", "b"):
        compressed(FAMILIES["llama"], storage=storage)[0].save_pretrained(tmp_path / run)
    a, b = ((tmp_path / run / "model.safetensors").read_bytes() for run in ("a", "b"))
    assert a == b


def test_falcon_whose_linears_are_a_subclass(tmp_path):
    torch.manual_seed(0)
    config = hf.FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=100)
    config.bos_token_id = config.eos_token_id = 1
    model = hf.FalconForCausalLM(config).eval()
    batch = {"input_ids": torch.randint(3, 100, (4, 20))}
    report = PGSVDCompressor(PGSVDConfig(parameter_reduction=0.3, dataset=[batch])).compress(model)
    assert len(report.layers) == 8
    model.save_pretrained(tmp_path)
    assert_same(model, hf.FalconForCausalLM.from_pretrained(tmp_path), batch)
