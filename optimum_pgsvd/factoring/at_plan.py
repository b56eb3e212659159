"""A model at any plan, for as long as a context lasts: cut from ordered factors, or solved from kept moments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

from ..config import PGSVDConfig
from ..errors import ConfigError
from ..modeling_pgsvd import set_submodule
from ..planning import plan_ranks
from ..replace import replace_linear
from ..report import LayerReport, planned_layers
from ..structures import LowRankFactors, RankPlan
from ..targets import find_targets
from .blocks import factor_layers
from .job import Clock, InPlace, Job
from .measuring import read
from .once import Kept, Once, Ordered


def plan_at(model: PreTrainedModel, once: Once, request: PGSVDConfig) -> RankPlan:
    """The plan of a request, from what was measured once.

    Args:
        model: dense, that was measured.
        once: of `ordered_factors` or `keep_moments`.
        request: with a budget, as of `request_at`.

    Returns:
        What `PGSVDCompressor.compress` would plan.

    Raises:
        ConfigError: the request does not fit the model or what was measured of it, or cannot be met.
    """
    targets = find_targets(model, request)
    if unknown := [name for name in targets.names if name not in once.profiles["weights"]]:
        raise ConfigError(
            f"the request compresses {unknown[0]}, which was no target when the model was measured; name it in the "
            "groups or ranks of that request too"
        )
    return plan_ranks(targets, request, once.profiles_for(request))


@contextmanager
def cut(model: nn.Module, ordered: Ordered, plan: RankPlan) -> Iterator[None]:
    """A context in which a model computes as if it had been compressed by a plan; its dense layers are back after it.

    Nothing is measured or decomposed: every factored layer keeps the leading components of its factors. In float32 and
    float64 the layers are those that `PGSVDCompressor.compress` makes, but for the rounding of matrix products; in
    half precision, to the rounding of the factors. With pivoted storage, thin layers of the same ranks stand in for
    the pivoted ones. The model's config is not touched, and the layers may share memory with `ordered`: they are there
    to be evaluated, not to be trained or saved.

    Args:
        model: dense, of which the factors are.
        ordered: of `ordered_factors`.
        plan: of `plan_at`, or any other.

    Raises:
        ConfigError: the plan asks a layer for more than there is.
    """
    check_held(ordered, plan)
    with dense_again(model, plan.ranks):
        for name, rank in plan.ranks.items():
            replace_linear(model, name, leading(ordered.factors[name], rank))
        yield


@contextmanager
def compressed_at(model: PreTrainedModel, kept: Kept, plan: RankPlan) -> Iterator[list[LayerReport]]:
    """A context in which a model is compressed by a plan, with factors of its own; its dense layers are back after it.

    The layers are those that `PGSVDCompressor.compress` makes, by any solver and in any storage; each time they are
    solved for, from the same moments. The model's config is not touched.

    Args:
        model: dense, that was measured.
        kept: of `keep_moments`.
        plan: of `plan_at`, or any other.

    Yields:
        The report of every layer that the plan gives a rank.
    """
    job = Job(
        model, kept.targets, plan, [], kept.config, Clock(), InPlace(), measurements=kept.moments,
        gradients=kept.gradients,
    )  # fmt: skip
    planned = {layer.name: layer for layer in planned_layers(plan)}
    with dense_again(model, plan.ranks):
        yield [layer for step in read(job) for layer in factor_layers(job, step, planned)]


@contextmanager
def dense_again(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """A context after which these layers of a model are what they were; what is new in their place trains likewise."""
    dense = {name: model.get_submodule(name) for name in names}
    try:
        yield
    finally:
        for name, module in dense.items():
            set_submodule(model, name, module.train(model.get_submodule(name).training))


def check_held(ordered: Ordered, plan: RankPlan) -> None:
    """Raise `ConfigError` where a plan asks for more than was decomposed."""
    for name, rank in plan.ranks.items():
        held = ordered.factors[name].rank if name in ordered.factors else 0
        if rank > held:
            raise ConfigError(
                f"the plan gives {name} rank {rank}, and its factors have rank {held}, the largest that saves "
                "parameters: lower it, or leave the layer dense"
            )


def leading(factors: LowRankFactors, rank: int) -> LowRankFactors:
    """The factors of a lower rank."""
    return LowRankFactors(factors.left[:, :rank], factors.right[:rank])
