"""The towers of a model, found by structure: submodules with repeated blocks of their own, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from .targets import find_blocks


def find_towers(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The towers of a model: the outermost submodules, side by side, that hold blocks.

    CLIP has `text_model` and `vision_model`, LLaVA `model.vision_tower` and `model.language_model`, Whisper
    `model.encoder` and `model.decoder`, a plain decoder one tower that holds all of its blocks. What lies between the
    towers, a projector or connector, is in none of them.

    Args:
        model: on any device.

    Returns:
        By the name of each tower, in model order, the globs of its blocks: keys for `PGSVDConfig.groups`.

    Example:
        >>> from transformers import BartConfig, BartModel
        >>> sizes = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 16, "vocab_size": 8}
        >>> heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        >>> find_towers(BartModel(BartConfig(**sizes, **heads, encoder_ffn_dim=16, decoder_ffn_dim=16)))
        {'encoder': ('encoder.layers.*',), 'decoder': ('decoder.layers.*',)}
    """
    lists = [name.split(".") for name in dict.fromkeys(block.rpartition(".")[0] for block in find_blocks(model))]
    depth = shared_depth([name[:-1] for name in lists])
    found: dict[str, tuple[str, ...]] = {}
    for name in lists:
        # what lies where the towers part itself is a tower by the name of the module around it
        tower = ".".join(name[: depth + (len(name) > depth + 1)]) or "model"
        found[tower] = (*found.get(tower, ()), ".".join([*name, "*"]))
    return found


def shared_depth(holders: Sequence[Sequence[str]]) -> int:
    """How many components these names begin with in common."""
    return next((i for i, parts in enumerate(zip(*holders, strict=False)) if len(set(parts)) > 1), shortest(holders))


def shortest(holders: Sequence[Sequence[str]]) -> int:
    """The components of the shortest name."""
    return min(map(len, holders), default=0)


def tower_of(towers: Mapping[str, tuple[str, ...]], layer: str) -> str | None:
    """The tower that a layer lies in; `None` for one outside of all blocks."""
    return next((t for t, globs in towers.items() if any(layer.startswith(glob[:-1]) for glob in globs)), None)
