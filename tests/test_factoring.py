"""Factoring: block by block, with nothing held that is not needed, and undone where something goes wrong."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from models import FAMILIES, ODD, POSITIONS, SIZES, SPECIAL, Batch, text_family
from torch import Tensor, nn
from toys import Layer, OutOfStep, PassesBy, Toy, toy, toy_batches
from transformers import PreTrainedModel
from watch import Inputs, plain_forward

from optimum_pgsvd import CalibrationError, NonFiniteError, PGSVDCompressor, PGSVDConfig, factoring
from optimum_pgsvd.calibration import BlockWalk, Step
from optimum_pgsvd.distributed import Peers
from optimum_pgsvd.factoring import Clock, InPlace, Job, factor, undone_on_error
from optimum_pgsvd.factoring.measuring import in_step, stages
from optimum_pgsvd.modeling_pgsvd import LowRankLinear, low_rank_layers
from optimum_pgsvd.planning import given_ranks
from optimum_pgsvd.report import LayerReport
from optimum_pgsvd.targets import LINEAR_TYPES, find_blocks, find_targets


CALIBRATIONS = ("parallel", "anchored")
each_calibration = pytest.mark.parametrize("calibration", CALIBRATIONS)


def config_for(batches: list[Batch], **fields: Any) -> PGSVDConfig:
    """With a rank for every layer that can have one."""
    return PGSVDConfig(dataset=batches, num_samples=10**6, **{"ranks": {"*": 3}} | fields)


def job_for(model: nn.Module, batches: list[Batch], **fields: Any) -> Job:
    config = config_for(batches, **{"ranks": {"*": 2}} | fields)
    targets = find_targets(model, config)
    plan = given_ranks(targets.shapes, config.ranks)
    return Job(model, targets, plan, batches if config.needs_dataset else [], config, Clock(), InPlace())


def state(model: nn.Module) -> tuple:
    """All that an attempt at compressing must leave as it was, but for the weights."""
    return (
        dict(model.named_modules()),
        {name: module.training for name, module in model.named_modules()},
        {name: (id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()},
        {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()},
        getattr(getattr(model, "config", None), "use_cache", None),
        getattr(getattr(model, "config", None), "quantization_config", None),
        torch.is_grad_enabled(),
    )


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_undone(model: nn.Module, fail: Callable[[], Any]) -> None:
    """Whatever `fail` does to a model that trains in part, and that has been run before."""
    model.train()
    next(iter(model.children())).eval()
    before, tensors = state(model), weights(model)
    fail()
    assert state(model) == before
    after = model.state_dict()
    assert list(after) == list(tensors)
    torch.testing.assert_close(dict(after), tensors, rtol=0, atol=0, equal_nan=True)


def built(name: str) -> PreTrainedModel:
    """Transformers installs hooks of its own in the first pass."""
    model = (FAMILIES | ODD)[name].build()
    plain_forward(model, FAMILIES[name].batches(1)[0])
    return model


def counted(action: Callable, number: int, error: BaseException) -> Callable:
    """A function that fails in its call of this number."""
    calls = []

    def function(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            raise error
        return action(*args, **kwargs)

    return function


def undone(job: Job) -> None:
    with undone_on_error(job.model, job.targets, True):
        factor(job)


# Undone on errors


@each_calibration
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "clip"])
def test_activations_that_spoil_in_the_second_batch(name: str, calibration: str) -> None:
    """In the last block: all before it is compressed by then."""
    model, batches = built(name), FAMILIES[name].batches(3)
    config = config_for(batches, calibration=calibration)
    targets = find_targets(model, config)
    block, calls, compressed = model.get_submodule(targets.blocks[-1]), [], []

    def spoil(module: nn.Module, args: tuple) -> tuple:
        calls.append(1)
        x = args[0].clone()
        if len(calls) >= 3:  # one call in the survey
            x[0, 1, 3] = float("nan")
            compressed.append(len(low_rank_layers(model)))
        return (x, *args[1:])

    def fail() -> None:
        hook = block.register_forward_pre_hook(spoil)
        with pytest.raises(NonFiniteError, match=rf"^the inputs of {targets.blocks[-1]}\..* hold NaN or infinity"):
            PGSVDCompressor(config).compress(model)
        hook.remove()

    assert_undone(model, fail)
    inside = [target for target in targets.found if target.block not in (None, targets.blocks[-1])]
    assert max(compressed) == (6 if name == "clip" else len(inside)) > 0  # CLIP's text comes after its images


@each_calibration
@pytest.mark.parametrize(("name", "number"), [("llama", 1), ("llama", 2), ("llama", 8), ("llama", 14), ("clip", 25)])
@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt(), torch.OutOfMemoryError()], ids=repr)
def test_a_solver_that_fails(error: BaseException, name: str, number: int, calibration: str, monkeypatch) -> None:
    """At the first layer, within a block, at the first of another, at the last, and outside of all."""
    model, batches = built(name), FAMILIES[name].batches(2)
    config = config_for(batches, calibration=calibration)
    targets = find_targets(model, config).found
    assert sum(target.block is not None for target in targets) == (14 if name == "llama" else 24)
    monkeypatch.setattr(factoring.layer, "solve", counted(factoring.layer.solve, number, error))
    before = []
    replace_linear = factoring.blocks.replace_linear
    monkeypatch.setattr(factoring.blocks, "replace_linear", lambda *args: before.append(1) or replace_linear(*args))

    def fail() -> None:
        with pytest.raises(type(error)):
            PGSVDCompressor(config).compress(model)

    assert_undone(model, fail)
    assert len(before) == number - 1


def test_a_solver_without_data_that_fails(monkeypatch) -> None:
    model = built("llama")
    monkeypatch.setattr(factoring.layer, "solve", counted(factoring.layer.solve, 9, RuntimeError("stop")))

    def fail() -> None:
        with pytest.raises(RuntimeError, match="^stop$"):
            PGSVDCompressor(PGSVDConfig(ranks={"*": 3}, solver="svd")).compress(model)

    assert_undone(model, fail)


def test_what_takes_two_attempts(monkeypatch) -> None:
    """A model whose first attempt failed is compressed as any other."""
    models = [built("llama"), built("llama")]
    config = config_for(FAMILIES["llama"].batches(2))
    with monkeypatch.context() as patch:
        patch.setattr(factoring.layer, "solve", counted(factoring.layer.solve, 9, RuntimeError("stop")))
        with pytest.raises(RuntimeError, match="^stop$"):
            PGSVDCompressor(config).compress(models[0])
    for model in models:
        PGSVDCompressor(config).compress(model)
    one, other = (model.state_dict() for model in models)
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_batch_that_takes_another_way() -> None:
    model = toy(lambda: OutOfStep(Layer(), Layer(), Layer()))
    job = job_for(model, toy_batches(3, -1, -1, 1))

    def fail() -> None:
        with pytest.raises(CalibrationError, match="^a batch of the calibration set runs layers.1 after"):
            undone(job)

    assert_undone(model, fail)


@each_calibration
def test_layers_that_are_never_reached(calibration: str) -> None:
    """Found before a layer is factored, and before a batch is run twice."""
    model, batches = toy(lambda: PassesBy(Layer(), Layer(), Layer())), toy_batches(3, -1, -1, -1)
    job, ran = job_for(model, batches, calibration=calibration), []
    job.destination.finish = lambda *_: pytest.fail("a block was finished")

    def fail() -> None:
        hook = model.layers[2].register_forward_hook(lambda *_: ran.append(1))
        message = "^the calibration set never reached 1 layers, layers.1.dense among them: give inputs that use them"
        with pytest.raises(CalibrationError, match=message):
            factor(job)
        hook.remove()

    assert_undone(model, fail)
    assert len(ran) == 3


def test_layers_that_one_late_batch_reaches() -> None:
    model, batches = toy(lambda: PassesBy(Layer(), Layer(), Layer())), toy_batches(4, -1, -1, 1, -1)
    layers, _ = factor(job_for(model, batches))
    assert [(layer.name, layer.tokens) for layer in layers] == [
        ("layers.0.dense", 80),
        ("layers.1.dense", 20),
        ("layers.2.dense", 80),
    ]
    assert [type(layer.dense) for layer in model.layers] == [LowRankLinear] * 3


def test_every_layer_of_a_plan_is_replaced_whatever_way_batches_take() -> None:
    """Also where the first of them runs a block that the others pass by."""
    for signs in ((1, -1, -1), (1, -1, 1), (-1, 1, 1)):
        model = toy(lambda: PassesBy(Layer(), Layer(), Layer()))
        factor(job_for(model, toy_batches(3, *signs)))
        assert [type(layer.dense) for layer in model.layers] == [LowRankLinear] * 3


def test_the_last_block_is_replaced_though_a_batch_passes_it_by_in_anchored_calibration() -> None:
    """Where other batches pass an inner block by, they are refused; no later block needs what is behind the last."""
    model = toy(lambda: PassesBy(Layer(), Layer()))
    layers, _ = factor(job_for(model, toy_batches(3, 1, -1, 1), calibration="anchored"))
    assert [layer.tokens for layer in layers] == [60, 40]
    assert [type(layer.dense) for layer in model.layers] == [LowRankLinear] * 2


# Several processes


class Events:
    """Notes when weights are loaded and let go."""

    def __init__(self):
        self.seen: list[tuple[str, str]] = []

    def load(self, name: str) -> None:
        self.seen.append(("load", name))

    def release(self, name: str) -> None:
        self.seen.append(("release", name))


def test_a_block_that_no_batch_of_this_process_runs_is_loaded_while_it_is_factored() -> None:
    peers, events = Peers(), Events()
    peers.size = 2
    order, here = ["first", "second", "third"], iter([Step("second", "recorded")])
    for step in in_step(here, order, lambda block: [f"nothing of {block}"], events, peers):
        assert step.last
        events.seen.append((step.recorder, step.block))
    assert events.seen == [
        ("load", "first"),
        ("nothing of first", "first"),
        ("release", "first"),
        ("recorded", "second"),
        ("load", "third"),
        ("nothing of third", "third"),
        ("release", "third"),
    ]


def test_processes_whose_batches_run_blocks_in_another_order_are_refused() -> None:
    peers = Peers()
    peers.size = 2
    here = iter([Step("second", None), Step("first", None)])
    with pytest.raises(CalibrationError, match="some batches run first earlier than others do; compress with one"):
        list(in_step(here, ["first", "second"], lambda block: [None], Events(), peers))


# Stages


def stages_of(model: nn.Module, batches: list[Batch], block: str) -> list[str]:
    """Of a block, by the layers' names in it."""
    with BlockWalk(model, find_blocks(model), batches) as walk:
        names = [name for name, module in model.named_modules() if isinstance(module, LINEAR_TYPES)]
        leaders = walk.survey({name: model.get_submodule(name) for name in names}).leaders
    layers = {name: model.get_submodule(name) for name in names if name.startswith(f"{block}.")}
    found = stages(layers, leaders)
    assert sorted(name for stage in found for name in stage) == sorted(layers)
    return [" ".join(name.removeprefix(f"{block}.").removeprefix("self_attn.") for name in stage) for stage in found]


