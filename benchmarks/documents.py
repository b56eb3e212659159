"""The tables and plots of the documents, made of the JSON results of run.py and of nothing else."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import claims
import grid
import plots
from cells import fill
from grid import DENSE, ROOT, methods, names, read_results, read_yaml


Result = Mapping[str, Any]
Values = Callable[[Result], float]


def label(method: str) -> str:
    return methods()[method]["label"]


def of(results: Iterable[Result], **key: Any) -> list[Result]:
    """The results that have these values."""
    return [result for result in results if key.items() <= result.items()]


def distinct(results: Iterable[Result], field: str) -> list[Any]:
    """What there is of a field, in the order of the results."""
    return list(dict.fromkeys(result[field] for result in results))


def mean_and_spread(values: Sequence[float], form: str = ".4g") -> str:
    """The mean, and half the range of several; nothing of none."""
    if not values:
        return ""
    half = (max(values) - min(values)) / 2
    return format(statistics.mean(values), form) + (f" ± {half:.2g}" if len(values) > 1 and half else "")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, all columns but the first on the right."""
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def entry(results: Sequence[Result], value: Values, form: str) -> str:
    """The mean of what was measured, and how often there was nothing to measure."""
    values = [value(result) for result in results if "failed" not in result]
    failed = len(results) - len(values)
    note = f"fails ({failed} of {len(results)})" if failed else ""
    return " ".join(filter(None, (mean_and_spread(values, form), note)))


def by_reduction(results: Sequence[Result], value: Values, form: str = ".4g", only: Sequence[float] = ()) -> str:
    """A row a method, a column a reduction; means over the seeds."""
    reductions = only or sorted({result["reduction"] for result in results} - {0.0})
    dense = mean_and_spread([value(result) for result in of(results, method=DENSE)], form)
    rows = [["dense", *[dense] * len(reductions)]] if dense else []
    for method in distinct(results, "method"):
        found = [of(results, method=method, reduction=part) for part in reductions]
        if method != DENSE and any(found):
            rows.append([label(method), *(entry(each, value, form) for each in found)])
    return table(["", *(f"{part:.0%} removed" for part in reductions)], rows)


def order(results: Sequence[Result]) -> list[Result]:
    """The results of methods in the order of methods.yaml."""
    places = {name: place for place, name in enumerate(methods())}
    return sorted(results, key=lambda result: places[result["method"]])


def perplexity_of(result: Result) -> float:
    return result["perplexity"]


def perplexity(results: Sequence[Result]) -> str:
    """A table for each model."""
    parts = []
    for model in distinct(results, "model"):
        own = order(of(results, model=model))
        tokens = next(result["evaluation_tokens"] for result in own if "failed" not in result)
        note = f"{tokens:,} evaluation tokens; {calibrated_on(own)}."
        parts.append(f"### {grid.models()[model]['label']}\n\n{by_reduction(own, perplexity_of)}\n\n{note}")
    return "\n\n".join(parts)


def calibrated_on(results: Sequence[Result]) -> str:
    """How many tokens methods are calibrated on that use any, and which of them on another number."""
    read = [(label(result["method"]), tokens) for result in results if (tokens := result.get("calibration_tokens"))]
    if not read:
        return "nothing calibrated"
    usual = statistics.mode(tokens for _, tokens in read)
    others = [f"{name} on {tokens:,}" for name, tokens in dict.fromkeys(read) if tokens != usual]
    return "; ".join([f"calibrated on {usual:,}", *others])


def short_perplexity(results: Sequence[Result], model: str = "babyllama_tok361") -> str:
    """What the README shows."""
    shown = ("dense", "svd", "als", "eigh", "pgsvd_als", "pgsvd", "pgsvd_self")
    own = [result for result in order(of(results, model=model)) if result["method"] in shown]
    return by_reduction(own, perplexity_of, only=(0.2, 0.4, 0.6))


def accuracy(results: Sequence[Result]) -> str:
    """Accuracy in % by task, a table for each model; a row a method and reduction."""
    parts = []
    for model in distinct(results, "model"):
        own = order(of(results, model=model))
        tasks = list(next(result["accuracy"] for result in own if "failed" not in result))
        rows = []
        for result in own:
            name = label(result["method"]) + (f", {result['reduction']:.0%} removed" if result["reduction"] else "")
            if "failed" in result:
                rows.append([name, *["failed"] * (len(tasks) + (len(tasks) > 1))])
                continue
            found = [result["accuracy"][task] for task in tasks]
            shares = [f"{each['accuracy']:.1%} ± {each['standard_error']:.1%}" for each in found]
            mean = [f"{statistics.mean(each['accuracy'] for each in found):.1%}"] if len(tasks) > 1 else []
            rows.append([name, *shares, *mean])
        heads = [task.removeprefix("local_") for task in tasks] + (["mean"] if len(tasks) > 1 else [])
        parts.append(f"{table([grid.models()[model]['label'], *heads], rows)}")
    return "\n\n".join(parts)


