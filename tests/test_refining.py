"""Refinement: the factors of a block fitted together to what the dense block gives, and never made worse."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import reference
import torch
from models import FAMILIES, Batch
from streamed import assert_same_checkpoint, in_memory, on_disk, request
from test_resuming import PLACES, interrupted
from torch import Tensor, nn
from toys import TOYS, Layer, Toy, toy, toy_batches
from transformers import AutoModelForCausalLM
from watch import plain_calls

from optimum_pgsvd import CalibrationError, ConfigError, PGSVDCompressor, PGSVDConfig
from optimum_pgsvd.calibration import BlockWalk, load_calibration_set
from optimum_pgsvd.errors import DistributedError
from optimum_pgsvd.factoring import Clock, InPlace, Job, factor, refining
from optimum_pgsvd.factoring import request as requests
from optimum_pgsvd.modeling_pgsvd import low_rank_layers
from optimum_pgsvd.planning import given_ranks
from optimum_pgsvd.report import CompressionReport
from optimum_pgsvd.streaming import spill, weights
from optimum_pgsvd.targets import find_blocks, find_targets


STEPS = 40

# Models of random weights, on few random tokens, are overfitted by larger steps: the held-back error does not fall.
RATE = 0.003


@pytest.fixture(scope="module", autouse=True)
def small_steps():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refining, "RATE", RATE)
        yield


@pytest.fixture
def all_is_gain(monkeypatch):
    """Whatever the steps do is kept."""
    monkeypatch.setattr(refining.Fit, "error", lambda self, replays: 1 / (1 + self.taken))


def config_for(batches: list[Batch], steps: int, **fields: Any) -> PGSVDConfig:
    fields = {"parameter_reduction": 0.4, "calibration": "anchored"} | fields
    return PGSVDConfig(dataset=batches, num_samples=10**6, refine_steps=steps, **fields)


def compressed(name: str, steps: int, dtype: torch.dtype = torch.float32, **fields: Any):
    """A model and the report; 16 batches, of which the last two are held back."""
    model = FAMILIES[name].build().to(dtype)
    report = PGSVDCompressor(config_for(FAMILIES[name].batches(16), steps, **fields)).compress(model)
    return model, report


@pytest.fixture(scope="module")
def plain():
    return compressed("llama", 0)


@pytest.fixture(scope="module")
def refined():
    return compressed("llama", STEPS)


def block_error(model: nn.Module, name: str, dense: nn.Module, batch: Batch) -> float:
    """Mean squared error of a block's outputs on a batch, of its own inputs, against the dense block on its own."""
    found, goal = (
        next(call for call in plain_calls(each, [batch])[0] if call.block == name).outputs[0]
        for each in (model, dense)
    )
    return (reference.norm(found - goal) ** 2) / goal.numel()


# What is gained


def test_the_first_block_gains_what_the_report_says(plain, refined):
    """The held-back batches through the whole models: nothing of the walk is used."""
    dense = FAMILIES["llama"].build()
    held = load_calibration_set(dense, config_for(FAMILIES["llama"].batches(16), STEPS))[-2:]
    block = "model.layers.0"
    before, after = (sum(block_error(model, block, dense, batch) for batch in held) for model, _ in (plain, refined))
    (gain,) = {layer.refined for layer in refined[1].layers if layer.name.startswith(f"{block}.")}
    assert gain == pytest.approx(after / before, rel=1e-4)
    assert after < 0.999 * before


def test_every_block_has_one_gain_and_none_rises(refined):
    gains = {}
    for layer in refined[1].layers:
        gains.setdefault(layer.name.split(".")[2], set()).add(layer.refined)
    assert {block: len(each) for block, each in gains.items()} == {"0": 1, "1": 1}
    assert max(max(each) for each in gains.values()) <= 1


def test_what_is_not_refined_has_no_gain(plain):
    assert {layer.refined for layer in plain[1].layers} == {None}


