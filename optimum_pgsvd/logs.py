"""Warnings that obey transformers' verbosity, as its own do."""

from transformers.utils import logging


logger = logging.get_logger("optimum_pgsvd")


def warn(message: str) -> None:
    """Warn, where `transformers.logging`'s verbosity allows warnings."""
    if logging.get_verbosity() <= logging.WARNING:
        logger.warning(message)
