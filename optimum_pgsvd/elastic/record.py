"""What an elastic checkpoint holds besides its weights: collected while compressing, written while saving."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checkpoint import ELASTIC_NAME
from ..logs import warn
from ..modeling_pgsvd import LowRankLinear, checkpoint_names
from ..structures import LowRankFactors, SVDProfile


class Elastic:
    """What cutting a model's checkpoint will need.

    Args:
        profiles: of every target's weight, by module name.

    Attributes:
        factors: of the targets that stay dense, on the CPU.
        samples: some rows of every target, as compression left them.
    """

    def __init__(self, profiles: Mapping[str, SVDProfile]):
        self.profiles = dict(profiles)
        self.factors: dict[str, LowRankFactors] = {}
        self.samples: dict[str, list[Tensor]] = {}

    def add(self, name: str, factors: LowRankFactors) -> None:
        """Keep the factors of a target that stays dense.

        Args:
            name: of the module.
            factors: in the model's dtype, at the largest rank that saves parameters, most important component first.
        """
        self.factors[name] = LowRankFactors(factors.left.cpu(), factors.right.cpu())

    def seal(self, model: nn.Module) -> None:
        """Remember by a sample which weights it belongs to."""
        self.samples = {name: first_rows(model.get_submodule(name)) for name in self.profiles}

    def fits(self, model: nn.Module) -> bool:
        """Whether the targets still have the weights of the compression, in whatever dtype."""
        modules = dict(model.named_modules())
        return all(name in modules and same_rows(rows, modules[name]) for name, rows in self.samples.items())

    def write(self, model: PreTrainedModel, path: str) -> None:
        """Write the side file of a model's checkpoint."""
        tensors = side_tensors(model, self.profiles, self.factors)
        held = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(held, path, metadata={"format": "pt"})


def side_tensors(
    model: nn.Module, profiles: Mapping[str, SVDProfile], factors: Mapping[str, LowRankFactors]
) -> dict[str, Tensor]:
    """What a side file holds of some targets, by its names in the file.

    Args:
        model: with the dense ones among them in place.
        profiles: by module name.
        factors: of dense ones, by module name.
    """
    names = checkpoint_names(model, [*profiles, *factors])
    tensors = {f"{names[name]}.values": profile.values for name, profile in profiles.items()}
    for name, pair in factors.items():
        tensors |= {f"{names[name]}.left.weight": pair.left, f"{names[name]}.right.weight": pair.right}
        bias: Any = model.get_submodule(name).bias
        if bias is not None:
            tensors[f"{names[name]}.left.bias"] = bias.detach()
    return tensors


def first_rows(layer: Any) -> list[Tensor]:
    """A sample of a linear's weights: the first row of its weight, or of both its factors."""
    weights = (layer.left.weight, layer.right.weight) if isinstance(layer, LowRankLinear) else (layer.weight,)
    return [weight.detach()[0].cpu().clone() for weight in weights]


def same_rows(rows: list[Tensor], layer: Any) -> bool:
    """Whether a sample is still right; of a layer that is offloaded it cannot be told, so that it is not."""
    if any(parameter.is_meta for parameter in layer.parameters()):
        return False
    now = first_rows(layer)
    return [row.shape for row in rows] == [row.shape for row in now] and all(
        bool((old.to(new.dtype) == new).all()) for old, new in zip(rows, now, strict=True)
    )


def settle_elastic(model: PreTrainedModel) -> None:
    """Before a model's config is written, take `elastic` back where the checkpoint could not be cut."""
    config, elastic = model.config.quantization_config, getattr(model, "pgsvd_elastic", None)
    if config.elastic and (elastic is None or not elastic.fits(model)):
        config.elastic = False
        warn(
            "The model is saved as an ordinary checkpoint, not as an elastic one: what cutting needs is at hand only "
            "for a model that was compressed in this process and whose weights have not changed since."
        )


def write_elastic(model: PreTrainedModel, folder: str | os.PathLike) -> None:
    """Write the side file of an elastic model, and leave none beside any other."""
    path = os.path.join(folder, ELASTIC_NAME)
    if model.config.quantization_config.elastic:
        model.pgsvd_elastic.write(model, path)
    elif os.path.exists(path):
        os.remove(path)
