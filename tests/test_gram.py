"""Second moments of layers: of real tokens only, the same however they are cut, and fit to be decomposed."""

from __future__ import annotations

import itertools
import logging
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
from cases import gaussian
from models import FAMILIES, ODD, SEQUENCES, Batch, Family, each_family, generator, images, token_ids
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from watch import Inputs, plain_forward

from optimum_pgsvd import PGSVDCompressor, PGSVDConfig
from optimum_pgsvd.calibration import GramRecorder, InputSurvey, measured_by_outputs
from optimum_pgsvd.calibration.data import complete
from optimum_pgsvd.calibration.padding import PaddingMask
from optimum_pgsvd.errors import CalibrationError, NonFiniteError
from optimum_pgsvd.factoring import Clock, InPlace, Job, measured
from optimum_pgsvd.modeling_pgsvd import LowRankLinear
from optimum_pgsvd.planning import dense_weight, given_ranks
from optimum_pgsvd.structures import Moments
from optimum_pgsvd.targets import find_targets


# Every linear of a model, inside the blocks and outside. The one solver asks for the inputs' moments, the other is
# content with the outputs' where these are smaller.
GRAMS = PGSVDConfig(tolerance=0.5, groups={"*": {"tolerance": 0.5}}, solver="als")
SMALLEST = PGSVDConfig(tolerance=0.5, groups={"*": {"tolerance": 0.5}}, solver="eigh")
each_solver = pytest.mark.parametrize("config", [GRAMS, SMALLEST], ids=lambda config: config.solver)


def recorders_of(
    model: PreTrainedModel, batches: list[Batch], config: PGSVDConfig
) -> Iterator[tuple[list[str], GramRecorder]]:
    """As `factor` gets them, with the layers that each has recorded."""
    targets = find_targets(model, config)
    plan = given_ranks(targets.shapes, dict.fromkeys(targets.names, 1))
    job = Job(model, targets, plan, batches, config, Clock(), InPlace())
    for step in measured(job):
        yield (
            [target.name for target in job.in_block(step.block) if target.name in step.recorder.tokens],
            step.recorder,
        )


def moments_of(model: PreTrainedModel, batches: list[Batch], config: PGSVDConfig = SMALLEST) -> dict[str, Moments]:
    return {name: recorder.moments(name) for names, recorder in recorders_of(model, batches, config) for name in names}


def grams_of(model: PreTrainedModel, batches: list[Batch], config: PGSVDConfig = GRAMS) -> dict[str, Tensor]:
    """The matrices, be they of inputs or of outputs."""
    moments = moments_of(model, batches, config)
    assert config is SMALLEST or all(value.outputs is None for value in moments.values())
    return {name: value.outputs if value.gram is None else value.gram for name, value in moments.items()}


def all_rows(x: Tensor, values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1])


def record(pieces: list[Tensor]) -> Tensor:
    """The Gram matrix of a layer that is fed these pieces one after the other."""
    layer = nn.Linear(pieces[0].shape[-1], 2, dtype=pieces[0].dtype)
    with GramRecorder({"layer": layer}, all_rows) as recorder:
        for piece in pieces:
            layer(piece)
    moments = recorder.moments("layer")
    assert moments.outputs is None
    assert torch.equal(moments.energies, moments.gram.diagonal())
    return moments.gram


# Sums


@pytest.mark.parametrize("family", [*FAMILIES.values(), *ODD.values()], ids=[*FAMILIES, *ODD])
def test_grams_are_those_of_one_plain_forward(family: Family) -> None:
    """The recorder sums float32 products in float32 within a batch, at most T·2u·|X|ᵀ|X| away from the exact sum."""
    model, batches = family.build(), family.batches(2)
    grams = grams_of(model, batches)
    with Inputs(model, grams) as inputs:
        for batch in batches:
            plain_forward(model, batch)
    assert set(grams) == set(find_targets(model, GRAMS).names)
    for name, gram in grams.items():
        x = torch.cat(inputs.rows[name])
        bound = x.shape[0] * torch.finfo(torch.float32).eps * (x.abs().T @ x.abs())
        assert ((gram - x.T @ x).abs() <= bound).all(), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [1, 7, 64, 200])
def test_any_chunking_is_the_whole(chunk: int, dtype: torch.dtype) -> None:
    """Whole numbers up to 16, so that every sum is exact in float32, though not in bfloat16 or float16."""
    x = torch.randint(-16, 17, (200, 6), generator=generator(0))
    assert torch.equal(record(list(x.to(dtype).split(chunk))).double(), (x.T @ x).double())


def test_batches_are_summed_in_float64() -> None:
    """4095² is exact in float32, three times that is not."""
    x = torch.full((1, 1), 4095.0)
    assert record([x, x, x]).item() == 3 * 4095**2


