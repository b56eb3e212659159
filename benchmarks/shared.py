"""Whether one `right` for several `left`s pays, for layers with one input, at equal parameters.

    PGSVD_DATA=... python benchmarks/shared.py                # every cell that is not in the JSON yet
    python benchmarks/shared.py --models demo --reductions 0.4
    python benchmarks/shared.py --tables                      # only write the tables from the JSON

A group is the layers that are fed one tensor, such as q, k and v, or gate and up. Layers that share a `right` are one
layer, their weights stacked, whose least error of any rank is known in closed form; so is that of layers apart, of
which every split of the group's parameters is tried. Plain storage costs `r (m + n)` parameters, pivoted storage
`r (m + n − r)`, m being the outputs of the stack; what would not be smaller than dense stays dense. Every group gets
the same fraction of its parameters; all other layers stay dense. Errors of a group's layers are added up as they are,
or each relative to the size of its layer's outputs, or by what errors of outputs cost the loss (the second moment of
its gradients).
"""

from __future__ import annotations

import argparse
import bisect
import copy
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import perplexity
import torch
from cells import RESULTS, check_models, fill, read_cells, table_parser, write_cell
from perplexity import WINDOW
from quantized import grams
from torch import Tensor, nn


RESULT = RESULTS / "shared.json"
REDUCTIONS = (0.2, 0.4, 0.6)
STORAGES = ("factors", "pivoted")
SHARINGS = ("apart", "all shared", "best partition")
WEIGHTINGS = ("added", "relative", "loss")


@dataclass(frozen=True)
class Unit:
    """Layers with one `right`: a stack of them, or one.

    Args:
        names: of the layers.
        weight: `(m, n)`, stacked, outputs scaled by what their errors count.
        vectors: `(m, m)`, eigenvectors of `W G Wᵀ`, the largest first.
        tails: `(k + 1,)`, the squared error of every rank from 0.
        costs: `(k + 1,)` int64, parameters of every rank in a storage.
    """

    names: tuple[str, ...]
    weight: Tensor
    vectors: Tensor
    tails: Tensor
    costs: Tensor

    @classmethod
    def of(cls, names: Sequence[str], weights: Mapping[str, Tensor], gram: Tensor, storage: str) -> Unit:
        """From scaled weights, float64; the last rank is dense."""
        weight = torch.cat([weights[name] for name in names])
        (m, n), full = weight.shape, min(weight.shape)
        values, vectors = torch.linalg.eigh(weight @ gram @ weight.T)
        values = values.flip(0).clamp(min=0)
        tails = torch.cat([values.flip(0).cumsum(0).flip(0), values.new_zeros(1)])[: full + 1]
        tails[full] = 0
        ranks = torch.arange(full + 1)
        costs = ranks * (m + n) if storage == "factors" else ranks * (m + n - ranks)
        saving = costs < m * n
        tails, costs = torch.where(saving, tails, 0), torch.where(saving, costs, m * n)
        return cls(tuple(names), weight, vectors.flip(1), tails, costs)

    def approximated(self, rank: int) -> Tensor:
        """The scaled weight of a rank, or itself where that is dense."""
        if not self.tails[rank]:
            return self.weight
        leading = self.vectors[:, :rank]
        return leading @ (leading.T @ self.weight)


def best_split(units: Sequence[Unit], budget: int) -> tuple[float, tuple[int, ...]]:
    """The least squared error of some units within a budget, and their ranks: all are tried."""
    *others, last = [(unit.tails.tolist(), unit.costs.tolist()) for unit in units]
    tails, costs = last
    best: tuple[float, tuple[int, ...]] = (math.inf, ())
    for ranks in itertools.product(*(range(len(each)) for each, _ in others)):
        left = budget - sum(each[rank] for (_, each), rank in zip(others, ranks, strict=True))
        if left >= 0:
            rank = bisect.bisect_right(costs, left) - 1
            error = tails[rank] + sum(each[r] for (each, _), r in zip(others, ranks, strict=True))
            best = min(best, (error, (*ranks, rank)))
    return best


def partitions(names: Sequence[str]) -> Iterator[list[tuple[str, ...]]]:
    """Every way to part some layers into units, apart first and all shared last."""
    if not names:
        yield []
        return
    first, *rest = names
    for parts in partitions(rest):
        yield [(first,), *parts]
        for i, part in enumerate(parts):
            yield [*parts[:i], (first, *part), *parts[i + 1 :]]


def solve(
    weights: Mapping[str, Tensor], gram: Tensor, budget: int, storage: str, sharing: str
) -> tuple[float, dict[tuple[str, ...], int], dict[str, Tensor]]:
    """The least squared error of a group, with the rank of each unit and the scaled weights that have it."""
    names = tuple(weights)
    ways = list(partitions(names))
    chosen = {"apart": [way for way in ways if len(way) == len(names)], "all shared": [[names]]}.get(sharing, ways)
    best: tuple[float, tuple[int, ...], list[Unit]] = (math.inf, (), [])
    for way in chosen:
        units = [Unit.of(part, weights, gram, storage) for part in way]
        error, ranks = best_split(units, budget)
        if error < best[0]:
            best = (error, ranks, units)
    error, ranks, units = best
    found: dict[str, Tensor] = {}
    for unit, rank in zip(units, ranks, strict=True):
        rows = [len(weights[name]) for name in unit.names]
        found |= dict(zip(unit.names, unit.approximated(rank).split(rows), strict=True))
    return error, {unit.names: rank for unit, rank in zip(units, ranks, strict=True)}, found