PHI = text_family("phi", hf.PhiForCausalLM, hf.PhiConfig, **SPECIAL, **SIZES, **POSITIONS)

STAGES = {
    "llama": (
        "model.layers.0",
        ["q_proj k_proj v_proj", "o_proj", "mlp.gate_proj mlp.up_proj", "mlp.down_proj"],
    ),
    "opt": ("model.decoder.layers.1", ["q_proj k_proj v_proj", "out_proj", "fc1", "fc2"]),
    "gpt2": ("transformer.h.0", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
    # The module list has o_proj first, the calls do not.
    "phi3": ("model.layers.0", ["qkv_proj", "o_proj", "mlp.gate_up_proj", "mlp.down_proj"]),
    # Keys and values of the encoder's states are one stage whatever the queries are.
    "bart": (
        "model.decoder.layers.0",
        [
            "q_proj k_proj v_proj",
            "out_proj",
            "encoder_attn.q_proj",
            "encoder_attn.k_proj encoder_attn.v_proj",
            "encoder_attn.out_proj",
            "fc1",
            "fc2",
        ],
    ),
    # Attention and MLP read the same hidden states, but not one after the other.
    "phi": ("model.layers.0", ["q_proj k_proj v_proj", "dense", "mlp.fc1", "mlp.fc2"]),
}


@pytest.mark.parametrize("name", STAGES)
def test_stages_follow_the_calls_and_do_not_part_what_shares_an_input(name: str) -> None:
    family = PHI if name == "phi" else FAMILIES[name]
    block, expected = STAGES[name]
    assert stages_of(family.build(), family.batches(1), block) == expected


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.w1(x).tanh() * self.w3(x))


