"""What a compressed model writes besides its weights: report, model card, tokenizer, and the code of
self-contained checkpoints.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from types import MethodType
from typing import Any

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import EntryNotFoundError
from transformers import PreTrainedModel

from . import modeling_pgsvd
from .card import MARKER, model_card
from .errors import CheckpointError
from .report import REPORT_NAME, CompressionReport


CARD_NAME = "README.md"


def attach_artifacts(model: PreTrainedModel, report: CompressionReport | None, tokenizer: Any = None) -> None:
    """Make `save_pretrained` and `push_to_hub` of this one model write everything a checkpoint should hold.

    The methods of the class are not touched. Without a tokenizer, the one of the place the model was loaded from is
    saved, if it has one.

    Args:
        model: compressed.
        report: of its compression, `None` where it is not known.
        tokenizer: tokenizer or processor, or where to load it from.
    """
    model.pgsvd_report = report
    model.pgsvd_tokenizer = tokenizer
    model.save_pretrained = MethodType(save_pretrained, model)
    model.push_to_hub = MethodType(push_to_hub, model)


def detach_artifacts(model: PreTrainedModel) -> None:
    """Give a model that is dense again the methods of its class."""
    for name in ("pgsvd_report", "pgsvd_tokenizer", "save_pretrained", "push_to_hub"):
        vars(model).pop(name, None)


def save_pretrained(
    model: PreTrainedModel, save_directory: str | os.PathLike, *args: Any, push_to_hub: bool = False, **kwargs: Any
) -> None:
    """`PreTrainedModel.save_pretrained`, and beside the weights the report, a model card and the tokenizer.

    An adapter is saved as ever, with nothing beside it.
    """
    repo_id = kwargs.pop("repo_id", os.path.basename(os.path.normpath(os.fspath(save_directory))))
    hub = {key: kwargs.pop(key) for key in ("commit_message", "create_pr", "private", "revision") if key in kwargs}
    adapter = getattr(model, "_hf_peft_config_loaded", False)
    is_main_process = kwargs.get("is_main_process", True)
    if not adapter:
        point_to_code(model)
    type(model).save_pretrained(model, save_directory, *args, **kwargs)
    if not adapter and is_main_process:
        write_artifacts(model, save_directory)
    if push_to_hub:
        upload(save_directory, repo_id, token=kwargs.get("token"), **hub)


def push_to_hub(
    model: PreTrainedModel,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
    tags: list[str] | None = None,
) -> str:
    """`PreTrainedModel.push_to_hub` with everything `save_pretrained` writes; a card that someone edited is kept."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        card_path = os.path.join(folder, CARD_NAME)
        if os.path.exists(card_path):
            card = edited_card(repo_id, token) or model_card(model, model.pgsvd_report, repo_id)
            data: Any = card.data
            data.tags = list(dict.fromkeys([*(data.tags or []), *(tags or [])]))
            card.save(card_path)
        return upload(
            folder,
            repo_id,
            token=token,
            private=private,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            commit_description=commit_description,
        )


def write_artifacts(model: PreTrainedModel, folder: str | os.PathLike) -> None:
    """Write report, card, tokenizer and, where asked for, the loading code."""
    if model.pgsvd_report is not None:
        model.pgsvd_report.save(folder)
        path = os.path.join(folder, CARD_NAME)
        if not os.path.exists(path) or is_ours(path):
            model_card(model, model.pgsvd_report).save(path)
    if (tokenizer := find_tokenizer(model)) is not None:
        tokenizer.save_pretrained(folder)
    if model.config.quantization_config.self_contained:
        shutil.copyfile(modeling_pgsvd.__file__, os.path.join(folder, "modeling_pgsvd.py"))


def point_to_code(model: PreTrainedModel) -> None:
    """Name the shipped file as the code of a self-contained checkpoint's model classes."""
    if model.config.quantization_config.self_contained:
        module = modeling_pgsvd.__name__.rpartition(".")[2]
        classes = modeling_pgsvd.auto_classes(model.config.model_type)
        model.config.auto_map = {auto: f"{module}.{names[0]}" for auto, names in classes.items()}


def find_tokenizer(model: PreTrainedModel) -> Any:
    """The tokenizer or processor to save: the one given, else that of the place the model was loaded from."""
    source = model.pgsvd_tokenizer or getattr(model, "name_or_path", None)
    if source is None or not isinstance(source, (str, os.PathLike)):
        return source
    if not str(source):
        return None
    from transformers import AutoProcessor, AutoTokenizer

    for auto in (AutoProcessor, AutoTokenizer):
        try:
            return auto.from_pretrained(source)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError):
            continue
    return None


def load_report(model_or_path: str | os.PathLike, **hub: Any) -> CompressionReport | None:
    """The report beside a checkpoint, local or on the Hub; `None` where there is none."""
    from transformers.utils import cached_file

    path = cached_file(
        os.fspath(model_or_path),
        REPORT_NAME,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
        **hub,
    )
    return CompressionReport.load(os.path.dirname(path)) if path else None


def is_ours(path: str) -> bool:
    """Whether a card on disk may be rewritten."""
    with open(path, encoding="utf-8") as file:
        return MARKER in file.read()


def edited_card(repo_id: str, token: bool | str | None) -> ModelCard | None:
    """The card of a repository, if there is one and its author took it over."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        card = ModelCard.load(repo_id, token=token)  # type: ignore[arg-type]
    except (EntryNotFoundError, RepositoryNotFoundError):
        return None
    return None if MARKER in card.content else card


def upload(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    token: bool | str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
) -> Any:
    """Create the repository if need be and upload a folder to it in one commit."""
    if not os.path.exists(os.path.join(folder, "config.json")):
        raise CheckpointError(f"{os.fspath(folder)} holds no config.json; save the model before it is uploaded")
    api = HfApi(library_name="optimum-pgsvd", token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return api.upload_folder(
        folder_path=os.fspath(folder),
        repo_id=repo_id,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message or "Upload PGSVD model",
        commit_description=commit_description,
    )
