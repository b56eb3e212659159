"""Which layers are compressed: by structure, family by family, and by name."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from models import FAMILIES, Family, each_family
from torch import nn
from transformers.pytorch_utils import Conv1D

from optimum_pgsvd import PGSVDCompressor, PGSVDConfig
from optimum_pgsvd.errors import ConfigError, UnsupportedModelError
from optimum_pgsvd.modeling_pgsvd import take_experts_apart
from optimum_pgsvd.targets import Targets, find_blocks, find_targets, first_match, matches


EMBEDDING, HEAD, OUTSIDE, ROUTER = "embedding", "output head", "outside the repeated blocks", "router"
FUSED = "experts, not taken apart"

LLAMA = ["model.layers.{0,1}.self_attn.{q,k,v,o}_proj", "model.layers.{0,1}.mlp.{gate,up,down}_proj"]
LLAMA_SKIPPED = {EMBEDDING: ["model.embed_tokens"], HEAD: ["lm_head"]}
LLAMA_ATTENTION = LLAMA[:1]
ATTENTION = "{q_proj,k_proj,v_proj,out_proj}"
MIXTURE_SKIPPED = {**LLAMA_SKIPPED, ROUTER: ["model.layers.{0,1}.mlp.gate"], FUSED: ["model.layers.{0,1}.mlp.experts"]}
TWO_TOWERS = [
    f"{{text,vision}}_model.encoder.layers.{{0,1}}.self_attn.{ATTENTION}",
    "{text,vision}_model.encoder.layers.{0,1}.mlp.{fc1,fc2}",
]
TOWERS_EMBEDDED = [
    "text_model.embeddings.{token,position}_embedding",
    "vision_model.embeddings.position_embedding",
]
SPEECH_OR_TEXT = [
    f"model.{{encoder,decoder}}.layers.{{0,1}}.self_attn.{ATTENTION}",
    f"model.decoder.layers.{{0,1}}.encoder_attn.{ATTENTION}",
    "model.{encoder,decoder}.layers.{0,1}.{fc1,fc2}",
]

DEEP = "model.visual.deepstack_merger_list.0"
QWEN_LANGUAGE = [name.replace("model.", "model.language_model.") for name in LLAMA]
IDEFICS = (
    "model.{vision_model.encoder,text_model}.layers.{0,1}",
    [
        f"model.vision_model.encoder.layers.{{0,1}}.self_attn.{ATTENTION}",
        "model.vision_model.encoder.layers.{0,1}.mlp.{fc1,fc2}",
        *(name.replace("model.", "model.text_model.") for name in LLAMA),
    ],
    {
        EMBEDDING: ["model.vision_model.embeddings.position_embedding", "model.text_model.embed_tokens"],
        OUTSIDE: ["model.connector.modality_projection.proj"],
        HEAD: ["lm_head"],
    },
)

# What is compressed, block by block, and what is not, by the reason. Braces stand for alternatives.
EXPECTED: dict[str, tuple[str, list[str], dict[str, list[str]]]] = {
    **dict.fromkeys(("llama", "mistral", "qwen3", "gemma", "gemma3"), ("model.layers.{0,1}", LLAMA, LLAMA_SKIPPED)),
    "gpt2": (
        "transformer.h.{0,1}",
        ["transformer.h.{0,1}.attn.{c_attn,c_proj}", "transformer.h.{0,1}.mlp.{c_fc,c_proj}"],
        {EMBEDDING: ["transformer.{wte,wpe}"], HEAD: ["lm_head"]},
    ),
    "opt": (
        "model.decoder.layers.{0,1}",
        [f"model.decoder.layers.{{0,1}}.self_attn.{ATTENTION}", "model.decoder.layers.{0,1}.{fc1,fc2}"],
        {
            EMBEDDING: ["model.decoder.{embed_tokens,embed_positions}"],
            OUTSIDE: ["model.decoder.project_{in,out}"],
            HEAD: ["lm_head"],
        },
    ),
    "bert": (
        "bert.encoder.layer.{0,1}",
        [
            "bert.encoder.layer.{0,1}.attention.{self.query,self.key,self.value,output.dense}",
            "bert.encoder.layer.{0,1}.{intermediate,output}.dense",
        ],
        {
            EMBEDDING: ["bert.embeddings.{word,position,token_type}_embeddings"],
            OUTSIDE: ["cls.predictions.transform.dense"],
            HEAD: ["cls.predictions.decoder"],
        },
    ),
    "t5": (
        "{encoder,decoder}.block.{0,1}",
        [
            "{encoder,decoder}.block.{0,1}.layer.0.SelfAttention.{q,k,v,o}",
            "decoder.block.{0,1}.layer.1.EncDecAttention.{q,k,v,o}",
            "encoder.block.{0,1}.layer.1.DenseReluDense.{wi,wo}",
            "decoder.block.{0,1}.layer.2.DenseReluDense.{wi,wo}",
        ],
        {
            EMBEDDING: [
                "shared",
                "{encoder,decoder}.embed_tokens",
                "{encoder,decoder}.block.0.layer.0.SelfAttention.relative_attention_bias",
            ],
            HEAD: ["lm_head"],
        },
    ),
    "bart": (
        "model.{encoder,decoder}.layers.{0,1}",
        SPEECH_OR_TEXT,
        {EMBEDDING: ["model.shared", "model.{encoder,decoder}.embed_{tokens,positions}"], HEAD: ["lm_head"]},
    ),
    "mixtral": ("model.layers.{0,1}", LLAMA_ATTENTION, MIXTURE_SKIPPED),
    "qwen3_moe": (
        "model.layers.{0,1}",
        [*LLAMA_ATTENTION, "model.layers.0.mlp.{gate,up,down}_proj"],
        {**LLAMA_SKIPPED, ROUTER: ["model.layers.1.mlp.gate"], FUSED: ["model.layers.1.mlp.experts"]},
    ),
    "clip": (
        "{text,vision}_model.encoder.layers.{0,1}",
        TWO_TOWERS,
        {
            EMBEDDING: TOWERS_EMBEDDED,
            OUTSIDE: ["{text,visual}_projection"],
        },
    ),
    "whisper": (
        "model.{encoder,decoder}.layers.{0,1}",
        SPEECH_OR_TEXT,
        {EMBEDDING: ["model.{encoder,decoder}.embed_positions", "model.decoder.embed_tokens"], HEAD: ["proj_out"]},
    ),
    "albert": (
        "encoder.albert_layer_groups.0",
        ["encoder.albert_layer_groups.0.albert_layers.0.{attention.{query,key,value,dense},ffn,ffn_output}"],
        {
            EMBEDDING: ["embeddings.{word,position,token_type}_embeddings"],
            OUTSIDE: ["encoder.embedding_hidden_mapping_in", "pooler"],
        },
    ),
    "llava": (
        "model.{vision_tower.encoder,language_model}.layers.{0,1}",
        [
            f"model.vision_tower.encoder.layers.{{0,1}}.self_attn.{ATTENTION}",
            "model.vision_tower.encoder.layers.{0,1}.mlp.{fc1,fc2}",
            *(name.replace("model.", "model.language_model.") for name in LLAMA),
        ],
        {
            EMBEDDING: ["model.vision_tower.embeddings.position_embedding", "model.language_model.embed_tokens"],
            OUTSIDE: ["model.multi_modal_projector.linear_{1,2}"],
            HEAD: ["lm_head"],
        },
    ),
    "deberta_v2": (
        "encoder.layer.{0,1}",
        [
            "encoder.layer.{0,1}.attention.{self.query_proj,self.key_proj,self.value_proj,output.dense}",
            "encoder.layer.{0,1}.{intermediate,output}.dense",
        ],
        {EMBEDDING: ["embeddings.{word,position}_embeddings", "encoder.rel_embeddings"]},
    ),
    "bloom": (
        "transformer.h.{0,1}",
        [
            "transformer.h.{0,1}.self_attention.{query_key_value,dense}",
            "transformer.h.{0,1}.mlp.{dense_h_to_4h,dense_4h_to_h}",
        ],
        {EMBEDDING: ["transformer.word_embeddings"], HEAD: ["lm_head"]},
    ),
    "phi3": (
        "model.layers.{0,1}",
        ["model.layers.{0,1}.self_attn.{qkv,o}_proj", "model.layers.{0,1}.mlp.{gate_up,down}_proj"],
        LLAMA_SKIPPED,
    ),
    "gpt_oss": (
        "model.layers.{0,1}",
        LLAMA_ATTENTION,
        {**MIXTURE_SKIPPED, ROUTER: ["model.layers.{0,1}.mlp.router"]},
    ),
    "siglip": (
        "{text,vision}_model.encoder.layers.{0,1}",
        TWO_TOWERS,
        {
            EMBEDDING: TOWERS_EMBEDDED,
            OUTSIDE: ["text_model.head", "vision_model.head.mlp.{fc1,fc2}"],
            "inside nn.MultiheadAttention": ["vision_model.head.attention.out_proj"],
        },
    ),
    "qwen2_5_vl": (
        "model.{visual.blocks,language_model.layers}.{0,1}",
        ["model.visual.blocks.{0,1}.{attn.{qkv,proj},mlp.{gate,up,down}_proj}", *QWEN_LANGUAGE],
        {
            EMBEDDING: ["model.language_model.embed_tokens"],
            OUTSIDE: ["model.visual.merger.mlp.{0,2}"],
            HEAD: ["lm_head"],
        },
    ),
    "qwen3_vl": (
        f"{{model.{{visual.blocks,language_model.layers}}.{{0,1}},{DEEP}}}",
        ["model.visual.blocks.{0,1}.{attn.{qkv,proj},mlp.linear_fc{1,2}}", f"{DEEP}.linear_fc{{1,2}}", *QWEN_LANGUAGE],
        {
            EMBEDDING: ["model.visual.pos_embed", "model.language_model.embed_tokens"],
            OUTSIDE: ["model.visual.merger.linear_fc{1,2}"],
            HEAD: ["lm_head"],
        },
    ),
    "idefics3": IDEFICS,
    "smolvlm": IDEFICS,
    "blip": (
        "{vision_model.encoder.layers,text_decoder.bert.encoder.layer}.{0,1}",
        [
            "vision_model.encoder.layers.{0,1}.{self_attn.{qkv,projection},mlp.{fc1,fc2}}",
            "text_decoder.bert.encoder.layer.{0,1}.{attention,crossattention}.{self.{query,key,value},output.dense}",
            "text_decoder.bert.encoder.layer.{0,1}.{intermediate,output}.dense",
        ],
        {
            EMBEDDING: ["text_decoder.bert.embeddings.{word,position}_embeddings"],
            OUTSIDE: ["text_decoder.cls.predictions.transform.dense"],
            HEAD: ["text_decoder.cls.predictions.decoder"],
        },
    ),
}


def expand(pattern: str) -> list[str]:
    """Every reading of a pattern with alternatives in braces."""
    inner = re.search(r"\{([^{}]*)\}", pattern)
    if inner is None:
        return [pattern]
    readings = (pattern[: inner.start()] + choice + pattern[inner.end() :] for choice in inner[1].split(","))
    return list(itertools.chain.from_iterable(expand(reading) for reading in readings))


def expand_all(patterns: list[str]) -> set[str]:
    return set(itertools.chain.from_iterable(expand(pattern) for pattern in patterns))


def config(**fields) -> PGSVDConfig:
    return PGSVDConfig(**{"tolerance": 0.5} | fields)


def targets_of(model: nn.Module, **fields) -> Targets:
    return find_targets(model, config(**fields))


# By structure


def test_every_family_is_expected() -> None:
    assert set(EXPECTED) == set(FAMILIES)


@each_family
def test_targets(family: Family) -> None:
    blocks, names, _ = EXPECTED[family.name]
    targets = targets_of(family.build())
    assert set(targets.blocks) == expand_all([blocks])
    assert set(targets.names) == expand_all(names)


@each_family
def test_skipped_with_reasons(family: Family) -> None:
    _, _, skipped = EXPECTED[family.name]
    expected = {name: reason for reason, patterns in skipped.items() for name in expand_all(patterns)}
    assert targets_of(family.build()).skipped == expected


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_taken_apart_are_targets(name: str) -> None:
    model = FAMILIES[name].build()
    fused = take_experts_apart(model)
    targets = targets_of(model)
    assert FUSED not in targets.skipped.values()
    for experts, module in fused.items():
        inside = [target for target in targets.names if target.startswith(f"{experts}.")]
        assert inside == [
            f"{experts}.{i}.{kind}" for i in range(len(module.down_proj)) for kind in ("gate_up", "down")
        ]


@each_family
def test_nothing_is_forgotten(family: Family) -> None:
    model = family.build()
    targets = targets_of(model)
    tables = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D, nn.Embedding))}
    assert tables <= {*targets.names, *targets.skipped}
    assert not set(targets.names) & set(targets.skipped)


@each_family
def test_model_order(family: Family) -> None:
    model = family.build()
    targets = targets_of(model)
    order = [name for name, _ in model.named_modules()]
    assert list(targets.names) == sorted(targets.names, key=order.index)
    assert list(targets.blocks) == sorted(targets.blocks, key=order.index)


@each_family
def test_shapes_are_those_of_the_function(family: Family) -> None:
    model = family.build()
    for target in targets_of(model).found:
        outputs = model.get_submodule(target.name)(torch.zeros(1, target.shape.in_features))
        assert outputs.shape == (1, target.shape.out_features)


@each_family
def test_each_target_knows_its_block(family: Family) -> None:
    for target in targets_of(family.build()).found:
        assert target.block in expand(EXPECTED[family.name][0])
        assert target.name.startswith(f"{target.block}.")


def test_the_same_on_the_meta_device() -> None:
    model = FAMILIES["t5"].build()
    assert targets_of(model.to("meta")) == targets_of(FAMILIES["t5"].build())


class Block(nn.Module):
    """A block with one ordinary linear and whatever a test adds."""

    def __init__(self, **children: nn.Module):
        super().__init__()
        self.dense = nn.Linear(8, 8)
        for name, child in children.items():
            setattr(self, name, child)


def stack_of(*blocks: nn.Module) -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList(blocks)
    return model


class Named(nn.Linear):
    """A linear with a life of its own."""


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Pairing(nn.Linear):
    def forward(self, x, y):
        return super().forward(x + y)


class TopKRouter(nn.Module):
    """A router of several layers, known by its class."""

    def __init__(self):
        super().__init__()
        self.down, self.out = nn.Linear(8, 5), nn.Linear(5, 6)


def gating(rows: int) -> nn.Module:
    module = nn.Module()
    module.layer, module.norm = nn.Linear(8, rows), nn.LayerNorm(8)
    return module


def shared_expert(rows: int) -> nn.Module:
    """With as many inner features as there are experts, as in some real models."""
    return nn.Sequential(nn.Linear(8, rows), nn.Linear(rows, 8))


EXPERTS = {
    "list": lambda: nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)) for _ in range(4)),
    "dict": lambda: nn.ModuleDict({str(i): nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)) for i in range(4)}),
    "bare": lambda: nn.ModuleList(nn.Linear(8, 8) for _ in range(4)),
}
CHOOSERS = {
    "linear": (lambda: nn.Linear(8, 4), ["mlp.gate"]),
    "with a norm": (lambda: gating(4), ["mlp.gate.layer"]),
    "router": (lambda: TopKRouter(), ["mlp.gate.down", "mlp.gate.out"]),
    "no router": (lambda: gating(5), []),
}


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("chooser", CHOOSERS)
def test_routers_stay_dense(chooser: str, experts: str) -> None:
    make, routers = CHOOSERS[chooser]
    mixture = nn.Module()
    mixture.gate, mixture.shared, mixture.experts = make(), shared_expert(4), EXPERTS[experts]()
    model = stack_of(Block(mlp=mixture), Block())
    targets = targets_of(model)
    assert targets.skipped == {f"layers.0.{name}": ROUTER for name in routers}
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert set(targets.names) == linears - set(targets.skipped)


def test_a_layer_with_as_many_outputs_is_no_router_without_experts() -> None:
    assert "layers.0.gate" in targets_of(stack_of(Block(gate=nn.Linear(8, 4)))).names


def test_tied_weight() -> None:
    shared = nn.Linear(8, 8)
    tied = nn.Linear(8, 8)
    tied.weight = shared.weight
    targets = targets_of(stack_of(Block(proj=shared), Block(proj=tied)))
    assert targets.skipped == {"layers.0.proj": "tied weight", "layers.1.proj": "tied weight"}
    assert targets.names == ("layers.0.dense", "layers.1.dense")


def test_one_module_in_two_places_is_tied() -> None:
    shared = nn.Linear(8, 8)
    targets = targets_of(stack_of(Block(proj=shared), Block(proj=shared)))
    assert targets.skipped == {"layers.0.proj": "tied weight"}
    assert targets.names == ("layers.0.dense", "layers.1.dense")


def test_subclass_of_linear() -> None:
    """One that computes what a Linear does is a target; one that does more, or wants other inputs, is not."""
    assert "layers.0.proj" in targets_of(stack_of(Block(proj=Named(8, 8)))).names
    for more in (Doubling, Pairing):
        targets = targets_of(stack_of(Block(proj=more(8, 8))))
        reason = f"{more.__name__}, a subclass of Linear that does more than a linear"
        assert targets.skipped == {"layers.0.proj": reason}
    assert targets.names == ("layers.0.dense",)


def test_multihead_attention() -> None:
    targets = targets_of(stack_of(Block(attn=nn.MultiheadAttention(8, 2))))
    assert targets.skipped == {"layers.0.attn.out_proj": "inside nn.MultiheadAttention"}
    assert targets.names == ("layers.0.dense",)


def test_a_list_of_heads_is_no_stack_of_blocks() -> None:
    model = stack_of(Block())
    model.heads = nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 3)])
    assert find_blocks(model) == ("layers.0",)
    assert targets_of(model).skipped == {"heads.0": OUTSIDE, "heads.1": OUTSIDE}


def test_blocks_without_linears_are_passed_over() -> None:
    model = stack_of(nn.LayerNorm(8), Block(), nn.Identity(), Block())
    assert find_blocks(model) == ("layers.1", "layers.3")


def test_block_1_is_not_block_11() -> None:
    found = targets_of(stack_of(*(Block() for _ in range(12)))).found
    assert [target.block for target in found] == [f"layers.{i}" for i in range(12)]


def test_outermost_lists_are_the_blocks() -> None:
    stage = nn.Module()
    stage.blocks = nn.ModuleList([Block(), Block()])
    model = stack_of(stage, Block())
    assert find_blocks(model) == ("layers.0", "layers.1")
    assert [target.block for target in targets_of(model).found] == ["layers.0", "layers.0", "layers.1"]


# By name

GLOBS = {
    "q_proj": ["model.layers.{0,1}.self_attn.q_proj"],
    "self_attn": LLAMA_ATTENTION,
    "self_attn.q_proj": ["model.layers.{0,1}.self_attn.q_proj"],
    "model.layers.1": ["model.layers.1.{self_attn.{q,k,v,o}_proj,mlp.{gate,up,down}_proj}"],
    "layers.1.mlp": ["model.layers.1.mlp.{gate,up,down}_proj"],
    "model.layers.0.mlp.up_proj": ["model.layers.0.mlp.up_proj"],
    "*.mlp.*": ["model.layers.{0,1}.mlp.{gate,up,down}_proj"],
    "?_proj": LLAMA_ATTENTION,
    "[qk]_proj": ["model.layers.{0,1}.self_attn.{q,k}_proj"],
    "layers.*.down_proj": ["model.layers.{0,1}.mlp.down_proj"],
    "model.layers.0.*": ["model.layers.0.{self_attn.{q,k,v,o}_proj,mlp.{gate,up,down}_proj}"],
}


@pytest.mark.parametrize(("glob", "named"), GLOBS.items(), ids=GLOBS)
def test_modules_to_not_convert(glob: str, named: list[str]) -> None:
    targets = targets_of(FAMILIES["llama"].build(), modules_to_not_convert=[glob])
    assert set(targets.names) == expand_all(LLAMA) - expand_all(named)
    reasons = dict.fromkeys(expand_all(named), f"modules_to_not_convert: {glob}")
    assert targets.skipped == reasons | {"model.embed_tokens": EMBEDDING, "lm_head": HEAD}


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("model.layers.11.mlp", "layers.1"),
        ("model.layers.1.mlp", "ayers.1"),
        ("model.layers.1.my_mlp", "mlp"),
        ("model.layers.1.my_mlp", "ml?"),
        ("model.layers.1.mlp.up_proj", "*.mlp"),
        ("model.layers.1.mlp", "MLP"),
        ("modelXlayers", "model.layers"),
    ],
)
def test_no_match(name: str, pattern: str) -> None:
    assert not matches(name, pattern)


def test_first_match_is_the_first_pattern() -> None:
    assert first_match("a.b", ["c", "*", "b"]) == "*"
    assert first_match("a.b", ["c"]) is None


@pytest.mark.parametrize("harmless", ["lm_head", "embed_tokens", "model.embed_tokens"])
def test_what_is_dense_anyway_may_be_named(harmless: str) -> None:
    targets = targets_of(FAMILIES["llama"].build(), modules_to_not_convert=[harmless])
    assert targets == targets_of(FAMILIES["llama"].build())


def test_routers_and_experts_may_be_named() -> None:
    fields = {"modules_to_not_convert": ["mlp.gate", "experts"]}
    assert targets_of(FAMILIES["mixtral"].build(), **fields) == targets_of(FAMILIES["mixtral"].build())


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("modules_to_not_convert", {"modules_to_not_convert": ["q_proj", "query"]}),
        ("ranks", {"tolerance": None, "ranks": {"q_proj": 4, "query": 4}}),
        ("groups", {"groups": {"q_proj": {"tolerance": 0.1}, "query": {"tolerance": 0.1}}}),
    ],
)
def test_a_pattern_that_matches_nothing(field: str, fields: dict) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: 'query' matches no linear layer; the first are model.layers.0"):
        targets_of(FAMILIES["llama"].build(), **fields)


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("lm_head", "lm_head stays dense: output head"),
        ("embed_tokens", "model.embed_tokens stays dense: embedding"),
        ("up_proj", "model.layers.0.mlp.up_proj stays dense: modules_to_not_convert: mlp"),
    ],
)
def test_ranks_for_what_stays_dense(pattern: str, why: str) -> None:
    fields = {"tolerance": None, "ranks": {pattern: 4}, "modules_to_not_convert": ["mlp"]}
    with pytest.raises(ConfigError, match=f"^ranks: '{pattern}' matches no linear layer; {why};"):
        targets_of(FAMILIES["llama"].build(), **fields)


OUTSIDE_LAYERS = {
    "bert": ("transform.dense", ["cls.predictions.transform.dense"]),
    "albert": ("pooler", ["pooler"]),
    "llava": ("multi_modal_projector", ["model.multi_modal_projector.linear_{1,2}"]),
    "clip": ("*_projection", ["{text,visual}_projection"]),
    "opt": ("project_in", ["model.decoder.project_in"]),
}


@pytest.mark.parametrize("kind", ["ranks", "groups"])
@pytest.mark.parametrize("name", OUTSIDE_LAYERS)
def test_layers_outside_the_blocks_by_name(name: str, kind: str) -> None:
    glob, named = OUTSIDE_LAYERS[name]
    fields = {"tolerance": None, "ranks": {glob: 4}} if kind == "ranks" else {"groups": {glob: {"tolerance": 0.1}}}
    model = FAMILIES[name].build()
    targets, usual = targets_of(model, **fields), targets_of(model)
    assert {target.name for target in targets.found if target.block is None} == expand_all(named)
    assert set(targets.names) == set(usual.names) | expand_all(named)
    assert targets.skipped == {key: why for key, why in usual.skipped.items() if key not in expand_all(named)}
    assert targets.blocks == usual.blocks


# Refusals


def test_nothing_to_compress() -> None:
    with pytest.raises(UnsupportedModelError, match="^Module has no linear layer to compress: no linear layer at all"):
        targets_of(stack_of(nn.LayerNorm(8)))


def test_everything_excluded() -> None:
    why = "^LlamaForCausalLM has no linear layer to compress: model.embed_tokens: embedding; model.layers.0"
    with pytest.raises(UnsupportedModelError, match=why):
        targets_of(FAMILIES["llama"].build(), modules_to_not_convert=["layers"])


def test_compressed_models_are_refused() -> None:
    model = FAMILIES["llama"].build()
    PGSVDCompressor(config(tolerance=None, ranks={"q_proj": 4}, solver="svd")).compress(model)
    with pytest.raises(UnsupportedModelError, match="compressed already; compress the dense model, or model.dequant"):
        targets_of(model)


def test_dequantized_models_are_taken() -> None:
    model = FAMILIES["llama"].build()
    expected = targets_of(model)
    PGSVDCompressor(config(tolerance=None, ranks={"q_proj": 4}, solver="svd")).compress(model)
    assert targets_of(model.dequantize()) == expected


def test_models_quantized_otherwise_are_refused() -> None:
    model = FAMILIES["llama"].build()
    model.is_quantized, model.quantization_method = True, "bitsandbytes"
    with pytest.raises(UnsupportedModelError, match="quantized with bitsandbytes; compress it with PGSVD first"):
        targets_of(model)
