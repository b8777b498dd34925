"""Uniform random selection by rank: a stable hash of an id, so that sampling is a filter and samples are nested."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from lemon.cells.ledger import rows_with_cells
from lemon.cells.names import shard_name
from lemon.errors import ConfigError
from lemon.runtime.identifiers import likely_name, some, tcga_patient
from lemon.runtime.shards import ShardError, read_shard
from lemon.runtime.store import BATCH_ROWS, READERS, Store, fingerprint
from lemon.schema import CELLS, SlideRow

if TYPE_CHECKING:
    from lemon.cells.fields import SlideFields

logger = logging.getLogger(__name__)


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
    digest: str | None = None
    """Of the rows of the whole shard."""
    fields: SlideFields | None = None
    """What images are cut from the slide in place of the shard's own."""

    @property
    def images_digest(self) -> str | None:
        """Tells its images from all others."""
        return self.digest if self.digest is None or self.fields is None else f"{self.digest} {self.fields.um} um"


@dataclass(frozen=True)
class Selection:
    """Cells of a table, as prefixes of shards in the order of slide ids."""

    store: Store
    parts: tuple[Part, ...]

    @property
    def n_cells(self) -> int:
        """Cells in all."""
        return sum(part.n_rows for part in self.parts)

    @cached_property
    def starts(self) -> np.ndarray:
        """Where each part begins among all cells: int64 [P]."""
        sizes = np.array([part.n_rows for part in self.parts], np.int64)
        return sizes.cumsum() - sizes

    @property
    def fingerprint(self) -> str:
        """Names the selected cells by their content: equal for equal cells, wherever the table lies."""
        return fingerprint([(part.images_digest, part.n_rows) for part in self.parts])

    def batches(
        self,
        part: Part,
        columns: Sequence[str],
        *,
        first: int = 0,
        last: int | None = None,
        batch_rows: int = BATCH_ROWS,
    ) -> Iterator[pa.RecordBatch]:
        """Rows ``first`` to ``last`` (exclusive; None: all selected) of one part, in their order, a batch at a time.

        Raises ShardError.
        """
        left = (part.n_rows if last is None else last) - first
        rows = read_shard(
            self.store, part.name, schema=CELLS, columns=columns, digest=part.digest, first=first, batch_rows=batch_rows
        )
        with contextlib.closing(rows):
            for batch in rows:
                yield batch.slice(0, left)
                left -= min(left, len(batch))
                if not left:
                    return
        raise ShardError(f"{part.name}: lacks {left:,} of its cells")


def select_cells(
    store: Store,
    *,
    organs: Sequence[str] | None = None,
    slides: Sequence[str] | None = None,
    n_slides: int | None = None,
    n_cells: int | None = None,
    exclude_patients: Sequence[str] = (),
) -> Selection:
    """Choose cells of a table that ``lemon curate`` wrote, by slide first, then by rank.

    Args:
        store: the output of curation.
        organs, slides: keep slides of these organs, of these ids; None keeps all.
        n_slides: the slides of lowest rank of their id among those.
        n_cells: the cells of lowest rank among those slides.
        exclude_patients: leave out slides of these patients (those of a benchmark, say), as ``patients_by_slide`` names
            them, whatever the case and blanks. Names that match nothing are logged.

    Raises:
        ConfigError: nothing is left, or a name is not in the table.
    """
    rows = rows_with_cells(store)
    _check_names({row.organ for row in rows if row.organ is not None}, wanted=organs, key="select.organs")
    _check_names({row.slide_id for row in rows}, wanted=slides, key="select.slides")
    excluded = _of_patients(rows, exclude_patients)
    kept = [
        row
        for row in rows
        if (organs is None or row.organ in organs)
        and (slides is None or row.slide_id in slides)
        and row.slide_id not in excluded
    ]
    if n_slides is not None:
        order = np.argsort(rank_of(row.slide_id for row in kept), kind="stable")
        kept = [kept[index] for index in sorted(order[:n_slides])]
    if not kept:
        keys = "select.organs, select.slides, select.exclude_patients or exclude_benchmarks"
        raise ConfigError(f"select: no slide is left; loosen {keys}")
    counts = [row.n_cells for row in kept]
    if n_cells is not None and n_cells < sum(counts):
        counts = _prefixes(store, [row.slide_id for row in kept], n_cells=n_cells)
    parts = (
        Part(row.slide_id, shard_name(row.slide_id), count, row.cells_digest)
        for row, count in zip(kept, counts, strict=True)
    )
    return Selection(store, tuple(part for part in parts if part.n_rows))


