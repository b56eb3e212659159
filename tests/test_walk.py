"""The walk: every batch goes through the model once, in step with all others, and every block sees what it would."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context

import pytest
import torch
from greenlet import getcurrent, greenlet
from models import FAMILIES, Batch, Family, each_family
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from toys import TOYS, Layer, OutOfStep, PassesBy, Toy, toy, toy_batches
from transformers import DynamicCache, PreTrainedModel
from watch import Call, Inputs, Watch, plain_calls, plain_forward, tensors_in

from optimum_pgsvd.calibration import AnchoredRecorder, BlockWalk, GramRecorder
from optimum_pgsvd.errors import CalibrationError
from optimum_pgsvd.targets import LINEAR_TYPES, find_blocks


def linears(model: nn.Module, block: str = "") -> dict[str, nn.Module]:
    """The linear layers, of a block or of the whole model."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LINEAR_TYPES) and name.startswith(block)}


def nothing(block: str) -> None:
    """Records nothing, and does nothing."""


def nothings(block: str) -> list[None]:
    """The same in anchored calibration."""
    return [None]


def alone(recorder_of: Callable[[str], GramRecorder]) -> Callable[[str], list[GramRecorder]]:
    """All layers of a block in one stage."""
    return lambda block: [recorder_of(block)]


@contextmanager
def surveyed(model: nn.Module, batches: list[Batch], **options) -> Iterator[BlockWalk]:
    """A walk that is ready to measure."""
    with BlockWalk(model, find_blocks(model), batches, **options) as walk:
        walk.survey({})
        yield walk


def walked(
    model: nn.Module, batches: list[Batch], then: Callable[[str], None] = nothing, **options
) -> tuple[list[str], list[Call]]:
    """The blocks as they are handed out, and their calls in the order in which they were made."""
    order = []
    with surveyed(model, batches, **options) as walk, watching(model, walk) as watch:
        for step in walk.measure(nothing):
            assert step.recorder is None
            assert step.last
            order.append(step.block)
            then(step.block)
    return order, watch.calls


def watching(model: nn.Module, walk: BlockWalk) -> Watch:
    return Watch(model, walk.modules, lambda: walk.running.number)


def of_batches(calls: Iterable[Call], count: int) -> list[list[Call]]:
    return [[call for call in calls if call.batch == number] for number in range(count)]


def assert_same_calls(found: list[Call], expected: list[Call]) -> None:
    assert [call.block for call in found] == [call.block for call in expected]
    assert found
    for one, other in zip(found, expected, strict=True):
        assert (len(one.inputs), len(one.outputs)) == (len(other.inputs), len(other.outputs))
        assert all(torch.equal(a, b) for a, b in zip(one.copies, other.copies, strict=True))


def wipe(model: nn.Module, block: str) -> None:
    """Whatever becomes of a block that was handed out is no later block's concern."""
    with torch.no_grad():
        for parameter in model.get_submodule(block).parameters():
            parameter.fill_(float("nan"))


def last_calls(calls: Iterable[Call]) -> list[str]:
    """Blocks in the order of their last calls."""
    return list(dict.fromkeys(call.block for call in reversed([*calls])))[::-1]


def assert_walk_is_the_dense_forward(model: nn.Module, batches: list[Batch], **options) -> None:
    """Every batch goes through the same calls with the same tensors, once; and no block is needed any more after it
    was handed out."""
    expected = plain_calls(model, batches)
    order, calls = walked(model, batches, lambda block: wipe(model, block), **options)
    for one, other in zip(of_batches(calls, len(batches)), expected, strict=True):
        assert_same_calls(one, other)
    assert sorted(order) == sorted({call.block for batch in expected for call in batch})
    assert order == last_calls(calls)


# The same inputs and outputs


@each_family
def test_the_walk_is_the_dense_forward(family: Family) -> None:
    assert_walk_is_the_dense_forward(family.build(), family.batches(2))


@each_family
def test_blocks_come_in_the_order_they_run(family: Family) -> None:
    model, batches = family.build(), family.batches(1)
    (calls,) = plain_calls(model, batches)
    order = list(dict.fromkeys(call.block for call in calls))
    assert walked(model, batches)[0] == order
    with surveyed(model, batches) as walk:
        assert walk.blocks == order


