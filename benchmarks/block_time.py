"""Time to compress one block of LLaMA-2-7B, against its forward pass and against SVD-LLM's recipe.

    python benchmarks/block_time.py                        # 4, 16, 64 and 256 sequences of 2048 tokens; over an hour
    python benchmarks/block_time.py --sequences 4 --threads 2

The model is LLaMA-2-7B cut to its first block, in bfloat16. Timed on the same tokens, in turn:

* `forward`: the dense model over the calibration set, no gradients, no logits but the last.
* `ours`: `PGSVDCompressor(config).compress(model)`, everything included.
* `svd_llm`: the published recipe: a forward pass that sums a float32 `XᵀX` for each of the seven layers, Cholesky in
  float64, SVD of `W L` in float32, truncation, a triangular solve. `grams_shared` counts shared inputs once.

With few sequences the factors are also compared with the exact optimum, computed here in float64 from its definition.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from cells import RESULTS, read_cells, seconds, write_cell
from make_checkpoint import calibration_tokens, make
from torch import Tensor, nn


LENGTH, VOCABULARY = 2048, 32000
REDUCTIONS = (0.2, 0.4)
CHECKED = ("q_proj", "o_proj", "gate_proj", "down_proj")  # square, square, tall, wide
SHARED = ("k_proj", "v_proj", "up_proj")  # of the inputs of q_proj and gate_proj
MOST_CHECKED = 16  # sequences for which float64 Gram matrices are affordable
RIDGE = 1e-6  # of the mean diagonal, where Cholesky fails; SVD-LLM adds about as much

Layers = dict[str, nn.Linear]


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def linears(model: nn.Module) -> Layers:
    """The layers of the block, by their last name."""
    return {n.split(".")[-1]: m for n, m in model.get_submodule("model.layers.0").named_modules() if is_linear(m)}


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


@torch.no_grad()
def forward(model: Any, tokens: list[Tensor]) -> list[float]:
    """Seconds of each sequence."""
    times = []
    for sequence in tokens:
        start = time.perf_counter()
        model(input_ids=sequence[None], logits_to_keep=1, use_cache=False)
        times.append(time.perf_counter() - start)
    return times


@contextmanager
def watching(layers: Layers, see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Show the input rows `(T, n)` of every layer while entered."""
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: see(name, args[0].reshape(-1, args[0].shape[-1])))
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# The three things that are timed


def time_forward(dense: Any, tokens: list[Tensor], repeats: int) -> dict[str, Any]:
    forward(dense, tokens[:1])
    total, times = seconds(lambda: forward(dense, tokens), repeats)
    return {"seconds": total, "seconds_per_sequence": statistics.median(times)}


def time_ours(
    dense: Any, tokens: list[Tensor], reduction: float, repeats: int, calibration: str
) -> tuple[dict[str, Any], Any]:
    """The measurement, and the compressed model."""
    from optimum_pgsvd import PGSVDCompressor, PGSVDConfig

    config = PGSVDConfig(
        parameter_reduction=reduction,
        dataset=tokens,
        num_samples=len(tokens),
        sequence_length=LENGTH,
        batch_size=1,
        calibration=calibration,
    )
    runs, model = [], None
    for _ in range(repeats):
        del model
        model = copy.deepcopy(dense)
        runs.append(seconds(lambda model=model: PGSVDCompressor(config).compress(model)))
    total = statistics.median_low([run[0] for run in runs])
    report = next(report for time, report in runs if time == total)
    return {
        "seconds": total,
        "parts": dict(report.seconds),
        "ranks": {layer.name.split(".")[-1]: layer.rank for layer in report.layers},
        "activation_error": {layer.name.split(".")[-1]: layer.activation_error for layer in report.layers},
    }, model


