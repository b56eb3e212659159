"""What rests on few tokens says so: a compressed model in its report, theory in its results."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
from models import FAMILIES, generator, token_ids
from transformers import PreTrainedModel

from optimum_pgsvd import PGSVDCompressor, PGSVDConfig
from optimum_pgsvd.analysis import bound_model, converge_model, sweep_model


def compressing(model: PreTrainedModel, config: PGSVDConfig) -> list[str]:
    return list(PGSVDCompressor(config).compress(model).notes)


def sweeping(model: PreTrainedModel, config: PGSVDConfig) -> list[str]:
    return sweep_model(model, config, reductions=[0.4, 0.6]).to_dict()["notes"]


def bounding(model: PreTrainedModel, config: PGSVDConfig) -> list[str]:
    return bound_model(model, config, [0.4], alone=False).to_dict()["notes"]


def converging(model: PreTrainedModel, config: PGSVDConfig) -> list[str]:
    return converge_model(model, config, sweeps=2).to_dict()["notes"]


VERBS: dict[str, tuple[Callable[[PreTrainedModel, PGSVDConfig], list[str]], dict[str, Any]]] = {
    "compress": (compressing, {}),
    "sweep": (sweeping, {"solver": "eigh"}),
    "sweep by ALS": (sweeping, {"solver": "als"}),
    "bound": (bounding, {"solver": "eigh"}),
    "convergence": (converging, {}),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("tokens", "notes"),
    [
        (24, ["14 layers saw fewer calibration tokens than they have input features (24 tokens, 64 features)"]),
        (63, ["2 layers saw fewer calibration tokens than they have input features (63 tokens, 64 features)"]),
        (64, []),
    ],
)
def test_layers_that_see_too_few_tokens_are_told_of_once(
    verb: str, tokens: int, notes: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The features are 32, and 64 of the two down projections."""
    ids = token_ids(generator(0), 1, tokens)
    work, fields = VERBS[verb]
    config = PGSVDConfig(0.6, dataset=[{"input_ids": ids, "labels": ids}], **fields)
    with caplog.at_level(logging.WARNING):
        found = work(FAMILIES["llama"].build(), config)
    assert [note.split(":")[0] for note in found] == notes
    assert [record.getMessage() for record in caplog.records] == found


def test_a_solver_without_data_has_none_to_tell_of() -> None:
    assert sweeping(FAMILIES["llama"].build(), PGSVDConfig(0.6, solver="svd")) == []
