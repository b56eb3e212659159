"""Compress the demo model at 20 % and 40 % in three ways, reload everything in a new process, and compare.

    python examples/demo.py [--output demo_output]

Nothing is downloaded: the model was trained by `train_demo_model.py`, the texts in `demo_text/` were written for it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path


HERE = Path(__file__).parent
MODEL = HERE / "demo_model"
PROMPT = "Once upon a time"
REDUCTIONS = (0.2, 0.4)
METHODS = {
    "plain SVD": {"solver": "svd", "allocation": "uniform"},
    "SVD-ALS uniform": {"solver": "als", "allocation": "uniform"},
    "PGSVD": {},
}


def texts(name: str) -> list[str]:
    lines = (HERE / "demo_text" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def compress(output: Path) -> list[tuple[str, Path]]:
    """Compress the demo model every way and save the results; the dense model comes first."""
    from transformers import AutoModelForCausalLM, logging

    from optimum_pgsvd import PGSVDConfig

    logging.disable_progress_bar()
    rows = [("dense", MODEL)]
    for reduction in REDUCTIONS:
        for method, settings in METHODS.items():
            config = PGSVDConfig(
                parameter_reduction=reduction, dataset=texts("calibration"), sequence_length=256, **settings
            )
            model = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=config)
            folder = output / f"{method.replace(' ', '-').lower()}-{reduction:.0%}".replace("%", "")
            model.save_pretrained(folder)
            print(f"{method} at {reduction:.0%}: saved in {folder}", flush=True)
            rows.append((f"{method}, {reduction:.0%} removed", folder))
    return rows


def measure(folder: str) -> dict:
    """Load a model as anybody would, with a stock pipeline, and measure it on the held-out texts."""
    from transformers import logging, pipeline

    logging.disable_progress_bar()
    generator = pipeline("text-generation", model=folder)
    options = {"max_new_tokens": 40, "do_sample": False, "return_full_text": True}
    sentence = generator(PROMPT, **options)[0]["generated_text"]
    return {
        "parameters": generator.model.num_parameters(),
        "bytes": sum(p.numel() * p.element_size() for p in generator.model.parameters()),
        "perplexity": perplexity(generator.model, generator.tokenizer),
        "tokens_per_second": speed(generator),
        "sentence": " ".join(sentence.split()),
    }


def perplexity(model, tokenizer) -> float:
    """Per token, over the held-out stories, each predicted from its beginning."""
    import torch

    loss, tokens = 0.0, 0
    for text in texts("heldout"):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            loss += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    return math.exp(loss / tokens)


def speed(generator, repeats: int = 5, tokens: int = 64) -> float:
    """Median of new tokens a second, one sequence, greedy, with a key-value cache."""
    ids = generator.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        generator.model.generate(
            ids,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=generator.tokenizer.eos_token_id,
        )
        seconds.append(time.perf_counter() - start)
    return tokens / statistics.median(seconds)


def show(rows: list[tuple[str, dict]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "parameters", "bytes", "perplexity", "tokens/s", title="Held-out stories, this machine")
    for name, result in rows:
        table.add_row(
            name,
            f"{result['parameters']:,}",
            f"{result['bytes']:,}",
            f"{result['perplexity']:.2f}",
            f"{result['tokens_per_second']:.0f}",
        )
    console = Console(width=100)
    console.print(table)
    for name, result in rows:
        console.print(f"[bold]{name}[/bold]: {result['sentence']}", highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for the compressed models")
    parser.add_argument(
        "--measure", nargs="+", metavar="DIR", help="measure saved models, print JSON (used by the demo)"
    )
    args = parser.parse_args()
    if args.measure:
        print(json.dumps([measure(folder) for folder in args.measure]))
        return
    models = compress(args.output)
    print("reloading all of them through pipeline() in a new process ...", flush=True)
    command = [sys.executable, __file__, "--measure", *(str(folder) for _, folder in models)]
    results = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    show([(name, result) for (name, _), result in zip(models, results, strict=True)])


if __name__ == "__main__":
    main()
