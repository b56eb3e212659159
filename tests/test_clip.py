"""The pictures, captions, training and zero-shot sets of the small CLIP in benchmarks/reference."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, CLIPConfig, CLIPModel


pytest.importorskip("PIL")
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SIDE = 32


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.fixture
def pictures():
    """Ten of each class, of one shade each and some noise, uint8, with their classes."""
    generator = torch.Generator().manual_seed(0)
    shades = torch.rand(10, 3, 1, 1, generator=generator)
    labels = list(range(10)) * 10
    noise = 0.05 * torch.randn(100, 3, SIDE, SIDE, generator=generator)
    return ((shades[labels] + noise).clamp(0, 1) * 255).to(torch.uint8), labels


@pytest.fixture(scope="module")
def tokenizer():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        from captions import sample_captions
        from train_clip import make_tokenizer

        return make_tokenizer(sample_captions(2000))


def tiny_config(vocabulary):
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "vocab_size": vocabulary}
    return CLIPConfig(
        vision_config={**tower, "image_size": SIDE, "patch_size": 8},
        text_config={**tower, **special, "max_position_embeddings": 32},
        projection_dim=16,
    )


def plan(**settings):
    from train_clip import Plan

    return Plan(**{"steps": 12, "batch_size": 20, "learning_rate": 3e-3, "warmup": 3, "report_every": 4,
                   "heldout_every": 12, "heldout_pictures": 10, "compile": False, **settings})  # fmt: skip


def train(pictures, tokenizer, folder, settings, **options):
    from train_clip import train

    return train(*pictures, tokenizer, folder, settings, config=tiny_config(len(tokenizer)), **options)


# Captions


def test_no_words_say_two_things():
    from captions import CLASSES, FAMILIES

    said = [(words, ("class", label)) for label, names in enumerate(CLASSES) for words in names]
    for name, values in FAMILIES.items():
        said += [(words, (name, value)) for value, (early, late) in enumerate(values) for words in (*early, *late)]
    assert len({words for words, _ in said}) == len(said)


def test_a_caption_says_what_it_mentions_and_nothing_else():
    from captions import CLASSES, FAMILIES, PLACES, UNMENTIONED, draw_content, draw_mentioned, write

    chance = random.Random(0)
    content = draw_content(list(range(10)) * 30, chance)
    for row in draw_mentioned(content, chance).tolist():
        text = f" {write(row, chance)} "
        for name, values in FAMILIES.items():
            for value, (early, late) in enumerate(values):
                if row[PLACES[name]] == value:
                    assert any(f" {words} " in text for words in (*early, *late)), (row, text)
        named = [label for label, names in enumerate(CLASSES) if any(f" {name} " in text for name in names)]
        assert named == ([] if row[0] == UNMENTIONED else [row[0]])
        assert " a a" not in text
        assert " a o" not in text


def test_what_is_true_of_what():
    from captions import MARK, PLACES, UNMENTIONED, draw_content, draw_mentioned, true_of

    chance = random.Random(1)
    content = draw_content([chance.randrange(10) for _ in range(60)], chance)
    mentioned = draw_mentioned(content, chance)
    found = true_of(mentioned, content)
    for i, j in itertools.product(range(60), range(60)):
        agree = all(said in (UNMENTIONED, shown) for said, shown in zip(mentioned[i], content[j], strict=True))
        assert found[i, j] == agree
    assert found.diagonal().all()
    assert 60 < found.sum() < 60 * 30
    marks = content[:, [PLACES[name] for name in MARK]] > 0
    assert torch.equal(marks.any(1), marks.all(1))
    assert marks.any()
    assert not marks.all()


def test_pairs_that_are_asked_for_are_never_shown():
    from captions import PLACES, draw_content, unseen_tint

    labels = list(range(10)) * 300
    content = draw_content(labels, random.Random(0))
    for label in range(10):
        tints = content[content[:, 0] == label][:, PLACES["tint"]].unique().tolist()
        assert sorted(tints) == sorted(set(range(6)) - {unseen_tint(label)})


def test_prompts_differ_and_say_the_same():
    from captions import prompts

    found = prompts({"class": 3, "tint": 2})
    assert len(set(found)) > 6
    assert all("cat" in text or "kitty" in text for text in found)
    assert all("red" in text for text in found)
    assert found == prompts({"class": 3, "tint": 2})


# Pictures


def test_pictures_are_altered_as_their_contents_say(pictures):
    from captions import PLACES, alter

    few = pictures[0][:4].float() / 255

    def shown(**values):
        content = torch.zeros(4, len(PLACES), dtype=torch.long)
        for name, value in values.items():
            content[:, PLACES[name]] = value
        return alter(few, content, torch.Generator().manual_seed(0))

    assert torch.equal(shown(), few)
    assert torch.equal(shown(turn=1), few.flip(2))
    assert torch.equal(shown(turn=2).transpose(2, 3).flip(3), few)
    assert torch.equal(shown(tint=5), 1 - few)
    grey = shown(tint=1)
    torch.testing.assert_close(grey[:, 0], few.mean(1))
    assert torch.equal(grey[:, 0], grey[:, 2])
    assert (shown(tint=2)[:, 0] >= few[:, 0]).all()
    torch.testing.assert_close(shown(light=1), 0.35 * few)
    torch.testing.assert_close(1 - shown(light=2), 0.4 * (1 - few))
    assert shown(focus=1).var() < few.var() < shown(focus=3).var()
    blocks = shown(focus=2).view(4, 3, 16, 2, 16, 2)
    assert torch.equal(blocks[:, :, :, 0, :, 0], blocks[:, :, :, 1, :, 1])
    assert torch.equal(shown(frame=2)[..., 3:-3, 3:-3], few[..., 3:-3, 3:-3])
    assert (shown(frame=2)[..., :3, :] == 1).all()
    marked = shown(ink=1, spot=9, sign=1)
    changed = (marked != few).any(1)
    assert changed[:, 22:30, 22:30].all()
    assert changed.sum() == 4 * 64
    assert (marked[:, 0, 22:30, 22:30] > marked[:, 1, 22:30, 22:30]).all()
    cross, disc = ((shown(ink=6, spot=1, sign=sign) != few).any(1).sum(dim=(1, 2)) for sign in (3, 2))
    assert (cross < disc).all()
    assert (disc < 64).all()


def test_training_reads_pictures_as_the_image_processor_does(pictures, tokenizer):
    from train_clip import make_processor, normalized
    from zero_shot import pixel_batches

    found = torch.cat(list(pixel_batches(make_processor(tokenizer).image_processor, pictures[0], 30)))
    torch.testing.assert_close(found, normalized(pictures[0].float() / 255), rtol=0, atol=1e-6)


def test_no_held_out_picture_is_trained_on(pictures, tokenizer, tmp_path, monkeypatch):
    import train_clip

    seen = set()
    take = train_clip.batch

    def watched(pictures, labels, *rest):
        seen.update(range(len(labels)))
        return take(pictures, labels, *rest)

    monkeypatch.setattr(train_clip, "batch", watched)
    train(pictures, tokenizer, tmp_path, plan())
    assert seen == set(range(90))


# The loss and the sets


def test_the_loss_is_that_of_clip_where_each_caption_is_true_of_its_own_picture_alone():
    from train_clip import contrastive_loss
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    logits = torch.randn(7, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(contrastive_loss(logits, torch.eye(7).bool()), image_text_contrastive_loss(logits))


def test_two_captions_true_of_one_picture_share_its_target():
    from train_clip import contrastive_loss

    logits = torch.tensor([[2.0, -1.0], [1.0, 0.5]], dtype=torch.float64)
    true = torch.tensor([[True, False], [True, True]])
    rows, columns = logits.log_softmax(1), logits.T.log_softmax(1)
    captions = -(rows[0, 0] + (rows[1, 0] + rows[1, 1]) / 2) / 2
    shown = -((columns[0, 0] + columns[0, 1]) / 2 + columns[1, 1]) / 2
    torch.testing.assert_close(contrastive_loss(logits, true), (captions + shown) / 2)


def test_every_set_has_its_right_answer_among_the_possible_ones(pictures):
    from zero_shot import questions

    asked = questions(*pictures)
    assert list(asked) == ["class", "class of altered", "tint", "spot", "mark", "unseen pairs"]
    for name, question in asked.items():
        assert len(question.pictures) == len(question.right) == 100
        assert 0 <= question.right.min() <= question.right.max() < len(question.answers), name
        assert len({tuple(wordings) for wordings in question.answers}) == len(question.answers)
    assert [len(asked[name].answers) for name in asked] == [10, 10, 6, 9, 162, 50]
    counts = asked["spot"].right.bincount()
    assert counts.max() - counts.min() <= 10
    assert torch.equal(asked["class"].pictures, pictures[0])
    assert not torch.equal(asked["class of altered"].pictures, pictures[0])


def test_accuracy_is_the_share_of_right_answers(pictures, tokenizer):
    from train_clip import build, normalized
    from zero_shot import Question, accuracy, answer_embeddings, image_embeddings

    model = build(tiny_config(len(tokenizer)), seed=0).eval()
    wordings = [["a photo of a cat", "one dark kitty"], ["a truck"], ["a blurry photo"]]
    pixels = normalized(pictures[0][:30].float() / 255)
    with torch.no_grad():
        likeness = model(
            pixel_values=pixels, **tokenizer([w[0] for w in wordings], padding=True, return_tensors="pt")
        ).logits_per_image
    single = [[texts[0]] for texts in wordings]
    right = likeness.argmax(-1)
    assert accuracy(model, tokenizer, Question(None, single, right), [pixels]) == 1
    right[:12] = (right[:12] + 1) % 3
    assert accuracy(model, tokenizer, Question(None, single, right), [pixels]) == pytest.approx(0.6)
    embedded = answer_embeddings(model, tokenizer, wordings)
    torch.testing.assert_close(embedded.norm(dim=-1), torch.ones(3))
    assert not torch.allclose(embedded[0], answer_embeddings(model, tokenizer, single)[0], atol=1e-3)
    torch.testing.assert_close(image_embeddings(model, pixels.split(7)), image_embeddings(model, [pixels]))


def test_sets_of_the_hub_are_read_with_their_names_and_templates(pictures, tokenizer, monkeypatch):
    import datasets
    from grid import Unavailable
    from kinds.clip import of_the_hub
    from PIL import Image
    from train_clip import make_processor

    def load_dataset(name, split):
        features = datasets.Features(
            {"img": datasets.Image(), "label": datasets.ClassLabel(names=["air_plane", name.upper()])}
        )
        rows = range(70) if split == "train" else range(7)
        images = [Image.fromarray(pictures[0][i].permute(1, 2, 0).numpy()) for i in rows]
        return datasets.Dataset.from_dict({"img": images, "label": [i % 2 for i in rows]}, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    where = {"split": "test", "image": "img", "label": "label"}
    spec = {"sets": {n: {"dataset": n, **where} for n in ("cats", "dogs")}, "calibration_split": "train"}
    asked, pairs = of_the_hub(spec, make_processor(tokenizer))
    question, pixels = asked["dogs"]
    assert [wordings[0] for wordings in question.answers] == ["a photo of a air plane.", "a photo of a dogs."]
    assert question.right.tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert torch.cat(list(pixels())).shape == (7, 3, SIDE, SIDE)
    assert torch.equal(next(iter(pixels())), next(iter(pixels())))
    (drawn,) = pairs(128, seed=0)
    assert drawn["pixel_values"].shape == (128, 3, SIDE, SIDE)
    assert torch.equal(drawn["true"], drawn["true"].T)
    assert drawn["true"].diagonal().all()
    classes = drawn["true"].float().sum(1)
    assert classes.unique().numel() <= 4
    assert classes.max() < 60
    with pytest.raises(Unavailable, match="cats, dogs have 140 training pictures, of 256"):
        pairs(256, seed=0)


# Training


def test_the_forward_pass_is_that_of_the_model(tokenizer):
    from train_clip import build, make_forward

    model = build(tiny_config(len(tokenizer)), seed=0)
    forward = make_forward(model, plan(autocast=False))
    pixels = torch.randn(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    ids = tokenizer(["a cat", "a dark dog", "one ship", "a horse"], padding=True, return_tensors="pt")["input_ids"]
    expected = model(pixel_values=pixels, input_ids=ids).logits_per_text
    torch.testing.assert_close(forward(pixels, ids), expected)


def test_the_rate_rises_stands_still_and_comes_down():
    settings = plan(steps=100, warmup=10, cooldown=0.3, learning_rate=1.0)
    rates = [settings.rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert rates[10:71] == [1.0] * 61
    assert rates[85] == pytest.approx(0.5)
    assert 0 < rates[-1] < 0.04


@pytest.mark.parametrize("autocast", [False, True])
def test_stopping_and_going_on_changes_no_bit(pictures, tokenizer, tmp_path, autocast):
    from train import read_log

    settings = plan(autocast=autocast)
    whole = dict(train(pictures, tokenizer, tmp_path / "whole", settings).model.named_parameters())
    for stop_after in (5, None):
        parts = train(pictures, tokenizer, tmp_path / "parts", settings, stop_after=stop_after)
    assert parts.step == 12
    for name, weight in parts.model.named_parameters():
        assert torch.equal(weight, whole[name]), name
    assert [line["step"] for line in read_log(tmp_path / "parts" / "log.jsonl")] == [4, 8, 12]


def test_shades_are_learned(pictures, tokenizer, tmp_path):
    from train import read_log

    run = train(pictures, tokenizer, tmp_path, plan(steps=150, report_every=10, heldout_every=150))
    log = read_log(tmp_path / "log.jsonl")
    assert log[-1]["loss"] < log[0]["loss"] - 0.3
    assert log[-1]["heldout"]["class"] >= 0.4  # of ten classes
    assert run.step == 150


# The model


@pytest.fixture
def folder():
    path = BENCHMARKS / "reference" / "clip-0.6m"
    if not (path / "training.json").exists():
        pytest.skip("benchmarks/reference/clip-0.6m is not there: train it with benchmarks/train_clip.py")
    return path


def test_the_reference_clip_is_a_stock_checkpoint_in_bfloat16(folder):
    from train_clip import SIZE_LIMIT

    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    model, info = CLIPModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert model.num_parameters() == record["parameters"]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) == record["bytes"] <= SIZE_LIMIT
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".jsonl", ".safetensors", ".md"}
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    given = processor(text=["a cat", "an upside-down dog"], padding=True, return_tensors="pt")
    assert given["input_ids"].max() < model.config.text_config.vocab_size


def test_the_table_of_its_readme_is_that_of_the_account(folder):
    from train_clip import table

    expected = table(json.loads((folder / "training.json").read_text(encoding="utf-8")))
    assert f"\n{expected}\n" in (folder / "README.md").read_text(encoding="utf-8")


def test_its_recorded_accuracy_is_reproduced(folder, data_dir):
    from captions import read_pictures
    from train_clip import FEW, HELD_OUT, of_few

    file = data_dir / "images" / "cifar10_train.parquet"
    if not file.exists():
        pytest.skip(f"{file} is not there")
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))["heldout"]
    assert (record["pictures"], record["first_pictures"]) == (HELD_OUT, FEW)
    pictures, labels = read_pictures(file)
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    found = of_few(model, processor, pictures[-HELD_OUT:], labels[-HELD_OUT:])
    for name, share in record["accuracy_of_first_pictures"].items():
        assert found[name] == pytest.approx(share, abs=2 / FEW)
        assert share == pytest.approx(record["accuracy"][name], abs=0.12)
    assert record["accuracy"]["class"] > 0.5
