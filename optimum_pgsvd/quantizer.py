"""The plug-in: compress while `from_pretrained` loads, rebuild when a compressed checkpoint is loaded."""

from __future__ import annotations

from functools import wraps
from typing import Any

from transformers.quantizers.auto import AutoHfQuantizer

from .config import PGSVDConfig
from .errors import ConfigError, UnsupportedModelError
from .modeling_pgsvd import LowRankQuantizer
from .modeling_pgsvd import register as register_with_transformers


class PGSVDQuantizer(LowRankQuantizer):
    """transformers' quantizer for `quant_method: pgsvd`."""

    quantization_config: PGSVDConfig

    def __init__(self, quantization_config: PGSVDConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.request: PGSVDConfig | None = quantization_config.__dict__.pop("request", None)
        self.cut: Any = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse, before any weight is read, what cannot be done."""
        config = self.quantization_config
        if self.pre_quantized or self.cut is not None:
            return
        if config.is_result:
            raise ConfigError(
                "this PGSVDConfig is the result of a compression; to compress a dense model, build a new one with "
                "parameter_reduction=..., tolerance=... or ranks=..."
            )
        config.require_dataset()
        devices = {str(device) for device in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in devices or ("cpu" in devices and len(devices) > 1):
            raise UnsupportedModelError(
                "a model offloaded to the CPU or to disk cannot be compressed while it loads; load it with "
                "device_map=None, save it, and reload the compressed model with any device_map"
            )

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        from .saving import remember_commit

        remember_commit(model, checkpoint_files)
        if self.request is not None:
            self._plan_cut(model, self.request, checkpoint_files)
        super()._process_model_before_weight_loading(model, **kwargs)
        if self.cut is not None:
            # Then the loader reads one tensor after the other, and of one at a time more is in memory than is kept.
            self.pre_quantized = False
        return model

    def _plan_cut(self, model: Any, request: PGSVDConfig, checkpoint_files: list[str] | None) -> None:
        """Have the checkpoint loaded at lower ranks than it holds."""
        from .elastic import SideFile, find_side_file, plan_cut

        side = SideFile.read(find_side_file(model.name_or_path, checkpoint_files, model.pgsvd_commit))
        self.cut = plan_cut(model, request, self, side)
        self.quantization_config, self.request = self.cut.config, None
        self.cut.prepare(model, checkpoint_files)

    def get_weight_conversions(self) -> list[Any]:
        """What the loader does to weights: nothing, unless a checkpoint is cut."""
        return [*super().get_weight_conversions(), *(self.cut.conversions() if self.cut else ())]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from .compressor import PGSVDCompressor
        from .saving import attach_artifacts, load_report

        cut, self.cut = self.cut, None
        self.pre_quantized = self.pre_quantized or cut is not None
        super()._process_model_after_weight_loading(model, **kwargs)
        if self.pre_quantized:
            report = load_report(model.name_or_path, revision=model.pgsvd_commit)
            tower = self.quantization_config.record.get("tower")
            if report is not None and tower and any(layer.name.startswith(f"{tower}.") for layer in report.layers):
                report = report.of_tower(tower, model)
            attach_artifacts(model, cut.finish(model, report) if cut else report)
            return model
        del model.config.quantization_config
        model.is_quantized = False
        PGSVDCompressor(self.quantization_config).compress(model, undo=False)
        if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
            spread_again(model)
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        from .saving import detach_artifacts

        detach_artifacts(model)
        return super()._dequantize(model, dtype=dtype)


def spread_again(model: Any) -> None:
    """Put the new layers of a model on several devices under accelerate's care as the old ones were."""
    from accelerate import dispatch_model
    from accelerate.hooks import remove_hook_from_submodules

    remove_hook_from_submodules(model)
    dispatch_model(model, model.hf_device_map, skip_keys=model._skip_keys_device_placement)


def take_requests() -> None:
    """Let a `PGSVDConfig` that is passed when a compressed checkpoint is loaded reach the quantizer.

    transformers drops it with a warning, because a checkpoint's own config counts. Every other pair of configs is
    merged as ever.
    """
    stock = getattr(AutoHfQuantizer, "merge_quantization_configs", None)
    if stock is None or getattr(stock, "takes_pgsvd_requests", False):
        return

    @wraps(stock)
    def merge(quantization_config: Any, quantization_config_from_args: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(quantization_config_from_args, PGSVDConfig):
            made = stock(quantization_config, None, *args, **kwargs)
            if isinstance(made, PGSVDConfig):
                from .elastic import check_cut

                check_cut(quantization_config_from_args, made)
                made.__dict__["request"] = quantization_config_from_args  # the quantizer takes it off again
                return made
        return stock(quantization_config, quantization_config_from_args, *args, **kwargs)

    merge.__dict__["takes_pgsvd_requests"] = True
    AutoHfQuantizer.merge_quantization_configs = staticmethod(merge)


def register() -> None:
    """Make transformers know PGSVD; safe to call repeatedly."""
    register_with_transformers(PGSVDConfig, PGSVDQuantizer)
    take_requests()
