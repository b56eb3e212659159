"""How convex the profiles of a model's layers are, and how much alike: what the paper's Proposition 1 assumes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..allocation import hull_slopes
from ..structures import SVDProfile


Curve = NDArray[np.float64]

# Points of the axis on which layers of several sizes are compared, `r / min(m, n)` from 0 to 1.
POINTS = 201


@dataclass(frozen=True, eq=False)
class Envelopes:
    """The profiles of a model's layers on one axis, and the convex functions that bound them.

    The axis is the normalised rank `x = r / min(m, n)`; between two ranks a profile e(x) is taken as straight. The
    *lower convex envelope* of a function is the greatest convex function that is nowhere above it.

    * `lower` is that of the pointwise minimum of all profiles: the greatest convex function below every layer.
    * `upper` is the pointwise maximum of the layers' own lower convex envelopes. It is convex, and no profile is above
      it by more than its own gap.
    * `common` is the lower convex envelope of the pointwise median of all profiles: one convex function that stands
      for all layers, whatever a few of them do.

    Args:
        axis: `(POINTS,)`, x.
        curves: e(x) of each layer, `(POINTS,)`.
        lower: `(POINTS,)`.
        upper: `(POINTS,)`.
        common: `(POINTS,)`.
        own_gaps: `max_r e(r) − ĕ(r)` of each layer, over its ranks, with ĕ its own lower convex envelope: 0 for a
            convex profile.
        distances: `max_x |e(x) − common(x)|` of each layer.

    Source:
        arXiv 2510.05544, Proposition 1 and Appendix G, which says neither what "close" is nor to which envelope; the
        median is our choice.
    """

    axis: Curve
    curves: Mapping[str, Curve]
    lower: Curve
    upper: Curve
    common: Curve
    own_gaps: Mapping[str, float]
    distances: Mapping[str, float]

    @property
    def width(self) -> float:
        """`max_x upper(x) − lower(x)`."""
        return float((self.upper - self.lower).max())

    def to_dict(self, thresholds: Sequence[float]) -> dict[str, Any]:
        """All of it as JSON can hold it, with the share of layers within each threshold."""
        shares = {
            name: {str(threshold): share_within(values, threshold) for threshold in thresholds}
            for name, values in (("own envelope", self.own_gaps), ("common envelope", self.distances))
        }
        layers = {
            name: {
                "own_gap": self.own_gaps[name],
                "distance": self.distances[name],
                "errors": [round(float(value), 6) for value in curve],
            }
            for name, curve in self.curves.items()
        }
        curves = {name: getattr(self, name).round(6).tolist() for name in ("axis", "lower", "upper", "common")}
        return {"share_of_layers_within": shares, "width": self.width, **curves, "layers": layers}


def share_within(distances: Mapping[str, float], threshold: float) -> float:
    """The share of layers whose distance is at most a threshold, from 0 to 1."""
    return sum(distance <= threshold for distance in distances.values()) / len(distances)


def envelopes_of(profiles: Mapping[str, SVDProfile]) -> Envelopes:
    """The profiles of some layers on one axis, and their envelopes.

    Args:
        profiles: by layer, one or more, of weights or of outputs; a layer of full rank 0 is not possible.

    Returns:
        See `Envelopes`.
    """
    axis = np.linspace(0.0, 1.0, POINTS)
    own, curves, own_gaps = [], {}, {}
    for name, profile in profiles.items():
        errors = profile.errors.numpy()
        ranks = np.linspace(0.0, 1.0, len(errors))
        convex = lower_convex_envelope(ranks, errors)
        curves[name], own_gaps[name] = np.interp(axis, ranks, errors), float((errors - convex).max())
        own.append(np.interp(axis, ranks, convex))
    rows = np.stack(list(curves.values()))
    common = lower_convex_envelope(axis, np.median(rows, axis=0))
    distances = {name: float(np.abs(curve - common).max()) for name, curve in curves.items()}
    lower = lower_convex_envelope(axis, rows.min(axis=0))
    return Envelopes(axis, curves, lower, np.stack(own).max(axis=0), common, own_gaps, distances)


def lower_convex_envelope(places: Curve, values: Curve) -> Curve:
    """The greatest convex function that is nowhere above some points, at their places.

    Args:
        places: `(k,)`, rising.
        values: `(k,)`, never rising.

    Returns:
        `(k,)`, the same as the values at both ends.
    """
    slopes = np.array(hull_slopes(places.tolist(), values.tolist()))
    envelope = np.concatenate([values[:1], values[0] - (slopes * np.diff(places)).cumsum()])
    return np.minimum(envelope, values)  # where they touch, less what the sum was rounded by
