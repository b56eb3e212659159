"""Each layer compressed alone: the loss that the model has then, and ASVD's plan by it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from ..allocation import ALLOCATIONS, Ladder
from ..calibration import Batch, mean_loss, rows, spread
from ..config import PGSVDConfig
from ..errors import NonFiniteError
from ..planning import plan_ranks
from ..structures import LayerPlan, LinearShape, RankPlan
from ..targets import Targets
from .at_plan import cut
from .job import Clock
from .once import Ordered
from .request import Calibration
from .search import factors_to_cut, refuse_several_processes, refuse_without_batches


# Of the calibration set, spread over it: as many as in the paper.
SEQUENCES = 32

Losses = dict[str, dict[int, float]]


def plan_alone(
    model: PreTrainedModel, targets: Targets, config: PGSVDConfig, calibration: Calibration, clock: Clock
) -> tuple[RankPlan, dict[str, Any]]:
    """The plan by the loss that the model has with one layer compressed alone.

    One walk over the calibration set and one decomposition of every layer serve all of them (`factors_to_cut`).

    Args:
        model: dense, in memory; not changed.
        targets: of `find_targets`.
        config: the request, with `allocation="asvd"`.
        calibration: of `calibration_of`.
        clock: takes the seconds of each step.

    Returns:
        The plan, and for the report: the loss of the dense model, the largest of a layer alone that the plan allows
        under each budget, and the loss at everything that was tried.

    Raises:
        ConfigError: there are no batches to run.
        DistributedError: there are several processes.
        CalibrationError: the model gives no loss on the batches.
        NonFiniteError: a loss is NaN or infinite.
        PGSVDError: see `ordered_factors`.

    Source:
        arXiv 2312.05821 (ASVD), sensitivity-based truncation rank searching.
    """
    refuse_several_processes(config)
    refuse_without_batches(config, calibration, "use allocation='pareto'")
    batches = [calibration.batches[number] for number in spread(calibration.batches, SEQUENCES)]
    dense = finite(mean_loss(model, batches), "of the dense model")
    ordered = factors_to_cut(model, targets, config, calibration, clock)
    shares = ALLOCATIONS.trait(config.allocation, "shares")
    ranks = {name: Ladder.of(shape, config.rank_multiple, shares).ranks for name, shape in targets.shapes.items()}
    with clock("search"):
        losses = losses_alone(model, ordered, targets.shapes, ranks, batches)
    plan = plan_ranks(targets, config, {}, losses=losses)
    return plan, summary(plan, losses, dense, batches)


def losses_alone(
    model: PreTrainedModel,
    ordered: Ordered,
    shapes: Mapping[str, LinearShape],
    ranks: Mapping[str, Sequence[int | None]],
    batches: Sequence[Batch],
) -> Losses:
    """The model's mean loss with one layer compressed, all others dense.

    Args:
        model: dense; as it was afterwards.
        ordered: of `ordered_factors`.
        shapes: of the layers.
        ranks: to try of each; `None`, for dense, is not.
        batches: to measure it on.

    Returns:
        By layer and rank.

    Raises:
        NonFiniteError: a loss is NaN or infinite.
    """
    tried = [(name, rank) for name, of_layer in ranks.items() for rank in of_layer if rank is not None]
    losses: Losses = {name: {} for name in ranks}
    for name, rank in logging.tqdm(tried, desc="Compressing layers alone", unit="loss", disable=None):
        with cut(model, ordered, RankPlan({name: LayerPlan(shapes[name], rank)})):
            losses[name][rank] = finite(mean_loss(model, batches), f"with {name} alone at rank {rank}")
    return losses


def finite(loss: float, of: str) -> float:
    """The loss itself; raises `NonFiniteError` where it is NaN or infinite."""
    if not math.isfinite(loss):
        raise NonFiniteError(
            f"the loss {of} is {loss} on the calibration set, and ranks are chosen by it; run the model in float32 or "
            "bfloat16"
        )
    return loss


def summary(plan: RankPlan, losses: Losses, dense: float, batches: Sequence[Batch]) -> dict[str, Any]:
    """What a report says of a search; thresholds are by the glob of `groups`, "" for the main budget."""
    allowed: dict[str, list[float]] = {}
    for name, layer in plan.layers.items():
        allowed.setdefault(layer.group, []).extend([] if layer.rank is None else [losses[name][layer.rank]])
    return {
        "loss": dense,
        "thresholds": {group: max(found, default=None) for group, found in allowed.items()},
        "evaluations": sum(map(len, losses.values())),
        "sequences": sum(map(rows, batches)),
        "layers": {name: {"ranks": [*found], "losses": [*found.values()]} for name, found in losses.items()},
    }