class Mixture(nn.Module):
    """Every token goes to one expert, by its place."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(6, 6)
        self.experts = nn.ModuleList(Expert() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dense(x).tanh()
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            out[:, i::3] = expert(x[:, i::3])
        return x + out


def test_experts_are_one_stage() -> None:
    """Each has inputs of its own, and they run one after the other."""
    model = toy(lambda: Toy(Mixture(), Mixture()))
    first = " ".join(f"experts.{i}.{w}" for i in range(3) for w in ("w1", "w3"))
    second = " ".join(f"experts.{i}.w2" for i in range(3))
    assert stages_of(model, toy_batches(2), "layers.1") == ["dense", first, second]
    layers, _ = factor(job_for(model, toy_batches(3), calibration="anchored"))
    assert all(isinstance(expert.w2, LowRankLinear) for layer in model.layers for expert in layer.experts)
    assert [layer.name for layer in layers] == [
        name for name, m in model.named_modules() if isinstance(m, LowRankLinear)
    ]


def test_layers_in_a_row_are_stages_of_their_own() -> None:
    """Numbers at the end of a name are no siblings' numbers."""
    names = ["layers.0.mlp.0", "layers.0.mlp.2", "layers.0.fc1", "layers.0.fc2"]
    found = stages({name: nn.Identity() for name in names}, {name: name for name in names})
    assert [list(stage) for stage in found] == [[name] for name in names]


