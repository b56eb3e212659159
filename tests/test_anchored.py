"""Anchored calibration: fitted to what the compressed blocks before really produce, aiming at the dense outputs."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import pytest
import reference
import torch
from cases import gaussian
from models import FAMILIES, Batch, Family, generator
from torch import Tensor, nn
from toys import TOYS, Layer, PassesBy, Toy, toy, toy_batches
from transformers import PreTrainedModel
from watch import Inputs, Watch, plain_forward

from optimum_pgsvd import CalibrationError, ConfigError, PGSVDCompressor, PGSVDConfig
from optimum_pgsvd.calibration import AnchoredRecorder, BlockWalk, GramRecorder
from optimum_pgsvd.factoring import Clock, InPlace, Job, factor, measuring
from optimum_pgsvd.factoring.measuring import stages
from optimum_pgsvd.linalg import anchored_weight, output_projection
from optimum_pgsvd.linalg.anchor import RIDGE
from optimum_pgsvd.modeling_pgsvd import low_rank_layers, set_submodule
from optimum_pgsvd.planning import given_ranks
from optimum_pgsvd.targets import LINEAR_TYPES, find_blocks, find_targets


def streams(tokens: int = 200, features: int = 12):
    """A weight, dense inputs, and the inputs with an error that depends on them."""
    weight, dense = gaussian(9, features, seed=0), gaussian(tokens, features, seed=1)
    return weight, dense, dense @ (torch.eye(features) + 0.2 * gaussian(features, features, seed=2)).double()


def grams(dense, compressed, blend):
    anchor = blend * dense + (1 - blend) * compressed
    return compressed.T @ compressed, anchor.T @ compressed


# The algebra


@pytest.mark.parametrize("blend", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("tokens", [200, 7])
def test_anchored_weight_is_the_regularised_least_squares_solution(blend, tokens):
    weight, dense, compressed = streams(tokens)
    gram, cross = grams(dense, compressed, blend)
    expected = reference.anchored_weight(weight, dense, compressed, blend, RIDGE * float(gram.diagonal().mean()))
    torch.testing.assert_close(anchored_weight(weight, gram, cross), expected, rtol=1e-6, atol=1e-8)


def test_equal_inputs_leave_the_weight_as_it_is():
    weight, dense, _ = streams()
    gram = dense.T @ dense
    torch.testing.assert_close(anchored_weight(weight, gram, gram), weight, rtol=0, atol=1e-12)
    nothing = torch.zeros_like(gram)
    torch.testing.assert_close(anchored_weight(weight, nothing, nothing), weight, rtol=0, atol=0)


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_projecting_it_is_reduced_rank_regression(rank):
    weight, dense, compressed = streams()
    gram, cross = grams(dense, compressed, 1.0)
    left, right = output_projection(anchored_weight(weight, gram, cross), gram, rank)
    error = float((dense @ weight.T - compressed @ (left @ right).T).square().sum())
    least = reference.reduced_rank_regression_error(compressed, dense @ weight.T, rank)
    # The pull towards W costs RIDGE of what A differs from it, at most.
    assert least * (1 - 1e-9) <= error <= least * (1 + 10 * RIDGE)
    plain = output_projection(weight, dense.T @ dense, rank)
    assert error < 0.95 * float((dense @ weight.T - compressed @ (plain[0] @ plain[1]).T).square().sum())


# The two streams

# ALBERT's one block runs several times, and is refused.
OTHERS = [family for family in FAMILIES.values() if family.name != "albert"]
each_other_family = pytest.mark.parametrize("family", OTHERS, ids=[family.name for family in OTHERS])


def linears(model: nn.Module, block: str = "") -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LINEAR_TYPES) and name.startswith(block)}


@contextmanager
def surveyed(model: nn.Module, batches: list[Batch], **options) -> Iterator[BlockWalk]:
    with BlockWalk(model, find_blocks(model), batches, **options) as walk:
        walk.survey({})
        yield walk


def recorders_of(walk: BlockWalk, blend: float = 0.5) -> Callable[[str], list[AnchoredRecorder]]:
    """All layers of a block in one stage."""
    return lambda block: [AnchoredRecorder(linears(walk.model, f"{block}."), walk.rows, None, blend)]


def nothings(block: str) -> list[None]:
    """Nothing is recorded."""
    return [None]


def assert_streams_are_one(model: nn.Module, batches: list[Batch]) -> None:
    """With nothing replaced, every layer sees twice what it sees in parallel calibration, and aims at its own."""
    with surveyed(model, batches) as walk:
        steps = walk.measure(lambda block: GramRecorder(linears(model, f"{block}."), walk.rows))
        plain = {step.block: step.recorder for step in steps}
    with surveyed(model, batches) as walk:
        found = {step.block: step.recorder for step in walk.measure_anchored(recorders_of(walk))}
    assert list(found) == list(plain)
    for block, recorder in found.items():
        assert recorder.tokens == plain[block].tokens
        for name in recorder.layers:
            gram = recorder.moments(name).gram
            assert torch.equal(gram, plain[block].moments(name).gram)
            weight = torch.eye(len(gram), dtype=torch.float64)
            torch.testing.assert_close(recorder.goal(name, weight), weight, rtol=0, atol=1e-9)


@each_other_family
def test_with_nothing_replaced_the_streams_are_one(family: Family):
    assert_streams_are_one(family.build(), family.batches(2))


STRAIGHT = [name for name in TOYS if name != "every block twice"]


@pytest.mark.parametrize("name", STRAIGHT)
def test_with_nothing_replaced_the_streams_of_odd_models_are_one(name: str):
    """Blocks may change their inputs in place: the second pass is not given what the first one left."""
    assert_streams_are_one(toy(TOYS[name]), toy_batches(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_with_nothing_replaced_the_streams_are_one_in_half_precision(dtype: torch.dtype):
    """However the sums are rounded: what is divided by RIDGE is a difference of inputs, not of sums."""
    assert_streams_are_one(FAMILIES["llama"].build().to(dtype), FAMILIES["llama"].batches(4))


@torch.no_grad()
def disturb(model: nn.Module, block: str) -> None:
    """In the place of compression."""
    source = generator(len(block))
    for parameter in model.get_submodule(block).parameters():
        parameter += 0.05 * torch.randn(parameter.shape, generator=source, dtype=parameter.dtype)


def in_float64(model: nn.Module, batches: list[Batch]) -> tuple[nn.Module, list[Batch]]:
    """So that all sums are exact enough to be divided by RIDGE."""
    floating = [{k: v.double() if v.is_floating_point() else v for k, v in batch.items()} for batch in batches]
    if isinstance(model, PreTrainedModel) and "experts" in str(list(model.state_dict())):
        model.set_experts_implementation("eager")  # others have no float64
    return model.double(), floating


def inputs_of(model: nn.Module, layers: Iterable[str], batches: list[Batch]) -> dict[str, Tensor]:
    """Of a plain forward pass over all batches, in the order of the calls."""
    with Inputs(model, layers) as inputs:
        for batch in batches:
            plain_forward(model, batch)
    return {name: torch.cat(inputs.rows[name]) for name in inputs.order}


def assert_compressed_inputs_are_seen(model: nn.Module, batches: list[Batch], blend: float) -> dict[str, float]:
    """Each block is measured on what the model gives it whose earlier blocks were changed.

    Returns:
        How far that is from what the dense model gives it, by layer.
    """
    expected = copy.deepcopy(model)
    dense = inputs_of(model, linears(model), batches)
    distances = {}
    with surveyed(model, batches) as walk:
        for step in walk.measure_anchored(recorders_of(walk, blend)):
            block, recorder = step.block, step.recorder
            compressed = inputs_of(expected, recorder.layers, batches)
            for name, x in compressed.items():
                torch.testing.assert_close(recorder.moments(name).gram, x.T @ x, rtol=1e-10, atol=1e-10)
                weight = gaussian(3, x.shape[1], seed=0)
                ridge = RIDGE * float(x.square().sum() / x.shape[1])
                goal = reference.anchored_weight(weight, dense[name], x, blend, ridge)
                torch.testing.assert_close(recorder.goal(name, weight), goal, rtol=1e-6, atol=1e-6)
                distances[name] = float((x - dense[name]).norm() / x.norm())
            disturb(model, block)
            disturb(expected, block)
    first, last = (
        [distance for name, distance in distances.items() if name.startswith(f"{walk.blocks[place]}.")]
        for place in (0, -1)
    )
    assert max(first) == 0 < min(last)
    return distances


@each_other_family
def test_blocks_see_what_the_changed_ones_before_them_put_out(family: Family):
    assert_compressed_inputs_are_seen(*in_float64(family.build(), family.batches(2)), 0.5)


@pytest.mark.parametrize("blend", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["t5", "bart", "whisper", "llama"])
def test_what_lies_between_the_blocks_sees_it_too(name: str, blend: float):
    """A decoder reads what the compressed encoder and its norm make of the inputs."""
    model, batches = in_float64(FAMILIES[name].build(), FAMILIES[name].batches(2))
    distances = assert_compressed_inputs_are_seen(model, batches, blend)
    if name != "llama":
        cross = [k for k in distances if "decoder" in k and ("EncDec" in k or "encoder_attn" in k)]
        read = [k for k in cross if k.split(".")[-1] in ("k", "v", "k_proj", "v_proj")]
        assert len(read) == 4
        assert min(distances[name] for name in read) > 0.01


@pytest.mark.parametrize("name", [name for name in STRAIGHT if name != "blocks side by side"])
def test_odd_models_see_it_too(name: str):
    model, batches = in_float64(toy(TOYS[name]), toy_batches(2))
    assert_compressed_inputs_are_seen(model, batches, 0.5)


class Autocast(Toy):
    """Casts products to half precision for as long as it runs its blocks."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            for layer in self.layers:
                x = layer(x)
        return x


