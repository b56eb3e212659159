"""How factors are found: one solver a file.

A solver takes a weight, what it `needs` to know of the calibration set, a rank and the number of iterations (ignored
by closed forms), and returns `LowRankFactors` in the working dtype or better. It `needs`

* `None`: nothing;
* `"gram"`: the Gram matrix of the layer's inputs `(n, n)`, which must not be singular where it `inverts` it;
* `"magnitudes"`: the mean absolute value of each input `(n,)`;
* `"gradients"`: for each input the squared gradients of its weights, summed `(n,)`.

One that `takes_outputs` has a sibling that needs the second moment of the outputs instead, and one that
`takes_curvature` a sibling that measures errors by what they cost the loss. Of one that is `nested`, the leading
components are its solution of a smaller rank.
"""

from . import als, asvd, fwsvd, svd, svd_llm  # noqa: F401  (registers them)
from .eigh import eigh_of_loss, eigh_of_outputs
from .registry import SOLVERS, Solver


__all__ = ["SOLVERS", "Solver", "eigh_of_loss", "eigh_of_outputs"]
