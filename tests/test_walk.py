"""The walk: every block is run again on exactly what the dense model gave it, and no more is held than is needed."""

from __future__ import annotations

import pytest
import torch
from models import FAMILIES, Batch, Family, each_family, generator
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from watch import Call, Watch, plain_calls, plain_forward

from optimum_pgsvd.calibration import BlockWalk
from optimum_pgsvd.errors import CalibrationError
from optimum_pgsvd.targets import find_blocks


def captured(model: PreTrainedModel, batches: list[Batch]) -> BlockWalk:
    walk = BlockWalk(model, find_blocks(model), batches)
    walk.capture([])
    return walk


def assert_same_calls(found: list[Call], expected: list[Call]) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert (len(one.inputs), len(one.outputs)) == (len(other.inputs), len(other.outputs))
        assert all(torch.equal(a, b) for a, b in zip(one.copies, other.copies, strict=True))


def assert_walk_is_the_dense_forward(model: PreTrainedModel, batches: list[Batch]) -> None:
    expected = [call for calls in plain_calls(model, batches) for call in calls]
    walk = captured(model, batches)
    assert sorted(walk.blocks) == sorted({call.block for call in expected})
    for block in walk.blocks:
        with Watch(model, [block]) as watch:
            walk.run(block)
        assert_same_calls(watch.calls, [call for call in expected if call.block == block])


# The same inputs and outputs


@each_family
def test_the_walk_is_the_dense_forward(family: Family) -> None:
    assert_walk_is_the_dense_forward(family.build(), family.batches(2))


@each_family
def test_blocks_come_in_the_order_they_run(family: Family) -> None:
    model, batches = family.build(), family.batches(1)
    (calls,) = plain_calls(model, batches)
    assert captured(model, batches).blocks == list(dict.fromkeys(call.block for call in calls))


def test_albert_runs_one_block_again_and_again() -> None:
    family = FAMILIES["albert"]
    model, batches = family.build(num_hidden_layers=3), family.batches(2)
    assert [len(calls) for calls in plain_calls(model, batches)] == [3, 3]
    assert_walk_is_the_dense_forward(model, batches)


def test_a_control_gemma3_layers_take_different_masks() -> None:
    """With the first block's arguments for all, the walk would not be the dense forward."""
    ((sliding, full),) = plain_calls(FAMILIES["gemma3"].build(), FAMILIES["gemma3"].batches(1))
    assert not all(torch.equal(a, b) for a, b in zip(sliding.inputs[1:], full.inputs[1:], strict=False))


def test_a_control_t5_blocks_after_the_first_are_given_a_position_bias() -> None:
    (calls,) = plain_calls(FAMILIES["t5"].build(), FAMILIES["t5"].batches(1))
    first, second = calls[:2]
    assert any(tensor is output for tensor in second.inputs for output in first.outputs[1:])


@pytest.mark.parametrize("name", ["llama", "gemma3", "bert", "t5", "bart", "opt", "deberta_v2"])
def test_with_padding(name: str) -> None:
    family = FAMILIES[name]
    batches = family.batches(2)
    for batch in batches:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][1, -7:] = 0
    assert_walk_is_the_dense_forward(family.build(), batches)


def test_batches_of_different_lengths() -> None:
    family = FAMILIES["t5"]
    long, short = family.batches(2)
    short["input_ids"] = short["input_ids"][:2, :7]
    short["decoder_input_ids"] = short["decoder_input_ids"][:2]
    assert_walk_is_the_dense_forward(family.build(), [long, short])


def test_later_blocks_see_the_dense_model_whatever_becomes_of_earlier_ones() -> None:
    model, batches = FAMILIES["t5"].build(), FAMILIES["t5"].batches(2)
    expected = [call for calls in plain_calls(model, batches) for call in calls]
    walk = captured(model, batches)
    for block in walk.blocks:
        with Watch(model, [block]) as watch:
            walk.run(block)
        assert_same_calls(watch.calls, [call for call in expected if call.block == block])
        nn.utils.vector_to_parameters(torch.zeros(count(model, block)), model.get_submodule(block).parameters())


def count(model: nn.Module, block: str) -> int:
    return sum(parameter.numel() for parameter in model.get_submodule(block).parameters())


# Models that are not quite stacks


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dense(x).tanh()


class AddsInPlace(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return x.add_(self.dense(x).tanh())


class Toy(nn.Module):
    """Blocks in a list."""

    def __init__(self, *blocks: nn.Module):
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def can_generate(self) -> bool:
        return False

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        for layer in self.layers:
            x = layer(x)
        return x


class TwiceOver(Toy):
    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.layers, *self.layers):
            x = layer(x)
        return x


