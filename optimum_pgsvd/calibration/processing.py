"""Images, sounds and their texts to batches, through the model's own processor."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import FeatureExtractionMixin, PreTrainedTokenizerBase
from transformers.image_processing_base import ImageProcessingMixin

from ..errors import CalibrationError
from .media import TEXT_COLUMNS, Media, opened_audio, opened_image


Batch = dict[str, Any]

# Of a label that does not count, in transformers' losses.
IGNORED = -100


@dataclass(frozen=True, eq=False)
class Processing:
    """A model's processor, taken apart.

    Args:
        model: that the batches are for.
        processor: processor, tokenizer, image processor or feature extractor.
        length: tokens that texts are cut to.
    """

    model: Any
    processor: Any
    length: int

    @property
    def images(self) -> Any:
        """What prepares images, if anything does."""
        return self._part("image_processor", ImageProcessingMixin)

    @property
    def audio(self) -> Any:
        """What prepares sounds, if anything does."""
        return self._part("feature_extractor", FeatureExtractionMixin) or self._part("audio_processor", ())

    @property
    def tokenizer(self) -> Any:
        """What prepares text, if anything does."""
        return self._part("tokenizer", PreTrainedTokenizerBase)

    def _part(self, name: str, kind: Any) -> Any:
        return getattr(self.processor, name, None) or (self.processor if isinstance(self.processor, kind) else None)

    @property
    def inputs(self) -> set[str]:
        """What the model takes."""
        return set(inspect.signature(self.model.forward).parameters)

    @property
    def labelled(self) -> bool:
        """Whether texts are what the model is to answer, on another input: those of Whisper, say."""
        return bool(getattr(self.model.config, "is_encoder_decoder", False)) and self._reads_other_than_text()

    @property
    def interleaved(self) -> bool:
        """Whether images and sounds have a place in the text, which a token keeps for them: in LLaVA, say."""
        places = (getattr(self.processor, f"{kind}_token", None) for kind in ("image", "audio"))
        return "input_ids" in self.inputs and any(places) and not self.labelled

    @property
    def wants_text(self) -> bool:
        """Whether the model needs a text with each image or sound."""
        return self.tokenizer is not None and ("input_ids" in self.inputs or self.labelled)

    def _reads_other_than_text(self) -> bool:
        return self.model.main_input_name != "input_ids" or "input_ids" not in self.inputs

    def batch(self, examples: Sequence[Media]) -> Batch:
        """The model inputs of examples with the same parts.

        Raises:
            CalibrationError: a part of them is missing, cannot be read, or the processor does not take it.
        """
        self._check(examples[0])
        try:
            values = self._conversations(examples) if self.interleaved else self._side_by_side(examples)
        except CalibrationError:
            raise
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError, ImportError) as error:
            raise CalibrationError(
                f"{type(self.processor).__name__} does not take the images, sounds or texts of the dataset: {error}"
            ) from error
        dtype = self.model.dtype
        return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in values.items()}

    def _check(self, example: Media) -> None:
        given_audio = example.audio is not None
        for given, part, kind in ((example.images, self.images, "images"), (given_audio, self.audio, "sounds")):
            if given and part is None:
                raise CalibrationError(
                    f"the dataset has {kind}, and {type(self.processor).__name__} prepares none; give the model's own "
                    "processor as tokenizer=..."
                )
        if self.wants_text and example.text is None:
            raise CalibrationError(
                f"{type(self.model).__name__} needs a text with each image or sound, and the dataset has none; give a "
                f"column {TEXT_COLUMNS[0]!r} (or {', '.join(TEXT_COLUMNS[1:])}), or in a folder a.txt beside a.png or "
                "a metadata.jsonl"
            )

    def _side_by_side(self, examples: Sequence[Media]) -> Batch:
        """Each part prepared on its own."""
        values = {**self._prepared_images(examples), **self._prepared_audio(examples)}
        if not self.wants_text:
            return values
        tokens = self._tokens([example.text or "" for example in examples])
        if self.labelled:
            return values | self._labels(tokens)
        return values | {key: value for key, value in tokens.items() if key in self.inputs}

    def _prepared_images(self, examples: Sequence[Media]) -> Batch:
        images = [opened_image(image) for example in examples for image in example.images]
        return dict(self.images(images, return_tensors="pt")) if images else {}

    def _prepared_audio(self, examples: Sequence[Media]) -> Batch:
        if examples[0].audio is None:
            return {}
        sounds, rate = self._sounds(examples)
        by_default = inspect.signature(self.audio.__call__).parameters.get("padding")
        # Whisper's pads to half a minute unless told otherwise, which its encoder needs; others do not pad.
        options = {"padding": True} if by_default is None or by_default.default in (None, False) else {}
        return dict(self.audio(sounds, sampling_rate=rate, return_tensors="pt", **options))

    def _sounds(self, examples: Sequence[Media]) -> tuple[list[Any], int]:
        rate = self.audio.sampling_rate
        return [opened_audio(example.audio, rate) for example in examples], rate

    def _tokens(self, texts: list[str]) -> Batch:
        """Truncated texts, padded to the longest, or to full length for a model that reads padding as text."""
        reads_padding = "attention_mask" not in self.tokenizer.model_input_names
        # As transformers' own pipeline has it: what SigLIP says of a text is what it says of its last place.
        full = reads_padding or str(getattr(self.model.config, "model_type", "")).startswith("siglip")
        length = min(self.length, self.tokenizer.model_max_length)
        padding = "max_length" if full else len(texts) > 1
        return dict(self.tokenizer(texts, padding=padding, truncation=True, max_length=length, return_tensors="pt"))

    def _labels(self, tokens: Batch) -> Batch:
        """Labels of a decoder that begins by itself, with a mask where they are padded."""
        ids, mask = tokens["input_ids"], tokens.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        start = getattr(self.model.config, "decoder_start_token_id", None)
        if bool((ids[:, 0] == start).all()):
            ids, mask = ids[:, 1:], mask[:, 1:]
        labels = ids.masked_fill(mask == 0, IGNORED)
        padded = bool((mask == 0).any()) and "decoder_attention_mask" in self.inputs
        return {"labels": labels} | ({"decoder_attention_mask": mask} if padded else {})

    def _conversations(self, examples: Sequence[Media]) -> Batch:
        """Texts in which images and sounds have their place: what a user shows, and what the model is to say of it."""
        texts = [self._prompt(example) for example in examples]
        media: dict[str, Any] = {}
        if examples[0].images:
            media["images"] = [[opened_image(image) for image in example.images] for example in examples]
        if examples[0].audio is not None:
            media["audio"], media["sampling_rate"] = self._sounds(examples)
        begin = self.tokenizer.bos_token
        if begin and texts[0].startswith(begin):
            media["add_special_tokens"] = False
        return dict(self.processor(text=texts, padding=len(texts) > 1, return_tensors="pt", **media))

    def _prompt(self, example: Media) -> str:
        """One text by the processor's chat template; without one, the places of the images, then the text."""
        shown = ["image"] * len(example.images) + ["audio"] * (example.audio is not None)
        if getattr(self.processor, "chat_template", None):
            user = [{"type": kind} for kind in shown]
            answer = [{"type": "text", "text": example.text}]
            turns = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
            return self.processor.apply_chat_template(turns, tokenize=False)
        return "".join(str(getattr(self.processor, f"{kind}_token")) for kind in shown) + f"\n{example.text}"


