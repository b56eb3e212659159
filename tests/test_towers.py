"""Towers, and one budget for all of them, shared by a search on what the model predicts."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
import reference
import torch
import transformers as hf
from fresh import in_fresh_process
from models import (
    FAMILIES,
    IMAGE_TOKEN,
    POSITIONS,
    SPECIAL,
    VISION,
    Batch,
    each_family,
    generator,
    scramble,
)
from processors import PROCESSORS, example
from test_allocation import choice, options_of, profiles_of
from test_commands import run
from torch import Tensor, nn
from toys import Layer, Toy

from optimum_pgsvd import CompressionReport, PGSVDCompressor, PGSVDConfig
from optimum_pgsvd.allocation import ALLOCATIONS, scaled_tolerances
from optimum_pgsvd.calibration.curvature import predicted
from optimum_pgsvd.calibration.predictions import Predictions, divergence, predict, spread
from optimum_pgsvd.errors import ConfigError, DistributedError
from optimum_pgsvd.factoring import towers as search
from optimum_pgsvd.structures import Budget
from optimum_pgsvd.targets import find_targets, matches
from optimum_pgsvd.towers import find_towers, tower_of


# Towers by structure

PLAIN = {"gpt2": "transformer", "bloom": "transformer", "opt": "model.decoder", "bert": "bert.encoder",
         "albert": "encoder", "deberta_v2": "encoder"}  # fmt: skip
SEVERAL = {
    "t5": ["encoder", "decoder"],
    "bart": ["model.encoder", "model.decoder"],
    "whisper": ["model.encoder", "model.decoder"],
    "clip": ["text_model", "vision_model"],
    "siglip": ["text_model", "vision_model"],
    "llava": ["model.vision_tower", "model.language_model"],
    "qwen2_5_vl": ["model.visual", "model.language_model"],
    "qwen3_vl": ["model.visual", "model.language_model"],
    "idefics3": ["model.vision_model", "model.text_model"],
    "smolvlm": ["model.vision_model", "model.text_model"],
    "blip": ["vision_model", "text_decoder"],
}


def three_towers() -> hf.PreTrainedModel:
    """BLIP-2: an image, queries that look at it, and a language model."""
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
    text = hf.OPTConfig(**SPECIAL, **POSITIONS, **heads, ffn_dim=64, word_embed_proj_dim=32)
    queries = {**heads, "intermediate_size": 64, "encoder_hidden_size": 32, "cross_attention_frequency": 1}
    config = hf.Blip2Config(
        vision_config=VISION,
        qformer_config=queries,
        text_config=text,
        num_query_tokens=4,
        image_token_index=IMAGE_TOKEN,
    )
    model = hf.Blip2ForConditionalGeneration(config)
    scramble(model, generator(0))
    return model.eval()


@each_family
def test_towers_of_every_family(family) -> None:
    assert list(find_towers(family.build())) == SEVERAL.get(family.name, [PLAIN.get(family.name, "model")])


def test_three_towers() -> None:
    assert list(find_towers(three_towers())) == ["vision_model", "qformer", "language_model"]


@each_family
def test_every_target_lies_in_one_tower_and_its_globs_name_no_other_layer(family) -> None:
    model = family.build()
    towers = find_towers(model)
    globs = [glob for globs in towers.values() for glob in globs]
    targets = find_targets(model, PGSVDConfig(tolerance=0.5))
    for name in targets.names:
        assert sum(matches(name, glob) for glob in globs) == 1
        assert name.startswith(f"{tower_of(towers, name)}.")
    groups = {glob: {"tolerance": 0.5} for glob in globs}
    assert find_targets(model, PGSVDConfig(tolerance=0.5, groups=groups)).names == targets.names


class Holds(nn.Module):
    def __init__(self, **parts: nn.Module):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def toy() -> Toy:
    return Toy(Layer(), Layer())


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (toy(), {"model": ("layers.*",)}),
        (Holds(), {}),
        (Holds(inner=Holds(deep=toy(), projection=nn.Linear(2, 2))), {"inner.deep": ("inner.deep.layers.*",)}),
        (
            Holds(layers=nn.ModuleList([Layer()]), vision=Holds(encoder=toy())),
            {"model": ("layers.*",), "vision": ("vision.encoder.layers.*",)},
        ),
        (
            Holds(a=Holds(x=toy(), y=toy()), b=toy()),
            {"a": ("a.x.layers.*", "a.y.layers.*"), "b": ("b.layers.*",)},
        ),
        (Holds(a=nn.ModuleList([Layer()]), b=nn.ModuleList([Layer()])), {"model": ("a.*", "b.*")}),
    ],
    ids=["one list", "no block", "one tower inside others", "blocks beside a tower", "a tower of two", "two lists"],
)
def test_towers_of_other_structures(model: nn.Module, expected: dict) -> None:
    assert find_towers(model) == expected


# Tolerances by scale

SHAPES = {"a": (12, 18), "b": (16, 16), "c": (24, 10), "d": (14, 14)}
SCALES = ({"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0}, {"a": 1.0, "b": 1.0, "c": 2.5, "d": 2.5},
          {"a": 1.0, "b": 0.2, "c": 0.2, "d": 1.0})  # fmt: skip


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("reduction", ["0.1", "0.3", "0.5"])
@pytest.mark.parametrize("rank_multiple", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_scaled_tolerances_are_the_largest_plan_of_one_epsilon(scales, reduction, rank_multiple, seed) -> None:
    profiles = profiles_of(SHAPES, seed)
    options = options_of(profiles, rank_multiple)
    limit = reference.budget(SHAPES, reduction)
    shapes = {name: profile.shape for name, profile in profiles.items()}
    plan = scaled_tolerances(shapes, profiles, float(reduction), rank_multiple, scales)
    expected = reference.one_tolerance_for_all(reference.in_units_of(options, scales), limit)
    assert expected is not None
    found = choice(plan, options)
    assert {name: option.rank for name, option in found.items()} == {name: o.rank for name, o in expected.items()}
    for layer in plan.layers.values():
        assert layer.relative_error <= layer.tolerance * (1 + 1e-12)
    if len(set(scales.values())) == 1:
        assert plan == ALLOCATIONS["pareto"](shapes, profiles, Budget(float(reduction)), rank_multiple)


# The search, on functions that are known


def evaluations(function) -> tuple[Any, list]:
    seen: list = []

    def measure(points: Sequence) -> list[float]:
        seen.extend(points)
        return [function(*point) for point in points]

    return measure, seen


@pytest.mark.parametrize("least", [-2.3, -1.0, -0.04, 0.0, 0.61, 1.99, 2.4])
def test_the_least_point_of_a_valley(least: float) -> None:
    """Within half the finest spacing, beyond the ends of the first points too."""
    measure, _ = evaluations(lambda x: (x - least) ** 2)
    best, tried = search.least(measure, 1)
    assert abs(best[0] - least) <= search.SPACING / 3**search.REFINEMENTS / 2 + 1e-9 or abs(least) > 2.2
    assert abs(best[0] - least) < 0.25
    assert tried[best] == min(tried.values())


def test_the_least_point_of_a_slanting_valley_in_two_dimensions() -> None:
    measure, seen = evaluations(lambda x, y: (x - 0.7) ** 2 + (y + 1.1) ** 2 + 0.5 * (x - 0.7) * (y + 1.1))
    best, _ = search.least(measure, 2)
    assert math.dist(best, (0.7, -1.1)) < 0.15
    assert len(seen) < 80


def test_of_equals_one_tolerance_for_all() -> None:
    """A plateau, and a function that is least at the origin whatever its neighbours are."""
    for function in (
        lambda x: 1.0,
        lambda x: float(abs(x) > 0.3),
        lambda x: 0.0 if x == 0 else math.sin(9 * x) + 1.01,
    ):
        best, _ = search.least(evaluations(function)[0], 1)
        assert best == (0.0,)


# Divergence


@pytest.mark.parametrize("seed", range(3))
def test_divergence_of_logits(seed: int) -> None:
    dense, compressed = (torch.randn(5, 7, generator=generator(seed + 10 * i)) * 3 for i in range(2))
    found = divergence(Predictions((dense, dense.T)), Predictions((compressed, compressed.T)))
    expected = reference.kl_of_softmax(dense, compressed) + reference.kl_of_softmax(dense.T, compressed.T)
    assert found == (pytest.approx(expected, rel=1e-5), 12)
    assert found[0] == pytest.approx(expected, rel=1e-12)
    assert divergence(Predictions((dense,)), Predictions((dense,)))[0] == 0
    shifted = divergence(Predictions((dense.double(),)), Predictions((dense.double() + 5,)))
    assert shifted[0] == pytest.approx(0, abs=1e-13)


def test_small_divergences_are_more_than_rounding() -> None:
    """Of logits that differ by 1e-5 it is of the order 1e-10, far below what float32 leaves of their difference."""
    dense = torch.randn(600, 50, generator=generator(0)) * 5
    compressed = dense + 1e-5 * torch.randn(600, 50, generator=generator(1))
    expected = reference.kl_of_softmax(dense, compressed)
    found, count = divergence(Predictions((dense,)), Predictions((compressed,)))
    assert 0 < expected < 1e-7
    assert count == 600
    assert found == pytest.approx(expected, rel=1e-4)


def test_divergence_of_what_is_no_logits() -> None:
    dense, compressed = (torch.randn(5, 7, generator=generator(i)) for i in range(2))
    expected = reference.kl_of_normal(dense, compressed)
    assert divergence(Predictions(mean=dense), Predictions(mean=compressed)) == (pytest.approx(expected), 5)
    one, other = dense[:, :1], compressed[:, :1]
    expected = reference.kl_of_normal(one, other)
    assert divergence(Predictions((one,)), Predictions((other,))) == (pytest.approx(expected), 5)


def test_what_is_predicted_of_a_batch() -> None:
    """CLIP of the pairs in both directions; a language model of each token but padding; an encoder its states."""
    clip, llama, bert = FAMILIES["clip"], FAMILIES["llama"], FAMILIES["bert"]
    batch = clip.batches(1)[0]
    logits = clip.build()(**batch).logits_per_image
    found = predict(clip.build(), batch, 0)
    assert [torch.equal(a, b) for a, b in zip(found.logits, (logits, logits.T), strict=True)] == [True, True]
    ids = llama.batches(1)[0]["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    found = predict(llama.build(), {"input_ids": ids, "attention_mask": mask}, 0)
    assert found.logits[0].shape == (4 * 20 - 5, 100)
    model = hf.BertModel(bert.config()).eval()
    found = predict(model, {"input_ids": ids}, 0)
    assert torch.equal(found.mean, model(input_ids=ids)[0].reshape(-1, 32))


def test_nothing_is_predicted_of_an_image_s_places() -> None:
    """What precedes a place predicts it, the last place predicts text; padding counts as ever."""
    model, batch = FAMILIES["llava"].build(), FAMILIES["llava"].batches(1)[0]
    assert (batch["input_ids"][:, 1:5] == 5).all()
    expected = torch.ones(4, 20)
    expected[:, 0:4] = 0
    assert torch.equal(predicted(model, batch), expected.long())
    mask = torch.ones(4, 20, dtype=torch.long)
    mask[2, 18:] = 0
    expected[2, 18:] = 0
    assert torch.equal(predicted(model, batch | {"attention_mask": mask}), expected.long())
    text = {"input_ids": batch["input_ids"][:, 5:], "attention_mask": mask[:, 5:]}
    assert predicted(model, text) is text["attention_mask"]


def test_batches_are_spread() -> None:
    batches = [{"input_ids": torch.zeros(8, 3)}] * 16
    assert spread(batches, 32) == [0, 4, 8, 12]
    assert spread(batches, 10**6) == [*range(16)]
    assert spread(batches, 1) == [0]
    assert spread([{"pixel_values": torch.zeros(2, 3)}, {"pixel_values": torch.zeros(2, 3)}], 2) == [0]


# The search, on models


def compressed(name: str, reduction: float = 0.3, model: Any = None, **fields: Any) -> tuple[Any, CompressionReport]:
    model = model or FAMILIES[name].build()
    fields = {"dataset": FAMILIES[name].batches(6), "allocation": "towers", "num_samples": 10**6} | fields
    return model, PGSVDCompressor(PGSVDConfig(reduction, **fields)).compress(model)


@torch.no_grad()
def true_divergence(dense: hf.PreTrainedModel, model: hf.PreTrainedModel, batches: list[Batch]) -> float:
    """By the oracle; no padding in these batches, nor any image's place."""
    total, count = 0.0, 0
    for batch in batches:
        outputs = zip(dense(**batch).items(), model(**batch).items(), strict=True)
        for (key, value), (_, other) in outputs:
            if "logits" in key:
                rows = [x.reshape(-1, x.shape[-1]) for x in (value, other)]
                total, count = total + reference.kl_of_softmax(*rows), count + len(rows[0])
    return total / count


