"""Time to compress a language model by every method of a list, in turn, over that of the first of them.

Options of a grid:
    compared: methods, by their names; the first is what the others are compared with.
    repeats: how often each has its turn.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from grid import Cell, methods

from kinds import language_model
from kinds.compressing import compressed


def given(options: Mapping[str, Any]) -> set[str]:
    """What of a user's own it takes."""
    return {"model", "calibration"}


def load(spec: Mapping[str, Any], options: Mapping[str, Any]) -> language_model.LanguageModel:
    return language_model.load(spec, {**options, "measures": []})


def measure(case: language_model.LanguageModel, cell: Cell) -> dict[str, Any]:
    compared, every = cell.options["compared"], methods()
    times: dict[str, list[float]] = {name: [] for name in compared}
    factoring: dict[str, list[float]] = {name: [] for name in compared}
    for _ in range(cell.options["repeats"]):
        for name in compared:
            one = replace(cell, method=name, settings=every[name])
            _, values = compressed(case.model, one, case.data, case.tokenizer)
            times[name].append(values["seconds"])
            factoring[name].append(values["parts"]["factors"])
    medians = {name: statistics.median(found) for name, found in times.items()}
    return {
        "seconds": times,
        "seconds_factoring": factoring,
        "ratio": {name: median / medians[compared[0]] for name, median in medians.items()},
    }
