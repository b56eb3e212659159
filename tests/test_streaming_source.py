"""A checkpoint as a model on the meta device: what is loaded of it equals what `from_pretrained` gives."""

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import transformers as hf
from hub_server import HubServer
from models import FAMILIES, GROUPED, PAD, SIZES, SPECIAL, each_family, scramble
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.core_model_loading import WeightRenaming

from optimum_pgsvd.errors import CheckpointError, UnsupportedModelError
from optimum_pgsvd.modeling_pgsvd import LowRankLinear
from optimum_pgsvd.streaming import source as module
from optimum_pgsvd.streaming import stored
from optimum_pgsvd.streaming.meta_model import match_keys
from optimum_pgsvd.streaming.source import StreamedModel
from optimum_pgsvd.streaming.stored import READAHEAD_BYTES, SAMPLE_BYTES, SAMPLES
from optimum_pgsvd.targets import find_blocks


@pytest.fixture
def logged(caplog):
    """What transformers logs, however its loggers are set up."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def build(model_class, config, seed=0):
    torch.manual_seed(seed)
    model = model_class(config).eval()
    scramble(model, torch.Generator().manual_seed(seed))
    return model


def saved(name, folder, **options):
    """A family's model, saved in small shards by default."""
    FAMILIES[name].build().save_pretrained(folder, **{"max_shard_size": "50KB", **options})
    return folder


def opened(name, folder, **options):
    return StreamedModel(folder, FAMILIES[name].model_class, **options)


def real(model):
    """Names of the parameters and persistent buffers that are not on the meta device."""
    return {name for name, tensor in model.state_dict().items() if not tensor.is_meta}


def lying_in(model, part):
    return {name for name in model.state_dict() if name.startswith(f"{part}.")}


def ties(model):
    """Groups of names of one tensor."""
    owners = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        owners.setdefault(id(tensor), set()).add(name)
    return sorted(sorted(names) for names in owners.values() if len(names) > 1)


def assert_equal(tensors, expected, names=None):
    for name in expected if names is None else names:
        assert tensors[name].dtype == expected[name].dtype, name
        assert torch.equal(tensors[name], expected[name]), name


def assert_same_model(model, expected):
    """Every tensor, its name, its ties and its gradient flag, and what belongs to the model besides."""
    assert list(model.state_dict()) == list(expected.state_dict())
    assert_equal(model.state_dict(), expected.state_dict())
    assert_equal(dict(model.named_buffers()), dict(expected.named_buffers()))
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == [
        (n, p.requires_grad) for n, p in expected.named_parameters()
    ]
    assert ties(model) == ties(expected)
    assert type(model) is type(expected)
    assert model.config.to_dict() == expected.config.to_dict()
    assert model.config.dtype == expected.config.dtype
    assert model.name_or_path == expected.name_or_path
    assert not any(each.training for each in model.modules())
    if expected.can_generate():
        assert model.generation_config.to_dict() == expected.generation_config.to_dict()


def outputs(model, batch):
    with torch.no_grad():
        return [value for value in model(**batch).to_tuple() if isinstance(value, torch.Tensor)]


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


# What is loaded


@each_family
def test_the_whole_model_is_that_of_from_pretrained(family, tmp_path):
    dense = saved(family.name, tmp_path / "dense")
    streamed, expected = opened(family.name, dense), family.model_class.from_pretrained(dense)
    assert len(streamed.files) > 1
    assert not real(streamed.model)
    streamed.load("")
    assert_same_model(streamed.model, expected)
    (batch,) = family.batches(1)
    for mine, theirs in zip(outputs(streamed.model, batch), outputs(expected, batch), strict=True):
        assert torch.equal(mine, theirs)
    for model, folder in ((streamed.model, tmp_path / "mine"), (expected, tmp_path / "theirs")):
        model.save_pretrained(folder, max_shard_size="50KB")
    assert contents(tmp_path / "mine") == contents(tmp_path / "theirs")


@each_family
def test_non_persistent_buffers_are_real_from_the_start(family, tmp_path):
    family.build().save_pretrained(tmp_path)
    found = dict(opened(family.name, tmp_path).model.named_non_persistent_buffers())
    expected = dict(family.model_class.from_pretrained(tmp_path).named_non_persistent_buffers())
    assert found.keys() == expected.keys()
    assert_equal(found, expected)


