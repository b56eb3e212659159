"""The known solvers."""

from typing import Protocol

from torch import Tensor

from ..registry import Registry
from ..structures import LowRankFactors


class Solver(Protocol):
    """`W (m, n)`, what it needs to know, rank and iterations in, factors out."""

    def __call__(self, weight: Tensor, known: Tensor, /, rank: int, num_iterations: int) -> LowRankFactors:
        """Solve for the factors of one layer."""
        ...


SOLVERS: Registry[Solver] = Registry("solver")
