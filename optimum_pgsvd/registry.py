"""Named functions of one kind, registered by a decorator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from .errors import ConfigError


F = TypeVar("F", bound=Callable[..., Any])


class Registry(Generic[F]):
    """Functions by name.

    Args:
        kind: the config field that names them, used in messages.
        traits: the facts about each that its callers need, as they are unless a function says otherwise.
    """

    def __init__(self, kind: str, **traits: Any):
        self.kind, self.traits = kind, traits
        self._functions: dict[str, F] = {}
        self._traits: dict[str, dict[str, Any]] = {}

    def register(self, name: str, **traits: Any) -> Callable[[F], F]:
        """Decorator: make a function known under a name, with what is not as usual about it.

        Raises:
            ValueError: the name is taken, or a trait is none of this registry.
        """
        if unknown := traits.keys() - self.traits.keys():
            known = ", ".join(self.traits) or "none"
            raise ValueError(f"{self.kind} {name!r} has no trait {', '.join(sorted(unknown))}; known are {known}")

        def add(function: F) -> F:
            if name in self._functions:
                raise ValueError(f"{self.kind} {name!r} is already registered")
            self._functions[name], self._traits[name] = function, self.traits | traits
            return function

        return add

    def names(self) -> list[str]:
        """Every registered name."""
        return sorted(self._functions)

    def check(self, name: str) -> str:
        """The name itself; raises `ConfigError`, listing the known names, when it is not registered."""
        if not isinstance(name, str) or name not in self._functions:
            raise ConfigError(f"{self.kind}={name!r} is not known; known are {', '.join(self.names())}")
        return name

    def __getitem__(self, name: str) -> F:
        return self._functions[self.check(name)]

    def trait(self, name: str, trait: str) -> Any:
        """A fact about a registered function."""
        return self._traits[self.check(name)][trait]
