"""What the kinds share: a compressed copy of a model."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from typing import Any

from grid import DENSE, Cell


def config_of(cell: Cell, data: Mapping[str, Any]) -> Any:
    """The config of a cell's method; its own fields have precedence over those of the data."""
    from optimum_pgsvd import PGSVDConfig

    settings = {key: value for key, value in cell.settings.items() if key not in ("label", "preset")}
    make = PGSVDConfig.best if cell.settings.get("preset") == "best" else PGSVDConfig
    return make(cell.reduction, seed=cell.seed, **{**data, **cell.options.get("config", {}), **settings})


def compressed(model: Any, cell: Cell, data: Mapping[str, Any], tokenizer: Any = None) -> tuple[Any, dict[str, Any]]:
    """A copy of a model compressed as a cell asks, and what that took; for the dense one itself, and nothing.

    Args:
        model: dense.
        cell: its method, reduction, seed, and option `config`.
        data: fields of the config that say what to calibrate on.
        tokenizer: of the model.
    """
    if cell.method == DENSE:
        return model, {}
    from optimum_pgsvd import PGSVDCompressor

    smaller = copy.deepcopy(model)
    start = time.perf_counter()
    report = PGSVDCompressor(config_of(cell, data)).compress(smaller, tokenizer=tokenizer)
    return smaller, {
        "parameters": report.parameters_after,
        "parameter_reduction": report.parameter_reduction,
        "model_parameter_reduction": 1 - report.model_after.parameters / report.model_before.parameters,
        "calibration_tokens": report.calibration.get("tokens", 0),
        "seconds": time.perf_counter() - start,
        "parts": dict(report.seconds),
        "notes": list(report.notes),
    }
