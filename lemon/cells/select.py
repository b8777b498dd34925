"""Uniform random selection by rank: a stable hash of an id, so that sampling is a filter and samples are nested."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from lemon.cells.ledger import read_ledger
from lemon.cells.names import shard_name
from lemon.config import ConfigError
from lemon.storage import Store, fingerprint


def rank_of(ids: Iterable[str]) -> np.ndarray:
    """Rank of each id, float64 [N] in [0, 1): uniform over ids, the same on every machine and in every run.

    The first 53 bits of BLAKE2b, which is all that a float64 holds.
    """
    digests = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in ids)
    return np.array([int.from_bytes(digest, "big") >> 11 for digest in digests], np.float64) / (1 << 53)


@dataclass(frozen=True)
class Part:
    """The rows of lowest rank of one slide's shard: a prefix, because shards are in rank order."""

    slide_id: str
    name: str
    n_rows: int


@dataclass(frozen=True)
class Selection:
    """Cells of a table, as prefixes of shards in the order of slide ids."""

    store: Store
    parts: tuple[Part, ...]
    made_with: tuple[str, ...] = ()
    """Fingerprints of the settings that curation made the table with."""

    @property
    def n_cells(self) -> int:
        """Cells in all."""
        return sum(part.n_rows for part in self.parts)

    @property
    def fingerprint(self) -> str:
        """Names the selected cells: equal for equal tables and equal selections."""
        return fingerprint([self.store.uri, self.made_with, [(part.slide_id, part.n_rows) for part in self.parts]])


def select_cells(
    store: Store,
    *,
    organs: Sequence[str] | None = None,
    slides: Sequence[str] | None = None,
    n_slides: int | None = None,
    n_cells: int | None = None,
    exclude_patients: Sequence[str] = (),
) -> Selection:
    """Choose cells of a table that ``jobs/curate.py`` wrote, by slide first, then by rank.

    Args:
        store: the output of curation.
        organs, slides: keep slides of these organs, of these ids; None keeps all.
        n_slides: the slides of lowest rank of their id among those.
        n_cells: the cells of lowest rank among those slides.
        exclude_patients: leave out slides of these patients (those of a benchmark, say).

    Raises:
        ConfigError: nothing is left, or a name is not in the table.
    """
    rows = [row for row in read_ledger(store).to_pylist() if row["status"] != "failed" and row["n_cells"]]
    if not rows:
        raise ConfigError(f"cells: {store.uri} holds no cells; expected the output of jobs/curate.py")
    _check_names(rows, column="organ", wanted=organs, key="select.organs")
    _check_names(rows, column="slide_id", wanted=slides, key="select.slides")
    kept = [
        row
        for row in rows
        if (organs is None or row["organ"] in organs)
        and (slides is None or row["slide_id"] in slides)
        and row["patient_id"] not in set(exclude_patients)
    ]
    if n_slides is not None:
        order = np.argsort(rank_of(row["slide_id"] for row in kept), kind="stable")
        kept = [kept[index] for index in sorted(order[:n_slides])]
    if not kept:
        raise ConfigError("select: no slide is left; loosen select.organs, select.slides or select.exclude_patients")
    counts = [row["n_cells"] for row in kept]
    if n_cells is not None and n_cells < sum(counts):
        counts = _prefixes(store, [row["slide_id"] for row in kept], n_cells=n_cells)
    parts = (Part(row["slide_id"], shard_name(row["slide_id"]), count) for row, count in zip(kept, counts, strict=True))
    made_with = tuple(sorted({row["config_fingerprint"] for row in kept}))
    return Selection(store, tuple(part for part in parts if part.n_rows), made_with)


def _prefixes(store: Store, slide_ids: Sequence[str], *, n_cells: int) -> list[int]:
    """How many rows of each shard are among the ``n_cells`` lowest ranks of all."""

    def ranks(slide_id: str) -> np.ndarray:
        return store.read_table(shard_name(slide_id), columns=["rank"])["rank"].to_numpy()

    with ThreadPoolExecutor(16) as pool:
        per_slide = list(pool.map(ranks, slide_ids))
    threshold = np.partition(np.concatenate(per_slide), n_cells - 1)[n_cells - 1]
    return [int(np.searchsorted(ranks, threshold, "right")) for ranks in per_slide]


def _check_names(rows: list[dict[str, Any]], *, column: str, wanted: Sequence[str] | None, key: str) -> None:
    known = {row[column] for row in rows if row[column] is not None}
    absent = [name for name in wanted or () if name not in known]
    if absent:
        some = ", ".join(sorted(known)[:8]) or "none at all"
        raise ConfigError(f"{key}: got {absent[0]!r}, which the table does not have; it has {some}")
