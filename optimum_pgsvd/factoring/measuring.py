"""The walk: blocks in the order in which they are factored, each with what was measured of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ..calibration import AnchoredRecorder, BlockWalk, GramRecorder, InputSurvey, Weights, measured_by_outputs
from ..distributed import Peers
from ..errors import CalibrationError
from ..measurements import StoredMoments
from ..solvers import SOLVERS
from .job import Clock, Job, Measuring
from .layer import Recorder, unreached


def read(job: Job) -> Iterator[tuple[str | None, Recorder | None]]:
    """Every block, and what lies outside of all, with what was measured of them before, if the solver needs it."""

    def recorder_of(block: str | None) -> StoredMoments | None:
        return job.measurements.of_block(job.in_block(block)) if job.measurements else None

    for block in job.blocks:
        if not job.destination.is_finished(block):
            job.destination.weights.load(block)
        yield block, recorder_of(block)
        job.destination.weights.release(block)
    yield None, recorder_of(None)


def measured(job: Measuring) -> Iterator[tuple[str | None, GramRecorder | None]]:
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
        beside = GramRecorder(outside, walk.rows, leaders)

        def recorder_of(block: str) -> GramRecorder | None:
            return None if destination.is_finished(block) else recorder(job, block, walk, leaders)

        blocks: Iterator[Any] = (walk.measure_anchored if anchored else walk.measure)(recorder_of, beside)  # type: ignore[arg-type]
        yield from timed(in_step(blocks, walk.blocks, recorder_of, destination.weights, job.peers), job.clock, "grams")
        yield None, beside


def in_step(
    blocks: Iterator[tuple[str, GramRecorder | None]],
    order: Sequence[str],
    recorder_of: Callable[[str], GramRecorder | None],
    weights: Weights,
    peers: Peers,
) -> Iterator[tuple[str, GramRecorder | None]]:
    """The blocks as they come; where there are several processes, all blocks in one order in each of them.

    A process whose batches do not run a block has recorded nothing of it.

    Raises:
        CalibrationError: batches run the blocks in different orders.
    """
    if peers.size == 1:
        yield from blocks
        return
    coming = next(blocks, None)
    for block in order:
        if coming is None or coming[0] != block:
            weights.load(block)
            yield block, recorder_of(block)
            weights.release(block)
            continue
        yield coming
        coming = next(blocks, None)
    if coming is not None:
        raise CalibrationError(
            f"some batches run {coming[0]} earlier than others do; compress with one process, or give batches with "
            "the same inputs"
        )


def recorder(job: Measuring, block: str, walk: BlockWalk, leaders: Mapping[str, str]) -> GramRecorder:
    """What records the moments of a block's layers."""
    layers = job.layers(block)
    if job.config.calibration == "anchored":
        return AnchoredRecorder(layers, walk.rows, leaders, job.config.blend)
    # Of all targets, not of those to factor: what is measured of a layer must not depend on the budget.
    shapes = {t.name: (t.shape.out_features, t.shape.in_features) for t in job.targets.found if t.block == block}
    fewer = measured_by_outputs(shapes, leaders) if SOLVERS.trait(job.config.solver, "takes_outputs") else set()
    return GramRecorder(layers, walk.rows, leaders, fewer & layers.keys())


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
