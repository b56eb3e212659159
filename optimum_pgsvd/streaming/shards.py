"""Safetensors files written tensor by tensor, in any order, as `save_pretrained` would have written them at once."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass

import torch
from huggingface_hub import constants, get_torch_storage_size, split_state_dict_into_shards_factory
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from ..errors import CheckpointError


# Bytes copied at a time of a tensor that cannot be written from where it lies.
PIECE = 16 * 2**20

# What `save_pretrained` may call the files of a model's weights.
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|" + re.escape(constants.SAFETENSORS_INDEX_FILE))


class ShardWriter:
    """The weights files of one checkpoint, byte for byte those of `save_pretrained`, filled in tensor by tensor.

    All names, shapes and dtypes are known beforehand, so every tensor has its place before any has its values. Files
    that an interrupted run left are taken up again; which tensors they hold already, the caller keeps account of.

    Args:
        folder: to write into; made by `allocate`.
        tensors: meta tensors by their names on disk, in the order of the state dict. Those that are views of one
            storage come into one file, as with `save_pretrained`, so do not rebuild them from shapes.
        max_shard_size: of a file's tensors, in bytes or as in `"5GB"`; a larger tensor has a file of its own.

    Attributes:
        shards: what each file holds, by the file's name.
        file_of: the file of each tensor.

    Raises:
        CheckpointError: safetensors does not know a dtype.
    """

    def __init__(
        self, folder: str | os.PathLike, tensors: Mapping[str, Tensor], max_shard_size: int | str = "50GB"
    ) -> None:
        self.folder = os.fspath(folder)
        self.tensors = dict(tensors)
        split = split_state_dict_into_shards_factory(
            self.tensors,
            get_storage_size=get_torch_storage_size,
            get_storage_id=storage_id,
            filename_pattern=constants.SAFETENSORS_WEIGHTS_FILE_PATTERN,
            max_shard_size=max_shard_size,
        )
        self.shards = {
            file: lay_out({name: self.tensors[name] for name in names})
            for file, names in split.filename_to_tensors.items()
        }
        self.file_of = split.tensor_to_filename
        self._is_sharded, self._total_size = split.is_sharded, split.metadata["total_size"]
        self._unsynced: set[str] = set()

    def allocate(self) -> None:
        """Create every file with its header and, as a hole, room for its tensors; keep those that are there already.

        A file appears under its name only when it is whole, so a run may be interrupted here too.

        Raises:
            CheckpointError: the folder holds weights of other tensors, or split in another way. Nothing is created.
        """
        os.makedirs(self.folder, exist_ok=True)
        self._refuse_other_weights()
        absent = [file for file, shard in self.shards.items() if not is_allocated(self._path(file), shard)]
        for file in absent:
            shard = self.shards[file]
            put_file(self._path(file), shard.header, shard.size)
        self._unsynced.update(map(self._path, self.shards), [self.folder])

    def write(self, name: str, tensor: Tensor) -> None:
        """Put the values of one tensor in their place; writing it again replaces them.

        Args:
            name: on disk.
            tensor: on any device but meta, with any strides; at most `PIECE` bytes of it are copied at a time.

        Raises:
            CheckpointError: the checkpoint has no tensor of this name, shape and dtype, or the tensor has no values.
            OSError: the disk is full, or nothing was allocated.
        """
        self._check(name, tensor)
        path = self._path(self.file_of[name])
        self._unsynced.add(path)
        with open(path, "r+b") as file:
            file.seek(self.shards[self.file_of[name]].starts[name])
            for piece in pieces(tensor):
                file.write(piece)

    def sync(self) -> None:
        """Return when all that was written since the last time is on the disk, whatever happens to the machine."""
        for path in sorted(self._unsynced):
            flush(path)
        self._unsynced.clear()

    def write_index(self, total_parameters: int) -> None:
        """Write which file holds which tensor, where there is more than one file.

        Args:
            total_parameters: of the model, as `model.num_parameters()` counts them.
        """
        if self._is_sharded:
            metadata = {"total_parameters": total_parameters, "total_size": self._total_size}
            index = {"metadata": metadata, "weight_map": self.file_of}
            content = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
            put_file(self._path(constants.SAFETENSORS_INDEX_FILE), content, len(content))
            flush(self.folder)

    def _path(self, file: str) -> str:
        return os.path.join(self.folder, file)

    def _refuse_other_weights(self) -> None:
        ours = {*self.shards, constants.SAFETENSORS_INDEX_FILE} if self._is_sharded else {*self.shards}
        others = sorted(file for file in os.listdir(self.folder) if WEIGHTS.fullmatch(file) and file not in ours)
        if others:
            raise CheckpointError(
                f"{self.folder} holds {others[0]}, which is none of the {len(self.shards)} files to be written there: "
                "it is of another checkpoint or another max_shard_size; remove it, or choose another folder"
            )

    def _check(self, name: str, tensor: Tensor) -> None:
        expected = self.tensors.get(name)
        if expected is None:
            raise CheckpointError(f"there is no tensor {name} among the {len(self.tensors)} to be written")
        if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
            raise CheckpointError(
                f"{name} was to be {expected.dtype} of shape {tuple(expected.shape)}, "
                f"it is {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
        if tensor.is_meta:
            raise CheckpointError(f"{name} is on the meta device and has no values to write")


@dataclass(frozen=True)
class Shard:
    """How one safetensors file is laid out.

    Args:
        header: what the file starts with: the length of the description, 8 bytes little-endian, and the description.
        starts: of each tensor, in bytes from the start of the file.
        size: of the file in bytes.
    """

    header: bytes
    starts: Mapping[str, int]
    size: int


def lay_out(tensors: Mapping[str, Tensor]) -> Shard:
    """Lay tensors out as `safetensors.torch.save_file` does: by dtype, then by name, without gaps.

    Args:
        tensors: of one file, by name; only shapes and dtypes are read.

    Returns:
        The layout.

    Raises:
        CheckpointError: safetensors does not know a dtype.
    """
    codes = dtype_codes({tensor.dtype for tensor in tensors.values()})
    ranks = {dtype: rank for rank, dtype in enumerate(codes)}
    description: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for name in sorted(tensors, key=lambda name: (ranks[tensors[name].dtype], name)):
        tensor = tensors[name]
        offsets[name], end = end, end + tensor.nbytes
        span = [offsets[name], end]
        description[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
    text = json.dumps(description, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return Shard(header, {name: len(header) + offset for name, offset in offsets.items()}, len(header) + end)


def dtype_codes(dtypes: set[torch.dtype]) -> dict[torch.dtype, str]:
    """What safetensors calls dtypes, in the order in which it lays out their tensors.

    The library is asked, by one element of each: the order is that of a list in its source, and has grown.

    Args:
        dtypes: to look up.

    Returns:
        The codes, as `"BF16"` for `torch.bfloat16`.

    Raises:
        CheckpointError: safetensors does not know one, or packs several numbers of it into a byte.
    """
    codes = {}
    by_name = {str(dtype): dtype for dtype in dtypes}
    try:
        content = save({name: torch.empty(1, dtype=dtype) for name, dtype in by_name.items()})
    except (KeyError, SafetensorError) as error:
        raise CheckpointError(f"safetensors cannot hold all of the dtypes {', '.join(sorted(by_name))}") from error
    described = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    for name, entry in described.items():
        if entry["shape"] != [1]:
            raise CheckpointError(f"tensors of {name} are not supported: safetensors unpacks their shapes")
        codes[by_name[name]] = entry["dtype"]
    return codes


def storage_id(tensor: Tensor) -> Hashable:
    """What tensors that share memory share, also on the meta device, where memory has no address.

    Empty tensors count as sharing theirs: off the meta device all of them lie at address zero, so `save_pretrained`
    puts them into one file.
    """
    storage = tensor.untyped_storage()
    return storage._cdata if storage.nbytes() else 0


def pieces(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor in row-major order, copied piece by piece unless they lie in main memory like that.

    Args:
        tensor: with any strides, on any device but meta.

    Yields:
        Bytes, `PIECE` at most where they are copies.
    """
    if tensor.nbytes <= PIECE or (tensor.is_contiguous() and tensor.device.type == "cpu"):
        dense = tensor.cpu().contiguous()
        # A single element is contiguous with any stride, and `view` asks for stride one.
        yield dense.as_strided((dense.numel(),), (1,)).view(torch.uint8).numpy().data
    else:
        rows = PIECE * len(tensor) // tensor.nbytes
        for part in tensor.split(rows) if rows else tensor:
            yield from pieces(part)


def is_allocated(path: str, shard: Shard) -> bool:
    """Whether a file is there.

    Raises:
        CheckpointError: it is, and is laid out for other tensors.
    """
    if not os.path.exists(path):
        return False
    with open(path, "rb") as file:
        same = file.read(len(shard.header)) == shard.header
    if not same or os.path.getsize(path) != shard.size:
        raise CheckpointError(
            f"{path} is there already, and its header or its size is of other tensors than those to be written; "
            "remove it, or choose another folder"
        )
    return True


def put_file(path: str, content: bytes, size: int) -> None:
    """Put a file in place whole or not at all.

    Args:
        path: of the file; one that is there is replaced.
        content: to start with.
        size: in bytes; after the content there is a hole.
    """
    part = f"{path}.part"
    with open(part, "wb") as file:
        file.write(content)
        file.truncate(size)
        os.fsync(file.fileno())
    os.replace(part, path)


def flush(path: str) -> None:
    """Return when a file, or the list of a folder's files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
