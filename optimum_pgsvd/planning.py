"""The plan: weights and budgets in, a rank for every layer out. No data is needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from .allocation import ALLOCATIONS, Ladder, scaled_tolerances, smallest
from .calibration import InMemory, Weights
from .config import PGSVDConfig
from .distributed import Peers
from .errors import ConfigError, NonFiniteError
from .linalg import singular_values
from .modeling_pgsvd import apart_experts
from .structures import Budget, LayerPlan, LinearShape, RankPlan, SVDProfile
from .targets import Target, Targets, first_match


def plan_ranks(
    targets: Targets,
    config: PGSVDConfig,
    profiles: Mapping[str, SVDProfile],
    scales: Mapping[str, float] | None = None,
    losses: Mapping[str, Mapping[int, float]] | None = None,
) -> RankPlan:
    """Choose the rank of every target layer.

    Args:
        targets: of `find_targets`.
        config: budget, groups, allocation and rank multiple.
        profiles: of the targets, of what `config.profile` says.
        scales: of the tolerances of the layers under the main budget, where a search is to find them.
        losses: of the model with each target compressed alone, by rank, where they are the profiles.

    Returns:
        The plan over all targets, in model order.

    Raises:
        ConfigError: a budget cannot be met, a given rank does not fit its layer, or a search is to be made first.
    """
    if config.ranks is not None:
        return given_ranks(targets.shapes, config.ranks)
    if scales is None and losses is None:
        refuse_without_search(config)
    groups = budget_groups(targets, config)
    plans = (
        allocate_group(glob, shapes, profiles if losses is None else losses, budget, config, None if glob else scales)
        for glob, (shapes, budget) in groups.items()
    )
    return RankPlan.merge(plans, order=targets.names)


def refuse_without_search(config: PGSVDConfig) -> None:
    """Raise `ConfigError` for a request of which something is to be found by running the model."""
    if config.searched:
        found = ALLOCATIONS.trait(config.allocation, "searches")
        reported, known = "ranks", ""
        if config.allocation == "towers":
            reported, known = "tolerances", ", with a tolerance for each tower in groups if you know them"
        raise ConfigError(
            f"allocation={config.allocation!r} finds {found} by running the model on a calibration set, so there is "
            f"no plan without it; compress the model in memory, whose report has the {reported}, or plan with "
            f"allocation='pareto'{known}"
        )


def check_request(model: nn.Module, targets: Targets, config: PGSVDConfig) -> None:
    """Find what is wrong with a request before any decomposition is made or data is read.

    Raises:
        ConfigError: a budget is below the smallest ranks, or a given rank does not fit its layer.
        NonFiniteError: a weight holds NaN or infinity.
    """
    check_budgets(targets, config)
    for name in targets.names:
        dense_weight(model, name)


def check_budgets(targets: Targets, config: PGSVDConfig) -> None:
    """Find what is wrong with a request for these layers, whatever their weights are.

    Raises:
        ConfigError: a budget is below the smallest ranks, or a given rank does not fit its layer.
    """
    if config.ranks is not None:
        given_ranks(targets.shapes, config.ranks)
    else:
        budget_groups(targets, config)


def refuse_elastic_experts(model: nn.Module, config: PGSVDConfig) -> None:
    """Raise `ConfigError` where experts that are taken apart are to be cut later."""
    if config.elastic and (apart := apart_experts(model)):
        raise ConfigError(
            f"elastic=True cannot hold the experts of {next(iter(apart))}; list them in modules_to_not_convert, or "
            "compress once for each budget"
        )


def budget_groups(targets: Targets, config: PGSVDConfig) -> dict[str, tuple[dict[str, LinearShape], Budget]]:
    """The layers under each budget, by glob, "" for the main one, in model order.

    Raises:
        ConfigError: a budget is below the smallest ranks.
    """
    shapes: dict[str, dict[str, LinearShape]] = {}
    for name, shape in targets.shapes.items():
        shapes.setdefault(first_match(name, config.groups) or "", {})[name] = shape
    budgets = {"": Budget(config.parameter_reduction, config.tolerance), **config.group_budgets}
    for glob, group in shapes.items():
        if (reduction := budgets[glob].parameter_reduction) is not None:
            shares = ALLOCATIONS.trait(config.allocation, "shares")
            ladders = {name: Ladder.of(shape, config.rank_multiple, shares) for name, shape in group.items()}
            smallest(ladders, reduction)
    return {glob: (group, budgets[glob]) for glob, group in shapes.items()}


def allocate_group(
    glob: str,
    shapes: Mapping[str, LinearShape],
    profiles: Mapping[str, Any],
    budget: Budget,
    config: PGSVDConfig,
    scales: Mapping[str, float] | None = None,
) -> RankPlan:
    """The plan of the layers under one budget; its errors are those of plain weights, if of anything."""
    if scales is None:
        plan = ALLOCATIONS[config.allocation](shapes, profiles, budget, config.rank_multiple)
    else:
        assert budget.parameter_reduction is not None, "a search is for a parameter reduction"
        plan = scaled_tolerances(shapes, profiles, budget.parameter_reduction, config.rank_multiple, scales)
    of_weights = config.profile == "weights"
    return RankPlan(
        {
            name: replace(layer, group=glob, relative_error=layer.relative_error if of_weights else None)
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


def measure_profiles(model: nn.Module, targets: Targets, weights: Weights | None = None) -> dict[str, SVDProfile]:
    """The profile `e(r)` of every target's weight, each measured by one of the processes.

    Raises:
        NonFiniteError: a weight holds NaN or infinity.
    """
    weights, peers = weights or InMemory(), Peers()
    profiles: dict[str, SVDProfile] = {}
    with logging.tqdm(total=len(targets.found), desc="Measuring weights", unit="layer", disable=None) as progress:
        for block, owner in share_out_blocks(targets, peers).items():
            found = [target for target in targets.found if target.block == block]
            if owner == peers.rank:
                with resident(weights, block):
                    profiles |= {target.name: profile_of(model, target) for target in found}
            progress.update(len(found))
    gathered = peers.merge(profiles)
    return {name: gathered[name] for name in targets.names}


def profile_of(model: nn.Module, target: Target) -> SVDProfile:
    """The profile `e(r)` of one weight in memory.

    Raises:
        NonFiniteError: it holds NaN or infinity.
    """
    return SVDProfile(target.shape, singular_values(dense_weight(model, target.name)).cpu())


def share_out_blocks(targets: Targets, peers: Peers) -> dict[str | None, int]:
    """The process that measures the weights of each block, in model order."""
    costs: dict[str | None, float] = {}
    for target in targets.found:
        costs[target.block] = costs.get(target.block, 0.0) + target.shape.solving_cost
    owners = peers.share_out({str(block): cost for block, cost in costs.items()})
    return {block: owners[str(block)] for block in costs}


@contextmanager
def resident(weights: Weights, block: str | None) -> Iterator[None]:
    """A context in which the weights of a block are in memory; those outside of all always are."""
    if block is None:
        yield
        return
    weights.load(block)
    try:
        yield
    finally:
        weights.release(block)


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
