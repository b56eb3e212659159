"""How much predictions depend on each layer's outputs: against gradients that autograd gives, label by label."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack

import pytest
import reference
import torch
import transformers as hf
from models import ALL, FAMILIES, GROUPED, Batch, Family, generator, text_family
from torch import Tensor, nn
from toys import toy
from transformers.modeling_outputs import ModelOutput
from transformers.pytorch_utils import Conv1D

from optimum_pgsvd import CalibrationError, NonFiniteError, PGSVDCompressor, PGSVDConfig
from optimum_pgsvd.calibration import curvature, measure_curvature
from optimum_pgsvd.calibration.curvature import TEMPERATURE, categorical_surprise, normal_surprise, predicted, real
from optimum_pgsvd.factoring import curvature_of, loss_profiles
from optimum_pgsvd.factoring.request import Calibration
from optimum_pgsvd.modeling_pgsvd import low_rank_layers
from optimum_pgsvd.targets import LINEAR_TYPES, find_targets


def linears(model: nn.Module, outside: Iterable[str] = ("lm_head",)) -> dict[str, nn.Module]:
    """The linear layers of a model, some left out."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LINEAR_TYPES) and not n.endswith(tuple(outside))}


class Outputs(ExitStack):
    """Keeps what layers give in forward passes with gradients, call by call."""

    def __init__(self, layers: dict[str, nn.Module]):
        super().__init__()
        self.seen: dict[str, list[Tensor]] = {name: [] for name in layers}
        for name, layer in layers.items():
            self.callback(layer.register_forward_hook(self.after(name)).remove)

    def after(self, name: str):
        return lambda module, args, result: self.seen[name].append(result)


def smaller_side(layer: nn.Module, metric: Tensor) -> Tensor:
    """`B`, or for a tall layer `Wᵀ B W`."""
    weight = (layer.weight.T if isinstance(layer, Conv1D) else layer.weight).detach().double()
    return weight.T @ metric @ weight if weight.shape[0] > weight.shape[1] else metric


def distance(one: Tensor, other: Tensor) -> float:
    """Relative to the second."""
    return reference.norm(one.double() - other.double()) / reference.norm(other)


# The expectation over all labels


SMALL = {"hidden_size": 16, "intermediate_size": 24, "head_dim": 4, "vocab_size": 12}
LLAMA = text_family("small llama", hf.LlamaForCausalLM, hf.LlamaConfig, **(GROUPED | SMALL))
BERT = text_family("small bert", hf.BertModel, hf.BertConfig, **(GROUPED | SMALL))


def small_ids(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 12, (rows, columns), generator=generator(seed))


def copies(ids: Tensor, times: int) -> Batch:
    """Sequences of a batch have labels of their own: as many draws as copies."""
    return {"input_ids": ids.repeat(times, 1)}


def test_it_is_the_fisher_information_of_a_softmax():
    """800 draws of each sequence against all 12 labels of all 8 positions."""
    model, ids = LLAMA.build(), small_ids(2, 4)
    layers = linears(model)
    with Outputs(layers) as outputs:
        logits = model(ids, use_cache=False).logits / TEMPERATURE
    expected = reference.fisher_of_softmax(logits.reshape(-1, 12), [outputs.seen[name][0] for name in layers])
    found = measure_curvature(model, layers, [copies(ids, 100)] * 8)
    assert found.keys() == layers.keys()
    for (name, layer), metric in zip(layers.items(), expected, strict=True):
        assert distance(found[name] / 800, smaller_side(layer, metric)) < 0.12, name


def test_the_more_draws_the_closer():
    """As the square root of their number: an estimate that is biased would stop."""
    model, ids = LLAMA.build(), small_ids(2, 4)
    name = "model.layers.0.mlp.down_proj"
    layers = {name: model.get_submodule(name)}
    with Outputs(layers) as outputs:
        logits = model(ids, use_cache=False).logits / TEMPERATURE
    (expected,) = reference.fisher_of_softmax(logits.reshape(-1, 12), outputs.seen[name])
    few, many = (
        distance(measure_curvature(model, layers, [copies(ids, n)], seed=1)[name] / n, expected) for n in (40, 4000)
    )
    assert many < 0.04
    assert many < 0.3 * few


def test_a_model_without_logits_predicts_a_normal_mean():
    model, ids = BERT.build(), small_ids(1, 3)
    layers = linears(model, ["pooler.dense"])
    with Outputs(layers) as outputs:
        mean = model(ids).last_hidden_state
    expected = reference.fisher_of_normal(mean[0], [outputs.seen[name][0] for name in layers])
    found = measure_curvature(model, layers, [copies(ids, 100)] * 8)
    for (name, layer), metric in zip(layers.items(), expected, strict=True):
        assert distance(found[name] / 800, smaller_side(layer, metric)) < 0.15, name


