"""The plan: weights and budgets in, a rank for every layer out. No data is needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from .allocation import ALLOCATIONS
from .config import PGSVDConfig
from .errors import NonFiniteError
from .linalg import singular_values
from .structures import Budget, LayerPlan, LinearShape, RankPlan, SVDProfile
from .targets import Targets, first_match


def plan_ranks(model: nn.Module, targets: Targets, config: PGSVDConfig) -> RankPlan:
    """Choose the rank of every target layer.

    Args:
        model: the dense model.
        targets: of `find_targets`.
        config: budget, groups, allocation and rank multiple.

    Returns:
        The plan over all targets, in model order.

    Raises:
        ConfigError: a budget cannot be met, or a given rank does not fit its layer.
        NonFiniteError: a weight holds NaN or infinity.
    """
    if config.ranks is not None:
        return given_ranks(targets.shapes, config.ranks)
    groups: dict[str, dict[str, LinearShape]] = {}
    for name, shape in targets.shapes.items():
        groups.setdefault(first_match(name, config.groups) or "", {})[name] = shape
    needs_profiles = ALLOCATIONS.trait(config.allocation, "needs_profiles")
    profiles = measure_profiles(model, targets) if needs_profiles else {}
    budgets = config.group_budgets
    plans = (
        allocate_group(glob, shapes, profiles, budgets.get(glob) or config.budget, config)
        for glob, shapes in groups.items()
    )
    return RankPlan.merge(plans, order=targets.names)


def allocate_group(
    glob: str,
    shapes: Mapping[str, LinearShape],
    profiles: Mapping[str, SVDProfile],
    budget: Budget | None,
    config: PGSVDConfig,
) -> RankPlan:
    """The plan of the layers under one budget."""
    assert budget is not None
    plan = ALLOCATIONS[config.allocation](shapes, profiles, budget, config.rank_multiple)
    return RankPlan(
        {
            name: LayerPlan(layer.shape, layer.rank, glob, layer.tolerance, layer.relative_error)
            for name, layer in plan.layers.items()
        }
    )


def given_ranks(shapes: Mapping[str, LinearShape], ranks: Mapping[str, int]) -> RankPlan:
    """The plan that a user wrote down; layers that no pattern names stay dense."""
    patterns = {name: first_match(name, ranks) for name in shapes}
    return RankPlan(
        {
            name: LayerPlan(shape, ranks[pattern] if (pattern := patterns[name]) is not None else None)
            for name, shape in shapes.items()
        }
    )


def measure_profiles(model: nn.Module, targets: Targets) -> dict[str, SVDProfile]:
    """The profile `e(r)` of every target's weight.

    Raises:
        NonFiniteError: a weight holds NaN or infinity.
    """
    progress = logging.tqdm(targets.found, desc="Measuring weights", unit="layer", disable=None)
    return {
        target.name: SVDProfile(target.shape, singular_values(dense_weight(model, target.name)).cpu())
        for target in progress
    }


@torch.no_grad()
def dense_weight(model: nn.Module, name: str) -> Tensor:
    """The weight `(m, n)` of a linear or `Conv1D`, outputs first.

    Raises:
        NonFiniteError: it holds NaN or infinity.
    """
    module: Any = model.get_submodule(name)
    weight = module.weight.detach()
    if not weight.isfinite().all():
        raise NonFiniteError(f"the weight of {name} holds NaN or infinity; the checkpoint is damaged")
    return weight.T if isinstance(module, Conv1D) else weight