def test_blocks_that_run_under_autocast():
    """Both streams do, and without it other inputs would be seen."""
    model, batches = toy(lambda: Autocast(Layer(), Layer(), Layer())), toy_batches(2)
    assert_streams_are_one(model, batches)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["images first", "texts first"])
def test_images_and_texts(order: tuple[int, int]):
    kinds = FAMILIES["llava"].batches(2), FAMILIES["llama"].batches(2, seed=1)
    batches = [batch for place in order for batch in kinds[place]]
    assert_compressed_inputs_are_seen(*in_float64(FAMILIES["llava"].build(), batches), 0.5)


@pytest.mark.parametrize("blend", [0.0, 0.5, 1.0])
def test_the_blend(blend: float):
    """0 aims at the layer's own outputs on what it is fed, 1 at those of the dense model."""
    model, batches = in_float64(FAMILIES["llama"].build(), FAMILIES["llama"].batches(4))
    name = "model.layers.1.self_attn.q_proj"
    dense, weight = inputs_of(model, [name], batches)[name], model.get_submodule(name).weight.detach().clone()
    with surveyed(model, batches) as walk:
        steps = walk.measure_anchored(recorders_of(walk, blend))
        disturb(model, next(steps).block)
        goal = next(steps).recorder.goal(name, weight)
    expected = inputs_of(model, [name], batches)[name]
    own, aimed = expected @ weight.T, dense @ weight.T
    assert not torch.equal(own, aimed)
    if blend == 0:
        torch.testing.assert_close(goal, weight, rtol=0, atol=1e-9)
    if blend == 1:
        best = torch.linalg.lstsq(expected, aimed, driver="gelsd").solution
        least = float((expected @ best - aimed).square().sum())
        assert float((expected @ goal.T - aimed).square().sum()) < 1.02 * least < float((own - aimed).square().sum())


