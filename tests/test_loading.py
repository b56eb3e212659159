"""Loading: in fresh processes, without the package, and from damaged checkpoints."""

import json
import shutil
from functools import partial

import pytest
import torch
from fresh import in_fresh_process
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_pgsvd import CalibrationError, PGSVDCompressor, PGSVDConfig, UnsupportedModelError, modeling_pgsvd


fresh_process = partial(in_fresh_process, isolated=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, dense, texts):
    folder = tmp_path_factory.mktemp("compressed")
    config = PGSVDConfig(parameter_reduction=0.3, dataset=texts, sequence_length=32, self_contained=True)
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    model.save_pretrained(folder, max_shard_size="50KB")
    torch.save(model(input_ids=torch.arange(3, 20)[None]).logits, folder / "logits.pt")
    return folder


def test_stock_pipeline_in_a_fresh_process_without_importing_the_package(checkpoint, tmp_path):
    printed = fresh_process(
        """
        import sys, warnings
        warnings.simplefilter("error")
        import torch
        assert not any(name.startswith("transformers") for name in sys.modules), "the hook imported transformers"
        from transformers import pipeline
        generator = pipeline("text-generation", model=sys.argv[1])
        logits = generator.model(input_ids=torch.arange(3, 20)[None]).logits
        assert torch.equal(logits, torch.load(sys.argv[1] + "/logits.pt"))
        print("generated:", generator("once upon", max_new_tokens=4)[0]["generated_text"])
        """,
        checkpoint,
        home=tmp_path,
    )
    assert "generated: " in printed
    assert "LOAD REPORT" not in printed
    assert "Warning" not in printed


def test_every_dtype_is_bit_equal_in_a_fresh_process(dense, texts, tmp_path):
    for dtype in (torch.bfloat16, torch.float16):
        config = PGSVDConfig(parameter_reduction=0.3, dataset=texts, sequence_length=32)
        model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config, dtype=dtype)
        folder = tmp_path / str(dtype)
        model.save_pretrained(folder, max_shard_size="20KB")
        torch.save(model(input_ids=torch.arange(3, 20)[None]).logits, folder / "logits.pt")
    code = """
        import sys, torch
        from transformers import AutoModelForCausalLM
        for folder in sys.argv[1:]:
            for options in ({}, {"device_map": "auto"}):
                model = AutoModelForCausalLM.from_pretrained(folder, **options)
                logits = model(input_ids=torch.arange(3, 20)[None]).logits
                assert torch.equal(logits, torch.load(folder + "/logits.pt"))
            print(logits.dtype)
        """
    printed = fresh_process(code, tmp_path / "torch.bfloat16", tmp_path / "torch.float16", home=tmp_path)
    assert "torch.bfloat16\n" in printed
    assert "torch.float16\n" in printed


