"""A folder of images or sounds, with what is written to go with them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import CalibrationError
from .media import Media, media_of


IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
AUDIO_TYPES = (".wav", ".flac", ".mp3", ".ogg", ".opus")

# A line for each file, as `datasets`' imagefolder has it in the first of them.
LISTS = ("metadata.jsonl", "captions.jsonl")
FILE_COLUMN = "file_name"


def read_folder(folder: str) -> list[Media]:
    """The examples of a folder, in the order of its list or of the names of its files.

    With `metadata.jsonl` or `captions.jsonl`, those that are listed: a line is an object with `file_name`, `image` or
    `audio`, a path in the folder, and `text` or `caption`. Without, every image and sound below it, each with the text
    of the file beside it that is named alike, `a.txt` for `a.png`, or without text where no file has one.

    Raises:
        CalibrationError: the folder holds neither, a line is not such an object, or some files have a text and others
            do not.
    """
    listed = next((path for name in LISTS if os.path.isfile(path := os.path.join(folder, name))), None)
    if listed is not None:
        return [example.below(folder) for example in read_list(listed)]
    examples = [with_text_beside(path) for path in media_files(folder)]
    if not examples:
        known = ", ".join(IMAGE_TYPES + AUDIO_TYPES)
        raise CalibrationError(
            f"the calibration dataset {folder} is a folder without images or sounds ({known}); name a .txt, .jsonl or "
            ".parquet file in it"
        )
    silent = next((example for example in examples if example.text is None), None)
    if silent is not None and any(example.text is not None for example in examples):
        path = silent.images[0] if silent.images else silent.audio
        raise CalibrationError(
            f"{path} has no text beside it, {os.path.splitext(path)[0]}.txt, though others in {folder} have; write "
            "one, or remove it"
        )
    return examples


def read_list(path: str) -> Iterator[Media]:
    """The examples that are listed in a file, an object a line."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield listed_example(f"{path}, line {number}", line)


def listed_example(where: str, line: str) -> Media:
    """The example of one line."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise CalibrationError(f"{where} is not JSON: {error}") from error
    example = media_of(named(row)) if isinstance(row, Mapping) else None
    if example is None:
        raise CalibrationError(
            f'{where} names no file: give {{"file_name": "a.png", "text": "…"}}, or \'image\' or \'audio\' for '
            "'file_name'"
        )
    return example


def named(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with its file under the column of what it is."""
    name = row.get(FILE_COLUMN)
    if not isinstance(name, str):
        return dict(row)
    return {**row, "audio" if name.lower().endswith(AUDIO_TYPES) else "image": name}


def media_files(folder: str) -> list[str]:
    """The paths of all images and sounds below a folder, sorted."""
    walk = os.walk(folder)
    paths = (os.path.join(parent, name) for parent, _, names in walk for name in names if not name.startswith("."))
    return sorted(path for path in paths if path.lower().endswith(IMAGE_TYPES + AUDIO_TYPES))


def with_text_beside(path: str) -> Media:
    """A file with the text of the one that is named alike, if there is one."""
    beside = f"{os.path.splitext(path)[0]}.txt"
    text = None
    if os.path.isfile(beside):
        with open(beside, encoding="utf-8") as file:
            text = file.read().strip()
    return Media(audio=path, text=text) if path.lower().endswith(AUDIO_TYPES) else Media((path,), text=text)
