"""A checkpoint's model without its weights: built on the meta device, and which tensors make which of its own."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ..errors import CheckpointError, UnsupportedModelError
from .process import without_progress_bars


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
