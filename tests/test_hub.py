"""A compressed model on the Hub: what is pushed, and that stock transformers loads it from there by name."""

import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.hf_api
import peft
import pytest
import torch
import transformers.utils.hub
from hub_server import HubServer
from huggingface_hub import HfApi, ModelCard, constants
from models import FAMILIES
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_pgsvd import PGSVDCompressor, PGSVDConfig
from optimum_pgsvd.card import MARKER
from optimum_pgsvd.checkpoint import ELASTIC_NAME


USERS = {"hf_alice": "alice", "hf_bob": "bob"}
IDS = torch.arange(3, 40)[None]
BESIDE_WEIGHTS = {
    ".gitattributes", "README.md", "config.json", "generation_config.json", "pgsvd_report.json", "tokenizer.json",
    "tokenizer_config.json",
}  # fmt: skip

# Logits and greedy tokens of a pipeline, written to a file.
OUTPUTS = """
import json, sys
import torch
from safetensors.torch import save_file
from transformers import pipeline

def save_outputs(path, **options):
    generator = pipeline("text-generation", **options)
    made = generator("w3 w14 w15 w9", max_new_tokens=8, do_sample=False, return_tensors=True)
    with torch.no_grad():
        logits = generator.model(input_ids=torch.arange(3, 40)[None]).logits
    save_file({"tokens": torch.tensor(made[0]["generated_token_ids"]), "logits": logits}, path)
"""

PUSH = """
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, AutoTokenizer
from optimum_pgsvd import PGSVDConfig

dense, folder, texts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(dense)
AutoModelForCausalLM.from_pretrained(dense).push_to_hub("alice/dense")
tokenizer.push_to_hub("alice/dense")

def compress(reduction, name):
    config = PGSVDConfig(parameter_reduction=reduction, dataset=texts, sequence_length=32, self_contained=True)
    model = AutoModelForCausalLM.from_pretrained("alice/dense", quantization_config=config)
    save_outputs(f"{folder}/{name}.safetensors", model=model, tokenizer=tokenizer)
    return model

first, second = compress(0.3, "first"), compress(0.6, "second")
first.push_to_hub("alice/portable")
for model in (first, second):
    model.config.quantization_config.self_contained = False
print(first.push_to_hub("alice/tiny").oid)
HfApi().create_tag("alice/tiny", tag="v1")
second.push_to_hub("alice/tiny", commit_message="Compress more")
second.push_to_hub("alice/tiny", revision="dev", tags=["draft"])
first.push_to_hub("alice/shards", max_shard_size="30KB")
first.push_to_hub("secret", private=True)
"""

# Each argument of the process: where to write the outputs, and what to give to the pipeline.
LOAD = """
for path, options in map(json.loads, sys.argv[1:]):
    try:
        save_outputs(path, **options)
    except (OSError, ValueError) as error:
        print(options, error)
"""

