"""What the calibration set says of each layer, accumulated while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import Peers
from ..errors import CalibrationError, NonFiniteError
from ..linalg import working_dtype
from ..structures import Means, Moments
from ..targets import weight_shape
from .moments import SecondMoment, energies, magnitudes, precise
from .version import version


# Takes a layer's input `(..., n)` and one of its values `(..., k)`, and gives the rows `(T, k)` of the values that
# count, padding left out.
Rows = Callable[[Tensor, Tensor], Tensor]


class InputObserver:
    """Sees the input of every named layer while it is entered as a context.

    Sums are not rounded as products are where the model runs under autocast.

    Args:
        layers: linear layers by name.
        rows: leaves padding out.
    """

    def __init__(self, layers: Mapping[str, nn.Module], rows: Rows):
        self.layers, self.rows = layers, rows
        self._hooks = ExitStack()

    def __enter__(self):
        for name, layer in self.layers.items():

            def hook(module: nn.Module, args: tuple, kwargs: dict, name: str = name) -> None:
                x = given(args, kwargs)
                with torch.autocast(x.device.type, enabled=False):
                    self.see(name, x)

            self._hooks.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.close()

    def see(self, name: str, x: Tensor) -> None:
        """Called with each input of each layer."""
        raise NotImplementedError


def given(args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    """The input among a linear's arguments."""
    return args[0] if args else next(iter(kwargs.values()))


class InputSurvey(InputObserver):
    """Counts the rows that each layer sees, finds the layers fed one and the same tensor, refuses NaN and infinity.

    Args:
        layers: linear layers by name.
        rows: leaves padding out.
    """

    def __init__(self, layers: Mapping[str, nn.Module], rows: Rows):
        super().__init__(layers, rows)
        self.tokens = dict.fromkeys(layers, 0)
        self.passes = 0
        self._inputs: dict[str, list[int]] = {}
        self._last: tuple[Tensor | None, int] = (None, 0)
        self._number = 0

    def __enter__(self):
        self.passes += 1
        return super().__enter__()

    @property
    def once(self) -> frozenset[str]:
        """Layers that a forward pass calls no more than once, if it is entered for one at a time."""
        return frozenset(name for name, inputs in self._inputs.items() if len(inputs) <= self.passes)

    @property
    def unseen(self) -> list[str]:
        """Layers that no row has reached."""
        return [name for name, tokens in self.tokens.items() if tokens == 0]

    @property
    def leaders(self) -> dict[str, str]:
        """For each layer that was reached, in the order of the calls, the first that was fed the very same tensors."""
        first: dict[tuple[int, ...], str] = {}
        return {name: first.setdefault(tuple(inputs), name) for name, inputs in self._inputs.items()}

    def see(self, name: str, x: Tensor) -> None:
        """Count, compare with the tensor seen last, and check."""
        rows = self.rows(x, x)
        if self._last[0] is not x or self._last[1] != version(x):
            self._last = (x, version(x))
            self._number += 1
            check_finite(name, energies(rows).sum())
        self._inputs.setdefault(name, []).append(self._number)
        self.tokens[name] += rows.shape[0]

    def __exit__(self, *exception) -> None:
        super().__exit__(*exception)
        self._last = (None, 0)


