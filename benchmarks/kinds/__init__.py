"""What can be measured of a cell: a module for each kind.

Each has `load(spec, options)`, which makes of an entry of models.yaml a case that all cells of the model share,
`measure(case, cell)`, which gives the numbers of one, and `given(options)`, which says what a user may give in the
place of what the cells have.
"""

from importlib import import_module
from typing import Any


KINDS = ("language_model", "clip", "compress_time", "speed")


def kind_of(name: str) -> Any:
    """The module of a kind."""
    return import_module(f"kinds.{name}")
