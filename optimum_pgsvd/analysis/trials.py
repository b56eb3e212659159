"""A calibrated model tried at plans: how far its loss moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedModel

from ..calibration import Batch, mean_loss
from ..factoring import Ordered, cut
from ..structures import RankPlan


@dataclass(frozen=True, eq=False)
class Trials:
    """What trying a plan takes.

    Args:
        model: dense; as it was after each trial.
        ordered: its factors, with activations.
        batches: to measure the loss on: the calibration set.
        evaluation: another set, if any.
    """

    model: PreTrainedModel
    ordered: Ordered
    batches: Sequence[Batch]
    evaluation: Sequence[Batch] = ()

    @cached_property
    def base(self) -> float:
        """The loss of the dense model on the calibration set."""
        return mean_loss(self.model, self.batches)

    def change(self, plan: RankPlan) -> float:
        """How far a plan moves it."""
        base = self.base  # of the dense model, so before it is cut
        with cut(self.model, self.ordered, plan):
            return mean_loss(self.model, self.batches) - base

    def evaluation_loss(self, plan: RankPlan) -> float | None:
        """The loss at a plan on the other set; `None` where there is none."""
        with cut(self.model, self.ordered, plan):
            return mean_loss(self.model, self.evaluation) if self.evaluation else None