MODELS = ("clip", "siglip", "t5", "blip", "whisper")


@pytest.mark.parametrize("name", MODELS)
def test_a_search_is_as_good_as_the_best_of_a_grid(name: str) -> None:
    """Of budgets for the two towers that meet the same total, each compressed and measured on its own."""
    dense = FAMILIES[name].build()
    batches = FAMILIES[name].batches(6)
    model, report = compressed(name)
    divergence_found = report.search["divergence"]
    assert divergence_found == pytest.approx(true_divergence(dense, model, batches), rel=1e-3)
    assert 0.3 <= report.parameter_reduction < 0.32
    sizes = {
        tower: sum(layer.parameters_before for layer in report.layers if tower_of({tower: globs}, layer.name))
        for tower, globs in find_towers(dense).items()
    }
    first, second = sizes.values()
    best = math.inf
    for share in (0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8):
        rest = (0.3 * (first + second) - share * first) / second
        if not 0 <= rest < 0.95:
            continue
        budgets = zip(find_towers(dense).values(), (share, rest), strict=True)
        groups = {glob: {"parameter_reduction": budget} for globs, budget in budgets for glob in globs}
        other, _ = compressed(name, groups=groups, allocation="pareto")
        best = min(best, true_divergence(dense, other, batches))
    one, _ = compressed(name, allocation="pareto")
    assert report.search["one_tolerance"]["divergence"] == pytest.approx(
        true_divergence(dense, one, batches), rel=1e-3
    )
    assert divergence_found <= report.search["one_tolerance"]["divergence"]
    assert divergence_found <= best * 1.05


