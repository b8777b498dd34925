"""What happened to every slide: rows of the slides table, and the settings that an output was made with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from lemon import schema
from lemon.cells.names import FOLDERS, SETTINGS, file_stem, geojson_name, ledger_name, shard_name
from lemon.config import CurateConfig, HoverFastConfig
from lemon.nuclei.released import weights_path
from lemon.runtime.attempts import FOLDER as ATTEMPTS
from lemon.runtime.attempts import begin_attempt, end_attempts
from lemon.runtime.settings import keep_settings
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
        self.store.write_table(ledger_name(row["slide_id"]), pa.Table.from_pylist([row], schema=schema.SLIDES))
        end_attempts(self.store, file_stem(row["slide_id"]))
        return row

    def begin(self, slide_id: str, *, run_id: str) -> int:
        """Note that work on a slide begins; returns how often it began before in this run without coming to an end."""
        return begin_attempt(self.store, file_stem(slide_id), run_id=run_id)

    def without_shard(self, rows: Sequence[dict[str, Any]]) -> set[str]:
        """Slides whose rows say that they have cells, and whose shard is gone."""
        there = set(self.store.list("cells"))
        return {row["slide_id"] for row in rows if row["n_cells"] and shard_name(row["slide_id"]) not in there}

    def without_geojson(self, rows: Sequence[dict[str, Any]]) -> set[str]:
        """Slides with nuclei whose GeoJSON is gone, or was not asked for when they were curated."""
        there = set(self.store.list("geojson"))
        return {row["slide_id"] for row in rows if row["n_nuclei"] and geojson_name(row["slide_id"]) not in there}


def tell_statuses(rows: Sequence[dict[str, Any]]) -> str:
    """Print the reason of each row that has one; returns how many slides are done, partial and failed, in words."""
    for row in rows:
        if row["error"]:
            print(f"  {row['slide_id']}: {row['status']}: {row['error']}")
    counts = Counter(row["status"] for row in rows)
    return ", ".join(f"{counts[status]} {status}" for status in schema.SLIDE_STATUSES)


def read_ledger(store: Store) -> pa.Table:
    """The slides table of an output, sorted by slide id; empty where there is none. Raises ConfigError."""
    return store.read_tables("slides", schema=schema.SLIDES).sort_by("slide_id")


def open_ledger(store: Store, config: CurateConfig) -> Ledger:
    """The ledger of an output; raises ConfigError when the output was made with other settings."""
    settings = config.result_settings()
    if isinstance(config.segmenter, HoverFastConfig):
        with local_copy(weights_path(config.segmenter.checkpoint)) as checkpoint:
            settings["segmenter"]["checkpoint"] = file_fingerprint(checkpoint)
    if config.overwrite:
        for name in (*FOLDERS, SETTINGS):
            store.delete(name)
    store.delete(ATTEMPTS)  # marks of a run that was killed; only this one's count
    keep_settings(
        store,
        SETTINGS,
        settings,
        is_empty=lambda: not store.list("slides"),
        remedy="choose another output or overwrite=true",
    )
    return Ledger(store, config_fingerprint=fingerprint(settings))
