"""Images and sounds, from whatever a dataset holds of them."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import CalibrationError


IMAGE_COLUMNS = ("images", "image")
AUDIO_COLUMN = "audio"
TEXT_COLUMNS = ("text", "caption", "sentence", "transcription")


@dataclass(frozen=True, eq=False)
class Media:
    """One example that is not text alone.

    Args:
        images: paths, PIL images, arrays, or rows of `datasets` that were not decoded.
        audio: path, array, decoder or row of `datasets`, if there is any.
        text: what goes with them, if anything does.
    """

    images: tuple[Any, ...] = ()
    audio: Any = None
    text: str | None = None

    @property
    def parts(self) -> tuple[int, bool, bool]:
        """What it is made of: examples are put into one batch that agree in it."""
        return len(self.images), self.audio is not None, self.text is not None

    def below(self, folder: str) -> Media:
        """With paths of files read as relative to a folder."""
        images = tuple(placed(image, folder) for image in self.images)
        return replace(self, images=images, audio=placed(self.audio, folder))


def placed(value: Any, folder: str) -> Any:
    """A path as one below a folder, unless it is absolute; anything else as it is."""
    return os.path.join(folder, value) if isinstance(value, str) and not is_url(value) else value


def is_url(value: str) -> bool:
    """Whether a string names a place on the net."""
    return value.startswith(("http://", "https://"))


def media_of(row: Mapping[str, Any]) -> Media | None:
    """The images, sound and text of a row; `None` for a row without images and sound, or one of model inputs."""
    if "input_ids" in row:
        return None
    images = next((row[column] for column in IMAGE_COLUMNS if row.get(column) is not None), ())
    audio = row.get(AUDIO_COLUMN)
    images = tuple(images) if isinstance(images, (list, tuple)) else (images,)
    if not images and audio is None:
        return None
    return Media(images, audio, next((row[c] for c in TEXT_COLUMNS if isinstance(row.get(c), str)), None))


def opened_image(image: Any) -> Any:
    """An image as PIL has it, in RGB and upright.

    Args:
        image: path, URL, PIL image, `{"bytes": …, "path": …}`, or array `(height, width)`, `(height, width, channels)`
            or `(channels, height, width)` of integers up to 255 or of numbers in [0, 1].

    Raises:
        CalibrationError: it cannot be read, is something else, or Pillow is not installed.
    """
    from transformers.image_utils import load_image

    named, image = unpacked(image, "image")
    if isinstance(image, (np.ndarray, Tensor)):
        return of_array(np.asarray(image))
    pil = pillow()
    try:
        return load_image(pil.open(image) if isinstance(image, io.BytesIO) else image)
    except TypeError as error:
        raise CalibrationError(
            f"an image of the dataset is a {type(image).__name__}; give a path, a PIL image or an array"
        ) from error
    except (OSError, ValueError, SyntaxError) as error:  # PIL raises all of them for damaged files
        raise CalibrationError(f"{named} cannot be read: {error}; replace it or leave it out") from error


def unpacked(value: Any, kind: str) -> tuple[str, Any]:
    """What to call an image or a sound in an error, and the file, the bytes of one, or the object that it is.

    Raises:
        CalibrationError: the file does not exist.
    """
    path = value.get("path") if isinstance(value, Mapping) else value
    if isinstance(value, Mapping):
        value = io.BytesIO(value["bytes"]) if value.get("bytes") else path
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    if isinstance(value, str) and not is_url(value) and not os.path.isfile(value):
        raise CalibrationError(f"the {kind} file {value} does not exist")
    return f"the {kind} {os.fspath(path)}" if isinstance(path, (str, os.PathLike)) else f"an {kind}", value


def of_array(values: np.ndarray) -> Any:
    """An array as a PIL image in RGB."""
    if values.ndim == 3 and values.shape[0] in (1, 3, 4) and values.shape[-1] not in (1, 3, 4):
        values = values.transpose(1, 2, 0)
    if values.ndim not in (2, 3) or values.ndim == 3 and values.shape[-1] not in (1, 3, 4):
        raise CalibrationError(f"an image of the dataset is an array of shape {values.shape}; give one image in each")
    if np.issubdtype(values.dtype, np.floating):
        values = np.rint(values * 255) if 0 <= values.min() <= values.max() <= 1 else values
    if not 0 <= values.min() <= values.max() <= 255:
        raise CalibrationError(
            f"an image of the dataset is an array from {values.min()} to {values.max()}; give numbers from 0 to 255 "
            "or in [0, 1], or, of images that a processor has prepared, model inputs as {'pixel_values': …}"
        )
    values = values.astype(np.uint8)
    return pillow().fromarray(values[..., 0] if values.shape[2:] == (1,) else values).convert("RGB")


def pillow() -> Any:
    """The module `PIL.Image`."""
    try:
        from PIL import Image
    except ImportError as error:
        raise CalibrationError("images need Pillow: `pip install optimum-pgsvd[vision]`") from error
    return Image


def opened_audio(audio: Any, rate: int) -> np.ndarray:
    """A sound as one channel at a sampling rate.

    Args:
        audio: path, samples `(T,)` at that rate, `{"array": …, "sampling_rate": …}`, `{"bytes": …, "path": …}`, or a
            decoder of torchcodec.
        rate: in samples a second.

    Returns:
        `(T,)` float32.

    Raises:
        CalibrationError: it cannot be read, is something else, or soundfile is not installed.
    """
    if hasattr(audio, "get_all_samples"):
        samples = audio.get_all_samples()
        return resampled(samples.data.mean(0).numpy(), samples.sample_rate, rate)
    if isinstance(audio, Mapping) and audio.get("array") is not None:
        return resampled(np.asarray(audio["array"], np.float32), audio["sampling_rate"], rate)
    named, audio = unpacked(audio, "audio")
    if isinstance(audio, (str, io.BytesIO)):
        return read_audio(named, audio, rate)
    samples = np.asarray(audio, np.float32) if isinstance(audio, (np.ndarray, Tensor, list)) else np.empty((0, 0))
    if samples.ndim != 1:
        raise CalibrationError(
            f"a sound of the dataset is a {type(audio).__name__}; give a path or samples of one channel, (T,)"
        )
    return samples


def read_audio(named: str, source: str | io.BytesIO, rate: int) -> np.ndarray:
    """The samples of a file, or of what would be one."""
    try:
        import soundfile
    except ImportError as error:
        raise CalibrationError("files of sound need soundfile: `pip install optimum-pgsvd[audio]`") from error
    try:
        samples, its_rate = soundfile.read(source, dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise CalibrationError(f"{named} cannot be read: {error}; replace it or leave it out") from error
    return resampled(samples.mean(1), its_rate, rate)


def resampled(samples: np.ndarray, its_rate: float, rate: int) -> np.ndarray:
    """Samples at another rate."""
    if its_rate == rate:
        return samples
    try:
        import soxr
    except ImportError as error:
        raise CalibrationError(
            f"sounds at {its_rate:g} samples a second, where the model takes {rate}, need soxr: "
            "`pip install optimum-pgsvd[audio]`"
        ) from error
    return soxr.resample(samples, its_rate, rate)
