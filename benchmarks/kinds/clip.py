"""CLIP, dense and compressed: zero-shot accuracy on every set of the model, and the loss on training pairs.

Calibration sets are pictures and captions of the training part, chosen by the seed; the loss is on others of them, so
that a method may be chosen by it without a look at what is measured on.

Models are compressed in float32 and measured in bfloat16.

Options of a grid:
    pictures: of each set of ours, of the 5000 that were held out.
    pairs: pictures and captions to calibrate on.
    vision: of the vision tower its reduction over that of the whole, the text tower getting what is left of the
        budget: one ε a tower. By default one budget for both.
    projections: compress the projections behind the towers by the reduction, and the blocks by so much less that as
        many parameters are removed as without.
    config: further fields of PGSVDConfig.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from grid import Cell, Unavailable, located, source

from kinds.compressing import compressed


# Pairs of the loss, in batches of a contrast.
LOSS_PAIRS, BATCH = 1024, 128


@dataclass
class Clip:
    """A dense model and its sets.

    Args:
        model: in evaluation mode.
        processor: of it.
        sets: of each its question and what gives its pictures as the model reads them, in batches.
        pairs: what to calibrate on or to take the loss on: `(count, seed)` → batches of pixel values, token ids and
            what is true of what.
    """

    model: Any
    processor: Any
    sets: Mapping[str, tuple[Any, Callable[[], Iterable[Any]]]]
    pairs: Any


def given(options: Mapping[str, Any]) -> set[str]:
    """What of a user's own it takes: pictures are those of models.yaml."""
    return {"model"}


def load(spec: Mapping[str, Any], options: Mapping[str, Any]) -> Clip:
    from transformers import AutoProcessor, CLIPModel

    path = source(spec["path"])
    model = CLIPModel.from_pretrained(path, dtype="float32").eval()
    # Its processor that needs no torchvision, so that everyone measures the same pixels.
    processor = AutoProcessor.from_pretrained(path, backend="pil")
    asked, pairs = ours(spec, processor, options["pictures"]) if "pictures" in spec else of_the_hub(spec, processor)
    return Clip(model, processor, asked, pairs)


