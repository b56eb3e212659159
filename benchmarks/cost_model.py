"""What compressing a checkpoint block by block should cost: memory, disk and time, from the shapes of any config.

    python benchmarks/cost_model.py                                     # published models, rates of this machine
    python benchmarks/cost_model.py path/to/config_or_checkpoint --sequences 64
    python benchmarks/cost_model.py --compare                           # with the measured cells in results/

Operations are counted on the meta device, so no weight is read. Rates are measured first, with as many threads as the
work would have; a symmetric product counts half. The model knows no overhead: what a measured cell takes beyond it is
what the code could still gain, or what the counts leave out. Calibration is `"parallel"`, the solver `"eigh"`.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cells import GIB, RESULTS, read_cells, seconds, write_cell
from make_checkpoint import MODELS, meta_model, model_config
from torch.nn.functional import linear
from torch.utils.flop_counter import FlopCounterMode


EIGH, EIGVALSH = 9.0, 4 / 3  # n³ operations: with vectors, divide and conquer; values alone
Rates = Mapping[str, float]
Work = dict[str, float]  # operations or bytes by the rate they run at


@dataclass(frozen=True)
class Layer:
    """One linear `(m, n)`; layers of one leader are fed the same tensor."""

    m: int
    n: int
    leader: int

    def plan(self) -> Work:
        """The spectrum of the smaller moment of the weight."""
        side = min(self.m, self.n)
        return {"product32": 2 * self.m * self.n * side, "eigen32": EIGVALSH * side**3}

    def solve(self, rank: float, by_outputs: bool) -> Work:
        """The closed form: the moment of the outputs, its eigenvectors, the factors, their errors as stored."""
        m, n = self.m, self.n
        factor = 2 * rank * m * n
        if by_outputs:
            exact = 2 * rank * m**2 + 4 * rank**2 * m
            return {"product32": 2 * m**2 * n + 3 * factor, "product64": exact, "eigen32": EIGH * m**3}
        errors = 2 * factor + 4 * m * n**2
        if m <= n:
            return {"product32": factor + errors, "product64": 2 * m * n**2 + m**2 * n, "eigen32": EIGH * m**3}
        orthogonal = 2 * m * n**2 + 2 * factor
        return {"product32": orthogonal + errors, "product64": 4 / 3 * n**3, "eigen32": EIGH * n**3}


def by_outputs(group: Sequence[Layer]) -> bool:
    """Whether the moments of the outputs of layers that share an input are fewer numbers than that of the input."""
    return all(layer.m < layer.n for layer in group) and sum(layer.m**2 for layer in group) < group[0].n ** 2


@dataclass(frozen=True)
class Block:
    """One repeated block: its parameters, its linears, and the operations of its forward pass on one sequence."""

    parameters: int
    layers: tuple[Layer, ...]
    forward_flops: float

    @property
    def groups(self) -> list[list[Layer]]:
        """The layers by the input they share."""
        leaders = dict.fromkeys(layer.leader for layer in self.layers)
        return [[layer for layer in self.layers if layer.leader == leader] for leader in leaders]

    def moments(self) -> float:
        """Numbers in the moments that are summed."""
        return sum(sum(x.m**2 for x in g) if by_outputs(g) else g[0].n ** 2 for g in self.groups)

    def work(self, sequences: int, tokens: int, reduction: float) -> Iterator[tuple[str, Work]]:
        """By step: every weight is read for the plan and again for the walk, which is one forward pass."""
        size = 2 * self.parameters
        yield "plan", {"read": size}
        yield "walk", {"read": size, "write": size * (1 - reduction), "product16": self.forward_flops * sequences}
        yield "moments", {"product16": tokens * self.moments()}
        for group in self.groups:
            for layer in group:
                rank = (1 - reduction) * layer.m * layer.n / (layer.m + layer.n)
                yield "plan", layer.plan()
                yield "factors", layer.solve(rank, by_outputs(group))


@dataclass(frozen=True)
class Shapes:
    """A model as far as its costs go."""

    blocks: tuple[Block, ...]
    parameters: int
    hidden: int
    length: int

    @classmethod
    def of(cls, config: Any, length: int = 2048) -> Shapes:
        """Count a causal language model on sequences of this length."""
        from optimum_pgsvd.targets import find_blocks

        model = meta_model(config)
        names, inputs, counter = find_blocks(model), Inputs(model), FlopCounterMode(display=False)
        with inputs, counter, torch.no_grad():
            ids = torch.zeros(1, length, dtype=torch.long, device="meta")
            mask = torch.zeros(1, 1, length, length, device="meta")  # given, or one would be made from the ids' values
            model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
        flops = {name.split(".", 1)[-1]: sum(by.values()) for name, by in counter.get_flop_counts().items()}
        blocks = tuple(
            Block(
                sum(p.numel() for p in model.get_submodule(name).parameters()),
                tuple(layer for path, layer in inputs.layers.items() if path.startswith(f"{name}.")),
                flops[name],
            )
            for name in names
        )
        width = config.get_text_config().hidden_size
        return cls(blocks, sum(p.numel() for p in model.parameters()), width, length)

    def block_bytes(self, itemsize: int) -> int:
        """Of the largest block."""
        return max(block.parameters for block in self.blocks) * itemsize

    def gram_bytes(self, itemsize: int) -> int:
        """Of the Gram matrices of the inputs of a block, the block that has most of them."""
        return max(sum(group[0].n ** 2 for group in block.groups) for block in self.blocks) * itemsize


class Inputs(ExitStack):
    """Sees which linears of a model are fed the very same tensor."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.layers: dict[str, Layer] = {}
        self._seen: list[torch.Tensor] = []
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                self.callback(module.register_forward_pre_hook(self.before(name)).remove)

    def before(self, name: str):
        def hook(module: Any, args: tuple) -> None:
            self._seen.append(args[0])  # held, so that no later tensor can have its id
            self.layers[name] = Layer(*module.weight.shape, id(args[0]))

        return hook


