"""One budget for several towers: how it is shared among them, found by a search on what the model predicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from ..calibration import divergence, evaluating, predict, rows, spread
from ..config import PGSVDConfig
from ..errors import ConfigError
from ..planning import budget_groups, plan_ranks
from ..structures import RankPlan
from ..targets import Targets
from ..towers import find_towers, tower_of
from .at_plan import cut
from .job import Clock
from .once import Ordered
from .request import Calibration
from .search import factors_to_cut, refuse_several_processes, refuse_without_batches


# Logarithms of the ratio of two towers' tolerances: how far apart the first ones tried are, and how many lie on each
# side of one tolerance for all. From 1/7.4 to 7.4; beyond, one tower of those measured was all but dense.
SPACING, REACH = 0.5, 4

# How often the neighbourhood of the best ratio is looked at with a spacing three times as fine.
REFINEMENTS = 2

# With more than two towers their ratios are searched one after the other, this often.
ROUNDS = 2

# Of the calibration set, spread over it. One number is found for each tower but the first.
SEQUENCES = 128

Point = tuple[float, ...]


@dataclass
class TowerSearch:
    """A search for the ratios of the tolerances of a model's towers.

    Args:
        model: dense; not changed.
        targets: of `find_targets`.
        config: the request.
        calibration: of `calibration_of`, with batches.
        ordered: of `ordered_factors`.
        towers: their names.
        tower: that each layer under the main budget lies in.
    """

    model: PreTrainedModel
    targets: Targets
    config: PGSVDConfig
    calibration: Calibration
    ordered: Ordered
    towers: Sequence[str]
    tower: dict[str, str]
    losses: dict[tuple[int | None, ...], float] = field(default_factory=dict)

    @cached_property
    def numbers(self) -> list[int]:
        """Of the batches that predictions are compared on."""
        return spread(self.calibration.batches, SEQUENCES)

    def plan(self, point: Point) -> RankPlan:
        """The plan at the logarithms of the tolerances' ratios, of each tower but the first to the first."""
        scales = dict(zip(self.towers, (1.0, *map(math.exp, point)), strict=True))
        by_layer = {layer: scales[tower] for layer, tower in self.tower.items()}
        return plan_ranks(self.targets, self.config, self.ordered.profiles["weights"], by_layer)

    def measure(self, points: Sequence[Point]) -> list[float]:
        """The divergence at each of some points; a plan that was measured before is not run again."""
        plans = {key(plan): plan for plan in map(self.plan, points)}
        new = {ranks: plan for ranks, plan in plans.items() if ranks not in self.losses}
        if new:
            self.losses |= dict(zip(new, self.run(list(new.values())), strict=True))
        return [self.losses[key(self.plan(point))] for point in points]

    def run(self, plans: Sequence[RankPlan]) -> list[float]:
        """The mean divergence of a prediction at each of some plans; of one batch's predictions at a time."""
        sums, counts, steps = [0.0] * len(plans), [0] * len(plans), len(self.numbers) * len(plans)
        bar = logging.tqdm(total=steps, desc="Searching tolerances", unit="batch", disable=None)
        with evaluating(self.model), bar as progress:
            for number in self.numbers:
                batch = self.calibration.batches[number]
                dense = predict(self.model, batch, number)
                for i, plan in enumerate(plans):
                    with cut(self.model, self.ordered, plan):
                        value, count = divergence(dense, predict(self.model, batch, number))
                    sums[i], counts[i] = sums[i] + value, counts[i] + count
                    progress.update()
        return [value / count for value, count in zip(sums, counts, strict=True)]


def key(plan: RankPlan) -> tuple[int | None, ...]:
    """Tells plans of one model apart."""
    return tuple(layer.rank for layer in plan.layers.values())


