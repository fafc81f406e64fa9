"""Classes by name: "concat", "mlm", "layer-norm". Users register their own beside ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any


class Registry(Mapping[str, Any]):
    """A mapping from names to classes.

    what         what stands behind the names, for error messages
    instantiate  give an instance made without arguments instead of the class

    Replaces merlin.models.utils.registry.Registry as transformers4rec.torch uses it.
    """

    def __init__(self, what: str, instantiate: bool = False) -> None:
        self.what = what
        self.instantiate = instantiate
        self._classes: dict[str, Callable[..., Any]] = {}

    def register(self, name: str | tuple[str, ...]) -> Callable[[Any], Any]:
        """Class decorator. Raises KeyError when a name is taken."""
        names = (name,) if isinstance(name, str) else tuple(name)
        return self.register_with_multiple_names(*names)

    def register_with_multiple_names(self, *names: str) -> Callable[[Any], Any]:
        """Class decorator for several names of one class. Raises KeyError when one is taken."""

        def decorate(cls: Any) -> Any:
            taken = [name for name in names if name in self._classes]
            if taken:
                raise KeyError(f"{self.what}: the names {taken} are registered already")
            self._classes.update(dict.fromkeys(names, cls))
            return cls

        return decorate

    def parse(self, value: Any) -> Any:
        """What a name stands for; anything but a string is given back as it is."""
        return self[value] if isinstance(value, str) else value

    def __getitem__(self, name: str) -> Any:
        if name not in self._classes:
            known = ", ".join(sorted(self._classes))
            raise UnknownName(f"{self.what} must be one of {known}; got {name!r}")
        found = self._classes[name]
        return found() if self.instantiate else found

    def __contains__(self, name: object) -> bool:
        return name in self._classes

    def __iter__(self) -> Iterator[str]:
        return iter(self._classes)

    def __len__(self) -> int:
        return len(self._classes)

    def __repr__(self) -> str:
        return f"Registry({self.what}: {', '.join(sorted(self._classes))})"


class UnknownName(ValueError, KeyError):
    """A name that nobody registered: a ValueError for callers, a KeyError for mappings."""

    __str__ = ValueError.__str__
