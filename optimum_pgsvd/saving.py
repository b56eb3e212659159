"""What a compressed model writes besides its weights: report, model card, tokenizer, and the code of
self-contained checkpoints.
"""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
from types import MethodType
from typing import Any

from huggingface_hub import snapshot_download
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

from . import modeling_pgsvd
from .card import CARD_NAME, MARKER, model_card, read_text
from .elastic import Elastic, settle_elastic, write_elastic
from .hub import SHARD, destination, upload
from .logs import warn
from .report import REPORT_NAME, CompressionReport


# What tokenizers, feature extractors and processors save, by whatever class; they are copied, not loaded, so that none
# is lost where a class cannot be imported.
TOKENIZER_FILES = (
    "tokenizer*.json",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "normalizer.json",
    "*.model",
    "*.tiktoken",
    "*processor_config.json",
    "chat_template*",
    "additional_chat_templates/*",
)

# What `save_pretrained(push_to_hub=True)` takes for the Hub.
HUB_OPTIONS = ("private", "revision", "create_pr", "commit_message", "commit_description", "tags")


def attach_artifacts(
    model: PreTrainedModel, report: CompressionReport | None, tokenizer: Any = None, elastic: Elastic | None = None
) -> None:
    """Make `save_pretrained` and `push_to_hub` of this one model write everything a checkpoint should hold.

    The methods of the class are not touched. Without a tokenizer, the one of the place the model was loaded from is
    saved, if it has one.

    Args:
        model: compressed.
        report: of its compression, `None` where it is not known.
        tokenizer: tokenizer or processor, or where to load it from.
        elastic: what cutting its checkpoint will need, of a model that was compressed with `elastic=True`.
    """
    if elastic is not None:
        elastic.seal(model)
    model.pgsvd_report = report
    model.pgsvd_tokenizer = tokenizer
    model.pgsvd_elastic = elastic
    model.save_pretrained = MethodType(save_pretrained, model)
    model.push_to_hub = MethodType(push_to_hub, model)


def detach_artifacts(model: PreTrainedModel) -> None:
    """Give a model that is dense again the methods of its class."""
    attached = ("pgsvd_report", "pgsvd_tokenizer", "pgsvd_elastic", "pgsvd_commit", "save_pretrained", "push_to_hub")
    for name in attached:
        vars(model).pop(name, None)


def remember_commit(model: PreTrainedModel, checkpoint_files: list[str] | None) -> None:
    """Keep the commit that a model is loaded at, so that its report and its tokenizer are taken from there too.

    Args:
        model: being loaded.
        checkpoint_files: its weights, in the Hub's cache or in a folder.
    """
    model.pgsvd_commit = extract_commit_hash(checkpoint_files[0], None) if checkpoint_files else None


def save_pretrained(
    model: PreTrainedModel,
    save_directory: str | os.PathLike,
    is_main_process: bool = True,
    state_dict: dict | None = None,
    push_to_hub: bool = False,
    **kwargs: Any,
) -> None:
    """`PreTrainedModel.save_pretrained`, and beside the weights the report, a model card and the tokenizer.

    With `push_to_hub`, what was written is pushed, and nothing else that the folder holds. An adapter is saved and
    pushed as ever, with nothing beside it.
    """
    stock = type(model).save_pretrained
    if getattr(model, "_hf_peft_config_loaded", False):
        return stock(model, save_directory, is_main_process, state_dict, push_to_hub, **kwargs)
    repo_id = kwargs.pop("repo_id", os.path.basename(os.path.abspath(save_directory)))
    options = {key: kwargs.pop(key) for key in HUB_OPTIONS if key in kwargs}
    token = kwargs.get("token")
    if push_to_hub and is_main_process:
        to, before = destination(repo_id, token, **options), written_when(save_directory)
    point_to_code(model)
    settle_elastic(model)
    stock(model, save_directory, is_main_process, state_dict, **kwargs)
    if is_main_process:
        if kwargs.get("variant") is None:
            remove_other_layout(save_directory)
        write_artifacts(model, save_directory, token)
        if push_to_hub:
            after = written_when(save_directory)
            upload(model, save_directory, [path for path in after if after[path] != before.get(path)], to)
    return None


