"""Peak memory, disk and time of compressing a checkpoint block by block, by depth, and against doing it in memory.

    python benchmarks/streaming.py --scratch DIR                        # LLaMA-2-7B shapes, 1 to 32 blocks; hours
    python benchmarks/streaming.py --scratch DIR --model tiny --layers 1 2 4 --length 128

Every cell is a fresh process on a checkpoint of `make_checkpoint.py`, watched from outside through /proc: resident
memory with the file-mapped pages in it, and the disk taken by its output, by its journal, and by files that it holds
open and nameless. The bound that memory is compared with is the largest block in bytes, its Gram matrices in float32,
each input that layers share counted once, and one GiB for Python, PyTorch and activations. `memory` cells load the
whole model, compress it and save it; they are run to `--memory-layers` blocks.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cells import GIB, RESULTS, read_cells, write_cell
from make_checkpoint import MODELS, calibration_tokens, make, model_config


INTERVAL = 0.02  # seconds between two looks at memory
DISK_EVERY = 25  # looks at memory for one at the disk


# In the process that is watched


def run_child(job: dict[str, Any]) -> None:
    """Compress one checkpoint; the last line printed is the result as JSON."""
    from transformers import AutoConfig, logging

    from optimum_pgsvd import PGSVDCompressor, PGSVDConfig

    logging.disable_progress_bar()
    vocabulary = AutoConfig.from_pretrained(job["source"]).vocab_size
    config = PGSVDConfig(
        parameter_reduction=job["reduction"],
        dataset=calibration_tokens(job["sequences"], job["length"], vocabulary),
        num_samples=job["sequences"],
        sequence_length=job["length"],
        batch_size=1,
        calibration=job["calibration"],
    )
    compressor = PGSVDCompressor(config)
    print("ready", flush=True)
    start = time.perf_counter()
    work = stream if job["way"] == "stream" else in_memory
    report = work(compressor, job)
    print(json.dumps({"seconds": time.perf_counter() - start, "parts": dict(report.seconds)}), flush=True)


def stream(compressor: Any, job: dict[str, Any]) -> Any:
    return compressor.compress_checkpoint(job["source"], job["output"], max_shard_size=job["max_shard_size"])


def in_memory(compressor: Any, job: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["source"], dtype="auto")
    report = compressor.compress(model)
    model.save_pretrained(job["output"], max_shard_size=job["max_shard_size"])
    return report


# In the process that watches


def memory(pid: int) -> dict[str, int]:
    """`VmHWM`, `VmRSS`, `RssAnon`, `RssFile` and `RssShmem` in bytes; empty for a process that is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = dict(line.split(":", 1) for line in lines if line.startswith(("VmHWM", "VmRSS", "Rss")))
    return {name: int(value.split()[0]) * 1024 for name, value in fields.items()}


def on_disk(folder: Path) -> int:
    """Bytes that the files under a folder take, holes not counted."""
    return sum(size_of(Path(base) / file) for base, _, files in os.walk(folder) for file in files)


def nameless(pid: int) -> int:
    """Bytes of the files that a process holds open and that have no name any more."""
    sizes = {}
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target, status = os.readlink(link), os.stat(link)
        except OSError:  # closed meanwhile
            continue
        if target.startswith("/") and target.endswith("(deleted)"):
            sizes[status.st_dev, status.st_ino] = status.st_blocks * 512
    return sum(sizes.values())


def size_of(file: Path) -> int:
    try:
        return file.stat().st_blocks * 512
    except OSError:  # gone meanwhile
        return 0


def watch(process: subprocess.Popen, folder: Path) -> dict[str, int]:
    """The most memory and disk a process takes while it runs; `peak_rss` is the kernel's own record of it."""
    peaks: dict[str, int] = {}
    looks = 0
    while process.poll() is None:
        for name, value in memory(process.pid).items():
            peaks[name] = max(peaks.get(name, 0), value)
        if looks % DISK_EVERY == 0:
            peaks["disk"] = max(peaks.get("disk", 0), disk(process.pid, folder))
        looks += 1
        time.sleep(INTERVAL)
    return {
        "peak_rss": peaks["VmHWM"],
        "peak_rss_anonymous": peaks["RssAnon"],
        "peak_rss_files": peaks["RssFile"] + peaks.get("RssShmem", 0),
        "peak_disk": max(peaks["disk"], on_disk(folder)),
        "disk_at_end": on_disk(folder),
        "looks": looks,
    }


def disk(pid: int, folder: Path) -> int:
    try:
        return on_disk(folder) + nameless(pid)
    except OSError:  # it ended meanwhile
        return 0


