"""The paper's theory as tools: each of its claims measured on a model."""

from ..calibration import mean_loss
from .bound import Bounds, bound_model
from .convergence import Convergence, converge_model
from .envelopes import Envelopes, envelopes_of
from .gradients import Gradients, measure_gradients
from .profiles import Profiles, profile_model
from .sensitivities import Sensitivities
from .sweep import Point, Sweep, evaluation_set, sweep_model


__all__ = [
    "Bounds",
    "Convergence",
    "Envelopes",
    "Gradients",
    "Point",
    "Profiles",
    "Sensitivities",
    "Sweep",
    "bound_model",
    "converge_model",
    "envelopes_of",
    "evaluation_set",
    "mean_loss",
    "measure_gradients",
    "profile_model",
    "sweep_model",
]
