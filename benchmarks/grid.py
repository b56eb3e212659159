"""Cells: what the YAML files under `benchmarks/cells` ask to be measured, and where each result is.

A file is a grid, or a list of grids: a `kind` of measurement, `models`, `methods`, `reductions` and `seeds`, by the
names of models.yaml and methods.yaml, options of the kind, and under `paper` what the paper reports, to be read beside
and of no effect. Each combination is a cell and has a JSON file of its
own in `results/NAME`. The dense model is a cell of no reduction.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from kinds import KINDS
from perplexity import ROOT, environment


HERE = Path(__file__).parent
CELLS = HERE / "cells"
RESULTS = HERE / "results"
AXES = {"models": "model", "methods": "method", "reductions": "reduction", "seeds": "seed"}
DENSE = "dense"


class Unavailable(Exception):
    """What a cell needs is not on this machine; the message says what."""


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Args:
        grid: name of the file that asks for it.
        kind: of measurement.
        model: a name in models.yaml.
        method: a name in methods.yaml.
        reduction: fraction of the target layers' parameters to remove.
        seed: of everything by chance.
        settings: of the method.
        options: of the kind.
    """

    grid: str
    kind: str
    model: str
    method: str
    reduction: float
    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> dict[str, Any]:
        """What tells it from other cells of its file."""
        return {name: getattr(self, name) for name in ("kind", "model", "method", "reduction", "seed")}

    @property
    def asked(self) -> dict[str, Any]:
        """All that its result depends on; a result of something else is not one of this cell."""
        settings = {key: value for key, value in self.settings.items() if key != "label"}
        return {**self.key, "settings": settings, "options": dict(self.options)}

    def file(self, results: Path = RESULTS) -> Path:
        """Where its result is written."""
        parts = (self.kind, self.model, self.method, f"{self.reduction:g}", str(self.seed))
        return results / self.grid / ("--".join(re.sub(r"[^\w.]+", "-", part) for part in parts) + ".json")


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def methods() -> dict[str, dict[str, Any]]:
    """The settings of every method, by name."""
    return read_yaml(HERE / "methods.yaml")


def models() -> dict[str, dict[str, Any]]:
    """What is known of every model, by name."""
    return read_yaml(HERE / "models.yaml")


def names() -> list[str]:
    """Every file of cells, by its path below `cells`, without the suffix."""
    return sorted(path.relative_to(CELLS).with_suffix("").as_posix() for path in CELLS.rglob("*.yaml"))


def known(name: str, table: Mapping[str, Any], what: str, grid: str) -> Any:
    """The entry of a table; raises `ValueError` naming what is there."""
    if name not in table:
        raise ValueError(f"{grid}: {what} {name!r} is not known; known are {', '.join(table)}")
    return table[name]


def expand(grid: str, spec: Mapping[str, Any]) -> Iterator[Cell]:
    """The cells of a grid; that of a dense model once, first."""
    if missing := {"kind", "models"} - set(spec):
        raise ValueError(f"{grid}: a grid needs {' and '.join(sorted(missing))}")
    if spec["kind"] not in KINDS:
        raise ValueError(f"{grid}: kind {spec['kind']!r} is not known; known are {', '.join(KINDS)}")
    every, there = methods(), models()
    options = {key: value for key, value in spec.items() if key not in {"kind", "paper", *AXES}}
    axes = (spec["models"], spec.get("methods", [DENSE]), spec.get("reductions", [0.0]), spec.get("seeds", [0]))
    done = set()
    for model, method, reduction, seed in itertools.product(*axes):
        known(model, there, "model", grid)
        if method == DENSE:
            reduction, seed = 0.0, 0
        if (model, method, reduction, seed) not in done:
            done.add((model, method, reduction, seed))
            settings = known(method, every, "method", grid)
            yield Cell(grid, spec["kind"], model, method, float(reduction), seed, settings, options)


def read_grid(name: str) -> list[Cell]:
    """The cells of a file; where two of its grids ask for the same, the first.

    Raises:
        ValueError: there is no such file, or it asks for what is not known.
    """
    path = CELLS / f"{name}.yaml"
    if not path.exists():
        raise ValueError(f"there are no cells {name!r}; there are {', '.join(names())}")
    found = read_yaml(path)
    cells: dict[tuple, Cell] = {}
    for spec in found if isinstance(found, list) else [found]:
        for cell in expand(name, spec):
            cells.setdefault(tuple(cell.key.values()), cell)
    return list(cells.values())


def located(path: str) -> Path:
    """A path in models.yaml as one of this machine.

    Raises:
        Unavailable: it names a variable that is not set, or what is not there.
    """
    if unset := [name for name in re.findall(r"\$(\w+)", path) if name not in os.environ]:
        raise Unavailable(f"{path}: {unset[0]} is not set")
    found = ROOT / os.path.expandvars(path)
    if not found.exists():
        raise Unavailable(f"{path} is not there")
    return found


def source(path: str) -> str:
    """What `from_pretrained` is given for the path of a model: a folder here, or a name on the Hub."""
    here = path.startswith(("$", "examples/", "benchmarks/")) or os.path.isabs(path)
    return str(located(path)) if here else path


def result_of(cell: Cell, results: Path = RESULTS) -> dict[str, Any] | None:
    """The result of a cell, if it was measured as it is asked for now."""
    path = cell.file(results)
    if not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    return found if json.loads(json.dumps(cell.asked)).items() <= found.items() else None


def write_result(cell: Cell, values: Mapping[str, Any], results: Path = RESULTS) -> Path:
    """Write the result of a cell, whole or not at all, with where it was measured."""
    path = cell.file(results)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    found = {**cell.asked, **values, "environment": environment()}
    beside.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)
    return path


def read_results(name: str, results: Path = RESULTS) -> list[dict[str, Any]]:
    """Every result of a file of cells, in the order of the cells; of what it does not ask for any more, none.

    That of a method that failed has its error as `failed`, and no numbers.
    """
    found = (result_of(cell, results) for cell in read_grid(name))
    return [result for result in found if result is not None]


def chosen(cells: Sequence[Cell], **wanted: Sequence[Any] | None) -> list[Cell]:
    """The cells that have one of the values wanted on each axis; the dense model with every method and reduction."""

    def fits(cell: Cell) -> bool:
        return all(
            values is None or getattr(cell, axis) in values or (cell.method == DENSE and axis != "model")
            for axis, values in wanted.items()
        )

    return [cell for cell in cells if fits(cell)]