def time_svd_llm(dense: Any, tokens: list[Tensor], ranks: Mapping[str, int | None]) -> dict[str, Any]:
    """SVD-LLM's recipe; the seconds of its parts, and by layer where they are summed."""
    layers = linears(dense)
    grams = {name: torch.zeros(layer.in_features, layer.in_features) for name, layer in layers.items()}
    parts = {"grams": dict.fromkeys(layers, 0.0), "cholesky": {}, "svd": {}, "solve": {}}
    notes: list[str] = []

    def add(name: str, rows: Tensor) -> None:
        start = time.perf_counter()
        rows = rows.float()
        grams[name] += rows.T @ rows
        parts["grams"][name] += time.perf_counter() - start

    start = time.perf_counter()
    with watching(layers, add):
        forward(dense, tokens)
    for name, layer in layers.items():
        parts["cholesky"][name], root = seconds(lambda name=name: cholesky(grams.pop(name), name, notes))
        parts["svd"][name], factors = seconds(
            lambda layer=layer, root=root: torch.linalg.svd(layer.weight.detach().float() @ root, full_matrices=False)
        )
        parts["solve"][name] = seconds(
            lambda name=name, factors=factors, root=root: truncate(*factors, root, ranks[name])
        )[0]
        del root, factors
    total = time.perf_counter() - start
    summed = {part: sum(by_layer.values()) for part, by_layer in parts.items()}
    shared = sum(parts["grams"][name] for name in SHARED)
    return {
        "seconds": total,
        "seconds_grams_shared": total - shared,  # computed: without the measured time of the inputs seen before
        "parts": {"forward": total - sum(summed.values()), **summed},
        "by_layer": parts,
        "notes": notes,
    }


def cholesky(gram: Tensor, name: str, notes: list[str]) -> Tensor:
    """Lower factor, computed in float64, in float32."""
    gram = gram.double()
    factor, failed = torch.linalg.cholesky_ex(gram)
    ridge = RIDGE
    while failed:
        notes.append(f"{name}: {ridge:.0e} of the mean diagonal added for Cholesky")
        factor, failed = torch.linalg.cholesky_ex(gram + ridge * gram.diagonal().mean() * torch.eye(len(gram)))
        ridge *= 10
    return factor.float()


