"""ASVD's ranks: they follow from the loss that the model has with each layer really compressed alone."""

from __future__ import annotations

import copy
import itertools
from functools import cache
from typing import Any

import pytest
import reference
import torch
from models import FAMILIES, Batch
from torch import nn
from transformers import PreTrainedModel

from optimum_pgsvd import (
    CalibrationError,
    CompressionReport,
    ConfigError,
    DistributedError,
    NonFiniteError,
    PGSVDCompressor,
    PGSVDConfig,
)
from optimum_pgsvd.analysis import mean_loss, sweep_model
from optimum_pgsvd.factoring import calibration_of
from optimum_pgsvd.targets import find_targets


# Each layer is tried nine times, so few layers are.
DENSE = {"llama": ["v_proj", "o_proj", "gate_proj"], "clip": ["text_model", "mlp", "k_proj"], "mixtral": ["self_attn"]}


def build(name: str = "llama") -> PreTrainedModel:
    """Of one block, in float64, so that no order of losses hangs on rounding."""
    return FAMILIES[name].build(num_hidden_layers=1).double()


def config_for(reduction: float | None = 0.3, name: str = "llama", **fields: Any) -> PGSVDConfig:
    known = {"dataset": FAMILIES[name].batches(2), "modules_to_not_convert": DENSE.get(name, []), "num_samples": 10**6}
    return PGSVDConfig(reduction, **{"allocation": "asvd", **known, **fields})


def compressed(
    reduction: float | None = 0.3, name: str = "llama", model: Any = None, **fields: Any
) -> tuple[PreTrainedModel, CompressionReport]:
    model = model or build(name)
    return model, PGSVDCompressor(config_for(reduction, name, **fields)).compress(model)


def shapes_of(name: str = "llama") -> dict[str, tuple[int, int]]:
    shapes = find_targets(build(name), config_for(name=name)).shapes
    return {name: (shape.out_features, shape.in_features) for name, shape in shapes.items()}


@torch.no_grad()
def plain_loss(model: PreTrainedModel, batches: list[Batch]) -> float:
    """Of the next token; the batches are of one size."""
    losses = [reference.next_token_loss(model(**batch).logits, batch["input_ids"]) for batch in batches]
    return sum(losses) / len(losses)


@cache
def options_of(solver: str, storage: str) -> dict[str, list[reference.Option]]:
    """Each layer compressed alone, by a compression of its own for each of its ranks."""
    dense, batches = build(), FAMILIES["llama"].batches(2)
    options = {}
    for name, (m, n) in shapes_of().items():
        options[name] = [reference.Option(None, m * n, 0.0)]
        for rank in reversed(reference.ranks_at_shares(m, n, 1, storage)):
            model, request = copy.deepcopy(dense), {"allocation": "pareto", "ranks": {name: rank}}
            PGSVDCompressor(config_for(None, solver=solver, storage=storage, **request)).compress(model)
            parameters = reference.stored_parameters(m, n, rank, storage)
            options[name].insert(0, reference.Option(rank, parameters, plain_loss(model, batches)))
    return options


# The plan


@pytest.mark.parametrize(
    ("solver", "storage"),
    [("asvd", "factors"), ("als", "factors"), ("asvd", "pivoted")],
)
def test_the_plan_is_that_of_each_layer_really_compressed_alone(solver: str, storage: str) -> None:
    """By the solver that the model is compressed with, or the closed form where its factors cannot be cut."""
    options = options_of("eigh" if solver == "als" else solver, storage)
    plans = set()
    for reduction in ("0.2", "0.4", "0.7"):
        model, report = compressed(float(reduction), solver=solver, storage=storage)
        expected = reference.one_loss_for_all(options, reference.budget(shapes_of(), reduction))
        assert expected is not None
        ranks = tuple(layer.rank for layer in report.layers)
        assert ranks == tuple(expected[layer.name].rank for layer in report.layers)
        chosen = [option.error for option in expected.values() if option.rank is not None]
        assert report.search["thresholds"] == {"": pytest.approx(max(chosen), rel=1e-6)}
        plans.add(ranks)
    assert len(plans) == 3
    for name, found in report.search["layers"].items():
        assert found["ranks"] == [option.rank for option in options[name][:-1]]
        assert found["losses"] == pytest.approx([option.error for option in options[name][:-1]], rel=1e-6)


