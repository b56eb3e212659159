"""Gram matrices: of real tokens only, the same however they are cut, and fit to be decomposed."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from models import FAMILIES, ODD, Batch, Family, generator, images, token_ids
from torch import Tensor, nn
from transformers import PreTrainedModel
from watch import Inputs, plain_forward

from optimum_pgsvd import PGSVDCompressor, PGSVDConfig
from optimum_pgsvd.calibration import GramRecorder, InputSurvey
from optimum_pgsvd.calibration.data import complete
from optimum_pgsvd.calibration.padding import PaddingMask
from optimum_pgsvd.errors import CalibrationError, NonFiniteError
from optimum_pgsvd.factoring import Clock, measured_groups
from optimum_pgsvd.modeling_pgsvd import LowRankLinear
from optimum_pgsvd.targets import find_targets


# Every linear of a model, inside the blocks and outside.
EVERYTHING = PGSVDConfig(tolerance=0.5, groups={"*": {"tolerance": 0.5}})


def grams_of(model: PreTrainedModel, batches: list[Batch]) -> dict[str, Tensor]:
    """As `factor` gets them."""
    targets = find_targets(model, EVERYTHING).found
    groups = measured_groups(model, list(targets), batches, EVERYTHING, Clock(), [])
    return {target.name: recorder.gram(target.name) for group, recorder, _ in groups for target in group}


def all_rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def record(pieces: list[Tensor]) -> Tensor:
    """The Gram matrix of a layer that is fed these pieces one after the other."""
    layer = nn.Linear(pieces[0].shape[-1], 2, dtype=pieces[0].dtype)
    with GramRecorder({"layer": layer}, all_rows) as recorder:
        for piece in pieces:
            layer(piece)
    return recorder.gram("layer")


# Sums


@pytest.mark.parametrize("family", [*FAMILIES.values(), *ODD.values()], ids=[*FAMILIES, *ODD])
def test_grams_are_those_of_one_plain_forward(family: Family) -> None:
    """The recorder sums float32 products in float32 within a batch, at most T·2u·|X|ᵀ|X| away from the exact sum."""
    model, batches = family.build(), family.batches(2)
    grams = grams_of(model, batches)
    with Inputs(model, grams) as inputs:
        for batch in batches:
            plain_forward(model, batch)
    assert set(grams) == set(find_targets(model, EVERYTHING).names)
    for name, gram in grams.items():
        x = torch.cat(inputs.rows[name])
        bound = x.shape[0] * torch.finfo(torch.float32).eps * (x.abs().T @ x.abs())
        assert ((gram - x.T @ x).abs() <= bound).all(), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [1, 7, 64, 200])
def test_any_chunking_is_the_whole(chunk: int, dtype: torch.dtype) -> None:
    """Whole numbers up to 16, so that every sum is exact in float32, though not in bfloat16 or float16."""
    x = torch.randint(-16, 17, (200, 6), generator=generator(0))
    assert torch.equal(record(list(x.to(dtype).split(chunk))), (x.T @ x).double())


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
    targets = list(find_targets(model, EVERYTHING).found)
    blocks = [
        recorder for group, recorder, _ in measured_groups(model, targets, batches, EVERYTHING, Clock(), []) if group
    ]
    assert len(blocks) == 2
    for recorder in blocks:
        last = {name.split(".")[-1]: leader.split(".")[-1] for name, leader in recorder.leaders.items()}
        assert last == LEADERS
        assert len(recorder._grams) == 4


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
        torch.testing.assert_close(recorder.gram(layer), x.T @ x, rtol=0, atol=1e-5)
        assert survey.tokens[layer] == x.shape[0]
    assert (survey.leaders["second"] == "first") == (name == "together")


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


@pytest.mark.parametrize(("name", "left"), SIDES.values(), ids=SIDES)
def test_padding_contributes_nothing(name: str, left: bool) -> None:
    model, rows = (FAMILIES | ODD)[name].build(), sequences(LENGTHS)
    ids, mask = garbage(rows, left)
    found = grams_of(model, [{"input_ids": ids, "attention_mask": mask}])
    expected = grams_of(model, [{"input_ids": row[None]} for row in rows])
    assert_same_grams(found, expected)
    assert all_differ(grams_of(model, [{"input_ids": ids}]), expected)


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
    assert padding.rows(x).flatten().tolist() == SHAPES[shape]


def test_masks_of_one_batch_are_not_kept_for_the_next() -> None:
    padding, x = PaddingMask(), torch.zeros(2, 3, 1)
    padding.start_batch({"attention_mask": MASK})
    assert padding.rows(x).shape == (4, 1)
    padding.start_batch({})
    assert padding.rows(x).shape == (6, 1)


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


def survey(x: Tensor, rows: Callable[[Tensor], Tensor] = all_rows) -> InputSurvey:
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
        "clip": r"CLIPModel does not accept calibration batch 0 with the inputs input_ids \(4, 20\)",
    }[name]
    assert_compress_changes_nothing(model, PGSVDConfig(tolerance=0.5, dataset=batches), CalibrationError, message)


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
