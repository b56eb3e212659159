"""Planning a cut: an elastic checkpoint is to be loaded at lower ranks than it holds, without data."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from ..config import BUDGETS, PGSVDConfig
from ..errors import ConfigError
from ..modeling_pgsvd import LowRankQuantizer, model_names, stock_conversions
from ..planning import plan_ranks
from ..replace import experts_apart
from ..report import CompressionReport
from ..structures import RankPlan, SVDProfile
from ..targets import Targets, find_targets, weight_shape
from .cut import Cut
from .side_file import SideFile


# What can be asked of a checkpoint. Everything else has gone into its factors.
CUT_FIELDS = (*BUDGETS, "allocation", "groups", "modules_to_not_convert", "rank_multiple")

FACTORS = ("left.weight", "right.weight", "left.bias")

NOTE = (
    "cut from an elastic checkpoint when it was loaded: weight errors are those of truncating the plain weights, and "
    "activation errors were not measured"
)


def check_cut(request: PGSVDConfig, made: PGSVDConfig) -> None:
    """Refuse what cannot be asked of a compressed checkpoint.

    Args:
        request: passed to `from_pretrained`.
        made: the checkpoint's config.

    Raises:
        ConfigError: the checkpoint is not elastic, or more is given than how far to cut it.
    """
    if not made.elastic:
        raise ConfigError(
            "this checkpoint is compressed already and is not elastic: load it without quantization_config, or "
            "compress the dense model anew, with elastic=True for a checkpoint that can be cut when it is loaded"
        )
    if request.needs_curvature or request.profile == "outputs":
        measured = "gradients" if request.needs_curvature else "outputs"
        raise ConfigError(
            f"objective={request.objective!r} with allocation={request.allocation!r} measures {measured}, and a "
            "checkpoint is cut without data; cut it with allocation='pareto', or compress the dense model"
        )
    default = PGSVDConfig(parameter_reduction=0).to_dict()
    asked = request.to_dict()
    given = [name for name in asked if name not in CUT_FIELDS and asked[name] != default.get(name)]
    if given:
        raise ConfigError(
            f"{', '.join(given)} cannot be given to cut a checkpoint, whose factors are made: give only "
            f"{', '.join(CUT_FIELDS)}, or compress the dense model"
        )


@dataclass(frozen=True, eq=False)
class StoredLayer:
    """A target as an elastic checkpoint holds it.

    Args:
        name: in the checkpoint.
        profile: of its weight.
        rank: of its factors, 0 where no factors of it save anything.
        dense: whether the checkpoint holds it dense, so that its factors are in the side file.
    """

    name: str
    profile: SVDProfile
    rank: int
    dense: bool

    @property
    def parameters(self) -> int:
        """Of its weight in the checkpoint as it is."""
        return self.profile.shape.parameters(None if self.dense else self.rank)

    def gives(self, rank: int | None) -> bool:
        """Whether it can be loaded at a rank, or dense (`None`)."""
        return self.dense if rank is None else rank <= self.rank


def plan_cut(model: PreTrainedModel, request: PGSVDConfig, quantizer: LowRankQuantizer, side: SideFile) -> Cut:
    """Plan how to cut a checkpoint.

    Args:
        model: being loaded, still dense and without weights.
        request: how far to cut.
        quantizer: that loads it, with the checkpoint's config.
        side: the checkpoint's side file.

    Returns:
        The cut.

    Raises:
        ConfigError: the request does not fit the model, cannot be met, or asks for more than is stored.
        CheckpointError: the side file is not that of the checkpoint.
    """
    made: Any = quantizer.quantization_config
    side.check(made)
    layers = stored_layers(model, side, quantizer)
    profiles = {name: layer.profile for name, layer in layers.items()}
    with experts_apart(model):
        targets = find_targets(model, request, layers)
    plan = plan_ranks(targets, request, profiles)
    check_stored(plan, layers)
    config = cut_config(made, request, {layers[name].name: rank for name, rank in plan.ranks.items()})
    factored = {name: layers[name].name for name in plan.ranks if layers[name].dense}
    return Cut(
        config,
        report_of(with_errors(plan, layers), targets, model, config, request),
        {name: layer.rank for name, layer in layers.items()},
        side.path if factored else None,
        unused_names(side, layers, factored),
    )


def stored_layers(model: PreTrainedModel, side: SideFile, quantizer: LowRankQuantizer) -> dict[str, StoredLayer]:
    """The targets of a checkpoint that a model has, by module name; those of another tower are left out."""
    ranks: Any = quantizer.quantization_config.ranks
    names: dict[str, Any] = model_names(model, {name: name for name in side.values}, stock_conversions(model))
    return {
        module: StoredLayer(
            name,
            SVDProfile(weight_shape(model.get_submodule(module)), side.values[name]),
            ranks.get(name) or side.ranks.get(name, 0),
            name not in ranks,
        )
        for module, name in names.items()
    }


def check_stored(plan: RankPlan, layers: Mapping[str, StoredLayer]) -> None:
    """Raise `ConfigError` where a plan asks for more than a checkpoint holds."""
    ranks = {name: plan.layers[name].rank if name in plan.layers else None for name in layers}
    more = [name for name, layer in layers.items() if not layer.gives(ranks[name])]
    if more:
        given = f"at rank {layers[more[0]].rank} or less" + (", or dense" if layers[more[0]].dense else "")
        asked = "dense" if ranks[more[0]] is None else f"at rank {ranks[more[0]]}"
        kept = sum(layer.parameters for layer in layers.values())
        dense = sum(layer.profile.shape.dense_parameters for layer in layers.values())
        # Rounded up: what is printed can be asked for.
        least = math.ceil(1e4 * (1 - kept / dense)) / 1e4
        raise ConfigError(
            f"the checkpoint gives {more[0]} {given}, and the request asks for it {asked}; it asks too much of "
            f"{len(more)} layers in all. With the allocation and the layers that it was made with, this checkpoint "
            f"gives parameter_reduction={least} or more; for a larger model, compress the dense model anew"
        )


def with_errors(plan: RankPlan, layers: Mapping[str, StoredLayer]) -> RankPlan:
    """A plan with the error e(rank) of every layer, whether or not it was planned by errors."""
    return RankPlan(
        {
            name: replace(layer, relative_error=layers[name].profile.relative_error(layer.rank))
            for name, layer in plan.layers.items()
        }
    )


def cut_config(made: PGSVDConfig, request: PGSVDConfig, ranks: Mapping[str, int]) -> PGSVDConfig:
    """The config of the result: how far from the request, all else from the checkpoint.

    Args:
        made: the checkpoint's.
        request: passed to `from_pretrained`.
        ranks: of the result, by name in the checkpoint.
    """
    result = made.with_ranks(ranks)
    for field in set(CUT_FIELDS) - {"ranks"}:
        setattr(result, field, copy.deepcopy(getattr(request, field)))
    dense = [*made.modules_to_not_convert, *request.modules_to_not_convert]
    result.modules_to_not_convert = list(dict.fromkeys(dense))
    result.elastic = False
    return result


def report_of(
    plan: RankPlan, targets: Targets, model: PreTrainedModel, config: PGSVDConfig, request: PGSVDConfig
) -> CompressionReport:
    """The report of a cut, from its plan and the dense model."""
    record = config.to_dict() | {"ranks": request.ranks, "format_version": None}
    return replace(CompressionReport.of_plan(plan, targets, model, record), notes=(NOTE,))


def unused_names(side: SideFile, layers: Mapping[str, StoredLayer], factored: Mapping[str, str]) -> frozenset[str]:
    """What the loader will find and this cut does not need, by its name in the checkpoint and in the model."""
    wanted = {f"{name}.{kind}" for name in factored.values() for kind in FACTORS}
    unused = {key for key in side.keys if key not in wanted} | {f"{name}.bias" for name in factored.values()}
    modules = {layer.name: module for module, layer in layers.items()}
    kinds = (*FACTORS, "values", "bias")
    return frozenset(
        unused | {f"{modules[name]}.{kind}" for name in modules for kind in kinds if f"{name}.{kind}" in unused}
    )