# Stage by stage


def stages_of(walk: BlockWalk, leaders: dict[str, str], blend: float) -> Callable[[str], list[AnchoredRecorder]]:
    return lambda block: [
        AnchoredRecorder(part, walk.rows, leaders, blend) for part in stages(linears(walk.model, f"{block}."), leaders)
    ]


@torch.no_grad()
def replace_by_disturbed(model: nn.Module, names: Iterable[str]) -> None:
    """In the place of factoring."""
    for name in names:
        layer = copy.deepcopy(model.get_submodule(name))
        source = generator(len(name))
        for parameter in layer.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=source, dtype=parameter.dtype)
        set_submodule(model, name, layer)


@pytest.mark.parametrize("blend", [0.5, 1.0])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "phi3", "opt", "gemma3"])
def test_each_stage_sees_what_the_replaced_ones_before_it_put_out(name: str, blend: float):
    """Dense inputs of the dense model, compressed ones of a copy in which the earlier stages are replaced."""
    model, batches = in_float64(FAMILIES[name].build(), FAMILIES[name].batches(2))
    expected, dense = copy.deepcopy(model), inputs_of(model, linears(model), batches)
    order, distances = [], {}
    with BlockWalk(model, find_blocks(model), batches) as walk:
        leaders = walk.survey(linears(model)).leaders
        for step in walk.measure_anchored(stages_of(walk, leaders, blend)):
            recorder = step.recorder
            order.append((step.block, step.last))
            compressed = inputs_of(expected, recorder.layers, batches)
            for layer, x in compressed.items():
                torch.testing.assert_close(recorder.moments(layer).gram, x.T @ x, rtol=1e-10, atol=1e-10)
                weight = gaussian(3, x.shape[1], seed=0)
                ridge = RIDGE * float(x.square().sum() / x.shape[1])
                goal = reference.anchored_weight(weight, dense[layer], x, blend, ridge)
                torch.testing.assert_close(recorder.goal(layer, weight), goal, rtol=1e-6, atol=1e-6)
                distances[layer] = float((x - dense[layer]).norm() / x.norm())
            names = list(recorder.layers)
            replace_by_disturbed(model, names)
            replace_by_disturbed(expected, names)
    inside = {name for block in find_blocks(model) for name in linears(model, f"{block}.")}
    assert distances.keys() == inside
    # The first stage alone sees the dense model.
    exact = [layer for layer, distance in distances.items() if distance == 0]
    assert {leaders[layer] for layer in exact if layer.startswith(order[0][0])} == {next(iter(distances))}
    for block in find_blocks(model):
        assert [last for each, last in order if each == block] == [False] * (len(order_of(order, block)) - 1) + [True]
        assert len(order_of(order, block)) >= 4
    state, wanted = model.state_dict(), expected.state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in state.items())


