"""How far a pair of factors is from the weight it replaces."""

from torch import Tensor


def relative_weight_error(weight: Tensor, left: Tensor, right: Tensor) -> float:
    """`‖W − left right‖_F / ‖W‖_F`, 0 for a zero weight.

    Args:
        weight: `(m, n)`.
        left: `(m, r)`.
        right: `(r, n)`.

    Returns:
        A number from 0 up; computed in float64.
    """
    weight = weight.double()
    norm = weight.norm()
    return float((weight - left.double() @ right.double()).norm() / norm) if norm > 0 else 0.0


def relative_activation_error(weight: Tensor, left: Tensor, right: Tensor, gram: Tensor) -> float:
    """`‖(W − left right) Xᵀ‖_F / ‖W Xᵀ‖_F`, 0 where the outputs are all zero.

    Args:
        weight: `(m, n)`.
        left: `(m, r)`.
        right: `(r, n)`.
        gram: `(n, n)`, `Xᵀ X`.

    Returns:
        A number from 0 up; computed in float64.
    """
    weight, gram = weight.double(), gram.double()
    difference = weight - left.double() @ right.double()
    energy = ((weight @ gram) * weight).sum().clamp(min=0)
    error = ((difference @ gram) * difference).sum().clamp(min=0)
    return float((error / energy).sqrt()) if energy > 0 else 0.0
