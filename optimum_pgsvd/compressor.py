"""The pipeline: measure, plan, factor, replace."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import transformers
from optimum.quantization_base import OptimumQuantizer
from torch import Tensor, nn
from transformers import PreTrainedModel

from .calibration import Weights
from .checkpoint import new_folder
from .config import PGSVDConfig
from .elastic import Elastic
from .errors import CheckpointError, ConfigError
from .factoring import (
    Calibration,
    Clock,
    InPlace,
    Job,
    calibration_of,
    check_search,
    curvature_of,
    factor,
    found_targets,
    gradient_energies_of,
    planning_profiles,
    report_on,
    searched_plan,
    undone_on_error,
)
from .measurements import Measurements, measurements_of
from .planning import check_budgets, check_request, plan_ranks, refuse_elastic_experts, refuse_without_search
from .replace import experts_apart, mark_compressed
from .report import CompressionReport, ModelSize
from .saving import attach_artifacts
from .streaming import (
    ACTIVATION_MEMORY,
    StreamedModel,
    StreamedWeights,
    compress_checkpoint,
    measure_checkpoint,
)
from .targets import Targets, find_blocks, find_targets


class PGSVDCompressor(OptimumQuantizer):
    """Compresses models already in memory.

    Args:
        config: what to do; not changed.
        model: for `quantize`; `compress` is given its model.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                          num_attention_heads=2, vocab_size=64))
        >>> report = PGSVDCompressor(PGSVDConfig(parameter_reduction=0.5, solver="svd")).compress(model)
        >>> report.parameter_reduction >= 0.5
        True
    """

    def __init__(self, config: PGSVDConfig, model: PreTrainedModel | None = None):
        self.config, self.model = config, model

    def plan(self, model: PreTrainedModel) -> CompressionReport:
        """The ranks and sizes that `compress` would give, without data and without touching the model.

        Raises:
            PGSVDError: the config does not fit the model, or a weight holds NaN or infinity.
        """
        return planned(model, self.config)

    def plan_checkpoint(self, source: str | os.PathLike, **options: Any) -> CompressionReport:
        """As `plan`, for a checkpoint on disk, with one block of the model in memory at a time.

        Where the config's dataset is a folder of `measure_checkpoint`, no weight is read.

        Args:
            source: as for `compress_checkpoint`.
            options: as for `compress_checkpoint`.

        Raises:
            PGSVDError: as `plan`, or the checkpoint cannot be read.
        """
        streamed = self._streamed(source, **options)
        streamed.take_experts_apart()
        with StreamedWeights(streamed, find_blocks(streamed.model)) as weights:
            return planned(streamed.model, self.config, weights)

    def compress(self, model: PreTrainedModel, tokenizer: Any = None, *, undo: bool = True) -> CompressionReport:
        """Compress a model in place.

        What is wrong with the config, with the weights, or with the first batch of each kind is found before a layer
        is replaced.

        Args:
            model: a dense transformers model; its config object is replaced by a copy, not changed.
            tokenizer: tokenizer or processor for text datasets, saved with the model; by default the config's, else
                the model's own.
            undo: hold the dense layers until the last of them is factored, and put them back where something goes
                wrong before; without it less memory is needed, and the model may be left half compressed.

        Returns:
            The report, which `save_pretrained` writes beside the checkpoint.

        Raises:
            PGSVDError: see `optimum_pgsvd.errors`.
        """
        with found_targets(model, self.config) as targets:
            refuse_elastic_experts(model, self.config)
            return self._compress(model, targets, tokenizer, undo)

    def _compress(self, model: PreTrainedModel, targets: Targets, tokenizer: Any, undo: bool) -> CompressionReport:
        """See `compress`."""
        clock = Clock()
        before = ModelSize.of(model)
        check_request(model, targets, self.config)
        if self.config.searched:
            check_search(model, targets, self.config)
        with clock("data"):
            calibration = calibration_of(model, targets, self.config, tokenizer)
        curvature: dict[str, Tensor] = {}
        energies: dict[str, Tensor] = {}
        if self.config.needs_gradients:
            with clock("gradients"):
                if self.config.needs_curvature:
                    curvature = curvature_of(model, targets, self.config, calibration)
                if self.config.needs_gradient_energies:
                    energies = gradient_energies_of(model, targets, self.config, calibration)
        with clock("plan"):
            profiles = planning_profiles(model, targets, self.config, calibration, curvature=curvature)
        if self.config.searched:
            plan, search = searched_plan(model, targets, self.config, calibration, clock)
        else:
            plan, search = plan_ranks(targets, self.config, profiles), {}
        elastic = Elastic(profiles) if self.config.elastic else None
        job = Job(
            model, targets, plan, calibration.batches, self.config, clock, InPlace(),
            measurements=calibration.measurements, elastic=elastic,
            gradients=curvature if self.config.objective == "loss" else energies,
        )  # fmt: skip
        with undone_on_error(model, targets, undo):
            layers, notes = factor(job)
        mark_compressed(model, self.config)
        report = replace(report_on(job, layers, notes, before, model), search=search)
        attach_artifacts(model, report, tokenizer or self.config.tokenizer, elastic)
        return report

    def compress_checkpoint(
        self,
        source: str | os.PathLike,
        output: str | os.PathLike,
        tokenizer: Any = None,
        *,
        max_shard_size: int | str = "5GB",
        activation_memory: int = ACTIVATION_MEMORY,
        resume: bool = True,
        overwrite: bool = False,
        **options: Any,
    ) -> CompressionReport:
        """Compress a checkpoint on disk into another, with one block of the model in memory at a time.

        The output's weights are byte for byte those that `compress` and `save_pretrained` give. Finished blocks are on
        disk before the next begins, in the folder `.<output>.pgsvd` beside the output: a run that was killed goes on
        where it stopped when it is started again, and one that has finished is not done again.

        Args:
            source: a folder with safetensors files, or the name of such a model on the Hub.
            output: a folder that does not exist or is empty.
            tokenizer: as for `compress`.
            max_shard_size: of a weights file, in bytes or as in `"5GB"`.
            activation_memory: bytes of activations, of the whole calibration set, that may stay in memory; the rest is
                kept in files beside the output.
            resume: take up what an interrupted run left, instead of starting over.
            overwrite: replace an output that is not empty; it stays until the new one is complete.
            options: `dtype`, `revision`, `token` and `trust_remote_code`, as for `from_pretrained`.

        Returns:
            The report.

        Raises:
            CheckpointError: the output is not free, or an interrupted run beside it had another request.
            PGSVDError: see `compress`.
        """
        return compress_checkpoint(
            self._streamed(source, **options),
            output,
            self.config,
            tokenizer,
            max_shard_size=max_shard_size,
            activation_memory=activation_memory,
            resume=resume,
            overwrite=overwrite,
        )

    def measure_checkpoint(
        self,
        source: str | os.PathLike,
        output: str | os.PathLike,
        tokenizer: Any = None,
        *,
        activation_memory: int = ACTIVATION_MEMORY,
        resume: bool = True,
        overwrite: bool = False,
        **options: Any,
    ) -> Measurements:
        """Measure a checkpoint on disk once, to compress it later by any budget without running it again.

        The folder takes the place of a dataset: with `PGSVDConfig(..., dataset=folder)`, `plan`, `compress` and
        `compress_checkpoint` need no forward pass, and plan in seconds. It holds the second moments that the config's
        solver needs and the singular values of the weights, of every layer that is not in `modules_to_not_convert`;
        the budget has no effect on it.

        Args:
            source: as for `compress_checkpoint`.
            output: a folder that does not exist or is empty.
            tokenizer: as for `compress`.
            activation_memory: as for `compress_checkpoint`.
            resume: as for `compress_checkpoint`.
            overwrite: as for `compress_checkpoint`.
            options: as for `compress_checkpoint`.

        Returns:
            The measurements.

        Raises:
            ConfigError: the config asks for anchored calibration, or for a solver that uses no data.
            PGSVDError: see `compress_checkpoint`.
        """
        return measure_checkpoint(
            self._streamed(source, **options),
            output,
            self.config,
            tokenizer,
            activation_memory=activation_memory,
            resume=resume,
            overwrite=overwrite,
        )

    def _streamed(self, source: str | os.PathLike, **options: Any) -> StreamedModel:
        hub = {key: options[key] for key in ("revision", "token") if key in options}
        remote = options.get("trust_remote_code")
        loader = transformers.AutoModelForCausalLM if remote else model_class(source, **hub)
        return StreamedModel(source, loader, **options)

    @classmethod
    def from_pretrained(
        cls, model_or_path: Any, file_name: str | None = None, *, config: PGSVDConfig, **options: Any
    ) -> PGSVDCompressor:
        """A compressor that holds a model, for `quantize`: optimum's interface.

        Args:
            model_or_path: a dense model, a folder, or a name on the Hub.
            file_name: part of optimum's interface, not used.
            config: what to do.
            options: for the model's `from_pretrained`.

        Returns:
            The compressor.
        """
        if not isinstance(model_or_path, nn.Module):
            model_or_path = model_class(model_or_path, **options).from_pretrained(model_or_path, **options)
        return cls(config, model_or_path)

    def quantize(
        self, save_dir: str | os.PathLike, file_prefix: str | None = None, *, overwrite: bool = False, **kwargs: Any
    ) -> CompressionReport:
        """Compress the model that the compressor holds, and save it: optimum's interface.

        Args:
            save_dir: a folder that does not exist or is empty.
            file_prefix: part of optimum's interface, not used.
            overwrite: replace a folder that is not empty.
            kwargs: for `compress`.

        Returns:
            The report.

        Raises:
            CheckpointError: the folder is not empty.
            PGSVDError: see `compress`; or the compressor holds no model.
        """
        if self.model is None:
            raise ConfigError("quantize() needs a model: use PGSVDCompressor.from_pretrained(model, config=...)")
        with new_folder(save_dir, overwrite) as folder:
            report = self.compress(self.model, **kwargs)
            self.model.save_pretrained(folder)
        return report


def model_class(name: str | os.PathLike, **options: Any) -> Any:
    """The class that a checkpoint's config names as its architecture, `AutoModel` where it names none.

    Args:
        name: a folder, or a name on the Hub.
        options: such as `revision`, for reading the config.

    Raises:
        CheckpointError: there is no config, or it names no architecture that transformers knows.
    """
    try:
        named = transformers.AutoConfig.from_pretrained(name, **options).architectures or [""]
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"no model can be read from {str(name)!r}: {str(error).strip()}\nGive a folder with the config.json of a "
            "model, or a name on the Hub"
        ) from error
    return getattr(transformers, named[0], transformers.AutoModel)


def planned(model: PreTrainedModel, config: PGSVDConfig, weights: Weights | None = None) -> CompressionReport:
    """The plan for a model, from measurements where the config names them, else from its weights."""
    with experts_apart(model):
        targets = find_targets(model, config)
        check_budgets(targets, config)
        refuse_without_search(config)
        at_hand = Calibration([], measurements_of(targets, config))
        profiles = planning_profiles(model, targets, config, at_hand, weights)
        plan = plan_ranks(targets, config, profiles)
        return CompressionReport.of_plan(plan, targets, model, config.to_dict())
