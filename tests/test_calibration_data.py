"""From whatever is called a dataset to the very tokens that the model is measured on."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from conftest import word_tokenizer
from models import BEGIN, END, FAMILIES, ODD, VOCABULARY, Batch, generator
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from optimum_pgsvd import PGSVDConfig
from optimum_pgsvd.calibration import load_calibration_set
from optimum_pgsvd.calibration.data import LONGEST_DEFAULT, complete, default_length
from optimum_pgsvd.errors import CalibrationError, ConfigError


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch) -> None:
    """`datasets` sleeps five seconds after it has streamed a parquet file."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.05, raising=False)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One to change."""
    return word_tokenizer()


def model(name: str = "llama", **changes: Any) -> PreTrainedModel:
    return (FAMILIES | ODD)[name].build(**changes)


def load(dataset: Any, of: str = "llama", tokenizer: Any = None, **fields: Any) -> list[Batch]:
    config = PGSVDConfig(tolerance=0.5, dataset=dataset, **fields)
    return load_calibration_set(model(of), config, tokenizer)


def rows(batches: list[Batch]) -> list[list[int]]:
    """The sequences of all batches, one after the other."""
    return [row for batch in batches for row in batch["input_ids"].tolist()]


# Texts of which every word is its own: text 3 is "w30 w31 w32". Tokens are the words' numbers plus 4.
TEXTS = [" ".join(f"w{10 * i + j}" for j in range(3 + i % 2)) for i in range(8)]


def tokens_of(text: str) -> list[int]:
    return [BEGIN, *(int(word[1:]) + 4 for word in text.split())]


def order_of(tokens: list[int]) -> list[int]:
    """The texts, by number, that tokens come from."""
    return [(token - 4) // 10 for token in tokens if token >= 4 and (token - 4) % 10 == 0]


def joined(order: list[int]) -> list[int]:
    return [token for number in order for token in tokens_of(TEXTS[number])]


# Texts, from wherever they come


def written(kind: str, folder) -> Any:
    """The texts as a dataset of some kind."""
    table = datasets.Dataset.from_dict({"text": TEXTS, "length": [len(text) for text in TEXTS]})
    path = folder / f"texts.{kind}"
    if kind == "txt":
        path.write_text("\n\n".join(TEXTS) + "\n")
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    if kind == "parquet":
        table.to_parquet(path)
    memory = {
        "list": TEXTS,
        "tuple": tuple(TEXTS),
        "generator": (text for text in TEXTS),
        "list of rows": [{"text": text} for text in TEXTS],
        "Dataset": table,
        "IterableDataset": table.to_iterable_dataset(),
    }
    return memory.get(kind, path)


KINDS = ["list", "tuple", "generator", "list of rows", "Dataset", "IterableDataset", "txt", "jsonl", "parquet"]


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_joined_in_a_seeded_order(kind: str, tmp_path, tokenizer) -> None:
    """One window of all tokens: the texts one after the other, each with its special tokens."""
    total = sum(len(tokens_of(text)) for text in TEXTS)
    (window,) = rows(load(written(kind, tmp_path), tokenizer=tokenizer, sequence_length=total))
    order = order_of(window)
    assert sorted(order) == list(range(8))
    assert window == joined(order)


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_fixes_the_order(kind: str, tmp_path, tokenizer) -> None:
    def order(seed: int) -> list[int]:
        return order_of(rows(load(written(kind, tmp_path), tokenizer=tokenizer, seed=seed))[0])

    assert order(0) == order(0)
    assert len({tuple(order(seed)) for seed in range(4)}) > 1


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_a_path_is_as_good_as_its_name(kind: str, tmp_path, tokenizer) -> None:
    path = written(kind, tmp_path)
    assert rows(load(str(path), tokenizer=tokenizer)) == rows(load(path, tokenizer=tokenizer))


def test_windows(tokenizer) -> None:
    """36 tokens in windows of 5 are 7 windows, in the order of the tokens; the last token is left over."""
    (whole,) = rows(load(TEXTS, tokenizer=tokenizer, sequence_length=36))
    batches = load(TEXTS, tokenizer=tokenizer, sequence_length=5, batch_size=3)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(3, 5), (3, 5), (1, 5)]
    assert rows(batches) == [whole[start : start + 5] for start in range(0, 35, 5)]
    assert all(list(batch) == ["input_ids"] and batch["input_ids"].dtype == torch.int64 for batch in batches)


