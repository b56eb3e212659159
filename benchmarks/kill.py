"""Kill a compression of a checkpoint again and again, run it again each time, and compare its bytes in the end.

    python benchmarks/kill.py                                     # 20 kills of a small model made for it; minutes
    python benchmarks/kill.py --source examples/demo_model --kills 50

Half of the kills (SIGKILL) come at a random time, half just after a block was noted as finished. The same command then
runs again and has to go on from where it was. When a run gets through, its weights, its index and its config are
compared byte for byte with those of a run that nobody disturbed, and the next starts from nothing, until all kills are
spent. At every kill, the journal must hold every note of a finished block that it held at the kill before, unchanged,
and no block twice.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cells import RESULTS, write_cell
from make_checkpoint import make


STREAMING = Path(__file__).parent / "streaming.py"
LAYERS, SHAPE = 12, {"hidden_size": 256, "intermediate_size": 688}
COMPARED = ("model*.safetensors", "*.index.json", "config.json")


def command(job: dict[str, Any], output: Path) -> list[str]:
    return [sys.executable, str(STREAMING), "--child", json.dumps(job | {"output": str(output)})]


def journal(output: Path) -> list[str]:
    """The notes of finished blocks in the folder beside an output; a line that was not written to its end is none."""
    try:
        text = (output.parent / f".{output.name}.pgsvd" / "progress.jsonl").read_text(encoding="utf-8")
    except OSError:
        return []
    return text.split("\n")[:-1]


def blocks(lines: list[str]) -> list[str]:
    return [str(json.loads(line)["block"]) for line in lines]


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the files that are compared."""
    files = sorted({file for pattern in COMPARED for file in folder.glob(pattern)})
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def run_undisturbed(job: dict[str, Any], output: Path) -> float:
    """Seconds of the work, without starting Python."""
    done = subprocess.run(command(job, output), check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])["seconds"]


@dataclass
class Victim:
    """One run, to be killed."""

    job: dict[str, Any]
    output: Path

    def __enter__(self) -> Victim:
        self.process = subprocess.Popen(command(self.job, self.output), stdout=subprocess.PIPE, text=True)
        for line in self.process.stdout or ():
            if line.strip() == "ready":
                return self
        raise SystemExit(f"the run ended with {self.process.wait()} before it began")

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.communicate()

    def wait(self, seconds: float) -> bool:
        """Whether it is still at work after some seconds."""
        try:
            return self.process.wait(seconds) != 0 and self.fail()
        except subprocess.TimeoutExpired:
            return True

    def wait_for_blocks(self, count: int) -> bool:
        """Whether it is still at work when the journal has grown by some blocks."""
        goal = len(journal(self.output)) + count
        while len(journal(self.output)) < goal:
            if not self.wait(0.001):
                return False
        return True

    def fail(self) -> bool:
        raise SystemExit(f"the run ended with {self.process.returncode}, and not by a kill")


def kill_once(job: dict[str, Any], output: Path, duration: float, source: random.Random) -> dict[str, Any] | None:
    """One kill; `None` where the run got through before it."""
    kind = source.choice(("time", "block"))
    before = journal(output)
    with Victim(job, output) as victim:
        start = time.perf_counter()
        if kind == "block" and not victim.wait_for_blocks(source.randint(1, 3)):
            return None
        if not victim.wait(source.uniform(0, duration / 3 if kind == "time" else 0.02)):
            return None
        seconds = time.perf_counter() - start
    return {"kind": kind, "seconds": seconds, "before": before, "after": journal(output), "published": output.exists()}


def check_journal(kill: dict[str, Any]) -> None:
    """The notes hold times, so one that was made again differs; a published output has none any more."""
    before, after = kill["before"], kill["after"]
    if not kill["published"] and after[: len(before)] != before:
        raise SystemExit(
            f"the journal held {blocks(before)} and after one more kill {blocks(after)}, or made some again"
        )
    if len(set(blocks(after))) < len(after):
        raise SystemExit(f"the journal holds a block twice: {blocks(after)}")


def check_bytes(output: Path, expected: dict[str, str]) -> None:
    found = digests(output)
    wrong = [name for name in {**found, **expected} if found.get(name) != expected.get(name)]
    if wrong:
        raise SystemExit(f"{', '.join(wrong)} differ from those of an undisturbed run")
    beside = sorted(path.name for path in output.parent.glob(f".{output.name}*"))
    if beside:
        raise SystemExit(f"the finished run left {', '.join(beside)} behind")


def measure(job: dict[str, Any], scratch: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kill until the kills are spent; then let the last run get through."""
    source = random.Random(seed)
    duration = run_undisturbed(job, scratch / "undisturbed")
    expected, output = digests(scratch / "undisturbed"), scratch / "disturbed"
    found: list[dict[str, Any]] = []
    rounds, compared = 0, 0
    while len(found) < kills:
        kill = kill_once(job, output, duration, source)
        if kill is None:
            check_bytes(output, expected)
            shutil.rmtree(output)
            rounds, compared = rounds + 1, compared + len(expected)
        else:
            check_journal(kill)
            found.append(kill | {"round": rounds})
            print(f"kill {len(found)}: {kill['kind']}, {len(kill['after'])} blocks finished", flush=True)
    run_undisturbed(job, output)
    check_bytes(output, expected)
    return {
        "seconds_undisturbed": duration,
        "rounds": rounds + 1,
        "files_compared": compared + len(expected),
        "files_different": 0,
        "blocks_lost": 0,
        "blocks_finished_at_kill": [len(kill["after"]) for kill in found],
        "median_seconds_to_kill": statistics.median(kill["seconds"] for kill in found),
        "kill_kinds": {kind: sum(kill["kind"] == kind for kill in found) for kind in ("time", "block")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, help="a dense checkpoint (default: a small one made for it)")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calibration", default="parallel", help="parallel or anchored")
    parser.add_argument("--reduction", type=float, default=0.4)
    parser.add_argument("--max-shard-size", default="4MB", help="small, for several files (default 4MB)")
    parser.add_argument("--scratch", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--result", type=Path, default=RESULTS / "kill.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        scratch = Path(folder)
        source = args.source or make(scratch / "dense", "tiny", LAYERS, **SHAPE)
        job = {
            "way": "stream",
            "source": str(source.resolve()),
            "reduction": args.reduction,
            "sequences": 16,
            "length": 128,
            "calibration": args.calibration,
            "max_shard_size": args.max_shard_size,
        }
        values = measure(job, scratch, args.kills, args.seed)
    name = source.name if args.source else f"made, {LAYERS} blocks"
    key = {"model": name, "calibration": args.calibration, "kills": args.kills, "seed": args.seed}
    write_cell(args.result, key, values)


if __name__ == "__main__":
    main()
