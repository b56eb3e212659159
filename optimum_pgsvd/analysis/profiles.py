"""Profiles: the relative error of every layer at every rank, and how convex and alike the layers are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from ..config import PGSVDConfig
from ..factoring import calibration_of, found_targets, output_profiles
from ..planning import measure_profiles
from ..structures import SVDProfile
from .envelopes import Envelopes, envelopes_of
from .results import origin


# Distances from an envelope at which shares of layers are reported. The paper has one, and does not state it.
THRESHOLDS = (0.01, 0.02, 0.05, 0.1, 0.2)


@dataclass(frozen=True, eq=False)
class Profiles:
    """The profiles of a model.

    Args:
        profiles: by what they are of, `"weights"` (Definition 1) and, where there was a dataset, `"outputs"` (singular
            values of `W G^½`), and by layer.
        envelopes: of each of the two.
        origin: see `results.origin`.
    """

    profiles: Mapping[str, Mapping[str, SVDProfile]]
    envelopes: Mapping[str, Envelopes]
    origin: Mapping[str, Any]

    def to_dict(self, thresholds: Sequence[float] = THRESHOLDS) -> dict[str, Any]:
        """All but the singular values, as JSON can hold it."""
        return {**self.origin, **{kind: found.to_dict(thresholds) for kind, found in self.envelopes.items()}}


def profile_model(model: PreTrainedModel, config: PGSVDConfig, tokenizer: Any = None) -> Profiles:
    """The profiles of every target's weight, and of its outputs where the config has a dataset.

    Args:
        model: dense, in memory; not changed.
        config: which layers, and the calibration set; its budget has no effect.
        tokenizer: as for `PGSVDCompressor.compress`.

    Returns:
        The profiles and their envelopes.

    Raises:
        PGSVDError: the config does not fit the model; a weight or an activation holds NaN or infinity.

    Source:
        arXiv 2510.05544, Definition 1 and Appendix G; the profiles of outputs are ours.
    """
    with found_targets(model, config) as targets:
        profiles = {"weights": measure_profiles(model, targets)}
        if config.needs_dataset and config.dataset is not None:
            calibration = calibration_of(model, targets, config, tokenizer)
            profiles["outputs"] = output_profiles(model, targets, config, calibration)
    return Profiles(profiles, {kind: envelopes_of(each) for kind, each in profiles.items()}, origin(model, config))
