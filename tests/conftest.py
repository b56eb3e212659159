"""What several test files share."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from models import FAMILIES
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast


WORDS = 90
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, `w0` … `w89`, and `<s>` before every text."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL.values(), *(f"w{i}" for i in range(WORDS))])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """64 texts of 12 to 30 words."""
    source = random.Random(0)
    return [" ".join(f"w{source.randrange(WORDS)}" for _ in range(source.randint(12, 30))) for _ in range(64)]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The shared folder of trained models and texts."""
    folder = os.environ.get("PGSVD_DATA")
    if not folder:
        pytest.skip("PGSVD_DATA is not set: it names the folder of trained models and texts")
    if not (Path(folder) / "models").is_dir():
        pytest.fail(f"PGSVD_DATA={folder} has no folder 'models'")
    return Path(folder)


@pytest.fixture(scope="session")
def dense(tmp_path_factory, tokenizer) -> Path:
    """A dense Llama with its tokenizer, saved; tests must not change it."""
    folder = tmp_path_factory.mktemp("dense")
    FAMILIES["llama"].build().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
