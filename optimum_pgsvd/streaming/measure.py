"""Measuring a checkpoint on disk once, to plan and factor it by as often as one likes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..calibration import Step
from ..distributed import Peers
from ..errors import ConfigError
from ..factoring import Clock, Measuring, everything, measured, profiles_of, refuse_without_gradients
from ..measurements import INDEX, Measurements, write_block, write_index
from ..planning import profile_of
from ..targets import find_blocks
from .run import Options, Run, refuse_taken
from .source import StreamedModel
from .spill import Spill
from .weights import StreamedWeights
from .workspace import Workspace, differences


# Fields of a config that have no effect on what is measured.
PLANNING = (
    "parameter_reduction", "tolerance", "ranks", "groups", "allocation", "rank_multiple", "num_iterations", "storage",
    "elastic", "self_contained",
)  # fmt: skip


@dataclass
class ToMeasurements:
    """What surrounds blocks that are measured, and not changed.

    Args:
        weights: of the model, a block at a time.
        work: keeps account of the blocks.
        spill: of the activations.
    """

    weights: StreamedWeights
    work: Workspace
    spill: Spill

    def is_finished(self, block: str | None) -> bool:
        """Whether this run or an earlier one measured a block."""
        return block in self.work.finished

    def keep(self, module: nn.Module, args: tuple, outputs: Any) -> Any:
        """A forward hook: outputs, in files where memory is used up."""
        return self.spill.keep(module, args, outputs)


def measure_checkpoint(
    source: StreamedModel, output: str | os.PathLike, config: Any, tokenizer: Any = None, **options: Any
) -> Measurements:
    """See `PGSVDCompressor.measure_checkpoint`.

    Args:
        source: the dense model.
        output: folder for the measurements.
        config: the calibration set, the solver that they are for, and which layers.
        tokenizer: see `Options`.
        options: see `Options`.

    Returns:
        The measurements.

    Raises:
        ConfigError: the solver needs no measurements, or the calibration cannot be made beforehand.
    """
    refuse_unmeasurable(config)
    run = Run.of(source, config, Options(tokenizer or config.tokenizer, **options))
    request = {**run.request, "config": {k: v for k, v in run.request["config"].items() if k not in PLANNING}}
    peers = Peers()
    with Workspace(output, peers) as work:
        if run.options.resume and peers.from_main(lambda: is_finished(work.output, request)):
            return Measurements(work.output)
        peers.from_main(lambda: refuse_taken(work.output, request, run.options.overwrite))
        work.begin(request, run.options.resume)
        carry_out(run, work)
        peers.from_main(lambda: write_index(work.checkpoint, request))
        work.publish()
    return Measurements(output)


def carry_out(run: Run, work: Workspace) -> None:
    """Measure every target, from where an earlier run stopped."""
    model, blocks, plan = run.source.model, find_blocks(run.source.model), everything(run.targets)
    work.keep_plan(plan)
    weights = StreamedWeights(run.source, blocks)
    clock = Clock()
    with work.scratch() as scratch, weights:
        destination = ToMeasurements(weights, work, Spill(scratch, run.options.activation_memory))
        job = Measuring(model, run.targets, plan, run.calibration.batches, run.config, clock, destination, blocks)
        for step in measured(job):
            weights.release_large()  # no forward pass is under way
            if not destination.is_finished(step.block) and step.recorder is not None:
                measure_block(job, step, os.path.join(work.checkpoint, file_name(step.block)))
                work.keep_block(step.block, [], clock.seconds)


def measure_block(job: Measuring, step: Step, path: str) -> None:
    """Write what is known of a block's layers."""
    profiles = profiles_of(job, step, lambda target: profile_of(job.model, target))
    if profiles and job.peers.is_main:
        write_block(path, step.recorder, profiles)


def file_name(block: str | None) -> str:
    """Of the measurements of a block, or of what lies outside of all."""
    return f"{block or 'outside'}.safetensors"


def is_finished(output: str, request: Any) -> bool:
    """Whether a folder holds the measurements that are asked for."""
    return os.path.exists(os.path.join(output, INDEX)) and not differences(Measurements(output).request, request)


def refuse_unmeasurable(config: Any) -> None:
    """Raise `ConfigError` where there is nothing that could be measured beforehand."""
    if not config.needs_dataset:
        raise ConfigError(f"solver={config.solver!r} uses no data, so there is nothing to measure")
    refuse_without_gradients(config, "which are not measured beforehand")
    if config.calibration == "anchored":
        raise ConfigError(
            "calibration='anchored' measures each block behind the compressed ones before it, which depends on the "
            "budget; measure with calibration='parallel'"
        )
