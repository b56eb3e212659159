"""Plans that are found by running the model: which search is whose."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from ..config import PGSVDConfig
from ..structures import RankPlan
from ..targets import Targets
from .alone import plan_alone
from .job import Clock
from .request import Calibration
from .search import refuse_several_processes
from .towers import plan_towers, towers_to_share


SEARCHES = {"asvd": plan_alone, "towers": plan_towers}


def check_search(model: PreTrainedModel, targets: Targets, config: PGSVDConfig) -> None:
    """Find what keeps a request from being searched for before any data is read.

    Raises:
        ConfigError: its towers are fewer than two.
        DistributedError: there are several processes.
    """
    refuse_several_processes(config)
    if config.allocation == "towers":
        towers_to_share(model, targets, config)


def searched_plan(
    model: PreTrainedModel, targets: Targets, config: PGSVDConfig, calibration: Calibration, clock: Clock
) -> tuple[RankPlan, dict[str, Any]]:
    """The plan of a request that is searched for, and what the report says of the search.

    Args:
        model: dense, in memory; not changed.
        targets: of `find_targets`.
        config: the request; `config.searched`.
        calibration: of `calibration_of`.
        clock: takes the seconds of each step.

    Raises:
        PGSVDError: see `plan_alone` and `plan_towers`.
    """
    return SEARCHES[config.allocation](model, targets, config, calibration, clock)
