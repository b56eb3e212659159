"""Factoring: one walk over the blocks, in which every planned layer is measured, solved and replaced."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .calibration import (
    AnchoredRecorder,
    BlockWalk,
    GramRecorder,
    InMemory,
    InputSurvey,
    Weights,
    calibration_fingerprint,
    load_calibration_set,
    measured_by_outputs,
)
from .card import base_model
from .config import PGSVDConfig
from .distributed import Peers
from .elastic import Elastic
from .errors import CalibrationError, UnsupportedModelError
from .linalg import relative_weight_error
from .logs import warn
from .measurements import Measurements, StoredMoments, is_measurements
from .modeling_pgsvd import set_submodule
from .planning import dense_weight
from .replace import replace_linear
from .report import CompressionReport, LayerReport, ModelSize, environment, peak_memory, planned_layers
from .solvers import SOLVERS, eigh_of_outputs
from .storing import activation_error, empty_factors, stored
from .structures import LinearShape, LowRankFactors, Moments, RankPlan, StoredFactors
from .targets import Target, Targets


Recorder = GramRecorder | StoredMoments


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


class Destination(Protocol):
    """What becomes of the blocks of a model while it is compressed."""

    @property
    def weights(self) -> Weights:
        """Where the weights of a block come from."""
        ...

    def is_finished(self, block: str | None) -> bool:
        """Whether an earlier run finished a block."""
        ...

    def restore(self, block: str | None) -> list[LayerReport] | None:
        """Put the layers of a block that an earlier run finished in place; `None` where there was none."""
        ...

    def finish(self, block: str | None, layers: list[LayerReport]) -> None:
        """Called once the layers of a block, or of all that lies outside the blocks, are replaced."""
        ...

    def keep(self, module: nn.Module, args: tuple, outputs: Any) -> Any:
        """A forward hook on what is not inside a block: may give other tensors with the same values."""
        ...


class InPlace:
    """The model in memory takes the factors."""

    def __init__(self) -> None:
        self.weights: Weights = InMemory()

    def is_finished(self, block: str | None) -> bool:
        """Nothing was done before."""
        return False

    def restore(self, block: str | None) -> list[LayerReport] | None:
        """Nothing was done before."""
        return None

    def finish(self, block: str | None, layers: list[LayerReport]) -> None:
        """Nothing to do."""

    def keep(self, module: nn.Module, args: tuple, outputs: Any) -> Any:
        """Outputs stay where they are."""
        return outputs


@contextmanager
def undone_on_error(model: nn.Module, targets: Targets, undo: bool) -> Iterator[None]:
    """Put the dense layers back where compressing a model in place fails; they are held until it has succeeded."""
    dense = {name: model.get_submodule(name) for name in targets.names} if undo else {}
    try:
        yield
    except BaseException:
        for name, module in dense.items():
            set_submodule(model, name, module.train(model.get_submodule(name).training))
        raise


@dataclass
class Job:
    """What is to be done to a model.

    Args:
        model: changed in place.
        targets: of `find_targets`.
        plan: of `plan_ranks`.
        batches: of `load_calibration_set`; empty for a solver that needs none, and where there are measurements.
        config: the solver and its settings.
        clock: takes the seconds of each step.
        destination: of finished blocks.
        blocks: to walk over; by default those with a layer to factor.
        peers: the processes that do it together.
        measurements: made before, in the place of batches.
        elastic: takes the factors of the targets that stay dense.
    """

    model: PreTrainedModel
    targets: Targets
    plan: RankPlan
    batches: list[dict[str, Any]]
    config: PGSVDConfig
    clock: Clock
    destination: Destination
    blocks: Sequence[str] = ()
    peers: Peers = field(default_factory=Peers)
    measurements: Measurements | None = None
    elastic: Elastic | None = None

    def __post_init__(self) -> None:
        self.blocks = self.blocks or [block for block in self.targets.blocks if self.in_block(block)]

    @property
    def factored(self) -> list[Target]:
        """The targets that the plan gives a rank, and for an elastic checkpoint all that factors make smaller."""
        also = self.elastic is not None
        return [t for t in self.targets.found if t.name in self.plan.ranks or (also and t.shape.largest_saving_rank)]

    def in_block(self, block: str | None) -> list[Target]:
        """Those of them that lie in a block, or outside of all."""
        return [target for target in self.factored if target.block == block]

    def layers(self, block: str | None) -> dict[str, nn.Module]:
        """Their modules by name."""
        return {target.name: self.model.get_submodule(target.name) for target in self.in_block(block)}


def factor(job: Job) -> tuple[list[LayerReport], list[str]]:
    """Factor and replace every layer that the plan gives a rank.

    With calibration batches, block by block: the moments of one block, its factors, then the next. Layers outside the
    blocks are measured all the while, and replaced last.

    Returns:
        A report for every layer of the plan, in its order, and notes.

    Raises:
        CalibrationError: the calibration set leaves a layer without a token, or does not fit the model.
        NonFiniteError: an activation holds NaN or infinity.
    """
    reports = {layer.name: layer for layer in planned_layers(job.plan)}
    total, passed = len(job.blocks) + bool(job.in_block(None)), 0
    with logging.tqdm(total=total, desc="Factoring", unit="block", disable=None) as progress:
        for block, recorder in measured(job) if job.batches else read(job):
            done = job.destination.restore(block)
            if done is None:
                with job.clock("factors"):
                    done = factor_block(job, block, recorder, reports)
                with job.clock("writing"):
                    job.destination.finish(block, done)
            reports |= {layer.name: layer for layer in done}
            recorder = None  # not held while the next block is measured
            if block is not None or done:
                passed += 1
                progress.update()
                progress.set_postfix_str(pace(job, reports, passed / total))
        progress.update(total - passed)  # blocks that the calibration set does not run
    return list(reports.values()), notes_on_coverage(job, reports)


def pace(job: Job, reports: Mapping[str, LayerReport], part: float) -> str:
    """How fast the calibration set goes through the model, of which a part is done, and the memory it has taken."""
    tokens, seconds = max(layer.tokens for layer in reports.values()), job.clock.seconds.get("grams")
    speed = f"{tokens * part / seconds:,.0f} tokens/s, " if seconds else ""
    return f"{speed}peak {peak_memory() / 2**30:.2f} GiB"


def report_on(
    job: Job,
    layers: Sequence[LayerReport],
    notes: Sequence[str],
    before: ModelSize,
    compressed: PreTrainedModel,
    request: Mapping[str, Any] | None = None,
) -> CompressionReport:
    """The report of a job that is done.

    Args:
        job: of which.
        layers: of `factor`.
        notes: of `factor`.
        before: size of the dense model.
        compressed: what came of it.
        request: fingerprints, where a checkpoint on disk was compressed.
    """
    tokens = max((layer.tokens for layer in layers), default=0)
    asked = {"ranks": job.config.ranks, "format_version": None}
    resources: dict[str, float] = {"peak_memory_bytes": peak_memory()}
    if "grams" in job.clock.seconds:
        resources["tokens_per_second"] = tokens / job.clock.seconds["grams"]
    return CompressionReport(
        tuple(layers),
        job.targets.skipped,
        before,
        ModelSize.of(compressed),
        compressed.config.quantization_config.to_dict() | asked,
        job.clock.seconds,
        {"batches": len(job.batches), "tokens": tokens},
        tuple(notes),
        environment(),
        base_model(compressed),
        resources,
        request or {},
    )


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


def measured(job: Job) -> Iterator[tuple[str | None, GramRecorder | None]]:
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


def recorder(job: Job, block: str, walk: BlockWalk, leaders: Mapping[str, str]) -> GramRecorder:
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


def factor_block(
    job: Job, block: str | None, recorder: Recorder | None, planned: Mapping[str, LayerReport]
) -> list[LayerReport]:
    """Factor and replace the layers of a block, each factored by one of the processes."""
    layers = [planned[target.name] for target in job.in_block(block)]
    if recorder is not None and job.peers.size > 1:
        recorder.sum_over(job.peers)
    owners = job.peers.share_out({t.name: t.shape.solving_cost for t in job.in_block(block)})
    mine = [layer for layer in layers if owners[layer.name] == job.peers.rank]
    reports, solved = {}, {}
    for layer in mine if job.peers.size > 1 else ():
        reports[layer.name], solved[layer.name] = factor_layer(job.model, layer, recorder, job.config)
    for layer in layers:
        if job.peers.size == 1:  # only one layer's factors exist beside the dense weights
            reports[layer.name], solved[layer.name] = factor_layer(job.model, layer, recorder, job.config)
        factors = exchanged(job, layer, solved.pop(layer.name, None), owners[layer.name])
        if layer.rank is None:
            assert job.elastic is not None
            assert isinstance(factors, LowRankFactors)
            job.elastic.add(layer.name, factors)
        else:
            replace_linear(job.model, layer.name, factors)
    everywhere = {name: report for part in job.peers.gather(reports) for name, report in part.items()}
    return [everywhere[layer.name] for layer in layers]


def exchanged(job: Job, layer: LayerReport, factors: StoredFactors | None, owner: int) -> StoredFactors:
    """The factors of a layer, from the process that has them."""
    if job.peers.size == 1:
        assert factors is not None
        return factors
    like = empty_factors(dense_weight(job.model, layer.name), rank_to_solve(layer), job.config.storage)
    held = None if factors is None else list(factors.tensors.values())
    found = job.peers.broadcast(held, list(like.tensors.values()), owner)
    return like.of_tensors(dict(zip(like.tensors, found, strict=True)))


def rank_to_solve(layer: LayerReport) -> int:
    """The rank of a layer's factors; of one that stays dense, the largest that saves parameters."""
    return layer.rank or LinearShape(*layer.shape).largest_saving_rank


