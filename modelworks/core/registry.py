"""The one plug seam: a name resolves to an object, lazily.

Built-ins are "module:attribute" strings; third parties use an entry point of the same group, which is looked at only
when a name is unknown or names are listed. A built-in wins, so installing a package never changes one silently.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from importlib import import_module
from typing import Any, Generic, TypeVar

from modelworks.core.errors import InvalidInput

T = TypeVar("T")


class Registry(Generic[T]):
    """`group` is the entry point group ("modelworks.trainers"); `what` the word used in errors ("algorithm")."""

    def __init__(self, group: str, what: str, builtin: dict[str, str]) -> None:
        self.group = group
        self.what = what
        self._builtin = dict(builtin)
        self._loaded: dict[str, T] = {}

    @cached_property
    def _targets(self) -> dict[str, str]:
        from importlib.metadata import entry_points  # slow: only when names are listed or one is unknown

        return {point.name: point.value for point in entry_points(group=self.group)} | self._builtin

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._targets))

    def __contains__(self, name: object) -> bool:
        return name in self._builtin or name in self._targets

    def register(self, name: str, plug: T) -> T:
        """For tests and notebooks; a package uses an entry point."""
        self._builtin[name] = ""
        self._targets[name] = ""
        self._loaded[name] = plug
        return plug

    def get(self, name: str) -> T:
        if name not in self._loaded:
            target = self._builtin.get(name) or self._targets.get(name)
            if not target:
                raise InvalidInput(
                    f"there is no {self.what} {name!r}; choose one of: {', '.join(self)}",
                    code=f"unknown_{self.what.replace(' ', '_')}",
                    param=self.what,
                )
            module, _, attribute = target.partition(":")
            plug: Any = getattr(import_module(module), attribute)
            self._loaded[name] = plug
        return self._loaded[name]
