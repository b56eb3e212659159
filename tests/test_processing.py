"""From images and sounds with their texts to what a model is measured on, through its own processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers as hf
from fresh import in_fresh_process
from models import BEGIN, END, FAMILIES, IMAGE_TOKEN, PAD, Batch, generator, scramble
from PIL import Image
from processors import PROCESSORS, caption, clip_processor, example, media_tokenizer, picture, sound, tokens_of
from test_commands import run
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from optimum_pgsvd import PGSVDCompressor, PGSVDConfig
from optimum_pgsvd.calibration import load_calibration_set
from optimum_pgsvd.errors import CalibrationError
from optimum_pgsvd.modeling_pgsvd import low_rank_layers


def load(dataset: Any, of: str = "clip", processor: Any = None, model: Any = None, **fields: Any) -> list[Batch]:
    model = model or FAMILIES[of].build()
    config = PGSVDConfig(tolerance=0.5, dataset=dataset, **fields)
    return load_calibration_set(model, config, processor or PROCESSORS[of]())


def rows(batches: list[Batch], key: str = "input_ids") -> list[list[int]]:
    """The sequences of all batches, without their padding."""
    return [[t for t in row if t not in (PAD, -100)] for batch in batches for row in batch[key].tolist()]


# What is put around a text: its beginning and end, the roles of a conversation (4 a user, 86 an assistant, 87 a
# colon), an image's places, and what a family puts around them.
SEEN = [IMAGE_TOKEN] * 4
AROUND = {
    "clip": ([BEGIN], [END]),
    "siglip": ([BEGIN], [END]),
    "blip": ([BEGIN], [END]),
    "whisper": ([], [END]),
    "llava": ([BEGIN, 4, 87, *SEEN, 86, 87], [END]),
    "qwen2_5_vl": ([BEGIN, 4, 87, 98, *SEEN, 97, 86, 87], [END]),
    "qwen3_vl": ([BEGIN, 4, 87, 98, *SEEN, 97, 86, 87], [END]),
    "idefics3": ([BEGIN, 4, 87, 99, 98, *SEEN, 99, 86, 87], [END]),
    "smolvlm": ([BEGIN, 4, 87, 99, 98, *SEEN, 99, 86, 87], [END]),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_every_family_reads_pairs(name: str) -> None:
    """Tokens are those written down here, media those of the processor's own part, each beside its text."""
    batches = load([example(name, number) for number in range(5)], name, batch_size=2)
    before, after = AROUND[name]
    key = "labels" if name == "whisper" else "input_ids"
    texts = {(*before, *tokens_of(number), *after): number for number in range(5)}
    order = [texts[tuple(row)] for row in rows(batches, key)]
    assert sorted(order) == [*range(5)]
    processor = PROCESSORS[name]()
    if name == "whisper":
        expected = processor.feature_extractor([sound(n) for n in order], sampling_rate=16000, return_tensors="pt")
    else:
        expected = processor.image_processor([[picture(n)] for n in order], return_tensors="pt")
    media = "input_features" if name == "whisper" else "pixel_values"
    found = torch.cat([batch[media] for batch in batches])
    assert torch.equal(found, expected[media].reshape(found.shape))
    assert len(batches) == 3


@pytest.mark.parametrize("name", PROCESSORS)
def test_every_family_is_compressed_on_pairs(name: str) -> None:
    """Every tower is reached, and padding is not: as many tokens as were written."""
    model = FAMILIES[name].build()
    config = PGSVDConfig(0.3, dataset=[example(name, number) for number in range(6)], batch_size=3)
    report = PGSVDCompressor(config).compress(model, PROCESSORS[name]())
    assert len(low_rank_layers(model)) == len(report.layers)
    before, after = AROUND[name]
    expected = sum(len([*before, *tokens_of(number), *after]) for number in range(6))
    if name == "siglip":  # reads its padding
        expected = 6 * 20
    reads_text = [layer for layer in report.layers if is_of_text(layer.name)]
    assert reads_text
    assert {layer.tokens for layer in reads_text} == {expected}


def is_of_text(layer: str) -> bool:
    text = any(part in layer for part in ("text_", "language_model", "model.decoder"))
    crossed = any(
        part in layer
        for part in ("crossattention.self.key", "crossattention.self.value", "encoder_attn.k", "encoder_attn.v")
    )
    return text and not crossed


