"""Which rows of a layer's input are real tokens."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class PaddingMask:
    """Leaves padding out of layer inputs, for the batch and the block that are running.

    A tower that reads no tokens has no padding, unless its blocks are handed an attention mask. In an encoder-decoder
    the encoder states are masked by the encoder's mask, everything else in its decoder by the decoder's. Where what
    reads the tokens is handed states from elsewhere, as BLIP's decoder is an image's, these have a mask of their own.

    Args:
        decodes: whether the model is an encoder-decoder, of which the batch's mask is the encoder's.
    """

    def __init__(self, decodes: bool = True) -> None:
        self._decodes = decodes
        self._tokens: Tensor | None = None
        self._encoder: Tensor | None = None
        self._decoder: Tensor | None = None
        self._main: Tensor | None = None
        self._encoder_states: Tensor | None = None

    def start_batch(self, batch: Mapping[str, Any]) -> None:
        """Take the masks of a batch; outside the blocks its attention mask applies."""
        self._tokens = _padded(batch.get("attention_mask"))
        self._encoder = self._tokens if self._decodes else _padded(batch.get("encoder_attention_mask"))
        decoder = batch.get("decoder_attention_mask")
        self._decoder = _padded(decoder) if self._decodes or decoder is not None else self._tokens
        self.leave_block()

    def enter_block(self, block: nn.Module, args: tuple, kwargs: Mapping[str, Any], of_tokens: bool) -> None:
        """Choose the mask of a block by the arguments it is called with; see `reads_tokens`."""
        given = inspect.signature(block.forward).bind_partial(*args, **kwargs).arguments
        given = {**given, **given.get("kwargs", {})}
        self._encoder_states = given.get("encoder_hidden_states")
        masked = of_tokens or any("mask" in name and value is not None for name, value in given.items())
        self._main = (self._tokens if self._encoder_states is None else self._decoder) if masked else None

    def leave_block(self) -> None:
        """Back outside the blocks."""
        self._main, self._encoder_states = self._tokens, None

    def rows(self, x: Tensor, values: Tensor) -> Tensor:
        """The rows `(T, k)` that are not padding, of an input `(..., n)` or of what a layer makes of it `(..., k)`."""
        states = self._encoder_states
        of_encoder = states is not None and x.data_ptr() == states.data_ptr() and x.shape == states.shape
        mask = self._encoder if of_encoder else self._main
        rows = values.reshape(-1, values.shape[-1])
        fitted = None if mask is None else _fitted(mask, x.shape[:-1])
        return rows if fitted is None else rows[fitted.to(rows.device).reshape(-1)]


def reads_tokens(model: nn.Module, block: str) -> bool:
    """Whether the innermost model around a block takes token ids, be its blocks handed their mask or not."""
    parts = block.split(".")
    around = (model.get_submodule(".".join(parts[:end])) for end in range(len(parts) - 1, -1, -1))
    inner = next((module for module in around if isinstance(module, PreTrainedModel)), None)
    return inner is not None and inner.main_input_name == "input_ids" and _looks_tokens_up(inner)


def _looks_tokens_up(model: PreTrainedModel) -> bool:
    """Whether what a model embeds is token ids: some vision towers do not say that they take something else."""
    try:
        return isinstance(model.get_input_embeddings(), nn.Embedding)
    except NotImplementedError:
        return False


def _fitted(mask: Tensor, shape: torch.Size) -> Tensor | None:
    """A `(batch, tokens)` mask in the order of an input's rows, `None` for an input that is not made of its tokens."""
    if shape == mask.T.shape != mask.shape:
        return mask.T
    flat = len(shape) == 1 or shape[0] == mask.shape[0]
    return mask if flat and shape.numel() == mask.numel() else None


def _padded(mask: Tensor | None) -> Tensor | None:
    """A `(batch, tokens)` mask as booleans, `None` where nothing is padded."""
    if mask is None or mask.dim() != 2 or bool(mask.bool().all()):
        return None
    return mask.bool()
