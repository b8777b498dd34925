"""Small cells tables for tests: known images, written as curation writes them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lemon import schema
from lemon.cells.ledger import cells_ledger, rows_with_cells
from lemon.cells.names import shard_name
from lemon.cells.select import rank_of
from lemon.cells.shard import PARQUET_OPTIONS, images_to_arrow
from lemon.runtime.shards import write_shard
from lemon.runtime.store import Store
from lemon.slides.source import digest_of, size_and_time
from lemon.slides.synthetic import make_tissue, write_pyramid


def synthetic_crops(count: int, *, seed: int = 0) -> np.ndarray:
    """Nuclei of a made-up tissue, uint8 [count, 60, 60, 3]."""
    tissue = make_tissue(max(600, int(np.sqrt(count) * 80)), seed=seed)
    windows = np.lib.stride_tricks.sliding_window_view(tissue.image, (60, 60, 3))[:, :, 0]
    corners = np.round(tissue.center_px - 29.5).astype(int).clip(0, np.array(windows.shape[1::-1]) - 1)
    chosen = np.resize(np.arange(len(corners)), count)
    return windows[corners[chosen, 1], corners[chosen, 0]]


def write_slide(
    store: Store,
    slide_id: str,
    images: np.ndarray,
    *,
    arrays: dict[str, Any] | None = None,
    row_group_size: int | None = None,
    **columns: Any,
) -> np.ndarray:
    """One slide of a cells table and its row of the ledger; returns the images in the order of the shard (by rank).

    ``arrays`` are columns of the shard, in its order.
    """
    ids = [f"{slide_id}_{index}_{index}" for index in range(len(images))]
    rank = rank_of(ids)
    order = np.argsort(rank)
    slide = {name: columns.get(name) for name in ("patient_id", "organ", "site")}
    values: dict[str, Any] = {"cell_id": np.array(ids, object)[order], "rank": rank[order]}
    values["image"] = images_to_arrow(images[order])
    values |= {name: [value] * len(images) for name, value in (slide | {"slide_id": slide_id}).items()}
    values |= {name: [None] * len(images) for name in schema.FOREIGN}
    values |= {"polygon": [b""] * len(images)} | (arrays or {})
    made = [pa.array(values.get(name, np.zeros(len(images)))) for name in schema.CELLS.names]
    table = pa.table(dict(zip(schema.CELLS.names, made, strict=True))).cast(schema.CELLS)
    with write_shard(store, shard_name(slide_id), schema.CELLS, **PARQUET_OPTIONS) as shard:
        shard.write(table, row_group_size=row_group_size)
    counts = {"n_cells": len(images), "n_nuclei": len(images)}
    row = schema.SlideRow(slide_id, "", **slide, **counts, status="done", cells_digest=shard.digest)
    cells_ledger(store, config_fingerprint="test").commit(row)
    return images[order]


TISSUE_MPP, TISSUE_PX = 0.5, 600


def table_of_a_slide(folder: Path) -> Store:
    """32 cells with random images, two of them at corners, of a slide of 600 px at 0.5 um/px that lies in
    ``folder/s.tiff``."""
    path = folder / "s.tiff"
    write_pyramid(path, make_tissue(TISSUE_PX, seed=1).image, mpp=TISSUE_MPP)
    generator = np.random.default_rng(0)
    corners = [[0.5, 0.5], [TISSUE_PX - 1, TISSUE_PX - 1]]
    place = np.concatenate([generator.uniform(0, TISSUE_PX, (30, 2)), corners])
    store = Store(folder / "cells")
    arrays = {"x_level0_px": place[:, 0], "y_level0_px": place[:, 1], "mpp": np.full(len(place), TISSUE_MPP)}
    write_slide(store, "s", generator.integers(0, 256, (len(place), 60, 60, 3), np.uint8), arrays=arrays)
    (row,) = rows_with_cells(store)
    size, time = size_and_time(str(path)) or (0, 0)
    source = {"source_size_bytes": size, "source_mtime_ns": time, "source_digest": digest_of(path)}
    cells_ledger(store, config_fingerprint="test").commit(replace(row, path=str(path), mpp=TISSUE_MPP, **source))
    return store


def numbered(count: int, *, start: int = 0) -> np.ndarray:
    """Images whose first pixel tells their number."""
    images = np.zeros((count, 60, 60, 3), np.uint8)
    numbers = np.arange(start, start + count)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = numbers % 256, numbers // 256
    return images


def numbers_of(images: np.ndarray) -> list[int]:
    """The numbers that ``numbered`` wrote."""
    first = np.asarray(images)[:, 0, 0].astype(int)
    return (first[:, 0] + 256 * first[:, 1]).tolist()


def small_table(folder: Path) -> tuple[Store, dict[str, np.ndarray]]:
    """Three slides of two organs and patients: 40, 50 and 60 numbered cells."""
    store = Store(folder)
    slides = {"a": ("breast", "p1", 40), "b": ("lung", "p2", 50), "c": ("lung", "p3", 60)}
    written, start = {}, 0
    for slide_id, (organ, patient, count) in slides.items():
        written[slide_id] = write_slide(store, slide_id, numbered(count, start=start), organ=organ, patient_id=patient)
        start += count
    return store, written
