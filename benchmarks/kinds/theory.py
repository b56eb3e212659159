"""The paper's theory, measured on a language model by the tools of `optimum_pgsvd.analysis`.

Options of a grid:
    tool: `profile`, `sweep`, `bound` or `convergence`.
    reductions_swept: of a sweep and of the bound.
    allocations: of a sweep.
    sweeps: of ALS, for the convergence.
    config: further fields of PGSVDConfig.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from grid import Cell

from kinds import language_model
from kinds.compressing import config_of
from kinds.language_model import BATCH, LanguageModel


def load(spec: Mapping[str, Any], options: Mapping[str, Any]) -> LanguageModel:
    return language_model.load(spec, {**options, "measures": ["perplexity"]})


def measure(case: LanguageModel, cell: Cell) -> dict[str, Any]:
    from optimum_pgsvd.analysis.results import finite

    return {"found": finite(TOOLS[cell.options["tool"]](case, cell, config_of(cell, case.data)))}


def evaluation(case: LanguageModel) -> list[dict[str, Any]]:
    """The held-out windows as batches."""
    return [{"input_ids": windows} for windows in case.windows.split(max(1, BATCH // case.windows.shape[1]))]


def profile(case: LanguageModel, cell: Cell, config: Any) -> dict[str, Any]:
    from optimum_pgsvd.analysis import profile_model

    return profile_model(case.model, config, case.tokenizer).to_dict()


def sweep(case: LanguageModel, cell: Cell, config: Any) -> dict[str, Any]:
    from optimum_pgsvd.analysis import sweep

    return sweep(
        case.model, config, reductions=cell.options["reductions_swept"], allocations=cell.options["allocations"],
        evaluation=evaluation(case), tokenizer=case.tokenizer,
    ).to_dict()  # fmt: skip


def bound(case: LanguageModel, cell: Cell, config: Any) -> dict[str, Any]:
    from optimum_pgsvd.analysis import bound_model

    return bound_model(
        case.model, config, cell.options["reductions_swept"], evaluation=evaluation(case), tokenizer=case.tokenizer
    ).to_dict()


def convergence(case: LanguageModel, cell: Cell, config: Any) -> dict[str, Any]:
    from optimum_pgsvd.analysis import converge_model

    return converge_model(case.model, config, cell.options["sweeps"], case.tokenizer).to_dict()


TOOLS: dict[str, Callable[[LanguageModel, Cell, Any], dict[str, Any]]] = {
    "profile": profile,
    "sweep": sweep,
    "bound": bound,
    "convergence": convergence,
}