@pytest.mark.usefixtures("all_is_gain")
@pytest.mark.parametrize(("name", "storage"), [("gpt2", "factors"), ("llama", "pivoted"), ("t5", "factors")])
def test_other_layers_and_storages(name: str, storage: str):
    """Conv1D, coefficients of rows, and two streams: every factor of every block takes part."""
    model, report = compressed(name, 7, storage=storage)
    before, _ = compressed(name, 0, storage=storage)
    gains = {layer.refined for layer in report.layers if layer.rank}
    assert gains == {1 / 8}
    state, expected = model.state_dict(), before.state_dict()
    moved = {key for key, value in state.items() if not torch.equal(value, expected[key])}
    inner = {"factors": ("left.weight", "right.weight"), "pivoted": ("basis.weight", "coefficients.weight")}[storage]
    wanted = {f"{layer}.{each}" for layer in low_rank_layers(model) for each in inner}
    first = {key for key in wanted if key.startswith(find_blocks(model)[0])}
    assert first <= moved  # later blocks may have other factors to start with
    assert moved <= {key for key in state if key.startswith(tuple(low_rank_layers(model)))}


def test_half_precision():
    """Steps smaller than the rounding of the weights are not lost: they are summed in float32."""
    model, report = compressed("llama", STEPS, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    gains = [layer.refined for layer in report.layers]
    assert max(gains) <= 1
    assert min(gains) < 1


def test_a_layer_that_stays_dense_is_left_alone():
    ranks = {"q_proj": 3, "up_proj": 5}
    model, report = compressed("llama", STEPS, parameter_reduction=None, ranks=ranks)
    dense = FAMILIES["llama"].build()
    for layer in report.layers:
        assert (layer.refined is None) == (layer.rank is None)
        if layer.rank is None:
            assert torch.equal(model.get_submodule(layer.name).weight, dense.get_submodule(layer.name).weight)


def test_a_block_without_factors_is_not_refined():
    model, report = compressed("llama", STEPS, parameter_reduction=None, ranks={"layers.1.*": 4})
    assert {layer.name.split(".")[2] for layer in report.layers if layer.refined is not None} == {"1"}
    assert {name.split(".")[2] for name in low_rank_layers(model)} == {"1"}


# Where nothing is gained


def test_steps_that_only_harm_are_undone(plain, monkeypatch):
    monkeypatch.setattr(refining, "RATE", 1e3)
    model, report = compressed("llama", STEPS)
    assert {layer.refined for layer in report.layers} == {1.0}
    expected = plain[0].state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_it_ends_where_the_held_back_batch_gets_no_better(monkeypatch):
    """After two passes over the other batches, 14 steps each, whatever was asked for."""
    monkeypatch.setattr(refining, "RATE", 1e3)
    taken, step = [], refining.Fit.step
    monkeypatch.setattr(
        refining.Fit, "step", lambda self, replay: taken.append(replay.one.number) or step(self, replay)
    )
    compressed("llama", 1000, parameter_reduction=None, ranks={"layers.1.*": 4})
    assert len(taken) == refining.PATIENCE * 14
    assert set(taken) == set(range(14))  # and not those that are held back


def test_no_more_steps_than_asked_for(monkeypatch):
    taken, step = [], refining.Fit.step
    monkeypatch.setattr(refining.Fit, "step", lambda self, replay: taken.append(1) or step(self, replay))
    compressed("llama", 3)
    assert len(taken) == 2 * 3  # in each of two blocks


# What it leaves as it was


def test_two_runs_give_the_same_bits(refined):
    again, report = compressed("llama", STEPS)
    torch.manual_seed(7)
    expected = refined[0].state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())
    assert [layer.refined for layer in report.layers] == [layer.refined for layer in refined[1].layers]


def test_only_factors_change_and_no_gradient_is_left():
    model = FAMILIES["gpt2"].build().train()
    frozen = model.transformer.h[0].ln_1.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    PGSVDCompressor(config_for(FAMILIES["gpt2"].batches(4), 6)).compress(model)
    factors = {f"{name}.{inner}" for name in low_rank_layers(model) for inner in ("left.weight", "right.weight")}
    state = model.state_dict()
    assert factors <= state.keys()
    kept = [name for name in state if name in before]
    assert {"transformer.h.0.ln_1.weight", "transformer.wte.weight"} <= set(kept)
    assert all(torch.equal(state[name], before[name]) for name in kept)
    biases = [name for name in state if name.endswith("left.bias")]
    assert len(biases) == len(factors) // 2
    assert all(torch.equal(state[name], before[name.replace("left.bias", "bias")]) for name in biases)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [p for p in model.parameters() if not p.requires_grad] == [frozen]
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()


