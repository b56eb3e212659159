"""Run in a process of its own: how much memory compressing a checkpoint takes, by its depth."""

from __future__ import annotations

import json
import os
import sys
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_pgsvd import PGSVDCompressor, PGSVDConfig
from optimum_pgsvd.streaming.process import give_memory_back


HIDDEN, TOKENS = 1024, 128


def outline(layers: int, hidden: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=12000,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(torch.bfloat16)


@cache
def drawn(kind: str, shape: torch.Size) -> torch.Tensor:
    """The weights of every block are the same."""
    return (torch.randn(shape) * 0.02).to(torch.bfloat16)


def write(folder: Path, layers: int, hidden: int = HIDDEN) -> int:
    """Write a checkpoint block by block; its bytes."""
    model = outline(layers, hidden)
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(folder)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        parts.setdefault(".".join(name.split(".")[:3]), {})[name] = parameter
    files: dict[str, str] = {}
    for number, part in enumerate(parts.values(), 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        tensors = {name: drawn(name.split(".", 3)[-1], meta.shape) for name, meta in part.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return sum(parameter.nbytes for parameter in model.parameters())


def compress(source: Path, output: Path) -> None:
    tokens = torch.randint(0, 12000, (8, TOKENS), generator=torch.Generator().manual_seed(0))
    config = PGSVDConfig(ranks={"k_proj": 8}, dataset=list(tokens), batch_size=1)
    PGSVDCompressor(config).compress_checkpoint(source, output, activation_memory=2**18)


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def most_memory(folder: Path, layers: int) -> int:
    """The bytes that compressing a checkpoint takes at most, in a child with a record of its own."""
    out, into = os.pipe()
    if os.fork() == 0:
        compress(folder / "small", folder / f"warm{layers}")  # libraries are in memory from here on
        give_memory_back()
        before = status("VmRSS")
        compress(folder / str(layers), folder / f"out{layers}")
        os.write(into, str(status("VmHWM") - before).encode())
        os._exit(0)
    os.close(into)
    os.wait()
    return int(os.read(out, 100))


def main(folder: Path) -> None:
    write(folder / "small", 1, 64)
    model = {layers: write(folder / str(layers), layers) for layers in (3, 8)}
    drawn.cache_clear()
    give_memory_back()
    peak = {layers: most_memory(folder, layers) for layers in model}
    dense = outline(1, HIDDEN)
    block = sum(parameter.nbytes for parameter in dense.model.layers[0].parameters())
    print(json.dumps({"block": block, "head": dense.lm_head.weight.nbytes, "model": model, "peak": peak}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
