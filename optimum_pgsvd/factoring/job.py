"""A job: what is to be done to a model, and what becomes of its blocks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..calibration import InMemory, Weights
from ..config import PGSVDConfig
from ..distributed import Peers
from ..elastic import Elastic
from ..modeling_pgsvd import set_submodule
from ..report import LayerReport
from ..structures import LayerPlan, RankPlan
from ..targets import Target, Targets


class Clock:
    """Wall-clock seconds by step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        """Time a step."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - start


class Surroundings(Protocol):
    """What a walk over the blocks of a model needs besides the model."""

    @property
    def weights(self) -> Weights:
        """Where the weights of a block come from."""
        ...

    def is_finished(self, block: str | None) -> bool:
        """Whether an earlier run finished a block."""
        ...

    def keep(self, module: nn.Module, args: tuple, outputs: Any) -> Any:
        """A forward hook on what is not inside a block: may give other tensors with the same values."""
        ...


class Destination(Surroundings, Protocol):
    """What becomes of the blocks of a model while it is compressed."""

    def restore(self, block: str | None) -> list[LayerReport] | None:
        """Put the layers of a block that an earlier run finished in place; `None` where there was none."""
        ...

    def finish(self, block: str | None, layers: list[LayerReport]) -> None:
        """Called once the layers of a block, or of all that lies outside the blocks, are replaced."""
        ...


class MomentsMade(Protocol):
    """Moments that were measured before, on disk or in memory."""

    def of_block(self, targets: Sequence[Target]) -> Any:
        """What there is of some layers of one block: has `tokens`, `moments`, `goal` and `sum_over`."""
        ...


class InPlace:
    """The model in memory takes the factors.

    Args:
        weights: where its weights come from, if they are not all in memory and are only to be read.
    """

    def __init__(self, weights: Weights | None = None) -> None:
        self.weights = weights or InMemory()

    def is_finished(self, block: str | None) -> bool:
        """Nothing was done before."""
        return False

    def restore(self, block: str | None) -> list[LayerReport] | None:
        """Nothing was done before."""
        return None

    def finish(self, block: str | None, layers: list[LayerReport]) -> None:
        """Nothing to do."""

    def keep(self, module: nn.Module, args: tuple, outputs: Any) -> Any:
        """Outputs stay where they are."""
        return outputs


@dataclass
class Measuring:
    """What is to be measured of a model.

    Args:
        model: as the job makes it.
        targets: of `find_targets`.
        plan: names the layers that matter, by a rank.
        batches: of `calibration_of`; empty for a solver that needs none, and where there are measurements.
        config: the calibration and the solver that it is for.
        clock: takes the seconds of each step.
        destination: of finished blocks.
        blocks: to walk over; by default those with a layer to factor.
        peers: the processes that do it together.
    """

    model: PreTrainedModel
    targets: Targets
    plan: RankPlan
    batches: list[dict[str, Any]]
    config: PGSVDConfig
    clock: Clock
    destination: Surroundings
    blocks: Sequence[str] = ()
    peers: Peers = field(default_factory=Peers)

    def __post_init__(self) -> None:
        self.blocks = self.blocks or [block for block in self.targets.blocks if self.in_block(block)]

    @cached_property
    def corrected(self) -> frozenset[str]:
        """The targets whose biases are to be corrected."""
        return frozenset(target.name for target in self.targets.found if self.config.correct_bias and target.own_bias)

    @property
    def factored(self) -> list[Target]:
        """The targets that the plan gives a rank."""
        return [target for target in self.targets.found if target.name in self.plan.ranks]

    def in_block(self, block: str | None) -> list[Target]:
        """Those of them that lie in a block, or outside of all."""
        return [target for target in self.factored if target.block == block]

    def layers(self, block: str | None) -> dict[str, nn.Module]:
        """Their modules by name."""
        return {target.name: self.model.get_submodule(target.name) for target in self.in_block(block)}


@dataclass
class Job(Measuring):
    """What is to be done to a model, which is changed in place.

    Args:
        measurements: made before, in the place of batches.
        elastic: takes the factors of the targets that stay dense.
        gradients: what they say of each layer: of `curvature_of` where the factors are to minimise the loss, of
            `gradient_energies_of` for a solver that needs them.
    """

    destination: Destination
    measurements: MomentsMade | None = None
    elastic: Elastic | None = None
    gradients: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def factored(self) -> list[Target]:
        """The targets that the plan gives a rank, and for an elastic checkpoint all that factors make smaller."""
        also = self.elastic is not None
        return [t for t in self.targets.found if t.name in self.plan.ranks or (also and t.shape.largest_saving_rank)]


def everything(targets: Targets) -> RankPlan:
    """A plan in which no layer is left out, for measuring all of them."""
    return RankPlan({target.name: LayerPlan(target.shape, target.shape.full_rank) for target in targets.found})


@contextmanager
def undone_on_error(model: nn.Module, targets: Targets, undo: bool) -> Iterator[None]:
    """Put the dense layers back where compressing a model in place fails; they are held until it has succeeded."""
    dense = {name: model.get_submodule(name) for name in targets.names} if undo else {}
    try:
        yield
    except BaseException:
        for name, module in dense.items():
            set_submodule(model, name, module.train(model.get_submodule(name).training))
        raise
