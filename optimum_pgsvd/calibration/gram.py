"""Gram matrices of layer inputs, accumulated while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import TracebackType

import torch
from torch import Tensor, nn

from ..errors import NonFiniteError
from .version import version


class InputObserver:
    """Sees the input of every named layer while it is entered as a context.

    Args:
        layers: linear layers by name.
        rows: takes a layer's input `(..., n)` and gives the rows `(T, n)` that count, padding left out.
    """

    def __init__(self, layers: Mapping[str, nn.Module], rows: Callable[[Tensor], Tensor]):
        self.layers, self.rows = layers, rows
        self._hooks = ExitStack()

    def __enter__(self):
        for name, layer in self.layers.items():

            def hook(module: nn.Module, args: tuple, kwargs: dict, name: str = name) -> None:
                self.see(name, args[0] if args else next(iter(kwargs.values())))

            self._hooks.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.close()

    def see(self, name: str, x: Tensor) -> None:
        """Called with each input of each layer."""
        raise NotImplementedError


class InputSurvey(InputObserver):
    """Counts the rows that each layer sees, finds the layers fed one and the same tensor, refuses NaN and infinity.

    Args:
        layers: linear layers by name.
        rows: as for `InputObserver`.
    """

    def __init__(self, layers: Mapping[str, nn.Module], rows: Callable[[Tensor], Tensor]):
        super().__init__(layers, rows)
        self.tokens = dict.fromkeys(layers, 0)
        self._inputs: dict[str, list[int]] = {name: [] for name in layers}
        self._last: tuple[Tensor | None, int] = (None, 0)
        self._number = 0

    @property
    def leaders(self) -> dict[str, str]:
        """For each layer the first that was fed the very same tensors."""
        first: dict[tuple[int, ...], str] = {}
        return {name: first.setdefault(tuple(inputs), name) for name, inputs in self._inputs.items()}

    def see(self, name: str, x: Tensor) -> None:
        """Count, compare with the tensor seen last, and check."""
        rows = self.rows(x)
        if self._last[0] is not x or self._last[1] != version(x):
            self._last = (x, version(x))
            self._number += 1
            self._check(name, rows)
        self._inputs[name].append(self._number)
        self.tokens[name] += rows.shape[0]

    def _check(self, name: str, rows: Tensor) -> None:
        if not precise(rows).square().sum().isfinite():
            raise NonFiniteError(
                f"the inputs of {name} hold NaN or infinity on the calibration set, or numbers too large to square; "
                "run the model in float32 or bfloat16, or check the checkpoint and the calibration data"
            )

    def __exit__(self, *exception) -> None:
        super().__exit__(*exception)
        self._last = (None, 0)


class GramRecorder(InputObserver):
    """Accumulates `G = Σ xᵀ x` of each layer's inputs: products in float32 or better, the sum in float64.

    Args:
        layers: linear layers by name.
        rows: as for `InputObserver`.
        leaders: layers of one leader share their input, and the first of them keeps the matrix for all.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        rows: Callable[[Tensor], Tensor],
        leaders: Mapping[str, str] | None = None,
    ):
        super().__init__(layers, rows)
        first: dict[str, str] = {}
        self.leaders = {name: first.setdefault((leaders or {}).get(name, name), name) for name in layers}
        self._grams: dict[str, Tensor] = {}

    def see(self, name: str, x: Tensor) -> None:
        """Add the input of a leading layer to its matrix."""
        if self.leaders[name] != name:
            return
        if name not in self._grams:
            self._grams[name] = torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float64, device=x.device)
        rows = precise(self.rows(x))
        self._grams[name] += rows.T @ rows

    def gram(self, name: str) -> Tensor:
        """`G (n, n)` float64 of a layer's inputs."""
        return self._grams[self.leaders[name]]

    def goal(self, name: str, weight: Tensor) -> Tensor:
        """The weight to approximate: the layer's own."""
        return weight


def precise(rows: Tensor) -> Tensor:
    """In float32 or better, as products are summed within a batch."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))
