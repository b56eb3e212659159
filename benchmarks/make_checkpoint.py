"""Write a dense checkpoint with the shapes of a published model and weights made from a seed, in little memory.

    python benchmarks/make_checkpoint.py --output DIR                             # LLaMA-2-7B, 13.5 GB
    python benchmarks/make_checkpoint.py --output DIR --model mistral-7b --layers 2

Weights are no white noise: the rows of a matrix are drawn from a Gaussian whose spectrum falls like a power law in a
random basis, so singular values fall too; embeddings likewise. A few features are outliers: the same ones in the
embedding and in every norm. A tensor depends on the seed and its name only, so checkpoints that differ in depth agree
in the blocks they share. Rows are made and written a few at a time; no tensor is ever held whole.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import resource
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Generator, Tensor


MODELS: dict[str, dict[str, Any]] = {
    "llama2-7b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    },
    "llama2-13b": {
        "model_type": "llama",
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    },
    "llama2-70b": {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    },
    "mistral-7b": {
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "sliding_window": None,
    },
    "tiny": {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "max_position_embeddings": 256,
    },
}
# Exponents of the power law: queries and keys of trained models fall faster than values and the MLP.
DECAYS = {"q_proj": 0.6, "k_proj": 0.6, "embed_tokens": 0.5}
OTHER_DECAY = 0.35
STD = 0.02  # of weights, as models are initialised
OUTLIER, ONE_IN = 6.0, 512  # how large outlier features are in norms, and how rare
ROWS = 1024  # made at a time
CODES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}

Shapes = dict[str, tuple[int, ...]]


def model_config(model: str, layers: int | None = None, **changes: Any) -> Any:
    """The transformers config of one of `MODELS`, of another depth or with other changes where asked for."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**MODELS[model] | ({"num_hidden_layers": layers} if layers else {}) | changes)


def meta_model(config: Any) -> Any:
    """The model without its weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).eval()


def generator(seed: int, name: str) -> Generator:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def outlier_scale(width: int, seed: int, size: float) -> Tensor:
    """One for most features, `size` for a few."""
    scale = torch.ones(width)
    scale[torch.randperm(width, generator=generator(seed, f"outliers {width}"))[: math.ceil(width / ONE_IN)]] = size
    return scale


def hartley(rows: Tensor) -> Tensor:
    """A fast orthogonal transform of each row."""
    spectrum = torch.fft.fft(rows)
    return (spectrum.real - spectrum.imag) / math.sqrt(rows.shape[-1])


def tensor_rows(name: str, shape: tuple[int, ...], seed: int) -> Iterator[Tensor]:
    """A parameter in float32, some rows at a time."""
    source, width = generator(seed, name), shape[-1]
    if len(shape) == 1:
        yield 0.5 * torch.exp(0.2 * torch.randn(width, generator=source)) * outlier_scale(width, seed, OUTLIER)
        return
    kind = name.split(".")[-2]
    spectrum = (1 + torch.arange(width)).pow(-DECAYS.get(kind, OTHER_DECAY))
    spectrum *= STD * math.sqrt(width) / spectrum.norm()
    signs = 1.0 - 2.0 * torch.randint(0, 2, (width,), generator=source)
    if kind == "embed_tokens":
        signs *= outlier_scale(width, seed, math.sqrt(OUTLIER))
    for start in range(0, shape[0], ROWS):
        count = min(ROWS, shape[0] - start)
        yield hartley(torch.randn(count, width, generator=source) * spectrum) * signs


def write_shard(path: Path, shapes: Shapes, dtype: torch.dtype, seed: int) -> None:
    """One safetensors file: the length of the header, the header, the tensors one after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            write_tensor(file, tensor_rows(name, shape, seed), dtype)


def write_tensor(file: BinaryIO, parts: Iterator[Tensor], dtype: torch.dtype) -> None:
    for rows in parts:
        file.write(rows.to(dtype).contiguous().view(torch.uint8).numpy().data)


def shards(shapes: Shapes, dtype: torch.dtype, largest: float) -> list[Shapes]:
    """The tensors in files of at most `largest` bytes, in model order."""
    found: list[Shapes] = [{}]
    size = 0.0
    for name, shape in shapes.items():
        size += math.prod(shape) * dtype.itemsize
        if size > largest and found[-1]:
            found.append({})
            size = math.prod(shape) * dtype.itemsize
        found[-1][name] = shape
    return found


def make(
    output: Path,
    model: str = "llama2-7b",
    layers: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    max_shard_size: float = 5e9,
    **changes: Any,
) -> Path:
    """Write the checkpoint into a folder, which `from_pretrained` then loads."""
    config = model_config(model, layers, **changes)
    dense = meta_model(config)
    config.architectures, config.dtype = [type(dense).__name__], dtype
    config.save_pretrained(output)
    files = shards({name: tuple(p.shape) for name, p in dense.named_parameters()}, dtype, max_shard_size)
    weights: dict[str, str] = {}
    for number, shapes in enumerate(files, 1):
        file = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        write_shard(output / file, shapes, dtype, seed)
        weights |= dict.fromkeys(shapes, file)
    if len(files) > 1:
        size = sum(p.numel() for p in dense.parameters()) * dtype.itemsize
        index = {"metadata": {"total_size": size}, "weight_map": weights}
        (output / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return output


def calibration_tokens(count: int, length: int, vocabulary: int, seed: int = 0) -> list[Tensor]:
    """`count` sequences `(length,)` of token ids, a few of them frequent and most rare, as words are."""
    frequencies = 1 / (10 + torch.arange(vocabulary, dtype=torch.float64))
    source = generator(seed, "tokens")
    return [torch.multinomial(frequencies, length, replacement=True, generator=source) for _ in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", choices=MODELS, default="llama2-7b")
    parser.add_argument("--layers", type=int, help="blocks (default: the model's)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-shard-size", type=float, default=5e9, help="bytes")
    args = parser.parse_args()
    start = time.perf_counter()
    make(args.output, args.model, args.layers, getattr(torch, args.dtype), args.seed, args.max_shard_size)
    size = sum(file.stat().st_size for file in args.output.glob("*.safetensors"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{args.output}: {size / 1e9:.2f} GB in {time.perf_counter() - start:.0f} s, peak memory {peak:.2f} GiB")


if __name__ == "__main__":
    main()
