"""`optimum-cli pgsvd profile | sweep | bound | convergence`: the paper's theory, measured on a model."""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from optimum.commands.base import CommandInfo

from .arguments import (
    Command,
    add_allocation_arguments,
    add_budget_arguments,
    add_calibration_arguments,
    add_data_arguments,
    add_layer_arguments,
    add_skipping_argument,
    add_source_arguments,
    config_of,
    load_model,
)


def add_result_arguments(parser: ArgumentParser, name: str) -> None:
    """Where the result goes."""
    parser.add_argument("-o", "--output", required=True, help=f"folder for {name}.json and {name}.png")
    parser.add_argument("--overwrite", action="store_true", help="replace a result that is there")
    parser.add_argument("--no-plots", action="store_true", help="write the JSON only; needs no matplotlib")


def add_reductions(parser: ArgumentParser, default: Sequence[float]) -> None:
    """At which sizes."""
    shown = " ".join(map(str, default))
    parser.add_argument(
        "--reductions",
        type=float,
        nargs="+",
        default=None,
        metavar="R",
        help=f"fractions of the targets' parameters removed (default {shown})",
    )


def add_evaluation_arguments(parser: ArgumentParser) -> None:
    """What to measure the loss on."""
    parser.add_argument("--evaluate", metavar="DATASET", help="another text, to measure the loss on; as --dataset")
    parser.add_argument("--evaluation-samples", type=int, default=128, help="sequences of it, at most (default 128)")


class Result:
    """Where a result goes, asked for before any work is done.

    Args:
        args: of the command.
        name: of the files.
    """

    def __init__(self, args: Namespace, name: str):
        from ..analysis.plots import require_matplotlib
        from ..analysis.results import free_files

        if not args.no_plots:
            require_matplotlib()
        endings = ["json"] if args.no_plots else ["json", "png"]
        self.paths = free_files(args.output, [f"{name}.{ending}" for ending in endings], args.overwrite)

    def write(self, values: dict[str, Any], draw: Callable[[str], None]) -> None:
        """Write what came of the work, and say where."""
        from ..analysis.results import write_json

        write_json(self.paths[0], values)
        for path in self.paths[1:]:
            draw(path)
        print(f"written: {', '.join(self.paths)}")


def evaluation_of(args: Namespace, model: Any, config: Any) -> Sequence[Any]:
    """The batches of `--evaluate`, none where it was not given."""
    from ..analysis import evaluation_set

    return evaluation_set(model, config, args.evaluate, args.evaluation_samples) if args.evaluate else ()


def show(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*headings)
    for row in rows:
        table.add_row(*(number(value) for value in row))
    Console(width=200).print(table)


def number(value: Any) -> str:
    """A cell of a table."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def check_requests(config: Any, reductions: Sequence[float] = (), allocations: Sequence[str] = ()) -> None:
    """Find what is wrong with what is asked for before a model is loaded."""
    from ..factoring import request_at

    config.require_dataset()
    for allocation in allocations or [config.allocation]:
        for reduction in reductions:
            request_at(config, allocation=allocation, parameter_reduction=reduction)


class ProfileCommand(Command):
    """`optimum-cli pgsvd profile`."""

    COMMAND = CommandInfo(name="profile", help="Singular value profiles, and how convex and alike the layers are.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the arguments."""
        add_source_arguments(parser)
        add_skipping_argument(parser.add_argument_group("layers", argument_default=SUPPRESS))
        add_data_arguments(parser)
        parser.add_argument(
            "--thresholds",
            type=float,
            nargs="+",
            metavar="T",
            help="distances from an envelope that count as close (default 0.01 0.02 0.05 0.1 0.2)",
        )
        add_result_arguments(parser, "profile")

    def work(self, args: Any) -> None:
        """Measure, and print the shares."""
        from ..analysis import plots, profile_model
        from ..analysis.profiles import THRESHOLDS

        result, config = Result(args, "profile"), config_of(args, tolerance=0.0)
        profiles = profile_model(load_model(args), config)
        values = profiles.to_dict(args.thresholds or THRESHOLDS)
        for kind in profiles.envelopes:
            shares = values[kind]["share_of_layers_within"]
            print(f"{kind}: {len(values[kind]['layers'])} layers in a band {values[kind]['width']:.3f} wide")
            rows = [[f"close to {name}", *map(percent, found.values())] for name, found in shares.items()]
            show(["share of layers within", *next(iter(shares.values()))], rows)
        result.write(values, lambda path: plots.draw_profiles(profiles, path))