# Where they come from


def folder_of(kind: str, folder: Path) -> Path:
    """Six images with their texts, in one of the ways in which they may lie in a folder."""
    (folder / "deep").mkdir(parents=True)
    names = [f"{'deep/' if number % 2 else ''}{number}.png" for number in range(6)]
    for number, name in enumerate(names):
        picture(number).save(folder / name)
        if kind == "beside":
            (folder / name).with_suffix(".txt").write_text(caption(number) + "\n")
    column, text = ("file_name", "text") if kind == "metadata" else ("image", "caption")
    lines = [json.dumps({column: name, text: caption(number)}) for number, name in enumerate(names)]
    listed = {"metadata": "metadata.jsonl", "captions": "captions.jsonl", "file": "pairs.jsonl"}
    if kind in listed:
        (folder / listed[kind]).write_text("\n".join(lines) + "\n\n")
    return folder / "pairs.jsonl" if kind == "file" else folder


def given(kind: str, folder: Path) -> Any:
    numbers = range(6)
    if kind in ("beside", "metadata", "captions", "file"):
        return folder_of(kind, folder / "pairs")
    paths = [folder / f"{number}.png" for number in numbers]
    for number in numbers:
        picture(number).save(paths[number])
    table = {"image": [str(path) for path in paths], "caption": [caption(number) for number in numbers]}
    dataset = datasets.Dataset.from_dict(table).cast_column("image", datasets.Image())
    images: dict[str, list[Any]] = {
        "pictures": [picture(number) for number in numbers],
        "paths": paths,
        "arrays": [np.asarray(picture(number)) for number in numbers],
        "channels first": [torch.tensor(np.asarray(picture(number))).permute(2, 0, 1) for number in numbers],
        "floats": [np.asarray(picture(number)) / 255 for number in numbers],
        "lists": [[picture(number)] for number in numbers],
    }
    if kind in images:
        return [{"image": image, "text": caption(number)} for number, image in zip(numbers, images[kind], strict=True)]
    return {"Dataset": dataset, "IterableDataset": dataset.to_iterable_dataset()}[kind]


WAYS = (
    "beside", "metadata", "captions", "file", "pictures", "paths", "arrays", "channels first", "floats", "lists",
    "Dataset", "IterableDataset",
)  # fmt: skip


@pytest.mark.parametrize("kind", WAYS)
def test_the_same_from_everywhere(kind: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.05, raising=False)
    batches = load(given(kind, tmp_path), batch_size=6)
    order = [row[1] - IMAGE_TOKEN - 1 for row in rows(batches)]
    expected = clip_processor().image_processor([picture(number) for number in order], return_tensors="pt")
    assert sorted(order) == [*range(6)]
    assert torch.equal(batches[0]["pixel_values"], expected["pixel_values"])
    assert rows(batches) == [[BEGIN, *tokens_of(number), END] for number in order]


def test_as_many_as_asked_for_in_a_seeded_order(tmp_path) -> None:
    folder = folder_of("beside", tmp_path / "pairs")
    everything = rows(load(folder, seed=3))
    assert rows(load(folder, seed=3, num_samples=4, batch_size=3)) == everything[:4]
    assert len({str(rows(load(folder, seed=seed))) for seed in range(4)}) > 1


def test_texts_are_cut() -> None:
    pairs = [{"image": picture(0), "text": " ".join(f"w{i}" for i in range(70))}]
    assert [len(row) for row in rows(load(pairs))] == [64]
    assert [len(row) for row in rows(load(pairs, sequence_length=9))] == [9]


def test_a_model_of_images_alone() -> None:
    """The vision tower of CLIP with the processor of both, and a ViT with an image processor."""
    clip = hf.CLIPVisionModel(FAMILIES["clip"].config().vision_config)
    vit = hf.ViTForImageClassification(hf.ViTConfig(image_size=16, patch_size=8, hidden_size=32))
    for model, processor in ((clip, clip_processor()), (vit, ViTImageProcessorPil(size={"height": 16, "width": 16}))):
        for dataset in ([{"image": picture(0), "text": "w0"}], [{"image": picture(0)}]):
            (batch,) = load(dataset, model=model.eval(), processor=processor)
            assert list(batch) == ["pixel_values"]


