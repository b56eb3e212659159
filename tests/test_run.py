"""The benchmark runner: cells from YAML, a JSON each, tables and verdicts from the JSON."""

from __future__ import annotations

import json
import math
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.fixture
def toy(dense, texts, tmp_path, monkeypatch, scripts):
    """A folder of cells with one file, `toy`, over one model, `tiny`."""
    import grid

    for name, part in (("calibration", texts[:48]), ("evaluation", texts[48:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    where = {name: {"file": str(tmp_path / f"{name}.jsonl")} for name in ("calibration", "evaluation")}
    spec = {"path": str(dense), "label": "tiny", "window": 16, "num_samples": 20, "evaluation_windows": 8, **where}
    monkeypatch.setattr(grid, "models", lambda: {"tiny": dict(spec), "absent": {"path": "$PGSVD_NO_SUCH/model"}})
    monkeypatch.setattr(grid, "CELLS", tmp_path / "cells")
    (tmp_path / "cells").mkdir()
    write(tmp_path, "kind: language_model\nmodels: [tiny]\nmethods: [dense, eigh, pgsvd]\nreductions: [0.2, 0.4]\n")
    return tmp_path


def write(folder, text):
    (folder / "cells" / "toy.yaml").write_text(text)


def run(folder, *arguments, complete=True):
    """The results, by method and reduction, of a run that ends with the right status."""
    from grid import read_results
    from run import main

    with nullcontext() if complete else pytest.raises(SystemExit, match="^1$"):
        main(["toy", *arguments, "--result", str(folder / "results")])
    return {(found["method"], found["reduction"]): found for found in read_results("toy", folder / "results")}


# What is asked for


def names():
    return sorted(path.relative_to(BENCHMARKS / "cells").with_suffix("").as_posix()
                  for path in (BENCHMARKS / "cells").rglob("*.yaml"))  # fmt: skip


@pytest.mark.parametrize("name", names())
def test_every_file_of_cells_asks_for_what_there_is(name):
    from grid import read_grid
    from kinds import kind_of
    from kinds.compressing import config_of

    cells = read_grid(name)
    assert len({cell.file() for cell in cells}) == len(cells) > 0
    for cell in cells:
        assert callable(kind_of(cell.kind).measure)
        if cell.method != "dense" and not {"vision", "projections"} & cell.settings.keys():
            config = config_of(cell, {"dataset": ["text"]})
            assert config.parameter_reduction == cell.reduction
            assert config.seed == cell.seed


def test_the_papers_cells_have_its_settings_and_models():
    from grid import models, read_grid

    for name in ("llama2-7b-20", "llama2-7b-40", "llama2-13b-20", "mistral-7b-20", "mistral-7b-40"):
        cells = {cell.method: cell for cell in read_grid(f"paper/{name}")}
        assert set(cells) == {"dense", "svd_llm", "als", "pgsvd_als"}
        assert cells["pgsvd_als"].settings["solver"] == "als"
        assert cells["pgsvd_als"].settings["allocation"] == "pareto"
        assert cells["pgsvd_als"].options["config"] == {"num_iterations": 10, "calibration": "parallel"}
        assert cells["pgsvd_als"].reduction == int(name[-2:]) / 100
        assert "paper" not in cells["pgsvd_als"].options
    paths = {spec["path"] for spec in models().values()}
    assert {"meta-llama/Llama-2-7b-hf", "mistralai/Mistral-7B-v0.1", "openai/clip-vit-base-patch32"} <= paths


def test_a_grid_is_every_combination_and_the_dense_model_once(toy):
    from grid import read_grid

    write(toy, "- &a {kind: language_model, models: [tiny], methods: [dense, svd, als], reductions: [0.2, 0.4], "
               "seeds: [0, 1], measures: [perplexity]}\n- {<<: *a, reductions: [0.6], seeds: [1]}\n")  # fmt: skip
    cells = [(cell.method, cell.reduction, cell.seed) for cell in read_grid("toy")]
    assert len(cells) == len(set(cells)) == 1 + 2 * 2 * 2 + 2
    assert cells[0] == ("dense", 0.0, 0)
    assert ("als", 0.6, 1) in cells
    assert ("als", 0.6, 0) not in cells


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: language_model\nmodels: [other]\n", "toy: model 'other' is not known; known are tiny, absent"),
        ("kind: language_model\nmodels: [tiny]\nmethods: [magic]\n", "toy: method 'magic' is not known; known are"),
        ("models: [tiny]\n", "toy: a grid needs kind"),
        ("kind: magic\nmodels: [tiny]\n", "kind 'magic' is not known; known are language_model"),
    ],
)
def test_what_is_not_known_is_said(toy, text, message):
    write(toy, text)
    with pytest.raises(SystemExit, match=message):
        run(toy)


def test_a_name_that_is_not_there_is_told_of_those_that_are(toy):
    from run import main

    with pytest.raises(SystemExit, match="there are no cells 'nothing'; there are toy"):
        main(["nothing", "--result", str(toy)])


# What is measured


def test_perplexity_is_that_of_the_windows(toy, dense, texts, tokenizer):
    found = run(toy)
    tokens = [token for text in texts[48:] for token in tokenizer(text)["input_ids"]][: 8 * 16]
    windows = torch.tensor(tokens).view(8, 16)
    model = AutoModelForCausalLM.from_pretrained(dense)
    with torch.no_grad():
        logits = model(input_ids=windows).logits.double().log_softmax(-1)
    losses = [-logits[i, t, windows[i, t + 1]].item() for i in range(8) for t in range(15)]
    assert found["dense", 0]["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert found["dense", 0]["evaluation_tokens"] == 128
    for (method, reduction), each in found.items():
        if method != "dense":
            assert reduction <= each["parameter_reduction"] < reduction + 0.05
            assert each["calibration_tokens"] == 20 * 16
    assert found["eigh", 0.4]["perplexity"] != found["eigh", 0.2]["perplexity"] != found["pgsvd", 0.2]["perplexity"]
    assert set(found["eigh", 0.2]["environment"]) >= {"torch", "transformers", "commit", "machine", "cpus", "threads"}


def test_what_is_measured_is_not_measured_again_until_something_else_is_asked_for(toy, capsys):
    first = run(toy)
    written = capsys.readouterr().out
    assert written.count(".json") == 5
    assert run(toy) == first
    assert capsys.readouterr().out == "toy: all that is asked for is measured already\n"
    write(toy, "kind: language_model\nmodels: [tiny]\nmethods: [dense, eigh]\nreductions: [0.2]\n"
               "config: {num_samples: 4}\n")  # fmt: skip
    second = run(toy)
    assert capsys.readouterr().out.count(".json") == 2
    assert second["eigh", 0.2]["calibration_tokens"] == 4 * 16 != first["eigh", 0.2]["calibration_tokens"]


def test_a_method_that_fails_is_a_result(toy, monkeypatch):
    from documents import by_reduction

    import optimum_pgsvd.factoring.layer as layer
    from optimum_pgsvd import CalibrationError

    def fails(*args, **kwargs):
        raise CalibrationError("the Gram matrix is singular")

    monkeypatch.setitem(layer.SOLVERS._functions, "eigh", fails)
    found = run(toy, "--reductions", "0.2", "--methods", "eigh")
    assert found["eigh", 0.2]["failed"] == "the Gram matrix is singular"
    assert "perplexity" in found["dense", 0]
    table = by_reduction(list(found.values()), lambda result: result["perplexity"])
    assert table.endswith("| exact optimum, uniform ranks | fails (1 of 1) |")


def test_only_what_is_named_is_measured(toy):
    assert set(run(toy, "--methods", "pgsvd", "--reductions", "0.4")) == {("dense", 0), ("pgsvd", 0.4)}


def test_what_is_not_here_is_said_and_passed_over(toy, capsys):
    write(toy, "kind: language_model\nmodels: [absent, tiny]\n")
    assert set(run(toy, complete=False)) == {("dense", 0)}
    assert "absent is not measured: $PGSVD_NO_SUCH/model: PGSVD_NO_SUCH is not set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (["--models", "huge"], "--models huge: the cells have tiny"),
        (["--methods", "eigh", "magic"], "--methods magic: the cells have dense, eigh, pgsvd"),
        (["--reductions", "0.25"], "--reductions 0.25: the cells have 0.0, 0.2, 0.4"),
        (["--seeds", "3"], "--seeds 3: the cells have 0"),
    ],
)
def test_a_choice_that_nothing_fits_is_refused(toy, choice, message):
    with pytest.raises(SystemExit, match=message):
        run(toy, *choice)