def order_of(order: list[tuple[str, bool]], block: str) -> list[tuple[str, bool]]:
    return [each for each in order if each[0] == block]


class Chain(nn.Module):
    """Two layers in a row, with more between them than a rank of 3 can carry; no residual connection hides it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 24, bias=False), nn.Linear(24, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).exp())


def test_stages_within_a_block_beat_the_block_as_one(monkeypatch):
    """The control: the second layer makes up for part of what the first one lost."""
    batches, errors = toy_batches(40), {}
    dense = toy(lambda: Toy(Chain()))
    expected = torch.cat([dense(**batch) for batch in batches])
    for name in ("stages", "one"):
        if name == "one":
            monkeypatch.setattr(measuring, "stages", lambda layers, leaders: [layers])
        model = toy(lambda: Toy(Chain()))
        config = PGSVDConfig(ranks={"first": 3, "second": 6}, dataset=batches, calibration="anchored", blend=1.0)
        targets = find_targets(model, config)
        plan = given_ranks(targets.shapes, config.ranks)
        factor(Job(model, targets, plan, batches, config, Clock(), InPlace()))
        errors[name] = reference.norm(torch.cat([model(**batch) for batch in batches]).detach() - expected.detach())
    assert errors["stages"] < 0.8 * errors["one"]


class LinearsOutside(Toy):
    """Before, between and after the blocks."""

    def __init__(self, *blocks: nn.Module):
        super().__init__(*blocks)
        self.stem, self.bridge, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = self.bridge(layer(x))
        return self.head(x)


def test_linears_before_between_and_after_the_blocks_see_the_dense_model():
    """Once a batch, though two passes of each run through them."""
    model, batches = in_float64(toy(lambda: LinearsOutside(Layer(), Layer())), toy_batches(2))
    layers = {name: model.get_submodule(name) for name in ("stem", "bridge", "head")}
    dense = inputs_of(model, layers, batches)
    with surveyed(model, batches, whole=True) as walk:
        outside = GramRecorder(layers, walk.rows)
        for step in walk.measure_anchored(recorders_of(walk), outside):
            disturb(model, step.block)
    assert outside.tokens == {"stem": 40, "bridge": 80, "head": 40}
    for name, x in dense.items():
        torch.testing.assert_close(outside.moments(name).gram, x.T @ x, rtol=1e-10, atol=1e-10)


def test_layers_outside_the_blocks_see_the_dense_model():
    model, batches = in_float64(FAMILIES["llama"].build(), FAMILIES["llama"].batches(2))
    dense = inputs_of(model, ["lm_head"], batches)["lm_head"]
    with surveyed(model, batches, whole=True) as walk:
        outside = GramRecorder({"lm_head": model.lm_head}, walk.rows)
        for step in walk.measure_anchored(nothings, outside):
            disturb(model, step.block)
    torch.testing.assert_close(outside.moments("lm_head").gram, dense.T @ dense, rtol=1e-10, atol=1e-10)
    assert outside.tokens == {"lm_head": len(dense)}


@pytest.mark.parametrize(("recorded", "times"), [(True, 3), (False, 2)])
def test_how_often_a_block_runs(recorded: bool, times: int):
    """On the dense model's inputs, on the compressed blocks', and once more when it is compressed itself."""
    model, batches = FAMILIES["t5"].build(), FAMILIES["t5"].batches(3)
    with surveyed(model, batches) as walk, Watch(model, walk.modules) as watch:
        list(walk.measure_anchored(recorders_of(walk) if recorded else nothings))
    assert Counter(call.block for call in watch.calls) == dict.fromkeys(find_blocks(model), times * 3)


# What goes wrong


def test_rows_that_cannot_be_paired_are_refused():
    layer = nn.Linear(4, 4)
    recorder = AnchoredRecorder({"experts.0": layer}, lambda x, values: values.reshape(-1, 4), None, 0.5)
    with recorder:
        layer(torch.ones(3, 4))
        recorder.pairing = "compressed"
        with pytest.raises(CalibrationError, match=r"experts\.0 sees 3 rows in the dense model and 2 after"):
            layer(torch.ones(2, 4))
    with recorder, pytest.raises(CalibrationError, match=r"experts\.0 sees 0 rows in the dense model and 2 after"):
        layer(torch.ones(2, 4))


@pytest.mark.parametrize("pairing", ["dense", "compressed"])
def test_layers_that_no_longer_share_their_input_are_refused(pairing: str):
    first, second, x = nn.Linear(4, 4), nn.Linear(4, 4), torch.ones(3, 4)
    layers, leaders = {"first": first, "second": second}, {"first": "first", "second": "first"}
    recorder = AnchoredRecorder(layers, lambda x, values: values, leaders, 0.5)
    with recorder:
        recorder.pairing = pairing
        recorder._dense["first"].append(x)
        first(x)
        with pytest.raises(CalibrationError, match="^second and first were fed the same tensor at first, and diff"):
            second(x.clone())


REPEATED = "layers.0 runs more than once in a forward pass, and anchored calibration fits a block where it runs; use "


def test_blocks_that_run_twice_are_refused():
    model = toy(TOYS["every block twice"])
    with surveyed(model, toy_batches(2)) as walk, pytest.raises(CalibrationError, match=f"^{REPEATED}"):
        next(walk.measure_anchored(recorders_of(walk)))


def test_albert_is_refused_and_left_as_it_was():
    family = FAMILIES["albert"]
    model, batches = family.build(), family.batches(2)
    before, modules = {k: v.clone() for k, v in model.state_dict().items()}, list(model.modules())
    config = PGSVDConfig(parameter_reduction=0.4, dataset=batches, calibration="anchored")
    with pytest.raises(CalibrationError, match=r"runs more than once .*; use calibration='parallel'$"):
        PGSVDCompressor(config).compress(model)
    assert list(model.modules()) == modules
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("signs", [(1, -1, 1), (1, -1, -1)], ids=str)
def test_batches_of_one_kind_that_take_two_ways_are_refused(signs: tuple[int, ...]):
    model = toy(lambda: PassesBy(Layer(), Layer(), Layer()))
    message = r"^batch 0 reaches layers.2 in the dense model but not after compression, or batches with the same"
    with surveyed(model, toy_batches(3, *signs)) as walk, pytest.raises(CalibrationError, match=message):
        list(walk.measure_anchored(recorders_of(walk)))


class Routes(Toy):
    """Its second block runs where its first one puts out little."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        if float(x.abs().max()) < 100:
            x = self.layers[1](x)
        return self.layers[2](x)