def test_tokenizer_and_processor_files_are_copied_as_they_are(dense, tmp_path):
    source = tmp_path / "dense"
    shutil.copytree(dense, source)
    (source / "preprocessor_config.json").write_text('{"image_processor_type": "NotInstalled"}')
    (source / "chat_template.jinja").write_text("{{ messages }}")
    config = PGSVDConfig(parameter_reduction=0.3, solver="svd")
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    model.save_pretrained(tmp_path / "out")
    for name in ("preprocessor_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "out")  # onto itself
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_importing_order_does_not_matter(checkpoint, tmp_path):
    for first in (
        "optimum_pgsvd",
        "optimum_pgsvd.config",
        "transformers.quantizers.auto",
        "transformers.modeling_utils",
    ):
        code = f"""
        import sys, warnings
        warnings.simplefilter("error")
        import {first}
        from transformers import AutoModelForCausalLM
        from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
        AutoModelForCausalLM
        import transformers.modeling_utils
        print(AUTO_QUANTIZER_MAPPING["pgsvd"].__name__)
        """
        assert "PGSVDQuantizer" in fresh_process(code, home=tmp_path)


def test_importing_the_package_imports_neither_torch_nor_transformers(tmp_path):
    fresh_process(
        "import sys, optimum_pgsvd; assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)",
        home=tmp_path,
    )


def test_the_autoload_switch_turns_the_entry_point_off(tmp_path):
    code = """
        import os; os.environ["PGSVD_AUTOLOAD"] = "0"
        import torch, transformers.modeling_utils
        from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
        assert "pgsvd" not in AUTO_QUANTIZER_MAPPING
        import optimum_pgsvd
        assert "pgsvd" not in AUTO_QUANTIZER_MAPPING
        from optimum_pgsvd import PGSVDConfig
        assert "pgsvd" in AUTO_QUANTIZER_MAPPING
        """
    fresh_process(code, home=tmp_path)


@pytest.fixture(params=["checkpoint", "pivoted"])
def either(request):
    """A checkpoint of each storage."""
    return request.getfixturevalue(request.param)


def test_without_the_package_loading_fails_loudly(either, tmp_path):
    code = """
        import sys
        from transformers import AutoModelForCausalLM, pipeline
        for load in (AutoModelForCausalLM.from_pretrained, lambda folder: pipeline("text-generation", model=folder)):
            try:
                load(sys.argv[1])
            except (RuntimeError, ValueError) as error:
                print("refused:", error)
            else:
                sys.exit("loaded random weights")
        """
    assert fresh_process(code, either, without_package=True, home=tmp_path).count("refused:") == 2


def test_self_contained_checkpoint_needs_trust_remote_code_alone(either, tmp_path):
    code = """
        import sys, torch
        from transformers import AutoModel, AutoModelForCausalLM, pipeline
        folder, again = sys.argv[1:]
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        logits, ids = torch.load(folder + "/logits.pt"), torch.arange(3, 20)[None]
        assert torch.equal(model(input_ids=ids).logits, logits)
        model.save_pretrained(again)
        model = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
        assert torch.equal(model(input_ids=ids).logits, logits)
        kind = type(model.model.layers[0].mlp.up_proj).__name__
        assert kind in ("LowRankLinear", "PivotedLinear")
        assert kind in str(AutoModel.from_pretrained(folder, trust_remote_code=True))
        generator = pipeline("text-generation", model=folder, trust_remote_code=True)
        assert torch.equal(generator.model(input_ids=ids).logits, logits)
        assert "optimum_pgsvd" not in sys.modules
        print("same")
        """
    again = tmp_path / "again"
    assert "same" in fresh_process(code, either, again, without_package=True, home=tmp_path)
    config = json.loads((again / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_pgsvd.LlamaForCausalLM"
    assert (again / "modeling_pgsvd.py").exists()


def test_code_is_shipped_only_where_asked_for(dense, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=PGSVDConfig(parameter_reduction=0.3, solver="svd")
    )
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "modeling_pgsvd.py").exists()
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())


def damaged(checkpoint, folder, change):
    """A copy of a checkpoint whose tensors were changed."""
    folder.mkdir()
    tensors = {}
    for file in checkpoint.glob("*.safetensors"):
        tensors |= load_file(file)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((checkpoint / "config.json").read_text())
    return folder


LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def pivoted(tmp_path_factory, dense, texts):
    folder = tmp_path_factory.mktemp("pivoted")
    settings = {"parameter_reduction": 0.3, "dataset": texts, "sequence_length": 32, "self_contained": True}
    config = PGSVDConfig(storage="pivoted", **settings)
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    model.save_pretrained(folder, max_shard_size="50KB")
    torch.save(model(input_ids=torch.arange(3, 20)[None]).logits, folder / "logits.pt")
    return folder


def swapped(tensors, place, row):
    order = tensors[f"{LAYER}.order"].clone()
    order[place] = row
    tensors[f"{LAYER}.order"] = order


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{LAYER}.basis.weight"), f"missing factor: {LAYER}.basis.weight"),
        (lambda t: t.pop(f"{LAYER}.coefficients.weight"), f"missing factor: {LAYER}.coefficients.weight"),
        (lambda t: t.pop(f"{LAYER}.order"), f"missing factor: {LAYER}.order"),
        (lambda t: t.update({f"{LAYER}.basis.weight": torch.zeros(3, 32)}), f"misshapen factor: {LAYER}.basis"),
        (
            lambda t: t.update({f"{LAYER}.coefficients.weight": torch.zeros(64, 3)}),
            f"misshapen factor: {LAYER}.coefficients",
        ),
        (lambda t: t.update({f"{LAYER}.order": torch.arange(9)}), f"misshapen factor: {LAYER}.order"),
        (lambda t: swapped(t, 0, 64), f"damaged order: {LAYER}.order does not hold each of 0 … 63 once"),
        (lambda t: swapped(t, 0, -1), f"damaged order: {LAYER}.order"),
        (lambda t: swapped(t, 0, int(t[f"{LAYER}.order"][1])), f"damaged order: {LAYER}.order"),
        (lambda t: t.update({"model.layers.1.mlp.order": torch.zeros(2)}), "extra factor: model.layers.1.mlp.order"),
        (
            lambda t: t.update({"model.layers.1.mlp.basis.weight": torch.zeros(2)}),
            "extra factor: model.layers.1.mlp.basis",
        ),
    ],
    ids=["no basis", "no coefficients", "no order", "basis", "coefficients", "order", "beyond", "below", "twice",
         "extra order", "extra basis"],
)  # fmt: skip
def test_damaged_pivoted_storage_is_named(pivoted, tmp_path, change, message):
    folder = damaged(pivoted, tmp_path / "damaged", change)
    with pytest.raises(RuntimeError, match=message.replace(".", r"\.")):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_reader_of_format_1_refuses_pivoted_storage(pivoted, monkeypatch):
    monkeypatch.setattr(modeling_pgsvd, "FORMATS", {"factors": 1})
    with pytest.raises(RuntimeError, match="PGSVD format 2, and this runtime reads up to 1; upgrade"):
        AutoModelForCausalLM.from_pretrained(pivoted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{LAYER}.right.weight"), f"missing factor: {LAYER}.right.weight"),
        (lambda t: t.update({f"{LAYER}.left.weight": torch.zeros(64, 3)}), f"misshapen factor: {LAYER}.left.weight"),
        (lambda t: t.update({f"{LAYER}.right.weight": torch.zeros(3, 32)}), f"misshapen factor: {LAYER}.right.weight"),
        (
            lambda t: t.update({"model.layers.1.mlp.left.weight": torch.zeros(2)}),
            "extra factor: model.layers.1.mlp.left",
        ),
    ],
    ids=["missing", "misshapen left", "misshapen right", "extra"],
)
def test_damaged_factors_are_named(checkpoint, tmp_path, change, message):
    folder = damaged(checkpoint, tmp_path / "damaged", change)
    with pytest.raises(RuntimeError, match=message.replace(".", r"\.")):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_wrong_rank_and_an_unlisted_layer_in_the_config_are_named(checkpoint, tmp_path):
    folder = damaged(checkpoint, tmp_path / "damaged", lambda tensors: None)
    config = json.loads((folder / "config.json").read_text())
    ranks = config["quantization_config"]["ranks"]
    rank = ranks[LAYER]
    for change, message in (({LAYER: rank + 1}, "misshapen factor"), ({LAYER: None}, "extra factor")):
        changed = {name: r for name, r in {**ranks, **change}.items() if r is not None}
        config["quantization_config"]["ranks"] = changed
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(RuntimeError, match=f"{message}: {LAYER}"):
            AutoModelForCausalLM.from_pretrained(folder)