def test_images_are_in_the_dtype_of_the_model() -> None:
    (batch,) = load([example("clip", 0)], model=FAMILIES["clip"].build().to(torch.bfloat16))
    assert batch["pixel_values"].dtype == torch.bfloat16
    assert batch["input_ids"].dtype == torch.int64


def test_several_images_and_none_in_one_dataset() -> None:
    """Examples are put into batches with such as have the same parts."""
    pairs: list[dict[str, Any]] = [{"images": [picture(n), picture(n + 10)], "text": caption(n)} for n in range(3)]
    batches = load([*pairs, *(example("llava", number) for number in range(5, 9))], "llava", batch_size=2)
    images = sorted(tuple((batch["input_ids"] == IMAGE_TOKEN).sum(1).tolist()) for batch in batches)
    assert images == [(4, 4), (4, 4), (8,), (8, 8)]
    for batch in batches:
        FAMILIES["llava"].build()(**batch)


def test_without_a_chat_template_the_image_comes_first() -> None:
    processor = PROCESSORS["llava"]()
    processor.chat_template = None
    (batch,) = load([example("llava", 0)], "llava", processor)
    assert rows([batch]) == [[BEGIN, *SEEN, *tokens_of(0), END]]


def test_a_template_that_writes_the_beginning_itself() -> None:
    processor = PROCESSORS["llava"]()
    processor.chat_template = f"<s> {processor.chat_template}"
    (batch,) = load([example("llava", 0)], "llava", processor)
    assert rows([batch]) == [[BEGIN, 4, 87, *SEEN, 86, 87, *tokens_of(0)]]


def test_labels_do_not_begin_twice() -> None:
    """The decoder begins with its own first token; where the tokenizer writes none, nothing is cut."""
    tokenizer = media_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    processor = hf.WhisperProcessor(PROCESSORS["whisper"]().feature_extractor, tokenizer)
    (batch,) = load([example("whisper", 0)], "whisper", processor)
    assert rows([batch], "labels") == [tokens_of(0)]


# Sounds


def test_sounds_from_everywhere(tmp_path) -> None:
    """In integers of 16 bits, of which a file is made, half of one is what a sample may differ by."""
    soundfile = pytest.importorskip("soundfile")
    path = tmp_path / "sounds" / "a.wav"
    path.parent.mkdir()
    samples = np.clip(sound(0) / 4, -1, 1)
    soundfile.write(path, np.stack([samples, samples], 1), 16000)
    path.with_suffix(".txt").write_text(caption(0))
    (expected,) = load([{"audio": samples, "text": caption(0)}], "whisper")
    table = datasets.Dataset.from_dict({"audio": [str(path)], "sentence": [caption(0)]})
    ways = [
        [{"audio": path, "text": caption(0)}],
        [{"audio": {"path": None, "bytes": path.read_bytes()}, "text": caption(0)}],
        [{"audio": {"array": samples, "sampling_rate": 16000}, "text": caption(0)}],
        table.cast_column("audio", datasets.Audio()),
        path.parent,
    ]
    for dataset in ways:
        (batch,) = load(dataset, "whisper")
        assert torch.equal(batch["labels"], expected["labels"])
        torch.testing.assert_close(batch["input_features"], expected["input_features"], rtol=0, atol=2e-2)


def test_sounds_at_another_rate() -> None:
    """A tone of 440 periods a second, whatever it was sampled at."""
    pytest.importorskip("soxr")

    def tone(rate: int) -> np.ndarray:
        return np.sin(2 * np.pi * 440 * np.arange(rate) / rate).astype(np.float32)

    (expected,) = load([{"audio": tone(16000), "text": caption(0)}], "whisper")
    (found,) = load([{"audio": {"array": tone(8000), "sampling_rate": 8000}, "text": caption(0)}], "whisper")
    # What resampling does at both ends shows in the first frames and in the last.
    inner = (..., slice(5, -5))
    torch.testing.assert_close(found["input_features"][inner], expected["input_features"][inner], rtol=0, atol=2e-2)


# What is wrong