@pytest.mark.parametrize("name", ["clip", "llava", "qwen3_vl"])
def test_what_a_report_says_of_towers(name: str, tmp_path) -> None:
    """The tolerance of every layer is that of its tower, and its ranks are those that the tolerances give."""
    model, report = compressed(name)
    towers = find_towers(model)
    assert list(report.search["towers"]) == list(towers)
    for tower, found in report.search["towers"].items():
        layers = [layer for layer in report.layers if tower_of(towers, layer.name) == tower]
        assert {layer.tolerance for layer in layers} == {found["tolerance"]}
        kept = sum(layer.parameters_after for layer in layers) / sum(layer.parameters_before for layer in layers)
        assert found["parameter_reduction"] == pytest.approx(1 - kept)
        assert f"tower {tower}: tolerance {found['tolerance']:.4f}" in str(report)
    values = [point["divergence"] for point in report.search["points"]]
    assert min(values) == report.search["divergence"]
    assert len({json.dumps(point["tolerances"], sort_keys=True) for point in report.search["points"]}) > 8
    assert report.search["sequences"] == 6 * 4
    model.save_pretrained(tmp_path)
    assert CompressionReport.load(tmp_path).search == report.search
    # Two tolerances, given by hand, are the same request.
    groups = {
        glob: {"tolerance": report.search["towers"][t]["tolerance"]} for t, globs in towers.items() for glob in globs
    }
    _, by_hand = compressed(name, None, tolerance=0.0, groups=groups, allocation="pareto")
    same = sum(a.rank == b.rank for a, b in zip(report.layers, by_hand.layers, strict=True))
    assert same >= len(report.layers) - 1  # of layers with one error, a budget may take some only