def test_a_tower_without_logits_predicts_a_normal_mean():
    """The hidden states of all patches: the last layer's outputs say all of it."""
    clip = FAMILIES["clip"]
    model, batch = clip.build().vision_model, {"pixel_values": clip.batches(1)[0]["pixel_values"][:1]}
    name = "encoder.layers.1.mlp.fc2"
    layers = {name: model.get_submodule(name)}
    with Outputs(layers) as outputs:
        mean = model(**batch)[0]
    (expected,) = reference.fisher_of_normal(mean[0], outputs.seen[name])
    copies = {"pixel_values": batch["pixel_values"].repeat(50, 1, 1, 1)}
    found = measure_curvature(model, layers, [copies] * 12)[name] / 600
    # Of 3000 draws in 32 dimensions, equal in all: sqrt(32 / 3000) = 0.10.
    assert distance(found, expected) < 0.12


def test_labels_are_drawn_by_what_the_model_predicts():
    logits = torch.tensor([2.0, -1.0, 0.5, -30.0]).repeat(20000, 1).requires_grad_()
    categorical_surprise(logits, generator(0)).backward()
    probabilities = (logits[0].detach() / TEMPERATURE).softmax(-1)
    # The gradient at a row is (p − e(label)) / T.
    gradients = logits.grad * TEMPERATURE
    labels = (gradients - probabilities).argmin(-1)
    frequencies = labels.bincount(minlength=4) / len(labels)
    torch.testing.assert_close(frequencies, probabilities, rtol=0, atol=0.01)
    torch.testing.assert_close(gradients, probabilities - nn.functional.one_hot(labels, 4), rtol=0, atol=1e-6)


def test_a_single_logit_is_a_regression():
    mean = torch.zeros(20000, 1, requires_grad=True)
    categorical_surprise(mean, generator(0)).backward()
    assert float(mean.grad.mean()) == pytest.approx(0, abs=0.02)
    assert float(mean.grad.square().mean()) == pytest.approx(1, abs=0.03)
    again = torch.zeros(20000, 1, requires_grad=True)
    normal_surprise(again, generator(0)).backward()
    assert torch.equal(again.grad, mean.grad)


# The gradients themselves, for labels that are given


def fixed_surprise(outputs: ModelOutput, mask: Tensor | None, draws: torch.Generator) -> Tensor:
    """In the place of drawn labels: something that every prediction enters."""
    values = [v for k, v in outputs.items() if "logits" in k and isinstance(v, Tensor)] or [outputs[0]]
    return sum((v.float().square() * (1 + torch.arange(v.shape[-1]) % 3)).sum() for v in values) / 2


# One layer called several times, two streams with masks of their own, two towers, Conv1D, an image in a text.
KINDS = ["llama", "gpt2", "t5", "albert", "clip", "bloom", "whisper", "gpt_oss"]


@pytest.mark.parametrize("name", KINDS)
def test_it_is_the_second_moment_of_the_gradients(name: str, monkeypatch):
    monkeypatch.setattr(curvature, "surprise", fixed_surprise)
    model, batches = FAMILIES[name].build(), FAMILIES[name].batches(2)
    layers = {target: model.get_submodule(target) for target in find_targets(model, PGSVDConfig(tolerance=0.5)).names}
    assert any(isinstance(layer, Conv1D) for layer in layers.values()) == (name == "gpt2")
    expected = dict.fromkeys(layers, 0.0)
    for batch in batches:
        with Outputs(layers) as outputs:
            loss = fixed_surprise(model(**batch), None, generator(0))
        seen = [(layer, value) for layer, values in outputs.seen.items() for value in values]
        gradients = torch.autograd.grad(loss, [value for _, value in seen])
        for (layer, _), gradient in zip(seen, gradients, strict=True):
            expected[layer] += reference.outer_sum(gradient)
    found = measure_curvature(model, layers, batches)
    for layer, module in layers.items():
        metric = smaller_side(module, expected[layer])
        torch.testing.assert_close(found[layer].double(), metric, rtol=1e-3, atol=1e-5 * float(metric.abs().max()))


def test_tall_layers_are_measured_on_their_inputs():
    """And the sides are those that the factors are solved on."""
    model, batches = FAMILIES["llama"].build(), FAMILIES["llama"].batches(1)
    found = measure_curvature(model, linears(model), batches)
    sizes = {name.split(".")[-1]: len(metric) for name, metric in found.items()}
    assert sizes == {
        "q_proj": 32,
        "k_proj": 16,
        "v_proj": 16,
        "o_proj": 32,
        "gate_proj": 32,
        "up_proj": 32,
        "down_proj": 32,
    }


# Padding


