"""Where calibration examples come from: memory, a local file, or the Hub."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import CalibrationError
from .folders import read_folder
from .media import Media, media_of


TEXT_COLUMN = "text"
LOADERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}

# Texts are read until they are long enough for the tokens asked for, at this many characters a token: no tokenizer
# makes fewer tokens of a text than that.
CHARACTERS_PER_TOKEN = 16

# Columns that say nothing a row of tokens does not say itself, once its padding is gone.
TOKEN_COLUMNS = {
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "special_tokens_mask",
    "length",
    "overflow_to_sample_mapping",
}

Example = str | Tensor | Media | Mapping[str, Any]


def read_source(dataset: Any, num_samples: int, length: int, seed: int) -> list[Example]:
    """The examples of a dataset in an order fixed by the seed, as many as are needed.

    Args:
        dataset: see `PGSVDConfig.dataset`.
        num_samples: sequences wanted.
        length: tokens in a sequence.
        seed: of the order.

    Returns:
        Texts, token tensors `(T,)` or `(B, T)`, images and sounds, or model inputs.

    Raises:
        CalibrationError: it cannot be read or holds something else.
    """
    if isinstance(dataset, (str, os.PathLike)):
        examples = read_named(os.fspath(dataset), num_samples, length, seed)
    else:
        examples = take(ordered(dataset, seed), num_samples, length)
        if not hasattr(dataset, "__len__") and not hasattr(dataset, "shuffle"):
            random.Random(seed).shuffle(examples)
    kinds = {next((kind for kind in (str, Tensor, Media) if isinstance(e, kind)), dict) for e in examples}
    if len(kinds) > 1:
        raise CalibrationError("the dataset mixes texts, token tensors, media and model inputs; give one kind")
    return examples


def take(examples: Iterable[Any], num_samples: int, length: int) -> list[Example]:
    """The first examples that are enough for `num_samples` sequences of `length` tokens."""
    taken: list[Example] = []
    characters = 0
    for example in map(normalised, examples):
        taken.append(example)
        characters += len(example) if isinstance(example, str) else CHARACTERS_PER_TOKEN * length
        if len(taken) >= num_samples and characters >= CHARACTERS_PER_TOKEN * num_samples * length:
            break
    return taken


def ordered(dataset: Any, seed: int) -> Iterable[Any]:
    """The examples of a dataset in memory or of a stream, shuffled; a generator as it comes."""
    if hasattr(dataset, "shuffle") and hasattr(dataset, "column_names"):
        return undecoded(dataset).shuffle(seed=seed)
    if not hasattr(dataset, "__len__"):
        return dataset
    examples = list(dataset)
    random.Random(seed).shuffle(examples)
    return examples


def undecoded(dataset: Any) -> Any:
    """A `datasets.Dataset` or a stream whose images and sounds are left as they are stored.

    Then a damaged one can be named, and sounds do not need the FFmpeg that `datasets` decodes them by.
    """
    stored = [name for name, kind in (dataset.features or {}).items() if type(kind).__name__ in ("Audio", "Image")]
    for name in stored:
        dataset = dataset.cast_column(name, type(dataset.features[name])(decode=False))
    return dataset


def read_named(name: str, num_samples: int, length: int, seed: int) -> list[Example]:
    """The examples of a folder, a local file or a Hub dataset; whatever stops `datasets` is told with what to do."""
    if os.path.isdir(name):
        return take(ordered(read_folder(name), seed), num_samples, length)
    path, options = locate(name)
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        rows = undecoded(load_dataset(path, split="train", streaming=True, **options))
        examples = take(ordered(rows, seed), num_samples, length)
        folder = os.path.dirname(name) if os.path.isfile(name) else ""
        return [example.below(folder) if isinstance(example, Media) else example for example in examples]
    except CalibrationError:
        raise
    except DatasetNotFoundError as error:
        remedy = "check the name, and log in with `hf auth login` or HF_TOKEN where it is private or gated"
        raise unreadable(name, error, remedy) from error
    except ConnectionError as error:
        raise unreadable(name, error, "check the connection, or give a local .txt, .jsonl or .parquet file") from error
    except Exception as error:  # parsers and transports raise errors of many kinds
        remedy = (
            "name a configuration as in 'user/name:config', or load it yourself and give dataset=load_dataset(...)"
        )
        raise unreadable(name, error, "check the file" if os.path.isfile(name) else remedy) from error


def check_named(name: str) -> None:
    """Find what is wrong with the name of a dataset before a model is loaded.

    Raises:
        CalibrationError: it is that of a file which is not there, is empty or of no known type.
    """
    if not os.path.isdir(name):
        locate(name)


def locate(name: str) -> tuple[str, dict[str, Any]]:
    """What `datasets.load_dataset` calls a local file or a Hub dataset."""
    suffix = os.path.splitext(name)[1]
    if os.path.isfile(name):
        if suffix not in LOADERS:
            raise CalibrationError(f"{name}: known file types are {', '.join(LOADERS)}")
        if not os.path.getsize(name):
            raise CalibrationError(f"the dataset file {name} is empty")
        # A text file's examples are its paragraphs.
        return LOADERS[suffix], {"data_files": name} | ({"sample_by": "paragraph"} if suffix == ".txt" else {})
    if suffix in LOADERS or os.path.isabs(name):
        raise CalibrationError(f"the dataset file {name} does not exist")
    repository, _, configuration = name.partition(":")
    return repository, {"name": configuration or None}


def unreadable(name: str, error: Exception, remedy: str) -> CalibrationError:
    """An error that names the dataset, the cause and the remedy."""
    return CalibrationError(f"the dataset {name!r} cannot be read: {str(error).rstrip('.')}; {remedy}")


def normalised(example: Any) -> Example:
    """An example as a text, a token tensor, media or model inputs."""
    if isinstance(example, Media):
        return example
    if isinstance(example, str):
        return example
    if isinstance(example, Tensor) and not example.is_floating_point():
        return example
    if isinstance(example, (list, tuple)) and example and all(isinstance(token, int) for token in example):
        return torch.tensor(example)
    if isinstance(example, Mapping) or hasattr(example, "keys"):
        return normalised_row(example)
    raise CalibrationError(
        f"an example of the dataset is a {type(example).__name__}, not text, tokens or model inputs"
    )


def normalised_row(row: Mapping[str, Any]) -> Example:
    """A row of a dataset: media, text, tokens without their padding, or model inputs with a batch dimension."""
    if (media := media_of(row)) is not None:
        return media
    if isinstance(row.get(TEXT_COLUMN), str):
        return row[TEXT_COLUMN]
    values = {key: torch.tensor(v) if isinstance(v, list) and v and _numbers(v) else v for key, v in row.items()}
    tokens = values.get("input_ids")
    if isinstance(tokens, Tensor) and tokens.dim() == 1:
        if set(values) <= TOKEN_COLUMNS:
            return tokens[values["attention_mask"].bool()] if "attention_mask" in values else tokens
        return {key: value[None] for key, value in values.items() if isinstance(value, Tensor)}
    if any(isinstance(value, Tensor) for value in row.values()):
        return row
    raise CalibrationError(
        f"an example has the columns {', '.join(row)}; give a {TEXT_COLUMN!r} column, 'image' or 'audio', "
        "'input_ids', or model inputs as tensors; a datasets.Dataset has rename_column for it"
    )


def _numbers(values: list) -> bool:
    return all(isinstance(value, int) for value in values)
