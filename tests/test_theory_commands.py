"""`optimum-cli pgsvd profile | sweep | bound | convergence`, as a user runs them."""

from __future__ import annotations

import importlib.util
import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
from optimum.commands.optimum_cli import main
from transformers import AutoModelForCausalLM

from optimum_pgsvd import PGSVDCompressor, PGSVDConfig
from optimum_pgsvd.analysis import evaluation_set, mean_loss


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, texts) -> tuple[Path, Path]:
    """Texts to calibrate on, and others."""
    folder = tmp_path_factory.mktemp("corpus")
    for name, part in (("calibration", texts[:40]), ("heldout", texts[40:])):
        lines = [json.dumps({"text": text}) + "\n" for text in part]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder / "calibration.jsonl", folder / "heldout.jsonl"


def run(monkeypatch, *arguments: Any, expect: int = 0) -> None:
    monkeypatch.setattr(sys, "argv", ["optimum-cli", "pgsvd", *map(str, arguments)])
    if not expect:
        return main()
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == expect
    return None


def result(folder: Path, name: str) -> dict[str, Any]:
    """The JSON, with the picture beside it looked at."""
    header = (folder / f"{name}.png").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", header[16:])
    assert width > 400
    assert height > 400
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def test_profile(dense, corpus, tmp_path, monkeypatch, capsys) -> None:
    options = ["--dataset", corpus[0], "--sequence-length", 16, "--thresholds", 0.03, 0.3]
    run(monkeypatch, "profile", "-m", dense, "-o", tmp_path, *options)
    values = result(tmp_path, "profile")
    for kind in ("weights", "outputs"):
        assert len(values[kind]["layers"]) == 14
        distances = [layer["distance"] for layer in values[kind]["layers"].values()]
        close = sum(distance <= 0.3 for distance in distances) / 14
        assert values[kind]["share_of_layers_within"]["common envelope"]["0.3"] == close
    assert values["environment"]["torch"]
    assert values["model"]["name"] == dense.name
    printed = capsys.readouterr().out
    assert "14 layers in a band" in printed
    assert f"written: {tmp_path / 'profile.json'}, {tmp_path / 'profile.png'}" in printed


def test_sweep(dense, corpus, tmp_path, monkeypatch, capsys) -> None:
    """A point of it is what compressing and measuring there gives."""
    common = ["--sequence-length", 16, "--num-samples", 16]
    options = ["--evaluate", corpus[1], "--evaluation-samples", 8, "--allocations", "pareto", "loss"]
    options += ["--reductions", 0.2, 0.5]
    run(monkeypatch, "sweep", "-m", dense, "--dataset", corpus[0], "-o", tmp_path, *common, *options)
    values = result(tmp_path, "sweep")
    assert [(p["allocation"], p["asked"]["parameter_reduction"]) for p in values["points"]] == [
        ("pareto", 0.2), ("pareto", 0.5), ("loss", 0.2), ("loss", 0.5),
    ]  # fmt: skip
    config = PGSVDConfig(0.5, dataset=str(corpus[0]), sequence_length=16, num_samples=16)
    model = AutoModelForCausalLM.from_pretrained(dense)
    evaluation = evaluation_set(model, config, str(corpus[1]), 8)
    assert values["dense"]["loss"] == mean_loss(model, evaluation)
    report = PGSVDCompressor(config).compress(model)
    point = values["points"][1]
    assert point["loss"] == mean_loss(model, evaluation)
    assert point["ranks"] == {layer.name: layer.rank for layer in report.layers if layer.rank is not None}
    assert f"{point['parameters']:,}" in capsys.readouterr().out


def test_bound(dense, corpus, tmp_path, monkeypatch, capsys) -> None:
    common = ["--sequence-length", 16, "--num-samples", 8, "--reductions", 0.3, "--evaluate", corpus[1]]
    run(monkeypatch, "bound", "-m", dense, "--dataset", corpus[0], "-o", tmp_path, *common)
    values = result(tmp_path, "bound")
    total = values["bounds"][0]["total"]
    assert total["bound"] >= abs(total["first_order"])
    assert all(plan["evaluation_loss"] for plan in values["allocations"][0]["plans"].values())
    printed = capsys.readouterr().out
    assert "measured α" in printed
    assert "rank correlation" in printed


