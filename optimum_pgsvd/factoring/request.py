"""What a request is calibrated on, and what keeps it from being carried out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..calibration import calibration_fingerprint, load_calibration_set
from ..config import PGSVDConfig
from ..distributed import Peers
from ..errors import CalibrationError, DistributedError, UnsupportedModelError
from ..measurements import Measurements, measurements_of
from ..modeling_pgsvd import put_experts_back
from ..replace import experts_apart
from ..targets import Targets, find_targets


@dataclass(frozen=True, eq=False)
class Calibration:
    """What a request is calibrated on: batches, or measurements made before, or neither.

    Args:
        batches: of `load_calibration_set`.
        measurements: of `measurements_of`.
    """

    batches: list[dict[str, Any]]
    measurements: Measurements | None

    @cached_property
    def fingerprint(self) -> str:
        """Tells these batches from others."""
        return calibration_fingerprint(self.batches)


@contextmanager
def found_targets(model: PreTrainedModel, config: PGSVDConfig) -> Iterator[Targets]:
    """A context in which experts with a layer to compress are taken apart; gives the layers to compress.

    Args:
        model: with all weights in memory. Afterwards its experts are fused again, but for those of which a layer is of
            low rank.
        config: for `find_targets`.

    Raises:
        UnsupportedModelError: weights are absent, or see `find_targets`.
        ConfigError: see `find_targets`.
    """
    refuse_absent_weights(model)
    with experts_apart(model) as fused:
        targets = find_targets(model, config)
        put_experts_back(model, fused, targets.names)
        yield targets


def calibration_of(
    model: PreTrainedModel, targets: Targets, config: PGSVDConfig, tokenizer: Any = None
) -> Calibration:
    """What a request is to be calibrated on.

    Raises:
        CalibrationError: see `load_calibration_set` and `Measurements`.
        DistributedError: processes that work together were given different things.
    """
    measurements = measurements_of(targets, config) if config.needs_dataset else None
    needs_batches = config.needs_dataset and measurements is None
    calibration = Calibration(load_calibration_set(model, config, tokenizer) if needs_batches else [], measurements)
    check_shares(calibration, config)
    return calibration


def check_shares(calibration: Calibration, config: PGSVDConfig) -> None:
    """Find in every process what keeps several of them from working together.

    Raises:
        CalibrationError: there are fewer batches than processes, or none to hold back from refinement.
        DistributedError: refinement is asked for, or they have another request or another calibration set.
    """
    peers, batches = Peers(), calibration.batches
    if config.refine_steps and peers.size > 1:
        raise DistributedError(f"refine_steps={config.refine_steps} works in one process only; start one, or give 0")
    if config.refine_steps and len(batches) == 1:
        raise CalibrationError(
            f"refine_steps={config.refine_steps} needs two calibration batches, one of them to hold back; lower "
            f"batch_size={config.batch_size}, or give more data"
        )
    if peers.size > 1:
        peers.refuse_different("config", config.to_dict())
        peers.refuse_different("calibration set", calibration.fingerprint)
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
