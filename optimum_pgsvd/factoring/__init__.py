"""Factoring: one walk over the blocks, in which every planned layer is measured, solved and replaced."""

from .blocks import factor, report_on
from .job import Clock, InPlace, Job, Measuring, everything, undone_on_error
from .measuring import measured, profiles_of
from .profiles import loss_profiles, output_profiles, planning_profiles
from .request import Calibration, calibration_of, refuse_absent_weights
from .sensitivity import curvature_of, gradient_energies_of, refuse_without_gradients


__all__ = [
    "Calibration",
    "Clock",
    "InPlace",
    "Job",
    "Measuring",
    "calibration_of",
    "curvature_of",
    "everything",
    "factor",
    "gradient_energies_of",
    "loss_profiles",
    "measured",
    "output_profiles",
    "planning_profiles",
    "profiles_of",
    "refuse_absent_weights",
    "refuse_without_gradients",
    "report_on",
    "undone_on_error",
]
