"""Held-out perplexity of small trained models, dense and compressed, by method and by seed.

    PGSVD_DATA=... python benchmarks/perplexity.py            # measure, write the JSON and the tables made from it
    python benchmarks/perplexity.py --tables                  # only write the tables from the JSON
    python benchmarks/perplexity.py --baselines OUT.json      # other papers' methods too, one seed, no tables

Calibration and evaluation texts are disjoint. Every method gets the same calibration tokens and the same budget; the
seed chooses the calibration sequences. Uniform ranks with the `eigh` solver are SVD-LLM's optimum.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parent.parent
RESULT = Path(__file__).parent / "results" / "perplexity.json"
REDUCTIONS = (0.2, 0.4, 0.6)
SEEDS = (0, 1, 2)
WINDOW = 256
METHODS: dict[str, dict[str, Any]] = {
    "plain SVD, uniform": {"solver": "svd", "allocation": "uniform"},
    "SVD-ALS, uniform": {"solver": "als", "allocation": "uniform"},
    "exact optimum, uniform": {"solver": "eigh", "allocation": "uniform"},
    "PGSVD with ALS": {"solver": "als"},
    "PGSVD": {"solver": "eigh"},
    "PGSVD, text sampled from the model": {"solver": "eigh", "dataset": "self"},
}
# Methods of other papers, tried beside those above.
BASELINES: dict[str, dict[str, Any]] = {
    "SVD-LLM, uniform": {"solver": "svd_llm", "allocation": "uniform"},
    "ASVD, uniform": {"solver": "asvd", "allocation": "uniform"},
    "FWSVD, uniform": {"solver": "fwsvd", "allocation": "uniform"},
    "SVD-LLM V2's ratios, exact optimum": {"solver": "eigh", "allocation": "svd_llm_v2"},
    "one tolerance of outputs, exact optimum": {"solver": "eigh", "allocation": "pareto_outputs"},
}


def read_jsonl(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def cases() -> dict[str, tuple[Path, list[str], list[str], int]]:
    """Model folder, calibration texts, evaluation texts and calibration sequences, by name."""
    found = {}
    if "PGSVD_DATA" in os.environ:
        data = Path(os.environ["PGSVD_DATA"])
        stories = read_jsonl(data / "text" / "tinystories_a.jsonl")
        for name in ("babyllama_tok361", "stories260K"):
            found[name] = (data / "models" / name, stories[:600], stories[600:], 128)
    texts = ROOT / "examples" / "demo_text"
    demo = ROOT / "examples" / "demo_model"
    if demo.is_dir():
        found["demo"] = (demo, read_jsonl(texts / "calibration.jsonl"), read_jsonl(texts / "heldout.jsonl"), 128)
    return found


def perplexity(model: Any, windows: Any, batch_size: int = 16) -> float:
    """Per token, over windows `(N, length)`."""
    import torch

    total = 0.0
    with torch.no_grad():
        for batch in windows.split(batch_size):
            total += model(input_ids=batch, labels=batch).loss.item() * len(batch)
    return math.exp(total / len(windows))


def measure(
    folder: Path,
    calibration: list[str],
    evaluation: list[str],
    num_samples: int,
    methods: Mapping[str, dict[str, Any]] = METHODS,
    seeds: Sequence[int] = SEEDS,
) -> list[dict[str, Any]]:
    """One row for the dense model and for every method, reduction and seed, or the error of one that fails."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from optimum_pgsvd import CalibrationError, PGSVDCompressor, PGSVDConfig
    from optimum_pgsvd.calibration.data import pack

    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    windows = torch.stack(pack(evaluation, tokenizer, num_samples=128, length=WINDOW))
    rows = [{"method": "dense", "perplexity": perplexity(dense, windows), "evaluation_tokens": windows.numel()}]
    for reduction in REDUCTIONS:
        for method, settings in methods.items():
            for seed in seeds:
                model = copy.deepcopy(dense)
                config = PGSVDConfig(
                    parameter_reduction=reduction,
                    num_samples=num_samples,
                    sequence_length=WINDOW,
                    seed=seed,
                    **{"dataset": calibration, **settings},
                )
                start = time.perf_counter()
                try:
                    report = PGSVDCompressor(config).compress(model, tokenizer=tokenizer)
                except CalibrationError as error:
                    rows.append({"method": method, "reduction": reduction, "seed": seed, "error": str(error)})
                    print(folder.name, rows[-1], flush=True)
                    continue
                rows.append(
                    {
                        "method": method,
                        "reduction": reduction,
                        "seed": seed,
                        "perplexity": perplexity(model, windows),
                        "parameters": report.parameters_after,
                        "parameter_reduction": report.parameter_reduction,
                        "calibration_tokens": report.calibration["tokens"],
                        "seconds": time.perf_counter() - start,
                        "seconds_factoring": report.seconds["factors"],
                    }
                )
                print(folder.name, {k: v for k, v in rows[-1].items() if k != "parameters"}, flush=True)
    return rows


