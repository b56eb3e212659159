"""LoRA on a compressed model: train, save beside, reload, merge."""

import pytest
import torch
from models import FAMILIES
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, pipeline

from optimum_pgsvd import PGSVDCompressor, PGSVDConfig


peft = pytest.importorskip("peft")
IDS = torch.arange(3, 40)[None]


@pytest.fixture(params=["factors", "pivoted"])
def checkpoint(request, tmp_path, tokenizer):
    model = FAMILIES["llama"].build()
    config = PGSVDConfig(parameter_reduction=0.3, dataset=FAMILIES["llama"].batches(4), storage=request.param)
    PGSVDCompressor(config).compress(model, tokenizer=tokenizer)
    model.save_pretrained(tmp_path / "compressed")
    return tmp_path / "compressed"


def trained(checkpoint):
    """A LoRA model after some steps on one sequence, and its first and last loss."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model.eval(), losses


def test_all_linear_finds_both_factors_and_learns(checkpoint):
    model, losses = trained(checkpoint)
    adapted = {
        name.removesuffix(".lora_A.default") for name, _ in model.named_modules() if name.endswith("lora_A.default")
    }
    assert all(name.endswith((".left", ".right", ".basis", ".coefficients")) for name in adapted)
    assert len(adapted) == 2 * len(model.config.quantization_config.ranks)
    assert losses[-1] < 0.8 * losses[0]


def test_adapter_is_saved_beside_and_reloads_onto_the_compressed_model(checkpoint, tmp_path):
    model, _ = trained(checkpoint)
    logits = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path / "adapter")
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    reloaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), tmp_path / "adapter")
    assert torch.equal(reloaded.eval()(input_ids=IDS).logits, logits)
    native = AutoModelForCausalLM.from_pretrained(checkpoint)
    native.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(native.eval()(input_ids=IDS).logits, logits)
    native.save_pretrained(tmp_path / "native")
    assert not (tmp_path / "native" / "pgsvd_report.json").exists()
    assert not torch.equal(AutoModelForCausalLM.from_pretrained(checkpoint)(input_ids=IDS).logits, logits)


def test_adapter_folder_serves_a_pipeline(checkpoint, tmp_path, tokenizer):
    model, _ = trained(checkpoint)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    generator = pipeline("text-generation", model=str(tmp_path / "adapter"))
    assert torch.equal(generator.model.eval()(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_merged_model_stays_low_rank_and_saves(checkpoint, tmp_path):
    model, _ = trained(checkpoint)
    logits = model(input_ids=IDS).logits
    merged = model.merge_and_unload()
    # The adapter's product is added to the factors in float32.
    torch.testing.assert_close(merged(input_ids=IDS).logits, logits, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert reloaded.config.quantization_config.ranks == merged.config.quantization_config.ranks
    assert torch.equal(reloaded(input_ids=IDS).logits, merged(input_ids=IDS).logits)


def test_trainer_fine_tunes_the_factors_and_its_checkpoint_reloads(checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    before = model(input_ids=IDS).logits
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=2, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True,
        learning_rate=1e-2,
    )  # fmt: skip
    data = [{"input_ids": IDS[0], "labels": IDS[0]}] * 8
    Trainer(model=model, args=arguments, train_dataset=data).train()
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2")
    assert torch.equal(reloaded(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)
    assert not torch.equal(reloaded(input_ids=IDS).logits, before)
