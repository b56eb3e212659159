"""Models that are not quite stacks of blocks, small enough to be read: what a walk must get right all the same."""

from __future__ import annotations

from collections.abc import Callable

import torch
from models import Batch, generator
from torch import Tensor, nn


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dense(x).tanh()


class AddsInPlace(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return x.add_(self.dense(x).tanh())


class Toy(nn.Module):
    """Blocks in a list."""

    def __init__(self, *blocks: nn.Module):
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def can_generate(self) -> bool:
        return False

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        for layer in self.layers:
            x = layer(x)
        return x


class TwiceOver(Toy):
    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.layers, *self.layers):
            x = layer(x)
        return x


class SideBySide(Toy):
    def forward(self, x: Tensor) -> Tensor:
        return sum(layer(x) for layer in self.layers)


class ChangedBetween(Toy):
    """Features are added to a block's output in place, as some models add vision features to early layers."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            x[:, 1:3] += 1
        return x


class LastFirst(Toy):
    def forward(self, x: Tensor) -> Tensor:
        for layer in reversed(self.layers):
            x = layer(x)
        return x


class OutOfStep(Toy):
    """Batches with a positive sum take the second block again at the end."""

    def forward(self, x: Tensor) -> Tensor:
        again = bool(x.sum() > 0)
        for layer in (*self.layers, *([self.layers[1]] if again else [])):
            x = layer(x)
        return x


class PassesBy(Toy):
    """Batches with a negative sum pass the second block by."""

    def forward(self, x: Tensor) -> Tensor:
        all_of_them = bool(x.sum() > 0)
        for i, layer in enumerate(self.layers):
            if i != 1 or all_of_them:
                x = layer(x)
        return x


class PartOutside(Toy):
    """Between the blocks something is computed that is no block."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).flip(0)
        return x


TOYS = {
    "every block twice": lambda: TwiceOver(Layer(), Layer()),
    "blocks side by side": lambda: SideBySide(Layer(), Layer()),
    "outputs changed in place": lambda: ChangedBetween(Layer(), Layer(), Layer()),
    "inputs changed in place": lambda: Toy(AddsInPlace(), AddsInPlace()),
    "last block first": lambda: LastFirst(Layer(), Layer()),
    "something between the blocks": lambda: PartOutside(Layer(), Layer(), Layer()),
}


def toy(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


def toy_batches(count: int, *signs: int) -> list[Batch]:
    """Random inputs; `signs` those of their sums."""
    source = generator(0)
    inputs = [torch.randn(4, 5, 6, generator=source) for _ in range(count)]
    for x, sign in zip(inputs, signs, strict=False):
        x.mul_(sign * x.sum().sign())
    return [{"x": x} for x in inputs]
