"""What searches for a plan have in common: they run the model at one plan after the other."""

from __future__ import annotations

from transformers import PreTrainedModel

from ..config import PGSVDConfig
from ..distributed import Peers
from ..errors import ConfigError, DistributedError
from ..solvers import SOLVERS
from ..targets import Targets
from .job import Clock
from .once import Ordered, ordered_factors, request_at
from .request import Calibration


def refuse_several_processes(config: PGSVDConfig) -> None:
    """Raise `DistributedError` where several processes work together."""
    if Peers().size > 1:
        raise DistributedError(f"allocation={config.allocation!r} searches in one process only; start one")


def refuse_without_batches(config: PGSVDConfig, calibration: Calibration, instead: str) -> None:
    """Raise `ConfigError` where there is nothing to run the model on.

    Args:
        config: the request.
        calibration: of `calibration_of`.
        instead: of data, what may be given.
    """
    if not calibration.batches:
        raise ConfigError(
            f"allocation={config.allocation!r} runs the model on the calibration set, so there is no plan without "
            f"one, nor by measurements made before; give texts, images or model inputs, or {instead}"
        )


def factors_to_cut(
    model: PreTrainedModel, targets: Targets, config: PGSVDConfig, calibration: Calibration, clock: Clock
) -> Ordered:
    """Factors of every target that can be cut at any plan, whatever solver and calibration a model is compressed by.

    By the config's solver where its factors are nested, else by the closed form; for the error of outputs, and in
    parallel calibration.

    Args:
        model: dense, in memory; not changed.
        targets: of `find_targets`.
        config: the request, with a parameter reduction.
        calibration: of `calibration_of`.
        clock: takes the seconds of each step.

    Raises:
        PGSVDError: see `ordered_factors`.
    """
    nested = config.solver if SOLVERS.trait(config.solver, "nested") else "eigh"
    request = request_at(
        config, parameter_reduction=config.parameter_reduction, groups=config.groups, allocation="pareto",
        solver=nested, objective="outputs", calibration="parallel", refine_steps=0, correct_bias=False, elastic=False,
    )  # fmt: skip
    return ordered_factors(model, targets, request, calibration, clock=clock)