# What is held


def dense_layers(model: nn.Module, config: PGSVDConfig) -> dict[str, weakref.ref]:
    return {name: weakref.ref(model.get_submodule(name)) for name in find_targets(model, config).names}


def alive(layers: dict[str, weakref.ref]) -> set[str]:
    return {name for name, reference in layers.items() if reference() is not None}


def observed(model: PreTrainedModel, config: PGSVDConfig, undo: bool, monkeypatch) -> list[tuple[str, set[str], int]]:
    """Whenever a block is about to be measured: the dense layers and the number of recorders that are still held."""
    layers, recorders, seen = dense_layers(model, config), [], []
    make = factoring.measuring.recorders

    def observe(job: Job, block: str, *args: Any) -> Any:
        seen.append((block, alive(layers), sum(reference() is not None for reference in recorders)))
        result = make(job, block, *args)
        recorders.extend(map(weakref.ref, result))
        return result

    monkeypatch.setattr(factoring.measuring, "recorders", observe)
    PGSVDCompressor(config).compress(model, undo=undo)
    assert alive(layers) == set(layers) - set(low_rank_layers(model))
    assert not any(reference() is not None for reference in recorders)
    return seen


@each_calibration
@pytest.mark.parametrize("solver", ["eigh", "als"])
def test_without_undo_no_dense_layer_outlives_its_block(solver: str, calibration: str, monkeypatch) -> None:
    model, batches = FAMILIES["llama"].build(num_hidden_layers=4), FAMILIES["llama"].batches(2)
    config = config_for(batches, solver=solver, calibration=calibration)
    every = set(find_targets(model, config).names)
    blocks = find_blocks(model)
    for block, held, recorders in observed(model, config, False, monkeypatch):
        done = blocks[: blocks.index(block)]
        assert held == {name for name in every if not any(name.startswith(f"{other}.") for other in done)}
        assert recorders == 0


