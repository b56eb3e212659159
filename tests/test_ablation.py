"""The accuracy tables: the settings they are of, the gap they count, and that the documents are what the JSON says."""

from pathlib import Path

import pytest

from optimum_pgsvd import PGSVDConfig


ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


@pytest.mark.parametrize("script", ["ablation", "domains", "quantized", "shared"])
def test_the_documents_hold_the_tables_of_the_json(script, monkeypatch):
    module = __import__(script)
    tables = []
    monkeypatch.setattr(
        module, "fill", lambda name, body, document=ROOT / "docs" / "results.md": tables.append((name, body, document))
    )
    module.write_tables()
    assert tables
    for name, body, document in tables:
        assert f"<!-- {name} -->\n{body}\n<!-- end -->" in document.read_text(encoding="utf-8")


def test_the_last_row_is_the_preset_and_the_paper_s_the_default():
    from ablation import METHODS, PAPER, TOGETHER

    assert PGSVDConfig(0.2, **METHODS["all and refinement: PGSVDConfig.best"]) == PGSVDConfig.best(0.2)
    assert PGSVDConfig(0.2, **TOGETHER) == PGSVDConfig.best(0.2, refine_steps=0)
    assert METHODS[PAPER] == {}


def cells(model, measure, losses):
    """Of one seed; a dense loss of 2, and of SVD-LLM 4 at every reduction."""
    from ablation import BASELINE, REDUCTIONS

    def cell(method, reduction, loss):
        return {"model": model, "method": method, "reduction": reduction, "seed": 0, "loss": loss, "measure": measure}

    found = {BASELINE: dict.fromkeys(REDUCTIONS, 4.0), **losses}
    return [cell("dense", 0.0, 2.0), *(cell(m, r, loss) for m, each in found.items() for r, loss in each.items())]


def test_means_are_over_one_set_of_models():
    """A model that lacks a reduction is in no mean of that method, nor is the mean given without it."""
    from ablation import PAPER, closure, closure_table, growing_groups

    both = [
        *cells("a", "perplexity", {PAPER: {0.2: 2.0, 0.4: 3.0, 0.6: 4.0}, "all of these": {0.2: 2.0}}),
        *cells("b", "perplexity", {PAPER: {0.2: 3.0, 0.4: 3.0, 0.6: 5.0}}),
        *cells("c", "words", {PAPER: {0.2: 4.0, 0.4: 4.0, 0.6: 4.0}}),
    ]
    assert closure(both, "a", PAPER, 0.4) == 0.5
    assert closure(both, "b", PAPER, 0.6) == -0.5
    groups = growing_groups(both)
    assert groups == {"2 language models": ["a", "b"], "and c, by words": ["a", "b", "c"]}
    rows = closure_table(both, groups, [PAPER, "all of these"]).splitlines()[2:]
    assert rows == [
        f"| {PAPER} | 2 language models | 75% | 50% | -25% |",
        f"| {PAPER} | and c, by words | 50% | 33% | -17% |",
    ]


def test_allocations_are_compared_with_the_best_that_was_measured():
    from ablation import ALLOCATED, allocation_table

    given = {"all of these": {0.2: 3.0, 0.4: 3.3}, "all, ranks by the paper": {0.2: 3.3, 0.4: 3.0},
             "all, uniform ranks": {0.4: 6.0}}  # fmt: skip
    table = allocation_table(cells("a", "perplexity", given), ALLOCATED).splitlines()
    assert "| a | by the loss | 3 (1.000) | 3.3 (1.100) |  |" in table
    assert "| a | one ε | 3.3 (1.100) | 3 (1.000) |  |" in table
    assert "| a | uniform |  | 6 (2.000) |  |" in table


def test_nothing_that_is_measured_on_is_calibrated_on():
    """Of the models that come with the project, and of those of PGSVD_DATA where it is set."""
    from ablation import REFERENCE
    from perplexity import cases, read_jsonl

    found = {name: (calibration, evaluation) for name, (_, calibration, evaluation, _) in cases().items()}
    found["reference"] = tuple(read_jsonl(REFERENCE / f"{part}.jsonl") for part in ("calibration", "heldout"))
    for name, (calibration, evaluation) in found.items():
        assert calibration, name
        assert evaluation, name
        assert not set(calibration) & set(evaluation), name
