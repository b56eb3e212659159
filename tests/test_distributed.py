"""Several processes give what one gives, and stop together."""

import filecmp
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import FAMILIES
from torch import nn
from work_together import NAMES

from optimum_pgsvd import PGSVDCompressor, PGSVDConfig
from optimum_pgsvd.checkpoint import ELASTIC_NAME
from optimum_pgsvd.distributed import Peers
from optimum_pgsvd.errors import UnsupportedModelError


SCRIPT = Path(__file__).parent / "work_together.py"


def torchrun(processes, *arguments):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), str(SCRIPT))
    command = [sys.executable, *launcher, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process makes."""
    folder = tmp_path_factory.mktemp("alone")
    FAMILIES["t5"].build().save_pretrained(folder / "t5")
    done = subprocess.run([sys.executable, str(SCRIPT), str(folder)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module", params=[2, 4])
def together(request, alone, tmp_path_factory):
    """What several processes make of the same."""
    folder = tmp_path_factory.mktemp(f"together{request.param}")
    (folder / "t5").symlink_to(alone / "t5")
    done = torchrun(request.param, folder)
    assert done.returncode == 0, done.stderr
    return folder, request.param


def loaded(folder, who):
    return torch.load(folder / f"in_memory-{who}.pt", weights_only=False)


def test_every_process_has_the_model_that_one_process_makes(alone, together):
    """Sums of float64 in another order: factors in float32 differ in a rare last bit, if at all."""
    folder, processes = together
    expected = loaded(alone, "alone")
    for rank in range(processes):
        found = loaded(folder, rank)
        assert (
            found.keys()
            == expected.keys()
            >= {("llama", "loss"), ("t5", "loss"), ("llama", "fwsvd"), *((name, "anchored") for name in NAMES)}
        )
        for case in expected:
            (state, layers), (expected_state, expected_layers) = found[case], expected[case]
            assert [layer[:3] for layer in layers] == [layer[:3] for layer in expected_layers], case
            errors = [layer[3] for layer in layers if layer[3] is not None]
            assert errors == pytest.approx([layer[3] for layer in expected_layers if layer[3] is not None], rel=1e-5)
            for name, value in state.items():
                torch.testing.assert_close(value, expected_state[name], rtol=1e-5, atol=1e-6)


def test_the_processes_agree_to_the_last_bit(together):
    folder, processes = together
    first = loaded(folder, 0)
    for rank in range(1, processes):
        for case, (state, layers) in loaded(folder, rank).items():
            assert layers == first[case][1]
            assert all(torch.equal(value, first[case][0][name]) for name, value in state.items())


@pytest.mark.parametrize("calibration", ["parallel", "anchored"])
def test_a_checkpoint_on_disk(alone, together, calibration):
    folder, _ = together
    from safetensors.torch import load_file

    expected = load_file(alone / f"{calibration}-alone" / "model.safetensors")
    found = load_file(folder / f"{calibration}-together" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    for file in ("config.json", "README.md"):
        assert filecmp.cmp(
            alone / f"{calibration}-alone" / file, folder / f"{calibration}-together" / file, shallow=False
        )
    assert not list(folder.glob(".*.pgsvd"))


def test_an_elastic_checkpoint_on_disk(alone, together):
    from safetensors.torch import load_file

    folder, _ = together
    names = sorted(path.name for path in (alone / "elastic-alone").iterdir())
    assert ELASTIC_NAME in names
    assert sorted(path.name for path in (folder / "elastic-together").iterdir()) == names
    expected, found = (load_file(f / ELASTIC_NAME) for f in (alone / "elastic-alone", folder / "elastic-together"))
    factors = [name for name in expected if name.endswith("left.weight")]
    assert len(factors) > 2
    assert all(expected[name].abs().max() > 0 for name in factors)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


def test_measurements(alone, together):
    from safetensors.torch import load_file

    folder, _ = together
    layers = json.loads((folder / "stats-together" / "measurements.json").read_text())["layers"]
    assert layers == json.loads((alone / "stats-alone" / "measurements.json").read_text())["layers"]
    for file in {layer["file"] for layer in layers.values()}:
        expected = load_file(alone / "stats-alone" / file)
        for name, value in load_file(folder / "stats-together" / file).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)


def test_a_process_may_have_batches_that_run_other_blocks(tmp_path):
    from safetensors.torch import load_file

    FAMILIES["llava"].build().save_pretrained(tmp_path / "llava")
    one = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path), "mixed"], capture_output=True, text=True)
    two = torchrun(2, tmp_path, "mixed")
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    for calibration in ("parallel", "anchored"):
        found, expected = (
            load_file(tmp_path / f"mixed-{calibration}-{who}" / "model.safetensors") for who in ("together", "alone")
        )
        assert found.keys() == expected.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("other_data", "have another calibration set"),
        ("too_few", "1 calibration batches cannot be shared among 2 processes"),
        ("damaged", "is not empty"),
    ],
)
def test_what_is_wrong_is_said_by_every_process(alone, which, message):
    done = torchrun(2, alone, which)
    assert done.returncode != 0
    assert all(f"process {rank}: " in done.stdout for rank in range(2))
    assert done.stdout.count(message) == 2


def test_a_process_that_dies_stops_the_run(alone):
    done = torchrun(2, alone, "dies")
    assert done.returncode != 0
    assert "exitcode  : 7" in done.stderr


def test_layers_are_shared_out_by_their_cost():
    peers = Peers()
    assert (peers.size, peers.rank, peers.is_main, list(peers.mine(3))) == (1, 0, True, [0, 1, 2])
    peers.size = 2
    owners = peers.share_out({"a": 5.0, "b": 3.0, "c": 3.0, "d": 1.0})
    assert owners == {"a": 0, "b": 1, "c": 1, "d": 0}
    assert list(peers.mine(5)) == [0, 2, 4]


def test_a_model_split_over_processes_is_refused():
    class DTensor(nn.Parameter):
        """Stands for torch.distributed's, which needs a process group."""

    model = FAMILIES["llama"].build()
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = DTensor(layer.weight.data)
    batches = FAMILIES["llama"].batches(1)
    with pytest.raises(UnsupportedModelError, match=r"layers.0.mlp.up_proj.weight.*compress_checkpoint"):
        PGSVDCompressor(PGSVDConfig(parameter_reduction=0.3, dataset=batches)).compress(model)
