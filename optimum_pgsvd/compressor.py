"""The pipeline: measure, plan, factor, replace."""

from __future__ import annotations

from typing import Any

from optimum.quantization_base import OptimumQuantizer
from torch import nn
from transformers import PreTrainedModel

from .calibration import load_calibration_set
from .card import base_model
from .config import PGSVDConfig
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

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                          num_attention_heads=2, vocab_size=64))
        >>> report = PGSVDCompressor(PGSVDConfig(parameter_reduction=0.5, solver="svd")).compress(model)
        >>> report.parameter_reduction >= 0.5
        True
    """

    def __init__(self, config: PGSVDConfig):
        self.config = config

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
    def from_pretrained(cls, model_or_path: Any, file_name: str | None = None) -> PGSVDCompressor:
        """The compressor with the config of a compressed checkpoint (optimum's interface)."""
        from transformers import AutoConfig

        values = AutoConfig.from_pretrained(model_or_path).quantization_config
        return cls(PGSVDConfig(**values))

    def quantize(self, save_dir: Any, file_prefix: str | None = None, **kwargs: Any) -> CompressionReport:
        """Load `kwargs["model"]`, compress it and save it to a folder (optimum's interface)."""
        from transformers import AutoModelForCausalLM

        model: Any = kwargs.pop("model")
        model = model if isinstance(model, nn.Module) else AutoModelForCausalLM.from_pretrained(model)
        report = self.compress(model, **kwargs)
        model.save_pretrained(save_dir)
        return report