# Rates of this machine


def measure_rates(folder: Path) -> dict[str, float]:
    """Operations or bytes a second, median of three; `product16` is that of a bfloat16 linear."""
    rows, weight = torch.randn(8192, 4096), torch.randn(11008, 4096)
    low, moment = (rows[:2048].bfloat16(), weight.bfloat16()), rows.T @ rows
    double = moment[:2048, :2048].double()
    counts = {
        "product16": (2 * 2048 * 4096 * 11008, lambda: linear(*low)),
        "product32": (2 * 4096**3, lambda: moment @ moment),
        "product64": (2 * 2048**3, lambda: double @ double),
        "eigen32": (EIGH * 4096**3, lambda: torch.linalg.eigh(moment)),
    }
    rates = {name: count / seconds(work, 3)[0] for name, (count, work) in counts.items()}
    return rates | disk_rates(folder)


def disk_rates(folder: Path, size: int = 2**28) -> dict[str, float]:
    """Bytes a second to and from the disk itself, not the system's cache."""
    data = os.urandom(2**20) * (size // 2**20)

    def write() -> None:
        with open(folder / "rate", "wb") as file:
            file.write(data)
            os.fsync(file.fileno())

    def read() -> None:
        with open(folder / "rate", "rb") as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while file.read(2**24):
                pass

    return {"write": size / seconds(write, 3)[0], "read": size / seconds(read, 3)[0]}


# Costs


def predict(shapes: Shapes, rates: Rates, sequences: int, reduction: float) -> dict[str, Any]:
    """Bytes of memory and disk, and seconds by step."""
    times: dict[str, float] = {}
    tokens = sequences * shapes.length
    for block in shapes.blocks:
        for step, work in block.work(sequences, tokens, reduction):
            times[step] = times.get(step, 0.0) + sum(amount / rates[rate] for rate, amount in work.items())
    targets = sum(layer.m * layer.n for block in shapes.blocks for layer in block.layers)
    activations = 4 * tokens * shapes.hidden  # of every token the embedding and the hidden state, in bfloat16
    return {
        "memory": shapes.block_bytes(2) + shapes.gram_bytes(4) + GIB,
        "disk": 2 * (shapes.parameters - reduction * targets) + activations,
        "seconds": sum(times.values()),
        "steps": times,
    }


def table(names: list[str], rates: Rates, sequences: int, length: int, reduction: float) -> str:
    lines = ["| model | parameters | memory | disk | hours | s/block | by step |", "|---|" + "---:|" * 5 + "---|"]
    for name in names:
        shapes = Shapes.of(config_of(name), length)
        cost = predict(shapes, rates, sequences, reduction)
        blocks = len(shapes.blocks)
        size, hours = shapes.parameters / 1e9, cost["seconds"] / 3600
        by_step = ", ".join(f"{step} {time / blocks:.1f}" for step, time in cost["steps"].items())
        lines.append(
            f"| {name} | {size:.1f} G | {cost['memory'] / GIB:.1f} GiB | {cost['disk'] / 1e9:.1f} GB "
            f"| {hours:.2f} | {cost['seconds'] / blocks:.1f} | {by_step} |"
        )
    return "\n".join(lines)


def config_of(name: str) -> Any:
    """Of one of `MODELS`, a folder, or a name on the Hub."""
    from transformers import AutoConfig

    return model_config(name) if name in MODELS else AutoConfig.from_pretrained(name)


def compare(rates: Rates) -> str:
    """Measured over predicted, for every cell of the other benchmarks."""
    lines = ["| cell | measured s | predicted s | ratio | peak memory | predicted | ratio |", "|---|" + "---:|" * 6]
    for c in read_cells(RESULTS / "streaming.json"):
        if c["way"] == "stream" and c["calibration"] == "parallel":
            shapes = Shapes.of(model_config(c["model"], c["layers"]), c["length"])
            cost = predict(shapes, rates, c["sequences"], c["reduction"])
            lines.append(
                f"| {c['model']}, {c['layers']} blocks, {c['tokens']:,} tokens | {c['seconds']:.0f} "
                f"| {cost['seconds']:.0f} | {c['seconds'] / cost['seconds']:.2f} | {c['peak_rss'] / GIB:.2f} GiB "
                f"| {cost['memory'] / GIB:.2f} GiB | {c['peak_rss'] / cost['memory']:.2f} |"
            )
    shapes = Shapes.of(model_config("llama2-7b", 1))
    for c in read_cells(RESULTS / "block_time.json"):
        if c["part"] == "ours" and c["calibration"] == "parallel":
            cost = predict(shapes, rates, c["sequences"], c["reduction"])
            ratio = c["seconds"] / cost["seconds"]
            name = f"one block, {c['tokens']:,} tokens, {c['reduction']:.0%}"
            lines.append(f"| {name} | {c['seconds']:.0f} | {cost['seconds']:.0f} | {ratio:.2f} | | | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = [name for name in MODELS if name != "tiny"]
    parser.add_argument("models", nargs="*", default=default, help=f"of {', '.join(MODELS)}, or folders")
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--reduction", type=float, default=0.2)
    parser.add_argument("--folder", type=Path, help="where to measure the disk (default: a temporary one)")
    parser.add_argument("--compare", action="store_true", help="with the measured cells instead")
    parser.add_argument("--record", action="store_true", help="write results/cost_model.json too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        rates = measure_rates(Path(folder))
    print(", ".join(f"{name} {rate / 1e9:.1f} G/s" for name, rate in rates.items()))
    if args.compare:
        print(compare(rates))
        return
    print(table(args.models, rates, args.sequences, args.length, args.reduction))
    if args.record:
        settings = {"sequences": args.sequences, "length": args.length, "reduction": args.reduction}
        for name in args.models:
            shapes = Shapes.of(config_of(name), args.length)
            cost = predict(shapes, rates, args.sequences, args.reduction)
            size = {"parameters": shapes.parameters, "blocks": len(shapes.blocks)}
            write_cell(RESULTS / "cost_model.json", {"model": name, **settings}, {**size, **cost, "rates": rates})


if __name__ == "__main__":
    main()
