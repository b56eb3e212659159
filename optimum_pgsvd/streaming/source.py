"""A dense checkpoint as a model whose weights stay on disk, of which parts are made resident on demand."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig, str_to_torch_dtype
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, logging
from transformers.utils.hub import extract_commit_hash, get_checkpoint_shard_files

from ..errors import CheckpointError, UnsupportedModelError


# What a fingerprint reads of every file.
SAMPLES, SAMPLE_BYTES = 64, 4096

# A call of posix_fadvise reads no more than the readahead of the disk, whatever it is asked for: 128 KiB by default.
READAHEAD_BYTES = 128 * 1024


class StreamedModel:
    """A checkpoint's model on the meta device, of which parts are made resident on demand.

    The model is what `from_pretrained` gives, but for its parameters and persistent buffers: they are on the meta
    device until a part they lie in is loaded, and again once no such part is left. Non-persistent buffers, and the few
    parameters that a model may do without in its checkpoint, are always real. Tied weights stay tied. A part is read
    into memory of its own, so that what it takes is given back in full, and no file is kept open or mapped.

    Args:
        source: a folder, or the name of a model on the Hub, with safetensors files.
        model_class: that loads it, such as `AutoModelForCausalLM`.
        revision: of a model on the Hub.
        token: of the Hub, by default the one logged in with.
        dtype: that weights are cast to when they are loaded, by default the config's, else the checkpoint's.
        trust_remote_code: allow model code that the checkpoint brings along.
        device: that parts are loaded to.

    Attributes:
        model: the model, in evaluation mode.
        files: its safetensors files.
        device: that parts are loaded to.

    Raises:
        CheckpointError: config or weights are missing, damaged, or do not fit each other, or the weights are not
            safetensors.
        UnsupportedModelError: the checkpoint is compressed or quantized already, or an adapter.
    """

    def __init__(
        self,
        source: str | os.PathLike,
        model_class: Any,
        *,
        revision: str | None = None,
        token: bool | str | None = None,
        dtype: str | torch.dtype = "auto",
        trust_remote_code: bool = False,
        device: str | torch.device = "cpu",
    ):
        source = os.fspath(source)
        self.device = torch.device(device)
        self._config_file = find_config(source, revision=revision, token=token)
        hub = {"revision": extract_commit_hash(self._config_file, revision), "token": token}
        self.files = find_weights(source, read_json(self._config_file).get("transformers_weights"), **hub)
        self._stored = {key: stored for file in self.files for key, stored in read_header(file).items()}
        self.model: PreTrainedModel = build_on_meta(
            source, model_class, dtype=dtype, trust_remote_code=trust_remote_code, **hub
        )
        self._names = frozenset(self.model.state_dict())
        self._keys = match_keys(self.model, self._stored)
        self._initialised = initialise_the_rest(self.model, self._keys, self.device)
        self._wanted: set[str] = set()
        self._tie_what_is_equal()

    def load(self, name: str) -> None:
        """Make the parameters and persistent buffers of a submodule resident.

        What is resident already is left as it is, and so are layers that were put in the place of the checkpoint's.

        Args:
            name: of the submodule, `""` for the whole model.

        Raises:
            AttributeError: the model has no such submodule.
            CheckpointError: the files cannot be read, or have changed.
        """
        self.model.get_submodule(name)
        self._load(names_in(name, self._names))

    def load_outside(self, blocks: Sequence[str]) -> None:
        """Make everything resident that lies in none of the blocks: embeddings, norms and heads.

        Args:
            blocks: names of submodules.
        """
        self._load(self._names.difference(*(names_in(block, self._names) for block in blocks)))

    def release(self, name: str) -> None:
        """Put a submodule back on the meta device, with all layers that were put into it.

        A tensor that is tied to one outside of the submodule stays as long as that one is loaded.

        Args:
            name: of the submodule, `""` for the whole model.

        Raises:
            AttributeError: the model has no such submodule.
        """
        self.model.get_submodule(name)
        self._wanted.difference_update(names_in(name, self._wanted))
        self._drop_unwanted(names_in(name, self.model.state_dict()))
        give_memory_back()

    @contextmanager
    def resident(self, name: str) -> Iterator[None]:
        """A context in which a submodule is loaded; see `load` and `release`."""
        self.load(name)
        try:
            yield
        finally:
            self.release(name)

    def prefetch(self, name: str) -> None:
        """Ask the operating system to read what `load` will need; returns at once.

        Args:
            name: of the submodule, `""` for the whole model.

        Raises:
            AttributeError: the model has no such submodule.
        """
        self.model.get_submodule(name)
        tied = {owner for _, owners in owners_of_tensors(self.model) if names_in(name, owners) for owner in owners}
        tensors = {self._stored[key] for made in tied & self._keys.keys() for key in self._keys[made]}
        if hasattr(os, "posix_fadvise"):
            threading.Thread(target=read_ahead, args=(tensors,), name="read ahead", daemon=True).start()

    def fingerprint(self) -> dict[str, Any]:
        """What tells this checkpoint from others, and from itself once it was edited, without reading all of it.

        Returns:
            Under `"config"` the SHA-256 of the config file; under `"files"`, by the name of each safetensors file, its
            `size` in bytes, and the SHA-256 of its `header` and of a `sample` of its bytes. Where the checkpoint lies
            makes no difference.
        """
        with open(self._config_file, "rb") as file:
            config = hashlib.sha256(file.read()).hexdigest()
        return {"config": config, "files": {os.path.basename(path): file_fingerprint(path) for path in self.files}}

    def _load(self, names: Iterable[str]) -> None:
        """Make tensors resident, each with those it is tied to."""
        names, before = set(names), set(self._wanted)
        self._wanted |= names
        # Of several tied tensors, a checkpoint may hold any.
        found = {
            next(name for name in owners if name in self._keys): owners
            for tensor, owners in owners_of_tensors(self.model)
            if tensor.is_meta and not names.isdisjoint(owners) and not self._keys.keys().isdisjoint(owners)
        }
        keys = {key for name in found for key in self._keys[name]}
        try:
            self._read(keys, found)
            for name, owners in found.items():
                put(self.model, owners, self.model.get_parameter_or_buffer(name))
        except BaseException:
            self._wanted = before
            raise
        finally:  # what one conversion made besides, or a failed one left
            self._drop_unwanted(name for name in self._keys if not keys.isdisjoint(self._keys[name]))
            give_memory_back()

    def _read(self, keys: Collection[str], names: Iterable[str]) -> None:
        """Let transformers' loader make some of the model's tensors from some of the checkpoint's."""
        conversions = self.model._weight_conversions
        # Without a dtype of its own the loader casts each tensor to that of the one it replaces.
        config = LoadStateDictConfig(device_map={"": self.device}, weight_mapping=conversions)
        try:
            with without_progress_bars(), in_one_thread():
                info, _ = convert_and_load_state_dict_in_model(
                    self.model, {key: self._stored[key] for key in keys}, config
                )
        finally:
            self.model._weight_conversions = conversions  # the loader keeps those that this part has used
        for name in names:
            if self.model.get_parameter_or_buffer(name).is_meta:
                reason = info.conversion_errors.get(name) or "its shape or its name is not the one it had before"
                raise CheckpointError(f"{self.model.name_or_path}: {name} could not be loaded: {reason}")

    def _drop_unwanted(self, names: Iterable[str]) -> None:
        """Put tensors back on the meta device, but for those that are wanted under some name of theirs."""
        names, kept = set(names), self._wanted | self._initialised
        for tensor, owners in owners_of_tensors(self.model):
            if not tensor.is_meta and not names.isdisjoint(owners) and kept.isdisjoint(owners):
                put(self.model, owners, emptied(tensor, "meta"))

    def _tie_what_is_equal(self) -> None:
        """Tie pairs of which the checkpoint holds both, where equal; on meta, transformers could not compare them."""
        tensors = self.model.state_dict(keep_vars=True)
        pairs = self.model.all_tied_weights_keys.items()
        names = {name for a, b in pairs if tensors.get(a) is not tensors.get(b) for name in (a, b)}
        if names:
            self._load(names)
            self.model.tie_weights(missing_keys=set(self._names - self._keys.keys()), recompute_mapping=False)
            self.release("")


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


