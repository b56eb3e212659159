"""Processors for the tiny models of `models.py`, made from scratch: one token a word, and no file from the Hub."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import transformers as hf
from models import END, FAMILIES, IMAGE_TOKEN, PAD, VOCABULARY
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil


SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
FIRST_WORD, WORDS = IMAGE_TOKEN + 1, 80
SQUARE = {"height": 16, "width": 16}

# What a user shows, then what the model says of it.
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} : {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE {% else %}{{ part['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
)


def media_tokenizer(image: str = "<image>", others: tuple[str, ...] = (), **options: Any) -> PreTrainedTokenizerFast:
    """One token a word, `w0` … `w79`, `<s>` before and `</s>` behind every text; and special tokens.

    Args:
        image: the token of an image.
        others: special tokens, numbered downwards from the last.
        options: of the tokenizer.
    """
    words = [*SPECIAL.values(), "user", image, *(f"w{i}" for i in range(WORDS)), "assistant", ":"]
    words += [f"<unused{i}>" for i in range(VOCABULARY - len(others) - len(words))] + [*reversed(others)]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", END)]
    )
    added = [image, *others]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=64, **SPECIAL, additional_special_tokens=added, **options
    )


class WithoutVideos:
    """A processor's class whose part for videos is left out: it needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        if "video" not in argument_name:
            return super().check_argument_for_proper_class(argument_name, argument)  # type: ignore[misc]
        return None


class Qwen25(WithoutVideos, hf.Qwen2_5_VLProcessor):
    pass


class Qwen3(WithoutVideos, hf.Qwen3VLProcessor):
    pass


class SmolVLM(WithoutVideos, hf.SmolVLMProcessor):
    pass


def clip_processor() -> Any:
    return hf.CLIPProcessor(CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=SQUARE), media_tokenizer())


def siglip_processor() -> Any:
    tokenizer = media_tokenizer(model_input_names=["input_ids"])
    return hf.SiglipProcessor(SiglipImageProcessorPil(size=SQUARE), tokenizer)


def llava_processor() -> Any:
    return hf.LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=SQUARE),
        media_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )


def qwen_processor(kind: type) -> Any:
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": 256, "longest_edge": 256}, patch_size=4)
    tokens = ("<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    template = TEMPLATE.replace("IMAGE", "<|vision_start|> <|image_pad|> <|vision_end|>")
    return kind(images, media_tokenizer("<|image_pad|>", tokens), None, chat_template=template)


def idefics_tokens() -> PreTrainedTokenizerFast:
    return media_tokenizer(others=("<fake_token_around_image>", "<global-img>", "<end_of_utterance>"))


def idefics_options() -> dict[str, Any]:
    edge = {"longest_edge": 16}
    return {"size": edge, "max_image_size": edge, "do_image_splitting": False}


def idefics_processor() -> Any:
    images = Idefics3ImageProcessorPil(**idefics_options())
    template = TEMPLATE.replace("IMAGE", "<image>")
    return hf.Idefics3Processor(images, idefics_tokens(), image_seq_len=4, chat_template=template)


def smolvlm_processor() -> Any:
    images = SmolVLMImageProcessorPil(**idefics_options())
    template = TEMPLATE.replace("IMAGE", "<image>")
    videos = SimpleNamespace(num_frames=1, fps=1, size={"longest_edge": 16})
    return SmolVLM(images, idefics_tokens(), videos, image_seq_len=4, chat_template=template)


def blip_processor() -> Any:
    return hf.BlipProcessor(BlipImageProcessorPil(size=SQUARE), media_tokenizer())


def whisper_processor() -> Any:
    """60 frames of 8 features, in one second."""
    return hf.WhisperProcessor(hf.WhisperFeatureExtractor(8, chunk_length=1, hop_length=266), media_tokenizer())


PROCESSORS: dict[str, Callable[[], Any]] = {
    "clip": clip_processor,
    "siglip": siglip_processor,
    "llava": llava_processor,
    "qwen2_5_vl": lambda: qwen_processor(Qwen25),
    "qwen3_vl": lambda: qwen_processor(Qwen3),
    "idefics3": idefics_processor,
    "smolvlm": smolvlm_processor,
    "blip": blip_processor,
    "whisper": whisper_processor,
}


def picture(number: int, size: tuple[int, int] = (20, 16)) -> Image.Image:
    """Noise, the same for the same number; `size` is width and height."""
    noise = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def sound(number: int, seconds: float = 0.5) -> np.ndarray:
    return np.random.default_rng(number).standard_normal(int(16000 * seconds)).astype(np.float32)


def caption(number: int) -> str:
    """Five words or six, that begin with the number's."""
    return " ".join(f"w{(number + 7 * j) % WORDS}" for j in range(5 + number % 2))


def tokens_of(number: int) -> list[int]:
    return [FIRST_WORD + int(word[1:]) for word in caption(number).split()]


def example(family: str, number: int) -> dict[str, Any]:
    media = {"audio": sound(number)} if family == "whisper" else {"image": picture(number)}
    return media | {"text": caption(number)}


assert set(PROCESSORS) <= set(FAMILIES)
assert PAD == 0