@each_family
def test_blocks_come_and_go_one_by_one(family, tmp_path):
    saved(family.name, tmp_path)
    streamed, expected = opened(family.name, tmp_path), family.model_class.from_pretrained(tmp_path).state_dict()
    model, blocks, tied = streamed.model, find_blocks(streamed.model), ties(streamed.model)
    inside = {name for block in blocks for name in lying_in(model, block)}
    conversions = list(model._weight_conversions)
    streamed.load_outside(blocks)
    outside = real(model)
    assert outside == set(expected) - inside
    for block in blocks:
        with streamed.resident(block):
            assert real(model) == outside | lying_in(model, block)
            assert_equal(model.state_dict(), expected, real(model))
        assert real(model) == outside
    streamed.release("")
    assert not real(model)
    assert ties(model) == tied
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model._weight_conversions == conversions
    streamed.load("")
    assert_equal(model.state_dict(), expected)


@each_family
def test_saved_again_it_is_the_checkpoint_again(family, tmp_path):
    dense = saved(family.name, tmp_path / "dense", max_shard_size="5GB")
    streamed = opened(family.name, dense)
    assert streamed.files == [str(dense / "model.safetensors")]
    for block in find_blocks(streamed.model):
        streamed.load(block)
    streamed.load("")
    streamed.model.save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again")["model.safetensors"] == contents(dense)["model.safetensors"]


def test_models_forward_runs_with_blocks_loaded_as_they_are_reached(tmp_path):
    saved("mixtral", tmp_path)
    streamed = opened("mixtral", tmp_path)
    blocks = find_blocks(streamed.model)
    streamed.load_outside(blocks)
    for block in blocks:
        inner = streamed.model.get_submodule(block)
        inner.register_forward_pre_hook(lambda *_, block=block: streamed.load(block))
        inner.register_forward_hook(lambda *_, block=block: streamed.release(block))
    (batch,) = FAMILIES["mixtral"].batches(1)
    (logits, *_), (expected, *_) = outputs(streamed.model, batch), outputs(FAMILIES["mixtral"].build(), batch)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", ["auto", torch.float32, "bfloat16", torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "t5", "mixtral", "whisper"])
def test_weights_are_cast_when_they_are_loaded(name, dtype, stored, tmp_path):
    family = FAMILIES[name]
    family.build().to(stored).save_pretrained(tmp_path)
    streamed, expected = opened(name, tmp_path, dtype=dtype), family.model_class.from_pretrained(tmp_path, dtype=dtype)
    for block in find_blocks(streamed.model):
        streamed.load(block)
    streamed.load("")
    assert_same_model(streamed.model, expected)


def test_t5_keeps_what_overflows_in_half_precision_in_float32(tmp_path):
    saved("t5", tmp_path)
    streamed = opened("t5", tmp_path, dtype=torch.float16)
    streamed.load("decoder.block.0")
    dtypes = {name: tensor.dtype for name, tensor in streamed.model.state_dict().items() if not tensor.is_meta}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {
        "decoder.block.0.layer.2.DenseReluDense.wo.weight"
    }
    assert dtypes["decoder.block.0.layer.2.DenseReluDense.wi.weight"] == torch.float16


def test_config_without_a_dtype_leaves_it_to_the_weights(tmp_path):
    FAMILIES["llama"].build().to(torch.bfloat16).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    streamed = opened("llama", tmp_path)
    streamed.load("")
    assert {p.dtype for p in streamed.model.parameters()} == {torch.bfloat16}
    assert streamed.model.config.dtype == torch.bfloat16


@pytest.mark.parametrize(("tie", "stored_by"), [(True, hf.LlamaModel), (False, hf.LlamaForCausalLM)])
def test_checkpoints_of_the_model_without_and_with_a_head(tie, stored_by, tmp_path):
    config = hf.LlamaConfig(**GROUPED, tie_word_embeddings=tie)
    build(stored_by, config).save_pretrained(tmp_path)
    opener = hf.LlamaForCausalLM if stored_by is hf.LlamaModel else hf.LlamaModel
    streamed = StreamedModel(tmp_path, opener)
    for block in find_blocks(streamed.model):
        streamed.load(block)
        assert lying_in(streamed.model, block) <= real(streamed.model)
    streamed.load("")
    assert_same_model(streamed.model, opener.from_pretrained(tmp_path))


