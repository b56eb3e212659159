"""The plots of docs/results.md, from the JSON results."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grid import DENSE, methods, read_results


Result = Mapping[str, Any]
SHOWN = ("svd", "svd_llm", "als", "pgsvd_als", "best")


def draw(folder: Path) -> None:
    """Every plot that there are results for, as SVG; the same results give the same bytes."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "pgsvd", "font.size": 8, "axes.spines.top": False,
                                "axes.spines.right": False, "legend.frameon": False})  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    if results := read_results("perplexity"):
        save(perplexity(results), folder / "perplexity.svg")
    if grid := [result for result in read_results("clip") if "vision" in result["settings"]]:
        save(towers(grid, read_results("clip")), folder / "clip_towers.svg")


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None, "Creator": None}, bbox_inches="tight")


def axes(count: int, width: float = 2.6, height: float = 2.3, rows: int = 1) -> tuple[Any, list[Any]]:
    """A figure with plots side by side, in rows of as many."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count, height * rows + 0.3), layout="constrained")
    return figure, list(figure.subplots(rows, count, squeeze=False).flat)


def mean_by(results: Sequence[Result], x: Any, y: Any) -> tuple[list[float], list[float]]:
    """Means of `y` over the results of one `x`, in its order."""
    found: dict[float, list[float]] = {}
    for result in results:
        found.setdefault(x(result), []).append(y(result))
    return sorted(found), [statistics.mean(found[place]) for place in sorted(found)]


def perplexity(results: Sequence[Result]) -> Any:
    """Perplexity over the dense model's against what was removed, a plot a model."""
    names = list(dict.fromkeys(result["model"] for result in results))
    figure, plots = axes(len(names))
    for plot, model in zip(plots, names, strict=True):
        own = [result for result in results if result["model"] == model]
        dense = next(result["perplexity"] for result in own if result["method"] == DENSE)
        for method in SHOWN:
            found = [result for result in own if result["method"] == method and "failed" not in result]
            x, y = mean_by(found, lambda r: 100 * r["reduction"], lambda r, dense=dense: r["perplexity"] / dense)
            plot.plot(x, y, marker=".", label=methods()[method]["label"])
        plot.set(title=model, xlabel="% of parameters removed", yscale="log")
    plots[0].set_ylabel("perplexity / dense")
    return with_legend(figure, plots[0])


def towers(grid: Sequence[Result], results: Sequence[Result]) -> Any:
    """Accuracy and loss against the vision tower's part in the reduction, means over seeds; other choices beside."""
    reductions = sorted({result["reduction"] for result in grid})
    measures = {"mean accuracy, %": accuracy, "contrastive loss": lambda result: result["loss"]}
    figure, plots = axes(len(reductions), 3.0, rows=len(measures))
    for plot, (name, measure), reduction in zip(
        plots, (m for m in measures.items() for _ in reductions), reductions * len(measures), strict=True
    ):
        own = [result for result in grid if result["reduction"] == reduction]
        plot.plot(*mean_by(own, lambda r: r["settings"]["vision"], measure), marker=".", label="PGSVD, two ε, by hand")
        for method, style in (("als", ":"), ("pgsvd", "--"), ("pgsvd_towers", "-")):
            found = [r for r in results if r["method"] == method and r["reduction"] == reduction]
            if beside := [measure(r) for r in found if r["seed"] in {each["seed"] for each in own}]:
                plot.axhline(statistics.mean(beside), color="gray", linestyle=style, label=methods()[method]["label"])
        plot.set(title=f"{reduction:.0%} removed", xlabel="vision tower's reduction / the whole's", ylabel=name)
    return with_legend(figure, plots[0])


def with_legend(figure: Any, plot: Any) -> Any:
    """A figure with the legend of one of its plots below all."""
    handles, labels = plot.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def accuracy(result: Result) -> float:
    return 100 * result["mean_accuracy"]
