"""On trained models: what the method is for. Skipped where PGSVD_DATA is not set."""

import copy
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from optimum_pgsvd import PGSVDCompressor, PGSVDConfig
from optimum_pgsvd.calibration.data import pack


def stories(data_dir):
    lines = (data_dir / "text" / "tinystories_a.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


@torch.no_grad()
def perplexity(model, windows):
    losses = [model(input_ids=batch, labels=batch).loss for batch in windows.split(16)]
    return math.exp(torch.stack(losses).mean())


@pytest.fixture(scope="module")
def babyllama(data_dir):
    folder = data_dir / "models" / "babyllama_tok361"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    windows = torch.stack(pack(stories(data_dir)[600:], tokenizer, num_samples=64, length=256))
    return AutoModelForCausalLM.from_pretrained(folder), tokenizer, windows


def compressed(babyllama, data_dir, reduction, **settings):
    """A compressed copy's held-out perplexity, and the report; calibrated on 32 768 tokens."""
    dense, tokenizer, windows = babyllama
    model = copy.deepcopy(dense)
    texts = stories(data_dir)[:600]
    config = PGSVDConfig(
        parameter_reduction=reduction, dataset=texts, num_samples=128, sequence_length=256, **settings
    )
    report = PGSVDCompressor(config).compress(model, tokenizer=tokenizer)
    return perplexity(model, windows), report


@pytest.mark.parametrize("reduction", [0.2, 0.4, 0.6])
def test_pgsvd_beats_als_uniform_beats_plain_svd(babyllama, data_dir, reduction):
    dense, _, windows = babyllama
    found, kept = {}, {}
    for name, settings in {
        "svd": {"solver": "svd", "allocation": "uniform"},
        "als": {"solver": "als", "allocation": "uniform"},
        "pgsvd": {},
    }.items():
        found[name], report = compressed(babyllama, data_dir, reduction, **settings)
        assert report.calibration["tokens"] == (0 if name == "svd" else 32768)
        kept[name] = report.parameters_after
    # Equal budgets: all three within one rank step, at most 128 + 352 parameters, of the same count.
    assert max(kept.values()) - min(kept.values()) <= 480
    assert perplexity(dense, windows) < found["pgsvd"] < found["als"] < found["svd"]


@pytest.mark.parametrize("reduction", [0.2, 0.4, 0.6])
def test_anchored_calibration_beats_parallel(babyllama, data_dir, reduction):
    parallel, _ = compressed(babyllama, data_dir, reduction, calibration="parallel")
    anchored, _ = compressed(babyllama, data_dir, reduction, calibration="anchored")
    assert anchored < parallel


@pytest.mark.parametrize("reduction", [0.2, 0.4, 0.6])
def test_pivoted_storage_beats_factors_at_equal_parameters(babyllama, data_dir, reduction):
    """By more than a tenth of what compression adds to the perplexity."""
    dense, _, windows = babyllama
    factors, plain = compressed(babyllama, data_dir, reduction)
    pivoted, report = compressed(babyllama, data_dir, reduction, storage="pivoted")
    assert abs(report.parameters_after - plain.parameters_after) <= 480
    added = factors - perplexity(dense, windows)
    assert pivoted < factors - 0.1 * added


def test_pivoted_storage_in_bfloat16_is_as_good_as_factors_in_bfloat16(babyllama, data_dir):
    """At equal ranks, both are within 1 % of the perplexity of float32, and of each other."""
    _, report = compressed(babyllama, data_dir, 0.4)
    ranks = {layer.name: layer.rank for layer in report.layers if layer.rank is not None}
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        for storage in ("factors", "pivoted"):
            model = copy.deepcopy(babyllama[0]).to(dtype)
            texts = stories(data_dir)[:600]
            config = PGSVDConfig(ranks=ranks, dataset=texts, num_samples=128, sequence_length=256, storage=storage)
            PGSVDCompressor(config).compress(model, tokenizer=babyllama[1])
            found[storage, dtype] = perplexity(model, babyllama[2])
    exact = found["factors", torch.float32]
    assert found["pivoted", torch.float32] == pytest.approx(exact, rel=1e-4)
    assert found["factors", torch.bfloat16] == pytest.approx(exact, rel=0.01)
    assert found["pivoted", torch.bfloat16] == pytest.approx(exact, rel=0.01)


def test_the_best_settings_beat_the_default_ones(babyllama, data_dir):
    """By a third of what the default ones lose; few samples, so that it takes seconds."""
    dense, tokenizer, windows = babyllama
    options = {"dataset": stories(data_dir)[:300], "num_samples": 32, "sequence_length": 128, "batch_size": 4}
    found = {}
    for name, config in {"default": PGSVDConfig(0.4, **options), "best": PGSVDConfig.best(0.4, **options)}.items():
        model = copy.deepcopy(dense)
        report = PGSVDCompressor(config).compress(model, tokenizer=tokenizer)
        assert report.parameter_reduction >= 0.4
        found[name] = math.log(perplexity(model, windows[:16]) / perplexity(dense, windows[:16]))
    assert 0 < found["best"] < 0.67 * found["default"]


def test_sampling_from_the_model_needs_no_text_and_beats_plain_svd(babyllama):
    dense, _, windows = babyllama
    found = {}
    for name, settings in {"self": {"dataset": "self"}, "svd": {"solver": "svd"}}.items():
        model = copy.deepcopy(dense)
        config = PGSVDConfig(parameter_reduction=0.4, num_samples=32, sequence_length=256, **settings)
        PGSVDCompressor(config).compress(model)
        found[name] = perplexity(model, windows)
    assert found["self"] < found["svd"]


def test_encoder_decoder_keeps_pronouncing(data_dir):
    """Activations matter at heavy compression: plain SVD pronounces nothing any more where PGSVD still does."""
    lines = (data_dir / "tasks" / "g2p_us_gold.jsonl").read_text(encoding="utf-8").splitlines()
    words = [json.loads(line) for line in lines]
    calibration, held_out = padded_batches(words[:1000]), words[2000:2200]
    dense = AutoModelForSeq2SeqLM.from_pretrained(data_dir / "models" / "g2p_bart_us")
    accuracy = {"dense": whole_words(dense, held_out)}
    for name, reduction, settings in (
        ("pgsvd light", 0.2, {"dataset": calibration}),
        ("pgsvd heavy", 0.6, {"dataset": calibration}),
        ("svd heavy", 0.6, {"solver": "svd"}),
    ):
        model = copy.deepcopy(dense)
        config = PGSVDConfig(parameter_reduction=reduction, num_samples=len(calibration), **settings)
        PGSVDCompressor(config).compress(model)
        accuracy[name] = whole_words(model, held_out)
    assert accuracy["pgsvd light"] > 0.9 * accuracy["dense"] > 0.5
    assert accuracy["pgsvd heavy"] > accuracy["svd heavy"] + 0.1


def padded(rows, value):
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, value)


def padded_batches(words, size=100):
    """Spelling in, pronunciation out, padded; -100 marks the padding of labels."""
    batches = []
    for start in range(0, len(words), size):
        chosen = words[start : start + size]
        ids = padded([word["input_ids"] for word in chosen], 0)
        labels = padded([word["labels"] for word in chosen], -100)
        batches.append({"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels})
    return batches


@torch.no_grad()
def whole_words(model, words):
    """Share of words whose greedy pronunciation is right to the last phoneme."""
    right = 0
    for word in words:
        out = model.generate(torch.tensor([word["input_ids"]]), max_new_tokens=40, do_sample=False, num_beams=1)[0]
        right += [t for t in out.tolist() if t not in (0, 1, 2)] == [t for t in word["labels"] if t not in (0, 1, 2)]
    return right / len(words)