@pytest.mark.parametrize(
    "fields",
    [
        {"solver": "als"},
        {"calibration": "anchored"},
        {"correct_bias": True},
        {"calibration": "anchored", "refine_steps": 2},
    ],
    ids=str,
)
def test_whatever_factors_are_found_by_the_tolerances_are_those_of_the_closed_form(fields: dict) -> None:
    _, plain = compressed("clip")
    _, report = compressed("clip", **fields)
    assert report.search == plain.search
    assert [layer.rank for layer in report.layers] == [layer.rank for layer in plain.layers]


def test_pivoted_storage_and_a_group_of_its_own() -> None:
    """The group's layers keep their budget and are no part of the search; the others share theirs."""
    groups = {"text_model*fc1": {"tolerance": 0.2}, "*_projection": {"parameter_reduction": 0.5}}
    _, report = compressed("clip", storage="pivoted", groups=groups)
    inside = [layer for layer in report.layers if layer.group == ""]
    before, after = (sum(getattr(layer, f"parameters_{when}") for layer in inside) for when in ("before", "after"))
    assert 0.3 <= 1 - after / before < 0.33
    assert {layer.tolerance for layer in report.layers if layer.group == "text_model*fc1"} == {0.2}
    assert {tower_of(find_towers(FAMILIES["clip"].build()), layer.name) for layer in inside} == {
        "text_model",
        "vision_model",
    }
    assert report.search["divergence"] <= report.search["one_tolerance"]["divergence"]


