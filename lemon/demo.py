"""The demo: every stage on one slide, with settings for two cores."""

from __future__ import annotations

import contextlib
import gzip
import json
from pathlib import Path

import shapely

from lemon import curate
from lemon.cells.names import geojson_name, shard_name
from lemon.config import EXIT_OK, CurateConfig, load
from lemon.report.pictures import draw_curation
from lemon.slides.reader import SlideReader
from lemon.slides.samples import fetch_real_slide, make_synthetic_slide
from lemon.storage import Store


def run(output: Path, *, synthetic: bool = False) -> Path:
    """Run the demo; returns the picture. A rerun goes on where an earlier one stopped."""
    slide = _slide(output / "slides", synthetic=synthetic)
    store = Store(output / "cells")
    arguments = [f"slides={slide}", f"output={store.uri}", "cells_per_slide=null", "geojson=true", "workers.actors=1"]
    if curate.main(load("curate", arguments, CurateConfig)) != EXIT_OK:
        raise SystemExit("demo: curation failed, see above")
    return _picture(output / "nuclei.png", slide=slide, store=store)


def _slide(folder: Path, *, synthetic: bool) -> Path:
    if not synthetic:
        try:
            return fetch_real_slide(folder)
        except OSError as error:
            print(f"demo: no real slide ({error}); going on with a synthetic one")
    return make_synthetic_slide(folder)


def _picture(path: Path, *, slide: Path, store: Store) -> Path:
    with gzip.open(store.path(geojson_name(slide.stem))) as stream:
        features = json.load(stream)["features"]
    polygons = [shapely.Polygon(feature["geometry"]["coordinates"][0]) for feature in features]
    with contextlib.closing(SlideReader(slide)) as reader:
        draw_curation(path, slide=reader, polygons=polygons, cells=store.read_table(shard_name(slide.stem)))
    return path