@each_calibration
def test_with_undo_dense_layers_are_held_until_the_end(calibration: str, monkeypatch) -> None:
    model, batches = FAMILIES["llama"].build(), FAMILIES["llama"].batches(2)
    config = config_for(batches, calibration=calibration)
    every = set(find_targets(model, config).names)
    for _, held, recorders in observed(model, config, True, monkeypatch):
        assert (held, recorders) == (every, 0)


def test_without_undo_an_error_leaves_what_was_done(monkeypatch) -> None:
    model, batches = built("llama"), FAMILIES["llama"].batches(2)
    config, error = config_for(batches), RuntimeError("stop")
    layers = dense_layers(model, config)
    monkeypatch.setattr(factoring.layer, "solve", counted(factoring.layer.solve, 9, error))
    with pytest.raises(RuntimeError, match="^stop$"):
        PGSVDCompressor(config).compress(model, undo=False)
    error.__traceback__ = None  # it holds the last block's recorder
    compressed = set(low_rank_layers(model))
    assert len(compressed) == 8 < len(layers)
    assert alive(layers) == set(layers) - compressed


def test_one_layer_is_dense_and_factored_at_a_time(monkeypatch) -> None:
    """Each is replaced before the next is solved."""
    model, batches, seen = built("llama"), FAMILIES["llama"].batches(2), []
    factor_layer = factoring.blocks.factor_layer
    monkeypatch.setattr(
        factoring.blocks, "factor_layer", lambda *args: seen.append(len(low_rank_layers(model))) or factor_layer(*args)
    )
    PGSVDCompressor(config_for(batches)).compress(model)
    assert seen == list(range(14))


# The report


@pytest.mark.parametrize("name", ["clip", "bart", "opt", "llava", "t5"])
def test_layers_are_reported_in_model_order_with_what_they_saw(name: str) -> None:
    """Which is neither the order of the blocks, nor that of the calls."""
    model, batches = FAMILIES[name].build(), FAMILIES[name].batches(3)
    config = config_for(batches, ranks={"*": 1})
    names = list(find_targets(model, config).names)
    with Inputs(model, names) as inputs:
        for batch in batches:
            plain_forward(model, batch)
    rows = {layer: sum(map(len, seen)) for layer, seen in inputs.rows.items()}
    report = PGSVDCompressor(config).compress(model)
    assert [layer.name for layer in report.layers] == names
    assert {layer.name: layer.tokens for layer in report.layers} == rows
    assert all(0 < layer.activation_error < 1 and layer.seconds > 0 for layer in report.layers)


def test_blocks_of_the_odd_model_are_reported_in_model_order() -> None:
    class LastFirst(Toy):
        def forward(self, x: Tensor) -> Tensor:
            for layer in reversed(self.layers):
                x = layer(x)
            return x

    job = job_for(toy(lambda: LastFirst(Layer(), Layer(), Layer())), toy_batches(2))
    finished = []
    job.destination.finish = lambda block, layers: finished.append((block, [layer.name for layer in layers]))
    layers, notes = factor(job)
    assert [layer.name for layer in layers] == [f"layers.{i}.dense" for i in range(3)]
    assert finished == [*((f"layers.{i}", [f"layers.{i}.dense"]) for i in (2, 1, 0)), (None, [])]
    assert notes == []


@each_calibration
def test_a_layer_that_the_plan_leaves_dense(calibration: str) -> None:
    model, batches = FAMILIES["llama"].build(), FAMILIES["llama"].batches(2)
    ranks = {"q_proj": 3, "down_proj": 4}
    config = config_for(batches, ranks=ranks, calibration=calibration)
    before = {name: module for name, module in model.named_modules() if not name.endswith(tuple(ranks))}
    report = PGSVDCompressor(config).compress(model)
    assert {name: module for name, module in model.named_modules() if name in before} == before
    assert len(report.layers) == 14
    for layer in report.layers:
        rank = ranks.get(layer.name.split(".")[-1])
        assert layer.rank == rank
        assert layer.tokens == (160 if rank else 0)
        assert (layer.activation_error > 0) == (layer.weight_error > 0) == (rank is not None)


