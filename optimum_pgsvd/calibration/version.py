"""Whether a tensor met again is still what it was."""

from torch import Tensor


def version(tensor: Tensor) -> int:
    """A number that changes whenever the tensor is changed in place; tensors of inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version
