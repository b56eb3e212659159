"""What the benchmarks stand on: checkpoints made from a seed, and the counts of the cost model."""

import hashlib
import importlib
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")


def digests(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def test_a_made_checkpoint_loads_and_runs(tmp_path):
    from make_checkpoint import calibration_tokens, make

    model, info = AutoModelForCausalLM.from_pretrained(make(tmp_path, "tiny"), output_loading_info=True)
    assert not any(info.values())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        logits = model(input_ids=torch.stack(calibration_tokens(2, 64, 128))).logits
    assert logits.isfinite().all()
    assert logits.std() > 0.01


def test_a_made_checkpoint_depends_on_its_seed_alone(tmp_path):
    from make_checkpoint import make

    first, again, other = (
        digests(make(tmp_path / name, "tiny", seed=seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == again
    assert first["config.json"] == other["config.json"]
    assert first["model.safetensors"] != other["model.safetensors"]


def test_shards_and_depth_do_not_change_the_tensors(tmp_path):
    from make_checkpoint import make

    whole = AutoModelForCausalLM.from_pretrained(make(tmp_path / "whole", "tiny")).state_dict()
    folder = make(tmp_path / "parts", "tiny", layers=2, max_shard_size=60_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    parts = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert len(parts) < len(whole)
    for name, tensor in parts.items():
        assert torch.equal(tensor, whole[name]), name


def test_spectra_fall_and_inputs_have_outliers(tmp_path):
    from make_checkpoint import make

    model = AutoModelForCausalLM.from_pretrained(make(tmp_path, "tiny"), dtype=torch.float32)
    values = torch.linalg.svdvals(model.model.layers[0].mlp.gate_proj.weight)
    assert values[0] > 5 * values[-1] > 0
    norm = model.model.layers[0].input_layernorm.weight
    assert norm.max() > 3 * norm.median()


def test_the_cost_model_counts_what_a_model_has():
    from cost_model import Shapes, by_outputs
    from make_checkpoint import MODELS, meta_model, model_config

    config = model_config("tiny")
    shapes, hidden, wide = (
        Shapes.of(config, length=16),
        MODELS["tiny"]["hidden_size"],
        MODELS["tiny"]["intermediate_size"],
    )
    assert len(shapes.blocks) == MODELS["tiny"]["num_hidden_layers"]
    assert shapes.parameters == sum(p.numel() for p in meta_model(config).parameters())
    block = shapes.blocks[0]
    linears = sum(layer.m * layer.n for layer in block.layers)
    assert block.parameters == linears + 2 * hidden
    assert block.forward_flops >= 2 * 16 * linears
    assert [len(group) for group in block.groups] == [3, 1, 2, 1]
    assert [by_outputs(group) for group in block.groups] == [False, False, False, True]
    assert shapes.gram_bytes(4) == 4 * (3 * hidden**2 + wide**2)


@pytest.mark.parametrize("name", ["ablation", "domains", "quantized", "shared", "theory"])
def test_a_model_that_there_is_not_is_refused(name, tmp_path):
    script = importlib.import_module(name)
    with pytest.raises(SystemExit, match="--models nosuch: there are .*demo.* PGSVD_DATA"):
        script.main(["--models", "demo", "nosuch", "--result", str(tmp_path / "cells.json")])
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "training needs --run FOLDER and --steps N"), (["--export"], "--export needs --run"),
     (["--run", "r"], "--steps N"), (["--run", "r", "--steps", "1"], "PGSVD_DATA is not set")],
)  # fmt: skip
def test_what_training_a_clip_lacks_is_said(arguments, message, monkeypatch, capsys):
    from train_clip import main

    monkeypatch.delenv("PGSVD_DATA", raising=False)
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err
