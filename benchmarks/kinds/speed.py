"""Tokens a second of a compressed language model, in turn with the dense one: reading a prompt, and generating.

Options of a grid:
    batch_size: sequences at once.
    prompt: tokens read at once.
    generated: tokens generated one after the other.
    repeats: turns.
    dtype: of weights and arithmetic.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from grid import Cell

from kinds import language_model
from kinds.compressing import compressed


def given(options: Mapping[str, Any]) -> set[str]:
    """What of a user's own it takes."""
    return {"model", "calibration"}


def load(spec: Mapping[str, Any], options: Mapping[str, Any]) -> language_model.LanguageModel:
    return language_model.load(spec, {**options, "measures": []})


def measure(case: language_model.LanguageModel, cell: Cell) -> dict[str, Any]:
    options = cell.options
    model, values = compressed(case.model, cell, case.data, case.tokenizer)
    calls = {(phase, name): call for name, each in (("dense", case.model), ("compressed", model))
             for phase, call in phases(each, options).items()}  # fmt: skip
    seconds = in_turn(calls, options["repeats"])
    tokens = {
        "prompt": options["batch_size"] * options["prompt"],
        "generation": options["batch_size"] * options["generated"],
    }
    found: dict[str, Any] = {}
    for phase, count in tokens.items():
        medians = {name: statistics.median(seconds[phase, name]) for name in ("dense", "compressed")}
        found[phase] = {
            "tokens_per_second": {name: count / median for name, median in medians.items()},
            "speed_up": medians["dense"] / medians["compressed"],
        }
    return {**values, **found}


def phases(model: Any, options: Mapping[str, Any]) -> dict[str, Callable[[], None]]:
    """What is timed of a model; a call ends when its last token is there."""
    import torch

    shape = options["batch_size"], options["prompt"]
    ids = torch.randint(
        5, model.config.get_text_config().vocab_size, shape, generator=torch.Generator().manual_seed(0)
    )
    ids = ids.to(model.device)
    count = options["generated"]

    def finish(logits: Any) -> None:
        logits[..., -1, :].argmax(-1).tolist()

    @torch.inference_mode()
    def read() -> None:
        finish(model(input_ids=ids, logits_to_keep=1).logits)

    @torch.inference_mode()
    def generate() -> None:
        model.generate(input_ids=ids[:, :1], max_new_tokens=count, min_new_tokens=count, do_sample=False,
                       pad_token_id=0).tolist()  # fmt: skip

    return {"prompt": read, "generation": generate}


def in_turn(calls: Mapping[Any, Callable[[], None]], repeats: int) -> dict[Any, list[float]]:
    """Seconds of each call, over rounds in which all take their turn; a first round is to warm up."""
    times: dict[Any, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if repeat:
                times[name].append(time.perf_counter() - start)
    return times
