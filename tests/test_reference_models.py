"""The reference models and their texts as committed, and the script that trained them on a toy."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer


REFERENCE = Path(__file__).parent.parent / "benchmarks" / "reference"
VOCABULARY, LENGTH = 32, 24


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(REFERENCE)


@pytest.fixture(params=["llama-8m", "moe-8m"])
def folder(request):
    path = REFERENCE / request.param
    if not path.is_dir():
        pytest.skip(f"benchmarks/reference/{request.param} is not there: train it, see benchmarks/reference/README.md")
    return path


def texts(name):
    path = REFERENCE / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"benchmarks/reference/{name}.jsonl is not there: write it with benchmarks/reference/prepare.py")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_reference_model_is_a_stock_checkpoint_in_bfloat16(folder):
    from export import SIZE_LIMIT

    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert type(model).__name__ == record["architecture"]
    assert model.num_parameters() == record["parameters"]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    files = list(folder.glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) == record["bytes"] <= SIZE_LIMIT
    with safe_open(files[0], framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".jsonl", ".safetensors"}


def test_the_llama_has_eight_million_parameters():
    path = REFERENCE / "llama-8m" / "training.json"
    if not path.exists():
        pytest.skip("benchmarks/reference/llama-8m is not there")
    assert 8_000_000 <= json.loads(path.read_text(encoding="utf-8"))["parameters"] <= 8_350_000


def test_the_recorded_perplexity_is_reproduced(folder):
    from prepare import windows
    from train import mean_loss

    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))["heldout"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    held_out = windows(tokenizer, (row["text"] for row in texts("heldout")), end=False)
    assert held_out.numel() == record["tokens"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = math.exp(mean_loss(model, held_out[: record["first_sequences"]]))
    assert found == pytest.approx(record["perplexity_of_first_sequences"], rel=0.01)
    # A slice of every book in turn is worth about as much as the whole.
    assert found == pytest.approx(record["perplexity"], rel=0.15)
    assert record["perplexity"] == pytest.approx(math.exp(record["loss"]))


def test_calibration_and_heldout_texts_have_no_book_in_common(folder):
    from prepare import CALIBRATION, HELD_OUT, shared

    calibration, held_out = texts("calibration"), texts("heldout")
    assert {row["title"] for row in calibration} == set(CALIBRATION)
    assert {row["title"] for row in held_out} == set(HELD_OUT)
    assert not set(CALIBRATION) & set(HELD_OUT)
    assert shared([row["text"] for row in held_out], [row["text"] for row in calibration]) == 0
    books = json.loads((folder / "training.json").read_text(encoding="utf-8"))["data"]
    for name in ("calibration", "heldout"):
        assert books[name]["runs_of_13_words_also_in_training"] == 0
        assert (REFERENCE / f"{name}.jsonl").stat().st_size <= 1_000_000


def test_the_table_of_the_readme_is_that_of_the_accounts():
    from export import FOLDERS, table

    paths = [REFERENCE / name / "training.json" for name in FOLDERS.values()]
    if not all(path.exists() for path in paths):
        pytest.skip("a model of benchmarks/reference is not there")
    expected = table([json.loads(path.read_text(encoding="utf-8")) for path in paths])
    assert f"\n{expected}\n" in (REFERENCE / "README.md").read_text(encoding="utf-8")


def test_a_copied_sentence_is_found():
    from prepare import SHINGLE, shared

    words = [f"{a}{b}" for a in "abcdefg" for b in "vwxyz"]
    text, other = " ".join(words), " ".join(words[5 : 5 + SHINGLE])
    assert shared([text], [text]) == 1
    assert shared([text], [f"Before. {other.upper()}, after"]) == 1 / (len(words) - SHINGLE + 1)
    assert shared([text], [" ".join(words[5 : 4 + SHINGLE])]) == 0


def test_any_stretch_of_samples_has_something_of_every_book():
    from prepare import samples

    books = [
        {"author": "A", "title": t, "text": "\n\n".join(f"{t}{i} " * 300 for i in range(12))} for t in ("x", "y", "z")
    ]
    found = samples(books, count=4, seed=0)
    assert [row["title"] for row in found] != ["x", "y", "z"] * 4
    for start in range(0, 12, 3):
        assert {row["title"] for row in found[start : start + 3]} == {"x", "y", "z"}
    assert len({row["text"] for row in found}) == 12
    assert found == samples(books, count=4, seed=0)


@pytest.fixture(params=["llama", "moe"])
def toy(request):
    """A config of the same class as a reference model's, and a text that can be learned by heart."""
    from train import MODELS

    config = copy.deepcopy(MODELS[request.param])
    small = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    for key, value in {**small, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}.items():
        setattr(config, key, value)
    sentence = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(3)).to(torch.int16)
    return config, sentence.repeat(LENGTH).view(-1, LENGTH)


