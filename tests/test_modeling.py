"""The layers of low rank, their weight, and the way back to a dense layer."""

import copy
import io

import pytest
import reference
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from optimum_pgsvd import LowRankLinear, PivotedLinear, modeling_pgsvd
from optimum_pgsvd.replace import replace_linear
from optimum_pgsvd.structures import LowRankFactors, PivotedFactors


def layer(bias: bool = True, transposed: bool = False) -> LowRankLinear:
    torch.manual_seed(0)
    return LowRankLinear(7, 5, 3, bias=bias, transposed=transposed)


def pivoted(bias: bool = True, transposed: bool = False, rank: int = 3, dtype=torch.float32) -> PivotedLinear:
    """Rows 4 and 0 of five in the basis first, in no order."""
    torch.manual_seed(0)
    made = PivotedLinear(7, 5, rank, bias=bias, transposed=transposed, dtype=dtype)
    made.order = torch.tensor([1, 3, 2, 4, 0], dtype=torch.int32)
    if bias:
        nn.init.normal_(made.bias)
    return made


each_storage = pytest.mark.parametrize("layer", [layer, pivoted], ids=["factors", "pivoted"])


@pytest.mark.parametrize("rank", [3, 5])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (2, 7), (2, 4, 7)])
@pytest.mark.parametrize("many", [1, 10, 10**6])
def test_pivoted_forward_puts_every_row_in_its_place(shape, bias, rank, many, monkeypatch):
    monkeypatch.setattr(modeling_pgsvd, "MANY_OUTPUTS", many)
    low_rank, x = pivoted(bias, rank=rank, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    basis = low_rank.basis.weight
    coefficients = basis[:0, :0] if low_rank.coefficients is None else low_rank.coefficients.weight
    assert (low_rank.coefficients is None) == (rank == 5)
    weight = reference.row_by_row(basis, coefficients, low_rank.order)
    expected = x @ weight.T + (low_rank.bias if bias else 0)
    torch.testing.assert_close(low_rank(x), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(low_rank.product(), weight, rtol=0, atol=1e-14)
    torch.testing.assert_close(low_rank.to_dense(torch.float64)(x), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("many", [1, 10**6])
def test_pivoted_parameters_are_as_many_as_they_should_be_and_all_get_gradients(many, monkeypatch):
    monkeypatch.setattr(modeling_pgsvd, "MANY_OUTPUTS", many)
    low_rank = pivoted()
    assert {name: tuple(p.shape) for name, p in low_rank.state_dict().items()} == {
        "bias": (5,), "order": (5,), "basis.weight": (3, 7), "coefficients.weight": (2, 3),
    }  # fmt: skip
    x = torch.randn(4, 7)
    low_rank(x).square().sum().backward()
    dense = low_rank.to_dense(torch.float32)
    dense(x).square().sum().backward()
    torch.testing.assert_close(low_rank.bias.grad, dense.bias.grad)
    places = low_rank.order.argsort()
    of_rows = dense.weight.grad[places]
    expected = of_rows[:3] + low_rank.coefficients.weight.T @ of_rows[3:]
    torch.testing.assert_close(low_rank.basis.weight.grad, expected)
    torch.testing.assert_close(low_rank.coefficients.weight.grad, of_rows[3:] @ low_rank.basis.weight.T)


def test_pivoted_factors_replace_a_linear_and_a_conv1d():
    x = torch.randn(3, 6)
    basis, coefficients = torch.randn(2, 6), torch.randn(2, 2)
    factors = PivotedFactors(basis.double(), coefficients.double(), torch.tensor([3, 0, 2, 1], dtype=torch.int32))
    for dense in (nn.Linear(6, 4), Conv1D(4, 6)):
        model = nn.Sequential(dense)
        replaced = replace_linear(model, "0", factors)
        assert model[0] is replaced
        assert replaced.bias is dense.bias
        assert {p.dtype for p in replaced.parameters()} == {torch.float32}
        weight = reference.row_by_row(basis, coefficients, factors.order).float()
        torch.testing.assert_close(model(x), x @ weight.T + dense.bias)
        back = replaced.to_dense(torch.float32)
        assert type(back) is type(dense)
        torch.testing.assert_close(back(x), model(x))


def test_the_order_stays_an_index_whatever_the_dtype():
    for cast in (pivoted().half(), pivoted().to(torch.bfloat16), pivoted().double()):
        assert cast.order.dtype == torch.int32
        assert cast(torch.randn(2, 7, dtype=cast.basis.weight.dtype)).dtype == cast.basis.weight.dtype


@each_storage
def test_layers_export(layer):
    low_rank, x = layer(), torch.randn(2, 7)
    exported = torch.export.export(low_rank, (x,)).module()
    torch.testing.assert_close(exported(x), low_rank(x))


@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_product_of_the_factors(bias):
    low_rank, x = layer(bias).double(), torch.randn(2, 4, 7, dtype=torch.float64)
    expected = x @ (low_rank.left.weight @ low_rank.right.weight).T + (low_rank.left.bias if bias else 0)
    torch.testing.assert_close(low_rank(x), expected, rtol=0, atol=1e-14)


@each_storage
def test_weight_knows_its_kind_and_is_multiplied_only_when_used(layer, monkeypatch):
    low_rank = layer().to(torch.bfloat16)
    monkeypatch.setattr(type(low_rank), "product", lambda self: pytest.fail("multiplied"))
    weight = low_rank.weight
    assert isinstance(weight, torch.Tensor)
    assert (weight.dtype, weight.device, tuple(weight.shape)) == (torch.bfloat16, torch.device("cpu"), (5, 7))


@each_storage
def test_weight_behaves_as_the_product(layer):
    low_rank, x = layer(transposed=True), torch.randn(4, 7)
    torch.testing.assert_close(x @ low_rank.weight, x @ low_rank.product(), rtol=0, atol=0)
    assert tuple(low_rank.weight.shape) == (7, 5)


def test_weight_behaves_as_the_product_and_passes_gradients():
    low_rank, x = layer(), torch.randn(4, 7)
    torch.testing.assert_close(nn.functional.linear(x, low_rank.weight), x @ low_rank.product().T, rtol=0, atol=0)
    (low_rank.weight @ torch.ones(7)).sum().backward()
    expected = torch.ones(5, 1) @ (low_rank.right.weight @ torch.ones(7))[None]
    torch.testing.assert_close(low_rank.left.weight.grad, expected)


@each_storage
def test_weight_compiles_without_a_graph_break(layer):
    low_rank, x = layer(), torch.randn(2, 7)
    compiled = torch.compile(lambda x: low_rank(x) * low_rank.weight.sum(), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), low_rank(x) * low_rank.product().sum())


def test_full_rank_reproduces_a_linear_and_a_conv1d():
    x = torch.randn(3, 6)
    for dense in (nn.Linear(6, 4), Conv1D(4, 6)):
        nn.init.normal_(dense.weight)
        model = nn.Sequential(copy.deepcopy(dense))
        weight = dense.weight.T if isinstance(dense, Conv1D) else dense.weight
        replace_linear(model, "0", LowRankFactors(torch.eye(4, dtype=torch.float64), weight.detach().double()))
        # The same products, summed in the same order up to the identity's exact zeros.
        torch.testing.assert_close(model(x), dense(x), rtol=1e-6, atol=1e-6)
        back = model[0].to_dense(torch.float32)
        assert type(back) is type(dense)
        torch.testing.assert_close(back.weight, dense.weight, rtol=0, atol=0)
        torch.testing.assert_close(back.bias, dense.bias, rtol=0, atol=0)


def test_replacing_keeps_bias_dtype_and_requires_grad():
    model = nn.Sequential(nn.Linear(6, 4, dtype=torch.float16).requires_grad_(False))
    bias = model[0].bias
    replaced = replace_linear(model, "0", LowRankFactors(torch.randn(4, 2).double(), torch.randn(2, 6).double()))
    assert model[0] is replaced
    assert replaced.bias is bias
    assert {p.dtype for p in replaced.parameters()} == {torch.float16}
    assert not any(p.requires_grad for p in replaced.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_error_is_that_of_plain_matrix_products(dtype):
    torch.manual_seed(0)
    low_rank, x = LowRankLinear(64, 48, 16, bias=False).double(), torch.randn(32, 64, dtype=torch.float64)
    exact = low_rank(x)
    plain = (x.to(dtype) @ low_rank.right.weight.to(dtype).T) @ low_rank.left.weight.to(dtype).T
    error = (low_rank.to(dtype)(x.to(dtype)).double() - exact).norm()
    # Law 7: twice the plain computation's error, plus one rounding of the output.
    assert error <= 2 * (plain.double() - exact).norm() + torch.finfo(dtype).eps * exact.norm()
    assert error < 0.05 * exact.norm()


@each_storage
def test_copies_and_pickles(layer):
    low_rank, x = layer(), torch.randn(2, 7)
    buffer = io.BytesIO()
    torch.save(low_rank, buffer)
    buffer.seek(0)
    for clone in (copy.deepcopy(low_rank), torch.load(buffer, weights_only=False)):
        assert torch.equal(clone(x), low_rank(x))


def test_module_gives_stock_classes_under_its_own_name_and_nothing_else():
    made = modeling_pgsvd.LlamaForCausalLM
    assert made.__module__ == modeling_pgsvd.__name__
    assert made._auto_class == "AutoModelForCausalLM"
    assert made is modeling_pgsvd.LlamaForCausalLM
    with pytest.raises(AttributeError, match="no attribute 'LlamaConfig'"):
        _ = modeling_pgsvd.LlamaConfig


def test_newer_formats_are_refused_with_the_remedy():
    with pytest.raises(RuntimeError, match="format 99.*pip install -U optimum-pgsvd"):
        modeling_pgsvd.LowRankConfig({}, format_version=99)