def damaged(folder: Path, kind: str) -> Any:
    folder_of("metadata" if kind == "list" else "beside", folder)
    if kind == "image":
        (folder / "2.png").write_bytes(b"no image")
    if kind == "cut image":
        content = (folder / "2.png").read_bytes()
        (folder / "2.png").write_bytes(content[: len(content) // 2])
    if kind == "list":
        (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "w1"}\n{"text": "w2"}\n')
    if kind == "text":
        (folder / "2.txt").unlink()
    return folder


WRONG = {
    "no text": ([{"image": picture(0)}], r"CLIPModel needs a text with each image or sound.*column 'text'"),
    "other columns": ([{"img": picture(0), "label": 1}], "the columns img, label; give .*'image'.*rename_column"),
    "no file": ([{"image": "nowhere.png", "text": "w1"}], "the image file nowhere.png does not exist"),
    "no image": ([{"image": 3, "text": "w1"}], "an image of the dataset is a int; give a path"),
    "prepared": ([{"image": np.full((3, 4, 4), -2.0), "text": "w1"}], r"from -2.0 to -2.0.*{'pixel_values': …}"),
    "a batch": ([{"image": np.zeros((2, 3, 4, 4)), "text": "w1"}], r"an array of shape \(2, 3, 4, 4\)"),
    "sounds": ([{"audio": sound(0), "text": "w1"}], "the dataset has sounds, and CLIPProcessor prepares none"),
    "mixed": ([{"image": picture(0), "text": "w1"}, "w1 w2"], "mixes texts, token tensors, media and model inputs"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(case: str) -> None:
    dataset, message = WRONG[case]
    with pytest.raises(CalibrationError, match=message):
        load(dataset)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("image", r"the image .*2\.png cannot be read"),
        ("cut image", r"the image .*2\.png cannot be read"),
        ("list", r"metadata.jsonl, line 2 names no file"),
        ("text", r"2\.png has no text beside it, .*2\.txt"),
    ],
)
def test_damaged_files_are_named(kind: str, message: str, tmp_path) -> None:
    with pytest.raises(CalibrationError, match=message):
        load(damaged(tmp_path / "pairs", kind))


def test_a_damaged_image_of_a_dataset_is_named(tmp_path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    table = datasets.Dataset.from_dict({"image": [str(tmp_path / "bad.png")], "text": ["w1"]})
    with pytest.raises(CalibrationError, match=r"the image .*bad\.png cannot be read"):
        load(table.cast_column("image", datasets.Image()))


def test_a_damaged_sound_is_named(tmp_path) -> None:
    pytest.importorskip("soundfile")
    (tmp_path / "bad.wav").write_bytes(b"no sound")
    for dataset, message in (
        ([{"audio": str(tmp_path / "bad.wav"), "text": "w1"}], r"the audio .*bad\.wav cannot be read"),
        ([{"audio": str(tmp_path / "none.wav"), "text": "w1"}], r"the audio file .*none\.wav does not exist"),
        ([{"audio": np.zeros((2, 50)), "text": "w1"}], r"samples of one channel"),
    ):
        with pytest.raises(CalibrationError, match=message):
            load(dataset, "whisper")


def test_a_folder_of_nothing(tmp_path) -> None:
    (tmp_path / "notes.md").write_text("nothing")
    with pytest.raises(CalibrationError, match="is a folder without images or sounds"):
        load(tmp_path)


def test_a_processor_is_needed(tmp_path) -> None:
    pairs = [example("clip", 0)]
    with pytest.raises(CalibrationError, match="images and sounds need the model's processor"):
        load_calibration_set(FAMILIES["clip"].build(), PGSVDConfig(0.2, dataset=pairs))
    with pytest.raises(CalibrationError, match="no processor could be loaded from 'nowhere'"):
        load_calibration_set(FAMILIES["clip"].build(), PGSVDConfig(0.2, dataset=pairs, tokenizer="nowhere"))
    with pytest.raises(CalibrationError, match="prepares none; give the model's own processor"):
        load(pairs, processor=media_tokenizer())


def test_the_processor_s_own_words() -> None:
    """A template that forgets the image: the processor counts."""
    processor = PROCESSORS["llava"]()
    processor.chat_template = "{{ messages[1]['content'][0]['text'] }}"
    with pytest.raises(CalibrationError, match="LlavaProcessor does not take the images, sounds or texts"):
        load([example("llava", 0)], "llava", processor)


# The checkpoint


def test_the_processor_comes_from_the_model_s_place_and_goes_with_it(tmp_path) -> None:
    FAMILIES["clip"].build().save_pretrained(tmp_path / "dense")
    clip_processor().save_pretrained(tmp_path / "dense")
    config = PGSVDConfig(0.3, dataset=folder_of("captions", tmp_path / "pairs"))
    model = hf.CLIPModel.from_pretrained(tmp_path / "dense", quantization_config=config)
    model.save_pretrained(tmp_path / "out")
    same, given_it = load([example("clip", 0)], model=model), tmp_path / "again"
    for place in ("dense", "out"):
        processor = hf.AutoProcessor.from_pretrained(tmp_path / place)
        (batch,) = load([example("clip", 0)], model=model, processor=processor)
        assert torch.equal(batch["pixel_values"], same[0]["pixel_values"])
        assert torch.equal(batch["input_ids"], same[0]["input_ids"])
    # One that was given is saved, whatever lies where the model came from.
    fresh = FAMILIES["clip"].build()
    PGSVDCompressor(PGSVDConfig(0.3, dataset=[example("clip", 0)])).compress(fresh, clip_processor())
    fresh.save_pretrained(given_it)
    assert type(hf.AutoProcessor.from_pretrained(given_it)) is hf.CLIPProcessor


def test_a_stock_pipeline_runs_the_checkpoint_in_a_fresh_process(tmp_path) -> None:
    """With the processor that was saved with it, and without an import of this package."""
    model = FAMILIES["clip"].build()
    PGSVDCompressor(PGSVDConfig(0.3, dataset=[example("clip", 0)])).compress(model, clip_processor())
    model.save_pretrained(tmp_path / "out")
    picture(3).save(tmp_path / "3.png")
    printed = in_fresh_process(
        """
        import json, sys
        from transformers import pipeline
        classify = pipeline("zero-shot-image-classification", model=sys.argv[1])
        print("FOUND", json.dumps(classify(sys.argv[2], candidate_labels=["w1 w2", "w3"], hypothesis_template="{}")))
        """,
        tmp_path / "out",
        tmp_path / "3.png",
        home=tmp_path,
    )
    found = {row["label"]: row["score"] for row in json.loads(printed.partition("FOUND ")[2].splitlines()[0])}
    inputs = clip_processor()(images=picture(3), text=["w1 w2", "w3"], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits_per_image.softmax(-1)[0].tolist()
    assert [found["w1 w2"], found["w3"]] == pytest.approx(expected, rel=1e-5)


def test_the_command_line_takes_a_folder(tmp_path) -> None:
    FAMILIES["clip"].build().save_pretrained(tmp_path / "dense")
    clip_processor().save_pretrained(tmp_path / "dense")
    folder = folder_of("beside", tmp_path / "pairs")
    run("compress", "--model", tmp_path / "dense", "--parameter-reduction", "0.3", "--dataset", folder,
        "--output", tmp_path / "out")  # fmt: skip
    config = PGSVDConfig(0.3, dataset=folder)
    model = hf.CLIPModel.from_pretrained(tmp_path / "dense", quantization_config=config)
    reloaded = hf.CLIPModel.from_pretrained(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reloaded.parameters(), strict=True))


def test_images_of_any_mode_are_made_rgb(tmp_path) -> None:
    """In grey, with transparency, with a palette, and turned by what the camera noted."""
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    turned = grey.rotate(90, expand=True)
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 270 degrees counterclockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    images = [grey, grey.convert("RGBA"), grey.convert("P"), tmp_path / "turned.png"]
    pixels = [load([{"image": image, "text": "w0"}])[0]["pixel_values"] for image in images]
    assert all(torch.equal(other, pixels[0]) for other in pixels[1:])


def test_scrambled_models_see_the_image() -> None:
    """A control: another image gives other outputs, so that the tests above compare something."""
    model = FAMILIES["clip"].build()
    scramble(model, generator(1))
    with torch.no_grad():
        outputs = [model(**load([{"image": picture(n), "text": "w0"}])[0]).logits_per_image for n in range(2)]
    assert not torch.allclose(*outputs)
