"""The model card of a compressed checkpoint: the Hub's metadata, what was done, measured numbers only."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.utils import HFValidationError, validate_repo_id

from .report import CompressionReport


# A card that holds this line is ours to rewrite; one without it is its author's.
MARKER = "<!-- Written by optimum-pgsvd. Remove this line to keep your edits when the model is saved again. -->"
CARD_NAME = "README.md"

PIPELINE_TAGS = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForSpeechSeq2Seq": "automatic-speech-recognition",
    "ForImageClassification": "image-classification",
    "CLIPModel": "zero-shot-image-classification",
}


def model_card(model: Any, report: CompressionReport, name: str = "path/or/user/name") -> ModelCard:
    """The card of a compressed model.

    Args:
        model: the compressed model, asked for its class and for the name of the model it came from.
        report: of its compression.
        name: shown in the loading example.

    Returns:
        The card; its metadata names the base model only where that is a name on the Hub.
    """
    base = report.base_model
    pipeline = next((tag for end, tag in PIPELINE_TAGS.items() if type(model).__name__.endswith(end)), None)
    data = ModelCardData(
        library_name="transformers",
        base_model=base,
        base_model_relation="quantized" if base else None,
        pipeline_tag=pipeline,
        tags=["pgsvd", "low-rank", "compressed", *(model.model_tags or [])],
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{MARKER}\n\n{body(model, report, name, base)}")


def base_model(model: Any) -> str | None:
    """Name on the Hub of the model that was compressed; a local path is nobody else's business.

    A name without a user, as in `"gpt2"`, could be a folder that is gone, so that it counts only if the Hub's cache
    knows it.
    """
    name = str(getattr(model, "name_or_path", "") or "")
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    known = "/" in name or isinstance(try_to_load_from_cache(name, "config.json"), str)
    return name if known and not os.path.exists(name) else None


def body(model: Any, report: CompressionReport, name: str, base: str | None) -> str:
    """The text of the card."""
    config = report.config
    source = f"[{base}](https://huggingface.co/{base})" if base else f"A `{type(model).__name__}`"
    before, after = report.model_before, report.model_after
    version = report.environment.get("optimum_pgsvd", "")
    factored = sum(layer.rank is not None for layer in report.layers)
    errors = [layer.activation_error for layer in report.layers if layer.activation_error]
    fitted = "outputs" if config.get("calibration") != "anchored" else "fit to their anchored outputs"
    if any(layer.refined is not None for layer in report.layers):
        fitted += ", before refinement"
    measured = (
        f"| mean relative error of the factored layers' {fitted} | | {sum(errors) / len(errors):.4f} |\n"
        if errors
        else ""
    )
    return f"""# {source} compressed with PGSVD

{factored} of {len(report.layers)} attention and MLP linear layers are replaced by {stored_as(config)};
{len(report.layers) - factored} were left dense. Made with
[optimum-pgsvd](https://pypi.org/project/optimum-pgsvd/) {version}: {request(config)},
solver `{config["solver"]}`, {calibration(report)}.

| | before | after |
|---|---:|---:|
| parameters of the target layers | {report.parameters_before:,} | {report.parameters_after:,} |
| parameters of the model | {before.parameters:,} | {after.parameters:,} |
| bytes of the weights | {before.bytes:,} | {after.bytes:,} |
{measured}
Rank and error of every layer: `pgsvd_report.json`. Accuracy on any task was not measured by this card.

## Use

```python
# pip install optimum-pgsvd
from transformers import {auto_class(model)}

model = {auto_class(model)}.from_pretrained("{name}")
```

The package need not be imported, only installed. {self_contained(config)}

Method: R. Solgi et al., "Activation-Informed Pareto-Guided Low-Rank Compression for Efficient LLM/VLM",
arXiv 2510.05544.
"""


def stored_as(config: Mapping[str, Any]) -> str:
    """What takes the place of a layer."""
    if config.get("storage") == "pivoted":
        return "some rows of their weights and\nwhat makes the other rows of those (`storage = pivoted`)"
    return "two smaller ones, `left(right(x))`"


def request(config: Mapping[str, Any]) -> str:
    """The budget and how it was shared out."""
    if config.get("ranks") is not None:
        return "ranks given layer by layer"
    key = "parameter_reduction" if config.get("parameter_reduction") is not None else "tolerance"
    groups = ", with budgets of their own for some layers" if config.get("groups") else ""
    return f"`{key} = {config[key]}`{groups}, allocation `{config['allocation']}`"


def calibration(report: CompressionReport) -> str:
    """What the factors were fitted on."""
    tokens = report.calibration.get("tokens", 0)
    return f"calibrated on {tokens:,} tokens of `{report.config.get('dataset')}`" if tokens else "without calibration"


def auto_class(model: Any) -> str:
    """The auto class that loads this model."""
    from .modeling_pgsvd import auto_classes

    known = auto_classes(model.config.model_type)
    return next((auto for auto, classes in known.items() if type(model).__name__ in classes), "AutoModel")


def self_contained(config: Any) -> str:
    """How to load without the package."""
    if config.get("self_contained"):
        return "Without it, `trust_remote_code=True` runs the loading code that this repository carries."
    return "Without it, loading stops with an error."


def with_tags(card: str, tags: Iterable[str]) -> str:
    """The text of a card with these tags among its own; a card that has them all stays as it is, byte for byte."""
    parsed = ModelCard(card)
    data: Any = parsed.data
    old = data.tags or []
    new = [tag for tag in dict.fromkeys(tags) if tag not in old]
    if not new:
        return card
    data.tags = [*old, *new]
    return str(parsed)


def read_text(path: str) -> str:
    """A text file as it is, line ends included."""
    with open(path, encoding="utf-8", newline="") as file:
        return file.read()
