"""Block by block: every planned layer is solved and replaced; what came of it is reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from ..calibration import Step
from ..card import base_model
from ..logs import warn
from ..planning import dense_weight
from ..replace import replace_linear
from ..report import CompressionReport, LayerReport, ModelSize, environment, peak_memory, planned_layers
from ..storing import empty_factors
from ..structures import LowRankFactors, StoredFactors
from .job import Job
from .layer import coverage_notes, dense_bias, factor_layer, rank_to_solve
from .measuring import measured, read
from .refining import refine


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
    solved: list[LayerReport] = []
    with logging.tqdm(total=total, desc="Factoring", unit="block", disable=None) as progress:
        for step in measured(job) if job.batches else read(job):
            done = job.destination.restore(step.block)
            if done is None:
                with job.clock("factors"):
                    solved += factor_layers(job, step, reports)
                if not step.last:
                    step.release()  # not held while the next layers are measured
                    continue
                done = refined(job, step, in_order(job, step.block, solved))
                with job.clock("writing"):
                    job.destination.finish(step.block, done)
            reports |= {layer.name: layer for layer in done}
            solved = []
            step.release()
            if step.block is not None or done:
                passed += 1
                progress.update()
                progress.set_postfix_str(pace(job, reports, passed / total))
        progress.update(total - passed)  # blocks that the calibration set does not run
    notes = coverage_notes(job.config, job.factored, {name: layer.tokens for name, layer in reports.items()})
    for note in notes:
        warn(note)
    return list(reports.values()), notes


def in_order(job: Job, block: str | None, layers: Sequence[LayerReport]) -> list[LayerReport]:
    """The layers of a block as the model has them."""
    found = {layer.name: layer for layer in layers}
    return [found[target.name] for target in job.in_block(block)]


def refined(job: Job, step: Step, layers: list[LayerReport]) -> list[LayerReport]:
    """The layers of a block after refinement, if that was asked for; what lies outside the blocks is left as it is."""
    if not (job.config.refine_steps and step.replays) or all(layer.rank is None for layer in layers):
        return layers
    assert step.block is not None
    with job.clock("refinement"):
        gain = refine(job.model.get_submodule(step.block), step.replays, job.config.refine_steps, job.config.seed)
    return [layer if layer.rank is None else replace(layer, refined=gain) for layer in layers]


def factor_layers(job: Job, step: Step, planned: Mapping[str, LayerReport]) -> list[LayerReport]:
    """Factor and replace the layers of a step, each factored by one of the processes."""
    recorder = step.recorder
    found = [t for t in job.in_block(step.block) if recorder is None or t.name in recorder.tokens]
    layers = [planned[target.name] for target in found]
    if recorder is not None and job.peers.size > 1:
        recorder.sum_over(job.peers)
    owners = job.peers.share_out({target.name: target.shape.solving_cost for target in found})
    mine = [layer for layer in layers if owners[layer.name] == job.peers.rank]
    reports, solved = {}, {}
    for layer in mine if job.peers.size > 1 else ():
        reports[layer.name], solved[layer.name] = factor_layer(job, layer, recorder)
    for layer in layers:
        if job.peers.size == 1:  # only one layer's factors exist beside the dense weights
            reports[layer.name], solved[layer.name] = factor_layer(job, layer, recorder)
        factors = exchanged(job, layer, solved.pop(layer.name, None), owners[layer.name])
        if layer.rank is None:
            assert job.elastic is not None
            assert isinstance(factors, LowRankFactors)
            job.elastic.add(layer.name, factors)
        else:
            replace_linear(job.model, layer.name, factors)
    everywhere = job.peers.merge(reports)
    return [everywhere[layer.name] for layer in layers]


def exchanged(job: Job, layer: LayerReport, factors: StoredFactors | None, owner: int) -> StoredFactors:
    """The factors of a layer, from the process that has them."""
    if job.peers.size == 1:
        assert factors is not None
        return factors
    bias = dense_bias(job, layer.name) if layer.name in job.corrected else None
    like = empty_factors(dense_weight(job.model, layer.name), rank_to_solve(layer), job.config.storage, bias)
    held = None if factors is None else list(factors.tensors.values())
    found = job.peers.broadcast(held, list(like.tensors.values()), owner)
    return like.of_tensors(dict(zip(like.tensors, found, strict=True)))


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
