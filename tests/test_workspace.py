"""What a run leaves beside its output when it ends, and what the next one makes of it."""

import json
import os
from contextlib import suppress
from pathlib import Path

import pytest

from optimum_pgsvd.errors import CheckpointError, ConfigError
from optimum_pgsvd.report import LayerReport
from optimum_pgsvd.streaming.workspace import Workspace, differences
from optimum_pgsvd.structures import LayerPlan, LinearShape, RankPlan


REQUEST = {"config": {"ranks": {"a": 3}, "seed": 0}, "files": ["x", "y"]}
LAYER = LayerReport("blocks.0.fc", (4, 6), 2, 24, 20, 0.125, 0.25, None, "*.fc", 100, 1.5)
PLAN = RankPlan(
    {
        "blocks.0.fc": LayerPlan(LinearShape(4, 6), 2, "*.fc", 0.1, 0.09),
        "blocks.0.dense": LayerPlan(LinearShape(4, 6), None),
    }
)


class Killed(BaseException):
    """Ends a run as a signal would, but for what still runs in the process."""


@pytest.fixture
def output(tmp_path):
    return tmp_path / "compressed"


def beside(output):
    return output.parent / f".{output.name}.pgsvd"


def leave(output, blocks=(), error=Killed, plan=PLAN, request=REQUEST):
    """Begin a run and end it by an error."""
    with suppress(error), Workspace(output) as work:
        work.begin(request)
        if plan is not None:
            work.keep_plan(plan)
        for number, block in enumerate(blocks):
            Path(work.checkpoint, f"{block}.weights").write_text(str(block))
            work.keep_block(block, [LAYER] if number == 0 else [], {"plan": 1.0, "grams": float(number)})
        raise error("here")


def old_output(output):
    output.mkdir()
    (output / "old").write_text("old")


# Taking up


def test_the_next_run_has_the_plan_the_blocks_and_the_seconds(output):
    leave(output, ["blocks.0", None])
    with Workspace(output) as work:
        work.begin(REQUEST)
        assert work.plan == PLAN
        assert work.finished == {"blocks.0": [LAYER], None: []}
        assert work.seconds == {"plan": 1.0, "grams": 1.0}
        assert sorted(os.listdir(work.checkpoint)) == ["None.weights", "blocks.0.weights"]


@pytest.mark.parametrize("cut", [1, 30, -1])
def test_a_line_that_was_not_written_to_its_end_does_not_count(cut, output):
    leave(output, ["blocks.0", "blocks.1"])
    path = beside(output) / "progress.jsonl"
    first, second, _ = path.read_text().split("\n")
    path.write_text(f"{first}\n{second[:cut]}")
    with Workspace(output) as work:
        work.begin(REQUEST)
        assert list(work.finished) == ["blocks.0"]
        work.keep_block("blocks.1", [], {})
    assert [json.loads(line)["block"] for line in path.read_text().splitlines()] == ["blocks.0", "blocks.1"]


def test_a_first_line_that_was_not_written_to_its_end(output):
    leave(output)
    (beside(output) / "progress.jsonl").write_text('{"block": "bl')
    with Workspace(output) as work:
        work.begin(REQUEST)
        assert work.finished == {}
        work.keep_block("blocks.0", [LAYER], {})
    leave(output, [])
    with Workspace(output) as work:
        work.begin(REQUEST)
        assert work.finished == {"blocks.0": [LAYER]}


def test_another_request_is_refused_and_nothing_is_touched(output):
    leave(output, ["blocks.0"])
    before = {path: path.read_bytes() for path in beside(output).rglob("*") if path.is_file()}
    other = {"config": {"ranks": {"a": 4, "b": 1}, "seed": 0}, "files": ["x"]}
    with (
        pytest.raises(CheckpointError, match="unfinished run with another request") as error,
        Workspace(output) as work,
    ):
        work.begin(other)
    for line in (
        "config.ranks.a was 3 and is now 4",
        "config.ranks.b was None and is now 1",
        "files was ['x', 'y'] and is now ['x']",
        "resume=False",
    ):
        assert line in str(error.value)
    assert "seed" not in str(error.value)
    assert before == {path: path.read_bytes() for path in beside(output).rglob("*") if path.is_file()}


def test_starting_over_leaves_nothing_of_the_interrupted_run(output):
    leave(output, ["blocks.0"])
    other = {"config": {}}
    with Workspace(output) as work:
        work.begin(other, resume=False)
        assert work.plan is None
        assert work.finished == {}
        assert os.listdir(work.checkpoint) == []
        work.keep_plan(PLAN)
    with Workspace(output) as work:
        work.begin(other)
        assert work.finished == {}


def test_a_request_without_a_plan_holds_nothing_and_gives_way(output):
    with Workspace(output) as work:
        work.begin(REQUEST)
        (beside(output) / "plan.json.new").write_text('{"blocks.')  # as a kill would leave it
        folder = dict.fromkeys(os.listdir(work.folder))
    assert {"request.json", "checkpoint"} <= set(folder)
    beside(output).mkdir()
    (beside(output) / "request.json").write_text(json.dumps(REQUEST))
    (beside(output) / "checkpoint").mkdir()
    with Workspace(output) as work:
        work.begin({"another": "request"})


