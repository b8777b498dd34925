"""The cells of one slide on their way to disk: seams are settled, the lowest ranks kept, memory bounded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lemon import schema
from lemon.cells.crop import SEAM_PX, Claims
from lemon.runtime.scratch import scratch_folder
from lemon.runtime.shards import write_shard
from lemon.runtime.store import Store

ROW_GROUP_ROWS = 2048  # 22 MB of crops: what a reader holds at least
SPILL_ROWS = 8192  # 88 MB of crops in memory before a sorted run goes to disk

# Measured by benchmarks/encoding.py: lz4 makes crops 1 % smaller and their reading 1.6 times slower.
PARQUET_OPTIONS = {
    "compression": {name: "none" if name == "image" else "zstd" for name in schema.CELLS.names},
    "use_dictionary": ["slide_id", "patient_id", "organ", "site"],
    "write_statistics": ["rank"],
    # Pages of 32 crops (346 KB), as a reader holds a page at least: at its defaults Arrow looks at a page's size every
    # 1,024 rows, which are 11 MB of crops.
    "write_batch_size": 32,
    "data_page_size": 300_000,
}


class Seams:
    """Settles claims near seams: of two regions that claim one nucleus, the first holds it.

    Regions must come in a fixed order, so that the outcome is the same in every run.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[int, int], list[tuple[float, float, int]]] = {}
        self._turn = 0

    def resolve(self, claims: Claims) -> np.ndarray:
        """Which of the claims hold: bool [N]."""
        self._turn += 1
        holds = np.ones(len(claims.contested), bool)
        for index in np.flatnonzero(claims.contested):
            holds[index] = self._claim(*claims.centroid_px[index])
        return holds

    def _claim(self, x_px: float, y_px: float) -> bool:
        column, row = int(x_px // (2 * SEAM_PX)), int(y_px // (2 * SEAM_PX))
        for near in ((column + i, row + j) for i in (-1, 0, 1) for j in (-1, 0, 1)):
            for x_other, y_other, turn in self._held.get(near, ()):
                if turn != self._turn and np.hypot(x_px - x_other, y_px - y_other) <= SEAM_PX:
                    return False
        self._held.setdefault((column, row), []).append((x_px, y_px, self._turn))
        return True


class LowestRanks:
    """Keeps the ``keep`` rows of lowest rank (all rows for None) and gives them back in rank order.

    Memory holds at most about SPILL_ROWS rows; the rest waits in sorted runs in a temporary folder.
    """

    def __init__(self, *, keep: int | None, folder: str | Path, spill_rows: int = SPILL_ROWS) -> None:
        self._keep, self._folder, self._spill_rows = keep, Path(folder), spill_rows
        self._buffer: list[pa.Table] = []
        self._runs: list[Path] = []
        self._run_ranks: list[np.ndarray] = []
        self.rank_below = 1.0
        """Rows of this rank or more cannot be among the kept."""

    def add(self, rows: pa.Table) -> None:
        """Take rows of the cells schema."""
        self._buffer.append(rows.filter(pc.less(rows["rank"], self.rank_below)))
        if sum(len(table) for table in self._buffer) >= self._spill_rows:
            self._compact()

    def sorted_rows(self, *, chunk_rows: int) -> Iterator[pa.Table]:
        """The kept rows in rank order, ``chunk_rows`` at a time (the last may be smaller)."""
        memory = self._sorted_buffer()
        ranks = np.sort(np.concatenate([*self._run_ranks, memory["rank"].to_numpy()]))[: self._keep]
        runs = [pa.ipc.open_file(pa.memory_map(str(path))).read_all() for path in self._runs]
        sources = list(zip([*runs, memory], [*self._run_ranks, memory["rank"].to_numpy()], strict=True))
        for start in range(0, len(ranks), chunk_rows):
            first, last = ranks[start], ranks[min(start + chunk_rows, len(ranks)) - 1]
            parts = []
            for table, own in sources:
                low, high = np.searchsorted(own, first, "left"), np.searchsorted(own, last, "right")
                parts.append(table.slice(low, high - low))
            yield pa.concat_tables(parts).sort_by([("rank", "ascending"), ("cell_id", "ascending")])

    def _sorted_buffer(self) -> pa.Table:
        if not self._buffer:
            return schema.CELLS.empty_table()
        return pa.concat_tables(self._buffer).sort_by("rank").slice(0, self._keep)

    def _compact(self) -> None:
        table = self._sorted_buffer()
        self._buffer = [table]
        if len(table) > self._spill_rows // 2:
            path = self._folder / f"run-{len(self._runs):05d}.arrow"
            with pa.ipc.new_file(path, table.schema) as writer:
                writer.write_table(table)
            self._runs.append(path)
            self._run_ranks.append(table["rank"].to_numpy())
            self._buffer = []
        if self._keep is not None:
            ranks = np.concatenate([*self._run_ranks, *(part["rank"].to_numpy() for part in self._buffer)])
            if len(ranks) >= self._keep:
                # One step above the last kept rank, so that the filter's "less" keeps it.
                self.rank_below = float(np.nextafter(np.partition(ranks, self._keep - 1)[self._keep - 1], 1))


class SlideShard:
    """Gathers the claims of a slide's regions and writes ``cells/<slide>.parquet`` when told to commit."""

    def __init__(self, *, keep: int | None) -> None:
        self._scratch = contextlib.ExitStack()
        folder = self._scratch.enter_context(scratch_folder())
        self._seams = Seams()
        self._cells = LowestRanks(keep=keep, folder=folder)
        self._edge_ids: set[str] = set()
        self.n_nuclei = 0

    @property
    def rank_below(self) -> float:
        """Crops of this rank or more need not be cut any more."""
        return self._cells.rank_below

    def add(self, claims: Claims) -> pa.Table:
        """Take a region's claims, in the order of the regions; returns the rows of the nuclei that it holds."""
        holds = self._seams.resolve(claims)
        self.n_nuclei += int(holds.sum())
        with_crop = holds[claims.kept]
        kept = claims.kept[with_crop]
        images = np.ascontiguousarray(claims.images[with_crop])
        focus = pa.array(claims.focus[with_crop], pa.float32(), from_pandas=True)  # NaN is null
        rows = claims.rows.take(kept).append_column(schema.FOCUS, focus)
        rows = rows.append_column(schema.CELLS.field("image"), images_to_arrow(images))
        self._edge_ids.update(claims.rows["cell_id"].take(kept[claims.at_edge[kept]]).to_pylist())
        self._cells.add(rows.cast(schema.CELLS))
        return claims.rows.filter(pa.array(holds))

    def commit(self, store: Store, name: str) -> tuple[int, int, str]:
        """Write the shard in rank order, atomically.

        Returns the number of cells, of those over the slide's edge, and the digest of the rows.
        """
        n_edge = 0
        with write_shard(store, name, schema.CELLS, **PARQUET_OPTIONS) as shard:
            for rows in self._cells.sorted_rows(chunk_rows=ROW_GROUP_ROWS):
                shard.write(rows, row_group_size=ROW_GROUP_ROWS)
                n_edge += sum(cell_id in self._edge_ids for cell_id in rows["cell_id"].to_pylist())
        return shard.n_rows, n_edge, shard.digest

    def close(self) -> None:
        """Remove what was spilled."""
        self._scratch.close()


def images_to_arrow(images: np.ndarray) -> pa.FixedSizeBinaryArray:
    """uint8 [N, 60, 60, 3] as fixed-size binary, without a copy where the array is contiguous."""
    data = pa.py_buffer(np.ascontiguousarray(images, np.uint8))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(schema.CELL_BYTES), len(images), [None, data])


def images_from_arrow(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """The image column as uint8 [N, 60, 60, 3]; a view of Arrow's memory for a single chunk."""
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    shape = (-1, schema.CELL_PX, schema.CELL_PX, 3)
    size = schema.CELL_BYTES
    parts = [
        np.frombuffer(chunk.buffers()[1], np.uint8, len(chunk) * size, chunk.offset * size).reshape(shape)
        for chunk in chunks
        if len(chunk)
    ]
    if not parts:
        return np.empty((0, schema.CELL_PX, schema.CELL_PX, 3), np.uint8)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
