"""Runs that are interrupted, taken up, repeated and changed: the same bytes, and nothing lost or done twice."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from models import FAMILIES
from streamed import Killed, assert_same_checkpoint, contents, failing, in_memory, on_disk, request

from optimum_pgsvd import factoring
from optimum_pgsvd.errors import CalibrationError, CheckpointError
from optimum_pgsvd.report import CompressionReport
from optimum_pgsvd.streaming import run, spill, weights
from optimum_pgsvd.streaming.output import CompressedCheckpoint
from optimum_pgsvd.streaming.shards import ShardWriter
from optimum_pgsvd.streaming.workspace import Workspace


LLAMA = FAMILIES["llama"]
CALIBRATIONS = ("parallel", "anchored")
BLOCKS = [*(f"model.layers.{number}" for number in range(3)), None]
LAYERS = 7  # of a block


@pytest.fixture(autouse=True)
def all_is_large(monkeypatch):
    monkeypatch.setattr(weights, "LARGE", 0)
    monkeypatch.setattr(spill, "SMALLEST", 1)
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    LLAMA.build(num_hidden_layers=3).save_pretrained(folder, max_shard_size="50KB")
    return folder


@pytest.fixture(scope="module")
def expected(dense, tmp_path_factory):
    folder = tmp_path_factory.mktemp("expected")
    return {each: in_memory(dense, folder / each, config(each)) for each in CALIBRATIONS}


def config(calibration="parallel", **settings):
    return request(LLAMA, calibration=calibration, **settings)


@pytest.fixture
def done(monkeypatch):
    """Counts the layers that are factored and the plans that are measured."""
    counts = Counter()
    solve, plan = factoring.layer.solve, run.plan_ranks

    def counted_solve(*args):
        counts["layers"] += 1
        return solve(*args)

    def counted_plan(*args):
        counts["plans"] += 1
        return plan(*args)

    monkeypatch.setattr(factoring.layer, "solve", counted_solve)
    monkeypatch.setattr(run, "plan_ranks", counted_plan)
    return counts


def interrupted(monkeypatch, source, output, config, place, number, before=True, error=Killed):
    """Start a run, and let it end so."""
    with monkeypatch.context() as patch:
        failing(patch, place, number, before, error)
        with pytest.raises(error, match="here"):
            on_disk(source, output, config)


def beside(output):
    return output.parent / f".{output.name}.pgsvd"


def finished_blocks(output):
    path = beside(output) / "progress.jsonl"
    return [json.loads(line)["block"] for line in path.read_text().splitlines()] if path.exists() else []


PLACES = {
    "plan": (Workspace, "keep_plan"),
    "allocate": (ShardWriter, "allocate"),
    "tensor": (ShardWriter, "write"),
    "sync": (ShardWriter, "sync"),
    "block": (Workspace, "keep_block"),
    "finish": (CompressedCheckpoint, "finish"),
    "index": (ShardWriter, "write_index"),
    "artifacts": (shutil, "copytree"),
    "publish": (Workspace, "publish"),
}


# Interrupted


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize("number", range(1, len(BLOCKS) + 1))
@pytest.mark.parametrize("before", [True, False], ids=["not noted", "noted"])
def test_a_run_goes_on_at_the_block_where_it_stopped(
    before, number, calibration, dense, expected, tmp_path, done, monkeypatch
):
    output = tmp_path / "mine"
    interrupted(monkeypatch, dense, output, config(calibration), PLACES["block"], number, before)
    finished = number - before
    assert finished_blocks(output) == BLOCKS[:finished]
    assert done == {"layers": LAYERS * min(number, 3), "plans": 1}
    done.clear()
    on_disk(dense, output, config(calibration))
    assert_same_checkpoint(output, expected[calibration])
    assert done == Counter(layers=LAYERS * max(3 - finished, 0))


@pytest.mark.parametrize(
    ("place", "number", "before"),
    [
        ("plan", 1, True),
        ("plan", 1, False),
        ("allocate", 1, False),
        ("tensor", 1, True),
        ("tensor", 5, False),
        ("tensor", 20, True),
        ("tensor", 40, False),
        ("tensor", 72, True),
        ("sync", 2, True),
        ("finish", 1, True),
        ("finish", 1, False),
        ("index", 1, False),
        ("artifacts", 1, False),
        ("publish", 1, True),
    ],
)
def test_a_run_may_be_interrupted_anywhere(place, number, before, dense, expected, tmp_path, done, monkeypatch):
    output = tmp_path / "mine"
    interrupted(monkeypatch, dense, output, config("anchored"), PLACES[place], number, before)
    assert not output.exists()
    finished = finished_blocks(output)
    assert len(finished) == {"tensor": (number - 1) // 23, "sync": 1, "plan": 0, "allocate": 0}.get(place, 4)
    done.clear()
    on_disk(dense, output, config("anchored"))
    assert_same_checkpoint(output, expected["anchored"])
    assert done["plans"] == ((place, before) == ("plan", True))
    assert done["layers"] == LAYERS * max(3 - len(finished), 0)


@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_a_run_that_is_interrupted_after_every_block_comes_to_its_end(
    calibration, dense, expected, tmp_path, done, monkeypatch
):
    output = tmp_path / "mine"
    for finished in range(1, len(BLOCKS) + 1):
        interrupted(
            monkeypatch, dense, output, config(calibration), PLACES["block"], 1, before=False, error=KeyboardInterrupt
        )
        assert len(finished_blocks(output)) == finished
    on_disk(dense, output, config(calibration))
    assert_same_checkpoint(output, expected[calibration])
    assert done == {"layers": LAYERS * 3, "plans": 1}


@pytest.mark.parametrize(
    ("name", "storage"),
    [("t5", "factors"), ("mixtral", "factors"), ("clip", "factors"), ("gpt_oss", "factors"), ("gpt2", "pivoted")],
)
def test_other_families_go_on_as_well(name, storage, tmp_path, done, monkeypatch):
    family = FAMILIES[name]
    family.build().save_pretrained(tmp_path / "dense")
    whole = request(family, calibration="anchored", storage=storage)
    expected = in_memory(tmp_path / "dense", tmp_path / "expected", whole)
    done.clear()
    interrupted(monkeypatch, tmp_path / "dense", tmp_path / "mine", whole, PLACES["block"], 2, before=False)
    on_disk(tmp_path / "dense", tmp_path / "mine", whole)
    assert_same_checkpoint(tmp_path / "mine", expected)
    factored = [layer for layer in CompressionReport.load(expected).layers if layer.rank is not None]
    assert done["layers"] == len(factored)


def test_without_data_finished_blocks_are_not_even_read(dense, tmp_path, done, monkeypatch):
    given = config(ranks={"*": 4}, solver="svd", dataset=None)
    expected = in_memory(dense, tmp_path / "expected", given)
    interrupted(monkeypatch, dense, tmp_path / "mine", given, PLACES["block"], 2, before=False)
    load, loaded = weights.StreamedWeights.load, []
    monkeypatch.setattr(weights.StreamedWeights, "load", lambda self, name: (loaded.append(name), load(self, name)))
    on_disk(dense, tmp_path / "mine", given)
    assert_same_checkpoint(tmp_path / "mine", expected)
    assert loaded == BLOCKS[2:3]


@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_a_note_that_was_not_written_to_its_end_does_not_count(
    calibration, dense, expected, tmp_path, done, monkeypatch
):
    output = tmp_path / "mine"
    interrupted(monkeypatch, dense, output, config(calibration), PLACES["block"], 3, before=False)
    notes = beside(output) / "progress.jsonl"
    notes.write_bytes(notes.read_bytes()[:-100])
    done.clear()
    on_disk(dense, output, config(calibration))
    assert_same_checkpoint(output, expected[calibration])
    assert done == {"layers": LAYERS}


def test_tensors_are_on_disk_before_their_block_is_noted(dense, tmp_path, monkeypatch):
    events = []

    def recorded(owner, name):
        method = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: (events.append(name), method(*args))[1])

    recorded(ShardWriter, "sync")
    recorded(ShardWriter, "write")
    recorded(Workspace, "keep_block")
    on_disk(dense, tmp_path / "mine", config())
    notes = [number for number, event in enumerate(events) if event == "keep_block"]
    assert len(notes) == len(BLOCKS)
    assert all(events[number - 1] == "sync" for number in notes)


def test_seconds_add_up(dense, tmp_path, monkeypatch):
    output = tmp_path / "mine"
    interrupted(monkeypatch, dense, output, config(), PLACES["block"], 2, before=False)
    path = beside(output) / "progress.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[-1]["seconds"] = dict.fromkeys(lines[-1]["seconds"], 1000.0)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    on_disk(dense, output, config())
    seconds = CompressionReport.load(output).seconds
    assert all(1000 <= value < 1100 for value in seconds.values())
    assert seconds["data"] > 1000


KILLS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from optimum_pgsvd import PGSVDCompressor, PGSVDConfig

source, output, kills = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
batches = torch.load(sys.argv[4])
config = PGSVDConfig(parameter_reduction=0.3, dataset=batches, num_samples=1000, calibration="anchored")
notes = output.parent / f".{output.name}.pgsvd" / "progress.jsonl"
chance = random.Random(0)

def work():
    PGSVDCompressor(config).compress_checkpoint(source, output, max_shard_size="30KB", activation_memory=0)

def finished():
    return notes.read_text().count("\\n") if notes.exists() else 0

for number in range(kills):
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    while finished() <= number:
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)
    print("killed" if os.WIFSIGNALED(os.waitpid(child, 0)[1]) else "too late", finished())
work()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks")
def test_a_process_that_is_killed_several_times(tmp_path):
    LLAMA.build(num_hidden_layers=6).save_pretrained(tmp_path / "dense")
    torch.save(LLAMA.batches(3), tmp_path / "batches")
    expected = in_memory(tmp_path / "dense", tmp_path / "expected", config("anchored"))
    command = [sys.executable, "-c", KILLS, tmp_path / "dense", tmp_path / "mine", "4", tmp_path / "batches"]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("killed") >= 3, done.stdout
    assert_same_checkpoint(tmp_path / "mine", expected)


# Things go wrong


def test_a_full_disk_is_reported_and_the_run_can_go_on(dense, expected, tmp_path, done, monkeypatch):
    output = tmp_path / "mine"
    interrupted(monkeypatch, dense, output, config("anchored"), PLACES["tensor"], 30, error=OSError)
    assert finished_blocks(output) == BLOCKS[:1]
    interrupted(monkeypatch, dense, output, config("anchored"), (spill.Segment, "write"), 40, error=OSError)
    finished = finished_blocks(output)
    assert len(finished) < 3
    done.clear()
    on_disk(dense, output, config("anchored"))
    assert_same_checkpoint(output, expected["anchored"])
    assert done == {"layers": (3 - len(finished)) * LAYERS}


def test_an_error_of_the_data_after_a_block_keeps_that_block(dense, expected, tmp_path, done, monkeypatch):
    output = tmp_path / "mine"
    interrupted(monkeypatch, dense, output, config(), PLACES["block"], 2, error=CalibrationError)
    assert finished_blocks(output) == BLOCKS[:1]
    done.clear()
    on_disk(dense, output, config())
    assert_same_checkpoint(output, expected["parallel"])
    assert done["layers"] == 2 * LAYERS


# Another request


@pytest.fixture
def unfinished(dense, tmp_path, monkeypatch):
    """A copy of the source, and the output of an interrupted run on it."""
    source = Path(shutil.copytree(dense, tmp_path / "dense"))
    interrupted(monkeypatch, source, tmp_path / "mine", config(), PLACES["block"], 2, before=False)
    return source, tmp_path / "mine"


def other_byte(source):
    path = sorted(source.glob("*.safetensors"))[0]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def other_model_config(source):
    path = source / "config.json"
    path.write_text(path.read_text().replace('"initializer_range": 0.02', '"initializer_range": 0.03'))


CHANGES = {
    "budget": ("config.parameter_reduction was 0.3 and is now 0.4", None, {"parameter_reduction": 0.4}, {}),
    "solver": ("config.solver was 'eigh' and is now 'als'", None, {"solver": "als"}, {}),
    "data": ("calibration was", None, {"dataset": LLAMA.batches(3, seed=1)}, {}),
    "fewer data": ("config.num_samples was 1000 and is now 4", None, {"num_samples": 4}, {}),
    "shards": ("max_shard_size was '30KB' and is now '40KB'", None, {}, {"max_shard_size": "40KB"}),
    "dtype": ("dtype was 'torch.float32' and is now 'torch.bfloat16'", None, {}, {"dtype": "bfloat16"}),
    "weights": ("model.files.model-00001-of-00003.safetensors.sample was", other_byte, {}, {}),
    "model config": ("model.config was", other_model_config, {}, {}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_request_is_refused_by_an_unfinished_run(change, unfinished, monkeypatch):
    message, edit, settings, options = CHANGES[change]
    source, output = unfinished
    before = contents(beside(output))
    if edit is not None:
        edit(source)
    with pytest.raises(CheckpointError, match="unfinished run with another request") as error:
        on_disk(source, output, config(**settings), **options)
    assert message in str(error.value)
    assert "resume=False" in str(error.value)
    assert contents(beside(output)) == before
    assert not output.exists()


def test_what_makes_no_difference_to_the_bytes_may_change(unfinished, expected, tmp_path):
    source, output = unfinished
    moved = source.rename(tmp_path / "moved")
    on_disk(moved, output, config(), activation_memory=10**9)
    found = contents(output)
    assert {name: found[name] for name in found if name.endswith(".safetensors")} == {
        name: content for name, content in contents(expected["parallel"]).items() if name.endswith(".safetensors")
    }


def test_starting_over_needs_no_old_request(unfinished, tmp_path, done):
    source, output = unfinished
    done.clear()
    on_disk(source, output, config(parameter_reduction=0.4), resume=False)
    expected = in_memory(source, tmp_path / "expected", config(parameter_reduction=0.4))
    assert_same_checkpoint(output, expected)


def test_starting_over_does_everything_again(unfinished, expected, done):
    source, output = unfinished
    done.clear()
    on_disk(source, output, config(), resume=False)
    assert_same_checkpoint(output, expected["parallel"])
    assert done == {"layers": 3 * LAYERS, "plans": 1}


# The output is there


def state(folder):
    """When everything below a folder was changed last."""
    return {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


@pytest.fixture
def finished(dense, tmp_path):
    return on_disk(dense, tmp_path / "mine", config())


@pytest.mark.parametrize("options", [{}, {"overwrite": True}])
def test_a_finished_output_is_not_made_again(options, dense, finished, done):
    before = state(finished)
    done.clear()
    report = run.compress_checkpoint(
        run.StreamedModel(dense, LLAMA.model_class), finished, config(), max_shard_size="30KB", **options
    )
    assert report == CompressionReport.load(finished)
    assert state(finished) == before
    assert not done
    assert not beside(finished).exists()


def test_a_finished_output_is_made_again_where_all_is_to_be_done_again(dense, finished, expected, done):
    with pytest.raises(CheckpointError, match="is not empty"):
        on_disk(dense, finished, config(), resume=False)
    done.clear()
    on_disk(dense, finished, config(), resume=False, overwrite=True)
    assert_same_checkpoint(finished, expected["parallel"])
    assert done["layers"] == 3 * LAYERS


def test_the_output_of_another_request_is_refused(dense, finished):
    before = state(finished)
    with pytest.raises(CheckpointError, match="is not empty; choose another, or overwrite it") as error:
        on_disk(dense, finished, config(seed=1))
    assert "config.seed was 0 and is now 1" in str(error.value)
    assert state(finished) == before
    assert not beside(finished).exists()


def test_a_folder_with_other_things_is_refused(dense, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(CheckpointError, match="is not empty"):
        on_disk(dense, tmp_path / "mine", config())
    (tmp_path / "mine" / "pgsvd_report.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is not empty"):
        on_disk(dense, tmp_path / "mine", config())
    assert not beside(tmp_path / "mine").exists()


def test_the_output_of_compressing_in_memory_is_refused(dense, expected, tmp_path):
    shutil.copytree(expected["parallel"], tmp_path / "mine")
    with pytest.raises(CheckpointError, match="is not empty; choose another, or overwrite it$"):
        on_disk(dense, tmp_path / "mine", config())
    on_disk(dense, tmp_path / "mine", config(), overwrite=True)
    assert_same_checkpoint(tmp_path / "mine", expected["parallel"])


def test_an_output_that_is_a_file_or_a_mount_is_refused(dense, tmp_path, monkeypatch):
    (tmp_path / "mine").touch()
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="is a file"):
            on_disk(dense, tmp_path / "mine", config(), overwrite=overwrite)
    (tmp_path / "mounted").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == str(tmp_path / "mounted"))
    with pytest.raises(CheckpointError, match="mounted"):
        on_disk(dense, tmp_path / "mounted", config())
    assert sorted(os.listdir(tmp_path)) == ["mine", "mounted"]


def test_an_empty_folder_is_no_hindrance(dense, expected, tmp_path):
    (tmp_path / "mine").mkdir()
    assert_same_checkpoint(on_disk(dense, tmp_path / "mine", config()), expected["parallel"])


def test_an_old_output_stays_until_the_new_one_is_complete(dense, finished, tmp_path, monkeypatch):
    other = config(parameter_reduction=0.4)
    before = state(finished)

    def overwritten(place, number):
        with monkeypatch.context() as patch:
            failing(patch, PLACES[place], number)
            on_disk(dense, finished, other, overwrite=True)

    for place, number in (("tensor", 1), ("block", 3), ("finish", 1)):
        with pytest.raises(Killed):
            overwritten(place, number)
        assert state(finished) == before
    # the old output is still what its own request made
    on_disk(dense, finished, config())
    assert state(finished) == before
    on_disk(dense, finished, other, overwrite=True)
    assert_same_checkpoint(finished, in_memory(dense, tmp_path / "expected", other))


def test_another_process_at_work_is_not_disturbed(unfinished, expected, monkeypatch):
    source, output = unfinished
    with Workspace(output), pytest.raises(CheckpointError, match="another process is at work"):
        on_disk(source, output, config())
    assert_same_checkpoint(on_disk(source, output, config()), expected["parallel"])
