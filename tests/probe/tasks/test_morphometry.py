"""Regression of size, shape and stain on curated cells."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from lemon.cells.select import Selection, rank_of
from lemon.probe.task import TaskError
from lemon.probe.tasks.catalogue import open_task
from lemon.runtime.store import Store
from lemon.schema import CELL_BYTES
from tests.cells_table import numbered, write_slide


def table(folder: Path, *, slides: int) -> Store:
    """Slides of 80 cells on a diagonal of 1.2 mm, whose area is their number."""
    store = Store(folder)
    for index in range(slides):
        number = np.argsort(rank_of([f"s{index}_{cell}_{cell}" for cell in range(80)])).astype(float)  # as in a shard
        values = {"x_level0_px": number * 60, "y_level0_px": number * 60, "mpp": np.full(80, 0.25), "area_um2": number}
        write_slide(store, f"s{index}", numbered(80), arrays=values)
    return store


def test_one_slide_is_split_by_squares_of_neighbours(tmp_path: Path) -> None:
    task = open_task(f"morphometry:{table(tmp_path, slides=1).uri}", Path("nowhere"))
    assert task.kind == "regression"
    assert task.cluster == "block"
    assert len(np.unique(task.groups["block"])) == 5
    (protocol,) = task.protocols
    for fold in protocol.folds:
        assert not set(task.groups["block"][fold.train]) & set(task.groups["block"][fold.test])


def test_targets_belong_to_their_images_and_are_standardised(tmp_path: Path) -> None:
    task = open_task(f"morphometry:{table(tmp_path, slides=1).uri}", Path("nowhere"))
    number = task.images[:, 0, 0, 0].astype(float)
    assert np.corrcoef(number, task.target[:, 0])[0, 1] == pytest.approx(1)
    assert task.target[:, 0].std() == pytest.approx(1, abs=1e-5)
    assert not task.target[:, 1].any()  # constant here


def test_many_slides_are_split_by_slide_and_the_lowest_ranks_are_taken(tmp_path: Path) -> None:
    uri = table(tmp_path, slides=6).uri
    task = open_task(f"morphometry:{uri}", Path("nowhere"), n_cells=100)
    assert task.cluster == "slide"
    assert len(task.images) == 100


def test_a_folder_without_cells_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="holds no cells"):
        open_task(f"morphometry:{tmp_path}", Path("nowhere"))
    with pytest.raises(TaskError, match=r"no folder .*nothing; expected the output of lemon curate"):
        open_task(f"morphometry:{tmp_path}/nothing", Path("nowhere"))


def test_no_more_is_read_of_a_shard_than_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri, read = table(tmp_path, slides=6).uri, []
    batches = Selection.batches

    def counted(*args: Any, **options: Any) -> Iterator[pa.RecordBatch]:
        for batch in batches(*args, **options):
            read.append(pa.Table.from_batches([batch]).get_total_buffer_size())
            yield batch

    monkeypatch.setattr(Selection, "batches", counted)
    open_task(f"morphometry:{uri}", Path("nowhere"), n_cells=30)
    assert sum(read) < 2 * 30 * CELL_BYTES
