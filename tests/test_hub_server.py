"""Checks that `hub_server` answers huggingface_hub, transformers and datasets as the Hub does."""

import base64
import hashlib
import io
import json
import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hub_server import HubServer
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    constants,
    get_session,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx
from safetensors.torch import save


REPO = "alice/model"
USERS = {"hf_alice": "alice", "hf_bob": "bob"}
CARD = "---\nlibrary_name: transformers\nbase_model: alice/base\ntags:\n- tiny\n---\n\n# Model\n"

PUSH = """
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
)
model = AutoModelForCausalLM.from_config(config)
vocab = {f"t{i}": i for i in range(8)}
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="t0")))
model.push_to_hub("alice/tiny")
tokenizer.push_to_hub("alice/tiny")
print(model(torch.arange(8)[None]).logits.double().sum().item())
"""

LOAD = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("alice/tiny")
assert AutoTokenizer.from_pretrained("alice/tiny").convert_tokens_to_ids(["t3", "t5"]) == [3, 5]
print(model(torch.arange(8)[None]).logits.double().sum().item())
"""

DATASETS = """
from datasets import get_dataset_config_names, load_dataset

print(get_dataset_config_names("alice/plain"), get_dataset_config_names("alice/configs"))
for name, config in [("alice/plain", None), ("alice/configs", None), ("alice/configs", "news")]:
    for streaming in (True, False):
        print([row["text"] for row in load_dataset(name, config, split="train", streaming=streaming)])
