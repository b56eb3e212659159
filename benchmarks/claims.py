"""The paper's claims, each with the command that checks it here, what was found, and whether it held.

The verdicts are counted from the JSON results: a claim held if it did in every case, in part if in some.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grid
from cells import RESULTS, read_cells
from grid import DENSE, read_results, source


Result = Mapping[str, Any]
# What was found, in words, and in which of the cases the claim held; `None` where nothing was measured.
Finding = tuple[str, Sequence[bool]] | None
# Of the paper: two numbers this near to one another are called level.
LEVEL = 0.05
# What PGSVD is compared with in tasks.
BASELINES = ("svd", "svd_llm", "als")


@dataclass(frozen=True)
class Claim:
    """A claim.

    Args:
        place: in the paper.
        says: what it claims.
        command: that measures it.
        find: what was found.
    """

    place: str
    says: str
    command: str
    find: Callable[[], Finding]


def label(method: str) -> str:
    return grid.methods()[method]["label"]


def verdict(finding: Finding) -> str:
    """Whether a claim held, in words."""
    if finding is None:
        return "not run"
    _, held = finding
    return "held" if all(held) else "did not hold" if not any(held) else f"held in {sum(held)} of {len(held)}"


def means(results: Iterable[Result], method: str, value: Callable[[Result], float]) -> dict[tuple[str, float], float]:
    """By model and reduction the mean of a method over its seeds."""
    found: dict[tuple[str, float], list[float]] = {}
    for result in results:
        if result["method"] == method and "failed" not in result:
            found.setdefault((result["model"], result["reduction"]), []).append(value(result))
    return {case: statistics.mean(values) for case, values in found.items()}


def perplexities(method: str, reductions: Sequence[float] = (0.2, 0.4)) -> dict[tuple[str, float], float]:
    """As `means`, at the paper's reductions."""
    found = means(read_results("perplexity"), method, lambda result: result["perplexity"])
    return {case: value for case, value in found.items() if case[1] in reductions}


def failing(name: str, method: str) -> str:
    """The models that a method fails on in a file of cells, in words; nothing where there are none."""
    found = [result["model"] for result in read_results(name) if result["method"] == method and "failed" in result]
    return f"; {label(method)} fails on {', '.join(dict.fromkeys(found))}" if found else ""


def lower_perplexity(method: str, other: str) -> Finding:
    """Whether a method has less perplexity than another, by model and reduction."""
    ours, theirs = perplexities(method), perplexities(other)
    cases = [case for case in ours if case in theirs]
    if not cases:
        return None
    ratios = [ours[case] / theirs[case] for case in cases]
    text = f"perplexity {statistics.geometric_mean(ratios):.3f} × in the mean, {min(ratios):.3f} to {max(ratios):.3f}"
    text += f", over {len(cases)} models and reductions{failing('perplexity', other)}"
    return text, [ratio < 1 for ratio in ratios]


def level_perplexity(method: str, other: str) -> Finding:
    """Whether two methods are level."""
    found = lower_perplexity(method, other)
    if found is None:
        return None
    ours, theirs = perplexities(method), perplexities(other)
    return found[0], [abs(ours[case] / theirs[case] - 1) <= LEVEL for case in ours if case in theirs]


def clips(method: str) -> dict[tuple[str, float], float]:
    """Mean zero-shot accuracy in % of a method on the CLIP."""
    return means(read_results("clip"), method, lambda result: 100 * result["mean_accuracy"])


def clip_svd_at_chance() -> Finding:
    """Whether plain SVD leaves less than a fifth of what is between chance and the dense model, as in the paper."""
    found, dense = clips("svd"), clips(DENSE)
    if not found:
        return None
    chance = chance_of_sets(next(model for model, _ in found))
    kept = {case: (value - chance) / (next(iter(dense.values())) - chance) for case, value in found.items()}
    text = "; ".join(f"{case[1]:.0%} removed: {found[case]:.1f} %, chance {chance:.1f} %" for case in sorted(kept))
    return text, [share < 0.2 for share in kept.values()]


