"""Measured once: any budget is planned and factored as from the calibration set itself."""

import filecmp
import json
import os

import pytest
import torch
from models import FAMILIES
from safetensors import safe_open
from watch import Watch

from optimum_pgsvd import Measurements, PGSVDCompressor, PGSVDConfig
from optimum_pgsvd.errors import CalibrationError, CheckpointError, ConfigError
from optimum_pgsvd.streaming import measure, source, stored
from optimum_pgsvd.targets import find_blocks


BATCHES = 3


def config(name="llama", **settings):
    if not {"parameter_reduction", "tolerance", "ranks"} & settings.keys():
        settings["parameter_reduction"] = 0.3
    return PGSVDConfig(**{"dataset": FAMILIES[name].batches(BATCHES), "num_samples": 1000} | settings)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Tiny dense checkpoints by family."""
    folder = tmp_path_factory.mktemp("dense")

    def saved(name):
        if not (folder / name).exists():
            FAMILIES[name].build().save_pretrained(folder / name)
        return folder / name

    return saved


@pytest.fixture(scope="module")
def stats(checkpoints, tmp_path_factory):
    """Measurements by family and solver."""
    folder = tmp_path_factory.mktemp("stats")

    def measured(name="llama", solver="eigh"):
        output = folder / f"{name}-{solver}"
        if not output.exists():
            PGSVDCompressor(config(name, solver=solver)).measure_checkpoint(checkpoints(name), output)
        return output

    return measured


def weights_of(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


# The same bytes as from the calibration set


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "clip", "qwen3_moe", "albert"])
def test_compressing_from_measurements_is_compressing_from_the_data(checkpoints, stats, tmp_path, name):
    PGSVDCompressor(config(name)).compress_checkpoint(checkpoints(name), tmp_path / "data")
    PGSVDCompressor(config(name, dataset=stats(name))).compress_checkpoint(checkpoints(name), tmp_path / "stats")
    model = FAMILIES[name].build()
    PGSVDCompressor(config(name, dataset=stats(name))).compress(model)
    model.save_pretrained(tmp_path / "memory")
    for other in ("stats", "memory"):
        assert filecmp.cmp(tmp_path / "data/model.safetensors", tmp_path / other / "model.safetensors", shallow=False)


@pytest.mark.parametrize(
    "budget",
    [
        {"parameter_reduction": 0.6},
        {"tolerance": 0.4},
        {"ranks": {"*.mlp.*": 5}},
        {"parameter_reduction": 0.5, "allocation": "uniform"},
        {"parameter_reduction": 0.2, "groups": {"*.mlp.*": {"tolerance": 0.5}}},
        {"parameter_reduction": 0.4, "rank_multiple": 4},
        {"parameter_reduction": 0.4, "modules_to_not_convert": ["down_proj"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("solver", ["eigh", "als"])
def test_any_budget(checkpoints, stats, budget, solver):
    from_data, from_stats = (FAMILIES["llama"].build() for _ in range(2))
    expected = PGSVDCompressor(config(solver=solver, **budget)).compress(from_data)
    found = PGSVDCompressor(config(solver=solver, dataset=stats(solver=solver), **budget)).compress(from_stats)
    assert [(layer.name, layer.rank, layer.tokens) for layer in found.layers] == [
        (layer.name, layer.rank, layer.tokens if layer.rank is not None else 0) for layer in expected.layers
    ]
    assert all(torch.equal(value, from_data.state_dict()[name]) for name, value in from_stats.state_dict().items())


def test_no_block_runs(checkpoints, stats, tmp_path):
    model = FAMILIES["llama"].build()
    with Watch(model, find_blocks(model)) as watch:
        report = PGSVDCompressor(config(dataset=stats())).compress(model)
    assert watch.calls == []
    assert "grams" not in report.seconds
    assert all(layer.tokens == 3 * 4 * 20 for layer in report.layers if layer.rank is not None)


def test_planning_reads_no_weight(checkpoints, stats, monkeypatch):
    expected = PGSVDCompressor(config()).plan(FAMILIES["llama"].build())
    monkeypatch.setattr(stored.StoredTensor, "__getitem__", None)
    monkeypatch.setattr(source.StreamedModel, "load_outside", lambda *args: None)
    found = PGSVDCompressor(config(dataset=stats())).plan_checkpoint(checkpoints("llama"))
    assert [layer.rank for layer in found.layers] == [layer.rank for layer in expected.layers]


def test_what_is_kept(stats):
    measurements = Measurements(stats())
    q, k = (f"model.layers.0.self_attn.{name}_proj" for name in "qk")
    assert measurements.layers[k]["leader"] == q
    assert measurements.layers[q]["kind"] == "gram"
    assert measurements.layers["model.layers.0.mlp.down_proj"]["kind"] == "outputs"
    assert Measurements(stats(solver="als")).layers["model.layers.0.mlp.down_proj"]["kind"] == "gram"
    assert measurements.request["config"].keys().isdisjoint(measure.PLANNING)


# Interrupted, repeated


class Killed(BaseException):
    """Nothing that anyone catches."""


def test_an_interrupted_measurement_goes_on(checkpoints, stats, tmp_path, monkeypatch):
    written, write = [], measure.write_block

    def dying(path, *args):
        if len(written) == 1:
            raise Killed
        written.append(os.path.basename(path))
        write(path, *args)

    monkeypatch.setattr(measure, "write_block", dying)
    with pytest.raises(Killed):
        PGSVDCompressor(config()).measure_checkpoint(checkpoints("llama"), tmp_path / "out")
    again = []
    monkeypatch.setattr(
        measure, "write_block", lambda path, *args: (again.append(os.path.basename(path)), write(path, *args))
    )
    PGSVDCompressor(config()).measure_checkpoint(checkpoints("llama"), tmp_path / "out")
    assert (written, again) == (["model.layers.0.safetensors"], ["model.layers.1.safetensors"])
    for file in os.listdir(stats()):
        assert filecmp.cmp(stats() / file, tmp_path / "out" / file, shallow=False)


def test_a_finished_measurement_is_not_made_again(checkpoints, stats, monkeypatch):
    monkeypatch.setattr(measure, "carry_out", None)
    again = PGSVDCompressor(config(parameter_reduction=0.7)).measure_checkpoint(checkpoints("llama"), stats())
    assert again.layers == Measurements(stats()).layers
    with pytest.raises(CheckpointError, match="is not empty"):
        PGSVDCompressor(config(num_samples=2)).measure_checkpoint(checkpoints("llama"), stats())


# What goes wrong


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"solver": "svd"}, "nothing to measure"), ({"calibration": "anchored"}, "depends on the budget")],
)
def test_what_cannot_be_measured(checkpoints, tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        PGSVDCompressor(config(**settings)).measure_checkpoint(checkpoints("llama"), tmp_path / "out")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "als"}, "measure with solver='als'"),
        ({"calibration": "anchored"}, "cannot serve it"),
        ({"objective": "loss"}, "measures gradients, and the measurements that are the dataset hold none"),
        ({"allocation": "loss"}, "measures gradients, and the measurements that are the dataset hold none"),
    ],
)
def test_what_measurements_do_not_serve(stats, settings, message):
    model = FAMILIES["llama"].build()
    with pytest.raises((CalibrationError, ConfigError), match=message):
        PGSVDCompressor(config(dataset=stats(), **settings)).compress(model)


def test_measurements_hold_no_plan_by_loss(stats):
    """The singular values that they hold are of the weights alone."""
    with pytest.raises(ConfigError, match="chooses ranks by gradients on a calibration set, so there is no plan"):
        PGSVDCompressor(config(dataset=stats(), allocation="loss")).plan(FAMILIES["llama"].build())


def test_a_layer_that_was_not_measured(checkpoints, tmp_path):
    compressor = PGSVDCompressor(config(modules_to_not_convert=["o_proj"]))
    compressor.measure_checkpoint(checkpoints("llama"), tmp_path / "out")
    for work in ("plan", "compress"):
        with pytest.raises(CalibrationError, match=r"no measurement of model.layers.0.self_attn.o_proj"):
            getattr(PGSVDCompressor(config(dataset=tmp_path / "out")), work)(FAMILIES["llama"].build())


def test_measurements_of_another_model(stats):
    model = FAMILIES["llama"].build()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight *= 1.01
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CalibrationError, match=r"the weight of model.layers.1.mlp.up_proj .*another model"):
        PGSVDCompressor(config(dataset=stats())).compress(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_folder_without_measurements(tmp_path):
    with pytest.raises(CalibrationError, match=r"measurements.json; name a folder that `optimum-cli pgsvd measure`"):
        Measurements(tmp_path)


def test_a_layer_that_nothing_reached(checkpoints, tmp_path):
    batches = [{"input_ids": batch["input_ids"]} for batch in FAMILIES["llava"].batches(1)]
    with pytest.raises((CalibrationError, CheckpointError)):
        PGSVDCompressor(config("llava", dataset=batches)).measure_checkpoint(checkpoints("llava"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_index_is_json_with_the_request(stats):
    index = json.loads((stats() / "measurements.json").read_text())
    assert index["request"]["calibration"]
    assert len(index["layers"]) == 14
