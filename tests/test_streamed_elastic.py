"""Elastic checkpoints compressed on disk: the side file too is what compressing in memory and saving gives."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from models import FAMILIES, each_family
from safetensors.torch import load_file
from streamed import Killed, assert_same_checkpoint, failing, in_memory, on_disk, request
from transformers import AutoModelForCausalLM

from optimum_pgsvd import CompressionReport, PGSVDCompressor, PGSVDConfig, factoring
from optimum_pgsvd.checkpoint import ELASTIC_NAME
from optimum_pgsvd.factoring import profiles as factoring_profiles
from optimum_pgsvd.streaming import spill, weights
from optimum_pgsvd.streaming.output import CompressedCheckpoint
from optimum_pgsvd.streaming.shards import ShardWriter
from optimum_pgsvd.streaming.side_file import SideFileWriter
from optimum_pgsvd.streaming.workspace import Workspace


LLAMA = FAMILIES["llama"]

# How far to compress: not at all, so that the side file holds factors of all, and so little that some stay dense.
STARTS = (0.0, 0.02)


@pytest.fixture(autouse=True)
def all_is_large(monkeypatch):
    monkeypatch.setattr(weights, "LARGE", 0)
    monkeypatch.setattr(spill, "SMALLEST", 1)
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    LLAMA.build(num_hidden_layers=3).save_pretrained(folder, max_shard_size="50KB")
    return folder


def elastic(family=LLAMA, **settings):
    return request(family, **{"parameter_reduction": 0.02, "elastic": True} | settings)


@pytest.fixture(scope="module")
def expected(dense, tmp_path_factory):
    return in_memory(dense, tmp_path_factory.mktemp("expected") / "out", elastic())


def assert_same_as_in_memory(source, tmp_path, config):
    expected = in_memory(source, tmp_path / "expected", config)
    mine = on_disk(source, tmp_path / "mine", config)
    assert (mine / ELASTIC_NAME).exists()
    assert_same_checkpoint(mine, expected)


# The same bytes


@pytest.mark.parametrize("start", STARTS)
@each_family
def test_every_family_is_compressed_as_in_memory(family, start, tmp_path):
    family.build().save_pretrained(tmp_path / "dense")
    config = elastic(family, parameter_reduction=start, modules_to_not_convert=family.uncut)
    assert_same_as_in_memory(tmp_path / "dense", tmp_path, config)


REQUESTS = {
    "svd": ("llama", {"solver": "svd", "dataset": None}),
    "uniform": ("bert", {"allocation": "uniform"}),
    "tolerance": ("llama", {"tolerance": 0.1}),
    "ranks": ("gpt2", {"ranks": {"*.0.attn.*": 4, "mlp": 5}}),
    "a dense block": ("t5", {"modules_to_not_convert": ["encoder.block.1"]}),
    "a group outside the blocks": ("llava", {"groups": {"multi_modal_projector": {"tolerance": 0.0}}}),
    "groups outside the blocks by svd": (
        "opt",
        {"groups": {"project_*": {"tolerance": 0.0}}, "solver": "svd", "dataset": None},
    ),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_every_request(case, tmp_path):
    name, settings = REQUESTS[case]
    if settings.keys() & {"tolerance", "ranks"}:
        settings = settings | {"parameter_reduction": None}
    FAMILIES[name].build().save_pretrained(tmp_path / "dense")
    assert_same_as_in_memory(tmp_path / "dense", tmp_path, elastic(FAMILIES[name], **settings))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, tmp_path):
    FAMILIES["gpt2"].build().to(dtype).save_pretrained(tmp_path / "dense")
    assert_same_as_in_memory(tmp_path / "dense", tmp_path, elastic(FAMILIES["gpt2"]))


def test_measurements_made_before(dense, tmp_path, monkeypatch):
    PGSVDCompressor(elastic()).measure_checkpoint(dense, tmp_path / "measured")
    monkeypatch.setattr(factoring_profiles, "measure_profiles", None)  # they are there
    assert_same_as_in_memory(dense, tmp_path, elastic(dataset=str(tmp_path / "measured")))


# Written block by block


def test_factors_are_in_the_file_before_their_block_is_noted_and_nowhere_else(dense, expected, tmp_path, monkeypatch):
    kept = [layer.name for layer in CompressionReport.load(expected).layers if layer.rank is None]
    wanted, noted, keep_block = load_file(expected / ELASTIC_NAME), [], Workspace.keep_block

    def checked(work, block, layers, seconds):
        noted.append(block)
        found = load_file(os.path.join(work.checkpoint, ELASTIC_NAME))
        for name in kept:
            key, is_written = f"{name}.left.weight", name.startswith(tuple(filter(None, noted)))
            assert torch.equal(found[key], wanted[key] if is_written else torch.zeros_like(wanted[key])), key
        keep_block(work, block, layers, seconds)

    writers, add = set(), SideFileWriter.add
    monkeypatch.setattr(Workspace, "keep_block", checked)
    monkeypatch.setattr(SideFileWriter, "add", lambda self, *args: (writers.add(self), add(self, *args)))
    on_disk(dense, tmp_path / "mine", elastic())
    assert {name.rsplit(".", 2)[0].split(".")[2] for name in kept} == {"0", "1", "2"}
    assert len(noted) == 4
    assert [(writer.factors, writer.profiles) for writer in writers] == [({}, {})]


def test_factors_are_on_the_disk_before_their_block_is_noted(dense, tmp_path, monkeypatch):
    events = []

    def recorded(owner, name):
        method = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: (events.append(name), method(*args))[1])

    recorded(SideFileWriter, "add")
    recorded(SideFileWriter, "sync")
    recorded(Workspace, "keep_plan")
    recorded(Workspace, "keep_block")
    on_disk(dense, tmp_path / "mine", elastic())
    notes = [number for number, event in enumerate(events) if event.startswith("keep")]
    assert len(notes) == 5
    assert all(events[number - 1] == "sync" for number in notes)
    assert "add" in events


# Interrupted


PLACES = {
    "begin": (SideFileWriter, "begin"),
    "sync": (SideFileWriter, "sync"),
    "plan": (Workspace, "keep_plan"),
    "allocate": (ShardWriter, "allocate"),
    "add": (SideFileWriter, "add"),
    "block": (Workspace, "keep_block"),
    "finish": (CompressedCheckpoint, "finish"),
    "artifacts": (shutil, "copytree"),
    "publish": (Workspace, "publish"),
}


def interrupted(monkeypatch, source, output, place, number, before):
    """Start a run, and let it end at the n-th call of a method, before or after it did its work."""
    with monkeypatch.context() as patch:
        failing(patch, PLACES[place], number, before)
        with pytest.raises(Killed):
            on_disk(source, output, elastic())


def counted(owner, name, note, monkeypatch):
    """Note the arguments of every call of a function."""
    function = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args: (note(args), function(*args))[1])


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    ("place", "number"),
    [
        ("begin", 1),
        ("sync", 1),
        ("plan", 1),
        ("allocate", 1),
        ("add", 1),
        ("add", 3),
        *(("block", number) for number in range(1, 5)),
        ("finish", 1),
        ("artifacts", 1),
        ("publish", 1),
    ],
)
def test_a_run_may_be_interrupted_anywhere(place, number, before, dense, expected, tmp_path, monkeypatch):
    output, solved, measured = tmp_path / "mine", [], []
    if (place, before) != ("publish", False):  # by then all is done
        interrupted(monkeypatch, dense, output, place, number, before)
    counted(factoring.blocks, "factor_layer", lambda args: solved.append(args[1].name), monkeypatch)
    counted(factoring_profiles, "measure_profiles", measured.append, monkeypatch)
    notes = tmp_path / ".mine.pgsvd" / "progress.jsonl"
    finished = [json.loads(line)["block"] for line in notes.read_text().splitlines()] if notes.exists() else []
    on_disk(dense, output, elastic())
    assert_same_checkpoint(output, expected)
    blocks = {f"model.layers.{number}" for number in range(3)} - {*finished}
    assert {name.rsplit(".", 2)[0] for name in solved} == blocks
    has_no_plan = place in ("begin", "sync") or (place, before) in (("plan", True), ("publish", False))
    assert len(measured) == has_no_plan


# Cut


@torch.no_grad()
def test_it_is_cut_while_it_is_loaded_as_one_compressed_in_memory(dense, expected, tmp_path):
    mine = on_disk(dense, tmp_path / "mine", elastic())
    for budget in ({"parameter_reduction": 0.4}, {"tolerance": 0.5}):
        found, other = (
            AutoModelForCausalLM.from_pretrained(folder, quantization_config=PGSVDConfig(**budget))
            for folder in (mine, expected)
        )
        ranks = found.config.quantization_config.ranks
        assert ranks == other.config.quantization_config.ranks
        state, wanted = found.state_dict(), other.state_dict()
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[name], wanted[name]) for name in wanted)
        direct = LLAMA.build(num_hidden_layers=3)
        PGSVDCompressor(request(LLAMA, **budget)).compress(direct)
        assert ranks == direct.config.quantization_config.ranks
        torch.testing.assert_close(dict(state), direct.state_dict(), rtol=1e-6, atol=1e-7)