def chance_of_sets(model: str) -> float:
    """Mean accuracy in % of guessing, over the six sets of a CLIP of ours."""
    account = json.loads((Path(source(grid.models()[model]["path"])) / "training.json").read_text(encoding="utf-8"))
    return 100 * statistics.mean(1 / count for count in account["heldout"]["answers"].values())


def higher_accuracy(method: str, other: str) -> Finding:
    """Whether a method is the more accurate on the CLIP, by reduction."""
    ours, theirs, dense = clips(method), clips(other), clips(DENSE)
    cases = sorted(case for case in ours if case in theirs)
    if not cases:
        return None
    text = "; ".join(f"{case[1]:.0%} removed: {ours[case]:.1f} % for {theirs[case]:.1f} %" for case in cases)
    return f"{text}; dense {next(iter(dense.values())):.1f} %", [ours[case] > theirs[case] for case in cases]


def lower_contrastive_loss(method: str, other: str) -> Finding:
    """Whether a method has the lower contrastive loss on pairs that were not calibrated on, by reduction and seed."""
    found = {
        name: {(r["reduction"], r["seed"]): r["loss"] for r in read_results("clip") if r["method"] == name}
        for name in (method, other)
    }
    cases = sorted(case for case in found[method] if case in found[other])
    if not cases:
        return None
    text = "; ".join(
        f"{reduction:.0%} removed, seed {seed}: {found[method][reduction, seed]:.3f} for "
        f"{found[other][reduction, seed]:.3f}"
        for reduction, seed in cases
    )
    return text, [found[method][case] <= found[other][case] for case in cases]


def search_beats_grid(method: str = "pgsvd_towers") -> Finding:
    """Whether what the search finds has the contrastive loss of the best by hand, means over the seeds."""
    results = read_results("clip")
    by_hand = [result for result in results if "vision" in result["settings"]]
    seeds = {result["seed"] for result in by_hand}
    losses = {
        name: means([result for result in results if result["seed"] in seeds], name, lambda result: result["loss"])
        for name in {method, *(result["method"] for result in by_hand)}
    }
    found = losses.pop(method)
    best = {case: min(other[case] for other in losses.values() if case in other) for case in found if losses}
    cases = sorted(best)
    if not cases:
        return None
    text = "; ".join(f"{case[1]:.0%} removed: {found[case]:.3f} for {best[case]:.3f}" for case in cases)
    return text, [found[case] <= best[case] * (1 + LEVEL / 10) for case in cases]


def vision_is_sensitive() -> Finding:
    """Whether compressing the vision tower alone costs more accuracy than compressing the text tower alone."""
    vision, text, dense = clips("pgsvd_als_vision_only"), clips("pgsvd_als_text_only"), clips(DENSE)
    cases = sorted(case for case in vision if case in text)
    if not cases:
        return None
    said = "; ".join(f"{case[1]:.0%} of it removed: {vision[case]:.1f} % for {text[case]:.1f} %" for case in cases)
    return f"vision alone against text alone, {said}; dense {next(iter(dense.values())):.1f} %", [
        vision[case] < text[case] for case in cases
    ]


def highest_scores(name: str, method: str, others: Sequence[str]) -> Finding:
    """Whether a method answers more of the tasks' questions than the best of others, by model and reduction."""

    def mean(result: Result) -> float:
        return 100 * statistics.mean(task["accuracy"] for task in result["accuracy"].values())

    results = read_results(name)
    ours, dense = (means(results, each, mean) for each in (method, DENSE))
    theirs = {other: means(results, other, mean) for other in others}
    best = {case: max((found[case], other) for other, found in theirs.items() if case in found)
            for case in ours if any(case in found for found in theirs.values())}  # fmt: skip
    if not best:
        return None
    own = {model: value for (model, _), value in dense.items()}
    text = "; ".join(
        f"{model}, {reduction:.0%} removed: {ours[model, reduction]:.1f} % for {score:.1f} % of {label(other)} "
        f"(dense {own[model]:.1f} %)"
        for (model, reduction), (score, other) in sorted(best.items())
    )
    return text, [ours[case] > best[case][0] for case in sorted(best)]


