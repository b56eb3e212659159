"""Factoring: one walk over the blocks, in which every planned layer is measured, solved and replaced."""

from .blocks import factor, report_on
from .job import Clock, InPlace, Job, Measuring, undone_on_error
from .layer import check_reached
from .measuring import measured
from .request import Calibration, calibration_of, refuse_absent_weights


__all__ = [
    "Calibration",
    "Clock",
    "InPlace",
    "Job",
    "Measuring",
    "calibration_of",
    "check_reached",
    "factor",
    "measured",
    "refuse_absent_weights",
    "report_on",
    "undone_on_error",
]
