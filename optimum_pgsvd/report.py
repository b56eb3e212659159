"""What was done to a model, layer by layer, measured."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

from .modeling_pgsvd import low_rank_layers
from .structures import RankPlan
from .targets import Targets
from .version import __version__


REPORT_NAME = "pgsvd_report.json"


@dataclass(frozen=True)
class LayerReport:
    """One target layer.

    Args:
        name: of the module.
        shape: `[m, n]` of its weight.
        rank: `None` for a layer kept dense.
        parameters_before: of the weight, the bias not counted.
        parameters_after: of the factors, of their pivoted storage, or of the dense weight.
        weight_error: `‖W − left right‖ / ‖W‖` of the factors as stored, 0 for dense; in a plan, the planned e(rank).
        activation_error: `‖(W − left right) Xᵀ‖ / ‖W Xᵀ‖` likewise, with anchored calibration of the weight A that was
            approximated in W's place, on the compressed inputs; `None` where no inputs were measured. Where the bias
            was corrected, it is that with the bias as stored: its change is part of the error, not of the outputs.
        tolerance: the ε it was planned with, if any.
        group: the glob of its budget, "" for the main one.
        refined: error of its block's outputs on held-back batches, after refinement relative to before; `None` where
            it was not refined. The errors above are those before.
        bias_corrected: whether its bias makes up for what the factors do to the mean of its outputs.
        tokens: calibration tokens it saw.
        seconds: spent on factoring it.
    """

    name: str
    shape: tuple[int, int]
    rank: int | None
    parameters_before: int
    parameters_after: int
    weight_error: float | None = None
    activation_error: float | None = None
    tolerance: float | None = None
    group: str = ""
    refined: float | None = None
    bias_corrected: bool = False
    tokens: int = 0
    seconds: float = 0.0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LayerReport:
        """The report that JSON describes."""
        return cls(**{**values, "shape": tuple(values["shape"])})


@dataclass(frozen=True)
class ModelSize:
    """Parameters and bytes of the whole model, each tensor counted once; bytes with the indices of pivoted storage."""

    parameters: int
    bytes: int

    @classmethod
    def of(cls, model: nn.Module) -> ModelSize:
        """Count a model's parameters."""
        parameters = list(model.parameters())
        indices = [buffer for layer in low_rank_layers(model).values() for buffer in layer.buffers(recurse=False)]
        return cls(sum(p.numel() for p in parameters), sum(t.numel() * t.element_size() for t in parameters + indices))


