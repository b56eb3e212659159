"""One tower of a compressed checkpoint, loaded by stock transformers, and saved on its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from fresh import in_fresh_process
from models import FAMILIES
from torch import Tensor, nn

from optimum_pgsvd import CompressionReport, PGSVDCompressor, PGSVDConfig
from optimum_pgsvd.modeling_pgsvd import LowRankLinear, low_rank_layers, set_submodule


def compressed(name: str, model: Any = None, **fields: Any) -> Any:
    model = model or FAMILIES[name].build()
    config = PGSVDConfig(**{"parameter_reduction": 0.3, "dataset": FAMILIES[name].batches(3)} | fields)
    PGSVDCompressor(config).compress(model)
    return model


def assert_same_tensors(a: nn.Module, b: nn.Module) -> None:
    states = a.state_dict(), b.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def nested(folder: Path) -> dict[str, Any]:
    """What the towers' configs in a checkpoint say of their compression, by the key of each."""
    config = json.loads((folder / "config.json").read_text())
    parts = {key: value for key, value in config.items() if isinstance(value, dict) and key != "quantization_config"}
    return {key: value["quantization_config"] for key, value in parts.items() if "quantization_config" in value}


# family, the stock class, the tower's name in the whole, and where it has its modules in the class
TOWERS = {
    "clip text": ("clip", hf.CLIPTextModel, "text_model", ""),
    "clip vision": ("clip", hf.CLIPVisionModel, "vision_model", ""),
    "clip text, projected": ("clip", hf.CLIPTextModelWithProjection, "text_model", "text_model"),
    "clip vision, projected": ("clip", hf.CLIPVisionModelWithProjection, "vision_model", "vision_model"),
    "siglip text": ("siglip", hf.SiglipTextModel, "text_model", ""),
    "siglip vision": ("siglip", hf.SiglipVisionModel, "vision_model", ""),
    "qwen2.5-vl text": ("qwen2_5_vl", hf.Qwen2_5_VLTextModel, "model.language_model", ""),
    "whisper decoder": ("whisper", hf.WhisperForCausalLM, "model.decoder", "model.decoder"),
    "t5 encoder": ("t5", hf.T5EncoderModel, "encoder", "encoder"),
}


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
@pytest.mark.parametrize("case", TOWERS)
def test_stock_classes_load_a_tower(case: str, storage: str, tmp_path) -> None:
    name, tower_class, inside, place = TOWERS[case]
    whole = compressed(name, storage=storage)
    whole.save_pretrained(tmp_path / "whole", max_shard_size="50KB")
    tower, info = tower_class.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert len(low_rank_layers(tower)) == len(low_rank_layers(whole.get_submodule(inside))) > 0
    assert_same_tensors(tower.get_submodule(place), whole.get_submodule(inside))
    tower.save_pretrained(tmp_path / "tower")
    again = tower_class.from_pretrained(tmp_path / "tower")
    assert_same_tensors(again, tower)
    assert "tower" not in json.loads((tmp_path / "whole" / "config.json").read_text())["quantization_config"]


def test_towers_of_a_checkpoint_that_was_compressed_on_disk(tmp_path) -> None:
    FAMILIES["clip"].build().save_pretrained(tmp_path / "dense")
    config = PGSVDConfig(0.3, dataset=FAMILIES["clip"].batches(3))
    PGSVDCompressor(config).compress_checkpoint(tmp_path / "dense", tmp_path / "out")
    whole = hf.CLIPModel.from_pretrained(tmp_path / "out")
    assert_same_tensors(hf.CLIPVisionModel.from_pretrained(tmp_path / "out"), whole.vision_model)


def test_what_a_checkpoint_says_of_its_towers(tmp_path) -> None:
    """The ranks of each, and no more than loading needs; of a tower that stayed dense, nothing."""
    whole = compressed("clip", storage="pivoted")
    whole.save_pretrained(tmp_path / "both")
    ranks = json.loads((tmp_path / "both" / "config.json").read_text())["quantization_config"]["ranks"]
    for key, part in nested(tmp_path / "both").items():
        tower = key.replace("_config", "_model")
        inside = {name: rank for name, rank in ranks.items() if name.startswith(tower)}
        assert part == {
            "quant_method": "pgsvd",
            "format_version": 2,
            "storage": "pivoted",
            "ranks": inside,
            "tower": tower,
        }
    one = compressed("clip", modules_to_not_convert=["text_model"])
    one.save_pretrained(tmp_path / "one")
    assert list(nested(tmp_path / "one")) == ["vision_config"]
    text = hf.CLIPTextModel.from_pretrained(tmp_path / "one")
    assert not low_rank_layers(text)
    assert_same_tensors(text, one.text_model)


