"""Second moments for layers whose inputs come from blocks that were compressed before them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..distributed import Peers
from ..errors import CalibrationError
from ..linalg import about_means, anchored_weight
from ..structures import Means
from ..targets import weight_shape
from .gram import GramRecorder, Rows
from .moments import SecondMoment, precise


class Seen(BaseException):
    """Nothing more of a forward pass is of interest."""


class AnchoredRecorder(GramRecorder):
    """Accumulates, over paired runs of a block, what anchored calibration needs of each layer's inputs.

    The block runs on the dense model's inputs (`pairing = "dense"`), then on those that the compressed blocks before
    it produce (`pairing = "compressed"`). Of the latter the Gram matrix `C_cc` is summed, and `D = (X_f − X_c)ᵀ X_c`,
    so that `C_βc = X_βᵀ X_c = C_cc + β D` with `X_β = (1 − β) X_c + β X_f` equals `C_cc` to the last bit where the two
    inputs are one: their difference is divided by a small number.

    Args:
        layers: linear layers by name.
        rows: leaves padding out.
        leaders: as for `GramRecorder`.
        blend: β in [0, 1].
        with_magnitudes: of the compressed inputs, as for `GramRecorder`.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        rows: Rows,
        leaders: Mapping[str, str] | None,
        blend: float,
        with_magnitudes: bool = False,
    ):
        super().__init__(layers, rows, leaders, with_magnitudes=with_magnitudes)
        self.blend, self.pairing = blend, "dense"
        self.awaited: set[str] = set()
        self._dense: dict[str, list[Tensor]] = {name: [] for name in layers}
        self._differences = {name: SecondMoment() for name in layers}

    def see(self, name: str, x: Tensor) -> None:
        """Keep a dense input; add a compressed one with the dense one that it pairs with.

        Raises:
            Seen: it was the last of the layers that were awaited.
        """
        self._take(name, x)
        if name in self.awaited:
            self.awaited.remove(name)
            if not self.awaited:
                raise Seen

    def _take(self, name: str, x: Tensor) -> None:
        if self.pairing == "dense":
            if self.leads(name, x):
                # a copy: the block may change its input in place
                self._dense[name].append(self.rows(x, x).clone())
            return
        super().see(name, x)
        if self.leaders[name] != name:
            return
        rows = precise(self.rows(x, x))
        dense = self._dense[name].pop(0) if self._dense[name] else rows[:0]
        if dense.shape != rows.shape:
            raise CalibrationError(
                f"{name} sees {len(dense)} rows in the dense model and {len(rows)} after compression, so they cannot "
                "be paired; use calibration='parallel', or list it in modules_to_not_convert"
            )
        self._differences[name].add_pairs(precise(dense) - rows, rows)

    def sum_layer(self, name: str, layer: Any, peers: Peers) -> None:
        """Add up what was recorded of a leading layer."""
        super().sum_layer(name, layer, peers)
        nothing = precise(layer.weight.new_empty(0, weight_shape(layer).in_features))
        self._differences[name].add_pairs(nothing, nothing)
        self._differences[name].sum_over(peers, nothing)

    def means(self, name: str) -> Means:
        """The means of a layer's compressed inputs, and of those whose outputs it should have."""
        compressed = super().means(name)
        difference = self.mean_difference(name)
        return Means(compressed.inputs, compressed.inputs + self.blend * difference, compressed.tokens)

    def mean_difference(self, name: str) -> Tensor:
        """What the dense inputs have more than the compressed ones, on average: `(n,)` float64."""
        return self._differences[self.leaders[name]].row_sum() / self.tokens[name]

    def goal(self, name: str, weight: Tensor, about_mean: bool = False) -> Tensor:
        """The weight that maps the compressed inputs to the outputs aimed at, each less its mean if that is asked for.

        A bias makes up for the means then, and the pull towards the layer's own weight is measured by what the inputs
        differ by from theirs.
        """
        moments = self.moments(name, about_mean)
        gram, cross = moments.gram, self._differences[self.leaders[name]].value()
        assert gram is not None
        if means := moments.means:
            cross = about_means(cross, self.mean_difference(name), means.inputs, means.tokens)
        return anchored_weight(weight, gram, gram + self.blend * cross)
