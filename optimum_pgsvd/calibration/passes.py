"""Forward passes that wait before every block, and what is handed out once all of them have passed one."""

from __future__ import annotations

import contextvars
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers import Cache

from ..errors import CalibrationError
from .forward import forward
from .modes import Modes
from .padding import PaddingMask


if TYPE_CHECKING:
    from .walk import BlockWalk


class Pass(greenlet):
    """One forward pass over one batch, which stops before every call of a block until it is sent on.

    Args:
        walk: that it belongs to.
        number: of the batch.
        recalls: whether to keep what a block gives until the next one has run.
    """

    def __init__(self, walk: BlockWalk, number: int, recalls: bool = False):
        super().__init__(self._forward)
        self.walk, self.number, self.recalls = walk, number, recalls
        config = getattr(walk.model, "config", None)
        self.padding = PaddingMask(bool(getattr(config, "is_encoder_decoder", False)))
        self.at: str | None = None
        self.arguments: tuple[tuple, dict[str, Any]] = ((), {})
        self.calls: list[str] = []
        self.outcome: Tensor | None = None
        # Context variables and modes that a model sets in one pass are not seen in another.
        self.gr_context = contextvars.copy_context()
        self.modes = Modes.current()
        self._infers = torch.is_inference_mode_enabled()

    def _forward(self) -> None:
        batch = self.walk.batches[self.number]
        self.padding.start_batch(batch)
        forward(self.walk.model, batch, self.number, self.walk.whole)
        self.at = None

    def proceed(self) -> None:
        """Run on, through the block it stands before, to the next call of a block or to its end."""
        before, self.walk.running = self.walk.running, self
        self.parent = getcurrent()
        try:
            with self.in_its_modes():
                self.switch()
        finally:
            self.walk.running = before

    def give_up(self) -> None:
        """Leave the forward pass where it stands."""
        self.parent = getcurrent()
        with self.in_its_modes():
            self.throw()

    @contextmanager
    def in_its_modes(self) -> Iterator[None]:
        """A context in which PyTorch's modes are those that the model has set in this pass."""
        around = Modes.current()
        self.modes.set()
        try:
            yield
        finally:
            self.modes = Modes.current()
            around.set()

    def stop_before(self, block: str, args: tuple, kwargs: dict[str, Any]) -> None:
        """Called by a block's hook: wait until the pass is sent on."""
        leaves = pytree.tree_leaves((args, kwargs), is_leaf=lambda value: isinstance(value, Cache))
        if any(isinstance(leaf, Cache) for leaf in leaves):
            raise CalibrationError(f"{block} was called with a key-value cache; switch use_cache off in the batches")
        if torch.is_inference_mode_enabled() != self._infers:
            raise CalibrationError(
                f"{block} runs in an inference_mode of the model's own, in which a forward pass cannot wait for those "
                "of other batches; let the model use torch.no_grad()"
            )
        self.at, self.arguments = block, (args, kwargs)
        self.calls.append(block)
        self.parent.switch()
        self.walk.enter(self, args, kwargs)
        self.arguments = ((), {})


@dataclass(frozen=True)
class Replay:
    """A block that was compressed, and one batch of its inputs and of the dense block's outputs.

    Args:
        walk: that stands before the block.
        one: the pass whose inputs they are, behind the compressed blocks.
        goal: the dense block's outputs `(T, k)`, padding left out.
    """

    walk: BlockWalk
    one: Pass
    goal: Tensor

    def outputs(self, weights: Mapping[str, Tensor]) -> Tensor:
        """What the block gives `(T, k)` with some of its weights replaced, by name in the block."""
        assert self.one.at is not None
        return self.walk._replay(self.one.at, self.one, weights)


@dataclass
class Step:
    """A block that all batches have passed, or a part of its layers.

    Args:
        block: its name; `None` for what lies outside of all.
        recorder: of what was measured; `None` where nothing was to be.
        last: whether nothing more of the block comes.
        replays: to refine it by, where the walk recalls outputs.
    """

    block: str | None
    recorder: Any
    last: bool = True
    replays: Sequence[Replay] = ()

    def release(self) -> None:
        """Let go of all that is large."""
        self.recorder, self.replays = None, ()


def merged(ways: Sequence[Sequence[str]]) -> list[str]:
    """The blocks of several ways through a model, in an order that fits them all, each where it is called last."""
    ways = [list(dict.fromkeys(reversed(way)))[::-1] for way in ways]
    order: list[str] = []
    while ways := [way for way in ways if way]:
        ready = (way[0] for way in ways if not any(way[0] in other[1:] for other in ways))
        order.append(next(ready, ways[0][0]))
        ways = [[block for block in way if block != order[-1]] for way in ways]
    return order


def first_tensor(outputs: Any) -> Tensor:
    """The first tensor of a module's outputs: the hidden state of a block."""
    return next(leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor))