@each_calibration
def test_a_block_that_the_plan_leaves_dense_is_not_measured(calibration: str, monkeypatch) -> None:
    model, batches = FAMILIES["llama"].build(num_hidden_layers=3), FAMILIES["llama"].batches(2)
    config = config_for(batches, ranks={"layers.0": 3, "layers.2": 4}, calibration=calibration)
    assert [block for block, *_ in observed(model, config, False, monkeypatch)] == ["model.layers.0", "model.layers.2"]
    assert {name.split(".")[2]: layer.rank for name, layer in low_rank_layers(model).items()} == {"0": 3, "2": 4}


def test_the_steps_that_are_timed() -> None:
    model, batches = FAMILIES["llama"].build(), FAMILIES["llama"].batches(2)
    report = PGSVDCompressor(config_for(batches)).compress(model)
    assert {"data", "plan", "survey", "grams", "factors"} <= set(report.seconds)
    assert min(report.seconds.values()) >= 0


# By inputs or by outputs


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "whisper", "clip", "deberta_v2"])
def test_factors_by_outputs_are_those_by_inputs(name: str, monkeypatch) -> None:
    """As far as float32 outputs go; and so are the reported errors."""
    reports, models = [], []
    for by_outputs in (True, False):
        model, batches = FAMILIES[name].build(), FAMILIES[name].batches(6)
        if not by_outputs:
            monkeypatch.setattr(factoring.measuring, "measured_by_outputs", lambda *_: set())
        reports.append(PGSVDCompressor(config_for(batches, ranks={"*": 5})).compress(model))
        models.append(model)
    differ = 0
    for one, other in zip(reports[0].layers, reports[1].layers, strict=True):
        assert one.activation_error == pytest.approx(other.activation_error, rel=1e-3)
        a, b = (model.get_submodule(one.name).product().detach() for model in models)
        assert float((a - b).norm()) <= 1e-3 * float(b.norm())
        differ += not torch.equal(a, b)
    assert 0 < differ < len(reports[0].layers)


@pytest.mark.parametrize(("solver", "calibration"), [("als", "parallel"), ("eigh", "anchored"), ("als", "anchored")])
def test_who_needs_the_inputs_gets_them(solver: str, calibration: str, monkeypatch) -> None:
    monkeypatch.setattr(factoring.measuring, "measured_by_outputs", lambda *_: pytest.fail("outputs do not do here"))
    model, batches = FAMILIES["llama"].build(), FAMILIES["llama"].batches(2)
    PGSVDCompressor(config_for(batches, solver=solver, calibration=calibration)).compress(model)


def test_later_blocks_are_measured_on_the_dense_model_or_on_the_compressed_one(monkeypatch) -> None:
    """The Gram matrix that a layer of the second block is factored by."""
    name = "model.layers.1.self_attn.q_proj"
    dense, batches = FAMILIES["llama"].build(), FAMILIES["llama"].batches(2)
    expected, found, solve = {}, {}, factoring.layer.solve
    for calibration in CALIBRATIONS:
        model, order = FAMILIES["llama"].build(), iter(find_targets(dense, PGSVDConfig(tolerance=0.5)).names)

        def keep_gram(goal, moments, *rest, calibration=calibration, order=order):
            if next(order) == name:
                found[calibration] = moments.gram.clone()
            return solve(goal, moments, *rest)

        monkeypatch.setattr(factoring.layer, "solve", keep_gram)
        PGSVDCompressor(config_for(batches, ranks={"layers": 3}, calibration=calibration)).compress(model)
        source = dense if calibration == "parallel" else model
        with Inputs(source, [name]) as inputs:
            for batch in batches:
                plain_forward(source, batch)
        x = torch.cat(inputs.rows[name])
        expected[calibration] = x.T @ x
        torch.testing.assert_close(found[calibration], x.T @ x, rtol=1e-4, atol=1e-3)
    assert float((expected["parallel"] - expected["anchored"]).abs().max()) > 1


