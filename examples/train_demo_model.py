"""Train the small Llama of the demo, and its tokenizer, from local text on a CPU.

The model learns short stories for children and some older English prose, enough to have a perplexity worth measuring
before and after compression. The stories are few, so each is read about eleven times; each book is read about once.
"""

import argparse
import json
import lzma
import math
import os
import platform
import random
import re
import tempfile
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


BOS, EOS = "<s>", "</s>"
HELD_OUT_STORIES = 50
SIZE_LIMIT = 4_900_000


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--stories", type=Path, required=True, help="JSON lines, each with a `text`")
    parser.add_argument("--books", type=Path, required=True, help="JSON lines packed with xz, each with a `text`")
    parser.add_argument("--output", type=Path, default=Path("examples/demo_model"), help="folder for the model")
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--warmup", type=int, default=300, help="steps of linear warmup before the cosine decay")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences a step")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--story-share", type=float, default=0.3, help="share of a batch that is stories")
    parser.add_argument("--story-start", type=float, default=0.75, help="share of the steps before the first story")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="at the end of the warmup")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--report-every", type=int, default=500, help="steps between held-out losses")
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16", help="of the arithmetic")
    parser.add_argument("--compile", action="store_true", help="compile the model; needs a C++ compiler")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def read_texts(path: Path) -> list[str]:
    """Read the `text` of every line, without the title block that opens a book."""
    with lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"].replace("\r\n", "\n").replace("\ufeff", "") for line in file]
    return [re.sub(r"\A# Title:.*?\n-{5,}\n", "", text, flags=re.DOTALL).strip() for text in texts]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that puts the bos token before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2048, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build an untrained Llama of 2.3 million parameters."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=480,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> list[torch.Tensor]:
    """Encode each text, from bos to eos."""
    # One text at a time: the encodings of all books together would take gigabytes.
    return [torch.tensor([*tokenizer(text, verbose=False).input_ids, tokenizer.eos_token_id]) for text in texts]


def sequences(documents: list[torch.Tensor], length: int, rng: random.Random) -> Iterator[torch.Tensor]:
    """Yield sequences of `length` tokens from the documents laid end to end, pass after pass.

    Each pass takes the documents in another order and starts at another offset, so that every pass cuts a document at
    other places.

    Args:
        documents: The encoded documents.
        length: Tokens a sequence.
        rng: Draws orders and offsets.
    """
    while True:
        stream = torch.cat(rng.sample(documents, len(documents)))[rng.randrange(length) :]
        rows = stream[: len(stream) // length * length].view(-1, length)
        yield from rows[rng.sample(range(len(rows)), len(rows))]


def batches(
    stories: list[torch.Tensor], books: list[torch.Tensor], args: argparse.Namespace
) -> Iterator[torch.Tensor]:
    """Yield a batch a step: books alone at first, then books and stories.

    After some tens of passes, the model knows its stories by heart and predicts new ones worse than before. So they
    come late, when it has learned English from the books, and for about a dozen passes.
    """
    rng = random.Random(args.seed)
    story_rows, book_rows = sequences(stories, args.sequence_length, rng), sequences(books, args.sequence_length, rng)
    for step in range(args.steps):
        count = round(args.story_share * args.batch_size) if step >= args.story_start * args.steps else 0
        yield torch.stack([*islice(story_rows, count), *islice(book_rows, args.batch_size - count)])


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, documents: list[torch.Tensor]) -> float:
    """Compute the mean loss a token, each document on its own and cut to the positions that the model has."""
    total, count = 0.0, 0
    for document in documents:
        ids = document[: model.config.max_position_embeddings][None]
        total += model(input_ids=ids, labels=ids).loss.item() * (ids.numel() - 1)
        count += ids.numel() - 1
    return total / count


def train(
    model: LlamaForCausalLM, data: Iterator[torch.Tensor], held_out: list[torch.Tensor], args: argparse.Namespace
) -> float:
    """Train the model in place.

    Args:
        model: The model.
        data: A batch for each step.
        held_out: Documents whose loss is printed now and then, to see when the model begins to learn by heart.
        args: The command line.

    Returns:
        The mean training loss of the last hundred steps.
    """
    # Matrices decay; the gains of the norms do not.
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    gains = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95))
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, args.warmup, args.steps)
    forward = torch.compile(model) if args.compile else model
    losses = []
    model.train()
    for step, ids in enumerate(progress := tqdm(data, total=args.steps, mininterval=10), start=1):
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bfloat16"):
            loss = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses = [*losses[-99:], loss.item()]
        progress.set_postfix(loss=f"{sum(losses) / len(losses):.3f}", refresh=False)
        if step % args.report_every == 0:
            progress.write(f"step {step}: held-out story loss {mean_loss(model, held_out):.4f}")
    model.eval()
    return sum(losses) / len(losses)


def save(output: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, record: dict) -> int:
    """Write model, tokenizer and training record, each file whole or not at all.

    Returns:
        The bytes that model and tokenizer take.
    """
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        size = sum(path.stat().st_size for path in Path(staging).iterdir())
        (Path(staging) / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        for path in Path(staging).iterdir():
            os.replace(path, output / path.name)
    return size


def main() -> None:
    """Train, measure on stories that were held out, and save."""
    args = parse_args()
    start = time.perf_counter()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    stories, books = read_texts(args.stories), read_texts(args.books)
    stories, held_out = stories[:-HELD_OUT_STORIES], stories[-HELD_OUT_STORIES:]
    # The opening of each book, about three times as much text as the stories, decides the tokens with them.
    tokenizer = train_tokenizer(stories + [book[:10_000] for book in books])
    story_ids, held_out_ids = encode(tokenizer, stories), encode(tokenizer, held_out)
    book_ids = encode(tokenizer, tqdm(books, desc="books", mininterval=10))

    model = build_model(tokenizer)
    training_start = time.perf_counter()
    final_loss = train(model, batches(story_ids, book_ids, args), held_out_ids, args)
    training_seconds = time.perf_counter() - training_start
    model.to(torch.bfloat16)

    tokens = args.steps * args.batch_size * args.sequence_length
    story_steps = args.steps - math.ceil(args.story_start * args.steps)
    story_tokens = story_steps * round(args.story_share * args.batch_size) * args.sequence_length
    data = {
        "stories": (args.stories.name, story_ids, story_tokens),
        "books": (args.books.name, book_ids, tokens - story_tokens),
    }
    settings = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
    record = {
        "data": {
            name: {
                "file": file,
                "documents": len(documents),
                "tokens_read": read,
                "passes": round(read / sum(map(len, documents)), 2),
            }
            for name, (file, documents, read) in data.items()
        },
        **settings,
        "parameters": model.num_parameters(),
        "tokens": tokens,
        "training_seconds": round(training_seconds),
        "tokens_per_second": round(tokens / training_seconds),
        "seconds": round(time.perf_counter() - start),
        "final_training_loss": round(final_loss, 4),
        "trained_story_loss": round(mean_loss(model, story_ids[:HELD_OUT_STORIES]), 4),
        "held_out_story_loss": round(mean_loss(model, held_out_ids), 4),
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (torch, transformers, tokenizers)},
        },
    }
    size = save(args.output, model, tokenizer, record)
    print(json.dumps(record, indent=2))
    print(f"{size} bytes in {args.output}")
    if size > SIZE_LIMIT:
        raise SystemExit(f"The demo model may take {SIZE_LIMIT} bytes.")


if __name__ == "__main__":
    main()
