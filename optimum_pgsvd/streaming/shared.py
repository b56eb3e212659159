"""A workspace that several processes look at, and one of them writes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..distributed import Peers
from ..report import LayerReport
from ..structures import RankPlan
from .workspace import Workspace


class SharedWorkspace(Workspace):
    """The workspace of processes that compress one checkpoint together; see `Workspace`.

    The main process alone touches the folder, but for the scratch folders, of which each process has its own. All of
    them must call everything, in the same order; an error in the main process is raised in all.

    Args:
        output: the folder that the checkpoint will have, on a disk that all processes share.
        peers: the processes.
    """

    def __init__(self, output: str | os.PathLike, peers: Peers):
        super().__init__(output)
        self.peers = peers

    def __enter__(self) -> SharedWorkspace:
        self.peers.from_main(lambda: Workspace.__enter__(self) and None)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if self.peers.is_main:
            super().__exit__(kind, error, trace)

    def begin(self, request: Mapping[str, Any], resume: bool = True) -> None:
        """Take up what an interrupted run left, or start over."""

        def begun() -> tuple[dict[str | None, list[LayerReport]], dict[str, float]]:
            Workspace.begin(self, request, resume)
            return self.finished, self.seconds

        self.finished, self.seconds = self.peers.from_main(begun)

    @property
    def plan(self) -> RankPlan | None:
        """The plan of the interrupted run, if it came that far."""
        return self.peers.from_main(lambda: Workspace.plan.fget(self))  # type: ignore[attr-defined]

    def keep_plan(self, plan: RankPlan) -> None:
        """Put the plan on disk."""
        self.peers.from_main(lambda: Workspace.keep_plan(self, plan))

    def keep_block(self, block: str | None, layers: Iterable[LayerReport], seconds: Mapping[str, float]) -> None:
        """Note that a block is finished; its tensors must be on disk already."""
        layers = list(layers)
        if self.peers.is_main:
            super().keep_block(block, layers, seconds)
        self.finished[block] = layers

    @contextmanager
    def scratch(self, name: str = "scratch") -> Iterator[str]:
        """A folder of this process for what need not outlive it."""
        with super().scratch(f"{name}-{self.peers.rank}") as path:
            yield path

    def publish(self) -> None:
        """Give the finished checkpoint its name, in the place of what had it."""
        self.peers.gather(None)  # no process reads or writes in the folder any more
        self.peers.from_main(lambda: Workspace.publish(self))
