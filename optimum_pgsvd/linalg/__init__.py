"""Tensors in, tensors out.

One layout throughout: a weight is `W (m, n)` with m output and n input features, calibration inputs are
`X (T, n)` with one row a token, their Gram matrix is `G = Xᵀ X (n, n)`, and factors are `left (m, r)` and
`right (r, n)` with `W ≈ left @ right`. `working_dtype` says in which precision a weight is decomposed.
"""

from .als import alternating_least_squares
from .anchor import anchored_weight
from .leading_errors import inner_products_by_rank, output_errors_by_rank
from .means import about_means, corrected_bias
from .pivoting import INDEX, pivoted
from .precision import working_dtype
from .products import add_product, add_self_product, mirror_upper
from .projection import output_projection, projection_of_outputs, scaled_projection
from .relative_error import (
    pseudo_inverse,
    relative_activation_error,
    relative_errors,
    relative_output_error,
    relative_weight_error,
)
from .spectra import output_spectrum, relative_tails, singular_values, symmetric_eigen
from .svd import balanced, truncated_svd
from .weighted import weighted_projection, weighted_spectrum
from .whitening import whitened_svd


__all__ = [
    "INDEX",
    "about_means",
    "add_product",
    "add_self_product",
    "alternating_least_squares",
    "anchored_weight",
    "balanced",
    "corrected_bias",
    "inner_products_by_rank",
    "mirror_upper",
    "output_errors_by_rank",
    "output_projection",
    "output_spectrum",
    "pivoted",
    "pseudo_inverse",
    "projection_of_outputs",
    "relative_activation_error",
    "relative_errors",
    "relative_output_error",
    "relative_tails",
    "relative_weight_error",
    "scaled_projection",
    "singular_values",
    "symmetric_eigen",
    "truncated_svd",
    "weighted_projection",
    "weighted_spectrum",
    "whitened_svd",
    "working_dtype",
]