def test_albert_runs_one_block_again_and_again() -> None:
    family = FAMILIES["albert"]
    model, batches = family.build(num_hidden_layers=3), family.batches(2)
    assert [len(calls) for calls in plain_calls(model, batches)] == [3, 3]
    order, calls = walked(model, batches)
    assert (len(order), len(calls)) == (1, 6)
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


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "clip"])
def test_recorders_see_each_batch_once(name: str) -> None:
    """A layer is counted as many rows as one forward pass a batch gives it, whatever was surveyed before."""
    family = FAMILIES[name]
    model, batches = family.build(), family.batches(3)
    with Inputs(model, linears(model)) as inputs:
        for batch in batches:
            plain_forward(model, batch)
    rows = {layer: sum(map(len, seen)) for layer, seen in inputs.rows.items()}
    with BlockWalk(model, find_blocks(model), batches) as walk:
        walk.survey(linears(model))
        found = {}
        for step in walk.measure(lambda block: GramRecorder(linears(model, f"{block}."), walk.rows)):
            assert all(layer.startswith(f"{step.block}.") for layer in step.recorder.tokens)
            found |= step.recorder.tokens
    assert found == {name: rows[name] for name in found}
    assert min(found.values()) > 0


# Models that are not quite stacks


@pytest.mark.parametrize("name", TOYS)
def test_odd_models(name: str) -> None:
    assert_walk_is_the_dense_forward(toy(TOYS[name]), toy_batches(2))


@pytest.mark.parametrize("name", [*TOYS, "some come back"])
def test_odd_models_are_recorded(name: str) -> None:
    """All that runs through a block is in its one recorder, though it was visited several times."""
    model = toy(TOYS.get(name, lambda: OutOfStep(Layer(), Layer(), Layer())))
    batches = toy_batches(3, 1, -1, 1)
    with Inputs(model, linears(model)) as inputs:
        for batch in batches:
            model(**batch)
    with surveyed(model, batches) as walk:
        for step in walk.measure(lambda block: GramRecorder(linears(model, f"{block}."), walk.rows)):
            block, recorder = step.block, step.recorder
            x = torch.cat(inputs.rows.pop(f"{block}.dense"))
            assert recorder.tokens == {f"{block}.dense": len(x)}
            torch.testing.assert_close(recorder.moments(f"{block}.dense").gram, x.T @ x, rtol=1e-5, atol=1e-4)
            wipe(model, block)
    assert inputs.rows == {}


def test_blocks_that_run_twice_are_handed_out_once_after_their_last_call() -> None:
    model = toy(TOYS["every block twice"])
    seen = []
    with surveyed(model, toy_batches(2)) as walk, watching(model, walk) as watch:
        for step in walk.measure(nothing):
            seen.append((step.block, len(watch.calls)))
    assert seen == [("layers.0", 6), ("layers.1", 8)]


# Batches of two kinds


def images_and_texts(name: str) -> tuple[PreTrainedModel, list[Batch], list[Batch]]:
    return FAMILIES[name].build(), FAMILIES[name].batches(2), FAMILIES["llama"].batches(2, seed=1)


ORDERS = {
    "images first": lambda images, texts: [*images, *texts],
    "texts first": lambda images, texts: [*texts, *images],
    "in turns": lambda images, texts: [texts[0], images[0], texts[1], images[1]],
}
each_order = pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)


class Resident:
    """Weights of which one block at a time is in memory, and not a number where it is not."""

    def __init__(self, model: nn.Module):
        self.model, self.loaded, self.loads = model, None, []
        self.weights = {name: [p.clone() for p in self.parameters(name)] for name in find_blocks(model)}
        for name in self.weights:
            wipe(model, name)

    def parameters(self, name: str) -> list[nn.Parameter]:
        return [*self.model.get_submodule(name).parameters()]

    @torch.no_grad()
    def load(self, name: str) -> None:
        assert self.loaded is None, f"{self.loaded} is loaded when {name} is"
        self.loaded = name
        self.loads.append(name)
        for parameter, value in zip(self.parameters(name), self.weights[name], strict=True):
            parameter.copy_(value)

    def release(self, name: str) -> None:
        assert self.loaded == name
        self.loaded = None
        wipe(self.model, name)


@each_order
def test_images_and_texts(order) -> None:
    """LLaVA's vision tower is passed by text alone; its language model waits for the images."""
    model, images, texts = images_and_texts("llava")
    batches = order(images, texts)
    expected = plain_calls(model, batches)
    weights = Resident(model)
    found, calls = walked(model, batches, weights=weights)
    for one, other in zip(of_batches(calls, 4), expected, strict=True):
        assert_same_calls(one, other)
    assert found == last_calls(calls) == [call.block for call in expected[batches.index(images[0])]]
    # Nothing is loaded twice because of the batches' order: once for each kind in the survey, once afterwards.
    assert weights.loads[6:] == found


@each_order
def test_a_block_waits_for_every_kind_of_batch(order) -> None:
    model, images, texts = images_and_texts("llava")
    passed = {}
    with surveyed(model, order(images, texts)) as walk, Watch(model, walk.modules, lambda: 0) as watch:
        for step in walk.measure(nothing):
            passed[step.block] = sum(call.block == step.block for call in watch.calls)
        assert walk.blocks == list(passed)
    assert passed == {block: 2 if "vision" in block else 4 for block in find_blocks(model)}