def test_auto_classes_open_it_too(tmp_path):
    saved("llama", tmp_path)
    streamed = StreamedModel(tmp_path, hf.AutoModelForCausalLM, trust_remote_code=True)
    streamed.load("")
    assert_same_model(streamed.model, hf.LlamaForCausalLM.from_pretrained(tmp_path))


def test_code_that_the_checkpoint_brings_along(tmp_path):
    """Its two heads are one module under two names, of which the file holds one."""
    code = """
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

class OwnConfig(PreTrainedConfig):
    model_type = "own"

class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2))
        self.head = nn.Linear(4, 2)
        self.other = self.head
        self.post_init()
    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            module.weight.data.normal_()
"""
    (tmp_path / "own.py").write_text(code)
    maps = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": maps, "dtype": "float32"}))
    names = [f"layers.{i}.{j}" for i in range(2) for j in range(2)]
    tensors = {f"{name}.weight": torch.randn(4, 4) for name in names} | {
        f"{name}.bias": torch.randn(4) for name in names
    }
    tensors |= {"head.weight": torch.randn(2, 4), "head.bias": torch.randn(2)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    streamed = StreamedModel(tmp_path, hf.AutoModel, trust_remote_code=True)
    for name in ("other", "layers.0", "layers.1"):
        with streamed.resident(name):
            assert_equal(streamed.model.state_dict(), tensors, real(streamed.model) & tensors.keys())
            assert real(streamed.model)
        assert not real(streamed.model)


# Ties


def test_tied_head_and_embedding_are_one_tensor_loaded_under_either_name(tmp_path):
    model = opened("gemma", saved("gemma", tmp_path)).model
    assert ties(model) == [["lm_head.weight", "model.embed_tokens.weight"]]
    streamed = opened("gemma", tmp_path)
    model, both = streamed.model, {"lm_head.weight", "model.embed_tokens.weight"}
    for name in ("lm_head", "model.embed_tokens"):
        streamed.load(name)
        assert real(model) == both
        assert model.lm_head.weight is model.model.embed_tokens.weight
        streamed.release(name)
        assert not real(model)
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_tied_tensor_stays_while_another_owner_is_loaded(tmp_path):
    saved("gemma", tmp_path)
    streamed = opened("gemma", tmp_path)
    streamed.load("model.embed_tokens")
    kept = streamed.model.lm_head.weight
    with streamed.resident("lm_head"):
        assert streamed.model.lm_head.weight is kept
    assert streamed.model.lm_head.weight is kept
    assert not kept.is_meta
    streamed.release("")
    assert not real(streamed.model)


def test_block_that_shares_a_tensor_with_the_outside(tmp_path):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 100}
    config = hf.UdopConfig(**sizes, decoder_start_token_id=PAD, image_size=32, patch_size=8)
    build(hf.UdopForConditionalGeneration, config).save_pretrained(tmp_path)
    streamed = StreamedModel(tmp_path, hf.UdopForConditionalGeneration)
    expected, model = hf.UdopForConditionalGeneration.from_pretrained(tmp_path), streamed.model
    shared = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert any(shared in names for names in ties(expected))
    assert ties(model) == ties(expected)
    blocks = find_blocks(model)
    streamed.load_outside(blocks)
    assert shared in real(model)
    with streamed.resident("encoder.block.0"):
        assert_equal(model.state_dict(), expected.state_dict(), lying_in(model, "encoder.block.0"))
    assert real(model) & lying_in(model, "encoder.block.0") == {shared}
    streamed.load("")
    assert_same_model(model, expected)