class GramRecorder(InputObserver):
    """Accumulates the second moments of each layer's inputs, or of its outputs where these are smaller.

    Args:
        layers: linear layers by name.
        rows: leaves padding out.
        leaders: in the order of the calls; layers of one leader share their input, and the first of them that is among
            the layers keeps the matrix for all.
        by_outputs: layers whose outputs are measured instead of their inputs, see `measured_by_outputs`.
        with_magnitudes: whether to measure the mean absolute values of inputs besides.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        rows: Rows,
        leaders: Mapping[str, str] | None = None,
        by_outputs: Collection[str] = (),
        with_magnitudes: bool = False,
    ):
        super().__init__(layers, rows)
        self.by_outputs = frozenset(by_outputs)
        by_inputs = [name for name in layers if name not in self.by_outputs]
        self.leaders = {name: name for name in layers} | local_leaders(by_inputs, leaders or {})
        self.tokens = dict.fromkeys(layers, 0)
        self._moments = {name: SecondMoment() for name in layers}
        self._energies: dict[str, Tensor] = {}
        self.with_magnitudes = with_magnitudes
        self._magnitudes: dict[str, Tensor] = {}
        self._fed: dict[str, tuple[Tensor, int]] = {}

    def __enter__(self):
        for name in self.by_outputs:

            def hook(module: nn.Module, args: tuple, kwargs: dict, outputs: Tensor, name: str = name) -> None:
                with torch.autocast(outputs.device.type, enabled=False):
                    self.see_outputs(name, given(args, kwargs), outputs)

            self._hooks.callback(self.layers[name].register_forward_hook(hook, with_kwargs=True).remove)
        return super().__enter__()

    def __exit__(self, *exception) -> None:
        super().__exit__(*exception)
        self._fed.clear()

    def see(self, name: str, x: Tensor) -> None:
        """Count the rows, and add the input of a leading layer to its matrix."""
        rows = self.rows(x, x)
        self.tokens[name] += rows.shape[0]
        if name in self.by_outputs:
            before = self._energies.get(name)
            self._energies[name] = energies(rows) if before is None else before + energies(rows)
        elif self.leads(name, x):
            self._moments[name].add(rows)
            if self.with_magnitudes:
                before = self._magnitudes.get(name)
                self._magnitudes[name] = magnitudes(rows) if before is None else before + magnitudes(rows)

    def leads(self, name: str, x: Tensor) -> bool:
        """Whether a layer's input is to be added; a layer that follows another must be fed the very same tensor.

        Raises:
            CalibrationError: it is fed another.
        """
        leader = self.leaders[name]
        if leader == name:
            self._fed[name] = (x, version(x))
        elif self._fed.get(leader, (None, 0))[0] is not x or self._fed[leader][1] != version(x):
            raise parted(name, leader)
        return leader == name

    def see_outputs(self, name: str, x: Tensor, y: Tensor) -> None:
        """Add the outputs of a layer, less its bias, to its matrix."""
        bias: Any = self.layers[name].bias
        rows = self.rows(x, y)
        self._moments[name].add(rows if bias is None else precise(rows) - bias)

    def sum_over(self, peers: Peers) -> None:
        """Add up what all processes have recorded, each on batches of its own."""
        counts = torch.tensor([self.tokens[name] for name in self.layers])
        self.tokens = dict(zip(self.layers, peers.sum(counts).tolist(), strict=True))
        for name, layer in self.layers.items():
            if self.leaders[name] == name:
                self.sum_layer(name, layer, peers)

    def sum_layer(self, name: str, layer: Any, peers: Peers) -> None:
        """Add up what was recorded of a leading layer."""
        shape, weight = weight_shape(layer), layer.weight
        measured = shape.out_features if name in self.by_outputs else shape.in_features
        self._moments[name].sum_over(peers, weight.new_empty(0, measured))
        if name in self.by_outputs:
            nothing = torch.zeros(shape.in_features, dtype=working_dtype(weight.dtype), device=weight.device)
            peers.sum(self._energies.setdefault(name, nothing))
        elif self.with_magnitudes:
            nothing = torch.zeros(shape.in_features, dtype=torch.float64, device=weight.device)
            peers.sum(self._magnitudes.setdefault(name, nothing))

    def moments(self, name: str, about_mean: bool = False) -> Moments:
        """What was measured of a layer.

        Args:
            name: of the layer.
            about_mean: of its inputs less their mean; it must be measured by inputs.

        Raises:
            CalibrationError: the layer did not see all that the one did whose input it shared at first.
            NonFiniteError: an activation was NaN or infinite, or too large to square.
        """
        leader = self.leaders[name]
        if self.tokens[name] != self.tokens[leader]:
            raise parted(name, leader)
        value = self._moments[leader].value()
        check_finite(name, value.diagonal().sum())
        if name in self.by_outputs:
            check_finite(name, self._energies[name].sum())
            return Moments(None, value, self._energies[name])
        sizes = self._magnitudes[leader] / self.tokens[name] if self.with_magnitudes else None
        moments = Moments(value, None, value.diagonal(), magnitudes=sizes)
        return moments.about(self.means(name)) if about_mean else moments

    def means(self, name: str) -> Means:
        """The means of a layer's inputs."""
        inputs = self._moments[self.leaders[name]].row_sum() / self.tokens[name]
        return Means(inputs, inputs, self.tokens[name])

    def goal(self, name: str, weight: Tensor, about_mean: bool = False) -> Tensor:
        """The weight to approximate: the layer's own."""
        return weight


def parted(name: str, leader: str) -> CalibrationError:
    """The error for layers that shared their input in the survey, and do not always."""
    return CalibrationError(
        f"{name} and {leader} were fed the same tensor at first, and different ones later in the calibration set; "
        "compress them apart: list one of them in modules_to_not_convert"
    )


def local_leaders(layers: Collection[str], leaders: Mapping[str, str]) -> dict[str, str]:
    """Leaders among some layers only, for every one of them."""
    first: dict[str, str] = {}
    found = {name: first.setdefault(leader, name) for name, leader in leaders.items() if name in layers}
    return {name: found.get(name, name) for name in layers}


def measured_by_outputs(shapes: Mapping[str, tuple[int, int]], leaders: Mapping[str, str]) -> set[str]:
    """The layers of which the moments of the outputs are fewer numbers than that of the input they share.

    Args:
        shapes: `(m, n)` of each layer's weight.
        leaders: for each layer the first that is fed the same tensor.
    """
    followers: dict[str, list[str]] = {}
    for name, leader in local_leaders(shapes, leaders).items():
        followers.setdefault(leader, []).append(name)
    return {
        name
        for group in followers.values()
        if all(shapes[name][0] < shapes[name][1] for name in group)
        and sum(shapes[name][0] ** 2 for name in group) < shapes[group[0]][1] ** 2
        for name in group
    }


def check_finite(name: str, energy: Tensor) -> None:
    """Raise `NonFiniteError` where the energy of a layer's activations is NaN or infinite."""
    if not torch.isfinite(energy):
        raise NonFiniteError(
            f"the inputs of {name} hold NaN or infinity on the calibration set, or numbers too large to square; "
            "run the model in float32 or bfloat16, or check the checkpoint and the calibration data"
        )