def test_as_many_windows_as_asked_for(tokenizer) -> None:
    windows = rows(load(TEXTS, tokenizer=tokenizer, sequence_length=5))
    for count in (1, 2, 7):
        assert rows(load(TEXTS, tokenizer=tokenizer, sequence_length=5, num_samples=count)) == windows[:count]


def test_as_many_windows_of_one_long_text(tokenizer) -> None:
    long = " ".join(f"w{i}" for i in range(80))
    assert rows(load([long], tokenizer=tokenizer, sequence_length=5, num_samples=1)) == [tokens_of(long)[:5]]


def test_texts_shorter_than_a_window(tokenizer) -> None:
    assert rows(load(["w3 w4"], tokenizer=tokenizer, sequence_length=50)) == [tokens_of("w3 w4")]


def test_windows_are_as_long_as_the_model_takes(tokenizer) -> None:
    texts = [" ".join(f"w{i}" for i in range(80))] * 3
    assert {len(row) for row in rows(load(texts, tokenizer=tokenizer))} == {64}
    tokenizer.model_max_length = 40
    assert {len(row) for row in rows(load(texts, tokenizer=tokenizer))} == {40}
    assert {len(row) for row in rows(load(texts, tokenizer=tokenizer, sequence_length=50))} == {50}


LENGTHS = {"llama": 64, "gpt2": 64, "bert": 64, "clip": 64, "whisper": 30, "t5": LONGEST_DEFAULT, "llava": 64}


@pytest.mark.parametrize("name", LENGTHS)
def test_default_length(name: str) -> None:
    assert default_length(model(name)) == LENGTHS[name]


def test_default_length_has_a_limit() -> None:
    assert default_length(SimpleNamespace(config=FAMILIES["llama"].build(max_position_embeddings=9999).config)) == 2048


# Texts of models that do not predict the next token


def test_padded_texts(tokenizer) -> None:
    batches = load(TEXTS, "bert", tokenizer, batch_size=3)
    assert [len(batch["input_ids"]) for batch in batches] == [3, 3, 2]
    order = order_of([token for row in rows(batches) for token in row])
    assert sorted(order) == list(range(8))
    for number, (row, mask) in zip(order, masked_rows(batches), strict=True):
        expected = tokens_of(TEXTS[number])
        assert mask == [1] * len(expected) + [0] * (len(row) - len(expected))
        assert row[: len(expected)] == expected
    assert all(batch["attention_mask"].all(dim=1).any() for batch in batches)  # no longer than its longest text


def masked_rows(batches: list[Batch]) -> Iterator[tuple[list[int], list[int]]]:
    for batch in batches:
        yield from zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True)


def test_padded_texts_are_truncated(tokenizer) -> None:
    long = " ".join(f"w{i}" for i in range(80))
    assert rows(load([long], "bert", tokenizer, sequence_length=7)) == [tokens_of(long)[:7]]
    assert rows(load([long], "bert", tokenizer)) == [tokens_of(long)[:64]]
    tokenizer.model_max_length = 62  # as RoBERTa's, whose first two positions stand for padding
    assert rows(load([long], "bert", tokenizer)) == [tokens_of(long)[:62]]


def test_as_many_padded_texts_as_asked_for(tokenizer) -> None:
    numbers = order_of([token for row in rows(load(TEXTS, "bert", tokenizer)) for token in row])
    some = load(TEXTS, "bert", tokenizer, num_samples=5, batch_size=2)
    assert [len(batch["input_ids"]) for batch in some] == [2, 2, 1]
    assert order_of([token for row in rows(some) for token in row]) == numbers[:5]


