"""Several processes that compress one model together, by torch.distributed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import DistributedError


T = TypeVar("T")


class Peers:
    """The processes of the default process group, or this one alone where there is none.

    Each process runs its share of the calibration batches, and solves its share of the layers. All of them must call
    every method, in the same order.
    """

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.size = dist.get_world_size() if together else 1
        self.rank = dist.get_rank() if together else 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def mine(self, number: int) -> range:
        """Which of `number` items are this process's."""
        return range(self.rank, number, self.size)

    def share_out(self, costs: Mapping[str, float]) -> dict[str, int]:
        """The process that each item goes to: the most expensive first, always to the one with the least to do."""
        owners, load = {}, [0.0] * self.size
        for name in sorted(costs, key=lambda name: -costs[name]):
            owners[name] = load.index(min(load))
            load[owners[name]] += costs[name]
        return owners

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in the place of the tensor."""
        if self.size > 1:
            with explained():
                there = self._on_backend(tensor)
                dist.all_reduce(there)
                tensor.copy_(there)
        return tensor

    def gather(self, value: T) -> list[T]:
        """What every process has, in order of their ranks."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with explained():
            dist.all_gather_object(found, value)
        return found

    def merge(self, part: Mapping[str, T]) -> dict[str, T]:
        """The parts of all processes as one mapping."""
        return {name: value for each in self.gather(part) for name, value in each.items()}

    def from_main(self, make: Callable[[], T]) -> T:
        """What the main process makes, in all of them; an error there is raised in all."""
        if self.size == 1:
            return make()
        held: list[Any] = [None, None]
        if self.is_main:
            try:
                held[0] = make()
            except Exception as error:
                held[1] = error
        with explained():
            dist.broadcast_object_list(held, src=0)
        if held[1] is not None:
            raise held[1]
        return held[0]

    def broadcast(self, tensors: Sequence[Tensor] | None, like: Sequence[Tensor], owner: int) -> Sequence[Tensor]:
        """The owner's tensors in every process.

        Args:
            tensors: in the owner; `None` elsewhere.
            like: empty tensors of the same shapes and dtypes, filled elsewhere.
            owner: rank of the process that has them.
        """
        if self.size == 1:
            assert tensors is not None
            return tensors
        found = []
        for value in tensors if tensors is not None else like:
            with explained():
                there = self._on_backend(value.contiguous())
                dist.broadcast(there, src=owner)
            found.append(there.to(value.device))
        return found

    def refuse_different(self, what: str, value: Any) -> None:
        """Raise `DistributedError` in every process where they do not have the same."""
        others = [rank for rank, found in enumerate(self.gather(value)) if found != value]
        if others:
            raise DistributedError(
                f"process {self.rank} and process {others[0]} have another {what}; start all of them with the same "
                "arguments"
            )

    def _on_backend(self, tensor: Tensor) -> Tensor:
        """A tensor where the backend can take it: on the GPU for NCCL."""
        if dist.get_backend() == "nccl" and tensor.device.type == "cpu":
            return tensor.to(torch.device("cuda", torch.cuda.current_device()))
        return tensor


@contextmanager
def explained() -> Iterator[None]:
    """Say what it means when a collective operation breaks off."""
    try:
        yield
    except RuntimeError as error:
        raise DistributedError(
            f"another of the processes that compress this model has stopped; its own error says why. Here: {error}"
        ) from error