def test_the_ranks_of_towers_are_those_at_the_last_save(tmp_path) -> None:
    """Of a layer that got another rank after it was loaded."""
    compressed("clip").save_pretrained(tmp_path / "first")
    model = hf.CLIPModel.from_pretrained(tmp_path / "first")
    name, layer = next(iter(low_rank_layers(model.vision_model).items()))
    thinner = LowRankLinear.like(layer.to_dense(torch.float32), 2)
    set_submodule(model.vision_model, name, thinner)
    model.save_pretrained(tmp_path / "second")
    assert nested(tmp_path / "second")["vision_config"]["ranks"][f"vision_model.{name}"] == 2
    assert_same_tensors(hf.CLIPVisionModel.from_pretrained(tmp_path / "second"), model.vision_model)


def test_the_report_of_a_tower_is_its_part(tmp_path) -> None:
    compressed("clip").save_pretrained(tmp_path / "whole")
    whole = CompressionReport.load(tmp_path / "whole")
    for tower_class, prefix in ((hf.CLIPVisionModel, ""), (hf.CLIPVisionModelWithProjection, "vision_model.")):
        tower = tower_class.from_pretrained(tmp_path / "whole")
        names = [layer.name for layer in tower.pgsvd_report.layers]
        inside = [layer for layer in whole.layers if layer.name.startswith("vision_model.")]
        assert names == [prefix + layer.name.removeprefix("vision_model.") for layer in inside]
        assert all(isinstance(tower.get_submodule(name), nn.Module) for name in names)
        assert tower.pgsvd_report.model_after.parameters == sum(p.numel() for p in tower.parameters())
        dense = tower.pgsvd_report.model_before.parameters
        tower.save_pretrained(tmp_path / "tower")
        assert CompressionReport.load(tmp_path / "tower") == tower.pgsvd_report
        again = tower_class.from_pretrained(tmp_path / "tower")
        assert again.pgsvd_report == tower.pgsvd_report
        assert dense == sum(p.numel() for p in again.dequantize().parameters())


# A tower taken from the whole, and saved on its own

PARTS = [
    ("llava", "model.language_model", hf.LlamaModel),
    ("llava", "model.vision_tower", hf.CLIPVisionModel),
    ("qwen3_vl", "model.visual", hf.Qwen3VLVisionModel),
    ("idefics3", "model.text_model", hf.LlamaModel),
    ("clip", "vision_model", hf.CLIPVisionModel),
    ("blip", "vision_model", hf.BlipVisionModel),
]


@pytest.mark.parametrize("loaded", [False, True], ids=["compressed", "reloaded"])
@pytest.mark.parametrize(("name", "part", "part_class"), PARTS, ids=lambda value: getattr(value, "__name__", value))
def test_a_tower_taken_from_the_whole_is_saved_whole(name, part, part_class, loaded, tmp_path) -> None:
    whole = compressed(name)
    whole.save_pretrained(tmp_path / "whole")
    if loaded:
        whole = FAMILIES[name].model_class.from_pretrained(tmp_path / "whole")
    tower = whole.get_submodule(part)
    tower.save_pretrained(tmp_path / "part")
    assert_same_tensors(part_class.from_pretrained(tmp_path / "part"), tower)
    # and the whole is what it was
    whole.save_pretrained(tmp_path / "again")
    assert nested(tmp_path / "again") == nested(tmp_path / "whole")
    assert_same_tensors(FAMILIES[name].model_class.from_pretrained(tmp_path / "again"), whole)


# The language model of a model that sees

SEEING = {
    "llava": (r"^language_model\.", hf.LlamaForCausalLM, "language_model.lm_head"),
    "idefics3": (r"^model\.text_model\.", hf.LlamaForCausalLM, "lm_head"),
}


@torch.no_grad()
def test_the_language_model_of_llava_by_a_key_mapping(tmp_path) -> None:
    """What a stock class does not find by itself, dense or compressed, it finds with the names that the user gives."""
    whole = compressed("llava")
    whole.save_pretrained(tmp_path)
    model = hf.LlamaForCausalLM.from_pretrained(tmp_path, key_mapping={r"^language_model\.": ""})
    ids = torch.arange(6, 26)[None]
    assert torch.equal(model(input_ids=ids).logits, whole(input_ids=ids).logits)
    assert len(low_rank_layers(model)) == len(low_rank_layers(whole.model.language_model))


