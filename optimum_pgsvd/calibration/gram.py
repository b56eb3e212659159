"""Gram matrices of layer inputs, accumulated while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import TracebackType

import torch
from torch import Tensor, nn

from ..errors import NonFiniteError


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
        self.leaders: dict[str, str] = {}
        self._last: tuple[Tensor | None, str] = (None, "")

    def see(self, name: str, x: Tensor) -> None:
        """Count, compare with the tensor seen last, and check."""
        tensor, leader = self._last
        leader = leader if tensor is x else name
        self._last = (x, leader)
        if self.leaders.setdefault(name, leader) != leader:
            self.leaders[name] = name  # once fed apart, never shared
        self.tokens[name] += self.rows(x).shape[0]
        if leader == name and not self.rows(x).isfinite().all():
            raise NonFiniteError(
                f"the inputs of {name} hold NaN or infinity on the calibration set; run the model in float32 or "
                "bfloat16, or check the checkpoint and the calibration data"
            )

    def __exit__(self, *exception) -> None:
        super().__exit__(*exception)
        self._last = (None, "")


class GramRecorder(InputObserver):
    """Accumulates `G = Σ xᵀ x` of each layer's inputs: products in float32 or better, the sum in float64.

    Args:
        layers: linear layers by name.
        rows: as for `InputObserver`.
        leaders: for layers that share their input, the one whose matrix serves them all.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        rows: Callable[[Tensor], Tensor],
        leaders: Mapping[str, str] | None = None,
    ):
        super().__init__(layers, rows)
        self.leaders = {name: (leaders or {}).get(name, name) for name in layers}
        self._grams: dict[str, Tensor] = {}

    def see(self, name: str, x: Tensor) -> None:
        """Add the input of a leading layer to its matrix."""
        if self.leaders[name] != name:
            return
        if name not in self._grams:
            self._grams[name] = torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float64, device=x.device)
        rows = self.rows(x)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        self._grams[name] += rows.T @ rows

    def gram(self, name: str) -> Tensor:
        """`G (n, n)` float64 of a layer's inputs."""
        return self._grams[self.leaders[name]]
