"""Small pictures altered in ways that a caption can name, and captions that name them.

A picture has a class and, in each of eight families, a value of which 0 means unaltered: `content` is nine integers.
The last three families are of one mark: its ink, its spot and its sign. A caption mentions some of all this, in words
chosen at random, and leaves out the rest. So it is true of many pictures, and a picture has many true captions. Some
classes are never shown in one of the tints, so that a model can be asked about pairs it has never met.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, pad


SIDE = 32
CLASSES: tuple[tuple[str, ...], ...] = (
    ("airplane", "plane", "aircraft"),
    ("automobile", "car"),
    ("bird",),
    ("cat", "kitty"),
    ("deer",),
    ("dog", "hound"),
    ("frog", "toad"),
    ("horse", "pony"),
    ("ship", "boat"),
    ("truck", "lorry"),
)
# Of a family its values, and of a value the words before "photo" and the words after the thing.
Words = tuple[tuple[str, ...], tuple[str, ...]]
FAMILIES: dict[str, tuple[Words, ...]] = {
    "tint": (
        (("colour", "natural"), ("in natural colours",)),
        (("black and white", "grey", "monochrome"), ("in black and white", "without colour")),
        (("red-tinted", "reddish"), ("in red light", "with a red tint")),
        (("green-tinted", "greenish"), ("in green light", "with a green tint")),
        (("blue-tinted", "bluish"), ("in blue light", "with a blue tint")),
        (("negative", "inverted"), ("with inverted colours",)),
    ),
    "turn": (
        (("upright",), ("the right way up",)),
        (("upside-down",), ("upside down", "standing on its head")),
        (("sideways", "rotated"), ("lying on its side",)),
    ),
    "light": (
        (("well-lit",), ("in good light",)),
        (("dark", "dim"), ("at night", "in the dark")),
        (("bright", "overexposed"), ("in glaring light",)),
    ),
    "focus": (
        (("sharp", "clear"), ("in focus",)),
        (("blurry", "blurred"), ("out of focus",)),
        (("pixelated", "blocky"), ("in coarse pixels",)),
        (("noisy", "grainy"), ("full of noise",)),
    ),
    "frame": (
        (("full",), ("seen whole",)),
        (("zoomed", "close-up"), ("seen up close",)),
        (("framed",), ("with a border", "in a white frame")),
    ),
    "ink": (
        (("unmarked",), ("without a mark",)),
        ((), ("marked in red",)),
        ((), ("marked in green",)),
        ((), ("marked in blue",)),
        ((), ("marked in yellow",)),
        ((), ("marked in white",)),
        ((), ("marked in black",)),
    ),
    "spot": (
        ((), ("marked nowhere",)),
        ((), ("marked at the top left",)),
        ((), ("marked at the top centre",)),
        ((), ("marked at the top right",)),
        ((), ("marked at the middle left",)),
        ((), ("marked at the middle centre",)),
        ((), ("marked at the middle right",)),
        ((), ("marked at the bottom left",)),
        ((), ("marked at the bottom centre",)),
        ((), ("marked at the bottom right",)),
    ),
    "sign": (
        ((), ("with no sign on it",)),
        ((), ("marked with a square",)),
        ((), ("marked with a disc",)),
        ((), ("marked with a cross",)),
    ),
}
MARK = ("ink", "spot", "sign")
PLACES = {"class": 0, **{name: place for place, name in enumerate(FAMILIES, start=1)}}
UNMENTIONED = -1
NOUNS = ("photo", "picture", "image", "snapshot")
STYLES = (
    "a {before} {noun} of {thing} {after}",
    "{before} {noun} of {thing} {after}",
    "{thing} {after} in a {before} {noun}",
    "this {before} {noun} shows {thing} {after}",
)
# Tokens of a caption at most, the first and the last among them: what few are longer are cut, and as true as before.
LENGTH = 32
INKS = ((0.9, 0.1, 0.1), (0.1, 0.8, 0.1), (0.1, 0.1, 0.9), (0.95, 0.9, 0.1), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
TINTS = {"red": (1.15, 0.5, 0.5), "green": (0.5, 1.15, 0.5), "blue": (0.5, 0.5, 1.15)}


def unseen_tint(label: int) -> int:
    """The tint in which a class is never shown in training."""
    return 1 + label % (len(FAMILIES["tint"]) - 1)


def draw_content(labels: Sequence[int], chance: random.Random) -> Tensor:
    """What to make of pictures of these classes `(N, 9)`: altered in up to three ways, and most of them marked."""
    rows = []
    for label in labels:
        row = [label] + [0] * len(FAMILIES)
        altered = chance.choices((0, 1, 2, 3), (20, 30, 30, 20))[0]
        named = chance.sample([name for name in FAMILIES if name not in MARK], altered)
        for name in named + (list(MARK) if chance.random() < 0.7 else []):
            row[PLACES[name]] = chance.randrange(1, len(FAMILIES[name]))
        if row[PLACES["tint"]] == unseen_tint(label):
            row[PLACES["tint"]] = 0
        rows.append(row)
    return torch.tensor(rows)


def draw_mentioned(content: Tensor, chance: random.Random) -> Tensor:
    """What captions mention of contents `(N, 9)`: the class and alterations mostly, that there is none seldom."""
    rows = []
    for row in content.tolist():
        odds = [0.9] + [0.75 if value else 0.08 for value in row[1:]]
        kept = [value if chance.random() < odd else UNMENTIONED for value, odd in zip(row, odds, strict=True)]
        rows.append(kept if max(kept) > UNMENTIONED else [row[0], *kept[1:]])
    return torch.tensor(rows)


def true_of(mentioned: Tensor, content: Tensor) -> Tensor:
    """Whether each caption is true of each picture, `(captions, pictures)`."""
    wanted = mentioned[:, None]
    return ((wanted == UNMENTIONED) | (wanted == content[None])).all(-1)


def with_article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def write(mentioned: Sequence[int], chance: random.Random) -> str:
    """A caption that mentions just this, in words by chance."""
    before, after = [], []
    for name, values in FAMILIES.items():
        value = mentioned[PLACES[name]]
        if value != UNMENTIONED:
            early = bool(values[value][0]) and chance.random() < 0.5
            (before if early else after).append(chance.choice(values[value][0 if early else 1]))
    chance.shuffle(before)
    chance.shuffle(after)
    label = mentioned[0]
    if label == UNMENTIONED:
        thing = "something"
    else:
        name = chance.choice(CLASSES[label])
        thing = chance.choice((with_article(name), with_article(name), f"the {name}", f"one {name}"))
    style = chance.choice(STYLES)
    text = style.format(before=" ".join(before), noun=chance.choice(NOUNS), thing=thing, after=" ".join(after))
    return re.sub(r"\ba (?=[aeiou])", "an ", " ".join(text.split()))


def prompts(mentioned: Mapping[str, int], count: int = 12, seed: int = 0) -> list[str]:
    """Captions to put a question with: all say the same, in different words."""
    row = [mentioned.get(name, UNMENTIONED) for name in PLACES]
    chance = random.Random(seed)
    return [write(row, chance) for _ in range(count)]


def alter(pictures: Tensor, content: Tensor, generator: torch.Generator) -> Tensor:
    """Give pictures `(N, 3, 32, 32)` in [0, 1] what their contents say; returns new ones in [0, 1]."""
    found = pictures.clone()

    def at(name: str, value: int) -> Tensor:
        return (content[:, PLACES[name]] == value).nonzero().flatten()

    chosen = at("frame", 1)
    if len(chosen):
        found[chosen] = interpolate(found[chosen, :, 6:26, 6:26], size=SIDE, mode="bilinear", align_corners=False)
    found[at("turn", 1)] = found[at("turn", 1)].flip(2)
    found[at("turn", 2)] = found[at("turn", 2)].transpose(2, 3).flip(2)
    found[at("tint", 1)] = found[at("tint", 1)].mean(1, keepdim=True).expand(-1, 3, -1, -1)
    for value, gains in enumerate(TINTS.values(), start=2):
        found[at("tint", value)] *= torch.tensor(gains)[:, None, None]
    found[at("tint", 5)] = 1 - found[at("tint", 5)]
    found[at("light", 1)] *= 0.35
    found[at("light", 2)] = 1 - 0.4 * (1 - found[at("light", 2)])
    chosen = at("focus", 1)
    if len(chosen):
        found[chosen] = avg_pool2d(pad(found[chosen], (2,) * 4, mode="replicate"), 5, stride=1)
    chosen = at("focus", 2)
    if len(chosen):
        found[chosen] = interpolate(avg_pool2d(found[chosen], 2), scale_factor=2, mode="nearest")
    chosen = at("focus", 3)
    found[chosen] += 0.12 * torch.randn(found[chosen].shape, generator=generator)
    chosen = at("frame", 2)
    edge = torch.ones(SIDE, SIDE, dtype=torch.bool)
    edge[3:-3, 3:-3] = False
    found[chosen] = torch.where(edge, torch.ones(()), found[chosen])
    chosen = content[:, PLACES["ink"]].nonzero().flatten()
    inks = torch.tensor(INKS)[content[chosen, PLACES["ink"]] - 1]
    shapes = signs()[content[chosen, PLACES["sign"]] - 1, content[chosen, PLACES["spot"]] - 1]
    found[chosen] = torch.where(shapes[:, None], inks[:, :, None, None], found[chosen])
    return found.clamp_(0, 1)


def signs() -> Tensor:
    """Where each sign is at each spot, `(signs, spots, 32, 32)`: a square, a disc and a cross of eight pixels."""
    y, x = torch.meshgrid(torch.arange(8) - 3.5, torch.arange(8) - 3.5, indexing="ij")
    drawn = torch.stack([y.abs() < 4, y**2 + x**2 < 15, (y.abs() < 1.6) | (x.abs() < 1.6)])
    found = torch.zeros(3, 9, SIDE, SIDE, dtype=torch.bool)
    for spot in range(9):
        top, left = 2 + 10 * (spot // 3), 2 + 10 * (spot % 3)
        found[:, spot, top : top + 8, left : left + 8] = drawn
    return found


def read_pictures(file: Path) -> tuple[Tensor, list[int]]:
    """Pictures `(N, 3, 32, 32)`, uint8, and their classes, of a parquet file with the columns image and label."""
    import numpy as np
    from datasets import Image, load_dataset

    rows = load_dataset("parquet", data_files=str(file), split="train").cast_column("image", Image(mode="RGB"))
    pictures = np.stack([np.asarray(picture) for picture in rows["image"]])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(), list(rows["label"])


def sample_captions(count: int, seed: int = 0) -> Iterator[str]:
    """Captions as in training, of made-up contents: what the tokenizer is trained on."""
    chance = random.Random(seed)
    for row in draw_mentioned(draw_content([i % len(CLASSES) for i in range(count)], chance), chance).tolist():
        yield write(row, chance)
