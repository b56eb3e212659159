"""How fast the paper's alternating least squares comes to the closed-form optimum."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..config import PGSVDConfig
from ..errors import CalibrationError
from ..factoring import calibration_of, found_targets, keep_moments, plan_at, request_at
from ..linalg import alternating_least_squares, output_projection, relative_activation_error
from ..planning import dense_weight
from .results import origin, warn_of
from .theorem import NOISE


# Excess of the objective over its optimum at which sweeps are counted.
EXCESSES = (0.1, 0.01, 0.001)


@dataclass(frozen=True)
class LayerConvergence:
    """One layer.

    Args:
        name: of the layer.
        rank: of its factors.
        optimum: `‖(W − left right) Xᵀ‖ / ‖W Xᵀ‖` of the closed form.
        objectives: `‖(W − left right) Xᵀ‖²` after 0, 1, … sweeps, relative to that of the closed form; the first is
            that of the truncated SVD.
    """

    name: str
    rank: int
    optimum: float
    objectives: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Convergence:
    """All layers that a plan gives a rank.

    Args:
        layers: in model order.
        exact: names of layers whose rank leaves no error, to which nothing is relative.
        origin: see `results.origin`.
    """

    layers: tuple[LayerConvergence, ...]
    exact: tuple[str, ...]
    origin: Mapping[str, Any]

    @property
    def medians(self) -> list[float]:
        """The median over the layers after 0, 1, … sweeps."""
        return [statistics.median(column) for column in zip(*(layer.objectives for layer in self.layers), strict=True)]

    @property
    def worst(self) -> list[float]:
        """The largest over the layers after 0, 1, … sweeps."""
        return [max(column) for column in zip(*(layer.objectives for layer in self.layers), strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        within = {
            f"{name} within {excess:.1%} of the optimum": sweeps_until(curve, excess)
            for name, curve in (("median", self.medians), ("worst", self.worst))
            for excess in EXCESSES
        }
        return {
            **self.origin,
            "sweeps_until": within,
            "median": self.medians,
            "worst": self.worst,
            "layers": [asdict(layer) for layer in self.layers],
            "layers_without_error": list(self.exact),
        }


def sweeps_until(objectives: Sequence[float], excess: float) -> int | None:
    """The first sweep whose objective is within an excess of the optimum; `None` where none is."""
    return next((sweep for sweep, value in enumerate(objectives) if value <= 1 + excess), None)


def converge_model(
    model: PreTrainedModel, config: PGSVDConfig, sweeps: int = 20, tokenizer: Any = None
) -> Convergence:
    """The objective of ALS after every sweep, of every layer that the config's budget gives a rank.

    Args:
        model: dense, in memory; not changed.
        config: budget, allocation and calibration set; its solver has no effect.
        sweeps: of ALS, 1 or more.
        tokenizer: as for `PGSVDCompressor.compress`.

    Returns:
        The objectives.

    Raises:
        CalibrationError: there is no layer to tell of: the plan leaves all dense, or their ranks leave no error.
        PGSVDError: see `PGSVDCompressor.compress`.

    Source:
        arXiv 2510.05544, Algorithm 1; the paper says that it levels off after 5 to 10 sweeps.
    """
    budget = {name: getattr(config, name) for name in ("parameter_reduction", "tolerance", "ranks")}
    request = request_at(config, **budget, groups=config.groups, solver="als", num_iterations=sweeps)
    layers, exact = [], []
    with found_targets(model, request) as targets:
        kept = keep_moments(model, targets, request, calibration_of(model, targets, request, tokenizer))
        assert kept.moments is not None
        warn_of(kept)
        plan = plan_at(model, kept, request)
        for target in targets.found:
            if target.name in plan.ranks:
                gram = kept.moments.of_block([target]).moments(target.name).gram
                layer = converge(target.name, dense_weight(model, target.name), gram, plan.ranks[target.name], sweeps)
                layers.append(layer) if layer.optimum > NOISE else exact.append(target.name)
    if not layers:
        raise CalibrationError(
            f"ALS has nothing to converge to: the plan factors {len(plan.ranks)} layers, and their ranks leave no "
            "error; remove more parameters, or give more data"
        )
    return Convergence(tuple(layers), tuple(exact), origin(model, request, kept.notes))


def converge(name: str, weight: Tensor, gram: Tensor, rank: int, sweeps: int) -> LayerConvergence:
    """One layer.

    Args:
        name: of the layer.
        weight: `(m, n)`.
        gram: `(n, n)`.
        rank: 1 … min(m, n).
        sweeps: of ALS.
    """
    weight, gram = weight.double(), gram.double()
    optimum = relative_activation_error(weight, *output_projection(weight, gram, rank), gram)
    errors: list[float] = []

    def watch(left: Tensor, right: Tensor) -> None:
        errors.append(relative_activation_error(weight, left, right, gram))

    alternating_least_squares(weight, gram, rank, sweeps, watch)
    relative = tuple((error / optimum) ** 2 for error in errors) if optimum else ()
    return LayerConvergence(name, rank, optimum, relative)
