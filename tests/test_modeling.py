"""LowRankLinear, its weight, and the way back to a dense layer."""

import copy
import io

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from optimum_pgsvd import LowRankLinear, modeling_pgsvd
from optimum_pgsvd.replace import replace_linear
from optimum_pgsvd.structures import LowRankFactors


def layer(bias: bool = True, transposed: bool = False) -> LowRankLinear:
    torch.manual_seed(0)
    return LowRankLinear(7, 5, 3, bias=bias, transposed=transposed)


@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_product_of_the_factors(bias):
    low_rank, x = layer(bias).double(), torch.randn(2, 4, 7, dtype=torch.float64)
    expected = x @ (low_rank.left.weight @ low_rank.right.weight).T + (low_rank.left.bias if bias else 0)
    torch.testing.assert_close(low_rank(x), expected, rtol=0, atol=1e-14)


def test_weight_knows_its_kind_and_is_multiplied_only_when_used(monkeypatch):
    low_rank = layer().to(torch.bfloat16)
    monkeypatch.setattr(LowRankLinear, "product", lambda self: pytest.fail("multiplied"))
    weight = low_rank.weight
    assert isinstance(weight, torch.Tensor)
    assert (weight.dtype, weight.device, tuple(weight.shape)) == (torch.bfloat16, torch.device("cpu"), (5, 7))


def test_weight_behaves_as_the_product_and_passes_gradients():
    low_rank, x = layer(), torch.randn(4, 7)
    torch.testing.assert_close(nn.functional.linear(x, low_rank.weight), x @ low_rank.product().T, rtol=0, atol=0)
    (low_rank.weight @ torch.ones(7)).sum().backward()
    expected = torch.ones(5, 1) @ (low_rank.right.weight @ torch.ones(7))[None]
    torch.testing.assert_close(low_rank.left.weight.grad, expected)


def test_weight_compiles_without_a_graph_break():
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


def test_copies_and_pickles():
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
