"""Factoring: one walk over the blocks, in which every planned layer is measured, solved and replaced."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .calibration import AnchoredRecorder, BlockWalk, GramRecorder, InputSurvey
from .config import PGSVDConfig
from .errors import CalibrationError, UnsupportedModelError
from .linalg import relative_activation_error, relative_weight_error
from .logs import warn
from .planning import dense_weight
from .replace import replace_linear
from .report import LayerReport, planned_layers
from .solvers import SOLVERS
from .structures import RankPlan
from .targets import Target, Targets


class Clock:
    """Wall-clock seconds by step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        """Time a step."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - start


def factor(
    model: PreTrainedModel,
    targets: Targets,
    plan: RankPlan,
    batches: list[dict[str, Any]],
    config: PGSVDConfig,
    clock: Clock,
) -> tuple[list[LayerReport], list[str]]:
    """Factor and replace every layer that the plan gives a rank.

    With calibration batches, block by block: the Gram matrices of one block, its factors, then the next. Layers
    outside the blocks are measured in the pass that captures the blocks' inputs, and replaced last.

    Args:
        model: changed in place.
        targets: of `find_targets`.
        plan: of `plan_ranks`.
        batches: of `load_calibration_set`; empty for a solver that needs none.
        config: the solver and its settings.
        clock: takes the seconds of each step.

    Returns:
        A report for every layer of the plan, in its order, and notes.

    Raises:
        CalibrationError: the calibration set leaves a layer without a token, or does not fit the model.
        NonFiniteError: an activation holds NaN or infinity. Neither is raised once a layer has been replaced.
    """
    factored = [target for target in targets.found if target.name in plan.ranks]
    reports = {layer.name: layer for layer in planned_layers(plan)}
    notes: list[str] = []
    with logging.tqdm(total=len(factored), desc="Factoring", unit="layer", disable=None) as progress:
        groups = measured_groups(model, factored, batches, config, clock, notes) if batches else [(factored, None, {})]
        for group, recorder, tokens in groups:
            for target in group:
                with clock("factors"):
                    planned = replace(reports[target.name], tokens=tokens.get(target.name, 0))
                    reports[target.name] = factor_layer(model, planned, recorder, config)
                progress.update()
    return list(reports.values()), notes


def measured_groups(
    model: PreTrainedModel,
    targets: list[Target],
    batches: list[dict[str, Any]],
    config: PGSVDConfig,
    clock: Clock,
    notes: list[str],
) -> Iterator[tuple[list[Target], GramRecorder, Mapping[str, int]]]:
    """The targets block by block as the model runs them, each block with its Gram matrices and token counts."""
    layers = {target.name: model.get_submodule(target.name) for target in targets}
    by_block: dict[str | None, list[Target]] = {}
    for target in targets:
        by_block.setdefault(target.block, []).append(target)
    walk = BlockWalk(model, [block for block in by_block if block is not None], batches)
    survey = InputSurvey(layers, walk.padding.rows)
    outside = GramRecorder({target.name: layers[target.name] for target in by_block.get(None, [])}, walk.padding.rows)
    with clock("capture"):
        walk.capture([survey, outside])
    notes += check_coverage(survey, targets)
    for block in walk.blocks:
        inside = {target.name: layers[target.name] for target in by_block[block]}
        if config.calibration == "anchored":
            anchored = AnchoredRecorder(inside, walk.padding.rows, survey.leaders, config.blend)
            with clock("grams"), anchored:
                walk.run_anchored(block, anchored)
            yield by_block[block], anchored, survey.tokens
            with clock("grams"):
                walk.advance(block)
        else:
            with clock("grams"), GramRecorder(inside, walk.padding.rows, survey.leaders) as recorder:
                walk.run(block)
            yield by_block[block], recorder, survey.tokens
    yield by_block.get(None, []), outside, survey.tokens


def factor_layer(
    model: nn.Module, layer: LayerReport, recorder: GramRecorder | None, config: PGSVDConfig
) -> LayerReport:
    """Factor and replace one layer; errors are those of the factors as stored, after rounding to the model's dtype."""
    start = time.perf_counter()
    assert layer.rank is not None
    weight = dense_weight(model, layer.name)
    gram = recorder.gram(layer.name) if recorder else None
    goal = recorder.goal(layer.name, weight) if recorder else weight
    factors = SOLVERS[config.solver](goal, gram, layer.rank, config.num_iterations).to(weight.dtype)  # type: ignore[arg-type]
    replace_linear(model, layer.name, factors)
    return replace(
        layer,
        weight_error=relative_weight_error(weight, factors.left, factors.right),
        activation_error=None if gram is None else relative_activation_error(goal, factors.left, factors.right, gram),
        seconds=time.perf_counter() - start,
    )


def check_coverage(survey: InputSurvey, targets: list[Target]) -> list[str]:
    """Notes on thin calibration; a layer that the calibration set never reached is an error.

    Raises:
        CalibrationError: a layer saw no token.
    """
    unseen = [target.name for target in targets if survey.tokens[target.name] == 0]
    if unseen:
        raise CalibrationError(
            f"the calibration set never reached {len(unseen)} layers, {', '.join(unseen[:3])} among them: give inputs "
            "that use them (images for a vision tower, say), or list them in modules_to_not_convert"
        )
    thin = [target for target in targets if survey.tokens[target.name] < target.shape.in_features]
    if not thin:
        return []
    least = min(survey.tokens[target.name] for target in thin)
    note = (
        f"{len(thin)} layers saw fewer calibration tokens than they have input features ({least} tokens, "
        f"{max(target.shape.in_features for target in thin)} features): their factors fit only what they saw; raise "
        "num_samples or sequence_length, or give more data"
    )
    warn(note)
    return [note]


def refuse_offloaded(model: nn.Module) -> None:
    """Raise `UnsupportedModelError` for a model whose weights are not all in memory."""
    offloaded = [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]
    if offloaded:
        raise UnsupportedModelError(
            f"{offloaded[0]} and {len(offloaded) - 1} other weights are offloaded; load the model without offloading "
            "(device_map=None or one device) to compress it"
        )
