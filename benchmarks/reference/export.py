"""Write a trained reference model as a checkpoint of transformers, in bfloat16, with an account of its training.

    python benchmarks/reference/export.py --model llama --data work --run work/llama
    python benchmarks/reference/export.py --tables   # only write the table of the README from the accounts

Losses and perplexities are those of the rounded weights, computed in float32.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
import shutil
from pathlib import Path
from typing import Any

import safetensors
import tokenizers
import torch
import transformers
from safetensors.torch import load_file
from train import MODELS, build, load_weights, mean_loss, read_log
from transformers import AutoTokenizer, PreTrainedModel


HERE = Path(__file__).parent
FOLDERS = {"llama": "llama-8m", "moe": "moe-8m"}
# Stored size of a model, in bytes: 8 million parameters in bfloat16 are 16 million, before the header.
SIZE_LIMIT = 16 * 2**20
# Held-out sequences that a test can afford.
SLICE = 32


def active_parameters(model: PreTrainedModel) -> int:
    """Parameters that one token uses: of the experts, those of the few that it is sent to."""
    config = model.config
    experts = sum(p.numel() for p in model.parameters() if p.ndim == 3)
    used = experts * config.num_experts_per_tok // config.num_local_experts if experts else 0
    return model.num_parameters() - experts + used


def measured(model: PreTrainedModel, heldout: torch.Tensor, characters: int) -> dict[str, Any]:
    """Held-out loss in nats a token, its perplexity, and bits a character, which no tokenizer decides."""
    loss, few = mean_loss(model, heldout), mean_loss(model, heldout[:SLICE])
    return {
        "tokens": heldout.numel(),
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_character": loss / math.log(2) * heldout.numel() / characters,
        "first_sequences": SLICE,
        "perplexity_of_first_sequences": math.exp(few),
    }


def account(name: str, data: Path, run: Path, model: PreTrainedModel) -> dict[str, Any]:
    """What was trained on what, for how long, and how well it does."""
    books = json.loads((data / "data.json").read_text(encoding="utf-8"))
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    plan = {key: value for key, value in plan.items() if key not in ("model", "step", "of")}
    log = read_log(run / "log.jsonl")
    if log[-1]["step"] != plan["steps"]:
        raise SystemExit(f"{name} stands at step {log[-1]['step']} of {plan['steps']}")
    heldout = load_file(data / "tokens.safetensors")["heldout"]
    tokens = plan["steps"] * plan["batch_size"] * heldout.shape[1]
    last = [line["loss"] for line in log if line["step"] > plan["steps"] - 100]
    return {
        "architecture": type(model).__name__,
        "parameters": model.num_parameters(),
        "active_parameters": active_parameters(model),
        "training": {
            **plan,
            "tokens": tokens,
            "passes": tokens / books["train"]["tokens"],
            "tokens_per_second": tokens / plan["seconds"],
            "loss_of_last_100_steps": sum(last) / len(last),
        },
        "heldout": measured(model, heldout, books["heldout"]["characters"]),
        "data": books,
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (torch, transformers, tokenizers, safetensors)},
        },
    }


def export(name: str, data: Path, run: Path, output: Path, note: str | None = None) -> dict[str, Any]:
    """Write model, tokenizer and account; returns the account."""
    model = build(MODELS[name], seed=0)
    load_weights(model, run / "checkpoint.safetensors")
    model.to(torch.bfloat16)
    # The router's loss is of use in training only; whoever asks for `loss` later wants that of the text.
    model.config.output_router_logits = False
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(data / "tokenizer").save_pretrained(output)
    result = account(name, data, run, model.float())
    size = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    if size > SIZE_LIMIT:
        raise SystemExit(f"{output} takes {size} bytes, more than {SIZE_LIMIT}")
    result = {"model": name, "bytes": size, **result} | ({"note": note} if note else {})
    (output / "training.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    shutil.copy(run / "log.jsonl", output / "log.jsonl")
    return result


def row(label: str, values: list[Any], form: str) -> str:
    return f"| {label} | " + " | ".join(format(value, form) for value in values) + " |"


def table(found: list[dict[str, Any]]) -> str:
    """A column for each model."""
    training, heldout = [f["training"] for f in found], [f["heldout"] for f in found]
    lines = [
        "| | " + " | ".join(f"`{FOLDERS[f['model']]}`" for f in found) + " |",
        "|---|" + "---:|" * len(found),
        row("class", [f["architecture"] for f in found], ""),
        row("parameters", [f["parameters"] for f in found], ",d"),
        row("of these, used by a token", [f["active_parameters"] for f in found], ",d"),
        row("bytes of weights", [f["bytes"] for f in found], ",d"),
        row("steps", [t["steps"] for t in training], ",d"),
        row("tokens read", [t["tokens"] for t in training], ",d"),
        row("passes over the text", [t["passes"] for t in training], ".2f"),
        row("minutes", [t["seconds"] / 60 for t in training], ".0f"),
        row("tokens a second", [t["tokens_per_second"] for t in training], ",.0f"),
        row("training loss, last 100 steps", [t["loss_of_last_100_steps"] for t in training], ".3f"),
        row("held-out loss, nats a token", [h["loss"] for h in heldout], ".3f"),
        row("held-out perplexity a token", [h["perplexity"] for h in heldout], ".2f"),
        row("held-out bits a character", [h["bits_per_character"] for h in heldout], ".3f"),
    ]
    return "\n".join(lines)


def write_tables() -> None:
    """Fill the marked place of the README from the accounts."""
    paths = [HERE / folder / "training.json" for folder in FOLDERS.values()]
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]
    readme = HERE / "README.md"
    text = readme.read_text(encoding="utf-8")
    pattern = r"(<!-- models -->\n).*?(<!-- end -->)"
    readme.write_text(re.sub(pattern, lambda m: f"{m[1]}{table(found)}\n{m[2]}", text, flags=re.DOTALL), "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", action="store_true", help="only write the table, from the accounts")
    parser.add_argument("--model", choices=MODELS)
    parser.add_argument("--data", type=Path, help="folder that prepare.py wrote")
    parser.add_argument("--run", type=Path, help="folder that train.py wrote")
    parser.add_argument("--note", help="what the account should say about the training beside its numbers")
    args = parser.parse_args()
    if not args.tables:
        result = export(args.model, args.data, args.run, HERE / FOLDERS[args.model], args.note)
        for name in ("calibration.jsonl", "heldout.jsonl"):
            shutil.copy(args.data / name, HERE / name)
        print(json.dumps({key: result[key] for key in ("model", "bytes", "training", "heldout")}, indent=1))
    write_tables()


if __name__ == "__main__":
    main()