class SweepCommand(Command):
    """`optimum-cli pgsvd sweep`."""

    COMMAND = CommandInfo(name="sweep", help="Parameters against error and perplexity, from one calibration.")
    REDUCTIONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the arguments."""
        add_source_arguments(parser)
        add_reductions(parser, SweepCommand.REDUCTIONS)
        parser.add_argument(
            "--tolerances", type=float, nargs="+", default=[], metavar="E", help="ε of pareto, instead of reductions"
        )
        parser.add_argument(
            "--allocations", nargs="+", default=["pareto", "uniform"], help="by name (default pareto uniform)"
        )
        add_layer_arguments(parser.add_argument_group("layers", argument_default=SUPPRESS))
        add_calibration_arguments(parser)
        add_evaluation_arguments(parser)
        add_result_arguments(parser, "sweep")

    def work(self, args: Any) -> None:
        """Sweep, and print the points."""
        from ..analysis import plots, sweep_model

        result, config = Result(args, "sweep"), config_of(args, parameter_reduction=0.0)
        reductions = args.reductions or ([] if args.tolerances else self.REDUCTIONS)
        check_requests(config, reductions, args.allocations)
        model = load_model(args)
        found = sweep_model(
            model,
            config,
            reductions=reductions,
            tolerances=args.tolerances,
            allocations=args.allocations,
            evaluation=evaluation_of(args, model, config),
        )
        headings = [
            "allocation",
            "removed",
            "ε",
            "parameters",
            "Σ e",
            "largest e",
            "output error",
            "loss",
            "exp(loss)",
        ]
        rows = [
            (
                point.allocation, percent(point.parameter_reduction), point.tolerance, point.parameters,
                point.surrogate, point.largest_error, point.activation_error, point.loss, point.perplexity,
            )
            for point in (found.dense, *found.points)
        ]  # fmt: skip
        show(headings, rows)
        result.write(found.to_dict(), lambda path: plots.draw_sweep(found, path))


class BoundCommand(Command):
    """`optimum-cli pgsvd bound`."""

    COMMAND = CommandInfo(name="bound", help="Theorem 1 against the true change of the loss, and the α it is made of.")
    REDUCTIONS = (0.1, 0.2, 0.4)

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the arguments."""
        add_source_arguments(parser)
        add_reductions(parser, BoundCommand.REDUCTIONS)
        parser.add_argument(
            "--no-alone", action="store_true", help="leave out the change of the loss with each layer compressed alone"
        )
        add_layer_arguments(add_allocation_arguments(parser))
        add_calibration_arguments(parser)
        add_evaluation_arguments(parser)
        add_result_arguments(parser, "bound")

    def work(self, args: Any) -> None:
        """Measure, and print totals, spread and allocations."""
        from ..analysis import bound_model, plots

        result, config = Result(args, "bound"), config_of(args, parameter_reduction=0.0)
        reductions = args.reductions or self.REDUCTIONS
        check_requests(config, reductions)
        model = load_model(args)
        found = bound_model(
            model,
            config,
            reductions,
            alone=not args.no_alone,
            evaluation=evaluation_of(args, model, config),
        )
        values = found.to_dict()
        print(f"loss of the dense model on the calibration set: {found.loss:.4f}")
        totals = [{"removed": percent(each["parameter_reduction"]), **each["total"]} for each in values["bounds"]]
        show([key.replace("_", " ") for key in totals[0]], [[*total.values()] for total in totals])
        orders = [each["rank_correlation_with_change"] for each in values["bounds"]]
        if all(orders):
            print("rank correlation, over the layers, of each one's change of the loss alone with")
            rows = [(total["removed"], *order.values()) for total, order in zip(totals, orders, strict=True)]
            show(["removed", *(key.replace("_", " ") for key in orders[0])], rows)
        print("measured sensitivities α: " + ", ".join(
            f"{key.replace('_', ' ')} {value:.3g}" for key, value in values["sensitivities"]["spread"].items()
        ))  # fmt: skip
        show(
            ["removed", "ranks by", "Σ e", "Σ α e", "change of the loss", "loss on the evaluation set"],
            [
                (percent(each.parameter_reduction), name, plan.equal, plan.measured, plan.change, plan.evaluation_loss)
                for each in found.allocated
                for name, plan in each.plans.items()
            ],
        )
        result.write(values, lambda path: plots.draw_bounds(found, path))


class ConvergenceCommand(Command):
    """`optimum-cli pgsvd convergence`."""

    COMMAND = CommandInfo(name="convergence", help="The objective of ALS after each sweep against its optimum.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the arguments."""
        add_source_arguments(parser)
        add_budget_arguments(parser)
        parser.add_argument("--sweeps", type=int, default=20, help="of ALS (default 20)")
        add_layer_arguments(add_allocation_arguments(parser))
        add_data_arguments(parser)
        add_result_arguments(parser, "convergence")

    def work(self, args: Any) -> None:
        """Run ALS on every layer, and print how near it comes."""
        from ..analysis import converge_model, plots

        result, config = Result(args, "convergence"), config_of(args)
        check_requests(config)
        found = converge_model(load_model(args), config, args.sweeps)
        print(f"objective relative to the closed form, {len(found.layers)} layers")
        rows = zip(range(args.sweeps + 1), found.medians, found.worst, strict=True)
        show(["sweeps", "median", "worst"], [(sweep, f"{m:.5f}", f"{w:.5f}") for sweep, m, w in rows])
        values = found.to_dict()
        for name, sweeps in values["sweeps_until"].items():
            print(f"{name}: {'not reached' if sweeps is None else f'after sweep {sweeps}'}")
        result.write(values, lambda path: plots.draw_convergence(found, path))


def percent(share: float) -> str:
    """A share as text."""
    return f"{share:.1%}"


THEORY = tuple(
    CommandInfo(name=command.COMMAND.name, help=command.COMMAND.help, subcommand_class=command)
    for command in (ProfileCommand, SweepCommand, BoundCommand, ConvergenceCommand)
)