def test_undamaged_copy_loads(checkpoint, tmp_path):
    folder = damaged(checkpoint, tmp_path / "copy", lambda tensors: None)
    logits = AutoModelForCausalLM.from_pretrained(folder)(input_ids=torch.arange(3, 20)[None]).logits
    assert torch.equal(logits, torch.load(checkpoint / "logits.pt"))


def test_checkpoint_reloads_with_parts_on_disk(either, tmp_path):
    checkpoint = either
    placement = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    placement |= {"model.layers.0": "disk", "model.layers.1": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(checkpoint, device_map=placement, offload_folder=tmp_path / "offload")
    logits = model(input_ids=torch.arange(3, 20)[None]).logits
    assert torch.equal(logits, torch.load(checkpoint / "logits.pt"))
    with pytest.warns(UserWarning, match="offloaded modules"):  # transformers' own
        model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")(input_ids=torch.arange(3, 20)[None]).logits
    assert torch.equal(again, logits)


def test_what_cannot_be_compressed_while_loading_is_refused_before_it_is_read(dense, tmp_path):
    with pytest.raises(CalibrationError, match="solver='eigh' needs calibration data"):
        AutoModelForCausalLM.from_pretrained(dense, quantization_config=PGSVDConfig(parameter_reduction=0.2))
    placement = {"model": "cpu", "lm_head": "disk"}
    config = PGSVDConfig(parameter_reduction=0.2, solver="svd")
    with pytest.raises(UnsupportedModelError, match="device_map=None"):
        AutoModelForCausalLM.from_pretrained(
            dense, quantization_config=config, device_map=placement, offload_folder=tmp_path
        )


def test_the_request_of_the_user_is_not_changed(dense, texts):
    config = PGSVDConfig(parameter_reduction=0.3, dataset=texts, sequence_length=32)
    before = config.to_dict()
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    assert config.to_dict() == before
    assert config.dataset is texts
    result = model.config.quantization_config
    assert result.is_result
    assert set(result.ranks) == {name for name, _ in model.named_modules() if hasattr(_, "rank")}


def test_compressing_on_load_equals_compressing_in_memory(dense, texts):
    settings = {"parameter_reduction": 0.3, "dataset": texts, "sequence_length": 32}
    loaded = AutoModelForCausalLM.from_pretrained(dense, quantization_config=PGSVDConfig(**settings))
    model = AutoModelForCausalLM.from_pretrained(dense)
    PGSVDCompressor(PGSVDConfig(**settings)).compress(model, tokenizer=AutoTokenizer.from_pretrained(dense))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
