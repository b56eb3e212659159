"""The only code that mutates a model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from .config import PGSVDConfig
from .modeling_pgsvd import (
    LAYERS,
    LowRankLayer,
    apart_experts,
    low_rank_layers,
    put_experts_back,
    record_ranks,
    set_submodule,
    take_experts_apart,
)
from .structures import StoredFactors


@torch.no_grad()
def replace_linear(model: nn.Module, name: str, factors: StoredFactors) -> LowRankLayer:
    """Put a layer of low rank with these factors in the place of a linear or `Conv1D`.

    The dtype, device and `requires_grad` stay as they were, and the bias where the factors bring none.

    Args:
        model: changed in place.
        name: of the layer.
        factors: in any dtype, rounded once to the layer's; with a bias only for a layer that has one.

    Returns:
        The new layer.
    """
    dense: Any = model.get_submodule(name)
    layer = LAYERS[factors.storage].like(dense, factors.rank, device="meta")
    for key, value in factors.tensors.items():
        inner, _, attribute = key.rpartition(".")
        kept: Any = value.to(dense.weight.device)
        if value.is_floating_point():
            like = dense.bias if attribute == "bias" else dense.weight
            kept = nn.Parameter(value.to(like).contiguous(), requires_grad=like.requires_grad)
        setattr(layer.get_submodule(inner), attribute, kept)
    if factors.bias is None:
        layer.biased.bias = dense.bias
    set_submodule(model, name, layer)
    return layer


@contextmanager
def experts_apart(model: nn.Module) -> Iterator[dict[str, nn.Module]]:
    """A context in which every expert of a model has linears of its own.

    Afterwards the experts are fused again, but for those of which a layer is of low rank.

    Args:
        model: changed in place.

    Yields:
        The fused modules, for `put_experts_back`.
    """
    fused = take_experts_apart(model)
    try:
        yield fused
    finally:
        put_experts_back(model, fused, low_rank_layers(model))
        fused.clear()
        for experts in apart_experts(model).values():
            part_memory(experts)


@torch.no_grad()
def part_memory(module: nn.Module) -> None:
    """Give every parameter that is a part of a larger tensor memory of its own, so that the whole can go."""
    for parameter in module.parameters():
        if not parameter.is_meta and parameter.untyped_storage().nbytes() > parameter.nbytes:
            parameter.data = parameter.clone(memory_format=torch.contiguous_format)


def mark_compressed(model: PreTrainedModel, config: PGSVDConfig) -> PGSVDConfig:
    """Make a model whose layers were replaced one that transformers knows as quantized.

    The model gets a config of its own: one shared with a dense model is not touched.

    Args:
        model: changed in place.
        config: the request.

    Returns:
        The result's config, with the rank of every compressed layer by its name in the checkpoint.
    """
    result = config.with_ranks({})
    copies: dict[int, object] = {}
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        inner = vars(module).get("config")
        if id(inner) in copies:
            module.config = copies[id(inner)]
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = True
    record_ranks(model, result)
    model.hf_quantizer = AutoHfQuantizer.from_config(result, pre_quantized=True)
    model.is_quantized, model.quantization_method = True, result.quant_method
    return result
