"""Zero-shot classification with a CLIP: a question for each set of pictures, with its possible answers.

An answer is put in several wordings, whose embeddings are averaged, as CLIP's authors do.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from captions import CLASSES, FAMILIES, MARK, PLACES, alter, draw_content, prompts, unseen_tint
from torch import Tensor


# For sets whose classes have names and nothing more.
TEMPLATES = (
    "a photo of a {}.",
    "a photo of the {}.",
    "a picture of a {}.",
    "a good photo of a {}.",
    "a close-up of a {}.",
)


@dataclass(frozen=True)
class Question:
    """Pictures, what may be said of them, and what is right.

    Args:
        pictures: `(N, 3, H, W)`, uint8, or a sequence of PIL images.
        answers: of each possible answer its wordings.
        right: place of the right answer of each picture, `(N,)`.
    """

    pictures: Any
    answers: Sequence[Sequence[str]]
    right: Tensor


def answers(mentioned: Sequence[Mapping[str, int]]) -> list[list[str]]:
    """The wordings of answers that mention just this."""
    return [prompts(each) for each in mentioned]


def altered(pictures: Tensor, content: Tensor, seed: int) -> Tensor:
    """Pictures as uint8 with what their contents say."""
    found = alter(pictures.float() / 255, content, torch.Generator().manual_seed(seed))
    return (found * 255).round().to(torch.uint8)


def about_family(name: str, pictures: Tensor, labels: Sequence[int], seed: int) -> Question:
    """Which value of a family pictures have that are altered in no other way, each value as often as the others."""
    count = len(FAMILIES[name])
    chance = torch.Generator().manual_seed(seed)
    content = torch.zeros(len(labels), len(PLACES), dtype=torch.long)
    content[:, 0] = torch.tensor(labels)
    for mark in MARK if name in MARK else ():
        content[:, PLACES[mark]] = torch.randint(1, len(FAMILIES[mark]), (len(labels),), generator=chance)
    right = torch.arange(len(labels)) // len(CLASSES) % count
    if name in MARK:  # of what is marked
        count, right = count - 1, right % (count - 1)
    content[:, PLACES[name]] = right + (name in MARK)
    said = [{name: value + (name in MARK)} for value in range(count)]
    return Question(altered(pictures, content, seed), answers(said), right)


def about_mark(pictures: Tensor, labels: Sequence[int], seed: int) -> Question:
    """Which mark pictures have that are altered in no other way: its ink, its spot and its sign."""
    chance = torch.Generator().manual_seed(seed)
    content = torch.zeros(len(labels), len(PLACES), dtype=torch.long)
    content[:, 0] = torch.tensor(labels)
    marks = list(itertools.product(*(range(1, len(FAMILIES[name])) for name in MARK)))
    right = torch.randint(len(marks), (len(labels),), generator=chance)
    content[:, [PLACES[name] for name in MARK]] = torch.tensor(marks)[right]
    said = [dict(zip(MARK, mark, strict=True)) for mark in marks]
    return Question(altered(pictures, content, seed), answers(said), right)


def unseen_pairs(pictures: Tensor, labels: Sequence[int], seed: int) -> Question:
    """Which class in which tint, of pictures in the one tint in which the class was never shown."""
    tints = len(FAMILIES["tint"]) - 1
    content = torch.zeros(len(labels), len(PLACES), dtype=torch.long)
    content[:, 0] = torch.tensor(labels)
    content[:, PLACES["tint"]] = torch.tensor([unseen_tint(label) for label in labels])
    said = [{"class": label, "tint": tint} for label in range(len(CLASSES)) for tint in range(1, tints + 1)]
    right = content[:, 0] * tints + content[:, PLACES["tint"]] - 1
    return Question(altered(pictures, content, seed), answers(said), right)


def questions(pictures: Tensor, labels: Sequence[int], seed: int = 0) -> dict[str, Question]:
    """The six sets of our own CLIP, of held-out pictures `(N, 3, 32, 32)` and their classes."""
    classes = answers([{"class": label} for label in range(len(CLASSES))])
    right = torch.tensor(labels)
    content = draw_content(labels, random.Random(seed))
    return {
        "class": Question(pictures, classes, right),
        "class of altered": Question(altered(pictures, content, seed), classes, right),
        **{name: about_family(name, pictures, labels, seed) for name in ("tint", "spot")},
        "mark": about_mark(pictures, labels, seed),
        "unseen pairs": unseen_pairs(pictures, labels, seed),
    }


def named_classes(where: Mapping[str, str]) -> Question:
    """A labelled set of the Hub (`dataset`, `split`, and its columns `image` and `label`)."""
    from datasets import load_dataset

    rows = load_dataset(where["dataset"], split=where["split"])
    names = [name.replace("_", " ").lower() for name in rows.features[where["label"]].names]
    wordings = [[template.format(name) for template in TEMPLATES] for name in names]
    return Question(rows[where["image"]], wordings, torch.tensor(rows[where["label"]]))


@torch.no_grad()
def text_embeddings(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Unit vectors `(len(texts), d)`."""
    given = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(model.device)
    return torch.nn.functional.normalize(model.get_text_features(**given).pooler_output.float(), dim=-1)


def answer_embeddings(model: Any, tokenizer: Any, wordings: Sequence[Sequence[str]]) -> Tensor:
    """The mean over the wordings of each answer, again unit vectors `(answers, d)`."""
    means = [text_embeddings(model, tokenizer, texts).mean(0) for texts in wordings]
    return torch.nn.functional.normalize(torch.stack(means), dim=-1)


def pixel_batches(image_processor: Any, pictures: Any, batch_size: int = 250) -> Iterator[Tensor]:
    """What the model reads of pictures `(N, 3, H, W)`, uint8, or of PIL images, some at a time."""
    from PIL import Image

    for start in range(0, len(pictures), batch_size):
        few = pictures[start : start + batch_size]
        if isinstance(few, Tensor):
            few = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in few]
        yield image_processor(images=[each.convert("RGB") for each in few], return_tensors="pt")["pixel_values"]


@torch.no_grad()
def image_embeddings(model: Any, pixels: Iterable[Tensor]) -> Tensor:
    """Unit vectors `(N, d)` of batches of what the model reads."""
    batches = (batch.to(model.device, model.dtype) for batch in pixels)
    found = [model.get_image_features(pixel_values=batch).pooler_output.float() for batch in batches]
    return torch.nn.functional.normalize(torch.cat(found), dim=-1)


def accuracy(model: Any, tokenizer: Any, question: Question, pixels: Iterable[Tensor]) -> float:
    """Share of pictures, given in batches as the model reads them, that are nearest to their right answer."""
    likeness = image_embeddings(model, pixels) @ answer_embeddings(model, tokenizer, question.answers).T
    return (likeness.argmax(-1).cpu() == question.right).float().mean().item()