# Destinations


class Recording:
    """Takes finished blocks, keeps what modules give elsewhere, and has a block from an earlier run."""

    def __init__(self, model: nn.Module, finished: dict[str | None, list[LayerReport]]):
        self.model, self.finished, self.events = model, finished, []
        self.weights = self

    def load(self, name: str) -> None:
        self.events.append(("load", name))

    def release(self, name: str) -> None:
        self.events.append(("release", name))

    def is_finished(self, block: str | None) -> bool:
        return block in self.finished

    def restore(self, block: str | None) -> list[LayerReport] | None:
        self.events.append(("restore", block))
        return self.finished.get(block)

    def finish(self, block: str | None, layers: list[LayerReport]) -> None:
        assert all(isinstance(self.model.get_submodule(layer.name), LowRankLinear) for layer in layers)
        self.events.append(("finish", block))

    def keep(self, module: nn.Module, args: tuple, outputs: Any) -> Any:
        self.events.append(("keep", None))
        return outputs.clone()


EARLIER = LayerReport("layers.1.dense", (6, 6), 2, 36, 24, tokens=1000)


@pytest.mark.parametrize("fields", [{}, {"calibration": "anchored"}, {"solver": "svd"}], ids=str)
def test_what_a_destination_is_told(fields: dict[str, str], monkeypatch) -> None:
    """Blocks are finished while their weights are loaded; one that was finished before is run, but not measured."""
    model = toy(lambda: Toy(Layer(), Layer(), Layer()))
    job = job_for(model, toy_batches(2), **fields)
    job.destination = Recording(model, {"layers.1": [EARLIER]})
    make, recorded = factoring.measuring.recorders, []
    observe = lambda job, block, *rest: recorded.append(block) or make(job, block, *rest)  # noqa: E731
    monkeypatch.setattr(factoring.measuring, "recorders", observe)
    layers, _ = factor(job)
    assert recorded == ([] if "solver" in fields else ["layers.0", "layers.2"])
    kept = [event for event in job.destination.events if event[0] == "keep"]
    events = [event for event in job.destination.events if event[0] != "keep"]
    survey = [(step, f"layers.{i}") for i in range(3) for step in ("load", "release")]
    blocks = []
    for block in ("layers.0", "layers.1", "layers.2"):
        blocks += [("load", block), ("restore", block), ("finish", block), ("release", block)]
    blocks.remove(("finish", "layers.1"))
    rest = [("restore", None), ("finish", None)]
    if fields.get("solver") == "svd":
        blocks.remove(("load", "layers.1"))
        assert (events, kept) == (blocks + rest, [])
    else:
        assert events == survey + blocks + rest
        assert kept
    assert [layer.tokens for layer in layers] == ([0, 1000, 0] if "solver" in fields else [40, 1000, 40])
    assert layers[1] is EARLIER
    assert [type(layer.dense) for layer in model.layers] == [LowRankLinear, nn.Linear, LowRankLinear]


def test_where_outputs_are_kept_makes_no_difference() -> None:
    products = []
    for destination in (InPlace(), Recording(nn.Module(), {})):
        model = toy(lambda: Toy(Layer(), Layer(), Layer()))
        destination.model = model
        job = job_for(model, toy_batches(2))
        job.destination = destination
        factor(job)
        products.append(model.state_dict())
    assert all(torch.equal(products[0][name], products[1][name]) for name in products[0])


def test_layers_outside_the_blocks_alone() -> None:
    """One row a sequence."""
    model, batches = FAMILIES["clip"].build(), FAMILIES["clip"].batches(3)
    report = PGSVDCompressor(config_for(batches, ranks={"visual_projection": 4})).compress(model)
    assert list(low_rank_layers(model)) == ["visual_projection"]
    assert {layer.name: layer.tokens for layer in report.layers if layer.rank} == {"visual_projection": 12}