def test_blank_texts_are_passed_over(tokenizer) -> None:
    found = rows(load(["", "w1 w2", "  \n", "w3"], "bert", tokenizer, num_samples=2, batch_size=1))
    assert sorted(found) == [tokens_of("w1 w2"), tokens_of("w3")]


def test_without_a_pad_token(tokenizer) -> None:
    tokenizer.pad_token = None
    with pytest.raises(CalibrationError, match="need a tokenizer with a pad_token; set one, or batch_size=1"):
        load(TEXTS, "bert", tokenizer)
    found = rows(load(TEXTS, "bert", tokenizer, batch_size=1))
    assert sorted(found) == sorted(tokens_of(text) for text in TEXTS)


def test_texts_of_an_encoder_decoder(tokenizer) -> None:
    """The targets are the sources, their padding out of account."""
    for batch in load(TEXTS, "bart", tokenizer, batch_size=4):
        assert torch.equal(batch["labels"], batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100))
        assert torch.equal(batch["decoder_attention_mask"], batch["attention_mask"])


# Where the tokenizer comes from


class Reversing:
    """A tokenizer that can be told from another."""

    model_max_length = 1000
    pad_token = "p"

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": tokens_of(text)[::-1]}


def test_the_tokenizer_given_goes_before_the_config_s(tokenizer) -> None:
    assert rows(load(["w1 w2"], tokenizer=Reversing())) == [[6, 5, BEGIN]]
    config = PGSVDConfig(tolerance=0.5, dataset=["w1 w2"], tokenizer=Reversing())
    assert rows(load_calibration_set(model(), config)) == [[6, 5, BEGIN]]
    assert rows(load_calibration_set(model(), config, tokenizer)) == [[BEGIN, 5, 6]]


def test_the_tokenizer_by_name(tmp_path, tokenizer) -> None:
    tokenizer.save_pretrained(tmp_path)
    config = PGSVDConfig(tolerance=0.5, dataset=["w1 w2"], tokenizer=str(tmp_path))
    assert rows(load_calibration_set(model(), config)) == [[BEGIN, 5, 6]]


def test_the_model_s_own_tokenizer(tmp_path, tokenizer) -> None:
    model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = FAMILIES["llama"].model_class.from_pretrained(tmp_path)
    config = PGSVDConfig(tolerance=0.5, dataset=["w1 w2"])
    assert rows(load_calibration_set(loaded, config)) == [[BEGIN, 5, 6]]


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_the_tokenizer_of_a_processor(name: str, tokenizer) -> None:
    """A processor takes images first, so texts go to its tokenizer."""
    assert rows(load(["w1 w2"], name, SimpleNamespace(tokenizer=tokenizer))) == [[BEGIN, 5, 6]]


def test_no_tokenizer() -> None:
    with pytest.raises(CalibrationError, match=r"texts need a tokenizer: give tokenizer=\.\.\. with the config or to"):
        load(TEXTS)


def test_a_tokenizer_that_cannot_be_loaded(tmp_path) -> None:
    with pytest.raises(CalibrationError, match=f"no tokenizer could be loaded from '{tmp_path}'; give tokenizer="):
        load(TEXTS, tokenizer=str(tmp_path))


def test_a_model_s_place_without_a_tokenizer(tmp_path) -> None:
    model().save_pretrained(tmp_path)
    loaded = FAMILIES["llama"].model_class.from_pretrained(tmp_path)
    with pytest.raises(CalibrationError, match=f"no tokenizer could be loaded from '{tmp_path}'; give tokenizer="):
        load_calibration_set(loaded, PGSVDConfig(tolerance=0.5, dataset=TEXTS))


# Tokens

WINDOWS = [[10 * i + j + 10 for j in range(4)] for i in range(6)]


