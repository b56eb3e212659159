"""Compressing a checkpoint on disk into another, with one block in memory at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from torch import nn
from transformers.utils import logging

from ..config import PGSVDConfig
from ..distributed import Peers
from ..errors import CalibrationError, CheckpointError, ConfigError
from ..factoring import (
    Calibration,
    Clock,
    Job,
    calibration_of,
    factor,
    planning_profiles,
    refuse_without_gradients,
    report_on,
)
from ..planning import check_budgets, plan_ranks, refuse_elastic_experts, refuse_without_search
from ..replace import replace_linear
from ..report import REPORT_NAME, CompressionReport, LayerReport, ModelSize, environment
from ..saving import load_report, remember_commit
from ..structures import RankPlan
from ..targets import Targets, find_blocks, find_targets
from .output import CompressedCheckpoint
from .process import free_at_once
from .side_file import SideFileWriter
from .source import StreamedModel
from .spill import Spill
from .weights import StreamedWeights
from .workspace import Workspace, differences


# Bytes of activations, of all batches together, that stay in memory.
ACTIVATION_MEMORY = 2**26


@dataclass(frozen=True)
class Options:
    """How a run is carried out, whatever it makes of the model; see `PGSVDCompressor.compress_checkpoint`."""

    tokenizer: Any = None
    max_shard_size: int | str = "5GB"
    activation_memory: int = ACTIVATION_MEMORY
    resume: bool = True
    overwrite: bool = False


def compress_checkpoint(
    source: StreamedModel, output: str | os.PathLike, config: PGSVDConfig, tokenizer: Any = None, **options: Any
) -> CompressionReport:
    """See `PGSVDCompressor.compress_checkpoint`.

    Args:
        source: the dense model.
        output: folder for the compressed one.
        config: what to do.
        tokenizer: see `Options`.
        options: see `Options`.

    Returns:
        The report.
    """
    run = Run.of(source, config, Options(tokenizer or config.tokenizer, **options))
    refuse_unmeasured_outputs(config, run.calibration)
    peers = Peers()
    with Workspace(output, peers) as work:
        if run.options.resume and (report := peers.from_main(lambda: finished_report(work.output, run.request))):
            logging.get_logger(__name__).info("%s is finished already", work.output)
            return report
        peers.from_main(lambda: refuse_taken(work.output, run.request, run.options.overwrite))
        work.begin(run.request, run.options.resume)
        report = run.carry_out(work)
        work.publish()
    return report


@dataclass(frozen=True)
class Run:
    """A request that can be met, as far as is known before any weight is read.

    Args:
        source: the dense model.
        config: the request.
        options: how to go about it.
        targets: of `find_targets`.
        calibration: of `calibration_of`.
        request: what decides on the bytes of the output, as JSON gives it back.
        clock: takes the seconds of each step.
    """

    source: StreamedModel
    config: PGSVDConfig
    options: Options
    targets: Targets
    calibration: Calibration
    request: Mapping[str, Any]
    clock: Clock

    @classmethod
    def of(cls, source: StreamedModel, config: PGSVDConfig, options: Options) -> Run:
        """Find the layers and the data; nothing is written.

        Raises:
            PGSVDError: see `PGSVDCompressor.compress`.
        """
        clock = Clock()
        free_at_once()
        check_shard_size(options.max_shard_size)
        remember_commit(source.model, source.files)
        source.take_experts_apart()
        targets = find_targets(source.model, config)
        source.fuse_experts(targets.names)
        refuse_elastic_experts(source.model, config)
        check_budgets(targets, config)
        refuse_sampling(config)
        refuse_without_search(config)
        refuse_without_gradients(config, "which needs the whole model in memory")
        with clock("data"):
            calibration = calibration_of(source.model, targets, config, options.tokenizer)
        request = {
            "config": config.to_dict(),
            "model": source.fingerprint(),
            "dtype": str(source.model.dtype),
            "calibration": calibration.fingerprint,
            "measurements": calibration.measurements and calibration.measurements.request,
            "max_shard_size": options.max_shard_size,
            "environment": environment(),
        }
        # tuples become lists and so on, so that it can be compared with what is on disk
        request = json.loads(json.dumps(request))
        return cls(source, config, options, targets, calibration, request, clock)

    def carry_out(self, work: Workspace) -> CompressionReport:
        """Plan, factor and write, from where an earlier run stopped.

        Args:
            work: takes the plan and the blocks; has those of the earlier run.

        Returns:
            The report; the whole checkpoint is in `work.checkpoint`.
        """
        for step, seconds in work.seconds.items():
            self.clock.seconds[step] = self.clock.seconds.get(step, 0.0) + seconds
        model, blocks = self.source.model, find_blocks(self.source.model)
        weights, before = StreamedWeights(self.source, blocks), ModelSize.of(model)
        peers = work.peers
        elastic = SideFileWriter(work.checkpoint, model, peers.is_main) if self.config.elastic else None
        plan = work.plan or self._planned(work, weights, elastic)
        size = self.options.max_shard_size
        checkpoint = CompressedCheckpoint(work.checkpoint, model, plan, self.config, size, peers, elastic)
        with work.scratch() as scratch, weights:
            spill = Spill(scratch, self.options.activation_memory)
            disk = ToDisk(weights, checkpoint, work, spill, self.clock, self.config.calibration == "anchored")
            batches, measurements = self.calibration.batches, self.calibration.measurements
            job = Job(
                model, self.targets, plan, batches, self.config, self.clock, disk, blocks, peers, measurements, elastic
            )
            layers, notes = factor(job)
            disk.finish_rest()
        report = report_on(job, layers, notes, before, checkpoint.outline, self.request)
        with work.scratch() as scratch:
            checkpoint.finish(report, self.options.tokenizer, scratch)
        return report

    def _planned(self, work: Workspace, weights: StreamedWeights, elastic: SideFileWriter | None) -> RankPlan:
        """A new plan, on disk; and before it, with an elastic checkpoint, the profiles that it was made from."""
        model = self.source.model
        with self.clock("plan"), weights:
            profiles = planning_profiles(model, self.targets, self.config, self.calibration, weights)
            plan = plan_ranks(self.targets, self.config, profiles)
        if elastic is not None:
            work.peers.from_main(lambda: elastic.begin(plan, profiles))
        work.keep_plan(plan)
        return plan


@dataclass
class ToDisk:
    """The destination of blocks that are compressed one after the other, and are then only on disk.

    Args:
        weights: of the model, a block at a time.
        checkpoint: takes the blocks.
        work: keeps account of them.
        spill: of the activations.
        clock: whose seconds are noted with every block.
        is_anchored: whether later blocks need the factors of those that an earlier run finished.
    """

    weights: StreamedWeights
    checkpoint: CompressedCheckpoint
    work: Workspace
    spill: Spill
    clock: Clock
    is_anchored: bool

    def is_finished(self, block: str | None) -> bool:
        """Whether this run or an earlier one wrote a block."""
        return block in self.work.finished

    def restore(self, block: str | None) -> list[LayerReport] | None:
        """The reports of a block that an earlier run wrote, and its factors where they are needed."""
        self.weights.release_large()  # no forward pass is under way between two blocks
        layers = self.work.finished.get(block)
        if layers and self.is_anchored:
            for name, factors in self.checkpoint.read_factors([layer.name for layer in layers]).items():
                replace_linear(self.weights.source.model, name, factors)
        return layers

    def finish(self, block: str | None, layers: list[LayerReport]) -> None:
        """Write a block, and note it once it is on disk."""
        if block is None:
            self._write_outside()
        else:
            self._write(lambda name: lies_in(block, name))
        self.work.keep_block(block, layers, self.clock.seconds)

    def finish_rest(self) -> None:
        """Write the blocks that the calibration set does not run and that hold no layer to compress."""
        for block in self.weights.blocks:
            if not self.is_finished(block):
                with self.weights.resident(block):
                    self.finish(block, [])

    def keep(self, module: nn.Module, args: tuple, outputs: Any) -> Any:
        """A forward hook: outputs, in files where memory is used up."""
        return self.spill.keep(module, args, outputs)

    def _write_outside(self) -> None:
        parts = [*self.weights.blocks, *self.weights.large]
        self._write(lambda name: not any(lies_in(part, name) for part in parts))
        for part in self.weights.large:
            with self.weights.resident(part):
                self._write(lambda name, part=part: lies_in(part, name))  # type: ignore[misc]

    def _write(self, wanted: Any) -> None:
        self.checkpoint.write(self.weights.source.model, wanted)


def lies_in(part: str, name: str) -> bool:
    """Whether a tensor's name lies in a submodule."""
    return name.startswith(f"{part}.")


