"""The loss that a model computes itself, and its gradients at each layer."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from models import FAMILIES, PAD, Batch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_pgsvd import CalibrationError, NonFiniteError, PGSVDConfig
from optimum_pgsvd.analysis import mean_loss, measure_gradients
from optimum_pgsvd.calibration import loss_of
from optimum_pgsvd.targets import find_targets


def padded(batch: Batch, lengths: list[int]) -> Batch:
    ids, mask = batch["input_ids"].clone(), torch.ones_like(batch["input_ids"])
    for row, length in enumerate(lengths):
        ids[row, length:], mask[row, length:] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    return model(**batch).logits


def targets_of(model: PreTrainedModel) -> dict:
    return {name: model.get_submodule(name) for name in find_targets(model, PGSVDConfig(tolerance=0.0)).names}


# Losses


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_language_model_is_asked_for_the_next_token(name: str) -> None:
    model, batch = FAMILIES[name].build(), FAMILIES[name].batches(1)[0]
    expected = reference.next_token_loss(logits(model, batch), batch["input_ids"])
    assert float(loss_of(model, batch).detach()) == pytest.approx(expected, rel=1e-5)


def test_padding_is_not_predicted_and_batches_count_by_what_they_predict() -> None:
    """The mean over two batches of unlike length is that over all their tokens."""
    model, (first, second) = FAMILIES["llama"].build(), FAMILIES["llama"].batches(2)
    short = padded(first, [5, 3, 1, 7])
    terms = [
        (reference.next_token_loss(logits(model, short), short["input_ids"], short["attention_mask"]), 4 + 2 + 0 + 6),
        (reference.next_token_loss(logits(model, second), second["input_ids"]), second["input_ids"][:, 1:].numel()),
    ]
    expected = math.fsum(loss * count for loss, count in terms) / sum(count for _, count in terms)
    assert mean_loss(model, [short, second]) == pytest.approx(expected, rel=1e-5)
    assert abs(mean_loss(model, [short, second]) - (terms[0][0] + terms[1][0]) / 2) > 1e-3


def test_labels_of_a_batch_are_used() -> None:
    model, batch = FAMILIES["llama"].build(), FAMILIES["llama"].batches(1)[0]
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, 4] = 7
    scores = logits(model, batch)[:, 3].double()
    expected = float((scores.logsumexp(-1) - scores[:, 7]).mean())
    assert float(loss_of(model, {**batch, "labels": labels}).detach()) == pytest.approx(expected, rel=1e-5)


def test_images_and_texts_are_contrasted() -> None:
    model, batch = FAMILIES["clip"].build(), FAMILIES["clip"].batches(1)[0]
    with torch.no_grad():
        similarities = model(**batch).logits_per_text
    expected = reference.contrastive_loss(similarities)
    assert mean_loss(model, [batch]) == pytest.approx(expected, rel=1e-5)


def test_a_loss_in_half_precision_is_refused() -> None:
    """CLIP's is in the dtype of the model, and its changes would be steps of that; a language model's is not."""
    clip, batch = FAMILIES["clip"].build().bfloat16(), FAMILIES["clip"].batches(1)[0]
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    message = r"^CLIPModel computes its loss in torch.bfloat16, in steps of 0.008 of it, .* \(--dtype float32\)"
    with pytest.raises(CalibrationError, match=message):
        mean_loss(clip, [batch])
    with pytest.raises(CalibrationError, match=message):
        measure_gradients(clip, targets_of(clip), [batch])
    llama, batch = FAMILIES["llama"].build().bfloat16(), FAMILIES["llama"].batches(1)[0]
    assert mean_loss(llama, [batch]) == float(loss_of(llama, batch).detach())


@pytest.mark.parametrize("name", ["bert", "albert"])
def test_a_model_without_a_loss_on_its_inputs_is_told(name: str) -> None:
    model, batch = FAMILIES[name].build(), FAMILIES[name].batches(1)[0]
    with pytest.raises(CalibrationError, match="gives no loss for calibration batch 0, which has no labels but inp"):
        mean_loss(model, [batch])


def test_texts_of_one_token_predict_nothing() -> None:
    model, batch = FAMILIES["llama"].build(), FAMILIES["llama"].batches(1)[0]
    with pytest.raises(CalibrationError, match="nothing to predict"):
        mean_loss(model, [padded(batch, [1, 1, 1, 1])])


# Gradients


def by_autograd(model: PreTrainedModel, batches: list[Batch], name: str) -> tuple[Tensor, Tensor]:
    """`∂L/∂Y` of all tokens and `∂L/∂W (m, n)`, of the mean over all batches at once."""
    seen: list[Tensor] = []
    layer = model.get_submodule(name)
    hook = layer.register_forward_hook(lambda module, args, out: seen.append(out))
    counts = [batch["input_ids"][:, 1:].numel() for batch in batches]
    losses = [model(**batch, labels=batch["input_ids"]).loss for batch in batches]
    hook.remove()
    total = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    *outputs, weight = torch.autograd.grad(total, [*seen, layer.weight])
    return torch.cat([out.reshape(-1, out.shape[-1]) for out in outputs]), weight


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradients_are_those_of_the_mean_over_all_batches(name: str) -> None:
    """Batches of unlike size among them; and outputs come first, in `Conv1D` too."""
    model = FAMILIES[name].build().double()
    first, second = FAMILIES[name].batches(2)
    batches = [{"input_ids": first["input_ids"][:2, :9]}, second]
    layers = targets_of(model)
    found = measure_gradients(model, layers, batches)
    assert found.loss == pytest.approx(mean_loss(model, batches), rel=1e-6)
    for layer in layers:
        outputs, weight = by_autograd(model, batches, layer)
        assert found.outputs[layer] == pytest.approx(reference.norm(outputs), rel=1e-9)
        expected = weight.T if name == "gpt2" else weight
        torch.testing.assert_close(found.weights[layer], expected, rtol=1e-9, atol=1e-15)


def test_a_small_step_changes_the_loss_by_the_gradient() -> None:
    model, batches = FAMILIES["llama"].build().double(), FAMILIES["llama"].batches(2)
    layers = targets_of(model)
    found = measure_gradients(model, layers, batches)
    for name in list(layers)[::3]:
        weight, step = layers[name].weight, 1e-3 * found.weights[name] / found.weights[name].norm()
        with torch.no_grad():
            weight += step
            above = mean_loss(model, batches)
            weight -= 2 * step
            below = mean_loss(model, batches)
            weight += step
        # transformers computes losses in float32
        assert above - below == pytest.approx(2e-3 * float(found.weights[name].norm()), rel=1e-2, abs=2e-6)


def test_the_model_is_left_as_it_was() -> None:
    model, batches = FAMILIES["llama"].build().train(), FAMILIES["llama"].batches(1)
    layers = targets_of(model)
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
        parameter.grad = torch.ones_like(parameter) if number % 4 == 0 else None
    before = {n: (p.requires_grad, p.grad, p.detach().clone()) for n, p in model.named_parameters()}
    measure_gradients(model, layers, batches)
    for name, parameter in model.named_parameters():
        trained, gradient, value = before[name]
        assert parameter.requires_grad == trained
        assert parameter.grad is gradient
        assert torch.equal(parameter, value)
    assert model.training
    assert not any(layer._forward_hooks for layer in layers.values())


def test_a_layer_that_the_loss_does_not_depend_on_is_named() -> None:
    model, batches = FAMILIES["llama"].build(), FAMILIES["llama"].batches(1)
    torch.nn.init.zeros_(model.model.layers[1].mlp.down_proj.weight)
    with pytest.raises(CalibrationError, match=r"does not depend on model\.layers\.1\.mlp\.gate_proj: list it in"):
        measure_gradients(model, targets_of(model), batches)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("inf"))
    with pytest.raises(NonFiniteError, match="hold NaN or infinity"):
        measure_gradients(model, targets_of(model), batches)


def test_an_expert_that_no_token_reaches_is_named() -> None:
    model, batches = FAMILIES["llama"].build(), FAMILIES["llama"].batches(1)
    unused = {**targets_of(model), "apart": torch.nn.Linear(4, 4)}
    with pytest.raises(CalibrationError, match="does not depend on apart"):
        measure_gradients(model, unused, batches)