def push_to_hub(
    model: PreTrainedModel,
    repo_id: str,
    *,
    token: bool | str | None = None,
    max_shard_size: int | str = "50GB",
    **options: Any,
) -> Any:
    """`PreTrainedModel.push_to_hub` with everything `save_pretrained` writes; a card that someone edited is kept.

    Args:
        model: compressed.
        repo_id: `"user/name"`, or a name among one's own.
        token: of the Hub, by default the one logged in with.
        max_shard_size: of a weights file, in bytes or as in `"5GB"`.
        options: `private`, `revision`, `create_pr`, `commit_message`, `commit_description` and `tags`.

    Returns:
        The commit.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        return type(model).push_to_hub(model, repo_id, token=token, max_shard_size=max_shard_size, **options)
    to = destination(repo_id, token, **options)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size, token=token)
        return upload(model, folder, written_when(folder), to)


def write_artifacts(model: PreTrainedModel, folder: str | os.PathLike, token: bool | str | None = None) -> None:
    """Write report, card, tokenizer and, where asked for, what cutting needs and the loading code."""
    if model.pgsvd_report is None:
        model.pgsvd_report = load_report(model.name_or_path, revision=commit_of(model), token=token)
    if model.pgsvd_report is None:
        warn(f"No {REPORT_NAME} was found for {model.name_or_path}: it is saved without report and card.")
    else:
        model.pgsvd_report.save(folder)
        path = os.path.join(folder, CARD_NAME)
        if not os.path.exists(path) or MARKER in read_text(path):
            model_card(model, model.pgsvd_report).save(path)
    save_tokenizer(model, folder, token)
    write_elastic(model, folder)
    if model.config.quantization_config.self_contained:
        shutil.copyfile(modeling_pgsvd.__file__, os.path.join(folder, "modeling_pgsvd.py"))


def point_to_code(model: PreTrainedModel) -> None:
    """Name the shipped file as the code of a self-contained checkpoint's model classes, and of no other's."""
    module = modeling_pgsvd.__name__.rpartition(".")[2]
    classes = modeling_pgsvd.auto_classes(model.config.model_type)
    ours = {auto: f"{module}.{names[0]}" for auto, names in classes.items()}
    if model.config.quantization_config.self_contained:
        model.config.auto_map = ours
    elif getattr(model.config, "auto_map", None) == ours:
        del model.config.auto_map


def commit_of(model: PreTrainedModel) -> str | None:
    """The commit on the Hub that a model was loaded at."""
    return getattr(model, "pgsvd_commit", None)


def save_tokenizer(model: PreTrainedModel, folder: str | os.PathLike, token: bool | str | None = None) -> None:
    """Save the tokenizer or processor that was given, else copy the files of the place the model was loaded from."""
    source, revision = model.pgsvd_tokenizer, None
    if source is None:
        source, revision = getattr(model, "name_or_path", None), commit_of(model)
    if source is not None and not isinstance(source, (str, os.PathLike)):
        source.save_pretrained(folder)
    elif source:
        try:
            copy_tokenizer(os.fspath(source), folder, revision=revision, token=token)
        except (OSError, ValueError) as error:
            warn(f"No tokenizer could be read from {source}; save one beside the model. {error}")


def copy_tokenizer(source: str, folder: str | os.PathLike, **hub: Any) -> None:
    """Copy the tokenizer and processor files of a folder or of a model on the Hub, as they are."""
    patterns = list(TOKENIZER_FILES)
    place = source if os.path.isdir(source) else str(snapshot_download(source, allow_patterns=patterns, **hub))
    for pattern in TOKENIZER_FILES:
        for path in glob.glob(os.path.join(glob.escape(place), pattern)):
            target = os.path.join(folder, os.path.relpath(path, place))
            if not (os.path.exists(target) and os.path.samefile(path, target)):
                os.makedirs(os.path.dirname(target), exist_ok=True)
                shutil.copyfile(path, target)


def load_report(source: str | os.PathLike | None, **hub: Any) -> CompressionReport | None:
    """The report beside a checkpoint.

    Args:
        source: a folder, or the name of a model on the Hub.
        hub: `revision` and `token` of a model on the Hub.

    Returns:
        The report, `None` where there is none, or none that can be reached or read.
    """
    try:
        path = cached_file(str(source), REPORT_NAME, **hub) if source else None
        return CompressionReport.load(os.path.dirname(path)) if path else None
    except OSError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        warn(f"The {REPORT_NAME} of {source} is damaged and is left out: {error!r}")
        return None


def written_when(folder: str | os.PathLike) -> dict[str, int]:
    """The files below a folder by their path in it, each with the time of its last change in nanoseconds."""
    found = {}
    for parent, _, names in os.walk(os.fspath(folder)):
        for name in names:
            path = os.path.join(parent, name)
            found[os.path.relpath(path, folder).replace(os.sep, "/")] = os.stat(path).st_mtime_ns
    return found


def remove_other_layout(folder: str | os.PathLike) -> None:
    """Remove what an earlier save left and would be loaded in the stead of this one.

    transformers removes old shards itself, so that those it leaves are new; but it leaves an old single file beside
    them, which it would load first, and an old index beside a new single file.
    """
    sharded = any(map(SHARD.fullmatch, os.listdir(folder)))
    other = os.path.join(folder, SAFE_WEIGHTS_NAME if sharded else SAFE_WEIGHTS_INDEX_NAME)
    if os.path.exists(other):
        os.remove(other)