def plan_towers(
    model: PreTrainedModel, targets: Targets, config: PGSVDConfig, calibration: Calibration, clock: Clock
) -> tuple[RankPlan, dict[str, Any]]:
    """The plan with a tolerance for each tower, of which what the model predicts suffers least.

    One walk over the calibration set and one decomposition of every layer serve all of them, in parallel calibration
    and by the request's solver where its factors can be cut, by the closed form where not (`factors_to_cut`).

    Args:
        model: dense, in memory; not changed.
        targets: of `find_targets`.
        config: the request, with `allocation="towers"`.
        calibration: of `calibration_of`.
        clock: takes the seconds of each step.

    Returns:
        The plan, and for the report: the tolerance and the share of parameters removed of each tower, the divergences
        of the plan, of one tolerance for all, and of every other point that was tried.

    Raises:
        ConfigError: there are not two towers under the main budget, or there are no batches to run.
        DistributedError: there are several processes.
        PGSVDError: see `ordered_factors`.
    """
    tower = towers_to_share(model, targets, config)
    refuse_without_batches(config, calibration, "a tolerance for each tower in groups, with allocation='pareto'")
    ordered = factors_to_cut(model, targets, config, calibration, clock)
    found = TowerSearch(model, targets, config, calibration, ordered, list(dict.fromkeys(tower.values())), tower)
    with clock("search"):
        best, tried = least(found.measure, len(found.towers) - 1)
    return found.plan(best), summary(found, best, tried)


def towers_to_share(model: PreTrainedModel, targets: Targets, config: PGSVDConfig) -> dict[str, str]:
    """The tower of every layer under the main budget.

    Raises:
        ConfigError: there are fewer than two towers.
        DistributedError: there are several processes.
    """
    refuse_several_processes(config)
    towers = find_towers(model)
    under_main_budget, _ = budget_groups(targets, config).get("", ({}, None))
    inside = {name: tower for name in under_main_budget if (tower := tower_of(towers, name)) is not None}
    if len(set(inside.values())) < 2:
        raise ConfigError(
            f"allocation='towers' shares a budget among towers, and the layers of {type(model).__name__} under the "
            f"main budget lie in {' and '.join(sorted(set(inside.values()))) or 'none'} alone; use allocation='pareto'"
        )
    return inside


def least(measure: Callable[[Sequence[Point]], list[float]], dimensions: int) -> tuple[Point, dict[Point, float]]:
    """The point at which a function is least, of those that a search tries, the origin among them.

    Coordinate by coordinate: first far apart, then ever closer to the best so far. Of equals the one that was tried
    first.

    Args:
        measure: the values at some points.
        dimensions: of a point, 1 or more.

    Returns:
        The point, and the values of all that were tried.
    """
    best: Point = (0.0,) * dimensions
    tried = dict(zip([best], measure([best]), strict=True))
    for turn in range(ROUNDS if dimensions > 1 else 1):
        for axis in range(dimensions):
            for stage in range(turn, REFINEMENTS + 1):
                steps = REACH if stage == 0 else 2
                spacing = SPACING / 3**stage
                points = [moved(best, axis, spacing * step) for step in range(-steps, steps + 1)]
                tried |= dict(zip(points, measure(points), strict=True))
                best = min(tried, key=tried.__getitem__)
    return best, tried


def moved(point: Point, axis: int, distance: float) -> Point:
    """A point moved along one axis."""
    return (*point[:axis], point[axis] + distance, *point[axis + 1 :])


def summary(search: TowerSearch, best: Point, tried: dict[Point, float]) -> dict[str, Any]:
    """What a report says of a search."""
    plan = search.plan(best)
    towers = {}
    for tower in search.towers:
        layers = [layer for name, layer in plan.layers.items() if search.tower.get(name) == tower]
        kept, dense = (sum(n) for n in zip(*((x.parameters, x.shape.dense_parameters) for x in layers), strict=True))
        towers[tower] = {"tolerance": layers[0].tolerance, "parameter_reduction": 1 - kept / dense}
    points = [{"tolerances": tolerances(search, point), "divergence": value} for point, value in tried.items()]
    origin = (0.0,) * len(best)
    return {
        "towers": towers,
        "divergence": tried[best],
        "one_tolerance": {"tolerance": tolerances(search, origin)[search.towers[0]], "divergence": tried[origin]},
        "sequences": sum(rows(search.calibration.batches[number]) for number in search.numbers),
        "points": points,
    }


def tolerances(search: TowerSearch, point: Point) -> dict[str, float | None]:
    """The tolerance of each tower at a point."""
    layers = search.plan(point).layers
    return {search.tower[name]: layers[name].tolerance for name in reversed(search.tower)}