def toy_plan(**settings):
    from train import Plan

    return Plan(**{"steps": 60, "batch_size": 4, "learning_rate": 1e-2, "warmup": 5, "report_every": 10,
                   "heldout_every": 20, "heldout_sequences": 8, "compile": False, **settings})  # fmt: skip


def weights(run):
    return dict(run.model.named_parameters())


def test_a_text_is_learned_by_heart(toy, tmp_path):
    from train import mean_loss, read_log, train

    config, tokens = toy
    run = train(config, tokens, tokens, tmp_path, toy_plan())
    log = read_log(tmp_path / "log.jsonl")
    assert [line["step"] for line in log] == [10, 20, 30, 40, 50, 60]
    assert [line["step"] for line in log if "heldout_loss" in line] == [20, 40, 60]
    assert mean_loss(run.model, tokens) < math.log(VOCABULARY) / 5
    assert log[-1]["loss"] == pytest.approx(mean_loss(run.model, tokens), rel=0.2)


@pytest.mark.parametrize("autocast", [False, True])
def test_stopping_and_going_on_changes_no_bit(toy, tmp_path, autocast):
    from train import read_log, train

    config, tokens = toy
    plan = toy_plan(steps=30, autocast=autocast)
    whole = weights(train(config, tokens, tokens, tmp_path / "whole", plan))
    for stop_after in (7, 11, None):
        parts = train(config, tokens, tokens, tmp_path / "parts", plan, stop_after=stop_after)
    assert parts.step == 30
    for name, weight in weights(parts).items():
        assert torch.equal(weight, whole[name]), name
    assert [line["step"] for line in read_log(tmp_path / "parts" / "log.jsonl")] == [10, 20, 30]
    # The checks can fail: another order of the data ends elsewhere.
    other = weights(train(config, tokens, tokens, tmp_path / "other", toy_plan(steps=30, autocast=autocast, seed=1)))
    assert not all(torch.equal(weight, whole[name]) for name, weight in other.items())


def test_a_lost_checkpoint_repeats_no_line_of_the_log(toy, tmp_path):
    from train import read_log, train

    config, tokens = toy
    plan = toy_plan(steps=30)
    train(config, tokens, tokens, tmp_path, plan, stop_after=15)
    earlier = (tmp_path / "checkpoint.safetensors").read_bytes()
    train(config, tokens, tokens, tmp_path, plan, stop_after=10)
    (tmp_path / "checkpoint.safetensors").write_bytes(earlier)  # as if killed before it was written
    run = train(config, tokens, tokens, tmp_path, plan)
    assert run.step == 30
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [10, 20, 30]


def test_one_pass_reads_every_sequence_once():
    from train import batch

    plan = toy_plan(batch_size=4)
    tokens = torch.arange(10, dtype=torch.int16)[:, None]
    passes = torch.cat([batch(tokens, step, plan) for step in range(5)]).flatten().view(2, 10)
    assert passes.sort(dim=1).values.tolist() == [list(range(10))] * 2
    assert not torch.equal(passes[0], passes[1])


def test_the_rate_rises_then_comes_down_to_nothing():
    plan = toy_plan(steps=100, warmup=10, learning_rate=1.0)
    rates = [plan.rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert rates[55] == pytest.approx(0.5)
    assert all(later < earlier for earlier, later in zip(rates[10:], rates[11:], strict=False))
    assert 0 < rates[-1] < 1e-3
