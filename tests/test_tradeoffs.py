"""The benchmarks of quantized factors, of texts beside the calibration set, and of shared right factors."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")


@pytest.fixture
def toy(monkeypatch, scripts, dense, texts):
    """The only model that the benchmarks know."""
    import perplexity

    monkeypatch.setattr(perplexity, "cases", lambda: {"toy": (dense, texts[:48], texts[48:], 20)})
    return AutoModelForCausalLM.from_pretrained(dense)


def cells_of(script, tmp_path, *arguments):
    from cells import read_cells

    script.main([*arguments, "--result", str(tmp_path / "cells.json")])
    return read_cells(tmp_path / "cells.json")


def test_bytes_and_perplexity_of_unquantized_factors(toy, tmp_path, monkeypatch):
    import quantized

    from optimum_pgsvd import PGSVDConfig
    from optimum_pgsvd.targets import find_targets

    monkeypatch.setattr(quantized, "WINDOW", 16)
    arguments = ("--schemes", "bf16", "--reductions", "0.3", "--methods", "dense", "PGSVD", "best, no refinement")
    cells = {cell["method"]: cell for cell in cells_of(quantized, tmp_path, *arguments)}
    shapes = find_targets(toy, PGSVDConfig(0.5, solver="svd")).shapes
    parameters = sum(shape.dense_parameters for shape in shapes.values())
    assert cells["dense"]["bytes"] == 2 * parameters
    assert 0.6 * parameters < cells["PGSVD"]["bytes"] / 2 <= 0.7 * parameters
    indices = 4 * sum(shape.out_features for shape in shapes.values())
    assert 1.2 * parameters < cells["best, no refinement"]["bytes"] <= 1.4 * parameters + indices
    assert all(cell["quantization_error"] < 2**-7 for cell in cells.values())
    assert cells["dense"]["perplexity"] == pytest.approx(cells["best, no refinement"]["perplexity"], rel=0.1)
    assert cells_of(quantized, tmp_path, *arguments) == list(cells.values())


@pytest.mark.parametrize("gauge", ["as stored", "rotated", "equalised", "rotated, equalised"])
def test_gauges_keep_the_product(gauge):
    from quantized import gauged

    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(20, 6, generator=generator), torch.randn(6, 12, generator=generator)
    other = gauged(left, right, gauge)
    torch.testing.assert_close(other[0] @ other[1], left.double() @ right.double())
    assert torch.equal(other[0], left.double()) == (gauge == "as stored")
    if "equalised" in gauge:
        torch.testing.assert_close(other[0].abs().amax(dim=0), torch.ones(6, dtype=torch.float64))


def test_torchao_stores_the_bytes_that_are_counted():
    pytest.importorskip("torchao")
    from quantized import group_of, quantized

    weight = torch.randn(40, 43, generator=torch.Generator().manual_seed(0))
    assert [group_of(n) for n in (43, 64, 172, 94)] == [43, 32, 43, 47]
    for bits, scale in ((8, 4), (4, 2), (2, 2)):
        found, count = quantized(weight, f"int{bits}")
        assert count == 40 * 43 * bits / 8 + 40 * scale
        step = weight.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
        assert ((found - weight).abs() <= step).all()
        assert not torch.equal(found, weight)


def test_nf4_rounds_blocks_that_cross_rows():
    pytest.importorskip("bitsandbytes")
    from quantized import quantized

    weight = torch.randn(64, 172, generator=torch.Generator().manual_seed(0))
    found, count = quantized(weight, "nf4")
    assert count == 64 * 172 // 2 + 64 * 172 // 64 * 4
    assert 0.08 < (found - weight).norm() / weight.norm() < 0.1


def test_the_front_leaves_out_what_is_beaten():
    from quantized import front

    cells = [{"bytes": b, "perplexity": p} for b, p in ((3, 5.0), (1, 9.0), (2, 9.5), (3, 6.0), (4, 5.0), (5, 4.0))]
    assert front(cells) == [cells[1], cells[0], cells[5]]


def test_other_texts_are_measured_beside_the_dense_model(toy, tmp_path, texts, monkeypatch):
    import domains

    evaluation = dict(zip(domains.TEXTS, (texts[40:48], texts[48:56], texts[56:]), strict=True))
    calibration = {"own text": texts[:20], "other text": texts[20:40]}
    monkeypatch.setattr(domains, "texts", lambda data, name: (calibration, evaluation))
    monkeypatch.setattr(domains, "WINDOW", 16)
    monkeypatch.setenv("PGSVD_DATA", str(tmp_path))
    cells = cells_of(domains, tmp_path, "--windows", "8", "--seeds", "0", "--reductions", "0.2")
    assert [cell["method"] for cell in cells] == ["dense", *["PGSVD"] * 4, *["best, no refinement"] * 4]
    assert {cell["calibration_tokens"] for cell in cells[1:]} == {8 * 16}
    key = {"model": "toy", "method": "PGSVD", "reduction": 0.2}
    found = {c: domains.ratios(cells, {**key, "calibration": c}) for c in domains.CALIBRATIONS}
    assert len({row["stories"] for row in found.values()}) == 4
    one = cells[1]["perplexity"]["books"] / cells[0]["perplexity"]["books"]
    assert found["own text"]["books"] == pytest.approx(one)
    assert domains.regrets(cells).count("\n") == 5


def test_half_and_half_has_as_much_of_either(texts):
    from domains import datasets

    pools = {"own text": [torch.tensor([0])] * 9, "other text": [torch.tensor([1])] * 9}
    assert torch.cat(datasets(pools, seed=0, count=6)["half and half"]).tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_errors_of_shared_factors_are_those_of_what_is_stored(storage):
    from shared import SHARINGS, solve

    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(m, 10, generator=generator).double() for name, m in (("q", 12), ("k", 6), ("v", 6))}
    inputs = torch.randn(50, 10, generator=generator).double() * torch.logspace(0, -2, 10)
    gram, errors = inputs.T @ inputs, {}
    for sharing in SHARINGS:
        error, ranks, found = solve(weights, gram, 150, storage, sharing)
        residual = torch.cat([(found[name] - weights[name]) @ inputs.T for name in weights])
        assert error == pytest.approx(float(residual.square().sum()))
        parameters = 0
        for names, rank in ranks.items():
            stacked = torch.cat([found[name] for name in names])
            m, n = stacked.shape
            assert torch.linalg.matrix_rank(stacked) <= rank
            parameters += min(m * n, rank * (m + n - (rank if storage == "pivoted" else 0)))
        assert parameters <= 150
        errors[sharing] = error
    assert errors["best partition"] <= min(errors["apart"], errors["all shared"])


def test_sharing_pays_where_rows_span_one_space():
    from shared import solve

    generator = torch.Generator().manual_seed(0)
    common = torch.randn(3, 10, generator=generator).double()
    weights = {name: torch.randn(8, 3, generator=generator).double() @ common for name in ("gate", "up")}
    gram = torch.eye(10, dtype=torch.float64)
    shared, apart = (solve(weights, gram, 3 * (16 + 10), "factors", sharing)[0] for sharing in ("all shared", "apart"))
    assert shared == pytest.approx(0, abs=1e-9)
    assert apart > 1


def test_gradients_say_what_errors_of_outputs_cost(toy):
    from shared import gradients

    name, window = "model.layers.0.mlp.down_proj", torch.arange(3, 15)[None]
    layer = toy.get_submodule(name)
    moment = gradients(toy, [name], window)[name]
    shifts = torch.zeros(12, layer.out_features, requires_grad=True)
    hook = layer.register_forward_hook(lambda module, inputs, outputs: outputs + shifts)
    (toy(input_ids=window, labels=window).loss * 12).backward()
    hook.remove()
    expected = shifts.grad.T @ shifts.grad
    torch.testing.assert_close(moment.float(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert not layer._forward_hooks


def test_every_way_to_part_three_layers():
    from shared import partitions

    found = {frozenset(map(frozenset, parts)) for parts in partitions("qkv")}
    assert len(found) == 5
    assert frozenset(map(frozenset, ("q", "kv"))) in found


def test_shared_groups_of_a_model(toy, tmp_path):
    import shared

    cells = cells_of(shared, tmp_path, "--reductions", "0.4")
    assert len(cells) == 1 + len(shared.STORAGES) * len(shared.WEIGHTINGS) * len(shared.SHARINGS)
    assert [layer["kind"] for layer in cells[1]["layers"]] == ["q/k/v", "gate/up"] * 2
    by_sharing = {cell["sharing"]: shared.errors(cell) for cell in cells[1:4]}
    for kind, error in by_sharing["best partition"].items():
        assert 0 < error <= by_sharing["apart"][kind]
    assert all(cell["perplexity"] != cells[0]["perplexity"] for cell in cells[1:])
