"""A cut, carried out while the loader reads: of every factor the leading components are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter

from ..config import PGSVDConfig
from ..report import CompressionReport, ModelSize


@dataclass(frozen=True, eq=False)
class Cut:
    """How a checkpoint is cut while it is loaded.

    Args:
        config: of the result.
        report: of the plan, made on the dense model.
        stored: ranks of all factors in the checkpoint and its side file, by module name.
        extra_file: the side file, where layers that the checkpoint holds dense get factors; else `None`.
        unused: names of what both files hold for other cuts.
    """

    config: PGSVDConfig
    report: CompressionReport
    stored: Mapping[str, int]
    extra_file: str | None
    unused: frozenset[str]

    def conversions(self) -> list[WeightConverter]:
        """What the loader does to factors that are stored at a higher rank."""
        return [
            WeightConverter(rf"\.{factor}\.weight$", f".{factor}.weight", [LeadingComponents(dim, self.stored)])
            for factor, dim in (("left", 1), ("right", 0))
        ]

    def prepare(self, model: Any, checkpoint_files: list[str]) -> None:
        """Make the loader read the side file where it is needed, and not mind what it does not need.

        Args:
            model: being loaded.
            checkpoint_files: that the loader is about to read.
        """
        if self.extra_file is None:
            return
        checkpoint_files.append(self.extra_file)
        settle = model._adjust_missing_and_unexpected_keys

        def settle_the_rest(loading_info: Any) -> None:
            loading_info.unexpected_keys = {*loading_info.unexpected_keys} - self.unused
            settle(loading_info)

        model._adjust_missing_and_unexpected_keys = settle_the_rest

    def finish(self, model: Any, made: CompressionReport | None) -> CompressionReport:
        """Leave nothing of the cut in a loaded model, which is an ordinary compressed one.

        Args:
            model: loaded.
            made: the checkpoint's report, if it has one.

        Returns:
            The report of the cut.
        """
        model._weight_conversions = [
            conversion
            for conversion in model._weight_conversions
            if not any(isinstance(step, LeadingComponents) for step in getattr(conversion, "operations", ()))
        ]
        plan, after = self.report, ModelSize.of(model)
        # Of the dense model, what is tied is counted once only when weights are loaded.
        before = ModelSize(
            after.parameters + plan.model_before.parameters - plan.model_after.parameters,
            after.bytes + plan.model_before.bytes - plan.model_after.bytes,
        )
        report = replace(plan, model_before=before, model_after=after)
        if made is None:
            return report
        notes = (*made.notes, *plan.notes)
        return replace(report, calibration=made.calibration, base_model=made.base_model, notes=notes)


class LeadingComponents(ConversionOps):
    """Keeps as many components of a factor as the layer that it is loaded into has a rank; the rest is freed.

    Args:
        dim: that numbers the components.
        stored: ranks of the factors in the checkpoint by module name. Factors of any other rank are left as they are
            for the loader's own check of shapes.
    """

    def __init__(self, dim: int, stored: Mapping[str, int]):
        self.dim, self.stored = dim, stored

    def __deepcopy__(self, memo: dict[int, Any]) -> LeadingComponents:
        return self  # the loader copies it for every tensor

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        model: Any = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Cut one factor."""
        (tensors,) = input_dict.values()
        factor = tensors[0] if isinstance(tensors, list) else tensors
        layer = full_layer_name.rsplit(".", 2)[0]
        if factor.shape[self.dim] == self.stored.get(layer):
            rank = model.get_submodule(layer).rank
            factor = factor.narrow(self.dim, 0, rank).clone() if rank < factor.shape[self.dim] else factor
        return {target_patterns[0]: factor}