@pytest.mark.parametrize("equal", [True, False])
def test_checkpoint_that_holds_both_of_a_tied_pair(equal, tmp_path, logged):
    saved("gemma", tmp_path, max_shard_size="5GB")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (0 if equal else 1)
    save_file(tensors, path, metadata={"format": "pt"})
    streamed = opened("gemma", tmp_path)
    assert ("will NOT tie" in logged.text) == (not equal)
    assert not real(streamed.model)
    expected = hf.GemmaForCausalLM.from_pretrained(tmp_path)
    assert bool(ties(expected)) == equal
    streamed.load("lm_head")
    assert_equal(streamed.model.state_dict(), tensors, ["lm_head.weight"])
    streamed.load("")
    assert_same_model(streamed.model, expected)
    assert streamed.model.all_tied_weights_keys == expected.all_tied_weights_keys


def test_checkpoint_that_holds_the_other_of_a_tied_pair(tmp_path):
    saved("gemma", tmp_path, max_shard_size="5GB")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    streamed = opened("gemma", tmp_path)
    streamed.load("model.embed_tokens")
    assert torch.equal(streamed.model.model.embed_tokens.weight, tensors["lm_head.weight"])
    streamed.load("")
    assert_same_model(streamed.model, hf.GemmaForCausalLM.from_pretrained(tmp_path))


# Conversions


def test_half_of_what_one_conversion_makes(tmp_path):
    """The checkpoint holds one matrix for queries, keys and values; the model three."""
    config = hf.NomicBertConfig(**SPECIAL, **SIZES, max_position_embeddings=64)
    build(hf.NomicBertModel, config).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    streamed, expected = StreamedModel(tmp_path, hf.NomicBertModel), hf.NomicBertModel.from_pretrained(tmp_path)
    query = next(name for name, inner in streamed.model.named_modules() if name.endswith("0.self_attn.q_proj"))
    assert f"{query}.weight" not in stored
    streamed.load(query)
    assert real(streamed.model) == lying_in(streamed.model, query)
    assert_equal(streamed.model.state_dict(), expected.state_dict(), real(streamed.model))
    streamed.load("")
    assert_same_model(streamed.model, expected)


def test_experts_of_one_block_are_fused_from_their_own_matrices(tmp_path):
    saved("mixtral", tmp_path)
    streamed = opened("mixtral", tmp_path)
    conversions = streamed.model._weight_conversions
    assert len(conversions) == 3
    expected = FAMILIES["mixtral"].build().model.layers[1].mlp.experts
    with streamed.resident("model.layers.1.mlp.experts"):
        experts = streamed.model.model.layers[1].mlp.experts
        assert torch.equal(experts.gate_up_proj, expected.gate_up_proj)
        assert torch.equal(experts.down_proj, expected.down_proj)
        assert len(real(streamed.model)) == 2
    assert streamed.model._weight_conversions is conversions


def test_names_that_a_conversion_would_spoil_are_left_as_they_are(tmp_path):
    saved("llama", tmp_path)
    model = opened("llama", tmp_path).model
    model._weight_conversions = [WeightRenaming("mlp.up_proj", "mlp.fc")]
    names = list(model.state_dict())
    assert match_keys(model, names) == {name: [name] for name in names}
    with_prefix = [f"model.{name}" for name in model.model.state_dict()]
    model.model._weight_conversions = model._weight_conversions
    assert match_keys(model.model, [*with_prefix, "lm_head.weight"]) == {
        name.removeprefix("model."): [name] for name in with_prefix if "up_proj" not in name
    }


# What the checkpoint may lack


def test_parameters_that_a_checkpoint_may_lack_have_their_first_values(tmp_path):
    saved("bart", tmp_path, max_shard_size="5GB")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["final_logits_bias"]
    save_file(tensors, path, metadata={"format": "pt"})
    streamed = opened("bart", tmp_path)
    for change in (lambda: None, lambda: streamed.load(""), lambda: streamed.release("")):
        change()
        assert real(streamed.model) & {"final_logits_bias"}
        assert not streamed.model.final_logits_bias.any()
    assert real(streamed.model) == {"final_logits_bias"}
    streamed.load("")
    assert_same_model(streamed.model, hf.BartForConditionalGeneration.from_pretrained(tmp_path))


# What is released