def test_the_shape_of_an_input_does_not_matter() -> None:
    x = torch.randn(24, 5, generator=generator(0), dtype=torch.float64)
    expected = record([x])
    for shape in ((4, 6, 5), (2, 3, 4, 5), (24, 1, 5)):
        assert torch.equal(record([x.reshape(shape)]), expected)


def test_no_gradient_is_kept() -> None:
    x = torch.randn(4, 5, requires_grad=True)
    with torch.no_grad():
        assert not record([x]).requires_grad


# One matrix for layers that share their input


LEADERS = {
    **{"q_proj": "q_proj", "k_proj": "q_proj", "v_proj": "q_proj", "o_proj": "o_proj"},
    **{"gate_proj": "gate_proj", "up_proj": "gate_proj", "down_proj": "down_proj"},
}


def test_layers_fed_one_tensor_share_one_matrix() -> None:
    model, batches = FAMILIES["llama"].build(), FAMILIES["llama"].batches(2)
    blocks = [(names, recorder) for names, recorder in recorders_of(model, batches, GRAMS) if len(names) > 1]
    assert len(blocks) == 2
    for names, recorder in blocks:
        last = {name.split(".")[-1]: leader.split(".")[-1] for name, leader in recorder.leaders.items()}
        assert last == LEADERS
        assert len({recorder.moments(name).gram.data_ptr() for name in names}) == 4


def plain_leaders(model: PreTrainedModel, batch: Batch) -> dict[str, str]:
    """For each linear the first, in the order of the calls, that is fed the very same tensors in the same state."""
    fed: dict[str, list[tuple]] = {}
    alive = []

    def hook(name: str):
        def before(module: nn.Module, args: tuple) -> None:
            alive.append(args[0])  # so that no other tensor gets its identity
            fed.setdefault(name, []).append((id(args[0]), args[0]._version))

        return before

    hooks = [model.get_submodule(t).register_forward_pre_hook(hook(t)) for t in find_targets(model, GRAMS).names]
    plain_forward(model, batch)
    [handle.remove() for handle in hooks]
    return {name: next(other for other in fed if fed[other] == inputs) for name, inputs in fed.items()}


@each_family
def test_leaders_are_the_first_that_are_called(family: Family) -> None:
    model, batches = family.build(), family.batches(2)
    expected = plain_leaders(model, batches[0])
    for names, recorder in recorders_of(model, batches, GRAMS):
        for name in names:
            assert recorder.leaders[name] == next(n for n in expected if n in names and expected[n] == expected[name])


CALLED_FIRST = {"opt": ("k_proj", "q_proj"), "bart": ("k_proj", "q_proj"), "llama": ("q_proj", "q_proj")}


@pytest.mark.parametrize("name", CALLED_FIRST)
def test_the_order_of_calls_is_not_always_that_of_the_modules(name: str) -> None:
    defined, called = CALLED_FIRST[name]
    model, batches = FAMILIES[name].build(), FAMILIES[name].batches(1)
    names, recorder = next(recorders_of(model, batches, GRAMS))
    shared = [name for name in names if recorder.leaders[name].split(".")[-1] == called]
    assert [name.split(".")[-1] for name in shared][0] == defined
    assert len(shared) == 3


@each_solver
def test_a_leader_that_is_left_out(config: PGSVDConfig) -> None:
    model, batches = FAMILIES["opt"].build(), FAMILIES["opt"].batches(2)
    expected = grams_of(model, batches, config)
    left_out = PGSVDConfig(tolerance=0.5, solver=config.solver, modules_to_not_convert=["q_proj"])
    found = {}
    for names, recorder in recorders_of(model, batches, left_out):
        assert not any("v_proj" in leader for leader in recorder.leaders.values())
        found |= {name: recorder.moments(name) for name in names}
    assert not any("q_proj" in name for name in found)
    for name, moments in found.items():
        assert torch.equal(expected[name], moments.outputs if moments.gram is None else moments.gram)


class Pair(nn.Module):
    """Two layers, fed by a rule."""

    def __init__(self, rule: Callable):
        super().__init__()
        self.first, self.second, self.rule = nn.Linear(3, 3), nn.Linear(3, 3), rule

    def forward(self, x: Tensor) -> Tensor:
        self.rule(self.first, self.second, x)
        return x


def in_place(first: nn.Module, second: nn.Module, x: Tensor) -> None:
    x = x.clone()
    first(x)
    second(x.mul_(2))


RULES = {
    "together": lambda first, second, x: (first(x), second(x)),
    "the second not always": lambda first, second, x: (first(x), x.sum() > 0 and second(x)),
    "the first not always": lambda first, second, x: (x.sum() > 0 and first(x), second(x)),
    "the second twice": lambda first, second, x: (first(x), second(x), second(x)),
    "equal, but not the same": lambda first, second, x: (first(x), second(x.clone())),
    "changed in place": in_place,
    "apart": lambda first, second, x: (first(x), second(x + 1)),
}


