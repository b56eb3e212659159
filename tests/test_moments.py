"""Second moments: as exact as the rows allow, whatever the size, the dtype and the order."""

from __future__ import annotations

import pytest
import torch
from cases import gaussian
from torch import Tensor

from optimum_pgsvd.calibration.moments import SecondMoment, lossless_products, precise
from optimum_pgsvd.linalg.products import PANEL, mirror_upper


HALF = (torch.bfloat16, torch.float16)


def moment(*pieces: Tensor) -> Tensor:
    total = SecondMoment()
    for rows in pieces:
        total.add(rows)
    return total.value()


def whole_numbers(*shape: int, seed: int = 0, largest: int = 16) -> Tensor:
    """Float32, of which sums of a few thousand products are exact in float32, though not in half precision."""
    source = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=source).float()


def wide_ranging(tokens: int, features: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Rows whose features differ in size by a factor of 1e4 and have a mean, as activations do."""
    sizes = torch.logspace(-2, 2, features, dtype=torch.float64)
    return ((gaussian(tokens, features, seed=seed) + 0.5) * sizes).to(dtype)


# Panels


SIZES = (1, 7, PANEL - 1, PANEL, PANEL + 1, 2 * PANEL + 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize("size", SIZES)
def test_any_size(size: int, dtype: torch.dtype) -> None:
    x = whole_numbers(30, size)
    assert torch.equal(moment(x.to(dtype)).double(), (x.T @ x).double())


@pytest.mark.parametrize("size", SIZES)
def test_it_is_symmetric_to_the_last_bit(size: int) -> None:
    value = moment(gaussian(40, size, seed=0).float(), gaussian(11, size, seed=1).float())
    assert torch.equal(value, value.T)


@pytest.mark.parametrize("size", SIZES)
def test_only_what_is_above_the_diagonal_is_mirrored(size: int) -> None:
    matrix = gaussian(size, size, seed=0)
    upper = matrix.triu()
    mirror_upper(matrix)
    assert torch.equal(matrix, upper + matrix.triu(1).T)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize("size", [5, PANEL + 1])
def test_rows_may_be_added_after_a_look(size: int, dtype: torch.dtype) -> None:
    pieces = [whole_numbers(10, size, seed=seed).to(dtype) for seed in range(3)]
    total = SecondMoment()
    for i, rows in enumerate(pieces):
        total.add(rows)
        whole = torch.cat(pieces[: i + 1]).double()
        for _ in range(2):
            assert torch.equal(total.value().double(), whole.T @ whole)


def test_no_rows_count_for_nothing() -> None:
    x = whole_numbers(4, 6)
    assert torch.equal(moment(x[:0], x, x[:0]), (x.T @ x).double())
    assert torch.equal(moment(x[:0]), torch.zeros(6, 6, dtype=torch.float64))
    with pytest.raises(ValueError, match="^no rows were added$"):
        SecondMoment().value()


def test_rows_are_not_changed_and_not_held() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = whole_numbers(4, 6).to(dtype)
        total = SecondMoment()
        total.add(x)
        assert torch.equal(x, whole_numbers(4, 6).to(dtype))
        x.zero_()
        assert total.value().norm() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
def test_rows_of_any_strides(dtype: torch.dtype) -> None:
    x = whole_numbers(12, 10).to(dtype)
    expected = moment(x)
    assert torch.equal(moment(x.T.contiguous().T), expected)
    assert torch.equal(moment(torch.stack([x, x], 1)[:, 1]), expected)
    assert torch.equal(moment(x[:1].expand(12, 10)), moment(x[:1].repeat(12, 1)))


# Pairs


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize(("m", "n"), [(3, 5), (5, 5), (PANEL + 1, 2)])
def test_pairs_of_rows(m: int, n: int, dtype: torch.dtype) -> None:
    total, expected = SecondMoment(), torch.zeros(m, n, dtype=torch.float64)
    for seed in range(3):
        left, right = whole_numbers(9, m, seed=seed), whole_numbers(9, n, seed=10 + seed)
        total.add_pairs(left.to(dtype), right.to(dtype))
        expected += (left.T @ right).double()
    assert total.value().shape == (m, n)
    for _ in range(2):
        assert torch.equal(total.value().double(), expected)


# Precision


DTYPES = {
    torch.float64: torch.float64,
    torch.float32: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_dtype_of_the_sum(dtype: torch.dtype) -> None:
    assert moment(whole_numbers(3, 2).to(dtype)).dtype == DTYPES[dtype]
    assert precise(whole_numbers(3, 2).to(dtype)).dtype == max(dtype, torch.float32, key=lambda d: d.itemsize)


def test_float32_rows_are_summed_in_float64() -> None:
    """4095² is exact in float32, three times that is not."""
    x = torch.full((1, 1), 4095.0)
    assert moment(x, x, x).item() == 3 * 4095**2


def test_float64_rows_are_multiplied_in_float64() -> None:
    x = gaussian(50, 9, seed=0)
    torch.testing.assert_close(moment(x[:20], x[20:]), x.T @ x, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", HALF)
def test_many_batches_in_half_precision(dtype: torch.dtype) -> None:
    """The float32 sum of 600 batches is within 1e-5 of the sizes of the two features that each entry is of."""
    size = 48
    total, expected = SecondMoment(), torch.zeros(size, size, dtype=torch.float64)
    for seed in range(600):
        rows = wide_ranging(64, size, dtype, seed)
        total.add(rows)
        expected += rows.double().T @ rows.double()
    sizes = expected.diagonal().sqrt()
    error = (total.value().double() - expected).abs() / torch.outer(sizes, sizes)
    assert float(error.max()) < 1e-5


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("size", [24, PANEL + 8])
def test_products_in_half_precision_are_lossless(size: int, dtype: torch.dtype) -> None:
    """A product of two such numbers is a float32 number: nothing but the sums is rounded, T·2⁻²⁴ of Σ |x y| at most,
    where rounding the rows once more, or the products, would cost 2⁻⁹ or 2⁻¹¹."""
    rows = wide_ranging(32, size, dtype, seed=1)
    x = rows.double()
    error = (moment(rows).double() - x.T @ x).abs() / (x.abs().T @ x.abs())
    assert float(error.max()) <= 32 * 2**-24
    one = rows[:1].double()
    assert torch.equal(moment(rows[:1]).double(), one.T @ one)


def test_a_control_of_rounded_products() -> None:
    rows = wide_ranging(32, 24, torch.bfloat16, seed=1)
    x = rows.double()
    error = ((rows.T @ rows).double() - x.T @ x).abs() / (x.abs().T @ x.abs())
    assert float(error.max()) > 1e-4


def test_float32_rows_are_not_rounded_to_bfloat16() -> None:
    rows = wide_ranging(32, 24, torch.float32, seed=1)
    x = rows.double()
    error = (moment(rows).double() - x.T @ x).abs() / (x.abs().T @ x.abs())
    assert float(error.max()) <= 32 * 2**-24


# The global setting


def setting() -> str | None:
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    return None if matmul is None else matmul.fp32_precision


@pytest.fixture
def user_setting(request: pytest.FixtureRequest):
    """A setting of the user's own."""
    before = setting()
    if before is None:
        pytest.skip("this torch has no such setting")
    torch.backends.mkldnn.matmul.fp32_precision = request.param
    yield request.param
    torch.backends.mkldnn.matmul.fp32_precision = before


each_setting = pytest.mark.parametrize("user_setting", ["ieee", "tf32", "bf16", "none"], indirect=True)


@each_setting
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_the_global_setting_is_restored(user_setting: str, dtype: torch.dtype) -> None:
    moment(whole_numbers(3, 4).to(dtype))
    assert setting() == user_setting


@each_setting
def test_it_is_restored_after_an_error(user_setting: str) -> None:
    total = SecondMoment()
    total.add(whole_numbers(3, 4).bfloat16())
    with pytest.raises(RuntimeError):
        total.add(whole_numbers(3, 5).bfloat16())
    assert setting() == user_setting


@each_setting
def test_it_is_changed_for_bfloat16_alone(user_setting: str) -> None:
    for dtype in (torch.float64, torch.float32, torch.float16):
        with lossless_products(torch.zeros(1, 1, dtype=dtype)):
            assert setting() == user_setting
    with lossless_products(torch.zeros(1, 1, dtype=torch.bfloat16)):
        assert setting() == "bf16"
    with lossless_products(torch.zeros(1, 1, dtype=torch.bfloat16, device="meta")):
        assert setting() == user_setting
