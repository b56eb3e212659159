"""The weights and calibration inputs that every solver and every piece of linear algebra is tried on."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import reference
import torch
from torch import Tensor


# A squared error is a sum of a few hundred products of the size of the outputs' energy ‖W Xᵀ‖², each rounded at
# 1.1e-16 of it; the largest difference from an oracle that was seen is 1e-15 of the energy.
ROUNDING = 1e-13

# ALS inverts `right G rightᵀ`. For inputs of condition 1e9 that is singular to rounding, and noise passes the
# pseudo-inverse: up to half the full rank the squared error rose by at most 1.5e-11 of the energy over 300 draws, at
# any rank by at most 2.5e-5.
ALS_NOISE = 1e-9
ALS_NOISE_NEAR_FULL_RANK = 1e-4


@dataclass(frozen=True, eq=False, repr=False)
class Case:
    """A weight `(m, n)` and calibration inputs `(T, n)`, float64."""

    name: str
    weight: Tensor
    inputs: Tensor

    def __repr__(self) -> str:
        return self.name

    @property
    def full_rank(self) -> int:
        return min(self.weight.shape)

    @property
    def ranks(self) -> list[int]:
        """A few ranks from 1 to full."""
        k = self.full_rank
        return sorted({1, max(k // 4, 1), max(k // 2, 1), max(k - 1, 1), k})

    @property
    def light_ranks(self) -> list[int]:
        """Those up to half the full rank, where a factorisation can save parameters."""
        return [rank for rank in self.ranks if rank <= max(self.full_rank // 2, 1)]

    @property
    def ill_conditioned(self) -> bool:
        return "condition" in self.name

    @property
    def gram(self) -> Tensor:
        """`Xᵀ X`."""
        return reference.gram_matrix(self.inputs)

    @property
    def energy(self) -> float:
        """`‖W Xᵀ‖²`, the scale of rounding in squared errors; 1 for a zero weight."""
        return reference.norm(self.weight @ self.inputs.T) ** 2 or 1.0

    @property
    def rounding(self) -> float:
        """What rounding may change in a squared error."""
        return ROUNDING * self.energy

    @property
    def als_rounding(self) -> float:
        """The same for ALS, up to half the full rank."""
        return (ALS_NOISE if self.ill_conditioned else ROUNDING) * self.energy

    def squared_error(self, left: Tensor, right: Tensor) -> float:
        """`‖(W − left right) Xᵀ‖²`."""
        return reference.outputs_error(self.weight, left @ right, self.inputs) ** 2

    def least_squared_error(self, rank: int) -> float:
        """The least of any factors of this rank."""
        return reference.least_outputs_error(self.weight, self.inputs, rank) ** 2


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    """Orthonormal columns."""
    return torch.linalg.qr(gaussian(rows, columns, seed=seed))[0]


def conditioned(tokens: int, features: int, condition: float, seed: int) -> Tensor:
    """Inputs whose singular values fall evenly, on a logarithmic scale, from 1 to 1 / condition."""
    spectrum = torch.logspace(0, -torch.tensor(condition).log10().item(), features, dtype=torch.float64)
    return orthonormal(tokens, features, seed) * spectrum @ orthonormal(features, features, seed + 1).T


def with_dead_feature(inputs: Tensor, feature: int) -> Tensor:
    inputs = inputs.clone()
    inputs[:, feature] = 0
    return inputs


DEAD_FEATURE = 3

CASES = (
    Case("square", gaussian(24, 24, seed=0), gaussian(96, 24, seed=1)),
    Case("wide", gaussian(12, 32, seed=2), gaussian(96, 32, seed=3)),
    Case("tall", gaussian(32, 12, seed=4), gaussian(96, 12, seed=5)),
    Case("fewer tokens than features", gaussian(20, 24, seed=6), gaussian(6, 24, seed=7)),
    Case("fewer tokens than features, tall", gaussian(32, 12, seed=8), gaussian(5, 12, seed=9)),
    Case("rank-deficient", gaussian(20, 5, seed=10) @ gaussian(5, 24, seed=11), gaussian(96, 24, seed=12)),
    Case("condition 1e9", gaussian(12, 16, seed=13), conditioned(96, 16, 1e9, seed=14)),
    Case("condition 1e9, tall", gaussian(24, 16, seed=16), conditioned(96, 16, 1e9, seed=17)),
    Case("zero weight", torch.zeros(10, 14, dtype=torch.float64), gaussian(40, 14, seed=19)),
    Case("dead feature", gaussian(16, 20, seed=20), with_dead_feature(gaussian(96, 20, seed=21), DEAD_FEATURE)),
    Case("one row", gaussian(1, 16, seed=22), gaussian(40, 16, seed=23)),
    Case("one column", gaussian(16, 1, seed=24), gaussian(40, 1, seed=25)),
)

each_case = pytest.mark.parametrize("case", CASES, ids=repr)
