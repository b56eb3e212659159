"""Train a small CLIP on a CPU, on labelled pictures of 32 × 32 and captions made up for them.

    PGSVD_DATA=... python benchmarks/train_clip.py --run work/clip --steps STEPS
    python benchmarks/train_clip.py --run work/clip --export     # write benchmarks/reference/clip-0.6m
    python benchmarks/train_clip.py --tables                     # only write the table of the README from its account

Started again with the same arguments, it goes on from its last checkpoint and ends in the same weights as if it had
never stopped. The learning rate stands still until the last part of the plan, so `--steps` may be changed before it.

A caption is made for every picture (`captions.py`), and is true of all the pictures of a batch that are as it says.
The loss is CLIP's, with the target of a picture shared among all captions of the batch that are true of it, and that
of a caption among all pictures that it is true of.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import safetensors
import tokenizers
import torch
import transformers
from captions import LENGTH, alter, draw_content, draw_mentioned, read_pictures, sample_captions, true_of, write
from cells import fill
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, pad
from transformers import AutoProcessor, CLIPConfig, CLIPModel, CLIPTokenizer


HERE = Path(__file__).parent
sys.path.append(str(HERE / "reference"))
from train import Run, Schedule, follow, load_weights, make_optimizer, order, read_log  # noqa: E402


OUTPUT = HERE / "reference" / "clip-0.6m"
# The last pictures of the file are for measuring: nothing is trained or calibrated on them.
HELD_OUT = 5000
# Stored size of a model, in bytes, as of the other reference models.
SIZE_LIMIT = 16 * 2**20
# Held-out pictures that a test can afford.
FEW = 200
MEAN, STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)
START, END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class Plan(Schedule):
    """How the model is trained.

    Args:
        cooldown: part of the steps in which the learning rate comes down, in a straight line.
        heldout_pictures: how many the accuracies of the log are taken on.
    """

    batch_size: int = 128
    learning_rate: float = 2e-3
    warmup: int = 300
    weight_decay: float = 0.02
    report_every: int = 100
    heldout_every: int = 2000
    cooldown: float = 0.3
    heldout_pictures: int = 1000

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        left = (self.steps - step) / max(1.0, self.steps * self.cooldown)
        return self.learning_rate * min(1.0, (step + 1) / self.warmup, left)


def make_config(vocabulary: int) -> CLIPConfig:
    """A vision tower of six layers and a text tower of four, narrow, so that their capacity is needed."""
    tower = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 2, "projection_dim": 64}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return CLIPConfig(
        vision_config={**tower, "num_hidden_layers": 6, "image_size": 32, "patch_size": 4},
        text_config={
            **tower,
            **special,
            "num_hidden_layers": 4,
            "vocab_size": vocabulary,
            "max_position_embeddings": LENGTH,
        },
        projection_dim=64,
    )


def make_tokenizer(captions: Iterator[str], vocabulary: int = 1024) -> CLIPTokenizer:
    """CLIP's tokenizer with a vocabulary of these captions."""
    from tokenizers import pre_tokenizers, trainers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, min_frequency=2, special_tokens=[START, END], initial_alphabet=letters,
        end_of_word_suffix="</w>", show_progress=False,
    )  # fmt: skip
    untrained = CLIPTokenizer().backend_tokenizer
    # Each letter by itself, so that each is known as the end of a word too.
    untrained.train_from_iterator([*(" ".join("abcdefghijklmnopqrstuvwxyz0123456789.,-!?'"),) * 2, *captions], trainer)
    trained = json.loads(untrained.to_str())["model"]
    merges = [tuple(merge) for merge in trained["merges"]]
    return CLIPTokenizer(vocab=trained["vocab"], merges=merges, model_max_length=LENGTH)


def make_processor(tokenizer: CLIPTokenizer) -> Any:
    """Pictures as they are, centred and scaled; captions by the tokenizer."""
    from transformers import CLIPProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    sides = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    return CLIPProcessor(CLIPImageProcessorPil(image_mean=list(MEAN), image_std=list(STD), **sides), tokenizer)


