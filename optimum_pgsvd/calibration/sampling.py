"""Calibration without data: sequences sampled from the model itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from ..errors import CalibrationError
from .forward import evaluating


@torch.no_grad()
def sample_from_model(model: Any, num_samples: int, length: int, batch_size: int, seed: int) -> list[Tensor]:
    """Sequences drawn token by token from a causal language model at temperature 1.

    Each starts with the beginning-of-sequence token, or a random token where the model has none; after an
    end-of-sequence token the next text begins.

    Args:
        model: a causal language model.
        num_samples: sequences.
        length: tokens in each.
        batch_size: sequences drawn at a time.
        seed: of the draws.

    Returns:
        `num_samples` token tensors `(length,)`, int64, on the CPU.

    Raises:
        CalibrationError: the model cannot generate text.
    """
    config = model.config.get_text_config()
    if not model.can_generate() or getattr(model.config, "is_encoder_decoder", False):
        raise CalibrationError(f"dataset='self' needs a causal language model, which {type(model).__name__} is not")
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    windows: list[Tensor] = []
    progress = logging.tqdm(total=num_samples * length, desc="Sampling", unit="token", disable=None)
    with evaluating(model), progress:
        while len(windows) < num_samples:
            count = min(batch_size, num_samples - len(windows))
            tokens, cache = _first_tokens(config, count, generator), None
            for _ in range(length - 1):
                # Without a cache of keys and values, as some models are, they read everything anew.
                output = model(
                    input_ids=tokens if cache is None else tokens[:, -1:], past_key_values=cache, use_cache=True
                )
                cache = getattr(output, "past_key_values", None)
                drawn = torch.multinomial(output.logits[:, -1].float().softmax(-1), 1, generator=generator)
                tokens = torch.cat([tokens, _begin_after_end(drawn, tokens[:, -1:], config)], dim=1)
                progress.update(count)
            windows += tokens.cpu()
            progress.update(count)
    return windows


def _first_tokens(config, count: int, generator: torch.Generator) -> Tensor:
    begin = getattr(config, "bos_token_id", None)
    if begin is None:
        return torch.randint(config.vocab_size, (count, 1), generator=generator, device=generator.device)
    return torch.full((count, 1), begin, device=generator.device)


def _begin_after_end(drawn: Tensor, previous: Tensor, config) -> Tensor:
    begin, end = getattr(config, "bos_token_id", None), getattr(config, "eos_token_id", None)
    ends = [token for token in (end if isinstance(end, list) else [end]) if token not in (None, begin)]
    if begin is None or not ends:
        return drawn
    return torch.where(torch.isin(previous, torch.tensor(ends, device=previous.device)), begin, drawn)