def finished_report(output: str, request: Mapping[str, Any]) -> CompressionReport | None:
    """The report of an output that an earlier run of the same request finished."""
    report = report_of(output)
    return report if report and not differences(report.request, request) else None


def report_of(output: str) -> CompressionReport | None:
    """The report of an output that was compressed on disk, `None` where there is none."""
    report = load_report(output) if os.path.exists(os.path.join(output, REPORT_NAME)) else None
    return report if report and report.request else None


def refuse_taken(output: str, request: Mapping[str, Any], overwrite: bool) -> None:
    """Raise `CheckpointError` where the output cannot be put in its place."""
    if os.path.exists(output) and not os.path.isdir(output):
        raise CheckpointError(f"the output {output} is a file; name a folder")
    if os.path.ismount(output):
        raise CheckpointError(f"a file system is mounted at the output {output}; name a folder in it")
    if os.path.isdir(output) and os.listdir(output) and not overwrite:
        report = report_of(output)
        changed = differences(report.request, request)[:10] if report else []
        raise CheckpointError(
            f"the output folder {output} is not empty; choose another, or overwrite it"
            + "".join(f"\n  {line}" for line in changed)
        )


def refuse_sampling(config: PGSVDConfig) -> None:
    """Raise `CalibrationError` where the calibration set is to be sampled from the model."""
    if config.needs_dataset and isinstance(config.dataset, str) and config.dataset == "self":
        raise CalibrationError(
            "dataset='self' samples token by token from the whole model, which is not in memory while its checkpoint "
            "is compressed; give texts, or load the model to compress it"
        )


def refuse_unmeasured_outputs(config: PGSVDConfig, calibration: Calibration) -> None:
    """Raise `ConfigError` where ranks are to be chosen by outputs that the model would first have to give."""
    if config.profile == "outputs" and calibration.measurements is None:
        raise ConfigError(
            f"allocation={config.allocation!r} chooses ranks by the outputs of all layers, and while a checkpoint is "
            "compressed on disk only those of one block are known; measure it first (`optimum-cli pgsvd measure`) and "
            "give that folder as dataset, or compress the model in memory"
        )


def check_shard_size(size: int | str) -> None:
    """Raise `ConfigError` where a size is none, before it is needed."""
    try:
        split_torch_state_dict_into_shards({}, max_shard_size=size)
    except ValueError as error:
        raise ConfigError(f"max_shard_size={size!r}: {error}") from None
