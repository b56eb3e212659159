"""Fused experts of mixtures: taken apart into linears, compressed as those, and put back where nothing came of it."""

import json

import pytest
import torch
import transformers as hf
from models import FAMILIES
from torch import nn
from transformers.integrations import use_experts_implementation

from optimum_pgsvd import LowRankLinear, PGSVDCompressor, PGSVDConfig
from optimum_pgsvd.calibration import BlockWalk
from optimum_pgsvd.errors import ConfigError
from optimum_pgsvd.modeling_pgsvd import (
    LinearExperts,
    apart_experts,
    is_fused,
    low_rank_layers,
    put_experts_back,
    take_experts_apart,
)
from optimum_pgsvd.replace import experts_apart


MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss")
each_mixture = pytest.mark.parametrize("name", MIXTURES)


@use_experts_implementation(has_gate=False)
class Ungated(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_experts = 3
        self.up_proj = nn.Parameter(torch.randn(3, 12, 8))
        self.down_proj = nn.Parameter(torch.randn(3, 8, 12))
        self.act_fn = nn.ReLU()

    def forward(self, hidden_states, top_k_index, top_k_weights):
        raise AssertionError("the reference is in the test")


def fused_of(name):
    return next(module for module in FAMILIES[name].build().modules() if is_fused(module))


def reference(fused, x, chosen, weights):
    """Token by token, choice by choice, in float64."""
    x, y = x.double(), torch.zeros(len(x), fused.down_proj.shape[1 if not fused.is_transposed else 2]).double()
    for token in range(len(x)):
        for expert, weight in zip(chosen[token].tolist(), weights[token].double(), strict=True):
            row = x[token]
            for part in ("gate_up_proj" if fused.has_gate else "up_proj", "down_proj"):
                matrix = getattr(fused, part)[expert].double()
                row = (matrix.T if fused.is_transposed else matrix) @ row
                if fused.has_bias:
                    row = row + getattr(fused, f"{part}_bias")[expert].double()
                if part != "down_proj":
                    row = fused._apply_gate(row) if fused.has_gate else fused.act_fn(row)
            y[token] += weight * row
    return y


@pytest.mark.parametrize("name", [*MIXTURES, "ungated"])
@torch.no_grad()
def test_experts_apart_compute_what_they_did_together(name):
    torch.manual_seed(0)
    fused = Ungated(hf.MixtralConfig()) if name == "ungated" else fused_of(name)
    experts, count = LinearExperts(fused), len(fused.down_proj)
    x = torch.randn(7, next(experts[0].children()).in_features)
    chosen, weights = torch.rand(7, count).topk(2).indices, torch.rand(7, 2)
    chosen[:, 0] = chosen[:, 0].clamp(max=count - 2)  # the last may be nobody's first choice
    expected = reference(fused, x, chosen, weights).float()
    torch.testing.assert_close(experts(x, chosen, weights), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*MIXTURES, "ungated"])
def test_parts_are_the_memory_of_the_whole_and_make_it_again(name):
    fused = Ungated(hf.MixtralConfig()) if name == "ungated" else fused_of(name)
    experts = LinearExperts(fused)
    stacks = {parameter.untyped_storage().data_ptr() for parameter in fused.parameters()}
    assert {parameter.untyped_storage().data_ptr() for parameter in experts.parameters()} == stacks
    again = experts.fused()
    assert type(again) is type(fused)
    assert again.state_dict().keys() == fused.state_dict().keys()
    assert all(torch.equal(again.state_dict()[key], value) for key, value in fused.state_dict().items())
    assert all(parameter.is_meta for parameter in experts.stock[0].parameters())


@each_mixture
def test_all_linears_of_experts_are_targets_and_are_compressed(name):
    family = FAMILIES[name]
    model = family.build()
    count = sum(2 * len(module.down_proj) for module in model.modules() if is_fused(module))
    settings = PGSVDConfig(ranks={"*experts.*": 3}, dataset=family.batches(4))
    report = PGSVDCompressor(settings).compress(model)
    ranks = {layer.name: layer.rank for layer in report.layers if ".experts." in layer.name}
    assert len(ranks) == count
    assert set(ranks.values()) == {3}
    assert not [reason for reason in report.skipped.values() if "experts" in reason]


def test_what_is_left_dense_keeps_no_stack_alive():
    family = FAMILIES["mixtral"]
    model = family.build()
    PGSVDCompressor(PGSVDConfig(ranks={"experts.0.down": 2}, dataset=family.batches(4))).compress(model)
    assert len(low_rank_layers(model)) == model.config.num_hidden_layers
    for parameter in model.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
        assert parameter.is_contiguous()


@each_mixture
def test_experts_of_which_nothing_is_compressed_are_as_before(name):
    family = FAMILIES[name]
    model = family.build()
    before = {key: module for key, module in model.named_modules() if is_fused(module)}
    settings = {"dataset": family.batches(4), "modules_to_not_convert": ["experts"]}
    PGSVDCompressor(PGSVDConfig(0.2, **settings)).compress(model)
    assert {key: module for key, module in model.named_modules() if is_fused(module)} == before
    other = family.build()
    PGSVDCompressor(PGSVDConfig(ranks={"q_proj": 2}, dataset=family.batches(4))).compress(other)
    assert not apart_experts(other)


