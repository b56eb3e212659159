"""Write the tables of docs/large_models.md from the results of the benchmarks of time and memory.

python benchmarks/large_model_tables.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from cells import GIB, RESULTS, fill, read_cells


DOCUMENT = Path(__file__).parent.parent / "docs" / "large_models.md"


def rows(head: str, lines: list[str]) -> str:
    columns = head.count("|") - 1
    return "\n".join([head, "|---|" + "---:|" * (columns - 1), *lines])


def measured() -> str:
    """Whole runs, in memory and from disk, by depth."""
    head = "| shapes, calibration | way | peak memory | bound | peak disk | seconds | of them plan, walk, factors |"
    lines = []
    for c in sorted(read_cells(RESULTS / "streaming.json"), key=lambda c: (c["model"], c["layers"], c["way"])):
        parts = c["parts"]
        walk = parts["survey"] + parts["grams"]
        blocks = f"{c['layers']} block{'s' if c['layers'] > 1 else ''}"
        lines.append(
            f"| {c['model']}, {blocks}, {c['tokens']:,} tokens | {c['way']} "
            f"| {c['peak_rss'] / GIB:.2f} GiB "
            f"| {c['bound'] / GIB:.2f} GiB | {c['peak_disk'] / 1e9:.2f} GB | {c['seconds']:.0f} "
            f"| {parts['plan']:.0f}, {walk:.0f}, {parts['factors']:.0f} |"
        )
    return rows(head, lines)


def computed() -> str:
    """What the cost model gives for models that were not run."""
    head = "| computed, not run | parameters | memory | disk | hours | s a block |"
    lines = [
        f"| {c['model']}, {c['sequences']} × {c['length']} tokens, {c['reduction']:.0%} removed "
        f"| {c['parameters'] / 1e9:.1f} G | {c['memory'] / GIB:.1f} GiB | {c['disk'] / 1e9:.0f} GB "
        f"| {c['seconds'] / 3600:.1f} | {c['seconds'] / c['blocks']:.0f} |"
        for c in read_cells(RESULTS / "cost_model.json")
    ]
    return rows(head, lines)


def of_block(cells: list[dict[str, Any]], **key: Any) -> dict[str, Any] | None:
    return next((c for c in cells if key.items() <= c.items()), None)


def block() -> str:
    """One block: the whole compression over its forward pass, and SVD-LLM's recipe over ours."""
    cells = read_cells(RESULTS / "block_time.json")
    head = (
        "| calibration tokens | forward pass, s | compressing, s | over the forward pass | SVD-LLM, s | over ours "
        "| shared inputs once |"
    )
    lines = []
    for ours in [c for c in cells if c["part"] == "ours"]:
        forward = of_block(cells, sequences=ours["sequences"], part="forward")
        peer = of_block(cells, sequences=ours["sequences"], part="svd_llm")
        assert forward is not None
        ratio, tokens = ours["seconds"] / forward["seconds"], f"{ours['tokens']:,}, {ours['reduction']:.0%} removed"
        times = (peer["seconds"], peer["seconds_grams_shared"]) if peer else ()
        other = " | ".join(
            [f"{peer['seconds']:.0f}" if peer else "not run", *(f"{t / ours['seconds']:.2f}" for t in times)]
        )
        lines.append(f"| {tokens} | {forward['seconds']:.1f} | {ours['seconds']:.0f} | {ratio:.2f} | {other} |")
    return rows(head, lines)


def decompositions() -> str:
    """The decompositions of one block alone."""
    result = json.loads((RESULTS / "decompositions.json").read_text(encoding="utf-8"))
    head = "| layer | plan, s | factors, s | errors, s | in float64 | SVD-LLM | above the optimum |"
    lines = []
    for name, shape in result["shapes"].items():
        ours = {step: value["seconds"] for step, value in shape["ours"].items()}
        lines.append(
            f"| {name} ({shape['shape'][0]} × {shape['shape'][1]}) | {ours['plan']:.1f} | {ours['factor']:.1f} "
            f"| {ours['errors']:.1f} | {shape['ours_float64']['factor']['seconds'] / ours['factor']:.1f} × "
            f"| {shape['svd_llm']['factor']['seconds'] / ours['factor']:.1f} × "
            f"| {shape['optimum_excess']['ours']:.0e} |"
        )
    whole = result["block"]
    lines.append(
        f"| **the block** | {whole['ours_plan_seconds']:.0f} | {whole['ours_factor_seconds']:.0f} "
        f"| {whole['ours_errors_seconds']:.0f} | {whole['ours_float64_over_ours']:.1f} × "
        f"| {whole['svd_llm_over_ours']:.1f} × | |"
    )
    return rows(head, lines)


def kills() -> str:
    """Runs that were killed."""
    head = "| model | calibration | SIGKILLs | files that differ in the end | finished blocks lost |"
    lines = [
        f"| {c['model']} | {c['calibration']} | {c['kills']} | {c['files_different']} of {c['files_compared']} "
        f"| {c['blocks_lost']} |"
        for c in read_cells(RESULTS / "kill.json")
    ]
    return rows(head, lines)


def main() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    for made in (measured, computed, block, decompositions, kills):
        pattern = rf"(<!-- {made.__name__} -->\n).*?(<!-- end -->)"
        if re.search(pattern, text, flags=re.DOTALL):
            fill(made.__name__, made(), DOCUMENT)


if __name__ == "__main__":
    main()
