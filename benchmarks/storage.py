"""What pivoted storage costs in accuracy and takes in time, against plain factors and dense layers.

    PGSVD_DATA=... python benchmarks/storage.py errors      # what rounding adds, on trained and on drawn layers
    python benchmarks/storage.py times [--repeats 9]        # forward passes of LLaMA-like layers, and the conversion

Added errors are `‖(Ŵ − W_r) Xᵀ‖ / ‖W Xᵀ‖` of what is stored against the exact product, and, where a layer runs in half
precision, the same of the outputs of its forward pass. Forward passes are timed in turn, dense, factors and pivoted,
so that what else the machine does falls on all alike; the ratios are to dense, of medians over the repeats.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from cells import RESULTS, write_cell
from perplexity import WINDOW, cases
from torch import Tensor, nn

from optimum_pgsvd import LowRankLinear, PivotedLinear
from optimum_pgsvd.linalg import balanced, output_projection
from optimum_pgsvd.replace import replace_linear
from optimum_pgsvd.storing import stored
from optimum_pgsvd.structures import LinearShape, LowRankFactors, Moments


RESULT = RESULTS / "storage.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FRACTIONS = (0.05, 0.25, 0.5, 0.75, 0.9)
DRAWN = ((512, 512), (1024, 1024), (2048, 1024), (1024, 2048), (2048, 2048))
SHAPES = {"attention": (4096, 4096), "up": (11008, 4096), "down": (4096, 11008)}
KEPT = (0.8, 0.6)


# Errors


def trained() -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, weight and Gram matrix of every layer that would be compressed in the models of `perplexity.cases`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from optimum_pgsvd import PGSVDConfig
    from optimum_pgsvd.calibration.data import pack
    from optimum_pgsvd.targets import find_targets

    for name, (folder, texts, _, samples) in cases().items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        windows = torch.stack(pack(texts, AutoTokenizer.from_pretrained(folder), num_samples=samples, length=WINDOW))
        grams: dict[str, Tensor] = {}
        for layer in find_targets(model, PGSVDConfig(tolerance=0.5)).names:

            def add(module: nn.Module, args: tuple[Tensor], layer: str = layer, grams: dict = grams) -> None:
                rows = args[0].flatten(0, -2).double()
                grams[layer] = grams.get(layer, 0) + rows.T @ rows

            model.get_submodule(layer).register_forward_pre_hook(add)
        with torch.no_grad():
            for batch in windows.split(16):
                model(input_ids=batch)
        for layer, gram in grams.items():
            yield f"{name}: {layer}", model.get_submodule(layer).weight.detach().double(), gram


def drawn(kind: str, m: int, n: int) -> tuple[Tensor, Tensor]:
    """A weight and a Gram matrix: `white`, both without structure; or `correlated`, singular values over a hundred."""
    source = torch.Generator().manual_seed(0)
    weight, gram = torch.randn(m, n, generator=source) * 0.02, torch.eye(n) * n
    if kind == "correlated":
        u, _, v = torch.linalg.svd(weight, full_matrices=False)
        weight = u * torch.logspace(0, -2, len(v)) @ v
        turned = torch.linalg.qr(torch.randn(n, n, generator=source))[0]
        gram = turned * torch.logspace(0, -4, n) @ turned.T
    return weight, gram


def energy(errors: Tensor, gram: Tensor) -> float:
    return float(((errors.double() @ gram.double()) * errors).sum().clamp(min=0).sqrt())


def added(weight: Tensor, gram: Tensor, rank: int, dtype: torch.dtype) -> dict[str, float]:
    """What each storage adds; `pivoted, by outputs` knows only the second moment of the outputs."""
    rounded = weight.to(dtype)
    gram = gram.to(torch.float32 if dtype != torch.float32 else torch.float64)
    factors = LowRankFactors(*balanced(*output_projection(rounded, gram, rank)))
    exact, size = factors.left.double() @ factors.right.double(), energy(rounded.double(), gram)
    moments = {"pivoted": Moments(gram, None, gram.diagonal())}
    if weight.shape[0] < weight.shape[1]:
        outputs = rounded.to(gram.dtype) @ gram @ rounded.to(gram.dtype).T
        moments["pivoted, by outputs"] = Moments(None, outputs, gram.diagonal())
    kept = {"factors": factors.to(dtype)} | {k: stored(factors, m, "pivoted", dtype) for k, m in moments.items()}
    found = {k: energy(f.left.double() @ f.right.double() - exact, gram) / size for k, f in kept.items()}
    if dtype != torch.float32:
        found |= {f"{k}, forward": forward_error(weight, gram, f, exact, dtype) for k, f in kept.items()}
    return found


@torch.no_grad()
def forward_error(weight: Tensor, gram: Tensor, kept: Any, exact: Tensor, dtype: torch.dtype) -> float:
    """Relative error of a forward pass in a dtype, on 256 inputs drawn with this second moment."""
    m, n = weight.shape
    model = nn.Sequential(nn.Linear(n, m, bias=False, dtype=dtype))
    layer = replace_linear(model, "0", kept)
    values, vectors = torch.linalg.eigh(gram.double())
    noise = torch.randn(256, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = (noise * values.clamp(min=0).sqrt()) @ vectors.T
    x = (x / x.std()).to(dtype)
    wanted = x.double() @ exact.T
    return float((layer(x).double() - wanted).norm() / (x.double() @ weight.double().T).norm())


def summary(ratios: list[float]) -> dict[str, float]:
    ordered = sorted(ratios)
    return {"median": statistics.median(ordered), "least": ordered[0], "most": ordered[-1], "layers": len(ordered)}


def measure_trained(every: int) -> None:
    """A cell for each dtype and part of the full rank: ratios to plain factors over all layers."""
    layers = list(trained())[::every]
    for dtype in DTYPES:
        for fraction in FRACTIONS:
            found = [(name, added(w, g, max(int(fraction * min(w.shape)), 1), DTYPES[dtype])) for name, w, g in layers]
            kinds = dict.fromkeys(kind for _, errors in found for kind in errors)
            factors = {"factors": statistics.median(errors["factors"] for _, errors in found)}
            ratios = {
                kind: summary([e[kind] / e[base_of(kind)] for _, e in found if kind in e])
                for kind in kinds
                if kind != base_of(kind)
            }
            worst = max(found, key=lambda item: item[1]["pivoted"] / item[1]["factors"])[0]
            key = {"what": "errors", "layers": "trained", "dtype": dtype, "of_full_rank": fraction}
            write_cell(RESULT, key, {"added_by": factors, "ratio_to_factors": ratios, "worst": worst})


def base_of(kind: str) -> str:
    """What a kind is compared with."""
    return "factors, forward" if kind.endswith("forward") else "factors"


def measure_drawn(largest: int) -> None:
    """A cell for each drawn layer, dtype and rank."""
    for kind in ("white", "correlated"):
        for m, n in [shape for shape in DRAWN if max(shape) <= largest]:
            weight, gram = drawn(kind, m, n)
            for dtype in DTYPES:
                for fraction in FRACTIONS:
                    errors = added(weight, gram, int(fraction * min(m, n)), DTYPES[dtype])
                    ratios = {k: e / errors[base_of(k)] for k, e in errors.items() if k != base_of(k)}
                    key = {"what": "errors", "layers": kind, "m": m, "n": n, "dtype": dtype, "of_full_rank": fraction}
                    write_cell(RESULT, key, {"added_by": errors, "ratio_to_factors": ratios})


# Times


def rank_that_keeps(m: int, n: int, kept: float, storage: str) -> int:
    """The largest rank that keeps at most this part of the parameters."""
    shape = LinearShape(m, n, storage)
    return max(rank for rank in range(1, shape.full_rank) if shape.parameters(rank) <= kept * m * n)


def layers_of(m: int, n: int, ranks: dict[str, int], dtype: torch.dtype) -> dict[str, nn.Module]:
    """A dense layer, and low-rank ones in each storage, with weights drawn."""
    made: dict[str, nn.Module] = {"dense": nn.Linear(n, m, bias=False, dtype=dtype)}
    for name, (storage, rank) in {k: (k.split(" ")[0], rank) for k, rank in ranks.items()}.items():
        kind = {"factors": LowRankLinear, "pivoted": PivotedLinear}[storage]
        made[name] = kind(n, m, rank, bias=False, dtype=dtype)
        if storage == "pivoted":
            made[name].order = torch.randperm(m, generator=torch.Generator().manual_seed(0)).int()
    return made


def in_turn(calls: dict[str, Callable[[], Any]], repeats: int, inner: int) -> dict[str, list[float]]:
    """Seconds of one call of each, over repeats in which they take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(inner):
                call()
            if repeat:  # the first is to warm up
                times[name].append((time.perf_counter() - start) / inner)
    return times


