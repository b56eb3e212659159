"""Factoring: one walk over the blocks, in which every planned layer is measured, solved and replaced."""

from .alone import plan_alone
from .at_plan import compressed_at, cut, plan_at
from .blocks import factor, report_on
from .job import Clock, InPlace, Job, Measuring, everything, undone_on_error
from .measuring import measured, profiles_of
from .once import Activations, Kept, Once, Ordered, check_nested, keep_moments, ordered_factors, request_at
from .plans import check_search, searched_plan
from .profiles import loss_profiles, output_profiles, planning_profiles
from .request import Calibration, calibration_of, found_targets, refuse_absent_weights
from .sensitivity import curvature_of, gradient_energies_of, refuse_without_gradients
from .towers import plan_towers


__all__ = [
    "Activations",
    "Calibration",
    "Clock",
    "InPlace",
    "Job",
    "Kept",
    "Measuring",
    "Once",
    "Ordered",
    "calibration_of",
    "check_nested",
    "check_search",
    "compressed_at",
    "curvature_of",
    "cut",
    "everything",
    "factor",
    "found_targets",
    "gradient_energies_of",
    "keep_moments",
    "loss_profiles",
    "measured",
    "ordered_factors",
    "output_profiles",
    "plan_alone",
    "plan_at",
    "plan_towers",
    "planning_profiles",
    "profiles_of",
    "refuse_absent_weights",
    "refuse_without_gradients",
    "report_on",
    "request_at",
    "searched_plan",
    "undone_on_error",
]
