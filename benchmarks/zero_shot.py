"""Zero-shot classification with a CLIP on held-out pictures: six sets, each a question with its possible answers.

A question is asked in several wordings; their embeddings are averaged, as CLIP's authors do.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from captions import CLASSES, FAMILIES, PLACES, alter, draw_content, prompts, unseen_tint
from torch import Tensor


@dataclass(frozen=True)
class Question:
    """Pictures, what may be said of them, and what is right.

    Args:
        pictures: `(N, 3, 32, 32)`, uint8.
        answers: what each possible answer mentions.
        right: place of the right answer of each picture, `(N,)`.
    """

    pictures: Tensor
    answers: Sequence[Mapping[str, int]]
    right: Tensor


def altered(pictures: Tensor, content: Tensor, seed: int) -> Tensor:
    """Pictures as uint8 with what their contents say."""
    found = alter(pictures.float() / 255, content, torch.Generator().manual_seed(seed))
    return (found * 255).round().to(torch.uint8)


def about_family(name: str, pictures: Tensor, labels: Sequence[int], seed: int) -> Question:
    """Which value of a family pictures have that are altered in no other way, each value as often as the others."""
    count = len(FAMILIES[name])
    content = torch.zeros(len(labels), len(PLACES), dtype=torch.long)
    content[:, 0] = torch.tensor(labels)
    right = torch.arange(len(labels)) // len(CLASSES) % count
    content[:, PLACES[name]] = right
    return Question(altered(pictures, content, seed), [{name: value} for value in range(count)], right)


def unseen_pairs(pictures: Tensor, labels: Sequence[int], seed: int) -> Question:
    """Which class in which tint, of pictures in the one tint in which the class was never shown."""
    tints = len(FAMILIES["tint"]) - 1
    content = torch.zeros(len(labels), len(PLACES), dtype=torch.long)
    content[:, 0] = torch.tensor(labels)
    content[:, PLACES["tint"]] = torch.tensor([unseen_tint(label) for label in labels])
    answers = [{"class": label, "tint": tint} for label in range(len(CLASSES)) for tint in range(1, tints + 1)]
    return Question(altered(pictures, content, seed), answers, content[:, 0] * tints + content[:, PLACES["tint"]] - 1)


def questions(pictures: Tensor, labels: Sequence[int], seed: int = 0) -> dict[str, Question]:
    """The six sets, of held-out pictures `(N, 3, 32, 32)` and their classes."""
    classes = [{"class": label} for label in range(len(CLASSES))]
    right = torch.tensor(labels)
    content = draw_content(labels, random.Random(seed))
    return {
        "class": Question(pictures, classes, right),
        "class of altered": Question(altered(pictures, content, seed), classes, right),
        **{name: about_family(name, pictures, labels, seed) for name in ("tint", "turn", "focus")},
        "unseen pairs": unseen_pairs(pictures, labels, seed),
    }


@torch.no_grad()
def text_embeddings(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Unit vectors `(len(texts), d)`."""
    given = tokenizer(list(texts), padding=True, return_tensors="pt")
    return torch.nn.functional.normalize(model.get_text_features(**given).pooler_output.float(), dim=-1)


def answer_embeddings(model: Any, tokenizer: Any, answers: Sequence[Mapping[str, int]]) -> Tensor:
    """The mean over the wordings of each answer, again unit vectors `(answers, d)`."""
    wordings = [prompts(answer) for answer in answers]
    found = text_embeddings(model, tokenizer, [text for each in wordings for text in each])
    return torch.nn.functional.normalize(found.view(len(answers), -1, found.shape[-1]).mean(1), dim=-1)


def pixel_values(image_processor: Any, pictures: Tensor) -> Tensor:
    """What the model reads of pictures `(N, 3, H, W)`, uint8."""
    from PIL import Image

    images = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pictures]
    return image_processor(images=images, return_tensors="pt")["pixel_values"]


@torch.no_grad()
def image_embeddings(model: Any, pixels: Tensor, batch_size: int = 250) -> Tensor:
    """Unit vectors `(N, d)`."""
    found = [model.get_image_features(pixel_values=batch).pooler_output.float() for batch in pixels.split(batch_size)]
    return torch.nn.functional.normalize(torch.cat(found), dim=-1)


def accuracy(model: Any, tokenizer: Any, question: Question, pixels: Tensor) -> float:
    """Share of pictures, given as the model reads them, that are nearest to their right answer."""
    likeness = image_embeddings(model, pixels) @ answer_embeddings(model, tokenizer, question.answers).T
    return (likeness.argmax(-1) == question.right).float().mean().item()