def as_tokens(kind: str, folder) -> Any:
    table = datasets.Dataset.from_dict({"input_ids": WINDOWS})
    path = folder / f"tokens.{kind}"
    if kind == "parquet":
        table.to_parquet(path)
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"input_ids": window}) + "\n" for window in WINDOWS))
    memory = {
        "1-D tensors": [torch.tensor(window) for window in WINDOWS],
        "int32 tensors": [torch.tensor(window, dtype=torch.int32) for window in WINDOWS],
        "2-D tensors": [torch.tensor(WINDOWS[:2]), torch.tensor(WINDOWS[2:5]), torch.tensor(WINDOWS[5:])],
        "one tensor": torch.tensor(WINDOWS),
        "lists": WINDOWS,
        "tuples": [tuple(window) for window in WINDOWS],
        "Dataset": table,
        "IterableDataset": table.to_iterable_dataset(),
    }
    return memory.get(kind, path)


TOKEN_KINDS = ["1-D tensors", "int32 tensors", "2-D tensors", "one tensor", "lists", "tuples", "Dataset"]
TOKEN_KINDS += ["IterableDataset", "jsonl", "parquet"]


@pytest.mark.parametrize("kind", TOKEN_KINDS)
def test_tokens_are_windows(kind: str, tmp_path) -> None:
    batches = load(as_tokens(kind, tmp_path), batch_size=4)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(4, 4), (2, 4)]
    assert all(list(batch) == ["input_ids"] and batch["input_ids"].dtype == torch.int64 for batch in batches)
    assert sorted(rows(batches)) == WINDOWS


@pytest.mark.parametrize("kind", TOKEN_KINDS)
def test_the_seed_fixes_the_windows(kind: str, tmp_path) -> None:
    def windows(seed: int) -> list[list[int]]:
        return rows(load(as_tokens(kind, tmp_path), num_samples=3, seed=seed))

    assert windows(0) == windows(0)
    assert all(len(windows(seed)) == 3 for seed in range(6))
    assert len({str(windows(seed)) for seed in range(6)}) > 1


PADDED = {"input_ids": [[5, 6, 0, 0], [7, 8, 9, 0]], "attention_mask": [[1, 1, 0, 0], [1, 1, 1, 0]]}


def test_padding_of_tokenized_rows_is_left_out() -> None:
    batches = load(datasets.Dataset.from_dict(PADDED))
    real = [[token for token, one in zip(*pair, strict=True) if one] for pair in real_or_masked(batches)]
    assert sorted(real) == [[5, 6], [7, 8, 9]]


def real_or_masked(batches: list[Batch]) -> Iterator[tuple[list[int], list[int]]]:
    """Sequences with their masks, of ones where there is none."""
    full = [batch | {"attention_mask": batch.get("attention_mask", batch["input_ids"] * 0 + 1)} for batch in batches]
    yield from masked_rows(full)


@pytest.mark.parametrize("columns", [["input_ids"], ["input_ids", "attention_mask"]], ids=str)
def test_tokenized_rows_in_torch_format(columns: list[str]) -> None:
    table = datasets.Dataset.from_dict({"input_ids": WINDOWS, "attention_mask": [[1] * 4] * 6})
    batches = load(table.select_columns(columns).with_format("torch"))
    assert all(batch["input_ids"].dim() == 2 for batch in batches)
    assert sorted(rows(batches)) == WINDOWS


