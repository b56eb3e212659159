"""Tiny models of many architectures and inputs for them: what every test of the model's structure runs on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Generator, Tensor, nn

from optimum_pgsvd.modeling_pgsvd import is_fused


Batch = dict[str, Tensor]

VOCABULARY = 100
PAD, BEGIN, END = 0, 1, 2
IMAGE_TOKEN = 5
SPECIAL = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": BEGIN, "eos_token_id": END}
# Sliding windows are shorter than the sequences, so that the two kinds of mask differ.
SEQUENCES, TOKENS, TARGET_TOKENS, WINDOW = 4, 20, 10, 8


@dataclass(frozen=True)
class Family:
    """One architecture.

    Args:
        name: in test ids.
        model_class: to build.
        config: makes its configuration.
        inputs: draws one batch.
    """

    name: str
    model_class: type[hf.PreTrainedModel]
    config: Callable[[], hf.PreTrainedConfig]
    inputs: Callable[[Generator], Batch]

    def build(self, seed: int = 0, **changes: Any) -> hf.PreTrainedModel:
        """A model in evaluation mode; `changes` are made to its config."""
        config = self.config()
        for key, value in changes.items():
            setattr(config, key, value)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.model_class(config)
        scramble(model, generator(seed))
        return model.eval()

    @property
    def uncut(self) -> list[str]:
        """Modules that an elastic checkpoint has to leave dense."""
        return ["experts"] if any(is_fused(module) for module in self.build().modules()) else []

    def batches(self, count: int, seed: int = 0) -> list[Batch]:
        """Batches of model inputs without padding."""
        source = generator(seed)
        return [self.inputs(source) for _ in range(count)]


def generator(seed: int) -> Generator:
    return Generator().manual_seed(seed)


@torch.no_grad()
def scramble(model: nn.Module, source: Generator) -> None:
    """Make every parameter count: initialised ones are so small, or so equal, that many mistakes would not show."""
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=source)
        parameter.copy_(noise * 0.2 if parameter.dim() > 1 else parameter + noise * 0.1)


def token_ids(source: Generator, rows: int = SEQUENCES, columns: int = TOKENS) -> Tensor:
    """Ordinary tokens, no special ones among them."""
    return torch.randint(IMAGE_TOKEN + 1, VOCABULARY, (rows, columns), generator=source)


# Inputs


def text_inputs(source: Generator) -> Batch:
    return {"input_ids": token_ids(source)}


def text_to_text_inputs(source: Generator) -> Batch:
    return {"input_ids": token_ids(source), "decoder_input_ids": token_ids(source, columns=TARGET_TOKENS)}


def images(source: Generator, count: int = SEQUENCES) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=source)


def clip_inputs(source: Generator) -> Batch:
    return text_inputs(source) | {"pixel_values": images(source)}


def llava_inputs(source: Generator) -> Batch:
    ids = token_ids(source)
    ids[:, 1:5] = IMAGE_TOKEN
    return {"input_ids": ids, "pixel_values": images(source)}


def qwen_vl_inputs(source: Generator) -> Batch:
    """Four patches of an image become one token; they come in one row for all images."""
    ids = token_ids(source)
    ids[:, 1:5] = IMAGE_TOKEN
    patches = torch.randn(SEQUENCES * 16, 3 * 2 * 4 * 4, generator=source)
    grid = torch.tensor([[1, 4, 4]] * SEQUENCES)
    kinds = (ids == IMAGE_TOKEN).long()
    return {"input_ids": ids, "pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": kinds}


def idefics_inputs(source: Generator) -> Batch:
    ids = token_ids(source)
    ids[:, 1:5] = IMAGE_TOKEN
    seen = torch.ones(SEQUENCES, 1, 16, 16, dtype=torch.long)
    return {"input_ids": ids, "pixel_values": images(source)[:, None], "pixel_attention_mask": seen}


def whisper_inputs(source: Generator) -> Batch:
    features = torch.randn(SEQUENCES, 8, 60, generator=source)
    return {"input_features": features, "decoder_input_ids": token_ids(source, columns=TARGET_TOKENS)}


# Configurations

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
POSITIONS = {"max_position_embeddings": 64}
GROUPED = SPECIAL | SIZES | POSITIONS | {"num_key_value_heads": 2, "head_dim": 8}
GPT = SPECIAL | {"n_layer": 2, "n_head": 4}
ENCODER_DECODER = {
    "d_model": 32,
    "decoder_start_token_id": BEGIN,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
VISION = SIZES | {"image_size": 16, "patch_size": 8, "projection_dim": 16}
EXPERTS = {"num_experts_per_tok": 2}


def text_family(name: str, model_class: type, config_class: type, **config: Any) -> Family:
    return Family(name, model_class, lambda: config_class(**config), text_inputs)


def clip_config() -> hf.PreTrainedConfig:
    text = SPECIAL | SIZES | POSITIONS | {"projection_dim": 16}
    return hf.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)


def llava_config() -> hf.PreTrainedConfig:
    return hf.LlavaConfig(
        text_config=hf.LlamaConfig(**GROUPED),
        vision_config=hf.CLIPVisionConfig(**VISION),
        image_token_index=IMAGE_TOKEN,
        pad_token_id=PAD,
    )


def siglip_config() -> hf.PreTrainedConfig:
    text = SPECIAL | SIZES | {"max_position_embeddings": TOKENS, "projection_size": 32}
    return hf.SiglipConfig(text_config=text, vision_config=VISION)


QWEN_TEXT = {key: value for key, value in GROUPED.items() if key != "head_dim"} | {
    "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 4,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 32,
}
QWEN_TOKENS = {"image_token_id": IMAGE_TOKEN, "video_token_id": 99, "vision_start_token_id": 98}


def qwen2_5_vl_config() -> hf.PreTrainedConfig:
    vision = QWEN_VISION | {"window_size": 16, "fullatt_block_indexes": [1]}
    return hf.Qwen2_5_VLConfig(text_config=QWEN_TEXT, vision_config=vision, pad_token_id=PAD, **QWEN_TOKENS)


def qwen3_vl_config() -> hf.PreTrainedConfig:
    vision = QWEN_VISION | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return hf.Qwen3VLConfig(text_config=QWEN_TEXT | {"head_dim": 8}, vision_config=vision, **QWEN_TOKENS)


def idefics_config(config_class: type) -> hf.PreTrainedConfig:
    return config_class(
        text_config=hf.LlamaConfig(**GROUPED),
        vision_config=SIZES | {"image_size": 16, "patch_size": 4},
        scale_factor=2,
        image_token_id=IMAGE_TOKEN,
        pad_token_id=PAD,
    )


def blip_config() -> hf.PreTrainedConfig:
    text = SPECIAL | SIZES | POSITIONS | {"projection_dim": 16, "encoder_hidden_size": 32, "sep_token_id": END}
    return hf.BlipConfig(text_config=text, vision_config=VISION, projection_dim=16)


def whisper_config() -> hf.PreTrainedConfig:
    sizes = {"num_mel_bins": 8, "max_source_positions": 30, "max_target_positions": 30}
    return hf.WhisperConfig(**SPECIAL, **ENCODER_DECODER, **sizes)


def t5_config() -> hf.PreTrainedConfig:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return hf.T5Config(**SPECIAL, **sizes, decoder_start_token_id=PAD)


def bart_config() -> hf.PreTrainedConfig:
    return hf.BartConfig(**SPECIAL, **ENCODER_DECODER, **POSITIONS, forced_eos_token_id=None)


ALL = (
    text_family("llama", hf.LlamaForCausalLM, hf.LlamaConfig, **GROUPED),
    text_family("mistral", hf.MistralForCausalLM, hf.MistralConfig, **GROUPED, sliding_window=WINDOW),
    text_family("qwen3", hf.Qwen3ForCausalLM, hf.Qwen3Config, **GROUPED),
    text_family("gemma", hf.GemmaForCausalLM, hf.GemmaConfig, **GROUPED),
    text_family(
        "gemma3",
        hf.Gemma3ForCausalLM,
        hf.Gemma3TextConfig,
        **GROUPED,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
    ),
    text_family("gpt2", hf.GPT2LMHeadModel, hf.GPT2Config, **GPT, n_embd=32, n_positions=64),
    text_family(
        "opt",
        hf.OPTForCausalLM,
        hf.OPTConfig,
        **SPECIAL,
        **POSITIONS,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=16,
    ),
    text_family("bert", hf.BertForMaskedLM, hf.BertConfig, **SPECIAL, **SIZES, **POSITIONS),
    Family("t5", hf.T5ForConditionalGeneration, t5_config, text_to_text_inputs),
    Family("bart", hf.BartForConditionalGeneration, bart_config, text_to_text_inputs),
    text_family("mixtral", hf.MixtralForCausalLM, hf.MixtralConfig, **GROUPED, **EXPERTS, num_local_experts=4),
    text_family(
        "qwen3_moe",
        hf.Qwen3MoeForCausalLM,
        hf.Qwen3MoeConfig,
        **GROUPED,
        **EXPERTS,
        num_experts=4,
        moe_intermediate_size=16,
        mlp_only_layers=[0],
    ),
    Family("clip", hf.CLIPModel, clip_config, clip_inputs),
    Family("whisper", hf.WhisperForConditionalGeneration, whisper_config, whisper_inputs),
    text_family("albert", hf.AlbertModel, hf.AlbertConfig, **SPECIAL, **SIZES, **POSITIONS, embedding_size=16),
    Family("llava", hf.LlavaForConditionalGeneration, llava_config, llava_inputs),
    text_family(
        "deberta_v2",
        hf.DebertaV2Model,
        hf.DebertaV2Config,
        **SPECIAL,
        **SIZES,
        **POSITIONS,
        relative_attention=True,
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
    ),
    text_family("bloom", hf.BloomForCausalLM, hf.BloomConfig, **GPT, hidden_size=32),
    text_family("phi3", hf.Phi3ForCausalLM, hf.Phi3Config, **GROUPED),
    text_family(
        "gpt_oss",
        hf.GptOssForCausalLM,
        hf.GptOssConfig,
        **GROUPED,
        **EXPERTS,
        num_local_experts=4,
        sliding_window=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    Family("siglip", hf.SiglipModel, siglip_config, clip_inputs),
    Family("qwen2_5_vl", hf.Qwen2_5_VLForConditionalGeneration, qwen2_5_vl_config, qwen_vl_inputs),
    Family("qwen3_vl", hf.Qwen3VLForConditionalGeneration, qwen3_vl_config, qwen_vl_inputs),
    Family("idefics3", hf.Idefics3ForConditionalGeneration, lambda: idefics_config(hf.Idefics3Config), idefics_inputs),
    Family("smolvlm", hf.SmolVLMForConditionalGeneration, lambda: idefics_config(hf.SmolVLMConfig), idefics_inputs),
    Family("blip", hf.BlipForConditionalGeneration, blip_config, clip_inputs),
)

FAMILIES = {family.name: family for family in ALL}

# Each with a way of its own: blocks that are handed no mask, a head of two layers, no cache of keys and values.
ODD = {
    "rwkv": text_family(
        "rwkv",
        hf.RwkvForCausalLM,
        hf.RwkvConfig,
        **SPECIAL,
        hidden_size=32,
        attention_hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
    ),
    "bert_decoder": text_family(
        "bert_decoder", hf.BertLMHeadModel, hf.BertConfig, **SPECIAL, **SIZES, **POSITIONS, is_decoder=True
    ),
    "openai_gpt": text_family(
        "openai_gpt", hf.OpenAIGPTLMHeadModel, hf.OpenAIGPTConfig, **GPT, n_embd=32, n_positions=64
    ),
}

each_family = pytest.mark.parametrize("family", ALL, ids=list(FAMILIES))