@torch.no_grad()
def groups(model: Any, targets: list[str], window: Tensor) -> list[list[str]]:
    """The target layers that are fed one tensor, where these are several."""
    from optimum_pgsvd.calibration import InputSurvey

    layers = {name: model.get_submodule(name) for name in targets}
    with InputSurvey(layers, lambda x, value: value.reshape(-1, value.shape[-1])) as survey:
        model(input_ids=window[None])
    followers: dict[str, list[str]] = {}
    for name, leader in survey.leaders.items():
        followers.setdefault(leader, []).append(name)
    return [names for names in followers.values() if len(names) > 1]


def gradients(model: Any, names: Sequence[str], windows: Tensor) -> dict[str, Tensor]:
    """The second moment `(m, m)` of the loss's gradients by each layer's outputs, float64."""
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def see(gradient: Tensor) -> None:
            rows = gradient.flatten(0, -2).double()
            sums[name] = sums.get(name, 0) + rows.T @ rows

        def hook(module: nn.Module, inputs: Any, outputs: Tensor) -> None:
            outputs.register_hook(see)

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    for batch in windows.split(16):
        loss = model(input_ids=batch, labels=batch).loss * batch.numel()
        torch.autograd.grad(loss, model.get_input_embeddings().weight)
    for each in hooks:
        each.remove()
    return sums


@dataclass(frozen=True)
class Case:
    """A model and what was measured of it.

    Args:
        dense: the model.
        groups: of the layers that are fed one tensor.
        moments: `G (n, n)` of the first layer of each group.
        gradients: `(m, m)` of each of their layers.
    """

    dense: Any
    groups: list[list[str]]
    moments: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]

    @classmethod
    def of(cls, dense: Any, targets: list[str], windows: Tensor) -> Case:
        """Measure a model."""
        found = groups(dense, targets, windows[0])
        names = [name for group in found for name in group]
        return cls(
            dense, found, grams(dense, [group[0] for group in found], windows), gradients(dense, names, windows)
        )

    def root(self, name: str, weight: Tensor, gram: Tensor, weighting: str) -> Tensor:
        """`R (m, m)`, an error E counting `‖Rᵀ E Xᵀ‖²`."""
        from optimum_pgsvd.linalg.weighted import metric_root

        if weighting == "loss":
            return metric_root(self.gradients[name])
        identity = torch.eye(len(weight), dtype=torch.float64)
        return identity if weighting == "added" else identity / ((weight @ gram) * weight).sum().sqrt()


@torch.no_grad()
def measure(case: Case, key: dict[str, Any]) -> tuple[Any, list[dict[str, Any]]]:
    """A copy of the model with all groups replaced, and what became of each group."""
    model, layers = copy.deepcopy(case.dense), []
    for names in case.groups:
        gram = case.moments[names[0]]
        weights = {name: model.get_submodule(name).weight.detach().double() for name in names}
        roots = {name: case.root(name, w, gram, key["weighting"]) for name, w in weights.items()}
        scaled = {name: roots[name].T @ w for name, w in weights.items()}
        budget = math.floor((1 - key["reduction"]) * sum(w.numel() for w in weights.values()))
        error, ranks, replaced = solve(scaled, gram, budget, key["storage"], key["sharing"])
        for name in names:
            model.get_submodule(name).weight[:] = torch.linalg.solve(roots[name].T, replaced[name]).float()
        total = sum(float(((w @ gram) * w).sum()) for w in scaled.values())
        short = {"+".join(map(short_name, unit)): rank for unit, rank in ranks.items()}
        kind = "/".join(map(short_name, names))
        layers.append({"group": names[0], "kind": kind, "error": math.sqrt(error / total), "ranks": short})
    return model, layers


def short_name(name: str) -> str:
    """Such as "q" of a layer's `q_proj`."""
    return name.rpartition(".")[2].removesuffix("_proj")


