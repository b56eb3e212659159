"""The paper's theory on small trained models: envelopes, fronts, Theorem 1, sensitivities, ALS, and the ablation.

    PGSVD_DATA=... python benchmarks/theory.py                     # every model that is not in the JSON yet
    PGSVD_DATA=... python benchmarks/theory.py --models demo
    python benchmarks/theory.py --tables                           # only write the tables from the JSON

One cell is one model, with what `optimum-cli pgsvd profile | sweep | bound | convergence` gives for it, less what is
listed layer by layer. Calibrated on 32 768 tokens at most; perplexity is of as many held-out ones. Theorem 1 and what
ranks its sensitivities give are measured on 8 192 tokens.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import perplexity
from ablation import REFERENCE
from cells import RESULTS, check_models, fill, read_cells, table_parser, write_cell
from perplexity import ROOT, WINDOW, read_jsonl


RESULT = RESULTS / "theory.json"
DOCUMENT = ROOT / "docs" / "theory.md"
REDUCTIONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
BOUND_AT = (0.1, 0.2, 0.4)
BOUND_SAMPLES = 32  # every layer is compressed alone, and the loss measured on all of them
ABLATION_AT = (0.2, 0.4, 0.6)
SOLVERS = ("svd", "als", "eigh")
THRESHOLDS = (0.02, 0.05, 0.1, 0.2, 0.3)
SWEEPS = 20


def cases() -> dict[str, tuple[Path, list[str], list[str]]]:
    """Model folder, calibration texts and held-out texts, by name."""
    found = {name: case[:3] for name, case in perplexity.cases().items()}
    if (folder := REFERENCE / "llama-8m").is_dir():
        found["llama-8m"] = (folder, *(read_jsonl(REFERENCE / f"{part}.jsonl") for part in ("calibration", "heldout")))
    return found


def measure(name: str, folder: Path, calibration: list[str], heldout: list[str], result: Path) -> None:
    """All of the theory on one model."""
    import torch
    from transformers import AutoModelForCausalLM

    from optimum_pgsvd import PGSVDConfig
    from optimum_pgsvd.analysis import bound_model, converge_model, evaluation_set, profile_model, sweep_model
    from optimum_pgsvd.factoring import request_at

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config = PGSVDConfig(parameter_reduction=0.0, dataset=calibration, num_samples=128, sequence_length=WINDOW)
    evaluation = evaluation_set(model, config, heldout, 128)
    start = time.perf_counter()
    profiles = profile_model(model, config).to_dict(THRESHOLDS)
    front = sweep_model(
        model, config, reductions=REDUCTIONS, allocations=["pareto", "uniform", "pareto_outputs", "loss"],
        evaluation=evaluation,
    )  # fmt: skip
    ablation = {}
    for solver in SOLVERS:
        request = request_at(config, parameter_reduction=0.0, solver=solver)
        found = sweep_model(model, request, reductions=ABLATION_AT, evaluation=evaluation)
        ablation |= {f"{solver}, {point.allocation}, {point.asked['parameter_reduction']}": point.perplexity
                     for point in found.points}  # fmt: skip
    fewer = request_at(config, parameter_reduction=0.0, num_samples=BOUND_SAMPLES)
    bounds = bound_model(model, fewer, BOUND_AT, evaluation=evaluation).to_dict()
    als = {
        str(reduction): converge_model(model, request_at(config, parameter_reduction=reduction), SWEEPS).to_dict()
        for reduction in ABLATION_AT
    }
    values = {
        "profiles": {kind: without(profiles[kind], "layers", "axis", "lower", "upper", "common")
                     for kind in ("weights", "outputs")},
        "layers": len(profiles["weights"]["layers"]),
        "dense": front.dense.perplexity,
        "sweep": [without(point, "ranks") for point in front.to_dict()["points"]],
        "sweep_seconds": dict(front.seconds),
        "ablation": ablation,
        "loss": bounds["loss"],
        "bounds": [without(bound, "layers") for bound in bounds["bounds"]],
        "spread": bounds["sensitivities"]["spread"],
        "allocations": [
            {"parameter_reduction": each["parameter_reduction"],
             "plans": {key: without(plan, "ranks") for key, plan in each["plans"].items()}}
            for each in bounds["allocations"]
        ],
        "als": {reduction: {key: found[key] for key in ("sweeps_until", "median", "worst")}
                for reduction, found in als.items()},
        "seconds": time.perf_counter() - start,
    }  # fmt: skip
    write_cell(result, {"model": name}, values)


def without(values: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


def table(heading: list[str], rows: list[list[str]]) -> str:
    """Markdown, numbers to the right."""
    lines = [f"| {' | '.join(heading)} |", "|---|" + "---:|" * (len(heading) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def envelope_table(cells: list[dict[str, Any]]) -> str:
    """Shares of layers close to their own and to the common envelope."""
    rows = [
        [f"{cell['model']}, {kind}, {name}", str(cell["layers"]),
         *(f"{share:.0%}" for share in cell["profiles"][kind]["share_of_layers_within"][name].values())]
        for cell in cells for kind in ("weights", "outputs") for name in ("own envelope", "common envelope")
    ]  # fmt: skip
    return table(["share of layers within a distance of", "layers", *(str(t) for t in THRESHOLDS)], rows)


def front_table(cells: list[dict[str, Any]]) -> str:
    """The surrogate and perplexity of one ε and of uniform ranks."""
    rows = []
    for cell in cells:
        for name in dict.fromkeys(point["allocation"] for point in cell["sweep"]):
            points = [point for point in cell["sweep"] if point["allocation"] == name]
            pairs = [(point["surrogate"] / cell["layers"], point["perplexity"]) for point in points]
            label = f"{cell['model']} ({cell['dense']:.3g}), {name}"
            rows.append([label, *(f"{error:.3f} / {perplexity:.3g}" for error, perplexity in pairs)])
    return table(["mean e / perplexity (dense)", *(f"{r:.0%}" for r in REDUCTIONS)], rows)


def bound_table(cells: list[dict[str, Any]]) -> str:
    """How loose Theorem 1 is, and whether it orders the layers."""
    predictors = {"bound": "ρ bound", "first_order": "ρ first order", "relative_error": "ρ e",
                  "relative_output_change": "ρ output error"}  # fmt: skip
    rows = []
    for cell in cells:
        for bound in cell["bounds"]:
            total, order = bound["total"], bound["rank_correlation_with_change"]
            rows.append([
                f"{cell['model']}, {bound['parameter_reduction']:.0%}", f"{total['change']:.4f}",
                f"{total['sum_of_changes_alone']:.4f}", f"{total['first_order']:.4f}", f"{total['bound']:.1f}",
                f"{total['bound_over_change']:.0f}", *(f"{order[key]:.2f}" for key in predictors),
            ])  # fmt: skip
    heading = ["model, removed", "ΔL", "Σ ΔL alone", "first order", "bound", "bound / ΔL"]
    return table([*heading, *predictors.values()], rows)


def allocation_table(cells: list[dict[str, Any]]) -> str:
    """What each surrogate gives when it is minimised, in held-out loss above the dense model's."""
    import math

    names = list(cells[0]["allocations"][0]["plans"])
    rows = [
        [f"{cell['model']}, {each['parameter_reduction']:.0%}",
         *(f"{each['plans'][name]['evaluation_loss'] - math.log(cell['dense']):.3f}" for name in names)]
        for cell in cells for each in cell["allocations"]
    ]  # fmt: skip
    return table(["model, removed", *names], rows)


