"""Where calibration examples come from: memory, a local file, or the Hub."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..errors import CalibrationError


TEXT_COLUMN = "text"
LOADERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}

# Texts are joined into windows, so many short ones make one sample: from a stream, this many are read for each.
EXAMPLES_PER_SAMPLE = 16


def read_source(dataset: Any, num_samples: int, seed: int) -> list[str | Tensor | Mapping[str, Any]]:
    """The examples of a dataset in an order fixed by the seed.

    Args:
        dataset: see `PGSVDConfig.dataset`.
        num_samples: sequences wanted, a bound on what is read from a stream.
        seed: of the order.

    Returns:
        Texts, token tensors `(T,)` or `(B, T)`, or model inputs.

    Raises:
        CalibrationError: it cannot be read or holds something else.
    """
    limit = num_samples * EXAMPLES_PER_SAMPLE
    if isinstance(dataset, (str, os.PathLike)):
        examples = read_named(os.fspath(dataset), limit, seed)
    else:
        examples = [normalised(example) for example in ordered(dataset, limit, seed)]
    kinds = {str if isinstance(e, str) else Tensor if isinstance(e, Tensor) else dict for e in examples}
    if len(kinds) > 1:
        raise CalibrationError("the dataset mixes texts, token tensors and model inputs; give one kind")
    return examples


def ordered(dataset: Any, limit: int, seed: int) -> Iterable[Any]:
    """The examples of a dataset in memory or of a stream, shuffled; at most `limit` of what has no length."""
    if hasattr(dataset, "shuffle") and hasattr(dataset, "column_names"):
        return islice(dataset.shuffle(seed=seed), limit)
    if isinstance(dataset, Mapping) or not isinstance(dataset, Iterable):
        raise CalibrationError(
            f"dataset is a {type(dataset).__name__}; give a list of texts, token tensors or model inputs, a "
            "datasets.Dataset, a file, the name of a Hub dataset, or 'self'"
        )
    examples = list(islice(dataset, limit if not hasattr(dataset, "__len__") else None))
    random.Random(seed).shuffle(examples)
    return examples


def read_named(name: str, limit: int, seed: int) -> list[str | Tensor | Mapping[str, Any]]:
    """The examples of a local file or of a Hub dataset; whatever stops `datasets` is told with what to do."""
    path, options = locate(name)
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        stream = load_dataset(path, split="train", streaming=True, **options)
        return [normalised(example) for example in ordered(stream, limit, seed)]
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


def locate(name: str) -> tuple[str, dict[str, Any]]:
    """What `datasets.load_dataset` calls a local file or a Hub dataset."""
    suffix = os.path.splitext(name)[1]
    if os.path.isfile(name):
        if suffix not in LOADERS:
            raise CalibrationError(f"{name}: known file types are {', '.join(LOADERS)}")
        # A text file's examples are its paragraphs.
        return LOADERS[suffix], {"data_files": name} | ({"sample_by": "paragraph"} if suffix == ".txt" else {})
    if suffix in LOADERS or os.path.isabs(name):
        raise CalibrationError(f"the calibration file {name} does not exist")
    repository, _, configuration = name.partition(":")
    return repository, {"name": configuration or None}


def unreadable(name: str, error: Exception, remedy: str) -> CalibrationError:
    """An error that names the dataset, the cause and the remedy."""
    return CalibrationError(f"the dataset {name!r} cannot be read: {str(error).rstrip('.')}; {remedy}")


def normalised(example: Any) -> str | Tensor | Mapping[str, Any]:
    """An example as a text, a token tensor or model inputs."""
    if isinstance(example, str):
        return example
    if isinstance(example, Tensor) and not example.is_floating_point():
        return example
    if isinstance(example, (list, tuple)) and example and all(isinstance(token, int) for token in example):
        return torch.tensor(example)
    if isinstance(example, Mapping) or hasattr(example, "keys"):
        if isinstance(example.get(TEXT_COLUMN), str):
            return example[TEXT_COLUMN]
        if any(isinstance(value, Tensor) for value in example.values()):
            return example
        if isinstance(example.get("input_ids"), list):
            return normalised(example["input_ids"])
        raise CalibrationError(
            f"an example has the columns {', '.join(example)}; give a {TEXT_COLUMN!r} column, 'input_ids', or model "
            "inputs as tensors"
        )
    raise CalibrationError(
        f"an example of the dataset is a {type(example).__name__}, not text, tokens or model inputs"
    )
