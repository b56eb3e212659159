"""Moments about means, and the bias that makes up for what factors do to a mean."""

import torch
from torch import Tensor


def about_means(moment: Tensor, left: Tensor, right: Tensor, tokens: int) -> Tensor:
    """`Σ (a − ā)ᵀ (b − b̄) = Σ aᵀ b − T āᵀ b̄`.

    Where means are large beside deviations from them, the rounding of `Σ aᵀ b` is what limits the result.

    Args:
        moment: `Σ aᵀ b (m, n)` over rows a and b.
        left: the mean `ā (m,)`.
        right: the mean `b̄ (n,)`.
        tokens: T, the number of rows.

    Returns:
        `(m, n)`, in the dtype of the moment; symmetric to the last bit where the moment is and the means are the same.
    """
    left, right = ((mean * tokens**0.5).to(moment.dtype) for mean in (left, right))
    return torch.addr(moment, left, right, alpha=-1)


def corrected_bias(bias: Tensor, outputs: Tensor, left: Tensor, right: Tensor, inputs: Tensor) -> Tensor:
    """The bias with which factors give outputs the mean they should have: `b + ȳ − left right x̄`.

    Together with factors that are best under the moment about the mean, it is best of all factors and biases.

    Args:
        bias: `b (m,)`.
        outputs: `ȳ (m,)`, the mean that the outputs should have, the bias not counted.
        left: `(m, r)`, as stored.
        right: `(r, n)`, as stored.
        inputs: `x̄ (n,)`, the mean of the inputs.

    Returns:
        `(m,)` float64.
    """
    return bias.double() + outputs.double() - left.double() @ (right.double() @ inputs.double())
