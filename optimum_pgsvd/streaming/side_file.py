"""The side file of an elastic checkpoint that is compressed on disk, filled in as its blocks are finished."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from ..checkpoint import ELASTIC_NAME
from ..elastic import Elastic, side_tensors
from ..structures import LowRankFactors, RankPlan, SVDProfile
from .shards import flush, lay_out, pieces, put_file
from .stored import read_header


class SideFileWriter(Elastic):
    """An `Elastic` that holds nothing: what it is given is in the file.

    The file has its layout and all singular values before the plan is relied on, so that a run which is taken up finds
    them there. Factors are written while their layer is in memory.

    Args:
        folder: of the checkpoint.
        model: dense.
        writes: whether this process does; of several, one.
    """

    def __init__(self, folder: str, model: PreTrainedModel, writes: bool = True):
        super().__init__({})
        self.folder, self.model, self.writes = folder, model, writes
        self.path = os.path.join(folder, ELASTIC_NAME)

    def begin(self, plan: RankPlan, profiles: Mapping[str, SVDProfile]) -> None:
        """Lay the file out, and put the singular values into it for good.

        Args:
            plan: of the targets.
            profiles: of their weights.
        """
        tensors = side_tensors(self.model, profiles, unmade_factors(plan, self.model))
        layout = lay_out(tensors)
        put_file(self.path, layout.header, layout.size)
        self._write(profiles, {})
        self.sync()
        flush(self.folder)

    def add(self, name: str, factors: LowRankFactors) -> None:
        """Write the factors of a target that stays dense; see `Elastic.add`."""
        if self.writes:
            self._write({}, {name: factors})

    def sync(self) -> None:
        """Return when all that was added is on the disk."""
        if self.writes:
            flush(self.path)

    def _write(self, profiles: Mapping[str, SVDProfile], factors: Mapping[str, LowRankFactors]) -> None:
        places = read_header(self.path)
        with open(self.path, "r+b") as file:
            for name, tensor in side_tensors(self.model, profiles, factors).items():
                assert (tensor.dtype, tuple(tensor.shape)) == (places[name].dtype, places[name].shape), name
                file.seek(places[name].start)
                for piece in pieces(tensor):
                    file.write(piece)

    def write(self, model: PreTrainedModel, path: str) -> None:
        """Nothing to do: the file is in the checkpoint already."""


def unmade_factors(plan: RankPlan, model: PreTrainedModel) -> dict[str, LowRankFactors]:
    """The factors of the targets that stay dense, without values, at the largest rank that saves parameters."""
    ranks = {name: each.shape.largest_saving_rank for name, each in plan.layers.items() if each.rank is None}

    def unmade(name: str, rank: int) -> LowRankFactors:
        shape, dtype = plan.layers[name].shape, model.get_parameter(f"{name}.weight").dtype
        left, right = (shape.out_features, rank), (rank, shape.in_features)
        return LowRankFactors(*(torch.empty(size, dtype=dtype, device="meta") for size in (left, right)))

    return {name: unmade(name, rank) for name, rank in ranks.items() if rank}