print([row["text"] for row in load_dataset("alice/configs", "news", split="test")])
"""

CONFIGS = b"""---
configs:
- config_name: tales
  default: true
  data_files: tales/*.jsonl
- config_name: news
  data_files:
  - split: train
    path: news/train.jsonl
  - split: test
    path: news/test.jsonl
---
"""

CARD_ROUND_TRIP = """
from huggingface_hub import ModelCard, create_repo

create_repo("alice/model")
card = ModelCard("---\\ntags:\\n- tiny\\n---\\n\\n# Model\\n")
card.push_to_hub("alice/model")
print(ModelCard.load("alice/model").data.tags)
"""

XET_UPLOAD = """
import os

os.environ["HF_HUB_DISABLE_XET"] = "0"
from huggingface_hub import create_repo, upload_file

create_repo("alice/model")
try:
    upload_file(path_or_fileobj=b"weights", path_in_repo="w.bin", repo_id="alice/model")
except Exception as error:
    print(error)
"""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub for `HfApi` objects of this process, which must not ask it anything it does not know."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with HubServer(USERS, page_size=4, part_size=20_000_000) as server:
        yield server
    assert server.unhandled == []


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    """A client with the token of alice, who has the empty repository `REPO`."""
    api = HfApi(endpoint=hub.endpoint, token="hf_alice")
    api.create_repo(REPO)
    return api


def client(hub: HubServer, token: str | bool) -> HfApi:
    """A client with another token, or with none if `False`."""
    return HfApi(endpoint=hub.endpoint, token=token)


def commit(api: HfApi, files: dict[str, bytes], message: str = "Change files") -> str:
    """Commit small files, and return the sha."""
    operations = [CommitOperationAdd(path, data) for path, data in files.items()]
    return api.create_commit(REPO, operations, commit_message=message).oid


def post_commit(hub: HubServer, key: str, value: dict) -> httpx.Response:
    """Commit one operation without the checks and uploads of huggingface_hub."""
    lines = [{"key": "header", "value": {"summary": "Change a file"}}, {"key": key, "value": value}]
    return get_session().post(
        f"{hub.endpoint}/api/models/{REPO}/commit/main",
        headers={"Authorization": "Bearer hf_alice", "Content-Type": "application/x-ndjson"},
        content="\n".join(json.dumps(line) for line in lines),
    )


def run_python(code: str, hub: HubServer, home: Path, token: str | None = "hf_alice") -> str:
    """Run code in a process that uses the Hub through the environment only, and return what it prints."""
    done = hub.run("-c", code, home=home, token=token)
    assert done.returncode == 0, done.stderr
    return done.stdout


def read_files(folder: str | Path) -> dict[str, bytes]:
    """The files below a folder that a client downloaded, by relative path."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    return {path: data for path, data in files.items() if not path.startswith(".cache/")}


def random_bytes(size: int) -> bytes:
    """Bytes that are the same in every run."""
    return random.Random(size).randbytes(size)


def test_upload_folder_and_download(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    files = {"notes/a.txt": b"hello", "model.safetensors": random_bytes(12_000_000)}
    for path, data in files.items():
        (tmp_path / "up" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "up" / path).write_bytes(data)
    api.upload_folder(repo_id=REPO, folder_path=tmp_path / "up")
    down = api.snapshot_download(REPO, local_dir=tmp_path / "down")

    assert {path: data for path, data in hub.files(REPO).items() if path != ".gitattributes"} == files
    assert read_files(down) == hub.files(REPO)
    assert api.verify_repo_checksums(REPO, local_dir=down).mismatches == []
    sent = [path for method, path in hub.requests if method == "PUT"]
    assert len(sent) == 1
    assert sent[0].startswith(f"/lfs-store/{REPO}/")
    assert ("POST", f"/{REPO}.git/info/lfs/verify") in hub.requests
    assert ("GET", sent[0]) in hub.requests


def test_large_objects_are_sent_in_parts(hub: HubServer, api: HfApi) -> None:
    data = random_bytes(2_500_000)
    hub.part_size = 1_000_000
    api.upload_file(path_or_fileobj=data, path_in_repo="model.safetensors", repo_id=REPO)
    assert hub.files(REPO)["model.safetensors"] == data
    assert sum(method == "PUT" for method, _ in hub.requests) == 3
    assert any(path.startswith("/api/complete_multipart/") for _, path in hub.requests)


def test_large_text_goes_to_lfs(hub: HubServer, api: HfApi) -> None:
    commit(api, {"small.json": b"{}", "large.json": b" " * 10_000_001})
    lfs = {sibling.rfilename: sibling.lfs for sibling in api.model_info(REPO, files_metadata=True).siblings}
    assert lfs["small.json"] is None
    assert lfs["large.json"].size == 10_000_001


def test_unchanged_files_are_not_sent_again(hub: HubServer, api: HfApi) -> None:
    files = {"a.txt": b"same", "b.bin": b"same"}
    first = commit(api, files)
    sent = [request for request in hub.requests if request[0] == "PUT"]
    assert commit(api, files) == first
    assert [request for request in hub.requests if request[0] == "PUT"] == sent


def test_revisions(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    first = commit(api, {"a.txt": b"1", "w.bin": b"first"}, "First")
    api.create_tag(REPO, tag="v1")
    api.create_branch(REPO, branch="dev/x")
    second = commit(api, {"a.txt": b"2", "w.bin": b"second"}, "Second")

    for revision, number in {first: b"1", "v1": b"1", "dev/x": b"1", second: b"2", "main": b"2"}.items():
        folder = api.snapshot_download(REPO, revision=revision, cache_dir=tmp_path)
        assert (Path(folder) / "a.txt").read_bytes() == number
        assert read_files(folder) == hub.files(REPO, revision)
    assert api.model_info(REPO, revision=first[:7]).sha == first
    assert [found.title for found in api.list_repo_commits(REPO)] == ["Second", "First", "initial commit"]
    refs = api.list_repo_refs(REPO)
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": second, "dev/x": first}
    assert {ref.name: ref.target_commit for ref in refs.tags} == {"v1": first}


def test_branches_and_tags(api: HfApi) -> None:
    api.create_branch(REPO, branch="dev")
    api.create_tag(REPO, tag="v1")
    api.create_branch(REPO, branch="dev", exist_ok=True)
    api.create_tag(REPO, tag="v1", exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_branch(REPO, branch="dev")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag(REPO, tag="v1")
    api.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id=REPO, revision="dev")
    assert api.file_exists(REPO, "x.txt", revision="dev")
    assert not api.file_exists(REPO, "x.txt")
    api.delete_branch(REPO, branch="dev")
    api.delete_tag(REPO, tag="v1")
    with pytest.raises(RevisionNotFoundError):
        api.delete_branch(REPO, branch="dev")
    with pytest.raises(RevisionNotFoundError):
        api.delete_tag(REPO, tag="v1")
    with pytest.raises(RevisionNotFoundError):
        api.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id=REPO, revision="dev")
    with pytest.raises(HfHubHTTPError, match="403"):
        api.delete_branch(REPO, branch="main")
    assert not api.revision_exists(REPO, "dev")
    assert not api.revision_exists(REPO, "v1")


def test_missing_things(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    with pytest.raises(RevisionNotFoundError):
        api.snapshot_download(REPO, revision="v9", cache_dir=tmp_path)
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download(REPO, "none.txt", cache_dir=tmp_path)
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree(REPO, "none"))
    for anyone in (api, client(hub, False)):
        with pytest.raises(RepositoryNotFoundError):
            anyone.hf_hub_download("alice/none", "a.txt", cache_dir=tmp_path)


def test_create_and_delete_repo(hub: HubServer, api: HfApi) -> None:
    assert api.create_repo("model", exist_ok=True).repo_id == REPO
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(REPO)
    with pytest.raises(HfHubHTTPError, match="403"):
        api.create_repo("bob/model")
    with pytest.raises(HfHubHTTPError, match="401"):
        client(hub, False).create_repo(REPO)
    api.delete_repo(REPO)
    assert not api.repo_exists(REPO)


def test_private_repo(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    api.create_repo("alice/secret", private=True)
    api.upload_file(path_or_fileobj=b"weights", path_in_repo="w.bin", repo_id="alice/secret")
    path = api.hf_hub_download("alice/secret", "w.bin", cache_dir=tmp_path)
    assert Path(path).read_bytes() == b"weights"
    assert api.model_info("alice/secret").private
    assert not api.model_info(REPO).private

    for index, token in enumerate((False, "hf_bob")):
        with pytest.raises(RepositoryNotFoundError):
            client(hub, token).snapshot_download("alice/secret", cache_dir=tmp_path / str(index))
    with pytest.raises(HfHubHTTPError, match="Invalid credentials in Authorization header") as caught:
        client(hub, "hf_wrong").model_info("alice/secret")
    assert not isinstance(caught.value, RepositoryNotFoundError)


def test_lfs_store_needs_a_signature(hub: HubServer, api: HfApi) -> None:
    commit(api, {"w.bin": b"weights"})
    redirect = get_session().get(f"{hub.endpoint}/{REPO}/resolve/main/w.bin", follow_redirects=False)
    signed = redirect.headers["Location"]
    assert redirect.status_code == 302
    assert get_session().get(signed).content == b"weights"
    assert get_session().get(signed.split("?")[0]).status_code == 403
    assert get_session().get(signed, headers={"Authorization": "Bearer hf_alice"}).status_code == 400


def test_writing_needs_a_token(hub: HubServer, api: HfApi) -> None:
    assert api.whoami()["name"] == "alice"
    for token, status in {False: "401", "hf_bob": "403", "hf_wrong": "401"}.items():
        with pytest.raises(HfHubHTTPError, match=status):
            client(hub, token).upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id=REPO)
    assert list(hub.files(REPO)) == [".gitattributes"]


def test_wrong_checksum_is_refused(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(b"weights")
    operation = CommitOperationAdd("w.bin", tmp_path / "w.bin")
    operation.upload_info.sha256 = bytes(32)
    with pytest.raises(RuntimeError, match="w.bin") as caught:
        api.create_commit(REPO, [operation], commit_message="Add weights")
    assert "sent with other content" in str(caught.value.__cause__)
    assert list(hub.files(REPO)) == [".gitattributes"]


def test_commit_of_an_object_never_uploaded_is_refused(hub: HubServer, api: HfApi) -> None:
    file = {"path": "w.bin", "algo": "sha256", "oid": "0" * 64, "size": 7}
    answer = post_commit(hub, "lfsFile", file)
    assert answer.status_code == 400
    assert "never uploaded" in answer.json()["error"]
    assert list(hub.files(REPO)) == [".gitattributes"]


def test_copy_and_delete(hub: HubServer, api: HfApi) -> None:
    commit(api, {"a.txt": b"a", "w.bin": b"w"})
    operations = [
        CommitOperationCopy("a.txt", "old/a.txt"),
        CommitOperationCopy("w.bin", "old/w.bin"),
        CommitOperationDelete("a.txt"),
    ]
    api.create_commit(REPO, operations, commit_message="Move files")
    assert hub.files(REPO).keys() == {".gitattributes", "w.bin", "old/a.txt", "old/w.bin"}
    api.delete_folder("old", REPO)
    assert hub.files(REPO).keys() == {".gitattributes", "w.bin"}
    with pytest.raises(RemoteEntryNotFoundError):
        api.delete_file("none.txt", REPO)


def test_parent_commit(api: HfApi) -> None:
    first = commit(api, {"a.txt": b"1"})
    add = {"path_in_repo": "a.txt", "repo_id": REPO}
    api.upload_file(path_or_fileobj=b"2", parent_commit=first, **add)
    with pytest.raises(HfHubHTTPError, match="412"):
        api.upload_file(path_or_fileobj=b"3", parent_commit=first, **add)


def test_listings_come_in_pages(hub: HubServer, api: HfApi) -> None:
    names = [f"sub/deep/{n}.txt" for n in range(5)] + ["é.txt", "top.bin"]
    api.create_commit(REPO, [CommitOperationAdd(name, b"x") for name in names], commit_message="Add files")
    assert sorted(api.list_repo_files(REPO)) == sorted([".gitattributes", *names])
    assert [entry.path for entry in api.list_repo_tree(REPO)] == [".gitattributes", "sub", "top.bin", "é.txt"]
    assert [entry.path for entry in api.list_repo_tree(REPO, "sub")] == ["sub/deep"]
    assert sum(path == f"/api/models/{REPO}/tree/main" for _, path in hub.requests) == 4
    assert [entry.path for entry in api.get_paths_info(REPO, ["sub", "none", "top.bin"])] == ["sub", "top.bin"]


def test_part_of_a_file(hub: HubServer, api: HfApi) -> None:
    commit(api, {"model.safetensors": save({"w": torch.zeros(3, 2)}), "a.txt": b"0123456789"})
    assert api.get_safetensors_metadata(REPO).files_metadata["model.safetensors"].tensors["w"].shape == [3, 2]
    url = f"{hub.endpoint}/{REPO}/resolve/main/a.txt"
    for asked, got in {"bytes=2-4": b"234", "bytes=7-": b"789", "bytes=-2": b"89"}.items():
        answer = get_session().get(url, headers={"Range": asked})
        assert (answer.status_code, answer.content) == (206, got)
    assert get_session().get(url, headers={"Range": "bytes=10-"}).status_code == 416


def test_bytes_sent(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    commit(api, {"w.bin": bytes(1000)})
    api.hf_hub_download(REPO, "w.bin", cache_dir=tmp_path)
    store = f"/lfs-store/{REPO}/{hashlib.sha256(bytes(1000)).hexdigest()}"
    assert hub.bytes_sent[store] == 1000
    get_session().get(f"{hub.endpoint}/{REPO}/resolve/main/w.bin", headers={"Range": "bytes=0-9"})
    assert hub.bytes_sent[store] == 1010


def test_model_card(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    commit(api, {"README.md": CARD.encode()})
    info = api.model_info(REPO)
    assert (info.library_name, info.tags) == ("transformers", ["tiny", "base_model:alice/base"])
    assert info.card_data.to_dict() == ModelCard(CARD).data.to_dict()
    assert api.model_info(REPO, expand=["sha"]).card_data is None
    for text in (b"---\ntags: [\n---\n", b"---\nonly text\n---\n"):
        with pytest.raises(ValueError, match="Invalid metadata"):
            commit(api, {"README.md": text})
    with pytest.warns(UserWarning, match="missing yaml metadata"):
        commit(api, {"README.md": b"# Model\n"})


def test_model_card_push_and_load(tmp_path: Path) -> None:
    with HubServer(USERS) as hub:
        assert run_python(CARD_ROUND_TRIP, hub, tmp_path) == "['tiny']\n"
    assert hub.files(REPO)["README.md"].startswith(b"---\ntags:\n- tiny\n---\n")
    assert hub.unhandled == []


def test_card_refused_on_commit(hub: HubServer, api: HfApi) -> None:
    file = {"path": "README.md", "content": base64.b64encode(b"---\ntags: [\n---\n").decode(), "encoding": "base64"}
    answer = post_commit(hub, "file", file)
    assert answer.status_code == 400
    assert "Invalid YAML" in answer.json()["error"]


def test_card_validation_in_plain_text(hub: HubServer) -> None:
    question = {"repoType": "model", "content": "---\ntags: [\n---\n"}
    answer = get_session().post(f"{hub.endpoint}/api/validate-yaml", json=question, headers={"Accept": "text/plain"})
    assert answer.status_code == 400
    assert answer.text.startswith("Invalid YAML metadata")


def test_questions_of_clients_with_telemetry(hub: HubServer) -> None:
    assert get_session().get(f"{hub.endpoint}/api/agent-harnesses").json() == {"standardEnvVars": [], "harnesses": {}}
    assert get_session().head(f"{hub.endpoint}/api/telemetry/a/b").status_code == 200


def test_xet_uploads_are_recorded(tmp_path: Path) -> None:
    pytest.importorskip("hf_xet")
    with HubServer(USERS) as hub:
        assert "501" in run_python(XET_UPLOAD, hub, tmp_path)
    assert any("xet-write-token" in message for message in hub.unhandled)


def test_model_and_dataset_of_one_name(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    api.create_repo(REPO, repo_type="dataset", private=True)
    for kind in ("model", "dataset"):
        api.upload_file(path_or_fileobj=kind.encode(), path_in_repo="w.bin", repo_id=REPO, repo_type=kind)
    assert hub.files(REPO)["w.bin"] == b"model"
    assert hub.files(f"datasets/{REPO}")["w.bin"] == b"dataset"
    path = api.hf_hub_download(REPO, "w.bin", repo_type="dataset", cache_dir=tmp_path)
    assert Path(path).read_bytes() == b"dataset"
    assert api.dataset_info(REPO).id == REPO
    assert (api.dataset_info(REPO).private, api.model_info(REPO).private) == (True, False)
    with pytest.raises(RepositoryNotFoundError):
        client(hub, False).dataset_info(REPO)
    api.delete_repo(REPO, repo_type="dataset")
    assert api.repo_exists(REPO)
    assert not api.repo_exists(REPO, repo_type="dataset")


def test_datasets_load(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    table = io.BytesIO()
    pq.write_table(pa.table({"text": ["x", "y"]}), table)
    paths = ("tales/1", "tales/2", "news/train", "news/test")
    configs = {f"{path}.jsonl": json.dumps({"text": path}).encode() for path in paths}
    for name, files in {
        "plain": {"data.parquet": table.getvalue()},
        "configs": {"README.md": CONFIGS, **configs},
    }.items():
        api.create_repo(f"alice/{name}", repo_type="dataset")
        operations = [CommitOperationAdd(path, data) for path, data in files.items()]
        api.create_commit(f"alice/{name}", operations, commit_message="Add files", repo_type="dataset")
    lines = run_python(DATASETS, hub, tmp_path, token=None).splitlines()
    plain, tales, news = ["['x', 'y']"] * 2, ["['tales/1', 'tales/2']"] * 2, ["['news/train']"] * 2
    assert lines == ["['default'] ['tales', 'news']", *plain, *tales, *news, "['news/test']"]


def test_unknown_routes_are_recorded(hub: HubServer, api: HfApi) -> None:
    with pytest.raises(HfHubHTTPError, match="no route for GET /api/spaces/alice/demo"):
        api.space_info("alice/demo")
    with pytest.raises(HfHubHTTPError, match="repositories of type space"):
        api.create_repo("alice/demo", repo_type="space", space_sdk="static")
    with pytest.raises(HfHubHTTPError, match="pull requests"):
        api.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id=REPO, create_pr=True)
    answer = get_session().post(f"{hub.endpoint}/api/repos/create", headers={"Authorization": "Bearer hf_alice"})
    assert answer.status_code == 501
    assert "JSONDecodeError" in answer.json()["error"]
    assert len(hub.unhandled) == 4
    hub.unhandled.clear()


def test_stops_cleanly(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    before = set(threading.enumerate())
    with HubServer(USERS) as hub:
        assert get_session().get(f"{hub.endpoint}/api/whoami-v2").status_code == 401
    assert set(threading.enumerate()) <= before
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(hub.endpoint.rsplit(":", 1)[1])))
    assert capfd.readouterr() == ("", "")


def test_transformers_push_and_load(tmp_path: Path) -> None:
    with HubServer(USERS) as hub:
        pushed = run_python(PUSH, hub, tmp_path / "alice")
        loaded = run_python(LOAD, hub, tmp_path / "anonymous", token=None)
    assert pushed == loaded
    assert any(method == "PUT" and path.startswith("/lfs-store/") for method, path in hub.requests)
    assert hub.unhandled == []
