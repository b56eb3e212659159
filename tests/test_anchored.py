"""Anchored calibration: fitted to what the compressed blocks before really produce, aiming at the dense outputs."""

from __future__ import annotations

import pytest
import reference
import torch
from cases import gaussian
from models import FAMILIES, Family, each_family
from torch import nn

from optimum_pgsvd import CalibrationError, ConfigError, PGSVDCompressor, PGSVDConfig
from optimum_pgsvd.calibration import AnchoredRecorder, BlockWalk, GramRecorder
from optimum_pgsvd.linalg import anchored_weight, output_projection
from optimum_pgsvd.linalg.anchor import RIDGE
from optimum_pgsvd.modeling_pgsvd import low_rank_layers
from optimum_pgsvd.targets import find_targets


def streams(tokens: int = 200, features: int = 12):
    """A weight, dense inputs, and the inputs with an error that depends on them."""
    weight, dense = gaussian(9, features, seed=0), gaussian(tokens, features, seed=1)
    return weight, dense, dense @ (torch.eye(features) + 0.2 * gaussian(features, features, seed=2)).double()


def grams(dense, compressed, blend):
    anchor = blend * dense + (1 - blend) * compressed
    return compressed.T @ compressed, anchor.T @ compressed


# The algebra


@pytest.mark.parametrize("blend", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("tokens", [200, 7])
def test_anchored_weight_is_the_regularised_least_squares_solution(blend, tokens):
    weight, dense, compressed = streams(tokens)
    gram, cross = grams(dense, compressed, blend)
    expected = reference.anchored_weight(weight, dense, compressed, blend, RIDGE * float(gram.diagonal().mean()))
    torch.testing.assert_close(anchored_weight(weight, gram, cross), expected, rtol=1e-6, atol=1e-8)


def test_equal_inputs_leave_the_weight_as_it_is():
    weight, dense, _ = streams()
    gram = dense.T @ dense
    torch.testing.assert_close(anchored_weight(weight, gram, gram), weight, rtol=0, atol=1e-12)
    nothing = torch.zeros_like(gram)
    torch.testing.assert_close(anchored_weight(weight, nothing, nothing), weight, rtol=0, atol=0)


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_projecting_it_is_reduced_rank_regression(rank):
    weight, dense, compressed = streams()
    gram, cross = grams(dense, compressed, 1.0)
    left, right = output_projection(anchored_weight(weight, gram, cross), gram, rank)
    error = float((dense @ weight.T - compressed @ (left @ right).T).square().sum())
    least = reference.reduced_rank_regression_error(compressed, dense @ weight.T, rank)
    # The pull towards W costs RIDGE of what A differs from it, at most.
    assert least * (1 - 1e-9) <= error <= least * (1 + 10 * RIDGE)
    plain = output_projection(weight, dense.T @ dense, rank)
    assert error < 0.95 * float((dense @ weight.T - compressed @ (plain[0] @ plain[1]).T).square().sum())


# The two streams


def walked(family: Family, blend: float = 0.5):
    model, batches = family.build(), family.batches(2)
    targets = find_targets(model, PGSVDConfig(parameter_reduction=0.3))
    walk = BlockWalk(model, targets.blocks, batches)
    walk.capture([])
    return model, targets, walk


def layers_of(model, targets, block):
    return {t.name: model.get_submodule(t.name) for t in targets.found if t.block == block}


@each_family
def test_with_nothing_replaced_the_streams_are_one(family: Family):
    model, targets, walk = walked(family)
    _, _, dense_walk = walked(family)
    for block in walk.blocks:
        recorder = AnchoredRecorder(layers_of(model, targets, block), walk.padding.rows, None, 0.5)
        plain = GramRecorder(layers_of(dense_walk.model, targets, block), dense_walk.padding.rows)
        with recorder:
            walk.run_anchored(block, recorder)
        with plain:
            dense_walk.run(block)
        walk.advance(block)
        for name, layer in recorder.layers.items():
            assert torch.equal(recorder.gram(name), plain.gram(name))
            # (β x + (1 − β) x)ᵀ x in float32 against xᵀ x
            weight = torch.eye(layer_features(layer), dtype=torch.float64)
            torch.testing.assert_close(recorder.goal(name, weight), weight, rtol=0, atol=1e-2)
    assert not any(walk._outputs)
    assert not any(walk._compressed)


def layer_features(layer):
    return layer.in_features if isinstance(layer, nn.Linear) else layer.weight.shape[0]


def test_later_blocks_see_what_the_changed_ones_put_out():
    family = FAMILIES["llama"]
    model, targets, walk = walked(family)
    first, second = walk.blocks
    dense_inputs = inputs_of(model, second, walk.batches)
    recorder = AnchoredRecorder(layers_of(model, targets, first), walk.padding.rows, None, 0.5)
    with recorder:
        walk.run_anchored(first, recorder)
    with torch.no_grad():
        model.get_submodule(first).mlp.down_proj.weight.mul_(0.5)
    walk.advance(first)
    changed_inputs = inputs_of(model, second, walk.batches)
    for kept, expected in ((walk._outputs, dense_inputs), (walk._compressed, changed_inputs)):
        for outputs, tensor in zip(kept, expected, strict=True):
            assert any(torch.equal(value, tensor) for value in outputs.values())
    assert not torch.equal(dense_inputs[0], changed_inputs[0])


@torch.no_grad()
def inputs_of(model, block, batches):
    seen = []
    hook = model.get_submodule(block).register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    for batch in batches:
        model(**batch, use_cache=False)
    hook.remove()
    return seen


def test_rows_that_cannot_be_paired_are_refused():
    layer = nn.Linear(4, 4)
    recorder = AnchoredRecorder({"experts.0": layer}, lambda x: x.reshape(-1, 4), None, 0.5)
    with recorder:
        layer(torch.ones(3, 4))
        recorder.pairing = "compressed"
        with pytest.raises(CalibrationError, match=r"experts\.0 sees 3 rows in the dense model and 2 after"):
            layer(torch.ones(2, 4))


# End to end


@each_family
def test_the_first_block_is_fitted_as_in_parallel_and_later_ones_are_not(family: Family):
    """Nothing was compressed before the first block: its two inputs are one."""
    models = {}
    for calibration in ("parallel", "anchored"):
        batches = family.batches(6)
        models[calibration] = family.build()
        config = PGSVDConfig(parameter_reduction=0.4, dataset=batches, num_samples=24, calibration=calibration)
        report = PGSVDCompressor(config).compress(models[calibration])
        assert report.parameter_reduction >= 0.4
        assert all(0 <= layer.activation_error < 1 for layer in report.layers)
    differences = {}
    for name, layer in low_rank_layers(models["parallel"]).items():
        other, product = models["anchored"].get_submodule(name).product(), layer.product()
        differences[name] = ((other - product).norm() / product.norm()).item()
    block = find_targets(family.build(), PGSVDConfig(parameter_reduction=0.4)).blocks[0]
    first = {name: difference for name, difference in differences.items() if name.startswith(f"{block}.")}
    # The two inputs are blended in float32, and that rounding is divided by RIDGE.
    assert max(first.values()) < 1e-2
    later = [difference for name, difference in differences.items() if name not in first]
    assert not later or max(later) > 3e-2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"calibration": "sequential"}, "calibration='sequential' is not known; known are parallel, anchored"),
        ({"calibration": "anchored", "solver": "svd"}, "no meaning with solver='svd'"),
        ({"blend": 1.5}, r"blend=1.5 is outside \[0, 1\]"),
        ({"blend": None}, r"blend=None is outside \[0, 1\]"),
    ],
)
def test_what_has_no_meaning_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        PGSVDConfig(parameter_reduction=0.2, **fields)