# Stands for a machine without the package: nothing named optimum_pgsvd can be imported.
WITHOUT_PACKAGE = """
import os, sys
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "optimum_pgsvd":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
"""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub that alice uses from this process; her dense model is there as `"alice/dense"`."""
    with HubServer(USERS) as server:
        home = tmp_path / "home"
        for name, value in server.env(home, "hf_alice").items():
            monkeypatch.setenv(name, value)
        url = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        for name in ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY"):
            monkeypatch.setattr(constants, name, True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        yield server
    assert server.unhandled == []


@pytest.fixture
def model(tokenizer):
    """A compressed model that came from memory."""
    model = FAMILIES["llama"].build()
    PGSVDCompressor(PGSVDConfig(parameter_reduction=0.3, solver="svd")).compress(model, tokenizer=tokenizer)
    return model


def push_dense(tokenizer, name: str = "alice/dense", **changes) -> None:
    """Push a dense model and its tokenizer, as stock transformers does."""
    FAMILIES["llama"].build(**changes).push_to_hub(name)
    tokenizer.push_to_hub(name)


def compressed_from_hub(name: str = "alice/dense", reduction: float = 0.3, **options):
    """A model compressed while it is loaded from the Hub."""
    config = PGSVDConfig(parameter_reduction=reduction, solver="svd")
    return AutoModelForCausalLM.from_pretrained(name, quantization_config=config, **options)


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def logits_from(name: str, **options) -> torch.Tensor:
    return logits_of(AutoModelForCausalLM.from_pretrained(name, **options))


def card_of(hub: HubServer, name: str, revision: str = "main") -> ModelCard:
    return ModelCard(hub.files(name, revision)["README.md"].decode())


def put(hub: HubServer, name: str, files: dict[str, bytes], revision: str | None = None) -> None:
    """Change files as their owner may, on the website."""
    api = HfApi(endpoint=hub.endpoint, token="hf_alice")
    for path, data in files.items():
        api.upload_file(path_or_fileobj=data, path_in_repo=path, repo_id=name, revision=revision)


def weight_files(hub: HubServer, name: str) -> list[str]:
    return sorted(path for path in hub.files(name) if "safetensors" in path)


def test_push_then_stock_pipeline_by_name_and_revision(tmp_path, tokenizer, texts):
    FAMILIES["llama"].build().save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    with HubServer(USERS) as hub:
        arguments = (str(tmp_path / "dense"), str(tmp_path), json.dumps(texts))
        commit = run(hub, OUTPUTS + PUSH, *arguments, home=tmp_path / "alice", token="hf_alice").strip()
        check_pushed(hub)
        loads = [
            ({"model": "alice/tiny"}, "second"),
            ({"model": "alice/tiny", "revision": "dev"}, "second"),
            ({"model": "alice/tiny", "revision": "v1"}, "first"),
            ({"model": "alice/tiny", "revision": commit}, "first"),
            ({"model": "alice/shards"}, "first"),
            ({"model": "alice/secret", "token": "hf_alice"}, "first"),
            ({"model": "alice/secret", "token": "hf_bob"}, "alice/secret is not a local folder"),
            ({"model": "alice/secret"}, "alice/secret is not a local folder"),
        ]
        check_loaded(hub, loads, tmp_path)
        loads = [
            ({"model": "alice/tiny"}, "Could not load model alice/tiny"),
            ({"model": "alice/portable", "trust_remote_code": True}, "first"),
        ]
        check_loaded(hub, loads, tmp_path, WITHOUT_PACKAGE)
    assert hub.unhandled == []


def run(hub: HubServer, code: str, *arguments: str, home: Path, token: str | None = None) -> str:
    done = hub.run("-c", code, *arguments, home=home, token=token)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_loaded(hub: HubServer, loads: list[tuple[dict, str]], folder: Path, before: str = "") -> None:
    """An anonymous fresh process gets what was pushed, bit for bit, or the error that is expected."""
    paths = [folder / f"{index}.safetensors" for index in range(len(loads))]
    arguments = [json.dumps([str(path), options]) for path, (options, _) in zip(paths, loads, strict=True)]
    said = run(hub, before + OUTPUTS + LOAD, *arguments, home=folder / f"reader{len(before)}")
    pushed = {name: load_file(folder / f"{name}.safetensors") for name in ("first", "second")}
    assert not torch.equal(pushed["first"]["logits"], pushed["second"]["logits"])
    for path, (options, expected) in zip(paths, loads, strict=True):
        if expected not in pushed:
            assert f"{options} {expected}" in said
            continue
        found = load_file(path)
        for name, tensor in pushed[expected].items():
            assert torch.equal(found[name], tensor), (options, name)
        path.unlink()


def check_pushed(hub: HubServer) -> None:
    """What the process that pushed left on the Hub."""
    assert hub.files("alice/tiny").keys() == {*BESIDE_WEIGHTS, "model.safetensors"}
    assert any(method == "PUT" and path.startswith("/lfs-store/alice/tiny/") for method, path in hub.requests)
    card = card_of(hub, "alice/tiny")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "base_model": "alice/dense",
        "base_model_relation": "quantized",
        "pipeline_tag": "text-generation",
        "tags": ["pgsvd", "low-rank", "compressed"],
    }
    assert "`parameter_reduction = 0.6`" in card.text
    assert 'AutoModelForCausalLM.from_pretrained("alice/tiny")' in card.text
    assert "`parameter_reduction = 0.3`" in card_of(hub, "alice/tiny", "v1").text
    assert "auto_map" in json.loads(hub.files("alice/portable")["config.json"])
    assert "auto_map" not in json.loads(hub.files("alice/tiny", "v1")["config.json"])
    assert card_of(hub, "alice/tiny", "dev").data.tags == ["pgsvd", "low-rank", "compressed", "draft"]
    report = json.loads(hub.files("alice/tiny")["pgsvd_report.json"])
    assert report["config"]["parameter_reduction"] == 0.6
    assert 'from_pretrained("alice/secret")' in card_of(hub, "alice/secret").text
    assert len(weight_files(hub, "alice/shards")) > 3
    assert hub.files("alice/portable").keys() == {*BESIDE_WEIGHTS, "model.safetensors", "modeling_pgsvd.py"}
    assert "model.safetensors" not in hub.files("alice/shards")


def test_command_line_pushes_and_inspects(hub, tmp_path, tokenizer):
    push_dense(tokenizer, vocab_size=50_000)  # 12.8 MB, most of it embeddings
    hub.part_size = 4_000_000
    cli = ("-m", "optimum.commands.optimum_cli", "pgsvd")
    compress = ("compress", "--model", "alice/dense", "--parameter-reduction", "0.3", "--solver", "svd")
    push = ("--output", str(tmp_path / "out"), "--push-to-hub", "alice/big", "--private")
    done = hub.run(*cli, *compress, *push, home=tmp_path / "home", token="hf_alice")
    assert done.returncode == 0, done.stderr
    assert "pushed to alice/big" in done.stdout
    weights = hub.files("alice/big")["model.safetensors"]
    assert len(weights) > 10_000_000
    assert any(path.startswith("/api/complete_multipart/alice/big/") for _, path in hub.requests)
    assert hub.files("alice/big").keys() == {*BESIDE_WEIGHTS, "model.safetensors"}
    assert torch.equal(logits_from("alice/big"), logits_from(str(tmp_path / "out")))
    with pytest.raises(OSError, match="alice/big"):
        AutoModelForCausalLM.from_pretrained("alice/big", token="hf_bob")

    hub.bytes_sent.clear()
    done = hub.run(*cli, "inspect", "alice/big", home=tmp_path / "other", token="hf_alice")
    assert done.returncode == 0, done.stderr
    assert "14 low-rank layers, stored as factors; " in done.stdout
    assert sum(hub.bytes_sent.values()) < len(weights) // 10
    done = hub.run(*cli, "inspect", "alice/big", home=tmp_path / "anonymous")
    assert (done.returncode, "alice/big" in done.stderr) == (2, True), done.stderr


def test_sharded_push_replaces_a_single_file_and_the_reverse(hub, model):
    before = logits_of(model)
    model.push_to_hub("alice/tiny")
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.push_to_hub("alice/tiny", max_shard_size="30KB")
    assert "model.safetensors" not in hub.files("alice/tiny")
    assert torch.equal(logits_from("alice/tiny"), 2 * before)
    shards = weight_files(hub, "alice/tiny")
    model.push_to_hub("alice/tiny", max_shard_size="20KB")
    assert len(weight_files(hub, "alice/tiny")) > len(shards)
    assert not set(shards) & set(weight_files(hub, "alice/tiny")) - {"model.safetensors.index.json"}
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.push_to_hub("alice/tiny")
    assert weight_files(hub, "alice/tiny") == ["model.safetensors"]
    assert torch.equal(logits_from("alice/tiny"), 4 * before)


def test_saving_over_another_layout_of_shards(model, tmp_path):
    before = logits_of(model)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert torch.equal(logits_from(str(tmp_path)), 2 * before)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_from(str(tmp_path)), 4 * before)
    assert not list(tmp_path.glob("*index*"))
    model.save_pretrained(tmp_path, variant="v", max_shard_size="30KB")
    assert torch.equal(logits_from(str(tmp_path)), 4 * before)
    assert torch.equal(logits_from(str(tmp_path), variant="v"), 4 * before)


def test_save_pretrained_pushes_what_it_wrote_and_nothing_else(hub, model, tmp_path):
    folder = tmp_path / "tiny"
    (folder / "runs").mkdir(parents=True)
    (folder / "runs" / "secret.txt").write_text("mine")
    (folder / "optimizer.pt").write_bytes(b"state")
    model.save_pretrained(folder, push_to_hub=True, private=True, commit_message="First", max_shard_size="30KB")
    assert "model.safetensors" not in hub.files("alice/tiny")
    assert {path for path in hub.files("alice/tiny") if "safetensors" not in path} == BESIDE_WEIGHTS
    assert HfApi(endpoint=hub.endpoint, token="hf_alice").model_info("alice/tiny").private
    assert torch.equal(logits_from("alice/tiny"), logits_of(model))
    model.save_pretrained(folder, push_to_hub=True, repo_id="alice/other", commit_message="Again", revision="dev")
    assert hub.files("alice/other", "dev").keys() == {*BESIDE_WEIGHTS, "model.safetensors"}
    commits = HfApi(endpoint=hub.endpoint, token="hf_alice").list_repo_commits("alice/other", revision="dev")
    assert commits[0].title == "Again"
    assert hub.files("alice/other").keys() == {".gitattributes"}
    model.save_pretrained(folder, push_to_hub=True, revision="dev", repo_id="alice/other", variant="v")
    assert {"model.safetensors", "model.v.safetensors"} <= hub.files("alice/other", "dev").keys()


@pytest.mark.parametrize("how", ["push_to_hub", "save_pretrained"])
def test_edited_card_is_kept_and_ours_is_rewritten(hub, model, tmp_path, how):
    def push(**options):
        if how == "push_to_hub":
            return model.push_to_hub("tiny", **options)
        return model.save_pretrained(tmp_path / "out", push_to_hub=True, repo_id="tiny", **options)

    push()
    ours = hub.files("alice/tiny")["README.md"]
    put(hub, "alice/tiny", {"README.md": ours.replace(b"compressed with PGSVD", b"is stale")})
    push()
    assert hub.files("alice/tiny")["README.md"] == ours
    edited = ours.replace(MARKER.encode(), b"I measured it.").replace(b"tags:", b"license: mit\ntags:")
    put(hub, "alice/tiny", {"README.md": edited})
    push()
    assert hub.files("alice/tiny")["README.md"] == edited
    push(revision="dev")
    assert hub.files("alice/tiny", "dev")["README.md"] == edited
    put(hub, "alice/tiny", {"README.md": ours}, revision="dev")
    push(revision="dev")
    assert hub.files("alice/tiny", "dev")["README.md"] == ours
    push(tags=["pgsvd", "mine"])
    kept = card_of(hub, "alice/tiny")
    assert kept.data.tags == ["pgsvd", "low-rank", "compressed", "mine"]
    assert kept.data.license == "mit"
    assert "I measured it." in kept.text


def test_card_edited_on_disk_is_pushed_where_the_hub_has_none(hub, model, tmp_path):
    model.save_pretrained(tmp_path)
    path = tmp_path / "README.md"
    path.write_text(path.read_text().replace(MARKER, "I measured it."))
    model.save_pretrained(tmp_path, push_to_hub=True, repo_id="alice/tiny")
    assert hub.files("alice/tiny")["README.md"] == path.read_bytes()


def test_card_of_a_local_model_names_no_base(hub, model, tmp_path):
    model.add_model_tags(["w"])
    model.push_to_hub("alice/tiny", tags="x")
    data = card_of(hub, "alice/tiny").data
    assert data.base_model is None
    assert data.tags == ["pgsvd", "low-rank", "compressed", "w", "x"]
    assert str(tmp_path) not in hub.files("alice/tiny")["README.md"].decode()


def test_push_again_after_reloading_from_the_hub(hub, tokenizer):
    push_dense(tokenizer)
    first = compressed_from_hub()
    first.push_to_hub("alice/tiny", private=True)
    reloaded = AutoModelForCausalLM.from_pretrained("alice/tiny")
    reloaded.push_to_hub("alice/again")
    text = "w3 w14 w15 w9"
    for name in ("pgsvd_report.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        assert hub.files("alice/again")[name] == hub.files("alice/tiny")[name], name
    assert AutoTokenizer.from_pretrained("alice/again")(text) == tokenizer(text)
    assert torch.equal(logits_from("alice/again"), logits_of(first))


def test_base_model_is_still_named_after_reloading(hub, tokenizer, tmp_path):
    push_dense(tokenizer)
    compressed_from_hub().push_to_hub("alice/tiny")
    AutoModelForCausalLM.from_pretrained("alice/tiny").push_to_hub("alice/again")
    AutoModelForCausalLM.from_pretrained("alice/tiny").save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path).push_to_hub("alice/once_more")
    for name in ("alice/again", "alice/once_more"):
        assert card_of(hub, name).data.to_dict() == card_of(hub, "alice/tiny").data.to_dict()


def test_push_again_with_a_token_given_by_hand(hub, tokenizer, monkeypatch):
    push_dense(tokenizer)
    compressed_from_hub().push_to_hub("alice/tiny", private=True)
    monkeypatch.setenv("HF_TOKEN", "")
    reloaded = AutoModelForCausalLM.from_pretrained("alice/tiny", token="hf_alice")
    reloaded.push_to_hub("alice/again", token="hf_alice")
    for name in ("pgsvd_report.json", "tokenizer.json"):
        assert hub.files("alice/again")[name] == hub.files("alice/tiny")[name], name


def test_report_and_tokenizer_are_those_of_the_revision(hub, tokenizer):
    push_dense(tokenizer)
    compressed_from_hub(reduction=0.3).push_to_hub("alice/tiny")
    api = HfApi(endpoint=hub.endpoint, token="hf_alice")
    api.create_tag("alice/tiny", tag="v1")
    compressed_from_hub(reduction=0.6).push_to_hub("alice/tiny")
    api.delete_file("tokenizer.json", "alice/tiny")
    AutoModelForCausalLM.from_pretrained("alice/tiny", revision="v1").push_to_hub("alice/again")
    for name in ("pgsvd_report.json", "tokenizer.json", "model.safetensors"):
        assert hub.files("alice/again")[name] == hub.files("alice/tiny", "v1")[name], name


def test_model_loads_where_its_report_cannot_be_had(hub, model):
    model.push_to_hub("alice/tiny")
    for damaged in (b"{}", b"not JSON"):
        put(hub, "alice/tiny", {"pgsvd_report.json": damaged})
        loaded = AutoModelForCausalLM.from_pretrained("alice/tiny")
        assert torch.equal(logits_of(loaded), logits_of(model))
        assert loaded.pgsvd_report is None
    HfApi(endpoint=hub.endpoint, token="hf_alice").delete_file("pgsvd_report.json", "alice/tiny")
    assert torch.equal(logits_from("alice/tiny"), logits_of(model))


def test_only_the_owner_can_push(hub, model, monkeypatch):
    with pytest.raises(OSError, match="403"):
        model.push_to_hub("bob/tiny")
    with pytest.raises(OSError, match="401"):
        model.push_to_hub("alice/tiny", token=False)


def test_adapter_is_pushed_alone(hub, model, tmp_path):
    model.push_to_hub("alice/tiny")
    adapted = AutoModelForCausalLM.from_pretrained("alice/tiny")
    adapted.add_adapter(peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    adapted.push_to_hub("alice/lora")
    adapted.save_pretrained(tmp_path, push_to_hub=True, repo_id="alice/lora2")
    for name in ("alice/lora", "alice/lora2"):
        assert {"adapter_config.json", "adapter_model.safetensors"} <= hub.files(name).keys()
        assert not {"config.json", "pgsvd_report.json", "model.safetensors"} & hub.files(name).keys()
        assert torch.equal(logits_from(name), logits_of(adapted))


@pytest.mark.parametrize("way", ["--stream", "--no-stream"])
def test_command_line_pushes_an_elastic_checkpoint_as_it_was_written(way, hub, tmp_path, tokenizer):
    push_dense(tokenizer)
    cli = ("-m", "optimum.commands.optimum_cli", "pgsvd", "compress", "--model", "alice/dense", way, "--elastic")
    compress = ("--parameter-reduction", "0.05", "--solver", "svd", "--output", str(tmp_path / "out"))
    done = hub.run(*cli, *compress, "--push-to-hub", "alice/big", home=tmp_path / "home", token="hf_alice")
    assert done.returncode == 0, done.stderr
    assert "ordinary checkpoint" not in done.stderr
    pushed = hub.files("alice/big")
    assert pushed.keys() == {*BESIDE_WEIGHTS, "model.safetensors", ELASTIC_NAME}
    for name in ("model.safetensors", "config.json", "pgsvd_report.json", ELASTIC_NAME):
        assert pushed[name] == (tmp_path / "out" / name).read_bytes(), name


def test_elastic_model_is_pushed_with_its_side_file_and_cut_from_the_hub(hub, tokenizer):
    model = FAMILIES["llama"].build()
    PGSVDCompressor(PGSVDConfig(parameter_reduction=0.05, solver="svd", elastic=True)).compress(model, tokenizer)
    model.push_to_hub("alice/elastic", private=True)
    assert hub.files("alice/elastic").keys() == {*BESIDE_WEIGHTS, "model.safetensors", ELASTIC_NAME}
    hub.requests.clear()
    AutoModelForCausalLM.from_pretrained("alice/elastic")
    assert not any(ELASTIC_NAME in path for _, path in hub.requests)
    request, direct = PGSVDConfig(parameter_reduction=0.4), FAMILIES["llama"].build()
    PGSVDCompressor(PGSVDConfig(parameter_reduction=0.4, solver="svd")).compress(direct)
    smaller = AutoModelForCausalLM.from_pretrained("alice/elastic", quantization_config=request)
    torch.testing.assert_close(logits_of(smaller), logits_of(direct))
    smaller.push_to_hub("alice/elastic")
    assert hub.files("alice/elastic").keys() == {*BESIDE_WEIGHTS, "model.safetensors"}
    assert torch.equal(logits_from("alice/elastic"), logits_of(smaller))
