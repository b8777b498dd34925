from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lemon import schema
from lemon.cells.crop import Claims
from lemon.cells.select import rank_of
from lemon.cells.shard import LowestRanks, Seams, SlideShard, images_from_arrow, images_to_arrow
from lemon.runtime.store import Store


def rows_of(count: int, *, start: int = 0) -> pa.Table:
    """Rows of the cells table whose images hold their number."""
    ids = [f"s_{index}_0" for index in range(start, start + count)]
    images = np.zeros((count, 60, 60, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(start, start + count) % 251
    values = {
        "cell_id": ids, "slide_id": ["s"] * count, "patient_id": [None] * count, "organ": [None] * count,
        "site": [None] * count, "polygon": [b""] * count, "rank": rank_of(ids), "image": images_to_arrow(images),
    }  # fmt: skip
    floats = {name: np.zeros(count) for name in schema.CELLS.names if name not in values}
    arrays = {**values, **floats}
    return pa.table({name: pa.array(arrays[name]) for name in schema.CELLS.names}).cast(schema.CELLS)


def claims_at(points: list[tuple[float, float]], *, contested: bool = True) -> Claims:
    rows = rows_of(len(points)).drop_columns(["image", "focus"])
    count = len(points)
    return Claims(
        rows=rows,
        centroid_px=np.array(points, float).reshape(-1, 2),
        contested=np.full(count, contested),
        at_edge=np.zeros(count, bool),
        kept=np.arange(count),
        images=np.zeros((count, 60, 60, 3), np.uint8),
        focus=np.full(count, np.nan, np.float32),
    )


def test_the_first_of_two_claims_at_a_seam_holds() -> None:
    seams = Seams()
    assert seams.resolve(claims_at([(100, 100), (200, 100)])).tolist() == [True, True]
    assert seams.resolve(claims_at([(102, 101), (300, 100), (200, 106)])).tolist() == [False, True, True]


def test_two_nuclei_of_one_region_never_contest_each_other() -> None:
    assert Seams().resolve(claims_at([(100, 100), (101, 100)])).all()


def test_claims_away_from_seams_always_hold() -> None:
    seams = Seams()
    assert seams.resolve(claims_at([(5, 5)], contested=False)).all()
    assert seams.resolve(claims_at([(5, 5)], contested=False)).all()


@pytest.mark.parametrize("keep", [None, 1, 50, 120, 5000])
@pytest.mark.parametrize("spill_rows", [40, 10_000])
def test_the_lowest_ranks_come_back_in_order_whatever_was_spilled(
    tmp_path: Path, keep: int | None, spill_rows: int
) -> None:
    lowest = LowestRanks(keep=keep, folder=tmp_path, spill_rows=spill_rows)
    sizes = [0, 30, 7, 64, 1, 100, 98]
    for start, size in zip(np.cumsum([0, *sizes]), sizes, strict=False):
        lowest.add(rows_of(size, start=int(start)))
    got = pa.concat_tables([schema.CELLS.empty_table(), *lowest.sorted_rows(chunk_rows=33)])
    assert got == rows_of(300).sort_by("rank").slice(0, keep)


def test_a_bounded_selection_stops_asking_for_crops_that_cannot_be_kept(tmp_path: Path) -> None:
    lowest = LowestRanks(keep=20, folder=tmp_path, spill_rows=100)
    lowest.add(rows_of(200))
    assert lowest.rank_below < 0.2
    assert not list(tmp_path.iterdir())  # and needs no disk


def test_a_shard_is_written_in_rank_order_with_its_schema(tmp_path: Path) -> None:
    shard = SlideShard(keep=None)
    held = shard.add(claims_at([(10 * index, 0.0) for index in range(50)]))
    assert len(held) == shard.n_nuclei == 50
    again = shard.add(claims_at([(10 * index, 1.0) for index in range(50)]))
    assert len(again) == 0
    store = Store(tmp_path)
    assert shard.commit(store, "cells/s.parquet")[:2] == (50, 0)
    shard.close()
    written = pq.read_table(tmp_path / "cells/s.parquet")
    assert written.schema.equals(schema.CELLS, check_metadata=True)
    assert written["rank"].to_pylist() == sorted(written["rank"].to_pylist())


def test_a_slide_without_nuclei_gets_an_empty_shard(tmp_path: Path) -> None:
    shard = SlideShard(keep=10)
    assert shard.commit(Store(tmp_path), "cells/s.parquet")[:2] == (0, 0)
    assert pq.read_table(tmp_path / "cells/s.parquet").num_rows == 0


def test_images_make_the_round_trip_also_through_slices() -> None:
    images = np.random.default_rng(0).integers(0, 256, (7, 60, 60, 3), dtype=np.uint8)
    column = images_to_arrow(images)
    assert (images_from_arrow(column) == images).all()
    assert (images_from_arrow(column.slice(2, 3)) == images[2:5]).all()
    assert (
        images_from_arrow(pa.chunked_array([column, column.slice(5)])) == np.concatenate([images, images[5:]])
    ).all()
    assert images_from_arrow(column.slice(0, 0)).shape == (0, 60, 60, 3)
