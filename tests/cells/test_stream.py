"""Images streamed from a table: the right ones in any order of blocks, with few files open and little in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lemon.cells.images import read_images, sample_images
from lemon.cells.order import Stream
from lemon.cells.select import Selection, select_cells
from lemon.cells.stream import StreamedImages
from lemon.errors import ConfigError
from lemon.runtime.store import Store
from tests.cells_table import numbered, numbers_of, write_slide


@pytest.fixture(scope="module")
def selection(tmp_path_factory: pytest.TempPathFactory) -> Selection:
    """Slides of 100 to 4,500 cells, in one to three row groups."""
    store, start = Store(tmp_path_factory.mktemp("stream")), 0
    for slide_id, count in {"a": 4500, "b": 100, "c": 2100, "d": 2048}.items():
        write_slide(store, slide_id, numbered(count, start=start), row_group_size=2048)
        start += count
    return select_cells(store)


def asked(images: StreamedImages, numbers: np.ndarray) -> list[int]:
    out = np.empty((len(numbers), 60, 60, 3), np.uint8)
    images.read(numbers, out)
    return numbers_of(out)


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize("announced", [0, 3])
def test_a_stream_gives_the_cells_of_its_order(selection: Selection, announced: int) -> None:
    known = np.array(numbers_of(read_images(selection)))
    order = Stream(tuple(part.n_rows for part in selection.parts), seed=0, batch=500, lanes=4)
    images, before = StreamedImages(selection), open_files()
    batches = [order.indices(500 * step, 500) for step in range(12, 24)]
    for index, numbers in enumerate(batches):
        if announced:
            for coming in batches[:announced] if not index else batches[index + announced - 1 : index + announced]:
                images.prepare(coming)
        assert asked(images, numbers) == known[numbers].tolist()
        assert open_files() - before <= 4 * 3
    assert open_files() == before
    images.close()


def test_what_was_announced_and_not_read_is_let_go(selection: Selection) -> None:
    images, before = StreamedImages(selection), open_files()
    images.prepare(np.arange(100, 5000))
    assert open_files() > before
    images.forget()
    assert open_files() == before
    assert asked(images, np.arange(3)) == numbers_of(read_images(selection)[:3])
    images.close()


def test_cells_in_no_order_are_read_too(selection: Selection) -> None:
    known = np.array(numbers_of(read_images(selection)))
    numbers = np.random.default_rng(0).integers(0, selection.n_cells, 30)
    images = StreamedImages(selection)
    images.prepare(numbers)
    assert asked(images, numbers) == known[numbers].tolist()
    images.close()


def test_a_shard_that_is_another_than_its_table_says_is_one_line(tmp_path: Path) -> None:
    store = Store(tmp_path)
    write_slide(store, "a", numbered(50))
    selection = select_cells(store)
    write_slide(store, "a", numbered(40))
    images = StreamedImages(selection)
    images.prepare(np.arange(50))
    with pytest.raises(ConfigError, match=r"cells/a\.parquet: holds other rows.*curate the slide again") as told:
        asked(images, np.arange(50))
    assert "\n" not in str(told.value)
    images.close()


def test_a_sample_has_the_lowest_ranks_of_slides(selection: Selection) -> None:
    whole = read_images(selection)
    assert numbers_of(sample_images(selection, count=8)) == numbers_of(
        np.concatenate([whole[start : start + 2] for start in selection.starts])
    )
    assert len(sample_images(selection, count=8, slides=2)) == 8
    assert len(sample_images(selection, count=10**6)) == selection.n_cells
