"""What the leading components of factors leave over: every rank at once, against every rank written out."""

from __future__ import annotations

import pytest
import reference
import torch
from cases import CASES, Case, each_case, gaussian

from optimum_pgsvd.linalg import (
    inner_products_by_rank,
    output_errors_by_rank,
    output_projection,
    projection_of_outputs,
    truncated_svd,
)


@pytest.mark.parametrize(
    "solve", [output_projection, lambda w, gram, rank: truncated_svd(w, rank)], ids=["eigh", "svd"]
)
@each_case
def test_output_errors_are_those_of_every_rank_written_out(case: Case, solve) -> None:
    left, right = solve(case.weight, case.gram, case.full_rank)
    errors, norm = output_errors_by_rank(case.weight, left, right, case.gram)
    assert norm == pytest.approx(reference.norm(case.weight @ case.inputs.T), rel=1e-9, abs=1e-12)
    assert len(errors) == case.full_rank + 1
    for rank in range(case.full_rank + 1):
        expected = reference.relative_outputs_error(case.weight, left[:, :rank] @ right[:rank], case.inputs)
        assert float(errors[rank]) ** 2 == pytest.approx(expected**2, abs=1e-12)


@pytest.mark.parametrize("case", [case for case in CASES if case.weight.shape[0] < case.weight.shape[1]], ids=repr)
def test_the_moment_of_the_outputs_gives_the_same_errors(case: Case) -> None:
    """Whatever the scale of a component on either side."""
    m = case.full_rank
    left, right = projection_of_outputs(case.weight, case.weight @ case.gram @ case.weight.T, case.gram.diagonal(), m)
    scales = torch.linspace(0.1, 10, m, dtype=torch.float64)
    moment = case.weight @ case.gram @ case.weight.T
    errors, norm = output_errors_by_rank(case.weight, left * scales, right / scales[:, None], moment)
    expected, other = output_errors_by_rank(case.weight, left, right, case.gram)
    torch.testing.assert_close(errors.square(), expected.square(), rtol=0, atol=1e-12)
    assert norm == pytest.approx(other, rel=1e-9)


def test_the_closed_form_is_below_the_plain_svd_at_every_rank_and_far_below_on_anisotropic_inputs() -> None:
    weight, inputs = (
        gaussian(24, 24, seed=1),
        gaussian(96, 24, seed=2) * torch.logspace(0, -2, 24, dtype=torch.float64),
    )
    gram = reference.gram_matrix(inputs)
    best = output_errors_by_rank(weight, *output_projection(weight, gram, 24), gram)[0]
    plain = output_errors_by_rank(weight, *truncated_svd(weight, 24), gram)[0]
    assert bool((best <= plain + 1e-9).all())
    assert float(best[12]) < 0.3 * float(plain[12])


@each_case
def test_inner_products_are_those_of_every_rank_written_out(case: Case) -> None:
    left, right = truncated_svd(case.weight, case.full_rank)
    gradient = gaussian(*case.weight.shape, seed=5)
    products = inner_products_by_rank(case.weight, left, right, gradient)
    for rank in range(case.full_rank + 1):
        difference = left[:, :rank] @ right[:rank] - case.weight
        assert float(products[rank]) == pytest.approx(float((gradient * difference).sum()), rel=1e-9, abs=1e-9)
