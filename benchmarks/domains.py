"""Calibrated on one text and measured on others: how much more a compressed model loses there, by calibration set.

    PGSVD_DATA=... python benchmarks/domains.py               # every cell that is not in the JSON yet
    PGSVD_DATA=... python benchmarks/domains.py --models stories260K --seeds 0
    python benchmarks/domains.py --tables                     # only write the tables from the JSON

Every calibration set has as many windows of as many tokens, chosen by the seed; none is measured on. The models know
their own text, stories, and are poor at the others, so what is compared is a compressed model's perplexity on a text
over the dense model's on the same. No calibration set has the books.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import perplexity
from cells import RESULTS, check_models, fill, read_cells, table_parser, write_cell
from perplexity import WINDOW, read_jsonl


RESULT = RESULTS / "domains.json"
REDUCTIONS = (0.2, 0.4)
SEEDS = (0, 1)
WINDOWS = 32
CALIBRATIONS = ("own text", "other text", "half and half", "sampled from the model")
TEXTS = ("stories", "encyclopedia", "books")
METHODS = ("PGSVD", "best, no refinement")


def texts(data: Path, name: str) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """What to calibrate on and what to measure on, for a model."""
    _, own, held_out, _ = perplexity.cases()[name]
    book = (data / "text" / "books" / "a_frankenstein.txt").read_text(encoding="utf-8")
    wiki = (data / "text" / "wikitext2_valid.txt").read_text(encoding="utf-8")
    calibration = {"own text": own, "other text": read_jsonl(data / "text" / "wikitext_train_sample.jsonl")}
    # A book's first pages are a licence.
    return calibration, {"stories": held_out, "encyclopedia": [wiki[:300_000]], "books": [book[20_000:320_000]]}


def datasets(pools: dict[str, Any], seed: int, count: int) -> dict[str, Any]:
    """The calibration sets of a seed that are texts: windows `(WINDOW,)`."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    chosen = {
        name: [pool[i] for i in torch.randperm(len(pool), generator=generator)[:count]] for name, pool in pools.items()
    }
    own, other = chosen["own text"], chosen["other text"]
    return {**chosen, "half and half": [*own[: count // 2], *other[: count - count // 2]]}


def run(args: argparse.Namespace) -> None:
    """Measure every cell that is not in the JSON yet."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from optimum_pgsvd.calibration.data import pack
    from optimum_pgsvd.calibration.sampling import sample_from_model

    data = Path(os.environ["PGSVD_DATA"])
    for name, (folder, *_) in perplexity.cases().items():
        if args.models and name not in args.models:
            continue
        dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        calibration, evaluation = texts(data, name)
        pools = {text: pack(lines, tokenizer, 4 * args.windows, WINDOW) for text, lines in calibration.items()}
        windows = {
            text: torch.stack(pack(lines, tokenizer, args.windows, WINDOW)) for text, lines in evaluation.items()
        }
        known = [{k: c[k] for k in ("model", "method", "calibration", "reduction", "seed")}
                 for c in read_cells(args.result)]  # fmt: skip
        key = {"model": name, "method": "dense", "calibration": "", "reduction": 0.0, "seed": 0}
        if key not in known:
            write_cell(args.result, key, losses(dense, windows))
        for seed in args.seeds:
            sets = datasets(pools, seed, args.windows)
            for reduction in args.reductions:
                for method in args.methods:
                    for calibrated in args.calibrations:
                        key = {"model": name, "method": method, "calibration": calibrated, "reduction": reduction,
                               "seed": seed}  # fmt: skip
                        if key in known:
                            continue
                        if calibrated not in sets:  # what dataset="self" gives, once for all methods
                            sets[calibrated] = sample_from_model(dense, args.windows, WINDOW, args.windows, seed)
                        measure(dense, key, sets[calibrated], windows, args)


def measure(dense: Any, key: dict[str, Any], dataset: Any, windows: dict[str, Any], args: argparse.Namespace) -> None:
    """Compress a copy of the model, and write its perplexity on every text."""
    from optimum_pgsvd import PGSVDCompressor, PGSVDConfig

    model = copy.deepcopy(dense)
    make: Callable[..., PGSVDConfig] = PGSVDConfig
    more = {}
    if key["method"] != "PGSVD":
        make, more = PGSVDConfig.best, {"refine_steps": 0}
    config = make(
        key["reduction"], dataset=dataset, num_samples=args.windows, sequence_length=WINDOW, seed=key["seed"], **more
    )
    start = time.perf_counter()
    report = PGSVDCompressor(config).compress(model)
    seconds = time.perf_counter() - start
    tokens = report.calibration["tokens"]
    write_cell(args.result, key, {**losses(model, windows), "calibration_tokens": tokens, "seconds": seconds})


def losses(model: Any, windows: dict[str, Any]) -> dict[str, Any]:
    """Perplexity by text."""
    return {"perplexity": {text: perplexity.perplexity(model, batch) for text, batch in windows.items()}}


def ratios(cells: list[dict[str, Any]], key: dict[str, Any]) -> dict[str, float]:
    """Perplexity over the dense model's, by text: geometric mean over the seeds."""
    dense = next(c for c in cells if c["method"] == "dense" and c["model"] == key["model"])["perplexity"]
    found = [cell["perplexity"] for cell in cells if key.items() <= cell.items()]
    return {t: statistics.geometric_mean([c[t] / dense[t] for c in found]) for t in TEXTS} if found else {}


def table(cells: list[dict[str, Any]], model: str) -> str:
    """Ratios by method, reduction and calibration set; the worst of them last."""
    dense = next(c for c in cells if c["method"] == "dense" and c["model"] == model)["perplexity"]
    heads = " | ".join(f"{text} (dense {dense[text]:.4g})" for text in TEXTS)
    lines = [f"| {model} | calibrated on | {heads} | worst |", "|---|---|" + "---:|" * (len(TEXTS) + 1)]
    for method in METHODS:
        for reduction in REDUCTIONS:
            rows = {
                calibrated: found
                for calibrated in CALIBRATIONS
                if (found := ratios(cells, {"model": model, "method": method, "reduction": reduction,
                                            "calibration": calibrated}))
            }  # fmt: skip
            for calibrated, found in rows.items():
                least = {text: min(row[text] for row in rows.values()) for text in TEXTS}
                texts = [f"**{found[t]:.4g}**" if found[t] == least[t] else f"{found[t]:.4g}" for t in TEXTS]
                worst = max(found.values())
                mark = "**" if worst == min(max(row.values()) for row in rows.values()) else ""
                lines.append(
                    f"| {method}, {reduction:.0%} removed | {calibrated} | {' | '.join(texts)} | "
                    f"{mark}{worst:.4g}{mark} |"
                )
    return "\n".join(lines)


def regrets(cells: list[dict[str, Any]]) -> str:
    """What each calibration set loses against the best one for a text, over models, methods and reductions."""
    models = list(dict.fromkeys(cell["model"] for cell in cells))
    lost: dict[str, dict[str, list[float]]] = {c: {t: [] for t in TEXTS} for c in CALIBRATIONS}
    for model in models:
        for method in METHODS:
            for reduction in REDUCTIONS:
                key = {"model": model, "method": method, "reduction": reduction}
                rows = {c: ratios(cells, {**key, "calibration": c}) for c in CALIBRATIONS}
                if all(rows.values()):
                    for c, row in rows.items():
                        for text in TEXTS:
                            lost[c][text].append(row[text] / min(other[text] for other in rows.values()))
    lines = ["| over the best calibration set for a text | " + " | ".join(TEXTS) + " | mean | worst case |"]
    lines.append("|---|" + "---:|" * (len(TEXTS) + 2))
    for calibrated, by_text in lost.items():
        if every := [value for values in by_text.values() for value in values]:
            means = [math.exp(statistics.mean(map(math.log, values))) for values in (*by_text.values(), every)]
            cells_of_row = " | ".join(f"{mean:.3f}" for mean in means)
            lines.append(f"| {calibrated} | {cells_of_row} | {max(every):.3f} |")
    return "\n".join(lines)


def write_tables() -> None:
    """Fill the marked place of docs/results.md."""
    cells = read_cells(RESULT)
    models = dict.fromkeys(cell["model"] for cell in cells)
    seeds = ", ".join(str(seed) for seed in sorted({cell["seed"] for cell in cells}))
    tokens = ", ".join(
        f"{count:,}" for count in sorted({c["calibration_tokens"] for c in cells if c["method"] != "dense"})
    )
    note = f"Seeds: {seeds}. Calibration tokens: {tokens}."
    fill("domains", "\n\n".join([regrets(cells), note, *(table(cells, model) for model in models)]))


def main(arguments: list[str] | None = None) -> None:
    parser = table_parser(__doc__.splitlines()[0], RESULT)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS, help="only these")
    parser.add_argument("--calibrations", nargs="*", default=list(CALIBRATIONS), choices=CALIBRATIONS)
    parser.add_argument("--reductions", nargs="*", type=float, default=list(REDUCTIONS))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--windows", type=int, default=WINDOWS, help="of a calibration set, and of each text")
    args = parser.parse_args(arguments)
    if not args.tables:
        check_models(args.models, perplexity.cases())
        run(args)
    if args.result == RESULT:
        write_tables()


if __name__ == "__main__":
    main()
