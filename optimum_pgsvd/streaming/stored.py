"""The files of a dense checkpoint: where they are, what they hold, and how a tensor is read from them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import str_to_torch_dtype
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from ..errors import CheckpointError, UnsupportedModelError


# What a fingerprint reads of every file.
SAMPLES, SAMPLE_BYTES = 64, 4096

# A call of posix_fadvise reads no more than the readahead of the disk, whatever it is asked for: 128 KiB by default.
READAHEAD_BYTES = 128 * 1024


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, read when it is indexed, as transformers' loader does.

    Args:
        key: its name in the file.
        path: of the file.
        dtype: of its elements.
        shape: of the tensor.
        start: of its bytes in the file.
        stop: of its bytes in the file.
    """

    key: str
    path: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    def __getitem__(self, index: Any) -> Tensor:
        """Read all of it into memory of its own, and index that.

        A file that is mapped instead counts as memory of this process wherever it was touched, until the last tensor
        of it is gone.
        """
        tensor = torch.empty(self.shape, dtype=self.dtype)
        with open(self.path, "rb") as file:
            file.seek(self.start)
            if file.readinto(tensor.reshape(-1).view(torch.uint8).numpy().data) != self.stop - self.start:
                raise CheckpointError(f"{self.path} ends within {self.key}; it was changed since it was opened")
        return tensor[index]


def read_header(path: str) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name.

    Args:
        path: of the file.

    Raises:
        CheckpointError: the file is missing, damaged, or holds a dtype that transformers does not load.
    """
    try:
        size, header = os.path.getsize(path), header_bytes(path)
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        tensors = {key: stored_tensor(key, path, 8 + len(header), **entry) for key, entry in entries.items()}
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing, though the checkpoint names it; download it again") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}; download it again") from error
    if any(tensor.stop > size for tensor in tensors.values()):
        raise CheckpointError(f"{path} is cut short after {size} bytes; download it again")
    return tensors


def header_bytes(path: str) -> bytes:
    """The header of a safetensors file: JSON, after its length in eight bytes."""
    with open(path, "rb") as file:
        return file.read(min(int.from_bytes(file.read(8), "little"), os.path.getsize(path)))


def stored_tensor(
    key: str, path: str, offset: int, dtype: str, shape: list[int], data_offsets: list[int]
) -> StoredTensor:
    """A tensor as the header of its file describes it, its bytes counted from `offset`."""
    if dtype not in str_to_torch_dtype:
        raise CheckpointError(f"{path}: {key} is stored as {dtype}, which transformers does not load")
    start, stop = data_offsets
    return StoredTensor(key, path, str_to_torch_dtype[dtype], tuple(shape), offset + start, offset + stop)


def find_config(source: str, **hub: Any) -> str:
    """The path of a dense checkpoint's config.

    Args:
        source: a folder, or the name of a model on the Hub.
        hub: `revision` and `token`.

    Raises:
        CheckpointError: there is no config.
        UnsupportedModelError: the checkpoint is compressed or quantized already, or an adapter.
    """
    path = find_file(source, CONFIG_NAME, **hub)
    if find_file(source, "adapter_config.json", **hub):
        raise UnsupportedModelError(
            f"{source} is an adapter; load it, merge it into its model with merge_and_unload(), and save that"
        )
    if path is None:
        raise CheckpointError(f"{source} holds no {CONFIG_NAME}, so no model")
    if quantization := read_json(path).get("quantization_config"):
        raise UnsupportedModelError(
            f"{source} is compressed or quantized already (quant_method {quantization.get('quant_method')!r}); "
            "name the dense checkpoint it was made from"
        )
    return path


def find_weights(source: str, named: str | None, **hub: Any) -> list[str]:
    """The paths of a checkpoint's safetensors files, downloaded where it is on the Hub.

    Args:
        source: a folder, or the name of a model on the Hub.
        named: the file, or the index of files, that the config names, if it does.
        hub: `revision` and `token`.

    Raises:
        CheckpointError: there are none.
    """
    for name in [named] if named else [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME]:
        if path := find_file(source, name, **hub):
            return list(get_checkpoint_shard_files(source, path, **hub)[0]) if name.endswith(".json") else [path]
    raise CheckpointError(
        f"{source} holds no {named or SAFE_WEIGHTS_NAME}, whole or in shards; where its weights have another format, "
        "load the model with from_pretrained and save it with save_pretrained, which writes safetensors"
    )


def read_json(path: str) -> dict[str, Any]:
    """What a JSON file holds.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return dict(json.load(file))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def find_file(source: str, name: str, **hub: Any) -> str | None:
    """The path of a file of a checkpoint, `None` where it has none of that name."""
    return cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub)


def read_ahead(tensors: Iterable[StoredTensor]) -> None:
    """Ask the operating system to read tensors into its cache; what it cannot do is left to be read later."""
    for tensor in sorted(tensors, key=lambda tensor: (tensor.path, tensor.start)):
        with suppress(OSError), open(tensor.path, "rb") as file:
            for start in range(tensor.start, tensor.stop, READAHEAD_BYTES):
                length = min(READAHEAD_BYTES, tensor.stop - start)
                os.posix_fadvise(file.fileno(), start, length, os.POSIX_FADV_WILLNEED)


def file_fingerprint(path: str) -> dict[str, Any]:
    """The size of a safetensors file, and digests of its header and of pieces of it, evenly spaced."""
    size, sample = os.path.getsize(path), hashlib.sha256()
    with open(path, "rb") as file:
        for i in range(SAMPLES):
            file.seek(max(size - SAMPLE_BYTES, 0) * i // (SAMPLES - 1))
            sample.update(file.read(SAMPLE_BYTES))
    header = hashlib.sha256(header_bytes(path)).hexdigest()
    return {"size": size, "header": header, "sample": sample.hexdigest()}
