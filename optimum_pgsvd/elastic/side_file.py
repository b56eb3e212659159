"""The file beside an elastic checkpoint's weights, read without its factors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import cached_file

from ..checkpoint import ELASTIC_NAME
from ..config import PGSVDConfig
from ..errors import CheckpointError


@dataclass(frozen=True, eq=False)
class SideFile:
    """What the side file holds; its factors are left to the loader.

    Args:
        path: of the file.
        values: singular values of every target, by its name in the checkpoint.
        ranks: of the factors in the file, likewise.
        keys: everything in the file.
    """

    path: str
    values: Mapping[str, Tensor]
    ranks: Mapping[str, int]
    keys: tuple[str, ...]

    @classmethod
    def read(cls, path: str) -> SideFile:
        """Read the values, and the ranks from the file's header.

        Raises:
            CheckpointError: the file is damaged.
        """
        try:
            with safe_open(path, framework="pt") as file:
                keys = tuple(file.keys())
                values = {layer: file.get_tensor(f"{layer}.values") for layer in owners(keys, ".values")}
                right = {layer: file.get_slice(f"{layer}.right.weight") for layer in owners(keys, ".right.weight")}
                return cls(path, values, {layer: factor.get_shape()[0] for layer, factor in right.items()}, keys)
        except SafetensorError as error:
            raise CheckpointError(f"{path} is damaged; save or download it again: {error}") from error

    def check(self, made: PGSVDConfig) -> None:
        """Raise `CheckpointError` where the file does not belong to a checkpoint of this config."""
        ranks = made.ranks or {}
        if wrong := sorted((ranks.keys() - self.values.keys()) | (ranks.keys() & self.ranks.keys())):
            raise CheckpointError(
                f"{self.path} and the config.json beside it disagree on {len(wrong)} layers, {wrong[0]} among them: "
                "they are not of one checkpoint; save or download both again"
            )


def owners(keys: Iterable[str], suffix: str) -> list[str]:
    """The layers that have a tensor of some kind."""
    return [key.removesuffix(suffix) for key in keys if key.endswith(suffix)]


def find_side_file(name: str, checkpoint_files: list[str] | None, commit: str | None) -> str:
    """The side file of the checkpoint that a model is loaded from.

    Args:
        name: a folder, or the name of a model on the Hub.
        checkpoint_files: the weights, in that folder or in the Hub's cache.
        commit: that is loaded, of a model on the Hub.

    Returns:
        A local path; from the Hub, the file is downloaded.

    Raises:
        CheckpointError: there is no such file, or it cannot be reached.
    """
    folder = os.path.dirname(checkpoint_files[0]) if checkpoint_files else ""
    if folder and os.path.exists(path := os.path.join(folder, ELASTIC_NAME)):
        return path
    subfolder = folder.rpartition(commit)[2].strip(os.sep) if commit else ""
    try:
        return str(cached_file(name, ELASTIC_NAME, revision=commit, subfolder=subfolder))
    except OSError as error:
        raise CheckpointError(
            f"{name} cannot be cut without its {ELASTIC_NAME}, which is not there or cannot be reached: load it "
            f"without quantization_config, or download all of it. {error}"
        ) from error
