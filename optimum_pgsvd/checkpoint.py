"""Checkpoints on disk: a safe place to write one, and what one holds."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError, NotASafetensorsRepoError
from safetensors import safe_open

from .config import PGSVDConfig
from .errors import CheckpointError
from .report import REPORT_NAME, CompressionReport


# What an elastic checkpoint holds besides its weights; no part of the model.
ELASTIC_NAME = "pgsvd_elastic.safetensors"


def make_folder(path: str | os.PathLike) -> None:
    """Make a folder to write into, where there is none.

    Raises:
        CheckpointError: it cannot be made, or nothing can be written into it.
    """
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"the folder {path} cannot be made: {error.strerror}; name another") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise CheckpointError(f"nothing can be written into the folder {path}; name another, or change its rights")


@contextmanager
def new_folder(path: str | os.PathLike, overwrite: bool = False) -> Iterator[str]:
    """A folder that appears under its name only when everything in it has been written.

    Args:
        path: of the folder.
        overwrite: replace a folder that is not empty; the old one stays until the new one is complete.

    Yields:
        A folder beside it to write into.

    Raises:
        CheckpointError: the folder is not empty and may not be overwritten, is a file, or cannot be made.
    """
    path = os.path.abspath(path)
    if os.path.exists(path) and not os.path.isdir(path):
        raise CheckpointError(f"the output {path} is a file; name a folder")
    if os.path.isdir(path) and os.listdir(path) and not overwrite:
        raise CheckpointError(f"the output folder {path} is not empty; choose another, or overwrite it")
    make_folder(os.path.dirname(path))
    with tempfile.TemporaryDirectory(prefix=f".{os.path.basename(path)}.", dir=os.path.dirname(path)) as beside:
        fresh, old = os.path.join(beside, "new"), os.path.join(beside, "old")
        os.mkdir(fresh)
        yield fresh
        if os.path.isdir(path):
            os.rename(path, old)
        try:
            os.rename(fresh, path)
        except OSError:
            if os.path.isdir(old):
                os.rename(old, path)
            raise


class FolderLock:
    """A folder, made where there is none, that one process at a time works in; a killed process holds none.

    Args:
        folder: to be locked.

    Raises:
        CheckpointError: another process is at work in it.
    """

    def __init__(self, folder: str):
        os.makedirs(folder, exist_ok=True)
        self.path = os.path.join(folder, "lock")
        self._file = open(self.path, "a")  # noqa: SIM115  (open as long as the lock is held)
        try:
            import fcntl
        except ImportError:  # Windows
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise CheckpointError(f"another process is at work in {folder}; wait for it, or stop it") from None

    def release(self) -> None:
        """Let others in."""
        self._file.close()


@dataclass(frozen=True)
class CheckpointContents:
    """What a compressed checkpoint holds.

    Args:
        config: its quantization config.
        factors: `(out_features, rank, in_features)` of each compressed layer, by its name in the checkpoint.
        parameters: in all tensors, the order of rows in pivoted storage not counted.
        dtypes: parameters by dtype.
        report: the report beside it, `None` where there is none.
    """

    config: PGSVDConfig
    factors: Mapping[str, tuple[int, int, int]]
    parameters: int
    dtypes: Mapping[str, int]
    report: CompressionReport | None


def read_contents(source: str | os.PathLike, **hub: Any) -> CheckpointContents:
    """Read what a checkpoint holds from its config and its tensors' headers; no weight is loaded.

    Args:
        source: a folder, or the name of a model on the Hub.
        hub: `revision` and `token` of a model on the Hub.

    Returns:
        The contents.

    Raises:
        CheckpointError: it is no PGSVD checkpoint, or its factors and its config disagree.
    """
    name = os.fspath(source)
    config = read_config(name, **hub)
    tensors = local_tensors(name) if os.path.isdir(name) else hub_tensors(name, **hub)
    shapes = {key: shape for key, (shape, _) in tensors.items()}
    read = factor_shape if config.storage == "factors" else pivoted_shape
    factors = {layer: read(shapes, layer, rank, name) for layer, rank in (config.ranks or {}).items()}
    indices = {f"{layer}.order" for layer in factors}
    sizes: dict[str, int] = {}
    for key, (shape, dtype) in tensors.items():
        if key not in indices:
            sizes[dtype] = sizes.get(dtype, 0) + math.prod(shape)
    report = read_report(name, **hub)
    return CheckpointContents(config, factors, sum(sizes.values()), sizes, report)


def factor_shape(shapes: Mapping[str, tuple[int, ...]], layer: str, rank: int, name: str) -> tuple[int, int, int]:
    """`(out_features, rank, in_features)` of a layer stored as factors, from the shapes of all tensors by name.

    Raises:
        CheckpointError: they do not have this rank.
    """
    left, right = (shapes.get(f"{layer}.{factor}.weight", ()) for factor in ("left", "right"))
    if len(left) != 2 or len(right) != 2 or left[1] != rank or right[0] != rank:
        raise CheckpointError(
            f"{name}: the config gives {layer} rank {rank}, its factors are left {left or 'missing'} and right "
            f"{right or 'missing'}; the checkpoint is damaged or was edited"
        )
    return left[0], rank, right[1]


def pivoted_shape(shapes: Mapping[str, tuple[int, ...]], layer: str, rank: int, name: str) -> tuple[int, int, int]:
    """The same of a layer in pivoted storage."""
    basis, rest, order = (
        shapes.get(f"{layer}.{part}", ()) for part in ("basis.weight", "coefficients.weight", "order")
    )
    others = order[0] - rank if order else 0
    if len(basis) != 2 or len(order) != 1 or basis[0] != rank or (rest or (0, rank)) != (others, rank):
        raise CheckpointError(
            f"{name}: the config gives {layer} rank {rank}, its basis is {basis or 'missing'}, its coefficients are "
            f"{rest or 'missing'} and its order is {order or 'missing'}; the checkpoint is damaged or was edited"
        )
    return order[0], rank, basis[1]


def read_report(name: str, **hub: Any) -> CompressionReport | None:
    """The report beside a checkpoint, `None` where there is none."""
    if os.path.isdir(name):
        return CompressionReport.load(name) if os.path.exists(os.path.join(name, REPORT_NAME)) else None
    try:
        path = HfApi(library_name="optimum-pgsvd").hf_hub_download(name, REPORT_NAME, **hub)
    except EntryNotFoundError:
        return None
    return CompressionReport.load(os.path.dirname(path))


def read_config(name: str, **hub: Any) -> PGSVDConfig:
    """The quantization config of a checkpoint."""
    if os.path.isdir(name):
        path = os.path.join(name, "config.json")
        if not os.path.exists(path):
            raise CheckpointError(f"{name} holds no config.json, so no model")
    else:
        path = HfApi(library_name="optimum-pgsvd").hf_hub_download(name, "config.json", **hub)
    with open(path, encoding="utf-8") as file:
        values = json.load(file).get("quantization_config", {})
    if values.get("quant_method") != "pgsvd":
        raise CheckpointError(f"{name} is no PGSVD checkpoint: its quant_method is {values.get('quant_method')!r}")
    return PGSVDConfig(**values)


Tensors = dict[str, tuple[tuple[int, ...], str]]


def local_tensors(folder: str) -> Tensors:
    """Shape and dtype of every tensor in the safetensors files of a folder's model."""
    tensors: Tensors = {}
    for file in sorted(os.listdir(folder)):
        if file.endswith(".safetensors") and file != ELASTIC_NAME:
            with safe_open(os.path.join(folder, file), framework="pt") as shard:
                for key in shard.keys():  # noqa: SIM118  (not a mapping)
                    part = shard.get_slice(key)
                    tensors[key] = (tuple(part.get_shape()), part.get_dtype())
    return tensors