def spread_table(cells: list[dict[str, Any]]) -> str:
    """How unequal the sensitivities are."""
    rows = [[cell["model"], *(f"{value:.2f}" for value in cell["spread"].values())] for cell in cells]
    return table(["α", "largest / least", "largest / median", "standard deviation / mean"], rows)


def als_table(cells: list[dict[str, Any]]) -> str:
    """The median objective over its optimum, and sweeps until it is near."""
    rows = [
        [f"{cell['model']}, {float(reduction):.0%}", *(f"{found['median'][s] - 1:.2%}" for s in (0, 1, 2, 5, 10, 20)),
         f"{found['worst'][10] - 1:.1%}",
         *(str(found["sweeps_until"][f"median within {e} of the optimum"] or "–") for e in ("10.0%", "1.0%", "0.1%"))]
        for cell in cells for reduction, found in cell["als"].items()
    ]  # fmt: skip
    return table(
        [
            "model, removed",
            *(f"{s}" for s in (0, 1, 2, 5, 10, 20)),
            "worst at 10",
            "sweeps to 10%",
            "to 1%",
            "to 0.1%",
        ],
        rows,
    )


def ablation_table(cells: list[dict[str, Any]]) -> str:
    """{svd, als, eigh} × {uniform, pareto}: perplexity."""
    rows = [
        [f"{cell['model']}, {solver}", *(f"{cell['ablation'][f'{solver}, {allocation}, {reduction}']:.4g}"
                                        for reduction in ABLATION_AT for allocation in ("uniform", "pareto"))]
        for cell in cells for solver in SOLVERS
    ]  # fmt: skip
    heading = [f"{reduction:.0%}, {allocation}" for reduction in ABLATION_AT for allocation in ("uniform", "pareto")]
    return table(["perplexity", *heading], rows)


TABLES = {
    "envelopes": envelope_table, "fronts": front_table, "bounds": bound_table, "spread": spread_table,
    "allocations": allocation_table, "als": als_table, "ablation": ablation_table,
}  # fmt: skip


def main(given: list[str] | None = None) -> None:
    arguments = table_parser(__doc__.splitlines()[0], RESULT).parse_args(given)
    if not arguments.tables:
        check_models(arguments.models, cases())
        done = {cell["model"] for cell in read_cells(arguments.result)}
        for name, case in cases().items():
            if name not in done and name in (arguments.models or cases()):
                measure(name, *case, arguments.result)
    if cells := read_cells(arguments.result):
        for name, made in TABLES.items():
            fill(f"theory:{name}", made(cells), DOCUMENT)


if __name__ == "__main__":
    main()