# In step


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "t5", "bart", "clip", "whisper", "deberta_v2", "albert"])
def test_one_block_is_resident_at_a_time(name: str) -> None:
    family = FAMILIES[name]
    model, batches = family.build(), family.batches(3)
    expected = plain_calls(model, batches)
    weights = Resident(model)
    order, calls = walked(model, batches, weights=weights)
    for one, other in zip(of_batches(calls, 3), expected, strict=True):
        assert_same_calls(one, other)
    assert weights.loaded is None
    assert weights.loads == order * 2  # for the survey, and for all batches


@pytest.mark.parametrize("name", ["every block twice", "blocks side by side", "last block first"])
def test_odd_models_of_which_one_block_is_resident_at_a_time(name: str) -> None:
    model, batches = toy(TOYS[name]), toy_batches(3)
    expected = plain_calls(model, batches)
    weights = Resident(model)
    for one, other in zip(of_batches(walked(model, batches, weights=weights)[1], 3), expected, strict=True):
        assert_same_calls(one, other)
    assert weights.loaded is None


def test_one_block_is_resident_at_a_time_in_anchored_calibration() -> None:
    model, batches = FAMILIES["t5"].build(), FAMILIES["t5"].batches(2)
    weights = Resident(model)
    with surveyed(model, batches, weights=weights) as walk:
        order = [step.block for step in walk.measure_anchored(nothings)]
    assert weights.loaded is None
    assert weights.loads == order * 2


@each_family
def test_all_batches_pass_a_block_before_one_passes_the_next(family: Family) -> None:
    model, batches = family.build(), family.batches(3)
    _, calls = walked(model, batches)
    (once,) = plain_calls(model, batches[:1])
    order = dict.fromkeys(call.block for call in once)
    assert [call.block for call in calls] == [name for name in order for c in once * 3 if c.block == name]


def test_a_block_is_handed_out_before_the_next_one_runs() -> None:
    model, batches = FAMILIES["llama"].build(), FAMILIES["llama"].batches(3)
    with surveyed(model, batches) as walk, watching(model, walk) as watch:
        seen = [(step.block, len(watch.calls)) for step in walk.measure(nothing)]
    assert seen == [("model.layers.0", 3), ("model.layers.1", 6)]


def test_recorders_are_asked_for_before_their_block_runs() -> None:
    """And not earlier: a recorder of a block holds its layers."""
    model, batches = FAMILIES["llama"].build(), FAMILIES["llama"].batches(2)
    with surveyed(model, batches) as walk, Watch(model, walk.modules, lambda: 0) as watch:
        asked = []
        list(walk.measure(lambda block: asked.append((block, len(watch.calls)))))
    assert asked == [("model.layers.0", 0), ("model.layers.1", 2)]


# The survey


def surveys(model: nn.Module, batches: list[Batch], layers: dict[str, nn.Module]) -> int:
    """How many batches are surveyed until all of these layers have been reached."""
    count = []
    with BlockWalk(model, find_blocks(model), batches) as walk:
        hook = model.register_forward_pre_hook(lambda *_: count.append(1))
        survey = walk.survey(layers)
        hook.remove()
    assert not survey.unseen or len(count) == len(batches)
    return len(count)


def test_one_batch_of_each_kind_is_surveyed() -> None:
    model, images, texts = images_and_texts("llava")
    assert surveys(model, [*images, *texts], linears(model)) == 2
    assert surveys(model, images, linears(model)) == 1
    assert surveys(model, [batch | {"attention_mask": None} for batch in texts] + texts, {}) == 1


def test_the_survey_goes_on_until_every_layer_has_been_reached() -> None:
    model = toy(lambda: PassesBy(Layer(), Layer(), Layer()))
    assert surveys(model, toy_batches(5, -1, -1, 1, 1, -1), linears(model)) == 3
    assert surveys(model, toy_batches(3, -1, -1, -1), linears(model)) == 3
    with BlockWalk(model, find_blocks(model), toy_batches(2, -1, -1)) as walk:
        assert walk.survey(linears(model)).unseen == ["layers.1.dense"]


# What is held between the blocks


def hidden(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor.dim() == 3 and tensor.shape[-1] == 32]


# Those that hold what their towers gave, or what a block deep in a tower did.
TOWERS = ("clip", "llava", "qwen3_vl")
STACKS = [name for name in FAMILIES if name not in TOWERS]


