"""Activations kept in a file instead of in memory."""

from __future__ import annotations

import mmap
import tempfile
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .process import give_memory_back


# Smaller tensors are left in memory: a file's pages are 4 KiB, and there are few of them.
SMALLEST = 2**16

# Bytes of one file; a larger tensor has one of its own.
SEGMENT = 2**28

# Freed memory is handed back to the system each time this much has moved to files.
SLACK = 2**26


class Segment:
    """A file without a name, mapped into memory, in which slots are handed out one after the other.

    Args:
        folder: where the file lies.
        size: of the file in bytes; it takes room on the disk only as it is written.
    """

    def __init__(self, folder: str, size: int):
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  (open as long as it is used)
        weakref.finalize(self, self._file.close)
        self._file.truncate(size)
        self._map = mmap.mmap(self._file.fileno(), size)
        self.size, self.used = size, 0

    def write(self, start: int, values: memoryview) -> None:
        """Write into the file, rather than into its mapping: these pages count as no memory of the process.

        Raises:
            OSError: the disk is full; a write to the mapping would end the process.
        """
        self._file.seek(start)
        while values:
            values = values[self._file.write(values) :]

    def slot(self, start: int, size: int) -> memoryview:
        """A part of the file as writable memory."""
        return memoryview(self._map)[start : start + size]

    def leave_memory(self, start: int, size: int) -> None:
        """Let the pages of a slot be only in the file, where the system offers that."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, start, size)


class Spill:
    """Keeps tensors in files once those that are kept take more than some memory.

    A slot is free again when nothing refers to the tensor's storage any more.

    Args:
        folder: for the files, which have no names and vanish with the process.
        memory: bytes of tensors that may stay in memory.

    Attributes:
        held: bytes of kept tensors in memory.
        spilled: bytes of them in files.
    """

    def __init__(self, folder: str, memory: int):
        self.folder, self.memory = folder, memory
        self.held, self.spilled, self._moved = 0, 0, 0
        self._kept: set[int] = set()
        self._segments: list[Segment] = []
        self._free: dict[int, list[tuple[Segment, int]]] = {}

    def keep(self, module: nn.Module, args: tuple, outputs: Any) -> Any:
        """A forward hook: a module's outputs, those that are new and large in a file where memory is used up."""
        given = {address(leaf) for leaf in pytree.tree_leaves(args) if is_large(leaf)}

        def kept(leaf: Any) -> Any:
            return self.put(leaf) if is_large(leaf) and address(leaf) not in given else leaf

        return pytree.tree_map(kept, outputs)

    def put(self, tensor: Tensor) -> Tensor:
        """Keep a tensor.

        Args:
            tensor: in main memory.

        Returns:
            The tensor itself where there is memory for it, where it is kept already, or where it has gaps; else one
            with the same values and strides that lies in a file.

        Raises:
            OSError: the disk is full.
        """
        if address(tensor) in self._kept:
            return tensor
        size = tensor.untyped_storage().nbytes()
        if self.held + size <= self.memory:
            self.held += size
            self._watch(tensor, self._let_go, size)
            return tensor
        return self._move(tensor) if is_dense(tensor) else tensor

    def _move(self, tensor: Tensor) -> Tensor:
        size = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        segment, start = self._slot(size)
        flat = tensor.as_strided((tensor.numel(),), (1,))
        segment.write(start, flat.view(torch.uint8).numpy().data)
        moved = torch.frombuffer(segment.slot(start, size), dtype=tensor.dtype, count=tensor.numel())
        self.spilled += size
        self._watch(moved, self._give_back, segment, start, size)
        self._moved += size
        if self._moved > SLACK:
            self._leave_memory()
        return moved.as_strided(tensor.shape, tensor.stride())

    def _watch(self, tensor: Tensor, then: Any, *args: Any) -> None:
        """Call something when a tensor and all its views are gone."""
        place = address(tensor)
        self._kept.add(place)

        def gone() -> None:
            self._kept.discard(place)
            then(*args)

        weakref.finalize(tensor.untyped_storage(), gone).atexit = False

    def _leave_memory(self) -> None:
        """Hand back what reading has brought into memory, and what was freed."""
        self._moved = 0
        for segment in self._segments:
            segment.leave_memory(0, segment.size)
        give_memory_back()

    def _slot(self, size: int) -> tuple[Segment, int]:
        if self._free.get(size):
            return self._free[size].pop()
        if not self._segments or self._segments[-1].used + size > self._segments[-1].size:
            self._segments.append(Segment(self.folder, max(size, SEGMENT)))
        segment = self._segments[-1]
        segment.used += size
        return segment, segment.used - size

    def _give_back(self, segment: Segment, start: int, size: int) -> None:
        self.spilled -= size
        segment.leave_memory(start, size)
        self._free.setdefault(size, []).append((segment, start))

    def _let_go(self, size: int) -> None:
        self.held -= size


def is_large(value: Any) -> bool:
    """Whether a value is a tensor worth keeping in a file: no parameter, in main memory, and not differentiated."""
    plain = type(value) is Tensor and value.layout == torch.strided and value.device.type == "cpu"
    return plain and not value.requires_grad and value.nbytes >= SMALLEST


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements of a tensor lie side by side without gaps, in whatever order."""
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def address(tensor: Tensor) -> int:
    """Where a tensor's storage lies; the same for all its views."""
    return tensor.untyped_storage().data_ptr()
