"""Settings of the whole process while a model is streamed: how memory is given back, how transformers loads."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging


def free_at_once(size: int = 2**18) -> None:
    """Let the memory of every tensor of this many bytes or more go back to the system when the tensor is freed.

    By itself glibc's malloc keeps pieces below 32 MiB, several hundred MiB of them after a few forward passes. The
    setting is of the whole process, and costs a little time.
    """
    if os.name == "posix" and (option := getattr(ctypes.CDLL(None), "mallopt", None)):
        option(-3, size)  # M_MMAP_THRESHOLD


def give_memory_back() -> None:
    """Return freed memory to the operating system; of pieces below 32 MiB, glibc's malloc keeps most by itself."""
    if os.name == "posix" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


@contextmanager
def in_one_thread() -> Iterator[None]:
    """A context in which transformers reads one tensor after the other.

    Its threads would read ahead of the conversions, so that a layer of experts would be held twice; and glibc's malloc
    keeps what was freed in the arenas of threads.
    """
    before = os.environ.get("HF_DEACTIVATE_ASYNC_LOAD")
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HF_DEACTIVATE_ASYNC_LOAD"]
        else:
            os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = before


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """A context in which transformers shows no bars for loading weights."""
    hook = logging.set_tqdm_hook(lambda bar, args, kwargs: bar(*args, **{**kwargs, "disable": True}))
    try:
        yield
    finally:
        logging.set_tqdm_hook(hook)