def factor_layer(
    model: nn.Module, layer: LayerReport, recorder: Recorder | None, config: PGSVDConfig
) -> tuple[LayerReport, StoredFactors]:
    """Factor one layer; errors are those of the factors as stored, after rounding to the model's dtype."""
    start = time.perf_counter()
    weight = dense_weight(model, layer.name)
    if recorder is not None:
        check_reached(recorder, [layer.name])
    moments = recorder.moments(layer.name) if recorder else None
    goal = recorder.goal(layer.name, weight) if recorder else weight
    solved = solve(goal, moments, rank_to_solve(layer), config)
    factors = stored(solved, moments, config.storage, weight.dtype)
    if layer.rank is not None:
        layer = replace(
            layer,
            weight_error=relative_weight_error(weight, factors.left, factors.right),
            activation_error=None if moments is None else activation_error(goal, solved, factors, moments),
        )
    tokens = recorder.tokens[layer.name] if recorder else 0
    return replace(layer, tokens=tokens, seconds=time.perf_counter() - start), factors


def solve(goal: Tensor, moments: Moments | None, rank: int, config: PGSVDConfig) -> LowRankFactors:
    """The factors of one layer, by the config's solver."""
    if moments is not None and moments.outputs is not None:
        return eigh_of_outputs(goal, moments.outputs, moments.energies, rank)
    gram = None if moments is None else moments.gram
    return SOLVERS[config.solver](goal, gram, rank, config.num_iterations)  # type: ignore[arg-type]


