"""The nouns: frozen values that the steps of the pipeline hand to one another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from .errors import ConfigError
from .linalg import INDEX, about_means, relative_tails


@dataclass(frozen=True)
class LinearShape:
    """Shape of a linear layer's weight, and how one of lower rank is stored in its place.

    Args:
        out_features: m.
        in_features: n.
        storage: `"factors"`, `r (m + n)` parameters, or `"pivoted"`, `r (m + n − r)`.
    """

    out_features: int
    in_features: int
    storage: str = "factors"

    @property
    def dense_parameters(self) -> int:
        """`m n`: parameters of the weight, the bias not counted."""
        return self.out_features * self.in_features

    @property
    def full_rank(self) -> int:
        """`min(m, n)`."""
        return min(self.out_features, self.in_features)

    @property
    def largest_saving_rank(self) -> int:
        """Largest r that is stored in fewer than `m n` parameters; 0 where no rank saves anything."""
        if self.storage == "pivoted":
            return self.full_rank - 1
        return (self.dense_parameters - 1) // (self.out_features + self.in_features)

    @property
    def solving_cost(self) -> float:
        """`m n min(m, n)`: what a decomposition of the weight costs, up to a factor that is the same for all."""
        return float(self.dense_parameters) * self.full_rank

    def parameters(self, rank: int | None) -> int:
        """Parameters of the weight at a rank; `None` means dense."""
        if rank is None:
            return self.dense_parameters
        saved = rank if self.storage == "pivoted" else 0
        return rank * (self.out_features + self.in_features - saved)

    def index_bytes(self, rank: int | None) -> int:
        """Bytes of what a rank needs besides parameters: for pivoted storage, where each row is."""
        return INDEX.itemsize * self.out_features if rank is not None and self.storage == "pivoted" else 0


@dataclass(frozen=True)
class Budget:
    """How much of a group of layers is kept: exactly one of the two.

    Args:
        parameter_reduction: fraction of the group's parameters removed, in [0, 1).
        tolerance: ε, the largest relative error of each layer, in [0, 1].
    """

    parameter_reduction: float | None = None
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if (self.parameter_reduction is None) == (self.tolerance is None):
            raise ConfigError("a budget is exactly one of parameter_reduction and tolerance")
        for value in (self.parameter_reduction, self.tolerance):
            if value is not None and (not isinstance(value, (int, float)) or isinstance(value, bool)):
                raise ConfigError(f"a budget is a number, not {value!r}")
        if self.parameter_reduction is not None and not 0 <= self.parameter_reduction < 1:
            raise ConfigError(
                f"parameter_reduction={self.parameter_reduction} is outside [0, 1): it is the fraction of the target "
                "layers' parameters that is removed, 0.2 for 20 %"
            )
        if self.tolerance is not None and not 0 <= self.tolerance <= 1:
            raise ConfigError(
                f"tolerance={self.tolerance} is outside [0, 1]: it is the relative error allowed in each layer"
            )


@dataclass(frozen=True, eq=False)
class SVDProfile:
    """Relative error of a layer as a function of its rank.

    Args:
        shape: of the weight.
        values: singular values `(min(m, n),)`, descending, of the plain weight (the paper's profile), or of the
            weight as the loss sees it (`weighted_spectrum`).

    Source:
        arXiv 2510.05544, Definition 1.
    """

    shape: LinearShape
    values: Tensor

    def __post_init__(self) -> None:
        if self.values.shape != (self.shape.full_rank,) or bool((self.values.diff() > 0).any()):
            raise ValueError(f"a {self.shape} has {self.shape.full_rank} singular values, largest first")

    @cached_property
    def errors(self) -> Tensor:
        """`e(r)` for r = 0 … min(m, n), float64, never rising."""
        return relative_tails(self.values)

    def relative_error(self, rank: int | None) -> float:
        """`e(rank)`; 0 for a dense layer (`None`)."""
        if rank is not None and not 0 <= rank <= self.shape.full_rank:
            raise ValueError(f"rank {rank} is outside 0 … {self.shape.full_rank}")
        return 0.0 if rank is None else float(self.errors[rank])

    def rank_for(self, tolerance: float) -> int:
        """Smallest rank whose relative error is at most `tolerance`, which is 0 or more."""
        if tolerance < 0:
            raise ValueError(f"tolerance {tolerance} is negative")
        return int((self.errors > tolerance).sum())


@dataclass(frozen=True, eq=False)
class LowRankFactors:
    """`W ≈ left @ right`.

    Args:
        left: `(m, r)`.
        right: `(r, n)`.
        bias: `(m,)`, where the layer gets another than it had.
    """

    storage: ClassVar[str] = "factors"

    left: Tensor
    right: Tensor
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        if self.left.shape[1] != self.right.shape[0]:
            raise ValueError(f"left {tuple(self.left.shape)} and right {tuple(self.right.shape)} share no rank")

    @property
    def rank(self) -> int:
        """Inner dimension r."""
        return self.right.shape[0]

    def to(self, dtype: torch.dtype) -> LowRankFactors:
        """The factors, contiguous, rounded once to `dtype`."""
        return LowRankFactors(self.left.to(dtype).contiguous(), self.right.to(dtype).contiguous())

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By their names in a checkpoint, that of the layer left out."""
        bias = {} if self.bias is None else {"left.bias": self.bias}
        return {"left.weight": self.left, "right.weight": self.right, **bias}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> LowRankFactors:
        """From what `tensors` gives."""
        return cls(tensors["left.weight"], tensors["right.weight"], tensors.get("left.bias"))


@dataclass(frozen=True, eq=False)
class PivotedFactors:
    """A matrix of rank r by r of its rows, and what makes the other rows of them.

    Row i is row `order[i]` of `[basis; coefficients @ basis]`.

    Args:
        basis: `(r, n)`.
        coefficients: `(m − r, r)`.
        order: `(m,)` int32, a permutation of 0 … m − 1.
        bias: `(m,)`, where the layer gets another than it had.

    Source:
        arXiv 2501.19090 (PIFA).
    """

    storage: ClassVar[str] = "pivoted"

    basis: Tensor
    coefficients: Tensor
    order: Tensor
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        if self.coefficients.shape != (len(self.order) - self.rank, self.rank):
            raise ValueError(
                f"{len(self.order)} rows of rank {self.rank} need coefficients "
                f"{(len(self.order) - self.rank, self.rank)}, not {tuple(self.coefficients.shape)}"
            )

    @property
    def rank(self) -> int:
        """Rows of the basis r."""
        return self.basis.shape[0]

    @property
    def left(self) -> Tensor:
        """`(m, r)` with `W ≈ left @ basis`: rows of the identity, and the coefficients."""
        identity = torch.eye(self.rank, dtype=self.coefficients.dtype, device=self.coefficients.device)
        return torch.cat([identity, self.coefficients])[self.order.long()]

    @property
    def right(self) -> Tensor:
        """The basis."""
        return self.basis

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By their names in a checkpoint, that of the layer left out; where all rows are in the basis, no more."""
        others = {"coefficients.weight": self.coefficients} if len(self.coefficients) else {}
        bias = {} if self.bias is None else {"bias": self.bias}
        return {"order": self.order, "basis.weight": self.basis, **others, **bias}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> PivotedFactors:
        """From what `tensors` gives."""
        basis = tensors["basis.weight"]
        coefficients = tensors.get("coefficients.weight", basis.new_empty(0, len(basis)))
        return cls(basis, coefficients, tensors["order"], tensors.get("bias"))


StoredFactors = LowRankFactors | PivotedFactors


# Variance of a layer's inputs relative to their mean square below which they are one input over and over, as far as
# the rounding of sums lets one tell.
LEAST_VARIANCE = 1e-5


@dataclass(frozen=True, eq=False)
class Means:
    """What moments about the mean leave out, and a bias can make up for.

    Args:
        inputs: `(n,)` float64, the mean of the layer's inputs.
        anchors: `(n,)` float64, the mean of the inputs whose outputs the layer should have: the same, but for anchored
            calibration.
        tokens: how many inputs there were.
    """

    inputs: Tensor
    anchors: Tensor
    tokens: int


@dataclass(frozen=True, eq=False)
class Moments:
    """What the calibration set says of one layer: exactly one of the two matrices.

    Args:
        gram: `G = Xᵀ X (n, n)` of its inputs, or, with `means`, of what they differ by from their mean.
        outputs: `W G Wᵀ (m, m)` of its outputs, the bias not counted.
        energies: `(n,)`, the diagonal of G.
        means: where G is about the mean.
        magnitudes: `(n,)` float64, the mean absolute values of the inputs themselves, where they were measured.
    """

    gram: Tensor | None
    outputs: Tensor | None
    energies: Tensor
    means: Means | None = None
    magnitudes: Tensor | None = None

    def about(self, means: Means) -> Moments:
        """The moments about the mean; as they are where the inputs are all but one, of which nothing would be left."""
        assert self.gram is not None
        gram = about_means(self.gram, means.inputs, means.inputs, means.tokens)
        if float(gram.diagonal().sum()) <= LEAST_VARIANCE * float(self.gram.diagonal().sum()):
            return self
        return Moments(gram, None, gram.diagonal(), means, self.magnitudes)

    @property
    def measured(self) -> Tensor:
        """The one of the two that there is."""
        value = self.outputs if self.gram is None else self.gram
        assert value is not None
        return value


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer.

    Args:
        shape: of the weight.
        rank: `None` keeps the layer dense.
        group: the glob of `PGSVDConfig.groups` that the layer fell under, "" for none.
        tolerance: the group's ε, `None` where ranks were not chosen by a tolerance.
        relative_error: e(rank) on the plain weight, `None` where it was not computed.
    """

    shape: LinearShape
    rank: int | None
    group: str = ""
    tolerance: float | None = None
    relative_error: float | None = None

    @property
    def parameters(self) -> int:
        """Parameters of the layer's weight after compression."""
        return self.shape.parameters(self.rank)


@dataclass(frozen=True)
class RankPlan:
    """The result of allocation: a rank, or dense, for every target layer.

    Args:
        layers: by module name, in model order.
    """

    layers: Mapping[str, LayerPlan] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, layer in self.layers.items():
            if layer.rank is not None and not 1 <= layer.rank <= layer.shape.full_rank:
                raise ConfigError(
                    f"rank {layer.rank} of {name} is outside 1 … {layer.shape.full_rank}, the full rank of its "
                    f"{layer.shape.out_features} × {layer.shape.in_features} weight"
                )

    @property
    def ranks(self) -> dict[str, int]:
        """Ranks of the layers that are factored; dense layers are absent."""
        return {name: layer.rank for name, layer in self.layers.items() if layer.rank is not None}

    @property
    def dense_parameters(self) -> int:
        """Parameters of the target weights before compression."""
        return sum(layer.shape.dense_parameters for layer in self.layers.values())

    @property
    def kept_parameters(self) -> int:
        """Parameters of the target weights after compression, layers kept dense included."""
        return sum(layer.parameters for layer in self.layers.values())

    @property
    def parameter_reduction(self) -> float:
        """Fraction of the targets' parameters removed."""
        return 1 - self.kept_parameters / self.dense_parameters if self.layers else 0.0

    @staticmethod
    def merge(plans: Iterable[RankPlan], order: Iterable[str]) -> RankPlan:
        """One plan out of several over disjoint layers, in the given order."""
        layers = {name: layer for plan in plans for name, layer in plan.layers.items()}
        ordered = RankPlan({name: layers.pop(name) for name in order})
        assert not layers, f"layers without a place in the order: {list(layers)}"
        return ordered
