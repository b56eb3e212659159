"""How ranks are chosen: one allocator a file.

An allocator takes the shapes of a group's layers, their profiles (empty unless it `needs_profiles`; as the loss sees
the layers if it `needs_curvature`), the budget and the rank multiple, and returns a `RankPlan`.
"""

from . import loss, pareto, uniform  # noqa: F401  (registers them)
from .ladder import Ladder, smallest
from .loss import hull_slopes
from .registry import ALLOCATIONS, Allocator
from .surrogate import least_surrogate


__all__ = ["ALLOCATIONS", "Allocator", "Ladder", "hull_slopes", "least_surrogate", "smallest"]
