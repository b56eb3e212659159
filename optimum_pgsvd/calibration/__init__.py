"""What the model sees while it is measured: calibration data, the walk over its blocks, and second moments."""

from .anchored import AnchoredRecorder
from .curvature import measure_curvature
from .data import calibration_fingerprint, is_causal, load_calibration_set
from .forward import evaluating
from .gradients import measure_gradient_energies
from .gram import GramRecorder, InputSurvey, measured_by_outputs
from .losses import Batch, exact_loss, loss_of, mean_loss, predictions_in
from .passes import Replay, Step
from .predictions import divergence, predict, rows, spread
from .sources import check_named
from .walk import BlockWalk, InMemory, Weights


__all__ = [
    "AnchoredRecorder",
    "Batch",
    "BlockWalk",
    "GramRecorder",
    "InMemory",
    "InputSurvey",
    "Replay",
    "Step",
    "Weights",
    "calibration_fingerprint",
    "check_named",
    "divergence",
    "evaluating",
    "exact_loss",
    "is_causal",
    "load_calibration_set",
    "loss_of",
    "mean_loss",
    "measure_curvature",
    "measure_gradient_energies",
    "measured_by_outputs",
    "predictions_in",
    "predict",
    "rows",
    "spread",
]
