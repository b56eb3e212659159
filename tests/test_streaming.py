"""Checkpoints compressed on disk: byte for byte what compressing in memory and saving gives, in little memory."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from models import FAMILIES, ODD, POSITIONS, SIZES, SPECIAL, each_family, text_family
from streamed import assert_same_checkpoint, in_memory, on_disk, request
from torch import nn

from optimum_pgsvd import PGSVDCompressor, PGSVDConfig, factoring
from optimum_pgsvd.distributed import Peers
from optimum_pgsvd.errors import CalibrationError, CheckpointError, ConfigError, NonFiniteError, UnsupportedModelError
from optimum_pgsvd.factoring import profiles as factoring_profiles
from optimum_pgsvd.planning import plan_ranks
from optimum_pgsvd.report import CompressionReport
from optimum_pgsvd.saving import commit_of
from optimum_pgsvd.streaming import run, spill, weights
from optimum_pgsvd.streaming.output import CompressedCheckpoint
from optimum_pgsvd.streaming.source import StreamedModel
from optimum_pgsvd.streaming.spill import Spill
from optimum_pgsvd.streaming.weights import StreamedWeights, large_layers
from optimum_pgsvd.targets import find_blocks, find_targets


CALIBRATIONS = ("parallel", "anchored")

# Models that use the weight of a large layer outside its forward, ask where they are, or tie biases.
ODD = ODD | {
    "mobilebert": text_family(
        "mobilebert",
        hf.MobileBertForMaskedLM,
        hf.MobileBertConfig,
        **SPECIAL,
        **SIZES,
        **POSITIONS,
        embedding_size=16,
        intra_bottleneck_size=16,
        true_hidden_size=16,
    ),
    "xlnet": text_family(
        "xlnet", hf.XLNetLMHeadModel, hf.XLNetConfig, vocab_size=100, d_model=32, n_layer=2, n_head=4, d_inner=64
    ),
    "electra": text_family(
        "electra", hf.ElectraForMaskedLM, hf.ElectraConfig, **SPECIAL, **SIZES, **POSITIONS, embedding_size=16
    ),
}
EVERY = FAMILIES | ODD


@pytest.fixture
def all_is_large(monkeypatch):
    """Every layer outside the blocks comes and goes, and every activation lies in a file."""
    monkeypatch.setattr(weights, "LARGE", 0)
    monkeypatch.setattr(spill, "SMALLEST", 1)


@pytest.fixture(autouse=True)
def unsynced(monkeypatch):
    """Nothing is killed here, so nothing has to be on the disk."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture(scope="session")
def dense_folders(tmp_path_factory):
    return tmp_path_factory.mktemp("dense")


@pytest.fixture
def saved(dense_folders):
    """Where a family's model lies; tests must not change it."""

    def folder(name, **changes):
        path = dense_folders / " ".join([name, *(f"{key}={value}" for key, value in changes.items())])
        if not path.exists():
            EVERY[name].build(**changes).save_pretrained(path)
        return path

    return folder


def assert_same_bytes(source, tmp_path, config, tokenizer=None, size="30KB", memory=0, **options):
    expected = in_memory(source, tmp_path / "expected", config, tokenizer, size, **options)
    mine = on_disk(
        source, tmp_path / "mine", config, tokenizer, max_shard_size=size, activation_memory=memory, **options
    )
    assert_same_checkpoint(mine, expected)
    return mine


# The same bytes


@pytest.mark.usefixtures("all_is_large")
@pytest.mark.parametrize("calibration", CALIBRATIONS)
@each_family
def test_every_family_is_compressed_as_in_memory(family, calibration, saved, tmp_path):
    if (family.name, calibration) == ("albert", "anchored"):
        pytest.skip("its one block runs several times")
    assert_same_bytes(saved(family.name), tmp_path, request(family, calibration=calibration))


@pytest.mark.usefixtures("all_is_large")
@pytest.mark.parametrize("name", ODD)
def test_weights_may_be_used_in_any_place(name, saved, tmp_path):
    assert_same_bytes(saved(name), tmp_path, request(EVERY[name]))


@pytest.mark.parametrize("name", ["llama", "t5", "llava"])
def test_where_there_is_memory_nothing_else_changes(name, saved, tmp_path):
    assert_same_bytes(saved(name), tmp_path, request(EVERY[name]), memory=run.ACTIVATION_MEMORY)


@pytest.mark.parametrize("size", ["1KB", 20_000, "50KB", "5GB"])
def test_every_sharding(size, saved, tmp_path):
    folder = assert_same_bytes(saved("llama"), tmp_path, request(FAMILIES["llama"]), size=size)
    assert (folder / "model.safetensors").exists() == (size == "5GB")


