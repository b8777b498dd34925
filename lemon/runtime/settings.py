"""The settings that an output was begun with: it goes on only with the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from lemon.errors import ConfigError
from lemon.runtime.store import Store


def check_settings(
    store: Store, name: str, settings: Mapping[str, Any], *, is_empty: Callable[[], bool], remedy: str
) -> None:
    """Note the settings of an output in its file ``name``, or compare them with those that it was begun with.

    Args:
        settings: JSON values; those that decide what is made.
        is_empty: whether nothing was made in the output yet; then other settings replace the earlier ones.
        remedy: what a user can do about others, as "choose another output".

    Raises ConfigError where the settings differ: what differs, then and now, and the remedy.
    """
    if store.exists(name):
        earlier = store.read_json(name)
        if changed := settings_difference(earlier, settings):
            if not is_empty():
                raise ConfigError(f"output: {store.uri} was begun with other settings ({changed}); {remedy}")
        else:
            return
    store.write_json(name, dict(settings))


def settings_difference(earlier: Mapping[str, Any], now: Mapping[str, Any], *, prefix: str = "") -> str:
    """The keys in which two settings differ, with both values; empty where they are equal as JSON."""
    parts, now = [], json.loads(json.dumps(now))  # a tuple is a list once it was written
    for key in sorted(earlier.keys() | now.keys()):
        before, after = earlier.get(key), now.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            parts.append(settings_difference(before, after, prefix=f"{prefix}{key}."))
        elif before != after:
            parts.append(f"{prefix}{key} {before} then, {after} now")
    return ", ".join(part for part in parts if part)