def faster() -> Finding:
    """Whether the compressed model makes more tokens a second."""
    results = [result for result in read_results("speed") if result["method"] == "pgsvd"]
    if not results:
        return None
    parts = {phase: [result[phase]["speed_up"] for result in results] for phase in ("prompt", "generation")}
    text = "; ".join(f"{phase} {min(found):.2f} to {max(found):.2f} ×" for phase, found in parts.items())
    return text, [ratio > 1 for found in parts.values() for ratio in found]


def theory() -> list[dict[str, Any]]:
    """What `theory.py` measured, a cell a model."""
    return read_cells(RESULTS / "theory.json")


def close_to(envelope: str, distance: str = "0.05") -> Finding:
    """Whether at least 98 % of the layers are within a distance of an envelope, by model."""
    shares = [cell["profiles"]["weights"]["share_of_layers_within"][envelope][distance] for cell in theory()]
    text = ", ".join(f"{cell['model']} {share:.0%}" for cell, share in zip(theory(), shares, strict=True))
    return (f"within {distance} of it: {text}", [share >= 0.98 for share in shares]) if shares else None


def front_below_uniform() -> Finding:
    """Whether one ε gives the smaller surrogate than uniform ranks, by model and reduction."""
    ratios = []
    for cell in theory():
        surrogates = {(p["allocation"], p["asked"].get("parameter_reduction")): p["surrogate"] for p in cell["sweep"]}
        ratios += [s / surrogates["uniform", r] for (a, r), s in surrogates.items() if a == "pareto"]
    text = f"Σ e of one ε over that of uniform ranks: {min(ratios):.3f} to {max(ratios):.3f}" if ratios else ""
    return (text, [ratio < 1 for ratio in ratios]) if ratios else None


def bound_holds() -> Finding:
    """Whether the bound is above the change of the loss, by model and reduction, and how loose it is."""
    totals = [bound["total"] for cell in theory() for bound in cell["bounds"]]
    if not totals:
        return None
    loose = [total["bound_over_change"] for total in totals]
    text = f"the bound is {min(loose):.0f} to {max(loose):.0f} times the change, all layers compressed"
    return text, [ratio >= 1 for ratio in loose]


def equal_is_robust() -> Finding:
    """Whether one ε has less held-out loss than the ranks that measured sensitivities give, by model and reduction."""
    plans = [each["plans"] for cell in theory() for each in cell["allocations"]]
    if not plans:
        return None
    rises = [plan["pareto"]["evaluation_loss"] - plan["measured α"]["evaluation_loss"] for plan in plans]
    spreads = [next(iter(cell["spread"].values())) for cell in theory()]
    text = f"the largest α is {min(spreads):.0f} to {max(spreads):.0f} times the least; held-out loss of one ε less "
    return f"{text}that of measured α: {min(rises):+.3f} to {max(rises):+.3f}", [rise < 0 for rise in rises]


def levels_off() -> Finding:
    """Whether the median objective after ten sweeps is within 1 % of the optimum, by model and reduction."""
    medians = [found["median"] for cell in theory() for found in cell["als"].values()]
    if not medians:
        return None
    after = {sweeps: max(median[sweeps] for median in medians) - 1 for sweeps in (1, 5, 10)}
    text = ", ".join(f"{sweeps} sweeps {excess:.2%}" for sweeps, excess in after.items())
    return f"median over the layers above the optimum, at most: {text}", [median[10] <= 1.01 for median in medians]


def allocation_matters_more() -> Finding:
    """Whether one ε instead of uniform ranks gains more than the exact optimum instead of ALS."""
    als, eigh, both = perplexities("als"), perplexities("eigh"), perplexities("pgsvd_als")
    cases = [case for case in als if case in eigh and case in both]
    if not cases:
        return None
    solver, allocation = ([found[case] / als[case] for case in cases] for found in (eigh, both))
    text = f"of SVD-ALS's perplexity with uniform ranks: one ε {statistics.geometric_mean(allocation):.3f}, the exact "
    return f"{text}optimum {statistics.geometric_mean(solver):.3f}", [
        ranks < factors for ranks, factors in zip(allocation, solver, strict=True)
    ]


