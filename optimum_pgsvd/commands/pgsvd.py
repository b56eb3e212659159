"""`optimum-cli pgsvd`: compress, measure, plan and inspect."""

from __future__ import annotations

import json
import os
import sys
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction, Namespace
from inspect import signature
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


def add_source_arguments(parser: ArgumentParser) -> None:
    """Which model."""
    parser.add_argument("-m", "--model", required=True, help="folder or Hub name of the dense model")
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub")
    parser.add_argument("--dtype", default="auto", help="dtype to load the model in (default: the checkpoint's)")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run modelling code of the model's repository"
    )


def add_model_arguments(parser: ArgumentParser) -> None:
    """What to compress, and how far."""
    add_source_arguments(parser)
    budget = parser.add_argument_group("budget", "exactly one of")
    budget.add_argument(
        "--parameter-reduction", type=float, help="fraction of the targets' parameters removed, 0.2 = 20 %%"
    )
    budget.add_argument("--tolerance", type=float, help="relative error allowed in each layer, 0 to 1")
    budget.add_argument("--ranks", help="JSON file: rank by layer name or glob")
    how = parser.add_argument_group("allocation", argument_default=SUPPRESS)
    how.add_argument(
        "--best", action="store_true", help="the most accurate settings (PGSVDConfig.best) instead of the paper's"
    )
    how.add_argument("--allocation", help="pareto (PGSVD, default), loss or uniform")
    how.add_argument(
        "--group",
        nargs=2,
        action="append",
        default=[],
        metavar=("GLOB", "BUDGET"),
        help='a budget of its own for some layers, e.g. --group "*.mlp.*" tolerance=0.3; may be repeated',
    )
    how.add_argument("--storage", help="factors (default) or pivoted: fewer parameters per rank")
    how.add_argument("--modules-to-not-convert", nargs="*", help="names or globs that stay dense")
    how.add_argument("--rank-multiple", type=int, help="ranks are multiples of this (default 1)")


def add_calibration_arguments(parser: ArgumentParser) -> None:
    """What the factors are fitted on, and by which solver."""
    how = parser.add_argument_group("calibration", argument_default=SUPPRESS)
    how.add_argument(
        "--dataset",
        help=".txt, .jsonl or .parquet file, Hub dataset, folder of images with captions or of `pgsvd measure`, or "
        '"self"',
    )
    how.add_argument("--tokenizer", help="folder or Hub name (default: the model's)")
    how.add_argument("--calibration", help="parallel (the paper, default) or anchored")
    how.add_argument("--blend", type=float, help="of anchored calibration: 1 aims at the dense outputs")
    how.add_argument(
        "--refine-steps", type=int, help="AdamW steps on each block's factors (default 0; needs anchored)"
    )
    how.add_argument(
        "--correct-bias", action="store_true", help="let each layer's bias make up for the mean error of its outputs"
    )
    how.add_argument("--num-samples", type=int, help="calibration sequences (default 256)")
    how.add_argument(
        "--sequence-length", type=int, help="tokens in a sequence (default: the model's maximum, at most 2048)"
    )
    how.add_argument("--batch-size", type=int, help="sequences in a forward pass (default 8)")
    how.add_argument("--seed", type=int, help="of the choice of samples (default 0)")
    how.add_argument("--solver", help="eigh (closed form, default), als (the paper's) or svd (no data)")
    how.add_argument("--objective", help="outputs (the paper, default) or loss (weighs errors)")
    how.add_argument("--num-iterations", type=int, help="ALS sweeps (default 10)")


def add_output_arguments(parser: ArgumentParser, what: str) -> None:
    """Where to write, and what to do with what is there."""
    parser.add_argument("-o", "--output", required=True, help=f"folder for the {what}")
    parser.add_argument("--overwrite", action="store_true", help="replace an output folder that is not empty")
    parser.add_argument(
        "--resume",
        action=BooleanOptionalAction,
        default=True,
        help="take up what an interrupted run with one block in memory left beside the output (default: yes)",
    )


def config_of(args: Namespace, **fixed: Any) -> Any:
    """The `PGSVDConfig` that the arguments describe, with some fields fixed."""
    from ..config import PGSVDConfig

    fields = {name: getattr(args, name) for name in signature(PGSVDConfig).parameters if hasattr(args, name)}
    if fields.get("ranks"):
        with open(args.ranks, encoding="utf-8") as file:
            fields["ranks"] = json.load(file)
    settings = PGSVDConfig.best if getattr(args, "best", False) else PGSVDConfig
    return settings(**{**fields, "groups": groups_of(args), **fixed})


def groups_of(args: Namespace) -> dict[str, dict[str, float]]:
    """The budgets of `--group`."""
    from ..errors import ConfigError

    groups = {}
    for glob, budget in getattr(args, "group", ()):
        field, _, value = budget.partition("=")
        try:
            groups[glob] = {field: float(value)}
        except ValueError:
            raise ConfigError(f"--group {glob} {budget}: write tolerance=0.3 or parameter_reduction=0.2") from None
    return groups


def load_model(args: Namespace, config: Any = None) -> Any:
    """The model as the class its checkpoint names; compressed while it loads where a config is given."""
    from transformers import AutoModelForCausalLM

    from ..compressor import model_class

    options = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
    loader = AutoModelForCausalLM if args.trust_remote_code else model_class(args.model, **options)
    return loader.from_pretrained(args.model, dtype=args.dtype, quantization_config=config, **options)


class _Command(BaseOptimumCLICommand):
    """A command whose user errors are a message and exit status 2, not a traceback."""

    def run(self) -> None:
        """Run, and turn errors a user can act on into a message."""
        from ..errors import PGSVDError

        try:
            self.work(self.args)
        except (PGSVDError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    def work(self, args: Any) -> None:
        """What the command does."""
        raise NotImplementedError


class CompressCommand(_Command):
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


class MeasureCommand(_Command):
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
    if config.dataset == "self" or config.needs_curvature:
        return False
    hub = {"revision": args.revision} if args.revision else {}
    # half as much again: factors beside their weights, activations, Gram matrices
    return joined_peers().size > 1 or 1.5 * stored_bytes(args.model, **hub) > available_memory()


def load_compressed(folder: str) -> Any:
    """A compressed model, as the class its checkpoint names."""
    from ..compressor import model_class

    return model_class(folder).from_pretrained(folder)


class PlanCommand(_Command):
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
        from ..compressor import PGSVDCompressor

        compressor = PGSVDCompressor(config_of(args))
        options = {"revision": args.revision, "dtype": args.dtype, "trust_remote_code": args.trust_remote_code}
        report = compressor.plan_checkpoint(args.model, **options)
        if args.json:
            with open(args.json, "w", encoding="utf-8") as file:
                json.dump(report.to_dict(), file, indent=2)
        print(report)


class InspectCommand(_Command):
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
    )
