"""Convex envelopes of profiles, against chords tried one by one, and the shares of layers close to them."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES

from optimum_pgsvd import PGSVDCompressor, PGSVDConfig, SVDProfile
from optimum_pgsvd.analysis import envelopes_of, profile_model
from optimum_pgsvd.analysis.envelopes import POINTS, lower_convex_envelope, share_within
from optimum_pgsvd.structures import LinearShape


few = settings(max_examples=40, deadline=None, derandomize=True)


def profile(values: list[float], out_features: int | None = None) -> SVDProfile:
    return SVDProfile(LinearShape(out_features or len(values), len(values)), torch.tensor(values, dtype=torch.float64))


def with_errors(errors: list[float]) -> SVDProfile:
    """A profile with these e(r), from 1 down to 0."""
    squares = np.square(errors)
    return profile(np.sqrt(squares[:-1] - squares[1:]).tolist())


falling = st.lists(st.floats(0, 1), min_size=1, max_size=9).map(lambda values: sorted([*values, 0.0], reverse=True))


@few
@given(falling, st.lists(st.floats(0.01, 1), min_size=9, max_size=9))
def test_an_envelope_is_the_lowest_of_all_chords(values: list[float], steps: list[float]) -> None:
    places = np.concatenate([[0.0], np.cumsum(steps)])[: len(values)]
    envelope = lower_convex_envelope(places, np.array(values))
    expected = [reference.lower_convex_envelope(places.tolist(), values, at) for at in places]
    np.testing.assert_allclose(envelope, expected, atol=1e-12)


def test_a_convex_profile_has_no_gap_and_equal_singular_values_have_their_bulge() -> None:
    """Two of them leave `1, √½, 0`, and the chord passes at one half."""
    convex, bulging = with_errors([1, 0.5, 0.25, 0.1, 0]), profile([2.0, 2.0])
    found = envelopes_of({"convex": convex, "bulging": bulging})
    assert found.own_gaps["convex"] == pytest.approx(0, abs=1e-12)
    assert found.own_gaps["bulging"] == pytest.approx(0.5**0.5 - 0.5)


def test_layers_of_one_profile_lie_on_the_common_envelope_whatever_their_size() -> None:
    """A straight profile: `e(r) = 1 − r / k`."""
    layers = {str(k): with_errors([1 - r / k for r in range(k + 1)]) for k in (3, 8, 20)}
    found = envelopes_of(layers)
    for curve in (*found.curves.values(), found.lower, found.upper, found.common):
        np.testing.assert_allclose(curve, 1 - found.axis, atol=1e-12)
    assert found.width == pytest.approx(0, abs=1e-12)
    assert max(found.distances.values()) == pytest.approx(0, abs=1e-12)


def test_one_layer_apart_moves_the_bounds_and_not_the_common_envelope() -> None:
    straight = {str(i): with_errors([1 - r / 10 for r in range(11)]) for i in range(9)}
    low = with_errors([1, *(0.1 * (1 - r / 10) for r in range(1, 11))])
    found = envelopes_of({**straight, "low": low})
    np.testing.assert_allclose(found.common, 1 - found.axis, atol=1e-12)
    assert found.distances["low"] == pytest.approx(0.9 - 0.1 * 0.9, abs=1e-9)
    assert found.width == pytest.approx(found.distances["low"], abs=1e-9)
    assert share_within(found.distances, 1e-9) == 0.9
    assert share_within(found.distances, 0.82) == 1.0


@few
@given(st.lists(st.lists(st.floats(0.01, 1), min_size=2, max_size=12), min_size=1, max_size=5))
def test_bounds_are_convex_and_bound(spectra: list[list[float]]) -> None:
    found = envelopes_of({str(i): profile(sorted(values, reverse=True)) for i, values in enumerate(spectra)})
    for curve in (found.lower, found.upper, found.common):
        assert np.diff(curve, 2).min() >= -1e-9
    for name, curve in found.curves.items():
        assert (found.lower <= curve + 1e-12).all()
        assert (curve <= found.upper + found.own_gaps[name] + 1e-9).all()
        assert found.distances[name] <= np.abs(curve - found.common).max() + 1e-12
        assert 0 <= found.own_gaps[name] <= 1


def test_shares_rise_with_the_threshold_and_are_counted() -> None:
    distances = {"a": 0.0, "b": 0.1, "c": 0.1, "d": 0.3}
    assert [share_within(distances, t) for t in (0.0, 0.05, 0.1, 0.2, 0.3)] == [0.25, 0.25, 0.75, 0.75, 1.0]


def test_profiles_of_a_model_are_those_its_plan_uses_and_its_outputs_give() -> None:
    """Of the weights by Definition 1; of the outputs, what is left of them by the closed form."""
    model = FAMILIES["llama"].build()
    config = PGSVDConfig(tolerance=0.4, dataset=FAMILIES["llama"].batches(4), num_samples=10**6)
    found = profile_model(model, config)
    report = PGSVDCompressor(config).compress(FAMILIES["llama"].build())
    values = found.to_dict([0.05])
    assert values["config"]["tolerance"] == 0.4
    factored = [layer for layer in report.layers if layer.rank is not None]
    assert factored
    for layer in factored:
        weight = model.get_submodule(layer.name).weight.detach()
        expected = reference.truncation_error(weight, layer.rank)
        assert found.profiles["weights"][layer.name].relative_error(layer.rank) == pytest.approx(expected, rel=1e-5)
        left_over = found.profiles["outputs"][layer.name].relative_error(layer.rank)
        assert left_over == pytest.approx(layer.activation_error, abs=1e-5)
    assert len(values["weights"]["layers"][factored[0].name]["errors"]) == POINTS


def test_without_a_dataset_only_weights_are_profiled() -> None:
    found = profile_model(FAMILIES["gpt2"].build(), PGSVDConfig(tolerance=0.0))
    assert set(found.profiles) == set(found.envelopes) == {"weights"}