def test_loading_and_releasing_twice_is_the_same_as_once(tmp_path):
    saved("llama", tmp_path)
    streamed = opened("llama", tmp_path)
    streamed.load("model.layers.0")
    kept = streamed.model.model.layers[0].mlp.up_proj.weight
    streamed.load("model.layers.0")
    streamed.load("model.layers")
    assert streamed.model.model.layers[0].mlp.up_proj.weight is kept
    streamed.release("model.layers.0")
    streamed.release("model.layers.0")
    assert real(streamed.model) == lying_in(streamed.model, "model.layers.1")


def test_part_of_what_is_loaded_can_be_released(tmp_path):
    saved("llama", tmp_path)
    streamed = opened("llama", tmp_path)
    streamed.load("")
    streamed.release("model.layers.1")
    assert real(streamed.model) == set(streamed.model.state_dict()) - lying_in(streamed.model, "model.layers.1")


def test_names_are_of_modules_and_not_of_their_beginnings(tmp_path):
    build(hf.LlamaForCausalLM, hf.LlamaConfig(**GROUPED | {"num_hidden_layers": 11})).save_pretrained(tmp_path)
    streamed = StreamedModel(tmp_path, hf.LlamaForCausalLM)
    streamed.load("model.layers.10")
    assert real(streamed.model) == lying_in(streamed.model, "model.layers.10")
    with streamed.resident("model.layers.1"):
        pass
    assert real(streamed.model) == lying_in(streamed.model, "model.layers.10")


def test_layers_put_into_a_block_go_with_it_and_are_not_overwritten(tmp_path):
    saved("llama", tmp_path)
    streamed = opened("llama", tmp_path)
    streamed.load("model.layers.0")
    mlp = streamed.model.model.layers[0].mlp
    mlp.up_proj = LowRankLinear(32, 64, 4, bias=False)
    streamed.load("model.layers.1")
    assert not mlp.up_proj.left.weight.is_meta
    before = mlp.up_proj.left.weight.clone()
    streamed.load("model.layers.0")
    assert torch.equal(mlp.up_proj.left.weight, before)
    streamed.release("model.layers.0")
    assert real(streamed.model) == lying_in(streamed.model, "model.layers.1")
    streamed.load("model.layers.0")
    assert mlp.up_proj.left.weight.is_meta
    assert not mlp.gate_proj.weight.is_meta


def test_block_is_released_after_an_error(tmp_path):
    saved("llama", tmp_path)
    streamed = opened("llama", tmp_path)
    with pytest.raises(KeyError), streamed.resident("model.layers.0"):
        raise KeyError
    assert not real(streamed.model)


