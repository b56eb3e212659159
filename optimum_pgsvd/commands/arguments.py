"""What the commands share: their arguments, what these describe, and how errors are told."""

from __future__ import annotations

import json
import sys
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction, Namespace
from inspect import signature
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand


DTYPES = ("auto", "float64", "float32", "bfloat16", "float16")


def add_source_arguments(parser: ArgumentParser) -> None:
    """Which model."""
    parser.add_argument("-m", "--model", required=True, help="folder or Hub name of the dense model")
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="to load the model in (default: its own)")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run modelling code of the model's repository"
    )


def add_model_arguments(parser: ArgumentParser) -> None:
    """What to compress, and how far."""
    add_source_arguments(parser)
    add_budget_arguments(parser)
    how = add_allocation_arguments(parser)
    how.add_argument(
        "--best", action="store_true", help="the most accurate settings (PGSVDConfig.best) instead of the paper's"
    )
    how.add_argument(
        "--group",
        nargs=2,
        action="append",
        default=[],
        metavar=("GLOB", "BUDGET"),
        help='a budget of its own for some layers, e.g. --group "*.mlp.*" tolerance=0.3; may be repeated',
    )
    add_layer_arguments(how)


def add_budget_arguments(parser: ArgumentParser) -> None:
    """How far to compress."""
    budget = parser.add_argument_group("budget", "exactly one of")
    budget.add_argument(
        "--parameter-reduction", type=float, help="fraction of the targets' parameters removed, 0.2 = 20 %%"
    )
    budget.add_argument("--tolerance", type=float, help="relative error allowed in each layer, 0 to 1")
    budget.add_argument("--ranks", help="JSON file: rank by layer name or glob")


def add_allocation_arguments(parser: ArgumentParser) -> Any:
    """How ranks are chosen; the group of arguments, to add more to."""
    how = parser.add_argument_group("allocation", argument_default=SUPPRESS)
    how.add_argument(
        "--allocation", help="pareto (PGSVD, default), pareto_outputs, towers, loss, uniform, svd_llm_v2 or asvd"
    )
    return how


def add_layer_arguments(how: Any) -> None:
    """Which layers, and how they are stored."""
    how.add_argument("--storage", help="factors (default) or pivoted: fewer parameters per rank")
    how.add_argument("--rank-multiple", type=int, help="ranks are multiples of this (default 1)")
    add_skipping_argument(how)


def add_skipping_argument(how: Any) -> None:
    """Which layers are left alone."""
    how.add_argument("--modules-to-not-convert", nargs="*", help="names or globs that stay dense")


def add_calibration_arguments(parser: ArgumentParser) -> None:
    """What the factors are fitted on, and by which solver."""
    how = add_data_arguments(parser)
    how.add_argument("--calibration", help="parallel (the paper, default) or anchored")
    how.add_argument("--blend", type=float, help="of anchored calibration: 1 aims at the dense outputs")
    how.add_argument(
        "--refine-steps", type=int, help="AdamW steps on each block's factors (default 0; needs anchored)"
    )
    how.add_argument(
        "--correct-bias", action="store_true", help="let each layer's bias make up for the mean error of its outputs"
    )
    how.add_argument(
        "--solver", help="eigh (closed form, default), als (the paper's), svd (no data), svd_llm, asvd or fwsvd"
    )
    how.add_argument("--objective", help="outputs (the paper, default) or loss (weighs errors)")
    how.add_argument("--num-iterations", type=int, help="ALS sweeps (default 10)")


def add_data_arguments(parser: ArgumentParser) -> Any:
    """The calibration set; the group of arguments, to add more to."""
    how = parser.add_argument_group("calibration", argument_default=SUPPRESS)
    how.add_argument(
        "--dataset",
        help=".txt, .jsonl or .parquet file, Hub dataset, folder of images with captions or of `pgsvd measure`, or "
        '"self"',
    )
    how.add_argument("--tokenizer", help="folder or Hub name (default: the model's)")
    how.add_argument("--num-samples", type=int, help="calibration sequences (default 256)")
    how.add_argument(
        "--sequence-length", type=int, help="tokens in a sequence (default: the model's maximum, at most 2048)"
    )
    how.add_argument("--batch-size", type=int, help="sequences in a forward pass (default 8)")
    how.add_argument("--seed", type=int, help="of the choice of samples (default 0)")
    return how


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
    from ..calibration import check_named
    from ..config import PGSVDConfig

    fields = {name: getattr(args, name) for name in signature(PGSVDConfig).parameters if hasattr(args, name)}
    if fields.get("ranks"):
        fields["ranks"] = ranks_of(args.ranks)
    for dataset in (getattr(args, name, None) for name in ("dataset", "evaluate")):
        if dataset is not None:
            check_named(dataset)
    settings = PGSVDConfig.best if getattr(args, "best", False) else PGSVDConfig
    return settings(**{**fields, "groups": groups_of(args), **fixed})


def ranks_of(path: str) -> Any:
    """What is in the file of `--ranks`."""
    from ..errors import ConfigError

    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f'--ranks {path} cannot be read: {error}; write JSON such as {{"*.mlp.*": 64}}') from None


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


class Command(BaseOptimumCLICommand):
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
