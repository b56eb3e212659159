"""The compressed checkpoint, written block by block."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from ..config import PGSVDConfig
from ..distributed import Peers
from ..errors import CheckpointError
from ..modeling_pgsvd import LAYERS, apart_experts, checkpoint_names, low_rank_layers, set_submodule, tripwires
from ..replace import mark_compressed
from ..report import CompressionReport
from ..saving import attach_artifacts
from ..storing import STORED
from ..structures import RankPlan, StoredFactors
from .process import without_progress_bars
from .shards import ShardWriter
from .side_file import SideFileWriter


class CompressedCheckpoint:
    """The files of a model that is being compressed, byte for byte those of `save_pretrained`.

    Args:
        folder: to write into.
        model: the dense model, on the meta device.
        plan: the rank of every layer.
        config: the request.
        max_shard_size: of a weights file, in bytes or as in `"5GB"`.
        peers: the processes that compress it together, of which the main one writes.
        elastic: its side file, of a checkpoint that can be cut.

    Attributes:
        outline: the compressed model on the meta device.
    """

    def __init__(
        self,
        folder: str,
        model: PreTrainedModel,
        plan: RankPlan,
        config: PGSVDConfig,
        max_shard_size: int | str,
        peers: Peers,
        elastic: SideFileWriter | None = None,
    ):
        self.folder, self.peers, self.elastic = folder, peers, elastic
        self.outline = outline(model, plan, config)
        self._tripwires = tripwires(self.outline)
        state = {**self.outline.state_dict(), **self._tripwires}
        for name in self.outline._keys_to_ignore_on_save or ():
            state.pop(name, None)
        state = remove_tied_weights_from_state_dict(state, self.outline)
        self._stored = frozenset(state)
        self._writer = ShardWriter(folder, revert_weight_conversion(self.outline, state), max_shard_size)
        peers.from_main(self._writer.allocate)

    def write(self, model: PreTrainedModel, wanted: Callable[[str], bool]) -> None:
        """Write those of a model's tensors whose names are wanted, and put them on disk for good.

        Args:
            model: with its layers replaced, the wanted tensors in memory.
            wanted: tells of a tensor's name whether it is.

        Raises:
            CheckpointError: the model is not what the plan makes of it.
            OSError: the disk is full.
        """
        if not self.peers.is_main:
            return
        names = {name for name in self._stored if wanted(name)}
        held = {**model.state_dict(), **self._fused_again(model, wanted), **self._tripwires}
        state = {name: value for name, value in held.items() if name in names}
        if missing := names - state.keys():
            raise CheckpointError(f"the plan makes {min(missing)} part of the model, and there is none in it")
        for name, value in revert_weight_conversion(self.outline, state).items():
            self._writer.write(name, value)
        self._writer.sync()
        if self.elastic is not None:
            self.elastic.sync()

    def _fused_again(self, model: PreTrainedModel, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        """The weights of the wanted experts that were taken apart and are not in the checkpoint."""
        kept = apart_experts(self.outline)
        return {
            f"{name}.{key}": value
            for name, experts in apart_experts(model).items()
            if name not in kept and wanted(f"{name}.")
            for key, value in experts.fused().state_dict().items()
        }

    def read_factors(self, names: Sequence[str]) -> dict[str, StoredFactors]:
        """The factors of layers that an earlier run wrote."""
        on_disk, kind = checkpoint_names(self.outline, names), STORED[self.outline.config.quantization_config.storage]
        read = {}
        for name in names:
            keys = self.outline.get_submodule(name).state_dict()
            read[name] = kind.of_tensors({key: self._read(f"{on_disk[name]}.{key}") for key in keys})
        return read

    def _read(self, name: str) -> Tensor:
        with safe_open(os.path.join(self.folder, self._writer.file_of[name]), framework="pt") as file:
            return file.get_tensor(name).clone()

    def finish(self, report: CompressionReport, tokenizer: Any, scratch: str) -> None:
        """Write what belongs to the checkpoint besides its weights.

        Args:
            report: of the compression.
            tokenizer: tokenizer or processor, or where to load it from; by default the source's.
            scratch: an empty folder on the same disk.
        """
        if not self.peers.is_main:
            return
        self._writer.write_index(self.outline.num_parameters())
        attach_artifacts(self.outline, report, tokenizer, self.elastic)
        # save_pretrained writes everything, given that there are no weights; it would remove those that are there
        quantizer: Any = self.outline.hf_quantizer
        quantizer.get_state_dict_and_metadata = MethodType(lambda quantizer, model: ({}, {}), quantizer)
        with without_progress_bars():
            self.outline.save_pretrained(scratch)
        weights = shutil.ignore_patterns("*.safetensors")
        shutil.copytree(scratch, self.folder, ignore=weights, dirs_exist_ok=True)


def outline(model: PreTrainedModel, plan: RankPlan, config: PGSVDConfig) -> PreTrainedModel:
    """What a model will be when it is compressed, without its weights."""
    compressed = copy.deepcopy(model).to("meta")
    for name, rank in plan.ranks.items():
        layer = LAYERS[config.storage].like(compressed.get_submodule(name), rank, device="meta")
        set_submodule(compressed, name, layer)
    for name, experts in apart_experts(compressed).items():
        if not low_rank_layers(experts):
            set_submodule(compressed, name, experts.stock[0])
    mark_compressed(compressed, config)
    return compressed
