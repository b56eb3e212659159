"""`optimum-cli pgsvd`: compress, measure, plan and inspect, and the paper's theory."""

from __future__ import annotations

import json
import os
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from .arguments import (
    Command,
    add_calibration_arguments,
    add_model_arguments,
    add_output_arguments,
    add_source_arguments,
    config_of,
    load_model,
)
from .theory import THEORY


class CompressCommand(Command):
    """`optimum-cli pgsvd compress`."""

    COMMAND = CommandInfo(name="compress", help="Compress a model and save it.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the arguments."""
        add_model_arguments(parser)
        add_calibration_arguments(parser)
        add_output_arguments(parser, "compressed model")
        parser.add_argument(
            "--stream",
            action=BooleanOptionalAction,
            default=None,
            help="hold one block of the model in memory at a time, and go on after an interruption (default: where "
            "the model would not fit, or with several processes)",
        )
        parser.add_argument("--max-shard-size", default="5GB", help="size of the largest weight file (default 5GB)")
        parser.add_argument(
            "--self-contained", action="store_true", help="ship the loading code, for trust_remote_code=True"
        )
        parser.add_argument(
            "--elastic", action="store_true", help="keep what it takes to cut the checkpoint further, without data"
        )
        parser.add_argument("--push-to-hub", metavar="USER/NAME", help="also push the compressed model to the Hub")
        parser.add_argument("--private", action="store_true", help="make the pushed repository private")

    def work(self, args: Any) -> None:
        """Compress, save, and push if asked to."""
        from ..hub import destination, upload
        from ..saving import written_when

        config = config_of(args)
        to = destination(args.push_to_hub, private=args.private or None) if args.push_to_hub else None
        is_main = joined_peers().is_main
        if wants_stream(args, config):
            self.streamed(args, config, is_main)
            model: Any = load_compressed(args.output) if to is not None and is_main else None
        else:
            model = self.in_memory(args, config, is_main)
        if is_main:
            print(f"saved in {args.output}")
        if to is not None and is_main:
            upload(model, args.output, written_when(args.output), to)
            print(f"pushed to {args.push_to_hub}")
        leave_peers()

    def in_memory(self, args: Any, config: Any, is_main: bool) -> Any:
        """Compress while the model loads; the model."""
        from contextlib import nullcontext

        from ..checkpoint import new_folder

        with new_folder(args.output, args.overwrite) if is_main else nullcontext("") as folder:
            model = load_model(args, config)
            if is_main:
                model.save_pretrained(folder, max_shard_size=args.max_shard_size)
                print(model.pgsvd_report)
        return model

    def streamed(self, args: Any, config: Any, is_main: bool) -> None:
        """Compress block by block."""
        from ..compressor import PGSVDCompressor

        report = PGSVDCompressor(config).compress_checkpoint(
            args.model, args.output, max_shard_size=args.max_shard_size, **run_options(args)
        )
        if is_main:
            print(report)


class MeasureCommand(Command):
    """`optimum-cli pgsvd measure`."""

    COMMAND = CommandInfo(name="measure", help="Measure a model once, to plan and compress it by any budget later.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the arguments."""
        add_source_arguments(parser)
        parser.add_argument("--modules-to-not-convert", nargs="*", default=None, help="names or globs that stay dense")
        add_calibration_arguments(parser)
        add_output_arguments(parser, "measurements")

    def work(self, args: Any) -> None:
        """Measure, with one block of the model in memory at a time."""
        from ..compressor import PGSVDCompressor

        peers = joined_peers()
        # a budget has no effect on what is measured
        config = config_of(args, tolerance=0.0)
        measurements = PGSVDCompressor(config).measure_checkpoint(args.model, args.output, **run_options(args))
        if peers.is_main:
            print(f"{len(measurements.layers)} layers measured; use --dataset {args.output}")
        leave_peers()


def run_options(args: Namespace) -> dict[str, Any]:
    """The arguments of a run with one block in memory."""
    return {
        "resume": args.resume,
        "overwrite": args.overwrite,
        "revision": args.revision,
        "dtype": args.dtype,
        "trust_remote_code": args.trust_remote_code,
    }


def joined_peers() -> Any:
    """The processes that `torchrun` or `accelerate launch` started, joined into a group."""
    import torch
    from accelerate import PartialState

    from ..distributed import Peers

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        PartialState(cpu=not torch.cuda.is_available())
    return Peers()


def leave_peers() -> None:
    """Wait for the processes that `joined_peers` joined, and part from them; one that just ends would abort others."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def wants_stream(args: Namespace, config: Any) -> bool:
    """Whether to hold one block in memory at a time: as asked, else where the model would not fit."""
    from ..checkpoint import stored_bytes
    from ..report import available_memory

    if args.stream is not None:
        return args.stream
    if config.dataset == "self" or config.needs_gradients:
        return False
    hub = {"revision": args.revision} if args.revision else {}
    # half as much again: factors beside their weights, activations, Gram matrices
    return joined_peers().size > 1 or 1.5 * stored_bytes(args.model, **hub) > available_memory()


def load_compressed(folder: str) -> Any:
    """A compressed model, as the class its checkpoint names."""
    from ..compressor import model_class

    return model_class(folder).from_pretrained(folder)


class PlanCommand(Command):
    """`optimum-cli pgsvd plan`."""

    COMMAND = CommandInfo(name="plan", help="Show the ranks and sizes a budget gives, without compressing.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the arguments."""
        add_model_arguments(parser)
        parser.add_argument("--dataset", help="folder of `pgsvd measure`: plan from what was measured, in seconds")
        parser.add_argument("--json", metavar="FILE", help="also write the plan as JSON")

    def work(self, args: Any) -> None:
        """Load the dense model, or its outline where its weights were measured before, and print the plan."""
        from ..checkpoint import make_folder
        from ..compressor import PGSVDCompressor

        compressor = PGSVDCompressor(config_of(args))
        if args.json:
            make_folder(os.path.dirname(os.path.abspath(args.json)))
        options = {"revision": args.revision, "dtype": args.dtype, "trust_remote_code": args.trust_remote_code}
        report = compressor.plan_checkpoint(args.model, **options)
        if args.json:
            with open(args.json, "w", encoding="utf-8") as file:
                json.dump(report.to_dict(), file, indent=2)
        print(report)


class InspectCommand(Command):
    """`optimum-cli pgsvd inspect`."""

    COMMAND = CommandInfo(name="inspect", help="Show what a compressed checkpoint holds, without loading it.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the arguments."""
        parser.add_argument("source", help="folder or Hub name of a compressed model")
        parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub")

    def work(self, args: Any) -> None:
        """Print the ranks in the checkpoint and, where it has one, its report."""
        from ..checkpoint import read_contents

        contents = read_contents(args.source, **({"revision": args.revision} if args.revision else {}))
        if contents.report is not None:
            print(contents.report)
        else:
            for name, (out_features, rank, in_features) in contents.factors.items():
                print(f"{name}: {out_features} × {in_features}, rank {rank}")
        if contents.config.elastic:
            print("elastic: from_pretrained(..., quantization_config=PGSVDConfig(...)) cuts it further, without data")
        dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in contents.dtypes.items() if count)
        layers = f"{len(contents.factors)} low-rank layers, stored as {contents.config.storage}"
        print(f"{layers}; {contents.parameters:,} parameters in the files: {dtypes}")


class PGSVDCommand(BaseOptimumCLICommand):
    """`optimum-cli pgsvd`."""

    COMMAND = CommandInfo(name="pgsvd", help="Activation-aware low-rank compression (PGSVD).")
    SUBCOMMANDS = (
        CommandInfo(name="compress", help=CompressCommand.COMMAND.help, subcommand_class=CompressCommand),
        CommandInfo(name="measure", help=MeasureCommand.COMMAND.help, subcommand_class=MeasureCommand),
        CommandInfo(name="plan", help=PlanCommand.COMMAND.help, subcommand_class=PlanCommand),
        CommandInfo(name="inspect", help=InspectCommand.COMMAND.help, subcommand_class=InspectCommand),
        *THEORY,
    )
