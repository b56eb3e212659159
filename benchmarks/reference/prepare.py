"""Tokenizer, tokens, calibration and held-out texts for the reference models, from public-domain books.

    PGSVD_DATA=... python benchmarks/reference/prepare.py --output work

Whole books are set apart: six to calibrate on, six others to measure on; the tokenizer and the models see neither.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


VOCABULARY = 2048
LENGTH = 256
BOS, EOS = "<s>", "</s>"
CALIBRATION = (
    "The Scarlet Letter",
    "North and South",
    "The Red Badge of Courage",
    "The House of Mirth",
    "Silas Marner",
    "The Lost World",
)
HELD_OUT = (
    "Jane Eyre",
    "The Mayor of Casterbridge",
    "White Fang",
    "The First Men in the Moon",
    "The Secret Agent",
    "Jo's Boys",
)
# A run of words this long that two books share was copied from one to the other or quoted in both.
SHINGLE = 13


def read_books(path: Path) -> list[dict[str, str]]:
    """Author, title and text of every book, without the title block, the byte order mark and carriage returns."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        books = [json.loads(line) for line in file]
    for book in books:
        text = book["text"].replace("\r\n", "\n").replace("\ufeff", "")
        book["title"] = book["title"].strip()
        book["text"] = re.sub(r"\A# Title:.*?\n-{5,}\n", "", text, flags=re.DOTALL).strip()
    return books


def split(books: list[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    """The books to train on, to calibrate on and to measure on."""
    parts: dict[str, list[dict[str, str]]] = {"train": [], "calibration": [], "heldout": []}
    for book in books:
        name = "calibration" if book["title"] in CALIBRATION else "heldout" if book["title"] in HELD_OUT else "train"
        parts[name].append(book)
    if len(parts["calibration"]) != len(CALIBRATION) or len(parts["heldout"]) != len(HELD_OUT):
        raise SystemExit("a book to set apart is missing, or there twice")
    return parts


def passages(book: dict[str, str], count: int, length: int = 2000) -> list[dict[str, str]]:
    """Evenly spaced passages of a book, each of whole paragraphs and of at least `length` characters."""
    chunks, current = [], ""
    for paragraph in book["text"].split("\n\n"):
        current += paragraph + "\n\n"
        if len(current) >= length:
            chunks.append(current.strip())
            current = ""
    chosen = [chunks[i * len(chunks) // count] for i in range(min(count, len(chunks)))]
    return [{"author": book["author"], "title": book["title"], "text": text} for text in chosen]


def samples(books: list[dict[str, str]], count: int, seed: int) -> list[dict[str, str]]:
    """Passages of all books in mixed order: any stretch of them has something of every book."""
    per_book = [passages(book, count) for book in books]
    rng = random.Random(seed)
    return [p for group in zip(*per_book, strict=True) for p in rng.sample(group, len(group))]


def train_tokenizer(texts: Iterable[str], vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that puts the bos token before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = (BOS, tokenizer.token_to_id(BOS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[bos]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=LENGTH,
        clean_up_tokenization_spaces=False,
    )


def windows(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], end: bool) -> torch.Tensor:
    """Texts laid end to end, each with its bos token and, for training, its eos token, cut to `(N, LENGTH)`."""
    ids: list[torch.Tensor] = []
    for text in texts:  # one at a time: the encodings of all books together would take gigabytes
        tokens = tokenizer(text, verbose=False).input_ids + [tokenizer.eos_token_id] * end
        ids.append(torch.tensor(tokens, dtype=torch.int16))
    stream = torch.cat(ids)
    return stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)


def shingles(text: str) -> list[str]:
    """Every run of `SHINGLE` words."""
    words = re.findall(r"[a-z']+", text.lower())
    return [" ".join(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)]


def shared(texts: Iterable[str], others: Iterable[str]) -> float:
    """The share of the texts' runs of words that the others have too."""
    runs = [run for text in texts for run in shingles(text)]
    mine, seen = set(runs), set()
    for other in others:
        seen |= mine.intersection(shingles(other))
    return sum(run in seen for run in runs) / len(runs)


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def prepare(books: Path, output: Path, count: int, seed: int) -> dict[str, Any]:
    """Write everything and return the account of it."""
    output.mkdir(parents=True, exist_ok=True)
    parts = split(read_books(books))
    texts = {name: samples(parts[name], count, seed) for name in ("calibration", "heldout")}
    for name, rows in texts.items():
        write_jsonl(output / f"{name}.jsonl", rows)
    # The openings decide the merges: all books have their say, and training takes seconds.
    tokenizer = train_tokenizer(book["text"][:40_000] for book in parts["train"])
    tokenizer.save_pretrained(output / "tokenizer")
    train = windows(tokenizer, (book["text"] for book in parts["train"]), end=True)
    heldout = windows(tokenizer, (row["text"] for row in texts["heldout"]), end=False)
    save_file({"train": train, "heldout": heldout}, output / "tokens.safetensors")
    bare = {name: [row["text"] for row in rows] for name, rows in texts.items()}
    training = [book["text"] for book in parts["train"]]
    account = {
        "file": books.name,
        "vocabulary": len(tokenizer),
        "sequence_length": LENGTH,
        "train": {
            "books": len(training),
            "characters": sum(map(len, training)),
            "tokens": train.numel(),
        },
        **{
            name: {
                "books": [f"{book['author']}, {book['title']}" for book in parts[name]],
                "passages": len(bare[name]),
                "characters": sum(map(len, bare[name])),
                "tokens": sum(len(tokenizer(text, verbose=False).input_ids) for text in bare[name]),
                f"runs_of_{SHINGLE}_words_also_in_training": shared(bare[name], training),
            }
            for name in bare
        },
    }
    (output / "data.json").write_text(json.dumps(account, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return account


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for tokenizer, tokens and texts")
    parser.add_argument("--passages", type=int, default=40, help="of each book set apart")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the passages")
    args = parser.parse_args()
    books = Path(os.environ["PGSVD_DATA"]) / "text" / "books_train.jsonl.xz"
    print(json.dumps(prepare(books, args.output, args.passages, args.seed), indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