def test_save_and_load(refined, tmp_path):
    model, report = refined
    gains = [layer.refined for layer in report.layers]
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert loaded.config.quantization_config.refine_steps == STEPS
    assert [layer.refined for layer in CompressionReport.load(tmp_path).layers] == gains


def test_the_gains_are_printed(plain, refined, tmp_path):
    """And that the errors of layers, in the report and on the model card, are those before."""
    gains = [layer.refined for layer in refined[1].layers]
    said = f"refined: the blocks' outputs have {min(gains):.4f} to {max(gains):.4f} of their error before, on held"
    assert said in str(refined[1])
    assert "refined" not in str(plain[1])
    for name, (model, _) in {"plain": plain, "refined": refined}.items():
        model.save_pretrained(tmp_path / name)
        card = (tmp_path / name / "README.md").read_text(encoding="utf-8")
        assert ("anchored outputs, before refinement |" in card) == (name == "refined")


# What it aims at


def goals(model: nn.Module, batches: list[Batch]) -> dict[str, list[Tensor]]:
    """By block, and batch by batch."""
    with BlockWalk(model, find_blocks(model), batches) as walk:
        walk.survey({})
        steps = walk.measure_anchored(lambda block: [None], recalls=True)
        return {step.block: [replay.goal for replay in step.replays] for step in steps}


@pytest.mark.parametrize("name", [name for name in TOYS if name not in ("every block twice", "blocks side by side")])
def test_the_goals_are_what_the_dense_blocks_gave(name: str):
    """Also where the model, or the next block, changes that in place afterwards."""
    model, batches = toy(TOYS[name]), toy_batches(3)
    expected: dict[str, list[Tensor]] = {}
    for batch in batches:
        seen = []
        hooks = [
            module.register_forward_hook(lambda m, a, y, to=seen, at=block: to.append((at, y.detach().clone())))
            for block, module in ((block, model.get_submodule(block)) for block in find_blocks(model))
        ]
        model(**copy.deepcopy(batch))
        for hook in hooks:
            hook.remove()
        for block, y in seen:
            expected.setdefault(block, []).append(y.reshape(-1, 6))
    found = goals(model, batches)
    assert found.keys() == expected.keys()
    for block, each in found.items():
        assert all(torch.equal(one, other) for one, other in zip(each, expected[block], strict=True)), block


def test_padding_is_no_goal():
    model, (batch,) = FAMILIES["llama"].build(), FAMILIES["llama"].batches(1)
    mask = torch.ones(4, 20, dtype=torch.long)
    mask[1, 7:] = 0
    (call, *_) = plain_calls(model, [batch | {"attention_mask": mask}])[0]
    (found,) = goals(model, [batch | {"attention_mask": mask}])["model.layers.0"]
    assert found.shape == (67, 32)
    assert torch.equal(found, call.outputs[0].reshape(-1, 32)[mask.flatten().bool()])


def test_what_is_given_back_by_a_replay():
    """The block as it is, on the inputs that its pass stands before; and with other weights in its own's place."""
    model, batches = toy(lambda: Toy(Layer(), Layer())), toy_batches(2)
    with BlockWalk(model, find_blocks(model), batches) as walk:
        walk.survey({})
        step = next(walk.measure_anchored(lambda block: [None], recalls=True))
        for replay, batch in zip(step.replays, batches, strict=True):
            x = 2 * batch["x"]
            torch.testing.assert_close(replay.outputs({}), model.layers[0](x).reshape(-1, 6), rtol=0, atol=1e-6)
            torch.testing.assert_close(replay.outputs({}), replay.goal, rtol=0, atol=1e-6)
            none = replay.outputs({"dense.weight": torch.zeros(6, 6), "dense.bias": torch.zeros(6)})
            torch.testing.assert_close(none, x.reshape(-1, 6), rtol=0, atol=0)