def refuse_unseen(survey: InputSurvey, job: Job) -> None:
    """Raise `CalibrationError` for a layer to factor that the calibration set never reached."""
    factored = {target.name for target in job.factored}
    if unseen := [name for name in survey.unseen if name in factored]:
        raise unreached(unseen)


def check_reached(recorder: Recorder, names: Sequence[str]) -> None:
    """Raise `CalibrationError` for a layer that no token of the calibration set reached."""
    if unseen := [name for name in names if recorder.tokens[name] == 0]:
        raise unreached(unseen)


def unreached(names: Sequence[str]) -> CalibrationError:
    """The error for layers that the calibration set never reached."""
    return CalibrationError(
        f"the calibration set never reached {len(names)} layers, {', '.join(names[:3])} among them: give inputs "
        "that use them (images for a vision tower, say), or list them in modules_to_not_convert"
    )


def notes_on_coverage(job: Job, reports: Mapping[str, LayerReport]) -> list[str]:
    """A note, also given as a warning, where the calibration set is thin."""
    thin = [target for target in job.factored if reports[target.name].tokens < target.shape.in_features]
    if not thin or not job.config.needs_dataset:
        return []
    note = (
        f"{len(thin)} layers saw fewer calibration tokens than they have input features "
        f"({min(reports[target.name].tokens for target in thin)} tokens, "
        f"{max(target.shape.in_features for target in thin)} features): their factors fit only what they saw; raise "
        "num_samples or sequence_length, or give more data"
    )
    warn(note)
    return [note]


def calibration_of(
    model: PreTrainedModel, targets: Targets, config: PGSVDConfig, tokenizer: Any = None
) -> tuple[list[dict[str, Any]], Measurements | None]:
    """What a request is to be calibrated on: batches, or measurements made before, or neither.

    Raises:
        CalibrationError: see `load_calibration_set` and `Measurements`.
        DistributedError: processes that work together were given different things.
    """
    batches: list[dict[str, Any]] = []
    measurements = None
    if config.needs_dataset and is_measurements(config.dataset):
        measurements = Measurements(config.dataset)
        measurements.check(targets, config)
    elif config.needs_dataset:
        batches = load_calibration_set(model, config, tokenizer)
    check_shares(batches, config)
    return batches, measurements


def check_shares(batches: Sequence[Mapping[str, Any]], config: PGSVDConfig) -> None:
    """Find in every process what keeps several of them from working together.

    Raises:
        CalibrationError: there are fewer batches than processes.
        DistributedError: they have another request or another calibration set.
    """
    peers = Peers()
    if peers.size > 1:
        peers.refuse_different("config", config.to_dict())
        peers.refuse_different("calibration set", calibration_fingerprint(batches))
        if batches and len(batches) < peers.size:
            raise CalibrationError(
                f"{len(batches)} calibration batches cannot be shared among {peers.size} processes; lower batch_size "
                "or raise num_samples"
            )


def refuse_absent_weights(model: nn.Module) -> None:
    """Raise `UnsupportedModelError` for a model whose weights are not all in the memory of this process."""
    offloaded = [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]
    if offloaded:
        raise UnsupportedModelError(
            f"{offloaded[0]} and {len(offloaded) - 1} other weights are offloaded; load the model without offloading "
            "(device_map=None or one device) to compress it, or compress the checkpoint on disk with "
            "PGSVDCompressor(config).compress_checkpoint(source, output)"
        )
    split = [name for name, parameter in model.named_parameters() if is_split(parameter)]
    if split or any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise UnsupportedModelError(
            f"the weights of this model are split over processes{': ' if split else ''}{''.join(split[:1])}; compress "
            "the checkpoint on disk with PGSVDCompressor(config).compress_checkpoint(source, output), in as many "
            "processes as you like, and load the result with tensor parallelism or FSDP"
        )


def is_split(parameter: Tensor) -> bool:
    """Whether a process holds a part of a parameter only."""
    return any(kind.__name__ in ("DTensor", "FlatParameter") for kind in type(parameter).__mro__)