def run_cell(source: Path, scratch: Path, job: dict[str, Any]) -> dict[str, Any]:
    """One compression in a fresh process."""
    folder = scratch / "streaming"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    job = job | {"source": str(source), "output": str(folder / "compressed")}
    command = [sys.executable, __file__, "--child", json.dumps(job)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peaks = watch(process, folder)
    lines = (process.stdout or sys.stdin).read().splitlines()
    if process.returncode:
        raise SystemExit(f"the {job['way']} run on {source} ended with {process.returncode}")
    weights = digest(folder / "compressed")
    shutil.rmtree(folder)
    return {**json.loads(lines[-1]), **peaks, "weights_sha256": weights}


def digest(folder: Path) -> str:
    """Of all weights files and their names."""
    total = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        total.update(file.name.encode())
        with open(file, "rb") as content:
            while part := content.read(2**24):
                total.update(part)
    return total.hexdigest()


def bound(model: str) -> dict[str, int]:
    """Bytes of a block, of its Gram matrices, and of both with a GiB."""
    from cost_model import Shapes

    shapes = Shapes.of(model_config(model, layers=1))
    block, grams = shapes.block_bytes(2), shapes.gram_bytes(4)
    return {"block_bytes": block, "gram_bytes": grams, "bound": block + grams + GIB}


def measure(model: str, layers: int, way: str, args: argparse.Namespace) -> None:
    source = args.scratch / f"{model}-{layers}"
    if not (source / "config.json").exists():
        make(source, model, layers)
    job = {
        "way": way,
        "reduction": args.reduction,
        "sequences": args.sequences,
        "length": args.length,
        "calibration": args.calibration,
        "max_shard_size": args.max_shard_size,
    }
    key = {"model": model, "layers": layers, **job}
    values = run_cell(source, args.scratch, job)
    tokens, limit = args.sequences * args.length, bound(model)
    values |= {
        "tokens": tokens,
        "tokens_per_second": tokens / values["seconds"],
        "parts_per_block": {part: time / layers for part, time in values["parts"].items()},
        "source_bytes": sum(file.stat().st_size for file in source.glob("*.safetensors")),
        **limit,
        "peak_over_bound": values["peak_rss"] / limit["bound"],
    }
    if way == "memory":
        values |= against_stream(key, values, args.result)
    write_cell(args.result, key, values)


def against_stream(key: dict[str, Any], values: dict[str, Any], path: Path) -> dict[str, Any]:
    """In memory over streamed, of the same job, and whether the weights are the same bytes."""
    for cell in read_cells(path):
        if (key | {"way": "stream"}).items() <= cell.items():
            return {
                "memory_over_stream_rss": values["peak_rss"] / cell["peak_rss"],
                "memory_over_stream_seconds": values["seconds"] / cell["seconds"],
                "same_weights": values["weights_sha256"] == cell["weights_sha256"],
            }
    return {}


def table(path: Path) -> str:
    """The cells as a table."""
    lines = [
        "| model | blocks | way | tokens | peak | bound | ratio | disk | minutes | s/block |",
        "|---|" + "---:|" * 9,
    ]
    for c in sorted(read_cells(path), key=lambda c: (c["model"], c["tokens"], c["way"], c["layers"])):
        lines.append(
            f"| {c['model']} | {c['layers']} | {c['way']} | {c['tokens']:,} | {c['peak_rss'] / GIB:.2f} GiB "
            f"| {c['bound'] / GIB:.2f} GiB | {c['peak_over_bound']:.2f} | {c['peak_disk'] / 1e9:.2f} GB "
            f"| {c['seconds'] / 60:.1f} | {c['seconds'] / c['layers']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", type=Path, help="folder for checkpoints: 13.5 GB + 11 GB for 32 blocks of 7B")
    parser.add_argument("--model", choices=MODELS, default="llama2-7b")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 4, 8, 32])
    parser.add_argument("--memory-layers", type=int, default=4, help="most blocks to compress in memory too; 0: none")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--reduction", type=float, default=0.2)
    parser.add_argument("--calibration", default="parallel", help="parallel or anchored")
    parser.add_argument("--max-shard-size", default="5GB")
    parser.add_argument("--keep", action="store_true", help="keep the dense checkpoints for another run")
    parser.add_argument("--result", type=Path, default=RESULTS / "streaming.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_child(json.loads(args.child))
        return
    if args.scratch is None:
        parser.error("--scratch is needed: checkpoints are large")
    for layers in args.layers:
        for way in ("stream", "memory") if layers <= args.memory_layers else ("stream",):
            measure(args.model, layers, way, args)
        if not args.keep:
            shutil.rmtree(args.scratch / f"{args.model}-{layers}")
    print(table(args.result))


if __name__ == "__main__":
    main()
