"""From what a user calls a dataset to batches of model inputs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..config import PGSVDConfig
from ..errors import CalibrationError
from .media import Media
from .processing import IGNORED, load_processor, processed
from .sampling import sample_from_model
from .sources import read_source


Batch = dict[str, Any]

# Models with longer context windows are calibrated on windows of this many tokens.
LONGEST_DEFAULT = 2048


def load_calibration_set(model: Any, config: PGSVDConfig, tokenizer: Any = None) -> list[Batch]:
    """The calibration set as batches of keyword arguments for the model's `forward`.

    Texts of a causal language model are joined and cut into windows without padding; texts of other models are
    truncated and padded, with a mask. Images and sounds, with their texts, go through the model's own processor. Token
    tensors are windows already. Dicts of tensors are batches already; the last of them may go beyond `num_samples`.

    Args:
        model: the dense model, asked for its limits, and for samples where `dataset="self"`.
        config: `dataset`, `tokenizer`, `num_samples`, `sequence_length`, `batch_size`, `seed`.
        tokenizer: tokenizer or processor, overrides the config's.

    Returns:
        Batches; together at most `num_samples` sequences, in an order fixed by the seed.

    Raises:
        CalibrationError: there is no dataset, it cannot be read, holds nothing, or needs a tokenizer that cannot be
            loaded.
    """
    config.require_dataset()
    return [complete(model, batch) for batch in read_batches(model, config, tokenizer)]


def read_batches(model: Any, config: PGSVDConfig, tokenizer: Any) -> Iterable[Batch]:
    """The batches as the dataset has them."""
    length = config.sequence_length or default_length(model)
    if isinstance(config.dataset, str) and config.dataset == "self":
        windows: list[Tensor] = sample_from_model(model, config.num_samples, length, config.batch_size, config.seed)
        return stack(windows, config.batch_size)
    examples: list[Any] = read_source(config.dataset, config.num_samples, length, config.seed)
    if not examples:
        raise CalibrationError("the calibration dataset is empty")
    if isinstance(examples[0], Media):
        processor = load_processor(tokenizer or config.tokenizer, model)
        return processed(examples[: config.num_samples], model, processor, length, config.batch_size)
    if isinstance(examples[0], Mapping):
        return enough(examples, config.num_samples)
    if isinstance(examples[0], Tensor):
        windows = [window for example in examples for window in example.reshape(-1, example.shape[-1])]
        return stack(windows[: config.num_samples], config.batch_size)
    tokenizer = load_tokenizer(tokenizer or config.tokenizer, model)
    length = config.sequence_length or min(length, getattr(tokenizer, "model_max_length", length))
    if is_causal(model):
        return stack(pack(examples, tokenizer, config.num_samples, length), config.batch_size)
    return pad(examples, tokenizer, config, length)


def default_length(model: Any) -> int:
    """The model's longest sequence, at most `LONGEST_DEFAULT` tokens."""
    text = model.config.get_text_config()
    known = [getattr(text, name, None) for name in ("max_position_embeddings", "n_positions", "max_target_positions")]
    return min([LONGEST_DEFAULT, *(value for value in known if value)])


def is_causal(model: Any) -> bool:
    """Whether the model predicts each token from those before it, so that texts may be joined."""
    return model.can_generate() and not getattr(model.config, "is_encoder_decoder", False)


def load_tokenizer(tokenizer: Any, model: Any) -> Any:
    """A tokenizer, taken out if it is part of a processor, loaded if it is a name; by default the model's own."""
    revision = None
    if tokenizer is None:
        tokenizer, revision = getattr(model, "name_or_path", None), getattr(model, "pgsvd_commit", None)
    if not tokenizer:
        raise CalibrationError("texts need a tokenizer: give tokenizer=... with the config or to compress()")
    if not isinstance(tokenizer, (str, os.PathLike)):
        return getattr(tokenizer, "tokenizer", tokenizer)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(tokenizer, **({"revision": revision} if revision else {}))
    except (OSError, ValueError, KeyError) as error:
        raise CalibrationError(
            f"no tokenizer could be loaded from {str(tokenizer)!r}; give tokenizer=...: {error}"
        ) from error


def pack(texts: Iterable[str], tokenizer: Any, num_samples: int, length: int) -> list[Tensor]:
    """Texts joined, each with its special tokens, and cut into `num_samples` windows `(length,)`.

    Blank texts, of which only the special tokens would be left, are passed over. Where the texts are too short for one
    window, it is as long as they are.
    """
    tokens: list[int] = []
    for text in filter(str.strip, texts):
        tokens += tokenizer(text, verbose=False)["input_ids"]
        if len(tokens) >= num_samples * length:
            break
    length = min(length, len(tokens))
    if length == 0:
        raise CalibrationError("the calibration texts hold no tokens")
    windows = torch.tensor(tokens[: len(tokens) // length * length]).reshape(-1, length)
    return list(windows[:num_samples])


def pad(texts: Iterable[str], tokenizer: Any, config: PGSVDConfig, length: int) -> Iterator[Batch]:
    """Batches of truncated texts, padded to the longest of each batch; blank texts are passed over."""
    if tokenizer.pad_token is None and config.batch_size > 1:
        raise CalibrationError("texts of several lengths need a tokenizer with a pad_token; set one, or batch_size=1")
    options = {"padding": config.batch_size > 1, "truncation": True, "max_length": length, "return_tensors": "pt"}
    texts = [text for text in texts if text.strip()][: config.num_samples]
    if not texts:
        raise CalibrationError("the calibration texts hold no tokens")
    for start in range(0, len(texts), config.batch_size):
        yield dict(tokenizer(texts[start : start + config.batch_size], **options))


def stack(windows: list[Tensor], batch_size: int) -> Iterator[Batch]:
    """Windows of one length in batches; a window of another length starts a new batch."""
    start = 0
    while start < len(windows):
        stop = start + 1
        while stop < min(start + batch_size, len(windows)) and windows[stop].shape == windows[start].shape:
            stop += 1
        yield {"input_ids": torch.stack(windows[start:stop]).long()}
        start = stop


def enough(batches: Iterable[Mapping[str, Any]], num_samples: int) -> Iterator[Batch]:
    """Batches until they hold enough sequences."""
    held = 0
    for batch in batches:
        if held >= num_samples:
            return
        yield dict(batch)
        held += next((len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim()), 1)


def complete(model: Any, batch: Batch) -> Batch:
    """What an encoder-decoder needs besides its input: decoder inputs, and a mask where its labels are padded."""
    if not getattr(model.config, "is_encoder_decoder", False) or "input_ids" not in batch:
        return batch
    if "labels" not in batch and "decoder_input_ids" not in batch:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        batch["labels"] = batch["input_ids"].masked_fill(~mask, IGNORED)
    if "labels" in batch and "decoder_attention_mask" not in batch and (batch["labels"] == IGNORED).any():
        batch["decoder_attention_mask"] = (batch["labels"] != IGNORED).long()
    return batch


def calibration_fingerprint(batches: Iterable[Mapping[str, Any]]) -> str:
    """SHA-256 of what a calibration set holds."""
    digest = hashlib.sha256()
    for batch in batches:
        for key, value in batch.items():
            digest.update(f"{key} {getattr(value, 'dtype', type(value).__name__)} ".encode())
            if isinstance(value, Tensor):
                digest.update(f"{tuple(value.shape)} ".encode())
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            else:
                digest.update(repr(value).encode())
    return digest.hexdigest()