def test_windows_of_several_lengths() -> None:
    """Only windows of one length share a batch; none is cut or padded."""
    windows = [WINDOWS[i][: 2 + i // 3] for i in range(6)]
    batches = load(windows, batch_size=8)
    assert sorted(rows(batches)) == sorted(windows)


def test_tokens_of_an_encoder_decoder() -> None:
    (batch,) = load([torch.tensor(WINDOWS)], "t5")
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert "decoder_attention_mask" not in batch


# Model inputs


def inputs(count: int, size: int = 2) -> list[Batch]:
    return [{"input_ids": torch.full((size, 3), i), "scale": torch.ones(size)} for i in range(count)]


def firsts(batches: list[Batch]) -> list[int]:
    return [int(batch["input_ids"][0, 0]) for batch in batches]


def test_model_inputs_are_taken_as_they_are() -> None:
    given = inputs(6)
    found = load(given, batch_size=1)
    assert sorted(firsts(found)) == list(range(6))
    for batch in found:
        (same,) = (other for other in given if int(other["input_ids"][0, 0]) == int(batch["input_ids"][0, 0]))
        assert list(batch) == list(same)
        assert all(batch[key] is same[key] for key in batch)
    assert firsts(load(given, seed=0)) == firsts(found)
    assert len({str(firsts(load(given, seed=seed))) for seed in range(4)}) > 1


def test_enough_model_inputs() -> None:
    """Batches of two sequences: for five, three of them."""
    expected = firsts(load(inputs(6)))
    for samples, count in ((1, 1), (2, 1), (3, 2), (5, 3), (12, 6), (99, 6)):
        assert firsts(load(inputs(6), num_samples=samples)) == expected[:count]


def test_model_inputs_are_not_changed() -> None:
    given = [{"input_ids": torch.tensor([[7, 8]])}]
    (found,) = load(given, "t5")
    assert list(found) == ["input_ids", "labels"]
    assert list(given[0]) == ["input_ids"]


def test_a_stream_of_model_inputs() -> None:
    assert sorted(firsts(load(iter(inputs(3))))) == [0, 1, 2]


def test_targets_are_made_only_where_there_are_none() -> None:
    bart = model("bart")
    for given in ({"decoder_input_ids": torch.tensor([[1, 2]])}, {"labels": torch.tensor([[1, 2]])}):
        assert complete(bart, {"input_ids": torch.tensor([[7, 8]]), **given}).keys() == {"input_ids", *given}
    features = {"input_features": torch.zeros(1, 8, 60)}
    assert complete(model("whisper"), dict(features)).keys() == features.keys()


def test_a_mask_is_made_for_padded_labels() -> None:
    labels = torch.tensor([[5, 6, -100], [5, -100, -100]])
    batch = complete(model("t5"), {"input_ids": torch.tensor([[7, 8], [7, 8]]), "labels": labels})
    assert batch["decoder_attention_mask"].tolist() == [[1, 1, 0], [1, 0, 0]]
    own = torch.ones(2, 3)
    batch = complete(model("t5"), {"input_ids": labels, "labels": labels, "decoder_attention_mask": own})
    assert batch["decoder_attention_mask"] is own


# A dataset on the Hub


def test_a_dataset_on_the_hub(monkeypatch, tokenizer) -> None:
    asked = []

    def load_dataset(path: str, **options: Any) -> datasets.IterableDataset:
        asked.append((path, options.get("name"), options["split"], options["streaming"]))
        return datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("user/texts", "user/texts:small"):
        (window,) = rows(load(name, tokenizer=tokenizer))
        assert window == joined(order_of(window))
    assert asked == [("user/texts", None, "train", True), ("user/texts", "small", "train", True)]


# Sampled from the model


def sample(of: PreTrainedModel | None = None, **fields: Any) -> list[list[int]]:
    options = {"num_samples": 5, "sequence_length": 12, "batch_size": 2} | fields
    config = PGSVDConfig(tolerance=0.5, dataset="self", **options)
    return rows(load_calibration_set(of or model(), config))


def test_samples_are_reproducible() -> None:
    assert sample() == sample()
    assert sample() != sample(seed=1)
    assert all(len(row) == 12 and row[0] == BEGIN for row in sample())


def test_samples_come_in_batches() -> None:
    config = PGSVDConfig(tolerance=0.5, dataset="self", num_samples=5, sequence_length=12, batch_size=2)
    batches = load_calibration_set(model(), config)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 12), (2, 12), (1, 12)]


