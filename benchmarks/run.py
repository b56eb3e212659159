"""Measure what the YAML files under `benchmarks/cells` ask for, and write docs/results.md from the results.

    python benchmarks/run.py --list                        # what there is, and how much of it is measured
    python benchmarks/run.py perplexity                    # every cell that has no result yet
    python benchmarks/run.py perplexity --models demo --methods als pgsvd --reductions 0.2 --seeds 0
    python benchmarks/run.py paper/llama2-7b-20            # the paper's settings, on the paper's model
    python benchmarks/run.py paper/llama2-7b-20 --model path/or/repo --calibration texts.jsonl --evaluation held.jsonl
    python benchmarks/run.py --tables                      # only write the documents from the results

Every result is a JSON file of its own in `benchmarks/results/NAME`, with versions, hardware, seed and commit. A cell
that has one is not measured again, unless what it asks for has changed. The exit status is 1 where something that was
asked for could not be measured. Trained models and texts beside those of the project are read from the folder
`PGSVD_DATA`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import grid
from grid import RESULTS, Cell, Unavailable, chosen, names, read_grid, result_of, write_result
from kinds import kind_of


# What a user may give in the place of what the cells have; a part of what the result says it was asked for.
GIVEN = ("model", "calibration", "evaluation", "tasks")


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="files under benchmarks/cells, without .yaml")
    parser.add_argument("--list", action="store_true", help="say what there is, and measure nothing")
    parser.add_argument("--tables", action="store_true", help="write the documents from the results, measure nothing")
    parser.add_argument("--result", type=Path, default=RESULTS, help="another folder for results, as for a try")
    parser.add_argument("--models", nargs="+", dest="model_names", help="only these")
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--reductions", nargs="+", type=float, help="only these")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these")
    parser.add_argument(
        "--model", help="your own in the place of the cells': a folder or a name on the Hub; needs --result"
    )
    parser.add_argument("--calibration", type=Path, help="a .jsonl file to calibrate it on")
    parser.add_argument("--evaluation", type=Path, help="a .jsonl file to measure it on")
    parser.add_argument("--tasks", nargs="+", help="other tasks of accuracy; needs --result")
    args = parser.parse_args(given)
    if not args.names and not (args.list or args.tables):
        parser.error(f"name what to measure: {', '.join(names())}")
    if args.result == RESULTS:
        for field in GIVEN:
            if getattr(args, field):
                parser.error(f"--{field} needs --result FOLDER: what it gives is no result of the cells")
    return args


def spec_of(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """What is known of a model, with what the user gave in its place."""
    spec = grid.models()[name]
    if args.model:
        spec["path"] = args.model
    for part in ("calibration", "evaluation"):
        if path := getattr(args, part):
            spec[part] = {"file": str(path.absolute())}
    return spec


def measure(cells: Iterable[Cell], spec: Mapping[str, Any], results: Path) -> None:
    """Measure cells of one kind, model and set of options; of a method that fails, its error is the result."""
    from optimum_pgsvd import CalibrationError

    case = None
    for cell in cells:
        kind = kind_of(cell.kind)
        case = case or kind.load(spec, cell.options)
        start = time.perf_counter()
        try:
            values = kind.measure(case, cell)
        except CalibrationError as error:  # as SVD-LLM on a singular Gram matrix: a result, and worth knowing
            values = {"failed": str(error)}
        path = write_result(cell, values, results)
        outcome = "  failed" if "failed" in values else ""
        print(f"{path.relative_to(results)}  {time.perf_counter() - start:.1f} s{outcome}", flush=True)


def missing(name: str, args: argparse.Namespace) -> list[Cell]:
    """The cells of a file that the user wants and that have no result."""
    wanted = chosen(
        read_grid(name), model=args.model_names, method=args.methods, reduction=args.reductions, seed=args.seeds
    )
    given = {field: value for field in GIVEN if (value := getattr(args, field))}
    for field in {"calibration", "evaluation"} & given.keys():
        given[field] = str(given[field].absolute())
    wanted = [replace(cell, options={**cell.options, **given}) for cell in wanted]
    return [cell for cell in wanted if result_of(cell, args.result) is None]


def check_choice(args: argparse.Namespace) -> None:
    """Raise `ValueError` for a choice that no cell of the files fits."""
    cells = [cell for name in args.names for cell in read_grid(name)]
    choices = {"model": args.model_names, "method": args.methods, "reduction": args.reductions, "seed": args.seeds}
    for axis, values in choices.items():
        there = dict.fromkeys(getattr(cell, axis) for cell in cells)
        if unknown := [str(value) for value in values or () if value not in there]:
            raise ValueError(f"--{axis}s {' '.join(unknown)}: the cells have {', '.join(map(str, there))}")
    check_given(cells, args)


def check_given(cells: Sequence[Cell], args: argparse.Namespace) -> None:
    """Raise `ValueError` where what the user gave would not be used, or be used for several models."""
    for cell in cells:
        taken = kind_of(cell.kind).given(cell.options)
        for field in GIVEN:
            if getattr(args, field) and field not in taken:
                wanted = ", ".join(f"--{name}" for name in GIVEN if name in taken)
                raise ValueError(f"--{field}: {cell.grid} has no use for it; what it takes is {wanted}")
    models = dict.fromkeys(cell.model for cell in cells if not args.model_names or cell.model in args.model_names)
    if args.model and len(models) > 1:
        raise ValueError(f"--model takes the place of one model: name it by --models, one of {', '.join(models)}")


def run(name: str, args: argparse.Namespace) -> None:
    """Measure what is missing of a file; what cannot be measured here is said and passed over."""
    from optimum_pgsvd.errors import PGSVDError

    def together(cell: Cell) -> tuple[str, str, str]:
        return cell.kind, cell.model, repr(cell.options)

    if not (left := missing(name, args)):
        print(f"{name}: all that is asked for is measured already")
    todo = sorted(left, key=lambda cell: list(map(str, together(cell))))
    for (_, model, _), cells in groupby(todo, together):
        try:
            measure(cells, spec_of(model, args), args.result)
        except (Unavailable, PGSVDError, OSError) as error:  # OSError: of the Hub, where that is out of reach
            print(f"{name}: {model} is not measured: {error}", file=sys.stderr)


def overview(results: Path) -> str:
    """Every file of cells, and how many of its cells are measured."""
    lines = []
    for name in names():
        cells = read_grid(name)
        done = sum(result_of(cell, results) is not None for cell in cells)
        models = ", ".join(dict.fromkeys(cell.model for cell in cells))
        lines.append(f"{name:<36} {done:>4} of {len(cells):>4} measured   {models}")
    return "\n".join(lines)


def main(given: list[str] | None = None) -> None:
    args = arguments(given)
    try:
        if args.list:
            print(overview(args.result))
            return
        check_choice(args)  # what is not there stops before the work
    except ValueError as error:
        raise SystemExit(str(error)) from None
    for name in args.names:
        if not args.tables:
            run(name, args)
    if args.result == RESULTS:
        from documents import write_documents

        write_documents()
    if not args.tables and any(missing(name, args) for name in args.names):
        raise SystemExit(1)  # why was said above


if __name__ == "__main__":
    main()