def padded(ids: Tensor, number: int, left: bool = False) -> Batch:
    """With `number` more columns of ordinary tokens that are said to be padding."""
    more = small_ids(len(ids), number, seed=9)
    mask = [torch.ones_like(ids), torch.zeros_like(more)]
    parts = [ids, more]
    order = slice(None, None, -1) if left else slice(None)
    return {"input_ids": torch.cat(parts[order], 1), "attention_mask": torch.cat(mask[order], 1)}


@pytest.mark.parametrize("make", [LLAMA, BERT], ids=["llama", "bert"])
def test_padding_leaves_nothing(make: Family):
    """The real positions draw the same labels, and the others have no gradient."""
    model, ids = make.build(), small_ids(3, 5)
    layers = linears(model, ["lm_head", "pooler.dense"])
    expected = measure_curvature(model, layers, [{"input_ids": ids}])
    found = measure_curvature(model, layers, [padded(ids, 4)])
    for name in layers:
        assert distance(found[name], expected[name]) < 1e-4, name


def test_padding_of_an_encoder_decoder_leaves_nothing():
    family = FAMILIES["t5"]
    model, (batch,) = family.build(), family.batches(1)
    layers = linears(model)
    expected = measure_curvature(model, layers, [batch])
    wide = dict(batch)
    for ids, mask, more in (("input_ids", "attention_mask", 3), ("decoder_input_ids", "decoder_attention_mask", 6)):
        wide[mask] = torch.cat([torch.ones_like(batch[ids]), torch.zeros(4, more, dtype=torch.long)], 1)
        wide[ids] = torch.cat([batch[ids], torch.full((4, more), 7)], 1)
    found = measure_curvature(model, layers, [wide])
    for name in layers:
        assert distance(found[name], expected[name]) < 1e-4, name


def test_which_rows_are_real():
    values = torch.arange(12.0).reshape(2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    assert real(values, mask)[:, 0].tolist() == [0, 2, 8, 10]
    assert len(real(values, mask[:, :2])) == 6  # of other tokens
    assert len(real(values, None)) == 6
    batch = {"attention_mask": mask, "decoder_attention_mask": 1 - mask}
    assert predicted(FAMILIES["llama"].build(), batch) is mask
    assert predicted(FAMILIES["t5"].build(), batch) is batch["decoder_attention_mask"]
    # whatever else it is given: labels, say
    assert predicted(FAMILIES["t5"].build(), {"attention_mask": mask, "labels": mask}) is None


# The model, and what is drawn


def test_the_model_is_left_as_it_was():
    model = FAMILIES["gpt2"].build(resid_pdrop=0.5, attn_pdrop=0.5)
    model.train()
    model.transformer.h[0].eval()
    frozen = model.transformer.h[1].mlp.c_fc.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    training = {name: module.training for name, module in model.named_modules()}
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    batches = FAMILIES["gpt2"].batches(2)
    one = measure_curvature(model, linears(model), batches)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: module.training for name, module in model.named_modules()} == training
    assert [p for p in model.parameters() if not p.requires_grad] == [frozen]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks
    assert torch.is_grad_enabled()
    # Without dropout, and whatever the global generator's state.
    torch.rand(5)
    other = measure_curvature(model.eval(), linears(model), batches)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_seed_decides_on_the_labels():
    model, batches = FAMILIES["llama"].build(), FAMILIES["llama"].batches(2)
    one, same, other = (measure_curvature(model, linears(model), batches, seed) for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert min(distance(other[name], one[name]) for name in one) > 0.01


def test_batches_draw_labels_of_their_own():
    model, (batch,) = FAMILIES["llama"].build(), FAMILIES["llama"].batches(1)
    layers = linears(model)
    once, twice = measure_curvature(model, layers, [batch]), measure_curvature(model, layers, [batch, batch])
    assert min(distance(twice[name] - once[name], once[name]) for name in layers) > 0.01


def test_an_error_leaves_the_model_as_it_was():
    model = FAMILIES["llama"].build()
    message = r"^LlamaForCausalLM does not accept calibration batch 1 with the inputs pixels \(1,\): "
    with pytest.raises(CalibrationError, match=message):
        measure_curvature(model, linears(model), [*FAMILIES["llama"].batches(1), {"pixels": torch.zeros(1)}])
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert sum(len(module._forward_hooks) for module in model.modules()) == 0


def test_half_precision_models(monkeypatch):
    monkeypatch.setattr(curvature, "surprise", fixed_surprise)
    batches = FAMILIES["llama"].batches(2)
    model = FAMILIES["llama"].build().to(torch.bfloat16)
    found = measure_curvature(model, linears(model), batches)
    exact = measure_curvature(model.float(), linears(model), batches)
    assert all(metric.dtype == torch.float32 for metric in found.values())
    assert max(distance(found[name], exact[name]) for name in found) < 0.05


# What is refused


class Blind(nn.Module):
    """Its second layer runs, and nothing comes of it."""

    config = None

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> ModelOutput:
        logits = self.first(x)
        return ModelOutput(logits=logits + 0 * self.second(logits).sum())


@pytest.mark.parametrize("runs", [True, False], ids=["with no effect", "not at all"])
def test_a_layer_without_effect_is_refused(runs: bool):
    model = toy(Blind)
    layers = {"first": model.first, "second": model.second if runs else nn.Linear(3, 3)}
    message = r"^what the model predicts on the calibration set does not depend on second: list it in modules_to_not_c"
    with pytest.raises(CalibrationError, match=message):
        measure_curvature(model, layers, [{"x": torch.ones(2, 3, 6)}])
    assert list(measure_curvature(model, {"first": model.first}, [{"x": torch.ones(2, 3, 6)}])) == ["first"]


def test_gradients_that_are_not_finite_are_refused():
    model, batches = FAMILIES["llama"].build(), FAMILIES["llama"].batches(1)
    with torch.no_grad():
        model.lm_head.weight[3, 5] = float("nan")
    message = (
        r"^the gradients at the outputs of model.layers.0.self_attn.q_proj hold NaN or infinity; run the model in"
    )
    with pytest.raises(NonFiniteError, match=message):
        measure_curvature(model, linears(model), batches)


# What a layer counts for the loss


class Share(nn.Module):
    """Reads the first tokens only."""

    def __init__(self, tokens: int):
        super().__init__()
        self.dense, self.tokens = nn.Linear(6, 6), tokens

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x[:, : self.tokens])