def test_global_random_state_plays_no_part() -> None:
    torch.manual_seed(5)
    random.seed(5)
    before, states = sample(), (torch.get_rng_state(), random.getstate())
    torch.rand(3)
    random.random()
    assert sample() == before
    torch.manual_seed(5)
    random.seed(5)
    sample()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def test_shuffling_leaves_the_global_random_state_alone(tokenizer) -> None:
    state = random.getstate()
    load(TEXTS, tokenizer=tokenizer)
    assert random.getstate() == state


@torch.no_grad()
def slowly_sampled(of: PreTrainedModel, count: int, length: int, source: torch.Generator) -> list[list[int]]:
    """One batch, every sequence read anew for each token."""
    tokens = torch.full((count, 1), BEGIN)
    while tokens.shape[1] < length:
        drawn = torch.multinomial(of(input_ids=tokens).logits[:, -1].softmax(-1), 1, generator=source)
        drawn[tokens[:, -1] == END] = BEGIN
        tokens = torch.cat([tokens, drawn], dim=1)
    return tokens.tolist()


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bloom", "gemma3", "mistral", "mixtral", *ODD])
def test_samples_are_drawn_from_the_model(name: str) -> None:
    """The same draws from the same distributions, with a cache and without."""
    of = model(name)
    expected = slowly_sampled(of, 4, 16, generator(3))
    assert sample(of, num_samples=4, batch_size=4, sequence_length=16, seed=3) == expected


def with_ends(end: int | list[int], begin: int | None = BEGIN) -> PreTrainedModel:
    """A model that is fond of tokens 1, 2 and 3."""
    result = model()
    with torch.no_grad():
        result.lm_head.weight[1:4] *= 4
    result.config.eos_token_id, result.config.bos_token_id = end, begin
    return result


def followers(sequences: list[list[int]], token: int) -> set[int]:
    return {b for row in sequences for a, b in zip(row, row[1:], strict=False) if a == token}


def test_a_text_that_ended_is_followed_by_another() -> None:
    found = sample(with_ends(2), num_samples=16, sequence_length=30)
    assert followers(found, 2) == {BEGIN}
    assert len(followers(found, 3)) > 1


def test_several_ends() -> None:
    found = sample(with_ends([2, 3]), num_samples=16, sequence_length=30)
    assert followers(found, 2) == followers(found, 3) == {BEGIN}
    assert len(followers(found, BEGIN)) > 1


@pytest.mark.parametrize("end", [BEGIN, [BEGIN], [BEGIN, 2]], ids=str)
def test_one_token_for_begin_and_end(end: int | list[int]) -> None:
    """Such a token must not be followed by itself for ever."""
    found = sample(with_ends(end), num_samples=16, sequence_length=30)
    assert len(followers(found, BEGIN)) > 5
    assert followers(found, 2) == {BEGIN} if end == [BEGIN, 2] else len(followers(found, 2)) > 1


def test_a_model_without_a_beginning() -> None:
    found = sample(with_ends(2, begin=None), num_samples=16)
    assert len({row[0] for row in found}) > 5
    assert all(0 <= token < VOCABULARY for row in found for token in row)


def test_dropout_plays_no_part_in_sampling() -> None:
    quiet, dropping = model("gpt2"), model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5).train()
    dropping.transformer.h[0].eval()
    flags = [module.training for module in dropping.modules()]
    assert sample(dropping) == sample(quiet)
    assert [module.training for module in dropping.modules()] == flags


@pytest.mark.parametrize("on", [True, False])
def test_sampling_needs_no_use_cache(on: bool) -> None:
    of = model(use_cache=on)
    assert sample(of) == sample()
    assert of.config.use_cache is on


@pytest.mark.parametrize("name", ["t5", "bert", "clip"])
def test_models_that_cannot_be_sampled(name: str) -> None:
    message = f"dataset='self' needs a causal language model, which {type(model(name)).__name__} is not"
    with pytest.raises(CalibrationError, match=message):
        sample(model(name))