def test_another_text_is_another_question(toy, texts, capsys):
    """What is given in the place of the cells' own is a part of the result, and measured again where it changes."""
    (toy / "other.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[20:60]))
    (file,) = [toy / "results" / "toy" / "language_model--tiny--eigh--0.2--0.json"]
    chosen = ["--methods", "eigh", "--reductions", "0.2"]
    own = run(toy, *chosen)["eigh", 0.2]
    assert run(toy, *chosen, "--evaluation", str(toy / "other.jsonl")) == {}
    other = json.loads(file.read_text())
    assert other["options"]["evaluation"] == str(toy / "other.jsonl")
    assert other["perplexity"] != own["perplexity"]
    capsys.readouterr()
    run(toy, *chosen, "--evaluation", str(toy / "other.jsonl"))
    assert capsys.readouterr().out == "toy: all that is asked for is measured already\n"


def test_no_window_is_longer_than_the_model_was_made_for(toy):
    import grid
    from kinds.language_model import load

    case = load(grid.models()["tiny"] | {"window": 10**4}, {})
    assert case.windows.shape[1] == case.data["sequence_length"] == case.model.config.max_position_embeddings


def test_what_a_model_does_not_allow_is_said_and_passed_over(toy, capsys):
    write(toy, "kind: language_model\nmodels: [tiny]\nmethods: [dense, eigh]\nreductions: [0.2, 0.9999]\n")
    assert set(run(toy, complete=False)) == {("dense", 0), ("eigh", 0.2)}
    assert "toy: tiny is not measured: parameter_reduction=0.9999 cannot be met" in capsys.readouterr().err


def test_what_is_out_of_reach_is_said_and_passed_over(toy, monkeypatch, capsys):
    def unreachable(path, *args, **kwargs):
        raise ConnectionError(f"Couldn't reach {path!r} on the Hub")

    import grid

    spec = grid.models()["tiny"] | {"evaluation": {"dataset": "a/b", "split": "test"}}
    monkeypatch.setattr(grid, "models", lambda: {"tiny": spec})
    monkeypatch.setattr("datasets.load_dataset", unreachable)
    assert run(toy, complete=False) == {}
    assert "toy: tiny is not measured: Couldn't reach 'a/b' on the Hub" in capsys.readouterr().err


def test_the_list_says_how_much_is_measured(toy, capsys):
    from run import main

    run(toy, "--methods", "pgsvd")
    main(["--list", "--result", str(toy / "results")])
    assert "3 of    5 measured   tiny" in capsys.readouterr().out


@pytest.mark.parametrize("field", ["model", "calibration", "evaluation", "tasks"])
def test_what_is_ones_own_needs_a_folder_of_its_own(field, capsys):
    from run import main

    with pytest.raises(SystemExit):
        main(["perplexity", f"--{field}", "mine"])
    assert f"--{field} needs --result" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["clip", "--calibration", "mine"], "--calibration: clip has no use for it; what it takes is --model"),
        (["speed", "--evaluation", "mine"], "--evaluation: speed has no use for it; what it takes is --model, --cal"),
        (["perplexity", "--tasks", "mine"], "--tasks: perplexity has no use for it; .* --model, .*, --evaluation"),
        (["blimp", "--evaluation", "mine"], "--evaluation: blimp has no use for it; .* --model, .*, --tasks"),
        (["perplexity", "--model", "mine"], "--model takes the place of one model: name it by --models, one of babyl"),
        (["blimp", "--model", "m", "--models", "demo", "llama-8m"], "by --models, one of llama-8m, demo"),
    ],
)
def test_what_is_ones_own_is_used_or_refused(arguments, message, tmp_path):
    from run import main

    with pytest.raises(SystemExit, match=message):
        main([*arguments, "--result", str(tmp_path)])
    assert not [*tmp_path.iterdir()]


