"""Calibration on a dataset of the Hub."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import HubServer
from huggingface_hub import CommitOperationAdd, HfApi, constants


CARD = b"""---
configs:
- config_name: tales
  data_files: tales.jsonl
- config_name: news
  data_files: news.jsonl
---
"""

# Compresses the same model on each dataset, and prints the factors' digest or the error.
COMPRESS = """
import sys
sys.path.insert(0, sys.argv[1])
import hashlib, json, time
import torch
from models import FAMILIES
from conftest import word_tokenizer
from optimum_pgsvd import CalibrationError, PGSVDCompressor, PGSVDConfig

time.sleep = lambda seconds: None  # between attempts to reach a server that is not there

def compress(dataset):
    model = FAMILIES["llama"].build()
    config = PGSVDConfig(parameter_reduction=0.3, dataset=dataset, sequence_length=16, num_samples=32)
    try:
        report = PGSVDCompressor(config).compress(model, tokenizer=word_tokenizer())
    except CalibrationError as error:
        return {"error": str(error)}
    weights = b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())
    digest = hashlib.sha256(weights).hexdigest()
    return {"digest": digest, "tokens": report.calibration["tokens"], "dataset": report.config["dataset"]}

print(json.dumps({dataset: compress(dataset) for dataset in sys.argv[2:]}))
"""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "*")
    with HubServer({"hf_alice": "alice"}) as server:
        yield server
    assert server.unhandled == []


def put(hub: HubServer, name: str, files: dict[str, bytes], private: bool = False) -> None:
    """Make a dataset repository of alice's."""
    api = HfApi(endpoint=hub.endpoint, token="hf_alice")
    api.create_repo(name, repo_type="dataset", private=private)
    operations = [CommitOperationAdd(path, data) for path, data in files.items()]
    api.create_commit(name, operations, commit_message="Add files", repo_type="dataset")


def jsonl(texts: list[str], column: str = "text") -> bytes:
    return "".join(json.dumps({column: text}) + "\n" for text in texts).encode()


def compress(hub: HubServer, home: Path, *datasets: str, token: str | None = None) -> dict[str, dict]:
    """What a fresh process makes of each dataset."""
    done = hub.run("-c", COMPRESS, str(Path(__file__).parent), *datasets, home=home, token=token)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_hub_dataset_gives_what_its_file_gives(hub, tmp_path, texts):
    halves = {"tales": jsonl(texts[:32]), "news": jsonl(texts[32:])}
    for name, data in halves.items():
        (tmp_path / f"{name}.jsonl").write_bytes(data)
    put(hub, "alice/corpus", {"train.jsonl": halves["tales"], "test.jsonl": halves["news"]})
    put(hub, "alice/two", {"README.md": CARD, **{f"{name}.jsonl": data for name, data in halves.items()}})
    put(hub, "alice/secret", {"train.jsonl": halves["news"]}, private=True)
    on_hub = ("alice/corpus", "alice/two:tales", "alice/two:news", "alice/secret")
    files = [str(tmp_path / f"{name}.jsonl") for name in halves]
    found = compress(hub, tmp_path / "home", *on_hub, *files, token="hf_alice")
    tales, news = (found[path] for path in files)
    assert tales["digest"] != news["digest"]
    for name, expected in zip(on_hub, (tales, tales, news, news), strict=True):
        assert found[name] == {**expected, "dataset": name}


def test_what_cannot_be_read_is_told_with_the_remedy(hub, tmp_path, texts):
    put(hub, "alice/secret", {"train.jsonl": jsonl(texts)}, private=True)
    put(hub, "alice/two", {"README.md": CARD, "tales.jsonl": jsonl(texts), "news.jsonl": jsonl(texts)})
    put(hub, "alice/test", {"test.jsonl": jsonl(texts)})
    put(hub, "alice/empty", {"notes.md": b"nothing"})
    put(hub, "alice/broken", {"train.jsonl": b'{"text": "w1'})
    put(hub, "alice/columns", {"train.jsonl": jsonl(texts, "words")})
    expected = {
        "alice/none": ["alice/none", "doesn't exist", "check the name", "hf auth login"],
        "alice/secret": ["alice/secret", "doesn't exist", "private", "HF_TOKEN"],
        "alice/two": ["alice/two", "tales", "news", "'user/name:config'"],
        "alice/two:tails": ["alice/two:tails", "not found", "tales", "'user/name:config'"],
        "alice/test": ["alice/test", "Available splits: ['test']", "load_dataset(...)"],
        "alice/empty": ["alice/empty", "load_dataset(...)"],
        "alice/broken": ["alice/broken", "JSON parse error", "load_dataset(...)"],
        "alice/columns": ["words", "'text' column"],
        "a/b/c": ["a/b/c", "'user/name:config'"],
    }
    check(compress(hub, tmp_path / "home", *expected), expected)


def test_unreachable_hub_is_told_with_the_remedy(tmp_path):
    with HubServer({}) as hub:
        pass
    words = ["alice/corpus", "Couldn't reach", "check the connection", "local .txt, .jsonl or .parquet file"]
    expected = {"alice/corpus": words}
    check(compress(hub, tmp_path / "home", *expected), expected)


def check(found: dict[str, dict], expected: dict[str, list[str]]) -> None:
    """Every dataset gave an error that has all the words."""
    for dataset, words in expected.items():
        message = found[dataset]["error"]
        assert [word for word in words if word not in message] == [], message