def build_on_meta(source: str, model_class: Any, **options: Any) -> PreTrainedModel:
    """A checkpoint's model as `from_pretrained` gives it, all of it on the meta device; no weight is read.

    Raises:
        CheckpointError: the checkpoint lacks some of the model's tensors, or holds them in other shapes.
    """
    with without_progress_bars():
        model, info = model_class.from_pretrained(
            source,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"{source} lacks {len(missing)} of the tensors of {type(model).__name__}: {', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}; name the class it was saved from, or complete the checkpoint"
        )
    for name, stored, expected in sorted(info["mismatched_keys"])[:1]:
        raise CheckpointError(
            f"{source}: {name} has the shape {tuple(stored)}, but its config asks for {tuple(expected)}; the "
            "checkpoint is damaged or was edited"
        )
    return model


def match_keys(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, list[str]]:
    """Which tensors of a checkpoint make which of the model's, as transformers' loader has it.

    Args:
        model: just loaded.
        keys: names of the checkpoint's tensors.

    Returns:
        For each of the model's tensors that any of them make, those that do.
    """
    renamings = [each for each in model._weight_conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in model._weight_conversions if isinstance(each, WeightConverter)]
    targets = {pattern: each.target_patterns for each in converters for pattern in each.source_patterns}
    prefix, names = model.base_model_prefix, model.state_dict()
    made: dict[str, list[str]] = {}
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters, prefix, names)
        if name not in names and key in names:
            name, pattern = rename_source_key(key, [], [], prefix, names)
        if name in names:
            several = targets.get(pattern, [name])
            for target in several:
                made.setdefault(name.replace(several[0], target), []).append(key)
    return made


