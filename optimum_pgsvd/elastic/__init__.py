"""Elastic checkpoints: what is written beside their weights, and how they are cut while they are loaded.

Components come in order of importance, so that the factors of a lower rank are the leading components of those that
are stored. The side file `pgsvd_elastic.safetensors` holds, by the names of the checkpoint,

* `<layer>.values`: the singular values of every target's weight, as they were measured, from which ranks are planned;
* `<layer>.left.weight`, `.right.weight` and `.left.bias` of every target that the checkpoint holds dense, at the
  largest rank that saves parameters: what the ordinary loader needs to load that layer as a low-rank one.
"""

from .cutting import Cut, check_cut, plan_cut
from .record import Elastic, settle_elastic, side_tensors, write_elastic
from .side_file import SideFile, find_side_file


__all__ = [
    "Cut",
    "Elastic",
    "SideFile",
    "check_cut",
    "find_side_file",
    "plan_cut",
    "settle_elastic",
    "side_tensors",
    "write_elastic",
]