def load_processor(given: Any, model: Any) -> Any:
    """A processor, loaded if it is a name; by default the model's own.

    Raises:
        CalibrationError: there is none, or it cannot be loaded.
    """
    revision = None
    if given is None:
        given, revision = getattr(model, "name_or_path", None), getattr(model, "pgsvd_commit", None)
    if not given:
        raise CalibrationError(
            "images and sounds need the model's processor: give it as tokenizer=... with the config or to compress()"
        )
    if not isinstance(given, (str, os.PathLike)):
        return given
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(given, **({"revision": revision} if revision else {}))
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise CalibrationError(
            f"no processor could be loaded from {str(given)!r}; give tokenizer=processor: {error}"
        ) from error


def processed(examples: Sequence[Media], model: Any, processor: Any, length: int, batch_size: int) -> Iterator[Batch]:
    """Batches of examples, each of such as have the same parts.

    Args:
        examples: in order.
        model: that they are for.
        processor: of `load_processor`.
        length: tokens that texts are cut to, but where images have a place in them.
        batch_size: examples in a batch.

    Raises:
        CalibrationError: see `Processing.batch`.
    """
    processing = Processing(model, processor, length)
    alike: dict[tuple, list[Media]] = {}
    for example in examples:
        alike.setdefault(example.parts, []).append(example)
    for group in alike.values():
        for start in range(0, len(group), batch_size):
            yield processing.batch(group[start : start + batch_size])
