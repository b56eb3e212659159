"""Makes stock transformers know PGSVD checkpoints without anybody importing this package.

PyTorch calls `autoload` at the end of `import torch` through the entry point group `torch.backends`. It imports
neither torch nor transformers: it leaves a finder that waits for transformers' own import and registers the quantizer
right after it. `import optimum_pgsvd` does the same. `PGSVD_AUTOLOAD=0` switches both off, and
`TORCH_DEVICE_BACKEND_AUTOLOAD=0` PyTorch's call; using a public name of the package registers in any case.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


# modeling_utils is imported by every way of loading a model; quantizers.auto by tools that only read configs.
WATCHED = ("transformers.modeling_utils", "transformers.quantizers.auto")

# Importing these imports quantizers.auto; while they are half imported, registration waits for the next occasion.
NEEDED = ("optimum_pgsvd.modeling_pgsvd", "optimum_pgsvd.config")


class _RegisterAfter(Loader):
    """Loads a module as its own loader would, then registers."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register()

    def __getattr__(self, name: str) -> object:
        return getattr(self.loader, name)


class _Finder(MetaPathFinder):
    """Finds the watched modules where they are, and wraps their loaders."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in WATCHED:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisterAfter(spec.loader)
        return spec


def _register() -> None:
    """Register the quantizer; a failure is a warning, because it must never break `import torch` or transformers."""
    if any(name in sys.modules and not _imported(name) for name in NEEDED):
        return
    try:
        from .quantizer import register

        register()
    except Exception as error:
        warnings.warn(
            f"optimum-pgsvd could not register with transformers, so PGSVD checkpoints will not load: {error!r}",
            RuntimeWarning,
            stacklevel=2,
        )


def _imported(name: str) -> bool:
    module = sys.modules.get(name)
    return module is not None and not getattr(module.__spec__, "_initializing", False)


def autoload() -> None:
    """Register now if transformers' loading code is imported, else as soon as it is. Safe to call repeatedly."""
    if any(map(_imported, WATCHED)):
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def entry_point() -> None:
    """What PyTorch and the package's own import call; obeys `PGSVD_AUTOLOAD=0`."""
    if os.environ.get("PGSVD_AUTOLOAD", "1") != "0":
        autoload()