MEMORY = """
import sys, torch, transformers
from optimum_pgsvd.streaming.source import StreamedModel

def memory():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) / 1024

def resident():
    return sum(p.nbytes for p in model.parameters() if not p.is_meta) / 2**20

streamed = StreamedModel(sys.argv[1], transformers.LlamaForCausalLM, dtype=sys.argv[2])
model = streamed.model
with streamed.resident("model.layers.0"), torch.no_grad():  # what a first load and a first product leave behind
    model.model.layers[0].mlp(torch.ones(1, 2, 1024, dtype=model.config.dtype))
before = memory()
for _ in range(2):
    for i in range(4):
        with streamed.resident(f"model.layers.{i}"), torch.no_grad():
            model.model.layers[i].mlp(torch.ones(1, 2, 1024, dtype=model.config.dtype))
            print(memory() - before - resident())
        print(memory() - before)
streamed.load("")
print(memory() - before - resident())
streamed.release("")
print(memory() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("shards", "dtype"), [("10MB", "auto"), ("5GB", "float32")])
def test_memory_is_that_of_what_is_resident(shards, dtype, tmp_path):
    config = hf.LlamaConfig(hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, vocab_size=64)
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu").save_pretrained(tmp_path, max_shard_size=shards)
    block = sum(p.nbytes for p in model.model.layers[0].parameters()) / 2**20
    assert block > 24
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path), dtype], capture_output=True, text=True, check=True
    )
    excess = [float(line) for line in done.stdout.split()]
    assert len(excess) == 18
    assert max(excess) < 4, excess  # MiB


def test_no_file_stays_open(tmp_path):
    saved("llama", tmp_path)
    streamed = opened("llama", tmp_path)
    streamed.load("")
    if sys.platform.startswith("linux"):
        held = {os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")}
        assert not held & {os.path.realpath(path) for path in streamed.files}
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()


# Silence, and what is left as it was


def test_nothing_is_shown_and_transformers_settings_are_restored(tmp_path, capfd, logged, monkeypatch):
    saved("mixtral", tmp_path)
    monkeypatch.delenv("HF_DEACTIVATE_ASYNC_LOAD", raising=False)
    assert hf.utils.logging.is_progress_bar_enabled()
    capfd.readouterr()
    streamed = opened("mixtral", tmp_path)
    for part in (*find_blocks(streamed.model), ""):
        with streamed.resident(part):
            pass
    assert capfd.readouterr() == ("", "")
    assert logged.text == ""
    assert hf.utils.logging.is_progress_bar_enabled()
    assert hf.utils.logging.set_tqdm_hook(None) is None
    assert "HF_DEACTIVATE_ASYNC_LOAD" not in os.environ
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "0")
    streamed.load("")
    assert os.environ["HF_DEACTIVATE_ASYNC_LOAD"] == "0"


# Reading ahead


def wait_for_reading():
    for thread in threading.enumerate():
        if thread.name == "read ahead":
            thread.join()


@pytest.mark.parametrize("part", ["model.layers.1", "lm_head", ""])
def test_prefetch_asks_for_the_bytes_of_a_part(part, tmp_path, monkeypatch):
    saved("gemma", tmp_path)
    streamed, asked = opened("gemma", tmp_path), []

    def advise(fd, start, length, advice):
        assert advice == os.POSIX_FADV_WILLNEED
        assert length <= READAHEAD_BYTES
        asked.append((os.path.realpath(f"/proc/self/fd/{fd}"), start, length))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    monkeypatch.setattr(stored, "READAHEAD_BYTES", 1000)
    streamed.prefetch(part)
    wait_for_reading()
    with streamed.resident(part):
        model = streamed.model
        assert sum(length for *_, length in asked) == sum(t.nbytes for t in {*model.parameters()} if not t.is_meta)
        got = b"".join(Path(path).read_bytes()[start : start + length] for path, start, length in asked)
        for tensor in model.parameters():
            assert tensor.is_meta or tensor.detach().numpy().tobytes() in got
    assert all(length <= 1000 for *_, length in asked)
    assert asked == sorted(asked)


def test_prefetch_of_every_kind_does_no_harm(tmp_path, monkeypatch):
    saved("llama", tmp_path)
    streamed = opened("llama", tmp_path)
    streamed.prefetch("model.layers.0")
    wait_for_reading()
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    monkeypatch.setattr(threading, "Thread", None)
    streamed.prefetch("model.layers.0")
    assert not real(streamed.model)
    monkeypatch.undo()
    for path in streamed.files:
        os.remove(path)
    stored.read_ahead(streamed._stored.values())


# The fingerprint


def changed(folder, to, name, change):
    """A copy of a checkpoint with one file edited."""
    shutil.copytree(folder, to)
    data = bytearray((to / name).read_bytes())
    change(data)
    (to / name).write_bytes(data)
    return opened("llama", to).fingerprint()


def test_fingerprint_tells_checkpoints_apart(tmp_path):
    dense = saved("llama", tmp_path / "dense")
    first = opened("llama", dense).fingerprint()
    assert json.loads(json.dumps(first)) == first
    assert first["files"].keys() == {path.name for path in dense.glob("*.safetensors")}
    assert changed(dense, tmp_path / "copy", "config.json", lambda data: None) == first
    assert changed(dense, tmp_path / "config", "config.json", lambda data: data.extend(b"\n")) != first
    name = "model-00002-of-00003.safetensors"

    def flip(data):
        data[len(data) // 2] ^= 1

    edited = changed(dense, tmp_path / "weights", name, flip)
    assert edited["config"] == first["config"]
    assert {file for file in first["files"] if edited["files"][file] != first["files"][file]} == {name}
    assert edited["files"][name]["header"] == first["files"][name]["header"]

    def rename(data):
        data[:] = data.replace(b'"format":"pt"', b'"format":"PT"')

    again = changed(dense, tmp_path / "header", name, rename)["files"][name]
    assert again["header"] != first["files"][name]["header"]
    saved("llama", tmp_path / "whole", max_shard_size="5GB")
    assert opened("llama", tmp_path / "whole").fingerprint() != first


def test_fingerprint_samples_large_files_from_end_to_end(tmp_path):
    path, size = tmp_path / "large", 10**8
    header = b'{"a":{}}'
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(size)
    first = stored.file_fingerprint(str(path))
    assert first["size"] == size
    gap = (size - SAMPLE_BYTES) / (SAMPLES - 1)
    for at, noticed in (
        (size - 1, True),
        (int(gap * 31), True),
        (int(gap * 31) + SAMPLE_BYTES - 1, True),
        (int(gap * 31.5), False),
    ):
        with open(path, "r+b") as file:
            file.seek(at)
            file.write(b"\1")
            file.flush()
            assert (stored.file_fingerprint(str(path))["sample"] != first["sample"]) == noticed
            file.seek(at)
            file.write(b"\0")
    assert stored.file_fingerprint(str(path)) == first


# Errors


def test_weights_of_another_format_are_refused_with_a_remedy(tmp_path):
    model = FAMILIES["llama"].build()
    model.config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"):
        opened("llama", tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="load the model with from_pretrained and save it with save_pretrained"):
        opened("llama", tmp_path)


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        ({"quantization_config": {"quant_method": "pgsvd"}}, UnsupportedModelError, "'pgsvd'.*name the dense"),
        ({"transformers_weights": "own.safetensors"}, CheckpointError, r"holds no own\.safetensors"),
        ({"intermediate_size": 48}, CheckpointError, r"has the shape .*64.* but its config asks for .*48"),
        ({"num_hidden_layers": 3}, CheckpointError, r"lacks 9 of the tensors of LlamaForCausalLM: model\.layers\.2\."),
    ],
)
def test_configs_that_do_not_fit(edit, error, message, tmp_path):
    saved("llama", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    with pytest.raises(error, match=message):
        opened("llama", tmp_path)


def test_weights_that_the_config_names(tmp_path):
    saved("llama", tmp_path, max_shard_size="5GB")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"transformers_weights": "own.safetensors"}))
    build(hf.LlamaForCausalLM, hf.LlamaConfig(**GROUPED), seed=1).save_pretrained(tmp_path / "other")
    shutil.copyfile(tmp_path / "other" / "model.safetensors", tmp_path / "own.safetensors")
    streamed = opened("llama", tmp_path)
    assert streamed.files == [str(tmp_path / "own.safetensors")]
    streamed.load("")
    assert_same_model(streamed.model, hf.LlamaForCausalLM.from_pretrained(tmp_path))


def test_one_file_goes_before_shards_as_in_transformers(tmp_path):
    saved("llama", tmp_path)
    build(hf.LlamaForCausalLM, hf.LlamaConfig(**GROUPED), seed=1).save_pretrained(tmp_path / "other")
    shutil.copyfile(tmp_path / "other" / "model.safetensors", tmp_path / "model.safetensors")
    streamed = opened("llama", tmp_path)
    assert streamed.files == [str(tmp_path / "model.safetensors")]
    streamed.load("")
    assert_same_model(streamed.model, hf.LlamaForCausalLM.from_pretrained(tmp_path))


def test_tensors_that_come_from_nowhere_known_are_refused(tmp_path, monkeypatch):
    """As those would that transformers reads from files of which this package does not know."""
    saved("llama", tmp_path)

    def some(model, keys):
        return match_keys(model, [key for key in keys if "up_proj" not in key])

    monkeypatch.setattr(module, "match_keys", some)
    with pytest.raises(UnsupportedModelError, match=r"which tensors .* make model\.layers\.0\.mlp\.up_proj\.weight"):
        opened("llama", tmp_path)


def test_folders_without_a_dense_model(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no config\.json, so no model"):
        opened("llama", tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        opened("llama", tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedModelError, match="is an adapter; load it, merge it"):
        opened("llama", tmp_path)
    with pytest.raises(OSError, match="nowhere"):
        opened("llama", tmp_path / "nowhere")


def cut(path):
    os.truncate(path, path.stat().st_size - 1)


def of_unknown_dtype(path):
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"F99"'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"00002-of-00003\.safetensors is cut short after \d+ bytes; download it again"),
        (os.remove, r"00002-of-00003\.safetensors is missing"),
        (lambda path: path.write_bytes(b"version https://git-lfs"), "is no safetensors file"),
        (lambda path: path.write_bytes(b""), "is no safetensors file"),
        (lambda path: path.write_bytes(b"\2\0\0\0\0\0\0\0[]"), "is no safetensors file"),
        (of_unknown_dtype, "is stored as F99, which transformers does not load"),
    ],
)
def test_damaged_files_are_named(damage, message, tmp_path):
    saved("llama", tmp_path)
    damage(tmp_path / "model-00002-of-00003.safetensors")
    with pytest.raises(CheckpointError, match=message):
        opened("llama", tmp_path)


def test_file_that_changes_after_it_was_opened(tmp_path):
    saved("llama", tmp_path, max_shard_size="5GB")
    streamed = opened("llama", tmp_path)
    streamed.load("model.layers.0")
    before = real(streamed.model)
    conversions = streamed.model._weight_conversions
    os.truncate(streamed.files[0], os.path.getsize(streamed.files[0]) - 1)
    with pytest.raises(CheckpointError, match=r"model\.safetensors ends within .*; it was changed"):
        streamed.load("")
    assert real(streamed.model) == before
    assert streamed.model._weight_conversions is conversions
    assert hf.utils.logging.set_tqdm_hook(None) is None
    with streamed.resident("model.layers.0"):
        pass
    assert not real(streamed.model)


def test_layer_of_another_shape_in_the_place_of_the_checkpoints(tmp_path):
    saved("llama", tmp_path)
    streamed = opened("llama", tmp_path)
    streamed.model.model.layers[0].mlp.up_proj = nn.Linear(32, 8, bias=False, device="meta")
    with pytest.raises(
        CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj\.weight could not be loaded: its shape"
    ):
        streamed.load("model.layers.0")
    assert not real(streamed.model)


@pytest.mark.parametrize("method", ["load", "release", "prefetch"])
def test_unknown_submodules_are_errors(method, tmp_path):
    saved("llama", tmp_path)
    streamed = opened("llama", tmp_path)
    for name in ("model.layers.2", "model.embed_tokens.weight"):
        with pytest.raises(AttributeError):
            getattr(streamed, method)(name)


# The Hub

BY_NAME = """
import json, sys, torch, transformers
from huggingface_hub import HfApi
from optimum_pgsvd.errors import CheckpointError
from optimum_pgsvd.streaming.source import StreamedModel

