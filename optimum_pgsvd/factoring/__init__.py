"""Factoring: one walk over the blocks, in which every planned layer is measured, solved and replaced."""

from .blocks import factor, report_on
from .job import Clock, InPlace, Job, Measuring, everything, undone_on_error
from .measuring import measured, profiles_of
from .ordered import Activations, Ordered, cut, ordered_factors, plan_at, request_at
from .request import Calibration, calibration_of, refuse_absent_weights
from .sensitivity import curvature_of, loss_profiles, refuse_without_gradients


__all__ = [
    "Activations",
    "Calibration",
    "Clock",
    "InPlace",
    "Job",
    "Measuring",
    "Ordered",
    "calibration_of",
    "curvature_of",
    "cut",
    "everything",
    "factor",
    "loss_profiles",
    "measured",
    "ordered_factors",
    "plan_at",
    "profiles_of",
    "refuse_absent_weights",
    "refuse_without_gradients",
    "report_on",
    "request_at",
    "undone_on_error",
]
