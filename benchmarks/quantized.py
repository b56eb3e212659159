"""Low-rank, then quantized: held-out perplexity against the bytes of the target layers, beside the dense model's.

    PGSVD_DATA=... python benchmarks/quantized.py             # every cell that is not in the JSON yet
    python benchmarks/quantized.py --models demo --reductions 0.4
    python benchmarks/quantized.py --tables                   # only write the tables from the JSON

Needs `torchao` and `bitsandbytes`. Models are compressed in bfloat16. Then each weight of the target layers goes
through torchao's `quantize_` (int8: a scale a row; fewer bits: a bfloat16 scale for each group of inputs, as near to
32 of them as divides their number, so that any rank will do) or bitsandbytes' NF4 (blocks of 64), and perplexity is
measured with what the weights are then, in float32. Bytes are those of the weights at their bits, of the scales, and
of the indices of pivoted storage; the zero points of torchao's symmetric schemes are all 0 and are not counted.

Two factors of a layer stay the same weight with any invertible matrix and its inverse between them. Gauges are such
matrices: none, a random rotation, a scale for each component that makes the largest entries of the columns of `left`
equal, and the rotation, then the scales.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable
from typing import Any

import perplexity
import torch
from cells import RESULTS, check_models, fill, read_cells, table_parser, write_cell
from perplexity import WINDOW
from torch import Tensor, nn


RESULT = RESULTS / "quantized.json"
SEED = 0
REDUCTIONS = (0.2, 0.4)
METHODS: dict[str, dict[str, Any]] = {
    "dense": {},
    "PGSVD": {"storage": "factors"},
    "best, no refinement, factors": {"storage": "factors", "refine_steps": 0},
    "best, no refinement": {"storage": "pivoted", "refine_steps": 0},
    "best": {"storage": "pivoted"},
}
SCHEMES = ("bf16", "int8", "int6", "int5", "int4", "nf4", "int3", "int2")
GROUP, BLOCK = 32, 64
GAUGES = ("as stored", "rotated", "equalised", "rotated, equalised")


def group_of(inputs: int) -> int:
    """The divisor of a number of inputs that is nearest to `GROUP`, as a ratio."""
    divisors = [d for d in range(1, inputs + 1) if inputs % d == 0]
    return min(divisors, key=lambda d: abs(math.log(d / GROUP)))


def quantized(weight: Tensor, scheme: str) -> tuple[Tensor, int]:
    """What a weight `(m, n)` float32 becomes, and its bytes with its scales."""
    if scheme == "bf16":
        return weight.bfloat16().float(), 2 * weight.numel()
    if scheme == "nf4":
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        # As one row: on a CPU, version 0.50.2 reads blocks that go on in the next row with wrong scales.
        packed, state = quantize_4bit(weight.reshape(1, -1), blocksize=BLOCK, quant_type="nf4")
        return dequantize_4bit(packed, state).float().view_as(weight), packed.nbytes + state.absmax.nbytes
    bits = int(scheme.removeprefix("int"))
    stored = by_torchao(weight, bits)
    return stored.dequantize().float(), math.ceil(bits * stored.qdata.numel() / 8) + stored.scale.nbytes


def by_torchao(weight: Tensor, bits: int) -> Any:
    """The quantized tensor that torchao puts in the place of a weight."""
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    if bits == 8:
        config: Any = Int8WeightOnlyConfig()
    else:
        granularity = PerGroup(group_of(weight.shape[1]))
        config = IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{bits}"), granularity=granularity, scale_dtype=torch.bfloat16
        )
    quantize_(linear, config)
    return linear.weight.data


def gauged(left: Tensor, right: Tensor, gauge: str) -> tuple[Tensor, Tensor]:
    """Other factors of the same product, float64."""
    left, right = left.double(), right.double()
    if "rotated" in gauge:
        random = torch.randn(len(right), len(right), generator=torch.Generator().manual_seed(SEED), dtype=left.dtype)
        rotation = torch.linalg.qr(random).Q
        left, right = left @ rotation.T, rotation @ right
    if "equalised" in gauge:
        largest = left.abs().amax(dim=0).clamp(min=torch.finfo(left.dtype).tiny)
        left, right = left / largest, right * largest[:, None]
    return left, right


@torch.no_grad()
def quantize(model: Any, targets: list[str], scheme: str, gauge: str) -> int:
    """Quantize the target layers in place; gives their bytes."""
    from optimum_pgsvd.modeling_pgsvd import LowRankLayer, LowRankLinear

    total = 0
    for name in targets:
        layer = model.get_submodule(name)
        if isinstance(layer, LowRankLinear) and gauge != "as stored":
            layer.left.weight[:], layer.right.weight[:] = gauged(layer.left.weight, layer.right.weight, gauge)
        for linear in layer.linears().values() if isinstance(layer, LowRankLayer) else [layer]:
            linear.weight[:], count = quantized(linear.weight.detach().clone(), scheme)
            total += count
        total += sum(buffer.nbytes for buffer in layer.buffers(recurse=False))
    return total


def products(model: Any, targets: list[str]) -> dict[str, Tensor]:
    """The weight that each target layer stands for, float64."""
    from optimum_pgsvd.modeling_pgsvd import LowRankLayer

    layers = {name: model.get_submodule(name) for name in targets}
    return {
        name: layer.matrix(torch.float64) if isinstance(layer, LowRankLayer) else layer.weight.detach().double()
        for name, layer in layers.items()
    }


@torch.no_grad()
def grams(model: Any, targets: list[str], windows: Tensor) -> dict[str, Tensor]:
    """The second moment of each target layer's inputs, float64."""
    from optimum_pgsvd.calibration import GramRecorder

    layers = {name: model.get_submodule(name) for name in targets}
    with GramRecorder(layers, lambda x, value: value.reshape(-1, value.shape[-1])) as recorder:
        for batch in windows.split(16):
            model(input_ids=batch)
    found = {name: recorder.moments(name).gram for name in targets}
    return {name: gram.double() for name, gram in found.items() if gram is not None}


