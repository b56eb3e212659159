"""What was measured of a model once, on disk, to plan and factor it by as often as one likes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .calibration import GramRecorder
from .config import PGSVDConfig
from .distributed import Peers
from .errors import CalibrationError
from .solvers import SOLVERS
from .structures import Means, Moments, SVDProfile
from .targets import Target, Targets


INDEX = "measurements.json"

# Relative difference of the norms of a weight that was measured and the same weight met again: measured in single
# precision, it may differ by rounding.
SAME_NORM = 1e-3


class StoredMoments:
    """The moments of the layers of one block, read when they are asked for; takes the place of a `GramRecorder`.

    Args:
        measurements: the folder.
        names: of the layers.
    """

    def __init__(self, measurements: Measurements, names: Sequence[str]):
        self.measurements = measurements
        self.tokens = {name: measurements.layers[name]["tokens"] for name in names}

    def moments(self, name: str, about_mean: bool = False) -> Moments:
        """What was measured of a layer; about the mean of its inputs if that is asked for."""
        leader = self.measurements.layers[name]["leader"]
        kind = self.measurements.layers[leader]["kind"]
        matrix = self.measurements.tensor(leader, kind)
        if kind == "gram":
            moments = Moments(matrix, None, matrix.diagonal(), magnitudes=self.magnitudes(leader))
            return moments.about(self.means(name)) if about_mean else moments
        return Moments(None, matrix, self.measurements.tensor(leader, "energies"))

    def means(self, name: str) -> Means:
        """The means of a layer's inputs."""
        inputs = self.measurements.tensor(self.measurements.layers[name]["leader"], "mean")
        return Means(inputs, inputs, self.tokens[name])

    def magnitudes(self, leader: str) -> Tensor | None:
        """The mean absolute values of a leading layer's inputs, where they were measured."""
        known = self.measurements.layers[leader].get("magnitudes")
        return self.measurements.tensor(leader, "magnitudes") if known else None

    def goal(self, name: str, weight: Tensor, about_mean: bool = False) -> Tensor:
        """The weight to approximate: the layer's own."""
        self.measurements.refuse_other_weight(name, weight)
        return weight

    def sum_over(self, peers: Peers) -> None:
        """Every process reads all there is."""


class Measurements:
    """A folder that `PGSVDCompressor.measure` wrote.

    Args:
        folder: its path.

    Attributes:
        layers: of each layer `tokens`, `file`, `leader` (whose input it shares, perhaps itself), and of a leader
            `kind`: `"gram"`, with the mean of the inputs beside it, and their `magnitudes` where they were measured,
            or `"outputs"`.

    Raises:
        CalibrationError: the folder holds no measurements.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = os.fspath(folder)
        path = os.path.join(self.folder, INDEX)
        if not os.path.exists(path):
            raise CalibrationError(
                f"{self.folder} holds no {INDEX}; name a folder that `optimum-cli pgsvd measure` made"
            )
        with open(path, encoding="utf-8") as file:
            index = json.load(file)
        self.layers: dict[str, dict[str, Any]] = index["layers"]
        self.request: Mapping[str, Any] = index["request"]

    def check(self, targets: Targets, config: PGSVDConfig) -> None:
        """Find what keeps a request from being met by these measurements.

        Raises:
            CalibrationError: a layer was not measured, or not what the solver needs of it.
        """
        if config.calibration == "anchored":
            raise CalibrationError(
                "calibration='anchored' measures each block behind the compressed ones before it, so measurements "
                "made once cannot serve it; give the texts themselves as dataset"
            )
        for target in targets.found:
            if target.name not in self.layers:
                raise CalibrationError(
                    f"{self.folder} holds no measurement of {target.name}; measure with the same "
                    "modules_to_not_convert, groups and ranks"
                )
            leader = self.layers[self.layers[target.name]["leader"]]
            if not SOLVERS.trait(config.solver, "takes_outputs") and leader["kind"] == "outputs":
                raise CalibrationError(
                    f"{self.folder} holds what solver='eigh' needs, and solver={config.solver!r} needs the Gram "
                    f"matrices of the inputs of {target.name} too; measure with solver={config.solver!r}"
                )
            if SOLVERS.trait(config.solver, "needs") == "magnitudes" and not leader.get("magnitudes"):
                raise CalibrationError(
                    f"{self.folder} holds no absolute values of the inputs of {target.name}, which "
                    f"solver={config.solver!r} needs; measure with solver={config.solver!r}"
                )
            if config.correct_bias and target.own_bias and not leader.get("mean"):
                raise CalibrationError(
                    f"{self.folder} holds no mean of the inputs of {target.name}, which correct_bias=True needs; "
                    "measure with correct_bias=True"
                )

    def profiles(self, targets: Targets) -> dict[str, SVDProfile]:
        """The profile of every target's weight."""
        return {t.name: SVDProfile(t.shape, self.tensor(t.name, "values")) for t in targets.found}

    def of_block(self, targets: Sequence[Target]) -> StoredMoments:
        """The moments of some layers."""
        return StoredMoments(self, [target.name for target in targets])

    def tensor(self, layer: str, kind: str) -> Tensor:
        """One tensor of a layer."""
        with safe_open(os.path.join(self.folder, self.layers[layer]["file"]), framework="pt") as file:
            return file.get_tensor(f"{layer}.{kind}")

    def refuse_other_weight(self, name: str, weight: Tensor) -> None:
        """Raise `CalibrationError` where a layer has another weight than the one that was measured."""
        measured, found = float(self.tensor(name, "values").double().norm()), float(weight.float().norm())
        if abs(measured - found) > SAME_NORM * max(measured, found):
            raise CalibrationError(
                f"the weight of {name} has the norm {found:.6g}, and {measured:.6g} was measured in {self.folder}: "
                "that was another model; measure this one"
            )