def ours(spec: Mapping[str, Any], processor: Any, count: int) -> tuple[dict, Any]:
    """The six sets of the pictures that our CLIP was not trained on, and pairs of those it was trained on."""
    from captions import read_pictures
    from train_clip import HELD_OUT, Plan, batch
    from zero_shot import pixel_batches, questions

    pictures, labels = read_pictures(located(spec["pictures"]))
    known = len(labels) - min(HELD_OUT, len(labels) // 10)
    asked = questions(pictures[known : known + count], labels[known : known + count])

    def pairs(count: int, seed: int) -> list[dict[str, Any]]:
        plan = Plan(1, batch_size=BATCH, seed=seed)
        drawn = (
            batch(pictures[:known], labels[:known], processor.tokenizer, step, plan) for step in range(count // BATCH)
        )
        return [{"pixel_values": pixels, "input_ids": ids, "true": true} for pixels, ids, true in drawn]

    # Small enough to be kept.
    read = {name: list(pixel_batches(processor.image_processor, each.pictures)) for name, each in asked.items()}
    return {name: (each, partial(iter, read[name])) for name, each in asked.items()}, pairs


def of_the_hub(spec: Mapping[str, Any], processor: Any) -> tuple[dict, Any]:
    """Sets of the Hub, and pairs of their training splits: a picture and what it shows, in the words of a template."""
    import torch
    from datasets import load_dataset
    from zero_shot import named_classes, pixel_batches

    asked = {name: named_classes(where) for name, where in spec["sets"].items()}

    def pairs(count: int, seed: int) -> list[dict[str, Any]]:
        chance, drawn = random.Random(seed), []
        for name, where in spec["sets"].items():
            rows = load_dataset(where["dataset"], split=spec["calibration_split"])
            for i in chance.sample(range(len(rows)), min(len(rows), -(-count // len(spec["sets"])))):
                row = rows[i]
                drawn.append((row[where["image"]].convert("RGB"), (name, row[where["label"]])))
        if len(drawn) < count:
            raise Unavailable(
                f"{', '.join(spec['sets'])} have {len(drawn)} training pictures, of {count} that it takes"
            )
        chance.shuffle(drawn)
        found = []
        for start in range(0, count, BATCH):
            images, said = zip(*drawn[start : start + BATCH], strict=True)
            texts = [chance.choice(asked[name].answers[label]) for name, label in said]
            given = processor(images=list(images), text=texts, padding=True, truncation=True, return_tensors="pt")
            true = torch.tensor([[a == b for b in said] for a in said])
            found.append({"pixel_values": given["pixel_values"], "input_ids": given["input_ids"], "true": true})
        return found

    return {
        name: (each, partial(pixel_batches, processor.image_processor, each.pictures)) for name, each in asked.items()
    }, pairs


def measure(case: Clip, cell: Cell) -> dict[str, Any]:
    import torch
    from zero_shot import accuracy

    drawn = case.pairs(cell.options["pairs"] + LOSS_PAIRS, cell.seed)
    batches = [{key: each[key] for key in ("pixel_values", "input_ids")} for each in drawn]
    data = {"dataset": batches[: cell.options["pairs"] // BATCH], "num_samples": cell.options["pairs"]}
    model, values = compressed(case.model, with_groups(cell, case.model), data)
    with torch.autocast(model.device.type, torch.bfloat16):
        found = {
            name: accuracy(model, case.processor.tokenizer, question, pixels())
            for name, (question, pixels) in case.sets.items()
        }
        loss = mean_loss(model, drawn[cell.options["pairs"] // BATCH :])
    return {
        **values,
        "accuracy": found,
        "mean_accuracy": sum(found.values()) / len(found),
        "loss": loss,
        "towers": towers(model) if values else {},
    }


def with_groups(cell: Cell, model: Any) -> Cell:
    """The cell with the budgets that its settings `vision` and `projections` stand for."""
    from optimum_pgsvd import PGSVDConfig
    from optimum_pgsvd.targets import find_targets

    shapes = find_targets(model, PGSVDConfig(cell.reduction, solver="svd")).shapes
    total = sum(shape.dense_parameters for shape in shapes.values())
    settings, reduction = dict(cell.settings), cell.reduction
    if "vision" in settings:
        seen = sum(shape.dense_parameters for name, shape in shapes.items() if name.startswith("vision_model"))
        vision = reduction * settings.pop("vision")
        text = (reduction * total - vision * seen) / (total - seen)
        settings["groups"] = {
            "vision_model.*": {"parameter_reduction": vision},
            "text_model.*": {"parameter_reduction": text},
        }
    if settings.pop("projections", False):
        behind = model.visual_projection.weight.numel() + model.text_projection.weight.numel()
        settings["groups"] = {"*_projection": {"parameter_reduction": reduction}}
        reduction *= 1 - behind / total
    return replace(cell, settings=settings, reduction=reduction)


def mean_loss(model: Any, drawn: list[dict[str, Any]]) -> float:
    """CLIP's contrastive loss where a caption may be true of several pictures, mean over the batches."""
    import torch
    from train_clip import contrastive_loss

    losses = []
    with torch.no_grad():
        for each in drawn:
            given = {key: each[key].to(model.device) for key in ("pixel_values", "input_ids")}
            losses.append(contrastive_loss(model(**given).logits_per_text.float().cpu(), each["true"]).item())
    return sum(losses) / len(losses)


def towers(model: Any) -> dict[str, Any]:
    """Of each tower of a compressed model its ε, where it has one, and what was removed of it."""
    found: dict[str, Any] = {}
    for tower in ("vision_model", "text_model"):
        layers = [layer for layer in model.pgsvd_report.layers if layer.name.startswith(tower)]
        before = sum(layer.parameters_before for layer in layers)
        tolerances = {layer.tolerance for layer in layers}
        found[tower] = {
            "tolerance": tolerances.pop() if len(tolerances) == 1 else None,
            "parameter_reduction": 1 - sum(layer.parameters_after for layer in layers) / before if layers else 0.0,
        }
    return found
