"""What the benchmarks of time and memory share: results written cell by cell, and timing."""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from perplexity import ROOT, environment


T = TypeVar("T")
RESULTS = Path(__file__).parent / "results"
GIB = 2**30


def read_cells(path: Path) -> list[dict[str, Any]]:
    """The cells of a result file, none where there is no file."""
    return json.loads(path.read_text(encoding="utf-8"))["cells"] if path.exists() else []


def write_cell(path: Path, key: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Add a cell to a result file at once, in the place of one of the same key; later cells survive a crash of it."""
    where = environment()
    cell = {**key, **values, "commit": where["commit"], "load": os.getloadavg()}
    kept = [other for other in read_cells(path) if not key.items() <= other.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps({"environment": where, "cells": [*kept, cell]}, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)
    print(json.dumps(cell), flush=True)
    return cell


def table_parser(description: str, result: Path) -> argparse.ArgumentParser:
    """What every benchmark takes that writes tables of models from its cells."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--tables", action="store_true", help="write the tables from the JSON, measure nothing")
    parser.add_argument("--models", nargs="*", default=[], help="only these")
    parser.add_argument("--result", type=Path, default=result, help="another file, as for a try or several runs")
    return parser


def check_models(asked: Iterable[str], there: Iterable[str]) -> None:
    """Stop where a model is asked for that there is not, here or at all."""
    known = [*there]
    if unknown := [name for name in asked if name not in known]:
        raise SystemExit(
            f"--models {' '.join(unknown)}: there are {', '.join(known)}; all but the project's own are in the "
            "folder PGSVD_DATA"
        )


def seconds(function: Callable[[], T], repeats: int = 1) -> tuple[float, T]:
    """Median wall-clock seconds of a few calls, and what the last one returned."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - start)
    return statistics.median(times), result


def fill(name: str, body: str, document: Path = ROOT / "docs" / "results.md") -> None:
    """Put a table in its marked place in a document."""
    text = document.read_text(encoding="utf-8")

    def between(marks: re.Match[str]) -> str:
        return f"{marks[1]}{body}\n{marks[2]}"

    text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", between, text, flags=re.DOTALL)
    document.write_text(text, encoding="utf-8")
