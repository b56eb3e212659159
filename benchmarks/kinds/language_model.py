"""Language models, dense and compressed: held-out perplexity, and accuracy on zero-shot tasks.

Options of a grid:
    measures: `[perplexity]`, `[accuracy]` or both.
    tasks: of accuracy, each a file in `benchmarks/tasks` or a task of lm-evaluation-harness by its name there.
    limit: questions of each task, all by default.
    max_length: tokens that the model is shown at once, by default what it was made for.
    dtype: of the weights, `float32` by default.
    config: further fields of PGSVDConfig.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from grid import ROOT, Cell, Unavailable, located, read_yaml, source
from perplexity import perplexity

from kinds.compressing import compressed


# Tokens in a batch of an evaluation.
BATCH = 4096


@dataclass
class LanguageModel:
    """A dense model, what it is calibrated on and what it is measured on.

    Args:
        model: in evaluation mode.
        tokenizer: of it.
        data: fields of PGSVDConfig.
        windows: held-out tokens `(N, window)`, none where perplexity is not measured.
    """

    model: Any
    tokenizer: Any
    data: Mapping[str, Any]
    windows: Any


def read_texts(where: Mapping[str, Any]) -> list[str]:
    """Texts of a local file (`file`, `rows`) or of the Hub (`dataset`, `configuration`, `split`)."""
    if "file" in where:
        path = located(where["file"])
        if path.suffix == ".txt":
            return [path.read_text(encoding="utf-8")]
        lines = path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["text"] for line in lines[slice(*where.get("rows", [None]))]]
    from datasets import load_dataset

    rows = load_dataset(where["dataset"], where.get("configuration"), split=where["split"])
    # As everywhere with WikiText: its lines are one text.
    return ["\n\n".join(rows["text"])]


def given(options: Mapping[str, Any]) -> set[str]:
    """What of a user's own it takes."""
    parts = {"evaluation": "perplexity", "tasks": "accuracy"}
    return {"model", "calibration"} | {field for field, measured in parts.items() if measured in measures(options)}


def load(spec: Mapping[str, Any], options: Mapping[str, Any]) -> LanguageModel:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from optimum_pgsvd.calibration.data import pack

    if "accuracy" in measures(options):
        harness()  # where it is missing, that is told before hours of work
    path = source(spec["path"])
    calibration = read_texts(spec["calibration"])
    tokenizer = AutoTokenizer.from_pretrained(path)
    dtype = getattr(torch, options.get("dtype", "float32"))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, device_map="auto" if on_gpu() else None).eval()
    window = min(spec["window"], getattr(model.config.get_text_config(), "max_position_embeddings", spec["window"]))
    windows = None
    if "perplexity" in measures(options):
        texts = read_texts(spec["evaluation"])
        windows = torch.stack(pack(texts, tokenizer, spec.get("evaluation_windows", 10**9), window))
    batch_size = max(1, BATCH // window // 2)
    data = {"dataset": calibration, "sequence_length": window, "batch_size": batch_size}
    return LanguageModel(model, tokenizer, {**data, "num_samples": spec["num_samples"]}, windows)


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def measures(options: Mapping[str, Any]) -> list[str]:
    return options.get("measures", ["perplexity"])


def measure(case: LanguageModel, cell: Cell) -> dict[str, Any]:
    model, values = compressed(case.model, cell, case.data, case.tokenizer)
    if "accuracy" in measures(cell.options):  # first: its questions may be out of reach
        values["accuracy"] = accuracy(model, case.tokenizer, cell.options)
    if "perplexity" in measures(cell.options):
        values["perplexity"] = perplexity(model, case.windows.to(model.device), BATCH // case.windows.shape[1])
        values["evaluation_tokens"] = case.windows.numel()
    return values


def task(name: str) -> Any:
    """A task for lm-evaluation-harness: one of `benchmarks/tasks`, its files found, or the name of one of its own."""
    path = ROOT / "benchmarks" / "tasks" / f"{name}.yaml"
    if not path.exists():
        return name
    found = read_yaml(path)
    files = found["dataset_kwargs"]["data_files"]
    found["dataset_kwargs"]["data_files"] = {split: located_all(pattern) for split, pattern in files.items()}
    return {**found, "custom_dataset": read_tasks}


def located_all(pattern: str) -> list[Path]:
    """The files that a path or a glob below `$PGSVD_DATA` names."""
    folder, _, name = pattern.rpartition("/")
    if found := sorted(located(f"$PGSVD_DATA/{folder}").glob(name)):
        return found
    raise Unavailable(f"$PGSVD_DATA/{pattern} is not there")


def read_tasks(data_files: Mapping[str, list[Path]], **metadata: Any) -> dict[str, Any]:
    """By split, the questions of its files in turn, with the fields that all of them have."""
    from datasets import Dataset

    found = {}
    for split, paths in data_files.items():
        texts = (path.read_text(encoding="utf-8").splitlines() for path in paths)
        rows = [json.loads(line) for lines in zip_longest(*texts) for line in lines if line]
        common = set.intersection(*(set(row) for row in rows))
        found[split] = Dataset.from_list([{key: row[key] for key in sorted(common)} for row in rows])
    return found


def harness() -> tuple[Any, Any]:
    """What evaluates and what it takes a model in, of lm-evaluation-harness."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise Unavailable(f"accuracy needs lm_eval, as `pip install optimum-pgsvd[bench]` has it: {error}") from error
    return simple_evaluate, HFLM


def accuracy(model: Any, tokenizer: Any, options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Of each task its accuracy, its standard error and its number of questions, by lm-evaluation-harness."""
    simple_evaluate, HFLM = harness()
    evaluated = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16, max_length=options.get("max_length"))
    tasks = [task(name) for name in options["tasks"]]
    found = simple_evaluate(evaluated, tasks=tasks, limit=options.get("limit"), bootstrap_iters=0)
    return {name: of_task(values, found["n-samples"][name]["effective"]) for name, values in found["results"].items()}


def of_task(values: Mapping[str, Any], questions: int) -> dict[str, Any]:
    """The accuracy of a task's result, and how far chance may have moved it."""
    share = values["acc,none"]
    return {"accuracy": share, "standard_error": math.sqrt(share * (1 - share) / questions), "questions": questions}
