"""What the model sees while it is measured: calibration data, the walk over its blocks, and Gram matrices."""

from .anchored import AnchoredRecorder
from .data import load_calibration_set
from .gram import GramRecorder, InputSurvey
from .walk import BlockWalk


__all__ = ["AnchoredRecorder", "BlockWalk", "GramRecorder", "InputSurvey", "load_calibration_set"]
