"""What every result says of where it comes from, and how it is written."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from ..checkpoint import make_folder
from ..config import PGSVDConfig, describe
from ..errors import CheckpointError
from ..factoring import Once
from ..logs import warn
from ..report import ModelSize, environment


def origin(model: PreTrainedModel, config: PGSVDConfig, notes: Sequence[str] = ()) -> dict[str, Any]:
    """The model, the request, what is to be known of the data and the versions of a result, as JSON can hold them."""
    return {
        "model": {
            "name": describe(getattr(model, "name_or_path", None) or None),
            "class": type(model).__name__,
            "parameters": ModelSize.of(model).parameters,
        },
        "config": config.to_dict(),
        "notes": list(notes),
        "environment": environment(),
    }


def warn_of(once: Once) -> None:
    """Say what is to be known of the data that a result will rest on, before more is made of it."""
    for note in once.notes:
        warn(note)


def free_files(folder: str | os.PathLike, names: Sequence[str], overwrite: bool) -> list[str]:
    """The paths of files to write in a folder, which is made if there is none; asked for before any work is done.

    Raises:
        CheckpointError: one of them is there already, and is not to be replaced; or see `make_folder`.
    """
    paths = [os.path.join(folder, name) for name in names]
    there = [path for path in paths if os.path.exists(path)]
    if there and not overwrite:
        raise CheckpointError(f"{there[0]} exists already; name another folder, or pass --overwrite to replace it")
    make_folder(folder)
    return paths


def write_json(path: str, values: Any) -> None:
    """Write a result, whole or not at all; what is not a finite number becomes `null`."""
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        json.dump(finite(values), file, indent=1, allow_nan=False)
        file.write("\n")
    os.replace(f"{path}.new", path)


def finite(values: Any) -> Any:
    """A copy in which numbers that JSON has no word for are `None`."""
    if isinstance(values, dict):
        return {key: finite(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values