@pytest.mark.usefixtures("all_is_large")
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("name", "calibration", "storage"),
    [("llama", "anchored", "factors"), ("t5", "parallel", "factors"), ("gpt2", "anchored", "pivoted")],
)
def test_half_precision(name, calibration, storage, stored, tmp_path):
    EVERY[name].build().to(stored).save_pretrained(tmp_path / "dense")
    config = request(EVERY[name], calibration=calibration, storage=storage)
    folder = assert_same_bytes(tmp_path / "dense", tmp_path, config)
    assert stored in {p.dtype for p in EVERY[name].model_class.from_pretrained(folder).parameters()}


@pytest.mark.parametrize(
    ("stored", "dtype"), [(torch.float32, torch.bfloat16), (torch.float32, "float16"), (torch.float16, "float32")]
)
def test_weights_are_cast_as_they_are_loaded(stored, dtype, tmp_path):
    FAMILIES["gpt2"].build().to(stored).save_pretrained(tmp_path / "dense")
    assert_same_bytes(tmp_path / "dense", tmp_path, request(FAMILIES["gpt2"]), dtype=dtype)


REQUESTS = {
    "svd": ("llama", {"solver": "svd", "dataset": None}),
    "als": ("gpt2", {"solver": "als", "num_iterations": 2}),
    "uniform": ("bert", {"allocation": "uniform", "rank_multiple": 2}),
    "tolerance": ("llama", {"tolerance": 0.3}),
    "tolerance zero": ("llama", {"tolerance": 0.0}),
    "ranks": ("gpt2", {"ranks": {"*.0.attn.*": 4, "mlp": 5}}),
    "ranks outside the blocks": ("llava", {"ranks": {"multi_modal_projector": 5, "q_proj": 4}}),
    "ranks outside the blocks alone": ("bert", {"ranks": {"transform.dense": 8}}),
    "ranks outside the blocks by svd": ("opt", {"ranks": {"project_*": 3}, "solver": "svd", "dataset": None}),
    "groups": ("clip", {"groups": {"vision_model.*": {"tolerance": 0.2}}}),
    "a group outside the blocks": ("llava", {"groups": {"multi_modal_projector": {"parameter_reduction": 0.5}}}),
    "a dense block": ("t5", {"modules_to_not_convert": ["encoder.block.1", "decoder.block.0"]}),
    "anchored with a dense block": (
        "qwen3",
        {"modules_to_not_convert": ["model.layers.0"], "calibration": "anchored"},
    ),
    "anchored outside the blocks": (
        "llava",
        {"ranks": {"multi_modal_projector": 5, "mlp": 4}, "calibration": "anchored"},
    ),
    "text alone": (
        "llava",
        {"modules_to_not_convert": ["vision_tower"], "dataset": [{"input_ids": torch.arange(6, 46).view(2, 20)}]},
    ),
    "self-contained": ("mixtral", {"self_contained": True}),
    "pivoted": ("gpt2", {"storage": "pivoted"}),
    "pivoted, anchored": ("t5", {"storage": "pivoted", "calibration": "anchored"}),
    "pivoted by svd": ("llama", {"storage": "pivoted", "solver": "svd", "dataset": None}),
    "pivoted at every rank": ("bert", {"storage": "pivoted", "ranks": {"query": 32, "output.dense": 31}}),
    "pivoted outside the blocks": ("llava", {"storage": "pivoted", "ranks": {"multi_modal_projector": 5, "mlp": 4}}),
}


@pytest.mark.usefixtures("all_is_large")
@pytest.mark.parametrize("case", REQUESTS)
def test_every_request(case, saved, tmp_path):
    name, settings = REQUESTS[case]
    folder = assert_same_bytes(saved(name), tmp_path, request(FAMILIES[name], **settings))
    assert (folder / "modeling_pgsvd.py").exists() == (case == "self-contained")


