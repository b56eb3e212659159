"""Which layers are compressed, found by the structure of the model rather than by a table of names."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .config import PGSVDConfig
from .errors import ConfigError, UnsupportedModelError
from .modeling_pgsvd import LowRankLayer, is_fused
from .structures import LinearShape


LINEAR_TYPES = (nn.Linear, Conv1D)


@dataclass(frozen=True)
class Target:
    """A layer to compress.

    Args:
        name: of the module.
        shape: of its weight, as an `nn.Linear` would hold it.
        block: name of the repeated block it lies in, `None` outside of them.
        own_bias: whether it has a bias that no other module shares.
    """

    name: str
    shape: LinearShape
    block: str | None
    own_bias: bool = False


@dataclass(frozen=True)
class Targets:
    """What `find_targets` found.

    Args:
        found: layers to compress, in model order.
        skipped: modules that stay dense, with the reason.
        blocks: every repeated block with a target in it, in model order.
    """

    found: tuple[Target, ...]
    skipped: dict[str, str]
    blocks: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layers to compress."""
        return tuple(target.name for target in self.found)

    @property
    def shapes(self) -> dict[str, LinearShape]:
        """Shapes of the layers to compress."""
        return {target.name: target.shape for target in self.found}


def matches(name: str, pattern: str) -> bool:
    """Whether a module is named by a pattern.

    With wildcards the pattern is a glob over the whole name or over its end; without, it is a run of whole components:
    `q_proj`, `layers.1.self_attn` and `model.layers.1` all match `model.layers.1.self_attn.q_proj`.
    """
    if any(wildcard in pattern for wildcard in "*?["):
        return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
    return f".{pattern}." in f".{name}."


def first_match(name: str, patterns: Iterable[str]) -> str | None:
    """The first pattern that names a module."""
    return next((pattern for pattern in patterns if matches(name, pattern)), None)


def weight_shape(module: Any, storage: str = "factors") -> LinearShape:
    """Shape of a linear's weight with outputs first; `Conv1D` stores it the other way round."""
    rows, columns = module.weight.shape[::-1] if isinstance(module, Conv1D) else module.weight.shape
    return LinearShape(rows, columns, storage)


def find_blocks(model: nn.Module) -> tuple[str, ...]:
    """Names of the repeated blocks: the items of the outermost module lists that hold linear layers.

    A list of bare linears, such as a model's several heads, is not a stack of blocks.
    """
    return tuple(_blocks_below(model, ""))


def _blocks_below(module: nn.Module, prefix: str) -> Iterator[str]:
    for child_name, child in module.named_children():
        name = f"{prefix}{child_name}"
        if isinstance(child, nn.ModuleList) and any(_is_block(item) for item in child):
            yield from (f"{name}.{i}" for i, item in enumerate(child) if _is_block(item))
        else:
            yield from _blocks_below(child, f"{name}.")


def _is_block(module: nn.Module) -> bool:
    return not isinstance(module, LINEAR_TYPES) and any(isinstance(inner, LINEAR_TYPES) for inner in module.modules())


def find_targets(model: nn.Module, config: PGSVDConfig, stored: Collection[str] | None = None) -> Targets:
    """Every linear layer of the repeated blocks, less what must or shall stay dense.

    Args:
        model: any transformers model, on any device.
        config: for `modules_to_not_convert`, for `storage`, and for `ranks` and `groups`, whose globs may name layers
            outside the blocks.
        stored: the only layers that can be targets; by default, any can.

    Returns:
        The targets in model order and what was skipped, with reasons.

    Raises:
        UnsupportedModelError: nothing is left to compress, or the model is compressed or quantized already.
        ConfigError: a pattern matches no layer to compress, or, in `modules_to_not_convert`, nothing at all.
    """
    _refuse_compressed(model)
    blocks = find_blocks(model)
    wanted = [*(config.ranks or ()), *config.groups]
    skipped: dict[str, str] = {}
    found: list[Target] = []
    owners = _owners(model)
    structural = _reasons(model, owners)
    for name, module in model.named_modules():
        block = _block_of(name, blocks)
        if isinstance(module, nn.Embedding):
            skipped[name] = "embedding"
        elif name in structural:
            skipped[name] = structural[name]
        elif not isinstance(module, LINEAR_TYPES):
            continue
        elif pattern := first_match(name, config.modules_to_not_convert):
            skipped[name] = f"modules_to_not_convert: {pattern}"
        elif block is None and not first_match(name, wanted):
            skipped[name] = "outside the repeated blocks"
        elif stored is not None and name not in stored:
            skipped[name] = "no target when the checkpoint was made"
        else:
            own_bias = module.bias is not None and owners[id(module.bias)] == 1
            found.append(Target(name, weight_shape(module, config.storage), block, own_bias))
    names = [target.name for target in found]
    for field, patterns, candidates in (
        ("modules_to_not_convert", config.modules_to_not_convert, [*names, *skipped]),
        ("ranks", config.ranks or (), names),
        ("groups", config.groups, names),
    ):
        _check_patterns(field, patterns, candidates, skipped)
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no linear layer to compress: "
            + (
                "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:5])
                or "no linear layer at all"
            )
        )
    return Targets(tuple(found), skipped, tuple(block for block in blocks if any(t.block == block for t in found)))


