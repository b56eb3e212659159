"""Time, memory and accuracy of the decompositions of one LLaMA-2-7B block, against SVD and SVD-LLM's recipe.

    python benchmarks/decompositions.py --threads 2           # writes results/decompositions.json; minutes
    python benchmarks/decompositions.py --table               # only print the table of it

Weights are bfloat16 with decaying spectra, Gram matrices anisotropic with outlier features. Every method gets the same
weight, rank and second moment, none of them timed:

* `ours`: `plan` measures the spectrum of the weight, `factor` finds the factors, `errors` measures them as stored.
* `ours_float64`: the same on the weight in float64. Its objective is the optimum that the others are compared with.
* `svd`: a full SVD of the weight alone, float32.
* `svd_llm`: Cholesky of the Gram matrix in float64, a full SVD of `W L` in float32, a triangular solve.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from perplexity import environment
from torch import Tensor


RESULT = Path(__file__).parent / "results" / "decompositions.json"
REDUCTION = 0.2
OUTLIERS, LOUDNESS = 4, 30.0

# Shape of the weight, and how many layers of the block have it.
SHAPES = {"q, k, v, o": ((4096, 4096), 4), "gate, up": ((11008, 4096), 2), "down": ((4096, 11008), 1)}

Factors = tuple[Tensor, Tensor]


class Layer(NamedTuple):
    """A weight `(m, n)` bfloat16, the Gram matrix of its inputs and, for m < n, the moment of its outputs, float32."""

    weight: Tensor
    gram: Tensor
    outputs: Tensor | None
    rank: int


def make_layer(m: int, n: int, seed: int) -> Layer:
    generator = torch.Generator().manual_seed(seed)

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    k = min(m, n)
    weight = (gaussian(m, k) * torch.arange(1, k + 1) ** -0.3 @ gaussian(k, n)).bfloat16()
    directions = gaussian(n, k) * torch.arange(1, k + 1) ** -0.25
    gram = directions @ directions.T
    gram.diagonal().add_(0.02 * gram.diagonal().mean())
    scale = (0.5 * gaussian(n)).exp()
    scale[torch.randperm(n, generator=generator)[:OUTLIERS]] *= LOUDNESS
    gram.mul_(scale).mul_(scale[:, None])
    outputs = moment_of_outputs(weight, gram).float() if m < n else None
    return Layer(weight, gram, outputs, int((1 - REDUCTION) * m * n / (m + n)))


def moment_of_outputs(weight: Tensor, gram: Tensor) -> Tensor:
    """`W G Wᵀ` in float64, a few rows at a time."""
    whole = weight.double()
    return torch.cat([(rows.double() @ gram.double()) @ whole.T for rows in weight.split(2048)])


def squared_error(layer: Layer, factors: Factors | None) -> float:
    """`‖(W − left right) Xᵀ‖²` in float64, of nothing at all for `None`."""
    gram, total = layer.gram.double(), 0.0
    left, right = (f.double() for f in factors) if factors else (None, None)
    for start in range(0, len(layer.weight), 2048):
        rows = layer.weight[start : start + 2048].double()
        rows = rows if left is None else rows - left[start : start + 2048] @ right
        total += float(((rows @ gram) * rows).sum())
    return total


# What is timed


def plan(layer: Layer) -> Tensor:
    from optimum_pgsvd.linalg import singular_values

    return singular_values(layer.weight)


def factor(layer: Layer) -> Factors:
    from optimum_pgsvd.linalg import balanced, output_projection, projection_of_outputs

    weight, gram, outputs, rank = layer
    if outputs is None:
        return balanced(*output_projection(weight, gram, rank))
    return balanced(*projection_of_outputs(weight, outputs, gram.diagonal(), rank))


def errors(layer: Layer, factors: Factors) -> tuple[float, float]:
    from optimum_pgsvd.linalg import relative_errors, relative_output_error, relative_weight_error

    weight, gram, outputs, _ = layer
    left, right = (f.to(layer.weight.dtype) for f in factors)
    if outputs is None:
        return relative_errors(weight, left, right, gram)
    activation_error = relative_output_error(weight, left, right, outputs, gram.diagonal())
    return relative_weight_error(weight, left, right), activation_error


def full_svd(layer: Layer) -> Factors:
    u, s, vh = torch.linalg.svd(layer.weight.float(), full_matrices=False)
    return u[:, : layer.rank] * s[: layer.rank], vh[: layer.rank]


def svd_llm(layer: Layer) -> Factors:
    root = torch.linalg.cholesky(layer.gram.double()).float()
    u, s, vh = torch.linalg.svd(layer.weight.float() @ root, full_matrices=False)
    right = torch.linalg.solve_triangular(root, vh[: layer.rank], upper=False, left=False)
    return u[:, : layer.rank] * s[: layer.rank], right


def in_float64(layer: Layer) -> Layer:
    outputs = None if layer.outputs is None else moment_of_outputs(layer.weight, layer.gram)
    return Layer(layer.weight.double(), layer.gram.double(), outputs, layer.rank)


# Measuring


def peak_kib() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def measured(call: Callable[[], Any], repeats: int) -> tuple[dict[str, Any], Any]:
    """Wall-clock seconds, all and their median, the CPU's, and MB of memory beyond what was held before."""
    wall, cpu, memory, result = [], [], [], None
    for _ in range(repeats):
        result = None
        Path("/proc/self/clear_refs").write_text("5")
        held, start, busy = peak_kib(), time.perf_counter(), time.process_time()
        result = call()
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - busy)
        memory.append((peak_kib() - held) * 1024 / 1e6)
    found = {"seconds": statistics.median(wall), "cpu_seconds": statistics.median(cpu), "peak_mb": max(memory)}
    return found | {"runs": wall}, result