@torch.no_grad()
def output_error(before: dict[str, Tensor], after: dict[str, Tensor], moments: dict[str, Tensor]) -> float:
    """Root mean square over the layers of `‖(W − Ŵ) Xᵀ‖ / ‖W Xᵀ‖`."""

    def energy(weight: Tensor, gram: Tensor) -> float:
        return float(((weight @ gram) * weight).sum())

    ratios = [energy(after[n] - w, moments[n]) / energy(w, moments[n]) for n, w in before.items()]
    return math.sqrt(sum(ratios) / len(ratios))


def compressed(model: Any, tokenizer: Any, method: str, reduction: float, calibration: list[str], samples: int) -> Any:
    """A copy of a model, low-rank by a method, in float32 with weights that bfloat16 can hold."""
    from optimum_pgsvd import PGSVDCompressor, PGSVDConfig

    model = copy.deepcopy(model)
    if method != "dense":
        make: Callable[..., PGSVDConfig] = PGSVDConfig if method == "PGSVD" else PGSVDConfig.best
        config = make(
            reduction, dataset=calibration, num_samples=samples, sequence_length=WINDOW, seed=SEED, **METHODS[method]
        )  # fmt: skip
        PGSVDCompressor(config).compress(model, tokenizer=tokenizer)
    return nn.Module.float(model)  # a quantized model's own refuses


def run(args: argparse.Namespace) -> None:
    """Measure every cell that is not in the JSON yet."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from optimum_pgsvd import PGSVDConfig
    from optimum_pgsvd.calibration.data import pack
    from optimum_pgsvd.targets import find_targets

    options = {"num_samples": 128, "length": WINDOW}
    for name, (folder, calibration, evaluation, samples) in perplexity.cases().items():
        if args.models and name not in args.models:
            continue
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        windows = torch.stack(pack(evaluation, tokenizer, **options))
        targets = list(find_targets(model, PGSVDConfig(0.5, solver="svd")).names)
        seen = grams(copy.deepcopy(model).float(), targets, torch.stack(pack(calibration, tokenizer, **options)))
        for method, settings in METHODS.items():
            for reduction in args.reductions if settings else [0.0]:
                key = {"model": name, "method": method, "reduction": reduction}
                gauges = GAUGES if settings.get("storage") == "factors" else GAUGES[:1]
                wanted = [
                    {**key, "scheme": scheme, "gauge": gauge}
                    for scheme in args.schemes
                    for gauge in (gauges if scheme != "bf16" else gauges[:1])
                ]
                done = read_cells(args.result)
                missing = [cell for cell in wanted if not any(cell.items() <= other.items() for other in done)]
                if missing and (not args.methods or method in args.methods):
                    low_rank = compressed(model, tokenizer, method, reduction, calibration, samples)
                    measure(low_rank, missing, targets, windows, seen, args)


def measure(
    model: Any, cells: list[dict[str, Any]], targets: list[str], windows: Tensor, seen: dict[str, Tensor],
    args: argparse.Namespace,
) -> None:  # fmt: skip
    """Quantize copies of a model in all ways that are missing, and write what they lose."""
    before = products(model, targets)
    for cell in cells:
        copied = copy.deepcopy(model)
        count = quantize(copied, targets, cell["scheme"], cell["gauge"])
        error = output_error(before, products(copied, targets), seen)
        values = {"bytes": count, "perplexity": perplexity.perplexity(copied, windows), "quantization_error": error}
        write_cell(args.result, cell, values)


def title(cell: dict[str, Any]) -> str:
    """Method and reduction, as rows are called."""
    return cell["method"] if cell["method"] == "dense" else f"{cell['method']}, {cell['reduction']:.0%} removed"


def front(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cells than which none is better at no more bytes, from small to large."""
    found: list[dict[str, Any]] = []
    for cell in sorted(cells, key=lambda cell: (cell["bytes"], cell["perplexity"])):
        if not found or cell["perplexity"] < found[-1]["perplexity"]:
            found.append(cell)
    return found