@pytest.mark.usefixtures("all_is_large")
@pytest.mark.parametrize("name", ["llama", "gpt2", "bart"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads(tied, name, saved, tmp_path):
    assert_same_bytes(saved(name, tie_word_embeddings=tied), tmp_path, request(FAMILIES[name]))


@pytest.mark.parametrize("tokenizer_from", ["source", "config", "argument"])
def test_texts_and_the_tokenizer(tokenizer_from, dense, tokenizer, texts, saved, tmp_path):
    config = PGSVDConfig(
        parameter_reduction=0.3,
        dataset=texts,
        num_samples=4,
        sequence_length=10,
        tokenizer=str(dense) if tokenizer_from == "config" else None,
    )
    source = dense if tokenizer_from == "source" else saved("llama")
    given = tokenizer if tokenizer_from == "argument" else None
    folder = assert_same_bytes(source, tmp_path, config, given)
    assert (folder / "tokenizer.json").exists()


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_measurements_made_before(storage, saved, tmp_path, monkeypatch):
    PGSVDCompressor(request(FAMILIES["llama"])).measure_checkpoint(saved("llama"), tmp_path / "measured")
    monkeypatch.setattr(factoring_profiles, "measure_profiles", None)  # they are there
    config = request(FAMILIES["llama"], dataset=str(tmp_path / "measured"), storage=storage)
    assert_same_bytes(saved("llama"), tmp_path, config)


def test_more_blocks_than_have_one_digit(saved, tmp_path):
    config = request(FAMILIES["llama"], ranks={"q_proj": 4}, solver="svd", dataset=None)
    assert_same_bytes(saved("llama", num_hidden_layers=11), tmp_path, config)


LOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
text = pipeline("text-generation", sys.argv[1])("w1 w2 w3", max_new_tokens=5, do_sample=False)[0]["generated_text"]
logits = model(**AutoTokenizer.from_pretrained(sys.argv[1])("w1 w2 w3", return_tensors="pt")).logits
print(json.dumps({"text": text, "logits": logits.tolist(), "layer": type(model.model.layers[0].mlp.up_proj).__name__}))
"""


@torch.no_grad()
def test_the_output_loads_in_a_fresh_process(dense, texts, tokenizer, tmp_path):
    config = PGSVDConfig(parameter_reduction=0.3, dataset=texts, num_samples=4, sequence_length=10)
    folder = on_disk(dense, tmp_path / "compressed", config)
    done = subprocess.run([sys.executable, "-c", LOAD, str(folder)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    model = hf.AutoModelForCausalLM.from_pretrained(dense)
    PGSVDCompressor(config).compress(model)
    assert found["layer"] == "LowRankLinear"
    assert len(found["text"]) > len("w1 w2 w3")
    torch.testing.assert_close(
        torch.tensor(found["logits"]), model(**tokenizer("w1 w2 w3", return_tensors="pt")).logits
    )


def test_the_tokenizer_comes_from_the_commit_of_the_weights(saved, tmp_path):
    snapshot = tmp_path / "snapshots" / ("0123456789" * 4)
    shutil.copytree(saved("llama"), snapshot)
    source = StreamedModel(snapshot, hf.LlamaForCausalLM)
    run.compress_checkpoint(source, tmp_path / "mine", request(FAMILIES["llama"]))
    assert commit_of(source.model) == snapshot.name


# Little memory


def parts_in_memory(weights):
    """The blocks and large layers of which something is in memory."""
    real = [name for name, value in weights.source.model.state_dict().items() if not value.is_meta]
    return {part for part in [*weights.blocks, *weights.large] if any(name.startswith(f"{part}.") for name in real)}


@pytest.mark.usefixtures("all_is_large")
@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize("name", ["llama", "t5", "clip"])
def test_one_block_at_a_time(name, calibration, saved, tmp_path, monkeypatch):
    load, factor_layers, loaded = StreamedWeights.load, factoring.blocks.factor_layers, []

    def checked_load(self, block):
        load(self, block)
        assert parts_in_memory(self) == {block}
        loaded.append(block)

    def checked_factor(job, step, *args):
        assert parts_in_memory(job.destination.weights) == {step.block} - {None}
        return factor_layers(job, step, *args)

    monkeypatch.setattr(StreamedWeights, "load", checked_load)
    monkeypatch.setattr(factoring.blocks, "factor_layers", checked_factor)
    on_disk(saved(name), tmp_path / "mine", request(FAMILIES[name], calibration=calibration))
    blocks = find_blocks(FAMILIES[name].build())
    assert sorted(loaded) == sorted(blocks * 3)  # for the plan, the survey, and the factors


def test_small_layers_outside_the_blocks_are_read_once_and_large_ones_when_used(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "LARGE", 100 * 32 * 4 - 1)
    first, last, blocks = "model.embed_tokens", "lm_head", ["model.layers.0", "model.layers.1"]
    enter, load, prefetch = StreamedWeights.__enter__, StreamedWeights._load, StreamedModel.prefetch
    large, read, fetched = [], [], []

    def entered(self):
        large.append(self.large)
        return enter(self)

    def loaded(self, name):
        assert parts_in_memory(self) <= {*blocks} - {name}
        read.append(name)
        load(self, name)

    monkeypatch.setattr(StreamedWeights, "__enter__", entered)
    monkeypatch.setattr(StreamedWeights, "_load", loaded)
    monkeypatch.setattr(StreamedModel, "prefetch", lambda self, name: (fetched.append(name), prefetch(self, name)))
    on_disk(saved("llama"), tmp_path / "mine", request(FAMILIES["llama"]))
    assert large == [[first, last]] * 2
    assert read == [*blocks, first, *blocks, last, first, *blocks, last, first, last]
    assert fetched == [blocks[1]] * 3


def test_what_may_come_and_go(monkeypatch):
    monkeypatch.setattr(weights, "LARGE", 399)
    shared = nn.Embedding(10, 10)
    layers = {
        "block": nn.ModuleList([nn.Linear(10, 10)]),
        "blocked": nn.Linear(10, 10),
        "small": nn.Embedding(9, 11),
        "recurrent": nn.LSTM(10, 10),
        "shared": shared,
        "again": nn.ModuleDict({"shared": shared}),
    }
    assert large_layers(nn.ModuleDict(layers), ["block"]) == ["blocked", "shared", "again.shared"]


@pytest.mark.usefixtures("all_is_large")
@pytest.mark.parametrize("name", ["whisper", "clip"])
def test_every_parameter_of_a_large_layer_brings_all_of_it(name, saved):
    source = StreamedModel(saved(name), FAMILIES[name].model_class)
    with StreamedWeights(source, find_blocks(source.model)) as streamed:
        for layer in map(source.model.get_submodule, streamed.large):
            for parameter, value in list(layer._parameters.items()):
                assert value is None or value.is_meta
                assert getattr(layer, parameter) is layer._parameters[parameter]
                assert not any(value.is_meta for value in layer.parameters())
                streamed.release_large()
        assert not parts_in_memory(streamed)


@pytest.mark.usefixtures("all_is_large")
def test_models_know_where_they_are_though_nothing_is_there(saved):
    source = StreamedModel(saved("llama"), hf.LlamaForCausalLM)
    with StreamedWeights(source, find_blocks(source.model)):
        assert source.model.device == source.model.model.device == torch.device("cpu")
        assert source.model.dtype == torch.float32
    assert source.model.device == torch.device("meta")


@pytest.mark.usefixtures("all_is_large")
def test_the_source_is_as_before_when_all_is_done(saved, tmp_path):
    source = StreamedModel(saved("llama"), hf.LlamaForCausalLM)
    config = request(FAMILIES["llama"], modules_to_not_convert=["lm_head"])
    report = run.compress_checkpoint(source, tmp_path / "mine", config)
    assert all(p.is_meta for p in source.model.parameters())
    assert type(source.model) is hf.LlamaForCausalLM
    assert type(source.model.lm_head) is nn.Linear
    assert not source.model.lm_head._forward_pre_hooks
    assert report == CompressionReport.load(tmp_path / "mine")


@pytest.mark.parametrize(("memory", "spilled"), [(0, True), (10**4, True), (10**9, False)])
def test_activations_stay_in_memory_as_far_as_they_may(memory, spilled, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(spill, "SMALLEST", 1)
    put, most = Spill.put, [0, 0]

    def watched(self, tensor):
        kept = put(self, tensor)
        most[:] = max(most[0], self.held), max(most[1], self.spilled)
        return kept

    monkeypatch.setattr(Spill, "put", watched)
    on_disk(saved("llama"), tmp_path / "mine", request(FAMILIES["llama"]), activation_memory=memory)
    assert most[0] <= memory
    assert bool(most[1]) == spilled
    # at least the hidden states of three batches of 4 × 20 tokens with 32 features in float32
    assert sum(most) >= 3 * 4 * 20 * 32 * 4


MEMORY = Path(__file__).parent / "streamed_memory.py"


def memory_taken(folder: Path) -> dict:
    # The order of sets moves what malloc keeps of small pieces by some MiB.
    settings = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    command = [sys.executable, str(MEMORY), str(folder)]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_is_bounded_by_a_block_and_does_not_grow_with_depth(tmp_path):
    # What malloc keeps of freed pieces only adds, and in one process of ten some 8 MiB more than in the others.
    runs = [memory_taken(tmp_path / str(turn)) for turn in range(2)]
    found = min(runs, key=lambda run: run["peak"]["8"])
    block, head, peak, model = (found[key] for key in ("block", "head", "peak", "model"))
    assert model["8"] > 9 * block
    # The last block and the head are in memory together; activations, tables and freed pieces took 22 MiB.
    assert peak["8"] < block + head + 28 * 2**20, found
    assert abs(peak["8"] - peak["3"]) < block / 2, found


# The report and the files


def test_no_bars_are_drawn_for_files_that_are_none(saved, tmp_path, capfd):
    on_disk(saved("llama"), tmp_path / "mine", request(FAMILIES["llama"]))
    assert "it/s" not in capfd.readouterr().err


def test_a_model_that_is_not_what_was_planned_is_not_written(saved, tmp_path):
    model, config = FAMILIES["llama"].build(), request(FAMILIES["llama"], ranks={"q_proj": 3})
    plan = plan_ranks(find_targets(model, config), config, {})
    checkpoint = CompressedCheckpoint(str(tmp_path / "mine"), model, plan, config, "5GB", Peers())
    with pytest.raises(CheckpointError, match=r"model.layers.0.self_attn.q_proj.left.weight part of the model"):
        checkpoint.write(model, lambda name: name.startswith("model.layers.0."))


def test_the_report_says_what_it_took(saved, tmp_path):
    on_disk(saved("llama"), tmp_path / "mine", request(FAMILIES["llama"]))
    report = CompressionReport.load(tmp_path / "mine")
    assert set(report.seconds) == {"data", "plan", "survey", "grams", "factors", "writing"}
    tokens = 3 * 4 * 20
    assert report.calibration == {"batches": 3, "tokens": tokens}
    assert report.resources["tokens_per_second"] == tokens / report.seconds["grams"]
    assert 10**8 < report.resources["peak_memory_bytes"] < 10**11
    assert set(report.request) == {
        "config",
        "model",
        "dtype",
        "calibration",
        "measurements",
        "max_shard_size",
        "environment",
    }


# Refused before anything is written


def assert_refused(error, match, source, tmp_path, config, **options):
    with pytest.raises(error, match=match):
        on_disk(source, tmp_path / "out" / "mine", config, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "match", "settings"),
    [
        (ConfigError, "matches no linear layer", {"modules_to_not_convert": ["nothing"]}),
        (ConfigError, "matches no linear layer", {"ranks": {"nothing": 3}}),
        (ConfigError, "q_proj", {"ranks": {"q_proj": 1000}}),
        (ConfigError, "0.999", {"parameter_reduction": 0.999}),
        (ConfigError, "0.999", {"groups": {"mlp": {"parameter_reduction": 0.999}}}),
        (CalibrationError, "solver='svd'", {"dataset": None}),
        (CalibrationError, "is empty", {"dataset": []}),
        (CalibrationError, "samples token by token", {"dataset": "self"}),
        (CalibrationError, "token", {"dataset": ["a text, but there is no tokenizer"]}),
    ],
)
def test_requests_that_cannot_be_met(error, match, settings, saved, tmp_path):
    assert_refused(error, match, saved("llama"), tmp_path, request(FAMILIES["llama"], **settings))


def test_a_size_that_is_none(saved, tmp_path):
    config = request(FAMILIES["llama"])
    assert_refused(
        ConfigError, "max_shard_size='5 apples'", saved("llama"), tmp_path, config, max_shard_size="5 apples"
    )


def test_sources_that_are_no_dense_safetensors(saved, tmp_path):
    config = request(FAMILIES["llama"])
    compressed = on_disk(saved("llama"), tmp_path / "compressed", config)
    assert_refused(UnsupportedModelError, "compressed or quantized already", compressed, tmp_path, config)
    model = FAMILIES["llama"].build()
    model.config.save_pretrained(tmp_path / "bin")
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    assert_refused(CheckpointError, "save_pretrained, which writes safetensors", tmp_path / "bin", tmp_path, config)


# Found out later, and still nothing is left


@pytest.mark.parametrize("settings", [{}, {"ranks": {"q_proj": 3}}])
def test_a_damaged_weight(settings, tmp_path):
    model = FAMILIES["llama"].build()
    model.model.layers[0].self_attn.q_proj.weight.data[3, 5] = torch.nan
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(NonFiniteError, match="NaN"):
        on_disk(tmp_path / "dense", tmp_path / "mine", request(FAMILIES["llama"], **settings))
    assert os.listdir(tmp_path) == ["dense"]


def test_data_that_does_not_reach_a_layer_or_does_not_fit_the_model(saved, tmp_path):
    text = [{"input_ids": torch.arange(6, 46).view(2, 20)}]
    with pytest.raises(CalibrationError, match="never reached"):
        on_disk(saved("llava"), tmp_path / "mine", request(FAMILIES["llava"], dataset=text))
    with pytest.raises(CalibrationError, match="does not accept"):
        on_disk(saved("llama"), tmp_path / "mine", request(FAMILIES["llama"], dataset=[{"pixels": torch.ones(1)}]))
    assert os.listdir(tmp_path) == []
