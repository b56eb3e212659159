"""How factors are found: one solver a file.

A solver takes a weight, the Gram matrix of its inputs (`None` unless it `needs_gram`), a rank and the number of
iterations (ignored by closed forms), and returns `LowRankFactors` in the working dtype or better. One that
`takes_outputs` has a sibling that needs the second moment of the outputs instead, and one that `takes_curvature` a
sibling that measures errors by what they cost the loss.
"""

from . import als, svd  # noqa: F401  (registers them)
from .eigh import eigh_of_loss, eigh_of_outputs
from .registry import SOLVERS, Solver


__all__ = ["SOLVERS", "Solver", "eigh_of_loss", "eigh_of_outputs"]