@pytest.mark.parametrize("name", STACKS)
def test_of_what_blocks_put_out_only_what_later_blocks_need_is_held(name: str) -> None:
    """One hidden state a batch, as a plain forward pass tells by object identity; for BART also the encoder's last."""
    family = FAMILIES[name]
    model, batches = family.build(), family.batches(2)
    plain = plain_calls(model, batches)
    outputs: list[list[list[weakref.ref]]] = [[], []]
    with surveyed(model, batches) as walk:
        for module in walk.modules.values():
            module.register_forward_hook(
                lambda module, args, result: outputs[walk.running.number].append(
                    [weakref.ref(tensor) for tensor in hidden(tensors_in(result))]
                )
            )
        done: list[str] = []
        for step in walk.measure(lambda block: GramRecorder(linears(model, f"{block}."), walk.rows)):
            done.append(step.block)
            for found, expected in zip(outputs, plain, strict=True):
                later = {id(tensor) for call in expected if call.block not in done for tensor in call.inputs}
                held = [reference() is not None for references in found for reference in references]
                needed = [id(tensor) in later for call in expected for tensor in hidden(call.outputs)]
                assert held == needed[: len(held)]


def test_recorders_hold_no_activations() -> None:
    model, batches = FAMILIES["llama"].build(), FAMILIES["llama"].batches(2)
    inputs = []
    layer = model.model.layers[0].mlp.down_proj
    layer.register_forward_pre_hook(lambda module, args: inputs.append(weakref.ref(args[0])))
    for anchored in (False, True):
        with surveyed(model, batches) as walk:
            inputs.clear()

            def recorder_of(block: str) -> GramRecorder:
                return AnchoredRecorder(linears(model, f"{block}."), walk.rows, None, 0.5)  # noqa: B023

            steps = walk.measure_anchored(alone(recorder_of)) if anchored else walk.measure(recorder_of)
            recorder = next(steps).recorder
            assert recorder.layers
            assert len(inputs) == (4 if anchored else 2)
            assert not any(reference() is not None for reference in inputs)


def test_recorders_are_let_go_before_the_next_block_runs() -> None:
    model, batches = FAMILIES["llama"].build(), FAMILIES["llama"].batches(2)
    for anchored in (False, True):
        with surveyed(model, batches) as walk:
            made: list[weakref.ref] = []

            def recorder_of(block: str) -> GramRecorder:
                assert [reference() for reference in made] == [None] * len(made)  # noqa: B023
                recorder = AnchoredRecorder(linears(model, f"{block}."), walk.rows, None, 0.5)  # noqa: B023
                made.append(weakref.ref(recorder))  # noqa: B023
                return recorder

            blocks = []
            for step in walk.measure_anchored(alone(recorder_of)) if anchored else walk.measure(recorder_of):
                blocks.append(step.block)
                step.release()
            assert blocks == ["model.layers.0", "model.layers.1"]


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
    _, calls = walked(model, batches)
    assert model.training
    dropping = calls_in_training(model, batches[0])
    expected = plain_calls(model, batches)
    for one, other in zip(of_batches(calls, 2), expected, strict=True):
        assert_same_calls(one, other)
    assert not torch.equal(dropping[-1].outputs[0], expected[0][-1].outputs[0])


@torch.no_grad()
def calls_in_training(model: PreTrainedModel, batch: Batch) -> list[Call]:
    with Watch(model, find_blocks(model)) as watch:
        model(**batch)
    return watch.calls


def configs(model: nn.Module) -> list:
    return list({id(module.config): module.config for module in model.modules() if hasattr(module, "config")}.values())


def caching(model: nn.Module) -> list[bool | None]:
    return [getattr(config, "use_cache", None) for config in configs(model)]


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def state(model: nn.Module) -> tuple:
    """All that a walk might leave behind, but for weights."""
    training = {name: module.training for name, module in model.named_modules()}
    return hooks(model), training, caching(model), torch.is_grad_enabled()


def in_two_states(family: Family) -> PreTrainedModel:
    """A model of which a part trains; transformers has installed in it what hooks of its own it will need."""
    model = family.build()
    plain_forward(model, family.batches(1)[0])
    model.train()
    next(iter(model.children())).eval()
    for config in configs(model):
        if hasattr(config, "use_cache"):
            config.use_cache = True
    assert {module.training for module in model.modules()} == {True, False}
    return model


def all_of_it(model: nn.Module, batches: list[Batch]) -> None:
    walked(model, batches)


def with_all_there_is(model: nn.Module, batches: list[Batch]) -> None:
    """Recorders inside and outside, and a hook."""
    options = {"keep": lambda module, args, outputs: outputs, "whole": True}
    with surveyed(model, batches, **options) as walk:
        inside = [name for block in walk.blocks for name in linears(model, f"{block}.")]
        outside = GramRecorder({name: m for name, m in linears(model).items() if name not in inside}, walk.rows)
        list(walk.measure(lambda block: GramRecorder(linears(model, f"{block}."), walk.rows), outside))


def survey_only(model: nn.Module, batches: list[Batch]) -> None:
    with surveyed(model, batches):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        assert not any(caching(model))


def stop_in_the_middle(model: nn.Module, batches: list[Batch]) -> None:
    with surveyed(model, batches) as walk:
        blocks = walk.measure(lambda block: GramRecorder(linears(model, f"{block}."), walk.rows))
        next(blocks)