def normalized(pictures: Tensor) -> Tensor:
    """What the model reads of pictures `(N, 3, 32, 32)` in [0, 1]: as the image processor does."""
    return (pictures - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def shifted(pictures: Tensor, chance: random.Random) -> Tensor:
    """Half of the pictures mirrored, each moved by up to four pixels."""
    wide = pad(pictures, (4,) * 4, mode="reflect")
    places = [(chance.randrange(9), chance.randrange(9), chance.random() < 0.5) for _ in pictures]
    cut = [picture[:, y : y + 32, x : x + 32] for picture, (y, x, _) in zip(wide, places, strict=True)]
    return torch.stack([each.flip(2) if place[2] else each for each, place in zip(cut, places, strict=True)])


def batch(pictures: Tensor, labels: Sequence[int], tokenizer: Any, step: int, plan: Plan) -> tuple[Tensor, ...]:
    """Pixels, token ids and what is true of what `(captions, pictures)` of a step; all follow from its number."""
    places = range(step * plan.batch_size, (step + 1) * plan.batch_size)
    count = len(labels)
    chosen = [int(order(count, plan.seed + 1 + place // count)[place % count]) for place in places]
    chance = random.Random(f"{plan.seed} {step}")
    content = draw_content([labels[i] for i in chosen], chance)
    mentioned = draw_mentioned(content, chance)
    generator = torch.Generator().manual_seed(plan.seed * 10**9 + step)
    shown = alter(shifted(pictures[chosen].float() / 255, chance), content, generator)
    texts = [write(row, chance) for row in mentioned.tolist()]
    ids = tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")["input_ids"]
    return normalized(shown), ids, true_of(mentioned, content)


def contrastive_loss(logits_per_text: Tensor, true: Tensor) -> Tensor:
    """CLIP's loss where a caption may be true of several pictures, both `(captions, pictures)`."""
    shares = true / true.sum(1, keepdim=True), true.T / true.T.sum(1, keepdim=True)
    return (cross_entropy(logits_per_text, shares[0]) + cross_entropy(logits_per_text.T, shares[1])) / 2


def build(config: CLIPConfig, seed: int) -> CLIPModel:
    """An untrained model in float32."""
    torch.manual_seed(seed)
    # On a CPU, compiled attention of so few heads takes less time than the flash kernel and its backward pass.
    return CLIPModel._from_config(config, attn_implementation="eager")


class Optimizers:
    """Muon for the matrices of the blocks and AdamW for the rest, as one; logits are scaled by 100 at most, as CLIP's.

    Muon moves all directions of a matrix by equal amounts, so that a small model makes use of its full rank.
    """

    def __init__(self, model: CLIPModel, plan: Plan) -> None:
        inside = {name: p for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2}
        self.muon = torch.optim.Muon(
            inside.values(), lr=plan.learning_rate, weight_decay=plan.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        self.adamw = make_optimizer((p for name, p in model.named_parameters() if name not in inside), plan)
        self.adamw.state = self.state = self.muon.state
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]
        self.scale = model.logit_scale

    @torch.no_grad()
    def step(self) -> None:
        self.muon.step()
        self.adamw.step()
        self.scale.clamp_(max=math.log(100))

    def zero_grad(self) -> None:
        self.muon.zero_grad()
        self.adamw.zero_grad()


def make_forward(model: CLIPModel, plan: Plan) -> Callable[[Tensor, Tensor], Tensor]:
    """The logits `(captions, pictures)` of pixels and token ids, in the plan's arithmetic."""

    def logits(pixels: Tensor, ids: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=plan.autocast):
            images = model.get_image_features(pixel_values=pixels).pooler_output
            texts = model.get_text_features(input_ids=ids).pooler_output
        return model.logit_scale.exp() * (normalize(texts.float(), dim=-1) @ normalize(images.float(), dim=-1).T)

    return torch.compile(logits) if plan.compile else logits


def heldout_accuracy(model: CLIPModel, tokenizer: Any, pictures: Tensor, labels: Sequence[int]) -> dict[str, float]:
    """Of two of the sets: classes, and pairs never seen together."""
    from zero_shot import accuracy, questions

    asked = questions(pictures, labels)
    return {
        name: accuracy(model, tokenizer, asked[name], normalized(asked[name].pictures.float() / 255).split(250))
        for name in ("class", "unseen pairs")
    }


def train(
    pictures: Tensor,
    labels: Sequence[int],
    tokenizer: Any,
    output: Path,
    plan: Plan,
    *,
    config: CLIPConfig | None = None,
    hours: float = math.inf,
    stop_after: int | None = None,
    checkpoint_minutes: float = 3.0,
) -> Run:
    """Train from the last checkpoint in `output`, or from the start, and leave a checkpoint there.

    Args:
        pictures: `(N, 3, 32, 32)`, uint8; the last `HELD_OUT` (or a tenth, of fewer than ten times as many) are
            measured on, not trained on.
        labels: their classes.
        tokenizer: CLIP's, of the captions.
        output: folder of `checkpoint.safetensors` and `log.jsonl`.
        plan: the same every time, but for `steps` before the last part.
        config: another model, as for a test.
        hours: stop when this call has taken as long.
        stop_after: stop after this many steps of this call.
        checkpoint_minutes: between checkpoints.

    Returns:
        The run: done if its step is the last of the plan.
    """
    known = len(labels) - min(HELD_OUT, len(labels) // 10)
    last = slice(known, known + plan.heldout_pictures)
    model = build(config or make_config(len(tokenizer)), plan.seed)
    forward = make_forward(model, plan)

    def loss_of(step: int) -> tuple[Tensor, float]:
        pixels, ids, true = batch(pictures[:known], labels[:known], tokenizer, step, plan)
        loss = contrastive_loss(forward(pixels, ids), true)
        return loss, loss.item()

    def measure() -> dict[str, Any]:
        return {"heldout": heldout_accuracy(model, tokenizer, pictures[last], labels[last])}

    return follow(
        Run(model, Optimizers(model, plan)), loss_of, measure, output, plan,
        hours=hours, stop_after=stop_after, checkpoint_minutes=checkpoint_minutes,
    )  # fmt: skip


def export(
    run: Path, output: Path, pictures: Tensor, labels: Sequence[int], note: str | None = None
) -> dict[str, Any]:
    """Write model in bfloat16, processor and account; returns the account, of the rounded weights in float32."""
    processor = AutoProcessor.from_pretrained(run / "processor", backend="pil")
    model = build(make_config(len(processor.tokenizer)), seed=0)
    load_weights(model, run / "checkpoint.safetensors")
    plan, log = json.loads((run / "plan.json").read_text(encoding="utf-8")), read_log(run / "log.jsonl")
    if plan["step"] != plan["steps"]:
        raise SystemExit(f"{run} stands at step {plan['step']} of {plan['steps']}")
    model.to(torch.bfloat16).save_pretrained(output)
    processor.save_pretrained(output)
    result = account(model.float(), processor, plan, log, pictures, labels) | ({"note": note} if note else {})
    result["bytes"] = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    if result["bytes"] > SIZE_LIMIT:
        raise SystemExit(f"{output} takes {result['bytes']} bytes, more than {SIZE_LIMIT}")
    (output / "training.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    shutil.copy(run / "log.jsonl", output / "log.jsonl")
    return result


def account(
    model: CLIPModel,
    processor: Any,
    plan: dict[str, Any],
    log: Sequence[dict[str, Any]],
    pictures: Tensor,
    labels: Sequence[int],
) -> dict[str, Any]:
    """What was trained on what, for how long, and how well it does."""
    from zero_shot import questions

    known = len(labels) - HELD_OUT
    told = {field.name for field in fields(Plan)} | {"seconds", "threads"}
    plan = {key: value for key, value in plan.items() if key in told}
    last = [line["loss"] for line in log if line["step"] > plan["steps"] - 100]
    asked = questions(pictures[known:], labels[known:])
    towers = {"vision": model.vision_model, "text": model.text_model}
    return {
        "architecture": type(model).__name__,
        "parameters": model.num_parameters(),
        "tower_parameters": {name: sum(p.numel() for p in tower.parameters()) for name, tower in towers.items()},
        "training": {
            **plan,
            "pictures": known,
            "passes": plan["steps"] * plan["batch_size"] / known,
            "pictures_per_second": plan["steps"] * plan["batch_size"] / plan["seconds"],
            "loss_of_last_100_steps": sum(last) / len(last),
        },
        "heldout": {
            "pictures": HELD_OUT,
            "accuracy": accuracies(model, processor, asked),
            "answers": {name: len(each.answers) for name, each in asked.items()},
            "first_pictures": FEW,
            "accuracy_of_first_pictures": of_few(model, processor, pictures[known:], labels[known:]),
        },
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, tokenizers, safetensors)},
    }


def of_few(model: CLIPModel, processor: Any, pictures: Tensor, labels: Sequence[int]) -> dict[str, float]:
    """Accuracy on the six sets of the first pictures, as many as a test can afford."""
    from zero_shot import questions

    return accuracies(model, processor, questions(pictures[:FEW], labels[:FEW]))


def accuracies(model: CLIPModel, processor: Any, asked: Mapping[str, Any]) -> dict[str, float]:
    """Accuracy by question."""
    from zero_shot import accuracy, pixel_batches

    return {
        name: accuracy(model, processor.tokenizer, each, pixel_batches(processor.image_processor, each.pictures))
        for name, each in asked.items()
    }


def table(found: dict[str, Any]) -> str:
    """The account, for the README."""
    training, heldout, towers = found["training"], found["heldout"], found["tower_parameters"]
    rows = [
        ("class", found["architecture"]),
        ("parameters", f"{found['parameters']:,}"),
        ("of the vision tower", f"{towers['vision']:,}"),
        ("of the text tower", f"{towers['text']:,}"),
        ("bytes of weights", f"{found['bytes']:,}"),
        ("steps", f"{training['steps']:,}"),
        ("pictures a step", f"{training['batch_size']}"),
        ("passes over the pictures", f"{training['passes']:.1f}"),
        ("minutes", f"{training['seconds'] / 60:.0f}"),
        ("training loss, last 100 steps", f"{training['loss_of_last_100_steps']:.3f}"),
    ]
    for name, share in heldout["accuracy"].items():
        rows.append((f"held-out accuracy, {name} (chance {1 / heldout['answers'][name]:.1%})", f"{share:.1%}"))
    return "\n".join(["| | `clip-0.6m` |", "|---|---:|", *(f"| {left} | {right} |" for left, right in rows)])


def write_table() -> None:
    """Fill the marked place of the README from the account."""
    found = json.loads((OUTPUT / "training.json").read_text(encoding="utf-8"))
    fill("clip", table(found), OUTPUT / "README.md")


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="folder for the checkpoint and the log")
    parser.add_argument("--steps", type=int, help="planned; may change before the last part")
    parser.add_argument("--hours", type=float, default=math.inf, help="stop then, to go on when started again")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--export", action="store_true", help=f"write {OUTPUT.name} from a run that is done")
    parser.add_argument("--note", help="what the account should say about the training beside its numbers")
    parser.add_argument("--tables", action="store_true", help="only write the table of the README")
    args = parser.parse_args(given)
    if args.tables:
        write_table()
        return
    if args.run is None or (args.steps is None and not args.export):
        parser.error("training needs --run FOLDER and --steps N, and --export needs --run FOLDER")
    if "PGSVD_DATA" not in os.environ:
        parser.error("PGSVD_DATA is not set: the folder that holds images/cifar10_train.parquet")
    torch.set_num_threads(args.threads)
    pictures, labels = read_pictures(Path(os.environ["PGSVD_DATA"]) / "images" / "cifar10_train.parquet")
    if args.export:
        print(json.dumps(export(args.run, OUTPUT, pictures, labels, args.note), indent=1))
        write_table()
        return
    if not (args.run / "processor").exists():  # two of the same captions differ in the numbers of their tokens
        make_processor(make_tokenizer(sample_captions(20_000))).save_pretrained(args.run / "processor")
    tokenizer = AutoProcessor.from_pretrained(args.run / "processor", backend="pil").tokenizer
    plan = Plan(args.steps, compile=not args.no_compile)
    run = train(pictures, labels, tokenizer, args.run, plan, hours=args.hours)
    done = {"step": run.step, "of": plan.steps, "seconds": round(run.seconds), **asdict(plan), "threads": args.threads}
    (args.run / "plan.json").write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(done))


if __name__ == "__main__":
    main()
