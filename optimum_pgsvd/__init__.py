"""Activation-aware low-rank compression of transformers models (PGSVD, arXiv 2510.05544).

Importing the package registers it with transformers, now or when transformers is imported, and imports neither torch
nor transformers itself; the public names are loaded on first use, which registers it too where `PGSVD_AUTOLOAD=0`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .autoload import autoload, entry_point
from .version import __version__


if TYPE_CHECKING:
    from .compressor import PGSVDCompressor
    from .config import PGSVDConfig
    from .errors import (
        CalibrationError,
        CheckpointError,
        ConfigError,
        DistributedError,
        NonFiniteError,
        PGSVDError,
        UnsupportedModelError,
    )
    from .measurements import Measurements
    from .modeling_pgsvd import LowRankLinear, PivotedLinear
    from .report import CompressionReport
    from .structures import LowRankFactors, PivotedFactors, RankPlan, SVDProfile
    from .towers import find_towers

_HOMES = {
    "PGSVDCompressor": "compressor",
    "PGSVDConfig": "config",
    "CalibrationError": "errors",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "DistributedError": "errors",
    "NonFiniteError": "errors",
    "PGSVDError": "errors",
    "UnsupportedModelError": "errors",
    "LowRankLinear": "modeling_pgsvd",
    "PivotedLinear": "modeling_pgsvd",
    "Measurements": "measurements",
    "CompressionReport": "report",
    "LowRankFactors": "structures",
    "PivotedFactors": "structures",
    "RankPlan": "structures",
    "SVDProfile": "structures",
    "find_towers": "towers",
}

__all__ = [
    "CalibrationError",
    "CheckpointError",
    "CompressionReport",
    "ConfigError",
    "DistributedError",
    "LowRankFactors",
    "LowRankLinear",
    "Measurements",
    "NonFiniteError",
    "PGSVDCompressor",
    "PGSVDConfig",
    "PGSVDError",
    "PivotedFactors",
    "PivotedLinear",
    "RankPlan",
    "SVDProfile",
    "UnsupportedModelError",
    "__version__",
    "find_towers",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = import_module(f".{_HOMES[name]}", __name__)
    autoload()
    return getattr(home, name)


def __dir__() -> list[str]:
    return __all__


entry_point()
