"""What became of every slide in an output of embedding, and the model that the output was made with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa

from lemon.cells.names import file_stem, geojson_name, ledger_name
from lemon.embed.names import CENTRES, FOLDERS, SETTINGS, clusters_name, embeddings_name, h5ad_name, spatialdata_name
from lemon.runtime.attempts import FOLDER as ATTEMPTS
from lemon.runtime.attempts import begin_attempt, end_attempts
from lemon.runtime.settings import keep_settings
from lemon.runtime.store import Store, code_version
from lemon.schema import EMBEDDED


@dataclass(frozen=True)
class Made:
    """What all embeddings of an output have in common."""

    model: str
    model_fingerprint: str
    width: int
    dtype: str
    precision: str


class EmbedLedger:
    """The ledger of one output. A slide's row is written last, so a row means that its embeddings are complete."""

    def __init__(self, store: Store, made: Made) -> None:
        self.store, self.made = store, made

    def rows(self) -> dict[str, dict[str, Any]]:
        """All rows by slide id."""
        return {row["slide_id"]: row for row in self.store.read_tables("slides", schema=EMBEDDED).to_pylist()}

    def begin(self, slide_id: str, *, run_id: str) -> int:
        """Note that work on a slide begins; returns how often it began before in this run without coming to an end."""
        return begin_attempt(self.store, file_stem(slide_id), run_id=run_id)

    def discard(self, slide_id: str) -> None:
        """Forget a slide, its embeddings and what was made from them, because they are about to be replaced."""
        for name in (ledger_name, embeddings_name, clusters_name, h5ad_name, geojson_name, spatialdata_name):
            self.store.delete(name(slide_id))

    def commit(self, row: dict[str, Any]) -> dict[str, Any]:
        """Write a slide's row and forget its attempts; returns the whole row."""
        slide_id = row["slide_id"]
        known = {"model": self.made.model, "model_fingerprint": self.made.model_fingerprint}
        row = {name: row.get(name) for name in EMBEDDED.names} | known | {"code_version": code_version()}
        self.store.write_table(ledger_name(slide_id), pa.Table.from_pylist([row], schema=EMBEDDED))
        end_attempts(self.store, file_stem(slide_id))
        return row

    def without_embeddings(self, jobs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The slides whose cells, of this digest, are not embedded yet."""
        rows, files = self.rows(), set(self.store.list("embeddings"))
        return [job for job in jobs if not (self._says(rows.get(job["slide_id"]), job) and _file(job) in files)]

    def _says(self, row: dict[str, Any] | None, job: dict[str, Any]) -> bool:
        return (
            row is not None
            and row["status"] != "failed"
            and row["model_fingerprint"] == self.made.model_fingerprint
            and all(row[name] == job[name] for name in ("n_cells", "cells_digest"))
        )


def _file(job: dict[str, Any]) -> str:
    return embeddings_name(job["slide_id"])


def _same_model(earlier: dict[str, Any], made: Made) -> str | None:
    """What the model of an output was called, where it has the same weights."""
    return earlier["model"] if earlier.get("model_fingerprint") == made.model_fingerprint else None


def open_ledger(store: Store, made: Made, *, overwrite: bool) -> EmbedLedger:
    """The ledger of an output; raises ConfigError when the output was begun with another model or other numbers."""
    if overwrite:
        for name in (*FOLDERS, CENTRES, SETTINGS):
            store.delete(name)
    if store.exists(SETTINGS) and (called := _same_model(store.read_json(SETTINGS, dict), made)):
        made = replace(made, model=called)  # the same weights from another folder
    store.delete(ATTEMPTS)  # marks of a run that was killed; only this one's count
    keep_settings(
        store,
        SETTINGS,
        asdict(made),
        is_empty=lambda: not store.list("slides"),
        remedy="choose another output or overwrite=true",
    )
    return EmbedLedger(store, made)
