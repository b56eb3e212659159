"""What PyTorch keeps for the whole thread, though a model may set it for a part of its forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Modes:
    """Whether gradients are recorded, and how autocast casts.

    Args:
        grad: whether they are.
        cache: whether autocast keeps the weights that it has cast.
        autocast: whether it is on, and to which dtype it casts, by device type.
    """

    grad: bool
    cache: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def current(cls) -> Modes:
        """Those that are set."""
        autocast = [(each, torch.is_autocast_enabled(each), torch.get_autocast_dtype(each)) for each in device_types()]
        return cls(torch.is_grad_enabled(), torch.is_autocast_cache_enabled(), tuple(autocast))

    def set(self) -> None:
        """Set them; weights that autocast has cast are forgotten, as the dense ones may be by now."""
        torch.set_grad_enabled(self.grad)
        torch.set_autocast_cache_enabled(self.cache)
        for device_type, enabled, dtype in self.autocast:
            torch.set_autocast_enabled(device_type, enabled)
            torch.set_autocast_dtype(device_type, dtype)
        torch.clear_autocast_cache()


def device_types() -> list[str]:
    """The kinds of device that a model can be on here."""
    accelerator = torch.accelerator.current_accelerator()
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]