class Experts(nn.Module):
    """A block of experts as modules: the tokens are shared out among them, whatever they say."""

    def __init__(self, *shares: int):
        super().__init__()
        self.shares = shares
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in shares)
        for expert in self.experts:
            expert.load_state_dict(self.experts[0].state_dict())

    def forward(self, x: Tensor) -> Tensor:
        parts = x.split(self.shares, dim=1)
        return torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)], dim=1)


class Mixture(nn.Module):
    config = None

    def __init__(self, *shares: int):
        super().__init__()
        self.layers = nn.ModuleList([Experts(*shares)])

    def can_generate(self) -> bool:
        return False

    def forward(self, x: Tensor) -> ModelOutput:
        for layer in self.layers:
            x = layer(x)
        return ModelOutput(logits=x)


def test_experts_that_see_fewer_tokens_count_as_much_less():
    """Equal experts on inputs of one distribution: what they count is as many tokens as they see, not the square."""
    model = toy(lambda: Mixture(40, 20, 10))
    batches = [{"x": torch.randn(16, 70, 6, generator=generator(seed))} for seed in range(8)]
    config = PGSVDConfig(parameter_reduction=0.3, allocation="loss", dataset=batches, num_samples=1000)
    targets, calibration = find_targets(model, config), Calibration(batches, None)
    found = curvature_of(model, targets, config, calibration)
    profiles = loss_profiles(model, targets, config, calibration, found)
    counts = [float(profile.values.square().sum()) for profile in profiles.values()]
    assert list(profiles) == [f"layers.0.experts.{i}" for i in range(3)]
    assert counts[0] / counts[1] == pytest.approx(2, rel=0.1)
    assert counts[1] / counts[2] == pytest.approx(2, rel=0.1)


# Every architecture


@pytest.mark.parametrize("family", ALL, ids=list(FAMILIES))
def test_every_family_is_compressed_by_loss_or_refused(family: Family):
    model, batches = family.build(), family.batches(3)
    config = PGSVDConfig(
        parameter_reduction=0.3, allocation="loss", objective="loss", dataset=batches, num_samples=1000
    )
    if family.name == "llava":  # takes features from before the last layer of its tower
        with pytest.raises(CalibrationError, match=r"does not depend on .*vision_tower.*layers\.1\.self_attn\.k_proj"):
            PGSVDCompressor(config).compress(model)
        assert not low_rank_layers(model)
        config.modules_to_not_convert = ["vision_tower.encoder.layers.1"]
    dense = family.build()
    report = PGSVDCompressor(config).compress(model)
    assert 0.3 <= report.parameter_reduction < 0.36
    assert low_rank_layers(model)
    batch = family.batches(1, seed=5)[0]
    with torch.no_grad():
        expected, found = dense(**batch)[0], model(**batch)[0]
    assert bool(torch.isfinite(found).all())
    # Better than an answer that does not depend on the inputs.
    constant = (expected - expected.mean(dim=tuple(range(expected.dim() - 1)))).norm()
    assert float((found - expected).norm()) < 1.1 * float(constant)