class SideBySide(Toy):
    def forward(self, x: Tensor) -> Tensor:
        return sum(layer(x) for layer in self.layers)


class ChangedBetween(Toy):
    """Features are added to a block's output in place, as some models add vision features to early layers."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            x[:, 1:3] += 1
        return x


class LastFirst(Toy):
    def forward(self, x: Tensor) -> Tensor:
        for layer in reversed(self.layers):
            x = layer(x)
        return x


class PartOutside(Toy):
    """Between the blocks something is computed that is no block."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).flip(0)
        return x


TOYS = {
    "every block twice": lambda: TwiceOver(Layer(), Layer()),
    "blocks side by side": lambda: SideBySide(Layer(), Layer()),
    "outputs changed in place": lambda: ChangedBetween(Layer(), Layer(), Layer()),
    "inputs changed in place": lambda: Toy(AddsInPlace(), AddsInPlace()),
    "last block first": lambda: LastFirst(Layer(), Layer()),
    "something between the blocks": lambda: PartOutside(Layer(), Layer(), Layer()),
}


@pytest.mark.parametrize("name", TOYS)
def test_odd_models(name: str) -> None:
    source = generator(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TOYS[name]()
    batches = [{"x": torch.randn(4, 5, 6, generator=source)} for _ in range(2)]
    assert_walk_is_the_dense_forward(model.eval(), batches)


# What is held between the blocks


def needed_later(calls: list[Call], done: list[str]) -> set[tuple[int, int]]:
    """Which outputs, call and place, of blocks that were run go into blocks that were not; by object identity."""
    later = {id(tensor) for call in calls if call.block not in done for tensor in call.inputs}
    needed: dict[int, tuple[int, int]] = {}
    for number, call in enumerate(calls):
        for place, tensor in enumerate(call.outputs):
            if call.block in done and id(tensor) in later:
                needed.setdefault(id(tensor), (number, place))
    return set(needed.values())


def held(walk: BlockWalk) -> list[set[tuple[int, int]]]:
    return [{(output.call, output.leaf) for output in outputs} for outputs in walk._outputs]


@each_family
def test_only_what_later_blocks_need_is_held(family: Family) -> None:
    model, batches = family.build(), family.batches(2)
    calls = plain_calls(model, batches)
    walk = captured(model, batches)
    assert held(walk) == [set(), set()]
    for i, block in enumerate(walk.blocks):
        walk.run(block)
        assert held(walk) == [needed_later(batch, walk.blocks[: i + 1]) for batch in calls]
    assert held(walk) == [set(), set()]


@each_family
def test_arguments_are_let_go(family: Family) -> None:
    walk = captured(family.build(), family.batches(2))
    for i, block in enumerate(walk.blocks):
        walk.run(block)
        done = walk.blocks[: i + 1]
        assert all(not call.leaves for calls in walk._calls for call in calls if call.block in done)


HIDDEN_STATES = {"llama": 1, "gemma3": 1, "gpt2": 1, "bert": 1, "albert": 1, "t5": 3, "bart": 2, "clip": 2}


@pytest.mark.parametrize("name", HIDDEN_STATES)
def test_one_hidden_state_a_batch_is_captured(name: str) -> None:
    """The input of each stack, and T5's encoder states, which are normalised after the last block."""
    family = FAMILIES[name]
    walk = captured(family.build(), family.batches(2))
    for calls in walk._calls:
        tensors = {id(leaf): leaf for call in calls for leaf in call.leaves if isinstance(leaf, Tensor)}
        assert sum(tensor.dim() == 3 and tensor.shape[-1] == 32 for tensor in tensors.values()) == HIDDEN_STATES[name]


# The model is left as it was

DROPOUTS = {
    "gpt2": ["resid_pdrop", "embd_pdrop", "attn_pdrop"],
    "bert": ["hidden_dropout_prob", "attention_probs_dropout_prob"],
    "t5": ["dropout_rate"],
    "bart": ["dropout", "attention_dropout", "activation_dropout"],
    "llama": ["attention_dropout"],
}


@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout_plays_no_part(name: str) -> None:
    family, batches = FAMILIES[name], FAMILIES[name].batches(2)
    model = family.build(**dict.fromkeys(DROPOUTS[name], 0.5)).train()
    walk = captured(model, batches)
    found = []
    for block in walk.blocks:
        with Watch(model, [block]) as watch:
            walk.run(block)
        found.append((block, watch.calls))
    assert model.training
    dropping = calls_in_training(model, batches[0])
    expected = [call for calls in plain_calls(model, batches) for call in calls]
    for block, calls in found:
        assert_same_calls(calls, [call for call in expected if call.block == block])
    assert not torch.equal(dropping[-1].outputs[0], plain_calls(model, batches[:1])[0][-1].outputs[0])


@torch.no_grad()
def calls_in_training(model: PreTrainedModel, batch: Batch) -> list[Call]:
    with Watch(model, find_blocks(model)) as watch:
        model(**batch)
    return watch.calls


@each_family
def test_training_flags_are_restored(family: Family) -> None:
    model = family.build().train()
    next(iter(model.children())).eval()
    flags = {name: module.training for name, module in model.named_modules()}
    assert len(set(flags.values())) == 2
    walk = captured(model, family.batches(1))
    walk.run(walk.blocks[0])
    assert {name: module.training for name, module in model.named_modules()} == flags


def configs(model: nn.Module) -> list:
    return list({id(module.config): module.config for module in model.modules() if hasattr(module, "config")}.values())


def caching(model: nn.Module) -> list[bool | None]:
    return [getattr(config, "use_cache", None) for config in configs(model)]


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("name", ["llama", "t5", "whisper", "llava", "bert"])
def test_use_cache_is_restored(name: str, on: bool) -> None:
    family = FAMILIES[name]
    model = family.build()
    for config in configs(model):
        if hasattr(config, "use_cache"):
            config.use_cache = on
    before = caching(model)
    walk = captured(model, family.batches(1))
    walk.run(walk.blocks[0])
    assert caching(model) == before


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@each_family
def test_nothing_of_the_model_is_changed(family: Family) -> None:
    model, batches = family.build(), family.batches(1)
    plain_forward(model, batches[0])  # transformers installs hooks of its own in the first pass
    before, hooked = {name: tensor.clone() for name, tensor in model.state_dict().items()}, hooks(model)
    walk = captured(model, batches)
    for block in walk.blocks:
        walk.run(block)
    assert hooks(model) == hooked
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@each_family
def test_batches_are_not_changed(family: Family) -> None:
    batches = family.batches(1)
    walk = captured(family.build(), batches)
    for block in walk.blocks:
        walk.run(block)
    (expected,) = family.batches(1)
    assert list(batches[0]) == list(expected)
    assert all(torch.equal(batches[0][key], value) for key, value in expected.items())


def test_gradients_are_not_recorded() -> None:
    family = FAMILIES["llama"]
    walk = captured(family.build(), family.batches(1))
    walk.run(walk.blocks[0])
    assert not any(tensor.requires_grad for outputs in walk._outputs for tensor in outputs.values())


# What goes wrong

WRONG = {
    "no inputs": ("llama", {}, r"LlamaForCausalLM does not accept calibration batch 1 with the inputs : "),
    "unknown input": ("gpt2", {"pixels": torch.zeros(2, 3)}, r"batch 1 with the inputs pixels \(2, 3\): "),
    "token outside the vocabulary": ("bert", {"input_ids": torch.tensor([[100]])}, r"inputs input_ids \(1, 1\): "),
    "too long": ("gpt2", {"input_ids": torch.zeros(1, 65, dtype=torch.long)}, r"inputs input_ids \(1, 65\): "),
    "wrong shape": (
        "clip",
        {"input_ids": torch.zeros(1, 4, dtype=torch.long), "pixel_values": torch.zeros(1, 3, 8, 8)},
        r"inputs input_ids \(1, 4\), pixel_values \(1, 3, 8, 8\): ",
    ),
    "no images": ("clip", {"input_ids": torch.zeros(1, 4, dtype=torch.long)}, r"inputs input_ids \(1, 4\): "),
    "mask of another shape": (
        "bert",
        {"input_ids": torch.zeros(1, 4, dtype=torch.long), "attention_mask": torch.zeros(1, 5)},
        r"inputs input_ids \(1, 4\), attention_mask \(1, 5\): ",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_batches_the_model_does_not_take(case: str) -> None:
    name, batch, message = WRONG[case]
    model = FAMILIES[name].build().train()
    before = caching(model)
    with pytest.raises(CalibrationError, match=message):
        captured(model, [*FAMILIES[name].batches(1), batch])
    assert (hooks(model), caching(model)) == (0, before)
    assert all(module.training for module in model.modules())


def test_a_cache_in_a_batch_is_refused() -> None:
    model, (batch,) = FAMILIES["llama"].build(), FAMILIES["llama"].batches(1)
    with pytest.raises(
        CalibrationError, match=r"model.layers.0 was called with a key-value cache; switch use_cache off"
    ):
        captured(model, [batch | {"past_key_values": DynamicCache()}])
    assert hooks(model) == 0
