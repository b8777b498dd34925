"""Parts that are chosen by name, of this package or of another one that registers its own by an entry point."""

from __future__ import annotations

import contextlib
import difflib
import pkgutil
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import entry_points
from typing import Any


class Registry:
    """Names of parts, and where they are.

    Args:
        group: of the entry points, as ``lemon.segmenters``; another package registers with
            ``[project.entry-points."lemon.segmenters"]`` and ``NAME = "package.module:Class"`` in its pyproject.toml.
        kind: what each part is: an instance or a subclass of it.
        builtin: name -> this package's part, or its ``module:attribute``, which is imported when it is asked for.
    """

    def __init__(self, group: str, builtin: Mapping[str, Any], *, kind: type) -> None:
        self.group, self.builtin, self.kind = group, dict(builtin), kind

    def names(self) -> list[str]:
        """All names, this package's first."""
        return [*self.builtin | _registered(self.group)]

    def __contains__(self, name: str) -> bool:
        return name in self.builtin or name in _registered(self.group)

    def load(self, name: str) -> Any:
        """Import a part. Raises ValueError, one line, for an unknown name and for what is no such part."""
        if name not in self:
            raise ValueError(unknown(name, self.names()))
        where = self.builtin[name] if name in self.builtin else _registered(self.group)[name]
        try:
            part = pkgutil.resolve_name(where) if isinstance(where, str) else where
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"{name} is registered as {where}, which cannot be imported: {error}") from None
        if not (isinstance(part, self.kind) or (isinstance(part, type) and issubclass(part, self.kind))):
            raise ValueError(f"{name} is registered as {where}; expected a {self.kind.__name__} there")
        return part

    def parts(self) -> dict[str, Any]:
        """All parts by name; those that cannot be imported are left out."""
        parts = {}
        for name in self.names():
            with contextlib.suppress(ValueError):
                parts[name] = self.load(name)
        return parts


def unknown(name: str, names: Sequence[str]) -> str:
    """What is said of a name that is none of those."""
    close = difflib.get_close_matches(name, names, n=1)
    return f"got {name!r}; expected one of {', '.join(names)}{f'; did you mean {close[0]}?' if close else ''}"


@cache
def _registered(group: str) -> dict[str, str]:
    return {point.name: point.value for point in entry_points(group=group)}