CLAIMS = [
    Claim(
        "Appendix G",
        "About 98 % of the layers lie close to the convex envelope; close to its own, of each layer",
        "theory.py",
        lambda: close_to("own envelope"),
    ),
    Claim(
        "Appendix G",
        "The same of one envelope common to all layers, on which one ε for all rests",
        "theory.py",
        lambda: close_to("common envelope"),
    ),
    Claim("Theorem 1", "The change of the loss is bounded by Σ α'_l ‖ΔW_l X_lᵀ‖", "theory.py", bound_holds),
    Claim("Section on α", "Taking all α_l as equal is robust", "theory.py", equal_is_robust),
    Claim("Theorem 2", "One ε for all layers is optimal for the surrogate Σ e_l", "theory.py", front_below_uniform),
    Claim("Algorithm 1", "ALS levels off after 5 to 10 sweeps", "theory.py", levels_off),
    Claim(
        "Ablation",
        "Of PGSVD's gain over SVD-LLM, the ranks give more than the solver",
        "run.py perplexity",
        allocation_matters_more,
    ),
    Claim(
        "Table 1",
        "PGSVD has less perplexity than SVD-ALS with uniform ranks (LLaMA-2-7B: 7.38 for 7.72 at 20 %, 13.46 for "
        "15.03 at 40 %)",
        "run.py perplexity",
        lambda: lower_perplexity("pgsvd_als", "als"),
    ),
    Claim(
        "Table 1",
        "PGSVD has less perplexity than SVD-LLM (7.38 for 7.70, 13.46 for 14.95)",
        "run.py perplexity",
        lambda: lower_perplexity("pgsvd_als", "svd_llm"),
    ),
    Claim(
        "Table 1",
        "SVD-ALS and SVD-LLM are level at uniform ranks, within 5 % (7.72 and 7.70, 15.03 and 14.95)",
        "run.py perplexity",
        lambda: level_perplexity("als", "svd_llm"),
    ),
    Claim(
        "Table 1",
        "PGSVD is the most accurate in zero-shot tasks, of it and the baselines (LLaMA-2-7B: 56.08 for 54.42 at 20 %)",
        "run.py accuracy",
        lambda: highest_scores("accuracy", "pgsvd_als", BASELINES),
    ),
    Claim(
        "Table 1",
        "The same in a task that small models are above chance in (BLiMP, not the paper's)",
        "run.py blimp",
        lambda: highest_scores("blimp", "pgsvd_als", BASELINES),
    ),
    Claim(
        "Table 2",
        "Plain SVD takes CLIP down to chance (3.09 % and 3.28 % over six sets)",
        "run.py clip",
        clip_svd_at_chance,
    ),
    Claim(
        "Table 2",
        "PGSVD with one ε a tower is more accurate than SVD-ALS with uniform ranks (62.60 for 45.53 at 20 %, 50.89 "
        "for 37.08 at 40 %)",
        "run.py clip",
        lambda: higher_accuracy("pgsvd_als_towers", "als"),
    ),
    Claim(
        "Table 2",
        "The same with one ε for both towers, which the paper does not try",
        "run.py clip",
        lambda: higher_accuracy("pgsvd_als", "als"),
    ),
    Claim(
        "Left open",
        "(ε_v, ε_t) found by our search give the held-out contrastive loss of one ε for both, or less",
        "run.py clip",
        lambda: lower_contrastive_loss("pgsvd_towers", "pgsvd"),
    ),
    Claim(
        "Left open",
        "The same with factors by ten sweeps of ALS, which the search, made with the exact optimum's, does not see",
        "run.py clip",
        lambda: lower_contrastive_loss("pgsvd_als_towers", "pgsvd_als"),
    ),
    Claim(
        "Left open",
        "The search gives the loss of the best of a grid of nine pairs, to half a percent",
        "run.py clip",
        search_beats_grid,
    ),
    Claim("Section on CLIP", "The vision tower is the more sensitive one", "run.py clip", vision_is_sensitive),
    Claim("Speed", "The compressed model is faster", "run.py speed", faster),
]


def table() -> str:
    """Every claim in a row."""
    lines = ["| in the paper | claim | command | found here | |", "|---|---|---|---|---|"]
    for claim in CLAIMS:
        found = claim.find()
        text = found[0] if found else ""
        lines.append(f"| {claim.place} | {claim.says} | `{claim.command}` | {text} | **{verdict(found)}** |")
    return "\n".join(lines)