def measurements_of(targets: Targets, config: PGSVDConfig) -> Measurements | None:
    """The measurements that a request names as its dataset, `None` where it names none.

    Raises:
        CalibrationError: they cannot serve the request.
    """
    if not isinstance(config.dataset, (str, os.PathLike)) or not os.path.exists(os.path.join(config.dataset, INDEX)):
        return None
    measurements = Measurements(config.dataset)
    measurements.check(targets, config)
    return measurements


def write_block(path: str, recorder: GramRecorder, profiles: Mapping[str, SVDProfile]) -> None:
    """Write what was recorded of some layers to a safetensors file, on disk for good when this returns.

    Args:
        path: of the file.
        recorder: of the layers.
        profiles: of their weights.
    """
    tensors, layers = {}, {}
    for name, profile in profiles.items():
        leader = recorder.leaders[name]
        layers[name] = {"tokens": recorder.tokens[name], "file": os.path.basename(path), "leader": leader}
        tensors[f"{name}.values"] = profile.values
        if leader == name:
            layers[name]["kind"] = "outputs" if name in recorder.by_outputs else "gram"
            moments = recorder.moments(name)
            tensors |= {f"{name}.{kind}": value for kind, value in stored(moments)}
            if moments.magnitudes is not None:
                layers[name]["magnitudes"] = True
            if layers[name]["kind"] == "gram":
                layers[name]["mean"] = True
                tensors[f"{name}.mean"] = recorder.means(name).inputs
    held = {name: value.cpu().contiguous() for name, value in tensors.items()}
    save_file(held, f"{path}.new", {"layers": json.dumps(layers)})
    with open(f"{path}.new", "rb") as file:
        os.fsync(file.fileno())
    os.replace(f"{path}.new", path)


def stored(moments: Moments) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a layer's moments by kind."""
    if moments.gram is not None:
        yield "gram", moments.gram
    if moments.magnitudes is not None:
        yield "magnitudes", moments.magnitudes
    if moments.outputs is not None:
        yield "outputs", moments.outputs
        yield "energies", moments.energies


def write_index(folder: str, request: Mapping[str, Any]) -> None:
    """Make a folder of `write_block`'s files a folder of measurements.

    Args:
        folder: its path.
        request: what was measured, and on what.
    """
    layers: dict[str, Any] = {}
    for name in sorted(os.listdir(folder)):
        if name.endswith(".safetensors"):
            with safe_open(os.path.join(folder, name), framework="pt") as file:
                layers |= json.loads(file.metadata()["layers"])
    with open(os.path.join(folder, INDEX), "w", encoding="utf-8") as file:
        json.dump({"layers": layers, "request": request}, file, indent=2)
        file.write("\n")