# What stays when a run ends


def test_nothing_stays_of_a_run_without_a_plan(output):
    leave(output, plan=None)
    leave(output, plan=None, error=ConfigError)
    assert os.listdir(output.parent) == []


def test_a_request_that_cannot_be_met_leaves_nothing_unless_blocks_are_finished(output):
    leave(output, error=ConfigError)
    assert os.listdir(output.parent) == []
    leave(output, ["blocks.0"], error=ConfigError)
    assert beside(output).is_dir()


def test_the_plan_stays_whatever_else_goes_wrong(output):
    for error in (Killed, OSError, KeyboardInterrupt):
        leave(output, error=error)
        with Workspace(output) as work:
            work.begin(REQUEST)
            assert work.plan == PLAN


def test_scratch_is_emptied_before_and_after(output):
    leave(output)
    (beside(output) / "scratch-0").mkdir()
    (beside(output) / "scratch-0" / "left by a kill").touch()
    with Workspace(output) as work:
        work.begin(REQUEST)
        with work.scratch() as scratch:
            assert os.listdir(scratch) == []
            Path(scratch, "new").touch()
        assert not os.path.exists(scratch)


# Publishing


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "an old output"])
def test_publishing_puts_the_checkpoint_in_place_and_removes_the_rest(there, output):
    if there != "nothing":
        output.mkdir()
    if there == "an old output":
        (output / "old").touch()
    with Workspace(output) as work:
        work.begin(REQUEST)
        work.keep_plan(PLAN)
        Path(work.checkpoint, "weights").touch()
        work.publish()
    assert os.listdir(output.parent) == [output.name]
    assert os.listdir(output) == ["weights"]


def killed_while_publishing(output, monkeypatch, after):
    """Publish over an old output, and be killed after so many renames, before anything else can run."""
    rename, count = os.rename, 0

    def counted(*paths):
        nonlocal count
        if count == after:
            raise Killed
        count += 1
        rename(*paths)

    with monkeypatch.context() as patch:
        work = Workspace(output)
        work.__enter__()
        work.begin(REQUEST)
        work.keep_plan(PLAN)
        Path(work.checkpoint, "weights").touch()
        patch.setattr(os, "rename", counted)
        with suppress(Killed):
            work.publish()
        work._lock.release()


@pytest.mark.parametrize("request_of_the_next", [REQUEST, {"another": "request"}], ids=["the same", "another"])
@pytest.mark.parametrize("after", [0, 1])
def test_a_kill_before_the_new_output_is_in_place_loses_nothing(after, request_of_the_next, output, monkeypatch):
    old_output(output)
    killed_while_publishing(output, monkeypatch, after)
    assert output.exists() == (after == 0)
    with Workspace(output) as work:
        assert (output / "old").exists()
        work.begin(request_of_the_next, resume=request_of_the_next == REQUEST)
        assert os.listdir(work.checkpoint) == (["weights"] if request_of_the_next == REQUEST else [])
    assert (output / "old").exists()


def test_a_kill_after_the_new_output_is_in_place_leaves_only_rubbish(output, monkeypatch):
    old_output(output)
    killed_while_publishing(output, monkeypatch, after=2)
    assert os.listdir(output) == ["weights"]
    assert (beside(output) / "replaced" / "old").exists()
    with Workspace(output) as work:
        work.begin({"another": "request"})  # is not taken for an unfinished run
    assert os.listdir(output.parent) == [output.name]
    assert os.listdir(output) == ["weights"]


def test_an_old_output_comes_back_where_the_new_one_cannot_be_put_in_its_place(output, monkeypatch):
    old_output(output)
    leave(output)
    rename = os.rename

    def refuse(source, target):
        if source == str(beside(output) / "checkpoint"):
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match="no"), Workspace(output) as work:
        work.publish()
    assert os.listdir(output) == ["old"]
    assert (beside(output) / "checkpoint").is_dir()


def test_one_at_a_time(output):
    with Workspace(output) as work:
        work.begin(REQUEST)
        work.keep_plan(PLAN)
        with pytest.raises(CheckpointError, match="another process is at work"), Workspace(output):
            pass
        assert work.plan == PLAN
    with Workspace(output) as work:
        work.begin(REQUEST)
        assert work.plan == PLAN


def test_differences_are_named_by_their_path():
    assert differences({"a": 1, "b": [1]}, {"a": 1, "b": [1]}) == []
    assert differences({"a": {"b": 1}}, {"a": {"b": 2}}) == ["a.b was 1 and is now 2"]
    assert differences({"a": {"b": 1}}, {"a": None}) == ["a was {'b': 1} and is now None"]
    assert differences({"a": 1}, {"c": 2}) == ["a was 1 and is now None", "c was None and is now 2"]
