"""Refinement: the factors of a block fitted together to what the dense block gives."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..calibration import Replay
from ..modeling_pgsvd import low_rank_layers


# Largest step of an entry, relative to the root mean square of its tensor.
RATE = 0.01
# Steps in which the rate rises to that; it falls to zero along a cosine after them.
WARM_UP = 5
# One batch in so many is held back, at least one.
HELD_BACK = 8
# Times that the held-back error may fail to fall, one pass over the other batches each, before refinement ends.
PATIENCE = 2


def refine(block: nn.Module, replays: Sequence[Replay], steps: int, seed: int) -> float:
    """Fit all factors of a block to the dense block's outputs, on what the compressed blocks before it give.

    AdamW on the mean squared error, one batch a step, in float32 with the factors rounded to the model's dtype in
    every forward pass. The factors kept are those with the least error on batches that no step has seen.

    Args:
        block: compressed; the weights of its low-rank layers are changed in place.
        replays: one a batch, two or more.
        steps: at most so many.
        seed: of the order of the batches.

    Returns:
        The held-back error, relative to that before; 1 where nothing was gained.

    Source:
        arXiv 2604.02119 (AA-SVD) refines blocks; the relative rate and the held-back batches are ours.
    """
    number = max(1, len(replays) // HELD_BACK)
    seen, held = replays[:-number], replays[-number:]
    fit = Fit(block, steps)
    start = best = fit.error(held)
    order = torch.Generator().manual_seed(seed)
    failures = 0
    while start and fit.taken < steps and failures < PATIENCE:
        for at in torch.randperm(len(seen), generator=order).tolist()[: steps - fit.taken]:
            fit.step(seen[at])
        error = fit.error(held)
        failures = 0 if error < best else failures + 1
        if error < best:
            best = error
            fit.keep()
    fit.write_back()
    return best / start if start else 1.0


class Fit:
    """The factors of a block while they are fitted.

    Args:
        block: compressed.
        steps: that its rate is planned for.
    """

    def __init__(self, block: nn.Module, steps: int):
        self.stored = factor_weights(block)
        self.masters = {name: w.detach().float().clone().requires_grad_() for name, w in self.stored.items()}
        self.steps, self.taken = steps, 0
        self.keep()
        sizes = {name: float(master.detach().square().mean().sqrt()) for name, master in self.masters.items()}
        groups = [{"params": [master], "lr": RATE * sizes[name]} for name, master in self.masters.items()]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.rate)

    def rate(self, step: int) -> float:
        """Part of the full rate in a step."""
        return min(1.0, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * min(step / self.steps, 1.0))) / 2

    def loss(self, replay: Replay) -> Tensor:
        """Mean squared error of the block's outputs on a batch."""
        outputs = replay.outputs({name: master.to(self.stored[name].dtype) for name, master in self.masters.items()})
        return (outputs.float() - replay.goal.float()).square().mean()

    @torch.no_grad()
    def error(self, replays: Sequence[Replay]) -> float:
        """Mean of the loss over some batches."""
        return sum(float(self.loss(replay)) for replay in replays) / len(replays)

    @torch.enable_grad()
    def step(self, replay: Replay) -> None:
        """Take a step on a batch."""
        masters = list(self.masters.values())
        for master, gradient in zip(masters, torch.autograd.grad(self.loss(replay), masters), strict=True):
            master.grad = gradient
        self.optimizer.step()
        self.schedule.step()
        self.taken += 1

    def keep(self) -> None:
        """Remember the factors as they are."""
        self.kept = {name: master.detach().clone() for name, master in self.masters.items()}

    @torch.no_grad()
    def write_back(self) -> None:
        """Give the block the factors that were remembered last."""
        for name, weight in self.stored.items():
            weight.copy_(self.kept[name])


def factor_weights(block: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of a block's low-rank layers, by name in the block; biases are not among them."""
    layers = low_rank_layers(block)
    return {
        f"{name}.{inner}": weight
        for name, layer in layers.items()
        for inner, weight in layer.named_parameters()
        if weight.dim() == 2
    }
