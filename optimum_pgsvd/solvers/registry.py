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


# needs: what it has to know beside the weight ("gram", "gradients", "magnitudes" or nothing); inverts: it fails on a
# singular Gram matrix; takes_outputs: it can be given the Gram matrix of the outputs in place of that of the inputs;
# nested: its factors of a lower rank are the first of those of a higher; takes_curvature: it can weigh the outputs.
SOLVERS: Registry[Solver] = Registry(
    "solver", needs=None, inverts=False, takes_outputs=False, nested=False, takes_curvature=False
)
