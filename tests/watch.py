"""An oracle for the walk: one plain forward pass of the dense model, watched through hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from models import Batch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_pgsvd.targets import find_blocks


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of nested arguments, those of mappings in the order of their keys."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for key in sorted(value) for tensor in tensors_in(value[key])]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []


@dataclass
class Call:
    """What went into one call of a block and what came out; the tensors themselves and copies of them."""

    block: str
    inputs: list[Tensor]
    outputs: list[Tensor] = field(default_factory=list)
    copies: list[Tensor] = field(default_factory=list)
    batch: int = 0


class Watch(ExitStack):
    """Records every call of some blocks; `batch` says in which batch, where several are under way."""

    def __init__(self, model: nn.Module, blocks: Iterable[str], batch: Callable[[], int] = lambda: 0):
        super().__init__()
        self.calls: list[Call] = []
        self.batch = batch
        for name in blocks:
            module = model.get_submodule(name)
            self.callback(module.register_forward_pre_hook(self.before(name), with_kwargs=True).remove)
            self.callback(module.register_forward_hook(self.after).remove)

    def before(self, name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            inputs = tensors_in((args, kwargs))
            copies = [tensor.clone() for tensor in inputs]
            self.calls.append(Call(name, inputs, copies=copies, batch=self.batch()))

        return hook

    def after(self, module: nn.Module, args: tuple, result: Any) -> None:
        call = self.calls[-1]
        call.outputs = tensors_in(result)
        call.copies += [tensor.clone() for tensor in call.outputs]

    def by_batch(self, count: int) -> list[list[Call]]:
        """The calls of each batch, in their order."""
        return [[call for call in self.calls if call.batch == number] for number in range(count)]


@torch.no_grad()
def plain_forward(model: PreTrainedModel, batch: Batch) -> None:
    """The dense model in evaluation mode; a cache is no part of what blocks compute."""
    model.eval()
    model(**batch, **({"use_cache": False} if model.can_generate() else {}))


def plain_calls(model: PreTrainedModel, batches: list[Batch]) -> list[list[Call]]:
    """The calls of all blocks, batch by batch."""
    calls = []
    for batch in batches:
        with Watch(model, find_blocks(model)) as watch:
            plain_forward(model, batch)
        calls.append(watch.calls)
    return calls


class Inputs(ExitStack):
    """Keeps the inputs of some layers, flattened to rows and in float64, and the order in which they were called."""

    def __init__(self, model: nn.Module, names: Iterable[str]):
        super().__init__()
        self.rows: dict[str, list[Tensor]] = {name: [] for name in names}
        self.order: dict[str, None] = {}
        for name in self.rows:
            self.callback(model.get_submodule(name).register_forward_pre_hook(self.before(name)).remove)

    def before(self, name: str):
        def hook(module: nn.Module, args: tuple) -> None:
            self.order.setdefault(name)
            rows = args[0].reshape(-1, args[0].shape[-1])
            self.rows[name].append(rows.to(torch.float64, copy=True))

        return hook
