"""The plug-in: compress while `from_pretrained` loads, rebuild when a compressed checkpoint is loaded."""

from __future__ import annotations

from typing import Any

from .config import PGSVDConfig
from .errors import ConfigError, UnsupportedModelError
from .modeling_pgsvd import LowRankQuantizer
from .modeling_pgsvd import register as register_with_transformers


class PGSVDQuantizer(LowRankQuantizer):
    """transformers' quantizer for `quant_method: pgsvd`."""

    quantization_config: PGSVDConfig

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse, before any weight is read, what cannot be done."""
        config = self.quantization_config
        if self.pre_quantized:
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
        return super()._process_model_before_weight_loading(model, **kwargs)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from .compressor import PGSVDCompressor
        from .saving import attach_artifacts, load_report

        super()._process_model_after_weight_loading(model, **kwargs)
        if self.pre_quantized:
            attach_artifacts(model, load_report(model.name_or_path, revision=model.pgsvd_commit))
            return model
        del model.config.quantization_config
        model.is_quantized = False
        PGSVDCompressor(self.quantization_config).compress(model)
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


def register() -> None:
    """Make transformers know PGSVD; safe to call repeatedly."""
    register_with_transformers(PGSVDConfig, PGSVDQuantizer)