def test_what_is_tried_and_on_how_much(tmp_path) -> None:
    """At most 32 sequences, spread over the set; of each layer every rank once."""
    dense, config = build(), config_for(dataset=FAMILIES["llama"].batches(16))
    batches = calibration_of(dense, find_targets(dense, config), config).batches
    model, report = compressed(dataset=config.dataset)
    assert report.search["sequences"] == 32
    assert report.search["loss"] == pytest.approx(mean_loss(dense, batches[::2]), rel=1e-6)
    ranks = [reference.ranks_at_shares(*shape, 1) for shape in shapes_of().values()]
    assert report.search["evaluations"] == sum(map(len, ranks))
    model.save_pretrained(tmp_path)
    assert CompressionReport.load(tmp_path).search == report.search
    text = f"search: loss at most {report.search['thresholds']['']:.4f} with one layer compressed alone, "
    assert text + f"{report.search['loss']:.4f} dense; {sum(map(len, ranks))} tried on 32 sequences" in str(report)


@pytest.mark.parametrize(
    "fields",
    [
        {"calibration": "anchored"},
        {"correct_bias": True},
        {"objective": "loss"},
        {"calibration": "anchored", "refine_steps": 2},
    ],
    ids=str,
)
def test_whatever_factors_are_found_by_the_ranks_are_the_same(fields: dict) -> None:
    _, plain = compressed()
    _, report = compressed(**fields)
    assert report.search == plain.search
    assert [layer.rank for layer in report.layers] == [layer.rank for layer in plain.layers]


def test_each_budget_has_a_threshold_of_its_own() -> None:
    """As if the layers of each were all there is."""
    options = options_of("eigh", "factors")
    model, report = compressed(0.2, groups={"*.mlp.*": {"parameter_reduction": 0.6}})
    for glob, reduction in (("", "0.2"), ("*.mlp.*", "0.6")):
        shapes = {name: shape for name, shape in shapes_of().items() if (".mlp." in name) == bool(glob)}
        own = {name: options[name] for name in shapes}
        expected = reference.one_loss_for_all(own, reference.budget(shapes, reduction))
        layers = {layer.name: layer for layer in report.layers if layer.group == glob}
        assert {name: layer.rank for name, layer in layers.items()} == {n: o.rank for n, o in expected.items()}
        chosen = [option.error for option in expected.values() if option.rank is not None]
        assert report.search["thresholds"][glob] == pytest.approx(max(chosen), rel=1e-6)
    assert f"{report.search['thresholds']['*.mlp.*']:.4f} in *.mlp.*" in str(report)


def test_no_reduction_compresses_no_layer() -> None:
    _, report = compressed(0.0)
    assert {layer.rank for layer in report.layers} == {None}
    assert report.search["thresholds"] == {"": None}
    assert "search: no layer compressed, " in str(report)


def test_experts_are_compressed_alone_too() -> None:
    model, report = compressed(0.3, "mixtral")
    assert any(".experts.1." in name for name in report.search["layers"])
    assert list(report.search["layers"]) == [layer.name for layer in report.layers]
    assert report.parameter_reduction >= 0.3
    again, _ = compressed(None, "mixtral", ranks={x.name: x.rank for x in report.layers if x.rank})
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_images_and_texts_have_a_loss() -> None:
    dense = build("clip")
    model, report = compressed(0.3, "clip", model=copy.deepcopy(dense))
    assert report.search["loss"] == pytest.approx(mean_loss(dense, FAMILIES["clip"].batches(2)), rel=1e-6)
    assert report.parameter_reduction >= 0.3