dense, other = sys.argv[1:]
first = transformers.LlamaForCausalLM.from_pretrained(dense)
commit = first.push_to_hub("alice/model", max_shard_size="50KB", private=True).oid
second = transformers.LlamaForCausalLM.from_pretrained(other)
second.push_to_hub("alice/model", max_shard_size="50KB")
for expected, options in ((second, {}), (first, {"revision": commit}), (second, {"token": "hf_alice"})):
    streamed = StreamedModel("alice/model", transformers.LlamaForCausalLM, **options)
    assert len(streamed.files) == 3
    assert commit in streamed.files[0] or expected is second
    streamed.load("")
    for name, tensor in expected.state_dict().items():
        assert torch.equal(streamed.model.state_dict()[name], tensor)
    assert streamed.model.name_or_path == "alice/model"
try:
    StreamedModel("alice/model", transformers.LlamaForCausalLM, token="hf_bob")
except OSError as error:
    print("alice/model" in str(error))
"""


def test_model_on_the_hub_by_name_and_revision(tmp_path):
    saved("llama", tmp_path / "dense")
    build(hf.LlamaForCausalLM, hf.LlamaConfig(**GROUPED), seed=1).save_pretrained(tmp_path / "other")
    with HubServer({"hf_alice": "alice", "hf_bob": "bob"}) as hub:
        arguments = (str(tmp_path / "dense"), str(tmp_path / "other"))
        done = hub.run("-c", BY_NAME, *arguments, home=tmp_path / "home", token="hf_alice")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "True"
    assert hub.unhandled == []
