"""What the documents say can be run, runs."""

import doctest
import importlib
import re
import shutil
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).parent.parent
DEMO = ROOT / "examples" / "demo_model"


@pytest.mark.parametrize("module", ["config", "compressor"])
def test_docstring_examples_run(module):
    results = doctest.testmod(importlib.import_module(f"optimum_pgsvd.{module}"))
    assert results.attempted > 0
    assert results.failed == 0


def snippets(document):
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_readme_compresses_saves_reloads_and_generates(tmp_path, monkeypatch):
    """Every Python block of the README in order, on the demo model; only the push is left out."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "examples" / "demo_text" / "calibration.jsonl", tmp_path / "calibration.jsonl")
    code = "\n".join(snippets("README.md"))
    assert code.count("path/or/repo") == 1
    code = re.sub(r"model\.push_to_hub.*", "", code).replace("path/or/repo", str(DEMO))
    on_load, _, in_memory = code.partition("from optimum_pgsvd import PGSVDCompressor")
    names: dict = {}
    exec(compile(on_load, "README.md", "exec"), names)
    loaded = names["AutoModelForCausalLM"].from_pretrained("out")
    ids = torch.arange(5, 25)[None]
    assert torch.equal(loaded(input_ids=ids).logits, names["model"](input_ids=ids).logits)
    exec(prelude_of_a_model_in_memory(), names)
    exec(compile(f"from optimum_pgsvd import PGSVDCompressor{in_memory}", "README.md", "exec"), names)
    assert 0.2 <= names["report"].parameter_reduction < 0.21
    assert "LowRankLinear" in str(names["model"])


def prelude_of_a_model_in_memory():
    return (
        "from transformers import AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(DEMO)!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(DEMO)!r})\n"
        "texts = ['Once upon a time there was a cat.'] * 200\n"
    )


def test_the_theory_page_runs(tmp_path, monkeypatch):
    """Every Python block of the page in order, on the demo model."""
    monkeypatch.chdir(tmp_path)
    for name in ("calibration.jsonl", "heldout.jsonl"):
        shutil.copy(ROOT / "examples" / "demo_text" / name, tmp_path / name)
    names: dict = {}
    exec(compile("\n".join(snippets("docs/theory.md")).replace("path/or/repo", str(DEMO)), "theory.md", "exec"), names)
    assert 0 < names["share"] <= 1
    assert names["losses"]["pareto"] != names["losses"]["uniform"]
    assert len(names["als"].medians) == 6
    assert names["bounds"].bounds[0].bound > 0
    assert names["text"].shape[1] > 1
    assert "LowRankLinear" not in str(names["model"])


def test_the_vision_page_runs(tmp_path, monkeypatch):
    """Every Python block of the page in order, on a tiny CLIP; and a model compressed by each of its configs."""
    from models import FAMILIES
    from processors import clip_processor
    from test_processing import folder_of

    from optimum_pgsvd import PGSVDCompressor
    from optimum_pgsvd.modeling_pgsvd import low_rank_layers
    from optimum_pgsvd.towers import tower_of

    monkeypatch.chdir(tmp_path)
    FAMILIES["clip"].build().save_pretrained("dense")
    clip_processor().save_pretrained("dense")
    folder_of("beside", tmp_path / "pairs")
    names: dict = {}
    configs = []
    for snippet in snippets("docs/vision_language.md"):
        exec(compile(snippet.replace("openai/clip-vit-base-patch32", "dense"), "vision_language.md", "exec"), names)
        configs.append(names["config"])
    loaded = names["CLIPModel"].from_pretrained("out")
    assert set(low_rank_layers(loaded)) == set(low_rank_layers(names["model"])) != set()
    assert set(names["towers"]) == {"text_model", "vision_model"}
    by_hand, searched = [], []
    for config, found in ((configs[-2], by_hand), (configs[-1], searched)):
        report = PGSVDCompressor(config).compress(FAMILIES["clip"].build(), tokenizer=clip_processor())
        found += sorted({(tower_of(names["towers"], layer.name), layer.tolerance) for layer in report.layers})
    assert by_hand == [("text_model", 0.4), ("vision_model", 0.3)]
    assert [tower for tower, _ in searched] == ["text_model", "vision_model"]


def test_links_and_named_places_exist():
    for document in ("README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))):
        text = (ROOT / document).read_text(encoding="utf-8")
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert ((ROOT / document).parent / link).exists(), f"{document} links to {link}"


def test_every_symbol_of_the_method_page_is_in_the_code():
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    names = [name for row in rows for name in re.findall(r"`((?:[a-z_]+\.)+\w+(?:\.\w+)?)`", row.split("|")[-2])]
    assert len(names) > 8
    for name in names:
        module, *attributes = name.split(".")
        found = importlib.import_module(f"optimum_pgsvd.{module}")
        for attribute in attributes:
            found = getattr(found, attribute)


def test_configuration_page_names_every_field():
    from optimum_pgsvd import PGSVDConfig

    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    internal = {"format_version", "quant_method"}
    fields = set(PGSVDConfig(parameter_reduction=0.1).to_dict()) - internal
    assert not {field for field in fields if f"`{field}`" not in text}
