"""Pushing to the Hub: the repository first, so that a push that may not be fails early, then one commit."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .card import CARD_NAME, MARKER, model_card, read_text, with_tags
from .checkpoint import ELASTIC_NAME
from .version import __version__


SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True)
class Destination:
    """Where on the Hub to push, and how.

    Args:
        api: client with a token.
        repo_id: `"user/name"`.
        commit: `revision`, `create_pr`, `commit_message` and `commit_description` of the commit.
        tags: added to the card's.
    """

    api: HfApi
    repo_id: str
    commit: Mapping[str, Any]
    tags: tuple[str, ...]


def destination(
    repo_id: str,
    token: bool | str | None = None,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    tags: str | Iterable[str] | None = None,
) -> Destination:
    """Create repository and branch if need be, so that a push that may not be fails before anything is written.

    Args:
        repo_id: `"user/name"`, or a name among one's own.
        token: of the Hub, by default the one logged in with.
        private: whether a repository that is created here is private.
        revision: branch to push to.
        create_pr: open a pull request.
        commit_message: title of the commit.
        commit_description: text of the commit.
        tags: to add to the card.

    Returns:
        The destination.
    """
    api = HfApi(library_name="optimum-pgsvd", library_version=__version__, token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    commit = {
        "revision": revision,
        "create_pr": create_pr,
        "commit_message": commit_message or "Upload PGSVD model",
        "commit_description": commit_description,
    }
    return Destination(api, repo_id, commit, (tags,) if isinstance(tags, str) else tuple(tags or ()))


def upload(model: PreTrainedModel, folder: str | os.PathLike, files: Iterable[str], to: Destination) -> Any:
    """Push files of a folder and the card in one commit, which also drops the weights that they replace."""
    present = to.api.list_repo_files(to.repo_id, revision=to.commit["revision"])
    files = sorted({*files} - {CARD_NAME})
    added = [CommitOperationAdd(path, os.path.join(folder, path)) for path in files]
    card = card_to_push(model, folder, to, CARD_NAME in present)
    if card is not None:
        added.append(CommitOperationAdd(CARD_NAME, card.encode()))
    dropped = [CommitOperationDelete(path) for path in stale_weights(present, files)]
    return to.api.create_commit(to.repo_id, [*added, *dropped], **to.commit)


def stale_weights(present: Iterable[str], pushed: Iterable[str]) -> list[str]:
    """Weight files of a repository that would be loaded in the stead of, or lie idle beside, those being pushed."""
    single, index, pushed = SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, {*pushed}
    if not pushed & {single, index}:
        return []
    return sorted(
        name for name in {*present} - pushed if name in (single, index, ELASTIC_NAME) or SHARD.fullmatch(name)
    )


def card_to_push(model: PreTrainedModel, folder: str | os.PathLike, to: Destination, present: bool) -> str | None:
    """The text of the card to push, `None` where there is nothing to change.

    A card that someone edited stays, the Hub's before the folder's; any other is written anew.
    """
    if present:
        remote = read_text(to.api.hf_hub_download(to.repo_id, CARD_NAME, revision=to.commit["revision"]))
        if MARKER not in remote:
            tagged = with_tags(remote, to.tags)
            return tagged if tagged != remote else None
    path = os.path.join(folder, CARD_NAME)
    if os.path.exists(path) and MARKER not in (local := read_text(path)):
        return with_tags(local, to.tags)
    if model.pgsvd_report is None:
        return None
    return with_tags(str(model_card(model, model.pgsvd_report, to.repo_id)), to.tags)
