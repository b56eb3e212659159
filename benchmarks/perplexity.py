"""What benchmarks share: small trained language models with their texts, perplexity, and the environment."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parent.parent
WINDOW = 256


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


def environment() -> dict[str, str]:
    """Versions, hardware and commit."""
    import torch

    from optimum_pgsvd.report import environment as versions

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        **versions(),
        "machine": platform.machine(),
        "cpus": str(os.cpu_count()),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "commit": commit.stdout.strip(),
    }
