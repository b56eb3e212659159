"""The known allocations."""

from collections.abc import Callable, Mapping

from ..registry import Registry
from ..structures import Budget, LinearShape, RankPlan, SVDProfile


Allocator = Callable[[Mapping[str, LinearShape], Mapping[str, SVDProfile], Budget, int], RankPlan]

ALLOCATIONS: Registry[Allocator] = Registry("allocation")