@pytest.mark.parametrize(("bias", "where"), [(0.0, "layers.1"), (1e3, "layers.2")], ids=["left out", "added"])
def test_another_way_after_compression_is_refused(bias: float, where: str):
    """A block that the compressed model leaves out, or that the dense one does."""
    model = toy(lambda: Routes(Amplifies(bias), Layer(), Layer()))
    message = f"^batch 0 reaches {where} in the dense model but not after compression"

    def change(walk: BlockWalk) -> None:
        for step in walk.measure_anchored(recorders_of(walk)):
            if step.block == "layers.0":
                model.layers[0].offset = 1e3 - bias

    with surveyed(model, toy_batches(2)) as walk, pytest.raises(CalibrationError, match=message):
        change(walk)


class Amplifies(Layer):
    def __init__(self, offset: float):
        super().__init__()
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.offset


# End to end


@each_other_family
def test_the_first_stage_is_fitted_as_in_parallel_and_later_ones_are_not(family: Family):
    """Nothing was compressed before the first stage of the first block: its two inputs are one."""
    models = {}
    for calibration in ("parallel", "anchored"):
        batches = family.batches(6)
        models[calibration] = family.build()
        config = PGSVDConfig(parameter_reduction=0.4, dataset=batches, num_samples=24, calibration=calibration)
        report = PGSVDCompressor(config).compress(models[calibration])
        assert report.parameter_reduction >= 0.4
        assert all(0 <= layer.activation_error < 1 for layer in report.layers)
    differences = {}
    for name, layer in low_rank_layers(models["parallel"]).items():
        other, product = models["anchored"].get_submodule(name).product(), layer.product()
        differences[name] = ((other - product).norm() / product.norm()).item()
    block = find_targets(family.build(), PGSVDConfig(parameter_reduction=0.4)).blocks[0]
    inputs = inputs_of(family.build(), linears(family.build(), f"{block}."), family.batches(1))
    untouched = next(iter(inputs.values()))  # what its first layer is fed, before any layer had a say
    first = {name for name, x in inputs.items() if x.shape == untouched.shape and torch.equal(x, untouched)}
    # Some are fitted to the float32 outputs of the layer in one and to its inputs in the other.
    assert max(differences[name] for name in first if name in differences) < 1e-3
    same_block = [d for name, d in differences.items() if name.startswith(f"{block}.") and name not in first]
    later = [difference for name, difference in differences.items() if not name.startswith(f"{block}.")]
    assert max(same_block) > 3e-2
    assert max(later) > 3e-2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"calibration": "sequential"}, "calibration='sequential' is not known; known are parallel, anchored"),
        ({"calibration": "anchored", "solver": "svd"}, "no meaning with solver='svd'"),
        ({"blend": 1.5}, r"blend=1.5 is outside \[0, 1\]"),
        ({"blend": None}, r"blend=None is outside \[0, 1\]"),
    ],
)
def test_what_has_no_meaning_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        PGSVDConfig(parameter_reduction=0.2, **fields)