def run(args: argparse.Namespace) -> None:
    """Measure every cell that is not in the JSON yet."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from optimum_pgsvd import PGSVDConfig
    from optimum_pgsvd.calibration.data import pack
    from optimum_pgsvd.targets import find_targets

    for name, (folder, calibration, evaluation, samples) in perplexity.cases().items():
        if args.models and name not in args.models:
            continue
        dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        windows = torch.stack(pack(evaluation, tokenizer, num_samples=128, length=WINDOW))
        seen = torch.stack(pack(calibration, tokenizer, num_samples=samples, length=WINDOW))
        targets = list(find_targets(dense, PGSVDConfig(0.5, solver="svd")).names)
        case = Case.of(dense, targets, seen)
        key: dict[str, Any] = {"model": name, "sharing": "dense"}
        if not any(key.items() <= cell.items() for cell in read_cells(args.result)):
            write_cell(args.result, key, {"perplexity": perplexity.perplexity(dense, windows)})
        for reduction, storage, weighting, sharing in itertools.product(
            args.reductions, STORAGES, args.weightings, SHARINGS
        ):
            key = {"model": name, "reduction": reduction, "storage": storage, "weighting": weighting,
                   "sharing": sharing}  # fmt: skip
            if not any(key.items() <= cell.items() for cell in read_cells(args.result)):
                model, layers = measure(case, key)
                write_cell(args.result, key, {"perplexity": perplexity.perplexity(model, windows), "layers": layers})


def errors(cell: Mapping[str, Any]) -> dict[str, float]:
    """Mean error of each kind of group."""
    kinds = dict.fromkeys(layer["kind"] for layer in cell["layers"])
    return {kind: statistics.mean(each["error"] for each in cell["layers"] if each["kind"] == kind) for kind in kinds}


def table(cells: list[dict[str, Any]], model: str) -> str:
    """Perplexity, and the mean error of each kind of group, by what is shared; errors weighed by the loss."""
    dense = next(c for c in cells if c["model"] == model and c["sharing"] == "dense")["perplexity"]
    lines = [f"| {model} (dense {dense:.4g}) | " + " | ".join(SHARINGS) + " |", "|---|" + "---:|" * len(SHARINGS)]
    mine = [cell for cell in cells if cell["model"] == model and cell["sharing"] != "dense"]
    for storage, reduction in itertools.product(STORAGES, REDUCTIONS):
        key = {"reduction": reduction, "storage": storage, "weighting": "loss"}
        row = {cell["sharing"]: cell for cell in mine if key.items() <= cell.items()}
        if row:
            least = min(cell["perplexity"] for cell in row.values())
            texts = []
            for sharing in SHARINGS:
                if (cell := row.get(sharing)) is None:
                    texts.append("")
                    continue
                text = f"{cell['perplexity']:.4g}"
                text = f"**{text}**" if cell["perplexity"] == least else text
                texts.append(f"{text} ({', '.join(f'{kind} {e:.3f}' for kind, e in errors(cell).items())})")
            lines.append(f"| {storage}, {reduction:.0%} of the groups removed | {' | '.join(texts)} |")
    return "\n".join(lines)


def ratio_table(cells: list[dict[str, Any]]) -> str:
    """Error and perplexity of sharing over those of layers apart: geometric means over the models.

    A model counts in a column where all of its cells are there.
    """
    found = {(c["model"], c["reduction"], c["storage"], c["weighting"], c["sharing"]): c
             for c in cells if c["sharing"] != "dense"}  # fmt: skip
    columns = list(itertools.product(STORAGES, REDUCTIONS))
    models = {
        (storage, reduction): [
            model
            for model in dict.fromkeys(cell["model"] for cell in cells)
            if all((model, reduction, storage, w, s) in found for w in WEIGHTINGS for s in SHARINGS)
        ]
        for storage, reduction in columns
    }
    columns = [column for column in columns if models[column]]
    heads = " | ".join(f"{storage}, {reduction:.0%}" for storage, reduction in columns)
    lines = [f"| over those of layers apart | {heads} |", "|---|" + "---:|" * len(columns)]
    lines.append("| models | " + " | ".join(str(len(models[column])) for column in columns) + " |")
    for sharing, weighting in itertools.product(SHARINGS[1:], WEIGHTINGS):
        rows: dict[str, list[str]] = {}
        for storage, reduction in columns:
            ratios: dict[str, list[float]] = {}
            for model in models[storage, reduction]:
                cell, apart = (found[model, reduction, storage, weighting, each] for each in (sharing, SHARINGS[0]))
                for kind, error in errors(cell).items():
                    ratios.setdefault(f"error of {kind}", []).append(error / errors(apart)[kind])
                ratios.setdefault("perplexity", []).append(cell["perplexity"] / apart["perplexity"])
            for kind, values in ratios.items():
                rows.setdefault(kind, []).append(f"{statistics.geometric_mean(values):.3f}")
        lines += [f"| {sharing}, {weighting}: {kind} | {' | '.join(texts)} |" for kind, texts in rows.items()]
    return "\n".join(lines)


def write_tables() -> None:
    """Fill the marked place of docs/results.md."""
    cells = read_cells(RESULT)
    models = dict.fromkeys(cell["model"] for cell in cells)
    fill("shared", "\n\n".join([ratio_table(cells), *(table(cells, model) for model in models)]))


def main(arguments: list[str] | None = None) -> None:
    parser = table_parser(__doc__.splitlines()[0], RESULT)
    parser.add_argument("--reductions", nargs="*", type=float, default=list(REDUCTIONS))
    parser.add_argument("--weightings", nargs="*", default=list(WEIGHTINGS), choices=WEIGHTINGS)
    args = parser.parse_args(arguments)
    if not args.tables:
        check_models(args.models, perplexity.cases())
        run(args)
    if args.result == RESULT:
        write_tables()


if __name__ == "__main__":
    main()
