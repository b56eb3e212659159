"""`optimum-cli pgsvd`, as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from optimum_pgsvd import CheckpointError, CompressionReport, ConfigError, PGSVDCompressor, PGSVDConfig
from optimum_pgsvd.checkpoint import new_folder, read_contents


CLI = Path(sys.executable).parent / "optimum-cli"


def run(*arguments, expect=0):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([CLI, "pgsvd", *map(str, arguments)], capture_output=True, text=True, env=environment)
    assert done.returncode == expect, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, texts):
    file = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


@pytest.fixture(scope="module")
def compressed(dense, corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("cli") / "out"
    arguments = ["--parameter-reduction", 0.3, "--group", "*.mlp.*", "tolerance=0.5", "--sequence-length", 32]
    done = run("compress", "--model", dense, "--dataset", corpus, "--output", output, *arguments)
    return output, done


def test_help_imports_neither_torch_nor_transformers():
    code = (
        "import sys; from optimum.commands.optimum_cli import main; sys.argv = ['optimum-cli', 'pgsvd', '--help']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in ("compress", "plan", "inspect"))


def test_compress_writes_a_loadable_checkpoint_and_prints_the_report(compressed):
    output, done = compressed
    report = CompressionReport.load(output)
    assert report.summary().splitlines()[0] in done.stdout
    mlp = [layer for layer in report.layers if ".mlp." in layer.name]
    assert mlp
    assert all(layer.tolerance == 0.5 and layer.group == "*.mlp.*" for layer in mlp)
    contents = read_contents(output)
    assert {name: factor[1] for name, factor in contents.factors.items()} == {
        layer.name: layer.rank for layer in report.layers if layer.rank
    }
    assert sorted(path.name for path in output.parent.iterdir()) == ["out"]
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr


def test_inspect_reads_headers_and_report(compressed):
    output, _ = compressed
    printed = run("inspect", output).stdout
    report = CompressionReport.load(output)
    assert f"{len(read_contents(output).factors)} low-rank layers" in printed
    assert all(layer.name in printed for layer in report.layers)


def test_plan_writes_json_and_touches_nothing(dense, tmp_path):
    before = {path: path.read_bytes() for path in dense.iterdir()}
    run("plan", "--model", dense, "--parameter-reduction", 0.4, "--json", tmp_path / "plan.json")
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert 0.4 <= plan["targets"]["parameter_reduction"] < 0.42
    assert {path: path.read_bytes() for path in dense.iterdir()} == before


def test_storage_is_planned_compressed_and_inspected(dense, corpus, tmp_path):
    arguments = ["--model", dense, "--parameter-reduction", 0.4, "--storage", "pivoted"]
    run("plan", *arguments, "--json", tmp_path / "plan.json")
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert 0.4 <= plan["targets"]["parameter_reduction"] < 0.42
    run("compress", *arguments, "--dataset", corpus, "--sequence-length", 32, "--output", tmp_path / "out")
    report, contents = CompressionReport.load(tmp_path / "out"), read_contents(tmp_path / "out")
    assert [layer.rank for layer in report.layers] == [layer["rank"] for layer in plan["layers"]]
    assert (report.model_after.parameters, report.model_after.bytes) == tuple(plan["model_after"].values())
    shapes = {layer.name: (layer.shape[0], layer.rank, layer.shape[1]) for layer in report.layers if layer.rank}
    assert contents.factors == shapes
    printed = run("inspect", tmp_path / "out").stdout
    # the files hold one element more for each layer, its tripwire
    held = report.model_after.parameters + len(shapes)
    assert f"{len(shapes)} low-rank layers, stored as pivoted; {held:,} parameters in the files" in printed


@pytest.mark.parametrize("part", ["basis.weight", "coefficients.weight", "order"])
def test_inspect_names_what_does_not_fit_a_rank(part, dense, tmp_path):
    config = PGSVDConfig(parameter_reduction=0.4, solver="svd", storage="pivoted")
    AutoModelForCausalLM.from_pretrained(dense, quantization_config=config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(key for key in tensors if key.endswith(f"up_proj.{part}"))
    tensors[name] = tensors[name][1:].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=name.removesuffix(f".{part}").replace(".", r"\.") + " rank"):
        read_contents(tmp_path)


def test_compress_by_loss_with_refinement(dense, corpus, tmp_path):
    arguments = ["--objective", "loss", "--allocation", "loss", "--calibration", "anchored", "--refine-steps", 4]
    more = ["--parameter-reduction", 0.3, "--sequence-length", 16, "--batch-size", 2]
    run("compress", "-m", dense, "--dataset", corpus, "-o", tmp_path / "out", *arguments, *more)
    report = CompressionReport.load(tmp_path / "out")
    assert (report.config["objective"], report.config["allocation"], report.config["refine_steps"]) == (
        "loss",
        "loss",
        4,
    )
    assert all((layer.refined is None) == (layer.rank is None) for layer in report.layers)
    assert {"gradients", "refinement"} <= set(report.seconds)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.quantization_config.objective == "loss"


def test_a_plan_by_loss_is_refused(dense):
    done = run("plan", "-m", dense, "--parameter-reduction", 0.4, "--allocation", "loss", expect=2)
    assert "allocation='loss' chooses ranks by gradients on a calibration set, so there is no plan" in done.stderr


def test_ranks_from_a_file(dense, corpus, tmp_path):
    (tmp_path / "ranks.json").write_text(json.dumps({"*.q_proj": 3}))
    run("compress", "-m", dense, "--ranks", tmp_path / "ranks.json", "--solver", "svd", "-o", tmp_path / "out")
    assert set(read_contents(tmp_path / "out").config.ranks.values()) == {3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parameter-reduction", "1.5"], "outside [0, 1)"),
        (["--parameter-reduction", "0.2", "--tolerance", "0.2"], "exactly one of"),
        ([], "exactly one of"),
        (["--parameter-reduction", "0.2", "--solver", "qr"], "known are als, asvd, eigh, fwsvd, svd, svd_llm"),
        (["--parameter-reduction", "0.2", "--group", "*.mlp.*", "half"], "write tolerance=0.3"),
        (
            ["--parameter-reduction", "0.2", "--solver", "svd", "--modules-to-not-convert", "nothing"],
            "'nothing' matches no linear layer",
        ),
        (["--parameter-reduction", "0.2"], "needs calibration data"),
        (["--parameter-reduction", "0.2", "--dataset", "absent.jsonl"], "absent.jsonl does not exist"),
    ],
)
def test_errors_are_one_line_and_leave_no_output(dense, tmp_path, arguments, message):
    done = run("compress", "-m", dense, "-o", tmp_path / "out", *arguments, expect=2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_full_folder_is_kept_unless_told_to_overwrite(dense, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    arguments = ["compress", "-m", dense, "-o", tmp_path / "out", "--parameter-reduction", "0.3", "--solver", "svd"]
    assert "not empty" in run(*arguments, expect=2).stderr
    assert (tmp_path / "out" / "precious").read_text() == "mine"
    run(*arguments, "--overwrite")
    assert not (tmp_path / "out" / "precious").exists()
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_new_folder_appears_whole_or_not_at_all(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")

    def fail():
        with new_folder(tmp_path / "out", overwrite=True) as folder:
            Path(folder, "new").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"), new_folder(tmp_path / "file"):
        pass


def test_inspect_names_what_is_wrong(dense, compressed, tmp_path):
    with pytest.raises(CheckpointError, match="quant_method is None"):
        read_contents(dense)
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        read_contents(tmp_path)
    output, _ = compressed
    config = json.loads((output / "config.json").read_text())
    name = next(iter(config["quantization_config"]["ranks"]))
    config["quantization_config"]["ranks"][name] += 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((output / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=f"the config gives {name} rank"):
        read_contents(tmp_path)


def test_optimum_s_interface_compresses_and_saves(dense, texts, tmp_path):
    config = PGSVDConfig(parameter_reduction=0.3, dataset=texts, sequence_length=32)
    compressor = PGSVDCompressor.from_pretrained(dense, config=config)
    assert type(compressor.model).__name__ == "LlamaForCausalLM"
    report = compressor.quantize(tmp_path / "out")
    assert CompressionReport.load(tmp_path / "out").layers == report.layers
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(3, 20)[None]
    assert torch.equal(loaded(input_ids=ids).logits, compressor.model(input_ids=ids).logits)
    with pytest.raises(CheckpointError, match="not empty"):
        PGSVDCompressor.from_pretrained(dense, config=config).quantize(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"from_pretrained\(model, config=\.\.\.\)"):
        PGSVDCompressor(config).quantize(tmp_path / "other")


@pytest.mark.parametrize("way", ["--stream", "--no-stream"])
def test_an_elastic_checkpoint_is_cut_by_compressing_it(way, dense, tmp_path):
    out, smaller, direct = (tmp_path / name for name in ("out", "smaller", "direct"))
    budget = ["--parameter-reduction", 0.4]
    start = ["--solver", "svd", "--parameter-reduction", 0.05, "--elastic", way]
    run("compress", "--model", dense, *start, "--output", out)
    inspected = run("inspect", out).stdout
    assert "elastic: " in inspected
    assert f"{sum(read_contents(out).dtypes.values()):,} parameters in the files" in inspected
    run("compress", "--model", out, *budget, "--output", smaller)
    run("compress", "--model", dense, "--solver", "svd", *budget, "--output", direct)
    assert read_contents(smaller).factors == read_contents(direct).factors
    assert "elastic: " not in run("inspect", smaller).stdout
    done = run("compress", "--model", out, "--parameter-reduction", 0.01, "--output", tmp_path / "larger", expect=2)
    assert "error: the checkpoint gives " in done.stderr


def test_every_option_reaches_the_config():
    from argparse import ArgumentParser

    from optimum_pgsvd.commands.arguments import config_of
    from optimum_pgsvd.commands.pgsvd import CompressCommand

    parser = ArgumentParser()
    CompressCommand.parse_args(parser)
    given = ["--model", "m", "--output", "o", "--parameter-reduction", "0.3"]
    assert config_of(parser.parse_args(given)) == PGSVDConfig(0.3)
    options = ["--correct-bias", "--objective", "loss", "--calibration", "anchored", "--refine-steps", "7"]
    expected = PGSVDConfig(0.3, correct_bias=True, objective="loss", calibration="anchored", refine_steps=7)
    assert config_of(parser.parse_args([*given, *options])) == expected