def test_a_missing_harness_is_told_before_anything_is_read(monkeypatch):
    from grid import Unavailable
    from kinds.language_model import load

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(Unavailable, match="accuracy needs lm_eval, as `pip install optimum-pgsvd"):
        load({}, {"measures": ["perplexity", "accuracy"]})


def local_tasks(folder, words):
    """A file for each task of ours, with as many questions."""
    (folder / "tasks" / "blimp").mkdir(parents=True)
    for name in ("arc_easy", "commonsense_qa", "piqa"):
        rows = [{"query": words[i], "choices": ["w1 w2", "w3"], "gold": i % 2} for i in range(4)]
        save(folder / "tasks" / f"{name}.jsonl", rows)
    rows = [{"context_options": ["w1 w2", "w3 w4"], "continuation": words[i], "gold": i % 2} for i in range(4)]
    save(folder / "tasks" / "winogrande.jsonl", rows)
    save(folder / "tasks" / "lambada_openai.jsonl", [{"context": words[i], "continuation": "w5"} for i in range(4)])
    for kind, extra in (("a", {"x": 1}), ("b", {})):
        save(folder / "tasks" / "blimp" / f"{kind}.jsonl",
             [{"sentence_good": f"w1 {kind}", "sentence_bad": "w2", **extra} for _ in range(2)])  # fmt: skip


