"""The pipeline: measure, plan, factor, replace."""

from __future__ import annotations

import os
from typing import Any

import transformers
from optimum.quantization_base import OptimumQuantizer
from torch import nn
from transformers import PreTrainedModel

from .calibration import load_calibration_set
from .card import base_model
from .checkpoint import new_folder
from .config import PGSVDConfig
from .errors import ConfigError
from .factoring import Clock, factor, refuse_offloaded
from .planning import check_request, plan_ranks
from .replace import mark_compressed
from .report import CompressionReport, ModelSize, environment
from .saving import attach_artifacts
from .targets import find_targets


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
        targets = find_targets(model, self.config)
        return CompressionReport.of_plan(
            plan_ranks(model, targets, self.config), targets, model, self.config.to_dict()
        )

    def compress(self, model: PreTrainedModel, tokenizer: Any = None) -> CompressionReport:
        """Compress a model in place.

        Everything that can be wrong with the config, the weights and the calibration set is found before the first
        layer is replaced.

        Args:
            model: a dense transformers model; its config object is replaced by a copy, not changed.
            tokenizer: tokenizer or processor for text datasets, saved with the model; by default the config's, else
                the model's own.

        Returns:
            The report, which `save_pretrained` writes beside the checkpoint.

        Raises:
            PGSVDError: see `optimum_pgsvd.errors`.
        """
        clock = Clock()
        before = ModelSize.of(model)
        refuse_offloaded(model)
        targets = find_targets(model, self.config)
        check_request(model, targets, self.config)
        with clock("data"):
            batches = load_calibration_set(model, self.config, tokenizer) if self.config.needs_dataset else []
        with clock("plan"):
            plan = plan_ranks(model, targets, self.config)
        layers, notes = factor(model, targets, plan, batches, self.config, clock)
        result = mark_compressed(model, self.config)
        report = CompressionReport(
            tuple(layers),
            targets.skipped,
            before,
            ModelSize.of(model),
            result.to_dict() | {"ranks": self.config.ranks, "format_version": None},
            clock.seconds,
            {"batches": len(batches), "tokens": max((layer.tokens for layer in layers), default=0)},
            tuple(notes),
            environment(),
            base_model(model),
        )
        attach_artifacts(model, report, tokenizer or self.config.tokenizer)
        return report

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
    """
    named = transformers.AutoConfig.from_pretrained(name, **options).architectures or [""]
    return getattr(transformers, named[0], transformers.AutoModel)