def test_convergence(dense, corpus, tmp_path, monkeypatch, capsys) -> None:
    common = ["--sequence-length", 16, "--parameter-reduction", 0.5, "--sweeps", 3]
    run(monkeypatch, "convergence", "-m", dense, "--dataset", corpus[0], "-o", tmp_path, *common)
    values = result(tmp_path, "convergence")
    assert all(len(layer["objectives"]) == 4 for layer in values["layers"])
    assert values["median"][3] < values["median"][0]
    assert "objective relative to the closed form, 14 layers" in capsys.readouterr().out


def test_a_result_is_kept_and_found_before_any_work(dense, tmp_path, monkeypatch, capsys) -> None:
    """The model is not even there."""
    run(monkeypatch, "profile", "-m", dense, "-o", tmp_path, "--no-plots")
    before = (tmp_path / "profile.json").read_bytes()
    assert not (tmp_path / "profile.png").exists()
    run(monkeypatch, "profile", "-m", tmp_path / "absent", "-o", tmp_path, expect=2)
    assert "profile.json exists already; name another folder, or pass --overwrite" in capsys.readouterr().err
    assert (tmp_path / "profile.json").read_bytes() == before
    run(monkeypatch, "profile", "-m", dense, "-o", tmp_path, "--overwrite")
    result(tmp_path, "profile")


def test_without_matplotlib_plots_are_refused_and_json_is_not(dense, tmp_path, monkeypatch, capsys) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "optimum_pgsvd.analysis.plots.find_spec", lambda name: None if name == "matplotlib" else found(name)
    )
    run(monkeypatch, "profile", "-m", dense, "-o", tmp_path / "out", expect=2)
    assert "pip install 'optimum-pgsvd[plots]', or pass --no-plots" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    run(monkeypatch, "profile", "-m", dense, "-o", tmp_path / "out", "--no-plots")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["profile.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep", "--reductions", "1.5", "--dataset", "self"], "outside [0, 1)"),
        (["bound", "--reductions", "-1", "--dataset", "self"], "outside [0, 1)"),
        (["sweep", "--allocations", "greedy", "--dataset", "self"], "allocation='greedy' is not known"),
        (["sweep", "--dataset", "self", "--evaluate", "absent.jsonl"], "the dataset file absent.jsonl does not exist"),
        (["profile", "--dataset", "absent.jsonl"], "the dataset file absent.jsonl does not exist"),
        (["sweep"], "solver='eigh' needs calibration data"),
        (["bound"], "solver='eigh' needs calibration data"),
        (["convergence", "--ranks", "absent.json"], "--ranks absent.json cannot be read"),
        (["convergence", "--ranks", __file__], f"--ranks {__file__} cannot be read"),
        (["profile", "--dtype", "float7"], "argument --dtype: invalid choice: 'float7'"),
        (["profile", "--solver", "svd"], "unrecognized arguments: --solver svd"),
        (["convergence", "--parameter-reduction", "0.2", "--num-iterations", "3"], "unrecognized arguments"),
    ],
)
def test_errors_are_told_before_a_model_is_loaded(tmp_path, monkeypatch, capsys, arguments, message) -> None:
    """The model is not even there; and options that would have no effect are none."""
    verb, *rest = arguments
    run(monkeypatch, verb, "-m", tmp_path / "absent", "-o", tmp_path / "out", "--no-plots", *rest, expect=2)
    assert message in capsys.readouterr().err


def test_what_is_no_model_is_named(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    run(monkeypatch, "profile", "-m", tmp_path, "-o", tmp_path / "out", "--no-plots", expect=2)
    assert f"no model can be read from '{tmp_path}'" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_told_before_any_work(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "file").touch()
    for verb, where in (("profile", ["-o"]), ("plan", ["--parameter-reduction", 0.2, "--json"])):
        run(monkeypatch, verb, "-m", tmp_path / "absent", *where, tmp_path / "file" / "a" / "b", expect=2)
        assert "cannot be made" in capsys.readouterr().err
    monkeypatch.setattr("os.access", lambda path, mode: False)
    run(monkeypatch, "profile", "-m", tmp_path / "absent", "-o", tmp_path, expect=2)
    assert f"nothing can be written into the folder {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep", "--calibration", "anchored"], "needs calibration='parallel'"),
        (["bound", "--solver", "als"], "solver='als' is not nested"),
        (["convergence"], "exactly one of"),
    ],
)
def test_errors_are_one_line(dense, corpus, tmp_path, monkeypatch, capsys, arguments, message) -> None:
    data = [] if "--dataset" in arguments else ["--dataset", corpus[0]]
    verb, *rest = arguments
    run(monkeypatch, verb, "-m", dense, "-o", tmp_path, *data, "--sequence-length", 16, *rest, expect=2)
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.glob("*.json"))