@dataclass(frozen=True)
class CompressionReport:
    """The report of a compression, or of a plan for one.

    Args:
        layers: every target, in model order.
        skipped: modules that stayed dense, with the reason.
        model_before: the dense model.
        model_after: the compressed model.
        config: the request.
        seconds: by step, wall-clock.
        calibration: what the model was measured on.
        notes: anything out of the ordinary.
        environment: versions.
        base_model: name on the Hub of the model that was compressed, if it came from there.
        resources: what it took: `peak_memory_bytes` of the process, `tokens_per_second` of the calibration set.
        request: fingerprints of the checkpoint and the calibration set, where a checkpoint on disk was compressed.
        search: what was found by running the model, and what was tried to find it: with `allocation="towers"` each
            tower's tolerance (`plan_towers`), with `"asvd"` the threshold for losses (`plan_alone`).
    """

    layers: tuple[LayerReport, ...]
    skipped: Mapping[str, str]
    model_before: ModelSize
    model_after: ModelSize
    config: Mapping[str, Any]
    seconds: Mapping[str, float] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    base_model: str | None = None
    resources: Mapping[str, float] = field(default_factory=dict)
    request: Mapping[str, Any] = field(default_factory=dict)
    search: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_plan(
        cls, plan: RankPlan, targets: Targets, model: nn.Module, config: Mapping[str, Any]
    ) -> CompressionReport:
        """The report of a plan that has not been carried out: sizes, no errors."""
        before = ModelSize.of(model)
        bytes_of = {name: model.get_parameter(f"{name}.weight").element_size() for name in plan.layers}
        saved = {name: layer.shape.dense_parameters - layer.parameters for name, layer in plan.layers.items()}
        indices = sum(layer.shape.index_bytes(layer.rank) for layer in plan.layers.values())
        after = ModelSize(
            before.parameters - sum(saved.values()),
            before.bytes - sum(saved[name] * bytes_of[name] for name in saved) + indices,
        )
        return cls(tuple(planned_layers(plan)), targets.skipped, before, after, config, environment=environment())

    @property
    def parameters_before(self) -> int:
        """Parameters of the targets before."""
        return sum(layer.parameters_before for layer in self.layers)

    @property
    def parameters_after(self) -> int:
        """Parameters of the targets after."""
        return sum(layer.parameters_after for layer in self.layers)

    @property
    def parameter_reduction(self) -> float:
        """Fraction of the targets' parameters removed."""
        return 1 - self.parameters_after / self.parameters_before

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it, totals included."""
        totals = {
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "parameter_reduction": self.parameter_reduction,
        }
        return {"targets": totals, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CompressionReport:
        """The report that `to_dict` described."""
        layers = tuple(LayerReport.from_dict(layer) for layer in values["layers"])
        known = {
            "layers": layers,
            "model_before": ModelSize(**values["model_before"]),
            "model_after": ModelSize(**values["model_after"]),
            "notes": tuple(values["notes"]),
        }
        return cls(**{key: value for key, value in values.items() if key != "targets"} | known)

    def of_tower(self, tower: str, model: nn.Module) -> CompressionReport:
        """The part of a whole model's report that is about one of its towers, loaded alone.

        Args:
            tower: its name in the whole.
            model: the tower, whose layers may be called as in the whole or as below the tower.
        """
        modules = {name for name, _ in model.named_modules()}

        def called(name: str) -> str:
            return name if name in modules else name.removeprefix(f"{tower}.")

        inside = (layer for layer in self.layers if layer.name.startswith(f"{tower}."))
        layers = tuple(replace(layer, name=called(layer.name)) for layer in inside)
        skipped = {called(name): why for name, why in self.skipped.items() if name.startswith(f"{tower}.")}
        after, size = ModelSize.of(model), next(p.element_size() for p in model.parameters())
        saved = sum(layer.parameters_before - layer.parameters_after for layer in layers)
        before = ModelSize(after.parameters + saved, after.bytes + saved * size)
        return replace(
            self, layers=layers, skipped=skipped, model_before=before, model_after=after, notes=(), search={}
        )

    def save(self, folder: str | os.PathLike) -> str:
        """Write `pgsvd_report.json` into a folder and return its path."""
        path = os.path.join(folder, REPORT_NAME)
        with open(path, "w", encoding="utf-8") as file:
            json.dump(self.to_dict(), file, indent=2)
            file.write("\n")
        return path

    @classmethod
    def load(cls, folder: str | os.PathLike) -> CompressionReport:
        """Read `pgsvd_report.json` from a folder."""
        with open(os.path.join(folder, REPORT_NAME), encoding="utf-8") as file:
            return cls.from_dict(json.load(file))

    def summary(self) -> str:
        """The totals in three lines."""
        before, after = self.model_before, self.model_after
        return (
            f"targets: {self.parameters_before:,} → {self.parameters_after:,} parameters, "
            f"{self.parameter_reduction:.2%} removed\n"
            f"model:   {before.parameters:,} → {after.parameters:,} parameters, "
            f"{1 - after.parameters / before.parameters:.2%} removed\n"
            f"bytes:   {before.bytes:,} → {after.bytes:,}, {1 - after.bytes / before.bytes:.2%} removed"
        )

    def table(self):
        """The layers as a `rich.table.Table`."""
        from rich.table import Table

        table = Table("layer", "shape", "rank", "weight error", "activation error", "before", "after", "seconds")
        for layer in self.layers:
            table.add_row(
                layer.name,
                f"{layer.shape[0]} × {layer.shape[1]}",
                "dense" if layer.rank is None else str(layer.rank),
                _number(layer.weight_error),
                _number(layer.activation_error),
                f"{layer.parameters_before:,}",
                f"{layer.parameters_after:,}",
                f"{layer.seconds:.2f}",
            )
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=400)  # of the longest line; the table is as wide as its columns
        with console.capture() as capture:
            console.print(self.table())
        skipped = "".join(f"\nskipped {name}: {reason}" for name, reason in self.skipped.items())
        notes = "".join(f"\nnote: {note}" for note in self.notes)
        return capture.get() + self.summary() + self.refinement() + self.searched() + skipped + notes

    def refinement(self) -> str:
        """What refinement left of the blocks' errors; nothing where there was none."""
        gains = [layer.refined for layer in self.layers if layer.refined is not None]
        if not gains:
            return ""
        return (
            f"\nrefined: the blocks' outputs have {min(gains):.4f} to {max(gains):.4f} of their error before, on "
            "held-back batches; the errors of layers are those before"
        )

    def searched(self) -> str:
        """What a search found; nothing where there was none."""
        if not self.search:
            return ""
        return self.towers() if "towers" in self.search else self.thresholds()

    def thresholds(self) -> str:
        """The largest loss that a layer of the plan gives when it alone is compressed, under each budget."""
        found = ", ".join(
            f"{threshold:.4f}{f' in {glob}' if glob else ''}"
            for glob, threshold in self.search["thresholds"].items()
            if threshold is not None
        )
        allowed = f"loss at most {found} with one layer compressed alone" if found else "no layer compressed"
        return (
            f"\nsearch: {allowed}, "
            f"{self.search['loss']:.4f} dense; {self.search['evaluations']} tried on "
            f"{self.search['sequences']} sequences"
        )

    def towers(self) -> str:
        """A line for each tower of a search, and what it is better than."""
        lines = [
            f"\ntower {name}: tolerance {found['tolerance']:.4f}, {found['parameter_reduction']:.2%} removed"
            for name, found in self.search["towers"].items()
        ]
        one = self.search["one_tolerance"]
        return "".join(lines) + (
            f"\nsearch: divergence {self.search['divergence']:.4g} from the dense model's predictions, "
            f"{one['divergence']:.4g} with one tolerance of {one['tolerance']:.4f}; {len(self.search['points'])} tried"
        )


def planned_layers(plan: RankPlan) -> list[LayerReport]:
    """What a plan says of each layer."""
    return [
        LayerReport(
            name,
            (layer.shape.out_features, layer.shape.in_features),
            layer.rank,
            layer.shape.dense_parameters,
            layer.parameters,
            weight_error=0.0 if layer.rank is None else layer.relative_error,
            activation_error=0.0 if layer.rank is None else None,
            tolerance=layer.tolerance,
            group=layer.group,
        )
        for name, layer in plan.layers.items()
    ]


def peak_memory() -> int:
    """The largest resident set of this process so far, in bytes; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory() -> int:
    """Bytes of memory that processes can have without swapping."""
    import psutil

    return psutil.virtual_memory().available


def environment() -> dict[str, str]:
    """Versions of what the result depends on."""
    import torch
    import transformers

    return {
        "optimum_pgsvd": __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
