"""ALS after every sweep, against the oracle and the closed-form optimum."""

from __future__ import annotations

import pytest
import reference
import torch
from cases import CASES, Case
from models import FAMILIES

from optimum_pgsvd import CalibrationError, PGSVDConfig
from optimum_pgsvd.analysis import converge_model
from optimum_pgsvd.analysis.convergence import converge, sweeps_until


EASY = [case for case in CASES if case.name in ("square", "wide", "tall", "dead feature")]


@pytest.mark.parametrize("case", EASY, ids=repr)
def test_each_objective_is_that_of_the_algorithm_and_the_optimum_its_bound(case: Case) -> None:
    rank = case.full_rank // 3
    found = converge("layer", case.weight, case.gram, rank, 6)
    assert found.optimum**2 * case.energy == pytest.approx(case.least_squared_error(rank), rel=1e-6)
    for sweep, value in enumerate(found.objectives):
        approximation = reference.als(case.weight, case.gram, rank, sweep)
        error = reference.outputs_error(case.weight, approximation, case.inputs)
        assert value == pytest.approx(error**2 / case.least_squared_error(rank), rel=1e-6)
    assert len(found.objectives) == 7
    assert min(found.objectives) >= 1 - 1e-9
    assert all(
        after <= before * (1 + 1e-9) for before, after in zip(found.objectives, found.objectives[1:], strict=False)
    )


def test_a_model_s_layers_at_the_ranks_of_its_plan() -> None:
    model = FAMILIES["llama"].build()
    config = PGSVDConfig(0.4, dataset=FAMILIES["llama"].batches(4), num_samples=10**6, modules_to_not_convert=["mlp"])
    found = converge_model(model, config, sweeps=30)
    assert {layer.name.rsplit(".", 1)[-1] for layer in found.layers} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert found.exact == ()
    assert found.medians[30] < 1.01 < found.medians[0]
    assert found.worst == [max(layer.objectives[sweep] for layer in found.layers) for sweep in range(31)]
    values = found.to_dict()
    assert values["config"]["solver"] == "als"
    assert values["sweeps_until"]["median within 1.0% of the optimum"] == sweeps_until(found.medians, 0.01)


def test_sweeps_until_is_the_first_within_and_none_where_there_is_none() -> None:
    assert sweeps_until([2.0, 1.05, 1.01, 1.0], 0.01) == 2
    assert sweeps_until([2.0, 1.05], 0.01) is None


def test_layers_whose_rank_leaves_no_error_are_set_apart() -> None:
    """Four tokens, ranks up to fifteen."""
    model, batch = FAMILIES["llama"].build(), {"input_ids": torch.arange(6, 10)[None]}
    with pytest.raises(CalibrationError, match="14 layers, and their ranks leave no error"):
        converge_model(model, PGSVDConfig(ranks={"*.layers.*": 8}, dataset=[batch]), sweeps=2)
    found = converge_model(model, PGSVDConfig(ranks={"*.mlp.*": 8, "*.q_proj": 2}, dataset=[batch]), sweeps=2)
    assert {name.rsplit(".", 1)[-1] for name in found.exact} == {"gate_proj", "up_proj", "down_proj"}
    assert {layer.name.rsplit(".", 1)[-1] for layer in found.layers} == {"q_proj"}