def stop_in_the_middle_of_a_loop(model: nn.Module, batches: list[Batch]) -> None:
    with surveyed(model, batches) as walk:
        for _ in walk.measure(nothing, GramRecorder(linears(model, find_blocks(model)[-1]), walk.rows)):
            break


def never_start(model: nn.Module, batches: list[Batch]) -> None:
    with surveyed(model, batches) as walk:
        walk.measure(nothing)


def fail_between_blocks(model: nn.Module, batches: list[Batch]) -> None:
    def interrupt(block: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        walked(model, batches, interrupt)


def fail_in_a_block(model: nn.Module, batches: list[Batch]) -> None:
    """In the last block, in the second batch."""
    last = linears(model, find_blocks(model)[-1])
    name, layer = next(iter(last.items()))

    class Fails(GramRecorder):
        def see(self, name: str, x: Tensor) -> None:
            if walk.running.number == 1:
                raise CalibrationError("stop")

    with pytest.raises(CalibrationError, match="^stop$"), surveyed(model, batches) as walk:
        list(walk.measure(lambda block: Fails({name: layer}, walk.rows)))


def fail_in_a_recorder(model: nn.Module, batches: list[Batch]) -> None:
    def recorder_of(block: str) -> None:
        raise MemoryError

    with pytest.raises(MemoryError), surveyed(model, batches) as walk:
        list(walk.measure(recorder_of))


def fail_in_the_survey(model: nn.Module, batches: list[Batch]) -> None:
    with pytest.raises(CalibrationError), surveyed(model, [{"of another kind": torch.zeros(1)}]):
        pass


def anchored(model: nn.Module, batches: list[Batch]) -> None:
    with surveyed(model, batches) as walk:
        make = lambda block: AnchoredRecorder(linears(model, f"{block}."), walk.rows, None, 0.5)  # noqa: E731
        list(walk.measure_anchored(alone(make)))


def anchored_stopped(model: nn.Module, batches: list[Batch]) -> None:
    with surveyed(model, batches) as walk:
        next(walk.measure_anchored(nothings))


WAYS = [
    *(all_of_it, with_all_there_is, survey_only, stop_in_the_middle, stop_in_the_middle_of_a_loop, never_start),
    *(fail_between_blocks, fail_in_a_block, fail_in_a_recorder, fail_in_the_survey, anchored, anchored_stopped),
]


@pytest.mark.parametrize("name", ["llama", "t5", "llava"])
@pytest.mark.parametrize("way", WAYS, ids=[way.__name__ for way in WAYS])
def test_a_model_is_left_as_it_was(way: Callable, name: str) -> None:
    family = FAMILIES[name]
    model, batches = in_two_states(family), family.batches(2)
    before, weights = state(model), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    way(model, batches)
    assert state(model) == before
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())
    (expected, _) = family.batches(2)
    assert list(batches[0]) == list(expected)
    assert all(torch.equal(batches[0][key], value) for key, value in expected.items())


@each_family
def test_flags_and_weights_of_every_family_are_left_as_they_were(family: Family) -> None:
    model = in_two_states(family)
    before, weights = state(model), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with_all_there_is(model, family.batches(1))
    assert state(model) == before
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["llama", "t5", "whisper", "llava", "bert"])
def test_a_cache_that_is_off_stays_off(name: str) -> None:
    model = FAMILIES[name].build()
    for config in configs(model):
        if hasattr(config, "use_cache"):
            config.use_cache = False
    before = caching(model)
    walked(model, FAMILIES[name].batches(1))
    assert caching(model) == before


@pytest.mark.parametrize("training", [True, False])
def test_what_takes_the_place_of_a_module_trains_where_that_one_did(training: bool) -> None:
    model, batches = FAMILIES["llama"].build().train(), FAMILIES["llama"].batches(1)
    model.model.layers[1].train(training)
    with surveyed(model, batches) as walk:
        for step in walk.measure(nothing):
            mlp = model.get_submodule(step.block).mlp
            mlp.up_proj = nn.Sequential(nn.Linear(32, 3), nn.Linear(3, 64))
            mlp.added = nn.Linear(1, 1)
            assert mlp.up_proj.training  # as modules are when they are made
    for layer, expected in zip(model.model.layers, (True, training), strict=True):
        assert {module.training for module in layer.modules()} == {expected}


def test_gradients_are_not_recorded() -> None:
    family = FAMILIES["llama"]
    assert torch.is_grad_enabled()
    _, calls = walked(family.build(), family.batches(1))
    assert not any(tensor.requires_grad for call in calls for tensor in call.outputs)


@pytest.mark.parametrize(("whole", "positions"), [(False, 1), (True, 20)])
def test_logits_of_every_token_are_computed_where_they_matter(whole: bool, positions: int) -> None:
    model, batches, seen = FAMILIES["llama"].build(), FAMILIES["llama"].batches(2), []
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    walked(model, batches, whole=whole)
    assert seen == [positions] * 3