def test_three_towers_share_one_budget() -> None:
    model = three_towers()
    _, report = compressed("blip", model=model, dataset=FAMILIES["llava"].batches(3))
    assert list(report.search["towers"]) == ["vision_model", "qformer", "language_model"]
    assert 0.3 <= report.parameter_reduction < 0.32
    assert report.search["divergence"] < report.search["one_tolerance"]["divergence"]
    ratios = {tuple(point["tolerances"].values()) for point in report.search["points"]}
    moved = [sum(a != b for a, b in itertools.pairwise(sorted(point))) for point in ratios]
    assert max(moved) == 2  # all three differ somewhere


def test_what_was_found_is_found_again() -> None:
    assert compressed("clip")[1].search == compressed("clip")[1].search


def test_the_model_is_dense_where_a_search_fails() -> None:
    """At the last batch, in the middle of a cut."""
    model, batches = FAMILIES["clip"].build(), FAMILIES["clip"].batches(3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    runs = itertools.count()

    def fail(module: nn.Module, args: tuple) -> None:
        if next(runs) == 20:
            raise KeyboardInterrupt

    handle = model.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        PGSVDCompressor(PGSVDConfig(0.3, dataset=batches, allocation="towers")).compress(model)
    handle.remove()
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_images_with_texts() -> None:
    """From pairs, through a processor; the padding of texts is not predicted."""
    pairs = [example("llava", number) for number in range(8)]
    _, report = compressed("llava", dataset=pairs, tokenizer=PROCESSORS["llava"](), batch_size=4)
    assert report.search["divergence"] <= report.search["one_tolerance"]["divergence"]
    assert report.search["sequences"] == 8


# What is refused


def test_one_tower_is_refused() -> None:
    with pytest.raises(ConfigError, match="LlamaForCausalLM under the main budget lie in model alone; use .*pareto"):
        compressed("llama")
    with pytest.raises(ConfigError, match="lie in vision_model alone"):
        compressed("clip", modules_to_not_convert=["text_model"])


REFUSED = {
    "tolerance": ({"parameter_reduction": None, "tolerance": 0.3}, "tolerance=0.3 fixes them: give a parameter_red"),
    "svd": (
        {"solver": "svd"},
        "allocation='towers' measures predictions on a calibration set, and solver='svd' uses none",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_configs_that_are_refused(case: str) -> None:
    fields, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        PGSVDConfig(**{"parameter_reduction": 0.3, "allocation": "towers"} | fields)


def test_what_cannot_run_the_model_is_refused(tmp_path, monkeypatch) -> None:
    config = PGSVDConfig(0.3, dataset=FAMILIES["clip"].batches(2), allocation="towers")
    model = FAMILIES["clip"].build()
    with pytest.raises(ConfigError, match="there is no plan without it; compress the model in memory"):
        PGSVDCompressor(config).plan(model)
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(ConfigError, match="there is no plan without it; compress the model in memory"):
        PGSVDCompressor(config).compress_checkpoint(tmp_path / "dense", tmp_path / "out")
    PGSVDCompressor(PGSVDConfig(0.3, dataset=config.dataset)).measure_checkpoint(
        tmp_path / "dense", tmp_path / "stats"
    )
    measured = PGSVDConfig(0.3, dataset=tmp_path / "stats", allocation="towers")
    with pytest.raises(ConfigError, match="runs the model on the calibration set, .* nor by measurements made before"):
        PGSVDCompressor(measured).compress(model)
    monkeypatch.setattr("optimum_pgsvd.factoring.search.Peers", lambda: type("Two", (), {"size": 2}))
    with pytest.raises(DistributedError, match="searches in one process only"):
        PGSVDCompressor(config).compress(model)


# As a user runs it


def test_the_command_line(tmp_path) -> None:
    FAMILIES["clip"].build().save_pretrained(tmp_path / "dense")
    PROCESSORS["clip"]().save_pretrained(tmp_path / "dense")
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    for number in range(4):
        pair = example("clip", number)
        pair["image"].save(pairs / f"{number}.png")
        (pairs / f"{number}.txt").write_text(pair["text"])
    done = run("compress", "--model", tmp_path / "dense", "--parameter-reduction", 0.3, "--allocation", "towers",
               "--dataset", pairs, "--output", tmp_path / "out")  # fmt: skip
    assert "tower vision_model: tolerance 0." in done.stdout
    report = CompressionReport.load(tmp_path / "out")
    assert report.search["divergence"] <= report.search["one_tolerance"]["divergence"]
    failed = run(
        "plan", "--model", tmp_path / "dense", "--parameter-reduction", 0.3, "--allocation", "towers", expect=2
    )
    assert failed.stderr.startswith("error: allocation='towers' finds a tolerance for each tower by running the model")


def tensors(model: nn.Module) -> list[Tensor]:
    return list(model.state_dict().values())


def test_the_ranks_are_reloaded(tmp_path) -> None:
    model, _ = compressed("clip")
    model.save_pretrained(tmp_path)
    reloaded = hf.CLIPModel.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(tensors(model), tensors(reloaded), strict=True))


VISION_LANGUAGE = ("clip", "siglip", "llava", "qwen2_5_vl", "qwen3_vl", "idefics3", "smolvlm", "blip", "whisper")


def test_every_family_is_reloaded_by_stock_classes_in_a_fresh_process(tmp_path) -> None:
    """With one tolerance a tower, saved, and bit-equal there; nothing there imports this package."""
    expected = {}
    for name in VISION_LANGUAGE:
        model, report = compressed(name)
        towers = find_towers(FAMILIES[name].build())
        assert len({(tower_of(towers, layer.name), layer.tolerance) for layer in report.layers}) == 2
        model.save_pretrained(tmp_path / name)
        batch = FAMILIES[name].batches(1, seed=1)[0]
        torch.save((type(model).__name__, batch), tmp_path / f"{name}.in")
        with torch.no_grad():
            expected[name] = logits_of(model(**batch))
    in_fresh_process(
        """
        import sys, torch, transformers
        for place in sys.argv[1:]:
            kind, batch = torch.load(place + ".in")
            with torch.no_grad():
                outputs = getattr(transformers, kind).from_pretrained(place).eval()(**batch)
            torch.save({key: value for key, value in outputs.items() if "logits" in key}, place + ".out")
        """,
        *(tmp_path / name for name in VISION_LANGUAGE),
        home=tmp_path,
    )
    for name, values in expected.items():
        found = torch.load(tmp_path / f"{name}.out")
        assert list(found) == list(values), name
        assert all(torch.equal(found[key], values[key]) for key in values), name


def logits_of(outputs: Any) -> Batch:
    return {key: value for key, value in outputs.items() if "logits" in key}