def initialise_the_rest(model: PreTrainedModel, loaded: Collection[str], device: torch.device) -> set[str]:
    """Give real values to what no file holds, by the code that does it when a model is loaded the usual way.

    These are non-persistent buffers, such as rotary frequencies, and parameters that a checkpoint may lack.

    Args:
        model: on the meta device.
        loaded: names of the tensors that files hold.
        device: for the values.

    Returns:
        Names of the parameters and persistent buffers among them.
    """
    initialised: set[str] = set()
    for tensor, owners in owners_of_tensors(model):
        if not any(name in loaded for name in owners):
            if getattr(tensor, "_is_hf_initialized", False):
                raise UnsupportedModelError(
                    f"{type(model).__name__}: it is not known which tensors of the checkpoint make {owners[0]}; "
                    "compress the model in memory instead"
                )
            put(model, owners, emptied(tensor, device))
            initialised.update(owners)
    for name, buffer in list(model.named_non_persistent_buffers()):
        put(model, [name], torch.empty_like(buffer, device=device))
    for module in model.modules():
        module._is_hf_initialized = False
    model.initialize_weights()
    return initialised


def owners_of_tensors(model: nn.Module) -> list[tuple[Tensor, list[str]]]:
    """Each parameter and persistent buffer with all its names; several where it is tied."""
    owners: dict[int, tuple[Tensor, list[str]]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            owners.setdefault(id(tensor), (tensor, []))[1].append(name)
    return list(owners.values())


def names_in(part: str, names: Iterable[str]) -> list[str]:
    """The names that lie in a submodule; all of them in the one called `""`."""
    return [name for name in names if not part or name.startswith(f"{part}.")]


def put(model: nn.Module, names: Iterable[str], tensor: Tensor) -> None:
    """Make a tensor the parameter or buffer of all these names."""
    for name in names:
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, tensor)


def emptied(tensor: Tensor, device: str | torch.device) -> Tensor:
    """A tensor or parameter without values, on another device."""
    empty = torch.empty_like(tensor, device=device)
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


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


def free_at_once(size: int = 2**20) -> None:
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