def test_a_plan_and_a_failure_leave_the_model_as_it_was(monkeypatch):
    family = FAMILIES["mixtral"]
    model = family.build()
    before = dict(model.named_modules())
    compressor = PGSVDCompressor(PGSVDConfig(0.3, dataset=family.batches(4)))
    assert any(".experts.0.gate_up" in layer.name for layer in compressor.plan(model).layers)
    assert dict(model.named_modules()) == before
    monkeypatch.setattr("optimum_pgsvd.factoring.blocks.replace_linear", failing_after(5))
    with pytest.raises(RuntimeError, match="no more"):
        compressor.compress(model)
    assert dict(model.named_modules()) == before


def failing_after(count):
    from optimum_pgsvd.replace import replace_linear

    calls = []

    def replace(*args):
        calls.append(args)
        if len(calls) > count:
            raise RuntimeError("no more")
        return replace_linear(*args)

    return replace


@each_mixture
def test_a_checkpoint_of_compressed_experts_does_not_load_as_a_dense_one(name, tmp_path):
    """Where the quantization config is not looked at, the stock loader must not leave experts at random."""
    family = FAMILIES[name]
    model = family.build()
    PGSVDCompressor(PGSVDConfig(ranks={"*experts.*": 2}, dataset=family.batches(4))).compress(model)
    model.save_pretrained(tmp_path)
    assert family.model_class.from_pretrained(tmp_path).is_quantized
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="size"):
        family.model_class.from_pretrained(tmp_path)


@each_mixture
def test_dequantized_experts_are_fused_again(name, tmp_path):
    family = FAMILIES[name]
    model = family.build()
    (batch,) = family.batches(1)
    PGSVDCompressor(PGSVDConfig(0.3, dataset=family.batches(4))).compress(model)
    with torch.no_grad():
        expected = model(**batch).logits
        dense = model.dequantize()
        assert not apart_experts(dense)
        torch.testing.assert_close(dense(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    dense.save_pretrained(tmp_path)
    assert any(is_fused(module) for module in family.model_class.from_pretrained(tmp_path).modules())


@each_mixture
@pytest.mark.parametrize(
    "options", [{}, {"calibration": "anchored"}, {"modules_to_not_convert": ["experts"]}], ids=str
)
def test_streamed_experts_have_the_same_bytes(name, options, tmp_path):
    family = FAMILIES[name]
    family.build().save_pretrained(tmp_path / "dense")
    config = PGSVDConfig(0.3, dataset=family.batches(4), **options)
    model = family.model_class.from_pretrained(tmp_path / "dense")
    report = PGSVDCompressor(config).compress(model)
    model.save_pretrained(tmp_path / "whole")
    streamed = PGSVDCompressor(config).compress_checkpoint(tmp_path / "dense", tmp_path / "streamed")
    planned = PGSVDCompressor(config).plan_checkpoint(tmp_path / "dense")
    assert [(layer.name, layer.rank) for layer in planned.layers] == [(e.name, e.rank) for e in report.layers]
    assert [(layer.name, layer.rank) for layer in streamed.layers] == [(e.name, e.rank) for e in report.layers]
    first, second = (tmp_path / folder / "model.safetensors" for folder in ("whole", "streamed"))
    assert first.read_bytes() == second.read_bytes()


class Alternating(nn.Module):
    """A router that sends each batch it sees to other experts than the one before."""

    def __init__(self, count):
        super().__init__()
        self.count, self.calls = count, 0

    def forward(self, hidden_states):
        self.calls += 1
        chosen = (torch.arange(len(hidden_states))[:, None] + self.calls) % self.count
        return None, torch.ones(len(hidden_states), 1), chosen


def test_anchored_calibration_pairs_tokens_that_another_expert_would_get_now():
    family = FAMILIES["mixtral"]
    model = family.build()
    for layer in model.model.layers:
        layer.mlp.gate = Alternating(model.config.num_local_experts)
    report = PGSVDCompressor(PGSVDConfig(0.3, calibration="anchored", dataset=family.batches(4))).compress(model)
    assert all(isinstance(module, LowRankLinear) for module in low_rank_layers(model).values())
    assert all(layer.tokens for layer in report.layers)


def test_routing_is_left_alone_after_the_walk():
    family = FAMILIES["mixtral"]
    model = family.build()
    with experts_apart(model):
        with BlockWalk(model, ("model.layers.0", "model.layers.1"), family.batches(2)) as walk:
            walk.survey({})
            list(walk.measure_anchored(lambda block: [None]))
        assert not any(experts._forward_pre_hooks for experts in apart_experts(model).values())


def test_elastic_experts_are_refused_before_anything_is_done():
    family = FAMILIES["mixtral"]
    model = family.build()
    before = dict(model.named_modules())
    config = PGSVDConfig(0.3, elastic=True, dataset=family.batches(1))
    with pytest.raises(ConfigError, match=r"elastic=True .*mlp\.experts; list them in modules_to_not_convert"):
        PGSVDCompressor(config).compress(model)
    assert dict(model.named_modules()) == before


def test_experts_that_are_needed_stay_apart():
    model = FAMILIES["mixtral"].build()
    fused = take_experts_apart(model)
    put_experts_back(model, fused, ["model.layers.1.mlp.experts.2.down"])
    assert list(apart_experts(model)) == ["model.layers.1.mlp.experts"]