@pytest.mark.parametrize(
    ("name", "tower_class"),
    [
        ("llava", hf.LlamaForCausalLM),
        ("llava", hf.LlamaModel),
        ("llava", hf.CLIPVisionModel),
        ("qwen3_vl", hf.Qwen3VLTextModel),
        ("idefics3", hf.LlamaForCausalLM),
        ("blip", hf.BlipVisionModel),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_towers_whose_names_do_not_fit_are_refused(name, tower_class, tmp_path) -> None:
    """transformers loads none of their weights, of a dense checkpoint neither, and would leave them at random."""
    FAMILIES[name].build().save_pretrained(tmp_path / "dense")
    _, info = tower_class.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert info["missing_keys"]
    compressed(name).save_pretrained(tmp_path / "whole")
    with pytest.raises(RuntimeError, match=r"none of them is found in a .* Load the whole model and take the tower"):
        tower_class.from_pretrained(tmp_path / "whole")


# Models with and without a head

HEADS = ["llava", "qwen2_5_vl", "qwen3_vl", "idefics3", "smolvlm", "whisper", "t5", "clip"]


@pytest.mark.parametrize("name", HEADS)
def test_the_base_of_a_checkpoint_with_a_head(name: str, tmp_path) -> None:
    whole = compressed(name)
    whole.save_pretrained(tmp_path)
    base, info = hf.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    expected = whole if name == "clip" else whole.base_model
    assert_same_tensors(base, expected if name != "t5" else without_head(whole, base))


def without_head(whole: nn.Module, base: nn.Module) -> nn.Module:
    """T5's head lies beside the towers, in no base model of its own."""
    del whole.lm_head
    assert type(base).__name__ == "T5Model"
    return whole


@pytest.mark.parametrize("name", [name for name in HEADS if name != "clip"])
def test_a_head_on_a_checkpoint_without(name: str, tmp_path) -> None:
    """The head is new, or tied to the embeddings; every low-rank layer is that of the base."""
    family = FAMILIES[name]
    family.build().save_pretrained(tmp_path / "dense")
    base = compressed(name, hf.AutoModel.from_pretrained(tmp_path / "dense"))
    base.save_pretrained(tmp_path / "base")
    model, info = family.model_class.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert all("head" in key or "proj_out" in key for key in info["missing_keys"])
    layers = low_rank_layers(model)
    assert len(layers) == len(low_rank_layers(base)) > 0
    for layer, theirs in zip(layers.values(), low_rank_layers(base).values(), strict=True):
        assert torch.equal(layer.product(), theirs.product())


# Back to dense


def test_nothing_is_left_of_it_in_a_dense_model(tmp_path) -> None:
    whole = compressed("clip")
    whole.save_pretrained(tmp_path / "whole")
    for model in (whole, hf.CLIPModel.from_pretrained(tmp_path / "whole")):
        model.dequantize().save_pretrained(tmp_path / "dense")
        assert "quantization_config" not in (tmp_path / "dense" / "config.json").read_text()
        assert_same_tensors(hf.CLIPVisionModel.from_pretrained(tmp_path / "dense"), model.vision_model)
    dense_tower = hf.CLIPVisionModel.from_pretrained(tmp_path / "whole").dequantize()
    assert_same_tensors(dense_tower, model.vision_model)


# In a process of its own


def logits_of(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).last_hidden_state


def test_a_stock_process_loads_a_tower_without_an_import(tmp_path) -> None:
    whole = compressed("clip")
    whole.save_pretrained(tmp_path / "out")
    torch.save(logits_of(whole.text_model, torch.arange(6, 26)[None]), tmp_path / "expected.pt")
    printed = in_fresh_process(
        """
        import sys, warnings
        warnings.simplefilter("error")
        import torch
        from transformers import CLIPTextModel
        model = CLIPTextModel.from_pretrained(sys.argv[1])
        with torch.no_grad():
            found = model(input_ids=torch.arange(6, 26)[None]).last_hidden_state
        print("EQUAL", torch.equal(found, torch.load(sys.argv[2])))
        """,
        tmp_path / "out",
        tmp_path / "expected.pt",
        home=tmp_path,
    )
    assert "EQUAL True" in printed
    # transformers lists what it left out: the other tower and nothing else
    listed = [line for line in printed.splitlines() if "UNEXPECTED" in line and "|" in line]
    assert listed
    assert all(
        line.split()[0].startswith(("vision_model.", "text_projection", "visual_projection", "logit"))
        for line in listed
    )
    assert "MISSING" not in printed


def test_without_the_package_a_tower_is_never_random(tmp_path) -> None:
    """It raises; of a self-contained checkpoint, its own code loads it."""
    whole = compressed("clip", self_contained=True)
    whole.save_pretrained(tmp_path / "out")
    torch.save(logits_of(whole.text_model, torch.arange(6, 26)[None]), tmp_path / "expected.pt")
    printed = in_fresh_process(
        """
        import torch
        from transformers import CLIPTextModel
        try:
            CLIPTextModel.from_pretrained(sys.argv[1])
        except RuntimeError:
            print("RAISED")
        from transformers.dynamic_module_utils import get_class_from_dynamic_module
        tower = get_class_from_dynamic_module("modeling_pgsvd.CLIPTextModel", sys.argv[1])
        model = tower.from_pretrained(sys.argv[1])
        with torch.no_grad():
            found = model(input_ids=torch.arange(6, 26)[None]).last_hidden_state
        print("EQUAL", torch.equal(found, torch.load(sys.argv[2])))
        model.save_pretrained(sys.argv[3])
        print("AGAIN", torch.equal(found, tower.from_pretrained(sys.argv[3])(torch.arange(6, 26)[None])[0]))
        """,
        tmp_path / "out",
        tmp_path / "expected.pt",
        tmp_path / "again",
        home=tmp_path,
        without_package=True,
    )
    assert "RAISED" in printed
    assert "EQUAL True" in printed
    assert "AGAIN True" in printed