def _prefixes(store: Store, slide_ids: Sequence[str], *, n_cells: int) -> list[int]:
    """How many rows of each shard are among the ``n_cells`` lowest ranks of all.

    The footers say between which ranks each row group lies. That bounds the rank sought, and only the groups that reach
    into the bounds are read, about one a shard, so memory does not grow with the number of cells.
    """
    with ThreadPoolExecutor(READERS) as pool:
        groups = list(pool.map(lambda slide_id: _groups(store, shard_name(slide_id)), slide_ids))
        low, high = _bounds(np.concatenate(groups), n_cells=n_cells)
        below = [int(groups_of_slide[groups_of_slide[:, 1] <= low, 2].sum()) for groups_of_slide in groups]
        astride = [
            np.flatnonzero((groups_of_slide[:, 1] > low) & (groups_of_slide[:, 0] <= high))
            for groups_of_slide in groups
        ]
        ranks = list(
            pool.map(lambda name, groups_of_slide: _ranks(store, shard_name(name), groups_of_slide), slide_ids, astride)
        )
    sought = n_cells - sum(below)
    threshold = np.partition(np.concatenate(ranks), sought - 1)[sought - 1]
    return [
        count + int(np.searchsorted(groups_of_slide, threshold, "right"))
        for count, groups_of_slide in zip(below, ranks, strict=True)
    ]


def _groups(store: Store, name: str) -> np.ndarray:
    """Lowest rank, highest rank and rows of each row group of a shard: float64 [G, 3]."""
    with store.open_parquet(name) as file:
        column, footer = file.schema_arrow.get_field_index("rank"), file.metadata
        groups = []
        for index in range(footer.num_row_groups):
            group = footer.row_group(index)
            known = group.column(column).statistics
            span = (known.min, known.max) if known is not None and known.has_min_max else (-np.inf, np.inf)
            groups.append((*span, group.num_rows))
    return np.array(groups, np.float64).reshape(-1, 3)


def _bounds(groups: np.ndarray, *, n_cells: int) -> tuple[float, float]:
    """Ranks between which the ``n_cells``-th lowest lies: above the first, at most the second."""
    by_low, by_high = groups[groups[:, 0].argsort()], groups[groups[:, 1].argsort()]
    # All cells of rank <= high are at least the rows of the groups that end there: the first high where these suffice.
    high = by_high[np.searchsorted(by_high[:, 2].cumsum(), n_cells), 1]
    # Below the start of a group lie at most the rows of the groups that start before it: the last start where these
    # do not suffice.
    before = by_low[:, 2].cumsum() - by_low[:, 2]
    low = by_low[np.searchsorted(before, n_cells) - 1, 0]
    return float(np.nextafter(low, -np.inf)), float(high)


def _ranks(store: Store, name: str, groups: np.ndarray) -> np.ndarray:
    """Ranks of some row groups of a shard, rising."""
    if not len(groups):
        return np.empty(0)
    with store.open_parquet(name) as file:
        return file.read_row_groups(groups.tolist(), columns=["rank"], use_threads=False)["rank"].to_numpy()


def patients_by_slide(rows: Sequence[SlideRow]) -> dict[str, set[str]]:
    """Slide id -> names of its patient, in one spelling: the table's, and that of the TCGA barcode in the slide's id.

    Two names rather than one, as a patient who is left in is a leak. A slide that has neither is a patient of its own.
    """
    patients = {}
    for row in rows:
        names = filter(None, (row.patient_id, tcga_patient(row.slide_id)))
        patients[row.slide_id] = {likely_name(name) for name in names} or {likely_name(row.slide_id)}
    return patients


def _of_patients(rows: Sequence[SlideRow], patients: Sequence[str]) -> set[str]:
    """Slides of some patients."""
    wanted = {likely_name(name): name for name in patients}
    named_patients = {slide: names & wanted.keys() for slide, names in patients_by_slide(rows).items()}
    absent = wanted.keys() - set().union(*named_patients.values())
    if absent:
        examples = some(sorted(wanted[name] for name in absent))
        logger.warning("select.exclude_patients: %d of %d match no patient (%s)", len(absent), len(wanted), examples)
    return {slide_id for slide_id, names in named_patients.items() if names}


def _check_names(known: set[str], *, wanted: Sequence[str] | None, key: str) -> None:
    absent = [name for name in wanted or () if name not in known]
    if absent:
        some = ", ".join(sorted(known)[:8]) or "none at all"
        raise ConfigError(f"{key}: got {absent[0]!r}, which the table does not have; it has {some}")
