"""The known allocations."""

from collections.abc import Callable, Mapping
from typing import Any

from ..registry import Registry
from ..structures import Budget, LinearShape, RankPlan


Allocator = Callable[[Mapping[str, LinearShape], Mapping[str, Any], Budget, int], RankPlan]

ALLOCATIONS: Registry[Allocator] = Registry("allocation")
