"""Parts that are chosen by name, of this package or of another one that registers its own by an entry point."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any


class Registry:
    """Names of parts, and where they are.

    Args:
        group: of the entry points, as ``lemon.segmenters``; another package registers with
            ``[project.entry-points."lemon.segmenters"]`` and ``NAME = "package.module:Class"`` in its pyproject.toml.
        own: name -> ``module:attribute`` of this package's.
    """

    def __init__(self, group: str, own: Mapping[str, str]) -> None:
        self.group, self.own = group, dict(own)

    def names(self) -> list[str]:
        """All names, this package's first."""
        return [*self.own, *(name for name in _registered(self.group) if name not in self.own)]

    def load(self, name: str) -> Any:
        """Import a part. Raises ValueError, one line, for an unknown name and for one that cannot be imported."""
        where = self.own.get(name) or _registered(self.group).get(name)
        if where is None:
            raise ValueError(f"got {name!r}; expected one of {', '.join(self.names())}")
        module, _, attribute = where.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"{name} is registered as {where}, which cannot be imported: {error}") from None


@cache
def _registered(group: str) -> dict[str, str]:
    return {point.name: point.value for point in entry_points(group=group)}
