"""The walk: blocks in the order in which they are factored, each with what was measured of its layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from ..calibration import AnchoredRecorder, BlockWalk, GramRecorder, InputSurvey, Step, Weights, measured_by_outputs
from ..distributed import Peers
from ..errors import CalibrationError
from ..solvers import SOLVERS
from ..structures import SVDProfile
from ..targets import Target
from .job import Clock, Job, Measuring
from .layer import check_reached, unreached


def read(job: Job) -> Iterator[Step]:
    """Every block, and what lies outside of all, with what was measured of them before, if the solver needs it."""

    def recorder_of(block: str | None) -> Any:
        return job.measurements.of_block(job.in_block(block)) if job.measurements else None

    for block in job.blocks:
        if not job.destination.is_finished(block):
            job.destination.weights.load(block)
        yield Step(block, recorder_of(block))
        job.destination.weights.release(block)
    yield Step(None, recorder_of(None))


def measured(job: Measuring) -> Iterator[Step]:
    """The blocks as the model runs them, and what lies outside of all, each with what the calibration set says."""
    outside = job.layers(None)
    anchored = job.config.calibration == "anchored"
    destination = job.destination
    numbers = job.peers.mine(len(job.batches))
    with BlockWalk(
        job.model, job.blocks, job.batches, destination.weights, bool(outside), destination.keep, numbers
    ) as walk:
        with job.clock("survey"):
            survey = walk.survey({name: job.model.get_submodule(name) for name in job.targets.names})
            refuse_unseen(survey, job)
        leaders = survey.leaders
        del survey  # it holds every dense layer
        beside = GramRecorder(outside, walk.rows, leaders, with_magnitudes=needs_magnitudes(job))

        def recorders_of(block: str) -> Sequence[Any]:
            return [None] if destination.is_finished(block) else recorders(job, block, walk, leaders)

        if anchored:
            steps = walk.measure_anchored(recorders_of, beside, bool(job.config.refine_steps))
        else:
            steps = walk.measure(lambda block: recorders_of(block)[0], beside)
        yield from timed(in_step(steps, walk.blocks, recorders_of, destination.weights, job.peers), job.clock, "grams")
        yield Step(None, beside)


def profiles_of(job: Measuring, step: Step, measure: Callable[[Target], SVDProfile]) -> dict[str, SVDProfile]:
    """The profile of every layer of a step, each measured by one of the processes, in the order of the model.

    Args:
        job: of which.
        step: its recorder is summed over the processes first.
        measure: called for this process's share of the layers.

    Raises:
        CalibrationError: the calibration set never reached one of them.
    """
    peers, found = job.peers, job.in_block(step.block)
    if peers.size > 1:
        step.recorder.sum_over(peers)
    check_reached(step.recorder, [target.name for target in found])
    owners = peers.share_out({target.name: target.shape.solving_cost for target in found})
    profiles = peers.merge({t.name: measure(t) for t in found if owners[t.name] == peers.rank})
    return {target.name: profiles[target.name] for target in found}


def in_step(
    steps: Iterator[Step],
    order: Sequence[str],
    recorders_of: Callable[[str], Sequence[Any]],
    weights: Weights,
    peers: Peers,
) -> Iterator[Step]:
    """The blocks as they come; where there are several processes, all blocks in one order in each of them.

    A process whose batches do not run a block has recorded nothing of it.

    Raises:
        CalibrationError: batches run the blocks in different orders.
    """
    if peers.size == 1:
        yield from steps
        return
    coming = next(steps, None)
    for block in order:
        if coming is None or coming.block != block:
            yield from without_batches(block, recorders_of(block), weights)
        while coming is not None and coming.block == block:
            yield coming
            coming = next(steps, None)
    if coming is not None:
        raise CalibrationError(
            f"some batches run {coming.block} earlier than others do; compress with one process, or give batches with "
            "the same inputs"
        )


def without_batches(block: str, recorders: Sequence[Any], weights: Weights) -> Iterator[Step]:
    """The steps of a block that no batch of this process runs."""
    weights.load(block)
    for recorder in recorders:
        yield Step(block, recorder, recorder is recorders[-1])
    weights.release(block)


def recorders(job: Measuring, block: str, walk: BlockWalk, leaders: Mapping[str, str]) -> Sequence[GramRecorder]:
    """What records the moments of a block's layers, one after the other."""
    layers = job.layers(block)
    if job.config.calibration == "anchored":
        parts = stages(layers, leaders) or [{}]
        options = job.config.blend, needs_magnitudes(job)
        return [AnchoredRecorder(part, walk.rows, leaders, *options) for part in parts]
    # Of all targets, not of those to factor: what is measured of a layer must not depend on the budget.
    # The mean of a layer's inputs, which its bias makes up for, cannot be had from moments of its outputs.
    shapes = {
        t.name: (t.shape.out_features, t.shape.in_features)
        for t in job.targets.found
        if t.block == block and t.name not in job.corrected
    }
    by_outputs = SOLVERS.trait(job.config.solver, "takes_outputs") and job.config.objective == "outputs"
    fewer = measured_by_outputs(shapes, leaders) if by_outputs else set()
    return [GramRecorder(layers, walk.rows, leaders, fewer & layers.keys(), needs_magnitudes(job))]


def needs_magnitudes(job: Measuring) -> bool:
    """Whether the mean absolute values of inputs are to be measured."""
    return SOLVERS.trait(job.config.solver, "needs") == "magnitudes"


def stages(layers: Mapping[str, nn.Module], leaders: Mapping[str, str]) -> list[dict[str, nn.Module]]:
    """Layers in the order in which they run, those in one stage that share an input or stand for one another.

    Layers stand for one another whose places differ in numbers only, `experts.0.w1` and `experts.1.w1`.

    Args:
        layers: of a block.
        leaders: in the order of the calls, the first layer that is fed the same tensor.
    """
    found: list[dict[str, nn.Module]] = []
    stage_of: dict[str, dict[str, nn.Module]] = {}
    for name in sorted(layers, key=list(leaders).index):
        keys = (leaders[name], re.sub(r"(?<=\.)\d+(?=\.)", "*", name))
        stage = next((stage_of[key] for key in keys if key in stage_of), None)
        if stage is None:
            stage = {}
            found.append(stage)
        stage[name] = layers[name]
        stage_of |= dict.fromkeys(keys, stage)
    return found


def timed(items: Iterator[Any], clock: Clock, step: str) -> Iterator[Any]:
    """The items, with the time that it takes to get each of them."""
    end = object()
    while True:
        with clock(step):
            item = next(items, end)
        if item is end:
            return
        yield item
        item = None


def refuse_unseen(survey: InputSurvey, job: Measuring) -> None:
    """Raise `CalibrationError` for a layer to factor that the calibration set never reached."""
    factored = {target.name for target in job.factored}
    if unseen := [name for name in survey.unseen if name in factored]:
        raise unreached(unseen)
