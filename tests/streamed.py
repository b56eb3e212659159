"""Checkpoints compressed on disk, and the same in memory to compare them with."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from models import Family

from optimum_pgsvd import PGSVDCompressor, PGSVDConfig
from optimum_pgsvd.compressor import model_class
from optimum_pgsvd.report import REPORT_NAME, CompressionReport


SHARD = "30KB"


def request(family: Family, **settings: Any) -> PGSVDConfig:
    """A config with three batches of a family."""
    if not settings.keys() & {"parameter_reduction", "tolerance", "ranks"}:
        settings["parameter_reduction"] = 0.3
    return PGSVDConfig(**{"dataset": family.batches(3), "num_samples": 1000, **settings})


def in_memory(
    source: Path, output: Path, config: PGSVDConfig, tokenizer: Any = None, size: int | str = SHARD, **options: Any
) -> Path:
    """Load a checkpoint, compress it and save it."""
    model = model_class(source).from_pretrained(source, **options)
    PGSVDCompressor(config).compress(model, tokenizer)
    model.save_pretrained(output, max_shard_size=size)
    return output


def on_disk(source: Path, output: Path, config: PGSVDConfig, tokenizer: Any = None, **options: Any) -> Path:
    """Compress a checkpoint on disk; all activations go to files unless `activation_memory` is given."""
    options = {"max_shard_size": SHARD, "activation_memory": 0, **options}
    PGSVDCompressor(config).compress_checkpoint(source, output, tokenizer, **options)
    return output


def contents(folder: Path) -> dict[str, bytes]:
    """What lies below a folder, by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def layers_of(folder: Path) -> list[Any]:
    """The layers of a report, less what time they took."""
    return [replace(layer, seconds=0.0) for layer in CompressionReport.load(folder).layers]


def assert_same_checkpoint(mine: Path, expected: Path) -> None:
    """Every file the same byte for byte, the report in all but times, and nothing left beside it."""
    found, wanted = contents(mine), contents(expected)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name] and name != REPORT_NAME] == []
    assert layers_of(mine) == layers_of(expected)
    mine_report, their_report = CompressionReport.load(mine), CompressionReport.load(expected)
    for field in ("skipped", "model_before", "model_after", "config", "calibration", "notes", "base_model"):
        assert getattr(mine_report, field) == getattr(their_report, field), field
    assert not os.path.exists(mine.parent / f".{mine.name}.pgsvd")


class Killed(BaseException):
    """Ends a run as a signal would."""


def failing(monkeypatch, place, number, before=True, error=Killed):
    """Let a method fail at its n-th call, before or after it did its work."""
    owner, name = place
    method, calls = getattr(owner, name), 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == number and before:
            raise error("here")
        result = method(*args, **kwargs)
        if calls == number:
            raise error("here")
        return result

    monkeypatch.setattr(owner, name, counted)