def hub_tensors(name: str, **hub: Any) -> Tensors:
    """Shape and dtype of every tensor of a model on the Hub, from the headers alone."""
    try:
        metadata = HfApi(library_name="optimum-pgsvd").get_safetensors_metadata(name, **hub)
    except NotASafetensorsRepoError as error:
        raise CheckpointError(f"{name} holds no safetensors files") from error
    return {
        key: (tuple(tensor.shape), tensor.dtype)
        for file in metadata.files_metadata.values()
        for key, tensor in file.tensors.items()
    }


def stored_bytes(source: str | os.PathLike, **hub: Any) -> int:
    """Bytes of the weights of a dense checkpoint, 0 where it has no safetensors files.

    Args:
        source: a folder, or the name of a model on the Hub.
        hub: `revision` and `token` of a model on the Hub.
    """
    name = os.fspath(source)
    if os.path.isdir(name):
        files = [file for file in os.listdir(name) if file.endswith(".safetensors")]
        return sum(os.path.getsize(os.path.join(name, file)) for file in files)
    try:
        tensors = hub_tensors(name, **hub)
    except CheckpointError:
        return 0
    bits = {dtype: int("".join(filter(str.isdigit, dtype.split("_")[0])) or 8) for _, dtype in tensors.values()}
    return sum(math.prod(shape) * bits[dtype] // 8 for shape, dtype in tensors.values())