def measure(name: str, repeats: int) -> dict[str, Any]:
    (m, n), count = SHAPES[name]
    layer = make_layer(m, n, seed=m + 2 * n)
    row: dict[str, Any] = {"shape": [m, n], "layers": count, "rank": layer.rank, "load": os.getloadavg()[0]}
    ours = {}
    ours["plan"], spectrum = measured(lambda: plan(layer), repeats)
    ours["factor"], factors = measured(lambda: factor(layer), repeats)
    ours["errors"], (_, activation_error) = measured(lambda: errors(layer, factors), repeats)
    row |= {"ours": ours, "activation_error": activation_error}
    found = {"ours": factors}
    row["ours_float64"], exact_spectrum, optimum = measure_float64(in_float64(layer))
    row["plan_difference"] = planned_difference(spectrum, exact_spectrum)
    for method, call in {"svd": full_svd, "svd_llm": svd_llm}.items():
        timed, found[method] = measured(lambda call=call: call(layer), 1)
        row[method] = {"factor": timed}
    best = squared_error(layer, optimum)
    row["optimum"] = (best / squared_error(layer, None)) ** 0.5
    row["optimum_excess"] = {method: squared_error(layer, f) / best - 1 for method, f in found.items()}
    print(name, json.dumps(row, indent=1), flush=True)
    return row


def measure_float64(layer: Layer) -> tuple[dict[str, Any], Tensor, Factors]:
    """Times of the plan and of the factors, and both."""
    plan_time, spectrum = measured(lambda: plan(layer), 1)
    factor_time, factors = measured(lambda: factor(layer), 1)
    return {"plan": plan_time, "factor": factor_time}, spectrum, factors


def planned_difference(values: Tensor, exact: Tensor) -> float:
    """The largest difference of the planned error e(r) where it is 0.01 or more."""
    from optimum_pgsvd.linalg import relative_tails

    planned, exact = relative_tails(values), relative_tails(exact)
    return float((planned - exact)[exact >= 0.01].abs().max())


# Reading


def block(rows: dict[str, Any], method: str, part: str) -> float:
    """Seconds of all seven layers."""
    return sum(row["layers"] * row[method][part]["seconds"] for row in rows.values())


def summary(rows: dict[str, Any]) -> dict[str, float]:
    ours = block(rows, "ours", "factor")
    return {
        "ours_plan_seconds": block(rows, "ours", "plan"),
        "ours_factor_seconds": ours,
        "ours_errors_seconds": block(rows, "ours", "errors"),
        "ours_float64_over_ours": block(rows, "ours_float64", "factor") / ours,
        "svd_over_ours": block(rows, "svd", "factor") / ours,
        "svd_llm_over_ours": block(rows, "svd_llm", "factor") / ours,
        "svd_llm_over_ours_plan_and_errors_counted": block(rows, "svd_llm", "factor")
        / sum(block(rows, "ours", part) for part in ("plan", "factor", "errors")),
    }


def table(result: dict[str, Any]) -> str:
    lines = [
        "| layers | plan | factor | errors | float64 | SVD | SVD-LLM | SVD-LLM / ours | MB | excess |",
        "|---|" + "---:|" * 9,
    ]
    for name, row in result["shapes"].items():
        times = [row["ours"][part]["seconds"] for part in ("plan", "factor", "errors")]
        times += [row[method]["factor"]["seconds"] for method in ("ours_float64", "svd", "svd_llm")]
        cells = [f"{seconds:.1f} s" for seconds in times] + [f"{times[5] / times[1]:.1f}"]
        cells += [f"{row['ours']['factor']['peak_mb']:.0f}", f"{row['optimum_excess']['ours']:.0e}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", json.dumps(result["block"], indent=1)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="more than there are free cores stalls LAPACK")
    parser.add_argument("--repeats", type=int, default=3, help="of ours; the others run once")
    parser.add_argument("--only", choices=SHAPES, help="measure these layers again, and keep the others")
    parser.add_argument("--table", action="store_true", help="print the table of the JSON, measure nothing")
    args = parser.parse_args()
    result = json.loads(RESULT.read_text(encoding="utf-8")) if args.table or args.only else {"shapes": {}}
    if not args.table:
        torch.set_num_threads(args.threads)
        factor(make_layer(256, 256, seed=0))
        result |= {"reduction": REDUCTION, "environment": environment() | {"threads": str(args.threads)}}
        result["shapes"] |= {name: measure(name, args.repeats) for name in SHAPES if args.only in (None, name)}
        result["block"] = summary(result["shapes"])
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