@pytest.mark.parametrize("name", RULES)
def test_sharing_by_any_rule(name: str) -> None:
    pair, layers = Pair(RULES[name]), ("first", "second")
    pieces = [torch.randn(4, 3, generator=generator(seed), dtype=torch.float64).float() for seed in range(6)]
    assert len({bool(piece.sum() > 0) for piece in pieces}) == 2
    modules = {layer: getattr(pair, layer) for layer in layers}
    with InputSurvey(modules, all_rows) as survey, Inputs(pair, layers) as inputs:
        [pair(piece) for piece in pieces]
    with GramRecorder(modules, all_rows, survey.leaders) as recorder:
        [pair(piece) for piece in pieces]
    for layer in layers:
        x = torch.cat(inputs.rows[layer])
        torch.testing.assert_close(recorder.moments(layer).gram, x.T @ x, rtol=0, atol=1e-5)
        assert survey.tokens[layer] == recorder.tokens[layer] == x.shape[0]
    assert (survey.leaders["second"] == "first") == (name == "together")


@pytest.mark.parametrize("pairing", ["apart", "shared"])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", RULES)
def test_sharing_that_the_survey_could_not_foresee(name: str, sign: int, pairing: str) -> None:
    """What was seen of one piece need not hold for others: then there is an error, and never a wrong matrix."""
    pair, layers = Pair(RULES[name]), ("first", "second")
    pieces = [torch.randn(4, 3, generator=generator(seed), dtype=torch.float64).float() for seed in range(6)]
    modules = {layer: getattr(pair, layer) for layer in layers}
    with InputSurvey(modules, all_rows) as survey:
        pair(next(piece for piece in pieces if piece.sum() * sign > 0))
    leaders = survey.leaders if pairing == "apart" else {"first": "first", "second": "first"}
    parted = name != "together" and leaders.get("second") == "first"
    message = "^second and first were fed the same tensor at first, and different ones later in the calibration set;"
    with pytest.raises(CalibrationError, match=message) if parted else nullcontext():
        with Inputs(pair, layers) as inputs, GramRecorder(modules, all_rows, leaders) as recorder:
            [pair(piece) for piece in pieces]
        for layer in layers:
            x, gram = torch.cat(inputs.rows[layer]), recorder.moments(layer).gram
            torch.testing.assert_close(gram, x.T @ x, rtol=0, atol=1e-5)


def test_layers_of_two_blocks_share_nothing() -> None:
    """Blocks side by side are fed one tensor, but measured one after the other."""

    class SideBySide(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(3, 3)) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return sum(layer(x) for layer in self.layers)

    x = torch.randint(-9, 9, (5, 3), generator=generator(0)).float()
    grams = grams_of(SideBySide().eval(), [{"x": x}])
    assert len(grams) == 3
    assert all(torch.equal(gram, (x.T @ x).double()) for gram in grams.values())


# The moments of outputs


def dense_of(layer: nn.Module) -> Tensor:
    weight = layer.weight.detach().double()
    return weight.T if isinstance(layer, Conv1D) else weight