def test_passes_that_are_given_up_run_no_further() -> None:
    model = toy(lambda: Toy(Layer(), Layer()))
    ended = []
    model.register_forward_hook(lambda *_: ended.append(1))
    with surveyed(model, toy_batches(3)) as walk:
        assert len(ended) == 1  # of the survey
        next(walk.measure(nothing))
    assert len(ended) == 1


# Several passes at a time

setting: ContextVar[float] = ContextVar("setting", default=1.0)


class Sets(Toy):
    """Its blocks read what the model sets for as long as it runs."""

    def forward(self, x: Tensor) -> Tensor:
        token = setting.set(float(x.flatten()[0]))
        for layer in self.layers:
            x = layer(x)
        setting.reset(token)
        return x


class Reads(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * setting.get()


def test_context_variables_of_one_pass_are_not_seen_in_another() -> None:
    model, batches = toy(lambda: Sets(Reads(), Reads())), toy_batches(3)
    outside = []
    expected = plain_calls(model, batches)
    order, calls = walked(model, batches, lambda block: outside.append(setting.get()))
    for one, other in zip(of_batches(calls, 3), expected, strict=True):
        assert_same_calls(one, other)
    assert outside == [1.0, 1.0]


# Modes


class Autocast(Toy):
    """Casts products to half precision for as long as it runs its blocks."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            for layer in self.layers:
                x = layer(x)
        return x @ torch.eye(6, dtype=x.dtype)


class Records(Toy):
    """Records gradients for as long as it runs its blocks."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            for layer in self.layers:
                x = layer(x)
        return x * 2


def modes() -> tuple[bool, bool, torch.dtype]:
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")


@pytest.mark.parametrize("kind", [Autocast, Records])
def test_modes_of_one_pass_hold_in_it_alone(kind: type) -> None:
    model, batches = toy(lambda: kind(Layer(), Layer())), toy_batches(3)
    before, between, outputs = modes(), [], []
    expected = plain_calls(model, batches)
    with torch.no_grad():
        results = [model(**batch) for batch in batches]
    hook = model.register_forward_hook(lambda module, args, y: outputs.append((y, modes())))
    order, calls = walked(model, batches, lambda block: between.append(modes()))
    hook.remove()
    for one, other in zip(of_batches(calls, 3), expected, strict=True):
        assert_same_calls(one, other)
        assert [y.requires_grad for call in one for y in call.outputs] == [kind is Records] * 2
    inside = (False, False, before[2])  # a walk records no gradients by itself
    assert between == [inside] * 2
    assert [found for _, found in outputs] == [inside] * 4  # of the survey, too
    assert all(torch.equal(y, result) for (y, _), result in zip(outputs[1:], results, strict=True))
    assert modes() == before


def test_casting_makes_a_difference_where_it_is_on() -> None:
    """A positive control of the test above."""
    x = toy_batches(1)[0]["x"]
    cast, plain = (toy(lambda kind=kind: kind(Layer(), Layer())) for kind in (Autocast, Toy))
    assert (cast(2 * x) - plain(x)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", [Autocast, Records])
@pytest.mark.parametrize("measure", [BlockWalk.measure, BlockWalk.measure_anchored])
def test_passes_that_are_given_up_leave_no_mode_behind(measure: Callable, kind: type) -> None:
    model, batches = toy(lambda: kind(Layer(), Layer(), Layer())), toy_batches(3)
    before = modes()
    with surveyed(model, batches) as walk:
        next(measure(walk, lambda block: [None] if measure is BlockWalk.measure_anchored else None))
        assert modes() == (False, False, before[2])
    assert modes() == before


class Infers(Toy):
    """Runs its blocks in a mode that cannot be left and entered again."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            for layer in self.layers:
                x = layer(x)
        return x


def test_inference_mode_around_blocks_is_refused_and_around_a_walk_is_not() -> None:
    model, batches = toy(lambda: Infers(Layer(), Layer())), toy_batches(2)
    with pytest.raises(CalibrationError, match=r"^layers.0 runs in an inference_mode of the model's own"):
        walked(model, batches)
    assert not torch.is_inference_mode_enabled()
    with torch.inference_mode():
        assert walked(toy(lambda: Toy(Layer(), Layer())), batches)[0] == ["layers.0", "layers.1"]


def test_moments_are_not_summed_in_half_precision() -> None:
    model, batches = toy(lambda: Autocast(Layer(), Layer())), toy_batches(2)
    inputs = [calls[0].copies[0].reshape(-1, 6).double() for calls in plain_calls(model, batches)]
    with surveyed(model, batches) as walk:
        measured = walk.measure(lambda block: GramRecorder(linears(model, f"{block}."), walk.rows))
        gram = next(measured).recorder.moments("layers.0.dense").gram
    torch.testing.assert_close(gram, sum(x.T @ x for x in inputs), rtol=1e-6, atol=1e-6)


def test_context_variables_that_are_set_around_a_walk_hold_inside_it() -> None:
    model, batches = toy(lambda: Toy(Reads(), Reads())), toy_batches(2)

    def run() -> None:
        setting.set(3.0)
        assert_walk_is_the_dense_forward(model, batches)

    copy_context().run(run)


def test_a_walk_within_another_greenlet() -> None:
    ended = []

    def run() -> None:
        assert_walk_is_the_dense_forward(FAMILIES["t5"].build(), FAMILIES["t5"].batches(2))
        ended.append(getcurrent())

    inner = greenlet(run)
    inner.switch()
    assert ended == [inner]


def test_a_walk_that_several_greenlets_take_forward() -> None:
    """Each block is asked for by another one, which waits; the walk is left by yet another."""
    model, batches = FAMILIES["t5"].build(), FAMILIES["t5"].batches(2)
    expected = plain_calls(model, batches)
    main, order, waiting = getcurrent(), [], []
    with surveyed(model, batches) as walk, watching(model, walk) as watch:
        blocks = walk.measure(nothing)

        def step() -> None:
            order.append(next(blocks).block)
            main.switch()

        for _ in range(3):
            waiting.append(greenlet(step))
            waiting[-1].switch()
    assert order == list(dict.fromkeys(call.block for call in expected[0]))[:3]
    for one, other in zip(watch.by_batch(2), expected, strict=True):
        assert_same_calls(one, other[:3])
    assert all(one for one in waiting)  # none was resumed when the walk gave its passes up


def test_a_walk_within_the_pass_of_another() -> None:
    """A block that walks over another model, and one that walks over the very model it is part of."""
    inner, inner_batches = FAMILIES["bert"].build(), FAMILIES["bert"].batches(2)
    model, batches = toy(lambda: Toy(Layer(), Layer())), toy_batches(2)
    expected = plain_calls(model, batches)
    found = []
    model.layers[0].dense.register_forward_hook(lambda *_: found.append(walked(inner, inner_batches)))
    _, calls = walked(model, batches)
    for one, other in zip(of_batches(calls, 2), expected, strict=True):
        assert_same_calls(one, other)
    assert len(found) == 3
    for _, calls in found:
        for one, other in zip(of_batches(calls, 2), plain_calls(inner, inner_batches), strict=True):
            assert_same_calls(one, other)


def test_two_walks_over_one_model_in_turns() -> None:
    model, batches = FAMILIES["llama"].build(), FAMILIES["llama"].batches(4)
    expected = plain_calls(model, batches)
    with (
        surveyed(model, batches[:2]) as one,
        surveyed(model, batches[2:]) as other,
        Watch(model, one.modules, lambda: one.running.number if one.running else 2 + other.running.number) as watch,
    ):
        for a, b in zip(one.measure(nothing), other.measure(nothing), strict=True):
            assert a.block == b.block
    for calls, plain in zip(watch.by_batch(4), expected, strict=True):
        assert_same_calls(calls, plain)


# What is kept elsewhere


def copies(module: nn.Module, args: tuple, outputs: object) -> object:
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, outputs)


@each_family
def test_outputs_may_be_kept_elsewhere(family: Family) -> None:
    assert_walk_is_the_dense_forward(family.build(), family.batches(2), keep=copies)


@pytest.mark.parametrize("name", ["llama", "t5", "clip"])
def test_what_is_kept(name: str) -> None:
    """Of modules outside the blocks, and of the blocks themselves; nothing inside."""
    model, batches = FAMILIES[name].build(), FAMILIES[name].batches(2)
    names = {module: name for name, module in model.named_modules()}
    ran: dict[str, int] = {}
    watching = [m.register_forward_hook(lambda m, *_: ran.update({names[m]: ran.get(names[m], 0) + 1})) for m in names]
    kept: dict[str, int] = {}
    walked(model, batches, keep=lambda m, args, outputs: kept.update({names[m]: kept.get(names[m], 0) + 1}))
    [hook.remove() for hook in watching]
    inside = [name for name in names.values() for block in find_blocks(model) if name.startswith(f"{block}.")]
    assert len(inside) > len(kept) > len(find_blocks(model))
    assert kept == {name: times for name, times in ran.items() if name not in inside}


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
    """Found before a block is handed out, be it in the survey or later."""
    name, batch, message = WRONG[case]
    model = FAMILIES[name].build().train()
    before, handed_out = caching(model), []
    with pytest.raises(CalibrationError, match=message):
        walked(model, [*FAMILIES[name].batches(1), batch, *FAMILIES[name].batches(1)], handed_out.append)
    assert handed_out == []
    assert (hooks(model), caching(model)) == (0, before)
    assert all(module.training for module in model.modules())


def test_a_batch_that_a_block_does_not_take() -> None:
    model = toy(lambda: Toy(Layer(), Layer()))
    batches = toy_batches(2)
    batches[1]["x"] = batches[1]["x"][..., :5]
    with pytest.raises(
        CalibrationError, match=r"^Toy does not accept calibration batch 1 with the inputs x \(4, 5, 5\): "
    ):
        walked(model, batches)
    assert hooks(model) == 0


def test_running_out_of_memory_is_not_the_fault_of_a_batch() -> None:
    model = toy(lambda: Toy(Layer()))

    def fail(*_) -> None:
        raise torch.OutOfMemoryError("no memory")

    model.layers[0].dense.register_forward_hook(fail)
    with pytest.raises(torch.OutOfMemoryError, match="^no memory$"):
        walked(model, toy_batches(1))


@pytest.mark.parametrize("number", [0, 1])
def test_a_cache_in_a_batch_is_refused(number: int) -> None:
    model, batches = FAMILIES["llama"].build(), FAMILIES["llama"].batches(2)
    batches[number] |= {"past_key_values": DynamicCache()}
    with pytest.raises(
        CalibrationError, match=r"^model.layers.0 was called with a key-value cache; switch use_cache off"
    ):
        walked(model, batches)
    assert hooks(model) == 0


OTHER_WAY = r"^a batch of the calibration set runs layers.1 after the first batch with the same inputs would have been"


def test_a_batch_that_comes_back_to_a_block_that_was_handed_out() -> None:
    model = toy(lambda: OutOfStep(Layer(), Layer(), Layer()))
    found: list[str] = []
    with pytest.raises(CalibrationError, match=OTHER_WAY):
        walked(model, toy_batches(3, -1, -1, 1), found.append)
    assert found == ["layers.0", "layers.1", "layers.2"]
    assert hooks(model) == 0


def test_batches_that_come_back_where_the_first_one_does() -> None:
    """Those that do not are waited for no longer than they run."""
    model, batches = toy(lambda: OutOfStep(Layer(), Layer(), Layer())), toy_batches(3, 1, -1, 1)
    expected = plain_calls(model, batches)
    order, calls = walked(model, batches)
    assert order == ["layers.0", "layers.2", "layers.1"]
    with surveyed(model, batches) as walk:
        assert walk.blocks == order
    for one, other in zip(of_batches(calls, 3), expected, strict=True):
        assert_same_calls(one, other)


class TwoWays(Toy):
    """Batches with a positive sum come back to the first block, where others go on to the last."""

    def forward(self, x: Tensor) -> Tensor:
        places = (0, 1, 0) if x.sum() > 0 else (0, 1, 2)
        for place in places:
            x = self.layers[place](x)
        return x


@pytest.mark.parametrize("signs", [(1, -1, 1), (-1, 1, -1)], ids=str)
def test_ways_of_which_the_survey_has_seen_two(signs: tuple[int, ...]) -> None:
    """A block is waited for as long as a batch of its kind took to come to it."""
    model, batches = toy(lambda: TwoWays(Layer(), Layer(), Layer())), toy_batches(3, *signs)
    expected = plain_calls(model, batches)
    order = []
    with BlockWalk(model, find_blocks(model), batches) as walk:
        walk.survey(linears(model) | {"never reached": nn.Linear(1, 1)})
        with watching(model, walk) as watch:
            for step in walk.measure(nothing):
                order.append(step.block)
                wipe(model, step.block)
    assert sorted(order) == sorted(find_blocks(model))
    for one, other in zip(watch.by_batch(3), expected, strict=True):
        assert_same_calls(one, other)


@pytest.mark.parametrize("signs", [(1, -1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1)], ids=str)
def test_batches_that_pass_a_block_by(signs: tuple[int, ...]) -> None:
    """Every block is handed out all the same, with all that ran through it, and all of that of the dense model."""
    model, batches = toy(lambda: PassesBy(Layer(), Layer(), Layer())), toy_batches(3, *signs)
    expected = plain_calls(model, batches)
    inputs = [
        call.inputs[0].reshape(-1, 6).double() for calls in expected for call in calls if call.block == "layers.1"
    ]
    with surveyed(model, batches) as walk, watching(model, walk) as watch:
        found = {}
        for step in walk.measure(lambda block: GramRecorder(linears(model, f"{block}."), walk.rows)):
            found[step.block] = step.recorder.moments(f"{step.block}.dense").gram
            wipe(model, step.block)
    assert sorted(found) == ["layers.0", "layers.1", "layers.2"]
    for one, other in zip(watch.by_batch(3), expected, strict=True):
        assert_same_calls(one, other)
    x = torch.cat(inputs)
    torch.testing.assert_close(found["layers.1"], x.T @ x, rtol=1e-5, atol=1e-5)
