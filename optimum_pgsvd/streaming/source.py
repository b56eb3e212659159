"""A dense checkpoint as a model whose weights stay on disk, of which parts are made resident on demand."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils.hub import extract_commit_hash

from ..errors import CheckpointError
from ..modeling_pgsvd import apart_experts, linears_of, put_experts_back, set_submodule, take_experts_apart
from .meta_model import build_on_meta, emptied, initialise_the_rest, match_keys, names_in, owners_of_tensors, put
from .process import give_memory_back, in_one_thread, without_progress_bars
from .stored import file_fingerprint, find_config, find_weights, read_ahead, read_header, read_json


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
        self._fused: dict[str, nn.Module] = {}
        self._tie_what_is_equal()

    def take_experts_apart(self) -> None:
        """Give every expert linears of its own, which are loaded like any others."""
        self._fused |= take_experts_apart(self.model)

    def fuse_experts(self, needed: Collection[str]) -> None:
        """Let the experts of which no layer is needed apart be one again.

        Args:
            needed: names of layers.
        """
        put_experts_back(self.model, self._fused, needed)
        apart = apart_experts(self.model)
        self._fused = {name: module for name, module in self._fused.items() if name in apart}

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
        with self._whole(self._fused):
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
        absent = {name for name in self._fused if any(p.is_meta for p in self.model.get_submodule(name).parameters())}
        with self._whole({name: self._fused[name] for name in absent if names_in(name, names)}):
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

    @contextmanager
    def _whole(self, fused: Mapping[str, nn.Module]) -> Iterator[None]:
        """A context in which experts are as the checkpoint has them; what is loaded meanwhile goes to their parts."""
        apart = {name: self.model.get_submodule(name) for name in fused}
        try:
            for name, module in fused.items():
                set_submodule(self.model, name, module)
            yield
        finally:
            for name, module in fused.items():
                hand_out(module, apart[name])
                for key, parameter in module.named_parameters():
                    setattr(module, key, emptied(parameter, "meta"))
                set_submodule(self.model, name, apart[name])

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


def hand_out(fused: nn.Module, experts: Any) -> None:
    """Give experts that are taken apart, where they are on the meta device, what was loaded of them as a whole."""
    for number, expert in enumerate(experts):
        for name, linear in linears_of(fused, number).items():
            for key, value in linear.named_parameters():
                part = getattr(expert, name)
                if isinstance(part, nn.Linear) and not value.is_meta and getattr(part, key).is_meta:
                    setattr(part, key, value)
