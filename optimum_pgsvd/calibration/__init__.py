"""What the model sees while it is measured: calibration data, the walk over its blocks, and second moments."""

from .anchored import AnchoredRecorder
from .curvature import measure_curvature
from .data import calibration_fingerprint, is_causal, load_calibration_set
from .forward import evaluating
from .gram import GramRecorder, InputSurvey, measured_by_outputs
from .passes import Replay, Step
from .predictions import divergence, predict, rows, spread
from .walk import BlockWalk, InMemory, Weights


__all__ = [
    "AnchoredRecorder",
    "BlockWalk",
    "GramRecorder",
    "InMemory",
    "InputSurvey",
    "Replay",
    "Step",
    "Weights",
    "calibration_fingerprint",
    "divergence",
    "evaluating",
    "is_causal",
    "load_calibration_set",
    "measure_curvature",
    "measured_by_outputs",
    "predict",
    "rows",
    "spread",
]