@torch.inference_mode()
def measure_forward(repeats: int, tokens: int) -> None:
    """A cell for each shape, dtype, and part of the parameters that factors keep."""
    for dtype in ("float32", "bfloat16"):
        for name, (m, n) in SHAPES.items():
            for kept in KEPT:
                equal = rank_that_keeps(m, n, kept, "factors")
                ranks = {
                    "factors": equal,
                    "pivoted at equal rank": equal,
                    "pivoted at equal parameters": rank_that_keeps(m, n, kept, "pivoted"),
                }
                layers = layers_of(m, n, ranks, DTYPES[dtype])
                for phase, rows, inner in (("prefill", tokens, 1), ("decode", 1, 10)):
                    x = torch.randn(1, rows, n, dtype=DTYPES[dtype])
                    times = in_turn({k: lambda layer=v, x=x: layer(x) for k, v in layers.items()}, repeats, inner)
                    medians = {k: statistics.median(v) for k, v in times.items()}
                    key = {"what": "times", "layer": name, "dtype": dtype, "kept": kept, "phase": phase}
                    values = {
                        "tokens": rows,
                        "ranks": ranks,
                        "seconds": medians,
                        "ratio_to_dense": {k: v / medians["dense"] for k, v in medians.items()},
                    }
                    write_cell(RESULT, key, values)


def measure_conversion(sizes: tuple[int, ...]) -> None:
    """A cell for each size: processor seconds of the closed form, and of storing it."""
    for size in sizes:
        weight, gram = drawn("correlated", size, size)
        rank, weight = size // 2, weight.bfloat16()
        start = time.process_time()
        factors = LowRankFactors(*balanced(*output_projection(weight, gram, rank)))
        solved = time.process_time()
        stored(factors, Moments(gram, None, gram.diagonal()), "pivoted", torch.bfloat16)
        converted = time.process_time()
        values = {"rank": rank, "eigh_seconds": solved - start, "pivoted_seconds": converted - solved}
        write_cell(RESULT, {"what": "conversion", "size": size}, values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["errors", "times"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=512, help="of prefill")
    parser.add_argument("--every", type=int, default=1, help="measure every so-manieth trained layer")
    parser.add_argument("--largest", type=int, default=2048, help="dimension of drawn layers")
    parser.add_argument("--conversion", type=int, nargs="*", default=[1024, 2048, 4096], help="sizes to convert")
    arguments = parser.parse_args()
    if arguments.what == "errors":
        measure_trained(arguments.every)
        measure_drawn(arguments.largest)
    else:
        measure_forward(arguments.repeats, arguments.tokens)
        measure_conversion(tuple(arguments.conversion))


if __name__ == "__main__":
    main()