def test_the_model_is_dense_where_a_search_fails() -> None:
    """With a layer compressed."""
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    runs = itertools.count()

    def fail(module: nn.Module, args: tuple) -> None:
        if any("left" in name for name, _ in module.named_modules()) and next(runs) == 20:
            raise KeyboardInterrupt

    handle = model.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        compressed(model=model)
    handle.remove()
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


# What is refused


REFUSED = {
    "tolerance": (
        {"parameter_reduction": None, "tolerance": 0.3},
        "allocation='asvd' takes parameter_reduction, not tolerance; use allocation='pareto'",
    ),
    "tolerance of a group": ({"groups": {"*.mlp.*": {"tolerance": 0.3}}}, "takes parameter_reduction, not tolerance"),
    "no data": ({"solver": "svd"}, "allocation='asvd' measures losses on a calibration set, and solver='svd' uses no"),
    "elastic": ({"elastic": True}, "an allocation that measures no more than weights"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_configs_that_are_refused(case: str) -> None:
    fields, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        PGSVDConfig(**{"parameter_reduction": 0.3, "allocation": "asvd"} | fields)


def test_what_cannot_run_the_model_is_refused(tmp_path, monkeypatch) -> None:
    model, config = build(), config_for()
    without = "allocation='asvd' finds ranks by running the model on a .* so there is no plan without it; compress the"
    with pytest.raises(ConfigError, match=without):
        PGSVDCompressor(config).plan(model)
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(ConfigError, match=without):
        PGSVDCompressor(config).compress_checkpoint(tmp_path / "dense", tmp_path / "out")
    with pytest.raises(ConfigError, match=without):
        sweep_model(model, PGSVDConfig(0.0, dataset=config.dataset), reductions=[0.3], allocations=["asvd"])
    PGSVDCompressor(PGSVDConfig(0.3, dataset=config.dataset)).measure_checkpoint(
        tmp_path / "dense", tmp_path / "stats"
    )
    with pytest.raises(ConfigError, match="runs the model on the calibration set, .* nor by measurements made before"):
        PGSVDCompressor(config_for(dataset=tmp_path / "stats")).compress(model)
    monkeypatch.setattr("optimum_pgsvd.factoring.search.Peers", lambda: type("Two", (), {"size": 2}))
    with pytest.raises(DistributedError, match="allocation='asvd' searches in one process only"):
        PGSVDCompressor(config).compress(model)


def test_an_elastic_checkpoint_is_not_cut_by_it(tmp_path) -> None:
    model = build()
    PGSVDCompressor(config_for(0.1, allocation="pareto", elastic=True)).compress(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="allocation='asvd' finds ranks by running the model"):
        type(model).from_pretrained(tmp_path, quantization_config=PGSVDConfig(0.3, allocation="asvd"))


def test_a_model_without_a_loss_is_told_before_it_is_measured(monkeypatch) -> None:
    def measured(*args: Any) -> None:
        raise AssertionError("measured first")

    monkeypatch.setattr("optimum_pgsvd.factoring.alone.factors_to_cut", measured)
    with pytest.raises(CalibrationError, match="BertForMaskedLM gives no loss for calibration batch 0"):
        compressed(name="bert")


def test_a_budget_below_a_tenth_of_each_layer_is_refused_before_data_is_read() -> None:
    with pytest.raises(ConfigError, match="parameter_reduction=0.95 cannot be met: the smallest ranks"):
        compressed(0.95, dataset="no such file.txt")


def test_a_loss_that_is_no_number_is_told() -> None:
    """As where activations overflow once a layer is compressed."""
    model = build()

    def overflow(module: Any, args: tuple, output: Any) -> Any:
        factor = 1.0 if isinstance(module.layers[0].mlp.up_proj, nn.Linear) else float("nan")
        return type(output)(last_hidden_state=output[0] * factor)

    model.model.register_forward_hook(overflow)
    with pytest.raises(NonFiniteError, match=r"the loss with model.layers.0.mlp.up_proj alone at rank \d+ is nan"):
        compressed(model=model)
