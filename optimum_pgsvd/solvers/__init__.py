"""How factors are found: one solver a file.

A solver takes a weight, the Gram matrix of its inputs (`None` unless it `needs_gram`), a rank and the number of
iterations (ignored by closed forms), and returns float64 `LowRankFactors`.
"""

from . import als, eigh, svd  # noqa: F401  (registers them)
from .registry import SOLVERS, Solver


__all__ = ["SOLVERS", "Solver"]
