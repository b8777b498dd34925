"""Cells of nuclei that another program found: every one of them, under its id; what cannot be used is a failed row."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import shapely

from lemon.cells.ledger import cells_ledger, read_ledger
from lemon.cells.names import geojson_name, shard_name
from lemon.cells.shard import images_from_arrow
from lemon.curate.config import CurateConfig
from lemon.curate.slide import curate_slide
from lemon.runtime.config import load
from lemon.runtime.store import Store
from lemon.schema import SlideRow
from lemon.slides.cohort import list_slides
from tests.nuclei.given.made_up import (
    CENTRES,
    CLASSES,
    COUNT,
    OUTLINES,
    TISSUE,
    geojson,
    uuid_of,
    write_json,
    write_made_up,
)


@pytest.fixture(scope="module")
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    write_made_up(folder / "a.tiff")
    for name in ("b.tiff", "c.tiff"):
        (folder / name).write_bytes((folder / "a.tiff").read_bytes())
    return folder


def curate(slides: Path, output: Path, threads: ThreadPoolExecutor, *words: str) -> dict[str, dict[str, Any]]:
    """The rows of a job's slides, by id."""
    given = ["region_px=512", "cells_per_slide=null", *words]
    config = load("curate", [f"slides={slides}", f"output={output}", *given], CurateConfig)
    ledger = cells_ledger(Store(output), config_fingerprint="f")
    for slide in list_slides(str(slides)):
        row = curate_slide(slide, config=config, segmenter=None, processes=threads, store=ledger.store)
        ledger.commit(row)
    return {row["slide_id"]: row for row in read_ledger(ledger.store).to_pylist()}


def test_every_given_nucleus_is_a_cell_under_its_id(tmp_path: Path, slides: Path, threads: ThreadPoolExecutor) -> None:
    path = write_json(tmp_path / "a.geojson", geojson())
    rows = curate(slides / "a.tiff", tmp_path / "out", threads, f"cells_from={path}", "geojson=true")
    assert (rows["a"]["status"], rows["a"]["error"]) == ("done", None)
    assert rows["a"]["n_nuclei"] == rows["a"]["n_cells"] == COUNT
    table = pq.read_table(tmp_path / "out" / shard_name("a"))
    index = [int(each[-12:]) for each in table["foreign_id"].to_pylist()]
    assert sorted(index) == list(range(COUNT))
    assert table["foreign_class"].to_pylist() == [CLASSES[each] for each in index]
    assert set(table["foreign_probability"].to_pylist()) == {0.5}
    place = np.stack([table["x_level0_px"], table["y_level0_px"]], axis=1)
    assert np.abs(place - CENTRES[index]).max() <= 0.5
    corners = shapely.get_coordinates(shapely.from_wkb(table["polygon"].to_numpy())).reshape(COUNT, 13, 2)
    assert np.abs(corners[:, :12] - OUTLINES[index]).max() < 1e-3
    x, y = np.round(place[0] - 0.5 - 29.5).astype(int)
    assert np.array_equal(images_from_arrow(table["image"])[0], TISSUE.image[y : y + 60, x : x + 60])


def test_geojson_that_goes_back_to_qupath_has_its_ids_classes_and_valid_rings(
    tmp_path: Path, slides: Path, threads: ThreadPoolExecutor
) -> None:
    path = write_json(tmp_path / "a.geojson", geojson())
    curate(slides / "a.tiff", tmp_path / "out", threads, f"cells_from={path}", "geojson=true")
    written = json.loads(gzip.decompress((tmp_path / "out" / geojson_name("a")).read_bytes()))
    assert written["type"] == "FeatureCollection"
    features = {feature["id"]: feature for feature in written["features"]}
    assert features.keys() == {uuid_of(index) for index in range(COUNT)}
    for index in range(COUNT):
        feature = features[uuid_of(index)]
        assert feature["type"] == "Feature"
        (ring,) = feature["geometry"]["coordinates"]
        assert ring[0] == ring[-1]
        assert shapely.Polygon(ring).is_valid
        assert np.abs(np.array(ring[:-1]) - OUTLINES[index]).max() < 0.01
        properties = feature["properties"]
        assert (properties["objectType"], properties["classification"]["name"]) == ("detection", CLASSES[index])
        assert all(isinstance(value, float) for value in properties["measurements"].values())
    again = tmp_path / "out" / geojson_name("a")  # what was exported is read again, to the same nuclei
    curate(slides / "a.tiff", tmp_path / "again", threads, f"cells_from={again}")
    first, second = (pq.read_table(tmp_path / name / shard_name("a")) for name in ("out", "again"))
    assert first["foreign_id"].equals(second["foreign_id"])
    assert first["cell_id"].equals(second["cell_id"])


def test_a_slide_without_nuclei_or_with_bad_ones_is_a_failed_row_and_the_others_are_done(
    tmp_path: Path, slides: Path, threads: ThreadPoolExecutor
) -> None:
    write_json(tmp_path / "n" / "a.geojson", geojson())
    write_json(tmp_path / "n" / "b.geojson", geojson(OUTLINES * 4))
    rows = curate(slides, tmp_path / "out", threads, f"cells_from={tmp_path / 'n'}")
    assert {name: row["status"] for name, row in rows.items()} == {"a": "done", "b": "failed", "c": "failed"}
    assert "of its nuclei lie beyond the slide of 800 x 800 px" in rows["b"]["error"]
    assert rows["c"]["error"] == f"cells_from: {tmp_path / 'n'} has no file of nuclei for it"
    (tmp_path / "n" / "c.geojson").write_bytes(b"")
    (row,) = curate(slides / "c.tiff", tmp_path / "more", threads, f"cells_from={tmp_path / 'n'}").values()
    assert row["error"] == f"cells_from: {tmp_path / 'n' / 'c.geojson'}: is empty (0 bytes)"


def test_a_rerun_sees_that_the_nuclei_of_a_slide_are_other_ones(
    tmp_path: Path, slides: Path, threads: ThreadPoolExecutor
) -> None:
    path = write_json(tmp_path / "n" / "a.geojson", geojson())
    words = [f"slides={slides}", "output=o", f"cells_from={tmp_path / 'n'}"]
    config = load("curate", words, CurateConfig)
    curate(slides / "a.tiff", tmp_path / "out", threads, f"cells_from={tmp_path / 'n'}")
    rows = SlideRow.read(read_ledger(Store(tmp_path / "out")))
    assert config.cells_from is not None
    assert config.cells_from.changed(rows) == set()
    write_json(path, geojson(OUTLINES[:50]))
    assert config.cells_from.changed(rows) == {"a"}
    path.unlink()  # what is gone has not changed
    assert config.cells_from.changed(rows) == set()


def test_all_given_nuclei_are_kept_unless_a_sample_is_asked_for() -> None:
    words = ["slides=s", "output=o", "cells_from=nuclei"]
    assert load("curate", words, CurateConfig).cells_per_slide is None
    assert load("curate", [*words, "cells_per_slide=1000"], CurateConfig).cells_per_slide == 1000


def test_settings_decide_the_fingerprint_and_the_path_does_not() -> None:
    words = ["slides=s", "output=o"]
    plain, one, two, um = (
        load("curate", [*words, *more], CurateConfig).result_settings()
        for more in ([], ["cells_from=a"], ["cells_from=b"], ["cells_from=a", "cells_from.unit=um"])
    )
    assert one == two != um
    assert "segmenter" in plain
    assert "segmenter" not in one
