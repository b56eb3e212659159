"""What a run has done so far, on disk beside its output."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from typing import IO, Any

from ..checkpoint import FolderLock
from ..distributed import Peers
from ..errors import CheckpointError, PGSVDError
from ..report import LayerReport
from ..structures import LayerPlan, LinearShape, RankPlan


class Workspace(AbstractContextManager):
    """The folder `.<output>.pgsvd` beside an output: the request, the plan, the blocks that are finished, their files.

    Everything in it is there for good before it is relied on: a run may be killed at any time, and the next one with
    the same request takes up what it left. While it is entered, no other process works on the output. Left after an
    error, it keeps what was dear to make: the plan and all blocks; but no lone plan of a request that cannot be met.

    Of several processes, the main one alone touches the folder, but for the scratch folders, of which each has one.
    All of them must call everything, in the same order; an error in the main process is raised in all.

    Args:
        output: the folder that the checkpoint will have, on a disk that all processes share.
        peers: the processes that compress one checkpoint together.

    Attributes:
        folder: the workspace.
        checkpoint: the folder in it that becomes the output.
        finished: the layers of every block that is finished, `None` standing for what lies outside of all.
        seconds: what earlier runs took for them, by step.

    Raises:
        CheckpointError: another process is at work on the same output.
    """

    def __init__(self, output: str | os.PathLike, peers: Peers | None = None):
        self.peers = peers or Peers()
        self.output = os.path.abspath(output)
        parent, name = os.path.split(self.output)
        self.folder = os.path.join(parent, f".{name}.pgsvd")
        self.checkpoint = self._path("checkpoint")
        self.finished: dict[str | None, list[LayerReport]] = {}
        self.seconds: dict[str, float] = {}
        self._is_begun = False
        self._lock: FolderLock

    def __enter__(self) -> Workspace:
        self.peers.from_main(self._open)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if self.peers.is_main:
            self._close(error)

    def _open(self) -> None:
        self._lock = FolderLock(self.folder)
        self._settle()

    def _close(self, error: BaseException | None) -> None:
        self._settle()
        if self._is_begun and not self.finished and isinstance(error, PGSVDError):
            self._clear()
        if not self._holds_work():
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()

    def begin(self, request: Mapping[str, Any], resume: bool = True) -> None:
        """Take up what an interrupted run left, or start over.

        Args:
            request: what was asked for, as JSON gives it back.
            resume: do not start over.

        Raises:
            CheckpointError: the interrupted run had another request.
        """
        self.finished, self.seconds = self.peers.from_main(lambda: self._begin(request, resume))
        self._is_begun = True

    def _begin(
        self, request: Mapping[str, Any], resume: bool
    ) -> tuple[dict[str | None, list[LayerReport]], dict[str, float]]:
        if resume and self._holds_work():
            refuse_other(self.folder, read_json(self._path("request.json")), request)
            return read_progress(self._path("progress.jsonl"))
        self._clear()
        os.mkdir(self.checkpoint)
        write_json(self._path("request.json"), request)
        return {}, {}

    @property
    def plan(self) -> RankPlan | None:
        """The plan of the interrupted run, if it came that far."""
        path = self._path("plan.json")
        return self.peers.from_main(lambda: plan_from(read_json(path)) if os.path.exists(path) else None)

    def keep_plan(self, plan: RankPlan) -> None:
        """Put the plan on disk."""
        layers = {name: asdict(layer) for name, layer in plan.layers.items()}
        self.peers.from_main(lambda: write_json(self._path("plan.json"), layers))

    def keep_block(self, block: str | None, layers: Iterable[LayerReport], seconds: Mapping[str, float]) -> None:
        """Note that a block is finished; its tensors must be on disk already.

        Args:
            block: its name, `None` for what lies outside of all.
            layers: the reports of its layers.
            seconds: by step, since the run was first started.
        """
        self.finished[block] = list(layers)
        if self.peers.is_main:
            reports = [asdict(layer) for layer in self.finished[block]]
            append_line(self._path("progress.jsonl"), {"block": block, "layers": reports, "seconds": dict(seconds)})

    @contextmanager
    def scratch(self) -> Iterator[str]:
        """A folder of this process for what need not outlive it."""
        path = self._path(f"scratch-{self.peers.rank}")
        shutil.rmtree(path, ignore_errors=True)
        os.mkdir(path)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def publish(self) -> None:
        """Give the finished checkpoint its name, in the place of what had it."""
        self.peers.gather(None)  # no process reads or writes in the folder any more
        self.peers.from_main(self._publish)

    def _publish(self) -> None:
        if os.path.isdir(self.output):
            os.rename(self.output, self._path("replaced"))
        os.rename(self.checkpoint, self.output)

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def _holds_work(self) -> bool:
        """Whether there is more than a request; the plan goes before the blocks, and the checkpoint once it is out."""
        return os.path.exists(self._path("plan.json")) and os.path.isdir(self.checkpoint)

    def _settle(self) -> None:
        """Put an output back that was about to be replaced when the run ended."""
        if os.path.isdir(self._path("replaced")) and not os.path.exists(self.output):
            os.rename(self._path("replaced"), self.output)

    def _clear(self) -> None:
        for entry in os.scandir(self.folder):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            elif entry.path != self._lock.path:
                os.remove(entry.path)


def read_progress(path: str) -> tuple[dict[str | None, list[LayerReport]], dict[str, float]]:
    """The layers of every block that was finished, and what all of them took in seconds, by step."""
    finished, seconds = {}, {}
    for line in whole_lines(path):
        entry = json.loads(line)
        finished[entry["block"]] = [LayerReport.from_dict(layer) for layer in entry["layers"]]
        seconds = entry["seconds"]
    return finished, seconds


def plan_from(layers: Mapping[str, Any]) -> RankPlan:
    """The plan that `Workspace.keep_plan` wrote."""
    return RankPlan(
        {name: LayerPlan(**{**layer, "shape": LinearShape(**layer["shape"])}) for name, layer in layers.items()}
    )


def differences(before: Any, after: Any, name: str = "") -> list[str]:
    """Where two JSON values differ, a line each."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        keys = [*before, *(key for key in after if key not in before)]
        return [
            line
            for key in keys
            for line in differences(before.get(key), after.get(key), f"{name}.{key}" if name else str(key))
        ]
    return [] if before == after else [f"{name} was {before!r} and is now {after!r}"]


def refuse_other(folder: str, before: Mapping[str, Any], request: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` where an interrupted run was about something else."""
    if changed := differences(before, request):
        raise CheckpointError(
            f"{folder} holds an unfinished run with another request:\n  " + "\n  ".join(changed[:10]) + "\n"
            "Run it again as it was to finish it, or with resume=False (--no-resume) to start over."
        )


def read_json(path: str) -> Any:
    """What a JSON file holds."""
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def write_json(path: str, value: Any) -> None:
    """Write a JSON file that appears only when it is whole and on disk."""
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        flush(file)
    os.replace(f"{path}.new", path)


def flush(file: IO) -> None:
    """Return when what was written to a file is on disk."""
    file.flush()
    os.fsync(file.fileno())


def whole_lines(path: str) -> list[str]:
    """The lines of a file, less a last one that was not written to its end; none where there is no file."""
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        return file.read().split("\n")[:-1]


def append_line(path: str, value: Any) -> None:
    """Add a JSON value to a file as a line of its own, on disk for good when this returns."""
    drop_torn_line(path)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")
        flush(file)


def drop_torn_line(path: str) -> None:
    """Cut off what follows the last whole line of a file."""
    if os.path.exists(path):
        with open(path, "r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
