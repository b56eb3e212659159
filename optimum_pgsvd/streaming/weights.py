"""The weights that a walk over a streamed model needs, in memory while it needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .source import StreamedModel


# Layers outside the blocks with more bytes of weights than this are in memory only while they are in use.
LARGE = 2**24


class StreamedWeights(AbstractContextManager):
    """The weights of one block at a time, and those outside the blocks: small ones always, large ones when asked for.

    Large are embeddings and output heads, say. They are read when the model touches their parameters, be it in their
    own `forward` or to use a weight in another place, and let go once the walk comes to a block.

    Args:
        source: the model; while this is entered, modules of it have classes of their own.
        blocks: its blocks, in the order in which they lie in it.

    Attributes:
        large: names of the large layers outside the blocks.
    """

    def __init__(self, source: StreamedModel, blocks: Sequence[str]):
        self.source, self.blocks = source, list(blocks)
        self.large = large_layers(source.model, blocks)
        self._in_use: set[str] = set()
        self._is_asking = True
        self._stack = ExitStack()

    def __enter__(self) -> StreamedWeights:
        self.source.load_outside([*self.blocks, *self.large])
        for name in self.large:
            self._read_when_asked(name)
        for module in self.source.model.modules():
            if isinstance(module, PreTrainedModel):  # by itself it looks at some parameter, which may be on meta
                self._stack.callback(with_properties(module, {"device": lambda module: self.source.device}))
        return self

    def __exit__(self, *exception) -> None:
        self._stack.close()
        self._in_use.clear()
        self.source.release("")

    def load(self, name: str) -> None:
        """Load a block, and start reading the next; what is large outside of the blocks goes."""
        self.release_large()
        self._load(name)
        for following in self.blocks[self.blocks.index(name) + 1 :][:1]:
            self.source.prefetch(following)

    def release(self, name: str) -> None:
        """Let go of a block, and of what is large outside of the blocks."""
        self.release_large()
        self._release(name)

    def release_large(self) -> None:
        """Let go of what is large outside of the blocks; it is read again when it is asked for."""
        while self._in_use:
            self._release(self._in_use.pop())

    @contextmanager
    def resident(self, name: str) -> Iterator[None]:
        """A context in which a block or a large layer is loaded."""
        self._load(name)
        try:
            yield
        finally:
            self._release(name)

    def _release(self, name: str) -> None:
        with self._unasked():
            self.source.release(name)

    def _load(self, name: str) -> None:
        with self._unasked():
            self.source.load(name)

    @contextmanager
    def _unasked(self) -> Iterator[None]:
        """A context in which parameters are touched, but not by the model."""
        self._is_asking = False
        try:
            yield
        finally:
            self._is_asking = True

    def _read_when_asked(self, name: str) -> None:
        layer = self.source.model.get_submodule(name)

        def reading(parameter: str) -> Callable[[nn.Module], Any]:
            def get(layer: nn.Module) -> Any:
                if self._is_asking and any(p.is_meta for p in layer.parameters()):
                    self._in_use.add(name)
                    self._load(name)
                return layer._parameters[parameter]

            return get

        self._stack.callback(with_properties(layer, {name: reading(name) for name in layer._parameters}))


def large_layers(model: nn.Module, blocks: Sequence[str]) -> list[str]:
    """The layers with many bytes of weights outside of the blocks, by every name that they have.

    Those that are made of others are none, and recurrent ones neither: they hold their weights by a list of their own.
    """
    return [
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if not isinstance(module, nn.RNNBase)
        and not list(module.children())
        and not any(f"{name}.".startswith(f"{block}.") for block in blocks)
        and sum(p.nbytes for p in module.parameters()) > LARGE
    ]


def with_properties(module: nn.Module, properties: dict[str, Callable[[nn.Module], Any]]) -> Callable[[], None]:
    """Let a module compute some of its attributes, as PyTorch's parametrizations do.

    Args:
        module: gets a class of its own, a subclass of the one it has.
        properties: what gives each attribute.

    Returns:
        What undoes it.
    """
    before = type(module)
    members = {name: property(get) for name, get in properties.items()}
    module.__class__ = type(before.__name__, (before,), {"__module__": before.__module__, **members})

    def undo() -> None:
        module.__class__ = before

    return undo