def truncate(u: Tensor, s: Tensor, vh: Tensor, root: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
    """`W ≈ left right` with `right = S_r^½ V_rᵀ L⁻¹`."""
    scale = s[:rank].sqrt()
    right = torch.linalg.solve_triangular(root, vh[:rank], upper=False, left=False)
    return (u[:, :rank] * scale).bfloat16(), (scale[:, None] * right).bfloat16()


def uniform_ranks(layers: Layers, reduction: float) -> dict[str, int]:
    """SVD-LLM's: the same fraction of every layer."""
    return {name: int((1 - reduction) * w.weight.numel() / sum(w.weight.shape)) for name, w in layers.items()}


# The exact optimum


def exact_grams(dense: Any, tokens: list[Tensor]) -> dict[str, Tensor]:
    """Float64 throughout."""
    layers = {name: layer for name, layer in linears(dense).items() if name in CHECKED}
    grams = {name: torch.zeros(w.in_features, w.in_features, dtype=torch.float64) for name, w in layers.items()}

    def add(name: str, rows: Tensor) -> None:
        rows = rows.double()
        grams[name].addmm_(rows.T, rows)

    with watching(layers, add):
        forward(dense, tokens)
    return grams


def output_basis(weight: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Squared singular values of the outputs `X Wᵀ`, largest first, and its right singular vectors.

    A tall weight goes through the symmetric root of the Gram matrix, where no smaller matrix has all of them.
    """
    if weight.shape[0] <= weight.shape[1]:
        values, vectors = torch.linalg.eigh(weight @ gram @ weight.T)
        return values.flip(0).clamp(min=0), vectors.flip(1)
    values, vectors = torch.linalg.eigh(gram)
    outputs = weight @ (vectors * values.clamp(min=0).sqrt())
    values, vectors = torch.linalg.eigh(outputs.T @ outputs)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    return values, outputs @ (vectors / values.sqrt().clamp(min=1e-300))


def squared_error(weight: Tensor, approximation: Tensor, gram: Tensor) -> float:
    """`‖(W − Ŵ) Xᵀ‖²`."""
    difference = weight - approximation
    return float(((difference @ gram) * difference).sum())


def check(dense: Any, compressed: Any, grams: Mapping[str, Tensor]) -> dict[str, Any]:
    """Activation errors of the factors as stored, of the optimum, and of the optimum stored in the same dtype."""
    found = {}
    for name, module in compressed.get_submodule("model.layers.0").named_modules():
        name = name.split(".")[-1]
        if name not in grams or not hasattr(module, "left"):
            continue
        layer = linears(dense)[name].weight.detach()
        weight, gram, rank = layer.double(), grams[name], module.left.weight.shape[1]
        values, basis = output_basis(weight, gram)
        left = basis[:, :rank]
        rounded = left.to(layer.dtype).double() @ (left.T @ weight).to(layer.dtype).double()
        ours = module.left.weight.detach().double() @ module.right.weight.detach().double()
        energy, best = float(values.sum()), float(values[rank:].sum())
        errors = [best, squared_error(weight, rounded, gram), squared_error(weight, ours, gram)]
        optimum, rounded_error, ours_error = ((error / energy) ** 0.5 for error in errors)
        found[name] = {
            "rank": rank,
            "optimum": optimum,
            "optimum_rounded": rounded_error,
            "ours": ours_error,
            "excess": ours_error / optimum - 1,
            "excess_over_rounded": ours_error / rounded_error - 1,
        }
    return found


# Cells


def ratios(cells: list[dict[str, Any]], reduction: float) -> dict[str, float]:
    """Ours against the forward pass and against SVD-LLM, with and without the forward pass."""
    times = {cell["part"]: cell["seconds"] for cell in cells if cell.get("reduction") in (None, reduction)}
    shared = next((cell["seconds_grams_shared"] for cell in cells if cell["part"] == "svd_llm"), None)
    plain, ours = times["forward"], times["ours"]
    found = {"ours_over_forward": ours / plain}
    if shared is not None:
        theirs = times["svd_llm"]
        found |= {
            "svd_llm_over_ours": theirs / ours,
            "svd_llm_over_ours_beyond_forward": (theirs - plain) / (ours - plain),
            "svd_llm_grams_shared_over_ours": shared / ours,
            "svd_llm_grams_shared_over_ours_beyond_forward": (shared - plain) / (ours - plain),
        }
    return found


def measure(dense: Any, count: int, args: argparse.Namespace) -> None:
    """All cells of one number of sequences."""
    key = {"sequences": count, "tokens": count * LENGTH, "calibration": args.calibration}
    tokens = calibration_tokens(count, LENGTH, VOCABULARY)
    repeats = args.repeats or (3 if count <= MOST_CHECKED else 1)
    cells = [write_cell(args.result, key | {"part": "forward"}, time_forward(dense, tokens, repeats))]
    grams = exact_grams(dense, tokens) if count <= args.check else {}
    for reduction in args.reductions:
        values, compressed = time_ours(dense, tokens, reduction, repeats, args.calibration)
        if grams:
            values["against_optimum"] = check(dense, compressed, grams)
        del compressed
        gc.collect()
        cells.append(write_cell(args.result, key | {"part": "ours", "reduction": reduction}, values))
    del grams
    gc.collect()
    if not args.without_svd_llm:
        ranks = uniform_ranks(linears(dense), args.reductions[0])
        cells.append(write_cell(args.result, key | {"part": "svd_llm"}, time_svd_llm(dense, tokens, ranks)))
    for reduction in args.reductions:
        write_cell(args.result, key | {"part": "ratios", "reduction": reduction}, ratios(cells, reduction))


def table(path: Path) -> str:
    """The ratios as a table."""
    rows = [cell for cell in read_cells(path) if cell["part"] == "ratios"]
    names = list(dict.fromkeys(name for row in rows for name in row if "_over_" in name))
    lines = ["| tokens | removed | " + " | ".join(names) + " |", "|---:|---:|" + "---:|" * len(names)]
    for row in sorted(rows, key=lambda row: (row["tokens"], row["reduction"])):
        numbers = " | ".join(f"{row[name]:.2f}" if name in row else "" for name in names)
        lines.append(f"| {row['tokens']:,} | {row['reduction']:.0%} | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, nargs="+", default=[4, 16, 64, 256])
    parser.add_argument("--reductions", type=float, nargs="+", default=list(REDUCTIONS))
    parser.add_argument("--calibration", default="parallel", help="parallel or anchored")
    parser.add_argument("--repeats", type=int, help=f"default: 3 up to {MOST_CHECKED} sequences, else 1")
    parser.add_argument("--check", type=int, default=MOST_CHECKED, help="most sequences for which the optimum is made")
    parser.add_argument("--without-svd-llm", action="store_true")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--result", type=Path, default=RESULTS / "block_time.json")
    args = parser.parse_args()
    from transformers import logging

    logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        dense = load(make(Path(folder), "llama2-7b", layers=1))
        for count in args.sequences:
            measure(dense, count, args)
    print(table(args.result))


if __name__ == "__main__":
    main()
