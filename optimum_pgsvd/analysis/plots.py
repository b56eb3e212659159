"""Plots of the results, as PNG files. Needs matplotlib: `pip install 'optimum-pgsvd[plots]'`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from ..errors import ConfigError
from .bound import Bounds
from .convergence import Convergence
from .envelopes import Envelopes
from .profiles import Profiles
from .sweep import Point, Sweep


TITLES = {"weights": "weights: W (Definition 1)", "outputs": "outputs: $W G^{1/2}$"}
DPI = 150


def require_matplotlib() -> None:
    """Raise `ConfigError` where nothing can be drawn."""
    if find_spec("matplotlib") is None:
        raise ConfigError("plots need matplotlib: pip install 'optimum-pgsvd[plots]', or pass --no-plots")


def figure(rows: int, columns: int) -> tuple[Any, Any]:
    """A figure that belongs to no window, and its axes `(rows, columns)`."""
    require_matplotlib()
    from matplotlib.figure import Figure

    made = Figure(figsize=(5.4 * columns, 4.0 * rows), layout="constrained")
    axes = made.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    return made, axes


def draw_profiles(profiles: Profiles, path: str) -> None:
    """The profiles of all layers with their envelopes, and the share of layers within any distance of these."""
    made, axes = figure(2, len(profiles.envelopes))
    for column, (kind, envelopes) in enumerate(profiles.envelopes.items()):
        draw_curves(axes[0, column], envelopes)
        axes[0, column].set(title=TITLES[kind], xlabel="rank / full rank", ylabel="relative error e")
        for label, distances in (("its own", envelopes.own_gaps), ("the common", envelopes.distances)):
            ordered = sorted(distances.values())
            shares = [(place + 1) / len(ordered) for place in range(len(ordered))]
            axes[1, column].step([0.0, *ordered], [0.0, *shares], where="post", label=f"{label} convex envelope")
        axes[1, column].set(xlabel="distance from the envelope, at most", ylabel="share of layers", ylim=(0, 1.02))
        axes[1, column].legend()
    made.savefig(path, dpi=DPI)


def draw_curves(axis: Any, envelopes: Envelopes) -> None:
    """The profiles of all layers, coloured by their kind, with their envelopes."""
    kinds = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in envelopes.curves))
    for name, curve in envelopes.curves.items():
        color = f"C{kinds.index(name.rsplit('.', 1)[-1]) % 10}"
        axis.plot(envelopes.axis, curve, color=color, alpha=0.35, linewidth=0.8)
    for place, kind in enumerate(kinds[:10]):
        axis.plot([], [], color=f"C{place}", label=kind)
    for label, curve, style in (
        ("lower and upper", envelopes.lower, "k--"),
        (None, envelopes.upper, "k--"),
        ("common", envelopes.common, "k-"),
    ):
        axis.plot(envelopes.axis, curve, style, linewidth=1.6, label=label)
    axis.legend(fontsize="small")


def draw_sweep(sweep: Sweep, path: str) -> None:
    """Parameters against the errors, and against perplexity where it was measured."""
    panels: list[tuple[str, Any]] = [("mean relative error e(r)", lambda point: point.surrogate / sweep.targets)]
    if all(point.activation_error is not None for point in sweep.points):
        panels.append(("mean activation error", lambda point: point.activation_error))
    if sweep.dense.perplexity is not None:
        panels.append(("perplexity on the evaluation set", lambda point: point.perplexity))
    made, axes = figure(1, len(panels))
    for axis, (label, value) in zip(axes[0], panels, strict=True):
        for allocation in dict.fromkeys(point.allocation for point in sweep.points):
            axis.plot(*front(sweep.points, allocation, value), marker="o", markersize=4, label=allocation)
        axis.set(xlabel="parameters of the targets removed, %", ylabel=label)
        axis.legend()
    if sweep.dense.perplexity is not None:
        axes[0, -1].axhline(sweep.dense.perplexity, color="k", linestyle=":", linewidth=1, label="dense")
        axes[0, -1].legend()
        axes[0, -1].set_yscale("log")
        axes[0, -1].yaxis.set_major_formatter("{x:g}")
        axes[0, -1].yaxis.set_minor_formatter("{x:g}")
    made.savefig(path, dpi=DPI)


def front(points: Sequence[Point], allocation: str, value: Any) -> tuple[list[float], list[float]]:
    """The points of an allocation in the order of their size."""
    found = sorted((point for point in points if point.allocation == allocation), key=lambda p: p.parameter_reduction)
    return [100 * point.parameter_reduction for point in found], [value(point) for point in found]


def draw_bounds(bounds: Bounds, path: str) -> None:
    """Per layer, the bound and the first order against the true change of the loss; and the sensitivities."""
    made, axes = figure(1, len(bounds.bounds) + 1)
    for axis, bound in zip(axes[0], bounds.bounds, strict=False):
        layers = [layer for layer in bound.layers if layer.change]
        changes = [abs(layer.change or 0.0) for layer in layers]
        for label, values, marker in (
            ("bound", [layer.bound for layer in layers], "o"),
            ("first order, size", [abs(layer.first_order) for layer in layers], "x"),
        ):
            axis.scatter(changes, values, marker=marker, s=18, label=label)
        if changes:
            axis.axline((max(changes), max(changes)), slope=1, color="k", linestyle=":", linewidth=1, label="equal")
            axis.set(xscale="log", yscale="log")
        axis.set(xlabel="|change of the loss|, one layer alone", title=f"{bound.parameter_reduction:.0%} removed")
        axis.set(ylabel="what theory says of it")
        axis.legend()
    alphas = sorted(bounds.sensitivities.alphas.values(), reverse=True)
    axes[0, -1].bar(range(len(alphas)), alphas)
    axes[0, -1].set(title="measured sensitivities", xlabel="layer, most sensitive first", ylabel="α = α′ ‖X‖ ‖W‖")
    made.savefig(path, dpi=DPI)


def draw_convergence(convergence: Convergence, path: str) -> None:
    """The objective's excess over its optimum after every sweep."""
    made, axes = figure(1, 1)
    axis = axes[0, 0]
    for place, layer in enumerate(convergence.layers):
        label = None if place else "each layer"
        axis.plot([value - 1 for value in layer.objectives], color="0.7", linewidth=0.7, label=label)
    for label, curve, color in (("median", convergence.medians, "C0"), ("worst", convergence.worst, "C3")):
        axis.plot([value - 1 for value in curve], color=color, linewidth=2, label=label)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set(yscale="log", xlabel="sweeps", ylabel="objective / closed-form optimum − 1")
    axis.legend()
    made.savefig(path, dpi=DPI)