class Deaf(nn.Module):
    """Its second layer hears nothing of the loudest outputs of its first."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        with torch.no_grad():
            self.first.weight.copy_(torch.diag(torch.tensor([3.0, 3.0, 1.0, 1.0, 0.0, 0.0])))
            self.second.weight[:, [0, 1, 4, 5]] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_together_the_layers_of_a_block_do_what_each_alone_cannot(monkeypatch):
    """Alone, the first keeps its two loudest outputs, and nothing is left; together rank 2 is enough for all of it."""
    monkeypatch.setattr(refining, "RATE", 0.03)
    model, batches = toy(lambda: Toy(Deaf())), toy_batches(16)
    config = config_for(batches, 600, parameter_reduction=None, ranks={"*": 2})
    targets = find_targets(model, config)
    plan = given_ranks(targets.shapes, config.ranks)
    job = Job(model, targets, plan, batches, config, Clock(), InPlace())
    layers, _ = factor(job)
    assert layers[0].refined == layers[1].refined < 0.1
    assert job.clock.seconds["refinement"] > 0


# What is refused


def test_anchored_calibration_is_needed():
    with pytest.raises(ConfigError, match=r"^refine_steps=5 needs calibration='anchored': a block is fitted to the d"):
        PGSVDConfig(parameter_reduction=0.2, refine_steps=5)


@pytest.mark.parametrize("steps", [-1, 1.5, True, "all", None])
def test_steps_are_a_number(steps: Any):
    with pytest.raises(ConfigError, match=r"^refine_steps=.* must be an integer, 0 or more$"):
        PGSVDConfig(parameter_reduction=0.2, calibration="anchored", refine_steps=steps)


def test_one_batch_is_refused_before_anything_is_done():
    model = FAMILIES["llama"].build()
    message = r"^refine_steps=5 needs two calibration batches, one of them to hold back; lower batch_size=8, or give"
    with pytest.raises(CalibrationError, match=message):
        PGSVDCompressor(config_for(FAMILIES["llama"].batches(1), 5)).compress(model)
    assert not low_rank_layers(model)


def test_several_processes_are_refused(monkeypatch):
    class Two(requests.Peers):
        def __init__(self) -> None:
            self.size, self.rank = 2, 0

    monkeypatch.setattr(requests, "Peers", Two)
    with pytest.raises(DistributedError, match=r"^refine_steps=5 works in one process only; start one, or give 0$"):
        PGSVDCompressor(config_for(FAMILIES["llama"].batches(4), 5)).compress(FAMILIES["llama"].build())


# On disk


@pytest.fixture
def all_is_large(monkeypatch):
    """Every layer outside the blocks comes and goes, and every activation lies in a file."""
    monkeypatch.setattr(weights, "LARGE", 0)
    monkeypatch.setattr(spill, "SMALLEST", 1)
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.mark.usefixtures("all_is_large", "all_is_gain")
@pytest.mark.parametrize(("name", "storage"), [("llama", "factors"), ("t5", "pivoted")])
def test_a_checkpoint_on_disk_is_refined_as_in_memory(name: str, storage: str, tmp_path, monkeypatch):
    """And where the run was interrupted in between."""
    FAMILIES[name].build().save_pretrained(tmp_path / "dense", max_shard_size="50KB")
    config = request(FAMILIES[name], calibration="anchored", refine_steps=6, storage=storage)
    expected = in_memory(tmp_path / "dense", tmp_path / "expected", config)
    assert {layer.refined for layer in CompressionReport.load(expected).layers} == {1 / 7}
    assert_same_checkpoint(on_disk(tmp_path / "dense", tmp_path / "whole", config), expected)
    interrupted(monkeypatch, tmp_path / "dense", tmp_path / "parts", config, PLACES["block"], 1, before=False)
    assert_same_checkpoint(on_disk(tmp_path / "dense", tmp_path / "parts", config), expected)


@pytest.mark.parametrize("field", ["objective", "allocation"])
def test_gradients_on_disk_are_refused(field: str, tmp_path):
    FAMILIES["llama"].build().save_pretrained(tmp_path / "dense")
    config = request(FAMILIES["llama"], **{field: "loss"})
    with pytest.raises(ConfigError, match="measures gradients, which needs the whole model in memory; compress the m"):
        on_disk(tmp_path / "dense", tmp_path / "mine", config)
    with pytest.raises(ConfigError, match="measures gradients, which are not measured beforehand; compress the model"):
        PGSVDCompressor(config).measure_checkpoint(tmp_path / "dense", tmp_path / "stats")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]
