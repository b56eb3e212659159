"""How ranks are chosen: one allocator a file.

An allocator takes the shapes of a group's layers, their profiles, the budget and the rank multiple, and returns a
`RankPlan`. Its trait `profile` says what these are profiles of:

* `None`: of nothing; they are empty.
* `"weights"`: of the weights, the paper's Definition 1. They need no data.
* `"outputs"`: of the outputs on the calibration set, singular values of `W G^½`. Comparable between layers.
* `"loss"`: of what the loss depends on, singular values of `Rᵀ W G^½` with `B = R Rᵀ`. Comparable between layers.
* `"losses"`: not singular values, but the model's loss with the layer compressed alone, by rank.

`searches` says what is found by running the model at one plan after the other, `None` where nothing is; `shares` which
shares of a layer's parameters may be kept, `None` where any rank will do.
"""

from . import asvd, loss, pareto, svd_llm_v2, towers, uniform  # noqa: F401  (registers them)
from .ladder import Ladder, smallest
from .loss import hull_slopes
from .registry import ALLOCATIONS, Allocator
from .surrogate import least_surrogate
from .towers import scaled_tolerances


__all__ = ["ALLOCATIONS", "Allocator", "Ladder", "hull_slopes", "least_surrogate", "scaled_tolerances", "smallest"]