def _block_of(name: str, blocks: tuple[str, ...]) -> str | None:
    return next((block for block in blocks if name.startswith(f"{block}.")), None)


def _refuse_compressed(model: nn.Module) -> None:
    if any(isinstance(module, LowRankLayer) for module in model.modules()):
        raise UnsupportedModelError(
            "the model is compressed already; compress the dense model, or model.dequantize() first"
        )
    if getattr(model, "is_quantized", False) and getattr(model, "quantization_method", None) != "pgsvd":
        raise UnsupportedModelError(
            f"the model is quantized with {model.quantization_method}; compress it with PGSVD first and quantize after"
        )


def _owners(model: nn.Module) -> Counter[int]:
    """How many modules have each parameter, by its `id`."""
    return Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))


def _reasons(model: nn.Module, owners: Counter[int]) -> dict[str, str]:
    """Why the structure of a model keeps some of its modules dense."""
    reasons: dict[str, str] = {}
    heads = _output_heads(model)
    for name, module in model.named_modules():
        reasons |= dict.fromkeys((".".join(filter(None, (name, router))) for router in _routers(module)), "router")
        if isinstance(module, nn.MultiheadAttention):
            reasons |= {
                f"{name}.{inner}": "inside nn.MultiheadAttention" for inner, _ in module.named_modules() if inner
            }
        if _fused_experts(module):
            reasons[name] = "experts, not taken apart" if is_fused(module) else "fused experts of a kind of their own"
        if isinstance(module, LINEAR_TYPES) and name not in reasons:
            if module in heads:
                reasons[name] = "output head"
            elif owners[id(module.weight)] > 1:
                reasons[name] = "tied weight"
            elif type(module) not in LINEAR_TYPES and not acts_as_linear(module):
                reasons[name] = f"{type(module).__name__}, a subclass of Linear that does more than a linear"
    return reasons


@torch.no_grad()
def acts_as_linear(module: Any) -> bool:
    """Whether a subclass of Linear computes what a Linear with its weight and bias does, tried on random inputs."""
    generator = torch.Generator().manual_seed(0)
    if module.weight.is_meta:  # what it computes does not depend on its weights
        module = copy.deepcopy(module)
        for owner in module.modules():
            for name, value in list(owner.named_parameters(recurse=False)):
                drawn = torch.randn(value.shape, generator=generator).to(value.dtype)
                setattr(owner, name, nn.Parameter(drawn, requires_grad=False))
    probe = torch.randn(2, weight_shape(module).in_features, generator=generator).to(module.weight)
    try:
        outputs = module(probe)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):  # it wants other inputs
        return False
    expected = nn.functional.linear(probe, module.weight, module.bias)
    same = isinstance(outputs, Tensor) and outputs.shape == expected.shape
    # Two ways of one matrix product differ by roundings: some thousandths in half precision.
    return same and bool(torch.allclose(outputs.float(), expected.float(), rtol=2e-2, atol=2e-2))


def _output_heads(model: nn.Module) -> list[nn.Module]:
    """The output embeddings of a model and of every model in it."""
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return [head for inner in models if (head := inner.get_output_embeddings()) is not None]


def _fused_experts(module: nn.Module) -> bool:
    return "expert" in type(module).__name__.lower() and any(p.dim() == 3 for p in module.parameters(recurse=False))


def _routers(module: nn.Module) -> list[str]:
    """What chooses between experts: all of a router; beside experts, a lone matrix with as many outputs as those."""
    if "router" in type(module).__name__.lower():
        return list(_matrices(module))
    experts = _numbers_of_experts(module)
    beside = [_matrices(child, name) for name, child in module.named_children() if experts and name not in experts]
    return [name for inner in beside if len(inner) == 1 for name, w in inner.items() if len(w) in experts.values()]


def _matrices(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """The weights with two dimensions in a module, by the name of their owner."""
    weights = {name: getattr(inner, "weight", None) for name, inner in module.named_modules(prefix=prefix)}
    return {name: w for name, w in weights.items() if isinstance(w, Tensor) and w.dim() == 2}


def _numbers_of_experts(module: nn.Module) -> dict[str, int]:
    """How many experts each child of a module holds, for the children that hold any."""
    numbers = {}
    for name, child in module.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)) and name.endswith("experts"):
            numbers[name] = len(child)
        elif _fused_experts(child):
            numbers[name] = max(p.shape[0] for p in child.parameters(recurse=False) if p.dim() == 3)
    return numbers


def _check_patterns(field: str, patterns: Iterable[str], candidates: list[str], skipped: dict[str, str]) -> None:
    for pattern in patterns:
        if not any(matches(name, pattern) for name in candidates):
            blocked = next(
                (f"; {name} stays dense: {why}" for name, why in skipped.items() if matches(name, pattern)), ""
            )
            raise ConfigError(
                f"{field}: {pattern!r} matches no linear layer{blocked}; the first are {', '.join(candidates[:4])}"
            )
