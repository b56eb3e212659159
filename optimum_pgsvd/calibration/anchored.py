"""Gram matrices for layers whose inputs come from blocks that were compressed before them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..linalg import anchored_weight
from .gram import GramRecorder, precise


class AnchoredRecorder(GramRecorder):
    """Accumulates, over paired runs of a block, what anchored calibration needs of each layer's inputs.

    The block runs on the dense model's inputs (`pairing = "dense"`), then on those that the compressed blocks before
    it produce (`pairing = "compressed"`). Of the latter the Gram matrix `C_cc` is summed, and `C_βc = X_βᵀ X_c` with
    `X_β = (1 − β) X_c + β X_f`.

    Args:
        layers: linear layers by name.
        rows: as for `InputObserver`.
        leaders: as for `GramRecorder`.
        blend: β in [0, 1].
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        rows: Callable[[Tensor], Tensor],
        leaders: Mapping[str, str] | None,
        blend: float,
    ):
        super().__init__(layers, rows, leaders)
        self.blend, self.pairing = blend, "dense"
        self._dense: dict[str, list[Tensor]] = {name: [] for name in layers}
        self._crosses: dict[str, Tensor] = {}

    def see(self, name: str, x: Tensor) -> None:
        """Keep a dense input; add a compressed one with the dense one that it pairs with."""
        if self.leaders[name] != name:
            return
        rows = precise(self.rows(x))
        if self.pairing == "dense":
            self._dense[name].append(rows)
            return
        super().see(name, x)
        dense = self._dense[name].pop(0) if self._dense[name] else rows[:0]
        if dense.shape != rows.shape:
            raise CalibrationError(
                f"{name} sees {len(dense)} rows in the dense model and {len(rows)} after compression, so they cannot "
                "be paired; use calibration='parallel', or list it in modules_to_not_convert"
            )
        if name not in self._crosses:
            self._crosses[name] = torch.zeros_like(self._grams[name])
        self._crosses[name] += (self.blend * dense + (1 - self.blend) * rows).T @ rows

    def goal(self, name: str, weight: Tensor) -> Tensor:
        """The weight that maps the compressed inputs to the outputs aimed at."""
        return anchored_weight(weight, self.gram(name), self._crosses[self.leaders[name]])