def clip(results: Sequence[Result]) -> str:
    """Accuracy on every set by method, means over the seeds; the grid of budgets apart."""
    own = order(result for result in results if "vision" not in result["settings"])
    sets = list(own[0]["accuracy"])
    rows = []
    for reduction in sorted({result["reduction"] for result in own}):
        for method in distinct(own, "method"):
            if found := of(own, method=method, reduction=reduction):
                name = label(method) + (f", {reduction:.0%} removed" if reduction else "")
                shares = [mean_and_spread([100 * each["accuracy"][s] for each in found], ".1f") for s in sets]
                mean = mean_and_spread([100 * each["mean_accuracy"] for each in found], ".1f")
                rows.append([name, *shares, mean, mean_and_spread([each["loss"] for each in found], ".3f")])
    return table(["accuracy in %", *sets, "mean", "loss"], rows)


def clip_grid(results: Sequence[Result]) -> str:
    """What each share of the vision tower in the reduction gives; beside it one ε, and what the search found."""
    grid = [result for result in results if "vision" in result["settings"]]
    reductions = sorted({result["reduction"] for result in grid})
    named = {
        f"{share:g}": [result for result in grid if result["settings"]["vision"] == share]
        for share in sorted({result["settings"]["vision"] for result in grid})
    }
    for method in ("pgsvd", "pgsvd_towers"):
        seeds = {result["seed"] for result in grid}
        if found := [result for result in of(results, method=method) if result["seed"] in seeds]:
            named[f"{label(method)}: {' and '.join(vision_shares(found))}"] = found
    rows = []
    for name, found in named.items():
        cells = [of(found, reduction=reduction) for reduction in reductions]
        accuracies = [mean_and_spread([100 * each["mean_accuracy"] for each in cell], ".1f") for cell in cells]
        losses = [mean_and_spread([each["loss"] for each in cell], ".3f") for cell in cells]
        rows.append([name, *(number for pair in zip(accuracies, losses, strict=True) for number in pair)])
    heads = [head for r in reductions for head in (f"accuracy in %, {r:.0%} removed", "loss")]
    return table(["vision tower's reduction, of the whole's", *heads], rows)


def vision_shares(results: Sequence[Result]) -> list[str]:
    """The vision tower's reduction, of the whole's, by reduction: of the seeds the least and the most."""
    found: dict[float, list[float]] = {}
    for each in sorted(results, key=lambda result: result["reduction"]):
        share = each["towers"]["vision_model"]["parameter_reduction"] / each["reduction"]
        found.setdefault(each["reduction"], []).append(share)
    return [" to ".join(dict.fromkeys(f"{share:.2f}" for share in (min(s), max(s)))) for s in found.values()]


def compress_time(results: Sequence[Result]) -> str:
    """Seconds and their ratio to the first method, a column for each model and reduction."""
    compared = list(results[0]["ratio"])
    rows = [
        [label(name), *(f"{r['ratio'][name]:.2f} × ({statistics.median(r['seconds'][name]):.1f} s)" for r in results)]
        for name in compared
    ]
    return table(["", *(f"{r['model']}, {r['reduction']:.0%} removed" for r in results)], rows)


def speed(results: Sequence[Result]) -> str:
    """Speed-up by method and reduction; tokens a second in brackets."""
    rows = []
    for result in order(results):
        row = [f"{result['model']}, {label(result['method'])}, {result['reduction']:.0%} removed"]
        for phase in ("prompt", "generation"):
            rates = result[phase]["tokens_per_second"]
            row.append(f"{result[phase]['speed_up']:.2f} × ({rates['compressed']:,.0f} for {rates['dense']:,.0f})")
        rows.append(row)
    return table(["", "prompt", "generation"], rows)


def paper_cells() -> str:
    """The paper's numbers, and ours beside them where there are any."""
    rows = []
    for name in names():
        if not name.startswith("paper/"):
            continue
        spec = read_yaml(ROOT / "benchmarks" / "cells" / f"{name}.yaml")
        measured = {result["method"]: result for result in read_results(name)}
        for method, reported in spec["paper"].items():
            theirs = ", ".join(f"{what} {number:.2f}" for what, number in reported.items())
            rows.append([f"`{name}`", label(method), theirs, paper_like(measured.get(method))])
    return table(["cell", "method", "the paper's", "ours"], rows)


def paper_like(result: Result | None) -> str:
    """A result in the paper's measures; nothing where there is none."""
    if result is None:
        return "not run"
    if "mean_accuracy" in result:
        return f"accuracy {100 * result['mean_accuracy']:.2f}"
    mean = 100 * statistics.mean(task["accuracy"] for task in result["accuracy"].values())
    return f"perplexity {result['perplexity']:.2f}, accuracy {mean:.2f}"


TABLES: dict[str, Callable[[Sequence[Result]], str]] = {
    "perplexity": perplexity,
    "accuracy": accuracy,
    "blimp": accuracy,
    "clip": clip,
    "compress_time": compress_time,
    "speed": speed,
}


def write_documents() -> None:
    """Fill the marked places of docs/results.md and README.md, and draw the plots."""
    for name, make in TABLES.items():
        if results := read_results(name):
            fill(name, make(results))
    if results := read_results("perplexity"):
        fill("perplexity:babyllama_tok361", short_perplexity(results), ROOT / "README.md")
    if any("vision" in result["settings"] for result in read_results("clip")):
        fill("clip-grid", clip_grid(read_results("clip")))
    fill("paper-cells", paper_cells())
    fill("claims", claims.table())
    plots.draw(ROOT / "docs" / "plots")
