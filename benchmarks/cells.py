"""What the benchmarks of time and memory share: results written cell by cell, and timing."""

from __future__ import annotations

import json
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping
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


def seconds(function: Callable[[], T], repeats: int = 1) -> tuple[float, T]:
    """Median wall-clock seconds of a few calls, and what the last one returned."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - start)
    return statistics.median(times), result


def fill(name: str, body: str) -> None:
    """Put a table in its marked place in docs/results.md."""
    document = ROOT / "docs" / "results.md"
    text = document.read_text(encoding="utf-8")

    def between(marks: re.Match[str]) -> str:
        return f"{marks[1]}{body}\n{marks[2]}"

    text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", between, text, flags=re.DOTALL)
    document.write_text(text, encoding="utf-8")
