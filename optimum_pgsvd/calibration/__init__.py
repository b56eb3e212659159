"""What the model sees while it is measured: calibration data, the walk over its blocks, and second moments."""

from .anchored import AnchoredRecorder
from .data import calibration_fingerprint, load_calibration_set
from .gram import GramRecorder, InputSurvey, measured_by_outputs
from .walk import BlockWalk, InMemory, Weights


__all__ = [
    "AnchoredRecorder",
    "BlockWalk",
    "GramRecorder",
    "InMemory",
    "InputSurvey",
    "calibration_fingerprint",
    "Weights",
    "load_calibration_set",
    "measured_by_outputs",
]
