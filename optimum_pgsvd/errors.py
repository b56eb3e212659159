"""Errors a user can act on: each message names the layer or field, the value, and the remedy."""


class PGSVDError(Exception):
    """Base class of every error this package raises for its users."""


class ConfigError(PGSVDError, ValueError):
    """A field of `PGSVDConfig` is wrong, or does not fit the model it is applied to."""


class CalibrationError(PGSVDError, ValueError):
    """The calibration set cannot be read, or is not enough for what was asked of it."""


class NonFiniteError(PGSVDError, ValueError):
    """A weight or an activation holds NaN or infinity."""


class UnsupportedModelError(PGSVDError, ValueError):
    """The model has no layer to compress, or lies where it cannot be compressed."""


class CheckpointError(PGSVDError, RuntimeError):
    """A checkpoint and its config disagree, or an output folder is not free."""


class DistributedError(PGSVDError, RuntimeError):
    """Processes that compress one model together disagree, or one of them has stopped."""