def size_table(cells: list[dict[str, Any]], model: str) -> str:
    """Perplexity by method and scheme, with the bytes, as stored; and which of them are the best for their bytes."""
    mine = [cell for cell in cells if cell["model"] == model and cell["gauge"] == "as stored"]
    whole = next(c["bytes"] for c in mine if c["method"] == "dense" and c["scheme"] == "bf16")
    best = front(mine)
    lines = [f"| {model} | " + " | ".join(SCHEMES) + " |", "|---|" + "---:|" * len(SCHEMES)]
    for row in dict.fromkeys(map(title, mine)):
        texts = []
        for scheme in SCHEMES:
            cell = next((c for c in mine if title(c) == row and c["scheme"] == scheme), None)
            text = f"{cell['perplexity']:.4g} ({cell['bytes'] / whole:.1%})" if cell else ""
            texts.append(f"**{text}**" if cell in best else text)
        lines.append(f"| {row} | {' | '.join(texts)} |")
    return "\n".join([*lines, "", f"100 % is {whole:,} bytes."])


def gauge_table(cells: list[dict[str, Any]], schemes: tuple[str, ...] = ("int8", "int4", "nf4", "int3")) -> str:
    """The error that quantization makes and the perplexity in every gauge, of those as stored: geometric means."""
    kept = {(c["model"], title(c), c["scheme"]): c for c in cells if c["gauge"] == "as stored"}
    lines = ["| gauge | " + " | ".join(schemes) + " |", "|---|" + "---:|" * len(schemes)]
    for gauge in GAUGES[1:]:
        texts = []
        for scheme in schemes:
            pairs = [
                (c, kept[c["model"], title(c), scheme]) for c in cells if c["gauge"] == gauge and c["scheme"] == scheme
            ]
            means = [
                math.exp(sum(math.log(a[field] / b[field]) for a, b in pairs) / len(pairs))
                for field in ("quantization_error", "perplexity")
                if pairs
            ]
            texts.append(f"{means[0]:.3f}, {means[1]:.4f} ({len(pairs)})" if means else "")
        lines.append(f"| {gauge} | {' | '.join(texts)} |")
    return "\n".join(lines)


def write_tables() -> None:
    """Fill the marked places of docs/results.md."""
    cells = read_cells(RESULT)
    fill("quantized", "\n\n".join(size_table(cells, model) for model in dict.fromkeys(c["model"] for c in cells)))
    fill("gauges", gauge_table(cells))


def main(arguments: list[str] | None = None) -> None:
    parser = table_parser(__doc__.splitlines()[0], RESULT)
    parser.add_argument("--methods", nargs="*", default=[], choices=list(METHODS), help="only these")
    parser.add_argument("--reductions", nargs="*", type=float, default=list(REDUCTIONS))
    parser.add_argument("--schemes", nargs="*", default=list(SCHEMES), choices=SCHEMES)
    args = parser.parse_args(arguments)
    if not args.tables:
        check_models(args.models, perplexity.cases())
        run(args)
    if args.result == RESULT:
        write_tables()


if __name__ == "__main__":
    main()