def environment() -> dict[str, str]:
    from optimum_pgsvd.report import environment as versions

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        **versions(),
        "machine": platform.machine(),
        "cpus": str(os.cpu_count()),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "commit": commit.stdout.strip(),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Mean over the seeds, and the spread where they differ."""
    lines = ["| | " + " | ".join(f"{r:.0%} removed" for r in REDUCTIONS) + " |", "|---|" + "---:|" * len(REDUCTIONS)]
    lines.append(f"| dense | {' | '.join([format(rows[0]['perplexity'], '.3f')] * len(REDUCTIONS))} |")
    for method in METHODS:
        cells = []
        for reduction in REDUCTIONS:
            values = [r["perplexity"] for r in rows if r["method"] == method and r.get("reduction") == reduction]
            spread = f" ± {(max(values) - min(values)) / 2:.2g}" if max(values) > min(values) else ""
            cells.append(f"{statistics.mean(values):.4g}{spread}")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def speed_line(rows: list[dict[str, Any]]) -> str:
    """Time of ALS factoring over the closed form's, median over seeds and reductions."""
    ratios = []
    for row in rows:
        if row["method"] == "PGSVD with ALS":
            same = {"method": "PGSVD", "reduction": row["reduction"], "seed": row["seed"]}
            other = next(r for r in rows if same.items() <= r.items())
            ratios.append(row["seconds_factoring"] / other["seconds_factoring"])
    median = statistics.median(ratios)
    return f"Factoring with ALS takes {median:.2f} × the time of the closed form (median of {len(ratios)})."


def write_tables(result: dict[str, Any]) -> None:
    """Fill the marked places of the documents."""
    for document in (ROOT / "README.md", ROOT / "docs" / "results.md"):
        text = document.read_text(encoding="utf-8")
        for name, rows in result["models"].items():
            body = table(rows)
            if document.name == "results.md":
                read, sampled = (
                    next(row["calibration_tokens"] for row in rows if row["method"] == method)
                    for method in ("PGSVD", "PGSVD, text sampled from the model")
                )
                body += (
                    f"\n\n{rows[0]['evaluation_tokens']:,} evaluation tokens; calibrated on {read:,} tokens of text,"
                )
                body += f" or {sampled:,} sampled ones. {speed_line(rows)}"
            pattern = rf"(<!-- perplexity:{name} -->\n).*?(<!-- end -->)"
            text = re.sub(pattern, lambda m, body=body: f"{m[1]}{body}\n{m[2]}", text, flags=re.DOTALL)
        document.write_text(text, encoding="utf-8")


def try_baselines(models: list[str], output: Path) -> None:
    """Every method with the first seed, those of other papers with them, into a file of their own."""
    methods = METHODS | BASELINES
    rows = {name: measure(*cases()[name], methods, SEEDS[:1]) for name in models}
    output.write_text(json.dumps({"models": rows, "environment": environment()}, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", action="store_true", help="write the tables from the JSON, measure nothing")
    parser.add_argument("--models", nargs="*", help="only these; the others keep their results")
    parser.add_argument("--baselines", type=Path, metavar="OUT.json", help="write those of other papers to this file")
    args = parser.parse_args()
    if args.baselines:
        try_baselines(args.models or list(cases()), args.baselines)
        return
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {"models": {}}
    if not args.tables:
        for name, case in cases().items():
            if not args.models or name in args.models:
                result["models"][name] = measure(*case)
                result["environment"] = environment()
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    write_tables(result)


if __name__ == "__main__":
    main()