def save(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


TASKS = ["local_arc_easy", "local_commonsense_qa", "local_lambada", "local_piqa", "local_winogrande"]


def test_a_cell_of_the_paper_runs_on_a_model_of_ones_own(dense, texts, tmp_path, monkeypatch):
    """The code of `paper/llama2-7b-20`, with a tiny model and local tasks in the place of what is on the Hub."""
    pytest.importorskip("lm_eval")
    from grid import read_results
    from run import main

    local_tasks(tmp_path, texts)
    monkeypatch.setenv("PGSVD_DATA", str(tmp_path))
    save(tmp_path / "a.jsonl", [{"text": text} for text in texts[:40]])
    save(tmp_path / "b.jsonl", [{"text": text} for text in texts[40:]])
    main(["paper/llama2-7b-20", "--model", str(dense), "--calibration", str(tmp_path / "a.jsonl"), "--evaluation",
          str(tmp_path / "b.jsonl"), "--tasks", *TASKS, "--result", str(tmp_path / "results")])  # fmt: skip
    folder = tmp_path / "results" / "paper" / "llama2-7b-20"
    found = {each["method"]: each for each in map(json.loads, (path.read_text() for path in folder.iterdir()))}
    assert set(found) == {"dense", "svd_llm", "als", "pgsvd_als"}
    for method, each in found.items():
        assert set(each["accuracy"]) == set(TASKS)
        assert all(task["questions"] == 4 for task in each["accuracy"].values())
        assert each["perplexity"] > 1
        if method != "dense":
            assert 0.2 <= each["parameter_reduction"] < 0.25
    assert found["als"]["perplexity"] != found["pgsvd_als"]["perplexity"]
    assert read_results("paper/llama2-7b-20", tmp_path / "results") == []  # other tasks are another question


def test_the_better_sentence_is_the_one_the_model_prefers(dense, tmp_path, monkeypatch, tokenizer):
    """Of each pair, the share whose first sentence has the higher log-likelihood, by hand."""
    pytest.importorskip("lm_eval")
    from kinds.language_model import accuracy

    pairs = [(f"w{i} w{i + 1} w{i + 2}", f"w{40 + i} w{2 * i} w7") for i in range(12)]
    (tmp_path / "tasks" / "blimp").mkdir(parents=True)
    save(tmp_path / "tasks" / "blimp" / "a.jsonl",
         [{"sentence_good": good, "sentence_bad": bad} for good, bad in pairs])  # fmt: skip
    monkeypatch.setenv("PGSVD_DATA", str(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(dense)

    def log_likelihood(text):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            scores = model(input_ids=ids).logits.log_softmax(-1)
        return scores[0, torch.arange(ids.shape[1] - 1), ids[0, 1:]].sum()

    share = sum(bool(log_likelihood(good) > log_likelihood(bad)) for good, bad in pairs) / len(pairs)
    found = accuracy(model, tokenizer, {"tasks": ["local_blimp"]})
    assert 0 < share < 1
    assert found["local_blimp"]["accuracy"] == pytest.approx(share)


# What is written from it


def test_a_table_has_means_and_half_the_range():
    from documents import by_reduction

    results = [{"method": "dense", "reduction": 0.0, "x": 1.0}]
    results += [{"method": "als", "reduction": 0.2, "x": x} for x in (2.0, 3.0)]
    results += [{"method": "als", "reduction": 0.4, "x": 5.0}, {"method": "pgsvd", "reduction": 0.4, "x": 4.0}]
    assert by_reduction(results, lambda result: result["x"]).splitlines() == [
        "|  | 20% removed | 40% removed |",
        "|---|---:|---:|",
        "| dense | 1 | 1 |",
        "| SVD-ALS, uniform ranks | 2.5 ± 0.5 | 5 |",
        "| PGSVD |  | 4 |",
    ]


def test_who_is_calibrated_on_more_is_named():
    from documents import calibrated_on

    rows = [("svd", 0), ("als", 512), ("pgsvd", 512), ("pgsvd_self", 1024), ("pgsvd_self", 1024), ("dense", None)]
    results = [
        {"method": method, **({} if tokens is None else {"calibration_tokens": tokens})} for method, tokens in rows
    ]
    assert calibrated_on(results[-1:]) == "nothing calibrated"
    assert calibrated_on(results) == "calibrated on 512; PGSVD, text sampled from the model on 1,024"


def test_verdicts_are_counted():
    from claims import verdict

    assert verdict(None) == "not run"
    assert verdict(("", [True, True])) == "held"
    assert verdict(("", [False, False])) == "did not hold"
    assert verdict(("", [True, False, False])) == "held in 1 of 3"


def test_a_claim_compares_means_over_seeds_by_model_and_reduction(monkeypatch):
    import claims

    def result(method, reduction, seed, perplexity):
        return {"model": "m", "method": method, "reduction": reduction, "seed": seed, "perplexity": perplexity}

    rows = [("als", 0.2, 0, 4.0), ("als", 0.2, 1, 6.0), ("pgsvd", 0.2, 0, 4.5), ("als", 0.4, 0, 7.0),
            ("pgsvd", 0.4, 0, 7.7), ("als", 0.6, 0, 9.0), ("pgsvd", 0.6, 0, 1.0)]  # fmt: skip
    monkeypatch.setattr(claims, "read_results", lambda name: [result(*row) for row in rows])
    text, held = claims.lower_perplexity("pgsvd", "als")
    assert held == [True, False]  # 60 % is not the paper's
    assert "0.900 to 1.100, over 2 models" in text
    assert claims.level_perplexity("pgsvd", "als")[1] == [False, False]
    assert claims.lower_perplexity("pgsvd", "absent") is None


def test_a_method_that_fails_is_named_where_it_is_compared_with(monkeypatch):
    import claims

    rows = [("m", "pgsvd", {"perplexity": 4.0}), ("m", "svd_llm", {"perplexity": 5.0}),
            ("n", "pgsvd", {"perplexity": 4.0}), ("n", "svd_llm", {"failed": "why"})]  # fmt: skip
    results = [
        {"model": model, "method": method, "reduction": 0.2, "seed": 0, **value} for model, method, value in rows
    ]
    monkeypatch.setattr(claims, "read_results", lambda name: results)
    text, held = claims.lower_perplexity("pgsvd", "svd_llm")
    assert held == [True]
    assert text.endswith("over 1 models and reductions; SVD-LLM fails on n")


def test_the_most_accurate_is_more_accurate_than_the_best_of_the_others(monkeypatch):
    """Not only than one of them; one that fails is none of them."""
    import claims

    def result(method, reduction, share):
        found = (
            {"failed": "why"} if share is None else {"accuracy": {"a": {"accuracy": share}, "b": {"accuracy": 0.5}}}
        )
        return {"model": "m", "method": method, "reduction": reduction, "seed": 0, **found}

    rows = [("dense", 0.0, 0.9), ("pgsvd", 0.2, 0.6), ("als", 0.2, 0.5), ("svd", 0.2, 0.7),
            ("pgsvd", 0.4, 0.4), ("als", 0.4, 0.2), ("svd", 0.4, None)]  # fmt: skip
    monkeypatch.setattr(claims, "read_results", lambda name: [result(*row) for row in rows])
    text, held = claims.highest_scores("accuracy", "pgsvd", ("svd", "als"))
    assert held == [False, True]
    assert "m, 20% removed: 55.0 % for 60.0 % of plain SVD, uniform ranks (dense 70.0 %)" in text
    assert claims.highest_scores("accuracy", "pgsvd", ("absent",)) is None


def test_a_search_is_compared_with_the_best_of_the_grid_on_the_grids_seeds(monkeypatch):
    import claims

    rows = [("a", 0.2, 0, 2.0), ("b", 0.2, 0, 1.0), ("a", 0.4, 0, 4.0), ("b", 0.4, 0, 3.0),
            ("pgsvd_towers", 0.2, 0, 1.5), ("pgsvd_towers", 0.4, 0, 3.0),
            ("pgsvd_towers", 0.2, 1, 0.1), ("pgsvd_towers", 0.4, 1, 9.0)]  # fmt: skip
    results = [
        {"model": "m", "method": method, "reduction": reduction, "seed": seed, "loss": loss,
         "settings": {} if method == "pgsvd_towers" else {"vision": 1.0}}
        for method, reduction, seed, loss in rows
    ]  # fmt: skip
    monkeypatch.setattr(claims, "read_results", lambda name: results)
    assert claims.search_beats_grid() == ("20% removed: 1.500 for 1.000; 40% removed: 3.000 for 3.000", [False, True])
    monkeypatch.setattr(claims, "read_results", lambda name: results[4:])
    assert claims.search_beats_grid() is None


def test_the_documents_are_those_of_the_results():
    """docs/results.md and README.md say what the JSON says."""
    import documents
    from grid import ROOT, read_results

    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    written = 0
    for name, make in documents.TABLES.items():
        if results := read_results(name):
            assert f"<!-- {name} -->\n{make(results)}\n<!-- end -->" in text, name
            written += 1
    if not written:
        pytest.skip("benchmarks/results has no result of run.py")
    assert documents.claims.table() in text
