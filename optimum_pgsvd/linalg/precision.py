"""The precision of decompositions."""

import torch
from torch import Tensor


def working_dtype(stored: torch.dtype) -> torch.dtype:
    """What numbers are computed with: float32 if they are stored in half precision, float64 if not.

    Rounding factors to bf16 or fp16 moves them by 1e-3 or 1e-4 of their size; a decomposition in float32 by about
    1e-7, in half the time and memory. What float32 cannot carry stays in float64 whatever the weight: products and
    dominant eigenvectors of second moments, which span the square of the activations' range, and ALS, whose
    pseudo-inverses amplify rounding.

    Args:
        stored: dtype of a weight or of activations.

    Returns:
        `torch.float32` or `torch.float64`.
    """
    return torch.float32 if stored in (torch.bfloat16, torch.float16) else torch.float64


def layer_dtype(weight: Tensor, moment: Tensor) -> torch.dtype:
    """The working dtype of a layer: no finer than its second moment was summed.

    Args:
        weight: of any floating dtype; half precision calls for float32.
        moment: of its inputs or outputs, float32 or float64.

    Returns:
        `torch.float32` or `torch.float64`.
    """
    return torch.float32 if moment.dtype == torch.float32 else working_dtype(weight.dtype)
