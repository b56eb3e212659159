"""The known allocations."""

from collections.abc import Callable, Mapping
from typing import Any

from ..registry import Registry
from ..structures import Budget, LinearShape, RankPlan


Allocator = Callable[[Mapping[str, LinearShape], Mapping[str, Any], Budget, int], RankPlan]

# profile: what it goes by ("weights", "outputs", "loss", "losses" or nothing); takes_tolerance: ε can be its budget;
# searches: what it finds on a measured loss, in words; shares: the kept shares of a layer that it measures a loss at.
ALLOCATIONS: Registry[Allocator] = Registry(
    "allocation", profile=None, takes_tolerance=False, searches=None, shares=None
)
