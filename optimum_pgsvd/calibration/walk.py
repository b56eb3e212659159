"""The walk over a model's blocks: every block is run once more on the very arguments the dense model gave it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import Cache
from transformers.utils import logging

from ..errors import CalibrationError, PGSVDError
from .anchored import AnchoredRecorder
from .gram import InputObserver
from .padding import PaddingMask, reads_tokens
from .version import version


@dataclass(frozen=True)
class _Output:
    """An argument that is an output of an earlier call: leaf `leaf` of call `call`."""

    call: int
    leaf: int


@dataclass(frozen=True)
class _Call:
    """One call of a block: its arguments flattened, with links in the place of what earlier blocks put out."""

    block: str
    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec


class BlockWalk:
    """Runs a model block by block on a calibration set.

    `capture` runs the dense model once and keeps, for each block, the arguments it was called with: a link where one
    is the output of an earlier block, else a copy, as the model may change it in place. `run` then runs one block on
    all batches, in the order of `blocks`, and hands its outputs on. Between two calls of `run` only the activations
    that later blocks need are held: one hidden state a batch, and what the model computes once and shares among its
    blocks, such as masks. For anchored calibration, `run_anchored` and `advance` keep a second stream beside it: what
    the compressed blocks put out.

    Args:
        model: in evaluation mode; not changed.
        blocks: names of its repeated blocks.
        batches: model inputs, keyword arguments of `forward`.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str], batches: Sequence[Mapping[str, Any]]):
        self.model, self.batches = model, batches
        self.modules = {name: model.get_submodule(name) for name in blocks}
        self._of_tokens = {name: reads_tokens(model, name) for name in blocks}
        self.blocks: list[str] = []
        self.padding = PaddingMask()
        self._calls: list[list[_Call]] = []
        self._outputs: list[dict[_Output, Tensor]] = []
        self._compressed: list[dict[_Output, Tensor]] = []

    def capture(self, observers: Sequence[InputObserver]) -> None:
        """Run the dense model over the calibration set, under the observers.

        Where all they look at lies in the blocks, a language model need not compute the logits of every token.

        Raises:
            CalibrationError: the model does not accept a batch.
        """
        inside = tuple(f"{name}." for name in self.modules)
        whole = any(not layer.startswith(inside) for observer in observers for layer in observer.layers)
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.model))
            for observer in observers:
                stack.enter_context(observer)
            for number, batch in enumerate(logging.tqdm(self.batches, desc="Calibrating", unit="batch", disable=None)):
                with _Capture(self) as capture:
                    self.padding.start_batch(batch)
                    _forward(self.model, batch, number, whole)
                self._calls.append(capture.calls)
        self._outputs = [{} for _ in self.batches]
        self._compressed = [{} for _ in self.batches]

    def run(self, block: str) -> None:
        """Run a block on every batch and keep what later blocks need of its outputs."""
        with evaluating(self.model):
            for number in range(len(self.batches)):
                self._run_batch(block, number, self._outputs[number])
                self._forget(block, number)

    def run_anchored(self, block: str, recorder: AnchoredRecorder) -> None:
        """Run a block on every batch twice: on the dense model's inputs, and on those of the compressed blocks.

        `advance` must follow once the block's layers are replaced.
        """
        with evaluating(self.model):
            for number in range(len(self.batches)):
                recorder.pairing = "dense"
                self._run_batch(block, number, self._outputs[number], again=True)
                recorder.pairing = "compressed"
                self._run_batch(block, number, dict(self._compressed[number]), again=True)

    def advance(self, block: str) -> None:
        """Run a block whose layers were replaced on the compressed inputs, for the blocks that come after it."""
        with evaluating(self.model):
            for number in range(len(self.batches)):
                self._run_batch(block, number, self._compressed[number])
                self._forget(block, number)

    def _run_batch(self, block: str, number: int, outputs: dict[_Output, Tensor], again: bool = False) -> None:
        """Run a block on one batch with these outputs of the blocks before it, and add its own.

        A block that will run on the same arguments again is given copies, as it may change them in place.
        """
        module, calls = self.modules[block], self._calls[number]
        device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
        self.padding.start_batch(self.batches[number])
        needed = {leaf for call in calls for leaf in call.leaves if isinstance(leaf, _Output)}
        for index, call in enumerate(calls):
            if call.block == block:
                args, kwargs = _arguments(call, outputs, device, again)
                self.enter(block, args, kwargs)
                for leaf, value in enumerate(pytree.tree_leaves(module(*args, **kwargs))):
                    if _Output(index, leaf) in needed:
                        outputs[_Output(index, leaf)] = value

    def enter(self, block: str, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Tell the padding mask which block comes next."""
        self.padding.enter_block(self.modules[block], args, kwargs, self._of_tokens[block])

    def _forget(self, block: str, number: int) -> None:
        """Drop, of one batch, the arguments of the block just run and the outputs that no later block takes."""
        calls, done = self._calls[number], set(self.blocks[: self.blocks.index(block) + 1])
        for index, call in enumerate(calls):
            if call.block in done:
                calls[index] = _Call(call.block, (), call.spec)
        needed = {leaf for call in calls for leaf in call.leaves if isinstance(leaf, _Output)}
        for outputs in (self._outputs[number], self._compressed[number]):
            for output in set(outputs) - needed:
                del outputs[output]


class _Capture(AbstractContextManager):
    """Records the calls of every block in one forward pass."""

    def __init__(self, walk: BlockWalk):
        self.walk = walk
        self.calls: list[_Call] = []
        # By tensor, for as long as the model holds it: its version, and where it came from or what was copied of it.
        self._producers: MutableMapping[Tensor, tuple[int, _Output]] = WeakTensorKeyDictionary()
        self._copies: MutableMapping[Tensor, tuple[int, Tensor]] = WeakTensorKeyDictionary()
        self._hooks = ExitStack()

    def __enter__(self) -> _Capture:
        for name, module in self.walk.modules.items():
            before = module.register_forward_pre_hook(self._before(name), with_kwargs=True, prepend=True)
            after = module.register_forward_hook(self._after)
            self._hooks.callback(before.remove)
            self._hooks.callback(after.remove)
        return self

    def __exit__(self, *exception) -> None:
        self._hooks.close()

    def _before(self, name: str):
        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if name not in self.walk.blocks:
                self.walk.blocks.append(name)
            self.walk.enter(name, args, kwargs)
            leaves, spec = pytree.tree_flatten((args, kwargs))
            self.calls.append(_Call(name, tuple(self._link(name, leaf) for leaf in leaves), spec))

        return before

    def _after(self, module: nn.Module, args: tuple, result: Any) -> None:
        for leaf, value in enumerate(pytree.tree_leaves(result)):
            if isinstance(value, Tensor) and self._producer(value) is None:
                # blocks do not nest: the last call is the one that returns
                self._producers[value] = version(value), _Output(len(self.calls) - 1, leaf)
        self.walk.padding.leave_block()

    def _link(self, name: str, leaf: Any) -> Any:
        """A link, if the argument is the output of a block that `run` visits no later than this one."""
        if isinstance(leaf, Cache):
            raise CalibrationError(f"{name} was called with a key-value cache; switch use_cache off in the batches")
        if not isinstance(leaf, Tensor):
            return leaf
        output, stages = self._producer(leaf), self.walk.blocks
        if output is not None and stages.index(self.calls[output.call].block) <= stages.index(name):
            return output
        return self._copy(leaf)

    def _producer(self, tensor: Tensor) -> _Output | None:
        made, output = self._producers.get(tensor, (None, None))
        return output if made == version(tensor) else None

    def _copy(self, tensor: Tensor) -> Tensor:
        """A copy, one for all calls, but for an expanded tensor, which is small and cannot be written to."""
        if any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)):
            return tensor
        if self._copies.get(tensor, (None,))[0] != version(tensor):
            self._copies[tensor] = version(tensor), tensor.clone()
        return self._copies[tensor][1]


def _arguments(
    call: _Call, outputs: Mapping[_Output, Tensor], device: torch.device, copied: bool
) -> tuple[tuple, dict]:
    leaves = [outputs[leaf] if isinstance(leaf, _Output) else leaf for leaf in call.leaves]
    leaves = [leaf.to(device, copy=copied) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return pytree.tree_unflatten(leaves, call.spec)


def _forward(model: nn.Module, batch: Mapping[str, Any], number: int, whole: bool) -> None:
    device = next(model.parameters()).device
    inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    if not whole and "logits_to_keep" in inspect.signature(model.forward).parameters:
        inputs.setdefault("logits_to_keep", 1)
    try:
        model(**inputs)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, (PGSVDError, torch.OutOfMemoryError)):
            raise
        given = ", ".join(f"{key} {tuple(getattr(value, 'shape', ()))}" for key, value in batch.items())
        raise CalibrationError(
            f"{type(model).__name__} does not accept calibration batch {number} with the inputs {given}: {error}"
        ) from error


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No gradients, no dropout, no key-value cache; everything is as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    configs = {id(c): c for module in model.modules() if (c := getattr(module, "config", None)) is not None}
    caching = [config for config in configs.values() if getattr(config, "use_cache", False)]
    model.eval()
    for config in caching:
        config.use_cache = False
    try:
        with torch.no_grad():
            yield
    finally:
        for config in caching:
            config.use_cache = True
        for module in training:
            module.training = True
