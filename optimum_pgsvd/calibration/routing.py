"""Tokens sent to the same experts in two runs of a block, so that what the experts see can be paired."""

from __future__ import annotations

from contextlib import ExitStack

from torch import Tensor, nn

from ..modeling_pgsvd import LinearExperts


class Routing:
    """While entered, notes which experts the tokens of a block go to, or sends them where they went before.

    A router that sees what compressed layers make of a token may choose other experts than it does in the dense model.
    In anchored calibration each expert is fitted to the tokens that are its own in the dense model.

    Args:
        block: whose experts, taken apart, it looks at.

    Attributes:
        repeats: whether tokens go where they went before.
    """

    def __init__(self, block: nn.Module):
        self.repeats = False
        self._experts = [module for module in block.modules() if isinstance(module, LinearExperts)]
        self._noted: dict[LinearExperts, list[tuple[Tensor, ...]]] = {experts: [] for experts in self._experts}
        self._hooks = ExitStack()

    def __enter__(self) -> Routing:
        for experts in self._experts:
            self._hooks.callback(experts.register_forward_pre_hook(self._route).remove)
        return self

    def __exit__(self, *exception) -> None:
        self._hooks.close()

    def _route(self, experts: LinearExperts, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden_states, *chosen = args
        if not self.repeats:
            self._noted[experts].append(tuple(chosen))
            return args
        return (hidden_states, *self._noted[experts].pop(0))