def layers_of_outputs(bias: bool, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Two with fewer outputs than inputs, and a `Conv1D`, which always has a bias."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = {"one": nn.Linear(16, 5, bias=bias), "two": nn.Linear(16, 3, bias=bias), "conv": Conv1D(4, 16)}
        for layer in layers.values():
            if layer.bias is not None:
                nn.init.normal_(layer.bias)
    return {name: layer.to(dtype) for name, layer in layers.items()}


# Outputs are rounded to their dtype after the bias is added, a few times in float32; entries are sums of 60 squares of
# numbers near 1.
OUTPUTS = {torch.float64: 1e-10, torch.float32: 1e-3, torch.bfloat16: 8.0}


@pytest.mark.parametrize("leaders", [None, {"one": "one", "two": "one", "conv": "one"}], ids=["apart", "shared"])
@pytest.mark.parametrize("dtype", OUTPUTS)
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_moments_of_outputs(bias: bool, dtype: torch.dtype, leaders: dict[str, str] | None) -> None:
    """`W G Wᵀ` of each layer's own outputs, the bias not counted, and the diagonal of G."""
    layers, pieces = layers_of_outputs(bias, dtype), [gaussian(20, 16, seed=seed).to(dtype) for seed in range(3)]
    with GramRecorder(layers, all_rows, leaders, layers) as recorder:
        for piece, layer in itertools.product(pieces, layers.values()):
            layer(piece.reshape(4, 5, 16))
    x = torch.cat(pieces).double()
    for name, layer in layers.items():
        moments, weight = recorder.moments(name), dense_of(layer)
        assert moments.gram is None
        assert recorder.tokens[name] == 60
        expected = weight @ x.T @ x @ weight.T
        torch.testing.assert_close(moments.outputs.double(), expected, rtol=0, atol=OUTPUTS[dtype])
        torch.testing.assert_close(moments.energies.double(), (x.T @ x).diagonal(), rtol=1e-6, atol=0)
        if layer.bias is not None:  # a control: the bias would make a difference
            y = x @ weight.T + layer.bias.double()
            assert float((y.T @ y - expected).abs().max()) > 2 * OUTPUTS[dtype]


@torch.no_grad()
def test_inputs_of_some_layers_and_outputs_of_others() -> None:
    """A layer whose leader is measured by its outputs leads."""
    layers, x = layers_of_outputs(False, torch.float64), gaussian(20, 16, seed=0)
    for by_outputs in itertools.chain.from_iterable(itertools.combinations(layers, size) for size in range(4)):
        with GramRecorder(layers, all_rows, dict.fromkeys(layers, "one"), by_outputs) as recorder:
            [layer(x) for layer in layers.values()]
        for name, layer in layers.items():
            moments, y = recorder.moments(name), x @ dense_of(layer).T
            assert (moments.gram is None) == (name in by_outputs)
            found, expected = (moments.gram, x.T @ x) if moments.outputs is None else (moments.outputs, y.T @ y)
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(moments.energies, (x.T @ x).diagonal(), rtol=1e-12, atol=0)


@each_family
def test_moments_of_outputs_of_one_plain_forward(family: Family) -> None:
    """As far as float32 outputs and products of two batches allow: 1e-4 of the layer's largest output."""
    model, batches = family.build(), family.batches(2)
    moments = moments_of(model, batches)
    with Inputs(model, moments) as inputs:
        for batch in batches:
            plain_forward(model, batch)
    by_outputs = {name for name, value in moments.items() if value.gram is None}
    assert bool(by_outputs) == (family.name not in ("mixtral", "gpt_oss"))  # whose experts are not taken apart here
    for name, value in moments.items():
        x, weight = torch.cat(inputs.rows[name]), dense_weight(model, name).double()
        torch.testing.assert_close(value.energies, (x.T @ x).diagonal(), rtol=1e-5, atol=0)
        expected, found = x.T @ x, value.gram
        if name in by_outputs:
            expected, found = weight @ expected @ weight.T, value.outputs
            assert weight.shape[0] < weight.shape[1]
        assert float((found - expected).abs().max()) <= 1e-4 * float(expected.diagonal().max()), name


# (m, n) of layers that share their input, and whether their outputs are measured
GROUPS = [
    ([(3, 4)], True),
    ([(4, 4)], False),
    ([(5, 4)], False),
    ([(3, 5), (3, 5)], True),  # 18 < 25
    ([(4, 5), (3, 5)], False),  # 25, no fewer
    ([(4, 5), (2, 5)], True),  # 20
    ([(2, 5), (5, 5)], False),  # one is square
    ([(1, 5), (1, 5), (6, 5)], False),
    ([(2, 5)] * 6, True),  # 24
    ([(2, 5)] * 7, False),  # 28
]


@pytest.mark.parametrize("ours", range(len(GROUPS)))
def test_what_is_measured_by_outputs(ours: int) -> None:
    """Beside a group of another kind, and with the leader not the first that is defined."""
    shapes, leaders, expected = {}, {}, set()
    for number, (group, chosen) in enumerate([GROUPS[ours], GROUPS[0], GROUPS[1]]):
        names = [f"{number}.{i}" for i in range(len(group))]
        shapes |= dict(zip(names, group, strict=True))
        leaders |= dict.fromkeys(reversed(names), names[-1])
        expected |= {name for name in names if chosen}
    assert measured_by_outputs(shapes, leaders) == expected
    some = {name: shape for name, shape in shapes.items() if name != "0.0"}
    rest = GROUPS[ours][0][1:]
    fewer = bool(rest) and all(m < n for m, n in rest) and sum(m * m for m, _ in rest) < rest[0][1] ** 2
    assert any(name.startswith("0.") for name in measured_by_outputs(some, leaders)) == fewer


def test_layers_that_share_nothing_are_chosen_one_by_one() -> None:
    assert measured_by_outputs({"a": (3, 4), "b": (3, 4), "c": (4, 4)}, {}) == {"a", "b"}
    assert measured_by_outputs({}, {"a": "a"}) == set()


# Padding


def garbage(rows: list[Tensor], left: bool = False, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Sequences of several lengths in one batch, with its mask; the padding is made of ordinary tokens."""
    width = width or max(len(row) for row in rows)
    ids, mask = token_ids(generator(99), len(rows), width), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row), None) if left else slice(None, len(row))
        ids[i, place], mask[i, place] = row, 1
    return ids, mask


def sequences(lengths: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    source = generator(seed)
    return [token_ids(source, 1, length)[0] for length in lengths]


def assert_same_grams(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Masked attention sums in another order: float32 passes differ by a few 1e-6 of the largest entry."""
    assert found.keys() == expected.keys()
    for name, gram in found.items():
        scale = float(expected[name].diagonal().max())
        assert float((gram - expected[name]).abs().max()) <= 2e-5 * scale, name


def all_differ(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return all(
        float((gram - expected[name]).abs().max()) > 0.01 * float(expected[name].diagonal().max())
        for name, gram in found.items()
    )


LENGTHS = (9, 6, 4)
RIGHT = ("bert", "llama", "gpt2", "opt", "mistral", "albert", "rwkv", "bert_decoder")
# Models whose positions are relative, or taken from the mask.
LEFT = ("llama", "opt", "gemma3", "bloom")
SIDES = {f"{name}-right": (name, False) for name in RIGHT} | {f"{name}-left": (name, True) for name in LEFT}


@each_solver
@pytest.mark.parametrize(("name", "left"), SIDES.values(), ids=SIDES)
def test_padding_contributes_nothing(name: str, left: bool, config: PGSVDConfig) -> None:
    model, rows = (FAMILIES | ODD)[name].build(), sequences(LENGTHS)
    ids, mask = garbage(rows, left)
    found = grams_of(model, [{"input_ids": ids, "attention_mask": mask}], config)
    expected = grams_of(model, [{"input_ids": row[None]} for row in rows], config)
    assert_same_grams(found, expected)
    assert all_differ(grams_of(model, [{"input_ids": ids}], config), expected)


def test_padding_does_not_pass_from_one_batch_to_another() -> None:
    """All batches are under way at a time, each with a mask of its own or with none."""
    model, rows = FAMILIES["bert"].build(), sequences((*LENGTHS, 9, 7))
    batches = [{"input_ids": rows[3][None]}]
    for part in (rows[:3], [rows[4], rows[0]]):
        batches.append(dict(zip(("input_ids", "attention_mask"), garbage(part), strict=True)))
    batches.append({"input_ids": rows[1][None]})
    single = [{"input_ids": row[None]} for row in (rows[3], *rows[:3], rows[4], rows[0], rows[1])]
    for config in (GRAMS, SMALLEST):
        assert_same_grams(grams_of(model, batches, config), grams_of(model, single, config))


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_padding_of_sources_and_targets_in_anchored_calibration(name: str) -> None:
    """Where blocks run on copies of their arguments; with nothing replaced, the two passes are one."""
    model, sources, answers = FAMILIES[name].build(), sequences(LENGTHS), sequences((6, 4, 9), seed=1)
    batch = dict(zip(("input_ids", "attention_mask"), garbage(sources), strict=True))
    batch |= dict(zip(("decoder_input_ids", "decoder_attention_mask"), garbage(answers), strict=True))
    anchored = PGSVDConfig(tolerance=0.5, groups=GRAMS.groups, solver="als", calibration="anchored")
    assert_same_grams(grams_of(model, [batch] * 2, anchored), grams_of(model, [batch] * 2))


def test_padding_beside_position_embeddings() -> None:
    """DeBERTa's projections are fed its table of relative positions too, once a pass, which no mask applies to."""
    model, (row,) = FAMILIES["deberta_v2"].build(), sequences((6,))
    ids, mask = garbage([row], width=9)
    found = grams_of(model, [{"input_ids": ids, "attention_mask": mask}])
    assert_same_grams(found, grams_of(model, [{"input_ids": row[None]}]))


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("targets", [(5, 7, 3), (6, 4, 9)], ids=["other lengths", "same lengths"])
def test_padding_of_sources_and_targets(name: str, targets: tuple[int, ...]) -> None:
    """With sources and targets padded to one length, only the role of a tensor tells which mask is its own."""
    model, sources, answers = FAMILIES[name].build(), sequences(LENGTHS), sequences(targets, seed=1)
    batch = dict(zip(("input_ids", "attention_mask"), garbage(sources), strict=True))
    batch |= dict(zip(("decoder_input_ids", "decoder_attention_mask"), garbage(answers), strict=True))
    single = [{"input_ids": a[None], "decoder_input_ids": b[None]} for a, b in zip(sources, answers, strict=True)]
    assert_same_grams(grams_of(model, [batch]), grams_of(model, single))


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_padded_labels(name: str) -> None:
    model, sources, answers = FAMILIES[name].build(), sequences(LENGTHS), sequences((6, 4, 9), seed=1)
    ids, mask = garbage(sources)
    labels, real = garbage(answers)
    batch = complete(model, {"input_ids": ids, "attention_mask": mask, "labels": labels.masked_fill(real == 0, -100)})
    single = [{"input_ids": a[None], "labels": b[None]} for a, b in zip(sources, answers, strict=True)]
    assert_same_grams(grams_of(model, [batch]), grams_of(model, single))


def test_a_text_mask_is_not_laid_on_images() -> None:
    """Five tokens of text, and five of each image: four patches and a class token."""
    model, rows = FAMILIES["clip"].build(), sequences((5, 3, 4))
    ids, mask = garbage(rows)
    pixels = images(generator(0), len(rows))
    found = grams_of(model, [{"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}])
    single = zip(rows, pixels, strict=True)
    expected = grams_of(model, [{"input_ids": row[None], "pixel_values": image[None]} for row, image in single])
    tokens = {name for name in found if "_model." in name}
    assert {name.split(".")[0] for name in tokens} == {"text_model", "vision_model"}
    assert_same_grams({name: found[name] for name in tokens}, {name: expected[name] for name in tokens})


@pytest.mark.parametrize("name", ["blip", "siglip", "qwen2_5_vl", "qwen3_vl", "idefics3", "smolvlm"])
def test_a_text_mask_is_laid_on_text_alone(name: str) -> None:
    """As many tokens of text as an image has patches; the towers of some families do not say that they read images."""
    patches = 5 if name in ("blip", "siglip") else 16
    patches -= name == "siglip"  # which has no class token
    model, batch = FAMILIES[name].build(), FAMILIES[name].batches(1)[0]
    batch = {
        key: value[:, :patches] if key in ("input_ids", "mm_token_type_ids") else value for key, value in batch.items()
    }
    mask = torch.ones_like(batch["input_ids"])
    mask[0, -2:] = 0
    config = PGSVDConfig(tolerance=0.5, dataset=[batch | {"attention_mask": mask}])
    report = PGSVDCompressor(config).compress(model)
    seen = {layer.name: layer.tokens for layer in report.layers if layer.rank is not None}
    reads_images = {
        layer for layer in seen if ".vis" in f".{layer}" or re.search("crossattention.self.(key|value)", layer)
    }
    merged = {layer for layer in seen if "deepstack" in layer}
    assert reads_images
    assert {seen[layer] for layer in reads_images - merged} == {SEQUENCES * patches}
    assert {seen[layer] for layer in seen.keys() - reads_images} == {SEQUENCES * patches - 2}


MASK = torch.tensor([[1, 1, 1], [1, 0, 0]])
SHAPES = {
    (2, 3): [0, 1, 2, 3],  # batch and tokens
    (6,): [0, 1, 2, 3],  # flattened
    (2, 1, 3): [0, 1, 2, 3],  # in chunks
    (3, 2): [0, 1, 2, 4],  # tokens first
    (2, 4): [*range(8)],  # other tokens
    (1, 6): [*range(6)],  # as many rows, of something that belongs to no sequence
    (2,): [0, 1],  # one row a sequence
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_of_every_shape(shape: tuple[int, ...]) -> None:
    padding = PaddingMask()
    padding.start_batch({"attention_mask": MASK})
    x = torch.arange(torch.Size(shape).numel()).reshape(*shape, 1)
    assert padding.rows(x, x).flatten().tolist() == SHAPES[shape]
    values = torch.stack([x[..., 0], -x[..., 0]], -1)
    assert padding.rows(x, values).tolist() == [[row, -row] for row in SHAPES[shape]]


def test_masks_of_one_batch_are_not_kept_for_the_next() -> None:
    padding, x = PaddingMask(), torch.zeros(2, 3, 1)
    padding.start_batch({"attention_mask": MASK})
    assert padding.rows(x, x).shape == (4, 1)
    padding.start_batch({})
    assert padding.rows(x, x).shape == (6, 1)


class ReadsEncoder(nn.Module):
    def forward(self, x: Tensor, encoder_hidden_states: Tensor) -> None: ...


@torch.no_grad()
def test_outputs_are_masked_as_their_inputs_are() -> None:
    """Those of encoder states by the encoder's mask, though both have one shape; the outputs do not tell."""
    padding, layer = PaddingMask(), nn.Linear(3, 2)
    states, x = gaussian(1, 3, 3, seed=0).float(), gaussian(1, 3, 3, seed=1).float()
    masks = {"attention_mask": torch.tensor([[1, 1, 0]]), "decoder_attention_mask": torch.tensor([[0, 0, 1]])}
    for value, kept in ((states, slice(2)), (x, slice(2, 3))):
        padding.start_batch(masks)
        padding.enter_block(ReadsEncoder(), (x,), {"encoder_hidden_states": states}, True)
        with GramRecorder({"layer": layer}, padding.rows, None, ["layer"]) as recorder:
            layer(value)
        rows = value[0, kept]
        y = (rows @ layer.weight.T).double()
        torch.testing.assert_close(recorder.moments("layer").outputs, y.T @ y, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(recorder.moments("layer").energies, rows.double().square().sum(0))
        assert recorder.tokens == {"layer": len(rows)}


# NaN and infinity


def batch_with(token: int) -> Batch:
    (batch,) = FAMILIES["llama"].batches(1)
    batch["input_ids"][2, 3] = token
    return batch


def assert_compress_changes_nothing(
    model: PreTrainedModel, config: PGSVDConfig, error: type[Exception], message: str
) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=f"^{message}"):
        PGSVDCompressor(config).compress(model)
    after = model.state_dict()
    assert list(after) == list(before)
    torch.testing.assert_close(dict(after), before, rtol=0, atol=0, equal_nan=True)
    assert not any(isinstance(module, LowRankLinear) for module in model.modules())
    assert getattr(model.config, "quantization_config", None) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_activations_that_are_not_finite(value: float) -> None:
    model = FAMILIES["llama"].build()
    with torch.no_grad():
        model.model.embed_tokens.weight[7, 3] = value
    config = PGSVDConfig(tolerance=0.5, dataset=[*FAMILIES["llama"].batches(1), batch_with(7)])
    message = "the inputs of model.layers.0.self_attn.q_proj hold NaN or infinity on the calibration set"
    assert_compress_changes_nothing(model, config, NonFiniteError, message)


def test_the_last_block_is_checked_before_the_first_is_replaced() -> None:
    model = FAMILIES["llama"].build()
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[5] = float("inf")
    config = PGSVDConfig(tolerance=0.5, dataset=FAMILIES["llama"].batches(1))
    message = "the inputs of model.layers.1.mlp.gate_proj hold NaN or infinity"
    assert_compress_changes_nothing(model, config, NonFiniteError, message)


def test_a_token_that_is_not_used_may_be_damaged() -> None:
    model = FAMILIES["llama"].build()
    with torch.no_grad():
        model.model.embed_tokens.weight[1] = float("nan")
    PGSVDCompressor(PGSVDConfig(tolerance=0.5, dataset=FAMILIES["llama"].batches(1))).compress(model)
    assert any(isinstance(module, LowRankLinear) for module in model.modules())


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
@pytest.mark.parametrize("calibration", ["parallel", "anchored"])
def test_a_later_batch_that_is_not_finite(name: str, calibration: str) -> None:
    """The survey has not seen it: the error names the first layer that is not to be factored, in the last block."""
    model, batches = FAMILIES[name].build(), FAMILIES[name].batches(3)
    block = model.get_submodule(find_targets(model, PGSVDConfig(tolerance=0.5)).blocks[-1])
    calls = []

    def damage(module: nn.Module, args: tuple) -> tuple:
        calls.append(1)
        x = args[0].clone()
        x[0, 1, 3] = float("nan") if len(calls) == 3 else x[0, 1, 3]  # one call in the survey, then the second batch
        return (x, *args[1:])

    block.register_forward_pre_hook(damage)
    config = PGSVDConfig(tolerance=0.5, dataset=batches, calibration=calibration)
    name = next(t.name for t in find_targets(model, config).found if t.block and model.get_submodule(t.block) is block)
    assert_compress_changes_nothing(model, config, NonFiniteError, f"the inputs of {name} hold NaN or infinity")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by_outputs", [True, False])
@torch.no_grad()
def test_moments_that_are_not_finite(by_outputs: bool, dtype: torch.dtype, value: float) -> None:
    layers = {"fine": nn.Linear(4, 2, dtype=dtype), "damaged": nn.Linear(4, 2, dtype=dtype)}
    x = torch.ones(3, 4, dtype=dtype)
    with GramRecorder(layers, all_rows, None, layers if by_outputs else ()) as recorder:
        [layer(x) for layer in layers.values()]
        layers["damaged"](x.index_fill(1, torch.tensor([2]), value))
        layers["damaged"](x)
    recorder.moments("fine")
    with pytest.raises(NonFiniteError, match="^the inputs of damaged hold NaN or infinity on the calibration set, or"):
        recorder.moments("damaged")


@torch.no_grad()
def test_outputs_that_do_not_depend_on_what_is_not_finite() -> None:
    """The layer reads nothing of the damaged feature: its outputs are fine, but not what is said of its inputs."""
    layer = nn.Linear(4, 2)
    layer.weight[:, 2] = 0
    with GramRecorder({"layer": layer}, all_rows, None, ["layer"]) as recorder:
        layer(torch.tensor([[1.0, 1.0, 1e20, 1.0]]))
    with pytest.raises(NonFiniteError, match="^the inputs of layer hold"):
        recorder.moments("layer")


def survey(x: Tensor, rows: Callable[[Tensor, Tensor], Tensor] = all_rows) -> InputSurvey:
    layer = nn.Linear(x.shape[-1], 2, dtype=x.dtype)
    with InputSurvey({"layer": layer}, rows) as result:
        layer(x)
    return result


def test_numbers_too_large_to_square() -> None:
    """1e20 is finite in float32 and bfloat16, its square is not."""
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(NonFiniteError, match="the inputs of layer hold NaN or infinity .* or numbers too large"):
            survey(torch.full((2, 3), 1e20, dtype=dtype))
    assert survey(torch.full((2, 3), 1e20, dtype=torch.float64)).tokens == {"layer": 2}
    assert survey(torch.full((2, 3), 6e4, dtype=torch.float16)).tokens == {"layer": 2}


def test_padding_may_hold_anything() -> None:
    x = torch.tensor([[[1.0], [float("nan")]]])
    padding = PaddingMask()
    padding.start_batch({"attention_mask": torch.tensor([[1, 0]])})
    assert survey(x, padding.rows).tokens == {"layer": 1}


# Too little data


@pytest.mark.parametrize("name", ["llava", "clip"])
def test_layers_that_no_input_reaches(name: str) -> None:
    model, batches = FAMILIES[name].build(), FAMILIES["llama"].batches(1)
    message = {
        "llava": "the calibration set never reached 12 layers, model.vision_tower.encoder.layers.0.self_attn.k_proj",
        "clip": r"CLIPModel does not accept calibration batch 0 with the inputs input_ids \(4, 20\)(?s:.*)"
        "; it takes pixel_values too: give images or sounds with the texts",
    }[name]
    assert_compress_changes_nothing(model, PGSVDConfig(tolerance=0.5, dataset=batches), CalibrationError, message)


def test_a_survey_holds_no_activation() -> None:
    layer, x = nn.Linear(3, 3), torch.ones(2, 3)
    with InputSurvey({"layer": layer}, all_rows) as survey:
        layer(x)
    reference = weakref.ref(x)
    del x
    assert reference() is None
    assert survey.tokens == {"layer": 2}


def test_what_was_not_reached() -> None:
    layers = {name: nn.Linear(3, 3) for name in ("reached", "not reached", "reached by no row")}
    with InputSurvey(layers, all_rows) as survey:
        layers["reached by no row"](torch.ones(0, 3))
        layers["reached"](torch.ones(2, 3))
    assert survey.unseen == ["not reached", "reached by no row"]
    assert survey.leaders == {"reached by no row": "reached by no row", "reached": "reached"}
    with survey:
        layers["not reached"](torch.ones(1, 3))
    assert survey.unseen == ["reached by no row"]
    assert survey.tokens == {"reached": 2, "not reached": 1, "reached by no row": 0}


@pytest.mark.parametrize(
    "name", [n for n in FAMILIES if n not in ("albert", "clip", "siglip", "deberta_v2", "whisper")]
)
def test_labels_that_a_training_set_has_change_nothing(name: str) -> None:
    """A loss wants the logits of all tokens, which are not computed for the measurement of blocks."""
    family, config = FAMILIES[name], PGSVDConfig(tolerance=0.5, solver="als")
    model, batches = family.build(), family.batches(2)
    labels = [batch.get("decoder_input_ids", batch.get("input_ids")) for batch in batches]
    found = grams_of(model, [{**batch, "labels": ids} for batch, ids in zip(batches, labels, strict=True)], config)
    expected = grams_of(model, batches, config)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[layer], expected[layer]) for layer in expected)


def test_unreached_layers_may_be_excluded() -> None:
    model, batches = FAMILIES["llava"].build(), FAMILIES["llama"].batches(1)
    config = PGSVDConfig(tolerance=0.5, dataset=batches, modules_to_not_convert=["vision_tower"])
    report = PGSVDCompressor(config).compress(model)
    assert {layer.name.split(".")[1] for layer in report.layers} == {"language_model"}


def test_fewer_tokens_than_features(caplog: pytest.LogCaptureFixture) -> None:
    """Eight tokens: fewer than the 64 features of the two down projections, and than the 32 of all other layers."""
    model = FAMILIES["llama"].build()
    with caplog.at_level(logging.WARNING):
        report = PGSVDCompressor(PGSVDConfig(tolerance=0.5, dataset=[token_ids(generator(0), 1, 8)])).compress(model)
    note = "14 layers saw fewer calibration tokens than they have input features (8 tokens, 64 features)"
    assert [text.startswith(note) for text in report.notes] == [True]
    assert [record.getMessage() for record in caplog.records] == list(report.notes)


def test_only_the_widest_layers_see_too_few(caplog: pytest.LogCaptureFixture) -> None:
    model = FAMILIES["llama"].build()
    report = PGSVDCompressor(PGSVDConfig(tolerance=0.5, dataset=[token_ids(generator(0), 1, 63)])).compress(model)
    assert [text[:9] for text in report.notes] == ["2 layers "]
    assert len(caplog.records) == 1


def test_enough_tokens(caplog: pytest.LogCaptureFixture) -> None:
    model = FAMILIES["llama"].build()
    with caplog.at_level(logging.WARNING):
        report = PGSVDCompressor(PGSVDConfig(tolerance=0.5, dataset=[token_ids(generator(0), 1, 64)])).compress(model)
    assert report.notes == ()
    assert caplog.records == []


def test_padding_is_not_counted_as_tokens() -> None:
    ids, mask = garbage(sequences((40, 23)))
    config = PGSVDConfig(tolerance=0.5, dataset=[{"input_ids": ids, "attention_mask": mask}])
    report = PGSVDCompressor(config).compress(FAMILIES["llama"].build())
    assert {layer.tokens for layer in report.layers if layer.rank is not None} == {63}
    assert [text[:9] for text in report.notes] == ["2 layers "]
