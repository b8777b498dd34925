"""What happened to every slide: rows of the slides table, attempts, and the settings that an output was made with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from lemon import schema
from lemon.cells.names import SETTINGS, file_stem, ledger_name
from lemon.config import ConfigError, CurateConfig, HoverFastConfig
from lemon.runtime.store import Store, code_version, file_fingerprint, fingerprint, local_copy


class Ledger:
    """The ledger of one output. A slide's row is written last, so a row means that the slide is complete."""

    def __init__(self, store: Store, *, config_fingerprint: str) -> None:
        self.store, self.config_fingerprint = store, config_fingerprint

    def rows(self) -> list[dict[str, Any]]:
        """All rows, sorted by slide id."""
        return read_ledger(self.store).to_pylist()

    def commit(self, row: dict[str, Any]) -> dict[str, Any]:
        """Write a slide's row and forget its attempts; returns the whole row."""
        row = row | {"config_fingerprint": self.config_fingerprint, "code_version": code_version()}
        stem = file_stem(row["slide_id"])
        self.store.write_table(ledger_name(row["slide_id"]), pa.Table.from_pylist([row], schema=schema.SLIDES))
        self.store.delete(f"attempts/{stem}")
        for folder in ("cells", "geojson", "slides"):
            self.store.remove_temporaries(folder, stem)
        return row

    def begin(self, slide_id: str, *, run_id: str) -> int:
        """Note that work on a slide begins; returns how often it began before in this run without coming to an end.

        Attempts of other runs do not count: that a whole job was killed says nothing against the slide.
        """
        return begin_attempt(self.store, slide_id, run_id=run_id)


def begin_attempt(store: Store, slide_id: str, *, run_id: str) -> int:
    """Leave a mark that work on a slide begins; returns how many marks of this run were there."""
    folder = f"attempts/{file_stem(slide_id)}"
    earlier = sum(f"/{run_id}-" in name for name in store.list(folder))
    store.write_bytes(f"{folder}/{run_id}-{earlier}", b"")
    return earlier


def tell_statuses(rows: Sequence[dict[str, Any]]) -> str:
    """Print the reason of each row that has one; returns how many slides are done, partial and failed, in words."""
    for row in rows:
        if row["error"]:
            print(f"  {row['slide_id']}: {row['status']}: {row['error']}")
    counts = Counter(row["status"] for row in rows)
    return ", ".join(f"{counts[status]} {status}" for status in schema.SLIDE_STATUSES)


def read_ledger(store: Store) -> pa.Table:
    """The slides table of an output, sorted by slide id; empty where there is none."""
    return store.read_tables("slides", schema=schema.SLIDES).sort_by("slide_id")


def open_ledger(store: Store, config: CurateConfig) -> Ledger:
    """The ledger of an output; raises ConfigError when the output was made with other settings."""
    settings = config.result_settings()
    if isinstance(config.segmenter, HoverFastConfig):
        with local_copy(config.segmenter.checkpoint) as checkpoint:
            settings["segmenter"]["checkpoint"] = file_fingerprint(checkpoint)
    mark: dict[str, Any] = {"settings": settings, "fingerprint": fingerprint(settings)}
    if config.overwrite:
        for name in ("slides", "cells", "geojson", "attempts", SETTINGS):
            store.delete(name)
    if store.exists(SETTINGS):
        earlier = store.read_json(SETTINGS)
        if earlier["fingerprint"] != mark["fingerprint"]:
            raise ConfigError(
                f"output: {store.uri} was made with other settings ({_difference(earlier['settings'], settings)}); "
                "choose another output or overwrite=true"
            )
    else:
        store.write_json(SETTINGS, mark)
    return Ledger(store, config_fingerprint=mark["fingerprint"])


def _difference(earlier: dict[str, Any], now: dict[str, Any], prefix: str = "") -> str:
    parts = []
    for key in sorted(earlier.keys() | now.keys()):
        before, after = earlier.get(key), now.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            parts.append(_difference(before, after, f"{prefix}{key}."))
        elif before != after:
            parts.append(f"{prefix}{key} {before} then, {after} now")
    return ", ".join(part for part in parts if part)
