"""The configuration: what is asked for, and, in a checkpoint, what came of it."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from .allocation import ALLOCATIONS
from .errors import CalibrationError, ConfigError
from .modeling_pgsvd import FORMATS, QUANT_METHOD, LowRankConfig, check_format
from .solvers import SOLVERS
from .structures import Budget


CALIBRATIONS = ("parallel", "anchored")
OBJECTIVES = ("outputs", "loss")
BUDGETS = ("parameter_reduction", "tolerance", "ranks")
DATASETS = (str, os.PathLike, Iterable)
FILES = (".txt", ".jsonl", ".json", ".parquet")


class PGSVDConfig(LowRankConfig):
    """How to compress a model, passed to `from_pretrained(..., quantization_config=...)` or `PGSVDCompressor`.

    Exactly one of `parameter_reduction`, `tolerance` and `ranks` is given.

    Args:
        parameter_reduction: fraction of the target layers' parameters to **remove**, in [0, 1); 0.2 removes 20 %.
            Larger is smaller and less accurate.
        tolerance: ε, the relative error `‖W − W_r‖_F / ‖W‖_F` allowed in each layer, in [0, 1]. Larger is smaller and
            less accurate.
        ranks: rank by layer name or glob, at least 1; layers that nothing matches stay dense.
        allocation: how ranks are chosen: `"pareto"` (PGSVD: one ε for all layers of a group), `"pareto_outputs"` (the
            same, ε being the error of each layer's outputs on the calibration set), `"loss"` (by how much the model's
            predictions depend on each layer, measured with gradients), `"towers"` (one ε for each tower of the model,
            found by a search on what it predicts) or `"uniform"` (the same fraction of every layer); or as in other
            papers, to compare with: `"svd_llm_v2"` (of layers of one type, less of those whose outputs lose more) or
            `"asvd"` (each the smallest rank at which the model's loss, with that layer alone compressed, is within one
            threshold for all).
        solver: how factors are found: `"eigh"` (closed-form optimum), `"als"` (the paper's Algorithm 1, which
            approaches it) or `"svd"` (truncated SVD, needs no dataset); or as in other papers, to compare with:
            `"svd_llm"` (the same optimum by an inverse, where there is one), `"asvd"` or `"fwsvd"` (truncated SVD with
            input features scaled by their absolute values, or by gradients of their weights).
        objective: what the factors of a layer minimise: `"outputs"` (the paper: the error of its outputs) or `"loss"`
            (that error measured by what it costs the model's predictions, with gradients).
        num_iterations: ALS sweeps, at least 1; the paper uses 10. Other solvers ignore it.
        storage: how a layer of rank r is stored: `"factors"`, `r (m + n)` parameters, or `"pivoted"` (r rows of the
            weight and what makes the others of them), `r (m + n − r)`, so that the same budget buys higher ranks.
        groups: glob of layer names → `{"tolerance": …}` or `{"parameter_reduction": …}`, a budget of its own for the
            layers it matches; the first matching glob wins, and the budget above is for the layers that none matches.
            A layer outside the repeated blocks is compressed only where a glob here or in `ranks` names it.
        modules_to_not_convert: names or globs of modules that stay dense.
        rank_multiple: ranks are multiples of this, at least 1; 8 or more suits tensor cores.
        dataset: the calibration set: texts, token tensors, dicts of images, sounds and texts or of model inputs, a
            `datasets.Dataset`, a local `.txt`, `.jsonl` or `.parquet` file, a folder of images with captions, the name
            of a Hub dataset (`"user/name"` or `"user/name:config"`), a folder of `optimum-cli pgsvd measure`, or
            `"self"` for sequences sampled from the model itself.
        tokenizer: tokenizer or processor, or where to load it from; by default the model's own.
        calibration: what layers are fitted to: `"parallel"` (the paper: the dense model's activations) or `"anchored"`
            (block by block: the inputs that the compressed blocks before it really produce, aiming at the dense
            model's outputs).
        blend: β in [0, 1] of anchored calibration: 1 aims at the outputs of the dense model, 0 at those the dense
            layer has on the compressed inputs.
        refine_steps: AdamW steps in which the factors of each block are fitted together to the dense block's outputs,
            on the calibration set; 0 for none. Stops where a part of the set that is held back gets no better. Needs
            `calibration="anchored"`.
        correct_bias: let each layer's bias make up for the mean error of its outputs on the calibration set, with the
            factors that are best together with it; a layer without a bias gets none. Needs a solver that uses data.
        num_samples: sequences of the calibration set to use, at least 1.
        sequence_length: tokens in a sequence, at least 1; by default the model's maximum, at most 2048.
        batch_size: sequences in a forward pass, at least 1.
        seed: of the choice of samples and of `dataset="self"`.
        self_contained: save a copy of the loading code with the checkpoint, so that it loads with
            `trust_remote_code=True` where this package is not installed.
        elastic: save beside the weights what it takes to cut the checkpoint further, without data, when it is loaded.
            Needs `calibration="parallel"` and a solver whose components come in order of importance: any but `"als"`.
        format_version: set in the config of a compressed model, whose `ranks` are the result, by the name of each
            layer in the checkpoint; the other fields are then a record of how it was made.
        quant_method: always `"pgsvd"`.
        record: fields of a newer version in the config of a compressed model, kept as they are.

    Raises:
        ConfigError: a field is unknown or out of range.

    Example:
        >>> PGSVDConfig(parameter_reduction=0.2, dataset="self").allocation
        'pareto'
    """

    def __init__(
        self,
        parameter_reduction: float | None = None,
        tolerance: float | None = None,
        ranks: Mapping[str, int] | None = None,
        *,
        allocation: str = "pareto",
        solver: str = "eigh",
        objective: str = "outputs",
        num_iterations: int = 10,
        storage: str = "factors",
        groups: Mapping[str, Mapping[str, float]] | None = None,
        modules_to_not_convert: list[str] | None = None,
        rank_multiple: int = 1,
        dataset: Any = None,
        tokenizer: Any = None,
        calibration: str = "parallel",
        blend: float = 0.5,
        refine_steps: int = 0,
        correct_bias: bool = False,
        num_samples: int = 256,
        sequence_length: int | None = None,
        batch_size: int = 8,
        seed: int = 0,
        self_contained: bool = False,
        elastic: bool = False,
        format_version: int | None = None,
        quant_method: str = QUANT_METHOD,
        **record: Any,
    ):
        self.quant_method = quant_method
        self.parameter_reduction = parameter_reduction
        self.tolerance = tolerance
        self.ranks: dict[str, int] | None = mapping("ranks", ranks) if ranks is not None else None
        self.allocation = allocation
        self.solver = solver
        self.objective = objective
        self.num_iterations = num_iterations
        self.storage = storage
        self.groups = {glob: mapping(f"groups[{glob!r}]", b) for glob, b in mapping("groups", groups or {}).items()}
        if isinstance(modules_to_not_convert, str):
            raise ConfigError(f"modules_to_not_convert={modules_to_not_convert!r} must be a list of names or globs")
        self.modules_to_not_convert = list(modules_to_not_convert or [])
        self.rank_multiple = rank_multiple
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.calibration = calibration
        self.blend = blend
        self.refine_steps = refine_steps
        self.correct_bias = correct_bias
        self.num_samples = num_samples
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.seed = seed
        self.self_contained = self_contained
        self.elastic = elastic
        self.format_version = format_version
        self.record = record
        self._validate()

    @classmethod
    def best(cls, parameter_reduction: float, **options: Any) -> PGSVDConfig:
        """The settings with the least loss that we know of, the same for every model.

        Ranks and factors by gradients, pivoted storage, anchored calibration and refinement. Gradients and refinement
        need the whole model in memory, and twenty or thirty times the time of the paper's settings, the defaults.

        Args:
            parameter_reduction: as in the class.
            options: other fields, and those of the preset that are to differ.
        """
        settings = {
            "allocation": "loss", "objective": "loss", "storage": "pivoted", "calibration": "anchored",
            "refine_steps": 100,
        }  # fmt: skip
        return cls(parameter_reduction, **{**settings, **options})

    @property
    def is_result(self) -> bool:
        """Whether this is the config of a compressed model rather than a request."""
        return self.format_version is not None

    @property
    def group_budgets(self) -> dict[str, Budget]:
        """The budget of each glob of `groups`."""
        return {glob: group_budget(glob, budget) for glob, budget in self.groups.items()}

    @property
    def needs_dataset(self) -> bool:
        """Whether the solver asks for calibration inputs."""
        return SOLVERS.trait(self.solver, "needs") is not None

    @property
    def profile(self) -> str | None:
        """Which profiles ranks are chosen by: of the `"weights"`, `"outputs"` or `"loss"`; `None` for none."""
        return None if self.ranks is not None else ALLOCATIONS.trait(self.allocation, "profile")

    @property
    def searched(self) -> bool:
        """Whether the model is to be run at one plan after the other to find the one that is asked for."""
        return self.ranks is None and ALLOCATIONS.trait(self.allocation, "searches") is not None

    @property
    def needs_curvature(self) -> bool:
        """Whether gradients at the outputs of layers are to be measured."""
        return self.objective == "loss" or self.profile == "loss"

    @property
    def needs_gradient_energies(self) -> bool:
        """Whether gradients of weights are to be measured."""
        return SOLVERS.trait(self.solver, "needs") == "gradients"

    @property
    def needs_gradients(self) -> bool:
        """Whether gradients of any kind are to be measured."""
        return self.needs_curvature or self.needs_gradient_energies

    def require_dataset(self) -> None:
        """Raise `CalibrationError` where the solver needs a dataset and there is none."""
        if self.needs_dataset and self.dataset is None:
            raise CalibrationError(
                f"solver={self.solver!r} needs calibration data: give PGSVDConfig(dataset=texts), a file, a Hub "
                "dataset's name or 'self', or use solver='svd', which needs none"
            )

    def with_ranks(self, ranks: Mapping[str, int]) -> PGSVDConfig:
        """The config of a model compressed to these ranks; this one does not change."""
        result = copy.deepcopy(self)
        result.ranks, result.format_version = dict(ranks), FORMATS[self.storage]
        return result

    def get_loading_attributes(self) -> dict[str, Any]:
        """Nothing of a request applies to a checkpoint that is compressed already."""
        return {}

    def to_dict(self) -> dict[str, Any]:
        """Every field as JSON can hold it; a dataset or tokenizer object is described, not stored."""
        fields = {key: value for key, value in vars(self).items() if key not in ("dataset", "tokenizer", "record")}
        if self.storage == "factors":
            del fields["storage"]  # as in checkpoints of format 1, which knows no other
        described = {"dataset": describe(self.dataset), "tokenizer": describe(self.tokenizer)}
        return copy.deepcopy({**self.record, **fields, **described})

    def __iter__(self):
        yield from self.to_dict().items()

    def __deepcopy__(self, memo: dict[int, Any]) -> PGSVDConfig:
        """A copy that shares the dataset and tokenizer objects, which may not be copyable."""
        clone = object.__new__(type(self))
        memo[id(self)] = clone
        for key, value in vars(self).items():
            setattr(clone, key, value if key in ("dataset", "tokenizer") else copy.deepcopy(value, memo))
        return clone

    def to_json_string(self, use_diff: bool = True) -> str:
        """`to_dict()` as JSON."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PGSVDConfig) and self.to_dict() == other.to_dict() and self.dataset is other.dataset

    def _validate(self) -> None:
        if self.quant_method != QUANT_METHOD:
            raise ConfigError(f"quant_method={self.quant_method!r} is not {QUANT_METHOD!r}")
        if self.is_result:
            self._validate_result()
        else:
            self._validate_request()

    def _validate_result(self) -> None:
        """Loading reads the ranks and the format; the rest is a record, possibly of a newer version's fields."""
        at_least_one("format_version", self.format_version)
        check_format(self.format_version or 0, self.storage)
        if self.ranks is None:
            raise ConfigError("the config of a compressed model has no ranks; its config.json is damaged")
        for name, rank in self.ranks.items():
            at_least_one(f"ranks[{name!r}]", rank)

    def _validate_request(self) -> None:
        if self.record:
            known = sorted(set(vars(self)) - {"record"})
            raise ConfigError(f"unknown fields {', '.join(sorted(self.record))}; known are {', '.join(known)}")
        ALLOCATIONS.check(self.allocation)
        SOLVERS.check(self.solver)
        if self.storage not in FORMATS:
            raise ConfigError(f"storage={self.storage!r} is not known; known are {', '.join(FORMATS)}")
        for name in ("num_iterations", "rank_multiple", "num_samples", "batch_size"):
            at_least_one(name, getattr(self, name))
        if self.sequence_length is not None:
            at_least_one("sequence_length", self.sequence_length)
        if self.calibration not in CALIBRATIONS:
            raise ConfigError(f"calibration={self.calibration!r} is not known; known are {', '.join(CALIBRATIONS)}")
        if self.calibration == "anchored" and not self.needs_dataset:
            raise ConfigError(f"calibration='anchored' has no meaning with solver={self.solver!r}, which uses no data")
        if self.calibration == "anchored" and SOLVERS.trait(self.solver, "inverts"):
            raise ConfigError(
                f"calibration='anchored' gives layers inputs of the low rank that compressed layers leave them, whose "
                f"Gram matrices solver={self.solver!r} cannot invert; use solver='eigh', which finds the same factors"
            )
        if not isinstance(self.blend, (int, float)) or isinstance(self.blend, bool) or not 0 <= self.blend <= 1:
            raise ConfigError(f"blend={self.blend!r} is outside [0, 1]")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ConfigError(f"seed={self.seed!r} must be an integer")
        for name in ("self_contained", "elastic", "correct_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r} must be True or False")
        self._validate_refinement()
        self._validate_correction()
        self._validate_curvature()
        self._validate_profile()
        self._validate_elastic()
        if isinstance(self.dataset, Mapping) or not (self.dataset is None or isinstance(self.dataset, DATASETS)):
            raise ConfigError(
                f"dataset is a {type(self.dataset).__name__}; give a list of texts, token tensors, images with "
                "texts or model inputs, a datasets.Dataset, a file or folder, the name of a Hub dataset, or 'self'"
            )
        self._validate_budgets()

    def _validate_refinement(self) -> None:
        steps = self.refine_steps
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
            raise ConfigError(f"refine_steps={steps!r} must be an integer, 0 or more")
        if steps and self.calibration != "anchored":
            raise ConfigError(
                f"refine_steps={steps} needs calibration='anchored': a block is fitted to the dense one's outputs on "
                "the inputs that the compressed blocks before it produce"
            )

    def _validate_correction(self) -> None:
        if self.correct_bias and not self.needs_dataset:
            raise ConfigError(
                f"correct_bias=True needs the mean of each layer's inputs, and solver={self.solver!r} uses no data; "
                "use solver='eigh' or 'als'"
            )
        if self.correct_bias and self.elastic:
            raise ConfigError(
                "elastic=True needs correct_bias=False: a corrected bias fits one rank, and a checkpoint that is cut "
                "does not have the mean inputs that its new biases would be made from"
            )

    def _validate_curvature(self) -> None:
        """Gradients are measured for what can use them."""
        if self.objective not in OBJECTIVES:
            raise ConfigError(f"objective={self.objective!r} is not known; known are {', '.join(OBJECTIVES)}")
        if self.objective == "loss" and not SOLVERS.trait(self.solver, "takes_curvature"):
            able = " or ".join(
                f"solver={name!r}" for name in SOLVERS.names() if SOLVERS.trait(name, "takes_curvature")
            )
            raise ConfigError(f"objective='loss' needs {able}, not {self.solver!r}")

    def _validate_profile(self) -> None:
        """What is measured on a calibration set needs one."""
        if (self.searched or self.profile in ("outputs", "loss")) and not self.needs_dataset:
            kinds = {"loss": "gradients", "outputs": "outputs", "losses": "losses"}
            measured = kinds.get(self.profile or "", "predictions")
            raise ConfigError(
                f"allocation={self.allocation!r} measures {measured} on a calibration set, and solver={self.solver!r} "
                "uses none; use solver='eigh'"
            )

    def _validate_elastic(self) -> None:
        """Cutting must give what compressing anew would."""
        if self.elastic and not SOLVERS.trait(self.solver, "nested"):
            nested = " or ".join(f"solver={name!r}" for name in SOLVERS.names() if SOLVERS.trait(name, "nested"))
            raise ConfigError(
                f"elastic=True needs factors that can be cut, with components in order of importance: use {nested}, "
                f"not {self.solver!r}"
            )
        if self.elastic and (self.objective == "loss" or self.profile in ("outputs", "loss", "losses")):
            raise ConfigError(
                "elastic=True needs objective='outputs' and an allocation that measures no more than weights: a "
                "checkpoint is cut by the singular values of its weights"
            )
        if self.elastic and self.calibration == "anchored":
            raise ConfigError(
                "elastic=True needs calibration='parallel': anchored factors fit the ranks of the blocks before them, "
                "and would not fit once those are cut"
            )
        if self.elastic and self.storage == "pivoted":
            raise ConfigError(
                "elastic=True needs storage='factors': pivoted storage mixes the components of a layer, so that the "
                "less important ones cannot be cut off"
            )

    def _validate_budgets(self) -> None:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(
                f"exactly one of {', '.join(BUDGETS)} must be given, not {' and '.join(given) or 'none'}; "
                "parameter_reduction=0.2 removes 20 % of the target layers' parameters"
            )
        if self.ranks is None:
            Budget(self.parameter_reduction, self.tolerance)
        elif self.groups:
            raise ConfigError("groups have no meaning with ranks, which name their layers; give one of the two")
        elif not self.ranks:
            raise ConfigError("ranks={} names no layer; give the rank of at least one")
        for glob, rank in (self.ranks or {}).items():
            at_least_one(f"ranks[{glob!r}]", rank)
        for glob, budget in self.groups.items():
            group_budget(glob, budget)
        if self.allocation == "towers" and self.tolerance is not None:
            raise ConfigError(
                f"allocation='towers' finds the tolerances that meet a parameter_reduction, and "
                f"tolerance={self.tolerance} fixes them: give a parameter_reduction, or a tolerance for each tower in "
                "groups with allocation='pareto'"
            )
        tolerances = [self.tolerance, *(budget.get("tolerance") for budget in self.groups.values())]
        given_tolerance = any(tolerance is not None for tolerance in tolerances)
        if given_tolerance and not ALLOCATIONS.trait(self.allocation, "takes_tolerance"):
            raise ConfigError(
                f"allocation={self.allocation!r} takes parameter_reduction, not tolerance; use allocation='pareto'"
            )


def group_budget(glob: str, budget: Mapping[str, float]) -> Budget:
    """The budget of one entry of `groups`; raises `ConfigError` naming it."""
    if unknown := set(budget) - {"parameter_reduction", "tolerance"}:
        given = ", ".join(map(repr, sorted(unknown)))
        raise ConfigError(f"groups[{glob!r}]={budget}: give 'tolerance' or 'parameter_reduction', not {given}")
    try:
        return Budget(**budget)
    except ConfigError as error:
        raise ConfigError(f"groups[{glob!r}]={budget}: {error}") from None


def mapping(name: str, value: Any) -> dict[str, Any]:
    """A field that maps patterns to values, as a dict of its own."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{name}={value!r} must map names or globs to values")
    return dict(value)


def at_least_one(name: str, value: object) -> None:
    """Raise `ConfigError` unless a field is an integer of 1 or more."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name}={value!r} must be an integer of at least 1")


def describe(value: Any) -> str | None:
    """A dataset or tokenizer in words: a Hub name stays, a local path loses its folders, an object gives its type."""
    if value is None:
        return None
    if isinstance(value, (str, os.PathLike)):
        path = os.fspath(value)
        local = (
            os.path.isabs(path) or os.path.exists(path) or path.count("/") > 1 or os.path.splitext(path)[1] in FILES
        )
        return os.path.basename(os.path.normpath(path)) if local else path
    if isinstance(value, (list, tuple)):
        return f"list of {len(value)} {type(value[0]).__name__}" if value else "empty list"
    return getattr(value, "name_or_path", None) and describe(value.name_or_path) or type(value).__name__