# What is no dataset

BAD = {
    "nothing": (None, r"solver='eigh' needs calibration data: give .*dataset=texts.* or use solver='svd'"),
    "an empty list": ([], "the calibration dataset is empty"),
    "an empty Dataset": (datasets.Dataset.from_dict({"text": []}), "the calibration dataset is empty"),
    "mixed kinds": (
        ["a text", torch.tensor([1, 2])],
        "the dataset mixes texts, token tensors, media and model inputs",
    ),
    "mixed kinds, too": (
        [{"input_ids": torch.tensor([[1]])}, [1, 2]],
        "the dataset mixes texts, token tensors, media and",
    ),
    "floats": ([torch.zeros(3)], "an example of the dataset is a Tensor, not text, tokens or model inputs"),
    "numbers": ([1, 2, 3], "an example of the dataset is a int, not text, tokens or model inputs"),
    "an empty window": ([[]], "an example of the dataset is a list, not text, tokens or model inputs"),
    "other columns": ([{"content": "a", "id": 3}], "an example has the columns content, id; give a 'text' column"),
    "blank texts": (["", " "], "the calibration texts hold no tokens"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_dataset(case: str, tokenizer) -> None:
    dataset, message = BAD[case]
    with pytest.raises(CalibrationError, match=message):
        load(dataset, "bert", tokenizer)


OTHER_TYPES = {
    "a number": 42,
    "one batch": {"input_ids": torch.zeros(1, 2)},
    "splits": datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": TEXTS})}),
}


@pytest.mark.parametrize("dataset", OTHER_TYPES.values(), ids=OTHER_TYPES)
def test_another_type(dataset: Any) -> None:
    with pytest.raises(ConfigError, match=f"dataset is a {type(dataset).__name__}; give a list of texts"):
        load(dataset)


def test_texts_without_tokens(tokenizer) -> None:
    tokenizer.backend_tokenizer.post_processor = None
    with pytest.raises(CalibrationError, match="the calibration texts hold no tokens"):
        load(["", " "], "llama", tokenizer)


def test_files_that_are_not_there(tmp_path) -> None:
    for name in ("texts.txt", "texts.jsonl", "texts.parquet", "folder"):
        with pytest.raises(CalibrationError, match=f"the dataset file {tmp_path / name} does not exist"):
            load(tmp_path / name)
    with pytest.raises(CalibrationError, match=r"the dataset file nowhere/texts\.txt does not exist"):
        load("nowhere/texts.txt")


@pytest.mark.parametrize("name", ["texts.txt", "texts.jsonl", "texts.parquet"])
def test_empty_files(name: str, tmp_path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(CalibrationError, match=f"the dataset file {tmp_path / name} is empty"):
        load(tmp_path / name)


def test_blank_texts_are_passed_over_where_texts_are_joined(tokenizer) -> None:
    """Of a blank text the special tokens alone would be left."""
    with pytest.raises(CalibrationError, match="the calibration texts hold no tokens"):
        load(["", " "], "llama", tokenizer)
    alone, amid = (load(texts, "llama", tokenizer) for texts in (["w1 w2"], ["", "w1 w2", " "]))
    assert torch.equal(alone[0]["input_ids"], amid[0]["input_ids"])


def test_files_of_an_unknown_type(tmp_path) -> None:
    path = tmp_path / "texts.csv"
    path.write_text("a,b\n")
    with pytest.raises(CalibrationError, match=rf"{path}: known file types are \.txt, \.jsonl, \.json, \.parquet"):
        load(path)


@pytest.mark.parametrize("name", ["texts.jsonl", "texts.parquet"])
def test_damaged_files(name: str, tmp_path) -> None:
    path = tmp_path / name
    path.write_bytes(b"{ this is not it")
    with pytest.raises(CalibrationError, match=f"the dataset '{path}' cannot be read: "):
        load(path)
